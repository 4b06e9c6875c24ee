"""Choices from the likeliest tokens alone, against the whole vocabulary put in order: the same for every request."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from app.model import sampling
from app.model.sampling import Sampler, choose, finite

VOCAB = 300
CANDIDATES = 16


class Given(Sampler):
    """One whose numbers are not random."""

    def __init__(self, uniform: float, **parameters: Any) -> None:
        super().__init__(**parameters)
        self._uniform = uniform

    def uniform(self) -> float:
        return self._uniform


def ordered(logits: Tensor, samplers: list[Sampler]) -> tuple[Tensor, Tensor, Tensor]:
    """All tokens' probabilities in order, those that are kept of them, and the tokens: the definition."""

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32)[:, None]

    logits = finite(logits)
    logits = logits - logits.amax(dim=-1, keepdim=True)
    scaled = logits / column([max(s.temperature, 1e-6) for s in samplers])
    found, ids = scaled.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    drop = torch.arange(found.shape[1])[None] >= column([s.top_k or found.shape[1] for s in samplers])
    kept = found.masked_fill(drop, 0.0)
    share = kept.cumsum(dim=-1) / kept.sum(dim=-1, keepdim=True)
    before = share - kept / kept.sum(dim=-1, keepdim=True)
    drop = drop | (before >= column([s.top_p for s in samplers]))
    drop = drop | (found < column([s.min_p for s in samplers]) * found[:, :1])
    drop[:, 0] = False
    return before, found.masked_fill(drop, 0.0), ids


def expected(logits: Tensor, samplers: list[Sampler]) -> list[int]:
    """Each row by the definition; the samplers are as they were before but for one number drawn."""
    tokens = []
    for row, sampler in zip(logits.float(), samplers, strict=True):
        penalised = row.clone()
        if sampler.seen is not None and sampler.repetition_penalty != 1:
            picked = penalised[sampler.seen]
            penalty = sampler.repetition_penalty
            penalised[sampler.seen] = torch.where(picked > 0, picked / penalty, picked * penalty)
            penalised = finite(penalised)
        if sampler.temperature == 0:
            tokens.append(int(penalised.argmax()))
            continue
        _, kept, ids = ordered(penalised[None], [sampler])
        cumulative = kept.double().cumsum(dim=-1)
        place = torch.searchsorted(cumulative, sampler.uniform() * cumulative[:, -1:], right=True)
        last = (kept > 0).sum(dim=-1, keepdim=True) - 1
        tokens.append(int(ids.gather(1, torch.minimum(place, last))))
    return tokens


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "_CANDIDATES", CANDIDATES)


