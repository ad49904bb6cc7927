"""`oxidizr-ref inspect`: what it says is in the file, it fits the screen, and nothing in the file commands the terminal."""

from __future__ import annotations

import json
import math
import os
import re
import tracemalloc
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from oxidizr_ref.checkpoint import contents, difference, format, header
from oxidizr_ref.checkpoint.store import CheckpointStore
from oxidizr_ref.cli import inspect as cli_inspect
from oxidizr_ref.cli import words
from oxidizr_ref.version import NUMERICS_VERSION

FLOATS = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16]
NOT_VERIFIED = "header proved whole; payload not verified, see `oxidizr-ref verify`"


pytestmark = pytest.mark.usefixtures("plain_terminal_of_80_columns")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tiny.Run:
    """Three steps of a tiny run, each saved, the last with another learning rate. Tests only read it."""
    run = tiny.make_run(tmp_path_factory.mktemp("finished"), trainer={"max_steps": 2, "save_interval": 1})
    assert run.train() == 0
    assert run.train("--resume", "auto", "--max-steps", 3, "--set", "learning_rate=0.5") == 0
    return run


def shown(capsys: pytest.CaptureFixture[str], *argv: object, code: int = 0) -> str:
    """What a command prints on stdout; nothing goes to stderr, and no line of a table is wider than the terminal."""
    capsys.readouterr()
    assert tiny.cli(*argv) == code
    out, err = capsys.readouterr()
    assert err == ""
    assert max(map(len, out.splitlines())) <= 80 or argv[0] == "verify"
    return out


def inspected(capsys: pytest.CaptureFixture[str], path: Path) -> dict[str, Any]:
    """The one JSON object of ``inspect --json``, which holds no NaN."""
    capsys.readouterr()
    assert tiny.cli("inspect", path, "--json") == 0
    out, err = capsys.readouterr()
    assert err == ""
    found: dict[str, Any] = json.loads(out, parse_constant=lambda text: pytest.fail(f"{text} is no JSON"))
    assert out == json.dumps(found, sort_keys=True, separators=(",", ":")) + "\n"
    return found


def refused(capsys: pytest.CaptureFixture[str], *argv: object, code: int) -> str:
    """The one line on stderr of a command that is refused."""
    capsys.readouterr()
    assert tiny.cli(*argv) == code
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    return err


# ---------------------------------------------------------------------------------------------------------- what it says


def test_progress_config_origin_and_totals_are_shown(finished: tiny.Run, capsys: pytest.CaptureFixture[str]) -> None:
    out = " ".join(shown(capsys, "inspect", finished.path(3)).split())
    size = finished.path(3).stat().st_size
    metadata = format.read_header(finished.path(3)).metadata
    for text in (
        f"{size:,} bytes, 36 tensors",
        f"format 1, numerics {NUMERICS_VERSION}",
        "step 3, epoch 0, cursor 12, tokens_seen 96,",
        "hidden_size 16,",
        "learning_rate 0.5,",
        f"digest {json.loads(metadata['data'])['digest'][:12]}..., tokens 3000",
        "name byte",
        "lineage step 2, config ",
        f"numpy {np.__version__},",
        "cpu_features: ",
        NOT_VERIFIED,
    ):
        assert text in out
    weights = sum(array.size for name, array in format.load(finished.path(3)).tensors.items() if "optimizer" not in name)
    for kind in ("weights", "optimizer.exp_avg", "optimizer.exp_avg_sq"):
        assert f"{kind} 12 {weights:,} F32" in out


def test_a_directory_means_its_newest_step_by_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (9, 10):
        format.save(tmp_path / f"step_{step}.safetensors", {}, {"progress": f'{{"step":{step}}}'})
    out = "".join(shown(capsys, "inspect", tmp_path).splitlines()[:4])
    assert "step_10.safetensors" in out.replace(" ", "") and "(neweststepfile)" in out.replace(" ", "")
    assert inspected(capsys, tmp_path)["metadata"]["progress"] == {"step": 10}


