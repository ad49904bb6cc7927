"""The scan that Mamba2 and Mamba3 share, chunk by chunk, over plain arrays (Dao & Gu 2024, section 6, "SSD").

A state ``S [N,P]`` runs along time; token t lets it decay by ``exp(a_t)`` and adds the outer product of ``B_t`` and ``x_t``.
Unrolled, a token's output is a weighted sum over the tokens before it, and a part of its own::

    y_t = Σ_{s<t} exp(a_{s+1} + … + a_t) inflow_s (C_t·B_s) x_s  +  (diagonal_t (C_t·B_t) + D) x_t

Mamba2 has ``inflow = diagonal = dt``; Mamba3's trapezoidal rule makes them differ. Inside a chunk of Q tokens the sum is a
matrix product; what earlier chunks add passes through the state. With rank R > 1 (Mamba3 MIMO) each token stands for R
positions that share its decay; every position sees all R positions of its own token (the diagonal) and of those before.

Letters: b sequences, g groups sharing B and C, h heads a group, T tokens, R rank, Q tokens a chunk, q = Q·R positions of
a chunk, N state size, P head width. ``[b,g,h]`` come first: matrix products run over the last two axes.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any, NamedTuple

import numpy as np

from oxidizr_ref import parallel
from oxidizr_ref.backend import Array, to_device, xp_of

#: Weights of one tile, ``sequences × heads × q × q``: what one core works on at a time.
WEIGHTS = 1 << 16


class Lanes(NamedTuple):
    """What the scan reads, of some sequences and heads, over all of time. ``TR`` are T·R positions, the rank innermost."""

    x: Array  # [b,g,h,TR,P]
    a: Array  # [b,g,h,T], the logarithm of the decay, ≤ 0
    inflow: Array  # [b,g,h,T]
    diagonal: Array  # [b,g,h,T]
    B: Array  # [b,g,1,TR,N]
    C: Array  # [b,g,1,TR,N]
    D: Array  # [g,h]


class LaneTile(NamedTuple):
    """A tile: some sequences, some groups, some heads of each. ``part`` numbers the cuts of one group's heads."""

    sequences: slice
    groups: slice
    heads: slice
    part: int


