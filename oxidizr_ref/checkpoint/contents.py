"""What a checkpoint holds, in numbers and words for people. Nothing here writes, locks, or believes what it reads.

A file is mapped and read a few MiB at a time, so that a file larger than memory can be looked into. Its metadata may have
been written by anybody (the library saves any strings): whoever shows them must see to it that they are printable.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from oxidizr_ref import parallel
from oxidizr_ref.checkpoint import disk, format
from oxidizr_ref.checkpoint.branches import step_path
from oxidizr_ref.checkpoint.format import HostArray
from oxidizr_ref.checkpoint.header import DTYPE_NAMES, Header
from oxidizr_ref.checkpoint.store import CheckpointStore, check_name
from oxidizr_ref.config import canonical_json
from oxidizr_ref.errors import UsageError

#: Elements of a piece: 2 MiB as float64. The sums are cut here, so this number is part of their definition.
PIECE = 1 << 18
#: The metadata that hold JSON (see `state.to_file`); every other value is a plain string.
JSON_KEYS = ("config", "data", "fingerprint", "lineage", "progress", "tokenizer")

_LEVELS = 20  # of nesting in JSON that is believed to be JSON
_SAFE_EXPONENT = 400  # squares of numbers up to 2^±400, and sums of many of them, are far from float64's limits

Number: TypeAlias = int | float


# --- which file -------------------------------------------------------------------------------------------------------


def step_files(directory: Path) -> list[Path]:
    """The step files of a directory in step order. Raises UsageError when there is none."""
    store = CheckpointStore(directory)
    steps = store.steps()
    if not steps:
        raise UsageError(f"{directory}: holds no step files; give a file, or another directory")
    return [store.path(step) for step in steps]


def must_exist(path: Path) -> Path:
    """``path``, if something is there. Raises UsageError saying which step files are beside it otherwise."""
    if path.exists():
        return path
    beside = CheckpointStore(path.parent)
    there = f"; {beside.describe()}" if path.parent.is_dir() and beside.steps() else ""
    raise UsageError(f"{path}: no such file or directory{there}")


def file_meant(path: Path) -> Path:
    """The file that ``path`` means: itself, or the newest step file of a directory. Raises UsageError."""
    return step_files(path)[-1] if must_exist(path).is_dir() else path


def put_away(directory: Path) -> dict[str, int]:
    """How many checkpoints lie in ``superseded/`` (abandoned branches) and ``quarantine/`` (damaged files)."""
    superseded = directory / "superseded"
    branches = sorted(entry for entry in superseded.iterdir() if entry.is_dir()) if superseded.is_dir() else []
    places = {"superseded": branches, "quarantine": [directory / "quarantine"]}
    return {
        name: sum(entry.endswith(".safetensors") for place in where for entry in disk.names(place))
        for name, where in places.items()
    }


def step_inside(path: Path, header: Header) -> int | None:
    """The step a proved file holds; None when it holds no training state and is not named after a step.

    Raises DamagedError when its name says another step, and CheckpointError when its name does and the inside does not.
    """
    if _is_named_after_a_step(path):
        check_name(path, header.metadata)
    progress = parsed_metadata(header.metadata).get("progress")
    step = progress.get("step") if isinstance(progress, Mapping) else None
    return step if type(step) is int else None


def _is_named_after_a_step(path: Path) -> bool:
    digits = path.stem.removeprefix("step_")
    return digits.isascii() and digits.isdecimal() and path.name == step_path(path.parent, int(digits)).name


# --- numbers ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Numbers:
    """What is to be said about some numbers; ``a + b`` is what is to be said about those of both.

    The sum of the squares of the finite ones is ``squares`` · 4^``exponent``: as a float64 alone it could overflow.
    """

    tensors: int = 0
    elements: int = 0
    size: int = 0  # in bytes
    not_finite: int = 0
    smallest: Number | None = None  # of the finite ones; None when there are none
    largest: Number | None = None
    squares: float = 0.0
    exponent: int = 0

    def __add__(self, other: Numbers) -> Numbers:
        exponent = max((part.exponent for part in (self, other) if part.squares), default=0)
        squares = [math.ldexp(part.squares, 2 * (part.exponent - exponent)) for part in (self, other) if part.squares]
        known = [part for part in (self, other) if part.smallest is not None and part.largest is not None]
        return Numbers(
            self.tensors + other.tensors,
            self.elements + other.elements,
            self.size + other.size,
            self.not_finite + other.not_finite,
            min((part.smallest for part in known if part.smallest is not None), default=None),
            max((part.largest for part in known if part.largest is not None), default=None),
            sum(squares, 0.0),
            exponent,
        )

    @property
    def norm(self) -> float:
        """The square root of the sum of squares (L2): NaN when a number is not finite, infinite beyond float64."""
        if self.not_finite:
            return math.nan
        try:
            return math.ldexp(math.sqrt(self.squares), self.exponent)
        except OverflowError:
            return math.inf

    def as_json(self) -> dict[str, Any]:
        """See `Contents.as_json`."""
        known = self.not_finite == 0
        return {
            "elements": self.elements,
            "bytes": self.size,
            "norm": finite_or_none(self.norm),
            "not_finite": self.not_finite,
            "min": self.smallest if known else None,
            "max": self.largest if known else None,
        }


def numbers_of(arrays: Mapping[str, HostArray]) -> dict[str, Numbers]:
    """`Numbers` of every array, in float64, a piece in memory at a time on each thread. Threads change no digit."""
    pieces = [(name, i, j) for name, array in arrays.items() for i, j in _pieces(array.size)]
    parts = [Numbers()] * len(pieces)

    def look(index: int) -> None:
        name, i, j = pieces[index]
        parts[index] = _numbers_of_piece(arrays[name].reshape(-1)[i:j])

    with np.errstate(all="ignore"):
        parallel.for_each(len(pieces), look)
    sums = {name: parallel.TreeCounter[Numbers]() for name in arrays}
    for name, array in arrays.items():
        sums[name].push(Numbers(tensors=1, size=array.nbytes))
    for (name, _, _), part in zip(pieces, parts, strict=True):
        sums[name].push(part)
    return {name: counter.total() for name, counter in sums.items()}


def total(parts: Iterable[Numbers]) -> Numbers:
    """Those of all tensors together, over the fixed tree."""
    return parallel.tree_sum([Numbers(), *parts])


def _pieces(count: int) -> Iterator[tuple[int, int]]:
    return ((i, min(i + PIECE, count)) for i in range(0, count, PIECE))


def _numbers_of_piece(piece: HostArray) -> Numbers:
    values = piece.astype(np.float64)
    finite = np.isfinite(values)
    bad = piece.size - int(np.count_nonzero(finite))
    exact = piece if piece.dtype.kind in "iu" else values  # not every 64-bit integer is a float64
    if bad:
        exact = values = values[finite]
    if not values.size:
        return Numbers(elements=piece.size, not_finite=bad)
    smallest, largest = exact.min().item(), exact.max().item()
    exponent = math.frexp(max(-float(smallest), float(largest)))[1]
    if abs(exponent) <= _SAFE_EXPONENT:
        exponent = 0
    else:
        values = np.ldexp(values, -exponent)
    squares = float(np.square(values).sum())
    return Numbers(0, piece.size, 0, bad, smallest, largest, squares, exponent)


# --- one file ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contents:
    """A file whose header proved whole: what it says, and the numbers in its tensors, which were not verified."""

    path: Path
    header: Header
    numbers: dict[str, Numbers]

    @cached_property
    def metadata(self) -> dict[str, Any]:
        """The metadata, parsed where it is JSON."""
        return parsed_metadata(self.header.metadata)

    def holds_training_state(self) -> bool:
        """Whether all the metadata of a training run are there."""
        return all(isinstance(self.metadata.get(key), list if key == "lineage" else dict) for key in JSON_KEYS)

    def kinds(self) -> dict[str, list[str]]:
        """Names of tensors by what they are: ``weights``, ``optimizer.<slot>``, ``rng``, ``tokenizer``; sorted."""
        found: dict[str, list[str]] = {}
        for name in sorted(self.numbers):
            found.setdefault(kind_of(name), []).append(name)
        return found

    def totals(self) -> dict[str, Numbers]:
        """Of every kind."""
        return {kind: total(self.numbers[name] for name in names) for kind, names in self.kinds().items()}

    def as_json(self) -> dict[str, Any]:
        """All of it, as ``inspect --json`` prints it:

        ====================  ==========================================================================================
        ``file``, ``bytes``   the path, and the size of the file
        ``payload_verified``  false: only the header was proved
        ``metadata``          every key of the file's metadata but the digests; those of `JSON_KEYS` parsed, if they are
                              JSON without NaN and without deep nesting, else (as all other keys) a string
        ``tensors``           in file order: ``name``, ``dtype`` (F32 …), ``shape``, ``elements``, ``bytes``, ``norm``
                              (L2), ``min``, ``max``, ``not_finite`` (how many numbers are NaN or infinite)
        ``totals``            by kind (``weights``, ``optimizer.<slot>``, ``rng``): ``tensors`` (how many), and
                              ``elements``, ``bytes``, ``norm``, ``min``, ``max``, ``not_finite`` of them all
        ====================  ==========================================================================================

        ``norm``, ``min`` and ``max`` are null where a number is not finite, ``min`` and ``max`` also where there is none,
        and ``norm`` where it is too large for a float64.
        """
        tensors = [
            {
                "name": entry.name,
                "dtype": DTYPE_NAMES[entry.dtype],
                "shape": list(entry.shape),
                **self.numbers[entry.name].as_json(),
            }
            for entry in self.header.entries
        ]
        return {
            "file": str(self.path),
            "bytes": self.header.file_size,
            "payload_verified": False,
            "metadata": self.metadata,
            "tensors": tensors,
            "totals": {kind: {"tensors": part.tensors, **part.as_json()} for kind, part in self.totals().items()},
        }


def look_into(path: Path) -> Contents:
    """Read a file's header and look at every number behind it. Raises as `format.mapped` does."""
    header, arrays = format.mapped(path)
    return Contents(path, header, numbers_of(arrays))


def kind_of(name: str) -> str:
    """``optimizer.<slot>``, ``rng``, ``tokenizer``, or ``weights`` for everything else."""
    first, _, rest = name.partition(".")
    if first == "optimizer" and rest:
        return f"optimizer.{rest.partition('.')[0]}"
    return first if first in ("rng", "tokenizer") and rest else "weights"


def parsed_metadata(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Metadata with the JSON among them parsed. What is no sound JSON stays the string it is."""
    return {key: _parsed(text) if key in JSON_KEYS else text for key, text in metadata.items()}


def _parsed(text: str) -> Any:
    try:
        value = json.loads(text)
        if _is_shallow(value, _LEVELS):
            canonical_json(value)  # raises for NaN and infinities, which have no place in our own JSON
            return value
    except (ValueError, RecursionError):
        pass
    return text


def _is_shallow(value: Any, levels: int) -> bool:
    if not isinstance(value, dict | list):
        return True
    return levels > 0 and all(_is_shallow(part, levels - 1) for part in (value.values() if type(value) is dict else value))


def finite_or_none(number: Number | None) -> Number | None:
    """The number as JSON can hold it."""
    return number if number is not None and math.isfinite(number) else None
