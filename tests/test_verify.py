"""`oxidizr-ref verify`: whole files are called whole, every other one is named with its reason, and all are looked at."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from oxidizr_ref.checkpoint import format

ARRAYS = {"b": np.arange(40, dtype=np.float32), "a": np.arange(3.0), "c": np.arange(5, dtype=np.uint8)}


def step_file(directory: Path, step: int, name: str | None = None) -> Path:
    """A small file that says it holds ``step``."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / (name or f"step_{step}.safetensors")
    format.save(path, ARRAYS, {"progress": json.dumps({"step": step})})
    return path


def change(path: Path, edit: Callable[[bytearray], object]) -> None:
    """Change the bytes of a file."""
    raw = bytearray(path.read_bytes())
    edit(raw)
    path.write_bytes(raw)


def flip(at: int) -> Callable[[bytearray], object]:
    def edit(raw: bytearray) -> None:
        raw[at] ^= 4

    return edit


def verified(capsys: pytest.CaptureFixture[str], *argv: object, code: int) -> list[str]:
    """The lines that ``verify`` prints on stdout; nothing goes to stderr."""
    capsys.readouterr()
    assert tiny.cli("verify", *argv) == code
    out, err = capsys.readouterr()
    assert err == ""
    return out.splitlines()


def test_files_of_any_name_and_directories_in_step_order_are_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    for step in (10, 9, 100):
        step_file(run, step)
    backup = step_file(tmp_path, 9, "before the exam.bak")
    size = backup.stat().st_size
    assert verified(capsys, backup, run, code=0) == [
        f"{backup}: whole, step 9, {size} B, 3 tensors",
        f"{run}/step_9.safetensors: whole, step 9, {size} B, 3 tensors",
        f"{run}/step_10.safetensors: whole, step 10, {size} B, 3 tensors",
        f"{run}/step_100.safetensors: whole, step 100, {size} B, 3 tensors",
        f"{run}: 3 step files, all whole",
    ]


def test_damage_is_named_by_its_tensor_and_the_other_files_are_verified_all_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    paths = [step_file(run, step) for step in (1, 2, 3)]
    start = format.read_header(paths[1]).payload_start
    change(paths[1], flip(start + 24 + 7))  # three numbers of `a` come first, then `b`
    alone = step_file(tmp_path, 7)
    lines = verified(capsys, run, alone, code=1)
    assert re.fullmatch(rf"{re.escape(str(paths[1]))}: damaged at or after byte {start + 24}: tensor b, .*", lines[1])
    assert ["whole, step" in line for line in lines] == [True, False, True, False, True]
    assert lines[3] == f"{run}: 3 step files, 1 not whole"
    step_file(tmp_path / "other", 1)
    assert len(verified(capsys, run, tmp_path / "other", code=1)) == 6


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (flip(-1), "tensor c, "),
        (flip(40), "damaged at or after byte"),
        (flip(0), "damaged at or after byte"),
        (lambda raw: raw.pop(), "payload has"),
        (lambda raw: raw.append(0), "payload has"),
        (lambda raw: raw.clear(), "damaged at or after byte 0"),
        (lambda raw: raw.__setitem__(slice(None), b"\x02\0\0\0\0\0\0\0{}"), "not a checkpoint of oxidizr_ref"),
    ],
)
def test_what_is_not_as_it_was_written_is_not_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], edit: Callable[[bytearray], object], reason: str
) -> None:
    path = step_file(tmp_path, 5)
    change(path, edit)
    (line,) = verified(capsys, path, code=1)
    assert line.startswith(f"{path}: ") and reason in line
    assert verified(capsys, tmp_path, code=1) == [line, f"{tmp_path}: 1 step file, 1 not whole"]


