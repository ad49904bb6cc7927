"""A model wherever it is: a step file, the directory of a run, a package, or a directory in Hugging Face's layout."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from oxidizr_ref.backend import STORAGE_DTYPES, Array, compute_dtype, place
from oxidizr_ref.checkpoint import disk
from oxidizr_ref.checkpoint.store import CheckpointStore
from oxidizr_ref.config import ModelConfig
from oxidizr_ref.errors import DataError, UsageError
from oxidizr_ref.interop.families import DTYPES
from oxidizr_ref.interop.hugging_face import read_pretrained
from oxidizr_ref.interop.layouts import our_shapes
from oxidizr_ref.interop.pack import OWN_TYPE
from oxidizr_ref.interop.source import Source, choose
from oxidizr_ref.interop.tokenizer_files import STATE_FILE, tokenizer_in
from oxidizr_ref.interop.weight_files import digest_of, must_fit, read_directory, read_json
from oxidizr_ref.model import LanguageModel
from oxidizr_ref.tokenizer_libraries import JSON_NAME, JsonTokenizer
from oxidizr_ref.tokenizers import Tokenizer, tokenizer_from_state


@dataclass(frozen=True)
class Opened:
    """A model that was found, and proved whole where its file can tell.

    tokenizer: None where nothing says which. begin: the token that begins documents, for such a model; ends: those that end
    them. what: in a few words. lineage: of a run that begins with it. apart: whether it was trained on documents kept apart.
    notices: what the user should know.
    """

    config: ModelConfig
    weights: Mapping[str, Array]
    tokenizer: Tokenizer | None
    begin: int | None
    ends: frozenset[int]
    what: str
    lineage: list[dict[str, Any]]
    apart: bool = False
    notices: tuple[str, ...] = ()

    def model(self, device: str = "cpu") -> LanguageModel:
        """The model, ready to compute on a device. Raises DataError for weights that are not those of its config.

        On the host, weights of 16 bits become float32, as which they are computed with, once and for all.
        """
        stored = STORAGE_DTYPES[self.config.dtype]
        model, dtype = LanguageModel(self.config, seed=None), stored if device == "gpu" else compute_dtype(stored)
        parameters = dict(model.named_parameters())
        must_fit(self.weights, {name: p.full_shape for name, p in parameters.items()}, self.what)
        for p in parameters.values():  # first weights that nobody sees need not be drawn
            p.data = place(np.empty(p.full_shape, dtype=dtype), device)
        model.load_state_dict(self.weights)
        return model

    def its_tokenizer(self) -> Tokenizer:
        """The tokenizer. Raises DataError where nothing says which it is."""
        if self.tokenizer is None:
            raise DataError(f"{self.what}: nothing says what its tokenizer is; put its {JSON_NAME} beside it")
        return self.tokenizer


def open_model(path: Path) -> Opened:
    """The model at ``path``; of a run's directory, the newest step file that is whole.

    Raises UsageError where there is none, CheckpointError or DataError where it is damaged or is no model of ours.
    """
    if not path.exists():
        raise UsageError(f"{path}: no such file or directory; give a step file, a run's directory, or a model's")
    if not path.is_dir():
        # A name such as `latest` or `7` would be another wish than a file.
        return _of_step_file(choose(path.parent, os.path.join(os.curdir, path)))
    config = path / "config.json"
    if not CheckpointStore(path).steps() and disk.exists(config) and "trainer" not in read_json(config):
        return _of_package(path)
    return _of_step_file(choose(path, "latest"))


def _of_step_file(source: Source) -> Opened:
    state, what = source.state, f"{source.path} (step {source.state.step})"
    try:
        tokenizer = _tokenizer_of(source)
    except DataError as error:
        raise DataError(f"{source.path}: {error}") from None
    return Opened(
        source.config.model,
        state.weights,
        tokenizer,
        _begin(tokenizer, state.lineage),
        _ends(tokenizer),
        what,
        [*state.lineage, {"init_from": state.origin()}],
        _kept_apart(state.config),
        tuple(source.notices),
    )


def _tokenizer_of(source: Source) -> Tokenizer | None:
    """The one in the file; of a model that was imported without one, that of the file beside it."""
    state, beside = source.state, source.path.with_name(JSON_NAME)
    if _is_imported(state.lineage) and state.lineage[-1]["imported_from"].get("tokenizer") == "none":
        return JsonTokenizer.from_file(beside) if disk.exists(beside) else None
    return tokenizer_from_state(state.tokenizer)


def _of_package(path: Path) -> Opened:
    """A directory that `pack` wrote, or one in a layout of Hugging Face's."""
    data, weights = read_json(path / "config.json"), dict[str, Array]()
    if data.get("model_type") == OWN_TYPE:
        config = _own_config(data, path)
        arrays, files = read_directory(path)
        weights |= arrays
        must_fit(weights, our_shapes(config), path)
        digest = digest_of([path / "config.json", *files])
    else:
        read = read_pretrained(path)
        config = read.config
        weights |= read.weights
        digest = read.source_digest
    tokenizer, ours, training = tokenizer_in(path), disk.exists(path / STATE_FILE), path / "training_config.json"
    made = read_json(training) if ours and disk.exists(training) else {}
    lineage: list[dict[str, Any]] = made.get("lineage", []) if ours else [{"imported_from": {}}]
    origin = [{"init_from": {"digest": digest}}]
    begin, ends = _begin(tokenizer, lineage), _ends(tokenizer, _ends_named_in(path))
    return Opened(config, weights, tokenizer, begin, ends, str(path), origin, _kept_apart(made.get("config", {})))


