"""Seeded bugs of the scheduler, each by the property that must notice it. A bug is a piece of source replaced."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from unittest import mock

import app.worker.counters as counters
import app.worker.scheduler as scheduler
from tests.worker import simulation

# property: name of the bug: module, source as it is, as the bug has it
Bug = tuple[ModuleType, str, str]

STARVING: dict[str, Bug] = {
    "residents are preferred without a bound": (
        scheduler,
        "resident = self.prices.resident\n        # as if",
        "resident = 1e18\n        # as if",
    ),
    "no room is left for one who waits for his memory": (
        scheduler,
        "blocked = min(blocked, self._counters[tenant] + self.prices.resident)",
        "pass",
    ),
    "long prompts are overtaken for cache rows": (
        scheduler,
        "full = full or self._rows_used + job.room > self.limits.cache_rows",
        "if self._rows_used + job.room > self.limits.cache_rows: continue",
    ),
    "rows are not given back": (scheduler, "self._rows_used -= job.room", "pass"),
    "who rests rests on": (scheduler, "job.reads and not job.rested", "job.reads"),
    "an update's end is not noticed": (scheduler, "del self._updating[job.tenant]", "pass"),
    "memories that wait for room are not sent for": (
        scheduler,
        "if len(plan.wanted) < PREFETCH:",
        "if False:",
    ),
    "a context larger than what is left waits for ever": (scheduler, "if whole and plan.idle:", "if False:"),
}
ORDER: dict[str, Bug] = {
    "a job begins beside an update": (scheduler, "if tenant in self._updating:", "if False:"),
    "a read passes an update": (
        scheduler,
        "            if job.kind is Kind.UPDATE:\n                break",
        "            if job.kind is Kind.UPDATE:\n                continue",
    ),
    "an update passes reads": (
        scheduler,
        "        best = first\n",
        "        best = next((j for j in queue if j.kind is Kind.UPDATE), first)\n",
    ),
    "among equals the last is first": (
        scheduler,
        "if job.priority > best.priority:",
        "if job.priority >= best.priority:",
    ),
    "priorities are not looked at": (scheduler, "if job.priority > best.priority:", "if False:"),
}
BUDGETS: dict[str, Bug] = {
    "decode is not counted": (scheduler, "budget -= len(plan.decode)", "pass"),
    "chunks are not counted": (scheduler, "budget -= count", "pass"),
    "a whole context is never too large": (scheduler, "if whole and plan.idle:", "if whole:"),
    "one more runs": (scheduler, "running >= self.limits.max_running", "running > self.limits.max_running"),
    "cache rows are not looked at": (
        scheduler,
        "full = full or self._rows_used + job.room > self.limits.cache_rows",
        "pass",
    ),
    "rows are not taken": (scheduler, "self._rows_used += job.room", "pass"),
}
RESIDENCE: dict[str, Bug] = {
    "a job begins without its memory": (scheduler, "    if not job.needs_memory:\n", "    if True:\n"),
    "what is wanted does not need to come": (
        scheduler,
        "                continue\n            # nobody may overtake",
        "            # nobody may overtake",
    ),
}
FAIRNESS: dict[str, Bug] = {
    "weights are not looked at": (counters, "tokens / self._weights[tenant]", "tokens"),
    "output is free": (scheduler, "self._counters.charge(job.tenant, self.prices.output)", "pass"),
    "prompts are free": (
        scheduler,
        "self.prices.prompt if job.reads else self.prices.update",
        "0.0 if job.reads else self.prices.update",
    ),
    "updates are free": (
        scheduler,
        "self.prices.prompt if job.reads else self.prices.update",
        "self.prices.prompt if job.reads else 0.0",
    ),
    "memories are brought for nothing": (scheduler, "self._brought.pop(job.tenant, 0.0)", "0.0"),
    "idleness earns credit": (
        counters,
        "max(self._served.get(tenant, 0.0), floor)",
        "self._served.get(tenant, 0.0)",
    ),
    "who comes back is forgiven": (counters, "max(self._served.get(tenant, 0.0), floor)", "floor"),
    "who leaves is forgotten": (
        counters,
        "        self._note(tenant)\n        while",
        "        del self._served[tenant], self._weights[tenant]\n        while",
    ),
    "first come, first served": (
        scheduler,
        "return self._counters[tenant] + bonus, running,",
        "return 0.0, 0,",
    ),
    "the most served goes first": (
        scheduler,
        "return self._counters[tenant] + bonus, running,",
        "return -self._counters[tenant] + bonus, running,",
    ),
    "who is ahead starts all the same": (
        scheduler,
        "bound = blocked if running else stuck",
        "bound = float('inf')",
    ),
}
CHANCE: dict[str, Bug] = {
    "ties are broken by chance": (
        scheduler,
        "self._queues[tenant][0].arrival, tenant, looked",
        "__import__('random').random(), tenant, looked",
    ),
}
# seen only beside another process
HASHED: dict[str, Bug] = {
    "ties are broken by hashes": (
        scheduler,
        "self._queues[tenant][0].arrival, tenant, looked",
        "hash(tenant), tenant, looked",
    ),
    "tenants are gone through as a set": (
        scheduler,
        "in self._running.items():\n            decode: list",
        "in [(t, self._running[t]) for t in set(self._running)]:\n            decode: list",
    ),
}


@contextmanager
def seeded(bug: Bug) -> Iterator[None]:
    """While inside, simulations have a scheduler with the bug."""
    module, right, wrong = bug
    source = inspect.getsource(module)
    assert source.count(right) == 1, f"{source.count(right)} places are {right!r}"
    mutant = ModuleType(module.__name__)
    exec(compile(source.replace(right, wrong), f"<{module.__name__}>", "exec"), mutant.__dict__)
    patched = (
        mock.patch.object(scheduler, "Counters", mutant.Counters)
        if module is counters
        else mock.patch.object(simulation, "Scheduler", mutant.Scheduler)
    )
    with patched:
        yield
