"""Causal depthwise convolution and silu, as every Mamba has them (Gu & Dao 2023, figure 3)::

    pre_t = bias + Σ_k weight_k ∘ x_{t-K+1+k},      y_t = silu(pre_t) = pre_t sigmoid(pre_t)

K weights a channel; what lies before the sequence counts as zero. Kept for the backward pass: x; ``pre`` is computed again.
"""

from __future__ import annotations

import math

from oxidizr_ref import ops, parallel
from oxidizr_ref.autograd import Function, Tensor
from oxidizr_ref.backend import Array, xp_of
from oxidizr_ref.fused.register import fused
from oxidizr_ref.fused.rows import column_sums
from oxidizr_ref.kernels import Kernel
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


@CausalConv.on_device
class CausalConvKernels(Function):
    """The same as kernels: one thread for one channel of one token, neighbouring threads for neighbouring channels."""

    def forward(self, x: Array, weight: Array, bias: Array) -> Array:
        xp, (_, T, C), K = xp_of(x), x.shape, weight.shape[2]
        self.x = xp.ascontiguousarray(x)
        self.half_weight, self.half_bias = xp.ascontiguousarray(weight[:, 0].T) * 0.5, bias * 0.5  # [K,C], [C]
        y = xp.empty_like(self.x)
        _FORWARD.threads(y.size, self.x, self.half_weight, self.half_bias, y, y.size, T, C, K)
        return y

    def backward(self, dy: Array) -> tuple[Array, ...]:
        xp, x, w, (B, T, C), K = xp_of(dy), self.x, self.half_weight, self.x.shape, len(self.half_weight)
        dh, dx = xp.empty_like(x), xp.empty_like(x)  # dh = 2 dpre
        _BEFORE.threads(x.size, xp.ascontiguousarray(dy), x, w, self.half_bias, dh, x.size, T, C, K)
        _INPUT.threads(x.size, dh, w, dx, x.size, T, C, K)
        # dweight and dbias are sums over all tokens: over pieces of the sequences first, about as many as tokens in each.
        piece = max(1, min(T, math.isqrt(B * T)))
        pieces = -(-T // piece)
        parts = xp.empty((B * pieces, K + 1, C), dtype=dy.dtype)  # the last of K + 1 rows is the bias's
        _WEIGHT.threads(parts.size, dh, x, parts, parts.size, T, C, K, piece, pieces)
        dweight, dbias = xp.empty((C, 1, K), dtype=dy.dtype), xp.empty(C, dtype=dy.dtype)
        _TOTAL.threads((K + 1) * C, parts, dweight, dbias, len(parts), C, K)
        return dx, dweight, dbias


#: pre / 2 of one number of y.
_HALF_PRE = """
__device__ inline T half_pre(const T* x, const T* half_weight, const T* half_bias, long long at,
                             long long time, long long channels, long long kernel) {
    long long c = at % channels, t = at / channels % time;
    T h = half_bias[c];
    for (long long k = 0, s = t - kernel + 1; k < kernel; k++, s++)
        if (s >= 0) h += half_weight[k * channels + c] * x[at + (s - t) * channels];
    return h;
}
"""

_FORWARD = Kernel(
    """
__global__ void causal_conv(const T* x, const T* half_weight, const T* half_bias, T* y,
                            long long count, long long time, long long channels, long long kernel) {
    if (THREAD >= count) return;
    T h = half_pre(x, half_weight, half_bias, THREAD, time, channels, kernel);
    y[THREAD] = (1 + tanh(h)) * h;
}
""",
    before=_HALF_PRE,
)

_BEFORE = Kernel(
    """
__global__ void causal_conv_dh(const T* dy, const T* x, const T* half_weight, const T* half_bias, T* dh,
                               long long count, long long time, long long channels, long long kernel) {
    if (THREAD >= count) return;
    T h = half_pre(x, half_weight, half_bias, THREAD, time, channels, kernel);
    // y = (1 + tanh(h)) h
    T tan_h = tanh(h), silu = (1 + tan_h) * h;
    dh[THREAD] = (1 + tan_h + silu - tan_h * silu) * dy[THREAD];
}
""",
    before=_HALF_PRE,
)

_INPUT = Kernel("""
__global__ void causal_conv_dx(const T* dh, const T* half_weight, T* dx,
                               long long count, long long time, long long channels, long long kernel) {
    if (THREAD >= count) return;
    long long c = THREAD % channels, t = THREAD / channels % time;
    T sum = 0;
    // h_t = (bias + Σ_k weight_k ∘ x_{t-K+1+k}) / 2: x_t is read at the times s = t + K-1-k
    for (long long k = 0, s = t + kernel - 1; k < kernel; k++, s--)
        if (s < time) sum += half_weight[k * channels + c] * dh[THREAD + (s - t) * channels];
    dx[THREAD] = sum;
}
""")

_WEIGHT = Kernel("""
__global__ void causal_conv_dweight(const T* dh, const T* x, T* parts, long long count, long long time,
                                    long long channels, long long kernel, long long piece, long long pieces) {
    if (THREAD >= count) return;
    long long c = THREAD % channels, k = THREAD / channels % (kernel + 1), part = THREAD / channels / (kernel + 1);
    long long begin = part % pieces * piece, end = begin + piece < time ? begin + piece : time;
    long long back = k < kernel ? kernel - 1 - k : 0;  // how long before its output an input stands
    dh += part / pieces * time * channels + c, x += part / pieces * time * channels + c;
    T sum = 0;
    for (long long t = begin > back ? begin : back; t < end; t++)
        sum += k < kernel ? dh[t * channels] * x[(t - back) * channels] : dh[t * channels];
    parts[THREAD] = sum;
}
""")

_TOTAL = Kernel("""
__global__ void causal_conv_dweight_total(const T* parts, T* dweight, T* dbias,
                                          long long count, long long channels, long long kernel) {
    long long rows = kernel + 1, k = THREAD / channels, c = THREAD % channels;
    if (k >= rows) return;
    T sum = 0;
    for (long long part = 0; part < count; part++) sum += parts[part * rows * channels + THREAD];
    sum *= (T)0.5;
    if (k < kernel) dweight[c * kernel + k] = sum;
    else dbias[c] = sum;
}
""")


@fused(causal_conv_ref)
def causal_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The convolution with its silu. x: ``[B,T,C]``; weight: ``[C,1,K]``, the last one for the present; bias: ``[C]``.

    Returns ``[B,T,C]``.
    """
    return CausalConv.apply(x, weight, bias)
