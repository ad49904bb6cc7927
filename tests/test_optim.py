"""AdamW against a plain Python one, its rounding, its state, the gradient norm, and the schedules at their key points.

Updates and norms are computed on the host and on a device; threads, tiles and schedules are the host's alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import devices
import ml_dtypes
import numpy as np
import pytest
from devices import host, place
from hypothesis import given
from hypothesis import strategies as st

from oxidizr_ref import parallel
from oxidizr_ref.backend import xp_of
from oxidizr_ref.errors import CheckpointError
from oxidizr_ref.optim import AdamW, clip_factor, decays, first_not_finite, global_norm, learning_rate

on_both = pytest.mark.usefixtures("device")

BF16 = np.dtype(ml_dtypes.bfloat16)
SHAPES = {"layers.0.up.weight": (3, 4), "norm.weight": (5,), "layers.0.mixer.A_log": (2, 2)}


def random_arrays(seed: int, shapes: Mapping[str, tuple[int, ...]] = SHAPES, dtype: Any = np.float64) -> dict[str, Any]:
    """Arrays where the test computes."""
    rng = np.random.default_rng(seed)
    return placed({name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()})


def placed(arrays: Mapping[str, Any]) -> dict[str, Any]:
    return {name: place(array) for name, array in arrays.items()}


def copies(arrays: Mapping[str, Any]) -> dict[str, Any]:
    return {name: array.copy() for name, array in arrays.items()}


def bits(arrays: Mapping[str, Any]) -> dict[str, bytes]:
    return {name: host(array).tobytes() for name, array in arrays.items()}


# --- the update -------------------------------------------------------------------------------------------------------


def adamw_number_by_number(
    p: list[float], gradients: list[list[float]], rates: list[float], betas: tuple[float, float], eps: float, decay: float
) -> list[float]:
    """Loshchilov & Hutter 2019, algorithm 2, one number at a time (decay and update both from the old parameter)."""
    m, v, p = [0.0] * len(p), [0.0] * len(p), list(p)
    for n, (g, lr) in enumerate(zip(gradients, rates, strict=True), 1):
        for i in range(len(p)):
            m[i] = betas[0] * m[i] + (1 - betas[0]) * g[i]
            v[i] = betas[1] * v[i] + (1 - betas[1]) * g[i] * g[i]
            m_hat, v_hat = m[i] / (1 - betas[0] ** n), v[i] / (1 - betas[1] ** n)
            p[i] = p[i] - lr * (m_hat / (math.sqrt(v_hat) + eps) + decay * p[i])
    return p


@on_both
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.8, 0.95)])
@pytest.mark.parametrize("eps", [1e-8, 1e-2])
def test_twenty_steps_equal_a_plain_python_adamw(betas: tuple[float, float], eps: float) -> None:
    arrays, rates, scale = random_arrays(0), [0.01 * (1 + n % 3) for n in range(20)], 0.25
    before = copies(arrays)
    gradients = [random_arrays(n + 1) for n in range(20)]
    optimizer = AdamW(arrays, lr=1.0, betas=betas, eps=eps, weight_decay=0.1)
    for g, lr in zip(gradients, rates, strict=True):
        optimizer.step(g, lr=lr, gradient_scale=scale)
    for name, array in arrays.items():
        wanted = adamw_number_by_number(
            host(before[name]).ravel().tolist(),
            [(host(g[name]) * scale).ravel().tolist() for g in gradients],
            rates,
            betas,
            eps,
            0.1 if name == "layers.0.up.weight" else 0.0,
        )
        # Twenty updates of about ten roundings each, parameters and updates of order one: 200 · 1.1e-16 and some room.
        np.testing.assert_allclose(host(array).ravel(), wanted, rtol=0, atol=1e-13)


@on_both
def test_learning_rate_of_the_optimizer_is_the_default_and_the_arrays_are_changed_in_place() -> None:
    arrays, explicit = random_arrays(0), random_arrays(0)
    same = dict(arrays)
    AdamW(arrays, lr=0.3).step(random_arrays(1))
    AdamW(explicit, lr=9.0).step(random_arrays(1), lr=0.3)
    assert bits(arrays) == bits(explicit)
    assert all(arrays[name] is same[name] for name in arrays)


@on_both
def test_gradients_are_never_changed() -> None:
    arrays, gradients = random_arrays(0), random_arrays(1)
    before = bits(gradients)
    AdamW(arrays, lr=0.1).step(gradients, gradient_scale=0.5)
    assert bits(gradients) == before


@on_both
def test_first_step_moves_every_element_by_the_learning_rate_against_its_gradient() -> None:
    arrays = placed({"w": np.zeros(4)})
    AdamW(arrays, lr=0.1, weight_decay=0.0).step(placed({"w": np.array([1e-3, -2.0, 50.0, 0.0])}))
    # m̂ / sqrt(v̂) = sign(g), but for eps = 1e-8 beside |g| ≥ 1e-3.
    np.testing.assert_allclose(host(arrays["w"]), [-0.1, 0.1, -0.1, 0.0], rtol=1.1e-5)


@on_both
def test_zero_gradient_of_a_decaying_parameter_shrinks_it_and_of_another_leaves_its_bits() -> None:
    arrays = placed({"a.weight": np.array([2.0]), "norm.weight": np.array([2.0])})
    AdamW(arrays, lr=0.1, weight_decay=0.5).step(placed({name: np.zeros(1) for name in arrays}))
    np.testing.assert_array_equal(host(arrays["a.weight"]), [2.0 * (1 - 0.1 * 0.5)])
    np.testing.assert_array_equal(host(arrays["norm.weight"]), [2.0])


@pytest.mark.parametrize(
    ("name", "decayed"),
    [
        ("embed_tokens.weight", True),
        ("lm_head.weight", True),
        ("layers.0.attention.q_proj.weight", True),
        ("layers.3.mixer.conv1d.weight", True),
        ("norm.weight", False),
        ("layers.0.input_layernorm.weight", False),
        ("layers.0.mixer.norm.weight", False),
        ("layers.0.mixer.conv1d.bias", False),
        ("layers.0.mixer.dt_bias", False),
        ("layers.0.mixer.B_bias", False),
        ("layers.0.mixer.A_log", False),
        ("layers.0.mixer.D", False),
    ],
)
def test_decay_acts_on_matrices_and_not_on_norms_biases_and_state_space_parameters(name: str, decayed: bool) -> None:
    assert decays(name) is decayed


@on_both
def test_gradients_of_other_names_are_refused_and_nothing_changes() -> None:
    arrays = random_arrays(0)
    before, optimizer = bits(arrays), AdamW(arrays, lr=0.1)
    gradients = random_arrays(1)
    gradients["extra"] = gradients.pop("norm.weight")
    with pytest.raises(KeyError, match=r"extra.*norm\.weight"):
        optimizer.step(gradients)
    assert bits(arrays) == before
    assert optimizer.updates == 0


@on_both
@pytest.mark.parametrize(("storage", "moments"), [("f8", "f8"), ("f4", "f4"), ("f2", "f4"), (BF16, "f4")])
def test_moments_have_the_compute_dtype_and_parameters_keep_theirs(storage: Any, moments: str) -> None:
    arrays = random_arrays(0, dtype=storage)
    optimizer = AdamW(arrays, lr=0.1)
    optimizer.step(random_arrays(1, dtype=moments))
    assert {a.dtype for a in arrays.values()} == {np.dtype(storage)}
    assert {a.dtype for a in optimizer.state_dict().values()} == {np.dtype(moments)}
    assert all(a.flags.c_contiguous for a in optimizer.state_dict().values())
    if devices.current() == "cpu":
        assert all(a.flags.owndata for a in optimizer.state_dict().values())


@on_both
def test_parameter_that_is_not_contiguous_is_updated_or_refused_but_never_silently_left_alone() -> None:
    array = place(np.asfortranarray(np.ones((3, 4))))
    try:
        AdamW({"w": array}, lr=0.1).step(placed({"w": np.ones((3, 4))}))
    except ValueError:
        return
    assert np.all(host(array) < 1)


# --- threads ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", [np.dtype(np.float32), BF16], ids=str)
def test_update_and_norm_have_the_same_bits_for_any_number_of_threads_over_three_or_more_tiles(storage: Any) -> None:
    shapes = {"a.weight": (3 * parallel.ELEMENTS + 17,), "b.weight": (500, 301), "norm.weight": (7,)}
    start = random_arrays(0, shapes, storage)
    gradients = [random_arrays(n, shapes, np.float32) for n in (1, 2, 3)]
    found = []
    for threads in (1, 2, 3, 5, 8):
        parallel.set_threads(threads)
        arrays = copies(start)
        optimizer = AdamW(arrays, lr=0.01)
        assert len(optimizer._pieces) >= 3 + 3
        for g in gradients:
            optimizer.step(g, gradient_scale=clip_factor(global_norm(g), 1.0))
        found.append((bits(arrays), bits(optimizer.state_dict()), global_norm(gradients[0]).hex()))
    assert all(other == found[0] for other in found[1:])


def test_update_does_not_depend_on_how_it_is_cut_into_tiles() -> None:
    shapes, results = {"a.weight": (1000,), "b.weight": (37,)}, []
    for elements in (65536, 64, 12):  # multiples of 4: a random word serves four elements
        for storage in (np.float32, BF16):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(parallel, "ELEMENTS", elements)
                arrays = random_arrays(0, shapes, storage)
                optimizer = AdamW(arrays, lr=0.01)
                optimizer.step(random_arrays(1, shapes, np.float32))
                results.append(bits(arrays))
    assert results[0::2] == [results[0]] * 3
    assert results[1::2] == [results[1]] * 3


# --- state ------------------------------------------------------------------------------------------------------------


@on_both
@pytest.mark.parametrize("storage", [np.dtype(np.float64), np.dtype(np.float32), BF16], ids=str)
def test_resumed_optimizer_continues_to_the_same_bits(storage: Any) -> None:
    compute = np.float64 if storage == np.float64 else np.float32
    gradients = [random_arrays(n + 1, dtype=compute) for n in range(8)]
    straight = random_arrays(0, dtype=storage)
    one = AdamW(straight, lr=0.01, seed=5)
    for g in gradients:
        one.step(g)

    first = random_arrays(0, dtype=storage)
    before = AdamW(first, lr=0.01, seed=5)
    for g in gradients[:3]:
        before.step(g)
    resumed = copies(first)
    after = AdamW(resumed, lr=0.01, seed=5)
    saved = copies(before.state_dict())
    after.load_state_dict(saved, before.updates)
    assert after.updates == 3
    assert not any(xp_of(slot).may_share_memory(saved[name], slot) for name, slot in after.state_dict().items())
    for g in gradients[3:]:
        after.step(g)
    assert bits(resumed) == bits(straight)
    assert bits(after.state_dict()) == bits(one.state_dict())
    assert bits(resumed) != bits(first)


@on_both
def test_state_dict_names_every_slot_of_every_parameter_and_holds_the_live_arrays() -> None:
    optimizer = AdamW(random_arrays(0), lr=0.1)
    state = optimizer.state_dict()
    assert sorted(state) == sorted(f"{slot}.{name}" for slot in ("exp_avg", "exp_avg_sq") for name in SHAPES)
    optimizer.step(random_arrays(1))
    assert all(np.any(host(state[name]) != 0) for name in state)


@on_both
@pytest.mark.parametrize("harm", ["missing", "shape", "extra"])
def test_slots_that_do_not_fit_are_refused_by_name(harm: str) -> None:
    optimizer = AdamW(random_arrays(0), lr=0.1)
    state = {name: array + 1 for name, array in optimizer.state_dict().items()}
    name = "exp_avg_sq.norm.weight"
    if harm == "missing":
        del state[name]
    elif harm == "shape":
        state[name] = place(np.ones(6))
    else:
        name = "exp_avg.unknown"
        state[name] = place(np.ones(3))
    with pytest.raises(CheckpointError, match=name):
        optimizer.load_state_dict(state, 3)
    assert optimizer.updates == 0


# --- bf16 -------------------------------------------------------------------------------------------------------------


@on_both
def test_stochastic_rounding_is_unbiased_where_rounding_to_nearest_would_freeze() -> None:
    n, steps, rate = 4096, 64, 1e-4
    arrays = placed({"norm.weight": np.ones(n, dtype=BF16)})
    optimizer = AdamW(arrays, lr=rate, betas=(0.0, 0.0), eps=0.0)  # every update is exactly rate · sign(g)
    gradient = placed({"norm.weight": np.full(n, -1.0, dtype=np.float32)})
    frozen = np.ones(n, dtype=BF16)
    for _ in range(steps):
        optimizer.step(gradient)
        frozen = (frozen.astype(np.float32) + np.float32(rate)).astype(BF16)
    np.testing.assert_array_equal(frozen.astype(np.float32), 1.0)  # half a unit at 1 is 2⁻⁸ = 0.0039 > 1e-4
    found = host(arrays["norm.weight"]).astype(np.float64)
    # An update of u below one unit q = 2⁻⁷ happens with probability u/q: variance q·u a step at most, so the mean of n
    # elements over all steps has standard error sqrt(steps · q · u / n) = 1.1e-4 beside a total of 6.4e-3; five of them.
    assert abs(found.mean() - (1 + steps * rate)) < 5 * math.sqrt(steps * 2**-7 * rate / n)
    assert set(np.unique(found)) <= {1 + k * 2**-7 for k in range(9)}


@on_both
def test_stochastic_rounding_of_a_value_bf16_can_hold_keeps_it() -> None:
    arrays = placed({"norm.weight": np.array([1.0, -2.5, 0.0, 3.140625, 2.0**-130, -(2.0**100)], dtype=BF16)})
    before = bits(arrays)
    optimizer = AdamW(arrays, lr=0.1)
    for _ in range(20):
        optimizer.step(placed({"norm.weight": np.zeros(6, dtype=np.float32)}))
    assert bits(arrays) == before


@on_both
def test_f16_is_rounded_stochastically_too_in_its_normal_and_subnormal_range() -> None:
    # (value, distance of neighbours): 1 + u·2⁻¹⁰ and, subnormal, (k + u)·2⁻²⁴, with u = 1/4.
    for value, unit in ((1.0, 2.0**-10), (-2.0, 2.0**-9), (5 * 2.0**-24, 2.0**-24), (-(2.0**-15), 2.0**-24)):
        n = 20_000
        arrays = placed({"norm.weight": np.full(n, value, dtype=np.float16)})
        optimizer = AdamW(arrays, lr=unit / 4, betas=(0.0, 0.0), eps=0.0)
        optimizer.step(placed({"norm.weight": np.full(n, -math.copysign(1.0, value), dtype=np.float32)}))
        moved = (np.abs(host(arrays["norm.weight"]).astype(np.float64)) - abs(value)) / unit
        assert set(np.unique(moved)) == {0.0, 1.0}
        assert abs(moved.mean() - 0.25) < 0.016  # five times sqrt(3/16/20000)


@on_both
def test_stochastic_rounding_of_a_value_f16_can_hold_keeps_it() -> None:
    every = np.arange(65536, dtype=np.uint16).view(np.float16)
    arrays = placed({"norm.weight": every[np.isfinite(every) & (every != 0)]})
    before = bits(arrays)
    AdamW(arrays, lr=0.1).step(placed({"norm.weight": np.zeros(len(arrays["norm.weight"]), dtype=np.float32)}))
    assert bits(arrays) == before


@on_both
def test_first_not_finite_names_the_first_array_in_name_order() -> None:
    arrays = placed({"b": np.ones(200_000, np.float32), "a": np.ones(3, dtype=BF16), "c": np.ones(2, np.float16)})
    assert first_not_finite(arrays) is None
    arrays["c"][1] = np.inf
    assert first_not_finite(arrays) == "c"
    arrays["b"][199_999] = np.nan
    assert first_not_finite(arrays) == "b"


@on_both
def test_stochastic_rounding_treats_both_signs_alike_and_stays_within_one_unit() -> None:
    n = 20_000
    start = np.repeat(np.array([1.0, -1.0]), n // 2)
    arrays = placed({"norm.weight": start.astype(BF16)})
    AdamW(arrays, lr=2.0**-9, betas=(0.0, 0.0), eps=0.0).step(placed({"norm.weight": -start.astype(np.float32)}))
    up = np.abs(host(arrays["norm.weight"]).astype(np.float64))
    assert set(np.unique(up)) == {1.0, 1 + 2.0**-7}
    for half in (up[: n // 2], up[n // 2 :]):  # a quarter unit: probability 1/4, standard error sqrt(3/16/10⁴) = 0.0043
        assert abs((half > 1).mean() - 0.25) < 0.022


@on_both
def test_rounding_bits_are_addressed_by_seed_name_update_and_element_not_drawn() -> None:
    def after(name: str, seed: int, size: int, updates: int) -> Any:
        others = placed({"a.norm.weight": np.ones(5, dtype=BF16), name: np.ones(size, dtype=BF16)})
        optimizer = AdamW(others, lr=2.0**-8, betas=(0.0, 0.0), eps=0.0, seed=seed)
        optimizer.updates = updates
        optimizer.step(placed({key: np.full(array.shape, -1.0, dtype=np.float32) for key, array in others.items()}))
        return host(others[name]).astype(np.float32)

    base = after("norm.weight", 0, 200, 3)
    np.testing.assert_array_equal(base, after("norm.weight", 0, 200, 3))
    np.testing.assert_array_equal(base[:77], after("norm.weight", 0, 77, 3))
    for name, seed, updates in [("x.norm.weight", 0, 3), ("norm.weight", 1, 3), ("norm.weight", 0, 4)]:
        assert np.any(base != after(name, seed, 200, updates))


# --- the norm ---------------------------------------------------------------------------------------------------------


@on_both
@given(sizes=st.lists(st.integers(0, 50), max_size=5), seed=st.integers(0, 2**32), scale=st.sampled_from([1e-18, 1.0, 1e18]))
def test_global_norm_equals_the_exact_sum_of_squares(sizes: list[int], seed: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    gradients = {f"p{i}": (rng.standard_normal(size) * scale).astype(np.float32) for i, size in enumerate(sizes)}
    exact = math.sqrt(math.fsum(float(x) ** 2 for g in gradients.values() for x in g))
    # float64 sums of at most 250 positive terms: 250 · 1.1e-16.
    assert float(global_norm(placed(gradients))) == pytest.approx(exact, rel=3e-14, abs=0)


@on_both
def test_global_norm_over_many_tiles_equals_the_exact_sum_and_ignores_the_order_of_names() -> None:
    shapes = {"a": (3 * parallel.ELEMENTS + 5,), "b": (300, 300), "c": (1,)}
    gradients = random_arrays(0, shapes, np.float32)
    exact = math.sqrt(math.fsum((host(g).astype(np.float64) ** 2).sum() for g in gradients.values()))
    assert float(global_norm(gradients)) == pytest.approx(exact, rel=1e-13)
    assert float(global_norm(gradients)) == float(global_norm(dict(reversed(gradients.items()))))


@on_both
@pytest.mark.parametrize(("value", "check"), [(math.nan, math.isnan), (math.inf, math.isinf)])
def test_global_norm_tells_of_nan_and_infinity(value: float, check: Any) -> None:
    assert check(float(global_norm(placed({"a": np.array([1.0, value], dtype=np.float32)}))))


def test_global_norm_of_nothing_is_zero() -> None:
    assert global_norm({}) == 0.0


@on_both
def test_clip_factor_scales_to_the_limit_and_never_up() -> None:
    def factor(norm: float, most: float) -> float:
        return float(clip_factor(norm if devices.current() == "cpu" else place(norm), most))

    assert factor(0.0, 1.0) == 1.0
    assert factor(0.5, 1.0) == 1.0
    assert factor(4.0, 1.0) == 1.0 / (4.0 + 1e-6)
    assert factor(4.0, 8.0) == 1.0
    assert factor(1e9, 0.0) == 1.0  # 0: no clipping


# --- schedules --------------------------------------------------------------------------------------------------------

SCHEDULES = ("constant", "linear", "cosine", "wsd")


def rates(schedule: str, total: int, warmup: int, ratio: float, peak: float = 1.0) -> list[float]:
    return [
        learning_rate(n, peak=peak, schedule=schedule, warmup_steps=warmup, total_steps=total, min_lr_ratio=ratio)
        for n in range(1, total + 1)
    ]


@pytest.mark.parametrize("schedule", SCHEDULES)
@given(total=st.integers(1, 60), warmup=st.integers(0, 60), ratio=st.floats(0, 1), peak=st.floats(1e-6, 10))
def test_rate_rises_to_the_peak_then_never_rises_and_stays_in_bounds(
    schedule: str, total: int, warmup: int, ratio: float, peak: float
) -> None:
    found = rates(schedule, total, warmup, ratio, peak)
    rise, rest = found[:warmup], found[warmup:]
    assert rise == [peak * n / warmup for n in range(1, len(rise) + 1)]
    assert all(a >= b for a, b in pairwise(rest))
    slack = 1 + 1e-12  # a few roundings
    assert all(ratio * peak <= rate * slack and rate <= peak * slack for rate in rest)
    if schedule == "constant":
        assert rest == [peak] * len(rest)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "wsd"])
@pytest.mark.parametrize(("total", "warmup"), [(100, 10), (100, 0), (10, 2), (5, 0)])
def test_minimal_rate_is_reached_one_update_after_the_last(schedule: str, total: int, warmup: int) -> None:
    settings = {"peak": 1.0, "schedule": schedule, "warmup_steps": warmup, "total_steps": total, "min_lr_ratio": 0.1}
    assert learning_rate(total, **settings) > 0.1
    assert learning_rate(total + 1, **settings) == pytest.approx(0.1, rel=1e-12)


@pytest.mark.parametrize(("total", "warmup"), [(100, 10), (7, 3)])
def test_linear_schedule_is_that_of_hugging_face_after_warm_up(total: int, warmup: int) -> None:
    # get_linear_schedule_with_warmup: (total - s) / (total - warmup) at the update of index s = n - 1.
    expected = [(total - (n - 1)) / (total - warmup) for n in range(warmup + 1, total + 1)]
    assert rates("linear", total, warmup, 0.0)[warmup:] == pytest.approx(expected, rel=1e-12)


def test_rates_at_key_points_of_the_linear_and_cosine_schedules() -> None:
    # Half-way down both are at the middle between peak and minimum, a quarter of the way cosine is at (1 + cos 45°) / 2.
    # The way down is total - warmup = 80 updates; one update more or less is within the tolerance of its steepest slope.
    linear, cosine = rates("linear", 100, 20, 0.1), rates("cosine", 100, 20, 0.1)
    assert linear[19] == cosine[19] == 1.0
    assert linear[59] == pytest.approx(0.55, abs=0.9 / 80)
    assert cosine[59] == pytest.approx(0.55, abs=0.9 / 80 * math.pi / 2)
    assert cosine[39] == pytest.approx(0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2, abs=0.9 / 80 * math.pi / 2)


def test_wsd_stays_at_the_peak_for_four_fifths_and_falls_linearly_over_the_last_fifth() -> None:
    found = rates("wsd", 100, 10, 0.0)
    assert found[9:80] == [1.0] * 71
    assert found[81] < 1.0
    steps = np.diff(found[81:])
    np.testing.assert_allclose(steps, -1 / 20, rtol=1e-9)


def test_wsd_of_a_long_warmup_falls_only_after_it() -> None:
    found = rates("wsd", 100, 90, 0.0)
    assert found[89] == 1.0
    assert found[-1] < 0.2
