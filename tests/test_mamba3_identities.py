"""What must hold of Mamba3 whatever other code computes: its special cases, its symmetries, and a problem solved by hand.

Where both sides do the same arithmetic they are equal to the bit. Otherwise they differ in the order of sums of at most a
few hundred float64 products: some hundred roundings of 1.1e-16, so 1e-12 is far above them and far below any mistake.
"""

from __future__ import annotations

import math
from typing import Any

import devices
import mamba3_steps
import numpy as np
import pytest
from architectures import everywhere
from devices import host, place
from test_mamba3 import make_layer, relative_error, scan, trapezoid, weights_of

from oxidizr_ref import LanguageModel
from oxidizr_ref.autograd import Tensor, no_grad
from oxidizr_ref.config import ModelConfig
from oxidizr_ref.fused.mamba3 import mamba3_scan, next_angle, running_angle
from oxidizr_ref.fused.ssd import ssd

pytestmark = pytest.mark.usefixtures("device")

Array = np.ndarray[Any, Any]
ROUNDING = 1e-12


def quantities(R: int = 1, T: int = 17, seed: int = 0) -> dict[str, Array]:
    """Random arguments of the scan: 2 sequences, 4 heads in 2 groups, P = 3, N = 8, of which 6 channels turn."""
    rng = np.random.default_rng(seed)
    shapes = {"x": (2, T, R, 4, 3), "B": (2, T, R, 2, 8), "C": (2, T, R, 2, 8), "phi": (2, T, 4, 3), "D": (4,)}
    shapes |= {"B_bias": (4, R, 8), "C_bias": (4, R, 8)}
    found = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    dt = rng.uniform(0.1, 1.5, (2, T, 4))
    return {**found, "dt": dt, "A": -rng.uniform(1e-4, 2, dt.shape), "lam": rng.uniform(0, 1, dt.shape)}


def run(q: dict[str, Array], chunk: int = 5) -> Array:
    biases = q["B_bias"], q["C_bias"]
    return host(scan(q["x"], q["dt"], q["A"], q["lam"], q["B"], q["C"], biases, q["phi"], q["D"], chunk).data)


# --- special cases ----------------------------------------------------------------------------------------------------


def test_a_mimo_layer_of_rank_1_with_ones_is_the_siso_layer_to_the_bit_forward_backward_and_decoding() -> None:
    siso, mimo = make_layer(), make_layer(mamba3_mimo_rank=1)
    for name, p in mimo.named_parameters():
        p.data[...] = 1.0 if name.startswith("mimo") else siso.state_dict()[name]
    u = np.random.default_rng(0).standard_normal((2, 13, 12))
    results = []
    for layer in (siso, mimo):
        leaf, cache = Tensor(place(u), requires_grad=True), layer.new_cache(2)
        y = layer(leaf)
        y.backward(place(np.cos(u)))
        with no_grad():
            steps = [host(layer.step(Tensor(place(u[:, t : t + 1])), cache).data) for t in range(13)]
        gradients = {name: host(p.grad) for name, p in layer.named_parameters() if not name.startswith("mimo")}
        results.append({"y": host(y.data), "du": host(leaf.grad), "steps": np.concatenate(steps, axis=1), **gradients})
    assert results[0].keys() == results[1].keys() and len(results[0]) == 3 + 8
    for name, array in results[0].items():
        assert np.array_equal(array, results[1][name]), name


@pytest.mark.parametrize("R", [2, 3])
def test_the_scan_of_rank_r_is_the_sum_of_its_r_squared_siso_scans(R: int) -> None:
    q = quantities(R)
    wanted = np.zeros(q["x"].shape)
    for read in range(R):
        for write in range(R):
            alone = {**q, "D": q["D"] if read == write else 0 * q["D"]}
            alone |= {name: q[name][:, :, write : write + 1] for name in ("x", "B")}
            alone |= {"C": q["C"][:, :, read : read + 1], "B_bias": q["B_bias"][:, write : write + 1]}
            wanted[:, :, read] += run({**alone, "C_bias": q["C_bias"][:, read : read + 1]})[:, :, 0]
    assert relative_error(run(q), wanted) < ROUNDING


@pytest.mark.parametrize("R", [1, 3])
def test_without_trapezoid_rotation_and_biases_it_is_mamba2s_scan(R: int) -> None:
    q = quantities(R)
    q |= {"lam": np.ones(q["lam"].shape), "phi": np.zeros(q["phi"].shape), "A": np.broadcast_to(q["A"][0, 0], q["A"].shape)}
    q |= {name: np.zeros(q[name].shape) for name in ("B_bias", "C_bias")}
    # Mamba2 knows no ranks: what reads with rank r is the sum over what all ranks write.
    wanted = np.zeros(q["x"].shape)
    for read in range(R):
        for write in range(R):
            arrays = q["x"][:, :, write], q["dt"], q["A"][0, 0], q["B"][:, :, write], q["C"][:, :, read]
            D = q["D"] if read == write else 0 * q["D"]
            with no_grad():
                wanted[:, :, read] += host(ssd(*(Tensor(place(v)) for v in (*arrays, D)), 5).data)
    assert relative_error(run(q), wanted) < ROUNDING


