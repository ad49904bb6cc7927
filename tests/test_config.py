"""The config: what loads, what is refused and with which line, and which part of it determines the bits."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from oxidizr_ref.config import (
    OPERATIONAL_KEYS,
    Config,
    ModelConfig,
    bundled_config_names,
    bundled_config_path,
    canonical_json,
    config_differences,
    load_config,
)
from oxidizr_ref.errors import ConfigError

MODEL = {"hidden_size": 64, "num_layers": 4, "num_heads": 4, "vocab_size": 260, "max_seq_len": 32}
TRAINER = {"learning_rate": 0.001, "batch_size": 4}
MAMBA2 = {"mamba_layers": [0, 1], "mamba2_num_heads": 8, "mamba2_head_dim": 16}
MLA = {"kv_latent_dim": 32, "q_latent_dim": 32, "d_rope": 8}

# oxidizr's flagship, every documented key in it, the unused ones as explicit nulls.
NANO = """\
# Nano: Mamba2 + MLA + MoE
model:
  name: nano
  hidden_size: 384
  num_layers: 8
  num_heads: 6
  kv_heads: null
  kv_latent_dim: 192
  q_latent_dim: 192
  d_rope: 16
  num_experts: 4
  experts_per_tok: 2
  shared_expert_enabled: true
  intermediate_size: 1536
  mamba_layers: [0, 1, 2, 4, 5, 6]
  mamba_d_state: null
  mamba_d_conv: ~
  mamba_expand:
  mamba2_num_heads: 48
  mamba2_head_dim: 16
  mamba2_state_size: 64
  mamba2_chunk_size: 64
  mamba2_n_groups: 1
  mamba2_conv_kernel: 4
  mamba2_expand: 2
  mamba3_enabled: null
  mamba3_complex_rope: null
  mamba3_mimo_rank: null
  mamba3_use_conv: null
  vocab_size: 128354
  max_seq_len: 512
  rope_theta: 10000.0
  dtype: f32

trainer:
  target_device: gpu
  learning_rate: 3e-4
  max_steps: 0
  num_epochs: 2
  batch_size: 4
  gradient_accumulation: 2
  checkpoint_dir: "./checkpoints/nano"
  log_interval: 10
  save_interval: 100
  max_checkpoints: null
  load_balance_alpha: 0.01
  group_size: 4
  beta_kl: 0.04
"""

# The example of a pure Mamba model in oxidizr's guide: without num_heads, and with three keys of trainer.
PURE_MAMBA = """\
model:
  hidden_size: 384
  num_layers: 8
  vocab_size: 128354
  max_seq_len: 1024
  mamba2_num_heads: 48
  mamba2_head_dim: 16
  mamba2_state_size: 64
  mamba2_chunk_size: 64
  mamba2_n_groups: 1
  mamba2_conv_kernel: 4
  mamba2_expand: 2
  mamba_layers: [0, 1, 2, 3, 4, 5, 6, 7]
trainer:
  learning_rate: 0.002
  batch_size: 2
  max_steps: 5000
