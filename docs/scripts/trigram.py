"""An interpolated trigram model over token ids: what a model must beat to have learned more than letter statistics.

``p(t | a, b) = w3 c(abt)/c(ab) + w2 c(bt)/c(b) + w1 c(t)/n + w0/V`` (Jelinek & Mercer 1980). The weights are fitted by
expectation maximization on the last tenth of the training text, with counts from the rest; the final counts are of all of
the training text.
"""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
_ROUNDS = 200


def trigram_loss(train: Ids, held_out: Ids, vocab_size: int) -> float:
    """Mean cross-entropy (nats a token) of ``held_out``, its first two tokens left out, after counting ``train``."""
    cut = len(train) * 9 // 10
    parts = _probabilities(train[:cut], train[cut:], vocab_size)
    weights = np.full(4, 0.25)
    for _ in range(_ROUNDS):
        share = weights * parts
        weights = (share / share.sum(axis=1, keepdims=True)).mean(axis=0)
    return float(-np.log(_probabilities(train, held_out, vocab_size) @ weights).mean())


def _probabilities(train: Ids, text: Ids, vocab_size: int) -> NDArray[np.float64]:
    """What the four models give every token of ``text`` but the first two: float64 ``[n, 4]``."""
    ids = train.tolist()
    unigrams, bigrams = Counter(ids), Counter(itertools.pairwise(ids))
    trigrams = Counter(zip(ids, ids[1:], ids[2:], strict=False))
    rows = []
    for a, b, t in zip(text[:-2].tolist(), text[1:-1].tolist(), text[2:].tolist(), strict=True):
        bigram = bigrams[b, t] / max(1, unigrams[b])
        rows.append((1 / vocab_size, unigrams[t] / len(ids), bigram, trigrams[a, b, t] / max(1, bigrams[a, b])))
    return np.array(rows)
