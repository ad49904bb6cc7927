"""The next token, drawn from a model's logits: penalties, temperature, and which tokens are drawn from at all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oxidizr_ref.errors import TrainingError, UsageError


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. The settings act in this order, as in Hugging Face's ``generate``.

    repetition_penalty: divides positive logits of tokens that occurred, and multiplies negative ones (Keskar et al. 2019).
    temperature: divides the logits; 0 takes the likeliest token. top_k: only so many of the likeliest (0: all).
    top_p: of these, only the likeliest that together have this probability (Holtzman et al. 2020). min_p: only those at
    least so probable, as a part of the likeliest one's probability (Nguyen et al. 2024). seed: equal seeds, equal tokens.
    """

    max_tokens: int = 256
    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        ranges = {
            "max_tokens": (self.max_tokens >= 0, "0 or more"),
            "temperature": (0 <= self.temperature < float("inf"), "0 or more"),
            "top_k": (self.top_k >= 0, "0 (all tokens) or more"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "min_p": (0 <= self.min_p <= 1, "between 0 and 1"),
            "repetition_penalty": (0 < self.repetition_penalty < float("inf"), "above 0"),
            "seed": (0 <= self.seed < 2**64, "between 0 and 2^64 - 1"),
        }
        for name, (good, expected) in ranges.items():
            if not good:
                raise UsageError(f"--{name.replace('_', '-')} {getattr(self, name)}: expected a number {expected}")


def choose(logits: NDArray[np.float64], seen: NDArray[np.int64], sampling: Sampling, draw: float) -> int:
    """A token. logits: float64 ``[V]``; seen: the tokens so far; draw: a uniform number in [0, 1).

    Tokens divide [0, 1) among them in the order of their ids. Raises TrainingError for logits that are not finite.
    """
    tokens, weights = candidates(logits, seen, sampling)
    sums = np.cumsum(weights)
    place = np.searchsorted(sums, draw * sums[-1], side="right").clip(max=len(weights) - 1)
    return int(tokens[place])


def must_be_finite(logits: NDArray[np.float64]) -> None:
    """Raise TrainingError for logits of any shape with NaN or infinities among them: the end of a broken model."""
    if not np.isfinite(logits).all():
        raise TrainingError("the model's logits are not finite; its weights are broken: use another checkpoint")


def candidates(
    logits: NDArray[np.float64], seen: NDArray[np.int64], sampling: Sampling
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The tokens that may be drawn, ascending, and numbers in proportion to which they are. Otherwise as `choose`."""
    must_be_finite(logits)
    if sampling.repetition_penalty != 1.0:
        logits = logits.copy()
        some = logits[seen]
        logits[seen] = np.where(some > 0, some / sampling.repetition_penalty, some * sampling.repetition_penalty)
    if sampling.temperature == 0:
        return np.array([np.argmax(logits)]), np.array([1.0])
    tokens = _largest(logits, sampling.top_k or logits.size)
    with np.errstate(over="ignore"):  # at a temperature near 0, tokens behind the likeliest weigh nothing
        weights = np.exp((logits[tokens] - logits.max()) / sampling.temperature)
    if sampling.top_p < 1:
        shares = np.cumsum(np.sort(weights)[::-1]) / weights.sum()
        kept = _largest(weights, 1 + int(np.searchsorted(shares, sampling.top_p)))
        tokens, weights = tokens[kept], weights[kept]
    likely = weights >= sampling.min_p  # the likeliest weighs 1
    return tokens[likely], weights[likely]


def _largest(v: NDArray[np.float64], k: int) -> NDArray[np.int64]:
    """The places of the k largest numbers, ascending; of equal ones the first."""
    if k >= v.size:
        return np.arange(v.size)
    least = np.partition(v, v.size - k)[v.size - k]
    chosen = v > least
    chosen[np.flatnonzero(v == least)[: k - np.count_nonzero(chosen)]] = True
    return np.flatnonzero(chosen)


def log_probability(logits: NDArray[np.float64], token: int) -> float:
    """Of a token, in nats, by the model itself, before any setting acted. logits: float64 ``[V]``."""
    top: Any = logits.max()
    return float(logits[token] - top - np.log(np.exp(logits - top).sum()))
