"""``oxidizr-ref train``: from flags to a run."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from oxidizr_ref import parallel
from oxidizr_ref.backend import resolve_device, use_device
from oxidizr_ref.checkpoint.format import Checkpoint, mapped, read_header
from oxidizr_ref.checkpoint.state import ALLOWABLE, from_file
from oxidizr_ref.checkpoint.store import CheckpointStore, existing
from oxidizr_ref.cli.completion import configs, dtypes, resume_words
from oxidizr_ref.cli.options import Device
from oxidizr_ref.cli.report import make_reporter
from oxidizr_ref.cli.words import size_of
from oxidizr_ref.config import OPERATIONAL_KEYS, Config, config_differences, load_config
from oxidizr_ref.data import TrainingData, open_data
from oxidizr_ref.errors import CheckpointError, DataError, UsageError
from oxidizr_ref.generation import generate
from oxidizr_ref.interop.opened import Opened, open_model
from oxidizr_ref.memory import estimate_memory, out_of_memory
from oxidizr_ref.memory_now import available_bytes
from oxidizr_ref.model import LanguageModel
from oxidizr_ref.run import FirstWeights, Reporter, RunOptions
from oxidizr_ref.sampling import Sampling
from oxidizr_ref.signals import Signals
from oxidizr_ref.tokenizer_libraries import JSON_NAME
from oxidizr_ref.tokenizers import Tokenizer, tokenizer_from_state
from oxidizr_ref.trainer import Trainer

_STARTED = time.monotonic()  # what --time-limit counts from, but for the start of the interpreter
DEFAULT_CONFIG = "nano-start"
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
    flags = _as_overrides(
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
    if other is not None and config is None:
        run_config = _config_of(other, settings or [], flags)
    else:
        run_config = _config(config, resume, settings or [], flags)
    if other is not None:
        _must_be_the_same_model(run_config, other)
    tokenizer = _given_tokenizer(run_config, config is None, resume, other)
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
    if other is not None and not run_config.data.is_random:
        _tell_of_another_tokenizer(training_data.tokenizer, other, reporter)
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


def _as_overrides(flags: Mapping[str, tuple[str, Any]]) -> dict[str, str]:
    """``{"--batch-size 4": "trainer.batch_size=4"}`` of the flags that were given. JSON is YAML, and quotes for us."""
    return {
        f"{flag} {' '.join(value) if isinstance(value, list) else value}": f"{key}={json.dumps(value)}"
        for flag, (key, value) in flags.items()
        if value is not None
    }


def _check_usage(resume: str | None, init_from: Path | None, overwrite: bool, allow_mismatch: list[str]) -> None:
    if resume and (overwrite or init_from):
        raise UsageError(f"--resume continues a run, {'--overwrite' if overwrite else '--init-from'} starts one; give one")
    for kind in allow_mismatch:
        if kind not in ALLOWABLE:
            raise UsageError(f"--allow-mismatch {kind}: expected one of {', '.join(ALLOWABLE)}")


def _config(source: str | None, resume: str | None, settings: list[str], flags: dict[str, str]) -> Config:
    """The config of ``-f``; without it, the one inside the file of ``--resume PATH``, or the default."""
    if source is not None or resume in (None, "auto"):
        return load_config(source or DEFAULT_CONFIG, settings, flags)
    path = Path(resume or "")
    try:
        inside = json.loads(read_header(existing(path, path.parent)).metadata["config"])
    except (KeyError, ValueError, RecursionError):
        raise CheckpointError(f"{path}: holds no config; give it with -f CONFIG") from None
    _fill_in_what_changes_no_bits(inside, path.parent)
    config = Config.from_canonical(inside, settings, flags)
    given = {text.partition("=")[0].removeprefix("trainer.") for text in (*settings, *flags.values())}
    if not {"max_steps", "num_epochs"} & (inside["trainer"].keys() | given):
        raise UsageError(f"--resume {path}: the file does not say how long to train; give --max-steps N, or -f CONFIG")
    return config


def _given_tokenizer(config: Config, is_its_own: bool, resume: str | None, other: Opened | None) -> Tokenizer | None:
    """The tokenizer inside the model or the checkpoint that the run begins with; None where the config says enough.

    It does not of a tokenizer.json, when the config itself came from there (``is_its_own``), nor of characters: those of
    another text would have other ids.
    """
    name = config.data.tokenizer
    if not (name == "char" or (is_its_own and name == JSON_NAME)):
        return None
    found = None
    if other is not None:
        found = other.tokenizer
    elif resume == "auto":
        store = CheckpointStore(Path(config.trainer.checkpoint_dir))
        for step in reversed(store.steps()):
            with suppress(CheckpointError, DataError):  # what is damaged is passed over, and told, later
                found = _tokenizer_in(store.path(step))
                break
    elif resume is not None:
        found = _tokenizer_in(Path(resume))
    return found if found is not None and found.name == name else None


def _tokenizer_in(path: Path) -> Tokenizer:
    """The tokenizer of a step file, which is proved whole when the run goes on from it; this proves itself by its digest."""
    header, tensors = mapped(existing(path, path.parent))
    return tokenizer_from_state(from_file(Checkpoint(tensors, header.metadata), path).tokenizer)


def _tell_of_another_tokenizer(used: Tokenizer, other: Opened, reporter: Reporter) -> None:
    if other.tokenizer is None or other.tokenizer.state() != used.state():
        known = "has no tokenizer beside it" if other.tokenizer is None else f"has the tokenizer {other.tokenizer.name}"
        another = "" if other.tokenizer is None or other.tokenizer.name != used.name else "another "
        reporter.notice(
            f"warning: {other.what} {known}; text is read with {another}{used.name}, whose ids may mean something else"
        )


def _config_of(other: Opened, settings: list[str], flags: dict[str, str]) -> Config:
    """The config of a run that goes on with another model where no ``-f`` says how: that model, the default's training."""
    default = load_config(DEFAULT_CONFIG)
    trainer = default.trainer.model_dump(mode="json") | {"checkpoint_dir": f"./checkpoints/{other.config.name}"}
    tokenizer = other.tokenizer.name if other.tokenizer is not None else default.data.tokenizer
    inside = {"model": other.config.model_dump(mode="json"), "trainer": trainer, "data": {"tokenizer": tokenizer}}
    return Config.from_canonical(inside, settings, flags)


