"""A memory as one file: safetensors in the layout of the reference's checkpoints, written and read in a stream.

``memory`` [L, N, d] in rank order, oldest first, ``initialized`` uint8 [] and ``born`` int32 [L or 1, N]; in the
metadata the model's fingerprint, seed and version, and if asked for the history with its texts. A file that is
read comes from anywhere: nothing in it is believed before it is checked, and no error repeats any of it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BufferedReader, BufferedWriter
from itertools import pairwise

import msgspec
import torch
from torch import Tensor

from app.errors import FingerprintMismatch, InvalidMemoryFile, InvalidRequest
from app.memory.codec import DTYPES, Entry, Pool, raw, safetensors_header
from app.memory.stored import StoredPool
from app.model.config import ModelConfig
from app.model.forgetting import MAX_SEED
from app.store.base import BlobRef, BlockRecord, Idempotency

FORMAT = "1"
MOST_HEADER = 64 * 2**20
# versions are counted in 32 bits, and a memory that comes from elsewhere goes on being updated
_MOST_VERSION = 2**30
_MOST_KEY = 256
_NO_BLOB = BlobRef("", 0, "")
_POOL_DTYPES = {DTYPES[dtype]: dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}


class _Metadata(msgspec.Struct):
    """Strings all, as safetensors wants it; others are left alone."""

    memoryllm: str
    fingerprint: str
    seed: str
    memory_version: str
    history: str | None = None


class _Header(msgspec.Struct, forbid_unknown_fields=True):
    metadata: _Metadata = msgspec.field(name="__metadata__")
    memory: Entry
    born: Entry
    initialized: Entry


class _Record(msgspec.Struct, omit_defaults=True):
    """A block's record without its blob."""

    version: int
    time: float
    tokens: int
    text: str | None = None
    idempotency: Idempotency | None = None


@dataclass(frozen=True)
class About:
    """What a file says of its memory besides the tokens. ``records`` have no blobs; empty if none were asked for."""

    fingerprint: str
    seed: int
    version: int
    initialized: bool
    records: tuple[BlockRecord, ...] = ()


def most_bytes(config: ModelConfig) -> int:
    """The largest file that a memory of this model can make."""
    return 8 + MOST_HEADER + config.pool_size * config.num_layers * (4 * config.hidden_size + 4) + 1


def _rows(config: ModelConfig) -> int:
    return config.num_layers if config.drop_memory_per_layer else 1


# ---------------------------------------------------------------- writing


def write_memory(
    file: BufferedWriter,
    pool: StoredPool,
    about: About,
    config: ModelConfig,
    *,
    stopped: Callable[[], bool],
) -> int:
    """Writes the whole file, a layer at a time, and returns its size in bytes; less if ``stopped`` says so.

    Raises InvalidRequest if the texts do not fit into a header, OSError, and as ``StoredPool``: what was written is
    worth nothing then.
    """
    flag = torch.tensor(about.initialized, dtype=torch.uint8)
    tensors = {
        "memory": torch.empty(pool.shape, dtype=pool.dtype, device="meta"),
        "born": torch.empty(_rows(config), config.pool_size, dtype=torch.int32, device="meta"),
        "initialized": flag,
    }
    begin = safetensors_header(tensors, _metadata(about, config))
    if len(begin) > MOST_HEADER:
        raise InvalidRequest("the texts are too long for one file: export without them", param="texts")
    written = file.write(begin)
    for layer in pool.layers():
        if stopped():
            return written
        written += file.write(raw(layer.contiguous()))
    # from here on all that was read is known to be sound
    return written + file.write(raw(pool.born.contiguous())) + file.write(raw(flag))


def _metadata(about: About, config: ModelConfig) -> dict[str, str]:
    told = {
        # what transformers asks of a checkpoint's files
        "format": "pt",
        "memoryllm": FORMAT,
        "fingerprint": about.fingerprint,
        "seed": str(about.seed),
        "memory_version": str(about.version),
        "num_blocks": str(config.num_blocks),
        "num_tokens": str(config.num_tokens),
        "exported": f"{time.time():.3f}",
    }
    if about.records:
        records = [_Record(r.version, r.time, r.tokens, r.text, r.idempotency) for r in about.records]
        told["history"] = msgspec.json.encode(records).decode()
    return told


# ---------------------------------------------------------------- reading


def read_memory(
    file: BufferedReader, size: int, config: ModelConfig, fingerprint: str, *, stopped: Callable[[], bool]
) -> tuple[About, Pool]:
    """The memory in a file of ``size`` bytes; its ``hidden`` in the file's dtype.

    Raises InvalidMemoryFile for whatever is not a whole and sound memory of this model, FingerprintMismatch for
    another model's, OSError. Nothing is allocated before the header is found to agree with model and size.
    """
    header, start = _read_header(file, size)
    about = _about(header)
    if about.fingerprint != fingerprint:
        raise FingerprintMismatch("the file holds the memory of another model, or of other weights")
    dtype = _checked_layout(header, config, size - start)
    shape = (config.num_layers, config.pool_size, config.hidden_size)
    hidden = torch.empty(shape, dtype=dtype)
    born = torch.empty(_rows(config), config.pool_size, dtype=torch.int32)
    flag = torch.empty(1, dtype=torch.uint8)
    for entry, tensors in _in_order(header, hidden, born, flag):
        file.seek(start + entry.data_offsets[0])
        for tensor in tensors:
            if stopped():
                raise InvalidMemoryFile("the import was given up")
            if file.readinto(raw(tensor)) != tensor.nbytes:
                raise InvalidMemoryFile("the file ends early")
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise InvalidMemoryFile("the file's memory has numbers that are not finite")
    if int(flag) > 1:
        raise InvalidMemoryFile("initialized must be 0 or 1")
    about = About(about.fingerprint, about.seed, about.version, bool(flag), about.records)
    _check_born(born, about, config)
    return about, Pool(hidden, born)


