"""Mamba3 against the recurrence written out token by token, and against the official implementation's numbers.

`mamba3_steps.py` is the recurrence; ``golden/mamba3_official.safetensors`` holds what the step-by-step reference functions
in the tests of state-spaces/mamba computed. Whole models are compared in ``oracle/`` and, without PyTorch, in
`test_golden.py`.
"""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import Any

import devices
import mamba3_steps
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from devices import host, place
from hypothesis import given
from hypothesis import strategies as st

from oxidizr_ref import ops
from oxidizr_ref.autograd import Tensor, no_grad
from oxidizr_ref.backend import assign, on_device
from oxidizr_ref.config import ModelConfig
from oxidizr_ref.fused.mamba3 import mamba3_scan, running_angle
from oxidizr_ref.fused.register import reference
from oxidizr_ref.layers import mamba3 as module
from oxidizr_ref.layers.mamba3 import Mamba3

on_both = pytest.mark.usefixtures("device")

Array = np.ndarray[Any, Any]

OFFICIAL = Path(__file__).with_name("golden") / "mamba3_official.safetensors"
SIDES = {"fused": contextlib.nullcontext, "reference": reference}
# What the project asks of a float64 forward pass; sums of a few hundred products in another order part by about 1e-14.
TOLERANCE = 1e-10


def relative_error(found: Any, wanted: Any) -> float:
    found, wanted = host(found), host(wanted)
    assert found.shape == wanted.shape and found.dtype == wanted.dtype == np.float64
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def trapezoid(dt: Array, lam: Array) -> tuple[Array, Array]:
    """``inflow`` and ``diagonal`` of the scan: what a token counts for the tokens after it, and for itself."""
    late = np.zeros(dt.shape)
    late[:, :-1] = ((1 - lam) * dt)[:, 1:]
    return lam * dt + late, lam * dt


def scan(
    x: Array, dt: Array, A: Array, lam: Array, B: Array, C: Array, biases: Any, phi: Array, D: Array, chunk: int
) -> Tensor:
    """The package's scan on the quantities of the equations."""
    arrays = (x, dt * A, *trapezoid(dt, lam), B, C, *biases, phi, D)
    with no_grad():
        return mamba3_scan(*(Tensor(place(array)) for array in arrays), chunk)


# --- against the recurrence -------------------------------------------------------------------------------------------


