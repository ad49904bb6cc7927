"""Root-mean-square normalization (Zhang & Sennrich 2019, eq. 4): ``y = x / sqrt(mean(x²) + eps) * weight``.

The mean runs over the last axis, or over each of several equal groups of its channels (as in Mamba2). Kept for the backward
pass: x and one number a group, ``rstd = 1 / sqrt(mean(x²) + eps)``. What is normalized is recomputed.
"""

from __future__ import annotations

import math

from oxidizr_ref import ops, parallel
from oxidizr_ref.autograd import Function, Tensor
from oxidizr_ref.backend import Array, xp_of
from oxidizr_ref.fused.register import fused
from oxidizr_ref.kernels import Kernel
from oxidizr_ref.watch import named


def rms_norm_ref(x: Tensor, weight: Tensor, eps: float, groups: int = 1) -> Tensor:
    """The same, composed from primitives."""
    parts = x.reshape(*x.shape[:-1], groups, x.shape[-1] // groups)
    rms = named("rms", ops.sqrt((parts * parts).mean(axis=-1, keepdims=True) + eps))  # [...,groups,1]
    return (parts / rms).reshape(*x.shape) * weight


class RMSNorm(Function):
    def forward(self, x: Array, weight: Array, *, eps: float, groups: int) -> Array:
        xp, shape, width = xp_of(x), x.shape, x.shape[-1] // groups
        x, weight = xp.ascontiguousarray(x.reshape(-1, groups, width)), weight.reshape(groups, width)
        y = xp.empty_like(x)
        rstd = xp.empty((x.shape[0], groups, 1), dtype=x.dtype)

        def rows(i: int, j: int) -> None:
            rstd[i:j, :, 0] = 1 / xp.sqrt(xp.vecdot(x[i:j], x[i:j]) / width + eps)  # (1)
            tile = xp.multiply(x[i:j], rstd[i:j], out=y[i:j])  # (2) xhat
            tile *= weight  # (3)

        self.tiles = parallel.row_tiles(x.shape[0], groups * width)
        parallel.for_tiles(self.tiles, rows)
        self.x, self.rstd, self.weight = x, rstd, weight
        return y.reshape(shape)

    def backward(self, dy: Array) -> tuple[Array, ...]:
        xp, x, rstd, weight = xp_of(dy), self.x, self.rstd, self.weight
        shape, width = dy.shape, x.shape[-1]
        dy = xp.ascontiguousarray(dy.reshape(x.shape))
        dx = xp.empty_like(x)
        dweights: list[Array] = [None] * len(self.tiles)

        def rows(index: int) -> None:
            i, j = self.tiles[index]
            # (3) y = xhat * weight, xhat = x * rstd: the sum over rows of dy * x * rstd, as one product a group
            along = dy[i:j] * x[i:j]
            dweights[index] = xp.matmul(rstd[i:j].transpose(1, 2, 0), along.transpose(1, 0, 2))[:, 0]
            # (2), (1): dx = rstd * (dxhat - xhat * mean(dxhat * xhat)); the part of dxhat along xhat is lost
            lost = xp.vecdot(along, weight)[..., None]
            lost *= rstd[i:j] ** 3 / width
            tile = xp.multiply(dy[i:j], weight, out=dx[i:j])
            tile *= rstd[i:j]
            tile -= xp.multiply(x[i:j], lost, out=along)

        parallel.for_each(len(self.tiles), rows)
        dweight = parallel.tree_sum(dweights) if dweights else xp.zeros_like(weight)
        return dx.reshape(shape), dweight.reshape(-1)


@RMSNorm.on_device
class RMSNormKernels(Function):
    """The same as kernels. One block does one group of one row."""

    def forward(self, x: Array, weight: Array, *, eps: float, groups: int) -> Array:
        xp, shape, width = xp_of(x), x.shape, x.shape[-1] // groups
        x, weight = xp.ascontiguousarray(x.reshape(-1, groups, width)), xp.ascontiguousarray(weight)
        y = xp.empty_like(x)
        rstd = xp.empty((x.shape[0], groups, 1), dtype=x.dtype)
        _FORWARD.blocks(rstd.size, x, weight, y, rstd, groups, width, eps)
        self.x, self.rstd, self.weight = x, rstd, weight
        return y.reshape(shape)

    def backward(self, dy: Array) -> tuple[Array, ...]:
        xp, x, rstd, weight = xp_of(dy), self.x, self.rstd, self.weight
        shape, (rows, groups, width), channels = dy.shape, x.shape, weight.size
        dy = xp.ascontiguousarray(dy.reshape(x.shape))
        dx, dweight = xp.empty_like(x), xp.empty_like(weight)
        _INPUT.blocks(rstd.size, dy, x, rstd, weight, dx, groups, width)
        # dweight is a sum over all rows: over pieces of them first, as many pieces as rows in each.
        piece = max(1, math.isqrt(rows))
        parts = xp.empty((-(-rows // piece), channels), dtype=x.dtype)
        _WEIGHT.threads(parts.size, dy, x, rstd, parts, rows, piece, groups, width)
        _TOTAL.threads(channels, parts, dweight, len(parts), channels)
        return dx.reshape(shape), dweight


_FORWARD = Kernel(
    """
__global__ void rms_norm(const T* x, const T* weight, T* y, T* rstd, long long groups, long long width, T eps) {
    long long row = blockIdx.x;
    x += row * width, y += row * width, weight += row % groups * width;
    T squares = 0;
    for (long long c = threadIdx.x; c < width; c += BLOCK) squares += x[c] * x[c];
    T r = 1 / sqrt(block_sum(squares) / width + eps);  // (1)
    if (threadIdx.x == 0) rstd[row] = r;
    for (long long c = threadIdx.x; c < width; c += BLOCK) y[c] = x[c] * r * weight[c];  // (2), (3)
}
""",
    block=128,
)

_INPUT = Kernel(
    """
__global__ void rms_norm_dx(const T* dy, const T* x, const T* rstd, const T* weight, T* dx,
                            long long groups, long long width) {
    long long row = blockIdx.x;
    dy += row * width, x += row * width, dx += row * width, weight += row % groups * width;
    T along = 0, r = rstd[row];
    for (long long c = threadIdx.x; c < width; c += BLOCK) along += dy[c] * x[c] * weight[c];
    // (2), (1): dx = rstd * (dxhat - xhat * mean(dxhat * xhat))
    T lost = block_sum(along) * (r * r * r / width);
    for (long long c = threadIdx.x; c < width; c += BLOCK) dx[c] = dy[c] * weight[c] * r - x[c] * lost;
}
""",
    block=128,
)

_WEIGHT = Kernel("""
__global__ void rms_norm_dweight(const T* dy, const T* x, const T* rstd, T* parts,
                                 long long rows, long long piece, long long groups, long long width) {
    long long channels = groups * width, part = THREAD / channels, c = THREAD % channels, begin = part * piece;
    if (begin >= rows) return;
    long long end = begin + piece < rows ? begin + piece : rows;
    T sum = 0;
    // (3) y = xhat * weight, xhat = x * rstd
    rstd += c / width;
    for (long long row = begin; row < end; row++)
        sum += dy[row * channels + c] * x[row * channels + c] * rstd[row * groups];
    parts[part * channels + c] = sum;
}
""")

_TOTAL = Kernel("""
__global__ void rms_norm_dweight_total(const T* parts, T* dweight, long long count, long long channels) {
    if (THREAD >= channels) return;
    T sum = 0;
    for (long long part = 0; part < count; part++) sum += parts[part * channels + THREAD];
    dweight[THREAD] = sum;
}
""")


@fused(rms_norm_ref)
def rms_norm(x: Tensor, weight: Tensor, eps: float, groups: int = 1) -> Tensor:
    """Normalize each of ``groups`` parts of the last axis of x ``[..., width]`` and scale by weight ``[width]``.

    Returns the shape of x.
    """
    return RMSNorm.apply(x, weight, eps=eps, groups=groups)
