"""Attention layers: grouped-query attention and multi-head latent attention, on the same fused operation.

Each has a training form, ``layer(x)`` over whole sequences, and a decoding form, ``layer.step(x, cache)``, one token at a
time. Shapes: B batch, T time, D hidden, H query heads, K key/value heads, P head width, R rotated width, L latent width.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from oxidizr_ref import ops
from oxidizr_ref.autograd import Tensor
from oxidizr_ref.backend import Array, compute_dtype, xp_of
from oxidizr_ref.config import ModelConfig
from oxidizr_ref.fused.attention import attention
from oxidizr_ref.fused.rope import rope
from oxidizr_ref.nn import Linear, Module, RMSNorm
from oxidizr_ref.watch import named


class TokenCache:
    """What decoding keeps of every token: rows of one or more arrays ``[B,capacity,…]``, the oldest overwritten first.

    ``length`` counts the tokens seen. Attention does not care for the order of keys, so rows stay where they are written.
    """

    def __init__(self, rows: list[Array], capacity: int) -> None:
        self.capacity, self.length = capacity, 0
        self.arrays = [xp_of(row).zeros((row.shape[0], capacity, *row.shape[2:]), dtype=row.dtype) for row in rows]

    def fill(self, *rows: Tensor) -> None:
        """Keep the rows ``[B,T,…]`` of the first tokens, at most ``capacity`` of them."""
        self.length = rows[0].shape[1]
        for array, row in zip(self.arrays, rows, strict=True):
            array[:, : self.length] = row.data

    def append(self, *rows: Tensor) -> list[Tensor]:
        """Keep the rows ``[B,1,…]`` of the next token. Returns all rows that are kept, ``[B,S,…]``."""
        slot = self.length % self.capacity
        self.length += 1
        seen = min(self.length, self.capacity)
        for array, row in zip(self.arrays, rows, strict=True):
            array[:, slot] = row.data[:, 0]
        return [Tensor(array[:, :seen]) for array in self.arrays]


def _rows(like: Array, batch: int, *shapes: tuple[int, ...]) -> list[Array]:
    dtype: np.dtype[Any] = compute_dtype(like.dtype)
    return [xp_of(like).empty((batch, 1, *shape), dtype=dtype) for shape in shapes]


class GroupedQueryAttention(Module):
    """Causal grouped-query attention (Ainslie et al. 2023) with rotary positions (Su et al. 2021), as in Llama."""

    def __init__(self, config: ModelConfig, std: float, output_std: float) -> None:
        self.num_heads, self.kv_heads, self.head_dim = config.num_heads, config.kv_heads, config.head_dim
        self.rope_theta, self.capacity = config.rope_theta, config.max_seq_len
        D, P = config.hidden_size, config.head_dim
        self.q_proj = Linear(D, self.num_heads * P, std)
        self.k_proj = Linear(D, self.kv_heads * P, std)
        self.v_proj = Linear(D, self.kv_heads * P, std)
        self.o_proj = Linear(self.num_heads * P, D, output_std)

    def __call__(self, x: Tensor, cache: TokenCache | None = None) -> Tensor:
        """x: ``[B,T,D]``. Returns ``[B,T,D]``. A new ``cache`` is filled, for `step` to go on."""
        q, k, v = self._project(x, 0)
        if cache is not None:
            cache.fill(k, v)
        return self._attend(q, k, v)

    def new_cache(self, batch: int) -> TokenCache:
        """Room for the keys and values of ``max_seq_len`` tokens: 2·K·P numbers each."""
        shape = self.kv_heads, self.head_dim
        return TokenCache(_rows(self.k_proj.weight.data, batch, shape, shape), self.capacity)

    def step(self, x: Tensor, cache: TokenCache) -> Tensor:
        """The next token. x: ``[B,1,D]``. Returns ``[B,1,D]``."""
        q, k, v = self._project(x, cache.length)
        return self._attend(q, *cache.append(k, v))

    def _project(self, x: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor]:
        B, T, _ = x.shape
        P = self.head_dim
        q = rope(self.q_proj(x).reshape(B, T, self.num_heads, P), self.rope_theta, start)
        k = rope(self.k_proj(x).reshape(B, T, self.kv_heads, P), self.rope_theta, start)
        return named("q", q), named("k", k), self.v_proj(x).reshape(B, T, self.kv_heads, P)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y = named("context", attention(q, k, v, self.head_dim**-0.5))  # [B,T,H,P]
        return self.o_proj(y.reshape(*y.shape[:2], self.num_heads * self.head_dim))


class LatentAttention(Module):
    """Multi-head latent attention, MLA (DeepSeek-V2, 2024, section 2.1), as oxidizr configures it.

    Keys and values are read from one latent ``c_kv`` a token, and positions from a small rotated key ``k_r`` that all heads
    share, so decoding keeps L + R numbers a token. DeepSeek's own models normalize the latents (``mla_latent_norm``) and
    read the rotated part of queries from theirs (``mla_q_rope_from``); small ones have none (``q_latent_dim: 0``).
    """

    def __init__(self, config: ModelConfig, std: float, output_std: float) -> None:
        self.num_heads, self.head_dim, self.d_rope = config.num_heads, config.head_dim, config.d_rope
        self.rope_theta, self.capacity, self.latent = config.rope_theta, config.max_seq_len, config.kv_latent_dim
        D, HP = config.hidden_size, config.num_heads * config.head_dim
        self.compressed, self.rope_from_latent = config.q_latent_dim > 0, config.mla_q_rope_from == "latent"
        self.w_dkv = Linear(D, config.kv_latent_dim, std)
        if self.compressed:
            self.w_dq = Linear(D, config.q_latent_dim, std)
        self.w_uq = Linear(config.q_latent_dim or D, HP, std)
        self.w_uk = Linear(config.kv_latent_dim, HP, std)
        self.w_uv = Linear(config.kv_latent_dim, HP, std)
        self.w_qr = Linear(config.q_latent_dim if self.rope_from_latent else D, config.num_heads * config.d_rope, std)
        self.w_kr = Linear(D, config.d_rope, std)
        self.o_proj = Linear(HP, D, output_std)
        self.scale = (self.head_dim + self.d_rope) ** -0.5
        self.normed = config.mla_latent_norm
        if self.normed:
            self.kv_norm = RMSNorm(config.kv_latent_dim, config.rms_norm_eps)
            if self.compressed:
                self.q_norm = RMSNorm(config.q_latent_dim, config.rms_norm_eps)

    def __call__(self, x: Tensor, cache: TokenCache | None = None) -> Tensor:
        """The training form: keys and values of every head are formed. x: ``[B,T,D]``. Returns ``[B,T,D]``.

        A new ``cache`` is filled, for `step` to go on.
        """
        B, T, _ = x.shape
        H, P, R = self.num_heads, self.head_dim, self.d_rope
        q, q_r, c_kv, k_r = self._project(x, 0)
        if cache is not None:
            cache.fill(c_kv, k_r.reshape(B, T, R))
        k, v = self.w_uk(c_kv).reshape(B, T, H, P), self.w_uv(c_kv).reshape(B, T, H, P)
        q = named("queries", ops.concatenate(q, q_r, axis=-1))
        k = named("keys", ops.concatenate(k, ops.broadcast_to(k_r, shape=(B, T, H, R)), axis=-1))
        return self.o_proj(named("context", attention(q, k, v, self.scale)).reshape(B, T, H * P))

    def new_cache(self, batch: int) -> TokenCache:
        """Room for the latents and rotated keys of ``max_seq_len`` tokens: L + R numbers each."""
        return TokenCache(_rows(self.w_dkv.weight.data, batch, (self.latent,), (self.d_rope,)), self.capacity)

    def step(self, x: Tensor, cache: TokenCache) -> Tensor:
        """The next token, in the absorbed form. x: ``[B,1,D]``. Returns ``[B,1,D]``.

        ``q·(W_uk c) = (W_ukᵀ q)·c`` and ``Σ_s p_s W_uv c_s = W_uv Σ_s p_s c_s`` (section 2.1.2 there): folded into query and
        output, the two matrices never meet the past, and attention is that of H heads over one shared key ``[c_kv; k_r]``
        and value ``c_kv``.
        """
        B, H, P = x.shape[0], self.num_heads, self.head_dim
        q, q_r, c_kv, k_r = self._project(x, cache.length)
        c_kv, k_r = cache.append(c_kv, k_r.reshape(B, 1, self.d_rope))
        w_uk, w_uv = (w.weight.reshape(H, P, self.latent) for w in (self.w_uk, self.w_uv))
        q = ops.matmul(q.reshape(B, H, 1, P), w_uk).reshape(B, 1, H, self.latent)
        keys, values = ops.concatenate(c_kv, k_r, axis=-1), c_kv
        y = attention(ops.concatenate(q, q_r, axis=-1), _one_head(keys), _one_head(values), self.scale)  # [B,1,H,L]
        y = ops.matmul(y.reshape(B, H, 1, self.latent), ops.swapaxes(w_uv, 1, 2))
        return self.o_proj(y.reshape(B, 1, H * P))

    def _project(self, x: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries, their rotated part, the latent, and the rotated key: ``[B,T,H,P] [B,T,H,R] [B,T,L] [B,T,1,R]``."""
        B, T, _ = x.shape
        H, P, R = self.num_heads, self.head_dim, self.d_rope
        c_q, c_kv = self.w_dq(x) if self.compressed else x, self.w_dkv(x)
        if self.normed:
            c_q, c_kv = self.q_norm(c_q) if self.compressed else c_q, self.kv_norm(c_kv)
        q_r = rope(self.w_qr(c_q if self.rope_from_latent else x).reshape(B, T, H, R), self.rope_theta, start)
        k_r = rope(self.w_kr(x).reshape(B, T, 1, R), self.rope_theta, start)
        return self.w_uq(c_q).reshape(B, T, H, P), named("q_r", q_r), c_kv, named("k_r", k_r)


def _one_head(x: Tensor) -> Tensor:
    return x.reshape(*x.shape[:2], 1, x.shape[2])
