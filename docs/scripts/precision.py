"""What fewer bits cost: ``python docs/scripts/precision.py tinyshakespeare.txt`` writes docs/precision.{json,md}.

`shakespeare-char`, trained once for every way to store weights and moments, in a process of its own: held-out loss, size of
a checkpoint. The same with rounding to nearest in place of stochastic rounding, and all that matters again at a thirtieth of
the learning rate. Then time and peak memory of a training step of a Llama of 8 M parameters, float32 and the others in turn.
Runs that docs/precision.json has are not repeated, unless with ``--again``. ``--page-only`` writes the page alone.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from oxidizr_ref import optim, parallel
from oxidizr_ref.checkpoint.records import Record
from oxidizr_ref.config import Config, load_config
from oxidizr_ref.memory_now import peak_bytes
from oxidizr_ref.model import LanguageModel
from oxidizr_ref.run import Reporter
from oxidizr_ref.trainer import Trainer

DOCS = Path(__file__).resolve().parent.parent
NUMBERS, PAGE = DOCS / "precision.json", DOCS / "precision.md"
LLAMA = DOCS.parent / "tests" / "bench" / "configs" / "llama8m.yaml"

#: Weights, moments, rounding, learning rate: the config's own, and one whose updates are smaller than a bf16 number's unit.
OWN, SMALL = "3e-3", "1e-4"
WAYS = [
    ("f32", "f32", "none", OWN),
    ("f64", "f32", "none", OWN),
    ("bf16", "f32", "stochastic", OWN),
    ("bf16", "bf16", "stochastic", OWN),
    ("f16", "f32", "stochastic", OWN),
    ("f32", "bf16", "stochastic", OWN),
    ("bf16", "f32", "nearest", OWN),
    ("bf16", "bf16", "nearest", OWN),
    ("f32", "bf16", "nearest", OWN),
    ("f32", "f32", "none", SMALL),
    ("bf16", "f32", "stochastic", SMALL),
    ("bf16", "bf16", "stochastic", SMALL),
    ("bf16", "f32", "nearest", SMALL),
    ("bf16", "bf16", "nearest", SMALL),
]


class Losses(Reporter):
    """Keeps the held-out losses."""

    def __init__(self) -> None:
        self.losses: dict[int, float] = {}

    def step(self, record: Record, logged: bool) -> None:
        """Note it, if there is one."""
        if logged and "eval_loss" in record:
            self.losses[record["step"]] = record["eval_loss"]


def configured(source: str | Path, dtype: str, moments: str, *more: str) -> Config:
    """A config with these dtypes."""
    return load_config(source, [f"model.dtype={dtype}", f"trainer.optimizer_dtype={moments}", *more])


def round_to_nearest() -> None:
    """What everybody would write first."""
    for dtype in optim._ROUND:
        optim._ROUND[dtype] = lambda p, random, dtype=dtype: p.astype(dtype)  # type: ignore[misc]


def train(text: str, dtype: str, moments: str, rounding: str, learning_rate: str) -> dict[str, Any]:
    """Train `shakespeare-char` in this process."""
    if rounding == "nearest":
        round_to_nearest()
    with tempfile.TemporaryDirectory() as directory:
        paths = f"data.path={json.dumps([os.path.abspath(text)])}", f"trainer.checkpoint_dir={directory}"
        config = configured("shakespeare-char", dtype, moments, f"learning_rate={learning_rate}", *paths)
        reporter, began = Losses(), time.perf_counter()
        trainer = Trainer(config, LanguageModel(config.model, config.trainer.seed), reporter=reporter)
        outcome = trainer.fit()
        seconds = time.perf_counter() - began
        (*_, last) = sorted(Path(directory).glob("step_*.safetensors"), key=lambda path: path.stat().st_mtime)
        size = last.stat().st_size
        moved = [float(abs(v.astype("f8")).mean()) for v in trainer.optimizer.slots["exp_avg_sq"].values()]
    return {
        "loss": outcome.eval_loss,
        "losses": reporter.losses,
        "bytes": size,
        "seconds": seconds,
        "peak": peak_bytes(),
        "mean exp_avg_sq": statistics.fmean(moved),
    }


def time_steps(rounds: int) -> list[dict[str, Any]]:
    """Seconds of a step of the Llama in every way that is used, in turn; ratios to float32's step beside it."""
    ways = [(dtype, moments) for dtype, moments, rounding, rate in WAYS if rounding != "nearest" and rate == OWN]
    contestants = []
    for dtype, moments in ways:
        config = configured(LLAMA, dtype, moments, "data.path=random")
        trainer = Trainer(config, LanguageModel(config.model, config.trainer.seed))
        contestants.append((trainer, trainer.batches()))
    seconds: list[list[float]] = [[] for _ in ways]
    for turn in range(rounds + 2):
        for (trainer, batches), own in zip(contestants, seconds, strict=True):
            began = time.perf_counter()
            trainer.train_step(batches)
            if turn >= 2:
                own.append(time.perf_counter() - began)
    ratios = [statistics.median(mine / f32 for mine, f32 in zip(own, seconds[0], strict=True)) for own in seconds]
    return [
        {"dtype": dtype, "moments": moments, "seconds": statistics.median(own), "ratio": ratio}
        for (dtype, moments), own, ratio in zip(ways, seconds, ratios, strict=True)
    ]


def peak_of_llama(dtype: str, moments: str) -> int:
    """Peak memory of this process after three steps of the Llama."""
    config = configured(LLAMA, dtype, moments, "data.path=random")
    trainer = Trainer(config, LanguageModel(config.model, config.trainer.seed))
    batches = trainer.batches()
    for _ in range(3):
        trainer.train_step(batches)
    return peak_bytes()


