"""Choosing tokens from logits, for all rows of a step at once.

A sequence's choices depend on its own logits, parameters and random numbers only, never on its neighbours
in the batch: each row brings its own uniform number and the token is read off the inverse distribution.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import torch
from torch import Tensor

# What people ask for may be a number that float32 does not have: whatever a request says, its row stays finite, since
# what goes wrong with one row would end the step, and with it the worker, for everybody.
_LEAST_TEMPERATURE = 1e-6
_MOST_LOGIT = 1e30
_PIECE = 2**22
"""Logits that are worked on at once. On the way from one to a choice there are about a dozen numbers for each."""


@dataclass(eq=False)
class Sampler:
    """How one sequence chooses. ``temperature`` 0 is greedy; ``top_k`` 0 and ``top_p`` 1 are off.

    ``seen`` bool [vocab], given if ``repetition_penalty`` is not 1: tokens of prompt and completion so far.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    logprobs: int | None = None
    seen: Tensor | None = None

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    @property
    def plain(self) -> bool:
        """Greedy and nothing else: the argmax will do."""
        return self.temperature == 0 and self.repetition_penalty == 1 and self.logprobs is None

    def uniform(self) -> float:
        return self._random.random()


Likelihood = tuple[float, list[tuple[int, float]]]
"""A chosen token's natural-log probability, and the likeliest tokens (id, logprob), best first."""


@dataclass(frozen=True)
class Chosen:
    """A step's ``tokens``, one a row, and the likelihoods of those rows that asked for them."""

    tokens: list[int]
    likelihoods: dict[int, Likelihood] = field(default_factory=dict)


def penalise(logits: Tensor, samplers: list[Sampler]) -> Tensor:
    """Repetition penalty as the field does it: seen tokens' positive logits divided, negative multiplied."""
    rows = [i for i, s in enumerate(samplers) if s.repetition_penalty != 1 and s.seen is not None]
    if not rows:
        return logits
    logits = logits.clone()
    for row in rows:
        seen, penalty = samplers[row].seen, samplers[row].repetition_penalty
        picked = logits[row, seen]
        logits[row, seen] = torch.where(picked > 0, picked / penalty, picked * penalty)
    return finite(logits)


def finite(logits: Tensor) -> Tensor:
    """The same, with what is no number at the very end of the order, and what is infinite within bounds."""
    return logits.nan_to_num(nan=-_MOST_LOGIT).clamp(-_MOST_LOGIT, _MOST_LOGIT)


def filtered_distribution(logits: Tensor, samplers: list[Sampler]) -> tuple[Tensor, Tensor]:
    """Sorted probabilities [rows, vocab] after temperature, top_k, top_p and min_p, and the tokens' ids.

    The filters follow the field's usual order (temperature first, then top_k, top_p, min_p); the likeliest
    token always stays. Rows are not renormalised.
    """

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=logits.device)[:, None]

    logits = finite(logits)
    logits = logits - logits.amax(dim=-1, keepdim=True)
    scaled = logits / column([max(s.temperature, _LEAST_TEMPERATURE) for s in samplers])
    ordered, ids = scaled.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    place = torch.arange(ordered.shape[1], device=logits.device)[None]
    drop = place >= column([s.top_k or ordered.shape[1] for s in samplers])
    kept_by_k = ordered.masked_fill(drop, 0.0)
    share = kept_by_k.cumsum(dim=-1) / kept_by_k.sum(dim=-1, keepdim=True)
    before = share - kept_by_k / kept_by_k.sum(dim=-1, keepdim=True)
    drop = drop | (before >= column([s.top_p for s in samplers]))
    drop = drop | (ordered < column([s.min_p for s in samplers]) * ordered[:, :1])
    drop[:, 0] = False
    return ordered.masked_fill(drop, 0.0), ids


def choose(logits: Tensor, samplers: list[Sampler]) -> Chosen:
    """One token a row of ``logits`` [rows, vocab]. Logprobs are of the model's own distribution."""
    if all(s.plain for s in samplers):
        return Chosen(logits.argmax(dim=-1).tolist())
    rows = max(1, _PIECE // logits.shape[1])
    pieces = [slice(start, start + rows) for start in range(0, len(samplers), rows)]
    chosen: list[int] = torch.cat([_choose(logits[some], samplers[some]) for some in pieces]).tolist()
    for sampler, token in zip(samplers, chosen, strict=True):
        if sampler.seen is not None:
            sampler.seen[token] = True
    return Chosen(chosen, _likelihoods(logits, chosen, samplers, rows))


def _choose(logits: Tensor, samplers: list[Sampler]) -> Tensor:
    """int64 [rows]: the tokens."""
    adjusted = penalise(logits.float(), samplers)
    tokens = adjusted.argmax(dim=-1)
    sampled = [i for i, s in enumerate(samplers) if s.temperature > 0]
    if sampled:
        those = [samplers[i] for i in sampled]
        probabilities, ids = filtered_distribution(adjusted[sampled], those)
        cumulative = probabilities.double().cumsum(dim=-1)
        uniform = torch.tensor([s.uniform() for s in those], dtype=torch.float64, device=logits.device)
        threshold = uniform[:, None] * cumulative[:, -1:]
        place = torch.searchsorted(cumulative, threshold, right=True)
        last = (probabilities > 0).sum(dim=-1, keepdim=True) - 1
        tokens[sampled] = ids.gather(1, torch.minimum(place, last))[:, 0]
    return tokens


def _likelihoods(
    logits: Tensor, tokens: list[int], samplers: list[Sampler], at_once: int
) -> dict[int, Likelihood]:
    """By row, of those who want them; ``at_once`` rows are worked on together."""
    wanted = [i for i, s in enumerate(samplers) if s.logprobs is not None]
    most = max((samplers[i].logprobs or 0 for i in wanted), default=0)
    found: dict[int, Likelihood] = {}
    for start in range(0, len(wanted), at_once):
        some = wanted[start : start + at_once]
        logprobs = logits[some].float().log_softmax(dim=-1)
        values, ids = logprobs.topk(most, dim=-1)
        for row, index in enumerate(some):
            count = samplers[index].logprobs or 0
            top = list(zip(ids[row, :count].tolist(), values[row, :count].tolist(), strict=True))
            found[index] = logprobs[row, tokens[index]].item(), top
    return found
