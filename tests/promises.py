"""Runs of a few bytes a step, and what their checkpoint directory has promised at any moment, whatever happens to it.

A run here is `carry_out`: the calls to the store that `Trainer.fit` makes, in its order, with arrays that are a function of
(step, tag) in the place of training. The tag stands for the config: two branches have two tags. While it goes on, a run
*says* what was acknowledged to it. A `Ledger` keeps the account of that, and so knows

* `check_crash`: what must be found in the directory of a run that died at any moment,
* `check_found`: where the next run must continue,
* `check_end`: what must be there when that next run has ended, after no cleaning by hand.
"""

from __future__ import annotations

import functools
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias
from unittest import mock

import numpy as np
from faults import Event, Say, State, restore, snapshot

from oxidizr_ref import parallel
from oxidizr_ref.checkpoint import format, header
from oxidizr_ref.checkpoint.store import CheckpointStore, Retention
from oxidizr_ref.errors import SaveError, UsageError

EVERY = 2  # steps between two saves
KEEP = 2  # files that retention keeps

File: TypeAlias = tuple[int, str]  # (step, tag)

_STEP = re.compile(r"step_([0-9]+)\.safetensors")
_TAG = re.compile(rb'"tag":"([a-z])"')
_EXPECTED_NAMES = re.compile(
    r"config\.json|metrics\.jsonl|run\.json|\.lock|step_[0-9]+\.safetensors"
    r"|superseded(/[0-9]+(/(step_[0-9]+\.safetensors|metrics\.jsonl))?)?|quarantine(/step_[0-9]+\.[0-9]+\.safetensors)?"
)


# --- tiny runs --------------------------------------------------------------------------------------------------------


@contextmanager
def tiny_world() -> Iterator[None]:
    """One thread, so that calls have one order; and chunks of 16 bytes, so that a tensor has several."""
    before = parallel.get_threads()
    parallel.set_threads(1)
    try:
        with mock.patch.object(format, "CHUNK_BYTES", 16):
            yield
    finally:
        parallel.set_threads(before)


def tensors(step: int, tag: str) -> dict[str, Any]:
    """The whole state of a run at a step: two tensors, of one and two chunks."""
    number = 1000 * ord(tag) + step
    return {"m": np.arange(2.0) + number, "w": np.arange(6, dtype=np.float32) * number}


def metadata(step: int, tag: str) -> dict[str, str]:
    return {"progress": json.dumps({"step": step}), "tag": tag}


@functools.cache
def file_bytes(step: int, tag: str) -> bytes:
    """The step file that an undisturbed run writes."""
    with tiny_world():
        arrays = tensors(step, tag)
        described = format.describe(arrays, metadata(step, tag))
        payload = b"".join(arrays[entry.name].tobytes() for entry in described.entries)
        return header.encode(described, described.digests) + payload


def rotten(step: int, tag: str) -> bytes:
    """The same with one bit changed."""
    return file_bytes(step, tag)[:-1] + bytes([file_bytes(step, tag)[-1] ^ 1])


def line(step: int, tag: str) -> dict[str, Any]:
    """The metrics of a step."""
    return {"step": step, "tag": tag, "loss": 1 / step}


