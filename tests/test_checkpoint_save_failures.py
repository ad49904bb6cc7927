"""Saves that fail: whatever goes wrong, and whenever, the older file stays whole, and nothing is left beside it."""

from __future__ import annotations

import errno
import itertools
import os
import threading
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import handmade
import pytest
import tiny
from handmade import OTHER, must_hold_other

from oxidizr_ref import parallel
from oxidizr_ref.checkpoint import disk, format
from oxidizr_ref.errors import SaveError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A small checkpoint that a save is going to replace; nothing else is beside it."""
    return handmade.small_file(tmp_path / "small.safetensors")


@pytest.fixture
def many_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 64 bytes: `OTHER` has 38 of them."""
    monkeypatch.setattr(format, "CHUNK_BYTES", 64)


# --- failures ---------------------------------------------------------------------------------------------------------

STAGES = ("create", "write_at", "flush", "forget_cached", "read_at", "size", "close", "rename")


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt(), MemoryError()], ids=type)
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.usefixtures("many_chunks")
def test_a_save_that_fails_or_is_interrupted_at_any_stage_leaves_nothing_and_the_older_file_whole(
    path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, error: BaseException, threads: int
) -> None:
    before, real = tiny.snapshot(path.parent), getattr(disk, stage)
    calls = itertools.count()

    def fail(*arguments: Any) -> Any:
        if stage in ("write_at", "read_at") and next(calls) < 5:
            return real(*arguments)
        if stage == "close":
            real(*arguments)
        raise error

    monkeypatch.setattr(disk, stage, fail)
    with tiny.threads(threads), pytest.raises(type(error)):
        format.save(path, OTHER, {})
    assert tiny.snapshot(path.parent) == before
    monkeypatch.undo()
    format.save(path, OTHER, {})
    must_hold_other(path)


