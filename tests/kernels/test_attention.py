"""Partial attention and its joining, against a float64 softmax written out."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import kernels.attention
import kernels.linear
from kernels.attention import merge, pack_heads, partial_attention, unpack_heads

TOLERANCE = 2e-5


def naive(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    scores = query.double() @ key.double().transpose(-1, -2) / query.shape[-1] ** 0.5
    if bias is not None:
        scores = scores + bias.double()
    normaliser = scores.logsumexp(dim=-1)
    return (scores - normaliser[..., None]).exp() @ value.double(), normaliser


def inputs(
    batch: int, kv_heads: int, rows: int, keys: int, head_dim: int, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    return (
        normal(batch, kv_heads, rows, head_dim),
        normal(batch, kv_heads, keys, head_dim),
        normal(batch, kv_heads, keys, head_dim),
    )


def check(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> None:
    output, normaliser = partial_attention(query, key, value, bias)
    expected, expected_normaliser = naive(query, key, value, bias)
    assert normaliser.dtype == torch.float32
    torch.testing.assert_close(output.double(), expected, atol=TOLERANCE, rtol=1e-4)
    torch.testing.assert_close(normaliser.double(), expected_normaliser, atol=TOLERANCE, rtol=1e-5)


@pytest.fixture
def many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sends even small products the way of long prompts over long pools, in blocks of an odd size."""
    monkeypatch.setattr(kernels.attention, "MANY_ROWS", 1)
    monkeypatch.setattr(kernels.attention, "_BLOCK_ROWS", 7)
    monkeypatch.setattr(kernels.linear, "_STREAMED_ELEMENTS", 1)


SHAPES = list(itertools.product(range(1, 10), [16, 64, 80, 128, 256]))


@pytest.mark.parametrize(("group", "head_dim"), SHAPES)
def test_a_pool_with_spare_slots(group: int, head_dim: int) -> None:
    query, key, value = inputs(3, 2, 2 * group, 37, head_dim, seed=group)
    bias = torch.zeros(3, 1, 1, 37)
    bias[0, ..., :5] = bias[1, ..., -5:] = bias[2, ..., ::2] = -torch.inf
    check(query, key, value, bias)


@pytest.mark.parametrize(("group", "head_dim"), SHAPES)
@pytest.mark.usefixtures("many_rows")
def test_a_pool_with_spare_slots_by_whole_heads(group: int, head_dim: int) -> None:
    test_a_pool_with_spare_slots(group, head_dim)


@pytest.mark.parametrize("keys", [1, 2, 31, 512, 513])
@pytest.mark.parametrize("rows", [1, 3, 33])
def test_lengths_around_a_tile(rows: int, keys: int) -> None:
    check(*inputs(2, 3, rows, keys, 64), None)


@pytest.mark.usefixtures("many_rows")
@pytest.mark.parametrize("keys", [1, 2, 31, 512, 513])
@pytest.mark.parametrize("rows", [1, 7, 33])
def test_lengths_around_a_block_by_whole_heads(rows: int, keys: int) -> None:
    check(*inputs(2, 3, rows, keys, 64), None)
    check(*inputs(2, 3, rows, keys, 64), torch.zeros(1, 1, 1, keys))


def test_the_long_pool_of_a_long_prompt() -> None:
    query, key, value = inputs(1, 2, 200, 8200, 64)
    assert kernels.linear.streams(key[0, 0])
    bias = torch.zeros(1, 1, 1, 8200)
    bias[..., 8000:] = -torch.inf
    check(query, key, value, bias)


@pytest.mark.usefixtures("many_rows")
def test_a_causal_bias_is_by_row() -> None:
    query, key, value = inputs(1, 2, 12, 20, 32)
    own = torch.full((12, 12), -torch.inf).triu(1)
    check(query, key, value, torch.nn.functional.pad(own, (8, 0))[None, None])


