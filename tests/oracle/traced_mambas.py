"""The Mamba layers of `traced_twins.py`, token by token in plain PyTorch, and what all layers of it are made of.

Written from the equations, with nothing of oxidizr_ref but the names of its parameters, config keys and trace. Every value
with a name in a trace goes through `Parts.note`, and everything behind it reads what that returned, so that its gradient is
the whole one. Every formula is a small method of its own: a planted fault overrides one of them.

Shapes: B batch, T time, D hidden, E channels, H heads, P head width, R rank, G groups, N state size, S rotated pairs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:  # for its keys; nothing of it runs here
    from oxidizr_ref.config import ModelConfig


class Note(Protocol):
    """What is told of every named value. part: place and length of a new first axis, time. Returns ``tensor``."""

    def __call__(self, name: str, tensor: Tensor, part: tuple[int, int] | None = None) -> Tensor: ...


def unnoted(name: str, tensor: Tensor, part: tuple[int, int] | None = None) -> Tensor:  # noqa: ARG001
    """A `Note` that nobody reads."""
    return tensor


class Parts:
    """Parameters, notes, linear maps, norms.

    parameters_by_name: leaf tensors under our names. layer: the number of the layer that is being computed.
    """

    def __init__(self, model_config: ModelConfig, weights: Mapping[str, np.ndarray[Any, Any]], dtype: torch.dtype) -> None:
        self.config = model_config
        self.parameters_by_name = {
            name: torch.tensor(np.asarray(array), dtype=dtype).requires_grad_() for name, array in weights.items()
        }
        self.layer = -1
        self.note: Note = unnoted

    def parameter(self, name: str) -> Tensor:
        """A parameter as the computation reads it."""
        return self.parameters_by_name[name]

    def linear(self, at: str, x: Tensor) -> Tensor:
        """``x Wᵀ`` of the module called ``at``."""
        return self.note(f"{at}.output", x @ self.parameter(f"{at}.weight").T)

    def norm(self, at: str, x: Tensor, groups: int = 1) -> Tensor:
        """``x / rms · weight``, the root mean square that of each group of the last axis."""
        parts = x.unflatten(-1, (groups, -1))
        rms = self.note(f"{at}.rms", self.root_mean_square(parts))
        return self.note(f"{at}.output", (parts / rms).flatten(-2) * self.parameter(f"{at}.weight"))

    def root_mean_square(self, x: Tensor) -> Tensor:
        """``sqrt(mean(x²) + eps)`` over the last axis, which stays, of length 1."""
        return torch.sqrt((x**2).mean(dim=-1, keepdim=True) + self.config.rms_norm_eps)


class Mambas(Parts):
    """The three Mambas, each a function of the normalized input ``[B,T,D]`` returning what is added to the residual."""

    # --- what they share ----------------------------------------------------------------------------------------------

    def convolution(self, at: str, x: Tensor) -> Tensor:
        """silu of the causal depthwise convolution. x: ``[B,T,E]``."""
        pre = self.note(f"{at}.pre", self.conv_pre(x, self.parameter(f"{at}.weight"), self.parameter(f"{at}.bias")))
        return self.note(f"{at}.output", functional.silu(pre))

    def conv_pre(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """``bias + Σ_k weight_k · x_{t-K+1+k}``, zeros before the first token."""
        before = functional.pad(x.mT, (weight.shape[-1] - 1, 0))
        return functional.conv1d(before, weight, bias, groups=x.shape[-1]).mT

    def time_step(self, raw: Tensor, bias: Tensor) -> Tensor:
        """``softplus(raw + bias)``; PyTorch's softplus itself is cut off at 20."""
        return torch.logaddexp(raw + bias, raw.new_zeros(()))

    def decay_rate(self, A_log: Tensor) -> Tensor:
        """A of Mamba1 and Mamba2."""
        return -torch.exp(A_log)

    def skip(self, y: Tensor, x: Tensor, D: Tensor) -> Tensor:
        """What a token tells itself beside the state; D broadcasts."""
        return y + D * x

    def gate(self, y: Tensor, z: Tensor) -> Tensor:
        """Of every Mamba, behind the scan."""
        return y * functional.silu(z)

    # --- Mamba1 (Gu & Dao 2023) ---------------------------------------------------------------------------------------

    def mamba1(self, at: str, u: Tensor) -> Tensor:
        D, N = self.config.hidden_size, self.config.mamba_d_state
        E, rank = self.config.mamba_expand * D, math.ceil(D / 16)
        x, z = self.linear(f"{at}.in_proj", u).split([E, E], dim=-1)
        x = self.convolution(f"{at}.conv1d", x)
        low, B, C = self.linear(f"{at}.x_proj", x).split([rank, N, N], dim=-1)
        raw = self.linear(f"{at}.dt_proj", low)
        dt = self.note(f"{at}.dt", self.time_step(raw, self.parameter(f"{at}.dt_proj.bias")))
        A = self.note(f"{at}.A", self.decay_rate(self.parameter(f"{at}.A_log")))
        y = self.note(f"{at}.y", self.skip(self.mamba1_scan(at, x, dt, A, B, C), x, self.parameter(f"{at}.D")))
        return self.linear(f"{at}.out_proj", self.note(f"{at}.gated", self.gate(y, z)))

    def mamba1_scan(self, at: str, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        """``y_t = C_t · h_t``. x, dt: ``[B,T,E]``, A: ``[E,N]``, B, C: ``[B,T,N]``."""
        (batch, T, E), N = x.shape, A.shape[1]
        h, y = x.new_zeros(batch, E, N), []
        for t in range(T):
            h = self.note(f"{at}.state", self.mamba1_state(t, h, x, dt, A, B), (t, T))
            y.append(torch.einsum("ben,bn->be", h, C[:, t]))
        return torch.stack(y, dim=1)

    def mamba1_state(self, t: int, h: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """``h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_tᵀ``, ``[B,E,N]``."""
        return torch.exp(dt[:, t, :, None] * A) * h + torch.einsum("be,bn->ben", dt[:, t] * x[:, t], B[:, t])

    # --- Mamba2 (Dao & Gu 2024) ---------------------------------------------------------------------------------------

    def mamba2(self, at: str, u: Tensor) -> Tensor:
        H, P, G, N = self._state_sizes()
        z, xBC, raw = self.linear(f"{at}.in_proj", u).split([H * P, H * P + 2 * G * N, H], dim=-1)
        dt = self.note(f"{at}.dt", self.time_step(raw, self.parameter(f"{at}.dt_bias")))
        x, B, C = self.convolution(f"{at}.conv1d", xBC).split([H * P, G * N, G * N], dim=-1)
        x = x.unflatten(-1, (H, P))
        B, C = (self.heads_of_groups(v.unflatten(-1, (G, N))) for v in (B, C))
        A = self.note(f"{at}.A", self.decay_rate(self.parameter(f"{at}.A_log")))
        y = self.skip(self.mamba2_scan(at, x, dt, A, B, C), x, self.parameter(f"{at}.D")[:, None])
        gated = self.note(f"{at}.gated", self.gate(self.note(f"{at}.y", y).flatten(-2), z))
        return self.linear(f"{at}.out_proj", self.norm(f"{at}.norm", gated, G))

    def _state_sizes(self) -> tuple[int, int, int, int]:
        """H, P, G and N of Mamba2 and Mamba3."""
        c = self.config
        H = c.mamba2_num_heads
        return H, c.hidden_size * c.mamba2_expand // H, c.mamba2_n_groups, c.mamba2_state_size

    def heads_of_groups(self, v: Tensor) -> Tensor:
        """Each head reads its group's columns: ``[…,G,N]`` to ``[…,H,N]``."""
        return v.repeat_interleave(self.config.mamba2_num_heads // v.shape[-2], dim=-2)

    def mamba2_scan(self, at: str, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        """``y_t = h_t C_t``. x: ``[B,T,H,P]``, dt: ``[B,T,H]``, A: ``[H]``, B, C: ``[B,T,H,N]``."""
        (batch, T, H, P), N = x.shape, B.shape[-1]
        decay = self.note(f"{at}.decay", torch.exp(dt * A))
        h, y = x.new_zeros(batch, H, P, N), []
        for t in range(T):
            h = self.note(f"{at}.state", self.mamba2_state(t, h, decay, x, dt, B), (t, T))
            y.append(torch.einsum("bhpn,bhn->bhp", h, C[:, t]))
        return torch.stack(y, dim=1)

    def mamba2_state(self, t: int, h: Tensor, decay: Tensor, x: Tensor, dt: Tensor, B: Tensor) -> Tensor:
        """``h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_tᵀ``, ``[B,H,P,N]``."""
        return decay[:, t, :, None, None] * h + torch.einsum("bh,bhp,bhn->bhpn", dt[:, t], x[:, t], B[:, t])

    # --- Mamba3 (Lahoti et al. 2026) ----------------------------------------------------------------------------------

    def mamba3(self, at: str, u: Tensor) -> Tensor:
        (H, P, G, N), R, S = self._state_sizes(), max(1, self.config.mamba3_mimo_rank), self._rotated_pairs()
        sizes = [H * P, H * P + 2 * R * G * N, H, H, H, S]
        z, xBC, dd_dt, dd_A, dd_trap, angle = self.linear(f"{at}.in_proj", u).split(sizes, dim=-1)
        if self.config.mamba3_use_conv:
            xBC = self.convolution(f"{at}.conv1d", xBC)
        x, B, C = xBC.split([H * P, R * G * N, R * G * N], dim=-1)
        B = self.norm(f"{at}.B_norm", B.unflatten(-1, (R, G, N)))
        C = self.norm(f"{at}.C_norm", C.unflatten(-1, (R, G, N)))
        dt = self.note(f"{at}.dt", self.time_step(dd_dt, self.parameter(f"{at}.dt_bias")))
        A = self.note(f"{at}.A", self.mamba3_decay_rate(dd_A))
        trap = self.note(f"{at}.trap", torch.sigmoid(dd_trap))
        diagonal = self.note(f"{at}.diagonal", self.diagonal(trap, dt))
        inflow = self.note(f"{at}.inflow", diagonal + self.late(trap, dt))
        phi = self.note(f"{at}.phi", self.running_angle(dt, angle))
        x = self.note(f"{at}.x", self._by_rank(at, "mimo_x", x.unflatten(-1, (H, P))))
        B = self.note(f"{at}.B_turned", self.turned(self._with_bias(at, "B_bias", B), phi))
        C = self.note(f"{at}.C_turned", self.turned(self._with_bias(at, "C_bias", C), phi))
        decay = self.note(f"{at}.decay", torch.exp(dt * A))
        y = self.mamba3_scan(at, x, decay, inflow, diagonal, B, C)
        y = self.note(f"{at}.y", self.skip(y, x, self.parameter(f"{at}.D")[:, None]))
        z = self._by_rank(at, "mimo_z", z.unflatten(-1, (H, P)))
        gated = self.note(f"{at}.gated", self.gate(y, z))
        if self.config.mamba3_mimo_rank:
            gated = self.note(f"{at}.summed", self.sum_of_ranks(gated, self.parameter(f"{at}.mimo_o").transpose(0, 1)))
        return self.linear(f"{at}.out_proj", gated.flatten(2))

    def _rotated_pairs(self) -> int:
        fraction = self.config.mamba3_rope_fraction if self.config.mamba3_complex_rope else 0
        return int(self.config.mamba2_state_size * fraction) // 2

    def _by_rank(self, at: str, name: str, v: Tensor) -> Tensor:
        """``[B,T,H,P]`` as every rank reads it, ``[B,T,R,H,P]``; without MIMO as it is."""
        v = v.unsqueeze(2)
        return v * self.parameter(f"{at}.{name}").transpose(0, 1) if self.config.mamba3_mimo_rank else v

    def sum_of_ranks(self, gated: Tensor, mimo_o: Tensor) -> Tensor:
        """``Σ_r mimo_o · gated``: ``[B,T,R,H,P]`` and ``[R,H,P]`` to ``[B,T,H,P]``."""
        return (gated * mimo_o).sum(dim=2)

    def _with_bias(self, at: str, name: str, v: Tensor) -> Tensor:
        """B or C of every head: ``[B,T,R,G,N]`` to ``[B,T,R,H,N]``, plus the bias ``[H,R,N]``."""
        return self.heads_of_groups(v) + self.parameter(f"{at}.{name}").transpose(0, 1)

    def mamba3_decay_rate(self, v: Tensor) -> Tensor:
        """``min(-f(v), -1e-4)``, f(v) = 1 + v where v ≥ 0, 1 / (1 - v) elsewhere."""
        f = torch.where(v >= 0, 1 + v, 1 / (1 + v.abs()))
        return torch.where(f > 1e-4, -f, torch.full_like(f, -1e-4))

    def diagonal(self, trap: Tensor, dt: Tensor) -> Tensor:
        """γ: the weight at which a token enters at once."""
        return trap * dt

    def late(self, trap: Tensor, dt: Tensor) -> Tensor:
        """``(1 - λ_{t+1}) dt_{t+1}``: the weight at which token t enters a step later; after the last there is none."""
        return functional.pad(((1 - trap) * dt)[:, 1:], (0, 0, 0, 1))

    def running_angle(self, dt: Tensor, angle: Tensor) -> Tensor:
        """``Σ_{s≤t} dt_s π tanh(angle_s)`` modulo 2π, ``[B,T,H,S]``."""
        turns = dt.unsqueeze(-1) * math.pi * torch.tanh(angle).unsqueeze(2)
        return torch.remainder(turns.cumsum(dim=1), 2 * math.pi)  # of slope 1

    def turned(self, v: Tensor, phi: Tensor) -> Tensor:
        """Channels (2i, 2i+1) of v ``[B,T,R,H,N]`` turned by φ ``[B,T,H,S]`` as complex numbers; those from 2S on stay."""
        S = phi.shape[-1]
        pairs = torch.view_as_complex(v[..., : 2 * S].unflatten(-1, (S, 2)).contiguous())
        rotation = torch.polar(torch.ones_like(phi), phi).unsqueeze(2)
        return torch.cat([torch.view_as_real(pairs * rotation).flatten(-2), v[..., 2 * S :]], dim=-1)

    def mamba3_scan(
        self, at: str, x: Tensor, decay: Tensor, inflow: Tensor, diagonal: Tensor, B: Tensor, C: Tensor
    ) -> Tensor:
        """``y_t = h_t C̄_t`` of every rank. x: ``[B,T,R,H,P]``, B, C: ``[B,T,R,H,N]``, the rest: ``[B,T,H]``."""
        T, y = x.shape[1], []
        entering = torch.einsum("btrhp,btrhn->bthpn", x, B)
        weights = [v[:, :, :, None, None] for v in (decay, inflow, diagonal)]
        h = torch.zeros_like(entering[:, 0])
        for t in range(T):
            h = self.note(f"{at}.state", self.mamba3_state(t, h, entering, *weights), (t, T))
            y.append(torch.einsum("bhpn,brhn->brhp", h, C[:, t]))
        return torch.stack(y, dim=1)

    def mamba3_state(self, t: int, h: Tensor, entering: Tensor, decay: Tensor, inflow: Tensor, diagonal: Tensor) -> Tensor:
        """``h_t = α_t h_{t-1} + β_t x_{t-1} B̄_{t-1}ᵀ + γ_t x_t B̄_tᵀ`` with ``β_t = (1-λ_t) dt_t α_t``; inflow_{t-1} holds
        γ_{t-1} + (1-λ_t) dt_t."""
        h = decay[:, t] * h + diagonal[:, t] * entering[:, t]
        return h + decay[:, t] * (inflow - diagonal)[:, t - 1] * entering[:, t - 1] if t else h
