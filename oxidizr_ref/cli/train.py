"""``oxidizr-ref train``: from flags to a run."""

from __future__ import annotations

import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from oxidizr_ref import parallel
from oxidizr_ref.backend import resolve_device, use_device
from oxidizr_ref.beginning import DEFAULT_CONFIG, config_of_run, other_tokenizer, tokenizer_of_run
from oxidizr_ref.checkpoint.state import ALLOWABLE
from oxidizr_ref.cli.completion import configs, dtypes, resume_words
from oxidizr_ref.cli.options import Device, as_overrides
from oxidizr_ref.cli.report import make_reporter
from oxidizr_ref.cli.words import size_of
from oxidizr_ref.config import Config
from oxidizr_ref.data import TrainingData, open_data
from oxidizr_ref.errors import UsageError
from oxidizr_ref.generation import generate
from oxidizr_ref.interop.opened import open_model
from oxidizr_ref.memory import estimate_memory, out_of_memory
from oxidizr_ref.memory_now import available_bytes
from oxidizr_ref.model import LanguageModel
from oxidizr_ref.run import FirstWeights, Reporter, RunOptions
from oxidizr_ref.sampling import Sampling
from oxidizr_ref.signals import Signals
from oxidizr_ref.trainer import Trainer

_STARTED = time.monotonic()  # what --time-limit counts from, but for the start of the interpreter
_SAMPLE_TOKENS, _SAMPLE_TEMPERATURE = 300, 0.6


class SyncBackend(StrEnum):
    """How several devices add up their gradients."""

    cpu = "cpu"
    nccl = "nccl"


_CONFIG = "Configuration"
_RUN = "This run"
_RESUME = "Checkpoints"


def train(
    config: Annotated[
        str | None,
        typer.Option(
            "-f",
            "--config",
            metavar="FILE",
            autocompletion=configs,
            help=f"YAML config: a path, or a bundled model ({DEFAULT_CONFIG}).",
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "-d",
            "--data",
            metavar="FILE",
            help="Training data: `.bin` tokens, or text; `random` for random tokens; several -d are one stream. "
            "Default: the config's data.path, else the bundled text.",
        ),
    ] = None,
    seq_len: Annotated[int | None, typer.Option(metavar="N", help="Tokens a window.", rich_help_panel=_CONFIG)] = None,
    batch_size: Annotated[int | None, typer.Option(metavar="N", help="Windows a batch.", rich_help_panel=_CONFIG)] = None,
    grad_accum: Annotated[int | None, typer.Option(metavar="N", help="Batches a step.", rich_help_panel=_CONFIG)] = None,
    max_steps: Annotated[
        int | None, typer.Option(metavar="N", help="Steps in all; 0: the epochs.", rich_help_panel=_CONFIG)
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE",
            autocompletion=dtypes,
            help="f32, bf16, f16 or f64: how weights are stored.",
            rich_help_panel=_CONFIG,
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(metavar="N", help="The random seed.", rich_help_panel=_CONFIG)] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any key of the config; repeatable.", rich_help_panel=_CONFIG),
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="PATH|auto",
            autocompletion=resume_words,
            help="Continue a step file, or the newest one in the checkpoint directory.",
            rich_help_panel=_RESUME,
        ),
    ] = None,
    checkpoint_dir: Annotated[
        str | None, typer.Option(metavar="DIR", help="Where step files go.", rich_help_panel=_RESUME)
    ] = None,
    save_interval: Annotated[
        int | None, typer.Option(metavar="N", help="Steps between step files.", rich_help_panel=_RESUME)
    ] = None,
    max_checkpoints: Annotated[
        int | None, typer.Option(metavar="N", help="Step files to keep; 0: all.", rich_help_panel=_RESUME)
    ] = None,
    init_from: Annotated[
        Path | None, typer.Option(metavar="MODEL", help="Start with the weights of another model.", rich_help_panel=_RESUME)
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", metavar="", help="Start over; old files move to superseded/.", rich_help_panel=_RESUME),
    ] = False,
    allow_mismatch: Annotated[
        list[str] | None,
        typer.Option(metavar="|".join(ALLOWABLE), help="Continue with another one of these.", rich_help_panel=_RESUME),
    ] = None,
    strict: Annotated[
        bool,
        typer.Option("--strict", metavar="", help="Continue only with nothing changed at all.", rich_help_panel=_RESUME),
    ] = False,
    target_device: Annotated[
        Device | None, typer.Option(help="Demand a device. Default: the config's, if it is there.", rich_help_panel=_RUN)
    ] = None,
    threads: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Threads (default: all cores). Same bits.", rich_help_panel=_RUN)
    ] = None,
    prefetch: Annotated[
        int, typer.Option(metavar="N", min=0, help="Batches read ahead. Same bits.", rich_help_panel=_RUN)
    ] = 0,
    headless: Annotated[
        bool,
        typer.Option("--headless", metavar="", help="JSON lines on stdout instead of a progress bar.", rich_help_panel=_RUN),
    ] = False,
    time_limit: Annotated[
        float | None, typer.Option(metavar="SECONDS", min=0, help="Save and end within this time.", rich_help_panel=_RUN)
    ] = None,
    gpus: Annotated[str | None, typer.Option(metavar="N", help="The CUDA device to train on.", rich_help_panel=_RUN)] = None,
    sync_backend: Annotated[
        SyncBackend | None, typer.Option(help="How --gpus add up gradients.", rich_help_panel=_RUN)
    ] = None,
    debug: Annotated[
        bool, typer.Option("--debug", metavar="", help="Show tracebacks of errors.", rich_help_panel=_RUN)
    ] = False,
) -> int:
    """Train a model, saving checkpoints from which training continues to the same bits.

    SIGINT and SIGTERM save and end; SIGUSR1, or a file named SAVE in the checkpoint directory, saves and goes on.
    """
    del debug  # read by main
    if sync_backend is not None and gpus is None:
        raise UsageError("--sync-backend says how several --gpus add up gradients; give --gpus with it")
    flags = as_overrides(
        {
            "--seq-len": ("model.max_seq_len", seq_len),
            "--batch-size": ("trainer.batch_size", batch_size),
            "--grad-accum": ("trainer.gradient_accumulation", grad_accum),
            "--max-steps": ("trainer.max_steps", max_steps),
            "--dtype": ("model.dtype", dtype),
            "--seed": ("trainer.seed", seed),
            "--checkpoint-dir": ("trainer.checkpoint_dir", checkpoint_dir),
            "--save-interval": ("trainer.save_interval", save_interval),
            "--max-checkpoints": ("trainer.max_checkpoints", max_checkpoints),
            "--target-device": ("trainer.target_device", target_device),
            "--data": ("data.path", data or None),
        }
    )
    _check_usage(resume, init_from, overwrite, allow_mismatch or [])
    other = None if init_from is None else open_model(init_from)
    run_config = config_of_run(config, resume, other, settings or [], flags)
    tokenizer = tokenizer_of_run(run_config, config is None, resume, other)
    reporter = make_reporter(headless)
    demanded_by = f"--gpus {gpus}" if gpus is not None else "--target-device gpu" if target_device is Device.gpu else None
    device = _device(run_config, demanded_by, gpus, reporter)
    if threads is not None:
        parallel.set_threads(threads)
    options = RunOptions(
        resume=resume,
        init_from=None if other is None else FirstWeights(other.weights, other.what, other.lineage),
        overwrite=overwrite,
        allow_mismatch=frozenset(allow_mismatch or ()),
        strict=strict,
        prefetch=prefetch,
        time_limit=time_limit,
        began=_STARTED,
    )
    training_data = open_data(run_config, tokenizer)
    if other is not None and not run_config.data.is_random and (differs := other_tokenizer(training_data.tokenizer, other)):
        reporter.notice(f"warning: {differs}")
    return _run(run_config, training_data, options, reporter, device)