@pytest.mark.parametrize("visible", [1, 2])
def test_contexts_of_one_token_beside_longer_ones(visible: int) -> None:
    query, key, value = inputs(2, 2, 4, 50, 64)
    bias = torch.zeros(2, 1, 1, 50)
    bias[0, ..., visible:] = -torch.inf
    check(query, key, value, bias)
    alone, _ = partial_attention(query[:1], key[:1, :, :visible], value[:1, :, :visible], None)
    together, _ = partial_attention(query, key, value, bias)
    torch.testing.assert_close(together[:1], alone, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("scale", [1e-4, 30.0])
@pytest.mark.parametrize("whole_heads", [False, True])
def test_flat_and_sharp_scores(scale: float, whole_heads: bool, request: pytest.FixtureRequest) -> None:
    if whole_heads:
        request.getfixturevalue("many_rows")
    query, key, value = inputs(1, 2, 9, 70, 64)
    check(query * scale, key, value, None)


def test_non_contiguous_keys() -> None:
    query, key, value = inputs(2, 3, 4, 21, 64)
    check(query, key.transpose(1, 2).contiguous().transpose(1, 2), value.flip(2).flip(2), None)


def test_bfloat16() -> None:
    query, key, value = (t.bfloat16() for t in inputs(1, 2, 6, 40, 64))
    output, normaliser = partial_attention(query, key, value, torch.zeros(1, 1, 1, 40, dtype=torch.bfloat16))
    expected, expected_normaliser = naive(query, key, value, None)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.double(), expected, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(normaliser.double(), expected_normaliser, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("group", range(1, 10))
@pytest.mark.parametrize("cut", [1, 20, 39])
def test_merging_parts_gives_the_whole(group: int, cut: int) -> None:
    query, key, value = inputs(2, 2, group, 40, 64)
    first = partial_attention(query, key[:, :, :cut], value[:, :, :cut], None)
    second = partial_attention(query, key[:, :, cut:], value[:, :, cut:], None)
    output, normaliser = merge(*first, *second)
    expected, expected_normaliser = naive(query, key, value, None)
    torch.testing.assert_close(output.double(), expected, atol=TOLERANCE, rtol=1e-4)
    torch.testing.assert_close(normaliser.double(), expected_normaliser, atol=TOLERANCE, rtol=1e-5)


def test_merging_with_a_part_of_no_weight() -> None:
    output, other = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    high, low = torch.full((2, 3), 100.0), torch.full((2, 3), -100.0)
    joined, normaliser = merge(output, high, other, low)
    torch.testing.assert_close(joined, output)
    torch.testing.assert_close(normaliser, high)


@pytest.mark.parametrize(("tokens", "kv_heads", "group"), [(1, 1, 1), (5, 2, 3), (3, 4, 9)])
def test_packing_heads(tokens: int, kv_heads: int, group: int) -> None:
    query = torch.randn(2, tokens, kv_heads * group, 16)
    packed = pack_heads(query, kv_heads)
    assert packed.shape == (2, kv_heads, group * tokens, 16)
    token, head = tokens - 1, group - 1
    torch.testing.assert_close(packed[1, 0, head * tokens + token], query[1, token, head])
    torch.testing.assert_close(unpack_heads(packed, tokens), query.flatten(2))


def test_results_do_not_depend_on_what_memory_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """With new buffers full of NaN the results are the same: nothing unwritten is read."""
    monkeypatch.setattr(kernels.attention, "MANY_ROWS", 1)
    query, key, value = inputs(1, 1, 5, 8200, 64)
    expected = partial_attention(query, key, value, None)
    torch.use_deterministic_algorithms(True)  # fills new buffers with NaN
    try:
        assert torch.empty(8).isnan().all()
        poisoned = partial_attention(query, key, value, None)
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip(expected, poisoned, strict=True):
        torch.testing.assert_close(a, b)


BIASES = [None, (1, 1, 1, 23), (2, 1, 1, 23), (1, 1, 13, 23), (2, 1, 13, 23)]


@pytest.mark.parametrize("size", BIASES, ids=str)
@pytest.mark.parametrize("most", [1, 2 * 3 * 23 * 5, 2**24], ids=["a row", "five rows", "all"])
def test_written_out_it_has_few_scores_at_once(
    monkeypatch: pytest.MonkeyPatch, size: tuple[int, ...] | None, most: int
) -> None:
    """What torch does on a GPU that is not for the kernels, with prompts whose scores are more than there may be."""
    query, key, value = inputs(2, 3, 13, 23, 16)
    bias = None
    if size is not None:
        bias = torch.randn(size, generator=torch.Generator().manual_seed(9)).where(
            torch.arange(23) % 5 != 1, -torch.inf
        )
    made: list[int] = []
    plain = torch.Tensor.logsumexp

    def noted(scores: Tensor, dim: int) -> Tensor:
        made.append(scores.numel())
        return plain(scores, dim=dim)

    monkeypatch.setattr(torch.Tensor, "logsumexp", noted)
    monkeypatch.setattr(kernels.attention, "_MOST_SCORES", most)
    output, normaliser = kernels.attention._written_out(query, key, value, bias)
    monkeypatch.undo()
    assert max(made) <= max(most, 2 * 3 * 23)
    assert sum(made) == 2 * 3 * 13 * 23
    expected, expected_normaliser = naive(query, key, value, bias)
    assert (output.dtype, normaliser.dtype) == (query.dtype, torch.float32)
    torch.testing.assert_close(output.double(), expected, atol=TOLERANCE, rtol=1e-4)
    torch.testing.assert_close(normaliser.double(), expected_normaliser, atol=TOLERANCE, rtol=1e-5)