def test_without_rotation_a_zero_angle_and_no_angle_at_all_are_the_same_to_the_bit() -> None:
    q = quantities(R=2)
    still, none = ({**q, "phi": np.zeros((2, 17, 4, S))} for S in (3, 0))
    assert np.array_equal(run(still), run(none))


def test_rotating_b_and_c_is_the_same_as_a_complex_transition_of_the_state() -> None:
    """The "RoPE trick": with ``b, c`` the pairs of B and C as complex numbers, not turned, and θ_t = φ_t - φ_{t-1},

    ``g_t = α_t e^{-iθ_t} (g_{t-1} + (1-λ_t) dt_t x_{t-1} b_{t-1}) + γ_t x_t b_t``, ``y_t = Re(g_t · conj(c_t)) + D x_t``.
    """
    q = {**quantities(), "phi": np.cumsum(np.random.default_rng(5).uniform(-3, 3, (2, 17, 4, 4)), axis=1)}
    b, c = (  # [batch,T,H,4]
        (v[..., 0::2] + 1j * v[..., 1::2])
        for v in (q[name][:, :, 0].repeat(2, axis=2) + q[f"{name}_bias"][:, 0] for name in ("B", "C"))
    )
    x, dt, lam = q["x"][:, :, 0], q["dt"], q["lam"]
    theta = np.diff(q["phi"], axis=1, prepend=0)
    wanted, g, before = np.zeros(x.shape), np.zeros((2, 4, 3, 4), complex), np.zeros((2, 4, 3, 4), complex)
    for t in range(x.shape[1]):
        entering = x[:, t, :, :, None] * b[:, t, :, None, :]
        late = ((1 - lam) * dt)[:, t, :, None, None] * before
        alpha = np.exp(dt * q["A"])[:, t, :, None, None] * np.exp(-1j * theta)[:, t, :, None, :]
        g = alpha * (g + late) + (lam * dt)[:, t, :, None, None] * entering
        wanted[:, t] = (g * c.conj()[:, t, :, None, :]).real.sum(axis=-1) + q["D"][:, None] * x[:, t]
        before = entering
    assert relative_error(run(q)[:, :, 0], wanted) < ROUNDING


# --- symmetries -------------------------------------------------------------------------------------------------------


def test_only_differences_of_angles_matter() -> None:
    q = quantities(R=2)
    turned_before = {**q, "phi": q["phi"] + np.random.default_rng(1).uniform(0, 6, (2, 1, 4, 3))}
    whole_turns = {**q, "phi": q["phi"] + 2 * math.pi * np.random.default_rng(2).integers(-9, 9, q["phi"].shape)}
    assert relative_error(run(turned_before), run(q)) < ROUNDING
    # 9 turns are 57 radians, known to 7e-15: two dozen times the rounding of an angle below 2π.
    assert relative_error(run(whole_turns), run(q)) < ROUNDING
    differently = {**q, "phi": q["phi"] + np.random.default_rng(3).uniform(0, 6, q["phi"].shape)}
    assert relative_error(run(differently), run(q)) > 0.1


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_angles_stay_within_one_turn_and_those_of_a_prefix_are_the_prefix_of_the_angles(dtype: Any) -> None:
    rng = np.random.default_rng(6)
    dt, angle = rng.uniform(0, 3, (2, 20_000, 3)).astype(dtype), (rng.standard_normal((2, 20_000, 4)) + 0.5).astype(dtype)
    with no_grad():
        phi = host(running_angle(Tensor(place(dt)), Tensor(place(angle))).data)
        parts = (Tensor(place(v[:, :777].copy())) for v in (dt, angle))
        short = host(running_angle(*parts).data)
    assert phi.dtype == dtype and phi.min() >= 0
    # Rounded to its dtype, an angle just below a whole turn may become the number nearest to 2π, which lies above it.
    assert phi.max() <= dtype(2 * math.pi)
    assert phi.min() < 0.01 and phi.max() > 6.27  # they do go all the way round
    assert np.array_equal(phi[:, :777], short)


def test_changing_a_token_changes_no_output_before_it_and_every_one_after() -> None:
    layer, u = make_layer(mamba3_mimo_rank=2), np.random.default_rng(7).standard_normal((1, 11, 12))
    with no_grad():
        first = host(layer(Tensor(place(u))).data)
        for t in range(11):
            changed = u.copy()
            changed[:, t] += 0.5
            after = host(layer(Tensor(place(changed))).data)
            # The inflow of the token before t holds (1-λ_t) dt_t, but counts from t on: to the tokens before, nothing moved.
            assert np.array_equal(after[:, :t], first[:, :t])
            assert np.all(np.abs(after[:, t:] - first[:, t:]).max(axis=-1) > 0)


