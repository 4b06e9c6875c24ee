"""The model's shape, read from a published checkpoint's ``config.json`` and ``generation_config.json``."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal


class UnsupportedModel(ValueError):
    """The checkpoint asks for something this server does not implement; the message names it."""


@dataclass(frozen=True)
class Rope:
    """Rotary embedding. ``kind`` "linear" divides the frequencies by ``factor``; "llama3" by band."""

    theta: float
    kind: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


@dataclass(frozen=True)
class Lora:
    """``alpha / r`` scales the product B A of every adapted linear in ``targets``."""

    r: int
    alpha: float
    targets: frozenset[str]

    @property
    def scale(self) -> float:
        return self.alpha / self.r


@dataclass(frozen=True)
class ModelConfig:
    """Sizes in the paper's words: ``num_tokens`` is K, ``num_blocks * num_tokens`` is N, per layer."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope: Rope
    num_blocks: int
    num_tokens: int
    add_bos_embedding: bool = False
    drop_memory_per_layer: bool = False
    add_decoder_lora: bool = False
    lora: Lora | None = None
    interpolate_position_ids: bool = False
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    min_context: int = 16
    max_context: int = 512

    @property
    def pool_size(self) -> int:
        """N: memory tokens a layer."""
        return self.num_blocks * self.num_tokens

    @property
    def pool_slots(self) -> int:
        """N + K: a layer's pool with its spare slots."""
        return self.pool_size + self.num_tokens

    @property
    def group_size(self) -> int:
        """Query heads that share one K/V head."""
        return self.num_heads // self.num_kv_heads

    @property
    def position_scale(self) -> float:
        """What positions are multiplied by (the 7B model interpolates them into its trained range)."""
        if not self.interpolate_position_ids:
            return 1.0
        return min(1.0, self.max_position_embeddings / ((self.num_blocks + 1) * self.num_tokens))

    @property
    def first_rank_position(self) -> int:
        """Position of rank 0: behind the bos embedding, if there is one."""
        return 1 if self.add_bos_embedding else 0

    @property
    def prompt_position(self) -> int:
        """Position of a prompt's first token, behind bos and pool."""
        return self.first_rank_position + self.pool_size

    def surviving_share(self, updates: int) -> float:
        """Expected share of a block left after ``updates`` further ones: (1 - K/N)^t (MemoryLLM, section 3.2)."""
        return (1.0 - self.num_tokens / self.pool_size) ** updates


@dataclass(frozen=True)
class GenerationDefaults:
    """From ``generation_config.json``: temperature 0 unless the model says that it is to be sampled."""

    stop_tokens: tuple[int, ...] = ()
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0


def _rope(raw: dict[str, Any]) -> Rope:
    scaling: dict[str, Any] = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    theta = float(raw.get("rope_theta") or scaling.get("rope_theta") or 10000.0)
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return Rope(theta)
    if kind == "linear":
        return Rope(theta, "linear", float(scaling["factor"]))
    if kind == "llama3":
        return Rope(
            theta,
            "llama3",
            float(scaling["factor"]),
            float(scaling["low_freq_factor"]),
            float(scaling["high_freq_factor"]),
            int(scaling["original_max_position_embeddings"]),
        )
    raise UnsupportedModel(f"rope scaling of type {kind!r} is not supported (default, linear, llama3 are)")


def _lora(raw: dict[str, Any]) -> Lora | None:
    lora = raw.get("lora_config")
    if not lora:
        return None
    if (
        lora.get("use_rslora")
        or lora.get("use_dora")
        or lora.get("rank_pattern")
        or lora.get("alpha_pattern")
    ):
        raise UnsupportedModel("lora_config with rslora, dora, rank or alpha patterns is not supported")
    return Lora(int(lora["r"]), float(lora["lora_alpha"]), frozenset(lora["target_modules"]))


def parse_config(raw: dict[str, Any]) -> ModelConfig:
    """``config.json`` as a ModelConfig; absent keys mean false. Raises UnsupportedModel by name."""
    if raw.get("model_type") not in ("llama", "memoryllm"):
        raise UnsupportedModel(f"model_type {raw.get('model_type')!r} is neither 'llama' nor 'memoryllm'")
    if raw.get("hidden_act", "silu") != "silu":
        raise UnsupportedModel(f"hidden_act {raw['hidden_act']!r} is not supported (silu is)")
    for key in ("num_blocks", "num_tokens"):
        if not isinstance(raw.get(key), int) or raw[key] < 1:
            raise UnsupportedModel(f"config.json has no usable {key!r}: this is not a MemoryLLM checkpoint")
    heads = int(raw["num_attention_heads"])
    config = ModelConfig(
        hidden_size=int(raw["hidden_size"]),
        intermediate_size=int(raw["intermediate_size"]),
        num_layers=int(raw["num_hidden_layers"]),
        num_heads=heads,
        num_kv_heads=int(raw.get("num_key_value_heads") or heads),
        head_dim=int(raw.get("head_dim") or int(raw["hidden_size"]) // heads),
        vocab_size=int(raw["vocab_size"]),
        rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        max_position_embeddings=int(raw.get("max_position_embeddings", 2048)),
        rope=_rope(raw),
        num_blocks=int(raw["num_blocks"]),
        num_tokens=int(raw["num_tokens"]),
        add_bos_embedding=bool(raw.get("add_bos_embedding", False)),
        drop_memory_per_layer=bool(raw.get("drop_memory_per_layer", False)),
        add_decoder_lora=bool(raw.get("add_decoder_lora", False)),
        lora=_lora(raw),
        interpolate_position_ids=bool(raw.get("interpolate_position_ids", False)),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        attention_bias=bool(raw.get("attention_bias", False)),
        mlp_bias=bool(raw.get("mlp_bias", False)),
        min_context=int(raw.get("min_context_tokens", 16)),
        max_context=int(raw.get("max_context_tokens", 512)),
    )
    if config.num_heads % config.num_kv_heads:
        raise UnsupportedModel("num_attention_heads is not a multiple of num_key_value_heads")
    if config.add_decoder_lora and config.lora is None:
        raise UnsupportedModel("add_decoder_lora without a lora_config")
    if config.num_blocks < 2:
        raise UnsupportedModel("num_blocks below 2: every update would replace the whole memory")
    return config


def _stop_tokens(value: object) -> tuple[int, ...]:
    values = value if isinstance(value, list) else [value]
    return tuple(v for v in values if isinstance(v, int))


def read_config(directory: Path) -> ModelConfig:
    """Raises FileNotFoundError, UnsupportedModel."""
    return parse_config(json.loads((directory / "config.json").read_text("utf-8")))


def read_generation_defaults(directory: Path) -> GenerationDefaults:
    """Stop tokens and sampling; a missing ``generation_config.json`` falls back on ``config.json``'s eos."""
    path = directory / "generation_config.json"
    raw: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.exists() else {}
    eos = raw.get("eos_token_id")
    if eos is None:
        eos = json.loads((directory / "config.json").read_text("utf-8")).get("eos_token_id")
    sampled = bool(raw.get("do_sample", False))

    def number(key: str, default: float) -> float:
        value = raw.get(key)
        return float(value) if isinstance(value, int | float) and math.isfinite(value) else default

    return GenerationDefaults(
        stop_tokens=_stop_tokens(eos),
        temperature=number("temperature", 1.0) if sampled else 0.0,
        top_p=number("top_p", 1.0) if sampled else 1.0,
        top_k=int(number("top_k", 0)) if sampled else 0,
        repetition_penalty=number("repetition_penalty", 1.0),
    )
