"""A projection with a correction on its last rows."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from app.model.weights import Linear


class Operations(TorchDispatchMode):
    """Counts what torch is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def test_the_correction_is_added_in_place_and_to_no_other_row() -> None:
    generator = torch.Generator().manual_seed(2)
    weight, down, up = (torch.randn(size, generator=generator) for size in ((6, 5), (2, 5), (6, 2)))
    x = torch.randn(4, 5, generator=generator)
    projection = Linear(weight, None, down, up)
    with Operations() as seen:
        y = projection(x, slice(3, None))
    plain = x @ weight.T
    assert torch.equal(y[:3], projection(x, None)[:3])
    torch.testing.assert_close(y[:3], plain[:3])
    torch.testing.assert_close(y[3], plain[3] + up @ (down @ x[3]))
    # asked for a copy of the rows onto themselves, torch has to find out that it is one, in every layer
    assert seen.counts["add_"] == 1
    assert not seen.counts["copy_"]
