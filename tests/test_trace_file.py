"""trace/file.py: what is written is read again bit by bit, also by safetensors; a file is whole or absent; none crashes."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import re
import struct
import threading
import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import handmade
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from oxidizr_ref.checkpoint import disk
from oxidizr_ref.errors import TraceError
from oxidizr_ref.trace import Record, Trace, TraceWriter
from oxidizr_ref.trace.file import role_of
from oxidizr_ref.trace.names import layer_of, meaning
from oxidizr_ref.trace.writer import PIECE, pieces, sampled_indices

Array = np.ndarray[Any, Any]

ROLES = ("input", "parameter", "output", "gradient", "optimizer", "parameter_after")
#: How numbers and integers are stored, by precision.
STORED: dict[str, tuple[np.dtype[Any], np.dtype[Any]]]
STORED = {precision: (np.dtype(np.uint32), np.dtype(np.float32)) for precision in ("f32", "tf32", "bf16", "f16")}
STORED["f64"] = np.dtype(np.int64), np.dtype(np.float64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where files of many examples are written one after the other: in memory, where there is such a folder."""
    with handmade.fast_folder(tmp_path_factory.mktemp("traces")) as fast:
        yield fast


# --- what goes into a trace -------------------------------------------------------------------------------------------

#: Views that have the same elements in another layout, or others of the same array.
LAYOUTS: dict[str, Callable[[Array], Array]] = {
    "as it is": lambda x: x,
    "transposed": lambda x: x.T,
    "in the order of Fortran": np.asfortranarray,
    "backwards": lambda x: x[tuple([slice(None, None, -1)] * x.ndim)],
    "every second": lambda x: x[..., ::2] if x.ndim else x,
    "broadcast along a new first axis": lambda x: np.broadcast_to(x, (3, *x.shape)),
    "broadcast along a new last axis": lambda x: np.broadcast_to(x[..., None], (*x.shape, 2)),
}
DTYPES = tuple(np.dtype(kind) for kind in ("f8", "f4", "f2", ml_dtypes.bfloat16, "i8", "i4", "u4", "u1", "?"))


@st.composite
def arrays(draw: st.DrawFn, min_axes: int = 0) -> Array:
    """Arrays of every dtype and layout, empty axes and 0-d among them, with numbers of every kind."""
    shape = tuple(draw(st.lists(st.integers(0, 4), min_size=min_axes, max_size=4)))
    dtype, random = draw(st.sampled_from(DTYPES)), np.random.default_rng(draw(st.integers(0, 99)))
    if dtype.kind in "iub":
        array = random.integers(0, 2 if dtype.kind == "b" else 200, shape).astype(dtype)
    else:
        special = random.choice([np.nan, np.inf, -np.inf, -0.0, 5e-324, 1e-40], shape)
        array = np.where(random.random(shape) < 0.2, special, random.standard_normal(shape)).astype(dtype)
    return np.asarray(LAYOUTS[draw(st.sampled_from(list(LAYOUTS)))](array))


#: Any text without halves of characters; line breaks are among the names of `test_a_name_may_be_any_text`.
WORDS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n"), min_size=1, max_size=12)
NAMES = st.one_of(
    WORDS,
    st.sampled_from(
        ["tokens", "step.2.targets", "layers.0.q", "layers.0.q.grad", "optimizer.exp_avg.lm_head.weight", "a.after"]
    ),
).filter(lambda name: name != "__metadata__" and not name.startswith("sample."))
CONTENTS = st.dictionaries(NAMES, arrays(), max_size=5)
PRECISIONS = st.sampled_from(["f64", "f32", "bf16"])


def stored(array: Array, precision: str) -> Array:
    """The array as a file of that precision should hold it."""
    return np.asarray(array, order="C").astype(STORED[precision][array.dtype.kind not in "iub"])


def write(path: Path, contents: Mapping[str, Array], precision: str = "f32", **options: Any) -> Path:
    """A trace of these arrays, a name each."""
    with TraceWriter(path, precision, **options) as writer:
        for name, array in contents.items():
            writer.add(name, array)
    return path


def same(a: Array, b: Array) -> bool:
    """Equal in dtype, shape and every bit."""
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


class Layout(NamedTuple):
    """The header of a file, read without the package: its text, its entries but the metadata, where the payload begins."""

    text: bytes
    entries: dict[str, dict[str, Any]]
    start: int


def layout_of(path: Path) -> Layout:
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    entries = json.loads(raw[8 : 8 + length])
    entries.pop("__metadata__")
    return Layout(raw[8 : 8 + length], entries, 8 + length)


# --- there and back ---------------------------------------------------------------------------------------------------


@given(CONTENTS, PRECISIONS)
def test_what_is_written_is_read_again_in_every_bit_under_any_name(
    folder: Path, contents: dict[str, Array], precision: str
) -> None:
    trace = Trace(write(folder / "x", contents, precision))
    assert list(trace.records) == list(contents)
    assert trace.precision == precision
    for name, array in contents.items():
        record, found = trace.records[name], meaning(name)
        assert record == Record(name, role_of(name), array.shape, (), found.op if found else "", layer_of(name))
        assert record.size == array.size
        assert same(trace.array(name), stored(array, precision))
        assert trace.indices(name) is None


