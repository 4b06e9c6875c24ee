"""What is exported is what was trained, in the published layout, and the trainer's checkpoints come back."""

import argparse
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from training.model import MemoryModel
from training.optimizer import Optimizer, orthogonalise
from training.published import load_published, save_published
from training.train import MATRICES, Trainer


def test_export_round_trip(model: MemoryModel, tokenizer: Tokenizer, tmp_path: Path) -> None:
    save_published(dict(model.state_dict()), model.config, tokenizer, tmp_path)
    again = load_published(tmp_path)
    assert again.config == model.config
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_exported_keys_and_shapes_are_the_published_ones(
    model: MemoryModel, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    save_published(dict(model.state_dict()), model.config, tokenizer, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    c = model.config
    assert tensors["memory"].shape == (c.num_layers, c.pool_size, c.hidden_size)
    assert tensors["bos_embedding"].shape == (c.num_layers, 1, c.hidden_size)
    assert tensors["new_memory_positional_emb"].shape == (1, 1, c.hidden_size)
    assert tensors["initialized"].dtype == torch.uint8
    assert tensors["initialized"].item() == 1
    assert tensors["model.layers.0.mlp.down_proj.weight"].shape == (c.hidden_size, c.intermediate_size)
    assert "lm_head.weight" not in tensors
    assert len(tensors) == 6 + 9 * c.num_layers
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["tie_word_embeddings"] is True
    assert config["num_blocks"] * config["num_tokens"] == tensors["memory"].shape[1]


def test_a_key_nobody_uses_is_refused(model: MemoryModel, tokenizer: Tokenizer, tmp_path: Path) -> None:
    save_published(dict(model.state_dict()), model.config, tokenizer, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({**tensors, "model.layers.0.extra": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.layers\.0\.extra"):
        load_published(tmp_path)


def test_the_exported_tokenizer_speaks_the_chat_format(
    model: MemoryModel, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    save_published(dict(model.state_dict()), model.config, tokenizer, tmp_path)
    loaded = PreTrainedTokenizerFast.from_pretrained(str(tmp_path))
    text = loaded.apply_chat_template(
        [{"role": "user", "content": "What's my dog's name?"}], tokenize=False, add_generation_prompt=True
    )
    assert text == "<|user|>What's my dog's name?<|assistant|>"
    ids = loaded.encode(text, add_special_tokens=False)
    assert ids == tokenizer.encode(text, add_special_tokens=False).ids
    assert loaded.eos_token_id == tokenizer.token_to_id("<|end|>")
    assert loaded.decode(loaded.encode(" Zoë", add_special_tokens=False)).strip() == "Zoë"


def test_a_run_goes_on_where_it_stopped(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    arguments = argparse.Namespace(
        tokenizer=tmp_path / "tokenizer.json", text=None, out=tmp_path / "run", minutes=10.0, batch=16, processes=1,
        rate=1e-3, muon_rate=1e-3, adamw=False, question_weight=0.2, decay=0.3, rope_theta=10_000.0, log_every=50,
        seed=0, dtype="auto", width=192, layers=4, heads=3, inner=512,
    )  # fmt: skip
    arguments.out.mkdir()
    trainer = Trainer(arguments, 0)
    for stage in range(len(trainer.stages)):
        trainer.stage = stage
        loss, (answer_loss, right, known, refused, unknown) = trainer.loss()
        assert answer_loss > 0
        assert 0 <= right <= known
        assert 0 <= refused <= unknown
        assert known > 0
        gradients, _ = trainer.gradients(loss, [0.0])
        trainer.optimizer.step(gradients, 1e-3, 1e-3)
        trainer.step += 1
        for name, parameter in trainer.model.named_parameters():
            trainer.average[name].lerp_(parameter.detach(), 0.5)
    trainer.save()
    again = Trainer(arguments, 0)
    assert (again.step, again.stage) == (len(trainer.stages), trainer.stage)
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name]), name
    assert again.average.keys() == trainer.average.keys()
    for name, tensor in trainer.average.items():
        assert torch.equal(tensor, again.average[name]), name
        assert not torch.equal(tensor, again.model.state_dict()[name]), name
    for name, tensor in trainer.optimizer.state.items():
        assert torch.equal(tensor, again.optimizer.state[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_muon_gives_nearly_orthogonal_directions(model: MemoryModel, dtype: torch.dtype) -> None:
    direction = orthogonalise(torch.randn(2, 24, 64), dtype)
    assert direction.dtype == torch.float32
    spectrum = torch.linalg.svdvals(direction)
    assert spectrum.min() > 0.5
    assert spectrum.max() < 1.4
    optimizer = Optimizer(model, MATRICES, dtype)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step({name: torch.ones_like(p) for name, p in model.named_parameters()}, 0.01, 0.01)
    for name, parameter in model.named_parameters():
        assert not torch.equal(before[name], parameter), name
