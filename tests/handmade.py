"""Checkpoint files made by hand: small whole ones, and ones with a right header digest around whatever a test put there.

`sealed` shares no code with the package: a header that it sealed can be wrong in its sense only.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from oxidizr_ref.checkpoint import format
from oxidizr_ref.errors import CheckpointError

Array = np.ndarray[Any, Any]

ZEROS = "0" * 64
_SEAL = re.compile(rb'([{,]"header_digest":")[0-9a-f]{64}(?=")')
_LONG_CONFIG = {"model": {f"key_{i:02}": i for i in range(26)}, "trainer": {"learning_rate": 0.0003, "seed": 1}}


def tensors(step: int) -> dict[str, Array]:
    """A few tensors that differ from step to step, with no byte of 64 in a row zero; the first two have one shape."""
    count = np.arange(1, 49, dtype=np.float32) + step
    return {
        "a.weight": count[:24].reshape(4, 6) / 3,
        "b.weight": count[24:].reshape(4, 6) / 7,
        "c": np.array(-step - 1, dtype=np.int64),
        "d": np.arange(step + 100, step + 137, dtype=np.uint8),
    }


def metadata(step: int) -> dict[str, str]:
    """As a run writes it: the config comes first and is long."""
    words = {"config": _LONG_CONFIG, "progress": {"step": step, "cursor": 8 * step}}
    return {"format": "pt", "format_version": "1", **{key: json.dumps(value) for key, value in words.items()}}


def small_file(path: Path, step: int = 7) -> Path:
    """A checkpoint of one step, below 2 KB. Its header is so long that one bit of its length decides about most of it."""
    format.save(path, tensors(step), metadata(step))
    return path


def text_of(raw: bytes) -> bytes:
    """The header of a file, padding included."""
    return raw[8 : 8 + int.from_bytes(raw[:8], "little")]


def payload_of(raw: bytes) -> bytes:
    """What follows the header of a file."""
    return raw[8 + int.from_bytes(raw[:8], "little") :]


def sealed(text: bytes, payload: bytes = b"", pad: bool = True) -> bytes:
    """A file with this header, padded, its header digest (where there is a field for one) made right."""
    if pad:
        text = text.rstrip(b" ")
        text += b" " * (-(len(text) + 8) % 64)
    prefix = len(text).to_bytes(8, "little")
    zeroed = _SEAL.sub(rb"\g<1>" + ZEROS.encode(), text, count=1)
    own = hashlib.sha256(prefix + zeroed).hexdigest().encode()
    return prefix + _SEAL.sub(rb"\g<1>" + own, zeroed, count=1) + payload


def digest(data: bytes) -> str:
    """What stands for a tensor of at most 4 MiB in the digests."""
    return hashlib.sha256(hashlib.sha256(data).digest() if data else b"").hexdigest()


def digests_of(**contents: bytes) -> str:
    """The text of the digests of tensors with these bytes, as it stands in the header: escaped, without its quotes."""
    return json.dumps(compact({name: digest(data) for name, data in contents.items()}))[1:-1]


def compact(value: object) -> str:
    """JSON, the one way it is written."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def error_of(path: Path) -> CheckpointError | None:
    """What `load` raises of its own kind, or None."""
    try:
        format.load(path)
    except CheckpointError as error:
        return error
    return None


@contextmanager
def fast_folder(otherwise: Path) -> Iterator[Path]:
    """A folder in memory, where the system has one: for tests that write thousands of files."""
    shared = Path("/dev/shm")
    if not shared.is_dir():
        yield otherwise
        return
    with tempfile.TemporaryDirectory(dir=shared, prefix="oxidizr-ref-") as folder:
        yield Path(folder)


def like(module: Any, *missing: str, **changes: Any) -> Any:
    """A stand-in for a module: its names, but for those that are missing or changed."""
    return SimpleNamespace(**{name: value for name, value in vars(module).items() if name not in missing} | changes)


#: What a save in these tests writes, and `must_hold_other` expects.
OTHER = {"x": np.arange(1, 300, dtype=np.float64)}


def must_hold_other(path: Path) -> None:
    """A whole file with the tensors of `OTHER`, and nothing beside it."""
    assert format.load(path).tensors["x"].tobytes() == OTHER["x"].tobytes()
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
