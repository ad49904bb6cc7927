"""Plain PyTorch twins of whole models: Mamba3, and the hybrids that put Mamba2 or Mamba3 beside MLA and experts.

Written from the equations, token by token, with nothing of oxidizr_ref but the names of its parameters and config keys;
gradients are PyTorch's. A twin computes in the dtype of its parameters. Slow and meant to be: it is what the chunked, tiled,
hand-differentiated layers are judged by.

Shapes: B batch, T time, D hidden, H heads, P head width, R rank, G groups, N state size, S rotated pairs, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional

EPS = 1e-5

Weights = Mapping[str, torch.Tensor]
Keys = Mapping[str, Any]


def kinds(keys: Keys) -> list[str]:
    """What each layer is."""
    mamba = "mamba3" if keys.get("mamba3_enabled") else "mamba2"
    return [mamba if i in keys.get("mamba_layers", ()) else "attention" for i in range(keys["num_layers"])]


# --- names and shapes of all parameters -------------------------------------------------------------------------------


def shapes(keys: Keys) -> dict[str, tuple[int, ...]]:
    """Every parameter of the model with the shape that oxidizr's documentation gives it."""
    D, V = keys["hidden_size"], keys["vocab_size"]
    found: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (V, D)}
    parts = {"mamba2": _mamba2_shapes, "mamba3": _mamba3_shapes, "attention": _attention_shapes}
    for i, kind in enumerate(kinds(keys)):
        found |= {f"layers.{i}.{name}": shape for name, shape in parts[kind](keys).items()}
    return {**found, "norm.weight": (D,), "lm_head.weight": (V, D)}


def _state_sizes(keys: Keys) -> tuple[int, int, int, int, int]:
    """H, P, G, N and the kernel of the convolution."""
    names = ("num_heads", "head_dim", "n_groups", "state_size", "conv_kernel")
    H, P, G, N, K = (keys.get(f"mamba2_{name}", 4) for name in names)
    return H, P, G, N, K


def _mamba2_shapes(keys: Keys) -> dict[str, tuple[int, ...]]:
    (H, P, G, N, K), D = _state_sizes(keys), keys["hidden_size"]
    C = H * P + 2 * G * N
    return {
        "mamba2.norm.weight": (D,),
        "mamba2.mixer.in_proj.weight": (H * P + C + H, D),
        "mamba2.mixer.conv1d.weight": (C, 1, K),
        "mamba2.mixer.conv1d.bias": (C,),
        "mamba2.mixer.dt_bias": (H,),
        "mamba2.mixer.A_log": (H,),
        "mamba2.mixer.D": (H,),
        "mamba2.mixer.norm.weight": (H * P,),
        "mamba2.mixer.out_proj.weight": (D, H * P),
    }


def rotated_pairs(keys: Keys) -> int:
    """S: half of the state's channels that turn."""
    turning = keys.get("mamba3_complex_rope", True)
    return int(keys["mamba2_state_size"] * keys.get("mamba3_rope_fraction", 0.5)) // 2 if turning else 0


def _mamba3_shapes(keys: Keys) -> dict[str, tuple[int, ...]]:
    (H, P, G, N, K), D, rank = _state_sizes(keys), keys["hidden_size"], keys.get("mamba3_mimo_rank", 0)
    R = max(1, rank)
    C = H * P + 2 * R * G * N
    found: dict[str, tuple[int, ...]] = {
        "norm.weight": (D,),
        "mixer.in_proj.weight": (H * P + C + 3 * H + rotated_pairs(keys), D),
        "mixer.dt_bias": (H,),
        "mixer.B_bias": (H, R, N),
        "mixer.C_bias": (H, R, N),
        "mixer.B_norm.weight": (N,),
        "mixer.C_norm.weight": (N,),
        "mixer.D": (H,),
        "mixer.out_proj.weight": (D, H * P),
    }
    if rank:
        found |= {f"mixer.{name}": (H, R, P) for name in ("mimo_x", "mimo_z", "mimo_o")}
    if keys.get("mamba3_use_conv"):
        found |= {"mixer.conv1d.weight": (C, 1, K), "mixer.conv1d.bias": (C,)}
    return {f"mamba3.{name}": shape for name, shape in found.items()}


