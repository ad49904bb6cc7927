"""Going back to an earlier step: what the abandoned branch left moves to ``superseded/K/``, whatever interrupts the moving.

What is about to be moved is noted in run.json first. If the process dies in between, the next one finishes the moving before
it looks for the newest file, so it can never continue on the abandoned branch. Each step below may be repeated, and each
barrier is there because the disk may keep a later rename and lose an earlier one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from oxidizr_ref.checkpoint import disk, format
from oxidizr_ref.checkpoint.metrics import MetricsLog
from oxidizr_ref.config import canonical_json
from oxidizr_ref.errors import CheckpointError

#: The first file of a branch that began elsewhere, until those before it are out of its way.
INCOMING = ".incoming.safetensors"
_NOTE = "run.json"
_NOTHING: dict[str, Any] = {"superseding": None}

Beginning = tuple[Mapping[str, Any], Mapping[str, str]]


def step_path(directory: Path, step: int) -> Path:
    """The file of one step."""
    return directory / f"step_{step}.safetensors"


def supersede(
    directory: Path, metrics: MetricsLog, steps: Sequence[int], progress: int, begin_with: Beginning | None
) -> None:
    """Move the files of ``steps`` and the metric lines beyond step ``progress``; begin anew with these tensors and metadata.

    Raises OSError when the disk refuses; what was begun is then finished by the next `finish`.
    """
    if not steps and begin_with is None:
        metrics.cut(progress, None)  # lines of steps that will be done again
        return
    if begin_with is not None:
        format.save(directory / INCOMING, *begin_with)
    task = {
        "steps": list(steps),
        "progress": progress,
        "into": str(_next_number(directory / "superseded")),
        "begins": begin_with is not None,
    }
    _write_note(directory, {"superseding": task})
    finish(directory, metrics)


def finish(directory: Path, metrics: MetricsLog) -> None:
    """Complete the moving that run.json tells of, if it does. Raises CheckpointError when run.json is damaged."""
    task = _read_note(directory / _NOTE)
    if task is None:
        return
    into, incoming = directory / "superseded" / str(task["into"]), directory / INCOMING
    first = step_path(directory, int(task["progress"]))
    disk.make_directory(into)
    if disk.exists(incoming) or not task["begins"]:  # else the new branch has begun: what is here now is its own
        for step in task["steps"]:
            path = step_path(directory, int(step))
            if disk.exists(path):
                disk.rename(path, into / path.name)
        disk.sync_directory(into)
        disk.sync_directory(directory)  # barrier: the old files are safe before one of their names is used again
    if disk.exists(incoming):
        disk.rename(incoming, first)
    metrics.cut(int(task["progress"]), into / "metrics.jsonl")
    disk.remove(disk.temporary_of(into / "metrics.jsonl"))  # nobody else cleans up in there
    disk.sync_directory(directory)  # barrier: all is done before the note is taken away
    _write_note(directory, _NOTHING)


def _next_number(directory: Path) -> int:
    names = [entry.name for entry in directory.iterdir()] if directory.is_dir() else []
    return 1 + max((int(name) for name in names if name.isdecimal()), default=0)


def _write_note(directory: Path, note: Mapping[str, Any]) -> None:
    disk.replace(directory / _NOTE, canonical_json(note).encode())


def _read_note(path: Path) -> dict[str, Any] | None:
    if not disk.exists(path):
        return None
    try:
        task = json.loads(disk.read(path))["superseding"]
        if task is None or {"steps", "progress", "into", "begins"} <= task.keys():
            return task  # type: ignore[no-any-return]
    except (AttributeError, KeyError, TypeError, ValueError):
        pass
    raise CheckpointError(f"{path}: is damaged; if no run was going back to an earlier step, delete it")
