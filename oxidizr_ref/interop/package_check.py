"""Is a package whole: everything that others need to open a model, nothing damaged, nothing that should not be published.

A package is a directory with the weights (``model.safetensors``, or shards and ``model.safetensors.index.json``), their
``config.json``, our ``training_config.json``, a ``README.md`` with the hub's YAML header, and tokenizer files.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from safetensors import safe_open

from oxidizr_ref.checkpoint import disk, format
from oxidizr_ref.checkpoint.contents import numbers_of
from oxidizr_ref.checkpoint.format import HostArray
from oxidizr_ref.config import ModelConfig
from oxidizr_ref.config_yaml import read_yaml
from oxidizr_ref.errors import CheckpointError, ConfigError, DataError, OxidizrError
from oxidizr_ref.interop.layouts import expected_shapes, our_shapes
from oxidizr_ref.interop.pack import OWN_TYPE
from oxidizr_ref.interop.weight_files import INDEX, SINGLE, mapped, must_fit, once, safe_member, some, stays_inside

Shapes: TypeAlias = Mapping[str, tuple[int, ...]]
Check: TypeAlias = Callable[[Path], object]  # raises CheckpointError

CONFIG, TRAINING_CONFIG, README = "config.json", "training_config.json", "README.md"
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
#: Directories that other programs keep inside; the client of the hub leaves them out as well.
NOT_PUBLISHED = frozenset({".git", ".cache"})

_MAX_HEADER = 100_000_000  # bytes, as in the safetensors library
_SECRET = re.compile(rb"(?<![A-Za-z0-9_])(?:hf|api_org)_[A-Za-z0-9]{20}")
_FRONT_MATTER = re.compile(r"---\r?\n(.*?\r?\n)---\r?(?:\n|$)", re.DOTALL)
_PICTURE = re.compile(r"!\[[^]\n]*\]\(([^)\s]+)")
_LEFT_OVER = re.compile(r".*(?:\.tmp|\.part|\.partial|\.incomplete|\.lock|~)")


def package_files(directory: Path) -> list[str]:
    """The names of all files to be published, sorted, ``/`` between their parts.

    Raises CheckpointError when there is no such directory.
    """
    return [name for name, _ in _entries(directory)]


def check_package(directory: Path) -> list[str]:
    """Everything that is wrong with a package, a line each, beginning with the file; none when it is whole.

    Every weight is read. Raises CheckpointError when there is no such directory.
    """
    entries = dict(_entries(directory))
    problems = [f"{name}: {problem}" for name, problem in entries.items() if problem]
    names = {name for name, problem in entries.items() if not problem}  # the others are not even opened
    problems += [f"{name}: missing" for name in (CONFIG, TRAINING_CONFIG, README) if name not in entries]
    checks: dict[str, Check] = {CONFIG: _read_json, TRAINING_CONFIG: _read_json, README: _check_readme}
    checks |= {name: _load_json for name in names - checks.keys() - {INDEX} if name.endswith(".json")}
    for name in sorted(names & checks.keys()):
        problems += _problems(directory, name, checks[name])
    if TOKENIZER_CONFIG in names and TOKENIZER not in entries:
        problems.append(f"{TOKENIZER}: missing, though there is {TOKENIZER_CONFIG}")
    problems += _check_weights(directory, names)
    for name in sorted(names):
        problems += _problems(directory, name, _check_secrets)
    return problems


def _problems(directory: Path, name: str, check: Check) -> list[str]:
    """What ``check`` has to say about a file: nothing, or one problem."""
    try:
        check(directory / name)
    except CheckpointError as error:
        return [f"{name}: {error}"]
    except OSError as error:
        return [f"{name}: cannot be read ({error.strerror})"]
    return []


# --- which files ------------------------------------------------------------------------------------------------------


def _entries(directory: Path) -> Iterator[tuple[str, str | None]]:
    """Every file of a package, sorted, with what is wrong about its being there."""
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such directory")
    found: list[tuple[str, str | None]] = []
    for root, folders, files in os.walk(directory):
        folders[:] = [name for name in folders if not (Path(root) == directory and name in NOT_PUBLISHED)]
        links = [name for name in folders if (Path(root) / name).is_symlink()]
        for name in (*files, *links):
            path = Path(root) / name
            found.append((path.relative_to(directory).as_posix(), _why_not(path, directory)))
    return iter(sorted(found))


def _why_not(path: Path, directory: Path) -> str | None:
    name, inside = path.name, path.relative_to(directory)
    if name == ".env" or name.startswith(".env."):
        return "may hold secrets, which are not to be published; move it out of the package"
    if _LEFT_OVER.fullmatch(name):
        return "left by a command that was interrupted, it seems; remove it"
    if any(part.startswith(".") for part in inside.parts) and name != ".gitattributes":
        return "what is hidden is no part of a package; remove it"
    if not str(inside).isprintable() or "\\" in name:
        return "a name with such characters cannot be published; rename it"
    if not stays_inside(path, directory):
        return "a link that leads out of the package; put the file itself there"
    if path.is_symlink() and path.is_dir():
        return "a link to a directory; put the files themselves there"
    return None if path.is_file() else "not a regular file"


def _check_secrets(path: Path) -> None:
    """Nothing in a file looks like a token of the hub. Of weights, only the header is looked at."""
    if path.suffix == ".safetensors":
        with path.open("rb") as file:
            found = bool(_SECRET.search(file.read(min(int.from_bytes(file.read(8), "little"), _MAX_HEADER))))
        where = "its header" if found else ""
    else:
        with path.open("rb") as file:
            where = next((f"line {number}" for number, line in enumerate(file, 1) if _SECRET.search(line)), "")
    if where:
        what = "holds what looks like a token of the Hugging Face hub (not shown)"
        raise CheckpointError(f"{where} {what}; remove it, and revoke that token")


# --- the documents ----------------------------------------------------------------------------------------------------


def _load_json(path: Path) -> Any:
    """JSON that means the same to every reader: no key twice, no NaN. Raises CheckpointError."""
    try:
        return json.loads(disk.read(path).decode(), object_pairs_hook=once, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"not valid JSON ({error})") from None


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is no JSON")


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError."""
    value = _load_json(path)
    if not isinstance(value, dict):
        raise CheckpointError("not a JSON object")
    return value


