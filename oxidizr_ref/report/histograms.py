"""How the numbers of a model's tensors are spread, checkpoint after checkpoint.

A checkpoint holds no gradients. Its first moments (``exp_avg``) are a running mean of them, over about the last ten steps at
the default betas: their histograms are what there is to see of the gradients.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oxidizr_ref.checkpoint import format
from oxidizr_ref.report.run_directory import StepFile

#: Numbers of a tensor that are looked at: of a larger one at most so many, at even distances.
MOST_NUMBERS = 1 << 16
BINS = 48
_LARGEST = 1e150  # above it a number counts as infinite: its square is
_SPREAD = 5.0  # standard deviations to either side of the mean that the bins cover

#: What is drawn, and how its tensors' names begin.
KINDS = {"weights": "", "exp_avg": "optimizer.exp_avg."}


@dataclass(frozen=True)
class Spread:
    """The numbers of a group in one checkpoint. not_finite: how many are NaN or infinite; the rest tells of the others."""

    mean: float
    deviation: float
    smallest: float
    largest: float
    not_finite: int


@dataclass(frozen=True)
class Histograms:
    """Of one group and kind: ``low`` to ``high`` in equal bins; by checkpoint, its spread and each bin's share of all
    numbers in hundredths of a per cent. The outermost bins also hold what lies beyond them."""

    low: float
    high: float
    spreads: list[Spread]
    shares: list[list[int]]


def group_of(name: str) -> str:
    """The part of the model that a parameter belongs to: ``layers.3.self_attn``, ``embed_tokens``, ``norm``."""
    parts = name.split(".")
    return ".".join(parts[: 3 if parts[0] == "layers" else 1])


def histograms(files: Sequence[StepFile]) -> dict[str, dict[str, Histograms]]:
    """By group (in the model's order; first ``all``) and kind, over the checkpoints, which must be whole. A file is mapped:
    what is not looked at is not read."""
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for index, file in enumerate(files):
        arrays = format.mapped(file.path)[1]
        for kind, prefix in KINDS.items():
            for group, names in _groups(arrays, prefix).items():
                among = found.setdefault((group, kind), [{}] * len(files))
                among[index] = {name: arrays[name] for name in names}
    by_group: dict[str, dict[str, Histograms]] = {}
    for (group, kind), checkpoints in sorted(found.items(), key=lambda item: _order(item[0][0])):
        by_group.setdefault(group, {})[kind] = _histograms(checkpoints)
    return by_group


def _groups(names: Mapping[str, Any], prefix: str) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {"all": []}
    for name in sorted(names):
        other = name.startswith(("optimizer.", "rng.", "tokenizer."))
        if name.startswith(prefix) and (prefix or not other):
            groups["all"].append(name)
            groups.setdefault(group_of(name.removeprefix(prefix)), []).append(name)
    return {group: members for group, members in groups.items() if members}


def _order(group: str) -> tuple[int, int, str]:
    """All first, then as the model computes: the embedding, the layers by number, what comes after them."""
    parts = group.split(".")
    place = {"all": 0, "embed_tokens": 1, "layers": 2}.get(parts[0], 3)
    return place, int(parts[1]) if place == 2 and parts[1].isdecimal() else 0, group


def _histograms(checkpoints: Sequence[Mapping[str, Any]]) -> Histograms:
    """Over one range, that of the widest checkpoint about the newest one's mean, so that the curves can be compared."""
    spreads = [_spread(arrays) for arrays in checkpoints]
    centre = spreads[-1].mean
    half = max(abs(spread.mean - centre) + _SPREAD * spread.deviation for spread in spreads) or 0.1 * abs(centre) or 1e-8
    shares = [_shares(arrays, centre - half, centre + half) for arrays in checkpoints]
    return Histograms(centre - half, centre + half, spreads, shares)


def _samples(arrays: Mapping[str, Any]) -> Iterator[tuple[NDArray[np.float64], int]]:
    """Of every tensor the numbers that are looked at, and how many of them are left out because they are not finite."""
    for array in arrays.values():
        flat = array.reshape(-1)
        values = flat[:: max(1, -(-flat.size // MOST_NUMBERS))].astype(np.float64)
        finite = values[np.abs(values) < _LARGEST]
        yield finite, values.size - finite.size


def _spread(arrays: Mapping[str, Any]) -> Spread:
    count, bad, total, squares, smallest, largest = 0, 0, 0.0, 0.0, np.inf, -np.inf
    for values, left_out in _samples(arrays):
        bad += left_out
        if values.size:
            count, total, squares = count + values.size, total + float(values.sum()), squares + float(values @ values)
            smallest, largest = min(smallest, float(values.min())), max(largest, float(values.max()))
    if not count:
        return Spread(0.0, 0.0, 0.0, 0.0, bad)
    mean = total / count
    return Spread(mean, max(0.0, squares / count - mean * mean) ** 0.5, smallest, largest, bad)


def _shares(arrays: Mapping[str, Any], low: float, high: float) -> list[int]:
    counts = np.zeros(BINS, dtype=np.int64)
    for values, _ in _samples(arrays):
        places = (values - low) * (BINS / (high - low))
        counts += np.bincount(places.clip(0, BINS - 1).astype(np.int64), minlength=BINS)
    return [round(10_000 * int(count) / max(1, int(counts.sum()))) for count in counts]
