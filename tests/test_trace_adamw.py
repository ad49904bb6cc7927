"""Budgets of parameters after AdamW: a step may go either way where a gradient is no larger than its rounding error, and
only there. What is computed by a trace here is AdamW alone: gradients are given, and so are their errors."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import architectures
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from oxidizr_ref.config import Config, TrainerConfig, canonical_json
from oxidizr_ref.optim import AdamW
from oxidizr_ref.trace import Trace, TraceWriter, budget, compare
from oxidizr_ref.trace.budget import MARGIN, Budget, budgets, distances, largest_step
from oxidizr_ref.trace.file import Record, role_of
from oxidizr_ref.trace.measure import Distance
from oxidizr_ref.trace.precision import Probe

HostArray = np.ndarray[Any, Any]

WEIGHT, RATE, SIZE, NEAR = "lm_head.weight", 1e-2, 64, 5
NOISE = 1e-7  # the largest error of a gradient in a probe


def steps(gradients: Sequence[HostArray], dtype: str = "f4", betas: tuple[float, float] = (0.9, 0.999)) -> dict[str, Any]:
    """What AdamW makes of a weight of ones, a step for each of these gradients, by the names of a trace."""
    weight = np.ones(gradients[0].shape, dtype)
    optimizer = AdamW({WEIGHT: weight}, RATE, betas, weight_decay=0.1)
    found: dict[str, Any] = {}
    for n, gradient in enumerate(gradients, 1):
        optimizer.step({WEIGHT: gradient.astype(dtype)})
        slots = {f"optimizer.{key}": array for key, array in optimizer.state_dict().items()}
        named = {"learning_rate": np.array(RATE), f"{WEIGHT}.grad.clipped": gradient, **slots, f"{WEIGHT}.after": weight}
        found |= {f"step.{n}.{name}" if n > 1 else name: array.copy() for name, array in named.items()}
    return found


class Judge(NamedTuple):
    """A reference, and what it grants; how far the probes were from it."""

    trace: Trace
    granted: dict[str, Budget]
    probes: list[dict[str, Distance]]

    def accuses(self, other: dict[str, Any]) -> list[str]:
        found = compare(self.trace, other, granted=self.granted, precision="f32")
        return [one.name for one in found.origins]


def judge(
    directory: Path, arrays: dict[str, Any], of_probes: Sequence[dict[str, Any]], betas: tuple[float, float] = (0.9, 0.999)
) -> Judge:
    """The reference holds ``arrays``; its probes come out with those of ``of_probes`` in turn."""
    trainer = TrainerConfig(learning_rate=RATE, betas=betas, batch_size=1, max_steps=1)
    config = canonical_json(Config(model=architectures.lively_model("llama").config, trainer=trainer).canonical())
    metadata = {"config": config, "side": "reference", "steps": "1", "total_steps": "1"}
    with TraceWriter(directory / "reference.safetensors", "f64", metadata) as writer:
        for name, array in arrays.items():
            writer.add(name, array)
    trace, turn = Trace(directory / "reference.safetensors"), cycle(of_probes)

    def repeat(_source: Any, sink: Any, _probe: Probe) -> None:
        for name, array in next(turn).items():
            sink.add(Record(name, role_of(name), array.shape), array)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(budget, "repeat", repeat)
        return Judge(trace, budgets(trace, "f32"), distances(trace, [Probe("f32")] * len(of_probes)))


def clear_gradients() -> HostArray:
    """Of either sign, between 1/2 and 1."""
    drawn = np.random.default_rng(0)
    return drawn.uniform(0.5, 1, SIZE) * drawn.choice([-1.0, 1.0], SIZE)


def shaken(gradients: Sequence[HostArray]) -> Iterator[list[HostArray]]:
    """The gradients as three probes find them: off by up to `NOISE`, but not where there is none."""
    for seed in range(3):
        drawn = np.random.default_rng(seed)
        yield [g + (g != 0) * drawn.uniform(-NOISE, NOISE, SIZE) for g in gradients]


def judge_of(directory: Path, *gradients: HostArray) -> Judge:
    return judge(directory, steps(gradients, "f8"), [steps(probe) for probe in shaken(gradients)])


def replaced(gradient: HostArray, number: float) -> HostArray:
    """With another one at place `NEAR`."""
    gradient = gradient.copy()
    gradient[NEAR] = number
    return gradient


# --- what is granted --------------------------------------------------------------------------------------------------


def test_where_a_gradient_is_within_rounding_of_zero_the_step_may_go_the_other_way(tmp_path: Path) -> None:
    """Each probe went the reference's way, as it happens: 16 times what they are off is 300 times less than a step."""
    near = replaced(clear_gradients(), 4 * NOISE)
    found = judge_of(tmp_path, near)
    other = steps([replaced(near, -NOISE)])
    name = f"{WEIGHT}.after"
    assert other[name][NEAR] - found.trace.array(name)[NEAR] == pytest.approx(2 * RATE, rel=0.2)
    assert max(of_probe[name].max_abs for of_probe in found.probes) * MARGIN < RATE / 10
    assert found.accuses(other) == []
    assert found.granted[name].largest < 2.5 * RATE


def test_where_every_gradient_is_clear_a_hundredth_of_a_step_is_too_much(tmp_path: Path) -> None:
    clear = clear_gradients()
    found = judge_of(tmp_path, clear)
    assert found.accuses(steps([clear])) == []
    for wrong in (2 * RATE, -2 * RATE, RATE / 100):
        other = steps([clear])
        other[f"{WEIGHT}.after"][NEAR] += wrong
        assert found.accuses(other) == [f"{WEIGHT}.after"]


