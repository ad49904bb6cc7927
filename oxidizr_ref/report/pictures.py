"""What a notebook shows instead of a ``repr``: tensors, models, checkpoints and configs as HTML, a model as Mermaid.

The parts of the package that have such pictures are `pictured.Pictured`; this is who draws them. Colours are the reader's
own but for the heat of numbers: blue below zero, grey at it, orange above.
"""

from __future__ import annotations

import base64
import struct
import zlib
from functools import singledispatch
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oxidizr_ref.autograd import Tensor
from oxidizr_ref.backend import to_host
from oxidizr_ref.checkpoint.contents import kind_of, numbers_of, parsed_metadata
from oxidizr_ref.checkpoint.format import Checkpoint
from oxidizr_ref.checkpoint.header import DTYPE_NAMES
from oxidizr_ref.config_keys import Section
from oxidizr_ref.interop.model_card import layers_in_words
from oxidizr_ref.model import AttentionLayer, LanguageModel, MambaLayer
from oxidizr_ref.nn import Parameter
from oxidizr_ref.report.text import shape_of, short, shown, size_of, table, value

_ROWS, _COLUMNS = 24, 96  # of a heat strip, at most
_BELOW, _ZERO, _ABOVE = np.array([24, 66, 140]), np.array([190, 196, 204]), np.array([217, 72, 15])
_MOST_TENSORS = 400  # in a table


@singledispatch
def html(thing: Any) -> str:
    """The picture of a value."""
    return f"<pre>{shown(repr(thing))}</pre>"


# --- tensors ----------------------------------------------------------------------------------------------------------


@html.register
def _(tensor: Tensor) -> str:
    shape = tensor.full_shape if isinstance(tensor, Parameter) else tensor.shape
    what = type(tensor).__name__
    facts = [f"<b>{what}</b> {shape_of(shape)}", str(tensor.dtype)]
    facts += ["requires grad"] if tensor.requires_grad else []
    facts += [f"from {type(tensor.node).__name__.strip('_')}"] if tensor.node is not None else []
    if tensor.shape != shape:
        return f"<div>{', '.join([*facts, 'not filled yet'])}</div>"
    values = to_host(tensor.data)
    heat = f"<div>{_heat(values)}</div>" if 1 <= values.ndim <= 2 and values.size > 1 else ""
    grad = f"<div>gradient: {_statistics(to_host(tensor.grad))}</div>" if tensor.grad is not None else ""
    return f"<div>{', '.join(facts)}</div><div>{_statistics(values)}</div>{heat}{grad}"


def _statistics(array: NDArray[Any]) -> str:
    if not array.size:
        return "empty"
    if array.size == 1:
        return short(float(array.reshape(-1)[0]), 8)
    values = array.astype(np.float64)
    finite = values[np.isfinite(values)]
    bad = f", {values.size - finite.size:,} not finite" if finite.size < values.size else ""
    if not finite.size:
        return bad.removeprefix(", ")
    with np.errstate(over="ignore"):
        mean, deviation = float(finite.mean()), float(finite.std())
    ends = f"{short(float(finite.min()))} to {short(float(finite.max()))}"
    return f"{ends}, mean {short(mean)}, standard deviation {short(deviation)}{bad}"


