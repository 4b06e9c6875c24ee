"""The next step is planned while the device works: nobody gets anything else by it, or gets it later."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.messages import Cancel, Failed, Generate, Sampling
from app.model.backbone import Backbone
from app.worker import engine as engines
from app.worker.jobs import Job, Kind, Phase
from app.worker.scheduler import Limits, Scheduler
from tests.harness import Harness, load_backbone
from tests.worker.test_interleaving import begin, operations
from tests.worker.test_scheduler import ALL

# of time nothing depends here, and no step is so full that one who ends makes another's piece larger
LIMITS = Limits(step_tokens=512, max_running=5, cache_rows=512, update_share=1.0)


@cache
def backbone() -> Backbone:
    return load_backbone("plain")[0]


def harness(*, ahead: bool = True, slots: int = 4, hot: int = 6) -> Harness:
    return Harness(backbone(), slots=slots, hot=hot, limits=LIMITS, plans_ahead=ahead)


def watched(each: Harness) -> list[str]:
    """What a step does, in order: ``issue``, ``plan`` (or ``propose``, ahead), ``settle``; and ``late``: a row of one
    who has all his tokens."""
    done: list[str] = []
    steps, scheduler, runner = each.engine.steps, each.engine.scheduler, each.engine.runner

    def noting(owner: Any, name: str) -> None:
        method = getattr(owner, name)

        def noted(*arguments: Any) -> Any:
            done.append(name)
            return method(*arguments)

        setattr(owner, name, noted)

    for owner, name in ((steps, "issue"), (scheduler, "propose"), (scheduler, "plan"), (steps, "settle")):
        noting(owner, name)
    step = runner.step

    def stepped(decode: Any, reads: Any, updates: Any) -> Any:
        done.extend("late" for sequence in decode if sequence.produced >= sequence.max_tokens)
        return step(decode, reads, updates)

    runner.step = stepped  # type: ignore[method-assign]
    return done


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_every_answer_comes_in_the_step_in_which_it_came_without(data: st.DataObject) -> None:
    script = data.draw(operations(backbone()))
    slots = data.draw(st.integers(1, 3))
    traces = []
    for ahead in (False, True):
        each = harness(ahead=ahead, slots=slots, hot=slots + 1)
        trace: list[list[tuple[Any, ...]]] = []
        for operation in [*script, ("pause", 400)]:
            if operation[0] != "pause":
                begin(each, operation)
                continue
            for _ in range(operation[1]):
                heard = len(each.answers)
                each.step()
                trace.append(
                    sorted(
                        (getattr(a, "id", ""), type(a).__name__, getattr(a, "tokens", None))
                        for a in each.answers[heard:]
                    )
                )
        assert each.engine.idle
        traces.append(trace)
    assert traces[0] == traces[1]


def test_a_generation_by_itself_is_planned_ahead_but_for_its_first_step() -> None:
    each = harness()
    each.generate("ada", [5, 6, 7], 2)
    done = watched(each)
    each.generate("ada", [5, 6, 7], 9)
    first = done.index("issue")
    assert done[first : first + 27] == ["issue", "propose", "settle"] * 9
    assert "issue" not in done[first + 27 :]
    assert "late" not in done


def test_without_it_nothing_is_planned_before_the_step_is_done() -> None:
    each = harness(ahead=False)
    done = watched(each)
    each.generate("ada", [5, 6, 7], 4)
    for place, what in enumerate(done):
        if what == "issue":
            assert done[place + 1] == "settle"


def test_who_ends_leaves_the_plan_that_was_made_ahead() -> None:
    each = harness()
    each.generate("ada", [5], 1)
    each.generate("bob", [5], 1)
    done = watched(each)
    short, long = each.begin_generate("ada", [5, 6], 3), each.begin_generate("bob", [5, 6], 12)
    gone = each.begin_generate("bob", [7], 12)
    for _ in range(5):
        each.step()
    each.send(Cancel(gone))
    each.run()
    assert len(each.tokens(short)) == 3
    assert len(each.tokens(long)) == 12
    assert 0 < len(each.tokens(gone)) < 6
    assert "late" not in done


def test_one_who_comes_between_is_in_the_next_step() -> None:
    each = harness()
    each.generate("ada", [5], 1)
    each.generate("bob", [5], 1)
    each.begin_generate("ada", [5, 6], 20)
    for _ in range(4):
        each.step()
    late = each.begin_generate("bob", [5, 6], 3)
    each.step()
    assert len(each.tokens(late)) == 1


def test_a_deadline_that_passes_between_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    each = harness()
    each.generate("ada", [5], 1)
    now = engines.time.time()
    each.send(Generate("late", "ada", [5, 6], Sampling(20), deadline=now + 3600))
    for _ in range(4):
        each.step()
    monotonic = engines.time.monotonic
    monkeypatch.setattr(engines.time, "monotonic", lambda: monotonic() + 7200)
    each.step()
    assert isinstance(each.final("late"), Failed)
    assert len(each.tokens("late")) == 4


def test_nothing_of_a_proposal_counts_before_it_begins() -> None:
    scheduler = Scheduler(Limits())
    jobs = [Job(name, name, Kind.GENERATE, 10, 0.0, 32) for name in "ab"]
    for job in jobs:
        scheduler.submit(job)
    scheduler.plan(0, ALL)
    # their prompts have been read by the time that the next step begins
    assert [job.phase for job in jobs] == [Phase.PREFILL, Phase.PREFILL]
    counters = scheduler._counters
    served = counters["a"], counters["b"]
    proposed = scheduler.propose(1, ALL)
    assert proposed.decode == jobs
    assert (counters["a"], counters["b"]) == served
    scheduler.finish(jobs[1])
    assert scheduler.begin(proposed).decode == jobs[:1]
    assert counters["a"] > served[0]
