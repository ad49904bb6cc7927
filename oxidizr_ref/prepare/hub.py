"""Data sets from a hub: downloaded by huggingface_hub, and read where they are files of tokens already."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from oxidizr_ref.errors import DataError, OxidizrError
from oxidizr_ref.prepare.documents import Piece
from oxidizr_ref.prepare.inputs import COMPRESSED, JSONL, TEXT
from oxidizr_ref.tokenizers import Tokenizer

_CHUNK = 1 << 20  # tokens
_CARD = "README.md"  # of a repository: it tells of the data


def download(repository: str, patterns: Sequence[str]) -> Path:
    """The directory where the files of a data set are now: those that match a pattern, or all that can be used.

    Raises DataError where huggingface_hub is missing, and OxidizrError for what the hub or the network says.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise DataError('--hub needs the library huggingface_hub; pip install "oxidizr-ref[hub]"') from None
    usable = [f"*{suffix}{packed}" for suffix in TEXT + JSONL for packed in ("", *COMPRESSED)]
    try:
        place = snapshot_download(repository, repo_type="dataset", allow_patterns=[*patterns] or ["*.bin", *usable])
    except Exception as error:  # whatever it is, it is about this repository or the network
        advice = "check the name, the network, and HF_TOKEN for a private one"
        raise OxidizrError(f"--hub {repository}: {type(error).__name__}: {error}; {advice}") from error
    return Path(place)


def files_in(directory: Path, patterns: Sequence[str]) -> list[Path]:
    """The files below a directory that match a pattern, sorted by path; without patterns all but the data set's card.

    The directory is that of a revision in the cache: other patterns may have brought other files there before. A pattern is
    one of huggingface_hub's: of the whole path, a directory if it ends with a slash.
    """
    files = sorted((path for path in directory.rglob("*") if not path.is_dir()), key=lambda path: path.parts)
    if not patterns:
        return [path for path in files if path != directory / _CARD]
    whole = [f"{pattern}*" if pattern.endswith("/") else pattern for pattern in patterns]
    return [path for path in files if any(fnmatchcase(path.relative_to(directory).as_posix(), p) for p in whole)]


def read_documents(
    paths: Sequence[Path], tokenizer: Tokenizer, end: int | None
) -> Iterator[tuple[list[Piece], list[NDArray[np.uint32]]]]:
    """The documents in files of u32 tokens: what stands between end-of-text tokens, or a file, in chunks.

    Raises DataError for a file that holds no u32 tokens, or ids that the tokenizer does not have.
    """
    for path in paths:
        size = path.stat().st_size
        if size == 0 or size % 4:
            raise DataError(f"{path.name}: {size} bytes are no u32 tokens (4 bytes each); use another data set")
        tokens = np.memmap(path, dtype="<u4", mode="r")
        first = True
        for low in range(0, tokens.size, _CHUNK):
            ids = np.asarray(tokens[low : low + _CHUNK])
            if int(ids.max()) >= tokenizer.vocab_size:
                place = f"token id {ids.max()} is none of the {tokenizer.vocab_size} ids of {tokenizer.name}"
                raise DataError(f"{path.name}: {place}; name the tokenizer it was made with (--tokenizer)")
            ends = np.flatnonzero(ids == end) if end is not None else np.empty(0, dtype=np.int64)
            parts = np.split(ids, ends + 1)
            whole, rest = [part[:-1] for part in parts[:-1]], parts[-1]
            yield [Piece("", True, first or i > 0, True) for i in range(len(whole))], whole
            first = first or bool(whole)
            if rest.size:
                yield [Piece("", True, first, False)], [rest]
                first = False
        if not first:
            yield [Piece("", True, False, True)], [np.empty(0, dtype=np.uint32)]
