"""Text to token ids and back: the two tokenizers that need no vocabulary file, one id a byte and one id a character.

Both know oxidizr's special tokens. Written literally in a text, a special token becomes one id; decoding writes it out
again, so ``decode(encode(text)) == text`` for every text a tokenizer can encode.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, AnyStr, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from oxidizr_ref.errors import DataError

SPECIAL_TOKENS = ("<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>")

_BYTES = 256
# ASCII cannot occur inside a multi-byte UTF-8 sequence, so a match in the bytes is a match in the text.
_SPECIAL_IDS = {token.encode(): _BYTES + i for i, token in enumerate(SPECIAL_TOKENS)}
_SPECIAL_OCTETS = re.compile(b"|".join(map(re.escape, _SPECIAL_IDS)))


class ByteTokenizer:
    """Ids 0…255 are the bytes of UTF-8; 256… are ``SPECIAL_TOKENS`` in their order."""

    name = "byte"
    vocab_size = _BYTES + len(SPECIAL_TOKENS)

    def encode(self, text: str) -> NDArray[np.uint32]:
        """The ids of ``text``, uint32 ``[tokens]``. Raises DataError for half a surrogate pair, which UTF-8 lacks."""
        try:
            octets = text.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"half a surrogate pair at position {error.start} of the text is no UTF-8; remove it") from None
        ids = np.frombuffer(octets, dtype=np.uint8).astype(np.uint32)
        return _fold_special_tokens(ids, _SPECIAL_OCTETS.finditer(octets), _SPECIAL_IDS)

    def decode(self, ids: ArrayLike) -> str:
        """The text of ``ids`` ``[tokens]``; bytes that are no UTF-8 become U+FFFD. Raises DataError for an id ≥ 260."""
        checked = _checked_ids(ids, self)
        octets = bytearray()
        begin = 0
        for position in np.flatnonzero(checked >= _BYTES).tolist():
            octets += checked[begin:position].astype(np.uint8).tobytes()
            octets += SPECIAL_TOKENS[checked[position] - _BYTES].encode()
            begin = position + 1
        octets += checked[begin:].astype(np.uint8).tobytes()
        return octets.decode(errors="replace")

    def state(self) -> dict[str, Any]:
        """Name and digest, JSON-able; ``tokenizer_from_state`` rebuilds the tokenizer from it."""
        return {"name": self.name, "digest": _digest(self.name, SPECIAL_TOKENS)}


class CharTokenizer:
    """One id a character: the characters in code point order, then the special tokens that the text contains."""

    name = "char"

    def __init__(self, vocabulary: Sequence[str]) -> None:
        characters = [entry for entry in vocabulary if len(entry) == 1]
        specials = [token for token in SPECIAL_TOKENS if token in vocabulary]
        if not characters or sorted(set(characters)) + specials != list(vocabulary):
            raise DataError("a char vocabulary is sorted characters, then special tokens; build it from a non-empty text")
        self.vocabulary = tuple(vocabulary)
        self.vocab_size = len(self.vocabulary)
        self._code_points = _code_points("".join(characters))
        self._special_ids = {token: len(characters) + i for i, token in enumerate(specials)}
        self._special_pattern = re.compile("|".join(map(re.escape, specials)) or "(?!)")  # (?!) matches nowhere

    @classmethod
    def from_text(cls, text: str) -> CharTokenizer:
        """The tokenizer whose vocabulary is what occurs in ``text``. Raises DataError if that is nothing."""
        return cls([*sorted(set(text)), *(token for token in SPECIAL_TOKENS if token in text)])

    def encode(self, text: str) -> NDArray[np.uint32]:
        """The ids of ``text``, uint32 ``[tokens]``. Raises DataError naming the first character it does not know."""
        code_points = _code_points(text)
        nearest = np.searchsorted(self._code_points, code_points).clip(max=self._code_points.size - 1)
        known = self._code_points[nearest] == code_points
        if not known.all():
            position = int(np.argmin(known))
            place = f"{text[position]!r} (U+{ord(text[position]):04X}) at position {position} of the text"
            raise DataError(f"{place} is not in the char vocabulary; leave it out, or use data.tokenizer: byte")
        return _fold_special_tokens(nearest.astype(np.uint32), self._special_pattern.finditer(text), self._special_ids)

    def decode(self, ids: ArrayLike) -> str:
        """The text of ``ids`` ``[tokens]``. Raises DataError for an id outside the vocabulary."""
        return "".join(map(self.vocabulary.__getitem__, _checked_ids(ids, self).tolist()))

    def state(self) -> dict[str, Any]:
        """Name, digest and vocabulary, JSON-able; ``tokenizer_from_state`` rebuilds the tokenizer from it."""
        digest = _digest(self.name, self.vocabulary)
        return {"name": self.name, "digest": digest, "vocabulary": list(self.vocabulary)}


Tokenizer: TypeAlias = ByteTokenizer | CharTokenizer


def get_tokenizer(name: str, text: str | None) -> Tokenizer:
    """The tokenizer called ``name``; ``char`` takes its vocabulary from ``text``. Raises DataError for another name."""
    if name == "byte":
        return ByteTokenizer()
    if name == "char":
        return CharTokenizer.from_text(text or "")
    raise DataError(f"no tokenizer {name!r} (data.tokenizer); built in are byte and char, others come in a later release")


def tokenizer_from_state(state: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer whose ``state()`` this is. Raises DataError if its digest is not the one in the state."""
    name = str(state.get("name"))
    tokenizer = CharTokenizer(state.get("vocabulary", ())) if name == "char" else get_tokenizer(name, None)
    if tokenizer.state()["digest"] != state.get("digest"):
        raise DataError(f"the stored {name} tokenizer does not match its digest; use an undamaged copy of the file")
    return tokenizer


def _fold_special_tokens(
    ids: NDArray[np.uint32], matches: Iterator[re.Match[AnyStr]], special_ids: Mapping[AnyStr, int]
) -> NDArray[np.uint32]:
    """``ids``, one an element of the text, with each special token's run of elements replaced by its one id."""
    keep = np.ones(ids.size, dtype=np.bool_)
    for match in matches:
        ids[match.start()] = special_ids[match.group()]
        keep[match.start() + 1 : match.end()] = False
    return ids[keep]


def _code_points(text: str) -> NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4").astype(np.uint32)


def _checked_ids(ids: ArrayLike, tokenizer: Tokenizer) -> NDArray[np.int64]:
    checked = np.asarray(ids, dtype=np.int64).reshape(-1)
    outside = np.flatnonzero((checked < 0) | (checked >= tokenizer.vocab_size))
    if outside.size:
        place = f"token id {checked[outside[0]]} at position {outside[0]}"
        raise DataError(f"{place} is not an id of the {tokenizer.name} tokenizer; decode with the tokenizer that made it")
    return checked


def _digest(name: str, vocabulary: Sequence[str]) -> str:
    """SHA-256 over one canonical JSON line: ASCII, sorted keys, fixed separators."""
    line = json.dumps({"name": name, "vocabulary": list(vocabulary)}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(line.encode("ascii")).hexdigest()
