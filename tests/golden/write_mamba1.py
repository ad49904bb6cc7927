"""Write `mamba1.safetensors`: what Hugging Face's Mamba, a loop over tokens in plain PyTorch, computes in float64.

``python -m golden.write_mamba1``, run in ``tests/``, needs torch and transformers. The functions here build that
model for any sizes and name its weights as oxidizr does; they know nothing else of oxidizr_ref. `in_float64` and
`forward_of` serve Mamba 2, too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import numpy as np
import torch
import transformers
from golden import recording

# A hidden size of 17 makes the rank of the time steps 2.
SIZES: dict[str, Any] = {
    "hidden_size": 17,
    "num_layers": 2,
    "vocab_size": 19,
    "max_seq_len": 12,
    "rms_norm_eps": 1e-5,
    "mamba_layers": [0, 1],
    "mamba_d_state": 3,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
}
BATCH, SEED = 3, 13


def make_model(sizes: Mapping[str, Any]) -> torch.nn.Module:
    """Hugging Face's model. The rank of its time steps is ``ceil(hidden_size / 16)``, its default and oxidizr's."""
    return transformers.MambaForCausalLM(
        transformers.MambaConfig(
            hidden_size=sizes["hidden_size"],
            num_hidden_layers=sizes["num_layers"],
            vocab_size=sizes["vocab_size"],
            layer_norm_epsilon=sizes["rms_norm_eps"],
            state_size=sizes["mamba_d_state"],
            conv_kernel=sizes["mamba_d_conv"],
            expand=sizes["mamba_expand"],
            residual_in_fp32=False,  # the residual stream in the model's own dtype
            tie_word_embeddings=False,
        )
    )


def our_name(theirs: str) -> str:
    """oxidizr's name of a parameter."""
    name = theirs.removeprefix("backbone.").replace("embeddings", "embed_tokens").replace("norm_f", "norm")
    return name.replace(".mixer.", ".mamba.")


def exact_norm(self: Any, x: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
    """The library's RMSNorms, gated or not, in groups or not, in the dtype of ``x``; its own compute in float32."""
    if gate is not None:
        x = x * torch.nn.functional.silu(gate)
    groups = x.unflatten(-1, (-1, getattr(self, "group_size", x.shape[-1])))
    groups = groups * torch.rsqrt(groups.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
    return self.weight * groups.flatten(-2)


@contextlib.contextmanager
def nothing_narrowed() -> Iterator[None]:
    """`Tensor.float` changes nothing: by it the library narrows A, B, x, dt and the logits, whatever the model's dtype."""
    with mock.patch.object(torch.Tensor, "float", lambda self: self):
        yield


def in_float64(model: torch.nn.Module) -> torch.nn.Module:
    """A Mamba of the library in float64; its norms, too. What else it narrows, `forward_of` keeps from it."""
    for module in model.to(torch.float64).modules():
        if type(module).__name__.endswith(("RMSNorm", "RMSNormGated")):
            module.forward = exact_norm.__get__(module)
    return model


def forward_of(model: torch.nn.Module) -> Callable[[torch.Tensor], tuple[torch.Tensor, float]]:
    """tokens -> (logits in the model's dtype, nothing to add to the loss)."""
    dtype = next(model.parameters()).dtype

    def forward(tokens: torch.Tensor) -> tuple[torch.Tensor, float]:
        with nothing_narrowed() if dtype == torch.float64 else contextlib.nullcontext():
            logits = model(tokens, use_cache=False).logits
        assert logits.dtype == dtype
        return logits, 0.0

    return forward


def main() -> None:
    """Compute everything and write the file beside this script."""
    model = in_float64(make_model(SIZES))
    parameters = {our_name(name): p for name, p in model.named_parameters()}
    recording.fill(parameters, SEED)
    recording.record(
        "mamba1.safetensors",
        parameters,
        forward_of(model),
        recording.token_ids(SIZES["vocab_size"], BATCH, SIZES["max_seq_len"], SEED + 1),
        SIZES,
        "tests/golden/write_mamba1.py",
        {m.__name__: m.__version__ for m in (torch, transformers, np)},
    )


if __name__ == "__main__":
    main()
