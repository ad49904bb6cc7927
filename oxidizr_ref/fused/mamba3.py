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
from typing import NamedTuple

import numpy as np

from oxidizr_ref import ops, parallel
from oxidizr_ref.autograd import Function, Tensor
from oxidizr_ref.backend import Array, on_device, xp_of
from oxidizr_ref.fused.chunked_scan import Lanes, LaneTile, lane_tiles, number_of_chunks, scan, scan_backward
from oxidizr_ref.fused.register import fused
from oxidizr_ref.fused.rows import repeated
from oxidizr_ref.kernels import Kernel
from oxidizr_ref.sums import running_sum
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
        xp, (B, T, H), S = xp_of(dt), dt.shape, angle.shape[-1]
        # All in float64, and without whole turns: a float32 sum that grows with the sequence would lose its digits.
        speed = xp.tanh(angle.astype(np.float64)) * math.pi  # (1)
        y = xp.empty((B, T, H, S), dtype=dt.dtype)
        self.places = [(b, i, j) for b in range(B) for i, j in parallel.row_tiles(H, T * S)]

        def heads(index: int) -> None:
            b, i, j = self.places[index]
            total = _running_sum(dt[b, :, i:j, None] * speed[b, :, None, :])  # (2), (3)
            total -= _whole_turns(total)
            y[b, :, i:j] = total

        parallel.for_each(len(self.places), heads)
        self.dt, self.speed = dt, speed.astype(dt.dtype, copy=False)
        return y

    def backward(self, dy: Array) -> tuple[Array, ...]:
        xp, dt, speed = xp_of(dy), self.dt, self.speed
        ddt = xp.empty(dt.shape, dtype=dy.dtype)
        dspeeds = xp.empty((len(self.places), *speed.shape[1:]), dtype=dy.dtype)  # of each tile

        def heads(index: int) -> None:
            b, i, j = self.places[index]
            dturns = xp.flip(_running_sum(xp.flip(dy[b, :, i:j], 0)), 0)  # (3) total = running sum of turns
            # (2) turns = dt speed
            ddt[b, :, i:j] = xp.matmul(dturns, speed[b, :, :, None])[..., 0]
            dspeeds[index] = xp.matmul(dt[b, :, None, i:j], dturns)[:, 0]

        parallel.for_each(len(self.places), heads)
        dspeed = xp.zeros(speed.shape, dtype=dy.dtype)
        cuts = len(self.places) // max(1, len(dt))
        for b in range(len(dt) if cuts else 0):
            dspeed[b] = parallel.tree_sum(list(dspeeds[b * cuts : (b + 1) * cuts]))
        return ddt, dspeed * (math.pi - speed * speed / math.pi)  # (1) speed = π tanh(angle)


@RunningAngle.on_device
class RunningAngleKernels(Function):
    """The same; one thread adds up all turns of one pair of one head."""

    def forward(self, dt: Array, angle: Array) -> Array:
        xp, (B, T, H), S = xp_of(dt), dt.shape, angle.shape[-1]
        dt = xp.ascontiguousarray(dt)
        speed = xp.ascontiguousarray(xp.tanh(angle.astype(np.float64)) * math.pi)  # (1)
        y = xp.empty((B, T, H, S), dtype=dt.dtype)
        _FORWARD.threads(B * H * S, dt, speed, y, B * H * S, T, H, S)
        self.dt, self.speed = dt, speed.astype(dt.dtype, copy=False)
        return y

    def backward(self, dy: Array) -> tuple[Array, ...]:
        xp, dt, speed = xp_of(dy), self.dt, self.speed
        dturns = running_sum(dy, axis=1, reverse=True)  # (3) total = running sum of turns
        # (2) turns = dt speed
        ddt = xp.matmul(dturns, speed[..., None])[..., 0]
        dspeed = xp.matmul(dt[:, :, None, :], dturns)[:, :, 0]
        return ddt, dspeed * (math.pi - speed * speed / math.pi)  # (1) speed = π tanh(angle)


_FORWARD = Kernel("""
__global__ void running_angle(const T* dt, const double* speed, T* y, long long lanes, long long time,
                              long long heads, long long pairs) {
    if (THREAD >= lanes) return;
    long long pair = THREAD % pairs, head = THREAD / pairs % heads, row = THREAD / pairs / heads * time;
    double total = 0, turn = 6.283185307179586;
    for (long long end = row + time; row < end; row++) {
        total += dt[row * heads + head] * speed[row * pairs + pair];  // (2), (3)
        y[(row * heads + head) * pairs + pair] = (T)(total - turn * floor(total / turn));
    }
}
""")

