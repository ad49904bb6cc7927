"""Damage: every changed bit, every torn, cut, grown or mixed-up file is found, and the newest whole file is used instead.

All of it must be `DamagedError`: that, and nothing else, makes `--resume auto` fall back to an older file.
"""

from __future__ import annotations

import errno
import itertools
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import handmade
import numpy as np
import pytest
import safetensors.numpy
import tiny

from oxidizr_ref.checkpoint import disk, format
from oxidizr_ref.checkpoint import header as headers
from oxidizr_ref.checkpoint.store import CheckpointStore
from oxidizr_ref.errors import CheckpointError, DamagedError


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    """A small checkpoint where thousands of changes of it take no time, read by this thread alone."""
    with handmade.fast_folder(tmp_path) as folder, tiny.threads(1):
        yield handmade.small_file(folder / "small.safetensors")


def outcome(path: Path) -> str:
    """What loading a file comes to. Errors must be one line that names the file."""
    error = handmade.error_of(path)
    if error is None:
        return "loaded"
    assert str(error).startswith(f"{path}: ") and "\n" not in str(error) and len(str(error)) < 500
    return type(error).__name__


def outcomes(path: Path, variants: Iterator[bytes]) -> Counter[str]:
    """What the files ``variants`` come to, one after the other."""
    found: Counter[str] = Counter()
    with open(path, "r+b", buffering=0) as file:
        for data in variants:
            file.seek(0)
            file.write(data)
            file.truncate()
            found[outcome(path)] += 1
    return found


# --- bits -------------------------------------------------------------------------------------------------------------


@pytest.mark.thorough
def test_each_of_the_12136_single_flipped_bits_of_a_file_is_damage(path: Path) -> None:
    whole = path.read_bytes()
    assert len(whole) == 1517 and len(handmade.text_of(whole)) == 1272

    def flipped() -> Iterator[bytes]:
        for position, bit in itertools.product(range(len(whole)), range(8)):
            yield whole[:position] + bytes([whole[position] ^ 1 << bit]) + whole[position + 1 :]

    assert outcomes(path, flipped()) == {"DamagedError": 8 * 1517}
    path.write_bytes(whole)
    assert outcome(path) == "loaded"


def test_each_flipped_bit_of_length_and_header_is_found_by_all_that_read_without_the_payload(path: Path) -> None:
    whole = path.read_bytes()
    for position in range(0, 8 + 1272, 7):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1 << position % 8]) + whole[position + 1 :])
        for read in (format.read_header, format.mapped, format.verify):
            with pytest.raises(DamagedError):
                read(path)


def test_every_byte_set_to_every_value_in_the_length_is_damage(path: Path) -> None:
    whole = path.read_bytes()
    changed = (
        whole[:position] + bytes([value]) + whole[position + 1 :]
        for position, value in itertools.product(range(8), range(256))
        if value != whole[position]
    )
    assert outcomes(path, changed) == {"DamagedError": 8 * 255}


# --- length -----------------------------------------------------------------------------------------------------------


def test_a_file_cut_at_any_of_its_1517_lengths_is_damage(path: Path) -> None:
    whole = path.read_bytes()
    assert outcomes(path, (whole[:length] for length in range(len(whole)))) == {"DamagedError": 1517}
    for length in (0, 7, 8, 100, 1279, 1280, 1516):
        path.write_bytes(whole[:length])
        for read in (format.read_header, format.mapped, format.verify):
            with pytest.raises(DamagedError):
                read(path)


def test_appended_bytes_are_damage_be_they_zeros_garbage_or_another_whole_file(path: Path) -> None:
    whole = path.read_bytes()
    garbage = np.random.default_rng(1).bytes(4096)
    more = [bytes(count) for count in range(1, 65)] + [garbage[:count] for count in range(1, 65)]
    more += [bytes(4096), garbage, b" " * 64, whole, whole[8:], handmade.payload_of(whole)]
    assert outcomes(path, (whole + data for data in more)) == {"DamagedError": 134}
    path.write_bytes(whole + b"\0")
    with pytest.raises(DamagedError, match=f"at or after byte {len(whole)}: the payload has 238 bytes, not 237"):
        format.load(path)


def test_bytes_put_before_a_file_are_damage(path: Path) -> None:
    whole = path.read_bytes()
    variants = (bytes([value]) * count + whole for value in (0, 10, 32, 255) for count in range(1, 65))
    assert outcomes(path, variants) == {"DamagedError": 256}


# --- torn writes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("filling", [0x00, 0xFF, 0x20])
def test_a_tail_that_was_never_written_is_damage_wherever_it_begins(path: Path, filling: int) -> None:
    whole = path.read_bytes()
    torn = (whole[:start] + bytes([filling]) * (len(whole) - start) for start in range(len(whole)))
    assert outcomes(path, torn) == {"DamagedError": 1517}


