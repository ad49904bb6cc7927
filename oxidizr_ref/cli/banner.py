"""What a run is about to do, before it does it: the model, the memory, the data, the steps, the checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from oxidizr_ref import parallel
from oxidizr_ref.cli.config_view import layer_words, memory_words
from oxidizr_ref.cli.words import duration, of, printable, short, size_of
from oxidizr_ref.memory import estimate_memory, model_parts

if TYPE_CHECKING:
    from rich.panel import Panel

    from oxidizr_ref.trainer import Trainer


def rows(trainer: Trainer, free: int) -> Iterator[tuple[str, str]]:
    """What is shown of a run, as labels and texts. free: bytes on the disk of its checkpoints."""
    m = trainer.config.model
    parts = model_parts(trainer.config)
    active = sum(part.active for part in parts)
    some = f" ({active:,} active)" if active < trainer.model.num_parameters() else ""
    yield printable(m.name), f"{trainer.model.num_parameters():,} parameters{some}, {m.dtype}, {_where(trainer)}"
    yield "layers", layer_words(m, parts)
    yield "memory", memory_words(estimate_memory(trainer.config, trainer.device))
    yield "data", _data(trainer)
    begin = f"{trainer.step + 1:,} to " if trainer.step else ""
    epochs = trainer.windows.epoch(trainer.total_steps * trainer.windows_a_step)
    limit = trainer.options.time_limit
    within = f", within {duration(limit)}" if limit is not None else ""
    steps = f"{begin}{trainer.total_steps:,} of {of(trainer.tokens_a_step, 'token')}{within}"
    yield "steps", f"{steps}; {short(epochs)} epochs in all"
    yield "learning rate", _learning_rate(trainer)
    yield "checkpoints", _checkpoints(trainer, free)


def warnings(trainer: Trainer, free: int) -> Iterator[str]:
    """What cannot go well, and how it could."""
    m = trainer.config.model
    if trainer.most_bytes_more() > free:
        yield "warning: they will not fit; a larger save_interval, fewer --max-checkpoints or --dtype bf16 needs less"
    if m.uses_moe and "attention" in m.layer_kinds and not trainer.config.trainer.load_balance_alpha:
        yield "note: trainer.load_balance_alpha is 0, so nothing keeps the experts evenly used"


def panel(trainer: Trainer, free: int) -> Panel:
    """The rows in a frame."""
    from rich.panel import Panel  # here: only terminals need it

    (name, model), *others = rows(trainer, free)
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for label, text in (("model", model), *others):
        table.add_row(label, Text(text))
    return Panel(table, title=Text(name, style="bold"), title_align="left", expand=False)


def _where(trainer: Trainer) -> str:
    device = trainer.device
    threads = f" with {of(parallel.get_threads(), 'thread')}" if device == "cpu" else ""
    return f"{device}{threads}, seed {trainer.config.trainer.seed}"


def _data(trainer: Trainer) -> str:
    config, windows = trainer.config, trainer.windows
    paths = [printable(str(path)) for path in config.data_paths()]
    more = f" and {len(paths) - 1:,} more" if len(paths) > 1 else ""
    name = "random tokens" if config.data.is_random else f"{paths[0]}{more}" if paths else "the bundled text"
    held_out = f"; {of(windows.eval_windows, 'window')} held out" if windows.eval_windows else ""
    learned = "; only responses are learned" if config.data.loss_on == "responses" else ""
    apart = "; documents kept apart" if config.data.document_boundaries == "reset" else ""
    cut = f"{of(windows.train_windows, 'window')} of {of(windows.seq_len, 'token')}"
    return f"{name} ({printable(trainer.tokenizer.name)}): {cut}{held_out}{learned}{apart}"


def _learning_rate(trainer: Trainer) -> str:
    t = trainer.config.trainer
    warmup = f" after {of(t.warmup_steps, 'step')} of warm-up" if t.warmup_steps else ""
    end = "" if t.lr_schedule == "constant" else f", {short(trainer.learning_rate(trainer.total_steps))} at the end"
    return f"{short(t.learning_rate)}{warmup}, {t.lr_schedule}{end}"


def _checkpoints(trainer: Trainer, free: int) -> str:
    t = trainer.config.trainer
    every = "step" if t.save_interval == 1 else f"{t.save_interval:,} steps"
    stay = {"the newest": t.max_checkpoints, "the best": t.keep_best, "multiples of": t.keep_every}
    kept = ", ".join(f"{what} {number:,}" for what, number in stay.items() if number) if t.max_checkpoints else "all"
    more = size_of(trainer.most_bytes_more())
    size = size_of(trainer.file_size)
    return f"{size} a file, one every {every}; {kept} stay, at most {more} more; {size_of(free)} free"