#: Rows that `_running_sum` adds one after another.
_ROWS = 16


def _running_sum(v: Array) -> Array:
    """Sums of ``[T,…]`` from the first row to each, a new array: inside all blocks of rows at once, then across.

    The sums of a prefix are a prefix of the sums.
    """
    xp, T = xp_of(v), v.shape[0]
    total, whole = xp.array(v, order="C"), T - T % _ROWS
    blocks, rest = total[:whole].reshape(T // _ROWS, _ROWS, *v.shape[1:]), total[whole:]
    for k in range(1, _ROWS):
        blocks[:, k] += blocks[:, k - 1]
    for k in range(1, len(rest)):
        rest[k] += rest[k - 1]
    for i in range(_ROWS, T, _ROWS):
        total[i : i + _ROWS] += total[i - 1]
    return total


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
    y = xp_of(v).array(v, order="C")
    _turn(y, _rotation(phi))
    return y


def _rotation(phi: Array) -> Array:
    """``cos φ + i sin φ``: to turn a pair is to multiply it, read as a complex number, by this."""
    xp = xp_of(phi)
    rotation = xp.empty(phi.shape, dtype=xp.result_type(phi.dtype, np.complex64))
    rotation.real, rotation.imag = xp.cos(phi), xp.sin(phi)
    return rotation


def _pairs(v: Array, S: int) -> Array:
    """The first 2S channels of a C-ordered ``[…,N]`` as S complex numbers, a view."""
    v = v[..., : 2 * S]
    pairs: Array = v.view(xp_of(v).result_type(v.dtype, np.complex64))
    return pairs


def _turn(v: Array, rotation: Array) -> None:
    """Turn the pairs of a C-ordered array in place."""
    pairs = _pairs(v, rotation.shape[-1])
    pairs *= rotation


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
        (batch, T, R, H, P), (G, N) = x.shape, inputs[4].shape[3:]
        Q = min(max(1, chunk // R), max(1, T))  # tokens, so that a chunk has as many positions at any rank
        self.inputs, self.tiles = inputs, _head_tiles(batch, T, G, H, Q, R, on_device(x))
        self.states = xp.empty((batch, number_of_chunks(T, Q), H, N, 1, P), dtype=x.dtype)
        y = xp.empty(x.shape, dtype=x.dtype)
        scan(self.tiles, lambda *of: self._operands(*of).lanes, lambda at: at.of_heads(_positions(y), R), self.states, R)
        return y

    def backward(self, dy: Array) -> tuple[Array, ...]:
        xp = xp_of(dy)
        x, a, inflow, diagonal, B, _, B_bias, _, phi, _ = self.inputs
        R, H, G = x.shape[2], x.shape[3], B.shape[3]
        dx, da, dinflow, ddiagonal, dphi = (xp.empty(v.shape, dtype=dy.dtype) for v in (x, a, inflow, diagonal, phi))
        parts = 1 + max((at.part for at in self.tiles), default=0)
        dB, dC = (xp.zeros((parts, *B.shape), dtype=dy.dtype) for _ in range(2))
        chunks = self.states.shape[:2]  # sequences, and chunks of each
        dbias, dD = xp.empty((2, *chunks, *B_bias.shape), dtype=dy.dtype), xp.empty((*chunks, H, 1), dtype=dy.dtype)
        under_way: dict[int, _Operands] = {}

        def lanes_of(at: LaneTile, needed: str) -> Lanes:
            operands = self._operands(at, needed)
            if needed == "BC":
                under_way[id(at)] = operands
            return operands.lanes

        def finish(at: LaneTile, grads: Lanes) -> None:
            lanes, rotation = under_way.pop(id(at))
            at.of_heads(_positions(dx), R)[...] = grads.x
            for whole, grad in ((da, grads.a), (dinflow, grads.inflow), (ddiagonal, grads.diagonal)):
                at.of_numbers(whole[..., None])[...] = grad
            at.of_states(dD)[...] = grads.D
            # B̄ = turn(B + bias, φ): what its gradient says of φ is B̄1 dB̄2 - B̄2 dB̄1; turned back, it is that of B + bias
            S = rotation.shape[-1]
            dangle = xp.zeros(rotation.shape, dtype=dy.dtype)
            for turned, grad in ((lanes.B, grads.B), (lanes.C, grads.C)):
                dangle += (xp.conj(_pairs(turned, S)) * _pairs(grad, S)).imag
            at.cut(dphi)[...] = dangle.reshape(*dangle.shape[:3], at.Q, R, S).sum(axis=-2)
            of_groups = _groups_of(at, G, H)
            g = of_groups.groups.stop - of_groups.groups.start
            for i, (whole, grad) in enumerate(((dB, grads.B), (dC, grads.C))):
                _turn(grad, xp.conj(rotation))
                back = grad.reshape(*grad.shape[:3], at.Q, R, grad.shape[-1])  # [b,m,h,Q,R,N]
                dbias[i, at.sequences, at.chunks, at.groups] = back.sum(axis=3)
                back = back.reshape(*back.shape[:2], g, -1, *back.shape[3:]).sum(axis=3)
                of_groups.cut(whole[at.part].swapaxes(2, 3))[...] = back

        scan_backward(self.tiles, lanes_of, lambda at: at.of_heads(_positions(dy), R), finish, self.states, R)
        dB, dC = (parallel.tree_sum(list(of_parts)) for of_parts in (dB, dC))
        zero, none = xp.zeros(B_bias.shape, dtype=dy.dtype), xp.zeros(H, dtype=dy.dtype)
        dB_bias, dC_bias = (parallel.tree_sum([zero, *v.sum(axis=1)]) for v in dbias)
        dD = parallel.tree_sum([none, *dD[..., 0].sum(axis=1)])
        return dx, da, dinflow, ddiagonal, dB, dC, dB_bias, dC_bias, dphi, dD

    def _operands(self, at: LaneTile, needed: str) -> _Operands:
        x, a, inflow, diagonal, B, C, B_bias, C_bias, phi, D = self.inputs
        R, H, G = x.shape[2], x.shape[3], B.shape[3]
        rotation = repeated(_rotation(at.cut(phi)), R)  # [b,m,h,q,S]
        of_groups = _groups_of(at, G, H)

        def turned(v: Array, bias: Array) -> Array:
            v = of_groups.cut(v.swapaxes(2, 3))[:, :, :, None]  # [b,m,g,1,Q,R,N]
            bias = bias[at.groups, None]  # [h,1,R,N]
            v = v + bias.reshape(v.shape[2], -1, *bias.shape[1:])
            v = v.reshape(*v.shape[:2], bias.shape[0], -1, v.shape[-1])  # [b,m,h,q,N]
            _turn(v, rotation)
            return v

        lanes = Lanes(
            x=at.of_heads(_positions(x), R),
            a=at.of_numbers(a[..., None]),
            inflow=at.of_numbers(inflow[..., None]),
            diagonal=at.of_numbers(diagonal[..., None]),
            B=turned(B, B_bias) if "B" in needed else None,
            C=turned(C, C_bias) if "C" in needed else None,
            D=D[at.groups, None],
        )
        return _Operands(lanes, rotation)


class _Operands(NamedTuple):
    """What the scan reads of a tile, and how B̄ and C̄ were turned: ``[b,m,h,q,S]``."""

    lanes: Lanes
    rotation: Array


def _head_tiles(B: int, T: int, G: int, H: int, Q: int, R: int, on_a_device: bool) -> list[LaneTile]:
    """Tiles of neighbouring heads: whole groups, or a part of one. To the scan every head is a group: its B̄ is its own."""
    tiles = []
    for at in lane_tiles(B, T, G, H // G, Q, R, on_a_device):
        first, last = at.groups.start * (H // G) + at.heads.start, (at.groups.stop - 1) * (H // G) + at.heads.stop
        tiles.append(at._replace(groups=slice(first, last), heads=slice(0, 1)))
    return tiles


def _groups_of(at: LaneTile, G: int, H: int) -> LaneTile:
    """The groups that a tile's heads belong to."""
    return at._replace(groups=slice(at.groups.start * G // H, -(-at.groups.stop * G // H)))


def _positions(v: Array) -> Array:
    """A view of ``[B,T,R,H,P]`` as ``[B,T·R,H,1,P]``."""
    B, T, R, H, P = v.shape
    return v.reshape(B, T * R, H, 1, P)


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
