"""Write `moe.safetensors`: what Hugging Face's GraniteMoeShared, a mixture of experts, computes in float64.

``python -m golden.write_moe``, run in ``tests/``, needs torch and transformers. The functions here build that model
for any sizes and read its weights from tensors under oxidizr's names; they know nothing else of oxidizr_ref.

GraniteMoeShared is a Llama whose feed-forward is what oxidizr's documentation describes: the weights of a token's k
experts are the softmax over their k logits, and a shared expert's output is added. The balance loss is Mixtral's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any
from unittest import mock

import numpy as np
import torch
import transformers
from golden import recording
from golden.exact import Float64Rotary, in_float64
from torch.func import functional_call
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

SIZES: dict[str, Any] = {
    "hidden_size": 12,
    "num_layers": 2,
    "num_heads": 2,
    "kv_heads": 1,
    "intermediate_size": 8,
    "vocab_size": 37,
    "max_seq_len": 16,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    "num_experts": 4,
    "experts_per_tok": 2,
    "shared_expert_enabled": True,
}
BATCH, SEED, ALPHA = 2, 21, 0.1

Parameters = Mapping[str, torch.Tensor]


def probability_of_one(self: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A router for one expert a token: its weight is its probability among all experts, as in the Switch Transformer. The
    library's softmax over one logit would be 1 whatever the router says."""
    logits = torch.nn.functional.linear(x, self.weight)
    weights, ids = torch.softmax(logits, dim=-1).topk(1, dim=-1)
    return logits, weights, ids


def without_float32() -> contextlib.AbstractContextManager[Any]:
    """Inside, ``x.float()`` gives float64: the library's router and its balance loss cast so whatever comes in."""
    return mock.patch.object(torch.Tensor, "float", torch.Tensor.double)


