"""Causal grouped-query attention (Vaswani et al. 2017; Ainslie et al. 2023): ``softmax(q kᵀ * scale + causal) v``.

Each key/value head serves ``heads / kv_heads`` query heads. Queries are taken block by block, so that no ``T × T`` array is
kept; the backward pass recomputes each block's probabilities from one number a row, the log of its softmax denominator
(Dao et al. 2022, "FlashAttention", section 3.1, without its second level of blocking).

Shapes: B batch, T queries, S keys (S ≥ T: query t sits at position t + S - T), H heads, K key/value heads, G = H/K heads
a group, P width of q and k, V width of v.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from oxidizr_ref import ops, parallel
from oxidizr_ref.autograd import Function, Tensor
from oxidizr_ref.backend import Array, to_device, xp_of
from oxidizr_ref.fused.register import fused
from oxidizr_ref.watch import named

QUERY_BLOCK = 128
#: Scores of one tile of heads: what one core works on at a time.
SCORES = 1 << 16


def causal_mask(queries: int, keys: int) -> np.ndarray[Any, Any]:
    """True where query t may see key s: ``s ≤ t + keys - queries``. Returns bool ``[queries, keys]``."""
    return np.tril(np.ones((queries, keys), dtype=bool), keys - queries)


def attention_ref(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """The same, composed from primitives."""
    T, H, (S, K) = q.shape[1], q.shape[2], k.shape[1:3]
    q, k, v = (ops.swapaxes(x, 1, 2) for x in (q, _repeat(k, H // K), _repeat(v, H // K)))  # [B,H,T or S,P or V]
    scores = named("scores", ops.matmul(q, ops.swapaxes(k, 2, 3)) * scale)  # [B,H,T,S]
    hidden = ops.as_tensor(-np.inf, like=scores)
    past = to_device(causal_mask(T, S), scores.data)
    probs = named("probs", ops.softmax(named("masked_scores", ops.where(scores, hidden, condition=past)), axis=-1))
    return ops.swapaxes(ops.matmul(probs, v), 1, 2)


def _repeat(x: Tensor, G: int) -> Tensor:
    """``[B,S,K,P]`` with each head G times in a row, ``[B,S,KG,P]``."""
    B, S, K, P = x.shape
    return ops.broadcast_to(x.reshape(B, S, K, 1, P), shape=(B, S, K, G, P)).reshape(B, S, K * G, P)


class Attention(Function):
    def forward(self, q: Array, k: Array, v: Array, *, scale: float) -> Array:
        xp = xp_of(q)
        (B, T, H, _), (S, K, V) = q.shape, v.shape[1:]
        self.scale, self.plan = scale, _Plan(B, T, S, K, H // K)
        y = xp.empty((B, T, H, V), dtype=q.dtype)
        self.logsum = xp.empty((B, K, H // K, T, 1), dtype=q.dtype)
        q_, k_, v_, y_ = _by_head(q, K), _by_head(k, K), _by_head(v, K), _by_head(y, K)

        def heads(index: int) -> None:
            at, blocks = self.plan.tile(index)
            for i, j, seen in blocks:
                scores = _masked_scores(q_[at][:, :, :, i:j], k_[at][:, :, :, :seen], scale)  # (1)
                top = scores.max(axis=-1, keepdims=True)
                scores -= top
                xp.exp(scores, out=scores)  # (2)
                total = scores.sum(axis=-1, keepdims=True)
                self.logsum[at][:, :, :, i:j] = top + xp.log(total)
                scores /= total  # (3)
                xp.matmul(scores, v_[at][:, :, :, :seen], out=y_[at][:, :, :, i:j])  # (4)

        parallel.for_each(self.plan.tiles, heads)
        self.q, self.k, self.v, self.y = q, k, v, y
        return y

    def backward(self, dy: Array) -> tuple[Array, ...]:
        xp, q, k, v, y, plan, scale = xp_of(dy), self.q, self.k, self.v, self.y, self.plan, self.scale
        K = k.shape[2]
        dq, dk, dv = xp.empty(q.shape, q.dtype), xp.zeros(k.shape, k.dtype), xp.zeros(v.shape, v.dtype)
        q_, k_, v_, y_, dy_ = (_by_head(x, K) for x in (q, k, v, y, dy))
        dq_, dk_, dv_ = (_by_head(x, K) for x in (dq, dk, dv))

        def heads(index: int) -> None:
            at, blocks = plan.tile(index)
            for i, j, seen in blocks:
                k_seen, v_seen = k_[at][:, :, :, :seen], v_[at][:, :, :, :seen]
                q_block, dy_block = q_[at][:, :, :, i:j], dy_[at][:, :, :, i:j]
                p = _masked_scores(q_block, k_seen, scale)
                p -= self.logsum[at][:, :, :, i:j]
                xp.exp(p, out=p)  # (3), (2), (1) recomputed: the softmax
                # (4) y = p v
                for g in range(plan.group):
                    dv_[at][:, :, 0, :seen] += xp.matmul(p[:, :, g].swapaxes(-1, -2), dy_block[:, :, g])
                dp = xp.matmul(dy_block, v_seen.swapaxes(-1, -2))
                # (3), (2) the softmax's Jacobian; sum(p dp) over keys equals sum(y dy) over channels
                dp -= (y_[at][:, :, :, i:j] * dy_block).sum(axis=-1, keepdims=True)
                dp *= p
                dp *= scale
                # (1) scores = q kᵀ scale
                xp.matmul(dp, k_seen, out=dq_[at][:, :, :, i:j])
                for g in range(plan.group):
                    dk_[at][:, :, 0, :seen] += xp.matmul(dp[:, :, g].swapaxes(-1, -2), q_block[:, :, g])

        parallel.for_each(plan.tiles, heads)
        return dq, dk, dv


class _Plan:
    """How attention is cut: a tile is some heads of one sequence, or all of some, done query block by query block."""

    def __init__(self, B: int, T: int, S: int, K: int, G: int) -> None:
        self.group = G
        one_head = max(1, G * min(T, QUERY_BLOCK) * S)
        sequences, heads = max(1, SCORES // (K * one_head)), min(K, max(1, SCORES // one_head))
        self._places = [
            (slice(*batch), slice(*head)) for batch in parallel.tiles(B, sequences) for head in parallel.tiles(K, heads)
        ]
        self.tiles = len(self._places)
        self._blocks = [(i, j, j + S - T) for i, j in parallel.tiles(T, QUERY_BLOCK)]

    def tile(self, index: int) -> tuple[tuple[slice, slice], list[tuple[int, int, int]]]:
        """Where tile ``index`` lies in ``[B,K,…]`` and its blocks: first query, last query, number of keys seen."""
        return self._places[index], self._blocks


def _by_head(x: Array, K: int) -> Array:
    """A view of ``[B,T,heads,width]`` as ``[B,K,heads/K,T,width]``; BLAS reads its rows where they lie."""
    B, T, heads, width = x.shape
    return x.reshape(B, T, K, heads // K, width).transpose(0, 2, 3, 1, 4)


def _masked_scores(q: Array, k: Array, scale: float) -> Array:
    """``q kᵀ * scale`` of the last queries of ``k``, with -inf where a key lies in a query's future."""
    scores = xp_of(q).matmul(q, k.swapaxes(-1, -2))
    scores *= scale
    queries = scores.shape[-2]
    # Only the last `queries` keys can lie in the future of any query of the block.
    scores[..., -queries:] += to_device(_future_bias(queries, scores.dtype.name), scores)
    return scores


@functools.lru_cache(maxsize=256)
def _future_bias(queries: int, dtype: str) -> np.ndarray[Any, Any]:
    return np.where(causal_mask(queries, queries), 0.0, -np.inf).astype(dtype)


@fused(attention_ref)
def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal attention. q: ``[B,T,H,P]``, k: ``[B,S,K,P]``, v: ``[B,S,K,V]``; K divides H. Returns ``[B,T,H,V]``.

    With S > T the first S - T keys lie in the past of all queries (decoding with a cache).
    """
    return Attention.apply(q, k, v, scale=scale)
