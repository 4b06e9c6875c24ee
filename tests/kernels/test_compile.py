"""Every kernel becomes machine code for sm_80 and sm_90 without spilling a register, and fits as often as promised."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from kernels import compile as program
from kernels.compile import Built, programs

# decode with 16, 32 and 64 rows and prompts, each with copies, rotating and in 8 bits; four merges; four between the
# products; two that write
KERNELS = 12 + 4 + 4 + 2


@pytest.mark.timeout(400)
def test_no_kernel_spills() -> None:
    """At the 8B shape: all shapes take ptxas some minutes."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "kernels.compile", "--shape", "8b"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=380, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = re.findall(r"^8b +(?:80|90) .* (\d+) +(\d+) +(\d+) of (\d+) +0$", done.stdout, re.MULTILINE)
    assert len(rows) == 2 * KERNELS, done.stdout
    print(done.stdout)


@pytest.mark.parametrize(
    ("arch", "num_warps", "registers", "shared", "held"),
    [
        (90, 4, 168, 54_272, 3),
        (90, 4, 169, 54_272, 2),  # registers come in eights
        (90, 8, 128, 0, 2),
        (90, 8, 129, 0, 1),
        (90, 4, 128, 113 * 1024, 2),  # a kilobyte of each block's is the system's
        (90, 4, 128, 113 * 1024 + 1, 1),
        (80, 4, 128, 81 * 1024, 2),
        (80, 4, 128, 81 * 1024 + 1, 1),
        (90, 4, 32, 0, 16),  # 64 warps
        (90, 1, 32, 0, 32),  # 32 blocks
        (90, 2, 255, 0, 4),
        (80, 4, 32, 164 * 1024, 0),
    ],
)
def test_programs_of_a_multiprocessor(
    arch: int, num_warps: int, registers: int, shared: int, held: int
) -> None:
    assert programs(arch, num_warps, registers, shared) == held


@pytest.mark.parametrize(("held", "spills", "status"), [(2, 0, 0), (1, 0, 1), (2, 8, 1)])
def test_fewer_programs_than_are_launched_are_a_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], held: int, spills: int, status: int
) -> None:
    (job,) = (job for job in program.jobs(program.SHAPES["8b"]) if job.name == "decode")
    assert job.programs == 2
    monkeypatch.setattr(program, "jobs", lambda _: [job])
    monkeypatch.setattr(program, "build", lambda *_: Built("decode", 90, 128, 0, spills, held))
    monkeypatch.setattr(sys, "argv", ["compile", "--shape", "8b", "--arch", "90"])
    assert program.main() == status
    assert ("FAILED" in capsys.readouterr().out) == bool(status)
