"""Faults of the file system, on purpose: die at any call, let any call fail, write half, or just look on.

Checkpoints make all their calls through the names ``os`` and ``fcntl`` of `oxidizr_ref.checkpoint.disk`. Inside `tapped`
these two names mean stand-ins, which number the calls that touch files and hand each one to a *fault*: a function that gets
the `Call` and decides what becomes of it. ``call.carry_out()`` is what would have happened without it::

    with tapped(kill(7)):               # SIGKILL before call 7 is carried out
        store.save(...)
    with tapped(fail(7, errno.EIO)):    # call 7 raises OSError
        store.save(...)
    with tapped(look_on) as calls:      # nothing goes wrong; afterwards `calls` tells what was called
        store.save(...)

What a directory holds is a `State`: small enough here to be kept, compared and restored as a dictionary.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias
from unittest import mock

from oxidizr_ref.checkpoint import disk

#: Calls by what they do. ``open`` is among the reading ones, though it changes something when it makes a file.
READING = frozenset({"open", "read", "preadv", "lseek", "fstat", "stat", "scandir", "posix_fadvise", "close", "flock"})
CHANGING = frozenset({"write", "pwrite", "ftruncate", "replace", "unlink", "mkdir"})
TAPPED = READING | CHANGING | {"fsync"}


@dataclass(frozen=True)
class Call:
    """One call: its number (from 0), the function's name and arguments, the file it is about (of a rename, the new name)."""

    number: int
    name: str
    arguments: tuple[Any, ...]
    path: Path
    carry_out: Callable[[], Any] = field(repr=False, compare=False)

    @property
    def changes(self) -> bool:
        """Whether it changes the file system (bringing to the disk what is there already is no change)."""
        return self.name in CHANGING or (self.name == "open" and bool(self.arguments[1] & (os.O_CREAT | os.O_TRUNC)))

    @property
    def size(self) -> int:
        """Bytes to be written."""
        return len(self.arguments[1]) if self.name == "pwrite" else 0


Fault: TypeAlias = Callable[[Call], Any]


# --- the stand-ins ----------------------------------------------------------------------------------------------------


class _Tap:
    """Numbers the calls and knows which file a descriptor belongs to."""

    def __init__(self, fault: Fault) -> None:
        self.calls: list[Call] = []
        self._fault = fault
        self._paths: dict[int, Path] = {}

    def call(self, name: str, real: Callable[..., Any], *arguments: Any) -> Any:
        subject = arguments[1] if name == "replace" else arguments[0]
        path = self._paths.get(subject, Path()) if isinstance(subject, int) else Path(subject)
        call = Call(len(self.calls), name, arguments, path, partial(real, *arguments))
        self.calls.append(call)
        result = self._fault(call)
        if name == "open":
            self._paths[result] = path
        return result


class _StandIn:
    """A module whose tapped functions go through the tap; everything else is the module's own."""

    def __init__(self, module: Any, tap: _Tap) -> None:
        self._module, self._tap = module, tap

    def __getattr__(self, name: str) -> Any:
        real = getattr(self._module, name)
        return partial(self._tap.call, name, real) if name in TAPPED else real


@contextmanager
def tapped(fault: Fault) -> Iterator[list[Call]]:
    """Inside this context every call of checkpoints to the file system goes through ``fault``. Yields the calls so far."""
    tap = _Tap(fault)
    with (
        mock.patch.object(disk, "os", _StandIn(os, tap)),
        mock.patch.object(disk, "fcntl", _StandIn(disk.fcntl, tap)),
    ):
        yield tap.calls


# --- faults -----------------------------------------------------------------------------------------------------------


def look_on(call: Call) -> Any:
    """No fault at all."""
    return call.carry_out()


def kill(number: int, cut: int | None = None) -> Fault:
    """SIGKILL this process before call ``number``; with ``cut``, in its middle: ``cut`` bytes of it are written first.

    To die after a call is to die before the next one: nothing happens to a file in between.
    """

    def fault(call: Call) -> Any:
        if call.number == number:
            if cut is not None:
                _write_part(call, cut)
            os.kill(os.getpid(), signal.SIGKILL)
        return call.carry_out()

    return fault


