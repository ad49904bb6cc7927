"""Text from a model: tokens one after the other, for several prompts at once, each layer with the cache it needs.

All sequences stand at the same position. The first tokens, as many as the shortest prompt has, are taken at once; from then
on every sequence takes one token a step: from its prompt while that lasts, then the one that is drawn.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oxidizr_ref import rng
from oxidizr_ref.backend import Array, to_device, to_host
from oxidizr_ref.errors import UsageError
from oxidizr_ref.model import LanguageModel
from oxidizr_ref.nn import checked_ids
from oxidizr_ref.sampling import Sampling, choose, log_probability


@dataclass
class Continuation:
    """What a prompt (int64 ``[n]``) was continued with, so far.

    ends: tokens that end it. log_probs: nats, of each token by the model itself, where they are wanted. finish: why it
    ended, ``stop`` (an end token, which is not among the tokens, or the caller's own reason) or ``length``; None while it
    goes on.
    """

    prompt: NDArray[np.int64]
    ends: frozenset[int] = frozenset()
    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    finish: str | None = None


class Generation:
    """Continues ``prompts``, each of at least one token, step by step, wherever the model lives.

    ends: tokens that end a sequence; the caller may give one more of its own. below: only ids below this are drawn (a model
    may know more than its tokenizer). first: the number of the first sequence, where others came before it. Attention sees
    the last ``max_seq_len`` tokens. Equal arguments give equal tokens: token i of sequence b is drawn by random number i of
    the stream (seed, b). Raises UsageError for an empty prompt, and DataError for an id outside the vocabulary.
    """

    def __init__(
        self,
        model: LanguageModel,
        prompts: Sequence[NDArray[np.int64]],
        sampling: Sampling,
        ends: Collection[int] = (),
        below: int | None = None,
        log_probs: bool = False,
        first: int = 0,
    ) -> None:
        if not prompts or not all(len(prompt) for prompt in prompts):
            raise UsageError("a prompt is empty; give at least one token")
        self.model, self.sampling, self.below, self._log_probs, self._first = model, sampling, below, log_probs, first
        vocabulary, count = model.config.vocab_size, sampling.max_tokens
        ids = [checked_ids(prompt, vocabulary, "prompt: token").astype(np.int64) for prompt in prompts]
        self.sequences = [Continuation(prompt, frozenset(ends)) for prompt in ids]
        self._occurred = np.zeros((len(ids), vocabulary), dtype=np.bool_)
        for row, prompt in zip(self._occurred, ids, strict=True):
            row[prompt] = True
        self._draws = [np.empty(0)] * len(ids)  # the random numbers of each sequence, as many as it has needed so far
        self._active = list(range(len(prompts))) if count else []
        for sequence in self.sequences:
            sequence.finish = None if count else "length"
        self._position = min(map(len, prompts))
        self._cache: list[Any] = []
        self._next = np.empty(0, dtype=np.int64)  # the tokens that were chosen and not yet shown to the model

    @property
    def done(self) -> bool:
        """Whether every sequence has ended."""
        return all(sequence.finish for sequence in self.sequences)

    def step(self) -> list[int]:
        """Take one more token of every sequence that has not ended. Returns the numbers of those that were given a new one.

        Raises TrainingError where the logits are not finite.
        """
        logits = self._logits()
        chosen, given = np.empty(len(self._active), dtype=np.int64), []
        for row, index in enumerate(self._active):
            sequence = self.sequences[index]
            if self._position < len(sequence.prompt):
                chosen[row] = sequence.prompt[self._position]
                continue
            chosen[row] = self._draw(index, logits[row].astype(np.float64))
            if sequence.finish != "stop":
                given.append(index)
        self._next = chosen
        self._position += 1
        return given

    def _draw(self, index: int, logits: NDArray[np.float64]) -> int:
        sequence, sampling, occurred = self.sequences[index], self.sampling, self._occurred[index]
        draw = self._random_number(index, len(sequence.tokens))
        token = choose(logits[: self.below], np.flatnonzero(occurred[: self.below]), sampling, draw)
        if token in sequence.ends:
            sequence.finish = "stop"
            return token
        occurred[token] = True
        sequence.tokens.append(token)
        if self._log_probs:
            sequence.log_probs.append(log_probability(logits, token))
        if len(sequence.tokens) == sampling.max_tokens:
            sequence.finish = "length"
        return token

    def _random_number(self, index: int, token: int) -> float:
        """Number ``token`` of a sequence's stream. Twice as many are made each time: ``max_tokens`` may be without end."""
        if token == self._draws[index].size:
            stream = _stream(self._first + index)
            self._draws[index] = rng.uniform(self.sampling.seed, "sample", stream, 0, max(64, 2 * token))
        return float(self._draws[index][token])

    def _logits(self) -> NDArray[Any]:
        """Those of the next token of every sequence that goes on, ``[rows,V]``, on the host."""
        if not self._cache:
            first = np.stack([sequence.prompt[: self._position] for sequence in self.sequences])
            self._cache = self.model.new_cache(len(first))
            return to_host(self.model.prefill(first, self._cache).data)
        rows = [row for row, index in enumerate(self._active) if self.sequences[index].finish is None]
        if len(rows) < len(self._active):
            self._active, self._next = [self._active[row] for row in rows], self._next[rows]
            for layer in self._cache:
                _keep(layer, np.array(rows))
        return to_host(self.model.step(self._next, self._cache).data)


def _stream(sequence: int) -> str:
    return "token" if sequence == 0 else f"token of sequence {sequence}"


def _keep(cache: Any, rows: NDArray[np.int64]) -> None:
    """Of a layer's cache, the sequences in these rows."""

    def kept(value: Any) -> Any:
        if isinstance(value, list):
            return [kept(item) for item in value]
        return value[to_device(rows, value)] if hasattr(value, "dtype") else value

    for name, value in vars(cache).items():
        setattr(cache, name, kept(value))


def generate(
    model: LanguageModel,
    prompts: Sequence[Array],
    sampling: Sampling,
    ends: Collection[int] = (),
    below: int | None = None,
    log_probs: bool = False,
) -> list[Continuation]:
    """Continue every prompt, int ``[n]`` each, to its end: `Generation`, without looking on. Raises as that does."""
    generation = Generation(model, prompts, sampling, ends, below, log_probs)
    while not generation.done:
        generation.step()
    return generation.sequences
