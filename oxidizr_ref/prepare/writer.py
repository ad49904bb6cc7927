"""NAME.bin and what stands beside it, written as they are made, and given their names when all of them are whole.

Everything goes through small buffers into temporary files beside the final ones, so that memory does not grow with the data
and nobody ever sees a file that is half written.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oxidizr_ref.checkpoint import disk
from oxidizr_ref.errors import OxidizrError
from oxidizr_ref.prepare.statistics import Statistics
from oxidizr_ref.token_files import documents_path, meta_path, responses_path

#: Tokens that are hashed and written at a time: 4 MiB, as the digest of a stream is defined (`data.TokenStream.facts`).
CHUNK = 1 << 20
_NUMBERS = 1 << 13  # positions gathered before they are appended


def family(bin_path: Path) -> list[Path]:
    """A .bin and the files beside it, there or not; the .bin last."""
    return [documents_path(bin_path), responses_path(bin_path), meta_path(bin_path), bin_path]


class NumberFile:
    """A file of numbers under its temporary name: appended to, hashed and written in chunks of so many numbers."""

    def __init__(self, path: Path, dtype: str, chunk: int) -> None:
        self.temporary = disk.temporary_of(path)
        self.count = 0
        self._dtype, self._chunk = dtype, chunk
        self._waiting: list[NDArray[Any]] = []
        self._written = 0
        self._sha = hashlib.sha256()
        self._descriptor: int | None = disk.create(self.temporary)

    def append(self, numbers: NDArray[Any]) -> None:
        """Add numbers ``[n]`` at the end."""
        self._waiting.append(numbers)
        self.count += numbers.size
        if self.count - self._written >= self._chunk:
            self._write(self._chunk)

    def _write(self, least: int) -> None:
        """Write whole chunks, and a last one that has at least so many numbers."""
        numbers = np.concatenate(self._waiting or [np.empty(0)]).astype(self._dtype, copy=False)
        assert self._descriptor is not None
        while numbers.size >= least:
            chunk, numbers = numbers[: self._chunk], numbers[self._chunk :]
            self._take(chunk)
            disk.write_at(self._descriptor, chunk.data.cast("B"), self._written * chunk.itemsize)
            self._written += chunk.size
        self._waiting = [numbers.copy()]

    def _take(self, chunk: NDArray[Any]) -> None:
        self._sha.update(chunk.data)

    def finish(self) -> str:
        """Bring everything to the disk and close. Returns the digest (SHA-256, hex)."""
        self._write(1)
        assert self._descriptor is not None
        disk.flush(self._descriptor)
        self.close()
        return self._sha.hexdigest()

    def close(self) -> None:
        """Let go of the file, finished or not."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            disk.close(descriptor)


class _TokenFile(NumberFile):
    """Tokens: their digest is that of their chunks' digests, and their largest id is known."""

    largest = -1
    statistics: Statistics | None = None

    def _take(self, chunk: NDArray[Any]) -> None:
        self._sha.update(hashlib.sha256(chunk.data).digest())
        self.largest = max(self.largest, int(np.max(chunk)))
        if self.statistics is not None:
            self.statistics.take(chunk)


