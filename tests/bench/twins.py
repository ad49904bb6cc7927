"""PyTorch twins of the models that are measured: the same models as somebody would write them who knows PyTorch well.

A twin is built from the same `ModelConfig` and its parameters have the same names, so that weights load by name; it shares
nothing else with oxidizr_ref. It is meant to be fast on a CPU, eagerly and under ``torch.compile``. Of these, the first was
kept because it was the fastest here (2 cores of a Xeon with AVX-512, forward and backward):

* rotary positions: two halves joined; ``x cos + rotate_half(x) sin``, which joins and then multiplies twice as many numbers;
* grouped queries: ``enable_gqa``; keys and values repeated before attention, 10% slower;
* latent attention: values padded to the width of the keys, so that attention runs without forming the scores; as they are,
  the scores are formed, up to three times as slow;
* the mixture of experts: see `MixtureOfExperts`. Of state spaces `state_space_twins.py` tells.

Shapes: B batch, T time, D hidden, H heads, K key/value heads, P head width, R rotated width, n tokens, E experts, k chosen.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - as everybody who writes PyTorch does

from oxidizr_ref.config import ModelConfig

from .state_space_twins import Mamba1, Mamba2, Mamba3

DTYPES = {"f32": torch.float32, "f64": torch.float64}

#: By `ModelConfig.layer_kinds`: the mixer, and the name of what holds it and its norm (empty: the layer itself).
MAMBAS: dict[str, tuple[type[nn.Module], str, str]] = {
    "mamba1": (Mamba1, "", "mamba"),
    "mamba2": (Mamba2, "mamba2", "mixer"),
    "mamba3": (Mamba3, "mamba3", "mixer"),
}


class RMSNorm(nn.RMSNorm):
    """``x / rms(x) * weight`` over the last axis."""

    def forward(self, x: Tensor) -> Tensor:
        """x: ``[...,D]``. Returns the same shape."""
        return F.rms_norm(x, self.normalized_shape, self.weight, self.eps)


class RoPE(nn.Module):
    """Rotary positions with tables made once: channels i and i + P/2 turned by ``t theta^(-2i/P)``."""

    def __init__(self, width: int, length: int, theta: float) -> None:
        super().__init__()
        frequencies = theta ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
        angles = torch.outer(torch.arange(length, dtype=torch.float64), frequencies)[:, None]  # [T,1,P/2]
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: ``[B,T,H,P]``. Returns the same shape."""
        cos, sin = (cast(Tensor, table)[: x.shape[1]] for table in (self.cos, self.sin))
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class GroupedQueryAttention(nn.Module):
    """Causal attention of H query heads over K key/value heads."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        D, self.heads, self.kv_heads, self.width = config.hidden_size, config.num_heads, config.kv_heads, config.head_dim
        self.q_proj = nn.Linear(D, self.heads * self.width, bias=False)
        self.k_proj = nn.Linear(D, self.kv_heads * self.width, bias=False)
        self.v_proj = nn.Linear(D, self.kv_heads * self.width, bias=False)
        self.o_proj = nn.Linear(self.heads * self.width, D, bias=False)
        self.rope = RoPE(self.width, config.max_seq_len, config.rope_theta)

    def forward(self, x: Tensor) -> Tensor:
        """x: ``[B,T,D]``. Returns the same shape."""
        B, T, _ = x.shape
        q = self.rope(self.q_proj(x).view(B, T, self.heads, self.width)).transpose(1, 2)
        k = self.rope(self.k_proj(x).view(B, T, self.kv_heads, self.width)).transpose(1, 2)
        v = self.v_proj(x).view(B, T, self.kv_heads, self.width).transpose(1, 2)
        grouped = self.heads != self.kv_heads
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class LatentAttention(nn.Module):
    """MLA: keys and values of every head are formed from a latent; positions are in R more channels, the key's shared."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        D, self.heads, self.width, self.rotated = config.hidden_size, config.num_heads, config.head_dim, config.d_rope
        if config.mla_latent_norm:
            raise NotImplementedError("the twin has no norm of the latents")
        inner = self.heads * self.width
        self.w_dkv = nn.Linear(D, config.kv_latent_dim, bias=False)
        self.w_dq = nn.Linear(D, config.q_latent_dim, bias=False)
        self.w_uq = nn.Linear(config.q_latent_dim, inner, bias=False)
        self.w_uk = nn.Linear(config.kv_latent_dim, inner, bias=False)
        self.w_uv = nn.Linear(config.kv_latent_dim, inner, bias=False)
        self.w_qr = nn.Linear(D, self.heads * self.rotated, bias=False)
        self.w_kr = nn.Linear(D, self.rotated, bias=False)
        self.o_proj = nn.Linear(inner, D, bias=False)
        self.rope = RoPE(self.rotated, config.max_seq_len, config.rope_theta)

    def forward(self, x: Tensor) -> Tensor:
        """x: ``[B,T,D]``. Returns the same shape."""
        B, T, _ = x.shape
        H, P, R = self.heads, self.width, self.rotated
        c_q, c_kv = self.w_dq(x), self.w_dkv(x)
        q_r = self.rope(self.w_qr(x).view(B, T, H, R))
        k_r = self.rope(self.w_kr(x).view(B, T, 1, R)).expand(B, T, H, R)
        q = torch.cat((self.w_uq(c_q).view(B, T, H, P), q_r), dim=-1)
        k = torch.cat((self.w_uk(c_kv).view(B, T, H, P), k_r), dim=-1)
        v = F.pad(self.w_uv(c_kv).view(B, T, H, P), (0, R))
        y = F.scaled_dot_product_attention(*(u.transpose(1, 2) for u in (q, k, v)), is_causal=True)
        return self.o_proj(y[..., :P].transpose(1, 2).reshape(B, T, H * P))


