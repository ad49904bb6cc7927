"""Curves as files for the notebooks, and as pictures for the pages."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from contrasts.training import Curve

REPOSITORY = Path(__file__).parents[3]
CURVES, PICTURES = REPOSITORY / "notebooks" / "curves", REPOSITORY / "docs" / "images"


def write(name: str, curves: Sequence[Curve], directory: Path = CURVES) -> Path:
    """``<name>.json``: a list of runs, each with its config, steps, losses and what was measured at these steps."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name}.json"
    runs = [json.dumps(asdict(curve), sort_keys=True, allow_nan=False) for curve in curves]
    path.write_text("[\n" + ",\n".join(runs) + "\n]\n", encoding="utf-8")
    return path


def read(name: str, directory: Path = CURVES) -> list[Curve]:
    """What `write` wrote."""
    return [Curve(**run) for run in json.loads((directory / f"{name}.json").read_text(encoding="utf-8"))]


def draw(name: str, drawn: str, label: str, curves: Sequence[Curve], directory: Path = PICTURES) -> Path:
    """``contrast-<name>.png``: the measurement ``drawn`` of every run over its steps."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    kinds = list(dict.fromkeys(curve.kind for curve in curves))
    figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    for curve in curves:
        first = curve is next(other for other in curves if other.kind == curve.kind)
        color = f"C{kinds.index(curve.kind)}"
        axes.plot(
            curve.steps, curve.measured[drawn], color=color, marker="o", markersize=3, label=curve.kind if first else None
        )
    axes.set(xlabel="optimizer step", ylabel=label, ylim=(-0.03, 1.03))
    axes.legend(frameon=False)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"contrast-{name}.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
