"""Saving in the background: the same bytes, none skipped, no error lost, whatever training does meanwhile."""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from oxidizr_ref.checkpoint import disk, format
from oxidizr_ref.checkpoint.saver import Saver
from oxidizr_ref.checkpoint.store import CheckpointStore
from oxidizr_ref.config import load_config
from oxidizr_ref.errors import CheckpointError
from oxidizr_ref.memory import estimate_memory
from oxidizr_ref.model import LanguageModel
from oxidizr_ref.optim import AdamW
from oxidizr_ref.trainer import Trainer

ASYNC = ("--set", "trainer.async_save=true")
TRAINER = {"max_steps": 12, "save_interval": 3}
#: Seconds that writing waits for training to do two steps, which on a busy machine may take long.
PATIENCE = 30.0


def in_background() -> bool:
    return threading.current_thread().name.startswith("save-")


@pytest.fixture
def sleepy(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Writing in the background sleeps before every tensor: before the first of all until training has done two more steps.
    Returns the number of optimizer updates made meanwhile, one entry a tensor."""
    meanwhile: list[int] = []
    updates = [0]
    step, write = AdamW.step, disk.write_at

    def counted(self: AdamW, *arguments: Any) -> Any:
        result = step(self, *arguments)
        updates[0] = self.updates
        return result

    def slow(descriptor: int, data: disk.Buffer, offset: int) -> None:
        if in_background():
            # The first file is that of this step; however late writing begins, training cannot get past the next one.
            before = updates[0] if meanwhile else TRAINER["save_interval"]
            deadline = time.monotonic() + (0.01 if meanwhile else PATIENCE)
            while updates[0] < before + 2 and time.monotonic() < deadline:
                time.sleep(0.001)
            meanwhile.append(updates[0] - before)
        write(descriptor, data, offset)

    monkeypatch.setattr(AdamW, "step", counted)
    monkeypatch.setattr(disk, "write_at", slow)
    return meanwhile


def both(root: Path) -> tuple[tiny.Run, tiny.Run]:
    run = tiny.make_run(root, {"hidden_size": 8, "intermediate_size": 8}, TRAINER)
    return run.into("at_once"), run.into("in_background")


@pytest.mark.thorough
def test_files_written_while_training_goes_on_have_the_bytes_of_files_written_at_once(
    tmp_path: Path, sleepy: list[int]
) -> None:
    at_once, background = both(tmp_path)
    assert at_once.train() == 0 and not sleepy
    assert background.train(*ASYNC) == 0
    assert max(sleepy) >= 2, "training went on between two tensors of one file"
    assert tiny.step_files(background.directory) == tiny.step_files(at_once.directory)
    assert background.steps() == [3, 6, 9, 12], "none was skipped"
    assert background.metrics() == at_once.metrics()


@pytest.mark.thorough
def test_the_test_above_would_see_a_torn_snapshot(
    tmp_path: Path, sleepy: list[int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without the copy a file mixes steps; or, where a tensor changed between hashing and writing it, is refused."""
    at_once, background = both(tmp_path)
    assert at_once.train() == 0
    monkeypatch.setattr(Saver, "_copy", lambda _, tensors: dict(tensors))
    background.train(*ASYNC)
    assert max(sleepy) >= 2
    whole, torn = tiny.step_files(at_once.directory), tiny.step_files(background.directory)
    mixed = [step for step in torn if torn[step] != whole[step]]
    assert mixed or "the disk gave back other bytes" in capsys.readouterr().err


def test_a_snapshot_is_deep_and_its_words_are_frozen(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    tensors, words = {"x": np.zeros(1000), "y": np.ones(3, np.float32)}, {"progress": '{"step":1}', "note": "before"}
    gate = threading.Event()
    save = store.save

    def gated(*arguments: Any) -> Path:
        gate.wait()
        return save(*arguments)

    store.save = gated  # type: ignore[method-assign]
    with store.claimed():
        saver = Saver(store, background=True)
        saver.save(1, tensors, words)
        tensors["x"] += 1
        words["note"] = "after"
        gate.set()
        assert [done.step for done in saver.finished(wait=True)] == [1]
    loaded = format.load(tmp_path / "step_1.safetensors")
    assert not loaded.tensors["x"].any() and loaded.metadata["note"] == "before"


def test_a_second_save_waits_for_the_first_and_reuses_its_memory(tmp_path: Path) -> None:
    store, order = CheckpointStore(tmp_path), list[str]()
    save = store.save

    def noted(step: int, tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> Path:
        order.append(f"begin {step} in {tensors['x'].ctypes.data}")
        time.sleep(0.02)
        path = save(step, tensors, metadata)
        order.append(f"end {step}")
        return path

    store.save = noted  # type: ignore[method-assign]
    with store.claimed():
        saver = Saver(store, background=True)
        for step in (1, 2, 3):
            saver.save(step, {"x": np.full(4, step)}, {"progress": f'{{"step":{step}}}'})
        assert [done.step for done in saver.finished(wait=True)] == [1, 2, 3]
    assert [line.split()[:2] for line in order] == [[word, str(step)] for step in (1, 2, 3) for word in ("begin", "end")]
    assert len({line.split()[-1] for line in order if "begin" in line}) == 1
    assert [format.load(store.path(step)).tensors["x"][0] for step in (1, 2, 3)] == [1, 2, 3]


def failing_for(run: tiny.Run, steps: set[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full whenever one of these steps' files is about to get its name."""
    rename = disk.rename

    def full(source: Path, target: Path) -> None:
        if target in {run.path(step) for step in steps}:
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        rename(source, target)

    monkeypatch.setattr(disk, "rename", full)


@pytest.mark.parametrize("flags", [(), ASYNC], ids=["at once", "in the background"])
def test_a_failed_save_is_told_and_training_goes_on_to_the_next(
    tmp_path: Path, flags: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tiny.make_run(tmp_path, trainer=TRAINER)
    undisturbed = run.into("undisturbed")
    assert undisturbed.train() == 0
    failing_for(run, {6}, monkeypatch)
    capsys.readouterr()
    assert run.train(*flags) == 0, "the last save went well"
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert "step_6.safetensors: cannot be written (No space left on device)" in warning and "training goes on" in warning
    expected = tiny.step_files(undisturbed.directory)
    del expected[6]
    assert tiny.step_files(run.directory) == expected
    assert run.metrics() == undisturbed.metrics()
    assert [path.name for path in run.directory.glob(".*")] == [".lock"]


@pytest.mark.parametrize("flags", [(), ASYNC], ids=["at once", "in the background"])
def test_a_run_whose_last_save_failed_ends_with_1_and_an_error(
    tmp_path: Path, flags: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tiny.make_run(tmp_path, trainer=TRAINER)
    failing_for(run, {9, 12}, monkeypatch)
    assert run.train(*flags) == 1
    err = capsys.readouterr().err.splitlines()
    assert err[-1].startswith("error: ") and "step_12.safetensors: cannot be written" in err[-1]
    assert run.steps() == [3, 6]


@pytest.mark.parametrize("flags", [(), ASYNC], ids=["at once", "in the background"])
@pytest.mark.skipif(os.name == "nt", reason="this system has no such signals")
def test_stopped_while_nothing_can_be_saved_is_a_failure_not_a_stop(
    tmp_path: Path, flags: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tiny.make_run(tmp_path, trainer=TRAINER)
    failing_for(run, {3, 4, 5}, monkeypatch)
    with tiny.after_step(4, lambda: os.kill(os.getpid(), signal.SIGTERM)):
        assert run.train(*flags) == 1
    assert "which is not saved" in capsys.readouterr().err
    assert run.steps() == []


@pytest.mark.thorough
@pytest.mark.skipif(os.name == "nt", reason="this system has no such signals")
def test_a_signal_while_a_file_is_written_waits_for_it(
    tmp_path: Path, sleepy: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "PATIENCE", 0.5)  # training is stopped after one step: the second never comes
    at_once, background = both(tmp_path)
    assert at_once.train() == 0
    with tiny.after_step(4, lambda: os.kill(os.getpid(), signal.SIGTERM)):
        assert background.train(*ASYNC) == 143
    assert sleepy, "step 3 was being written"
    assert background.steps() == [3, 4]
    assert tiny.sha256(background.path(3)) == tiny.sha256(at_once.path(3))
    assert background.train(*ASYNC, "--resume", "auto") == 0
    assert tiny.step_files(background.directory).items() >= tiny.step_files(at_once.directory).items()


def test_what_is_no_fault_of_the_disk_is_raised_at_the_next_step(tmp_path: Path) -> None:
    """A sound file of the same step with other bytes: determinism was broken, and nothing may hide that."""
    run = tiny.make_run(tmp_path, trainer=TRAINER)
    other = run.into("other")
    assert other.train("--seed", "5", "--max-steps", "3") == 0
    config = load_config(run.config, [f"trainer.checkpoint_dir={run.directory}", "trainer.async_save=true"])
    trainer = Trainer(config, LanguageModel(config.model, 0))

    def plant() -> None:
        run.path(3).write_bytes(other.path(3).read_bytes())

    record: list[int] = []
    step = trainer.train_step

    def noted(*arguments: Any) -> Any:
        if trainer.step == 2:
            plant()
        result = step(*arguments)
        record.append(trainer.step)
        return result

    trainer.train_step = noted  # type: ignore[method-assign]
    with pytest.raises(CheckpointError, match="determinism was broken"):
        trainer.fit()
    assert record[-1] < 12, "it did not train to the end"


def test_the_snapshot_is_in_the_memory_estimate_to_the_byte(tmp_path: Path) -> None:
    run = tiny.make_run(tmp_path)
    for dtype in ("f32", "bf16"):
        plain, background = (
            load_config(run.config, [f"model.dtype={dtype}", f"trainer.async_save={value}"]) for value in ("false", "true")
        )
        trainer = Trainer(background, LanguageModel(background.model, 0))
        arrays = {**trainer.model.state_dict(), **trainer.optimizer.state_dict()}
        size = sum(array.nbytes for array in arrays.values())
        assert estimate_memory(background).snapshot == size
        assert estimate_memory(background).total - estimate_memory(plain).total == size


def test_work_in_the_background_leaves_the_tile_threads_to_training(tmp_path: Path) -> None:
    """What is hashed and written there is hashed and written by that thread alone."""
    seen: set[str] = set()
    write: Callable[..., None] = disk.write_at

    def noted(*arguments: Any) -> None:
        seen.add(threading.current_thread().name)
        write(*arguments)

    store = CheckpointStore(tmp_path)
    with pytest.MonkeyPatch.context() as patch, tiny.threads(3), store.claimed():
        patch.setattr(disk, "write_at", noted)
        saver = Saver(store, background=True)
        saver.save(1, {f"x{i}": np.zeros(1 << 16) for i in range(8)}, {"progress": '{"step":1}'})
        saver.finished(wait=True)
    assert seen == {"save-1"}
