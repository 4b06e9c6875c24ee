"""What is inside the store's blobs: safetensors bytes of blocks and snapshots."""

from __future__ import annotations

import math
from dataclasses import dataclass

import msgspec
import torch
from torch import Tensor

DTYPES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int32: "I32",
    torch.uint8: "U8",
}
# more is no header of ours, and is not read into memory
LONGEST_HEADER = 1 << 20


_OF_NAME = {name: dtype for dtype, name in DTYPES.items()}


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
    told = read_header(view[8:begin])
    return {name: _tensor(view[begin:], entry) for name, entry in told.items()}


def read_header(encoded: bytes | bytearray | memoryview) -> dict[str, Entry]:
    """What a safetensors header without its length tells of. Raises msgspec.DecodeError."""
    return msgspec.json.decode(encoded, type=dict[str, Entry])


def dtype_of(entry: Entry, size: int) -> torch.dtype:
    """The tensor's dtype. Raises ValueError unless its bytes lie within the ``size`` behind the header, KeyError if
    there is no such dtype."""
    begin, end = entry.data_offsets
    dtype = _OF_NAME[entry.dtype]
    whole = math.prod(entry.shape) * dtype.itemsize == end - begin and min(entry.shape, default=0) >= 0
    if not whole or not 0 <= begin <= end <= size:
        raise ValueError("a tensor's bytes are not where its header says")
    return dtype


def _tensor(data: memoryview, entry: Entry) -> Tensor:
    begin, end = entry.data_offsets
    dtype = dtype_of(entry, len(data))
    if begin == end:
        return torch.empty(entry.shape, dtype=dtype)
    return torch.frombuffer(data[begin:end], dtype=dtype).reshape(entry.shape)
