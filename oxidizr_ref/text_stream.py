"""Text as it is generated: tokens come one by one, characters when they are whole, and nothing beyond a stop text."""

from __future__ import annotations

from collections.abc import Sequence

from oxidizr_ref.tokenizers import Tokenizer

_BROKEN = "\N{REPLACEMENT CHARACTER}"
_LONGEST_CHARACTER = 4  # bytes, in UTF-8: longer broken ends will not become whole
_CONTEXT = 8  # tokens of the prompt that the first new one is decoded with


class TextStream:
    """The text of one sequence of tokens, given out in pieces that together are what decoding all of it gives.

    Tokens may end inside a character, and a stop text may be spread over several: what could still become either is held
    back. ``stopped``: a stop text was met; it and what follows are left out. prompt: the tokens before, which the text
    does not repeat (some tokenizers decode a space only between two words).
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = (), prompt: Sequence[int] = ()) -> None:
        self.text, self.stopped = "", False
        self._tokenizer, self._stops = tokenizer, [stop for stop in stops if stop]
        self._ids = [int(token) for token in prompt[-_CONTEXT:]]
        # Ids from _context on are decoded together; those before _given were given out.
        self._context, self._given = 0, len(self._ids)
        self._held = ""

    def push(self, token: int) -> str:
        """The characters that are certain now that this token has come."""
        if self.stopped:
            return ""
        self._ids.append(token)
        piece = self._new_text()
        if piece.endswith(_BROKEN) and len(self._ids) - self._given < _LONGEST_CHARACTER:
            return ""
        self._context, self._given = self._given, len(self._ids)
        return self._give(self._held + piece, end=False)

    def close(self) -> str:
        """What was held back, at the end of the sequence."""
        piece = "" if self.stopped else self._new_text()
        self._given = len(self._ids)
        return self._give(self._held + piece, end=True)

    def _new_text(self) -> str:
        before = self._tokenizer.decode(self._ids[self._context : self._given])
        return self._tokenizer.decode(self._ids[self._context :])[len(before) :]

    def _give(self, text: str, end: bool) -> str:
        met = [place for place in (text.find(stop) for stop in self._stops) if place >= 0]
        if met:
            self.stopped, given, self._held = True, text[: min(met)], ""
        else:
            certain = len(text) if end else len(text) - self._possible_stop(text)
            given, self._held = text[:certain], text[certain:]
        self.text += given
        return given

    def _possible_stop(self, text: str) -> int:
        """How many characters at the end of ``text`` may begin a stop text."""
        return max(
            (size for stop in self._stops for size in range(min(len(stop), len(text)) + 1) if text.endswith(stop[:size])),
            default=0,
        )
