"""Mutated files: whatever is in a file, it is loaded or refused as a checkpoint; what is loaded was written the one way."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import handmade
import pytest
import safetensors
import tiny
from mutations import SEEDS, Mutator

from oxidizr_ref.checkpoint import format
from oxidizr_ref.errors import CheckpointError

#: Every reason there is to refuse a file: a search that does not meet them all has not searched.
REASONS = (
    "its first 8 bytes promise a header",
    "{ expected",
    "} expected",
    ": expected",
    "a tensor's name .* expected",
    "a name of more than 256 characters",
    "names must ascend",
    "data_offsets, dtype and shape of tensor .* expected",
    "a dtype that is never written",
    "no array has this shape",
    "shape and offsets disagree",
    "keys must ascend",
    "a string expected",
    "a string that is not written the one way",
    "the header must end here, padded",
    "there is no __metadata__",
    "the digests of the tensors are missing or malformed",
    "there is no header_digest",
    "digests and tensors name different things",
    "a hole, an overlap, or another order",
    "the header's digest is malformed",
    "the header was changed",
    "is newer than this package reads",
    "the payload has",
    "is not what was written",
    "not a checkpoint of oxidizr_ref",
)


def outcome_of(path: Path, raw: bytes) -> str:
    """Load a file. Returns the reason why it was refused, or ``loaded`` when it proved to be written the one way."""
    try:
        loaded = format.load(path)
    except CheckpointError as error:
        assert "\n" not in str(error)
        return str(error).removeprefix(f"{path}: ")
    stock = dict(safetensors.deserialize(raw))
    assert stock.keys() == loaded.tensors.keys()
    for name, array in loaded.tensors.items():
        assert (stock[name]["shape"], bytes(stock[name]["data"])) == (list(array.shape), array.tobytes())
    again = path.with_name("again")
    format.save(again, loaded.tensors, loaded.metadata)
    assert again.read_bytes() == raw, "what is loaded must have been written the one way"
    return "loaded"


def search(folder: Path, seed: int, count: int) -> Counter[str]:
    """Load ``count`` mutated files. Returns how often each reason (or ``loaded``) was met."""
    found: Counter[str] = Counter()
    source, path = Mutator(seed), folder / "mutated.safetensors"
    patterns = [(reason, re.compile(reason)) for reason in REASONS]
    with open(path, "wb", buffering=0) as file, tiny.threads(1):
        for number in range(count):
            raw = source.file()
            file.seek(0)
            file.write(raw)
            file.truncate()
            try:
                outcome = outcome_of(path, raw)
            except Exception as error:
                error.add_note(f"file {number} of seed {seed}: {raw!r}")
                raise
            found[next((reason for reason, pattern in patterns if pattern.search(outcome)), outcome)] += 1
    return found


def must_be_thorough(found: Counter[str], count: int) -> None:
    """All reasons were met, none that is not known, and a good part of the files was sound."""
    assert found.keys() == {*REASONS, "loaded"}
    assert found["loaded"] > count // 20


def test_the_files_that_mutations_begin_with_are_whole(tmp_path: Path) -> None:
    for raw in SEEDS:
        (tmp_path / "x").write_bytes(raw)
        assert outcome_of(tmp_path / "x", raw) == "loaded"


@pytest.mark.thorough
def test_each_of_20000_mutated_files_is_refused_or_loaded_and_equal_to_what_saving_it_again_writes(tmp_path: Path) -> None:
    with handmade.fast_folder(tmp_path) as folder:
        must_be_thorough(search(folder, seed=0, count=20_000), 20_000)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(1, 11))
def test_each_of_a_million_mutated_files_is_refused_or_loaded_and_equal_to_what_saving_it_again_writes(
    tmp_path: Path, seed: int
) -> None:
    with handmade.fast_folder(tmp_path) as folder:
        must_be_thorough(search(folder, seed, count=100_000), 100_000)
