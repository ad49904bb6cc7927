"""Text as it is generated: tokens come one by one, characters when they are whole, and nothing beyond a stop text."""

from __future__ import annotations

from collections.abc import Sequence

from oxidizr_ref.tokenizers import Tokenizer

_BROKEN = "\N{REPLACEMENT CHARACTER}"
_LONGEST_CHARACTER = 4  # bytes, in UTF-8: of a broken end, fewer signs than these can still become a character
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
        # Ids from _context on are decoded together. The text of those before _whole was given out, and behind it so many
        # characters as _beyond says.
        self._context, self._whole, self._beyond = 0, len(self._ids), 0
        self._held = ""

    def push(self, token: int) -> str:
        """The characters that are certain now that this token has come."""
        if self.stopped:
            return ""
        self._ids.append(token)
        return self._give(self._held + self._new_text(end=False), end=False)

    def close(self) -> str:
        """What was held back, at the end of the sequence."""
        piece = "" if self.stopped else self._new_text(end=True)
        return self._give(self._held + piece, end=True)

    def _new_text(self, end: bool) -> str:
        """What is certain now, but for stop texts: all of it where it ends with a whole character."""
        before = self._tokenizer.decode(self._ids[self._context : self._whole])
        text = self._tokenizer.decode(self._ids[self._context :])[len(before) :]
        broken = 0 if end else len(text) - len(text.rstrip(_BROKEN))
        if broken and len(self._ids) - self._whole < _LONGEST_CHARACTER:
            return ""
        certain = len(text) - min(broken, _LONGEST_CHARACTER - 1)
        piece = text[self._beyond : certain]
        self._beyond = max(self._beyond, certain)
        if not broken:
            self._context, self._whole, self._beyond = self._whole, len(self._ids), 0
        return piece

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
