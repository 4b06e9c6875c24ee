"""Every kernel becomes machine code for sm_80 and sm_90 without spilling a register."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

# decode with 16 and 64 rows and prompts, each with copies, rotating and in 8 bits; three merges; four between the
# products; two that write
KERNELS = 9 + 3 + 4 + 2


@pytest.mark.timeout(300)
def test_no_kernel_spills() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "kernels.compile", "--shape", "8b", "--shape", "pocket"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = re.findall(r"^(?:8b|pocket) +(?:80|90) .* (\d+) +(\d+) +(\d+) +0$", done.stdout, re.MULTILINE)
    assert len(rows) == 2 * 2 * KERNELS, done.stdout
    print(done.stdout)
