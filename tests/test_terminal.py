"""What people see: help and its examples, tables that fit the terminal, escape codes only where they are wanted, Tab."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import re
import shlex
import struct
import subprocess
import sys
import termios
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout, suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import tiny
import typer
from rich.cells import cell_len

from oxidizr_ref.cli import main as cli_main
from oxidizr_ref.cli.config_view import layer_words
from oxidizr_ref.cli.examples import EXAMPLES
from oxidizr_ref.cli.words import duration, short
from oxidizr_ref.config import bundled_config_names, load_config
from oxidizr_ref.memory import model_parts

LINES = [line for examples in EXAMPLES.values() for _, line in examples]
#: Not run here: they need a network or a device, or have tests of their own that take long.
ELSEWHERE = ("push", "selftest", "trace golden -o golden")


class Done(NamedTuple):
    """An example that was run."""

    code: int
    out: str
    err: str


def words_of(line: str) -> list[str]:
    program, *words = shlex.split(line)
    assert program == "oxidizr-ref"
    return words


def run_examples(directory: Path) -> dict[str, Done]:
    """Run all examples in their order, as they are printed, beside a ``book.txt``."""
    tiny.write_text(directory / "book.txt", 1500, seed=1)
    done = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        for name in ("NO_COLOR", "FORCE_COLOR", "HF_USERNAME"):
            patch.delenv(name, raising=False)
        patch.setenv("COLUMNS", "80")
        for line in LINES:
            words = words_of(line)
            if line.removeprefix("oxidizr-ref ").startswith(ELSEWHERE) and not line.endswith("--only tiny-llama-f32"):
                continue
            patch.setattr("sys.stdin", io.StringIO("The sun"))
            out, err = io.StringIO(), io.StringIO()
            with redirect_stdout(out), redirect_stderr(err), mock.patch("webbrowser.open") as opened:
                code = tiny.cli(*words)
            assert opened.called == ("--open" in words)
            done[line] = Done(code, out.getvalue(), err.getvalue())
    return done


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in which the models of the examples are tiny: a file of that name is taken before a bundled model."""
    directory = tmp_path_factory.mktemp("here")
    for name in ("nano-start", "llama-start"):
        run = {"max_steps": 3, "save_interval": 200, "eval_fraction": 0.02, "checkpoint_dir": f"./checkpoints/{name}"}
        sections = {"model": {**tiny.MODEL, "name": name}, "trainer": {**tiny.TRAINER, **run}}
        tiny.write_config(directory / name, sections)
    return directory


@pytest.fixture(scope="module")
def examples(here: Path) -> dict[str, Done]:
    return run_examples(here)


# ---------------------------------------------------------------------------------------------------------------- help


@cache
def commands() -> dict[str, Any]:
    """Every command by its words; ``""`` is the program."""
    program: Any = typer.main.get_command(cli_main.app)
    found = {"": program, **program.commands}
    return {**found, **{f"trace {name}": command for name, command in program.commands["trace"].commands.items()}}


def test_every_command_has_two_to_four_examples() -> None:
    assert set(EXAMPLES) == set(commands())
    assert all(2 <= len(examples) <= 4 for examples in EXAMPLES.values())
    assert len(set(LINES)) == len(LINES)


@pytest.mark.parametrize("line", LINES)
def test_every_example_is_understood_by_the_command_it_is_of(line: str) -> None:
    command, context, words = commands()[""], None, words_of(line)
    while True:
        context = command.make_context(command.name, words, parent=context)
        if not hasattr(command, "commands"):
            break
        name, command, words = command.resolve_command(context, [*context._protected_args, *context.args])
        assert command is not None, name
    shown_at = next(name for name, examples in EXAMPLES.items() if line in (line for _, line in examples))
    assert f"{line} ".startswith(f"oxidizr-ref {shown_at} ".replace("  ", " "))


@pytest.mark.thorough
def test_every_example_does_what_it_says(examples: dict[str, Done]) -> None:
    differing = {"oxidizr-ref diff checkpoints/nano-start checkpoints/llama-start"}
    failed = {line: done for line, done in examples.items() if done.code != (1 if line in differing else 0)}
    assert not failed
    assert len(examples) == len(LINES) - 5


@pytest.mark.long
def test_every_example_works_with_the_bundled_models(tmp_path: Path) -> None:
    done = run_examples(tmp_path)
    assert {line: one for line, one in done.items() if one.code} == {
        line: one for line, one in done.items() if line.endswith("diff checkpoints/nano-start checkpoints/llama-start")
    }


