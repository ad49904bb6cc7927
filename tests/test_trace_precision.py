"""Other precisions, imitated, and the budgets measured with them: rounding is exact, and right programs are inside."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import architectures
import numpy as np
import pytest
import random_models
from hypothesis import example, given, settings
from hypothesis import strategies as st

from oxidizr_ref import ops
from oxidizr_ref.autograd import Tensor
from oxidizr_ref.backend import STORAGE_DTYPES, compute_dtype
from oxidizr_ref.config import Config, TrainerConfig
from oxidizr_ref.errors import TraceError
from oxidizr_ref.trace import Trace, TraceWriter, budget, compare, record, report
from oxidizr_ref.trace.budget import LEAST, Budget, budgets, distances, margin_of
from oxidizr_ref.trace.measure import Distance
from oxidizr_ref.trace.precision import EPS, PRECISIONS, Arithmetic, Rounded, Shaken, TensorFloat32, probes
from oxidizr_ref.watch import Watcher, watched

HostArray = np.ndarray[Any, Any]

# --- rounding ---------------------------------------------------------------------------------------------------------


def nearest(x: float, digits: int, lowest: int, highest: int) -> float:
    """``x`` to ``digits`` bits behind the leading one, ties to even, in exact arithmetic.

    lowest, highest: exponents of the smallest and the largest normal number.
    """
    if math.isnan(x) or math.isinf(x) or x == 0:
        return x
    exact = abs(Fraction(x))
    exponent = max(math.frexp(x)[1] - 1, lowest)
    step = Fraction(2) ** (exponent - digits)
    rounded = round(exact / step) * step  # Python rounds fractions to nearest, ties to even
    limit = Fraction(2) ** (highest + 1)
    return math.copysign(math.inf if rounded >= limit else float(rounded), x)


def of_bits(bits: int) -> float:
    """The float32 of these bits. (Those of a NaN may change on the way to a Python number, which is a NaN anyway.)"""
    return float(np.uint32(bits).view(np.float32))


def cut_at(position: int) -> st.SearchStrategy[int]:
    """Bits of float32 numbers, many of them ties or next to ties if all below ``position`` is cut."""
    low = (1 << position) - 1
    half = 1 << (position - 1)
    ends = st.sampled_from([0, 1, half - 1, half, half + 1, low])
    whole = st.integers(0, (1 << 32) - 1)
    tie = st.builds(lambda bits, end: (bits & ~low) | end, whole, ends)
    special = st.builds(
        lambda sign, exponent, fraction: sign << 31 | exponent << 23 | fraction,
        st.integers(0, 1),
        st.sampled_from([0, 1, 254, 255]),
        st.integers(0, (1 << 23) - 1) | st.sampled_from([0, (1 << 23) - 1, half]),
    )
    return whole | tie | special


def equal(a: float, b: float) -> bool:
    """The same number of the same sign; any NaN is a NaN."""
    return (math.isnan(a) and math.isnan(b)) or (a == b and math.copysign(1, a) == math.copysign(1, b))


@given(st.lists(cut_at(13), min_size=1, max_size=20))
@example([0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0xFF800001, 0x7F800000, 0xFF800000])  # NaNs, whose bits must not run over
@example([0x7F7FFFFF, 0x00000001, 0x80000001, 0x00000FFF, 0x00001000, 0x00001001, 0x00003000, 0x80001000])
@settings(max_examples=200)
def test_tf32_keeps_ten_bits_rounded_to_nearest_and_ties_to_even(bits: list[int]) -> None:
    x = np.array(bits, np.uint32).view(np.float32)
    kept = x.copy()
    found = TensorFloat32._round(x)
    assert found.dtype == x.dtype and found.shape == x.shape and np.array_equal(x, kept, equal_nan=True)
    for before, after in zip(bits, found.tolist(), strict=True):
        assert equal(after, nearest(of_bits(before), 10, -126, 127)), hex(before)


@pytest.mark.parametrize(("dtype", "digits", "lowest", "highest"), [("bf16", 7, -126, 127), ("f16", 10, -14, 15)])
@given(data=st.data())
def test_results_and_gradients_are_rounded_as_the_dtype_rounds(
    dtype: str, digits: int, lowest: int, highest: int, data: st.DataObject
) -> None:
    bits = data.draw(st.lists(cut_at(16 if dtype == "bf16" else 13), min_size=1, max_size=20))
    x = np.array(bits, np.uint32).view(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows is meant to
        arithmetic = Rounded(dtype)
        for found in (arithmetic.result(ops.Mul(), x), arithmetic.gradient(ops.Reshape(), x)):
            assert found.dtype == x.dtype
            for before, after in zip(bits, found.tolist(), strict=True):
                assert equal(after, nearest(of_bits(before), digits, lowest, highest)), hex(before)


# --- what passes between ops ------------------------------------------------------------------------------------------


class Through(Watcher):
    """Lets everything through some arithmetic."""

    def __init__(self, arithmetic: Arithmetic) -> None:
        self.arithmetic = arithmetic

    def operands(self, node: Any, arrays: list[Any]) -> list[Any]:
        return self.arithmetic.operands(node, arrays)

    def result(self, node: Any, y: Any) -> Any:
        return self.arithmetic.result(node, y)

    def gradient(self, node: Any, dy: Any) -> Any:
        return self.arithmetic.gradient(node, dy)


def computed(op: Callable[[Tensor], Tensor], arithmetic: Arithmetic, dtype: str = "f32") -> tuple[HostArray, HostArray]:
    """The result of an op, and the gradient of its operand where that of the result is 1, 2, 3, …."""
    x = Tensor(np.random.default_rng(0).standard_normal((4, 4)).astype(STORAGE_DTYPES[dtype]), requires_grad=True)
    with watched(Through(arithmetic)):
        y = op(x)
        y.backward(1 + np.arange(y.data.size, dtype=compute_dtype(y.dtype)).reshape(y.shape))
    assert x.grad is not None
    return np.asarray(y.data), x.grad


_IDS = np.array([[1, 0], [3, 3], [2, 1], [0, 0]])
MOVING: dict[str, Callable[[Tensor], Tensor]] = {
    "reshape": lambda x: x.reshape(2, 8),
    "transpose": lambda x: ops.transpose(x, order=(1, 0)),
    "broadcast": lambda x: ops.broadcast_to(x, shape=(1, 4, 4)),
    "index": lambda x: x[1:3, ::2],
    "pad": lambda x: ops.pad(x, widths=((1, 0), (0, 2))),
    "concatenate": lambda x: ops.concatenate(x, x.reshape(4, 4), axis=1),
    "split": lambda x: ops.split(x, [1, 3])[1],
}
LOOKING: dict[str, Callable[[Tensor], Tensor]] = {
    "lookup": lambda x: ops.lookup(x, ids=_IDS),
    "take_along": lambda x: ops.take_along(x, ids=_IDS),
    "where": lambda x: ops.where(x, x.reshape(4, 4), condition=np.eye(4, dtype=bool)),
    "max": lambda x: ops.amax(x, axis=1),
}
COMPUTING: dict[str, Callable[[Tensor], Tensor]] = {
    "add": lambda x: x + 1.0,
    "multiply": lambda x: x * 3.0,
    "divide": lambda x: x / 3.0,
    "exp": lambda x: ops.exp(x),
    "softmax": lambda x: ops.softmax(x, axis=-1),
    "tanh": lambda x: ops.tanh(x),
}
SUMMING: dict[str, Callable[[Tensor], Tensor]] = {
    "matmul": lambda x: x @ ops.transpose(x, order=(1, 0)),
    "sum": lambda x: x.sum(axis=0),
    "cumsum": lambda x: ops.cumsum(x, axis=1),
}
_SHAKEN = [Shaken(2.0**-8, 1), Rounded("bf16"), TensorFloat32()]


@pytest.mark.parametrize("name", [*MOVING, *LOOKING])
@pytest.mark.parametrize("arithmetic", _SHAKEN, ids=lambda a: type(a).__name__)
def test_ops_that_compute_no_number_are_left_alone(name: str, arithmetic: Arithmetic) -> None:
    """Their results hold numbers of their operands; gradients of those that only move numbers are moved as they are."""
    op = (MOVING | LOOKING)[name]
    result, gradient = computed(op, arithmetic)
    plain, plain_gradient = computed(op, Arithmetic())
    assert np.array_equal(result, plain)
    if name in MOVING:
        assert np.array_equal(gradient, plain_gradient)


@pytest.mark.parametrize("name", [*COMPUTING, *SUMMING])
@pytest.mark.parametrize("dtype", ["f32", "f64"])
def test_every_other_result_and_gradient_is_shaken(name: str, dtype: str) -> None:
    result, gradient = computed((COMPUTING | SUMMING)[name], Shaken(2.0**-8, 1), dtype)
    plain, plain_gradient = computed((COMPUTING | SUMMING)[name], Arithmetic(), dtype)
    for shaken, still in ((result, plain), (gradient, plain_gradient)):
        assert shaken.dtype == still.dtype and (shaken != still).mean() > 0.9
        assert np.abs(shaken - still).max() <= 0.2 * np.abs(still).max()


@pytest.mark.parametrize("op", [ops.MatMul, ops.Sum, ops.CumSum, ops.Add, ops.Mul, ops.Exp, ops.Softmax, ops.Reshape])
def test_terms_are_shaken_before_they_are_added_up(op: type) -> None:
    """What another order of adding rounds away is of that size. Operands of other ops are shaken as results already."""
    arrays = [np.ones((2, 3)), np.ones((3, 2))]
    read = Shaken(2.0**-8, 1).operands(op(), arrays)
    if op in (ops.MatMul, ops.Sum, ops.CumSum):
        assert all((shaken != 1).any() for shaken in read) and all((array == 1).all() for array in arrays)
    else:
        assert read is arrays


def test_of_tensor_cores_only_the_operands_of_products_are_rounded_in_both_directions() -> None:
    for name, op in {**COMPUTING, "sum": SUMMING["sum"], "cumsum": SUMMING["cumsum"]}.items():
        for rounded, plain in zip(computed(op, TensorFloat32()), computed(op, Arithmetic()), strict=True):
            assert np.array_equal(rounded, plain), name
    a, b, dy = (np.random.default_rng(seed).standard_normal((4, 4)).astype(np.float32) for seed in (1, 2, 3))
    x, y = Tensor(a, requires_grad=True), Tensor(b, requires_grad=True)
    with watched(Through(TensorFloat32())):
        z = x @ y
        z.backward(dy)
    ten = TensorFloat32._round
    assert np.array_equal(z.data, ten(a) @ ten(b)) and not np.array_equal(z.data, a @ b)
    assert x.grad is not None and np.array_equal(x.grad, ten(dy) @ ten(b).T)
    assert y.grad is not None and np.array_equal(y.grad, ten(a).T @ ten(dy))


# --- shaking ----------------------------------------------------------------------------------------------------------


@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=30),
    st.sampled_from([2.0**-8, 2.0**-11, 2.0**-23]),
    st.integers(0, 5),
)
def test_no_number_moves_further_than_its_share_but_for_rounding(numbers: list[float], size: float, seed: int) -> None:
    x = np.array(numbers, np.float32)
    y = Shaken(size, seed).result(ops.Mul(), x)
    exact = x.astype(np.float64)
    with np.errstate(over="ignore"):
        rounding = np.spacing(np.maximum(np.abs(x), np.abs(y))).astype(np.float64) / 2
    finite = np.isfinite(y)  # the largest numbers of all may be shaken to infinity
    assert (np.abs(y.astype(np.float64) - exact) <= size * np.abs(exact) + rounding)[finite].all()
    assert (np.abs(exact[~finite]) > 3.3e38).all()
    assert np.array_equal(y[x == 0], x[x == 0])


def test_float64_is_shaken_in_its_last_place() -> None:
    x = np.random.default_rng(0).standard_normal(10_000)
    y = Shaken(2.0**-52, 1).result(ops.Mul(), x)
    steps = np.abs(y - x) / np.spacing(np.abs(x))  # exact
    assert set(np.unique(steps)) <= {0.0, 0.5, 1.0, 1.5, 2.0} and steps.max() >= 1
    assert 0.5 < (y != x).mean() < 0.95 and abs(((y - x) / x).mean()) < 2.0**-52 / 10


def test_moves_are_spread_evenly_on_both_sides() -> None:
    moved = Shaken(0.125, 3).result(ops.Mul(), np.ones(100_000)) - 1
    counts, _ = np.histogram(moved, bins=10, range=(-0.125, 0.125))
    assert counts.sum() == 100_000 and counts.min() > 9_500 and counts.max() < 10_500


def test_shaking_can_be_repeated_by_its_seed_and_goes_on_otherwise_every_time() -> None:
    x = np.ones((3, 5), np.float32)
    first, second = Shaken(0.01, 7), Shaken(0.01, 7)
    drawn = [first.result(ops.Mul(), x) for _ in range(3)]
    assert all(np.array_equal(one, second.result(ops.Mul(), x)) for one in drawn)
    assert not np.array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[0], Shaken(0.01, 8).result(ops.Mul(), x))


@pytest.mark.parametrize("shape", [(), (0, 3), (1,)])
def test_any_shape_is_shaken_into_the_same_shape_and_integers_are_not(shape: tuple[int, ...]) -> None:
    x = np.ones(shape, np.float32)
    shaken = Shaken(0.01, 1)
    assert np.shape(shaken.result(ops.Mul(), x)) == shape and np.array_equal(x, np.ones(shape))
    ids = np.ones(shape, np.int64)
    assert shaken.operands(ops.Sum(), [ids])[0] is ids


# --- probes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_precision_has_several_probes_that_are_fresh_at_every_call(precision: str) -> None:
    for fused in (True, False):
        first, second = probes(precision, fused), probes(precision, fused)
        assert len(first) >= 2
        stored = {"tf32": "f32"}.get(precision, precision)
        assert all(probe.dtype == stored for probe in first)
        assert fused or not any(probe.fused for probe in first)
        for a, b in zip(first, second, strict=True):
            assert a.arithmetic is None or a.arithmetic is not b.arithmetic
    assert set(EPS) == set(PRECISIONS)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    """A step of a small Llama in float64."""
    path = tmp_path_factory.mktemp("reference") / "reference.safetensors"
    model = architectures.lively_model("llama")
    trainer = TrainerConfig(learning_rate=1e-3, batch_size=3, max_steps=2)
    record(Config(model=model.config, trainer=trainer), path, 1, [architectures.batch()], model.state_dict())
    return Trace(path)


Found = dict[str, Distance]


@pytest.fixture(scope="module")
def measured(reference: Trace) -> dict[str, list[Found]]:
    """How far every probe of every precision is from the reference, by name."""
    return {precision: distances(reference, probes(precision)) for precision in PRECISIONS}


def made_of(of_probes: list[Found], reference: Trace, precision: str) -> dict[str, Budget]:
    """The budgets, if these are the distances of the probes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(budget, "distances", lambda _reference, _probes: of_probes)
        return budgets(reference, precision)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_probe_is_within_the_budget_that_the_others_make(
    reference: Trace, measured: dict[str, list[Found]], precision: str
) -> None:
    """Fused, plain and shaken are right programs: the budget made of all but one has to allow that one."""
    for i, left_out in enumerate(measured[precision]):
        granted = made_of([found for j, found in enumerate(measured[precision]) if j != i], reference, precision)
        used = {name: granted[name].used(far) for name, far in left_out.items() if name in granted}
        assert max(used.values()) <= 1, (i, max(used, key=used.__getitem__))
        assert len(used) > 100 and sum(value > 0 for value in used.values()) > 50