def test_the_json_holds_every_tensor_with_its_numbers(finished: tiny.Run, capsys: pytest.CaptureFixture[str]) -> None:
    path = finished.path(2)
    found, file = inspected(capsys, path), format.load(path)
    assert found.keys() == {"file", "bytes", "payload_verified", "metadata", "tensors", "totals"}
    assert (found["file"], found["bytes"], found["payload_verified"]) == (str(path), path.stat().st_size, False)
    assert found["metadata"].keys() == file.metadata.keys()
    assert found["metadata"]["config"] == json.loads(file.metadata["config"])
    assert found["metadata"]["format_version"] == file.metadata["format_version"] == "1"
    assert [tensor["name"] for tensor in found["tensors"]] == [entry.name for entry in format.read_header(path).entries]
    for tensor in found["tensors"]:
        array = file.tensors[tensor.pop("name")]
        assert math.isclose(tensor.pop("norm"), float(np.linalg.norm(array.astype(np.float64))), rel_tol=1e-13)
        assert tensor == {
            "dtype": "F32",
            "shape": list(array.shape),
            "elements": array.size,
            "bytes": array.nbytes,
            "min": float(array.min()),
            "max": float(array.max()),
            "not_finite": 0,
        }
    assert found["totals"].keys() == {"weights", "optimizer.exp_avg", "optimizer.exp_avg_sq"}
    assert sum(part["elements"] for part in found["totals"].values()) == sum(a.size for a in file.tensors.values())


def test_what_is_not_finite_is_null_counted_and_marked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = np.array([[1, np.nan, np.inf], [-np.inf, 2, 3]], dtype=ml_dtypes.bfloat16)
    signalling = np.array([0x7F800001, 0xFF800001], dtype=np.uint32).view(np.float32)
    format.save(tmp_path / "bad", {"layers.0.a": bad, "b": signalling, "good": np.ones(4, dtype=np.float16)}, {})
    found = inspected(capsys, tmp_path / "bad")
    numbers = {t["name"]: (t["norm"], t["min"], t["max"], t["not_finite"]) for t in found["tensors"]}
    assert numbers == {"layers.0.a": (None,) * 3 + (3,), "b": (None,) * 3 + (2,), "good": (2.0, 1.0, 1.0, 0)}
    assert found["totals"]["weights"]["norm"] is None and found["totals"]["weights"]["not_finite"] == 5
    out = shown(capsys, "inspect", tmp_path / "bad")
    assert ".a 2x3 BF16 12 B nan 3 not finite!" in " ".join(out.split())
    assert out.split()[-4:] == ["nan", "5", "not", "finite!"]


def test_a_sound_file_without_training_state_is_shown_with_its_metadata(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    format.save(
        tmp_path / "free", {"x": np.arange(6, dtype=np.int64)}, {"note": "for you", "config": "none", "lineage": "7"}
    )
    out = " ".join(shown(capsys, "inspect", tmp_path / "free").split())
    assert "this file holds no training state" in out
    assert "note for you" in out and "config none" in out and "lineage 7" in out
    assert inspected(capsys, tmp_path / "free")["metadata"] == {"note": "for you", "config": "none", "lineage": 7}
    format.save(tmp_path / "empty", {}, {})
    assert "0 tensors" in shown(capsys, "inspect", tmp_path / "empty")


def test_scalars_empty_tensors_integers_and_random_state_are_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    largest = np.array([2**63 - 1, -(2**63)], dtype=np.int64)  # as float64 both would be rounded
    arrays = {"one": np.array(2.5), "none": np.zeros((0, 3)), "rng.x": np.array([7], np.uint32), "integers": largest}
    format.save(tmp_path / "odd", arrays, {})
    found = inspected(capsys, tmp_path / "odd")
    numbers = {t["name"]: (t["elements"], t["norm"], t["min"], t["max"]) for t in found["tensors"]}
    assert numbers["one"] == (1, 2.5, 2.5, 2.5) and numbers["none"] == (0, 0.0, None, None)
    assert numbers["integers"] == (2, math.sqrt(2) * 2**63, -(2**63), 2**63 - 1)
    assert {kind: part["tensors"] for kind, part in found["totals"].items()} == {"weights": 3, "rng": 1}
    out = shown(capsys, "inspect", tmp_path / "odd")
    assert "scalar F64" in out and "0x3 F64" in out and "\n.x " in out


def test_inspecting_does_not_prove_the_payload_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "damaged"
    format.save(path, {"x": np.ones(5)}, {})
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    assert NOT_VERIFIED in shown(capsys, "inspect", path)
    raw[20] ^= 1
    path.write_bytes(raw)
    assert "damaged" in refused(capsys, "inspect", path, code=1)


# ------------------------------------------------------------------------------------------------------------ what fits

NAMES = [
    "embed_tokens.weight",
    "layers.2.post_attention_layernorm.weight",
    "layers.3.moe.experts.3.gate_proj.weight",
    "layers.3.moe.shared_expert.down_proj.weight",
    "layers.10.self_attn.q_proj.weight",
    "layers.10.mamba2.mixer.out_proj.weight",
]


def test_names_as_they_occur_are_shown_whole_beside_numbers_as_they_occur(capsys: pytest.CaptureFixture[str]) -> None:
    shape, dtype = (4096, 14336), np.dtype(np.float32)
    entries = tuple(header.Entry(name, dtype, shape, 0, 0) for name in NAMES)
    numbers = contents.Numbers(1, 4096 * 14336, 4 * 4096 * 14336, 0, -0.0812, 0.0797, 1.23e3)
    file = contents.Contents(Path("x"), header.Header(entries, {}, {}, 64), dict.fromkeys(NAMES, numbers))
    console = cli_inspect.console()
    console.print(cli_inspect._tree(file))
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert max(map(len, lines)) <= 80
    names = ["tensor", "embed_tokens.weight", "layers.2", ".post_attention_layernorm.weight"]
    names += ["layers.3", ".moe.experts.3.gate_proj.weight", ".moe.shared_expert.down_proj.weight"]
    names += ["layers.10", ".mamba2.mixer.out_proj.weight", ".self_attn.q_proj.weight"]  # after layer 3
    assert [line.split()[0] for line in lines] == names
    numbers_shown = "4096x14336 F32 235 MB 35.1 -0.081 .. 0.08"
    assert {" ".join(line.split()[1:]) for line in lines if "weight" in line} == {numbers_shown}


def test_longer_names_and_shapes_are_folded_and_nothing_of_them_is_lost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, shape = "layers.7." + "abc_" * 50, (1,) * 64
    format.save(tmp_path / "long", {name: np.ones(shape), "k" * 120: np.ones(3)}, {"key" * 40: "value " * 300})
    out = shown(capsys, "inspect", tmp_path / "long").partition(NOT_VERIFIED)[2]
    assert (out.count("_"), out.count("k"), out.count("x")) == (50, 120, 63 + 1)  # and the x of max


# ----------------------------------------------------------------------------------------------------- what it must not do

HOSTILE = "\x1b[31mred\x07\x9b2J\u202e\ud800 [bold]:smile:"
WHOLE = HOSTILE.replace("\ud800", "")  # metadata may not hold half a surrogate pair; the JSON in them may
TRAPS = {
    "config": json.dumps({"model": {HOSTILE: [HOSTILE]}, HOSTILE: None}),
    "data": '{"tokens":NaN}',
    "tokenizer": json.dumps({"name": HOSTILE, "vocabulary": [HOSTILE] * 20}),
    "progress": '{"step":' + "9" * 5000 + "}",
    "fingerprint": "[" * 100_000 + "]" * 100_000,
    "lineage": json.dumps([{"step": 1e999}, [HOSTILE], {HOSTILE: HOSTILE}, {"init_from": {"init_from": 1}}]),
    WHOLE: WHOLE * 50,
}


@pytest.mark.parametrize("command", ["inspect", "diff"])
def test_nothing_in_the_metadata_reaches_the_terminal_raw_or_stops_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    format.save(tmp_path / "a\x1b[2J", {"x": np.ones(1)}, TRAPS)
    format.save(tmp_path / "b", {"x": np.ones(1)}, {"lineage": "[[[[]]]]", "config": '{"model":{}}'})
    both = ("inspect", tmp_path / "a\x1b[2J") if command == "inspect" else ("diff", tmp_path / "a\x1b[2J", tmp_path / "b")
    out = shown(capsys, *both, code=0 if command == "inspect" else 1)
    assert all(c.isprintable() for c in out.replace("\n", ""))
    assert "\\x1b[31mred\\x07\\x9b2J\\u202e\\ud800 [bold]:smile:" in " ".join(out.split())
    assert tiny.cli(*both, "--json") == (0 if command == "inspect" else 1)
    text = capsys.readouterr().out
    found = json.loads(text, parse_constant=pytest.fail)
    assert text.isascii() and text.rstrip("\n").isprintable()
    if command == "inspect":
        assert found["metadata"][WHOLE] == TRAPS[WHOLE] and found["metadata"]["progress"] == TRAPS["progress"]


def test_json_is_believed_to_be_json_up_to_a_depth_that_no_config_has() -> None:
    deep, deeper = ("[" * levels + "]" * levels for levels in (20, 21))
    found = contents.parsed_metadata({"config": deep, "data": deeper, "other": "[]"})
    assert (found["config"], found["data"], found["other"]) == (json.loads(deep), deeper, "[]")


@pytest.mark.parametrize("argv", [["inspect", "{}"], ["verify", "{}"], ["diff", "{}", "{}/step_2.safetensors"]])
def test_a_directory_in_which_another_process_is_at_work_is_read_and_left_as_it_is(
    finished: tiny.Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, argv: list[str]
) -> None:
    interrupted = finished.directory / "run.json"  # a moving of files that a command that trains would finish
    note, flags, original = interrupted.read_bytes() if interrupted.exists() else None, [], os.open
    interrupted.write_text('{"superseding":{"begins":false,"into":"1","progress":1,"steps":[2,3]}}')

    def noted(path: Any, mode: int, *rest: Any, **named: Any) -> int:
        flags.append(mode)
        return original(path, mode, *rest, **named)

    try:
        with CheckpointStore(finished.directory).claimed():
            before, times = tiny.snapshot(finished.root), finished.directory.stat().st_mtime_ns
            monkeypatch.setattr(os, "open", noted)
            shown(capsys, *(part.format(finished.directory) for part in argv), code=argv[0] == "diff")
            monkeypatch.undo()
            assert (tiny.snapshot(finished.root), finished.directory.stat().st_mtime_ns) == (before, times)
    finally:
        interrupted.unlink() if note is None else interrupted.write_bytes(note)
    assert flags and not any(mode & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND) for mode in flags)


def test_looking_takes_the_memory_of_a_few_pieces_however_large_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(contents, "PIECE", 1 << 12)
    monkeypatch.setattr(difference, "PIECE", 1 << 12)
    monkeypatch.setattr(format, "CHUNK_BYTES", 1 << 16)
    array = np.ones(1 << 21, dtype=np.float32)
    for name in ("a", "b"):
        array *= np.float32(0.7)
        format.save(tmp_path / name, {"x": array}, {})
    del array
    for argv, code in ((["inspect", "a"], 0), (["verify", "a"], 0), (["diff", "a", "b"], 1)):
        monkeypatch.chdir(tmp_path)
        shown(capsys, *argv, code=code)  # what a first call imports is not the file's
        tracemalloc.start()
        shown(capsys, *argv, code=code)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2 << 20  # of files of 8 MiB


# -------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("argv", [["inspect", "{}"], ["verify", "{}"], ["diff", "{}", "{}"]])
def test_a_path_that_is_not_there_and_a_directory_without_step_files_are_wrong_usage(
    finished: tiny.Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], argv: list[str]
) -> None:
    for path, reason in (
        (finished.path(7), "no such file or directory; .* holds step_1, step_2, step_3"),
        (tmp_path / "nowhere" / "x", "no such file or directory\n"),
        (tmp_path, "holds no step files"),
    ):
        assert re.search(reason, refused(capsys, *(part.format(path) for part in argv), code=2))


