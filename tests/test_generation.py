"""Generating: a function of model, prompts and seed; each sequence as if it were alone; one step a token."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from architectures import FEW, NAMES, everywhere, lively_model
from devices import host

from oxidizr_ref import LanguageModel, rng
from oxidizr_ref.config import ModelConfig
from oxidizr_ref.errors import DataError, UsageError
from oxidizr_ref.generation import Continuation, Generation, generate
from oxidizr_ref.sampling import Sampling

pytestmark = pytest.mark.usefixtures("device")

PROMPT = np.array([1, 2, 3], dtype=np.int64)
GREEDY = Sampling(8, temperature=0)


@pytest.fixture
def model(device: Any) -> LanguageModel:
    """A model whose choices matter: logits of a fresh one are nearly flat, so its weights are made larger."""
    config = ModelConfig(
        name="m", hidden_size=16, num_layers=1, num_heads=2, intermediate_size=32, vocab_size=50, max_seq_len=8
    )
    model = LanguageModel(config, device=device)
    for _, parameter in model.named_parameters():
        parameter.data[...] *= 6
    return model


def one(model: LanguageModel, prompt: Any, sampling: Sampling, **options: Any) -> Continuation:
    (sequence,) = generate(model, [np.asarray(prompt)], sampling, **options)
    return sequence


def test_equal_seeds_give_equal_tokens_and_others_do_not(model: LanguageModel) -> None:
    first, again, other = (one(model, PROMPT, Sampling(30, seed=seed)).tokens for seed in (5, 5, 6))
    assert first == again != other


def test_a_longer_text_begins_with_the_shorter_one(model: LanguageModel) -> None:
    assert one(model, PROMPT, Sampling(30)).tokens[:10] == one(model, PROMPT, Sampling(10)).tokens


@everywhere("architecture", NAMES, FEW)
def test_every_kind_of_model_writes_what_its_full_forward_pass_finds_likeliest(architecture: str) -> None:
    model = lively_model(architecture)
    tokens, log_probs = [3, 1, 4, 1, 5], []
    found = one(model, tokens, GREEDY, log_probs=True)
    for _ in range(8):
        logits = host(model(np.array([tokens])).data)[0, -1]
        best, second = np.sort(logits)[::-1][:2]
        assert best - second > 1e-6, "no rounding decides"
        tokens.append(int(logits.argmax()))
        log_probs.append(best - np.log(np.exp(logits - best).sum()) - best)
    assert (found.tokens, found.finish) == (tokens[5:], "length")
    np.testing.assert_allclose(found.log_probs, log_probs, atol=1e-9)


@everywhere("architecture", NAMES, FEW)
def test_prompts_of_any_lengths_side_by_side_are_continued_as_each_alone(architecture: str) -> None:
    model = lively_model(architecture)
    prompts = [np.array(tokens) for tokens in ([3, 1, 4, 1, 5], [2], [2, 7, 1], [9, 9, 9, 9, 9, 9, 9])]
    together = generate(model, prompts, GREEDY)
    assert [sequence.tokens for sequence in together] == [one(model, prompt, GREEDY).tokens for prompt in prompts]


def test_sequences_that_end_early_leave_the_others_as_they_are(model: LanguageModel) -> None:
    prompts = [PROMPT, PROMPT + 3, PROMPT[:2]]
    alone = [one(model, prompt, GREEDY).tokens for prompt in prompts]
    end = alone[1][2]
    together = generate(model, prompts, GREEDY, ends=[end])
    for sequence, tokens in zip(together, alone, strict=True):
        ended = end in tokens
        assert sequence.tokens == (tokens[: tokens.index(end)] if ended else tokens)
        assert sequence.finish == ("stop" if ended else "length")


def test_the_caller_may_end_a_sequence(model: LanguageModel) -> None:
    generation = Generation(model, [PROMPT, PROMPT + 1], GREEDY)
    while not generation.done:
        generation.step()
        if len(generation.sequences[0].tokens) == 3:
            generation.sequences[0].finish = "stop"
    assert [len(sequence.tokens) for sequence in generation.sequences] == [3, 8]
    assert generation.sequences[1].tokens == one(model, PROMPT + 1, GREEDY).tokens


def test_sequences_draw_by_numbers_of_their_own(model: LanguageModel) -> None:
    first, second = generate(model, [PROMPT, PROMPT], Sampling(20))
    assert first.tokens != second.tokens
    assert first.tokens == one(model, PROMPT, Sampling(20)).tokens


def test_a_prompt_is_one_pass_and_each_new_token_one_step(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    for name in ("step", "prefill"):
        method = getattr(LanguageModel, name)

        def counted(self: Any, tokens: Any, cache: Any, name: str = name, method: Any = method) -> Any:
            seen.append((name, tokens.tolist()))
            return method(self, tokens, cache)

        monkeypatch.setattr(LanguageModel, name, counted)
    monkeypatch.setattr(LanguageModel, "hidden", None)
    found = one(model, PROMPT, Sampling(5)).tokens
    assert seen == [("prefill", [PROMPT.tolist()]), *(("step", [token]) for token in found[:-1])]


def test_a_prompt_longer_than_the_window_is_continued_from_its_end(model: LanguageModel) -> None:
    long = np.arange(20)
    # One layer of attention: what lies before the window reaches no token in it.
    assert one(model, long, GREEDY).tokens == one(model, long[-8:], GREEDY).tokens


def test_no_tokens_wanted_are_none_and_the_model_is_not_asked(model: LanguageModel) -> None:
    found = one(model, PROMPT, Sampling(0))
    assert (found.tokens, found.finish) == ([], "length")


def test_as_many_tokens_may_be_wanted_as_no_memory_could_hold(model: LanguageModel) -> None:
    generation = Generation(model, [PROMPT, PROMPT], Sampling(10**18))
    for _ in range(200):
        generation.step()
    tokens = [sequence.tokens for sequence in generation.sequences]
    assert tokens == [sequence.tokens for sequence in generate(model, [PROMPT, PROMPT], Sampling(200))]


def test_token_i_is_drawn_by_number_i_of_its_sequence(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    draws: list[float] = []
    monkeypatch.setattr("oxidizr_ref.generation.choose", lambda *given: draws.append(given[3]) or 1)
    generate(model, [PROMPT, PROMPT], Sampling(200, seed=3))
    for index, name in enumerate(["token", "token of sequence 1"]):
        np.testing.assert_array_equal(draws[index::2], rng.uniform(3, "sample", name, 0, 200))


def test_only_ids_the_tokenizer_knows_are_drawn_and_their_probabilities_are_the_model_s(model: LanguageModel) -> None:
    found = one(model, PROMPT, Sampling(40, temperature=5.0, top_k=0), below=7, log_probs=True)
    assert max(found.tokens) < 7
    logits = host(model(PROMPT[None]).data)[0, -1].astype(np.float64)
    expected = logits[found.tokens[0]] - np.log(np.exp(logits).sum())
    assert found.log_probs[0] == pytest.approx(expected, abs=1e-5)


def test_an_empty_prompt_is_refused(model: LanguageModel) -> None:
    with pytest.raises(UsageError, match="a prompt is empty"):
        generate(model, [PROMPT, PROMPT[:0]], GREEDY)


def test_generating_leaves_no_gradient_and_no_graph_behind(model: LanguageModel) -> None:
    one(model, PROMPT, GREEDY)
    assert all(p.grad is None for _, p in model.named_parameters())


def test_an_id_outside_the_vocabulary_is_refused(model: LanguageModel) -> None:
    with pytest.raises(DataError, match="prompt: token id 50 is outside the vocabulary of 50"):
        generate(model, [PROMPT, np.array([50])], GREEDY)


def test_a_sequence_may_have_ends_of_its_own(model: LanguageModel) -> None:
    alone = one(model, PROMPT, GREEDY).tokens
    generation = Generation(model, [PROMPT, PROMPT], GREEDY)
    generation.sequences[1].ends |= {alone[3]}
    while not generation.done:
        generation.step()
    first, second = generation.sequences
    assert (first.tokens, first.finish) == (alone, "length")
    assert (second.tokens, second.finish) == (alone[: alone.index(alone[3])], "stop")


def test_tokens_of_the_prompt_and_of_the_text_are_penalized(model: LanguageModel) -> None:
    tokens = PROMPT.tolist()
    for _ in range(8):
        logits = host(model(np.array([tokens[-8:]])).data)[0, -1].astype(np.float64)
        some = logits[tokens]
        logits[tokens] = np.where(some > 0, some / 3, some * 3)
        tokens.append(int(logits.argmax()))
    assert one(model, PROMPT, Sampling(8, temperature=0, repetition_penalty=3.0)).tokens == tokens[3:]
    assert tokens[3:] != one(model, PROMPT, GREEDY).tokens
