"""The gate behind a state space scan (Gu & Dao 2023, figure 3): ``out = y ∘ silu(z)`` with ``silu(z) = z * sigmoid(z)``."""

from __future__ import annotations

import math

from oxidizr_ref import ops, parallel
from oxidizr_ref.autograd import Function, Tensor
from oxidizr_ref.backend import Array, xp_of
from oxidizr_ref.fused.register import fused
from oxidizr_ref.kernels import Kernel


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
            # With h = z/2, silu(z) = (1 + tanh(h)) h, in which no exponential can overflow.
            h = z[b, i:j] * 0.5
            tile = xp.tanh(h, out=out[b, i:j])
            tile += 1
            tile *= h
            tile *= y[b, i:j]

        parallel.for_each(len(self.places), rows)
        return out

    def backward(self, dout: Array) -> tuple[Array, ...]:
        xp, y, z = xp_of(dout), self.y, self.z
        dy, dz = xp.empty(y.shape, dtype=dout.dtype), xp.empty(y.shape, dtype=dout.dtype)

        def rows(index: int) -> None:
            b, i, j = self.places[index]
            # out = y silu(z):  dy = dout silu(z),  dz = dout y silu'(z);  with t = tanh(h) and silu = (1 + t) h:
            # silu'(z) = ((1 + t) + silu (1 - t)) / 2
            h = z[b, i:j] * 0.5
            t = xp.tanh(h)
            slope = xp.add(t, 1, out=dz[b, i:j])
            silu = xp.multiply(slope, h, out=h)
            xp.multiply(silu, dout[b, i:j], out=dy[b, i:j])
            t *= silu
            slope += silu
            slope -= t
            slope *= y[b, i:j]
            slope *= dout[b, i:j]
            slope *= 0.5

        parallel.for_each(len(self.places), rows)
        return dy, dz


@SiluGate.on_device
class SiluGateKernels(Function):
    """The same as kernels, element by element. y and z may be parts of a projection: kernels need copies of those."""

    def forward(self, y: Array, z: Array) -> Array:
        xp = xp_of(y)
        self.y, self.z = xp.ascontiguousarray(y), xp.ascontiguousarray(z)
        out = xp.empty_like(self.y)
        _FORWARD.threads(out.size, self.y, self.z, out, out.size)
        return out

    def backward(self, dout: Array) -> tuple[Array, ...]:
        xp = xp_of(dout)
        dy, dz = xp.empty_like(self.y), xp.empty_like(self.z)
        _BACKWARD.threads(dout.size, xp.ascontiguousarray(dout), self.y, self.z, dy, dz, dout.size)
        return dy, dz


_FORWARD = Kernel("""
__global__ void silu_gate(const T* y, const T* z, T* out, long long count) {
    if (THREAD >= count) return;
    T h = z[THREAD] * (T)0.5;
    out[THREAD] = (1 + tanh(h)) * h * y[THREAD];
}
""")

_BACKWARD = Kernel("""
__global__ void silu_gate_backward(const T* dout, const T* y, const T* z, T* dy, T* dz, long long count) {
    if (THREAD >= count) return;
    T h = z[THREAD] * (T)0.5, d = dout[THREAD], t = tanh(h), silu = (1 + t) * h;
    dy[THREAD] = silu * d;
    dz[THREAD] = (1 + t + silu - t * silu) * (T)0.5 * y[THREAD] * d;  // dz = dout y silu'(z)
}
""")


@fused(silu_gate_ref)
def silu_gate(y: Tensor, z: Tensor) -> Tensor:
    """``y ∘ silu(z)``. y, z: ``[B,T,…]`` of equal shape. Returns that shape."""
    return SiluGate.apply(y, z)
