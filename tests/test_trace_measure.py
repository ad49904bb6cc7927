"""How far two arrays are apart: in whatever pieces they come, the same as a naive computation says of the whole."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from oxidizr_ref.trace.measure import MASKED, MEDIAN_OF, Distance, Measuring, distance, paired

HostArray = np.ndarray[Any, Any]
Pairs = list[tuple[float, float]]

NAN, INF = math.nan, math.inf
F64, F32 = np.dtype(np.float64), np.dtype(np.float32)
DTYPES = {"f64": F64, "f32": F32, "bf16": np.dtype(ml_dtypes.bfloat16), "f16": np.dtype(np.float16)}


# --- the naive computation --------------------------------------------------------------------------------------------


def naive(pairs: Pairs, turns: bool = False, limit: float = INF) -> Distance:
    """From the definitions. Steps of float64 are counted."""
    finite = [(Fraction(a), Fraction(b)) for a, b in pairs if math.isfinite(a) and math.isfinite(b)]
    ab, aa, bb = (sum((pair[i] * pair[j] for pair in finite), Fraction()) for i, j in ((0, 1), (0, 0), (1, 1)))
    cosine = float(ab) / math.sqrt(aa) / math.sqrt(bb) if aa and bb else 1.0 if aa == bb else 0.0
    return replace(naive_but_for_sums(pairs, turns, limit), cosine=cosine, factor=float(ab / aa) if aa else 1.0)


def naive_but_for_sums(pairs: Pairs, turns: bool = False, limit: float = INF) -> Distance:
    """One element after the other; cosine and factor are not computed."""
    apart = [naive_apart(a, b, turns) for a, b in pairs]
    finite = [math.isfinite(a) and math.isfinite(b) for a, b in pairs]
    sizes = [abs(a) if known else 0.0 for (a, _), known in zip(pairs, finite, strict=True)]
    largest, scale = max(apart, default=0.0), max(sizes, default=0.0)
    where = apart.index(largest) if largest else 0
    beyond = [i for i, far in enumerate(apart) if far > limit]
    return Distance(
        max_abs=largest,
        max_rel=largest / scale if scale else INF if largest else 0.0,
        median=naive_median([far for far, size in zip(apart, sizes, strict=True) if size > 0]),
        scale=scale,
        usual=naive_median([size for size in sizes if size > 0]),
        max_ulp=max((abs(ordinal(a) - ordinal(b)) for (a, b), known in zip(pairs, finite, strict=True) if known), default=0),
        nans=sum(not known and not naive_same(a, b) for (a, b), known in zip(pairs, finite, strict=True)),
        where=where,
        values=pairs[where] if largest else (0.0, 0.0),
        beyond=len(beyond),
        first=beyond[0] if beyond else None,
        size=len(pairs),
    )


def naive_same(a: float, b: float) -> bool:
    """Whether two numbers, one of which is not finite, are as good as equal."""
    return a == b or (a == -INF and b <= MASKED)


def naive_apart(a: float, b: float, turns: bool) -> float:
    if not (math.isfinite(a) and math.isfinite(b)):
        return 0.0 if naive_same(a, b) else INF
    apart = abs(a - b)
    return abs(apart - 2 * math.pi * float(round(apart / (2 * math.pi)))) if turns and apart < INF else apart


def naive_median(numbers: list[float]) -> float:
    if not numbers:
        return 0.0
    numbers, middle = sorted(numbers), len(numbers) // 2
    return numbers[middle] if len(numbers) % 2 else (numbers[middle - 1] + numbers[middle]) / 2


def ordinal(x: float) -> int:
    """The place of a float64 among all of them: neighbours one apart, +0 behind -0."""
    (bits,) = struct.unpack("<q", struct.pack("<d", x))
    return int(bits if bits >= 0 else -(bits & ((1 << 63) - 1)) - 1)


def same(found: Distance, expected: Distance) -> bool:
    """Equal, a NaN being equal to a NaN; cosine and factor, which depend on the order of a sum, nearly."""
    nearly = {key: getattr(expected, key) for key in ("cosine", "factor")}
    close = all(
        getattr(found, key) == pytest.approx(value, rel=1e-9, abs=1e-9, nan_ok=True) for key, value in nearly.items()
    )
    return close and repr(replace(found, **nearly)) == repr(expected)


# --- any pieces, any order --------------------------------------------------------------------------------------------

#: Numbers whose squares neither overflow nor vanish, and those that need a word.
_TAME = st.floats(-1e100, 1e100).filter(lambda x: x == 0 or abs(x) > 1e-100)
_ODD = st.sampled_from([NAN, INF, -INF, 0.0, -0.0, -1e4, -1e10, -9999.0, 2 * math.pi, -7.0])


@st.composite
def close_pairs(draw: st.DrawFn) -> tuple[float, float]:
    """A number, and the same a little or much larger."""
    a = draw(_TAME)
    return a, a * (1 + draw(st.sampled_from([2.0**-52, -(2.0**-30), 1e-3, 1.0, 0.0])))


PAIRS: st.SearchStrategy[Pairs] = st.lists(
    st.one_of(close_pairs(), st.tuples(_TAME | _ODD, _TAME | _ODD), st.sampled_from([(1.0, 1.5), (0.0, 0.0), (2.0, 2.5)])),
    max_size=30,
)


@st.composite
def cut_pairs(draw: st.DrawFn) -> tuple[Pairs, list[tuple[int, int]]]:
    """Pairs, and the borders of pieces that make up the whole, in some order; a piece may be empty."""
    pairs = draw(PAIRS)
    inner = draw(st.lists(st.integers(0, len(pairs)), max_size=6))
    pieces = list(pairwise([0, *sorted(inner), len(pairs)]))
    return pairs, draw(st.permutations(pieces))


def columns(pairs: Sequence[tuple[float, float]]) -> tuple[HostArray, HostArray]:
    return np.array([a for a, _ in pairs], F64), np.array([b for _, b in pairs], F64)


@given(cut_pairs(), st.booleans(), st.sampled_from([INF, 0.0, 1e-3, 0.5, 1e50]))
@settings(max_examples=150)
def test_any_pieces_in_any_order_say_of_the_whole_what_a_naive_computation_says(
    cut: tuple[Pairs, list[tuple[int, int]]], turns: bool, limit: float
) -> None:
    pairs, pieces = cut
    a, b = columns(pairs)
    measuring = Measuring(len(pairs), F64, turns, limit)
    for first, last in pieces:
        measuring.update(a[first:last], b[first:last], first)
    expected = naive(pairs, turns, limit)
    assert same(measuring.result(), expected), f"{measuring.result()}\n{expected}"
    assert same(distance(a, b, F64, turns, limit), expected)


@given(
    st.lists(st.tuples(st.floats(), st.floats()), max_size=10),
    st.booleans(),
    st.sampled_from([None, *DTYPES.values()]),
)
@example([(1e300, -1e300), (1e308, -1e308), (-1e308, -1e308)], True, F32)
@example([(INF, 0.0), (0.0, INF), (INF, -INF)], True, F32)
def test_no_numbers_are_too_large_too_small_or_too_strange(pairs: Pairs, turns: bool, ulp: np.dtype[Any] | None) -> None:
    """Nor is there a warning, which here would be an error; squares that overflow leave cosine and factor unknown."""
    found, expected = distance(*columns(pairs), ulp, turns), naive_but_for_sums(pairs, turns)
    for key in ("max_abs", "max_rel", "nans", "where", "scale"):
        assert getattr(found, key) == getattr(expected, key)
    assert repr(found.values) == repr(expected.values)


def test_the_first_of_several_elements_that_are_as_far_apart_is_told_whatever_comes_first() -> None:
    a, b = np.zeros(6), np.array([0.0, 1.0, -2.0, 2.0, 2.0, 1.0])
    for order in ([0, 2, 4], [4, 2, 0], [2, 4, 0]):
        measuring = Measuring(6)
        for start in order:
            measuring.update(a[start : start + 2], b[start : start + 2], start)
        assert (measuring.result().where, measuring.result().values) == (2, (0.0, -2.0))


def test_nothing_at_all_is_no_distance_apart() -> None:
    measuring = Measuring(0, F64)
    assert measuring.result() == Distance() == distance(np.zeros((3, 0)), np.zeros((0, 3)), F64)
    measuring.update(np.zeros(0), np.zeros(0), 0)
    assert measuring.result() == Distance()


# --- numbers that need a word -----------------------------------------------------------------------------------------

_BELOW, _ABOVE = MASKED, float(np.nextafter(MASKED, INF))


@pytest.mark.parametrize(
    ("a", "b", "nans"),
    [
        (NAN, 1.0, 1),
        (1.0, NAN, 1),
        (NAN, NAN, 1),
        (NAN, INF, 1),
        (INF, NAN, 1),
        (-INF, NAN, 1),
        (INF, INF, 0),
        (-INF, -INF, 0),
        (INF, -INF, 1),
        (-INF, INF, 1),
        (INF, 1e308, 1),
        (1e308, INF, 1),
        (-INF, _BELOW, 0),
        (-INF, -3.4e38, 0),
        (-INF, _ABOVE, 1),
        (-INF, 0.0, 1),
        (_BELOW, -INF, 1),
        (-1e300, -INF, 1),
    ],
)
def test_a_nan_agrees_with_nothing_and_an_infinity_with_the_same_one_or_a_mask(a: float, b: float, nans: int) -> None:
    """A mask: where ours is -inf, anything that is very negative; not the other way round."""
    found = distance(np.array([2.0, a, 3.0]), np.array([2.0, b, 3.0]), F64)
    assert (found.nans, found.max_abs, found.where) == ((1, INF, 1) if nans else (0, 0.0, 0))
    assert (found.scale, found.usual, found.max_ulp, found.cosine, found.factor) == (3.0, 2.5, 0, pytest.approx(1), 1)
    assert repr(found.values) == repr((a, b) if nans else (0.0, 0.0))


def test_zeros_of_both_signs_are_equal_and_one_step_apart() -> None:
    found = distance(np.array([0.0, -0.0]), np.array([-0.0, 0.0]), F64)
    assert found == Distance(max_ulp=1, size=2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ulps_are_steps_of_nextafter_in_the_precision_asked_for(dtype: str) -> None:
    kind = DTYPES[dtype]
    for start in (1.0, -1.0, 3.0e4, 0.0, 1e-3):
        a = np.array([start], kind)
        b = a
        for steps in range(1, 6):
            b = np.nextafter(b, np.array([INF], kind))
            crossed = 1 if start == 0.0 else 0
            assert distance(a, b, kind).max_ulp == steps
            assert distance(-b, a * 0 if crossed else -a, kind).max_ulp == steps + crossed  # -0 is a step below +0


def test_ulps_of_numbers_that_the_precision_does_not_have_are_those_of_its_nearest() -> None:
    assert distance(np.array([1.0]), np.array([1.0 + 2.0**-40]), F32).max_ulp == 0
    assert distance(np.array([1.0]), np.array([1.0 + 2.0**-23]), F32).max_ulp == 1
    assert distance(np.array([1.0]), np.array([1.0 + 2.0**-40]), F64).max_ulp == 1 << 12
    assert distance(np.array([1.0]), np.array([2.0]), None).max_ulp == 0


@given(st.floats(-10, 10), st.integers(-1000, 1000), st.floats(-3, 3))
def test_angles_are_equal_where_they_are_whole_turns_apart(angle: float, turns: int, more: float) -> None:
    a, b = np.array([angle]), np.array([angle + 2 * math.pi * turns + more])
    assert distance(a, b, turns=True).max_abs == pytest.approx(abs(more), abs=1e-11)
    assert distance(a, b).max_abs == pytest.approx(abs(2 * math.pi * turns + more), abs=1e-11)


def test_half_a_turn_is_the_farthest_that_two_angles_can_be_apart() -> None:
    b = np.linspace(0, 2 * math.pi, 9)
    found = distance(np.zeros(9), b, turns=True)
    assert (found.where, found.max_abs) == (4, math.pi)
    measuring = Measuring(9, turns=True)
    measuring.update(np.zeros(9), b, 0)
    assert distance(np.ones(9), b + 1, turns=True).max_abs == pytest.approx(math.pi)


# --- integers ---------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=20), st.integers(1, 20), st.booleans())
def test_integers_that_differ_are_counted_and_the_first_of_them_is_told(
    pairs: list[tuple[int, int]], size: int, backwards: bool
) -> None:
    a, b = (np.array([pair[i] for pair in pairs], np.int64) for i in (0, 1))
    measuring = Measuring(len(pairs))
    starts = range(0, len(pairs), size)
    for start in reversed(starts) if backwards else starts:
        measuring.update(a[start : start + size], b[start : start + size], start)
    differing = [i for i, (x, y) in enumerate(pairs) if x != y]
    found = measuring.result()
    assert (found.nans, found.beyond, found.max_abs) == (len(differing), len(differing), 1.0 if differing else 0.0)
    assert found.first == (differing[0] if differing else None)
    if differing:
        assert (found.where, found.values) == (differing[0], pairs[differing[0]])
    assert (found.cosine, found.factor, found.median, found.size) == (1.0, 1.0, 0.0, len(pairs))


@pytest.mark.parametrize("kind", [np.int8, np.uint32, np.uint64, np.float32, np.float64])
def test_integers_are_compared_by_value_whatever_they_are_stored_as(kind: type) -> None:
    ids = np.array([[0, 1], [3, 2]])
    assert distance(ids, ids.astype(kind)) == Distance(size=4)
    assert distance(ids.astype(kind), np.array([[0, 1], [2, 2]])).where == 2


def test_truth_values_and_integers_beyond_float64_are_exact() -> None:
    assert distance(np.array([True, False]), np.array([True, True])).nans == 1
    assert distance(np.array([2**60]), np.array([2**60 + 1])).nans == 1


def test_a_nan_is_no_integer() -> None:
    assert distance(np.array([1, 2]), np.array([1.0, NAN])).nans == 1


# --- layouts and dtypes -----------------------------------------------------------------------------------------------

_BASE = np.random.default_rng(0).standard_normal((6, 5, 4))
_OTHER = _BASE + np.random.default_rng(1).standard_normal((6, 5, 4)) * 1e-3


def both(view: str) -> tuple[HostArray, HostArray]:
    """The two arrays, seen in another way."""
    a, b = (eval(view, {"x": x, "np": np}) for x in (_BASE, _OTHER))
    return a, b


@pytest.mark.parametrize(
    "view",
    [
        "x",
        "x.T",
        "x[::2, ::-1, 1:3]",
        "x[:, 2]",
        "x[3, 2, 1]",
        "x[3, 2, 1].reshape(())",
        "np.asfortranarray(x)",
        "np.broadcast_to(x[0, 0], (7, 4))",
        "np.broadcast_to(x[2, 3, 1], (2, 3))",
        "x[:0]",
        "x.reshape(3, -1).T[1:]",
    ],
)
def test_arrays_of_any_layout_are_as_far_apart_as_their_copies(view: str) -> None:
    a, b = (np.asarray(x) for x in both(view))
    expected = naive(list(zip(a.ravel().tolist(), b.ravel().tolist(), strict=True)))
    assert same(distance(a, b, F64), expected)
    for mixed in ((a, b.copy()), (a.copy(), b), (a.ravel(), b)):
        assert same(distance(*mixed, F64), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_precision_is_measured_in_float64(dtype: str) -> None:
    a, b = _BASE.astype(DTYPES[dtype]), _OTHER.astype(DTYPES[dtype])
    found, expected = distance(a, b), distance(a.astype(F64), b.astype(F64))
    assert found == expected
    mixed = distance(_BASE, b)
    assert mixed == distance(_BASE, b.astype(F64)) and mixed.max_abs > 0


@given(st.integers(1, 200), st.sampled_from(["x", "x.T", "x[::2, ::-1]", "x[3, 2, 1].reshape(())", "x[:0]"]))
def test_pieces_are_cut_alike_and_make_up_the_whole(size: int, view: str) -> None:
    a, b = both(view)
    pieces = list(paired(a, b.reshape(-1), size))
    assert [start for start, _, _ in pieces] == list(range(0, a.size, size))
    for which, whole in ((1, a), (2, b)):
        parts = [piece[which] for piece in pieces]
        assert all(part.flags.c_contiguous and part.ndim == 1 and part.size <= size for part in parts)
        assert np.array_equal(np.concatenate([*parts, np.zeros(0)]), whole.ravel())


# --- large arrays -----------------------------------------------------------------------------------------------------

LARGE = 3 * MEDIAN_OF + 17


def large_arrays() -> tuple[HostArray, HostArray]:
    source = np.random.default_rng(2)
    a = source.standard_normal(LARGE) * (source.random(LARGE) < 0.7)
    return a, a + source.standard_normal(LARGE) * 1e-6


def test_of_a_large_array_the_median_is_that_of_every_so_many_th_number_but_for_zeros() -> None:
    a, b = large_arrays()
    found = distance(a, b)
    every = slice(None, None, 4)
    kept = a[every] != 0
    assert found.median == np.median(np.abs(a - b)[every][kept])
    assert found.usual == np.median(np.abs(a)[every][kept])
    assert np.count_nonzero(kept) <= MEDIAN_OF
    assert found.median == pytest.approx(np.median(np.abs(a - b)[a != 0]), rel=0.02)


@pytest.mark.parametrize("size", [1, 1000, 65_537, 99_991, 1 << 18])
def test_however_a_large_array_is_cut_the_same_numbers_are_taken(size: int) -> None:
    a, b = large_arrays()
    size = max(size, LARGE // 300)  # a piece a number would take a second
    expected = distance(a, b, F32, limit=4e-6)
    measuring = Measuring(LARGE, F32, limit=4e-6)
    for start, piece_a, piece_b in reversed(list(paired(a, b, size))):
        measuring.update(piece_a, piece_b, start)
    assert same(measuring.result(), expected) and expected.beyond > 0


def test_whole_triangles_of_zeros_do_not_hide_the_errors_of_the_others() -> None:
    """Such as the probabilities above the diagonal: they are more than half where a sequence is two tokens long."""
    a = np.array([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0]])
    b = a + np.array([[1e-3, 1e-9, 0.0], [1e-3, 1e-3, 0.0]])
    found = distance(a, b)
    assert (found.median, found.usual) == (pytest.approx(1e-3), 0.5)


# --- what the numbers tell --------------------------------------------------------------------------------------------


@given(st.floats(-1e6, 1e6).filter(lambda x: abs(x) > 1e-6), st.integers(0, 9))
def test_a_multiple_is_told_by_its_factor_at_the_angle_0_or_180_degrees(factor: float, seed: int) -> None:
    a = np.random.default_rng(seed).standard_normal(50)
    found = distance(a, factor * a)
    assert found.factor == pytest.approx(factor) and found.cosine == pytest.approx(math.copysign(1, factor))


def test_at_right_angles_the_cosine_is_0_and_of_zeros_it_says_whether_both_are() -> None:
    assert distance(np.array([1.0, 0.0]), np.array([0.0, 1.0])).cosine == 0
    assert distance(np.zeros(2), np.zeros(2)).cosine == 1
    assert distance(np.zeros(2), np.ones(2)).cosine == distance(np.ones(2), np.zeros(2)).cosine == 0
    assert distance(np.zeros(2), np.ones(2)).max_rel == INF
    assert math.isnan(distance(np.full(3, 1e200), np.full(3, 1e200)).cosine)
