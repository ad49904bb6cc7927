"""The model families of Hugging Face that are models of ours: their config.json, described once and read both ways.

What a family can say and we cannot is refused by `read_config`,
by name, all of it at once. Key names and what an absent key means are those of transformers 5.24; files of version 4, which
wrote ``rope_theta`` and ``torch_dtype`` where 5 writes ``rope_parameters`` and ``dtype``, are read as well.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from oxidizr_ref.config import Config, ModelConfig
from oxidizr_ref.errors import ConfigError, DataError

#: What the world calls our dtypes.
DTYPES = {"f64": "float64", "f32": "float32", "f16": "float16", "bf16": "bfloat16"}
#: The norms of DeepSeek's latents have this epsilon in transformers, whatever the others have. Ours have one for all.
LATENT_EPS = 1e-6
#: What a Mamba, which knows no longest sequence, gets as max_seq_len where its config.json says nothing.
MAMBA_LENGTH = 2048

#: Their keys for sizes, which must be there, and ours.
_SIZES = {"hidden_size": "hidden_size", "num_hidden_layers": "num_layers", "vocab_size": "vocab_size"}
_ATTENTION = {**_SIZES, "num_attention_heads": "num_heads", "max_position_embeddings": "max_seq_len"}
_DENSE = {"intermediate_size": "intermediate_size"}
_LATENT = {**_ATTENTION, "kv_lora_rank": "kv_latent_dim", "qk_rope_head_dim": "d_rope"}
_CHOSEN = {"num_experts_per_tok": "experts_per_tok"}
_MAMBA = {**_SIZES, "state_size": "mamba_d_state", "conv_kernel": "mamba_d_conv", "expand": "mamba_expand"}
_MAMBA2 = {"state_size": "mamba2_state_size", "conv_kernel": "mamba2_conv_kernel", "expand": "mamba2_expand"}
_MAMBA2 |= {"num_heads": "mamba2_num_heads", "head_dim": "mamba2_head_dim"}
_MAMBA2 |= {"n_groups": "mamba2_n_groups", "chunk_size": "mamba2_chunk_size"}

#: Parts of our names, and the words that stand for them in theirs.
_EXPERTS_OF_MIXTRAL = {".moe.router.gate.": ".block_sparse_moe.gate.", ".moe.experts.": ".block_sparse_moe.experts."}
_EXPERTS_OF_DEEPSEEK = {".moe.router.gate.": ".mlp.gate.", ".moe.shared_expert.": ".mlp.shared_experts."}
_LATENTS = {".w_dq.": ".q_a_proj.", ".q_norm.": ".q_a_layernorm.", ".kv_norm.": ".kv_a_layernorm."}
_BACKBONE = {"backbone.embed_tokens.": "backbone.embeddings.", "backbone.norm.": "backbone.norm_f."}


@dataclass(frozen=True)
class Family:
    """One family: its model_type and class, their keys for our sizes, and the parts of names that are other words there."""

    model_type: str
    architecture: str
    sizes: Mapping[str, str]
    renamed: Mapping[str, str] = field(default_factory=dict)
    eps: float = 1e-6  # where the key is absent, as are the next two
    theta: float = 1e4
    tied: bool = False

    @property
    def is_mamba(self) -> bool:
        """Whether all layers are Mambas rather than attention."""
        return self.model_type.startswith("mamba")

    @property
    def is_latent(self) -> bool:
        """Whether attention is DeepSeek's."""
        return "kv_lora_rank" in self.sizes

    @property
    def is_sparse(self) -> bool:
        """Whether feed-forwards are experts."""
        return "num_experts_per_tok" in self.sizes

    @property
    def eps_key(self) -> str:
        """What the epsilon of norms is called."""
        return "layer_norm_epsilon" if self.is_mamba else "rms_norm_eps"

    def name(self, ours: str) -> str:
        """Their name of one of our tensors that is a tensor by itself there as well."""
        found = ours if ours.startswith("lm_head.") else f"{'backbone' if self.is_mamba else 'model'}.{ours}"
        for old, new in self.renamed.items():
            found = found.replace(old, new)
        return found