"""


def text_of(model: dict[str, Any] | None = None, trainer: dict[str, Any] | None = None, **sections: Any) -> str:
    """A valid config as YAML, one key a line, with the given keys set (None: left out)."""
    lines = []
    for name, section in {"model": MODEL | (model or {}), "trainer": TRAINER | (trainer or {}), **sections}.items():
        if isinstance(section, dict):
            lines += [f"{name}:", *(f"  {key}: {as_yaml(value)}" for key, value in section.items() if value is not None)]
        else:
            lines.append(f"{name}: {section}")
    return "\n".join(lines) + "\n"


def as_yaml(value: object) -> str:
    return {"NaN": ".nan", "Infinity": ".inf", "-Infinity": "-.inf"}.get(json.dumps(value), json.dumps(value))


def loaded(tmp_path: Path, text: str, *overrides: str) -> Config:
    path = tmp_path / "tiny.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(path, overrides)


def complaint(tmp_path: Path, text: str | bytes, *overrides: str) -> str:
    """The message of the ConfigError, the directory cut off."""
    path = tmp_path / "tiny.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value).replace(str(path), "tiny.yaml")


def line_of(text: str, key: str) -> int:
    return next(i for i, line in enumerate(text.splitlines(), 1) if line.strip().startswith(f"{key}:"))


# ---- what loads --------------------------------------------------------------------------------------------------


def test_oxidizrs_nano_loads_unmodified(tmp_path: Path) -> None:
    config = loaded(tmp_path, NANO)
    assert config.model.name == "nano"
    assert config.model.layer_kinds == ("mamba2",) * 3 + ("attention",) + ("mamba2",) * 3 + ("attention",)
    assert config.model.uses_mla
    assert config.model.uses_moe
    assert config.model.kv_heads == 6
    assert config.model.mamba_d_state == 16
    assert config.trainer.learning_rate == 3e-4
    assert config.trainer.max_checkpoints == 10


def test_a_pure_mamba_model_needs_no_attention_heads(tmp_path: Path) -> None:
    assert loaded(tmp_path, PURE_MAMBA).model.layer_kinds == ("mamba2",) * 8
    assert "model.num_heads: missing" in complaint(tmp_path, PURE_MAMBA.replace(", 7]", "]"))


def test_the_short_example_loads_with_documented_defaults(tmp_path: Path) -> None:
    config = loaded(tmp_path, text_of())
    model, trainer, data = config.model, config.trainer, config.data
    assert (model.name, model.kv_heads, model.intermediate_size, model.head_dim) == ("tiny", 4, 256, 16)
    assert (model.rope_theta, model.rms_norm_eps, model.tie_word_embeddings, model.dtype) == (10000.0, 1e-5, False, "f32")
    assert (model.mamba_d_state, model.mamba_d_conv, model.mamba_expand) == (16, 4, 2)
    assert (model.mamba3_complex_rope, model.mamba3_mimo_rank, model.mamba3_rope_fraction) == (True, 0, 0.5)
    assert model.layer_kinds == ("attention",) * 4
    assert not model.uses_mla
    assert not model.uses_moe
    assert (trainer.log_interval, trainer.save_interval, trainer.max_checkpoints) == (10, 500, 10)
    assert (trainer.max_steps, trainer.num_epochs, trainer.gradient_accumulation) == (0, 1, 1)
    assert (trainer.checkpoint_dir, trainer.target_device, trainer.load_balance_alpha) == ("./checkpoints", "gpu", 0.0)
    assert (trainer.seed, trainer.weight_decay, trainer.betas, trainer.eps) == (0, 0.01, (0.9, 0.999), 1e-8)
    assert (trainer.max_grad_norm, trainer.lr_schedule, trainer.warmup_steps) == (1.0, "constant", 0)
    assert (trainer.min_lr_ratio, trainer.shuffle, trainer.eval_interval, trainer.eval_fraction) == (0.0, True, 0, 0.0)
    assert (data.path, data.tokenizer) == ((), "byte")


@pytest.mark.parametrize(
    ("extra", "kind"),
    [
        ({"mamba_layers": [1]}, "mamba1"),
        (MAMBA2 | {"mamba_layers": [1]}, "mamba2"),
        (MAMBA2 | {"mamba_layers": [1], "mamba3_enabled": True}, "mamba3"),
    ],
)
def test_layers_are_chosen_by_oxidizrs_rule(tmp_path: Path, extra: dict[str, Any], kind: str) -> None:
    assert loaded(tmp_path, text_of(extra)).model.layer_kinds == ("attention", kind, "attention", "attention")


def test_keys_that_no_layer_uses_are_accepted(tmp_path: Path) -> None:
    unused = {"mamba2_num_heads": 7, "mamba2_head_dim": 3, "mamba2_n_groups": 5, "mamba2_state_size": 3}
    assert loaded(tmp_path, text_of({**unused, "experts_per_tok": 9})).model.layer_kinds == ("attention",) * 4
    assert loaded(tmp_path, text_of({**MLA, "kv_heads": 3, "num_heads": 4})).model.uses_mla
    assert not loaded(tmp_path, text_of({"kv_latent_dim": 0, "num_experts": 0})).model.uses_moe


def test_mamba2_head_dim_follows_from_the_other_keys(tmp_path: Path) -> None:
    assert loaded(tmp_path, text_of({"mamba_layers": [0], "mamba2_num_heads": 8})).model.mamba2_head_dim == 16


@pytest.mark.parametrize("written", ["3e-4", "3E-4", "0.0003", "+.0003", "3.e-4", "30e-5"])
def test_every_spelling_of_a_number_is_a_number(tmp_path: Path, written: str) -> None:
    text = text_of().replace("0.001", written)
    assert loaded(tmp_path, text).trainer.learning_rate == pytest.approx(3e-4, abs=0)


@pytest.mark.parametrize(("written", "value"), [("2E5", 2e5), ("1e3", 1000.0), ("500000", 5e5)])
def test_integers_and_exponents_are_accepted_for_floats(tmp_path: Path, written: str, value: float) -> None:
    rope_theta = loaded(tmp_path, text_of(), f"rope_theta={written}").model.rope_theta
    assert (rope_theta, type(rope_theta)) == (value, float)


def test_scalars_follow_yaml_1_2(tmp_path: Path) -> None:
    config = loaded(tmp_path, text_of({"name": "replaced"}).replace('"replaced"', "no"), "batch_size=010")
    assert (config.model.name, config.trainer.batch_size) == ("no", 10)


@pytest.mark.parametrize(
    ("alias", "dtype"),
    [
        ("fp32", "f32"),
        ("float32", "f32"),
        ("fp16", "f16"),
        ("float16", "f16"),
        ("bfloat16", "bf16"),
        ("BF16", "bf16"),
        ("fp64", "f64"),
        ("float64", "f64"),
    ],
)
def test_dtype_aliases_are_one_dtype_and_one_digest(tmp_path: Path, alias: str, dtype: str) -> None:
    config = loaded(tmp_path, text_of({"dtype": alias}))
    assert config.model.dtype == dtype
    assert config.digest() == loaded(tmp_path, text_of({"dtype": dtype})).digest()


def test_the_bundled_models_load_and_their_file_name_is_their_name() -> None:
    assert set(bundled_config_names()) >= {"baseline", "llama-start", "nano-start", "shakespeare-char"}
    for name in bundled_config_names():
        assert load_config(name).model.name == name


@pytest.mark.parametrize("spelling", ["nano-start", "nano-start.yaml", "models/nano-start.yaml"])
def test_a_bundled_model_is_found_from_an_empty_directory(
    spelling: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_config(spelling).source == bundled_config_path("nano-start")
    (tmp_path / "nano-start").mkdir()  # a run's directory of the same name does not hide it
    assert load_config(spelling).model.hidden_size == 128


def test_a_file_that_exists_wins_over_a_bundled_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "nano-start.yaml").write_text(text_of(), encoding="utf-8")
    assert load_config("models/nano-start.yaml").model.hidden_size == 64
    assert load_config("nano-start").model.hidden_size == 128


def test_an_installed_package_brings_its_own_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside, beside = tmp_path / "package" / "models", tmp_path / "models"
    for directory in (beside, inside):
        directory.mkdir(parents=True)
        (directory / f"{directory.parent.name}.yaml").write_text(text_of(), encoding="utf-8")
    monkeypatch.setattr("oxidizr_ref.config.__file__", str(tmp_path / "package" / "config.py"))
    assert bundled_config_names() == ["package"]


def test_no_other_spelling_is_bundled() -> None:
    for name in ("", ".", "..", "nope", "/models/nano-start.yaml", "../models/nano-start.yaml", "nano-start.json"):
        assert bundled_config_path(name) is None


# ---- data paths --------------------------------------------------------------------------------------------------


def test_data_paths_start_at_the_config_file(tmp_path: Path) -> None:
    assert loaded(tmp_path, text_of(data={"path": "a.txt"})).data_paths() == [tmp_path / "a.txt"]
    assert loaded(tmp_path, text_of(data={"path": ["a.txt", "/b.bin"]})).data_paths() == [tmp_path / "a.txt", Path("/b.bin")]
    assert loaded(tmp_path, text_of()).data_paths() == []


def test_an_overridden_data_path_starts_at_the_current_directory(tmp_path: Path) -> None:
    config = loaded(tmp_path, text_of(data={"path": "a.txt"}), "data.path=b.txt")
    assert config.data_paths() == [Path("b.txt")]


def test_random_means_random_tokens_and_no_path(tmp_path: Path) -> None:
    config = loaded(tmp_path, text_of(data={"path": "random"}))
    assert config.data.is_random
    assert config.data_paths() == []


# ---- overrides ---------------------------------------------------------------------------------------------------


def test_overrides_win_over_the_file_dotted_or_bare(tmp_path: Path) -> None:
    overrides = ("trainer.learning_rate=1e-3", "batch_size=7", "betas=[0.8, 0.9]", "data.tokenizer=char", "seed=1", "seed=2")
    config = loaded(tmp_path, text_of({"kv_heads": 2}), *overrides, "kv_heads=", "model.rope_theta=null")
    assert (config.trainer.learning_rate, config.trainer.batch_size, config.trainer.betas) == (1e-3, 7, (0.8, 0.9))
    assert (config.data.tokenizer, config.trainer.seed, config.model.kv_heads) == ("char", 2, 4)


def test_an_override_mends_what_is_wrong_in_the_file(tmp_path: Path) -> None:
    text = text_of({"mamba_layers": ["x"]}) + "  seed: 1\n  seed: 2\n"
    assert loaded(tmp_path, text, "mamba_layers=[1]", "seed=3").trainer.seed == 3


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("learning_rate", "--set learning_rate: expected KEY=VALUE, such as trainer.learning_rate=1e-3"),
        ("hidden_sise=8", "--set hidden_sise=8: hidden_sise: unknown key; did you mean `model.hidden_size`?"),
        ("model.sede=8", "--set model.sede=8: model.sede: unknown key; did you mean `trainer.seed`?"),
        ("optim.lr=8", "--set optim.lr=8: optim: unknown section; there are model, trainer, data"),
        ("seed=x", '--set seed=x: trainer.seed: expected an integer, found text "x"'),
        ("seed=[", "--set seed=[: not valid YAML: expected the node content, but found '<stream end>'"),
        ("betas=[0.9, 1.0]", "--set betas=[0.9, 1.0]: trainer.betas[1]: expected a value < 1.0, found 1.0"),
        ("num_heads=3", "--set num_heads=3: model.num_heads: hidden_size 64 is not divisible by num_heads 3"),
        ("seed=1\n2", '--set seed=1\\n2: trainer.seed: expected an integer, found text "1 2"'),
    ],
)
def test_a_wrong_override_is_named(tmp_path: Path, override: str, message: str) -> None:
    assert complaint(tmp_path, text_of(), override) == message


# ---- wrong keys and values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("model", "hidden_size", 512.0, "expected an integer, found 512.0; write 512"),
        ("model", "hidden_size", 512.5, "expected an integer, found 512.5"),
        ("model", "hidden_size", "512", 'expected an integer, found text "512"; write it without quotes'),
        ("model", "hidden_size", True, "expected an integer, found true"),
        ("model", "hidden_size", [1], "expected an integer, found a list"),
        ("model", "hidden_size", {"a": 1}, "expected an integer, found a mapping of keys"),
        ("model", "hidden_size", 0, "expected a value >= 1, found 0"),
        ("model", "vocab_size", -5, "expected a value >= 1, found -5"),
        ("model", "num_layers", 10**30, f"expected a value <= 10000, found {10**30}"),
        ("model", "name", 350, "expected text, found 350"),
        ("model", "name", "", 'expected text that is not empty, found text ""'),
        ("model", "dtype", "f8", "expected 'f32', 'f16', 'bf16' or 'f64', found text \"f8\""),
        ("model", "tie_word_embeddings", "yes", 'expected true or false, found text "yes"'),
        ("model", "mamba_layers", 3, "expected a list, found 3"),
        ("model", "mamba3_rope_fraction", 0.25, "expected 0.5 or 1, found 0.25"),
        ("model", "rope_theta", 0, "expected a value > 0.0, found 0"),
        ("trainer", "learning_rate", True, "expected a number, found true"),
        ("trainer", "learning_rate", "3e-4", 'expected a number, found text "3e-4"; write it without quotes'),
        ("trainer", "learning_rate", 0, "expected a value > 0.0, found 0"),
        ("trainer", "learning_rate", -1e-3, "expected a value > 0.0, found -0.001"),
        ("trainer", "learning_rate", float("nan"), "expected a finite number, found NaN"),
        ("trainer", "weight_decay", float("inf"), "expected a finite number, found Infinity"),
        ("trainer", "weight_decay", float("-inf"), "expected a finite number, found -Infinity"),
        ("trainer", "batch_size", 0, "expected a value >= 1, found 0"),
        ("trainer", "save_interval", 0, "expected a value >= 1, found 0"),
        ("trainer", "seed", 2**64, f"expected a value <= {2**64 - 1}, found {2**64}"),
        ("trainer", "eval_fraction", 1.0, "expected a value < 1.0, found 1.0"),
        ("trainer", "eval_fraction", -0.1, "expected a value >= 0.0, found -0.1"),
        ("trainer", "min_lr_ratio", 1.5, "expected a value <= 1.0, found 1.5"),
        ("trainer", "betas", [0.9], "expected a list of two numbers, found one of 1"),
        ("trainer", "betas", 0.9, "expected a list, found 0.9"),
        ("trainer", "lr_schedule", "step", "expected 'constant', 'linear', 'cosine' or 'wsd', found text \"step\""),
        ("trainer", "target_device", "tpu", "expected 'gpu' or 'cpu', found text \"tpu\""),
        ("trainer", "checkpoint_dir", "", 'expected text that is not empty, found text ""'),
    ],
)
def test_a_wrong_value_is_one_line_with_its_place(
    tmp_path: Path, section: str, key: str, value: object, message: str
) -> None:
    text = text_of(**{section: {key: value}})
    assert complaint(tmp_path, text) == f"tiny.yaml:{line_of(text, key)}: {section}.{key}: {message}"


def test_a_wrong_list_entry_is_named_with_its_own_line(tmp_path: Path) -> None:
    text = "data:\n  path:\n    - a.txt\n    - 3\n" + text_of()
    assert complaint(tmp_path, text) == "tiny.yaml:4: data.path[1]: expected text, found 3"


@pytest.mark.parametrize(("path", "message"), [(["random", "a"], "`random` cannot be mixed with files"), ([], None)])
def test_data_path_refuses_what_cannot_be_meant(tmp_path: Path, path: list[str], message: str | None) -> None:
    text = text_of(data={"path": path})
    if message is None:
        assert loaded(tmp_path, text).data_paths() == []
    else:
        assert complaint(tmp_path, text).endswith(f": data.path: {message}")


def test_numbers_beyond_all_bounds_are_refused(tmp_path: Path) -> None:
    assert "expected a finite number, found Infinity" in complaint(tmp_path, text_of(), "learning_rate=1e999")
    assert "expected a value <= 10000" in complaint(tmp_path, text_of(), "num_layers=" + "9" * 40)
    assert "expected an integer, found Infinity" in complaint(tmp_path, text_of(), "num_layers=" + "9" * 9999)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("  hidden_sise: 64", "model.hidden_sise: unknown key; did you mean `hidden_size`?"),
        ("  batch_size: 64", "model.batch_size: unknown key; `batch_size` belongs under `trainer:`"),
        ("  batch_sise: 64", "model.batch_sise: unknown key; did you mean `trainer.batch_size`?"),
        ("  zzz: 64", "model.zzz: unknown key"),
        ('  "a\\nb": 64', "model.a\\nb: unknown key"),
        ("  <<: {num_heads: 3}", "model.<<: unknown key"),
        ("modell: 64", "modell: unknown key; did you mean `model`?"),
        ("learning_rate: 64", "learning_rate: unknown key; `learning_rate` belongs under `trainer:`"),
        ("zzz: 64", "zzz: unknown key; the sections are model, trainer, data"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_valid_one(tmp_path: Path, key: str, message: str) -> None:
    text = text_of().replace("trainer:", f"{key}\ntrainer:")
    line = text.splitlines().index(key) + 1
    assert complaint(tmp_path, text) == f"tiny.yaml:{line}: {message}"


@pytest.mark.parametrize("key", [*MODEL, *TRAINER])
def test_a_missing_key_is_named(tmp_path: Path, key: str) -> None:
    section = "model" if key in MODEL else "trainer"
    text = text_of(**{section: {key: None}})
    assert complaint(tmp_path, text) == f"tiny.yaml:{line_of(text, section)}: {section}.{key}: missing; it is required"


def test_a_missing_or_null_section_is_named(tmp_path: Path) -> None:
    assert complaint(tmp_path, "# only this\nmodel:\n") == (
        "tiny.yaml:1: trainer: missing section\ntiny.yaml:2: model: missing section"
    )
    assert complaint(tmp_path, text_of(data=3)).endswith(": data: expected a mapping of keys, found 3")


# ---- constraints -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "key", "message"),
    [
        ({"num_heads": 3}, "num_heads", "hidden_size 64 is not divisible by num_heads 3"),
        ({"kv_heads": 3}, "kv_heads", "num_heads 4 is not divisible by kv_heads 3"),
        (
            {"hidden_size": 60},
            "num_heads",
            "hidden_size / num_heads = 15 is odd; RoPE rotates pairs, so it must be even",
        ),
        (MLA | {"d_rope": 7}, "d_rope", "RoPE rotates pairs, so it must be even; found 7"),
        (
            {"q_latent_dim": 32},
            "q_latent_dim",
            "MLA needs kv_latent_dim and d_rope together; missing: kv_latent_dim, d_rope",
        ),
        ({"num_experts": 1}, "experts_per_tok", "expected at most num_experts = 1, found 2"),
        ({"num_experts": 2, "experts_per_tok": 3}, "experts_per_tok", "expected at most num_experts = 2, found 3"),
        ({"mamba_layers": [0, 4]}, "mamba_layers", "expected layers 0 to 3 (num_layers is 4), found 4"),
        ({"mamba_layers": [1, 0, 1]}, "mamba_layers", "layer 1 is listed twice"),
        (
            MAMBA2 | {"mamba2_head_dim": 8},
            "mamba2_num_heads",
            "hidden_size * mamba2_expand = 64 * 2 = 128 must equal mamba2_num_heads * mamba2_head_dim = 8 * 8 = 64",
        ),
        (MAMBA2 | {"mamba2_n_groups": 3}, "mamba2_n_groups", "mamba2_num_heads 8 is not divisible by mamba2_n_groups 3"),
        (
            MAMBA2 | {"mamba3_enabled": True, "mamba2_state_size": 6},
            "mamba2_state_size",
            "mamba2_state_size * mamba3_rope_fraction = 3 states are rotated in pairs: it must be even",
        ),
        (
            MAMBA2 | {"mamba3_enabled": True, "mamba2_state_size": 5, "mamba3_rope_fraction": 1},
            "mamba2_state_size",
            "mamba2_state_size * mamba3_rope_fraction = 5 states are rotated in pairs: it must be even",
        ),
        (
            {"mamba_layers": [0], "mamba3_enabled": True},
            "mamba3_enabled",
            "Mamba3 needs mamba2_num_heads; it is absent",
        ),
    ],
)
def test_a_broken_constraint_is_one_line_at_its_key(tmp_path: Path, model: dict[str, Any], key: str, message: str) -> None:
    text = text_of(model)
    line = line_of(text, key if f"{key}:" in text else "model")
    assert complaint(tmp_path, text) == f"tiny.yaml:{line}: model.{key}: {message}"


def test_rotation_off_lifts_its_constraint(tmp_path: Path) -> None:
    model = MAMBA2 | {"mamba3_enabled": True, "mamba2_state_size": 5, "mamba3_complex_rope": False}
    assert loaded(tmp_path, text_of(model)).model.layer_kinds[0] == "mamba3"


def test_constraints_hold_for_models_made_in_python_too() -> None:
    with pytest.raises(ValidationError, match="not divisible by num_heads"):
        ModelConfig(**{**MODEL, "num_heads": 3})
    with pytest.raises(ValidationError, match="frozen"):
        ModelConfig(**MODEL).hidden_size = 3  # type: ignore[misc]


def test_everything_wrong_with_a_file_is_said_at_once_in_order_of_lines(tmp_path: Path) -> None:
    text = (
        "model:\n  hidden_size: 64\n  num_heads: 3\n  num_layers: 4\n  vocab_size: '260'\n  max_seq_len: 32\n"
        "  mamba_layers: [9]\n  num_layers: 5\n  hiden_size: 1\n"
        "trainer:\n  learning_rate: -1\n  batch_size: 4.0\ndata:\n  tokeniser: byte\n"
    )
    assert complaint(tmp_path, text, "eval_fraction=2").splitlines() == [
        "tiny.yaml:3: model.num_heads: hidden_size 64 is not divisible by num_heads 3",
        "tiny.yaml:4: model.num_layers: given twice, on lines 4 and 8; keep one",
        'tiny.yaml:5: model.vocab_size: expected an integer, found text "260"; write it without quotes',
        "tiny.yaml:7: model.mamba_layers: expected layers 0 to 3 (num_layers is 4), found 9",
        "tiny.yaml:9: model.hiden_size: unknown key; did you mean `hidden_size`?",
        "tiny.yaml:11: trainer.learning_rate: expected a value > 0.0, found -1",
        "tiny.yaml:12: trainer.batch_size: expected an integer, found 4.0; write 4",
        "tiny.yaml:14: data.tokeniser: unknown key; did you mean `tokenizer`?",
        "--set eval_fraction=2: trainer.eval_fraction: expected a value < 1.0, found 2",
    ]


def test_a_constraint_on_an_invalid_key_is_not_reported(tmp_path: Path) -> None:
    text = text_of({"num_heads": "3", "kv_heads": 3, "hidden_size": 63, "num_experts": 1})
    keys = [line.split(": ")[1] for line in complaint(tmp_path, text).splitlines()]
    assert sorted(keys) == ["model.experts_per_tok", "model.num_heads"]


# ---- YAML itself -------------------------------------------------------------------------------------------------

BOMB = "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "tiny.yaml: empty; a config has the sections `model:` and `trainer:`"),
        ("# a comment\n\n", "tiny.yaml: empty; a config has the sections `model:` and `trainer:`"),
        ("- 1\n", "tiny.yaml:1: expected the sections `model:` and `trainer:`, found a list"),
        ("hello\n", 'tiny.yaml:1: expected the sections `model:` and `trainer:`, found text "hello"'),
        (BOMB, "tiny.yaml:1: anchors (&) and aliases (*) are not used in configs; write the value out"),
        ("a: 1\nb: *a\n", "tiny.yaml:2: anchors (&) and aliases (*) are not used in configs; write the value out"),
        (
            "a: !!python/name:os.system\n",
            "tiny.yaml:1: tags are not used in configs; remove tag:yaml.org,2002:python/name:os.system",
        ),
        ("\na: !x 1\n", "tiny.yaml:2: tags are not used in configs; remove !x"),
        ("model:\n\thidden_size: 3\n", "tiny.yaml:2: not valid YAML: found character '\\t' that cannot start any token"),
        ("model: [1,\n", "tiny.yaml:2: not valid YAML: expected the node content, but found '<stream end>'"),
        ("a: b: c\n", "tiny.yaml:1: not valid YAML: mapping values are not allowed here"),
        ("model: {}\n---\nmodel: {}\n", "tiny.yaml:2: not valid YAML: but found another document"),
        ("[" * 100_000, "tiny.yaml:1: nested more than 16 levels deep"),
        ("\n" + "{a: " * 40 + "1" + "}" * 40, "tiny.yaml:2: nested more than 16 levels deep"),
        ("a: [" + "1," * 25_000 + "]", "tiny.yaml:1: more than 20000 values; this is no config file"),
        ("#" * (1 << 20) + "\n", "tiny.yaml: larger than 1 MiB, so no config file; is it a data file or a checkpoint?"),
        (b"model:\n  name: \xff\xfe\n", "tiny.yaml:2: not UTF-8 text (byte 0xff); expected a YAML config file"),
        (b"model:\n  \x00\x01\n", "tiny.yaml:2: not a text file (character 0 is not allowed in YAML)"),
    ],
    ids=lambda value: repr(value[:24]),
)
def test_what_is_no_config_is_refused_in_one_line(tmp_path: Path, text: str | bytes, message: str) -> None:
    assert complaint(tmp_path, text) == message


def test_a_key_given_twice_is_named_with_both_lines(tmp_path: Path) -> None:
    text = text_of() + "trainer: {}\n"
    first = line_of(text, "trainer")
    last = len(text.splitlines())
    assert complaint(tmp_path, text) == f"tiny.yaml:{first}: trainer: given twice, on lines {first} and {last}; keep one"


def test_a_key_that_is_no_word_is_refused(tmp_path: Path) -> None:
    assert complaint(tmp_path, "? [a, b]\n: 1\n" + text_of()) == "tiny.yaml:1: ?: a key must be a plain word"


def test_a_byte_order_mark_and_windows_line_ends_are_harmless(tmp_path: Path) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + NANO.replace("\n", "\r\n").encode())
    assert load_config(path).model.vocab_size == 128354


def test_a_missing_file_is_told_the_bundled_models_and_the_nearest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # long paths are shortened
    with pytest.raises(ConfigError) as caught:
        load_config("models/nano-strat.yaml")
    names = ", ".join(bundled_config_names())
    assert str(caught.value) == (f"models/nano-strat.yaml: no such file; did you mean `nano-start`? bundled models: {names}")
    with pytest.raises(ConfigError, match=r"zzz\.yaml: no such file; bundled models: "):
        load_config("zzz.yaml")


def test_a_directory_is_no_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path)
    assert str(caught.value) == f"{tmp_path}: is a directory; expected a YAML config file"


def test_a_file_that_cannot_be_read_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object, **_kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")  # root, who runs the tests in containers, may read everything

    path = tmp_path / "tiny.yaml"
    path.write_text(text_of(), encoding="utf-8")
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(caught.value) == f"{path}: cannot be read (Permission denied)"


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=60), st.booleans())
def test_no_text_whatever_raises_anything_but_config_error(text: str, as_override: bool) -> None:
    from oxidizr_ref.config_yaml import read_yaml

    try:
        if as_override:
            load_config("nano-start", [f"model.name={text}"])
        else:
            read_yaml(text, "x")
    except ConfigError as error:
        assert str(error).isprintable()


# ---- canonical form ----------------------------------------------------------------------------------------------


@st.composite
def configs(draw: st.DrawFn) -> Config:
    heads = draw(st.sampled_from([1, 2, 4]))
    layers = draw(st.integers(1, 6))
    model: dict[str, Any] = {
        "name": draw(st.sampled_from(["a", "b"])),
        "hidden_size": heads * 2 * draw(st.integers(1, 9)),
        "num_layers": layers,
        "num_heads": heads,
        "vocab_size": draw(st.integers(1, 2**31 - 1)),
        "max_seq_len": draw(st.integers(1, 4096)),
        "mamba_layers": draw(st.lists(st.integers(0, layers - 1), unique=True)),
        "dtype": draw(st.sampled_from(["f32", "fp16", "bfloat16", "f64"])),
        "rope_theta": draw(st.floats(1.0, 1e7)),
    }
    if draw(st.booleans()):
        model |= MLA
    if draw(st.booleans()):
        model |= {"mamba2_num_heads": 2 * heads, "mamba3_enabled": draw(st.booleans())}
    if draw(st.booleans()):
        model |= {"num_experts": draw(st.integers(2, 8)), "shared_expert_enabled": draw(st.booleans())}
    trainer = {
        "learning_rate": draw(st.floats(1e-9, 1.0)),
        "batch_size": draw(st.integers(1, 64)),
        "max_steps": draw(st.integers(0, 100)),
        "num_epochs": draw(st.integers(1, 100)),
        "lr_schedule": draw(st.sampled_from(["constant", "linear", "cosine", "wsd"])),
        "betas": (draw(st.floats(0, 0.99)), draw(st.floats(0, 0.99))),
        "seed": draw(st.integers(0, 2**64 - 1)),
        "save_interval": draw(st.integers(1, 100)),
        "eval_fraction": draw(st.floats(0, 0.5)),
    }
    data = {"tokenizer": draw(st.sampled_from(["byte", "char"])), "path": draw(st.sampled_from([(), ("a", "b")]))}
    return Config.model_validate({"model": model, "trainer": trainer, "data": data})


@settings(max_examples=60, deadline=None)
@given(configs(), st.sampled_from(["cpu", "gpu"]))
def test_the_canonical_form_survives_json_and_makes_the_same_config_again(config: Config, device: str) -> None:
    stored = json.loads(canonical_json(config.canonical(device)))
    again = Config.from_canonical(stored)
    assert again.canonical(device) == config.canonical(device) == stored
    assert again.digest(device) == config.digest(device)
    assert again.trainer.target_device == device


@settings(max_examples=30, deadline=None)
@given(configs(), st.randoms(use_true_random=False))
def test_canonical_json_does_not_depend_on_the_order_of_keys(config: Config, rng: random.Random) -> None:
    def shuffled(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        keys = list(value)
        rng.shuffle(keys)
        return {key: shuffled(value[key]) for key in keys}

    canonical = config.canonical()
    assert canonical_json(shuffled(canonical)) == canonical_json(canonical)


def test_canonical_json_is_ascii_without_spaces_and_refuses_nan() -> None:
    assert canonical_json({"b": [1, 2.5], "a": "é"}) == '{"a":"\\u00e9","b":[1,2.5]}'
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json({"a": float("nan")})


@pytest.mark.parametrize(
    "override",
    [
        "checkpoint_dir=/elsewhere",
        "log_interval=1",
        "save_interval=7",
        "max_checkpoints=0",
        "eval_interval=3",
        "group_size=9",
        "beta_kl=0.5",
        "target_device=cpu",
        "max_steps=60",
        "num_epochs=9",
        "data.path=x.txt",
        "name=b",
    ],
)
def test_operational_keys_do_not_change_the_digest(tmp_path: Path, override: str) -> None:
    text = text_of(trainer={"warmup_steps": 5})
    assert loaded(tmp_path, text, override).digest() == loaded(tmp_path, text).digest()


@pytest.mark.parametrize(
    "override",
    [
        "learning_rate=2e-3",
        "batch_size=5",
        "gradient_accumulation=2",
        "seed=1",
        "weight_decay=0",
        "betas=[0.9, 0.95]",
        "eps=1e-6",
        "max_grad_norm=0",
        "lr_schedule=cosine",
        "warmup_steps=1",
        "min_lr_ratio=0.1",
        "shuffle=false",
        "eval_fraction=0.1",
        "load_balance_alpha=0.1",
        "tokenizer=char",
        "dtype=f64",
        "rms_norm_eps=1e-6",
        "tie_word_embeddings=true",
        "rope_theta=5e5",
        "num_layers=3",
        "kv_heads=2",
        "mamba_layers=[0]",
    ],
)
def test_keys_that_determine_the_bits_change_the_digest(tmp_path: Path, override: str) -> None:
    assert loaded(tmp_path, text_of(), override).digest() != loaded(tmp_path, text_of()).digest()


def test_the_device_is_part_of_the_canonical_form(tmp_path: Path) -> None:
    config = loaded(tmp_path, text_of())
    assert config.canonical("gpu")["device"] == "gpu"
    assert config.digest("gpu") != config.digest("cpu") == config.digest()


def test_the_length_of_the_run_counts_only_where_the_schedule_depends_on_it(tmp_path: Path) -> None:
    text = text_of(trainer={"lr_schedule": "linear"})
    by_epochs, by_steps = loaded(tmp_path, text, "num_epochs=3"), loaded(tmp_path, text, "max_steps=9")
    assert by_epochs.canonical()["trainer"]["num_epochs"] == 3
    assert by_steps.canonical()["trainer"]["max_steps"] == 9
    assert by_steps.digest() == loaded(tmp_path, text, "max_steps=9", "num_epochs=3").digest()
    assert "max_steps" not in loaded(tmp_path, text_of()).canonical()["trainer"]


def test_the_canonical_form_holds_every_other_key_and_no_path(tmp_path: Path) -> None:
    config = loaded(tmp_path, text_of(trainer={"lr_schedule": "cosine"}, data={"path": "secret.txt"}))
    canonical = config.canonical()
    assert set(canonical["model"]) == set(ModelConfig.model_fields) - {"name", "mla_q_rope_from", "norm_topk_prob"}
    assert set(canonical["trainer"]) == set(type(config.trainer).model_fields) - OPERATIONAL_KEYS - {"optimizer_dtype"}
    assert canonical["data"] == {"tokenizer": "byte"}
    assert "secret" not in canonical_json(canonical)
    assert str(tmp_path) not in canonical_json(canonical)


def test_moments_in_16_bits_are_part_of_the_canonical_form_and_moments_as_ever_leave_it_as_it_was(tmp_path: Path) -> None:
    """Files made before the key existed, and their digests, stay what they are."""
    ever, half = (loaded(tmp_path, text_of(trainer={"optimizer_dtype": dtype})) for dtype in ("f32", "bfloat16"))
    assert ever.digest() == loaded(tmp_path, text_of()).digest() != half.digest()
    assert half.canonical()["trainer"]["optimizer_dtype"] == "bf16"
    assert Config.from_canonical(half.canonical()).trainer.optimizer_dtype == "bf16"


def test_equal_configs_spelt_differently_have_one_digest(tmp_path: Path) -> None:
    plain = loaded(tmp_path, text_of({"mamba_layers": [0, 2]}))
    spelt = {"mamba_layers": [2, 0], "kv_heads": 4, "intermediate_size": 256, "rope_theta": 10000, "dtype": "fp32"}
    assert loaded(tmp_path, text_of(spelt, {"seed": 0, "betas": [0.9, 0.999]})).digest() == plain.digest()


def test_a_config_stored_by_an_older_version_gets_defaults_and_by_a_newer_one_an_error(tmp_path: Path) -> None:
    stored = loaded(tmp_path, text_of()).canonical()
    older = copy.deepcopy(stored)
    del older["model"]["rms_norm_eps"], older["data"]
    assert Config.from_canonical(older).canonical() == stored
    newer = copy.deepcopy(stored)
    newer["model"]["flux"] = 1
    with pytest.raises(ConfigError, match=r"^the checkpoint's config: model\.flux: unknown key$"):
        Config.from_canonical(newer)


@pytest.mark.parametrize("stored", [{}, {"device": "cpu"}, {"device": "cpu", "trainer": 3}, {"model": [], "trainer": None}])
def test_a_damaged_stored_config_is_a_config_error(stored: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Config.from_canonical(stored)


def test_differences_are_listed_by_dotted_key(tmp_path: Path) -> None:
    old = loaded(tmp_path, text_of()).canonical()
    new = loaded(tmp_path, text_of(), "learning_rate=2e-3", "kv_heads=2", "lr_schedule=cosine", "max_steps=5").canonical()
    assert config_differences(old, new) == [
        ("model.kv_heads", 4, 2),
        ("trainer.learning_rate", 0.001, 0.002),
        ("trainer.lr_schedule", "constant", "cosine"),
        ("trainer.max_steps", None, 5),
    ]
    assert config_differences(old, old) == []
