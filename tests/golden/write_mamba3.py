"""Write `mamba3.safetensors` and `mamba3_mimo.safetensors`: what a plain PyTorch Mamba3 computes in float64.

``python -m golden.write_mamba3``, run in ``tests/``, needs torch. No library had a Mamba3 that runs on a CPU, so the
oracle is `oracle/twins.py`, the recurrence written token by token; the official numbers of the recurrence itself are
in `mamba3_official.safetensors`, and the package is held against both. Knows nothing of oxidizr_ref but its names.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from golden.recording import fill, record, token_ids
from oracle import twins

# Chunks of 5 tokens in sequences of 12, for MIMO of one token (5 // 3): several, the last one not full.
COMMON: dict[str, Any] = {
    "num_layers": 2,
    "max_seq_len": 12,
    "rms_norm_eps": 1e-5,
    "mamba_layers": [0, 1],
    "mamba2_num_heads": 4,
    "mamba2_n_groups": 2,
    "mamba2_chunk_size": 5,
    "mamba2_conv_kernel": 4,
    "mamba2_expand": 2,
    "mamba3_enabled": True,
}
SIZES = {
    "mamba3.safetensors": {
        **COMMON,
        "hidden_size": 16,
        "vocab_size": 37,
        "mamba2_head_dim": 8,
        "mamba2_state_size": 8,
        "mamba3_rope_fraction": 0.5,
    },
    "mamba3_mimo.safetensors": {
        **COMMON,
        "hidden_size": 12,
        "vocab_size": 31,
        "mamba2_head_dim": 6,
        "mamba2_state_size": 6,
        "mamba3_mimo_rank": 3,
        "mamba3_use_conv": True,
        "mamba3_rope_fraction": 1.0,
    },
}
BATCH, SEED = 2, 7


def main() -> None:
    """Compute everything and write both files beside this script."""
    for file, sizes in SIZES.items():
        parameters = {
            name: torch.zeros(shape, dtype=torch.float64, requires_grad=True) for name, shape in twins.shapes(sizes).items()
        }
        fill(parameters, SEED)
        record(
            file,
            parameters,
            lambda tokens, sizes=sizes, parameters=parameters: twins.forward(sizes, parameters, tokens),
            token_ids(sizes["vocab_size"], BATCH, sizes["max_seq_len"], SEED + 1),
            sizes,
            "tests/golden/write_mamba3.py",
            {m.__name__: m.__version__ for m in (torch, np)},
        )


if __name__ == "__main__":
    main()
