"""Files of tokens are whole or not there, killed or refused at any call; what is malformed is told when it is opened."""

from __future__ import annotations

import errno
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faults import Call, State, fail, fast_place, in_a_fork, kill, look_on, restore, snapshot, tapped
from test_full_disk import small  # noqa: F401  (a fixture)

from oxidizr_ref.errors import DataError, OxidizrError
from oxidizr_ref.prepare import writer
from oxidizr_ref.prepare.pipeline import PrepareOptions, prepare
from oxidizr_ref.token_files import documents_path, meta_path, open_documents, open_responses, read_meta, responses_path

CHATS = [{"prompt": f"p{i}", "response": f"r{i}" * i} for i in range(9)]
TEXTS = [{"text": f"text {i}"} for i in range(9)]


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """A directory where bringing files to the disk takes no time, with two inputs in it."""
    with tempfile.TemporaryDirectory(dir=fast_place()) as name:
        for kind, entries in {"chats": CHATS, "texts": TEXTS}.items():
            (Path(name) / f"{kind}.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
        yield Path(name)


def make(place: Path, directory: Path, kind: str, **options: Any) -> None:
    asked = {"validation": 0.4, "threads": 1, "overwrite": True, **options}
    prepare(PrepareOptions([str(place / f"{kind}.jsonl")], directory / "out.bin", **asked))


def made(place: Path, kind: str) -> State:
    """What a run leaves in an empty directory."""
    with tempfile.TemporaryDirectory(dir=place) as name:
        make(place, Path(name), kind)
        return snapshot(Path(name))


def calls_of(place: Path, before: State) -> list[Call]:
    directory = restore(before, place / "out")
    with tapped(look_on) as calls:
        make(place, directory, "chats")
    return calls


def check_whole(found: State, old: State, new: State) -> None:
    """Whatever has a name is whole; a .bin has its own files beside it."""
    named = {name: data for name, data in found.items() if not name.startswith(".")}
    for name, data in named.items():
        assert data in (old.get(name), new.get(name)), name
    for stem in ("out", "out.validation"):
        if f"{stem}.bin" in named:
            family = {path.name for path in writer.family(Path(f"{stem}.bin"))}
            beside = {name: data for name, data in named.items() if name in family}
            assert beside in [{n: d for n, d in state.items() if n in family} for state in (old, new)]


@pytest.mark.thorough
@pytest.mark.parametrize("replacing", [False, True])
@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes cannot be forked here")
def test_a_kill_at_any_call_leaves_whole_files_and_the_next_run_needs_no_cleaning(place: Path, replacing: bool) -> None:
    old: State = made(place, "texts") if replacing else {}
    new = made(place, "chats")
    assert len(new) == 8
    calls = calls_of(place, old)
    moments = [call.number for call in calls if call.name not in ("stat", "fstat", "posix_fadvise", "close")]
    assert len(moments) > 40
    for number in moments:
        directory = restore(old, place / "out")

        def work(say: Any, number: int = number, directory: Path = directory) -> None:
            del say
            with tapped(kill(number, cut=1 if calls[number].name == "pwrite" else None)):
                make(place, directory, "chats")

        status, _ = in_a_fork(work)
        assert status == -9
        check_whole(snapshot(directory), old, new)
        make(place, directory, "chats")
        assert snapshot(directory) == new


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_refuses_any_call_is_told_in_one_line_and_leaves_whole_files(place: Path, code: int) -> None:
    old, new = made(place, "texts"), made(place, "chats")
    for call in calls_of(place, old):
        directory = restore(old, place / "out")
        try:
            with tapped(fail(call.number, code)):
                make(place, directory, "chats")
        except OxidizrError as error:
            assert error.exit_code == 1 and "out.bin: cannot be written" in str(error) and os.strerror(code) in str(error)
            assert len(str(error).splitlines()) == 1
        found = snapshot(directory)
        check_whole(found, old, new)
        if call.name != "unlink":
            assert not [name for name in found if name.endswith(".tmp")], call
        if call.name in ("pwrite", "fsync") and ".tmp" in call.path.name:
            assert found == old


def test_a_full_disk_is_told_and_nothing_is_left(small: Path, place: Path) -> None:  # noqa: F811
    (place / "large.jsonl").write_text(json.dumps({"text": "x" * 400_000}) + "\n")
    with pytest.raises(OxidizrError, match=f"{os.strerror(errno.ENOSPC)}.*free some space"):
        make(place, small, "large", validation=0.0)
    assert snapshot(small) == {}
    make(place, small, "chats")
    assert snapshot(small) == made(place, "chats")


def test_bad_input_leaves_what_is_there_as_it_is(place: Path) -> None:
    directory = restore(made(place, "texts"), place / "out")
    (place / "bad.jsonl").write_text('{"text": "good"}\n{"text": \n')
    before = snapshot(directory)
    with pytest.raises(DataError, match=r"bad\.jsonl, line 2"):
        make(place, directory, "bad")
    assert snapshot(directory) == before


def test_the_temporaries_of_a_killed_run_of_another_kind_are_removed(place: Path) -> None:
    names = ["validation.bin", "whole.documents.u64", "tokenizer.json", "responses.u64"]
    directory = restore({f".out.{name}.tmp": b"left" for name in names}, place / "out")
    make(place, directory, "texts", validation=0.0)
    assert sorted(snapshot(directory)) == ["out.bin", "out.documents.u64", "out.meta.json"]


# ------------------------------------------------------------------------------------------------- what opens them checks


@pytest.fixture
def files(place: Path) -> Path:
    """A .bin with all that can stand beside it."""
    make(place, restore({}, place / "out"), "chats", validation=0.0)
    return place / "out" / "out.bin"


def test_a_bin_alone_is_a_file_of_tokens_of_which_nothing_more_is_known(files: Path) -> None:
    for path in writer.family(files)[:-1]:
        path.unlink()
    assert read_meta(files) is open_documents(files) is open_responses(files) is None


def test_positions_are_read_as_they_were_written(files: Path) -> None:
    documents, spans, meta = open_documents(files), open_responses(files), read_meta(files)
    assert documents is not None and spans is not None and meta is not None
    assert documents.dtype == spans.dtype == np.uint64
    assert (documents.shape, spans.shape) == ((9,), (9, 2))
    assert spans[-1, 1] == meta.tokens == files.stat().st_size // 4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is no description of tokens"),
        ("[1]", "is no description of tokens"),
        ('{"format": "oxidizr_ref.tokens"}', "is no description of tokens"),
        ('{"format": "other", "version": 1}', "is no description of tokens"),
        ("é", "cannot be read"),
        ('{"format": "oxidizr_ref.tokens", "version": 2}', "has version 2, this release reads 1"),
        ('{"format": "oxidizr_ref.tokens", "version": 1}', "tokenizer is missing or malformed"),
    ],
)
def test_a_malformed_description_is_refused(files: Path, content: str, message: str) -> None:
    meta_path(files).write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=rf"out\.meta\.json: {message}.*oxidizr-ref prepare"):
        read_meta(files)


