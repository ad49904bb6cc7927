"""A power cut, on paper: what a disk may hold afterwards, given the calls that were made and what was flushed among them.

`Recorder` notes what a run does to its files; `Machine` plays that back and keeps apart what is on the disk and what is not
yet. What is not may be there after a power cut, or not, piece by piece:

* A write to a file that was not flushed since: all of it, its first half, or nothing, whatever became of the writes before
  and after. The file may have its new size, with zeros in it, or end with what was kept.
* A change of names (make, rename, remove): kept or not, each by itself, until every directory that it touches was synced.
  A rename is one change: both of its sides happen or neither does. Changes that are kept happen in their order. Flushing a
  file does nothing for its name.

That is more than most file systems can do to us, on purpose.
"""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from faults import Call, Event, State

DIRECTORY = 0  # stands for a directory where others have the number of a file


@dataclass(frozen=True)
class Write:
    """Bytes written into a file; or, with ``data`` None, the file was cut there."""

    file: int
    offset: int
    data: bytes | None


@dataclass(frozen=True)
class Flush:
    """A file was brought to the disk; if ``failed``, nobody knows, and the system will not try these writes again."""

    file: int
    failed: bool = False


@dataclass(frozen=True)
class Rename:
    """Names change at once: what each one means from now on (None: nothing)."""

    names: tuple[tuple[str, int | None], ...]


@dataclass(frozen=True)
class Sync:
    """The names in a directory were brought to the disk."""

    directory: str


@dataclass(frozen=True)
class Said:
    """What the run said at this moment: acknowledgements."""

    event: Event


@dataclass(frozen=True)
class Rot:
    """The disk spoiled a file, which it then has; and the account of that."""

    file: int
    data: bytes
    event: Event


Operation: TypeAlias = Rot | Write | Flush | Rename | Sync | Said


# --- what was done ----------------------------------------------------------------------------------------------------


class Recorder:
    """A fault (see `faults`) that lets another one decide what happens, and notes what did, below ``root``."""

    def __init__(self, root: Path, before: State, fault: Callable[[Call], Any]) -> None:
        self.operations: list[Operation] = []
        self._root, self._fault = root, fault
        self._names = numbered(before)
        self._open: dict[int, str] = {}
        self._next = 1 + max(self._names.values(), default=0)
        self._files: dict[int, int] = {}  # the file of each descriptor

    def say(self, *event: Any) -> None:
        """Note an acknowledgement."""
        self.operations.append(Said(list(event)))

    def rot(self, name: str, data: bytes, *event: Any) -> None:
        """Spoil a file."""
        (self._root / name).write_bytes(data)
        self.operations.append(Rot(self._names[name], data, list(event)))

    def __call__(self, call: Call) -> Any:
        path = call.path.relative_to(self._root).as_posix() if call.path.is_relative_to(self._root) else ""
        try:
            result = self._fault(call)
        except OSError:
            if call.name == "fsync" and self._files[call.arguments[0]] != DIRECTORY:
                self._note(Flush(self._files[call.arguments[0]], failed=True))
            raise
        match call.name, call.arguments:
            case "open", (_, flags, *_):
                if path not in self._names and flags & os.O_CREAT:
                    self._rename((path, self._next))
                    self._next += 1
                self._files[result] = self._names.get(path, DIRECTORY)
            case "pwrite", (descriptor, data, offset):
                self._note(Write(self._files[descriptor], offset, bytes(data[:result])))
            case "ftruncate", (descriptor, size):
                self._note(Write(self._files[descriptor], size, None))
            case "fsync", (descriptor,):
                file = self._files[descriptor]
                self._note(Sync(path) if file == DIRECTORY else Flush(file))
            case "replace", (source, _):
                old = Path(source).relative_to(self._root).as_posix()
                self._rename((path, self._names[old]), (old, None))
            case "unlink", _:
                self._rename((path, None))
            case "mkdir", _:
                self._rename((path, DIRECTORY))
        return result

    def _note(self, operation: Operation) -> None:
        self.operations.append(operation)

    def _rename(self, *names: tuple[str, int | None]) -> None:
        self._note(Rename(names))
        _apply(names, self._names)


def numbered(state: State) -> dict[str, int]:
    """The names in a state, each file with a number of its own."""
    return {name: DIRECTORY if state[name] is None else number for number, name in enumerate(sorted(state), 1)}


def _apply(changes: Sequence[tuple[str, int | None]], names: dict[str, int]) -> None:
    for name, file in changes:
        if file is None:
            names.pop(name, None)
        else:
            names[name] = file


# --- what is on the disk ----------------------------------------------------------------------------------------------


@dataclass
class _File:
    flushed: bytes = b""
    pending: list[Write] = field(default_factory=list)
    #: Writes of which a failed flush left it open whether they will ever be on the disk.
    doubtful: list[Write] = field(default_factory=list)


@dataclass
class _Pending:
    change: Rename
    directories: set[str]  # those it waits for