def test_help_shows_the_examples_of_its_command_unbroken_and_the_rest_within_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for width, names in ((60, ["", "train"]), (80, list(commands()))):
        monkeypatch.setenv("COLUMNS", str(width))
        for name in names:
            assert tiny.cli(*name.split(), "--help") == 0
            out, _ = capsys.readouterr()
            lines = [line.rstrip() for line in out.splitlines()]
            for what, line in EXAMPLES[name]:
                assert f"  # {what}" in lines and f"  {line}" in lines
            examples = {f"  {text}" for what, line in EXAMPLES[name] for text in (f"# {what}", line)}
            assert max(cell_len(line) for line in lines if width == 80 or line not in examples) <= width
            assert "\x1b" not in out and "<bool>" not in out and (width < 80 or "…" not in out)


def test_commands_are_grouped_by_what_somebody_wants_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert tiny.cli("--help") == 0
    out = capsys.readouterr().out
    assert re.findall(r"^╭─ (\w+) ", out, re.M) == ["Options", "Train", "Data", "Use", "Publish", "Check"]


def test_no_command_at_all_shows_three_to_begin_with(capsys: pytest.CaptureFixture[str]) -> None:
    assert tiny.cli() == 0
    out, err = capsys.readouterr()
    assert err == "" and len(out.splitlines()) < 20 and max(map(len, out.splitlines())) <= 80
    assert re.findall(r"^  oxidizr-ref (\w+)", out, re.M) == ["train", "generate", "report"]


# ------------------------------------------------------------------------------------------------------- on a terminal

#: What prints tables, in the directory of the examples.
TABLES = {
    "inspect -f": "inspect -f nano",
    "inspect": "inspect checkpoints/nano-start",
    "diff": "diff checkpoints/nano-start checkpoints/llama-start",
    "eval": "eval checkpoints/nano-start -d book.txt --compare checkpoints/llama-start --curve",
    "prepare": "prepare book.txt -o again.bin --overwrite --stats",
    "pack": "pack --checkpoint-dir checkpoints/llama-start --overwrite -u me",
    "convert": "convert checkpoints/llama-start -o again.llama --overwrite",
}
TRAIN = "train -f nano-start -d book.txt --checkpoint-dir again --overwrite --threads 1"
#: What prints lines, which a terminal breaks where it likes, and what typer prints.
LINES_OF_TEXT = {
    "verify": "verify checkpoints/nano-start",
    "trace show": "trace show golden.trace",
    "bench": "bench -f nano-start --rounds 1",
    "help": "train --help",
    "train": TRAIN,
}
XTERM = {"TERM": "xterm-256color"}
#: Columns, environment, and what runs there. Bars move on the last two.
TERMINALS: dict[str, tuple[int, dict[str, str], dict[str, str]]] = {
    "wide": (400, {"TERM": "dumb"}, TABLES),
    "NO_COLOR": (80, {**XTERM, "NO_COLOR": "1", "FORCE_COLOR": "1"}, {**TABLES, **LINES_OF_TEXT}),
    "dumb": (60, {"TERM": "dumb"}, {**TABLES, "train": TRAIN}),
    "xterm": (80, XTERM, {"inspect -f": TABLES["inspect -f"], "help": LINES_OF_TEXT["help"], "train": TRAIN}),
    "narrow xterm": (60, XTERM, {"train": TRAIN}),
}
_MARK = "~~~ next ~~~"


def on_terminals(jobs: list[tuple[int, dict[str, str], list[str]]], cwd: Path) -> list[str]:
    """What each command prints on a terminal of so many columns with such an environment: one process runs them all."""
    ours, theirs = pty.openpty()
    environment = {name: value for name, value in tiny.environment().items() if name not in ("COLUMNS", "LINES")}
    process = subprocess.Popen(
        [sys.executable, __file__, json.dumps(jobs)], cwd=cwd, env=environment, stdin=theirs, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    os.write(ours, b"\n" * sum(argv[0] == "pack" for _, _, argv in jobs))  # Enter: the step that is offered
    seen = b""
    with suppress(OSError):  # the other end is closed
        while piece := os.read(ours, 1 << 16):
            seen += piece
    os.close(ours)
    assert process.wait(60) == 0, seen.decode(errors="replace")
    _, *outputs = seen.decode().replace("\r\n", "\n").split(f"{_MARK}\n")
    assert len(outputs) == len(jobs)
    return outputs


def _run_jobs(jobs: list[tuple[int, dict[str, str], list[str]]]) -> None:
    for columns, environment, argv in jobs:
        for name in ("TERM", "NO_COLOR", "FORCE_COLOR"):
            os.environ.pop(name, None)
        os.environ.update(environment)
        fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        print(_MARK, flush=True)
        tiny.cli(*argv)


@pytest.fixture(scope="module")
def screens(here: Path, examples: dict[str, Done]) -> dict[str, dict[str, str]]:
    """What is seen, by terminal and command."""
    assert examples
    jobs = [(columns, env, line.split()) for columns, env, lines in TERMINALS.values() for line in lines.values()]
    outputs = iter(on_terminals(jobs, here))
    return {terminal: {name: next(outputs) for name in lines} for terminal, (_, _, lines) in TERMINALS.items()}


def is_text(line: str) -> bool:
    """No part of a table: the terminal breaks it where it likes, so that it can be copied."""
    return line.startswith(("again.", "hf/", "step (", "loss of A - B", "moved ", "saved ", "held-out ", "no --license"))


def bare(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


@pytest.mark.thorough
@pytest.mark.parametrize("name", TABLES)
def test_tables_fit_the_terminal_and_lose_nothing(screens: dict[str, dict[str, str]], name: str) -> None:
    wide = screens["wide"][name]
    for terminal in ("NO_COLOR", "dumb"):
        text, columns = screens[terminal][name], TERMINALS[terminal][0]
        assert "error: " not in text
        assert max(cell_len(line) for line in text.splitlines() if not is_text(line)) <= columns, text
        assert Counter(re.findall(r"\S", text)) == Counter(re.findall(r"\S", wide)), text


def test_neither_no_color_nor_a_dumb_terminal_gets_an_escape_code(screens: dict[str, dict[str, str]]) -> None:
    for terminal in ("wide", "NO_COLOR", "dumb"):
        assert not [name for name, text in screens[terminal].items() if "\x1b" in text or "\r" in text]


def test_other_terminals_get_bold_words_a_frame_and_a_bar(screens: dict[str, dict[str, str]]) -> None:
    assert all("\x1b[1m" in text for text in screens["xterm"].values())
    for terminal in ("xterm", "narrow xterm"):
        columns = TERMINALS[terminal][0]
        lines = [line for part in bare(screens[terminal]["train"]).split("\n") for line in part.split("\r")]
        assert any(line.startswith("╭─ nano-start ─") for line in lines) and any("━ 3/3 0:00:00" in line for line in lines)
        assert re.search(r"loss \d.*norm \d.*it/s .*tok/s \d+ MB", " ".join(lines))
        assert max(cell_len(line) for line in lines if not is_text(line)) <= columns


def test_wide_characters_wrap_within_the_terminal_and_none_is_lost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    name = "模型" * 40 + "\N{SNOWMAN}" * 7
    run = tiny.make_run(tmp_path / ("目录" * 20), {"name": name})
    assert tiny.cli("inspect", "-f", run.config) == 0
    out = capsys.readouterr().out
    assert max(cell_len(line) for line in out.splitlines()) <= 60
    assert [out.count(character) for character in "模型\N{SNOWMAN}目"] == [40, 40, 7, 20]


def test_what_is_no_terminal_gets_no_escape_code(examples: dict[str, Done]) -> None:
    of_a_model = "oxidizr-ref generate"  # whose bytes go to a file or a pipe as they are
    assert not [line for line, done in examples.items() if "\x1b" in done.out + done.err and of_a_model not in line]


# -------------------------------------------------------------------------------------------------------------- a run


def told(err: str) -> dict[str, str]:
    """The lines ``label: text`` at the start of a run."""
    return dict(line.split(": ", 1) for line in err.splitlines() if ": " in line)


def test_a_run_says_before_it_starts_what_it_will_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = {"num_layers": 4, "mamba_layers": [0, 1, 3], "num_experts": 4, "max_seq_len": 7}
    plan = {"max_steps": 10, "save_interval": 4, "max_checkpoints": 3, "keep_every": 8, "eval_fraction": 0.1}
    rate = {"lr_schedule": "linear", "warmup_steps": 2, "min_lr_ratio": 0.5, "learning_rate": 0.01}
    run = tiny.make_run(tmp_path, model, {**plan, **rate})
    assert run.train("--threads", 2, "--seed", 3) == 0
    lines, parts = told(capsys.readouterr().err), model_parts(load_config(run.config))
    total, active = sum(part.parameters for part in parts), sum(part.active for part in parts)
    assert lines["tiny"] == f"{total:,} parameters ({active:,} active), f32, cpu with 2 threads, seed 3"
    assert lines["layers"] == "0-1, 3 Mamba1 32 channels, state 16; 2 GQA 2/1 x 8 + MoE 2 of 4 x 24"
    windows, held_out = 2699 // 7, 299 // 7
    assert lines["data"] == f"{run.text} (byte): {windows} windows of 7 tokens; {held_out} windows held out"
    assert lines["steps"] == f"10 of 28 tokens; {40 / windows:.3g} epochs in all"
    last = short(run.metrics()[-2]["learning_rate"])  # the last line has the held-out loss
    assert lines["learning rate"] == f"0.01 after 2 steps of warm-up, linear, {last} at the end"
    assert "one every 4 steps; the newest 3, multiples of 8 stay, at most" in lines["checkpoints"]
    assert lines["note"].startswith("trainer.load_balance_alpha is 0")
    assert run.train("--threads", 2, "--seed", 3, "--resume", "auto", "--max-steps", 12, "--time-limit", 600) == 0
    assert told(capsys.readouterr().err)["steps"].startswith("11 to 12 of 28 tokens, within 10 min; ")


@pytest.mark.parametrize("name", bundled_config_names())
def test_the_layers_of_every_bundled_model_fit_three_lines(name: str) -> None:
    config = load_config(name)
    words = layer_words(config.model, model_parts(config))
    assert len(words) < 3 * 60
    named = [number for part in words.split("; ") for number in re.match(r"[\d, -]+", part)[0].split(",")]  # type: ignore[index]
    ranges = [[int(end) for end in number.split("-")] for number in named]
    assert sorted(n for ends in ranges for n in range(ends[0], ends[-1] + 1)) == list(range(config.model.num_layers))


@pytest.mark.parametrize("flags", [(), ("--headless",)])
def test_the_time_of_the_other_steps_is_told_once_there_are_some_to_judge_by(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...]
) -> None:
    run = tiny.make_run(tmp_path, trainer={"max_steps": 9})
    clock = iter(range(0, 100_000, 60))  # seconds: a minute a step
    monkeypatch.setattr("oxidizr_ref.cli.report.time.perf_counter", lambda: next(clock))
    assert tiny.cli("train", "-f", run.config, *flags) == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("time: ")]
    assert re.fullmatch(r"time: about \d+ (min|h \d+ min) for the other 4 steps", line)


