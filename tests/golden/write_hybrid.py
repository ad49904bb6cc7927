"""Write `hybrid.safetensors`: a small model of nano's kind, as plain PyTorch computes it in float64.

``python -m golden.write_hybrid``, run in ``tests/``, needs torch. Layers: Mamba2, then MLA with a mixture of experts
(two of four, and a shared one), then Mamba2; the loss has a balance loss. The oracle is `oracle/twins.py`. Knows
nothing of oxidizr_ref but the names of its parameters and config keys.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from golden.recording import fill, record, token_ids
from oracle import twins

SIZES: dict[str, Any] = {
    "hidden_size": 12,
    "num_layers": 3,
    "num_heads": 3,
    "kv_heads": 3,
    "intermediate_size": 10,
    "vocab_size": 37,
    "max_seq_len": 12,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    "kv_latent_dim": 6,
    "q_latent_dim": 5,
    "d_rope": 2,
    "num_experts": 4,
    "experts_per_tok": 2,
    "shared_expert_enabled": True,
    "mamba_layers": [0, 2],
    "mamba2_num_heads": 4,
    "mamba2_head_dim": 6,
    "mamba2_state_size": 6,
    "mamba2_n_groups": 1,
    "mamba2_chunk_size": 5,
    "mamba2_conv_kernel": 4,
    "mamba2_expand": 2,
}
ALPHA, BATCH, SEED = 0.01, 2, 7


def main() -> None:
    """Compute everything and write the file beside this script."""
    parameters = {
        name: torch.zeros(shape, dtype=torch.float64, requires_grad=True) for name, shape in twins.shapes(SIZES).items()
    }
    fill(parameters, SEED)
    record(
        "hybrid.safetensors",
        parameters,
        lambda tokens: twins.forward(SIZES, parameters, tokens, ALPHA),
        token_ids(SIZES["vocab_size"], BATCH, SIZES["max_seq_len"], SEED + 1),
        SIZES,
        "tests/golden/write_hybrid.py",
        {m.__name__: m.__version__ for m in (torch, np)},
        ALPHA,
    )


if __name__ == "__main__":
    main()
