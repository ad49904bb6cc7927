"""A model wherever it is: a step file, the directory of a run, a package, or a directory in Hugging Face's layout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oxidizr_ref.backend import Array
from oxidizr_ref.checkpoint import disk
from oxidizr_ref.checkpoint.store import CheckpointStore
from oxidizr_ref.config import ModelConfig
from oxidizr_ref.errors import DataError, UsageError
from oxidizr_ref.interop.pack import open_package
from oxidizr_ref.interop.source import choose
from oxidizr_ref.interop.weight_files import digest_of, read_json
from oxidizr_ref.model import LanguageModel
from oxidizr_ref.tokenizer_libraries import JsonTokenizer
from oxidizr_ref.tokenizers import Tokenizer, tokenizer_from_state


@dataclass(frozen=True)
class Opened:
    """A model that was found, and proved whole where its file can tell.

    tokenizer: None where nothing says which. begin: the token that begins documents, for such a model. what: in a few
    words. lineage: of a run that begins with it.
    data: digest and length of what it was trained on, where that is known. notices: what the user should know.
    """

    config: ModelConfig
    weights: Mapping[str, Array]
    tokenizer: Tokenizer | None
    begin: int | None
    what: str
    lineage: list[dict[str, Any]]
    data: Mapping[str, Any]
    notices: tuple[str, ...] = ()

    def model(self, device: str = "cpu") -> LanguageModel:
        """The model, ready to compute on a device."""
        model = LanguageModel(self.config, 0, device)
        model.load_state_dict(self.weights)
        return model

    def its_tokenizer(self) -> Tokenizer:
        """The tokenizer. Raises DataError where nothing says which it is."""
        if self.tokenizer is None:
            raise DataError(f"{self.what}: has no tokenizer beside it; add its tokenizer.json")
        return self.tokenizer


def open_model(path: Path) -> Opened:
    """The model at ``path``; of a run's directory, the newest step file that is whole.

    Raises UsageError where there is none, CheckpointError or DataError where it is damaged or is no model of ours.
    """
    if not path.exists():
        raise UsageError(f"{path}: no such file or directory; give a step file, a run's directory, or a model's")
    if path.is_dir() and not CheckpointStore(path).steps() and disk.exists(path / "config.json"):
        return _of_package(path)
    source = choose(path, "latest") if path.is_dir() else choose(path.parent, str(path))
    state, tokenizer = source.state, tokenizer_from_state(source.state.tokenizer)
    imported = any("imported_from" in line for line in state.lineage)
    return Opened(
        source.config.model,
        state.weights,
        tokenizer,
        None if imported else tokenizer.end_of_text,
        f"{source.path} (step {state.step})",
        [*state.lineage, {"init_from": state.origin()}],
        state.data,
        tuple(source.notices),
    )


def _of_package(path: Path) -> Opened:
    package = open_package(path)
    json = path / "tokenizer.json"
    tokenizer = package.tokenizer or (JsonTokenizer.from_file(json) if disk.exists(json) else None)
    files = sorted(file for file in path.iterdir() if file.name.endswith((".safetensors", "config.json")))
    if package.tokenizer is not None:
        begin = package.tokenizer.end_of_text
    else:
        begin = read_json(path / "config.json").get("bos_token_id") if tokenizer is not None else None
    lineage = [{"init_from": {"digest": digest_of(files)}}]
    return Opened(package.config, package.weights, tokenizer, begin, str(path), lineage, {})
