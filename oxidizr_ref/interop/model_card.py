"""The model card of a package: README.md, in the layout of the Hugging Face hub, every number of it from the files.

What the header may hold: https://huggingface.co/docs/hub/model-cards. Nothing is claimed that the files do not say; where
they say nothing, the card says that.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from oxidizr_ref.config import ModelConfig
from oxidizr_ref.interop.families import DTYPES
from oxidizr_ref.interop.source import Source
from oxidizr_ref.interop.tokenizer_files import STATE_FILE
from oxidizr_ref.memory import model_parts
from oxidizr_ref.tokenizer_libraries import JSON_NAME, SPLINTR_NAMES
from oxidizr_ref.tokenizers import Tokenizer

#: Licences that the hub knows by these names (https://huggingface.co/docs/hub/repositories-licenses); any other one gets
#: the header that it wants for others.
HUB_LICENSES = (
    "afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0 "
    "bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5 "
    "cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 "
    "cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0 "
    "cdla-permissive-2.0 cdla-sharing-1.0 creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 "
    "eupl-1.1 eupl-1.2 fair-noncommercial-research-license gemma gfdl gpl gpl-2.0 gpl-3.0 grok2-community h-research "
    "intel-research isc lgpl lgpl-2.1 lgpl-3.0 lgpl-lr llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 lppl-1.3c mit "
    "mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1 openmdw-1.0 openrail openrail++ osl-3.0 other pddl postgresql unknown "
    "unlicense wtfpl zlib"
)

_SCHEDULES = {
    "constant": "constant",
    "linear": "linear decay",
    "cosine": "cosine decay",
    "wsd": "warm up, stay, decay (WSD)",
}
_TINY_LOSS = 50  # above it a perplexity says nothing


@dataclass(frozen=True)
class Packaged:
    """What a package is to say of itself.

    repository: ``user/name`` on the hub, or the name alone. family: in whose layout the weights are; None: in our own.
    dtype: of the weights in the package. files: names of what lies beside the card. license, languages: as given.
    """

    source: Source
    tokenizer: Tokenizer
    name: str
    repository: str
    family: str | None
    dtype: str
    files: Sequence[str]
    license: str | None
    languages: Sequence[str]

    @property
    def model(self) -> ModelConfig:
        """The model's part of the config."""
        return self.source.config.model


def model_card(package: Packaged) -> str:
    """The whole card, Markdown with a YAML header."""
    parts = (_header, _what_it_is, _training, _data, _results, _how_to_run, _reproducing, _limits, _license)
    return "\n\n".join("\n".join(part(package)) for part in parts) + "\n"


# --- what it is -------------------------------------------------------------------------------------------------------


def _header(p: Packaged) -> Iterator[str]:
    yield "---"
    if p.languages:
        yield from ("language:", *(f'- "{language}"' for language in p.languages))  # YAML reads a bare no as false
    if p.license is None:
        yield "license: unknown"
    elif p.license in HUB_LICENSES.split():
        yield f"license: {p.license}"
    else:
        yield from ("license: other", f'license_name: "{p.license}"')  # or 1.0 were a number
    yield f"library_name: {'transformers' if p.family else 'oxidizr_ref'}"
    yield "pipeline_tag: text-generation"
    kinds = [p.family] if p.family else sorted({*p.model.layer_kinds} - {"attention"})
    yield from ("tags:", *(f"- {tag}" for tag in ("oxidizr_ref", *kinds)))
    yield "---"


def _what_it_is(p: Packaged) -> Iterator[str]:
    m, parts = p.model, model_parts(p.source.config)
    total, active = sum(part.parameters for part in parts), sum(part.active for part in parts)
    met = f", {active:,} of them used for a token" if active < total else ""
    yield f"# {p.name}"
    yield ""
    what = f"{_of(m.num_layers, 'layer')} and {total:,} parameters{met}"
    yield f"**{p.name}** is a language model of {what}, {_origin(p)} with oxidizr_ref."
    yield layers_in_words(m)
    yield ""
    rows = {
        "parameters": f"{total:,}" + (f" ({active:,} active)" if active < total else ""),
        "layers": f"{m.num_layers:,}",
        "hidden size": f"{m.hidden_size:,}",
        "vocabulary": f"{m.vocab_size:,}" + (", input and output tied" if m.tie_word_embeddings else ""),
        "context": f"{_of(m.max_seq_len, 'token')} in training",
        "stored as": DTYPES[p.dtype] + (f" (trained in {DTYPES[m.dtype]})" if p.dtype != m.dtype else ""),
        "layout": f"Hugging Face's {p.family}" if p.family else "oxidizr_ref's own names, safetensors",
    }
    yield from _table(rows)


