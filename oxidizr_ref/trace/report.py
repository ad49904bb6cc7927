"""A comparison in words: the first wrong number, what it was computed from, and a table. Plain text of 80 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

import numpy as np

from oxidizr_ref.trace.compare import AGREES, BEHIND_TIE, DIFFERS, NO_BUDGET, TIE, Compared, Comparison, equation_of

#: Rows of the table, unless all are wanted.
ROWS = 12
_WIDE = 80
#: What it means when something that nothing was computed from differs.
_BEGINNINGS = {
    "input": "the two did not read the same batch",
    "parameter": "the two do not begin with the same parameters",
}


def report(found: Comparison, everything: bool = False) -> str:
    """All lines of it. everything: a row for every tensor that was compared, not only for those that matter most.

    Only a path or a name that is too long makes a line longer than 80; names are shown without what commands a terminal.
    """
    return "\n".join(piece for line in _lines(found, everything) for piece in _fitted(line))


def _fitted(line: str) -> list[str]:
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in line)
    if len(line) <= _WIDE:
        return [line]
    return textwrap.wrap(line, _WIDE, subsequent_indent=" " * 11, break_long_words=False, break_on_hyphens=False)


def _lines(found: Comparison, everything: bool) -> Iterator[str]:
    total = len(found.tensors) + len(found.missing)
    yield f"reference  {found.reference}"
    yield f"other      {found.other} ({found.precision})"
    yield f"compared   {len(found.tensors)} of {total} tensors" + (
        f"; {len(found.strange)} names of the other mean nothing here ({found.strange[0]} …)" if found.strange else ""
    )
    yield ""
    first = found.first
    if first is not None:
        yield from _origin(found, first)
        others = [origin for origin in found.origins if origin is not first]
        if others:
            yield ""
            yield "Other faults that do not follow from it:"
            yield from (f"  {_named(origin)}" for origin in others[:ROWS])
            if len(others) > ROWS:
                yield f"  and {len(others) - ROWS} more"
    elif found.agrees:
        worst = max(found.tensors.values(), key=lambda tensor: tensor.used)
        yield f"agrees: every tensor is within its error budget; {worst.name} uses most of it, {worst.used:.0%}"
    ties = [tensor for tensor in found.tensors.values() if tensor.verdict == TIE]
    if ties:
        behind = sum(tensor.verdict == BEHIND_TIE for tensor in found.tensors.values())
        yield f"undecided: {ties[0].name} differs where logits are equal within rounding;"
        yield f"  {behind} tensors behind it were not judged. Other tokens or weights avoid the tie."
    unknown = [tensor.name for tensor in found.tensors.values() if tensor.verdict == NO_BUDGET]
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        yield f"undecided: {unknown[0]}{more} not equal, and no budget is known; grant a tolerance to judge"
    rows = _rows(found, everything)
    if rows:
        yield ""
        yield from _table(rows)


def _origin(found: Comparison, first: Compared) -> Iterator[str]:
    record, d = first.record, first.distance
    where = f"layer {record.layer}" if record.layer is not None else "outside the layers"
    yield f"DIFFERS first at {first.name}   ({where})"
    yield f"  op       {equation_of(record)}"
    if first.problem:
        yield f"  error    {first.problem}"
    else:
        at = first.index(d.where)
        if d.max_abs != d.max_abs or d.nans:
            yield f"  error    {d.nans} elements cannot be equal (integers, NaN or infinities); first at {at}"
        else:
            times = f", {_short(first.used)} times its budget" if np.isfinite(first.used) else ""
            yield f"  error    max abs {_short(d.max_abs)}, max rel {_short(d.max_rel)}{times}"
        yield f"           at {at} the reference has {d.values[0]:.9g}, the other {d.values[1]:.9g}"
        if d.first is not None and d.size > 1:
            share = f"{d.beyond / d.size:.0%} of the elements are beyond it"
            yield f"           {share}, the first at {first.index(d.first)}"
        if d.cosine > 1 - 1e-9 and abs(d.factor - 1) > 1e-6:
            yield f"           the other is {d.factor:.7g} times the reference"
        elif abs(d.cosine) < 1 and d.cosine < 1 - 1e-9:
            yield f"           cosine {d.cosine:.6f}"
    if not first.inputs:
        yield f"  inputs   none: {_BEGINNINGS.get(record.role, 'what it was computed from is not in the other trace')}"
        return
    label = "inputs"
    for name in first.inputs[:ROWS]:
        source = found.tensors[name]
        share = f" ({source.used:.0%} of its budget)" if source.verdict == AGREES else ""
        yield f"  {label:8s} {name} {source.verdict}{share}"
        label = ""
    if len(first.inputs) > ROWS:
        yield f"           and {len(first.inputs) - ROWS} more"
    if first in found.origins:
        yield "  So the fault is in how it is computed from these."


def _named(found: Compared) -> str:
    return f"{found.name}: {found.problem or f'max rel {_short(found.distance.max_rel)}'} ({equation_of(found.record)})"


def _rows(found: Comparison, everything: bool) -> list[Compared]:
    tensors = list(found.tensors.values())
    if everything:
        return tensors
    differing = [tensor for tensor in tensors if tensor.verdict == DIFFERS]
    return differing[:ROWS]


def _table(rows: list[Compared]) -> Iterator[str]:
    width = max(20, min(_WIDE - 46, max(len(row.name) for row in rows)))
    yield f"{'tensor':{width}s}  {'max abs':>8s} {'max rel':>8s} {'max ulp':>8s} {'cosine':>9s} {'budget':>7s}"
    for row in rows:
        d = row.distance
        sizes = (_short(size) for size in (d.max_abs, d.max_rel, float(d.max_ulp)))
        numbers = f"{' '.join(f'{size:>8s}' for size in sizes)} {d.cosine:9.6f} {_used(row):>7s}"
        if len(row.name) > width:
            yield row.name
        yield f"{row.name if len(row.name) <= width else '':{width}s}  {numbers}"


def _used(row: Compared) -> str:
    if row.verdict in (TIE, BEHIND_TIE):
        return "tie" if row.verdict == TIE else "-"
    return f"{_short(row.used if np.isinf(row.used) else min(row.used, 9.9e99))}x"


def _short(number: float) -> str:
    """Two digits: ``0.012``, ``1.2e-5``, ``inf``."""
    if number == 0 or not np.isfinite(number):
        return f"{number:g}"
    return f"{number:.2g}".replace("e-0", "e-").replace("e+0", "e").replace("e+", "e")
