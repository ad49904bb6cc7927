"""Root-mean-square normalization (Zhang & Sennrich 2019, eq. 4): ``y = x / sqrt(mean(x²) + eps) * weight``.

Kept for the backward pass: x and one number a row, ``rstd = 1 / sqrt(mean(x²) + eps)``. What is normalized is recomputed.
"""

from __future__ import annotations

from oxidizr_ref import ops, parallel
from oxidizr_ref.autograd import Function, Tensor
from oxidizr_ref.backend import Array, xp_of
from oxidizr_ref.fused.register import fused


def rms_norm_ref(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The same, composed from primitives."""
    return x / ops.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * weight


class RMSNorm(Function):
    def forward(self, x: Array, weight: Array, *, eps: float) -> Array:
        xp, shape, width = xp_of(x), x.shape, x.shape[-1]
        x = xp.ascontiguousarray(x.reshape(-1, width))
        y = xp.empty_like(x)
        rstd = xp.empty((x.shape[0], 1), dtype=x.dtype)

        def rows(i: int, j: int) -> None:
            tile = xp.multiply(x[i:j], x[i:j], out=y[i:j])  # y is scratch until (2)
            rstd[i:j, 0] = 1 / xp.sqrt(tile.sum(axis=1) / width + eps)  # (1)
            xp.multiply(x[i:j], rstd[i:j], out=tile)  # (2) xhat
            tile *= weight  # (3)

        self.tiles = parallel.row_tiles(x.shape[0], width)
        parallel.for_tiles(self.tiles, rows)
        self.x, self.rstd, self.weight = x, rstd, weight
        return y.reshape(shape)

    def backward(self, dy: Array) -> tuple[Array, ...]:
        xp, x, rstd, weight = xp_of(dy), self.x, self.rstd, self.weight
        shape, width = dy.shape, dy.shape[-1]
        dy = xp.ascontiguousarray(dy.reshape(-1, width))
        dx = xp.empty_like(x)
        dweights: list[Array] = [None] * len(self.tiles)

        def rows(index: int) -> None:
            i, j = self.tiles[index]
            xhat = x[i:j] * rstd[i:j]
            dweights[index] = (dy[i:j] * xhat).sum(axis=0)  # (3) y = xhat * weight
            dxhat = xp.multiply(dy[i:j], weight, out=dx[i:j])
            # (2), (1) xhat = x * rstd(x): the part of dxhat along xhat is lost to the normalization
            xhat *= (dxhat * xhat).sum(axis=1, keepdims=True) / width
            dxhat -= xhat
            dxhat *= rstd[i:j]

        parallel.for_each(len(self.tiles), rows)
        dweight = parallel.tree_sum(dweights) if dweights else xp.zeros_like(weight)
        return dx.reshape(shape), dweight


@fused(rms_norm_ref)
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalize the last axis of x ``[..., width]`` and scale it by weight ``[width]``. Returns the shape of x."""
    return RMSNorm.apply(x, weight, eps=eps)
