"""Latent attention against Hugging Face's DeepSeek-V3, the mixture of experts against its GraniteMoeShared and Mixtral.

The library's models are built, and given our weights, by the scripts that wrote the golden files: what had to be replaced in
them because it is float32 whatever the dtype (norms, rotation angles, ``.float()`` in routers) is said there, each in its
place. The models are compared whole, with the library's own embedding, norms, attention and feed-forward.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra 'oracle'")
pytest.importorskip("transformers", reason="needs the extra 'oracle'")

from golden import write_mla, write_moe  # noqa: E402
from oracle.measuring import (  # noqa: E402
    BOUNDS,
    TORCH_DTYPES,
    Case,
    assert_within_bounds,
    compare,
    random_batches,
    randomize,
    relative_error,
    step_by_step,
)
from torch.func import functional_call  # noqa: E402
from transformers.models.granitemoeshared import modeling_granitemoeshared as granite  # noqa: E402
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func  # noqa: E402

from oxidizr_ref.autograd import Tensor, no_grad  # noqa: E402
from oxidizr_ref.config import ModelConfig  # noqa: E402
from oxidizr_ref.fused.register import reference  # noqa: E402
from oxidizr_ref.layers.attention import LatentAttention  # noqa: E402
from oxidizr_ref.layers.feed_forward import MixtureOfExperts, Router  # noqa: E402
from oxidizr_ref.model import LanguageModel  # noqa: E402

pytestmark = pytest.mark.oracle

# No two widths are equal, so that none can be taken for another: heads of 12, latents of 20 and 14, rotated parts of 6.
_COMMON = {"hidden_size": 48, "num_layers": 3, "num_heads": 4, "intermediate_size": 56, "vocab_size": 97, "max_seq_len": 37}
_COMMON |= {"rope_theta": 10000.0, "rms_norm_eps": 1e-5}
_LATENT = {**_COMMON, "kv_latent_dim": 20, "q_latent_dim": 14, "d_rope": 6}
_EXPERTS = {**_COMMON, "kv_heads": 2, "num_experts": 4, "experts_per_tok": 2, "shared_expert_enabled": True}
SIZES: dict[str, dict[str, Any]] = {
    "mla": _LATENT,
    "mla_latent_norm": {**_LATENT, "mla_latent_norm": True},
    "moe_shared": _EXPERTS,
    "moe": {**_EXPERTS, "shared_expert_enabled": False},
    "moe_top1": {**_EXPERTS, "experts_per_tok": 1},
}
ALPHA = 0.1  # at which the balance loss is a tenth of the routers' gradients and more
BALANCE_BATCH = (2, 32)  # 64 tokens: their shares are exact in float32, in which Mixtral's function counts


def _ours(name: str, dtype: str) -> LanguageModel:
    model = LanguageModel(ModelConfig(name=name, dtype=dtype, **SIZES[name]), seed=0)
    randomize(model)
    return model


def _leaves(ours: LanguageModel, dtype: str) -> dict[str, torch.Tensor]:
    kind = TORCH_DTYPES[dtype]
    return {name: torch.zeros(p.shape, dtype=kind, requires_grad=True) for name, p in ours.named_parameters()}


def make_case(name: str, dtype: str) -> Case:
    """The model of this name, ours and Hugging Face's. The routed ones are trained with the balance loss."""
    ours, sizes = _ours(name, dtype), SIZES[name]
    leaves = _leaves(ours, dtype)
    if name.startswith("mla"):
        forward = write_mla.forward_of(write_mla.make_model(sizes, TORCH_DTYPES[dtype]), leaves, sizes)
        shape, alpha = (3, 37), 0.0
    else:
        forward = write_moe.forward_of(write_moe.make_model(sizes, TORCH_DTYPES[dtype]), leaves, sizes, ALPHA)
        shape, alpha = BALANCE_BATCH, ALPHA
    batches = random_batches(sizes["vocab_size"], *shape)
    return Case(ours, lambda tokens: forward(torch.from_numpy(tokens)), leaves, batches, alpha)


CASES = {name: lambda dtype, name=name: make_case(name, dtype) for name in SIZES}


@pytest.fixture(params=["f64", "f32"])
def dtype(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["fused", "reference"])
def side(request: pytest.FixtureRequest) -> Iterator[str]:
    with reference() if request.param == "reference" else contextlib.nullcontext():
        yield request.param


@pytest.mark.usefixtures("side")
@pytest.mark.parametrize("name", CASES)
def test_logits_gradients_and_ten_clipped_adamw_steps_equal_those_of_hugging_face(name: str, dtype: str) -> None:
    case = CASES[name](dtype)
    errors = compare(case.ours, case.their_forward, case.parameters, case.batches, dtype, case.load_balance_alpha)
    assert_within_bounds(errors, dtype)


# --- latent attention -------------------------------------------------------------------------------------------------

LATENT_NAMES = ["mla", "mla_latent_norm"]


