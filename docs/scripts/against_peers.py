"""How a training step compares with its peers: ``python docs/scripts/against_peers.py [NAME …] [--pairs N] [--page-only]``.

Runs every benchmark of ``tests/bench/configs`` beside its peers (`tests/bench/peers.py`), then its floor and a thread less
(``oxidizr-ref bench``), writes the ratios to ``docs/peers.json`` and puts the table between the markers of
``docs/performance.md``. NAME measures those benchmarks anew and leaves the others as they are. ``--page-only`` measures
nothing. Needs the extra ``oracle``. Takes about fifteen minutes on two cores, and nobody else should use them meanwhile.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
CONFIGS = REPOSITORY / "tests" / "bench" / "configs"
PAGE, NUMBERS = REPOSITORY / "docs" / "performance.md", REPOSITORY / "docs" / "peers.json"
BEGIN, END = "<!-- peers:begin -->", "<!-- peers:end -->"

LLAMA, TWINS = "eager,compile,jax", "eager,compile"
#: Each benchmark's peers.
BENCHMARKS = {
    "tiny": LLAMA,
    "char": LLAMA,
    "llama8m": LLAMA,
    "llama39m": LLAMA,
    "nano": TWINS,
    "mamba2": f"{TWINS},hf",
    "mamba3": TWINS,
    "mamba1": f"{TWINS},hf",
    "nano-full": TWINS,
}
#: At most so much, of each column; "threads" at least.
GOALS: dict[str, dict[str, float]] = {
    "tiny": {"eager": 0.85},
    "char": {"eager": 0.85},
    "llama8m": {"eager": 0.65, "compile": 0.80, "memory": 0.5, "floor": 1.25, "threads": 1.8},
    "llama39m": {"eager": 0.55, "compile": 0.80, "memory": 0.5, "floor": 1.25, "threads": 1.8},
    "nano": {"eager": 0.60, "compile": 0.80, "floor": 1.8},
    "mamba2": {"eager": 0.60, "compile": 0.80, "hf": 0.35, "floor": 1.8},
    "mamba3": {"eager": 0.60, "compile": 0.80},
    "mamba1": {"hf": 0.03},
    "nano-full": {"memory": 0.5},
}
COLUMNS = {
    "eager": "PyTorch eager",
    "compile": "torch.compile",
    "jax": "JAX",
    "hf": "Hugging Face",
    "memory": "memory, eager",
    "floor": "floor",
    "threads": "1 thread / 2",
}
ROUNDS = 3  # of bench with two threads and with one, in turn

HEAD = """## Against its peers

Measured by [`docs/scripts/against_peers.py`](scripts/against_peers.py) on {date}: {cpu}, {threads} threads;
NumPy {numpy}, {blas}; PyTorch {torch} ({kernels}), transformers {transformers}, JAX {jax}.

