"""`oxidizr-ref diff`: equal means equal in every bit, and of what differs it says where and by how much, exactly."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from oxidizr_ref.checkpoint import difference, format
from oxidizr_ref.checkpoint.difference import Distance, distance, ulp_distance
from oxidizr_ref.errors import CheckpointError

Array = np.ndarray[Any, Any]

FLOATS = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16]
INTEGERS = [np.int64, np.uint32, np.uint8]


pytestmark = pytest.mark.usefixtures("plain_terminal_of_80_columns")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[tiny.Run, tiny.Run]:
    """Two runs of two steps, the second with another learning rate. Tests only read them."""
    run = tiny.make_run(tmp_path_factory.mktemp("runs"), trainer={"max_steps": 2, "save_interval": 1})
    other = run.into("other")
    assert run.train() == 0 and other.train("--set", "learning_rate=0.02") == 0
    return run, other


def compared(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str]:
    """Exit code and output of ``diff``; nothing goes to stderr, and no line is wider than the terminal."""
    capsys.readouterr()
    code = tiny.cli("diff", *argv)
    out, err = capsys.readouterr()
    assert err == ""
    assert "--json" in argv or max(map(len, out.splitlines())) <= 80
    return code, out


def found(capsys: pytest.CaptureFixture[str], *argv: object) -> dict[str, Any]:
    """The one JSON object of ``diff --json``, which agrees with the exit code."""
    code, out = compared(capsys, *argv, "--json")
    parsed: dict[str, Any] = json.loads(out, parse_constant=pytest.fail)
    assert out == json.dumps(parsed, sort_keys=True, separators=(",", ":")) + "\n"
    assert code == (0 if parsed["equal"] else 1)
    return parsed


def files(tmp_path: Path, a: dict[str, Array], b: dict[str, Array]) -> tuple[Path, Path]:
    for name, arrays in (("a", a), ("b", b)):
        format.save(tmp_path / name, arrays, {})
    return tmp_path / "a", tmp_path / "b"


def bits(dtype: Any, *values: int) -> Array:
    """Numbers of these bits."""
    return np.array(values, dtype=f"u{np.dtype(dtype).itemsize}").view(dtype)


# ------------------------------------------------------------------------------------------------------- equal, or where


def test_equal_files_are_called_equal_with_what_was_compared(
    runs: tuple[tiny.Run, tiny.Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = runs
    backup = shutil.copy(run.path(2), tmp_path / "backup")
    elements = sum(array.size for array in format.load(backup).tensors.values())
    code, out = compared(capsys, run.directory, backup)
    assert code == 0 and f"equal: 36 tensors with {elements:,} numbers, and all metadata" in out
    code, out = compared(capsys, run.directory, backup, "--weights-only")
    assert code == 0 and "equal: 12 tensors with " in out and "optimizer state and metadata not compared" in out
    assert found(capsys, run.path(2), backup) == {
        "a": str(run.path(2)),
        "b": str(backup),
        "equal": True,
        "weights_only": False,
        "compared": 36,
        "elements": elements,
        "metadata": [],
        "only_a": [],
        "only_b": [],
        "kinds": [],
        "tensors": [],
        "first": None,
    }


def test_another_config_is_told_by_its_key_and_every_tensor_by_its_distance(
    runs: tuple[tiny.Run, tiny.Run], capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = runs[0].path(1), runs[1].path(1)
    result = found(capsys, a, b)
    assert result["metadata"] == [{"key": "config.trainer.learning_rate", "a": 0.01, "b": 0.02}]
    arrays_a, arrays_b = format.load(a).tensors, format.load(b).tensors
    differing = sorted(name for name in arrays_a if arrays_a[name].tobytes() != arrays_b[name].tobytes())
    assert [tensor["name"] for tensor in result["tensors"]] == differing
    assert 0 < len(differing) < len(arrays_a)  # the first gradients are the same, so their averages are
    assert result["first"] == next(entry.name for entry in format.read_header(a).entries if entry.name in differing)
    for tensor in result["tensors"]:
        x, y = (arrays[tensor["name"]].astype(np.float64) for arrays in (arrays_a, arrays_b))
        assert tensor["max_abs"] == np.abs(x - y).max()
        assert tensor["differing"] == np.count_nonzero(x != y)
    code, out = compared(capsys, a, b)
    assert code == 1 and "different: 1 key of the metadata, numbers in " in out
    assert "config.trainer.learning_rate 0.01 -> 0.02\n" in out
    assert f"first tensor that differs, in file order: {result['first']} at [" in out
    assert out.count(" *\n") == 1
    (marked,) = [line for line in out.splitlines() if line.endswith(" *")]
    largest = max(result["tensors"], key=lambda tensor: tensor["max_ulp"])
    assert marked.split()[0] in largest["name"]


def test_progress_is_told_and_weights_only_leaves_it_out(
    runs: tuple[tiny.Run, tiny.Run], capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = runs[0].path(1), runs[0].path(2)
    keys = {change["key"]: (change["a"], change["b"]) for change in found(capsys, a, b)["metadata"]}
    assert keys == {"progress.cursor": (4, 8), "progress.step": (1, 2), "progress.tokens_seen": (32, 64)}
    result = found(capsys, a, b, "--weights-only")
    assert result["metadata"] == [] and result["compared"] == 12 and not result["equal"]
    assert not any(tensor["name"].startswith("optimizer.") for tensor in result["tensors"])


def test_with_other_optimizer_state_alone_the_weights_are_equal(
    runs: tuple[tiny.Run, tiny.Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, name = runs[0].path(2), "optimizer.exp_avg.norm.weight"

    def nudge(tensors: dict[str, Array], _: object) -> None:
        tensors[name][3] = np.nextafter(tensors[name][3], np.float32(np.inf))

    other = tiny.rewrite(path, nudge, to=tmp_path / "nudged")
    assert found(capsys, path, other, "--weights-only")["equal"]
    (tensor,) = found(capsys, path, other)["tensors"]
    assert (tensor["name"], tensor["differing"], tensor["max_ulp"], tensor["first_index"]) == (name, 1, 1, [3])
    assert f"in file order: {name} at [3]" in compared(capsys, path, other)[1].replace("\n", "")


def test_metadata_alone_can_differ(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = [
        {
            "config": '{"a":{"b":1},"c":null}',
            "lineage": "[]",
            "numerics_version": "1",
            "data": '{"digest":"' + "0" * 64 + '"}',
        },
        {"config": '{"a":{"b":2}}', "lineage": '[{"step":1}]', "note": "x", "data": '{"digest":"' + "1" * 64 + '"}'},
    ]
    for name, metadata in zip("ab", texts, strict=True):
        format.save(tmp_path / name, {"x": np.ones(3)}, metadata)
    result = found(capsys, tmp_path / "a", tmp_path / "b")
    assert result["metadata"] == [
        {"key": "config.a.b", "a": 1, "b": 2},
        {"key": "data.digest", "a": "0" * 64, "b": "1" * 64},
        {"key": "lineage", "a": [], "b": [{"step": 1}]},
        {"key": "note", "a": None, "b": "x"},
        {"key": "numerics_version", "a": "1", "b": None},
    ]
    assert result["first"] is None
    out = compared(capsys, tmp_path / "a", tmp_path / "b")[1]
    assert "no tensor differs (1 tensor with 3 numbers)" in out
    assert "data.digest 000000000000... -> 111111111111...\n" in out and "note none -> x\n" in out


@pytest.mark.parametrize("text", ['{"a": 1}', '{"a": 1, "b": null}', '{"a": 1, "c": {}}'])
def test_metadata_written_in_another_way_are_not_equal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    for name, config in (("a", '{"a":1}'), ("b", text)):
        format.save(tmp_path / name, {}, {"config": config})
    assert [change["key"] for change in found(capsys, tmp_path / "a", tmp_path / "b")["metadata"]] == ["config"]
    assert f"-> {text}\n" in compared(capsys, tmp_path / "a", tmp_path / "b")[1]


def test_tensors_of_one_file_alone_and_of_another_kind_are_told_and_the_first_is_that_of_the_file_order(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = np.ones(3, dtype=np.float16)
    a = {"a": common, "here": common, "shape": np.ones((2, 3)), "dtype": np.ones(2, dtype=np.float32)}
    b = {"a": common, "there": np.ones(3, dtype=np.float64), "shape": np.ones((3, 2)), "dtype": np.ones(2)}
    result = found(capsys, *files(tmp_path, a, b))
    assert (result["only_a"], result["only_b"], result["compared"]) == (["here"], ["there"], 1)
    assert result["kinds"] == [
        {"name": "dtype", "a": "F32 [2]", "b": "F64 [2]"},
        {"name": "shape", "a": "F64 [2, 3]", "b": "F64 [3, 2]"},
    ]
    assert result["first"] == "shape"  # of 8 bytes a number, as `there`
    out = compared(capsys, tmp_path / "a", tmp_path / "b")[1]
    for line in ("dtype F32 [2] -> F64 [2]", "shape F64 [2, 3] -> F64 [3, 2]", "only in A: here", "only in B: there"):
        assert f"\n{line}\n" in out
    assert "different: 1 tensor only in A, 1 tensor only in B, dtype or shape of 2 tensors" in out


def test_long_names_are_folded_and_nothing_of_them_is_lost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    realistic = "optimizer.exp_avg_sq.layers.10.moe.experts.3.gate_proj.weight"
    names = [realistic, "k" * 200]
    a = {name: np.zeros(9_999, dtype=np.float32) for name in names}
    b = {name: np.full(9_999, -1.23e-10, dtype=np.float32) for name in names}
    out = compared(capsys, *files(tmp_path, a, b))[1]
    assert out.count("k") == 200 + 200  # as the first one that differs, and in the table
    assert "\noptimizer.exp_avg_sq " in out
    assert "\n.layers.10.moe.experts.3.gate_proj.weight 9,999 1.23e-10" in "\n".join(
        " ".join(x.split()) for x in out.split("\n")
    )


def test_damage_is_an_error_and_no_difference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = files(tmp_path, {"x": np.ones(5)}, {"x": np.ones(5)})
    raw = bytearray(b.read_bytes())
    raw[-1] ^= 1
    b.write_bytes(raw)
    for pair in ((a, b), (b, a)):
        assert tiny.cli("diff", *pair) == 1
        out, err = capsys.readouterr()
        assert out == "" and err.startswith(f"error: {b}: damaged at or after byte") and "tensor x, " in err


def test_a_file_that_is_replaced_between_proof_and_comparison_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = files(tmp_path, {"x": np.ones(5)}, {"x": np.zeros(5)})
    mapped = format.mapped
    monkeypatch.setattr(format, "mapped", lambda path: mapped(a))
    with pytest.raises(CheckpointError, match="became another file"):
        difference.compare(a, b)


# --------------------------------------------------------------------------------------------------- ulps: the whole line


def next_above(values: Array) -> Array:
    with np.errstate(all="ignore"):  # the next above the largest is infinite
        return np.nextafter(values, np.array(np.inf, dtype=values.dtype))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_every_number_of_16_bits_is_one_step_from_the_next_above(dtype: Any) -> None:
    every = np.arange(1 << 16, dtype=np.uint16).view(dtype)
    with np.errstate(all="ignore"):
        values = every[every.astype(np.float64) < np.inf]
        minus_zero = np.signbit(values.astype(np.float64)) & (values.astype(np.float64) == 0)
        steps = ulp_distance(values, next_above(values).astype(dtype))
    assert minus_zero.sum() == 1
    assert (steps == np.where(minus_zero, 2, 1)).all()  # from -0 nextafter leaps over +0


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_distances_of_16_bit_numbers_are_differences_of_ranks(dtype: Any) -> None:
    every = np.arange(1 << 16, dtype=np.uint16).view(dtype)
    values = every[~np.isnan(every.astype(np.float32))]
    floats = values.astype(np.float64)
    order = np.lexsort((~np.signbit(floats), floats))  # by value, -0 before +0
    ranks = np.empty(len(order), dtype=np.int64)
    ranks[order] = np.arange(len(order))
    other = np.random.default_rng(0).permutation(len(values))
    assert (ulp_distance(values, values[other]) == np.abs(ranks - ranks[other])).all()


@st.composite
def steps_above(draw: st.DrawFn) -> tuple[Array, Array, int]:
    """A number, the one that so many calls of nextafter lead to, and how many steps that is."""
    dtype = np.dtype(draw(st.sampled_from([np.float32, np.float64])))
    start = np.array([draw(st.floats(width=8 * dtype.itemsize, allow_nan=False, allow_infinity=True))], dtype=dtype)
    count, at, leapt = draw(st.integers(0, 40)), start, 0
    for done in range(count):
        if at == np.inf:
            return start, at, done + leapt
        if at == 0 and np.signbit(at):
            leapt = 1  # +0, which nextafter leaves out
        at = next_above(at)
    return start, at, count + leapt


@given(steps_above())
def test_the_distance_is_the_number_of_steps_of_nextafter_and_symmetric(way: tuple[Array, Array, int]) -> None:
    a, b, steps = way
    assert ulp_distance(a, b).item() == steps == ulp_distance(b, a).item()


@given(st.floats(0, 2**-1060), st.floats(0, 2**-1060))
def test_distances_across_zero_count_both_zeros(x: float, y: float) -> None:
    denormal = 2.0**-1074
    assert ulp_distance(np.array([-x]), np.array([y])).item() == round(x / denormal) + round(y / denormal) + 1


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_longest_way_is_exact(dtype: Any) -> None:
    infinity = np.array([np.inf], dtype=dtype)
    expected = 2 * int(infinity.view(f"u{infinity.itemsize}")[0]) + 1
    assert ulp_distance(infinity, -infinity).item() == expected == ulp_distance(-infinity, infinity).item()
    assert distance(infinity, -infinity) == Distance(1, 0, math.inf, math.inf, expected)


# -------------------------------------------------------------------------------------------------------------- distances


@st.composite
def arrays(draw: st.DrawFn, dtypes: Any = (*FLOATS, *INTEGERS)) -> Array:
    """An array of any bits: NaNs with payloads, infinities, both zeros."""
    dtype = np.dtype(draw(st.sampled_from(dtypes)))
    shape = draw(npst.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5))
    size = math.prod(shape) * dtype.itemsize
    return np.frombuffer(draw(st.binary(min_size=size, max_size=size)), dtype=dtype).reshape(shape)


@given(arrays())
def test_every_array_is_equal_to_itself_whatever_its_bits(array: Array) -> None:
    assert distance(array, array.copy()) == Distance()


@given(st.dictionaries(st.sampled_from("abc"), arrays(), max_size=3))
def test_every_file_is_equal_to_its_copy(tmp_path_factory: pytest.TempPathFactory, saved: dict[str, Array]) -> None:
    base = tmp_path_factory.getbasetemp()
    a, b = files(base, saved, saved)
    result = difference.compare(a, b)
    assert result.equal and result.compared == len(saved)


def slowly(a: Array, b: Array) -> Distance:
    """`distance` of two float arrays, a number at a time, in Python."""
    tiny_number = float(ml_dtypes.finfo(a.dtype).smallest_normal)
    unsigned = f"u{a.itemsize}"
    pairs = zip(a.ravel(), b.ravel(), strict=True)
    differing = [
        (index, x, y) for index, (x, y) in enumerate(pairs) if np.asarray(x).view(unsigned) != np.asarray(y).view(unsigned)
    ]
    numbers = [(float(x), float(y)) for _, x, y in differing if float(x) == float(x) and float(y) == float(y)]
    absolute = [abs(x - y) for x, y in numbers]
    relative = [
        math.inf if math.isinf(apart) else apart / max(abs(y), tiny_number)
        for apart, (_, y) in zip(absolute, numbers, strict=True)
    ]

    def place(x: Any) -> int:
        raw, top = int(np.asarray(x).view(unsigned)), 1 << (8 * a.itemsize - 1)
        return raw if raw < top else top - 1 - raw

    ulps = [abs(place(x) - place(y)) for _, x, y in differing if float(x) == float(x) and float(y) == float(y)]
    return Distance(
        len(differing),
        differing[0][0] if differing else None,
        max(absolute, default=0),
        max(relative, default=None),
        max(ulps, default=None),
        len(differing) - len(numbers),
    )


@given(st.data())
def test_distances_are_those_of_plain_python(data: st.DataObject) -> None:
    a = data.draw(arrays(FLOATS))
    b = a.copy().reshape(-1)
    for index in data.draw(st.lists(st.integers(0, max(0, b.size - 1)), max_size=6)) if b.size else []:
        raw = data.draw(st.binary(min_size=b.itemsize, max_size=b.itemsize))
        b[index] = np.frombuffer(raw, dtype=b.dtype)[0]
    with np.errstate(all="ignore"):
        assert distance(a, b.reshape(a.shape)) == slowly(a, b.reshape(a.shape))


def test_where_nothing_but_nans_differs_their_number_is_all_there_is_to_tell() -> None:
    assert distance(np.array([1.0, np.nan, 3.0]), np.array([1.0, 2.0, np.nan])) == Distance(2, 1, nans=2)


def test_both_zeros_differ_by_a_step_and_by_nothing_else() -> None:
    assert distance(np.array([0.0, -0.0]), np.array([0.0, 0.0])) == Distance(1, 1, 0.0, 0.0, 1)


def test_a_nan_is_equal_to_its_own_bits_only_and_then_no_distance_is_a_number(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = bits(np.float32, 0x7FC00000, 0x7FC00000, 0x7F800001, 0x3F800000)
    b = bits(np.float32, 0x7FC00000, 0x7FC00001, 0x3F800000, 0x3F800002)
    apart = distance(a, b)
    assert (apart.differing, apart.first, apart.nans, apart.largest_ulp, apart.max_ulp) == (3, 1, 2, 2, None)
    assert (apart.largest_abs, apart.largest_rel) == (2.0**-22, 2.0**-22 / (1 + 2.0**-22))
    assert math.isnan(apart.max_abs) and apart.max_rel is not None and math.isnan(apart.max_rel)
    (tensor,) = found(capsys, *files(tmp_path, {"x": a}, {"x": b}))["tensors"]
    assert [tensor[key] for key in ("max_abs", "max_rel", "max_ulp", "nans", "differing")] == [None, None, None, 2, 3]
    row = compared(capsys, tmp_path / "a", tmp_path / "b")[1].splitlines()[-2]
    assert row.split() == ["x", "3", "nan", "nan", "nan"]


def test_an_infinity_is_infinitely_far_and_some_steps_away(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    largest = np.finfo(np.float32).max
    a, b = np.array([np.inf, np.inf], dtype=np.float32), np.array([np.inf, largest], dtype=np.float32)
    assert distance(a, b) == distance(b, a) == Distance(1, 1, math.inf, math.inf, 1)
    (tensor,) = found(capsys, *files(tmp_path, {"x": a}, {"x": b}))["tensors"]
    assert (tensor["max_abs"], tensor["max_rel"], tensor["max_ulp"]) == (None, None, 1)
    assert compared(capsys, tmp_path / "a", tmp_path / "b")[1].splitlines()[-2].split()[2:] == ["inf", "inf", "1", "*"]


@pytest.mark.parametrize(
    ("dtype", "a", "b", "apart"),
    [
        (np.int64, [-(2**63), 5], [2**63 - 1, 5], 2**64 - 1),
        (np.int64, [-1, 5], [0, 7], 2),
        (np.uint32, [0, 1], [2**32 - 1, 1], 2**32 - 1),
        (np.uint8, [3, 250], [3, 2], 248),
    ],
)
def test_integers_are_apart_exactly_and_have_no_ulps(dtype: Any, a: list[int], b: list[int], apart: int) -> None:
    result = distance(np.array(a, dtype=dtype), np.array(b, dtype=dtype))
    assert (result.max_abs, type(result.max_abs), result.max_rel, result.max_ulp) == (apart, int, None, None)


def test_pieces_and_threads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    source = np.random.default_rng(0)
    a = source.standard_normal((50, 70)).astype(np.float32)
    b = np.where(source.random((50, 70)) < 0.01, a * np.float32(1.001), a)
    whole = distance(a, b)
    assert 0 < whole.differing < 100
    monkeypatch.setattr(difference, "PIECE", 100)
    for count in (1, 2, 5):
        with tiny.threads(count):
            assert distance(a, b) == whole


def test_long_values_are_only_said_to_differ(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, features in (("a", "AVX " * 50), ("b", "AVX " * 50 + "AVX2")):
        format.save(tmp_path / name, {}, {"fingerprint": json.dumps({"cpu_features": features})})
    assert "fingerprint.cpu_features differs (--json shows how)\n" in compared(capsys, tmp_path / "a", tmp_path / "b")[1]
