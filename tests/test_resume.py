"""Resuming: what continues, what is refused, which branch is taken, and what stays on the disk when a run ends badly."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import architectures
import numpy as np
import pytest
import tiny

from oxidizr_ref.autograd import Tensor
from oxidizr_ref.checkpoint import format
from oxidizr_ref.config import load_config
from oxidizr_ref.errors import CheckpointError
from oxidizr_ref.interop.opened import open_model
from oxidizr_ref.model import LanguageModel
from oxidizr_ref.run import FirstWeights, Reporter, RunOptions
from oxidizr_ref.trainer import Trainer


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tiny.Run:
    """A run of 40 steps, saved every 10, with held-out text. Never changed: tests copy what they change."""
    run = tiny.make_run(tmp_path_factory.mktemp("done"), trainer={"eval_fraction": 0.2})
    assert run.train() == 0
    assert run.steps() == [10, 20, 30, 40]
    return run


@pytest.fixture
def copied(done: tiny.Run, tmp_path: Path) -> tiny.Run:
    """A copy of the finished run that may be changed."""
    shutil.copytree(done.root, tmp_path / "copy")
    return tiny.Run(
        tmp_path / "copy", tmp_path / "copy" / "tiny.yaml", tmp_path / "copy" / "text.txt", tmp_path / "copy/checkpoints"
    )


def until(run: tiny.Run, last: int) -> tiny.Run:
    """The run as it was when it had saved step ``last`` and was killed right after."""
    for step in run.steps():
        if step > last:
            run.path(step).unlink()
    lines = (run.directory / "metrics.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["step"] <= last and "final" not in line]
    (run.directory / "metrics.jsonl").write_text("".join(kept))
    return run


def superseded(run: tiny.Run) -> set[str]:
    return {
        path.relative_to(run.directory).as_posix() for path in (run.directory / "superseded").rglob("*") if path.is_file()
    }


def first_step_of(err: str) -> int:
    """The step that the run says it resumed at."""
    line = next(line for line in err.splitlines() if line.startswith("resumed "))
    return int(line.rpartition(" ")[2])


def steps_run(out: str) -> list[int]:
    return [json.loads(line)["step"] for line in out.splitlines()]


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    """The only line of stderr that tells an error; nothing like a traceback may be there."""
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, err
    assert "Traceback" not in err and err.splitlines()[-1] == lines[0]
    return lines[0]


# ----------------------------------------------------------------------------------------------------- what continues


def test_weights_moments_cursor_rate_and_metrics_continue(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    schedule = {"lr_schedule": "cosine", "warmup_steps": 5, "eval_fraction": 0.2}
    whole = tiny.make_run(tmp_path, trainer={"max_steps": 20, "save_interval": 5, **schedule})
    assert whole.train() == 0
    broken = whole.into("broken")
    capsys.readouterr()
    with tiny.killed_after_step(13):
        broken.train()
    assert [line["step"] for line in broken.metrics()] == list(range(1, 14))
    with open(broken.directory / "metrics.jsonl", "a") as file:
        file.write('{"step": 14, "loss": 5.')  # the kill came while a line was written
    capsys.readouterr()
    assert broken.train("--resume", "auto") == 0
    out, err = capsys.readouterr()
    assert first_step_of(err) == 10
    assert steps_run(out) == list(range(11, 21))
    assert tiny.step_files(broken.directory) == tiny.step_files(whole.directory)
    assert broken.metrics() == whole.metrics()
    assert tiny.lineage(broken.path(20)) == [], "a pure run has no lineage, however often it was resumed"


def test_a_resumed_trainer_holds_the_state_of_the_one_that_saved(tmp_path: Path) -> None:
    run = tiny.make_run(tmp_path, trainer={"max_steps": 8, "save_interval": 4})
    config = load_config(run.config)

    class Spy(Reporter):
        state: dict[str, bytes]
        place: tuple[int, int]

        def begin(self, trainer: Trainer) -> None:
            self.state, self.place = tiny.optimizer_arrays(trainer), (trainer.step, trainer.cursor)

    first = Trainer(config, LanguageModel(config.model, config.trainer.seed))
    with mock.patch.object(first, "_time_is_up", lambda began: first.step == 4):
        first.fit()
    spy = Spy()
    second = Trainer(config, LanguageModel(config.model, 999), options=RunOptions(resume="auto"), reporter=spy)
    second.fit()
    assert spy.state == tiny.optimizer_arrays(first)
    assert spy.place == (4, 4 * 2 * 2) == (first.step, first.cursor)
    assert second.optimizer.updates == 8
    arrays = [*second.model.state_dict().values(), *second.optimizer.state_dict().values()]
    assert all(array.flags.owndata and array.flags.c_contiguous and array.flags.aligned for array in arrays)


@pytest.mark.parametrize("architecture", architectures.NAMES)
def test_every_architecture_stopped_and_resumed_half_way_makes_the_same_bytes(tmp_path: Path, architecture: str) -> None:
    # bf16, so that the bits of stochastic rounding count too; the gradient clipped, held-out losses in the metrics.
    model = {**architectures.ARCHITECTURES[architecture], "dtype": "bf16"}
    trainer = {"save_interval": 3, "load_balance_alpha": 0.1, "max_grad_norm": 0.1, "eval_fraction": 0.2, "eval_interval": 2}
    run = tiny.make_run(tmp_path, model, trainer, characters=300)

    class Spy(Reporter):
        def __init__(self) -> None:
            self.begun_at, self.steps = -1, list[int]()

        def begin(self, trainer: Trainer) -> None:
            self.begun_at = trainer.step

        def step(self, record: dict[str, Any], logged: bool) -> None:  # noqa: ARG002
            self.steps.append(record["step"])

    def fit(into: str, last: int, weights: int) -> tuple[int, list[int]]:
        """A trainer of its own, whose model begins with the weights of a seed. Returns where it began, the steps it did."""
        settings = [f"trainer.checkpoint_dir={run.into(into).directory}", f"trainer.max_steps={last}"]
        config, spy = load_config(run.config, settings), Spy()
        with mock.patch("os.fsync"):  # slow, and of no concern here
            Trainer(config, LanguageModel(config.model, weights), options=RunOptions("auto"), reporter=spy).fit()
        return spy.begun_at, spy.steps

    assert fit("whole", 6, weights=0) == (0, [1, 2, 3, 4, 5, 6])
    assert fit("halves", 3, weights=0) == (0, [1, 2, 3])
    assert fit("halves", 6, weights=999) == (3, [4, 5, 6])
    whole, halves = run.into("whole"), run.into("halves")
    assert list(tiny.step_files(whole.directory)) == [3, 6]
    assert tiny.step_files(halves.directory) == tiny.step_files(whole.directory)
    assert halves.metrics() == whole.metrics()


def test_a_run_killed_before_its_first_file_starts_again_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tiny.make_run(tmp_path, trainer={"max_steps": 10})
    with tiny.killed_after_step(7):
        run.train("--resume", "auto")
    capsys.readouterr()
    assert run.train("--resume", "auto") == 0
    out, err = capsys.readouterr()
    assert "holds no step files; starting at step 0" in err
    assert steps_run(out) == list(range(1, 11)) == [line["step"] for line in run.metrics()]


def test_a_finished_run_says_so_changes_nothing_and_exits_0(
    done: tiny.Run, copied: tiny.Run, capsys: pytest.CaptureFixture[str]
) -> None:
    before = tiny.step_files(copied.directory)
    assert copied.train("--resume", "auto") == 0
    out, err = capsys.readouterr()
    assert out == "" and "finished: 40 of 40 steps are done" in err and "--max-steps" in err
    assert tiny.step_files(copied.directory) == before
    assert copied.metrics() == done.metrics()


def test_a_run_killed_between_its_last_file_and_its_last_line_gets_that_line(done: tiny.Run, copied: tiny.Run) -> None:
    metrics = copied.directory / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    assert "final" in lines[-1]
    metrics.write_text("".join(lines[:-1]))
    assert copied.train("--resume", "auto") == 0
    assert copied.metrics() == done.metrics()


def test_a_larger_max_steps_goes_on_as_if_it_had_been_there_from_the_start(
    done: tiny.Run, copied: tiny.Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert copied.train("--resume", "auto", "--max-steps", 60) == 0
    out, err = capsys.readouterr()
    assert first_step_of(err) == 40
    assert steps_run(out) == list(range(41, 61))
    whole = done.into("sixty")
    assert whole.train("--max-steps", 60) == 0
    assert tiny.step_files(copied.directory) == tiny.step_files(whole.directory)
    assert copied.metrics() == whole.metrics()
    assert tiny.lineage(copied.path(60)) == []


@pytest.mark.parametrize("name", ["backup.safetensors", "step_20.safetensors", "no suffix"])
def test_a_file_copied_elsewhere_resumes_from_there(
    done: tiny.Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    backup = shutil.copy(done.path(20), tmp_path / name)
    again = tiny.Run(done.root, done.config, done.text, tmp_path / "again")
    assert again.train("--resume", backup) == 0
    out, err = capsys.readouterr()
    assert (first_step_of(err), steps_run(out)) == (20, list(range(21, 41)))
    expected = {step: tiny.sha256(done.path(step)) for step in (20, 30, 40)}
    assert tiny.step_files(again.directory) == expected, "the branch begins with a file of its own"


@pytest.mark.parametrize("length", [("--max-steps", "40"), ("--set", "trainer.max_steps=40")])
def test_a_backup_resumes_without_its_config(
    done: tiny.Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    length: tuple[str, str],
) -> None:
    (tmp_path / "elsewhere").mkdir()
    backup = shutil.copy(done.path(20), tmp_path / "elsewhere" / "backup.safetensors")
    monkeypatch.chdir(tmp_path)
    flags = ("--save-interval", 10, "--max-checkpoints", 0, "--headless", *length)
    assert tiny.cli("train", "--resume", backup, "-d", done.text, *flags) == 0
    assert first_step_of(capsys.readouterr().err) == 20
    expected = {step: tiny.sha256(done.path(step)) for step in (20, 30, 40)}
    assert tiny.step_files(tmp_path / "elsewhere") == expected, "files go on beside the backup"


def test_a_step_file_resumes_in_place_without_its_config(copied: tiny.Run, capsys: pytest.CaptureFixture[str]) -> None:
    before = tiny.step_files(copied.directory)
    until(copied, 20)
    assert tiny.cli("train", "--resume", copied.path(20), "--headless") == 0
    out, err = capsys.readouterr()
    assert (first_step_of(err), steps_run(out)) == (20, list(range(21, 41)))
    assert tiny.step_files(copied.directory) == before


def test_a_backup_that_does_not_say_how_long_asks(
    done: tiny.Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    backup = shutil.copy(done.path(20), tmp_path / "backup.safetensors")
    before = tiny.snapshot(tmp_path)
    assert tiny.cli("train", "--resume", backup, "-d", done.text) == 2
    assert "--max-steps" in error_of(capsys)
    assert tiny.snapshot(tmp_path) == before


# ------------------------------------------------------------------------------------------------------------ branches


def test_auto_continues_the_new_branch_and_the_old_files_are_superseded(
    done: tiny.Run, copied: tiny.Run, capsys: pytest.CaptureFixture[str]
) -> None:
    """Train to 40, saving every 10; resume step_20 with another rate; kill at 33: auto continues from the new step_30."""
    old = tiny.step_files(copied.directory)
    other_rate = ("--set", "trainer.learning_rate=2e-2")
    with tiny.killed_after_step(33):
        copied.train("--resume", copied.path(20), *other_rate)
    err = capsys.readouterr().err
    assert err.count("moved step_30, step_40 and their metrics to") == 1
    new_30 = tiny.sha256(copied.path(30))
    assert new_30 != old[30]
    assert copied.steps() == [10, 20, 30]
    moved = copied.directory / "superseded" / "1"
    assert tiny.step_files(moved) == {30: old[30], 40: old[40]}
    assert tiny.metrics_of(moved) == done.metrics()[20:]

    assert copied.train("--resume", "auto", *other_rate) == 0
    out, err = capsys.readouterr()
    assert (first_step_of(err), steps_run(out)) == (30, list(range(31, 41)))
    assert tiny.sha256(copied.path(30)) == new_30 and tiny.sha256(copied.path(40)) != old[40]
    assert [line["step"] for line in copied.metrics()] == [*range(1, 41), 40]
    assert copied.metrics()[:20] == done.metrics()[:20]
    entry = {"step": 20, **dict.fromkeys(("config", "data", "fingerprint"), mock.ANY)}
    assert tiny.lineage(copied.path(30)) == [entry] == tiny.lineage(copied.path(40))
    assert superseded(copied) == {
        f"superseded/1/{name}" for name in ("step_30.safetensors", "step_40.safetensors", "metrics.jsonl")
    }


def test_going_back_twice_keeps_both_abandoned_branches(copied: tiny.Run) -> None:
    first = tiny.step_files(copied.directory)
    assert copied.train("--resume", copied.path(20), "--set", "trainer.learning_rate=2e-2") == 0
    second = tiny.step_files(copied.directory)
    assert copied.train("--resume", copied.path(10), "--set", "trainer.learning_rate=3e-2") == 0
    taken = copied.directory / "superseded"
    assert tiny.step_files(taken / "1") == {30: first[30], 40: first[40]}
    assert tiny.step_files(taken / "2") == {20: second[20], 30: second[30], 40: second[40]}
    assert copied.steps() == [10, 20, 30, 40]


def test_a_resume_of_an_earlier_step_with_nothing_changed_makes_the_same_files_again(copied: tiny.Run) -> None:
    before = tiny.step_files(copied.directory)
    assert copied.train("--resume", copied.path(10)) == 0
    assert (
        tiny.step_files(copied.directory) == before == {10: before[10], **tiny.step_files(copied.directory / "superseded/1")}
    )


def test_a_backup_of_another_run_begins_a_branch_that_auto_follows(
    done: tiny.Run, copied: tiny.Run, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is here under its number is another run's; killed before its first interval is over, auto is still on it."""
    other = copied.into("other")
    assert other.train("--set", "trainer.learning_rate=2e-2", "--max-steps", 20) == 0
    backup = other.path(20).rename(copied.root / "backup")
    with tiny.killed_after_step(25):
        copied.train("--resume", backup, "--set", "trainer.learning_rate=2e-2")
    assert "moved step_20, step_30, step_40" in capsys.readouterr().err
    assert copied.steps() == [10, 20]
    assert tiny.sha256(copied.path(20)) == tiny.sha256(backup)
    old = {step: tiny.sha256(done.path(step)) for step in (20, 30, 40)}
    assert tiny.step_files(copied.directory / "superseded/1") == old
    assert copied.train("--resume", "auto", "--set", "trainer.learning_rate=2e-2") == 0
    assert first_step_of(capsys.readouterr().err) == 20
    assert other.train("--resume", backup, "--set", "trainer.learning_rate=2e-2") == 0
    assert (
        tiny.step_files(copied.directory).items() >= {step: tiny.sha256(other.path(step)) for step in (20, 30, 40)}.items()
    )


