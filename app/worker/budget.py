"""How the device's memory is shared out: pools, rotated copies, context cache, and what is left alone."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from app.memory.arena import Arena
from app.memory.residency import MOST_LOADS
from app.model.backbone import Backbone
from app.settings import Settings

_SPARE_COPIES = 8
_MOST_SLOTS = 4096
_MOST_ROWS = 131_072
_GIB = 2**30
_CGROUP = Path("/sys/fs/cgroup")
# of a GPU's driver, of torch's allocators for pinned and for plain host memory
_LACKING = re.compile(r"out of memory|(cannot|can't|not enough).* memory", re.IGNORECASE)


class CannotStart(ValueError):
    """The settings and this machine do not fit; the message is for the operator."""


@dataclass(frozen=True)
class Budget:
    """``slots`` for pools, ``hot`` rotated copies, ``rows`` of the context cache, ``updates`` at work at once."""

    slots: int
    hot: int
    rows: int
    updates: int


def free_memory(device: torch.device) -> int:
    """Bytes that nobody uses now, the weights being loaded."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    return min(free, left_to_container(_CGROUP, free))


def left_to_container(group: Path, otherwise: int) -> int:
    """Bytes that a container's own limit leaves (cgroup v2); ``otherwise`` where there is none, or no cgroup v2.

    What is cached of files counts as used there and as free here: it goes when it is needed.
    """
    with suppress(OSError, ValueError, KeyError):
        limit = int((group / "memory.max").read_text())
        lines = (group / "memory.stat").read_text().splitlines()
        cached = int(dict(line.split() for line in lines)["inactive_file"])
        return max(0, limit - int((group / "memory.current").read_text()) + cached)
    return otherwise


def share_out(backbone: Backbone, settings: Settings, free: int, *, alone: bool) -> Budget:
    """Divides ``free`` bytes. Raises CannotStart if not one tenant fits.

    ``alone``: the memory is a GPU's and the server's own. Then pools get all that the context cache, updates at work
    and a reserve leave; on a CPU, which has other work too, a quarter.
    """
    rows, updates = cache_rows(backbone, settings, free), updates_at_once(backbone, settings, free)
    if not alone:
        slots, hot = beside_others(backbone, settings.resident_bytes or free // 4)
        return Budget(slots, hot, rows, updates)
    left = free - rows * row_bytes(backbone) - updates * update_bytes(backbone)
    left -= reserve(backbone, settings, free)
    slots, hot = by_running(backbone, settings.resident_bytes or left, settings.max_running)
    return Budget(slots, hot, rows, updates)


def reserve(backbone: Backbone, settings: Settings, free: int) -> int:
    """Bytes of a GPU that are left for a step's workspace and captured graphs, the logits of a step all of whose tokens
    are scored, those that graphs make and leave, and as many loads as are under way at once."""
    c, rows = backbone.config, max(settings.step_tokens, settings.max_running) + 2 * settings.max_running
    logits = rows * c.vocab_size * backbone.dtype.itemsize
    return max(_GIB, free // 32) + logits + MOST_LOADS * load_bytes(backbone)


def load_bytes(backbone: Backbone) -> int:
    """Bytes that a load takes beside its slot: a layer of hidden states and their norm; of an 8-bit pool also the
    layer's K and V as they are projected and in 8 bits, and one of them in float32."""
    c, each = backbone.config, backbone.dtype.itemsize
    hidden = 2 * c.pool_size * c.hidden_size * each
    if not backbone.operations.form.eight_bit:
        return hidden
    return hidden + c.num_kv_heads * c.pool_size * c.head_dim * (2 * each + 2 + torch.float32.itemsize)


def unbuilt(error: RuntimeError | MemoryError) -> str | None:
    """What is told of an error while a worker is built if memory was lacking; None if it was something else."""
    told = str(error).partition("\n")[0]
    if not isinstance(error, torch.OutOfMemoryError | MemoryError) and not _LACKING.search(told):
        return None
    return (
        "there is not enough memory for this model with these settings: lower --resident-bytes, --context-tokens, "
        "--max-running or --step-tokens, or have smaller weights and pools by --dtype bfloat16 and --pool-dtype int8"
        + (f" ({told})" if told else "")
    )


def row_bytes(backbone: Backbone) -> int:
    """Bytes of one token of prompt or completion in the context cache."""
    c = backbone.config
    return 2 * c.num_layers * c.num_kv_heads * c.head_dim * backbone.dtype.itemsize


def update_bytes(backbone: Backbone) -> int:
    """Bytes of an update at work: its block, and K and V of the longest context with its tail, or, of one that a step
    takes whole, the block once more."""
    c = backbone.config
    block = c.num_layers * c.num_tokens * c.hidden_size * backbone.dtype.itemsize
    return block + max(block, (1 + c.num_tokens + c.max_context) * row_bytes(backbone))


def updates_at_once(backbone: Backbone, settings: Settings, free: int) -> int:
    """How many updates may be at work: what a sixty-fourth of the ``free`` bytes holds, two at least."""
    return min(settings.max_running, max(2, free // 64 // update_bytes(backbone)))


def cache_rows(backbone: Backbone, settings: Settings, free: int) -> int:
    """Tokens of prompts and completions held at once: as set, else an eighth of the ``free`` bytes, bounded."""
    if settings.context_tokens:
        return settings.context_tokens
    return max(settings.max_sequence, min(_MOST_ROWS, free // 8 // row_bytes(backbone)))


def beside_others(backbone: Backbone, budget: int) -> tuple[int, int]:
    """Pools and rotated copies in ``budget`` bytes: a copy for each pool, so that none is ever built twice.

    There are a few more copies than pools, so that a new version can be read while generations still read the
    old one.
    """
    each, copy = Arena.bytes_per_pool(backbone), Arena.bytes_per_copy(backbone)
    few = budget // (each + 2 * copy)
    slots, spare = (few, few)
    if few >= _SPARE_COPIES:
        slots, spare = (budget - _SPARE_COPIES * copy) // (each + copy), _SPARE_COPIES
    slots = _at_least_one(slots, budget, each + 2 * copy)
    return slots, slots + spare


def by_running(backbone: Backbone, budget: int, max_running: int) -> tuple[int, int]:
    """Pools and rotated copies in ``budget`` bytes: copies only for those who are being read.

    A tenth of the bytes is for copies, never more than generations can run at once on as many tenants.
    """
    each, copy = Arena.bytes_per_pool(backbone), Arena.bytes_per_copy(backbone)
    hot = min(max(budget // 10 // copy, 1), max_running + _SPARE_COPIES)
    slots = _at_least_one((budget - hot * copy) // each, budget, each + copy)
    return slots, min(hot, slots + _SPARE_COPIES)


def _at_least_one(slots: int, budget: int, needed: int) -> int:
    if slots < 1:
        raise CannotStart(
            f"one tenant's pool takes {needed:,} bytes, the resident budget is {max(budget, 0):,}: "
            "raise --resident-bytes"
        )
    return min(slots, _MOST_SLOTS)
