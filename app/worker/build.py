"""Puts a worker together from the settings: device, weights, arena, store, engine."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from app.memory.arena import Arena
from app.memory.file import most_bytes
from app.memory.lanes import lanes_of
from app.memory.residency import Residency, Submit
from app.messages import ModelInfo
from app.model.backbone import Backbone
from app.model.checkpoint import check_tokenizer, load_weights, resolve
from app.model.config import ModelConfig, read_config, read_generation_defaults
from app.model.operations import Sizes
from app.model.torch_operations import TorchOperations
from app.settings import Settings
from app.store.base import Store
from app.worker.budget import CannotStart, free_memory, share_out
from app.worker.engine import Engine
from app.worker.graphs import cuda_capture
from app.worker.operations import operations_for
from app.worker.rows import Rows
from app.worker.scheduler import Limits
from app.worker.updates import compaction_interval

_SHARED_ABOVE = 512


# as huggingface_hub lays out what it downloads: models--ORG--NAME/snapshots/COMMIT
_HUB_DIRECTORY = "models--"


@dataclass(frozen=True)
class Built:
    engine: Engine
    info: ModelInfo


def pick_device(wanted: str) -> torch.device:
    """Raises CannotStart if "cuda" is asked for and absent."""
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise CannotStart("device cuda was asked for, but torch sees no CUDA device")
    return torch.device("cuda")


def pick_dtype(wanted: str, device: torch.device) -> torch.dtype:
    if wanted == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[wanted]


def pick_threads(wanted: int, config: ModelConfig) -> int:
    """CPU threads: those asked for; else all cores, but one where matrices are too small to share.

    Below a hidden size of 512 handing work to a second thread costs more than it saves, the more so on
    cores that have other work too.
    """
    if wanted:
        return wanted
    return 1 if config.hidden_size < _SHARED_ABOVE else len(os.sched_getaffinity(0))


def served_name(settings: Settings) -> str:
    """What clients call the model: as they were told, else by its hub id, else by its directory's name."""
    if settings.served_model_name:
        return settings.served_model_name
    if settings.model == "pocket" or not Path(settings.model).is_dir():
        return settings.model
    # of "." and ".." too there is a name
    directory = Path(os.path.abspath(settings.model))
    hub = directory.parent.parent.name
    if directory.parent.name == "snapshots" and hub.startswith(_HUB_DIRECTORY):
        return hub.removeprefix(_HUB_DIRECTORY).replace("--", "/", 1)
    return directory.name


def build(
    settings: Settings,
    store: Store,
    submit: Submit,
    progress: Callable[[int, int], None] | None = None,
    directory: Path | None = None,
) -> Built:
    """Loads the model and allocates the pools. Raises CannotStart, CheckpointError, UnsupportedModel.

    ``progress(done, total)`` is told of each layer that is loaded. ``directory`` is where the
    model is, if that is known.
    """
    directory = directory or resolve(settings.model)
    device = pick_device(settings.device)
    dtype = pick_dtype(settings.dtype, device)
    check_tokenizer(directory)
    config = read_config(directory)
    defaults = read_generation_defaults(directory)
    torch.set_num_threads(pick_threads(settings.threads, config))
    weights, fingerprint = load_weights(directory, config, dtype=dtype, device=device, progress=progress)
    eight_bit = settings.pool_dtype == "int8"
    if eight_bit and not weights.initialized:
        raise CannotStart(
            "8-bit pools take their scales from the checkpoint's own pool, and this one has none"
        )
    sizes = Sizes(
        rows=max(settings.step_tokens, settings.max_running),
        sequences=settings.max_running,
        context=1 + Rows.rounded(settings.max_sequence),
    )
    make = operations_for(sizes, rotating=settings.rotation == "read", eight_bit=eight_bit)
    backbone = Backbone(config, weights, settings.max_sequence, make)
    captures = settings.cuda_graphs and not isinstance(backbone.operations, TorchOperations)
    budget = share_out(backbone, settings, free_memory(device), alone=device.type == "cuda")
    arena = Arena(backbone, budget.slots, budget.hot)
    lanes = lanes_of(device, dtype)
    residency = Residency(backbone, arena, store, fingerprint, settings.warm_bytes, submit, lanes)
    # what a sequence may have, and what the API holds requests to: never more than there is room for at all
    longest = min(settings.max_sequence, Rows(budget.rows + 1).capacity)
    engine = Engine(
        backbone,
        arena,
        residency,
        store,
        Limits(
            step_tokens=settings.step_tokens,
            max_running=settings.max_running,
            updates=budget.updates,
            cache_rows=budget.rows,
            queue_requests=settings.queue_requests,
            queue_requests_tenant=settings.queue_requests_tenant,
            queue_tokens=settings.queue_tokens,
            update_share=settings.update_share,
        ),
        submit,
        max_sequence=longest,
        compacted_after=compaction_interval(config.num_blocks),
        capture=cuda_capture() if captures else None,
        # a CPU that runs the step is the one that would plan
        plans_ahead=device.type != "cpu",
    )
    info = ModelInfo(
        name=served_name(settings),
        path=str(directory),
        fingerprint=fingerprint,
        vocab_size=config.vocab_size,
        num_blocks=config.num_blocks,
        num_tokens=config.num_tokens,
        min_context=config.min_context,
        max_context=config.max_context,
        max_sequence=longest,
        stop_tokens=defaults.stop_tokens,
        temperature=defaults.temperature,
        top_p=defaults.top_p,
        top_k=defaults.top_k,
        repetition_penalty=defaults.repetition_penalty,
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        memory_file_bytes=most_bytes(config),
    )
    return Built(engine, info)
