"""The engine on the kernels, in Triton's interpreter: the reference's numbers, mixed batches, replayed steps."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import triton
from safetensors.torch import load_file
from torch import Tensor

from app.memory import sample
from app.messages import CreateTenant, Generate, Sampling
from app.model import kernel_operations
from app.model.backbone import Backbone
from app.model.batch import Batch, Reading
from app.model.kernel_operations import KernelOperations, Unsupported
from app.model.operations import Sizes
from app.model.torch_operations import TorchOperations
from app.worker.scheduler import Limits
from kernels.checks import BadKernelInput
from tests.harness import CHECKPOINTS, Harness, load_backbone
from tests.model.test_parity import TOLERANCE, all_logits

pytestmark = pytest.mark.skipif(
    tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 7),
    reason="the interpreter of Triton 3.6 loops to a loaded bound by a conversion that NumPy has deprecated",
)

RUNNING = 4
SIZES = Sizes(rows=40, sequences=RUNNING, context=273)
LIMITS = Limits(cache_rows=640, max_running=RUNNING, step_tokens=40)
CPU = torch.device("cpu")


def harness(name: str = "plain", capture: Any = None, **form: bool) -> Harness:
    backbone, _ = load_backbone(name, operations=partial(KernelOperations, sizes=SIZES, **form))
    return Harness(backbone, limits=LIMITS, capture=capture)


def in_torch(name: str = "plain", **form: bool) -> Harness:
    return Harness(load_backbone(name, operations=partial(TorchOperations, **form))[0], limits=LIMITS)


@pytest.mark.parametrize("form", [{}, {"rotating": True}], ids=["copies", "rotating"])
def test_kernels_agree_with_the_reference(form: dict[str, bool]) -> None:
    folder = CHECKPOINTS / "two-adapters"
    cases = load_file(folder / "cases.safetensors")
    ours = harness("two-adapters", **form)
    ours.send(CreateTenant("create", "ada", json.loads((folder / "cases.json").read_text())["tenant_seed"]))
    prompt = cases["prompt"].tolist()
    for version in range(3):
        if version:
            ours.update("ada", cases[f"v{version}.context"].tolist())
        logits = all_logits(ours, "ada", prompt)
        torch.testing.assert_close(logits, cases[f"v{version}.logits"], atol=TOLERANCE, rtol=0)
    assert ours.generate("ada", prompt, 2) == cases["v2.greedy"].tolist()[:2]


def test_eight_bit_kernels_agree_with_eight_bit_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    # a few blocks will do for the scales: the interpreter writes them slowly
    monkeypatch.setattr(sample, "TOKENS", 0)
    context, prompt = list(range(20, 40)), [9, 8, 7]
    logits = []
    for each in (harness(eight_bit=True), in_torch(eight_bit=True), in_torch()):
        each.update("ada", context)
        logits.append(all_logits(each, "ada", prompt))
    torch.testing.assert_close(logits[0], logits[1], atol=TOLERANCE, rtol=0)
    error = (logits[1] - logits[2]).abs().max()
    assert TOLERANCE < error < 0.1 * logits[2].std()


def mixed(each: Harness) -> list[list[int]]:
    """Three tenants, four sequences, prompts cut into chunks beside decoding rows, and an update in between."""
    prompts = {"a": ("ada", [5, 6, 7]), "b": ("ben", list(range(30))), "c": ("ada", [8]), "d": ("cy", [1, 2])}
    for request, (tenant, tokens) in prompts.items():
        each.send(Generate(request, tenant, tokens, Sampling(max_tokens=3)))
    each.begin_update("ben", list(range(10, 30)))
    each.run()
    return [each.tokens(request) for request in prompts]


def test_mixed_batches_and_replayed_steps_give_the_same_tokens() -> None:
    captured = []

    def capture(work: Callable[[], Tensor]) -> Callable[[], Tensor]:
        captured.append(work)
        return work

    expected = mixed(in_torch())
    assert mixed(harness(capture=capture)) == expected
    assert all(len(tokens) == 3 for tokens in expected)
    # replayed steps differ in rows and in how many share a pool, yet few graphs serve them
    assert 1 <= len(captured) <= 4


def test_a_short_prompts_end_is_replayed() -> None:
    """Alone in its step, in the graph of the next size."""
    captured: list[int] = []

    def capture(work: Callable[[], Tensor]) -> Callable[[], Tensor]:
        captured.append(0)
        number = len(captured) - 1

        def replay() -> Tensor:
            captured[number] += 1
            return work()

        return replay

    ours, theirs = harness(capture=capture), in_torch()
    runner = ours.engine.runner
    bos = [part[:, 0].clone() for part in (runner.cache.key, runner.cache.value)]
    for length in (3, 17):
        prompt = [3 + (7 * place) % 50 for place in range(length)]
        assert ours.generate("ada", prompt, 1) == theirs.generate("ada", prompt, 1)
    graphs = runner._graphs
    assert graphs is not None
    sizes = {key.rows: replays for key, replays in zip(graphs._replays, captured, strict=True) if key.prompt}
    assert sizes == {16: 1, 32: 1}
    # rows that round a batch up have their keys where nobody reads
    for part, before in zip((runner.cache.key, runner.cache.value), bos, strict=True):
        assert torch.equal(part[:, 0], before)


def test_scored_prompts_and_prompts_beside_others_are_not_replayed() -> None:
    prompts = []

    def watched(*given: Any) -> Tensor | None:
        prompts.append(given)
        return None

    ours, theirs = harness(capture=lambda work: work), in_torch()
    graphs = ours.engine.runner._graphs
    assert graphs is not None
    graphs.prompt = watched  # type: ignore[method-assign]
    runner, chunks = ours.engine.runner, []
    step = runner.step

    def noted(*given: Any) -> Any:
        chunks.extend(given[1])
        return step(*given)

    runner.step = noted  # type: ignore[method-assign]
    ours.score("ada", [5, 6, 7], [8, 9])
    (chunk,) = chunks
    # its last token is never read; nor would it be replayed if it were, without what is scored
    assert runner._prompted(replace(chunk, count=len(chunk.sequence.tokens)), graphs) is None
    for each in (ours, theirs):
        for request, token in (("a", 6), ("b", 7)):
            each.send(Generate(request, "ada", [5, token], Sampling(max_tokens=2)))
        each.run()
    assert [ours.tokens(r) for r in "ab"] == [theirs.tokens(r) for r in "ab"]
    assert not prompts
    ours.generate("ada", [5], 1)
    assert prompts


def test_replayed_steps_do_not_remember_the_step_before() -> None:
    """Another tenant, another length, fewer rows than the graph has: each replay reads what it is given."""
    calls = []

    def capture(work: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def replay() -> Tensor:
            calls.append(work)
            return work()

        return replay

    ours, theirs = harness(capture=capture, rotating=True), in_torch()
    for each in (ours, theirs):
        each.update("ben", list(range(50, 70)))
        for request, tenant in (("a", "ada"), ("b", "ben"), ("c", "cy")):
            each.send(
                Generate(request, tenant, [5, 6, len(tenant)], Sampling(max_tokens=4 - len(tenant) % 3))
            )
        each.run()
    assert [ours.tokens(r) for r in "abc"] == [theirs.tokens(r) for r in "abc"]
    assert calls


def test_what_a_captured_step_reads_stays() -> None:
    """A graph holds addresses, not tensors: one that nobody else holds is freed, and given to somebody else."""
    read: list[weakref.ref[Tensor]] = []

    def capture(work: Callable[[], Tensor]) -> Callable[[], Tensor]:
        out = work()
        return lambda: out

    ours = harness(capture=capture)
    backbone = ours.engine.backbone
    forward = backbone.forward

    def watched(batch: Batch, *rest: Any) -> Tensor:
        read.extend(map(weakref.ref, (batch.tokens, batch.positions, batch.write_rows, batch.logit_rows)))
        return forward(batch, *rest)

    backbone.forward = watched  # type: ignore[method-assign]
    graphs = ours.engine.runner._graphs
    assert graphs is not None
    table = torch.arange(1, 17)
    assert graphs.decode([Reading(slice(0, 1), None, None, table, 1)], [5], [1], [1]) is not None
    gc.collect()
    assert len(read) == 4
    assert all(tensor() is not None for tensor in read)


def test_graphs_share_one_output_and_outlive_one_that_failed() -> None:
    outputs: list[int] = []

    def capture(work: Callable[[], Tensor]) -> Callable[[], Tensor]:
        if len(captured) == 2:
            raise RuntimeError("operation not permitted when stream is capturing")
        captured.append(work)

        def replay() -> Tensor:
            out = work()
            outputs.append(out.data_ptr())
            return out

        return replay

    captured: list[Callable[[], Tensor]] = []
    graphs = harness(capture=capture).engine.runner._graphs
    assert graphs is not None

    def step(rows: int) -> Tensor | None:
        tables = [torch.arange(1, 17) + 16 * row for row in range(rows)]
        readings = [Reading(slice(r, r + 1), None, None, table, 1) for r, table in enumerate(tables)]
        return graphs.decode(readings, [5] * rows, [1] * rows, [int(table[0]) for table in tables])

    first, both = step(1), step(2)
    assert first is not None
    assert both is not None
    # of a graph each they would be kept for good: gigabytes where many sequences run
    assert len(set(outputs)) == 1
    assert step(4) is None
    assert step(1) is not None
    assert step(2) is not None
    assert (len(outputs), len(captured)) == (4, 2)


@pytest.mark.parametrize(
    ("error", "tried"),
    [
        (RuntimeError("operation not permitted when stream is capturing"), 1),
        (torch.OutOfMemoryError("full"), 3),
    ],
    ids=["not permitted", "no room"],
)
def test_a_failed_capture_is_done_without(error: RuntimeError, tried: int) -> None:
    captures = []

    def capture(work: Callable[[], Tensor]) -> Callable[[], Tensor]:
        captures.append(work)
        raise error

    assert harness(capture=capture).generate("ada", [5, 6], 6) == in_torch().generate("ada", [5, 6], 6)
    assert len(captures) == tried


# NumPy's remark on the poison, which Triton itself does not make
@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_nan_in_one_tenants_pool_changes_nobody_elses_logits_by_a_bit() -> None:
    def run(poison: bool) -> dict[str, list[Tensor]]:
        each = harness()
        seen: dict[str, list[Tensor]] = {"ada": [], "ben": []}
        step = each.engine.runner.step

        def watched(*arguments: Any) -> Any:
            stepped = step(*arguments)
            for sequence, row in zip(stepped.sequences, stepped.logits, strict=True):
                seen[sequence.memory.tenant].append(row.clone())
            return stepped

        each.engine.runner.step = watched  # type: ignore[method-assign]
        each.generate("ada", [1], 1)
        each.generate("ben", [1], 1)
        memory = each.engine.residency.get("ada")
        assert memory is not None
        if poison:
            pools = each.engine.arena.pools
            assert pools.hot_key is not None
            pools.value[:, memory.slot] = torch.nan
            pools.hot_key[:, memory.view.hot] = torch.nan
        for request, tenant in (("a", "ada"), ("b", "ben")):
            each.send(Generate(request, tenant, [5, 6], Sampling(max_tokens=2)))
        each.run()
        return seen

    clean, poisoned = run(False), run(True)
    assert all(torch.equal(a, b) for a, b in zip(clean["ben"], poisoned["ben"], strict=True))
    assert poisoned["ada"][-1].isnan().all()


def operations(backbone: Backbone) -> KernelOperations:
    assert isinstance(backbone.operations, KernelOperations)
    return backbone.operations


def test_tables_are_placed_anew_when_more_sequences_come_than_there_is_room_for() -> None:
    ours = operations(harness().engine.backbone)
    tables = [torch.arange(3) + 10 * i for i in range(3 * RUNNING)]
    for first in range(2 * RUNNING):
        chosen = tables[first : first + RUNNING]
        readings = [Reading(slice(i, i + 1), None, None, t, 3) for i, t in enumerate(chosen)]
        reads = ours.prepare(readings, RUNNING)
        ((_, work),) = reads.lists
        found = {(tile, table) for tile, _, _, _, _, _, table in work.plan.segments[:RUNNING].tolist()}
        assert len(found) == RUNNING
        for tile, table in found:
            row = int(work.plan.members[tile, 0])
            assert reads.table[table, :3].tolist() == chosen[row].tolist()
    too_many = [Reading(slice(i, i + 1), None, None, t, 3) for i, t in enumerate(tables)]
    with pytest.raises(BadKernelInput):
        ours.prepare(too_many, len(too_many))


def test_slots_are_checked_once_for_all_layers_and_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A check and a copy to the device for each of them would take the host longer than all the launches."""
    backbone = harness().engine.backbone
    c = backbone.config
    checked: list[torch.Size] = []
    written: list[list[int]] = []
    check = kernel_operations.spare_slots

    def noted(slots: Tensor, *rest: Any) -> Tensor:
        checked.append(slots.shape)
        return check(slots, *rest)

    def write(*given: Any) -> None:
        written.append(given[5].tolist())

    monkeypatch.setattr(kernel_operations, "spare_slots", noted)
    monkeypatch.setattr(kernel_operations, "write_block", write)
    blocks = torch.zeros(2, c.num_layers, c.num_tokens, c.hidden_size)
    slots = torch.stack([torch.randperm(c.pool_slots)[: c.num_tokens] for _ in range(2 * c.num_layers)])
    slots = slots.view(2, c.num_layers, c.num_tokens)
    key = torch.zeros(c.num_layers, 2, c.num_kv_heads, c.pool_slots, c.head_dim)
    backbone.write_blocks(blocks.unbind(), [0, 1], slots, key, key)
    assert checked == [(2 * c.num_layers, c.num_tokens)]
    assert written == slots.transpose(0, 1).flatten(0, 1).tolist()
    checked.clear()
    written.clear()
    backbone.write_memory(blocks[0], slots[0], key[:, 0], key[:, 0])
    assert checked == [(c.num_layers, c.num_tokens)]
    assert written == slots[0].tolist()
    for wrong in (c.pool_slots, -1, int(slots[1, 0, 1])):
        bad = slots.clone()
        bad[1, 0, 0] = wrong
        with pytest.raises(BadKernelInput):
            backbone.write_blocks(blocks.unbind(), [0, 1], bad, key, key)
    assert len(written) == c.num_layers, "nothing is written before all slots are looked at"


@pytest.mark.parametrize(
    ("dtype", "form", "reason"),
    [(torch.float64, {}, "float64"), (torch.complex64, {"eight_bit": True}, "complex64")],
)
def test_what_the_kernels_cannot_serve_is_refused_with_its_reason(
    dtype: torch.dtype, form: dict[str, bool], reason: str
) -> None:
    backbone, _ = load_backbone("plain")
    with pytest.raises(Unsupported, match=reason):
        KernelOperations(backbone.config, backbone.rope, dtype, CPU, sizes=SIZES, **form)
