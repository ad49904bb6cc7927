"""The command line: what it takes, what it prints where, and how it refuses: in one line, nothing damaged."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import stand_in
import tiny
import typer
import yaml

from oxidizr_ref.checkpoint import disk
from oxidizr_ref.cli import main as cli_main
from oxidizr_ref.version import __version__

HEADLESS_KEYS = ["step", "loss", "grad_norm", "learning_rate", "epoch", "it/s", "tokens/s"]

#: design.md 1.2: oxidizr's flags, then ours.
TRAIN_FLAGS = [
    "-f",
    "--config",
    "-d",
    "--data",
    "--target-device",
    "--seq-len",
    "--batch-size",
    "--grad-accum",
    "--max-steps",
    "--resume",
    "--max-checkpoints",
    "--headless",
    "--dtype",
    "--prefetch",
    "--gpus",
    "--sync-backend",
    "--seed",
    "--save-interval",
    "--checkpoint-dir",
    "--threads",
    "--set",
    "--init-from",
    "--overwrite",
    "--allow-mismatch",
    "--time-limit",
    "--strict",
    "--debug",
]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tiny.Run:
    """A tiny run of three steps that has not begun; the current directory is its root."""
    made = tiny.make_run(tmp_path, trainer={"max_steps": 3, "save_interval": 1})
    monkeypatch.chdir(tmp_path)
    return made


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tiny.Run:
    """The same run, done. Tests only read it."""
    made = tiny.make_run(tmp_path_factory.mktemp("finished"), trainer={"max_steps": 3, "save_interval": 1})
    assert made.train() == 0
    return made


class Refusal:
    """Runs a command that must be refused: one line on stderr, nothing on stdout, no file written, changed or removed."""

    def __init__(self, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.root, self.capsys = root, capsys

    def __call__(self, *argv: object, during: AbstractContextManager[None] | None = None) -> str:
        err = self._err_of(argv, during)
        assert err.endswith("\n") and len(err.splitlines()) == 1, err
        return err.strip()

    def _err_of(self, argv: tuple[object, ...], during: AbstractContextManager[None] | None) -> str:
        self.capsys.readouterr()
        before = tiny.snapshot(self.root)
        with during or nullcontext():
            code = tiny.cli(*argv)
        out, err = self.capsys.readouterr()
        assert (code, out) == (2, ""), err
        assert "error: " in err and "(unexpected;" not in err and "Traceback" not in err, err
        assert tiny.snapshot(self.root) == before
        return err


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refusal:
    return Refusal(tmp_path, capsys)


def change_config(run: tiny.Run, section: str, **keys: Any) -> None:
    """Set keys of the config file; None removes them."""
    sections = yaml.safe_load(run.config.read_text())
    for key, value in keys.items():
        sections[section].pop(key, None)
        if value is not None:
            sections[section][key] = value
    tiny.write_config(run.config, sections)


def line_of(path: Path, text: str) -> int:
    return next(number for number, line in enumerate(path.read_text().splitlines(), 1) if text in line)


# ---------------------------------------------------------------------------------------------- bad input: the config


def test_an_unknown_key_is_named_with_its_line_and_the_nearest_key(run: tiny.Run, refused: Refusal) -> None:
    change_config(run, "trainer", learning_rat=1e-3, learning_rate=1e-2)
    message = refused(*run.argv())
    assert f"tiny.yaml:{line_of(run.config, 'learning_rat:')}: trainer.learning_rat: unknown key" in message
    assert "did you mean `learning_rate`?" in message


@pytest.mark.parametrize(("value", "shown"), [("big", 'text "big"'), (16.5, "16.5"), ([1], "a list"), (True, "true")])
def test_a_value_of_the_wrong_type_is_named_with_what_was_expected(
    run: tiny.Run, refused: Refusal, value: Any, shown: str
) -> None:
    change_config(run, "model", hidden_size=value)
    message = refused(*run.argv())
    assert (
        f"tiny.yaml:{line_of(run.config, 'hidden_size')}: model.hidden_size: expected an integer, found {shown}" in message
    )


def test_a_missing_key_is_named(run: tiny.Run, refused: Refusal) -> None:
    change_config(run, "trainer", learning_rate=None)
    assert re.search(r"tiny\.yaml:\d+: trainer\.learning_rate: missing", refused(*run.argv()))


def test_heads_that_do_not_divide_are_refused(run: tiny.Run, refused: Refusal) -> None:
    change_config(run, "model", num_heads=3, kv_heads=3)
    message = refused(*run.argv())
    assert f"tiny.yaml:{line_of(run.config, 'num_heads')}: " in message and "16 is not divisible by num_heads 3" in message


def test_all_that_is_wrong_with_a_file_is_told_at_once_a_line_each(
    run: tiny.Run, capsys: pytest.CaptureFixture[str]
) -> None:
    change_config(run, "model", num_heads=3, kv_heads=3, hiden_size=4)
    change_config(run, "trainer", batch_size="x")
    assert tiny.cli(*run.argv()) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and all(re.match(r"error: \S*tiny\.yaml:\d+: ", line) for line in lines)


@pytest.mark.parametrize("text", ["", "\n\n", "# nothing\n", "---\n", "null\n"])
def test_an_empty_config_is_refused(run: tiny.Run, refused: Refusal, text: str) -> None:
    run.config.write_text(text)
    assert "tiny.yaml: empty" in refused(*run.argv())


@pytest.mark.parametrize("text", ["- a\n", "word\n", "model: 3\ntrainer: 4\n", "a: [\n", "a: b: c\n", "\0\n"])
def test_a_config_that_is_none_is_refused(run: tiny.Run, capsys: pytest.CaptureFixture[str], text: str) -> None:
    run.config.write_text(text)
    before = tiny.snapshot(run.root)
    assert tiny.cli(*run.argv()) == 2
    err = capsys.readouterr().err
    assert all(line.startswith("error: ") and "tiny.yaml" in line for line in err.splitlines()) and err
    assert tiny.snapshot(run.root) == before


def test_a_missing_config_is_refused_with_what_is_meant(run: tiny.Run, refused: Refusal) -> None:
    message = refused("train", "-f", "nano-strat")
    assert (
        "nano-strat: no such file" in message and "did you mean `nano-start`?" in message and "shakespeare-char" in message
    )
    assert "is a directory" in refused("train", "-f", run.root)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--batch-size", 0), "--batch-size 0: trainer.batch_size: expected a value >= 1, found 0"),
        (("--seed", -1), "--seed -1: trainer.seed"),
        (("--dtype", "int8"), "--dtype int8: model.dtype"),
        (("--set", "trainer.learning_rate"), "expected KEY=VALUE"),
        (("--set", "trainer.lerning_rate=1"), "did you mean `learning_rate`?"),
        (("--set", "optimizer.lr=1"), "unknown section"),
        (("--set", "trainer.learning_rate=fast"), 'expected a number, found text "fast"'),
        (("--set", "trainer.learning_rate=-1"), "expected a value > 0"),
        (("--set", "trainer.learning_rate=.nan"), "learning_rate"),
    ],
)
def test_a_bad_flag_or_override_is_named_as_it_was_given(
    run: tiny.Run, refused: Refusal, flags: tuple[object, ...], named: str
) -> None:
    message = refused(*run.argv(*flags))
    assert named in message and str(flags[0]) in message


# ------------------------------------------------------------------------------------------------ bad input: the data


def test_data_shorter_than_one_window_is_refused(run: tiny.Run, refused: Refusal) -> None:
    run.text.write_text("12345678")
    message = refused(*run.argv())
    assert "text.txt" in message and "has 8 tokens" in message and "needs 9" in message and "--seq-len" in message
    run.text.write_text("123456789")
    assert run.train() == 0


def test_a_held_out_part_shorter_than_one_window_is_refused(run: tiny.Run, refused: Refusal) -> None:
    message = refused(*run.argv("--set", "trainer.eval_fraction=0.001"))
    assert "held-out part" in message and "eval_fraction" in message


@pytest.mark.parametrize("size", [1, 4001, 4002, 4003])
def test_a_bin_file_of_no_whole_number_of_tokens_is_refused(run: tiny.Run, refused: Refusal, size: int) -> None:
    (run.root / "data.bin").write_bytes(bytes(size))
    message = refused(*run.argv("-d", "data.bin"))
    assert "data.bin" in message and f"{size} bytes" in message and "4 bytes" in message


def test_a_token_id_outside_the_vocabulary_is_named_with_its_position(run: tiny.Run, refused: Refusal) -> None:
    tokens = np.zeros(1000, dtype="<u4")
    tokens[[700, 800]] = 260, 4_000_000_000
    (run.root / "data.bin").write_bytes(tokens.tobytes())
    message = refused(*run.argv("-d", "data.bin"))
    assert "data.bin: token id 260 at position 700 " in message and "vocabulary size 260" in message
    assert "token id 260 at position 3700 " in refused(*run.argv("-d", "text.txt", "-d", "data.bin")), "of the whole stream"


def test_missing_data_is_refused_with_the_nearest_name(run: tiny.Run, refused: Refusal) -> None:
    message = refused(*run.argv("-d", "texts.txt"))
    assert "texts.txt: no such file" in message and "text.txt" in message
    change_config(run, "data", path="gone.txt")
    assert "gone.txt: no such file" in refused(*run.argv())


@pytest.mark.parametrize(("content", "word"), [(b"", "empty"), (b"good\xff", "UTF-8")])
def test_a_text_that_is_none_is_refused(run: tiny.Run, refused: Refusal, content: bytes, word: str) -> None:
    run.text.write_bytes(content)
    message = refused(*run.argv())
    assert "text.txt" in message and word in message


def test_a_directory_or_an_unknown_tokenizer_as_data_is_refused(run: tiny.Run, refused: Refusal) -> None:
    assert "is a directory" in refused(*run.argv("-d", run.root))
    assert "byte" in refused(*run.argv("--set", "data.tokenizer=bite"))


# ----------------------------------------------------------------------------------------- bad input: the environment


@contextmanager
def failing(owner: Any, function: str, path: Path) -> Iterator[None]:
    """Inside this context a function refuses one path (root ignores permission bits)."""
    original = getattr(owner, function)

    def fail(first: Path, *args: Any, **kwargs: Any) -> Any:
        if first == path:
            raise PermissionError(13, "Permission denied", str(first))
        return original(first, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, function, fail)
        yield


@pytest.mark.parametrize("where", ["taken", "taken/below"])
@pytest.mark.parametrize("resume", [(), ("--resume", "auto"), ("--overwrite",)])
def test_a_checkpoint_directory_that_is_a_file_is_refused(
    run: tiny.Run, refused: Refusal, where: str, resume: tuple[str, ...]
) -> None:
    (run.root / "taken").write_text("a file")
    message = refused(*run.argv("--checkpoint-dir", where, *resume))
    assert f"checkpoint directory {where}: " in message and "--checkpoint-dir" in message


@pytest.mark.parametrize("function", ["make_directory", "names"])
def test_a_checkpoint_directory_that_may_not_be_used_is_refused(run: tiny.Run, refused: Refusal, function: str) -> None:
    if function == "names":
        run.directory.mkdir()
    for resume in ((), ("--resume", "auto"), ("--overwrite",)):
        message = refused(*run.argv(*resume), during=failing(disk, function, run.directory))
        assert str(run.directory) in message and "Permission denied" in message


@pytest.mark.parametrize("what", ["config", "text"])
def test_a_file_that_may_not_be_read_is_refused(run: tiny.Run, refused: Refusal, what: str) -> None:
    path = run.config if what == "config" else run.text
    message = refused(*run.argv(), during=failing(Path, "open", path))
    assert path.name in message and "ermission" in message


def test_a_gpu_demanded_without_cupy_is_refused(run: tiny.Run, refused: Refusal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    for flags in (("--target-device", "gpu"), ("--gpus", "0,1")):
        message = refused(*run.argv(*flags))
        assert "CuPy is not installed" in message and f"error: {' '.join(flags)}: " in message


def test_a_gpu_demanded_where_the_driver_or_the_device_is_missing_is_refused_in_one_line_that_says_which(
    run: tiny.Run, refused: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in.install(monkeypatch)

    def too_old() -> int:
        raise RuntimeError("cudaErrorInsufficientDriver: CUDA driver version is insufficient\nfor CUDA runtime version")

    monkeypatch.setattr(stand_in.cuda.runtime, "getDeviceCount", too_old)
    message = refused(*run.argv("--target-device", "gpu"))
    assert "--target-device gpu: CUDA does not start (cudaErrorInsufficientDriver: CUDA driver version is insuff" in message
    monkeypatch.setattr(stand_in.cuda.runtime, "getDeviceCount", lambda: 0)
    assert "CUDA finds no device" in refused(*run.argv("--target-device", "gpu"))


@pytest.mark.parametrize(
    ("gpus", "message"),
    [
        ("0,1", "--gpus 0,1: this version trains on one device; name one of them"),
        ("one", "--gpus one: expected the number of a CUDA device, such as 0"),
        ("7", "--gpus 7: CUDA has 1 device, numbered from 0"),
    ],
)
def test_gpus_names_one_device_that_is_there(
    run: tiny.Run, refused: Refusal, monkeypatch: pytest.MonkeyPatch, gpus: str, message: str
) -> None:
    stand_in.install(monkeypatch)
    assert message in refused(*run.argv("--gpus", gpus))


def test_a_gpu_preferred_by_the_config_falls_back_in_one_line(
    run: tiny.Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    change_config(run, "trainer", target_device="gpu")
    assert run.train() == 0
    assert sum("training on the cpu" in line for line in capsys.readouterr().err.splitlines()) == 1
    before = tiny.step_files(run.directory)
    assert run.into("cpu").train("--target-device", "cpu") == 0
    assert tiny.step_files(run.root / "cpu") == before, "the device that was resolved is what counts"
    assert "training on the cpu" not in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------- bad input: resuming


@pytest.fixture
def begun(run: tiny.Run, finished: tiny.Run) -> tiny.Run:
    """The run with the three step files of the finished one."""
    shutil.copytree(finished.directory, run.directory)
    return run


def test_a_missing_resume_path_lists_what_is_there(begun: tiny.Run, refused: Refusal) -> None:
    for path in (begun.path(9), "step_9.safetensors", "nowhere/step_9.safetensors"):
        message = refused(*begun.argv("--resume", str(path)))
        assert f"--resume {path}: no such file" in message
        assert ("step_1, step_2, step_3" in message) == (path != "step_9.safetensors"), message


def test_a_missing_resume_path_without_a_config_is_refused(begun: tiny.Run, refused: Refusal) -> None:
    message = refused("train", "--resume", begun.path(9), "--checkpoint-dir", begun.directory)
    assert f"--resume {begun.path(9)}: no such file" in message and "step_1, step_2, step_3" in message


def test_step_files_already_there_are_refused_with_the_ways_on(begun: tiny.Run, refused: Refusal) -> None:
    message = refused(*begun.argv())
    for way in ("--resume auto", "--overwrite", "superseded/", "--checkpoint-dir", "step_1, step_2, step_3"):
        assert way in message


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--set", "model.hidden_size=32"), ("model.hidden_size 16 → 32",)),
        (("--seed", "7"), ("trainer.seed 0 → 7", "--allow-mismatch seed")),
        (("-d", "tiny.yaml"), ("3000 tokens", "--allow-mismatch data")),
        (("--dtype", "bf16"), ("model.dtype f32 → bf16", "--allow-mismatch dtype")),
        (("--strict", "--set", "trainer.learning_rate=1e-3"), ("trainer.learning_rate 0.01 → 0.001", "--strict")),
    ],
)
def test_what_does_not_match_is_refused_in_one_line(
    begun: tiny.Run, refused: Refusal, flags: tuple[str, ...], words: tuple[str, ...]
) -> None:
    message = refused(*begun.argv("--resume", str(begun.path(2)), *flags))
    assert all(word in message for word in words), message


def test_a_changed_learning_rate_goes_on_with_one_notice(begun: tiny.Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert begun.train("--resume", "auto", "--max-steps", 5, "--set", "trainer.learning_rate=1e-3") == 0
    notices = [line for line in capsys.readouterr().err.splitlines() if "→" in line]
    assert notices == ["config changed at step 3: trainer.learning_rate 0.01 → 0.001"]
    assert begun.steps() == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--resume", "auto", "--overwrite"), ("--resume", "--overwrite")),
        (("--resume", "auto", "--init-from", "text.txt"), ("--resume", "--init-from")),
        (("--init-from", "absent"), ("absent: no such file or directory", "a step file")),
        (("--allow-mismatch", "model"), ("--allow-mismatch model", "seed, data, dtype")),
    ],
)
def test_flags_that_make_no_sense_are_refused(
    run: tiny.Run, refused: Refusal, flags: tuple[str, ...], words: tuple[str, ...]
) -> None:
    message = refused(*run.argv(*flags))
    assert all(word in message for word in words)


@pytest.mark.parametrize("flag", ["--resume", "--init-from"])
def test_a_file_that_is_no_checkpoint_is_refused_with_exit_code_1(
    run: tiny.Run, capsys: pytest.CaptureFixture[str], flag: str
) -> None:
    before = tiny.snapshot(run.root)
    assert run.train(flag, run.text) == 1
    err = capsys.readouterr().err
    assert err.splitlines()[-1].startswith(f"error: {run.text}: damaged at or after byte 0") and err.count("error: ") == 1
    assert tiny.snapshot(run.root) == before
    assert tiny.cli("train", "--resume", run.text) == 1
    assert "no checkpoint, or one cut short" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------- bad input: usage


@pytest.mark.parametrize(
    "argv",
    [
        ("trian",),
        ("train", "--bogus"),
        ("train", "--learning-rate", "1"),
        ("train", "--max-steps", "many"),
        ("train", "--max-steps"),
        ("train", "--threads", "0"),
        ("train", "--prefetch", "-1"),
        ("train", "--time-limit", "-1"),
        ("train", "--target-device", "tpu"),
        ("train", "--sync-backend", "mpi"),
        ("train", "stray"),
        ("selftest", "--bogus"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(run: tiny.Run, refused: Refusal, argv: tuple[str, ...]) -> None:
    assert run.root == Path.cwd()
    assert refused(*argv)


@pytest.mark.thorough
@pytest.mark.parametrize("argv", [["trian"], ["--bogus"], ["train", "--bogus"], ["-f", "absent.yaml"]])
def test_wrong_usage_in_a_process_of_its_own(tmp_path: Path, argv: list[str]) -> None:
    out, err = tiny.finish(tiny.start(argv, tmp_path), 2)
    assert out == "" and len(err.splitlines()) == 1 and err.startswith("error: ")
    assert not any(tmp_path.iterdir())


def test_debug_shows_the_traceback_that_is_hidden_without_it(run: tiny.Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.train("-d", "absent") == 2
    assert "Traceback" not in capsys.readouterr().err
    for flags, words in ((("-d", "absent"), "absent: no such file"), (("--batch-size", 0), "--batch-size 0")):
        assert run.train(*flags, "--debug") == 2, "the exit code stays"
        err = capsys.readouterr().err
        assert "Traceback (most recent call last)" in err and f"error: {words}" in err


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (RuntimeError("it\nbroke"), 1, "RuntimeError"),
        (MemoryError("too much"), 1, "--batch-size"),
        (OSError(28, "No space left on device"), 1, "No space left on device"),
    ],
)
def test_the_unexpected_is_told_without_a_traceback(
    run: tiny.Run,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    code: int,
    words: str,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("oxidizr_ref.trainer.Trainer.train_step", fail)
    assert run.train() == code
    err = capsys.readouterr().err
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and words in errors[0] and "Traceback" not in err


# ------------------------------------------------------------------------------------------------------ what it takes


def command(name: str) -> Any:
    return typer.main.get_command(cli_main.app).commands[name]  # type: ignore[attr-defined]


def test_train_has_every_flag_of_the_contract() -> None:
    flags = {flag for parameter in command("train").params for flag in (*parameter.opts, *parameter.secondary_opts)}
    assert set(TRAIN_FLAGS) <= flags
    assert not [flag for flag in flags if flag.startswith("--no-")]


@pytest.mark.parametrize("argv", [["-h"], ["--help"], ["train", "-h"], ["train", "--help"], ["selftest", "-h"]])
def test_help_goes_to_stdout_and_names_all_there_is(capsys: pytest.CaptureFixture[str], argv: list[str]) -> None:
    assert tiny.cli(*argv) == 0
    out, err = capsys.readouterr()
    assert err == "" and "Usage" in out
    wanted = {"train": [flag for flag in TRAIN_FLAGS if flag.startswith("--")], "selftest": []}
    for word in wanted.get(argv[0], ["train", "selftest", "--version"]):
        assert word in out


def test_every_command_has_a_help_text_that_is_a_sentence() -> None:
    commands = typer.main.get_command(cli_main.app).commands  # type: ignore[attr-defined]
    assert {"train", "selftest"} <= set(commands)
    for name, one in commands.items():
        assert one.help and one.help.strip().split("\n")[0].endswith("."), name
        for parameter in one.params:
            assert getattr(parameter, "help", None), f"{name} {parameter.opts}"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert tiny.cli("--version") == 0
    assert capsys.readouterr().out.strip().endswith(__version__)


def main_with(monkeypatch: pytest.MonkeyPatch, *argv: object) -> int:
    """The program as a shell calls it. Returns the exit code."""
    monkeypatch.setattr(sys, "argv", ["oxidizr-ref", *map(str, argv)])
    monkeypatch.setattr("oxidizr_ref.cli.train._SAMPLE_TOKENS", 2)
    with pytest.raises(SystemExit) as ended:
        cli_main.main()
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_the_word_train_may_be_left_out(run: tiny.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = run.argv()[1:]
    assert main_with(monkeypatch, *flags) == 0
    long = [{"-f": "--config"}.get(flag, flag) for flag in run.into("long").argv()[1:]]
    assert main_with(monkeypatch, *long) == 0
    assert main_with(monkeypatch, "train", *run.into("named").argv()[1:]) == 0
    files = [tiny.step_files(run.root / name) for name in ("checkpoints", "long", "named")]
    assert files[0] == files[1] == files[2] != {}


@pytest.mark.parametrize("argv", [("--version",), ("-h",), ("--help",), ()])
def test_help_and_version_are_those_of_the_program(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], argv: tuple[str, ...]
) -> None:
    assert main_with(monkeypatch, *argv) == 0
    assert ("selftest" in capsys.readouterr().out) == (argv != ("--version",))


def test_flags_and_overrides_reach_the_config(run: tiny.Run) -> None:
    flags = ("--seq-len", 4, "--batch-size", 3, "--grad-accum", 2, "--max-steps", 2, "--dtype", "FLOAT64", "--seed", 5)
    sets = (
        "--set",
        "trainer.learning_rate=3e-4",
        "--set",
        "rms_norm_eps=1e-6",
        "--save-interval",
        2,
        "--max-checkpoints",
        1,
    )
    assert run.train(*flags, *sets, "-d", "text.txt", "-d", "text.txt") == 0
    config = json.loads((run.directory / "config.json").read_text())
    trainer, model = config["trainer"], config["model"]
    assert (model["max_seq_len"], model["dtype"], model["rms_norm_eps"]) == (4, "f64", 1e-6)
    keys = ("batch_size", "gradient_accumulation", "max_steps", "seed", "learning_rate", "save_interval", "max_checkpoints")
    assert [trainer[key] for key in keys] == [3, 2, 2, 5, 3e-4, 2, 1]
    assert config["data"]["path"] == [str(run.text)] * 2
    assert run.steps() == [2]


def test_set_wins_over_a_flag_and_a_flag_over_the_file(run: tiny.Run) -> None:
    assert run.train("--max-steps", 2) == 0 and run.steps() == [1, 2]
    again = run.into("again")
    assert again.train("--max-steps", 2, "--set", "trainer.max_steps=1") == 0 and again.steps() == [1]


def test_flag_paths_start_here_and_config_paths_at_the_config(run: tiny.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    (run.root / "here").mkdir()
    monkeypatch.chdir(run.root / "here")
    tiny.write_text(Path("other.txt"), 900, seed=3)
    change_config(run, "trainer", checkpoint_dir="./relative")
    assert tiny.cli("train", "-f", "../tiny.yaml", "--headless") == 0
    assert tiny.steps_in(Path("relative")) == [1, 2, 3]
    assert tiny.cli("train", "-f", "../tiny.yaml", "--headless", "-d", "other.txt", "--checkpoint-dir", "flag") == 0
    assert json.loads(Path("flag/config.json").read_text())["data"]["path"] == [str(run.root / "here" / "other.txt")]
    assert tiny.step_files(Path("flag")) != tiny.step_files(Path("relative"))


def test_random_data_need_no_file(run: tiny.Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.train("-d", "random") == 0
    assert "sample" not in capsys.readouterr().err
    assert run.train("-d", "random", "--resume", "auto", "--max-steps", 4) == 0
    assert run.steps() == [1, 2, 3, 4]


def test_a_bundled_model_trains_from_an_empty_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    keys = ("num_layers=2", "mamba_layers=[0]", "hidden_size=16", "mamba2_num_heads=2", "eval_fraction=0.01")
    smaller = [part for key in keys for part in ("--set", key)]
    for argv in (
        ("train", "-f", "nano-start"),
        ("train", "-f", "models/nano-start.yaml", "--overwrite"),
        ("train", "--overwrite"),
    ):
        assert tiny.cli(*argv, "--max-steps", 1, "--headless", "--target-device", "cpu", *smaller) == 0
        assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]
        assert tiny.steps_in(tmp_path / "checkpoints" / "nano-start") == [1]
    assert "sample" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------- what it prints


def test_headless_prints_json_with_the_documented_keys_on_stdout_and_nothing_else(
    run: tiny.Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.train("--set", "trainer.eval_fraction=0.2", "--set", "trainer.eval_interval=3") == 0
    out, err = capsys.readouterr()
    records = [json.loads(line) for line in out.splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3]
    assert [list(record) for record in records] == [HEADLESS_KEYS, HEADLESS_KEYS, [*HEADLESS_KEYS, "eval_loss"]]
    for record in records:
        assert all(isinstance(record[key], int | float) and np.isfinite(record[key]) for key in record)
        assert record["tokens/s"] == pytest.approx(record["it/s"] * 2 * 2 * 8)
    assert "memory: about" in err and "saved" in err and "held-out loss" in err and "sample:" in err


def test_headless_prints_the_logged_steps_only(run: tiny.Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.train("--max-steps", 9, "--set", "trainer.log_interval=4") == 0
    assert [json.loads(line)["step"] for line in capsys.readouterr().out.splitlines()] == [1, 4, 8]
    assert [line["step"] for line in run.metrics()] == [1, 4, 8]


def test_without_headless_everything_is_on_stderr(run: tiny.Run, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [argument for argument in run.argv() if argument != "--headless"]
    assert tiny.cli(*argv) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert re.search(r"step +3/3 .*loss \d.*norm \d.*lr \d.*it/s .*tok/s \d+ MB", err)


def test_the_progress_bar_shows_loss_norm_speed_time_left_and_memory(
    run: tiny.Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("oxidizr_ref.cli.report.sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("TERM", "xterm-256color")
    argv = [argument for argument in run.argv() if argument != "--headless"]
    assert tiny.cli(*argv) == 0
    out, err = capsys.readouterr()
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", err)
    assert out == "" and "3/3" in plain
    assert re.search(r"\d:\d\d:\d\d.*loss \d\.\d+ norm \d\.\d+ [\d.]+ it/s [\d,]+ tok/s \d+ MB", plain)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="compares with /proc/self/statm, which only Linux has")
@pytest.mark.parametrize("bar", [False, True], ids=["lines", "bar"])
def test_progress_shows_the_memory_this_process_holds(
    run: tiny.Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], bar: bool
) -> None:
    if bar:
        monkeypatch.setattr("oxidizr_ref.cli.report.sys.stderr.isatty", lambda: True, raising=False)
        monkeypatch.setenv("COLUMNS", "160")
    argv = [argument for argument in run.argv() if argument != "--headless"]
    assert tiny.cli(*argv) == 0
    shown = [float(number) for number in re.findall(r"tok/s (\d+) MB", capsys.readouterr().err)]
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    # The megabyte is a million bytes; between the two looks a tiny run allocates and frees next to nothing.
    assert shown and shown == pytest.approx([pages * os.sysconf("SC_PAGE_SIZE") / 1e6] * len(shown), rel=0.5)
    assert min(shown) > 20  # Python and NumPy alone take more


def test_metrics_hold_the_deterministic_fields_and_run_files_are_there(finished: tiny.Run) -> None:
    assert [set(line) for line in finished.metrics()] == [set(HEADLESS_KEYS) - tiny.OF_THE_MACHINE] * 3
    assert {path.name for path in finished.directory.iterdir()} >= {"config.json", "metrics.jsonl", "step_3.safetensors"}


def test_a_reader_that_goes_away_is_no_traceback(run: tiny.Run) -> None:
    process = tiny.start(run.argv("--max-steps", 400, "--save-interval", 400), run.root)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait(60) == 1
    assert "Traceback" not in err and "Exception ignored" not in err


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
def test_selftest_is_there() -> None:
    assert "under a minute" in command("selftest").help


@pytest.mark.long
def test_selftest_passes_within_a_minute(tmp_path: Path) -> None:
    out, _ = tiny.finish(tiny.start(["selftest"], tmp_path))
    assert "selftest passed" in out and '"probe"' in out and "killed 3 times" in out
    assert not any(tmp_path.iterdir())
