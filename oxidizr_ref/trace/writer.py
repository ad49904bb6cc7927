"""Writing a trace: array by array, streaming to the disk.

Every array goes there as it comes, a piece at a time, and nothing is kept but a few pieces that wait for the disk: a thread
writes them while the step goes on. The header, which stands first, is known last; so room is left for it, and if that was
too little the payload moves.
"""

from __future__ import annotations

import hashlib
import math
import os
import queue
import re
import struct
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from oxidizr_ref import rng
from oxidizr_ref.backend import Array, to_host
from oxidizr_ref.checkpoint import disk
from oxidizr_ref.checkpoint.header import DTYPE_NAMES
from oxidizr_ref.config import canonical_json
from oxidizr_ref.errors import TraceError, TraceWriteError
from oxidizr_ref.trace.file import TRACE_VERSION, HostArray, Record, role_of
from oxidizr_ref.trace.names import layer_of, meaning

#: Elements of a piece: 2 MiB in float32.
PIECE = 1 << 19
#: Pieces that may wait for the disk: 32 MiB in float64.
WAITING = 8
_ALIGNMENT = 64
#: What the format keeps for itself, and halves of surrogate pairs, which no reader takes.
_NO_NAMES = re.compile("__metadata__$|sample\\.[0-9]+$|.*[\ud800-\udfff]", re.DOTALL)


@dataclass
class _Open:
    """An array that comes part by part, or only a sample of which is kept."""

    record: Record
    dtype: np.dtype[Any]
    offset: int
    shas: dict[int, bytes] = field(default_factory=dict)  # of the parts
    values: HostArray | None = None  # the sample


class _Behind:
    """A thread that writes to a file what it is handed, at most `WAITING` pieces behind whoever hands it."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._waiting: queue.Queue[tuple[bytes, int] | None] = queue.Queue(WAITING)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="trace", daemon=True)
        self._thread.start()

    def write(self, data: bytes, offset: int) -> None:
        """Have it written. Raises what went wrong with something before it."""
        if self._error is not None:
            raise self._error
        self._waiting.put((data, offset))

    def end(self) -> None:
        """Wait until all is written; may be called again. Raises what went wrong with something."""
        if self._thread.is_alive():
            self._waiting.put(None)
            self._thread.join()
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        while (item := self._waiting.get()) is not None:
            if self._error is None:  # else it is only taken away, so that nobody waits for ever
                try:
                    disk.write_at(self._descriptor, *item)
                except BaseException as error:  # whatever it is, it belongs to whoever writes
                    self._error = error


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
        self._behind = _Behind(self._descriptor)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        failure = error
        with self._disk():
            if kind is None:
                try:
                    self._finish()
                except BaseException as of_the_end:
                    failure = of_the_end
            with suppress(BaseException):  # told already, or not to hide what went wrong first
                self._behind.end()
            self._file.__exit__(None if failure is None else type(failure), failure, trace)
            if failure is not error and failure is not None:
                raise failure

    @contextmanager
    def _disk(self) -> Iterator[None]:
        """What the disk refuses, told as an error of a trace."""
        try:
            yield
        except OSError as error:
            why = error.strerror or error
            raise TraceWriteError(f"{self.path}: cannot be written ({why}); choose another place") from error

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
        flat = array.reshape(-1)
        with self._disk():
            for i in range(0, flat.size, PIECE):
                self._behind.write(flat[i : i + PIECE].tobytes(), self._start + offset + i * flat.itemsize)

    def _finish(self) -> None:
        for name, opened in self._open.items():
            if opened.values is not None:
                self._write(opened.values, opened.offset)
                zeros = hashlib.sha256(bytes(opened.record.size // opened.record.shape[0] * opened.dtype.itemsize)).digest()
                digests = [opened.shas.get(at, zeros) for at in range(opened.record.shape[0])]
                sha = hashlib.sha256(b"".join(digests)).hexdigest()
                self._records[name] = replace(self._records[name], digest=sha, parts=len(digests))
        self._behind.end()
        # Not flushed, as a checkpoint is: a trace can be made again, and what a power cut leaves of it has no header.
        header: dict[str, Any] = {
            name: {
                "dtype": DTYPE_NAMES[dtype],
                "shape": list(shape),
                "data_offsets": [at, at + math.prod(shape) * dtype.itemsize],
            }
            for name, (dtype, shape, at) in self._entries.items()
        }
        records = [
            {key: value for key, value in vars(record).items() if value}
            | {"name": record.name, "shape": list(record.shape)}
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
