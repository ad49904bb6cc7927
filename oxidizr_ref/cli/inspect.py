"""``oxidizr-ref inspect``: what is in a checkpoint; of a config, see `config_view.py`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from oxidizr_ref.checkpoint.contents import JSON_KEYS, Contents, Numbers, file_meant, look_into, total
from oxidizr_ref.checkpoint.header import DTYPE_NAMES
from oxidizr_ref.cli.completion import configs, dtypes
from oxidizr_ref.cli.config_view import show_config
from oxidizr_ref.cli.options import as_overrides
from oxidizr_ref.cli.terminal import console
from oxidizr_ref.cli.words import counted, of, printable, short, size_of, words
from oxidizr_ref.config import canonical_json, load_config
from oxidizr_ref.errors import UsageError

_WITH_F = "With -f"
_PROOF = "header proved whole; payload not verified, see `oxidizr-ref verify`"
#: Shown in this order; other keys of the progress follow.
_PROGRESS = ("step", "epoch", "cursor", "tokens_seen")
_LONG = 60  # characters of a value that gets a line of its own
_LONGEST = 400  # characters of a value that are shown
_SHOWN = {"format_version", "numerics_version", *JSON_KEYS}


def inspect(
    path: Annotated[
        Path | None, typer.Argument(metavar="PATH", help="A checkpoint file, or a directory: its newest step file.")
    ] = None,
    config: Annotated[
        str | None,
        typer.Option(
            "-f",
            "--config",
            metavar="FILE",
            autocompletion=configs,
            help="Instead, a YAML config: a path, or a bundled model.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", metavar="", help="One JSON object on stdout instead.")] = False,
    seq_len: Annotated[int | None, typer.Option(metavar="N", help="Tokens a window.", rich_help_panel=_WITH_F)] = None,
    batch_size: Annotated[int | None, typer.Option(metavar="N", help="Windows a batch.", rich_help_panel=_WITH_F)] = None,
    dtype: Annotated[
        str | None,
        typer.Option(metavar="TYPE", autocompletion=dtypes, help="f32, bf16, f16 or f64.", rich_help_panel=_WITH_F),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any key of the config; repeatable.", rich_help_panel=_WITH_F),
    ] = None,
) -> int:
    """Show what a checkpoint holds: progress, config, origin, and every tensor with its norm.

    With `-f`, what a config makes: its layers, their parameters, and the memory that training takes.
    """
    flags = as_overrides(
        {
            "--seq-len": ("model.max_seq_len", seq_len),
            "--batch-size": ("trainer.batch_size", batch_size),
            "--dtype": ("model.dtype", dtype),
        }
    )
    if (path is None) == (config is None):
        raise UsageError(f"inspect: give a checkpoint (PATH) or a config (-f CONFIG){', not both' if path else ''}")
    if config is not None:
        show_config(load_config(config, settings or [], flags), as_json)
        return 0
    if path is None or flags or settings:
        raise UsageError(
            f"inspect: {', '.join([*flags, *(['--set'] if settings else [])])} changes a config; give -f CONFIG"
        )
    return _show_checkpoint(path, as_json)


def _show_checkpoint(path: Path, as_json: bool) -> int:
    file = file_meant(path)
    contents = look_into(file)
    if as_json:
        typer.echo(canonical_json(contents.as_json()))
        return 0
    out = console()
    out.print(_facts(contents, newest=file != path))
    out.print(Text(_PROOF))
    for table in (_tree(contents), _totals(contents)):
        out.print()
        out.print(table)
    return 0


# --- what the header says ---------------------------------------------------------------------------------------------


def _facts(contents: Contents, newest: bool) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for label, value in _rows(contents, newest):
        table.add_row(Text(label, style="bold"), Text(value))
    return table


def _rows(contents: Contents, newest: bool) -> Iterator[tuple[str, str]]:
    file, metadata = contents.header, contents.metadata
    yield "file", printable(str(contents.path)) + (" (newest step file)" if newest else "")
    yield "size", f"{file.file_size:,} bytes, {of(len(file.entries), 'tensor')}"
    versions = (words(metadata.get(f"{key}_version", "-"), _LONG) for key in ("format", "numerics"))
    yield "versions", "format {}, numerics {}".format(*versions)
    if not contents.holds_training_state():
        yield "state", "this file holds no training state"
    yield from _known(metadata)
    for key, value in metadata.items():
        if key not in _SHOWN:
            yield words(key, 30), words(value, _LONGEST)


def _known(metadata: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The rows of a training state, as far as they are there and are what they should be."""
    shown = {key: metadata.get(key) for key in ("progress", "config", "data", "tokenizer", "lineage", "fingerprint")}
    for key, value in shown.items():
        if value is None:
            continue
        if key == "progress" and isinstance(value, Mapping):
            first = {name: value[name] for name in _PROGRESS if name in value}
            yield key, _listed({**first, **value})
        elif key == "config" and isinstance(value, Mapping):
            yield from ((f"config.{words(name, 20)}", _listed(value[name])) for name in sorted(value))
        elif key == "lineage" and isinstance(value, list):
            yield key, "\n".join(map(_origin, value)) or "no change of config, data or machine class"
        else:
            yield key, _listed(value)


