"""What a run prints: a progress bar or plain lines for people (on stderr), or JSON lines for programs (on stdout)."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from oxidizr_ref.checkpoint.disk import free_bytes
from oxidizr_ref.checkpoint.records import Record
from oxidizr_ref.cli.banner import panel, rows, warnings
from oxidizr_ref.cli.terminal import can_draw, console
from oxidizr_ref.cli.words import duration, of, printable_lines
from oxidizr_ref.memory_now import resident_bytes
from oxidizr_ref.run import Reporter

if TYPE_CHECKING:
    from oxidizr_ref.trainer import Trainer

_HEADLESS_KEYS = ("step", "loss", "grad_norm", "learning_rate", "epoch", "it/s", "tokens/s", "eval_loss")
_ONE_ROW = 110  # columns that a bar and what is told beside it take
_FEW_STEPS, _FEW_SECONDS = 4, 3.0  # that are enough to tell the time of the others by


class _LineReporter(Reporter):
    """What goes to stderr line by line, where no bar can be drawn (a file, a CI log)."""

    _total, _device, _time_is_told = 0, "cpu", False
    _first: tuple[int, float] | None = None  # the first step that was done, and when

    def notice(self, text: str) -> None:
        print(printable_lines(text), file=sys.stderr, flush=True)

    def begin(self, trainer: Trainer) -> None:
        free = free_bytes(trainer.store.directory)
        for label, text in rows(trainer, free):
            self.notice(f"{label}: {text}")
        for text in warnings(trainer, free):
            self.notice(text)
        self._total, self._device = trainer.total_steps, trainer.device

    def saved(self, path: Path) -> None:
        self.notice(f"saved {path}")

    def _tell_time(self, step: int) -> None:
        """Once, when there are steps to judge by (the first one is slower): how long the others will take."""
        now = time.perf_counter()
        if self._first is None:
            self._first = step, now
        (first, began), left = self._first, self._total - step
        if self._time_is_told or step - first < _FEW_STEPS or now - began < _FEW_SECONDS or not left:
            return
        self._time_is_told = True
        self.notice(f"time: about {duration((now - began) / (step - first) * left)} for the other {of(left, 'step')}")


class HeadlessReporter(_LineReporter):
    """One JSON object a logged step on stdout; everything else on stderr."""

    def step(self, record: Record, logged: bool) -> None:
        if logged:
            print(json.dumps({key: record[key] for key in _HEADLESS_KEYS if key in record}), flush=True)
        self._tell_time(record["step"])


class PlainReporter(_LineReporter):
    """A line a logged step on stderr."""

    def step(self, record: Record, logged: bool) -> None:
        if logged:
            self.notice(f"step {record['step']:>6}/{self._total}  {_numbers(record)}  {_rates(record, self._device)}")
        self._tell_time(record["step"])


class _Bar(Progress):
    """A bar, and what is told beside it; below it, where the terminal is narrow."""

    def get_renderables(self) -> Iterator[RenderableType]:
        """The rows."""
        yield self.make_tasks_table(self.tasks)
        if not any(isinstance(column, TextColumn) for column in self.columns):
            yield from (Text(task.description) for task in self.tasks)


class BarReporter(Reporter):
    """A progress bar with loss, gradient norm, speed, time left and memory."""

    def __init__(self) -> None:
        self._console = console(stderr=True)
        beside = [TextColumn("{task.description}")] if self._console.width >= _ONE_ROW else []
        columns = (BarColumn(bar_width=None), MofNCompleteColumn(), TimeRemainingColumn(), *beside)
        self._progress = _Bar(*columns, console=self._console)
        self._rates, self._eval, self._shown, self._device = "", "", 0.0, "cpu"

    def notice(self, text: str) -> None:
        self._console.print(printable_lines(text), markup=False, soft_wrap=True)

    def begin(self, trainer: Trainer) -> None:
        free = free_bytes(trainer.store.directory)
        self._console.print(panel(trainer, free))
        for text in warnings(trainer, free):
            self.notice(text)
        self._device = trainer.device
        self._task = self._progress.add_task("", total=trainer.total_steps, completed=trainer.step)
        self._progress.start()

    def step(self, record: Record, logged: bool) -> None:
        if logged or time.perf_counter() - self._shown > 0.5:
            self._rates = _rates(record, self._device)
            self._shown = time.perf_counter()
        if "eval_loss" in record:
            self._eval = f" (held out {record['eval_loss']:.3f})"
        text = f"loss {record['loss']:.3f}{self._eval} norm {_norm(record)} {self._rates}"
        self._progress.update(self._task, completed=record["step"], description=text)

    def end(self) -> None:
        """Leave the bar as it stands."""
        self._progress.stop()


def make_reporter(headless: bool) -> Reporter:
    """The reporter that fits where the output goes."""
    if headless:
        return HeadlessReporter()
    return BarReporter() if can_draw() else PlainReporter()


def _numbers(record: Record) -> str:
    eval_loss = f"  held out {record['eval_loss']:.4f}" if "eval_loss" in record else ""
    return f"loss {record['loss']:.4f}{eval_loss}  norm {_norm(record)}  lr {record['learning_rate']:.2e}"


def _norm(record: Record) -> str:
    return "overflowed, not used" if record["grad_norm"] is None else f"{record['grad_norm']:.2f}"


def _rates(record: Record, device: str) -> str:
    memory = f"{resident_bytes(device) / 1e6:.0f} MB{' of the gpu' if device == 'gpu' else ''}"
    return f"{record['it/s']:.1f} it/s {record['tokens/s']:,.0f} tok/s {memory}"
