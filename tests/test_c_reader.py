"""docs/read_checkpoint.c: a checkpoint can be read with no more than a C compiler, and says there what it says here."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import handmade
import numpy as np
import pytest
import tiny
from mutations import Mutator

from oxidizr_ref.checkpoint import format
from oxidizr_ref.checkpoint import header as headers

SOURCE = tiny.REPOSITORY / "docs" / "read_checkpoint.c"
GOLDEN = tiny.REPOSITORY / "tests" / "golden" / "format_v1.safetensors"
COMPILER = next((name for name in ("cc", "gcc", "clang") if shutil.which(name)), None)
STRICT = ("-std=c99", "-pedantic", "-Wall", "-Wextra", "-Werror")

pytestmark = pytest.mark.skipif(COMPILER is None, reason="there is no C compiler here")

Program = Callable[[Path], "subprocess.CompletedProcess[str]"]


def build(folder: Path, *flags: str) -> tuple[Path, subprocess.CompletedProcess[str]]:
    program = folder / "read_checkpoint"
    command = [str(COMPILER), *STRICT, *flags, "-o", str(program), str(SOURCE)]
    return program, subprocess.run(command, capture_output=True, text=True, check=False)


def runner(program: Path) -> Program:
    """Runs the program on a file. Memory that an error exit leaves to the system is no leak."""
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "LC_ALL": "C"}

    def run(path: Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run([str(program), str(path)], capture_output=True, text=True, env=environment, check=False)

    return run


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> Program:
    """The program, built with all warnings as errors."""
    program, built = build(tmp_path_factory.mktemp("c"))
    assert built.returncode == 0, built.stderr
    return runner(program)


@pytest.fixture(scope="module")
def read_checked(tmp_path_factory: pytest.TempPathFactory) -> Program:
    """The program, every access to memory and every operation of it watched."""
    program, built = build(tmp_path_factory.mktemp("c"), "-g", "-fsanitize=address,undefined")
    run = runner(program)
    if built.returncode != 0 or run(GOLDEN).returncode != 0:
        pytest.skip(f"this compiler has no sanitizers that run here: {built.stderr[-200:]}")
    return run


def as_python_sees_it(path: Path) -> list[str]:
    """The lines that the program should print."""
    header, views = format.mapped(path)
    lines = []
    for entry in sorted(header.entries, key=lambda entry: entry.name):
        shape = ",".join(map(str, entry.shape))
        line = f"{entry.name} {headers.DTYPE_NAMES[entry.dtype]} [{shape}] {header.payload_start + entry.begin}"
        numbers = views[entry.name].reshape(-1)[:4] if entry.dtype == np.float32 else ()
        lines.append(line + "".join(f" {float(number):.9g}" for number in numbers))
    return lines


def test_the_program_lists_the_golden_file_as_python_does(read: Program) -> None:
    done = read(GOLDEN)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == as_python_sees_it(GOLDEN)
    assert "embed_tokens.weight F32 [3,4] 5280 -1.83333337 -1.5 -1.16666663 -0.833333313" in done.stdout.splitlines()


@pytest.mark.parametrize("count", [0, 1, 3, 4, 5])
def test_the_program_lists_a_fresh_checkpoint_as_python_does(tmp_path: Path, read: Program, count: int) -> None:
    numbers = np.array([np.inf, -0.0, 3.4028235e38, 1e-45, 7], dtype=np.float32)[:count]
    saved: dict[str, Any] = {**handmade.tensors(3), "numbers": numbers, "Z": np.array(2.5, dtype=np.float32)}
    words = {**handmade.metadata(3), "": '"}\\', "é": '🦀",', "zz": "\\"}
    format.save(tmp_path / "x", saved, words)
    done = read(tmp_path / "x")
    assert (done.returncode, done.stdout.splitlines()) == (0, as_python_sees_it(tmp_path / "x"))


def test_the_program_lists_a_run_s_checkpoint_as_python_does(tmp_path: Path, read: Program) -> None:
    run = tiny.make_run(tmp_path, trainer={"max_steps": 1, "save_interval": 1})
    assert run.train() == 0
    done = read(run.path(1))
    assert (done.returncode, done.stdout.splitlines()) == (0, as_python_sees_it(run.path(1)))
    assert len(done.stdout.splitlines()) > 10


def test_the_program_ends_with_an_error_where_a_file_is_cut_short_or_absent(tmp_path: Path, read: Program) -> None:
    whole = handmade.small_file(tmp_path / "x").read_bytes()
    for length in (0, 1, 7, 8, 9, 100, 700, 1279, 1280, 1380, 1516):
        (tmp_path / "x").write_bytes(whole[:length])
        done = read(tmp_path / "x")
        assert done.returncode == 1 and done.stderr.startswith("not a whole checkpoint: ") and done.stderr.count("\n") == 1
    assert read(tmp_path / "absent").returncode == 1


@pytest.mark.thorough
def test_the_program_touches_no_memory_that_is_not_its_own_whatever_is_in_the_file(
    tmp_path: Path, read_checked: Program
) -> None:
    source, codes = Mutator(seed=3), set[int]()
    whole = handmade.small_file(tmp_path / "x").read_bytes()
    files = [whole, *(whole[:length] for length in range(0, len(whole), 61)), *(source.file() for _ in range(150))]
    for raw in files:
        (tmp_path / "x").write_bytes(raw)
        done = read_checked(tmp_path / "x")
        codes.add(done.returncode)
        assert "anitizer" not in done.stderr and "runtime error" not in done.stderr, (raw, done.stderr)
    assert codes == {0, 1}
