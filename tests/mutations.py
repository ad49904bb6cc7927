"""Mutated checkpoint files: from a seed to as many as one likes, each wrong in its own way, and some of them sound.

Half of them are sealed anew: their digests are right, whatever the mutation did, so that only the grammar can refuse them.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from typing import Any

import handmade
import numpy as np
from golden import write_format_v1

Text = bytes

_DIGESTS = re.compile(rb'"digests":"[^"\\]*(?:\\.[^"\\]*)*"')
_NUMBER = re.compile(rb"-?[0-9]+(?:\.[0-9]+)?")
_ENTRY = re.compile(rb'"[^"{}]*":\{[^{}]*\}')
_FIELD = re.compile(rb'"(?:data_offsets|dtype|shape)":(?:\[[^\]]*\]|"[^"]*")')
_STRING_FIELD = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*":"[^"\\]*(?:\\.[^"\\]*)*"')

_ITEM_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "U32": 4, "U8": 1, "I32": 4, "BOOL": 1}
_EXTREMES = (b"0", b"1", b"-1", b"-0", b"00", b"01", b"1.0", b"1e5", b"1E400", b"NaN", b"Infinity", b"null", b"true", b'"1"')
_EXTREMES += tuple(str(2**power + more).encode() for power in (7, 31, 32, 53, 62, 63, 64, 100) for more in (-1, 0, 1))
_TOKENS = (b'"', b"\\", b"{", b"}", b"[", b"]", b":", b",", b" ", b"\n", b"\t", b"\0", b"\xff", b"\x7f", b".", b"-", b"''")
_TOKENS += (
    b"\\u0000",
    b"\\u00e9",
    b"\\u00E9",
    b"\\ud800",
    b"\\udc00",
    b"\\ud83e\\udd80",
    b"\\/",
    b"\\n",
    b'\\"',
    b"\\\\",
    b"\\x",
)
_TOKENS += (b'"":"",', b'"a":"b",', b'"x":{},', b',"x":null', b"//", b"/**/", b"\xef\xbb\xbf", "é🦀".encode(), b"[]", b"{}")
_NAMES = (
    "a",
    "b",
    "z",
    "Z",
    "0",
    "-",
    "a.b",
    "a.b.c",
    "a-b",
    "a_b",
    "__metadata__",
    "digests",
    "",
    ".a",
    "a.",
    "a b",
    "é",
    "n" * 256,
    "n" * 257,
)
_WORDS = ("", "1", "2", "0" * 64, "é", "🦀", '"', "\\", "\n", "\0", "\x7f", "{}", "\ud800", "x" * 70, ",", "header_digest")


def _seeds() -> list[bytes]:
    """Whole files to begin with: a run's, the golden one, one without tensors, one with a little of everything."""
    little = {"m": np.arange(4, dtype=np.uint8), "a.b": np.ones((2, 1), np.float32), "n": np.zeros((0, 3), np.float16)}
    contents: list[tuple[dict[str, Any], dict[str, str]]] = [
        (handmade.tensors(7), handmade.metadata(7)),
        (write_format_v1.tensors(), write_format_v1.metadata()),
        ({}, {}),
        ({"x": np.array(1.5)}, {}),
        (little, {"é": "🦀\n", "a": "b", "format_version": "1"}),
    ]
    return [write_format_v1.file_bytes(arrays, words) for arrays, words in contents]


SEEDS = _seeds()


