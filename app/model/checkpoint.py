"""Loading a published checkpoint: safetensors only, every key used, every parameter filled.

An adapter dropped in silence costs the published 8B model nearly all of its accuracy, so a missing or an
unused key is an error that names it. Nothing is unpickled and no code of the checkpoint is run.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from app.model.config import ModelConfig
from app.model.weights import Layer, Linear, Weights, fuse

POCKET = Path(__file__).parent.parent / "pocket"
UPDATE_ADAPTER = "default"
READ_ADAPTER = "decoder_adapter"
_SAMPLED_ABOVE = 2**20
_SAMPLE = 2**16
_SAMPLES = 16


# forms of a tokenizer that transformers reads, and makes a tokenizer.json of
_TOKENIZERS = ("tokenizer.model", "vocab.json", "vocab.txt")


class CheckpointError(ValueError):
    """The checkpoint cannot be used; the message names the file or the keys."""


def resolve(model: str) -> Path:
    """The directory of ``model``: "pocket", a directory, or a hub id, downloaded with huggingface_hub.

    HF_HUB_OFFLINE and the other variables of huggingface_hub are honoured. Raises CheckpointError.
    """
    if model == "pocket":
        return POCKET
    if Path(model).is_dir():
        return Path(model)
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise CheckpointError(f"no such directory: {model}")
    # imported here: a local model needs no hub, and the import costs half a second
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(model, allow_patterns=["*.json", "*.safetensors", "*.jinja", "tokenizer.model"])
        )
    except Exception as error:
        raise CheckpointError(f"{model} is no directory here and could not be downloaded: {error}") from error


def check_tokenizer(directory: Path) -> None:
    """Raises CheckpointError if the checkpoint has a tokenizer, but not as ``tokenizer.json``.

    Others would have to be converted, with packages that a server has no other use for.
    """
    found = [name for name in _TOKENIZERS if (directory / name).is_file()]
    if found and not (directory / "tokenizer.json").is_file():
        raise CheckpointError(
            f"{directory} has {found[0]} but no tokenizer.json, which is what is read here. Where sentencepiece and "
            "protobuf are installed transformers writes it: from transformers import AutoTokenizer; "
            f"AutoTokenizer.from_pretrained({str(directory)!r}).save_pretrained({str(directory)!r})"
        )


class TensorFiles:
    """The tensors of a checkpoint directory by key, one file or sharded with an index. Tracks what is used."""

    def __init__(self, directory: Path) -> None:
        index = directory / "model.safetensors.index.json"
        single = directory / "model.safetensors"
        if index.exists():
            listed: dict[str, str] = json.loads(index.read_text("utf-8"))["weight_map"]
            names = sorted(set(listed.values()))
        elif single.exists():
            listed, names = {}, [single.name]
        else:
            raise CheckpointError(f"{directory} holds neither {single.name} nor {index.name}")
        self._files: dict[str, Any] = {}
        self._where: dict[str, str] = {}
        for name in names:
            if os.sep in name or not (directory / name).exists():
                raise CheckpointError(f"{index.name} names a file that is not there: {name}")
            self._files[name] = safe_open(directory / name, framework="pt")
            for key in self._files[name].keys():  # noqa: SIM118 - safe_open is no mapping
                self._where[key] = name
        absent = sorted(set(listed) - set(self._where))
        if absent:
            raise CheckpointError(f"{index.name} lists keys that no file holds: {_some(absent)}")
        self._unused = set(self._where)

    def __enter__(self) -> TensorFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.clear()

    def __contains__(self, key: str) -> bool:
        return key in self._where

    def take(self, key: str, shape: tuple[int, ...]) -> Tensor:
        """The tensor ``key``, marked used. Raises CheckpointError if it is missing or of another shape."""
        if key not in self._where:
            raise CheckpointError(f"the checkpoint has no {key}")
        tensor: Tensor = self._files[self._where[key]].get_tensor(key)
        if tuple(tensor.shape) != shape:
            raise CheckpointError(f"{key} has shape {tuple(tensor.shape)}, the config asks for {shape}")
        self._unused.discard(key)
        return tensor

    def drop(self, key: str) -> None:
        """Marks ``key`` as used though it is not read (a duplicate of another)."""
        self._unused.discard(key)

    def finish(self) -> None:
        """Raises CheckpointError if a key was never used."""
        if self._unused:
            raise CheckpointError(
                f"keys of the checkpoint that the model does not use: {_some(sorted(self._unused))}"
            )

    def digest(self, config: bytes) -> str:
        """A fingerprint of config and weights: blake2b over every tensor's key, dtype, shape and a sample of its bytes.

        The sample of a tensor up to 1 MiB is all of it; of larger ones 16 evenly spaced pieces of 64 KiB are taken, so
        that a 32 GB checkpoint is told from another in a second. Numbers between the pieces may differ unnoticed.
        """
        digest = hashlib.blake2b(config, digest_size=16)
        for key in sorted(self._where):
            tensor: Tensor = self._files[self._where[key]].get_tensor(key)
            digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            raw = tensor.reshape(-1).view(torch.uint8)
            if raw.numel() <= _SAMPLED_ABOVE:
                digest.update(raw.numpy().tobytes())
                continue
            for start in torch.linspace(0, raw.numel() - _SAMPLE, _SAMPLES).long().tolist():
                digest.update(raw[start : start + _SAMPLE].numpy().tobytes())
        return digest.hexdigest()


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:8]) + (f" and {len(keys) - 8} more" if len(keys) > 8 else "")


class _Reader:
    """Builds the linears of one model from files, merging adapters in float32."""

    def __init__(self, files: TensorFiles, config: ModelConfig, cast: Callable[[Tensor], Tensor]) -> None:
        self.files = files
        self.config = config
        self.cast = cast

    def linear(self, name: str, outputs: int, inputs: int, *, bias: bool) -> Linear:
        lora = self.config.lora
        adapted = lora is not None and name.rsplit(".", 1)[1] in lora.targets
        base = f"{name}.base_layer" if adapted else name
        weight = self.files.take(f"{base}.weight", (outputs, inputs)).float()
        offset = self.cast(self.files.take(f"{base}.bias", (outputs,))) if bias else None
        if lora is None or not adapted:
            return Linear(self.cast(weight), offset)

        def adapter(which: str) -> tuple[Tensor, Tensor]:
            down = self.files.take(f"{name}.lora_A.{which}.weight", (lora.r, inputs)).float()
            up = self.files.take(f"{name}.lora_B.{which}.weight", (outputs, lora.r)).float()
            return down, up * lora.scale

        update_down, update_up = adapter(UPDATE_ADAPTER)
        if not self.config.add_decoder_lora:
            return Linear(self.cast(weight + update_up @ update_down), offset)
        read_down, read_up = adapter(READ_ADAPTER)
        return Linear(
            self.cast(weight + read_up @ read_down),
            offset,
            self.cast(torch.cat([update_down, read_down])),
            self.cast(torch.cat([update_up, -read_up], dim=1)),
        )

    def layer(self, index: int) -> Layer:
        c, prefix = self.config, f"model.layers.{index}"
        d, q, kv = c.hidden_size, c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        return Layer(
            input_norm=self.cast(self.files.take(f"{prefix}.input_layernorm.weight", (d,))),
            qkv=fuse(
                [
                    self.linear(f"{attention}.q_proj", q, d, bias=c.attention_bias),
                    self.linear(f"{attention}.k_proj", kv, d, bias=c.attention_bias),
                    self.linear(f"{attention}.v_proj", kv, d, bias=c.attention_bias),
                ]
            ),
            output=self.linear(f"{attention}.o_proj", d, q, bias=c.attention_bias),
            post_norm=self.cast(self.files.take(f"{prefix}.post_attention_layernorm.weight", (d,))),
            gate_up=fuse(
                [
                    self.linear(f"{mlp}.gate_proj", c.intermediate_size, d, bias=c.mlp_bias),
                    self.linear(f"{mlp}.up_proj", c.intermediate_size, d, bias=c.mlp_bias),
                ]
            ),
            down=self.linear(f"{mlp}.down_proj", d, c.intermediate_size, bias=c.mlp_bias),
        )


def load_weights(
    directory: Path,
    config: ModelConfig,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Weights, str]:
    """The weights in ``dtype`` on ``device``, and the fingerprint of config and weights.

    ``progress(done, total)`` is told of each layer. Raises CheckpointError by name.
    """

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(device=device, dtype=dtype)

    c = config
    with TensorFiles(directory) as files:
        reader = _Reader(files, config, cast)
        embedding = cast(files.take("model.embed_tokens.weight", (c.vocab_size, c.hidden_size)))
        layers = []
        for index in range(c.num_layers):
            layers.append(reader.layer(index))
            if progress is not None:
                progress(index + 1, c.num_layers)
        if c.tie_word_embeddings:
            head = embedding
            files.drop("lm_head.weight")
        else:
            head = cast(files.take("lm_head.weight", (c.vocab_size, c.hidden_size)))
        bos = None
        if c.add_bos_embedding:
            bos = cast(files.take("bos_embedding", (c.num_layers, 1, c.hidden_size))[:, 0])
        # The published code writes this flag, and counts a pool without it as not there, to be overwritten by the first
        # update. Here a file that has a pool and no flag is taken to mean its pool.
        initialized = True
        if "initialized" in files:
            initialized = bool(files.take("initialized", ()).item())
        weights = Weights(
            embedding=embedding,
            layers=tuple(layers),
            norm=cast(files.take("model.norm.weight", (c.hidden_size,))),
            head=head,
            bos=bos,
            new_memory_position=cast(files.take("new_memory_positional_emb", (1, 1, c.hidden_size))[0, 0]),
            memory=files.take("memory", (c.num_layers, c.pool_size, c.hidden_size)).to(dtype),
            initialized=initialized,
        )
        for index in range(c.num_layers):
            # older transformers saved this buffer; it is computed from the config here
            files.drop(f"model.layers.{index}.self_attn.rotary_emb.inv_freq")
        files.finish()
        fingerprint = files.digest((directory / "config.json").read_bytes())
    return weights, fingerprint
