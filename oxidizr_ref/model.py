"""The language model: embedding, a stack of pre-norm residual blocks, a final norm, the output projection.

``h = h + attention(norm(h)); h = h + feed_forward(norm(h))`` as in Llama (Touvron et al. 2023). Parameter names are
those of oxidizr and of Hugging Face's Llama.
"""

from __future__ import annotations

import numpy as np

from oxidizr_ref.autograd import Tensor
from oxidizr_ref.backend import STORAGE_DTYPES, Array
from oxidizr_ref.config import ModelConfig
from oxidizr_ref.errors import ConfigError, DataError
from oxidizr_ref.fused.linear import linear
from oxidizr_ref.fused.linear_cross_entropy import linear_cross_entropy
from oxidizr_ref.layers.attention import GroupedQueryAttention
from oxidizr_ref.layers.feed_forward import SwiGLU
from oxidizr_ref.nn import Embedding, Linear, Module, RMSNorm, check_ids

#: Standard deviation of the first weights (Radford et al. 2019, GPT-2).
INIT_STD = 0.02


class Block(Module):
    """One residual layer: attention, then feed-forward, each behind its own norm. ``[B,T,D]`` to ``[B,T,D]``."""

    def __init__(self, config: ModelConfig) -> None:
        # 2·num_layers branches are added to the residual stream; scaled so that its variance does not grow with depth.
        output_std = INIT_STD / (2 * config.num_layers) ** 0.5
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = GroupedQueryAttention(config, INIT_STD, output_std)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size, INIT_STD, output_std)

    def __call__(self, h: Tensor) -> Tensor:
        h = h + self.self_attn(self.input_layernorm(h))
        return h + self.mlp(self.post_attention_layernorm(h))


class LanguageModel(Module):
    """A causal language model over token ids.

    Shapes: B batch, T time, D hidden, V vocabulary. With ``seed=None`` the parameters know their shapes and hold nothing.
    Raises ConfigError for a config this version cannot build.
    """

    def __init__(self, config: ModelConfig, seed: int | None = 0) -> None:
        _refuse_what_is_not_built_yet(config)
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, INIT_STD)
        self.layers = [Block(config) for _ in range(config.num_layers)]
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, INIT_STD)
        if seed is not None:
            self.initialize(seed, STORAGE_DTYPES[config.dtype])

    def hidden(self, tokens: Array) -> Tensor:
        """The last hidden states. tokens: int ``[B,T]``. Returns ``[B,T,D]``."""
        if tokens.ndim != 2:
            raise DataError(f"tokens must have shape [batch, time], not {list(tokens.shape)}")
        h = self.embed_tokens(tokens)
        for layer in self.layers:
            h = layer(h)
        return self.norm(h)

    def __call__(self, tokens: Array) -> Tensor:
        """The logits of the next token at every position. tokens: int ``[B,T]``. Returns ``[B,T,V]``."""
        return linear(self.hidden(np.asarray(tokens)), self._output_weight())

    def loss(self, tokens: Array, targets: Array, token_count: int | None = None) -> Tensor:
        """Cross-entropy in nats, summed over the tokens and divided by ``token_count`` (default: their number).

        tokens, targets: int ``[B,T]``. With gradient accumulation ``token_count`` is the whole step's, so that the
        micro-batches' losses and gradients simply add up. The full logits are never formed. Returns a scalar.

        Raises DataError for targets of another shape than the tokens, or outside the vocabulary.
        """
        tokens, targets = (ids if hasattr(ids, "shape") else np.asarray(ids) for ids in (tokens, targets))
        if targets.shape != tokens.shape:
            raise DataError(f"targets have shape {list(targets.shape)}, but the tokens {list(tokens.shape)}")
        check_ids(targets, self.config.vocab_size, "target")
        count = float(tokens.size if token_count is None else token_count)
        return linear_cross_entropy(self.hidden(tokens), self._output_weight(), targets, count)

    def _output_weight(self) -> Tensor:
        return self.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight


def _refuse_what_is_not_built_yet(config: ModelConfig) -> None:
    for there, name in (
        (config.uses_mla, "multi-head latent attention (kv_latent_dim)"),
        (config.uses_moe, "mixture of experts (num_experts)"),
        (any(kind != "attention" for kind in config.layer_kinds), "Mamba layers (mamba_layers)"),
    ):
        if there:
            raise ConfigError(f"model {config.name}: {name} is not built in this version, which trains GQA + SwiGLU")
