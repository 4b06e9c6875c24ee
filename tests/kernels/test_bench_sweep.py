"""The sweep over tunings, in the interpreter at a tiny shape: what it compiles, drops, compares and prints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from kernels.bench import __main__ as program
from kernels.bench import attention, sweep
from kernels.bench.pools import Shape
from kernels.bench.sweep import Asked, Case
from kernels.bench.variants import WrongKernel
from kernels.compile import Built
from kernels.memory_attention import Tuning
from tests.kernels.test_bench import copy
from tests.kernels.test_bench_attention import TINY
from tests.kernels.test_operations import CPU, pytestmark  # noqa: F401

CASES = (Case(attention.COPIES, 1, 1), Case(attention.EIGHT_BIT, 2, 1))


def near(base: Tuning) -> list[Tuning]:
    return [base, Tuning(16, 4, 4, 2), Tuning(32, 4, 2, 2)]


class Compiled:
    """In the compiler's place: the last of each form's spills, two of the others' programs fit."""

    def __init__(self) -> None:
        self.asked: list[Asked] = []

    def __call__(
        self, shape: Shape, dtype: torch.dtype, asked: list[Asked], seconds: float
    ) -> Mapping[Asked, Built]:
        self.asked = asked
        return {each: Built("", 90, 100, 1000, 8 * (each.tuned.num_stages == 2), 2) for each in asked}


def run(prepare: Compiled, seconds: float = 1e9, cases: tuple[Case, ...] = CASES) -> list[Any]:
    found = sweep.rows(TINY, cases, torch.float32, CPU, copy(), 1, seconds, prepare=prepare, near=near)
    return list(found)


def test_all_that_do_not_spill_are_timed_the_best_first() -> None:
    compiled = Compiled()
    rows = run(compiled)
    # the usual ones of all forms before any neighbour
    assert [a.form for a in compiled.asked[:2]] == [attention.COPIES, attention.EIGHT_BIT]
    for case in CASES:
        mine = [row for row in rows if case.form in row.what]
        assert {row.case for row in mine} == {case.name}
        # two tunings, with two programs a multiprocessor and with one
        assert len(mine) == 4
        assert [row.value for row in mine] == sorted((row.value for row in mine), reverse=True)
        assert sum("as the server has it" in row.note for row in mine) == 1
        assert not any("2 stages" in row.note for row in mine)
        assert all("100 registers, 1000 bytes shared" in row.note for row in mine)


def test_cases_with_tiles_of_one_size_share_their_kernels() -> None:
    compiled = Compiled()
    rows = run(compiled, cases=(Case(attention.COPIES, 1, 1), Case(attention.COPIES, 2, 1)))
    assert len(compiled.asked) == 3
    assert len(rows) == 8


def test_when_time_is_over_it_ends_with_what_it_has(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(sweep, "monotonic", lambda: next(clock))
    # 15 s: over when the first case's second tuning would be checked
    rows = run(Compiled(), seconds=15)
    assert [row.what for row in rows] == [f"sweep, {attention.COPIES}: of the copy bandwidth"]
    assert "as the server has it" in rows[0].note
    said = capsys.readouterr().err
    assert "not all were timed" in said
    assert "time is over before 2 x 1, 8 bits" in said


def test_a_wrong_kernel_is_not_timed_and_the_others_are(monkeypatch: pytest.MonkeyPatch) -> None:
    right = sweep.check

    def check(name: str, *rest: Any) -> None:
        right(name, *rest)
        if "4 stages" in name:
            raise WrongKernel(f"{name}: off by 3")

    monkeypatch.setattr(sweep, "check", check)
    found = sweep.rows(TINY, CASES, torch.float32, CPU, copy(), 1, 1e9, prepare=Compiled(), near=near)
    rows = []
    with pytest.raises(WrongKernel, match=r"4 stages.*off by 3"):
        rows.extend(row for row in found)
    assert [row.note for row in rows if "4 stages" in row.note] == []


def test_neighbours_begin_with_what_the_server_has() -> None:
    for form in (attention.COPIES, attention.ROTATING, attention.EIGHT_BIT):
        for sequences in (1, 16):
            base = sweep.usual(Shape(), torch.bfloat16, form, sequences)
            found = sweep.neighbours(base)
            assert found[0] == base
            assert len(set(found)) == len(found)
            assert all(16 <= tuned.step <= 128 for tuned in found)


def test_the_command_runs_the_sweep_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "gpu")
    monkeypatch.setattr(program, "_sweep_rows", lambda *given: asked.append(given[1:]) or iter(()))
    assert program.main(["--only", "sweep", "--seconds", "9", "--rounds", "3"]) == 0
    assert asked == [(3, 9.0)]
