"""Every layer on its own: gradients against finite differences, the fused form against the plain one, causality, chunks.

A layer is examined at lively weights (`architectures.enliven`), where every parameter matters, in float64; on the host and
on a device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import devices
import numpy as np
import pytest
from architectures import enliven, everywhere, relative_error
from devices import host, place
from gradcheck import check_gradients
from numpy.typing import NDArray

from oxidizr_ref import no_grad, reference
from oxidizr_ref.autograd import Tensor
from oxidizr_ref.backend import assign
from oxidizr_ref.config import ModelConfig
from oxidizr_ref.fused import selective_scan
from oxidizr_ref.layers import mamba3
from oxidizr_ref.layers.attention import GroupedQueryAttention, LatentAttention
from oxidizr_ref.layers.feed_forward import MixtureOfExperts, Router, SwiGLU
from oxidizr_ref.layers.mamba1 import Mamba1
from oxidizr_ref.layers.mamba2 import Mamba2
from oxidizr_ref.layers.mamba3 import Mamba3
from oxidizr_ref.nn import Module, Parameter

pytestmark = pytest.mark.usefixtures("device")

WIDTH, BATCH, LENGTH = 16, 2, 7

_SIZES = {"hidden_size": WIDTH, "num_heads": 4, "kv_heads": 2, "intermediate_size": 12, "vocab_size": 9, "max_seq_len": 8}
_MLA = {"kv_latent_dim": 6, "q_latent_dim": 5, "d_rope": 2}
_MAMBA1 = {"mamba_d_state": 3, "mamba_d_conv": 3}
_MAMBA2 = {"mamba2_num_heads": 4, "mamba2_state_size": 6, "mamba2_chunk_size": 3, "mamba2_conv_kernel": 3}
_MAMBA3 = {**_MAMBA2, "mamba2_state_size": 8, "mamba3_enabled": True}


@dataclass(frozen=True)
class Kind:
    """A kind of layer: its class, the keys that make it, and whether tokens see those before them."""

    make: Callable[[ModelConfig, float, float], Module]
    keys: dict[str, Any]
    mixes_time: bool = True
    routes: bool = False


@pytest.fixture(autouse=True)
def _blocks_of_three_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mamba1's blocks and Mamba2's and 3's chunks are three tokens long here: a sequence has three, the last one short."""
    monkeypatch.setattr(selective_scan, "BLOCK", 3)


def _swiglu(config: ModelConfig, std: float, output_std: float) -> SwiGLU:
    return SwiGLU(config.hidden_size, config.intermediate_size, std, output_std)


KINDS: dict[str, Kind] = {
    "GQA": Kind(GroupedQueryAttention, {}),
    "MLA": Kind(LatentAttention, _MLA),
    "MLA with norms": Kind(LatentAttention, {**_MLA, "mla_latent_norm": True}),
    "SwiGLU": Kind(_swiglu, {}, mixes_time=False),
    "MoE, two of four": Kind(MixtureOfExperts, {"num_experts": 4, "experts_per_tok": 2}, False, True),
    "MoE, one of three": Kind(MixtureOfExperts, {"num_experts": 3, "experts_per_tok": 1}, False, True),
    "MoE, shared": Kind(
        MixtureOfExperts, {"num_experts": 4, "experts_per_tok": 2, "shared_expert_enabled": True}, False, True
    ),
    "Mamba1": Kind(Mamba1, _MAMBA1),
    "Mamba2": Kind(Mamba2, _MAMBA2),
    "Mamba2, two groups": Kind(Mamba2, {**_MAMBA2, "mamba2_n_groups": 2}),
    "Mamba3": Kind(Mamba3, {**_MAMBA3, "mamba2_n_groups": 2}),
    "Mamba3, no rotation": Kind(Mamba3, {**_MAMBA3, "mamba3_complex_rope": False}),
    "Mamba3, all states rotate": Kind(Mamba3, {**_MAMBA3, "mamba3_rope_fraction": 1.0}),
    "Mamba3, convolution": Kind(Mamba3, {**_MAMBA3, "mamba3_use_conv": True}),
    "Mamba3, MIMO": Kind(Mamba3, {**_MAMBA3, "mamba3_mimo_rank": 3, "mamba2_n_groups": 2}),
    "Mamba3, MIMO and convolution": Kind(Mamba3, {**_MAMBA3, "mamba3_mimo_rank": 2, "mamba3_use_conv": True}),
}
#: Those of which each has something that the others have not; for what takes long.
FEW = ("GQA", "MLA with norms", "MoE, shared", "Mamba1", "Mamba2, two groups", "Mamba3, MIMO and convolution")
CHUNKED = tuple(name for name in KINDS if "mamba2_chunk_size" in KINDS[name].keys)
IN_TIME = tuple(name for name in KINDS if KINDS[name].mixes_time)


