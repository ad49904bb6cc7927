"""Mamba3's two operations (Lahoti et al. 2026, arXiv 2603.15569): the running rotation, and the scan of rotated states.

With λ = sigmoid(trap), α = exp(dt A), β = (1-λ) dt α, γ = λ dt the trapezoidal rule (section 3.1 there) reads::

    h_t = α_t h_{t-1} + β_t x_{t-1} B̄_{t-1}ᵀ + γ_t x_t B̄_tᵀ,      y_t = h_t C̄_t + D x_t

Token s enters the state twice, with γ_s at once and with β_{s+1} a step later. So to every later token it is as if it had
entered with ``inflow_s = γ_s + (1-λ_{s+1}) dt_{s+1}``, to itself with ``diagonal_s = γ_s``: what `chunked_scan.py` does. B̄
and C̄ are B and C plus a bias of each head, turned by the head's angle φ (section 3.2: a complex state in real numbers). They
are heads × state numbers a token; here they exist for one tile at a time.

Shapes: B batch, T time, R rank (1: SISO), H heads, P head width, G groups of heads that share B and C, N state size, S
rotated pairs of state channels: (0,1), (2,3), …
"""

from __future__ import annotations

import math

import numpy as np

from oxidizr_ref import ops, parallel
from oxidizr_ref.autograd import Function, Tensor
from oxidizr_ref.backend import Array, xp_of
from oxidizr_ref.fused.chunked_scan import Lanes, LaneTile, lane_tiles, scan, scan_backward
from oxidizr_ref.fused.register import fused
from oxidizr_ref.watch import Part, named

# --- φ_t = Σ_{s≤t} dt_s π tanh(angle_s)  (mod 2π) ---------------------------------------------------------------------


def running_angle_ref(dt: Tensor, angle: Tensor) -> Tensor:
    """The same, composed from primitives."""
    (B, T, H), S = dt.shape, angle.shape[-1]
    turns = dt.reshape(B, T, H, 1) * (ops.tanh(angle) * math.pi).reshape(B, T, 1, S)
    total = ops.cumsum(turns, axis=1)
    return total - ops.as_tensor(_whole_turns(total.data), like=total)


class RunningAngle(Function):
    def forward(self, dt: Array, angle: Array) -> Array:
        xp = xp_of(dt)
        # All in float64, and without whole turns: a float32 sum that grows with the sequence would lose its digits.
        speed = xp.tanh(angle.astype(np.float64)) * math.pi  # (1)
        y = xp.empty((*dt.shape, angle.shape[-1]), dtype=dt.dtype)

        def sequence(b: int) -> None:
            turns = dt[b, :, :, None] * speed[b, :, None, :]  # (2)
            total = xp.cumsum(turns, axis=0)  # (3)
            y[b] = total - _whole_turns(total)

        parallel.for_each(dt.shape[0], sequence)
        self.dt, self.speed = dt, speed.astype(dt.dtype, copy=False)
        return y

    def backward(self, dy: Array) -> tuple[Array, ...]:
        xp, dt, speed = xp_of(dy), self.dt, self.speed
        ddt, dspeed = xp.empty(dt.shape, dtype=dy.dtype), xp.empty(speed.shape, dtype=dy.dtype)

        def sequence(b: int) -> None:
            dturns = xp.flip(xp.cumsum(xp.flip(dy[b], 0), axis=0), 0)  # (3) total = running sum of turns
            # (2) turns = dt speed
            ddt[b] = (dturns * speed[b, :, None, :]).sum(axis=2)
            dspeed[b] = (dturns * dt[b, :, :, None]).sum(axis=1)

        parallel.for_each(dt.shape[0], sequence)
        return ddt, dspeed * (math.pi - speed * speed / math.pi)  # (1) speed = π tanh(angle)


def next_angle(phi: Array, dt: Array, angle: Array) -> Array:
    """φ ``[B,H,S]`` a token further, in float64 as it must be: dt ``[B,H]``, angle ``[B,S]``."""
    total = phi + dt[:, :, None] * (xp_of(angle).tanh(angle.astype(np.float64)) * math.pi)[:, None]
    further: Array = total - _whole_turns(total)
    return further


