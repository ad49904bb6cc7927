"""Where two checkpoints differ: in what they say, and number by number in what they hold.

Both files are proved first. A tensor whose proved digests are equal is equal; the others are read side by side, a few MiB at
a time. Numbers are compared by their bits, so that equal files, and no others, are called equal.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from oxidizr_ref import parallel
from oxidizr_ref.checkpoint import format
from oxidizr_ref.checkpoint.contents import PIECE, Number, finite_or_none, kind_of, parsed_metadata
from oxidizr_ref.checkpoint.format import HostArray
from oxidizr_ref.checkpoint.header import DTYPE_NAMES, Entry, Header
from oxidizr_ref.config import config_differences
from oxidizr_ref.errors import CheckpointError

# --- two arrays -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Distance:
    """How far two arrays of equal dtype and shape are apart.

    differing: elements whose bits differ; first: the first of them, counted in C order (None: there is none). So −0 and
    +0 differ, and a NaN equals a NaN of the same bits only.

    max_abs: the largest |a − b|, max_rel: the largest |a − b| / max(|b|, tiny), where tiny is the smallest normal number of
    the dtype; both computed in float64, for integers max_abs exactly (and there is no max_rel). Elements of equal bits are
    0 apart. Infinite where one is infinite, or where float64 overflows.

    max_ulp: the largest number of steps between neighbouring values of the dtype, exactly; None for integers. −0 and +0 are
    neighbours, one step apart; so are the largest finite number and infinity. Where zero is not crossed, this is the number
    of calls of `numpy.nextafter` that lead from a to b; where it is, one more. It is 0 only for equal bits.

    nans: elements that differ and hold a NaN in a or b. If there are any, max_abs and max_rel (and max_ulp as shown) are
    NaN: no distance leads to a NaN. `largest_ulp` leaves them out.
    """

    differing: int = 0
    first: int | None = None
    largest_abs: Number = 0
    largest_rel: float | None = None
    largest_ulp: int | None = None
    nans: int = 0

    @property
    def max_abs(self) -> Number:
        """See above."""
        return math.nan if self.nans else self.largest_abs

    @property
    def max_rel(self) -> float | None:
        """See above."""
        return math.nan if self.nans else self.largest_rel

    @property
    def max_ulp(self) -> int | None:
        """See above; None where it is not a number, too."""
        return None if self.nans else self.largest_ulp


def distance(a: HostArray, b: HostArray) -> Distance:
    """How far apart two arrays are, a piece of each in memory at a time on each thread."""
    assert a.dtype == b.dtype and a.shape == b.shape
    flat_a, flat_b = a.reshape(-1), b.reshape(-1)
    borders = [(i, min(i + PIECE, a.size)) for i in range(0, a.size, PIECE)]
    parts = [Distance()] * len(borders)

    def compare(index: int) -> None:
        i, j = borders[index]
        parts[index] = _distance_of_pieces(flat_a[i:j], flat_b[i:j], i)

    with np.errstate(all="ignore"):
        parallel.for_each(len(borders), compare)
    return _largest(parts)


def ulp_distance(a: HostArray, b: HostArray) -> HostArray:
    """The steps between neighbouring values from each number of ``a`` to its partner, exact unsigned integers.

    NaNs count as numbers beyond infinity. See `Distance`.
    """
    ordered_a, ordered_b = _ordered(a), _ordered(b)
    return np.maximum(ordered_a, ordered_b) - np.minimum(ordered_a, ordered_b)


def _bits(x: HostArray) -> HostArray:
    return x.view(f"u{x.dtype.itemsize}")


def _ordered(x: HostArray) -> HostArray:
    """Unsigned integers in the order of the numbers, neighbours one apart.

    The bits of positive numbers grow with them, those of negative ones the other way: these are inverted, and go below.
    """
    bits, width = _bits(x), 8 * x.dtype.itemsize
    if x.dtype.kind == "u":
        return bits
    top = np.array(1 << (width - 1), dtype=bits.dtype)
    flipped: HostArray = top
    if x.dtype.kind != "i":
        flipped = top | (bits.view(f"i{x.dtype.itemsize}") >> (width - 1)).view(bits.dtype)  # all bits of negative numbers
    ordered: HostArray = bits ^ flipped
    return ordered


def _distance_of_pieces(a: HostArray, b: HostArray, start: int) -> Distance:
    differs = np.flatnonzero(_bits(a) != _bits(b))
    if not differs.size:
        return Distance()
    count, first = differs.size, start + int(differs[0])
    a, b = a[differs], b[differs]
    if a.dtype.kind in "iu":
        return Distance(count, first, int(ulp_distance(a, b).max()))
    ulps = ulp_distance(a, b)
    exact_a, exact_b = a.astype(np.float64), b.astype(np.float64)
    is_nan = np.isnan(exact_a) | np.isnan(exact_b)
    nans = int(np.count_nonzero(is_nan))
    if nans == count:
        return Distance(count, first, nans=nans)
    absolute = np.abs(exact_a - exact_b)
    relative = absolute / np.maximum(np.abs(exact_b), _tiny(a.dtype))
    relative[np.isinf(absolute)] = np.inf  # not NaN: an infinite number is infinitely far from a finite one
    is_number = ~is_nan
    return Distance(
        count,
        first,
        float(absolute[is_number].max()),
        float(relative[is_number].max()),
        int(ulps[is_number].max()),
        nans,
    )


def _tiny(dtype: np.dtype[Any]) -> float:
    return float(ml_dtypes.finfo(dtype).smallest_normal)  # type: ignore[no-untyped-call]


def _largest(parts: Sequence[Distance]) -> Distance:
    found = [part for part in parts if part.differing]
    return Distance(
        sum(part.differing for part in found),
        found[0].first if found else None,
        max((part.largest_abs for part in found), default=0),
        max((part.largest_rel for part in found if part.largest_rel is not None), default=None),
        max((part.largest_ulp for part in found if part.largest_ulp is not None), default=None),
        sum(part.nans for part in found),
    )


# --- two files --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Change:
    """What is not the same: a dotted key of the metadata, or a tensor's name, and both values (None: there is none)."""

    key: str
    a: Any
    b: Any


