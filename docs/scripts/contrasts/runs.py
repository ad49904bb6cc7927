"""The four contrasts: what is trained, how, and what must come out. Each takes under three minutes on two cores."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from contrasts import first_weights, tasks
from contrasts.training import CHOOSING, TESTING, TRAINING, Curve, Plan, accuracy, generator, learn, record
from oxidizr_ref import LanguageModel
from oxidizr_ref.autograd import Tensor
from oxidizr_ref.config import ModelConfig
from oxidizr_ref.data import bundled_corpus
from oxidizr_ref.layers.feed_forward import Routing, router_metrics

Test = Callable[[LanguageModel], float]


@dataclass(frozen=True)
class Contrast:
    """``run(seed=…)`` trains everything; ``verdict`` says which claims hold. Drawn are the measurements of this name."""

    run: Callable[..., list[Curve]]
    verdict: Callable[[Sequence[Curve]], Mapping[str, bool]]
    drawn: str
    label: str


def shape(kind: str, vocab_size: int, layers: int, hidden: int, heads: int, state: int, **others: Any) -> ModelConfig:
    """A float32 model whose layers are all of one kind: ``attention`` (GQA), ``mamba1``, ``mamba2`` or ``mamba3``."""
    keys: dict[str, Any] = {"kv_heads": max(1, heads // 2), "intermediate_size": 2 * hidden}
    if kind != "attention":
        keys = {"mamba_layers": list(range(layers)), "mamba_d_state": state}
    if kind in ("mamba2", "mamba3"):
        keys |= {"mamba2_num_heads": heads, "mamba2_state_size": state, "mamba3_enabled": kind == "mamba3"}
    sizes = {"hidden_size": hidden, "num_layers": layers, "num_heads": heads, "vocab_size": vocab_size, "max_seq_len": 256}
    return ModelConfig(**{"name": kind, **sizes, **keys, **others})


def best(curves: Sequence[Curve], kind: str, by: str) -> Curve:
    """Of the runs of one kind of model, the one that came out best by this measurement."""
    return max((curve for curve in curves if curve.kind == kind), key=lambda curve: curve.last(by))


# ---- running parity: what rotating states are for -----------------------------------------------------------------------

#: Trained on strings of at most so many bits, tested on strings of so many.
PARITY_TRAINED, PARITY_TESTED = 40, 256


def parity(
    kinds: Sequence[str] = ("mamba3", "mamba2"),
    rates: Sequence[float] = (3e-3, 5e-3, 1e-2),
    steps: int = 1600,
    seed: int = 0,
) -> list[Curve]:
    """One layer each, the same sizes, first values, updates and rates. Strings grow from 4 to 40 bits over two fifths of
    the steps; the share of ones varies from string to string.

    Measured, on strings of 256 fair bits: ``beyond 40``, the share of right answers after bits 41 to 256; ``up to 40``;
    and ``choosing``, as the first, on strings drawn to choose the best rate by.
    """

    def task(drawn: np.random.Generator, step: int) -> tasks.Batch:
        length = min(PARITY_TRAINED, int(4 + (PARITY_TRAINED - 4) * step / (0.4 * steps)))
        return tasks.parity(drawn, 32, length, fair=False)

    test, other = (tasks.parity(generator(seed, stream), 64, PARITY_TESTED) for stream in (TESTING, CHOOSING))
    end = PARITY_TRAINED + 1  # the start token, and 40 bits
    begin = tasks.Batch(test.tokens[:, :end], test.targets[:, :end], test.scored[:, :end])
    tests: dict[str, Test] = {
        "beyond 40": lambda model: accuracy(model, test, end),
        "up to 40": lambda model: accuracy(model, begin),
        "choosing": lambda model: accuracy(model, other, end),
    }
    # Targets of .9 and .1: certainty cannot grow until it hides that a turn is not quite half a circle.
    plan = Plan(steps, rates[0], seed, smoothing=0.2, answers=2)

    def sized(kind: str) -> ModelConfig:
        return shape(kind, tasks.PARITY_VOCABULARY, layers=1, hidden=32, heads=4, state=4)

    return [
        learn(sized(kind), task, replace(plan, rate=rate), tests, first_weights.for_parity)
        for kind in kinds
        for rate in rates
    ]


def parity_verdict(curves: Sequence[Curve]) -> dict[str, bool]:
    """Rotation solves what decay alone cannot."""
    rotating, decaying = (best(curves, kind, "choosing").last("beyond 40") for kind in ("mamba3", "mamba2"))
    return {
        f"Mamba3 keeps parity up to 256 bits: {rotating:.4f} > 0.99": rotating > 0.99,
        f"Mamba2 guesses beyond 40 bits: {decaying:.4f} < 0.60": decaying < 0.60,
    }


# ---- induction heads: what followed this token before? --------------------------------------------------------------------

LETTERS = 16
INDUCTION_TRAINED, INDUCTION_TESTED = 64, (64, 128, 256)


def induction(kinds: Sequence[str] = ("mamba2", "mamba1", "attention"), steps: int = 400, seed: int = 0) -> list[Curve]:
    """Two layers each, trained at up to 64 tokens; measured by test length: the share of right answers.

    Strings have 16 tokens for two fifths of the steps, then grow to 64: in short ones the answer is found sooner.
    """

    def task(drawn: np.random.Generator, step: int) -> tasks.Batch:
        length = int(np.interp(step / steps, (0.4, 0.8), (16, INDUCTION_TRAINED)))
        return tasks.induction(drawn, 64, length, LETTERS)

    batches = {length: tasks.induction(generator(seed, TESTING), 100, length, LETTERS) for length in INDUCTION_TESTED}
    tests: dict[str, Test] = {
        f"at {length}": lambda model, length=length: accuracy(model, batches[length])  # type: ignore[misc]
        for length in INDUCTION_TESTED
    }
    rates = {"attention": 3e-3, "mamba1": 5e-3, "mamba2": 5e-3}
    return [
        learn(
            shape(kind, LETTERS + 1, layers=2, hidden=64, heads=4, state=16),
            task,
            Plan(steps, rates[kind], seed),
            tests,
            first_weights.for_memory,
        )
        for kind in kinds
    ]


def induction_verdict(curves: Sequence[Curve]) -> dict[str, bool]:
    """A state holds what it was told for longer than it was ever trained to."""
    last = {curve.kind: curve.last("at 256") for curve in curves}
    return {f"Mamba2 copies over 256 tokens, trained at 64: {last['mamba2']:.4f} > 0.90": last["mamba2"] > 0.90}


# ---- associative recall: what attention is for ----------------------------------------------------------------------------

PAIRS, KEYS, VALUES = 8, 16, 16


def recall(
    kinds: Sequence[str] = ("attention", "mamba1", "mamba2", "mamba3"), steps: int = 600, seed: int = 0
) -> list[Curve]:
    """Two layers each; ``right``: the share of right answers to eight questions about eight pairs.

    Strings tell two pairs for two fifths of the steps, then more and more, up to eight.
    """

    def task(drawn: np.random.Generator, step: int) -> tasks.Batch:
        pairs = int(np.interp(step / steps, (0.4, 0.7), (2, PAIRS)))
        return tasks.recall(drawn, 64, pairs, KEYS, VALUES)

    test = tasks.recall(generator(seed, TESTING), 100, PAIRS, KEYS, VALUES)
    return [
        learn(
            shape(kind, KEYS + VALUES, layers=2, hidden=64, heads=4, state=16),
            task,
            Plan(steps, 3e-3, seed),
            {"right": lambda model: accuracy(model, test)},
            first_weights.for_memory,
        )
        for kind in kinds
    ]


def recall_verdict(curves: Sequence[Curve]) -> dict[str, bool]:
    """Attention looks up."""
    right = best(curves, "attention", "right").last("right")
    return {f"attention recalls eight pairs: {right:.4f} > 0.99": right > 0.99}


# ---- load of experts: what the balance loss is for ------------------------------------------------------------------------

#: How much more even the load must be with the balance loss: the entropy over that of even shares lies between 0 and 1.
ENTROPY_MARGIN = 0.25


def experts(alphas: Sequence[float] = (0.0, 0.01, 0.1), steps: int = 300, seed: int = 0) -> list[Curve]:
    """A byte model of the bundled text, eight experts of which each token takes one, without and with the balance loss.

    Measured over the steps since the point before: ``entropy``, the mean over the layers of their ``expert_entropy``
    (`router_metrics`), ``largest share``, the largest share of a layer's tokens that one expert took, and ``balance loss``.
    """
    text = np.frombuffer(bundled_corpus().read_bytes(), dtype=np.uint8).astype(np.int64)
    config = shape("attention", 256, layers=2, hidden=64, heads=4, state=1, num_experts=8, experts_per_tok=1)

    def train(alpha: float) -> Curve:
        model, plan = LanguageModel(config, seed), Plan(steps, 3e-3, seed)
        routings: list[list[Routing]] = []

        def loss_of(step: int) -> Tensor:
            windows = tasks.windows(generator(seed, TRAINING, step), text, batch=16, length=64)
            routings.append([])
            return model.loss(windows[:, :-1], windows[:, 1:], load_balance_alpha=alpha, routings=routings[-1])

        def measure() -> dict[str, float]:
            told = router_metrics(routings, [routing.balance.item() for batch in routings for routing in batch])
            routings.clear()
            return {
                "entropy": float(np.mean(told["expert_entropy"])),
                "largest share": float(np.max(told["expert_load"])),
                "balance loss": told["balance_loss"],
            }

        return record(f"load_balance_alpha {alpha:g}", model, plan, loss_of, measure)

    return [train(alpha) for alpha in alphas]


def experts_verdict(curves: Sequence[Curve]) -> dict[str, bool]:
    """Left alone, routers send most tokens to few experts."""
    without, *balanced = (curve.last("entropy") for curve in curves)
    return {
        f"the load is more even with the balance loss: {entropy:.3f} > {without:.3f} + {ENTROPY_MARGIN}": (
            entropy > without + ENTROPY_MARGIN
        )
        for entropy in balanced
    }


CONTRASTS = {
    "parity": Contrast(parity, parity_verdict, "beyond 40", "right after bits 41 to 256"),
    "induction": Contrast(induction, induction_verdict, "at 256", "right at 256 tokens"),
    "recall": Contrast(recall, recall_verdict, "right", "right answers"),
    "experts": Contrast(experts, experts_verdict, "entropy", "entropy of the experts' load (1: even)"),
}