class Machine:
    """A computer to which the operations of a run happen one after another, and which can lose its power in between."""

    def __init__(self, before: State) -> None:
        self._names = numbered(before)
        self._files = {file: _File(before[name] or b"") for name, file in self._names.items() if file != DIRECTORY}
        self._changes: list[_Pending] = []

    def happen(self, operation: Operation) -> None:
        """One operation more."""
        match operation:
            case Write(file, _, _):
                self._files[file].pending.append(operation)
            case Flush(file, failed):
                self._flush(self._files[file], failed)
            case Rename(names):
                self._changes.append(_Pending(operation, {name.rpartition("/")[0] or "." for name, _ in names}))
                for _, number in names:
                    if number:
                        self._files.setdefault(number, _File())
            case Sync(directory):
                for change in self._changes:
                    change.directories.discard(directory)
                while self._changes and not self._changes[0].directories:
                    _apply(self._changes.pop(0).change.names, self._names)
            case Rot(file, data, _):
                self._files[file] = _File(data)
            case Said(_):
                pass

    def _flush(self, file: _File, failed: bool) -> None:
        if failed:
            file.doubtful += file.pending
        else:
            file.flushed = _written(file.flushed, [(write, True) for write in file.pending])
            file.doubtful = [old for old in file.doubtful if not any(_covers(new, old) for new in file.pending)]
        file.pending = []

    def now(self) -> State:
        """What the running system sees."""

        def content(file: _File) -> bytes:
            return _written(file.flushed, [(write, True) for write in (*file.doubtful, *file.pending)])

        return self._state([True] * len(self._changes), content)

    def surely(self) -> State:
        """What the disk holds at the very least."""
        return self._state([not change.directories for change in self._changes], lambda file: file.flushed)

    def all_cuts(self) -> Iterator[State]:
        """Everything that the disk may hold if the power is cut now (writes are kept or lost, none by half)."""
        open_ = [not change.directories for change in self._changes]
        for kept in itertools.product(*((True,) if synced else (True, False) for synced in open_)):
            names = self._kept_names(kept)
            numbers = sorted({number for number in names.values() if number != DIRECTORY})
            for contents in itertools.product(*(sorted(_all_contents(self._files[number])) for number in numbers)):
                data = dict(zip(numbers, contents, strict=True))
                yield {name: None if number == DIRECTORY else data[number] for name, number in names.items()}

    def some_cut(self, chance: random.Random) -> State:
        """Something that the disk may hold if the power is cut now."""
        bias = chance.choice((0.1, 0.5, 0.9))
        return self._state(
            [not change.directories or chance.random() < bias for change in self._changes],
            lambda file: _some_content(file, bias, chance),
        )

    def _state(self, kept: Sequence[bool], content: Callable[[_File], bytes]) -> State:
        names = self._kept_names(kept)
        return {name: None if number == DIRECTORY else content(self._files[number]) for name, number in names.items()}

    def _kept_names(self, kept: Sequence[bool]) -> dict[str, int]:
        names = dict(self._names)
        for change, keep in zip(self._changes, kept, strict=True):
            if keep:
                _apply(change.change.names, names)
        return {name: number for name, number in names.items() if _is_reachable(name, names)}


def _is_reachable(name: str, names: Mapping[str, int]) -> bool:
    """Whether the directories above a name have names themselves."""
    above = name.rpartition("/")[0]
    return not above or (names.get(above) == DIRECTORY and _is_reachable(above, names))


def _covers(new: Write, old: Write) -> bool:
    """Whether what ``new`` wrote makes it unimportant what became of ``old``."""
    if new.data is None or old.data is None:
        return False
    return new.offset <= old.offset and old.offset + len(old.data) <= new.offset + len(new.data)


def _written(data: bytes, writes: Sequence[tuple[Write, bool | float]], size: int | None = None) -> bytes:
    """A file's bytes after these writes, each kept or not or (a fraction) in part; with a ``size``, of this size."""
    result = bytearray(data)
    for write, kept in writes:
        if write.data is None:
            if kept:
                del result[write.offset :]
            continue
        part = write.data[: int(len(write.data) * kept)]
        if part:
            result += bytes(max(0, write.offset - len(result)))
            result[write.offset : write.offset + len(part)] = part
    if size is not None:
        result = result[:size] + bytes(max(0, size - len(result)))
    return bytes(result)


def _all_contents(file: _File) -> set[bytes]:
    writes = [*file.doubtful, *file.pending]
    size = len(_written(file.flushed, [(write, True) for write in writes]))
    choices = [list(zip(writes, kept, strict=True)) for kept in itertools.product((True, False), repeat=len(writes))]
    return {_written(file.flushed, choice, limit) for choice in choices for limit in (None, size)}


def _some_content(file: _File, bias: float, chance: random.Random) -> bytes:
    writes = [*file.doubtful, *file.pending]
    kept = [(write, chance.choice((0.5, 1)) if chance.random() < bias else 0) for write in writes]
    size = len(_written(file.flushed, [(write, True) for write in writes]))
    return _written(file.flushed, kept, chance.choice((None, size)) if writes else None)
