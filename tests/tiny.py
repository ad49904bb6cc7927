"""Tiny runs for tests: configs and text in a temporary directory, the command line in this process or in another.

Run as a script (``python tests/tiny.py ARGS``) it is the command line with small tiles (`shrink_tiles`), which dies by
SIGKILL at the moment that the environment variable TINY_KILL names. Its bits are comparable among such runs only.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import yaml

from oxidizr_ref import optim, parallel
from oxidizr_ref.checkpoint import format
from oxidizr_ref.cli import main as cli_main
from oxidizr_ref.cli import train as cli_train
from oxidizr_ref.cli.report import HeadlessReporter, PlainReporter
from oxidizr_ref.fused import attention, chunked_scan, linear_cross_entropy, selective_scan
from oxidizr_ref.trainer import Trainer

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGE = REPOSITORY / "oxidizr_ref"

MODEL = {
    "name": "tiny",
    "hidden_size": 16,
    "num_layers": 1,
    "num_heads": 2,
    "kv_heads": 1,
    "intermediate_size": 24,
    "vocab_size": 260,
    "max_seq_len": 8,
}
TRAINER = {
    "learning_rate": 1e-2,
    "batch_size": 2,
    "gradient_accumulation": 2,
    "max_steps": 40,
    "log_interval": 1,
    "save_interval": 10,
    "max_checkpoints": 0,
    "target_device": "cpu",
}

#: Small tiles: with the models of `WIDE`, every tiled operation of the package has at least three.
SMALL_TILES = [
    (parallel, "ELEMENTS", 4096),
    (parallel, "CACHED", 4096),
    (parallel, "SMALL_PRODUCT", 1 << 18),
    (parallel, "ROWS", 32),
    (parallel, "FEWEST_ROWS", 32),
    (attention, "QUERY_BLOCK", 16),
    (attention, "SCORES", 1 << 12),
    (linear_cross_entropy, "LOGITS", 1 << 14),
    (selective_scan, "STATES", 1 << 8),
    (chunked_scan, "WEIGHTS", 1 << 9),
    (format, "CHUNK_BYTES", 1 << 14),
]
_WIDE: dict[str, Any] = {"hidden_size": 64, "num_heads": 4, "kv_heads": 2, "intermediate_size": 264, "max_seq_len": 64}
_STATES: dict[str, Any] = {"mamba2_num_heads": 8, "mamba2_state_size": 16, "mamba2_chunk_size": 16, "mamba2_n_groups": 2}
_MLA_MOE: dict[str, Any] = {
    "kv_latent_dim": 24,
    "q_latent_dim": 20,
    "d_rope": 8,
    "num_experts": 4,
    "shared_expert_enabled": True,
}
_MIMO: dict[str, Any] = {"mamba3_enabled": True, "mamba3_mimo_rank": 2, "mamba3_use_conv": True}
#: A model has Mambas of one kind only; between them these have every kind of layer.
WIDE: dict[str, dict[str, Any]] = {
    "llama": _WIDE,
    "mamba1": {**_WIDE, "mamba_layers": [0], "mamba_d_state": 8},
    "mamba2_mla_moe": {**_WIDE, **_STATES, **_MLA_MOE, "num_layers": 2, "mamba_layers": [0]},
    "mamba3_mimo": {**_WIDE, **_STATES, **_MIMO, "num_layers": 2, "mamba_layers": [1]},
}

#: Fields of metrics.jsonl that tell of the time and the machine, not of the training.
OF_THE_MACHINE = frozenset({"it/s", "tokens/s", "memory_mb"})

_WORDS = ("the", "a", "cat", "dog", "bird", "sat", "ran", "flew", "on", "over", "mat", "tree", "house", "and", "it", "blue")


@dataclass(frozen=True)
class Run:
    """A config, its data and its checkpoint directory, all below ``root``."""

    root: Path
    config: Path
    text: Path
    directory: Path

    def argv(self, *flags: object) -> list[str]:
        """The arguments of a headless run into ``directory``."""
        start = ["train", "-f", str(self.config), "--headless", "--checkpoint-dir", str(self.directory)]
        return [*start, *map(str, flags)]

    def train(self, *flags: object) -> int:
        """Run in this process. Returns the exit code."""
        return cli(*self.argv(*flags))

    def into(self, name: str) -> Run:
        """The same run with another checkpoint directory."""
        return Run(self.root, self.config, self.text, self.root / name)

    def path(self, step: int) -> Path:
        return self.directory / f"step_{step}.safetensors"

    def steps(self) -> list[int]:
        return steps_in(self.directory)

    def metrics(self) -> list[dict[str, Any]]:
        return metrics_of(self.directory)


def make_run(
    root: Path,
    model: Mapping[str, Any] | None = None,
    trainer: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
    characters: int = 3000,
) -> Run:
    """Write a config and a text. Keys override `MODEL` and `TRAINER`."""
    root.mkdir(parents=True, exist_ok=True)
    text = write_text(root / "text.txt", characters)
    sections = {
        "model": {**MODEL, **(model or {})},
        "trainer": {**TRAINER, "checkpoint_dir": str(root / "checkpoints"), **(trainer or {})},
        "data": {"path": "text.txt", **(data or {})},
    }
    return Run(root, write_config(root / "tiny.yaml", sections), text, root / "checkpoints")


def write_config(path: Path, sections: Mapping[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(sections), encoding="utf-8")
    return path


def write_text(path: Path, characters: int, seed: int = 0) -> Path:
    """A text of exactly so many ASCII characters, a function of ``seed``."""
    source = random.Random(seed)
    words = " ".join(source.choice(_WORDS) for _ in range(characters // 2 + 1))
    path.write_text(words[:characters], encoding="utf-8")
    return path


def cli(*argv: object) -> int:
    """The command line in this process, but for reading sys.argv and exiting. Samples are short."""
    with mock.patch.object(cli_train, "_SAMPLE_TOKENS", 2):
        return cli_main._run([str(argument) for argument in argv])


# --- other processes --------------------------------------------------------------------------------------------------


def environment(**extra: str) -> dict[str, str]:
    """This process's environment, able to import the package from anywhere."""
    path = os.pathsep.join(part for part in (str(REPOSITORY), os.environ.get("PYTHONPATH", "")) if part)
    return {**os.environ, "PYTHONPATH": path, **extra}