One training step in float32 with clipping and AdamW. Ours and a peer take turns; a number is the median of {pairs} ratios,
**ours over theirs: below 1 we are faster** (or smaller), in brackets the quartiles. *memory*: the peak of a step beyond the
weights, over PyTorch eager's. *floor*: a step over its matrix products alone. *1 thread / 2*: what the second core is worth.
Behind a number stands its goal, where it has one; a number that misses it is in italics.
"""


# --- measuring --------------------------------------------------------------------------------------------------------


def measure(name: str, pairs: int) -> dict[str, Any]:
    """All numbers of a benchmark."""
    with tempfile.TemporaryDirectory() as directory:
        told = Path(directory, "told.json")
        peers = ["-m", "tests.bench.peers", name, "--against", BENCHMARKS[name], "--pairs", str(pairs), "--json", str(told)]
        subprocess.run([sys.executable, *peers], cwd=REPOSITORY, check=True)
        found = json.loads(told.read_text(encoding="utf-8"))
    contestants = found["contestants"]
    numbers: dict[str, Any] = {
        "step": rounded(contestants["ours"]["median"]),
        "memory": contestants["ours"]["memory"],
        "peers": {who: _peer(of) for who, of in contestants.items() if who != "ours"},
    }
    twice, once = zip(*((_bench(name, 2), _bench(name, 1)) for _ in range(ROUNDS)), strict=True)
    numbers["floor"] = rounded(statistics.median(one["over_floor"] for one in twice))
    steps = zip(once, twice, strict=True)
    numbers["threads"] = rounded(statistics.median(one["step"]["median"] / two["step"]["median"] for one, two in steps))
    facts = {key: value for of in contestants.values() for key, value in of["facts"].items()}
    return {"date": str(datetime.date.today()), "pairs": pairs, "cpu": found["cpu"], "facts": facts, **numbers}


def _peer(of: Mapping[str, Any]) -> dict[str, Any]:
    quartiles = [rounded(ratio) for ratio in of["ratio_quartiles"]]
    return {"ratio": rounded(of["ratio"]), "quartiles": quartiles, "memory_ratio": rounded(of["memory_ratio"])}


def _bench(name: str, threads: int) -> dict[str, Any]:
    command = ["-m", "oxidizr_ref", "bench", "-f", str(CONFIGS / f"{name}.yaml"), "--threads", str(threads), "--json"]
    done = subprocess.run([sys.executable, *command], cwd=REPOSITORY, check=True, stdout=subprocess.PIPE, encoding="utf-8")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def rounded(value: float) -> float:
    """Four digits."""
    return float(f"{value:.4g}")


# --- the page ---------------------------------------------------------------------------------------------------------


def insert(numbers: Mapping[str, Any], page: Path) -> None:
    """Put the section between its markers. Raises ValueError where one is missing."""
    before, begin, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{page} has not both markers, {BEGIN} and {END}")
    page.write_text(f"{before}{begin}\n{section(numbers)}\n{end}{after}", encoding="utf-8")


def section(numbers: Mapping[str, Any]) -> str:
    """All of the section, in Markdown."""
    every = [numbers[name] for name in BENCHMARKS if name in numbers]
    facts = {key: value for of in every for key, value in of["facts"].items()}
    dates, pairs = sorted({of["date"] for of in every}), sorted({of["pairs"] for of in every})
    head = HEAD.format(date=", ".join(dates), cpu=every[0]["cpu"], pairs=" or ".join(map(str, pairs)), **facts)
    rows = [f"| benchmark | ms a step | {' | '.join(COLUMNS.values())} |", "|---" + "|---:" * (len(COLUMNS) + 1) + "|"]
    for name in BENCHMARKS:
        if name in numbers:
            of = numbers[name]
            cells = " | ".join(cell(of, column, GOALS[name].get(column)) for column in COLUMNS)
            ms = of["step"] * 1e3
            rows.append(f"| `{name}` | {f'{ms:,.0f}' if ms >= 100 else f'{ms:.3g}'} | {cells} |")
    return "\n".join([head, *rows])


def cell(of: Mapping[str, Any], column: str, goal: float | None) -> str:
    """A number, its quartiles and its goal."""
    quartiles = ""
    if column in ("floor", "threads"):
        value = of[column]
    elif column == "memory":
        value = of["peers"]["eager"]["memory_ratio"]
    elif column in of["peers"]:
        value = of["peers"][column]["ratio"]
        quartiles = " ({:.2f}–{:.2f})".format(*of["peers"][column]["quartiles"])
    else:
        return ""
    shown = f"{value:.3f}" if value < 0.1 else f"{value:.2f}"
    if goal is None:
        return shown + quartiles
    missed, sign = (value < goal, "≥") if column == "threads" else (value > goal, "≤")
    return f"{f'*{shown}*' if missed else shown}{quartiles} {sign} {goal:g}"


def main() -> None:
    """Measure, store, write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", choices=[*BENCHMARKS, []], help="default: all")
    parser.add_argument("--pairs", type=int, default=10, metavar="N")
    parser.add_argument("--page-only", action="store_true")
    options = parser.parse_args()
    numbers: dict[str, Any] = json.loads(NUMBERS.read_text(encoding="utf-8")) if NUMBERS.exists() else {}
    for name in [] if options.page_only else options.names or BENCHMARKS:
        numbers[name] = measure(name, options.pairs)
        NUMBERS.write_text(json.dumps(numbers, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    insert(numbers, PAGE)


if __name__ == "__main__":
    main()
