"""The checkpoint directory: which files are there, which of them to trust, and which to let go.

::

    step_N.safetensors   a whole run after N optimizer steps; nothing else is needed to continue it
    metrics.jsonl        one line a logged step
    config.json          the config as it was understood, for people
    run.json             what the directory is in the middle of (see `branches`)
    .lock                held by the process that trains into the directory
    superseded/K/        step files and metric lines of abandoned branches
    quarantine/          damaged step files

Order is by step number, never by time. Nothing is deleted but what retention lets go.
"""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from oxidizr_ref.checkpoint import branches, disk, format
from oxidizr_ref.checkpoint.branches import Beginning, step_path
from oxidizr_ref.checkpoint.metrics import MetricsLog
from oxidizr_ref.errors import CheckpointError, DamagedError, SaveError, UsageError

_STEP_FILE = re.compile(r"step_(0|[1-9][0-9]{0,17})\.safetensors")
_QUARANTINED = re.compile(r"step_[0-9]+\.([0-9]+)\.safetensors")
#: What a writer that died may have left. Whoever holds the lock knows that no writer lives.
_LEFTOVER = re.compile(
    r"\.(step_[0-9]+|\.incoming)\.safetensors\.[0-9]+\.tmp|\.(config\.json|run\.json|metrics\.jsonl)\.tmp|"
    + re.escape(branches.INCOMING)
)
_NO_LOCKS_HERE = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)


@dataclass(frozen=True)
class Retention:
    """Which step files stay: the ``keep`` newest (0: all), those whose step ``every`` divides (0: none), and the ``best``
    with the lowest held-out losses."""

    keep: int = 0
    every: int = 0
    best: int = 0

    def lets_go(self, steps: Iterable[int], losses: Mapping[int, float], needed: Iterable[int]) -> list[int]:
        """Those of ``steps`` that may be deleted. ``losses``: by step, where known; ``needed``: steps that stay anyway."""
        if self.keep == 0:
            return []
        there = sorted(steps)
        known = sorted((step for step in there if step in losses), key=lambda step: (losses[step], step))
        kept = {*there[-self.keep :], *known[: self.best], *needed}
        kept |= {step for step in there if self.every and step % self.every == 0}
        return [step for step in there if step not in kept]


@dataclass(frozen=True)
class Found:
    """The file to continue from, what it holds, and the damaged newer ones with what is wrong with each."""

    path: Path
    checkpoint: format.Checkpoint
    damaged: list[tuple[Path, str]] = field(default_factory=list)