def make_layer(kind: str, seed: int = 0, **changes: Any) -> Any:
    """A layer at lively weights, where the test computes."""
    keys: dict[str, Any] = {**_SIZES, **KINDS[kind].keys, **changes}
    mamba = {"mamba_layers": [0]} if "amba" in kind else {}
    layer = KINDS[kind].make(ModelConfig(num_layers=1, **keys, **mamba), 0.1, 0.1)
    layer.initialize(seed, np.dtype(np.float64), devices.current())
    enliven(layer, seed)
    if isinstance(layer, Mamba3):
        _keep_decays_apart(layer)
    return layer


def _keep_decays_apart(layer: Mamba3) -> None:
    """Let dd_A be ±2 plus a little, by the first input channel, which `make_input` sets to 2.

    The decay's curvature jumps at dd_A = 0 (its slope does not): a difference across that point would err by its step, not
    by the fourth power of its step.
    """
    begin, weight = sum(layer.sizes[:5]), host(layer.in_proj.weight.data).copy()
    rows = weight[begin : begin + layer.heads]
    rows *= 0.1
    rows[:, 0] = np.where(np.arange(layer.heads) % 2, 1.0, -1.0)
    assign(layer.in_proj.weight.data, weight)


def make_input(seed: int = 0, length: int = LENGTH) -> NDArray[np.float64]:
    x = np.random.default_rng(seed + 100).standard_normal((BATCH, length, WIDTH))
    x[..., 0] = 2
    return x


def run(layer: Any, x: Tensor) -> Tensor:
    """The layer's output, for a mixture of experts without what its router did."""
    y = layer(x)
    return y[0] if isinstance(y, tuple) else y


def output(layer: Any, x: NDArray[np.float64]) -> NDArray[np.float64]:
    """The layer's output from an array to an array of the host."""
    return host(run(layer, Tensor(place(x))).data)


