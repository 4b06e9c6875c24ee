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

_CANDIDATES = 1024
"""Of a row's tokens so many are put in order, the likeliest; all of them only where those do not settle the choice."""
# Bounds of what rounding does to shares of the probability in float32, over the longest vocabularies and however a
# device adds up; and to sums in float64, relative to the whole.
_SHARE_ERROR = 2.0**-16
_SUM_ERROR = 1e-10


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
    asked = [
        (row, s.seen, s.repetition_penalty)
        for row, s in enumerate(samplers)
        if s.repetition_penalty != 1 and s.seen is not None
    ]
    if not asked:
        return logits
    logits = logits.clone()
    for row, seen, penalty in asked:
        own = logits[row]
        # not by the seen ones' indices, whose number a GPU would be asked for
        own.copy_(torch.where(seen, torch.where(own > 0, own / penalty, own * penalty), own))
    return finite(logits)


def finite(logits: Tensor) -> Tensor:
    """The same, with what is no number at the very end of the order, and what is infinite within bounds."""
    return logits.nan_to_num(nan=-_MOST_LOGIT).clamp_(-_MOST_LOGIT, _MOST_LOGIT)


@dataclass(frozen=True)
class _Parameters:
    """Of rows that are sampled, each [rows, 1] on the device: float32 but for ``uniform``, which is float64."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    uniform: Tensor

    @classmethod
    def of(
        cls, samplers: list[Sampler], uniform: list[float], vocab: int, device: torch.device
    ) -> _Parameters:
        """In one copy, which the device takes when it comes to it: nothing here waits for what it is at."""
        columns = [
            [max(s.temperature, _LEAST_TEMPERATURE) for s in samplers],
            [min(s.top_k or vocab, vocab) for s in samplers],
            [s.top_p for s in samplers],
            [s.min_p for s in samplers],
            uniform,
        ]
        host = torch.tensor(columns, dtype=torch.float64, pin_memory=device.type == "cuda")
        there = host.to(device, non_blocking=True)[:, :, None]
        temperature, top_k, top_p, min_p = there[:-1].float().unbind()
        return cls(temperature, top_k, top_p, min_p, there[-1])


def _probabilities(logits: Tensor, of: _Parameters) -> Tensor:
    """[rows, vocab], float32, at the rows' temperatures."""
    logits = finite(logits)
    return (logits.sub_(logits.amax(dim=-1, keepdim=True)) / of.temperature).softmax(dim=-1)


def filtered_distribution(
    logits: Tensor, samplers: list[Sampler], of: _Parameters | None = None
) -> tuple[Tensor, Tensor]:
    """Sorted probabilities [rows, vocab] after temperature, top_k, top_p and min_p, and the tokens' ids.

    The filters follow the field's usual order (temperature first, then top_k, top_p, min_p); the likeliest
    token always stays. Rows are not renormalised.
    """
    of = of or _Parameters.of(samplers, [0.0] * len(samplers), logits.shape[1], logits.device)
    ordered, ids = _probabilities(logits, of).sort(dim=-1, descending=True, stable=True)
    place = torch.arange(ordered.shape[1], device=logits.device)[None]
    drop = place >= of.top_k
    kept_by_k = ordered.masked_fill(drop, 0.0)
    share = kept_by_k.cumsum(dim=-1) / kept_by_k.sum(dim=-1, keepdim=True)
    before = share - kept_by_k / kept_by_k.sum(dim=-1, keepdim=True)
    drop = drop | (before >= of.top_p)
    drop = drop | (ordered < of.min_p * ordered[:, :1])
    drop[:, 0] = False
    return ordered.masked_fill(drop, 0.0), ids


def _drawn(logits: Tensor, samplers: list[Sampler], uniform: list[float]) -> Tensor:
    """int64 [rows]: of each row the token at which its distribution's sum passes its share ``uniform`` of the whole."""
    of = _Parameters.of(samplers, uniform, logits.shape[1], logits.device)
    probabilities, ids = filtered_distribution(logits, samplers, of)
    cumulative = probabilities.double().cumsum(dim=-1)
    place = torch.searchsorted(cumulative, of.uniform * cumulative[:, -1:], right=True)
    last = (probabilities > 0).sum(dim=-1, keepdim=True) - 1
    return ids.gather(1, torch.minimum(place, last))[:, 0]


