"""``oxidizr-ref convert``: from Hugging Face's layout to a checkpoint, and back."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from oxidizr_ref.checkpoint.contents import must_exist
from oxidizr_ref.checkpoint.disk import file_size
from oxidizr_ref.cli.completion import configs
from oxidizr_ref.cli.terminal import console
from oxidizr_ref.cli.words import counted, of, printable, size_of
from oxidizr_ref.config import load_config
from oxidizr_ref.errors import UsageError
from oxidizr_ref.interop.conversion import Converted, export_checkpoint, import_pretrained, import_weights
from oxidizr_ref.interop.pack import bytes_of


class Dtype(StrEnum):
    """How weights are stored."""

    f32 = "f32"
    bf16 = "bf16"
    f16 = "f16"
    f64 = "f64"


def convert(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SRC",
            help="A directory in Hugging Face's layout; or a checkpoint, or a directory of them: its newest; or, with -f, "
            "oxidizr's weights.",
        ),
    ],
    target: Annotated[
        Path,
        typer.Option(
            "-o", "--output", metavar="DST", help="A checkpoint (NAME.safetensors), or else a directory to export to."
        ),
    ],
    dtype: Annotated[Dtype | None, typer.Option(help="How weights are stored. Default: as they are.")] = None,
    max_shard_size: Annotated[
        str | None, typer.Option("--max-shard-size", metavar="SIZE", help="Export in files of at most this, such as 2GB.")
    ] = None,
    config: Annotated[
        str | None,
        typer.Option("-f", "--config", metavar="FILE", autocompletion=configs, help="The YAML config of oxidizr's weights."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", metavar="", help="Replace DST if it is there.")] = False,
) -> int:
    """Import a model of Hugging Face's layout as a checkpoint, or export a checkpoint to that layout.

    What is imported computes exactly what it did there, or is refused: Llama, Mixtral, DeepSeek-V2, Mamba, Mamba2.
    """
    must_exist(source)
    if target.suffix != ".safetensors":
        if config is not None:
            raise UsageError(f"-f is the config of weights without one; they become a checkpoint: -o {target}.safetensors")
        most = None if max_shard_size is None else bytes_of(max_shard_size, "--max-shard-size")
        return _show(source, target, export_checkpoint(source, target, dtype, most, overwrite))
    if max_shard_size is not None:
        raise UsageError("--max-shard-size cuts what is exported; a checkpoint is one file")
    if config is not None:
        return _show(source, target, import_weights(source, load_config(config), target, dtype, overwrite))
    if not source.is_dir():
        raise UsageError(f"{source}: is a file; give its config with -f CONFIG, or a directory with -o to export it")
    return _show(source, target, import_pretrained(source, target, dtype, overwrite))


def _show(source: Path, target: Path, done: Converted) -> int:
    size = sum(map(file_size, done.files))
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for label, value in (
        ("from", printable(str(source))),
        ("to", f"{printable(str(target))} ({of(len(done.files), 'file')}, {size_of(size)})"),
        ("model", f"{done.family}, {counted(done.parameters)} parameters, {done.model.dtype}"),
        ("length", f"{done.model.max_seq_len:,} tokens (max_seq_len)"),
        ("tokenizer", printable(done.tokenizer)),
        *(("note", printable(note)) for note in done.notes),
    ):
        table.add_row(Text(label, style="bold"), Text(value, overflow="fold"))
    console().print(table)
    return 0
