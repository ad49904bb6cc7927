"""What only a CUDA device tells: ``python docs/scripts/gpu.py [PART …]`` writes docs/gpu.json and the tables of docs/gpu.md.

PART: gradients, determinism, waits, memory, speed; without any, all of them. A part that is measured anew replaces its old
numbers; those of another device, driver or library are dropped. Each case has a process of its own: one that fails leaves
its message in the table, and the others go on. ``--page-only`` makes the page of the stored numbers. Needs CuPy and a CUDA
device (the extra cuda12 or cuda13), and for the ratios of ``speed`` a PyTorch with CUDA; nobody else should use the device
meanwhile.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from oxidizr_ref.backend import module_of, resolve_device, to_host
from oxidizr_ref.config import bundled_config_names, load_config
from oxidizr_ref.fingerprint import fingerprint
from oxidizr_ref.model import LanguageModel

REPOSITORY = Path(__file__).resolve().parents[2]
PAGE, NUMBERS = REPOSITORY / "docs" / "gpu.md", REPOSITORY / "docs" / "gpu.json"
sys.path.append(str(REPOSITORY / "tests"))

from architectures import enliven, relative_error  # noqa: E402 - lives beside the tests
from bench import cuda_peers  # noqa: E402 - likewise

BEGIN, END = "<!-- gpu:begin -->", "<!-- gpu:end -->"
Row = dict[str, Any]

#: Goals. Gradients: so many roundings (each device was found up to 230 from exact ones). Memory: so far from the estimate.
ROUNDINGS, MEMORY, RATIO = 1000, 0.15, 1.5

#: TFLOPS of float32 and of bf16 on tensor cores without sparsity, as the vendor states them, by the name of the device.
PEAKS = {
    r"NVIDIA H100 80GB HBM3|NVIDIA H200": (67.0, 989.0),
    r"(NVIDIA )?A100[- ].*": (19.5, 312.0),
    r"NVIDIA GeForce RTX 4090": (82.6, 165.0),
}

# --- the device -------------------------------------------------------------------------------------------------------


def device_facts() -> Row:
    """The device and the libraries. Raises DeviceError where there is none."""
    resolve_device("gpu", demanded_by="docs/scripts/gpu.py")
    known, runtime = fingerprint("gpu"), module_of("gpu").cuda.runtime
    driver = cuda_version(runtime.driverGetVersion())
    return {
        **{key: known[key] for key in ("gpu", "compute_capability", "numpy")},
        "cupy": known["cupy_version"],
        "cuda": cuda_version(known["cuda"]),
        "driver": f"{driver_version()} (CUDA {driver})",
    }


def cuda_version(number: int) -> str:
    """13010 is 13.1."""
    return f"{number // 1000}.{number % 1000 // 10}"


def driver_version() -> str:
    """As nvidia-smi tells it."""
    if shutil.which("nvidia-smi") is None:
        return "not told"
    ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    said = subprocess.run(ask, capture_output=True, text=True, check=False).stdout.split()
    return said[0] if said else "not told"


def torch_facts() -> Row:
    """PyTorch's version, and why it cannot be measured, or None."""
    if importlib.util.find_spec("torch") is None:
        return {"torch": "none", "why": "PyTorch is not installed"}
    import torch

    return {"torch": torch.__version__, "why": None if torch.cuda.is_available() else "this PyTorch finds no CUDA device"}


def peak_tflops(device: str, given: Sequence[float] | None) -> dict[str, float]:
    """TFLOPS of f32 and bf16: those given, else those that are known of the device, else nothing."""
    known = next((peaks for name, peaks in PEAKS.items() if re.fullmatch(name, device)), ())
    return dict(zip(("f32", "bf16"), given or known, strict=False))


# --- a: gradients -----------------------------------------------------------------------------------------------------


def gradients(name: str, dtype: str) -> Row:
    """The largest relative error max|a-b| / max|b| of a parameter's gradient, b: on the CPU, at weights that all matter."""
    config = load_config(name, [f"model.dtype={dtype}"])
    here, there = LanguageModel(config.model), LanguageModel(config.model, device="gpu")
    enliven(here)
    there.load_state_dict(here.state_dict())
    ids = np.random.default_rng(0).integers(0, config.model.vocab_size, (3, config.model.max_seq_len + 1))
    for model in (here, there):
        model.loss(ids[:, :-1], ids[:, 1:], load_balance_alpha=0.01).backward()
    pairs = zip(here.named_parameters(), there.named_parameters(), strict=True)
    worst, parameter = max((relative_error(to_host(b.grad), a.grad), name) for (name, a), (_, b) in pairs)
    return {"error": worst, "parameter": parameter}


