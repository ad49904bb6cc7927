"""SIGKILL at every moment: no acknowledged checkpoint is ever lost, and the next run continues with no cleaning by hand.

`kills` does it, in a process of its own: every scenario of `promises` is carried out in a forked process that kills itself
before one of its calls to the file system, or in the middle of a write; what it left is examined and recovered from; and
that recovery is killed, too. The kernel's own word on it is asked for with strace, which kills at a system call.
"""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from faults import Call, Event, State, snapshot, tapped
from promises import Scenario, check_crash, check_end, check_found, found_by, recovery, scenarios, tiny_world

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes cannot be forked here")

KILLS = Path(__file__).with_name("kills.py")


def examine(*options: str) -> dict[str, int]:
    """Run kills.py. Returns its counts."""
    done = subprocess.run(
        [sys.executable, "-W", "error", str(KILLS), *options],
        env=tiny.environment(OPENBLAS_NUM_THREADS="1"),  # it starts its threads when it is imported
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    counts: dict[str, int] = json.loads(done.stdout)
    return counts


@pytest.mark.thorough
def test_a_kill_at_any_moment_of_any_work_or_of_its_recovery_loses_nothing_and_needs_no_cleaning() -> None:
    assert examine()["kills"] >= 500  # different ones: no two at the same moment of the same work on the same directory


@pytest.mark.long
def test_a_kill_at_every_moment_of_every_recovery_loses_nothing_and_needs_no_cleaning() -> None:
    assert examine("--thorough")["kills"] >= 10_000


@pytest.mark.thorough
def test_a_training_killed_twice_at_its_calls_makes_the_same_bytes() -> None:
    assert examine("--training", "2") == {"kills": 4}


@pytest.mark.long
def test_a_training_killed_twice_at_any_of_its_calls_makes_the_same_bytes() -> None:
    assert examine("--training", "60") == {"kills": 120}


# --- killed by the kernel ---------------------------------------------------------------------------------------------

#: System calls by the functions that make them: an expression for strace, and what a tap calls it.
SYSTEM_CALLS = {"pwrite64": "pwrite", "fsync": "fsync", "/^rename": "replace", "/^unlink": "unlink"}
MOMENTS = [("pwrite64", 9), ("fsync", 12), ("/^rename", 4), ("/^unlink", 1)]


@pytest.fixture
def back() -> Iterator[Scenario]:
    """Going back to an earlier step: the work with the most kinds of calls."""
    with tiny_world():
        yield scenarios()["back to an earlier step"]


def _killed_by_strace(scenario: Scenario, directory: Path, call: str, number: int) -> tuple[int, list[Event]]:
    """Carry out a scenario, killed at its ``number``-th system call of a kind. Returns how it ended, and what it said."""
    scenario.place(directory)
    strace = ["strace", "-f", "-o", os.devnull, "-e", f"trace={call}", "-e", f"inject={call}:signal=KILL:when={number}"]
    done = subprocess.run(
        [*strace, sys.executable, "-B", str(KILLS), "--run", str(directory), json.dumps(scenario.work.keywords)],
        env=tiny.environment(OPENBLAS_NUM_THREADS="1"),
        capture_output=True,
        text=True,
    )
    assert "strace:" not in done.stderr, done.stderr
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]


def _states_around(scenario: Scenario, directory: Path, name: str) -> list[list[State]]:
    """What is there before and after each call of this name, in order."""
    scenario.place(directory)
    around: list[list[State]] = []

    def look(call: Call) -> Any:
        if call.name != name:
            return call.carry_out()
        before = snapshot(directory)
        try:
            return call.carry_out()
        finally:
            around.append([before, snapshot(directory)])

    with tapped(look):
        scenario.work(directory, lambda *_: None)
    return around


