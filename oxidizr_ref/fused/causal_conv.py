"""Causal depthwise convolution and silu, as every Mamba has them (Gu & Dao 2023, figure 3)::

    pre_t = bias + Σ_k weight_k ∘ x_{t-K+1+k},      y_t = silu(pre_t) = pre_t sigmoid(pre_t)

K weights a channel; what lies before the sequence counts as zero. Kept for the backward pass: x; ``pre`` is computed again.
"""

from __future__ import annotations

from oxidizr_ref import ops, parallel
from oxidizr_ref.autograd import Function, Tensor
from oxidizr_ref.backend import Array, xp_of
from oxidizr_ref.fused.register import fused
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
    def forward(self, x: Array, weight: Array, bias: Array) -> Array:
        xp, (B, T, C) = xp_of(x), x.shape
        self.x, self.weight, self.bias = x, xp.ascontiguousarray(weight[:, 0].T), bias  # [K,C]
        self.places = [(b, i, j) for b in range(B) for i, j in parallel.row_tiles(T, C, parallel.CACHED)]
        y = xp.empty(x.shape, dtype=x.dtype)

        def rows(index: int) -> None:
            b, i, j = self.places[index]
            pre = self._convolve(b, i, j)
            xp.multiply(pre, _sigmoid(pre), out=y[b, i:j])

        parallel.for_each(len(self.places), rows)
        return y

    def backward(self, dy: Array) -> tuple[Array, ...]:
        xp, x, w, K = xp_of(dy), self.x, self.weight, len(self.weight)
        dpre, dx = xp.empty(x.shape, dtype=dy.dtype), xp.empty(x.shape, dtype=dy.dtype)
        dweights = xp.zeros((len(self.places), K + 1, w.shape[1]), dtype=dy.dtype)  # a tile's; the last row is the bias's

        def before(index: int) -> None:
            b, i, j = self.places[index]
            # y = pre s, s = sigmoid(pre):  dpre = dy s (1 + pre (1 - s))
            pre = self._convolve(b, i, j)
            s = _sigmoid(pre)
            pre *= 1 - s
            pre += 1
            pre *= s
            tile = xp.multiply(pre, dy[b, i:j], out=dpre[b, i:j])
            # pre_t = bias + Σ_k weight_k ∘ x_{t-K+1+k}
            for k in range(K):
                first = max(0, K - 1 - k - i)  # rows of the tile whose input lies before the sequence
                dweights[index, k] = (tile[first:] * x[b, i + first - K + 1 + k : max(0, j - K + 1 + k)]).sum(axis=0)
            dweights[index, K] = tile.sum(axis=0)

        def inputs(index: int) -> None:
            b, i, j = self.places[index]
            tile = xp.multiply(dpre[b, i:j], w[K - 1], out=dx[b, i:j])
            for k in range(K - 1):
                later = dpre[b, i + K - 1 - k : j + K - 1 - k]
                tile[: len(later)] += later * w[k]

        parallel.for_each(len(self.places), before)
        parallel.for_each(len(self.places), inputs)
        total = parallel.tree_sum([xp.zeros(dweights.shape[1:], dtype=dy.dtype), *dweights])
        return dx, xp.ascontiguousarray(total[:K].T)[:, None], total[K].copy()

    def _convolve(self, b: int, i: int, j: int) -> Array:
        """``pre`` of rows i … j-1 of sequence b."""
        x, w, K = self.x[b], self.weight, len(self.weight)
        pre = x[i:j] * w[K - 1]
        pre += self.bias
        for k in range(K - 1):
            earlier = x[max(0, i - K + 1 + k) : max(0, j - K + 1 + k)]
            pre[len(pre) - len(earlier) :] += earlier * w[k]
        return pre


def _sigmoid(x: Array) -> Array:
    """With tanh no exponential can overflow."""
    s = xp_of(x).tanh(x * 0.5)
    s *= 0.5
    s += 0.5
    return s


@fused(causal_conv_ref)
def causal_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The convolution with its silu. x: ``[B,T,C]``; weight: ``[C,1,K]``, the last one for the present; bias: ``[C]``.

    Returns ``[B,T,C]``.
    """
    return CausalConv.apply(x, weight, bias)
