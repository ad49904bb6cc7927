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
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from oxidizr_ref import data_facts, parallel, rng
from oxidizr_ref.config import Config, DataConfig
from oxidizr_ref.data_facts import Facts
from oxidizr_ref.data_marks import IGNORED, Marks, marks_of_file, marks_of_one_document, marks_of_text
from oxidizr_ref.errors import DataError
from oxidizr_ref.token_files import read_meta
from oxidizr_ref.tokenizers import Tokenizer, get_tokenizer, tokenizer_from_state

RANDOM = "random"  # the path that stands for random tokens; ./random is a file of that name
RANDOM_TOKENS = 262_144

_CHUNK_TOKENS = 4 * 2**20 // 4  # 4 MiB of u32: the unit that is hashed and scanned; part of the digest's definition


class Batch(NamedTuple):
    """Windows: tokens and targets, int64 ``[B,T]``; bool ``[B,T]`` where documents begin, None when nobody asks."""

    tokens: NDArray[np.int64]
    targets: NDArray[np.int64]
    begins: NDArray[np.bool_] | None = None


@dataclass(frozen=True)
class Source:
    """Tokens uint32 ``[n]`` and the name (usually the file) that error messages give them; what is marked in them."""

    name: str
    tokens: NDArray[np.uint32]
    marks: Marks = field(default_factory=Marks, compare=False)


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
        pieces = [source.tokens[low:high] for source, low, high in self._pieces(start, stop)]
        if len(pieces) == 1:
            return pieces[0]
        return np.concatenate(pieces) if pieces else np.empty(0, dtype=np.uint32)

    def begins(self, start: int, stop: int) -> NDArray[np.bool_]:
        """At which of the tokens ``start … stop-1`` a document begins, bool ``[stop - start]``."""
        return np.concatenate([source.marks.begins(low, high) for source, low, high in self._pieces(start, stop)])

    def learned(self, start: int, stop: int) -> NDArray[np.bool_]:
        """Which of the tokens ``start … stop-1`` belong to responses, bool ``[stop - start]``."""
        return np.concatenate([source.marks.learned(low, high) for source, low, high in self._pieces(start, stop)])

    def learns(self, start: int, stop: int) -> bool:
        """Whether any of the tokens ``start … stop-1`` belongs to a response."""
        return any(source.marks.learns(low, high) for source, low, high in self._pieces(start, stop))

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[Source, int, int]]:
        """The sources of the tokens ``start … stop-1``, and from where to where each has them."""
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"tokens {start} to {stop} of a stream of {len(self)}")
        index = bisect_right(self._begins, start) - 1
        while index < len(self.sources) and self._begins[index] < stop:
            source, begin = self.sources[index], self._begins[index]
            yield source, max(start - begin, 0), min(stop - begin, source.tokens.size)
            index += 1

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

    def check_vocabulary(self, vocab_size: int, needed: int | None = None) -> None:
        """Raise DataError naming the first token id that is not below ``vocab_size``. Reads the whole stream once.

        needed: a vocabulary that would be large enough, for the message.
        """
        for source, begin in zip(self.sources, self._begins, strict=False):  # _begins has the stream's end as well
            for low in range(0, source.tokens.size, _CHUNK_TOKENS):
                chunk = source.tokens[low : low + _CHUNK_TOKENS]
                if int(np.max(chunk)) >= vocab_size:
                    first = int(np.argmax(chunk >= vocab_size))
                    place = f"token id {chunk[first]} at position {begin + low + first} of the stream"
                    raise DataError(
                        f"{source.name}: {place} is not below the vocabulary size {vocab_size}; raise model.vocab_size"
                        f"{'' if needed is None else f' (--set model.vocab_size={needed})'}, or use data made with the "
                        "model's own tokenizer"
                    )


def bundled_corpus() -> Path:
    """The text that comes with the package and is trained on when no data is named."""
    return Path(__file__).parent / "corpus" / "nano-start.txt"


