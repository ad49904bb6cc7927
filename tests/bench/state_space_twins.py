"""PyTorch twins of Mamba 1, 2 and 3 (SISO), from the papers' equations, without kernels: what is fast in plain PyTorch.

Shapes: B batch, T time, D hidden, H heads, P head width, E = H·P channels, G groups of heads sharing B and C, N state size,
S rotated pairs, c chunks, Q tokens of a chunk, K width of the convolution.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - as everybody who writes PyTorch does

from oxidizr_ref.config import ModelConfig


class CausalConv(nn.Module):
    """silu of a causal depthwise convolution over time, as K shifted products."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(channels, 1, kernel)), nn.Parameter(torch.empty(channels))

    def forward(self, x: Tensor) -> Tensor:
        """x: ``[B,T,C]``. Returns the same shape."""
        T, K = x.shape[1], self.weight.shape[2]
        before, y = F.pad(x, (0, 0, K - 1, 0)), self.bias
        for k in range(K):
            y = torch.addcmul(y, before[:, k : k + T], self.weight[:, 0, k])
        return F.silu(y)


def decay_within(a: Tensor) -> Tensor:
    """``exp(a_{s+1} + … + a_t)`` at ``[…,t,s]``, 0 for s > t. a: ``[…,Q]``. Returns ``[…,Q,Q]``."""
    total = a.cumsum(dim=-1)
    future = torch.ones(a.shape[-1], a.shape[-1], dtype=torch.bool).triu(1)
    return (total[..., :, None] - total[..., None, :]).masked_fill(future, -math.inf).exp()


