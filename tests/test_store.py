"""The checkpoint directory: in which order things reach the disk, whose it is, which files stay, and which stored numbers
are not believed."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from oxidizr_ref.checkpoint import disk, format, state
from oxidizr_ref.checkpoint.store import CheckpointStore, Retention
from oxidizr_ref.errors import CheckpointError, MismatchError, SaveError, UsageError

TENSORS = {"x": np.arange(3.0)}


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
    assert disk.calls == [
        ("sync", metrics),
        ("sync", directory),  # the name of the metrics file
        ("sync", file),
        ("rename", file, "step_7.safetensors"),
        ("sync", directory),
    ]


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
    directory = run.directory.stat().st_ino
    for n in renames:
        assert disk.calls[n - 3 : n] == [("sync", metrics), ("sync", directory), ("sync", disk.calls[n][1])]


# --- one process a directory --------------------------------------------------------------------------------------------


def test_a_second_process_is_refused_until_the_first_one_has_ended(tmp_path: Path) -> None:
    run = tiny.make_run(tmp_path, trainer={"max_steps": 2, "save_interval": 1})
    first = CheckpointStore(run.directory)
    with first.claimed():
        first.open({})
        process = tiny.start(run.argv("--resume", "auto"), tmp_path)
        out, err = tiny.finish(process, expected=2)
    assert out == "" and "another process is training into it" in err and err.count("\n") == 1
    assert run.train("--resume", "auto") == 0


def test_a_second_trainer_in_the_same_process_is_refused_too(tmp_path: Path) -> None:
    first, second = CheckpointStore(tmp_path), CheckpointStore(tmp_path)
    with first.claimed(), pytest.raises(UsageError, match="another process"), second.claimed():
        raise AssertionError("both hold the directory")
    with second.claimed():
        pass


@pytest.mark.thorough
def test_a_dead_process_holds_no_directory(tmp_path: Path) -> None:
    run = tiny.make_run(tmp_path, trainer={"max_steps": 4, "save_interval": 1})
    tiny.finish(tiny.start(run.argv(), tmp_path, {"TINY_KILL": "logged:2"}, small_tiles=True), expected=-9)
    tiny.finish(tiny.start(run.argv("--resume", "auto"), tmp_path, small_tiles=True))
    assert run.steps() == [1, 2, 3, 4]


@pytest.mark.parametrize("what", ["the lock", "everything"])
def test_what_is_deleted_by_hand_during_a_run_does_not_confuse_it(tmp_path: Path, what: str) -> None:
    run = tiny.make_run(tmp_path, trainer={"max_steps": 6, "save_interval": 2})
    undisturbed = run.into("undisturbed")
    assert undisturbed.train() == 0

    def delete() -> None:
        if what == "the lock":
            (run.directory / ".lock").unlink()
        else:
            shutil.rmtree(run.directory)

    with tiny.after_step(3, delete):
        assert run.train() == 0
    with CheckpointStore(run.directory).claimed():
        pass
    expected = tiny.step_files(undisturbed.directory)
    if what == "everything":
        del expected[2]
        assert [line["step"] for line in run.metrics()] == [4, 5, 6]
    assert tiny.step_files(run.directory) == expected


def test_a_save_is_refused_when_the_directory_was_taken_over_by_another_process(tmp_path: Path) -> None:
    first, second = CheckpointStore(tmp_path), CheckpointStore(tmp_path)
    with first.claimed():
        (tmp_path / ".lock").unlink()
        with second.claimed(), pytest.raises(SaveError, match="another process"):
            first.save(1, TENSORS, {"progress": '{"step":1}'})
        first.save(1, TENSORS, {"progress": '{"step":1}'})
    assert first.steps() == [1]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_where_files_cannot_be_locked_that_is_told_once_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(disk.fcntl, "flock", refuse)
    store = CheckpointStore(tmp_path)
    with store.claimed():
        store.open({})
        for step in (1, 2):
            store.save(step, TENSORS, {"progress": json.dumps({"step": step})})
    assert store.steps() == [1, 2]
    assert [("cannot be locked" in notice) for notice in store.notices] == [True]


# --- what is found ----------------------------------------------------------------------------------------------------


def test_a_file_that_is_deleted_while_auto_looks_is_as_if_it_had_never_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(tmp_path)
    for step in (1, 2):
        store.save(step, TENSORS, {"progress": json.dumps({"step": step})})
    load = format.load

    def deleted_just_before(path: Path) -> format.Checkpoint:
        if path == store.path(2):
            path.unlink()
        return load(path)

    monkeypatch.setattr(format, "load", deleted_just_before)
    found = store.find("auto")
    assert found is not None and found.path == store.path(1) and found.damaged == []


@pytest.mark.parametrize("note", ['{"superseding": {}}', '{"superseding": {"steps": [1]}}', '{"superseding": 1}', "null"])
def test_a_note_that_says_too_little_is_damage(tmp_path: Path, note: str) -> None:
    (tmp_path / "run.json").write_text(note)
    with pytest.raises(CheckpointError, match=r"run\.json: is damaged"):
        CheckpointStore(tmp_path).find("auto")


@pytest.mark.parametrize("version", ["0", "-1", "x"])
def test_a_format_version_that_never_was_is_refused(tmp_path: Path, version: str) -> None:
    run = tiny.make_run(tmp_path, trainer={"max_steps": 1})
    assert run.train() == 0
    tiny.rewrite(run.path(1), lambda _, metadata: metadata.update(format_version=version))
    with pytest.raises(CheckpointError, match="no training state of this format"):
        state.from_file(format.load(run.path(1)), "there")


# --- what stays -------------------------------------------------------------------------------------------------------

steps_of_a_run = st.sets(st.integers(0, 60), max_size=12)


@given(
    steps_of_a_run,
    st.integers(0, 4),
    st.integers(0, 7),
    st.integers(0, 3),
    st.dictionaries(st.integers(0, 60), st.floats(0, 9)),
)
def test_retention_lets_go_of_exactly_what_no_rule_keeps(
    steps: set[int], keep: int, every: int, best: int, losses: dict[int, float]
) -> None:
    needed = set(sorted(steps)[:1])
    gone = Retention(keep, every, best).lets_go(steps, losses, needed)
    assert gone == sorted(gone) and set(gone) <= steps
    if keep == 0:
        assert gone == []
        return
    by_loss = sorted((losses[step], step) for step in steps & losses.keys())
    for step in steps:
        newest = sum(other > step for other in steps) < keep
        multiple = every > 0 and step % every == 0
        among_best = (losses.get(step), step) in by_loss[:best]
        assert (step in gone) == (not (newest or multiple or among_best or step in needed))


def test_every_and_best_files_stay_beside_the_newest(tmp_path: Path) -> None:
    trainer = {"max_steps": 12, "save_interval": 1, "max_checkpoints": 2, "keep_every": 5}
    plain = tiny.make_run(tmp_path / "every", trainer=trainer)
    assert plain.train() == 0
    assert plain.steps() == [5, 10, 11, 12]
    trainer = {**trainer, "keep_every": 0, "keep_best": 2, "eval_interval": 1, "eval_fraction": 0.2, "learning_rate": 0.3}
    best = tiny.make_run(tmp_path / "best", trainer=trainer)
    assert best.train() == 0
    losses = {line["step"]: line["eval_loss"] for line in best.metrics()}
    lowest = sorted(losses, key=lambda step: losses[step])[:2]
    assert set(best.steps()) == {11, 12, *lowest}
    assert not set(lowest) <= {11, 12}, "at this learning rate the loss goes up again, so that keeping the best shows"


def test_best_files_stay_best_after_a_resume(tmp_path: Path) -> None:
    trainer = {"max_steps": 12, "save_interval": 1, "max_checkpoints": 2, "keep_best": 1}
    run = tiny.make_run(tmp_path, trainer={**trainer, "eval_interval": 1, "eval_fraction": 0.2, "learning_rate": 0.3})
    whole, resumed = run.into("whole"), run.into("resumed")
    assert whole.train() == 0
    with tiny.killed_after_step(8):
        resumed.train()
    assert resumed.train("--resume", "auto") == 0
    assert tiny.step_files(resumed.directory) == tiny.step_files(whole.directory)


def test_the_file_a_run_resumed_from_stays_until_the_run_ends(tmp_path: Path) -> None:
    run = tiny.make_run(tmp_path, trainer={"max_steps": 10, "save_interval": 2, "max_checkpoints": 1})
    with tiny.killed_after_step(5):
        run.train()
    seen: list[list[int]] = []
    with tiny.after_step(9, lambda: seen.append(run.steps())):
        assert run.train("--resume", "auto") == 0
    assert seen == [[4, 8]] and run.steps() == [10]


def test_files_are_let_go_only_after_a_save_that_proved_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(tmp_path, Retention(keep=2))
    with store.claimed():
        for step in (1, 2):
            store.save(step, TENSORS, {"progress": json.dumps({"step": step})})
        monkeypatch.setattr(disk, "read_at", lambda *_: 0)  # what is read back is not what was written
        with pytest.raises(SaveError, match="other bytes"):
            store.save(3, TENSORS, {"progress": '{"step":3}'})
        store.end()
    assert store.steps() == [1, 2]


def test_the_newest_whole_file_stays_though_files_of_higher_numbers_appear(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, Retention(keep=1))
    (tmp_path / "step_99.safetensors").write_bytes(b"put here by hand")
    with store.claimed():
        for step in (1, 2):
            store.save(step, TENSORS, {"progress": json.dumps({"step": step})})
        store.end()
    assert store.steps() == [2, 99]


def test_old_files_that_cannot_be_deleted_are_told_and_the_save_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(tmp_path, Retention(keep=1))

    def refuse(path: Path) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted", str(path))

    with store.claimed():
        store.save(1, TENSORS, {"progress": '{"step":1}'})
        monkeypatch.setattr(disk, "remove", refuse)
        assert store.save(2, TENSORS, {"progress": '{"step":2}'}) == store.path(2)
    assert store.steps() == [1, 2]
    assert store.notices == [f"{tmp_path}: old step files cannot be deleted (Operation not permitted)"]


@given(st.integers(0, 30), st.integers(1, 30), st.integers(1, 5), st.integers(0, 3), st.integers(0, 7))
def test_the_room_a_run_needs_is_what_it_then_takes_at_its_largest(
    tmp_path_factory: pytest.TempPathFactory, there: int, more: int, interval: int, keep: int, every: int
) -> None:
    """Files of one byte stand for checkpoints; the directory is watched through a whole run."""
    store = CheckpointStore(tmp_path_factory.mktemp("room"), Retention(keep, every))
    for step in range(1, there + 1):
        store.path(step).write_bytes(b"x")
    store.resumed_from = there or None
    coming = list(range(there + 1, there + more + 1, interval))
    predicted = store.most_bytes_more(10, coming)
    largest = 0
    for step in coming:
        store.path(step).write_bytes(b"x")
        largest = max(largest, len(store.steps()) - there)
        store._last_saved = step
        store._prune()
    assert predicted == 10 * largest


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