def carry_out(
    directory: Path,
    say: Say,
    *,
    until: int,
    tag: str = "a",
    resume: str | None = "auto",
    keep: int = KEEP,
    stubborn: bool = False,
) -> None:
    """Train to step ``until``.

    resume: ``auto``, a file's name relative to ``directory``, or None to start over. stubborn: go on when a save or a line
    cannot be written, as training does.
    """
    store = CheckpointStore(directory, Retention(keep))
    say("runs", tag, keep)
    with store.claimed():
        wish = resume if resume in (None, "auto") else os.path.normpath(directory / resume)
        found = store.find(wish) if wish else None
        step = json.loads(found.checkpoint.metadata["progress"])["step"] if found else 0
        elsewhere = found is not None and found.path.parent != directory
        if found is not None:
            store.resumed_from = step
            if not elsewhere:
                say("found", step, found.checkpoint.metadata["tag"])
        store.open({"tag": tag})
        try:
            store.quarantine(found.damaged if found else [])
        except OSError as error:
            raise UsageError(f"{error}") from error
        first = step if elsewhere else step + 1
        moving = elsewhere or any(other >= first for other in store.steps())
        if moving:
            say("moving", first, step, tag, elsewhere)
        store.supersede(first, step, (tensors(step, tag), metadata(step, tag)) if elsewhere else None)
        if moving:
            say("moved")
        say("began", step, tag)
        is_saved = True
        for n in range(step + 1, until + 1):
            with suppress(SaveError) if stubborn else nullcontext():
                store.log(line(n, tag))
            if n % EVERY == 0:
                try:
                    store.save(n, tensors(n, tag), metadata(n, tag))
                    say("saved", n, tag)
                    is_saved = True
                except SaveError:
                    say("failed", n)
                    is_saved = False
                    if not stubborn:
                        raise
        if is_saved:
            say("ending")
            store.end()


def save_again(directory: Path, say: Say, *, step: int, tag: str = "a") -> None:
    """Save a step whose file stands there already."""
    store = CheckpointStore(directory, Retention(KEEP))
    say("runs", tag, KEEP)
    with store.claimed():
        store.open({"tag": tag})
        store.save(step, tensors(step, tag), metadata(step, tag))
        say("saved", step, tag)


def silent(*_: Any) -> None:
    """For runs that nobody keeps an account of."""


# --- what was promised ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Move:
    """A branch that is being left: its files from step ``first`` on are to go, the new one (``tag``) goes on from
    ``progress``, with a file from ``elsewhere`` or one that stands here."""

    first: int
    progress: int
    tag: str
    elsewhere: bool


@dataclass(frozen=True)
class Ledger:
    """What was acknowledged.

    saved: files on the branch that the run is on, but for those that retention may let go. abandoned: those of branches
    that were left. damaged: damaged files that somebody put there. start: the step that the run goes on from, while it goes
    on. move: the branch being left. lines: (after which step, tag): who wrote the metrics. tag, keep: of the run.
    tried: the last step that could not be saved, as it was told; it may be there nevertheless.
    """

    saved: frozenset[File] = frozenset()
    abandoned: frozenset[File] = frozenset()
    damaged: frozenset[bytes] = frozenset()
    start: int | None = None
    move: Move | None = None
    lines: tuple[File, ...] = ()
    tag: str = "a"
    keep: int = KEEP
    tried: int = 0

    def after(self, events: list[Event]) -> Ledger:
        """The account after a run has said all this."""
        ledger = self
        for kind, *about in events:
            ledger = getattr(ledger, f"_{kind}")(*about)
        return ledger

    def _runs(self, tag: str, keep: int) -> Ledger:
        return replace(self, tag=tag, keep=keep)

    def _found(self, step: int, tag: str) -> Ledger:
        """A file that a run goes on from counts from then on, even if the run that wrote it died before it knew."""
        return replace(self, saved=self.saved | {(step, tag)}, start=None)

    def _moving(self, *about: Any) -> Ledger:
        return replace(self, move=Move(*about))

    def _moved(self) -> Ledger:
        assert self.move is not None
        gone = {(step, tag) for step, tag in self.saved if step >= self.move.first}
        begins = {(self.move.progress, self.move.tag)} if self.move.elsewhere else set()
        return replace(self, saved=self.saved - gone | begins, abandoned=self.abandoned | gone, move=None)

    def _began(self, step: int, tag: str) -> Ledger:
        lines = (*(part for part in self.lines if part[0] < step), (step, tag))
        return replace(self, start=step or None, lines=lines, tried=0)

    def _damaged(self, step: int) -> Ledger:
        """A bit of a file is changed: it is no file of the account any more, but must not be lost either."""
        tag = next(tag for other, tag in self.saved if other == step)
        return replace(self, saved=self.saved - {(step, tag)}, damaged=self.damaged | {rotten(step, tag)})

    def _failed(self, step: int) -> Ledger:
        return replace(self, tried=step)

    def _saved(self, step: int, tag: str) -> Ledger:
        return replace(self, saved=self.saved | {(step, tag)})._let_go()

    def _ending(self) -> Ledger:
        return replace(self, start=None)._let_go()

    def _let_go(self) -> Ledger:
        """Retention has deleted the old ones, or may do so at any moment."""
        newest = sorted(self.saved)[-self.keep :]
        return replace(self, saved=frozenset(file for file in self.saved if file in newest or file[0] == self.start))

    def settled(self, state: State) -> Ledger:
        """The account of a directory whose run died: if the move it had in mind was begun, it counts, else it never was."""
        if self.move is None:
            return self
        here = present(state)
        if self.move.elsewhere:
            begun = (self.move.progress, self.move.tag) in here
        else:
            begun = not any((step, tag) in here for step, tag in self.saved if step >= self.move.first)
        return self._moved() if begun or note(state) else replace(self, move=None)

    def newest(self) -> File:
        """The newest file of the branch (step 0: there is none)."""
        return max(self.saved, default=(0, self.tag))