def _origin(p: Packaged) -> str:
    """How it came to be: from nothing, or from other weights."""
    beginnings = {key for entry in p.source.state.lineage if isinstance(entry, dict) for key in entry}
    if not p.source.state.step:
        return "imported" if "imported_from" in beginnings else "initialized"
    if "imported_from" in beginnings:
        return "trained from imported weights"
    return f"trained from {'the weights of an earlier run' if 'init_from' in beginnings else 'scratch'}"


def layers_in_words(m: ModelConfig) -> str:
    """What each layer is, in a sentence, layers counted from 0."""
    kinds = list(dict.fromkeys(m.layer_kinds))
    if len(kinds) == 1:
        return f"Every layer is {_KINDS[kinds[0]](m)}."
    sentence = "; ".join(f"{_which(m, kind)} {_KINDS[kind](m)}" for kind in kinds)
    return f"L{sentence[1:]}."


def _which(m: ModelConfig, kind: str) -> str:
    """``layers 0–2 and 4 are``, of the layers of a kind."""
    numbers = [number for number, other in enumerate(m.layer_kinds) if other == kind]
    begins = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    ranges = [f"{a}" if a == b else f"{a}–{b}" for a, b in zip(begins, ends, strict=True)]
    listed = ", ".join(ranges[:-1]) + (" and " if len(ranges) > 1 else "") + ranges[-1]
    return f"layer {listed} is" if len(numbers) == 1 else f"layers {listed} are"


def _attention(m: ModelConfig) -> str:
    if m.uses_mla:
        latents = f"a latent of {m.kv_latent_dim} for keys and values"
        latents += f" and one of {m.q_latent_dim} for queries" if m.q_latent_dim else ""
        first = f"multi-head latent attention ({_of(m.num_heads, 'head')} of {m.head_dim} + {m.d_rope}, {latents})"
    else:
        grouped = m.kv_heads < m.num_heads
        shared = f", {m.kv_heads} for keys and values" if grouped else ""
        name = "grouped-query attention" if grouped else "multi-head attention"
        first = f"{name} ({_of(m.num_heads, 'head')} of {m.head_dim}{shared})"
    if not m.uses_moe:
        return f"{first} followed by a SwiGLU feed-forward of {m.intermediate_size}"
    shared = ", and a shared one that sees every token" if m.shared_expert_enabled else ""
    experts = f"{m.experts_per_tok} of {m.num_experts} SwiGLU experts of {m.intermediate_size} for each token{shared}"
    return f"{first} followed by a mixture of experts ({experts})"


def _mamba1(m: ModelConfig) -> str:
    return f"Mamba ({m.mamba_expand * m.hidden_size} channels, state {m.mamba_d_state})"


def _heads(m: ModelConfig) -> str:
    groups = f", {m.mamba2_n_groups} groups" if m.mamba2_n_groups > 1 else ""
    return f"{_of(m.mamba2_num_heads, 'head')} of {m.mamba2_head_dim}, state {m.mamba2_state_size}{groups}"


def _mamba2(m: ModelConfig) -> str:
    return f"Mamba-2 ({_heads(m)})"


def _mamba3(m: ModelConfig) -> str:
    rank = f", multiple inputs and outputs of rank {m.mamba3_mimo_rank}" if m.mamba3_mimo_rank else ""
    return f"Mamba-3 ({_heads(m)}{rank}{', with a convolution' if m.mamba3_use_conv else ''})"


_KINDS = {"attention": _attention, "mamba1": _mamba1, "mamba2": _mamba2, "mamba3": _mamba3}


# --- how it was trained -----------------------------------------------------------------------------------------------


