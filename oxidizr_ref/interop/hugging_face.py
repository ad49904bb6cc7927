"""Models in Hugging Face's layout, read and written: a directory with config.json and safetensors files.

`families` says which families these are and how their tensors hold ours; nothing that would be another model is imported.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np

from oxidizr_ref.backend import STORAGE_DTYPES, Array, to_host
from oxidizr_ref.checkpoint import disk
from oxidizr_ref.config import ModelConfig
from oxidizr_ref.errors import DataError, UsageError
from oxidizr_ref.interop import weight_files
from oxidizr_ref.interop.families import Family, family_for, read_config, write_config
from oxidizr_ref.interop.layouts import Theirs, expected_shapes, layout, our_shapes
from oxidizr_ref.interop.tokenizer_files import STATE_FILE
from oxidizr_ref.tokenizer_libraries import JSON_NAME

__all__ = ["Pretrained", "expected_shapes", "family_of", "load_weights_file", "read_pretrained", "write_pretrained"]

HostArray: TypeAlias = np.ndarray[Any, Any]

_CONFIG, _GENERATION = "config.json", "generation_config.json"
_HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Pretrained:
    """A model that was read. weights: by our names, in our shapes, in the dtypes of the files, mostly views of them."""

    config: ModelConfig
    weights: dict[str, HostArray]
    family: str
    notes: list[str] = field(default_factory=list)
    source_digest: str = ""


def read_pretrained(directory: Path) -> Pretrained:
    """A model in Hugging Face's layout. ``config.dtype`` is the narrowest dtype that holds all weights exactly.

    ``source_digest``: SHA-256 of the files' names and digests. Raises DataError naming everything that has no meaning here,
    and every tensor that is missing, left over or of another shape.
    """
    path = directory / _CONFIG
    data = weight_files.read_json(path)
    family, config, notes = read_config(data, path)
    arrays, files = weight_files.read_directory(directory)
    arrays = {name: array for name, array in arrays.items() if not name.endswith("rotary_emb.inv_freq")}
    embedding = family.name("embed_tokens.weight")
    if config.tie_word_embeddings and not _same(arrays.pop(_HEAD, None), arrays.get(embedding)):
        raise DataError(f"{path}: tie_word_embeddings is true, but {_HEAD} is not {embedding}")
    vocabulary = len(arrays[embedding]) if embedding in arrays else config.vocab_size
    if vocabulary != config.vocab_size:
        notes.append(f"vocab_size is {config.vocab_size} in {_CONFIG}; the embedding has {vocabulary} rows, and counts")
    dtypes = {array.dtype for array in arrays.values()}
    name = weight_files.narrowest(dtypes)
    if len(dtypes) > 1:
        notes.append(f"weights of several dtypes ({', '.join(sorted(map(str, dtypes)))}) become {name}")
    config = config.model_copy(update={"vocab_size": vocabulary, "dtype": name, "name": _name_of(directory)})
    shapes = our_shapes(config)
    weights = {
        name: view(arrays[theirs.name]).reshape(shapes[name])
        for theirs in _fitting(family, config, arrays, directory)
        for name, view in theirs.ours.items()
    }
    return Pretrained(config, weights, family.model_type, notes, weight_files.digest_of([path, *files]))


def _same(a: HostArray | None, b: HostArray | None) -> bool:
    """Whether two tensors are the same, bit for bit; one that is absent contradicts nothing."""
    if a is None or b is None:
        return True
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


def _name_of(directory: Path) -> str:
    return directory.resolve().name or "model"


def _fitting(family: Family, config: ModelConfig, arrays: Mapping[str, HostArray], where: Path) -> list[Theirs]:
    """The layout that these arrays have. Raises DataError, comparing with the nearest, if they have none."""
    ways = [layout(family, config, stacked) for stacked in ((False, True) if family.is_sparse else (False,))]
    way = min(ways, key=lambda way: len({theirs.name for theirs in way} ^ arrays.keys()))
    weight_files.must_fit(arrays, {theirs.name: theirs.shape for theirs in way}, where)
    return way


def load_weights_file(path: Path, config: ModelConfig) -> dict[str, HostArray]:
    """oxidizr's own weights, a plain safetensors file with our names, as read-only views of it.

    Raises DataError naming every tensor that the config has and the file has not, or the other way round.
    """
    arrays = weight_files.mapped(path)
    weight_files.must_fit(arrays, our_shapes(config), path)
    return arrays


# --- writing ----------------------------------------------------------------------------------------------------------


def family_of(config: ModelConfig) -> str | None:
    """The family as which Hugging Face's libraries can read this model, exactly; None when there is none."""
    family, _ = family_for(config)
    return family.model_type if family is not None else None


def write_pretrained(
    directory: Path,
    config: ModelConfig,
    weights: Mapping[str, Array],
    *,
    max_shard_bytes: int | None = None,
    eos_token_id: int | None = None,
    beside: Mapping[str, str] = MappingProxyType({}),
) -> list[Path]:
    """Write a model for Hugging Face's libraries: config.json and its weights, in the config's dtype. Returns the files.

    weights: by our names. beside: texts of further files, such as a tokenizer's, by name. Files of a model that was there
    are replaced or removed; config.json, without which nobody takes a directory for a model, goes first and comes last.
    Raises UsageError for a model without such a layout, and OSError.
    """
    family, reason = family_for(config)
    if family is None:
        raise UsageError(f"{directory}: {reason}")
    weight_files.must_fit(weights, our_shapes(config), directory)
    dtype = STORAGE_DTYPES[config.dtype]
    tensors = {theirs.name: theirs for theirs in layout(family, config)}
    disk.make_directory(directory)
    disk.remove(directory / _CONFIG)
    disk.sync_directory(directory)
    for name in filter(is_of_a_model, disk.names(directory)):
        disk.remove(directory / name)
    sizes = {name: math.prod(theirs.shape) * dtype.itemsize for name, theirs in tensors.items()}
    files = weight_files.write_directory(
        directory, sizes, lambda name: _theirs(tensors[name], weights, dtype), max_shard_bytes
    )
    texts = dict(beside)
    if eos_token_id is not None:
        texts[_GENERATION] = weight_files.json_text({"eos_token_id": eos_token_id})
    texts[_CONFIG] = weight_files.json_text({**write_config(family, config), "eos_token_id": eos_token_id})
    for name, text in texts.items():
        disk.replace(directory / name, text.encode())
    return [*files, *(directory / name for name in texts)]


def is_of_a_model(name: str) -> bool:
    """Whether a file of this name belongs to a model as `write_pretrained` writes it."""
    weights = name.startswith("model") and name.endswith((".safetensors", ".safetensors.index.json"))
    return weights or name in (_CONFIG, _GENERATION, JSON_NAME, "tokenizer_config.json", STATE_FILE)


def _theirs(theirs: Theirs, weights: Mapping[str, Array], dtype: np.dtype[Any]) -> HostArray:
    first = to_host(weights[next(iter(theirs.ours))])
    if first.shape == theirs.shape:  # the same tensor: no copy, if it can be helped
        return np.ascontiguousarray(first.astype(dtype, copy=False))
    array = np.empty(theirs.shape, dtype)
    for name, view in theirs.ours.items():
        place = view(array)
        place[...] = to_host(weights[name]).reshape(place.shape)
    return array
