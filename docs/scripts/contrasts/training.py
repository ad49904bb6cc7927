"""Training on made-up batches: the package's model, optimizer and schedule, and a loss that reads scored positions only."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from contrasts.tasks import Batch
from oxidizr_ref import LanguageModel, ops
from oxidizr_ref.autograd import Tensor, no_grad
from oxidizr_ref.config import ModelConfig
from oxidizr_ref.fused.linear_cross_entropy import linear_cross_entropy
from oxidizr_ref.optim import AdamW, clip_factor, global_norm, learning_rate

#: Batches are drawn by (seed, stream, step), so that what is trained on never meets what is chosen by or tested on.
TRAINING, CHOOSING, TESTING = range(3)
#: Points of a curve.
POINTS = 10

#: The batch of a step, drawn from a generator of its own.
Task = Callable[[np.random.Generator, int], Batch]


@dataclass(frozen=True)
class Plan:
    """How to train: updates, peak learning rate (linear warm-up, then cosine to a twentieth), seed of weights and batches.

    ``smoothing``: the share of the loss that asks for all of the tokens 0 … ``answers - 1`` alike (Szegedy et al. 2016).
    """

    steps: int
    rate: float
    seed: int = 0
    warmup: int = 50
    weight_decay: float = 0.01
    smoothing: float = 0.0
    answers: int = 0


@dataclass
class Curve:
    """A run of one ``kind`` of model. At each of ``steps``: the mean loss since the one before, and what was measured."""

    kind: str
    plan: dict[str, Any]
    model: dict[str, Any]
    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    measured: dict[str, list[float]] = field(default_factory=dict)

    def last(self, name: str) -> float:
        """What was measured under this name after the last step."""
        return self.measured[name][-1]


def generator(seed: int, stream: int, step: int = 0) -> np.random.Generator:
    """Where one batch comes from: a function of its address, whatever was drawn before."""
    return np.random.default_rng([seed, stream, step])


def scored_loss(model: LanguageModel, batch: Batch, smoothing: float = 0.0, answers: int = 0) -> Tensor:
    """Mean cross-entropy over the scored positions, smoothed as `Plan` says; no other position's logits are formed."""
    rows = np.flatnonzero(batch.scored)
    hidden, weight, count = model.hidden(batch.tokens), model.lm_head.weight, float(len(rows))
    picked = ops.lookup(hidden.reshape(-1, hidden.shape[-1]), ids=rows)
    loss = linear_cross_entropy(picked, weight, batch.targets.reshape(-1)[rows], count)
    if smoothing:
        loss = loss * (1 - smoothing)
        for answer in range(answers):
            loss = loss + linear_cross_entropy(picked, weight, np.full(len(rows), answer), count) * (smoothing / answers)
    return loss


def hits(model: LanguageModel, batch: Batch) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Whether the likeliest token is the target, at every position; bool ``[batch, time]``."""
    with no_grad():
        return np.asarray(model(batch.tokens).data.argmax(axis=-1) == batch.targets)


def accuracy(model: LanguageModel, batch: Batch, start: int = 0) -> float:
    """The share of scored positions, from ``start`` on, where the likeliest token is the target."""
    return float(hits(model, batch)[:, start:][batch.scored[:, start:]].mean())


def updates(model: LanguageModel, plan: Plan, loss_of: Callable[[int], Tensor]) -> Iterator[tuple[int, float]]:
    """Train; after each update, yields its number (from 1) and its loss. ``loss_of(step)`` runs the model forward."""
    weights = model.state_dict()
    optimizer = AdamW(weights, lr=plan.rate, weight_decay=plan.weight_decay)
    for step in range(1, plan.steps + 1):
        model.zero_grad()
        loss = loss_of(step)
        loss.backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        rate = learning_rate(
            step,
            peak=plan.rate,
            schedule="cosine",
            warmup_steps=plan.warmup,
            total_steps=plan.steps,
            min_lr_ratio=0.05,
        )
        optimizer.step(gradients, lr=rate, gradient_scale=clip_factor(global_norm(gradients), 1.0))
        yield step, loss.item()


def record(
    kind: str,
    model: LanguageModel,
    plan: Plan,
    loss_of: Callable[[int], Tensor],
    measure: Callable[[], Mapping[str, float]],
) -> Curve:
    """Train to the end; ``measure`` is asked `POINTS` times on the way, the last time after the last update."""
    curve = Curve(kind, asdict(plan), model.config.model_dump(exclude_unset=True, mode="json"))
    began, losses, every = time.monotonic(), [], math.ceil(plan.steps / POINTS)
    for step, loss in updates(model, plan, loss_of):
        losses.append(loss)
        if step % every and step != plan.steps:
            continue
        curve.steps.append(step)
        curve.losses.append(round(math.fsum(losses) / len(losses), 5))
        losses.clear()
        for name, value in measure().items():
            curve.measured.setdefault(name, []).append(round(value, 5))
    told = ", ".join(f"{name} {values[-1]:.4f}" for name, values in curve.measured.items())
    seconds = time.monotonic() - began  # told, and in no file: a curve depends on its plan alone
    print(f"{kind}, rate {plan.rate:g}, seed {plan.seed}: loss {curve.losses[-1]:.4f}, {told} ({seconds:.0f} s)", flush=True)
    return curve


def learn(
    config: ModelConfig,
    task: Task,
    plan: Plan,
    tests: Mapping[str, Callable[[LanguageModel], float]],
    prepare: Callable[[LanguageModel], None],
) -> Curve:
    """Train a fresh model on a task, and measure the accuracies ``tests`` on the way. ``prepare`` sets first weights."""
    model = LanguageModel(config, plan.seed)
    prepare(model)

    def loss_of(step: int) -> Tensor:
        batch = task(generator(plan.seed, TRAINING, step), step)
        return scored_loss(model, batch, plan.smoothing, plan.answers)

    return record(config.name, model, plan, loss_of, lambda: {name: test(model) for name, test in tests.items()})