class SwiGLU(nn.Module):
    """``down(silu(gate(x)) * up(x))``."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: ``[...,D]``. Returns the same shape."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Router(nn.Module):
    """The scores by which experts are chosen."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: ``[n,D]``. Returns ``[n,E]``."""
        return self.gate(x)


class MixtureOfExperts(nn.Module):
    """k experts a token, each on its own tokens alone, and a shared one.

    Tokens are sorted by expert and cut into one piece an expert; what comes out is weighted and added where it belongs. The
    lengths of the pieces are known only while it runs, so a compiled graph breaks here, as it does in any such layer.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        sizes = config.hidden_size, config.intermediate_size
        self.count, self.chosen = config.num_experts, config.experts_per_tok
        if self.chosen < 2:
            raise NotImplementedError("the twin weighs two experts a token or more")
        self.experts = nn.ModuleList(SwiGLU(*sizes) for _ in range(self.count))
        self.shared_expert = SwiGLU(*sizes) if config.shared_expert_enabled else None
        self.router = Router(config)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: ``[B,T,D]``. Returns the same shape, and the balance loss ``E Σ_e f_e P_e``."""
        shape, x = x.shape, x.flatten(0, 1)
        logits = self.router(x)
        top, ids = logits.topk(self.chosen, dim=-1)
        weights, order = top.softmax(dim=-1).flatten(), ids.flatten().argsort(stable=True)
        counts = torch.bincount(ids.flatten(), minlength=self.count)
        tokens = order // self.chosen
        parts = x.index_select(0, tokens).split(counts.tolist())
        outputs = torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True)])
        y = torch.zeros_like(x).index_add(0, tokens, outputs * weights[order, None])
        if self.shared_expert is not None:
            y = y + self.shared_expert(x)
        given = counts.to(x.dtype) / order.numel()
        return y.view(shape), self.count * (given * logits.softmax(dim=-1).mean(dim=0)).sum()


class AttentionLayer(nn.Module):
    """Attention, then feed-forward or experts, each behind its norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        D, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(D, eps)
        self.self_attn = LatentAttention(config) if config.uses_mla else GroupedQueryAttention(config)
        self.post_attention_layernorm = RMSNorm(D, eps)
        self.moe = MixtureOfExperts(config) if config.uses_moe else None
        self.mlp = None if config.uses_moe else SwiGLU(D, config.intermediate_size)

    def forward(self, h: Tensor, balances: list[Tensor]) -> Tensor:
        """h: ``[B,T,D]``. Returns the same shape; a balance loss is added to ``balances``."""
        h = h + self.self_attn(self.input_layernorm(h))
        x = self.post_attention_layernorm(h)
        if self.moe is None:
            assert self.mlp is not None
            return h + self.mlp(x)
        y, balance = self.moe(x)
        balances.append(balance)
        return h + y


class MambaLayer(nn.Module):
    """A Mamba behind its norm."""

    def __init__(self, kind: str, config: ModelConfig) -> None:
        super().__init__()
        mixer, holder, self.mixer_name = MAMBAS[kind]
        self.holder_name = holder
        home = nn.Module() if holder else self
        home.add_module("norm", RMSNorm(config.hidden_size, config.rms_norm_eps))
        home.add_module(self.mixer_name, mixer(config))
        if holder:
            self.add_module(holder, home)

    def forward(self, h: Tensor, balances: list[Tensor]) -> Tensor:  # noqa: ARG002 - there is no router here
        """h: ``[B,T,D]``. Returns the same shape."""
        home = getattr(self, self.holder_name) if self.holder_name else self
        return h + getattr(home, self.mixer_name)(home.norm(h))


class LanguageModel(nn.Module):
    """The twin of a whole model."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        kinds = config.layer_kinds
        self.layers = nn.ModuleList(MambaLayer(kind, config) if kind in MAMBAS else AttentionLayer(config) for kind in kinds)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = None if config.tie_word_embeddings else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.to(DTYPES[config.dtype])

    def forward(self, tokens: Tensor, targets: Tensor, alpha: float = 0.0) -> Tensor:
        """The loss of tokens and targets, int ``[B,T]``: mean cross-entropy and ``alpha`` times the mean balance loss."""
        h = self.embed_tokens(tokens)
        balances: list[Tensor] = []  # `list[Tensor]()` would break the compiled graph
        for layer in self.layers:
            h = layer(h, balances)
        head = self.embed_tokens if self.lm_head is None else self.lm_head
        logits = F.linear(self.norm(h), head.weight)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return loss + alpha / len(balances) * sum(balances) if balances else loss
