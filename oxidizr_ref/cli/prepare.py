"""``oxidizr-ref prepare``: from text to files of tokens."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table
from rich.text import Text

from oxidizr_ref.cli.completion import configs, tokenizers
from oxidizr_ref.cli.options import Debug
from oxidizr_ref.cli.terminal import can_draw, console
from oxidizr_ref.cli.words import counted, of, printable, printable_lines, size_of
from oxidizr_ref.config import canonical_json
from oxidizr_ref.prepare.pipeline import Prepared, PrepareOptions, PrepareReporter
from oxidizr_ref.prepare.pipeline import prepare as prepare_files

_TEXT = "Text"
_RUN = "This run"


class Format(StrEnum):
    """How documents stand in a file."""

    auto = "auto"
    text = "text"
    jsonl = "jsonl"


class Errors(StrEnum):
    """What to do with bytes that are no UTF-8."""

    strict = "strict"
    replacing = "replace"


def prepare(
    output: Annotated[Path, typer.Option("-o", "--output", metavar="NAME.bin", help="The file of tokens to make.")],
    inputs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="INPUT...",
            help="Files, directories (.txt .md .jsonl .json-lines, also .gz or .zst), quoted globs; - for standard input.",
        ),
    ] = None,
    tokenizer: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            autocompletion=tokenizers,
            help="byte, char, cl100k_base, o200k_base, llama3, deepseek_v3, or the path of a tokenizer.json.",
        ),
    ] = "byte",
    train_bpe: Annotated[
        int | None, typer.Option(metavar="N", help="Train a tokenizer of N ids on the text: NAME.tokenizer.json.")
    ] = None,
    validation: Annotated[
        float, typer.Option(metavar="PART", help="This part of the documents goes to NAME.validation.bin.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(metavar="N", help="Which documents those are.")] = 0,
    hub: Annotated[
        str | None, typer.Option(metavar="REPO", help="A data set to download; INPUT then are patterns of its files.")
    ] = None,
    check: Annotated[
        str | None,
        typer.Option(metavar="CONFIG", autocompletion=configs, help="A config whose vocab_size must cover the tokenizer."),
    ] = None,
    text_format: Annotated[
        Format, typer.Option("--format", help="auto goes by the name of a file.", rich_help_panel=_TEXT)
    ] = Format.auto,
    errors: Annotated[
        Errors, typer.Option(help="Refuse bytes that are no UTF-8, or replace them.", rich_help_panel=_TEXT)
    ] = Errors.strict,
    end_of_text: Annotated[
        str | None, typer.Option(metavar="TOKEN", help="What follows every document.", rich_help_panel=_TEXT)
    ] = None,
    statistics: Annotated[
        bool, typer.Option("--stats", metavar="", help="Show vocabulary use and lengths.", rich_help_panel=_RUN)
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", metavar="", help="One JSON object on stdout.", rich_help_panel=_RUN)
    ] = False,
    threads: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Threads (default: all cores). Same files.", rich_help_panel=_RUN)
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", metavar="", help="Replace files that are there.", rich_help_panel=_RUN)
    ] = False,
    debug: Debug = False,
) -> int:
    """Turn text into files of tokens for `train -d`.

    Writes NAME.bin (u32 tokens), NAME.documents.u64, NAME.meta.json and, for chats, NAME.responses.u64.
    """
    del debug  # read by main
    if threads is not None:  # tokenizers of libraries have threads of their own
        os.environ["RAYON_NUM_THREADS"] = str(threads)
    options = PrepareOptions(
        inputs=inputs or [],
        output=output,
        tokenizer=tokenizer,
        validation=validation,
        seed=seed,
        train_bpe=train_bpe,
        statistics=statistics,
        replace_errors=errors is Errors.replacing,
        format=text_format.value,
        hub=hub,
        end_of_text=end_of_text,
        check=check,
        threads=threads,
        overwrite=overwrite,
    )
    reporter = _Reporter()
    try:
        prepared = prepare_files(options, reporter)
    finally:
        reporter.end()
    _show(prepared, as_json)
    return 0


class _Reporter(PrepareReporter):
    """A bar on stderr, where that is a terminal; notices in any case."""

    def __init__(self) -> None:
        self._console = console(stderr=True)
        columns = (
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
        )
        self._bar = Progress(*columns, console=self._console, disable=not can_draw())
        self._task = self._bar.add_task("", total=None)
        self._bar.start()

    def notice(self, text: str) -> None:
        self._console.print(printable_lines(text), markup=False, soft_wrap=True)

    def progress(self, done: int, total: int | None, documents: int, tokens: int) -> None:
        text = f"{of(documents, 'document')} {counted(tokens)} tokens" if tokens else "reading"
        self._bar.update(self._task, completed=done, total=total, description=text)

    def end(self) -> None:
        """Leave the bar as it stands."""
        self._bar.stop()


def _show(prepared: Prepared, as_json: bool) -> None:
    err = console(stderr=True)
    for path, meta in prepared.metas.items():
        what = f"{of(meta.tokens, 'token')} in {of(meta.documents, 'document')}"
        ids = f"tokenizer {meta.tokenizer['name']}, {meta.vocab_size:,} ids, the largest used {meta.largest:,}"
        err.print(Text(printable(f"{path}: {what}, {size_of(4 * meta.tokens)}; {ids}")), soft_wrap=True)
    if prepared.statistics is not None:
        for table in _tables(prepared.statistics):
            err.print()
            err.print(table)
    if as_json:
        files = {str(path): {**vars(meta), "tokenizer": meta.tokenizer["name"]} for path, meta in prepared.metas.items()}
        typer.echo(canonical_json({"files": files, "statistics": prepared.statistics}))


def _tables(statistics: dict[str, Any]) -> list[Table]:
    numbers = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    used, size, octets = statistics["ids_used"], statistics["vocab_size"], statistics["bytes"]
    for label, value in (
        ("tokens", f"{statistics['tokens']:,}"),
        ("text", f"{octets:,} bytes, {statistics['bytes_per_token']:.3f} a token" if octets else "-"),
        ("documents", f"{statistics['documents']:,}, the longest {of(statistics['longest_document'], 'token')}"),
        ("vocabulary", f"{used:,} of {size:,} ids used ({used / size:.1%})"),
    ):
        numbers.add_row(Text(label, style="bold"), value)
    frequent = Table("most frequent", "id", "count", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for entry in statistics["most_frequent"]:
        frequent.add_row(Text(repr(entry["text"])), str(entry["id"]), f"{entry['count']:,}")
    lengths = Table("tokens a document", "documents", "", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    most = max((count for _, _, count in statistics["histogram"]), default=1)
    for fewest, longest, count in statistics["histogram"]:
        lengths.add_row(f"{fewest:,} .. {longest:,}", f"{count:,}", "█" * -(-30 * count // most))
    return [numbers, frequent, lengths]