class TokenWriter:
    """One NAME.bin with its documents and responses.

    end_of_text: the id written behind every document; None: nothing is. statistics: told of everything that is written.
    """

    def __init__(self, path: Path, end_of_text: int | None, statistics: Statistics | None = None) -> None:
        self.path = path
        self.prompted = False  # whether some token is to be read only
        self._end = np.array([] if end_of_text is None else [end_of_text], dtype=np.uint32)
        self._statistics = statistics
        self._tokens = _TokenFile(path, "<u4", CHUNK)
        self._tokens.statistics = statistics
        self._documents = NumberFile(documents_path(path), "<u8", _NUMBERS)
        self._responses = NumberFile(responses_path(path), "<u8", _NUMBERS)
        self._begins: list[int] = []
        self._spans: list[int] = []  # begin, end, begin, end …
        self._opened: int | None = None  # where the response that is being written begins
        self._begin = 0  # of the document that is being written

    @property
    def tokens(self) -> int:
        return self._tokens.count

    @property
    def documents(self) -> int:
        return self._documents.count + len(self._begins)

    @property
    def largest(self) -> int:
        """The largest id; right once `finish` was called."""
        return self._tokens.largest

    def add(self, ids: NDArray[np.uint32], response: bool) -> None:
        """The next tokens of the document."""
        if not response:
            self.prompted = True
            if ids.size:
                self._close_response(self._tokens.count + 1)  # the token behind a response is to be learnt, too
        elif self._opened is None:
            self._opened = self._tokens.count
        self._tokens.append(ids)

    def end_document(self) -> None:
        """The document is over. One without any token is none."""
        length = self._tokens.count - self._begin
        if length:
            self._tokens.append(self._end)
            # As model input a document begins with the end of the one before (`token_files`).
            self._begins.append(max(self._begin - self._end.size, 0))
            if self._statistics is not None:
                self._statistics.take_document(length)
        self._begin = self._tokens.count
        self._close_response(self._begin)
        if len(self._begins) >= _NUMBERS or len(self._spans) >= _NUMBERS:
            self._flush()

    def _close_response(self, end: int) -> None:
        begin, self._opened = self._opened, None
        if begin is None or begin == end:
            return
        if self._spans and self._spans[-1] == begin:
            self._spans[-1] = end
        else:
            self._spans += [begin, end]

    def _flush(self, all_of_it: bool = False) -> None:
        """The last span stays: it may grow."""
        spans, self._spans = (self._spans, []) if all_of_it else (self._spans[:-2], self._spans[-2:])
        self._responses.append(np.array(spans, dtype=np.uint64))
        self._documents.append(np.array(self._begins, dtype=np.uint64))
        self._begins = []

    def copy(self, tokens: NDArray[np.uint32], begins: NDArray[np.uint64], spans: NDArray[np.uint64] | None) -> None:
        """Instead of documents: tokens ``[n]`` as they are, where documents begin, and spans ``[m,2]`` of responses."""
        for begin in range(0, tokens.size, CHUNK):
            self._tokens.append(tokens[begin : begin + CHUNK])
        self._documents.append(begins)
        self.prompted = spans is not None
        if spans is not None:
            self._responses.append(spans.reshape(-1))

    def finish(self) -> dict[str, str | None]:
        """Bring all to the disk, under temporary names. Returns the digests, as `token_files.Meta` calls them."""
        self._flush(all_of_it=True)
        digests = {
            "digest": self._tokens.finish(),
            "documents_digest": self._documents.finish(),
            "responses_digest": self._responses.finish(),
        }
        if not self.prompted:
            disk.remove(self._responses.temporary)
            return {**digests, "responses_digest": None}
        return {**digests}

    def close(self) -> None:
        """Let go of the files, finished or not."""
        for file in (self._tokens, self._documents, self._responses):
            file.close()


def write_whole(path: Path, data: bytes) -> None:
    """A small file, brought to the disk under its temporary name."""
    descriptor = disk.create(disk.temporary_of(path))
    try:
        disk.write_at(descriptor, data, 0)
        disk.flush(descriptor)
    finally:
        disk.close(descriptor)


def publish(made: Sequence[Path], obsolete: Iterable[Path]) -> None:
    """Give the files made under temporary names their own names; those of an earlier run (``obsolete``) go before.

    A .bin comes last, and goes first: where there is one, everything beside it belongs to it.
    """
    directory = made[0].parent
    for path in sorted(obsolete, key=_is_bin, reverse=True):
        disk.remove(path)
    disk.sync_directory(directory)
    for bins in (False, True):
        for path in made:
            if _is_bin(path) == bins:
                disk.rename(disk.temporary_of(path), path)
        disk.sync_directory(directory)


def _is_bin(path: Path) -> bool:
    return path.suffix == ".bin"


def remove_temporaries(paths: Iterable[Path]) -> None:
    """Remove what a run left that failed or was killed."""
    for path in paths:
        with suppress(OSError):
            disk.remove(disk.temporary_of(path))


def not_written(path: Path, error: OSError) -> OxidizrError:
    """What to say when the disk refuses."""
    advice = "free some space, or write elsewhere with -o; no file has a name of its own yet"
    return OxidizrError(f"{path}: cannot be written ({error.strerror or error}); {advice}")