def _training(p: Packaged) -> Iterator[str]:
    t, state, m = p.source.config.trainer, p.source.state, p.model
    yield "## Training"
    yield ""
    if not state.step:
        yield "No step of training was done with oxidizr_ref."
        return
    windows = t.batch_size * t.gradient_accumulation
    parts = f" ({t.gradient_accumulation} batches of {t.batch_size})" if t.gradient_accumulation > 1 else ""
    rate = f"{t.learning_rate:g}, {_SCHEDULES[t.lr_schedule]}" + (f", warmup {t.warmup_steps}" if t.warmup_steps else "")
    if t.lr_schedule != "constant" and t.min_lr_ratio:
        rate += f", down to {t.min_lr_ratio:g} of it"
    moments = ", moments in bfloat16" if t.optimizer_dtype == "bf16" else ""
    clip = f", gradients clipped to norm {t.max_grad_norm:g}" if t.max_grad_norm else ""
    rows = {
        "steps": f"{state.step:,}",
        "tokens seen": f"{state.progress()['tokens_seen']:,}",
        "batch": f"{_of(windows, 'window')} of {_of(m.max_seq_len, 'token')}{parts}",
        "optimizer": f"AdamW, betas {t.betas[0]:g} and {t.betas[1]:g}, eps {t.eps:g}, weight decay {t.weight_decay:g}{clip}",
        "learning rate": rate,
        "precision": f"weights in {DTYPES[m.dtype]}{moments}",
    }
    if m.uses_moe and "attention" in m.layer_kinds:
        rows["balance loss"] = f"weight {t.load_balance_alpha:g}"
    yield from _table(rows)


def _data(p: Packaged) -> Iterator[str]:
    data, state = p.source.state.data, p.source.state
    yield "## Data"
    yield ""
    if not state.step:
        yield "None."
        return
    held_out = p.source.config.trainer.eval_fraction
    rows = {
        "tokens": f"{data['tokens']:,}" + (f", the last {100 * held_out:.4g}% held out" if held_out else ""),
        "SHA-256 of the tokens": f"`{_plain(data['digest'])}`",
        "tokenizer": _tokenizer_in_words(p.tokenizer),
    }
    yield from _table(rows)
    yield ""
    yield "The digest is that of the tokens (little-endian u32, in chunks of 4 MiB). Where the text is from, no file says."


def _tokenizer_in_words(tokenizer: Tokenizer) -> str:
    made_of = {"byte": "one id a byte of UTF-8", "char": "one id a character", JSON_NAME: "in this package"}
    return f"{tokenizer.name} ({made_of.get(tokenizer.name, 'by name')}), {_of(tokenizer.vocab_size, 'id')}"


def _results(p: Packaged) -> Iterator[str]:
    train, held_out = p.source.losses("loss"), p.source.losses("eval_loss")
    yield "## Results"
    yield ""
    if not train and not held_out:
        yield "The checkpoint came without the log of its run, so nothing is said here about its losses."
        return
    yield "| | step | loss (nats a token) | perplexity |" + (" bits a byte |" if _is_bytes(p) else "")
    yield "|---|---|---|---|" + ("---|" if _is_bytes(p) else "")
    for what, losses in (("training, one batch", train), ("held out", held_out)):
        if losses:
            step, loss = losses[-1]
            perplexity = f"{math.exp(loss):.3f}" if loss < _TINY_LOSS else "-"
            bits = f" {loss / math.log(2):.4f} |" if _is_bytes(p) else ""
            yield f"| {what} | {step:,} | {loss:.4f} | {perplexity} |{bits}"
    if not held_out:
        yield ""
        yield "Nothing was held out: no number here tells how the model does on text it has not seen."
    if "loss_curve.svg" in p.files:
        yield ""
        yield "![Loss against steps](loss_curve.svg)"


def _is_bytes(p: Packaged) -> bool:
    return p.tokenizer.name == "byte"


# --- how to run it ----------------------------------------------------------------------------------------------------


def _how_to_run(p: Packaged) -> Iterator[str]:
    yield "## How to run it"
    yield ""
    if p.family and JSON_NAME in p.files:
        yield from _code("With transformers:", _TRANSFORMERS.format(repository=p.repository, prompt=json.dumps(_prompt(p))))
    elif p.family:
        yield from _code("With transformers, from ids:", _TRANSFORMERS_IDS.format(repository=p.repository))
    else:
        yield "No class of transformers computes these layers. The weights are plain safetensors; oxidizr_ref computes them."
        yield ""
    command = f"oxidizr-ref generate . -p {shlex.quote(_prompt(p))}"
    yield from _code("With oxidizr_ref, in a copy of this repository:", command, "bash")
    name = next(name for name in p.files if name.endswith(".safetensors"))
    yield from _code("With safetensors and NumPy, to look at the weights:", _NUMPY.format(name=name))
    if p.tokenizer.name in SPLINTR_NAMES:
        yield f"The vocabulary of the tokenizer is not in this package: `{p.tokenizer.name}` comes with splintr."
    else:
        yield f"`{STATE_FILE}` holds the tokenizer as oxidizr_ref reads it."


