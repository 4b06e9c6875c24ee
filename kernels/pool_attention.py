"""Attention of many tenants' query rows to their own pools on a CPU, whose keys lie by channel.

One query row against keys that lie one behind the other is a row of dot products, which BLAS libraries stream at half
of the memory's bandwidth. With the channel first it is a sum of scaled rows, as the product with the values is anyway.
Every pool is read where it lies, whatever lies beside it; what is done to scores is done to all pools' at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

_LOG2_E = math.log2(math.e)


class PoolAttention:
    """Softmax attention of ``rows`` query rows a K/V head to each of some pools of ``slots``, for layer after layer.

    Pools are few and layers many: what can be made once, is. ``scratch`` has ``scratch_elements``; those who take turns
    may share it.
    """

    def __init__(self, rows: list[int], heads: int, head_dim: int, slots: int, scratch: Tensor) -> None:
        sizes = [heads * count for count in rows]
        total = sum(sizes)
        self._scale = head_dim**-0.5 * _LOG2_E
        used = scratch[: total * (slots + 2 * head_dim)]
        scores, query, output = used.split_with_sizes([total * slots, total * head_dim, total * head_dim])
        self._scores = scores.view(total, slots)
        self._query, self._output = query.view(total, head_dim), output.view(total, head_dim)

        def by_head(lines: Tensor) -> list[Tensor]:
            own = zip(lines.split_with_sizes(sizes), rows, strict=True)
            return [each.view(heads, count, lines.shape[1]) for each, count in own]

        self._products = list(
            zip(by_head(self._query), by_head(self._scores), by_head(self._output), strict=True)
        )

    @staticmethod
    def scratch_elements(rows: int, heads: int, head_dim: int, slots: int) -> int:
        """For ``rows`` query rows a head, of all pools together."""
        return rows * heads * (slots + 2 * head_dim)

    def __call__(
        self, query: Tensor, keys: Iterable[Tensor], values: Iterable[Tensor], bias: Tensor
    ) -> tuple[Tensor, Tensor]:
        """``query`` [R, d_head] has each pool's rows, heads first; each of ``keys`` is [H_kv, d_head, S], of ``values``
        [H_kv, S, d_head]; ``bias`` [R, S] is added to the scores (-inf hides a slot; no row may be hidden whole).

        Returns the output [R, d_head], which lies in the scratch, and the log-sum-exp [R].
        """
        # in units of log 2: torch's exp2 on a CPU takes a third of its exp's time
        torch.mul(query, self._scale, out=self._query)
        scores = self._scores
        for (own, into, _), key in zip(self._products, keys, strict=True):
            torch.bmm(own, key, out=into)
        scores.add_(bias)
        highest = scores.amax(dim=-1, keepdim=True)
        scores.sub_(highest).exp2_()
        total = scores.sum(dim=-1, keepdim=True)
        for (_, own, into), value in zip(self._products, values, strict=True):
            torch.bmm(own, value, out=into)
        return self._output.div_(total), highest.add_(total.log2()).div_(_LOG2_E)[:, 0]
