"""Synthetic sequences, each of which asks a model for one ability and for little else.

Every task is a function of a random generator and sizes, and returns a `Batch`. Loss and accuracy are taken at the scored
positions alone; at the others the target is 0 and means nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]


class Batch(NamedTuple):
    """Tokens to read and what should come next, int ``[batch, time]``; bool ``[batch, time]``: where that is asked."""

    tokens: Ids
    targets: Ids
    scored: NDArray[np.bool_]


#: The tokens of `parity`: the two bits, and the one that every string begins with.
PARITY_START, PARITY_VOCABULARY = 2, 3


def parity(generator: np.random.Generator, batch: int, length: int, fair: bool = True) -> Batch:
    """``length`` random bits after a start token; after every bit, the parity of all bits so far.

    It needs a state that each 1 flips and that nothing wears out: a model that forgets is right half of the time. Unless
    bits are ``fair``, each string draws the share of its ones from [0, 1) first: some are nearly all zeros, some all ones.
    The start token is not scored.
    """
    share = np.full((batch, 1), 0.5) if fair else generator.random((batch, 1))
    bits = (generator.random((batch, length)) < share).astype(np.int64)
    start = np.full((batch, 1), PARITY_START)
    targets = np.concatenate([np.zeros_like(start), np.cumsum(bits, axis=1) % 2], axis=1)
    scored = np.ones(targets.shape, dtype=bool)
    scored[:, 0] = False
    return Batch(np.concatenate([start, bits], axis=1), targets, scored)


def induction(generator: np.random.Generator, batch: int, length: int, alphabet: int) -> Batch:
    """Random letters, among them one trigger twice: what followed the first is asked after the second, the last token.

    The induction heads task of Gu & Dao (2023, section 4.1.2), after Olsson et al. (2022). The letters are 0 … alphabet-1,
    the trigger is ``alphabet``; the first one stands at any place that leaves room for the letter after it.
    """
    tokens = generator.integers(0, alphabet, (batch, length))
    first, rows = generator.integers(0, length - 2, batch), np.arange(batch)
    tokens[rows, first] = tokens[:, -1] = alphabet
    targets, scored = np.zeros_like(tokens), np.zeros(tokens.shape, dtype=bool)
    targets[:, -1], scored[:, -1] = tokens[rows, first + 1], True
    return Batch(tokens, targets, scored)


def recall(generator: np.random.Generator, batch: int, pairs: int, keys: int, values: int) -> Batch:
    """``pairs`` different keys, each followed by a value; then the same keys in another order, each asking for its value.

    Associative recall with many questions (MQAR: Arora et al. 2023). Keys are 0 … keys-1, values keys … keys+values-1.
    After a question comes its answer, as in text, so a question is answered by position 2i + 2·pairs.
    """
    order = np.argsort(generator.random((batch, keys)), axis=1)[:, :pairs]
    value = generator.integers(keys, keys + values, (batch, pairs))
    asked = np.argsort(generator.random((batch, pairs)), axis=1)
    told = np.stack([order, value], axis=2)
    again = np.take_along_axis(told, asked[:, :, None], axis=1)
    tokens = np.concatenate([told, again], axis=1).reshape(batch, 4 * pairs)
    targets = np.concatenate([tokens[:, 1:], np.zeros((batch, 1), dtype=np.int64)], axis=1)
    scored = np.zeros(tokens.shape, dtype=bool)
    scored[:, 2 * pairs :: 2] = True
    return Batch(tokens, np.where(scored, targets, 0), scored)


def windows(generator: np.random.Generator, text: Ids, batch: int, length: int) -> Ids:
    """``batch`` pieces of ``length + 1`` tokens from anywhere in a text, int ``[batch, length + 1]``."""
    begin = generator.integers(0, len(text) - length, batch)
    pieces: Ids = text[begin[:, None] + np.arange(length + 1)]
    return pieces
