"""What parameters a model has, what they are called, what they begin with, and which of them decay.

Names and shapes are oxidizr's. First values follow the papers: normal numbers of deviation 0.02 (GPT-2), output projections
scaled down by depth; for the Mambas what Gu & Dao (2023), Dao & Gu (2024) and Lahoti et al. (2026) describe.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from architectures import FEW, NAMES, VOCAB, everywhere, model_config, small_model
from devices import host, place
from numpy.typing import NDArray

from oxidizr_ref import LanguageModel
from oxidizr_ref.config import ModelConfig, bundled_config_names, load_config
from oxidizr_ref.nn import Parameter
from oxidizr_ref.optim import AdamW, decays

Numbers = NDArray[np.float64]
Shape = tuple[int, ...]

# --- distributions ----------------------------------------------------------------------------------------------------


def must_be_distributed(values: Numbers, cdf: Callable[[Numbers], Numbers], name: str) -> None:
    """Compare an empirical distribution with the one it should come from.

    The largest distance between the two exceeds d with probability at most 2 exp(-2nd²) (Dvoretzky, Kiefer & Wolfowitz 1956
    with Massart's constant, 1990). Here that is 1e-9: of 20,000 numbers the distance must stay below 0.023. The numbers are
    fixed by the seed, so this holds or does not; chance only says that it ought to hold.
    """
    ordered = np.sort(np.ravel(values))
    n = len(ordered)
    expected = cdf(ordered)
    distance = max(np.max(np.arange(1, n + 1) / n - expected), np.max(expected - np.arange(n) / n))
    assert distance <= math.sqrt(math.log(2e9) / (2 * n)), (name, distance)


def uniform(low: float, high: float) -> Callable[[Numbers], Numbers]:
    return lambda v: np.clip((v - low) / (high - low), 0.0, 1.0)


def normal(std: float) -> Callable[[Numbers], Numbers]:
    return lambda v: 0.5 * (1 + np.array([math.erf(x / (std * math.sqrt(2))) for x in v]))


def many(parameter: Parameter, name: str, count: int = 20_000) -> Numbers:
    """What the parameter's recipe makes of a larger shape, of at least ``count`` numbers that begin with its own."""
    shape = parameter.full_shape
    rows = max(shape[0], -(-count // math.prod(shape[1:])))
    values = np.asarray(parameter.recipe(0, name, (rows, *shape[1:])), dtype=np.float64)
    assert np.array_equal(values[: shape[0]].astype(np.float32), host(parameter.data))
    return values


def softplus(v: Numbers) -> Numbers:
    return np.logaddexp(0.0, v)


# --- first values -----------------------------------------------------------------------------------------------------


def check_first_value(config: ModelConfig, name: str, p: Parameter) -> None:
    """One parameter of a fresh float32 model of seed 0."""
    stem, _, last = name.rpartition(".")
    ones = np.ones(p.full_shape, np.float32)
    rank, data = max(1, config.mamba3_mimo_rank), host(p.data)
    if stem.endswith("norm") or last in ("D", "B_bias", "C_bias", "mimo_z"):
        assert np.array_equal(data, ones)
    elif last in ("mimo_x", "mimo_o"):
        assert np.array_equal(data, ones / np.float32(rank))
    elif last == "A_log" and "mamba." in name:
        assert np.array_equal(
            data, np.tile(np.log(np.arange(1.0, config.mamba_d_state + 1)).astype(np.float32), (len(data), 1))
        )
    elif last == "A_log":
        # A = -exp(A_log) with -A uniform in [1, 16); log and exp round once in float32 each.
        values = np.exp(many(p, name))
        assert values.min() >= 1 - 1e-6 and values.max() < 16 * (1 + 1e-6)
        must_be_distributed(values, uniform(1, 16), name)
    elif last == "dt_bias" or name.endswith("dt_proj.bias"):
        # dt = softplus(bias) log-uniform in [1e-3, 0.1]. The bias, about -7 at worst, is rounded by 2⁻²² = 2.4e-7, and a
        # relative error of dt is at most an absolute one of the bias.
        dt = softplus(many(p, name))
        assert dt.min() >= 1e-3 * (1 - 1e-6) and dt.max() <= 0.1 * (1 + 1e-6)
        must_be_distributed(np.log(dt), uniform(math.log(1e-3), math.log(0.1)), name)
    elif "conv1d" in name or name.endswith("dt_proj.weight"):
        # PyTorch's default for a convolution of K taps a channel; for time steps of rank r the paper's r^-1/2.
        kernel = config.mamba_d_conv if "mamba." in name else config.mamba2_conv_kernel
        bound = (kernel if "conv1d" in name else math.ceil(config.hidden_size / 16)) ** -0.5
        values = many(p, name)
        assert np.abs(values).max() <= bound * (1 + 1e-7)
        must_be_distributed(values, uniform(-bound, bound), name)
    else:
        deep = name.endswith(("o_proj.weight", "down_proj.weight", "out_proj.weight"))
        std = 0.02 / math.sqrt(2 * config.num_layers) if deep else 0.02
        values = many(p, name, 5_000)
        must_be_distributed(values, normal(std), name)
        # The deviation of n normal numbers is known to about 1/sqrt(2n): five times that.
        assert values.std() == pytest.approx(std, rel=5 / math.sqrt(2 * values.size))


@everywhere("architecture", NAMES, FEW)
def test_every_parameter_begins_as_documented(architecture: str) -> None:
    config, model = model_config(architecture), small_model(architecture)
    for name, p in model.named_parameters():
        if name.startswith(("layers.0.", "layers.1.", "embed", "norm", "lm_head")):
            check_first_value(config, name, p)


@everywhere("architecture", NAMES, FEW)
def test_a_parameters_first_value_depends_on_seed_and_name_only(architecture: str) -> None:
    config = model_config(architecture)
    n = config.num_layers
    small, same = small_model(architecture, seed=3), small_model(architecture, seed=3)
    deeper = dict(small_model(architecture, seed=3, num_layers=n + 2, vocab_size=VOCAB).named_parameters())
    other = dict(small_model(architecture, seed=4).named_parameters())
    for (name, p), (_, again) in zip(small.named_parameters(), same.named_parameters(), strict=True):
        first = host(p.data)
        assert np.array_equal(first, host(again.data)), name
        if name.endswith(("o_proj.weight", "down_proj.weight", "out_proj.weight")):  # scaled by depth, then rounded
            assert np.allclose(first, host(deeper[name].data) * math.sqrt((n + 2) / n), rtol=2**-22, atol=0), name
        else:
            assert np.array_equal(first, host(deeper[name].data)), name
        constant = first.min() == first.max() or name.endswith(".mamba.A_log")
        assert np.array_equal(first, host(other[name].data)) == constant, name


@everywhere("architecture", NAMES, FEW)
def test_no_two_parameters_begin_with_the_same_numbers(architecture: str) -> None:
    seen: dict[bytes, str] = {}
    for name, p in small_model(architecture).named_parameters():
        data = host(p.data)
        if data.min() != data.max() and not name.endswith(".mamba.A_log"):
            first = np.ravel(data)[:3].tobytes()
            assert first not in seen, (name, seen[first])
            seen[first] = name


# --- names and shapes -------------------------------------------------------------------------------------------------


def shapes_of(config: ModelConfig, layer: int | None = None) -> dict[str, Shape]:
    """The shapes of all parameters, or those of one layer without its prefix. Nothing is filled."""
    shapes = {name: p.full_shape for name, p in LanguageModel(config, seed=None).named_parameters()}
    prefix = "" if layer is None else f"layers.{layer}."
    return {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}


def swiglu(prefix: str, hidden: int, inner: int) -> dict[str, Shape]:
    return {
        f"{prefix}.gate_proj.weight": (inner, hidden),
        f"{prefix}.up_proj.weight": (inner, hidden),
        f"{prefix}.down_proj.weight": (hidden, inner),
    }


#: oxidizr's nano models: hidden 384, 6 heads; MLA 192/192/16; four experts of 1536; 48 Mamba heads of 16, 64 states.
NANO: dict[str, Any] = {
    "hidden_size": 384,
    "num_layers": 8,
    "num_heads": 6,
    "intermediate_size": 1536,
    "vocab_size": 128354,
    "max_seq_len": 512,
    "mamba_layers": [0, 1, 2, 4, 5, 6],
    "mamba2_num_heads": 48,
    "mamba2_head_dim": 16,
    "mamba2_state_size": 64,
    "mamba2_chunk_size": 64,
    "mamba2_n_groups": 1,
    "mamba2_conv_kernel": 4,
    "mamba2_expand": 2,
}
NANO_MLA = {"kv_latent_dim": 192, "q_latent_dim": 192, "d_rope": 16}
NANO_MOE = {"num_experts": 4, "experts_per_tok": 2, "shared_expert_enabled": True}
MLA_SHAPES = {
    "input_layernorm.weight": (384,),
    "self_attn.w_dkv.weight": (192, 384),
    "self_attn.w_dq.weight": (192, 384),
    "self_attn.w_uq.weight": (384, 192),
    "self_attn.w_uk.weight": (384, 192),
    "self_attn.w_uv.weight": (384, 192),
    "self_attn.w_qr.weight": (96, 384),
    "self_attn.w_kr.weight": (16, 384),
    "self_attn.o_proj.weight": (384, 384),
    "post_attention_layernorm.weight": (384,),
}


def test_the_parameters_outside_the_layers_are_those_of_oxidizr() -> None:
    outside = {name: shape for name, shape in shapes_of(ModelConfig(**NANO)).items() if not name.startswith("layers.")}
    vocabulary = (128354, 384)
    assert outside == {"embed_tokens.weight": vocabulary, "norm.weight": (384,), "lm_head.weight": vocabulary}


def test_a_llama_layer_has_the_names_and_shapes_of_oxidizr() -> None:
    config = ModelConfig(hidden_size=512, num_layers=8, num_heads=8, kv_heads=4, vocab_size=9, max_seq_len=512)
    assert shapes_of(config, 7) == {
        "input_layernorm.weight": (512,),
        "self_attn.q_proj.weight": (512, 512),
        "self_attn.k_proj.weight": (256, 512),
        "self_attn.v_proj.weight": (256, 512),
        "self_attn.o_proj.weight": (512, 512),
        "post_attention_layernorm.weight": (512,),
        **swiglu("mlp", 512, 2048),
    }


def test_the_nano_models_mla_layer_has_the_names_and_shapes_of_oxidizr() -> None:
    experts = {name: shape for e in range(4) for name, shape in swiglu(f"moe.experts.{e}", 384, 1536).items()}
    config = ModelConfig(**NANO, **NANO_MLA, **NANO_MOE)
    assert shapes_of(config, 3) == {
        **MLA_SHAPES,
        **experts,
        **swiglu("moe.shared_expert", 384, 1536),
        "moe.router.gate.weight": (4, 384),
    }
    without = shapes_of(ModelConfig(**NANO, **NANO_MLA, **{**NANO_MOE, "shared_expert_enabled": False}), 3)
    assert not any("shared" in name for name in without)


def test_the_norms_of_the_latents_are_there_only_where_they_are_asked_for() -> None:
    plain, normed = (shapes_of(ModelConfig(**NANO, **NANO_MLA, mla_latent_norm=asked), 7) for asked in (False, True))
    assert plain == {**MLA_SHAPES, **swiglu("mlp", 384, 1536)}
    assert {name: normed[name] for name in normed.keys() - plain.keys()} == {
        "self_attn.kv_norm.weight": (192,),
        "self_attn.q_norm.weight": (192,),
    }


def test_a_mamba1_layer_has_the_names_and_shapes_of_oxidizr() -> None:
    keys = {key: value for key, value in NANO.items() if not key.startswith("mamba2")}
    assert shapes_of(ModelConfig(**keys), 6) == {
        "norm.weight": (384,),
        "mamba.in_proj.weight": (2 * 768, 384),
        "mamba.conv1d.weight": (768, 1, 4),
        "mamba.conv1d.bias": (768,),
        "mamba.x_proj.weight": (24 + 2 * 16, 768),
        "mamba.dt_proj.weight": (768, 24),
        "mamba.dt_proj.bias": (768,),
        "mamba.A_log": (768, 16),
        "mamba.D": (768,),
        "mamba.out_proj.weight": (384, 768),
    }


@pytest.mark.parametrize("groups", [1, 4])
def test_a_mamba2_layer_has_the_names_and_shapes_of_oxidizr(groups: int) -> None:
    BC = 2 * groups * 64
    assert shapes_of(ModelConfig(**{**NANO, "mamba2_n_groups": groups}), 6) == {
        "mamba2.norm.weight": (384,),
        "mamba2.mixer.in_proj.weight": (768 + 768 + BC + 48, 384),
        "mamba2.mixer.conv1d.weight": (768 + BC, 1, 4),
        "mamba2.mixer.conv1d.bias": (768 + BC,),
        "mamba2.mixer.dt_bias": (48,),
        "mamba2.mixer.A_log": (48,),
        "mamba2.mixer.D": (48,),
        "mamba2.mixer.norm.weight": (768,),
        "mamba2.mixer.out_proj.weight": (384, 768),
    }


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize(("rotation", "angles"), [(0.0, 0), (0.5, 16), (1.0, 32)])
@pytest.mark.parametrize("convolution", [False, True])
def test_a_mamba3_layer_has_the_names_and_shapes_of_oxidizr(
    rank: int, rotation: float, angles: int, convolution: bool
) -> None:
    keys = {"mamba3_enabled": True, "mamba3_mimo_rank": rank, "mamba3_use_conv": convolution}
    keys |= {"mamba3_complex_rope": rotation > 0} | ({"mamba3_rope_fraction": rotation} if rotation else {})
    R = max(1, rank)
    BC = 2 * R * 64
    expected: dict[str, Shape] = {
        "mamba3.norm.weight": (384,),
        "mamba3.mixer.in_proj.weight": (768 + 768 + BC + 3 * 48 + angles, 384),
        "mamba3.mixer.dt_bias": (48,),
        "mamba3.mixer.B_bias": (48, R, 64),
        "mamba3.mixer.C_bias": (48, R, 64),
        "mamba3.mixer.B_norm.weight": (64,),
        "mamba3.mixer.C_norm.weight": (64,),
        "mamba3.mixer.D": (48,),
        "mamba3.mixer.out_proj.weight": (384, 768),
    }
    if rank:
        expected |= {f"mamba3.mixer.mimo_{part}": (48, rank, 16) for part in "xzo"}
    if convolution:
        expected |= {"mamba3.mixer.conv1d.weight": (768 + BC, 1, 4), "mamba3.mixer.conv1d.bias": (768 + BC,)}
    assert shapes_of(ModelConfig(**{**NANO, **keys}), 6) == expected


@pytest.mark.parametrize("bundled", bundled_config_names())
def test_a_bundled_model_is_built_of_the_same_names(bundled: str) -> None:
    config = load_config(bundled).model
    names = {name for layer in range(config.num_layers) for name in shapes_of(config, layer)}
    small = {name for architecture in NAMES for name in shapes_of(model_config(architecture))}
    assert names and names <= {name.split(".", 2)[2] for name in small if name.startswith("layers.")}


# --- weight decay -----------------------------------------------------------------------------------------------------

#: The last parts of a name, by whether the parameter is pulled towards zero: matrices and what MIMO reads and writes by are;
#: norms, biases, decay rates, skips and time steps are not, for zero would be no natural place for them.
DECAYING = {"gate", "embed_tokens", "lm_head", "w_dkv", "w_dq", "w_uq", "w_uk", "w_uv", "w_qr", "w_kr", "conv1d"}
DECAYING |= {f"{part}_proj" for part in ("q", "k", "v", "o", "gate", "up", "down", "in", "out", "x", "dt")}
DECAYING |= {"mimo_x", "mimo_z", "mimo_o"}
STAYING = {"norm", "input_layernorm", "post_attention_layernorm", "kv_norm", "q_norm", "B_norm", "C_norm"}
STAYING |= {"bias", "dt_bias", "B_bias", "C_bias", "A_log", "D"}


@everywhere("architecture", NAMES, FEW)
def test_weight_decay_acts_on_matrices_and_on_nothing_else(architecture: str) -> None:
    model = small_model(architecture)
    names = list(model.state_dict())
    for name in names:
        last = name.removesuffix(".weight").rpartition(".")[2]
        assert (last in DECAYING) != (last in STAYING), name
        assert decays(name) == (last in DECAYING), name
    # And so the optimizer does: with gradients of zero, decay is all that moves anything.
    before = {name: host(array).copy() for name, array in model.state_dict().items()}
    AdamW(model.state_dict(), lr=0.5, weight_decay=0.5).step({name: place(np.zeros_like(before[name])) for name in names})
    for name, array in model.state_dict().items():
        assert np.array_equal(host(array), before[name] * np.float32(0.75 if decays(name) else 1)), name
