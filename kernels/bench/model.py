"""Whole steps of the worker with random weights: decoding, first token, update and swap-in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from app.memory.arena import Arena, Memory, View
from app.memory.lanes import lanes_of
from app.model.backbone import Backbone
from app.model.config import ModelConfig
from app.model.forgetting import change
from app.model.operations import MakeOperations
from app.model.weights import Layer, Linear, Weights, fuse
from app.worker.graphs import Capture
from app.worker.rows import Rows
from app.worker.runner import ReadChunk, Runner, UpdateChunk
from app.worker.sequence import Sequence, begin
from kernels.bench.attention import COPIES, ROTATING
from kernels.bench.report import Row
from kernels.bench.timing import WARM_UPS, Repeated, Work, captured, interleaved

_CONTEXT = 64
# of each of the two adapters
_LORA_RANK = 16
PROMPT = 32
ROOM = 128


def random_weights(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> Weights:
    """Weights of a trained model's sizes, drawn on the device; the checkpoint's own pool is not wanted here.

    Adapted as the 8B checkpoint is: a self-update adds the difference of two adapters to all projections but the
    attention's output.
    """

    def matrix(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, dtype=dtype, device=device).mul_(columns**-0.5)

    def ones() -> Tensor:
        return torch.ones(config.hidden_size, dtype=dtype, device=device)

    def adapted(rows: int, columns: int) -> Linear:
        return Linear(
            matrix(rows, columns), None, matrix(2 * _LORA_RANK, columns), matrix(rows, 2 * _LORA_RANK)
        )

    width = config.hidden_size
    heads, kv_heads = (count * config.head_dim for count in (config.num_heads, config.num_kv_heads))
    layers = tuple(
        Layer(
            ones(),
            fuse([adapted(heads, width), adapted(kv_heads, width), adapted(kv_heads, width)]),
            Linear(matrix(width, heads)),
            ones(),
            fuse([adapted(config.intermediate_size, width), adapted(config.intermediate_size, width)]),
            adapted(width, config.intermediate_size),
        )
        for _ in range(config.num_layers)
    )
    return Weights(
        embedding=matrix(config.vocab_size, config.hidden_size),
        layers=layers,
        norm=ones(),
        head=matrix(config.vocab_size, config.hidden_size),
        bos=matrix(config.num_layers, config.hidden_size),
        new_memory_position=matrix(1, config.hidden_size)[0],
        memory=torch.empty(config.num_layers, 0, config.hidden_size, dtype=dtype),
        initialized=True,
    )


def weight_bytes(weights: Weights) -> int:
    """Bytes that a step reads of the weights: all but the embedding."""
    parts = [weights.head] + [
        linear.weight for y in weights.layers for linear in (y.qkv, y.output, y.gate_up, y.down)
    ]
    return sum(part.nbytes for part in parts)


@dataclass
class Bench:
    """A runner with ``tenants`` resident and readable."""

    backbone: Backbone
    arena: Arena
    runner: Runner
    rows: Rows
    memories: list[Memory]
    decoders: list[Sequence] = field(default_factory=list)

    @classmethod
    def make(
        cls,
        config: ModelConfig,
        weights: Weights,
        tenants: int,
        operations: MakeOperations,
        capture: Capture | None,
    ) -> Bench:
        backbone = Backbone(config, weights, ROOM, operations)
        # one more, to be swapped in
        arena = Arena(backbone, tenants + 1, tenants)
        cache_rows = (tenants + 1) * ROOM + 1
        runner = Runner(backbone, arena, cache_rows, max(tenants, 1), capture)
        for context in (runner.cache.key, runner.cache.value):
            # contexts are read as if prompts had been written there
            context.normal_()
        generator = torch.Generator().manual_seed(0)
        born = torch.zeros(1, config.pool_size, dtype=torch.int32)
        # one for all: an update makes another of its own
        tail = torch.randn(config.num_layers, config.num_tokens, config.hidden_size, generator=generator)
        tail = tail.to(backbone.device, backbone.dtype)
        memories = []
        for tenant in range(tenants):
            slot = arena.take_slot()
            assert slot is not None
            for part in arena.pools.parts(slot):
                part.normal_()
            rank = torch.randperm(config.pool_slots, generator=generator, dtype=torch.int32)
            rank = torch.where(rank >= config.pool_size, -1, rank).expand(config.num_layers, -1).contiguous()
            memory = Memory(f"t{tenant}", 0, slot, 1, tail, born, View(1, rank))
            arena.settle(memory)
            hot = arena.take_hot()
            assert hot is not None
            arena.build_hot(slot, rank, hot)
            arena.settle_hot(memory, memory.view, hot)
            memories.append(memory)
        return cls(backbone, arena, runner, Rows(cache_rows), memories)

    def sequence(self, memory: Memory, tokens: int) -> Sequence:
        pages, rows = self.rows.take(ROOM)
        view = self.arena.read(memory)
        config = self.backbone.config
        return begin(
            memory.tenant, memory, view, list(range(1, tokens + 1)), pages, rows,
            has_bos=config.add_bos_embedding, prompt_position=config.prompt_position,
        )  # fmt: skip

    def end(self, sequence: Sequence) -> None:
        self.rows.give(sequence.pages)
        self.arena.release(sequence.memory, sequence.view)

    # ------------------------------------------------------------ the work that is timed

    def decoding(self, tenants: int) -> Work:
        """One step of ``tenants`` sequences with a context of 64 tokens, until the tokens are on the host."""
        for memory in self.memories[len(self.decoders) : tenants]:
            self.decoders.append(self.sequence(memory, _CONTEXT + 1))
        sequences = self.decoders[:tenants]

        def step() -> None:
            for sequence in sequences:
                sequence.computed = _CONTEXT
            logits = self.runner.step(sequences, [], []).logits
            logits.argmax(dim=-1).tolist()

        return step

    def first_token(self) -> Work:
        """A prompt of 32 tokens of a resident tenant, until its first token is on the host."""

        def step() -> None:
            sequence = self.sequence(self.memories[0], PROMPT)
            logits = self.runner.step([], [ReadChunk(sequence, 0, PROMPT)], []).logits
            logits.argmax(dim=-1).tolist()
            self.end(sequence)

        return step

    def update(self, tokens: int, times: int) -> Work:
        """A self-update of ``tokens``, its block projected into the spare slots, so many ``times`` at most.

        What it makes of the ranks is worked out before: a server's loop leaves that to the thread that writes.
        """
        memory = self.memories[-1]
        context = list(range(1, tokens + 1))
        forgotten = torch.arange(self.backbone.config.num_tokens)[None]
        rank, born, changes = memory.view.rank, memory.born, []
        for version in range(memory.version + 1, memory.version + 1 + times):
            changes.append(change(rank, born, forgotten, version))
            rank, born = changes[-1].rank, changes[-1].born
        following = iter(changes)

        def step() -> None:
            update = self.backbone.begin_update(memory.tail, tokens)
            self.runner.step([], [], [UpdateChunk(update, 0, context)])
            self.arena.publish_all([(memory, update.block, next(following))])

        return step

    def swap_in(self) -> tuple[Work, Work, int]:
        """Bringing a pool and a tail from pinned memory as the server does, a plain copy of as many, and the bytes."""
        slot = self.arena.take_slot()
        assert slot is not None
        device, dtype = self.backbone.device, self.backbone.dtype
        lanes = lanes_of(device, dtype)
        tail = self.memories[0].tail
        assert tail is not None
        parts, room = self.arena.pools.parts(slot), torch.empty_like(tail)
        kept = [lanes.host(part.shape, part.dtype).copy_(part) for part in [*parts, tail]]
        size = sum(part.nbytes for part in kept)
        layers = range(self.backbone.config.num_layers)
        pairs = [(part[y], host[y]) for y in layers for part, host in zip(parts, kept[:-1], strict=True)]
        pairs.append((room, kept[-1]))
        source = lanes.host(torch.Size((size,)), torch.uint8)
        target = torch.empty(size, dtype=torch.uint8, device=device)
        return (
            lambda: lanes.exchange(lanes.mark(), [], pairs),
            lambda: target.copy_(source, non_blocking=True),
            size,
        )


def decode_rows(
    bench: Bench,
    weights: Weights,
    counts: tuple[int, ...],
    copy: tuple[Work, int],
    rounds: int,
) -> Iterator[Row]:
    """Decode steps and first tokens, in the form that ``bench`` has. ``copy`` moves so many bytes."""
    device, config = bench.backbone.device, bench.backbone.config
    form = COPIES if bench.arena.form.copies else ROTATING
    steps = {tenants: bench.decoding(tenants) for tenants in counts if tenants <= len(bench.memories)}
    whole = {f"decode {tenants}": step for tenants, step in steps.items()}
    whole["first token"] = bench.first_token()
    work: dict[str, Work | Repeated] = {"copy": captured(copy[0], device), **whole}
    times = interleaved(work, device, rounds, by_host=whole)
    bandwidth = copy[1] / times["copy"]
    pool = bench.arena.form.pool_bytes(config, bench.backbone.dtype) * config.pool_size / config.pool_slots
    read = weight_bytes(weights)
    for tenants in counts:
        if tenants not in steps:
            yield Row(
                f"decode step, {form}: does not fit", f"{tenants} tenants", len(bench.memories), "tenants"
            )
            continue
        floor = (read + tenants * pool) / bandwidth
        took = times[f"decode {tenants}"]
        note = f"{took * 1e3:.2f} ms, floor {floor * 1e3:.2f} ms"
        name = f"decode step, {form}: of its floor"
        yield Row(name, f"{tenants} tenants", floor / took, "", 0.65, 0.85, note=note)
    yield Row(f"first token, {form}", "32-token prompt", times["first token"] * 1e3, "ms", 9, 6, less=True)


def other_rows(
    bench: Bench,
    update_tokens: int,
    copy: tuple[Work, int],
    matmul: tuple[Work, float],
    rounds: int,
) -> Iterator[Row]:
    """What keys' rotation has no part in. ``matmul`` does so many floating-point operations."""
    device = bench.backbone.device
    work: dict[str, Work | Repeated] = {
        "copy": captured(copy[0], device),
        "matmul": captured(matmul[0], device),
        "update": bench.update(update_tokens, rounds + WARM_UPS),
    }
    times = interleaved(work, device, rounds, by_host=["update"])
    yield Row("ceiling: copy", "", copy[1] / times["copy"] / 1e12, "TB/s")
    yield Row("ceiling: matmul", "", matmul[1] / times["matmul"] / 1e12, "TFLOP/s")
    yield Row(
        "update, its write apart", f"{update_tokens} tokens", times["update"] * 1e3, "ms", 18, 13, less=True
    )
    bring, plain, size = bench.swap_in()
    swaps = interleaved({"swap": bring, "plain": plain}, device, rounds, by_host=["swap"])
    yield Row("ceiling: pinned copy", "", size / swaps["plain"] / 1e9, "GB/s")
    share = swaps["plain"] / swaps["swap"]
    note = f"{size / swaps['swap'] / 1e9:.1f} GB/s"
    yield Row("swap-in: of the pinned copy", "1 tenant", share, "", 0.85, 0.95, note=note)
