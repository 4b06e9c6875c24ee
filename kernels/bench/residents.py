"""How many tenants a server would hold on this GPU: its own arithmetic, with its own defaults."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import cast

import torch

from app.model.backbone import Backbone
from app.model.config import ModelConfig
from app.model.pools import PoolForm
from app.settings import Settings
from app.worker.budget import share_out
from kernels.bench.attention import COPIES, EIGHT_BIT, ROTATING
from kernels.bench.report import Row

_FORMS = {
    COPIES: (PoolForm(), 56, 70),
    ROTATING: (PoolForm(copies=False), 56, 70),
    EIGHT_BIT: (PoolForm(copies=False, eight_bit=True), 100, 135),
}


def rows(config: ModelConfig, dtype: torch.dtype, device: torch.device, free: int) -> Iterator[Row]:
    """``free``: bytes of the GPU with the weights loaded and nothing else. Raises CannotStart if no tenant fits."""
    # the defaults, whatever this shell's environment says
    settings = Settings.model_construct()
    for name, (form, least, aim) in _FORMS.items():
        operations = SimpleNamespace(form=form)
        shape = SimpleNamespace(config=config, dtype=dtype, device=device, operations=operations)
        budget = share_out(cast("Backbone", shape), settings, free, alone=True)
        # without copies whatever is resident can be read
        note = f"{budget.hot} of them read at once" if form.copies else ""
        case = f"of {free / 1e9:.0f} GB"
        yield Row(f"tenants resident at once, {name}", case, budget.slots, "tenants", least, aim, note=note)
