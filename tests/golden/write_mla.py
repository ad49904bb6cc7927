"""Write `mla.safetensors`: what Hugging Face's DeepSeek-V3, a model with latent attention, computes in float64.

``python -m golden.write_mla``, run in ``tests/``, needs torch and transformers. The functions here build that model
for any sizes and read its weights from tensors under oxidizr's names; they know nothing else of oxidizr_ref.

oxidizr's latent attention is DeepSeek's, but for two things. It has a query latent, yet reads the rotated part of the
queries from the hidden state; and its latents are not normalized, unless ``mla_latent_norm`` asks for it. So the model's
query weights are composed of oxidizr's: see `their_weights`.

"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import transformers
from golden import recording
from golden.exact import Float64Rotary, in_float64
from torch.func import functional_call

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_layers": 2,
    "num_heads": 4,
    "intermediate_size": 16,
    "vocab_size": 37,
    "max_seq_len": 12,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    "kv_latent_dim": 6,
    "q_latent_dim": 5,
    "d_rope": 4,
}
BATCH, SEED = 2, 11

Parameters = Mapping[str, torch.Tensor]


class NormOfTheFirst(torch.nn.Module):
    """The library's norm (made by ``norm``) of the first ``width`` channels; the others pass."""

    def __init__(self, norm: torch.nn.Module, width: int) -> None:
        super().__init__()
        self.norm, self.width = norm, width

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat((self.norm(x[..., : self.width]), x[..., self.width :]), dim=-1)


def make_model(sizes: Mapping[str, Any], dtype: torch.dtype = torch.float64) -> torch.nn.Module:
    """Hugging Face's model: its attention, and in every layer a dense SwiGLU in place of the experts."""
    normed = sizes.get("mla_latent_norm", False)
    width = sizes["hidden_size"] // sizes["num_heads"]
    config = transformers.DeepseekV3Config(
        hidden_size=sizes["hidden_size"],
        num_hidden_layers=sizes["num_layers"],
        num_attention_heads=sizes["num_heads"],
        num_key_value_heads=sizes["num_heads"],
        intermediate_size=sizes["intermediate_size"],
        vocab_size=sizes["vocab_size"],
        max_position_embeddings=sizes["max_seq_len"],
        rms_norm_eps=sizes["rms_norm_eps"],
        rope_parameters={"rope_type": "default", "rope_theta": sizes["rope_theta"]},  # no yarn: it would change the scale
        rope_interleave=False,  # rotate halves, as oxidizr does
        kv_lora_rank=sizes["kv_latent_dim"],
        # With a norm between the two query matrices they are no longer one: then the latent carries the hidden state, too.
        q_lora_rank=sizes["q_latent_dim"] + sizes["hidden_size"] if normed else None,
        qk_nope_head_dim=width,
        v_head_dim=width,
        qk_rope_head_dim=sizes["d_rope"],
        first_k_dense_replace=sizes["num_layers"],
        num_mtp_layers=0,
        tie_word_embeddings=False,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="sdpa",  # the "eager" one takes its softmax in float32, whatever the dtype
    )
    model = transformers.DeepseekV3ForCausalLM(config).to(dtype)
    for layer in model.model.layers:
        attention = layer.self_attn
        if normed:
            attention.kv_a_layernorm.variance_epsilon = sizes["rms_norm_eps"]  # the library leaves this one at 1e-6
            norm = type(attention.kv_a_layernorm)(sizes["q_latent_dim"], eps=sizes["rms_norm_eps"]).to(dtype)
            attention.q_a_layernorm = NormOfTheFirst(norm, sizes["q_latent_dim"])
        else:
            attention.kv_a_layernorm = torch.nn.Identity()
    if dtype == torch.float64:
        in_float64(model, Float64Rotary(sizes["rope_theta"], sizes["d_rope"]))
    return model


