"""What tells the architectures apart: the tasks are what they say, and trained models behave as the papers report.

The tests of the claims train from scratch, each in less than three minutes on two cores, and need no file; the thresholds
are in `runs`, beside what is trained. `python -m contrasts` (docs/scripts) also writes the curves that are checked here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from oxidizr_ref import LanguageModel, parallel
from oxidizr_ref.ops import log_softmax

REPOSITORY = Path(__file__).parents[1]
sys.path.append(str(REPOSITORY / "docs" / "scripts"))

from contrasts import curves, first_weights, runs, tasks, training  # noqa: E402 - lives beside the documentation

KINDS = ("attention", "mamba1", "mamba2", "mamba3")


def test_parity_asks_after_every_bit_whether_the_ones_so_far_are_odd():
    batch = tasks.parity(training.generator(0, training.TESTING), 7, 20)
    for tokens, targets, scored in zip(*batch, strict=True):
        assert tokens[0] == tasks.PARITY_START and not scored[0] and scored[1:].all()
        ones = 0
        for token, target in zip(tokens[1:].tolist(), targets[1:].tolist(), strict=True):
            assert token in (0, 1)
            ones += token
            assert target == ones % 2


def test_fair_parity_strings_have_half_ones_and_the_others_any_share():
    def shares(fair: bool) -> np.ndarray:
        batch = tasks.parity(training.generator(1, training.TRAINING), 2000, 400, fair=fair)
        return (batch.tokens[:, 1:] == 1).mean(axis=1)

    # Of 400 fair bits the share of ones has standard deviation 0.025; 6 of them bound 2000 strings but for one in 250,000.
    assert np.abs(shares(fair=True) - 0.5).max() < 6 * 0.025
    counts, _ = np.histogram(shares(fair=False), bins=4, range=(0, 1))
    # A uniform share falls into a quarter 500 times, with standard deviation 19.4: 6 of them.
    assert np.abs(counts - 500).max() < 6 * 19.4


def test_induction_has_one_trigger_before_the_last_token_and_asks_for_what_followed_it():
    batch = tasks.induction(training.generator(2, training.TESTING), 50, 12, alphabet=5)
    for tokens, targets, scored in zip(*batch, strict=True):
        (first,) = np.flatnonzero(tokens[:-1] == 5)
        assert tokens[-1] == 5 and first + 1 < 11 and tokens.max() == 5 and tokens.min() >= 0
        assert np.flatnonzero(scored).tolist() == [11]
        assert targets[-1] == tokens[first + 1] < 5


def test_recall_asks_for_every_key_once_and_the_answer_was_told_before():
    batch = tasks.recall(training.generator(3, training.TESTING), 40, pairs=6, keys=9, values=4)
    assert batch.tokens.shape == (40, 24)
    for tokens, targets, scored in zip(*batch, strict=True):
        told = dict(zip(tokens[0:12:2].tolist(), tokens[1:12:2].tolist(), strict=True))
        assert len(told) == 6 and max(told) < 9 and all(9 <= value < 13 for value in told.values())
        assert np.flatnonzero(scored).tolist() == list(range(12, 24, 2))
        assert sorted(tokens[scored].tolist()) == sorted(told)
        assert targets[scored].tolist() == [told[key] for key in tokens[scored].tolist()]
        assert tokens[13::2].tolist() == targets[scored].tolist()


def test_windows_are_pieces_of_the_text_with_one_token_more_than_their_length():
    pieces = tasks.windows(training.generator(4, training.TRAINING), np.arange(30), batch=200, length=8)
    assert pieces.shape == (200, 9) and (np.diff(pieces, axis=1) == 1).all()
    assert set(pieces[:, 0].tolist()) == set(range(22))


def test_a_batch_depends_on_its_address_alone_and_no_two_streams_share_one():
    def bits(seed: int, stream: int, step: int) -> bytes:
        return tasks.parity(training.generator(seed, stream, step), 4, 64).tokens.tobytes()

    assert bits(0, training.TRAINING, 3) == bits(0, training.TRAINING, 3)
    streams = (training.TRAINING, training.CHOOSING, training.TESTING)
    assert len({bits(seed, stream, step) for seed in (0, 1) for stream in streams for step in (0, 1)}) == 12


def test_the_scored_loss_is_the_mean_over_scored_positions_of_the_full_logits():
    model = LanguageModel(runs.shape("attention", 9 + 4, 1, 16, 2, 1, dtype="f64"), seed=0)
    batch = tasks.recall(training.generator(5, training.TRAINING), 3, pairs=4, keys=9, values=4)
    logits = log_softmax(model(batch.tokens)).data[batch.scored]
    right = -logits[np.arange(len(logits)), batch.targets[batch.scored]].mean()
    # Float64: both add the same few dozen numbers of order 1 in different orders.
    assert training.scored_loss(model, batch).item() == pytest.approx(right, rel=1e-13)
    smoothed = 0.8 * right - 0.2 * logits[:, :2].mean()
    assert training.scored_loss(model, batch, 0.2, 2).item() == pytest.approx(smoothed, rel=1e-13)


def test_accuracy_counts_scored_positions_from_the_start_asked_for_only():
    model = LanguageModel(runs.shape("mamba2", 3, 1, 16, 2, 4), seed=0)
    batch = tasks.parity(training.generator(6, training.TESTING), 5, 30)
    guess = model(batch.tokens).data.argmax(axis=-1)
    for start in (0, 11, 30):
        right = [guess[b, t] == batch.targets[b, t] for b in range(5) for t in range(max(1, start), 31)]
        assert training.accuracy(model, batch, start) == np.mean(right)


@pytest.mark.parametrize("kind", ("mamba2", "mamba3"))
def test_for_parity_both_mambas_begin_with_the_same_slow_decay_and_time_step(kind: str):
    model = LanguageModel(runs.shape(kind, tasks.PARITY_VOCABULARY, 1, 32, 4, 4), seed=0)
    first_weights.for_parity(model)
    mixer, tokens = model.layers[0].mixer, np.array([[0, 1, 2]])
    if kind == "mamba2":
        rate = np.exp(mixer.A_log.data)
        dt = mixer._project(model.layers[0].norm(model.embed_tokens(tokens)))[2].data
    else:
        projected = mixer._project(model.layers[0].norm(model.embed_tokens(tokens)), None)
        rate, dt = -projected.a.data / projected.dt.data, projected.dt.data
    # Exact for Mamba2; for Mamba3 the shared direction is only most of each embedding: within a factor of 2.
    assert (rate > first_weights.SLOWEST / 2).all() and (rate < first_weights.SLOWEST * 2).all()
    # dd_dt adds a sum of 32 products of unit numbers with weights of 0.02: standard deviation 0.11; 6 of them around 0.
    assert (dt > np.log1p(np.exp(-0.7))).all() and (dt < np.log1p(np.exp(0.7))).all()


@pytest.mark.thorough
def test_a_run_gives_the_same_curve_twice_and_it_survives_its_file(tmp_path: Path):
    def run() -> list[training.Curve]:
        return runs.parity(kinds=("mamba3",), rates=(1e-2,), steps=12)

    first = run()
    assert first == run()
    path = curves.write("tiny", first, tmp_path)
    assert curves.read("tiny", tmp_path) == first
    assert path.read_bytes() == curves.write("tiny", run(), tmp_path / "again").read_bytes()
    (curve,) = first
    assert curve.steps[-1] == 12 and len(curve.losses) == len(curve.steps) == len(curve.measured["beyond 40"])


@pytest.mark.thorough
@pytest.mark.parametrize(
    "begun",
    [
        pytest.param(lambda: runs.induction(kinds=("mamba1",), steps=2), id="induction"),
        pytest.param(lambda: runs.recall(kinds=("attention",), steps=2), id="recall"),
        pytest.param(lambda: runs.experts(alphas=(0.1,), steps=2), id="experts"),
    ],
)
def test_every_other_contrast_still_runs(begun: Callable[[], list[training.Curve]]):
    for curve in begun():
        assert curve.steps[-1] == 2 and np.isfinite(curve.losses).all()
        assert all(np.isfinite(values).all() for values in curve.measured.values())


@pytest.mark.parametrize("name", sorted(runs.CONTRASTS))
def test_the_recorded_curves_are_small_and_show_what_the_contrast_claims(name: str):
    assert (curves.CURVES / f"{name}.json").stat().st_size < 50_000
    assert (curves.PICTURES / f"contrast-{name}.png").stat().st_size < 100_000
    assert all(runs.CONTRASTS[name].verdict(curves.read(name)).values())


def contrast(name: str) -> None:
    """Train it and hold it to its claims."""
    parallel.set_threads(2)
    verdict = runs.CONTRASTS[name].verdict(runs.CONTRASTS[name].run())
    assert [claim for claim, holds in verdict.items() if not holds] == []


@pytest.mark.long
def test_mamba3_trained_on_40_bits_keeps_parity_over_256_where_mamba2_guesses():
    contrast("parity")


@pytest.mark.long
def test_mamba2_trained_at_64_tokens_copies_over_256():
    """With this seed: of the first four, two stay above 0.9 at 256 (docs/architectures.md)."""
    contrast("induction")


@pytest.mark.long
def test_attention_recalls_eight_pairs():
    contrast("recall")


@pytest.mark.thorough
def test_the_balance_loss_evens_the_load_of_experts():
    contrast("experts")