def _likely_drawn(logits: Tensor, samplers: list[Sampler], uniform: list[float]) -> Tensor:
    """As ``_drawn``, from a row's likeliest tokens alone; -1 where these do not settle it.

    The filters are the same. Where rounding could turn a comparison either way, or what counts lies beyond the
    candidates, there are bounds of the sum that is kept, and the token has to be the same at both.
    """
    vocab, count = logits.shape[1], _CANDIDATES
    of = _Parameters.of(samplers, uniform, vocab, logits.device)
    probabilities = _probabilities(logits, of)
    values, ids = probabilities.topk(count, dim=-1, sorted=False)
    values, ids = _in_order(values, ids, vocab)
    wide = values.double()
    cumulative = wide.cumsum(dim=-1)
    whole = probabilities.sum(dim=-1, keepdim=True, dtype=torch.float64)
    top_k, top_p = of.top_k.long(), of.top_p.double()
    by_k = top_k <= count
    kept_by_k = torch.where(by_k, cumulative.gather(1, top_k.clamp(1, count) - 1), whole)
    before = (cumulative - wide) / kept_by_k
    place = torch.arange(count, device=logits.device)[None]
    kept = (place < top_k) & (values >= of.min_p * values[:, :1])
    kept[:, 0] = True
    surely, maybe = (
        # the likeliest always stays
        (kept & ((before < top_p + error) | (place == 0))).sum(dim=-1, keepdim=True)
        for error in (-_SHARE_ERROR, _SHARE_ERROR)
    )
    least, most = (cumulative.gather(1, number - 1) for number in (surely, maybe))
    # what is kept beyond the candidates: with top_p alone about so much, with min_p nobody knows
    beyond = ~by_k & (maybe == count)
    most = torch.where(beyond, torch.minimum(whole, (top_p + _SHARE_ERROR) * whole + values[:, -1:]), most)
    known = beyond & (surely == count) & (of.min_p == 0)
    at_least = (top_p.clamp(max=1.0) - _SHARE_ERROR) * whole
    least = torch.where(known, torch.maximum(least, at_least), least)
    low = torch.searchsorted(cumulative, of.uniform * least * (1 - _SUM_ERROR), right=True)
    high = torch.searchsorted(cumulative, of.uniform * most * (1 + _SUM_ERROR), right=True)
    # those as likely as the last candidate have others beside them that are none
    certain = (values > values[:, -1:]).sum(dim=-1, keepdim=True)
    settled = (low == high) & (high < certain) & (by_k | (top_k >= vocab))
    return torch.where(settled, ids.gather(1, high.clamp(max=count - 1)), -1)[:, 0]


def _in_order(values: Tensor, ids: Tensor, vocab: int) -> tuple[Tensor, Tensor]:
    """Probabilities [rows, n] and their tokens, the likeliest first, of equals the one that comes first."""
    # bits of floats that are not negative are in the floats' order
    key = (values.view(torch.int32).long() << 32) | (vocab - 1 - ids)
    key = key.sort(dim=-1, descending=True).values
    return (key >> 32).int().view(torch.float32), vocab - 1 - (key & (2**32 - 1))


def choose(logits: Tensor, samplers: list[Sampler]) -> Chosen:
    """One token a row of ``logits`` [rows, vocab]. Logprobs are of the model's own distribution."""
    if all(s.plain for s in samplers):
        return Chosen(logits.argmax(dim=-1).tolist())
    rows = max(1, _PIECE // logits.shape[1])
    uniform = [s.uniform() if s.temperature > 0 else 0.0 for s in samplers]
    # all that the device has to do for the choices is asked of it before one is waited for
    likely = logits.shape[1] > 2 * _CANDIDATES
    pieces = [slice(start, start + rows) for start in range(0, len(samplers), rows)]
    found = [_choose(logits[some], samplers[some], uniform[some], likely=likely) for some in pieces]
    chosen: list[int] = torch.cat(found).tolist()
    unsettled = [i for i, token in enumerate(chosen) if token < 0]
    for start in range(0, len(unsettled), rows):
        some = unsettled[start : start + rows]
        those = [samplers[i] for i in some]
        tokens = _choose(logits[some], those, [uniform[i] for i in some], likely=False).tolist()
        for index, token in zip(some, tokens, strict=True):
            chosen[index] = token
    for sampler, token in zip(samplers, chosen, strict=True):
        if sampler.seen is not None:
            sampler.seen[token] = True
    return Chosen(chosen, _likelihoods(logits, chosen, samplers, rows))


def _choose(logits: Tensor, samplers: list[Sampler], uniform: list[float], *, likely: bool) -> Tensor:
    """int64 [rows]: the tokens; ``likely``: -1 for one that the likeliest do not settle."""
    adjusted = penalise(logits.float(), samplers)
    draw = _likely_drawn if likely else _drawn
    sampled = [i for i, s in enumerate(samplers) if s.temperature > 0]
    if len(sampled) == len(samplers):
        return draw(adjusted, samplers, uniform)
    tokens = adjusted.argmax(dim=-1)
    if sampled:
        rows = torch.tensor(sampled, pin_memory=logits.is_cuda).to(logits.device, non_blocking=True)
        drawn = draw(adjusted[rows], [samplers[i] for i in sampled], [uniform[i] for i in sampled])
        tokens.index_copy_(0, rows, drawn)
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
        chosen = torch.tensor([[tokens[i]] for i in some], device=logits.device)
        # doubles hold all of it as it is, so that one transfer brings it
        told = torch.cat([part.double() for part in (logprobs.gather(1, chosen), values, ids)], dim=1)
        for index, (own, *rest) in zip(some, told.tolist(), strict=True):
            count = samplers[index].logprobs or 0
            found[index] = own, list(zip(map(int, rest[most : most + count]), rest[:count], strict=True))
    return found