def fail(number: int, code: int) -> Fault:
    """Call ``number`` raises OSError with this code, and has no effect."""
    return fail_where(lambda call: call.number == number, code)


def fail_where(which: Callable[[Call], bool], code: int) -> Fault:
    """Every call for which ``which`` is true raises OSError with this code, and has no effect."""

    def fault(call: Call) -> Any:
        if not which(call):
            return call.carry_out()
        if call.name == "close":
            call.carry_out()  # Linux closes a descriptor whatever it reports
        raise OSError(code, os.strerror(code), str(call.path))

    return fault


def write_short(number: int, count: int) -> Fault:
    """Call ``number``, which writes, writes ``count`` bytes and says so."""
    return lambda call: _write_part(call, count) if call.number == number else call.carry_out()


def write_short_then_fail(number: int, count: int, code: int) -> Fault:
    """Call ``number``, which writes, writes ``count`` bytes and says so; the next write raises: a disk that fills up."""
    return fault_after(write_short(number, count), lambda call: call.name == "pwrite" and call.number > number, code)


def fault_after(first: Fault, which: Callable[[Call], bool], code: int) -> Fault:
    """``first``, and OSError with this code at the first call for which ``which`` is true."""
    failed: list[Call] = []

    def fault(call: Call) -> Any:
        if not failed and which(call):
            failed.append(call)
            raise OSError(code, os.strerror(code), str(call.path))
        return first(call)

    return fault


def _write_part(call: Call, count: int) -> int:
    descriptor, data, offset = call.arguments
    return os.pwrite(descriptor, data[:count], offset)


def cuts(call: Call) -> list[int]:
    """Where to tear a write: after its first byte, in its middle, before its last byte."""
    return sorted({1, call.size // 2, call.size - 1} - {0, call.size}) if call.name == "pwrite" else []


# --- what a directory holds -------------------------------------------------------------------------------------------

#: Names below a directory, with ``/`` between them, and the bytes of the files (None: a directory).
State: TypeAlias = dict[str, bytes | None]
Key: TypeAlias = frozenset[tuple[str, bytes | None]]

_OF_A_PROCESS = re.compile(r"\.[0-9]+\.tmp$")


def snapshot(directory: Path) -> State:
    """Everything below a directory. The number of a process in a temporary name is replaced by 1: it does not matter."""
    found: State = {}

    def walk(path: str, prefix: str) -> None:
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    found[prefix + entry.name] = None
                    walk(entry.path, f"{prefix}{entry.name}/")
                else:
                    with open(entry.path, "rb") as file:
                        found[prefix + _OF_A_PROCESS.sub(".1.tmp", entry.name)] = file.read()

    if directory.is_dir():
        walk(str(directory), "")
    return found


def restore(state: Mapping[str, bytes | None], directory: Path) -> Path:
    """Make ``directory`` hold exactly this."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    for name, data in sorted(state.items(), key=lambda item: item[0].count("/")):
        if data is None:
            (directory / name).mkdir(parents=True, exist_ok=True)
        else:
            (directory / name).write_bytes(data)
    return directory


def fast_place() -> str | None:
    """Where directories are quick to make and to remove: in memory, if the system has such a place."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def key(state: State) -> Key:
    """A state as something that a set can hold."""
    return frozenset(state.items())


# --- another process --------------------------------------------------------------------------------------------------

#: A message from a process that may die at any time: written at once, so that what was said is known.
Event: TypeAlias = list[Any]
Say: TypeAlias = Callable[..., object]


def in_a_fork(work: Callable[[Say], object]) -> tuple[int, list[Event]]:
    """Do ``work(say)`` in a copy of this process. Returns how it ended (-9: killed, 1: it raised), and what it said."""
    reader, writer = os.pipe()
    process = os.fork()
    if process == 0:
        status = 1
        try:
            work(lambda *event: os.write(writer, json.dumps(event).encode() + b"\n"))
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        said = [json.loads(line) for line in file]
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), said