def _prompt(p: Packaged) -> str:
    """A beginning that the tokenizer can encode."""
    if p.tokenizer.name != "char":
        return "The"
    characters = [entry for entry in p.tokenizer.state()["vocabulary"] if len(entry) == 1]
    return str(next((entry for entry in characters if entry.isalpha()), characters[0]))


def _code(title: str, code: str, language: str = "python") -> Iterator[str]:
    yield from (title, "", f"```{language}", code.strip(), "```", "")


_TRANSFORMERS = """
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{repository}")
model = AutoModelForCausalLM.from_pretrained("{repository}")
ids = tokenizer({prompt}, return_tensors="pt").input_ids
print(tokenizer.decode(model.generate(ids, max_new_tokens=50)[0]))
"""
_TRANSFORMERS_IDS = """
import torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{repository}")
print(model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=50))
"""
_NUMPY = """
import ml_dtypes  # so that NumPy knows bfloat16
from safetensors.numpy import load_file

for name, array in load_file("{name}").items():
    print(name, array.dtype, array.shape)
"""


# --- how to get it again, and what not to expect ----------------------------------------------------------------------


def _reproducing(p: Packaged) -> Iterator[str]:
    source, state = p.source, p.source.state
    pure = not state.lineage
    yield "## Reproducing it"
    yield ""
    if state.step:
        yield (
            "The bytes of a checkpoint of oxidizr_ref depend on config, seed, data and class of machine alone: training "
            "resumes to the same bits, however often it stops. `training_config.json` holds all of these but the data."
        )
        yield ""
    rows = {
        "packed from": f"`{source.path.name}`, step {state.step:,}",
        "SHA-256 of that file": f"`{source.sha256}`",
        "seed": f"{source.config.trainer.seed}",
        "numerics version": _plain(source.numerics),
        "digest of the config": f"`{source.config_digest}`",
        "class of machine": f"`{source.machine_digest}`",
        "changes on the way": "none" if pure else f"{len(state.lineage)}, listed in `training_config.json`",
    }
    yield from _table(rows)


def _limits(p: Packaged) -> Iterator[str]:
    state, m, tokenizer = p.source.state, p.model, p.tokenizer
    total, tokens = sum(part.parameters for part in model_parts(p.source.config)), state.data["tokens"]
    learned = tokens * (1 - p.source.config.trainer.eval_fraction)
    yield "## Limits"
    yield ""
    yield f"- It is {_size_in_words(total)}: {total:,} parameters. Do not take what it writes for knowledge or advice."
    if state.step:
        seen = state.progress()["tokens_seen"]
        yield "- It was trained to continue text, nothing else: it was neither tuned on preferences nor tested for safety."
        yield f"- Whatever is wrong, private or biased in its {_of(tokens, 'token')} of data may come out of it again."
        if learned and seen >= 2 * learned:
            yield f"- It saw its data about {seen / learned:.3g} times over: expect passages learnt by heart."
    yield f"- It was trained on windows of {_of(m.max_seq_len, 'token')}; longer texts were never seen."
    if m.vocab_size > tokenizer.vocab_size:
        yield f"- Ids from {tokenizer.vocab_size:,} on stand for nothing: the tokenizer has fewer than the model."


def _size_in_words(parameters: int) -> str:
    return "very small" if parameters < 10_000_000 else "small" if parameters < 1_000_000_000 else "of a middling size"


def _license(p: Packaged) -> Iterator[str]:
    yield "## Licence"
    yield ""
    if p.license in (None, "unknown"):
        yield "Not stated. Whoever published this package has to say what may be done with it."
    else:
        yield f"`{p.license}`, as stated by whoever packed it. It covers the weights; the data may have terms of their own."


# --- words ------------------------------------------------------------------------------------------------------------


def _table(rows: dict[str, str]) -> Iterator[str]:
    yield from ("| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items()))


def _of(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _plain(value: Any) -> str:
    """A text out of a file, without what Markdown could take for its own."""
    return "".join(character for character in str(value) if character.isalnum() or character in " ._+:-")[:100]
