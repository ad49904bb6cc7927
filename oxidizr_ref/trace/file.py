"""The bytes of a trace: one safetensors file, payload in execution order, `records` in its metadata. See
docs/trace_format.md.

Writing streams: every array goes to disk as it comes, a piece at a time, and nothing is kept. The header, which stands
first, is known last; so room is left for it, and if that was too little the payload moves. Reading maps the file.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import re
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import safetensors

from oxidizr_ref import rng
from oxidizr_ref.backend import Array, to_host
from oxidizr_ref.checkpoint import disk
from oxidizr_ref.checkpoint.header import DTYPE_NAMES, DTYPES
from oxidizr_ref.config import canonical_json
from oxidizr_ref.errors import TraceError
from oxidizr_ref.trace.names import layer_of, meaning, parse

TRACE_VERSION = "1"
#: Elements of a piece: 2 MiB in float32.
PIECE = 1 << 19
_ALIGNMENT = 64
#: What files of other programs may hold besides.
_ALSO = {"I32": np.int32, "I16": np.int16, "I8": np.int8, "U64": np.uint64, "U16": np.uint16, "BOOL": np.bool_}
_READABLE: dict[str, np.dtype[Any]] = {**DTYPES, **{name: np.dtype(kind) for name, kind in _ALSO.items()}}
#: What the format keeps for itself, and halves of surrogate pairs, which no reader takes.
_NO_NAMES = re.compile("__metadata__$|sample\\.[0-9]+$|.*[\ud800-\udfff]", re.DOTALL)

HostArray = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Record:
    """One array of a trace: its name, what it is in the step, the shape of the whole, what it was computed from.

    role: ``input``, ``parameter``, ``output``, ``gradient``, ``optimizer`` or ``parameter_after``. inputs: names of this
    trace. sample: the tensor of the indices (in C order) that were kept, where not all were; digest: then, the SHA-256 of
    the whole in hexadecimal, or where ``parts`` is above 0, of the SHA-256s of so many equal parts along the first axis.
    """

    name: str
    role: str
    shape: tuple[int, ...]
    inputs: tuple[str, ...] = ()
    op: str = ""
    layer: int | None = None
    sample: str = ""
    digest: str = ""
    parts: int = 0

    @property
    def size(self) -> int:
        """How many numbers the whole has."""
        return math.prod(self.shape)


_KINDS: dict[str, type] = {"name": str, "role": str, "shape": list, "inputs": list, "op": str, "layer": int, "sample": str}
_KINDS |= {"digest": str, "parts": int}


def _record(item: Any) -> Record:
    """A record as it stands in a file. Raises ValueError or TypeError where it is none."""
    for key, value in item.items() if isinstance(item, dict) else [("record", item)]:
        if type(value) is not _KINDS.get(key):
            raise ValueError(f"{key} {value!r:.60}")
    record = Record(**{**item, "shape": tuple(item["shape"]), "inputs": tuple(item.get("inputs", ()))})
    if not all(type(n) is int and n >= 0 for n in record.shape) or not all(type(name) is str for name in record.inputs):
        raise ValueError(f"shape or inputs of {record.name}")
    return record


def role_of(name: str) -> str:
    """The role that a name alone tells; of a value and a parameter it tells the same."""
    _, _, path, end = parse(name)
    roles = {".grad": "gradient", ".grad.clipped": "gradient", ".after": "parameter_after"}
    return roles.get(end) or ("optimizer" if end else "input" if path in ("tokens", "targets") else "output")


def pieces(array: Array, size: int = PIECE) -> Iterator[HostArray]:
    """The elements of an array in C order, so many at a time at most, each piece contiguous and on the host."""
    if not array.flags.c_contiguous and array.ndim > 1 and array.size > size:
        for row in array:
            yield from pieces(row, size)
        return
    flat = array.reshape(-1)
    for i in range(0, flat.size, size):
        yield np.ascontiguousarray(to_host(flat[i : i + size]))


def sampled_indices(size: int, count: int) -> HostArray:
    """``count`` different indices below ``size``, ascending: the same ones for every array of that size. int64."""
    if size <= 4 * count:
        return np.sort(rng.permutation(0, "trace", size, size)[:count])
    drawn = np.unique((rng.uniform(0, "trace", f"sample.{size}", 0, 2 * count) * size).astype(np.int64))  # 1.5 count or more
    return np.sort(drawn[rng.permutation(0, "trace", size, len(drawn))[:count]])


# --- writing ----------------------------------------------------------------------------------------------------------


@dataclass
class _Open:
    """An array that comes part by part, or only a sample of which is kept."""

    record: Record
    dtype: np.dtype[Any]
    offset: int
    shas: dict[int, bytes] = field(default_factory=dict)  # of the parts
    values: HostArray | None = None  # the sample


class TraceWriter:
    """Writes a trace, array by array. Use it in a ``with`` statement: the file appears when that ends well, or never.

    precision: what the numbers were computed in (``f64``, ``f32``, ``tf32``, ``bf16``, ``f16``). sample: of arrays with
    more elements only so many are kept; 0: all. metadata: more strings for the header, for which ``room`` bytes are left.
    """

    def __init__(
        self, path: str | Path, precision: str, metadata: Mapping[str, str] | None = None, sample: int = 0, room: int = 0
    ) -> None:
        self.path, self.sample, self._start = Path(path), sample, 8 + room + -(8 + room) % _ALIGNMENT
        self.metadata = {"trace_version": TRACE_VERSION, "precision": precision, **(metadata or {})}
        # Bytes of every number, integers too: so that all of them are aligned, whatever comes before them.
        self._integers, self._floats = (
            np.dtype(t) for t in ((np.int64, np.float64) if precision == "f64" else (np.uint32, np.float32))
        )
        self._records: dict[str, Record] = {}
        self._entries: dict[str, tuple[np.dtype[Any], tuple[int, ...], int]] = {}
        self._open: dict[str, _Open] = {}
        self._end = 0

    def __enter__(self) -> Self:
        with self._disk():
            self._file = disk.new_file(self.path, disk.temporary_of(self.path))
            self._descriptor = self._file.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._disk():
            if kind is None:
                try:
                    self._finish()
                except BaseException as failure:
                    self._file.__exit__(type(failure), failure, None)
                    raise
            self._file.__exit__(kind, error, trace)

    @contextmanager
    def _disk(self) -> Iterator[None]:
        """What the disk refuses, told as an error of a trace."""
        try:
            yield
        except OSError as error:
            raise TraceError(f"{self.path}: cannot be written ({error.strerror or error}); choose another place") from error

    def __contains__(self, name: str) -> bool:
        return name in self._records

    def add(self, record: Record | str, array: Array, times: float = 1.0) -> None:
        """Write one array, multiplied by ``times``. A name alone is given the role that it tells."""
        record = self._begin(record, array.shape)
        opened = self._place(record, self._stored(array.dtype))
        whole, at = hashlib.sha256(), 0
        for piece in pieces(array):
            piece = self._converted(record.name, piece if times == 1.0 else piece * times, opened.dtype)
            if opened.values is None:
                self._write(piece, opened.offset + at * piece.itemsize)
            else:
                whole.update(piece.data)
                self._keep_sample(opened, piece, at)
            at += piece.size
        if opened.values is not None:
            self._write(opened.values, opened.offset)
            self._records[record.name] = replace(self._records[record.name], digest=whole.hexdigest())

    def add_part(self, record: Record | str, array: Array, at: int, length: int) -> None:
        """Write place ``at`` of ``length`` along a first axis that ``array`` does not have; they may come in any order.

        Places that never come are zeros.
        """
        name = record if isinstance(record, str) else record.name
        if name not in self._open:
            begun = self._begin(record, (length, *array.shape))
            self._open[name] = self._place(begun, self._stored(array.dtype))
        elif isinstance(record, Record):  # a later place may have been computed from more
            self._records[name] = replace(self._records[name], inputs=record.inputs)
        opened = self._open[name]
        if (length, *array.shape) != opened.record.shape or not 0 <= at < length:
            whole = f"{name} {list(opened.record.shape)}"
            raise TraceError(f"{self.path}: {list(array.shape)} cannot be place {at} of {length} in {whole}")
        part = self._converted(name, np.ascontiguousarray(to_host(array)), opened.dtype)
        if opened.values is None:
            self._write(part, opened.offset + at * part.nbytes)
        else:
            opened.shas[at] = hashlib.sha256(part.data).digest()
            self._keep_sample(opened, part.reshape(-1), at * part.size)

    def _begin(self, record: Record | str, shape: tuple[int, ...]) -> Record:
        if isinstance(record, str):
            found = meaning(record)
            record = Record(record, role_of(record), shape, op=found.op if found else "", layer=layer_of(record))
        if record.name in self._records:
            raise TraceError(
                f"{self.path}: {record.name} is recorded twice; of steps after the first write step.N. before it"
            )
        if _NO_NAMES.match(record.name):
            raise TraceError(f"{self.path}: no tensor can be called {record.name!r}")
        return replace(record, shape=tuple(int(n) for n in shape))

    def _stored(self, dtype: np.dtype[Any]) -> np.dtype[Any]:
        return self._integers if dtype.kind in "iub" else self._floats  # bf16 and f16 fit into float32 exactly

    def _converted(self, name: str, array: HostArray, dtype: np.dtype[Any]) -> HostArray:
        """The array as it is stored. Raises TraceError for integers that would become others, and for what is no number."""
        if array.dtype.kind in "iu" and array.size:
            smallest, largest, fit = int(array.min()), int(array.max()), np.iinfo(dtype)
            if smallest < fit.min or largest > fit.max:
                outside = smallest if smallest < fit.min else largest
                raise TraceError(f"{self.path}: {name} holds {outside}; integers are stored from {fit.min} to {fit.max}")
        elif array.dtype.kind in "cOSUMm":
            raise TraceError(f"{self.path}: {name} holds {array.dtype}; only real numbers, integers and booleans are stored")
        return array.astype(dtype, copy=False)

    def _place(self, record: Record, dtype: np.dtype[Any]) -> _Open:
        """Room for an array in the payload, for its sample if it is too large."""
        shape, values = record.shape, None
        if self.sample and record.size > self.sample and record.role not in ("input", "parameter"):
            indices = f"sample.{record.size}"
            if indices not in self._entries:
                where = sampled_indices(record.size, self.sample).astype(self._integers)
                self._write(where, self._room(indices, where.dtype, where.shape))
            shape = self._entries[indices][1]
            record, values = replace(record, sample=indices), np.zeros(shape, dtype)
        self._records[record.name] = record
        return _Open(record, dtype, self._room(record.name, dtype, shape), values=values)

    def _room(self, name: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> int:
        self._entries[name] = dtype, shape, self._end
        self._end += math.prod(shape) * dtype.itemsize
        return self._entries[name][2]

    def _keep_sample(self, opened: _Open, flat: HostArray, start: int) -> None:
        where = sampled_indices(opened.record.size, self.sample)
        first, last = np.searchsorted(where, (start, start + flat.size))
        assert opened.values is not None
        opened.values[first:last] = flat[where[first:last] - start]

    def _write(self, array: HostArray, offset: int) -> None:
        with self._disk():
            disk.write_at(self._descriptor, array.reshape(-1).view(np.uint8).data, self._start + offset)

    def _finish(self) -> None:
        for name, opened in self._open.items():
            if opened.values is not None:
                self._write(opened.values, opened.offset)
                zeros = hashlib.sha256(bytes(opened.record.size // opened.record.shape[0] * opened.dtype.itemsize)).digest()
                digests = [opened.shas.get(at, zeros) for at in range(opened.record.shape[0])]
                sha = hashlib.sha256(b"".join(digests)).hexdigest()
                self._records[name] = replace(self._records[name], digest=sha, parts=len(digests))
        header: dict[str, Any] = {
            name: {
                "dtype": DTYPE_NAMES[dtype],
                "shape": list(shape),
                "data_offsets": [at, at + math.prod(shape) * dtype.itemsize],
            }
            for name, (dtype, shape, at) in self._entries.items()
        }
        records = [
            {key: value for key, value in asdict(record).items() if value}
            | {"shape": list(record.shape)}
            | ({"layer": record.layer} if record.layer is not None else {})
            for record in self._records.values()
        ]
        header["__metadata__"] = {**self.metadata, "records": canonical_json(records)}
        text = canonical_json(header).encode("ascii")
        missing = 8 + len(text) - self._start
        if missing > 0:
            self._move(missing + -missing % _ALIGNMENT)
        disk.write_at(self._descriptor, struct.pack("<Q", self._start - 8) + text.ljust(self._start - 8), 0)
        os.ftruncate(self._descriptor, self._start + self._end)  # the last part of all may never have come

    def _move(self, by: int) -> None:
        """The whole payload, its end first."""
        buffer, end = memoryview(bytearray(4 << 20)), self._end
        while end > 0:
            begin = max(0, end - len(buffer))
            part = buffer[: disk.read_at(self._descriptor, buffer[: end - begin], self._start + begin)]
            disk.write_at(self._descriptor, part, self._start + by + begin)
            end = begin
        self._start += by


# --- reading ----------------------------------------------------------------------------------------------------------


class Trace:
    """A trace file, mapped: its ``metadata``, its ``records`` by name in execution order, and the arrays.

    Files that other programs wrote need no records: names and shapes then tell what they can, in file order.
    Raises TraceError for what is not a safetensors file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            with safetensors.safe_open(self.path, framework="np") as file:  # checks the whole layout
                self.metadata: dict[str, str] = dict(file.metadata() or {})
            with self.path.open("rb") as opened:
                self._memory = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)  # closed when the last view is gone
        except (OSError, ValueError, safetensors.SafetensorError) as error:
            raise TraceError(f"{self.path}: is not a trace ({' '.join(str(error).split())})") from error
        (length,) = struct.unpack("<Q", self._memory[:8])
        header = json.loads(self._memory[8 : 8 + length], object_pairs_hook=self._without_doubles)
        header.pop("__metadata__", None)
        self._payload = 8 + length
        self._entries = dict(sorted(header.items(), key=lambda item: item[1]["data_offsets"]))
        self.records = self._read_records()

    def _without_doubles(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        if len(set(names)) < len(names):
            twice = next(name for i, name in enumerate(names) if name in names[:i])
            raise TraceError(f"{self.path}: {twice} stands in its header twice")
        return dict(pairs)

    def _read_records(self) -> dict[str, Record]:
        if "records" not in self.metadata:
            return {
                name: Record(name, role_of(name), tuple(entry["shape"]), layer=layer_of(name))
                for name, entry in self._entries.items()
            }
        said = self.metadata.get("trace_version", TRACE_VERSION)
        if said != TRACE_VERSION:
            raise TraceError(f"{self.path}: trace version {said}; this package reads {TRACE_VERSION}")
        records: dict[str, Record] = {}
        try:
            for item in json.loads(self.metadata["records"]):
                record = _record(item)
                if record.name in records:
                    raise ValueError(f"{record.name} is listed twice")
                self._must_fit(record)
                records[record.name] = record
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise TraceError(f"{self.path}: its records cannot be understood ({error})") from error
        return records

    def _must_fit(self, record: Record) -> None:
        """Raises ValueError unless the file holds what the record speaks of, in its shape."""
        for name in filter(None, (record.name, record.sample)):
            if name not in self._entries:
                raise ValueError(f"they speak of {name}, which the file does not hold")
        shape = tuple(self._entries[record.sample or record.name]["shape"])
        if tuple(self._entries[record.name]["shape"]) != (shape if record.sample else record.shape):
            raise ValueError(f"{record.name} has another shape in them than in the header")

    @property
    def precision(self) -> str:
        """What the numbers were computed in, as the file says; without a word of it, the dtype of most arrays."""
        if said := self.metadata.get("precision"):
            return said
        floats = [entry["dtype"] for entry in self._entries.values() if entry["dtype"] in ("F64", "F32", "F16", "BF16")]
        return max(sorted(set(floats)), key=floats.count, default="F32").lower()

    def array(self, name: str) -> HostArray:
        """The numbers of a name as they are stored (of a sampled one, the sample), a view of the file; read when touched.

        Raises TraceError for a dtype that is not understood, and for more or longer axes than an array can have.
        """
        entry = self._entries[name]
        dtype = _READABLE.get(entry["dtype"])
        if dtype is None:
            raise TraceError(f"{self.path}: {name} has dtype {entry['dtype']}, which is not understood")
        try:
            return np.ndarray(tuple(entry["shape"]), dtype, self._memory, self._payload + entry["data_offsets"][0])
        except ValueError as error:
            raise TraceError(f"{self.path}: {name} has a shape that no array can have ({error})") from error

    def forget(self) -> None:
        """Let go of what was read of the file: it need not stay in memory, and is read again when touched again."""
        if hasattr(self._memory, "madvise"):
            self._memory.madvise(mmap.MADV_DONTNEED)

    def indices(self, name: str) -> HostArray | None:
        """Where in the whole the numbers of a sampled name stand, ascending; None where all are there.

        Raises TraceError where the file has something else in their place.
        """
        record = self.records[name]
        if not record.sample:
            return None
        found = self.array(record.sample)
        where = found.astype(np.int64) if found.dtype.kind in "iu" and found.ndim == 1 else np.array([-1])
        if len(where) and not (0 <= where[0] and where[-1] < record.size and (np.diff(where) > 0).all()):
            raise TraceError(f"{self.path}: {record.sample} does not hold indices of {record.size} numbers, ascending")
        return where
