"""From Hugging Face's layout, or oxidizr's weights, to a checkpoint that training can begin with; and back."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from oxidizr_ref.checkpoint import disk, format
from oxidizr_ref.checkpoint.contents import file_meant
from oxidizr_ref.checkpoint.format import Checkpoint
from oxidizr_ref.checkpoint.state import RunState, from_file, to_file
from oxidizr_ref.checkpoint.store import CheckpointStore, check_name
from oxidizr_ref.config import Config, DataConfig, ModelConfig, TrainerConfig
from oxidizr_ref.errors import DataError, UsageError
from oxidizr_ref.fingerprint import fingerprint
from oxidizr_ref.interop.families import family_for
from oxidizr_ref.interop.hugging_face import is_of_a_model, load_weights_file, read_pretrained, write_pretrained
from oxidizr_ref.interop.tokenizer_files import tokenizer_files, tokenizer_in
from oxidizr_ref.interop.weight_files import digest_of, json_text, narrowest, some, stored_as
from oxidizr_ref.tokenizer_libraries import JSON_NAME
from oxidizr_ref.tokenizers import ByteTokenizer, tokenizer_from_state

HostArray: TypeAlias = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Converted:
    """What was done: the model, the files that were written, and what to tell, a line each."""

    family: str
    model: ModelConfig
    parameters: int
    tokenizer: str
    files: list[Path]
    notes: list[str]


def import_pretrained(source: Path, target: Path, dtype: str | None = None, overwrite: bool = False) -> Converted:
    """A directory in Hugging Face's layout as a checkpoint of step 0 without optimizer state.

    Raises DataError for a model that is not ours or files that are not sound, UsageError for a target that cannot be taken.
    """
    _may_be_written(target, overwrite)
    found = read_pretrained(source)
    notes = list(found.notes)
    tokenizer = _tokenizer_state(source, found.config.vocab_size, notes)
    data = DataConfig(tokenizer=tokenizer["name"] if tokenizer else "byte")
    config = Config(model=found.config, trainer=TrainerConfig(learning_rate=3e-4, batch_size=1), data=data)
    origin = {"family": found.family, "digest": found.source_digest}
    return _save(target, config, found.weights, dtype, tokenizer, origin, notes)


def import_weights(
    source: Path, config: Config, target: Path, dtype: str | None = None, overwrite: bool = False
) -> Converted:
    """oxidizr's weights, a plain safetensors file without a config, as a checkpoint of step 0 without optimizer state.

    Raises DataError for a file that is not sound or whose tensors are not the config's, UsageError as above.
    """
    _may_be_written(target, overwrite)
    weights = load_weights_file(source, config.model)
    notes: list[str] = []
    tokenizer = _tokenizer_state(source.parent, config.model.vocab_size, notes)
    model = config.model.model_copy(update={"dtype": narrowest(array.dtype for array in weights.values())})
    config = config.model_copy(
        update={"model": model, "data": DataConfig(tokenizer=tokenizer["name"] if tokenizer else "byte")}
    )
    origin = {"family": "oxidizr", "digest": digest_of([source])}
    return _save(target, config, weights, dtype, tokenizer, origin, notes)


def export_checkpoint(
    source: Path, target: Path, dtype: str | None = None, max_shard_bytes: int | None = None, overwrite: bool = False
) -> Converted:
    """The weights of a checkpoint, or of the newest in a directory, as a directory in Hugging Face's layout.

    Raises UsageError for a model that has none or a target that cannot be taken, CheckpointError for a damaged file.
    """
    path = file_meant(source)
    _may_hold_a_model(target, overwrite)
    header = format.verify(path)
    check_name(path, header.metadata)
    state = from_file(Checkpoint(format.mapped(path)[1], header.metadata), path)
    model = Config.from_canonical(state.config).model
    family, reason = family_for(model)
    if family is None:
        raise UsageError(f"{path}: {reason}")
    if dtype is not None:
        model = model.model_copy(update={"dtype": dtype})
    notes: list[str] = []
    texts, end_of_text = _tokenizer_texts(state, model, notes)
    weights = stored_as(state.weights, model.dtype)
    files = write_pretrained(target, model, weights, max_shard_bytes=max_shard_bytes, eos_token_id=end_of_text, beside=texts)
    return Converted(family.model_type, model, _count(weights), state.tokenizer["name"], files, notes)


def _may_be_written(target: Path, overwrite: bool) -> None:
    if target.is_dir():
        raise UsageError(f"{target}: is a directory; give the name of a file")
    if target.exists() and not overwrite:
        raise UsageError(f"{target}: is there; give another name, or replace it with --overwrite")
    if target.stem.startswith("step_") and target.stem != "step_0":
        raise UsageError(f"{target}: a model that is imported is at step 0; call it step_0.safetensors, or after itself")


def _may_hold_a_model(target: Path, overwrite: bool) -> None:
    if target.exists() and not target.is_dir():
        raise UsageError(f"{target}: is a file; give a directory, or a name that ends in .safetensors to import a model")
    if CheckpointStore(target).steps():
        raise UsageError(f"{target}: holds the step files of a run; give another directory")
    there = sorted(entry.name for entry in target.iterdir()) if target.is_dir() else []
    if there and not overwrite:
        raise UsageError(f"{target}: is there; give another name, or replace the model in it with --overwrite")
    strange = [name for name in there if not is_of_a_model(name)]
    if strange:
        raise UsageError(f"{target}: holds more than a model ({some(strange)}), so it is not replaced; give another name")


def _save(
    target: Path,
    config: Config,
    weights: Mapping[str, HostArray],
    dtype: str | None,
    tokenizer: dict[str, Any] | None,
    origin: dict[str, str],
    notes: list[str],
) -> Converted:
    """The checkpoint. origin: a family and a digest. Where there was no tokenizer, the lineage says so."""
    model = config.model if dtype is None else config.model.model_copy(update={"dtype": dtype})
    stored = stored_as(weights, model.dtype)
    state = RunState(
        weights=stored,
        optimizer={},
        step=0,
        cursor=0,
        windows_an_epoch=1,
        config=config.model_copy(update={"model": model}).canonical(),
        data={"digest": hashlib.sha256().hexdigest(), "tokens": 0},
        tokenizer=tokenizer or ByteTokenizer().state(),
        fingerprint=fingerprint(),
        lineage=[{"imported_from": {**origin, "tokenizer": "none" if tokenizer is None else tokenizer["name"]}}],
    )
    disk.make_directory(target.absolute().parent)
    format.save(target, *to_file(state))
    return Converted(origin["family"], model, _count(weights), state.tokenizer["name"], [target], notes)


def _count(weights: Mapping[str, HostArray]) -> int:
    return sum(array.size for array in weights.values())


# --- tokenizers -------------------------------------------------------------------------------------------------------


def _tokenizer_state(directory: Path, vocab_size: int, notes: list[str]) -> dict[str, Any] | None:
    """The state of the tokenizer whose files are in a directory. None where there are none."""
    tokenizer = tokenizer_in(directory)
    if tokenizer is None:
        notes.append(f"there is no {JSON_NAME}: the checkpoint says `byte`, for want of the right one")
        return None
    if tokenizer.vocab_size > vocab_size:
        notes.append(f"the tokenizer has ids up to {tokenizer.vocab_size - 1}, the model up to {vocab_size - 1}")
    return tokenizer.state()


def _tokenizer_texts(state: RunState, model: ModelConfig, notes: list[str]) -> tuple[dict[str, str], int | None]:
    """The texts of a tokenizer's files by name, and the id that ends a text."""
    match state.lineage:
        case [*_, {"imported_from": {"tokenizer": "none"}}]:
            notes.append("no tokenizer was written: this model was imported without one")
            return {}, None
    try:
        tokenizer = tokenizer_from_state(state.tokenizer)
    except DataError as error:
        notes.append(f"no tokenizer was written: {error}")
        return {}, None
    end, files = tokenizer.end_of_text, tokenizer_files(tokenizer, model.max_seq_len)
    inside = end is not None and end < model.vocab_size
    return {name: json_text(content) for name, content in files.items()}, end if inside else None
