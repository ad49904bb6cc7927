"""A disk that is really full, and one that has become read-only: a file system of one megabyte, mounted for the test."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tiny

from oxidizr_ref.checkpoint import format
from oxidizr_ref.checkpoint.store import CheckpointStore
from oxidizr_ref.errors import SaveError

SIZE = 1 << 20


def _mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte in memory. Skipped where this user may not mount one."""
    place = tmp_path / "small"
    place.mkdir()
    try:
        _mount("-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(place))
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no file system can be mounted here: {getattr(error, 'stderr', None) or error}")
    try:
        yield place
    finally:
        while os.path.ismount(place):
            subprocess.run(["umount", "-l", str(place)], check=True)


def _make_read_only(place: Path) -> None:
    """Lay the same file system over itself, read-only. (Open files, and the lock is one, forbid to change the mount.)"""
    _mount("--bind", str(place), str(place))
    _mount("-o", "remount,bind,ro", str(place))


def _save(store: CheckpointStore, step: int) -> None:
    numbers = np.full(25_000, step, dtype=np.float64)  # 200 kB
    store.save(step, {"x": numbers}, {"progress": f'{{"step":{step}}}'})


def test_a_full_disk_is_told_leaves_the_files_before_and_takes_the_next_save_when_there_is_room(small: Path) -> None:
    store = CheckpointStore(small / "run")
    with store.claimed():
        store.open({})
        with pytest.raises(SaveError, match=f"{os.strerror(errno.ENOSPC)}.*free some space"):
            for step in range(1, 10):
                store.log({"step": step})
                before = tiny.snapshot(small / "run")
                _save(store, step)
        assert 3 < step < 7  # four or five files of 200 kB fit, and what stands beside them
        assert tiny.snapshot(small / "run") == before
        store.path(1).unlink()
        _save(store, step)
        assert store.steps() == list(range(2, step + 1))
        for path in map(store.path, store.steps()):
            format.verify(path)


def test_lines_that_a_full_disk_took_by_half_are_whole_when_there_is_room(small: Path) -> None:
    store = CheckpointStore(small / "run")
    with store.claimed():
        store.open({})
        filler = small / "filler"
        filler.write_bytes(bytes(SIZE - 64 * 1024))
        failed = 0
        for step in range(1, 40):
            try:
                store.log({"step": step, "text": "x" * 3000})
            except SaveError:
                failed += 1
        assert failed > 5
        filler.unlink()
        store.log({"step": 40})
    assert [record["step"] for record in tiny.metrics_of(small / "run")] == list(range(1, 41))


def test_training_on_a_full_disk_goes_on_exits_1_and_is_resumed_when_there_is_room(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tiny.make_run(tmp_path, trainer={"max_steps": 12, "save_interval": 2})
    assert run.train() == 0
    expected, size = tiny.step_files(run.directory), run.path(2).stat().st_size
    filler = small / "filler"
    filler.write_bytes(bytes(SIZE - 3 * size))  # room for two files and what stands beside them
    on_it = tiny.Run(tmp_path, run.config, run.text, small / "run")
    capsys.readouterr()
    assert on_it.train() == 1
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 12  # a line each step, to the last
    warned = {text.split(": ")[1] for text in err.splitlines() if "training goes on" in text}
    assert warned == {str(on_it.path(step)) for step in (6, 8, 10, 12)}
    assert err.splitlines()[-1].startswith("error: ") and "Traceback" not in err
    assert tiny.step_files(on_it.directory) == {step: expected[step] for step in (2, 4)}
    filler.unlink()
    assert on_it.train("--resume", "auto") == 0
    assert tiny.step_files(on_it.directory) == expected
    assert on_it.metrics() == run.metrics()


def test_training_on_a_disk_that_becomes_read_only_goes_on_exits_1_and_is_resumed_when_it_is_writable_again(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tiny.make_run(tmp_path, trainer={"max_steps": 8, "save_interval": 2})
    assert run.train() == 0
    on_it = tiny.Run(tmp_path, run.config, run.text, small / "run")
    capsys.readouterr()
    with tiny.after_step(5, lambda: _make_read_only(small)):
        assert on_it.train() == 1
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 8
    assert os.strerror(errno.EROFS) in err and "Traceback" not in err
    assert on_it.steps() == [2, 4]
    subprocess.run(["umount", str(small)], check=True)
    assert on_it.train("--resume", "auto") == 0
    assert tiny.step_files(on_it.directory) == tiny.step_files(run.directory)
    assert on_it.metrics() == run.metrics()
