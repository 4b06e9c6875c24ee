"""What a figure was measured on."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def processor() -> str:
    """The processor's name, as Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "?")


def machine() -> str:
    """The cores this process may use, the processor, and what else was asked of them of late."""
    return f"{len(os.sched_getaffinity(0))} cores, {processor()}, load average {os.getloadavg()[0]:.1f}"
