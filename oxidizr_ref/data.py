"""From files to batches: one stream of tokens, cut into windows, read in a seeded order, ahead of time if asked.

The held-out part is the last fraction of the stream. Each part is cut into windows of ``seq_len + 1`` tokens at stride
``seq_len``, so that every token but the first is a target once; the ragged tail is dropped. An epoch is a seeded
permutation of the training windows. The one number that says how far a run has come is the cursor, the count of windows
consumed: every order is recomputed from (seed, cursor) and none is stored.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import threading
from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray

from oxidizr_ref import data_facts, parallel, rng
from oxidizr_ref.config import Config
from oxidizr_ref.data_facts import Facts
from oxidizr_ref.errors import DataError
from oxidizr_ref.tokenizers import Tokenizer, get_tokenizer

RANDOM = "random"  # the path that stands for random tokens; ./random is a file of that name
RANDOM_TOKENS = 262_144

_CHUNK_TOKENS = 4 * 2**20 // 4  # 4 MiB of u32: the unit that is hashed and scanned; part of the digest's definition
_CLOSE_SECONDS = 0.5  # a read that hangs on a dead disk must not keep the program from ending

Batch: TypeAlias = tuple[NDArray[np.int64], NDArray[np.int64]]


@dataclass(frozen=True)
class Source:
    """Tokens uint32 ``[n]`` and the name (usually the file) that error messages give them."""

    name: str
    tokens: NDArray[np.uint32]


class TokenStream:
    """The tokens of one or several sources, end to end, to be read only. Memory-mapped sources stay on disk."""

    def __init__(self, sources: Sequence[Source]) -> None:
        for source in sources:
            if source.tokens.dtype != np.uint32:
                raise TypeError(f"{source.name}: tokens must be uint32, not {source.tokens.dtype}")
        self.sources = tuple(sources)
        self._begins = list(accumulate((source.tokens.size for source in sources), initial=0))

    def __len__(self) -> int:
        return self._begins[-1]

    @property
    def name(self) -> str:
        """The sources in a few words, for messages."""
        names = [source.name for source in self.sources]
        return ", ".join(names) if len(names) <= 2 else f"{names[0]} and {len(names) - 1} more files"

    def read(self, start: int, stop: int) -> NDArray[np.uint32]:
        """Tokens ``start … stop-1``, uint32 ``[stop - start]``: a view where one source holds them all, else a copy."""
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"tokens {start} to {stop} of a stream of {len(self)}")
        pieces = []
        index = bisect_right(self._begins, start) - 1
        while index < len(self.sources) and self._begins[index] < stop:
            begin = self._begins[index]
            pieces.append(self.sources[index].tokens[max(start - begin, 0) : stop - begin])
            index += 1
        if len(pieces) == 1:
            return pieces[0]
        return np.concatenate(pieces) if pieces else np.empty(0, dtype=np.uint32)

    def facts(self) -> Facts:
        """The digest, and the largest token id (-1: no token). Reads the whole stream once.

        The digest is the SHA-256 (hex) of the SHA-256s of the stream's little-endian u32 bytes in chunks of 4 MiB. It sees
        tokens only: a text and the ``.bin`` made of it, or the same tokens in several parts, have one digest. All cores
        hash; the chunks and their order are the stream's, so the digest does not depend on the cores.
        """
        chunks = parallel.tiles(len(self), _CHUNK_TOKENS)
        digests = [b""] * len(chunks)
        largest = [-1] * len(chunks)

        def read_chunk(index: int) -> None:
            chunk = np.ascontiguousarray(self.read(*chunks[index]), dtype="<u4")
            digests[index] = hashlib.sha256(chunk.data).digest()
            largest[index] = int(np.max(chunk))

        parallel.for_each(len(chunks), read_chunk)
        return Facts(hashlib.sha256(b"".join(digests)).hexdigest(), max(largest, default=-1))

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise DataError naming the first token id that is not below ``vocab_size``. Reads the whole stream once."""
        for source, begin in zip(self.sources, self._begins, strict=False):  # _begins has the stream's end as well
            for low in range(0, source.tokens.size, _CHUNK_TOKENS):
                chunk = source.tokens[low : low + _CHUNK_TOKENS]
                if int(np.max(chunk)) >= vocab_size:
                    first = int(np.argmax(chunk >= vocab_size))
                    place = f"token id {chunk[first]} at position {begin + low + first} of the stream"
                    raise DataError(
                        f"{source.name}: {place} is not below the vocabulary size {vocab_size}; raise model.vocab_size, "
                        "or use data made with the model's own tokenizer"
                    )