def test_the_same_probes_make_the_same_budgets(reference: Trace, measured: dict[str, list[Found]]) -> None:
    assert budgets(reference, "f32") == budgets(reference, "f32") == made_of(measured["f32"], reference, "f32")


def test_budgets_grow_with_the_unit_in_the_last_place(reference: Trace, measured: dict[str, list[Found]]) -> None:
    """Of the logits: by 2²⁹ from float64 to float32, 2¹³ to tf32, 2³ to bf16, give or take a factor of 10."""
    granted = {precision: made_of(measured[precision], reference, precision) for precision in PRECISIONS}
    for name in ("logits", "layers.1.output", "lm_head.weight.grad"):
        largest = {precision: granted[precision][name].largest for precision in PRECISIONS}
        assert largest["f64"] < largest["f32"] < largest["tf32"] < largest["bf16"], name
    scale = float(np.abs(reference.array("logits")).max())
    for precision, of_precision in granted.items():
        units = of_precision["logits"].largest / (EPS[precision] * scale)
        assert 4 < units < 400, (precision, units)
        assert of_precision["logits"].median <= of_precision["logits"].largest


# --- budgets ----------------------------------------------------------------------------------------------------------


def far(max_abs: float, median: float = 0.0, nans: int = 0) -> Distance:
    return Distance(max_abs=max_abs, median=median, nans=nans)


