"""Values that a notebook shows as pictures. They say that they have one; what draws it stands above them, in `report`.

Nothing here knows the one who draws: `oxidizr_ref/__init__.py`, which every import passes, says who it is, and the first
picture that is wanted loads it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

#: The module that draws: its ``html(value)`` and ``mermaid(value)`` return text.
artist: Callable[[], Any] | None = None


class Pictured:
    """A value with a picture: Jupyter and its like ask for it by this method's name."""

    __slots__ = ()

    def _repr_html_(self) -> str | None:
        """HTML; None where nobody draws: then its plain ``repr`` is shown."""
        return None if artist is None else str(artist().html(self))


class Charted(Pictured):
    """One with a flowchart as well."""

    __slots__ = ()

    def _repr_mermaid_(self) -> str | None:
        """Mermaid's text of a flowchart."""
        return None if artist is None else str(artist().mermaid(self))
