"""Loading: every key used, every parameter filled, or a failure that names it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from app.model import checkpoint
from app.model.checkpoint import CheckpointError, check_tokenizer, load_weights, resolve
from app.model.config import UnsupportedModel, parse_config, read_config, read_generation_defaults
from tests.harness import CHECKPOINTS, load_backbone


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    shutil.copytree(CHECKPOINTS / "plain", directory)
    return directory


def rewrite(directory: Path, **changes: torch.Tensor | None) -> None:
    tensors = load_file(directory / "model.safetensors")
    for key, tensor in changes.items():
        name = key.replace("__", ".")
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor
    save_file(tensors, directory / "model.safetensors")


def load(directory: Path, dtype: torch.dtype = torch.float32) -> tuple[object, str]:
    return load_weights(directory, read_config(directory), dtype=dtype)


@pytest.mark.parametrize(
    "key",
    ["model.norm.weight", "memory", "bos_embedding", "new_memory_positional_emb", "lm_head.weight",
     "model.layers.2.self_attn.k_proj.weight"],
)  # fmt: skip
def test_a_missing_key_fails_by_name(plain: Path, key: str) -> None:
    rewrite(plain, **{key.replace(".", "__"): None})
    with pytest.raises(CheckpointError, match=key.replace(".", r"\.")):
        load(plain)


@pytest.mark.parametrize("name", ["tokenizer.model", "vocab.json", "vocab.txt"])
def test_a_tokenizer_in_another_form_is_refused_by_what_is_missing(plain: Path, name: str) -> None:
    check_tokenizer(plain)
    (plain / name).touch()
    with pytest.raises(CheckpointError, match=rf"{name} but no tokenizer\.json.*save_pretrained"):
        check_tokenizer(plain)
    (plain / "tokenizer.json").touch()
    check_tokenizer(plain)


def test_a_pool_without_the_flag_counts_as_there(plain: Path) -> None:
    rewrite(plain, initialized=None)
    weights, _ = load_weights(plain, read_config(plain), dtype=torch.float32)
    assert weights.initialized


def test_an_unused_key_fails_by_name(plain: Path) -> None:
    rewrite(plain, model__layers__0__self_attn__q_proj__lora_A__default__weight=torch.zeros(4, 64))
    with pytest.raises(CheckpointError, match=r"q_proj\.lora_A\.default\.weight"):
        load(plain)


def test_adapters_the_config_names_must_be_there(tmp_path: Path) -> None:
    directory = tmp_path / "model"
    shutil.copytree(CHECKPOINTS / "short-context", directory)
    key = "model.layers.1.mlp.down_proj.lora_B.decoder_adapter.weight"
    rewrite(directory, **{key.replace(".", "__"): None})
    with pytest.raises(CheckpointError, match=r"down_proj\.lora_B\.decoder_adapter"):
        load(directory)


def test_a_wrong_shape_fails_by_name(plain: Path) -> None:
    rewrite(plain, memory=torch.zeros(3, 40, 64))
    with pytest.raises(CheckpointError, match=r"memory has shape \(3, 40, 64\)"):
        load(plain)


def test_missing_files_and_shards_are_named(plain: Path, tmp_path: Path) -> None:
    (plain / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors"):
        load(plain)
    sharded = tmp_path / "sharded"
    shutil.copytree(CHECKPOINTS / "two-adapters", sharded)
    (sharded / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model-00002-of-00003"):
        load(sharded)


def test_an_index_cannot_point_outside_its_directory(plain: Path) -> None:
    index = {"weight_map": {"memory": "../other.safetensors"}}
    (plain / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="not there"):
        load(plain)


def test_the_fingerprint_tells_weights_and_configs_apart(plain: Path) -> None:
    first = load(plain)[1]
    assert load(plain)[1] == first
    tensors = load_file(plain / "model.safetensors")
    tensors["memory"][1, 7, 3] += 1e-3
    save_file(tensors, plain / "model.safetensors")
    second = load(plain)[1]
    config = json.loads((plain / "config.json").read_text()) | {"rms_norm_eps": 1e-5}
    (plain / "config.json").write_text(json.dumps(config))
    assert len({first, second, load(plain)[1]}) == 3


def test_bfloat16_and_tied_embeddings_load(plain: Path) -> None:
    config = json.loads((plain / "config.json").read_text()) | {"tie_word_embeddings": True}
    (plain / "config.json").write_text(json.dumps(config))
    rewrite(plain, lm_head__weight=None)
    weights, _ = load_weights(plain, read_config(plain), dtype=torch.bfloat16)
    assert weights.head is weights.embedding
    assert weights.layers[0].qkv.weight.dtype == torch.bfloat16
    assert load_backbone("two-adapters", torch.bfloat16)[0].rope.cos.dtype == torch.bfloat16


def test_merging_the_read_adapter_leaves_the_update_adapter_as_a_correction() -> None:
    weights = load_backbone("two-adapters")[0].weights
    layer = weights.layers[1]
    raw: dict[str, torch.Tensor] = {}
    for file in sorted((CHECKPOINTS / "two-adapters").glob("model-*.safetensors")):
        raw |= load_file(file)
    name = "model.layers.1.self_attn.v_proj"
    base, scale = raw[f"{name}.base_layer.weight"], 16 / 4
    read, update = (
        base + scale * raw[f"{name}.lora_B.{a}.weight"] @ raw[f"{name}.lora_A.{a}.weight"]
        for a in ("decoder_adapter", "default")
    )
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    y = layer.qkv(x, slice(1, 2))[:, -32:]
    torch.testing.assert_close(y[0], x[0] @ read.T, atol=1e-5, rtol=0)
    torch.testing.assert_close(y[1], x[1] @ update.T, atol=1e-5, rtol=0)


def test_unsupported_configs_are_named() -> None:
    raw = json.loads((CHECKPOINTS / "plain" / "config.json").read_text())
    for change, word in [
        ({"model_type": "mamba"}, "mamba"),
        ({"num_tokens": None}, "num_tokens"),
        ({"rope_scaling": {"type": "yarn", "factor": 2}}, "yarn"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"num_key_value_heads": 3}, "multiple"),
    ]:
        with pytest.raises(UnsupportedModel, match=word):
            parse_config(raw | change)


def test_a_block_is_forgotten_at_the_papers_rate() -> None:
    """(1 - K/N)^t: MemoryLLM, section 3.2."""
    raw = json.loads((CHECKPOINTS / "plain" / "config.json").read_text())
    for blocks, updates, share in (
        (4, 0, 1.0),
        (4, 1, 0.75),
        (4, 2, 0.5625),
        (2, 3, 0.125),
        (50, 50, 0.36417),
    ):
        config = parse_config(raw | {"num_blocks": blocks})
        assert config.surviving_share(updates) == pytest.approx(share, abs=1e-5)


def test_generation_defaults_come_from_their_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"eos_token_id": 2}')
    assert read_generation_defaults(tmp_path).stop_tokens == (2,)
    (tmp_path / "generation_config.json").write_text(
        '{"eos_token_id": [5, 9], "do_sample": true, "temperature": 0.6, "top_p": 0.9}'
    )
    defaults = read_generation_defaults(tmp_path)
    assert (defaults.stop_tokens, defaults.temperature, defaults.top_p) == ((5, 9), 0.6, 0.9)
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.6}')
    assert read_generation_defaults(tmp_path).temperature == 0.0


def test_a_model_is_pocket_a_directory_or_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve("pocket") == checkpoint.POCKET
    assert resolve(str(tmp_path)) == tmp_path
    with pytest.raises(CheckpointError, match="no such directory"):
        resolve("/no/such/place")
    # offline: huggingface_hub reads this at import, so its own switch is set as well
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="could not be downloaded"):
        resolve("nobody/nothing")
