"""Root-mean-square normalization (Zhang & Sennrich 2019, eq. 4): ``y = x / sqrt(mean(x²) + eps) * weight``.

The mean runs over the last axis, or over each of several equal groups of its channels (as in Mamba2). Kept for the backward
pass: x and one number a group, ``rstd = 1 / sqrt(mean(x²) + eps)``. What is normalized is recomputed.
"""

from __future__ import annotations

from oxidizr_ref import ops, parallel
from oxidizr_ref.autograd import Function, Tensor
from oxidizr_ref.backend import Array, xp_of
from oxidizr_ref.fused.register import fused
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


@fused(rms_norm_ref)
def rms_norm(x: Tensor, weight: Tensor, eps: float, groups: int = 1) -> Tensor:
    """Normalize each of ``groups`` parts of the last axis of x ``[..., width]`` and scale by weight ``[width]``.

    Returns the shape of x.
    """
    return RMSNorm.apply(x, weight, eps=eps, groups=groups)