@given(CONTENTS, PRECISIONS)
def test_safetensors_finds_the_same_arrays_in_the_order_of_execution(
    folder: Path, contents: dict[str, Array], precision: str
) -> None:
    path = write(folder / "x", contents, precision, metadata={"made_by": "é"})
    theirs = safetensors.numpy.load_file(path)
    assert theirs.keys() == contents.keys()
    assert all(same(theirs[name], stored(array, precision)) for name, array in contents.items())
    with safetensors.safe_open(path, framework="np") as file:
        metadata = file.metadata()
        in_file = list(file.offset_keys())
    assert (metadata["trace_version"], metadata["precision"], metadata["made_by"]) == ("1", precision, "é")
    assert [item["name"] for item in json.loads(metadata["records"])] == list(contents)
    with_bytes = [name for name, array in contents.items() if array.size]
    assert [name for name in in_file if name in with_bytes] == with_bytes


@given(CONTENTS, PRECISIONS)
def test_every_array_is_aligned_to_its_items_and_follows_the_one_before(
    folder: Path, contents: dict[str, Array], precision: str
) -> None:
    path = write(folder / "x", contents, precision)
    text, entries, start = layout_of(path)
    assert start % 64 == 0 and text.isascii()
    end = 0
    for name, array in contents.items():
        begin, next_begin = entries[name]["data_offsets"]
        assert begin == end and (start + begin) % stored(array, precision).itemsize == 0
        end = next_begin
    assert path.stat().st_size == start + end


@given(CONTENTS, PRECISIONS, st.integers(0, 3000))
def test_equal_arrays_make_equal_bytes_and_any_room_the_same_tensors(
    folder: Path, contents: dict[str, Array], precision: str, room: int
) -> None:
    first = write(folder / "x", contents, precision).read_bytes()
    assert write(folder / "y", contents, precision).read_bytes() == first
    text, entries, start = layout_of(folder / "x")
    needed = len(text.rstrip(b" "))
    for left in (room, needed - 1, needed, needed + 1):
        other = layout_of(write(folder / "z", contents, precision, room=left))
        assert other.entries == entries
        assert other.start == 8 + max(left, needed) + -(8 + max(left, needed)) % 64
        assert (folder / "z").read_bytes()[other.start :] == first[start:]
    assert len(Trace(folder / "z").records) == len(contents)


@pytest.mark.parametrize("missing_at_the_end", [False, True])
def test_a_payload_that_must_make_room_for_the_header_moves_whole(folder: Path, missing_at_the_end: bool) -> None:
    random = np.random.default_rng(0)
    large = random.integers(0, 2**32, 1 << 21, dtype=np.uint32)  # 8 MiB: more than is moved in one go
    contents = {f"some.long.name.{i}": np.array([i]) for i in range(40)}
    with TraceWriter(folder / "x", "f32") as writer:
        writer.add("large", large)
        for name, array in contents.items():
            writer.add(name, array)
        if missing_at_the_end:
            writer.add_part("parts", np.ones(1 << 18), 1, 20)
    trace = Trace(folder / "x")
    assert layout_of(folder / "x").start > 4096
    assert np.array_equal(trace.array("large"), large)
    assert all(trace.array(name).tolist() == array.tolist() for name, array in contents.items())
    if missing_at_the_end:
        assert [part.min() == part.max() == (at == 1) for at, part in enumerate(trace.array("parts"))] == [True] * 20


@given(arrays(), st.integers(1, 9))
def test_pieces_are_all_elements_in_c_order_few_at_a_time(array: Array, size: int) -> None:
    found = list(pieces(array, size))
    assert all(piece.ndim == 1 and 0 < piece.size <= size and piece.flags.c_contiguous for piece in found)
    assert b"".join(piece.tobytes() for piece in found) == array.tobytes()


