"""The numbers of a page: what its script draws from. Columns of float32 and float64, base64 of their little-endian bytes."""

from __future__ import annotations

import base64
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, TypeAlias

import numpy as np

from oxidizr_ref.checkpoint.records import Record, curve, number
from oxidizr_ref.report.histograms import Histograms
from oxidizr_ref.report.run_directory import RunDirectory
from oxidizr_ref.report.text import visible

#: Curves as the page has them: ``axes``, the steps (float64); by key, which of the axes, and the values (float32).
Columns: TypeAlias = dict[str, Any]

#: Pictures of curves: title, unit, and the keys drawn in it with their names.
_KNOWN: list[tuple[str, str, dict[str, str]]] = [
    ("Loss", "nats a token", {"loss": "training", "eval_loss": "held out"}),
    ("Learning rate", "", {"learning_rate": ""}),
    ("Gradient norm", "before clipping", {"grad_norm": ""}),
    ("Steps a second", "", {"it/s": ""}),
    ("Tokens a second", "", {"tokens/s": ""}),
    ("Memory", "MB held", {"memory_mb": ""}),
    ("Balance loss", "1 is even", {"balance_loss": ""}),
]
_NOT_DRAWN = {"step", "epoch", "final"}  # the axis, a line in the step, a mark
_ENTROPY = "expert_entropy"
_LOAD = "expert_load"
_MOST_COLUMNS = 240  # of a heat map


def page_data(runs: Sequence[RunDirectory], spreads: Sequence[Mapping[str, Mapping[str, Histograms]]]) -> dict[str, Any]:
    """All that the script draws. spreads: of each run, `histograms` of its checkpoints `chosen`."""
    charts = _charts(runs)
    keys = [key for chart in charts for key, _ in chart["curves"]]
    return {
        "charts": charts,
        "runs": [
            {
                "name": visible(run.name),
                "curves": _curves(run.records, keys),
                "branches": [_curves(branch.records, ["loss", "eval_loss"]) for branch in run.branches],
                "changes": _changes(run),
                "experts": _experts(run),
                "histograms": _histograms(run, spread),
            }
            for run, spread in zip(runs, spreads, strict=True)
        ],
    }


def _charts(runs: Sequence[RunDirectory]) -> list[dict[str, Any]]:
    """Those with something in them: the known ones, any other number that was logged, the entropies of the routers."""
    logged = {key: None for run in runs for record in run.records for key in record}
    drawn = {key for key in logged if any(curve(run.records, key) for run in runs)} - _NOT_DRAWN
    known = {key for _, _, names in _KNOWN for key in names}
    idle = {"dropped_tokens"} if not any(v for run in runs for _, v in curve(run.records, "dropped_tokens")) else set()
    others = [(visible(key.replace("_", " ").capitalize()), "", {key: ""}) for key in sorted(drawn - known - idle)]
    charts = [
        {"title": title, "unit": unit, "curves": [[key, name] for key, name in names.items() if key in drawn]}
        for title, unit, names in [*_KNOWN, *others]
    ]
    routers = max(_routers(run.records, _ENTROPY) for run in runs)
    entropies = [[f"{_ENTROPY}.{index}", mixture_name(runs, index)] for index in range(routers)]
    charts.append({"title": "Entropy of expert load", "unit": "1 is even, 0 is one expert alone", "curves": entropies})
    return [chart for chart in charts if chart["curves"]]


def mixture_name(runs: Sequence[RunDirectory], index: int) -> str:
    """Which layer a mixture of experts is in, where the configs say that and agree."""
    named = {_layer_of(run, index) for run in runs}
    return named.pop() if len(named) == 1 else f"mixture {index}"


def _layer_of(run: RunDirectory, index: int) -> str:
    kinds = run.config.model.layer_kinds if run.config is not None else ()
    attention = [layer for layer, kind in enumerate(kinds) if kind == "attention"]
    return f"layer {attention[index]}" if index < len(attention) else f"mixture {index}"


def _routers(records: Sequence[Record], key: str) -> int:
    return max((len(record[key]) for record in records if isinstance(record.get(key), list)), default=0)


# --- curves -----------------------------------------------------------------------------------------------------------


def _curves(records: Sequence[Record], keys: Sequence[str]) -> Columns:
    axes, found = dict[str, int](), {}
    for key in keys:
        name, _, index = key.rpartition(".")
        points = list(_of_router(records, int(index))) if name == _ENTROPY else curve(records, key)
        if points:
            steps, values = zip(*points, strict=True)
            axis = axes.setdefault(_packed(steps, "<f8"), len(axes))
            found[key] = {"axis": axis, "values": _packed(values, "<f4")}
    return {"axes": list(axes), "columns": found}


def _of_router(records: Sequence[Record], index: int) -> Iterator[tuple[int, float]]:
    for record in records:
        entropies = record.get(_ENTROPY)
        value = number(entropies[index]) if isinstance(entropies, list) and index < len(entropies) else None
        if value is not None:
            yield record["step"], value


def _packed(numbers: Sequence[float], dtype: str) -> str:
    with np.errstate(over="ignore"):  # beyond float32 is beyond the picture
        return base64.b64encode(np.array(numbers, dtype=np.float64).astype(dtype).tobytes()).decode("ascii")


def _changes(run: RunDirectory) -> list[dict[str, Any]]:
    """Where config, data or machine changed, as the lineage of the newest file tells."""
    lineage = run.metadata.get("lineage")
    entries = [entry for entry in lineage if isinstance(entry, dict)] if isinstance(lineage, list) else []
    return [{"step": entry["step"]} for entry in entries if type(entry.get("step")) is int]


# --- experts ----------------------------------------------------------------------------------------------------------


def _experts(run: RunDirectory) -> dict[str, Any] | None:
    """The mean load of every expert in at most `_MOST_COLUMNS` groups of neighbouring logged steps."""
    records = [record for record in run.records if _loads(record) is not None]
    if not records:
        return None
    shape = [len(layer) for layer in _loads(records[-1]) or []]
    records = [record for record in records if [len(layer) for layer in _loads(record) or []] == shape]
    count = -(-len(records) // _MOST_COLUMNS)
    groups = [records[i : i + count] for i in range(0, len(records), count)]
    layers = []
    for index, experts in enumerate(shape):
        means = [np.mean([(_loads(record) or [])[index] for record in group], axis=0) for group in groups]
        load = _packed(list(itertools.chain.from_iterable(means)), "<f4")
        layers.append({"name": mixture_name([run], index), "experts": experts, "load": load})
    first, last = ([group[place]["step"] for group in groups] for place in (0, -1))
    return {"first": first, "last": last, "layers": layers}


def _loads(record: Record) -> list[list[float]] | None:
    loads = record.get(_LOAD)
    if not isinstance(loads, list) or not loads or not all(isinstance(layer, list) and layer for layer in loads):
        return None
    return loads if all(number(load) is not None for layer in loads for load in layer) else None


# --- histograms -------------------------------------------------------------------------------------------------------


def _histograms(run: RunDirectory, spread: Mapping[str, Mapping[str, Histograms]]) -> dict[str, Any]:
    steps = [file.step for file in chosen(run)]
    groups = [{"name": name} | {kind: asdict(found) for kind, found in kinds.items()} for name, kinds in spread.items()]
    return {"steps": steps, "groups": groups}


def chosen(run: RunDirectory, most: int = 12) -> list[Any]:
    """Of the whole files of a run the first, the last, and those between them at even distances in their order."""
    files = run.whole
    if len(files) <= most:
        return files
    return [files[math.floor(index * (len(files) - 1) / (most - 1))] for index in range(most)]
