"""The shipped maps of names, each on one training step of the model of Hugging Face's that it is for, and of ours.

Their parameters hold our weights, in their layout. They do the step as anybody would, under a `TorchRecorder`; ours is
recorded by `record`. Then each of our names is looked up in the map, and what their trace has there must be our numbers, in
shape and value. What their modules do not show is listed, with the reason, and nothing else may be lacking.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra 'oracle'")
transformers = pytest.importorskip("transformers", reason="needs the extra 'oracle'")

from golden import write_llama, write_mamba1, write_mamba2, write_mla, write_moe  # noqa: E402
from golden.exact import Float64Rotary, in_float64  # noqa: E402
from oracle.measuring import DECAY, LR, MAX_NORM, TORCH_DTYPES, random_batches, randomize  # noqa: E402

from oxidizr_ref.config import Config, ModelConfig, TrainerConfig  # noqa: E402
from oxidizr_ref.model import LanguageModel  # noqa: E402
from oxidizr_ref.trace import Trace, compare, record  # noqa: E402
from oxidizr_ref.trace.mapping import Mapped, NameMap, load_map, shipped_maps  # noqa: E402
from oxidizr_ref.trace.names import meaning, parse  # noqa: E402
from oxidizr_ref.trace.torch_recorder import TorchRecorder  # noqa: E402

pytestmark = pytest.mark.oracle

Weights = Mapping[str, torch.Tensor]
Sizes = Mapping[str, Any]

# Sizes no two of which are equal, so that none can be taken for another.
_BASE = {"num_layers": 2, "vocab_size": 97, "hidden_size": 48, "max_seq_len": 37, "rms_norm_eps": 1e-5}
_ATTENTION = {**_BASE, "num_heads": 4, "intermediate_size": 56, "rope_theta": 10000.0}
GQA = {**_ATTENTION, "kv_heads": 2}
MLA = {**_ATTENTION, "kv_latent_dim": 20, "q_latent_dim": 14, "d_rope": 6}
MLA_NORM = {**MLA, "mla_latent_norm": True}
# Twice 32 tokens: the experts' shares of them are exact in float32, in which Mixtral's balance loss counts.
EXPERTS = {**GQA, "num_experts": 5, "experts_per_tok": 2, "max_seq_len": 32}
EXPERTS_SHARED = {**EXPERTS, "shared_expert_enabled": True}
EXPERTS_ONLY = {**EXPERTS, "shared_expert_enabled": False}
MAMBA1 = {**_BASE, "mamba_layers": [0, 1], "mamba_d_state": 10, "mamba_d_conv": 4, "mamba_expand": 2}
MAMBA2 = {
    **_BASE,
    "mamba_layers": [0, 1],
    "mamba2_num_heads": 12,
    "mamba2_head_dim": 8,
    "mamba2_state_size": 10,
    "mamba2_chunk_size": 9,
    "mamba2_n_groups": 3,
    "mamba2_conv_kernel": 4,
    "mamba2_expand": 2,
}
#: At which the balance loss is a tenth of the routers' gradients and more.
ALPHA = 0.1

# --- their models, with our weights -------------------------------------------------------------------------------------


def _fill(model: torch.nn.Module, weights: Weights) -> torch.nn.Module:
    parameters = dict(model.named_parameters())
    assert parameters.keys() == weights.keys(), sorted(parameters.keys() ^ weights.keys())
    with torch.no_grad():
        for name, parameter in parameters.items():
            assert parameter.shape == weights[name].shape, name
            parameter.copy_(weights[name])
    return model


def _showing_probabilities(model: torch.nn.Module) -> torch.nn.Module:
    """Attention written out, which returns its probabilities as well."""
    model.set_attn_implementation("eager")
    return model


def llama(sizes: Sizes, dtype: torch.dtype, ours: Weights) -> torch.nn.Module:
    """LlamaForCausalLM."""
    model = _showing_probabilities(write_llama.make_model(sizes, dtype))
    return _fill(model, {n if n == "lm_head.weight" else f"model.{n}": w for n, w in ours.items()})


def _mamba(model: torch.nn.Module, our_name: Callable[[str], str], dtype: torch.dtype, ours: Weights) -> torch.nn.Module:
    model = write_mamba1.in_float64(model) if dtype == torch.float64 else model
    return _fill(model, {name: ours[our_name(name)] for name, _ in model.named_parameters()})


def mamba1(sizes: Sizes, dtype: torch.dtype, ours: Weights) -> torch.nn.Module:
    """MambaForCausalLM."""
    return _mamba(write_mamba1.make_model(sizes), write_mamba1.our_name, dtype, ours)


def mamba2(sizes: Sizes, dtype: torch.dtype, ours: Weights) -> torch.nn.Module:
    """Mamba2ForCausalLM."""
    return _mamba(write_mamba2.make_model(sizes), write_mamba2.our_name, dtype, ours)


def granite(sizes: Sizes, dtype: torch.dtype, ours: Weights) -> torch.nn.Module:
    """GraniteMoeSharedForCausalLM."""
    return _fill(_showing_probabilities(write_moe.make_model(sizes, dtype)), write_moe.their_weights(ours, sizes))


def mixtral(sizes: Sizes, dtype: torch.dtype, ours: Weights) -> torch.nn.Module:
    """MixtralForCausalLM: the experts of Granite under other names, without a shared one."""
    config = transformers.MixtralConfig(
        hidden_size=sizes["hidden_size"],
        num_hidden_layers=sizes["num_layers"],
        num_attention_heads=sizes["num_heads"],
        num_key_value_heads=sizes["kv_heads"],
        intermediate_size=sizes["intermediate_size"],
        num_local_experts=sizes["num_experts"],
        num_experts_per_tok=sizes["experts_per_tok"],
        vocab_size=sizes["vocab_size"],
        max_position_embeddings=sizes["max_seq_len"],
        rms_norm_eps=sizes["rms_norm_eps"],
        rope_parameters={"rope_type": "default", "rope_theta": sizes["rope_theta"]},
        sliding_window=None,
        tie_word_embeddings=False,
        experts_implementation="eager",
    )
    model = _showing_probabilities(transformers.MixtralForCausalLM(config).to(dtype))
    if dtype == torch.float64:
        in_float64(model, Float64Rotary(sizes["rope_theta"], sizes["hidden_size"] // sizes["num_heads"]))
    renamed = {".block_sparse_moe.router.": ".mlp.gate.", ".block_sparse_moe.experts.": ".mlp.experts."}
    weights = write_moe.their_weights(ours, sizes)
    for old, new in renamed.items():
        weights = {name.replace(old, new): weight for name, weight in weights.items()}
    return _fill(model, weights)


class Float64Turns(torch.nn.Module):
    """The rotations of DeepSeek-V2, complex numbers ``[batch, time, width / 2]``, in float64."""

    def __init__(self, theta: float, width: int) -> None:
        super().__init__()
        self.frequencies = theta ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)

    def forward(self, _: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        angles = position_ids[..., None].to(torch.float64) * self.frequencies
        return torch.polar(torch.ones_like(angles), angles)


def _side_by_side(rows: torch.Tensor) -> torch.Tensor:
    """``[..., r, D]``, rows r/2 apart turned together: now those side by side do."""
    first, second = rows.chunk(2, dim=-2)
    return torch.stack((first, second), dim=-2).flatten(-3, -2)


def _widened_latent(model: torch.nn.Module, sizes: Sizes, ours: Weights) -> torch.nn.Module:
    """Our weights into DeepSeek's latent attention, whose query latent is made to carry the hidden state as well.

    ``model`` has q_lora_rank Q + D. Its own norm normalizes the first Q channels; what is neither 0 nor 1 learns.
    """
    Q, r, H = sizes["q_latent_dim"], sizes["d_rope"], sizes["num_heads"]
    normed = sizes.get("mla_latent_norm", False)
    for layer in model.model.layers:
        attention = layer.self_attn
        if normed:
            norm = attention.q_a_layernorm
            norm.weight = torch.nn.Parameter(norm.weight[:Q].detach().clone())
            norm.variance_epsilon = attention.kv_a_layernorm.variance_epsilon = sizes["rms_norm_eps"]
            norm.forward = functools.partial(_first_normalized, norm.forward, Q)
        else:
            attention.q_a_layernorm, attention.kv_a_layernorm = torch.nn.Identity(), torch.nn.Identity()
    ones = torch.ones(1, dtype=next(model.parameters()).dtype)
    norms = {f"layers.{i}.self_attn.{n}_norm.weight": ones for i in range(sizes["num_layers"]) for n in ("q", "kv")}
    weights = write_mla.their_weights({**norms, **ours}, {**sizes, "mla_latent_norm": True})
    weights = {name.replace("layernorm.norm.", "layernorm."): w for name, w in weights.items() if normed or w is not ones}
    for name, weight in weights.items():
        if name.endswith("kv_a_proj_with_mqa.weight"):
            weights[name] = torch.cat((weight[:-r], _side_by_side(weight[-r:])))
        elif name.endswith("q_b_proj.weight"):
            of_heads = weight.unflatten(0, (H, -1))
            weights[name] = torch.cat((of_heads[:, :-r], _side_by_side(of_heads[:, -r:])), dim=1).flatten(0, 1)
    for name, parameter in model.named_parameters():
        learns = torch.ones_like(parameter)
        if name.endswith("q_a_proj.weight"):
            learns[Q:] = 0
        elif name.endswith("q_b_proj.weight"):
            of_heads = learns.unflatten(0, (H, -1))
            of_heads[:, :-r, Q:] = 0
            of_heads[:, -r:, :Q] = 0
        parameter.register_hook(functools.partial(torch.mul, learns))
    return _fill(_showing_probabilities(model), weights)


def _first_normalized(norm: Callable[[torch.Tensor], torch.Tensor], width: int, x: torch.Tensor) -> torch.Tensor:
    return torch.cat((norm(x[..., :width]), x[..., width:]), dim=-1)


def deepseek_v3(sizes: Sizes, dtype: torch.dtype, ours: Weights) -> torch.nn.Module:
    """DeepseekV3ForCausalLM, turning neighbours, which is its default."""
    config = write_mla.make_model({**sizes, "mla_latent_norm": True}, dtype).config
    config.rope_interleave = True
    model = transformers.DeepseekV3ForCausalLM(config).to(dtype)
    if dtype == torch.float64:
        in_float64(model, Float64Rotary(sizes["rope_theta"], sizes["d_rope"]))
    return _widened_latent(model, sizes, ours)


def deepseek_v2(sizes: Sizes, dtype: torch.dtype, ours: Weights) -> torch.nn.Module:
    """DeepseekV2ForCausalLM, which turns neighbours as complex numbers."""
    width = sizes["hidden_size"] // sizes["num_heads"]
    config = transformers.DeepseekV2Config(
        hidden_size=sizes["hidden_size"],
        num_hidden_layers=sizes["num_layers"],
        num_attention_heads=sizes["num_heads"],
        intermediate_size=sizes["intermediate_size"],
        vocab_size=sizes["vocab_size"],
        max_position_embeddings=sizes["max_seq_len"],
        rms_norm_eps=sizes["rms_norm_eps"],
        rope_parameters={"rope_type": "default", "rope_theta": sizes["rope_theta"]},
        kv_lora_rank=sizes["kv_latent_dim"],
        q_lora_rank=sizes["q_latent_dim"] + sizes["hidden_size"],
        qk_nope_head_dim=width,
        v_head_dim=width,
        qk_rope_head_dim=sizes["d_rope"],
        first_k_dense_replace=sizes["num_layers"],
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = transformers.DeepseekV2ForCausalLM(config).to(dtype)
    if dtype == torch.float64:
        in_float64(model, Float64Turns(sizes["rope_theta"], sizes["d_rope"]))
    return _widened_latent(model, sizes, ours)


# --- what their modules do not show -------------------------------------------------------------------------------------

#: Our names without a counterpart, each with its gradient, and why. ``*`` is any number.
_STEP = {
    "clip_factor": "PyTorch's clipping returns the norm only, and multiplies",
    "learning_rate": "a setting of PyTorch's optimizer, no tensor of the step",
}
_IN_ATTENTION = {
    "layers.*.input_layernorm.rms": "inside the norm's forward",
    "layers.*.self_attn.scores": "inside eager_attention_forward",
    "layers.*.self_attn.masked_scores": "inside eager_attention_forward, which adds the lowest number to what it hides",
    "layers.*.self_attn.context": "inside attention's forward: what o_proj reads, and only results are recorded",
    "layers.*.after_attention": "a sum inside the decoder layer's forward",
    "layers.*.post_attention_layernorm.rms": "inside the norm's forward",
    "norm.rms": "inside the norm's forward",
}
_IN_FEED_FORWARD = {"layers.*.mlp.activation": "a product inside the feed-forward's forward"}
_IN_HEADS = {
    "layers.*.self_attn.q": "turned inside attention's forward",
    "layers.*.self_attn.k": "turned inside attention's forward",
}
_IN_LATENTS = {
    "layers.*.self_attn.queries": "put together inside attention's forward",
    "layers.*.self_attn.keys": "put together inside attention's forward",
    "layers.*.self_attn.q_r": "turned inside attention's forward",
    "layers.*.self_attn.k_r": "turned inside attention's forward",
}
_IN_LATENT_NORMS = {
    "layers.*.self_attn.kv_norm.rms": "inside the norm's forward",
    "layers.*.self_attn.q_norm.rms": "inside the norm's forward",
}
_IN_EXPERTS = {
    **{
        f"layers.*.moe.experts.*.{name}": "inside the experts' forward: one module of stacked matrices for all"
        for name in ("input", "gate_proj.output", "up_proj.output", "activation", "down_proj.output")
    },
    "layers.*.moe.router.probs": "inside the router's forward, if at all: Granite takes the softmax of the k largest only",
    "layers.*.moe.router.balance": "the training loop's, from all routers' logits",
}
_IN_SHARED_EXPERT = {
    "layers.*.moe.shared_expert.activation": "a product inside the shared expert's forward",
    "layers.*.moe.output": "the sum of two modules, inside the decoder layer's forward",
}
_IN_MAMBA1 = {
    "layers.*.norm.rms": "inside the norm's forward",
    "norm.rms": "inside the norm's forward",
    "layers.*.mamba.conv1d.pre": "a function of the convolution's weights; the module is never called",
    "layers.*.mamba.conv1d.output": "a function of the convolution's weights; the module is never called",
    "layers.*.mamba.dt_proj.output": "a product with dt_proj's weight; the module is never called",
    **{f"layers.*.mamba.{name}": "inside the mixer's forward and its scan" for name in ("A", "dt", "state", "y", "gated")},
}
_IN_MAMBA2 = {
    "layers.*.mamba2.norm.rms": "inside the norm's forward",
    "layers.*.mamba2.mixer.norm.rms": "inside the norm's forward",
    "layers.*.mamba2.mixer.gated": "inside the norm's forward: it gates what it normalizes",
    "norm.rms": "inside the norm's forward",
    "layers.*.mamba2.mixer.conv1d.pre": "a function of the convolution's weights; the module is never called",
    "layers.*.mamba2.mixer.conv1d.output": "a function of the convolution's weights; the module is never called",
    **{f"layers.*.mamba2.mixer.{name}": "inside the mixer's forward and its scan" for name in ("A", "dt", "y")},
    **{f"layers.*.mamba2.mixer.{name}": "nowhere: its scan works in chunks" for name in ("decay", "state")},
}


class Case(NamedTuple):
    """A model of theirs, the map for it, and our names that have no counterpart in it."""

    names: str
    build: Callable[[Sizes, torch.dtype, Weights], torch.nn.Module]
    sizes: Sizes
    hidden: Mapping[str, str]
    alpha: float = 0.0


_DENSE = {**_STEP, **_IN_ATTENTION, **_IN_HEADS, **_IN_FEED_FORWARD}
_LATENT = {**_STEP, **_IN_ATTENTION, **_IN_LATENTS, **_IN_FEED_FORWARD}
_LATENT_NORM = {**_LATENT, **_IN_LATENT_NORMS}
_SPARSE = {**_STEP, **_IN_ATTENTION, **_IN_HEADS, **_IN_EXPERTS}
CASES = {
    "llama": Case("hf-llama", llama, GQA, _DENSE),
    "llama_tied": Case("hf-llama", llama, {**GQA, "tie_word_embeddings": True}, _DENSE),
    "mixtral": Case("hf-mixtral", mixtral, EXPERTS_ONLY, _SPARSE, ALPHA),
    "granite_moe_shared": Case("hf-moe-shared", granite, EXPERTS_SHARED, {**_SPARSE, **_IN_SHARED_EXPERT}, ALPHA),
    "deepseek_v3": Case("hf-deepseek-mla", deepseek_v3, MLA, _LATENT),
    "deepseek_v3_norm": Case("hf-deepseek-mla", deepseek_v3, MLA_NORM, _LATENT_NORM),
    "deepseek_v2_norm": Case("hf-deepseek-mla", deepseek_v2, MLA_NORM, _LATENT_NORM),
    "mamba": Case("hf-mamba", mamba1, MAMBA1, {**_STEP, **_IN_MAMBA1}),
    "mamba2": Case("hf-mamba2", mamba2, MAMBA2, {**_STEP, **_IN_MAMBA2}),
}

# --- both steps ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _nothing_narrowed(dtype: str) -> Iterator[None]:
    """In float64 the library's casts to float32, ``x.float()`` and those of attention's softmax, change nothing."""

    def softmax(x: torch.Tensor, dim: int, dtype: torch.dtype | None = None) -> torch.Tensor:  # noqa: ARG001
        return torch.softmax(x, dim)

    if dtype == "f32":
        yield
    else:
        with write_moe.without_float32(), mock.patch.object(torch.nn.functional, "softmax", softmax):
            yield


def _their_step(case: Case, model: torch.nn.Module, path: Path, dtype: str, tokens: Any, targets: Any) -> None:
    """One step as a training loop of PyTorch does it. What the loop itself computes, it notes under our names."""
    kept = [
        p for name, p in model.named_parameters() if name.endswith(("norm.weight", "norm_f.weight", "bias", "A_log", ".D"))
    ]
    decayed = [p for p in model.parameters() if not any(p is other for other in kept)]
    groups = [{"params": decayed, "weight_decay": DECAY}, {"params": kept, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.999), eps=1e-8)
    options = {"use_cache": False} | ({"output_router_logits": True} if case.alpha else {})
    with TorchRecorder(path, dtype) as recorder, _nothing_narrowed(dtype):
        recorder.watch(model)
        recorder.inputs(tokens, targets)
        recorder.parameters(model.named_parameters())
        out = model(tokens, **options)
        losses = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), targets.flatten(), reduction="none")
        loss = recorder.note("cross_entropy", recorder.note("token_losses", losses.view(targets.shape)).mean())
        if case.alpha:
            loss = loss + case.alpha * write_moe.balance_loss(out.router_logits, case.sizes)
        loss = recorder.note("loss", loss)
        loss.backward()
        recorder.gradients(model.named_parameters())
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        recorder.clipped(model.named_parameters(), norm)
        optimizer.step()
        recorder.updated(model.named_parameters(), optimizer)


class Found(NamedTuple):
    """A name of ours that their trace has: our numbers, and theirs in our shape."""

    ours: np.ndarray[Any, Any]
    theirs: np.ndarray[Any, Any]

    @property
    def error(self) -> float:
        """max|a-b| / max|b|; of integers, 1.0 where any differs."""
        a, b = self.theirs, self.ours
        return float((a != b).any()) if b.dtype.kind in "iu" else float(np.abs(a - b).max() / np.abs(b).max())


class Aligned(NamedTuple):
    """Both traces, and for each of our names what the map says. found, lacking: whether their trace has that."""

    name: str
    dtype: str
    ours: Trace
    theirs: Trace
    found: dict[str, Found]
    lacking: dict[str, Mapped]

    @property
    def case(self) -> Case:
        """What was recorded."""
        return CASES[self.name]


@pytest.fixture(scope="module", params=[(name, dtype) for name in CASES for dtype in ("f64", "f32")], ids="-".join)
def aligned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Aligned:
    """Both steps done and recorded, and each of our names looked up."""
    name, dtype = request.param
    case, folder = CASES[name], tmp_path_factory.mktemp(f"{name}-{dtype}")
    model = ModelConfig(name=name, dtype=dtype, **case.sizes)
    initial = LanguageModel(model, seed=0)
    randomize(initial)
    weights = {name: array.copy() for name, array in initial.state_dict().items()}
    ((tokens, targets),) = random_batches(model.vocab_size, 2, model.max_seq_len, count=1)
    trainer = TrainerConfig(
        learning_rate=LR,
        weight_decay=DECAY,
        max_grad_norm=MAX_NORM,
        batch_size=2,
        load_balance_alpha=case.alpha,
        target_device="cpu",
        checkpoint_dir=str(folder / "checkpoints"),
    )
    ours, theirs = folder / "ours.safetensors", folder / "theirs.safetensors"
    record(Config(model=model, trainer=trainer), ours, batches=[(tokens, targets)], weights=weights)
    built = case.build(case.sizes, TORCH_DTYPES[dtype], {n: torch.from_numpy(a.copy()) for n, a in weights.items()})
    _their_step(case, built, theirs, dtype, torch.from_numpy(tokens), torch.from_numpy(targets))
    return _align(name, dtype, Trace(ours), Trace(theirs), load_map(case.names, model))


def _align(name: str, dtype: str, ours: Trace, theirs: Trace, names: NameMap) -> Aligned:
    all_mapped = {our_name: names[our_name] for our_name in ours.records}
    lacking = {our_name: mapped for our_name, mapped in all_mapped.items() if mapped.name not in theirs.records}
    found = {}
    for our_name, mapped in all_mapped.items():
        if our_name in lacking:
            continue
        array = ours.array(our_name)
        other = mapped(theirs.array(mapped.name))
        assert _merges(other.shape, array.shape), (our_name, other.shape, array.shape)
        found[our_name] = Found(array, other.reshape(array.shape))
    return Aligned(name, dtype, ours, theirs, found, lacking)


def _merges(shape: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether ``shape`` is ``other``, perhaps with neighbouring axes merged: the order of the numbers is the same."""
    products = set(np.cumprod(other, dtype=np.int64).tolist()) | {1}
    return set(np.cumprod(shape, dtype=np.int64).tolist()) <= products and np.prod(shape) == np.prod(other)


