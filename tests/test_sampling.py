"""Sampling: a function of model, prompt and seed."""

from __future__ import annotations

import numpy as np
import pytest

from oxidizr_ref import LanguageModel
from oxidizr_ref.config import ModelConfig
from oxidizr_ref.sampling import sample_tokens

MODEL = LanguageModel(
    ModelConfig(name="m", hidden_size=16, num_layers=1, num_heads=2, intermediate_size=32, vocab_size=50, max_seq_len=8)
)
# Logits of a fresh model are nearly flat: larger weights make choices matter.
for _, parameter in MODEL.named_parameters():
    parameter.data[...] *= 6
PROMPT = np.array([1, 2, 3], dtype=np.int64)


def test_equal_seeds_give_equal_tokens_and_others_do_not():
    first, again, other = (sample_tokens(MODEL, PROMPT, 30, seed=seed) for seed in (5, 5, 6))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_a_longer_sample_begins_with_the_shorter_one():
    assert np.array_equal(sample_tokens(MODEL, PROMPT, 30)[:10], sample_tokens(MODEL, PROMPT, 10))


def test_temperature_zero_takes_the_likeliest_token():
    tokens = list(PROMPT)
    for _ in range(12):
        tokens.append(int(MODEL(np.array([tokens[-8:]])).data[0, -1].argmax()))
    assert sample_tokens(MODEL, PROMPT, 12, temperature=0).tolist() == tokens[3:]


def test_only_the_top_k_are_drawn_from_and_in_proportion():
    logits = MODEL(PROMPT[None]).data[0, -1].astype(np.float64)
    top = np.argsort(-logits)[:3]
    drawn = np.array([sample_tokens(MODEL, PROMPT, 1, temperature=1.0, top_k=3, seed=s)[0] for s in range(400)])
    assert set(drawn) <= set(top)
    expected = np.exp(logits[top]) / np.exp(logits[top]).sum()
    for token, p in zip(top, expected, strict=True):
        # 400 draws: five standard deviations of the frequency.
        assert (drawn == token).mean() == pytest.approx(p, abs=5 * np.sqrt(p * (1 - p) / 400) + 1e-9)


def test_a_sample_leaves_no_gradient_and_no_graph_behind():
    sample_tokens(MODEL, PROMPT, 3)
    assert all(p.grad is None for _, p in MODEL.named_parameters())
