"""Where another program's numbers first depart from ours.

Tensors are aligned by name, in the order of execution. Each is measured, and held against its budget. One that is outside it
although everything it was computed from is inside is where a fault lies: the first such one is reported, with its inputs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from oxidizr_ref.backend import STORAGE_DTYPES
from oxidizr_ref.config import Config, ModelConfig
from oxidizr_ref.errors import TraceError
from oxidizr_ref.trace.budget import Budget, budgets, is_angle
from oxidizr_ref.trace.file import HostArray, Record, Trace, role_of
from oxidizr_ref.trace.mapping import Mapped, NameMap, load_map
from oxidizr_ref.trace.measure import Distance, distance
from oxidizr_ref.trace.names import TOP_K, layer_of, meaning, nearest, parse
from oxidizr_ref.trace.precision import PRECISIONS
from oxidizr_ref.trace.torch_recorder import as_numpy

#: Verdicts on one tensor: within its budget; outside it, or of another shape; a tie of a router broken the other way, within
#: rounding; not judged, since it lies behind such a tie; not equal, and no budget is known.
AGREES, DIFFERS, TIE, BEHIND_TIE, NO_BUDGET = "agrees", "differs", "tie", "behind a tie", "no budget"


@dataclass(frozen=True)
class Compared:
    """One tensor that both have. used: how much of its budget its error uses up; inputs: of those compared, the nearest."""

    record: Record
    distance: Distance
    budget: Budget | None
    used: float
    verdict: str
    inputs: tuple[str, ...]
    problem: str = ""

    @property
    def name(self) -> str:
        """The name, ours."""
        return self.record.name

    def index(self, at: int) -> list[int]:
        """Where element ``at``, counted in C order, stands in the array."""
        return [int(i) for i in np.unravel_index(at, self.record.shape)] if self.record.size else []

    def as_json(self) -> dict[str, Any]:
        """All that is known, JSON-able: numbers that are not finite are null."""
        d, granted = self.distance, self.budget or Budget(0.0, 0.0)
        numbers = {"max_abs": d.max_abs, "max_rel": d.max_rel, "median": d.median, "cosine": d.cosine, "factor": d.factor}
        numbers |= {"used": self.used, "budget": granted.largest, "budget_median": granted.median}
        return {
            "name": self.name,
            "op": self.record.op,
            "layer": self.record.layer,
            "role": self.record.role,
            "shape": list(self.record.shape),
            "verdict": self.verdict,
            "inputs": list(self.inputs),
            "max_ulp": d.max_ulp,
            "nans": d.nans,
            "where": self.index(d.where),
            "beyond": d.beyond,
            "first": None if d.first is None else self.index(d.first),
            "problem": self.problem,
            **{key: float(value) if np.isfinite(value) else None for key, value in numbers.items()},
        }


@dataclass(frozen=True)
class Comparison:
    """What `compare` found. tensors: all that both have, in the order of execution, by name.

    missing: names that only the reference has; strange: names of the other that mean nothing here.
    """

    reference: str
    other: str
    precision: str
    tensors: dict[str, Compared]
    missing: list[str]
    strange: list[str]

    @property
    def agrees(self) -> bool:
        """Whether all that was compared is within its budget, and nothing stayed undecided."""
        return all(found.verdict == AGREES for found in self.tensors.values())

    @property
    def first(self) -> Compared | None:
        """The first tensor, in the order of execution, that is outside its budget."""
        return next((found for found in self.tensors.values() if found.verdict == DIFFERS), None)

    @property
    def origins(self) -> list[Compared]:
        """All tensors outside their budgets whose inputs are inside: each a fault of its own, the first one first."""
        return [
            found
            for found in self.tensors.values()
            if found.verdict == DIFFERS and all(self.tensors[name].verdict == AGREES for name in found.inputs)
        ]

    @property
    def exit_code(self) -> int:
        """0: agrees; 1: differs; 3: nothing differs, but something is undecided, as behind a tie of a router."""
        return 1 if self.first is not None else 0 if self.agrees else 3

    def as_json(self) -> dict[str, Any]:
        """All of it: what `trace compare --json` prints."""
        return {
            "reference": self.reference,
            "other": self.other,
            "precision": self.precision,
            "agrees": self.agrees,
            "first": self.first.name if self.first else None,
            "origins": [found.name for found in self.origins],
            "missing": self.missing,
            "strange": self.strange,
            "tensors": [found.as_json() for found in self.tensors.values()],
        }


class _Arrays:
    """Arrays in memory, NumPy's or PyTorch's, in place of the other trace."""

    path = Path("the arrays given")

    def __init__(self, arrays: Mapping[str, Any]) -> None:
        self._arrays = {name: as_numpy(array) for name, array in arrays.items()}
        self.records = {
            name: Record(name, role_of(name), array.shape, layer=layer_of(name)) for name, array in self._arrays.items()
        }
        floats = [str(array.dtype) for array in self._arrays.values() if array.dtype.kind not in "iub"]
        names = {str(dtype): name for name, dtype in STORAGE_DTYPES.items()}
        self.precision = names.get(max(sorted(set(floats)), key=floats.count, default="float32"), "f32")

    def array(self, name: str) -> HostArray:
        return self._arrays[name]

    def indices(self, _name: str) -> HostArray | None:
        return None

    def forget(self) -> None:
        """They are in memory anyway."""


def compare(
    reference: Trace | str | Path,
    other: Trace | str | Path | Mapping[str, Any],
    names: NameMap | str | Path | None = None,
    precision: str | None = None,
    tolerance: float | None = None,
    granted: Mapping[str, Budget] | None = None,
) -> Comparison:
    """Hold the numbers of another program, all or some of them, against those of a reference trace.

    other: a trace, or arrays by name. names: a map of names, a file of one, or the name of one that is shipped. precision:
    what the other computed in (default: what its file says). tolerance: instead of budgets, the largest error over the
    largest number of each tensor that is granted. granted: budgets that are known already.

    Raises TraceError where nothing can be compared.
    """
    reference = reference if isinstance(reference, Trace) else Trace(reference)
    theirs = other if isinstance(other, Trace) else _Arrays(other) if isinstance(other, Mapping) else Trace(other)
    precision = precision or theirs.precision
    if precision not in PRECISIONS:
        raise TraceError(f"{theirs.path}: precision {precision}: expected one of {', '.join(PRECISIONS)} (--precision)")
    if not isinstance(names, NameMap):
        names = load_map(names, _model_of(reference)) if names is not None else NameMap([], {})
    if tolerance is None and granted is None:
        granted = budgets(reference, precision)
    return _Comparing(reference, theirs, names, precision, tolerance, granted or {}).run()


def _model_of(reference: Trace) -> ModelConfig | None:
    return Config.from_canonical(json.loads(reference.metadata["config"])).model if "config" in reference.metadata else None


@dataclass
class _Comparing:
    reference: Trace
    other: Trace | _Arrays
    names: NameMap
    precision: str
    tolerance: float | None
    granted: Mapping[str, Budget]
    found: dict[str, Compared] = field(default_factory=dict)

    def run(self) -> Comparison:
        theirs = {str(parse(name)): name for name in self.other.records if not name.startswith("sample.")}
        missing, used = [], set()
        for record in self.reference.records.values():
            mapped = self.names[record.name]
            if mapped.name not in theirs:
                missing.append(record.name)
                continue
            used.add(mapped.name)
            found = self._judge(record, theirs[mapped.name], mapped)
            if found is None:
                missing.append(record.name)
            else:
                self.found[record.name] = found
            self.reference.forget()
            self.other.forget()
        if not self.found:
            some = ", ".join(sorted(theirs)[:3])
            hint = "; --map says how names correspond" if theirs else ""
            raise TraceError(
                f"{self.other.path}: no name of it is known to {self.reference.path} (it has {some or 'none'}){hint}"
            )
        strange = sorted(theirs[name] for name in theirs.keys() - used)
        return Comparison(str(self.reference.path), str(self.other.path), self.precision, self.found, missing, strange)

    def _judge(self, record: Record, their_name: str, mapped: Mapped) -> Compared | None:
        """None where both have samples, and no number is in both."""
        inputs = self._nearest(record)
        a, b = self.reference.array(record.name), self.other.array(their_name)
        where_a, where_b = self.reference.indices(record.name), self.other.indices(their_name)
        if where_b is None:
            b = mapped(b)
        elif mapped.steps:
            raise TraceError(
                f"{self.other.path}: {their_name} is a sample, to which the map's {mapped.steps[0]} cannot be done; "
                "record all of it"
            )
        problem = self._alike(record, their_name, b, where_b is not None)
        if problem:
            found = Distance(max_abs=float("inf"), nans=1)
            return self._verdict(record, found, inputs, problem)
        where = where_b if where_a is None else where_a
        if where_a is not None and where_b is not None:
            where, of_a, of_b = np.intersect1d(where_a, where_b, return_indices=True)
            a, b = a[of_a], b[of_b]
        elif where_a is not None:
            b = np.asarray(b.reshape(-1)[where_a])
        elif where_b is not None:
            a = np.asarray(a.reshape(-1)[where_b])
        if not a.size and record.size:
            return None
        ulp = STORAGE_DTYPES["f32" if self.precision == "tf32" else self.precision]
        integers = a.dtype.kind in "iub" or b.dtype.kind in "iub"
        granted = self.granted.get(record.name)
        limit = granted.largest if granted is not None else math.inf
        found = distance(a, b, None if integers else ulp, is_angle(record.name), limit)
        if where is not None:
            first = None if found.first is None else int(where[found.first])
            found = replace(found, where=int(where[found.where]), first=first)
        return self._verdict(record, found, inputs, "", a, b, where)

    def _alike(self, record: Record, their_name: str, b: HostArray, sampled: bool) -> str:
        """What is wrong with the shape of theirs; axes may be merged or split, but not exchanged."""
        theirs = self.other.records[their_name].shape if sampled else b.shape
        ours = record.shape
        merged = _borders(ours) <= _borders(theirs) or _borders(theirs) <= _borders(ours)
        if merged and math.prod(ours) == math.prod(theirs):
            return ""
        exchanged = " (axes exchanged? a map can permute them)" if sorted(ours) == sorted(theirs) else ""
        return f"shape {list(theirs)} where {list(ours)} is expected{exchanged}"

    def _nearest(self, record: Record) -> tuple[str, ...]:
        """The inputs that were compared; in place of one that was not, those it was computed from."""
        records = self.reference.records
        return nearest(record.inputs, self.found, lambda name: records[name].inputs if name in records else ())

    def _verdict(
        self,
        record: Record,
        found: Distance,
        inputs: tuple[str, ...],
        problem: str,
        a: Any = None,
        b: Any = None,
        where: HostArray | None = None,
    ) -> Compared:
        budget = self.granted.get(record.name)
        if self.tolerance is not None:
            budget = Budget(self.tolerance * found.scale, float("inf"))
        used = (budget or Budget(0.0, 0.0)).used(found)
        verdict = AGREES if used <= 1 else NO_BUDGET if budget is None and not found.nans else DIFFERS
        verdicts = {self.found[name].verdict for name in inputs}
        if verdicts & {TIE, BEHIND_TIE}:
            verdict = BEHIND_TIE
        elif verdict == DIFFERS and record.op == TOP_K and not problem and self._is_tie(record, a, b, where):
            verdict = TIE
        return Compared(record, found, budget, used, verdict, inputs, problem)

    def _is_tie(self, record: Record, a: HostArray, b: HostArray, where: HostArray | None) -> bool:
        """Whether experts were chosen otherwise only where their logits are equal within rounding, but not equal.

        where: where a and b stand in the whole, if they are a sample.
        """
        logits_name = next((name for name in record.inputs if name in self.reference.records), None)
        compared = self.found.get(logits_name or "")
        granted = compared.budget if compared is not None else self.granted.get(logits_name or "")
        if logits_name is None or granted is None or self.reference.indices(logits_name) is not None:
            return False
        logits = self.reference.array(logits_name).reshape(-1, self.reference.records[logits_name].shape[-1])
        places = np.arange(record.size) if where is None else where
        tokens = places // record.shape[-1]
        with np.errstate(invalid="ignore"):
            a, b = (x.reshape(-1).astype(np.int64) for x in (a, b))
        if b.min() < 0 or b.max() >= logits.shape[1]:
            return False
        apart = np.abs(logits[tokens, a] - logits[tokens, b])[a != b]
        return bool((apart <= 2 * granted.largest).all() and (apart > 0).all())


def _borders(shape: tuple[int, ...]) -> set[int]:
    """The products of the first axes: one shape comes from another by merging axes if its products are among those."""
    products = {1}
    total = 1
    for length in shape:
        total *= length
        products.add(total)
    return products if total else {0}


def equation_of(record: Record) -> str:
    """How a tensor is computed, in a line."""
    found = meaning(record.name)
    if parse(record.name).end == ".grad" or found is None:
        return record.op
    return f"{found.op}: {found.equation}"