def bundled_corpus() -> Path:
    """The text that comes with the package and is trained on when no data is named."""
    return Path(__file__).parent / "corpus" / "nano-start.txt"


def open_stream(
    paths: Sequence[str | Path], tokenizer_name: str, *, vocab_size: int, seed: int
) -> tuple[TokenStream, Tokenizer]:
    """Open files as one stream, in the order given, with the tokenizer that reads (or is to read) their text.

    A path ending in ``.bin`` holds raw little-endian u32 tokens and is memory-mapped; the path ``random`` stands for
    262,144 uniform random tokens below ``vocab_size``, a function of ``seed``; any other file is UTF-8 text and is
    tokenized. No path at all means the bundled corpus. ``char`` takes its vocabulary from all texts together.

    Raises DataError for a file that is missing, unreadable, empty or malformed, for an unknown tokenizer, and for
    ``char`` without any text. Token ids are not looked at: call ``check_vocabulary`` before training.
    """
    loaded = [_load(Path(path), vocab_size, seed) for path in paths or [bundled_corpus()]]
    texts = [content for _, content in loaded if isinstance(content, str)]
    if tokenizer_name == "char" and not texts:
        raise DataError(
            f"{', '.join(name for name, _ in loaded)}: holds tokens, and the char tokenizer takes its vocabulary from "
            "text; give the text itself, or use data.tokenizer: byte"
        )
    tokenizer = get_tokenizer(tokenizer_name, "".join(texts) if tokenizer_name == "char" else None)
    sources = [Source(name, tokenizer.encode(content) if isinstance(content, str) else content) for name, content in loaded]
    return TokenStream(sources), tokenizer


def _load(path: Path, vocab_size: int, seed: int) -> tuple[str, str | NDArray[np.uint32]]:
    """The name of a part of the stream, and its text or its tokens."""
    if str(path) == RANDOM:
        return RANDOM, _random_tokens(vocab_size, seed)
    try:
        if path.is_dir():
            raise DataError(f"{path}: this is a directory; name the files in it, one -d for each")
        with path.open("rb") as file:
            return str(path), _map_tokens(path, file) if path.suffix == ".bin" else _decode_text(path, file.read())
    except FileNotFoundError:
        raise _missing(path) from None
    except PermissionError:
        raise DataError(f"{path}: no permission to read this file; change its mode, or run as its owner") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); check the path and the disk") from None


def _map_tokens(path: Path, file: BinaryIO) -> NDArray[np.uint32]:
    size = os.fstat(file.fileno()).st_size
    if size == 0:
        raise DataError(f"{path}: the file is empty; give a file with at least one window of tokens")
    if size % 4:
        raise DataError(
            f"{path}: {size} bytes are no whole number of u32 tokens (4 bytes each); the file is cut short or is no "
            "token file: make it anew, or drop the ending .bin if it is text"
        )
    mapped = np.memmap(file, dtype="<u4", mode="r")
    return np.asarray(mapped)  # a plain array over the same pages: slicing it is much cheaper


def _decode_text(path: Path, octets: bytes) -> str:
    if not octets:
        raise DataError(f"{path}: the file is empty; give a file with at least one window of text")
    try:
        return octets.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: the byte 0x{octets[error.start]:02x} at offset {error.start} is not UTF-8; save the text as "
            "UTF-8, or name the file .bin if it holds u32 tokens"
        ) from None


