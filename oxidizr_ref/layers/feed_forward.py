"""Feed-forward layers: SwiGLU."""

from __future__ import annotations

from oxidizr_ref.autograd import Tensor
from oxidizr_ref.fused.swiglu import swiglu
from oxidizr_ref.nn import Linear, Module


class SwiGLU(Module):
    """``down(silu(gate(x)) * up(x))`` (Shazeer 2020). x: ``[..., hidden]``. Returns the same shape."""

    def __init__(self, hidden_size: int, intermediate_size: int, std: float, output_std: float) -> None:
        self.gate_proj = Linear(hidden_size, intermediate_size, std)
        self.up_proj = Linear(hidden_size, intermediate_size, std)
        self.down_proj = Linear(intermediate_size, hidden_size, output_std)

    def __call__(self, x: Tensor) -> Tensor:
        return swiglu(x, self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight)
