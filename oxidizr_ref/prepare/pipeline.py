"""The way from inputs to files: pieces of documents, encoded in batches on all cores, written in their order.

The files depend on the documents, the tokenizer and the seed alone, not on threads, nor on how the bytes arrived.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from oxidizr_ref import parallel, rng
from oxidizr_ref.checkpoint import disk
from oxidizr_ref.config import load_config
from oxidizr_ref.errors import DataError, UsageError
from oxidizr_ref.prepare import hub, vocabulary, writer
from oxidizr_ref.prepare.documents import Piece, Reader
from oxidizr_ref.prepare.inputs import JSONL, Source, find_sources, read_blocks, usable_sources
from oxidizr_ref.prepare.statistics import Statistics
from oxidizr_ref.prepare.writer import TokenWriter
from oxidizr_ref.token_files import Meta, documents_path, meta_path, responses_path
from oxidizr_ref.tokenizers import END_OF_TEXT, SPECIAL_TOKENS, Tokenizer, get_tokenizer

_BATCH = 1 << 19  # characters that are encoded together
_CHOICES = 1 << 12  # documents whose side is drawn at a time

#: Pieces, and the ids of each.
Encoded: TypeAlias = tuple[Sequence[Piece], Sequence[NDArray[np.uint32]]]


@dataclass(frozen=True)
class PrepareOptions:
    """What `prepare` is asked for; see the command line's help. threads None: all cores. Only threads change no byte."""

    inputs: Sequence[str]
    output: Path
    tokenizer: str = "byte"
    validation: float = 0.0
    seed: int = 0
    train_bpe: int | None = None
    statistics: bool = False
    replace_errors: bool = False
    format: str = "auto"
    hub: str | None = None
    end_of_text: str | None = None
    check: str | None = None
    threads: int | None = None
    overwrite: bool = False


class PrepareReporter:
    """What is told meanwhile. This one keeps silent."""

    def notice(self, text: str) -> None:
        """Something the user should know, in one line."""

    def progress(self, done: int, total: int | None, documents: int, tokens: int) -> None:
        """``done`` of ``total`` bytes of input are read (None: nobody knows how many there are)."""


@dataclass(frozen=True)
class Prepared:
    """What was made. metas: of each .bin that was written, by its path. statistics: of them all together, if asked for."""

    metas: dict[Path, Meta]
    statistics: dict[str, Any] | None


def prepare(options: PrepareOptions, reporter: PrepareReporter | None = None) -> Prepared:
    """Make NAME.bin and the files beside it (`token_files.py`); with ``validation`` also NAME.validation.bin and its own.

    Raises UsageError, ConfigError and DataError for what cannot be done as asked, and OxidizrError where the disk refuses.
    Whatever is raised, and whenever the process is killed: no file under a final name is half written.
    """
    return _Run(options, reporter or PrepareReporter()).run()


