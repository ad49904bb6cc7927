"""The pictures of `growth` and its section of docs/performance.md: functions of docs/growth.json and of nothing else."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from growth_sweeps import SWEEPS, WIDTH, Sweep

from oxidizr_ref.cli.words import size_of
from oxidizr_ref.fused.linear_cross_entropy import ENOUGH_TOKENS, FEWEST_TOKENS, LOGITS, tokens_of_a_chunk

BEGIN, END = "<!-- growth:begin -->", "<!-- growth:end -->"
EMPTY_PAGE = f"# Performance\n\n{BEGIN}\n{END}\n"
MIB = 2**20

Point = Mapping[str, Any]
Points = Sequence[Point]

HEAD = """## How a training step grows

Measured by [`docs/scripts/growth.py`](scripts/growth.py) on {dates}: {cpu}, {threads} threads, numpy {numpy}, {blas}.
The numbers are in [growth.json](growth.json). Every point is a process of its own. Time is the median of {least} to {most}
steps, fewer of long ones. Memory is the most that training brings to the process beyond its libraries: weights, gradients,
the optimizer's moments, what a step keeps and makes, and a few MB whatever the model.

Lines are measured. Dotted: for time the matrix products alone, measured beside the steps; for memory the
[estimate](../oxidizr_ref/memory.py) that is made from shapes. An exponent is the slope of the line through the upper half of
a curve's range, both axes logarithmic. *Limit*: what theory says of very large sizes. *Counted*: the exponent, over the same
sizes, of the matrix products' operations and of the estimated bytes. *Last doubling*: the measured exponent between the two
largest sizes."""

#: What theory says of a sweep.
TEXTS = {
    "length": """
One sequence; 2 layers of width 128, a vocabulary of 256. A Mamba layer does the same for every token, so that time and
memory are linear in the length. Attention compares every token with all before it: its time becomes quadratic, but its
memory stays linear, because the scores of a block of queries are all that exists of the square; the backward pass computes
them again.
""",
    "width": """
4 sequences of 128 tokens; 2 layers, a vocabulary of 256. Weight matrices, and with them the products, the optimizer's work,
gradients and moments, grow with the square of the width; what is kept of each token, and all work beside the products, with
the width alone. So both exponents go from 1 to 2.
""",
    "layers": """
4 sequences of 128 tokens; width 128, a vocabulary of 256. All layers are alike: time and memory are a constant and so much a
layer.
""",
    "batch": """
Sequences of 128 tokens; 2 layers of width 128, a vocabulary of 256. What the optimizer does and holds does not depend on the
batch; all else is proportional to it.
""",
    "vocabulary": """
4 sequences of 128 tokens; 2 layers of width 128. The logits, and the rows of the embedding and of the output weights that
the optimizer renews, are proportional to the vocabulary. So is the memory of gradients and moments; of the logits there is
never more than a chunk, as the next section shows.
""",
}

CROSS_ENTROPY_TEXT = """### The cross-entropy alone

`linear_cross_entropy`, forward and backward, width {width}; memory beyond inputs and gradients. All logits would be tokens ×
vocabulary numbers. A chunk of them is all that ever exists: those of {enough:,} tokens; of fewer, where they would take
more than {chunk} MiB in float32 (dashed), but no fewer than {fewest}, so that from a vocabulary of {border:,} on a chunk
grows with the vocabulary again. With the tokens it never does. Time is linear in tokens × vocabulary (exponent {time:.2f});
memory does not grow with it (dotted: all logits).

![Time and memory of the cross-entropy alone](images/growth_cross-entropy.svg)

MiB beyond inputs and gradients:
"""


# --- numbers ----------------------------------------------------------------------------------------------------------


def slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    """The exponent e of the power law ``y = c · x^e`` that fits best in logarithms; NaN if a y is not positive."""
    if len(xs) < 2 or min(ys) <= 0:
        return math.nan
    return statistics.linear_regression([math.log(x) for x in xs], [math.log(y) for y in ys]).slope


def exponent(xs: Sequence[float], ys: Sequence[float]) -> float:
    """The slope over the upper half of the range of x, on a logarithmic axis."""
    points = sorted(zip(xs, ys, strict=True))
    middle = math.sqrt(min(xs) * max(xs)) * (1 - 1e-9)
    upper = points[-max(2, sum(x >= middle for x in xs)) :]
    return slope([x for x, _ in upper], [y for _, y in upper])


def curve(points: Points, model: str, *keys: str) -> list[list[float]]:
    """Columns of a model's points, the smallest first."""
    own = sorted((point for point in points if point["model"] == model), key=lambda point: point["size"])
    return [[point[key] for point in own] for key in keys]


