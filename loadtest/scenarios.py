"""The scenarios by name, each with the server that it wants."""

from __future__ import annotations

from loadtest.drain import drain
from loadtest.memories import many_cold, update_storm
from loadtest.overload import hot_tenant, overload
from loadtest.run import Scenario
from loadtest.steady import steady
from loadtest.streams import streams

# what waits is served within the time in which it is useful: a longer queue only makes everybody late
_SHORT_QUEUE = {"max_running": 32, "queue_requests": 64, "queue_requests_tenant": 16}

SCENARIOS: dict[str, Scenario] = {
    "streams": Scenario(streams, slots=40, bare=True),
    "overload-10x": Scenario(
        overload,
        slots=56,
        options=_SHORT_QUEUE,
        planned=frozenset({"server_overloaded", "deadline_exceeded"}),
    ),
    "hot-tenant": Scenario(hot_tenant, options={"queue_requests_tenant": 96}),
    "many-cold": Scenario(many_cold, options={"warm_bytes": 0}),
    # what the storm sends and the readers keep from being taken in waits for their end
    "update-storm": Scenario(
        update_storm, slots=32, options={"queue_requests": 8192, "queue_requests_tenant": 512}
    ),
    "drain": Scenario(drain, planned=frozenset({"worker_unavailable", "connection"}), compared=False),
    # a warm tier that is full, as it is in the long run
    "steady": Scenario(steady, options={"warm_bytes": "96MiB"}),
}
