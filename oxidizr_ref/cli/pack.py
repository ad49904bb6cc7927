"""``oxidizr-ref pack``: a checkpoint as a package that others can open."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.prompt import Prompt
from rich.table import Table

from oxidizr_ref.checkpoint.store import CheckpointStore
from oxidizr_ref.cli.completion import checkpoints, dtypes
from oxidizr_ref.cli.terminal import console
from oxidizr_ref.cli.words import of, printable, short, size_of
from oxidizr_ref.errors import UsageError
from oxidizr_ref.interop.pack import Wishes, bytes_of
from oxidizr_ref.interop.pack import pack as write_package
from oxidizr_ref.interop.source import choose, run_files, steps_and_losses


def pack(
    checkpoint_dir: Annotated[Path, typer.Option("--checkpoint-dir", metavar="DIR", help="The directory of a run.")] = Path(
        "checkpoints"
    ),
    checkpoint: Annotated[
        str | None,
        typer.Option(
            "-c",
            "--checkpoint",
            metavar="WHICH",
            autocompletion=checkpoints,
            help="`latest`, `final`, a step, or a file. Default: choose from a list.",
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option("-n", "--name", metavar="NAME", help="Of the model. Default: the config's.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="DIR", help="Default: `hf/USERNAME/NAME`.")
    ] = None,
    username: Annotated[
        str | None,
        typer.Option("-u", "--username", metavar="NAME", help="Default: HF_USERNAME of the environment, or of `.env`."),
    ] = None,
    license_id: Annotated[
        str | None, typer.Option("--license", metavar="ID", help="As the hub knows it: mit, apache-2.0, cc-by-4.0 ...")
    ] = None,
    language: Annotated[
        list[str] | None, typer.Option("--language", metavar="CODE", help="Of the text, such as en; repeatable.")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype",
            metavar="TYPE",
            autocompletion=dtypes,
            help="Store weights as f32, bf16, f16 or f64. Default: as they are.",
        ),
    ] = None,
    max_shard_size: Annotated[
        str | None, typer.Option("--max-shard-size", metavar="SIZE", help="Cut the weights into files, such as 2GB each.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", metavar="", help="Replace a package that is there.")] = False,
) -> int:
    """Make a package of a checkpoint: weights, config, tokenizer, model card; ready for others, and for `push`."""
    wishes = Wishes(
        name=name,
        username=username,
        output=output,
        license=license_id,
        languages=language or (),
        dtype=dtype,
        max_shard_bytes=None if max_shard_size is None else bytes_of(max_shard_size, "--max-shard-size"),
        overwrite=overwrite,
    )
    source = choose(checkpoint_dir, _asked(checkpoint_dir) if checkpoint is None else checkpoint)
    for notice in source.notices:
        print(printable(notice), file=sys.stderr)
    packed = write_package(source, wishes)
    typer.echo(printable(f"{packed.directory}: {of(source.state.step, 'step')}, from {source.path}"))
    for file, size in packed.sizes.items():
        typer.echo(f"  {file:32s}{size_of(size):>10s}")
    typer.echo(f"layout: {f'{packed.family}, which transformers opens' if packed.family else 'our own names'}")
    if license_id is None:
        print("no --license was given: the card says that none is stated", file=sys.stderr)
    return 0


def _asked(directory: Path) -> str:
    """The step that somebody chooses from a list. Raises UsageError where there is nobody to ask."""
    run_files(directory)  # refuses before the question
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        there = CheckpointStore(directory).describe()
        raise UsageError(f"pack: which checkpoint? give -c latest, -c final or -c STEP; {there}")
    err = console(stderr=True)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in ("step", "loss", "held out"):
        table.add_column(title, justify="right")
    rows = steps_and_losses(directory)
    for step, loss, held_out in rows:
        table.add_row(f"{step}", short(loss, 4), short(held_out, 4))
    err.print(table)
    steps = [str(step) for step, _, _ in rows]
    return Prompt.ask("step", console=err, choices=steps, show_choices=False, default=steps[-1])
