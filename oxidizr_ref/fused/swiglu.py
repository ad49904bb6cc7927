"""The SwiGLU feed-forward (Shazeer 2020, eq. 6): ``y = (silu(x Wgᵀ) ∘ (x Wuᵀ)) Wdᵀ`` with ``silu(v) = v * sigmoid(v)``.

One tile of rows goes through the whole chain while it is in the cache. Kept for the backward pass: x, gate and up; the
activation ``silu(gate) * up`` is cheaper to recompute than to keep.
"""

from __future__ import annotations

from oxidizr_ref import ops, parallel
from oxidizr_ref.autograd import Function, Tensor
from oxidizr_ref.backend import Array, to_compute, xp_of
from oxidizr_ref.fused.register import fused
from oxidizr_ref.watch import named


def swiglu_ref(x: Tensor, gate_weight: Tensor, up_weight: Tensor, down_weight: Tensor) -> Tensor:
    """The same, composed from primitives."""
    gate = named("gate_proj.output", ops.matmul(x, ops.swapaxes(gate_weight, 0, 1)))
    up = named("up_proj.output", ops.matmul(x, ops.swapaxes(up_weight, 0, 1)))
    activation = named("activation", ops.silu(gate) * up)
    return ops.matmul(activation, ops.swapaxes(down_weight, 0, 1))


class SwiGLU(Function):
    casts_inputs = False

    def forward(self, x: Array, gate_weight: Array, up_weight: Array, down_weight: Array) -> Array:
        xp, shape = xp_of(x), x.shape
        self.weights = gate_weight, up_weight, down_weight
        wg, wu, wd = (to_compute(weight) for weight in self.weights)
        x = to_compute(x).reshape(-1, shape[-1])
        gate, up = (xp.empty((x.shape[0], wg.shape[0]), dtype=x.dtype) for _ in range(2))
        y = xp.empty((x.shape[0], wd.shape[0]), dtype=x.dtype)

        def rows(i: int, j: int) -> None:
            xp.matmul(x[i:j], wg.T, out=gate[i:j])  # (1)
            xp.matmul(x[i:j], wu.T, out=up[i:j])  # (2)
            xp.matmul(_activation(gate[i:j], up[i:j]), wd.T, out=y[i:j])  # (3), (4)

        parallel.for_tiles(_tiles(x, wd), rows)
        self.x, self.gate, self.up = x, gate, up
        return y.reshape(*shape[:-1], wd.shape[0])

    def backward(self, dy: Array) -> tuple[Array, ...]:
        xp, shape, x, gate, up = xp_of(dy), dy.shape, self.x, self.gate, self.up
        wg, wu, wd = (to_compute(weight) for weight in self.weights)
        dy = dy.reshape(-1, shape[-1])
        activation, dx = xp.empty_like(gate), xp.empty_like(x)

        def rows(i: int, j: int) -> None:
            xp.matmul(dy[i:j], wd, out=activation[i:j])  # (4) y = activation Wdᵀ
            # (3) activation = silu(gate) * up: computed again, its gradients take the place of gate and up
            _activation_backward(activation[i:j], gate[i:j], up[i:j])
            xp.matmul(gate[i:j], wg, out=dx[i:j])  # (1) gate = x Wgᵀ
            dx[i:j] += xp.matmul(up[i:j], wu)  # (2) up = x Wuᵀ

        parallel.for_tiles(_tiles(x, wd), rows)
        dgate, dup = gate, up
        return (dx.reshape(*shape[:-1], x.shape[1]), *parallel.matmuls((dgate.T, x), (dup.T, x), (dy.T, activation)))


def _tiles(x: Array, wd: Array) -> list[parallel.Tile]:
    return parallel.product_tiles(x.shape[0], 3 * wd.size)


def _activation(gate: Array, up: Array) -> Array:
    """``silu(gate) * up``. With h = gate/2 it is ``(1 + tanh(h)) * h * up``, in which no exponential can overflow."""
    xp = xp_of(gate)
    out = xp.empty_like(gate)
    for i, j in parallel.row_tiles(gate.shape[0], gate.shape[1], parallel.CACHED):
        h = gate[i:j] * 0.5
        tile = xp.tanh(h, out=out[i:j])
        tile += 1
        tile *= h
        tile *= up[i:j]
    return out


def _activation_backward(da: Array, gate: Array, up: Array) -> None:
    """Overwrite gate and up by their gradients, and their gradient ``da`` by the activation itself.

    With h = gate/2 and t = tanh(h): ``silu = (1 + t) h``, ``silu' = ((1 + t) + silu (1 - t)) / 2``.
    ``dgate = da * up * silu'``, ``dup = da * silu``.
    """
    xp = xp_of(da)
    for i, j in parallel.row_tiles(gate.shape[0], gate.shape[1], parallel.CACHED):
        g, u, d = gate[i:j], up[i:j], da[i:j]
        h = g * 0.5
        t = xp.tanh(h)
        slope = xp.add(t, 1, out=g)
        silu = xp.multiply(slope, h, out=h)
        t *= silu
        slope += silu
        slope -= t  # 2 silu'
        slope *= 0.5
        slope *= u
        slope *= d  # dgate, where gate was
        activation = xp.multiply(silu, u, out=t)
        xp.multiply(silu, d, out=u)  # dup, where up was
        d[...] = activation


@fused(swiglu_ref)
def swiglu(x: Tensor, gate_weight: Tensor, up_weight: Tensor, down_weight: Tensor) -> Tensor:
    """The feed-forward. x: ``[..., hidden]``; gate, up: ``[inner, hidden]``; down: ``[hidden, inner]``. Returns as x."""
    return SwiGLU.apply(x, gate_weight, up_weight, down_weight)
