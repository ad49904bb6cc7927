"""A trained model as a package: a directory that others can open, publish and understand.

::

    model.safetensors         the weights (or shards, and model.safetensors.index.json), without optimizer state
    config.json               the model: in Hugging Face's layout where it has one, else by our own names
    generation_config.json    where a text ends
    training_config.json      how it came to be: config, progress, data, lineage, machine, losses, digests
    tokenizer.json, tokenizer_config.json, oxidizr_tokenizer.json
    loss_curve.svg            losses against steps, where their log was beside the checkpoint
    README.md                 the model card

A package is made under a temporary name beside the final one and gets that when all of it is on the disk. The same
checkpoint and options give the same bytes.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from oxidizr_ref.checkpoint import disk
from oxidizr_ref.config import Config, ModelConfig, canonical_json, with_younger_keys
from oxidizr_ref.errors import UsageError
from oxidizr_ref.interop.dotenv import setting
from oxidizr_ref.interop.families import DTYPES
from oxidizr_ref.interop.hugging_face import family_of, write_pretrained
from oxidizr_ref.interop.loss_picture import loss_picture
from oxidizr_ref.interop.model_card import Packaged, model_card
from oxidizr_ref.interop.source import Source
from oxidizr_ref.interop.tokenizer_files import tokenizer_files
from oxidizr_ref.interop.weight_files import json_text, stored_as, write_directory
from oxidizr_ref.tokenizers import Tokenizer, tokenizer_from_state
from oxidizr_ref.version import __version__

HostArray = np.ndarray[Any, Any]

#: The ``model_type`` of a config.json that holds our own keys.
OWN_TYPE = "oxidizr_ref"
_TRAINING_CONFIG, _PICTURE, _CARD = "training_config.json", "loss_curve.svg", "README.md"
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9])?")  # as the hub wants them
_SIZE = re.compile(r"([0-9]{1,6}(?:\.[0-9]{1,6})?) ?([KMGT]?)B?", re.IGNORECASE)
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}")
_LANGUAGE = re.compile(r"[a-z]{2,3}(?:-[A-Za-z0-9]{1,8})*")


@dataclass(frozen=True)
class Wishes:
    """What a package is to be, beyond what its checkpoint says.

    output: its directory; None: ``hf/<username>/<name>``. dtype: of the weights; None: the checkpoint's. license: a name
    that the hub knows, or any other; None: the card says that none was stated. languages: codes such as ``en``.
    max_shard_bytes: of tensors in a file; None: all in one.
    """

    name: str | None = None
    username: str | None = None
    output: Path | None = None
    license: str | None = None
    languages: Sequence[str] = ()
    dtype: str | None = None
    max_shard_bytes: int | None = None
    overwrite: bool = False


@dataclass(frozen=True)
class Packed:
    """What was written: where, the sizes of the files by name, and in whose layout the weights are (None: our own)."""

    directory: Path
    sizes: dict[str, int]
    family: str | None


def pack(source: Source, wishes: Wishes) -> Packed:
    """Write a package of a checkpoint.

    Raises UsageError for wishes that cannot be met, DataError when a weight has no place in ``dtype``, and OSError when
    the disk refuses. Then nothing is left, and what stood under the name before still stands.
    """
    name, username, license_id = _names(source, wishes)
    output = wishes.output or Path("hf", str(username), name)
    output = output if output.name not in ("", "..") else output.resolve()
    _must_be_free(output, wishes.overwrite)
    flags = {f"--dtype {wishes.dtype}": f"model.dtype={json.dumps(wishes.dtype)}"} if wishes.dtype else {}
    dtype = Config.from_canonical(source.state.config, flags=flags).model.dtype
    config = source.config.model.model_copy(update={"dtype": dtype, "name": name})
    family, repository = family_of(config), f"{username}/{name}" if username else name
    tokenizer = tokenizer_from_state(source.state.tokenizer)
    weights = stored_as(source.state.weights, dtype)
    with _in_place_of(output) as directory:
        _write_weights(directory, config, weights, wishes.max_shard_bytes, tokenizer.end_of_text)
        _write_texts(directory, source, tokenizer, config)
        files = disk.names(directory)
        card = Packaged(source, tokenizer, name, repository, family, dtype, files, license_id, wishes.languages)
        disk.replace(directory / _CARD, model_card(card).encode())
    return Packed(output, {file: disk.file_size(output / file) for file in disk.names(output)}, family)


def _names(source: Source, wishes: Wishes) -> tuple[str, str | None, str | None]:
    """The model's name, the user's and the licence's. Raises UsageError for what the hub would not take."""
    name = _checked(wishes.name or source.config.model.name, "--name", _NAME)
    username = wishes.username or (None if wishes.output else setting("HF_USERNAME"))
    if username is not None:
        _checked(username, "--username", _NAME)
    elif wishes.output is None:
        ways = "give -u NAME, set HF_USERNAME in the environment or in .env, or give the directory with -o"
        raise UsageError(f"pack: whose model is it? {ways}")
    for language in wishes.languages:
        _checked(language, "--language", _LANGUAGE)
    license_id = None if wishes.license is None else _checked(wishes.license.lower(), "--license", _LICENSE)
    return name, username, license_id


