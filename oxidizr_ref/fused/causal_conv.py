"""Causal depthwise convolution and silu, as every Mamba has them (Gu & Dao 2023, figure 3)::

    pre_t = bias + Σ_k weight_k ∘ x_{t-K+1+k},      y_t = silu(pre_t) = pre_t sigmoid(pre_t)

K weights a channel; what lies before the sequence counts as zero. Kept for the backward pass: x; ``pre`` is computed again.
"""

from __future__ import annotations

from oxidizr_ref import ops, parallel
from oxidizr_ref.autograd import Function, Tensor
from oxidizr_ref.backend import Array, xp_of
from oxidizr_ref.fused.register import fused
from oxidizr_ref.fused.rows import column_sums
from oxidizr_ref.watch import named


def causal_conv_ref(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The same, composed from primitives."""
    T, K = x.shape[1], weight.shape[2]
    padded = ops.pad(x, widths=((0, 0), (K - 1, 0), (0, 0)))
    pre = padded[:, :T] * weight[:, 0, 0] + bias
    for k in range(1, K):
        pre = pre + padded[:, k : k + T] * weight[:, 0, k]
    return ops.silu(named("pre", pre))


class CausalConv(Function):
    """With h = pre/2 and t = tanh(h), in which no exponential can overflow: ``y = (1 + t) h``."""

    def forward(self, x: Array, weight: Array, bias: Array) -> Array:
        xp, (B, T, C) = xp_of(x), x.shape
        self.x, self.half_weight, self.half_bias = x, xp.ascontiguousarray(weight[:, 0].T) * 0.5, bias * 0.5  # [K,C], [C]
        self.places = [(b, i, j) for b in range(B) for i, j in parallel.row_tiles(T, C, parallel.CACHED)]
        y = xp.empty(x.shape, dtype=x.dtype)

        def rows(index: int) -> None:
            b, i, j = self.places[index]
            h = self._convolve(b, i, j)
            tile = xp.tanh(h, out=y[b, i:j])
            tile += 1
            tile *= h

        parallel.for_each(len(self.places), rows)
        return y

    def backward(self, dy: Array) -> tuple[Array, ...]:
        xp, x, w, K = xp_of(dy), self.x, self.half_weight, len(self.half_weight)
        dh, dx = xp.empty(x.shape, dtype=dy.dtype), xp.empty(x.shape, dtype=dy.dtype)  # dh = 2 dpre
        dweights = xp.zeros((len(self.places), K + 1, w.shape[1]), dtype=dy.dtype)  # a tile's; the last row is the bias's

        def before(index: int) -> None:
            b, i, j = self.places[index]
            # y = (1 + t) h:  dh = dy ((1 + t) + y (1 - t)), as t' = (1 + t) (1 - t)
            h = self._convolve(b, i, j)
            t = xp.tanh(h)
            tile = xp.add(t, 1, out=dh[b, i:j])
            h *= tile
            t *= h
            tile += h
            tile -= t
            tile *= dy[b, i:j]
            # h_t = (bias + Σ_k weight_k ∘ x_{t-K+1+k}) / 2
            for k in range(K):
                first = max(0, K - 1 - k - i)  # rows of the tile whose input lies before the sequence
                earlier = x[b, i + first - K + 1 + k : max(0, j - K + 1 + k)]
                dweights[index, k] = xp.einsum("tc,tc->c", tile[first:], earlier)
            dweights[index, K] = column_sums(tile)[0]

        def inputs(index: int) -> None:
            b, i, j = self.places[index]
            tile = xp.multiply(dh[b, i:j], w[K - 1], out=dx[b, i:j])
            for k in range(K - 1):
                later = dh[b, i + K - 1 - k : j + K - 1 - k]
                tile[: len(later)] += later * w[k]

        parallel.for_each(len(self.places), before)
        parallel.for_each(len(self.places), inputs)
        total = parallel.tree_sum([xp.zeros(dweights.shape[1:], dtype=dy.dtype), *dweights]) * 0.5
        return dx, xp.ascontiguousarray(total[:K].T)[:, None], total[K].copy()

    def _convolve(self, b: int, i: int, j: int) -> Array:
        """``pre / 2`` of rows i … j-1 of sequence b."""
        x, w, K = self.x[b], self.half_weight, len(self.half_weight)
        h = x[i:j] * w[K - 1]
        h += self.half_bias
        for k in range(K - 1):
            earlier = x[max(0, i - K + 1 + k) : max(0, j - K + 1 + k)]
            h[len(h) - len(earlier) :] += earlier * w[k]
        return h


@fused(causal_conv_ref)
def causal_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The convolution with its silu. x: ``[B,T,C]``; weight: ``[C,1,K]``, the last one for the present; bias: ``[C]``.

    Returns ``[B,T,C]``.
    """
    return CausalConv.apply(x, weight, bias)