_DEEPSEEK_V2 = "deepseek_v2", "DeepseekV2ForCausalLM"
LLAMA = Family("llama", "LlamaForCausalLM", {**_ATTENTION, **_DENSE})
MIXTRAL = Family(
    "mixtral",
    "MixtralForCausalLM",
    {**_ATTENTION, **_DENSE, "num_local_experts": "num_experts", **_CHOSEN},
    {**_EXPERTS_OF_MIXTRAL, ".gate_proj.": ".w1.", ".down_proj.": ".w2.", ".up_proj.": ".w3."},
    eps=1e-5,
    theta=1e6,
)
DEEPSEEK_V2 = Family(
    *_DEEPSEEK_V2,
    {**_LATENT, "moe_intermediate_size": "intermediate_size", "n_routed_experts": "num_experts", **_CHOSEN},
    {**_EXPERTS_OF_DEEPSEEK, ".moe.experts.": ".mlp.experts.", **_LATENTS},
)
DEEPSEEK_V2_DENSE = Family(*_DEEPSEEK_V2, {**_LATENT, **_DENSE}, _LATENTS)
DEEPSEEK_V3_DENSE = Family("deepseek_v3", "DeepseekV3ForCausalLM", {**_LATENT, **_DENSE}, _LATENTS)
MAMBA = Family("mamba", "MambaForCausalLM", _MAMBA, {**_BACKBONE, ".mamba.": ".mixer."}, eps=1e-5, tied=True)
MAMBA2 = Family(
    "mamba2",
    "Mamba2ForCausalLM",
    {**_SIZES, **_MAMBA2},
    {**_BACKBONE, ".mamba2.mixer.": ".mixer.", ".mamba2.norm.": ".norm."},
    eps=1e-5,
)

#: Keys that change nothing we compute: how training began, how their code works, what a generation does.
# fmt: off
_HARMLESS = frozenset({
    "_name_or_path", "architectures", "auto_map", "aux_loss_alpha", "bos_token_id", "dtype", "eos_token_id", "ep_size",
    "initializer_range", "max_position_embeddings", "model_type", "norm_before_gate", "num_nextn_predict_layers",
    "output_router_logits", "pad_token_id", "pretraining_tp", "qk_head_dim", "rescale_prenorm_residual", "residual_in_fp32",
    "router_aux_loss_coef", "seq_aux", "time_step_floor", "time_step_init_scheme", "time_step_max", "time_step_min",
    "time_step_rank", "time_step_scale", "torch_dtype", "transformers_version", "unk_token_id", "use_associative_scan",
    "use_cache", "use_mambapy",
})
# fmt: on
#: DeepSeek's keys that tell of the feed-forwards which its layers do not have.
# fmt: off
_OTHER_FEED_FORWARDS = frozenset({
    "intermediate_size", "moe_intermediate_size", "moe_layer_freq", "n_group", "n_routed_experts", "n_shared_experts",
    "norm_topk_prob", "num_experts_per_tok", "routed_scaling_factor", "scoring_func", "topk_group", "topk_method",
})
# fmt: on
_ROPE = ("rope_parameters", "rope_scaling", "rope_theta")
#: What theirs do while they train, and we do not.
_NOISE = ("attention_dropout", "router_jitter_noise")


# --- their config to ours ---------------------------------------------------------------------------------------------


def family_in(data: Mapping[str, Any], where: object) -> Family:
    """The family that a config.json names. Raises DataError for one that is not among ours."""
    known = {f.model_type: f for f in (LLAMA, MIXTRAL, DEEPSEEK_V2, DEEPSEEK_V3_DENSE, MAMBA, MAMBA2)}
    named = data.get("model_type")
    if not isinstance(named, str) or named not in known:
        raise DataError(f"{where}: model_type {_shown(named)} is not imported; those that are: {', '.join(known)}")
    if named == "deepseek_v2" and _all_dense(data):
        return DEEPSEEK_V2_DENSE
    return known[named]


def read_config(data: Mapping[str, Any], where: object) -> tuple[Family, ModelConfig, list[str]]:
    """A config.json as a config of ours, and what to tell of it, a line each.

    ``where``: its path, for messages. Raises DataError naming every key whose meaning we lack.
    """
    family = family_in(data, where)
    odd = [f"{key} is {_shown(data.get(key))}, expected a size" for key in family.sizes if not _is_size(data.get(key))]
    if family.is_latent and "q_lora_rank" not in data:
        odd.append("q_lora_rank is absent; null says that queries have no latent")
    if not odd:
        odd = [*_not_ours(family, data), *_odd_rope(data)]
    if odd:
        raise DataError(f"{where}: this {family.model_type} cannot be imported exactly: {'; '.join(odd)}")
    try:
        parts = {"model": _our_keys(family, data), "trainer": {"learning_rate": 1.0, "batch_size": 1}}
        model = Config.from_canonical(parts).model
    except (ConfigError, ValueError) as error:  # the latter of numbers that are not finite
        reasons = str(error).replace("the checkpoint's config: ", "").replace("\n", "; ")
        raise DataError(f"{where}: this {family.model_type} cannot be imported exactly: {reasons}") from error
    return family, model, _notes(family, data)


