"""Write `llama.safetensors`: what PyTorch and Hugging Face's Llama compute in float64, for tests that have neither.

``python tests/golden/write_llama.py`` needs torch and transformers. It knows nothing of oxidizr_ref but the names of its
parameters: golden numbers come from another implementation, never from the one they judge.
"""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch
import transformers

SIZES = {
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
OPTIMIZER = {"lr": 3e-3, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.1, "max_grad_norm": 1.0}
BATCH, STEPS, SEED = 2, 5, 7


class Float64Rotary(torch.nn.Module):
    """cos and sin of the rotation angles in float64; the library's own module computes them in float32."""

    def forward(self, _: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        width = SIZES["hidden_size"] // SIZES["num_heads"]
        frequencies = SIZES["rope_theta"] ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
        angles = position_ids[..., None].to(torch.float64) * frequencies
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos(), angles.sin()


def float64_norm(self: Any, x: torch.Tensor) -> torch.Tensor:
    """RMSNorm in float64; the library's own computes in float32 whatever comes in."""
    return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))


def make_model() -> torch.nn.Module:
    """Hugging Face's Llama in float64 from end to end, with random weights none of whose effects is negligible."""
    config = transformers.LlamaConfig(
        hidden_size=SIZES["hidden_size"],
        num_hidden_layers=SIZES["num_layers"],
        num_attention_heads=SIZES["num_heads"],
        num_key_value_heads=SIZES["kv_heads"],
        intermediate_size=SIZES["intermediate_size"],
        vocab_size=SIZES["vocab_size"],
        max_position_embeddings=SIZES["max_seq_len"],
        rms_norm_eps=SIZES["rms_norm_eps"],
        tie_word_embeddings=False,
        attn_implementation="sdpa",  # the "eager" one takes its softmax in float32, whatever the dtype
    )
    model = transformers.LlamaForCausalLM(config).to(torch.float64)
    model.model.rotary_emb = Float64Rotary()
    for module in model.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.forward = float64_norm.__get__(module)
    generator = np.random.default_rng(SEED)
    with torch.no_grad():
        for name, p in model.named_parameters():
            centre = 1.0 if name.endswith("norm.weight") else 0.0
            p.copy_(torch.from_numpy(centre + 0.25 * generator.standard_normal(tuple(p.shape))))
    return model


def arrays(model: torch.nn.Module, prefix: str, gradients: bool = False) -> dict[str, np.ndarray]:
    """A copy of every parameter, or of its gradient, under the names without ``model.``."""
    found = {name.removeprefix("model."): p.grad if gradients else p.detach() for name, p in model.named_parameters()}
    return {prefix + name: tensor.numpy().copy() for name, tensor in found.items()}


def main() -> None:
    """Compute everything and write the file beside this script."""
    model = make_model()
    ids = np.random.default_rng(SEED + 1).integers(0, SIZES["vocab_size"], (STEPS, BATCH, SIZES["max_seq_len"] + 1))
    tokens, targets = ids[..., :-1].copy(), ids[..., 1:].copy()
    tensors = {"tokens": tokens, "targets": targets, **arrays(model, "start.")}
    norms = [p for name, p in model.named_parameters() if name.endswith("norm.weight")]
    others = [p for name, p in model.named_parameters() if not name.endswith("norm.weight")]
    optimizer = torch.optim.AdamW(
        [{"params": others, "weight_decay": OPTIMIZER["weight_decay"]}, {"params": norms, "weight_decay": 0.0}],
        lr=OPTIMIZER["lr"],
        betas=tuple(OPTIMIZER["betas"]),
        eps=OPTIMIZER["eps"],
    )
    losses, gradient_norms = [], []
    for step in range(STEPS):
        logits = model(torch.from_numpy(tokens[step])).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.from_numpy(targets[step]).flatten())
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            tensors |= {"logits": logits.detach().numpy().copy(), **arrays(model, "gradient.", gradients=True)}
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER["max_grad_norm"])
        optimizer.step()
        losses.append(loss.item())
        gradient_norms.append(norm.item())
    tensors |= {"losses": np.array(losses), "gradient_norms": np.array(gradient_norms), **arrays(model, "end.")}
    metadata = {
        "made_by": "tests/golden/write_llama.py",
        "made_on": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": json.dumps({m.__name__: m.__version__ for m in (torch, transformers, np)}),
        "sizes": json.dumps(SIZES),
        "optimizer": json.dumps(OPTIMIZER),
        "content": "start.* weights; logits and gradient.* (unclipped) of tokens[0], targets[0]; losses and gradient_norms "
        "(before clipping) of a step of clipped AdamW on each of tokens, no decay of norms; end.* weights after them",
    }
    path = Path(__file__).with_name("llama.safetensors")
    safetensors.numpy.save_file(tensors, path, metadata)
    print(f"{path}: {path.stat().st_size:,} bytes, losses {losses}, norms {gradient_norms}")


if __name__ == "__main__":
    main()