def _heat(array: NDArray[Any]) -> str:
    """A picture of the numbers; of more rows or columns than fit, some at even distances."""
    values = np.atleast_2d(array)
    for axis, most in enumerate((_ROWS, _COLUMNS)):
        count = values.shape[axis]
        if count > most:
            values = values.take(np.arange(most) * count // most, axis=axis)
    values = values.astype(np.float64)
    finite = np.isfinite(values)
    top = np.abs(values[finite]).max(initial=0.0) or 1.0
    part = np.where(finite, values, 0.0)[..., None] / top
    pixels = _ZERO + np.abs(part) * (np.where(part < 0, _BELOW, _ABOVE) - _ZERO)
    pixels[~finite] = 0
    source = base64.b64encode(_png(pixels.round().astype(np.uint8))).decode("ascii")
    height, width = 5 * values.shape[0], 4 * values.shape[1]
    style = f"width:{width}px;height:{height}px;max-width:100%;image-rendering:pixelated"
    return f'<img alt="heat map, up to {short(float(top))}" style="{style}" src="data:image/png;base64,{source}"/>'


def _png(pixels: NDArray[np.uint8]) -> bytes:
    """RGB ``[rows,columns,3]`` as a PNG (W3C PNG specification, sections 5 and 9: no filter)."""
    rows, columns, _ = pixels.shape
    lines = b"".join(b"\0" + row.tobytes() for row in pixels)
    chunks = {b"IHDR": struct.pack(">IIBBBBB", columns, rows, 8, 2, 0, 0, 0), b"IDAT": zlib.compress(lines), b"IEND": b""}
    whole = (struct.pack(">I", len(d)) + kind + d + struct.pack(">I", zlib.crc32(kind + d)) for kind, d in chunks.items())
    return b"\x89PNG\r\n\x1a\n" + b"".join(whole)


# --- models -----------------------------------------------------------------------------------------------------------


def _parts(model: LanguageModel) -> list[tuple[str, str, int]]:
    """Name, what it is, and parameters of every part, in the order of the forward pass."""
    c = model.config
    parts = [("embed_tokens", f"{c.vocab_size:,} tokens to {c.hidden_size} numbers", model.embed_tokens.num_parameters())]
    parts += [(f"layers.{index}", _layer(layer), layer.num_parameters()) for index, layer in enumerate(model.layers)]
    parts.append(("norm", "RMSNorm", model.norm.num_parameters()))
    head = ("the embedding's weights", 0) if c.tie_word_embeddings else ("Linear", model.lm_head.num_parameters())
    return [*parts, ("lm_head", *head)]


def _layer(layer: AttentionLayer | MambaLayer) -> str:
    if isinstance(layer, MambaLayer):
        return type(layer.mixer).__name__
    return f"{type(layer.self_attn).__name__}, then {type(layer.moe if layer.sparse else layer.mlp).__name__}"


@html.register
def _(model: LanguageModel) -> str:
    rows = [[f"<code>{name}</code>", what, f"{count:,}"] for name, what, count in _parts(model)]
    rows.append(["<b>together</b>", "", f"<b>{model.num_parameters():,}</b>"])
    words = shown(layers_in_words(model.config))
    return f"<div><b>LanguageModel</b> {shown(model.config.name)}. {words}</div>{table(['part', 'is', 'parameters'], rows)}"


def mermaid(model: LanguageModel) -> str:
    """The flow through a model as a Mermaid flowchart; equal neighbouring layers are one node."""
    lines, before = ["flowchart TD", '  tokens(["tokens B×T"])'], "tokens"
    place = 0
    for (what, count), same in groupby(_parts(model), key=lambda part: part[1:]):
        names = [name for name, _, _ in same]
        name = names[0] if len(names) == 1 else f"{names[0]} to {names[-1].rpartition('.')[2]}"
        size = f"{len(names)} × {count:,}" if len(names) > 1 else f"{count:,}"
        lines.append(f'  p{place}["{name}<br>{what}<br>{size} parameters"]')
        lines.append(f"  {before} --> p{place}")
        before, place = f"p{place}", place + 1
    return "\n".join([*lines, f'  {before} --> logits(["logits B×T×{model.config.vocab_size}"])']) + "\n"


# --- checkpoints and configs ------------------------------------------------------------------------------------------


@html.register
def _(checkpoint: Checkpoint) -> str:
    metadata = parsed_metadata(checkpoint.metadata)
    facts = [[f"<code>{shown(key)}</code>", _cut(value(metadata[key]))] for key in sorted(metadata)]
    names = sorted(checkpoint.tensors, key=lambda name: (kind_of(name) != "weights", kind_of(name), name))
    rows = []
    for name, found in numbers_of({name: checkpoint.tensors[name] for name in names[:_MOST_TENSORS]}).items():
        array = checkpoint.tensors[name]
        ends = [short(end) for end in (found.smallest, found.largest) if end is not None]
        numbers = " to ".join(ends) + (f", {found.not_finite:,} not finite" if found.not_finite else "")
        dtype = DTYPE_NAMES.get(array.dtype, str(array.dtype))
        rows.append([f"<code>{shown(name)}</code>", shape_of(array.shape), dtype, size_of(array.nbytes), numbers])
    whole = f"{len(names):,} tensors, {size_of(sum(array.nbytes for array in checkpoint.tensors.values()))}"
    more = f"<div>and {len(names) - len(rows):,} more</div>" if len(rows) < len(names) else ""
    tensors = table(["tensor", "shape", "dtype", "size", "numbers"], rows) + more
    return f"<div><b>Checkpoint</b>, {whole}</div>{table([], facts)}<details><summary>tensors</summary>{tensors}</details>"


def _cut(text: str, most: int = 300) -> str:
    return text if len(text) <= most else f"<details><summary>{len(text):,} characters</summary>{text}</details>"


@html.register
def _(section: Section) -> str:
    """Of a config: every key, those that are not at their default in bold."""
    rows = []
    for key in type(section).model_fields:
        found = getattr(section, key)
        if isinstance(found, Section):
            rows.append([f"<code>{key}</code>", html(found)])
            continue
        text = value(list(found) if isinstance(found, tuple) else found)
        rows.append([f"<code>{key}</code>", text if found == type(section).model_fields[key].default else f"<b>{text}</b>"])
    return f"<div><b>{type(section).__name__}</b></div>{table([], rows)}"