@pytest.mark.parametrize(
    ("budget", "found", "used"),
    [
        (Budget(2.0, 1.0), far(1.0), 0.5),
        (Budget(2.0, 1.0), far(2.0), 1.0),
        (Budget(2.0, 1.0), far(1.0, 0.75), 0.75),
        (Budget(2.0, 1.0), far(0.0), 0.0),
        (Budget(2.0, 1.0), far(0.0, nans=1), math.inf),
        (Budget(2.0, math.inf), far(1.0, 1e9), 0.5),
        (Budget(0.0, 0.0), far(0.0), 0.0),
        (Budget(0.0, 0.0), far(1e-300), math.inf),
        (Budget(2.0, 1.0), far(math.inf), math.inf),
    ],
)
def test_a_budget_is_used_up_by_the_largest_error_or_by_the_median(budget: Budget, found: Distance, used: float) -> None:
    assert budget.used(found) == used


def test_a_budget_is_so_many_times_what_the_probes_are_off_and_some_units_in_the_last_place(
    reference: Trace, measured: dict[str, list[Found]]
) -> None:
    granted = made_of(measured["f32"], reference, "f32")
    for name in ("logits", "loss", "layers.0.self_attn.probs", "embed_tokens.weight.grad"):
        of_probes = [of_probe[name] for of_probe in measured["f32"] if name in of_probe]
        scale, usual = of_probes[0].scale, of_probes[0].usual
        assert scale == np.abs(reference.array(name)).max()
        margin = margin_of(reference.array(name).size)
        assert granted[name].largest == margin * max(d.max_abs for d in of_probes) + LEAST * 2.0**-23 * scale
        assert granted[name].median == margin * max(d.median for d in of_probes) + LEAST * 2.0**-23 * usual
    assert set(granted) == set(reference.records)


