"""``oxidizr-ref eval``: how well a model predicts a file, and whether another one does better."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text

from oxidizr_ref import parallel
from oxidizr_ref.cli.options import Debug, TargetDevice, Threads, device_for
from oxidizr_ref.cli.terminal import can_draw, console
from oxidizr_ref.cli.words import counted, printable
from oxidizr_ref.config import DataConfig
from oxidizr_ref.data import open_stream
from oxidizr_ref.errors import DataError, UsageError
from oxidizr_ref.evaluation import Difference, Scores, difference, joined, scores, text_bytes, whole_windows
from oxidizr_ref.interop.opened import Opened, open_model
from oxidizr_ref.tokenizers import Tokenizer

_DATA, _OUTPUT = "Data", "Output"
_TOKENS = 4096  # of a batch


def evaluate(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A step file, a run's directory, or a model's directory.")],
    data: Annotated[
        list[Path], typer.Option("-d", "--data", metavar="FILE", help="`.bin` tokens or text; several are one stream.")
    ],
    compare: Annotated[
        Path | None, typer.Option(metavar="MODEL", help="Another model, on the same tokens; which is better?")
    ] = None,
    seq_len: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Tokens a window (the model's).", rich_help_panel=_DATA)
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Windows a batch.", rich_help_panel=_DATA)
    ] = None,
    only_responses: Annotated[
        bool, typer.Option("--only-responses", metavar="", help="As data.loss_on: responses.", rich_help_panel=_DATA)
    ] = False,
    apart: Annotated[
        bool | None,
        typer.Option(
            "--documents-apart/--documents-together",
            metavar="",
            help="Whether documents see each other (as in training).",
            rich_help_panel=_DATA,
        ),
    ] = None,
    curve: Annotated[
        bool, typer.Option("--curve", metavar="", help="The loss by position in the window.", rich_help_panel=_OUTPUT)
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", metavar="", help="One JSON object, on stdout.", rich_help_panel=_OUTPUT)
    ] = False,
    target_device: TargetDevice = None,
    threads: Threads = None,
    debug: Debug = False,
) -> int:
    """Measure loss, perplexity, bits per byte and accuracy on a file that was not trained on.

    --compare gives the difference in loss and its 95% interval, by a paired bootstrap over windows.
    """
    del debug  # read by main
    if threads is not None:
        parallel.set_threads(threads)
    device = device_for(target_device)
    opened = [open_model(path) for path in (model, compare) if path is not None]
    for notice in (notice for one in opened for notice in one.notices):
        print(printable(notice), file=sys.stderr)
    tokenizer = _shared_tokenizer(opened)
    stream, _ = open_stream(data, tokenizer, vocab_size=opened[0].config.vocab_size, seed=0)
    if apart is None and (apart := opened[0].apart):
        print("documents are kept apart, as they were in training; --documents-together does not", file=sys.stderr)
    use = DataConfig(loss_on="responses" if only_responses else "all", document_boundaries="reset" if apart else "ignore")
    length = seq_len or min(one.config.max_seq_len for one in opened)
    size = batch_size or max(1, _TOKENS // length)
    measured = []
    for letter, one in zip("AB", opened, strict=False):
        batches = whole_windows(stream, length, size, use)
        found, count = scores(one.model(device), batches, length), -(-len(stream) // (length * size))
        bar = track(found, letter, count, console=console(stderr=True), transient=True, disable=not can_draw())
        measured.append(joined(bar))
    if not measured[0].count:
        raise DataError(f"{stream.name}: has no response to predict; leave out --only-responses")
    octets = None if only_responses else text_bytes(stream, tokenizer)
    results = [_result(one.what, found, octets, curve) for one, found in zip(opened, measured, strict=True)]
    compared = difference(measured[0], measured[1]) if compare is not None else None
    if as_json:
        print(json.dumps({"models": results, **({} if compared is None else {"difference": _as_json(compared)})}))
    else:
        _print(results, compared)
    return 0


def _shared_tokenizer(opened: list[Opened]) -> Tokenizer:
    """The tokenizer of all models. Raises UsageError when there are several: losses of other tokens do not compare."""
    tokenizer = opened[0].its_tokenizer()
    for one in opened[1:]:
        if one.its_tokenizer().state() != tokenizer.state():
            names = f"{opened[0].what} has the tokenizer {tokenizer.name}, {one.what} another ({one.its_tokenizer().name})"
            raise UsageError(f"{names}: losses of different tokens do not compare; eval each, and see bits per byte")
    return tokenizer


def _result(what: str, found: Scores, octets: int | None, curve: bool) -> dict[str, Any]:
    loss = found.loss()
    result: dict[str, Any] = {
        "model": what,
        "tokens": found.count,
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": loss * found.count / math.log(2) / octets if octets else None,
        "accuracy": found.accuracy(1),
        "accuracy_top5": found.accuracy(5),
    }
    return result | ({"loss_by_position": found.by_position()} if curve else {})


def _as_json(compared: Difference) -> dict[str, Any]:
    mean, interval = compared
    return {"loss": mean, "interval": interval, "level": 0.95, "method": "paired bootstrap, 10,000 samples"}


def _print(results: list[dict[str, Any]], compared: Difference | None) -> None:
    out = console()
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for letter, result in zip("AB", results, strict=False):
        name = f"{letter}: {result['model']}" if len(results) > 1 else result["model"]
        table.add_column(Text(printable(name)), justify="right", overflow="fold")
    rows = {
        "tokens": lambda r: counted(r["tokens"]),
        "loss (nats a token)": lambda r: f"{r['loss']:.4f}",
        "perplexity": lambda r: f"{r['perplexity']:.4g}",
        "bits per byte": lambda r: "-" if r["bits_per_byte"] is None else f"{r['bits_per_byte']:.4f}",
        "accuracy": lambda r: f"{r['accuracy']:.2%}",
        "among the 5 likeliest": lambda r: f"{r['accuracy_top5']:.2%}",
    }
    for name, shown in rows.items():
        table.add_row(name, *map(shown, results))
    out.print(table)
    if "loss_by_position" in results[0]:
        _print_curve(out, results)
    if compared is not None:
        mean, interval = compared
        chance, verdict = "no interval", "too little text to tell"
        if interval is not None:
            low, high = interval
            verdict = "A is better" if high < 0 else "B is better" if low > 0 else "no difference is certain"
            chance = f"95% interval {low:+.4f} to {high:+.4f}"
        out.print(f"loss of A - B: {mean:+.4f}, {chance}: {verdict}", soft_wrap=True)


def _print_curve(out: Console, results: list[dict[str, Any]]) -> None:
    """Positions in groups that double: the loss falls fast at first."""
    table = Table("position", *(letter for letter, _ in zip("AB", results, strict=False)), box=None, pad_edge=False)
    curves = [result["loss_by_position"] for result in results]
    low, length = 0, len(curves[0])
    while low < length:
        high = min(length, max(low + 1, 2 * low))
        cells = [[value for value in curve[low:high] if value is not None] for curve in curves]
        means = [f"{sum(cell) / len(cell):.4f}" if cell else "-" for cell in cells]
        table.add_row(f"{low + 1}" if high == low + 1 else f"{low + 1} to {high}", *means)
        low = high
    out.print(table)
