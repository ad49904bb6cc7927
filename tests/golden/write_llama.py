"""Write `llama.safetensors`: what Hugging Face's Llama computes in float64.

``python -m golden.write_llama``, run in ``tests/``, needs torch and transformers. `make_model` builds that model for
any sizes; it knows nothing of oxidizr_ref but the keys of its configs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import transformers
from golden import recording
from golden.exact import Float64Rotary, in_float64

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_layers": 2,
    "num_heads": 4,
    "kv_heads": 2,
    "intermediate_size": 28,
    "vocab_size": 37,
    "max_seq_len": 12,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
}
BATCH, SEED = 2, 7


def make_model(sizes: Mapping[str, Any], dtype: torch.dtype = torch.float64) -> torch.nn.Module:
    """Hugging Face's model, in float64 from end to end or in float32."""
    config = transformers.LlamaConfig(
        hidden_size=sizes["hidden_size"],
        num_hidden_layers=sizes["num_layers"],
        num_attention_heads=sizes["num_heads"],
        num_key_value_heads=sizes["kv_heads"],
        intermediate_size=sizes["intermediate_size"],
        vocab_size=sizes["vocab_size"],
        max_position_embeddings=sizes["max_seq_len"],
        rms_norm_eps=sizes["rms_norm_eps"],
        rope_parameters={"rope_type": "default", "rope_theta": sizes["rope_theta"]},
        tie_word_embeddings=sizes.get("tie_word_embeddings", False),
        attn_implementation="sdpa",  # the "eager" one takes its softmax in float32, whatever the dtype
    )
    model = transformers.LlamaForCausalLM(config).to(dtype)
    if dtype == torch.float64:
        in_float64(model, Float64Rotary(sizes["rope_theta"], sizes["hidden_size"] // sizes["num_heads"]))
    return model


def our_parameters(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The model's parameters under oxidizr's names."""
    return {name.removeprefix("model."): p for name, p in model.named_parameters()}


def main() -> None:
    """Compute everything and write the file beside this script."""
    model = make_model(SIZES)
    parameters = our_parameters(model)
    recording.fill(parameters, SEED)
    recording.record(
        "llama.safetensors",
        parameters,
        lambda tokens: (model(tokens, use_cache=False).logits, 0.0),
        recording.token_ids(SIZES["vocab_size"], BATCH, SIZES["max_seq_len"], SEED + 1),
        SIZES,
        "tests/golden/write_llama.py",
        {m.__name__: m.__version__ for m in (torch, transformers, np)},
    )


if __name__ == "__main__":
    main()
