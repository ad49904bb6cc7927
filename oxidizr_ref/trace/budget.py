"""How large the error of a correct program may be: measured, tensor by tensor, by doing the same steps in its precision.

Nobody can say beforehand what float32 does to the gradient of a decay rate. So the steps are done again in the precision in
question, in some ways that are all correct (`precision.probes`), and each tensor's largest and median distance from float64
are what that precision costs. A budget is many times that (`margin_of`), and never below some units in the last place.

Of a parameter after a step of AdamW that is not enough. The step is a quotient, as long for a gradient of 1e-9 as for one of
1, so an element whose gradient is no larger than its rounding error may go either way. The few probes may all have gone the
right one. So what their moments are off is propagated through the formula, too, element by element (`_Distances._change`).
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from oxidizr_ref.backend import Array, to_host
from oxidizr_ref.config import TrainerConfig
from oxidizr_ref.trace.file import HostArray, Record, Trace
from oxidizr_ref.trace.measure import Distance, Measuring, paired
from oxidizr_ref.trace.names import TOP_K, Name, parse
from oxidizr_ref.trace.precision import EPS, Probe, probes
from oxidizr_ref.trace.record import recorded, repeat
from oxidizr_ref.trace.writer import PIECE, TraceWriter

#: How much further than the probes another correct program may be. See docs/decisions/2026-11-26-error-budgets.md.
MARGIN = 16.0
#: With few numbers the errors of all probes may be small by luck: of n numbers, the margin is 1 + LUCK/n times as much.
LUCK = 5.0
#: Units in the last place of an array's largest (and median) number that are always granted.
LEAST = 4.0
#: Ends of the names of AdamW's moments m and v.
_M, _V = "optimizer.exp_avg", "optimizer.exp_avg_sq"


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

    def __init__(self, truth: Trace, trainer: TrainerConfig) -> None:
        self.truth, self.trainer = truth, trainer
        self._parts: dict[str, Measuring] = {}
        self._found: dict[str, Distance] = {}
        self._changes: dict[tuple[str, str], float] = {}  # of a parameter's m and v, in this step
        self._reach: dict[str, float] = {}  # of a parameter, of all steps so far

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
        found, name = measuring.result(), parse(record.name)
        with suppress(KeyError):  # a trace need not hold what AdamW's steps are judged by
            if name.end in (_M, _V):
                self._changes[name.path, name.end] = self._change(name, expected, host)
            elif name.end == ".after":
                self._reach[name.path] = self._reach.get(name.path, 0.0) + self._reach_of_a_step(name, host.size)
                found = replace(found, reach=self._reach[name.path])
        self._found[record.name] = found
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

    def _change(self, name: Name, expected: HostArray, host: HostArray) -> float:
        """The largest |Δm̂| / (√v̂ + ε) of a first moment, |Δ√v̂| / (√v̂ + ε) of a second; v̂ without Δ is the truth's.

        A step of update n is ``lr u``, ``u = m̂ / (√v̂ + ε)``, and ``|u| ≤ R`` (`largest_step`). With m̂' and v̂' it is off by

            u' - u = Δm̂ / (√v̂ + ε) - u' Δ√v̂ / (√v̂ + ε),    |u' - u| ≤ min(2R, (|Δm̂| + R |Δ√v̂|) / (√v̂ + ε)).

        That holds for errors of any size, whatever v̂' is. Both m̂ and √v̂ (a norm) follow the errors of the gradients
        linearly at most, so that a margin on those is one on Δm̂ and Δ√v̂.
        """
        (beta1, beta2), n, largest = self.trainer.betas, name.step, 0.0
        root = math.sqrt(1 - beta2**n)
        v = self.truth.array(str(name._replace(end=_V))).reshape(-1)
        for start, a, b in paired(expected, host, PIECE):
            b = b.astype(np.float64)
            apart = np.abs(a - b) / (1 - beta1**n) if name.end == _M else np.abs(np.sqrt(a) - np.sqrt(b)) / root
            largest = max(largest, float((apart / (np.sqrt(v[start : start + PIECE]) / root + self.trainer.eps)).max()))
        return largest

    def _reach_of_a_step(self, name: Name, size: int) -> float:
        """How far a step may lead a parameter astray if its moments are off by the margin times what they are here."""
        rate = float(self.truth.array(str(Name(name.step, 1, "learning_rate", ""))))
        most = largest_step(name.step, self.trainer.betas)
        m, v = (self._changes[name.path, moment] for moment in (_M, _V))
        return rate * min(2 * most, margin_of(size) * (m + most * v))

    def result(self) -> dict[str, Distance]:
        """The distances by name."""
        return self._found | {name: measuring.result() for name, measuring in self._parts.items()}


def largest_step(n: int, betas: tuple[float, float]) -> float:
    """R, how many times √v̂ the |m̂| of update ``n`` may be.

    They are ``Σ a_k g_k`` and ``√(Σ b_k g_k²)`` over the gradients so far, and ``R² = Σ a_k² / b_k`` (Cauchy, Schwarz).
    """
    a, b = ((1 - beta) * beta ** np.arange(n) / (1 - beta**n) for beta in betas)
    return float(np.sqrt((a * a / np.maximum(b, 1e-300)).sum()))  # some b are 0 where β₂ is


def is_angle(name: str) -> bool:
    """Whether the numbers of a name are angles, which whole turns do not change."""
    return name.endswith(".phi")


def distances(reference: Trace, ways: Iterable[Probe]) -> list[dict[str, Distance]]:
    """How far each way to do the steps is from float64, by name. Raises TraceError where they cannot be done again."""
    source = recorded(reference)
    with _truth(reference) as truth:
        results = []
        for probe in ways:
            sink = _Distances(truth, source.config.trainer)
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
            largest += max(d.reach for d in of_probes)
            median = margin * max(d.median for d in of_probes) + LEAST * EPS[kind] * usual
            # Where most numbers are zero, so is the median, which then says nothing.
            granted[name] = Budget(before.largest + largest, before.median + (median or largest))
    return granted
