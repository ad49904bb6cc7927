"""How well a model predicts tokens: the mean loss, and for each token its loss and the rank of what really came.

Windows are those of training: each token but the first is predicted once, from at most ``seq_len`` tokens before it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from oxidizr_ref import ops, parallel, rng
from oxidizr_ref.autograd import no_grad
from oxidizr_ref.backend import Array, to_host
from oxidizr_ref.config import DataConfig
from oxidizr_ref.data import Batch, TokenStream, windows_at
from oxidizr_ref.data_marks import IGNORED
from oxidizr_ref.errors import DataError
from oxidizr_ref.model import LanguageModel
from oxidizr_ref.sampling import must_be_finite
from oxidizr_ref.tokenizers import ByteTokenizer, Tokenizer

_LOGITS = 1 << 22  # looked at together
_PART = 1 << 20  # tokens decoded together
_BROKEN, _CHARACTER = "\N{REPLACEMENT CHARACTER}", 4  # what half a character becomes; tokens that may make one
_PIECES, _FEWEST_PIECES = 1000, 20  # of a text, for the bootstrap


#: Of two mean losses: the difference, and the ends of its interval.
Difference: TypeAlias = tuple[float, tuple[float, float] | None]


def mean_loss(model: LanguageModel, batches: Iterable[Batch]) -> float:
    """Mean cross-entropy, nats a token, over the targets of all batches: on the fused way, without any logits kept."""
    sums: parallel.TreeCounter[Array] = parallel.TreeCounter()
    count = 0
    with no_grad():
        for tokens, targets, begins in batches:
            sums.push(model.loss(tokens, targets, token_count=1, begins=begins).data.astype(np.float64))
            count += int(np.count_nonzero(targets != IGNORED))
    return float(sums.total().item()) / max(1, count)


def whole_windows(
    stream: TokenStream,
    seq_len: int,
    batch_size: int,
    use: DataConfig = DataConfig(),  # noqa: B008 - immutable
) -> Iterator[Batch]:
    """All of a stream, the last window as short as what is left. Raises DataError for a stream of less than two tokens."""
    if len(stream) < 2:
        raise DataError(f"{stream.name}: has {len(stream)} tokens; at least two are needed: the second is predicted")
    begins = range(0, len(stream) - 1, seq_len)
    full = (len(stream) - 1) // seq_len
    for first in range(0, full, batch_size):
        yield windows_at(stream, begins[first : min(first + batch_size, full)], seq_len, use)
    if full < len(begins):
        yield windows_at(stream, begins[full:], len(stream) - 1 - begins[full], use)


@dataclass(frozen=True)
class Scores:
    """Of one window after the other: float64 ``[windows,T]`` losses in nats, int64 ranks of what came (0: the likeliest).

    Where nothing was to be predicted (and behind a last, shorter window) the loss is NaN and the rank -1.
    """

    losses: NDArray[np.float64]
    ranks: NDArray[np.int64]

    @property
    def count(self) -> int:
        """Predicted tokens."""
        return int(np.count_nonzero(self.ranks >= 0))

    def loss(self) -> float:
        """The mean, nats a token."""
        return math.fsum(self.losses[self.ranks >= 0].tolist()) / max(1, self.count)

    def accuracy(self, k: int) -> float:
        """The share of tokens that were among the k likeliest."""
        return np.count_nonzero((self.ranks >= 0) & (self.ranks < k)) / max(1, self.count)

    def by_position(self) -> list[float | None]:
        """The mean loss at each position of the windows; None where there is no token."""
        there = self.ranks >= 0
        counts, sums = there.sum(axis=0), np.where(there, self.losses, 0.0).sum(axis=0)
        return [float(total / count) if count else None for total, count in zip(sums, counts, strict=True)]


def scores(model: LanguageModel, batches: Iterable[Batch], seq_len: int) -> Iterator[Scores]:
    """The scores of each batch in turn, padded to windows of ``seq_len``. Raises DataError for what is not of the model."""
    for batch in batches:
        losses = np.full((len(batch.tokens), seq_len), np.nan)
        ranks = np.full(losses.shape, -1, dtype=np.int64)
        there = np.flatnonzero(batch.targets != IGNORED)
        rows, columns = np.divmod(there, batch.targets.shape[1])
        losses[rows, columns], ranks[rows, columns] = _of_tokens(model, batch, there)
        yield Scores(losses, ranks)


def joined(parts: Iterable[Scores]) -> Scores:
    """The scores of all batches."""
    parts = list(parts)
    return Scores(np.concatenate([part.losses for part in parts]), np.concatenate([part.ranks for part in parts]))


def _of_tokens(model: LanguageModel, batch: Batch, there: NDArray[np.int64]) -> tuple[Any, Any]:
    """Losses and ranks at these places of a batch."""
    targets, vocabulary = batch.targets.reshape(-1)[there], model.config.vocab_size
    largest = max(batch.tokens.max(), batch.targets.max())
    if largest >= vocabulary:
        raise DataError(f"token id {largest} is not below the model's vocabulary of {vocabulary}; use its tokenizer")
    losses, ranks = np.empty(targets.size), np.empty(targets.size, dtype=np.int64)
    with no_grad():
        h = model.hidden(batch.tokens, begins=batch.begins)
        h = h.reshape(-1, h.shape[2])
        for low, high in parallel.tiles(targets.size, max(1, _LOGITS // vocabulary)):
            rows = ops.lookup(h, ids=there[low:high])
            logits = to_host(model.logits_of(rows).data).astype(np.float64)
            ids = targets[low:high, None]
            must_be_finite(logits)
            chosen = np.take_along_axis(logits, ids, axis=1)
            top = logits.max(axis=1, keepdims=True)
            losses[low:high] = (np.log(np.exp(logits - top).sum(axis=1, keepdims=True)) + top - chosen)[:, 0]
            before = (logits > chosen) | ((logits == chosen) & (np.arange(vocabulary) < ids))
            ranks[low:high] = before.sum(axis=1)
    return losses, ranks


def text_bytes(stream: TokenStream, tokenizer: Tokenizer) -> int:
    """How many bytes of UTF-8 the predicted tokens of a stream (all but the first) are. Special tokens are none."""
    # A tokenizer.json may have runs of white space among the tokens it adds: they are text.
    special = np.array([i for token, i in tokenizer.special_tokens.items() if not token.isspace()], dtype=np.uint32)
    total, low = 0, 1
    while low < len(stream):
        high = min(low + _PART, len(stream))
        if tokenizer.name != ByteTokenizer.name:  # a part must not end within a character
            while high < len(stream) and tokenizer.decode(stream.read(high - _CHARACTER, high)).endswith(_BROKEN):
                high += 1
        ids = stream.read(low, high)
        text = ids[~np.isin(ids, special)]
        total += text.size if tokenizer.name == ByteTokenizer.name else len(tokenizer.decode(text).encode())
        low = high
    return total


def difference(a: Scores, b: Scores, seed: int = 0, samples: int = 10_000) -> Difference:
    """The mean loss of ``a`` minus that of ``b`` on the same tokens, and its 95% interval, nats a token.

    No interval for fewer than 20 windows: too little to tell how much chance there is in the text.

    A paired bootstrap (Efron & Tibshirani 1993; Koehn 2004): pieces of the text are drawn anew, with replacement, and both
    models are compared on the same ones. Neighbouring tokens depend on each other, so a piece is a window, or several that
    stand together where there are more than 1,000.
    """
    there = a.ranks >= 0
    pieces = parallel.tiles(len(there), -(-len(there) // _PIECES))
    sums = np.array([np.where(there[i:j], a.losses[i:j] - b.losses[i:j], 0.0).sum() for i, j in pieces])
    counts = np.array([there[i:j].sum() for i, j in pieces])
    whole = float(sums.sum() / max(1, counts.sum()))
    if np.count_nonzero(counts) < _FEWEST_PIECES:
        return whole, None
    means = np.empty(samples)
    for sample in range(samples):
        drawn = (rng.uniform(seed, "bootstrap", "pieces", sample, sums.size) * sums.size).astype(np.int64)
        means[sample] = sums[drawn].sum() / max(1, counts[drawn].sum())
    low, high = np.quantile(means, [0.025, 0.975])
    return whole, (float(low), float(high))
