"""Packages: a whole one has no problem, and each way of not being whole is named with its file."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from packages import change_json, make_package, write_json
from safetensors.numpy import save

from oxidizr_ref.checkpoint import format
from oxidizr_ref.config import ModelConfig
from oxidizr_ref.errors import CheckpointError
from oxidizr_ref.interop.hugging_face import write_pretrained
from oxidizr_ref.interop.package_check import check_package, package_files
from oxidizr_ref.interop.weight_files import INDEX, safe_member
from oxidizr_ref.model import LanguageModel

TOKEN = "hf_" + "A1b2C3d4E5" * 3
SHARD = "model-00002-of-00003.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    root = tmp_path_factory.mktemp("packages")
    return {shards: make_package(root / str(shards), shards) for shards in (1, 3)}


@pytest.fixture
def whole(made: dict[int, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(made[1], tmp_path / "whole"))


@pytest.fixture
def sharded(made: dict[int, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(made[3], tmp_path / "sharded"))


def only_problem(directory: Path) -> str:
    problems = check_package(directory)
    assert len(problems) == 1 and "\n" not in problems[0], problems
    return problems[0]


def save_foreign(directory: Path, tensors: dict[str, np.ndarray[Any, Any]], metadata: dict[str, str] | None = None) -> None:
    """Weights as another tool writes them: without our digests."""
    (directory / "model.safetensors").write_bytes(save(tensors, {"format": "pt"} if metadata is None else metadata))


def weights() -> dict[str, np.ndarray[Any, Any]]:
    state = LanguageModel(ModelConfig(**tiny.MODEL), seed=0).state_dict()
    return {name: np.array(array) for name, array in state.items()}


# ------------------------------------------------------------------------------------------------------- whole packages


def test_a_whole_package_has_no_problem_and_all_its_files_are_listed(whole: Path, sharded: Path) -> None:
    assert check_package(whole) == check_package(sharded) == []
    assert package_files(whole) == sorted(path.name for path in whole.iterdir())
    (whole / "more" / "below").mkdir(parents=True)
    (whole / "more" / "below" / "a.txt").write_text("a")
    assert check_package(whole) == []
    assert "more/below/a.txt" in package_files(whole)


def test_weights_written_by_other_tools_are_whole_too(whole: Path) -> None:
    save_foreign(whole, weights())
    assert check_package(whole) == []


@pytest.mark.parametrize("name", ["nano_mamba3_hybrid", "llama-start"])
def test_every_key_of_a_model_survives_its_config_json(tmp_path: Path, name: str) -> None:
    sizes: dict[str, Any] = {"mamba2_num_heads": 4, "mamba2_state_size": 8, "mamba2_chunk_size": 4, "mamba2_head_dim": 8}
    layers = {**sizes, "mamba_layers": [0], "mamba3_enabled": True} if "mamba3" in name else {"tie_word_embeddings": True}
    assert check_package(make_package(tmp_path / "made", num_layers=2, **layers)) == []


def test_what_git_and_the_hub_s_client_keep_inside_is_neither_checked_nor_published(whole: Path) -> None:
    for name in (".git", ".cache"):
        (whole / name).mkdir()
        (whole / name / "x.tmp").write_text(TOKEN)
    (whole / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    assert check_package(whole) == []
    assert ".gitattributes" in package_files(whole) and not any("x.tmp" in name for name in package_files(whole))


def test_no_directory_is_an_error_of_its_own(tmp_path: Path) -> None:
    for look in (check_package, package_files):
        with pytest.raises(CheckpointError, match="no such directory"):
            look(tmp_path / "nowhere")


# ---------------------------------------------------------------------------------------------------------- missing parts


@pytest.mark.parametrize("name", ["config.json", "training_config.json", "README.md", "model.safetensors", "tokenizer.json"])
def test_a_missing_part_is_named(whole: Path, name: str) -> None:
    (whole / name).unlink()
    assert only_problem(whole).startswith(f"{name}: missing")


def test_every_problem_of_a_package_is_told_at_once(whole: Path) -> None:
    for name in ("config.json", "README.md", "model.safetensors"):
        (whole / name).unlink()
    (whole / ".env").write_text("HF_TOKEN=x\n")
    problems = check_package(whole)
    assert [problem.partition(":")[0] for problem in problems] == [".env", "config.json", "README.md", "model.safetensors"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("# no header\n", "does not begin with"),
        ("---\nlicense: mit\n", "does not begin with"),
        ("---\nlicense: [mit\n---\n", "not valid YAML"),
        ("---\nlicense: mit\nlicense: apache-2.0\n---\n", "each given once"),
        ("---\n- mit\n---\n", "not a list of YAML keys"),
        ("---\nlicense: mit\n---\n![curve](other.svg)\n", "shows other.svg, which is missing"),
        ("---\nlicense: mit\n---\n![curve](../../other.svg)\n", "refused"),
    ],
)
def test_a_readme_without_a_header_that_the_hub_reads_or_without_its_picture(whole: Path, text: str, said: str) -> None:
    (whole / "README.md").write_text(text)
    problem = only_problem(whole)
    assert problem.startswith("README.md: ") and said in problem


@pytest.mark.parametrize("name", ["config.json", "training_config.json", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", ["{", '{"a": 1, "a": 2}', '{"a": NaN}', "\xff", "[" * 100_000])
def test_json_that_some_reader_would_refuse_or_misread(whole: Path, name: str, text: str) -> None:
    (whole / name).write_bytes(text.encode("latin-1"))
    assert only_problem(whole).startswith(f"{name}: not valid JSON")


# ---------------------------------------------------------------------------------------------- what should not be there


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (".env", "secrets"),
        (".env.local", "secrets"),
        ("sub/.env", "secrets"),
        (".model.safetensors.tmp", "interrupted"),
        ("model.safetensors.incomplete", "interrupted"),
        (".DS_Store", "hidden"),
        (".ssh/id", "hidden"),
        ("sub/.git/config", "hidden"),
        ("a\nb.txt", "characters"),
        ("a\x1b[31mb", "characters"),
        ("old.safetensors", "neither model.safetensors nor named by an index"),
    ],
)
def test_a_file_that_should_not_be_published_is_named(whole: Path, name: str, said: str) -> None:
    (whole / name).parent.mkdir(exist_ok=True, parents=True)
    (whole / name).write_text("x")
    assert said in "".join(check_package(whole))


@pytest.mark.parametrize("name", ["README.md", "config.json", "notes.txt", "run.svg"])
def test_what_looks_like_a_token_is_found_in_any_text_and_not_shown(whole: Path, name: str) -> None:
    with (whole / name).open("a") as file:
        file.write("\n" * 3 if name.endswith(".json") else f"\n\ntoken = {TOKEN}\n")
    if name == "config.json":
        change_json(whole / name, note=f"--token {TOKEN}")
    problem = only_problem(whole)
    assert problem.startswith(f"{name}: line ") and "token" in problem and TOKEN[3:12] not in problem


def test_what_looks_like_a_token_is_found_in_the_metadata_of_weights(whole: Path) -> None:
    format.save(whole / "model.safetensors", weights(), {"format": "pt", "command": f"push --token {TOKEN}"})
    assert only_problem(whole).startswith("model.safetensors: its header holds what looks like a token")


def test_names_that_only_begin_like_a_token_are_none(whole: Path) -> None:
    (whole / "notes.txt").write_text("hf_hub_download hf_model_of_someone_or_other_very_long shf_" + "a" * 40)
    assert check_package(whole) == []


def test_links_that_lead_out_are_named_and_links_inside_are_files(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    (whole / "copy.svg").symlink_to("loss_curve.svg")
    assert check_package(whole) == []
    (whole / "notes.txt").symlink_to(tmp_path / "secret.txt")
    assert "leads out" in only_problem(whole)
    (whole / "notes.txt").unlink()
    (whole / "below").symlink_to(tmp_path)
    assert only_problem(whole).startswith("below: a link that leads out")
    (whole / "below").unlink()
    (whole / "round").symlink_to("round")
    assert only_problem(whole).startswith("round: ")
    (whole / "round").unlink()
    os.mkfifo(whole / "pipe")
    assert "pipe: not a regular file" in check_package(whole)


# ------------------------------------------------------------------------------------------------------------ the weights


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16])
def test_numbers_that_are_not_finite_are_counted_by_tensor(whole: Path, value: float, dtype: Any) -> None:
    arrays = {name: array.astype(dtype) for name, array in weights().items()}
    arrays["norm.weight"][3:5] = value
    save_foreign(whole, arrays)
    assert "NaN or infinite in 1 tensors: norm.weight (2)" in only_problem(whole)


def test_metadata_that_other_tools_ask_for(whole: Path) -> None:
    save_foreign(whole, weights(), {"format": "np"})
    assert 'format: "pt"' in only_problem(whole)


def test_tensors_that_config_json_does_not_call_for_or_does_and_are_not_there(whole: Path) -> None:
    arrays = weights()
    arrays["stray.weight"] = arrays.pop("norm.weight")
    arrays["embed_tokens.weight"] = arrays["embed_tokens.weight"][:-1]
    save_foreign(whole, arrays)
    problems = "\n".join(check_package(whole))
    assert problems.startswith("config.json: the tensors are not those of its config; ")
    assert "1 missing: norm.weight" in problems and "1 left over: stray.weight" in problems
    assert "embed_tokens.weight [259, 16], not [260, 16]" in problems


@pytest.mark.parametrize("max_shard_bytes", [None, 20_000])
def test_a_layout_of_hugging_face_is_checked_against_its_config(whole: Path, max_shard_bytes: int | None) -> None:
    (whole / "model.safetensors").unlink()
    write_pretrained(whole, ModelConfig(**tiny.MODEL), weights(), max_shard_bytes=max_shard_bytes)
    assert check_package(whole) == []
    change_json(whole / "config.json", num_hidden_layers=2)
    assert re.match(
        r"config\.json: the tensors are not those of its config; 9 missing: model\.layers\.1\.", only_problem(whole)
    )


def test_a_config_of_which_no_model_can_be_made(whole: Path) -> None:
    change_json(whole / "config.json", hidden_size=15)
    assert only_problem(whole).startswith("config.json: no model can be made of it")


def test_a_kind_of_model_that_is_not_known_here_is_checked_as_far_as_it_goes(whole: Path) -> None:
    write_json(whole / "config.json", {"model_type": "something_else"})
    save_foreign(whole, {"a": np.zeros(3, np.float32)})
    assert check_package(whole) == []


@given(data=st.data())
def test_no_byte_of_our_weights_changes_unnoticed_nor_any_cut(
    made: dict[int, Path], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    directory = Path(shutil.copytree(made[1], tmp_path_factory.mktemp("damaged") / "package"))
    file = directory / "model.safetensors"
    whole = bytearray(file.read_bytes())
    at = data.draw(st.one_of(st.integers(0, 3000), st.integers(0, len(whole) - 1)))
    if data.draw(st.booleans()):
        whole[at] ^= data.draw(st.integers(1, 255))
        file.write_bytes(whole)
    else:
        file.write_bytes(whole[:at])
    problems = check_package(directory)
    assert len(problems) == 1 and problems[0].startswith("model.safetensors: ")


def test_no_letter_of_the_names_that_prove_our_weights_changes_unnoticed(whole: Path) -> None:
    file = whole / "model.safetensors"
    data = file.read_bytes()
    for key in (b"digests", b"header_digest", b"format", b"__metadata__"):
        begin = data.index(b'"%b":' % key)
        for at in range(begin, begin + len(key) + 3):
            file.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
            assert only_problem(whole).startswith("model.safetensors: "), (key, at - begin)


A, B = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}
HEADERS = [
    ({"a": A, "b": B}, 8),
    ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}, 12),
    ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, 9),
    ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, 7),
    ({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, 8),
    ({"a": {"dtype": "F8_E4M3", "shape": [8], "data_offsets": [0, 8]}}, 8),
    ({"a": {"dtype": "F32", "shape": [-2], "data_offsets": [8, 0]}}, 8),
    ({"a": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}}, 8),
    ({"a": {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}}, 8),
    ({"a": {"shape": [2], "data_offsets": [0, 8]}}, 8),
    ({"a": 3}, 8),
    ({"__metadata__": {"format": 1}}, 0),
    ({"__metadata__": []}, 0),
    ([], 0),
    ('{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}', 16),
    ('{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]}}', 8),
    ("{", 0),
]


@pytest.mark.parametrize(("header", "payload"), HEADERS)
def test_a_header_that_is_not_sound_is_damage(whole: Path, header: Any, payload: int) -> None:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    (whole / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(payload))
    assert re.match(r"model\.safetensors: (is no sound safetensors file|a \(F8_E4M3\): only F64)", only_problem(whole))


def test_a_header_longer_than_its_file_is_not_read(whole: Path) -> None:
    for data in (b"", b"1234567", (1 << 62).to_bytes(8, "little"), b"\xff" * 9):
        (whole / "model.safetensors").write_bytes(data)
        assert "is no sound safetensors file" in only_problem(whole)


# ------------------------------------------------------------------------------------------------------------------ shards


def test_a_shard_that_is_missing_damaged_or_beside_the_index(sharded: Path) -> None:
    (sharded / "model-00009-of-00003.safetensors").write_bytes((sharded / SHARD).read_bytes())
    assert "nor named by an index" in only_problem(sharded)
    (sharded / "model-00009-of-00003.safetensors").unlink()
    data = bytearray((sharded / SHARD).read_bytes())
    data[-1] ^= 1
    (sharded / SHARD).write_bytes(data)
    assert only_problem(sharded).startswith(f"{SHARD}: damaged")
    (sharded / SHARD).unlink()
    assert only_problem(sharded) == f"{SHARD}: missing, though {INDEX} names it"


def test_an_index_that_is_not_true(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    change_json(sharded / INDEX, metadata={"total_size": 1})
    assert "total_size is 1" in only_problem(sharded)
    change_json(sharded / INDEX, metadata=index["metadata"])
    elsewhere = next(shard for shard in index["weight_map"].values() if shard != index["weight_map"]["norm.weight"])
    change_json(sharded / INDEX, weight_map={**index["weight_map"], "norm.weight": elsewhere})
    problems = check_package(sharded)
    assert len(problems) == 2 and all(f"holds other tensors than {INDEX} says: norm.weight" in p for p in problems)
    for wrong in ({}, [], {**index["weight_map"], "norm.weight": 3}, {"norm.weight": [SHARD]}):
        change_json(sharded / INDEX, weight_map=wrong)
        assert only_problem(sharded).startswith(f"{INDEX}: expected a weight_map")


def test_an_index_beside_the_weights_in_one_file(sharded: Path, whole: Path) -> None:
    shutil.copy(whole / "model.safetensors", sharded)
    assert "one of them was left over" in only_problem(sharded)


UNSAFE = ["../x.safetensors", "/etc/passwd", "a/../../x", "", ".", "a//b", "./a", "a\\..\\b", "C:x", "a\0b", "a/..", "a\n"]


@pytest.mark.parametrize("name", UNSAFE)
def test_a_shard_elsewhere_is_refused(sharded: Path, name: str) -> None:
    index = json.loads((sharded / INDEX).read_text())
    change_json(sharded / INDEX, weight_map={**index["weight_map"], "norm.weight": name})
    problem = only_problem(sharded)
    assert problem.startswith(f"{INDEX}: ") and "refused" in problem
    with pytest.raises(CheckpointError, match="is refused"):
        safe_member(sharded, name)


def test_a_shard_behind_a_link_that_leads_out_is_refused(sharded: Path, tmp_path: Path) -> None:
    shutil.move(sharded / SHARD, tmp_path / SHARD)
    (sharded / SHARD).symlink_to(tmp_path / SHARD)
    with pytest.raises(CheckpointError, match="leads out of this directory"):
        safe_member(sharded, SHARD)
    assert check_package(sharded)


@given(st.text(st.sampled_from("ab./\\:-"), max_size=12))
def test_a_safe_member_lies_inside_whatever_its_name(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    directory = tmp_path_factory.getbasetemp() / "never made"
    try:
        path = safe_member(directory, name)
    except CheckpointError:
        return
    assert Path(os.path.normpath(path)) == path and path.is_relative_to(directory) and path != directory
