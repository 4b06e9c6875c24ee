"""The trial that kernels pass before they serve finds wrong ones."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from app.model.kernel_operations import KernelOperations
from app.model.operations import Operations
from app.model.pools import Pools
from app.model.torch_operations import TorchOperations
from app.model.trial import Wrong, try_out
from tests.harness import load_backbone
from tests.kernels.test_operations import CPU, SIZES, pytestmark  # noqa: F401


class UpsideDown(TorchOperations):
    """Rotates by the wrong ranks."""

    def make_readable(self, pools: Pools, slot: int, rank: Tensor, hot: int) -> None:
        super().make_readable(pools, slot, torch.where(rank < 0, rank, rank.max() - rank), hot)


class Nowhere(TorchOperations):
    """Writes a block beside its slots."""

    def write(
        self,
        hidden: Tensor,
        norm: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        slots: Tensor,
        key: Tensor,
        value: Tensor,
    ) -> None:
        super().write(hidden, norm, weight, bias, slots.flip(0), key, value)


class Careless(TorchOperations):
    """A self-update's rows see what comes after them."""

    def attend_causally(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return super().attend_causally(query[:, -1:], key, value).expand(-1, query.shape[1], -1)


def trial(make: object) -> None:
    backbone, _ = load_backbone("plain")
    given = backbone.config, backbone.rope, torch.float32, CPU
    operations: Operations = make(*given)  # type: ignore[operator]
    try_out(operations, *given)


@pytest.mark.parametrize("form", [{}, {"rotating": True}, {"eight_bit": True}], ids=str)
def test_the_kernels_pass(form: dict[str, bool]) -> None:
    trial(partial(KernelOperations, sizes=SIZES, **form))


@pytest.mark.parametrize(
    ("wrong", "reason"), [(UpsideDown, "reading"), (Nowhere, "writing"), (Careless, "self-update")]
)
def test_wrong_operations_do_not(wrong: type[TorchOperations], reason: str) -> None:
    with pytest.raises(Wrong, match=reason):
        trial(wrong)
