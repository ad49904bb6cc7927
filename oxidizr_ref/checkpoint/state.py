"""What is saved, why, and whether a saved run fits the one that wants to continue it.

Only what cannot be derived is saved. The order of the data, the learning rate, dropped tails, random bits: all follow from
(config, seed, step, cursor) and are recomputed. `epoch` and `tokens_seen` are stored for readers of the file, and compared
with what is recomputed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from oxidizr_ref.backend import Array
from oxidizr_ref.checkpoint.format import Checkpoint
from oxidizr_ref.checkpoint.header import FORMAT_VERSION
from oxidizr_ref.config import canonical_json, config_differences, with_younger_keys
from oxidizr_ref.errors import CheckpointError, MismatchError
from oxidizr_ref.transfers import HostCopies
from oxidizr_ref.version import NUMERICS_VERSION

_OPTIMIZER = "optimizer."
_TOKENIZER = "tokenizer.json"  # the tensor that holds the text of that file, where a tokenizer was made of one

#: What `--allow-mismatch` takes.
ALLOWABLE = ("seed", "data", "dtype")


@dataclass(frozen=True)
class RunState:
    """All of a run at an optimizer-step boundary.

    ================  =====================================================  ==========================
    field             why it is needed                                       who owns it
    ================  =====================================================  ==========================
    weights           what is being trained                                  model.LanguageModel
    optimizer         the moments: ``<slot>.<parameter>``                    optim.AdamW
    step              updates done; addresses learning rate and random bits  trainer.Trainer
    cursor            windows of data consumed; addresses the data           trainer.Trainer
    windows_an_epoch  only to derive and compare ``epoch``                   data.Windows
    config            the keys that determine the bits, seed included        config.Config
    data              digest and length of the token stream                  data.TokenStream
    tokenizer         name, digest, vocabulary: text can be made again       tokenizers.Tokenizer
    fingerprint       the machine class                                      fingerprint
    lineage           earlier changes of config, data or machine class       this file
    loss_scale        f16 on a device: the scale and its counts, else None   loss_scale.LossScale
    ================  =====================================================  ==========================
    """

    weights: Mapping[str, Array]
    optimizer: Mapping[str, Array]
    step: int
    cursor: int
    windows_an_epoch: int
    config: dict[str, Any]
    data: dict[str, Any]
    tokenizer: dict[str, Any]
    fingerprint: dict[str, Any]
    lineage: list[dict[str, Any]] = field(default_factory=list)
    loss_scale: dict[str, Any] | None = None

    def progress(self) -> dict[str, Any]:
        """Where the run stands, the derived numbers included."""
        scale = {} if self.loss_scale is None else {"loss_scale": self.loss_scale}
        return scale | {
            "step": self.step,
            "cursor": self.cursor,
            "windows_an_epoch": self.windows_an_epoch,
            "epoch": self.cursor // self.windows_an_epoch,
            "tokens_seen": self.cursor * int(self.config["model"]["max_seq_len"]),
        }

    def origin(self) -> dict[str, Any]:
        """A line of lineage: what a run that goes on from here, changed, came from."""
        return {
            "step": self.step,
            "config": _sha256(self.config),
            "data": self.data["digest"],
            "fingerprint": _sha256(self.fingerprint),
        }


def to_file(state: RunState) -> tuple[HostCopies, dict[str, str]]:
    """``(tensors, metadata)`` as `format.save` takes them. Of a device, the tensors are complete after their `wait`."""
    return HostCopies(tensors_of(state)), metadata_of(state)


def tensors_of(state: RunState) -> dict[str, Array]:
    """The arrays of a file by name, where they live."""
    text = state.tokenizer.get("json")
    file = {} if text is None else {_TOKENIZER: np.frombuffer(text.encode(), dtype=np.uint8).copy()}
    return {**state.weights, **{_OPTIMIZER + name: array for name, array in state.optimizer.items()}, **file}


def metadata_of(state: RunState) -> dict[str, str]:
    """The strings of a file."""
    return {
        "format": "pt",  # what Hugging Face loaders expect of a file they take weights from
        "format_version": str(FORMAT_VERSION),
        "numerics_version": str(NUMERICS_VERSION),
        "progress": canonical_json(state.progress()),
        "config": canonical_json(state.config),
        "data": canonical_json(state.data),
        "tokenizer": canonical_json({key: value for key, value in state.tokenizer.items() if key != "json"}),
        "fingerprint": canonical_json(state.fingerprint),
        "lineage": canonical_json(state.lineage),
    }


def from_file(file: Checkpoint, where: object) -> RunState:
    """The state inside a verified file. Raises CheckpointError (naming ``where``) when it is not a training state."""
    try:
        if not 1 <= int(file.metadata["format_version"]) <= FORMAT_VERSION:
            raise ValueError("a format version that never was")
        parts = {key: _of_the_right_kind(key, json.loads(file.metadata[key])) for key in _FIELDS}
        progress = parts.pop("progress")
        if _TOKENIZER in file.tensors:
            parts["tokenizer"]["json"] = file.tensors[_TOKENIZER].tobytes().decode()
        state = RunState(
            weights={n: a for n, a in file.tensors.items() if n != _TOKENIZER and not n.startswith(_OPTIMIZER)},
            optimizer={n.removeprefix(_OPTIMIZER): a for n, a in file.tensors.items() if n.startswith(_OPTIMIZER)},
            step=int(progress["step"]),
            cursor=int(progress["cursor"]),
            windows_an_epoch=int(progress["windows_an_epoch"]),
            loss_scale=_loss_scale(progress.get("loss_scale")),
            **parts,
        )
        consistent = state.progress() == progress
    except (KeyError, TypeError, ValueError, ZeroDivisionError, RecursionError) as error:
        raise CheckpointError(f"{where}: holds no training state of this format ({error!r})") from error
    if not consistent:
        raise CheckpointError(f"{where}: epoch or tokens_seen do not follow from its cursor: {progress}")
    return state


def _loss_scale(state: Any) -> dict[str, Any] | None:
    if state is None:
        return None
    return {"scale": float(state["scale"]), **{key: int(state[key]) for key in ("good_steps", "skipped")}}


#: The metadata that hold JSON objects (lineage: a list), and the keys without which they say too little.
_FIELDS: dict[str, tuple[str, ...]] = {
    "progress": ("step", "cursor", "windows_an_epoch"),
    "config": ("model", "trainer", "data", "device"),
    "data": ("digest", "tokens"),
    "tokenizer": ("name", "digest"),
    "fingerprint": (),
    "lineage": (),
}


def _of_the_right_kind(key: str, value: Any) -> Any:
    if not isinstance(value, list if key == "lineage" else dict) or not all(name in value for name in _FIELDS[key]):
        raise ValueError(f"{key} is not what it should be")
    return value


def continue_from(
    saved: RunState, here: RunState, where: object, *, allow: frozenset[str] = frozenset(), strict: bool = False
) -> tuple[list[str], list[dict[str, Any]]]:
    """May the run ``here`` continue ``saved``? Returns (what to tell the user, a line each; the lineage to carry on).

    ``where`` is the file of ``saved``, for messages.

    Keys that shape the model must match. Seed, data and dtype must match unless allowed by name. Keys of the trainer and the
    machine class may change and are told. Raises MismatchError naming what does not fit; with ``strict``, for any change.
    Raises CheckpointError when the file's tensors are not those of its own config.
    """
    changed = config_differences(with_younger_keys(saved.config), with_younger_keys(here.config))
    _refuse_another_model(changed)
    _refuse_other_tensors(saved.weights, here.weights, f"{where}: weight")
    _refuse_other_tensors(saved.optimizer, here.optimizer, f"{where}: optimizer slot")
    notices = []
    for kind, differs, what in (
        ("seed", _changes(changed, "trainer.seed"), _changes(changed, "trainer.seed")),
        ("dtype", _changes(changed, *_DTYPES), _changes(changed, *_DTYPES)),
        ("data", not _same_data(saved, here), _describe_data(saved, here)),
    ):
        if differs and kind not in allow:
            way = "give its own with -d FILE, or accept it with" if kind == "data" else "accept it with"
            raise MismatchError(f"the checkpoint was made with other {kind}: {what}; {way} --allow-mismatch {kind}")
        if differs:
            converted = "; every number is converted, rounded to nearest" if kind == "dtype" else ""
            notices.append(f"going on with other {kind}: {what}{converted}")
    rest = _changes(changed, "trainer.", "data.", "device", but=("trainer.seed", *_DTYPES))
    if rest:
        notices.append(f"config changed at step {saved.step}: {rest}")
    machine = _machine_changes(saved.fingerprint, here.fingerprint)
    if machine:
        notices.append(f"another machine class than the checkpoint's, so other bits from here on: {machine}")
    if not notices and saved.windows_an_epoch != here.windows_an_epoch:
        raise CheckpointError(f"the same data gave {saved.windows_an_epoch} windows there, {here.windows_an_epoch} here")
    if notices and strict:
        raise MismatchError(f"--strict: {notices[0]}")
    lineage = [*saved.lineage, saved.origin()] if notices else list(saved.lineage)
    return notices, lineage


#: The keys that say how numbers are stored.
_DTYPES = ("model.dtype", "trainer.optimizer_dtype")


def _refuse_another_model(changed: list[tuple[str, Any, Any]]) -> None:
    shape = [c for c in changed if c[0].startswith("model.") and c[0] != "model.dtype"]
    if shape:
        raise MismatchError(f"the checkpoint holds another model: {_changes(shape, 'model.')}; resume with its own config")


def _refuse_other_tensors(saved: Mapping[str, Array], here: Mapping[str, Array], what: str) -> None:
    for name in sorted(saved.keys() | here.keys()):
        found, wanted = (f"of shape {list(arrays[name].shape)}" if name in arrays else "absent" for arrays in (saved, here))
        if found != wanted:
            raise CheckpointError(f"{what} {name} is {found}; by the config in the file it should be {wanted}")


def _changes(changed: list[tuple[str, Any, Any]], *prefixes: str, but: tuple[str, ...] = ()) -> str:
    """``key old → new`` of the changed keys with one of these prefixes, in one line."""
    chosen = [change for change in changed if change[0].startswith(prefixes) and change[0] not in but]
    return ", ".join(f"{key} {old} → {new}" for key, old, new in chosen)


def _same_data(saved: RunState, here: RunState) -> bool:
    """Whether tokens, tokenizer, and what is marked in the tokens are equal, as far as both runs use it: the config says."""
    both = saved.data.keys() & here.data.keys()
    return saved.tokenizer == here.tokenizer and all(saved.data[key] == here.data[key] for key in both)


def _describe_data(saved: RunState, here: RunState) -> str:
    if saved.tokenizer != here.tokenizer:
        return f"tokenizer {saved.tokenizer['name']} → {here.tokenizer['name']}"
    old, new = saved.data, here.data
    for marks in ("documents", "responses"):
        if old["digest"] == new["digest"] and old.get(marks) != new.get(marks):
            return f"the same tokens, with other {marks}"
    return f"{old['tokens']} tokens of SHA-256 {old['digest'][:12]}… → {new['tokens']} tokens of {new['digest'][:12]}…"


def _machine_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    names = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    short = {key for key in names if len(str(old.get(key))) + len(str(new.get(key))) < 60}
    return ", ".join(f"{key} {old.get(key)} → {new.get(key)}" if key in short else key for key in names)


def _sha256(value: Any) -> str:
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()
