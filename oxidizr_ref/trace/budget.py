"""How large the error of a correct program may be: measured, tensor by tensor, by doing the same steps in its precision.

Nobody can say beforehand what float32 does to the gradient of a decay rate. So the steps are done again in the precision in
question, in some ways that are all correct (`precision.probes`), and each tensor's largest and median distance from float64
are what that precision costs. A budget is many times that (`margin_of`), and never below some units in the last place.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from oxidizr_ref.backend import Array, to_host
from oxidizr_ref.trace.file import Record, Trace
from oxidizr_ref.trace.measure import Distance, Measuring, paired
from oxidizr_ref.trace.names import TOP_K
from oxidizr_ref.trace.precision import EPS, Probe, probes
from oxidizr_ref.trace.record import recorded, repeat
from oxidizr_ref.trace.writer import PIECE, TraceWriter

#: How much further than the probes another correct program may be. See docs/decisions/2026-11-26-error-budgets.md.
MARGIN = 16.0
#: With few numbers the errors of all probes may be small by luck: of n numbers, the margin is 1 + LUCK/n times as much.
LUCK = 5.0
#: Units in the last place of an array's largest (and median) number that are always granted.
LEAST = 4.0


@dataclass(frozen=True)
class Budget:
    """What is granted to one tensor: its largest error, and the median of its errors."""

    largest: float
    median: float

    def used(self, found: Distance) -> float:
        """How much of it a distance uses up: at most 1 is within."""
        if found.nans:
            return float("inf")
        return max(_over(found.max_abs, self.largest), _over(found.median, self.median))


def _over(error: float, granted: float) -> float:
    return error / granted if granted > 0 else 0.0 if error == 0 else float("inf")


class _Distances:
    """A sink that measures how far everything is from what ``truth`` holds under the same name."""

    def __init__(self, truth: Trace) -> None:
        self.truth = truth
        self._parts: dict[str, Measuring] = {}
        self._found: dict[str, Distance] = {}

    def add(self, record: Record, array: Array, times: float = 1.0) -> None:
        if record.name not in self.truth.records:
            return
        expected, where = self.truth.array(record.name), self.truth.indices(record.name)
        if record.op == TOP_K:
            return  # what this run would have chosen: it went on with the truth's
        host = to_host(array)
        if where is not None:
            host = np.asarray(host.reshape(-1)[where])
        measuring = Measuring(host.size, turns=is_angle(record.name))
        for start, a, b in paired(expected, host, PIECE):
            measuring.update(a, b if times == 1.0 else b * times, start)
        self._found[record.name] = measuring.result()
        self.truth.forget()

    def add_part(self, record: Record, array: Array, at: int, length: int) -> None:  # noqa: ARG002
        if record.name not in self.truth.records:
            return
        whole, where = self.truth.array(record.name), self.truth.indices(record.name)
        measuring = self._parts.setdefault(record.name, Measuring(whole.size))
        flat = to_host(array).reshape(-1)
        if where is None:
            measuring.update(whole[at].reshape(-1), flat, at * flat.size)
        else:
            first, last = np.searchsorted(where, (at * flat.size, (at + 1) * flat.size))
            measuring.update(whole[first:last], flat[where[first:last] - at * flat.size], int(first))
        self.truth.forget()

    def result(self) -> dict[str, Distance]:
        """The distances by name."""
        return self._found | {name: measuring.result() for name, measuring in self._parts.items()}


def is_angle(name: str) -> bool:
    """Whether the numbers of a name are angles, which whole turns do not change."""
    return name.endswith(".phi")


def distances(reference: Trace, ways: Iterable[Probe]) -> list[dict[str, Distance]]:
    """How far each way to do the steps is from float64, by name. Raises TraceError where they cannot be done again."""
    source = recorded(reference)
    with _truth(reference) as truth:
        results = []
        for probe in ways:
            sink = _Distances(truth)
            repeat(source, sink, probe)
            results.append(sink.result())
    return results


@contextmanager
def _truth(reference: Trace) -> Iterator[Trace]:
    """The steps of a trace in float64 on the plain side: the trace itself, if it is that."""
    if reference.precision == "f64" and reference.metadata.get("side") == "reference":
        yield reference
        return
    with tempfile.TemporaryDirectory(prefix="oxidizr-ref-trace-") as name:
        path = Path(name, "truth.safetensors")
        with TraceWriter(path, "f64", {"side": "reference"}) as writer:
            repeat(recorded(reference), writer, Probe("f64"))
        yield Trace(path)


def margin_of(size: int) -> float:
    """How many times the largest error of the probes is granted to a tensor of ``size`` numbers."""
    return MARGIN * (1 + LUCK / max(1, size))


def budgets(reference: Trace, precision: str, fused: bool = True) -> dict[str, Budget]:
    """What is granted to each tensor of a trace that is compared with one computed in ``precision``. fused: our own fast
    operations are among the correct ways (but not where they are what is judged).

    Takes about as long as three steps (and three more where the reference is not float64), and a step's memory.
    """
    granted: dict[str, Budget] = {}
    for kind in dict.fromkeys((precision, reference.precision)):
        if kind == "f64" and kind != precision:
            continue  # that error is nothing beside the other
        found = distances(reference, probes(kind, fused))
        for name in dict.fromkeys(name for of_probe in found for name in of_probe):
            of_probes = [of_probe[name] for of_probe in found if name in of_probe]
            scale, usual = of_probes[0].scale, of_probes[0].usual
            before = granted.get(name, Budget(0.0, 0.0))
            margin = margin_of(of_probes[0].size)
            largest = margin * max(d.max_abs for d in of_probes) + LEAST * EPS[kind] * scale
            median = margin * max(d.median for d in of_probes) + LEAST * EPS[kind] * usual
            # Where most numbers are zero, so is the median, which then says nothing.
            granted[name] = Budget(before.largest + largest, before.median + (median or largest))
    return granted