def _whole_turns(angle: Array) -> Array:
    return 2 * math.pi * xp_of(angle).floor(angle / (2 * math.pi))


@fused(running_angle_ref)
def running_angle(dt: Tensor, angle: Tensor) -> Tensor:
    """How far each head's pairs have turned. dt: ``[B,T,H]``, angle: ``[B,T,S]``.

    Returns ``[B,T,H,S]``, from 0 to 2π (which rounding may reach).
    """
    return RunningAngle.apply(dt, angle)


# --- the scan ---------------------------------------------------------------------------------------------------------


def turn(v: Array, phi: Array) -> Array:
    """v ``[…,N]``, its first 2S channels turned pair by pair by φ ``[…,S]``: ``(v1 cos - v2 sin, v1 sin + v2 cos)``."""
    xp, width = xp_of(v), 2 * phi.shape[-1]
    cos, sin, v1, v2 = xp.cos(phi), xp.sin(phi), v[..., 0:width:2], v[..., 1:width:2]
    y = v.copy()
    y[..., 0:width:2] = v1 * cos - v2 * sin
    y[..., 1:width:2] = v1 * sin + v2 * cos
    return y


def _turn_ref(v: Tensor, phi: Tensor) -> Tensor:
    """The same for tensors. v: ``[B,T,R,H,N]``, phi: ``[B,T,H,S]``."""
    B, T, H, S = phi.shape
    phi = phi.reshape(B, T, 1, H, S)
    cos, sin, v1, v2 = ops.cos(phi), ops.sin(phi), v[..., 0 : 2 * S : 2], v[..., 1 : 2 * S : 2]
    shape = (*v.shape[:-1], S, 1)
    pairs = ops.concatenate((v1 * cos - v2 * sin).reshape(*shape), (v1 * sin + v2 * cos).reshape(*shape), axis=-1)
    return ops.concatenate(pairs.reshape(*v.shape[:-1], 2 * S), v[..., 2 * S :], axis=-1)


