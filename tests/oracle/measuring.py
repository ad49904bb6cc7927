"""How far our model is from another implementation of it in PyTorch: forward pass, gradients, training, decoding.

`compare` gives the four numbers that the tests of this folder bound. A test module lists its models in ``CASES`` (name ->
function of the dtype that makes a `Case`); ``python tests/oracle/measuring.py`` measures every case of the modules named in
`MODULES` and prints a JSON object a line.

"Relative error" is max|a - b| / max|b| of a tensor; of several tensors, the largest.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from oxidizr_ref.autograd import no_grad
from oxidizr_ref.fused.register import reference
from oxidizr_ref.model import LanguageModel
from oxidizr_ref.optim import AdamW, clip_factor, decays, global_norm

torch.set_num_threads(1)  # of such small tensors, handing parts to threads costs more than it gains

STEPS, LR, DECAY, MAX_NORM = 10, 3e-3, 0.1, 1.0

#: tokens ``[B,T]`` -> logits ``[B,T,V]`` and what their loss adds to the cross-entropy (alpha times the balance loss, or 0).
Forward = Callable[[np.ndarray], "tuple[torch.Tensor, torch.Tensor | float]"]
#: (tokens, targets), both ``[B,T]``.
Batch = tuple[np.ndarray, np.ndarray]


class Case(NamedTuple):
    """Two implementations of one model, and what to feed them.

    ``parameters``: PyTorch's leaf tensors under our names, in our shapes. Where the other model stores something else (a
    weight of two of ours, one above the other, say) its forward function puts the leaves together, for instance with
    `torch.func.functional_call`.
    """

    ours: LanguageModel
    their_forward: Forward
    parameters: Mapping[str, torch.Tensor]
    batches: Sequence[Batch]
    load_balance_alpha: float = 0.0


@dataclasses.dataclass(frozen=True)
class Errors:
    """Relative errors: logits and loss of the first batch; its gradients; losses of all steps; parameters after them."""

    forward: float
    gradients: float
    losses: float
    parameters: float
    worst_gradient: str  # the parameter of the largest error


#: Largest errors allowed. Adam divides by the gradients' own size, so it amplifies float32 noise in those that are nearly
#: zero: in float32, parameters after the steps are not compared.
BOUNDS = {
    "f64": Errors(forward=1e-10, gradients=1e-7, losses=1e-10, parameters=1e-10, worst_gradient=""),
    "f32": Errors(forward=1e-5, gradients=1e-5, losses=1e-5, parameters=float("inf"), worst_gradient=""),
}
#: Test modules whose ``CASES`` are whole models.
MODULES = ("test_llama_oracle", "test_latent_moe_oracle", "test_mamba_oracle", "test_mamba3_oracle")
TORCH_DTYPES = {"f64": torch.float64, "f32": torch.float32}


def assert_within_bounds(errors: Errors, dtype: str) -> None:
    """Every error is below its bound."""
    bounds = BOUNDS[dtype]
    for what in ("forward", "gradients", "losses", "parameters"):
        assert getattr(errors, what) < getattr(bounds, what), f"{what}: {errors}"


def relative_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """max|a - b| / max|b|; where all of b is zero, max|a|."""
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    assert ours.dtype == theirs.dtype, (ours.dtype, theirs.dtype)
    return float(np.abs(ours - theirs).max() / (np.abs(theirs).max() or 1.0))


def random_batches(vocab_size: int, batch: int, length: int, count: int = STEPS, seed: int = 3) -> list[Batch]:
    """Random ids; the targets are the tokens one place on."""
    ids = np.random.default_rng(seed).integers(0, vocab_size, (count, batch, length + 1))
    return [(step[:, :-1].copy(), step[:, 1:].copy()) for step in ids]


def randomize(ours: LanguageModel, seed: int = 7, std: float = 0.15) -> None:
    """Random weights none of whose effects is negligible: norms, D and the biases of B and C around 1, the rest around 0.

    Time steps come out around 0.3 … 1 and decay rates between 0.2 and 4, so that a state forgets neither at once nor never.
    """
    generator = np.random.default_rng(seed)
    for name, p in ours.named_parameters():
        if name.endswith(("dt_bias", "dt_proj.bias")):
            p.data[...] = np.log(np.expm1(generator.uniform(0.3, 1.0, p.shape)))  # softplus of it is uniform
        elif name.endswith("A_log"):
            p.data[...] = np.log(generator.uniform(0.2, 4.0, p.shape))
        else:
            centre = 1.0 if name.endswith(("norm.weight", ".D", "B_bias", "C_bias", "mimo_x", "mimo_z", "mimo_o")) else 0.0
            p.data[...] = centre + std * generator.standard_normal(p.shape)


def compare(
    ours: LanguageModel,
    their_forward: Forward,
    parameters: Mapping[str, torch.Tensor],
    batches: Sequence[Batch],
    dtype: str,
    load_balance_alpha: float = 0.0,
) -> Errors:
    """Give ``parameters`` our weights, then train both on ``batches``, a clipped AdamW step each, and say how far they part.

    ours: with random weights (`randomize`), which training changes. dtype: ``f64`` or ``f32``.
    """
    named = dict(ours.named_parameters())
    assert named.keys() == parameters.keys(), sorted(named.keys() ^ parameters.keys())
    for name, leaf in parameters.items():
        assert leaf.is_leaf and leaf.requires_grad and leaf.dtype == TORCH_DTYPES[dtype], name
        assert leaf.shape == named[name].shape, (name, leaf.shape, named[name].shape)
        with torch.no_grad():
            leaf.copy_(torch.from_numpy(named[name].data))
    forward, (gradients, worst) = _forward_error(ours, their_forward, batches[0][0]), (0.0, "")
    optimizer = AdamW(ours.state_dict(), LR, weight_decay=DECAY)
    decayed, kept = ([p for name, p in parameters.items() if decays(name) is wanted] for wanted in (True, False))
    groups = [{"params": decayed, "weight_decay": DECAY}, {"params": kept, "weight_decay": 0.0}]
    their_optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.999), eps=1e-8)
    losses, clipped = 0.0, 0
    for step, (tokens, targets) in enumerate(batches):
        loss = ours.loss(tokens, targets, load_balance_alpha=load_balance_alpha)
        loss.backward()
        mine = {name: p.grad for name, p in named.items()}
        factor = clip_factor(global_norm(mine), MAX_NORM)
        clipped += factor < 1

        logits, extra = their_forward(tokens)
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.from_numpy(targets).flatten()) + extra
        their_optimizer.zero_grad()
        expected.backward()
        error = abs(loss.item() - expected.item()) / abs(expected.item())
        losses = max(losses, error)
        if step == 0:
            forward = max(forward, error)
            gradients, worst = max((relative_error(mine[name], _gradient(p)), name) for name, p in parameters.items())

        optimizer.step(mine, gradient_scale=factor)
        ours.zero_grad()
        torch.nn.utils.clip_grad_norm_(list(parameters.values()), MAX_NORM)
        their_optimizer.step()
    assert clipped, "no step was clipped, so clipping was not compared"
    after = max(relative_error(named[name].data, p.detach().numpy()) for name, p in parameters.items())
    return Errors(forward, gradients, losses, after, worst)


def step_by_step(ours: LanguageModel, tokens: np.ndarray) -> np.ndarray:
    """The logits ``[B,T,V]`` of decoding: one token at a time, each with what the cache keeps of those before."""
    cache = ours.new_cache(tokens.shape[0])
    return np.stack([ours.step(tokens[:, t], cache).data for t in range(tokens.shape[1])], axis=1)


def _forward_error(ours: LanguageModel, their_forward: Forward, tokens: np.ndarray) -> float:
    with no_grad(), torch.no_grad():
        return relative_error(ours(tokens).data, their_forward(tokens)[0].numpy())


def _gradient(p: torch.Tensor) -> np.ndarray:
    assert p.grad is not None and p.grad.abs().max() > 0, "a parameter without effect: nothing was compared"
    return p.grad.numpy()


def measure_all() -> Iterator[dict[str, Any]]:
    """The errors of every case of `MODULES`, in both dtypes, of our fused operations and of the plain ones beside them."""
    for module in MODULES:
        for name, make in importlib.import_module(f"oracle.{module}").CASES.items():
            for dtype in BOUNDS:
                for side, context in (("fused", contextlib.nullcontext), ("reference", reference)):
                    with context():
                        ours, forward, parameters, batches, alpha = make(dtype)
                        errors = compare(ours, forward, parameters, batches, dtype, alpha)
                    yield {"model": name, "dtype": dtype, "side": side, **dataclasses.asdict(errors)}


if __name__ == "__main__":
    import sys

    sys.path.insert(0, str(Path(__file__).parent.parent))
    for errors_of_one in measure_all():
        print(json.dumps(errors_of_one), flush=True)