def _in_order(
    header: _Header, hidden: Tensor, born: Tensor, flag: Tensor
) -> Iterator[tuple[Entry, list[Tensor]]]:
    yield header.memory, list(hidden)
    yield header.born, [born]
    yield header.initialized, [flag]


def _read_header(file: BufferedReader, size: int) -> tuple[_Header, int]:
    """The header, and where the tensors begin."""
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(MOST_HEADER, size - 8):
        raise InvalidMemoryFile("this is no safetensors file, or it ends early")
    try:
        return msgspec.json.decode(file.read(length), type=_Header), 8 + length
    except (msgspec.DecodeError, RecursionError):
        # the decoder's message may quote the file
        raise InvalidMemoryFile(
            "the file's header is not that of an exported memory: exactly memory, born and initialized, and "
            "the metadata that an export has"
        ) from None


def _about(header: _Header) -> About:
    metadata = header.metadata
    if metadata.memoryllm != FORMAT:
        raise InvalidMemoryFile("the file has a format that this server does not know")
    seed = _number(metadata.seed, MAX_SEED - 1, "seed")
    version = _number(metadata.memory_version, _MOST_VERSION, "memory_version")
    records = () if metadata.history is None else _records(metadata.history, version)
    return About(metadata.fingerprint, seed, version, True, records)


def _number(text: str, most: int, name: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 19 and int(text) <= most):
        raise InvalidMemoryFile(f"the file's {name} must be a number from 0 to {most}")
    return int(text)


def _records(history: str, version: int) -> tuple[BlockRecord, ...]:
    """The records of a file's history: one for each version from some first to the memory's own."""
    wrong = InvalidMemoryFile("the file's history does not fit its memory")
    try:
        records = msgspec.json.decode(history, type=list[_Record])
    except (msgspec.DecodeError, RecursionError):
        raise wrong from None
    versions = [r.version for r in records]
    if not records or versions[0] < 1 or versions != list(range(versions[0], version + 1)):
        raise wrong
    for record in records:
        mark = record.idempotency
        sound = math.isfinite(record.time) and 0 < record.tokens <= _MOST_VERSION
        if mark is not None:
            sound = sound and 1 <= len(mark.key) <= _MOST_KEY and 0 <= mark.index < mark.total
            sound = sound and len(mark.digest) <= _MOST_KEY
        if not sound:
            raise wrong
    return tuple(BlockRecord(r.version, _NO_BLOB, r.time, r.tokens, r.text, r.idempotency) for r in records)


def _checked_layout(header: _Header, config: ModelConfig, size: int) -> torch.dtype:
    """The pool's dtype, if every tensor has this model's shape and together they are the file, without gaps."""
    dtype = _POOL_DTYPES.get(header.memory.dtype)
    if dtype is None or header.born.dtype != "I32" or header.initialized.dtype != "U8":
        raise InvalidMemoryFile("memory must be F32, BF16 or F16, born I32 and initialized U8")
    wanted = [
        (header.memory, [config.num_layers, config.pool_size, config.hidden_size], dtype.itemsize),
        (header.born, [_rows(config), config.pool_size], 4),
        (header.initialized, [], 1),
    ]
    if any(entry.shape != shape for entry, shape, _ in wanted):
        raise InvalidMemoryFile("the file's tensors do not have the shapes of this model's memory")
    spans = sorted((entry.data_offsets, math.prod(shape) * width) for entry, shape, width in wanted)
    if any(end - begin != length for (begin, end), length in spans):
        raise InvalidMemoryFile("a tensor's place in the file does not have its size")
    edges = [(0, 0), *(span for span, _ in spans), (size, size)]
    if any(before[1] != after[0] for before, after in pairwise(edges)):
        raise InvalidMemoryFile("the file is longer or shorter than its tensors, or they overlap")
    return dtype


def _check_born(born: Tensor, about: About, config: ModelConfig) -> None:
    """Every layer holds versions in order, the newest block last, and of no update more than it wrote."""
    wrong = InvalidMemoryFile("born does not fit the file's version")
    newest = born[:, -config.num_tokens :]
    ordered = bool((born[:, 1:] >= born[:, :-1]).all())
    if not ordered or int(born[:, 0].min()) < 0 or bool((newest != about.version).any()):
        raise wrong
    if about.version and not about.initialized:
        raise InvalidMemoryFile("a memory that has taken updates is initialized")
    for row in born:
        versions, counts = row.unique_consecutive(return_counts=True)
        # the checkpoint's own pool, or the first block, which fills an empty one, may hold more than a block does
        if bool((counts[versions > 1] > config.num_tokens).any()):
            raise wrong
