"""Drawing a token: each setting keeps the tokens it says, in proportion; a choice is a function of its arguments."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from oxidizr_ref.errors import TrainingError, UsageError
from oxidizr_ref.sampling import Sampling, candidates, choose, log_probability

NONE = np.empty(0, dtype=np.int64)
LOGITS = np.array([1.0, 3.0, 2.0, 3.0, -1.0, 0.0])
GRID = (np.arange(4000) + 0.5) / 4000  # draws, evenly: shares come out to 1/4000

logits_lists = st.lists(st.integers(-8, 8), min_size=1, max_size=12).map(lambda v: np.array(v, dtype=np.float64) / 2)


def shares(logits: NDArray[np.float64], sampling: Sampling, seen: NDArray[np.int64] = NONE) -> NDArray[np.float64]:
    drawn = np.array([choose(logits, seen, sampling, float(draw)) for draw in GRID])
    return np.bincount(drawn, minlength=logits.size) / GRID.size


def softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    weights = np.exp(logits - logits.max())
    result: NDArray[np.float64] = weights / weights.sum()
    return result


def plain(**changes: float) -> Sampling:
    return Sampling(**{"temperature": 1.0, "top_k": 0, **changes})  # type: ignore[arg-type]


def test_without_settings_tokens_come_with_the_model_s_own_probabilities() -> None:
    np.testing.assert_allclose(shares(LOGITS, plain()), softmax(LOGITS), atol=1 / 4000)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature_divides_the_logits(temperature: float) -> None:
    np.testing.assert_allclose(shares(LOGITS, plain(temperature=temperature)), softmax(LOGITS / temperature), atol=1 / 4000)


def test_temperature_zero_takes_the_likeliest_and_of_equals_the_first() -> None:
    assert {choose(LOGITS, NONE, plain(temperature=0), float(draw)) for draw in GRID[::400]} == {1}


def kept(sampling: Sampling, tokens: list[int], logits: NDArray[np.float64] = LOGITS) -> None:
    """Only these are drawn, in proportion."""
    expected = np.zeros(logits.size)
    expected[tokens] = softmax(logits)[tokens]
    np.testing.assert_allclose(shares(logits, sampling), expected / expected.sum(), atol=1.5 / 4000)


@pytest.mark.parametrize("k", [1, 2, 3, 4, 6, 99])
def test_top_k_keeps_the_k_likeliest_and_of_equals_the_first(k: int) -> None:
    kept(plain(top_k=k), [1, 3, 2, 0, 5, 4][:k])


def test_top_p_keeps_the_fewest_likeliest_that_reach_the_probability() -> None:
    p = np.sort(softmax(LOGITS))[::-1].cumsum()
    for size, tokens in [(1, [1]), (2, [1, 3]), (3, [1, 3, 2])]:
        kept(plain(top_p=float(p[size - 1]) - 1e-9), tokens)
        kept(plain(top_p=float(p[size - 1]) + 1e-9), [1, 3, 2, 0][: size + 1])


def test_min_p_keeps_what_has_that_part_of_the_best_probability() -> None:
    kept(plain(min_p=float(np.exp(-1.0)) - 1e-9), [1, 3, 2])
    kept(plain(min_p=float(np.exp(-1.0)) + 1e-9), [1, 3])
    kept(plain(min_p=1.0), [1, 3])
    assert candidates(LOGITS, NONE, plain(min_p=1.0))[0].tolist() == [1, 3]


def test_top_p_and_min_p_look_at_what_top_k_left_over() -> None:
    kept(plain(top_k=2, top_p=0.5), [1])
    kept(plain(top_k=3, min_p=0.9), [1, 3])


def test_a_repetition_penalty_makes_what_occurred_less_likely_whatever_its_sign() -> None:
    seen = np.array([1, 4, 1])
    penalized = LOGITS.copy()
    penalized[1], penalized[4] = 1.5, -2.0
    np.testing.assert_allclose(shares(LOGITS, plain(repetition_penalty=2.0), seen), softmax(penalized), atol=1 / 4000)
    assert LOGITS[1] == 3.0  # not changed in place


@settings(max_examples=200)
@given(logits_lists, st.integers(0, 14), st.floats(0.01, 1), st.floats(0, 1), st.floats(0, 1, exclude_max=True))
def test_any_settings_choose_a_token_and_always_the_same(
    logits: NDArray[np.float64], top_k: int, top_p: float, min_p: float, draw: float
) -> None:
    sampling = Sampling(temperature=0.7, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=1.3)
    seen = np.arange(logits.size)[::2]
    first = choose(logits, seen, sampling, draw)
    assert 0 <= first < logits.size and choose(logits, seen, sampling, draw) == first


def test_extreme_logits_overflow_nothing() -> None:
    huge = np.array([1e300, -1e300, 0.0])
    assert choose(huge, NONE, plain(temperature=1e-3), 0.999) == 0
    assert choose(LOGITS, NONE, plain(temperature=5e-324), 0.999) == 3
    assert log_probability(huge, 0) == 0.0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_told(bad: float) -> None:
    with pytest.raises(TrainingError, match="not finite"):
        choose(np.array([0.0, bad]), NONE, plain(), 0.5)


@given(logits_lists)
def test_log_probabilities_are_those_of_the_softmax(logits: NDArray[np.float64]) -> None:
    found = np.array([log_probability(logits, token) for token in range(logits.size)])
    np.testing.assert_allclose(np.exp(found), softmax(logits), rtol=1e-12)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("min_p", -1.0),
        ("repetition_penalty", 0.0),
        ("max_tokens", -1),
        ("seed", -1),
    ],
)
def test_settings_out_of_range_are_refused_naming_the_flag(name: str, value: float) -> None:
    with pytest.raises(UsageError, match=f"--{name.replace('_', '-')} "):
        Sampling(**{name: value})  # type: ignore[arg-type]
