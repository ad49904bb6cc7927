"""Bytes and tensors: the safetensors layout, written deterministically and read strictly.

A file is: 8 bytes, the header's length (little-endian u64); the header, JSON padded with spaces to a multiple of 64; the
payload, tensors end to end. See https://github.com/huggingface/safetensors#format. On top of that format:

* The payload is ordered by item size (largest first), then name, so that every tensor is aligned to its item size.
* ``__metadata__.digests`` holds the SHA-256 of every tensor: of the digests of its 4 MiB chunks, so that all cores can hash.
* ``__metadata__.header_digest`` is the SHA-256 of length prefix and header with its own 64 digits replaced by zeros.

Equal tensors and metadata give equal bytes; any changed bit is found when the file is read.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from oxidizr_ref import parallel
from oxidizr_ref.errors import CheckpointError

assert sys.byteorder == "little", "checkpoints are written as the memory holds them, which must be little-endian"

#: Raised by a change to this layout. Files of every released version load for ever.
FORMAT_VERSION = 1
CHUNK_BYTES = 4 << 20
MAX_HEADER_BYTES = 100_000_000  # the stock reader's limit
_ALIGNMENT = 64
_NO_DIGEST = "0" * 64
_OWN_KEYS = ("digests", "header_digest")
_MOST_AXES = 64  # of a NumPy array

_DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "U32": np.dtype(np.uint32),
    "U8": np.dtype(np.uint8),
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

HostArray = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Checkpoint:
    """What a verified file holds: arrays by name, strings by key (the two digest keys left out)."""

    tensors: dict[str, HostArray]
    metadata: dict[str, str]


@dataclass(frozen=True)
class _Entry:
    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    begin: int
    end: int


# --- writing ----------------------------------------------------------------------------------------------------------


def save(path: str | os.PathLike[str], tensors: Mapping[str, HostArray], metadata: Mapping[str, str]) -> None:
    """Write one file that is either there whole or not at all.

    The bytes go to a temporary file beside it, which is flushed to the disk and renamed; then the directory is flushed.
    Raises OSError when the disk refuses and CheckpointError for a tensor that has no place in the format.
    """
    path = Path(path)
    header = encode_header(tensors, metadata)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        # "x": never write through a file or link that is there already.
        with open(temporary, "xb") as file:
            file.write(header)
            for name in _payload_order(tensors):
                _write_chunks(file, tensors[name])
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Make renames in ``directory`` survive a power cut. Windows has no such call, and needs none."""
    if os.name == "nt":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def encode_header(tensors: Mapping[str, HostArray], metadata: Mapping[str, str]) -> bytes:
    """Length prefix and header, digests included: it names every bit of the payload."""
    if "__metadata__" in tensors:
        raise CheckpointError("a tensor cannot be called __metadata__")
    for key, value in metadata.items():
        if key in _OWN_KEYS or not isinstance(value, str):
            raise CheckpointError(f"metadata {key!r}: {'this key is written here' if key in _OWN_KEYS else 'not a string'}")
    entries: dict[str, Any] = {}
    offset = 0
    for name in _payload_order(tensors):
        array = tensors[name]
        if array.dtype not in _DTYPE_NAMES:
            raise CheckpointError(f"tensor {name}: dtype {array.dtype} cannot be stored (one of {', '.join(_DTYPES)})")
        if not array.flags.c_contiguous:
            raise CheckpointError(f"tensor {name}: its elements do not lie in C order")
        entries[name] = {
            "dtype": _DTYPE_NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [offset, offset + array.nbytes],
        }
        offset += array.nbytes
    digests = _digest_all({name: _bytes_of(tensors[name]) for name in sorted(tensors)})
    entries["__metadata__"] = {**metadata, "digests": _json(digests), "header_digest": _NO_DIGEST}
    text = _json(entries).encode("ascii")
    text += b" " * (-(len(text) + 8) % _ALIGNMENT)
    header = len(text).to_bytes(8, "little") + text
    return header.replace(_header_digest_field(_NO_DIGEST), _header_digest_field(hashlib.sha256(header).hexdigest()))


def _header_digest_field(digits: str) -> bytes:
    return f'"header_digest":"{digits}"'.encode()


def _payload_order(tensors: Mapping[str, HostArray]) -> list[str]:
    return sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))


def _write_chunks(file: BinaryIO, array: HostArray) -> None:
    view = _bytes_of(array)
    for start in range(0, len(view), CHUNK_BYTES):
        file.write(view[start : start + CHUNK_BYTES])


def _bytes_of(array: HostArray) -> memoryview:
    """The array's memory as bytes, not copied."""
    return array.reshape(-1).view(np.uint8).data


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


# --- digests ----------------------------------------------------------------------------------------------------------


def _digest_all(buffers: Mapping[str, memoryview]) -> dict[str, str]:
    """By name, SHA-256 over the SHA-256s of a buffer's 4 MiB chunks, as 64 hexadecimal digits."""
    chunks = [(name, start) for name, data in buffers.items() for start in range(0, len(data), CHUNK_BYTES)]
    parts = [b""] * len(chunks)

    def hash_chunk(index: int) -> None:
        name, start = chunks[index]
        parts[index] = hashlib.sha256(buffers[name][start : start + CHUNK_BYTES]).digest()

    parallel.for_each(len(chunks), hash_chunk)
    whole = {name: hashlib.sha256() for name in buffers}
    for (name, _), part in zip(chunks, parts, strict=True):
        whole[name].update(part)
    return {name: sha.hexdigest() for name, sha in whole.items()}


