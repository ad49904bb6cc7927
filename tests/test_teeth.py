"""Does it matter? Every field of a checkpoint is dropped, zeroed or nudged, and each time the run must notice.

A field has teeth when a wrong value of it cannot go unnoticed: the run that continues with it refuses to, or makes other
tensors and metrics than the undisturbed one (for provenance: another lineage). That the wrong value itself is found again
in a later file counts for nothing. So nothing is saved in vain, nothing is saved and then not loaded, and a field that is
added one day must be added to the tables here.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import tiny

from oxidizr_ref.checkpoint import format, state
from oxidizr_ref.checkpoint.format import Checkpoint
from oxidizr_ref.checkpoint.header import FORMAT_VERSION
from oxidizr_ref.checkpoint.state import RunState
from oxidizr_ref.config import canonical_json, load_config
from oxidizr_ref.data import open_data
from oxidizr_ref.errors import CheckpointError
from oxidizr_ref.model import LanguageModel
from oxidizr_ref.optim import AdamW
from oxidizr_ref.run import RunOptions
from oxidizr_ref.trainer import Trainer
from oxidizr_ref.version import NUMERICS_VERSION

# What is examined here: all fields of `RunState`, ...
ARRAYS = {"weights", "optimizer"}
PROGRESS = {"step", "cursor"}
DERIVED = {"epoch", "tokens_seen", "windows_an_epoch"}  # follow from the others; recomputed and compared, never believed
PROVENANCE = {"config", "data", "tokenizer", "fingerprint", "lineage"}
# ... and all keys of a file's metadata, of which these say nothing about the run: constants of the version that wrote it.
MARKERS = {"format": "pt", "format_version": str(FORMAT_VERSION), "numerics_version": str(NUMERICS_VERSION)}

AT, END = 2, 4  # the step that is disturbed, and the last one

Tensors = dict[str, Any]
Words = dict[str, str]
Change = Callable[[Tensors, Words], object]


@dataclass(frozen=True)
class Continued:
    """What a run made of a state: its last tensors and lineage, its metrics."""

    tensors: dict[str, bytes] = dataclasses.field(repr=False)
    lineage: list[Any] = dataclasses.field(repr=False)
    lines: list[dict[str, Any]] = dataclasses.field(repr=False)

    def differs(self, other: Continued, but: str = "") -> bool:
        """Whether any number came out otherwise, but for the tensor of this name, and for what only repeats the cursor."""
        a, b = ({name: data for name, data in run.tensors.items() if name != but} for run in (self, other))
        lines, others = ([{k: v for k, v in line.items() if k != "epoch"} for line in run.lines] for run in (self, other))
        return a != b or lines != others


Result = Continued | Exception


class Bench:
    """A run that is disturbed at step `AT`, again and again, each time in a directory of its own."""

    def __init__(self, root: Path, dtype: str = "f32", tokenizer: str = "byte") -> None:
        trainer = {"max_steps": END, "save_interval": 2, "warmup_steps": 3}
        self.run = tiny.make_run(root, {"hidden_size": 8, "dtype": dtype}, trainer, {"tokenizer": tokenizer}, 300)
        self.config = load_config(self.run.config)
        self.data = open_data(self.config)
        self._count = 0
        # The first step had another learning rate, so that there is a lineage to lose.
        self.first = self._fit(1, None, learning_rate=2e-2).path(1)
        self.pristine = self._fit(END, self.first).path(AT)
        self.undisturbed = self.outcome_of(self.pristine)
        assert self.undisturbed.lineage

    def _fit(self, last: int, resume: Path | None, **changes: Any) -> tiny.Run:
        """Train from a file to a step, in a new directory. The model begins with other weights than the run's."""
        self._count += 1
        into = self.run.into(f"run_{self._count}")
        changes |= {"checkpoint_dir": str(into.directory), "max_steps": last}
        config = self.config.model_copy(update={"trainer": self.config.trainer.model_copy(update=changes)})
        options = RunOptions(resume=None if resume is None else str(resume))
        with mock.patch("os.fsync"), tiny.threads(1):  # neither matters here, and both take time
            Trainer(config, LanguageModel(config.model, 999), self.data, options).fit()
        return into

    def outcome_of(self, path: Path) -> Continued:
        """What comes of the file when it is resumed to the end."""
        into = self._fit(END, path)
        last = format.load(into.path(END))
        tensors = {name: array.tobytes() for name, array in last.tensors.items()}
        return Continued(tensors, json.loads(last.metadata["lineage"]), into.metrics())

    def loaded_with(self, change: Callable[[RunState], RunState]) -> Result:
        """What comes of the undisturbed file when the trainer gets to see a changed state of it."""
        read = state.from_file

        def changed(file: Checkpoint, where: object) -> RunState:
            whole = read(file, where)
            after = change(copy.deepcopy(whole))
            assert _plain(after) != _plain(whole), "the disturbance is one"
            return after

        with mock.patch.object(state, "from_file", changed):
            return self._try(self.pristine)

    def read_with(self, change: Change) -> Result:
        """The same where the file's tensors and metadata are changed, after it was proved whole."""
        read = state.from_file

        def changed(file: Checkpoint, where: object) -> RunState:
            after = Checkpoint(copy.deepcopy(file.tensors), dict(file.metadata))
            change(after.tensors, after.metadata)
            assert _bytes(after.tensors) != _bytes(file.tensors) or after.metadata != file.metadata, "the disturbance is one"
            return read(after, where)

        with mock.patch.object(state, "from_file", changed):
            return self._try(self.pristine)

    def written_with(self, change: Change) -> Result:
        """What comes of a file that was written wrongly, and is whole as far as its digests can tell."""
        write = state.to_file

        def changed(whole: RunState) -> tuple[Tensors, Words]:
            tensors, metadata = write(whole)
            if whole.step == AT:
                change(tensors, metadata)
            return tensors, metadata

        with mock.patch.object(state, "to_file", changed):
            path = self._fit(AT, self.first).path(AT)
        assert path.read_bytes() != self.pristine.read_bytes(), "the disturbance is one"
        return self._try(path)

    def _try(self, path: Path) -> Result:
        try:
            return self.outcome_of(path)
        except Exception as error:  # any but a CheckpointError is a crash, and that is no answer
            return error

    def tensors(self) -> list[tuple[str, str]]:
        """(field of `RunState`, name in it) of every tensor in a file."""
        saved = state.from_file(format.load(self.pristine), "")
        return [("weights", name) for name in saved.weights] + [("optimizer", name) for name in saved.optimizer]

    def metadata(self) -> Words:
        return format.read_header(self.pristine).metadata


