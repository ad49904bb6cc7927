"""What metrics.jsonl tells of a run, for those who show it: a record a logged step, and curves of them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

from oxidizr_ref.checkpoint import disk

#: The metrics of one step.
Record: TypeAlias = dict[str, Any]

_LARGEST_STEP = 1 << 53  # above it a float64 misses steps


def read_records(path: Path) -> tuple[list[Record], int]:
    """The lines of a metrics file by step, those of one step as one record; and how many were none, as a kill may leave one.

    Without the file there are none. Raises OSError when the disk refuses.
    """
    found: dict[int, Record] = {}
    broken = 0
    for line in disk.read(path).splitlines() if disk.exists(path) else ():
        try:
            record = json.loads(line)
            step = record["step"]
        except (ValueError, KeyError, TypeError, RecursionError):
            step = None
        if type(step) is int and 0 <= step < _LARGEST_STEP:
            found.setdefault(step, {}).update(record)
        elif line.strip():
            broken += 1
    return [found[step] for step in sorted(found)], broken


def number(value: Any) -> float | None:
    """A logged value as a finite float; None for whatever else it is."""
    try:
        return float(value) if type(value) in (int, float) and math.isfinite(value) else None
    except OverflowError:
        return None


def curve(records: Sequence[Record], key: str) -> list[tuple[int, float]]:
    """The steps at which ``key`` was logged as a number, and the numbers."""
    found = ((record["step"], number(record.get(key))) for record in records)
    return [(step, value) for step, value in found if value is not None]