def everything(layer: Any, x: NDArray[np.float64], w: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    """The output and, of ``sum(w * output)``, the gradient of the input and of every parameter."""
    layer.zero_grad()
    leaf = Tensor(place(x), requires_grad=True)
    y = run(layer, leaf)
    y.backward(place(w))
    found = {"output": y.data, "input": leaf.grad, **{name: p.grad for name, p in layer.named_parameters()}}
    return {name: host(array) for name, array in found.items()}


def weights_like(y: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.random.default_rng(7).standard_normal(y.shape)


# --- gradients --------------------------------------------------------------------------------------------------------


def places(module: Module) -> Iterator[tuple[Module, str]]:
    """Where each parameter hangs, in the order of `named_parameters`: its module and the attribute's name."""
    for name, value in vars(module).items():
        if isinstance(value, Parameter):
            yield module, name
        for inner in value if isinstance(value, list) else [value]:
            if isinstance(inner, Module):
                yield from places(inner)


def routable(kind: str) -> tuple[Any, NDArray[np.float64]]:
    """A layer and an input; for a router those at which no token is close to another choice."""
    for seed in range(100):
        layer, x = make_layer(kind, seed), make_input(seed)
        if not KINDS[kind].routes or _margin(layer.router, x) > 0.1:
            return layer, x
    raise AssertionError("no seed leaves a margin")


def _margin(router: Router, x: NDArray[np.float64]) -> float:
    """How much smaller, at least, the largest logit of an expert not chosen is than the smallest of one that is."""
    logits = np.sort(host(router.gate(Tensor(place(x.reshape(-1, WIDTH)))).data), axis=-1)[:, ::-1]
    return float((logits[:, router.k - 1] - logits[:, router.k]).min())


@everywhere("kind", list(KINDS), FEW)
def test_gradients_of_the_input_and_of_each_parameter_agree_with_finite_differences(kind: str) -> None:
    layer, x = routable(kind)
    found = list(places(layer))
    names = ["input", *(name for name, _ in layer.named_parameters())]
    arrays = [x, *(host(getattr(owner, attribute).data) for owner, attribute in found)]
    assert len(names) == len(arrays)
    choices: set[bytes] = set()
    route = Router.__call__

    def noting(router: Router, tokens: Tensor) -> Any:
        outcome = route(router, tokens)
        choices.add(outcome[0].tobytes())
        return outcome

    signs: set[bytes] = set()
    decay = mamba3._decay_rate

    def noting_signs(v: Tensor) -> Tensor:
        values = host(v.data)
        assert np.abs(values).min() > 0.5
        signs.add((values > 0).tobytes())
        return decay(v)

    # Each on its own, so that no tensor's error hides behind another's larger contributions. Parameters are given in units
    # of their deviation, 1/4: the tolerance is derived for values of order one, and a step of 1/1000 of them.
    for index, name in enumerate(names):

        def function(leaf: Tensor, index: int = index) -> Tensor:
            if index == 0:
                return run(layer, leaf)
            owner, attribute = found[index - 1]
            with mock.patch.object(owner, attribute, leaf * 0.25):
                return run(layer, Tensor(place(x)))

        with (
            mock.patch.object(Router, "__call__", noting),
            mock.patch.object(mamba3, "_decay_rate", noting_signs),
        ):
            try:
                check_gradients(function, [arrays[index] * (4 if index else 1)], np.random.default_rng(index))
            except AssertionError as error:
                raise AssertionError(f"{kind}, {name}: {error}") from error
    # All differences were taken on one smooth piece: no token changed its experts, no decay rate its branch.
    assert len(choices) == KINDS[kind].routes
    assert len(signs) == isinstance(layer, Mamba3)


@pytest.mark.parametrize("kind", KINDS)
def test_at_the_weights_examined_here_every_parameter_matters(kind: str) -> None:
    layer, x = routable(kind)
    y = output(layer, x)
    gradients = everything(layer, x, weights_like(y))
    # A change of a parameter by its own size changes the output by at least a thousandth of the output's.
    for name, p in layer.named_parameters():
        effect = np.linalg.norm(gradients[name]) * np.linalg.norm(host(p.data)) / np.linalg.norm(y)
        assert effect > 1e-3, (name, effect)


# --- one function, however it is computed -----------------------------------------------------------------------------

# Float64, sums of at most a few hundred terms of like size, each result a few such sums deep: errors of some 1e-15 relative
# to the largest element. 1e-12 leaves a factor of a thousand for terms that cancel.
ROUNDING = 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_the_plain_form_gives_the_same_output_and_gradients(kind: str) -> None:
    layer, x = routable(kind)
    w = weights_like(x)
    fast = everything(layer, x, w)
    with reference():
        plain = everything(layer, x, w)
    assert {name: error for name in fast if (error := relative_error(fast[name], plain[name])) > ROUNDING} == {}


@pytest.mark.parametrize("length", [2, 8])
@everywhere("kind", CHUNKED, [name for name in FEW if name in CHUNKED])
def test_the_chunk_size_changes_neither_output_nor_gradients(kind: str, length: int) -> None:
    x = make_input(length=length)
    w = weights_like(x)
    expected = everything(make_layer(kind, mamba2_chunk_size=64), x, w)
    for chunk in range(1, length + 3):
        found = everything(make_layer(kind, mamba2_chunk_size=chunk), x, w)
        assert {name: e for name in found if (e := relative_error(found[name], expected[name])) > ROUNDING} == {}, chunk


@pytest.mark.parametrize("kind", KINDS)
def test_a_shorter_sequence_gives_the_beginning_of_the_output(kind: str) -> None:
    layer, x = routable(kind)
    with no_grad():
        whole = output(layer, x)
        for length in range(1, LENGTH):
            part = output(layer, x[:, :length])
            assert np.abs(part - whole[:, :length]).max() <= ROUNDING * np.abs(whole).max(), length


@pytest.mark.parametrize("kind", KINDS)
def test_a_sequence_on_its_own_gives_what_it_gives_in_a_batch(kind: str) -> None:
    layer, x = routable(kind)
    with no_grad():
        whole = output(layer, x)
        for b in range(BATCH):
            assert relative_error(output(layer, x[b : b + 1])[0], whole[b]) <= ROUNDING


@everywhere("kind", list(KINDS), FEW)
def test_no_output_has_a_gradient_from_a_later_input_and_each_has_one_from_every_input_before(kind: str) -> None:
    layer, x = routable(kind)
    for t in range(LENGTH):
        w = np.zeros_like(x)
        w[:, t] = 1
        reached = np.abs(everything(layer, x, w)["input"]).max(axis=-1) > 0
        assert not reached[:, t + 1 :].any()
        assert reached[:, t].all() and (reached[:, :t].all() if KINDS[kind].mixes_time else not reached[:, :t].any())


@pytest.mark.parametrize("kind", IN_TIME)
def test_stepping_through_a_sequence_gives_its_output(kind: str) -> None:
    layer, x = make_layer(kind), make_input()
    with no_grad():
        whole = output(layer, x)
        cache = layer.new_cache(BATCH)
        steps = [host(layer.step(Tensor(place(x[:, t : t + 1])), cache).data) for t in range(LENGTH)]
    assert relative_error(np.concatenate(steps, axis=1), whole) <= ROUNDING


def test_experts_that_nobody_chose_get_a_gradient_of_zeros_and_no_token_reaches_them() -> None:
    layer, x = make_layer("MoE, one of three"), make_input()
    layer.router.gate.weight.data[...] = 0  # all equal: the first expert takes everything
    gradients = everything(layer, x, weights_like(x))
    for expert in (1, 2):
        for name, gradient in gradients.items():
            if name.startswith(f"experts.{expert}."):
                assert not gradient.any(), name
    assert gradients["experts.0.gate_proj.weight"].any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_changes_neither_its_input_nor_the_gradient_it_is_given(kind: str) -> None:
    layer, x = make_layer(kind), make_input()
    w = weights_like(x)
    leaf, gradient = Tensor(place(x.copy()), requires_grad=True), place(w.copy())
    run(layer, leaf).backward(gradient)
    assert np.array_equal(host(leaf.data), x) and np.array_equal(host(gradient), w)
