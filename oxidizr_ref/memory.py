"""How much memory a run needs, before it starts.

The largest share of it is what the forward pass keeps for the backward pass. That is counted here part by part (an
attention, a feed-forward, a Mamba with its norm), from shapes alone: each array that a `Function` of the part puts on
``self``, once, however many functions share it. A test compares every count with the arrays of a real tape.

Letters: n = B·T tokens of B sequences, D hidden, H heads, P head width, N state size, G groups; the rest as in `layers`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

from oxidizr_ref.backend import STORAGE_DTYPES, compute_dtype, slot_dtype
from oxidizr_ref.config import Config, ModelConfig
from oxidizr_ref.errors import TrainingError
from oxidizr_ref.fused.attention import DEVICE_QUERY_BLOCK, DEVICE_SCORES
from oxidizr_ref.fused.chunked_scan import DEVICE_WEIGHTS
from oxidizr_ref.fused.linear_cross_entropy import tokens_of_a_chunk
from oxidizr_ref.fused.selective_scan import BLOCK
from oxidizr_ref.layers.feed_forward import MixtureOfExperts
from oxidizr_ref.model import AttentionLayer, LanguageModel, MambaLayer

#: What Python, NumPy and BLAS take before the first array (measured: 60 to 90 MB).
_INTERPRETER_BYTES = 80_000_000


# --- what each part keeps ---------------------------------------------------------------------------------------------


class Kept(NamedTuple):
    """What a part keeps between its forward and its backward pass, and what its backward pass needs beside it.

    ``copies`` are parameters that are read in the compute dtype: kept as a copy where they are stored in a smaller one.
    ``passing`` is about how many numbers exist for a moment in the backward pass: gradients of the part's larger arrays; and
    ``tile`` how many more on a device, where a scan is one large tile.
    """

    numbers: int
    integers: int = 0
    flags: int = 0
    copies: int = 0
    passing: int = 0
    tile: int = 0

    def size(self, storage: int, compute: int) -> int:
        """Bytes of what is kept, for dtypes of so many bytes."""
        return compute * (self.numbers + (self.copies if storage < compute else 0)) + 8 * self.integers + self.flags


def _norm(n: int, width: int, groups: int = 1) -> int:
    """The input of a norm, one number a group, and its output, which the next product reads."""
    return n * (2 * width + groups)


def _embedding(m: ModelConfig, B: int, T: int) -> Kept:
    """The token ids, and the cosines and sines of rotary positions, which all attention layers share."""
    width = m.d_rope if m.uses_mla else m.head_dim
    return Kept(2 * T * width if "attention" in m.layer_kinds else 0, integers=B * T)


def _gqa(m: ModelConfig, B: int, T: int) -> Kept:
    """Rotated q and k; v; the output of the heads, and the logarithm of each softmax's denominator."""
    n, D, HP, KP = B * T, m.hidden_size, m.num_heads * m.head_dim, m.kv_heads * m.head_dim
    kept = _norm(n, D) + n * (2 * HP + 2 * KP + m.num_heads)
    return Kept(kept, copies=D, passing=n * (3 * D + 3 * HP + 4 * KP), tile=_scores(m, n, T))


def _mla(m: ModelConfig, B: int, T: int) -> Kept:
    """Both latents (with a norm: before and after it); q and k with their rotated parts; v, output and denominators."""
    n, D, H, HP = B * T, m.hidden_size, m.num_heads, m.num_heads * m.head_dim
    L = m.q_latent_dim + m.kv_latent_dim
    norms = 1 + (m.q_latent_dim > 0)
    latents = n * (2 * L + norms) if m.mla_latent_norm else n * L
    of_heads = n * (2 * (HP + H * m.d_rope) + 2 * HP + H)
    return Kept(
        _norm(n, D) + latents + of_heads,
        copies=D + (L if m.mla_latent_norm else 0),
        passing=n * (3 * D + 4 * (HP + H * m.d_rope) + 2 * HP),
        tile=_scores(m, n, T),
    )


def _scores(m: ModelConfig, n: int, T: int) -> int:
    """The scores of a tile of attention on a device, and their gradients."""
    return 2 * min(DEVICE_SCORES, n * m.num_heads * min(T, DEVICE_QUERY_BLOCK))


def _swiglu(m: ModelConfig, B: int, T: int) -> Kept:
    """Gate and up; the activation is computed again."""
    n, D, inner = B * T, m.hidden_size, m.intermediate_size
    return Kept(_norm(n, D) + 2 * n * inner, copies=D, passing=n * (inner + 6 * D))