def open_stream(
    paths: Sequence[str | Path], tokenizer: str | Tokenizer, *, vocab_size: int, seed: int
) -> tuple[TokenStream, Tokenizer]:
    """Open files as one stream, in the order given, with the tokenizer that reads (or is to read) their text.

    A path ending in ``.bin`` holds raw little-endian u32 tokens and is memory-mapped; the path ``random`` stands for
    262,144 uniform random tokens below ``vocab_size``, a function of ``seed``; any other file is UTF-8 text and is
    tokenized. No path at all means the bundled corpus. ``char`` takes its vocabulary from all texts together. Where all
    is tokens and the files beside them name a tokenizer, that one counts rather than a name given here.

    Raises DataError for a file that is missing, unreadable, empty or malformed, for a tokenizer that is unknown, not the
    tokens' own, or ``char`` without any text. Token ids are not looked at: call ``check_vocabulary`` before training.
    """
    loaded = [_load(Path(path), vocab_size, seed) for path in paths or [bundled_corpus()]]
    texts = [content for _, content in loaded if isinstance(content, str)]
    token_files = [name for name, content in loaded if not isinstance(content, str) and name != RANDOM]
    made_with = _made_with([Path(name) for name in token_files])
    if isinstance(tokenizer, str):
        tokenizer = made_with if made_with is not None and not texts else _tokenizer_called(tokenizer, loaded, texts)
    if made_with is not None and made_with.state() != tokenizer.state():
        raise DataError(
            f"{token_files[0]}: was made with another tokenizer ({made_with.name}) than the one in use ({tokenizer.name}); "
            f"set data.tokenizer to the former, or make the file anew with `oxidizr-ref prepare --tokenizer`"
        )
    return TokenStream([_source(name, content, tokenizer) for name, content in loaded]), tokenizer


def _tokenizer_called(name: str, loaded: Sequence[tuple[str, Any]], texts: Sequence[str]) -> Tokenizer:
    if name == "char" and not texts:
        raise DataError(
            f"{', '.join(name for name, _ in loaded)}: holds tokens, and the char tokenizer takes its vocabulary from "
            "text; give the text itself, or use data.tokenizer: byte"
        )
    return get_tokenizer(name, "".join(texts) if name == "char" else None)


def _made_with(paths: Sequence[Path]) -> Tokenizer | None:
    """The tokenizer of token files, as the files beside them tell; None when none of them does."""
    metas = [read_meta(path) for path in paths]
    states = [None if meta is None else dict(meta.tokenizer) for meta in metas]
    for path, state in zip(paths, states, strict=True):
        if state != states[0]:
            known = "is known of one of them only" if None in (state, states[0]) else "differs"
            raise DataError(f"{paths[0]} and {path}: the tokenizer they were made with {known}; prepare both with one")
    return tokenizer_from_state(states[0]) if states and states[0] is not None else None


def _source(name: str, content: str | NDArray[np.uint32], tokenizer: Tokenizer) -> Source:
    if isinstance(content, str):
        tokens = tokenizer.encode(content)
        return Source(name, tokens, marks_of_text(name, tokens, tokenizer.end_of_text))
    return Source(name, content, marks_of_one_document(name, content.size) if name == RANDOM else marks_of_file(Path(name)))


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
    every epoch reads the windows in stream order; ``use`` says what of the stream's marks is told in the batches. Raises
    DataError if a part is shorter than one window.
    """

    def __init__(
        self,
        stream: TokenStream,
        seq_len: int,
        eval_fraction: float = 0.0,
        seed: int = 0,
        shuffle: bool = True,
        use: DataConfig = DataConfig(),  # noqa: B008 - immutable
    ) -> None:
        if seq_len < 1 or not 0.0 <= eval_fraction < 1.0:
            raise ValueError(f"seq_len {seq_len} must be at least 1 and eval_fraction {eval_fraction} in [0, 1)")
        self._stream = stream
        self._seed = seed
        self._shuffle = shuffle
        self._use = use
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
        for part, begin, count in (("training", 0, self.train_windows), ("held-out", self._split, self.eval_windows)):
            if use.loss_on == "responses" and count and not stream.learns(begin + 1, begin + count * seq_len + 1):
                raise DataError(f"{stream.name}: the {part} part has no response to learn; use data.loss_on: all")

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
        return windows_at(self._stream, begins, self.seq_len, self._use)


def windows_at(stream: TokenStream, begins: Sequence[int], seq_len: int, use: DataConfig) -> Batch:
    """The windows of ``seq_len`` targets that begin at these tokens, ``[len(begins), seq_len]``; ``use`` as for `Windows`.

    Raises DataError where what is to be used is not known of the stream.
    """
    tokens = np.empty((len(begins), seq_len), dtype=np.int64)
    targets = np.empty_like(tokens)
    for row, begin in enumerate(begins):
        window = stream.read(begin, begin + seq_len + 1)
        tokens[row] = window[:-1]
        targets[row] = window[1:]
        if use.loss_on == "responses":
            targets[row, ~stream.learned(begin + 1, begin + seq_len + 1)] = IGNORED
    if use.document_boundaries == "ignore":
        return Batch(tokens, targets)
    return Batch(tokens, targets, np.stack([stream.begins(begin, begin + seq_len) for begin in begins]))


@dataclass(frozen=True)
class TrainingData:
    """What a run reads: tokens, the tokenizer that made them, the windows they are cut into, and what identifies them."""

    stream: TokenStream
    tokenizer: Tokenizer
    windows: Windows
    identity: dict[str, Any]


def open_data(config: Config, tokenizer: Tokenizer | None = None) -> TrainingData:
    """The data a config names, read with ``tokenizer`` (default: the config's). Raises DataError if it cannot be used."""
    m, t = config.model, config.trainer
    paths: list[str | Path] = [RANDOM] if config.data.is_random else [*config.data_paths()]
    stream, tokenizer = open_stream(paths, tokenizer or config.tokenizer_name(), vocab_size=m.vocab_size, seed=t.seed)
    marks = _digests_of_marks(stream, config.data)  # first: what is missing is told before all tokens are read
    if paths and all(Path(path).suffix == ".bin" for path in paths):  # large, and read here only to be known
        facts = data_facts.remembered([Path(path) for path in paths], stream.facts)
    else:
        facts = stream.facts()
    if facts.largest >= m.vocab_size:
        stream.check_vocabulary(m.vocab_size, max(tokenizer.vocab_size, facts.largest + 1))
    for source in stream.sources:
        _must_be_as_prepared(source, facts if len(stream.sources) == 1 else None)
    windows = Windows(stream, m.max_seq_len, t.eval_fraction, t.seed, t.shuffle, config.data)
    return TrainingData(stream, tokenizer, windows, {"digest": facts.digest, "tokens": len(stream), **marks})


def _must_be_as_prepared(source: Source, facts: Facts | None) -> None:
    """Raise DataError for tokens that are not those which the file beside them tells of. facts: the source's, if known."""
    path = Path(source.name)
    meta = read_meta(path) if path.suffix == ".bin" else None
    if meta is None:
        return
    if (facts or data_facts.remembered([path], TokenStream([source]).facts)).digest != meta.digest:
        raise DataError(f"{path}: is not what {path.stem}.meta.json tells of; make both anew with `oxidizr-ref prepare`")


def _digests_of_marks(stream: TokenStream, use: DataConfig) -> dict[str, str]:
    """SHA-256 of the marks that are used. Raises DataError where they are missing."""
    digests, used = {}, {"documents": use.document_boundaries == "reset", "responses": use.loss_on == "responses"}
    for what in (name for name, wanted in used.items() if wanted):
        parts = [hashlib.sha256(source.marks.octets(what)).digest() for source in stream.sources]
        digests[what] = hashlib.sha256(b"".join(parts)).hexdigest()
    return digests