def test_a_failed_flush_is_not_tried_again(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def no_space(descriptor: int) -> None:
        calls.append(descriptor)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(disk, "os", handmade.like(os, fsync=no_space))
    with pytest.raises(OSError, match="No space left"):
        format.save(path, OTHER, {})
    assert len(calls) == 1


def test_a_directory_that_cannot_be_flushed_is_an_os_error_and_the_new_file_is_whole(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(disk, "sync_directory", fail)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        format.save(path, OTHER, {})
    must_hold_other(path)


def test_a_temporary_file_that_cannot_be_removed_does_not_hide_the_first_error(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(code: int) -> Callable[..., None]:
        def failing(*_: Any) -> None:
            raise OSError(code, os.strerror(code))

        return failing

    monkeypatch.setattr(disk, "flush", fail(errno.ENOSPC))
    monkeypatch.setattr(disk, "remove", fail(errno.EIO))
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        format.save(path, OTHER, {})


@pytest.mark.usefixtures("many_chunks")
def test_no_thread_writes_any_more_when_an_interrupted_save_has_closed_its_file(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C arrives while this thread waits for the last chunk of another one. Were the file closed with that thread
    still at work, it would write into whatever file gets the same descriptor next."""
    interrupted, closing, late = threading.Event(), threading.Event(), list[bool]()
    taken = threading.Event()
    write_at, close, main = disk.write_at, disk.close, threading.get_ident()

    class Interrupting(SimpleQueue[None]):
        def get(self, *arguments: Any, **options: Any) -> None:
            if threading.get_ident() == main and not interrupted.is_set():
                interrupted.set()
                raise KeyboardInterrupt
            super().get(*arguments, **options)

    def writing(*arguments: Any) -> None:
        if threading.get_ident() == main:
            assert taken.wait(10), "the other thread gets a chunk of its own"
        else:
            taken.set()
            interrupted.wait(10)
            closing.wait(0.2)  # that it is not closed can be seen only by waiting
            late.append(closing.is_set())
            if closing.is_set():
                return
        write_at(*arguments)

    def closed(descriptor: int) -> None:
        closing.set()
        close(descriptor)

    monkeypatch.setattr(parallel, "SimpleQueue", Interrupting)
    monkeypatch.setattr(disk, "write_at", writing)
    monkeypatch.setattr(disk, "close", closed)
    with tiny.threads(2), pytest.raises(KeyboardInterrupt):
        format.save(path, OTHER, {})
    assert late[:1] == [False]
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_two_threads_that_save_under_one_name_never_leave_a_file_there_that_is_not_whole(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one begins when the first has written, and is half done when the first gives its file the name."""
    first_wrote, second_is_half_done, first_ended = (threading.Event() for _ in range(3))
    write_at, flush, first, errors = disk.write_at, disk.flush, threading.get_ident(), list[OSError]()

    def writing(*arguments: Any) -> None:
        if threading.get_ident() != first:
            second_is_half_done.set()
            first_ended.wait(1)
        write_at(*arguments)

    def flushing(descriptor: int) -> None:
        if threading.get_ident() == first:
            first_wrote.set()
            second_is_half_done.wait(1)
        flush(descriptor)

    def second() -> None:
        first_wrote.wait(1)
        try:
            format.save(path, OTHER, {"by": "the second"})
        except OSError as error:
            errors.append(error)

    monkeypatch.setattr(disk, "write_at", writing)
    monkeypatch.setattr(disk, "flush", flushing)
    with tiny.threads(1):
        other = threading.Thread(target=second)
        other.start()
        try:
            format.save(path, OTHER, {"by": "the first"})
            assert format.load(path).metadata == {"by": "the first"}
        finally:
            first_ended.set()
            other.join()
    assert errors == [] and format.load(path).metadata == {"by": "the second"}
    must_hold_other(path)


# --- a disk that lies -------------------------------------------------------------------------------------------------


def flipped(data: Any, where: int) -> bytes:
    changed = bytearray(data)
    changed[where] ^= 1
    return bytes(changed)


@pytest.mark.parametrize("where", [0, -1])
@pytest.mark.parametrize("number", [0, 1, 20, 37, 38])
@pytest.mark.usefixtures("many_chunks")
def test_a_disk_that_gives_back_another_bit_is_a_save_error_and_no_file(
    path: Path, monkeypatch: pytest.MonkeyPatch, number: int, where: int
) -> None:
    before, write_at, calls = tiny.snapshot(path.parent), disk.write_at, itertools.count()

    def corrupt(descriptor: int, data: Any, offset: int) -> None:
        write_at(descriptor, flipped(data, where) if next(calls) == number else data, offset)

    monkeypatch.setattr(disk, "write_at", corrupt)
    with (
        tiny.threads(1),
        pytest.raises(SaveError, match=r"small\.safetensors: the disk gave back other bytes than were written"),
    ):
        format.save(path, OTHER, {})
    assert next(calls) == 39, "38 chunks and a header were written"
    assert tiny.snapshot(path.parent) == before


@pytest.mark.parametrize("change", [-1, -64, 1, 4096])
def test_a_file_that_became_longer_or_shorter_is_a_save_error_and_no_file(
    path: Path, monkeypatch: pytest.MonkeyPatch, change: int
) -> None:
    before, flush = tiny.snapshot(path.parent), disk.flush

    def resize(descriptor: int) -> None:
        os.ftruncate(descriptor, disk.size(descriptor) + change)
        flush(descriptor)

    monkeypatch.setattr(disk, "flush", resize)
    with pytest.raises(SaveError, match="the disk gave back other bytes"):
        format.save(path, OTHER, {})
    assert tiny.snapshot(path.parent) == before


@pytest.mark.parametrize("lost", [0, 19, 38])
@pytest.mark.usefixtures("many_chunks")
def test_a_write_that_never_arrived_is_a_save_error_and_no_file(
    path: Path, monkeypatch: pytest.MonkeyPatch, lost: int
) -> None:
    before, write_at, calls = tiny.snapshot(path.parent), disk.write_at, itertools.count()

    def lossy(*arguments: Any) -> None:
        if next(calls) != lost:
            write_at(*arguments)

    monkeypatch.setattr(disk, "write_at", lossy)
    with tiny.threads(1), pytest.raises(SaveError):
        format.save(path, OTHER, {})
    assert tiny.snapshot(path.parent) == before
