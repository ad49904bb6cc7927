"""The calls to the file system, and the branches that Windows and macOS take, with the functions of those systems put in.

Nothing here proves anything about those systems; it proves that with functions that behave as documented, files come out
the same.
"""

from __future__ import annotations

import errno
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import handmade
import numpy as np
import pytest
import tiny

from oxidizr_ref.checkpoint import disk, format
from oxidizr_ref.errors import CheckpointError

SAVED = {"x": np.arange(5000, dtype=np.float64), "y": np.array(3, dtype=np.uint8)}


def failing(code: int) -> Callable[..., Any]:
    def fail(*_: Any) -> Any:
        raise OSError(code, os.strerror(code))

    return fail


def must_round_trip(folder: Path) -> None:
    """Save in three threads and load; the bytes must be those that the plain functions of this system write."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(format, "CHUNK_BYTES", 512)
        with tiny.threads(3):
            format.save(folder / "x", SAVED, {"a": "b"})
            loaded = format.load(folder / "x")
            assert format.verify(folder / "x") == format.describe(SAVED, {"a": "b"})
    assert {name: array.tobytes() for name, array in loaded.tensors.items()} == {
        name: array.tobytes() for name, array in SAVED.items()
    }


# --- Windows ----------------------------------------------------------------------------------------------------------


class NoLocking:
    """The module `msvcrt`: a lock that another one may hold."""

    LK_NBLCK = 2

    def __init__(self, error: int | None = None) -> None:
        self.error, self.calls = error, list[tuple[int, int]]()

    def locking(self, _: int, mode: int, count: int) -> None:
        self.calls.append((mode, count))
        if self.error is not None:
            raise OSError(self.error, os.strerror(self.error))


def on_windows(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> list[int]:
    """Put Windows in: no pwrite, no preadv, no directories to open, another way to lock. Returns the flags of all opens."""
    flags_used, binary = list[int](), 1 << 30

    def open_(path: Any, flags: int, *mode: int) -> int:
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        flags_used.append(flags)
        return os.open(path, flags & ~binary, *mode)

    gone = ("pwrite", "preadv", "posix_fadvise", "POSIX_FADV_DONTNEED", "O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC")
    monkeypatch.setattr(disk, "os", handmade.like(os, *gone, name="nt", open=open_, O_BINARY=binary, **changes))
    monkeypatch.setattr(disk, "fcntl", None)
    monkeypatch.setattr(disk, "msvcrt", NoLocking())
    return flags_used


def test_without_pwrite_preadv_and_directories_to_flush_the_same_bytes_are_written_and_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    must_round_trip(tmp_path)
    wanted = (tmp_path / "x").read_bytes()

    def alone(name: str) -> Callable[..., Any]:
        """Finding the place in the file and writing or reading there must not be parted by another thread."""

        def called(*arguments: Any) -> Any:
            assert disk._one_position.locked()
            return getattr(os, name)(*arguments)

        return called

    flags = on_windows(monkeypatch, **{name: alone(name) for name in ("lseek", "read", "write")})
    must_round_trip(tmp_path)
    assert (tmp_path / "x").read_bytes() == wanted
    assert len(flags) >= 3 and all(flag & (1 << 30) for flag in flags), "every file is opened as binary"
    with pytest.raises(CheckpointError, match="cannot be read"):
        format.load(tmp_path)


@pytest.mark.parametrize("most", [1, 100])
def test_without_pwrite_and_preadv_short_calls_are_completed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    on_windows(
        monkeypatch,
        write=lambda descriptor, data: os.write(descriptor, data[:most]),
        read=lambda descriptor, count: os.read(descriptor, min(count, most)),
    )
    format.save(tmp_path / "x", {"x": np.arange(300)}, {})
    assert format.load(tmp_path / "x").tensors["x"].tolist() == list(range(300))


@pytest.mark.parametrize("error", [errno.EACCES, errno.EDEADLK])
def test_a_lock_of_windows_is_taken_or_is_another_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int) -> None:
    on_windows(monkeypatch)
    lock = disk.Lock(tmp_path / ".lock")
    assert lock.acquire() and lock.acquire()
    assert disk.msvcrt.calls == [(NoLocking.LK_NBLCK, 1)], "held already"
    lock.release()
    monkeypatch.setattr(disk, "msvcrt", NoLocking(error))
    assert not lock.acquire()
    monkeypatch.setattr(disk, "msvcrt", NoLocking(errno.EIO))
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        lock.acquire()
    assert (tmp_path / ".lock").exists()


@pytest.mark.parametrize(("there", "absent"), [("fcntl", "msvcrt"), ("msvcrt", "fcntl")])
def test_the_module_is_imported_where_only_one_way_of_locking_exists(
    monkeypatch: pytest.MonkeyPatch, there: str, absent: str
) -> None:
    locking = NoLocking()
    monkeypatch.setitem(sys.modules, absent, None)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, there, locking)  # type: ignore[arg-type]
    spec = importlib.util.spec_from_file_location("disk_elsewhere", disk.__file__)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert getattr(module, there) is locking and getattr(module, absent) is None


# --- macOS ------------------------------------------------------------------------------------------------------------


class FullSync:
    """The module `fcntl` of macOS."""

    F_FULLFSYNC, LOCK_EX, LOCK_NB = 51, 2, 4

    def __init__(self, error: int | None) -> None:
        self.error, self.calls = error, list[int]()

    def fcntl(self, _: int, command: int) -> int:
        self.calls.append(command)
        if self.error is not None:
            raise OSError(self.error, os.strerror(self.error))
        return 0


@pytest.mark.parametrize(
    ("error", "fsyncs"), [(None, 0), (errno.ENOTSUP, 1), (errno.EINVAL, 1), (errno.ENOTTY, 1), (errno.EIO, None)]
)
def test_macos_flushes_the_drive_s_cache_or_where_that_is_unknown_as_everyone_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int | None, fsyncs: int | None
) -> None:
    calls = list[int]()
    monkeypatch.setattr(disk, "fcntl", FullSync(error))
    monkeypatch.setattr(disk, "os", handmade.like(os, fsync=calls.append))
    with open(tmp_path / "x", "wb") as file:
        if fsyncs is None:
            with pytest.raises(OSError, match=os.strerror(errno.EIO)):
                disk.flush(file.fileno())
            assert calls == [], "after a failed flush nothing is known: no second try"
        else:
            disk.flush(file.fileno())
            assert calls == [file.fileno()] * fsyncs
    assert disk.fcntl.calls == [FullSync.F_FULLFSYNC]


@pytest.mark.parametrize("error", [errno.EINVAL, errno.ENOTSUP, errno.EIO])
def test_a_drive_that_cannot_flush_directories_is_written_to_and_one_that_fails_is_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    def refuse(_: int) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(disk, "os", handmade.like(os, fsync=refuse))
    if error == errno.EIO:
        with pytest.raises(OSError, match=os.strerror(error)):
            disk.sync_directory(tmp_path)
    else:
        disk.sync_directory(tmp_path)


def test_advice_that_is_not_taken_stops_no_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(disk, "os", handmade.like(os, posix_fadvise=refuse))
    must_round_trip(tmp_path)


def test_where_the_cache_cannot_be_dropped_files_are_written_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "os", handmade.like(os, "posix_fadvise", "POSIX_FADV_DONTNEED"))
    monkeypatch.setattr(disk, "fcntl", FullSync(None))
    must_round_trip(tmp_path)


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system cannot be asked to drop its cache")
def test_the_whole_file_is_dropped_from_the_cache_before_it_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = list[tuple[Any, ...]]()

    def advise(_: int, *arguments: int) -> None:
        events.append(arguments)

    def preadv(*arguments: Any) -> int:
        events.append(("read",))
        return os.preadv(*arguments)

    monkeypatch.setattr(disk, "os", handmade.like(os, posix_fadvise=advise, preadv=preadv))
    format.save(tmp_path / "x", SAVED, {})
    reads = events.index(("read",))
    assert events[reads - 1] == (0, 0, os.POSIX_FADV_DONTNEED)


# --- small files and names --------------------------------------------------------------------------------------------


def test_a_small_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "small.json"
    disk.replace(path, b"one")
    disk.replace(path, b"three")
    assert disk.read(path) == b"three" and disk.names(tmp_path) == ["small.json"]
    monkeypatch.setattr(disk, "flush", failing(errno.ENOSPC))
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        disk.replace(path, b"five")
    assert disk.read(path) == b"three" and disk.names(tmp_path) == ["small.json"]


def test_an_append_cuts_off_what_an_earlier_one_left_half_done(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    assert disk.append(path, b"one\n", disk.file_size(path)) == 4
    assert disk.append(path, b"two\n", 4) == 8
    with open(path, "ab") as file:
        file.write(b"half")
    assert disk.append(path, b"three\n", 8) == 14
    assert disk.append(path, b"four\n", 100) == 19, "a file that is shorter than it was is continued as it is"
    disk.flush_with_name(path)
    assert disk.read(path) == b"one\ntwo\nthree\nfour\n"
    with pytest.raises(FileNotFoundError):
        disk.flush_with_name(tmp_path / "absent")


def test_only_regular_files_exist_and_have_names(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "b").touch()
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "dangling").symlink_to("absent")
    assert disk.names(tmp_path) == ["a", "b"] and disk.names(tmp_path / "absent") == []
    there = ["a", "b", "folder", "dangling", "b/c", "absent"]
    assert [disk.exists(tmp_path / name) for name in there] == [True, True, False, False, False, False]
    disk.remove(tmp_path / "a")
    disk.remove(tmp_path / "a")
    assert disk.names(tmp_path) == ["b"]
    with pytest.raises(OSError):
        disk.remove(tmp_path / "folder")
    with pytest.raises(OSError):
        disk.names(tmp_path / "b")


def test_every_directory_on_the_way_is_on_the_disk_before_the_next_one_is_made_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = list[tuple[str, str]]()

    def note(name: str) -> None:
        real = getattr(os, name) if name == "mkdir" else disk.sync_directory

        def noted(path: Path, *rest: Any) -> None:
            events.append((name, path.name))
            real(path, *rest)

        if name == "mkdir":
            monkeypatch.setattr(disk, "os", handmade.like(os, mkdir=noted))
        else:
            monkeypatch.setattr(disk, name, noted)

    note("mkdir")
    note("sync_directory")
    disk.make_directory(tmp_path / "a" / "b")
    assert events == [("mkdir", "a"), ("sync_directory", tmp_path.name), ("mkdir", "b"), ("sync_directory", "a")]
    disk.make_directory(tmp_path / "a" / "b")
    assert len(events) == 4, "what is there is there"


def test_a_directory_that_another_process_makes_at_the_same_moment_is_fine_and_a_file_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_late(path: Path) -> None:
        os.mkdir(path)
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))

    monkeypatch.setattr(disk, "os", handmade.like(os, mkdir=too_late))
    disk.make_directory(tmp_path / "a")
    assert (tmp_path / "a").is_dir()
    monkeypatch.undo()
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError):
        disk.make_directory(tmp_path / "file")
    with pytest.raises(OSError):
        disk.make_directory(tmp_path / "file" / "below")


def test_free_space_is_told_of_a_directory_that_is_not_made_yet(tmp_path: Path) -> None:
    assert disk.free_bytes(tmp_path / "not" / "yet" / "made") > 0


# --- the lock ---------------------------------------------------------------------------------------------------------


def test_a_lock_is_held_by_one_until_it_lets_go(tmp_path: Path) -> None:
    one, two = disk.Lock(tmp_path / ".lock"), disk.Lock(tmp_path / ".lock")
    assert one.acquire() and one.acquire() and not two.acquire()
    one.release()
    one.release()
    assert two.acquire() and not one.acquire()
    two.release()
    assert disk.names(tmp_path) == [".lock"]


def test_a_lock_whose_file_was_deleted_is_made_anew_and_of_two_holders_the_first_to_notice_gets_it(tmp_path: Path) -> None:
    one, two = disk.Lock(tmp_path / ".lock"), disk.Lock(tmp_path / ".lock")
    assert one.acquire()
    (tmp_path / ".lock").unlink()
    assert two.acquire() and not one.acquire()
    two.release()
    (tmp_path / ".lock").unlink()
    assert one.acquire() and one.acquire()
    one.release()


def test_a_lock_file_that_vanishes_while_it_is_taken_guards_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def vanish(_: int) -> bool:
        (tmp_path / ".lock").unlink()
        return True

    monkeypatch.setattr(disk, "_try_lock", vanish)
    assert not disk.Lock(tmp_path / ".lock").acquire()


def test_a_lock_is_never_made_through_a_link(tmp_path: Path) -> None:
    (tmp_path / ".lock").symlink_to("precious")
    with pytest.raises(OSError):
        disk.Lock(tmp_path / ".lock").acquire()
    assert not (tmp_path / "precious").exists()


def test_a_system_that_cannot_lock_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if disk.fcntl is None:
        pytest.skip("this system locks in another way")
    monkeypatch.setattr(disk, "fcntl", handmade.like(disk.fcntl, flock=failing(errno.ENOLCK)))
    with pytest.raises(OSError, match=os.strerror(errno.ENOLCK)):
        disk.Lock(tmp_path / ".lock").acquire()