def in_a_process(*arguments: str) -> Any:
    """What this script prints with these arguments, in a process of its own, as JSON."""
    done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout)


def measure(text: str, rounds: int, there: dict[str, Any]) -> dict[str, Any]:
    """Everything the page says, but for what is ``there``."""
    keys = ("dtype", "moments", "rounding", "learning_rate")
    known, runs = {tuple(run[key] for key in keys): run for run in there.get("runs", [])}, []
    for way in WAYS:
        names = dict(zip(keys, way, strict=True))
        runs.append(known[way] if way in known else {**names, **in_a_process(text, "--way", *way)})
        print(f"{way}: held-out loss {runs[-1]['loss']:.4f}", file=sys.stderr)
    steps = there.get("steps") or in_a_process(text, "--steps", str(rounds))
    for step in steps:
        if "peak" not in step:
            step["peak"] = in_a_process(text, "--peak", step["dtype"], step["moments"])
    versions = {"python": platform.python_version(), "numpy": optim.np.__version__, "threads": parallel.get_threads()}
    return {"runs": runs, "steps": steps, **versions}


def page(numbers: dict[str, Any]) -> str:
    """docs/precision.md."""
    steps = {(step["dtype"], step["moments"]): step for step in numbers["steps"]}
    tables = {}
    for name, rate in (("own", OWN), ("small", SMALL)):
        runs = [run for run in numbers["runs"] if run["learning_rate"] == rate]
        tables[name] = "\n".join(_row(run, runs[0], steps, with_step=rate == OWN) for run in runs)
    return TEMPLATE.format(**tables, **{key: numbers[key] for key in ("python", "numpy", "threads")})


def _row(run: dict[str, Any], base: dict[str, Any], steps: dict[tuple[str, str], Any], with_step: bool) -> str:
    cells = [run["dtype"], run["moments"], run["rounding"], f"{run['loss']:.4f}", f"{run['loss'] / base['loss'] - 1:+.2%}"]
    if with_step:
        step = steps[run["dtype"], run["moments"]]
        cells.append(f"{run['bytes'] / base['bytes']:.3f}")
        shown = run["rounding"] != "nearest"
        cells += [f"{step['ratio']:.2f}", f"{step['peak'] / steps['f32', 'f32']['peak']:.2f}"] if shown else ["", ""]
    cells.append(f"{run['mean exp_avg_sq'] / base['mean exp_avg_sq']:.2f}")
    return f"| {' | '.join(cells)} |"


TEMPLATE = """# One model, four ways to store it

`--dtype` (`model.dtype`) says how weights are stored: `f32`, `f64`, `bf16` or `f16`. `trainer.optimizer_dtype: bf16`
stores AdamW's two moments in 16 bits as well. Nothing is ever *computed* in 16 bits on the host: what is stored so is
read as float32, updated in float32, and rounded once. (On a device, products with 16-bit weights read 16-bit numbers
and sum in float32: [gpu.md](gpu.md).)

**Rounding is stochastic**: a number between two neighbours becomes the upper one with a probability of how far it has
come, so that it is right on average. The random bits are words of Philox, addressed by seed, parameter, slot, step
and element: nothing is drawn in turn, so a resumed run rounds as an uninterrupted one, and on a device the kernel
finds the same bits.

Rounding to nearest, which everybody would write first, loses every update below half a unit in the last place. A bf16
number has 8 significant bits: weights that should change by less than 1/512 of themselves in a step stay where they
are. For the second moment it is worse: `v ← β₂ v + (1-β₂) g²` with β₂ = 0.999 shrinks by a thousandth a step where
gradients have become smaller, and to nearest that is nothing at all: v stays at the largest it ever was (the last
column), and with it what updates are divided by.

## Measured

`shakespeare-char`, 2,000 steps; a training step and the peak memory of a Llama of 8 M parameters. Size, time, memory
and the mean of `exp_avg_sq` at the end are ratios to float32's (time: in turn, in one run, {threads} threads; Python
{python}, NumPy {numpy}).

| weights | moments | rounding | held-out loss | against f32 | checkpoint | step | memory | exp_avg_sq |
|---|---|---|---|---|---|---|---|---|
{own}

At this learning rate (3e-3, falling to 3e-4) most updates are larger than the units of bf16, and even rounding to
nearest ends within 1% of float32: one run more or less lucky than another. What it does shows where updates are
small, as late in every long run. The same with 1e-4, falling to 1e-5:

| weights | moments | rounding | held-out loss | against f32 | exp_avg_sq |
|---|---|---|---|---|---|
{small}

`tests/test_precision.py` has the mechanism by itself: a second moment without gradients, which halves in 693 steps or
never; a weight that should move by a quarter of a unit a step.

This page is made by `docs/scripts/precision.py`.
"""


def main() -> None:
    """Measure, or one part of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", help="tinyshakespeare.txt")
    parser.add_argument("--way", nargs=4)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--peak", nargs=2)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--page-only", action="store_true")
    options = parser.parse_args()
    if options.way:
        print(json.dumps(train(options.text, *options.way)))
    elif options.steps:
        print(json.dumps(time_steps(options.steps)))
    elif options.peak:
        print(json.dumps(peak_of_llama(*options.peak)))
    else:
        there = {} if options.again or not NUMBERS.exists() else json.loads(NUMBERS.read_text(encoding="utf-8"))
        numbers = there if options.page_only else measure(options.text, options.rounds, there)
        NUMBERS.write_text(json.dumps(numbers, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        PAGE.write_text(page(numbers), encoding="utf-8")


if __name__ == "__main__":
    main()