def _bytes(arrays: Mapping[str, Any]) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in arrays.items()}


def _plain(whole: RunState) -> dict[str, Any]:
    fields = {field.name: getattr(whole, field.name) for field in dataclasses.fields(whole)}
    return {name: _bytes(value) if name in ARRAYS else value for name, value in fields.items()}


def refused(result: Result) -> bool:
    return isinstance(result, CheckpointError)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("teeth"))


# --- the tables are complete ------------------------------------------------------------------------------------------


def test_every_field_that_is_stored_is_examined_here(bench: Bench) -> None:
    elsewhere = {"windows_an_epoch", "loss_scale"}  # derived; only on a device, examined in test_device_training.py
    assert {field.name for field in dataclasses.fields(RunState)} == ARRAYS | PROGRESS | PROVENANCE | elsewhere
    metadata = bench.metadata()
    assert metadata.keys() == {"progress"} | PROVENANCE | MARKERS.keys()
    assert json.loads(metadata["progress"]).keys() == PROGRESS | DERIVED
    names = [name if field == "weights" else f"optimizer.{name}" for field, name in bench.tensors()]
    assert sorted(names) == sorted(entry.name for entry in format.read_header(bench.pristine).entries)
    weights = [name for field, name in bench.tensors() if field == "weights"]
    moments = {name for field, name in bench.tensors() if field == "optimizer"}
    assert len(weights) == 12 and moments == {f"{slot}.{name}" for slot in AdamW.SLOTS for name in weights}


def test_what_says_nothing_about_the_run_is_a_constant(bench: Bench) -> None:
    for path in (bench.first, bench.pristine):
        metadata = format.read_header(path).metadata
        assert {key: metadata[key] for key in MARKERS} == MARKERS
    assert refused(bench.read_with(lambda _, words: words.pop("format_version")))


def test_an_undisturbed_run_is_no_bite(bench: Bench) -> None:
    """Reading and writing through the harness, and beginning with other weights, changes nothing by itself."""
    again = bench.outcome_of(bench.pristine)
    assert again == bench.undisturbed and not again.differs(bench.undisturbed)
    with pytest.raises(AssertionError, match="the disturbance is one"):
        result = bench.loaded_with(lambda whole: whole)
        assert isinstance(result, Exception)
        raise result