def test_arrays_of_several_pieces_are_written_whole_whatever_their_layout(folder: Path) -> None:
    base = np.arange(3 * PIECE // 2, dtype=np.float64)
    contents = {
        "contiguous": base,
        "backwards": base[::-1],
        "transposed": base.reshape(-1, 1024).T,
        "wide and transposed": base.reshape(2, -1).T[:200_000],
        "broadcast": np.broadcast_to(base[:700], (900, 700)),
    }
    trace = Trace(write(folder / "x", contents))
    for name, array in contents.items():
        assert same(trace.array(name), array.astype(np.float32)), name


@given(arrays(), PRECISIONS, st.sampled_from([0.5, -3.0, 0.1]))
def test_an_array_may_be_multiplied_as_it_is_written(folder: Path, array: Array, precision: str, times: float) -> None:
    array = array.astype(STORED[precision][1])  # as gradients are
    with TraceWriter(folder / "x", precision) as writer:
        writer.add("x", array, times=times)
    assert same(Trace(folder / "x").array("x"), np.asarray(array * array.dtype.type(times), order="C"))


RECORDS = st.builds(
    Record,
    name=st.just(""),
    role=st.sampled_from(ROLES),
    shape=st.just(()),
    inputs=st.lists(WORDS, max_size=3).map(tuple),
    op=st.one_of(st.just(""), WORDS),
    layer=st.one_of(st.none(), st.just(0), st.integers(0, 99)),
)


@given(st.dictionaries(NAMES, st.tuples(RECORDS, arrays()), max_size=4))
def test_a_record_is_read_as_it_was_written_with_the_shape_of_its_array(
    folder: Path, contents: dict[str, tuple[Record, Array]]
) -> None:
    with TraceWriter(folder / "x", "f64") as writer:
        for name, (record, array) in contents.items():
            assert name not in writer
            writer.add(dataclasses.replace(record, name=name), array)
            assert name in writer
    expected = [dataclasses.replace(r, name=name, shape=array.shape) for name, (r, array) in contents.items()]
    assert list(Trace(folder / "x").records.values()) == expected


def test_layer_0_and_the_shape_of_a_single_number_are_not_taken_for_nothing(folder: Path) -> None:
    write(folder / "x", {"layers.0.a": np.array(1.5)})
    assert json.loads(Trace(folder / "x").metadata["records"]) == [
        {"layer": 0, "name": "layers.0.a", "role": "output", "shape": []}
    ]
    assert Trace(folder / "x").array("layers.0.a")[()] == 1.5


@pytest.mark.parametrize(
    "name",
    [
        "",
        "a\nb",
        " ",
        "\0",
        "\r",
        '"\\',
        "🦀",
        "a" * 5000,
    ],
)
def test_a_name_may_be_any_text(folder: Path, name: str) -> None:
    (folder / "x").write_bytes(safetensors.numpy.save({name: np.arange(3.0)}))
    assert Trace(folder / "x").array(name).tolist() == [0, 1, 2]
    write(folder / "x", {name: np.arange(3.0)})
    assert Trace(folder / "x").array(name).tolist() == [0, 1, 2]


# --- arrays that come part by part ------------------------------------------------------------------------------------


class Parts(NamedTuple):
    """An array, and which places along its first axis come, in which order; the inputs each is said to come from."""

    whole: Array
    order: list[int]
    inputs: list[tuple[str, ...] | None]  # None: only the name is given

    def expected(self) -> Array:
        """Places that do not come are zeros."""
        found = np.zeros_like(self.whole)
        found[self.order] = self.whole[self.order]
        return found


@st.composite
def parts(draw: st.DrawFn) -> Parts:
    whole = np.array(draw(arrays(min_axes=1).filter(lambda x: len(x) > 0)))
    order = draw(st.permutations(range(len(whole))))[: draw(st.integers(1, len(whole)))]
    inputs = st.one_of(st.none(), st.lists(WORDS, max_size=2).map(tuple))
    return Parts(whole, order, draw(st.lists(inputs, min_size=len(order), max_size=len(order))))


def write_parts(path: Path, several: list[Parts], precision: str, **options: Any) -> Trace:
    """A part of the first, one of the second, …, the next of the first, …; whole arrays before, between and behind."""
    with TraceWriter(path, precision, **options) as writer:
        for turn in range(max(len(one.order) for one in several)):
            for i, one in enumerate(several):
                if turn < len(one.order):
                    at, inputs = one.order[turn], one.inputs[turn]
                    record = f"p{i}" if inputs is None else Record(f"p{i}", "output", (), inputs)
                    writer.add_part(record, one.whole[at], at, len(one.whole))
            writer.add(f"between.{turn}", np.full(3, turn + 1.0))
    return Trace(path)


@given(st.lists(parts(), min_size=1, max_size=3), PRECISIONS)
def test_parts_may_come_in_any_order_and_those_that_never_come_are_zeros(
    folder: Path, several: list[Parts], precision: str
) -> None:
    trace = write_parts(folder / "x", several, precision)
    for i, one in enumerate(several):
        record = trace.records[f"p{i}"]
        assert same(trace.array(f"p{i}"), stored(one.expected(), precision))
        assert (record.shape, record.sample, record.digest, record.parts) == (one.whole.shape, "", "", 0)
    for name in trace.records:
        if name.startswith("between."):
            assert trace.array(name).tolist() == [int(name.rpartition(".")[2]) + 1.0] * 3


@given(parts())
def test_the_inputs_are_those_of_the_last_part_that_says_any(folder: Path, one: Parts) -> None:
    told = [inputs for inputs in one.inputs if inputs is not None]
    assert write_parts(folder / "x", [one], "f32").records["p0"].inputs == (told[-1] if told else ())


@pytest.mark.parametrize("shape, at, length", [((2,), 3, 3), ((2,), -1, 3), ((3,), 1, 3), ((2,), 1, 4), ((), 1, 3)])
def test_a_part_that_has_no_place_in_the_whole_is_refused_before_it_overwrites_others(
    folder: Path, shape: tuple[int, ...], at: int, length: int
) -> None:
    refused = pytest.raises(TraceError, match=rf"x: .* cannot be place {at} of {length} in state \[3, 2\]$")
    with refused, TraceWriter(folder / "x", "f32") as writer:
        writer.add_part("state", np.zeros(2), 0, 3)
        writer.add_part("state", np.zeros(shape), at, length)


# --- samples ----------------------------------------------------------------------------------------------------------


def test_the_indices_of_a_sample_are_fixed_for_ever() -> None:
    assert sampled_indices(100, 5).tolist() == [10, 68, 71, 75, 86]
    assert sampled_indices(1000, 7).tolist() == [94, 197, 333, 395, 543, 698, 864]
    assert sampled_indices(12, 4).tolist() == [0, 1, 3, 7]
    assert sampled_indices(10**12, 4).tolist() == [39489833572, 453406166736, 467638464206, 750561033334]


@given(st.integers(2, 10**9), st.integers(1, 500))
def test_indices_of_a_sample_ascend_and_are_as_many_as_were_asked_for(size: int, count: int) -> None:
    count = min(count, size - 1)
    found = sampled_indices(size, count)
    assert found.dtype == np.int64 and len(found) == count
    assert (np.diff(found) > 0).all() and found[0] >= 0 and found[-1] < size
    assert np.array_equal(sampled_indices(size, count), found)


def test_samples_reach_into_every_tenth_of_an_array() -> None:
    for size in (1000, 12_345, 10**6):
        assert np.unique(sampled_indices(size, 200) * 10 // size).tolist() == list(range(10))


@given(st.dictionaries(NAMES, st.tuples(st.sampled_from(ROLES), arrays()), max_size=5), PRECISIONS, st.integers(1, 30))
def test_of_larger_arrays_fixed_numbers_and_the_digest_of_the_whole_are_kept(
    folder: Path, contents: dict[str, tuple[str, Array]], precision: str, count: int
) -> None:
    with TraceWriter(folder / "x", precision, sample=count) as writer:
        for name, (role, array) in contents.items():
            writer.add(Record(name, role, ()), array)
    trace, sizes = Trace(folder / "x"), set[int]()
    for name, (role, array) in contents.items():
        record, whole = trace.records[name], stored(array, precision)
        indices = trace.indices(name)
        assert (record.shape, record.parts) == (array.shape, 0)
        if array.size <= count or role in ("input", "parameter"):
            assert (record.sample, record.digest, indices) == ("", "", None)
            assert same(trace.array(name), whole)
        else:
            sizes.add(array.size)
            assert indices is not None and np.array_equal(indices, sampled_indices(array.size, count))
            assert record.sample == f"sample.{array.size}"
            assert record.digest == hashlib.sha256(whole.tobytes()).hexdigest()
            assert same(trace.array(name), whole.reshape(-1)[indices])
    entries = layout_of(folder / "x").entries
    assert set(entries) == {*contents, *(f"sample.{size}" for size in sizes)}
    assert all(same(trace.array(f"sample.{n}"), stored(sampled_indices(n, count), precision)) for n in sizes)


@given(st.lists(parts(), min_size=1, max_size=2), PRECISIONS, st.integers(1, 30))
def test_the_digest_of_what_comes_in_parts_is_that_of_the_digests_of_all_parts(
    folder: Path, several: list[Parts], precision: str, count: int
) -> None:
    trace = write_parts(folder / "x", several, precision, sample=count)
    for i, one in enumerate(several):
        record, whole = trace.records[f"p{i}"], stored(one.expected(), precision)
        indices = trace.indices(f"p{i}")
        if whole.size <= count:
            assert (record.sample, record.digest, record.parts) == ("", "", 0)
            continue
        digests = b"".join(hashlib.sha256(part.tobytes()).digest() for part in whole)
        assert (record.digest, record.parts) == (hashlib.sha256(digests).hexdigest(), len(whole))
        assert indices is not None and same(trace.array(f"p{i}"), whole.reshape(-1)[indices])


def test_samples_and_digests_of_arrays_of_several_pieces_are_right(folder: Path) -> None:
    base = np.arange(3 * PIECE // 2, dtype=np.float32)
    contents = {
        "contiguous": base,
        "transposed": base.reshape(-1, 1024).T,
        "broadcast": np.broadcast_to(base[:1024], (600, 1024)),
    }
    trace = Trace(write(folder / "x", contents, sample=100))
    for name, array in contents.items():
        indices = trace.indices(name)
        assert indices is not None and len(indices) == 100
        assert trace.records[name].digest == hashlib.sha256(array.tobytes()).hexdigest()
        assert np.array_equal(trace.array(name), array.reshape(-1)[indices])


def sampled_file(path: Path, indices: Array) -> Trace:
    """A file in which the numbers at these indices of 9 were kept, whatever they are."""
    record = {"name": "x", "role": "output", "shape": [9], "sample": "sample.9"}
    tensors = {"x": np.zeros(indices.shape), "sample.9": indices}
    path.write_bytes(safetensors.numpy.save(tensors, {"records": json.dumps([record])}))
    return Trace(path)


def test_indices_that_are_none_are_refused(folder: Path) -> None:
    right = np.array([0, 4, 8])
    for dtype in (np.int64, np.uint32, np.uint8, np.uint64):
        found = sampled_file(folder / "x", right.astype(dtype)).indices("x")
        assert found is not None and found.dtype == np.int64 and found.tolist() == [0, 4, 8]
    wrong: list[Array] = [np.array([0, 4, 9]), np.array([-1, 4, 8]), np.array([0, 4, 4]), np.array([4, 0, 8])]
    wrong += [np.array([0.0, 4.0, np.nan]), right.astype(np.float32), np.array([2**63], np.uint64), np.array([[0, 4]])]
    for indices in wrong:
        with pytest.raises(TraceError, match=r"x: sample\.9 does not hold indices of 9 numbers, ascending$"):
            sampled_file(folder / "x", indices).indices("x")


# --- what cannot be written -------------------------------------------------------------------------------------------


def listing(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt(), OSError(errno.EIO, "of the body's own")])
@pytest.mark.parametrize("before", [{}, {"x": b"an older file", ".x.tmp": b"left by a process that died"}])
def test_an_error_inside_leaves_no_file_and_an_older_one_as_it_was(
    tmp_path: Path, before: dict[str, bytes], error: BaseException
) -> None:
    for name, content in before.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(type(error)) as caught, TraceWriter(tmp_path / "x", "f32") as writer:
        writer.add("a", np.zeros(1000))
        raise error
    assert caught.value is error
    assert listing(tmp_path) == {name: before[name] for name in before if name == "x"}


def test_the_file_appears_when_all_is_written_and_not_before(tmp_path: Path) -> None:
    with TraceWriter(tmp_path / "x", "f32") as writer:
        writer.add("a", np.zeros(1000))
        assert not (tmp_path / "x").exists()
    assert list(listing(tmp_path)) == ["x"]


FAILING = ((disk, "create"), (disk, "write_at"), (disk, "read_at"), (os, "ftruncate"), (disk, "rename"))


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), KeyboardInterrupt()])
def test_whichever_call_to_the_disk_fails_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    calls = 0

    def failing(real: Any, last: int) -> Any:
        def call(*arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == last:
                raise failure
            return real(*arguments)

        return call

    def attempt(last: int) -> None:
        with monkeypatch.context() as patched:
            for module, name in FAILING:
                patched.setattr(module, name, failing(getattr(module, name), last))
            with TraceWriter(tmp_path / "x", "f32", sample=10) as writer:
                writer.add("a", np.arange(5.0))
                writer.add("b", np.arange(500.0))
                for at in range(3):
                    writer.add_part("c", np.ones(at + 9)[:9], at, 3)

    attempt(0)
    whole, count = listing(tmp_path), calls
    assert list(whole) == ["x"] and count >= 9
    for last in range(1, count + 1):
        calls = 0
        with pytest.raises(TraceError if isinstance(failure, OSError) else type(failure)) as caught:
            attempt(last)
        if isinstance(failure, OSError):
            why = "cannot be written (No space left on device); choose another place"
            assert str(caught.value) == f"{tmp_path / 'x'}: {why}"
        assert listing(tmp_path) == whole, f"call {last}"


@pytest.mark.parametrize("place", ["missing/x", "file/x", "folder"])
def test_a_place_where_no_file_can_be_is_told_in_one_line(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    with pytest.raises(TraceError) as caught:
        write(tmp_path / place, {"a": np.zeros(2)})
    beginning = re.escape(str(tmp_path / place))
    assert re.fullmatch(rf"{beginning}: cannot be written \([^()]+\); choose another place", str(caught.value))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


@pytest.mark.parametrize("ways", [("add", "add"), ("add", "add_part"), ("add_part", "add")])
def test_a_name_twice_is_refused(tmp_path: Path, ways: tuple[str, str]) -> None:
    message = f"{tmp_path / 'x'}: a.b is recorded twice; of steps after the first write step.N. before it"
    with pytest.raises(TraceError, match=f"^{re.escape(message)}$"), TraceWriter(tmp_path / "x", "f32") as writer:
        for way in ways:
            if way == "add":
                writer.add("a.b", np.zeros(2))
            else:
                writer.add_part("a.b", np.zeros(2), 0, 2)
    assert listing(tmp_path) == {}


@pytest.mark.parametrize("name", ["__metadata__", "sample.9", "sample.100", "\ud800", "a.\udfffb"])
def test_names_that_would_spoil_the_file_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(TraceError, match=f"^{re.escape(str(tmp_path / 'x'))}: no tensor can be called '"):
        write(tmp_path / "x", {"b": np.zeros(100), name: np.zeros(2)}, sample=10)
    assert listing(tmp_path) == {}


@pytest.mark.parametrize(
    "name", ["__metadata__.a", "a.sample.9", "sample", "sample.", "samples.9", "sample.9.grad", "sample.a"]
)
def test_names_that_are_like_them_are_not(tmp_path: Path, name: str) -> None:
    trace = Trace(write(tmp_path / "x", {"b": np.zeros(100), name: np.ones(2)}, sample=10))
    assert trace.array(name).tolist() == [1, 1] and list(trace.records) == ["b", name]


@pytest.mark.parametrize("way", ["whole", "sampled", "part"])
@pytest.mark.parametrize("precision, limits", [("f64", (-(2**63), 2**63 - 1)), ("bf16", (0, 2**32 - 1))])
def test_an_integer_that_would_be_stored_as_another_one_is_refused(
    tmp_path: Path, precision: str, limits: tuple[int, int], way: str
) -> None:
    def attempt(array: Array) -> Array:
        with TraceWriter(tmp_path / "x", precision, sample=1 if way == "sampled" else 0) as writer:
            if way == "part":
                writer.add_part("ids", array, 0, 1)
            else:
                writer.add("ids", array)
        return Trace(tmp_path / "x").array("ids")

    fit = np.array(limits)
    assert way == "sampled" or attempt(fit).reshape(-1).tolist() == list(limits)
    wrong = [np.array([3, 2**64 - 1], np.uint64)]
    wrong += [np.array([3, -100]), np.array([3, 2**32])] if precision != "f64" else []
    for array in wrong:
        stored_from = f"integers are stored from {limits[0]} to {limits[1]}"
        with pytest.raises(TraceError, match=f": ids holds {array[1]}; {stored_from}$"):
            attempt(array)


@pytest.mark.parametrize("array", [np.zeros(2, complex), np.array(["a"]), np.array([None])])
def test_what_are_no_real_numbers_is_refused(tmp_path: Path, array: Array) -> None:
    with pytest.raises(TraceError, match=f": a holds {array.dtype}; only real numbers, integers and booleans are stored$"):
        write(tmp_path / "x", {"a": array})


# --- memory -----------------------------------------------------------------------------------------------------------

MIB = 1 << 20


@pytest.mark.thorough
@pytest.mark.parametrize("way", ["in one piece", "as a broadcast view", "transposed", "sampled", "in parts"])
def test_writing_256_mib_takes_a_few_more(folder: Path, way: str) -> None:
    large = np.zeros(256 * MIB // 8).reshape(4096, -1)  # pages of zeros that are only read take no memory of their own
    array = {"transposed": large.T, "as a broadcast view": np.broadcast_to(np.zeros(8192), large.shape)}.get(way, large)
    tracemalloc.start()
    try:
        with TraceWriter(folder / "x", "f32", sample=1000 if way == "sampled" else 0) as writer:
            if way == "in parts":
                for at, part in enumerate(large.reshape(16, -1)):
                    writer.add_part("x", part, at, 16)
            else:
                writer.add("x", array)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 64 * MIB
    assert (folder / "x").stat().st_size < MIB if way == "sampled" else (folder / "x").stat().st_size > 128 * MIB
    (folder / "x").unlink()


# --- files that are damaged, wrong or foreign -------------------------------------------------------------------------


def small_file(path: Path) -> bytes:
    """A trace with everything that a trace can have, below 2 KB."""
    with TraceWriter(path, "f32", {"made_by": "é"}, sample=4) as writer:
        writer.add("tokens", np.array([[3, 1]]))
        writer.add(Record("layers.0.q", "output", (), ("tokens",), "rope", 0), np.arange(6.0).reshape(2, 3))
        writer.add("loss", np.array(2.5))
        writer.add("none", np.zeros((2, 0)))
        writer.add_part("state", np.arange(3.0), 1, 2)
    return path.read_bytes()


def read_all(path: Path) -> str:
    """Read all there is. Returns why the file, or one of its arrays, is refused; "" where all of it is read."""
    try:
        trace = Trace(path)
        assert isinstance(trace.precision, str)
        for name, record in trace.records.items():
            array, indices = trace.array(name), trace.indices(name)
            array.tobytes()
            assert record.name == name and type(record.size) is int and all(type(other) is str for other in record.inputs)
            assert {type(text) for text in (record.role, record.op, record.sample, record.digest)} == {str}
            assert record.layer is None or type(record.layer) is int
            if indices is None:
                assert array.shape == record.shape
            else:
                assert array.shape == indices.shape
                assert not len(indices) or (indices[0] >= 0 and indices[-1] < record.size)
    except TraceError as error:
        assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
        return str(error).removeprefix(f"{path}: ")
    return ""


def test_a_file_that_is_cut_off_anywhere_is_refused(folder: Path) -> None:
    raw = small_file(folder / "x")
    assert read_all(folder / "x") == ""
    for length in range(len(raw)):
        (folder / "y").write_bytes(raw[:length])
        assert read_all(folder / "y").startswith("is not a trace ("), length
    (folder / "y").write_bytes(raw + b"\0")
    assert read_all(folder / "y").startswith("is not a trace (")


def test_whatever_single_byte_is_changed_a_file_is_refused_or_all_of_it_can_be_read(folder: Path) -> None:
    raw = small_file(folder / "x")
    random = np.random.default_rng(0)
    refused = accepted = 0
    descriptor = os.open(folder / "x", os.O_RDWR)
    for at, byte in enumerate(raw):
        others = {byte ^ 1, byte ^ 0x20, byte ^ 0x80, *random.choice(list(b'{}[]:,"\\019.- FUx'), 8).tolist()} - {byte}
        for other in others:
            os.pwrite(descriptor, bytes([other]), at)
            try:
                why = read_all(folder / "x")
            except Exception as error:
                error.add_note(f"byte {at}: {byte:#x} as {other:#x} in {raw[max(0, at - 30) : at + 30]!r}")
                raise
            refused, accepted = refused + bool(why), accepted + (not why)
        os.pwrite(descriptor, bytes([byte]), at)
    os.close(descriptor)
    assert refused > 3000 and accepted > 300


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-1, 3), st.floats(), st.sampled_from(["a", "b", "", "records", "3"])),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(["name", "a", ""]), inner, max_size=2)
    ),
    max_leaves=4,
)
RIGHT: dict[str, Any] = {"name": "a", "role": "output", "shape": [3]}


