"""The gate behind a state space scan (Gu & Dao 2023, figure 3): ``out = y ∘ silu(z)`` with ``silu(z) = z * sigmoid(z)``."""

from __future__ import annotations

import math

from oxidizr_ref import ops, parallel
from oxidizr_ref.autograd import Function, Tensor
from oxidizr_ref.backend import Array, xp_of
from oxidizr_ref.fused.register import fused


def silu_gate_ref(y: Tensor, z: Tensor) -> Tensor:
    """The same, composed from primitives."""
    return y * ops.silu(z)


class SiluGate(Function):
    def forward(self, y: Array, z: Array) -> Array:
        xp, width = xp_of(y), math.prod(y.shape[2:])
        self.y, self.z = y, z
        self.places = [
            (b, i, j) for b in range(y.shape[0]) for i, j in parallel.row_tiles(y.shape[1], width, parallel.CACHED)
        ]
        out = xp.empty(y.shape, dtype=y.dtype)

        def rows(index: int) -> None:
            b, i, j = self.places[index]
            tile = out[b, i:j]
            xp.multiply(z[b, i:j], 0.5, out=tile)
            xp.tanh(tile, out=tile)
            tile += 1  # sigmoid(z) = (tanh(z/2) + 1) / 2, which cannot overflow
            tile *= z[b, i:j]
            tile *= y[b, i:j]
            tile *= 0.5

        parallel.for_each(len(self.places), rows)
        return out

    def backward(self, dout: Array) -> tuple[Array, ...]:
        xp, y, z = xp_of(dout), self.y, self.z
        dy, dz = xp.empty(y.shape, dtype=dout.dtype), xp.empty(y.shape, dtype=dout.dtype)

        def rows(index: int) -> None:
            b, i, j = self.places[index]
            # out = y z s, s = sigmoid(z):  dy = dout z s,  dz = dout y s (1 + z (1 - s))
            s = xp.tanh(z[b, i:j] * 0.5)
            s *= 0.5
            s += 0.5
            slope = xp.multiply(1 - s, z[b, i:j], out=dz[b, i:j])
            slope += 1
            slope *= s
            slope *= y[b, i:j]
            slope *= dout[b, i:j]
            s *= z[b, i:j]
            xp.multiply(s, dout[b, i:j], out=dy[b, i:j])

        parallel.for_each(len(self.places), rows)
        return dy, dz


@fused(silu_gate_ref)
def silu_gate(y: Tensor, z: Tensor) -> Tensor:
    """``y ∘ silu(z)``. y, z: ``[B,T,…]`` of equal shape. Returns that shape."""
    return SiluGate.apply(y, z)