def present(state: State, place: str = "") -> set[File]:
    """The whole step files directly in the directory, or below ``place``."""
    found = set()
    for name, data in state.items():
        folder, _, last = name.rpartition("/")
        named = _STEP.fullmatch(last)
        tagged = _TAG.search(data or b"")
        if named and tagged and (folder.startswith(place) if place else not folder):
            file = int(named[1]), tagged[1].decode()
            found |= {file} if data == file_bytes(*file) else set()
    return found


def note(state: State) -> Mapping[str, Any] | None:
    """What run.json says the directory is in the middle of."""
    data = state.get("run.json")
    return json.loads(data)["superseding"] if data else None


def check_crash(state: State, ledger: Ledger) -> None:
    """Whatever moment a run died at: no acknowledged file is lost, and none is there by half. Raises AssertionError."""
    here, aside, under_way = present(state), present(state, "superseded"), note(state) is not None
    steps = {step for step, _ in here}
    for name, data in state.items():
        match = _STEP.fullmatch(name)
        assert not match or int(match[1]) in steps or data in ledger.damaged, f"{name} is there by half"
    for step, tag in ledger.saved:
        let_go = step != ledger.start and sum(other > step for other in steps) >= ledger.keep > 0
        moved = ledger.move is not None and step >= ledger.move.first and (step, tag) in aside
        to_come = under_way and state.get(".incoming.safetensors") == file_bytes(step, tag)
        assert (step, tag) in here or let_go or moved or to_come, f"step {step} of branch {tag} is lost"
    for file in ledger.abandoned:
        assert file in aside or (under_way and file in here), f"step {file[0]} of the branch {file[1]} that was left is lost"
    for data in ledger.damaged:
        assert data in state.values(), "a damaged file is lost"


def found_by(events: list[Event]) -> File | None:
    """The file that a run said it goes on from."""
    return next(((event[1], event[2]) for event in events if event[0] == "found"), None)


def recovery(state: State, ledger: Ledger) -> tuple[int, Callable[[Path, Say], None]]:
    """What somebody does after a crash, and the step it goes to: the command of the run that died, with ``--resume auto``.
    It saves at least once."""
    own = {step for step, tag in present(state) if tag == ledger.tag}
    until = EVERY + max(ledger.newest()[0], *own, 0)
    return until, functools.partial(carry_out, until=until, tag=ledger.tag)


def check_found(state: State, ledger: Ledger, found: File | None) -> None:
    """Where the next run goes on from: the newest acknowledged file of the settled account, or one tried after it."""
    newest = ledger.newest()
    tried = range(newest[0] + EVERY, max(newest[0], ledger.tried) + EVERY + 1, EVERY)
    allowed = {newest if newest[0] else None, *((step, ledger.tag) for step in tried)}
    assert found in allowed, f"continued from {found}, not from {newest}, in {sorted(state)}"


