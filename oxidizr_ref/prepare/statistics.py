"""What `prepare --stats` counts while tokens are written: which ids are used, how long documents are."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from oxidizr_ref.tokenizers import Tokenizer

_MOST_FREQUENT = 10


class Statistics:
    """Counts of ids and of lengths of documents, and the size of the text they were made of (bytes of UTF-8).

    text_bytes 0: they were tokens already.
    """

    def __init__(self, vocab_size: int) -> None:
        self.counts = np.zeros(vocab_size, dtype=np.int64)
        self.text_bytes = 0
        self.longest = 0
        self._lengths = [0] * 65  # of documents with 2^(i-1) … 2^i - 1 tokens

    def take(self, ids: NDArray[Any]) -> None:
        """Tokens are written."""
        counts = np.bincount(ids)
        self.counts[: counts.size] += counts

    def take_document(self, tokens: int) -> None:
        """A document of this many tokens, without its end-of-text token, is over."""
        self.longest = max(self.longest, tokens)
        self._lengths[tokens.bit_length()] += 1

    def summary(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """All of it, JSON-able. histogram: [fewest tokens, most tokens, documents] by powers of two; bytes None: unknown."""
        tokens, used = int(self.counts.sum()), int(np.count_nonzero(self.counts))
        octets = self.text_bytes or None
        by_count = np.argsort(-self.counts, kind="stable")[: min(used, _MOST_FREQUENT)].tolist()
        return {
            "tokens": tokens,
            "bytes": octets,
            "bytes_per_token": octets and octets / tokens,
            "documents": sum(self._lengths),
            "longest_document": self.longest,
            "ids_used": used,
            "vocab_size": self.counts.size,
            "most_frequent": [{"id": i, "text": tokenizer.decode([i]), "count": int(self.counts[i])} for i in by_count],
            "histogram": [[1 << i - 1, (1 << i) - 1, n] for i, n in enumerate(self._lengths) if n],
        }
