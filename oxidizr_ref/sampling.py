"""Text from a model: one token after the other, drawn from its distribution."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from oxidizr_ref import rng
from oxidizr_ref.backend import to_host
from oxidizr_ref.model import LanguageModel


def sample_tokens(
    model: LanguageModel,
    prompt: NDArray[np.int64],
    count: int,
    temperature: float = 0.8,
    top_k: int = 40,
    seed: int = 0,
    below: int | None = None,
) -> NDArray[np.int64]:
    """``count`` tokens that continue ``prompt`` (int64 ``[n]``, n ≥ 1). Returns int64 ``[count]``.

    ``temperature`` divides the logits; 0 takes the most likely token. Only the ``top_k`` likeliest are drawn from,
    and of ids only those ``below`` a number (a model may know more than its tokenizer). Attention sees the last
    ``max_seq_len`` tokens. Equal arguments give equal tokens: draw i uses random number i of the seed.
    """
    cache = model.new_cache(batch=1)
    for token in prompt[:-1]:
        model.step(np.array([token]), cache)
    tokens = [int(prompt[-1])]
    for draw in rng.uniform(seed, "sample", "token", 0, count):
        logits = to_host(model.step(np.array(tokens[-1:]), cache).data)[0, :below].astype(np.float64)
        tokens.append(_choose(logits, temperature, top_k, float(draw)))
    return np.array(tokens[1:], dtype=np.int64)


def _choose(logits: NDArray[np.float64], temperature: float, top_k: int, draw: float) -> int:
    order = np.argsort(-logits, kind="stable")[:top_k]  # likeliest first, ties by lower id
    if temperature == 0:
        return int(order[0])
    weights = np.exp((logits[order] - logits[order[0]]) / temperature)
    return int(order[np.searchsorted(np.cumsum(weights), draw * weights.sum(), side="right").clip(max=len(order) - 1)])
