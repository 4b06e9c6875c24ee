"""The scales of 8-bit keys hold what the model writes, not only what its own pool shows."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from app.api.tokens import Tokenizer
from app.memory.arena import Arena
from app.memory.sample import sampled_blocks
from app.model.backbone import Backbone
from app.model.checkpoint import load_weights
from app.model.config import read_config
from app.model.torch_operations import TorchOperations
from kernels.quantise import key_scale
from tests.harness import Harness
from training.facts import FactGenerator

POCKET = Path(__file__).parents[2] / "app" / "pocket"


def test_facts_are_written_within_the_scales() -> None:
    """The pocket model's own pool is one block over and over: of its own scales alone one key in twenty is clamped."""
    config = read_config(POCKET)
    weights, _ = load_weights(POCKET, config, dtype=torch.float32, device=torch.device("cpu"))
    ours = Harness(Backbone(config, weights, 256))
    tokenizer = Tokenizer.load(POCKET)
    assert tokenizer is not None
    facts = FactGenerator(3)
    for _ in range(60):
        tokens = tokenizer.ids(facts.fact().statement)
        ours.update("ada", (tokens * 4)[: config.max_context])
    memory = ours.engine.residency.get("ada")
    assert memory is not None
    key = ours.engine.arena.pools.key[:, memory.slot]

    coarse = Backbone(config, weights, 256, partial(TorchOperations, eight_bit=True))
    scale = Arena(coarse, 1, 1).pools.key_scale
    assert scale is not None
    own = torch.cat([key_scale(part) for _, part, _ in coarse.project_by_layer(weights.memory)])

    def clamped(scale: torch.Tensor) -> float:
        return float((key.abs() > 127.5 * scale[..., None, :]).float().mean())

    assert clamped(own) > 0.02
    assert clamped(scale) < 0.002
    assert (scale >= own).all()


def test_the_sample_is_the_same_every_time_and_leaves_pools_alone() -> None:
    config = read_config(POCKET)
    weights, _ = load_weights(POCKET, config, dtype=torch.float32, device=torch.device("cpu"))
    backbone = Backbone(config, weights, 256)
    pools = Arena(backbone, 1, 1).pools
    for part in pools.parts(0):
        part.fill_(7)
    first, second = (list(sampled_blocks(backbone, pools)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(block.isfinite().all() for block in first)
    assert not torch.equal(first[0], first[1])
    assert all((part == 7).all() for part in pools.parts(0))