def start(
    argv: Sequence[str], cwd: Path, env: Mapping[str, str] | None = None, small_tiles: bool = False
) -> subprocess.Popen[str]:
    """Start the command line in another process, its output captured."""
    program = [str(REPOSITORY / "tests" / "tiny.py")] if small_tiles else ["-m", "oxidizr_ref"]
    return subprocess.Popen(
        [sys.executable, *program, *argv],
        cwd=cwd,
        env=environment(**(env or {})),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str], expected: int = 0) -> tuple[str, str]:
    """Wait for a process that ends with the expected exit code (-9: killed). Returns (stdout, stderr)."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == expected, f"exit code {process.returncode}, not {expected}:\n{err}"
    return out, err


def shrink_tiles(patch: Callable[[Any, str, int], object] = setattr) -> None:
    """Set the tile constants of this process to `SMALL_TILES`, by ``patch(module, name, value)``."""
    for module, name, value in SMALL_TILES:
        assert isinstance(getattr(module, name), int)
        patch(module, name, value)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arrange_death(moment: str) -> None:
    """SIGKILL this process at a moment: ``logged:N`` (step N was logged, not saved), ``renaming:N`` (step N's file is
    written under its temporary name), ``accumulating:N`` (two micro-batches of step N are done)."""
    kind, _, number = moment.partition(":")
    step, done = int(number), [0]
    log, replace, take = HeadlessReporter.step, os.replace, Trainer._take_gradients

    def logged(self: HeadlessReporter, record: dict[str, Any], is_logged: bool) -> None:
        log(self, record, is_logged)
        if record["step"] == step:
            _die()

    def renaming(source: Any, target: Any) -> None:
        if Path(target).name == f"step_{step}.safetensors":
            _die()
        replace(source, target)

    def accumulating(self: Trainer) -> dict[str, Any]:
        done[0] += self.step + 1 == step
        if done[0] == 2:
            _die()
        return take(self)

    where = {"logged": (HeadlessReporter, "step"), "renaming": (os, "replace"), "accumulating": (Trainer, "_take_gradients")}
    what = {"logged": logged, "renaming": renaming, "accumulating": accumulating}
    setattr(*where[kind], what[kind])


# --- being killed without dying ---------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for SIGKILL in a run of this process: nothing catches it."""


@contextmanager
def after_step(step: int, act: Callable[[], object]) -> Iterator[None]:
    """Inside this context ``act()`` is called once step ``step`` is logged, before it is saved."""
    originals = {kind: kind.step for kind in (HeadlessReporter, PlainReporter)}

    def replacement(kind: type[HeadlessReporter] | type[PlainReporter]) -> Callable[..., None]:
        def report(self: Any, record: dict[str, Any], logged: bool) -> None:
            originals[kind](self, record, logged)
            if record["step"] == step:
                act()

        return report

    with (
        mock.patch.object(HeadlessReporter, "step", replacement(HeadlessReporter)),
        mock.patch.object(PlainReporter, "step", replacement(PlainReporter)),
    ):
        yield


@contextmanager
def killed_after_step(step: int) -> Iterator[None]:
    """The run inside is cut off once step ``step`` is logged, before it is saved."""

    def kill() -> None:
        raise Killed

    try:
        with after_step(step, kill):
            yield
    except Killed:
        return
    raise AssertionError(f"the run ended before step {step}")


# --- what a run left --------------------------------------------------------------------------------------------------


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def steps_in(directory: Path) -> list[int]:
    return sorted(int(path.stem.removeprefix("step_")) for path in directory.glob("step_*.safetensors"))


def step_files(directory: Path) -> dict[int, str]:
    """The SHA-256 of every step file by its step."""
    return {step: sha256(directory / f"step_{step}.safetensors") for step in steps_in(directory)}


