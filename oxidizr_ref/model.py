"""The language model: embedding, a stack of pre-norm residual layers, a final norm, the output projection.

A layer is attention and feed-forward, ``h = h + attention(norm(h)); h = h + feed_forward(norm(h))`` as in Llama (Touvron et
al. 2023), or a Mamba, ``h = h + mamba(norm(h))``. Which, the config says. Parameter names are those of oxidizr and, for
attention layers, of Hugging Face's Llama.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np

from oxidizr_ref import ops
from oxidizr_ref.autograd import Tensor, no_grad
from oxidizr_ref.backend import STORAGE_DTYPES, Array
from oxidizr_ref.config import ModelConfig
from oxidizr_ref.data_marks import IGNORED
from oxidizr_ref.errors import DataError
from oxidizr_ref.fused.linear import linear
from oxidizr_ref.fused.linear_cross_entropy import linear_cross_entropy
from oxidizr_ref.layers.attention import GroupedQueryAttention, LatentAttention, TokenCache
from oxidizr_ref.layers.documents import Documents, apart
from oxidizr_ref.layers.feed_forward import MixtureOfExperts, Routing, SwiGLU
from oxidizr_ref.layers.mamba1 import Mamba1, Mamba1Cache
from oxidizr_ref.layers.mamba2 import Mamba2, Mamba2Cache
from oxidizr_ref.layers.mamba3 import Mamba3, Mamba3Cache
from oxidizr_ref.nn import Embedding, Linear, Module, Parameter, RMSNorm, checked_ids, host_ids
from oxidizr_ref.pictured import Charted
from oxidizr_ref.watch import named

#: Standard deviation of the first weights (Radford et al. 2019, GPT-2).
INIT_STD = 0.02

MambaCache: TypeAlias = Mamba1Cache | Mamba2Cache | Mamba3Cache

#: The Mambas by `ModelConfig.layer_kinds`, and the names oxidizr gives their norm and themselves.
_MAMBAS: dict[str, tuple[type[Mamba1] | type[Mamba2] | type[Mamba3], str, str]] = {
    "mamba1": (Mamba1, "norm", "mamba"),
    "mamba2": (Mamba2, "mamba2.norm", "mamba2.mixer"),
    "mamba3": (Mamba3, "mamba3.norm", "mamba3.mixer"),
}


class AttentionLayer(Module):
    """Two residual parts, each behind its norm: attention (GQA or MLA), then feed-forward (SwiGLU or experts)."""

    def __init__(self, config: ModelConfig, std: float, output_std: float) -> None:
        attention = LatentAttention if config.uses_mla else GroupedQueryAttention
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = attention(config, std, output_std)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.sparse = config.uses_moe
        if self.sparse:
            self.moe = MixtureOfExperts(config, std, output_std)
        else:
            self.mlp = SwiGLU(config.hidden_size, config.intermediate_size, std, output_std)

    def __call__(self, h: Tensor, routings: list[Routing], documents: Documents | None) -> Tensor:
        """h: ``[B,T,D]``. Returns the same shape; what the router did, if there is one, is added to ``routings``."""
        mixed = apart(self.self_attn, self.input_layernorm(h), documents)
        return self._feed_forward(named("after_attention", h + mixed), routings)

    def new_cache(self, batch: int) -> TokenCache:
        """What decoding keeps of the past."""
        return self.self_attn.new_cache(batch)

    def prefill(self, h: Tensor, cache: TokenCache) -> Tensor:
        """The first tokens at once, filling a new cache. h: ``[B,T,D]``. Returns the same shape."""
        return self._feed_forward(h + self.self_attn(self.input_layernorm(h), cache), [])

    def step(self, h: Tensor, cache: TokenCache) -> Tensor:
        """The next token. h: ``[B,1,D]``. Returns the same shape."""
        return self._feed_forward(h + self.self_attn.step(self.input_layernorm(h), cache), [])

    def _feed_forward(self, h: Tensor, routings: list[Routing]) -> Tensor:
        x = self.post_attention_layernorm(h)
        if not self.sparse:
            return named("output", h + self.mlp(x))
        y, routing = self.moe(x)
        routings.append(routing)
        return named("output", h + y)


class MambaLayer(Module):
    """One residual part, a Mamba behind its norm. It has no feed-forward of its own."""

    def __init__(self, kind: str, config: ModelConfig, std: float, output_std: float) -> None:
        mamba, self.norm_name, self.mixer_name = _MAMBAS[kind]
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mixer = mamba(config, std, output_std)

    def children(self) -> Iterator[tuple[str, Parameter | Module]]:
        """As in any module, under oxidizr's names."""
        yield self.norm_name, self.norm
        yield self.mixer_name, self.mixer

    def __call__(self, h: Tensor, routings: list[Routing], documents: Documents | None) -> Tensor:  # noqa: ARG002 - no router
        """h: ``[B,T,D]``. Returns the same shape."""
        return named("output", h + apart(self.mixer, self.norm(h), documents))

    def new_cache(self, batch: int) -> MambaCache:
        """What decoding keeps of the past."""
        return self.mixer.new_cache(batch)

    def prefill(self, h: Tensor, cache: Any) -> Tensor:
        """The first tokens at once, filling a new cache. h: ``[B,T,D]``. Returns the same shape."""
        return h + self.mixer(self.norm(h), cache)

    def step(self, h: Tensor, cache: Any) -> Tensor:
        """The next token. h: ``[B,1,D]``. Returns the same shape."""
        return h + self.mixer.step(self.norm(h), cache)