@pytest.mark.parametrize("command", ["inspect", "verify", "diff"])
def test_help_begins_with_a_sentence(capsys: pytest.CaptureFixture[str], command: str) -> None:
    out = shown(capsys, command, "-h")
    assert re.search(r"\n [A-Z][^.]+\.\s+\n╭", out) and "--json" in out


# --------------------------------------------------------------------------------------------------------------- numbers


def exact_norm(values: list[float]) -> float:
    """By scaling with a power of two, and a sum that rounds once."""
    exponent = max((math.frexp(value)[1] for value in values if value), default=0)
    return math.ldexp(math.sqrt(math.fsum(math.ldexp(value, -exponent) ** 2 for value in values)), exponent)


@st.composite
def finite_arrays(draw: st.DrawFn) -> Any:
    dtype = np.dtype(draw(st.sampled_from(FLOATS)))
    bits = draw(npst.arrays(f"u{dtype.itemsize}", st.integers(0, 40)))
    values = bits.view(dtype)
    return values[np.isfinite(values.astype(np.float64))]


@given(finite_arrays())
def test_norm_smallest_and_largest_are_those_of_exact_arithmetic(array: Any) -> None:
    with np.errstate(all="ignore"):
        values = array.astype(np.float64).tolist()
    numbers = contents.numbers_of({"x": array})["x"]
    assert (numbers.elements, numbers.size, numbers.not_finite) == (array.size, array.nbytes, 0)
    assert (numbers.smallest, numbers.largest) == (min(values, default=None), max(values, default=None))
    try:
        expected = exact_norm(values)
    except OverflowError:
        expected = math.inf
    assert numbers.norm == expected or math.isclose(numbers.norm, expected, rel_tol=1e-12)


def test_norms_survive_squares_beyond_float64() -> None:
    arrays = {"huge": np.full(4, 1e300), "minute": np.full(4, 1e-310), "both": np.array([1e-320, 1e308, 1e308])}
    numbers = contents.numbers_of(arrays)
    assert [round(numbers[name].norm / scale, 9) for name, scale in (("huge", 2e300), ("minute", 2e-310))] == [1, 1]
    assert math.isclose(numbers["both"].norm, math.sqrt(2) * 1e308, rel_tol=1e-15)
    assert contents.total(numbers.values()).norm == numbers["both"].norm
    assert contents.numbers_of({"x": np.full(4, 1.7e308)})["x"].norm == math.inf


def test_threads_change_no_digit_and_pieces_no_meaning(monkeypatch: pytest.MonkeyPatch) -> None:
    source = np.random.default_rng(0)
    arrays = {name: source.standard_normal((37, 101)).astype(np.float32) for name in "abc"}
    whole = contents.numbers_of(arrays)
    monkeypatch.setattr(contents, "PIECE", 100)
    cut = []
    for count in (1, 2, 5):
        with tiny.threads(count):
            cut.append(contents.numbers_of(arrays))
    assert cut[0] == cut[1] == cut[2]
    for name in arrays:
        assert math.isclose(cut[0][name].norm, whole[name].norm, rel_tol=1e-14)
        assert (cut[0][name].smallest, cut[0][name].largest) == (whole[name].smallest, whole[name].largest)
        assert (cut[0][name].tensors, cut[0][name].elements, cut[0][name].size) == (1, 3737, 4 * 3737)


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0.0123456, "0.0123"),
        (-1.5e-5, "-1.50e-5"),
        (0.0, "0"),
        (1.0, "1"),
        (123456.0, "1.23e5"),
        (math.nan, "nan"),
        (None, "-"),
    ],
)
def test_numbers_for_people_have_three_digits(number: float | None, text: str) -> None:
    assert words.short(number) == text


def test_sizes_and_counts_for_people() -> None:
    sizes = [words.size_of(count) for count in (0, 999, 1000, 16_640, 999_499, 999_500, 1_234_567_890, 2**62)]
    assert sizes == ["0 B", "999 B", "1 kB", "16.6 kB", "999 kB", "1 MB", "1.23 GB", "4.61 EB"]
    assert [words.counted(count) for count in (0, 9_999_999, 10_000_000, 2**64)] == ["0", "9,999,999", "1e7", "1.84e19"]
