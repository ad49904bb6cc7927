"""What a config makes, before anything is trained: its layers, their parameters, and the memory they take."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import typer
from rich.table import Table
from rich.text import Text

from oxidizr_ref.backend import STORAGE_DTYPES, compute_dtype, slot_dtype
from oxidizr_ref.checkpoint.header import plan
from oxidizr_ref.cli.terminal import console
from oxidizr_ref.cli.words import of, printable, size_of
from oxidizr_ref.config import Config, ModelConfig, canonical_json
from oxidizr_ref.errors import CheckpointError
from oxidizr_ref.memory import DecodingCache, MemoryEstimate, Part, estimate_memory, model_parts
from oxidizr_ref.model import LanguageModel
from oxidizr_ref.optim import AdamW

_LEGEND = (
    "active: of those, the ones a token meets. state: weights, gradients, moments.\nkept: for the backward pass of a batch."
)


def memory_words(estimate: MemoryEstimate) -> str:
    """The estimate in one line: ``about 98 MB (parameters 1.2 MB, …)``; what is not needed is left out."""
    detail = ", ".join(f"{name} {size_of(size)}" for name, size in estimate.parts().items())
    return f"about {size_of(estimate.total)} ({detail})"


def show_config(config: Config, as_json: bool) -> None:
    """Print it, as tables for 80 columns or as one JSON object."""
    parts, estimate = model_parts(config), estimate_memory(config)
    if as_json:
        typer.echo(canonical_json(_as_json(config, parts, estimate)))
        return
    out = console()
    out.print(_facts(_before(config)))
    out.print()
    out.print(_layers(config.model, parts))
    out.print(Text(_LEGEND))
    out.print()
    out.print(_facts(_after(config, parts, estimate)))


def _as_json(config: Config, parts: Sequence[Part], estimate: MemoryEstimate) -> dict[str, Any]:
    def numbers(part: Part) -> dict[str, Any]:
        return {**asdict(part), "cache": part.cache._asdict(), "what": _what(config.model, part.kind)}

    return {
        "source": str(config.source),
        "config": config.model_dump(mode="json"),
        "parts": [numbers(part) for part in parts],
        "parameters": sum(part.parameters for part in parts),
        "active": sum(part.active for part in parts),
        "memory": {**asdict(estimate), "total": estimate.total},
        "checkpoint": _file_size(config),
        "cache": _cache(parts)._asdict(),
    }


# --- the facts before and after the table -----------------------------------------------------------------------------


def _facts(rows: Iterator[tuple[str, str]]) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for label, value in rows:
        table.add_row(Text(label, style="bold"), Text(value))
    return table


def _before(config: Config) -> Iterator[tuple[str, str]]:
    m, t = config.model, config.trainer
    yield "config", printable(str(config.source))
    yield "model", f"{printable(m.name)}: {of(m.num_layers, 'layer')}, hidden size {m.hidden_size:,}, {m.dtype}"
    batches = f", {t.gradient_accumulation:,} batches a step" if t.gradient_accumulation > 1 else ""
    yield "batch", f"{of(t.batch_size, 'window')} of {of(m.max_seq_len, 'token')}{batches}"


def _after(config: Config, parts: Sequence[Part], estimate: MemoryEstimate) -> Iterator[tuple[str, str]]:
    m = config.model
    compute = compute_dtype(STORAGE_DTYPES[m.dtype]).itemsize
    yield "memory", memory_words(estimate)
    size = _file_size(config)
    yield "checkpoint", f"about {size_of(size)} a file" if size is not None else "more tensors than one file can hold"
    cache = _cache(parts)
    bytes_kept = compute * (cache.a_token * m.max_seq_len + cache.a_sequence)
    numbers = f"{of(cache.a_token, 'number')} a token and {of(cache.a_sequence, 'number')} at any length"
    yield "decoding", f"keeps {numbers}: {size_of(bytes_kept)} for a sequence of {m.max_seq_len:,}"


def _cache(parts: Sequence[Part]) -> DecodingCache:
    return DecodingCache(sum(p.cache.a_token for p in parts), sum(p.cache.a_sequence for p in parts))


def _file_size(config: Config) -> int | None:
    """Bytes of a step file, but for a few thousand of metadata that only a run knows; None for too many tensors."""
    storage = STORAGE_DTYPES[config.model.dtype]
    shapes = {name: p.full_shape for name, p in LanguageModel(config.model, seed=None).named_parameters()}
    slots = {f"optimizer.{slot}.{name}": shape for slot in AdamW.SLOTS for name, shape in shapes.items()}
    specs = {name: (storage, shape) for name, shape in shapes.items()}
    moments = slot_dtype(storage, config.trainer.optimizer_dtype)
    specs |= {name: (moments, shape) for name, shape in slots.items()}
    try:
        return plan(specs, {"config": canonical_json(config.canonical())}).file_size
    except CheckpointError:
        return None


# --- the table of layers ----------------------------------------------------------------------------------------------


def _layers(m: ModelConfig, parts: Sequence[Part]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("layer", no_wrap=True, justify="right")
    table.add_column("what it is", overflow="fold")
    for title in ("parameters", "active", "state", "kept"):
        table.add_column(title, no_wrap=True, justify="right")
    before: int | None = None
    for part in parts:
        layer = "" if part.layer is None or part.layer == before else str(part.layer)
        before = part.layer
        table.add_row(layer, Text(_what(m, part.kind)), *_numbers([part]))
    table.add_row("total", "", *_numbers(parts), style="bold")
    return table


def _numbers(parts: Sequence[Part]) -> tuple[str, str, str, str]:
    """The numbers of one row. Active parameters are shown where some are not."""
    parameters, active = sum(p.parameters for p in parts), sum(p.active for p in parts)
    state = sum(p.weights + p.gradients + p.moments for p in parts)
    return (
        f"{parameters:,}",
        f"{active:,}" if active < parameters else "",
        size_of(state),
        size_of(sum(p.kept for p in parts)),
    )


def layer_words(m: ModelConfig, parts: Sequence[Part]) -> str:
    """The layers in a line, equal ones together: ``0-2 Mamba2 16 x 16, state 32; 3 GQA 4/2 x 32 + SwiGLU 512``."""
    of_layer: dict[int, list[str]] = {}
    for part in parts:
        if part.layer is not None:
            of_layer.setdefault(part.layer, []).append(_what(m, part.kind))
    equal: dict[str, list[int]] = {}
    for layer, what in of_layer.items():
        equal.setdefault(" + ".join(what), []).append(layer)
    return "; ".join(f"{_ranges(layers)} {what}" for what, layers in equal.items())


def _ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers: ``0-2, 4, 6-7``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], number]
        else:
            runs.append([number])
    return ", ".join("-".join(map(str, run)) for run in runs)


def _what(m: ModelConfig, kind: str) -> str:
    """A kind of part and its sizes in a few words; ``4 x 16`` is 4 heads (of GQA 4/2: queries/keys) 16 wide."""
    groups = f", groups {m.mamba2_n_groups}" if m.mamba2_n_groups > 1 else ""
    heads = f"{m.mamba2_num_heads} x {m.mamba2_head_dim}, state {m.mamba2_state_size}{groups}"
    rank = f", rank {m.mamba3_mimo_rank}" if m.mamba3_mimo_rank else ""
    shared = ", shared" if m.shared_expert_enabled else ""
    return {
        "embedding": f"embedding {m.vocab_size} x {m.hidden_size}",
        "gqa": f"GQA {m.num_heads}/{m.kv_heads} x {m.head_dim}",
        "mla": f"MLA {m.num_heads} x ({m.head_dim}+{m.d_rope}), latents {m.kv_latent_dim}/{m.q_latent_dim or '-'}",
        "swiglu": f"SwiGLU {m.intermediate_size}",
        "moe": f"MoE {m.experts_per_tok} of {m.num_experts} x {m.intermediate_size}{shared}",
        "mamba1": f"Mamba1 {m.mamba_expand * m.hidden_size} channels, state {m.mamba_d_state}",
        "mamba2": f"Mamba2 {heads}",
        "mamba3": f"Mamba3 {heads}{rank}{', convolution' if m.mamba3_use_conv else ''}",
        "output": f"norm, output {m.hidden_size} x {m.vocab_size}{' (tied)' if m.tie_word_embeddings else ''}",
    }[kind]