def _attention_shapes(keys: Keys) -> dict[str, tuple[int, ...]]:
    D, H, width, E = keys["hidden_size"], keys["num_heads"], keys["intermediate_size"], keys["num_experts"]
    kv, q, rope, P = keys["kv_latent_dim"], keys["q_latent_dim"], keys["d_rope"], D // H
    attention = {"w_dkv": (kv, D), "w_dq": (q, D), "w_uq": (H * P, q), "w_uk": (H * P, kv), "w_uv": (H * P, kv)}
    attention |= {"w_qr": (H * rope, D), "w_kr": (rope, D), "o_proj": (D, H * P)}
    experts = [f"experts.{e}" for e in range(E)] + (["shared_expert"] if keys.get("shared_expert_enabled") else [])
    return {
        "input_layernorm.weight": (D,),
        **{f"self_attn.{name}.weight": shape for name, shape in attention.items()},
        "post_attention_layernorm.weight": (D,),
        **{f"moe.{e}.{name}_proj.weight": (width, D) for e in experts for name in ("gate", "up")},
        **{f"moe.{e}.down_proj.weight": (D, width) for e in experts},
        "moe.router.gate.weight": (E, D),
    }


# --- the model --------------------------------------------------------------------------------------------------------


def forward(keys: Keys, weights: Weights, tokens: torch.Tensor, alpha: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits ``[B,T,V]`` of tokens ``[B,T]``, and ``alpha`` times the balance loss, mean over mixtures of experts."""
    h, balances = weights["embed_tokens.weight"][tokens], []
    for i, kind in enumerate(kinds(keys)):
        w = {name.removeprefix(f"layers.{i}."): p for name, p in weights.items() if name.startswith(f"layers.{i}.")}
        if kind == "attention":
            h = h + latent_attention(keys, _under("self_attn.", w), rms_norm(h, w["input_layernorm.weight"]))
            y, balance = experts(keys, _under("moe.", w), rms_norm(h, w["post_attention_layernorm.weight"]))
            h = h + y
            balances.append(balance)
        else:
            mixer = mamba2 if kind == "mamba2" else mamba3
            h = h + mixer(keys, _under(f"{kind}.mixer.", w), rms_norm(h, w[f"{kind}.norm.weight"]))
    logits = rms_norm(h, weights["norm.weight"]) @ weights["lm_head.weight"].T
    extra = alpha * torch.stack(balances).mean() if balances else torch.zeros((), dtype=h.dtype)
    return logits, extra


def _under(prefix: str, weights: Weights) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): p for name, p in weights.items() if name.startswith(prefix)}


def rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Over the last axis."""
    return x / torch.sqrt((x**2).mean(dim=-1, keepdim=True) + EPS) * weight


def convolved(w: Weights, x: torch.Tensor) -> torch.Tensor:
    """silu of the causal depthwise convolution over time. x: ``[B,T,C]``."""
    weight = w["conv1d.weight"]
    before = functional.pad(x.transpose(1, 2), (weight.shape[2] - 1, 0))
    return functional.silu(functional.conv1d(before, weight, w["conv1d.bias"], groups=weight.shape[0])).transpose(1, 2)


def mamba2(keys: Keys, w: Weights, u: torch.Tensor) -> torch.Tensor:
    """``h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_tᵀ``, ``y_t = h_t C_t + D x_t``, gate, grouped norm, projection."""
    (H, P, G, N, _), (batch, T, _) = _state_sizes(keys), u.shape
    z, xBC, dt = (u @ w["in_proj.weight"].T).split([H * P, H * P + 2 * G * N, H], dim=-1)
    x, B, C = convolved(w, xBC).split([H * P, G * N, G * N], dim=-1)
    dt, A = functional.softplus(dt + w["dt_bias"]), -torch.exp(w["A_log"])
    x = x.reshape(batch, T, H, P)
    B, C = (v.reshape(batch, T, G, N).repeat_interleave(H // G, dim=2) for v in (B, C))
    h, y = torch.zeros(batch, H, P, N, dtype=u.dtype), []
    for t in range(T):
        decay = torch.exp(dt[:, t] * A)
        h = torch.einsum("bh,bhpn->bhpn", decay, h) + torch.einsum("bh,bhp,bhn->bhpn", dt[:, t], x[:, t], B[:, t])
        y.append(torch.einsum("bhpn,bhn->bhp", h, C[:, t]) + w["D"][:, None] * x[:, t])
    gated = (torch.stack(y, dim=1).reshape(batch, T, H * P) * functional.silu(z)).reshape(batch, T, G, H * P // G)
    return rms_norm(gated, w["norm.weight"].reshape(G, -1)).reshape(batch, T, H * P) @ w["out_proj.weight"].T


def rotated(v: torch.Tensor, phi: torch.Tensor) -> torch.Tensor:
    """Channels (2i, 2i+1) of v ``[B,H,R,N]`` turned by φ ``[B,H,S]`` as complex numbers; those from 2S on stay."""
    S = phi.shape[-1]
    turning = torch.view_as_complex(v[..., : 2 * S].reshape(*v.shape[:-1], S, 2).contiguous())
    turned = turning * torch.polar(torch.ones_like(phi), phi)[:, :, None]
    return torch.cat([torch.view_as_real(turned).flatten(-2), v[..., 2 * S :]], dim=-1)


def mamba3(keys: Keys, w: Weights, u: torch.Tensor) -> torch.Tensor:
    """The trapezoidal rule over rotated states: ``h_t = α h_{t-1} + β x_{t-1} B̄_{t-1}ᵀ + γ x_t B̄_tᵀ``, by rank with MIMO."""
    (H, P, G, N, _), (batch, T, _) = _state_sizes(keys), u.shape
    rank = keys.get("mamba3_mimo_rank", 0)
    R, S = max(1, rank), rotated_pairs(keys)
    BC = R * G * N
    z, xBC, dd_dt, dd_A, trap, angle = (u @ w["in_proj.weight"].T).split([H * P, H * P + 2 * BC, H, H, H, S], dim=-1)
    x, B, C = (convolved(w, xBC) if keys.get("mamba3_use_conv") else xBC).split([H * P, BC, BC], dim=-1)
    B, C = (v.reshape(batch, T, R, G, N) for v in (B, C))
    B, C = rms_norm(B, w["B_norm.weight"]), rms_norm(C, w["C_norm.weight"])
    # Heads read their group's columns: [B,T,R,G,N] to [B,T,H,R,N].
    B, C = (v.repeat_interleave(H // G, dim=3).transpose(2, 3) for v in (B, C))
    B, C = B + w["B_bias"], C + w["C_bias"]
    dt = functional.softplus(dd_dt + w["dt_bias"])
    f = torch.where(dd_A >= 0, 1 + dd_A, 1 / (1 + dd_A.abs()))
    A = -f.clamp(min=1e-4)
    lam = torch.sigmoid(trap)
    alpha, beta, gamma = torch.exp(dt * A), (1 - lam) * dt * torch.exp(dt * A), lam * dt
    x, z = (v.reshape(batch, T, H, 1, P) for v in (x, z))
    x, z = (x * w["mimo_x"], z * w["mimo_z"]) if rank else (x, z)  # [B,T,H,R,P]

    h, before = torch.zeros(batch, H, P, N, dtype=u.dtype), torch.zeros(batch, H, P, N, dtype=u.dtype)
    phi, y = torch.zeros(batch, H, S, dtype=u.dtype), []
    for t in range(T):
        turn = dt[:, t, :, None] * math.pi * torch.tanh(angle[:, t, None, :])
        phi = torch.remainder(phi + turn, 2 * math.pi)  # of slope 1, and a large float32 angle would lose its digits
        entering = torch.einsum("bhrp,bhrn->bhpn", x[:, t], rotated(B[:, t], phi))
        h = alpha[:, t, :, None, None] * h + beta[:, t, :, None, None] * before + gamma[:, t, :, None, None] * entering
        before = entering
        read = torch.einsum("bhpn,bhrn->bhrp", h, rotated(C[:, t], phi))
        y.append((read + w["D"][:, None, None] * x[:, t]) * functional.silu(z[:, t]))
    out = torch.stack(y, dim=1)  # [B,T,H,R,P]
    out = (out * w["mimo_o"]).sum(dim=3) if rank else out[:, :, :, 0]
    return out.reshape(batch, T, H * P) @ w["out_proj.weight"].T


def latent_attention(keys: Keys, w: Weights, x: torch.Tensor) -> torch.Tensor:
    """MLA in its expanded form: every head's keys and values are formed from the latent."""
    (batch, T, D), H = x.shape, keys["num_heads"]
    P, rope = D // H, keys["d_rope"]
    c_kv, c_q = x @ w["w_dkv.weight"].T, x @ w["w_dq.weight"].T
    q, k, v = (
        (c @ w[f"{name}.weight"].T).reshape(batch, T, H, P) for c, name in ((c_q, "w_uq"), (c_kv, "w_uk"), (c_kv, "w_uv"))
    )
    q_r = _positioned((x @ w["w_qr.weight"].T).reshape(batch, T, H, rope), keys["rope_theta"])
    k_r = _positioned((x @ w["w_kr.weight"].T).reshape(batch, T, 1, rope), keys["rope_theta"])
    content = torch.einsum("bthp,bshp->bhts", q, k)
    position = torch.einsum("bthr,bsr->bhts", q_r, k_r[:, :, 0])
    past = torch.ones(T, T, dtype=torch.bool).tril()
    scores = ((content + position) / math.sqrt(P + rope)).masked_fill(~past, -math.inf)
    y = torch.einsum("bhts,bshp->bthp", scores.softmax(dim=-1), v)
    return y.reshape(batch, T, H * P) @ w["o_proj.weight"].T


def _positioned(x: torch.Tensor, theta: float) -> torch.Tensor:
    """Rotary positions: channels i and i + d/2 of x ``[B,T,H,d]`` turned by ``t theta^(-2i/d)``; angles in float64."""
    T, d = x.shape[1], x.shape[-1]
    frequencies = theta ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
    angles = (torch.arange(T, dtype=torch.float64)[:, None] * frequencies)[:, None]  # [T,1,d/2]
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def experts(keys: Keys, w: Weights, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Every expert on every token, weighted by the softmax over the token's k largest logits; and the balance loss."""
    E, k = keys["num_experts"], keys["experts_per_tok"]
    assert k > 1, "with one expert a token the weight is its probability among all"
    logits = x @ w["router.gate.weight"].T
    chosen = logits >= logits.topk(k, dim=-1).values[..., -1:]
    share = logits.masked_fill(~chosen, -math.inf).softmax(dim=-1)  # [B,T,E]
    y = sum(share[..., e, None] * _swiglu(_under(f"experts.{e}.", w), x) for e in range(E))
    if keys.get("shared_expert_enabled"):
        y = y + _swiglu(_under("shared_expert.", w), x)
    given = chosen.to(x.dtype).mean(dim=(0, 1)) / k  # of all k·T assignments
    return y, E * (given * logits.softmax(dim=-1).mean(dim=(0, 1))).sum()


def _swiglu(w: Weights, x: torch.Tensor) -> torch.Tensor:
    hidden = functional.silu(x @ w["gate_proj.weight"].T) * (x @ w["up_proj.weight"].T)
    return hidden @ w["down_proj.weight"].T
