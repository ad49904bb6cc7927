"""What is remembered of data files is believed only while the files are what they were."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import tiny

from oxidizr_ref import data, data_facts
from oxidizr_ref.config import load_config
from oxidizr_ref.data_facts import Facts

OLD = 1_600_000_000


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


class Counted:
    """Finds out facts, and counts how often."""

    def __init__(self, largest: int = 7) -> None:
        self.calls, self.facts = 0, Facts("ab" * 32, largest)

    def __call__(self) -> Facts:
        self.calls += 1
        return self.facts


def old_file(path: Path, content: bytes = b"1234", age: int = OLD) -> Path:
    path.write_bytes(content)
    os.utime(path, (age, age))
    return path


def test_a_file_that_did_not_change_is_read_once(tmp_path: Path) -> None:
    file, find_out = old_file(tmp_path / "a.bin"), Counted()
    for _ in range(3):
        assert data_facts.remembered([file], find_out) == find_out.facts
    assert find_out.calls == 1


@pytest.mark.parametrize("change", ["size", "time", "file", "order", "more files", "just written"])
def test_what_changed_is_read_again(tmp_path: Path, change: str) -> None:
    files, find_out = [old_file(tmp_path / "a.bin"), old_file(tmp_path / "b.bin")], Counted()
    data_facts.remembered(files, find_out)
    if change == "size":
        old_file(files[0], b"12345678")
    elif change == "time":
        os.utime(files[0], (OLD + 1, OLD + 1))
    elif change == "file":
        os.replace(old_file(tmp_path / "c.bin"), files[0])
    elif change == "order":
        files.reverse()
    elif change == "more files":
        files.append(files[0])
    else:
        files[0].write_bytes(b"4321")
    data_facts.remembered(files, find_out)
    assert find_out.calls == 2


def test_a_file_written_a_moment_ago_is_not_remembered(tmp_path: Path) -> None:
    file, find_out = tmp_path / "a.bin", Counted()
    file.write_bytes(b"1234")
    for _ in range(2):
        data_facts.remembered([file], find_out)
    assert find_out.calls == 2


def test_a_file_that_changes_while_it_is_read_is_not_remembered(tmp_path: Path) -> None:
    file, calls = old_file(tmp_path / "a.bin"), []

    def find_out() -> Facts:
        calls.append(1)
        old_file(file, b"5678" * (1 + len(calls)))
        return Facts("cd" * 32, 1)

    for _ in range(2):
        data_facts.remembered([file], find_out)
    assert len(calls) == 2


@pytest.mark.parametrize("content", ["", "{", "[]", '{"files": 1}', '{"digest": "x", "largest": 1, "files": "?"}'])
def test_a_damaged_cache_costs_a_reading_and_nothing_else(tmp_path: Path, content: str) -> None:
    file, find_out = old_file(tmp_path / "a.bin"), Counted()
    data_facts.remembered([file], find_out)
    (stored,) = data_facts.cache_directory().iterdir()
    stored.write_text(content)
    assert data_facts.remembered([file], find_out) == find_out.facts
    assert find_out.calls == 2
    data_facts.remembered([file], find_out)
    assert find_out.calls == 2, "it was repaired"


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    assert data_facts.remembered([old_file(tmp_path / "a.bin")], Counted()).largest == 7


def test_a_missing_file_is_left_to_whoever_reads_it(tmp_path: Path) -> None:
    assert data_facts.remembered([tmp_path / "absent.bin"], Counted()).largest == 7


def test_a_user_without_a_home_has_no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", nowhere)
    file, counted = old_file(tmp_path / "a.bin"), Counted()
    assert data_facts.remembered([file], counted) == data_facts.remembered([file], counted) == counted.facts
    assert counted.calls == 2


def test_a_run_reads_a_bin_file_whole_once_and_its_checkpoints_do_not_show_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = tmp_path / "tokens.bin"
    (np.arange(3000, dtype="<u4") % 251).tofile(tokens)
    os.utime(tokens, (OLD, OLD))
    run = tiny.make_run(tmp_path, trainer={"max_steps": 2})
    found: list[Facts] = []
    facts = data.TokenStream.facts

    def counted(self: data.TokenStream) -> Facts:
        found.append(facts(self))
        return found[-1]

    monkeypatch.setattr(data.TokenStream, "facts", counted)
    for name in ("first", "second"):
        assert run.into(name).train("-d", tokens) == 0
    assert len(found) == 1 and found[0].largest == 250
    assert tiny.step_files(tmp_path / "first") == tiny.step_files(tmp_path / "second")


def test_a_token_outside_the_vocabulary_is_found_through_the_cache_too(tmp_path: Path) -> None:
    tokens = tmp_path / "tokens.bin"
    np.full(3000, 300, dtype="<u4").tofile(tokens)
    os.utime(tokens, (OLD, OLD))
    run = tiny.make_run(tmp_path)
    config = load_config(run.config, [f"data.path={tokens}"])
    for _ in range(2):
        with pytest.raises(data.DataError, match="token id 300 at position 0"):
            data.open_data(config)
