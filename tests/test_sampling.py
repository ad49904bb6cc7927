"""Sampling: a function of model, prompt and seed."""

from __future__ import annotations

import numpy as np
import pytest
from architectures import FEW, NAMES, everywhere, lively_model
from devices import host

from oxidizr_ref import LanguageModel
from oxidizr_ref.config import ModelConfig
from oxidizr_ref.sampling import sample_tokens

pytestmark = pytest.mark.usefixtures("device")

PROMPT = np.array([1, 2, 3], dtype=np.int64)


@pytest.fixture
def model(device):
    """A model whose choices matter: logits of a fresh one are nearly flat, so its weights are made larger."""
    config = ModelConfig(
        name="m", hidden_size=16, num_layers=1, num_heads=2, intermediate_size=32, vocab_size=50, max_seq_len=8
    )
    model = LanguageModel(config, device=device)
    for _, parameter in model.named_parameters():
        parameter.data[...] *= 6
    return model


def test_equal_seeds_give_equal_tokens_and_others_do_not(model):
    first, again, other = (sample_tokens(model, PROMPT, 30, seed=seed) for seed in (5, 5, 6))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_a_longer_sample_begins_with_the_shorter_one(model):
    assert np.array_equal(sample_tokens(model, PROMPT, 30)[:10], sample_tokens(model, PROMPT, 10))


def test_temperature_zero_takes_the_likeliest_token(model):
    tokens = list(PROMPT)
    for _ in range(12):
        tokens.append(int(host(model(np.array([tokens[-8:]])).data)[0, -1].argmax()))
    assert sample_tokens(model, PROMPT, 12, temperature=0).tolist() == tokens[3:]


@everywhere("architecture", NAMES, FEW)
def test_every_kind_of_model_samples_what_its_full_forward_pass_finds_likeliest(architecture):
    model = lively_model(architecture)
    tokens = [3, 1, 4, 1, 5]
    found = sample_tokens(model, np.array(tokens), 8, temperature=0)
    for _ in range(8):
        logits = host(model(np.array([tokens])).data)[0, -1]
        best, second = np.sort(logits)[::-1][:2]
        assert best - second > 1e-6, "no rounding decides"
        tokens.append(int(logits.argmax()))
    assert found.tolist() == tokens[5:]


def test_sampling_takes_one_step_a_token_and_never_a_full_forward_pass(model, monkeypatch):
    steps = []
    step = LanguageModel.step

    def counted(self, tokens, cache):
        steps.append(tokens.tolist())
        return step(self, tokens, cache)

    def forbidden(*_):
        raise AssertionError("a full forward pass")

    monkeypatch.setattr(LanguageModel, "step", counted)
    monkeypatch.setattr(LanguageModel, "hidden", forbidden)
    found = sample_tokens(model, PROMPT, 5)
    # The prompt, and every new token but the last, once each.
    assert steps == [[token] for token in (*PROMPT.tolist(), *found[:-1].tolist())]


def test_a_prompt_longer_than_the_window_samples_on_from_its_end(model):
    long = np.arange(20, dtype=np.int64)
    # One layer of attention: what lies before the window reaches no token in it.
    assert np.array_equal(sample_tokens(model, long, 4, temperature=0), sample_tokens(model, long[-8:], 4, temperature=0))


def test_no_tokens_wanted_are_none(model):
    assert sample_tokens(model, PROMPT, 0).shape == (0,)


@everywhere("draws", [400], [60])
def test_only_the_top_k_are_drawn_from_and_in_proportion(model, draws):
    logits = host(model(PROMPT[None]).data)[0, -1].astype(np.float64)
    top = np.argsort(-logits)[:3]
    drawn = np.array([sample_tokens(model, PROMPT, 1, temperature=1.0, top_k=3, seed=s)[0] for s in range(draws)])
    assert set(drawn) <= set(top)
    expected = np.exp(logits[top]) / np.exp(logits[top]).sum()
    for token, p in zip(top, expected, strict=True):
        # Five standard deviations of the frequency.
        assert (drawn == token).mean() == pytest.approx(p, abs=5 * np.sqrt(p * (1 - p) / draws) + 1e-9)


def test_a_sample_leaves_no_gradient_and_no_graph_behind(model):
    sample_tokens(model, PROMPT, 3)
    assert all(p.grad is None for _, p in model.named_parameters())