def test_where_the_truth_is_zero_the_median_is_granted_as_much_as_the_largest(reference: Trace) -> None:
    """Such as the gradient through the softmax of one score: plain it is 0, otherwise a rounding error."""
    granted = made_of([{"x": far(1e-9)}, {"x": far(0.0)}], reference, "f32")
    assert granted == {"x": Budget(margin_of(0) * 1e-9, margin_of(0) * 1e-9)}


def test_where_the_fast_operations_are_judged_they_are_not_among_the_probes(
    reference: Trace, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(budget, "distances", lambda _reference, ways: asked.append(any(way.fused for way in ways)) or [])
    for fused in (True, False):
        assert budgets(reference, "f32", fused=fused) == {}
    assert asked == [True, False]


def test_the_truth_of_a_float32_trace_is_computed_again_and_nothing_of_it_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: Trace, measured: dict[str, list[Found]]
) -> None:
    model = architectures.lively_model("llama", dtype="f32")
    trainer = TrainerConfig(learning_rate=1e-3, batch_size=3, max_steps=2)
    path = tmp_path / "f32.safetensors"
    record(Config(model=model.config, trainer=trainer), path, 1, [architectures.batch()], model.state_dict())
    aside = tmp_path / "aside"
    aside.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(aside))
    granted, of_f64 = budgets(Trace(path), "f32"), made_of(measured["f32"], reference, "f32")
    assert granted.keys() == of_f64.keys() and not any(aside.iterdir())
    ratio = granted["logits"].largest / of_f64["logits"].largest
    assert 0.2 < ratio < 5
    both = budgets(Trace(path), "bf16")["logits"].largest  # the error of the reference is added
    assert both > granted["logits"].largest