@st.composite
def wrong_records(draw: st.DrawFn) -> str:
    """The text of records, of which some have fields that hold anything, or lack them."""
    listed = []
    for name in draw(st.lists(st.sampled_from("abc"), max_size=2)):
        item = {**RIGHT, "name": name}
        for key in draw(st.lists(st.sampled_from([*(f.name for f in dataclasses.fields(Record)), "other"]), max_size=2)):
            item[key] = draw(JSON)
        for key in draw(st.lists(st.sampled_from(list(item)), max_size=1)):
            del item[key]
        listed.append(item)
    return json.dumps(draw(st.one_of(st.just(listed), st.just(listed), JSON)))


def file_of(path: Path, header: str | bytes, payload: bytes = b"") -> Path:
    """A file with this header, as it is."""
    text = header.encode() if isinstance(header, str) else header
    path.write_bytes(struct.pack("<Q", len(text)) + text + payload)
    return path


def with_records(path: Path, records: str) -> Path:
    """A file of two tensors of three numbers, and these records."""
    tensors = {"a": np.arange(3.0), "b": np.array([0, 1, 2])}
    path.write_bytes(safetensors.numpy.save(tensors, {"records": records}))
    return path


@given(wrong_records())
def test_whatever_the_records_say_they_are_refused_or_all_they_speak_of_can_be_read(folder: Path, records: str) -> None:
    read_all(with_records(folder / "x", records))


