"""What a golden file of an architecture holds, and how an oracle's script writes one.

A script builds the model in PyTorch, with whatever library judges that architecture, and calls `record`. Nothing here or in
the scripts knows oxidizr_ref, but for the names of its parameters and config keys: golden numbers come from another
implementation, never from the one they judge.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch

#: Ends of names of parameters that weight decay leaves alone.
NO_DECAY = ("norm.weight", "bias", "A_log", ".D")
OPTIMIZER = {"lr": 3e-3, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.1, "max_grad_norm": 1.0}
STEPS = 5

#: tokens -> (logits, what is added to the cross-entropy: a scalar or 0)
Forward = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor | float]]


def token_ids(vocab_size: int, batch: int, length: int, seed: int) -> np.ndarray[Any, Any]:
    """Random ids ``[STEPS, batch, length + 1]``: what every step reads and should predict."""
    return np.random.default_rng(seed).integers(0, vocab_size, (STEPS, batch, length + 1))


def fill(parameters: Mapping[str, torch.Tensor], seed: int, std: float = 0.25) -> None:
    """Random float64 values none of whose effects is negligible, in order of names: norms and D around 1, the rest 0."""
    generator = np.random.default_rng(seed)
    with torch.no_grad():
        for name in sorted(parameters):
            p = parameters[name]
            centre = 1.0 if name.endswith(("norm.weight", ".D")) else 0.0
            p.copy_(torch.from_numpy(centre + std * generator.standard_normal(tuple(p.shape))))


def record(
    file: str,
    parameters: Mapping[str, torch.Tensor],
    forward: Forward,
    ids: np.ndarray[Any, Any],
    sizes: Mapping[str, Any],
    made_by: str,
    versions: Mapping[str, str],
    load_balance_alpha: float = 0.0,
) -> None:
    """Train the PyTorch model for `STEPS` clipped AdamW steps and write ``file`` beside this module.

    ``parameters``: the model's float64 leaf tensors under oxidizr's names. ``sizes``: the keys of the `model:` section.
    """
    tokens, targets = ids[..., :-1].copy(), ids[..., 1:].copy()
    tensors = {"tokens": tokens, "targets": targets, **_arrays("start.", parameters)}
    decayed = [p for name, p in parameters.items() if not name.endswith(NO_DECAY)]
    kept = [p for name, p in parameters.items() if name.endswith(NO_DECAY)]
    groups = [{"params": decayed, "weight_decay": OPTIMIZER["weight_decay"]}, {"params": kept, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=OPTIMIZER["lr"], betas=tuple(OPTIMIZER["betas"]), eps=OPTIMIZER["eps"])
    losses, gradient_norms = [], []
    for step in range(STEPS):
        logits, extra = forward(torch.from_numpy(tokens[step]))
        assert logits.dtype == torch.float64
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.from_numpy(targets[step]).flatten()) + extra
        optimizer.zero_grad()
        loss.backward()
        gradients = {name: p.grad for name, p in parameters.items()}
        if step == 0:
            tensors |= {"logits": logits.detach().numpy().copy(), **_arrays("gradient.", gradients)}
        norm = torch.nn.utils.clip_grad_norm_(list(parameters.values()), OPTIMIZER["max_grad_norm"])
        optimizer.step()
        losses.append(loss.item())
        gradient_norms.append(norm.item())
    tensors |= {"losses": np.array(losses), "gradient_norms": np.array(gradient_norms), **_arrays("end.", parameters)}
    metadata = {
        "made_by": made_by,
        "made_on": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": json.dumps(dict(versions)),
        "sizes": json.dumps(dict(sizes)),
        "optimizer": json.dumps(OPTIMIZER),
        "load_balance_alpha": json.dumps(load_balance_alpha),
        "content": "start.* weights; logits and gradient.* (unclipped) of tokens[0], targets[0]; losses and gradient_norms "
        "(before clipping) of a step of clipped AdamW on each of tokens, no decay of names ending in "
        f"{', '.join(NO_DECAY)}; end.* weights after them",
    }
    path = Path(__file__).with_name(file)
    safetensors.numpy.save_file(tensors, path, metadata)
    print(f"{path.name}: {path.stat().st_size:,} bytes, losses {losses}, norms {gradient_norms}")


def _arrays(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray[Any, Any]]:
    return {prefix + name: tensor.detach().numpy().copy() for name, tensor in tensors.items()}