def _our_keys(family: Family, data: Mapping[str, Any]) -> dict[str, Any]:
    keys = {ours: data[theirs] for theirs, ours in family.sizes.items()}
    keys["rms_norm_eps"] = _or(data.get(family.eps_key), family.eps)
    keys["tie_word_embeddings"] = _or(data.get("tie_word_embeddings"), family.tied)
    if family.is_mamba:
        keys["mamba_layers"] = list(range(min(data["num_hidden_layers"], 10_000)))
        keys["max_seq_len"] = _or(data.get("max_position_embeddings"), MAMBA_LENGTH)
        return keys
    keys["rope_theta"] = _or(_rope_of(data).get("rope_theta"), _or(data.get("rope_theta"), family.theta))
    if family.is_latent:
        latent = data["q_lora_rank"] or 0
        keys |= {"mla_latent_norm": True, "q_latent_dim": latent, "mla_q_rope_from": "latent" if latent else "hidden"}
    else:
        keys["kv_heads"] = _or(data.get("num_key_value_heads"), data["num_attention_heads"])
    if family.is_sparse:
        keys |= {"norm_topk_prob": not family.is_latent, "shared_expert_enabled": family.is_latent}
    return keys


def _only(family: Family, data: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
    """Keys with the only values that mean something of ours. The first is written; None, an absent key, is not."""
    D = data["hidden_size"]
    only: dict[str, tuple[Any, ...]] = {"hidden_act": ("silu", None), "quantization_config": (None,)}
    if family.is_mamba:
        inner = D * data["expand"]
        only |= {"use_bias": (False, None), "use_conv_bias": (True, None), "rms_norm": (None, True)}
        only["intermediate_size"] = (None, inner)
        if family is MAMBA:
            return only | {"time_step_rank": (math.ceil(D / 16), "auto", None)}
        return only | {"time_step_limit": (None, [0, math.inf], [0, {"__float__": "Infinity"}])}
    H, longest, window = data["num_attention_heads"], data["max_position_embeddings"], data.get("sliding_window")
    P, layers = D // H, data["num_hidden_layers"]
    only |= {"attention_bias": (False, None), "mlp_bias": (False, None), "partial_rotary_factor": (None, 1)}
    only["sliding_window"] = (None, window) if _is_size(window) and window >= longest else (None,)
    if not family.is_latent:
        return only | {"head_dim": (P, None)}
    only |= {
        "qk_nope_head_dim": (P,),
        "v_head_dim": (P,),
        "rms_norm_eps": (LATENT_EPS, None),
        "rope_interleave": (None, True),
    }
    only["num_key_value_heads"] = (H,) if family is DEEPSEEK_V3_DENSE else (H, None)
    if not family.is_sparse:
        return only | {"first_k_dense_replace": (data["first_k_dense_replace"] if _all_dense(data) else layers,)}
    only |= {"first_k_dense_replace": (0, None), "moe_layer_freq": (None, 1), "n_shared_experts": (1,)}
    only |= {"topk_method": ("greedy", None), "scoring_func": (None, "softmax"), "routed_scaling_factor": (1.0, None)}
    return only | {"norm_topk_prob": (False, None), "n_group": (None, 1), "topk_group": (None, 1)}


def _not_ours(family: Family, data: Mapping[str, Any]) -> list[str]:
    odd = []
    classes = data.get("architectures")
    if classes is not None and classes != [family.architecture]:
        odd.append(f"architectures is {_shown(classes)}, expected {_shown([family.architecture])}")
    for key, values in _only(family, data).items():
        found = data.get(key)
        if not any(found == value and isinstance(found, bool) == isinstance(value, bool) for value in values):
            wanted = [_shown(value) for value in values if value is not None]
            odd.append(f"{key} is {_shown(found)}, expected {' or '.join(wanted[:2]) or 'none'}")
    return odd


def _odd_rope(data: Mapping[str, Any]) -> list[str]:
    odd = []
    for key in ("rope_scaling", "rope_parameters"):
        rope = _or(data.get(key), {})
        if not isinstance(rope, dict):
            odd.append(f"{key} is {_shown(rope)}, expected a mapping")
            continue
        plain = {"rope_type": "default", "type": "default", "partial_rotary_factor": 1}
        scaled = {
            name: value for name, value in rope.items() if value not in (None, plain.get(name)) and name != "rope_theta"
        }
        if scaled:
            odd.append(f"{key} has {_shown(scaled)}, expected unscaled rotations (rope_type default)")
        elif None not in (rope.get("rope_theta"), data.get("rope_theta")) and rope["rope_theta"] != data["rope_theta"]:
            odd.append(f"rope_theta is {_shown(data['rope_theta'])}, and {_shown(rope['rope_theta'])} in {key}")
    return odd


def _rope_of(data: Mapping[str, Any]) -> dict[str, Any]:
    return {**_or(data.get("rope_scaling"), {}), **_or(data.get("rope_parameters"), {})}


def _all_dense(data: Mapping[str, Any]) -> bool:
    first, layers = data.get("first_k_dense_replace"), data.get("num_hidden_layers")
    return _is_size(first) and _is_size(layers) and first >= layers  # type: ignore[operator]


def _notes(family: Family, data: Mapping[str, Any]) -> list[str]:
    notes = [f"{key} {data[key]} is not applied when training here" for key in _NOISE if data.get(key)]
    if family.is_mamba and data.get("max_position_embeddings") is None:
        notes.append(f"a {family.model_type} knows no longest sequence; max_seq_len is set to {MAMBA_LENGTH}")
    if data.get("auto_map"):
        notes.append(f"the code that auto_map names is not run: this is the {family.model_type} of transformers")
    read = {*family.sizes, *_only(family, data), *_ROPE, *_NOISE, *_HARMLESS, family.eps_key, "tie_word_embeddings"}
    read |= {"num_key_value_heads", "q_lora_rank", "head_dim"} | (_OTHER_FEED_FORWARDS if family.is_latent else set())
    unread = sorted(key for key, value in data.items() if key not in read and value is not None)
    if unread:
        notes.append(f"keys that transformers does not read of a {family.model_type} are ignored: {', '.join(unread)}")
    return notes


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _is_size(value: Any) -> bool:
    return type(value) is int and value > 0


def _shown(value: Any) -> str:
    if value is None:
        return "absent"
    text = json.dumps(value, sort_keys=True)
    return text if len(text) <= 80 else f"{text[:77]}..."


# --- our config to theirs ---------------------------------------------------------------------------------------------


def family_for(m: ModelConfig) -> tuple[Family | None, str]:
    """The family that a model of ours belongs to, or None and the reason why there is none."""
    kinds = sorted(set(m.layer_kinds))
    if len(kinds) > 1:
        return None, f"layers of different kinds ({', '.join(kinds)}) have no layout of Hugging Face's"
    if kinds == ["mamba3"]:
        return None, "Mamba3 has no layout of Hugging Face's"
    if kinds != ["attention"]:
        return (MAMBA if kinds == ["mamba1"] else MAMBA2), ""
    if not m.uses_mla and not m.uses_moe:
        return LLAMA, ""
    family = MIXTRAL if not m.uses_mla else DEEPSEEK_V2 if m.uses_moe else DEEPSEEK_V2_DENSE
    wanted: dict[str, Any] = {}
    if m.uses_moe:
        wanted |= {"norm_topk_prob": not m.uses_mla, "shared_expert_enabled": m.uses_mla}
    if m.uses_mla:
        wanted |= {"mla_latent_norm": True, "rms_norm_eps": LATENT_EPS}
        wanted |= {"mla_q_rope_from": "latent" if m.q_latent_dim else "hidden"}
    other = [
        f"{key} is {_shown(getattr(m, key))}, not {_shown(value)}"
        for key, value in wanted.items()
        if getattr(m, key) != value
    ]
    if other:
        return None, f"as a {family.model_type} of Hugging Face's it would be another model: {'; '.join(other)}"
    return family, ""


def write_config(family: Family, m: ModelConfig) -> dict[str, Any]:
    """The config.json of a model of ours, for transformers 4 and 5."""
    data: dict[str, Any] = {theirs: getattr(m, ours) for theirs, ours in family.sizes.items()}
    data |= {"architectures": [family.architecture], "model_type": family.model_type, "use_cache": True}
    data |= {family.eps_key: m.rms_norm_eps, "tie_word_embeddings": m.tie_word_embeddings}
    data |= {"max_position_embeddings": m.max_seq_len, "torch_dtype": DTYPES[m.dtype]}
    data |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    if not family.is_mamba:
        data |= {"num_key_value_heads": m.kv_heads, "rope_theta": m.rope_theta}
    if family.is_latent:
        data |= {"q_lora_rank": m.q_latent_dim or None}
    if family is DEEPSEEK_V2_DENSE:
        data["first_k_dense_replace"] = m.num_layers
    return data | {key: values[0] for key, values in _only(family, data).items() if values[0] is not None}
