"""`oxidizr-ref inspect -f`: what it says of a config is what the model, the estimate and the file then are."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import tiny

from oxidizr_ref import LanguageModel, load_config
from oxidizr_ref.checkpoint import header
from oxidizr_ref.config import bundled_config_names
from oxidizr_ref.layers.attention import TokenCache
from oxidizr_ref.memory import estimate_memory, model_parts

pytestmark = pytest.mark.usefixtures("plain_terminal_of_80_columns")


def shown(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """What it prints on stdout; nothing goes to stderr."""
    capsys.readouterr()
    assert tiny.cli("inspect", *argv) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def inspected(capsys: pytest.CaptureFixture[str], *argv: object) -> dict[str, Any]:
    """The one JSON object of ``--json``, in its one spelling."""
    out = shown(capsys, *argv, "--json")
    found: dict[str, Any] = json.loads(out, parse_constant=pytest.fail)
    assert out == json.dumps(found, sort_keys=True, separators=(",", ":")) + "\n"
    return found


def refusal(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """The one line on stderr of wrong usage; nothing on stdout."""
    capsys.readouterr()
    assert tiny.cli("inspect", *argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    return err


@pytest.mark.parametrize("name", bundled_config_names())
def test_every_bundled_model_is_shown_within_80_columns_with_a_row_for_each_part(
    capsys: pytest.CaptureFixture[str], name: str
) -> None:
    config = load_config(name)
    lines = [line.rstrip() for line in shown(capsys, "-f", name).splitlines()]
    assert max(map(len, lines)) <= 80
    begin = next(i for i, line in enumerate(lines) if line.startswith("layer"))
    end = next(i for i, line in enumerate(lines) if line.startswith("total"))
    rows = lines[begin + 1 : end]
    parts = model_parts(config)
    assert len(rows) == len(parts)  # no row of these is folded
    for row, part in zip(rows, parts, strict=True):
        assert f" {part.parameters:,} " in row
        assert (f" {part.active:,} " in row.replace(f" {part.parameters:,} ", " ", 1)) == (part.active < part.parameters)
    numbered = [row.split()[0] for row in rows if row[:5].strip()]
    assert numbered == [str(layer) for layer in range(config.model.num_layers)]
    assert f" {LanguageModel(config.model, seed=None).num_parameters():,} " in lines[end]


def test_the_words_name_each_kind_of_part_and_its_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    for name, words in {
        "nano": ["Mamba2 48 x 16, state 64", "MLA 6 x (64+16), latents 192/192", "MoE 2 of 4 x 1536, shared"],
        "nano_mamba3_mimo": ["Mamba3 48 x 16, state 64, rank 4", "norm, output 384 x 128354"],
        "baseline": ["GQA 8/4 x 64", "SwiGLU 2048", "embedding 128354 x 512"],
        "tiny-mamba1": ["Mamba1 64 channels, state 8"],
    }.items():
        out = shown(capsys, "-f", name)
        assert all(word in out for word in words)
    extra = ("model.mamba2_n_groups=2", "model.mamba3_use_conv=true", "model.tie_word_embeddings=true")
    out = " ".join(shown(capsys, "-f", "tiny-mamba3", *(part for text in extra for part in ("--set", text))).split())
    assert "groups 2" in out and "convolution" in out and "(tied)" in out


def test_the_json_holds_the_same_numbers_as_the_model_and_the_estimate(capsys: pytest.CaptureFixture[str]) -> None:
    found, config = inspected(capsys, "-f", "tiny-hybrid"), load_config("tiny-hybrid")
    estimate, parts = estimate_memory(config), model_parts(config)
    assert found["memory"].pop("total") == estimate.total
    assert found["memory"] == vars(estimate)
    assert found["config"] == config.model_dump(mode="json")
    assert [(p["layer"], p["kind"], p["parameters"], p["active"], p["kept"]) for p in found["parts"]] == [
        (p.layer, p.kind, p.parameters, p.active, p.kept) for p in parts
    ]
    model = LanguageModel(config.model)
    assert found["parameters"] == model.num_parameters()
    two_idle_experts = 2 * 3 * 32 * 64
    assert found["active"] == found["parameters"] - two_idle_experts
    assert sum(p["weights"] for p in found["parts"]) == sum(array.nbytes for array in model.state_dict().values())
    sizes: dict[bool, int] = {True: 0, False: 0}  # of caches that grow with the tokens, and of those that do not
    for cache in model.new_cache(batch=1):
        grows = isinstance(cache, TokenCache)
        sizes[grows] += sum(array.size for array in (cache.arrays if grows else vars(cache).values()))
    assert found["cache"] == {"a_token": sizes[True] // config.model.max_seq_len, "a_sequence": sizes[False]}


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f64"])
def test_the_size_of_a_step_file_is_the_one_it_then_has_but_for_what_only_a_run_knows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], dtype: str
) -> None:
    run = tiny.make_run(tmp_path, model={"num_layers": 2}, trainer={"max_steps": 1})
    assert run.train("--dtype", dtype) == 0
    size = run.path(1).stat().st_size
    # Progress, data, tokenizer, fingerprint and versions: a few short JSON texts.
    assert 0 < size - inspected(capsys, "-f", run.config, "--dtype", dtype)["checkpoint"] < 4000


def test_flags_and_settings_change_the_config_as_they_do_for_train(capsys: pytest.CaptureFixture[str]) -> None:
    plain = inspected(capsys, "-f", "tiny-llama")
    changes = ("--seq-len", 64, "--batch-size", 16, "--dtype", "bfloat16", "--set", "num_layers=3")
    found = inspected(capsys, "-f", "models/tiny-llama.yaml", *changes)
    model, trainer = found["config"]["model"], found["config"]["trainer"]
    assert (model["max_seq_len"], trainer["batch_size"], model["dtype"], model["num_layers"]) == (64, 16, "bf16", 3)
    layer = [p for p in plain["parts"] if p["layer"] == 0]
    assert found["parameters"] - plain["parameters"] == sum(p["parameters"] for p in layer)
    assert [p["weights"] for p in found["parts"] if p["layer"] == 0] == [p["weights"] // 2 for p in layer]
    # Twice the tokens a window, twice the windows; of bf16 norm weights copies in f32 are kept beside the activations.
    assert [p["kept"] for p in found["parts"] if p["layer"] == 0] == [4 * p["kept"] + 4 * 32 for p in layer]
    assert "--batch-size 0: trainer.batch_size: expected a value >= 1" in refusal(
        capsys, "-f", "tiny-llama", "--batch-size", 0
    )


def test_the_memory_is_told_in_the_words_of_the_trainer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tiny.make_run(tmp_path, trainer={"max_steps": 1, "async_save": True})
    assert run.train() == 0
    told = re.search(r"memory: (about .*)\n", capsys.readouterr().err)
    assert told is not None and "snapshot" in told[1]
    assert told[1] in " ".join(shown(capsys, "-f", run.config).split())


def test_a_hostile_name_or_path_commands_no_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tiny.make_run(tmp_path / "x\x1b[2J", model={"name": "\x1b[31mred [bold]:smile:"})
    out = shown(capsys, "-f", run.config)
    assert all(c.isprintable() for c in out.replace("\n", ""))
    assert "\\x1b[31mred [bold]:smile:" in out


def test_looking_at_a_config_writes_nothing_and_allocates_no_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    huge = ("--set", "hidden_size=1048576", "--set", "intermediate_size=4194304", "--seq-len", 1048576)
    out = shown(capsys, "-f", "tiny-llama", *huge)
    assert re.search(r"about [\d.]+ (PB|TB) \(", out) and max(map(len, out.splitlines())) <= 80
    assert list(tmp_path.iterdir()) == []


def test_more_tensors_than_one_file_can_hold_are_said_to_be_too_many(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = 3 * len(list(LanguageModel(load_config("tiny-llama").model, seed=None).named_parameters()))  # with two moments
    monkeypatch.setattr(header, "MAX_TENSORS", tensors)
    assert inspected(capsys, "-f", "tiny-llama")["checkpoint"] > 0
    monkeypatch.setattr(header, "MAX_TENSORS", tensors - 1)
    assert inspected(capsys, "-f", "tiny-llama")["checkpoint"] is None
    assert "more tensors than one file can hold" in shown(capsys, "-f", "tiny-llama")


def test_neither_or_both_of_path_and_config_are_one_line_of_wrong_usage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "give a checkpoint (PATH) or a config (-f CONFIG)\n" in refusal(capsys)
    assert "give a checkpoint (PATH) or a config (-f CONFIG), not both\n" in refusal(capsys, tmp_path, "-f", "nano")
    assert "--seq-len 3, --set changes a config; give -f CONFIG" in refusal(capsys, tmp_path, "--seq-len", 3, "--set", "a=b")
    assert "did you mean `nano`?" in refusal(capsys, "-f", "nanoo")