class Mamba2(nn.Module):
    """The layer between norm and residual sum (Dao & Gu 2024)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.width, self.groups = config.mamba2_num_heads, config.mamba2_head_dim, config.mamba2_n_groups
        self.d_state, self.chunk, self.eps = config.mamba2_state_size, config.mamba2_chunk_size, config.rms_norm_eps
        H, E, BC = self.heads, self.heads * self.width, self.groups * self.d_state
        self.in_proj = nn.Linear(config.hidden_size, 2 * E + 2 * BC + H, bias=False)
        self.conv1d = CausalConv(E + 2 * BC, config.mamba2_conv_kernel)
        self.dt_bias, self.A_log, self.D = (nn.Parameter(torch.empty(H)) for _ in range(3))
        self.norm = nn.RMSNorm(E, self.eps)
        self.out_proj = nn.Linear(E, config.hidden_size, bias=False)

    def forward(self, u: Tensor) -> Tensor:
        """u: ``[B,T,D]``. Returns the same shape."""
        (B, T, _), H, P, G, N = u.shape, self.heads, self.width, self.groups, self.d_state
        E, BC = H * P, G * N
        z, xBC, dt = self.in_proj(u).split((E, E + 2 * BC, H), dim=-1)
        x, b, c = self.conv1d(xBC).split((E, BC, BC), dim=-1)
        dt = F.softplus(dt + self.dt_bias)
        x = x.view(B, T, H, P)
        y = ssd(x, dt, -self.A_log.exp(), b.view(B, T, G, N), c.view(B, T, G, N), self.chunk)
        y = (y + x * self.D[:, None]).reshape(B, T, E) * F.silu(z)
        if G == 1:
            y = F.rms_norm(y, (E,), self.norm.weight, self.eps)
        else:
            y = F.rms_norm(y.view(B, T, G, E // G), (E // G,), eps=self.eps).view(B, T, E) * self.norm.weight
        return self.out_proj(y)


def ssd(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk: int) -> Tensor:
    """``h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_tᵀ``, ``y_t = h_t C_t`` in chunks of matrix products.

    x: ``[b,T,H,P]``, dt: ``[b,T,H]``, A: ``[H]``, B, C: ``[b,T,G,N]``. Returns ``[b,T,H,P]``.
    """
    (b, T, H, P), (G, N), Q = x.shape, B.shape[2:], chunk
    rest = -T % Q
    if rest:
        x, B, C = (F.pad(v, (0, 0, 0, 0, 0, rest)) for v in (x, B, C))
        dt = F.pad(dt, (0, 0, 0, rest))
    c = (T + rest) // Q
    a = (dt * A).view(b, c, Q, G, H // G).permute(0, 1, 3, 4, 2)  # [b,c,G,H/G,Q]
    x = (x * dt[..., None]).view(b, c, Q, G, H // G, P)
    B, C = (v.view(b, c, Q, G, N).transpose(2, 3) for v in (B, C))  # [b,c,G,Q,N]
    # Inside a chunk.
    weights = (C @ B.transpose(-1, -2))[:, :, :, None] * decay_within(a)  # [b,c,G,H/G,Q,Q]
    y = weights @ x.permute(0, 1, 3, 4, 2, 5)  # [b,c,G,H/G,Q,P]
    # What a chunk adds to the state, the states before the chunks, and what these add to the outputs.
    total = a.cumsum(dim=-1)
    left = (total[..., -1:] - total).exp().permute(0, 1, 4, 2, 3)  # [b,c,Q,G,H/G]
    added = (x * left[..., None]).transpose(2, 3).flatten(-2)  # [b,c,G,Q,H/G·P]
    added = (B.transpose(-1, -2) @ added).view(b, c, G, N, H // G, P)
    states = before_chunks(added, total[..., -1].exp()[:, :, :, None, :, None])
    seen = (C @ states.flatten(-2)).view(b, c, G, Q, H // G, P)
    y = y.transpose(3, 4) + seen * total.exp().transpose(-1, -2)[..., None]  # [b,c,G,Q,H/G,P]
    return y.transpose(2, 3).reshape(b, c * Q, H, P)[:, :T]


def before_chunks(added: Tensor, decay: Tensor) -> Tensor:
    """The states before each chunk, from zero: ``s_{i+1} = decay_i s_i + added_i``, both ``[b,c,…]``."""
    states = [torch.zeros_like(added[:, 0])]
    for more, kept in zip(added.unbind(1)[:-1], decay.unbind(1)[:-1], strict=True):
        states.append(torch.addcmul(more, states[-1], kept))
    return torch.stack(states, dim=1)


class Mamba3(nn.Module):
    """The layer between norm and residual sum (Lahoti et al. 2026): trapezoidal rule, rotated states, one input a head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if config.mamba3_mimo_rank or config.mamba3_use_conv:
            raise NotImplementedError("the twin is of Mamba3 SISO without convolution")
        self.heads, self.width, self.groups = config.mamba2_num_heads, config.mamba2_head_dim, config.mamba2_n_groups
        self.d_state, self.chunk, self.eps = config.mamba2_state_size, config.mamba2_chunk_size, config.rms_norm_eps
        self.pairs = int(self.d_state * config.mamba3_rope_fraction) // 2 if config.mamba3_complex_rope else 0
        H, E, N, BC = self.heads, self.heads * self.width, self.d_state, self.groups * self.d_state
        self.sizes = (E, E, BC, BC, H, H, H, self.pairs)
        self.in_proj = nn.Linear(config.hidden_size, sum(self.sizes), bias=False)
        self.dt_bias, self.D = (nn.Parameter(torch.empty(H)) for _ in range(2))
        self.B_bias, self.C_bias = (nn.Parameter(torch.empty(H, 1, N)) for _ in range(2))
        self.B_norm, self.C_norm = (nn.RMSNorm(N, self.eps) for _ in range(2))
        self.out_proj = nn.Linear(E, config.hidden_size, bias=False)

    def forward(self, u: Tensor) -> Tensor:
        """u: ``[B,T,D]``. Returns the same shape."""
        (B, T, _), H, P, G, N = u.shape, self.heads, self.width, self.groups, self.d_state
        z, x, b, c, dd_dt, dd_A, trap, angle = self.in_proj(u).split(self.sizes, dim=-1)
        dt = F.softplus(dd_dt + self.dt_bias)
        A = -(F.relu(dd_A) + 1 / (1 + F.relu(-dd_A))).clamp(min=1e-4)
        trap = trap.sigmoid()
        now, late = trap * dt, (1 - trap) * dt
        # What a token brings to all later ones: at once, and with the next step's other half.
        inflow = now + F.pad(late[:, 1:], (0, 0, 0, 1))
        phi = (dt[..., None] * (math.pi * angle.tanh())[:, :, None]).cumsum(dim=1)  # [B,T,H,S]
        cos, sin = phi.cos(), phi.sin()
        b, c = (
            self._turned(F.rms_norm(v.view(B, T, G, N), (N,), norm.weight, self.eps), bias, cos, sin)
            for v, norm, bias in ((b, self.B_norm, self.B_bias), (c, self.C_norm, self.C_bias))
        )
        x = x.view(B, T, H, P)
        y = trapezoidal_scan(x, dt * A, inflow, now, b, c, self.chunk) + x * self.D[:, None]
        return self.out_proj(y.reshape(B, T, H * P) * F.silu(z))

    def _turned(self, v: Tensor, bias: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """v ``[B,T,G,N]`` with each head's bias ``[H,1,N]``, channels (2i, 2i+1) turned: ``[B,T,H,N]``, in another order.

        Both B and C come in this order, all first channels of the pairs, then all second ones, and only their products
        count: the pairs need not be woven together again.
        """
        S = self.pairs
        bias = bias[:, 0]
        v, bias = (torch.cat((w[..., 0 : 2 * S : 2], w[..., 1 : 2 * S : 2], w[..., 2 * S :]), dim=-1) for w in (v, bias))
        v = (v[:, :, :, None] + bias.view(self.groups, -1, self.d_state)).flatten(2, 3)
        first, second, rest = v.split((S, S, self.d_state - 2 * S), dim=-1)
        return torch.cat((first * cos - second * sin, first * sin + second * cos, rest), dim=-1)


def trapezoidal_scan(x: Tensor, a: Tensor, inflow: Tensor, now: Tensor, B: Tensor, C: Tensor, chunk: int) -> Tensor:
    """``y_t = Σ_{s<t} exp(a_{s+1} + … + a_t) inflow_s (C_t·B_s) x_s + now_t (C_t·B_t) x_t`` in chunks of matrix products.

    x: ``[b,T,H,P]``; a, inflow, now: ``[b,T,H]``; B, C: ``[b,T,H,N]``. Returns ``[b,T,H,P]``.
    """
    (b, T, H, P), Q = x.shape, chunk
    rest = -T % Q
    if rest:
        x, B, C = (F.pad(v, (0, 0, 0, 0, 0, rest)) for v in (x, B, C))
        a, inflow, now = (F.pad(v, (0, 0, 0, rest)) for v in (a, inflow, now))
    c = (T + rest) // Q
    a, inflow, now = (v.view(b, c, Q, H).transpose(2, 3) for v in (a, inflow, now))  # [b,c,H,Q]
    x, B, C = (v.view(b, c, Q, H, -1).transpose(2, 3) for v in (x, B, C))  # [b,c,H,Q,·]
    # Inside a chunk. The diagonal of the decay is 1, so what is added there puts `now` in place of `inflow`.
    weights = decay_within(a) * inflow[..., None, :] + torch.diag_embed(now - inflow)
    y = ((C @ B.transpose(-1, -2)) * weights) @ x  # [b,c,H,Q,P]
    total = a.cumsum(dim=-1)
    left = (total[..., -1:] - total).exp() * inflow
    added = B.transpose(-1, -2) @ (x * left[..., None])  # [b,c,H,N,P]
    states = before_chunks(added, total[..., -1].exp()[..., None, None])
    y = y + (C @ states) * total.exp()[..., None]
    return y.transpose(2, 3).reshape(b, c * Q, H, P)[:, :T]


class Mamba1(nn.Module):
    """The layer between norm and residual sum (Gu & Dao 2023)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        D, N = config.hidden_size, config.mamba_d_state
        E, self.rank, self.d_state = config.mamba_expand * D, math.ceil(D / 16), N
        self.in_proj = nn.Linear(D, 2 * E, bias=False)
        self.conv1d = CausalConv(E, config.mamba_d_conv)
        self.x_proj = nn.Linear(E, self.rank + 2 * N, bias=False)
        self.dt_proj = nn.Linear(self.rank, E)
        self.A_log, self.D = nn.Parameter(torch.empty(E, N)), nn.Parameter(torch.empty(E))
        self.out_proj = nn.Linear(E, D, bias=False)

    def forward(self, u: Tensor) -> Tensor:
        """u: ``[B,T,D]``. Returns the same shape."""
        x, z = self.in_proj(u).chunk(2, dim=-1)
        x = self.conv1d(x)
        dt, b, c = self.x_proj(x).split((self.rank, self.d_state, self.d_state), dim=-1)
        dt = F.softplus(self.dt_proj(dt))
        # Time first, so that what one step of the scan reads and writes lies together.
        decay = (dt.transpose(0, 1)[..., None] * -self.A_log.exp()).exp()  # [T,B,E,N]
        entering = (dt * x).transpose(0, 1)[..., None] * b.transpose(0, 1)[:, :, None]
        h = linear_recurrence(decay, entering)
        y = (h @ c.transpose(0, 1)[..., None])[..., 0].transpose(0, 1)  # [B,T,E]
        return self.out_proj((y + x * self.D) * F.silu(z))


@torch.library.custom_op("oxidizr_twins::linear_recurrence", mutates_args=())
def linear_recurrence(decay: Tensor, entering: Tensor) -> Tensor:
    """``h_t = decay_t h_{t-1} + entering_t`` from zero over the first axis, one fused operation a step."""
    h = torch.empty_like(entering)
    h[0] = entering[0]
    for now, more, before, place in zip(decay[1:], entering[1:], h, h[1:], strict=False):
        torch.addcmul(more, now, before, out=place)
    return h


@linear_recurrence.register_fake
def _(decay: Tensor, entering: Tensor) -> Tensor:  # noqa: ARG001
    return torch.empty_like(entering)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0], output)


def _backward(ctx: Any, dh: Tensor) -> tuple[Tensor, Tensor]:
    decay, h = ctx.saved_tensors
    # The same recurrence the other way: what h_t is worth is its own gradient and decay_{t+1} times what h_{t+1} is worth.
    later = torch.cat((decay[1:], torch.zeros_like(decay[:1])))
    worth = linear_recurrence(later.flip(0), dh.flip(0)).flip(0)
    ddecay = torch.zeros_like(decay)
    torch.mul(worth[1:], h[:-1], out=ddecay[1:])
    return ddecay, worth


linear_recurrence.register_autograd(_backward, setup_context=_keep)