def make_model(sizes: Mapping[str, Any], dtype: torch.dtype = torch.float64) -> torch.nn.Module:
    """Hugging Face's model, without the multipliers of Granite."""
    config = transformers.GraniteMoeSharedConfig(
        hidden_size=sizes["hidden_size"],
        num_hidden_layers=sizes["num_layers"],
        num_attention_heads=sizes["num_heads"],
        num_key_value_heads=sizes["kv_heads"],
        intermediate_size=sizes["intermediate_size"],
        shared_intermediate_size=sizes["intermediate_size"] if sizes["shared_expert_enabled"] else 0,
        num_local_experts=sizes["num_experts"],
        num_experts_per_tok=sizes["experts_per_tok"],
        vocab_size=sizes["vocab_size"],
        max_position_embeddings=sizes["max_seq_len"],
        rms_norm_eps=sizes["rms_norm_eps"],
        rope_parameters={"rope_type": "default", "rope_theta": sizes["rope_theta"]},
        attention_multiplier=(sizes["hidden_size"] // sizes["num_heads"]) ** -0.5,
        tie_word_embeddings=False,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="sdpa",  # the "eager" one takes its softmax in float32, whatever the dtype
        experts_implementation="eager",  # a loop over the experts, as it stands in the library's file
    )
    model = transformers.GraniteMoeSharedForCausalLM(config).to(dtype)
    for module in model.modules():
        if type(module).__name__ == "GraniteMoeSharedTopKRouter" and sizes["experts_per_tok"] == 1:
            module.forward = probability_of_one.__get__(module)
    if dtype == torch.float64:
        in_float64(model, Float64Rotary(sizes["rope_theta"], sizes["hidden_size"] // sizes["num_heads"]))
    return model


def our_shapes(sizes: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter under oxidizr's names."""
    D, V, inner, E = sizes["hidden_size"], sizes["vocab_size"], sizes["intermediate_size"], sizes["num_experts"]
    kv = sizes["kv_heads"] * D // sizes["num_heads"]
    layer = {f"self_attn.{name}_proj.weight": (kv if name in "kv" else D, D) for name in "qkvo"}
    layer |= {"input_layernorm.weight": (D,), "post_attention_layernorm.weight": (D,), "moe.router.gate.weight": (E, D)}
    for expert in [f"experts.{e}" for e in range(E)] + ["shared_expert"] * sizes["shared_expert_enabled"]:
        layer |= {f"moe.{expert}.{name}_proj.weight": (inner, D) for name in ("gate", "up")}
        layer |= {f"moe.{expert}.down_proj.weight": (D, inner)}
    layers = {f"layers.{i}.{name}": shape for i in range(sizes["num_layers"]) for name, shape in layer.items()}
    return {"embed_tokens.weight": (V, D), "norm.weight": (D,), "lm_head.weight": (V, D), **layers}


def feed_forward_weights(ours: Parameters, sizes: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The library's weights of one layer's feed-forward, from oxidizr's (names without ``layers.0.moe.``), so that gradients
    reach these: gate above up in one matrix, and the experts' matrices stacked."""

    def gate_and_up(expert: str) -> torch.Tensor:
        return torch.cat((ours[f"{expert}.gate_proj.weight"], ours[f"{expert}.up_proj.weight"]))

    experts = [f"experts.{e}" for e in range(sizes["num_experts"])]
    found = {
        "block_sparse_moe.router.weight": ours["router.gate.weight"],
        "block_sparse_moe.experts.gate_up_proj": torch.stack([gate_and_up(expert) for expert in experts]),
        "block_sparse_moe.experts.down_proj": torch.stack([ours[f"{expert}.down_proj.weight"] for expert in experts]),
    }
    if sizes["shared_expert_enabled"]:
        found["shared_mlp.input_linear.weight"] = gate_and_up("shared_expert")
        found["shared_mlp.output_linear.weight"] = ours["shared_expert.down_proj.weight"]
    return found


def their_weights(ours: Parameters, sizes: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """All of the library's weights, from oxidizr's."""
    found = {n if n == "lm_head.weight" else f"model.{n}": p for n, p in ours.items() if ".moe." not in n}
    for i in range(sizes["num_layers"]):
        prefix = f"layers.{i}.moe."
        of_layer = {name.removeprefix(prefix): p for name, p in ours.items() if name.startswith(prefix)}
        found |= {f"model.layers.{i}.{name}": w for name, w in feed_forward_weights(of_layer, sizes).items()}
    return found


def balance_loss(router_logits: tuple[torch.Tensor, ...], sizes: Mapping[str, Any]) -> torch.Tensor:
    """The mean over layers of ``E Σ_e f_e P_e`` (Fedus et al. 2021), by Mixtral's function, called for one layer at a time.

    Its f_e counts assignments per token, so with k experts a token they add up to k, not to 1: hence the division. Given all
    layers at once it takes the means of f and P over the layers before it multiplies them, so that one layer's preferences
    could hide another's.
    """
    E, k = sizes["num_experts"], sizes["experts_per_tok"]
    return sum(load_balancing_loss_func((logits,), E, k) for logits in router_logits) / (k * len(router_logits))


def forward_of(
    model: torch.nn.Module, ours: Parameters, sizes: Mapping[str, Any], alpha: float
) -> Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """tokens -> (logits, alpha times the balance loss), by ``model`` with the weights that ``ours`` hold at that moment.

    The shares f_e are float32 even so, and exact where the number of tokens is a power of two.
    """
    exact = next(iter(ours.values())).dtype == torch.float64

    def forward(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert tokens.numel().bit_count() == 1, "a number of tokens whose shares float32 holds exactly"
        options = {"use_cache": False, "output_router_logits": True}
        with without_float32() if exact else contextlib.nullcontext():
            weights = {**dict(model.named_buffers()), **their_weights(ours, sizes)}
            out = functional_call(model, weights, (tokens,), options, strict=True)
            return out.logits, alpha * balance_loss(out.router_logits, sizes)

    return forward


def main() -> None:
    """Compute everything and write the file beside this script."""
    shapes = our_shapes(SIZES)
    parameters = {name: torch.zeros(shape, dtype=torch.float64, requires_grad=True) for name, shape in shapes.items()}
    recording.fill(parameters, SEED)
    recording.record(
        "moe.safetensors",
        parameters,
        forward_of(make_model(SIZES), parameters, SIZES, ALPHA),
        recording.token_ids(SIZES["vocab_size"], BATCH, SIZES["max_seq_len"], SEED + 1),
        SIZES,
        "tests/golden/write_moe.py",
        {m.__name__: m.__version__ for m in (torch, transformers, np)},
        ALPHA,
    )


if __name__ == "__main__":
    main()
