"""Has training become slower? ``python -m tests.bench.guard [NAME …] [--record] [--rounds N]``.

Times belong to a machine and a moment, so none is stored: only ratios of what one run measures side by side. ``--record``
writes them to ``ratios.json``; without it they are measured again and compared. Run it at the root of the repository. NAME
is a file of ``configs/`` without its ``.yaml``, or a bundled model. Of each model:

* *step / PyTorch twin's*: a training step over that of the eager twin, pair by pair (`peers.py`), where PyTorch is installed
  (the extra ``oracle``, which pins its version);
* *step / floor*: a training step over the time of its matrix products alone;
* *1 thread / 2 threads*: what the second thread is worth, the one ratio that should be large (it also falls when one thread
  alone became faster: then look at the first two, and record anew);
* *peak memory / parameters*: bytes beyond what was there before the first step, over those of the weights;
* the heaviest ops, forward or backward, over the floor. They say where to look; one step is too noisy to decide.

A ratio that lost 10% is measured again with twice the rounds and marked only if it still has. Ends with 1 if a marked one is
of the first four kinds, with 2 for a wrong name. On another kind of machine the comparison is printed, and ends with 0.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import peers
from .contestants import CONTESTANTS

RATIOS = Path(__file__).parent / "ratios.json"
DEFAULT = ("tiny", "char", "llama8m", "mamba2", "nano")

OVER_TWIN, OVER_FLOOR = "step / PyTorch twin's", "step / floor"
THREADS, MEMORY = "1 thread / 2 threads", "peak memory / parameters"
TWIN = "eager"
#: The ratios that decide.
STEP_LEVEL = (OVER_TWIN, OVER_FLOOR, THREADS, MEMORY)
#: Worse by this factor is a loss; the last digits are those of the division.
LOSS = 1.10 - 1e-9
#: So many of the ops that take longest are recorded.
HEAVIEST = 8
#: Processes with two threads and with one take turns so often; medians of them count.
PAIRS = 3

Ratios = Mapping[str, float]


# --- judging ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One ratio, as it is stored and as it is now; None where there is none."""

    name: str
    stored: float | None
    now: float | None

    @property
    def worse(self) -> float:
        """How many times worse than stored: above 1 for a loss. 1 where there is nothing to compare."""
        if self.stored is None or self.now is None:
            return 1.0
        return self.stored / self.now if self.name == THREADS else self.now / self.stored

    @property
    def lost(self) -> bool:
        """Whether a tenth is lost."""
        return self.worse >= LOSS

    @property
    def mark(self) -> str:
        """The word beside a loss."""
        if not self.lost:
            return ""
        return "LARGER" if self.name == MEMORY else "SLOWER"


def compare(stored: Ratios, now: Ratios) -> list[Row]:
    """The rows of a model: those that decide, then the recorded ops, the heaviest first."""
    ops = sorted(stored.keys() - set(STEP_LEVEL), key=lambda name: (-stored[name], name))
    return [Row(name, stored.get(name), now.get(name)) for name in (*STEP_LEVEL, *ops)]


def confirmed(first: Sequence[Row], second: Sequence[Row]) -> list[Row]:
    """The rows after a second look: of a ratio that had lost, the better one of both; the others as they were."""
    return [min(a, b, key=lambda row: row.worse) if a.lost else a for a, b in zip(first, second, strict=True)]


def decisive_losses(rows: Sequence[Row]) -> list[Row]:
    """The losses that make the run fail."""
    return [row for row in rows if row.lost and row.name in STEP_LEVEL]


def table(model: str, rows: Sequence[Row]) -> str:
    """Name, stored, now and change, a line each."""

    def cell(value: float | None) -> str:
        return "-" if value is None else f"{value:#.3g}"

    lines = [f"{model:36s}{'stored':>9s}{'now':>9s}{'change':>9s}"]
    for row in rows:
        change = "" if row.stored is None or row.now is None else f"{row.now / row.stored - 1:+.1%}"
        lines.append(f"  {row.name:34s}{cell(row.stored):>9s}{cell(row.now):>9s}{change:>9s}  {row.mark}".rstrip())
    return "\n".join(lines)


# --- measuring --------------------------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """The class of machine that numbers belong to: CPU model, BLAS kernel, NumPy, threads."""
    import numpy as np

    from oxidizr_ref import parallel

    blas = parallel.blas_info()[0]
    return {
        "cpu": peers.cpu_model(),
        "blas": " ".join(str(blas.get(key)) for key in ("internal_api", "version", "architecture")),
        "numpy": np.__version__,
        "threads": parallel.get_threads(),
    }