def grid(points: Points) -> dict[int, dict[int, Point]]:
    """Points of the cross-entropy by vocabulary and tokens."""
    by: dict[int, dict[int, Point]] = {}
    for point in sorted(points, key=lambda point: (point["vocabulary"], point["tokens"])):
        by.setdefault(point["vocabulary"], {})[point["tokens"]] = point
    return by


def chunk_bytes(vocabulary: int) -> int:
    """Of the largest chunk of logits, in float32."""
    return 4 * vocabulary * tokens_of_a_chunk(vocabulary)


def cross_entropy_exponent(points: Points) -> float:
    """Of time, in tokens × vocabulary."""
    return exponent([p["vocabulary"] * p["tokens"] for p in points], [p["step"] for p in points])


# --- the section ------------------------------------------------------------------------------------------------------


def insert(numbers: Mapping[str, Any], page: Path) -> None:
    """Put the section between its markers; a page that is missing is begun. Raises ValueError where a marker is missing."""
    text = page.read_text(encoding="utf-8") if page.exists() else EMPTY_PAGE
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{page} has not both markers, {BEGIN} and {END}")
    page.write_text(f"{before}{begin}\n{section(numbers)}\n{end}{after}", encoding="utf-8")


def section(numbers: Mapping[str, Any]) -> str:
    """All of the section, in Markdown."""
    sweeps = numbers["sweeps"]
    rounds = [point["rounds"] for name in SWEEPS if name in sweeps for point in sweeps[name]["points"]] or [1]
    dates = ", ".join(sorted({sweep["date"] for sweep in sweeps.values()}))
    parts = [HEAD.format(dates=dates, least=min(rounds), most=max(rounds), **numbers["machine"])]
    parts += [sweep_part(name, sweep, sweeps[name]["points"]) for name, sweep in SWEEPS.items() if name in sweeps]
    if "cross-entropy" in sweeps:
        parts.append(cross_entropy_part(sweeps["cross-entropy"]["points"]))
    return "\n\n".join(parts)


def sweep_part(name: str, sweep: Sweep, points: Points) -> str:
    """A heading, what theory says, the picture, the exponents, the numbers."""
    picture = f"![Time and memory of a training step by {sweep.what}](images/growth_{name}.svg)"
    models = [model for model in sweep.models if any(point["model"] == model for point in points)]
    head = table_head("", "limit", "counted", "measured", "last doubling")
    exponents = [*head, *(line for model in models for line in exponent_lines(model, sweep.limits[model], points))]
    sizes = sorted({point["size"] for point in points})
    by = {(point["model"], point["size"]): point for point in points}
    lines = table_head(sweep.what, *models)
    for size in sizes:
        lines.append(f"| {size:,} | " + " | ".join(cell(by.get((model, size))) for model in models) + " |")
    return "\n\n".join([f"### {sweep.title}\n\n{TEXTS[name].strip()}", picture, "\n".join(exponents), "\n".join(lines)])


def table_head(*columns: str) -> list[str]:
    """Two lines; the numbers stand on the right."""
    return [f"| {' | '.join(columns)} |", "|---" + "|---:" * (len(columns) - 1) + "|"]


def exponent_lines(model: str, limits: tuple[str, str], points: Points) -> Iterator[str]:
    """Of a model's time and of its memory: in the limit, counted, measured, between the last two points."""
    for what, limit, counted, measured in zip(
        ("time", "memory"), limits, ("operations", "estimate"), ("step", "memory"), strict=True
    ):
        xs, ours, theirs = curve(points, model, "size", measured, counted)
        numbers = exponent(xs, theirs), exponent(xs, ours), slope(xs[-2:], ours[-2:])
        yield f"| {model}, {what} | {limit} | " + " | ".join(f"{number:.2f}" for number in numbers) + " |"


def cell(point: Point | None) -> str:
    """Time and memory of a point."""
    if point is None:
        return ""
    seconds = point["step"]
    time = f"{seconds * 1e3:.3g} ms" if seconds < 0.9995 else f"{seconds:.3g} s"
    return f"{time}, {size_of(point['memory'])}"