@pytest.mark.parametrize("name", LATENT_NAMES)
def test_decoding_in_the_absorbed_form_equals_the_full_forward_pass_of_hugging_face(name: str, dtype: str) -> None:
    case = CASES[name](dtype)
    tokens = case.batches[0][0]
    with torch.no_grad():
        for ours, leaf in zip(case.ours.named_parameters(), case.parameters.values(), strict=True):
            leaf.copy_(torch.from_numpy(ours[1].data))
        wanted = case.their_forward(tokens)[0].numpy()
    assert relative_error(step_by_step(case.ours, tokens), wanted) < BOUNDS[dtype].forward


@pytest.mark.parametrize("name", LATENT_NAMES)
def test_the_absorbed_form_equals_the_expanded_form_layer_by_layer(name: str) -> None:
    attention = _ours(name, "f64").layers[1].self_attn
    assert isinstance(attention, LatentAttention)
    x = np.random.default_rng(5).standard_normal((3, 37, 48))
    with no_grad():
        expanded = attention(Tensor(x)).data
        cache = attention.new_cache(3)
        absorbed = np.concatenate([attention.step(Tensor(x[:, t : t + 1]), cache).data for t in range(37)], axis=1)
    # Sums of at most 48 products, bracketed differently in three matrix products and a softmax: some 100 units of 1.1e-16.
    assert relative_error(absorbed, expanded) < 1e-13


@pytest.mark.parametrize("name", LATENT_NAMES)
def test_decoding_keeps_the_latent_and_the_rotated_key_of_every_token_and_layer_and_nothing_else(name: str) -> None:
    model, sizes, batch = _ours(name, "f64"), SIZES[name], 3
    a_token = sizes["kv_latent_dim"] + sizes["d_rope"]
    cache = model.new_cache(batch)
    tokens = np.random.default_rng(6).integers(0, sizes["vocab_size"], (batch, 5))
    for t in range(5):
        model.step(tokens[:, t], cache)
    assert len(cache) == sizes["num_layers"]
    for of_layer in cache:
        assert sum(array.size for array in of_layer.arrays) == batch * sizes["max_seq_len"] * a_token
        assert vars(of_layer).keys() == {"arrays", "capacity", "length"}  # nowhere else is anything kept
        filled = sum(int(np.count_nonzero(array)) for array in of_layer.arrays)
        assert filled == batch * 5 * a_token


# --- the mixture of experts as a layer --------------------------------------------------------------------------------


def _layer(name: str, dtype: str, seed: int = 9) -> tuple[MixtureOfExperts, Tensor, dict[str, torch.Tensor], torch.Tensor]:
    """Our layer with random weights and an input, and the same as PyTorch's leaves."""
    sizes, generator = SIZES[name], np.random.default_rng(seed)
    layer = MixtureOfExperts(ModelConfig(name=name, dtype=dtype, **sizes), 1.0, 1.0)
    layer.initialize(0, np.dtype({"f64": np.float64, "f32": np.float32}[dtype]))
    for _, p in layer.named_parameters():
        p.data[...] = 0.25 * generator.standard_normal(p.shape)
    x = generator.standard_normal((2, 32, sizes["hidden_size"])).astype(next(layer.named_parameters())[1].dtype)
    leaves = {n: torch.from_numpy(p.data.copy()).requires_grad_() for n, p in layer.named_parameters()}
    return layer, Tensor(x, requires_grad=True), leaves, torch.from_numpy(x.copy()).requires_grad_()


class GraniteFeedForward(torch.nn.Module):
    """The two modules that GraniteMoeShared adds up in its decoder layer, under their names there."""

    def __init__(self, sizes: Mapping[str, Any]) -> None:
        super().__init__()
        layer = write_moe.make_model(sizes).model.layers[0]
        assert isinstance(layer.block_sparse_moe, granite.GraniteMoeSharedMoE)
        self.block_sparse_moe, self.shared_mlp = layer.block_sparse_moe, layer.shared_mlp

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.block_sparse_moe(x)
        return y if self.shared_mlp is None else y + self.shared_mlp(x)


