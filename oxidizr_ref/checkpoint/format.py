"""Bytes and tensors: one safetensors file, written deterministically, proved when written and when read.

A file is: 8 bytes, the header's length (little-endian u64); the header, JSON padded with spaces to a multiple of 64; the
payload, tensors end to end. See https://github.com/huggingface/safetensors#format. On top of that format:

* The payload is ordered by item size (largest first), then name, so that every tensor is aligned to its item size.
* ``__metadata__.digests`` holds the SHA-256 of every tensor: of the digests of its 4 MiB chunks, so that all cores can hash.
* ``__metadata__.header_digest`` is the SHA-256 of length prefix and header with its own 64 digits replaced by zeros.

Equal tensors and metadata give equal bytes; any changed bit is found when the file is read.
"""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import secrets
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from oxidizr_ref import parallel
from oxidizr_ref.checkpoint import disk
from oxidizr_ref.checkpoint import header as headers
from oxidizr_ref.checkpoint.header import Entry, Header, damaged
from oxidizr_ref.errors import CheckpointError, DamagedError, SaveError
from oxidizr_ref.pictured import Pictured

assert sys.byteorder == "little", "checkpoints are written as the memory holds them, which must be little-endian"

CHUNK_BYTES = 4 << 20  # part of the digests' definition

HostArray: TypeAlias = np.ndarray[Any, Any]
StrPath: TypeAlias = str | os.PathLike[str]


@dataclass(frozen=True)
class Checkpoint(Pictured):
    """What a verified file holds: arrays by name, strings by key (the two digest keys left out)."""

    tensors: dict[str, HostArray]
    metadata: dict[str, str]


@dataclass(frozen=True)
class _Chunk:
    """A piece of the payload that is hashed by itself: of which tensor, and its bytes there."""

    entry: Entry
    begin: int
    end: int


def _chunks(header: Header) -> list[_Chunk]:
    return [
        _Chunk(entry, begin, min(begin + CHUNK_BYTES, entry.end - entry.begin))
        for entry in header.entries
        for begin in range(0, entry.end - entry.begin, CHUNK_BYTES)
    ]


def _combine(header: Header, chunks: Sequence[_Chunk], parts: Sequence[bytes]) -> dict[str, str]:
    """By tensor, SHA-256 over the SHA-256s of its chunks, as 64 hexadecimal digits."""
    whole = {entry.name: hashlib.sha256() for entry in header.entries}
    for chunk, part in zip(chunks, parts, strict=True):
        whole[chunk.entry.name].update(part)
    return {name: sha.hexdigest() for name, sha in whole.items()}


# --- writing ----------------------------------------------------------------------------------------------------------


def save(path: StrPath, tensors: Mapping[str, HostArray], metadata: Mapping[str, str]) -> None:
    """Write one file that is either there whole or not at all, and read it back from the disk before it gets its name.

    No second copy of the tensors is made. Raises OSError when the disk refuses, SaveError when it gives back other bytes
    than it was given, and CheckpointError for what has no place in the format.
    """
    path = Path(path)
    planned = _plan(tensors, metadata)
    nobody_elses = secrets.randbits(48)  # processes of two containers may have equal numbers
    with disk.new_file(path, path.with_name(f".{path.name}.{nobody_elses}.tmp")) as descriptor:
        header, parts = _write(descriptor, planned, tensors)
        disk.flush(descriptor)
        disk.forget_cached(descriptor)
        _must_read_back(descriptor, planned, header, parts, path)


def predict_size(tensors: Mapping[str, HostArray], metadata: Mapping[str, str]) -> int:
    """Bytes of the file that `save` would write."""
    return _plan(tensors, metadata).file_size


def describe(tensors: Mapping[str, HostArray], metadata: Mapping[str, str]) -> Header:
    """The header of the file that `save` would write: equal headers of whole files mean equal files."""
    planned = _plan(tensors, metadata)
    chunks = _chunks(planned)
    parts = [b""] * len(chunks)

    def hash_chunk(index: int) -> None:
        parts[index] = hashlib.sha256(_bytes_of(tensors, chunks[index])).digest()

    parallel.for_each(len(chunks), hash_chunk)
    return replace(planned, digests=_combine(planned, chunks, parts))


def _plan(tensors: Mapping[str, HostArray], metadata: Mapping[str, str]) -> Header:
    for name, array in tensors.items():
        if not array.flags.c_contiguous:
            raise CheckpointError(f"tensor {name}: its elements do not lie in C order")
    return headers.plan({name: (array.dtype, array.shape) for name, array in tensors.items()}, metadata)


