"""Reading a trace: one safetensors file, payload in execution order, `records` in its metadata. See docs/trace_format.md.

The file is mapped, not loaded. It may be anybody's: nothing in it is believed before it was looked at.
"""

from __future__ import annotations

import json
import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from oxidizr_ref.checkpoint.header import DTYPES
from oxidizr_ref.errors import TraceError
from oxidizr_ref.trace.names import layer_of, parse

TRACE_VERSION = "1"
#: What files of other programs may hold besides.
_ALSO = {"I32": np.int32, "I16": np.int16, "I8": np.int8, "U64": np.uint64, "U16": np.uint16, "BOOL": np.bool_}
_READABLE: dict[str, np.dtype[Any]] = {**DTYPES, **{name: np.dtype(kind) for name, kind in _ALSO.items()}}

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
        except FileNotFoundError as error:
            raise TraceError(f"{self.path}: no such file") from error
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
