"""How numbers, sizes and strange text are shown to people."""

from __future__ import annotations

import json
from typing import Any

from oxidizr_ref.report.text import size_of as size_of


def printable(text: str) -> str:
    """``text`` with everything that could command a terminal, or cannot be written to one, as ``\\x1b`` and the like."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def printable_lines(text: str) -> str:
    """The same for several lines."""
    return "\n".join(map(printable, text.split("\n")))


def words(value: Any, most: int | None = None) -> str:
    """A JSON value, printable, in one line: strings bare, digests shortened, the whole cut after ``most`` characters."""
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, ensure_ascii=False)
    if len(text) == 64 and set(text) <= set("0123456789abcdef"):
        text = f"{text[:12]}..."
    text = printable(text)
    return text if most is None or len(text) <= most else f"{text[: most - 3]}..."


def short(number: int | float | None, digits: int = 3) -> str:
    """A few significant digits: ``0.0123``, ``1.23e-5``; ``-`` for none."""
    if number is None:
        return "-"
    mantissa, e, exponent = (f"{number:.{digits - 1}e}" if 0 < abs(number) < 1e-3 else f"{number:.{digits}g}").partition("e")
    return f"{mantissa}e{int(exponent)}" if e else mantissa


def counted(count: int) -> str:
    """A count: exact up to seven digits."""
    return f"{count:,}" if count < 10_000_000 else short(count)


def of(count: int, noun: str) -> str:
    """``1 tensor``, ``2 tensors``."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def duration(seconds: float) -> str:
    """About how long: ``40 s``, ``3 min``, ``2 h 10 min``, ``3 days``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60 // 10 * 10} min"
    return f"{round(minutes / 60 / 24)} days"