def _must_be_the_same_model(config: Config, other: Opened) -> None:
    """Raise UsageError where the config and the model whose weights it is to start with differ in more than storage."""
    here, there = ({"model": model.model_dump(mode="json")} for model in (config.model, other.config))
    free = {"model.name", "model.dtype", "model.max_seq_len"}
    changed = [change for change in config_differences(there, here) if change[0] not in free]
    if changed:
        differs = ", ".join(f"{key} is {old} there, {new} here" for key, old, new in changed)
        raise UsageError(f"--init-from {other.what}: another model: {differs}; leave out -f to take its own config")


def _fill_in_what_changes_no_bits(inside: dict[str, Any], directory: Path) -> None:
    """Complete a checkpoint's config: from the config.json beside it, where there is one; files go on beside it."""
    inside["trainer"]["checkpoint_dir"] = str(directory)
    beside = directory / "config.json"
    if not beside.is_file():
        return
    try:
        whole = json.loads(beside.read_text(encoding="utf-8"))
        for key in (OPERATIONAL_KEYS | {"max_steps", "num_epochs"}) - {"checkpoint_dir", "target_device"}:
            if key not in inside["trainer"] and key in whole["trainer"]:
                inside["trainer"][key] = whole["trainer"][key]
        inside["data"]["path"] = whole["data"]["path"]
        inside["model"]["name"] = whole["model"]["name"]
    except (KeyError, TypeError, ValueError):
        raise UsageError(f"{beside}: is damaged; give the config with -f CONFIG, or remove this file") from None


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