class LanguageModel(Module, Charted):
    """A causal language model over token ids.

    Shapes: B batch, T time, D hidden, V vocabulary. With ``seed=None`` the parameters know their shapes and hold nothing.
    ``device``: ``"cpu"`` or ``"gpu"``, where the parameters live; the first weights are the same. Tokens and targets may be
    given from anywhere.
    """

    def __init__(self, config: ModelConfig, seed: int | None = 0, device: str = "cpu") -> None:
        self.config = config
        # Each layer adds to the residual stream, most of them twice; scaled so that its variance does not grow with depth.
        output_std = INIT_STD / (2 * config.num_layers) ** 0.5
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, INIT_STD)
        self.layers: list[AttentionLayer | MambaLayer] = [
            MambaLayer(kind, config, INIT_STD, output_std)
            if kind in _MAMBAS
            else AttentionLayer(config, INIT_STD, output_std)
            for kind in config.layer_kinds
        ]
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, INIT_STD)
        if seed is not None:
            self.initialize(seed, STORAGE_DTYPES[config.dtype], device)

    def hidden(
        self, tokens: Array, routings: list[Routing] | None = None, begins: np.ndarray[Any, Any] | None = None
    ) -> Tensor:
        """The last hidden states. tokens: int ``[B,T]``. Returns ``[B,T,D]``; each router adds to ``routings``.

        begins: bool ``[B,T]``, where documents begin that are to be kept apart.
        """
        if tokens.ndim != 2:
            raise DataError(f"tokens must have shape [batch, time], not {list(tokens.shape)}")
        h, routings = self.embed_tokens(tokens), [] if routings is None else routings
        if begins is not None and begins.shape != tokens.shape:
            raise DataError(f"begins have shape {list(begins.shape)}, but the tokens {list(tokens.shape)}")
        documents = None if begins is None else Documents(host_ids(begins))
        for layer in self.layers:
            h = layer(h, routings, documents)
        return self.norm(h)

    def __call__(self, tokens: Array) -> Tensor:
        """The logits of the next token at every position. tokens: int ``[B,T]``. Returns ``[B,T,V]``."""
        return named("logits", self.logits_of(self.hidden(host_ids(tokens))))

    def logits_of(self, h: Tensor) -> Tensor:
        """The logits of last hidden states, ``[...,D]`` to ``[...,V]``."""
        return linear(h, self._output_weight())

    def loss(
        self,
        tokens: Array,
        targets: Array,
        token_count: int | None = None,
        load_balance_alpha: float = 0.0,
        routings: list[Routing] | None = None,
        begins: np.ndarray[Any, Any] | None = None,
    ) -> Tensor:
        """Cross-entropy in nats, summed over the targets and divided by ``token_count`` (default: their number), plus
        ``load_balance_alpha`` times the balance loss: its mean over the mixtures of experts, weighted by the share of
        ``token_count`` that these targets are.

        tokens, targets: int ``[B,T]``; a target of -100 is none. begins: as for `hidden`. With gradient accumulation
        ``token_count`` is the whole step's, so that the micro-batches' losses and gradients simply add up. The full logits
        are never formed. What each router did is added to ``routings``. Returns a scalar.

        Raises DataError for targets of another shape than the tokens, or outside the vocabulary.
        """
        tokens, targets = host_ids(tokens), host_ids(targets)
        if targets.shape != tokens.shape:
            raise DataError(f"targets have shape {list(targets.shape)}, but the tokens {list(tokens.shape)}")
        learned = np.flatnonzero(targets.reshape(-1) != IGNORED)
        count = float(max(1, learned.size) if token_count is None else token_count)
        routings = [] if routings is None else routings
        h = self.hidden(tokens, routings, begins)
        if learned.size < targets.size:
            h, targets = ops.lookup(h.reshape(-1, h.shape[2]), ids=learned[None]), targets.reshape(1, -1)[:, learned]
        targets = checked_ids(targets, self.config.vocab_size, "target")
        loss = linear_cross_entropy(h, self._output_weight(), targets, count)
        loss = named("cross_entropy", loss)
        if load_balance_alpha == 0.0 or not routings:
            return named("loss", loss)
        balance = routings[0].balance
        for routing in routings[1:]:
            balance = balance + routing.balance
        share = float(learned.size) / count
        return named("loss", loss + balance * (load_balance_alpha * share / len(routings)))

    def new_cache(self, batch: int) -> list[Any]:
        """What decoding keeps of the past, layer by layer, before the first token of ``batch`` sequences."""
        return [layer.new_cache(batch) for layer in self.layers]

    def prefill(self, tokens: Array, cache: list[Any]) -> Tensor:
        """The logits after the last of the first tokens of each sequence, ``[B,V]``, at the cost of a forward pass.

        tokens: int ``[B,T]``, T ≥ 1. ``cache`` is a new one, and moves on behind them. Where there is attention, tokens
        beyond ``max_seq_len`` are taken one by one, as by `step`.
        """
        tokens, seen = host_ids(tokens), self.config.max_seq_len if "attention" in self.config.layer_kinds else None
        with no_grad():
            h = self.embed_tokens(tokens[:, :seen])
            for layer, past in zip(self.layers, cache, strict=True):
                h = layer.prefill(h, past)
            logits = self.logits_of(self.norm(h[:, -1:]))
        for t in range(h.shape[1], tokens.shape[1]):
            logits = self.step(tokens[:, t], cache)
        return logits.reshape(len(tokens), -1)

    def step(self, tokens: Array, cache: list[Any]) -> Tensor:
        """The logits after one more token of each sequence, ``[B,V]``: those of the full forward pass, at the cost of one
        token. tokens: int ``[B]``. ``cache`` moves on. Attention sees the last ``max_seq_len`` tokens.
        """
        with no_grad():
            h = self.embed_tokens(host_ids(tokens)[:, None])
            for layer, past in zip(self.layers, cache, strict=True):
                h = layer.step(h, past)
            logits = self.logits_of(self.norm(h))
            return logits.reshape(logits.shape[0], logits.shape[2])

    def _output_weight(self) -> Tensor:
        return self.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight
