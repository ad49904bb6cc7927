"""The bytes of a checkpoint: deterministic, read back bit for bit by us and by the stock package, nothing else let in."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import handmade
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import tiny
from golden import write_format_v1
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from oxidizr_ref.checkpoint import format
from oxidizr_ref.checkpoint import header as headers
from oxidizr_ref.errors import CheckpointError

DTYPES = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16, np.int64, np.uint32, np.uint8]
SMALL = {"b": np.arange(3, dtype=np.float32), "a": np.array([7, -1], dtype=np.int64), "c": np.array(9, dtype=np.uint8)}
READERS = (format.load, format.verify, format.read_header, format.mapped)


def shapes() -> st.SearchStrategy[tuple[int, ...]]:
    return npst.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)


@st.composite
def arrays(draw: st.DrawFn) -> np.ndarray[Any, Any]:
    """An array of any storable dtype and shape, of any bits: NaNs, infinities and denormals as well."""
    dtype, shape = np.dtype(draw(st.sampled_from(DTYPES))), draw(shapes())
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    return np.frombuffer(draw(st.binary(min_size=size, max_size=size)), dtype=dtype).reshape(shape)


parts = st.text("abcXYZ019_-", min_size=1, max_size=5)
names = st.lists(parts, min_size=1, max_size=3).map(".".join).filter(lambda name: name != "__metadata__")
tensors = st.dictionaries(names, arrays(), max_size=6)
strings = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
metadata = st.dictionaries(strings.filter(lambda key: key not in ("digests", "header_digest")), strings, max_size=4)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all examples of a search share."""
    return tmp_path_factory.mktemp("scratch")


def bits(array: np.ndarray[Any, Any]) -> tuple[Any, ...]:
    return array.dtype, array.shape, array.tobytes()


# --- round trip -------------------------------------------------------------------------------------------------------


@given(tensors, metadata)
def test_what_is_saved_is_loaded_bit_for_bit(scratch: Path, saved: Any, words: Any) -> None:
    path = scratch / "round_trip.safetensors"
    format.save(path, saved, words)
    loaded = format.load(path)
    assert loaded.metadata == words == format.read_header(path).metadata
    assert {name: bits(array) for name, array in loaded.tensors.items()} == {name: bits(saved[name]) for name in saved}
    for array in loaded.tensors.values():
        assert array.flags.owndata and array.flags.c_contiguous and array.flags.aligned and array.flags.writeable


@given(tensors, metadata)
def test_saving_what_was_loaded_writes_the_same_bytes_again(scratch: Path, saved: Any, words: Any) -> None:
    path, again = scratch / "once.safetensors", scratch / "again.safetensors"
    format.save(path, saved, words)
    loaded = format.load(path)
    format.save(again, loaded.tensors, loaded.metadata)
    assert path.read_bytes() == again.read_bytes()


@given(tensors, metadata)
def test_the_bytes_are_those_of_an_independent_writer(scratch: Path, saved: Any, words: Any) -> None:
    path = scratch / "ours.safetensors"
    format.save(path, saved, words)
    assert path.read_bytes() == write_format_v1.file_bytes(saved, words)


@given(tensors, metadata, st.randoms())
def test_bytes_do_not_depend_on_the_order_of_the_dictionaries(scratch: Path, saved: Any, words: Any, source: Any) -> None:
    shuffled = list(saved.items()), list(words.items())
    for items in shuffled:
        source.shuffle(items)
    paths = [scratch / name for name in ("order_a", "order_b")]
    format.save(paths[0], saved, words)
    format.save(paths[1], dict(shuffled[0]), dict(shuffled[1]))
    assert paths[0].read_bytes() == paths[1].read_bytes()


@given(tensors, metadata)
def test_the_stock_package_reads_equal_bits(scratch: Path, saved: Any, words: Any) -> None:
    path = scratch / "stock.safetensors"
    format.save(path, saved, words)
    loaded = safetensors.numpy.load_file(path)
    assert {name: bits(array) for name, array in loaded.items()} == {name: bits(saved[name]) for name in saved}
    with safetensors.safe_open(path, framework="numpy") as file:
        assert words.items() <= file.metadata().items()


@given(tensors, metadata)
def test_header_size_and_views_tell_of_the_file_what_loading_it_does(scratch: Path, saved: Any, words: Any) -> None:
    path = scratch / "told.safetensors"
    format.save(path, saved, words)
    header = format.verify(path)
    assert header == format.read_header(path) == format.describe(saved, words)
    assert header.file_size == path.stat().st_size == format.predict_size(saved, words)
    again, views = format.mapped(path)
    assert again == header and views.keys() == saved.keys()
    for name, view in views.items():
        assert bits(view) == bits(saved[name]) and view.flags.aligned and view.flags.c_contiguous
        assert not view.flags.writeable