@pytest.mark.parametrize(
    "records, why",
    [
        ([{**RIGHT, "name": "c"}], "they speak of c, which the file does not hold"),
        ([{**RIGHT, "sample": "c"}], "they speak of c, which the file does not hold"),
        ([RIGHT, RIGHT], "a is listed twice"),
        ([{**RIGHT, "shape": [4]}], "a has another shape in them than in the header"),
        ([{**RIGHT, "color": "red"}], "color 'red'"),
        ([{**RIGHT, "layer": "0"}], "layer '0'"),
        ([{**RIGHT, "inputs": [1]}], "shape or inputs of a"),
        ([{**RIGHT, "shape": [-3]}], "shape or inputs of a"),
    ],
)
def test_what_is_wrong_with_records_is_told(folder: Path, records: list[Any], why: str) -> None:
    found = read_all(with_records(folder / "x", json.dumps(records)))
    assert found == f"its records cannot be understood ({why})"


def test_records_nested_too_deep_are_refused(folder: Path) -> None:
    assert read_all(with_records(folder / "x", "[" * 100_000)).startswith("its records cannot be understood (")


def test_records_of_a_later_version_are_refused(folder: Path) -> None:
    (folder / "x").write_bytes(safetensors.numpy.save({"a": np.zeros(1)}, {"records": "[]", "trace_version": "2"}))
    assert read_all(folder / "x") == "trace version 2; this package reads 1"


