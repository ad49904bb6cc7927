"""Histories: what processes and people may do to a run between its steps, and what must come of it.

A `World` lives through `Action`s: processes that are killed, stopped, limited in time, branched off, resumed from copies,
with other threads, intervals and retention each time, and people who copy and delete files in between. After every one of
them everything on the disk is compared with the *reference*: the same config, run once, in one process, with every step
saved, logged and evaluated. Nothing else is known: what a process should begin with, do, keep and write is predicted here,
from the rules of docs/checkpoints.md.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import forge
import tiny

Record = dict[str, Any]

#: What routers did is written to metrics.jsonl alone; a process does not print it.
NOT_PRINTED = frozenset({"expert_load", "expert_entropy", "balance_loss", "dropped_tokens"})

# --- what happens -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bits:
    """What determines the bits of a run: the same for all its processes."""

    architecture: str
    model: dict[str, Any]
    trainer: dict[str, Any]
    characters: int
    #: The package's own tiles, and interpreters of their own wherever nothing happens to a process.
    apart: bool = False


@dataclass(frozen=True)
class Manner:
    """How one process goes about it: nothing here may change a bit."""

    threads: int = 1
    prefetch: int = 0
    async_save: bool = False
    save_interval: int = 1
    log_interval: int = 1
    eval_interval: int = 0
    max_checkpoints: int = 0
    keep_every: int = 0
    keep_best: int = 0

    def flags(self) -> list[object]:
        flags: list[object] = ["--threads", self.threads, "--prefetch", self.prefetch]
        flags += ["--save-interval", self.save_interval, "--max-checkpoints", self.max_checkpoints]
        for key in ("async_save", "log_interval", "eval_interval", "keep_every", "keep_best"):
            flags += ["--set", f"trainer.{key}={json.dumps(getattr(self, key))}"]
        return flags


@dataclass(frozen=True)
class Action:
    """A process, or what somebody does to the files; the numbers choose among what there is."""

    kind: str
    end: str = "left alone"
    which: int = 0
    moment: int = 0
    manner: Manner = field(default_factory=Manner)


KILLS = ("logged", "renaming", "accumulating", "replacing", "writing")
STOPS = {"SIGTERM": 143, "SIGINT": 130, "SIGTERM-within": 143, "time": 0, "shorter": 0}
SAVES = ("SIGUSR1", "SAVE")
HANDS = ("copy a file", "delete a file", "look")


# --- what should be there ---------------------------------------------------------------------------------------------


@dataclass
class Place:
    """A checkpoint directory, and what should be in it: its metric lines, and what it put away, branch by branch."""

    directory: Path
    lines: list[Record] = field(default_factory=list)
    superseded: list[tuple[list[int], list[Record]]] = field(default_factory=list)

    def files(self) -> list[Path]:
        """All step files here, and those that were put away."""
        return [*self.directory.glob("step_*.safetensors"), *self.directory.glob("superseded/*/step_*.safetensors")]

    def steps(self) -> set[int]:
        """The steps that a process will find here: those whose files are here once an interrupted move is finished."""
        there, task = set(tiny.steps_in(self.directory)), self.move_under_way()
        if task is None:
            return there
        waits = (self.directory / ".incoming.safetensors").exists()
        moved = set(task["steps"]) if waits or not task["begins"] else set()
        return there - moved | ({task["progress"]} if waits else set())

    def move_under_way(self) -> Record | None:
        note = self.directory / "run.json"
        task: Record | None = json.loads(note.read_text())["superseding"] if note.exists() else None
        return task

    def lines_found(self) -> list[Record]:
        """The whole lines; a process that was killed may have left half of one, which the next one cuts off."""
        path = self.directory / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        records = [json.loads(line) for line in lines if line.endswith("\n")]
        return [{key: value for key, value in record.items() if key not in tiny.OF_THE_MACHINE} for record in records]

    def superseded_found(self) -> list[tuple[list[int], list[Record]]]:
        numbers = sorted(int(path.name) for path in self.directory.glob("superseded/*"))
        branches = [Place(self.directory / "superseded" / str(number)) for number in numbers]
        found = [(tiny.steps_in(branch.directory), branch.lines_found()) for branch in branches]
        return [branch for branch in found if branch != ([], [])]


@dataclass(frozen=True)
class Forecast:
    """What a process should do: from which step to which, saving which; how it ends, and whether just there."""

    begin: int
    last: int
    saves: list[int]
    moments: str = ""
    flags: tuple[object, ...] = ()
    code: int = 0
    #: Known are: the last step it does (else it is this one or an earlier one); the files it leaves behind.
    knows_last: bool = True
    knows_files: bool = True
    #: It came to the end of the training it was asked for, and evaluates that.
    finishes: bool = False


def forecast(action: Action, begin: int, total: int, accumulates: bool, may_be_shorter: bool) -> Forecast:
    every, end, manner = action.manner.save_interval, action.end, action.manner
    if begin == total:
        return Forecast(begin, total, [], finishes=True)
    end = "logged" if end == "accumulating" and not accumulates else end
    end = "time" if end == "shorter" and not may_be_shorter else end
    step = begin + 1 + action.moment % (total - begin)
    if end == "renaming":
        step = min(total, -(-step // every) * every)  # of a step that is saved

    def saves(last: int, *more: int) -> list[int]:
        return sorted({s for s in range(begin + 1, last + 1) if s % every == 0 or s in more})

    if end in ("replacing", "writing"):
        moments = f"replacing:{1 + action.moment % 8}" if end == "replacing" else f"writing:{1 + 5 * action.moment}"
        return Forecast(begin, total, saves(total, total), moments, (), -9, False, False, True)
    moments = f"{end}:{step}"
    if end in KILLS:
        last = total if end == "renaming" and manner.async_save else step - (end == "accumulating")
        done = saves(last, last) if last == total != step else saves(step - 1)
        return Forecast(begin, last, done, moments, (), -9, last == step or end != "renaming", not manner.async_save)
    if end in ("SIGTERM", "SIGINT", "SIGTERM-within"):
        last = step - (end == "SIGTERM-within")
        return Forecast(begin, last, saves(last, last), moments, code=130 if end == "SIGINT" else 143)
    if end == "shorter":
        return Forecast(begin, step, saves(step, step), flags=("--max-steps", step), finishes=True)
    if end == "time":
        return Forecast(begin, step, saves(step, step), moments, ("--time-limit", 1000), finishes=step == total)
    if end in SAVES:
        return Forecast(begin, total, saves(total, total, step), moments, finishes=True)
    return Forecast(begin, total, saves(total, total), finishes=True)


def after_retention(manner: Manner, there: Iterable[int], lines: Iterable[Record], needed: Iterable[int] = ()) -> set[int]:
    """The steps that stay: the newest, the multiples, those with the lowest held-out losses, those that are needed."""
    steps = sorted(there)
    if manner.max_checkpoints == 0:
        return set(steps)
    losses = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line and "final" not in line}
    best = sorted((losses[step], step) for step in steps if step in losses)[: manner.keep_best]
    multiples = (step for step in steps if manner.keep_every and step % manner.keep_every == 0)
    return {*steps[-manner.max_checkpoints :], *(step for _, step in best), *multiples, *needed}


class World:
    """A run, everything that became of it, and the reference."""

    def __init__(self, root: Path, bits: Bits, seen: Counter[str]) -> None:
        self.root, self.bits, self.seen = root, bits, seen
        self.run = tiny.make_run(root, bits.model, bits.trainer, characters=bits.characters)
        self.evaluates = bool(bits.trainer["eval_fraction"])
        alone = self.run.into("reference")
        self._process(alone, Manner(eval_interval=1).flags(), "", 0)
        self.files = {step: alone.path(step).read_bytes() for step in alone.steps()}
        self.records = [line for line in alone.metrics() if "final" not in line]
        assert [record["step"] for record in self.records] == sorted(self.files), "every step is known"
        self.total = len(self.records)
        self.place = Place(root / "run-0")
        self.left: list[Place] = []  # the places of before
        self.copies: list[tuple[Path, int]] = []
        for what in (bits.architecture, bits.model["dtype"], bits.trainer["lr_schedule"]):
            self.saw(what)
        norm = self.bits.trainer["max_grad_norm"]
        routed = all(NOT_PRINTED <= record.keys() for record in self.records)
        assert routed == ("num_experts" in bits.model)
        self.saw("experts are balanced", routed and bits.trainer.get("load_balance_alpha"))
        self.saw("epoch crossed", self.records[-1]["epoch"] > 1)
        self.saw("clipped", 0 < norm < max(record["grad_norm"] for record in self.records))
        self.saw("not clipped", norm > max(record["grad_norm"] for record in self.records))

    def saw(self, what: str, whether: object = True) -> None:
        if whether:
            self.seen[what] += 1

    def _start(self, argv: Sequence[str], moments: str) -> forge.Ended:
        return (forge.run_apart if self.bits.apart else forge.run)(argv, self.root, moments=moments)

    def _process(self, run: tiny.Run, flags: Sequence[object], moments: str, *codes: int) -> forge.Ended:
        ended = self._start(run.argv(*flags), moments)
        assert ended.code in codes, (ended.code, ended.err)
        return ended

    def line(self, step: int, manner: Manner) -> Record | None:
        """The metric line of a step, if it is logged."""
        record = dict(self.records[step - 1])
        if not (manner.eval_interval and step % manner.eval_interval == 0):
            record.pop("eval_loss", None)
        return record if step == 1 or step % manner.log_interval == 0 or "eval_loss" in record else None

    # --- what is done -------------------------------------------------------------------------------------------------

    def do(self, action: Action) -> None:
        steps = tiny.steps_in(self.place.directory)
        self.saw(action.kind)
        if action.kind == "look" and steps:
            before = tiny.snapshot(self.root)
            for command in ("verify", "inspect"):
                assert self._start([command, str(self.place.directory)], "").code == 0
            assert tiny.snapshot(self.root) == before, "looking changes nothing"
        if action.kind == "delete a file" and steps:
            (self.place.directory / f"step_{steps[action.which % len(steps)]}.safetensors").unlink()
        if action.kind.startswith("copy") and steps:
            self.copy(steps[action.which % len(steps)], ["model_v1.safetensors", "a backup", ""][action.which % 3])
        if action.kind not in HANDS:
            self.train(action)
        self.compare()

    def copy(self, step: int, name: str) -> None:
        folder = self.root / f"copy-{len(self.copies)}"
        folder.mkdir()
        path = self.place.directory / f"step_{step}.safetensors"
        self.copies.append((Path(shutil.copy(path, folder / (name or path.name))), step))

    def _beginning(self, action: Action) -> tuple[int, list[object], int]:
        """(the step the process should begin at, the flags for it, the first step whose file it puts away)."""
        if action.kind.startswith("copy") and self.copies:
            path, step = self.copies[action.which % len(self.copies)]
            if action.kind == "copy, new directory":
                self.left.append(self.place)
                self.place = Place(self.root / f"run-{len(self.left)}")
            self.saw("resumed from a copy")
            return step, ["--resume", path], step
        steps = sorted(self.place.steps())
        if action.kind == "overwrite":
            return 0, ["--overwrite"], 0
        if not steps:
            return 0, ["--resume", "auto"] if action.which % 2 else [], 0
        if action.kind == "older step":
            step = steps[: len(steps) - 1 or 1][action.which % (len(steps) - 1 or 1)]
            return step, ["--resume", self.place.directory / f"step_{step}.safetensors"], step + 1
        return steps[-1], ["--resume", "auto"], steps[-1] + 1

    def train(self, action: Action) -> None:
        """A process: what it should do, what it did, and what is there afterwards."""
        trainer, m = self.bits.trainer, action.manner
        if not (self.evaluates and m.eval_interval and m.save_interval % m.eval_interval == 0):
            action = replace(action, manner=replace(m, keep_best=0))
        begin, flags, first_moved = self._beginning(action)
        may_be_shorter = trainer["lr_schedule"] == "constant"  # elsewhere the rate depends on the length of the run
        f = forecast(action, begin, self.total, trainer["gradient_accumulation"] > 1, may_be_shorter)
        place, visible, interrupted = self.place, self.place.steps(), self.place.move_under_way() is not None
        codes = {f.code} if f.knows_last else {f.code, 0}
        run = replace(self.run, directory=place.directory)
        ended = self._process(run, [*flags, *action.manner.flags(), *f.flags], f.moments, *codes)
        died = ended.code == -9
        self._count(action, f, died)

        # It began where it should, and did what it should.
        known = [self.line(step, action.manner) for step in range(begin + 1, f.last + 1)]
        done = [line for line in known if line is not None]
        if died and not f.knows_last:
            done = done[: len(ended.records)]
        assert ended.records == [{key: v for key, v in line.items() if key not in NOT_PRINTED} for line in done]
        if done or not died:
            self._must_say_where_it_began(ended.err, flags, begin)

        # The metrics are cut back to where it began, and go on from there.
        kept = [line for line in place.lines if line["step"] <= begin and "final" not in line]
        beyond = place.lines[len(kept) :]
        if f.finishes and self.evaluates and not died:
            done.append({"step": f.last, "eval_loss": self.records[f.last - 1]["eval_loss"], "final": True})
        found = place.lines_found()
        if died and not f.knows_last:  # before they were cut, or while a line was written
            assert found[: len(kept)] == kept and (found in (place.lines, kept + done) or found[:-1] == kept + done), found
        else:
            assert found == kept + done
        place.lines = found

        # Later files of another branch are put away, whole; the others are those that it saved, less what retention lets go.
        moved = sorted(step for step in visible if step >= first_moved)
        if f.knows_last and not interrupted:
            assert moved == [] or f"moved {', '.join(f'step_{step}' for step in moved)} and their metrics" in ended.err
            if moved or (flags[-1:] and flags[-1] in dict(self.copies) and beyond):
                place.superseded.append((moved, beyond))
            assert place.superseded_found() == place.superseded
            self.saw("branch", moved)
        place.superseded = place.superseded_found()
        self._must_have_kept(action.manner, f, visible, set(moved), died)
        if not died:
            assert [path.name for path in place.directory.glob(".*")] == [".lock"], "nothing half done is left"
            assert not (place.directory / "SAVE").exists() and place.move_under_way() is None
            metrics = place.directory / "metrics.jsonl"
            assert not metrics.exists() or metrics.read_bytes()[-1:] in (b"", b"\n")
            saved = [line.split()[-1] for line in ended.err.splitlines() if line.startswith("saved ")]
            assert saved == [str(run.path(step)) for step in f.saves]

    def _must_say_where_it_began(self, err: str, flags: Sequence[object], begin: int) -> None:
        told = [line for line in err.splitlines() if line.startswith("resumed ") or line.endswith("; starting at step 0")]
        path = self.place.directory / f"step_{begin}.safetensors" if "auto" in flags else flags[-1] if flags else None
        if begin:
            assert told == [f"resumed {path} at step {begin}"]
        else:
            assert len(told) == ("auto" in flags)

    def _must_have_kept(self, manner: Manner, f: Forecast, visible: set[int], moved: set[int], died: bool) -> None:
        place = self.place
        there = (visible - moved) | ({f.begin} if f.begin else set())
        found, anywhere = set(tiny.steps_in(place.directory)), {int(path.stem[5:]) for path in place.files()}
        if not died or f.knows_files:
            for step in f.saves:
                there = after_retention(manner, there | {step}, place.lines, {step, f.begin} - {0})
            if f.saves and not died:
                self.saw("retention let files go", after_retention(manner, there, place.lines) < visible | set(f.saves))
                there = after_retention(manner, there, place.lines)
            assert found == there
        elif manner.max_checkpoints == 0:
            assert visible <= anywhere, "nothing is lost"
        assert anywhere <= visible | moved | set(f.saves) | {f.begin} | {s for steps, _ in place.superseded for s in steps}

    def _count(self, action: Action, f: Forecast, died: bool) -> None:
        self.saw("killed", died)
        self.saw(f"killed: {action.end}", died)
        self.saw("stopped by a signal", f.code in (130, 143))
        self.saw("saved when asked", action.end in SAVES and f.moments)
        self.saw("saved in the background", action.manner.async_save and f.saves)
        self.saw("killed, saving in the background", action.manner.async_save and f.saves and died)
        self.saw("resumed", f.begin)
        self.saw("resumed in a later epoch", f.begin and self.records[f.begin - 1]["epoch"] > 1)

    def compare(self) -> None:
        """All step files, wherever they are, are the reference's; so are all lines; nothing was found damaged."""
        for place in (self.place, *self.left):
            for path in place.files():
                assert path.read_bytes() == self.files[int(path.stem.removeprefix("step_"))], path
            assert place.lines_found() == place.lines
            for line in (line for lines in (place.lines, *(lines for _, lines in place.superseded)) for line in lines):
                assert line.items() <= {**self.records[line["step"] - 1], "final": True}.items()
            assert not (place.directory / "quarantine").exists()
        for path, step in self.copies:
            assert path.read_bytes() == self.files[step]