@on_both
@given(st.data())
def test_the_scan_of_any_shape_equals_the_recurrence_token_by_token(data: st.DataObject) -> None:
    batch, T, R, G, heads_a_group, P, pairs_of_state = (data.draw(st.integers(1, most)) for most in (2, 9, 3, 2, 2, 3, 3))
    H, N, S = G * heads_a_group, 2 * pairs_of_state, data.draw(st.integers(0, pairs_of_state))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    x, phi, D = (rng.standard_normal(shape) for shape in ((batch, T, R, H, P), (batch, T, H, S), (H,)))
    dt, A, lam = rng.uniform(0.05, 2, (batch, T, H)), -rng.uniform(1e-4, 3, (batch, T, H)), rng.uniform(0, 1, (batch, T, H))
    B, C = (rng.standard_normal((batch, T, R, G, N)) for _ in range(2))
    biases = [rng.standard_normal((H, R, N)) for _ in range(2)]
    by_head = [v.repeat(H // G, axis=3) + bias.transpose(1, 0, 2) for v, bias in zip((B, C), biases, strict=True)]
    wanted = mamba3_steps.recurrence(x, dt, A, lam, *by_head, phi, D)
    with SIDES[data.draw(st.sampled_from(sorted(SIDES)))]():
        found = scan(x, dt, A, lam, B, C, biases, phi, D, chunk=data.draw(st.integers(1, 12)))
    assert relative_error(found.data, wanted) < TOLERANCE


LAYERS: dict[str, dict[str, Any]] = {
    "siso": {},
    "siso, one group": {"mamba2_n_groups": 1},
    "siso, a group a head": {"mamba2_n_groups": 4},
    "siso, all channels turn": {"mamba3_rope_fraction": 1.0},
    "siso, nothing turns": {"mamba3_complex_rope": False},
    "siso with convolution": {"mamba3_use_conv": True},
    "mimo of rank 1": {"mamba3_mimo_rank": 1},
    "mimo": {"mamba3_mimo_rank": 3},
    "mimo, all channels turn": {"mamba3_mimo_rank": 3, "mamba3_rope_fraction": 1.0},
    "mimo, nothing turns": {"mamba3_mimo_rank": 2, "mamba3_complex_rope": False},
    "mimo with convolution": {"mamba3_mimo_rank": 2, "mamba3_use_conv": True, "mamba2_conv_kernel": 3},
}


def make_layer(seed: int = 0, dtype: Any = np.float64, **changes: Any) -> Mamba3:
    """A layer of 4 heads, 2 groups and state size 8 with random weights none of whose effects is negligible.

    It lives where the test computes.
    """
    keys: dict[str, Any] = {"hidden_size": 12, "num_layers": 1, "vocab_size": 7, "max_seq_len": 16, "mamba_layers": [0]}
    keys |= {"mamba2_num_heads": 4, "mamba2_head_dim": 6, "mamba2_state_size": 8, "mamba2_chunk_size": 5}
    config = ModelConfig(**{**keys, "mamba2_n_groups": 2, "mamba3_enabled": True, **changes})
    layer, rng = Mamba3(config, 0.02, 0.02), np.random.default_rng(seed)
    layer.initialize(seed, np.dtype(dtype), devices.current())
    for name, p in layer.named_parameters():
        centre = 1.0 if name.endswith(("norm.weight", "_bias", "D")) or name.startswith("mimo") else 0.0
        assign(p.data, centre + 0.4 * rng.standard_normal(p.shape))
    return layer


def weights_of(layer: Mamba3) -> dict[str, Array]:
    """Copies of the layer's weights, on the host."""
    return {name: host(array).copy() for name, array in layer.state_dict().items()}


def sizes(layer: Mamba3) -> tuple[int, int, int, int, int, int]:
    return layer.heads, layer.head_dim, layer.rank, layer.groups, layer.d_state, layer.pairs


@on_both
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", LAYERS)
def test_the_layer_equals_the_recurrence_token_by_token(name: str, side: str) -> None:
    layer = make_layer(**LAYERS[name])
    u = np.random.default_rng(1).standard_normal((2, 13, 12))
    with no_grad(), SIDES[side]():
        found = layer(Tensor(place(u))).data
    assert relative_error(found, mamba3_steps.layer(weights_of(layer), u, sizes(layer))) < TOLERANCE


@on_both
@pytest.mark.parametrize("name", LAYERS)
def test_decoding_token_by_token_equals_the_recurrence(name: str) -> None:
    layer = make_layer(**LAYERS[name])
    u = np.random.default_rng(2).standard_normal((2, 13, 12))
    cache = layer.new_cache(batch=2)
    with no_grad():
        steps = [host(layer.step(Tensor(place(u[:, t : t + 1])), cache).data) for t in range(u.shape[1])]
    assert relative_error(np.concatenate(steps, axis=1), mamba3_steps.layer(weights_of(layer), u, sizes(layer))) < TOLERANCE


@on_both
@pytest.mark.parametrize("name", LAYERS)
def test_what_decoding_keeps_has_the_size_that_theory_says_and_never_grows(name: str) -> None:
    layer, batch = make_layer(**LAYERS[name]), 3
    H, P, R, G, N, S = sizes(layer)
    # A state, and of the last token x, B̄ of every head and rank, and the angles; K-1 inputs of the convolution, if any.
    kept = H * P * N + H * P + H * R * N + H * S
    if layer.uses_conv:
        kept += (layer.conv1d.weight.shape[2] - 1) * (H * P + 2 * R * G * N)
    cache, u = layer.new_cache(batch), np.random.default_rng(3).standard_normal((batch, 1, 12))
    arrays = [v for v in vars(cache).values() if v is not None]
    addresses = [_address(v) for v in arrays]
    for _ in range(5):
        with no_grad():
            layer.step(Tensor(place(u)), cache)
        assert sum(v.size for v in vars(cache).values() if v is not None) == batch * kept
        assert [_address(v) for v in vars(cache).values() if v is not None] == addresses  # changed in place


def _address(array: Any) -> int:
    return int(array.data.ptr if on_device(array) else array.ctypes.data)


# --- against the official numbers -------------------------------------------------------------------------------------


def official(case: str) -> dict[str, Array]:
    found = safetensors.numpy.load_file(OFFICIAL)
    return {name.removeprefix(f"{case}."): array for name, array in found.items() if name.startswith(f"{case}.")}


def official_layer(numbers: dict[str, Array]) -> Mamba3:
    """A layer whose MIMO weights are the file's, and whose output projection leaves things as they are."""
    (H, P), N = numbers["x"].shape[2:], numbers["B"].shape[-1]
    rank = numbers["mimo_x"].shape[1] if "mimo_x" in numbers else 0
    layer = make_layer(
        hidden_size=H * P,
        mamba2_expand=1,
        mamba2_num_heads=H,
        mamba2_head_dim=P,
        mamba2_state_size=N,
        mamba2_n_groups=numbers["B"].shape[-2],
        mamba3_mimo_rank=rank,
    )
    for name in ("mimo_x", "mimo_z", "mimo_o") if rank else ():
        assign(getattr(layer, name).data, numbers[name])
    assign(layer.out_proj.weight.data, np.eye(H * P))
    return layer


def test_the_official_numbers_say_where_they_come_from() -> None:
    with safetensors.safe_open(OFFICIAL, framework="numpy") as file:
        assert file.metadata()["source"].startswith("state-spaces/mamba e9594ce")


@on_both
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("chunk", [1, 4, 64])
@pytest.mark.parametrize("case", ["siso0", "siso1", "siso2", "mimo0", "mimo1"])
def test_the_scan_with_its_gate_equals_the_official_numbers(case: str, chunk: int, side: str) -> None:
    numbers = official(case)
    layer, dt = official_layer(numbers), numbers["dt"]
    B, C, B_bias, C_bias = (numbers[name] for name in ("B", "C", "B_bias", "C_bias"))
    if layer.rank == 1:  # the file's SISO arrays have no axis for the rank
        B, C, B_bias, C_bias = B[:, :, None], C[:, :, None], B_bias[:, None], C_bias[:, None]
    lam = 1 / (1 + np.exp(-numbers["trap"]))
    phi = mamba3_steps.running_phase(dt, numbers["angle"])  # in the file every head has angles of its own
    with no_grad(), SIDES[side]():
        x = host(module._by_rank(Tensor(place(numbers["x"])), layer.mimo_x).data)
        y = scan(x, dt, numbers["A"], lam, B, C, (B_bias, C_bias), phi, numbers["D"], chunk)
        found = layer._out(y, Tensor(place(numbers["z"]))).data
    assert relative_error(found, numbers["y"].reshape(found.shape)) < TOLERANCE


@on_both
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("case", ["siso0", "siso1", "siso2", "mimo0", "mimo1"])
def test_running_angles_turn_as_far_as_the_official_ones(case: str, side: str) -> None:
    numbers = official(case)
    dt, angle = numbers["dt"], numbers["angle"]
    wanted = mamba3_steps.running_phase(dt, angle)
    with no_grad(), SIDES[side]():
        heads = [
            host(running_angle(Tensor(place(dt[:, :, h : h + 1].copy())), Tensor(place(angle[:, :, h].copy()))).data)
            for h in range(dt.shape[2])
        ]
    found = np.concatenate(heads, axis=2)
    assert np.any(np.floor(wanted / (2 * math.pi)) != 0)  # otherwise no whole turn was taken off
    # Angles of up to 70 · 3 · π = 660 are known to 1.1e-13 before whole turns are taken off; a few roundings of that size.
    assert np.abs(np.exp(1j * found) - np.exp(1j * wanted)).max() < 1e-12


def test_the_recurrence_that_judges_equals_the_official_numbers() -> None:
    """The judge is judged: otherwise package and recurrence could be wrong in the same way."""
    for case in ("siso1", "mimo1"):
        n = official(case)
        (H, P), G = n["x"].shape[2:], n["B"].shape[-2]
        rank = "mimo_x" in n
        B, C, B_bias, C_bias = (
            n[k] if rank else np.expand_dims(n[k], 2 if k in "BC" else 1) for k in ("B", "C", "B_bias", "C_bias")
        )
        ones = np.ones((H, 1, P))
        mimo_x, mimo_z, mimo_o = ((n[k] if rank else ones).transpose(1, 0, 2) for k in ("mimo_x", "mimo_z", "mimo_o"))
        x, z = n["x"][:, :, None] * mimo_x, n["z"][:, :, None] * mimo_z
        B, C = B.repeat(H // G, axis=3) + B_bias.transpose(1, 0, 2), C.repeat(H // G, axis=3) + C_bias.transpose(1, 0, 2)
        lam, phi = 1 / (1 + np.exp(-n["trap"])), mamba3_steps.running_phase(n["dt"], n["angle"])
        y = mamba3_steps.recurrence(x, n["dt"], n["A"], lam, B, C, phi, n["D"])
        assert relative_error((y * z / (1 + np.exp(-z)) * mimo_o).sum(axis=2), n["y"]) < TOLERANCE


# --- first values and decay rates -------------------------------------------------------------------------------------


@on_both
@pytest.mark.parametrize("rank", [0, 1, 4])
def test_first_values_are_the_documented_ones(rank: int) -> None:
    keys: dict[str, Any] = {"hidden_size": 512, "num_layers": 1, "vocab_size": 7, "max_seq_len": 16, "mamba_layers": [0]}
    keys |= {"mamba2_num_heads": 512, "mamba2_head_dim": 2, "mamba2_state_size": 4, "mamba3_mimo_rank": rank}
    layer = Mamba3(ModelConfig(**keys, mamba3_enabled=True), 0.02, 0.01)
    layer.initialize(0, np.dtype(np.float64), devices.current())
    arrays = weights_of(layer)
    ones = {"B_bias", "C_bias", "D", "B_norm.weight", "C_norm.weight"} | ({"mimo_z"} if rank else set())
    for name in ones:
        assert np.all(arrays[name] == 1), name
    assert arrays["B_bias"].shape == arrays["C_bias"].shape == (512, max(1, rank), 4)
    for name in ("mimo_x", "mimo_o"):
        assert (name in arrays) is (rank > 0)
        assert not rank or (np.all(arrays[name] == np.float32(1 / rank)) and arrays[name].shape == (512, rank, 2))
    dt = np.log1p(np.exp(arrays["dt_bias"]))
    # Stored from float32: near dt = 1e-3 the bias is about -6.9 and its last bit worth 2.4e-7 of dt.
    assert 1e-3 * (1 - 1e-6) <= dt.min() < 1.2e-3 and 0.08 < dt.max() <= 0.1 * (1 + 1e-6)
    # log(dt) is uniform over log(100) = 4.6: the mean of 512 is known to 4.6/sqrt(12·512) = 0.059; four of these.
    assert np.log(dt).mean() == pytest.approx((math.log(1e-3) + math.log(0.1)) / 2, abs=0.24)
    # The standard deviation of n numbers is known to 1/sqrt(2n): n > 500,000 gives 0.1%; five of these.
    assert arrays["in_proj.weight"].std() == pytest.approx(0.02, rel=0.005)
    assert arrays["out_proj.weight"].std() == pytest.approx(0.01, rel=0.005)


@on_both
def test_decay_rates_are_smooth_never_above_their_bound_and_without_gradient_where_bounded() -> None:
    # The bound holds below v = -9999; at v = 0 the two branches meet; at v = 1 the one that is not meant has its pole.
    v = np.array([-1e300, -1e6, -10001.0, -9998.0, -3.0, -1e-9, 0.0, 1e-9, 0.5, 1.0, 1e6])
    leaf = Tensor(place(v), requires_grad=True)
    A = module._decay_rate(leaf)
    A.backward(place(np.ones(v.shape)))
    rates, gradient = host(A.data), host(leaf.grad)
    wanted = [-1e-4, -1e-4, -1e-4, -1 / 9999, -1 / 4, -1 / (1 + 1e-9), -1.0, -1 - 1e-9, -1.5, -2.0, -1e6 - 1]
    slopes = [0, 0, 0, -1 / 9999**2, -1 / 16, -1 / (1 + 1e-9) ** 2, -1, -1, -1, -1, -1]
    # A dozen roundings of half a unit in the last place.
    np.testing.assert_allclose(rates, wanted, rtol=2e-15)
    np.testing.assert_allclose(gradient, slopes, rtol=4e-15)
    assert np.all(rates <= module.A_MAX) and module.A_MAX == -1e-4
    assert np.array_equal(gradient == 0, rates == module.A_MAX)


@on_both
def test_a_head_held_at_the_slowest_decay_keeps_its_state_and_gives_the_projection_no_gradient() -> None:
    layer = make_layer()
    rows = np.cumsum(layer.sizes)[4:6]  # the rows of in_proj that become dd_A
    u = np.abs(np.random.default_rng(4).standard_normal((2, 9, 12))) + 0.1
    layer.in_proj.weight.data[rows[0] : rows[1]] = -1e5  # u is positive: v = -1e5 Σ u is far below the bound
    p = layer._project(Tensor(place(u)), None)
    np.testing.assert_allclose(host(p.a.data), -1e-4 * host(p.dt.data), rtol=1e-15)
    w = place(np.random.default_rng(5).standard_normal(u.shape))
    (layer(Tensor(place(u))) * ops.as_tensor(w, like=p.a)).sum().backward()
    assert layer.in_proj.weight.grad is not None
    grad = host(layer.in_proj.weight.grad)
    assert np.all(grad[rows[0] : rows[1]] == 0)
    assert np.all(np.abs(np.delete(grad, np.arange(*rows), axis=0)).max(axis=1) > 0)  # every other row receives one
