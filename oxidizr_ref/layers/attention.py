"""Attention layers: grouped-query attention with rotary positions.

Shapes: B batch, T time, D hidden, H query heads, K key/value heads, P head width.
"""

from __future__ import annotations

from oxidizr_ref.autograd import Tensor
from oxidizr_ref.config import ModelConfig
from oxidizr_ref.fused.attention import attention
from oxidizr_ref.fused.rope import rope
from oxidizr_ref.nn import Linear, Module


class GroupedQueryAttention(Module):
    """Causal grouped-query attention (Ainslie et al. 2023) with rotary positions (Su et al. 2021), as in Llama."""

    def __init__(self, config: ModelConfig, std: float, output_std: float) -> None:
        self.num_heads, self.kv_heads, self.head_dim = config.num_heads, config.kv_heads, config.head_dim
        self.rope_theta = config.rope_theta
        D, P = config.hidden_size, config.head_dim
        self.q_proj = Linear(D, self.num_heads * P, std)
        self.k_proj = Linear(D, self.kv_heads * P, std)
        self.v_proj = Linear(D, self.kv_heads * P, std)
        self.o_proj = Linear(self.num_heads * P, D, output_std)

    def __call__(self, x: Tensor) -> Tensor:
        """x: ``[B,T,D]``. Returns ``[B,T,D]``."""
        B, T, _ = x.shape
        P = self.head_dim
        q = rope(self.q_proj(x).reshape(B, T, self.num_heads, P), self.rope_theta)
        k = rope(self.k_proj(x).reshape(B, T, self.kv_heads, P), self.rope_theta)
        v = self.v_proj(x).reshape(B, T, self.kv_heads, P)
        y = attention(q, k, v, P**-0.5)  # [B,T,H,P]
        return self.o_proj(y.reshape(B, T, self.num_heads * P))
