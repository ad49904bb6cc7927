"""Decoding token by token with a cache: the full forward pass's logits, at any length, from a cache of the size it says.

Both forms compute the same sums in another order: MLA steps in its absorbed form, Mambas by the recurrence, not in chunks.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any
from unittest import mock

import devices
import numpy as np
import pytest
import tiny
from architectures import (
    BATCH,
    FEW,
    LENGTH,
    NAMES,
    PURE_MAMBAS,
    VOCAB,
    batch,
    everywhere,
    lively_model,
    model_config,
    relative_error,
    small_model,
)
from devices import host, place
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from oxidizr_ref import LanguageModel, no_grad, parallel, reference
from oxidizr_ref.autograd import Tensor
from oxidizr_ref.config import ModelConfig
from oxidizr_ref.fused import attention
from oxidizr_ref.fused.linear import linear
from oxidizr_ref.fused.mamba3 import next_angle, running_angle
from oxidizr_ref.fused.swiglu import swiglu
from oxidizr_ref.layers.attention import TokenCache
from oxidizr_ref.model import AttentionLayer

every_architecture = everywhere("architecture", NAMES, FEW)
on_both = pytest.mark.usefixtures("device")
ATTENTIVE = tuple(name for name in NAMES if name not in PURE_MAMBAS)


def decode(model: LanguageModel, tokens: NDArray[np.int64]) -> Any:
    """The logits after every token, step by step. tokens: int ``[B,T]``. Returns ``[B,T,V]``."""
    cache = model.new_cache(len(tokens))
    return np.stack([host(model.step(tokens[:, t], cache).data) for t in range(tokens.shape[1])], axis=1)


def forward(model: LanguageModel, tokens: NDArray[np.int64]) -> Any:
    with no_grad():
        return host(model(tokens).data)


def arrays_of(cache: Any) -> dict[str, Any]:
    """The arrays of one layer's cache by name."""
    if isinstance(cache, TokenCache):
        return {str(index): array for index, array in enumerate(cache.arrays)}
    fields = {field.name: getattr(cache, field.name) for field in dataclasses.fields(cache)}
    return {name: array for name, array in fields.items() if array is not None}


def copied(cache: list[Any]) -> list[Any]:
    """A copy of a model's cache, of which both may go on."""
    copies = [copy.copy(layer) for layer in cache]
    for layer in copies:
        if isinstance(layer, TokenCache):
            layer.arrays = [array.copy() for array in layer.arrays]
        else:
            for name, array in arrays_of(layer).items():
                setattr(layer, name, array.copy())
    return copies


# --- the same logits --------------------------------------------------------------------------------------------------


# Rounding grows with the number of additions behind a logit, a few thousand here: 1e-12 is 5000 half units of float64. In
# float32 as many would be 3e-4; what is asked is the 1e-5 that float32 owes any other implementation.
@pytest.mark.parametrize(("dtype", "tolerance"), [("f64", 1e-12), ("f32", 1e-5)])
@every_architecture
def test_steps_give_the_logits_of_the_full_forward_pass(architecture: str, dtype: str, tolerance: float) -> None:
    model = lively_model(architecture, dtype=dtype)
    tokens, _ = batch()
    steps, whole = decode(model, tokens), forward(model, tokens)
    assert steps.dtype == whole.dtype
    for t in range(LENGTH):
        assert relative_error(steps[:, t], whole[:, t]) <= tolerance, t


@every_architecture
def test_from_any_prefix_another_continuation_gives_its_own_logits(architecture: str) -> None:
    model = lively_model(architecture)
    (tokens, _), (others, _) = batch(0), batch(1)
    cache = model.new_cache(BATCH)
    for t in range(LENGTH - 2):
        if t % 3 == 0:
            branch, mixed = copied(cache), np.concatenate([tokens[:, :t], others[:, t : t + 2]], axis=1)
            for step in (t, t + 1):
                logits = host(model.step(mixed[:, step], branch).data)
            assert relative_error(logits, forward(model, mixed)[:, -1]) <= 1e-12, t
        model.step(tokens[:, t], cache)


@every_architecture
def test_a_sequence_decodes_alone_as_it_does_in_a_batch(architecture: str) -> None:
    model = lively_model(architecture)
    tokens, _ = batch(shape=(BATCH, 7))
    together = decode(model, tokens)
    for b in range(BATCH):
        assert relative_error(decode(model, tokens[b : b + 1])[0], together[b]) <= 1e-12


@every_architecture
def test_decoding_twice_gives_the_same_bits_and_leaves_no_graph_behind(architecture: str) -> None:
    model = lively_model(architecture)
    tokens, _ = batch(shape=(BATCH, 7))
    assert np.array_equal(decode(model, tokens), decode(model, tokens))
    logits = model.step(tokens[:, 0], model.new_cache(BATCH))
    assert logits.node is None and not logits.requires_grad
    assert logits.shape == (BATCH, VOCAB)


# --- beyond the length of training ------------------------------------------------------------------------------------


@everywhere("architecture", PURE_MAMBAS, ["mamba1", "mamba2", "mamba3_mimo"])
def test_a_mamba_remembers_without_limit(architecture: str) -> None:
    model = lively_model(architecture, max_seq_len=4)
    tokens, _ = batch(shape=(2, 40))
    assert relative_error(decode(model, tokens), forward(model, tokens)) <= 1e-12


@pytest.mark.long
@everywhere("architecture", PURE_MAMBAS, ["mamba1", "mamba2", "mamba3_mimo"])
def test_a_mamba_in_float32_still_gives_the_same_logits_after_three_thousand_tokens(architecture: str) -> None:
    model = lively_model(architecture, dtype="f32", mamba2_chunk_size=64)
    tokens, _ = batch(shape=(1, 3000))
    assert relative_error(decode(model, tokens), forward(model, tokens)) <= 1e-5


@on_both
def test_the_angle_that_decoding_carries_along_does_not_drift_from_the_one_of_training() -> None:
    source, T = np.random.default_rng(0), 2000
    dt = source.uniform(0, 2, (2, T, 3)).astype(np.float32)
    angle = source.standard_normal((2, T, 4)).astype(np.float32)
    expected = host(running_angle(Tensor(place(dt)), Tensor(place(angle))).data)
    phi = place(np.zeros((2, 3, 4)))
    for t in range(T):
        phi = next_angle(phi, place(dt[:, t]), place(angle[:, t]))
        apart = np.abs(host(phi) - expected[:, t])
        # The same turns are added, in float64; the training form's sum is rounded to float32 in the end: by 2⁻²² below 8.
        # Close to a whole turn one of them may have been taken off.
        assert np.minimum(apart, 2 * np.pi - apart).max() <= 2**-22 + T * 2**-50, t


@everywhere("architecture", ATTENTIVE, ["llama", "hybrid"])
def test_each_attention_layer_sees_the_last_max_seq_len_tokens(architecture: str) -> None:
    window = 6
    model = lively_model(architecture, max_seq_len=window)
    tokens, _ = batch()

    def banded(queries: int, keys: int) -> NDArray[np.bool_]:
        """The causal mask without the keys that are ``window`` tokens back, or more."""
        t, s = np.arange(queries)[:, None], np.arange(keys)[None, :]
        return np.asarray((s <= t) & (s > t - window))

    steps = decode(model, tokens)
    assert relative_error(steps[:, :window], forward(model, tokens[:, :window])) <= 1e-12
    with mock.patch.object(attention, "causal_mask", banded), reference():
        assert relative_error(steps, forward(model, tokens)) <= 1e-12
    assert relative_error(steps[:, -1], forward(model, tokens)[:, -1]) > 1e-3, "what is forgotten would have mattered"


@on_both
@pytest.mark.parametrize("keys", [{}, {"kv_latent_dim": 12, "q_latent_dim": 10, "d_rope": 6}])
def test_one_attention_layer_beyond_its_window_is_the_full_forward_pass_over_the_window(keys: dict[str, int]) -> None:
    # Rotary positions are relative, so it does not matter that the window's first token is not the first of all.
    window = 6
    model = lively_model("llama", num_layers=1, max_seq_len=window, **keys)
    tokens, _ = batch(shape=(2, 40))
    steps = decode(model, tokens)
    for t in range(window - 1, 40):
        # The angles of positions up to 40 are rounded once: 40·2⁻⁵³ each.
        assert relative_error(steps[:, t], forward(model, tokens[:, t - window + 1 : t + 1])[:, -1]) <= 1e-12


# --- the size of the cache --------------------------------------------------------------------------------------------


def expected_shapes(config: ModelConfig, kind: str, batch: int) -> dict[str, tuple[int, ...]]:
    """What theory says a layer must keep of ``batch`` sequences."""
    c, S = config, config.max_seq_len
    if kind == "attention":
        a_token = [(c.kv_latent_dim,), (c.d_rope,)] if c.uses_mla else [(c.kv_heads, c.head_dim)] * 2
        return {str(index): (batch, S, *shape) for index, shape in enumerate(a_token)}
    if kind == "mamba1":
        E = c.mamba_expand * c.hidden_size
        return {"tail": (batch, c.mamba_d_conv - 1, E), "state": (batch, E, c.mamba_d_state)}
    H, P, N, G = c.mamba2_num_heads, c.mamba2_head_dim, c.mamba2_state_size, c.mamba2_n_groups
    R, K = max(1, c.mamba3_mimo_rank), c.mamba2_conv_kernel
    shapes = {"state": (batch, H, P, N)}
    if kind == "mamba2" or c.mamba3_use_conv:
        shapes["tail"] = (batch, K - 1, H * P + 2 * R * G * N)
    if kind == "mamba3":
        pairs = int(N * c.mamba3_rope_fraction) // 2 if c.mamba3_complex_rope else 0
        shapes |= {"x": (batch, H, P), "B": (batch, R, H, N), "phi": (batch, H, pairs)}
    return shapes