def roundings(error: float, dtype: str) -> float:
    """A relative error in units of half a last place."""
    return error / (float(np.finfo({"f64": np.float64, "f32": np.float32}[dtype]).eps) / 2)


# --- b: determinism ---------------------------------------------------------------------------------------------------

STEPS = 20
PRECISIONS = {
    "f32": ("--dtype", "f32"),
    "bf16": ("--dtype", "bf16"),
    "f16": ("--dtype", "f16"),
    "bf16, moments bf16": ("--dtype", "bf16", "--set", "trainer.optimizer_dtype=bf16"),
}


def determinism(name: str, precision: str) -> Row:
    """Whether two runs have equal bytes, and one that ended half way and went on in another process."""
    with tempfile.TemporaryDirectory() as directory:
        once, again, halves = (Path(directory, part) for part in ("once", "again", "halves"))
        for whole in (once, again):
            train(name, precision, whole, STEPS)
        train(name, precision, halves, STEPS // 2)
        if f"at step {STEPS // 2}" not in train(name, precision, halves, STEPS, "--resume", "auto"):
            raise RuntimeError("the second half did not begin where the first one ended")
        first, *others = (sha256(path / f"step_{STEPS}.safetensors") for path in (once, again, halves))
    return {"sha256": first, "repeats": others[0] == first, "resumes": others[1] == first}


def train(name: str, precision: str, directory: Path, steps: int, *more: str) -> str:
    """Train to a step in a process of its own. Returns what it said."""
    run = ["-f", name, "-d", "random", "--max-steps", str(steps), "--checkpoint-dir", str(directory), "--headless"]
    constant = ("--set", "trainer.lr_schedule=constant")  # else the length of a run is part of its config
    command = ["-m", "oxidizr_ref", "train", "--target-device", "gpu", *run, *constant, *PRECISIONS[precision], *more]
    return run_python(command)[1]


def sha256(path: Path) -> str:
    """The digest of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


# --- the parts --------------------------------------------------------------------------------------------------------


def gradient_cells(row: Row, _: Mapping[str, float]) -> list[str]:
    """Error, roundings, parameter."""
    count = roundings(row["error"], row["case"][1])
    return [judged(f"{row['error']:.1e}", count <= ROUNDINGS), f"{count:,.1f}", f"`{row['parameter']}`"]


def determinism_cells(row: Row, _: Mapping[str, float]) -> list[str]:
    """Two verdicts and a digest."""
    verdicts = [judged("yes" if row[key] else "no", row[key]) for key in ("repeats", "resumes")]
    return [*verdicts, f"`{row['sha256'][:12]}…`"]


def wait_cells(row: Row, _: Mapping[str, float]) -> list[str]:
    """Two counts."""
    return [f"{row['fetched']:g}", f"{row['events']:g}"]


def memory_cells(row: Row, _: Mapping[str, float]) -> list[str]:
    """The estimate, and two ratios to it."""
    used, pool = (row[key] / row["estimate"] for key in ("used", "pool"))
    return [f"{row['estimate'] / 1e6:,.0f}", judged(f"{used:.2f}", abs(used - 1) <= MEMORY), f"{pool:.2f}"]


def speed_cells(row: Row, peaks: Mapping[str, float]) -> list[str]:
    """Parameters, ours, and what it is to PyTorch's."""
    seconds, peak = row["seconds"], peaks.get(row["case"][1])
    reached = f"{share_of_peak(row['operations'] * row['tokens'], seconds, peak):.1%}" if peak else "not told"
    ours = [f"{row['parameters'] / 1e6:,.0f} M", f"{seconds * 1e3:,.1f}", f"{row['tokens'] / seconds:,.0f}", reached]
    if "ratio" not in row:
        return [*ours, "", "", ""]
    ratio, spread = judged(f"{row['ratio']:.2f}", row["ratio"] <= RATIO), "{:.2f}–{:.2f}".format(*row["quartiles"])
    share = f"{row['memory'] / row['their_memory']:.2f}"
    return [*ours, f"{row['their_seconds'] * 1e3:,.1f}", f"{ratio} ({spread}) ≤ {RATIO:g}", share]


def share_of_peak(operations: float, seconds: float, tflops: float) -> float:
    """Of a device that could do so many 10¹² operations a second, the share that was reached."""
    return operations / seconds / (tflops * 1e12)


def judged(text: str, reached: bool) -> str:
    """In italics where a goal is missed."""
    return text if reached else f"*{text}*"


@dataclass(frozen=True)
class Part:
    """A part of the measurements: its cases, what measures one, and how the page tells of it.

    columns: those of the case, then those that ``cells`` makes of a row and the device's peaks.
    """

    title: str
    says: str
    cases: Sequence[tuple[str, ...]]
    measure: Callable[..., Row]
    columns: Sequence[str]
    cells: Callable[[Row, Mapping[str, float]], list[str]]


TINY = [name for name in bundled_config_names() if name.startswith("tiny-")]
#: Between them these have every kind of layer.
EVERY_LAYER = ("tiny-llama", "tiny-hybrid", "tiny-mamba1", "tiny-mamba3-mimo")

PARTS = {
    "gradients": Part(
        "Gradients against the CPU's",
        "The largest relative error max|a-b| / max|b| of any parameter's gradient, computed on both in the same dtype at\n"
        f"weights that all matter; in roundings of that dtype, of which at most {ROUNDINGS:,} are meant to be.",
        [(name, dtype) for name in TINY for dtype in ("f64", "f32")],
        gradients,
        ("model", "dtype", "error", "roundings", "of"),
        gradient_cells,
    ),
    "determinism": Part(
        "The same bits",
        f"The files of step {STEPS} of two runs, and of one that ended at step {STEPS // 2} and went on in another process.",
        [(name, precision) for name in EVERY_LAYER for precision in PRECISIONS],
        determinism,
        ("model", "stored as", "a second run", "resumed", "sha256"),
        determinism_cells,
    ),
    "waits": Part(
        "What a step waits for",
        "In a step that is not logged, as far as Python asks for it: arrays fetched (meant: one a mixture of experts), and\n"
        "events waited for (meant: one, the numbers of the step before).",
        [(name,) for name in EVERY_LAYER],
        cuda_peers.waits,
        ("model", "fetched", "events"),
        wait_cells,
    ),
    "memory": Part(
        "Memory",
        "What a step was estimated to need; the most that arrays held at a time, over the estimate (meant to be within\n"
        f"{MEMORY:.0%}); and what CuPy's pool took of the device for them, over the estimate.",
        [(name, dtype) for name in cuda_peers.BENCHMARKS for dtype in ("f32", "bf16")],
        cuda_peers.memory,
        ("model", "dtype", "estimate, MB", "held", "taken"),
        memory_cells,
    ),
    "speed": Part(
        "A step beside PyTorch's",
        "Ours and [a twin](../tests/bench/cuda_peers.py) in PyTorch eager take turns; the ratio is the median of {pairs}\n"
        "pairs, **ours over theirs: below 1 we are faster**, in brackets the quartiles, then the goal. TF32 is off on both\n"
        "sides. *Of peak*: products with weights and attention, over what the vendor states for the device. *Memory*: what\n"
        "our pool took of the device over what PyTorch's did. A bf16 twin has bf16 gradients and moments, ours float32.",
        [(name, dtype) for name in ("nano", "llama350m") for dtype in ("f32", "bf16")],
        lambda name, dtype, pairs, no_peer: cuda_peers.speed(name, dtype, int(pairs), bool(no_peer)),
        ("model", "dtype", "parameters", "ms a step", "tokens/s", "of peak", "PyTorch, ms", "ratio", "memory"),
        speed_cells,
    ),
}


# --- the page ---------------------------------------------------------------------------------------------------------

NOT_RUN = """**Not run yet.** Nothing on this page has been measured on a CUDA device. Whoever has one runs
`python docs/scripts/gpu.py`, and the tables appear in this place."""
HEAD = """Measured by [`docs/scripts/gpu.py`](scripts/gpu.py) on {dates}: {gpu}, compute capability {compute_capability},
driver {driver}; CUDA {cuda}, CuPy {cupy}, NumPy {numpy}, PyTorch {torch}. A number that misses its goal is in italics."""


def section(numbers: Mapping[str, Any] | None) -> str:
    """All between the markers, in Markdown."""
    if numbers is None:
        return NOT_RUN
    parts = numbers["parts"]
    dates = ", ".join(sorted({found["date"] for found in parts.values()}))
    lines = [HEAD.format(dates=dates, **numbers["facts"])]
    for name, part in PARTS.items():
        lines += ["", f"### {part.title}", ""]
        if name not in parts:
            lines.append(f"Not run: `python docs/scripts/gpu.py {name}`.")
            continue
        says = part.says.replace("{pairs}", str(parts[name]["pairs"]))
        lines += [says, "", *([f"{parts[name]['without']}.", ""] if parts[name]["without"] else [])]
        lines += [f"| {' | '.join(part.columns)} |", "|" + "---|" * len(part.columns)]
        lines += [f"| {' | '.join(cells_of(part, row, numbers['peaks']))} |" for row in parts[name]["rows"]]
    return "\n".join(lines)


def cells_of(part: Part, row: Row, peaks: Mapping[str, float]) -> list[str]:
    """A row of a table; of a case that failed, its message."""
    case = [f"`{row['case'][0]}`", *row["case"][1:]]
    found = [f"*failed: {row['failed']}*"] if "failed" in row else part.cells(row, peaks)
    return [*case, *found, *[""] * (len(part.columns) - len(case) - len(found))]


def insert(numbers: Mapping[str, Any] | None, page: Path) -> None:
    """Put the section between its markers. Raises ValueError where one is missing."""
    before, begin, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{page} has not both markers, {BEGIN} and {END}")
    page.write_text(f"{before}{begin}\n{section(numbers)}\n{end}{after}", encoding="utf-8")


# --- the command ------------------------------------------------------------------------------------------------------


class CaseError(Exception):
    """A process that failed; the last line it said."""


def run_python(arguments: Sequence[str]) -> tuple[str, str]:
    """Run Python here. Returns what it printed, and what it said to stderr. Raises CaseError."""
    paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "CUPY_TF32": "0"}
    done = subprocess.run([sys.executable, *arguments], cwd=REPOSITORY, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise CaseError(re.sub(r"^[\w.]+\.(\w+Error: )", r"\1", last))
    return done.stdout, done.stderr


def in_a_process(*arguments: str) -> Row:
    """What ``--case`` with these arguments finds. Raises CaseError."""
    found: Row = json.loads(run_python([__file__, "--case", *arguments])[0].splitlines()[-1])
    return found


def measured(part: str, *extra: str) -> list[Row]:
    """Every case of a part, each in a process of its own."""
    rows: list[Row] = []
    for case in PARTS[part].cases:
        try:
            row = in_a_process(part, *case, *extra)
        except CaseError as error:
            row = {"failed": str(error).replace("|", "/")}
        print(part, *case, json.dumps(row), flush=True)
        rows.append({"case": list(case), **row})
    return rows


def main() -> None:
    """Measure, store, write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", choices=[*PARTS, []], help=f"{', '.join(PARTS)}; default: all")
    parser.add_argument("--date", default=str(datetime.date.today()), help="default: today")
    parser.add_argument("--pairs", default="10", metavar="N", help="of speed (10)")
    parser.add_argument("--peak-tflops", nargs=2, type=float, metavar=("F32", "BF16"), help="of the device, if not known")
    parser.add_argument("--page-only", action="store_true", help="measure nothing")
    parser.add_argument("--case", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        name, *case = options.case
        facts = {"device": device_facts, "torch": torch_facts}
        print(json.dumps(facts[name]() if name in facts else PARTS[name].measure(*case)))
        return
    numbers = json.loads(NUMBERS.read_text(encoding="utf-8")) if NUMBERS.exists() else None
    if not options.page_only:
        numbers = measure_all(options, numbers)
    insert(numbers, PAGE)


def measure_all(options: argparse.Namespace, old: Mapping[str, Any] | None) -> Row:
    """Measure what was asked for, storing after each part. Ends the program where there is no device."""
    try:
        facts, torch = in_a_process("device"), in_a_process("torch")
    except CaseError as error:
        sys.exit(f"nothing can be measured here: {error}")
    facts["torch"] = torch["torch"]
    peaks = peak_tflops(facts["gpu"], options.peak_tflops)
    numbers: Row = {"facts": facts, "peaks": peaks, "parts": dict(old["parts"]) if old and old["facts"] == facts else {}}
    for part in options.parts or PARTS:
        extra = [options.pairs, torch["why"] or ""] if part == "speed" else []
        without = f"Not beside PyTorch: {torch['why']}" if part == "speed" and torch["why"] else ""
        rows = measured(part, *extra)
        numbers["parts"][part] = {"date": options.date, "pairs": int(options.pairs), "without": without, "rows": rows}
        NUMBERS.write_text(json.dumps(numbers, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return numbers


if __name__ == "__main__":
    main()
