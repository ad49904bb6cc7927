"""What the forward pass keeps: the estimate of every part of every architecture against the arrays of a real tape."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from oxidizr_ref import LanguageModel, Tensor
from oxidizr_ref.autograd import Function
from oxidizr_ref.config import Config, DataConfig, ModelConfig, TrainerConfig
from oxidizr_ref.layers.attention import TokenCache
from oxidizr_ref.layers.feed_forward import Routing
from oxidizr_ref.memory import model_parts

BASE = {
    "hidden_size": 32,
    "num_layers": 3,
    "num_heads": 4,
    "kv_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 61,
    "max_seq_len": 23,
    "dtype": "f32",
}
M2 = {
    "mamba2_num_heads": 8,
    "mamba2_head_dim": 8,
    "mamba2_state_size": 8,
    "mamba2_chunk_size": 5,  # the last chunk of 23 tokens is cut short
    "mamba2_n_groups": 2,
}
MLA = {"kv_latent_dim": 12, "q_latent_dim": 10, "d_rope": 6}
MOE = {"num_experts": 4, "experts_per_tok": 2}
ALL = {"mamba_layers": [0, 1, 2]}
M3 = {**M2, **ALL, "mamba3_enabled": True}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama, tied": {"tie_word_embeddings": True},
    "mla": MLA,
    "mla with norms": {**MLA, "mla_latent_norm": True},
    "mla of DeepSeek": {**MLA, "mla_latent_norm": True, "mla_q_rope_from": "latent"},
    "mla without q latent": {**MLA, "q_latent_dim": 0},
    "mla with norms, without q latent": {**MLA, "mla_latent_norm": True, "q_latent_dim": 0},
    "moe": MOE,
    "moe, one of many": {**MOE, "num_experts": 7, "experts_per_tok": 1},
    "moe, all of them": {**MOE, "experts_per_tok": 4},
    "mla and moe, shared": {**MLA, **MOE, "shared_expert_enabled": True},
    "mamba1": {**ALL, "mamba_d_state": 4},
    "mamba1, long kernel": {**ALL, "mamba_d_state": 3, "mamba_d_conv": 6, "mamba_expand": 3},
    "mamba2": {**ALL, **M2},
    "mamba2, kernel 1, long chunk": {**ALL, **M2, "mamba2_conv_kernel": 1, "mamba2_chunk_size": 64},
    "mamba3": M3,
    "mamba3, one group, whole rotation": {**M3, "mamba2_n_groups": 1, "mamba3_rope_fraction": 1.0},
    "mamba3, no rotation": {**M3, "mamba3_complex_rope": False},
    "mamba3, convolution": {**M3, "mamba3_use_conv": True},
    "mamba3, rank 3": {**M3, "mamba3_mimo_rank": 3},
    "mamba3, rank 1, convolution": {**M3, "mamba3_mimo_rank": 1, "mamba3_use_conv": True},
    "hybrid 1": {"mamba_layers": [1], **MOE},
    "hybrid 2": {**M2, "mamba_layers": [0, 2], **MLA, **MOE, "shared_expert_enabled": True},
    "hybrid 3": {**M3, "mamba_layers": [1, 2], **MLA, "mamba3_mimo_rank": 2},
}
BATCH = 3


def config_of(**model: Any) -> Config:
    trainer = TrainerConfig(learning_rate=1e-3, batch_size=BATCH, load_balance_alpha=0.1)
    return Config(model=ModelConfig(**{**BASE, **model}), trainer=trainer)


def arrays_in(value: Any) -> Iterator[np.ndarray[Any, Any]]:
    """Arrays, however deep in tuples, lists and dicts. Single numbers do not count: they are a few bytes an operation."""
    if isinstance(value, np.ndarray) and value.ndim:
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from arrays_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from arrays_in(item)


def buffer_of(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The array that owns a view's memory: as long as the view lives, all of it does."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def kept_on_the_tape(model: LanguageModel, roots: list[Tensor]) -> int:
    """Bytes of all arrays that the nodes below ``roots`` hold, each once; the parameters' own are not counted."""
    own = {id(buffer_of(p.data)) for _, p in model.named_parameters()}
    found: dict[int, np.ndarray[Any, Any]] = {}
    waiting: list[Any] = [root.node for root in roots]
    seen: set[Function] = set()
    while waiting:
        node = waiting.pop()
        if isinstance(node, Function) and node not in seen:
            seen.add(node)
            waiting += node.parents
            kept = {name: value for name, value in vars(node).items() if name != "parents"}
            found |= {id(buffer): buffer for buffer in map(buffer_of, arrays_in(kept)) if id(buffer) not in own}
    return sum(buffer.nbytes for buffer in found.values())


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f64"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_byte_that_the_tape_of_the_loss_keeps_is_in_the_estimate(name: str, dtype: str) -> None:
    config = config_of(**{**ARCHITECTURES[name], "dtype": dtype})
    model = LanguageModel(config.model, seed=1)
    tokens = np.random.default_rng(0).integers(0, 61, (BATCH, config.model.max_seq_len))
    routings: list[Routing] = []
    loss = model.loss(tokens, tokens, load_balance_alpha=0.1, routings=routings)
    held = kept_on_the_tape(model, [loss, *(routing.balance for routing in routings)])
    # The gradient of the output weights is formed with the loss; the estimate counts it with the gradients.
    of_output_weights = 61 * config.model.hidden_size * (8 if dtype == "f64" else 4)
    assert held - of_output_weights == sum(part.kept for part in model_parts(config))


