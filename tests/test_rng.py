"""Random numbers by address: each word equals Philox4x64-10 as its paper defines it, wherever one starts to read."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oxidizr_ref import rng

MASK = 2**64 - 1

# --- Philox4x64-10, from the paper (Salmon et al. 2011, section 3.3), in Python integers --------------------------------


def philox4x64(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Ten rounds: two 64 × 64 → 128 bit products, their high halves mixed with the key, the key bumped by Weyl constants."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = 0xD2E7470EE14C6C93 * c0, 0xCA5A826395121157 * c2
        c0, c1, c2, c3 = (p1 >> 64) ^ c1 ^ k0, p1 & MASK, (p0 >> 64) ^ c3 ^ k1, p0 & MASK
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & MASK, (k1 + 0xBB67AE8584CAA73B) & MASK
    return c0, c1, c2, c3


def word_at(seed: int, stream: str, name: str, step: int, index: int) -> int:
    digest = hashlib.sha256(f"{seed}\0{stream}\0{name}".encode()).digest()
    key = int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:16], "little")
    # NumPy's generator steps its counter before it computes a block: block b has counter b + 1.
    counter = index // 4 + 1 + (step << 192)
    limbs = tuple((counter >> shift) & MASK for shift in (0, 64, 128, 192))
    return philox4x64(limbs, key)[index % 4]


def test_the_philox_of_this_test_gives_the_known_answers_of_its_authors() -> None:
    # Random123 1.14, tests/kat_vectors, philox4x64 10.
    assert philox4x64((0, 0, 0, 0), (0, 0)) == (
        0x16554D9ECA36314C,
        0xDB20FE9D672D0FDC,
        0xD7E772CEE186176B,
        0x7E68B68AEC7BA23B,
    )
    assert philox4x64((MASK,) * 4, (MASK,) * 2) == (
        0x87B092C3013FE90B,
        0x438C3C67BE8D0224,
        0x9CC7D7C69CD777B6,
        0xA09CAEBF594F0BA0,
    )


# --- words ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "address", [(0, "init", "embed_tokens.weight", 0), (7, "rounding", "a.b", 12345), (2**63, "", "é", 1)]
)
def test_words_equal_philox_at_their_addresses(address: tuple[int, str, str, int]) -> None:
    wanted = [word_at(*address, index) for index in range(11)]
    assert rng.words(*address, 11).tolist() == wanted
    far = 4 * 10**12 + 3
    assert rng.words(*address, 6, far).tolist() == [word_at(*address, far + i) for i in range(6)]


@given(start=st.integers(0, 1000), count=st.integers(0, 40), step=st.integers(0, 2**40))
def test_words_from_a_start_are_those_a_reader_from_zero_sees_there(start: int, count: int, step: int) -> None:
    whole = rng.words(3, "s", "n", step, start + count)
    part = rng.words(3, "s", "n", step, count, start)
    assert part.dtype == np.uint64
    np.testing.assert_array_equal(part, whole[start:])


def test_another_seed_stream_name_or_step_gives_other_words() -> None:
    addresses = [(0, "a", "b", 0), (1, "a", "b", 0), (0, "c", "b", 0), (0, "a", "c", 0), (0, "a", "b", 1), (0, "b", "a", 0)]
    drawn = [rng.words(*address, 8) for address in addresses]
    words = np.concatenate(drawn)
    assert len(np.unique(words)) == len(words)  # 48 words of 64 bits: an accidental pair has probability 6e-17


def test_equal_addresses_give_equal_words_whatever_was_drawn_between() -> None:
    first = rng.words(5, "s", "n", 3, 9)
    rng.words(5, "s", "n", 3, 1000)
    rng.normal(5, "s", "n", (7,))
    np.random.default_rng(0).random(3)
    np.testing.assert_array_equal(rng.words(5, "s", "n", 3, 9), first)


# Written by `word_at` above, not by the package. A change here changes every trained file: raise `numerics`.
GOLDEN_WORDS = {
    (0, "init", "embed_tokens.weight", 0): (0xBB19CEC572E2A207, 0x9FA1EB5AE3BBBFE6, 0xA483C98B0C25785C, 0xF954C4E2232952C7),
    (1234, "rounding", "layers.0.attention.q_proj.weight", 100): (
        0x32ECAD6B858B834B,
        0x36EB51172A3839B7,
        0x8D3A1722B79A4E1C,
        0xC3AE2C8A31031FC4,
    ),
    (0, "shuffle", "permutation", 1): (0xB8676981BB12911A, 0x8502FB9323B3232B, 0x2AAD297201AB98E9, 0x819EF59B2780609B),
}


@pytest.mark.parametrize("address", GOLDEN_WORDS, ids=str)
def test_words_are_the_golden_ones(address: tuple[int, str, str, int]) -> None:
    drawn = [int(rng.words(*address, 1, start)[0]) for start in (0, 1, 5, 1_000_003)]
    assert drawn == list(GOLDEN_WORDS[address])


def test_permutation_and_first_weights_are_the_golden_ones() -> None:
    assert rng.permutation(0, "shuffle", 1, 10).tolist() == [5, 4, 6, 7, 1, 9, 0, 2, 3, 8]
    golden = ["-0x1.ec4eb4p-7", "0x1.4859b6p-8", "0x1.e9b6e6p-7", "-0x1.974a38p-7"]
    drawn = rng.normal(0, "init", "embed_tokens.weight", (4,), std=0.02)
    # Python's math and NumPy's may round their float64 results differently: one unit in the last place of float32.
    np.testing.assert_allclose(drawn, [float.fromhex(digits) for digits in golden], rtol=1.2e-7)


# --- distributions ----------------------------------------------------------------------------------------------------


def test_uniform_is_the_top_53_bits_in_zero_to_one() -> None:
    u = rng.uniform(0, "s", "n", 2, 20_000)
    assert u.dtype == np.float64
    assert u[:3].tolist() == [(word_at(0, "s", "n", 2, i) >> 11) / 2**53 for i in range(3)]
    assert u.min() >= 0
    assert u.max() < 1
    # Standard errors: of the mean sqrt(1/12/n) = 0.002, of the share below a tenth sqrt(0.09/n) = 0.002; five of them.
    assert abs(u.mean() - 0.5) < 0.0102
    assert abs((u < 0.1).mean() - 0.1) < 0.0106


def test_normal_is_box_and_muller_of_the_two_halves_of_each_word() -> None:
    drawn = rng.normal(4, "init", "w", (5,), std=0.02)
    for pair in range(3):
        word = word_at(4, "init", "w", 0, pair)
        radius = 0.02 * math.sqrt(-2 * math.log(((word >> 32) + 0.5) / 2**32))
        angle = 2 * math.pi * (word & 0xFFFFFFFF) / 2**32
        wanted = [radius * math.cos(angle), radius * math.sin(angle)]
        # float64 functions of two libraries, then rounded to float32: within one unit in the last place.
        np.testing.assert_allclose(drawn[2 * pair : 2 * pair + 2], wanted[: 5 - 2 * pair], rtol=1.2e-7)


def test_normal_number_2j_comes_from_word_j_however_far_along() -> None:
    drawn = rng.normal(4, "init", "w", (200_001,))
    for pair in (32_767, 32_768, 65_535, 65_536, 99_999):  # on both sides of the borders of whatever it is drawn in
        word = word_at(4, "init", "w", 0, pair)
        wanted = math.sqrt(-2 * math.log(((word >> 32) + 0.5) / 2**32)) * math.cos(2 * math.pi * (word & 0xFFFFFFFF) / 2**32)
        # One rounding to float32, and 1e-15 absolute where the cosine's angle, rounded at 4e-16, lies near its zero.
        assert drawn[2 * pair] == pytest.approx(wanted, rel=1.2e-7, abs=4e-15)


def test_normal_has_the_moments_of_the_normal_distribution() -> None:
    n = 400_000
    z = rng.normal(0, "init", "w", (n,), std=3.0).astype(np.float64) / 3
    # Five standard errors: mean 1/sqrt(n), variance sqrt(2/n), third moment sqrt(15/n), fourth sqrt(96/n).
    for power, wanted, spread in [(1, 0.0, 1), (2, 1.0, 2), (3, 0.0, 15), (4, 3.0, 96)]:
        assert abs((z**power).mean() - wanted) < 5 * math.sqrt(spread / n)
    assert abs((z[0::2] * z[1::2]).mean()) < 5 / math.sqrt(n / 2)  # the two of a pair are uncorrelated
    assert abs((np.abs(z) < 1).mean() - 0.682689) < 5 * math.sqrt(0.2166 / n)


@pytest.mark.parametrize("shape", [(), (1,), (3,), (5, 7), (0,), (3, 0), (65537,), (2, 65536)], ids=str)
def test_normal_fills_any_shape_with_the_prefix_of_one_sequence(shape: tuple[int, ...]) -> None:
    drawn = rng.normal(1, "init", "w", shape)
    assert drawn.shape == shape
    assert drawn.dtype == np.float32
    assert drawn.flags.c_contiguous
    assert drawn.flags.owndata
    longest = rng.normal(1, "init", "w", (140_001,))
    np.testing.assert_array_equal(drawn.reshape(-1), longest[: drawn.size])


@given(count=st.integers(0, 300), step=st.integers(0, 5))
def test_permutation_is_a_permutation_that_changes_with_the_step(count: int, step: int) -> None:
    order = rng.permutation(0, "shuffle", step, count)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(count))
    if count > 20:  # 20! orders
        assert order.tolist() != rng.permutation(0, "shuffle", step + 1, count).tolist()
        assert order.tolist() != list(range(count))


def test_permutation_is_the_order_of_its_words() -> None:
    words = [word_at(9, "shuffle", "permutation", 2, i) for i in range(50)]
    assert rng.permutation(9, "shuffle", 2, 50).tolist() == sorted(range(50), key=words.__getitem__)


def test_permutation_puts_every_element_everywhere() -> None:
    counts = np.zeros((5, 5))
    for step in range(2000):
        counts[rng.permutation(0, "shuffle", step, 5), np.arange(5)] += 1
    # 2000 draws at probability 1/5: standard deviation sqrt(2000 · 0.16) = 18; five of them.
    assert np.all(np.abs(counts - 400) < 90)
