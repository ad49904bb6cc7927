"""``oxidizr-ref generate``: every way to ask, what it prints, conversations on a terminal, and how it refuses: in a line."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import re
import select
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from oxidizr_ref.chat import Message, chat_prompt
from oxidizr_ref.cli import generate as cli_generate
from oxidizr_ref.cli.main import _run
from oxidizr_ref.generation import generate
from oxidizr_ref.interop.opened import open_model
from oxidizr_ref.sampling import Sampling
from oxidizr_ref.tokenizers import ByteTokenizer

BYTES = ByteTokenizer()
FEW = ("--max-tokens", 12)


def train(root: Path, tokenizer: str, model: dict[str, Any], text: str) -> Path:
    """The directory of a short run."""
    run = tiny.make_run(root, model, {"max_steps": 30, "save_interval": 10}, {"tokenizer": tokenizer})
    run.text.write_text(text * 20, "utf-8")
    assert run.train() == 0
    return run.directory


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama over bytes, trained until it writes letters."""
    root = tmp_path_factory.mktemp("bytes")
    return train(root, "byte", {"max_seq_len": 32}, "the cat sat on the mat and the dog ran<|endoftext|>")


@pytest.fixture(scope="module")
def chars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mamba2 over characters, which knows no end and no roles."""
    states = {"mamba_layers": [0], "mamba2_num_heads": 4, "mamba2_state_size": 8, "mamba2_chunk_size": 8, "vocab_size": 17}
    return train(tmp_path_factory.mktemp("chars"), "char", states, "the cat sat on a mat, a dog ran. ")


class Told:
    """What the command line printed and returned."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *argv: Any, code: int = 0) -> tuple[str, str]:
        self._capsys.readouterr()
        assert _run(["generate", *map(str, argv)]) == code
        out, err = self._capsys.readouterr()
        assert "Traceback" not in err
        return out, err

    def json(self, *argv: Any) -> list[dict[str, Any]]:
        out, err = self(*argv, "--json")
        assert err == ""
        return [json.loads(line) for line in out.rstrip("\n").split("\n")]

    def error(self, *argv: Any) -> str:
        """The one line of a refusal."""
        self._capsys.readouterr()
        code = _run(["generate", *map(str, argv)])
        out, err = self._capsys.readouterr()
        assert code in (1, 2) and out == "" and len(err.splitlines()) == 1 and err.startswith("error: ")
        return err.removeprefix("error: ").strip()


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Told:
    monkeypatch.setattr("sys.stdin", io.StringIO("from stdin"))
    return Told(capsys)


def expected(path: Path, prompt: str, begin: bool = True, **settings: Any) -> list[int]:
    """The tokens that the library draws after a text."""
    opened = open_model(path)
    assert opened.tokenizer is not None
    ids = [opened.begin] * (begin and opened.begin is not None) + opened.tokenizer.encode(prompt).tolist()
    ends = () if opened.tokenizer.end_of_text is None else (opened.tokenizer.end_of_text,)
    below = opened.tokenizer.vocab_size
    (sequence,) = generate(opened.model(), [np.array(ids)], Sampling(**{"max_tokens": 12, **settings}), ends, below)
    return sequence.tokens


# --- ways to ask ------------------------------------------------------------------------------------------------------


def test_a_prompt_is_continued_as_the_library_does_after_the_token_that_begins_documents(run: Path, told: Told) -> None:
    out, err = told(run, "-p", "the cat", *FEW)
    assert out == BYTES.decode(expected(run, "the cat")) + "\n"
    assert re.fullmatch(r"\[12 tokens in \d+\.\d\d s \(\d+ a second\), ended by length\]\n", err)
    out, _ = told(run, "-p", "the cat", "--raw", *FEW)
    assert out == BYTES.decode(expected(run, "the cat", begin=False)) + "\n"
    assert expected(run, "the cat") != expected(run, "the cat", begin=False)


