"""Mamba2's scan (Dao & Gu 2024): ``h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_tᵀ``, ``y_t = h_t C_t + D x_t``; A is scalar.

`chunked_scan.py` does it chunk by chunk; here the operands are laid out for it, and the tiles spread over the threads. Kept
for the backward pass: the operands and the state before each chunk; what is inside a chunk is computed again.

Shapes: B batch, T time, H heads, P head width, G groups of heads that share B and C, N state size.
"""

from __future__ import annotations

from oxidizr_ref import ops, parallel
from oxidizr_ref.autograd import Function, Tensor
from oxidizr_ref.backend import Array, xp_of
from oxidizr_ref.fused.chunked_scan import Lanes, LaneTile, lane_tiles, scan, scan_backward
from oxidizr_ref.fused.register import fused
from oxidizr_ref.watch import Part, named


def ssd_ref(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, chunk: int) -> Tensor:  # noqa: ARG001
    """The same, token by token, composed from primitives."""
    (batch, T, H, P), (G, N) = x.shape, B.shape[2:]
    B, C = (ops.broadcast_to(v.reshape(batch, T, G, 1, N), shape=(batch, T, G, H // G, N)) for v in (B, C))
    B, C = B.reshape(batch, T, H, 1, N), C.reshape(batch, T, H, N, 1)
    decay = named("decay", ops.exp(dt * A)).reshape(batch, T, H, 1, 1)
    entering = (x * dt.reshape(batch, T, H, 1)).reshape(batch, T, H, P, 1)
    h, y = entering[:, 0] * B[:, 0], []
    for t in range(T):
        h = named("state", h * decay[:, t] + entering[:, t] * B[:, t] if t else h, Part(t, T))
        y.append(ops.matmul(h, C[:, t]).reshape(batch, 1, H, P))
    return ops.concatenate(*y, axis=1) + x * D.reshape(H, 1)


class SSD(Function):
    def forward(self, x: Array, dt: Array, A: Array, B: Array, C: Array, D: Array, *, chunk: int) -> Array:
        xp, (batch, T, H, P), (G, N) = xp_of(x), x.shape, B.shape[2:]
        self.chunk, self.inputs = chunk, (x, dt, A, B, C, D)
        self.tiles = lane_tiles(batch, G, H // G, min(chunk, T))
        self.states = xp.empty((len(parallel.tiles(T, chunk)), batch, G, H // G, N, P), dtype=x.dtype)
        y = xp.empty(x.shape, dtype=x.dtype)

        def lanes(index: int) -> None:
            at = self.tiles[index]
            scan(self._lanes(at), _of_heads(y, at, G), self.states[:, *at[:3]], chunk, 1)

        parallel.for_each(len(self.tiles), lanes)
        return y

    def backward(self, dy: Array) -> tuple[Array, ...]:
        xp, (x, dt, A, B, _, _), tiles = xp_of(dy), self.inputs, self.tiles
        G = B.shape[2]
        dx, ddt = xp.empty(x.shape, dtype=dy.dtype), xp.empty(dt.shape, dtype=dy.dtype)
        parts = 1 + max((at.part for at in tiles), default=0)
        dB, dC = (xp.zeros((parts, *B.shape), dtype=dy.dtype) for _ in range(2))
        dA, dD = (xp.zeros((x.shape[0], *A.shape), dtype=dy.dtype) for _ in range(2))  # of each sequence

        def lanes(index: int) -> None:
            at = tiles[index]
            a = self._lanes(at)
            da, ddiagonal = xp.empty(a.a.shape, dtype=dy.dtype), xp.empty(a.a.shape, dtype=dy.dtype)
            dt_, ddt_ = _of_numbers(dt, at, G), _of_numbers(ddt, at, G)
            grads = Lanes(
                x=_of_heads(dx, at, G),
                a=da,
                inflow=ddt_,
                diagonal=ddiagonal,
                B=_of_groups(dB[at.part], at),
                C=_of_groups(dC[at.part], at),
                D=dD.reshape(-1, G, A.size // G)[at.sequences.start, at.groups, at.heads],
            )
            scan_backward(_of_heads(dy, at, G), a, self.states[:, *at[:3]], grads, self.chunk, 1)
            # inflow = diagonal = dt;  a = dt A
            ddt_ += ddiagonal
            ddt_ += da * _of_parameter(A, at, G)[..., None]
            dA.reshape(-1, G, A.size // G)[at.sequences, at.groups, at.heads] = (da * dt_).sum(axis=-1)

        parallel.for_each(len(tiles), lanes)
        zero = xp.zeros(A.shape, dtype=dy.dtype)
        sums = (parallel.tree_sum(list(parts)) for parts in (dB, dC))
        return dx, ddt, parallel.tree_sum([zero, *dA]), *sums, parallel.tree_sum([zero, *dD])

    def _lanes(self, at: LaneTile) -> Lanes:
        x, dt, A, B, C, D = self.inputs
        G = B.shape[2]
        dt_ = _of_numbers(dt, at, G)
        a = dt_ * _of_parameter(A, at, G)[..., None]
        return Lanes(_of_heads(x, at, G), a, dt_, dt_, _of_groups(B, at), _of_groups(C, at), _of_parameter(D, at, G))


def _of_heads(v: Array, at: LaneTile, G: int) -> Array:
    """A view of ``[B,T,H,P]`` as the tile's ``[b,g,h,T,P]``."""
    B, T, H, P = v.shape
    return v.reshape(B, T, G, H // G, P).transpose(0, 2, 3, 1, 4)[at[:3]]


def _of_groups(v: Array, at: LaneTile) -> Array:
    """A view of ``[B,T,G,N]`` as the tile's ``[b,g,1,T,N]``."""
    return v.transpose(0, 2, 1, 3)[at.sequences, at.groups, None]


def _of_numbers(v: Array, at: LaneTile, G: int) -> Array:
    """A view of ``[B,T,H]`` as the tile's ``[b,g,h,T]``."""
    B, T, H = v.shape
    return v.reshape(B, T, G, H // G).transpose(0, 2, 3, 1)[at[:3]]


def _of_parameter(v: Array, at: LaneTile, G: int) -> Array:
    """A view of ``[H]`` as the tile's ``[g,h]``."""
    return v.reshape(G, -1)[at.groups, at.heads]


@fused(ssd_ref)
def ssd(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, chunk: int) -> Tensor:
    """The scan from a zero state. x: ``[B,T,H,P]``; dt ≥ 0: ``[B,T,H]``; A < 0 and D: ``[H]``; B and C: ``[B,T,G,N]``.

    ``chunk`` (tokens) changes the speed, and the result by rounding alone. Returns ``[B,T,H,P]``.
    """
    return SSD.apply(x, dt, A, B, C, D, chunk=chunk)
