"""The header of a checkpoint: written in one way only, and read in that way only.

It is JSON with sorted keys and no spaces, ASCII, padded with spaces. Because there is one way to write it, reading it needs
no JSON parser: names that ascend cannot appear twice, nothing can be nested, and whatever differs from the one way is
refused at the byte where it does. See docs/checkpoints.md, byte by byte.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from oxidizr_ref.checkpoint import disk
from oxidizr_ref.config import canonical_json
from oxidizr_ref.errors import CheckpointError, DamagedError

#: Raised by a change to the layout. Files of every released version load for ever.
FORMAT_VERSION = 1

# Limits that keep what a hostile header can make a reader allocate below 64 MiB, far above what training needs.
MAX_HEADER_BYTES = 8 << 20
MAX_METADATA_BYTES = 2 << 20  # of keys and values, the digests left out
MAX_TENSORS = 20_000
MAX_STRINGS = 1_000  # of metadata
MAX_NAME = 256
MAX_AXES = 64  # of a NumPy array

DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "U32": np.dtype(np.uint32),
    "U8": np.dtype(np.uint8),
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

_ALIGNMENT = 64
_NO_DIGEST = "0" * 64
_OWN_KEYS = ("digests", "header_digest")
_NUMBER = rb"(?:0|[1-9][0-9]{0,18})"
# Bounded and plain: Python before 3.11.4 matches possessive groups wrongly, and an unbounded repeat takes much memory.
_NAME = re.compile(rb'"([A-Za-z0-9_-]{1,300}(?:\.[A-Za-z0-9_-]{1,300}){0,299})":')
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"')
_ENTRY = re.compile(
    rb'\{"data_offsets":\[(%b),(%b)\],"dtype":"([A-Z0-9]{2,4})","shape":\[((?:%b(?:,%b){0,99})?)\]\}' % ((_NUMBER,) * 4)
)
_HEADER_DIGEST = re.compile(rb'[{,]"header_digest":"([0-9a-f]{64})"')  # inside a string the first " would follow a \\
_DIGESTS = re.compile(r'\{(?:"[A-Za-z0-9_.-]{1,256}":"[0-9a-f]{64}"(?:,|(?=\})))*+\}')
_END = re.compile(rb'"data_offsets"\s*:\s*\[\s*[0-9]{1,20}\s*,\s*([0-9]{1,20})\s*\]')
_CONTROL = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f]")
_SOME_VERSION = re.compile("[1-9][0-9]{0,8}")
_VERSION = re.compile(rb'"format_version":"([1-9][0-9]{0,8})"')
_OUR_KEYS = (b'"digests"', b'"header_digest"', b'"format_version"')
_HALF = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor: what it is, and where in the payload it lies (bytes ``begin`` to ``end``)."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Header:
    """A header that proved whole: tensors in payload order, metadata and digests by name, where the payload begins."""

    entries: tuple[Entry, ...]
    metadata: dict[str, str]
    digests: dict[str, str]
    payload_start: int

    @property
    def file_size(self) -> int:
        """Bytes of the whole file."""
        return self.payload_start + (self.entries[-1].end if self.entries else 0)


# --- writing ----------------------------------------------------------------------------------------------------------


def plan(specs: Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]], metadata: Mapping[str, str]) -> Header:
    """Where everything will be, before a byte of it is hashed: dtypes and shapes by name in, a header without digests out.

    Raises CheckpointError for what has no place in the format.
    """
    _check_metadata(metadata)
    if len(specs) > MAX_TENSORS:
        raise CheckpointError(f"{len(specs)} tensors are too many for one file (at most {MAX_TENSORS})")
    entries, offset = [], 0
    for name in sorted(specs, key=lambda name: (-specs[name][0].itemsize, name)):
        dtype, shape = specs[name]
        if not _NAME.fullmatch(f'"{name}":'.encode("utf-8", "replace")) or len(name) > MAX_NAME or name == "__metadata__":
            what = "its name must be letters, digits, _ and -, in parts joined by single dots"
            raise CheckpointError(f"tensor {name!r}: {what}, {MAX_NAME} characters at most, and not __metadata__")
        if dtype not in DTYPE_NAMES:
            raise CheckpointError(f"tensor {name}: dtype {dtype} cannot be stored (one of {', '.join(DTYPES)})")
        entries.append(Entry(name, dtype, shape, offset, offset + math.prod(shape) * dtype.itemsize))
        offset = entries[-1].end
    unsigned = Header(tuple(entries), dict(metadata), dict.fromkeys(specs, _NO_DIGEST), 0)
    length = len(_unsigned_bytes(unsigned))
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(f"a header of {length} bytes is too large (at most {MAX_HEADER_BYTES})")
    return Header(unsigned.entries, unsigned.metadata, unsigned.digests, length)


def _check_metadata(metadata: Mapping[str, str]) -> None:
    if len(metadata) > MAX_STRINGS:
        raise CheckpointError(f"{len(metadata)} strings of metadata are too many (at most {MAX_STRINGS})")
    for key, value in metadata.items():
        if key in _OWN_KEYS or not isinstance(value, str):
            raise CheckpointError(f"metadata {key!r}: {'this key is written here' if key in _OWN_KEYS else 'not a string'}")
        if _HALF.search(key) or _HALF.search(value):
            raise CheckpointError(f"metadata {key!r}: half a surrogate pair is no character")
    total = sum(len(key) + len(value) for key, value in metadata.items())
    if total > MAX_METADATA_BYTES:
        raise CheckpointError(f"{total} characters of metadata are too many (at most {MAX_METADATA_BYTES})")


def encode(planned: Header, digests: Mapping[str, str]) -> bytes:
    """Length prefix and header of a planned file, now that its digests are known: they name every bit of the payload."""
    signed = Header(planned.entries, planned.metadata, dict(digests), planned.payload_start)
    unsigned = _unsigned_bytes(signed)
    digest = hashlib.sha256(unsigned).hexdigest()
    return unsigned.replace(f',"header_digest":"{_NO_DIGEST}"'.encode(), f',"header_digest":"{digest}"'.encode())


def _unsigned_bytes(header: Header) -> bytes:
    fields: dict[str, Any] = {
        entry.name: {
            "dtype": DTYPE_NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [entry.begin, entry.end],
        }
        for entry in header.entries
    }
    own = {"digests": canonical_json(header.digests), "header_digest": _NO_DIGEST}
    text = canonical_json({**fields, "__metadata__": {**header.metadata, **own}}).encode("ascii")
    text += b" " * (-(len(text) + 8) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


# --- reading ----------------------------------------------------------------------------------------------------------


def read(descriptor: int, path: Path) -> Header:
    """The header of an open file, if it is whole and the file has the size it describes.

    Raises DamagedError with the byte at which the file departs from the format, and CheckpointError when it is sound but
    not ours, or of a version yet to come.
    """
    size = disk.size(descriptor)
    prefix = _read_exactly(descriptor, 0, min(8, size))
    length = int.from_bytes(prefix, "little")
    if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
        reason = (
            f"its first 8 bytes promise a header of {length} bytes, in a file of {size}: no checkpoint, or one cut short"
        )
        raise damaged(path, 0, reason)
    text = _read_exactly(descriptor, 8, length)
    try:
        header = _Reader(text).header()
        _check_digest(prefix, text)
        _refuse_newer(header.metadata.get("format_version", ""), path)
        if header.file_size != size:
            payload, described = size - header.payload_start, header.file_size - header.payload_start
            raise _Malformed(min(size, header.file_size) - 8, f"the payload has {payload} bytes, not {described}")
    except _Malformed as error:
        _tell_if_newer(prefix, text, path)
        _tell_if_foreign(text, size, path)
        raise damaged(path, 8 + error.position, error.reason) from None
    return header


def damaged(path: Path, position: int, reason: str) -> DamagedError:
    """The error for a file that is not as it was written."""
    return DamagedError(f"{path}: damaged at or after byte {position}: {reason}")


def _read_exactly(descriptor: int, offset: int, count: int) -> bytes:
    buffer = bytearray(count)
    done = disk.read_at(descriptor, memoryview(buffer), offset)
    return bytes(buffer[:done])


class _Malformed(Exception):  # noqa: N818 - never leaves this file
    """Where (byte of the header's text) and why reading stopped."""

    def __init__(self, position: int, reason: str) -> None:
        super().__init__(position, reason)
        self.position, self.reason = position, reason


class _Reader:
    """Reads the one way of writing a header, from its first byte to its last."""

    def __init__(self, text: bytes) -> None:
        self._text, self._at = text, 0

    def header(self) -> Header:
        """The whole header. Raises _Malformed."""
        metadata: dict[str, str] | None = None
        entries: list[Entry] = []
        self._expect(b"{")
        last = ""
        while True:
            began, name = self._at, self._name()
            if name <= last:
                raise _Malformed(began, f"{name} after {last}: names must ascend, and none may appear twice")
            if name == "__metadata__":
                metadata = self._metadata()
            elif len(entries) == MAX_TENSORS:
                raise _Malformed(began, f"more than {MAX_TENSORS} tensors")
            else:
                entries.append(self._entry(name))
            last = name
            if not self._accept(b","):
                break
        self._expect(b"}")
        payload_start = self._padding()
        if metadata is None:
            raise _Malformed(0, "there is no __metadata__")
        digests = self._digests(metadata.pop("digests", ""))
        if "header_digest" not in metadata:
            raise _Malformed(0, "there is no header_digest")
        del metadata["header_digest"]
        if digests.keys() != {entry.name for entry in entries}:
            raise _Malformed(0, "digests and tensors name different things")
        return Header(self._in_payload_order(entries), metadata, digests, payload_start)

    def _accept(self, literal: bytes) -> bool:
        if not self._text.startswith(literal, self._at):
            return False
        self._at += len(literal)
        return True

    def _expect(self, literal: bytes) -> None:
        if not self._accept(literal):
            raise _Malformed(self._at, f"{literal.decode()} expected")

    def _match(self, pattern: re.Pattern[bytes], what: str) -> re.Match[bytes]:
        match = pattern.match(self._text, self._at)
        if match is None:
            raise _Malformed(self._at, f"{what} expected")
        self._at = match.end()
        return match

    def _name(self) -> str:
        began = self._at
        name = self._match(_NAME, "a tensor's name (letters, digits, _ and -, in parts joined by dots)")[1]
        if len(name) > MAX_NAME:
            raise _Malformed(began, f"a name of more than {MAX_NAME} characters")
        return name.decode("ascii")

    def _entry(self, name: str) -> Entry:
        began = self._at
        match = self._match(_ENTRY, f"data_offsets, dtype and shape of tensor {name}, and nothing else,")
        begin, end = int(match[1]), int(match[2])
        dtype = DTYPES.get(match[3].decode("ascii"))
        shape = tuple(int(length) for length in match[4].split(b",")) if match[4] else ()
        if dtype is None:
            raise _Malformed(began, f"tensor {name} has a dtype that is never written")
        if len(shape) > MAX_AXES or math.prod(length for length in shape if length) * dtype.itemsize >= 2**63:
            raise _Malformed(began, f"tensor {name}: no array has this shape")
        if math.prod(shape) * dtype.itemsize != end - begin:
            raise _Malformed(began, f"tensor {name}: shape and offsets disagree")
        return Entry(name, dtype, shape, begin, end)

    def _metadata(self) -> dict[str, str]:
        found: dict[str, str] = {}
        self._expect(b"{")
        total, last = 0, ""
        while self._text[self._at : self._at + 1] != b"}" and (not found or self._accept(b",")):
            began, key = self._at, self._string()
            if found and key <= last:
                raise _Malformed(
                    began, f"metadata {key[:40]!r} after {last[:40]!r}: keys must ascend, and none may appear twice"
                )
            self._expect(b":")
            found[key] = self._string()
            total += 0 if key in _OWN_KEYS else len(key) + len(found[key])
            last = key
            if len(found) > MAX_STRINGS + 2:
                raise _Malformed(began, f"more than {MAX_STRINGS} strings of metadata")
            if total > MAX_METADATA_BYTES:
                raise _Malformed(began, f"more than {MAX_METADATA_BYTES} characters of metadata")
        self._expect(b"}")
        return found

    def _string(self) -> str:
        began = self._at
        raw = self._match(_STRING, "a string")[0]
        try:
            value = json.loads(raw)
            canonical = isinstance(value, str) and canonical_json(value).encode("ascii") == raw and not _HALF.search(value)
        except ValueError:
            canonical = False
        if not canonical:
            raise _Malformed(began, "a string that is not written the one way (ASCII, lower-case \\u escapes)")
        return str(value)

    def _padding(self) -> int:
        length = self._at + -(self._at + 8) % _ALIGNMENT
        if len(self._text) != length or self._text[self._at :].strip(b" "):
            raise _Malformed(self._at, f"the header must end here, padded with spaces to {length} bytes")
        return 8 + length

    def _digests(self, text: str) -> dict[str, str]:
        """``{"name":"64 digits",…}`` in the one way, or nothing that could be taken for it."""
        if _DIGESTS.fullmatch(text) is None:
            raise _Malformed(0, "the digests of the tensors are missing or malformed")
        found = {}
        for pair in text[1:-1].split(",") if text[1:-1] else []:
            name, _, digest = pair.partition(":")
            found[name[1:-1]] = digest[1:-1]
        if canonical_json(found) != text:  # not in order, or twice the same
            raise _Malformed(0, "the digests of the tensors are missing or malformed")
        return found

    def _in_payload_order(self, entries: list[Entry]) -> tuple[Entry, ...]:
        entries.sort(key=lambda entry: (-entry.dtype.itemsize, entry.name))
        expected = 0
        for entry in entries:
            if entry.begin != expected:
                place = f"tensor {entry.name} begins at byte {entry.begin} of the payload, not at {expected}"
                raise _Malformed(0, f"{place}: a hole, an overlap, or another order than by item size, then name")
            expected = entry.end
        return tuple(entries)


def _check_digest(prefix: bytes, text: bytes) -> None:
    fields = list(_HEADER_DIGEST.finditer(text))
    if len(fields) != 1:
        raise _Malformed(0, "the header's digest is malformed")
    begin, end = fields[0].span(1)
    sha = hashlib.sha256(prefix)
    for part in (memoryview(text)[:begin], _NO_DIGEST.encode(), memoryview(text)[end:]):
        sha.update(part)
    if sha.hexdigest().encode() != fields[0][1]:
        raise _Malformed(0, "the header was changed (its SHA-256 is not the stored one)")


def _tell_if_newer(prefix: bytes, text: bytes, path: Path) -> None:
    """A header that proves whole, but not in our way of writing it, is a later version's if it says so."""
    said = _VERSION.search(text)
    try:
        _check_digest(prefix, text)
    except _Malformed:
        return
    if said:
        _refuse_newer(said[1].decode(), path)


def _refuse_newer(version: str, path: Path) -> None:
    if _SOME_VERSION.fullmatch(version) and int(version) > FORMAT_VERSION:
        what = f"format version {version} is newer than this package reads ({FORMAT_VERSION})"
        raise CheckpointError(f"{path}: {what}; use a newer oxidizr_ref")


def _tell_if_foreign(text: bytes, size: int, path: Path) -> None:
    """A header that never was ours is not damaged: it is text, fits the size of its file, and has none of our keys."""
    end = max((int(match[1]) for match in _END.finditer(text)), default=0)
    plain = text.startswith(b"{") and b"\xff" not in text and _CONTROL.search(text) is None
    if plain and 8 + len(text) + end == size and not any(key in text for key in _OUR_KEYS):
        raise CheckpointError(
            f"{path}: perhaps a safetensors file, but not a checkpoint of oxidizr_ref (it holds no digests)"
        )
