"""Files of weights that others wrote or will read: any sound safetensors file, alone or in shards with an index."""

from __future__ import annotations

import hashlib
import json
import math
import mmap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from oxidizr_ref.backend import STORAGE_DTYPES
from oxidizr_ref.checkpoint import disk, format
from oxidizr_ref.checkpoint.header import DTYPES
from oxidizr_ref.config import canonical_json
from oxidizr_ref.errors import CheckpointError, DataError

HostArray = np.ndarray[Any, Any]

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_FLOATS = ("F64", "F32", "F16", "BF16")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises DataError when the file is missing, or is not one."""
    try:
        data = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: is not JSON ({error})") from None
    if not isinstance(data, dict):
        raise DataError(f"{path}: expected a JSON object")
    return data


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, for ``object_pairs_hook``. Raises ValueError when a key is given twice."""
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("a key is given twice")
    return made


def json_text(value: Any) -> str:
    """How JSON files are written beside weights: in lines, in the order given, as UTF-8."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def mapped(path: Path) -> dict[str, HostArray]:
    """The tensors of any safetensors file, as read-only views of the file, by name.

    Raises DataError when it is missing or unsound, or holds a tensor that is not f64, f32, f16 or bf16.
    """
    try:
        with safe_open(path, framework="numpy"):
            pass  # the library proved the header: it fits the file, without holes or overlaps
        with path.open("rb") as file:
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)  # closed when the last view is gone
        start = 8 + int.from_bytes(memory[:8], "little")
        header = json.loads(memory[8:start], object_pairs_hook=once)
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        odd = [f"{name} ({entry['dtype']})" for name, entry in sorted(entries.items()) if entry["dtype"] not in _FLOATS]
        if odd:
            raise DataError(f"{path}: {some(odd)}: only {', '.join(_FLOATS)} can be read, not quantized weights")
        return {name: _view(memory, start, entry) for name, entry in sorted(entries.items())}
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (SafetensorError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: is no sound safetensors file ({error})") from error


def _view(memory: mmap.mmap, start: int, entry: Mapping[str, Any]) -> HostArray:
    shape, offset = entry["shape"], start + entry["data_offsets"][0]
    return np.frombuffer(memory, DTYPES[entry["dtype"]], math.prod(shape), offset).reshape(shape)


def some(names: Sequence[str]) -> str:
    """The first few of many names, and how many there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def must_fit(found: Mapping[str, HostArray], shapes: Mapping[str, tuple[int, ...]], where: object) -> None:
    """Raises DataError naming what is missing, left over, or of another shape."""
    wrong = {
        "missing": sorted(shapes.keys() - found.keys()),
        "left over": sorted(found.keys() - shapes.keys()),
        "of another shape": [
            f"{name} {list(found[name].shape)}, not {list(shapes[name])}"
            for name in sorted(shapes.keys() & found.keys())
            if found[name].shape != shapes[name]
        ],
    }
    told = [f"{len(names)} {what}: {some(names)}" for what, names in wrong.items() if names]
    if told:
        raise DataError(f"{where}: the tensors are not those of its config; {'; '.join(told)}")


def narrowest(dtypes: Iterable[np.dtype[Any]]) -> str:
    """Our name of the narrowest dtype that holds all numbers of these exactly."""
    wanted = set(dtypes)
    names = [name for name, dtype in STORAGE_DTYPES.items() if dtype in wanted]
    return names[0] if len(names) == 1 else "f64" if "f64" in names else "f32"


def stored_as(weights: Mapping[str, HostArray], dtype_name: str) -> dict[str, HostArray]:
    """Weights rounded to nearest where they are of another dtype. Raises DataError for one that is too large for it."""
    dtype, stored = STORAGE_DTYPES[dtype_name], {}
    for name, array in weights.items():
        with np.errstate(over="ignore"):
            stored[name] = np.ascontiguousarray(array.astype(dtype, copy=False))
        if array.dtype != dtype and not np.array_equal(np.isfinite(stored[name]), np.isfinite(array)):
            raise DataError(f"{name} holds numbers that are too large for {dtype_name}; give another --dtype")
    return stored


