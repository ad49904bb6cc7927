"""What `prepare` reads: files, directories and globs found in a fixed order, and their bytes, block by block."""

from __future__ import annotations

import glob
import gzip
import os
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from oxidizr_ref.errors import DataError

TEXT, JSONL = (".txt", ".md"), (".jsonl", ".json-lines")
COMPRESSED = (".gz", ".zst")
STDIN = "-"

_BLOCK = 1 << 20
_ZSTD_BLOCK = 1 << 16  # compressed; what comes out may be a thousand times as long


@dataclass(frozen=True)
class Source:
    """One file, or standard input: what messages call it, and its size in bytes (None: nobody knows)."""

    name: str
    size: int | None = None

    @property
    def is_stdin(self) -> bool:
        return self.name == STDIN

    @property
    def suffix(self) -> str:
        """What its name ends with, ``.gz`` and ``.zst`` left out."""
        path = Path(self.name)
        return (path.with_suffix("") if path.suffix in COMPRESSED else path).suffix


def find_sources(inputs: Sequence[str]) -> tuple[list[Source], int]:
    """The sources that the arguments name, in their order, and how many files were skipped for their suffix.

    A directory stands for all files below it whose suffix is known, sorted by path; a glob for what matches it, each file
    once. A file that is named itself is taken whatever its suffix. Raises DataError for what is not there or cannot be text.
    """
    found: list[Source] = []
    skipped = 0
    for argument in inputs:
        path = Path(argument)
        if argument == STDIN:
            found.append(Source(STDIN))
        elif path.is_dir():
            sources, others = usable_sources(argument, _below(path))
            found, skipped = found + sources, skipped + others
        elif path.exists():
            found.append(_source(path))
        elif matches := [Path(match) for match in sorted(glob.glob(argument, recursive=True))]:
            files = dict.fromkeys(file for match in matches for file in (_below(match) if match.is_dir() else [match]))
            sources, others = usable_sources(argument, [*files])
            found, skipped = found + sources, skipped + others
        else:
            raise DataError(f"{argument}: no such file, directory or glob; check the path")
    return found, skipped


def usable_sources(argument: str, files: Sequence[Path]) -> tuple[list[Source], int]:
    """The files whose suffix is known, and how many have another one. Raises DataError naming ``argument`` if all have."""
    found = [_source(path) for path in files if Source(str(path)).suffix in TEXT + JSONL]
    if not found:
        known = f"{' '.join(TEXT + JSONL)} (or these with {' or '.join(COMPRESSED)})"
        raise DataError(f"{argument}: has no file ending in {known}; name the files themselves")
    return found, len(files) - len(found)


def _below(directory: Path) -> list[Path]:
    files = [Path(place, name) for place, _, names in os.walk(directory, onerror=_raise) for name in names]
    return sorted(files, key=lambda path: path.parts)


def _raise(error: OSError) -> None:
    raise DataError(f"{error.filename}: cannot be listed ({error.strerror}); check its permissions")


def _source(path: Path) -> Source:
    if path.suffix == ".bin":
        raise DataError(f"{path}: ends in .bin, so it holds tokens already; train on it with -d {path}")
    return Source(str(path), path.stat().st_size if path.is_file() else None)


def read_blocks(source: Source, advanced: Callable[[int], None]) -> Iterator[bytes]:
    """The bytes of a source, decompressed, in blocks. ``advanced`` hears how many bytes of the file itself were read.

    Raises DataError naming the source for what cannot be read or decompressed, and where zstandard is missing.
    """
    if source.is_stdin and sys.stdin is None:
        raise DataError(f"{STDIN}: standard input is closed; give a file, or a text on standard input")
    try:
        if source.is_stdin:
            yield from _counted(sys.stdin.buffer, _BLOCK, advanced)
            return
        with open(source.name, "rb") as file:
            if source.name.endswith(".gz"):
                with gzip.GzipFile(fileobj=file) as unpacked:
                    while block := unpacked.read(_BLOCK):
                        advanced(file.tell())
                        yield block
            elif source.name.endswith(".zst"):
                yield from _without_zstd(source, _counted(file, _ZSTD_BLOCK, advanced))
            else:
                yield from _counted(file, _BLOCK, advanced)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise _damaged(source, error) from None
    except OSError as error:
        raise DataError(f"{source.name}: cannot be read ({error.strerror or error}); check the path and the disk") from None


def _counted(file: IO[bytes], size: int, advanced: Callable[[int], None]) -> Iterator[bytes]:
    done = 0
    while block := file.read(size):
        done += len(block)
        advanced(done)
        yield block


def _without_zstd(source: Source, blocks: Iterable[bytes]) -> Iterator[bytes]:
    """Frame after frame. The library's own reader takes a file that is cut short for a whole one."""
    try:
        import zstandard
    except ImportError:
        raise DataError(f'{source.name}: needs the library zstandard; pip install "oxidizr-ref[zstd]"') from None
    frame: Any = None
    try:
        for block in blocks:
            while block:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                if unpacked := frame.decompress(block):
                    yield unpacked
                block = frame.unused_data if frame.eof else b""
                frame = None if frame.eof else frame
    except zstandard.ZstdError as error:
        raise _damaged(source, error) from None
    if frame is not None:
        raise _damaged(source, "it ends within a frame")


def _damaged(source: Source, why: object) -> DataError:
    return DataError(f"{source.name}: cannot be decompressed ({why}); it is cut short or damaged: get it anew")
