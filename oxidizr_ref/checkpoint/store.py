"""The checkpoint directory: step files, metrics, and moving an abandoned branch out of the way.

::

    step_N.safetensors   a whole run after N optimizer steps; nothing else is needed to continue it
    metrics.jsonl        one line a logged step
    config.json          the config as it was understood, for people
    run.json             what the directory is in the middle of (see `supersede`)
    superseded/K/        step files and metric lines of abandoned branches

Order is by step number, never by time. Nothing is deleted but what retention (`max_checkpoints`) lets go.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from oxidizr_ref.checkpoint import format
from oxidizr_ref.errors import CheckpointError, UsageError

_STEP_FILE = re.compile(r"step_(0|[1-9][0-9]*)\.safetensors")
_INCOMING = ".incoming.safetensors"
_LEFTOVER = re.compile(
    r"\.(step_[0-9]+\.safetensors|[a-z]+\.jsonl?|\.incoming\.safetensors)\.[0-9]+\.tmp|\.incoming\.safetensors"
)


class CheckpointStore:
    """One checkpoint directory. ``keep``: how many step files to keep, 0 for all."""

    def __init__(self, directory: Path, keep: int = 0) -> None:
        self.directory, self.keep = directory, keep

    # --- looking ------------------------------------------------------------------------------------------------------

    def path(self, step: int) -> Path:
        """The file of one step."""
        return self.directory / f"step_{step}.safetensors"

    def steps(self) -> list[int]:
        """The steps whose files are here, ascending."""
        if not self.directory.is_dir():
            return []
        try:
            names = [entry.name for entry in self.directory.iterdir() if entry.is_file()]
        except OSError as error:
            raise self._unusable(error) from error
        return sorted(int(match[1]) for match in map(_STEP_FILE.fullmatch, names) if match)

    def _unusable(self, error: OSError) -> UsageError:
        return UsageError(f"checkpoint directory {self.directory}: {error.strerror or error}; see --checkpoint-dir")

    def describe(self) -> str:
        """Which step files are here, in a few words."""
        steps = self.steps()
        if not steps:
            return f"{self.directory} holds no step files"
        return f"{self.directory} holds " + ", ".join(f"step_{step}" for step in steps[-10:])

    def resolve(self, wish: str) -> Path | None:
        """The file ``--resume`` means: a path, or ``auto`` for the newest here (None when there is none).

        Raises UsageError when a path is not there (saying what is).
        """
        self._finish_what_was_interrupted()
        if wish == "auto":
            steps = self.steps()
            return self.path(steps[-1]) if steps else None
        path = Path(wish)
        if not path.is_file():
            there = CheckpointStore(path.parent) if path.parent.is_dir() else self
            raise UsageError(f"--resume {wish}: no such file; {there.describe()}")
        return path

    def load(self, path: Path) -> format.Checkpoint:
        """Read and prove one file. A file named ``step_N`` whose inside says another step is damage."""
        checkpoint = format.load(path)
        match = _STEP_FILE.fullmatch(path.name)
        try:
            inside = json.loads(checkpoint.metadata["progress"])["step"]
        except (KeyError, TypeError, ValueError):
            raise CheckpointError(f"{path}: does not say which step it holds") from None
        if match and int(match[1]) != inside:
            raise CheckpointError(f"{path}: named after step {match[1]}, but it holds step {inside}")
        return checkpoint

    # --- writing ------------------------------------------------------------------------------------------------------

    def open(self, config: Mapping[str, Any]) -> None:
        """Make the directory, clear away what a killed writer left, note the config. Raises UsageError if it cannot."""
        self._finish_what_was_interrupted()
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            for entry in sorted(self.directory.iterdir()):
                if _LEFTOVER.fullmatch(entry.name):
                    entry.unlink()
            self._write("config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
        except OSError as error:
            raise self._unusable(error) from error

    def save(self, step: int, tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> Path:
        """Write the file of one step, metrics first, then let go of the oldest beyond ``keep``.

        Raises CheckpointError when it cannot be written, and when a sound file of this step is there and holds other bytes:
        determinism was broken.
        """
        path = self.path(step)
        try:
            self._sync_metrics()
            if path.exists():
                self._must_be_equal(path, format.encode_header(tensors, metadata))
            else:
                format.save(path, tensors, metadata)
            self._prune(step)
        except OSError as error:
            advice = "free some space, or use a larger save_interval, fewer --max-checkpoints or --dtype bf16"
            reason = error.strerror or error
            raise CheckpointError(f"{path}: cannot be written ({reason}); earlier files are whole; {advice}") from error
        return path

    def _must_be_equal(self, path: Path, header: bytes) -> None:
        # The header names every bit of the payload by its digest, so equal headers of whole files mean equal files.
        format.verify(path)
        with open(path, "rb") as file:
            if file.read(len(header)) != header:
                raise CheckpointError(f"{path} is there, and this run made other bytes for it: determinism was broken")

    def _prune(self, saved: int) -> None:
        if self.keep:
            for step in self.steps()[: -self.keep]:
                if step != saved:
                    self.path(step).unlink(missing_ok=True)

    def _write(self, name: str, text: str) -> None:
        """Replace a small file, whole or not at all."""
        temporary = self.directory / f".{name}.{os.getpid()}.tmp"
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.directory / name)
        format.sync_directory(self.directory)

    # --- branches -----------------------------------------------------------------------------------------------------

    def refuse_to_start_over(self) -> None:
        """A fresh start where a run already is would mix two runs. Raises UsageError naming the ways on."""
        self._finish_what_was_interrupted()
        if self.steps():
            raise UsageError(
                f"{self.describe()}; continue with --resume auto, start over with --overwrite "
                "(moves them to superseded/), or choose another --checkpoint-dir"
            )

    def supersede(
        self, first: int, progress: int, begin_with: tuple[Mapping[str, Any], Mapping[str, str]] | None = None
    ) -> list[int]:
        """Move the step files from step ``first`` on, and the metric lines beyond step ``progress``, to ``superseded/``.

        ``begin_with``: tensors and metadata that become the file of step ``progress``, so that ``auto`` finds a branch that
        began elsewhere. Returns the steps that were moved. Where there are none, later metric lines are those of steps
        that will be done again, and are dropped.

        What is about to be moved is noted in run.json first. If the process dies in between, the next one finishes the
        moving before it looks for the newest file, so it can never continue on the abandoned branch.
        """
        steps = [step for step in self.steps() if step >= first]
        if not steps and begin_with is None:
            self._cut_metrics(progress, None)
            return []
        if begin_with is not None:
            format.save(self.directory / _INCOMING, *begin_with)
        taken = self.directory / "superseded"
        number = 1 + max((int(e.name) for e in taken.iterdir() if e.name.isdigit()), default=0) if taken.is_dir() else 1
        self._write("run.json", json.dumps({"superseding": {"steps": steps, "progress": progress, "into": str(number)}}))
        self._finish_what_was_interrupted()
        return steps

    def _finish_what_was_interrupted(self) -> None:
        note = self.directory / "run.json"
        if not note.is_file():
            return
        try:
            task = json.loads(note.read_text(encoding="utf-8"))["superseding"]
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{note}: is damaged; if no run was going back to an earlier step, delete it") from error
        if task is None:
            return
        into = self.directory / "superseded" / task["into"]
        into.mkdir(parents=True, exist_ok=True)
        for step in task["steps"]:
            moved = into / self.path(step).name
            if self.path(step).exists() and not moved.exists():  # moved already: what is here now is the new branch's
                os.replace(self.path(step), moved)
        if (self.directory / _INCOMING).exists():
            os.replace(self.directory / _INCOMING, self.path(task["progress"]))
        self._cut_metrics(task["progress"], into / "metrics.jsonl")
        format.sync_directory(into)
        self._write("run.json", json.dumps({"superseding": None}))

    # --- metrics ------------------------------------------------------------------------------------------------------

    @property
    def _metrics(self) -> Path:
        return self.directory / "metrics.jsonl"

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one line."""
        try:
            with open(self._metrics, "a", encoding="utf-8") as file:
                file.write(json.dumps(record, allow_nan=False) + "\n")
        except OSError as error:
            raise CheckpointError(f"{self._metrics}: cannot be written ({error.strerror or error})") from error

    def _sync_metrics(self) -> None:
        """Lines of a step are on the disk before the file of that step appears."""
        if self._metrics.exists():
            with open(self._metrics, "ab") as file:
                os.fsync(file.fileno())

    def _cut_metrics(self, step: int, beyond: Path | None) -> None:
        """Keep the lines up to ``step``; copy the later ones to ``beyond``. Half a line, left by a kill, is dropped.

        A line marked ``final`` says how a run ended, and goes when the run goes on.
        """
        if not self._metrics.exists():
            return
        kept: list[str] = []
        later: list[str] = []
        for line in self._metrics.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
            try:
                record = json.loads(line)
                past = record["step"] > step or bool(record.get("final"))
            except (ValueError, KeyError, TypeError):
                continue
            (later if past else kept).append(line)
        if later and beyond is not None:
            beyond.write_text("".join(later), encoding="utf-8")
        self._write("metrics.jsonl", "".join(kept))