def _random_tokens(vocab_size: int, seed: int) -> NDArray[np.uint32]:
    """Uniform ids below ``vocab_size``: the high 32 bits of each word, scaled (Lemire 2019, without the rejection)."""
    word = rng.words(seed, "data", "random", 0, RANDOM_TOKENS)
    return (((word >> 32) * np.uint64(vocab_size)) >> 32).astype(np.uint32)


def _missing(path: Path) -> DataError:
    """The error for a path that is not there, with what is there under a similar name."""
    try:
        names = sorted({entry.name for entry in path.parent.iterdir()} - {path.name})  # itself: a dangling link
    except OSError:
        return DataError(f"{path}: no such file, and {path.parent} cannot be listed; check the path")
    near = difflib.get_close_matches(path.name, names)
    return DataError(f"{path}: no such file; {'did you mean ' + ' or '.join(near) + '?' if near else 'check the path'}")


class Windows:
    """The windows of a stream, and the order in which training reads them.

    ``seq_len`` in tokens; ``eval_fraction`` in [0, 1), the part of the stream held out at its end; without ``shuffle``
    every epoch reads the windows in stream order. Raises DataError if a part is shorter than one window.
    """

    def __init__(
        self, stream: TokenStream, seq_len: int, eval_fraction: float = 0.0, seed: int = 0, shuffle: bool = True
    ) -> None:
        if seq_len < 1 or not 0.0 <= eval_fraction < 1.0:
            raise ValueError(f"seq_len {seq_len} must be at least 1 and eval_fraction {eval_fraction} in [0, 1)")
        self._stream = stream
        self._seed = seed
        self._shuffle = shuffle
        self.seq_len = seq_len
        held_out = int(len(stream) * eval_fraction)
        self._split = len(stream) - held_out
        self.train_windows = max(self._split - 1, 0) // seq_len
        self.eval_windows = max(held_out - 1, 0) // seq_len
        # (epoch, order), replaced as a whole: a thread that reads it sees a matching pair, whatever another one does.
        self._current: tuple[int, NDArray[np.int64]] = (-1, np.empty(0, dtype=np.int64))
        if not self.train_windows:
            raise self._too_short("training part", self._split, "a shorter --seq-len or more data")
        if eval_fraction and not self.eval_windows:
            raise self._too_short("held-out part", held_out, "a shorter --seq-len or another trainer.eval_fraction")

    def _too_short(self, part: str, tokens: int, advice: str) -> DataError:
        return DataError(
            f"{self._stream.name}: the {part} has {tokens} tokens, but one window needs {self.seq_len + 1} "
            f"(--seq-len, and 1 for the last target); use {advice}"
        )

    def epoch(self, cursor: int) -> float:
        """How many epochs ``cursor`` consumed windows are."""
        return cursor / self.train_windows

    def window_index(self, cursor: int) -> int:
        """Which training window is consumed when ``cursor`` windows have been consumed before it."""
        if cursor < 0:
            raise IndexError(f"the cursor {cursor} is negative")
        epoch, position = divmod(cursor, self.train_windows)
        return int(self._order(epoch)[position]) if self._shuffle else position

    def _order(self, epoch: int) -> NDArray[np.int64]:
        cached, order = self._current
        if cached != epoch:
            order = rng.permutation(self._seed, "shuffle", epoch, self.train_windows)
            self._current = (epoch, order)
        return order

    def batch(self, cursor: int, batch_size: int) -> Batch:
        """Tokens and targets, int64 ``[batch_size, seq_len]``, of the windows from ``cursor`` on, across epochs."""
        indices = [self.window_index(cursor + i) for i in range(batch_size)]
        return self._gather([index * self.seq_len for index in indices])

    def eval_batch(self, index: int, batch_size: int) -> Batch:
        """Held-out batch ``index`` in stream order: tokens and targets, int64 ``[≤ batch_size, seq_len]``.

        The last batch has the windows that are left; IndexError beyond it.
        """
        windows = range(self.eval_windows)[index * batch_size : (index + 1) * batch_size]
        if index < 0 or not windows:
            raise IndexError(f"held-out batch {index} of {-(-self.eval_windows // batch_size)}")
        return self._gather([self._split + window * self.seq_len for window in windows])

    def _gather(self, begins: Sequence[int]) -> Batch:
        tokens = np.empty((len(begins), self.seq_len), dtype=np.int64)
        targets = np.empty_like(tokens)
        for row, begin in enumerate(begins):
            window = self._stream.read(begin, begin + self.seq_len + 1)
            tokens[row] = window[:-1]
            targets[row] = window[1:]
        return tokens, targets