def _check_readme(path: Path) -> None:
    try:
        text = disk.read(path).decode()
    except UnicodeDecodeError:
        raise CheckpointError("not UTF-8 text") from None
    front = _FRONT_MATTER.match(text)
    if front is None:
        raise CheckpointError("does not begin with the hub's header: YAML between two lines ---")
    try:
        header = read_yaml(f"\n{front[1]}", "its header")  # counting lines as the file does
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    if not isinstance(header.data, dict) or header.problems:
        raise CheckpointError("its header is not a list of YAML keys, each given once")
    for name in _PICTURE.findall(text):
        if "://" not in name and not safe_member(path.parent, name).is_file():
            raise CheckpointError(f"shows {name}, which is missing")


# --- the weights ------------------------------------------------------------------------------------------------------


def _check_weights(directory: Path, names: set[str]) -> list[str]:
    if INDEX in names and SINGLE in names:
        return [f"{INDEX}: there is also {SINGLE}; one of them was left over: remove it"]
    if INDEX not in names and SINGLE not in names:
        return [f"{SINGLE}: missing (and there is no {INDEX})"]
    weight_map: dict[str, str] = {}
    problems: list[str] = []
    shards = [SINGLE]
    if INDEX in names:
        try:
            weight_map, size = _read_index(directory)
        except CheckpointError as error:
            return [f"{INDEX}: {error}"]
        shards = sorted(set(weight_map.values()))
    arrays: dict[str, HostArray] = {}
    for shard in shards:
        if shard not in names:
            problems.append(f"{shard}: missing, though {INDEX} names it")
            continue
        try:
            there = _check_file(directory / shard)
        except (CheckpointError, DataError) as error:
            problems.append(f"{shard}: {str(error).removeprefix(f'{directory / shard}: ')}")
            continue
        odd = sorted({name for name in weight_map if weight_map[name] == shard} ^ there.keys())
        if odd and INDEX in names:
            problems.append(f"{shard}: holds other tensors than {INDEX} says: {some(odd)}")
        arrays |= there
    strays = sorted(name for name in names if name.endswith(".safetensors") and name not in shards)
    problems += [f"{name}: neither {SINGLE} nor named by an index; remove it" for name in strays]
    if problems:
        return problems
    total = sum(array.nbytes for array in arrays.values())
    if INDEX in names and size != total:
        return [f"{INDEX}: its metadata.total_size is {size}, but the tensors take {total} bytes"]
    return _check_config(directory, arrays) if CONFIG in names else []  # its absence was told


def _read_index(directory: Path) -> tuple[dict[str, str], Any]:
    """The shard of every tensor, and the size the index gives. Raises CheckpointError."""
    index = _read_json(directory / INDEX)
    weight_map: Any = index.get("weight_map")
    metadata: Any = index.get("metadata")
    whole = isinstance(weight_map, dict) and weight_map and isinstance(metadata, dict)
    if not whole or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError("expected a weight_map (a shard for every tensor) and metadata")
    for shard in sorted(set(weight_map.values())):
        safe_member(directory, shard)
    return weight_map, metadata.get("total_size")


def _check_file(path: Path) -> dict[str, HostArray]:
    """The tensors of a sound weight file whose numbers are all finite. Raises CheckpointError or DataError."""
    arrays = mapped(path)
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata() or {}
    if metadata.get("format") != "pt":
        raise CheckpointError('its metadata lacks format: "pt", which other tools ask for')
    bad = [f"{name} ({part.not_finite:,})" for name, part in numbers_of(arrays).items() if part.not_finite]
    if bad:
        raise CheckpointError(f"numbers that are NaN or infinite in {len(bad)} tensors: {some(bad)}")
    if not metadata.keys().isdisjoint(("digests", "header_digest")):  # written by this package: every bit can be proved
        format.verify(path)
    return arrays


# --- config and weights -----------------------------------------------------------------------------------------------


def _check_config(directory: Path, arrays: Mapping[str, HostArray]) -> list[str]:
    """What of the weights is not as ``config.json`` has it."""
    try:
        config = _read_json(directory / CONFIG)
    except (CheckpointError, OSError):
        return []  # told already
    try:
        expected = _expected_shapes(config)
    except (OxidizrError, ValueError) as error:
        return [f"{CONFIG}: no model can be made of it ({' '.join(str(error).split())})"]
    if expected is None:
        return []
    try:
        must_fit(arrays, expected, CONFIG)
    except DataError as error:
        return [str(error)]
    return []


def _expected_shapes(config: dict[str, Any]) -> Shapes | None:
    """Names and shapes of the tensors a ``config.json`` calls for: of our own kind of model, or in a layout of Hugging Face
    that is known here; None for any other.

    Raises ValueError or one of our own errors when the config makes no model.
    """
    if config.get("model_type") == OWN_TYPE:
        return our_shapes(ModelConfig(**{key: value for key, value in config.items() if key in ModelConfig.model_fields}))
    return expected_shapes(config)
