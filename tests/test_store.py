"""The checkpoint directory: in which order things reach the disk, and which stored numbers are not believed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from oxidizr_ref.checkpoint import format, state
from oxidizr_ref.checkpoint.store import CheckpointStore
from oxidizr_ref.errors import CheckpointError, MismatchError


class Disk:
    """Every os.fsync and os.replace, in order: ("sync", inode) and ("rename", inode of the source, name of the target)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[Any, ...]] = []
        fsync, replace = os.fsync, os.replace

        def noted_fsync(descriptor: int) -> None:
            self.calls.append(("sync", os.fstat(descriptor).st_ino))
            fsync(descriptor)

        def noted_replace(source: Any, target: Any) -> None:
            self.calls.append(("rename", os.stat(source).st_ino, Path(target).name))
            replace(source, target)

        monkeypatch.setattr(os, "fsync", noted_fsync)
        monkeypatch.setattr(os, "replace", noted_replace)


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    """An open directory with one metric line."""
    store = CheckpointStore(tmp_path / "run")
    store.open({})
    store.log({"step": 7, "loss": 1.5})
    return store


@pytest.mark.skipif(os.name == "nt", reason="directories cannot be synced there")
def test_metrics_then_the_new_file_are_on_the_disk_before_it_gets_its_name_and_the_directory_after(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(monkeypatch)
    path = store.save(7, {"x": np.arange(3.0)}, {"progress": '{"step":7}'})
    metrics, file, directory = (p.stat().st_ino for p in (store.directory / "metrics.jsonl", path, store.directory))
    assert disk.calls == [("sync", metrics), ("sync", file), ("rename", file, "step_7.safetensors"), ("sync", directory)]


def test_metrics_lines_are_in_the_file_when_it_is_synced(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics, seen, fsync = store.directory / "metrics.jsonl", [], os.fsync

    def noted(descriptor: int) -> None:
        if os.fstat(descriptor).st_ino == metrics.stat().st_ino:
            seen.append(metrics.read_text())
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    store.save(7, {"x": np.arange(3.0)}, {"progress": '{"step":7}'})
    assert [json.loads(text) for text in seen] == [{"step": 7, "loss": 1.5}]


def test_a_run_syncs_its_metrics_before_each_step_file_appears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tiny.make_run(tmp_path, trainer={"max_steps": 4, "save_interval": 2})
    disk = Disk(monkeypatch)
    assert run.train() == 0
    metrics = (run.directory / "metrics.jsonl").stat().st_ino
    renames = [n for n, call in enumerate(disk.calls) if call[0] == "rename" and call[2].startswith("step_")]
    assert [disk.calls[n][2] for n in renames] == ["step_2.safetensors", "step_4.safetensors"]
    for n in renames:
        assert disk.calls[n - 2 : n] == [("sync", metrics), ("sync", disk.calls[n][1])]


# --- windows an epoch -------------------------------------------------------------------------------------------------


@pytest.fixture
def tampered(tmp_path: Path) -> tiny.Run:
    """A run of four steps whose last file says another number of windows an epoch, and the epoch that follows from it."""
    run = tiny.make_run(tmp_path, trainer={"max_steps": 8, "save_interval": 4})
    with tiny.killed_after_step(5):
        run.train()

    def change(_: dict[str, Any], metadata: dict[str, str]) -> None:
        progress = json.loads(metadata["progress"])
        assert progress["cursor"] == 16 and progress["windows_an_epoch"] > 16 and progress["epoch"] == 0
        tiny.edit_json(metadata, "progress", windows_an_epoch=5, epoch=16 // 5)

    tiny.rewrite(run.path(4), change)
    return run


def test_a_file_that_counts_other_windows_in_the_same_data_is_not_resumed(
    tampered: tiny.Run, capsys: pytest.CaptureFixture[str]
) -> None:
    format.verify(tampered.path(4))  # no bit of it is damaged
    before = tiny.snapshot(tampered.directory)
    capsys.readouterr()
    assert tampered.train("--resume", "auto") == CheckpointError.exit_code
    out, err = capsys.readouterr()
    assert out == "" and "windows" in err.splitlines()[-1] and "Traceback" not in err
    assert tiny.snapshot(tampered.directory) == before


def test_continue_from_raises_checkpoint_error_naming_both_numbers_of_windows(tampered: tiny.Run) -> None:
    saved = state.from_file(format.load(tampered.path(4)), "there")
    assert saved.windows_an_epoch == 5
    here = state.RunState(**{**vars(saved), "windows_an_epoch": 374})
    with pytest.raises(CheckpointError, match=r"5 windows there, 374 here") as caught:
        state.continue_from(saved, here, "there")
    assert not isinstance(caught.value, MismatchError)  # no flag accepts it
    assert state.continue_from(saved, saved, "there") == ([], [])


def test_an_epoch_that_does_not_follow_from_cursor_and_windows_is_refused(tampered: tiny.Run) -> None:
    tiny.rewrite(tampered.path(4), lambda _, metadata: tiny.edit_json(metadata, "progress", epoch=0))
    with pytest.raises(CheckpointError, match="epoch"):
        state.from_file(format.load(tampered.path(4)), "there")
