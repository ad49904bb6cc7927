"""The Llama in jax.numpy, and its training step as one function for XLA to compile. Parameters are a dictionary by name.

The few layers are written out, not scanned over. Attention is two products of matrices around a softmax. On a CPU nothing
avoids the scores: `jax.nn.dot_product_attention` forms them, too, by products that are slower where matrices are small (a
step of ``tiny`` takes 40% longer; of the larger ones the times are the same), and takes its softmax in float32 always.

Shapes: B batch, T time, D hidden, H heads, K key/value heads, P head width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from oxidizr_ref.config import ModelConfig, TrainerConfig

Parameters = dict[str, jax.Array]
Moments = tuple[Parameters, Parameters]
State = tuple[Parameters, Moments, jax.Array]


# --- the model --------------------------------------------------------------------------------------------------------


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """Over the last axis."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def rope(x: jax.Array, theta: float) -> jax.Array:
    """Rotary positions: channels i and i + P/2 of x ``[B,T,H,P]`` turned by ``t theta^(-2i/P)``, which are constants."""
    T, P = x.shape[1], x.shape[3]
    angles = np.outer(np.arange(T), theta ** (-np.arange(0, P, 2) / P))[:, None]  # [T,1,P/2]
    cos, sin = (jnp.asarray(table, dtype=x.dtype) for table in (np.cos(angles), np.sin(angles)))
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate((a * cos - b * sin, b * cos + a * sin), axis=-1)


def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Causal attention of q ``[B,T,H,P]`` over k and v ``[B,T,K,P]``. Returns ``[B,T,H,P]``."""
    (B, T, H, P), K = q.shape, k.shape[2]
    q, k, v = (u.swapaxes(1, 2) for u in (q, k, v))
    # The heads that share keys are more rows of the same product.
    scores = (q.reshape(B, K, -1, P) @ k.swapaxes(2, 3) * P**-0.5).reshape(B, K, H // K, T, T)
    scores = jnp.where(np.tri(T, dtype=bool), scores, -jnp.inf)
    y = jax.nn.softmax(scores, axis=-1).reshape(B, K, -1, T) @ v
    return y.reshape(B, H, T, P).swapaxes(1, 2)


def layer(config: ModelConfig, p: Mapping[str, jax.Array], h: jax.Array) -> jax.Array:
    """Attention, then feed-forward, each behind its norm. h: ``[B,T,D]``. Returns the same shape."""
    (B, T, _), H, K, P, eps = h.shape, config.num_heads, config.kv_heads, config.head_dim, config.rms_norm_eps
    x = rms_norm(h, p["input_layernorm.weight"], eps)
    q, k, v = (x @ p[f"self_attn.{name}_proj.weight"].T for name in "qkv")
    q, k = rope(q.reshape(B, T, H, P), config.rope_theta), rope(k.reshape(B, T, K, P), config.rope_theta)
    y = attention(q, k, v.reshape(B, T, K, P))
    h = h + y.reshape(B, T, H * P) @ p["self_attn.o_proj.weight"].T
    x = rms_norm(h, p["post_attention_layernorm.weight"], eps)
    gated = jax.nn.silu(x @ p["mlp.gate_proj.weight"].T) * (x @ p["mlp.up_proj.weight"].T)
    return h + gated @ p["mlp.down_proj.weight"].T


def loss_of(config: ModelConfig, p: Mapping[str, jax.Array], tokens: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean cross-entropy of tokens and targets, int ``[B,T]``."""
    h = p["embed_tokens.weight"][tokens]
    for i in range(config.num_layers):
        prefix = f"layers.{i}."
        h = layer(config, {name.removeprefix(prefix): w for name, w in p.items() if name.startswith(prefix)}, h)
    head = p["embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"]
    logits = rms_norm(h, p["norm.weight"], config.rms_norm_eps) @ head.T
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - chosen)


# --- training ---------------------------------------------------------------------------------------------------------


def place(weights: Mapping[str, np.ndarray[Any, Any]]) -> Parameters:
    """The weights as JAX's own arrays. float64 ones need ``jax_enable_x64``."""
    return {name: jnp.array(weights[name]) for name in weights}


def zero_moments(parameters: Parameters) -> Moments:
    """What AdamW starts with."""
    zeros = partial(jax.tree.map, jnp.zeros_like)
    return zeros(parameters), zeros(parameters)


def make_step(config: ModelConfig, trainer: TrainerConfig, decays: Mapping[str, bool]) -> Callable[..., State]:
    """The step: (parameters, moments, number of this update from 1, tokens, targets) to the new ones and the loss.

    Parameters and moments that were handed in are gone afterwards: their memory is that of the new ones.
    """
    beta1, beta2 = trainer.betas

    def step(p: Parameters, moments: Moments, n: jax.Array, tokens: jax.Array, targets: jax.Array) -> State:
        loss, g = jax.value_and_grad(partial(loss_of, config))(p, tokens, targets)
        norm = jnp.sqrt(sum(jnp.vdot(x, x) for x in jax.tree.leaves(g)))
        factor = jnp.minimum(1.0, trainer.max_grad_norm / (norm + 1e-6))
        new: Parameters = {}
        m, v = dict[str, jax.Array](), dict[str, jax.Array]()
        for name, w in p.items():
            dw = g[name] * factor
            m[name] = beta1 * moments[0][name] + (1 - beta1) * dw
            v[name] = beta2 * moments[1][name] + (1 - beta2) * dw * dw
            update = m[name] / (1 - beta1**n) / (jnp.sqrt(v[name] / (1 - beta2**n)) + trainer.eps)
            kept = 1 - trainer.learning_rate * trainer.weight_decay if decays[name] else 1.0
            new[name] = w * kept - trainer.learning_rate * update
        return new, (m, v), loss

    return jax.jit(step, donate_argnums=(0, 1))


def wait_for(state: State) -> State:
    """The same, once all of it is computed."""
    return jax.block_until_ready(state)


def gradients(
    config: ModelConfig, parameters: Parameters, tokens: np.ndarray[Any, Any], targets: np.ndarray[Any, Any]
) -> dict[str, np.ndarray[Any, Any]]:
    """Those of the loss by parameter."""
    found = jax.grad(partial(loss_of, config))(parameters, jnp.asarray(tokens), jnp.asarray(targets))
    return {name: np.asarray(g) for name, g in found.items()}