@pytest.mark.thorough
def test_a_kill_at_any_rename_while_a_branch_is_moved_never_lets_auto_jump_back(
    copied: tiny.Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Dies at the first, second, … rename. Before the note in run.json nothing has moved and the old branch is the only one;
    from the note on, auto continues from 20."""
    pristine = tmp_path / "pristine"
    copied.directory.rename(pristine)
    old = tiny.step_files(pristine)
    other_rate = ("--set", "trainer.learning_rate=2e-2")
    for fatal in range(20):
        shutil.copytree(pristine, copied.directory)
        with _dying_at_rename(fatal, copied.directory) as renamed, tiny.killed_after_step(21):
            copied.train("--resume", copied.path(20), *other_rate)
        assert set(old.items()) == _all_files(copied), "nothing is lost"
        capsys.readouterr()
        assert copied.train("--resume", "auto", *other_rate) == 0
        out, err = capsys.readouterr()
        assert set(old.items()) <= _all_files(copied)
        if "run.json" in renamed:
            assert (first_step_of(err), steps_run(out)) == (20, list(range(21, 41))), renamed
            assert tiny.step_files(copied.directory / "superseded/1") == {30: old[30], 40: old[40]}
            assert [line["step"] for line in copied.metrics()] == [*range(1, 41), 40]
        else:
            assert (first_step_of(err), steps_run(out)) == (40, []), renamed
        shutil.rmtree(copied.directory)
        if len(renamed) < fatal:
            break
    moves = [name for name in renamed if "superseded" in name]
    assert len(renamed) < fatal and len(moves) == 3, "it came beyond all renames: two files, their metrics"
    assert renamed.index("run.json") < renamed.index(moves[0]), "noted before it is done"


@pytest.mark.thorough
def test_a_kill_at_any_rename_while_a_backup_begins_a_branch_never_loses_it(
    copied: tiny.Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As above with a backup of another run: from the note on, its step_20 is what auto continues, however often it dies."""
    other_rate = ("--set", "trainer.learning_rate=2e-2")
    other = copied.into("other")
    assert other.train(*other_rate, "--max-steps", 20) == 0
    backup = other.path(20).rename(copied.root / "backup")
    pristine = tmp_path / "pristine"
    copied.directory.rename(pristine)
    for fatal in range(20):
        for again in (None, fatal % 5):  # the rename that is fatal to the recovery, too
            shutil.copytree(pristine, copied.directory)
            with _dying_at_rename(fatal, copied.directory) as renamed, tiny.killed_after_step(21):
                copied.train("--resume", backup, *other_rate)
            noted = "run.json" in renamed
            if again is not None:
                with suppress(tiny.Killed), _dying_at_rename(again, copied.directory):
                    copied.train("--resume", "auto", *other_rate, "--max-steps", 20)
            capsys.readouterr()
            assert copied.train("--resume", "auto", *other_rate, "--max-steps", 22) == 0
            assert first_step_of(capsys.readouterr().err) == (20 if noted else 40), (fatal, again, renamed)
            assert not noted or tiny.sha256(copied.path(20)) == tiny.sha256(backup)
            shutil.rmtree(copied.directory)
        if len(renamed) < fatal:
            break
    assert len(renamed) < fatal, "it came beyond all renames"


@contextmanager
def _dying_at_rename(fatal: int, directory: Path) -> Iterator[list[str]]:
    """Inside this context rename number ``fatal`` (counted from 0) kills; the targets of the earlier ones are noted."""
    renamed: list[str] = []
    replace = os.replace

    def dying(source: Any, target: Any) -> None:
        if len(renamed) == fatal:
            raise tiny.Killed
        renamed.append(Path(target).relative_to(directory).as_posix())
        replace(source, target)

    with mock.patch.object(os, "replace", dying):
        yield renamed


def _all_files(run: tiny.Run) -> set[tuple[int, str]]:
    return {pair for path in (run.directory, run.directory / "superseded/1") for pair in tiny.step_files(path).items()}


# ----------------------------------------------------------------------------------------------- what has been changed


def test_a_changed_rate_goes_on_with_one_line_and_one_lineage_entry(
    done: tiny.Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = tiny.Run(done.root, done.config, done.text, tmp_path / "again")
    flags = ("--set", "trainer.learning_rate=2e-2", "--set", "trainer.weight_decay=0.1")
    assert again.train("--resume", done.path(30), *flags) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "→" in line]
    assert lines == ["config changed at step 30: trainer.learning_rate 0.01 → 0.02, trainer.weight_decay 0.01 → 0.1"]
    (entry,) = tiny.lineage(again.path(40))
    assert entry["step"] == 30
    inside = json.loads(format.read_header(done.path(30)).metadata["config"])
    canonical = json.dumps(inside, sort_keys=True, separators=(",", ":"), allow_nan=False)
    assert entry["config"] == hashlib.sha256(canonical.encode()).hexdigest()
    assert tiny.lineage(done.path(40)) == []


@pytest.mark.parametrize(
    "flags",
    [
        ("--save-interval", 4),
        ("--max-checkpoints", 3),
        ("--prefetch", 2),
        ("--threads", 3),
        ("--max-steps", 50),
        ("--set", "trainer.log_interval=7"),
        ("--set", "trainer.eval_interval=5"),
        ("--set", "model.name=renamed"),
        ("--set", "trainer.beta_kl=0.5"),
        ("--dtype", "float32"),
        ("--strict",),
    ],
)
def test_what_changes_no_bits_changes_no_lineage_and_is_not_told(
    done: tiny.Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: tuple[object, ...]
) -> None:
    again = tiny.Run(done.root, done.config, done.text, tmp_path / "again")
    assert again.train("--resume", done.path(30), *flags) == 0
    assert "→" not in capsys.readouterr().err
    assert tiny.sha256(again.path(40)) == tiny.sha256(done.path(40))


MISMATCHES = {
    "seed": ("--seed", "1"),
    "data": ("-d", "other.txt"),
    "dtype": ("--dtype", "bf16"),
}


@pytest.mark.parametrize("kind", MISMATCHES)
def test_another_seed_data_or_dtype_is_refused_unless_it_is_allowed(
    done: tiny.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.write_text(tmp_path / "other.txt", 3000, seed=1)
    again = tiny.Run(done.root, done.config, done.text, tmp_path / "again")
    for wrong in ((), *(("--allow-mismatch", other) for other in MISMATCHES if other != kind)):
        assert again.train("--resume", done.path(30), *MISMATCHES[kind], *wrong) == 2
        message = error_of(capsys)
        assert kind in message and f"--allow-mismatch {kind}" in message and "→" in message
        assert not again.directory.exists()
    assert again.train("--resume", done.path(30), *MISMATCHES[kind], "--allow-mismatch", kind) == 0
    out, err = capsys.readouterr()
    assert steps_run(out) == list(range(31, 41))
    assert sum("→" in line for line in err.splitlines()) == 1
    assert [entry["step"] for entry in tiny.lineage(again.path(40))] == [30]
    assert again.train("--resume", done.path(30), *MISMATCHES[kind], "--allow-mismatch", kind, "--strict") == 2
    assert "--strict" in error_of(capsys)


def test_all_mismatches_can_be_allowed_together(done: tiny.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.write_text(tmp_path / "other.txt", 2000, seed=1)
    again = tiny.Run(done.root, done.config, done.text, tmp_path / "again")
    flags = [flag for kind, change in MISMATCHES.items() for flag in (*change, "--allow-mismatch", kind)]
    assert again.train("--resume", done.path(30), *flags) == 0
    assert len(tiny.lineage(again.path(40))) == 1
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        assert again.train("--resume", "auto", *MISMATCHES["seed"], *MISMATCHES["data"], *MISMATCHES["dtype"]) == 0


def test_the_same_tokens_from_another_file_are_the_same_data(done: tiny.Run, tmp_path: Path) -> None:
    moved = shutil.copy(done.text, tmp_path / "moved.txt")
    tokens = np.frombuffer(done.text.read_bytes(), np.uint8).astype("<u4")
    (tmp_path / "tokens.bin").write_bytes(tokens.tobytes())
    for number, data in enumerate((moved, tmp_path / "tokens.bin")):
        again = tiny.Run(done.root, done.config, done.text, tmp_path / f"again_{number}")
        assert again.train("--resume", done.path(30), "-d", data, "--strict") == 0
        assert tiny.sha256(again.path(40)) == tiny.sha256(done.path(40))


@pytest.mark.parametrize(
    "key", ["hidden_size=32", "num_layers=2", "rope_theta=5000.0", "tie_word_embeddings=true", "kv_heads=2"]
)
def test_another_model_is_refused_naming_its_keys(
    done: tiny.Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str
) -> None:
    again = tiny.Run(done.root, done.config, done.text, tmp_path / "again")
    everything = [flag for kind in MISMATCHES for flag in ("--allow-mismatch", kind)]
    assert again.train("--resume", done.path(30), "--set", f"model.{key}", *everything) == 2
    message = error_of(capsys)
    assert "another model" in message and f"model.{key.partition('=')[0]}" in message
    assert not again.directory.exists()


@pytest.mark.parametrize("change", [("--set", "trainer.learning_rate=2e-2"), ("--batch-size", 4), ("--seed", 1)])
def test_strict_refuses_any_change(
    done: tiny.Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: tuple[object, ...]
) -> None:
    again = tiny.Run(done.root, done.config, done.text, tmp_path / "again")
    assert again.train("--resume", done.path(30), "--strict", "--allow-mismatch", "seed", *change) == 2
    message = error_of(capsys)
    assert "--strict" in message and "→" in message
    assert not again.directory.exists()


def test_another_machine_class_is_told_in_one_line_and_kept_in_the_lineage(
    done: tiny.Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign = tiny.rewrite(
        done.path(30),
        lambda _, words: tiny.edit_json(words, "fingerprint", numpy="1.0", blas=["x" * 99]),
        tmp_path / "foreign",
    )
    again = tiny.Run(done.root, done.config, done.text, tmp_path / "again")
    assert again.train("--resume", foreign, "--strict") == 2
    assert "--strict" in error_of(capsys) and not again.directory.exists()
    assert again.train("--resume", foreign) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if "another machine class" in line]
    assert len(told) == 1 and "numpy 1.0 → " in told[0] and "blas" in told[0]
    (entry,) = tiny.lineage(again.path(40))
    assert entry["step"] == 30 and entry["fingerprint"]


# ---------------------------------------------------------------------------------------------------- damage is refused


def test_a_step_made_anew_with_other_bytes_is_a_loud_error(copied: tiny.Run, capsys: pytest.CaptureFixture[str]) -> None:
    until(copied, 20)

    def appears() -> None:
        def nudge(tensors: dict[str, Any], words: dict[str, str]) -> None:
            tiny.edit_json(words, "progress", step=30)
            tensors["norm.weight"] = np.nextafter(tensors["norm.weight"], np.float32(2))

        tiny.rewrite(copied.path(20), nudge, copied.path(30))

    with tiny.after_step(30, appears):
        assert copied.train("--resume", "auto") == 1
    message = error_of(capsys)
    assert str(copied.path(30)) in message and "determinism was broken" in message
    assert copied.steps() == [10, 20, 30], "the run did not go on"


def test_a_step_made_anew_with_the_same_bytes_is_fine(done: tiny.Run, copied: tiny.Run) -> None:
    until(copied, 20)
    with tiny.after_step(30, lambda: shutil.copy(done.path(30), copied.path(30))):
        assert copied.train("--resume", "auto") == 0
    assert tiny.step_files(copied.directory) == tiny.step_files(done.directory)


def test_a_file_named_after_another_step_is_damage(copied: tiny.Run, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(copied.path(20), copied.path(50))
    before = tiny.snapshot(copied.root)
    assert copied.train("--resume", copied.path(50), "--max-steps", 60) == 1
    message = error_of(capsys)
    assert "step_50" in message and "holds step 20" in message
    assert tiny.snapshot(copied.root) == before
    assert copied.train("--resume", "auto") == 0
    err = capsys.readouterr().err
    assert "holds step 20; moved to" in err and first_step_of(err) == 40
    assert tiny.sha256(copied.directory / "quarantine/step_50.1.safetensors") == tiny.sha256(copied.path(20))


def flip_last_bit(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


def test_auto_falls_back_to_the_newest_whole_file_and_puts_damaged_ones_into_quarantine(
    done: tiny.Run, copied: tiny.Run, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (30, 40):
        flip_last_bit(copied.path(step))
    damaged = {step: tiny.sha256(copied.path(step)) for step in (30, 40)}
    capsys.readouterr()
    assert copied.train("--resume", "auto") == 0
    out, err = capsys.readouterr()
    assert first_step_of(err) == 20 and steps_run(out) == list(range(21, 41))
    for step, number in ((40, 1), (30, 2)):
        moved = copied.directory / f"quarantine/step_{step}.{number}.safetensors"
        assert tiny.sha256(moved) == damaged[step]
        assert any(f"step_{step}.safetensors: damaged" in line and str(moved) in line for line in err.splitlines())
    assert tiny.step_files(copied.directory) == tiny.step_files(done.directory)
    assert copied.metrics() == done.metrics()


def test_a_refused_resume_moves_nothing_into_quarantine(copied: tiny.Run, capsys: pytest.CaptureFixture[str]) -> None:
    flip_last_bit(copied.path(40))
    before = tiny.snapshot(copied.root)
    assert copied.train("--resume", "auto", "--seed", 9) == 2
    assert "seed" in error_of(capsys)
    assert copied.train("--resume", copied.path(40)) == 1
    assert "step_40" in error_of(capsys)
    assert tiny.snapshot(copied.root) == before


def test_auto_never_starts_over_because_every_file_is_damaged(copied: tiny.Run, capsys: pytest.CaptureFixture[str]) -> None:
    for step in copied.steps():
        flip_last_bit(copied.path(step))
    before = tiny.snapshot(copied.root)
    for _ in range(2):  # as a job that is started again and again would
        assert copied.train("--resume", "auto") == 1
        assert "no step file" in error_of(capsys)
        assert tiny.snapshot(copied.root) == before


def test_a_damaged_file_under_the_name_that_is_about_to_be_written_is_put_away(
    done: tiny.Run, copied: tiny.Run, capsys: pytest.CaptureFixture[str]
) -> None:
    until(copied, 20)
    with tiny.after_step(30, lambda: copied.path(30).write_bytes(b"not a checkpoint")):
        assert copied.train("--resume", "auto") == 0
    assert "quarantine/step_30.1.safetensors" in capsys.readouterr().err
    assert (copied.directory / "quarantine/step_30.1.safetensors").read_bytes() == b"not a checkpoint"
    assert tiny.step_files(copied.directory) == tiny.step_files(done.directory)


TAMPERED: dict[str, Callable[[dict[str, Any], dict[str, str]], object]] = {
    "epoch": lambda _, words: tiny.edit_json(words, "progress", epoch=7),
    "tokens seen": lambda _, words: tiny.edit_json(words, "progress", tokens_seen=1),
    "cursor": lambda _, words: tiny.edit_json(words, "progress", cursor=1),
    "windows of an epoch": lambda _, words: tiny.edit_json(words, "progress", windows_an_epoch=0),
    "another field": lambda _, words: tiny.edit_json(words, "progress", more=1),
    "a step that is no number": lambda _, words: tiny.edit_json(words, "progress", step="x"),
    "progress that is a list": lambda _, words: words.update(progress="[]"),
    "progress that is not JSON": lambda _, words: words.update(progress="{"),
    "no progress": lambda _, words: words.pop("progress"),
    "no lineage": lambda _, words: words.pop("lineage"),
    "no fingerprint": lambda _, words: words.pop("fingerprint"),
    "no config": lambda _, words: words.pop("config"),
    "a newer format": lambda _, words: words.update(format_version="99"),
    "no version": lambda _, words: words.pop("format_version"),
    "a weight missing": lambda tensors, _: tensors.pop("norm.weight"),
    "a weight too many": lambda tensors, _: tensors.update(stranger=np.zeros(1)),
    "a weight of another shape": lambda tensors, _: tensors.update({"norm.weight": np.zeros(3, np.float32)}),
    "a slot missing": lambda tensors, _: tensors.pop("optimizer.exp_avg.norm.weight"),
    "a slot too many": lambda tensors, _: tensors.update({"optimizer.exp_avg.stranger": np.zeros(1)}),
    "a slot of another shape": lambda tensors, _: tensors.update({"optimizer.exp_avg.norm.weight": np.zeros(3)}),
}


@pytest.mark.parametrize("what", TAMPERED)
@pytest.mark.parametrize("name", ["backup", "step_30.safetensors"])
def test_a_file_whose_inside_does_not_fit_together_is_a_checkpoint_error(
    done: tiny.Run, tmp_path: Path, what: str, name: str
) -> None:
    path = tiny.rewrite(done.path(30), TAMPERED[what], tmp_path / name)
    config = load_config(done.config, [f"trainer.checkpoint_dir={tmp_path / 'again'}"])
    trainer = Trainer(config, LanguageModel(config.model, 0), options=RunOptions(resume=str(path)))
    with pytest.raises(CheckpointError):
        trainer.fit()
    assert not (tmp_path / "again").exists()


# ---------------------------------------------------------------------------------------------------- fresh beginnings


def test_overwrite_starts_over_and_keeps_the_old_run(
    done: tiny.Run, copied: tiny.Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert copied.train("--overwrite", "--max-steps", 10) == 0
    out, err = capsys.readouterr()
    assert steps_run(out) == list(range(1, 11))
    assert "moved step_10, step_20, step_30, step_40 and their metrics to" in err
    assert copied.steps() == [10]
    assert tiny.step_files(copied.directory / "superseded/1") == tiny.step_files(done.directory)
    assert tiny.metrics_of(copied.directory / "superseded/1") == done.metrics()


def test_init_from_takes_the_weights_and_nothing_else(
    done: tiny.Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = tiny.Run(done.root, done.config, done.text, tmp_path / "again")
    seen: dict[str, Any] = {}

    class Spy(Reporter):
        def begin(self, trainer: Trainer) -> None:
            seen.update(step=trainer.step, cursor=trainer.cursor, updates=trainer.optimizer.updates)
            seen.update(weights={name: array.copy() for name, array in trainer.model.state_dict().items()})
            seen.update(moments=max(abs(array).max() for array in trainer.optimizer.state_dict().values()))

    config = load_config(done.config, [f"trainer.checkpoint_dir={again.directory}", "trainer.max_steps=10"])
    other = open_model(done.path(40))
    options = RunOptions(init_from=FirstWeights(other.weights, other.what, other.lineage))
    Trainer(config, LanguageModel(config.model, 0), options=options, reporter=Spy()).fit()
    assert (seen["step"], seen["cursor"], seen["updates"], seen["moments"]) == (0, 0, 0, 0.0)
    saved = format.load(done.path(40)).tensors
    assert all(np.array_equal(saved[name], array) for name, array in seen["weights"].items())
    assert tiny.lineage(again.path(10)) == [
        {"init_from": {"step": 40, **dict.fromkeys(("config", "data", "fingerprint"), mock.ANY)}}
    ]
    assert again.into("flag").train("--init-from", done.path(40), "--max-steps", 10) == 0
    assert "starting with the weights of" in capsys.readouterr().err
    assert tiny.sha256(done.root / "flag/step_10.safetensors") == tiny.sha256(again.path(10))


# ---------------------------------------------------------------------------------------------------------- early ends


def test_a_time_limit_saves_and_ends_with_0_and_auto_goes_on(
    done: tiny.Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = tiny.Run(done.root, done.config, done.text, tmp_path / "again")
    with mock.patch.object(Trainer, "_time_is_up", lambda self, _: self.options.time_limit == 7 and self.step == 13):
        assert again.train("--time-limit", 7) == 0
    assert "time limit reached after step 13" in capsys.readouterr().err
    assert again.steps() == [10, 13]
    assert again.train("--resume", "auto") == 0
    assert tiny.step_files(done.directory).items() <= tiny.step_files(again.directory).items()
    assert again.metrics() == done.metrics()


@pytest.mark.parametrize("flags", [(), ("--set", "trainer.async_save=true")], ids=["at once", "in the background"])
@pytest.mark.parametrize("limit", [30, 60, 100])
def test_a_run_saves_and_ends_within_its_time_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int, flags: tuple[str, ...]
) -> None:
    """On a clock of its own, on which a step takes 7 seconds and a save 5."""
    now = [1000.0]
    monkeypatch.setattr("oxidizr_ref.cli.train._STARTED", now[0] - 3)  # loading took 3 seconds
    for name in ("monotonic", "perf_counter"):
        monkeypatch.setattr(f"oxidizr_ref.trainer.time.{name}", lambda: now[0])
    step, save = Trainer.train_step, format.save

    def slow_step(*arguments: Any) -> Any:
        now[0] += 7
        return step(*arguments)

    def slow_save(*arguments: Any) -> None:
        now[0] += 5
        save(*arguments)

    monkeypatch.setattr(Trainer, "train_step", slow_step)
    monkeypatch.setattr(format, "save", slow_save)
    run = tiny.make_run(tmp_path, trainer={"max_steps": 40, "save_interval": 3})
    assert run.train("--time-limit", limit, *flags) == 0
    taken = now[0] - 1000 + 3
    last = run.metrics()[-1]["step"]
    assert run.steps()[-1] == last > 0 and taken <= limit
    if not flags:  # in the background the save's 5 seconds fall where the threads' turns let them
        assert taken > limit / 2, "it did not give up much earlier than it had to"


def test_a_time_limit_of_0_makes_no_file_and_does_not_say_that_it_did(
    done: tiny.Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = tiny.Run(done.root, done.config, done.text, tmp_path / "again")
    assert again.train("--time-limit", 0) == 0
    assert again.steps() == []
    assert "which is saved" not in capsys.readouterr().err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_between_steps_saves_the_step_and_ends_with_its_code(
    done: tiny.Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], number: signal.Signals, code: int
) -> None:
    again = tiny.Run(done.root, done.config, done.text, tmp_path / "again")
    handler = signal.getsignal(number)
    with tiny.after_step(13, lambda: os.kill(os.getpid(), number)):
        assert again.train() == code
    assert signal.getsignal(number) is handler
    assert f"stopped by {number.name} after step 13" in capsys.readouterr().err
    assert again.steps() == [10, 13]
    assert again.train("--resume", "auto") == 0
    out, err = capsys.readouterr()
    assert (first_step_of(err), steps_run(out)) == (13, list(range(14, 41)))
    assert tiny.step_files(done.directory).items() <= tiny.step_files(again.directory).items()
    assert again.metrics() == done.metrics()


def _signal_in_micro_batch(number: signal.Signals, step: int) -> Any:
    """A patch under which ``number`` arrives while the first micro-batch of ``step`` is computed."""
    take, sent = Trainer._take_gradients, list[int]()

    def taking(self: Trainer) -> Any:
        if self.step + 1 == step and not sent:
            sent.append(step)
            os.kill(os.getpid(), number)
        return take(self)

    return mock.patch.object(Trainer, "_take_gradients", taking)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_within_a_step_discards_the_partial_step(
    done: tiny.Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], number: signal.Signals, code: int
) -> None:
    again = tiny.Run(done.root, done.config, done.text, tmp_path / "again")
    with _signal_in_micro_batch(number, 21):
        assert again.train("--prefetch", 2) == code
    assert again.steps() == [10, 20]
    assert [line["step"] for line in again.metrics()] == list(range(1, 21))
    with _signal_in_micro_batch(number, 26):
        assert again.train("--resume", "auto") == code
    assert again.steps() == [10, 20, 25]
    assert again.train("--resume", "auto") == 0
    assert tiny.step_files(done.directory).items() <= tiny.step_files(again.directory).items()
    assert again.metrics() == done.metrics()
    capsys.readouterr()


def test_a_signal_before_the_first_step_is_done_makes_no_file_and_does_not_say_that_it_did(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tiny.make_run(tmp_path)
    with _signal_in_micro_batch(signal.SIGTERM, 1):
        assert run.train() == 143
    assert run.steps() == []
    assert "which is saved" not in capsys.readouterr().err


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="this system has no SIGUSR1")
def test_sigusr1_saves_after_the_step_and_goes_on(done: tiny.Run, tmp_path: Path) -> None:
    again = tiny.Run(done.root, done.config, done.text, tmp_path / "again")
    with _signal_in_micro_batch(signal.SIGUSR1, 13):
        assert again.train() == 0
    assert again.steps() == [10, 13, 20, 30, 40]
    assert tiny.step_files(done.directory).items() <= tiny.step_files(again.directory).items()
    assert again.metrics() == done.metrics()


def test_a_file_named_save_saves_once_after_the_step_and_goes_on(done: tiny.Run, tmp_path: Path) -> None:
    again = tiny.Run(done.root, done.config, done.text, tmp_path / "again")
    asked = again.directory / "SAVE"
    with tiny.after_step(13, asked.touch):
        assert again.train() == 0
    assert not asked.exists()
    assert again.steps() == [10, 13, 20, 30, 40]
    assert tiny.step_files(done.directory).items() <= tiny.step_files(again.directory).items()


def test_a_nan_stops_the_run_names_the_last_good_file_and_saves_nothing(
    done: tiny.Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = tiny.Run(done.root, done.config, done.text, tmp_path / "again")
    loss = LanguageModel.loss

    def poisoned(self: LanguageModel, *args: Any, **kwargs: Any) -> Tensor:
        return loss(self, *args, **kwargs) * (float("nan") if again.steps() == [10, 20] else 1.0)

    with mock.patch.object(LanguageModel, "loss", poisoned):
        assert again.train() == 1
    message = error_of(capsys)
    assert "step 21: the loss is nan" in message and str(again.path(20)) in message and "learning_rate" in message
    assert tiny.step_files(again.directory) == {step: tiny.sha256(done.path(step)) for step in (10, 20)}
    assert [line["step"] for line in again.metrics()] == list(range(1, 21))
    assert again.train("--resume", "auto") == 0
    assert tiny.step_files(again.directory) == tiny.step_files(done.directory)


def test_an_infinite_gradient_stops_the_run_before_the_first_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tiny.make_run(tmp_path)
    with mock.patch("oxidizr_ref.optim.global_norm", lambda _: float("inf")):
        assert run.train() == 1
    message = error_of(capsys)
    assert "step 1: the gradient norm is inf" in message and "no checkpoint was saved before it" in message
    assert run.steps() == []


def test_a_learning_rate_far_too_high_ends_with_advice_and_without_numpy_s_warnings(tmp_path: Path) -> None:
    run = tiny.make_run(tmp_path)
    process = tiny.start(run.argv("--set", "trainer.learning_rate=1e30", "--save-interval", 1), tmp_path)
    _, err = tiny.finish(process, 1)
    assert "Warning" not in err and "Traceback" not in err
    assert err.splitlines()[-1].startswith("error: step ") and "learning_rate" in err.splitlines()[-1]
    for step in run.steps():
        assert all(np.isfinite(array).all() for array in format.load(run.path(step)).tensors.values()), step


# ----------------------------------------------------------------------------------------------------------- retention


@pytest.mark.parametrize(
    ("key", "flags", "kept"), [(2, (), [35, 40]), (0, (), list(range(5, 41, 5))), (2, (3,), [30, 35, 40])]
)
def test_retention_keeps_the_newest_and_the_flag_wins(
    tmp_path: Path, key: int, flags: tuple[int, ...], kept: list[int]
) -> None:
    run = tiny.make_run(tmp_path, trainer={"max_checkpoints": key, "save_interval": 5})
    assert run.train(*(part for flag in flags for part in ("--max-checkpoints", flag))) == 0
    assert run.steps() == kept


def test_a_flag_of_0_keeps_all(tmp_path: Path) -> None:
    run = tiny.make_run(tmp_path, trainer={"max_checkpoints": 1, "save_interval": 3, "max_steps": 9})
    assert run.train("--max-checkpoints", 0) == 0
    assert run.steps() == [3, 6, 9]


def test_ten_files_are_kept_by_default_and_order_is_by_number(tmp_path: Path) -> None:
    run = tiny.make_run(tmp_path, trainer={"max_checkpoints": None, "save_interval": 1, "max_steps": 12})
    assert run.train() == 0
    assert run.steps() == list(range(3, 13))


def test_the_last_step_is_saved_whatever_the_interval(tmp_path: Path) -> None:
    run = tiny.make_run(tmp_path, trainer={"max_steps": 7, "save_interval": 100})
    assert run.train() == 0
    assert run.steps() == [7]


def test_files_that_are_no_step_files_are_left_alone(tmp_path: Path) -> None:
    run = tiny.make_run(tmp_path, trainer={"max_steps": 4, "save_interval": 1, "max_checkpoints": 1})
    run.directory.mkdir()
    names = ["step_1.safetensors.bak", "step_01.safetensors", "backup.safetensors", "step_x.safetensors", "notes.txt"]
    for name in names:
        (run.directory / name).write_text(name)
    assert run.train() == 0
    assert all((run.directory / name).read_text() == name for name in names)
    assert sorted(path.name for path in run.directory.glob("step_[0-9].safetensors")) == ["step_4.safetensors"]


# ----------------------------------------------------------------------------------------- what must not be believed


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        (("--set", "trainer.learning_rate=1e39"), "a number in"),
        (("--dtype", "f16", "--set", "trainer.learning_rate=1e5"), "a number in"),
        (("--set", "trainer.weight_decay=1e300"), "a number in"),
    ],
)
def test_a_state_that_overflowed_in_the_update_is_neither_saved_nor_called_good(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], what: str
) -> None:
    run = tiny.make_run(tmp_path, trainer={"max_steps": 3, "save_interval": 1, "eval_fraction": 0.2})
    assert run.train(*flags) == 1
    message = error_of(capsys)
    assert what in message and "not saved, no checkpoint was saved before it" in message
    assert run.steps() == []


def test_a_fresh_start_finishes_an_interrupted_move_before_it_makes_its_own(
    copied: tiny.Run, capsys: pytest.CaptureFixture[str]
) -> None:
    """--overwrite, killed before its note is cleared; then --overwrite again: the new run is not taken for the old one."""
    old = tiny.step_files(copied.directory)
    write = copied.directory / "run.json"
    with suppress(tiny.Killed), _dying_at_clearing(write):
        copied.train("--overwrite", "--seed", 1)
    assert json.loads(write.read_text())["superseding"] is not None
    assert copied.train("--overwrite", "--seed", 3, "--max-steps", 20) == 0
    assert json.loads(write.read_text()) == {"superseding": None}
    assert copied.train("--resume", "auto", "--seed", 3) == 0
    assert first_step_of(capsys.readouterr().err) == 20
    assert tiny.step_files(copied.directory / "superseded" / "1") == old
    assert [line["step"] for line in copied.metrics()] == [*range(1, 41), 40]


@contextmanager
def _dying_at_clearing(note: Path) -> Iterator[None]:
    replace = os.replace

    def dying(source: Any, target: Any) -> None:
        if Path(target) == note and json.loads(Path(source).read_text())["superseding"] is None:
            raise tiny.Killed
        replace(source, target)

    with mock.patch.object(os, "replace", dying):
        yield


@pytest.mark.parametrize("text", ["", "[]", "{}", "{"])
def test_a_damaged_note_or_config_beside_a_checkpoint_is_named(
    copied: tiny.Run, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    beside = copied.directory / "config.json"
    beside.write_text(text)
    assert tiny.cli("train", "--resume", copied.path(20)) == 2
    assert f"{beside}: is damaged" in error_of(capsys)
    note = copied.directory / "run.json"
    note.write_text(text)
    assert copied.train("--resume", "auto") == 1
    assert f"{note}: is damaged" in error_of(capsys)


def test_a_disk_that_is_full_is_told_with_the_file_and_what_helps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny.make_run(tmp_path, trainer={"max_steps": 3, "save_interval": 2})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(format, "save", full)
    assert run.train() == 1
    _, err = capsys.readouterr()
    told = [line for line in err.splitlines() if "cannot be written (No space left on device)" in line]
    assert [str(run.path(step)) in line for step, line in zip((2, 3, 3), told, strict=True)] == [True] * 3
    assert "training goes on" in told[0] and told[-1].startswith("error: ")
    assert all("larger save_interval" in line and "--max-checkpoints" in line for line in told)
    assert not run.steps() and [line["step"] for line in run.metrics()] == [1, 2, 3]


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="this system has no SIGUSR1")
def test_signals_are_wishes_from_the_moment_the_model_is_made(run_while_loading: Callable[[int], tuple[int, str]]) -> None:
    assert run_while_loading(signal.SIGUSR1)[0] == 0
    code, err = run_while_loading(signal.SIGTERM)
    assert code == 143 and "stopped by SIGTERM before the first step was done" in err


@pytest.fixture
def run_while_loading(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[[int], tuple[int, str]]:
    """Runs three steps; the signal arrives while the first weights are drawn. Returns exit code and stderr."""
    initialize = LanguageModel.initialize

    def run(number: int) -> tuple[int, str]:
        def interrupted(self: LanguageModel, *arguments: Any) -> None:
            initialize(self, *arguments)
            os.kill(os.getpid(), number)

        monkeypatch.setattr(LanguageModel, "initialize", interrupted)
        capsys.readouterr()
        code = tiny.make_run(tmp_path / str(number), trainer={"max_steps": 3}).train()
        return code, capsys.readouterr().err

    return run
