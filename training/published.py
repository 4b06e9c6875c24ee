"""The published checkpoint layout: take the stacked training weights apart, and put a checkpoint together again.

`python -m training.published --run RUN --tokenizer T --out DIR` writes everything a server needs into DIR.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from training.corpus import MAX_CONTEXT
from training.model import MemoryModel, ModelConfig
from training.tokenizer import CHAT_TEMPLATE, END, PAD, SPECIAL_TOKENS

LINEARS = {
    "q_proj": "self_attn.q_proj", "k_proj": "self_attn.k_proj", "v_proj": "self_attn.v_proj",
    "o_proj": "self_attn.o_proj", "gate_proj": "mlp.gate_proj", "up_proj": "mlp.up_proj", "down_proj": "mlp.down_proj",
    "input_norm": "input_layernorm", "post_norm": "post_attention_layernorm",
}  # fmt: skip
MIN_CONTEXT = 4  # the shortest statements of the training text, such as "I speak Thai."


def published_tensors(state: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Training parameters → the published keys; the initial pool is the learned block repeated."""
    tensors = {
        "model.embed_tokens.weight": state["embedding"],
        "model.norm.weight": state["norm"],
        "bos_embedding": state["bos_embedding"],
        "new_memory_positional_emb": state["new_memory_positional_emb"],
        "memory": state["initial_block"].repeat(1, config.num_blocks, 1),
        "initialized": torch.tensor(1, dtype=torch.uint8),
    }
    for ours, theirs in LINEARS.items():
        for index, tensor in enumerate(state[ours]):
            tensors[f"model.layers.{index}.{theirs}.weight"] = tensor
    return {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}


def published_config(config: ModelConfig, tokenizer: Tokenizer) -> dict[str, object]:
    """config.json: Llama's and MemoryLLM's keys, and the lengths of context the model was trained for."""
    return {
        "architectures": ["MemoryLLM"],
        "model_type": "memoryllm",
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_heads,
        "head_dim": config.head_size,
        "vocab_size": config.vocab_size,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "num_tokens": config.num_tokens,
        "num_blocks": config.num_blocks,
        "num_memory_tokens": config.pool_size,
        "add_bos_embedding": True,
        "drop_memory_per_layer": True,
        "add_decoder_lora": False,
        "lora_config": None,
        "min_context_tokens": MIN_CONTEXT,
        "max_context_tokens": MAX_CONTEXT,
        "bos_token_id": None,
        "eos_token_id": tokenizer.token_to_id(END),
        "pad_token_id": tokenizer.token_to_id(PAD),
        "torch_dtype": "float32",
    }


def save_published(state: dict[str, Tensor], config: ModelConfig, tokenizer: Tokenizer, out: Path) -> None:
    """Write weights, configs and tokenizer into the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    save_file(published_tensors(state, config), out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)
    tokenizer.save(str(out / "tokenizer.json"))
    files = {
        "config.json": published_config(config, tokenizer),
        "generation_config.json": {
            "do_sample": False,
            "eos_token_id": [tokenizer.token_to_id(END)],
            "pad_token_id": tokenizer.token_to_id(PAD),
            "max_new_tokens": 32,
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": END,
            "pad_token": PAD,
            "additional_special_tokens": list(SPECIAL_TOKENS[2:]),
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "model_max_length": 1024,
        },
    }
    for name, content in files.items():
        (out / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def load_published(folder: Path, dtype: torch.dtype = torch.float32) -> MemoryModel:
    """Read a checkpoint that `save_published` wrote; every key must be used and every parameter filled."""
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = ModelConfig(
        vocab_size=raw["vocab_size"], hidden_size=raw["hidden_size"], num_layers=raw["num_hidden_layers"],
        num_heads=raw["num_attention_heads"], intermediate_size=raw["intermediate_size"],
        num_tokens=raw["num_tokens"], num_blocks=raw["num_blocks"], rope_theta=raw["rope_theta"],
        rms_norm_eps=raw["rms_norm_eps"],
    )  # fmt: skip
    tensors = load_file(folder / "model.safetensors")
    state = {
        "embedding": tensors.pop("model.embed_tokens.weight"),
        "norm": tensors.pop("model.norm.weight"),
        "bos_embedding": tensors.pop("bos_embedding"),
        "new_memory_positional_emb": tensors.pop("new_memory_positional_emb"),
        "initial_block": tensors.pop("memory")[:, : config.num_tokens],
    }
    tensors.pop("initialized")
    for ours, theirs in LINEARS.items():
        layers = range(config.num_layers)
        state[ours] = torch.stack([tensors.pop(f"model.layers.{index}.{theirs}.weight") for index in layers])
    if tensors:
        raise ValueError(f"keys nobody uses: {sorted(tensors)}")
    model = MemoryModel(config, dtype)
    model.load_state_dict(state)
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="folder of checkpoints the trainer wrote")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    state = json.loads((arguments.run / "state.json").read_text())
    weights = load_file(arguments.run / "average.safetensors")
    tokenizer = Tokenizer.from_file(str(arguments.tokenizer))
    save_published(weights, ModelConfig(**state["config"]), tokenizer, arguments.out)
    size = sum(path.stat().st_size for path in arguments.out.iterdir()) / 2**20
    print(f"step {state['step']}, {state['minutes']:.1f} minutes: {size:.1f} MiB in {arguments.out}")


if __name__ == "__main__":
    main()
