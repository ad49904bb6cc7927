"""Doing training steps while a recorder watches: to a file, or again from what a file holds."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from oxidizr_ref.backend import Array
from oxidizr_ref.config import Config, canonical_json
from oxidizr_ref.data import Batch, Source, TokenStream, TrainingData, Windows
from oxidizr_ref.errors import DataError, TraceError
from oxidizr_ref.fused.register import reference
from oxidizr_ref.model import LanguageModel
from oxidizr_ref.tokenizers import get_tokenizer
from oxidizr_ref.trace.file import Trace
from oxidizr_ref.trace.names import TOP_K, parse
from oxidizr_ref.trace.precision import Probe
from oxidizr_ref.trace.recorder import WHAT, Recorder, Sink
from oxidizr_ref.trace.writer import TraceWriter
from oxidizr_ref.trainer import Trainer
from oxidizr_ref.version import NUMERICS_VERSION
from oxidizr_ref.watch import watched

#: Of a header, for each parameter and step: measured, 3,500 to 3,700 for models of every kind.
_HEADER_BYTES = 4096


def record(
    config: Config,
    path: str | Path,
    steps: int = 1,
    batches: Sequence[Batch] | None = None,
    weights: Mapping[str, Array] | None = None,
    what: Collection[str] = WHAT,
    layers: Collection[int] | None = None,
    sample: int = 0,
    fused: bool = False,
) -> None:
    """Do the first ``steps`` training steps of a config and write every named value of them to ``path``.

    batches: what to compute, (tokens, targets), int ``[B,T]`` each, ``gradient_accumulation`` of them a step (a single one
    is a whole step; the last ones come again where they are too few); default: what training reads. weights: what to begin
    with; default: the config's first weights. what, layers: see `Recorder`. sample: keep so many numbers of every larger
    array. fused: of the fast operations instead of their references; what is inside them then has no names.

    Raises ConfigError, DataError, TraceError or TrainingError.
    """
    if layers is not None and (outside := [n for n in layers if not 0 <= n < config.model.num_layers]):
        raise TraceError(f"layer {outside[0]}: the model has layers 0 to {config.model.num_layers - 1}")
    if config.data.loss_on != "all" or config.data.document_boundaries != "ignore":
        raise TraceError("a trace has every token: use data.loss_on: all and data.document_boundaries: ignore")
    data, total_steps = None, None
    if batches is not None:
        batches = [Batch(*batch) for batch in batches]
        if config.trainer.lr_schedule != "constant" and not config.trainer.max_steps:  # the data tells the run's length
            total_steps = Trainer(config, LanguageModel(config.model, seed=None)).total_steps
        config, data = _shaped(config, batches), _data_of(batches)
    model = LanguageModel(config.model, config.trainer.seed)
    if weights is not None:
        model.load_state_dict({name: weights[name] for name in model.state_dict() if name in weights})
    trainer = Trainer(config, model, data)
    trainer.total_steps = total_steps or trainer.total_steps
    metadata = {
        "made_by": f"oxidizr_ref, numerics {NUMERICS_VERSION}",
        "config": canonical_json(config.canonical()),
        "side": "fused" if fused else "reference",
        "steps": str(steps),
        "total_steps": str(trainer.total_steps),
    }
    room = _HEADER_BYTES * len(model.state_dict()) * steps * config.trainer.gradient_accumulation
    with TraceWriter(path, config.model.dtype, metadata, sample, room) as writer:
        _do(trainer, Recorder(model, writer, what, layers), _batches_for(trainer, batches), steps, fused)


class Recorded(NamedTuple):
    """What a step needs to be done again: the config, the batches in order, the weights, the numbers of steps, and, so that
    numbers can be compared one by one, the experts that were chosen."""

    config: Config
    batches: list[Batch]
    weights: dict[str, Array]
    steps: int
    total_steps: int
    experts: dict[str, np.ndarray[Any, Any]]


def recorded(trace: Trace) -> Recorded:
    """What a trace of this package's holds of its own making. Raises TraceError where that is not enough."""
    lacking = [key for key in ("config", "steps", "total_steps") if key not in trace.metadata]
    if lacking:
        raise TraceError(
            f"{trace.path}: does not say {lacking[0]}, so its steps cannot be done again; record it with this package"
        )
    config = Config.from_canonical(json.loads(trace.metadata["config"]))
    weights = {name: trace.array(name) for name, record in trace.records.items() if record.role == "parameter"}
    names = [name for name in trace.records if parse(name).path == "tokens"]
    batches = [Batch(_ids(trace, name), _ids(trace, name.replace("tokens", "targets"))) for name in names]
    steps, total_steps = (int(trace.metadata[key]) for key in ("steps", "total_steps"))
    experts = {name: _ids(trace, name) for name, r in trace.records.items() if r.op == TOP_K and not r.sample}
    return Recorded(config, batches, weights, steps, total_steps, experts)