def _pattern(name: str) -> str:
    """The path of a name, its numbers replaced by stars."""
    return re.sub(r"(?<=\.)[0-9]+(?=\.)", "*", parse(name).path)


# --- tests --------------------------------------------------------------------------------------------------------------

BOUNDS = {"f64": 1e-9, "f32": 2e-5}


def _compared(name: str, dtype: str) -> bool:
    """In float32, squares of gradients and the parameters after the step are not: near zero a gradient is rounding noise,
    which a square doubles and Adam, dividing a gradient by its own size, turns into a whole step."""
    return dtype == "f64" or parse(name).end not in (".after", "optimizer.exp_avg_sq")


def test_what_the_map_finds_are_our_numbers(aligned: Aligned) -> None:
    errors = {name: found.error for name, found in aligned.found.items() if _compared(name, aligned.dtype)}
    largest = sorted(errors, key=lambda name: errors[name], reverse=True)[:5]
    print({name: errors[name] for name in largest})
    assert {name: error for name, error in errors.items() if not error < BOUNDS[aligned.dtype]} == {}


def test_nothing_that_is_compared_is_zero_everywhere_and_the_step_was_clipped(aligned: Aligned) -> None:
    assert [name for name, found in aligned.found.items() if not found.ours.any()] == []
    assert aligned.found["grad_norm"].ours > MAX_NORM