def _plain_mixture(x: torch.Tensor, leaves: Mapping[str, torch.Tensor], sizes: Mapping[str, Any]) -> torch.Tensor:
    """A mixture with one expert a token, written down plainly: every expert reads all tokens, a mask picks."""

    def swiglu(expert: str) -> torch.Tensor:
        gate, up, down = (leaves[f"{expert}.{name}_proj.weight"] for name in ("gate", "up", "down"))
        return (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T

    probabilities = torch.softmax(x @ leaves["router.gate.weight"].T, dim=-1)
    best = probabilities.argmax(dim=-1, keepdim=True)
    outputs = [swiglu(f"experts.{e}") * probabilities[..., e : e + 1] * (best == e) for e in range(sizes["num_experts"])]
    return sum(outputs) + swiglu("shared_expert")


def _assert_same_results_and_gradients(layer: MixtureOfExperts, x: Tensor, y: Tensor, dtype: str, theirs: Any) -> None:
    """``theirs``: their output, leaves and input. Both are differentiated along the same random direction."""
    wanted, leaves, their_x = theirs
    dy = np.random.default_rng(2).standard_normal(y.shape).astype(y.dtype)
    y.backward(dy)
    wanted.backward(torch.from_numpy(dy))
    assert relative_error(y.data, wanted.detach().numpy()) < BOUNDS[dtype].forward
    assert relative_error(x.grad, their_x.grad.numpy()) < BOUNDS[dtype].gradients
    for name, p in layer.named_parameters():
        assert leaves[name].grad.abs().max() > 0, name
        assert relative_error(p.grad, leaves[name].grad.numpy()) < BOUNDS[dtype].gradients, name


@pytest.mark.usefixtures("side")
@pytest.mark.parametrize("name", ["moe_shared", "moe"])
def test_two_of_four_experts_equal_those_of_granite_in_output_and_every_gradient(name: str, dtype: str) -> None:
    layer, x, leaves, their_x = _layer(name, dtype)
    y, routing = layer(x)
    assert routing.assigned.min() > 0  # every expert is compared
    twin = GraniteFeedForward(SIZES[name]).to(TORCH_DTYPES[dtype])
    with write_moe.without_float32() if dtype == "f64" else contextlib.nullcontext():
        wanted = functional_call(twin, write_moe.feed_forward_weights(leaves, SIZES[name]), (their_x,), strict=True)
    _assert_same_results_and_gradients(layer, x, y, dtype, (wanted, leaves, their_x))


@pytest.mark.usefixtures("side")
def test_one_of_four_experts_weighted_by_its_probability_equals_a_plain_twin_in_output_and_every_gradient(
    dtype: str,
) -> None:
    layer, x, leaves, their_x = _layer("moe_top1", dtype)
    y, routing = layer(x)
    assert routing.assigned.min() > 0
    wanted = _plain_mixture(their_x, leaves, SIZES["moe_top1"])
    _assert_same_results_and_gradients(layer, x, y, dtype, (wanted, leaves, their_x))


# --- the balance loss -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("experts", [3, 5, 8])
@pytest.mark.parametrize("k", [1, 2])
def test_the_balance_loss_is_that_of_mixtral_over_k_in_value_and_gradient(experts: int, k: int) -> None:
    """Both are ``E Σ_e f_e P_e`` (Fedus et al. 2021, eq. 4 to 6), written there for one expert a token. With k of them
    Mixtral's f_e is the assignments of e over the *tokens*, so even routing gives k; ours is the share of all *assignments*,
    so even routing gives 1 whatever k is. The factor between them is k exactly."""
    config = ModelConfig(
        name="r", dtype="f64", **{**_EXPERTS, "hidden_size": 16, "num_experts": experts, "experts_per_tok": k}
    )
    layer = Router(config, 1.0)
    generator = np.random.default_rng(experts)
    layer.gate.weight.data = generator.standard_normal((experts, 16))
    x = Tensor(generator.standard_normal((64, 16)), requires_grad=True)
    their_x = torch.from_numpy(x.data.copy()).requires_grad_()
    their_weight = torch.from_numpy(layer.gate.weight.data.copy()).requires_grad_()
    balance = layer(x)[2].balance
    balance.backward()
    with write_moe.without_float32():  # it sums probabilities in float32, whatever the dtype
        theirs = load_balancing_loss_func((their_x @ their_weight.T,), experts, k)
    theirs.backward()
    assert balance.item() == pytest.approx(theirs.item() / k, rel=1e-14)
    assert relative_error(x.grad * k, their_x.grad.numpy()) < 1e-12
    assert relative_error(layer.gate.weight.grad * k, their_weight.grad.numpy()) < 1e-12


def test_the_balance_loss_of_a_model_is_the_mean_over_its_layers_and_not_that_of_all_their_tokens_together() -> None:
    """Given several layers Mixtral's function averages f and P over them before it multiplies, so two layers that prefer
    different experts look balanced. Ours is the mean of the layers' own losses; for one layer the two are the same."""
    case = CASES["moe_shared"]("f64")
    tokens, targets = case.batches[0]
    routings: list[Any] = []
    with no_grad():
        plain = case.ours.loss(tokens, targets).item()
        balanced = case.ours.loss(tokens, targets, load_balance_alpha=ALPHA, routings=routings).item()
    with torch.no_grad():
        for ours, leaf in zip(case.ours.named_parameters(), case.parameters.values(), strict=True):
            leaf.copy_(torch.from_numpy(ours[1].data))
        weights, sizes = write_moe.their_weights(case.parameters, SIZES["moe_shared"]), SIZES["moe_shared"]
        with write_moe.without_float32():
            options = {"use_cache": False, "output_router_logits": True}
            out = functional_call(write_moe.make_model(sizes), weights, (torch.from_numpy(tokens),), options)
            by_layer = [load_balancing_loss_func((logits,), 4, 2).item() / 2 for logits in out.router_logits]
            together = load_balancing_loss_func(out.router_logits, 4, 2).item() / 2
    assert len(by_layer) == len(routings) == 3
    assert [routing.balance.item() for routing in routings] == pytest.approx(by_layer, rel=1e-12)
    # The difference of two losses near 5, divided by 0.1: absolute errors of some 10 · 5 · 1.1e-16.
    assert (balanced - plain) / ALPHA == pytest.approx(sum(by_layer) / 3, rel=1e-12)
    assert together < 0.99 * sum(by_layer) / 3
