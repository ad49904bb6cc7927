"""The scan that Mamba2 and Mamba3 share, chunk by chunk, over plain arrays (Dao & Gu 2024, section 6, "SSD").

A state ``S [N,P]`` runs along time; token t lets it decay by ``exp(a_t)`` and adds the outer product of ``B_t`` and ``x_t``.
Unrolled, a token's output is a weighted sum over the tokens before it, and a part of its own::

    y_t = Σ_{s<t} exp(a_{s+1} + … + a_t) inflow_s (C_t·B_s) x_s  +  (diagonal_t (C_t·B_t) + D) x_t

Mamba2 has ``inflow = diagonal = dt``; Mamba3's trapezoidal rule makes them differ. Inside a chunk of Q tokens the sum is a
matrix product; what earlier chunks add passes through the state. With rank R > 1 (Mamba3 MIMO) each token stands for R
positions that share its decay; every position sees all R positions of its own token (the diagonal) and of those before.

Chunks are computed side by side. Only the states before them depend on each other, in `_carry`: what a chunk adds to the
state is computed for all chunks, then carried through them, and then everything else can be computed for all again.

Letters: b sequences, m chunks, g groups sharing B and C, h heads a group, R rank, Q tokens and q = Q·R positions of a chunk,
N state size, P head width. What all heads of a group share is one matrix product for all of them, ``h·P`` wide.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from oxidizr_ref import parallel
from oxidizr_ref.backend import Array, constant, on_device, xp_of
from oxidizr_ref.fused.rows import repeated, row_dots, row_sums
from oxidizr_ref.kernels import Kernel

#: Weights of one tile, ``sequences × chunks × heads × q × q``: what one core works on at a time, and what a device does.
WEIGHTS, DEVICE_WEIGHTS = 1 << 19, 1 << 25


class Lanes(NamedTuple):
    """What the scan reads, or its gradients, of a tile of sequences, chunks, groups and heads."""

    x: Array  # [b,m,g,q,h,P]
    a: Array  # [b,m,g,h,Q], the logarithm of the decay, ≤ 0
    inflow: Array  # [b,m,g,h,Q]
    diagonal: Array  # [b,m,g,h,Q]
    B: Array  # [b,m,g,q,N]
    C: Array  # [b,m,g,q,N]
    D: Array  # [g,h]; its gradient [b,m,g,h], of each chunk


class LaneTile(NamedTuple):
    """A tile: some sequences, chunks of Q tokens, groups, and heads of each. ``part`` numbers a group's cuts."""

    sequences: slice
    chunks: slice
    groups: slice
    heads: slice
    part: int
    start: int  # the first token
    Q: int

    def cut(self, v: Array, R: int = 1) -> Array:
        """A view of ``[B,T·R,G,…]`` as the tile's ``[b,m,g,q,…]``; the heads are still all there."""
        q, m = self.Q * R, self.chunks.stop - self.chunks.start
        v = v[self.sequences, self.start * R : self.start * R + m * q, self.groups]
        return xp_of(v).moveaxis(v.reshape(v.shape[0], m, q, *v.shape[2:]), 3, 2)

    def of_heads(self, v: Array, R: int = 1) -> Array:
        """A view of ``[B,T·R,G,h,P]`` as the tile's ``[b,m,g,q,h,P]``."""
        return self.cut(v, R)[..., self.heads, :]

    def of_numbers(self, v: Array) -> Array:
        """A view of ``[B,T,G,h]`` as the tile's ``[b,m,g,h,Q]``."""
        return self.cut(v)[..., self.heads].swapaxes(-1, -2)

    def of_states(self, v: Array) -> Array:
        """A view of ``[B,M,G,N,h,P]`` (or ``[B,M,G,h]``), one entry a chunk, as the tile's."""
        v = v[self.sequences, self.chunks, self.groups]
        return v[..., self.heads, :] if v.ndim == 6 else v[..., self.heads]


