"""The work list of memory attention: which program reads which rows of which pools and contexts.

Query rows that read the same version of the same pool are packed into one tile, so that the pool is read once
for all of them; so are the rows of one prompt over their context. The work is dealt out in equal shares, one for each
worker, so that no worker waits for another whatever the lengths: short contexts as they are, a few to each, and the key
rows of all other tiles, laid end to end, cut where a share is full. A share that crosses a tile's end, or a tile that
crosses a share's end, is cut into segments; each segment yields a partial result, and the merge joins those of a row.

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

BEGINNING = 64
"""Key rows in whose time a program begins a segment: it waits for the list, then for rows and keys, one after another.
An estimate; no GPU has been asked."""
_GRAIN = 16
_RECORD = 7


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
            "segments": (self.segments, _RECORD),
            "members": (self.tiles, self.width),
            "rows": (self.rows, 7),
        }


class Plan:
    """A work list: int32 tensors that are views of ``buffer``.

    ``workers`` [workers + 1]: worker w does the segments from its entry to the next. ``segments``: tile,
    first key row, end, the place of its result, and what the tile reads, so that a program need not look that up:
    hot, slot, -1 for a pool, or -1, -1, table row for a context. ``members`` of each tile: query rows, -1 for none.
    ``rows``: for the pool and then the context of a row the place of its first result, the end of those and its
    place in the tile; last, how many context rows it sees. Absent rows are empty.
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
        self.members, self.rows = views["members"], views["rows"]
        # on the host, where it is filled
        self._arrays = {name: view.numpy() for name, view in views.items() if buffer.device.type == "cpu"}

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
            all_of_them = np.concatenate(given).reshape(len(given), count)
            low, high = all_of_them.min(axis=1).tolist(), all_of_them.max(axis=1).tolist()
            for least, (end, name), lowest, highest in zip((-1, -1, 0, 0), spans, low, high, strict=True):
                expect_range(name, lowest, highest, least, end - 1)
        hots, slots, owners, limits = given
        if ((hots < 0) != (slots < 0)).any():
            raise BadKernelInput("a row names both a hot copy and a slot, or neither")
        if ((hots < 0) & (limits == 0)).any():
            raise BadKernelInput("a row sees neither a pool nor a context")
        self.buffer.zero_()
        members, rows = self._arrays["members"], self._arrays["rows"]
        reads = np.full((self.shape.tiles, 3), -1, dtype=np.int64)
        members.fill(-1)
        lengths = np.zeros(self.shape.tiles, dtype=np.int64)
        pooled = self._pack(0, (hots, slots), np.flatnonzero(hots >= 0).astype(np.int64, copy=False), 0)
        lengths[:pooled] = pool_slots
        reads[:pooled, 0] = hots[members[:pooled, 0]]
        reads[:pooled, 1] = slots[members[:pooled, 0]]
        end = self._pack(pooled, (owners,), np.flatnonzero(limits > 0).astype(np.int64, copy=False), 3)
        own = members[pooled:end]
        lengths[pooled:end] = np.where(own >= 0, limits[own], 0).max(axis=1, initial=0)
        reads[pooled:end, 2] = owners[own[:, 0]]
        rows[:count, 6] = limits
        self._cut(lengths[:end], pooled, reads)

    def _pack(self, first: int, keys: tuple[Longs, ...], chosen: Longs, column: int) -> int:
        """Packs the ``chosen`` rows, those of equal ``keys`` together, into tiles from ``first``; returns the end.

        Notes each row's tile, counted from 1, and place in its ``column`` + 1 and + 2; ``_cut`` puts results in the
        tile's stead.
        """
        if not len(chosen):
            return first
        order = chosen[np.lexsort([k[chosen] for k in keys])]
        changed = np.zeros(len(order), dtype=bool)
        for key in keys:
            own = key[order]
            changed[1:] |= own[1:] != own[:-1]
        index = np.arange(len(order))
        within = index - np.maximum.accumulate(np.where(changed, index, 0))
        place = within % self.shape.width
        tile = first - 1 + np.cumsum(place == 0)
        if tile[-1] >= self.shape.tiles:
            raise BadKernelInput(f"the rows read from more than {self.shape.owners} pools or contexts")
        self._arrays["members"][tile, place] = order
        rows = self._arrays["rows"]
        rows[order, column + 1], rows[order, column + 2] = tile + 1, place
        return int(tile[-1]) + 1

    def _cut(self, lengths: Longs, pooled: int, reads: Longs) -> None:
        """Cuts tiles of ``lengths`` key rows, of which those from ``pooled`` on are contexts, into segments.

        ``reads`` are what a segment notes of its tile. In units of key rows, with ``BEGINNING`` for each tile, all
        workers get as much. A context that is short beside a worker's part is one segment: those are dealt out over all
        workers. What they leave of each one's part is filled with the rows of the other tiles, laid end to end.
        """
        workers = self.shape.workers
        costs = lengths + BEGINNING
        part = float(costs.sum()) / workers
        is_short = costs <= part / 2
        is_short[:pooled] = False
        long, short = np.flatnonzero(~is_short), np.flatnonzero(is_short)
        dealt = np.cumsum(costs[short])
        worker = ((dealt - costs[short] / 2) * (workers / dealt[-1:])).astype(np.int64)
        whole = lengths[long]
        ends = np.cumsum(whole)
        starts = ends - whole
        room = np.maximum(part - np.bincount(worker, costs[short], workers), 0.0)
        cuts = self._cuts(starts, whole, room)
        first = np.concatenate([starts, cuts[:-1]])
        first.sort()
        fresh = first < cuts[-1]
        fresh[1:] &= first[1:] > first[:-1]
        first = first[fresh]
        line = len(first)
        tile = np.searchsorted(ends, first, side="right")
        found = np.empty((line + len(short), _RECORD), dtype=np.int64)
        found[:line, 0], found[line:, 0] = long[tile], short
        found[:line, 1], found[line:, 1] = first - starts[tile], 0
        found[:line, 2] = np.concatenate([first[1:], cuts[-1:]])[:line] - starts[tile]
        found[line:, 2] = lengths[short]
        # a tile's results lie side by side, whichever workers leave them
        found[:, 3] = np.arange(len(found))
        found[:, 4:] = reads[found[:, 0]]
        owner = np.concatenate([np.searchsorted(cuts[1:], first, side="right"), worker])
        order = owner.argsort(kind="stable")
        self._arrays["segments"][: len(found)] = found[order]
        self._arrays["workers"][:] = owner[order].searchsorted(np.arange(workers + 1))
        # first of no tile, which is what absent rows name
        low, high = np.zeros((2, len(lengths) + 1), dtype=np.int64)
        long, short = long + 1, short + 1
        low[long] = first.searchsorted(starts)
        high[long[:-1]] = low[long[1:]]
        high[long[-1:]] = line
        low[short] = np.arange(line, len(found))
        high[short] = low[short] + 1
        rows = self._arrays["rows"]
        at = rows[:, 1:5:3].astype(np.int64)
        rows[:, 0:4:3] = low[at]
        rows[:, 1:5:3] = high[at]

    def _cuts(self, starts: Longs, lengths: Longs, room: npt.NDArray[np.float64]) -> Longs:
        """Where, of tiles of ``lengths`` rows laid end to end, each worker's rows begin, and where the last one's end.

        Each gets its ``room``'s share, to a grain that may be less than the kernel's step: it is bytes that take time.
        """
        cuts = np.zeros(len(room) + 1, dtype=np.int64)
        if len(lengths):
            ends = np.cumsum(lengths + BEGINNING)
            # were all room taken by short contexts there would be no other tiles
            bounds = np.cumsum(room)
            bounds *= ends[-1] / bounds[-1]
            tile = np.minimum(ends.searchsorted(bounds, side="right"), len(ends) - 1)
            grain = min(self.shape.step, _GRAIN)
            into = ((bounds - (ends - lengths)[tile]) / grain + 0.5).astype(np.int64) * grain
            cuts[1:] = starts[tile] + np.minimum(np.maximum(into, 0), lengths[tile])
            cuts[-1] = starts[-1] + lengths[-1]
        return cuts
