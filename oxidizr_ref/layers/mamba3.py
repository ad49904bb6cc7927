"""Mamba3 (Lahoti et al. 2026, arXiv 2603.15569): trapezoidal rule, data-dependent decay, rotating states, MIMO.

``z, x, B, C, dd_dt, dd_A, trap, angle = in_proj(u)``, then, with λ = sigmoid(trap) and the equations of `fused/mamba3.py`::

    dt = softplus(dd_dt + dt_bias)        A = min(-f(dd_A), -1e-4),  f(v) = 1 + v for v ≥ 0, else 1 / (1 - v)
    out = out_proj(y ∘ silu(z))

With MIMO of rank R every token has R columns of B and C; x, z and the output are read by rank through ``mimo_x``, ``mimo_z``
and ``mimo_o``: ``x^r = x ∘ mimo_x[r]``, ``out = Σ_r mimo_o[r] ∘ y^r ∘ silu(z ∘ mimo_z[r])``.

Shapes: B batch, T time, D hidden, R rank, H heads, P head width, E = H·P, G groups sharing B and C, N state size, S rotated
pairs of the state.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from oxidizr_ref import ops
from oxidizr_ref.autograd import Tensor
from oxidizr_ref.backend import Array
from oxidizr_ref.config import ModelConfig
from oxidizr_ref.fused.mamba3 import mamba3_scan, next_angle, running_angle, turn
from oxidizr_ref.fused.silu_gate import silu_gate
from oxidizr_ref.layers.state_space import CausalConv, final_state, time_step_bias, zeros_like
from oxidizr_ref.nn import Linear, Module, Parameter, RMSNorm, constant
from oxidizr_ref.watch import named

#: The slowest decay: A is at most this.
A_MAX = -1e-4


@dataclass
class Mamba3Cache:
    """The state ``[B,H,P,N]`` and, of the last token: x ``[B,H,P]``, B̄ ``[B,R,H,N]``, φ ``[B,H,S]`` (float64: it
    is a sum over all tokens); with a convolution also its last inputs ``[B,K-1,E+2RGN]``. The same size at any length."""

    state: Array
    x: Array
    B: Array
    phi: Array
    tail: Array | None


class _Projected(NamedTuple):
    z: Tensor  # [B,T,H,P]
    x: Tensor  # [B,T,H,P]
    B: Tensor  # [B,T,R,G,N], normalized
    C: Tensor  # [B,T,R,G,N], normalized
    dt: Tensor  # [B,T,H]
    a: Tensor  # [B,T,H], dt A
    trap: Tensor  # [B,T,H], λ
    angle: Tensor  # [B,T,S]


class Mamba3(Module):
    """The layer between norm and residual sum."""

    def __init__(self, config: ModelConfig, std: float, output_std: float) -> None:
        self.heads, self.head_dim, self.groups = config.mamba2_num_heads, config.mamba2_head_dim, config.mamba2_n_groups
        self.d_state, self.chunk = config.mamba2_state_size, config.mamba2_chunk_size
        self.rank = max(1, config.mamba3_mimo_rank)
        turning = config.mamba3_rope_fraction if config.mamba3_complex_rope else 0.0
        self.pairs = int(self.d_state * turning) // 2
        H, P, R, N, eps = self.heads, self.head_dim, self.rank, self.d_state, config.rms_norm_eps
        self.sizes = (H * P, H * P, R * self.groups * N, R * self.groups * N, H, H, H, self.pairs)
        self.in_proj = Linear(config.hidden_size, sum(self.sizes), std)  # rows z | x | B | C | dd_dt | dd_A | trap | angle
        self.dt_bias = Parameter((H,), time_step_bias)
        self.B_bias, self.C_bias = (Parameter((H, R, N), constant(1.0)) for _ in range(2))
        self.B_norm, self.C_norm = RMSNorm(N, eps), RMSNorm(N, eps)
        self.D = Parameter((H,), constant(1.0))
        self.uses_conv = config.mamba3_use_conv
        if self.uses_conv:
            self.conv1d = CausalConv(sum(self.sizes[1:4]), config.mamba2_conv_kernel)
        mimo = config.mamba3_mimo_rank > 0
        self.mimo_x, self.mimo_o = (Parameter((H, R, P), constant(1.0 / R)) if mimo else None for _ in range(2))
        self.mimo_z = Parameter((H, R, P), constant(1.0)) if mimo else None
        self.out_proj = Linear(H * P, config.hidden_size, output_std)

    def __call__(self, u: Tensor, cache: Mamba3Cache | None = None) -> Tensor:
        """u: ``[B,T,D]``. Returns ``[B,T,D]``. A new ``cache`` is filled, for `step` to go on."""
        p = self._project(u, None if cache is None else cache.tail)
        diagonal = named("diagonal", p.trap * p.dt)  # γ_t
        late = (1.0 - p.trap) * p.dt  # what enters a step late: (1-λ_{t+1}) dt_{t+1}, nothing after the last token
        inflow = named("inflow", diagonal + ops.pad(late[:, 1:], widths=((0, 0), (0, 1), (0, 0))))
        phi = named("phi", running_angle(p.dt, p.angle))
        x = named("x", _by_rank(p.x, self.mimo_x))
        y = mamba3_scan(x, p.a, inflow, diagonal, p.B, p.C, self.B_bias, self.C_bias, phi, self.D, self.chunk)
        if cache is not None:
            B = self._turned(p.B, self.B_bias, phi.data)
            cache.state[...] = final_state(x.data * inflow.data[:, :, None, :, None], p.a.data, B)
            cache.x[...], cache.B[...], cache.phi[...] = p.x.data[:, -1], B[:, -1], phi.data[:, -1]
        return self._out(named("y", y), p.z)

    def _project(self, u: Tensor, tail: Array | None) -> _Projected:
        """All that depends on single tokens (and, through the convolution, on the few before)."""
        (batch, T, _), H, P = u.shape, self.heads, self.head_dim
        sizes = (self.sizes[0], sum(self.sizes[1:4]), *self.sizes[4:])
        z, xBC, dd_dt, dd_A, trap, angle = ops.split(self.in_proj(u), sizes)
        if self.uses_conv:
            xBC = self.conv1d(xBC) if tail is None else self.conv1d.step(xBC, tail)
        x, B, C = ops.split(xBC, self.sizes[1:4])
        B, C = (v.reshape(batch, T, self.rank, self.groups, self.d_state) for v in (B, C))
        dt, A = named("dt", ops.softplus(dd_dt + self.dt_bias)), named("A", _decay_rate(dd_A))
        trap = named("trap", ops.sigmoid(trap))
        z, x = (v.reshape(batch, T, H, P) for v in (z, x))
        return _Projected(z, x, self.B_norm(B), self.C_norm(C), dt, dt * A, trap, angle)

    def _out(self, y: Tensor, z: Tensor) -> Tensor:
        """Gate, sum over ranks, project. y: ``[B,T,R,H,P]``, z: ``[B,T,H,P]``. Returns ``[B,T,D]``."""
        gated = named("gated", silu_gate(y, _by_rank(z, self.mimo_z)))  # [B,T,R,H,P]
        if self.mimo_o is not None:
            gated = named("summed", (gated * ops.swapaxes(self.mimo_o, 0, 1)).sum(axis=2))  # [B,T,H,P]
        return self.out_proj(gated.reshape(*z.shape[:2], self.heads * self.head_dim))

    def new_cache(self, batch: int) -> Mamba3Cache:
        """The state before the first token."""
        H, P, R, N = self.heads, self.head_dim, self.rank, self.d_state
        tail = self.conv1d.new_tail(batch) if self.uses_conv else None
        shapes = (H, P, N), (H, P), (R, H, N), (H, self.pairs)
        state, x, B, phi = (zeros_like(self.D, batch, *shape) for shape in shapes)
        return Mamba3Cache(state, x, B, phi.astype(np.float64), tail)

    def step(self, u: Tensor, cache: Mamba3Cache) -> Tensor:
        """The next token, by the recurrence itself. u: ``[B,1,D]``. Returns ``[B,1,D]``."""
        p = self._project(u, cache.tail)
        batch, H, P, R = u.shape[0], self.heads, self.head_dim, self.rank
        phi = next_angle(cache.phi, p.dt.data[:, 0], p.angle.data[:, 0])
        B, C = (self._turned(v, bias, phi[:, None])[:, 0] for v, bias in ((p.B, self.B_bias), (p.C, self.C_bias)))

        def outer(x: Tensor, B: Array) -> Tensor:
            """``Σ_r x^r B̄^rᵀ``: x ``[B,1,H,P]``, B̄ ``[B,R,H,N]``. Returns ``[B,H,P,N]``."""
            x = _by_rank(x, self.mimo_x).reshape(batch, R, H, P)
            return ops.matmul(ops.transpose(x, order=(0, 2, 3, 1)), ops.swapaxes(Tensor(B), 1, 2))

        alpha, now, late = (
            v.reshape(batch, H, 1, 1) for v in (ops.exp(p.a), p.trap * p.dt, (1.0 - p.trap) * p.dt * ops.exp(p.a))
        )
        before = outer(Tensor(cache.x).reshape(batch, 1, H, P), cache.B)
        h = Tensor(cache.state) * alpha + before * late + outer(p.x, B) * now
        y = ops.matmul(h, ops.transpose(Tensor(C), order=(0, 2, 3, 1)))  # [B,H,P,R]
        y = ops.transpose(y, order=(0, 3, 1, 2)) + _by_rank(p.x, self.mimo_x).reshape(batch, R, H, P) * self.D.reshape(H, 1)
        cache.state[...], cache.x[...], cache.B[...], cache.phi[...] = h.data, p.x.data[:, 0], B, phi
        return self._out(y.reshape(batch, 1, R, H, P), p.z)

    def _turned(self, v: Tensor, bias: Tensor, phi: Array) -> Array:
        """B̄ or C̄: v ``[B,T,R,G,N]``, φ ``[B,T,H,S]``. Returns ``[B,T,R,H,N]``."""
        (batch, T, R, G, N), H = v.shape, self.heads
        v = ops.broadcast_to(v.reshape(batch, T, R, G, 1, N), shape=(batch, T, R, G, H // G, N)).reshape(batch, T, R, H, N)
        return turn((v + ops.swapaxes(bias, 0, 1)).data, phi[:, :, None])


def _by_rank(v: Tensor, weights: Tensor | None) -> Tensor:
    """v ``[B,T,H,P]`` as every rank reads it: ``[B,T,R,H,P]``, by weights ``[H,R,P]`` (None: SISO, as it is)."""
    batch, T, H, P = v.shape
    v = v.reshape(batch, T, 1, H, P)
    return v if weights is None else v * ops.swapaxes(weights, 0, 1)


def _decay_rate(v: Tensor) -> Tensor:
    """``min(-f(v), -1e-4)``: smooth, of slope 1 at zero, and never quite zero."""
    positive = v.data >= 0
    zero = ops.as_tensor(0.0, like=v)
    f = ops.where(v + 1.0, 1.0 / (1.0 - ops.where(zero, v, condition=positive)), condition=positive)
    return ops.where(-f, ops.as_tensor(A_MAX, like=v), condition=-f.data < A_MAX)
