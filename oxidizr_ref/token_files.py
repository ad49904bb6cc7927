"""A file of tokens and the files beside it: what `oxidizr-ref prepare` writes and training reads.

All numbers are raw and little-endian, without a header::

    NAME.bin            u32: the tokens
    NAME.documents.u64  ascending positions in the tokens: where each document begins as model input. That is 0, and for each
                        later document the end-of-text token before it, which closes one document as a target and opens the
                        next as an input (its first token, where the tokenizer has no end-of-text token)
    NAME.responses.u64  pairs (begin, end), ascending, not overlapping: the tokens ``begin … end-1`` are to be learnt, as
                        targets. Absent where no document has a prompt
    NAME.meta.json      what all of these are: `Meta`

Only NAME.bin must be there: any program can make one.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oxidizr_ref.errors import DataError

FORMAT, VERSION = "oxidizr_ref.tokens", 1

_REMAKE = "make the files anew with oxidizr-ref prepare --overwrite"
_DIGEST = re.compile("[0-9a-f]{64}")
_PART = 1 << 20  # numbers checked at a time


@dataclass(frozen=True)
class Meta:
    """What is known of a file of tokens.

    tokenizer: its ``state()``, from which `tokenizers.tokenizer_from_state` rebuilds it. special_tokens: their ids.
    largest: the largest token id. digest: of the tokens, as `data.TokenStream.facts` defines it; documents_digest and
    responses_digest: SHA-256 of the files beside it (None: there is none). sources: names of the files it was made of.
    replaced: bytes or characters of theirs that were no Unicode and became U+FFFD.
    """

    tokenizer: Mapping[str, Any]
    vocab_size: int
    end_of_text: int | None
    special_tokens: Mapping[str, int]
    tokens: int
    documents: int
    largest: int
    digest: str
    documents_digest: str | None
    responses_digest: str | None
    sources: tuple[str, ...]
    replaced: int

    def to_json(self) -> bytes:
        """The content of NAME.meta.json."""
        entries = {"format": FORMAT, "version": VERSION, **asdict(self)}
        return json.dumps(entries, sort_keys=True, indent=1, ensure_ascii=True, allow_nan=False).encode("ascii") + b"\n"


def documents_path(bin_path: Path) -> Path:
    """NAME.documents.u64 of NAME.bin."""
    return _beside(bin_path, ".documents.u64")


def responses_path(bin_path: Path) -> Path:
    """NAME.responses.u64 of NAME.bin."""
    return _beside(bin_path, ".responses.u64")


def meta_path(bin_path: Path) -> Path:
    """NAME.meta.json of NAME.bin."""
    return _beside(bin_path, ".meta.json")


def _beside(bin_path: Path, ending: str) -> Path:
    return bin_path.with_name(bin_path.name.removesuffix(".bin") + ending)


def read_meta(bin_path: Path) -> Meta | None:
    """What NAME.meta.json says; None where there is none. Raises DataError where it is malformed, or of another NAME.bin."""
    path = meta_path(bin_path)
    try:
        text = path.read_text(encoding="ascii")
        size = os.stat(bin_path).st_size
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); {_REMAKE}") from None
    try:
        stored = json.loads(text)
        known = stored["format"] == FORMAT and type(stored["version"]) is int
    except (ValueError, RecursionError, KeyError, TypeError):
        known = False
    if not known:
        raise DataError(f"{path}: is no description of tokens; {_REMAKE}")
    if stored["version"] != VERSION:
        raise DataError(f"{path}: has version {stored['version']}, this release reads {VERSION}; {_REMAKE}")
    meta = _checked(path, stored)
    if size != 4 * meta.tokens:
        raise DataError(f"{bin_path}: has {size:,} bytes, but {path.name} tells of {meta.tokens:,} tokens; {_REMAKE}")
    return meta


def _checked(path: Path, stored: dict[str, Any]) -> Meta:
    def is_count(value: Any) -> bool:
        return type(value) is int and value >= 0

    def is_digest(value: Any) -> bool:
        return isinstance(value, str) and _DIGEST.fullmatch(value) is not None

    sound: dict[str, Callable[[Any], bool]] = {
        "tokenizer": lambda value: isinstance(value, dict) and isinstance(value.get("name"), str),
        "end_of_text": lambda value: value is None or is_count(value),
        "special_tokens": lambda value: isinstance(value, dict) and all(map(is_count, value.values())),
        "digest": is_digest,
        "documents_digest": lambda value: value is None or is_digest(value),
        "responses_digest": lambda value: value is None or is_digest(value),
        "sources": lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value),
        "largest": lambda value: type(value) is int and -1 <= value < 2**32,
    }
    for field in fields(Meta):
        if field.name not in stored or not sound.get(field.name, is_count)(stored[field.name]):
            raise DataError(f"{path}: {field.name} is missing or malformed; {_REMAKE}")
    values = {field.name: stored[field.name] for field in fields(Meta)}
    return Meta(**{**values, "sources": tuple(values["sources"])})


def open_documents(bin_path: Path) -> NDArray[np.uint64] | None:
    """Where documents begin, uint64 ``[documents]``, memory-mapped; None where NAME.documents.u64 is not there.

    Raises DataError where it does not begin with 0, does not ascend, or points beyond the tokens.
    """
    positions = _open(documents_path(bin_path), 1)
    if positions is None:
        return None
    if positions.size and positions[0] != 0:
        raise DataError(f"{documents_path(bin_path)}: the first document begins at {positions[0]}, not at 0; {_REMAKE}")
    _check_ascending(bin_path, documents_path(bin_path), positions, strictly=True)
    return positions


def open_responses(bin_path: Path) -> NDArray[np.uint64] | None:
    """Spans of targets to be learnt, uint64 ``[n, 2]``, memory-mapped; None where NAME.responses.u64 is not there (all are).

    Raises DataError where a span is empty, overlaps the one before, or ends beyond the tokens.
    """
    path = responses_path(bin_path)
    ends = _open(path, 2)
    if ends is None:
        return None
    _check_ascending(bin_path, path, ends, strictly=False)
    spans = ends.reshape(-1, 2)
    for begin in range(0, len(spans), _PART):
        part = spans[begin : begin + _PART]
        if bool(np.any(part[:, 0] >= part[:, 1])):
            raise DataError(f"{path}: has a span without tokens; {_REMAKE}")
    return spans


def _open(path: Path, together: int) -> NDArray[np.uint64] | None:
    try:
        size = path.stat().st_size
        if size % (8 * together):
            raise DataError(f"{path}: {size} bytes are no whole number of {8 * together}; {_REMAKE}")
        return np.asarray(np.memmap(path, dtype="<u8", mode="r")) if size else np.empty(0, dtype=np.uint64)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); check the path and the disk") from None


def _check_ascending(bin_path: Path, path: Path, positions: NDArray[np.uint64], *, strictly: bool) -> None:
    """A begin must lie below the number of tokens (strictly); an end may be it."""
    wrong = np.less_equal if strictly else np.less
    for begin in range(0, positions.size, _PART):
        part = positions[begin : begin + _PART + 1]  # one more, to compare across parts
        found = np.flatnonzero(wrong(part[1:], part[:-1]))
        if found.size:
            raise DataError(f"{path}: entry {begin + int(found[0]) + 1} does not ascend; {_REMAKE}")
    tokens = os.stat(bin_path).st_size // 4
    if positions.size and positions[-1] > tokens - strictly:
        raise DataError(f"{path}: position {positions[-1]} is beyond the {tokens} tokens of {bin_path.name}; {_REMAKE}")
