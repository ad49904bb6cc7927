"""What Hugging Face's models compute in float32 whatever their dtype, in float64 instead: for writers of golden files
and for the float64 side of the oracle tests. Nothing else of the library's code is touched."""

from __future__ import annotations

from typing import Any

import torch


class Float64Rotary(torch.nn.Module):
    """cos and sin of the rotation angles in float64; the library's own module computes them in float32."""

    def __init__(self, theta: float, width: int) -> None:
        super().__init__()
        self.frequencies = theta ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)

    def forward(self, _: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Each ``[batch, time, width]``: the angles twice, for the two halves that turn together."""
        angles = position_ids[..., None].to(torch.float64) * self.frequencies
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos(), angles.sin()


def float64_norm(self: Any, x: torch.Tensor) -> torch.Tensor:
    """RMSNorm in the dtype of ``x``; the library's own computes in float32 whatever comes in."""
    return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))


def in_float64(model: torch.nn.Module, rotary: Float64Rotary) -> torch.nn.Module:
    """A model of the library, float64 from end to end: its norms and rotation angles, too."""
    model.to(torch.float64).model.rotary_emb = rotary
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = float64_norm.__get__(module)
    return model