class _Run:
    def __init__(self, options: PrepareOptions, reporter: PrepareReporter) -> None:
        _check_options(options)
        self.options, self.reporter = options, reporter
        stem = options.output.name.removesuffix(".bin")
        self.train, self.validation, self.whole = (
            options.output.with_name(f"{stem}{part}.bin") for part in ("", ".validation", ".whole")
        )
        self.vocabulary = options.output.with_name(f"{stem}.tokenizer.json")
        self.replaced = 0
        self.written: list[TokenWriter] = []
        self._refuse_to_overwrite()

    def run(self) -> Prepared:
        """All of it."""
        sources, token_files = self._find()
        places = [place for path in (self.train, self.validation, self.whole) for place in writer.family(path)]
        try:
            writer.remove_temporaries([*places, self.vocabulary])
            tokenizer = self._tokenizer(sources)
            self._check_vocabulary(tokenizer)
            end = self._end_of_text(tokenizer)
            statistics = Statistics(tokenizer.vocab_size) if self.options.statistics else None
            encoded = (
                hub.read_documents(token_files, tokenizer, end)
                if token_files
                else self._encoded(sources, tokenizer, end, statistics)
            )
            names = tuple(Path(name).name for name in (*(s.name for s in sources), *map(str, token_files)))
            metas = self._write(encoded, tokenizer, end, statistics, names)
        except OSError as error:
            writer.remove_temporaries([*places, self.vocabulary])
            raise writer.not_written(self.options.output, error) from error
        except BaseException:
            writer.remove_temporaries([*places, self.vocabulary])
            raise
        return Prepared(metas, None if statistics is None else statistics.summary(tokenizer))

    # --- before anything is written

    def _refuse_to_overwrite(self) -> None:
        made = [*writer.family(self.train), *writer.family(self.validation)]
        if self.options.train_bpe is not None:
            made.append(self.vocabulary)
        there = [path for path in made if os.path.lexists(path)]
        if there and not self.options.overwrite:
            raise UsageError(f"{there[-1]}: is there already; give --overwrite to replace it, or another -o")

    def _find(self) -> tuple[list[Source], list[Path]]:
        """Texts to be encoded, or files of tokens from a hub."""
        reads_twice = vocabulary.needs_two_readings(self.options.tokenizer, self.options.train_bpe)
        inputs = self.options.inputs
        if self.options.hub is not None:
            files = hub.files_in(hub.download(self.options.hub, inputs), inputs)
            if token_files := [path for path in files if path.suffix == ".bin"]:
                if reads_twice:
                    raise UsageError(f"--hub {self.options.hub}: holds tokens; name the --tokenizer they were made with")
                return [], token_files
            sources, skipped = usable_sources(f"--hub {self.options.hub}", files)
        else:
            sources, skipped = find_sources(inputs)
        if skipped:
            self.reporter.notice(f"files skipped for the ending of their names: {skipped:,}")
        if reads_twice and any(source.is_stdin for source in sources):
            raise UsageError("standard input can be read only once, and this tokenizer reads it twice; give a file")
        return sources, []

    def _tokenizer(self, sources: list[Source]) -> Tokenizer:
        name, size = self.options.tokenizer, self.options.train_bpe
        if not vocabulary.needs_two_readings(name, size):
            return get_tokenizer(name, None)
        reader = self._reader([END_OF_TEXT], SPECIAL_TOKENS)
        texts = (piece.text for piece in self._pieces(sources, reader))
        if size is None:
            return vocabulary.characters(texts, lambda: reader.ends_seen or self.options.end_of_text == END_OF_TEXT)
        tokenizer = vocabulary.train_bpe(texts, size)
        writer.write_whole(self.vocabulary, tokenizer.state()["json"].encode())
        return tokenizer

    def _check_vocabulary(self, tokenizer: Tokenizer) -> None:
        size = tokenizer.vocab_size
        if size > 2**32:
            raise DataError(f"the tokenizer {tokenizer.name} has {size:,} ids; a .bin holds ids below 2^32: use another one")
        if self.options.check is not None and (there := load_config(self.options.check).model.vocab_size) < size:
            raise UsageError(
                f"{self.options.check}: model.vocab_size is {there}, the tokenizer {tokenizer.name} has {size} ids; write "
                f"model.vocab_size: {size}, or train with --set model.vocab_size={size}"
            )

    def _end_of_text(self, tokenizer: Tokenizer) -> int | None:
        token = self.options.end_of_text
        if token is None:
            if tokenizer.end_of_text is None:
                advice = "documents run together (--end-of-text TOKEN names one)"
                self.reporter.notice(f"the tokenizer {tokenizer.name} has no end-of-text token: {advice}")
            return tokenizer.end_of_text
        ids = tokenizer.encode(token)
        if ids.size != 1:
            few = ", ".join([*tokenizer.special_tokens][:8]) or "none"
            raise UsageError(f"--end-of-text {token}: is no single id of {tokenizer.name}; its special tokens: {few}")
        return int(ids[0])

    # --- from text to ids

    def _reader(self, ends: Sequence[str], special_tokens: Iterable[str]) -> Reader:
        own = [] if self.options.end_of_text is None else [self.options.end_of_text]
        return Reader((*own, *ends), tuple(special_tokens), self.options.replace_errors)

    def _pieces(self, sources: list[Source], reader: Reader) -> Iterator[Piece]:
        total = None if any(s.size is None for s in sources) else sum(s.size or 0 for s in sources)
        before = 0

        def advanced(done: int) -> None:
            documents, tokens = sum(w.documents for w in self.written), sum(w.tokens for w in self.written)
            self.reporter.progress(before + done, total, documents, tokens)

        for source in sources:
            jsonl = self.options.format == "jsonl" or (self.options.format == "auto" and source.suffix in JSONL)
            yield from reader.documents(source, read_blocks(source, advanced), jsonl)
            before += source.size or 0

    def _encoded(
        self, sources: list[Source], tokenizer: Tokenizer, end: int | None, statistics: Statistics | None
    ) -> Iterator[Encoded]:
        own = [token for token, token_id in tokenizer.special_tokens.items() if token_id == end]
        reader = self._reader([END_OF_TEXT, *own], tokenizer.special_tokens)
        threads = self.options.threads or parallel.get_threads()
        yield from _encode_in_order(self._pieces(sources, reader), tokenizer, threads, statistics)
        self.replaced = reader.replaced
        if reader.replaced:
            self.reporter.notice(f"places without valid Unicode that became U+FFFD: {reader.replaced:,}")
        if reader.left_out:
            self.reporter.notice(f"keys of JSON lines that were not used: {', '.join(sorted(reader.left_out))}")

    # --- from ids to files

    def _write(
        self,
        encoded: Iterable[Encoded],
        tokenizer: Tokenizer,
        end: int | None,
        statistics: Statistics | None,
        names: tuple[str, ...],
    ) -> dict[Path, Meta]:
        both = [self.train, self.validation] if self.options.validation else [self.train]
        writers = [TokenWriter(path, end, statistics) for path in both]
        try:
            self.written = writers
            _spread(encoded, writers, self.options)
            if not any(w.tokens for w in writers):
                raise DataError(f"{', '.join(names[:3])}: no text to be found there; nothing was written")
            if not all(w.tokens for w in writers):
                writers = self._split(writers, end)
            if any(w.prompted for w in writers) and not set(SPECIAL_TOKENS[1:]) <= tokenizer.special_tokens.keys():
                self.reporter.notice(f"{tokenizer.name} has no ids for {' '.join(SPECIAL_TOKENS[1:])}: written as text")
            metas = {w.path: self._meta(w, tokenizer, end, names) for w in writers}
        finally:
            for w in writers:
                w.close()
        made = [path for w in reversed(writers) for path in writer.family(w.path) if disk.exists(disk.temporary_of(path))]
        if self.options.train_bpe is not None:
            made.insert(0, self.vocabulary)
        writer.publish(made, [*writer.family(self.train), *writer.family(self.validation)])
        return metas

    def _meta(self, written: TokenWriter, tokenizer: Tokenizer, end: int | None, names: tuple[str, ...]) -> Meta:
        digests: dict[str, Any] = written.finish()
        meta = Meta(
            tokenizer=tokenizer.state(),
            vocab_size=tokenizer.vocab_size,
            end_of_text=end,
            special_tokens=dict(tokenizer.special_tokens),
            tokens=written.tokens,
            documents=written.documents,
            largest=written.largest,
            sources=names,
            replaced=self.replaced,
            **digests,
        )
        writer.write_whole(meta_path(written.path), meta.to_json())
        return meta

    def _split(self, writers: list[TokenWriter], end: int | None) -> list[TokenWriter]:
        """Where chance left one side without documents: the last tokens become the validation part, whole or not."""
        (whole,) = (w for w in writers if w.tokens)
        if whole.tokens < 2:
            raise DataError("one token cannot be split; leave --validation out, or give more text")
        self.reporter.notice("too few documents to spread: the validation part is the end of the text")
        whole.finish()
        moved = [place(path) for path in (whole.path, self.whole) for place in (Path, documents_path, responses_path)]
        for source, target in zip(moved[:3], moved[3:], strict=True):
            if disk.exists(disk.temporary_of(source)):
                disk.rename(disk.temporary_of(source), disk.temporary_of(target))
        for w in writers:
            w.close()
        tokens, begins, spans = (_mapped(path, dtype) for path, dtype in zip(moved[3:], ("<u4", "<u8", "<u8"), strict=True))
        assert tokens is not None and begins is not None
        cut = min(max(round(tokens.size * (1 - self.options.validation)), 1), tokens.size - 1)
        parts = [TokenWriter(path, end) for path in (self.train, self.validation)]
        for part, low, high in zip(parts, (0, cut), (cut, tokens.size), strict=True):
            inside = begins[(begins > low) & (begins < max(high - 1, 1))] - low
            clipped = None if spans is None else spans.reshape(-1, 2).clip(low, high) - low
            part.copy(
                tokens[low:high],
                np.concatenate([np.zeros(1, dtype=np.uint64), inside.astype(np.uint64)]),
                None if clipped is None else clipped[clipped[:, 0] < clipped[:, 1]],
            )
        writer.remove_temporaries(writer.family(self.whole))
        return parts