def _moe(m: ModelConfig, B: int, T: int) -> Kept:
    """For each of the nk assignments the token as its expert reads it, gate, up and the expert's answer; the router's
    probabilities and weights, three numbers an expert for the balance, and three orders of tokens and experts."""
    n, D, inner, E, k = B * T, m.hidden_size, m.intermediate_size, m.num_experts, m.experts_per_tok
    experts = k * (2 * D + 2 * inner) + (2 * inner if m.shared_expert_enabled else 0)
    return Kept(
        _norm(n, D) + n * (experts + E + k) + 3 * E,
        integers=n * (E + 2 * k),
        copies=D,
        passing=n * (6 * D + 4 * k * D + (inner if m.shared_expert_enabled else k * inner // 2)),
    )


def _mamba1(m: ModelConfig, B: int, T: int) -> Kept:
    """x and z; x after the convolution; dt, B and C; dt raised to all channels; the scan's result, and it gated. The state
    before each block. The convolution's weights turned round, and A twice."""
    n, D, N, E = B * T, m.hidden_size, m.mamba_d_state, m.mamba_expand * m.hidden_size
    low = math.ceil(D / 16) + 2 * N
    states = -(-T // BLOCK) * B * E * N
    return Kept(
        _norm(n, D) + n * (6 * E + low) + states + _conv(E, m.mamba_d_conv).numbers + 2 * E * N,
        copies=D + 2 * E + _conv(E, m.mamba_d_conv).copies,
        passing=n * (2 * D + 7 * E + low),
    )


def _mamba2(m: ModelConfig, B: int, T: int) -> Kept:
    """All of the projection; x, B and C after the convolution; dt before and after its softplus; the scan's result, it
    gated, and that normalized. The state before each chunk. The convolution's weights turned round, and A twice."""
    n, D, H, N, G = B * T, m.hidden_size, m.mamba2_num_heads, m.mamba2_state_size, m.mamba2_n_groups
    E, W = H * m.mamba2_head_dim, H * m.mamba2_head_dim + 2 * G * N
    states = -(-T // m.mamba2_chunk_size) * B * E * N
    conv = _conv(W, m.mamba2_conv_kernel)
    return Kept(
        _norm(n, D) + n * (E + W + H) + n * (W + 2 * H + E) + _norm(n, E, G) + states + conv.numbers + 2 * H,
        copies=D + E + H + conv.copies,
        passing=n * (2 * D + 4 * E + 4 * W),
        tile=3 * min(DEVICE_WEIGHTS, n * H * m.mamba2_chunk_size),
    )


def _mamba3(m: ModelConfig, B: int, T: int) -> Kept:
    """All of the projection (and its x, B and C after a convolution); B and C before and after their norms; the numbers of
    heads that become decay and inflow; the angles. For every rank the scan's result, and it gated; with MIMO also x and z
    as the rank reads them, and the ranks' sum. The state before each chunk."""
    n, D, H, P, N, G = B * T, m.hidden_size, m.mamba2_num_heads, m.mamba2_head_dim, m.mamba2_state_size, m.mamba2_n_groups
    R, E, mimo = max(1, m.mamba3_mimo_rank), H * P, m.mamba3_mimo_rank > 0
    S = int(N * m.mamba3_rope_fraction) // 2 if m.mamba3_complex_rope else 0
    W = E + 2 * R * G * N
    # Of each head: dt before and after the softplus, three steps to its decay rate, dt·rate, λ, 1-λ, diagonal and inflow.
    heads = H * 10 + S + H * S
    ranks = 4 * R * E + E if mimo else 2 * E
    conv = _conv(W, m.mamba2_conv_kernel) if m.mamba3_use_conv else Kept(0)
    states = -(-T // max(1, m.mamba2_chunk_size // R)) * B * E * N
    return Kept(
        _norm(n, D)
        + n * (E + W + 3 * H + S + heads + ranks + (W if m.mamba3_use_conv else 0))
        + 2 * _norm(n * R * G, N)
        + states
        + conv.numbers,
        flags=n * 2 * H,
        copies=D + 2 * N + 2 * H * R * N + H + (3 * H * R * P if mimo else 0) + conv.copies,
        passing=n * (2 * D + 2 * R * H * N + 2 * (E + W) + 3 * R * E + 2 * H * S),
        tile=4 * n * R * H * N + 6 * min(DEVICE_WEIGHTS, n * R * H * m.mamba2_chunk_size),
    )


def _conv(channels: int, kernel: int) -> Kept:
    """A convolution beside its input and output: its weights turned round, and its biases, both halved."""
    return Kept(channels * kernel + channels)


def _output(m: ModelConfig, B: int, T: int) -> Kept:
    """The input of the last norm; and the gradient of its output, which the cross-entropy forms at once."""
    n, D = B * T, m.hidden_size
    return Kept(_norm(n, D), copies=D, passing=n * 2 * D)


_KEPT: dict[str, Callable[[ModelConfig, int, int], Kept]] = {
    "embedding": _embedding,
    "gqa": _gqa,
    "mla": _mla,
    "swiglu": _swiglu,
    "moe": _moe,
    "mamba1": _mamba1,
    "mamba2": _mamba2,
    "mamba3": _mamba3,
    "output": _output,
}


_MIXING = {"gqa", "mla", "mamba1", "mamba2", "mamba3"}


# --- what decoding keeps ----------------------------------------------------------------------------------------------


class DecodingCache(NamedTuple):
    """Numbers that a layer keeps of one sequence while text is generated: for every token, and at any length."""

    a_token: int = 0
    a_sequence: int = 0


def _decoding_cache(m: ModelConfig, kind: str) -> DecodingCache:
    if kind == "gqa":
        return DecodingCache(a_token=2 * m.kv_heads * m.head_dim)
    if kind == "mla":
        return DecodingCache(a_token=m.kv_latent_dim + m.d_rope)
    if kind == "mamba1":
        return DecodingCache(a_sequence=m.mamba_expand * m.hidden_size * (m.mamba_d_state + m.mamba_d_conv - 1))
    if kind not in ("mamba2", "mamba3"):
        return DecodingCache()
    H, P, N, R = m.mamba2_num_heads, m.mamba2_head_dim, m.mamba2_state_size, max(1, m.mamba3_mimo_rank)
    columns = 2 * m.mamba2_n_groups * N * (R if kind == "mamba3" else 1)  # of B and C
    tail = (m.mamba2_conv_kernel - 1) * (H * P + columns)
    if kind == "mamba2":
        return DecodingCache(a_sequence=H * P * N + tail)
    pairs = int(N * m.mamba3_rope_fraction) // 2 if m.mamba3_complex_rope else 0
    last = H * P + R * H * N + H * pairs  # x, B̄ and φ of the last token
    return DecodingCache(a_sequence=H * P * N + last + (tail if m.mamba3_use_conv else 0))


# --- part by part -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """A part of the model: the embedding, a layer's attention, feed-forward or Mamba with its norm, or the output."""

    layer: int | None
    kind: str
    parameters: int
    active: int  # parameters that one token meets: of a mixture of experts the chosen ones
    weights: int  # bytes of the parameters as they are stored
    gradients: int  # bytes of one set of them
    moments: int  # bytes of the optimizer's two
    kept: int  # bytes kept for the backward pass of one micro-batch
    passing: int  # bytes for a moment in it, about
    tile: int  # bytes more of that on a device
    cache: DecodingCache


def model_parts(config: Config) -> list[Part]:
    """The parts of the model in the order of its forward pass, from shapes alone: nothing is allocated."""
    m, batch = config.model, config.trainer.batch_size
    storage = STORAGE_DTYPES[m.dtype]
    compute = compute_dtype(storage).itemsize
    moment = slot_dtype(storage, config.trainer.optimizer_dtype).itemsize

    def part(layer: int | None, kind: str, parameters: int, idle: int = 0) -> Part:
        kept = _KEPT[kind](m, batch, m.max_seq_len)
        # Documents kept apart are padded in what mixes along time: 1.1 to 1.5 times their tokens, if 5 to 100 long (a test).
        padded = 1.5 if config.data.document_boundaries == "reset" and kind in _MIXING else 1.0
        return Part(
            layer,
            kind,
            parameters,
            parameters - idle,
            parameters * storage.itemsize,
            parameters * compute,
            2 * parameters * moment,
            int(padded * kept.size(storage.itemsize, compute)),
            int(padded * kept.passing) * compute,
            kept.tile * compute,
            _decoding_cache(m, kind),
        )

    model = LanguageModel(m, seed=None)
    parts = [part(None, "embedding", model.embed_tokens.num_parameters())]
    for number, (kind, layer) in enumerate(zip(m.layer_kinds, model.layers, strict=True)):
        if isinstance(layer, MambaLayer):
            parts.append(part(number, kind, layer.num_parameters()))
        else:
            parts += (part(number, *of_layer) for of_layer in _of_attention_layer(m, layer))
    return [*parts, part(None, "output", model.num_parameters() - sum(p.parameters for p in parts))]


def _of_attention_layer(m: ModelConfig, layer: AttentionLayer) -> list[tuple[str, int, int]]:
    """Kind, parameters and those that a token does not meet, of its two parts."""
    attention = layer.self_attn.num_parameters() + m.hidden_size  # each with its norm
    feed_forward, idle = layer.num_parameters() - attention, 0
    if layer.sparse:
        moe: MixtureOfExperts = layer.moe
        idle = (m.num_experts - m.experts_per_tok) * moe.experts[0].num_parameters()
    return [("mla" if m.uses_mla else "gqa", attention, 0), ("moe" if layer.sparse else "swiglu", feed_forward, idle)]


# --- all together -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by what they are for."""

    parameters: int
    gradients: int
    moments: int
    activations: int
    logits: int
    snapshot: int
    process: int  # what Python and the libraries take before the first array

    def parts(self) -> dict[str, int]:
        """What the run itself asks for, by what it is for; what is not needed is left out."""
        return {name: size for name, size in asdict(self).items() if size and name != "process"}

    @property
    def total(self) -> int:
        """All of it."""
        return sum(asdict(self).values())


def estimate_memory(config: Config, device: str = "cpu") -> MemoryEstimate:
    """The peak memory of a training step on ``device``, in bytes, from shapes alone: nothing is allocated."""
    m, t = config.model, config.trainer
    compute_bytes = compute_dtype(STORAGE_DTYPES[m.dtype]).itemsize
    parts = model_parts(config)
    weights, gradients, moments = (sum(getattr(part, of) for part in parts) for of in ("weights", "gradients", "moments"))
    if device == "gpu":
        return _estimate_on_device(config, parts, weights, moments)
    # While a micro-batch runs, the gradient tree holds a partial sum for every set bit of the number already done.
    partial_sums = max(done.bit_count() for done in range(t.gradient_accumulation))
    tokens = t.batch_size * m.max_seq_len
    logits = min(tokens, tokens_of_a_chunk(m.vocab_size)) * m.vocab_size * compute_bytes
    # The logits are gone when the backward pass begins: what passes there takes their place.
    passing = max(0, max(part.passing for part in parts) - logits)
    return MemoryEstimate(
        parameters=weights,
        gradients=gradients * (1 + partial_sums),
        moments=moments,
        activations=sum(part.kept for part in parts) + passing,
        logits=logits,
        snapshot=weights + moments if t.async_save else 0,  # a copy of what is being saved
        process=_INTERPRETER_BYTES,
    )


def _estimate_on_device(config: Config, parts: Sequence[Part], weights: int, moments: int) -> MemoryEstimate:
    """The same for a device, whose pool tells exactly what there is at any time: at the end of the forward pass all that is
    kept, the logits and the gradient of the output; then, part by part, more and more gradients and less that is kept."""
    m, t = config.model, config.trainer
    compute_bytes = compute_dtype(STORAGE_DTYPES[m.dtype]).itemsize
    tokens = t.batch_size * m.max_seq_len
    logits = min(tokens, tokens_of_a_chunk(m.vocab_size, on_a_device=True)) * m.vocab_size * compute_bytes
    # (gradients, activations, logits) at each of these times; the output's gradient is added to by a product of its size.
    kept, done = sum(part.kept for part in parts), parts[-1].gradients
    product = m.vocab_size * m.hidden_size * compute_bytes
    times = [(done, kept + parts[-1].passing // 2, logits + product)]
    for part in reversed(parts[:-1]):
        done += part.gradients
        times.append((done, kept + part.passing + part.tile, 0))
        kept -= part.kept
    partial_sums = max(n.bit_count() for n in range(t.gradient_accumulation))
    gradients, activations, logits = max(times, key=sum)
    return MemoryEstimate(weights, gradients + partial_sums * done, moments, activations, logits, 0, 0)


def out_of_memory(config: Config, device: str, error: MemoryError, last_good: str) -> TrainingError:
    """What to tell when memory ran out: what was asked for, what the run needs and for what, and what needs less."""
    needs = estimate_memory(config, device)
    parts = ", ".join(f"{what} {size / 1e6:,.1f}" for what, size in needs.parts().items())
    asked = " ".join(str(error).split()).removesuffix(".")
    advice = "a smaller --batch-size with a larger --grad-accum takes the same steps in less"
    of_run = f"this run needs about {needs.total / 1e6:,.1f} MB ({parts})"
    return TrainingError(f"out of memory on the {device}: {asked}; {of_run}; {last_good}; {advice}")
