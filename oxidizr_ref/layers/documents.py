"""Documents kept apart: whatever mixes tokens along time (attention, a scan, a convolution) sees one document at a time.

The tokens of a batch are laid out anew, a document a row, padded behind its end; what mixes reads the rows, and its outputs
are put back. Nothing leaks, for attention and every Mamba alike, because they are causal: what stands behind a token changes
nothing before it. Rows are as long as a power of two, or as a window, so that a short document is not padded to
the longest one's length.

Shapes: B batch, T time, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from oxidizr_ref import ops
from oxidizr_ref.autograd import Tensor


class Documents:
    """Where the tokens of a batch stand when each document is a row. begins: bool ``[B,T]``; each window begins one anyway.

    ``rows``: for each length of rows int ``[rows,length]``, the places in the batch of their tokens, behind the end of a
    document those of its last one; ``back``: for each place in the batch, where its token is in all rows together.
    """

    def __init__(self, begins: np.ndarray[Any, Any]) -> None:
        begins = begins.copy()
        begins[:, 0] = True
        starts = np.flatnonzero(begins)
        lengths = np.diff(starts, append=begins.size)
        self.rows: list[np.ndarray[Any, Any]] = []
        self.back, laid_out = np.empty(begins.size, dtype=np.int64), 0
        sizes = np.minimum(np.left_shift(1, np.ceil(np.log2(lengths)).astype(np.int64)), begins.shape[1])
        for size in np.unique(sizes).tolist():
            chosen = sizes == size
            offsets = np.arange(size)
            places = starts[chosen, None] + np.minimum(offsets, lengths[chosen, None] - 1)
            real = offsets < lengths[chosen, None]
            self.back[places[real]] = laid_out + np.flatnonzero(real)
            self.rows.append(places)
            laid_out += places.size


def apart(mix: Callable[[Tensor], Tensor], x: Tensor, documents: Documents | None) -> Tensor:
    """``mix(x)``, for each document by itself. x: ``[B,T,D]``. Returns the same shape."""
    if documents is None:
        return mix(x)
    flat = x.reshape(-1, x.shape[2])
    outputs = [mix(ops.lookup(flat, ids=places)).reshape(-1, x.shape[2]) for places in documents.rows]
    return ops.lookup(ops.concatenate(*outputs, axis=0), ids=documents.back).reshape(*x.shape)