def our_shapes(sizes: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter under oxidizr's names."""
    D, V, inner = sizes["hidden_size"], sizes["vocab_size"], sizes["intermediate_size"]
    H, R, L, Q = sizes["num_heads"], sizes["d_rope"], sizes["kv_latent_dim"], sizes["q_latent_dim"]
    attention = {"w_dkv": (L, D), "w_dq": (Q, D), "w_uq": (D, Q), "w_uk": (D, L), "w_uv": (D, L)}
    attention |= {"w_qr": (H * R, D), "w_kr": (R, D), "o_proj": (D, D)}
    if sizes.get("mla_latent_norm", False):
        attention |= {"q_norm": (Q,), "kv_norm": (L,)}
    layer = {f"self_attn.{name}.weight": shape for name, shape in attention.items()}
    layer |= {"mlp.gate_proj.weight": (inner, D), "mlp.up_proj.weight": (inner, D), "mlp.down_proj.weight": (D, inner)}
    layer |= {"input_layernorm.weight": (D,), "post_attention_layernorm.weight": (D,)}
    layers = {f"layers.{i}.{name}": shape for i in range(sizes["num_layers"]) for name, shape in layer.items()}
    return {"embed_tokens.weight": (V, D), "norm.weight": (D,), "lm_head.weight": (V, D), **layers}


def their_weights(ours: Parameters, sizes: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The library's weights, computed from oxidizr's, so that gradients reach these.

    Rows of one head lie together in both, so with H heads the rows of a head are those of ``weight.view(H, …)``. Its queries
    are ``[W_uq W_dq; W_qr] x`` head by head; with normalized latents ``[W_uq, 0; 0, W_qr] [norm(W_dq x); x]``.
    """
    found = {
        name if name == "lm_head.weight" else f"model.{name}": p for name, p in ours.items() if ".self_attn." not in name
    }
    H, D = sizes["num_heads"], sizes["hidden_size"]
    for i in range(sizes["num_layers"]):
        w = {n: ours[f"layers.{i}.self_attn.{n}.weight"] for n in ("w_dkv", "w_dq", "w_uq", "w_uk", "w_uv", "w_qr", "w_kr")}
        w_uq, w_uk, w_uv, w_qr = (w[n].view(H, -1, w[n].shape[1]) for n in ("w_uq", "w_uk", "w_uv", "w_qr"))
        theirs = {
            "kv_a_proj_with_mqa": torch.cat((w["w_dkv"], w["w_kr"])),
            "kv_b_proj": torch.cat((w_uk, w_uv), dim=1).flatten(0, 1),
            "o_proj": ours[f"layers.{i}.self_attn.o_proj.weight"],
        }
        if sizes.get("mla_latent_norm", False):
            above = torch.cat((w_uq, w_uq.new_zeros(H, w_uq.shape[1], D)), dim=2)
            below = torch.cat((w_qr.new_zeros(H, w_qr.shape[1], w_uq.shape[2]), w_qr), dim=2)
            theirs |= {
                "q_a_proj": torch.cat((w["w_dq"], torch.eye(D, dtype=w_uq.dtype))),
                "q_b_proj": torch.cat((above, below), dim=1).flatten(0, 1),
                "q_a_layernorm.norm": ours[f"layers.{i}.self_attn.q_norm.weight"],
                "kv_a_layernorm": ours[f"layers.{i}.self_attn.kv_norm.weight"],
            }
        else:
            theirs["q_proj"] = torch.cat((w_uq @ w["w_dq"], w_qr), dim=1).flatten(0, 1)
        found |= {f"model.layers.{i}.self_attn.{name}.weight": weight for name, weight in theirs.items()}
    return found


def forward_of(
    model: torch.nn.Module, ours: Parameters, sizes: Mapping[str, Any]
) -> Callable[[torch.Tensor], tuple[torch.Tensor, float]]:
    """tokens -> (logits, nothing to add to the loss), by ``model`` with the weights that ``ours`` hold at that moment."""

    def forward(tokens: torch.Tensor) -> tuple[torch.Tensor, float]:
        weights = {**dict(model.named_buffers()), **their_weights(ours, sizes)}
        return functional_call(model, weights, (tokens,), {"use_cache": False}, strict=True).logits, 0.0

    return forward


def main() -> None:
    """Compute everything and write the file beside this script."""
    shapes = our_shapes(SIZES)
    parameters = {name: torch.zeros(shape, dtype=torch.float64, requires_grad=True) for name, shape in shapes.items()}
    recording.fill(parameters, SEED)
    recording.record(
        "mla.safetensors",
        parameters,
        forward_of(make_model(SIZES), parameters, SIZES),
        recording.token_ids(SIZES["vocab_size"], BATCH, SIZES["max_seq_len"], SEED + 1),
        SIZES,
        "tests/golden/write_mla.py",
        {m.__name__: m.__version__ for m in (torch, transformers, np)},
    )


if __name__ == "__main__":
    main()
