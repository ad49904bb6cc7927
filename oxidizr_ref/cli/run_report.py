"""``oxidizr-ref report``: a run as one page of HTML."""

from __future__ import annotations

import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from oxidizr_ref.cli.words import printable, size_of
from oxidizr_ref.errors import UsageError
from oxidizr_ref.report.page import write_report


def report(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The directory of a run, at work or over.")],
    other: Annotated[
        list[Path] | None,
        typer.Option("--with", metavar="DIR2", help="Another run, drawn into the same charts; repeatable."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE.html", help="Default: report.html in DIR.")
    ] = None,
    samples: Annotated[int, typer.Option(metavar="N", min=0, help="Texts that each checkpoint writes; 0: none.")] = 1,
    opened: Annotated[bool, typer.Option("--open", metavar="", help="Show it in the browser.")] = False,
) -> int:
    """Write a run's curves, checkpoints, weights, samples and config as one HTML file that needs nothing else.

    It opens without a network, and equal runs give equal bytes. Nothing of the run is changed.
    """
    file = output if output is not None else directory / "report.html"
    if file.is_dir() or (output is not None and not file.parent.is_dir()):
        raise UsageError(f"-o {file}: no file can be written there; name one in a directory that exists")
    size = write_report([directory, *(other or [])], file, samples)
    typer.echo(f"written: {printable(str(file))} ({size_of(size)})")
    if opened:
        webbrowser.open(file.absolute().as_uri())
    return 0