@pytest.mark.parametrize("filling", [0x00, 0xFF])
@pytest.mark.parametrize("length", [64, 256, 512, 1024])
def test_a_hole_is_damage_wherever_it_is(path: Path, filling: int, length: int) -> None:
    whole = path.read_bytes()

    def holes() -> Iterator[bytes]:
        for start in range(0, len(whole), 16):
            end = min(start + length, len(whole))
            yield whole[:start] + bytes([filling]) * (end - start) + whole[end:]

    assert outcomes(path, holes()) == {"DamagedError": 95}


@pytest.mark.parametrize(("size", "count"), [(64, 311), (128, 62), (256, 6), (512, 2)])
def test_any_mixture_of_the_sectors_of_two_files_is_damage(path: Path, size: int, count: int) -> None:
    older, newer = path.read_bytes(), handmade.small_file(path.with_name("newer"), step=8).read_bytes()
    assert len(older) == len(newer)
    pieces = [(older[cut : cut + size], newer[cut : cut + size]) for cut in range(0, len(older), size)]
    rng = np.random.default_rng(size)
    choices = {tuple(int(bit) for bit in rng.integers(0, 2, len(pieces))) for _ in range(300)}
    choices |= {tuple(int(number < end) for number in range(len(pieces))) for end in range(len(pieces))}
    choices |= {tuple(int(number == other) for number in range(len(pieces))) for other in range(len(pieces))}
    mixed = {b"".join(pair[which] for pair, which in zip(pieces, choice, strict=True)) for choice in choices}
    assert outcomes(path, iter(mixed - {older, newer})) == {"DamagedError": count}


# --- mixed-up files ---------------------------------------------------------------------------------------------------


def test_swapped_payloads_of_two_tensors_of_one_shape_are_damage(path: Path) -> None:
    whole, header = path.read_bytes(), format.read_header(path)
    a, b = (entry for entry in header.entries if entry.name in ("a.weight", "b.weight"))
    assert (a.dtype, a.shape, a.end) == (b.dtype, b.shape, b.begin)
    start, middle, end = (header.payload_start + at for at in (a.begin, a.end, b.end))
    path.write_bytes(whole[:start] + whole[middle:end] + whole[start:middle] + whole[end:])
    with pytest.raises(DamagedError, match=f"byte {start}: tensor a.weight, up to byte {middle}, is not what was written"):
        format.load(path)


def test_exchanged_headers_and_payloads_of_two_files_are_damage(path: Path) -> None:
    one, two = path.read_bytes(), handmade.small_file(path.with_name("two"), step=8).read_bytes()
    cut = len(one) - 237
    assert outcomes(path, iter([one[:cut] + two[cut:], two[:cut] + one[cut:]])) == {"DamagedError": 2}
    assert outcomes(path, iter([one, two])) == {"loaded": 2}


def test_a_file_under_the_name_of_another_step_is_damage_and_under_any_other_name_a_backup(path: Path) -> None:
    store = CheckpointStore(path.parent)
    for name, sound in [("step_7", True), ("step_8", False), ("step_0", False), ("step_77", False), ("step_07", True)]:
        other = path.with_name(f"{name}.safetensors")
        other.write_bytes(path.read_bytes())
        if sound:
            assert store.load(other).tensors["c"] == -8
        else:
            with pytest.raises(DamagedError, match=f"named after step {name[5:]}, but it holds step 7"):
                store.load(other)


# --- falling back -----------------------------------------------------------------------------------------------------

STEPS = (2, 4, 6, 8)


def cut_short(raw: bytes) -> bytes:
    return raw[:-1]


def flip_a_bit(raw: bytes) -> bytes:
    return raw[:700] + bytes([raw[700] ^ 16]) + raw[701:]


def flip_a_bit_of_the_length(raw: bytes) -> bytes:
    return raw[:1] + bytes([raw[1] ^ 4]) + raw[2:]


def lose_the_tail(raw: bytes) -> bytes:
    return raw[:256] + bytes(len(raw) - 256)


def empty(_: bytes) -> bytes:
    return b""


DAMAGES: list[Callable[[bytes], bytes]] = [cut_short, flip_a_bit, flip_a_bit_of_the_length, lose_the_tail, empty]


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    """A directory with four whole step files, of a run that ended."""
    store = CheckpointStore(tmp_path / "run")
    with store.claimed():
        store.open({})
        for step in STEPS:
            store.save(step, handmade.tensors(step), handmade.metadata(step))
    return store


def damage(path: Path, how: Callable[[bytes], bytes]) -> bytes:
    """Damage a file. Returns what it now holds."""
    path.write_bytes(how(path.read_bytes()))
    return path.read_bytes()


