"""The output projection and the cross-entropy in one: ``loss = Σ_t (log Σ_v exp(h_t·w_v) - h_t·w_target(t)) / divisor``.

The full logits (tokens × vocabulary: the largest array of a small model by far) never exist. Tokens are taken in chunks;
the gradient of the logits, ``softmax - onehot``, is formed where the logits were and turned into dh and dW in the same
pass, so that the backward pass only multiplies by the incoming scalar (the idea of Wijmans et al. 2024, "Cut your losses",
on a CPU).

The products are made in float32 for 16-bit weights too, also on a device: a logit of 20 rounded to bfloat16 is wrong by up
to 0.06 nats, far more than a step changes the loss.
"""

from __future__ import annotations

import numpy as np

from oxidizr_ref import ops, parallel
from oxidizr_ref.autograd import Function, Tensor
from oxidizr_ref.backend import Array, on_device, to_compute, to_device, xp_of
from oxidizr_ref.fused.register import fused
from oxidizr_ref.fused.rows import row_sums
from oxidizr_ref.kernels import Kernel
from oxidizr_ref.watch import named

#: Logits of one chunk, at most: 128 MiB in float32. Fewer, and a large vocabulary's weight gradient is added to too often.
LOGITS = 1 << 25
#: More than as many tokens, or as many logits, only take memory.
ENOUGH_TOKENS, ENOUGH_LOGITS = 1 << 10, 1 << 22
#: The same on a device (1 GiB), which multiplies so fast that adding to the weight's gradient would take as long.
DEVICE_LOGITS, ENOUGH_DEVICE_TOKENS, ENOUGH_DEVICE_LOGITS = 1 << 28, 1 << 12, 1 << 24
#: Fewer tokens than this in a chunk would leave the matrix products waiting for memory.
FEWEST_TOKENS = 64


def tokens_of_a_chunk(vocabulary: int, on_a_device: bool = False) -> int:
    """How many tokens' logits exist at a time."""
    most, tokens, enough = LOGITS, ENOUGH_TOKENS, ENOUGH_LOGITS
    if on_a_device:
        most, tokens, enough = DEVICE_LOGITS, ENOUGH_DEVICE_TOKENS, ENOUGH_DEVICE_LOGITS
    return max(FEWEST_TOKENS, min(most, max(tokens * vocabulary, enough)) // vocabulary)


def linear_cross_entropy_ref(hidden: Tensor, weight: Tensor, targets: Array, divisor: float) -> Tensor:
    """The same, composed from primitives."""
    logits = named("logits", ops.matmul(hidden, ops.swapaxes(weight, 0, 1)))
    picked = ops.take_along(ops.log_softmax(logits, axis=-1), ids=targets[..., None])
    losses = named("token_losses", -picked.reshape(*targets.shape), also=("targets",))
    return losses.sum() / divisor


class LinearCrossEntropy(Function):
    casts_inputs = False

    def forward(self, hidden: Array, weight: Array, *, targets: Array, divisor: float) -> Array:
        xp, self.shape = xp_of(hidden), hidden.shape
        h, w = to_compute(hidden).reshape(-1, hidden.shape[-1]), to_compute(weight)
        targets = to_device(targets.reshape(-1).astype(np.int64, copy=False), h)
        losses = xp.empty(h.shape[0], dtype=h.dtype)
        dh = xp.empty_like(h) if self.needs[0] else None
        dw = xp.zeros(w.shape, dtype=w.dtype) if self.needs[1] else None

        chunks = parallel.tiles(h.shape[0], tokens_of_a_chunk(w.shape[0], on_device(w)))
        buffer = xp.empty((chunks[0][1] if chunks else 0, w.shape[0]), dtype=h.dtype)
        for i, j in chunks:
            logits = parallel.matmul(h[i:j], w.T, out=buffer[: j - i])  # (1)
            # (2): logits become dlogits, each row times the sum of its exponentials; fewer numbers are divided by it later.
            total = _dlogits_times_total(logits, targets[i:j], losses[i:j])
            if dh is not None:
                parallel.matmul(logits, w, out=dh[i:j])  # (1) logits = h Wᵀ
                dh[i:j] /= total
            if dw is not None:
                parallel.add_matmul(dw, logits.T, h[i:j] / total)
        self.dh, self.dw, self.divisor = dh, dw, divisor
        # A pairwise sum over a contiguous array: its order depends on the length alone.
        return losses.sum() / divisor

    def backward(self, dy: Array) -> tuple[Array | None, ...]:
        factor = dy / self.divisor
        for gradient in (self.dh, self.dw):
            if gradient is not None:
                _scale(gradient, factor)
        return None if self.dh is None else self.dh.reshape(self.shape), self.dw


def _dlogits_times_total(logits: Array, targets: Array, losses: Array) -> Array:
    """Overwrite logits ``[n, vocab]`` by ``total * (softmax - onehot(targets))`` and losses ``[n]`` by the cross-entropies.

    Returns total ``[n, 1]``, the sums of ``exp(logits - their maximum)``.
    """
    xp = xp_of(logits)
    total = xp.empty((len(logits), 1), dtype=logits.dtype)
    if on_device(logits):
        _DLOGITS_TIMES_TOTAL.blocks(len(logits), logits, targets, losses, total, logits.shape[1])
        return total

    def rows(i: int, j: int) -> None:
        tile, at = logits[i:j], (xp.arange(j - i), targets[i:j])
        tile -= tile.max(axis=1, keepdims=True)
        picked = tile[at]
        xp.exp(tile, out=tile)
        sums = row_sums(tile)
        losses[i:j] = xp.log(sums) - picked
        tile[at] -= sums  # each row's target is one element: no index appears twice
        total[i:j, 0] = sums

    parallel.for_tiles(parallel.row_tiles(*logits.shape), rows)
    return total


_DLOGITS_TIMES_TOTAL = Kernel("""
__global__ void dlogits_times_total(T* logits, const long long* targets, T* losses, T* total, long long vocabulary) {
    long long row = blockIdx.x, target = targets[row];
    logits += row * vocabulary;
    T top = logits[0], picked = logits[target];  // read by all threads before any of them writes
    for (long long v = threadIdx.x; v < vocabulary; v += BLOCK) top = logits[v] > top ? logits[v] : top;
    top = block_max(top);
    T sum = 0;
    for (long long v = threadIdx.x; v < vocabulary; v += BLOCK) sum += logits[v] = exp(logits[v] - top);
    sum = block_sum(sum);
    if (threadIdx.x > 0) return;
    losses[row] = log(sum) - (picked - top);
    total[row] = sum;
    logits[target] -= sum;
}
""")


def _scale(x: Array, factor: Array) -> None:
    def rows(i: int, j: int) -> None:
        x[i:j] *= factor

    parallel.for_tiles(parallel.row_tiles(len(x), x.shape[1], like=x), rows)


@fused(linear_cross_entropy_ref)
def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Array, divisor: float) -> Tensor:
    """The sum of the tokens' cross-entropies (nats) over ``divisor``, a scalar.

    hidden: ``[..., width]``; weight: ``[vocab, width]``; targets: int64 ``[...]`` in [0, vocab), on the host.
    """
    return LinearCrossEntropy.apply(hidden, weight, targets=targets, divisor=divisor)
