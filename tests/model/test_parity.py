"""The reference's own numbers, reproduced by the code that serves: engine, batches, projected pools."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from app.messages import CreateTenant
from app.model.batch import Batch
from app.store.base import Manifest
from app.worker.rows import Rows
from app.worker.runner import ReadChunk
from app.worker.sequence import begin
from tests.harness import CHECKPOINTS, NAMES, Harness, load_backbone

TOLERANCE = 1e-4


def all_logits(harness: Harness, tenant: str, prompt: list[int]) -> torch.Tensor:
    """Logits of every prompt token, through the engine's runner."""
    engine = harness.engine
    while not engine.residency.readable(tenant):
        engine.residency.prepare(tenant, read=True)
        harness.inline.drain()
    memory = engine.residency.get(tenant)
    assert memory is not None
    view = engine.arena.read(memory)
    config = engine.backbone.config
    pages, rows = engine._rows.take(Rows.rounded(len(prompt)))
    sequence = begin(
        "probe", memory, view, prompt, pages, rows,
        has_bos=config.add_bos_embedding, prompt_position=config.prompt_position,
    )  # fmt: skip
    batch: Batch
    batch, _, _ = engine.runner._batch([], [ReadChunk(sequence, 0, len(prompt))], [])
    batch.logit_rows = torch.arange(len(prompt))
    logits = engine.backbone.forward(batch, engine.arena.pools, engine.runner.cache)
    engine.arena.release(memory, view)
    engine._rows.give(pages)
    return logits


@pytest.mark.parametrize("name", NAMES)
def test_every_version_agrees_with_the_reference(name: str) -> None:
    cases = load_file(CHECKPOINTS / name / "cases.safetensors")
    seed = json.loads((CHECKPOINTS / name / "cases.json").read_text())["tenant_seed"]
    backbone, fingerprint = load_backbone(name)
    harness = Harness(backbone, fingerprint)
    prompt = cases["prompt"].tolist()
    harness.send(CreateTenant("create", "ada", seed))
    harness.run()
    versions = sum(key.endswith(".greedy") for key in cases)
    for version in range(versions):
        if version:
            answer = harness.update("ada", cases[f"v{version}.context"].tolist())
            assert answer.memory_version == version
            manifest = harness.store.load("ada")
            assert isinstance(manifest, Manifest)
            pool = harness.engine.residency.pool(manifest)
            delta = pool.hidden[:, -backbone.config.num_tokens :]
            torch.testing.assert_close(delta, cases[f"v{version}.delta"], atol=TOLERANCE, rtol=0)
            torch.testing.assert_close(
                pool.hidden.sum(dim=(1, 2)), cases[f"v{version}.memory_sum"], atol=0.02, rtol=1e-3
            )
        logits = all_logits(harness, "ada", prompt)
        torch.testing.assert_close(logits, cases[f"v{version}.logits"], atol=TOLERANCE, rtol=0)
        greedy = cases[f"v{version}.greedy"].tolist()
        assert harness.generate("ada", prompt, len(greedy)) == greedy
    assert versions == len([k for k in cases if k.endswith(".context")]) + 1
    torch.testing.assert_close(pool.hidden, cases["final_memory"], atol=TOLERANCE, rtol=0)