def bench(config: str, rounds: int, threads: int) -> dict[str, Any]:
    """What ``oxidizr-ref bench --json`` prints of a config, in a process of its own: a peak of memory is a process's."""
    command = [sys.executable, "-m", "oxidizr_ref", "bench", "-f", config, "--json"]
    command += ["--rounds", str(rounds), "--threads", str(threads)]
    found: dict[str, Any] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    return found


def measure(config: str, rounds: int) -> dict[str, float]:
    """All ratios of a config, every op among them."""
    pairs = [(bench(config, rounds, 2), bench(config, rounds, 1)) for _ in range(PAIRS)]
    both = [two for two, _ in pairs]
    weights = both[0]["parameters"] * bytes_of_a_number(config)
    ratios = {
        OVER_FLOOR: statistics.median(two["over_floor"] for two in both),
        THREADS: statistics.median(one["step"]["median"] / two["step"]["median"] for two, one in pairs),
        MEMORY: statistics.median(two["memory"] for two in both) / weights,
    }
    for op in both[0]["ops"]:
        ratios[f"{op} / floor"] = statistics.median(two["ops"].get(op, 0.0) / two["floor"]["median"] for two in both)
    return ratios | beside_twin(config, rounds)


def beside_twin(config: str, rounds: int) -> dict[str, float]:
    """The ratio to the PyTorch twin; nothing where there is no twin or no PyTorch."""
    from oxidizr_ref.config import load_config

    if peers.missing(TWIN) or not CONTESTANTS[TWIN].suits(load_config(config).model):
        return {}
    return {OVER_TWIN: statistics.median(peers.compare(config, [TWIN], rounds, threads=2)[TWIN].ratios)}


def bytes_of_a_number(config: str) -> int:
    """Of the dtype in which the parameters are stored."""
    from oxidizr_ref.backend import STORAGE_DTYPES
    from oxidizr_ref.config import load_config

    return STORAGE_DTYPES[load_config(config).model.dtype].itemsize


# --- storing ----------------------------------------------------------------------------------------------------------


def to_record(ratios: Ratios) -> dict[str, float]:
    """What is stored of a model: the ratios that decide and the heaviest ops, three significant digits each."""
    ops = sorted(ratios.keys() - set(STEP_LEVEL), key=lambda name: (-ratios[name], name))[:HEAVIEST]
    return {name: float(f"{ratios[name]:.3g}") for name in (*STEP_LEVEL, *ops) if name in ratios}


def merged(stored: Mapping[str, Any], of_machine: Mapping[str, Any], models: Mapping[str, Ratios]) -> dict[str, Any]:
    """The stored ratios with those of some models renewed; the others stay only if they are of the same machine."""
    others = stored.get("models", {}) if stored.get("machine") == of_machine else {}
    return {"machine": dict(of_machine), "models": {**others, **models}}


def read() -> dict[str, Any]:
    """What is stored; nothing where nothing is."""
    return json.loads(RATIOS.read_text(encoding="utf-8")) if RATIOS.exists() else {}


def write(content: Mapping[str, Any]) -> None:
    """Store."""
    RATIOS.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


# --- the command ------------------------------------------------------------------------------------------------------


def main() -> int:
    """Measure, then record or compare. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.guard", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: {' '.join(DEFAULT)}")
    parser.add_argument("--record", action="store_true", help="store the ratios instead of comparing with the stored ones")
    parser.add_argument("--rounds", type=int, default=10, metavar="N", help="steps that each process measures (10)")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    configs = {name: peers.config_of(name, parser) for name in options.names or DEFAULT}
    return record(configs, options.rounds) if options.record else check(configs, options.rounds)


def record(configs: Mapping[str, str], rounds: int) -> int:
    """Measure and store, model by model."""
    here = machine()
    for model, config in configs.items():
        found = to_record(measure(config, rounds))
        print(table(model, compare(found, found)), flush=True)
        write(merged(read(), here, {model: found}))
    return 0


def check(configs: Mapping[str, str], rounds: int) -> int:
    """Measure and compare with what is stored."""
    stored, here = read(), machine()
    known: Mapping[str, Ratios] = stored.get("models", {})
    same = stored.get("machine") == here
    lost: list[str] = []
    for model, config in configs.items():
        if model not in known:
            print(f"{model}: no ratio is stored (--record does it)", flush=True)
            continue
        rows = compare(known[model], measure(config, rounds))
        if same and any(row.lost for row in rows):
            rows = confirmed(rows, compare(known[model], measure(config, 2 * rounds)))
        print(table(model, rows), flush=True)
        lost += [f"{model}, {row.name}" for row in decisive_losses(rows)]
    if known and not same:
        print(f"the stored ratios are of another machine, so nothing is decided: {stored.get('machine')}, here {here}")
        return 0
    for loss in lost:
        print(f"lost a tenth or more, twice: {loss}")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
