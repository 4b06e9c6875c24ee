"""Cache rows for prompts and completions: pages of neighbouring rows, lowest free page first."""

from __future__ import annotations

import heapq

import torch
from torch import Tensor

PAGE = 16


class Rows:
    """Hands out rows 1 … of a context cache (row 0 is the bos, shared by all)."""

    def __init__(self, rows: int) -> None:
        self.pages = (rows - 1) // PAGE
        self._free = list(range(self.pages))

    @staticmethod
    def rounded(tokens: int) -> int:
        """Rows that ``tokens`` take, whole pages."""
        return -(-tokens // PAGE) * PAGE

    @property
    def capacity(self) -> int:
        return self.pages * PAGE

    def take(self, tokens: int) -> tuple[list[int], Tensor]:
        """Pages for ``tokens`` rows, and the rows themselves, int64. The scheduler has seen that they are free."""
        pages = [heapq.heappop(self._free) for _ in range(-(-tokens // PAGE))]
        rows = (torch.tensor(pages)[:, None] * PAGE + torch.arange(1, PAGE + 1)[None]).view(-1)
        return pages, rows

    def give(self, pages: list[int]) -> None:
        for page in pages:
            heapq.heappush(self._free, page)
