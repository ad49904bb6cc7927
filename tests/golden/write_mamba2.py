"""Write `mamba2.safetensors`: what Hugging Face's Mamba 2, chunks in plain PyTorch, computes in float64 with two groups.

``python -m golden.write_mamba2``, run in ``tests/``, needs torch and transformers. The functions here build that
model for any sizes and name its weights as oxidizr does; they know nothing else of oxidizr_ref. `write_mamba1` tells
what runs it in float64.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import transformers
from golden import recording
from golden.write_mamba1 import forward_of, in_float64

# Two groups of three heads, which share B, C and a norm's root mean square; two chunks of five tokens and a rest of two.
SIZES: dict[str, Any] = {
    "hidden_size": 12,
    "num_layers": 2,
    "vocab_size": 19,
    "max_seq_len": 12,
    "rms_norm_eps": 1e-5,
    "mamba_layers": [0, 1],
    "mamba2_num_heads": 6,
    "mamba2_head_dim": 4,
    "mamba2_state_size": 5,
    "mamba2_chunk_size": 5,
    "mamba2_n_groups": 2,
    "mamba2_conv_kernel": 4,
    "mamba2_expand": 2,
}
BATCH, SEED = 3, 17


def make_model(sizes: Mapping[str, Any]) -> torch.nn.Module:
    """Hugging Face's model. Its gated norm has as many groups as B and C, its time steps are not clamped."""
    return transformers.Mamba2ForCausalLM(
        transformers.Mamba2Config(
            hidden_size=sizes["hidden_size"],
            num_hidden_layers=sizes["num_layers"],
            vocab_size=sizes["vocab_size"],
            layer_norm_epsilon=sizes["rms_norm_eps"],
            num_heads=sizes["mamba2_num_heads"],
            head_dim=sizes["mamba2_head_dim"],
            state_size=sizes["mamba2_state_size"],
            chunk_size=sizes["mamba2_chunk_size"],
            n_groups=sizes["mamba2_n_groups"],
            conv_kernel=sizes["mamba2_conv_kernel"],
            expand=sizes["mamba2_expand"],
            time_step_limit=(0.0, float("inf")),
            residual_in_fp32=False,  # the residual stream in the model's own dtype
            tie_word_embeddings=False,
        )
    )


def our_name(theirs: str) -> str:
    """oxidizr's name of a parameter."""
    name = theirs.removeprefix("backbone.").replace("embeddings", "embed_tokens").replace("norm_f", "norm")
    return re.sub(r"^(layers\.\d+\.)", r"\1mamba2.", name)


def main() -> None:
    """Compute everything and write the file beside this script."""
    model = in_float64(make_model(SIZES))
    parameters = {our_name(name): p for name, p in model.named_parameters()}
    recording.fill(parameters, SEED)
    recording.record(
        "mamba2.safetensors",
        parameters,
        forward_of(model),
        recording.token_ids(SIZES["vocab_size"], BATCH, SIZES["max_seq_len"], SEED + 1),
        SIZES,
        "tests/golden/write_mamba2.py",
        {m.__name__: m.__version__ for m in (torch, transformers, np)},
    )


if __name__ == "__main__":
    main()