def _write(descriptor: int, planned: Header, tensors: Mapping[str, HostArray]) -> tuple[bytes, list[bytes]]:
    """Hash and write every chunk while it is in the cache, then the header, whose length was known before its digests."""
    chunks = _chunks(planned)
    parts = [b""] * len(chunks)

    def hash_and_write(index: int) -> None:
        chunk = chunks[index]
        data = _bytes_of(tensors, chunk)
        offset = planned.payload_start + chunk.entry.begin + chunk.begin
        parts[index] = hashlib.sha256(data).digest()
        disk.write_at(descriptor, data, offset)
        disk.forget_cached(descriptor, offset, len(data))  # the disk begins to write while the next chunk is hashed

    parallel.for_each(len(chunks), hash_and_write)
    header = headers.encode(planned, _combine(planned, chunks, parts))
    disk.write_at(descriptor, header, 0)
    return header, parts


def _must_read_back(descriptor: int, planned: Header, header: bytes, parts: Sequence[bytes], path: Path) -> None:
    again = memoryview(bytearray(len(header)))
    same = disk.read_at(descriptor, again, 0) == len(header) and again == header
    if not same or _hash_payload(descriptor, planned) != parts or disk.size(descriptor) != planned.file_size:
        raise SaveError(f"{path}: the disk gave back other bytes than were written; check the disk")


def _bytes_of(tensors: Mapping[str, HostArray], chunk: _Chunk) -> memoryview:
    """A chunk of a tensor's memory, not copied."""
    return _memory(tensors[chunk.entry.name])[chunk.begin : chunk.end]


def _memory(array: HostArray) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


# --- reading ----------------------------------------------------------------------------------------------------------


def load(path: StrPath) -> Checkpoint:
    """Read a file whole and prove it. Tensors are fresh, C-contiguous, aligned arrays.

    Raises DamagedError when a bit of it is not as it was written, and CheckpointError when the file is missing, unreadable,
    or not a checkpoint of this package.
    """
    path = Path(path)
    with _reading(path) as descriptor:
        header = headers.read(descriptor, path)
        tensors = {entry.name: np.empty(entry.shape, dtype=entry.dtype) for entry in header.entries}
        _prove(header, _hash_payload(descriptor, header, tensors), path)
    return Checkpoint(tensors, header.metadata)


def verify(path: StrPath) -> Header:
    """Prove that a file holds exactly what was written, a few chunks in memory at a time. Raises as `load` does."""
    path = Path(path)
    with _reading(path) as descriptor:
        header = headers.read(descriptor, path)
        _prove(header, _hash_payload(descriptor, header), path)
    return header


def read_header(path: StrPath) -> Header:
    """The header of a file, proved whole; the payload is not read. Raises as `load` does."""
    path = Path(path)
    with _reading(path) as descriptor:
        return headers.read(descriptor, path)


def mapped(path: StrPath) -> tuple[Header, dict[str, HostArray]]:
    """A file's header, proved whole, and its tensors as read-only views of the file: read when touched, never verified.

    Raises as `load` does.
    """
    path = Path(path)
    with _reading(path) as descriptor:
        header = headers.read(descriptor, path)
        try:
            memory = mmap.mmap(descriptor, header.file_size, access=mmap.ACCESS_READ)  # closed when the last view is gone
        except ValueError:
            raise damaged(path, header.payload_start, "the file shrank while it was read") from None
    return header, {entry.name: _view(memory, header, entry) for entry in header.entries}


def _view(memory: mmap.mmap, header: Header, entry: Entry) -> HostArray:
    count = (entry.end - entry.begin) // entry.dtype.itemsize
    flat = np.frombuffer(memory, dtype=entry.dtype, count=count, offset=header.payload_start + entry.begin)
    return flat.reshape(entry.shape)


@contextmanager
def _reading(path: Path) -> Iterator[int]:
    try:
        with disk.reading(path) as descriptor:
            yield descriptor
    except OSError as error:
        kind = DamagedError if error.errno == errno.EIO else CheckpointError  # of a broken disk, another file may be whole
        raise kind(f"{path}: cannot be read ({error.strerror or error})") from error


def _hash_payload(descriptor: int, header: Header, into: Mapping[str, HostArray] | None = None) -> list[bytes]:
    """The SHA-256 of every chunk, read to where it belongs (without ``into``: to be forgotten)."""
    chunks = _chunks(header)
    parts = [b""] * len(chunks)

    def read_and_hash(index: int) -> None:
        chunk = chunks[index]
        data = np.empty(chunk.end - chunk.begin, dtype=np.uint8).data if into is None else _bytes_of(into, chunk)
        count = disk.read_at(descriptor, data, header.payload_start + chunk.entry.begin + chunk.begin)
        parts[index] = hashlib.sha256(data[:count]).digest()

    parallel.for_each(len(chunks), read_and_hash)
    return parts


def _prove(header: Header, parts: Sequence[bytes], path: Path) -> None:
    found = _combine(header, _chunks(header), parts)
    for entry in header.entries:
        if found[entry.name] != header.digests[entry.name]:
            where = f"tensor {entry.name}, up to byte {header.payload_start + entry.end}, is not what was written"
            raise damaged(path, header.payload_start + entry.begin, f"{where} (its SHA-256 is not the stored one)")