WRONG = {
    "tokenizer": {},
    "tokens": -1,
    "digest": "ab",
    "documents_digest": 1,
    "largest": 2**32,
    "sources": "a",
    "end_of_text": "b",
}


@pytest.mark.parametrize(("key", "value"), [*WRONG.items(), ("special_tokens", {"a": None}), ("vocab_size", True)])
def test_a_field_of_another_kind_is_named(files: Path, key: str, value: object) -> None:
    stored = json.loads(meta_path(files).read_text())
    for entries in ({**stored, key: value}, {name: entry for name, entry in stored.items() if name != key}):
        meta_path(files).write_text(json.dumps(entries))
        with pytest.raises(DataError, match=f"{key} is missing or malformed"):
            read_meta(files)


def test_a_description_of_another_file_is_refused(files: Path) -> None:
    files.write_bytes(files.read_bytes() + b"more")
    with pytest.raises(DataError, match=r"out\.bin: has .* bytes, but out\.meta\.json tells of"):
        read_meta(files)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [([1, 5], "first document begins at 1"), ([0, 5, 5], "entry 2 does not ascend"), ([0, 10_000], "is beyond the")],
)
def test_malformed_documents_are_refused(files: Path, numbers: list[int], message: str) -> None:
    np.array(numbers, dtype="<u8").tofile(documents_path(files))
    with pytest.raises(DataError, match=message):
        open_documents(files)
    documents_path(files).write_bytes(b"1234")
    with pytest.raises(DataError, match="4 bytes are no whole number of 8"):
        open_documents(files)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [([0, 5, 4, 6], "entry 2 does not ascend"), ([0, 5, 7, 7], "span without tokens"), ([0, 10_000], "is beyond the")],
)
def test_malformed_responses_are_refused(files: Path, numbers: list[int], message: str) -> None:
    np.array(numbers, dtype="<u8").tofile(responses_path(files))
    with pytest.raises(DataError, match=message):
        open_responses(files)
    responses_path(files).write_bytes(b"12345678")
    with pytest.raises(DataError, match="8 bytes are no whole number of 16"):
        open_responses(files)


def test_order_is_checked_across_the_parts_it_is_checked_in(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("oxidizr_ref.token_files._PART", 2)
    for place in range(1, 5):
        numbers = np.arange(5, dtype="<u8")
        numbers[place] = numbers[place - 1]
        numbers.tofile(documents_path(files))
        with pytest.raises(DataError, match=f"entry {place} does not ascend"):
            open_documents(files)