@pytest.mark.parametrize(
    "header, name",
    [
        ('{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}', "a"),
        ('{"__metadata__":{"b":"1","b":"2"},"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}', "b"),
        ('{"__metadata__":{},"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"__metadata__":{}}', "__metadata__"),
        ('{"a":{"dtype":"U8","shape":[0],"shape":[0],"data_offsets":[0,0]}}', "shape"),
    ],
)
def test_a_header_with_a_key_twice_is_refused_and_the_key_told(folder: Path, header: str, name: str) -> None:
    why = read_all(file_of(folder / "x", header))
    assert why == f"{name} stands in its header twice" or ("is not a trace" in why and f"`{name}`" in why)


def test_what_is_no_file_of_tensors_is_refused(folder: Path) -> None:
    (folder / "empty").write_bytes(b"")
    (folder / "text").write_text("some text, longer than eight bytes")
    (folder / "a folder").mkdir()
    for name in ("empty", "text", "a folder"):
        assert re.fullmatch(r"is not a trace \(.+\)", read_all(folder / name)), name
    assert read_all(folder / "absent") == "no such file"


def test_shapes_that_no_array_can_have_are_refused(folder: Path) -> None:
    for shape, size in (([1] * 65, 1), ([0, 2**62, 8], 0)):
        header = {"a": {"dtype": "U8", "shape": shape, "data_offsets": [0, size]}}
        assert read_all(file_of(folder / "x", json.dumps(header), bytes(size))).startswith(
            "a has a shape that no array can have ("
        )


