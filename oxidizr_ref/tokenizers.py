"""Text to token ids and back: what a tokenizer is, and the two that need no vocabulary file.

`ByteTokenizer` has one id a byte, `CharTokenizer` one a character, and both know oxidizr's special tokens; for others see
`tokenizer_libraries.py`. Written literally in a text, a special token becomes one id; decoding writes it out again, so
``decode(encode(text)) == text`` for every text a tokenizer can encode.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, chain, pairwise
from pathlib import Path
from typing import Any, AnyStr, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from oxidizr_ref.errors import DataError
from oxidizr_ref.tokenizer_libraries import (
    JSON_NAME,
    SPLINTR_NAMES,
    JsonTokenizer,
    SplintrTokenizer,
    checked_ids,
    digest_of,
    octets_of,
)

END_OF_TEXT = "<|endoftext|>"
SPECIAL_TOKENS = (END_OF_TEXT, "<|user|>", "<|assistant|>", "<|system|>")

_BYTES = 256
# ASCII cannot occur inside a multi-byte UTF-8 sequence, so a match in the bytes is a match in the text.
_SPECIAL_IDS = {token.encode(): _BYTES + i for i, token in enumerate(SPECIAL_TOKENS)}
_SPECIAL_OCTETS = re.compile(b"|".join(map(re.escape, _SPECIAL_IDS)))


class Tokenizer(Protocol):
    """Text to ids and back.

    vocab_size: above every id. end_of_text: the id that follows a document, where there is one. special_tokens: the texts
    that become one id wherever they stand, with their ids, ascending.
    """

    @property
    def name(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def end_of_text(self) -> int | None: ...
    @property
    def special_tokens(self) -> Mapping[str, int]: ...

    def encode(self, text: str) -> NDArray[np.uint32]:
        """The ids of ``text``, uint32 ``[tokens]``. Raises DataError for what it cannot encode."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """The ids of each text, as `encode` gives them; faster where a library spreads texts over the cores."""
        ...

    def decode(self, ids: ArrayLike) -> str:
        """The text of ``ids`` ``[tokens]``, special tokens written out. Raises DataError for an id outside."""
        ...

    def state(self) -> dict[str, Any]:
        """Name, digest and what else `tokenizer_from_state` needs to rebuild it; JSON-able."""
        ...


class ByteTokenizer:
    """Ids 0…255 are the bytes of UTF-8; 256… are ``SPECIAL_TOKENS`` in their order."""

    name = "byte"
    vocab_size = _BYTES + len(SPECIAL_TOKENS)
    end_of_text: int | None = _BYTES
    special_tokens: Mapping[str, int] = {token: _BYTES + i for i, token in enumerate(SPECIAL_TOKENS)}

    def encode(self, text: str) -> NDArray[np.uint32]:
        """The ids of ``text``, uint32 ``[tokens]``. Raises DataError for half a surrogate pair, which UTF-8 lacks."""
        octets = octets_of(text)
        ids = np.frombuffer(octets, dtype=np.uint8).astype(np.uint32)
        return _fold_special_tokens(ids, _SPECIAL_OCTETS.finditer(octets), _SPECIAL_IDS)

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """The ids of each text: where no special token is, views of one array."""
        octets = [octets_of(text) for text in texts]
        together = b"".join(octets)
        if _SPECIAL_OCTETS.search(together):
            return [self.encode(text) for text in texts]
        ids = np.frombuffer(together, dtype=np.uint8).astype(np.uint32)
        ends = [*accumulate(map(len, octets), initial=0)]
        return [ids[begin:end] for begin, end in pairwise(ends)]

    def decode(self, ids: ArrayLike) -> str:
        """The text of ``ids`` ``[tokens]``; bytes that are no UTF-8 become U+FFFD. Raises DataError for an id ≥ 260."""
        checked = checked_ids(ids, self.name, self.vocab_size)
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
        return {"name": self.name, "digest": digest_of(self.name, SPECIAL_TOKENS)}


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
        self.special_tokens = {token: len(characters) + i for i, token in enumerate(specials)}
        self.end_of_text = self.special_tokens.get(END_OF_TEXT)
        self._code_points = _code_points("".join(characters))
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
        return _fold_special_tokens(nearest.astype(np.uint32), self._special_pattern.finditer(text), self.special_tokens)

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """The ids of each text."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: ArrayLike) -> str:
        """The text of ``ids`` ``[tokens]``. Raises DataError for an id outside the vocabulary."""
        return "".join(map(self.vocabulary.__getitem__, checked_ids(ids, self.name, self.vocab_size).tolist()))

    def state(self) -> dict[str, Any]:
        """Name, digest and vocabulary, JSON-able; ``tokenizer_from_state`` rebuilds the tokenizer from it."""
        digest = digest_of(self.name, self.vocabulary)
        return {"name": self.name, "digest": digest, "vocabulary": list(self.vocabulary)}


def get_tokenizer(name: str, text: str | None) -> Tokenizer:
    """The tokenizer called ``name``; a name that ends in .json is the path of a tokenizer.json (of Hugging Face).

    text: what ``char`` takes its vocabulary from. Raises DataError for another name, and for a library that is missing.
    """
    if name == "byte":
        return ByteTokenizer()
    if name == "char":
        return CharTokenizer.from_text(text or "")
    if name in SPLINTR_NAMES:
        return SplintrTokenizer(name)
    if name.endswith(".json"):
        return JsonTokenizer.from_file(Path(name))
    there_are = ", ".join(("byte", "char", *SPLINTR_NAMES))
    raise DataError(f"no tokenizer {name!r} (data.tokenizer); there are {there_are}, and the path of any tokenizer.json")


def tokenizer_from_state(state: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer whose ``state()`` this is. Raises DataError if its digest is not the one in the state."""
    name = str(state.get("name"))
    tokenizer: Tokenizer
    if name == "char":
        vocabulary = state.get("vocabulary")
        if not isinstance(vocabulary, list) or not all(isinstance(entry, str) for entry in vocabulary):
            vocabulary = []
        tokenizer = CharTokenizer(vocabulary)
    elif name == JSON_NAME:
        tokenizer = JsonTokenizer(str(state.get("json")))
    else:
        tokenizer = get_tokenizer(name, None)
    if tokenizer.state()["digest"] != state.get("digest"):
        version = ", made with another version of splintr" if name in SPLINTR_NAMES else ""
        raise DataError(f"the stored {name} tokenizer does not match its digest{version}; use an undamaged copy of the file")
    return tokenizer


def _fold_special_tokens(
    ids: NDArray[np.uint32], matches: Iterator[re.Match[AnyStr]], special_ids: Mapping[AnyStr, int]
) -> NDArray[np.uint32]:
    """``ids``, one an element of the text, with each special token's run of elements replaced by its one id."""
    first = next(matches, None)
    if first is None:
        return ids
    keep = np.ones(ids.size, dtype=np.bool_)
    for match in chain([first], matches):
        ids[match.start()] = special_ids[match.group()]
        keep[match.start() + 1 : match.end()] = False
    return ids[keep]


def _code_points(text: str) -> NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4").astype(np.uint32)