@pytest.mark.thorough
@pytest.mark.parametrize("length", [64, 129, 500])
@pytest.mark.parametrize("name", ["llama", "mla", "mamba1", "mamba2", "mamba3", "hybrid 2"])
def test_what_documents_kept_apart_keep_is_at_most_the_estimate_and_not_far_below(name: str, length: int) -> None:
    """Documents of about 5, 20 and 100 tokens: rows are padded to powers of two, so how much is a matter of the data."""
    model_config = config_of(**ARCHITECTURES[name], max_seq_len=length).model
    trainer = TrainerConfig(learning_rate=1e-3, batch_size=8, load_balance_alpha=0.1)
    config = Config(model=model_config, trainer=trainer, data=DataConfig(document_boundaries="reset"))
    estimate, model = sum(part.kept for part in model_parts(config)), LanguageModel(model_config, seed=1)
    drawn = np.random.default_rng(0)
    tokens = drawn.integers(0, 61, (8, length))
    for share in (0.2, 0.05, 0.01):
        routings: list[Routing] = []
        begins = drawn.random(tokens.shape) < share
        loss = model.loss(tokens, tokens, load_balance_alpha=0.1, routings=routings, begins=begins)
        held = kept_on_the_tape(model, [loss, *(routing.balance for routing in routings)]) - 61 * 32 * 4
        assert 0.7 < held / estimate < 1.02


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_parts_parameters_are_those_of_the_names_that_belong_to_them(name: str) -> None:
    config = config_of(**ARCHITECTURES[name])
    counted: dict[tuple[int | None, str], int] = {}
    for full_name, parameter in LanguageModel(config.model, seed=1).named_parameters():
        words = full_name.split(".")
        layer = int(words[1]) if words[0] == "layers" else None
        place = {"embed_tokens": "embedding", "norm": "output", "lm_head": "output"}.get(words[0], "")
        if words[0] == "layers":
            feed_forward = words[2] in ("mlp", "moe", "post_attention_layernorm")
            attention = words[2] in ("self_attn", "input_layernorm")
            place = "feed-forward" if feed_forward else "attention" if attention else "mamba"
        counted[layer, place] = counted.get((layer, place), 0) + parameter.data.size
    places = {"gqa": "attention", "mla": "attention", "swiglu": "feed-forward", "moe": "feed-forward"}
    parts = model_parts(config)
    assert counted == {(p.layer, "mamba" if "mamba" in p.kind else places.get(p.kind, p.kind)): p.parameters for p in parts}


def test_a_token_meets_the_chosen_experts_and_no_others() -> None:
    expert = 3 * 32 * 24
    for name, idle in (
        ("moe", 2),
        ("moe, one of many", 6),
        ("moe, all of them", 0),
        ("mla and moe, shared", 2),
        ("mamba1", 0),
    ):
        for part in model_parts(config_of(**ARCHITECTURES[name])):
            assert part.parameters - part.active == (idle * expert if part.kind == "moe" else 0)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_decoding_cache_holds_as_many_numbers_as_it_is_said_to(name: str) -> None:
    config = config_of(**ARCHITECTURES[name])
    parts = {part.layer: part.cache for part in model_parts(config) if part.kind not in ("swiglu", "moe")}
    assert parts.pop(None) == (0, 0)
    for layer, cache in enumerate(LanguageModel(config.model, seed=1).new_cache(batch=1)):
        arrays = cache.arrays if isinstance(cache, TokenCache) else list(arrays_in(vars(cache)))
        held = sum(array.size for array in arrays)
        tokens = config.model.max_seq_len
        assert held == tokens * parts[layer].a_token + parts[layer].a_sequence
        assert (parts[layer].a_token > 0) == isinstance(cache, TokenCache)


def test_a_model_far_larger_than_this_machine_is_counted_without_allocating_it() -> None:
    huge = {"hidden_size": 2**16, "num_heads": 2**9, "kv_heads": 2**9, "intermediate_size": 2**18, "vocab_size": 2**20}
    sizes = {"mamba2_num_heads": 2**11, "mamba2_head_dim": 64, "mamba_layers": [1]}
    config = config_of(**{**BASE, **M2, **MOE, **huge, **sizes, "max_seq_len": 2**17})
    tracemalloc.start()
    parts = model_parts(config)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(part.weights for part in parts) > 10**12 and sum(part.kept for part in parts) > 10**12
    assert peak < 1_000_000