def _run(config: Config, data: TrainingData, options: RunOptions, reporter: Reporter, device: str) -> int:
    _warn_if_too_large(config, reporter, device)
    with Signals() as signals:  # from here on a signal is a wish, also while a large model or checkpoint is loaded
        try:
            model = LanguageModel(config.model, config.trainer.seed, device)
            trainer = Trainer(config, model, data, options, reporter)
        except MemoryError as error:
            raise out_of_memory(config, device, error, "nothing was written") from error
        try:
            outcome = trainer.fit(signals)
        finally:
            reporter.end()
        if outcome.eval_loss is not None:
            reporter.notice(f"held-out loss {outcome.eval_loss:.4f} nats a token after step {trainer.step}")
        if outcome.stopped_by is not None:
            return 128 + outcome.stopped_by
        if trainer.step >= trainer.total_steps and not config.data.is_random:
            reporter.notice(f"sample:\n{_sample(trainer)}")
    return 0


def _sample(trainer: Trainer) -> str:
    """A text the trained model writes, beginning where a document would, or a line: the first character of most texts."""
    tokenizer = trainer.tokenizer
    end = tokenizer.end_of_text
    prompt = np.array([end if end is not None and end < trainer.config.model.vocab_size else 0])
    sampling = Sampling(_SAMPLE_TOKENS, _SAMPLE_TEMPERATURE)
    # A model that never saw two documents together has nothing to say behind the end of one.
    ends = [end] if end is not None and trainer.config.data.document_boundaries == "reset" else []
    (sample,) = generate(trainer.model, [prompt], sampling, ends, below=tokenizer.vocab_size)
    text = tokenizer.decode(sample.tokens).strip()
    # What a young model of bytes says may be a command to the terminal.
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)


def _check_usage(resume: str | None, init_from: Path | None, overwrite: bool, allow_mismatch: list[str]) -> None:
    if resume and (overwrite or init_from):
        raise UsageError(f"--resume continues a run, {'--overwrite' if overwrite else '--init-from'} starts one; give one")
    for kind in allow_mismatch:
        if kind not in ALLOWABLE:
            raise UsageError(f"--allow-mismatch {kind}: expected one of {', '.join(ALLOWABLE)}")


def _device(config: Config, demanded_by: str | None, gpus: str | None, reporter: Reporter) -> str:
    device = resolve_device("gpu" if demanded_by else config.trainer.target_device, demanded_by=demanded_by)
    if gpus is not None:
        use_device(_number_of(gpus), demanded_by=f"--gpus {gpus}")
    if config.trainer.target_device == "gpu" and device == "cpu":
        reporter.notice("target_device gpu: none is usable here (--target-device gpu says why); training on the cpu")
    return device


def _number_of(gpus: str) -> int:
    """The one device that ``--gpus`` names."""
    if "," in gpus:
        raise UsageError(f"--gpus {gpus}: this version trains on one device; name one of them")
    if not gpus.strip().isdecimal():
        raise UsageError(f"--gpus {gpus}: expected the number of a CUDA device, such as 0")
    return int(gpus)


def _warn_if_too_large(config: Config, reporter: Reporter, device: str) -> None:
    """Before anything large is allocated, say so if the run will not fit."""
    needed, there = estimate_memory(config, device).total, available_bytes(device)
    if there is not None and needed > there:
        advice = "a smaller --batch-size or --seq-len, or a smaller model, needs less"
        reporter.notice(f"warning: this run needs about {size_of(needed)}, and {size_of(there)} are free; {advice}")