@dataclass(frozen=True)
class TensorDifference:
    """A tensor that both files hold, of equal dtype and shape, with other numbers."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    distance: Distance

    @property
    def elements(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)

    @property
    def first_index(self) -> tuple[int, ...]:
        """Where the first number that differs is."""
        return tuple(int(i) for i in np.unravel_index(self.distance.first or 0, self.shape))


@dataclass(frozen=True)
class Difference:
    """What differs between two files; everything by name. ``first``: the first tensor in file order that does."""

    a: Path
    b: Path
    weights_only: bool
    compared: int  # tensors of equal name, dtype and shape
    elements: int  # in these
    metadata: list[Change]
    only_a: list[str]
    only_b: list[str]
    kinds: list[Change]  # tensors of another dtype or shape
    tensors: list[TensorDifference]
    first: str | None

    @property
    def equal(self) -> bool:
        """Whether nothing that was compared differs. Without ``weights_only`` the files are then equal byte for byte."""
        return self.first is None and not self.metadata

    def as_json(self) -> dict[str, Any]:
        """All of it, as ``diff --json`` prints it:

        =============================  =================================================================================
        ``a``, ``b``                   the paths of the files
        ``equal``, ``weights_only``    true or false
        ``compared``, ``elements``     tensors of equal name, dtype and shape; numbers in these
        ``metadata``                   a list of ``key``, ``a``, ``b``: keys below ``config``, ``progress`` and so on are
                                       dotted, values are null where a file has none
        ``only_a``, ``only_b``         names of tensors that the other file does not hold
        ``kinds``                      a list of ``name``, ``a``, ``b``: tensors whose dtype or shape differs
        ``tensors``                    a list of ``name``, ``dtype``, ``shape``, ``elements``, ``differing``, ``nans``,
                                       ``first_index``, ``max_abs``, ``max_rel``, ``max_ulp``: see `Distance`; null
                                       where they are not finite, or not defined
        ``first``                      the first tensor in file order that differs in any way, or null
        =============================  =================================================================================
        """
        return {
            "a": str(self.a),
            "b": str(self.b),
            "equal": self.equal,
            "weights_only": self.weights_only,
            "compared": self.compared,
            "elements": self.elements,
            "metadata": [{"key": change.key, "a": change.a, "b": change.b} for change in self.metadata],
            "only_a": self.only_a,
            "only_b": self.only_b,
            "kinds": [{"name": change.key, "a": change.a, "b": change.b} for change in self.kinds],
            "tensors": [_as_json(found) for found in self.tensors],
            "first": self.first,
        }


def _as_json(found: TensorDifference) -> dict[str, Any]:
    return {
        "name": found.name,
        "dtype": found.dtype,
        "shape": list(found.shape),
        "elements": found.elements,
        "differing": found.distance.differing,
        "nans": found.distance.nans,
        "first_index": list(found.first_index),
        "max_abs": finite_or_none(found.distance.max_abs),
        "max_rel": finite_or_none(found.distance.max_rel),
        "max_ulp": found.distance.max_ulp,
    }


def compare(a: Path, b: Path, *, weights_only: bool = False) -> Difference:
    """Prove both files, then say where they differ. ``weights_only``: neither metadata nor tensors ``optimizer.*`` count.

    Raises as `format.verify` does.
    """
    header_a, arrays_a = _proved(a)
    header_b, arrays_b = _proved(b)
    entries_a, entries_b = _entries(header_a, weights_only), _entries(header_b, weights_only)
    both = [entry for name, entry in entries_a.items() if name in entries_b]
    alike = [entry for entry in both if _kind(entry) == _kind(entries_b[entry.name])]
    tensors = []
    for entry in alike:
        name = entry.name
        if header_a.digests[name] != header_b.digests[name]:
            found = distance(arrays_a[name], arrays_b[name])
            tensors.append(TensorDifference(name, DTYPE_NAMES[entry.dtype], entry.shape, found))
    kinds = [
        Change(entry.name, _kind(entry), _kind(entries_b[entry.name]))
        for entry in both
        if _kind(entry) != _kind(entries_b[entry.name])
    ]
    only_a, only_b = entries_a.keys() - entries_b.keys(), entries_b.keys() - entries_a.keys()
    differing = only_a | only_b | {change.key for change in kinds} | {found.name for found in tensors}
    entries = {**entries_b, **entries_a}
    return Difference(
        a=a,
        b=b,
        weights_only=weights_only,
        compared=len(alike),
        elements=sum(math.prod(entry.shape) for entry in alike),
        metadata=[] if weights_only else metadata_differences(header_a.metadata, header_b.metadata),
        only_a=sorted(only_a),
        only_b=sorted(only_b),
        kinds=sorted(kinds, key=lambda change: change.key),
        tensors=sorted(tensors, key=lambda found: found.name),
        first=min(differing, key=lambda name: (-entries[name].dtype.itemsize, name), default=None),
    )


def _proved(path: Path) -> tuple[Header, dict[str, HostArray]]:
    proved = format.verify(path)
    header, arrays = format.mapped(path)
    if header != proved:
        raise CheckpointError(f"{path}: became another file while it was read; compare again")
    return header, arrays


def _entries(header: Header, weights_only: bool) -> dict[str, Entry]:
    return {
        entry.name: entry for entry in header.entries if not (weights_only and kind_of(entry.name).startswith("optimizer."))
    }


def _kind(entry: Entry) -> str:
    return f"{DTYPE_NAMES[entry.dtype]} {list(entry.shape)}"


def metadata_differences(a: Mapping[str, str], b: Mapping[str, str]) -> list[Change]:
    """Where the metadata of two files differ, by key; below the keys that hold JSON objects, by dotted key."""
    parsed_a, parsed_b = parsed_metadata(a), parsed_metadata(b)
    changes: list[Change] = []
    for key in sorted(key for key in a.keys() | b.keys() if a.get(key) != b.get(key)):
        old, new = parsed_a.get(key), parsed_b.get(key)
        inside = config_differences(old, new) if isinstance(old, Mapping) and isinstance(new, Mapping) else []
        if inside:
            changes += [Change(f"{key}.{name}", *values) for name, *values in inside]
        elif old == new:  # one value, written in two ways
            changes.append(Change(key, a.get(key), b.get(key)))
        else:
            changes.append(Change(key, old, new))
    return changes
