"""Where the tensors of our models lie in those of Hugging Face's families, described once and used both ways."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from oxidizr_ref.config import ModelConfig
from oxidizr_ref.errors import DataError
from oxidizr_ref.interop.families import Family, read_config
from oxidizr_ref.model import LanguageModel

HostArray: TypeAlias = np.ndarray[Any, Any]
View: TypeAlias = Callable[[HostArray], HostArray]


@dataclass(frozen=True)
class Theirs:
    """One of their tensors, and where in it each of ours lies: views, to be read and to be written through.

    A view of the array may have another shape than our tensor; in C order the numbers are the same.
    """

    name: str
    shape: tuple[int, ...]
    ours: Mapping[str, View]


def our_shapes(m: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of all tensors of a model of ours, by name."""
    return {name: parameter.full_shape for name, parameter in LanguageModel(m, seed=None).named_parameters()}


def layout(family: Family, m: ModelConfig, stacked: bool = False) -> list[Theirs]:
    """The tensors in which files of a family hold a model. ``stacked``: all experts of a layer in two tensors.

    transformers 5 stacks experts in memory, and takes them apart in files unless told not to. We write them apart.
    """
    shapes, made = our_shapes(m), list[Theirs]()
    for i in range(m.num_layers):
        made += _latent_attention(m, i) if family.is_latent else []
        made += _stacked_experts(m, i) if stacked else []
    inside = {name for theirs in made for name in theirs.ours}
    router = (".block_sparse_moe.gate.", ".mlp.gate.") if stacked else ("", "")
    alone = [(family.name(name).replace(*router), name) for name in shapes if name not in inside]
    return [*(Theirs(theirs, shapes[ours], {ours: _itself}) for theirs, ours in alone), *made]


def _itself(array: HostArray) -> HostArray:
    return array


def _rows(e: int, begin: int, end: int) -> View:
    return lambda array: array[e, begin:end]


def _stacked_experts(m: ModelConfig, i: int) -> list[Theirs]:
    """``gate_up_proj [E,2I,D]``, gate above up, and ``down_proj [E,D,I]``."""
    E, D, inner = m.num_experts, m.hidden_size, m.intermediate_size
    gate_up: dict[str, View] = {}
    down: dict[str, View] = {}
    for e in range(E):
        ours = f"layers.{i}.moe.experts.{e}"
        gate_up[f"{ours}.gate_proj.weight"] = _rows(e, 0, inner)
        gate_up[f"{ours}.up_proj.weight"] = _rows(e, inner, 2 * inner)
        down[f"{ours}.down_proj.weight"] = _rows(e, 0, D)
    theirs = f"model.layers.{i}.mlp.experts"
    return [
        Theirs(f"{theirs}.gate_up_proj", (E, 2 * inner, D), gate_up),
        Theirs(f"{theirs}.down_proj", (E, D, inner), down),
    ]


def _latent_attention(m: ModelConfig, i: int) -> list[Theirs]:
    """Three matrices of DeepSeek's attention that hold two of ours each; rows of one head lie together."""
    H, P, R, L, D = m.num_heads, m.head_dim, m.d_rope, m.kv_latent_dim, m.hidden_size
    ours, theirs = f"layers.{i}.self_attn", f"model.layers.{i}.self_attn"
    q = "q_b_proj" if m.q_latent_dim else "q_proj"
    of_queries: dict[str, View] = {
        f"{ours}.w_uq.weight": lambda a: a.reshape(H, P + R, -1)[:, :P],
        f"{ours}.w_qr.weight": lambda a: _apart(a.reshape(H, P + R, -1)[:, P:]),
    }
    of_latents: dict[str, View] = {f"{ours}.w_dkv.weight": lambda a: a[:L], f"{ours}.w_kr.weight": lambda a: _apart(a[L:])}
    of_keys: dict[str, View] = {
        f"{ours}.w_uk.weight": lambda a: a.reshape(H, 2 * P, L)[:, :P],
        f"{ours}.w_uv.weight": lambda a: a.reshape(H, 2 * P, L)[:, P:],
    }
    return [
        Theirs(f"{theirs}.{q}.weight", (H * (P + R), m.q_latent_dim or D), of_queries),
        Theirs(f"{theirs}.kv_a_proj_with_mqa.weight", (L + R, D), of_latents),
        Theirs(f"{theirs}.kv_b_proj.weight", (2 * H * P, L), of_keys),
    ]


def _apart(rows: HostArray) -> HostArray:
    """``[...,R,n]``: two rows that turn together lie side by side there, and R/2 apart here."""
    *front, R, n = rows.shape
    return rows.reshape(*front, R // 2, 2, n).swapaxes(-3, -2)


def expected_shapes(config_json: Mapping[str, Any]) -> dict[str, tuple[int, ...]] | None:
    """The names and shapes of the tensors that belong to a config.json; None for a model that cannot be imported."""
    try:
        family, config, _ = read_config(config_json, "config.json")
    except DataError:
        return None
    return {theirs.name: theirs.shape for theirs in layout(family, config)}
