"""``oxidizr-ref diff``: where do two checkpoints differ?"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from oxidizr_ref.checkpoint.contents import file_meant, kind_of
from oxidizr_ref.checkpoint.difference import Change, Difference, TensorDifference, compare
from oxidizr_ref.cli.terminal import console
from oxidizr_ref.cli.words import counted, of, printable, short, words
from oxidizr_ref.config import canonical_json

_LONG = 60  # characters of a value that is only said to differ


def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help="A checkpoint file, or a directory: its newest step file.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="The one to compare it with.")],
    weights_only: Annotated[
        bool, typer.Option("--weights-only", metavar="", help="Compare neither optimizer state nor metadata.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", metavar="", help="One JSON object on stdout instead.")] = False,
) -> int:
    """Say where two checkpoints differ: in what they say, and in which numbers by how much; exit code 1 if they do."""
    found = compare(file_meant(a), file_meant(b), weights_only=weights_only)
    if as_json:
        typer.echo(canonical_json(found.as_json()))
    else:
        out = console()
        for part in _parts(found):
            out.print(part, overflow="fold")
    return 0 if found.equal else 1


def _parts(found: Difference) -> Iterator[RenderableType]:
    yield Text(f"A {printable(str(found.a))}\nB {printable(str(found.b))}")
    compared = f"{of(found.compared, 'tensor')} with {of(found.elements, 'number')}"
    if found.equal:
        rest = "optimizer state and metadata not compared" if found.weights_only else "and all metadata"
        yield Text(f"equal: {compared}, {rest}")
        return
    counts = {
        f"{of(len(found.metadata), 'key')} of the metadata": found.metadata,
        f"{of(len(found.only_a), 'tensor')} only in A": found.only_a,
        f"{of(len(found.only_b), 'tensor')} only in B": found.only_b,
        f"dtype or shape of {of(len(found.kinds), 'tensor')}": found.kinds,
        f"numbers in {len(found.tensors):,} of {of(found.compared, 'tensor')}": found.tensors,
    }
    yield Text("different: " + ", ".join(what for what, differing in counts.items() if differing))
    yield Text(_first(found) if found.first is not None else f"no tensor differs ({compared})")
    lines = [_change(change) for change in (*found.metadata, *found.kinds)]
    lines += [f"only in {side}: {name}" for side, names in (("A", found.only_a), ("B", found.only_b)) for name in names]
    if lines:
        yield Text("\n" + "\n".join(lines))
    if found.tensors:
        yield Text()
        yield _table(found.tensors)
        yield Text("* the largest; ulp: steps between neighbouring values of the dtype")


def _first(found: Difference) -> str:
    inside = [f" at [{', '.join(map(str, t.first_index))}]" for t in found.tensors if t.name == found.first]
    return f"first tensor that differs, in file order: {found.first}{''.join(inside)}"


def _change(change: Change) -> str:
    name, old, new = printable(change.key), _value(change.a), _value(change.b)
    if max(len(old), len(new)) > _LONG or old == new:
        return f"{name} differs (--json shows how)"
    return f"{name} {old} -> {new}"


def _value(value: Any) -> str:
    return "none" if value is None else words(value) or '""'


def _table(tensors: list[TensorDifference]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("tensor", overflow="fold")
    for title in ("differing", "max abs", "max rel", "max ulp", ""):
        table.add_column(title, no_wrap=True, justify="right")
    ulps = [found.distance.max_ulp for found in tensors]
    largest = max((ulp for ulp in ulps if ulp is not None), default=None)
    section = "weights"
    for found in tensors:
        kind = kind_of(found.name)
        if kind != section:
            table.add_row(kind, style="bold")
            section = kind
        table.add_row(*map(Text, _cells(found, largest, section)))
    return table


def _cells(found: TensorDifference, largest: int | None, section: str) -> tuple[str, ...]:
    d = found.distance
    ulp = "nan" if d.nans else "-" if d.max_ulp is None else counted(d.max_ulp)
    mark = "*" if largest is not None and d.max_ulp == largest else ""
    name = found.name.removeprefix(section) if section != "weights" else found.name
    return name, counted(d.differing), short(d.max_abs), short(d.max_rel), ulp, mark
