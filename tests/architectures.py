"""Every kind of model that can be built, small: one table of configs, by the name of the architecture.

The sizes are chosen to tell dimensions apart (no two of them are equal by accident where a mistake could exchange them) and
chunks to end in the middle of a sequence. `LENGTH` tokens need more than three chunks. Models are made where the test that
makes them computes (`devices`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import devices
import numpy as np
import pytest
from devices import host
from numpy.typing import NDArray

from oxidizr_ref import LanguageModel
from oxidizr_ref.backend import assign
from oxidizr_ref.config import ModelConfig

Test = TypeVar("Test", bound=Callable[..., None])

VOCAB, BATCH, LENGTH = 61, 3, 17

#: What they have in common. Any of it may be changed, for instance to the sizes of `tiny.MODEL`.
BASE: dict[str, Any] = {
    "name": "small",
    "hidden_size": 32,
    "num_heads": 4,
    "kv_heads": 2,
    "intermediate_size": 24,
    "vocab_size": VOCAB,
    "max_seq_len": 24,
}

_MLA = {"kv_latent_dim": 12, "q_latent_dim": 10, "d_rope": 6}
_MOE = {"num_experts": 4, "experts_per_tok": 2}
_TWO: dict[str, Any] = {"num_layers": 2}
_PURE: dict[str, Any] = {"num_layers": 2, "mamba_layers": [0, 1]}
_HYBRID: dict[str, Any] = {"num_layers": 3, "mamba_layers": [0, 2]}  # attention with Mambas before and behind it
_MAMBA1 = {"mamba_d_state": 5, "mamba_d_conv": 3}
_MAMBA2 = {"mamba2_num_heads": 4, "mamba2_state_size": 12, "mamba2_chunk_size": 5}
_MAMBA3: dict[str, Any] = {**_MAMBA2, "mamba2_n_groups": 2, "mamba3_enabled": True}
_MIMO: dict[str, Any] = {**_MAMBA3, "mamba3_mimo_rank": 3, "mamba3_use_conv": True}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": _TWO,
    "mla": {**_TWO, **_MLA},
    "mla_norm": {**_TWO, **_MLA, "mla_latent_norm": True},
    "mla_deepseek": {**_TWO, **_MLA, "mla_latent_norm": True, "mla_q_rope_from": "latent"},
    "mla_uncompressed": {**_TWO, "kv_latent_dim": 12, "d_rope": 6, "mla_latent_norm": True},
    "moe": {**_TWO, **_MOE},
    "moe_unnormed": {**_TWO, **_MOE, "norm_topk_prob": False},
    "moe_top1": {**_TWO, "num_experts": 3, "experts_per_tok": 1},
    "mamba1": {**_PURE, **_MAMBA1},
    "mamba2": {**_PURE, **_MAMBA2},
    "mamba2_groups": {**_PURE, **_MAMBA2, "mamba2_n_groups": 2},
    "mamba3": {**_PURE, **_MAMBA3},
    "mamba3_no_rotation": {**_PURE, **_MAMBA3, "mamba3_complex_rope": False},
    "mamba3_mimo": {**_PURE, **_MIMO},
    "hybrid": {**_HYBRID, **_MAMBA2, **_MLA, **_MOE, "shared_expert_enabled": True},
    "hybrid_mamba3": {**_HYBRID, **_MAMBA3, "mamba3_rope_fraction": 1.0, **_MLA, **_MOE},
    "hybrid_mamba1": {**_HYBRID, **_MAMBA1},
}
NAMES = tuple(ARCHITECTURES)
#: Those without any attention, whose decoding has no window; those with a router.
PURE_MAMBAS = tuple(
    name for name in NAMES if len(ARCHITECTURES[name].get("mamba_layers", ())) == ARCHITECTURES[name]["num_layers"]
)
ROUTED = tuple(name for name in NAMES if "num_experts" in ARCHITECTURES[name])
#: Those whose scan runs in chunks.
CHUNKED = tuple(name for name in NAMES if "mamba2_num_heads" in ARCHITECTURES[name])
#: Three that between them have both attentions, both feed-forwards and all Mambas.
FEW = ("hybrid", "hybrid_mamba1", "mamba3_mimo")


def everywhere(
    arguments: str, values: Sequence[Any], on_stand_in: Sequence[Any], fixtures: Sequence[str] = ()
) -> Callable[[Test], Test]:
    """A test with each of the ``values`` on NumPy and on CuPy; on the stand-in, which is slow, with those ``on_stand_in``.

    Values of several comma-separated arguments are tuples. ``fixtures``: the arguments that are given to fixtures.
    """
    cases = []
    for where, some in (("numpy", values), ("stand-in", on_stand_in), ("cupy", values)):
        marks = pytest.mark.gpu if where == "cupy" else ()
        cases += [pytest.param(where, *(value if isinstance(value, tuple) else (value,)), marks=marks) for value in some]
    parametrized = pytest.mark.parametrize(f"device,{arguments}", cases, indirect=["device", *fixtures])
    return lambda test: pytest.mark.usefixtures("device")(parametrized(test))


def model_config(architecture: str, **changes: Any) -> ModelConfig:
    """The config of an architecture, with some keys changed."""
    return ModelConfig(**copy.deepcopy({**BASE, **ARCHITECTURES[architecture], **changes}))


def small_model(architecture: str, seed: int = 0, **changes: Any) -> LanguageModel:
    """The model as training begins with it."""
    return LanguageModel(model_config(architecture, **changes), seed, devices.current())


def lively_model(architecture: str, seed: int = 0, **changes: Any) -> LanguageModel:
    """A float64 model at whose weights nothing is negligible: see `enliven`."""
    model = small_model(architecture, seed, **{"dtype": "f64", **changes})
    enliven(model, seed)
    return model


def enliven(module: Any, seed: int = 0) -> None:
    """Move every parameter to where all parts of a layer contribute.

    First weights are small, first time steps tiny (down to 1e-3): states hardly change, experts add hardly anything, and a
    mistake there would drown in rounding. So normal numbers of deviation 0.25 are added to every parameter, and time steps
    become softplus(normal) ≈ 0.7.
    """
    source = np.random.default_rng(seed)
    for name, parameter in module.named_parameters():
        drawn = source.standard_normal(parameter.data.shape)
        if name.endswith(("dt_bias", "dt_proj.bias")):
            assign(parameter.data, 0.5 * drawn)
        else:
            assign(parameter.data, host(parameter.data) + 0.25 * drawn)


def batch(seed: int = 0, shape: tuple[int, int] = (BATCH, LENGTH)) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Random tokens, and the token after each: int64 ``[B,T]`` both."""
    ids = np.random.default_rng(seed).integers(0, VOCAB, (shape[0], shape[1] + 1))
    return ids[:, :-1].copy(), ids[:, 1:].copy()


def relative_error(a: Any, b: Any) -> float:
    """max|a-b| / max|b|, of two arrays of a shape, wherever they live; 0 where they are equal."""
    a, b = host(a), host(b)
    assert a.shape == b.shape
    return 0.0 if np.array_equal(a, b) else float(np.abs(a - b).max() / np.abs(b).max())
