"""docs/examples, docs/trace_format.md: a trace can be read, checked and written with no more than a C or a Rust compiler."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import architectures
import numpy as np
import pytest

from oxidizr_ref.config import Config
from oxidizr_ref.errors import TraceError
from oxidizr_ref.trace import Record, Trace, TraceWriter, compare, record
from oxidizr_ref.trace.names import END_MEANINGS, MEANINGS

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"
PAGE = (EXAMPLES.parent / "trace_format.md").read_text(encoding="utf-8")

pytestmark = pytest.mark.thorough

C_COMPILER = next((name for name in ("gcc", "cc", "clang") if shutil.which(name)), None)
STRICT = ("-std=c99", "-pedantic", "-Wall", "-Wextra", "-Werror", "-O1")
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
RUST_COMPILER = shutil.which("rustc")

needs_c = pytest.mark.skipif(C_COMPILER is None, reason="there is no C compiler here")
needs_rust = pytest.mark.skipif(RUST_COMPILER is None, reason="there is no Rust compiler (rustc) here")

#: Memory that an error exit leaves to the system is no leak.
ENVIRONMENT = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "LC_ALL": "C", "OMP_NUM_THREADS": "1"}

#: What check_layer checks in a layer, in its order.
CHECKED = ("input_layernorm.output", *(f"self_attn.{name}" for name in ("scores", "masked_scores", "probs", "context")))

#: All that trace.h can tell of a file.
LISTING = r"""
#include "trace.h"
int main(int argc, char **argv) {
    trace t = trace_open(argc > 1 ? argv[1] : "");
    for (size_t i = 0; i < t.metadata_count; i++)
        printf("%s = %s\n", t.metadata[i][0], trace_metadata(&t, t.metadata[i][0]));
    for (size_t i = 0; i < t.count; i++) {
        const trace_tensor *tensor = trace_find(&t, t.tensors[i].name);
        printf("%s %d (", tensor->name, (int)tensor->dtype);
        for (int axis = 0; axis < tensor->rank; axis++)
            printf("%llu,", (unsigned long long)tensor->shape[axis]);
        printf(")");
        for (size_t at = 0; at < tensor->count; at++)
            printf(" %.17g", trace_number(tensor, at));
        printf("\n");
    }
    int found = trace_find(&t, "") != NULL || trace_metadata(&t, "") != NULL;
    trace_close(&t);
    return found;
}
"""


# --- programs and files -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where programs are built, the same for all workers of a test run."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


def built(folder: Path, name: str, *command: str | Path | None) -> Path:
    """The program ``name`` in the folder, for which the compiler is called unless another worker has done that."""
    program, own = folder / name, folder / f"{name}.{os.getpid()}"
    if not program.exists():
        done = subprocess.run([*map(str, command), "-o", own], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        own.replace(program)
    return program


@pytest.fixture(scope="module")
def sanitizers(folder: Path) -> tuple[str, ...]:
    """The flags that have every access to memory and every operation in C watched; none where that does not run."""
    (folder / "empty.c").write_text("int main(void) { return 0; }\n")
    try:
        subprocess.run([built(folder, "empty", C_COMPILER, *SANITIZERS, folder / "empty.c")], check=True, env=ENVIRONMENT)
    except (AssertionError, subprocess.CalledProcessError):
        return ()
    return SANITIZERS


@pytest.fixture(scope="module")
def check_layer(folder: Path, sanitizers: tuple[str, ...]) -> Path:
    return built(folder, "check_layer", C_COMPILER, *STRICT, *sanitizers, EXAMPLES / "check_layer.c", "-lm")


@pytest.fixture(scope="module")
def write_trace(folder: Path, sanitizers: tuple[str, ...]) -> Path:
    return built(folder, "write_trace", C_COMPILER, *STRICT, *sanitizers, EXAMPLES / "write_trace.c", "-lm")


@pytest.fixture(scope="module")
def listing(folder: Path, sanitizers: tuple[str, ...]) -> Path:
    (folder / "listing.c").write_text(LISTING)
    return built(folder, "listing", C_COMPILER, *STRICT, *sanitizers, f"-I{EXAMPLES}", folder / "listing.c")


@pytest.fixture(scope="module")
def read_trace(folder: Path) -> Path:
    """Without optimization: with checks for overflow, and built in a quarter of a second."""
    return built(folder, "read_trace", RUST_COMPILER, "--edition", "2021", "-D", "warnings", EXAMPLES / "read_trace.rs")


def run(program: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Ends as it should, whatever the file: exit code 0 or 1 and nothing on stderr, or exit code 2 and one line there."""
    command = [str(program), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert done.returncode in (0, 1, 2) and done.stderr.count("\n") == (done.returncode == 2), (done.returncode, done.stderr)
    return done


def recorded(path: Path, architecture: str, dtype: str, shape: tuple[int, int] = (2, 7), **options: Any) -> Path:
    """A trace of one step of a small model at whose weights nothing is negligible."""
    model = architectures.lively_model(architecture, dtype=dtype)
    trainer = {"batch_size": shape[0], "gradient_accumulation": 1, "max_steps": 3, "learning_rate": 1e-3}
    config = Config.model_validate({"model": model.config, "trainer": trainer})
    record(config, path, batches=[architectures.batch(shape=shape)], weights=model.state_dict(), **options)
    return path


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """The forward pass of a Llama in float64."""
    return recorded(tmp_path / "llama", "llama", "f64", what=("forward",))


def parts_of(raw: bytes) -> tuple[bytes, bytes]:
    """The text of the header, and the payload."""
    (length,) = struct.unpack("<Q", raw[:8])
    return raw[8 : 8 + length], raw[8 + length :]


def whole(header: bytes | str, payload: bytes = b"") -> bytes:
    """A file of these, the length of its header right."""
    text = header.encode("latin-1") if isinstance(header, str) else header
    return struct.pack("<Q", len(text)) + text + payload


def change(path: Path, name: str, index: int, number: float) -> None:
    """Put another number into a tensor of a file."""
    header, payload = parts_of(path.read_bytes())
    entry, changed = json.loads(header)[name], bytearray(payload)
    tensor = memoryview(changed)[slice(*entry["data_offsets"])]
    np.frombuffer(tensor, {"F64": "<f8", "F32": "<f4"}[entry["dtype"]])[index] = number
    path.write_bytes(whole(header, bytes(changed)))


# --- the C programs ---------------------------------------------------------------------------------------------------


@needs_c
@pytest.mark.parametrize("dtype", ["f64", "f32"])
@pytest.mark.parametrize("architecture", ["llama", "moe"])
def test_the_c_program_finds_every_layer_right(tmp_path: Path, check_layer: Path, architecture: str, dtype: str) -> None:
    path = recorded(tmp_path / "x", architecture, dtype, what=("forward",))
    for layer in (0, 1):
        done = run(check_layer, path, layer)
        lines = [line.split() for line in done.stdout.splitlines()]
        assert done.returncode == 0
        assert [(name, verdict) for name, _, verdict in lines] == [(f"layers.{layer}.{name}", "agrees") for name in CHECKED]
        assert all(float(error) < {"f64": 1e-14, "f32": 1e-6}[dtype] for _, error, _ in lines)


def wrong_ones(check_layer: Path, path: Path, *arguments: object) -> list[str]:
    """What the program calls wrong; it must exit accordingly."""
    done = run(check_layer, path, *arguments)
    wrong = [line.split()[0] for line in done.stdout.splitlines() if line.endswith("WRONG")]
    assert done.returncode == bool(wrong)
    return wrong


@needs_c
@pytest.mark.parametrize("name", CHECKED)
def test_the_c_program_names_the_tensor_in_which_one_number_is_changed(check_layer: Path, llama: Path, name: str) -> None:
    name = f"layers.0.{name}"
    array = Trace(llama).array(name)
    index = array.size // 2 if "scores" not in name else np.prod(array.shape[1:])  # a score that is seen
    right = float(array.reshape(-1)[index])
    for number in (right + 1e-6, float("nan"), float("inf"), float("-inf")):
        change(llama, name, int(index), number)
        assert wrong_ones(check_layer, llama) == [name]
    change(llama, name, int(index), right)
    assert wrong_ones(check_layer, llama) == []


@needs_c
def test_the_c_program_wants_something_very_negative_where_a_score_must_not_be_seen(check_layer: Path, llama: Path) -> None:
    name = "layers.0.self_attn.masked_scores"
    for number, wrong in (
        (-1e30, []),
        (-1e4, []),
        (-9999.0, [name]),
        (0.0, [name]),
        (np.inf, [name]),
        (np.nan, [name]),
    ):
        change(llama, name, 1, number)
        assert wrong_ones(check_layer, llama) == wrong


@needs_c
def test_the_c_program_takes_its_epsilon_from_the_command_line(check_layer: Path, llama: Path) -> None:
    assert wrong_ones(check_layer, llama, 0, 1e-5) == []
    assert wrong_ones(check_layer, llama, 0, 2e-5) == ["layers.0.input_layernorm.output"]


@needs_c
@pytest.mark.parametrize(
    "arguments, why",
    [
        ((), "usage"),
        (("TRACE", "one"), "usage"),
        (("TRACE", "-1"), "usage"),
        (("TRACE", "0", "1e-5x"), "usage"),
        (("TRACE", "2"), "there is no layers.2.input_layernorm.weight"),
        (("absent",), "cannot be opened"),
        ((str(EXAMPLES),), "cannot be"),
    ],
)
def test_the_c_program_says_why_it_cannot_tell(check_layer: Path, llama: Path, arguments: tuple[str, ...], why: str) -> None:
    done = run(check_layer, *(llama if argument == "TRACE" else argument for argument in arguments))
    assert done.returncode == 2 and why in done.stderr


@needs_c
def test_the_c_program_refuses_a_sampled_trace_and_one_of_a_mamba(tmp_path: Path, check_layer: Path) -> None:
    done = run(check_layer, recorded(tmp_path / "x", "llama", "f64", what=("forward",), sample=10))
    assert done.returncode == 2 and "--sample" in done.stderr
    done = run(check_layer, recorded(tmp_path / "x", "mamba2", "f64", what=("forward",)))
    assert done.returncode == 2 and "there is no layers.0.input_layernorm.weight" in done.stderr


@needs_c
@pytest.mark.parametrize("dtype", ["f64", "f32"])
@pytest.mark.parametrize("architecture", ["llama", "moe"])
def test_what_a_kernel_in_c_hands_in_is_read_and_agrees(
    tmp_path: Path, write_trace: Path, architecture: str, dtype: str
) -> None:
    reference = recorded(tmp_path / "reference", architecture, dtype, what=("forward",))
    for layer in (0, 1):
        mine = tmp_path / "mine"
        assert run(write_trace, reference, mine, layer).returncode == 0
        trace = Trace(mine)
        assert (8 + len(parts_of(mine.read_bytes())[0])) % 64 == 0
        assert (trace.precision, trace.metadata["made_by"]) == ("f32", "write_trace.c")
        found = compare(reference, mine)
        names = [f"layers.{layer}.{name}" for name in CHECKED if not name.endswith(".scores")]
        assert (list(trace.records), list(found.tensors), found.strange) == (names, names, [])
        assert found.agrees and all(0 < tensor.distance.max_rel < 1e-6 for tensor in found.tensors.values())


@needs_c
def test_what_a_kernel_with_another_epsilon_hands_in_is_found_wrong(tmp_path: Path, write_trace: Path, llama: Path) -> None:
    assert run(write_trace, llama, tmp_path / "mine", 0, 1e-4).returncode == 0
    found = compare(llama, tmp_path / "mine", tolerance=1e-6)
    assert found.first is not None and found.first.name == "layers.0.input_layernorm.output"
    done = run(write_trace, llama, tmp_path / "no" / "mine")
    assert done.returncode == 2 and "cannot be written" in done.stderr


@needs_c
@pytest.mark.parametrize("precision", ["f64", "f32"])
def test_the_c_reader_finds_every_name_number_and_word(tmp_path: Path, listing: Path, precision: str) -> None:
    numbers = np.array([0.1, -0.0, np.inf, -np.inf, 1e-45, 3.4028234663852886e38]).reshape(1, 2, 3)
    words = {"quoted": '"\\/\t', "é": "ü€🦀", "empty": ""}
    path = tmp_path / "x"
    with TraceWriter(path, precision, words) as writer:
        writer.add("z", numbers)
        writer.add("integers", np.array([0, 7, 2**31]))
        writer.add("none", np.zeros((2, 0, 3)))
        writer.add("one", np.array(2.5))
    trace = Trace(path)
    expected = [f"{key} = {trace.metadata[key]}" for key in sorted(trace.metadata)]
    dtypes = ["<f8", "<f4", "<i8", "<u4"]
    for name in ("z", "integers", "none", "one"):
        array = trace.array(name)
        shape = "".join(f"{length}," for length in array.shape)
        printed = "".join(f" {float(number):.17g}" for number in array.reshape(-1))
        expected.append(f"{name} {dtypes.index(array.dtype.str)} ({shape}){printed}")
    done = run(listing, path)
    assert (done.returncode, done.stdout.splitlines()) == (0, expected)


# --- the Rust program -------------------------------------------------------------------------------------------------


def as_python_sees_it(path: Path) -> list[str]:
    """The lines that the Rust program should print of the records."""
    return [
        "\t".join(
            (r.name, r.role, r.op, "" if r.layer is None else str(r.layer), str(list(r.shape)), " ".join(r.inputs), r.sample)
        )
        for r in Trace(path).records.values()
    ]


@needs_rust
@pytest.mark.parametrize(
    "architecture, dtype, options",
    [
        ("llama", "f64", {"steps": 2}),
        ("llama", "f32", {"sample": 40}),
        ("moe_top1", "f32", {"shape": (1, 2)}),  # experts without a token: empty arrays, all at one place
        ("moe", "f64", {}),
        ("hybrid", "f64", {}),
        ("mamba3_mimo", "f64", {}),
        ("hybrid_mamba1", "f32", {}),
    ],
)
def test_the_rust_program_lists_records_as_python_does_and_finds_norms_right(
    tmp_path: Path, read_trace: Path, architecture: str, dtype: str, options: dict[str, Any]
) -> None:
    path = recorded(tmp_path / "x", architecture, dtype, **options)
    done, expected = run(read_trace, path), as_python_sees_it(path)
    lines = done.stdout.splitlines()
    assert lines[: len(expected)] == expected
    if "sample" in options:
        assert done.returncode == 2 and "RMSNorm" in done.stderr
    else:
        assert done.returncode == 0
        assert len(lines) > len(expected) and all(line.endswith(", agrees") for line in lines[len(expected) :])


@needs_rust
def test_the_rust_program_finds_a_wrong_number_of_a_norm(read_trace: Path, llama: Path) -> None:
    name = "layers.0.input_layernorm.output"
    for number in (0.5, np.nan):
        change(llama, name, 5, number)
        done = run(read_trace, llama)
        assert done.returncode == 1
        assert [line.split(":")[0] for line in done.stdout.splitlines() if line.endswith("WRONG")] == [name]


@needs_rust
@pytest.mark.parametrize(
    "arguments, why", [((), "usage"), (("x", "1", "2"), "usage"), (("x", "y"), "usage"), (("absent",), "")]
)
def test_the_rust_program_says_why_it_cannot_tell(read_trace: Path, arguments: tuple[str, ...], why: str) -> None:
    done = run(read_trace, *arguments)
    assert done.returncode == 2 and why in done.stderr


# --- files that are no traces -----------------------------------------------------------------------------------------

X = '"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
NOT_TRACES = {
    "nothing": b"",
    "seven bytes": b"\2\0\0\0\0\0\0",
    "no header": whole(""),
    "a header longer than the file": struct.pack("<Q", 3) + b"{}",
    "a header of 2^64 - 1 bytes": struct.pack("<Q", 2**64 - 1) + b"{}",
    "spaces before the header": whole(" {}"),
    "something behind the header": whole("{} {}"),
    "a zero behind the header": whole("{}\0"),
    "a header that is a list": whole("[]"),
    "an open header": whole("{" + X, bytes(8)),
    "a comma too many": whole("{" + X + ",}", bytes(8)),
    "a comma too few": whole("{" + X + X.replace("x", "y").replace("0,8", "8,16") + "}", bytes(16)),
    "one name twice": whole("{" + X + "," + X.replace("0,8", "8,16") + "}", bytes(16)),
    "one key twice": whole("{" + X.replace("{", '{"dtype":"F32",') + "}", bytes(8)),
    "a key more": whole("{" + X.replace("{", '{"order":"C",') + "}", bytes(8)),
    "a key less": whole('{"x":{"dtype":"F32","shape":[2]}}', bytes(8)),
    "no offsets of nothing": whole('{"x":{"dtype":"F32","shape":[0]}}'),
    "no dtype of nothing": whole('{"x":{"data_offsets":[0,0],"shape":[0]}}'),
    "nothing said of a tensor": whole('{"x":{}}'),
    "a tensor that is a number": whole('{"x":1}'),
    "another dtype": whole("{" + X.replace("F32", "F33") + "}", bytes(8)),
    "a dtype that is a number": whole("{" + X.replace('"F32"', "32") + "}", bytes(8)),
    "one offset": whole("{" + X.replace("0,8", "8") + "}", bytes(8)),
    "one offset of nothing": whole('{"x":{"dtype":"F32","shape":[0],"data_offsets":[0]}}'),
    "three offsets": whole("{" + X.replace("0,8", "0,8,8") + "}", bytes(8)),
    "offsets beyond any file": whole("{" + X.replace("0,8", f"{2**64 - 9},{2**64 - 1}") + "}", bytes(8)),
    "offsets exchanged": whole("{" + X.replace("0,8", "8,0") + "}", bytes(8)),
    "a shape too large": whole("{" + X.replace("[2]", "[3]") + "}", bytes(8)),
    "a shape whose product is too large by 2^64": whole("{" + X.replace("[2]", f"[{2**61 + 1},2]") + "}", bytes(8)),
    "a length of 2^64": whole("{" + X.replace("[2]", f"[{2**64 + 2}]") + "}", bytes(8)),
    "a negative length": whole("{" + X.replace("[2]", "[-2]") + "}", bytes(8)),
    "a length with a fraction": whole("{" + X.replace("[2]", "[2.0]") + "}", bytes(8)),
    "a length that begins with 0": whole("{" + X.replace("[2]", "[02]") + "}", bytes(8)),
    "a length in a list": whole("{" + X.replace("[2]", "[[2]]") + "}", bytes(8)),
    "a hundred thousand brackets": whole("{" + X.replace("[2]", "[" * 100_000) + "}", bytes(8)),
    "a gap at the beginning": whole("{" + X.replace("0,8", "4,12") + "}", bytes(12)),
    "a payload too short": whole("{" + X + "}", bytes(7)),
    "a payload too long": whole("{" + X + "}", bytes(9)),
    "a payload of nothing": whole("{}", b"x"),
    "an overlap": whole("{" + X + "," + X.replace('"x"', '"y"').replace("0,8", "4,12") + "}", bytes(12)),
    "metadata that is a string": whole('{"__metadata__":"x"}'),
    "a number in metadata": whole('{"__metadata__":{"x":1}}'),
    "metadata twice": whole('{"__metadata__":{},"__metadata__":{}}'),
    "one key of metadata twice": whole('{"__metadata__":{"x":"","x":""}}'),
    "a later version": whole('{"__metadata__":{"trace_version":"2"}}'),
    "an open string": whole('{"'),
    "a string that ends in an escape": whole('{"\\'),
    "an escape of nothing": whole('{"__metadata__":{"\\x":""}}'),
    "a short \\u": whole('{"__metadata__":{"\\u12":""}}'),
    "a \\u at the very end": whole('{"__metadata__":{"\\u12'),
    "half a character": whole('{"__metadata__":{"\\ud83e":""}}'),
    "the halves of a character exchanged": whole('{"__metadata__":{"\\udd80\\ud83e":""}}'),
    "half a character and another one": whole('{"__metadata__":{"\\ud83e\\u0041":""}}'),
    "a tab in a string": whole('{"__metadata__":{"\t":""}}'),
    "text that is not ASCII": whole('{"__metadata__":{"é":""}}'.encode()),
    "bytes that are no text": whole('{"__metadata__":{"\xff":""}}'),
}
#: What other writers may do: every one of these is a trace.
TRACES = {
    "nothing but a header": whole("{}"),
    "one tensor": whole("{" + X + "}", bytes(8)),
    "spaces": whole("{ \n" + X.replace(":", " :\t").replace(",", "\r, ") + " } \n", bytes(8)),
    "an unaligned payload": whole("{" + X + "}  ", bytes(8)),
    "keys in another order": whole('{"x":{"data_offsets":[0,8],"shape":[2],"dtype":"F32"}}', bytes(8)),
    "names out of order": whole("{" + X.replace("0,8", "8,16") + "," + X.replace("x", "a") + "}", bytes(16)),
    "empty metadata": whole('{"__metadata__":{}}'),
    "escapes": whole('{"__metadata__":{"\\ud83e\\uDD80\\/\\"\\\\":"\\b\\f\\n\\r\\t\\u0041"}}'),
    "empty tensors, and one number": whole(
        '{"a":{"dtype":"U32","shape":[0],"data_offsets":[0,0]},"b":{"dtype":"F64","shape":[],"data_offsets":[0,8]},'
        '"c":{"dtype":"I64","shape":[3,0],"data_offsets":[8,8]},"d":{"dtype":"F32","shape":[9,0],"data_offsets":[0,0]}}',
        bytes(8),
    ),
}


def taken(program: Path, path: Path) -> bool:
    """Whether a program takes a file for a trace. If not, it says why, beginning with the name of the file."""
    done = run(program, path)
    without_norms = "RMSNorm" in done.stderr  # of which read_trace complains only when it has read the whole file
    assert done.returncode != 2 or without_norms or (done.stdout == "" and done.stderr.startswith(f"{path}: "))
    return done.returncode != 2 or without_norms


def taken_of(program: Path, path: Path, files: dict[str, bytes]) -> list[str]:
    """Which of these files a program takes for traces."""
    found = []
    for what, raw in files.items():
        path.write_bytes(raw)
        if taken(program, path):
            found.append(what)
    return found


@needs_c
def test_the_c_reader_refuses_whatever_the_page_does_not_allow(tmp_path: Path, listing: Path) -> None:
    assert taken_of(listing, tmp_path / "x", {**NOT_TRACES, **TRACES}) == list(TRACES)


@needs_rust
def test_the_rust_reader_refuses_whatever_the_page_does_not_allow(tmp_path: Path, read_trace: Path) -> None:
    assert taken_of(read_trace, tmp_path / "x", {**NOT_TRACES, **TRACES}) == list(TRACES)


@needs_rust
def test_the_rust_reader_refuses_records_that_are_wrong(tmp_path: Path, read_trace: Path) -> None:
    right = {"name": "x", "role": "output", "shape": [2]}
    wrong: list[Any] = [1, "", {}, [1], [[]], [right, right], [{**right, "name": "y"}], [{**right, "name": "é"}]]
    wrong += [
        [{**right, key: value}] for key in ("name", "role", "op", "shape", "inputs", "sample") for value in (7, {}, [[]])
    ]
    wrong += [[{key: right[key] for key in right if key != absent}] for absent in right]
    wrong += [[{**right, "layer": "0"}], [{**right, "shape": [3]}], [{**right, "sample": "y"}], [{**right, "colour": "red"}]]

    def file(records: str) -> bytes:
        return whole(json.dumps({"__metadata__": {"records": records}})[:-1] + "," + X + "}", bytes(8))

    files = {str(i): file(json.dumps(records, ensure_ascii=False)) for i, records in enumerate(wrong)}
    files |= {text: file(text) for text in ("", "[", "[" * 100_000, "[]]", "[1.5]", "[null]")}
    right |= {"op": "", "layer": 0, "inputs": [], "sample": "x", "digest": "", "parts": 0}
    assert taken_of(read_trace, tmp_path / "x", {**files, "right": file(json.dumps([right]))}) == ["right"]


def test_python_takes_what_the_page_allows(tmp_path: Path) -> None:
    for what, raw in TRACES.items():
        (tmp_path / "x").write_bytes(raw)
        assert refusal(tmp_path / "x") == "", what


def mutants(raw: bytes, count: int, seed: int) -> Iterator[bytes]:
    """Files a little wrong: bits of the header flipped; or characters changed, dropped or doubled, its length then right."""
    random = np.random.default_rng(seed)
    header, payload = parts_of(raw)
    for i in range(count):
        at, text = int(random.integers(len(header))), bytearray(header)
        if i % 2:
            text[at] ^= 1 << int(random.integers(8))
        elif i % 8 == 0:
            text[at] = random.choice(list(b'{}[]:,"\\0918e-. nu'))
        elif i % 8 == 2:
            del text[at : at + int(random.integers(1, 9))]
        elif i % 8 == 4:
            text[at:at] = text[at : at + int(random.integers(1, 40))]
        else:
            numbers = list(re.finditer(rb"[0-9]+", header))
            number = numbers[int(random.integers(len(numbers)))]
            text[slice(*number.span())] = random.choice(
                [b"0", b"1", b"7", b"00", b"-1", b"%d" % 2**32, b"%d" % 2**63, b"%d" % 2**64]
            )
        yield whole(bytes(text), payload)


def refusal(path: Path) -> str:
    """Why Python does not take a file for a trace; "" where it does. No other error than its own may come of that."""
    try:
        Trace(path)
    except TraceError as error:
        return str(error)
    return ""


@pytest.fixture
def soil(tmp_path: Path) -> list[bytes]:
    """Files to make mutants of: one with much in its records, one with more in its header."""
    path = recorded(tmp_path / "sound", "llama", "f32", shape=(1, 2), what=("forward",), layers=[0], sample=10)
    return [path.read_bytes(), example_file(path).read_bytes()]


@needs_c
def test_the_c_reader_touches_nothing_but_the_file_and_takes_none_that_python_does_not_take(
    tmp_path: Path, listing: Path, sanitizers: tuple[str, ...], soil: list[bytes]
) -> None:
    if not sanitizers:
        pytest.skip("this C compiler has no sanitizers that run here")
    count = 0
    for raw in (*mutants(soil[0], 40, seed=1), *mutants(soil[1], 120, seed=2)):
        (tmp_path / "x").write_bytes(raw)
        if taken(listing, tmp_path / "x"):
            why = refusal(tmp_path / "x")
            assert why == "" or "its records" in why, (raw, why)  # into which trace.h does not look
            count += 1
    assert 10 < count < 80  # so that both is tried


@needs_rust
def test_the_rust_reader_never_panics_and_takes_no_file_that_python_does_not_take(
    tmp_path: Path, read_trace: Path, soil: list[bytes]
) -> None:
    count = 0
    for raw in (*mutants(soil[0], 40, seed=1), *mutants(soil[1], 120, seed=2)):
        (tmp_path / "x").write_bytes(raw)
        if taken(read_trace, tmp_path / "x"):
            assert refusal(tmp_path / "x") == "", raw
            count += 1
    assert 10 < count < 80


@needs_c
@needs_rust
def test_cuts_and_flips_in_the_length_are_refused(
    tmp_path: Path, listing: Path, read_trace: Path, soil: list[bytes]
) -> None:
    sound = soil[1]
    files = {f"{length} bytes": sound[:length] for length in (*range(0, len(sound), 37), len(sound) - 1)}
    for bit in range(0, 64, 3):
        flipped = bytearray(sound)
        flipped[bit // 8] ^= 1 << bit % 8
        files[f"bit {bit}"] = bytes(flipped)
    for program in (listing, read_trace):
        assert taken_of(program, tmp_path / "x", files) == []


# --- the page ---------------------------------------------------------------------------------------------------------


def example_file(path: Path) -> Path:
    """What the page shows byte by byte, made as it says there."""
    with TraceWriter(path, precision="f32") as trace:
        trace.add("tokens", np.array([[3, 1]]))
        trace.add("embed_tokens.output", np.array([[[0.5], [-2.0]]]))
    return path


def block(title: str, language: str) -> str:
    """The first block of this language in a section of the page."""
    return PAGE.partition(f"\n## {title}\n")[2].partition(f"```{language}\n")[2].partition("```")[0]


def table(title: str) -> list[str]:
    """What stands in code in the first column of the first table in a section of the page."""
    rows = re.findall(r"(?:^\|.*\n)+", PAGE.partition(f"\n## {title}\n")[2], flags=re.MULTILINE)[0].splitlines()[2:]
    return [word for row in rows for word in re.findall(r"`([^`]+)`", row.split("|")[1])]


def hexdump(raw: bytes) -> str:
    """As ``hexdump -C`` prints it (of bytes no sixteen of which repeat those before)."""
    lines = []
    for at in range(0, len(raw), 16):
        row = raw[at : at + 16]
        halves = ("".join(f" {byte:02x}" for byte in row[i : i + 8]) for i in (0, 8))
        text = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in row)
        lines.append(f"{at:08x} {' '.join(halves):<51}|{text}|")
    return "\n".join([*lines, f"{len(raw):08x}"]) + "\n"


def test_the_page_shows_the_bytes_of_a_file_that_is_made_as_it_says(tmp_path: Path) -> None:
    raw = example_file(tmp_path / "x").read_bytes()
    assert block("An example, byte by byte", "text") == hexdump(raw)
    assert "TraceWriter" in block("An example, byte by byte", "python")
    assert f"0x{len(parts_of(raw)[0]):x} = {len(parts_of(raw)[0])}" in PAGE


def test_the_least_that_the_page_says_can_be_handed_in_can_be_handed_in(tmp_path: Path) -> None:
    with TraceWriter(tmp_path / "reference", "f64") as writer:
        writer.add("layers.0.self_attn.probs", np.zeros((1, 1, 2, 2)))
    (tmp_path / "x").write_bytes(whole(block("The header", "json"), bytes(16)))
    found = compare(tmp_path / "reference", tmp_path / "x", tolerance=0)
    assert found.agrees and list(found.tensors) == ["layers.0.self_attn.probs"] and found.precision == "f32"


def test_the_page_lists_the_metadata_and_the_fields_of_records_that_there_are(llama: Path) -> None:
    assert sorted(table("Metadata")) == sorted(Trace(llama).metadata)
    assert sorted(table("Records")) == sorted(field.name for field in fields(Record))


def test_samples_and_digests_are_what_the_page_says(tmp_path: Path) -> None:
    whole_one = Trace(recorded(tmp_path / "whole", "hybrid", "f32", what=("forward",)))
    sampled = Trace(recorded(tmp_path / "sampled", "hybrid", "f32", what=("forward",), sample=40))
    kinds = set()
    for name, entry in sampled.records.items():
        array = np.ascontiguousarray(whole_one.array(name))
        assert bool(entry.sample) == bool(entry.digest) == (array.size > 40 and entry.role not in ("input", "parameter"))
        if entry.sample:
            indices = sampled.array(entry.sample)
            assert entry.sample == f"sample.{array.size}" and len(indices) <= 40 and (np.diff(indices.astype(int)) > 0).all()
            np.testing.assert_array_equal(sampled.array(name), array.reshape(-1)[indices])
            parts = [hashlib.sha256(part.tobytes()).digest() for part in np.split(array, entry.parts or 1)]
            assert entry.digest == (hashlib.sha256(b"".join(parts)).hexdigest() if entry.parts else parts[0].hex())
            kinds.add(entry.parts)
    assert kinds == {0, 7}


def test_the_page_explains_every_letter_that_stands_in_a_shape() -> None:
    shapes = " ".join(
        meaning.shape for meaning in (*MEANINGS.values(), *END_MEANINGS.values()) if meaning.shape.startswith("[")
    )
    letters = set(re.findall(r"[A-Za-z]_?[a-z]?(?![a-z])|·|…", re.sub("Mamba[123]|, 3:", "", shapes)))
    assert letters == set(table("The letters of shapes"))


# --- PyTorch ----------------------------------------------------------------------------------------------------------


@pytest.mark.oracle
@pytest.mark.parametrize("dtype", ["f64", "f32"])
def test_the_llama_in_pytorch_agrees_and_its_planted_mistake_is_found_where_it_is(tmp_path: Path, dtype: str) -> None:
    pytest.importorskip("torch", reason="needs the extra 'oracle'")
    reference, theirs = recorded(tmp_path / "reference", "llama", dtype, steps=2), tmp_path / "theirs"
    command = [sys.executable, str(EXAMPLES / "llama_block.py"), str(reference), str(theirs)]
    subprocess.run(command, check=True, env=ENVIRONMENT)
    found = compare(reference, theirs)
    assert found.agrees and Trace(theirs).precision == dtype
    left_out = {"rms", "rms.grad", "clip_factor", "learning_rate"}
    assert all(
        any(name.endswith(f".{end}") for end in left_out) or name.split(".")[-1] in left_out for name in found.missing
    )
    subprocess.run([*command, "--broken"], check=True, env=ENVIRONMENT)
    found = compare(reference, theirs)
    assert [origin.name for origin in found.origins] == ["layers.0.self_attn.q", "layers.0.self_attn.k"]