def bytes_of(size: str, option: str) -> int:
    """The bytes that a size such as ``500MB`` or ``2GB`` means, in powers of 1000. Raises UsageError naming the option."""
    match = _SIZE.fullmatch(size.strip())
    if match is None or float(match[1]) == 0:
        raise UsageError(f"{option} {size}: expected a size such as 500MB or 2GB")
    return max(1, int(float(match[1]) * 1000 ** " KMGT".index((match[2] or " ").upper())))


def _checked(text: str, option: str, pattern: re.Pattern[str]) -> str:
    """``text``, if it may stand in a path and in the names of the hub. Raises UsageError."""
    if not pattern.fullmatch(text) or any(part in text for part in ("..", "--")) or text.endswith(".git"):
        shape = "letters, digits, and single . _ - between them" if pattern is _NAME else "a short code, such as en or mit"
        raise UsageError(f"{option} {text[:100]!r}: expected {shape}")
    return text


def _must_be_free(output: Path, overwrite: bool) -> None:
    """Raises UsageError where something stands that must not be replaced: with ``overwrite``, anything but a package."""
    if not output.exists() and not output.is_symlink():
        return
    if not overwrite:
        raise UsageError(f"{output}: is there already; replace it with --overwrite, or choose another --output")
    ours = output.is_dir() and not output.is_symlink() and disk.exists(output / _TRAINING_CONFIG)
    if not ours:
        raise UsageError(f"{output}: holds no {_TRAINING_CONFIG}, so it is not replaced; choose another --output")


def _write_weights(
    directory: Path, config: ModelConfig, weights: dict[str, HostArray], most: int | None, end_of_text: int | None
) -> None:
    """The weights and config.json."""
    if family_of(config) is not None:
        write_pretrained(directory, config, weights, max_shard_bytes=most, eos_token_id=end_of_text)
        return
    write_directory(directory, {name: array.nbytes for name, array in weights.items()}, weights.__getitem__, most)
    own = {"architectures": ["OxidizrRefForCausalLM"], "model_type": OWN_TYPE, "oxidizr_ref_version": __version__}
    # Under the name dtype transformers, which may be asked for the tokenizer, expects one of its own words.
    keys = config.model_dump(mode="json", exclude={"dtype"}) | {"torch_dtype": DTYPES[config.dtype]}
    _write(directory / "config.json", own | keys)


def _write_texts(directory: Path, source: Source, tokenizer: Tokenizer, config: ModelConfig) -> None:
    _write(directory / "generation_config.json", {"eos_token_id": tokenizer.end_of_text})
    _write(directory / _TRAINING_CONFIG, _training_config(source, config))
    for file, content in tokenizer_files(tokenizer, config.max_seq_len).items():
        _write(directory / file, content)
    picture = loss_picture(source.losses("loss"), source.losses("eval_loss"))
    if picture is not None:
        disk.replace(directory / _PICTURE, picture.encode())


def _write(path: Path, content: Any) -> None:
    disk.replace(path, json_text(content).encode())


def _training_config(source: Source, config: ModelConfig) -> dict[str, Any]:
    """How the model came to be. Nothing in it tells of names or paths on the machine that trained it."""
    state = source.state
    losses = {key: source.losses(key)[-1:] for key in ("loss", "eval_loss")}
    return {
        "format": "oxidizr_ref.package",
        "version": 1,
        "oxidizr_ref_version": __version__,
        "numerics_version": source.numerics,
        "name": config.name,
        "dtype": config.dtype,
        "checkpoint": {"file": source.path.name, "sha256": source.sha256, "step": state.step},
        "config": json.loads(canonical_json(with_younger_keys(state.config))),
        "config_digest": source.config_digest,
        "progress": state.progress(),
        "losses": {key: {"step": last[0][0], "value": last[0][1]} if last else None for key, last in losses.items()},
        "data": state.data,
        "tokenizer": {key: state.tokenizer[key] for key in ("name", "digest")},
        "fingerprint": state.fingerprint,
        "fingerprint_digest": source.machine_digest,
        "lineage": state.lineage,
    }


# --- all or nothing ---------------------------------------------------------------------------------------------------


@contextmanager
def _in_place_of(output: Path) -> Iterator[Path]:
    """A directory to write into, which becomes ``output`` when the context ends well, or else is gone.

    A process that was killed may have left one: it is emptied and used, unless another process holds it.
    """
    made, old = output.with_name(f".{output.name}.tmp"), output.with_name(f".{output.name}.old.tmp")
    disk.make_directory(made)
    lock, held = disk.Lock(made / ".lock"), True
    with suppress(OSError):  # where files cannot be locked nothing is guarded
        held = lock.acquire()
    if not held:
        raise UsageError(f"{output}: another process is packing into it; let it end, or choose another --output")
    try:
        for file in disk.names(made):
            if file != ".lock":
                disk.remove(made / file)
        yield made
        disk.sync_directory(made)
        if output.exists():
            shutil.rmtree(old, ignore_errors=True)
            disk.rename(output, old)
        disk.rename(made, output)
        disk.remove(output / ".lock")
        disk.sync_directory(output.parent)
    except BaseException:
        with suppress(OSError):
            shutil.rmtree(made, ignore_errors=True)
            if old.exists() and output.exists():
                shutil.rmtree(old)
            elif old.exists():
                disk.rename(old, output)
        raise
    finally:
        lock.release()
    shutil.rmtree(old, ignore_errors=True)
