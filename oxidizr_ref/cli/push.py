"""``oxidizr-ref push``: a package to the Hugging Face hub."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from oxidizr_ref.cli.options import Debug
from oxidizr_ref.cli.terminal import console
from oxidizr_ref.cli.words import of, printable, size_of
from oxidizr_ref.errors import CheckpointError, UsageError
from oxidizr_ref.interop.package_check import check_package, package_files
from oxidizr_ref.interop.push import ROOT, Hub, Target, find_token, packages, repo_name


def push(
    model: Annotated[
        Path | None, typer.Option("-m", "--model", metavar="DIR", help=f"The package. Default: asks, of those in {ROOT}/.")
    ] = None,
    repo: Annotated[
        str | None, typer.Option(metavar="USER/NAME", help="The repository. Default: the last two folders of the package.")
    ] = None,
    create_repo: Annotated[
        bool, typer.Option("--create-repo", metavar="", help="Make the repository, and the branch, if it is not there.")
    ] = False,
    private: Annotated[
        bool, typer.Option("--private", metavar="", help="Make it private; refuse a public one that is there.")
    ] = False,
    revision: Annotated[str | None, typer.Option(metavar="BRANCH", help="The branch. Default: main.")] = None,
    token: Annotated[
        str | None,
        typer.Option(
            "-t",
            "--token",
            metavar="TOKEN",
            help="A token of the hub. Better: HF_TOKEN, which nobody can read off the screen.",
        ),
    ] = None,
    yes: Annotated[bool, typer.Option("-y", "--yes", metavar="", help="Do not ask before the upload.")] = False,
    debug: Debug = False,
) -> int:
    """Check a package and upload it to the Hugging Face hub, in one commit.

    An interrupted upload goes on when the same command is run again. HF_TOKEN is taken from the environment, or from a file
    `.env` here; without it, the login of the hub's own client is used.
    """
    del debug  # read by main
    directory = model or _chosen()
    name = repo_name(directory, repo)
    _must_be_whole(directory)
    hub = Hub(find_token(token))
    target = hub.look_up(name, revision, create_repo, private)
    files = package_files(directory)
    _show(directory, files, target)
    if not yes and not _agreed("Upload?"):
        print("nothing was uploaded", file=sys.stderr)
        return 1
    url, changed = hub.push(directory, files, target)
    if not changed:
        print("everything was there already", file=sys.stderr)
    typer.echo(url)
    return 0


def _chosen() -> Path:
    """The package picked from a list."""
    found = packages()
    if not found:
        raise UsageError(f"there are no packages in {ROOT}/; make one with `oxidizr-ref pack`, or name one with -m DIR")
    if not sys.stdin.isatty():
        raise UsageError("push: name the package with -m DIR (there is no terminal to ask on)")
    err = console(stderr=True)
    for count, directory in enumerate(found, 1):
        err.print(Text(f"{count:>3}  {printable(str(directory))}"))
    number: int = typer.prompt(f"Which one? (1-{len(found)})", type=int, err=True)
    if not 1 <= number <= len(found):
        raise UsageError(f"{number} is none of them; expected a number from 1 to {len(found)}")
    return found[number - 1]


def _must_be_whole(directory: Path) -> None:
    """Show every problem of a package that is not, and end."""
    problems = check_package(directory)
    for problem in problems:
        print(printable(f"{directory}/{problem}"), file=sys.stderr)
    if problems:
        raise CheckpointError(f"{directory}: {of(len(problems), 'problem')}; nothing was uploaded")


def _show(directory: Path, files: list[str], target: Target) -> None:
    """What is about to be uploaded, and where to."""
    sizes = {name: (directory / name).stat().st_size for name in files}
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(overflow="fold")
    table.add_column(justify="right", no_wrap=True)
    for name, size in sizes.items():
        table.add_row(Text(printable(name)), Text(size_of(size)))
    table.add_row(Text(of(len(files), "file"), style="bold"), Text(size_of(sum(sizes.values())), style="bold"))
    err = console(stderr=True)
    err.print(table)
    err.print(Text(f"from {printable(str(directory))} to {target}"), soft_wrap=True)


def _agreed(question: str) -> bool:
    if not sys.stdin.isatty():
        raise UsageError("push: there is no terminal to ask on; give --yes to upload without asking")
    return typer.confirm(question, err=True)
