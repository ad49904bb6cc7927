"""How far two arrays are apart, piece by piece, so that neither has to fit into memory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from oxidizr_ref.checkpoint.difference import ulp_distance

HostArray = np.ndarray[Any, Any]

#: Where we have -inf, masked, anything down from this is as good: programs mask with -1e9, or in f16 with -65504.
MASKED = -1e4
#: Of how many numbers of an array, evenly spread, the median is taken.
MEDIAN_OF = 1 << 16


@dataclass(frozen=True)
class Distance:
    """How far ``b`` is from ``a``.

    max_abs: the largest |a - b|, at ``where``: an index in C order, of several as far apart the first. max_rel: that over
    the largest |a|. scale: the largest |a|. median, usual: the medians of |a - b| and of |a| over the elements where a is
    neither 0 nor infinite (whole triangles and rows of zeros would hide the others). max_ulp: the largest number of steps
    between neighbouring values of the precision compared in. cosine: of the angle between a and b; factor: what a is best
    multiplied by to give b; NaN where squares overflow. nans: how many elements are NaN in either, or infinite in one and
    not in the same way in the other; of integers, how many differ. beyond: how many elements are further apart than a limit,
    and first, the first of them. size: how many there are. reach: of a parameter after AdamW, how far a correct program may
    be led astray by errors of its moments (`trace.budget`); else 0.
    """

    max_abs: float = 0.0
    max_rel: float = 0.0
    median: float = 0.0
    scale: float = 0.0
    usual: float = 0.0
    max_ulp: int = 0
    cosine: float = 1.0
    factor: float = 1.0
    nans: int = 0
    where: int = 0
    values: tuple[float, float] = (0.0, 0.0)  # a and b there
    beyond: int = 0
    first: int | None = None
    size: int = 0
    reach: float = 0.0


@dataclass
class Measuring:
    """Takes the pieces of two arrays in any order. ``size``: of the whole; ``ulp``: the dtype whose steps are counted.

    turns: numbers are angles, equal where whole turns apart. limit: see `Distance.beyond`.
    """

    size: int
    ulp: np.dtype[Any] | None = None
    turns: bool = False
    limit: float = math.inf
    max_abs: float = 0.0
    scale: float = 0.0
    max_ulp: int = 0
    nans: int = 0
    where: int = 0
    values: tuple[float, float] = (0.0, 0.0)
    beyond: int = 0
    first: int | None = None
    products: list[tuple[float, float, float]] = field(default_factory=list)
    sampled: list[tuple[HostArray, HostArray]] = field(default_factory=list)

    def update(self, a: HostArray, b: HostArray, start: int) -> None:
        """Take elements ``start`` and following of both, 1-D."""
        if a.dtype.kind in "iub" or b.dtype.kind in "iub":
            differs = a != b
            self.nans += int(np.count_nonzero(differs))
            self._count_beyond(differs, start)
            if differs.any():
                self._largest(1.0, start + int(differs.argmax()), a, b, start)
            return
        with np.errstate(all="ignore"):
            self._update(a, b, start)

    def _update(self, a: HostArray, b: HostArray, start: int) -> None:
        ulps = None if self.ulp is None else ulp_distance(a.astype(self.ulp), b.astype(self.ulp))
        a, b = a.astype(np.float64, copy=False), b.astype(np.float64, copy=False)
        given, apart = (a, b), np.abs(a - b)
        if self.turns:
            apart = np.where(np.isinf(apart), apart, np.abs(apart - 2 * math.pi * np.round(apart / (2 * math.pi))))
        finite = np.isfinite(a) & np.isfinite(b)
        if not finite.all():
            alike = (a == b) | (np.isneginf(a) & (b <= MASKED))
            self.nans += int(np.count_nonzero(~finite & ~alike))
            apart[~finite] = np.where(alike, 0.0, np.inf)[~finite]
            a, b = np.where(finite, a, 0.0), np.where(finite, b, 0.0)
            ulps = None if ulps is None else np.where(finite, ulps, 0)
        self._count_beyond(apart > self.limit, start)
        magnitude = np.abs(a)
        if apart.size:
            at = int(apart.argmax())
            self._largest(float(apart[at]), start + at, *given, start)
            self.scale = max(self.scale, float(magnitude.max()))
            if ulps is not None:
                self.max_ulp = max(self.max_ulp, int(ulps.max()))
        self.products.append((float(a @ b), float(a @ a), float(b @ b)))
        step = -(-self.size // MEDIAN_OF) or 1
        first = -start % step
        apart, magnitude = apart[first::step], magnitude[first::step]
        self.sampled.append((apart[magnitude > 0], magnitude[magnitude > 0]))

    def _count_beyond(self, beyond: HostArray, start: int) -> None:
        count = int(np.count_nonzero(beyond))
        if count:
            at = start + int(beyond.argmax())
            self.beyond, self.first = self.beyond + count, at if self.first is None else min(self.first, at)

    def _largest(self, apart: float, at: int, a: HostArray, b: HostArray, start: int) -> None:
        if apart > self.max_abs or (apart == self.max_abs > 0 and at < self.where):
            self.max_abs, self.where = apart, at
            self.values = float(a[at - start]), float(b[at - start])

    def result(self) -> Distance:
        """What all pieces together say."""
        with np.errstate(over="ignore"):
            columns = (np.concatenate(column) for column in zip(*(self.sampled or [(np.zeros(0),) * 2]), strict=True))
            median, usual = (float(np.median(column)) if column.size else 0.0 for column in columns)
        ab, aa, bb = (_total(column) for column in zip(*(self.products or [(0.0, 0.0, 0.0)]), strict=True))
        zero = aa == 0.0 or bb == 0.0
        cosine = (1.0 if aa == bb else 0.0) if zero else ab / math.sqrt(aa) / math.sqrt(bb)
        return Distance(
            max_abs=self.max_abs,
            max_rel=self.max_abs / self.scale if self.scale else math.inf if self.max_abs else 0.0,
            median=median,
            scale=self.scale,
            usual=usual,
            max_ulp=self.max_ulp,
            cosine=float(np.clip(cosine, -1.0, 1.0)),  # beyond: by rounding, or where squares all but vanish
            factor=ab / aa if aa else 1.0,
            nans=self.nans,
            where=self.where,
            values=self.values,
            beyond=self.beyond,
            first=self.first,
            size=self.size,
        )


def _total(numbers: Iterable[float]) -> float:
    """The sum, whatever the order; NaN where anything overflows."""
    try:
        total = math.fsum(numbers)
    except (OverflowError, ValueError):  # ValueError: infinities of both signs
        return math.nan
    return total if math.isfinite(total) else math.nan


def paired(a: HostArray, b: HostArray, size: int) -> Iterator[tuple[int, HostArray, HostArray]]:
    """Two arrays of equal size cut alike: (first element, of a, of b), each piece contiguous."""
    flat_a, flat_b = (x.reshape(-1) if x.flags.c_contiguous else x.flat for x in (a, b))
    for i in range(0, a.size, size):
        yield i, np.asarray(flat_a[i : i + size]), np.asarray(flat_b[i : i + size])


def distance(
    a: HostArray, b: HostArray, ulp: np.dtype[Any] | None = None, turns: bool = False, limit: float = math.inf
) -> Distance:
    """How far ``b`` is from ``a``, arrays of equal size. See `Measuring`."""
    measuring = Measuring(a.size, ulp, turns, limit)
    for start, piece_a, piece_b in paired(a, b, 1 << 18):
        measuring.update(piece_a, piece_b, start)
    return measuring.result()