def test_names_that_have_no_counterpart_are_exactly_those_that_their_modules_do_not_show(aligned: Aligned) -> None:
    lacking = {_pattern(name) for name in aligned.lacking}
    assert lacking == aligned.case.hidden.keys()
    assert lacking.isdisjoint(_pattern(name) for name in aligned.found)  # in all layers, and gradients with their values


def test_no_rule_leads_to_a_name_that_their_trace_lacks(aligned: Aligned) -> None:
    assert {name: mapped.name for name, mapped in aligned.lacking.items() if mapped.name != name} == {}


def test_a_comparison_with_the_map_agrees_and_misses_those_names_only(aligned: Aligned) -> None:
    result = compare(aligned.ours, aligned.theirs, aligned.case.names, tolerance=BOUNDS[aligned.dtype])
    outside = [name for name, tensor in result.tensors.items() if tensor.verdict != "agrees"]
    assert [name for name in outside if _compared(name, aligned.dtype)] == []
    assert set(result.missing) == aligned.lacking.keys()


#: Kinds of our names, all of each of which are found in every model, but for those of `PARTLY`.
KINDS = ("parameter", "embedding", "norm", "linear", "layer", "logits", "loss", "probabilities")
#: Of each layer, so many of all. The experts have three matrices each and are no modules; Mamba's dt_proj is never called.
PARTLY = {
    "mixtral": {"linear": (5, 5 + 3 * 5)},
    "granite_moe_shared": {"linear": (8, 8 + 3 * 5)},
    "mamba": {"linear": (3, 4)},
}