def lane_tiles(B: int, G: int, h: int, positions: int) -> list[LaneTile]:
    """How B sequences of G groups of h heads are cut, for chunks of so many positions: a function of shapes alone."""
    lanes = max(1, WEIGHTS // positions**2)
    heads = min(h, lanes)
    groups = min(G, max(1, lanes // h))
    sequences = max(1, lanes // (G * h))
    return [
        LaneTile(slice(*s), slice(*g), slice(*k), part)
        for s in parallel.tiles(B, sequences)
        for g in parallel.tiles(G, groups)
        for part, k in enumerate(parallel.tiles(h, heads))
    ]


class _Chunk:
    """The numbers of one chunk that both directions need: tokens i … j-1."""

    def __init__(self, lanes: Lanes, i: int, j: int, R: int) -> None:
        xp = xp_of(lanes.x)
        self.R, self.positions = R, slice(i * R, j * R)
        self.ranks = list(itertools.product(range(R), range(R)))
        self.x, self.B, self.C = (v[..., self.positions, :] for v in (lanes.x, lanes.B, lanes.C))
        self.inflow, self.diagonal = lanes.inflow[..., i:j], lanes.diagonal[..., i:j]
        # a_i + … + a_t, never positive. In float64: behind a strong decay, differences of float32 sums have few digits left.
        cum = xp.cumsum(lanes.a[..., i:j], axis=-1, dtype=np.float64)
        dtype = self.x.dtype
        self.since = xp.exp(cum.astype(dtype))  # what is left at t of the state before the chunk
        self.until = xp.exp((cum[..., -1:] - cum).astype(dtype))  # what is left at the chunk's end of what enters at t
        decay = (cum[..., :, None] - cum[..., None, :]).astype(dtype)
        decay += to_device(_past_bias(j - i, dtype.name), decay)
        self.decay = xp.exp(decay, out=decay)  # [b,g,h,Q,Q]: from s to t, zero unless s < t
        self.scores = xp.matmul(self.C, self.B.swapaxes(-1, -2))  # [b,g,1,q,q]: C_t·B_s
        self.weights = self.by_token(self.scores) * self.decay[..., :, None, :, None]
        self.weights = self.weights.reshape(*self.weights.shape[:3], *self.scores.shape[-2:])
        self.entering = self.x * self.at_positions(self.inflow)

    def at_positions(self, v: Array) -> Array:
        """A number a token as a column, one for each of its positions: ``[…,Q]`` to ``[…,q,1]``."""
        return (v if self.R == 1 else xp_of(v).repeat(v, self.R, axis=-1))[..., None]

    def of_tokens(self, v: Array) -> Array:
        """Numbers of positions summed over each token's: ``[…,q]`` to ``[…,Q]``."""
        return v if self.R == 1 else v.reshape(*v.shape[:-1], -1, self.R).sum(axis=-1)

    def by_token(self, v: Array) -> Array:
        """A view of ``[…,q,q]`` as ``[…,Q,R,Q,R]``."""
        Q = self.inflow.shape[-1]
        return v.reshape(*v.shape[:-2], Q, self.R, Q, self.R)

    def own_score(self, r: int, s: int) -> Array:
        """``C_t·B_t`` between positions r and s of the same token: ``[b,g,1,Q]``."""
        return self.scores[..., r :: self.R, s :: self.R].diagonal(axis1=-2, axis2=-1)

    def own_weight(self, r: int, s: int, D: Array) -> Array:
        """What position s of a token weighs for its position r: ``[b,g,h,Q,1]``."""
        weight = self.diagonal * self.own_score(r, s)
        if r == s:
            weight += D[..., None]
        return weight[..., None]


@functools.lru_cache(maxsize=256)
def _past(tokens: int, dtype: str) -> np.ndarray[Any, Any]:
    """1 where s < t, else 0: ``[tokens, tokens]``."""
    return np.tril(np.ones((tokens, tokens)), -1).astype(dtype)


@functools.lru_cache(maxsize=256)
def _past_bias(tokens: int, dtype: str) -> np.ndarray[Any, Any]:
    """0 where s < t, else -inf: added before the exponential, which would overflow where s > t."""
    return np.where(_past(tokens, dtype) == 1, 0.0, -np.inf).astype(dtype)


def _row_sums(v: Array) -> Array:
    """Sums over the last axis, as a product with ones: where rows are as short as here, that is five times faster."""
    xp = xp_of(v)
    return xp.matmul(v, xp.ones((v.shape[-1], 1), dtype=v.dtype))[..., 0]


def scan(lanes: Lanes, y: Array, states: Array, Q: int, R: int) -> None:
    """Fill y ``[b,g,h,TR,P]``, and states ``[chunks,b,g,h,N,P]`` with the state before each chunk."""
    xp, T = xp_of(y), lanes.a.shape[-1]
    S = xp.zeros(states.shape[1:], dtype=states.dtype)
    for number, (i, j) in enumerate(parallel.tiles(T, Q)):
        states[number] = S
        c = _Chunk(lanes, i, j, R)
        out = xp.matmul(c.weights, c.entering)  # (1) what the tokens of the chunk tell each other
        past = xp.matmul(c.C, S)
        past *= c.at_positions(c.since)
        out += past  # (2) what the state before the chunk tells them
        for r, s in c.ranks:
            out[..., r::R, :] += c.own_weight(r, s, lanes.D) * c.x[..., s::R, :]  # (3) what a token tells itself
        y[..., c.positions, :] = out
        leaving = c.entering * c.at_positions(c.until)
        S = S * c.since[..., -1:, None]
        S += xp.matmul(c.B.swapaxes(-1, -2), leaving)  # (4) the state after the chunk


def scan_backward(dy: Array, lanes: Lanes, states: Array, grads: Lanes, Q: int, R: int) -> None:
    """Fill the gradients of all lanes, given that of y. ``grads.B`` and ``grads.C`` are summed over the tile's heads."""
    xp, T = xp_of(dy), lanes.a.shape[-1]
    dS = xp.zeros(states.shape[1:], dtype=states.dtype)
    grads.D[...] = 0
    for number, (i, j) in reversed(list(enumerate(parallel.tiles(T, Q)))):
        c, S = _Chunk(lanes, i, j, R), states[number]
        past = to_device(_past(j - i, S.dtype.name), S)
        dout = dy[..., c.positions, :]
        # (4) S' = since_Q S + Bᵀ (until ∘ entering)
        until, since = c.at_positions(c.until), c.at_positions(c.since)
        dentering = xp.matmul(c.B, dS)
        dentering *= until
        dB = xp.matmul(c.entering * until, dS.swapaxes(-1, -2)).sum(axis=2, keepdims=True)
        # The gradient of a_t is what passes through its decay, be it from token to token or by way of a state.
        leaving = c.of_tokens(_row_sums(c.entering * dentering))  # from token s to the end: through all after s
        through = dS * S
        through *= c.since[..., -1:, None]
        da = through.reshape(*dS.shape[:3], -1).sum(axis=-1)[..., None] + xp.matmul(leaving, past.T)
        dS = dS * c.since[..., -1:, None]
        # (3) y_r += (diagonal (C_r·B_s) + D [r = s]) x_s
        dx, ddiagonal = xp.zeros(dout.shape, dtype=dy.dtype), xp.zeros(c.diagonal.shape, dtype=dy.dtype)
        dscores_own = []
        for r, s in c.ranks:
            down = _row_sums(dout[..., r::R, :] * c.x[..., s::R, :])  # the gradient of the weight
            dx[..., s::R, :] += c.own_weight(r, s, lanes.D) * dout[..., r::R, :]
            ddiagonal += down * c.own_score(r, s)
            dscores_own.append((down * c.diagonal).sum(axis=2, keepdims=True))
            if r == s:
                grads.D[...] += down.sum(axis=-1).sum(axis=0)
        # (2) y += since ∘ (C S)
        dpast = dout * since
        arriving = xp.matmul(c.C, S)
        arriving *= dpast
        da += xp.matmul(c.of_tokens(_row_sums(arriving)), 1 - past.T)  # from before to token t: through all up to t
        dC = xp.matmul(dpast, S.swapaxes(-1, -2)).sum(axis=2, keepdims=True)
        dS += xp.matmul(c.C.swapaxes(-1, -2), dpast)
        # (1) y = weights entering;  weights = scores ∘ decay
        dentering += xp.matmul(c.weights.swapaxes(-1, -2), dout)
        dweights = xp.matmul(dout, c.entering.swapaxes(-1, -2))
        dscores = c.by_token(dweights)
        dscores *= c.decay[..., :, None, :, None]
        pairs = dscores * c.by_token(c.scores)
        pairs = pairs.sum(axis=-1).sum(axis=-2) if R > 1 else pairs[..., 0, :, 0]  # [b,g,h,Q,Q]
        pairs = xp.matmul(1 - past, pairs)  # from s to t or any later token …
        pairs *= past  # … of which those that begin before t
        da += _row_sums(pairs)
        dscores = dweights.sum(axis=2, keepdims=True)
        t = xp.arange(j - i)
        for (r, s), own in zip(c.ranks, dscores_own, strict=True):
            c.by_token(dscores)[..., t, r, t, s] = own
        dC += xp.matmul(dscores, c.B)
        dB += xp.matmul(dscores.swapaxes(-1, -2), c.C)
        # entering = x ∘ inflow
        dx += dentering * c.at_positions(c.inflow)
        dentering *= c.x
        grads.x[..., c.positions, :] = dx
        grads.inflow[..., i:j] = c.of_tokens(_row_sums(dentering))
        grads.diagonal[..., i:j] = ddiagonal
        grads.a[..., i:j] = da
        grads.B[..., c.positions, :], grads.C[..., c.positions, :] = dB, dC
