"""Small whole packages for tests: a tiny model of this package, its documents, in one file or in shards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import tiny

from oxidizr_ref.checkpoint import format
from oxidizr_ref.config import ModelConfig
from oxidizr_ref.model import LanguageModel

README = "---\nlicense: mit\ntags:\n- tiny\n---\n# A tiny model\n\n![loss](loss_curve.svg)\n"


def make_package(directory: Path, shards: int = 1, **model: Any) -> Path:
    """Write a package that is whole. ``model``: keys of the config that are not `tiny.MODEL`'s."""
    config = ModelConfig(**{**tiny.MODEL, **model})
    weights = {name: np.asarray(array) for name, array in LanguageModel(config, seed=0).state_dict().items()}
    directory.mkdir(parents=True, exist_ok=True)
    if shards == 1:
        format.save(directory / "model.safetensors", weights, {"format": "pt"})
    else:
        names = sorted(weights)
        weight_map = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(names)}
        for shard in set(weight_map.values()):
            part = {name: weights[name] for name in weights if weight_map[name] == shard}
            format.save(directory / shard, part, {"format": "pt"})
        size = sum(array.nbytes for array in weights.values())
        write_json(directory / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": weight_map})
    write_json(directory / "config.json", {"model_type": "oxidizr_ref", **config.model_dump(exclude_none=True, mode="json")})
    write_json(directory / "training_config.json", {"step": 1})
    write_json(directory / "tokenizer_config.json", {"eos_token": "<|endoftext|>"})
    write_json(directory / "tokenizer.json", {"version": "1.0"})
    (directory / "README.md").write_text(README)
    (directory / "loss_curve.svg").write_text("<svg/>")
    return directory


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1))


def change_json(path: Path, **keys: Any) -> None:
    """Set keys of a JSON object; None removes them."""
    value = {**json.loads(path.read_text()), **keys}
    write_json(path, {key: part for key, part in value.items() if part is not None})