@pytest.mark.parametrize(("dtype", "kept"), [("f64", np.float64), ("f32", np.float32), ("bf16", np.float32)])
@every_architecture
def test_the_cache_holds_what_theory_says_and_never_grows(architecture: str, dtype: str, kept: Any) -> None:
    config, model = model_config(architecture), small_model(architecture, dtype=dtype)
    cache = model.new_cache(BATCH)
    tokens, _ = batch(shape=(BATCH, 3))
    for step in range(4):
        for kind, layer in zip(config.layer_kinds, cache, strict=True):
            arrays = arrays_of(layer)
            assert {name: array.shape for name, array in arrays.items()} == expected_shapes(config, kind, BATCH)
            # Angles are sums over all of the past: in float64, whatever the rest is kept in.
            dtypes = {name: np.float64 if name == "phi" else kept for name in arrays}
            assert {name: array.dtype for name, array in arrays.items()} == dtypes
            if devices.current() == "cpu":
                assert all(array.flags.owndata for array in arrays.values())
            if step == 0:
                assert not any(host(array).any() for array in arrays.values()), "before the first token there is nothing"
        if step < 3:
            model.step(tokens[:, step], cache)


# Hidden 384, 6 heads; MLA 192 + 16; Mambas of 48 heads of 16, 64 states: the numbers of the nano models, by hand.
_NANO = {"hidden_size": 384, "num_layers": 1, "num_heads": 6, "vocab_size": 64, "max_seq_len": 512}
_NANO_MAMBA2: dict[str, Any] = {**_NANO, "mamba_layers": [0], "mamba2_num_heads": 48, "mamba2_state_size": 64}
_NANO_MAMBA3: dict[str, Any] = {**_NANO_MAMBA2, "mamba3_enabled": True}


@pytest.mark.parametrize(
    ("keys", "numbers"),
    [
        pytest.param({**_NANO, "kv_heads": 2}, 512 * 2 * 2 * 64, id="GQA keeps 2·kv_heads·head_dim a token"),
        pytest.param({**_NANO}, 512 * 768, id="with a key head a query head that is 2·hidden_size"),
        pytest.param(
            {**_NANO, "kv_latent_dim": 192, "q_latent_dim": 192, "d_rope": 16}, 512 * 208, id="MLA keeps latent + d_rope"
        ),
        pytest.param({**_NANO, "mamba_layers": [0]}, 3 * 768 + 768 * 16, id="Mamba1 keeps a tail and a state"),
        pytest.param(_NANO_MAMBA2, 3 * (768 + 2 * 64) + 768 * 64, id="Mamba2 keeps a tail and a state"),
        pytest.param(_NANO_MAMBA3, 768 * 64 + 768 + 48 * 64 + 48 * 16, id="Mamba3 keeps state, x, B and angles"),
        pytest.param(
            {**_NANO_MAMBA3, "mamba3_mimo_rank": 4, "mamba3_use_conv": True},
            768 * 64 + 768 + 4 * 48 * 64 + 48 * 16 + 3 * (768 + 2 * 4 * 64),
            id="with MIMO and a convolution B of each rank and a tail",
        ),
    ],
)
def test_the_cache_of_a_nano_layer_has_exactly_so_many_numbers(keys: dict[str, Any], numbers: int) -> None:
    model = LanguageModel(ModelConfig(**keys), seed=None)
    assert sum(array.size for array in arrays_of(_cache_of_an_empty_layer(model)).values()) == numbers


def _cache_of_an_empty_layer(model: LanguageModel) -> Any:
    """The first layer's cache for one sequence; its parameters need a shape and a dtype for that, but no values."""
    for _, p in model.layers[0].named_parameters():
        p.data = np.broadcast_to(np.float32(0), p.full_shape)
    return model.layers[0].new_cache(1)


@on_both
def test_attention_overwrites_the_oldest_row_and_counts_on() -> None:
    model = lively_model("llama", num_layers=1, max_seq_len=4)
    tokens, _ = batch(shape=(1, 6))
    cache = model.new_cache(1)
    layer = model.layers[0]
    assert isinstance(layer, AttentionLayer)
    written: list[Any] = []
    for t in range(6):
        before = host(cache[0].arrays[0]).copy()
        model.step(tokens[:, t], cache)
        changed = np.flatnonzero((before != host(cache[0].arrays[0])).any(axis=(0, 2, 3)))
        written.append(changed.tolist())
    assert written == [[0], [1], [2], [3], [0], [1]] and cache[0].length == 6


