"""How time and memory of a training step grow with its sizes: ``python docs/scripts/growth.py [--quick] [--only SWEEP]``.

Measures every point in a process of its own (a peak of memory is a process's), writes the numbers to ``docs/growth.json``,
draws ``docs/images/growth_*.svg`` and puts tables and plots between the markers of ``docs/performance.md``. ``--plot-only``
makes pictures and page from the numbers that are there. Needs matplotlib (extra ``docs``). Takes about ten minutes on two
cores, and nobody else should use them meanwhile.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from oxidizr_ref.config import Config

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "tests")]

from bench.guard import machine  # noqa: E402 - lives beside the tests
from growth_page import draw, insert  # noqa: E402
from growth_sweeps import GRID, QUICK_GRID, SWEEPS, WIDTH, Sweep  # noqa: E402

CROSS_ENTROPY = "cross-entropy"
#: A point is measured for about so many seconds, and at least and at most so many steps.
SECONDS, FEWEST, MOST = 3.0, 3, 20

Point = dict[str, Any]


# --- in a process of its own ------------------------------------------------------------------------------------------


def step_point(model: str, changes: list[str], rounds: int) -> Point:
    """A training step: seconds of it and of its matrix products alone, their operations; bytes of a process that trains.

    ``estimate``: what `memory` counts of these bytes from shapes alone.
    """
    from oxidizr_ref.bench import measure
    from oxidizr_ref.config import load_config
    from oxidizr_ref.memory import estimate_memory

    config = load_config(model, [*changes, "data.path=random"])
    memory, e = peak_of_two_steps(config), estimate_memory(config)
    found = measure(config, rounds)
    return {
        "step": rounded(found.step.median),
        "floor": rounded(found.floor.median),
        "operations": found.operations,
        "memory": memory,
        "estimate": e.parameters + e.gradients + e.moments + e.activations + e.logits,
    }


def peak_of_two_steps(config: Config) -> int:
    """Bytes that making a model and training it brings to this process, at most. `bench` leaves out what is there before the
    first step: the weights always, and the optimizer's moments when they are small."""
    from oxidizr_ref.memory_now import peak_bytes, resident_bytes
    from oxidizr_ref.model import LanguageModel
    from oxidizr_ref.trainer import Trainer

    before = resident_bytes()
    trainer = Trainer(config, LanguageModel(config.model, config.trainer.seed))
    batches = trainer.batches()
    for _ in range(2):  # the second has moments and gradients
        trainer.train_step(batches)
    return max(0, peak_bytes() - before)


def cross_entropy_point(tokens: int, vocabulary: int) -> Point:
    """`linear_cross_entropy` alone: seconds of forward and backward, bytes of the peak beyond inputs and gradients."""
    import time

    import numpy as np

    from oxidizr_ref.autograd import Tensor
    from oxidizr_ref.fused.linear_cross_entropy import linear_cross_entropy
    from oxidizr_ref.memory_now import peak_bytes, resident_bytes

    random = np.random.default_rng(0)

    def leaf(rows: int) -> Tensor:
        return Tensor(random.standard_normal((rows, WIDTH), dtype=np.float32), requires_grad=True)

    def run(hidden: Tensor, weight: Tensor) -> None:
        targets = random.integers(0, weight.shape[0], hidden.shape[0])
        linear_cross_entropy(hidden, weight, targets, float(hidden.shape[0])).backward()

    run(leaf(256), leaf(256))  # BLAS makes its buffers, threads wake
    leaves = leaf(tokens), leaf(vocabulary)
    before, began = resident_bytes(), time.perf_counter()
    run(*leaves)
    seconds = time.perf_counter() - began
    gradients = sum(x.grad.nbytes for x in leaves if x.grad is not None)
    return {"step": rounded(seconds), "memory": max(0, peak_bytes() - before - gradients)}


def rounded(seconds: float) -> float:
    """Four significant digits: more would be noise."""
    return float(f"{seconds:.4g}")


def in_a_process(what: str, **arguments: Any) -> Point:
    """A point, measured by this file in another process. It reports on stdout."""
    command = [sys.executable, __file__, what, json.dumps(arguments)]
    found: Point = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    return found


# --- sweeps -----------------------------------------------------------------------------------------------------------