def test_every_setting_reaches_the_sampler(run: Path, told: Told) -> None:
    settings = {"temperature": 1.3, "top_k": 7, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2, "seed": 5}
    flags = [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", value)]
    (answer,) = told.json(run, "-p", "a dog", *FEW, *flags)
    assert answer["tokens"] == expected(run, "a dog", **settings)


def test_equal_seeds_give_equal_text_and_other_seeds_other_text(run: Path, told: Told) -> None:
    first, again, other = (told(run, "-p", "the", *FEW, "--seed", seed, "--temperature", 1.5)[0] for seed in (1, 1, 2))
    assert first == again != other


def test_threads_change_nothing(run: Path, told: Told) -> None:
    with tiny.threads(2):
        assert told(run, "-p", "the", *FEW)[0] == told(run, "-p", "the", *FEW, "--threads", 1)[0]


def test_several_prompts_are_numbered_and_each_is_continued_with_draws_of_its_own(run: Path, told: Told) -> None:
    out, err = told(run, "-p", "the cat", "-p", "a", *FEW)
    answers = told.json(run, "-p", "the cat", "-p", "a", *FEW)
    assert out == "".join(f"--- {n}\n{answer['text']}\n" for n, answer in enumerate(answers, 1)) and err == ""
    assert answers[0]["tokens"] == expected(run, "the cat")
    same = told.json(run, "-p", "a", "-p", "a", *FEW)
    assert same[0]["tokens"] != same[1]["tokens"]
    greedy = told.json(run, "-p", "a", "-p", "a", *FEW, "--temperature", 0)
    assert greedy[0] == greedy[1]


def test_many_prompts_are_drawn_some_at_a_time_with_the_draws_of_all_at_once(
    run: Path, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = [word for text in ("the cat", "a", "a", "the dog", "a") for word in ("-p", text)]
    together = told.json(run, *flags, *FEW, "--temperature", 1.5)
    monkeypatch.setattr("oxidizr_ref.cli.generate._TOGETHER", 2)
    apart = told.json(run, *flags, *FEW, "--temperature", 1.5)
    assert apart == together and len({str(apart[i]["tokens"]) for i in (1, 2, 4)}) == 3


def test_a_prompt_that_cannot_be_encoded_is_named_before_any_is_answered(
    chars: Path, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("oxidizr_ref.cli.generate._TOGETHER", 1)
    line = told.error(chars, "-p", "the", "-p", "the cat", "-p", "the Z")
    assert "prompt 3: 'Z' (U+005A)" in line


def test_prompts_come_from_a_file_of_text_one_a_line(run: Path, told: Told, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes(b"\xef\xbb\xbfthe cat\r\n\r\n  \na dog\x0bran\n")
    answers = told.json(run, "--prompts", file, *FEW)
    assert [answer["prompt"] for answer in answers] == ["the cat", "a dog\x0bran"]
    assert answers == told.json(run, "-p", "the cat", "-p", "a dog\x0bran", *FEW)


def test_prompts_come_from_json_lines_texts_and_conversations_mixed(run: Path, told: Told, tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "Be\u2028brief."}, {"role": "user", "content": "cat?"}]
    lines = [{"prompt": "the cat", "id": 7}, {"messages": messages}]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n", "utf-8")
    plain, chat = told.json(run, "--prompts", file, *FEW)
    file = file.rename(tmp_path / "prompts.json-lines")
    assert [plain, chat] == told.json(run, "--prompts", file, *FEW)
    assert (plain["prompt"], chat["prompt"]) == ("the cat", messages)
    assert plain["tokens"] == expected(run, "the cat")
    (alone,) = told.json(run, "--user", "cat?", "--system", "Be\u2028brief.", *FEW, "--temperature", 0)
    assert alone == told.json(run, "--prompts", file, *FEW, "--temperature", 0)[1]


def test_a_conversation_is_laid_out_as_in_training(run: Path, told: Told) -> None:
    text = "".join(chat_prompt([Message("system", "Be kind."), Message("user", "Hi")]))
    assert text == "<|system|>Be kind.<|user|>Hi<|assistant|>"
    asked = told(run, "--user", "Hi", "--system", "Be kind.", *FEW)[0]
    assert asked == told(run, "-p", text, *FEW)[0]


def test_an_answer_ends_where_somebody_else_would_speak_and_a_text_beside_it_does_not(
    run: Path, told: Told, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = iter([97, 98, 257, 257, 99, 99, 256])  # of two sequences in turn: a b, <|user|> of each; then of one

    def scripted(logits: Any, *_: Any) -> int:
        assert logits.shape == (260,)
        return next(drawn)

    monkeypatch.setattr("oxidizr_ref.generation.choose", scripted)
    file = tmp_path / "both.jsonl"
    file.write_text('{"prompt": "<|user|>x<|assistant|>"}\n{"messages": [{"role": "user", "content": "x"}]}')
    plain, chat = told.json(run, "--prompts", file, "--raw", *FEW)
    assert (chat["text"], chat["finish"]) == ("b", "stop")
    assert (plain["text"], plain["finish"]) == ("a<|user|>cc", "stop")


def test_a_text_on_stdin_is_continued_when_it_is_no_terminal(run: Path, told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    out, _ = told(run, *FEW)
    assert out == told(run, "-p", "from stdin", *FEW)[0]
    monkeypatch.setattr("sys.stdin", io.StringIO("the dog"))
    assert told.json(run, *FEW) == told.json(run, "-p", "the dog", *FEW)
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert told(run, *FEW)[0] == BYTES.decode(expected(run, "")) + "\n", "the beginning of a document"


# --- what comes out ---------------------------------------------------------------------------------------------------


def test_json_has_prompt_text_tokens_and_why_it_ended_and_log_probabilities_if_wanted(run: Path, told: Told) -> None:
    (answer,) = told.json(run, "-p", "the", *FEW)
    assert answer.keys() == {"prompt", "text", "tokens", "finish"}
    assert (answer["prompt"], answer["finish"], len(answer["tokens"])) == ("the", "length", 12)
    assert answer["text"] == BYTES.decode(answer["tokens"])
    (scored,) = told.json(run, "-p", "the", *FEW, "--logprobs")
    assert {**scored, "logprobs": None} == {**answer, "logprobs": None}
    assert len(scored["logprobs"]) == 12 and all(value < 0 for value in scored["logprobs"])
    _, err = told(run, "-p", "the", *FEW, "--logprobs")
    assert f"mean log-probability {np.mean(scored['logprobs']):.3f} nats" in err
    _, err = told(run, "-p", "the", "-p", "a", *FEW, "--logprobs")
    assert len(err.splitlines()) == 2 and err.startswith(f"[mean log-probability {np.mean(scored['logprobs']):.3f} nats]\n")


def test_no_tokens_wanted_are_none(run: Path, told: Told) -> None:
    (answer,) = told.json(run, "-p", "the", "--max-tokens", 0)
    assert (answer["text"], answer["tokens"], answer["finish"]) == ("", [], "length")


@pytest.mark.parametrize("form", ["stream", "json", "several"])
def test_a_text_ends_before_a_stop_text_of_several_tokens(chars: Path, told: Told, form: str) -> None:
    asking = ("-p", "the", "--max-tokens", 40, "--temperature", 1)
    (answer,) = told.json(chars, *asking)
    whole = answer["text"]
    stop = whole[9:13]
    assert len(stop) == 4 and len(whole) == 40
    stops = ("--stop", "never to be seen", "--stop", stop)
    cut = whole[: whole.index(stop)]
    if form == "stream":
        out, err = told(chars, *asking, *stops)
        assert out == cut + "\n" and "ended by stop" in err
    elif form == "json":
        (answer,) = told.json(chars, *asking, *stops)
        assert (answer["text"], answer["finish"]) == (cut, "stop")
        assert len(answer["tokens"]) == len(cut + stop)
    else:
        out, _ = told(chars, *asking, "-p", "the", *stops)
        assert out.startswith(f"--- 1\n{cut}\n--- 2\n")


def test_a_stop_text_that_is_certain_only_at_the_end_is_one(run: Path, told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last token is half a character, for which the text before it waits."""
    monkeypatch.setattr("oxidizr_ref.text_stream.TextStream.push", lambda self, token: self._ids.append(token) or "")
    drawn = iter(b"ab\xc3" * 2)
    monkeypatch.setattr("oxidizr_ref.generation.choose", lambda *_: next(drawn))
    (answer,) = told.json(run, "-p", "x", "--max-tokens", 3, "--stop", "b")
    assert (answer["text"], answer["finish"]) == ("a", "stop")
    out, err = told(run, "-p", "x", "--max-tokens", 3, "--stop", "b")
    assert out == "a\n" and "ended by stop" in err


def test_a_model_over_characters_writes_its_own(chars: Path, told: Told) -> None:
    (answer,) = told.json(chars, "-p", "the cat", *FEW)
    assert answer["tokens"] == expected(chars, "the cat") and len(answer["text"]) == 12


def test_the_text_is_the_same_from_a_file_a_run_a_package_and_hugging_face_s_layout(
    run: Path, chars: Path, told: Told, tmp_path: Path
) -> None:
    asking = ("-p", "the cat", *FEW, "--seed", 3)
    for source, name in ((run, "llama"), (chars, "mamba2")):
        said = told.json(source, *asking)
        last = source / "step_30.safetensors"
        package, exported = tmp_path / name, tmp_path / f"{name} exported"
        assert tiny.cli("pack", "--checkpoint-dir", source, "-c", "final", "-o", package) == 0
        assert tiny.cli("convert", last, "-o", exported) == 0
        assert json.loads((package / "config.json").read_text())["model_type"] == name
        for place in (last, package, exported):
            assert told.json(place, *asking) == said, place


STRANGE = "é\u3000\u200d🦀\tb\nc"
#: Escape, delete, the one-byte beginning of a command, carriage return, backspace, and an order of writing.
COMMANDS = "\x1b[2J\x7f\x9b31m\r\x08\u202e"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_stdout_that_lacks_a_sign_gets_the_rest(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asking = ["generate", str(run), "-p", "x", "--max-tokens", "5"]
    for flags, expected in (([], "\xe9\t?"), (["--json"], '"text": "\\u00e9\\t\\u0416"')):
        drawn = iter("é\tЖ".encode())
        monkeypatch.setattr("oxidizr_ref.generation.choose", lambda *_, drawn=drawn: next(drawn))
        octets = io.BytesIO()
        monkeypatch.setattr("sys.stdout", io.TextIOWrapper(octets, "latin-1"))
        assert _run([*asking, *flags]) == 0
        assert expected.encode("latin-1") in octets.getvalue()


@pytest.mark.parametrize("several", [False, True])
def test_nothing_that_could_command_a_terminal_is_written_to_one_and_everything_to_a_file(
    run: Path, told: Told, monkeypatch: pytest.MonkeyPatch, several: bool
) -> None:
    octets = (STRANGE + COMMANDS).encode()
    asking = [run, "-p", "x", *(("-p", "y") if several else ()), "--max-tokens", len(octets)]

    def drawn(*_: Any) -> int:
        return next(tokens)

    monkeypatch.setattr("oxidizr_ref.generation.choose", drawn)
    tokens = iter([octet for octet in octets for _ in range(1 + several)])
    assert STRANGE + COMMANDS in told(*asking)[0]
    tokens = iter([octet for octet in octets for _ in range(1 + several)])
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    assert _run(["generate", *map(str, asking)]) == 0
    masked = re.sub(r"[\x1b\x7f\x9b\r\x08\u202e]", "\N{REPLACEMENT CHARACTER}", COMMANDS)
    assert STRANGE + masked in terminal.getvalue()
    assert not set(COMMANDS) & set(terminal.getvalue()) - set("[2J31m")
    tokens = iter([octet for octet in octets for _ in range(1 + several)])
    terminal.truncate(0)
    assert _run(["generate", *map(str, asking), "--json"]) == 0
    assert terminal.getvalue().replace("\n", "").strip("\0").isascii()
    assert json.loads(terminal.getvalue().strip("\0").splitlines()[0])["text"] == STRANGE + COMMANDS


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["-p", "a", "--user", "b"], "three ways to ask; give one"),
        (["-p", "a", "--system", "b"], "give --user with it"),
        (["--system", "b"], "give --user with it"),
        (["-p", "a", "--temperature", "-1"], "--temperature -1.0: expected a number 0 or more"),
        (["-p", "a", "--temperature", "hot"], "Invalid value for '--temperature'"),
        (["-p", "a", "--top-p", "0"], "--top-p 0.0: expected"),
        (["-p", "a", "--max-tokens", "-1"], "--max-tokens -1"),
        (["-p", "a", "--seed", "-1"], "--seed -1"),
        (["-p", "", "--raw"], "the prompt is empty"),
        (["-p", "a", "-p", "", "--raw"], "prompt 2: the prompt is empty"),
        (["-p", "a", "-p", "b\udcff"], "prompt 2: half a surrogate pair at position 1"),
        (["--prompts", "{tmp}/absent.txt"], "absent.txt: cannot be read"),
        (["--prompts", "{tmp}"], "cannot be read"),
        (["--prompts", "{tmp}/empty.txt"], "empty.txt: holds no prompt"),
        (["--prompts", "{tmp}/latin.txt"], "latin.txt: cannot be read"),
        (["--prompts", "{tmp}/broken.jsonl"], "broken.jsonl, line 3: expected"),
        (["--target-device", "gpu", "-p", "a"], "--target-device gpu"),
    ],
)
def test_what_cannot_be_done_is_told_in_a_line(run: Path, told: Told, tmp_path: Path, flags: list[str], words: str) -> None:
    (tmp_path / "empty.txt").write_text(" \n\n")
    (tmp_path / "latin.txt").write_bytes("Água".encode("latin-1"))
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a"}\n\n{"prompt": 5}\n')
    assert words in told.error(run, *(flag.format(tmp=tmp_path) for flag in flags))


@pytest.mark.parametrize(
    "line",
    [
        "the cat",
        "[]",
        "{}",
        '{"prompt": null}',
        '{"messages": []}',
        '{"messages": [{"role": "robot", "content": "x"}]}',
        '{"messages": [{"role": "user"}]}',
        '{"messages": [{"role": "user", "content": 5}]}',
        '{"messages": "user"}',
        "[" * 100_000,
    ],
)
def test_a_line_that_is_no_prompt_is_named(run: Path, told: Told, tmp_path: Path, line: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(f'{{"prompt": "a"}}\n{line}\n')
    assert told.error(run, "--prompts", file).startswith(f"--prompts {file}, line 2: expected")


def test_a_character_that_a_model_does_not_know_is_told(chars: Path, told: Told) -> None:
    assert "'Z' (U+005A) at position 4 of the text is not in the char vocabulary" in told.error(chars, "-p", "the Z")
    assert told.error(chars, "-p", "the", "-p", "Z").startswith("prompt 2: 'Z'")


@pytest.mark.parametrize("stdin", [None, io.TextIOWrapper(io.BytesIO(b"\xff"), "utf-8")], ids=["closed", "no text"])
def test_a_stdin_that_cannot_be_read_is_told(run: Path, told: Told, monkeypatch: pytest.MonkeyPatch, stdin: Any) -> None:
    monkeypatch.setattr("sys.stdin", stdin)
    assert told.error(run).startswith("stdin: cannot be read")


def test_broken_weights_are_told(run: Path, told: Told, tmp_path: Path) -> None:
    def spoil(tensors: dict[str, Any], _: dict[str, str]) -> None:
        tensors["norm.weight"] = np.full_like(tensors["norm.weight"], np.nan)

    file = tiny.rewrite(run / "step_30.safetensors", spoil, tmp_path / "broken.safetensors")
    _, err = told(file, "-p", "a", code=1)
    assert err == "error: the model's logits are not finite; its weights are broken: use another checkpoint\n"


def test_a_damaged_newest_file_is_passed_over_and_told(run: Path, told: Told, tmp_path: Path) -> None:
    for step in (20, 30):
        (tmp_path / f"step_{step}.safetensors").write_bytes((run / f"step_{step}.safetensors").read_bytes())
    with (tmp_path / "step_30.safetensors").open("r+b") as file:
        file.seek(-5, os.SEEK_END)
        file.write(b"\0\0\0")
    out, err = told(tmp_path, "-p", "the", *FEW)
    assert out == told(run / "step_20.safetensors", "-p", "the", *FEW)[0]
    assert err.startswith("passed over: ") and "step_30" in err.splitlines()[0]


# --- conversations ----------------------------------------------------------------------------------------------------


def conversed(monkeypatch: pytest.MonkeyPatch, path: Path, lines: list[Any], *flags: Any) -> list[str]:
    """Hold a conversation in this process: lines are typed, or raised. Returns the prompts that the model was given."""
    given: list[str] = []
    typed = iter(lines)

    def ask(_: str) -> str:
        line = next(typed, EOFError())
        if isinstance(line, BaseException):
            raise line
        return str(line)

    original = cli_generate._Writer.stream

    def noted(self: Any, prompt: Any, turn: int = 0) -> str:
        given.append(prompt if isinstance(prompt, str) else "".join(chat_prompt(prompt)))
        return original(self, prompt, turn)

    monkeypatch.setattr("builtins.input", ask)
    monkeypatch.setattr("sys.stdin", Terminal())
    monkeypatch.setattr(cli_generate._Writer, "stream", noted)
    assert _run(["generate", str(path), *map(str, flags)]) == 0
    return given


def test_a_conversation_remembers_what_was_said_until_new(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ["Hi", "", "And?", " /new ", "Hi"]
    first, second, third = conversed(monkeypatch, run, lines, "--system", "Be kind.", *FEW)
    out, err = capsys.readouterr()
    answers = out.splitlines()
    assert first == third == "<|system|>Be kind.<|user|>Hi<|assistant|>"
    said = second.removeprefix(first).removesuffix("<|user|>And?<|assistant|>")
    assert said and out.startswith(said) and len(answers) >= 3
    assert err.splitlines()[0].startswith(f"{run}/step_30.safetensors (step 30). Say something; Ctrl-C stops an answer")


def test_a_model_without_roles_continues_each_line_by_itself(
    chars: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert conversed(monkeypatch, chars, ["the cat", "a dog"], *FEW) == ["the cat", "a dog"]
    assert "Begin a text" in capsys.readouterr().err


def test_errors_and_ctrl_c_do_not_end_a_conversation_and_leave_no_trace_in_it(
    run: Path, chars: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stop = KeyboardInterrupt()
    broken = UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")
    assert conversed(monkeypatch, chars, ["the Z", stop, broken, "the cat"], *FEW) == ["the Z", "the cat"]
    err = capsys.readouterr().err
    assert "error: 'Z' (U+005A)" in err and "error: no UTF-8" in err and "Traceback" not in err
    monkeypatch.undo()

    step = cli_generate.Generation.step
    steps = iter(range(100))

    def interrupted(self: Any) -> list[int]:
        if next(steps) == 3:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(cli_generate.Generation, "step", interrupted)
    assert conversed(monkeypatch, run, ["Hi", "Hi"], *FEW) == ["<|user|>Hi<|assistant|>"] * 2
    out = capsys.readouterr().out.splitlines()
    assert out[1].startswith(out[0]), "the same draws again"


def test_json_is_no_conversation(run: Path, told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", Terminal())
    assert "--json needs a prompt" in told.error(run, "--json")


class Typist:
    """Somebody at a terminal of their own, in front of ``oxidizr-ref generate``."""

    def __init__(self, *argv: Any) -> None:
        self.seen = ""
        self.child, self.terminal = pty.fork()
        if self.child == 0:  # becomes the command; nothing of this process may go on
            with contextlib.suppress(BaseException):
                signal.signal(signal.SIGINT, signal.SIG_DFL)  # what a shell starts in the background ignores Ctrl-C
                environment = tiny.environment(TERM="dumb", PYTHONWARNINGS="error")
                os.execve(sys.executable, [sys.executable, "-m", "oxidizr_ref", "generate", *map(str, argv)], environment)
            os._exit(127)

    def until(self, text: str) -> str:
        """What the terminal shows until ``text`` is there; that and what is before it is taken away."""
        deadline = time.monotonic() + 60
        while text not in self.seen:
            ready, _, _ = select.select([self.terminal], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"waited for {text!r}, saw {self.seen!r}"
            try:
                self.seen += os.read(self.terminal, 4096).decode(errors="replace").replace("\r\n", "\n")
            except OSError:  # the other end is closed
                raise AssertionError(f"ended before {text!r}: {self.seen!r}") from None
        before, _, self.seen = self.seen.partition(text)
        return before

    def types(self, keys: str) -> None:
        os.write(self.terminal, keys.encode())

    def leaves(self) -> int:
        """The exit code."""
        _, status = os.waitpid(self.child, 0)
        os.close(self.terminal)
        return os.waitstatus_to_exitcode(status)


@contextlib.contextmanager
def typing(*argv: Any) -> Iterator[Typist]:
    typist = Typist(*argv)
    try:
        yield typist
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            os.kill(typist.child, signal.SIGKILL)
            typist.leaves()
        raise


def test_at_a_terminal_lines_are_edited_ctrl_c_stops_an_answer_and_ctrl_d_ends(chars: Path) -> None:
    with typing(chars, "--max-tokens", 1_000_000, "--stop", ",") as typist:  # it knows no end of its own
        typist.until("Begin a text")
        typist.until("> ")
        typist.types("the cx\x7fat\x01\x05\n")  # Backspace, to the beginning, to the end
        typist.until("ended by stop]")
        typist.until("> ")
        typist.types("\x1b[A\n")  # the line before once more
        typist.until("the cat")
        typist.until("ended by stop]")
        typist.until("> ")
        typist.types("half a line")
        typist.until("half a line")
        time.sleep(0.3)  # Python's readline overlooks a signal while it reads a key, until the next one
        typist.types("\x03")
        typist.until("> ")
        typist.types("/new\n")
        typist.until("> ")
        typist.types("\x04")
        assert typist.leaves() == 0
    with typing(chars, "--max-tokens", 1_000_000) as typist:
        typist.until("> ")
        typist.types("the cat\n")
        for _ in range(3):  # in the midst of an answer
            typist.until("a")
        typist.types("\x03")
        typist.until("\n> ")
        typist.types("\x04")
        assert typist.leaves() == 0
