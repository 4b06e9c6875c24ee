"""A small tokenizer and a small model, made once."""

import pytest
import torch
from tokenizers import Tokenizer

from training.model import MemoryModel, ModelConfig
from training.tokenizer import generated_text, train_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_tokenizer(generated_text(1500, 0), 600)


@pytest.fixture
def model(tokenizer: Tokenizer) -> MemoryModel:
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=32, num_layers=3, num_heads=2, intermediate_size=48,
        num_tokens=6, num_blocks=5, rope_theta=10_000.0,
    )  # fmt: skip
    made = MemoryModel(config)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "norm" in name or "emb" in name or name == "initial_block":
                parameter.copy_(torch.randn_like(parameter) * 0.5 + ("norm" in name))
    return made