# --- tensors ----------------------------------------------------------------------------------------------------------


def drop(arrays: dict[str, Any], name: str, most_used: int) -> None:
    del most_used, arrays[name]


def zero(arrays: dict[str, Any], name: str, most_used: int) -> None:
    del most_used
    arrays[name] = np.zeros_like(arrays[name])


def nudge(arrays: dict[str, Any], name: str, most_used: int) -> None:
    """The element with the largest gradients so far gets larger by a thousandth."""
    arrays[name].reshape(-1)[most_used] *= 1.001


def nudge_in_bf16(arrays: dict[str, Any], name: str, most_used: int) -> None:
    """The last bit of a weight is another one; a moment, of which little reaches a rounded weight, is far too large."""
    element = arrays[name].reshape(-1)[most_used : most_used + 1]
    if element.dtype == np.float32:
        element *= 100
    else:
        element.view(np.uint16)[...] ^= 1


HOW = {"drop": drop, "zero": zero, "nudge": nudge}


def without_teeth(bench: Bench, how: Callable[[dict[str, Any], str, int], None]) -> list[str]:
    """The names of the tensors whose disturbance goes unnoticed, everything but the tensor itself being looked at."""
    saved = state.from_file(format.load(bench.pristine), "")
    toothless = []
    for field, name in bench.tensors():
        parameter = name if field == "weights" else name.partition(".")[2]
        most_used = int(saved.optimizer[f"exp_avg_sq.{parameter}"].argmax())

        def change(whole: RunState, field: str = field, name: str = name, most_used: int = most_used) -> RunState:
            how(getattr(whole, field), name, most_used)
            return whole

        result, stored = bench.loaded_with(change), name if field == "weights" else f"optimizer.{name}"
        bites = (
            refused(result) if how is drop else isinstance(result, Continued) and result.differs(bench.undisturbed, stored)
        )
        toothless += [] if bites else [f"{field}: {name}: {result!r}"]
    return toothless


@pytest.mark.thorough
@pytest.mark.parametrize("how", HOW)
def test_every_weight_and_every_moment_is_missed_when_it_was_loaded_wrongly(bench: Bench, how: str) -> None:
    """Dropped: refused. Zeroed, or one number of it nudged: other tensors, or other metrics, come out."""
    assert without_teeth(bench, HOW[how]) == []


def test_the_last_bit_of_every_weight_in_bf16_and_its_moments_are_missed(tmp_path: Path) -> None:
    assert without_teeth(Bench(tmp_path, dtype="bf16"), nudge_in_bf16) == []


@pytest.mark.thorough
@pytest.mark.parametrize("how", ["drop", "zero"])
def test_every_weight_and_every_moment_is_missed_when_it_was_written_wrongly(bench: Bench, how: str) -> None:
    toothless = []
    for entry in format.read_header(bench.pristine).entries:
        name = entry.name
        result = bench.written_with(lambda tensors, _, name=name: HOW[how](tensors, name, 0))  # type: ignore[misc]
        bites = (
            refused(result) if how == "drop" else isinstance(result, Continued) and result.differs(bench.undisturbed, name)
        )
        toothless += [] if bites else [f"{name}: {result!r}"]
    assert toothless == []


# --- progress ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [0, AT - 1, AT + 1])
def test_the_step_is_missed(bench: Bench, wrong: int) -> None:
    result = bench.loaded_with(lambda whole: replace(whole, step=wrong))
    assert isinstance(result, Continued) and result.differs(bench.undisturbed)


@pytest.mark.parametrize("by", [-1, 1, 4])
def test_the_cursor_is_missed(bench: Bench, by: int) -> None:
    result = bench.loaded_with(lambda whole: replace(whole, cursor=whole.cursor + by))
    assert isinstance(result, Continued) and result.differs(bench.undisturbed)


@pytest.mark.parametrize("by", [-1, 1])
def test_the_optimizer_misses_an_update_that_it_is_not_told_of(bench: Bench, by: int) -> None:
    load = AdamW.load_state_dict
    with mock.patch.object(AdamW, "load_state_dict", lambda self, arrays, updates: load(self, arrays, updates + by)):
        result = bench.outcome_of(bench.pristine)
    assert result.differs(bench.undisturbed)


