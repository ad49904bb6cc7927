"""What a run prints: a progress bar or plain lines for people (on stderr), or JSON lines for programs (on stdout)."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from oxidizr_ref.checkpoint.disk import free_bytes
from oxidizr_ref.cli.config_view import memory_words
from oxidizr_ref.cli.words import printable_lines, size_of
from oxidizr_ref.memory import estimate_memory
from oxidizr_ref.memory_now import resident_bytes
from oxidizr_ref.run import Record, Reporter

if TYPE_CHECKING:
    from oxidizr_ref.trainer import Trainer

_HEADLESS_KEYS = ("step", "loss", "grad_norm", "learning_rate", "epoch", "it/s", "tokens/s", "eval_loss")


class HeadlessReporter(Reporter):
    """One JSON object a logged step on stdout; everything else on stderr."""

    def notice(self, text: str) -> None:
        print(printable_lines(text), file=sys.stderr, flush=True)

    def begin(self, trainer: Trainer) -> None:
        self.notice(_introduction(trainer))

    def step(self, record: Record, logged: bool) -> None:
        if logged:
            print(json.dumps({key: record[key] for key in _HEADLESS_KEYS if key in record}), flush=True)

    def saved(self, path: Path) -> None:
        self.notice(f"saved {path}")


class PlainReporter(Reporter):
    """A line a logged step on stderr: what people get where no bar can be drawn (a file, a CI log)."""

    _total, _device = 0, "cpu"

    def notice(self, text: str) -> None:
        print(printable_lines(text), file=sys.stderr, flush=True)

    def begin(self, trainer: Trainer) -> None:
        self.notice(_introduction(trainer))
        self._total, self._device = trainer.total_steps, trainer.device

    def step(self, record: Record, logged: bool) -> None:
        if logged:
            self.notice(f"step {record['step']:>6}/{self._total}  {_numbers(record)}  {_rates(record, self._device)}")

    def saved(self, path: Path) -> None:
        self.notice(f"saved {path}")


class BarReporter(Reporter):
    """A progress bar with loss, gradient norm, speed, time left and memory."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        columns = (BarColumn(bar_width=None), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
        self._progress = Progress(*columns, console=self._console)
        self._rates, self._eval, self._shown, self._device = "", "", 0.0, "cpu"

    def notice(self, text: str) -> None:
        self._console.print(printable_lines(text), highlight=False, markup=False, soft_wrap=True)

    def begin(self, trainer: Trainer) -> None:
        self.notice(_introduction(trainer))
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
    return BarReporter() if sys.stderr.isatty() else PlainReporter()


def _introduction(trainer: Trainer) -> str:
    """What is about to be trained, the memory that takes, and the disk."""
    model = trainer.config.model
    text = (
        f"{model.name}: {trainer.model.num_parameters():,} parameters, {model.dtype}, {trainer.device}, "
        f"{trainer.total_steps:,} steps of {trainer.tokens_a_step:,} tokens\n"
        f"memory: {memory_words(estimate_memory(trainer.config, trainer.device))}\n{_disk(trainer)}"
    )
    if model.uses_moe and "attention" in model.layer_kinds and not trainer.config.trainer.load_balance_alpha:
        text += "\nnote: trainer.load_balance_alpha is 0, so nothing keeps the experts evenly used"
    return text


def _disk(trainer: Trainer) -> str:
    """What checkpoints take and what there is, with a warning where that cannot go well."""
    more, free = trainer.most_bytes_more(), free_bytes(trainer.store.directory)
    text = f"checkpoints: {size_of(trainer.file_size)} a file, at most {size_of(more)} more; {size_of(free)} free"
    if more > free:
        text += "\nwarning: they will not fit; a larger save_interval, fewer --max-checkpoints or --dtype bf16 needs less"
    return text


def _numbers(record: Record) -> str:
    eval_loss = f"  held out {record['eval_loss']:.4f}" if "eval_loss" in record else ""
    return f"loss {record['loss']:.4f}{eval_loss}  norm {_norm(record)}  lr {record['learning_rate']:.2e}"


def _norm(record: Record) -> str:
    return "overflowed, not used" if record["grad_norm"] is None else f"{record['grad_norm']:.2f}"


def _rates(record: Record, device: str) -> str:
    memory = f"{resident_bytes(device) / 1e6:.0f} MB{' of the gpu' if device == 'gpu' else ''}"
    return f"{record['it/s']:.1f} it/s {record['tokens/s']:,.0f} tok/s {memory}"