# --- reading ----------------------------------------------------------------------------------------------------------


def load(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a file whole and prove it. Tensors are fresh, C-contiguous, aligned arrays.

    Raises CheckpointError when the file is missing, unreadable, damaged, or not a checkpoint of this package.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            entries, metadata, payload_start = _read_header(file, path)
            tensors = {entry.name: _read_tensor(file, entry, payload_start) for entry in entries}
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
    stored = _digests_in(metadata.pop("digests"), tensors, path)
    found = _digest_all({name: _bytes_of(array) for name, array in tensors.items()})
    for name in sorted(tensors):
        if found[name] != stored[name]:
            raise CheckpointError(f"{path}: tensor {name} is damaged (its SHA-256 is not the stored one)")
    return Checkpoint(tensors, metadata)


def verify(path: str | os.PathLike[str]) -> None:
    """Prove that a file holds exactly what was written. Raises CheckpointError saying what does not."""
    load(path)


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The metadata of a file whose header proves whole; the payload is not read. Raises as `load` does."""
    path = Path(path)
    try:
        with open(path, "rb") as file:
            _, metadata, _ = _read_header(file, path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
    del metadata["digests"]
    return metadata


def _read_tensor(file: BinaryIO, entry: _Entry, payload_start: int) -> HostArray:
    array = np.empty(entry.shape, dtype=entry.dtype)
    file.seek(payload_start + entry.begin)
    view = _bytes_of(array)
    if len(view) and file.readinto(view) != len(view):  # type: ignore[attr-defined]
        raise CheckpointError(f"{file.name}: the file ended while tensor {entry.name} was read")
    return array


def _read_header(file: BinaryIO, path: Path) -> tuple[list[_Entry], dict[str, str], int]:
    """Entries in payload order, metadata without the header digest, and where the payload begins; all checked."""

    def damaged(reason: str) -> CheckpointError:
        return CheckpointError(f"{path}: not a whole checkpoint: {reason}")

    size = os.fstat(file.fileno()).st_size
    prefix = file.read(8)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length > min(MAX_HEADER_BYTES, size - 8):
        raise damaged(f"the header's length ({length} bytes) does not fit a file of {size} bytes")
    text = file.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_refuse_duplicates)
    except (ValueError, RecursionError) as error:
        raise damaged(f"the header is not JSON ({error})") from error
    metadata = header.pop("__metadata__", None) if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise damaged("the header has no __metadata__ of strings")
    if "header_digest" not in metadata or "digests" not in metadata:
        raise CheckpointError(f"{path}: a safetensors file, but not a checkpoint of oxidizr_ref (it holds no digests)")
    _check_header_digest(prefix + text, metadata.pop("header_digest"), damaged)
    entries = _check_entries(header, size - 8 - length, damaged)
    return entries, metadata, 8 + length


def _check_header_digest(header: bytes, stored: str, damaged: Callable[[str], CheckpointError]) -> None:
    field = _header_digest_field(stored)
    if not re.fullmatch("[0-9a-f]{64}", stored) or header.count(field) != 1:
        raise damaged("the header's digest is malformed")
    if hashlib.sha256(header.replace(field, _header_digest_field(_NO_DIGEST))).hexdigest() != stored:
        raise damaged("the header was changed (its SHA-256 is not the stored one)")


def _check_entries(header: dict[str, Any], payload: int, damaged: Callable[[str], CheckpointError]) -> list[_Entry]:
    entries = []
    for name, fields in header.items():
        try:
            entries.append(_parse_entry(name, fields))
        except (KeyError, TypeError, ValueError) as error:
            raise damaged(f"the entry of tensor {name!r} is malformed") from error
    entries.sort(key=lambda entry: (entry.begin, entry.end))
    expected = 0
    for entry in entries:
        if entry.begin != expected:
            raise damaged(f"tensor {entry.name} begins at byte {entry.begin} of the payload, not at {expected}")
        expected = entry.end
    if expected != payload:
        raise damaged(f"the payload has {payload} bytes where the header describes {expected}")
    return entries


def _parse_entry(name: str, fields: Any) -> _Entry:
    """One tensor's place in the payload. Raises KeyError, TypeError or ValueError for anything unexpected."""
    if set(fields) != {"dtype", "shape", "data_offsets"}:
        raise ValueError("unknown or missing fields")
    begin, end = fields["data_offsets"]
    entry = _Entry(name, _DTYPES[fields["dtype"]], tuple(fields["shape"]), begin, end)
    if not all(type(number) is int and number >= 0 for number in (*entry.shape, begin, end)):
        raise ValueError("not whole numbers")
    if len(entry.shape) > _MOST_AXES or max(entry.shape, default=0) >= 2**63:
        raise ValueError("no array has this shape")
    if math.prod(entry.shape) * entry.dtype.itemsize != end - begin:
        raise ValueError("shape and offsets disagree")
    return entry


def _digests_in(text: str, tensors: Mapping[str, HostArray], path: Path) -> dict[str, str]:
    try:
        digests = json.loads(text)
    except (ValueError, RecursionError):
        digests = None
    if not isinstance(digests, dict) or digests.keys() != tensors.keys():
        raise CheckpointError(f"{path}: not a whole checkpoint: digests and tensors name different things")
    return digests


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = dict(pairs)
    if len(names) != len(pairs):
        raise ValueError("a key appears twice")
    return names