@pytest.mark.parametrize("changes", [{}, {"mamba3_use_conv": True}])
def test_the_outputs_of_a_prefix_are_the_prefix_of_the_outputs(changes: dict[str, Any]) -> None:
    """Whatever chunks the lengths fall into."""
    layer, u = make_layer(**changes), np.random.default_rng(8).standard_normal((2, 23, 12))
    with no_grad():
        whole = host(layer(Tensor(place(u))).data)
        for T in (1, 4, 5, 6, 22):
            assert relative_error(layer(Tensor(place(u[:, :T].copy()))).data, whole[:, :T].copy()) < ROUNDING


@pytest.mark.parametrize("fraction", [0.5, 1.0])
def test_a_layer_whose_rotation_pairs_the_halves_of_the_state_is_ours_with_its_state_channels_in_another_order(
    fraction: float,
) -> None:
    """One official MIMO kernel turns channel i with N/2 + i; a permutation of what indexes N makes its weights ours."""
    layer = make_layer(mamba3_mimo_rank=2, mamba3_rope_fraction=fraction)
    H, P, R, G, N, S = layer.heads, layer.head_dim, layer.rank, layer.groups, layer.d_state, layer.pairs
    pairs = [i for s in range(S) for i in (s, N // 2 + s)]
    order = pairs + [i for i in range(N) if i not in pairs]
    u, theirs = np.random.default_rng(12).standard_normal((2, 13, 12)), weights_of(layer)

    def turned_by_halves(v: Array, phi: Array) -> Array:
        rotation, v = np.exp(1j * phi), v.copy()
        turning = (v[:S] + 1j * v[N // 2 : N // 2 + S]) * rotation
        v[:S], v[N // 2 : N // 2 + S] = turning.real, turning.imag
        return v

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mamba3_steps, "turned", turned_by_halves)
        wanted = mamba3_steps.layer(theirs, u, (H, P, R, G, N, S))
    assert relative_error(mamba3_steps.layer(theirs, u, (H, P, R, G, N, S)), wanted) > 1e-3  # as they are, they are not ours

    for name in ("B_norm.weight", "C_norm.weight", "B_bias", "C_bias"):
        theirs[name][...] = theirs[name][..., order]
    rows = theirs["in_proj.weight"][2 * H * P : 2 * H * P + 2 * R * G * N].reshape(2, R, G, N, 12)  # those of B, of C
    rows[...] = rows[:, :, :, order]
    layer.load_state_dict(theirs)
    with no_grad():
        assert relative_error(layer(Tensor(place(u))).data, wanted) < ROUNDING


# --- parity, by construction ------------------------------------------------------------------------------------------

BEGIN = 2  # the token before the bits 0 and 1


def parity_machine(dtype: str, turning: bool = True) -> LanguageModel:
    """A language model of one Mamba3 layer and one head whose weights are set by hand so that it says "even" or "odd".

    The first token puts a vector into the state and nothing else ever enters it; every 1 turns the state by half a turn
    (dt = 1, tanh(angle) = 1), which flips its sign; the decay is the slowest there is, exp(-1e-4) a token.
    """
    config = ModelConfig(
        name="parity",
        hidden_size=4,
        num_layers=1,
        vocab_size=3,
        max_seq_len=4097,
        mamba_layers=[0],
        mamba2_num_heads=1,
        mamba2_head_dim=4,
        mamba2_state_size=2,
        mamba2_expand=1,
        mamba3_enabled=True,
        mamba3_complex_rope=turning,
        mamba3_rope_fraction=1.0,
        dtype=dtype,
    )
    model = LanguageModel(config, device=devices.current())
    w = {name: host(array).copy() for name, array in model.state_dict().items()}
    for name, array in w.items():
        array[...] = 1.0 if name.endswith("norm.weight") else 0.0
    mixer = "layers.0.mamba3.mixer."
    w["embed_tokens.weight"][:, :3] = np.eye(3)  # the fourth channel is for the answer
    rows = w[f"{mixer}in_proj.weight"]  # z 0-3 | x 4-7 | B 8-9 | C 10-11 | dd_dt 12 | dd_A 13 | trap 14 | angle 15
    rows[0:4, :3] = 1.0  # the gate is open
    rows[4, BEGIN] = 1.0  # x: only the first token writes
    rows[13, :3], rows[14, :3] = -1e6, 50.0  # A at its bound; λ = 1: a token enters at once and not late
    if turning:
        rows[15, 1] = 50.0  # π a one, 0 otherwise
    for name in ("B_bias", "C_bias"):
        w[mixer + name][0, 0] = [1.0, 0.0]  # B and C are this at every token, before they turn
    w[f"{mixer}dt_bias"][...] = math.log(math.e - 1)  # its softplus is 1
    w[f"{mixer}out_proj.weight"][3, 0] = 1.0
    w["lm_head.weight"][:2, 3] = 1.0, -1.0
    model.load_state_dict(w)
    return model


def bits(count: int, length: int) -> tuple[Array, Array]:
    """Token ids ``[count, 1 + length]`` and the parity of the bits up to each of them; one sequence all ones."""
    ids = np.random.default_rng(9).integers(0, 2, (count, length + 1))
    ids[0], ids[:, 0] = 1, 0
    parity = np.cumsum(ids, axis=1) % 2
    ids[:, 0] = BEGIN
    return ids, parity


@everywhere("dtype,length", [("f64", 4096), ("f32", 4096)], [("f32", 500)])
def test_a_rotation_by_pi_a_bit_solves_parity_at_every_one_of_4096_positions_without_training(
    dtype: str, length: int
) -> None:
    ids, parity = (array[:, : length + 1] for array in bits(3, 4096))
    with no_grad():
        logits = host(parity_machine(dtype)(ids).data)
    assert np.array_equal(logits[..., :2].argmax(axis=-1), parity)
    # Far from chance: the state has decayed to exp(-0.4096) = 0.66 of itself at the end, the answer with it.
    margin = np.abs(logits[..., 0] - logits[..., 1])
    assert margin.min() > 0.5 * margin.max()


@everywhere("length", [4096], [500])
def test_without_rotation_the_same_weights_cannot_tell_even_from_odd(length: int) -> None:
    ids, parity = bits(3, 4096)
    with no_grad():
        logits = host(parity_machine("f64", turning=False)(ids[:, : length + 1]).data)
    answers = logits[..., :2].argmax(axis=-1)
    assert np.all(answers == 0)  # a real decay is positive: the sign of the state never changes
    assert abs(parity.mean() - 0.5) < 0.02  # so half of the answers are wrong


@everywhere("dtype", ["f64", "f32"], ["f32"])
@pytest.mark.parametrize("length", [200, pytest.param(4096, marks=pytest.mark.long)])
def test_decoding_solves_parity_token_by_token(length: int, dtype: str) -> None:
    ids, parity = bits(3, length)
    model = parity_machine(dtype)
    cache = model.new_cache(3)
    for t in range(length + 1):
        assert np.array_equal(host(model.step(ids[:, t], cache).data)[:, :2].argmax(axis=-1), parity[:, t]), t


def test_the_scan_solves_parity_in_float32_with_time_steps_of_any_size_whose_turns_are_pi() -> None:
    """dt between 1.05 and 2 and ``tanh(angle) = 1/dt``: turns that are π but for rounding, and must not add up to drift."""
    T = 4096
    rng = np.random.default_rng(10)
    ones = rng.integers(0, 2, (1, T, 1))
    dt = rng.uniform(1.05, 2, (1, T, 1))
    angle = np.arctanh(ones / dt)  # dt π tanh(angle) = π or 0
    phi = running_angle(Tensor(place(dt.astype(np.float32))), Tensor(place(angle.astype(np.float32))))
    x = np.zeros((1, T, 1, 1, 1), np.float32)
    x[:, 0] = 1.0
    lam = np.ones(dt.shape)
    numbers = [v.astype(np.float32) for v in (dt * -1e-4, *trapezoid(dt, lam))]
    still, bias = np.zeros((1, T, 1, 1, 2), np.float32), np.array([[[1.0, 0.0]]], np.float32)
    arrays = (x, *numbers, still, still, bias, bias, host(phi.data), np.zeros(1, np.float32))
    with no_grad():
        y = host(mamba3_scan(*(Tensor(place(v)) for v in arrays), 64).data)[0, :, 0, 0, 0]
    flips = np.cumsum(ones[0, 1:, 0], dtype=np.int64)
    assert np.array_equal(np.sign(y[1:]), 1 - 2.0 * (flips % 2))


def test_decodings_angle_agrees_with_the_running_one() -> None:
    rng = np.random.default_rng(11)
    dt, angle = rng.uniform(0, 2, (2, 300, 3)), rng.standard_normal((2, 300, 4))
    with no_grad():
        wanted = host(running_angle(Tensor(place(dt)), Tensor(place(angle))).data)
    phi = place(np.zeros((2, 3, 4)))
    for t in range(300):
        phi = next_angle(phi, place(dt[:, t]), place(angle[:, t]))
        # 300 turns of up to 2π, each rounded at sums below 4π, against sums that grow to a few hundred: below 1e-12.
        assert np.abs(np.exp(1j * host(phi)) - np.exp(1j * wanted[:, t])).max() < ROUNDING