def test_steps_cannot_be_done_again_from_a_trace_that_does_not_say_how(tmp_path: Path) -> None:
    path = tmp_path / "theirs.safetensors"
    with TraceWriter(path, "f32") as writer:
        writer.add("logits", np.zeros((1, 2, 3), np.float32))
    with pytest.raises(TraceError, match=r"theirs\.safetensors: does not say config, so its steps cannot be done again"):
        budgets(Trace(path), "f32")


# --- fused against reference ------------------------------------------------------------------------------------------


def in_two_ways(seed: int, precision: str, steps: int, directory: Path) -> None:
    """Model ``seed`` does its steps on the fast operations and on the plain ones; both must be inside the budget that the
    plain side alone makes."""
    drawn = random_models.draw(seed)
    path, other = directory / "reference.safetensors", directory / "other.safetensors"
    record(drawn.config, path, steps, drawn.batches, drawn.weights)
    reference = Trace(path)
    granted = budgets(reference, precision, fused=False)
    for fused in (False, True):
        record(drawn.in_dtype(precision), other, steps, drawn.batches, drawn.weights, fused=fused)
        found = compare(reference, other, granted=granted)
        assert found.agrees, f"model {seed}, {'fused' if fused else 'plain'}:\n{report(found)}"
        assert not found.strange and (fused or not found.missing)
        last = "" if steps == 1 else f"step.{steps}."
        assert {f"{last}{name}" for name in ("loss", "grad_norm", *(f"{name}.after" for name in drawn.weights))} <= set(
            found.tensors
        )


@pytest.mark.thorough
@pytest.mark.parametrize("seed", range(12))
def test_a_float32_step_is_within_the_budget_of_the_plain_side_fused_or_not(seed: int, tmp_path: Path) -> None:
    in_two_ways(seed, "f32", 1, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("precision", ["f64", "f32"])
def test_fused_agrees_with_reference_in_every_tensor_of_a_hundred_models(precision: str, tmp_path: Path) -> None:
    for seed in range(100):
        in_two_ways(seed, precision, random_models.STEPS, tmp_path)