class Mutator:
    """A source of files, each a function of the seed and of how many came before."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)

    def file(self) -> bytes:
        """The next file."""
        rng = self.rng
        raw = SEEDS[rng.choice((0, 1, 2, 2, 3, 3, 3, 4, 4, 4))]
        text, payload = handmade.text_of(raw).rstrip(b" "), handmade.payload_of(raw)
        for _ in range(rng.choice((0, 1, 1, 2))):
            text, payload = self._meaningfully(text, payload)
        for _ in range(rng.choice((0, 0, 1, 1, 2, 5))):
            text = rng.choice(_ON_TEXT)(self, text)
        if rng.random() < 0.1:
            payload = self._on_bytes(payload)
        if rng.random() < 0.5:
            return handmade.sealed(redigested(text, payload), payload, pad=rng.random() < 0.95)
        raw = handmade.sealed(text, payload) if rng.random() < 0.5 else len(text).to_bytes(8, "little") + text + payload
        return self._on_bytes(raw) if rng.random() < 0.5 else raw

    # --- what a header means: the result is written the one way, and often sound ---------------------------------------

    def _meaningfully(self, text: Text, payload: bytes) -> tuple[Text, bytes]:
        try:
            header = json.loads(text)
            words = header.pop("__metadata__")
            self.rng.choice((self._change_words, self._change_tensors, self._change_tensors))(header, words)
            if self.rng.random() < 0.9:
                payload = _lay_out(header, payload)
            whole = {**header, "__metadata__": words} if self.rng.random() < 0.97 else header
            return handmade.compact(whole).encode(), payload
        except (ValueError, TypeError, KeyError, AttributeError, IndexError, OverflowError):
            return text, payload

    def _change_words(self, _: dict[str, Any], words: dict[str, Any]) -> None:
        rng = self.rng
        key = rng.choice((*words, *_WORDS, "format_version"))
        if rng.random() < 0.2:
            words.pop(key, None)
        else:
            words[key] = rng.choice(_WORDS) if rng.random() < 0.97 else rng.choice((None, 1, [], {}))

    def _change_tensors(self, header: dict[str, Any], _: dict[str, Any]) -> None:
        rng = self.rng
        name = rng.choice(sorted(header)) if header else ""
        what = rng.randrange(5) if header else 4
        if what == 0:
            del header[name]
        elif what == 1:
            header[rng.choice(_NAMES)] = header.pop(name)
        elif what == 2:
            header[name]["dtype"] = rng.choice(list(_ITEM_SIZES))
        elif what == 3:
            axes = rng.choice((0, 1, 1, 2, 3, 70))
            header[name]["shape"] = [rng.choice((0, 1, 1, 2, 3)) for _ in range(axes)]
        else:
            header[rng.choice(_NAMES)] = {"data_offsets": [0, 1], "dtype": "U8", "shape": [1]}

    # --- its text ------------------------------------------------------------------------------------------------------

    def _slice(self, text: bytes, most: int = 40) -> tuple[int, int]:
        start = self.rng.randrange(len(text) + 1)
        return start, min(len(text), start + self.rng.randrange(1, most))

    def _on_bytes(self, data: bytes) -> bytes:
        rng = self.rng
        start, end = self._slice(data, rng.choice((2, 8, 64)))
        kind = rng.randrange(6)
        if kind == 0 and data:  # the length prefix is what comes first
            at = rng.randrange(min(len(data), 8))
            return data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
        if kind == 1:
            return data[:start] + data[end:]
        if kind == 2:
            return data[:end] + data[start:]
        if kind == 3:
            return data[:start] + bytes(end - start) + data[end:]
        if kind == 4:
            return data[:start] + rng.randbytes(end - start) + data[end:]
        return data[:start] + bytes([data[start] ^ 1 << rng.randrange(8)]) + data[start + 1 :] if start < len(data) else data

    def insert(self, text: Text) -> Text:
        at = self.rng.randrange(len(text) + 1)
        return text[:at] + self.rng.choice(_TOKENS) + text[at:]

    def number(self, text: Text) -> Text:
        return self._replace_one(_NUMBER, text, lambda _: self.rng.choice(_EXTREMES))

    def repeat_entry(self, text: Text) -> Text:
        return self._replace_one(_ENTRY, text, lambda entry: entry + b"," + entry)

    def drop_entry(self, text: Text) -> Text:
        return self._replace_one(_ENTRY, text, lambda _: b"")

    def repeat_string(self, text: Text) -> Text:
        return self._replace_one(_STRING_FIELD, text, lambda field: field + b"," + field)

    def reorder_entries(self, text: Text) -> Text:
        return self._swap_two(_ENTRY, text)

    def reorder_fields(self, text: Text) -> Text:
        return self._swap_two(_FIELD, text)

    def reorder_strings(self, text: Text) -> Text:
        return self._swap_two(_STRING_FIELD, text)

    def nest(self, text: Text) -> Text:
        pair = self.rng.choice(((b"[", b"]"), (b"{", b"}"), (b'{"a":', b"}"), (b'"', b'"')))
        count = self.rng.choice((1, 1, 2, 50))
        return self._replace_one(_FIELD, text, lambda field: pair[0] * count + field + pair[1] * count)

    def escape(self, text: Text) -> Text:
        if not text:
            return text
        at = self.rng.randrange(len(text))
        style = self.rng.choice((b"\\u%04x", b"\\u%04X", b"\\U%04x", b"%%%02x"))
        return text[:at] + style % text[at] + text[at + 1 :]

    def _replace_one(self, pattern: re.Pattern[bytes], text: Text, by: Callable[[bytes], bytes]) -> Text:
        found = [match.span() for match in pattern.finditer(text)]
        if not found:
            return text
        start, end = self.rng.choice(found)
        return text[:start] + by(text[start:end]) + text[end:]

    def _swap_two(self, pattern: re.Pattern[bytes], text: Text) -> Text:
        found = [match.span() for match in pattern.finditer(text)]
        if len(found) < 2:
            return text
        (a, b), (c, d) = sorted(self.rng.sample(found, 2))
        return text[:a] + text[c:d] + text[b:c] + text[a:b] + text[d:]


_ON_TEXT: tuple[Callable[[Mutator, Text], Text], ...] = (
    Mutator._on_bytes,
    Mutator.insert,
    Mutator.number,
    Mutator.repeat_entry,
    Mutator.drop_entry,
    Mutator.repeat_string,
    Mutator.reorder_entries,
    Mutator.reorder_fields,
    Mutator.reorder_strings,
    Mutator.nest,
    Mutator.escape,
)


def _lay_out(header: dict[str, Any], payload: bytes) -> bytes:
    """Give the tensors the places that their dtypes and shapes ask for, and the payload as many bytes."""
    end = 0
    for name in sorted(header, key=lambda name: (-_ITEM_SIZES[header[name]["dtype"]], name)):
        size = _ITEM_SIZES[header[name]["dtype"]]
        for length in header[name]["shape"]:
            size *= length
        header[name]["data_offsets"] = [end, end + size]
        end += size
    if end > 1 << 16:
        raise OverflowError
    return (payload + bytes(end))[:end]


def redigested(text: Text, payload: bytes) -> Text:
    """The header with right digests of the tensors it speaks of, as far as it does."""
    try:
        header = json.loads(text)
        spans = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
        digests = {name: handmade.digest(payload[begin:end]) for name, (begin, end) in spans.items()}
        field = b'"digests":' + json.dumps(handmade.compact(digests)).encode()
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return text
    return _DIGESTS.sub(lambda _: field, text, count=1)