FOREIGN: dict[str, Array] = {
    "F64": np.array([0.1, -0.0, np.inf]),
    "F32": np.array([0.1, 1e-45], np.float32),
    "F16": np.array([0.1, 65504], np.float16),
    "BF16": np.array([0.1, 3e38], ml_dtypes.bfloat16),
    "I64": np.array([-(2**63), 5]),
    "I32": np.array([-7, 2**31 - 1], np.int32),
    "I16": np.array([-7, 2**15 - 1], np.int16),
    "I8": np.array([-7, 127], np.int8),
    "U64": np.array([2**64 - 1], np.uint64),
    "U32": np.array([2**32 - 1], np.uint32),
    "U16": np.array([2**16 - 1], np.uint16),
    "U8": np.array([255], np.uint8),
    "BOOL": np.array([True, False]),
}


@pytest.mark.parametrize("shift", range(8))
def test_arrays_of_other_programs_are_read_whatever_their_dtype_and_alignment(folder: Path, shift: int) -> None:
    header, payload = dict[str, Any](), b""
    for name, array in FOREIGN.items():
        offsets = [len(payload), len(payload) + array.nbytes]
        header[name] = {"dtype": name, "shape": list(array.shape), "data_offsets": offsets}
        payload += array.tobytes()
    text = json.dumps(header, separators=(",", ":"))
    trace = Trace(file_of(folder / "x", text + " " * (-len(text) % 8 + shift), payload))
    assert list(trace.records) == list(FOREIGN)
    assert all(same(trace.array(name), array) for name, array in FOREIGN.items())