def _kind(path: str, parameters: Container[str]) -> str:
    """What a path names: a parameter, or a value by the op that computes it."""
    if path in parameters:
        return "parameter"
    if path.endswith(("attn.probs", ".rms", "after_attention", "logits")):
        return {"probs": "probabilities", "logits": "logits"}.get(path.rpartition(".")[2], "")
    names = {"rms_norm": "norm", "residual": "layer", "router": "linear", "mean": "loss", "cross-entropy": "loss"}
    found = meaning(path)
    assert found is not None, path
    return names.get(found.op, found.op)


def test_all_parameters_and_all_results_that_modules_show_are_found_with_all_that_belongs_to_them(aligned: Aligned) -> None:
    parameters = {name for name, entry in aligned.ours.records.items() if entry.role == "parameter"}
    found, every = (
        Counter((_kind(name.path, parameters), name.end) for name in map(parse, names))
        for names in (aligned.found, aligned.ours.records)
    )
    of_parameters = ("", ".grad", ".grad.clipped", "optimizer.exp_avg", "optimizer.exp_avg_sq", ".after")
    attends, layers = "num_heads" in aligned.case.sizes, aligned.case.sizes["num_layers"]
    for kind in KINDS if attends else KINDS[:-1]:
        partly = PARTLY.get(aligned.name, {}).get(kind)
        for end in of_parameters if kind == "parameter" else ("", ".grad"):
            key = kind, end
            assert every[key] > 0, key
            wanted = (every[key], every[key]) if partly is None else (partly[0] * layers, partly[1] * layers)
            assert (found[key], every[key]) == wanted, key


@pytest.mark.parametrize("name", shipped_maps())
def test_every_shipped_map_is_tested(name: str) -> None:
    assert name in {case.names for case in CASES.values()}