def _kept_apart(config: Mapping[str, Any]) -> bool:
    """Whether a canonical config keeps documents apart."""
    return bool(config.get("data", {}).get("document_boundaries") == "reset")


def _own_config(data: Mapping[str, Any], where: Path) -> ModelConfig:
    """The model of a config.json that we wrote."""
    keys = {key: value for key, value in data.items() if key in ModelConfig.model_fields}
    dtype = {theirs: ours for ours, theirs in DTYPES.items()}.get(str(data.get("torch_dtype")))
    try:
        return ModelConfig.model_validate(keys | {"dtype": dtype})
    except ValueError as error:
        raise DataError(f"{where}: no model can be made of its config.json ({' '.join(str(error).split())})") from None


# --- where texts begin and end ----------------------------------------------------------------------------------------


def _begin(tokenizer: Tokenizer | None, lineage: list[dict[str, Any]]) -> int | None:
    """Here documents stand one behind the other, each ended by a token. Others may have trained otherwise."""
    if _is_imported(lineage):
        return _begin_of_template(tokenizer)
    return None if tokenizer is None else tokenizer.end_of_text


def _is_imported(lineage: list[dict[str, Any]]) -> bool:
    """Whether a model is as it came from elsewhere, not trained here yet."""
    return bool(lineage) and "imported_from" in lineage[-1]


def _begin_of_template(tokenizer: Tokenizer | None) -> int | None:
    return tokenizer.begin_of_text if isinstance(tokenizer, JsonTokenizer) else None


def _ends(tokenizer: Tokenizer | None, named: Any = None) -> frozenset[int]:
    """The token that ends documents, and those that a file of Hugging Face's names: one or a list."""
    own = None if tokenizer is None else tokenizer.end_of_text
    return frozenset(i for i in (own, *(named if isinstance(named, list) else [named])) if type(i) is int)


def _ends_named_in(directory: Path) -> Any:
    """What the files of a directory say that a text ends with, as transformers looks for it."""
    files = [directory / name for name in ("generation_config.json", "config.json")]
    found = [read_json(file).get("eos_token_id") for file in files if disk.exists(file)]
    return next((named for named in found if named is not None), None)
