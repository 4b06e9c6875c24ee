"""The work list of memory attention: which program reads which rows of which pools and contexts.

Query rows that read the same version of the same pool are packed into one tile, so that the pool is read once
for all of them; so are the rows of one prompt over their context. The key rows of all tiles, laid end to
end, are cut into equal shares, one for each worker, so that no worker waits for another whatever the
lengths. A share that crosses a tile's end, or a tile that crosses a share's end, is cut into segments;
each segment yields a partial result, and the merge joins those of a row.

The list lives in one int32 buffer of a fixed size: a captured CUDA graph reads it anew at each replay.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kernels.checks import BadKernelInput, expect_range

Longs = npt.NDArray[np.int64]


@dataclass(frozen=True)
class PlanShape:
    """The fixed sizes of a work list.

    ``rows`` query rows at most, ``workers`` programs for each K/V head, tiles of ``tile_rows`` rows of
    which a member takes ``group`` (its query heads), key rows in steps of ``step``. ``owners`` bounds the
    different pools that are read, and the different contexts (0: each row may have its own).
    """

    rows: int
    workers: int
    tile_rows: int
    group: int
    step: int
    owners: int = 0

    def __post_init__(self) -> None:
        if min(self.rows, self.workers, self.group, self.step) < 1 or self.owners < 0:
            raise BadKernelInput("rows, workers, group and step must be at least 1")
        if self.tile_rows < max(16, self.group) or self.tile_rows & (self.tile_rows - 1):
            raise BadKernelInput(
                f"tile_rows must be a power of two of at least 16 and the group, found {self.tile_rows}"
            )

    @property
    def width(self) -> int:
        """Members of a tile."""
        return self.tile_rows // self.group

    @property
    def tiles(self) -> int:
        """For pools as many as for contexts: full ones, and for each owner one that is not."""
        return 2 * min(self.rows, self.rows // self.width + (self.owners or self.rows))

    @property
    def segments(self) -> int:
        """Each tile begins a segment, and so does each worker but the first."""
        return self.tiles + self.workers - 1

    @property
    def parts(self) -> dict[str, tuple[int, ...]]:
        return {
            "workers": (self.workers + 1,),
            "segments": (self.segments, 3),
            "tiles": (self.tiles, 3),
            "members": (self.tiles, self.width),
            "rows": (self.rows, 7),
        }


class Plan:
    """A work list: int32 tensors that are views of ``buffer``.

    ``workers`` [workers + 1]: worker w does the segments from its entry to the next. ``segments``: tile,
    first key row, end. ``tiles``: hot, slot, -1 for a pool, or -1, -1, table row for a context. ``members``:
    query rows, -1 for none. ``rows``: for the pool and then the context of a row its first segment, the
    end and its place in the tile; last, how many context rows it sees. Absent rows are empty.
    """

    def __init__(self, shape: PlanShape, buffer: Tensor) -> None:
        self.shape = shape
        self.buffer = buffer
        views, start = {}, 0
        for name, part in shape.parts.items():
            size = int(np.prod(part))
            views[name] = buffer[start : start + size].view(part)
            start += size
        self.workers, self.segments = views["workers"], views["segments"]
        self.tiles, self.members, self.rows = views["tiles"], views["members"], views["rows"]

    @classmethod
    def allocate(cls, shape: PlanShape, device: torch.device | str, *, pinned: bool = False) -> Plan:
        """An empty list. Keep one on the device, and ``pinned`` ones on the host to fill and copy from."""
        size = sum(int(np.prod(part)) for part in shape.parts.values())
        plan = cls(shape, torch.zeros(size, dtype=torch.int32, device=device, pin_memory=pinned))
        plan.members.fill_(-1)
        return plan

    def copy_(self, other: Plan) -> None:
        """Takes over the list ``other`` of the same shape: one copy, asynchronous from pinned memory."""
        if other.shape != self.shape:
            raise BadKernelInput(f"a list of {other.shape} does not fit one of {self.shape}")
        self.buffer.copy_(other.buffer, non_blocking=True)

    def fill(
        self,
        hot: npt.ArrayLike,
        slot: npt.ArrayLike,
        table: npt.ArrayLike,
        limit: npt.ArrayLike,
        *,
        pool_slots: int,
        pools: tuple[int, int],
        tables: tuple[int, int],
    ) -> None:
        """Rewrites this list (on the host) for query rows that read as follows, an integer for each row.

        ``hot`` and ``slot`` name the rotated copy (or rank vector) and the pool, -1 for no pool; ``table``
        its row of the table of context rows, of which it sees the first ``limit``. In range are hot and
        slot below ``pools``, table and limit within ``tables`` (the table's shape). Rows of a prompt share a
        table, with rising limits. Raises ``BadKernelInput``.
        """
        if self.buffer.device.type != "cpu":
            raise BadKernelInput("a work list is filled on the host and copied to the device")
        given = [np.asarray(a, dtype=np.int64) for a in (hot, slot, table, limit)]
        count = len(given[0])
        if any(a.shape != (count,) for a in given) or count > self.shape.rows:
            raise BadKernelInput(
                f"hot, slot, table and limit must be as long as each other and at most {self.shape.rows}"
            )
        if count:
            spans = ((pools[0], "hot"), (pools[1], "slot"), (tables[0], "table"), (tables[1] + 1, "limit"))
            for least, (end, name), a in zip((-1, -1, 0, 0), spans, given, strict=True):
                expect_range(name, int(a.min()), int(a.max()), least, end - 1)
        hots, slots, owners, limits = given
        if ((hots < 0) != (slots < 0)).any():
            raise BadKernelInput("a row names both a hot copy and a slot, or neither")
        if ((hots < 0) & (limits == 0)).any():
            raise BadKernelInput("a row sees neither a pool nor a context")
        self.buffer.zero_()
        tiles, members = self.tiles.numpy(), self.members.numpy()
        rows = self.rows.numpy()
        members.fill(-1)
        lengths = np.zeros(self.shape.tiles, dtype=np.int64)
        pooled = self._pack(0, (hots, slots), np.flatnonzero(hots >= 0).astype(np.int64), 0)
        lengths[:pooled] = pool_slots
        tiles[:pooled, 0] = hots[members[:pooled, 0]]
        tiles[:pooled, 1] = slots[members[:pooled, 0]]
        tiles[:pooled, 2] = -1
        end = self._pack(pooled, (owners,), np.flatnonzero(limits > 0).astype(np.int64), 3)
        own = members[pooled:end]
        lengths[pooled:end] = np.where(own >= 0, limits[own], 0).max(axis=1, initial=0)
        tiles[pooled:end, :2] = -1
        tiles[pooled:end, 2] = owners[own[:, 0]]
        rows[:count, 6] = limits
        self._cut(lengths[:end], pooled)

    def _pack(self, first: int, keys: tuple[Longs, ...], chosen: Longs, column: int) -> int:
        """Packs the ``chosen`` rows, those of equal ``keys`` together, into tiles from ``first``; returns the end.

        Notes each row's tile and place in its ``column``; ``_cut`` puts segments in the tile's stead.
        """
        if not len(chosen):
            return first
        order = chosen[np.lexsort([k[chosen] for k in keys])]
        changed = np.zeros(len(order), dtype=bool)
        for key in keys:
            changed[1:] |= np.diff(key[order]) != 0
        index = np.arange(len(order))
        within = index - np.maximum.accumulate(np.where(changed, index, 0))
        place = within % self.shape.width
        tile = first - 1 + np.cumsum(place == 0)
        if tile[-1] >= self.shape.tiles:
            raise BadKernelInput(f"the rows read from more than {self.shape.owners} pools or contexts")
        self.members.numpy()[tile, place] = order
        rows = self.rows.numpy()
        rows[order, column], rows[order, column + 1], rows[order, column + 2] = tile, tile + 1, place
        return int(tile[-1]) + 1

    def _cut(self, lengths: Longs, pooled: int) -> None:
        """Cuts tiles of ``lengths`` key rows into segments of equal shares."""
        workers, step = self.shape.workers, self.shape.step
        ends = np.cumsum(-(-lengths // step))
        starts = ends - (-(-lengths // step))
        total = int(ends[-1]) if len(ends) else 0
        shares = np.arange(workers + 1) * total // workers
        bounds = np.unique(np.concatenate([starts, shares]))
        first = bounds[bounds < total]
        last = np.append(first[1:], total)[: len(first)]
        tile = np.searchsorted(ends, first, side="right")
        segments = self.segments.numpy()
        segments[: len(first), 0] = tile
        segments[: len(first), 1] = (first - starts[tile]) * step
        segments[: len(first), 2] = np.minimum((last - starts[tile]) * step, lengths[tile])
        self.workers.numpy()[:] = np.searchsorted(first, shares)
        # a tile's segments lie side by side
        low = np.searchsorted(tile, np.arange(len(lengths)))
        high = np.searchsorted(tile, np.arange(len(lengths)), side="right")
        rows = self.rows.numpy()
        for column in (0, 3):
            held = np.flatnonzero(rows[:, column + 1])
            at = rows[held, column]
            rows[held, column], rows[held, column + 1] = low[at], high[at]