def _assert_a_kill_at_a_system_call_is_one_of_the_matrix(
    scenario: Scenario, directory: Path, call: str, number: int
) -> bool:
    """Returns whether the work has so many calls; if it does, it was killed there, and the promises were kept."""
    around = _states_around(scenario, directory, SYSTEM_CALLS[call])
    status, said = _killed_by_strace(scenario, directory, call, number)
    if number > len(around):
        assert status == 0
        return False
    assert status in (-9, 137)
    state, ledger = snapshot(directory), scenario.ledger.after(said)
    assert state in around[number - 1]
    check_crash(state, ledger)
    account = ledger.settled(state)
    until, recover = recovery(state, account)
    events: list[Event] = []
    recover(directory, lambda *event: events.append(list(event)))
    check_found(state, account, found_by(events))
    check_end(snapshot(directory), account.after(events), until)
    return True


def _strace_works() -> bool:
    strace = shutil.which("strace")
    return strace is not None and subprocess.run([strace, "-o", os.devnull, "true"], capture_output=True).returncode == 0


needs_strace = pytest.mark.skipif(not _strace_works(), reason="strace is not installed, or may not trace")


@pytest.mark.thorough
@needs_strace
@pytest.mark.parametrize(("call", "number"), MOMENTS)
def test_a_kill_at_a_system_call_leaves_what_the_matrix_says_and_is_recovered_from(
    back: Scenario, tmp_path: Path, call: str, number: int
) -> None:
    assert _assert_a_kill_at_a_system_call_is_one_of_the_matrix(back, tmp_path / "run", call, number)


@pytest.mark.long
@needs_strace
@pytest.mark.parametrize("call", SYSTEM_CALLS)
def test_a_kill_at_any_system_call_leaves_what_the_matrix_says_and_is_recovered_from(
    back: Scenario, tmp_path: Path, call: str
) -> None:
    number = 1
    while _assert_a_kill_at_a_system_call_is_one_of_the_matrix(back, tmp_path / "run", call, number):
        number += 1
    assert number > 2


# --- what the matrix sees ---------------------------------------------------------------------------------------------

#: What the other files may use of `os`: names that touch no file.
HARMLESS = {"getpid", "PathLike", "fspath"}
#: What touches files, by whatever it is called on; but for `Path.replace`, which looks like that of a string.
METHODS = {"read_bytes", "read_text", "write_bytes", "write_text", "open", "touch", "unlink", "rename", "mkdir", "rmdir"}
METHODS |= {"symlink_to", "hardlink_to", "chmod", "glob", "rglob", "stat", "lstat", "fromfile", "tofile", "memmap"}
MODULES = {"shutil", "io", "tempfile", "glob", "subprocess", "fcntl"}


def _touches(node: ast.AST) -> str | None:
    match node:
        case ast.Import(names=names) if {name.name for name in names} & MODULES:
            return ast.unparse(node)
        case ast.ImportFrom(module=module) if module in MODULES | {"os"}:
            return ast.unparse(node)
        case ast.Call(func=ast.Name(id="open")):
            return "open"
        case ast.Attribute(value=ast.Name(id="os"), attr=name) if name not in HARMLESS:
            return f"os.{name}"
        case ast.Attribute(value=ast.Name(id="disk" | "store")):
            return None
        case ast.Attribute(attr=name) if name in METHODS:
            return name
    return None


def test_nothing_in_checkpoints_but_disk_py_touches_files_so_that_no_call_goes_unseen() -> None:
    """It may look (`Path.is_dir`, `exists`, `iterdir`, and mmap of an open file to read it), and no more."""
    sources = sorted((tiny.PACKAGE / "checkpoint").glob("*.py"))
    trees = {path.name: ast.parse(path.read_text(encoding="utf-8")) for path in sources}
    found = {name: [what for node in ast.walk(tree) if (what := _touches(node))] for name, tree in trees.items()}
    assert len(found.pop("disk.py")) > 10  # the search finds what is there
    assert {name: what for name, what in found.items() if what} == {}