# --- directories ------------------------------------------------------------------------------------------------------


def safe_member(directory: Path, name: str) -> Path:
    """The path of a file that a document inside ``directory`` names (such as a shard). It need not be there.

    Raises CheckpointError for a name that could mean a file elsewhere: absolute, with ``..``, a backslash, a colon or
    characters that cannot be printed, or a link that leads out of the directory.
    """
    parts = name.split("/") if isinstance(name, str) else [""]
    if any(part in ("", ".", "..") or "\\" in part or ":" in part or not part.isprintable() for part in parts):
        raise CheckpointError(f"{directory}: the name {name!r} is refused; expected a plain path inside this directory")
    path = directory.joinpath(*parts)
    if not stays_inside(path, directory):
        raise CheckpointError(f"{directory}: {name} is a link that leads out of this directory; put the file itself there")
    return path


def stays_inside(path: Path, directory: Path) -> bool:
    """Whether a path lies in a directory once its links are followed."""
    try:
        return path.resolve().is_relative_to(directory.resolve())
    except (OSError, RuntimeError):  # links in a circle
        return False


def read_directory(directory: Path) -> tuple[dict[str, HostArray], list[Path]]:
    """All tensors of ``model.safetensors`` or of the shards in its index, as `mapped` gives them, and the files.

    Raises DataError when there is neither, or when index and shards tell different things.
    """
    if disk.exists(directory / SINGLE):
        return mapped(directory / SINGLE), [directory / SINGLE]
    index = directory / INDEX
    if not disk.exists(index):
        pickles = [name for name in disk.names(directory) if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
        if pickles:
            advice = "reading them could run any program; let transformers write the model as safetensors"
            raise DataError(f"{directory}: its weights are pickles ({some(pickles)}), which are not read: {advice}")
        raise DataError(f"{directory}: holds neither {SINGLE} nor {INDEX}")
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise DataError(f"{index}: expected a weight_map from names of tensors to names of files")
    tensors: dict[str, HostArray] = {}
    files = {name: safe_member(directory, name) for name in sorted(set(places.values()))}
    for name, path in files.items():
        shard = mapped(path)
        promised = {tensor for tensor, place in places.items() if place == name}
        odd = sorted(promised ^ shard.keys())
        if odd:
            raise DataError(f"{index}: {name} holds other tensors than it says: {some(odd)}")
        tensors |= shard
    return tensors, [*files.values(), index]


def digest_of(files: Iterable[Path]) -> str:
    """SHA-256 of the canonical JSON of the files' own, by name."""
    digests = {path.name: sha256_of(path) for path in files}
    return hashlib.sha256(canonical_json(digests).encode()).hexdigest()


def sha256_of(path: Path) -> str:
    """SHA-256 of a whole file, as ``sha256sum`` prints it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_directory(
    directory: Path, sizes: Mapping[str, int], make: Callable[[str], HostArray], most: int | None
) -> list[Path]:
    """Write tensors to ``model.safetensors``, or to shards of at most ``most`` bytes of tensors with an index.

    sizes: bytes by name, in the order of the shards; ``make(name)`` gives the array, one shard at a time. Returns the files.
    """
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if most is not None and shards[-1] and filled + size > most:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    count = len(shards)
    names = [SINGLE] if count == 1 else [f"model-{k:05}-of-{count:05}.safetensors" for k in range(1, count + 1)]
    for file, tensors in zip(names, shards, strict=True):
        format.save(directory / file, {name: make(name) for name in tensors}, {"format": "pt"})
    if count > 1:
        places = {name: file for file, tensors in zip(names, shards, strict=True) for name in tensors}
        whole = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places}
        disk.replace(directory / INDEX, json_text(whole).encode())
        names.append(INDEX)
    return [directory / name for name in names]
