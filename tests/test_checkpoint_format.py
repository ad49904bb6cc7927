"""The bytes of a checkpoint: deterministic, readable by the stock package, and every single bit of them guarded."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import tiny
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from oxidizr_ref.checkpoint import format
from oxidizr_ref.errors import CheckpointError

DTYPES = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16, np.int64, np.uint32, np.uint8]
SMALL = {"b": np.arange(3, dtype=np.float32), "a": np.array([7, -1], dtype=np.int64), "c": np.array(9, dtype=np.uint8)}


def shapes() -> st.SearchStrategy[tuple[int, ...]]:
    return npst.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)


@st.composite
def arrays(draw: st.DrawFn) -> np.ndarray[Any, Any]:
    """An array of any storable dtype and shape, of any bits: NaNs, infinities and denormals as well."""
    dtype, shape = np.dtype(draw(st.sampled_from(DTYPES))), draw(shapes())
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    return np.frombuffer(draw(st.binary(min_size=size, max_size=size)), dtype=dtype).reshape(shape)


names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
    lambda name: name != "__metadata__"
)
tensors = st.dictionaries(names, arrays(), max_size=6)
strings = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
metadata = st.dictionaries(strings.filter(lambda key: key not in ("digests", "header_digest")), strings, max_size=4)


def header_of(path: Path) -> tuple[dict[str, Any], bytes, int]:
    """The header as JSON and as bytes (length prefix left out), and where the payload begins."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 : 8 + length], 8 + length


def signed(header: str, payload: bytes) -> bytes:
    """A file with this header text (whose header digest is 64 zeros) and a right header digest: only its sense is wrong."""
    text = header.encode()
    raw = len(text).to_bytes(8, "little") + text
    return raw.replace(b"0" * 64, hashlib.sha256(raw).hexdigest().encode(), 1) + payload


def small_file(tmp_path: Path) -> Path:
    path = tmp_path / "small.safetensors"
    format.save(path, SMALL, {"progress": '{"step":1}'})
    return path


# ---------------------------------------------------------------------------------------------------------- round trip


