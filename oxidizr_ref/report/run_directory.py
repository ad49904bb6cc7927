"""What a run's directory tells of it, as far as that is sound. Nothing here writes, locks, or needs the run to be over."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oxidizr_ref.checkpoint import disk, format
from oxidizr_ref.checkpoint.contents import parsed_metadata
from oxidizr_ref.checkpoint.records import Record, read_records
from oxidizr_ref.checkpoint.store import CheckpointStore, check_name
from oxidizr_ref.config import Config
from oxidizr_ref.errors import CheckpointError, UsageError
from oxidizr_ref.interop.source import readable_config

_PUT_AWAY = ("superseded", "quarantine")


@dataclass(frozen=True, slots=True)
class StepFile:
    """A step file: its size in bytes, and what is wrong with it (None: it proved whole)."""

    path: Path
    step: int
    size: int
    problem: str | None


@dataclass(frozen=True)
class Branch:
    """What a run left behind when it went back to an earlier step: ``superseded/<name>``. broken: lines passed over."""

    name: str
    files: list[StepFile]
    records: list[Record]
    broken: int


@dataclass(frozen=True)
class RunDirectory:
    """A run, from its directory.

    name: what it is called, that of its directory. records: one a logged step, ascending. broken: how many lines of
    metrics.jsonl were passed over. damaged: names of the files in ``quarantine/``. config: None where config.json cannot be
    understood; settings: its keys as they stand there (else those in the newest whole file), dotted. metadata: of the
    newest whole file, parsed; empty where there is none. moving: whether the run was going back to an earlier step when it
    was cut off.
    """

    directory: Path
    name: str
    records: list[Record]
    broken: int
    files: list[StepFile]
    branches: list[Branch]
    damaged: list[str]
    config: Config | None
    settings: dict[str, Any]
    metadata: dict[str, Any]
    moving: bool

    @property
    def whole(self) -> list[StepFile]:
        """The files that can be used, in step order."""
        return [file for file in self.files if file.problem is None]


def open_run(directory: Path) -> RunDirectory:
    """Read a run's directory, and prove its step files. Raises UsageError where there is no run in it."""
    if not directory.is_dir():
        what = "is a file" if directory.exists() else "no such directory"
        raise UsageError(f"{directory}: {what}; give the directory of a run, its checkpoint_dir")
    store = CheckpointStore(directory)
    if not store.steps() and not disk.exists(directory / "metrics.jsonl"):
        raise UsageError(f"{directory}: holds no run (neither metrics.jsonl nor a step file); {_where_runs_are(directory)}")
    records, broken = read_records(directory / "metrics.jsonl")
    files = _step_files(directory)
    metadata = _metadata_of_newest(files)
    settings = _json(directory / "config.json") or metadata.get("config")
    return RunDirectory(
        directory,
        directory.resolve().name,
        records,
        broken,
        files,
        [_branch(path) for path in _branch_directories(directory / "superseded")],
        disk.names(directory / "quarantine"),
        readable_config(directory),
        dict(_dotted(settings)) if isinstance(settings, dict) else {},
        metadata,
        bool((_json(directory / "run.json") or {}).get("superseding")),
    )


def _where_runs_are(directory: Path) -> str:
    below = [path for path in sorted(directory.iterdir()) if path.is_dir() and path.name not in _PUT_AWAY]
    runs = [str(path) for path in below if disk.exists(path / "metrics.jsonl") or CheckpointStore(path).steps()]
    return f"but runs are below it: {', '.join(runs)}" if runs else "give the directory of a run, its checkpoint_dir"


# --- files ------------------------------------------------------------------------------------------------------------


def _step_files(directory: Path) -> list[StepFile]:
    store = CheckpointStore(directory)
    return [file for step in store.steps() if (file := _step_file(store.path(step), step)) is not None]


def _step_file(path: Path, step: int) -> StepFile | None:
    """A file, proved; None for one that a run at work in its directory has let go of meanwhile."""
    problem = None
    try:
        check_name(path, format.verify(path).metadata)
    except CheckpointError as error:
        if not os.path.lexists(path):
            return None
        problem = str(error)
    return StepFile(path, step, disk.file_size(path), problem)


def _branch_directories(superseded: Path) -> list[Path]:
    """In the order in which they were left."""
    there = [path for path in superseded.iterdir() if path.is_dir()] if superseded.is_dir() else []
    return sorted(there, key=lambda path: (len(path.name), path.name))


def _branch(path: Path) -> Branch:
    return Branch(path.name, _step_files(path), *read_records(path / "metrics.jsonl"))


def _metadata_of_newest(files: Sequence[StepFile]) -> dict[str, Any]:
    for file in reversed(files):
        if file.problem is None:
            return parsed_metadata(format.read_header(file.path).metadata)
    return {}


def _json(path: Path) -> dict[str, Any] | None:
    """An object in a small file; None where there is no such file, or something else in it."""
    try:
        value = parsed_metadata({"config": disk.read(path).decode()})["config"]  # believes as little as of a checkpoint's
    except (OSError, UnicodeDecodeError):
        return None
    return value if isinstance(value, dict) else None


def _dotted(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key in sorted(tree):
        value = tree[key]
        if isinstance(value, dict) and value:
            yield from _dotted(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