def metrics_of(directory: Path, without: frozenset[str] = OF_THE_MACHINE) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, their deterministic fields only."""
    lines = (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in without} for line in lines]


def snapshot(root: Path) -> dict[str, str]:
    """Every file below ``root`` with its digest: equal snapshots mean nothing was written, damaged or removed. The empty
    lock file, which a process makes before it may look, is left out."""
    paths = [path for path in root.rglob("*") if path.name != ".lock"]
    return {str(path.relative_to(root)): sha256(path) if path.is_file() else "directory" for path in paths}


def lineage(path: Path) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = json.loads(format.read_header(path).metadata["lineage"])
    return entries


def rewrite(path: Path, change: Callable[[dict[str, Any], dict[str, str]], object], to: Path | None = None) -> Path:
    """Load a checkpoint, let ``change(tensors, metadata)`` edit it, and save it with right digests (default: in place)."""
    checkpoint = format.load(path)
    tensors, metadata = dict(checkpoint.tensors), dict(checkpoint.metadata)
    change(tensors, metadata)
    format.save(to or path, tensors, metadata)
    return to or path


def edit_json(metadata: dict[str, str], key: str, **changes: Any) -> None:
    """Change some entries of a JSON object in the metadata."""
    metadata[key] = json.dumps({**json.loads(metadata[key]), **changes}, sort_keys=True, separators=(",", ":"))


# --- how work was cut -------------------------------------------------------------------------------------------------

_CUTTERS = {"tiles", "row_tiles", "product_tiles", "for_each", "for_tiles", "matmul", "matmuls", "add_matmul", "add"}


def tiled_functions() -> set[str]:
    """All functions of the package that cut work into tiles, as ``file:Class.function``, read from the source."""
    found: set[str] = set()

    def walk(node: ast.AST, file: str, names: tuple[str, ...], in_function: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef | ast.FunctionDef) and not in_function:
                walk(child, file, (*names, child.name), isinstance(child, ast.FunctionDef))
                continue
            call = child.func if isinstance(child, ast.Call) else None
            if isinstance(call, ast.Attribute) and ast.unparse(call.value) == "parallel" and call.attr in _CUTTERS:
                found.add(f"{file}:{'.'.join(names)}")
            walk(child, file, names, in_function)

    for path in sorted(PACKAGE.rglob("*.py")):
        if path.name != "parallel.py":
            walk(ast.parse(path.read_text(encoding="utf-8")), path.relative_to(PACKAGE).as_posix(), (), False)
    # Hashing in chunks of 4 MiB and copying are exact, however they are cut: no run here needs three pieces of each.
    exact = {"data.py:TokenStream.facts", "checkpoint/format.py:describe", "checkpoint/saver.py:Saver._copy"}
    # Evaluating, preparing and converting are no part of a run either.
    beside = {name for name in found if name.startswith(("evaluation.py:", "prepare/", "interop/"))}
    # Looking into files is no part of a run, its own tests cut it small; nor is measuring, whose results nobody reads.
    looking = {"checkpoint/contents.py:numbers_of", "checkpoint/difference.py:distance", "bench.py:_Floor.run"}
    return found - exact - looking - beside


@contextmanager
def counting_tiles() -> Iterator[dict[str, int]]:
    """Inside this context the most tiles each function cut its work into are counted, by the names of `tiled_functions`."""
    counts: dict[str, int] = {}
    cut, spread = parallel.tiles, parallel.for_each

    def note(count: int) -> None:
        frame: FrameType | None = sys._getframe(2)
        while frame is not None and frame.f_code.co_filename == parallel.__file__:
            frame = frame.f_back
        assert frame is not None
        file = Path(frame.f_code.co_filename)
        if file.is_relative_to(PACKAGE) and file.name != "data.py":
            name = f"{file.relative_to(PACKAGE).as_posix()}:{frame.f_code.co_qualname.partition('.<locals>')[0]}"
            counts[name] = max(counts.get(name, 0), count)

    def tiles(count: int, size: int) -> list[parallel.Tile]:
        borders = cut(count, size)
        note(len(borders))
        return borders

    def for_each(count: int, work: Callable[[int], None], like: Any = None) -> None:
        note(count)
        spread(count, work, like)

    with mock.patch.object(parallel, "tiles", tiles), mock.patch.object(parallel, "for_each", for_each):
        yield counts


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Inside this context tiles are spread over ``count`` threads."""
    before = parallel.get_threads()
    parallel.set_threads(count)
    try:
        yield
    finally:
        parallel.set_threads(before)


def optimizer_arrays(trainer: Trainer) -> dict[str, bytes]:
    """All weights and moments of a trainer, as bytes."""
    assert isinstance(trainer.optimizer, optim.AdamW)
    arrays = {**trainer.model.state_dict(), **trainer.optimizer.state_dict()}
    return {name: array.tobytes() for name, array in arrays.items()}


if __name__ == "__main__":
    shrink_tiles()
    if "TINY_KILL" in os.environ:
        arrange_death(os.environ["TINY_KILL"])
    cli_train._SAMPLE_TOKENS = 2
    cli_main.main()