def _check_options(options: PrepareOptions) -> None:
    output = options.output
    if output.suffix != ".bin":
        raise UsageError(f"-o {output}: the name must end in .bin; give -o {output.with_suffix('.bin')}")
    if not output.parent.is_dir():
        raise UsageError(f"-o {output}: there is no directory {output.parent}; make it first")
    if not options.inputs and options.hub is None:
        raise UsageError("nothing to prepare; name files, directories or globs, - for standard input, or --hub REPO")
    if not 0 <= options.validation < 1:
        raise UsageError(f"--validation {options.validation}: expected a part of the documents, at least 0 and below 1")
    if options.train_bpe is not None and options.tokenizer != "byte":
        raise UsageError("--train-bpe makes a tokenizer, --tokenizer names one; give one of them")


def _encode_in_order(
    pieces: Iterable[Piece], tokenizer: Tokenizer, threads: int, statistics: Statistics | None
) -> Iterator[Encoded]:
    """Batches of pieces with their ids. A few batches are on their way at a time, whatever there is to read."""

    def encode(batch: list[Piece]) -> tuple[list[NDArray[np.uint32]], int]:
        texts = [piece.text for piece in batch]
        size = sum(len(text) if text.isascii() else len(text.encode()) for text in texts) if statistics else 0
        return tokenizer.encode_batch(texts), size

    def done(batch: list[Piece], ids: list[NDArray[np.uint32]], size: int) -> Encoded:
        if statistics is not None:
            statistics.text_bytes += size
        return batch, ids

    if threads == 1:
        yield from (done(batch, *encode(batch)) for batch in _batches(pieces))
        return
    with ThreadPoolExecutor(threads, "encode") as pool:
        waiting: deque[tuple[list[Piece], Future[tuple[list[NDArray[np.uint32]], int]]]] = deque()
        for batch in _batches(pieces):
            waiting.append((batch, pool.submit(partial(encode, batch))))
            if len(waiting) > threads:
                first, future = waiting.popleft()
                yield done(first, *future.result())
        for first, future in waiting:
            yield done(first, *future.result())


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    characters = 0
    for piece in pieces:
        batch.append(piece)
        characters += len(piece.text) + 64  # short ones cost as well
        if characters >= _BATCH:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _spread(encoded: Iterable[Encoded], writers: Sequence[TokenWriter], options: PrepareOptions) -> None:
    """Every document to its side: training, or validation, as a number drawn for its index says."""
    sides = _sides(options.validation, options.seed)
    current = writers[0]
    for pieces, ids_of_each in encoded:
        for piece, ids in zip(pieces, ids_of_each, strict=True):
            if piece.first and len(writers) > 1:
                current = writers[next(sides)]
            current.add(ids, piece.response)
            if piece.last:
                current.end_document()


def _sides(fraction: float, seed: int) -> Iterator[int]:
    """For each document 1 (validation) or 0: a function of seed and index alone."""
    for start in count(0, _CHOICES):
        words = rng.words(seed, "prepare", "validation", 0, _CHOICES, start)
        yield from (np.right_shift(words, 11) * 2.0**-53 < fraction).astype(int).tolist()


def _mapped(path: Path, dtype: str) -> NDArray[Any] | None:
    temporary = disk.temporary_of(path)
    return np.asarray(np.memmap(temporary, dtype=dtype, mode="r")) if disk.exists(temporary) else None
