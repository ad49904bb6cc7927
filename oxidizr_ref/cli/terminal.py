"""What the terminal takes: consoles and bars that send no escape code where NO_COLOR or TERM=dumb asks for none."""

from __future__ import annotations

import os
import sys

from rich.console import Console


def wants_plain_text() -> bool:
    """Whether the environment asks for text alone. Bold is an escape code, too, and so is what moves a bar."""
    return bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") in ("dumb", "unknown")


def console(stderr: bool = False) -> Console:
    """The console for tables and notices, which colours no number by itself."""
    return Console(stderr=stderr, highlight=False, force_terminal=False if wants_plain_text() else None)


def can_draw() -> bool:
    """Whether stderr is a terminal on which a bar can move."""
    return sys.stderr.isatty() and not wants_plain_text()