def test_a_file_without_records_has_what_its_names_tell_in_the_order_of_its_payload(
    folder: Path,
) -> None:
    roles = {
        "tokens": ("input", None),
        "step.2.micro.3.targets": ("input", None),
        "layers.4.mlp.up_proj.weight": ("output", 4),
        "step.2.layers.10.self_attn.q": ("output", 10),
        "a.grad": ("gradient", None),
        "layers.4.b.grad.clipped": ("gradient", 4),
        "step.2.optimizer.exp_avg.layers.7.b": ("optimizer", 7),
        "b.after": ("parameter_after", None),
        "of.nobody": ("output", None),
    }
    header = {name: {"dtype": "F32", "shape": [1, 1], "data_offsets": [4 * at, 4 * at + 4]} for at, name in enumerate(roles)}
    text = json.dumps(dict(sorted(header.items())))
    trace = Trace(file_of(folder / "x", text, np.arange(len(roles), dtype=np.float32).tobytes()))
    assert list(trace.records.values()) == [Record(name, role, (1, 1), layer=layer) for name, (role, layer) in roles.items()]
    assert [trace.array(name).item() for name in roles] == list(range(len(roles)))


@pytest.mark.parametrize(
    "dtypes, metadata, expected",
    [
        ([], {}, "f32"),
        (["I64", "I64"], {}, "f32"),
        (["F64", "F32", "F32"], {}, "f32"),
        (["F64", "F64", "F32", "I64", "I64", "I64"], {}, "f64"),
        (["BF16", "BF16", "F32"], {}, "bf16"),
        (["F16", "I32"], {}, "f16"),
        (["F32"], {"precision": "tf32"}, "tf32"),
        (["F64"], {"precision": ""}, "f64"),
    ],
)
def test_without_a_word_of_it_the_precision_is_the_dtype_of_most_arrays(
    folder: Path, dtypes: list[str], metadata: dict[str, str], expected: str
) -> None:
    tensors = {str(i): FOREIGN[dtype] for i, dtype in enumerate(dtypes)}
    (folder / "x").write_bytes(safetensors.numpy.save(tensors, metadata or None))
    assert Trace(folder / "x").precision == expected


def test_an_array_of_a_dtype_that_is_not_understood_is_refused_and_the_others_are_read(folder: Path) -> None:
    header = {
        "eight": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]},
        "b": {"dtype": "U8", "shape": [2], "data_offsets": [2, 4]},
    }
    trace = Trace(file_of(folder / "x", json.dumps(header), bytes([1, 2, 3, 4])))
    assert trace.array("b").tolist() == [3, 4]
    with pytest.raises(
        TraceError, match=f"^{re.escape(str(folder / 'x'))}: eight has dtype F8_E4M3, which is not understood$"
    ):
        trace.array("eight")


def test_what_was_let_go_of_is_read_again_as_it_was(folder: Path) -> None:
    array = np.random.default_rng(0).standard_normal(100_000).astype(np.float32)
    trace = Trace(write(folder / "x", {"a": array}))
    view = trace.array("a")
    for _ in range(2):
        assert same(view, array) and same(trace.array("a"), array)
        trace.forget()


def test_an_open_trace_is_not_changed_by_a_new_file_of_its_name_nor_can_it_be_written_to(folder: Path) -> None:
    trace = Trace(write(folder / "x", {"a": np.arange(5.0)}))
    write(folder / "x", {"b": np.zeros(1000)})
    trace.forget()
    assert trace.array("a").tolist() == [0, 1, 2, 3, 4]
    assert list(Trace(folder / "x").records) == ["b"]
    with pytest.raises(ValueError, match="read-only"):
        trace.array("a")[0] = 1


@pytest.mark.parametrize("fails", [False, True])
def test_the_thread_that_writes_ends_with_the_writer(tmp_path: Path, fails: bool) -> None:
    with suppress(ZeroDivisionError), TraceWriter(tmp_path / "x", "f32") as writer:
        writer.add("a", np.ones(3))
        assert "trace" in {thread.name for thread in threading.enumerate()}
        if fails:
            raise ZeroDivisionError
    assert "trace" not in {thread.name for thread in threading.enumerate()}
    assert (tmp_path / "x").exists() is not fails