@pytest.mark.parametrize(
    "whole", list(itertools.product([True, False], repeat=4)), ids=lambda w: "".join("x."[b] for b in w)
)
def test_auto_takes_the_newest_whole_file_and_names_exactly_the_damaged_newer_ones(
    store: CheckpointStore, whole: tuple[bool, ...]
) -> None:
    number = sum(1 << bit for bit in range(4) if whole[bit])
    content = {
        step: damage(store.path(step), DAMAGES[(number + index) % len(DAMAGES)])
        for index, step in enumerate(STEPS)
        if not whole[index]
    }
    before = tiny.snapshot(store.directory)
    if not any(whole):
        with pytest.raises(DamagedError, match=r"no step file in .*step_8\.safetensors.*step_6\.safetensors.*--overwrite"):
            store.find("auto")
        assert tiny.snapshot(store.directory) == before
        return
    newest = max(step for step, good in zip(STEPS, whole, strict=True) if good)
    newer = [step for step in reversed(STEPS) if step > newest]
    found = store.find("auto")
    assert tiny.snapshot(store.directory) == before, "looking moves nothing"
    assert found is not None and found.path == store.path(newest)
    assert found.checkpoint.tensors["c"] == -newest - 1 and found.checkpoint.metadata == handmade.metadata(newest)
    assert [path for path, _ in found.damaged] == [store.path(step) for step in newer]
    assert all(reason.startswith(f"{path}: damaged at or after byte ") for path, reason in found.damaged)

    with store.claimed():
        store.open({})
        store.quarantine(found.damaged)
    assert store.steps() == [step for step in STEPS if step <= newest], "older ones are not looked at, nor touched"
    kept = [path.read_bytes() for path in sorted((store.directory / "quarantine").glob("*"))]
    assert sorted(kept) == sorted(content[step] for step in newer)
    assert len(store.notices) == len(newer) and all("; moved to " in notice for notice in store.notices)
    again = store.find("auto")
    assert again is not None and (again.path, again.damaged) == (found.path, [])


def test_names_in_quarantine_never_collide_and_nothing_there_is_ever_deleted(store: CheckpointStore) -> None:
    """The same step is damaged six times over, by five kinds of damage."""
    content = []
    for turn in range(6):
        content.append(damage(store.path(8), DAMAGES[turn % 5]))
        found = store.find("auto")
        assert found is not None and found.path == store.path(6)
        with store.claimed():
            store.open({})
            store.quarantine(found.damaged)
            store.save(8, handmade.tensors(8), handmade.metadata(8))
    names = [f"step_8.{number}.safetensors" for number in range(1, 7)]
    assert disk.names(store.directory / "quarantine") == names
    assert [(store.directory / "quarantine" / name).read_bytes() for name in names] == content
    assert store.steps() == list(STEPS)


def test_saving_a_step_again_puts_a_damaged_file_of_its_name_into_quarantine_first(store: CheckpointStore) -> None:
    sound = store.path(4).read_bytes()
    for turn, how in enumerate(DAMAGES, start=1):
        content = damage(store.path(4), how)
        with store.claimed():
            store.save(4, handmade.tensors(4), handmade.metadata(4))
        assert store.path(4).read_bytes() == sound
        assert (store.directory / "quarantine" / f"step_4.{turn}.safetensors").read_bytes() == content


def test_a_newest_file_that_holds_another_step_is_passed_over(store: CheckpointStore) -> None:
    store.path(10).write_bytes(store.path(4).read_bytes())
    found = store.find("auto")
    assert found is not None and found.path == store.path(8)
    assert [path for path, _ in found.damaged] == [store.path(10)]


def test_a_newest_file_that_never_was_ours_is_told_and_not_passed_over(store: CheckpointStore) -> None:
    safetensors.numpy.save_file({"x": np.zeros(3, np.float32)}, store.path(10), metadata={"format": "pt"})
    before = tiny.snapshot(store.directory)
    with pytest.raises(CheckpointError, match="not a checkpoint of oxidizr_ref") as caught:
        store.find("auto")
    assert not isinstance(caught.value, DamagedError) and tiny.snapshot(store.directory) == before


def test_there_is_nothing_to_find_in_a_directory_without_step_files(tmp_path: Path) -> None:
    assert CheckpointStore(tmp_path / "absent").find("auto") is None
    assert CheckpointStore(tmp_path).find("auto") is None
    assert not any(tmp_path.iterdir())


# --- while it is read -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("read", [format.load, format.verify, format.mapped])
def test_a_file_that_shrinks_between_header_and_payload_is_damage(
    path: Path, monkeypatch: pytest.MonkeyPatch, read: Callable[[Path], Any]
) -> None:
    read_header = headers.read

    def then_cut(*arguments: Any) -> Any:
        header = read_header(*arguments)
        os.truncate(path, header.payload_start + 100)
        return header

    monkeypatch.setattr(headers, "read", then_cut)
    with pytest.raises(DamagedError):
        read(path)


@pytest.mark.parametrize("read", [format.load, format.verify, format.mapped, format.read_header])
def test_a_file_that_the_disk_cannot_read_is_damage_and_one_that_may_not_be_opened_is_not(
    path: Path, monkeypatch: pytest.MonkeyPatch, read: Callable[[Path], Any]
) -> None:
    for code, kind in [(errno.EIO, DamagedError), (errno.EACCES, CheckpointError), (errno.ESTALE, CheckpointError)]:

        def refuse(*_: Any, code: int = code) -> int:
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(disk, "read_at", refuse)
        with pytest.raises(CheckpointError, match=re.escape(f"{path}: cannot be read ({os.strerror(code)})")) as caught:
            read(path)
        assert type(caught.value) is kind