@pytest.fixture
def whole(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of each time that all tokens are put in order, how many rows' are."""
    rows: list[int] = []
    drawn = sampling._drawn

    def noted(logits: Tensor, *rest: Any) -> Tensor:
        rows.append(len(logits))
        return drawn(logits, *rest)

    monkeypatch.setattr(sampling, "_drawn", noted)
    return rows


KINDS = ["normal", "peaked", "flat", "coarse", "equal", "two", "infinite", "half", "falling"]


def row(kind: str, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(VOCAB, generator=generator)
    falling = -1.5 * torch.arange(1, VOCAB + 1).float().log()[torch.randperm(VOCAB, generator=generator)]
    return {
        "normal": 3 * normal,
        "peaked": 40 * normal,
        "flat": 1e-3 * normal,
        "coarse": (3 * normal).round(),
        "equal": torch.zeros(VOCAB),
        "two": (normal > 1).float() * 2,
        "infinite": torch.where(normal < 1.9, -torch.inf, normal),
        "half": (4 * normal).to(torch.bfloat16).float(),
        "falling": falling,
    }[kind]


def parameters() -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(
        {
            "temperature": st.sampled_from([0.0, 1e-40, 0.05, 0.7, 1.0, 1.0, 1.3, 50.0, 1e30, 1e300]),
            "top_p": st.sampled_from([1.0, 1.0, 0.999, 0.95, 0.9, 0.5, 0.1, 1e-3, 1e-40]),
            "top_k": st.sampled_from([0, 0, 1, 2, 15, 16, 17, 40, 299, 300, 301, 10**9]),
            "min_p": st.sampled_from([0.0, 0.0, 1e-40, 1e-4, 0.05, 0.5, 1.0]),
            "repetition_penalty": st.sampled_from([1.0, 1.0, 1.3, 0.5]),
            "seed": st.integers(0, 2**32),
        }
    )


@settings(deadline=None, max_examples=150)
@given(
    st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 10**6), parameters()), min_size=1, max_size=7)
)
def test_every_request_gets_the_same_token(rows: list[tuple[str, int, dict[str, Any]]]) -> None:
    logits = torch.stack([row(kind, seed) for kind, seed, _ in rows])

    def samplers() -> list[Sampler]:
        made = [Sampler(**chosen) for *_, chosen in rows]
        for (_, seed, _), sampler in zip(rows, made, strict=True):
            if sampler.repetition_penalty != 1:
                sampler.seen = torch.arange(VOCAB) % 7 == seed % 7
        return made

    ours, theirs = samplers(), samplers()
    for _ in range(3):
        wanted = expected(logits, theirs)
        assert choose(logits, ours).tokens == wanted
        for sampler, token in zip(theirs, wanted, strict=True):
            if sampler.seen is not None:
                sampler.seen[token] = True
    for one, other in zip(ours, theirs, strict=True):
        assert one.uniform() == other.uniform()


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(KINDS),
    st.integers(0, 10**6),
    st.sampled_from([0, 5, 16, 200]),
    st.sampled_from([0.0, 0.02]),
    st.integers(0, 39),
)
def test_numbers_on_the_edge_fall_on_the_same_side(
    kind: str, seed: int, top_k: int, min_p: float, place: int
) -> None:
    """``top_p`` and the uniform number are what decides between two tokens, or the next number beside it."""
    logits = row(kind, seed)[None]
    free = [Sampler(temperature=1.0, top_k=top_k, min_p=min_p)]
    before, _, _ = ordered(logits, free)
    edge = before[0, place]
    shares = [edge, torch.nextafter(edge, edge + 1), torch.nextafter(edge, edge - 1), torch.tensor(1.0)]
    for top_p in (max(1e-30, share.item()) for share in shares):
        limited: dict[str, Any] = {"temperature": 1.0, "top_k": top_k, "min_p": min_p, "top_p": top_p}
        _, kept, _ = ordered(logits, [Sampler(**limited)])
        cumulative = kept.double().cumsum(dim=-1)[0]
        exact = (cumulative / cumulative[-1]).tolist()
        numbers = [0.0, math.nextafter(1.0, 0.0)]
        for each in {exact[0], exact[place // 2], exact[min(place, CANDIDATES - 1)], exact[CANDIDATES]}:
            numbers += [math.nextafter(each, 0.0), each, math.nextafter(each, 1.0)]
        samplers: list[Sampler] = [Given(u, **limited) for u in numbers if u < 1]
        rows = logits.expand(len(samplers), -1)
        assert choose(rows, samplers).tokens == expected(rows, samplers)


@pytest.mark.parametrize(
    "chosen",
    [{}, {"top_p": 0.9}, {"top_k": 10}, {"min_p": 0.05}, {"top_p": 0.95, "top_k": CANDIDATES}],
    ids=str,
)
def test_most_choices_need_no_more(whole: list[int], chosen: dict[str, Any]) -> None:
    """Else all of this would be for nothing."""
    logits = torch.stack([row("falling", seed) for seed in range(200)])
    choose(logits, [Sampler(temperature=1.0, seed=seed, **chosen) for seed in range(200)])
    # without filters, what lies behind the candidates is drawn as often as its share of the probability says
    behind = float(1 - logits[0].softmax(-1).topk(CANDIDATES).values.sum())
    assert sum(whole) <= (2 * behind * 200 if chosen in ({}, {"top_p": 0.9}) else 2)


def test_rows_that_need_all_tokens_are_worked_on_in_pieces(
    whole: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "_PIECE", 3 * VOCAB)
    logits = torch.stack([row("normal" if index % 2 else "equal", index) for index in range(16)])

    def samplers() -> list[Sampler]:
        return [Sampler(temperature=1.0, top_k=3 if index % 2 else 0, seed=index) for index in range(16)]

    assert choose(logits, samplers()).tokens == expected(logits, samplers())
    assert whole == [3, 3, 2]


def test_a_short_vocabulary_is_put_in_order_at_once(whole: list[int]) -> None:
    logits = row("normal", 1)[None, : 2 * CANDIDATES]
    assert choose(logits, [Sampler(temperature=1.0, seed=3)]).tokens == expected(
        logits, [Sampler(temperature=1.0, seed=3)]
    )
    assert whole == [1]
