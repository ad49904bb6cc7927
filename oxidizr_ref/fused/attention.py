"""Causal grouped-query attention (Vaswani et al. 2017; Ainslie et al. 2023): ``softmax(q kᵀ * scale + causal) v``.

Each key/value head serves ``heads / kv_heads`` query heads. Queries are taken block by block, so that no ``T × T`` array is
kept; the backward pass recomputes each block's probabilities from one number a row, the log of its softmax denominator
(Dao et al. 2022, "FlashAttention", section 3.1, without its second level of blocking).

Shapes: B batch, T queries, S keys (S ≥ T: query t sits at position t + S - T), H heads, K key/value heads, G = H/K heads
a group, P width of q and k, V width of v.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from oxidizr_ref import ops, parallel
from oxidizr_ref.autograd import Function, Tensor
from oxidizr_ref.backend import Array, by_device, constant, xp_of
from oxidizr_ref.fused.register import fused
from oxidizr_ref.fused.rows import column_sums, row_sums
from oxidizr_ref.watch import named

QUERY_BLOCK, DEVICE_QUERY_BLOCK = 64, 512
#: Scores of one tile of heads, what one core works on at a time: at most, and what a second tile must be worth.
SCORES, FEWEST_SCORES = 1 << 19, 1 << 16
#: Of a device: 256 MiB in float32.
DEVICE_SCORES = 1 << 26


def causal_mask(queries: int, keys: int) -> np.ndarray[Any, Any]:
    """True where query t may see key s: ``s ≤ t + keys - queries``. Returns bool ``[queries, keys]``."""
    return np.tril(np.ones((queries, keys), dtype=bool), keys - queries)


def attention_ref(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """The same, composed from primitives."""
    T, H, (S, K) = q.shape[1], q.shape[2], k.shape[1:3]
    q, k, v = (ops.swapaxes(x, 1, 2) for x in (q, _repeat(k, H // K), _repeat(v, H // K)))  # [B,H,T or S,P or V]
    scores = named("scores", ops.matmul(q, ops.swapaxes(k, 2, 3)) * scale)  # [B,H,T,S]
    hidden = ops.as_tensor(-np.inf, like=scores)
    past = constant(causal_mask, T, S, like=scores.data)
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
        self.scale, self.plan = scale, _Plan(B, T, S, K, H // K, like=q)
        y = xp.empty((B, T, H, V), dtype=q.dtype)
        self.logsum = xp.empty((B, K, H // K, T), dtype=q.dtype)
        q_, k_, v_, y_ = _by_head(q, K), _by_head(k, K), _by_head(v, K), _by_head(y, K)

        def one_token(index: int) -> None:
            at, _ = self.plan.tile(index)
            k_tile, v_tile = k_[at][:, :, 0], v_[at][:, :, 0]  # where they lie: all of a cache would be copied for one token
            scores = xp.matmul(q_[at][:, :, :, 0] * scale, k_tile.swapaxes(-1, -2))  # (1)
            scores -= scores.max(axis=-1, keepdims=True)
            p = xp.exp(scores, out=scores)
            y_[at][:, :, :, 0] = xp.matmul(p, v_tile) / row_sums(p)[..., None]  # (4), (3)

        if T == 1 and S > 1 and not any(self.needs):
            parallel.for_each(self.plan.tiles, one_token, like=q)
            return y

        def heads(index: int) -> None:
            at, blocks = self.plan.tile(index)
            k_tile, v_tile = (xp.ascontiguousarray(x[at][:, :, 0]) for x in (k_, v_))
            for i, j, seen in blocks:
                q_block = _rows(q_[at][:, :, :, i:j] * scale)
                # Scores lie [keys, queries], so that both the maximum and its subtraction run along rows.
                scores = xp.matmul(k_tile[:, :, :seen], q_block.swapaxes(-1, -2))  # (1)
                _hide_future(scores.swapaxes(-1, -2), j - i)
                top = scores.max(axis=-2, keepdims=True)
                scores -= top
                p = xp.exp(scores, out=scores)  # (2), not yet divided by its sum
                total = column_sums(p)
                y_block = xp.matmul(p.swapaxes(-1, -2), v_tile[:, :, :seen])  # (4)
                y_block /= total.swapaxes(-1, -2)  # (3), on fewer numbers
                y_[at][:, :, :, i:j] = y_block.reshape(y_[at][:, :, :, i:j].shape)
                self.logsum[at][:, :, :, i:j] = (top + xp.log(total)).reshape(self.logsum[at][:, :, :, i:j].shape)

        parallel.for_each(self.plan.tiles, heads, like=q)
        self.q, self.k, self.v, self.y = q, k, v, y
        return y

    def backward(self, dy: Array) -> tuple[Array, ...]:
        xp, q, k, v, y, plan, scale = xp_of(dy), self.q, self.k, self.v, self.y, self.plan, self.scale
        K, P, V = k.shape[2], k.shape[3], v.shape[3]
        dq, dk, dv = (xp.empty(x.shape, x.dtype) for x in (q, k, v))
        q_, k_, v_, y_, dy_ = (_by_head(x, K) for x in (q, k, v, y, dy))
        dq_, dk_, dv_ = (_by_head(x, K) for x in (dq, dk, dv))

        def heads(index: int) -> None:
            at, blocks = plan.tile(index)
            k_tile, v_tile = (_with_channel(x[at][:, :, 0], 1) for x in (k_, v_))
            dk_tile, dv_tile = xp.zeros(k_tile[..., :P].shape, k.dtype), xp.zeros(v_tile[..., :V].shape, v.dtype)
            for i, j, seen in blocks:
                block = (*at, slice(None), slice(i, j))
                # What is subtracted from a whole row of scores is one more channel of its product.
                q_block = _rows(_with_channel(q_[block] * scale, -self.logsum[block]))
                p = xp.matmul(q_block, k_tile[:, :, :seen].swapaxes(-1, -2))
                _hide_future(p, j - i)
                xp.exp(p, out=p)  # (3), (2), (1) recomputed: the softmax
                # (4) y = p v;  (3), (2) the softmax's Jacobian, in which sum(p dp) over keys equals sum(y dy) over channels
                dy_block = _rows(_with_channel(dy_[block], -row_sums(y_[block] * dy_[block])))
                dv_tile[:, :, :seen] += xp.matmul(p.swapaxes(-1, -2), dy_block[..., :V])
                dp = xp.matmul(dy_block, v_tile[:, :, :seen].swapaxes(-1, -2))
                dp *= p
                # (1) scores = (q scale) kᵀ
                dk_tile[:, :, :seen] += xp.matmul(dp.swapaxes(-1, -2), q_block[..., :P])
                dq_[block] = xp.matmul(dp, k_tile[:, :, :seen, :P]).reshape(dq_[block].shape)
                dq_[block] *= scale
            dk_[at][:, :, 0], dv_[at][:, :, 0] = dk_tile, dv_tile

        parallel.for_each(plan.tiles, heads, like=q)
        return dq, dk, dv


class _Plan:
    """How attention is cut: a tile is some heads of one sequence, or all of some, done query block by query block."""

    def __init__(self, B: int, T: int, S: int, K: int, G: int, like: Array) -> None:
        self.group, queries = G, by_device(like, QUERY_BLOCK, DEVICE_QUERY_BLOCK)
        one_head = max(1, G * min(T, queries) * S)
        size = min(SCORES, max(FEWEST_SCORES, -(-B // 2) * K * one_head if B > 1 else -(-K // 2) * one_head))
        size = by_device(like, size, DEVICE_SCORES)
        sequences, heads = max(1, size // (K * one_head)), min(K, max(1, size // one_head))
        self._places = [
            (slice(*batch), slice(*head)) for batch in parallel.tiles(B, sequences) for head in parallel.tiles(K, heads)
        ]
        self.tiles = len(self._places)
        self._blocks = [(i, j, j + S - T) for i, j in parallel.tiles(T, queries)]

    def tile(self, index: int) -> tuple[tuple[slice, slice], list[tuple[int, int, int]]]:
        """Where tile ``index`` lies in ``[B,K,…]`` and its blocks: first query, last query, number of keys seen."""
        return self._places[index], self._blocks


def _by_head(x: Array, K: int) -> Array:
    """A view of ``[B,T,heads,width]`` as ``[B,K,heads/K,T,width]``; BLAS reads its rows where they lie."""
    B, T, heads, width = x.shape
    return x.reshape(B, T, K, heads // K, width).transpose(0, 2, 3, 1, 4)


def _rows(x: Array) -> Array:
    """The queries of all heads of a group below each other: ``[b,k,G,t,width]`` to ``[b,k,G·t,width]``."""
    return x.reshape(*x.shape[:2], -1, x.shape[-1])


def _with_channel(x: Array, channel: Array | float) -> Array:
    """A C-ordered copy of ``[…,width]`` with one more channel behind: ``[…,width+1]``."""
    wide = xp_of(x).empty((*x.shape[:-1], x.shape[-1] + 1), dtype=x.dtype)
    wide[..., :-1], wide[..., -1] = x, channel
    return wide


def _hide_future(scores: Array, queries: int) -> None:
    """Scores ``[b,k,G·queries,seen]`` become -inf where a key lies in its query's future."""
    b, k, rows, seen = scores.shape
    # Only the last `queries` keys can lie in the future of any query of the block.
    recent = scores[..., seen - queries :].reshape(b, k, rows // queries, queries, queries)
    order = "C" if scores.strides[-1] == scores.itemsize else "F"  # as the scores lie, so that rows are added to rows
    recent += constant(_future_bias, queries, scores.dtype.name, order, like=scores)


def _future_bias(queries: int, dtype: str, order: Literal["C", "F"]) -> np.ndarray[Any, Any]:
    return np.where(causal_mask(queries, queries), 0.0, -np.inf).astype(dtype, order=order)


@fused(attention_ref)
def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal attention. q: ``[B,T,H,P]``, k: ``[B,S,K,P]``, v: ``[B,S,K,V]``; K divides H. Returns ``[B,T,H,V]``.

    With S > T the first S - T keys lie in the past of all queries (decoding with a cache).
    """
    return Attention.apply(q, k, v, scale=scale)