def test_durations_are_told_in_units_that_fit() -> None:
    seconds = {0.4: "0 s", 89: "89 s", 95: "2 min", 3600: "60 min", 5400: "1 h 30 min", 86_400: "24 h 0 min", 9e5: "10 days"}
    assert {number: duration(number) for number in seconds} == seconds


# ----------------------------------------------------------------------------------------------------------------- Tab


def offered(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, line: str) -> list[str]:
    """What bash is told when Tab is pressed at the end of a line."""
    words = line.split()
    monkeypatch.setenv("_OXIDIZR_REF_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", line)
    monkeypatch.setenv("COMP_CWORD", str(len(words) - (not line.endswith(" "))))
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        tiny.cli()
    assert ended.value.code == 0
    return capsys.readouterr().out.split()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("oxidizr-ref tra", ["train", "trace"]),
        ("oxidizr-ref trace ", ["record", "compare", "show", "golden"]),
        ("oxidizr-ref train -f nano-s", ["nano-start"]),
        ("oxidizr-ref -f ", bundled_config_names()),
        ("oxidizr-ref -f nano --resu", ["--resume"]),
        ("oxidizr-ref -f nano --resume ", ["auto"]),
        ("oxidizr-ref train --dtype b", ["bf16"]),
        ("oxidizr-ref inspect --config=shake", ["shakespeare-char"]),
        ("oxidizr-ref prepare --tokenizer c", ["char", "cl100k_base"]),
        ("oxidizr-ref pack --checkpoint-dir checkpoints/llama-start -c ", ["latest", "final", "200"]),
        ("oxidizr-ref pack --checkpoint-dir book.txt -c l", ["latest"]),
        ("oxidizr-ref train -d bo", []),  # then the shell offers files
    ],
)
def test_tab_offers_what_fits(
    here: Path,
    examples: dict[str, Done],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    line: str,
    expected: list[str],
) -> None:
    assert examples
    monkeypatch.chdir(here)
    assert offered(capsys, monkeypatch, line) == expected


def test_the_script_for_bash_names_this_program(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_OXIDIZR_REF_COMPLETE", "source_bash")
    with pytest.raises(SystemExit):
        tiny.cli()
    script = capsys.readouterr().out
    assert "_OXIDIZR_REF_COMPLETE=complete_bash" in script and "complete -o default" in script


if __name__ == "__main__":
    _run_jobs(json.loads(sys.argv[1]))
