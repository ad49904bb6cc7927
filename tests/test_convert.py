"""Hugging Face's layouts: what is written is read as the same model, and what would be another model is refused by name."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pretrained_examples import EXAMPLES, config_of, edit_config, edit_tensors, weights_of, write_example
from safetensors.numpy import load_file

from oxidizr_ref.errors import DataError, UsageError
from oxidizr_ref.interop.families import family_for, read_config, write_config
from oxidizr_ref.interop.hugging_face import (
    expected_shapes,
    family_of,
    read_pretrained,
    write_pretrained,
)
from oxidizr_ref.interop.weight_files import SINGLE

# --- there and back ---------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_every_model_that_has_a_layout_is_read_as_it_was_written(
    data: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    name = data.draw(st.sampled_from(list(EXAMPLES)))
    changes: dict[str, Any] = {
        "dtype": data.draw(st.sampled_from(["f32", "f64", "f16", "bf16"])),
        "num_layers": data.draw(st.integers(1, 3)),
        "vocab_size": data.draw(st.integers(1, 30)),
        "tie_word_embeddings": data.draw(st.booleans()),
    }
    family, keys = EXAMPLES[name]
    if "mamba_layers" in keys:
        changes["mamba_layers"] = list(range(changes["num_layers"]))
    else:
        heads = data.draw(st.sampled_from([1, 2, 4]))
        changes |= {"num_heads": heads, "kv_heads": heads if "kv_latent_dim" in keys else 1}
    if "d_rope" in keys:
        changes["d_rope"] = data.draw(st.sampled_from([2, 4, 6]))
    config = config_of(name, **changes)
    weights = weights_of(config)
    directory = tmp_path_factory.mktemp(name)
    most = data.draw(st.one_of(st.none(), st.integers(1, 20_000)))
    files = write_pretrained(directory, config, weights, max_shard_bytes=most)

    read = read_pretrained(directory)
    assert sorted(directory.iterdir()) == sorted(files)
    assert read.family == family == family_of(config)
    assert read.config.model_copy(update={"name": name}) == config
    assert read.notes == []
    assert read.weights.keys() == weights.keys()
    for tensor, array in weights.items():
        assert read.weights[tensor].dtype == array.dtype and read.weights[tensor].tobytes() == array.tobytes(), tensor


@pytest.mark.parametrize("name", EXAMPLES)
def test_expected_shapes_are_those_of_the_tensors_that_are_written(name: str, tmp_path: Path) -> None:
    write_example(tmp_path, name)
    expected = expected_shapes(json.loads((tmp_path / "config.json").read_text()))
    found = {tensor: array.shape for tensor, array in load_file(tmp_path / "model.safetensors").items()}
    assert expected == found
    assert expected_shapes({"model_type": "gpt2"}) is None


# --- their config -----------------------------------------------------------------------------------------------------


def their_config(name: str) -> dict[str, Any]:
    config = config_of(name)
    family, _ = family_for(config)
    assert family is not None
    return write_config(family, config)


def test_what_versions_4_and_5_write_is_the_same_model() -> None:
    old = their_config("llama_tied")
    new = {key: value for key, value in old.items() if key not in ("rope_theta", "torch_dtype")}
    new |= {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "dtype": "float32"}
    assert "rope_theta" in old and "torch_dtype" in old
    assert read_config(old, "old")[1] == read_config(new, "new")[1]
    assert read_config({**old, "rope_scaling": None}, "old")[1] == read_config({**old, "rope_scaling": {}}, "old")[1]


@pytest.mark.parametrize(
    ("name", "absent", "expected"),
    [
        ("llama", "rms_norm_eps", 1e-6),
        ("mixtral", "rms_norm_eps", 1e-5),
        ("deepseek_v2", "rms_norm_eps", 1e-6),
        ("llama", "rope_theta", 1e4),
        ("mixtral", "rope_theta", 1e6),
        ("deepseek_v2", "rope_theta", 1e4),
        ("llama", "tie_word_embeddings", False),
        ("mamba", "tie_word_embeddings", True),
        ("mamba2", "tie_word_embeddings", False),
        ("mamba2", "layer_norm_epsilon", 1e-5),
        ("mamba", "max_position_embeddings", 2048),
        ("llama", "num_key_value_heads", 2),
    ],
)
def test_a_key_that_is_absent_means_what_it_means_in_transformers(name: str, absent: str, expected: Any) -> None:
    ours = {
        "layer_norm_epsilon": "rms_norm_eps",
        "max_position_embeddings": "max_seq_len",
        "num_key_value_heads": "kv_heads",
    }
    data = their_config(name)
    del data[absent]
    assert getattr(read_config(data, "config.json")[1], ours.get(absent, absent)) == expected


_YARN = {"type": "yarn", "factor": 4.0}
#: (example, keys changed, what the message names): features that we lack, each alone.
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"model_type": "gemma2"}, 'model_type "gemma2" is not imported'),
    ("llama", {"model_type": None}, "model_type absent"),
    ("llama", {"model_type": ["llama"]}, 'model_type ["llama"]'),
    ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
    ("llama", {"hidden_size": None}, "hidden_size is absent, expected a size"),
    ("llama", {"hidden_size": True}, "hidden_size is true"),
    ("llama", {"num_attention_heads": "2"}, 'num_attention_heads is "2"'),
    ("llama", {"num_hidden_layers": 2**40}, "num_layers"),
    ("llama", {"head_dim": 32}, "head_dim is 32, expected 8"),
    ("llama", {"num_key_value_heads": 3}, "num_heads 2 is not divisible by kv_heads 3"),
    ("llama", {"attention_bias": True}, "attention_bias is true, expected false"),
    ("llama", {"mlp_bias": True}, "mlp_bias is true"),
    ("llama", {"hidden_act": "gelu"}, 'hidden_act is "gelu", expected "silu"'),
    ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_scaling has"),
    ("llama", {"rope_scaling": [2.0]}, "rope_scaling is [2.0]"),
    ("llama", {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "rope_parameters has"),
    ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}, "rope_theta is 10000.0, and 5.0"),
    ("llama", {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "full_attention"),
    ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, expected 1"),
    ("llama", {"sliding_window": 4}, "sliding_window is 4"),
    ("llama", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config is"),
    ("llama", {"rms_norm_eps": -1.0}, "rms_norm_eps"),
    ("llama", {"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
    ("mixtral", {"sliding_window": 7}, "sliding_window is 7"),
    ("mixtral", {"num_experts_per_tok": 4}, "experts_per_tok"),
    ("mixtral", {"num_local_experts": 0}, "num_local_experts is 0"),
    ("deepseek_v2", {"rope_scaling": _YARN}, "yarn"),
    ("deepseek_v2", {"v_head_dim": 16}, "v_head_dim is 16, expected 8"),
    ("deepseek_v2", {"v_head_dim": None}, "v_head_dim is absent, expected 8"),
    ("deepseek_v2", {"qk_nope_head_dim": 16}, "qk_nope_head_dim is 16"),
    ("deepseek_v2", {"num_key_value_heads": 1}, "num_key_value_heads is 1"),
    ("deepseek_v2", {"rms_norm_eps": 1e-5}, "rms_norm_eps is 1e-05, expected 1e-06"),
    ("deepseek_v2", {"first_k_dense_replace": 1}, "first_k_dense_replace is 1, expected 0"),
    ("deepseek_v2", {"moe_layer_freq": 2}, "moe_layer_freq is 2"),
    ("deepseek_v2", {"n_shared_experts": 2}, "n_shared_experts is 2, expected 1"),
    ("deepseek_v2", {"n_shared_experts": None}, "n_shared_experts is absent"),
    ("deepseek_v2", {"routed_scaling_factor": 2.5}, "routed_scaling_factor is 2.5"),
    ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob is true"),
    ("deepseek_v2", {"scoring_func": "sigmoid"}, "scoring_func is"),
    ("deepseek_v2", {"topk_method": "group_limited_greedy"}, "topk_method is"),
    ("deepseek_v2", {"n_group": 2}, "n_group is 2"),
    ("deepseek_v2", {"attention_bias": True}, "attention_bias is true"),
    ("deepseek_v2", {"rope_interleave": False}, "rope_interleave is false"),
    ("deepseek_v2", {"qk_rope_head_dim": 3}, "d_rope"),
    (
        "deepseek_v2",
        {"model_type": "deepseek_v3", "architectures": None, "intermediate_size": 24},
        "first_k_dense_replace is 0, expected 2",
    ),
    ("mamba", {"use_bias": True}, "use_bias is true, expected false"),
    ("mamba", {"use_conv_bias": False}, "use_conv_bias is false, expected true"),
    ("mamba", {"hidden_act": "relu"}, 'hidden_act is "relu"'),
    ("mamba", {"time_step_rank": 7}, "time_step_rank is 7, expected 1"),
    ("mamba", {"intermediate_size": 48}, "intermediate_size is 48, expected 32"),
    ("mamba", {"rms_norm": False}, "rms_norm is false"),
    ("mamba", {"expand": 1.5}, "expand is 1.5"),
    ("mamba2", {"time_step_limit": [0.001, 0.1]}, "time_step_limit is [0.001, 0.1]"),
    ("mamba2", {"use_conv_bias": False}, "use_conv_bias is false"),
    ("mamba2", {"num_heads": 8}, "must equal"),
    ("mamba2", {"n_groups": 3}, "not divisible by mamba2_n_groups"),
]


@pytest.mark.parametrize(("name", "changes", "named"), REFUSED, ids=lambda value: value if isinstance(value, str) else "")
def test_what_we_lack_is_refused_in_one_line_that_names_it(name: str, changes: dict[str, Any], named: str) -> None:
    data = {**their_config(name), **changes}
    with pytest.raises(DataError) as caught:
        read_config(data, "here/config.json")
    assert named in str(caught.value) and "\n" not in str(caught.value)
    assert str(caught.value).startswith("here/config.json: ")
    assert expected_shapes(data) is None


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda parts: st.lists(parts, max_size=3) | st.dictionaries(st.text(max_size=4), parts, max_size=3),
    max_leaves=4,
)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_whatever_a_config_says_it_is_read_or_refused(data: Any) -> None:
    theirs = their_config(data.draw(st.sampled_from(list(EXAMPLES))))
    known = [*theirs, "rope_scaling", "rope_parameters", "sliding_window", "quantization_config", "time_step_limit"]
    changed = {**theirs, **data.draw(st.dictionaries(st.sampled_from(known), _JSON, min_size=1, max_size=3))}
    try:
        read_config(changed, "config.json")
    except DataError as error:
        assert str(error).startswith("config.json: ")


def test_all_that_we_lack_is_named_at_once() -> None:
    data = their_config("deepseek_v2")
    changes = {"attention_bias": True, "n_shared_experts": 2, "v_head_dim": 16, "rope_scaling": _YARN, "hidden_act": "gelu"}
    with pytest.raises(DataError) as caught:
        read_config({**data, **changes}, "config.json")
    assert all(key in str(caught.value) for key in changes)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama", {"sliding_window": 8, "head_dim": None, "attention_bias": None, "pretraining_tp": 4}),
        ("llama", {"rope_scaling": {"type": "default"}, "partial_rotary_factor": 1.0, "architectures": None}),
        (
            "deepseek_v2",
            {"n_group": 1, "topk_group": 1, "moe_layer_freq": 1, "scoring_func": "softmax", "intermediate_size": 9},
        ),
        ("deepseek_v2_dense", {"first_k_dense_replace": 9, "n_routed_experts": 4, "n_shared_experts": 2}),
        ("mamba", {"time_step_rank": "auto", "intermediate_size": 32, "residual_in_fp32": True, "rms_norm": True}),
        ("mamba2", {"time_step_limit": [0.0, math.inf], "norm_before_gate": True}),
        ("mamba2", {"time_step_limit": [0.0, {"__float__": "Infinity"}]}),
    ],
)
def test_what_changes_nothing_is_read_without_a_note(name: str, changes: dict[str, Any]) -> None:
    data = their_config(name)
    assert read_config({**data, **changes}, "config.json")[1:] == (read_config(data, "config.json")[1], [])


def test_a_deepseek_v3_is_read_where_all_its_layers_are_dense(tmp_path: Path) -> None:
    write_example(tmp_path, "deepseek_v2_dense")
    v2 = read_pretrained(tmp_path)
    edit_config(tmp_path, {"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"], "n_group": 8})
    v3 = read_pretrained(tmp_path)
    assert (v3.family, v3.config, v3.notes) == ("deepseek_v3", v2.config, [])
    assert family_of(v3.config) == "deepseek_v2"  # the same model


def test_what_is_not_applied_or_not_read_is_noted() -> None:
    data = their_config("mamba") | {
        "ssm_cfg": {"d": 1},
        "auto_map": {"AutoModel": "m.M"},
        "attention_dropout": 0.1,
    }
    del data["max_position_embeddings"]
    notes = read_config(data, "config.json")[2]
    assert len(notes) == 4
    for word in ("ssm_cfg", "auto_map", "attention_dropout 0.1", "max_seq_len is set to 2048"):
        assert any(word in note for note in notes), word


# --- ours that have no layout -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("mamba2", {"mamba_layers": [0], "num_heads": 2}, "different kinds (attention, mamba2)"),
        ("mamba2", {"mamba3_enabled": True, "mamba2_state_size": 8}, "Mamba3"),
        ("mixtral", {"shared_expert_enabled": True}, "shared_expert_enabled is true, not false"),
        ("mixtral", {"norm_topk_prob": False}, "norm_topk_prob is false, not true"),
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob is true, not false"),
        ("deepseek_v2", {"shared_expert_enabled": False}, "shared_expert_enabled is false, not true"),
        ("deepseek_v2", {"rms_norm_eps": 1e-5}, "rms_norm_eps is 1e-05, not 1e-06"),
        ("deepseek_v2", {"mla_latent_norm": False}, "mla_latent_norm is false, not true"),
        ("deepseek_v2", {"mla_q_rope_from": "hidden"}, 'mla_q_rope_from is "hidden", not "latent"'),
    ],
)
def test_a_model_that_would_be_another_one_is_not_written_and_the_reason_is_told(
    name: str, changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    config = config_of(name, **changes)
    assert family_of(config) is None
    with pytest.raises(UsageError) as caught:
        write_pretrained(tmp_path / "out", config, weights_of(config))
    assert reason in str(caught.value) and not (tmp_path / "out").exists()


def test_weights_that_are_not_the_config_s_are_not_written(tmp_path: Path) -> None:
    config = config_of("llama")
    weights = weights_of(config)
    del weights["norm.weight"]
    with pytest.raises(DataError, match=r"1 missing: norm\.weight"):
        write_pretrained(tmp_path / "out", config, weights)
    assert not (tmp_path / "out").exists()


# --- tensors ----------------------------------------------------------------------------------------------------------


def test_rows_that_turn_together_lie_side_by_side_in_deepseek_and_those_of_a_head_lie_together(tmp_path: Path) -> None:
    ours = weights_of(config_of("deepseek_v2_dense"))
    theirs = load_file(write_example(tmp_path, "deepseek_v2_dense") / SINGLE)
    P, R, L = 8, 4, 10
    w = {name.split(".")[-2]: array for name, array in ours.items() if name.startswith("layers.1.self_attn.")}
    t = {name.split(".")[-2]: array for name, array in theirs.items() if name.startswith("model.layers.1.self_attn.")}
    order = [0, 2, 1, 3]  # pair 0 is rows 0 and R/2 of ours, pair 1 rows 1 and R/2 + 1
    for head in range(2):
        q, kv = t["q_b_proj"][head * (P + R) :][: P + R], t["kv_b_proj"][head * 2 * P :][: 2 * P]
        assert np.array_equal(q[:P], w["w_uq"][head * P :][:P]) and np.array_equal(q[P:], w["w_qr"][head * R :][:R][order])
        assert np.array_equal(kv[:P], w["w_uk"][head * P :][:P]) and np.array_equal(kv[P:], w["w_uv"][head * P :][:P])
    assert np.array_equal(t["kv_a_proj_with_mqa"][:L], w["w_dkv"])
    assert np.array_equal(t["kv_a_proj_with_mqa"][L:], w["w_kr"][order])
    same = {"q_a_proj": "w_dq", "q_a_layernorm": "q_norm", "kv_a_layernorm": "kv_norm", "o_proj": "o_proj"}
    assert all(np.array_equal(t[name], w[own]) for name, own in same.items())


def test_the_experts_of_mixtral_have_numbers_for_names(tmp_path: Path) -> None:
    ours, theirs = weights_of(config_of("mixtral")), load_file(write_example(tmp_path, "mixtral") / SINGLE)
    for number, name in ((1, "gate_proj"), (2, "down_proj"), (3, "up_proj")):
        found = theirs[f"model.layers.1.block_sparse_moe.experts.2.w{number}.weight"]
        assert np.array_equal(found, ours[f"layers.1.moe.experts.2.{name}.weight"])
    assert np.array_equal(theirs["model.layers.0.block_sparse_moe.gate.weight"], ours["layers.0.moe.router.gate.weight"])


def test_every_tensor_that_is_missing_left_over_or_of_another_shape_is_named(tmp_path: Path) -> None:
    write_example(tmp_path, "llama")

    def change(tensors: dict[str, Any]) -> None:
        del tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.layers.0.self_attn.q_norm.weight"] = np.ones(4, np.float32)
        tensors["model.norm.weight"] = np.ones(7, np.float32)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)  # a buffer of old files

    edit_tensors(tmp_path, change)
    with pytest.raises(DataError) as caught:
        read_pretrained(tmp_path)
    wrong = ("1 missing: model.layers.1.mlp.up_proj.weight", "1 left over: model.layers.0.self_attn.q_norm.weight")
    assert all(words in str(caught.value) for words in (*wrong, "model.norm.weight [7], not [16]", str(tmp_path)))
    assert "inv_freq" not in str(caught.value)


def test_an_output_matrix_that_is_tied_may_be_in_the_file_if_it_is_the_embedding(tmp_path: Path) -> None:
    write_example(tmp_path, "llama_tied")
    alone = read_pretrained(tmp_path).weights
    edit_tensors(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"]}))
    assert read_pretrained(tmp_path).weights.keys() == alone.keys()
    edit_tensors(tmp_path, lambda t: t.update({"lm_head.weight": t["lm_head.weight"] + 1}))
    with pytest.raises(DataError, match=r"tie_word_embeddings is true, but lm_head\.weight is not"):
        read_pretrained(tmp_path)


def test_the_vocabulary_is_that_of_the_embedding(tmp_path: Path) -> None:
    write_example(tmp_path, "llama")
    edit_config(tmp_path, {"vocab_size": 250})
    read = read_pretrained(tmp_path)
    assert read.config.vocab_size == 260 and "the embedding has 260 rows" in read.notes[0]


def test_weights_of_several_dtypes_become_one_that_holds_them_all(tmp_path: Path) -> None:
    write_example(tmp_path, "mamba", dtype="f16")
    assert read_pretrained(tmp_path).config.dtype == "f16"
    edit_tensors(tmp_path, lambda t: t.update({"backbone.norm_f.weight": t["backbone.norm_f.weight"].astype(np.float32)}))
    read = read_pretrained(tmp_path)
    assert read.config.dtype == "f32" and "float16, float32" in read.notes[0]
    assert read.weights["norm.weight"].dtype == np.float32 and read.weights["embed_tokens.weight"].dtype == np.float16


def test_experts_that_are_stacked_are_read_as_those_that_are_not(tmp_path: Path) -> None:
    write_example(tmp_path, "mixtral")
    apart = read_pretrained(tmp_path).weights

    def stack(t: dict[str, Any]) -> None:
        for i in range(2):
            sparse, dense = f"model.layers.{i}.block_sparse_moe", f"model.layers.{i}.mlp"
            w1, w2, w3 = (np.stack([t.pop(f"{sparse}.experts.{e}.w{n}.weight") for e in range(3)]) for n in (1, 2, 3))
            t[f"{dense}.experts.gate_up_proj"], t[f"{dense}.experts.down_proj"] = np.concatenate((w1, w3), axis=1), w2
            t[f"{dense}.gate.weight"] = t.pop(f"{sparse}.gate.weight")

    edit_tensors(tmp_path, stack)
    stacked = read_pretrained(tmp_path).weights
    assert stacked.keys() == apart.keys() and all(np.array_equal(stacked[name], apart[name]) for name in apart)