def repeat(source: Recorded, sink: Sink, probe: Probe) -> None:
    """Do the steps of a trace again, in another way, everything going to ``sink``."""
    model_config = source.config.model.model_copy(update={"dtype": probe.dtype})
    config = source.config.model_copy(update={"model": model_config})
    model = LanguageModel(config.model, seed=0)
    model.load_state_dict(source.weights)
    trainer = Trainer(config, model, _data_of(source.batches))
    trainer.total_steps = source.total_steps  # which the learning rate may depend on
    recorder = Recorder(model, sink, arithmetic=probe.arithmetic, given=source.experts)
    _do(trainer, recorder, iter(source.batches), source.steps, probe.fused)


def _do(trainer: Trainer, recorder: Recorder, batches: Iterator[Batch], steps: int, fused: bool) -> None:
    trainer.witness = recorder
    with watched(recorder), nullcontext() if fused else reference():
        for _ in range(steps):
            trainer.train_step(batches)


def _batches_for(trainer: Trainer, batches: Sequence[Batch] | None) -> Iterator[Batch]:
    if batches is None:
        yield from trainer.batches()
        return
    yield from batches
    again = list(batches[-trainer.config.trainer.gradient_accumulation :])
    while True:
        yield from again


def _shaped(config: Config, batches: Sequence[Batch]) -> Config:
    """The config with the sizes of the batches, which are part of what a step computes. A single batch is a whole step."""
    if not batches:
        raise DataError("there are no batches to record")
    (rows, length), accumulation = batches[0][0].shape, config.trainer.gradient_accumulation
    if len(batches) == 1:
        accumulation = 1
    elif len(batches) % accumulation:
        what = f"{len(batches)} batches are no whole number of steps"
        raise DataError(f"{what} of trainer.gradient_accumulation = {accumulation}; give more, or --set it to 1")
    return config.model_copy(
        update={
            "model": config.model.model_copy(update={"max_seq_len": length}),
            "trainer": config.trainer.model_copy(update={"batch_size": rows, "gradient_accumulation": accumulation}),
        }
    )


def _data_of(batches: Sequence[Batch]) -> TrainingData:
    """The batches as the data of a run, which a trainer wants to know."""
    tokens, targets, _ = batches[0]
    stream = TokenStream([Source("the batch", np.append(tokens[0], targets[0, -1]).astype(np.uint32))])
    return TrainingData(stream, get_tokenizer("byte", ""), Windows(stream, tokens.shape[1]), {"digest": "", "tokens": 0})


def read_batches(path: Path) -> list[Batch]:
    """The batches in a safetensors file with ``tokens`` and ``targets``, int ``[B,T]`` or ``[n,B,T]``, or in a trace.

    Without ``targets`` each row's last token is only a target. Raises DataError.
    """
    trace = Trace(path)
    names = [name for name in trace.records if parse(name).path == "tokens" and not parse(name).end]
    if not names:
        raise DataError(f"{path}: holds no tensor `tokens`; a batch file has `tokens` and `targets`, integers [batch, time]")
    found: list[Batch] = []
    for name in names:
        other = name.replace("tokens", "targets")
        tokens = targets = _ids(trace, name)
        if other in trace.records:
            targets = _ids(trace, other)
        elif tokens.ndim:
            tokens, targets = tokens[..., :-1], tokens[..., 1:]
        if tokens.ndim not in (2, 3) or tokens.shape != targets.shape or not tokens.size:
            raise DataError(
                f"{path}: {name} {list(tokens.shape)} and its targets {list(targets.shape)} are not [batch, time]"
            )
        pairs = zip(tokens, targets, strict=True) if tokens.ndim == 3 else [(tokens, targets)]
        found += [Batch(*pair) for pair in pairs]
    if len({batch[0].shape for batch in found}) > 1:
        raise DataError(f"{path}: its batches have different shapes")
    return found


def _ids(trace: Trace, name: str) -> np.ndarray[Any, Any]:
    ids = trace.array(name)
    if ids.dtype.kind not in "iu":
        raise DataError(f"{trace.path}: {name} holds {ids.dtype}, not integers")
    return ids.astype(np.int64)


def read_weights(path: Path) -> dict[str, Array]:
    """All floating-point arrays of a safetensors file by name: a checkpoint, a model, or a trace. Raises TraceError."""
    trace = Trace(path)
    found = {name: trace.array(name) for name, record in trace.records.items() if record.role in ("output", "parameter")}
    return {name: array for name, array in found.items() if array.dtype.kind not in "iub"}
