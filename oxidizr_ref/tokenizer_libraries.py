"""Tokenizers whose vocabularies others made: four well-known ones through splintr, any tokenizer.json through tokenizers.

Both libraries come with ``pip install "oxidizr-ref[tokenizers]"`` and are imported when such a tokenizer is asked for. They
encode a batch of texts on all cores. Each class is a `tokenizers.Tokenizer`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from oxidizr_ref.errors import DataError

SPLINTR_NAMES = ("cl100k_base", "o200k_base", "llama3", "deepseek_v3")
JSON_NAME = "tokenizer.json"

#: What a text ends with, in the vocabularies of others: the first of these that one has.
_ENDS = ("<|endoftext|>", "<|end_of_text|>", "<｜end▁of▁sentence｜>", "</s>", "<eos>", "<|eot_id|>", "<|im_end|>")
_INSTALL = 'pip install "oxidizr-ref[tokenizers]"'


class SplintrTokenizer:
    """One of `SPLINTR_NAMES`, with the special tokens that splintr adds to it (``<|user|>`` and others).

    Raises DataError where splintr is not installed.
    """

    def __init__(self, name: str) -> None:
        try:
            import splintr
        except ImportError:
            raise DataError(f"the tokenizer {name} needs splintr-rs; {_INSTALL}") from None
        self.name = name
        self._core = splintr.Tokenizer.from_pretrained(name)
        self.vocab_size: int = self._core.vocab_size
        self.end_of_text: int | None = self._core.eos_token_id
        self.special_tokens = _by_id(self._core.special_tokens())
        self._special_octets = {token_id: token.encode() for token, token_id in self.special_tokens.items()}

    def encode(self, text: str) -> NDArray[np.uint32]:
        """The ids of ``text``, uint32 ``[tokens]``. Raises DataError for half a surrogate pair."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """The ids of each text."""
        try:
            octets, offsets = self._core.encode_batch_flat(list(texts))
        except UnicodeEncodeError as error:
            raise not_unicode(error) from None
        ids = np.frombuffer(octets, dtype="<u4").astype(np.uint32)
        return np.split(ids, np.frombuffer(offsets, dtype="<u8")[1:-1].astype(np.int64)) if texts else []

    def decode(self, ids: ArrayLike) -> str:
        """The text of ``ids`` ``[tokens]``; what is no UTF-8, and ids that stand for nothing, become U+FFFD."""
        octets = b"".join(map(self._octets, checked_ids(ids, self.name, self.vocab_size).tolist()))
        return octets.decode(errors="replace")

    def _octets(self, token_id: int) -> bytes:
        if token_id in self._special_octets:
            return self._special_octets[token_id]
        try:
            octets: bytes = self._core.decode_token_bytes(token_id)
        except ValueError:  # a number that the vocabulary skips: a young model says it all the same
            return "\N{REPLACEMENT CHARACTER}".encode()
        return octets

    @cached_property
    def _digest(self) -> str:
        """SHA-256 over the octets of every id, each line ended by its length."""
        sha = hashlib.sha256(f"{self.name} {self.vocab_size}\n".encode("ascii"))
        for octets in map(self._octets, range(self.vocab_size)):
            sha.update(b"%b %d\n" % (octets, len(octets)))
        return sha.hexdigest()

    def state(self) -> dict[str, Any]:
        """Name and digest: splintr holds the vocabulary."""
        return {"name": self.name, "digest": self._digest}


class JsonTokenizer:
    """What a tokenizer.json describes (the format of Hugging Face), with its own special tokens.

    No template adds tokens to a text, and texts are never cut or padded, whatever the file says. Decoding undoes encoding
    as far as the file's own decoder does: byte-level ones do exactly.

    text: the content of the file. Raises DataError where it is none, or where the library is not installed.
    """

    name = JSON_NAME

    def __init__(self, text: str) -> None:
        try:
            import tokenizers
        except ImportError:
            raise DataError(f"a {JSON_NAME} needs the library tokenizers; {_INSTALL}") from None
        try:
            self._core = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library has no narrower type
            raise DataError(f"is no {JSON_NAME} that the library tokenizers can read ({error}); get it anew") from None
        self._core.no_truncation()
        self._core.no_padding()
        self._text = text
        self.vocab_size: int = 1 + max(self._core.get_vocab(with_added_tokens=True).values(), default=-1)
        self.special_tokens = _by_id({str(t.content): i for i, t in self._core.get_added_tokens_decoder().items()})
        self.end_of_text: int | None = next((self.special_tokens[t] for t in _ENDS if t in self.special_tokens), None)

    @classmethod
    def from_file(cls, path: Path) -> JsonTokenizer:
        """The tokenizer in this file. Raises DataError naming it."""
        try:
            return cls(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise DataError(f"{path}: no such tokenizer file; check the path") from None
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: cannot be read ({error}); give a tokenizer.json") from None
        except DataError as error:
            raise DataError(f"{path}: {error}") from None

    @cached_property
    def begin_of_text(self) -> int | None:
        """The token that the file's template would put before a text, where it has such a template."""
        encoding = self._core.encode("a")
        return int(encoding.ids[0]) if encoding.special_tokens_mask[:1] == [1] else None

    def encode(self, text: str) -> NDArray[np.uint32]:
        """The ids of ``text``, uint32 ``[tokens]``. Raises DataError for half a surrogate pair."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """The ids of each text."""
        try:
            encodings = self._core.encode_batch_fast(list(texts), add_special_tokens=False)
        except TypeError:  # what the library says of a text that has no UTF-8
            for text in texts:
                octets_of(text)
            raise
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def decode(self, ids: ArrayLike) -> str:
        """The text of ``ids`` ``[tokens]``, special tokens written out. Raises DataError for an id outside."""
        checked = checked_ids(ids, self.name, self.vocab_size)
        return str(self._core.decode(checked.tolist(), skip_special_tokens=False))

    def state(self) -> dict[str, Any]:
        """Name, digest and the whole file as one string: a checkpoint needs nothing beside it."""
        return {"name": self.name, "digest": hashlib.sha256(self._text.encode()).hexdigest(), "json": self._text}


def checked_ids(ids: ArrayLike, name: str, vocab_size: int) -> NDArray[np.int64]:
    """``ids`` as int64 ``[tokens]``. Raises DataError naming the first that is not below ``vocab_size``."""
    checked = np.asarray(ids, dtype=np.int64).reshape(-1)
    outside = np.flatnonzero((checked < 0) | (checked >= vocab_size))
    if outside.size:
        place = f"token id {checked[outside[0]]} at position {outside[0]}"
        raise DataError(f"{place} is not an id of the {name} tokenizer; decode with the tokenizer that made it")
    return checked


def octets_of(text: str) -> bytes:
    """``text`` in UTF-8. Raises DataError for half a surrogate pair, which UTF-8 lacks."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise not_unicode(error) from None


def not_unicode(error: UnicodeEncodeError) -> DataError:
    """What to say of a text with half a surrogate pair."""
    return DataError(f"half a surrogate pair at position {error.start} of the text is no UTF-8; remove it")


def _by_id(special_tokens: dict[str, int]) -> dict[str, int]:
    return dict(sorted(special_tokens.items(), key=lambda item: item[1]))


def digest_of(name: str, vocabulary: Sequence[str]) -> str:
    """SHA-256 over one canonical JSON line: ASCII, sorted keys, fixed separators."""
    line = json.dumps({"name": name, "vocabulary": list(vocabulary)}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(line.encode("ascii")).hexdigest()
