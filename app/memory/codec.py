"""What is inside the store's blobs: safetensors bytes of blocks and snapshots, and how to replay them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from app.errors import FingerprintMismatch
from app.model.forgetting import survivors

DTYPES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int32: "I32",
    torch.uint8: "U8",
}


_OF_NAME = {name: dtype for dtype, name in DTYPES.items()}
# bytes moved at a time: what stays in a processor's cache
_MOVED = 1 << 18


class Entry(msgspec.Struct, forbid_unknown_fields=True):
    """One tensor in a safetensors header. ``data_offsets`` count from the header's end."""

    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


@dataclass(frozen=True)
class Block:
    """A self-update's result: ``hidden`` [L, K, d] and the ranks it made the pool forget, int64 [L or 1, K].

    ``forgotten`` is None for the block that filled a memory which was not initialised.
    """

    hidden: Tensor
    forgotten: Tensor | None


@dataclass(frozen=True)
class Pool:
    """A whole memory in rank order: ``hidden`` [L, N, d].

    ``born`` int32 [L or 1, N] is the version that wrote each token (0: the checkpoint's own pool).
    """

    hidden: Tensor
    born: Tensor


def encode_block(block: Block) -> bytes:
    tensors = {"block": block.hidden.detach().cpu().contiguous()}
    if block.forgotten is not None:
        tensors["forgotten"] = block.forgotten.to(torch.int32)
    return _encoded(tensors)


def decode_block(blob: bytes | memoryview) -> Block:
    tensors = _tensors(blob)
    forgotten = tensors.get("forgotten")
    return Block(tensors["block"], None if forgotten is None else forgotten.long())


def encode_snapshot(pool: Pool) -> bytes:
    return _encoded({"memory": pool.hidden.detach().cpu().contiguous(), "born": pool.born.contiguous()})


def _encoded(tensors: dict[str, Tensor]) -> bytes:
    """As safetensors' own ``save``, which copies them twice on the way and takes three times as long for a block."""
    return b"".join([safetensors_header(tensors), *(raw(tensor) for tensor in tensors.values())])


def safetensors_header(tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """What a safetensors file of these tensors, one behind the other, begins with."""
    told: dict[str, object] = {} if metadata is None else {"__metadata__": metadata}
    end = 0
    for name, tensor in tensors.items():
        offsets = [end, end + tensor.nbytes]
        told[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        end += tensor.nbytes
    encoded = msgspec.json.encode(told)
    # readers map the tensors that follow: they want them aligned
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded


def raw(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the host."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def decode_snapshot(blob: bytes | memoryview) -> Pool:
    """The pool lies in the memory of ``blob`` where that can be written to."""
    tensors = _tensors(blob)
    return Pool(tensors["memory"], tensors["born"])


def _tensors(blob: bytes | memoryview) -> dict[str, Tensor]:
    """The tensors of a safetensors file, in its own memory: its own ``load`` copies them. Raises ValueError."""
    view = memoryview(blob)
    if view.readonly:
        view = memoryview(bytearray(view))
    begin = 8 + int.from_bytes(view[:8], "little")
    told = msgspec.json.decode(view[8:begin], type=dict[str, Entry])
    return {name: _tensor(view[begin:], entry) for name, entry in told.items()}


def _tensor(data: memoryview, entry: Entry) -> Tensor:
    begin, end = entry.data_offsets
    dtype = _OF_NAME[entry.dtype]
    if math.prod(entry.shape) * dtype.itemsize != end - begin or not 0 <= begin <= end <= len(data):
        raise ValueError("a tensor's bytes are not where its header says")
    if begin == end:
        return torch.empty(entry.shape, dtype=dtype)
    return torch.frombuffer(data[begin:end], dtype=dtype).reshape(entry.shape)


def replay(base: Pool, blocks: Iterable[tuple[int, Block]], *, reuse: bool = False) -> Pool:
    """The pool after ``blocks``, (version, block) pairs in order; ``base`` itself if there are none.

    ``reuse``: the base's memory may become the new pool's.

    Only surviving vectors are copied: first the draws are followed on indices, then each block's are gathered. Raises
    FingerprintMismatch if a block has another shape than the base.
    """
    layers, size, width = base.hidden.shape
    source = torch.zeros(base.born.shape[0], size, dtype=torch.int64)
    row = torch.arange(size).expand(base.born.shape[0], size)
    born = base.born
    hidden = [base.hidden]
    for version, block in blocks:
        count = block.hidden.shape[1]
        if block.hidden.shape != (layers, count, width) or (block.forgotten is not None and count >= size):
            raise FingerprintMismatch("a stored block has another shape than this model's memory")
        hidden.append(block.hidden)
        added = torch.arange(count)
        if block.forgotten is None:
            row = added.repeat(size // count).expand(born.shape[0], size)
            source = torch.full_like(source, len(hidden) - 1)
            born = torch.full_like(born, version)
            continue
        keep = survivors(block.forgotten, size)
        rows = keep.shape[0]
        if rows > born.shape[0]:
            source, row, born = (t.expand(rows, size) for t in (source, row, born))
        keep = keep.expand(born.shape[0], -1)
        shape = (born.shape[0], count)
        source = torch.cat([source.gather(1, keep), torch.full(shape, len(hidden) - 1)], dim=1)
        row = torch.cat([row.gather(1, keep), added.expand(shape)], dim=1)
        born = torch.cat([born.gather(1, keep), torch.full(shape, version, dtype=born.dtype)], dim=1)
    if len(hidden) == 1:
        return base
    pool = base.hidden if reuse else torch.empty_like(base.hidden)
    # ranks are in order of age, so what is left of each block lies together
    counts = [torch.bincount(each, minlength=len(hidden)).tolist() for each in source]
    for layer in range(layers):
        at, begin = min(layer, source.shape[0] - 1), 0
        for vectors, count in zip(hidden, counts[at], strict=True):
            if count:
                part = slice(begin, begin + count)
                if vectors is pool:
                    _move(pool[layer], row[at, part])
                else:
                    _gather(vectors[layer], row[at, part], pool[layer, part])
                begin += count
    return Pool(pool, born.contiguous())


def _take(vectors: Tensor, rows: Tensor, target: Tensor) -> None:
    """As torch's ``index_select``, which shares a copy of microseconds out among all cores and waits for them: where
    they have other work, a replay of many blocks takes five times as long."""
    np.take(_bytes(vectors), rows.numpy(), axis=0, out=_bytes(target), mode="clip")


def _move(vectors: Tensor, rows: Tensor) -> None:
    """Row i becomes row ``rows``[i]. They rise, so that rows move to the front and what is still to be read is never
    written over. A few at a time: by way of all of them memory would be written twice."""
    memory, chosen = _bytes(vectors), rows.numpy()
    between = np.empty((max(1, _MOVED // memory.shape[1]), memory.shape[1]), dtype=np.uint8)
    for begin in range(0, len(chosen), len(between)):
        part = chosen[begin : begin + len(between)]
        np.take(memory, part, axis=0, out=between[: len(part)], mode="clip")
        memory[begin : begin + len(part)] = between[: len(part)]


def _bytes(rows: Tensor) -> npt.NDArray[np.uint8]:
    """The memory of a matrix on the host, row by row."""
    found: npt.NDArray[np.uint8] = rows.view(torch.uint8).numpy()
    return found


def _gather(vectors: Tensor, rows: Tensor, target: Tensor) -> None:
    if vectors.dtype == target.dtype:
        _take(vectors, rows, target)
    else:
        target.copy_(vectors[rows])
