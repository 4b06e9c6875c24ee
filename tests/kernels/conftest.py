"""Has the Triton kernels of this process run in Triton's interpreter, on CPU tensors.

Triton looks at the variable when a kernel is defined and now and then later on, so it stands while kernels are
imported and while this folder's tests run: the servers that other tests start do not see it. Nothing on the
CPU's own path imports a kernel.
"""

from __future__ import annotations

import pytest

_INTERPRET = "TRITON_INTERPRET"

with pytest.MonkeyPatch.context() as _patch:
    _patch.setenv(_INTERPRET, "1")
    import kernels.add_norm
    import kernels.hot_copy
    import kernels.memory_attention
    import kernels.rotate_rows
    import kernels.swiglu
    import kernels.write_block  # noqa: F401


@pytest.fixture(autouse=True)
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(_INTERPRET, "1")
