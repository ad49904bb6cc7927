"""Text and numbers as they stand on a page: nothing in them is markup, and nothing in them is invisible."""

from __future__ import annotations

import html
import json
import unicodedata
from typing import Any

_PICTURES = 0x2400  # of control characters: U+0009 is shown as U+2409
_UNITS = ("B", "kB", "MB", "GB", "TB", "PB", "EB")


def visible(text: str, lines: bool = False) -> str:
    """``text`` with control characters as their pictures, and what else cannot be seen as ``\\u202e``.

    lines: whether it may have several; then line ends and tabs stay.
    """
    return "".join(_visible(c, lines) for c in text)


def shown(text: str, lines: bool = False) -> str:
    """The same for HTML: escaped."""
    return html.escape(visible(text, lines))


def _visible(c: str, lines: bool) -> str:
    if c.isprintable() or (lines and c in "\n\t") or c in "\u200c\u200d" or unicodedata.category(c) == "Zs":
        return c
    return chr(_PICTURES + ord(c)) if c < " " else c.encode("unicode_escape").decode("ascii")


def value(thing: Any) -> str:
    """A JSON value in one line, for HTML."""
    return shown(thing if isinstance(thing, str) else json.dumps(thing, sort_keys=True, ensure_ascii=False))


def short(number: float, digits: int = 4) -> str:
    """A few significant digits: ``0.01234``, ``1.234e-5``."""
    mantissa, e, exponent = f"{number:.{digits}g}".partition("e")
    return f"{mantissa}e{int(exponent)}" if e else mantissa


def size_of(count: int) -> str:
    """A number of bytes: ``640 B``, ``16.6 kB``, ``1.2 GB``, in powers of 1000."""
    scaled, power = float(count), 0
    while scaled >= 999.5 and power + 1 < len(_UNITS):
        scaled, power = scaled / 1000, power + 1
    return f"{scaled:.3g} {_UNITS[power]}" if power else f"{count} B"


def shape_of(shape: tuple[int, ...]) -> str:
    """``3×4``; of no axes ``scalar``."""
    return "×".join(map(str, shape)) or "scalar"


def table(head: list[str], rows: list[list[str]], name: str = "") -> str:
    """A table of cells that are HTML; ``name``: its class."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>\n" for row in rows)
    return (
        f'<table class="{name}">' + (f"<thead><tr>{top}</tr></thead>" if head else "") + f"<tbody>\n{body}</tbody></table>"
    )
