"""The SwiGLU feed-forward (Shazeer 2020, eq. 6): ``y = (silu(x Wgᵀ) ∘ (x Wuᵀ)) Wdᵀ`` with ``silu(v) = v * sigmoid(v)``.

One tile of rows goes through the whole chain while it is in the cache. Kept for the backward pass: x, gate and up; the
activation ``silu(gate) * up`` is cheaper to recompute than to keep.
"""

from __future__ import annotations

from oxidizr_ref import ops, parallel
from oxidizr_ref.autograd import Function, Tensor
from oxidizr_ref.backend import Array, product_operands, to_compute, xp_of
from oxidizr_ref.fused.register import fused
from oxidizr_ref.kernels import Kernel
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
        few = parallel.are_few(x) and not any(self.needs)
        x = to_compute(x).reshape(-1, shape[-1])
        if few:
            gate, up = (parallel.few_rows(x, weight) for weight in (wg, wu))
            return parallel.few_rows(_activation(gate, up), wd).reshape(*shape[:-1], wd.shape[0])
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


@SwiGLU.on_device
class SwiGLUKernels(Function):
    """The same with kernels between the products. Weights of 16 bits make products of 16 bits, forward and backward."""

    casts_inputs = False

    def forward(self, x: Array, gate_weight: Array, up_weight: Array, down_weight: Array) -> Array:
        shape = x.shape
        self.weights = gate_weight, up_weight, down_weight
        self.x, _ = product_operands(x.reshape(-1, shape[-1]), gate_weight)
        gate, up = _product(self.x, gate_weight.T), _product(self.x, up_weight.T)  # (1), (2)
        activation = xp_of(x).empty_like(gate)
        _FORWARD.threads(gate.size, gate, up, activation, gate.size)  # (3)
        self.gate, self.up = gate, up
        return _product(activation, down_weight.T).reshape(*shape[:-1], down_weight.shape[0])  # (4)

    def backward(self, dy: Array) -> tuple[Array, ...]:
        shape, x, gate, up = dy.shape, self.x, self.gate, self.up
        wg, wu, wd = self.weights
        dy, _ = product_operands(dy.reshape(-1, shape[-1]), wd)
        activation = _product(dy, wd)  # (4) y = activation Wdᵀ
        # (3) activation = silu(gate) * up: computed again, its gradients take the place of gate and up
        _BACKWARD.threads(gate.size, activation, gate, up, gate.size)
        activation, dgate, dup = (product_operands(v, w)[0] for v, w in ((activation, wd), (gate, wg), (up, wu)))
        dx = _product(dgate, wg)  # (1) gate = x Wgᵀ
        dx += _product(dup, wu)  # (2) up = x Wuᵀ
        return dx.reshape(*shape[:-1], x.shape[1]), _product(dgate.T, x), _product(dup.T, x), _product(dy.T, activation)


def _product(a: Array, b: Array) -> Array:
    """``a @ b``, in the 16 bits of ``b`` if it has so few; returned in the compute dtype."""
    a, b = product_operands(a, b)
    return to_compute(xp_of(a).matmul(a, b))


_FORWARD = Kernel("""
__global__ void swiglu(const T* gate, const T* up, T* activation, long long count) {
    if (THREAD >= count) return;
    T h = gate[THREAD] * (T)0.5;
    activation[THREAD] = (1 + tanh(h)) * h * up[THREAD];
}
""")

_BACKWARD = Kernel("""
__global__ void swiglu_backward(T* da, T* gate, T* up, long long count) {
    if (THREAD >= count) return;
    T h = gate[THREAD] * (T)0.5, u = up[THREAD], d = da[THREAD], t = tanh(h), silu = (1 + t) * h;
    gate[THREAD] = (1 + t + silu - t * silu) * (T)0.5 * u * d;  // dgate = da * up * silu'
    up[THREAD] = silu * d;                                      // dup = da * silu
    da[THREAD] = silu * u;                                      // the activation
}
""")


@fused(swiglu_ref)
def swiglu(x: Tensor, gate_weight: Tensor, up_weight: Tensor, down_weight: Tensor) -> Tensor:
    """The feed-forward. x: ``[..., hidden]``; gate, up: ``[inner, hidden]``; down: ``[hidden, inner]``. Returns as x."""
    return SwiGLU.apply(x, gate_weight, up_weight, down_weight)
