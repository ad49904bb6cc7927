"""Small models of every family of Hugging Face's that is ours as well, written in its layout, and changed afterwards."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from oxidizr_ref.backend import STORAGE_DTYPES
from oxidizr_ref.config import ModelConfig
from oxidizr_ref.interop.families import LATENT_EPS
from oxidizr_ref.interop.hugging_face import write_pretrained
from oxidizr_ref.interop.layouts import our_shapes

Arrays = dict[str, np.ndarray[Any, Any]]

_BASE: dict[str, Any] = {"hidden_size": 16, "num_layers": 2, "vocab_size": 260, "max_seq_len": 8}
_ATTENTION = {**_BASE, "num_heads": 2, "intermediate_size": 24}
_LATENT = {**_ATTENTION, "kv_latent_dim": 10, "q_latent_dim": 6, "d_rope": 4, "mla_latent_norm": True}
_LATENT |= {"mla_q_rope_from": "latent", "rms_norm_eps": LATENT_EPS}
_SHARED = {"num_experts": 3, "experts_per_tok": 2, "norm_topk_prob": False, "shared_expert_enabled": True}
_MAMBA2 = {"mamba2_num_heads": 4, "mamba2_state_size": 6, "mamba2_chunk_size": 4, "mamba2_n_groups": 2}

#: By name: the family, and the keys of the model.
EXAMPLES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {**_ATTENTION, "kv_heads": 1}),
    "llama_tied": ("llama", {**_ATTENTION, "tie_word_embeddings": True, "rope_theta": 5e5}),
    "mixtral": ("mixtral", {**_ATTENTION, "num_experts": 3, "experts_per_tok": 2}),
    "mixtral_of_one": ("mixtral", {**_ATTENTION, "num_experts": 3, "experts_per_tok": 1, "norm_topk_prob": True}),
    "deepseek_v2": ("deepseek_v2", {**_LATENT, **_SHARED}),
    "deepseek_v2_no_q_latent": ("deepseek_v2", {**_LATENT, **_SHARED, "q_latent_dim": 0, "mla_q_rope_from": "hidden"}),
    "deepseek_v2_dense": ("deepseek_v2", _LATENT),
    "mamba": (
        "mamba",
        {**_BASE, "mamba_layers": [0, 1], "mamba_d_state": 5, "mamba_d_conv": 3, "tie_word_embeddings": True},
    ),
    "mamba2": ("mamba2", {**_BASE, **_MAMBA2, "mamba_layers": [0, 1]}),
}


def config_of(name: str, **changes: Any) -> ModelConfig:
    """The config of an example."""
    return ModelConfig(**{"name": name, **EXAMPLES[name][1], **changes})


def weights_of(config: ModelConfig, seed: int = 0) -> Arrays:
    """Normal numbers for every tensor of a model, in its dtype."""
    generator = np.random.default_rng(seed)
    dtype = STORAGE_DTYPES[config.dtype]
    return {name: generator.standard_normal(shape).astype(dtype) for name, shape in our_shapes(config).items()}


def write_example(directory: Path, name: str, most: int | None = None, **changes: Any) -> Path:
    """Write an example in Hugging Face's layout."""
    config = config_of(name, **changes)
    write_pretrained(directory, config, weights_of(config), max_shard_bytes=most)
    return directory


def edit_config(directory: Path, changes: Mapping[str, Any], absent: tuple[str, ...] = ()) -> None:
    """Change keys of config.json, and take some away."""
    path = directory / "config.json"
    data = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in data.items() if key not in absent}))


def edit_tensors(directory: Path, change: Callable[[Arrays], object]) -> None:
    """Let ``change(tensors)`` edit those of model.safetensors, and save them with the library."""
    path = directory / "model.safetensors"
    tensors = {name: array.copy() for name, array in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)