# --- the first tokens at once -----------------------------------------------------------------------------------------


@every_architecture
@pytest.mark.parametrize("length", [1, 2, LENGTH - 4])
def test_a_prompt_taken_at_once_leaves_what_taking_it_token_by_token_does(architecture: str, length: int) -> None:
    """Logits and caches, to rounding, and so the logits of what follows; with lengths below the convolution's."""
    model = lively_model(architecture)
    tokens, _ = batch(shape=(BATCH, length + 3))
    at_once, one_by_one = model.new_cache(BATCH), model.new_cache(BATCH)
    found = host(model.prefill(tokens[:, :length], at_once).data)
    for t in range(length):
        expected = host(model.step(tokens[:, t], one_by_one).data)
    assert relative_error(found, expected) < 1e-11
    for first, second in zip(at_once, one_by_one, strict=True):
        for name, array in arrays_of(first).items():
            if isinstance(first, TokenCache):
                array, other = array[:, :length], arrays_of(second)[name][:, :length]
            else:
                other = arrays_of(second)[name]
            assert relative_error(host(array), host(other)) < 1e-11, name
    for t in range(length, length + 3):
        both = [host(model.step(tokens[:, t], cache).data) for cache in (at_once, one_by_one)]
        assert relative_error(*both) < 1e-11


@pytest.mark.parametrize("architecture", ["llama", "mla", "hybrid", "mamba2"])
def test_a_prompt_longer_than_the_window_is_taken_like_tokens_one_by_one(architecture: str) -> None:
    model = lively_model(architecture, max_seq_len=5)
    tokens, _ = batch(shape=(BATCH, 12))
    cache = model.new_cache(BATCH)
    assert relative_error(host(model.prefill(tokens, cache).data), decode(model, tokens)[:, -1]) < 1e-11


# --- few rows, and one token, have ways of their own ------------------------------------------------------------------


@given(st.integers(2, 32), st.integers(1, 40), st.integers(1, 700), st.integers(0, 9))
@settings(max_examples=50)
def test_a_product_of_few_rows_is_the_product(m: int, k: int, n: int, seed: int) -> None:
    source = np.random.default_rng(seed)
    x, weight = source.standard_normal((m, k)), source.standard_normal((n, k))
    assert parallel.are_few(x[:, None])
    np.testing.assert_allclose(parallel.few_rows(x, weight), x @ weight.T, rtol=0, atol=1e-13 * k)


def test_a_product_of_few_rows_has_the_same_bits_on_any_number_of_threads() -> None:
    """In several tiles, each of several pieces, the last one shorter."""
    source = np.random.default_rng(0)
    x, weight = (source.standard_normal(shape).astype(np.float32) for shape in ((8, 300), (5003, 300)))
    found = []
    for count in (1, 3):
        with tiny.threads(count):
            found.append(parallel.few_rows(x, weight).tobytes())
    assert found[0] == found[1] and len(parallel.product_tiles(5003, 8 * 300)) >= 3
    np.testing.assert_allclose(parallel.few_rows(x, weight), x @ weight.T, rtol=0, atol=1e-3)


@pytest.mark.parametrize("rows", [(2, 3), (4, 1), (40, 1), (1, 1)])
def test_where_no_gradient_is_wanted_linear_and_swiglu_compute_the_same_to_rounding(rows: tuple[int, int]) -> None:
    source = np.random.default_rng(0)
    x = source.standard_normal((*rows, 10))
    weights = [Tensor(source.standard_normal(shape), requires_grad=True) for shape in ((7, 10), (7, 10), (10, 7))]
    for op, operands in ((linear, weights[:1]), (swiglu, weights)):
        trained = op(Tensor(x), *operands)
        with no_grad():
            found = op(Tensor(x), *operands)
        assert found.shape == trained.shape and found.data.dtype == trained.data.dtype
        np.testing.assert_allclose(found.data, trained.data, rtol=0, atol=1e-12)


@on_both
@pytest.mark.parametrize("keys", [2, 5, 200])
@pytest.mark.parametrize("groups", [1, 3])
def test_one_query_over_many_keys_attends_as_the_reference_does(keys: int, groups: int) -> None:
    """Keys are views of a longer cache, as decoding has them; large scores, too."""
    source = np.random.default_rng(0)
    q = Tensor(place(30 * source.standard_normal((2, 1, 4 * groups, 6))))
    k, v = (Tensor(place(source.standard_normal((2, keys + 3, 4, width)))[:, :keys]) for width in (6, 5))
    with no_grad():
        found = attention.attention(q, k, v, 0.5)
    assert relative_error(found.data, attention.attention_ref(q, k, v, 0.5).data) < 1e-12