def test_a_name_and_an_inside_that_disagree_are_damage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = step_file(tmp_path, 6, "step_7.safetensors")
    assert verified(capsys, wrong, code=1) == [f"{wrong}: named after step 7, but it holds step 6"]
    free = tmp_path / "step_8.safetensors"
    format.save(free, ARRAYS, {"progress": r'{"step":"8\u001b"}'})
    assert verified(capsys, free, code=1) == [f"{free}: named after step 8, but it holds step '8\\x1b'"]
    format.save(free, ARRAYS, {})
    assert verified(capsys, free, code=1) == [f"{free}: does not say which step it holds"]
    assert len(verified(capsys, tmp_path, code=1)) == 3
    backup = shutil.copy(wrong, tmp_path / "step_7_backup.safetensors")
    assert "whole, step 6" in verified(capsys, backup, code=0)[0]


def test_a_whole_file_without_training_state_is_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "weights.safetensors"
    format.save(path, ARRAYS, {"progress": "soon"})
    assert verified(capsys, path, code=0) == [f"{path}: whole, no training state, {path.stat().st_size} B, 3 tensors"]


def test_what_was_put_away_is_counted_and_not_judged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    step_file(tmp_path, 1)
    for branch, steps in (("1", (2, 3)), ("2", (3,))):
        for step in steps:
            step_file(tmp_path / "superseded" / branch, step)
        (tmp_path / "superseded" / branch / "metrics.jsonl").write_text("{}\n")
    (tmp_path / "quarantine").mkdir()
    (tmp_path / "quarantine" / "step_2.1.safetensors").write_bytes(b"damaged")
    assert (
        verified(capsys, tmp_path, code=0)[-1] == f"{tmp_path}: 1 step file, all whole; 3 in superseded/; 1 in quarantine/"
    )


def test_the_json_is_one_object_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [step_file(tmp_path, step) for step in (1, 2)]
    change(paths[1], flip(-1))
    lines = verified(capsys, tmp_path, "--json", code=1)
    found: list[dict[str, Any]] = [json.loads(line) for line in lines]
    size = paths[0].stat().st_size
    whole = {"file": str(paths[0]), "whole": True, "error": None, "step": 1, "bytes": size, "tensors": 3}
    assert found[0] == whole
    assert found[1] == {**whole, "file": str(paths[1]), "whole": False, "error": found[1]["error"]} | dict.fromkeys(
        ("step", "bytes", "tensors")
    )
    assert "tensor c, " in found[1]["error"]
    assert lines == [json.dumps(record, sort_keys=True, separators=(",", ":")) for record in found]


def test_a_path_that_is_not_there_is_told_before_anything_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = step_file(tmp_path, 1)
    monkeypatch.setattr(format, "verify", lambda path: pytest.fail("was read"))
    for bad in (tmp_path / "step_9.safetensors", tmp_path / "\x1b[2J"):
        assert tiny.cli("verify", path, bad) == 2
        out, err = capsys.readouterr()
        assert out == "" and "no such file or directory; " in err and err.rstrip("\n").isprintable()
    assert tiny.cli("verify") == 2


def test_a_file_that_a_run_lets_go_of_meanwhile_is_no_damage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [step_file(tmp_path, step) for step in (1, 2)]
    original, goes = format.verify, [paths[0]]

    def verify(path: Path) -> Any:
        for gone in goes:
            gone.unlink(missing_ok=True)
        return original(path)

    monkeypatch.setattr(format, "verify", verify)
    lines = verified(capsys, tmp_path, code=0)
    assert len(lines) == 2 and lines[1] == f"{tmp_path}: 1 step file, all whole"
    goes.append(paths[1])
    assert tiny.cli("verify", tmp_path) == 2
    assert "deleted while" in capsys.readouterr().err
    alone = step_file(tmp_path / "other", 3)
    goes.append(alone)  # what was asked for by its name is missed
    assert "cannot be read" in verified(capsys, alone, code=1)[0]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes on this system")
def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "not a regular file" in verified(capsys, tmp_path / "pipe", code=1)[0]


def test_the_file_s_own_name_commands_no_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = step_file(tmp_path, 1, "\x1b[2J\udc80")
    assert verified(capsys, path, code=0)[0].startswith(f"{tmp_path}/\\x1b[2J\\udc80: whole")
    change(path, flip(-1))
    assert verified(capsys, path, code=1)[0].startswith(f"{tmp_path}/\\x1b[2J\\udc80: damaged")
    assert json.loads(verified(capsys, path, "--json", code=1)[0])["file"] == str(path)
