"""``oxidizr-ref verify``: are these checkpoints what was written?"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from oxidizr_ref.checkpoint import format
from oxidizr_ref.checkpoint.contents import must_exist, put_away, step_files, step_inside
from oxidizr_ref.cli.words import of, printable, size_of
from oxidizr_ref.config import canonical_json
from oxidizr_ref.errors import CheckpointError, UsageError


def verify(
    paths: Annotated[list[Path], typer.Argument(metavar="PATH", help="Checkpoint files, or directories of them.")],
    as_json: Annotated[
        bool,
        typer.Option(
            "--json",
            metavar="",
            help="A JSON object a file instead: `file`, `whole`, `error`, and of whole ones `step`, `bytes`, `tensors`.",
        ),
    ] = False,
) -> int:
    """Prove every bit of checkpoints by their digests; exit code 1 if one is not whole."""
    directories = {path: step_files(path) for path in paths if must_exist(path).is_dir()}  # refuses before the work begins
    whole = True
    for path in paths:
        if path in directories:
            whole &= _directory(path, directories[path], as_json)
        else:
            whole &= bool(_file(path, as_json))
    return 0 if whole else 1


def _file(path: Path, as_json: bool, may_be_let_go: bool = False) -> bool | None:
    """Whether a file is whole; prints it. None for one that a run at work in its directory has let go of meanwhile."""
    found: dict[str, object] = {
        "file": str(path),
        "whole": True,
        "error": None,
        "step": None,
        "bytes": None,
        "tensors": None,
    }
    try:
        header = format.verify(path)
        step = step_inside(path, header)
    except CheckpointError as error:
        if may_be_let_go and not os.path.lexists(path):
            return None
        found |= {"whole": False, "error": str(error)}
        line = str(error)
    else:
        found |= {"step": step, "bytes": header.file_size, "tensors": len(header.entries)}
        state = "no training state" if step is None else f"step {step}"
        line = f"{path}: whole, {state}, {size_of(header.file_size)}, {of(len(header.entries), 'tensor')}"
    typer.echo(canonical_json(found) if as_json else printable(line))
    return bool(found["whole"])


def _directory(directory: Path, files: list[Path], as_json: bool) -> bool:
    """Whether all step files of a directory are whole; prints them, and what lies beside them."""
    results = [whole for path in files if (whole := _file(path, as_json, may_be_let_go=True)) is not None]
    if not results:
        raise UsageError(f"{directory}: its step files were deleted while this command looked; try again")
    if not as_json:
        damage = f"{results.count(False)} not whole" if False in results else "all whole"
        beside = "".join(f"; {count} in {name}/" for name, count in put_away(directory).items() if count)
        typer.echo(printable(f"{directory}: {of(len(results), 'step file')}, {damage}{beside}"))
    return all(results)
