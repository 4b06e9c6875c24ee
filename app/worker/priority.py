"""A worker that computes on the processor steps back behind the API, which has little to do and is waited for.

Two threads that never pause take what cores there are in turns with everybody else, and then a refusal, which takes the
API a third of a millisecond, waits for a tenth of a second.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

_AUTOGROUP = Path("/proc/self/autogroup")


def step_back(niceness: int, autogroup: Path = _AUTOGROUP) -> None:
    """Lowers this thread's priority, and that of all it starts from now on, by ``niceness`` (0 to 19).

    Where Linux divides time between sessions first, the worker, a session of its own, steps back as one.
    """
    if not niceness:
        return
    os.nice(niceness)
    # absent elsewhere, and not to be written in some containers
    with suppress(OSError):
        autogroup.write_text(str(niceness))