@pytest.mark.parametrize("dtype", [np.dtype(dtype).name for dtype in DTYPES])
def test_every_bit_pattern_of_a_dtype_passes_through_us_and_the_stock_package(tmp_path: Path, dtype: str) -> None:
    """All patterns of up to 16 bits; of wider dtypes, every exponent with five mantissas, each with both signs."""
    kind = np.dtype(dtype)
    if kind.itemsize <= 2:
        patterns = np.arange(1 << 8 * kind.itemsize, dtype=f"u{kind.itemsize}")
    else:
        exponents, shift = (2**11, 52) if kind.itemsize == 8 else (2**8, 23)
        both = np.arange(2 * exponents, dtype=f"u{kind.itemsize}")[:, None] << np.array(shift, f"u{kind.itemsize}")
        mantissas = np.array([0, 1, 2 ** (shift - 1), 2**shift - 1, 0x2AAAAA], dtype=f"u{kind.itemsize}")
        patterns = both | mantissas
    array = np.ascontiguousarray(patterns).view(kind)
    path = tmp_path / "patterns.safetensors"
    format.save(path, {"x": array}, {})
    assert bits(format.load(path).tensors["x"]) == bits(array) == bits(safetensors.numpy.load_file(path)["x"])


# --- layout -----------------------------------------------------------------------------------------------------------


@given(tensors)
def test_every_tensor_is_aligned_in_the_file_and_the_order_is_item_size_then_name(scratch: Path, saved: Any) -> None:
    path = scratch / "aligned.safetensors"
    format.save(path, saved, {})
    raw = path.read_bytes()
    header, payload = json.loads(handmade.text_of(raw)), len(raw) - len(handmade.payload_of(raw))
    del header["__metadata__"]
    assert payload % 64 == 0
    for name, entry in header.items():
        assert (payload + entry["data_offsets"][0]) % saved[name].dtype.itemsize == 0
    end = 0
    for name in sorted(saved, key=lambda name: (-saved[name].dtype.itemsize, name)):
        assert header[name]["data_offsets"] == [end, end + saved[name].nbytes]
        end += saved[name].nbytes
    assert len(raw) == payload + end


def test_the_header_is_canonical_json_with_digests_of_the_tensors_and_of_itself(tmp_path: Path) -> None:
    path = tmp_path / "small.safetensors"
    format.save(path, SMALL, {"progress": '{"step":1}'})
    raw = handmade.text_of(path.read_bytes())
    header = json.loads(raw)
    assert raw.decode() == json.dumps(header, sort_keys=True, separators=(",", ":")).ljust(len(raw))
    own = header["__metadata__"]["header_digest"]
    zeroed = len(raw).to_bytes(8, "little") + raw.replace(own.encode(), b"0" * 64)
    assert hashlib.sha256(zeroed).hexdigest() == own
    digests = {name: hashlib.sha256(hashlib.sha256(array.tobytes()).digest()).hexdigest() for name, array in SMALL.items()}
    assert json.loads(header["__metadata__"]["digests"]) == digests


def test_a_tensor_s_digest_is_sha256_over_the_sha256s_of_its_4_mib_chunks(tmp_path: Path) -> None:
    array = np.arange((2 * format.CHUNK_BYTES + 40) // 8, dtype=np.int64)
    raw, path = array.tobytes(), tmp_path / "chunks.safetensors"
    chunks = [hashlib.sha256(raw[i : i + 4 * 2**20]).digest() for i in range(0, len(raw), 4 * 2**20)]
    assert len(chunks) == 3
    for count in (1, 3):
        with tiny.threads(count):
            format.save(path, {"x": array}, {})
            assert format.verify(path).digests == {"x": hashlib.sha256(b"".join(chunks)).hexdigest()}
            assert format.describe({"x": array}, {}) == format.read_header(path)


@pytest.mark.parametrize(
    "words", [{'a"header_digest': handmade.ZEROS}, {'"header_digest': "a" * 64, ',"header_digest': "b" * 64}]
)
def test_metadata_that_looks_like_the_header_s_digest_is_not_taken_for_it(tmp_path: Path, words: dict[str, str]) -> None:
    path = tmp_path / "x"
    format.save(path, SMALL, words)
    assert path.read_bytes() == handmade.sealed(handmade.text_of(path.read_bytes()), handmade.payload_of(path.read_bytes()))
    assert format.load(path).metadata == words


# --- what has no place in the format ----------------------------------------------------------------------------------


def refused(tmp_path: Path, saved: Any, words: Any, reason: str) -> None:
    """Saving, predicting and describing refuse alike, and nothing is written."""
    for attempt in (lambda: format.save(tmp_path / "x", saved, words), lambda: format.describe(saved, words)):
        with pytest.raises(CheckpointError, match=reason):
            attempt()
    with pytest.raises(CheckpointError, match=reason):
        format.predict_size(saved, words)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "view",
    [lambda x: x.T, lambda x: x[:, ::2], lambda x: x[::-1], np.asfortranarray],
    ids=["transposed", "strided", "reversed", "Fortran"],
)
def test_an_array_that_does_not_lie_in_c_order_is_refused(tmp_path: Path, view: Callable[[Any], Any]) -> None:
    refused(tmp_path, {"x": view(np.arange(12, dtype=np.float32).reshape(3, 4))}, {}, r"tensor x: .*C order")