def cross_entropy_part(points: Points) -> str:
    """The text and the table of what the op takes."""
    by = grid(points)
    tokens = sorted({number for row in by.values() for number in row})
    head = table_head("vocabulary", *(f"{n:,} tokens" for n in tokens), "a chunk", f"all logits of {tokens[-1]:,}")
    rows = []
    for vocabulary, row in by.items():
        cells = [f"{row[n]['memory'] / MIB:.1f}" if n in row else "" for n in tokens]
        cells += [f"{chunk_bytes(vocabulary) / MIB:.0f}", f"{4 * vocabulary * tokens[-1] / MIB:,.0f}"]
        rows.append(f"| {vocabulary:,} | {' | '.join(cells)} |")
    text = CROSS_ENTROPY_TEXT.format(
        width=WIDTH,
        enough=ENOUGH_TOKENS,
        chunk=4 * LOGITS // MIB,
        fewest=FEWEST_TOKENS,
        border=LOGITS // FEWEST_TOKENS,
        time=cross_entropy_exponent(points),
    )
    return "\n".join([text, *head, *rows])


# --- the pictures -----------------------------------------------------------------------------------------------------


def draw(numbers: Mapping[str, Any], directory: Path) -> list[Path]:
    """``growth_<sweep>.svg`` of every sweep there is. The same numbers give the same bytes, with the same matplotlib."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update({"svg.hashsalt": "growth", "font.size": 9, "legend.fontsize": 8, "lines.markersize": 4})
        for name, of_sweep in numbers["sweeps"].items():
            figure = Figure(figsize=(9, 3.8), layout="constrained")
            axes = figure.subplots(1, 2)
            if name in SWEEPS:
                draw_sweep(axes, SWEEPS[name], of_sweep["points"])
            else:
                draw_cross_entropy(axes, of_sweep["points"])
            for panel in axes:
                panel.set(xscale="log", yscale="log")
                panel.grid(alpha=0.25)
                panel.legend(frameon=False)
            paths.append(directory / f"growth_{name}.svg")
            figure.savefig(paths[-1], metadata={"Date": None})
    return paths


def draw_sweep(axes: Any, sweep: Sweep, points: Points) -> None:
    """Time on the left, memory on the right: a line a model, its theory dotted."""
    panels = (("step", "floor", 1.0), ("memory", "estimate", 1e-6))
    for panel, (measured, theory, unit) in zip(axes, panels, strict=True):
        for number, model in enumerate(sweep.models):
            xs, ours, theirs = curve(points, model, "size", measured, theory)
            if not xs:
                continue
            label = f"{model}: exponent {exponent(xs, ours):.2f}"
            panel.plot(xs, [y * unit for y in ours], color=f"C{number}", marker="o", label=label)
            panel.plot(xs, [y * unit for y in theirs], color=f"C{number}", linestyle=":")
        dotted = "matrix products alone" if theory == "floor" else "estimate from shapes"
        panel.plot([], [], color="gray", linestyle=":", label=dotted)
        panel.set(xlabel=sweep.what, ylabel="time of a step (s)" if theory == "floor" else "peak memory (MB)")


def draw_cross_entropy(axes: Any, points: Points) -> None:
    """Time and memory over tokens × vocabulary, a line a vocabulary."""
    time, memory = axes
    products = [point["vocabulary"] * point["tokens"] for point in points]
    for number, (vocabulary, row) in enumerate(grid(points).items()):
        xs = [vocabulary * tokens for tokens in row]
        style = {"color": f"C{number}", "marker": "o", "label": f"vocabulary {vocabulary:,}"}
        time.plot(xs, [point["step"] for point in row.values()], **style)
        memory.plot(xs, [point["memory"] / 1e6 for point in row.values()], **style)
    ends = [min(products), max(products)]
    fitted = cross_entropy_exponent(points)
    at = max(points, key=lambda point: point["vocabulary"] * point["tokens"])
    line = [at["step"] * (x / ends[1]) ** fitted for x in ends]
    time.plot(ends, line, color="gray", linestyle=":", label=f"exponent {fitted:.2f}")
    memory.plot(ends, [4e-6 * x for x in ends], color="gray", linestyle=":", label="all logits: exponent 1")
    memory.axhline(4e-6 * LOGITS, color="gray", linestyle="--", label="the largest chunk of logits: exponent 0")
    time.set(xlabel="tokens × vocabulary", ylabel="time of forward and backward (s)")
    memory.set(xlabel="tokens × vocabulary", ylabel="peak beyond inputs and gradients (MB)")
