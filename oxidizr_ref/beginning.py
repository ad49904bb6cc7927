"""What a run begins with: its config and its tokenizer, from a file, a checkpoint, or another model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from oxidizr_ref.checkpoint.format import Checkpoint, mapped, read_header
from oxidizr_ref.checkpoint.state import from_file
from oxidizr_ref.checkpoint.store import CheckpointStore, existing
from oxidizr_ref.config import OPERATIONAL_KEYS, Config, config_differences, load_config
from oxidizr_ref.errors import CheckpointError, DataError, UsageError
from oxidizr_ref.interop.opened import Opened
from oxidizr_ref.tokenizer_libraries import JSON_NAME
from oxidizr_ref.tokenizers import Tokenizer, tokenizer_from_state

DEFAULT_CONFIG = "nano-start"


def config_of_run(
    source: str | None, resume: str | None, other: Opened | None, settings: Sequence[str], flags: Mapping[str, str]
) -> Config:
    """The config of ``-f``; without it, that of the other model or inside the file of ``--resume PATH``, or the default.

    ``settings`` and ``flags`` as for `load_config`. Raises ConfigError; CheckpointError for a file without a config; and
    UsageError where the model is not the other one, or nothing says how long to train.
    """
    if source is None and other is not None:
        config = _of_model(other, settings, flags)
    elif source is None and resume not in (None, "auto"):
        config = _of_checkpoint(str(resume), settings, flags)
    else:
        config = load_config(source or DEFAULT_CONFIG, settings, flags)
    if other is not None:
        _must_be_the_same_model(config, other)
    return config


def tokenizer_of_run(config: Config, is_its_own: bool, resume: str | None, other: Opened | None) -> Tokenizer | None:
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


def other_tokenizer(used: Tokenizer, other: Opened) -> str | None:
    """What to tell when data are read with another tokenizer than that of the model whose weights a run begins with."""
    its = other.tokenizer
    if its is not None and its.state() == used.state():
        return None
    known = "has no tokenizer beside it" if its is None else f"has the tokenizer {its.name}"
    another = "another " if its is not None and its.name == used.name else ""
    return f"{other.what} {known}; text is read with {another}{used.name}, whose ids may mean something else"


# --- where a config comes from ----------------------------------------------------------------------------------------


def _of_checkpoint(resume: str, settings: Sequence[str], flags: Mapping[str, str]) -> Config:
    path = Path(resume)
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


def _of_model(other: Opened, settings: Sequence[str], flags: Mapping[str, str]) -> Config:
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
