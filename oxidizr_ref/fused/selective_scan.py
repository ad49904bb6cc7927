"""Mamba1's selective scan (Gu & Dao 2023, eq. 2 and algorithm 2), for every channel e and state n of its own::

    dt_t = softplus(raw_t + bias)
    h_t = exp(dt_t A) ∘ h_{t-1} + (dt_t x_t) B_tᵀ,      y_t = h_t C_t + D ∘ x_t

A tile is some channels of one sequence. Time goes block by block: what does not depend on the last state (the exponentials,
the products) is computed for a block at once; the recurrence itself is two operations a token. The backward pass runs the
blocks in reverse, each from the state before it, which was kept; what is inside is computed again (section 3.3.2 there).

Shapes: B batch, T time, E channels, N states a channel. Inside a tile states come first, ``[N,e]``, so that rows are long.
"""

from __future__ import annotations

from typing import NamedTuple

from oxidizr_ref import ops, parallel
from oxidizr_ref.autograd import Function, Tensor
from oxidizr_ref.backend import Array, xp_of
from oxidizr_ref.fused.register import fused
from oxidizr_ref.watch import Part, named

#: Numbers of one tile's state: the recurrence runs over so many at a time.
STATES = 1 << 14
#: Tokens of one block.
BLOCK = 16


def selective_scan_ref(x: Tensor, raw: Tensor, bias: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """The same, token by token, composed from primitives."""
    (batch, T, E), N = x.shape, A.shape[1]
    dt = named("dt", ops.softplus(raw + bias))
    decay = ops.exp(dt.reshape(batch, T, E, 1) * A)
    entering = (dt * x).reshape(batch, T, E, 1) * B.reshape(batch, T, 1, N)
    h, y = entering[:, 0], []
    for t in range(T):
        h = named("state", h * decay[:, t] + entering[:, t] if t else h, Part(t, T))
        y.append(ops.matmul(h, C[:, t].reshape(batch, N, 1)).reshape(batch, 1, E))
    return ops.concatenate(*y, axis=1) + x * D


class _Block(NamedTuple):
    """The numbers of one block that both directions need."""

    at: tuple[int, slice, slice]  # sequence, tokens, channels
    pre: Array  # [t,e] raw + bias
    dt: Array  # [t,e]
    decay: Array  # [t,N,e]
    entering: Array  # [t,e]
    h: Array  # [t,N,e], the state after each token


class SelectiveScan(Function):
    def forward(self, x: Array, raw: Array, bias: Array, A: Array, B: Array, C: Array, D: Array) -> Array:
        xp, (batch, T, E), N = xp_of(x), x.shape, A.shape[1]
        self.inputs, self.A = (x, raw, bias, B, C, D), xp.ascontiguousarray(A.T)  # [N,E]
        self.places = [(b, slice(*e)) for b in range(batch) for e in parallel.tiles(E, max(1, STATES // N))]
        self.blocks = [slice(*t) for t in parallel.tiles(T, BLOCK)]
        self.states = xp.empty((len(self.blocks), batch, N, E), dtype=x.dtype)
        y = xp.empty(x.shape, dtype=x.dtype)

        def channels(index: int) -> None:
            b, e = self.places[index]
            h = xp.zeros((N, e.stop - e.start), dtype=x.dtype)
            for number, t in enumerate(self.blocks):
                self.states[number, b, :, e] = h
                block = self._run(number, (b, t, e))
                h = block.h[-1]
                out = xp.matmul(C[b, t, None, :], block.h)[:, 0]
                out += D[e] * x[b, t, e]
                y[b, t, e] = out

        parallel.for_each(len(self.places), channels)
        return y

    def _run(self, number: int, at: tuple[int, slice, slice]) -> _Block:
        """Block ``number`` of a tile, from the state kept before it."""
        (x, raw, bias, B, _, _), (b, t, e) = self.inputs, at
        xp = xp_of(x)
        pre = raw[at] + bias[e]
        dt = xp.maximum(pre, 0) + xp.log1p(xp.exp(-xp.abs(pre)))
        decay = dt[:, None, :] * self.A[:, e]
        xp.exp(decay, out=decay)
        entering = dt * x[at]
        h = B[b, t, :, None] * entering[:, None, :]
        last = self.states[number, b, :, e]
        for now, left in zip(h, decay, strict=True):
            now += left * last
            last = now
        return _Block(at, pre, dt, decay, entering, h)

    def backward(self, dy: Array) -> tuple[Array, ...]:
        xp, (x, raw, _, B, C, D), (N, E) = xp_of(dy), self.inputs, self.A.shape
        batch, cuts = x.shape[0], -(-E // max(1, STATES // N))
        dx, draw = xp.empty(x.shape, dtype=dy.dtype), xp.empty(raw.shape, dtype=dy.dtype)
        dB, dC = (xp.zeros((max(1, cuts), *B.shape), dtype=dy.dtype) for _ in range(2))  # of each cut of the channels
        dA, dbias, dD = (xp.zeros((batch, *shape), dtype=dy.dtype) for shape in ((N, E), (E,), (E,)))  # of each sequence

        def channels(index: int) -> None:
            (b, e), cut = self.places[index], index % cuts
            carried = xp.zeros((N, e.stop - e.start), dtype=dy.dtype)
            for number, t in reversed(list(enumerate(self.blocks))):
                block, down = self._run(number, (b, t, e)), dy[b, t, e]
                # y = h C + D x
                dh = C[b, t, :, None] * down[:, None, :]
                dC[cut, b, t] = xp.matmul(block.h, down[:, :, None])[:, :, 0]
                dD[b, e] += (down * x[block.at]).sum(axis=0)
                # h_t = decay_t h_{t-1} + B_t entering_t: dh_t also receives what h_{t+1} passes back
                for now, left in zip(dh[::-1], block.decay[::-1], strict=True):
                    now += carried
                    carried = left * now
                dB[cut, b, t] = xp.matmul(dh, block.entering[:, :, None])[:, :, 0]
                dentering = xp.matmul(B[b, t, None, :], dh)[:, 0]
                # decay = exp(dt A)
                dh[0] *= self.states[number, b, :, e]
                dh[1:] *= block.h[:-1]
                dh *= block.decay
                dA[b, :, e] += (dh * block.dt[:, None, :]).sum(axis=0)
                dh *= self.A[:, e]
                ddt = dh.sum(axis=1)
                # entering = dt x
                dx[block.at] = dentering * block.dt + down * D[e]
                ddt += dentering * x[block.at]
                # dt = softplus(pre), pre = raw + bias
                ddt *= 0.5 * xp.tanh(0.5 * block.pre) + 0.5
                draw[block.at] = ddt
                dbias[b, e] += ddt.sum(axis=0)

        parallel.for_each(len(self.places), channels)
        of_sequences = (parallel.tree_sum([xp.zeros(v.shape[1:], dtype=dy.dtype), *v]) for v in (dbias, dA, dD))
        dbias_, dA_, dD_ = of_sequences
        return dx, draw, dbias_, dA_.T, parallel.tree_sum(list(dB)), parallel.tree_sum(list(dC)), dD_


@fused(selective_scan_ref)
def selective_scan(x: Tensor, raw: Tensor, bias: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """The scan from a zero state. x, raw: ``[B,T,E]``; bias, D: ``[E]``; A < 0: ``[E,N]``; B, C: ``[B,T,N]``.

    ``raw + bias`` is dt before its softplus. Returns ``[B,T,E]``.
    """
    return SelectiveScan.apply(x, raw, bias, A, B, C, D)