class CheckpointStore:
    """One checkpoint directory, for one process at a time."""

    def __init__(self, directory: Path, retention: Retention | None = None) -> None:
        self.directory, self.retention = directory, retention or Retention()
        self.metrics = MetricsLog(directory / "metrics.jsonl")
        #: Where the run began: never let go before `end`.
        self.resumed_from: int | None = None
        #: What happened that the user should know, a line each; whoever shows them takes them out.
        self.notices: list[str] = []
        self._lock = disk.Lock(directory / ".lock")
        self._can_lock = True
        self._last_saved: int | None = None

    # --- one process at a time ----------------------------------------------------------------------------------------

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Inside this context the directory, if it is there or is made, is this process's alone. Raises UsageError."""
        try:
            if self.directory.is_dir():
                self._claim()
            yield
        finally:
            self._lock.release()

    def _claim(self) -> None:
        with self._usable():
            if not self._hold():
                who = "another process is training into it"
                raise UsageError(f"{self.directory}: {who}; let it end, or choose another --checkpoint-dir")

    def _hold(self) -> bool:
        """Take the lock or make sure of it. Where files cannot be locked, that is told once, and nothing is guarded."""
        try:
            return not self._can_lock or self._lock.acquire()
        except OSError as error:
            if error.errno not in _NO_LOCKS_HERE:
                raise
            self._can_lock = False
            self.notices.append(f"{self.directory} cannot be locked: take care that no other process trains into it")
            return True

    @contextmanager
    def _usable(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UsageError(
                f"checkpoint directory {self.directory}: {error.strerror or error}; see --checkpoint-dir"
            ) from error

    # --- looking ------------------------------------------------------------------------------------------------------

    def path(self, step: int) -> Path:
        """The file of one step."""
        return step_path(self.directory, step)

    def steps(self) -> list[int]:
        """The steps whose files are here, ascending."""
        with self._usable():
            return _steps_among(disk.names(self.directory))

    def describe(self) -> str:
        """Which step files are here, in a few words."""
        steps = self.steps()
        if not steps:
            return f"{self.directory} holds no step files"
        return f"{self.directory} holds " + ", ".join(f"step_{step}" for step in steps[-10:])

    def find(self, wish: str) -> Found | None:
        """The file ``--resume`` means: a path, or ``auto`` for the newest here that is whole (None when there is none).

        Nothing is moved yet, but for a branch whose moving was interrupted. Raises UsageError when a path is not there
        (saying what is), DamagedError when no file is whole, and CheckpointError for a newest one that is not ours.
        """
        with self._usable():
            branches.finish(self.directory, self.metrics)
        return self._newest() if wish == "auto" else Found(Path(wish), self.load(existing(Path(wish), self.directory)))

    def _newest(self) -> Found | None:
        damaged: list[tuple[Path, str]] = []
        for path in (self.path(step) for step in reversed(self.steps())):
            try:
                return Found(path, self.load(path), damaged)
            except DamagedError as error:
                damaged.append((path, str(error)))
            except CheckpointError:
                if disk.exists(path):  # else it was deleted just now
                    raise
        if damaged:
            what = "; ".join(reason for _, reason in damaged[:3])
            ways = "restore a backup, or start over with --overwrite or another --checkpoint-dir"
            raise DamagedError(f"no step file in {self.directory} is whole: {what}; {ways}")
        return None

    def load(self, path: Path) -> format.Checkpoint:
        """Read and prove one file. A file named ``step_N`` whose inside says another step is damage."""
        checkpoint = format.load(path)
        check_name(path, checkpoint.metadata)
        return checkpoint

    def most_bytes_more(self, size: int, coming: Sequence[int]) -> int:
        """How much larger the directory will be at its largest when files of ``size`` bytes are saved at these steps."""
        there = set(self.steps())
        before = most = len(there)
        for step in coming:
            there.add(step)
            most = max(most, len(there))  # a new file is written before an old one goes
            needed = {step} | ({self.resumed_from} if self.resumed_from is not None else set())
            there -= set(self.retention.lets_go(there, {}, needed))
        unknown_best = min(self.retention.best, len(coming)) if self.retention.keep else 0
        return size * (most - before + unknown_best)

    # --- writing ------------------------------------------------------------------------------------------------------

    def open(self, config: Mapping[str, Any], damaged: Sequence[tuple[Path, str]] = ()) -> None:
        """Make the directory, clear away what a killed writer left, note the config, put away what `find` found damaged.

        Raises UsageError if it cannot.
        """
        with self._usable():
            disk.make_directory(self.directory)
            self._claim()
            branches.finish(self.directory, self.metrics)
            for name in filter(_LEFTOVER.fullmatch, disk.names(self.directory)):
                disk.remove(self.directory / name)
            disk.replace(self.directory / "config.json", (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())
            self.quarantine(damaged)

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one line to the metrics. Raises SaveError when it cannot; the line is written with the next one."""
        try:
            self.metrics.log(record)
        except OSError as error:
            raise self._cannot_write(self.metrics.path, error) from error

    def save(self, step: int, tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> Path:
        """Write the file of one step, metrics first; when it has proved whole, let go of what retention lets go.

        Raises SaveError when it cannot be written, and CheckpointError when a sound file of this step is there and holds
        other bytes: determinism was broken.
        """
        path = self.path(step)
        try:
            disk.make_directory(self.directory)
            if not self._hold():
                raise SaveError(f"{path}: not written, because another process is training into {self.directory} now")
            self.metrics.flush()
            if self._is_there_and_whole(path):
                self._must_be_equal(path, tensors, metadata)
                disk.sync_directory(self.directory)
            else:
                format.save(path, tensors, metadata)
        except OSError as error:
            raise self._cannot_write(path, error) from error
        self._last_saved = step
        self._prune()
        return path

    def _cannot_write(self, path: Path, error: OSError) -> SaveError:
        advice = "free some space, or use a larger save_interval, fewer --max-checkpoints or --dtype bf16"
        reason = error.strerror or error
        full = f"; {advice}" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        return SaveError(f"{path}: cannot be written ({reason}); earlier files are whole{full}")

    def _is_there_and_whole(self, path: Path) -> bool:
        """Whether a file of this name stands; one that is damaged or not ours is put away first."""
        if not disk.exists(path):
            return False
        try:
            check_name(path, format.verify(path).metadata)
        except CheckpointError as error:
            if isinstance(error.__cause__, OSError) and not isinstance(error, DamagedError):
                raise error.__cause__ from error
            self.quarantine([(path, str(error))])
            return False
        return True

    def _must_be_equal(self, path: Path, tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
        if format.read_header(path) != format.describe(tensors, metadata):
            raise CheckpointError(f"{path} is there, and this run made other bytes for it: determinism was broken")

    def quarantine(self, damaged: Sequence[tuple[Path, str]]) -> None:
        """Put damaged files out of the way, under names that are free, and tell. Raises OSError."""
        place = self.directory / "quarantine"
        for path, reason in damaged:
            disk.make_directory(place)
            numbers = [int(match[1]) for match in map(_QUARANTINED.fullmatch, disk.names(place)) if match]
            target = place / f"{path.stem}.{1 + max(numbers, default=0)}{path.suffix}"
            disk.rename(path, target)
            disk.sync_directory(place)
            disk.sync_directory(self.directory)
            self.notices.append(f"{reason}; moved to {target}")

    def _prune(self) -> None:
        """Only after a save that proved whole. What cannot be deleted is told, and stays."""
        needed = {step for step in (self._last_saved, self.resumed_from) if step is not None}
        try:
            steps = _steps_among(disk.names(self.directory))
            for step in self.retention.lets_go(steps, self.metrics.eval_losses, needed):
                disk.remove(self.path(step))
        except OSError as error:
            self.notices.append(f"{self.directory}: old step files cannot be deleted ({error.strerror or error})")

    def end(self) -> None:
        """The run is over: where it began needs no keeping any more."""
        self.resumed_from = None
        if self._last_saved is not None:
            self._prune()

    # --- branches -----------------------------------------------------------------------------------------------------

    def refuse_to_start_over(self) -> None:
        """A fresh start where a run already is would mix two runs. Raises UsageError naming the ways on."""
        with self._usable():
            branches.finish(self.directory, self.metrics)
        if self.steps():
            raise UsageError(
                f"{self.describe()}; continue with --resume auto, start over with --overwrite "
                "(moves them to superseded/), or choose another --checkpoint-dir"
            )

    def supersede(self, first: int, progress: int, begin_with: Beginning | None = None) -> list[int]:
        """Move the step files from step ``first`` on, and the metric lines beyond step ``progress``, to ``superseded/``.

        ``begin_with``: tensors and metadata that become the file of step ``progress``, so that ``auto`` finds a branch that
        began elsewhere. Returns the steps that were moved. Where there are none, later metric lines are those of steps
        that will be done again, and are dropped. Raises UsageError when the disk refuses.
        """
        steps = [step for step in self.steps() if step >= first]
        with self._usable():
            branches.supersede(self.directory, self.metrics, steps, progress, begin_with)
        return steps


def _steps_among(names: Iterable[str]) -> list[int]:
    return sorted(int(match[1]) for match in map(_STEP_FILE.fullmatch, names) if match)


def existing(path: Path, directory: Path) -> Path:
    """``path``, if a file is there. Raises UsageError saying what is beside it (or in ``directory``) otherwise."""
    try:
        if disk.exists(path):
            return path
    except OSError as error:
        raise UsageError(f"--resume {path}: {error.strerror or error}") from error
    there = CheckpointStore(path.parent if path.parent.is_dir() else directory)
    raise UsageError(f"--resume {path}: no such file; {there.describe()}")


def check_name(path: Path, metadata: Mapping[str, str]) -> None:
    """A file named after a step must hold that step; any other name is a backup's. Raises DamagedError."""
    match = _STEP_FILE.fullmatch(path.name)
    try:
        inside = json.loads(metadata["progress"])["step"]
    except (KeyError, TypeError, ValueError, RecursionError):
        raise CheckpointError(f"{path}: does not say which step it holds") from None
    if match and int(match[1]) != inside:
        raise DamagedError(f"{path}: named after step {match[1]}, but it holds step {inside!r}")