@pytest.mark.parametrize("key", sorted(DERIVED | {"cursor"}))
def test_a_number_that_does_not_follow_from_the_others_is_refused(bench: Bench, key: str) -> None:
    """A cursor alone can be told from epoch and tokens seen; a wrong length of the epoch, from the data."""
    for by in (-1, 1):
        change = _edit("progress", (key,), lambda value, by=by: value + by)  # type: ignore[misc]
        assert refused(bench.read_with(change)) and refused(bench.written_with(change)), by
    if key == "windows_an_epoch":
        assert refused(bench.loaded_with(lambda whole: replace(whole, windows_an_epoch=whole.windows_an_epoch + 1)))


@pytest.mark.parametrize("key", sorted(PROGRESS | DERIVED))
def test_a_number_of_the_progress_that_is_missing_or_zero_is_refused(bench: Bench, key: str) -> None:
    before = json.loads(bench.metadata()["progress"])
    changes = [_edit("progress", (key,), None)] + [_edit("progress", (key,), lambda _: 0)] * bool(before[key])
    for change in changes:
        assert refused(bench.written_with(change))
        assert key == "step" or refused(bench.read_with(change)), "a step alone: see above"


# --- where it comes from ----------------------------------------------------------------------------------------------


def _leaves(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths to all values in a JSON tree that are no objects, and to those of lists of objects."""
    children = tree.items() if isinstance(tree, dict) else enumerate(tree) if _is_list_of_objects(tree) else ()
    for key, value in children:
        if isinstance(value, dict) or _is_list_of_objects(value):
            yield from _leaves(value, (*path, key))
        else:
            yield (*path, key)


def _is_list_of_objects(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def _edit(key: str, path: tuple[Any, ...], change: Callable[[Any], Any] | None) -> Change:
    """Change the value at a path of a JSON text of the metadata; None: remove it."""

    def edit(_: Tensors, words: Words) -> None:
        tree = json.loads(words[key])
        place = tree
        for part in path[:-1]:
            place = place[part]
        if change is None:
            del place[path[-1]]
        else:
            place[path[-1]] = change(place[path[-1]])
        words[key] = canonical_json(tree)

    return edit


def _other(value: Any) -> Any:
    """Another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    return value + "x" if isinstance(value, str) else [*value, *value, 1]


def _must_be_refused(key: str, path: tuple[Any, ...]) -> bool:
    """What shapes the model or chooses the random numbers, and what was read; other changes are kept in the lineage."""
    return (key, path[-1]) in {("data", "digest"), ("tokenizer", "digest"), ("config", "seed")} or path[0] == "model"


def _noticed(bench: Bench, result: Result) -> bool:
    return refused(result) or (isinstance(result, Continued) and result.lineage != bench.undisturbed.lineage)


@pytest.mark.parametrize("key", sorted(PROVENANCE))
def test_every_value_that_says_where_a_file_comes_from_is_missed(bench: Bench, key: str) -> None:
    """Removed or changed, each is refused, or leaves a trace in the lineage."""
    toothless = []
    for path in _leaves(json.loads(bench.metadata()[key])):
        for change in (None, _other):
            result = bench.read_with(_edit(key, path, change))
            bites = refused(result) if _must_be_refused(key, path) else _noticed(bench, result)
            what = "changed" if change else "removed"
            toothless += [] if bites else [f"{key}.{'.'.join(map(str, path))} {what}: {result!r}"]
    assert toothless == []


def test_the_vocabulary_of_a_tokenizer_made_from_the_text_is_missed(tmp_path: Path) -> None:
    bench = Bench(tmp_path, tokenizer="char")
    paths = list(_leaves(json.loads(bench.metadata()["tokenizer"])))
    assert ("vocabulary",) in paths
    results = {
        (path, change): bench.read_with(_edit("tokenizer", path, change)) for path in paths for change in (None, _other)
    }
    assert {what: result for what, result in results.items() if not refused(result)} == {}


@pytest.mark.parametrize("empty", [None, "{}", "[]"])
@pytest.mark.parametrize("key", sorted(PROVENANCE | {"progress"}))
def test_a_whole_part_of_the_metadata_that_is_missing_or_empty_is_missed(bench: Bench, key: str, empty: str | None) -> None:
    def change(_: Tensors, words: Words) -> None:
        del words[key]
        words.update({} if empty is None else {key: empty})

    for result in (bench.read_with(change), bench.written_with(change)):
        assert _noticed(bench, result), repr(result)