def mamba3_scan_ref(
    x: Tensor,
    a: Tensor,
    inflow: Tensor,
    diagonal: Tensor,
    B: Tensor,
    C: Tensor,
    B_bias: Tensor,
    C_bias: Tensor,
    phi: Tensor,
    D: Tensor,
    chunk: int,  # noqa: ARG001
) -> Tensor:
    """The same, token by token, composed from primitives."""
    (batch, T, R, H, P), (G, N) = x.shape, B.shape[3:]
    across = (batch, T, R, G, H // G, N)
    B, C = (ops.broadcast_to(v.reshape(batch, T, R, G, 1, N), shape=across).reshape(batch, T, R, H, N) for v in (B, C))
    B, C = (_turn_ref(v + ops.swapaxes(bias, 0, 1), phi) for v, bias in ((B, B_bias), (C, C_bias)))
    B, C, decay = named("B_turned", B), named("C_turned", C), named("decay", ops.exp(a))
    # What enters a step late, so that the state of a token is read by its output and by the next state, as in the paper.
    decay, diagonal, late = (v.reshape(batch, T, H, 1, 1) for v in (decay, diagonal, inflow - diagonal))
    # What the ranks of a token bring together: Σ_r x^r B̄^rᵀ, [batch,T,H,P,N]
    outer = ops.matmul(ops.transpose(x, order=(0, 1, 3, 4, 2)), ops.transpose(B, order=(0, 1, 3, 2, 4)))
    C = ops.transpose(C, order=(0, 1, 3, 4, 2))  # [batch,T,H,N,R]
    h, y = outer[:, 0] * 0.0, []
    for t in range(T):
        h = h * decay[:, t]
        state = named("state", h + outer[:, t] * diagonal[:, t], Part(t, T))
        out = ops.matmul(state, C[:, t])  # [batch,H,P,R]
        y.append(ops.transpose(out, order=(0, 3, 1, 2)).reshape(batch, 1, R, H, P))
        h = state + outer[:, t] * late[:, t]
    return ops.concatenate(*y, axis=1) + x * D.reshape(H, 1)


class Mamba3Scan(Function):
    def forward(self, *inputs: Array, chunk: int) -> Array:
        x, xp = inputs[0], xp_of(inputs[0])
        (batch, T, R, H, P), N = x.shape, inputs[4].shape[-1]
        self.inputs, self.chunk = inputs, max(1, chunk // R)  # tokens, so that a chunk has as many positions at any rank
        self.tiles = _head_tiles(batch, inputs[4].shape[3], H, min(self.chunk, T) * R)
        self.states = xp.empty((len(parallel.tiles(T, self.chunk)), batch, H, 1, N, P), dtype=x.dtype)
        y = xp.empty(x.shape, dtype=x.dtype)

        def lanes(index: int) -> None:
            at = self.tiles[index]
            scan(self._lanes(at), _positions(y, at), self.states[:, *at[:3]], self.chunk, R)

        parallel.for_each(len(self.tiles), lanes)
        return y

    def backward(self, dy: Array) -> tuple[Array, ...]:
        xp, tiles = xp_of(dy), self.tiles
        x, a, inflow, diagonal, B, _, B_bias, _, phi, _ = self.inputs
        R, H, G = x.shape[2], x.shape[3], B.shape[3]
        dx, da, dinflow, ddiagonal, dphi = (xp.empty(v.shape, dtype=dy.dtype) for v in (x, a, inflow, diagonal, phi))
        parts = 1 + max((at.part for at in tiles), default=0)
        dB, dC = (xp.zeros((parts, *B.shape), dtype=dy.dtype) for _ in range(2))
        dbias, dD = xp.empty((2, x.shape[0], *B_bias.shape), dtype=dy.dtype), xp.zeros((x.shape[0], H), dtype=dy.dtype)

        def lanes(index: int) -> None:
            at = tiles[index]
            a = self._lanes(at)
            grads = Lanes(
                x=_positions(dx, at),
                a=_numbers(da, at),
                inflow=_numbers(dinflow, at),
                diagonal=_numbers(ddiagonal, at),
                B=xp.empty(a.B.shape, dtype=dy.dtype),
                C=xp.empty(a.C.shape, dtype=dy.dtype),
                D=dD[at.sequences.start, at.groups, None],
            )
            scan_backward(_positions(dy, at), a, self.states[:, *at[:3]], grads, self.chunk, R)
            # B̄ = turn(B + bias, φ): turned back, its gradient is that of B + bias; what it says of φ is B̄1 dB̄2 - B̄2 dB̄1
            angle = _angles(phi, at, R)
            dangle = _across(a.B, grads.B, angle) + _across(a.C, grads.C, angle)
            b, h, TR, S = dangle.shape
            dphi[at.sequences, :, at.groups] = dangle.reshape(b, h, TR // R, R, S).sum(axis=3).transpose(0, 2, 1, 3)
            groups = slice(at.groups.start * G // H, -(-at.groups.stop * G // H))
            for i, (whole, grad) in enumerate(((dB, grads.B), (dC, grads.C))):
                back = turn(grad[:, :, 0], -angle).reshape(b, h, TR // R, R, -1)
                dbias[i, at.sequences, at.groups] = back.sum(axis=2)
                back = back.reshape(b, groups.stop - groups.start, -1, *back.shape[2:]).sum(axis=2)  # [b,g,T,R,N]
                whole[at.part, at.sequences, :, :, groups] = back.transpose(0, 2, 3, 1, 4)

        parallel.for_each(len(tiles), lanes)
        dB, dC = (parallel.tree_sum(list(of_parts)) for of_parts in (dB, dC))
        zero, none = xp.zeros(B_bias.shape, dtype=dy.dtype), xp.zeros(H, dtype=dy.dtype)
        dB_bias, dC_bias = (parallel.tree_sum([zero, *of_sequences]) for of_sequences in dbias)
        return dx, da, dinflow, ddiagonal, dB, dC, dB_bias, dC_bias, dphi, parallel.tree_sum([none, *dD])

    def _lanes(self, at: LaneTile) -> Lanes:
        x, a, inflow, diagonal, B, C, B_bias, C_bias, phi, D = self.inputs
        R, H, G = x.shape[2], x.shape[3], B.shape[3]
        angle = _angles(phi, at, R)
        groups = xp_of(x).arange(H)[at.groups] // (H // G)  # of each head of the tile

        def turned(v: Array, bias: Array) -> Array:
            v = v[at.sequences][:, :, :, groups].transpose(0, 3, 1, 2, 4)  # [b,h,T,R,N]
            v = v + bias[at.groups, None]
            return turn(v.reshape(*v.shape[:2], -1, v.shape[-1]), angle)[:, :, None]

        return Lanes(
            x=_positions(x, at),
            a=_numbers(a, at),
            inflow=_numbers(inflow, at),
            diagonal=_numbers(diagonal, at),
            B=turned(B, B_bias),
            C=turned(C, C_bias),
            D=D[at.groups, None],
        )


def _head_tiles(B: int, G: int, H: int, positions: int) -> list[LaneTile]:
    """Tiles of neighbouring heads: whole groups, or a part of one. To the scan every head is a group: its B̄ is its own."""
    tiles = []
    for sequences, groups, heads, part in lane_tiles(B, G, H // G, positions):
        first, last = groups.start * (H // G) + heads.start, (groups.stop - 1) * (H // G) + heads.stop
        tiles.append(LaneTile(sequences, slice(first, last), slice(0, 1), part))
    return tiles


def _positions(v: Array, at: LaneTile) -> Array:
    """A view of ``[B,T,R,H,P]`` as the tile's ``[b,h,1,TR,P]``."""
    B, T, R, H, P = v.shape
    return v.reshape(B, T * R, H, P).transpose(0, 2, 1, 3)[at.sequences, at.groups, None]


def _numbers(v: Array, at: LaneTile) -> Array:
    """A view of ``[B,T,H]`` as the tile's ``[b,h,1,T]``."""
    return v.transpose(0, 2, 1)[at.sequences, at.groups, None]


def _angles(phi: Array, at: LaneTile, R: int) -> Array:
    """The tile's angles at every position, ``[b,h,TR,S]``."""
    return xp_of(phi).repeat(phi[at.sequences, :, at.groups].transpose(0, 2, 1, 3), R, axis=2)


def _across(v: Array, dv: Array, phi: Array) -> Array:
    """What the gradient of turned channels ``[b,h,1,TR,N]`` says of their angles ``[b,h,TR,S]``."""
    width = 2 * phi.shape[-1]
    v, dv = v[:, :, 0], dv[:, :, 0]
    across: Array = v[..., 0:width:2] * dv[..., 1:width:2] - v[..., 1:width:2] * dv[..., 0:width:2]
    return across


@fused(mamba3_scan_ref)
def mamba3_scan(
    x: Tensor,
    a: Tensor,
    inflow: Tensor,
    diagonal: Tensor,
    B: Tensor,
    C: Tensor,
    B_bias: Tensor,
    C_bias: Tensor,
    phi: Tensor,
    D: Tensor,
    chunk: int,
) -> Tensor:
    """The scan from a zero state. ``chunk`` (tokens × R) changes the speed, and the result by rounding alone.

    x: ``[B,T,R,H,P]``; a = dt A ≤ 0, inflow, diagonal: ``[B,T,H]``; B, C: ``[B,T,R,G,N]``; their biases: ``[H,R,N]``; phi:
    ``[B,T,H,S]``, S = 0 for no rotation; D: ``[H]``. Returns ``[B,T,R,H,P]``.
    """
    return Mamba3Scan.apply(x, a, inflow, diagonal, B, C, B_bias, C_bias, phi, D, chunk=chunk)
