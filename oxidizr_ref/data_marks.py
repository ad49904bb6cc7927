"""Where documents begin in a token stream, and which of its tokens are responses: what a headerless ``.bin`` cannot say.

`prepare` writes both beside the tokens (`token_files.py`). Texts that are read directly show their documents by the
end-of-text token. That token closes a document as a target and, as an input, opens the next one: so a document begins there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from oxidizr_ref.errors import DataError
from oxidizr_ref.token_files import open_documents, open_responses, read_meta

#: The target where nothing is to be learned (PyTorch's ``ignore_index``).
IGNORED = -100

Finder: TypeAlias = Callable[[], "NDArray[np.uint64] | None"]

_REMAKE = "make the files anew with `oxidizr-ref prepare`"
_UNKNOWN = {
    "documents": "where documents begin is not known (data.document_boundaries: reset); make the file with "
    "`oxidizr-ref prepare`",
    "responses": "which tokens are responses is not known (data.loss_on: responses); make the file with "
    "`oxidizr-ref prepare` from JSONL with prompts or messages",
}


class Marks:
    """Of one source: uint64 ``[n]`` positions where documents begin, and uint64 ``[n,2]`` spans of responses, ascending.

    Given as what finds them, which is called when they are asked for; None from it, or no function: not known. ``name`` is
    the source's, for messages.
    """

    def __init__(self, name: str = "", documents: Finder | None = None, responses: Finder | None = None) -> None:
        self.name = name
        self._finders = {"documents": documents, "responses": responses}
        self._found: dict[str, NDArray[np.uint64]] = {}

    def begins(self, start: int, stop: int) -> NDArray[np.bool_]:
        """At which of the tokens ``start … stop-1`` a document begins. Raises DataError when that is not known."""
        documents = self._known("documents")
        first, last = np.searchsorted(documents, np.array([start, stop], dtype=np.uint64))
        marked = np.zeros(stop - start, dtype=np.bool_)
        marked[documents[first:last].astype(np.int64) - start] = True
        return marked

    def learned(self, start: int, stop: int) -> NDArray[np.bool_]:
        """Which of the tokens ``start … stop-1`` belong to responses. Raises DataError when that is not known."""
        spans = self._known("responses")
        ends = spans.reshape(-1)  # begin, end, begin, end, …: ascending
        first = np.searchsorted(ends, np.uint64(start), side="right") // 2
        last = (np.searchsorted(ends, np.uint64(stop)) + 1) // 2
        marked = np.zeros(stop - start, dtype=np.bool_)
        for begin, end in spans[first:last].tolist():
            marked[max(begin - start, 0) : end - start] = True
        return marked

    def learns(self, start: int, stop: int) -> bool:
        """Whether any of the tokens ``start … stop-1`` belongs to a response."""
        spans = self._known("responses").reshape(-1)
        first = np.searchsorted(spans, np.uint64(start), side="right")
        return bool(first % 2 or (first < spans.size and spans[first] < stop))

    def octets(self, what: str) -> bytes:
        """The little-endian bytes of ``documents`` or ``responses``. Raises DataError when they are not known."""
        return np.ascontiguousarray(self._known(what), dtype="<u8").tobytes()

    def _known(self, what: str) -> NDArray[np.uint64]:
        if what not in self._found:
            finder = self._finders[what]
            found = None if finder is None else finder()
            if found is None:
                raise DataError(f"{self.name}: {_UNKNOWN[what]}")
            self._found[what] = found
        return self._found[what]


def marks_of_file(path: Path) -> Marks:
    """What the files beside a ``.bin`` say. What is asked of it raises DataError when they are damaged."""

    def finder(what: str, open_: Callable[[Path], NDArray[np.uint64] | None]) -> Finder:
        def found() -> NDArray[np.uint64] | None:
            marks, meta = open_(path), read_meta(path)
            if marks is not None and meta is not None:
                digest = hashlib.sha256(np.ascontiguousarray(marks, dtype="<u8").data).hexdigest()
                if digest != getattr(meta, f"{what}_digest"):
                    raise DataError(f"{path}: its {what} are not those that {path.stem}.meta.json tells of; {_REMAKE}")
            return marks

        return found

    return Marks(str(path), finder("documents", open_documents), finder("responses", open_responses))


def marks_of_text(name: str, tokens: NDArray[np.uint32], end_of_text: int | None) -> Marks:
    """The documents of a tokenized text, by its end-of-text tokens; one at the very end begins none."""

    def documents() -> NDArray[np.uint64]:
        ends = np.empty(0, np.int64) if end_of_text is None else np.flatnonzero(tokens[:-1] == end_of_text)
        return np.concatenate([[0], ends[ends > 0]]).astype(np.uint64)

    return Marks(name, documents)


def marks_of_one_document(name: str, tokens: int) -> Marks:
    """A single document, all of it to be learned."""
    return Marks(name, lambda: np.zeros(1, dtype=np.uint64), lambda: np.array([[0, tokens]], dtype=np.uint64))