def _listed(value: Any) -> str:
    """``key value, key value``; what is long comes last, on lines of its own."""
    if not isinstance(value, Mapping):
        return words(value, _LONGEST)
    pairs = [(words(key, _LONG), _value(part)) for key, part in value.items()]
    few = [f"{key} {text}" for key, text in pairs if len(text) < _LONG]
    return "\n".join([", ".join(few), *(f"{key}: {text}" for key, text in pairs if len(text) >= _LONG)]).strip()


def _value(value: Any) -> str:
    text = words(value, _LONGEST)
    return f"{len(value):,} entries" if isinstance(value, list) and len(text) >= _LONG else text


def _origin(entry: Any) -> str:
    """One entry of the lineage in one line, its digests cut to what tells them apart."""
    if not isinstance(entry, Mapping):
        return words(entry, _LONG)
    if entry.keys() == {"init_from"}:
        return f"init_from {_origin(entry['init_from'])}"
    first = {"step": entry["step"]} if "step" in entry else {}
    parts = {words(key, 12): words(value, 15) for key, value in {**first, **entry}.items()}
    return ", ".join(f"{key} {text[:7] if text.endswith('...') else text}" for key, text in parts.items())


# --- the tensors ------------------------------------------------------------------------------------------------------


def _tree(contents: Contents) -> Table:
    """Tensors, the optimizer's left out, below the layer they belong to; there their names begin with a dot."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("tensor", overflow="fold")
    table.add_column("shape", overflow="fold", justify="right")
    table.add_column("dtype")
    for title in ("size", "norm", "min .. max"):
        table.add_column(title, no_wrap=True, justify="right")
    entries = {entry.name: entry for entry in contents.header.entries}
    groups: dict[str, list[str]] = {}
    for name in (name for kind, names in contents.kinds().items() for name in names if not kind.startswith("optimizer.")):
        groups.setdefault(_group(name), []).append(name)
    for group in sorted(groups, key=_natural):
        if group:
            whole = total(contents.numbers[name] for name in groups[group])
            table.add_row(group, "", "", size_of(whole.size), short(whole.norm), _range(whole), style="bold")
        for name in groups[group]:
            entry, numbers = entries[name], contents.numbers[name]
            shape = "x".join(map(str, entry.shape)) or "scalar"
            cells = (name.removeprefix(group), shape, DTYPE_NAMES[entry.dtype], size_of(numbers.size), short(numbers.norm))
            table.add_row(*map(Text, (*cells, _range(numbers))))
    return table


def _group(name: str) -> str:
    """``layers.3`` for what belongs to a layer, ``rng`` for random state, nothing for the rest."""
    parts = name.split(".")
    if parts[0] == "layers" and len(parts) > 2:
        return ".".join(parts[:2])
    return "rng" if parts[0] == "rng" and len(parts) > 1 else ""


def _natural(group: str) -> tuple[str, int, str]:
    """Layer 10 comes after layer 9."""
    first, _, rest = group.partition(".")
    return first, int(rest) if rest.isdecimal() else -1, rest


def _range(numbers: Numbers) -> str:
    if numbers.not_finite:
        return f"{counted(numbers.not_finite)} not finite!"
    return f"{short(numbers.smallest, 2)} .. {short(numbers.largest, 2)}" if numbers.elements else "-"


def _totals(contents: Contents) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("total", overflow="fold")
    for title in ("tensors", "numbers", "dtype", "size", "norm", ""):
        table.add_column(title, no_wrap=True, justify="right")
    for kind, names in contents.kinds().items():
        whole = total(contents.numbers[name] for name in names)
        bad = f"{counted(whole.not_finite)} not finite!" if whole.not_finite else ""
        counts = counted(whole.tensors), f"{whole.elements:,}", _dtypes(contents, names)
        table.add_row(*map(Text, (kind, *counts, size_of(whole.size), short(whole.norm), bad)))
    return table


def _dtypes(contents: Contents, names: list[str]) -> str:
    chosen = set(names)
    return "/".join(sorted({DTYPE_NAMES[entry.dtype] for entry in contents.header.entries if entry.name in chosen}))
