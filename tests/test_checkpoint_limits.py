"""Whatever a file says, reading it takes bounded memory and work: at most 64 MiB beyond its size, and time by its length."""

from __future__ import annotations

import hashlib
import itertools
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import handmade
import numpy as np
import pytest
import tiny
from golden import write_format_v1

from oxidizr_ref.checkpoint import format
from oxidizr_ref.checkpoint import header as headers
from oxidizr_ref.errors import CheckpointError, DamagedError

MIB = 1 << 20
READERS: tuple[Callable[[Path], Any], ...] = (format.load, format.verify, format.read_header, format.mapped)
SEAL = f'"header_digest":"{handmade.ZEROS}"'.encode()
KEY_LETTERS = sorted(set(map(chr, range(32, 127))) - {'"', "\\"})


def filled(before: bytes, unit: bytes, after: bytes, size: int) -> bytes:
    """A header of about ``size`` bytes: as many units as there is room for."""
    return before + unit * ((size - 72 - len(before) - len(after)) // len(unit)) + after


def in_digests(before: bytes, unit: bytes, size: int) -> bytes:
    return filled(b'{"__metadata__":{"digests":"' + before, unit, b'",' + SEAL + b"}}", size)


def many_strings(value: str, size: int) -> bytes:
    """As many strings of metadata as there is room for, each of four characters: a Python object is far larger than that."""
    count = min(2 * MIB // 4 - 100, (size - 300) // (len(value) + 9)) if value else (size - 300) // 9
    keys = ("".join(letters) for letters in itertools.islice(itertools.product(KEY_LETTERS, repeat=3), count))
    parts = [f'"{key}":"{value}"' for key in keys] + ['"digests":"{}"', SEAL.decode()]
    body = ",".join(sorted(parts, key=lambda part: part[1 : part.index('"', 1)]))
    return f'{{"__metadata__":{{{body}}}}}'.encode()


def many_tensors(name_length: int, size: int) -> bytes:
    """A whole file of as many tensors of one byte as there is room for, at most as many as there may be."""
    count = min(headers.MAX_TENSORS, (size - 300) // (2 * name_length + 140))
    saved = {f"{number:05}".ljust(name_length, "n"): np.array(number % 256, dtype=np.uint8) for number in range(count)}
    return handmade.text_of(write_format_v1.file_bytes(saved, {}))


#: Headers made to be dear: of so many bytes.
HOSTILE: dict[str, Callable[[int], bytes]] = {
    "digests of commas": lambda size: in_digests(b"", b",", size),
    "digests of short names": lambda size: in_digests(b"", b"ab,", size),
    "digests of short pairs": lambda size: in_digests(b"", b"ab:c,", size),
    "digests of empty strings": lambda size: in_digests(b"{", b'\\"\\":\\"\\",', size),
    "digests in wide characters": lambda size: in_digests(b"\\ud83e\\udd80", b"a", size),
    "digests of names in wide characters": lambda size: in_digests(b"\\ud83e\\udd80", b"ab,", size),
    "digests of escapes": lambda size: in_digests(b"", b"\\ud83e\\udd80", size),
    "one long string": lambda size: filled(b'{"__metadata__":{"', b"a", b'":""}}', size),
    "one long string in wide characters": lambda size: filled(b'{"__metadata__":{"\\ud83e\\udd80', b"a", b'":""}}', size),
    "one long string of escapes": lambda size: filled(b'{"__metadata__":{"', b"\\u0100", b'":""}}', size),
    "a string of backslashes that never ends": lambda size: filled(b'{"__metadata__":{"', b"\\\\", b"", size),
    "a string of quotes that never ends": lambda size: filled(b'{"__metadata__":{"', b'\\"', b"", size),
    "many short strings in wide characters": lambda size: many_strings("\\u0100", size),
    "many empty strings": lambda size: many_strings("", size),
    "open lists": lambda size: filled(b"", b"[", b"", size),
    "open objects": lambda size: filled(b"", b'{"a":', b"", size),
    "a long name": lambda size: filled(b'{"', b"a", b"", size),
    "a name of many parts": lambda size: filled(b'{"', b"a.", b"", size),
    "a long number": lambda size: filled(b'{"a":{"data_offsets":[', b"1", b"", size),
    "a long shape": lambda size: filled(b'{"a":{"data_offsets":[0,1],"dtype":"U8","shape":[', b"1,", b"", size),
    "spaces": lambda size: filled(b"{", b" ", b"}", size),
    "zeros": lambda size: filled(b"", b"\0", b"", size),
    "tensors with names as long as they may be": lambda size: many_tensors(256, size),
    "as many tensors as there may be": lambda size: many_tensors(100, size),
}


def outcome(read: Callable[[Path], Any], path: Path) -> Any:
    """What reading comes to; an error of another kind than ours is raised."""
    try:
        return read(path)
    except CheckpointError as error:
        return error


def peak_of(work: Callable[[], object]) -> int:
    """The most bytes that Python and NumPy held at once, beyond what they held before."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


# --- reading ----------------------------------------------------------------------------------------------------------


def must_stay_small(read: Callable[[Path], Any], path: Path) -> Any:
    """Read within the file's size and 64 MiB. Returns what came of it."""
    results = list[Any]()
    with tiny.threads(1):
        more = peak_of(lambda: results.append(outcome(read, path))) - path.stat().st_size
    assert more <= 64 * MIB, f"{more / MIB:.1f} MiB beyond the file"
    return results[0]


@pytest.mark.thorough
@pytest.mark.parametrize("name", [name for name in HOSTILE if "may be" not in name])
def test_reading_a_file_with_any_header_of_8_mib_takes_no_more_than_its_size_and_64_mib(tmp_path: Path, name: str) -> None:
    text = HOSTILE[name](headers.MAX_HEADER_BYTES)
    assert 4 * MIB < len(text) <= headers.MAX_HEADER_BYTES - 8
    path = tmp_path / "hostile"
    path.write_bytes(handmade.sealed(text))
    assert path.stat().st_size <= headers.MAX_HEADER_BYTES
    assert isinstance(must_stay_small(format.load, path), CheckpointError) or name.startswith("many")


@pytest.mark.thorough
@pytest.mark.parametrize(
    "read",
    [
        format.load,
        format.read_header,
        *(pytest.param(read, marks=pytest.mark.long) for read in (format.verify, format.mapped)),
    ],
)
def test_reading_as_many_tensors_as_there_may_be_takes_no_more_than_the_file_s_size_and_64_mib(
    tmp_path_factory: pytest.TempPathFactory, read: Callable[[Path], Any]
) -> None:
    path = tmp_path_factory.getbasetemp() / "many_tensors"
    if not path.exists():
        text = HOSTILE["as many tensors as there may be"](headers.MAX_HEADER_BYTES)
        assert len(text) > 6 * MIB
        payload = bytes(number % 256 for number in range(headers.MAX_TENSORS))
        path.write_bytes(handmade.sealed(text, payload))
    assert not isinstance(must_stay_small(read, path), CheckpointError)


@pytest.mark.thorough
def test_work_grows_with_the_length_of_the_header_and_with_nothing_else(tmp_path: Path) -> None:
    """None of the headers above takes ten times as long as an honest one of the same length. (Anything that grew with the
    square would take hundreds of thousands of times as long.)"""
    size, path = MIB // 2, tmp_path / "hostile"

    def seconds(name: str) -> float:
        path.write_bytes(handmade.sealed(HOSTILE[name](size)))
        times = list[float]()
        for _ in range(3):
            before = time.thread_time()
            outcome(format.read_header, path)
            times.append(time.thread_time() - before)
        return min(times)

    honest = seconds("as many tensors as there may be")
    dear = {name: round(taken / honest, 1) for name in HOSTILE if (taken := seconds(name)) > 10 * honest}
    assert dear == {}


def test_a_header_that_claims_exabytes_allocates_nothing(tmp_path: Path) -> None:
    text = '{"__metadata__":{"digests":"{\\"x\\":\\"%s\\"}",%s},"x":{"data_offsets":[0,%d],"dtype":"U8","shape":[%d]}}'
    claim = 2**63 - 1
    path = tmp_path / "exabytes"
    path.write_bytes(handmade.sealed((text % (handmade.ZEROS, SEAL.decode(), claim, claim)).encode(), bytes(100)))
    for read in READERS:
        assert peak_of(lambda read=read: outcome(read, path)) < MIB  # type: ignore[misc]
        with pytest.raises(DamagedError, match=f"the payload has 100 bytes, not {claim}"):
            read(path)
    path.write_bytes((2**64 - 1).to_bytes(8, "little") + b"{" * 100)
    for read in READERS:
        assert peak_of(lambda read=read: outcome(read, path)) < MIB  # type: ignore[misc]


@pytest.mark.parametrize("mebibytes", [64, pytest.param(1024, marks=pytest.mark.long)])
def test_verifying_and_mapping_a_large_file_take_a_few_chunks_and_loading_it_its_size(
    tmp_path: Path, mebibytes: int
) -> None:
    chunk = hashlib.sha256(bytes(4 * MIB)).digest()
    digest = hashlib.sha256(chunk * (mebibytes // 4)).hexdigest()
    size, path = mebibytes * MIB, tmp_path / "sparse"
    text = (
        f'{{"__metadata__":{{"digests":"{{\\"x\\":\\"{digest}\\"}}",{SEAL.decode()}}},'
        f'"x":{{"data_offsets":[0,{size}],"dtype":"U8","shape":[{size}]}}}}'
    )
    path.write_bytes(handmade.sealed(text.encode()))
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size + size)  # zeros that take no place on the disk
    with tiny.threads(2):
        assert peak_of(lambda: format.verify(path)) < 12 * MIB
        assert peak_of(lambda: format.read_header(path)) < MIB
        assert peak_of(lambda: format.mapped(path)) < MIB
        assert peak_of(lambda: format.load(path)) < size + 4 * MIB


# --- writing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mebibytes", [64, pytest.param(256, marks=pytest.mark.long)])
def test_saving_makes_no_second_copy_of_the_tensors(tmp_path: Path, mebibytes: int) -> None:
    saved = {"x": np.arange(mebibytes * MIB // 8, dtype=np.float64), "y": np.ones((300, 700), np.float32)}
    with tiny.threads(2):
        assert peak_of(lambda: format.save(tmp_path / "x", saved, {"a": "b"})) <= 32 * MIB
        assert peak_of(lambda: format.describe(saved, {"a": "b"})) <= MIB
    format.verify(tmp_path / "x")