@given(tensors, metadata)
def test_what_is_saved_is_loaded_bit_for_bit(tmp_path_factory: pytest.TempPathFactory, saved: Any, words: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "round_trip.safetensors"
    format.save(path, saved, words)
    loaded = format.load(path)
    assert loaded.metadata == words == format.read_metadata(path)
    assert loaded.tensors.keys() == saved.keys()
    for name, array in saved.items():
        found = loaded.tensors[name]
        assert (found.dtype, found.shape, found.tobytes()) == (array.dtype, array.shape, array.tobytes())
        assert found.flags.owndata and found.flags.c_contiguous and found.flags.aligned and found.flags.writeable


@given(tensors, metadata, st.randoms())
def test_bytes_do_not_depend_on_the_order_of_the_dictionaries(
    tmp_path_factory: pytest.TempPathFactory, saved: Any, words: Any, source: Any
) -> None:
    shuffled = list(saved.items()), list(words.items())
    for items in shuffled:
        source.shuffle(items)
    paths = [tmp_path_factory.getbasetemp() / name for name in ("order_a", "order_b")]
    format.save(paths[0], saved, words)
    format.save(paths[1], dict(shuffled[0]), dict(shuffled[1]))
    assert paths[0].read_bytes() == paths[1].read_bytes()


@given(tensors, metadata)
def test_the_stock_package_reads_equal_values(tmp_path_factory: pytest.TempPathFactory, saved: Any, words: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "stock.safetensors"
    format.save(path, saved, words)
    loaded = safetensors.numpy.load_file(path)
    assert loaded.keys() == saved.keys()
    for name, array in saved.items():
        assert (loaded[name].dtype, loaded[name].shape) == (array.dtype, array.shape)
        assert loaded[name].tobytes() == array.tobytes()
    with safetensors.safe_open(path, framework="numpy") as file:
        stock = file.metadata()
    assert {key: stock[key] for key in words} == words


@given(tensors)
def test_every_tensor_is_aligned_in_the_file_and_the_order_is_item_size_then_name(
    tmp_path_factory: pytest.TempPathFactory, saved: Any
) -> None:
    path = tmp_path_factory.getbasetemp() / "aligned.safetensors"
    format.save(path, saved, {})
    header, _, payload = header_of(path)
    del header["__metadata__"]
    assert payload % 64 == 0
    for name, entry in header.items():
        assert (payload + entry["data_offsets"][0]) % saved[name].dtype.itemsize == 0
    expected = sorted(saved, key=lambda name: (-saved[name].dtype.itemsize, name))
    end = 0
    for name in expected:
        assert header[name]["data_offsets"] == [end, end + saved[name].nbytes]
        end += saved[name].nbytes
    assert path.stat().st_size == payload + end


def test_the_header_is_canonical_json_with_digests_of_the_tensors_and_of_itself(tmp_path: Path) -> None:
    path = small_file(tmp_path)
    header, raw, _ = header_of(path)
    assert raw.decode() == json.dumps(header, sort_keys=True, separators=(",", ":")).ljust(len(raw))
    own = header["__metadata__"]["header_digest"]
    zeroed = len(raw).to_bytes(8, "little") + raw.replace(own.encode(), b"0" * 64)
    assert hashlib.sha256(zeroed).hexdigest() == own
    digests = {name: hashlib.sha256(hashlib.sha256(array.tobytes()).digest()).hexdigest() for name, array in SMALL.items()}
    assert json.loads(header["__metadata__"]["digests"]) == digests


def test_a_tensor_s_digest_is_sha256_over_the_sha256s_of_its_4_mib_chunks(tmp_path: Path) -> None:
    array = np.arange((2 * format.CHUNK_BYTES + 40) // 8, dtype=np.int64)
    path = tmp_path / "chunks.safetensors"
    for count in (1, 3):
        with tiny.threads(count):
            format.save(path, {"x": array}, {})
        raw = array.tobytes()
        chunks = [hashlib.sha256(raw[i : i + 4 * 2**20]).digest() for i in range(0, len(raw), 4 * 2**20)]
        assert len(chunks) == 3
        stored = json.loads(header_of(path)[0]["__metadata__"]["digests"])
        assert stored == {"x": hashlib.sha256(b"".join(chunks)).hexdigest()}
        format.verify(path)


# -------------------------------------------------------------------------------------------------------------- damage


def test_any_flipped_bit_is_found(tmp_path: Path) -> None:
    path = small_file(tmp_path)
    whole = path.read_bytes()
    assert len(whole) < 2000
    damaged = bytearray(whole)
    missed = []
    with open(path, "r+b", buffering=0) as file:
        for position in range(len(whole)):
            for bit in range(8):
                damaged[position] ^= 1 << bit
                file.seek(position)
                file.write(damaged[position : position + 1])
                try:
                    format.load(path)
                    missed.append((position, bit))
                except CheckpointError as error:
                    assert "\n" not in str(error) and str(path) in str(error)
                damaged[position] = whole[position]
            file.seek(position)
            file.write(whole[position : position + 1])
    assert missed == []
    format.verify(path)


def test_a_file_cut_at_any_length_is_found(tmp_path: Path) -> None:
    path = small_file(tmp_path)
    for length in range(path.stat().st_size - 1, -1, -1):
        os.truncate(path, length)
        with pytest.raises(CheckpointError, match=r"small\.safetensors"):
            format.load(path)
        with pytest.raises(CheckpointError):
            format.read_metadata(path)


@pytest.mark.parametrize("more", [b"\0", b" " * 64, bytes(4096)])
def test_trailing_bytes_are_found(tmp_path: Path, more: bytes) -> None:
    path = small_file(tmp_path)
    path.write_bytes(path.read_bytes() + more)
    with pytest.raises(CheckpointError, match="payload"):
        format.load(path)


def test_a_file_that_shrinks_while_it_is_read_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "large.safetensors"
    format.save(path, {"x": np.zeros(1 << 20, np.uint8)}, {})
    read = format._read_tensor

    def cut_first(*arguments: Any) -> Any:
        os.truncate(path, path.stat().st_size - 1)
        return read(*arguments)

    monkeypatch.setattr(format, "_read_tensor", cut_first)
    with pytest.raises(CheckpointError, match="ended while tensor x was read"):
        format.load(path)


DIGESTS = json.dumps({"x": hashlib.sha256(hashlib.sha256(bytes(4)).digest()).hexdigest()})


def entry(**changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], **changes}


def header_text(**entries: Any) -> str:
    words = {"digests": DIGESTS, "header_digest": "0" * 64}
    return json.dumps({"__metadata__": words, **entries}, separators=(",", ":"))


def test_the_crafted_headers_below_are_wrong_in_one_thing_only(tmp_path: Path) -> None:
    path = tmp_path / "right.safetensors"
    path.write_bytes(signed(header_text(x=entry()), bytes(4)))
    assert format.load(path).tensors["x"].tolist() == [0.0]


@pytest.mark.parametrize(
    "header",
    [
        pytest.param(header_text(x=entry(shape=[2])), id="the shape needs more bytes"),
        pytest.param(header_text(x=entry(shape=[-1])), id="a negative length"),
        pytest.param(header_text(x=entry(shape=[True])), id="a boolean length"),
        pytest.param(header_text(x=entry(shape=[1.0])), id="a length that is no integer"),
        pytest.param(header_text(x=entry(shape="1")), id="a shape that is text"),
        pytest.param(header_text(x=entry(shape=None)), id="no shape"),
        pytest.param(header_text(x=entry(dtype="F8_E4M3", shape=[4])), id="a dtype that is never written"),
        pytest.param(header_text(x=entry(dtype=["F32"])), id="a dtype that is a list"),
        pytest.param(header_text(x=entry(data_offsets=[0])), id="one offset"),
        pytest.param(header_text(x=entry(data_offsets=[4, 8])), id="a hole"),
        pytest.param(header_text(x=entry(data_offsets=[-4, 0])), id="a negative offset"),
        pytest.param(header_text(x=entry(extra=1)), id="an unknown field"),
        pytest.param(header_text(x=[1]), id="an entry that is a list"),
        pytest.param(header_text(x=None), id="an entry that is null"),
        pytest.param(header_text(x=entry(), y=entry()), id="overlapping tensors"),
        pytest.param(header_text(y=entry()), id="digests of other tensors"),
        pytest.param(header_text(), id="no tensors"),
        pytest.param(header_text(x=entry(), y=entry(shape=[2**63, 0], data_offsets=[4, 4])), id="an absurd empty shape"),
        pytest.param(header_text(x=entry(shape=[1] * 100)), id="more axes than NumPy has"),
        pytest.param(header_text(x=entry()).replace('"x":', '"x":null,"x":'), id="a tensor named twice"),
        pytest.param(header_text(x=entry()).replace('"dtype"', '"dtype":"F64","dtype"'), id="a field given twice"),
        pytest.param(header_text(x=entry()).replace('"digests"', '"digests":"{}","digests"'), id="metadata given twice"),
        pytest.param(header_text(x=entry()).replace(json.dumps(DIGESTS), '"{"'), id="digests that are not JSON"),
        pytest.param(header_text(x=entry()).replace(json.dumps(DIGESTS), '"[]"'), id="digests that are a list"),
        pytest.param(header_text(x=entry()).replace(json.dumps(DIGESTS), '{"x":""}'), id="metadata that is no string"),
        pytest.param(header_text(x=entry()) + "x", id="more than JSON"),
        pytest.param("[" * 100_000, id="deep nesting"),
        pytest.param("[]", id="a list"),
        pytest.param("{}", id="an empty header"),
        pytest.param("", id="no header"),
    ],
)
def test_a_header_that_makes_no_sense_is_refused_even_with_right_digests(tmp_path: Path, header: str) -> None:
    path = tmp_path / "crafted.safetensors"
    path.write_bytes(signed(header, bytes(4)))
    with pytest.raises(CheckpointError, match=r"crafted\.safetensors"):
        format.load(path)


@pytest.mark.parametrize("content", [b"", b"\0" * 8, b"\xff" * 8, b"\0" * 4096, b"{}", b"\x02\0\0\0\0\0\0\0\xff\xfe"])
def test_what_is_no_safetensors_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "other"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="other"):
        format.load(path)


def test_a_plain_safetensors_file_is_told_from_a_damaged_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file({"x": np.zeros(3, np.float32)}, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="not a checkpoint of oxidizr_ref"):
        format.load(path)
    safetensors.numpy.save_file({"x": np.zeros(3, np.float32)}, path)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        format.load(path)


def test_a_missing_file_and_a_directory_are_checkpoint_errors(tmp_path: Path) -> None:
    for path in (tmp_path / "absent", tmp_path):
        for read in (format.load, format.verify, format.read_metadata):
            with pytest.raises(CheckpointError, match="cannot be read"):
                read(path)


# ------------------------------------------------------------------------------------------------------------- refusal


@pytest.mark.parametrize(
    "view",
    [lambda x: x.T, lambda x: x[:, ::2], lambda x: x[::-1], np.asfortranarray],
    ids=["transposed", "strided", "reversed", "Fortran"],
)
def test_an_array_that_does_not_lie_in_c_order_is_refused_and_nothing_is_written(
    tmp_path: Path, view: Callable[[Any], Any]
) -> None:
    with pytest.raises(CheckpointError, match=r"tensor x: .*C order"):
        format.save(tmp_path / "x", {"x": view(np.arange(12, dtype=np.float32).reshape(3, 4))}, {})
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [">f4", "c8", "i4", "u2", "?", "O", "U3", "M8[s]", "i8,f8", ml_dtypes.float8_e4m3fn])
def test_a_dtype_that_not_every_reader_has_is_refused_and_nothing_is_written(tmp_path: Path, dtype: Any) -> None:
    with pytest.raises(CheckpointError, match=r"tensor x: dtype .* cannot be stored"):
        format.save(tmp_path / "x", {"x": np.zeros(2, dtype=dtype)}, {})
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("saved", "words"),
    [
        pytest.param({"__metadata__": np.zeros(1)}, {}, id="a tensor named as the metadata"),
        pytest.param({"x": np.zeros(1)}, {"digests": "mine"}, id="metadata named as the digests"),
        pytest.param({"x": np.zeros(1)}, {"header_digest": "mine"}, id="metadata named as the header's digest"),
        pytest.param({"x": np.zeros(1)}, {"step": 3}, id="metadata that is no string"),
    ],
)
def test_what_could_not_be_read_back_is_refused_and_nothing_is_written(tmp_path: Path, saved: Any, words: Any) -> None:
    with pytest.raises(CheckpointError):
        format.save(tmp_path / "x", saved, words)
    assert not any(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------------- writing


def test_a_full_disk_leaves_no_temporary_file_and_the_older_file_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = small_file(tmp_path)
    before = tiny.snapshot(tmp_path)
    calls = []

    def no_space(descriptor: int) -> None:
        calls.append(descriptor)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space left"):
        format.save(path, {"x": np.ones(3)}, {})
    assert len(calls) == 1, "a failed fsync is not tried again"
    assert tiny.snapshot(tmp_path) == before
    monkeypatch.undo()
    format.verify(path)
    format.save(path, {"x": np.ones(3)}, {})
    assert format.load(path).tensors["x"].tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("failing", ["replace", "write"])
def test_a_writer_that_fails_or_is_interrupted_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    path = small_file(tmp_path)
    before = tiny.snapshot(tmp_path)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(*((os, "replace") if failing == "replace" else (format, "_write_chunks")), interrupt)
    with pytest.raises(KeyboardInterrupt):
        format.save(path, {"x": np.ones(3)}, {})
    assert tiny.snapshot(tmp_path) == before


def test_file_and_directory_are_flushed_around_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(descriptor: int) -> None:
        events.append("directory" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    def noted_replace(*paths: Any) -> None:
        events.append("rename")
        replace(*paths)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    small_file(tmp_path)
    assert events == ["file", "rename", *([] if os.name == "nt" else ["directory"])]


def test_saving_never_writes_through_a_link(tmp_path: Path) -> None:
    backup = tmp_path / "backup"
    backup.write_text("precious")
    (tmp_path / "step_1.safetensors").symlink_to(backup)
    format.save(tmp_path / "step_1.safetensors", SMALL, {})
    assert backup.read_text() == "precious"
    format.verify(tmp_path / "step_1.safetensors")


def test_a_saved_file_is_readable_by_others_as_the_umask_says(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        mode = small_file(tmp_path).stat().st_mode & 0o777
    finally:
        os.umask(before)
    assert os.name == "nt" or mode == 0o644
