"""From blocks of bytes to documents, each in pieces that are short enough to be encoded on their own.

A document of plain text is cut where the vocabularies in use cut as well (behind a line end that stands between two other
signs), so that the tokens of its pieces are the tokens of the whole. Where a piece ends depends on the document alone, not
on how its bytes arrived.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from oxidizr_ref.chat import ROLES, Message, chat_parts
from oxidizr_ref.errors import DataError
from oxidizr_ref.prepare.inputs import Source

#: Characters of a piece, at most (but for the contents of chat messages, which are never cut).
PIECE = 1 << 18

_TEXT, _ANSWER, _CHAT = frozenset({"text"}), frozenset({"prompt", "response"}), frozenset({"messages"})
_LAYOUTS_SHOWN = '{"text"}, {"prompt", "response"} or {"messages": [{"role", "content"}]}'
_NEAR = 1 << 12  # characters searched first for a place between two words
_BETWEEN_WORDS = re.compile("[A-Za-z](?= [A-Za-z])")
_SURROGATES = re.compile("[\ud800-\udfff]")
_MOST_BAD, _FEW_BAD = 0.3, 3  # of the characters of a block; more than both, and it is no text in this encoding
_BOM = "\ufeff"
_from_json = json.JSONDecoder().decode  # `json.loads` asks anew for every line what kind of decoder is wanted


class Piece(NamedTuple):
    """A part of a document. response: its tokens are to be learnt (prompts are read only)."""

    text: str
    response: bool
    first: bool
    last: bool


@dataclass
class Reader:
    """Cuts sources into documents and keeps count of what it met.

    ends: the texts that stand between documents. special_tokens: what may not be cut. replace: put U+FFFD where there is
    no Unicode, instead of refusing the source. left_out: keys of JSON lines that were not used.
    """

    ends: tuple[str, ...]
    special_tokens: Iterable[str]
    replace: bool = False
    replaced: int = 0
    ends_seen: bool = False
    left_out: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._ends = re.compile("|".join(map(re.escape, self.ends)))
        self._longest_end = max(map(len, self.ends))
        #: A cut looks at this many characters.
        self._enough = PIECE + 1 + max(map(len, self.special_tokens), default=0)

    def documents(self, source: Source, blocks: Iterable[bytes], jsonl: bool) -> Iterator[Piece]:
        """The documents of a source in its order, in pieces. Documents of white space alone are left out.

        Raises DataError naming the source, and the line or offset, for what is no UTF-8 or no document.
        """
        texts = self._decoded(source, blocks)
        return self._of_lines(source, texts) if jsonl else self._of_text(texts)

    # --- characters

    def _decoded(self, source: Source, blocks: Iterable[bytes]) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8")("replace" if self.replace else "strict")
        offset, line, begun = 0, 1, False
        for block in _and_the_end(blocks):
            if (at := block.find(b"\0")) >= 0:
                advice = "it looks binary, or is UTF-16; give text in UTF-8"
                raise DataError(f"{source.name}: has a NUL byte at offset {offset + at}; {advice}")
            pending = decoder.getstate()[0]
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                raise _not_utf8(source, pending + block, offset - len(pending), line, error) from None
            if self.replace and "\ufffd" in text:
                octets = (pending + block).removesuffix(decoder.getstate()[0])
                bad = text.count("\ufffd") - octets.count("\ufffd".encode())
                self.replaced += bad
                if bad > _FEW_BAD + _MOST_BAD * len(text):
                    raise _looks_binary(source)
            if not begun:  # the first block may be as short as half a character
                begun, text = bool(text), text.removeprefix(_BOM)
            offset += len(block)
            line += text.count("\n")
            yield text

    # --- documents of text

    def _of_text(self, texts: Iterable[str]) -> Iterator[Piece]:
        rest, first = "", True
        for text in texts:
            *whole, rest = self._ends.split(rest + text)
            self.ends_seen |= bool(whole)
            for document in whole:
                yield from self._last_pieces(document, first)
                first = True
            # What may be the beginning of an end is no reason to cut: where a piece ends depends on the document alone.
            while len(rest) >= self._enough + self._longest_end:
                at = self._place_to_cut(rest)
                yield Piece(rest[:at], True, first, False)
                rest, first = rest[at:], False
        yield from self._last_pieces(rest, first)

    def _last_pieces(self, rest: str, first: bool) -> Iterator[Piece]:
        if first and (not rest or rest.isspace()):
            return
        while len(rest) >= self._enough:
            at = self._place_to_cut(rest)
            yield Piece(rest[:at], True, first, False)
            rest, first = rest[at:], False
        yield Piece(rest, True, first, True)

    def _place_to_cut(self, text: str) -> int:
        """Behind the last line end within `PIECE` that stands between two signs; else between two words, else anywhere.

        The sign behind is no ``/``: o200k_base has tokens such as ``;\\n//``.
        """
        at = text.rfind("\n", 1, PIECE)
        while at > 0:
            if not text[at - 1].isspace() and not text[at + 1].isspace() and text[at + 1] != "/":
                return at + 1
            at = text.rfind("\n", 1, at)
        for begin in (PIECE - _NEAR, 0):
            if places := [match.end() for match in _BETWEEN_WORDS.finditer(text, begin, PIECE)]:
                return places[-1]
        at = PIECE
        for token in self.special_tokens:
            within = text.find(token, at - len(token) + 1, at + len(token) - 1)
            at = within if within >= 0 else at
        return at

    # --- documents a line

    def _of_lines(self, source: Source, texts: Iterable[str]) -> Iterator[Piece]:
        for number, line in enumerate(_lines(texts), 1):
            if line and not line.isspace():
                try:
                    yield from self._of_line(line)
                except DataError as error:
                    raise DataError(f"{source.name}, line {number}: {error}") from None

    def _of_line(self, line: str) -> Iterable[Piece]:
        try:
            entry = _from_json(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"is no JSON ({error}); mend or remove the line") from None
        if not isinstance(entry, dict):
            raise DataError(f"is no object; a document is {_LAYOUTS_SHOWN}")
        is_text, is_chat = "text" in entry, "messages" in entry
        is_answer = "prompt" in entry and "response" in entry
        if is_text + is_chat + is_answer != 1:
            raise DataError(f"has the keys {', '.join(map(repr, entry))}; a document is {_LAYOUTS_SHOWN}")
        layout = _ANSWER if is_answer else _CHAT if is_chat else _TEXT
        if len(entry) > len(layout):
            self.left_out.update(entry.keys() - layout)
        if is_text:
            return self._of_string(self._string(line, entry, "text"))
        if is_chat:
            return self._of_messages([*self._messages(line, entry["messages"])])
        given = [("user", "prompt"), ("assistant", "response")]
        return self._of_messages([Message(role, self._string(line, entry, key)) for role, key in given])

    def _of_string(self, text: str) -> Iterable[Piece]:
        if len(text) >= self._enough or self._ends.search(text):
            return self._of_text([text])
        # As `_of_text` would; but most lines are short, and then what a generator costs is much of what a line costs.
        return () if not text or text.isspace() else (Piece(text, True, True, True),)

    def _of_messages(self, messages: list[Message]) -> Iterable[Piece]:
        last = messages[-1]
        content = self._without_end(last.content)
        self.ends_seen |= content != last.content
        parts = chat_parts([*messages[:-1], last._replace(content=content)])
        return [Piece(text, response, i == 0, i == len(parts) - 1) for i, (text, response) in enumerate(parts)]

    def _messages(self, line: str, messages: Any) -> Iterator[Message]:
        if not isinstance(messages, list) or not messages:
            raise DataError(f"messages is no list, or is empty; a document is {_LAYOUTS_SHOWN}")
        for message in messages:
            if not isinstance(message, dict) or message.get("role") not in ROLES:
                role = repr(message.get("role")) if isinstance(message, dict) else "none"
                raise DataError(f"a message has the role {role}; there are {', '.join(ROLES)}")
            self.left_out.update(f"messages.{key}" for key in message.keys() - {"role", "content"})
            yield Message(message["role"], self._string(line, message, "content"))

    def _string(self, line: str, entry: Mapping[str, Any], key: str) -> str:
        text = entry.get(key)
        if not isinstance(text, str):
            raise DataError(f"{key} is {'no string' if key in entry else 'missing'}; a document is {_LAYOUTS_SHOWN}")
        if "\\u" in line:  # only escapes can make what is no Unicode
            cleaned, bad = _SURROGATES.subn("\ufffd", text)
            if bad and not self.replace:
                raise DataError(f"{key} has half a surrogate pair; mend the line, or give --errors replace")
            self.replaced += bad
            return cleaned
        return text

    def _without_end(self, text: str) -> str:
        for end in self.ends:
            text = text.removesuffix(end)
        return text


def _and_the_end(blocks: Iterable[bytes]) -> Iterator[bytes]:
    yield from blocks
    yield b""


def _lines(texts: Iterable[str]) -> Iterator[str]:
    begun = list[str]()  # parts of a line, which may be long: put together once
    for text in texts:
        first, *others = text.split("\n")
        begun.append(first)
        if others:
            yield "".join(begun)
            yield from others[:-1]
            begun = [others[-1]]
    yield "".join(begun)


def _not_utf8(source: Source, octets: bytes, offset: int, line: int, error: UnicodeDecodeError) -> DataError:
    text = octets.decode(errors="replace")
    if text.count("\ufffd") > _FEW_BAD + _MOST_BAD * len(text):
        return _looks_binary(source)
    place = f"offset {offset + error.start} (line {line + octets[: error.start].count(10)})"
    advice = "save the text as UTF-8, or give --errors replace"
    return DataError(f"{source.name}: the byte 0x{octets[error.start]:02x} at {place} is not UTF-8; {advice}")


def _looks_binary(source: Source) -> DataError:
    return DataError(
        f"{source.name}: looks binary, or is text in another encoding: most of it is not UTF-8; convert it to UTF-8 first"
    )
