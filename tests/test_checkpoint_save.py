"""Saving one file: in which order, never through a link, with calls that the system cuts short."""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import handmade
import numpy as np
import pytest
import tiny
from handmade import OTHER, must_hold_other

from oxidizr_ref.checkpoint import disk, format
from oxidizr_ref.errors import CheckpointError

Plant: TypeAlias = Callable[[Path], object]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A small checkpoint that a save is going to replace; nothing else is beside it."""
    return handmade.small_file(tmp_path / "small.safetensors")


@pytest.fixture
def many_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 64 bytes: `OTHER` has 38 of them."""
    monkeypatch.setattr(format, "CHUNK_BYTES", 64)


# --- the order of things ----------------------------------------------------------------------------------------------


def test_written_flushed_dropped_from_the_cache_read_back_renamed_and_the_directory_flushed_in_this_order(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []

    def note(name: str) -> None:
        real = getattr(disk, name)

        def noted(*arguments: Any) -> Any:
            whole_file = name != "forget_cached" or arguments[1:] in ((), (0, 0))
            if whole_file and events[-1:] != [name]:
                events.append(name)
            return real(*arguments)

        monkeypatch.setattr(disk, name, noted)

    for name in ("create", "write_at", "flush", "forget_cached", "read_at", "close", "rename", "sync_directory"):
        note(name)
    format.save(path, OTHER, {})
    wanted = ["create", "write_at", "flush", "forget_cached", "read_at", "close", "rename", "sync_directory"]
    assert events == wanted
    must_hold_other(path)


def test_file_and_directory_are_flushed_around_the_rename(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    def fsync(descriptor: int) -> None:
        events.append("directory" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        os.fsync(descriptor)

    def replace(*paths: Any) -> None:
        events.append("rename")
        os.replace(*paths)

    monkeypatch.setattr(disk, "os", handmade.like(os, fsync=fsync, replace=replace))
    format.save(path, OTHER, {})
    assert events == ["file", "rename", *([] if os.name == "nt" else ["directory"])]


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.usefixtures("many_chunks")
def test_any_number_of_threads_writes_the_same_bytes(path: Path, threads: int) -> None:
    sizes = dict(zip("abcdefg", (0, 1, 63, 64, 65, 640, 12345), strict=True))
    saved = {name: np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8) for name, size in sizes.items()}
    with tiny.threads(1):
        format.save(path, saved, {})
    wanted = path.read_bytes()
    with tiny.threads(threads):
        format.save(path, saved, {})
        assert path.read_bytes() == wanted
        assert {name: array.tobytes() for name, array in format.load(path).tensors.items()} == {
            name: array.tobytes() for name, array in saved.items()
        }


# --- links, pipes, directories, permissions ---------------------------------------------------------------------------


@pytest.fixture(params=["target", "temporary"])
def put_in_the_way(request: pytest.FixtureRequest, path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Plant], None]:
    """Puts something where the file is to stand, or where its temporary file is to be made, at the last moment."""

    def arrange(plant: Plant) -> None:
        if request.param == "target":
            path.unlink()
            plant(path)
            return
        create = disk.create

        def creating(temporary: Path) -> int:
            assert temporary.parent == path.parent != temporary
            plant(temporary)
            return create(temporary)

        monkeypatch.setattr(disk, "create", creating)

    return arrange


@pytest.mark.parametrize("dangling", [False, True])
def test_saving_never_writes_through_a_link(
    path: Path, put_in_the_way: Callable[[Plant], None], tmp_path_factory: pytest.TempPathFactory, dangling: bool
) -> None:
    precious = tmp_path_factory.mktemp("elsewhere") / "precious"
    if not dangling:
        precious.write_text("precious")
    put_in_the_way(lambda place: place.symlink_to(precious))
    format.save(path, OTHER, {})
    assert not path.is_symlink()
    must_hold_other(path)
    assert precious.exists() != dangling and (dangling or precious.read_text() == "precious")


def test_a_hard_link_to_the_older_file_keeps_the_older_content(path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    before, backup = path.read_bytes(), tmp_path_factory.mktemp("elsewhere") / "backup"
    os.link(path, backup)
    format.save(path, OTHER, {})
    assert backup.read_bytes() == before
    must_hold_other(path)


def test_what_a_dead_process_of_this_number_left_is_replaced(path: Path, put_in_the_way: Callable[[Plant], None]) -> None:
    put_in_the_way(lambda place: place.write_bytes(bytes(100_000)))
    format.save(path, OTHER, {})
    must_hold_other(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes with names")
def test_a_pipe_in_the_way_is_replaced_and_nobody_waits_for_its_reader(
    path: Path, put_in_the_way: Callable[[Plant], None]
) -> None:
    put_in_the_way(os.mkfifo)
    format.save(path, OTHER, {})
    must_hold_other(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes with names")
@pytest.mark.parametrize("read", [format.load, format.verify, format.read_header, format.mapped])
def test_a_pipe_is_refused_when_read_and_nobody_waits_for_its_writer(tmp_path: Path, read: Callable[[Path], Any]) -> None:
    os.mkfifo(tmp_path / "pipe")
    errors = list[str]()

    def reading() -> None:
        try:
            read(tmp_path / "pipe")
        except CheckpointError as error:
            errors.append(str(error))

    reader = threading.Thread(target=reading, daemon=True)  # so that a test that fails does not hang
    reader.start()
    reader.join(10)
    assert errors == [f"{tmp_path / 'pipe'}: cannot be read (not a regular file)"]


def test_a_directory_in_the_way_is_an_os_error_and_stays(path: Path, put_in_the_way: Callable[[Plant], None]) -> None:
    places = list[Path]()

    def plant(place: Path) -> None:
        places.append(place)
        (place / "something").mkdir(parents=True)

    put_in_the_way(plant)
    with pytest.raises(OSError):
        format.save(path, OTHER, {})
    assert (places[0] / "something").is_dir()
    assert {entry.name for entry in path.parent.iterdir()} == {path.name, places[0].name}


def test_a_missing_directory_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        format.save(tmp_path / "absent" / "x", OTHER, {})


@pytest.mark.skipif(os.name == "nt", reason="there are no such permissions there")
@pytest.mark.parametrize("umask", [0o000, 0o022, 0o027, 0o077])
def test_permissions_are_what_the_umask_says(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        format.save(tmp_path / "x", OTHER, {})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o666 & ~umask


# --- short calls ------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "pwrite"), reason="this system has no pwrite")
@pytest.mark.parametrize("most", [1, 7, 100])
def test_writes_and_reads_that_the_system_cuts_short_are_completed(
    path: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    calls = {"pwrite": 0, "preadv": 0}

    def pwrite(descriptor: int, data: memoryview, offset: int) -> int:
        calls["pwrite"] += 1
        return os.pwrite(descriptor, data[:most], offset)

    def preadv(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        calls["preadv"] += 1
        return os.preadv(descriptor, [buffers[0][:most]], offset)

    monkeypatch.setattr(disk, "os", handmade.like(os, pwrite=pwrite, preadv=preadv))
    format.save(path, OTHER, {})
    format.load(path)
    assert calls["pwrite"] >= path.stat().st_size // most <= calls["preadv"]
    monkeypatch.undo()
    must_hold_other(path)


def test_a_disk_that_writes_nothing_at_all_is_an_os_error_not_an_endless_loop(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, calls = tiny.snapshot(path.parent), list[int]()

    def nothing(_: int, __: memoryview, offset: int) -> int:
        calls.append(offset)
        assert len(calls) < 100
        return 0

    monkeypatch.setattr(disk, "os", handmade.like(os, pwrite=nothing))
    with pytest.raises(OSError, match="nothing could be written") as caught:
        format.save(path, OTHER, {})
    assert caught.value.errno == errno.EIO and tiny.snapshot(path.parent) == before