@pytest.mark.parametrize("dtype", [">f4", "c8", "i4", "u2", "?", "O", "U3", "M8[s]", "i8,f8", ml_dtypes.float8_e4m3fn])
def test_a_dtype_that_not_every_reader_has_is_refused(tmp_path: Path, dtype: Any) -> None:
    refused(tmp_path, {"x": np.zeros(2, dtype=dtype)}, {}, r"tensor x: dtype .* cannot be stored")


ODD_NAMES = [
    "",
    ".",
    "x.",
    "x.y.",
    ".x",
    "x..y",
    "x y",
    "x/y",
    "../x",
    "größe",
    "🦀",
    "x\n",
    "\nx",
    'x"',
    "x\\",
    "\0",
    "\ud800",
]


@pytest.mark.parametrize("name", [*ODD_NAMES, "x:", 'x":{"y', "x" * 257, "__metadata__"])
def test_a_name_that_could_not_be_read_back_is_refused(tmp_path: Path, name: str) -> None:
    refused(tmp_path, {name: np.zeros(1)}, {}, "its name must be letters, digits, _ and -, in parts joined by single dots")


@pytest.mark.parametrize("key", ["digests", "header_digest"])
def test_metadata_under_the_names_of_the_digests_is_refused(tmp_path: Path, key: str) -> None:
    refused(tmp_path, {"x": np.zeros(1)}, {key: "mine"}, f"metadata '{key}': this key is written here")


@pytest.mark.parametrize("value", [3, None, b"bytes", {"a": "b"}, 1.5])
def test_metadata_that_is_no_string_is_refused(tmp_path: Path, value: Any) -> None:
    refused(tmp_path, {"x": np.zeros(1)}, {"key": value}, "metadata 'key': not a string")


@pytest.mark.parametrize("words", [{"key": "\ud800"}, {"\udfff": ""}, {"key": "a\udd80\ud83e"}, {"key": "\ud83e\udd80"}])
def test_half_a_surrogate_pair_which_no_other_reader_takes_is_refused(tmp_path: Path, words: dict[str, str]) -> None:
    refused(tmp_path, {"x": np.zeros(1)}, words, "metadata ")


def test_more_tensors_than_one_file_may_hold_are_refused(tmp_path: Path) -> None:
    many = {f"t{number}": np.zeros(0, np.uint8) for number in range(headers.MAX_TENSORS + 1)}
    refused(tmp_path, many, {}, r"20001 tensors are too many for one file \(at most 20000\)")


# --- what is no file --------------------------------------------------------------------------------------------------


def test_a_missing_file_and_a_directory_are_checkpoint_errors(tmp_path: Path) -> None:
    for path in (tmp_path / "absent", tmp_path, tmp_path / "x" / "y", tmp_path / ("n" * 300)):
        for read in READERS:
            with pytest.raises(CheckpointError, match="cannot be read") as caught:
                read(path)
            assert type(caught.value) is CheckpointError


def test_paths_may_be_strings(tmp_path: Path) -> None:
    format.save(str(tmp_path / "x"), SMALL, {"a": "b"})
    assert format.load(str(tmp_path / "x")).metadata == {"a": "b"} == format.verify(str(tmp_path / "x")).metadata


def test_more_strings_of_metadata_than_are_read_are_not_written(tmp_path: Path) -> None:
    most = {f"key {number:04}": "" for number in range(headers.MAX_STRINGS)}
    format.save(tmp_path / "most", {}, most)
    assert format.load(tmp_path / "most").metadata == most
    with pytest.raises(CheckpointError, match="strings of metadata are too many"):
        format.save(tmp_path / "more", {}, {**most, "one more": ""})
    assert not (tmp_path / "more").exists()