def test_where_there_is_no_gradient_nothing_more_is_granted(tmp_path: Path) -> None:
    """Such as the rows of tokens that did not come: probes find no error there, so nothing can be led astray by it."""
    none = replaced(clear_gradients(), 0.0)
    found = judge_of(tmp_path, none)
    other = steps([none])
    assert found.accuses(other) == []
    other[f"{WEIGHT}.after"][NEAR] -= RATE / 100
    assert found.accuses(other) == [f"{WEIGHT}.after"]


def test_all_steps_a_little_wrong_are_found_though_one_of_them_may_go_either_way(tmp_path: Path) -> None:
    near = replaced(clear_gradients(), 4 * NOISE)
    found = judge_of(tmp_path, near)
    other = steps([near])
    other[f"{WEIGHT}.after"] += (0.001 * RATE * np.sign(near)).astype(np.float32)  # each a thousandth too short
    assert found.accuses(other) == [f"{WEIGHT}.after"]


def test_what_a_step_was_off_the_next_one_still_is(tmp_path: Path) -> None:
    """The second gradient is clear, so nothing is granted for the second step itself."""
    near, clear = replaced(clear_gradients(), 4 * NOISE), clear_gradients()
    found = judge_of(tmp_path, near, clear)
    other = steps([replaced(near, -NOISE), clear])
    name = f"step.2.{WEIGHT}.after"
    assert other[name][NEAR] - found.trace.array(name)[NEAR] > 1.5 * RATE
    assert found.accuses(other) == []
    once = found.granted[f"{WEIGHT}.after"].largest
    assert found.granted[name].largest < 1.01 * once + 1e-5
    other[name][NEAR] += 2 * RATE
    assert found.accuses(other) == [name]


def test_a_trace_without_moments_has_budgets_all_the_same(tmp_path: Path) -> None:
    clear = clear_gradients()
    name = f"{WEIGHT}.after"
    for kept in ([name], [name, f"optimizer.exp_avg.{WEIGHT}"], [n for n in steps([clear]) if n != "learning_rate"]):
        arrays = {n: array for n, array in steps([clear], "f8").items() if n in kept}
        found = judge(tmp_path, arrays, [steps(probe) for probe in shaken([clear])])
        assert set(found.granted) == set(kept) and found.probes[0][name].reach == 0
        assert found.accuses({n: array for n, array in steps([clear]).items() if n in kept}) == []


# --- what it rests on -------------------------------------------------------------------------------------------------

BETAS = st.sampled_from([(0.9, 0.999), (0.9, 0.95), (0.0, 0.5), (0.5, 0.0), (0.99, 0.9), (0.0, 0.0)])
_GRADIENTS = st.sampled_from([0.0, 1e-12, 1e-9, 1e-8, 1e-7, 1.0, 1e6]) | st.floats(1e-12, 10)


@given(
    st.lists(st.lists(st.tuples(_GRADIENTS, _GRADIENTS, st.booleans()), min_size=2, max_size=2), min_size=1, max_size=4),
    BETAS,
)
@example([[(1.0, 1.0, False)] * 2, [(0.1, 1e-8, False)] * 2], (0.5, 0.0))  # where u' is millions
def test_no_two_histories_of_gradients_lead_further_apart_than_their_moments_say(
    history: list[list[tuple[float, float, bool]]], betas: tuple[float, float]
) -> None:
    """Of errors however large: a probe's own distance is within its reach, if the margin is 1."""
    ours = steps([np.array([a for a, _, _ in step]) for step in history], "f8", betas)
    theirs = steps([np.array([-b if turned else b for _, b, turned in step]) for step in history], "f8", betas)
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as directory:
        patch.setattr(budget, "margin_of", lambda _size: 1.0)
        (found,) = judge(Path(directory), ours, [theirs], betas).probes
    most = 0.0
    for n in range(1, len(history) + 1):
        after = found[f"step.{n}.{WEIGHT}.after" if n > 1 else f"{WEIGHT}.after"]
        most += 2 * RATE * largest_step(n, betas)
        assert after.max_abs <= after.reach * (1 + 1e-9) + 1e-13
        assert after.reach <= most * (1 + 1e-9)


@pytest.mark.parametrize("n", [1, 2, 3, 10, 100])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.9, 0.95), (0.5, 0.3), (0.0, 0.9)])
def test_the_largest_step_is_made_by_some_gradients(n: int, betas: tuple[float, float]) -> None:
    """``g_k = a_k / b_k``, where Cauchy and Schwarz's inequality is an equation."""
    gradients = [((1 - betas[0]) * betas[0] ** k) / ((1 - betas[1]) * betas[1] ** k) for k in reversed(range(n))]
    weight = np.zeros(1)
    optimizer = AdamW({WEIGHT: weight}, 1.0, betas, eps=1e-300, weight_decay=0.0)
    for gradient in gradients:
        before = weight.copy()
        optimizer.step({WEIGHT: np.array([gradient])})
    assert before[0] - weight[0] == pytest.approx(largest_step(n, betas), rel=1e-9)


def test_the_largest_step_of_adam_s_betas_is_that_of_its_paper_at_most() -> None:
    """Kingma & Ba 2015, section 2.1: (1 - β₁) / √(1 - β₂) of a lone gradient after many of zero; here of any gradients."""
    assert largest_step(1, (0.9, 0.999)) == pytest.approx(1.0)
    assert largest_step(2, (0.9, 0.999)) == pytest.approx(1.0014, abs=1e-4)
    assert largest_step(10_000, (0.9, 0.999)) == pytest.approx(math.sqrt(10 / (1 - 0.81 / 0.999)), rel=1e-3)
    assert largest_step(10_000, (0.9, 0.999)) > 0.1 / math.sqrt(0.001)
    assert math.isfinite(largest_step(1000, (0.9, 0.0)))
