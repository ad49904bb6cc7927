"""What an earlier run found out about large data files by reading them whole: kept outside checkpoints, in a cache.

A fact is believed while path, size, inode and time of last change of every file are what they were. A file that changed a
moment ago is not remembered: it could change again within the same tick of the clock. Deleting the cache costs one reading.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

_SETTLED_SECONDS = 2.0  # file systems tell times to 2 seconds at worst
_DIGEST = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class Facts:
    """Of a stream of tokens: its digest (see `data.TokenStream.facts`) and its largest token id."""

    digest: str
    largest: int


def remembered(files: Sequence[Path], find_out: Callable[[], Facts]) -> Facts:
    """The facts about the stream these files make in this order: from the cache, or found out and remembered."""
    try:
        identity, newest = _identity(files)
        place = cache_directory() / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.json"
    except (OSError, RuntimeError):  # no such file; or a user without a home
        return find_out()
    known = _read(place, identity)
    if known is not None:
        return known
    facts = find_out()
    with suppress(OSError):  # a cache that cannot be written, or files that changed meanwhile: nothing is remembered
        if time.time() - newest > _SETTLED_SECONDS and _identity(files)[0] == identity:
            _write(place, json.dumps({"files": identity, **asdict(facts)}))
    return facts


def cache_directory() -> Path:
    """``oxidizr_ref`` where this system keeps caches; the environment variable XDG_CACHE_HOME moves it.

    Raises RuntimeError where nothing says what the user's home is.
    """
    base = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA")
    return (Path(base) if base else Path.home() / ".cache") / "oxidizr_ref"


def _identity(files: Sequence[Path]) -> tuple[str, float]:
    stats = [path.stat() for path in files]
    names = [str(path.resolve()) for path in files]
    parts = [[name, s.st_size, s.st_mtime_ns, s.st_ino] for name, s in zip(names, stats, strict=True)]
    return json.dumps(parts), max(s.st_mtime for s in stats)


def _read(place: Path, identity: str) -> Facts | None:
    try:
        stored = json.loads(place.read_text(encoding="utf-8"))
        facts = Facts(stored["digest"], stored["largest"])
        sound = stored["files"] == identity and _DIGEST.fullmatch(facts.digest) and type(facts.largest) is int
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return facts if sound else None


def _write(place: Path, text: str) -> None:
    """Whole or not at all, whoever else writes the same."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=place.parent, suffix=".tmp", delete=False, encoding="utf-8") as file:
        file.write(text)
    os.replace(file.name, place)
