"""A trial of a device's operations before they serve: each runs at the model's shape, beside torch, reading in
every size of tile that serving takes.

What a compiler, a driver or a GPU nobody has tried does wrong shows here, and not in an answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from app.model.batch import ContextCache, Reading
from app.model.config import ModelConfig
from app.model.operations import Operations, Sizes
from app.model.pools import Pools
from app.model.rope import RopeTable
from app.model.torch_operations import TorchOperations
from kernels.quantise import key_scale

_PROMPT = 5
# sequences that read one pool in one step: a larger tile is taken for more of them
_SHARING = (1, 3, 5, 9, 17, 33)
_SEEN = 3
# contexts are short beside pools: their keys are so much larger that some heads look at little else
_CONTEXT_WEIGHT = 4
# of the standard deviation of a head's output: over a long pool that is small, and a rounding is smaller still
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 6e-2}


class Wrong(RuntimeError):
    """An operation's results are not torch's; the message names it."""


def try_out(
    operations: Operations,
    config: ModelConfig,
    rope: RopeTable,
    dtype: torch.dtype,
    device: torch.device,
    sizes: Sizes,
) -> None:
    """Raises Wrong, and whatever launching a kernel raises. Takes the room of a few pools of one layer.

    ``sizes`` are what ``operations`` were made for. The twin computes with the same numbers in float32: in bfloat16 it
    would be further off than a wrong kernel.
    """
    one = replace(config, num_layers=1)
    twin = TorchOperations(one, rope.in_float32(), torch.float32, device, eight_bit=operations.form.eight_bit)
    both = ((operations, dtype), (twin, torch.float32))
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(device, dtype)

    width, wide = config.hidden_size, 2 * config.num_kv_heads * config.head_dim
    weight, norm = normal(wide, width) * width**-0.5, torch.ones(width, dtype=dtype, device=device)
    hidden = normal(config.num_tokens, width)
    slots = torch.randperm(config.pool_slots, generator=generator)
    shape = config.num_kv_heads, config.pool_slots, config.head_dim
    written = []
    for each, form in both:
        pair = [torch.zeros(shape, dtype=form, device=device) for _ in range(2)]
        rows, own, weights = hidden.to(form), norm.to(form), weight.to(form)
        at = each.prepare_slots(slots[: config.num_tokens], config.pool_slots)
        each.write(rows, own, weights, None, at, pair[0], pair[1])
        written.append(pair)
    _compare("writing a block", written[0], written[1], dtype)

    rank = slots.to(torch.int32)[None]
    rank = torch.where(rank >= config.pool_size, -1, rank)
    pool = [normal(1, config.num_kv_heads, config.pool_slots, config.head_dim) for _ in range(2)]
    steps = _steps(sizes)
    most = max(decode for decode, _ in steps) + 1
    cache = ContextCache.allocate(one, most * _PROMPT + 1, dtype, device)
    cache.key[:], cache.value[:] = normal(*cache.key.shape) * _CONTEXT_WEIGHT, normal(*cache.value.shape)
    query = normal(most + _PROMPT, config.num_heads, config.head_dim)
    tables = torch.arange(1, most * _PROMPT + 1).view(most, _PROMPT)
    found: list[list[Tensor]] = []
    for each, form in both:
        scale = key_scale(pool[0]) if each.form.eight_bit else None
        pools = Pools.allocate(one, 1, 1, form, device, each.form, scale)
        pools.put(0, slice(0, config.pool_slots), pool[0].to(form), pool[1].to(form))
        each.make_readable(pools, 0, rank, 0)
        contexts, asked = ContextCache(cache.key.to(form), cache.value.to(form)), query.to(form)
        found.append([])
        for decode, prompt in steps:
            readings = [Reading(slice(row, row + 1), 0, 0, tables[row], _SEEN) for row in range(decode)]
            if prompt:
                readings.append(Reading(slice(decode, decode + prompt), 0, 0, tables[decode], prompt))
            out = asked.new_zeros(decode + prompt, config.num_heads * config.head_dim)
            each.prepare(readings, decode)(0, asked[: decode + prompt], pools, contexts, out)
            found[-1].append(out.view(-1, config.head_dim))
    _compare("reading a pool", found[0], found[1], dtype)

    own = normal(2, config.num_kv_heads, 2 * _PROMPT, config.head_dim)
    last = query[:_PROMPT].expand(2, _PROMPT, -1, -1)
    causal = [[each.attend_causally(last.to(form), own.to(form), own.to(form))] for each, form in both]
    _compare("a self-update's attention", causal[0], causal[1], dtype)
    for name, parts in _between(both, config, rope, normal):
        _compare(name, parts[0], parts[1], dtype)


def _between(
    both: tuple[tuple[Operations, torch.dtype], ...],
    config: ModelConfig,
    rope: RopeTable,
    normal: Callable[..., Tensor],
) -> Iterator[tuple[str, list[list[Tensor]]]]:
    """What stands between a layer's products: by name, of each of ``both`` what it gave."""

    def mild(*size: int) -> Tensor:
        # the roundings of rare large numbers would stand out from the rest's deviation
        return normal(*size).clamp_(-2, 2)

    x, delta = mild(_PROMPT, config.hidden_size), mild(_PROMPT, config.hidden_size)
    weight = 1 + mild(config.hidden_size) / 8
    yield (
        "a sum and its norm",
        [list(each.add_norm(x.to(form), delta.to(form), weight.to(form))) for each, form in both],
    )
    gate_up = mild(_PROMPT, 2 * config.intermediate_size)
    yield "a gate", [[each.gate(gate_up.to(form))] for each, form in both]
    qkv = mild(_PROMPT, (config.num_heads + 2 * config.num_kv_heads) * config.head_dim)
    # all but the last row are reads
    rows = torch.arange(_PROMPT - 1, 0, -1, device=x.device)
    cos, sin = rope.at(torch.arange(1, _PROMPT + 1, device=x.device))
    placed = []
    for each, form in both:
        cache = qkv.new_zeros(2, _PROMPT + 1, config.num_kv_heads, config.head_dim, dtype=form)
        given = qkv.to(form, copy=True), cos.to(form), sin.to(form), rows
        # what no row was written to is nothing on both sides
        placed.append([*each.place(*given, cache[0], cache[1]), cache[:, 1:_PROMPT], 1 + cache[:, [0, -1]]])
    yield "rotating rows", placed


def _steps(sizes: Sizes) -> list[tuple[int, int]]:
    """How many sequences decode and how many tokens of a prompt are read, in steps that ``sizes`` have room for."""
    prompt = min(_PROMPT, sizes.rows)
    steps = [(decode, 0) for decode in _SHARING if decode <= min(sizes.sequences, sizes.rows)]
    steps.append((0, prompt))
    if sizes.sequences > 1 and sizes.rows > prompt:
        steps.append((1, prompt))
    return steps


def _compare(name: str, found: list[Tensor], expected: list[Tensor], dtype: torch.dtype) -> None:
    """Each [..., d_head] against its twin, head by head; ``dtype`` is what was computed in."""
    for a, b in zip(found, expected, strict=True):
        error = (a.float() - b).abs().amax(dim=-1)
        deviation = b.std(dim=-1)
        # a NaN compares as wrong
        if not bool((error <= _TOLERANCE[dtype] * deviation).all()):
            raise Wrong(f"{name} differs from torch's by {float((error / deviation).max()):.3g} deviations")
