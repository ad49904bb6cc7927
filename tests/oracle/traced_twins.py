"""A plain PyTorch twin of any model, which names every value that a trace of this package names, and trains.

Written from the equations, with nothing of oxidizr_ref but the names of its parameters, config keys and trace (and
`TorchRecorder`, which only writes down what it is handed). It is the other implementation of a comparison: right as it
stands, and wrong in one place where a subclass overrides one of its small methods (`planted_faults.py`).

Shapes: B batch, T time, D hidden, H query heads, K key/value heads, P head width, n tokens, E experts, k experts a token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from oracle.traced_mambas import Mambas, Note, unnoted
from torch import Tensor
from torch.nn import functional

from oxidizr_ref.trace.torch_recorder import TorchRecorder

if TYPE_CHECKING:  # for its keys; nothing of it runs here
    from oxidizr_ref.config import TrainerConfig

torch.set_num_threads(1)  # of such small tensors, handing parts to threads costs more than it gains

#: (tokens, targets), int ``[B,T]`` both.
Batch = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]

#: Ends of the names of parameters that weight decay leaves alone.
NO_DECAY = ("norm.weight", "layernorm.weight", "bias", "A_log", ".D")


class Twin(Mambas):
    """The model, and how it is trained: ``Twin(model_config, weights, dtype)``.

    weights: arrays under our names, all of them. `parameters_by_name` has the leaf tensors.
    """

    # --- the model ----------------------------------------------------------------------------------------------------

    def loss(
        self,
        tokens: np.ndarray[Any, Any],
        targets: np.ndarray[Any, Any],
        note: Note = unnoted,
        load_balance_alpha: float = 0.0,
    ) -> Tensor:
        """Mean cross-entropy plus ``load_balance_alpha`` times the mean of the layers' balance losses.

        tokens, targets: int ``[B,T]``. note: is told of every named value.
        """
        self.note = note
        ids, following = (torch.tensor(np.asarray(rows, dtype=np.int64)) for rows in (tokens, targets))
        h = self.note("embed_tokens.output", self.embedding(self.parameter("embed_tokens.weight"), ids))
        balances: list[Tensor] = []
        for layer in range(self.config.num_layers):
            self.layer, kind = layer, self.kind(layer)
            h = self.attention_layer(h, balances) if kind == "attention" else self.mamba_layer(kind, h)
        self.layer = -1
        logits = self.note("logits", self.norm("norm", h) @ self.output_weight().T)
        token_losses = self.note("token_losses", self.token_losses(logits, following))
        loss = self.note("cross_entropy", self.mean_loss(token_losses))
        if load_balance_alpha and balances:
            loss = loss + load_balance_alpha * self.mean_balance(balances)
        return self.note("loss", loss)

    def kind(self, layer: int) -> str:
        """What a layer is, by oxidizr's rule."""
        c = self.config
        if layer not in c.mamba_layers:
            return "attention"
        return "mamba3" if c.mamba3_enabled else "mamba2" if c.mamba2_num_heads else "mamba1"

    def embedding(self, weight: Tensor, tokens: Tensor) -> Tensor:
        """A row for every token, ``[B,T,D]``."""
        return weight[tokens]

    def output_weight(self) -> Tensor:
        """``[V,D]``."""
        return self.parameter("embed_tokens.weight" if self.config.tie_word_embeddings else "lm_head.weight")

    def token_losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        """``-log softmax(logits)`` at the target, ``[B,T]``."""
        return logits.logsumexp(dim=-1) - logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)

    def mean_loss(self, token_losses: Tensor) -> Tensor:
        """Over all tokens."""
        return token_losses.sum() / token_losses.numel()

    def mean_balance(self, balances: list[Tensor]) -> Tensor:
        """Over the layers that have a router."""
        return torch.stack(balances).mean()

    # --- layers -------------------------------------------------------------------------------------------------------

    def mamba_layer(self, kind: str, h: Tensor) -> Tensor:
        """A Mamba behind its norm."""
        at = f"layers.{self.layer}"
        norm, mixer = (f"{at}.norm", f"{at}.mamba") if kind == "mamba1" else (f"{at}.{kind}.norm", f"{at}.{kind}.mixer")
        x = self.norm(norm, h)
        return self.note(f"{at}.output", self.residual(h, x, getattr(self, kind)(mixer, x)))

    def attention_layer(self, h: Tensor, balances: list[Tensor]) -> Tensor:
        """Attention and feed-forward, each behind its norm. A router adds to ``balances``."""
        at = f"layers.{self.layer}"
        x = self.norm(f"{at}.input_layernorm", h)
        attention = self.latent_attention if self.config.kv_latent_dim else self.grouped_query_attention
        h = self.note(f"{at}.after_attention", self.residual(h, x, attention(f"{at}.self_attn", x)))
        x = self.norm(f"{at}.post_attention_layernorm", h)
        y = self.mixture(f"{at}.moe", x, balances) if self.config.num_experts else self.swiglu(f"{at}.mlp", x)
        return self.note(f"{at}.output", self.residual(h, x, y))

    def residual(self, h: Tensor, x: Tensor, y: Tensor) -> Tensor:  # noqa: ARG002 - what a fault may take instead of h
        """h: before the norm, x: behind it, y: what the part made of x."""
        return h + y

    # --- attention ----------------------------------------------------------------------------------------------------

    def grouped_query_attention(self, at: str, x: Tensor) -> Tensor:
        """GQA with rotary positions, as in Llama. x: ``[B,T,D]``."""
        H, K = self.config.num_heads, self.config.kv_heads
        q, k, v = (
            self.linear(f"{at}.{name}_proj", x).unflatten(-1, (heads, -1)) for name, heads in (("q", H), ("k", K), ("v", K))
        )
        q, k = self.note(f"{at}.q", self.rope(q)), self.note(f"{at}.k", self.rope(k))
        return self.linear(f"{at}.o_proj", self.attention(at, q, k, v).flatten(-2))

    def latent_attention(self, at: str, x: Tensor) -> Tensor:
        """MLA in its expanded form. x: ``[B,T,D]``."""
        H = self.config.num_heads
        c_kv, c_q = self.linear(f"{at}.w_dkv", x), self.linear(f"{at}.w_dq", x)
        if self.config.mla_latent_norm:
            c_kv, c_q = self.norm(f"{at}.kv_norm", c_kv), self.norm(f"{at}.q_norm", c_q)
        q, k, v = (
            self.linear(f"{at}.{name}", c).unflatten(-1, (H, -1))
            for name, c in (("w_uq", c_q), ("w_uk", c_kv), ("w_uv", c_kv))
        )
        q_r = self.note(f"{at}.q_r", self.rope(self.linear(f"{at}.w_qr", x).unflatten(-1, (H, -1))))
        k_r = self.note(f"{at}.k_r", self.rope(self.linear(f"{at}.w_kr", x).unsqueeze(2)))
        q = self.note(f"{at}.queries", torch.cat([q, q_r], dim=-1))
        k = self.note(f"{at}.keys", torch.cat([k, k_r.expand(-1, -1, H, -1)], dim=-1))
        return self.linear(f"{at}.o_proj", self.attention(at, q, k, v).flatten(-2))

    def attention(self, at: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q: ``[B,T,H,P]``, k: ``[B,T,K,P]``, v: ``[B,T,K,V]``. Returns ``[B,T,H,V]``."""
        H = q.shape[2]
        scale = self.scale(k.shape[-1])
        scores = self.note(f"{at}.scores", self.attention_scores(q, self.heads_for_queries(k, H), scale))
        hidden = ~self.visible(scores.shape[-1])
        masked = self.note(f"{at}.masked_scores", scores.masked_fill(hidden, -math.inf))
        probs = self.note(f"{at}.probs", self.softmax(masked))
        return self.note(f"{at}.context", torch.einsum("bhts,bshp->bthp", probs, self.heads_for_queries(v, H)))

    def rope(self, x: Tensor) -> Tensor:
        """x ``[B,T,heads,d]`` turned by its positions: pair i by the angle ``t theta^(-2i/d)``; angles in float64."""
        T, d = x.shape[1], x.shape[-1]
        frequencies = self.config.rope_theta ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
        angles = (torch.arange(T, dtype=torch.float64)[:, None] * frequencies)[:, None]  # [T,1,d/2]
        return self.rotate(x, angles.cos().to(x.dtype), angles.sin().to(x.dtype))

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Channel i of the first half and channel i of the second are a pair."""
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    def scale(self, width: int) -> float:
        """What scores are multiplied by; width: of the keys."""
        return 1 / math.sqrt(width)

    def heads_for_queries(self, v: Tensor, H: int) -> Tensor:
        """``[B,T,K,P]`` to ``[B,T,H,P]``: query head i reads key/value head ``i // (H/K)``."""
        return v.repeat_interleave(H // v.shape[2], dim=2)

    def attention_scores(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        """``[B,H,T,S]``."""
        return torch.einsum("bthp,bshp->bhts", q, k) * scale

    def visible(self, T: int) -> Tensor:
        """Whether query t may see key s, ``[T,T]``."""
        return torch.ones(T, T, dtype=torch.bool).tril()

    def softmax(self, scores: Tensor) -> Tensor:
        """Over the keys."""
        return scores.softmax(dim=-1)

    # --- feed-forward -------------------------------------------------------------------------------------------------

    def swiglu(self, at: str, x: Tensor) -> Tensor:
        gate, up = self.linear(f"{at}.gate_proj", x), self.linear(f"{at}.up_proj", x)
        return self.linear(f"{at}.down_proj", self.note(f"{at}.activation", self.activation(gate, up)))

    def activation(self, gate: Tensor, up: Tensor) -> Tensor:
        return functional.silu(gate) * up

    def mixture(self, at: str, x: Tensor, balances: list[Tensor]) -> Tensor:
        """Each token through its k experts. x: ``[B,T,D]``; the balance loss is added to ``balances``."""
        tokens, E = x.flatten(0, -2), self.config.num_experts
        logits = self.linear(f"{at}.router.gate", tokens)
        probs = self.note(f"{at}.router.probs", logits.softmax(dim=-1))
        ids = self.note(f"{at}.router.ids", self.expert_ids(logits.detach()))
        weights = self.note(f"{at}.router.weights", self.router_weights(logits, probs, ids))
        balances.append(self.note(f"{at}.router.balance", self.balance(probs, ids)))
        chosen = tokens.new_zeros(*ids.shape, tokens.shape[-1])  # [n,k,D]
        for e in range(E):
            place = torch.nonzero(ids == e, as_tuple=True)  # (token, which of its experts), in order of tokens
            y = self.swiglu(f"{at}.experts.{e}", self.note(f"{at}.experts.{e}.input", tokens[place[0]]))
            chosen = chosen.index_put(place, y)
        shared = self.swiglu(f"{at}.shared_expert", tokens) if self.config.shared_expert_enabled else None
        return self.note(f"{at}.output", self.combined(chosen, weights, shared).unflatten(0, x.shape[:-1]))

    def expert_ids(self, logits: Tensor) -> Tensor:
        """The k largest logits, the largest first, equal ones in order of index: ``[n,k]``."""
        return (-logits).sort(dim=-1, stable=True).indices[:, : self.config.experts_per_tok]

    def router_weights(self, logits: Tensor, probs: Tensor, ids: Tensor) -> Tensor:
        """Softmax over the k logits (Mixtral); of one expert a token its probability among all (Switch)."""
        return logits.gather(-1, ids).softmax(dim=-1) if ids.shape[-1] > 1 else probs.gather(-1, ids)

    def balance(self, probs: Tensor, ids: Tensor) -> Tensor:
        """``E Σ_e f_e P_e``: f the shares of the n·k assignments, P the mean probabilities (Fedus et al. 2021)."""
        E = probs.shape[-1]
        shares = functional.one_hot(ids, E).to(probs.dtype).mean(dim=(0, 1))
        return E * (shares * probs.mean(dim=0)).sum()

    def combined(self, chosen: Tensor, weights: Tensor, shared: Tensor | None) -> Tensor:
        """``Σ_k weight · expert's result [+ the shared expert's]``."""
        y = (weights.unsqueeze(-1) * chosen).sum(dim=1)
        return y if shared is None else y + shared

    # --- training -----------------------------------------------------------------------------------------------------

    def optimizer(self, trainer_config: TrainerConfig) -> torch.optim.Optimizer:
        """AdamW over all parameters. The learning rate is constant: no other schedule is imitated here."""
        assert trainer_config.lr_schedule == "constant" and not trainer_config.warmup_steps
        t = trainer_config
        return torch.optim.AdamW(self.decay_groups(t.weight_decay), lr=t.learning_rate, betas=t.betas, eps=t.eps)

    def decay_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Parameters that decay, and those that do not."""
        kept = [p for name, p in self.parameters_by_name.items() if name.endswith(NO_DECAY)]
        decayed = [p for name, p in self.parameters_by_name.items() if not name.endswith(NO_DECAY)]
        return [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]

    def before_step(self) -> None:
        """Gradients begin at zero; one that nothing adds to counts as zero."""
        for p in self.parameters_by_name.values():
            p.grad = torch.zeros_like(p)

    def gradient_norm(self) -> Tensor:
        """Of all gradients together."""
        return torch.sqrt(torch.stack([(g**2).sum() for g in self._gradients()]).sum())

    def clip_factor(self, norm: Tensor, max_norm: float) -> Tensor:
        """What gradients are multiplied by: ``min(1, max_norm / (norm + 1e-6))``; 1 where ``max_norm`` is 0."""
        return torch.clamp(max_norm / (norm + 1e-6), max=1.0) if max_norm else torch.ones_like(norm)

    def clip(self, factor: Tensor) -> None:
        """Multiply every gradient."""
        for g in self._gradients():
            g.mul_(factor)

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self.parameters_by_name.values() if p.grad is not None]


def write_trace(
    twin: Twin, trainer_config: TrainerConfig, batches: Sequence[Batch], path: str | Path, precision: str = "f64"
) -> None:
    """Train ``twin``, a step a batch, and write everything that happens to ``path``. precision: what it computes in."""
    named = list(twin.parameters_by_name.items())
    optimizer = twin.optimizer(trainer_config)
    with TorchRecorder(path, precision) as recorder:
        recorder.parameters(named)
        for number, (tokens, targets, *_) in enumerate(batches):
            if number:
                recorder.next_step()
            recorder.inputs(tokens, targets)
            twin.before_step()
            twin.loss(tokens, targets, recorder.note, trainer_config.load_balance_alpha).backward()
            recorder.gradients(named)
            norm = twin.gradient_norm()
            factor = twin.clip_factor(norm, trainer_config.max_grad_norm)
            twin.clip(factor)
            recorder.clipped(named, norm, factor, trainer_config.learning_rate)
            optimizer.step()
            recorder.updated(named, optimizer)
