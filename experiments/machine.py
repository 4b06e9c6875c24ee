"""What a figure was measured on."""

from __future__ import annotations

import ipaddress
import os
import platform
from pathlib import Path
from urllib.parse import urlsplit


def processor() -> str:
    """The processor's name, as Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "?")


def cores() -> int:
    """How many cores this process may use; macOS does not tell, and of it all count."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1


def is_here(url: str) -> bool:
    """The server of this address runs on this machine, as far as the address tells."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def machine(*urls: str) -> str:
    """The cores this process may use, the processor, and what else was asked of them of late; where a server of
    ``urls`` is elsewhere, marked as the client's."""
    here = f"{cores()} cores, {processor()}, load average {os.getloadavg()[0]:.1f}"
    return here if all(map(is_here, urls)) else f"client: {here}"