def lane_tiles(B: int, T: int, G: int, h: int, Q: int, R: int, on_a_device: bool = False) -> list[LaneTile]:
    """How B sequences of T tokens and G groups of h heads are cut: a function of shapes alone.

    A last chunk that is shorter than Q tokens is in tiles of its own.
    """
    tiles, weights = [], DEVICE_WEIGHTS if on_a_device else WEIGHTS
    for first, chunks, length in [(0, T // Q, Q), (T // Q, min(1, T % Q), T % Q)]:
        lanes = max(1, weights // max(1, length * R) ** 2)
        places = itertools.product(
            _even_tiles(B, lanes // max(1, G * h * chunks)),
            _even_tiles(chunks, lanes // (G * h)),
            _even_tiles(G, lanes // h),
        )
        for (s, c, g), (part, k) in itertools.product(places, list(enumerate(_even_tiles(h, lanes)))):
            chunk = slice(first + c[0], first + c[1])
            tiles.append(LaneTile(slice(*s), chunk, slice(*g), slice(*k), part, (first + c[0]) * Q, length))
    return tiles


def _even_tiles(count: int, most: int) -> list[parallel.Tile]:
    """Tiles of at most ``most`` (or of one), as equal as can be."""
    number = -(-count // max(1, most))
    return parallel.tiles(count, max(1, -(-count // max(1, number))))


def number_of_chunks(T: int, Q: int) -> int:
    """How many chunks T tokens have, the last one perhaps shorter."""
    return -(-T // Q)


# --- between chunks ---------------------------------------------------------------------------------------------------


class _Passing:
    """What of a chunk concerns the states: its decay, and what enters, all of the tile's shapes."""

    def __init__(self, lanes: Lanes, R: int) -> None:
        xp = xp_of(lanes.x)
        self.R, self.x, self.B, self.C, self.inflow = R, lanes.x, lanes.B, lanes.C, lanes.inflow
        # a_i + … + a_t, never positive. In float64: behind a strong decay, differences of float32 sums have few digits left.
        self.past = constant(_past, lanes.a.shape[-1], like=lanes.a)
        self.cum = xp.matmul(lanes.a.astype(np.float64, order="C"), self.past.T) + lanes.a  # [b,m,g,h,Q]
        dtype = self.x.dtype
        self.since = xp.exp(self.cum.astype(dtype))  # what is left at t of the state before the chunk
        self.until = xp.exp((self.cum[..., -1:] - self.cum).astype(dtype))  # what is left at the end of what enters at t

    def at_positions(self, v: Array) -> Array:
        """A number a token as a column, one for each of its positions: ``[…,h,Q]`` to ``[…,q,h,1]``."""
        v = v.swapaxes(-1, -2)
        return (v if self.R == 1 else repeated(v, self.R))[..., None]

    def of_tokens(self, v: Array) -> Array:
        """Numbers of positions summed over each token's: ``[…,q,h]`` to ``[…,h,Q]``."""
        if self.R > 1:
            v = v.reshape(*v.shape[:-2], -1, self.R, v.shape[-1]).sum(axis=-2)
        return v.swapaxes(-1, -2)

    def total(self) -> Array:
        """What is left of a state after the whole chunk, ``[b,m,g,h]``."""
        return self.since[..., -1]


def _flat(v: Array) -> Array:
    """``[…,h,P]`` with the heads beside each other, ``[…,h·P]``: a view where they lie so."""
    return v.reshape(*v.shape[:-2], v.shape[-2] * v.shape[-1])


def _carry(states: Array, totals: Array, chunks: range) -> None:
    """Overwrite what each chunk adds to the state by the state it meets, in the order ``chunks``: ``S = total S + added``.

    states: ``[B,M,G,N,h,P]``, totals: ``[B,M,G,h]``.
    """
    xp = xp_of(states)
    if on_device(states):
        lanes = states.size // max(1, states.shape[1])
        _CARRY.threads(lanes, states, totals, lanes, *states.shape[1:], int(chunks.step < 0))
        return

    def sequence(b: int) -> None:
        S = xp.zeros(states.shape[2:], dtype=states.dtype)
        for m in chunks:
            added = states[b, m].copy()
            states[b, m] = S
            S *= totals[b, m, :, None, :, None]
            S += added

    parallel.for_each(len(states), sequence)


_CARRY = Kernel("""
__global__ void carry(T* states, const T* totals, long long lanes, long long chunks, long long groups, long long size,
                      long long heads, long long width, long long backward) {
    if (THREAD >= lanes) return;
    long long inside = size * heads * width;  // of a group
    long long group = THREAD / inside % groups, head = THREAD / width % heads, first = THREAD / (groups * inside) * chunks;
    T S = 0;
    for (long long i = 0; i < chunks; i++) {
        long long chunk = (first + (backward ? chunks - 1 - i : i)) * groups + group, at = chunk * inside + THREAD % inside;
        T added = states[at];
        states[at] = S;
        S = totals[chunk * heads + head] * S + added;
    }
}
""")


# --- inside chunks ----------------------------------------------------------------------------------------------------


class _Chunk(_Passing):
    """The numbers inside the chunks that both directions need."""

    def __init__(self, lanes: Lanes, R: int) -> None:
        super().__init__(lanes, R)
        xp, dtype = xp_of(lanes.x), self.x.dtype
        self.ranks = list(itertools.product(range(R), range(R)))
        self.diagonal, self.D = lanes.diagonal, lanes.D
        self.past = self.past.astype(dtype)
        self.entering = self.x * self.at_positions(self.inflow)  # [b,m,g,q,h,P]
        self.decay = _decays(self.cum, dtype)  # [b,m,g,h,Q,Q]: from s to t where s < t, else 1
        self.scores = xp.matmul(self.C, self.B.swapaxes(-1, -2))  # [b,m,g,q,q]: C_t·B_s
        seen = (self.by_token(self.scores) * self.past[:, None, :, None]).reshape(self.scores.shape)
        self.weights = self.decay[..., :, None, :, None] * self.by_token(seen)[..., None, :, :, :, :]
        self.weights = self.weights.reshape(*self.weights.shape[:4], *self.scores.shape[-2:])  # [b,m,g,h,q,q]

    def by_token(self, v: Array) -> Array:
        """A view of ``[…,q,q]`` as ``[…,Q,R,Q,R]``."""
        return v.reshape(*v.shape[:-2], -1, self.R, v.shape[-1] // self.R, self.R)

    def own_score(self, r: int, s: int) -> Array:
        """``C_t·B_t`` between positions r and s of the same token: ``[b,m,g,1,Q]``."""
        return self.scores[..., r :: self.R, s :: self.R].diagonal(axis1=-2, axis2=-1)[..., None, :]

    def own_weight(self, r: int, s: int) -> Array:
        """What position s of a token weighs for its position r: ``[b,m,g,Q,h,1]``."""
        weight = self.diagonal * self.own_score(r, s)
        if r == s:
            weight += self.D[..., None]
        return weight.swapaxes(-1, -2)[..., None]


def _past(tokens: int) -> np.ndarray[Any, Any]:
    """1 where s < t, else 0: ``[tokens, tokens]``."""
    return np.tril(np.ones((tokens, tokens)), -1)


def _decays(cum: Array, dtype: Any) -> Array:
    """``exp(min(0, cum_t - cum_s))``, ``[…,Q]`` to ``[…,Q,Q]`` in ``dtype``.

    For float32 the float64 sums are split in two; each difference is a product of four terms, which BLAS forms ten times as
    fast as a subtraction with broadcasting.
    """
    xp, Q = xp_of(cum), cum.shape[-1]
    if on_device(cum):
        decay = xp.empty((*cum.shape, Q), dtype=dtype)
        _DECAYS.threads(decay.size, decay, xp.ascontiguousarray(cum), decay.size, Q)
        return decay
    high = cum.astype(dtype)
    low, one = (cum - high).astype(dtype), xp.ones(cum.shape, dtype=dtype)
    left, right = xp.stack([high, one, low, one], axis=-1), xp.stack([one, -high, one, -low], axis=-2)
    difference = xp.matmul(left, right)
    xp.minimum(difference, 0, out=difference)  # what lies in the future is no decay: it would overflow
    return xp.exp(difference, out=difference)


_DECAYS = Kernel("""
__global__ void decays(T* decay, const double* cum, long long count, long long tokens) {
    if (THREAD >= count) return;
    double difference = cum[THREAD / tokens] - cum[THREAD / tokens / tokens * tokens + THREAD % tokens];
    decay[THREAD] = exp((T)(difference > 0 ? 0 : difference));
}
""")


def _by_head(v: Array) -> Array:
    """``[…,q,h,P]`` as ``[…,h,q,P]``, a view."""
    return v.swapaxes(-2, -3)


def scan(
    tiles: list[LaneTile],
    lanes_of: Callable[[LaneTile, str], Lanes],
    y_of: Callable[[LaneTile], Array],
    states: Array,
    R: int,
) -> None:
    """Fill y, of each tile ``[b,m,g,q,h,P]``, and states ``[B,M,G,N,h,P]`` with the state before each chunk.

    ``lanes_of`` is told which it must give of B and C, ``"B"``, ``"C"`` or ``"BC"``.
    """
    xp = xp_of(states)
    totals = xp.empty((*states.shape[:3], states.shape[4]), dtype=states.dtype)

    def adds(index: int) -> None:
        at = tiles[index]
        c = _Passing(lanes_of(at, "B"), R)
        leaving = _flat(c.x * c.at_positions(c.inflow * c.until))
        added = at.of_states(states)
        added[...] = xp.matmul(c.B.swapaxes(-1, -2), leaving).reshape(added.shape)  # (4) S' = total S + Bᵀ leaving
        at.of_states(totals)[...] = c.total()

    def outputs(index: int) -> None:
        at = tiles[index]
        c, S, y = _Chunk(lanes_of(at, "BC"), R), at.of_states(states), y_of(at)
        xp.matmul(c.weights, _by_head(c.entering), out=_by_head(y))  # (1) what the tokens of a chunk tell each other
        past = xp.matmul(c.C, _flat(S)).reshape(y.shape)
        past *= c.at_positions(c.since)
        y += past  # (2) what the state before the chunk tells them
        for r, s in c.ranks:
            y[..., r::R, :, :] += c.own_weight(r, s) * c.x[..., s::R, :, :]  # (3) what a token tells itself

    parallel.for_each(len(tiles), adds, like=states)
    _carry(states, totals, range(states.shape[1]))
    parallel.for_each(len(tiles), outputs, like=states)


def scan_backward(
    tiles: list[LaneTile],
    lanes_of: Callable[[LaneTile, str], Lanes],
    dy_of: Callable[[LaneTile], Array],
    finish: Callable[[LaneTile, Lanes], None],
    states: Array,
    R: int,
) -> None:
    """Give ``finish`` the gradients of each tile's lanes; those of B and C are summed over the tile's heads."""
    xp = xp_of(states)
    dstates = xp.empty(states.shape, dtype=states.dtype)  # of the state after each chunk
    totals = xp.empty((*states.shape[:3], states.shape[4]), dtype=states.dtype)

    def adds(index: int) -> None:
        at = tiles[index]
        c, added = _Passing(lanes_of(at, "C"), R), at.of_states(dstates)
        dpast = _flat(dy_of(at) * c.at_positions(c.since))
        added[...] = xp.matmul(c.C.swapaxes(-1, -2), dpast).reshape(added.shape)  # (2) y += since ∘ (C S)
        at.of_states(totals)[...] = c.total()  # (4) S' = total S + …

    def gradients(index: int) -> None:
        at = tiles[index]
        c = _Chunk(lanes_of(at, "BC"), R)
        finish(at, _gradients(c, dy_of(at), at.of_states(states), at.of_states(dstates)))

    parallel.for_each(len(tiles), adds, like=states)
    _carry(dstates, totals, range(states.shape[1])[::-1])
    parallel.for_each(len(tiles), gradients, like=states)


def _gradients(c: _Chunk, dout: Array, S: Array, dS: Array) -> Lanes:
    """The gradients inside the chunks of a tile, given those of y and of the states after the chunks."""
    xp, R, past = xp_of(dout), c.R, c.past
    # (4) S' = total S + Bᵀ leaving, leaving = until ∘ entering
    until = c.at_positions(c.until)
    dentering = xp.matmul(c.B, _flat(dS)).reshape(dout.shape)
    dentering *= until
    dB = xp.matmul(_flat(c.entering * until), _flat(dS).swapaxes(-1, -2))
    # The gradient of a_t is what passes through its decay, be it from token to token or by way of a state.
    leaving = c.of_tokens(row_sums(c.entering * dentering))  # from token s to the end: through all after s
    da = row_sums(dS * S).sum(axis=-2) * c.total()  # from before the chunk to behind it: through all
    da = da[..., None] + xp.matmul(leaving, past.T)
    # (3) y_r += (diagonal (C_r·B_s) + D [r = s]) x_s
    dx, ddiagonal = xp.zeros(dout.shape, dtype=dout.dtype), xp.zeros(c.diagonal.shape, dtype=dout.dtype)
    dD, dscores_own = xp.zeros(c.diagonal.shape[:-1], dtype=dout.dtype), []
    for r, s in c.ranks:
        down = row_sums(dout[..., r::R, :, :] * c.x[..., s::R, :, :]).swapaxes(-1, -2)  # the gradient of the weight
        dx[..., s::R, :, :] += c.own_weight(r, s) * dout[..., r::R, :, :]
        ddiagonal += down * c.own_score(r, s)
        dscores_own.append((down * c.diagonal).sum(axis=-2))
        if r == s:
            dD += down.sum(axis=-1)
    # (2) y += since ∘ (C S)
    dpast = dout * c.at_positions(c.since)
    arriving = xp.matmul(c.C, _flat(S)).reshape(dout.shape)
    arriving *= dpast
    da += xp.matmul(c.of_tokens(row_sums(arriving)), 1 - past.T)  # from before to token t: through all up to t
    dC = xp.matmul(_flat(dpast), _flat(S).swapaxes(-1, -2))
    # (1) y += weights entering;  weights = seen scores ∘ decay
    dentering += _by_head(xp.matmul(c.weights.swapaxes(-1, -2), _by_head(dout)))
    dweights = xp.matmul(_by_head(dout), _by_head(c.entering).swapaxes(-1, -2))
    dscores = _sum_over_heads(c.by_token(dweights), c.decay).reshape(c.scores.shape)
    dscores_by_token = c.by_token(dscores)
    dscores_by_token *= past[:, None, :, None]
    pairs = c.weights
    pairs *= dweights
    if R > 1:
        pairs = c.by_token(pairs).sum(axis=-1).sum(axis=-2)  # [b,m,g,h,Q,Q]
    # from s to t or any later token; of those, that begin before t
    da += row_dots(xp.matmul(1 - past, pairs), past)
    t = xp.arange(past.shape[0])
    for (r, s), own in zip(c.ranks, dscores_own, strict=True):
        dscores_by_token[..., t, r, t, s] = own
    dC += xp.matmul(dscores, c.B)
    dB += xp.matmul(dscores.swapaxes(-1, -2), c.C)
    # entering = x ∘ inflow
    dx += dentering * c.at_positions(c.inflow)
    dentering *= c.x
    return Lanes(dx, da, c.of_tokens(row_sums(dentering)), ddiagonal, dB, dC, dD)


def _sum_over_heads(dweights: Array, decay: Array) -> Array:
    """``Σ_h dweights ∘ decay``: ``[b,m,g,h,Q,R,Q,R]`` and ``[b,m,g,h,Q,Q]`` to ``[b,m,g,Q,R,Q,R]``, in one pass."""
    xp, (h, Q, R) = xp_of(decay), dweights.shape[3:6]
    if on_device(decay):
        total = xp.empty((*dweights.shape[:3], Q, R, Q, R), dtype=decay.dtype)
        _SUM_OVER_HEADS.threads(total.size, dweights, decay, total, total.size, h, Q, R)
        return total
    if dweights.shape[-1] > 1:
        return xp.einsum("...htrsv,...hts->...trsv", dweights, decay)
    return xp.einsum("...hts,...hts->...ts", dweights[..., 0, :, 0], decay)


_SUM_OVER_HEADS = Kernel("""
__global__ void sum_over_heads(const T* dweights, const T* decay, T* total, long long count, long long heads,
                               long long tokens, long long ranks) {
    if (THREAD >= count) return;
    long long q = tokens * ranks, group = THREAD / (q * q), at = THREAD % (q * q);
    long long pair = at / q / ranks * tokens + at % q / ranks;  // of tokens
    T sum = 0;
    for (long long head = group * heads; head < (group + 1) * heads; head++)
        sum += dweights[head * q * q + at] * decay[head * tokens * tokens + pair];
    total[THREAD] = sum;
}
""")