class BatchLoader:
    """Iterates over ``windows.batch`` from ``cursor`` on, without end; with ``prefetch`` > 0 a thread reads ahead.

    What is seen is the same for every ``prefetch``. ``cursor`` counts the windows handed out, not those read ahead. An
    error met while reading ahead is raised when its batch is asked for. Close it, or use it in a ``with`` statement.
    """

    def __init__(self, windows: Windows, cursor: int, batch_size: int, prefetch: int = 0) -> None:
        if batch_size < 1 or prefetch < 0:
            raise ValueError(f"batch_size {batch_size} must be at least 1 and prefetch {prefetch} at least 0")
        self.cursor = cursor
        self._windows = windows
        self._batch_size = batch_size
        self._prefetch = prefetch
        self._ready: deque[Batch | BaseException] = deque()
        self._changed = threading.Condition()  # guards _ready and _closed
        self._closed = False
        self._thread = threading.Thread(target=self._read_ahead, args=(cursor,), name="prefetch", daemon=True)
        if prefetch:
            self._thread.start()

    def _read_ahead(self, cursor: int) -> None:
        while True:
            item: Batch | BaseException
            try:
                item = self._windows.batch(cursor, self._batch_size)
            except BaseException as error:  # whatever it is, it belongs to the consumer
                item = error
            with self._changed:
                self._changed.wait_for(lambda: self._closed or len(self._ready) < self._prefetch)
                if self._closed:
                    return
                self._ready.append(item)
                self._changed.notify_all()
            if isinstance(item, BaseException):
                return
            cursor += self._batch_size

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._ready or not self._prefetch)
            if self._closed:
                raise RuntimeError("this BatchLoader is closed")
            item = self._ready[0] if self._prefetch else self._windows.batch(self.cursor, self._batch_size)
            if isinstance(item, BaseException):
                raise item  # it stays in front: asking again gets it again, as without prefetch
            if self._prefetch:
                self._ready.popleft()
                self._changed.notify_all()
            self.cursor += self._batch_size
            return item

    def close(self) -> None:
        """Stop reading ahead and drop what was read; may be called again. A full queue does not hold it up."""
        with self._changed:
            self._closed = True
            self._ready.clear()
            self._changed.notify_all()
        if self._prefetch:
            self._thread.join(_CLOSE_SECONDS)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


# --- all of it --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainingData:
    """What a run reads: the tokens, their digest, the tokenizer that made them, and the windows they are cut into."""

    stream: TokenStream
    digest: str
    tokenizer: Tokenizer
    windows: Windows


def open_data(config: Config) -> TrainingData:
    """The data that a config names, checked against it. Raises DataError for what cannot be trained on."""
    m, t = config.model, config.trainer
    paths: list[str | Path] = ["random"] if config.data.is_random else [*config.data_paths()]
    stream, tokenizer = open_stream(paths, config.data.tokenizer, vocab_size=m.vocab_size, seed=t.seed)
    if paths and all(Path(path).suffix == ".bin" for path in paths):  # large, and read here only to be known
        facts = data_facts.remembered([Path(path) for path in paths], stream.facts)
    else:
        facts = stream.facts()
    if facts.largest >= m.vocab_size:
        stream.check_vocabulary(m.vocab_size)
    return TrainingData(stream, facts.digest, tokenizer, Windows(stream, m.max_seq_len, t.eval_fraction, t.seed, t.shuffle))
