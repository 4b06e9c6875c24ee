"""A checkpoint of random weights in the published format, of any shape: for timing, where text does not matter."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from app.model.config import ModelConfig, Rope


def shape(
    *,
    layers: int,
    hidden: int,
    heads: int,
    kv_heads: int,
    intermediate: int,
    vocab: int,
    num_blocks: int,
    num_tokens: int,
    max_position: int = 16_384,
) -> ModelConfig:
    """A MemoryLLM with bos embedding, one draw for all layers, no adapters, RoPE base 1e4."""
    return ModelConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=hidden // heads,
        vocab_size=vocab,
        rms_norm_eps=1e-6,
        max_position_embeddings=max_position,
        rope=Rope(10_000.0),
        num_blocks=num_blocks,
        num_tokens=num_tokens,
        add_bos_embedding=True,
    )


def write(directory: Path, config: ModelConfig, seed: int) -> None:
    """Writes ``config.json`` and ``model.safetensors`` (float32). The same seed gives the same weights.

    Weights have deviation 1 / sqrt(inputs), so that activations stay of order one in every layer; memory and
    bos have deviation 1, as the hidden states that they stand for.
    """
    generator = torch.Generator().manual_seed(seed)
    c = config
    q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim

    def normal(*size: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(*size, generator=generator) * scale

    def linear(outputs: int, inputs: int) -> torch.Tensor:
        return normal(outputs, inputs, scale=inputs**-0.5)

    tensors = {
        "model.embed_tokens.weight": normal(c.vocab_size, c.hidden_size),
        "model.norm.weight": torch.ones(c.hidden_size),
        "lm_head.weight": linear(c.vocab_size, c.hidden_size),
        "memory": normal(c.num_layers, c.pool_size, c.hidden_size),
        "bos_embedding": normal(c.num_layers, 1, c.hidden_size),
        "new_memory_positional_emb": normal(1, 1, c.hidden_size, scale=0.02),
        "initialized": torch.tensor(1, dtype=torch.uint8),
    }
    for index in range(c.num_layers):
        prefix = f"model.layers.{index}"
        tensors |= {
            f"{prefix}.input_layernorm.weight": torch.ones(c.hidden_size),
            f"{prefix}.post_attention_layernorm.weight": torch.ones(c.hidden_size),
            f"{prefix}.self_attn.q_proj.weight": linear(q, c.hidden_size),
            f"{prefix}.self_attn.k_proj.weight": linear(kv, c.hidden_size),
            f"{prefix}.self_attn.v_proj.weight": linear(kv, c.hidden_size),
            f"{prefix}.self_attn.o_proj.weight": linear(c.hidden_size, q),
            f"{prefix}.mlp.gate_proj.weight": linear(c.intermediate_size, c.hidden_size),
            f"{prefix}.mlp.up_proj.weight": linear(c.intermediate_size, c.hidden_size),
            f"{prefix}.mlp.down_proj.weight": linear(c.hidden_size, c.intermediate_size),
        }
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    raw = {
        "architectures": ["MemoryLLM"],
        "model_type": "memoryllm",
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "vocab_size": c.vocab_size,
        "rms_norm_eps": c.rms_norm_eps,
        "max_position_embeddings": c.max_position_embeddings,
        "rope_theta": c.rope.theta,
        "rope_scaling": None,
        "hidden_act": "silu",
        "attention_bias": c.attention_bias,
        "attention_dropout": 0.0,
        "mlp_bias": c.mlp_bias,
        "pretraining_tp": 1,
        "tie_word_embeddings": c.tie_word_embeddings,
        "use_cache": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float32",
        "num_blocks": c.num_blocks,
        "num_tokens": c.num_tokens,
        "add_bos_embedding": c.add_bos_embedding,
        "drop_memory_per_layer": c.drop_memory_per_layer,
        "add_decoder_lora": False,
        "lora_config": None,
    }
    (directory / "config.json").write_text(json.dumps(raw, indent=2) + "\n", "utf-8")
