"""The engine on a GPU: the reference's numbers, precision, 200 updates in a row, eviction, and 8-bit pools."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

from app.messages import CreateTenant, Generate, Sampling
from app.model.kernel_operations import KernelOperations
from app.model.operations import MakeOperations, Sizes
from app.model.rope import RopeTable
from app.model.torch_operations import TorchOperations
from app.worker.graphs import cuda_capture
from app.worker.operations import operations_for
from app.worker.scheduler import Limits
from kernels.bench.__main__ import eight_b
from tests.harness import CHECKPOINTS, NAMES, Harness, load_backbone
from tests.model.test_parity import all_logits

SIZES = Sizes(rows=64, sequences=8, context=273)
LIMITS = Limits(cache_rows=1024, max_running=8, step_tokens=64)
KERNELS: MakeOperations = partial(KernelOperations, sizes=SIZES)


def on_gpu(
    name: str, dtype: torch.dtype = torch.float32, operations: MakeOperations = KERNELS, slots: int = 4
) -> Harness:
    torch.backends.cuda.matmul.allow_tf32 = False
    backbone, fingerprint = load_backbone(name, dtype, operations=operations, device="cuda")
    capture = None if operations is TorchOperations else cuda_capture()
    return Harness(backbone, fingerprint, limits=LIMITS, capture=capture, slots=slots, warm_bytes=10**8)


def replayed(harness: Harness) -> tuple[list[int], list[int]]:
    """Rows of the graphs that its steps were replayed by, where sequences decoded and where a prompt was read. A
    capture that fails is done without: it must not have."""
    graphs = harness.engine.runner._graphs
    assert graphs is not None
    assert not graphs._failed
    decode, prompt = (
        sorted(key.rows for key in graphs._replays if key.prompt is kind) for kind in (False, True)
    )
    assert decode
    return decode, prompt


@pytest.mark.parametrize("rotating", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_every_version_gives_the_references_greedy_tokens(name: str, rotating: bool) -> None:
    cases = load_file(CHECKPOINTS / name / "cases.safetensors")
    seed = json.loads((CHECKPOINTS / name / "cases.json").read_text())["tenant_seed"]
    harness = on_gpu(name, operations=partial(KernelOperations, sizes=SIZES, rotating=rotating))
    harness.send(CreateTenant("create", "ada", seed))
    prompt = cases["prompt"].tolist()
    for version in range(sum(key.endswith(".greedy") for key in cases)):
        if version:
            harness.update("ada", cases[f"v{version}.context"].tolist())
        logits = all_logits(harness, "ada", prompt).cpu()
        torch.testing.assert_close(logits, cases[f"v{version}.logits"], atol=1e-3, rtol=0)
        greedy = cases[f"v{version}.greedy"].tolist()
        assert harness.generate("ada", prompt, len(greedy)) == greedy
    assert replayed(harness) == ([1], [16])


@pytest.mark.parametrize("rotating", [False, True])
def test_replayed_steps_of_many_sequences_give_torchs_tokens(rotating: bool) -> None:
    """Steps of every number of rows up to eight, of tenants that share a pool and others, while one is updated."""

    def played(operations: MakeOperations) -> tuple[Harness, list[list[int]]]:
        each = on_gpu("plain", operations=operations)
        tenants = ["ada", "ada", "ben", "ada", "cy", "ada", "ada", "ada"]
        for number, tenant in enumerate(tenants):
            prompt = list(range(3 + number, 6 + 3 * number))
            each.send(Generate(f"g{number}", tenant, prompt, Sampling(max_tokens=6 + 2 * number)))
        each.begin_update("ben", list(range(10, 30)))
        each.run()
        return each, [each.tokens(f"g{number}") for number in range(len(tenants))]

    ours, found = played(partial(KernelOperations, sizes=SIZES, rotating=rotating))
    assert found == played(TorchOperations)[1]
    assert replayed(ours)[0][-1] == 8


def test_a_capture_that_fails_leaves_the_allocator_as_it_was() -> None:
    capture, stream = cuda_capture(), torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def waits() -> torch.Tensor:
        out = torch.ones(8, device="cuda")
        torch.cuda.synchronize()
        return out

    with pytest.raises(RuntimeError):
        capture(waits)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["active_bytes.all.current"]
    used_by_both = torch.empty(2**26, dtype=torch.uint8, device="cuda")
    used_by_both.record_stream(stream)
    del used_by_both
    torch.cuda.synchronize()
    # whoever asks for memory next has what all are done with given back
    small = torch.empty(1, device="cuda")
    assert torch.cuda.memory_stats()["active_bytes.all.current"] < before + 2**26
    replay = capture(lambda: small + 1)
    small.fill_(4)
    assert replay().item() == 5


@pytest.mark.parametrize(
    ("rotating", "eight_bit"), [(False, False), (True, False), (False, True)], ids=["copy", "read", "int8"]
)
def test_kernels_pass_their_trial_at_the_8b_shape(rotating: bool, eight_bit: bool) -> None:
    """As a server makes them: kernels that fail it are replaced by torch with no more than a warning."""
    config, device = replace(eight_b(), num_layers=1), torch.device("cuda", 0)
    rope = RopeTable(config, config.prompt_position + 4096, torch.bfloat16, device)
    make = operations_for(Sizes(512, 64, 4097), rotating=rotating, eight_bit=eight_bit)
    assert isinstance(make(config, rope, torch.bfloat16, device), KernelOperations)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_is_no_further_off_than_torchs_own(name: str) -> None:
    """Largest and mean error of logits against the reference's, over all versions, with torch's as the measure."""
    cases = load_file(CHECKPOINTS / name / "cases.safetensors")
    seed = json.loads((CHECKPOINTS / name / "cases.json").read_text())["tenant_seed"]
    errors = []
    for operations in (KERNELS, TorchOperations):
        harness = on_gpu(name, torch.bfloat16, operations)
        harness.send(CreateTenant("create", "ada", seed))
        off = []
        for version in range(sum(key.endswith(".greedy") for key in cases)):
            if version:
                harness.update("ada", cases[f"v{version}.context"].tolist())
            logits = all_logits(harness, "ada", cases["prompt"].tolist()).float().cpu()
            off.append((logits - cases[f"v{version}.logits"]).abs())
        errors.append(torch.cat(off))
    ours, theirs = errors
    assert ours.mean() <= 1.05 * theirs.mean()
    assert ours.max() <= 1.5 * theirs.max()


def test_two_hundred_updates_in_a_row() -> None:
    gpu, cpu = on_gpu("two-adapters"), Harness(load_backbone("two-adapters")[0], limits=LIMITS)
    generator = torch.Generator().manual_seed(5)
    for turn in range(1, 201):
        context = torch.randint(1, 200, (16 + turn % 17,), generator=generator).tolist()
        for each in (gpu, cpu):
            assert each.update("ada", context).memory_version == turn
        if turn % 50 == 0:
            pools = []
            for each in (gpu, cpu):
                manifest = each.store.load("ada")
                assert manifest is not None
                pools.append(each.engine.residency.settled_pool(manifest)[1])
            assert torch.equal(pools[0].born, pools[1].born)
            torch.testing.assert_close(pools[0].hidden, pools[1].hidden, atol=5e-3, rtol=5e-3)
            assert gpu.generate("ada", [3, 4, 5], 8) == cpu.generate("ada", [3, 4, 5], 8)


@pytest.mark.parametrize("eight_bit", [False, True])
def test_an_evicted_memory_comes_back_with_the_same_bits(eight_bit: bool) -> None:
    make = partial(KernelOperations, sizes=SIZES, eight_bit=eight_bit)
    harness = on_gpu("plain", torch.bfloat16, make, slots=1)
    harness.update("ada", list(range(20, 60)))
    before = all_logits(harness, "ada", [5, 6, 7])
    for _ in range(3):
        harness.generate("ben", [1, 2], 2)
        assert harness.engine.residency.get("ada") is None
        assert torch.equal(all_logits(harness, "ada", [5, 6, 7]), before)


def test_eight_bit_pools_answer_almost_alike() -> None:
    logits = []
    for make in (partial(KernelOperations, sizes=SIZES, eight_bit=True), KERNELS):
        harness = on_gpu("plain", torch.float32, make)
        harness.update("ada", list(range(20, 60)))
        logits.append(all_logits(harness, "ada", [9, 8, 7]))
    error = (logits[0] - logits[1]).abs().max()
    assert 0 < error < 0.1 * logits[1].std()
