"""Mamba2's scan (Dao & Gu 2024): ``h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_tᵀ``, ``y_t = h_t C_t + D x_t``; A is scalar.

`chunked_scan.py` does it chunk by chunk; here the operands are laid out for it, and the tiles spread over the threads. Kept
for the backward pass: the operands and the state before each chunk; what is inside a chunk is computed again.

Shapes: B batch, T time, H heads, P head width, G groups of heads that share B and C, N state size.
"""

from __future__ import annotations

from oxidizr_ref import ops, parallel
from oxidizr_ref.autograd import Function, Tensor
from oxidizr_ref.backend import Array, on_device, xp_of
from oxidizr_ref.fused.chunked_scan import Lanes, LaneTile, lane_tiles, number_of_chunks, scan, scan_backward
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
        self.inputs = (_of_groups(x, G), _of_groups(dt, G), A.reshape(G, -1), B, C, D.reshape(G, -1))
        self.tiles = lane_tiles(batch, T, G, H // G, min(chunk, max(1, T)), 1, on_device(x))
        self.states = xp.empty((batch, number_of_chunks(T, chunk), G, N, H // G, P), dtype=x.dtype)
        y = xp.empty(x.shape, dtype=x.dtype)
        scan(self.tiles, self._lanes, lambda at: at.of_heads(_of_groups(y, G)), self.states, 1)
        return y

    def backward(self, dy: Array) -> tuple[Array, ...]:
        xp, (x, dt, A, B, _, D) = xp_of(dy), self.inputs
        G = B.shape[2]
        dx, ddt, da = (xp.empty(v.shape, dtype=dy.dtype) for v in (x, dt, dt))
        parts = 1 + max((at.part for at in self.tiles), default=0)
        dB, dC = (xp.zeros((parts, *B.shape), dtype=dy.dtype) for _ in range(2))
        dD = xp.empty((*self.states.shape[:2], *D.shape), dtype=dy.dtype)  # of each chunk

        def finish(at: LaneTile, grads: Lanes) -> None:
            at.of_heads(dx)[...], at.of_numbers(da)[...], at.of_states(dD)[...] = grads.x, grads.a, grads.D
            at.cut(dB[at.part])[...], at.cut(dC[at.part])[...] = grads.B, grads.C
            # inflow = diagonal = dt;  a = dt A
            at.of_numbers(ddt)[...] = grads.inflow + grads.diagonal + grads.a * A[at.groups, at.heads, None]

        scan_backward(self.tiles, self._lanes, lambda at: at.of_heads(_of_groups(dy, G)), finish, self.states, 1)
        zero = xp.zeros(A.shape, dtype=dy.dtype)
        dA, dD = (parallel.tree_sum([zero, *v.sum(axis=1)]).reshape(-1) for v in (da * dt, dD))
        dB, dC = (parallel.tree_sum(list(of_parts)) for of_parts in (dB, dC))
        return dx.reshape(dy.shape), ddt.reshape(dy.shape[:3]), dA, dB, dC, dD

    def _lanes(self, at: LaneTile, _: str) -> Lanes:
        x, dt, A, B, C, D = self.inputs
        dt_ = at.of_numbers(dt)
        a = dt_ * A[at.groups, at.heads, None]
        return Lanes(at.of_heads(x), a, dt_, dt_, at.cut(B), at.cut(C), D[at.groups, at.heads])


def _of_groups(v: Array, G: int) -> Array:
    """A view of ``[B,T,H,…]`` as ``[B,T,G,H/G,…]``."""
    return v.reshape(*v.shape[:2], G, v.shape[2] // G, *v.shape[3:])


@fused(ssd_ref)
def ssd(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, chunk: int) -> Tensor:
    """The scan from a zero state. x: ``[B,T,H,P]``; dt ≥ 0: ``[B,T,H]``; A < 0 and D: ``[H]``; B and C: ``[B,T,G,N]``.

    ``chunk`` (tokens) changes the speed, and the result by rounding alone. Returns ``[B,T,H,P]``.
    """
    return SSD.apply(x, dt, A, B, C, D, chunk=chunk)