def measure_sweep(sweep: Sweep, quick: bool) -> list[Point]:
    """All points of a sweep, model by model, small ones first: how long one takes says how often the next is measured."""
    points = []
    for model, bundled in sweep.models.items():
        seconds = 0.0
        for size in sweep.sizes[:3] if quick else sweep.sizes:
            rounds = 2 if quick else max(FEWEST, min(MOST, int(SECONDS / max(seconds, 1e-3))))
            found = in_a_process("step", model=bundled, changes=sweep.changes(bundled, size), rounds=rounds)
            seconds = found["step"]
            points.append({"model": model, "size": size, "rounds": rounds, **found})
            print(f"{model}, {sweep.what} {size:,}: {seconds:.4f} s, {found['memory'] / 1e6:.1f} MB", flush=True)
    return points


def measure_cross_entropy(quick: bool) -> list[Point]:
    """The grid of tokens and vocabularies."""
    points = []
    for vocabulary, tokens in QUICK_GRID if quick else GRID:
        sizes = {"vocabulary": vocabulary, "tokens": tokens}
        found = in_a_process("cross-entropy", **sizes)
        points.append({**sizes, **found})
        memory = found["memory"] / 2**20
        print(f"{tokens:,} tokens × vocabulary {vocabulary:,}: {found['step']:.4f} s, {memory:.1f} MiB", flush=True)
    return points


def read(path: Path, here: dict[str, Any]) -> dict[str, Any]:
    """The numbers that are there, to be renewed in part; none if there are none. Those of another machine do not mix."""
    if not path.exists():
        return {"machine": here, "sweeps": {}}
    stored: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if stored["machine"] != here:
        sys.exit(f"{path} is of another machine ({stored['machine']}): measure all sweeps, without --only")
    return stored


def write(path: Path, numbers: dict[str, Any]) -> None:
    """A point a line, so that a later measurement can be compared with this one."""

    def lines(points: list[Point]) -> str:
        return ",\n".join(f"    {json.dumps(point, sort_keys=True, allow_nan=False)}" for point in points)

    sweeps = [
        f'  {json.dumps(name)}: {{"date": {json.dumps(sweep["date"])}, "points": [\n{lines(sweep["points"])}\n  ]}}'
        for name, sweep in sorted(numbers["sweeps"].items())
    ]
    head = f'"machine": {json.dumps(numbers["machine"], sort_keys=True)}'
    path.write_text(f'{{\n{head},\n"sweeps": {{\n' + ",\n".join(sweeps) + "\n}\n}\n", encoding="utf-8")


def main() -> None:
    """Measure, store, draw, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", choices=[*SWEEPS, CROSS_ENTROPY], help="measure one sweep; the others stay as they are")
    parser.add_argument("--quick", action="store_true", help="three small points a curve, to see that it works")
    parser.add_argument("--plot-only", action="store_true", help="measure nothing: pictures and page from the numbers")
    parser.add_argument("--date", default=datetime.date.today().isoformat(), help="of the measurement (default: today)")
    parser.add_argument("--directory", type=Path, default=HERE.parent, help="what is written lies here (default: docs/)")
    options = parser.parse_args()
    options.directory.mkdir(parents=True, exist_ok=True)
    path = options.directory / "growth.json"
    if not options.plot_only:
        here = machine()
        numbers = read(path, here) if options.only else {"machine": here, "sweeps": {}}
        for name in [options.only] if options.only else [*SWEEPS, CROSS_ENTROPY]:
            measured = name in SWEEPS
            points = measure_sweep(SWEEPS[name], options.quick) if measured else measure_cross_entropy(options.quick)
            numbers["sweeps"][name] = {"date": options.date, "points": points}
            write(path, numbers)
    numbers = json.loads(path.read_text(encoding="utf-8"))
    draw(numbers, options.directory / "images")
    insert(numbers, options.directory / "performance.md")


if __name__ == "__main__":
    if sys.argv[1:2] == ["step"]:
        print(json.dumps(step_point(**json.loads(sys.argv[2]))))
    elif sys.argv[1:2] == ["cross-entropy"]:
        print(json.dumps(cross_entropy_point(**json.loads(sys.argv[2]))))
    else:
        main()