def check_end(state: State, ledger: Ledger, until: int) -> None:
    """When a run to step ``until`` has ended: all is in its place, and nothing else is there."""
    check_crash(state, ledger)
    strange = sorted(name for name in state if not _EXPECTED_NAMES.fullmatch(name))
    assert not strange, f"left behind: {strange}"
    assert note(state) is None
    here = sorted(present(state))
    assert len(here) <= KEEP and here[-1] == (until, ledger.tag), f"retention left {here}"
    assert json.loads(state["config.json"] or b"") == {"tag": ledger.tag}
    written = [json.loads(text) for text in (state["metrics.jsonl"] or b"").splitlines()]
    writers = [[tag for after, tag in ledger.lines if after < n] for n in range(1, until + 1)]
    expected = [line(n, tags[-1]) for n, tags in enumerate(writers, 1) if tags]  # a backup brings no lines of its own
    assert written == expected, f"metrics are {written}"


# --- what may be interrupted ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scenario:
    """A directory, what it has promised so far, and what is done with it next."""

    name: str
    prior: State
    ledger: Ledger
    work: functools.partial[None]  # of (directory, say)

    def place(self, directory: Path) -> Path:
        """Make ``directory`` as it is before, and a backup of another run beside it."""
        restore(self.prior, directory)
        if not self.prior:
            directory.rmdir()
        directory.with_name("backup.safetensors").write_bytes(file_bytes(4, "x"))
        return directory


def scenarios() -> dict[str, Scenario]:
    """All that a run does to its directory, by name."""
    with tiny_world(), tempfile.TemporaryDirectory() as place:
        directory = Path(place) / "run"

        def made(*runs: Mapping[str, Any]) -> tuple[State, Ledger]:
            events: list[Event] = []
            restore({}, directory)
            for options in runs:
                carry_out(directory, lambda *event: events.append(list(event)), **options)
            return snapshot(directory), Ledger().after(events)

        nothing: tuple[State, Ledger] = ({}, Ledger())
        two, four = made({"until": 4}), made({"until": 8, "keep": 0})
        branched = made({"until": 6, "keep": 0}, {"until": 6, "resume": "step_4.safetensors", "tag": "b", "keep": 0})

    def run(name: str, prior: tuple[State, Ledger], until: int, **options: Any) -> Scenario:
        return Scenario(name, *prior, functools.partial(carry_out, until=until, **options))

    found = [
        run("a first save", nothing, 4),
        run("saves that let go of old files", two, 8),
        run("a run that only ends", two, 4),
        Scenario("an equal file is there", *two, functools.partial(save_again, step=4)),
        Scenario("a damaged file is there", *_damaged(two, 4), functools.partial(save_again, step=4)),
        run("the newest two are damaged", _damaged(_damaged(four, 6), 8), 6),
        run("back to an earlier step", four, 8, resume="step_4.safetensors", tag="b"),
        run("back a second time", branched, 4, resume="step_2.safetensors", tag="a"),
        run("a backup begins a branch", four, 6, resume="../backup.safetensors", tag="b"),
        run("a backup takes the place of the newest", two, 6, resume="../backup.safetensors", tag="b"),
        run("a backup begins a directory", nothing, 6, resume="../backup.safetensors", tag="b"),
        run("starting over", two, 4, resume=None, tag="b"),
        run("what dead writers left", _littered(two), 6),
    ]
    return {scenario.name: scenario for scenario in found}


def _damaged(prior: tuple[State, Ledger], step: int) -> tuple[State, Ledger]:
    state, ledger = prior
    return {**state, f"step_{step}.safetensors": rotten(step, "a")}, ledger.after([["damaged", step]])


def _littered(prior: tuple[State, Ledger]) -> tuple[State, Ledger]:
    """Writers died here at every bad moment at once, one of them with half a metric line written."""
    state, ledger = prior
    whole = file_bytes(6, "b")
    names = (".step_6.safetensors.1.tmp", ".config.json.tmp", ".run.json.tmp", ".metrics.jsonl.tmp")
    litter = {name: whole[: len(whole) // 2] for name in names}
    half = (state["metrics.jsonl"] or b"") + b'{"step": 5, "ta'
    return {**state, **litter, ".incoming.safetensors": whole, "metrics.jsonl": half}, ledger
