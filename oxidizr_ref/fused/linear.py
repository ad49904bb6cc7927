"""Linear map: ``y = x Wᵀ`` with the weight stored ``[out, in]``, as in PyTorch.

The products are cut into fixed tiles (`parallel.matmul`). A low-precision weight is cast where it is used and kept in its
storage dtype; on a device the other operand is cast instead (`backend.product_operands`).
"""

from __future__ import annotations

from oxidizr_ref import ops, parallel
from oxidizr_ref.autograd import Function, Tensor
from oxidizr_ref.backend import Array, product_operands, to_compute
from oxidizr_ref.fused.register import fused


def linear_ref(x: Tensor, weight: Tensor) -> Tensor:
    """The same, composed from primitives."""
    return ops.matmul(x, ops.swapaxes(weight, 0, 1))


class Linear(Function):
    casts_inputs = False

    def forward(self, x: Array, weight: Array) -> Array:
        self.x, w = product_operands(x.reshape(-1, x.shape[-1]), weight)
        self.weight = weight
        few = parallel.are_few(x) and not any(self.needs)
        y = parallel.few_rows(self.x, w) if few else to_compute(parallel.matmul(self.x, w.T))
        return y.reshape(*x.shape[:-1], weight.shape[0])

    def backward(self, dy: Array) -> tuple[Array | None, ...]:
        shape = dy.shape[:-1]
        dy, w = product_operands(dy.reshape(-1, dy.shape[-1]), self.weight)
        # y = x Wᵀ
        dx, dweight = (to_compute(v) for v in parallel.matmuls((dy, w), (dy.T, self.x)))
        return dx.reshape(*shape, self.x.shape[1]), dweight


@fused(linear_ref)
def linear(x: Tensor, weight: Tensor) -> Tensor:
    """``x Wᵀ`` over the last axis. x: ``[..., in]``, weight: ``[out, in]``. Returns ``[..., out]``."""
    return Linear.apply(x, weight)
