"""Packages: what is in them, which checkpoint they are made of, and how packing is refused."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import faults
import numpy as np
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from oxidizr_ref import parallel
from oxidizr_ref.backend import STORAGE_DTYPES
from oxidizr_ref.checkpoint import disk, format
from oxidizr_ref.cli import pack as cli_pack
from oxidizr_ref.errors import CheckpointError, DataError, UsageError
from oxidizr_ref.interop.opened import open_model
from oxidizr_ref.interop.pack import Wishes, bytes_of, pack
from oxidizr_ref.interop.package_check import check_package
from oxidizr_ref.interop.source import Source, choose
from oxidizr_ref.interop.tokenizer_files import tokenizer_files
from oxidizr_ref.interop.weight_files import json_text
from oxidizr_ref.model import LanguageModel
from oxidizr_ref.tokenizers import SPECIAL_TOKENS, ByteTokenizer, CharTokenizer, Tokenizer, tokenizer_from_state

MODELS: dict[str, tuple[dict[str, Any], str]] = {
    "llama": ({}, "byte"),
    "mamba2": ({"mamba_layers": [0], "mamba2_num_heads": 4, "mamba2_state_size": 8, "mamba2_chunk_size": 8}, "char"),
    "mamba3": ({"mamba_layers": [0], "mamba3_enabled": True, "mamba2_num_heads": 4, "mamba2_state_size": 8}, "byte"),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tiny.Run]:
    """Finished runs of 4 steps by the name of their model. Tests only read them."""
    root = tmp_path_factory.mktemp("runs")
    made = {}
    for name, (model, tokenizer) in MODELS.items():
        trainer = {"max_steps": 4, "save_interval": 2, "eval_fraction": 0.1}
        made[name] = tiny.make_run(root / name, {**model, "name": name}, trainer, {"tokenizer": tokenizer}, 400)
        assert made[name].train() == 0
    return made


@pytest.fixture
def llama(runs: dict[str, tiny.Run], tmp_path: Path) -> tiny.Run:
    """A copy of a run that may be damaged."""
    shutil.copytree(runs["llama"].root, tmp_path / "llama")
    run = runs["llama"]
    return tiny.Run(tmp_path / "llama", run.config, run.text, tmp_path / "llama" / "checkpoints")


def packed(run: tiny.Run, output: Path, **wishes: Any) -> Path:
    return pack(choose(run.directory, "latest"), Wishes(output=output, **wishes)).directory


def json_of(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


# ------------------------------------------------------------------------------------------------------- what is in it


@pytest.mark.parametrize("name", MODELS)
def test_a_package_is_whole_and_opens_to_the_same_model(runs: dict[str, tiny.Run], tmp_path: Path, name: str) -> None:
    source = choose(runs[name].directory, "final")
    directory = packed(runs[name], tmp_path / name)
    assert check_package(directory) == []
    package = open_model(directory)
    assert {n: a.tobytes() for n, a in package.weights.items()} == {n: a.tobytes() for n, a in source.state.weights.items()}
    assert package.tokenizer is not None and package.tokenizer.state() == source.state.tokenizer
    trained = LanguageModel(source.config.model)
    trained.load_state_dict(source.state.weights)
    tokens = np.arange(8).reshape(1, 8)
    np.testing.assert_array_equal(package.model()(tokens).data, trained(tokens).data)


def test_it_holds_weights_and_no_optimizer_state(runs: dict[str, tiny.Run], tmp_path: Path) -> None:
    with safe_open(packed(runs["mamba3"], tmp_path / "it") / "model.safetensors", "numpy") as file:
        assert file.metadata()["format"] == "pt"
        assert not [name for name in file.keys() if name.startswith(("optimizer.", "rng."))]  # noqa: SIM118


def test_packing_twice_gives_the_same_bytes(runs: dict[str, tiny.Run], tmp_path: Path) -> None:
    for name, run in runs.items():
        first, second = (packed(run, tmp_path / place / name) for place in "ab")
        assert tiny.snapshot(first) == tiny.snapshot(second)
        assert tiny.snapshot(packed(run, tmp_path / "a" / name, overwrite=True)) == tiny.snapshot(second)


def test_the_training_config_tells_how_it_came_to_be(runs: dict[str, tiny.Run], tmp_path: Path) -> None:
    run = runs["llama"]
    told = json_of(packed(run, tmp_path / "it") / "training_config.json")
    inside = format.read_header(run.path(4)).metadata
    assert told["checkpoint"] == {"file": "step_4.safetensors", "sha256": tiny.sha256(run.path(4)), "step": 4}
    for key in ("data", "fingerprint", "lineage", "progress"):
        assert told[key] == json.loads(inside[key])
    assert told["config"]["trainer"].items() >= json.loads(inside["config"])["trainer"].items()
    assert told["losses"]["loss"] == {"step": 4, "value": run.metrics()[-2]["loss"]}
    assert told["losses"]["eval_loss"] == {"step": 4, "value": run.metrics()[-1]["eval_loss"]}


def test_nothing_in_it_tells_of_the_machine_s_directories(runs: dict[str, tiny.Run], tmp_path: Path) -> None:
    directory = packed(runs["mamba2"], tmp_path / "it")
    for path in directory.iterdir():
        assert str(runs["mamba2"].root).encode() not in path.read_bytes(), path.name


def test_weights_can_be_stored_in_another_dtype(runs: dict[str, tiny.Run], tmp_path: Path) -> None:
    for name, run in runs.items():
        directory = packed(run, tmp_path / name, dtype="bfloat16")
        package = open_model(directory)
        assert package.config.dtype == "bf16" and check_package(directory) == []
        whole = choose(run.directory, "latest").state.weights
        for key, array in package.weights.items():
            np.testing.assert_array_equal(array, np.asarray(whole[key]).astype(STORAGE_DTYPES["bf16"]))
        assert "bfloat16 (trained in float32)" in (directory / "README.md").read_text()


def test_a_number_that_the_dtype_does_not_hold_is_refused(llama: tiny.Run, tmp_path: Path) -> None:
    def grow(tensors: dict[str, Any], _: dict[str, str]) -> None:
        tensors["norm.weight"] = tensors["norm.weight"] * np.float32(1e6)

    tiny.rewrite(llama.path(4), grow)
    with pytest.raises(DataError, match=r"norm\.weight holds numbers that are too large for f16"):
        packed(llama, tmp_path / "it", dtype="f16")
    assert not (tmp_path / "it").exists()


@pytest.mark.parametrize("name", ["llama", "mamba3"])
def test_weights_can_be_cut_into_shards(runs: dict[str, tiny.Run], tmp_path: Path, name: str) -> None:
    directory = packed(runs[name], tmp_path / name, max_shard_bytes=20_000)
    shards = sorted(directory.glob("model-*.safetensors"))
    assert len(shards) > 1 and check_package(directory) == []
    whole = open_model(packed(runs[name], tmp_path / "whole" / name)).weights
    assert {n: a.tobytes() for n, a in open_model(directory).weights.items()} == {n: a.tobytes() for n, a in whole.items()}


@pytest.mark.parametrize(("size", "count"), [("2GB", 2 * 10**9), ("500 mb", 5 * 10**8), ("1.5k", 1500), ("7", 7)])
def test_sizes_are_read(size: str, count: int) -> None:
    assert bytes_of(size, "--max-shard-size") == count


@pytest.mark.parametrize("size", ["", "GB", "-1GB", "0", "2 gigabytes", "1e9"])
def test_what_is_no_size_is_refused(size: str) -> None:
    with pytest.raises(UsageError, match=r"--max-shard-size .*: expected a size such as 500MB or 2GB"):
        bytes_of(size, "--max-shard-size")


# ---------------------------------------------------------------------------------------------------------- tokenizers

TEXTS = st.text(st.characters(exclude_categories=["Cs"])) | st.lists(
    st.sampled_from([*SPECIAL_TOKENS, "<|", "|>", "<|user|", "é", "\r\n", "\0", " ", "𝔘", "a\u0301", "日本"])
).map("".join)


def theirs(tokenizer: Tokenizer) -> Any:
    """What Hugging Face's library makes of the tokenizer.json of a package."""
    library = pytest.importorskip("tokenizers")
    return library.Tokenizer.from_str(json_text(tokenizer_files(tokenizer, 8)["tokenizer.json"]))


@given(TEXTS)
def test_bytes_have_the_same_ids_in_hugging_face_s_library(text: str) -> None:
    ours = ByteTokenizer()
    ids = ours.encode(text).tolist()
    core = theirs(ours)
    assert core.encode(text).ids == ids
    assert core.decode(ids, skip_special_tokens=False) == text
    assert core.get_vocab_size() == ours.vocab_size


@given(st.lists(st.integers(0, 259)))
def test_any_bytes_are_the_same_text_in_hugging_face_s_library(ids: list[int]) -> None:
    ours = ByteTokenizer()
    assert theirs(ours).decode(ids, skip_special_tokens=False) == ours.decode(ids)


@given(TEXTS.filter(bool), st.data())
def test_characters_have_the_same_ids_in_hugging_face_s_library(text: str, data: st.DataObject) -> None:
    ours = CharTokenizer.from_text(text)
    core = theirs(ours)
    other = "".join(data.draw(st.lists(st.sampled_from(ours.vocabulary))))
    for known in (text, other):
        ids = ours.encode(known).tolist()
        assert core.encode(known).ids == ids
        assert core.decode(ids, skip_special_tokens=False) == known


def test_a_strange_character_is_an_error_there_too() -> None:
    with pytest.raises(Exception, match="UNK"):
        theirs(CharTokenizer.from_text("abc")).encode("abcd")


def bpe_text(**parts: Any) -> str:
    """A small tokenizer.json as others make them, with what adds tokens to texts and cuts them."""
    whole = tokenizer_files(ByteTokenizer(), 8)["tokenizer.json"]
    return json.dumps({**whole, **parts})


def test_a_tokenizer_json_is_packed_without_what_training_left_aside() -> None:
    pytest.importorskip("tokenizers")
    special = {"id": "<|user|>", "ids": [257], "tokens": ["<|user|>"]}
    template = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|user|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|user|>": special},
    }
    cut = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    text = bpe_text(post_processor=template, truncation=cut)
    state = {"name": "tokenizer.json", "digest": hashlib.sha256(text.encode()).hexdigest(), "json": text}
    tokenizer = tokenizer_from_state(state)
    files = tokenizer_files(tokenizer, 8)
    assert theirs(tokenizer).encode("abc").ids == tokenizer.encode("abc").tolist() == [97, 98, 99]
    again = tokenizer_from_state({**files["oxidizr_tokenizer.json"], "json": json_text(files["tokenizer.json"])})
    assert again.encode("abc<|user|>").tolist() == [97, 98, 99, 257]


def test_of_splintr_s_vocabularies_only_name_and_digest_are_packed() -> None:
    class Named:
        name, vocab_size, end_of_text, special_tokens = "cl100k_base", 5, 4, {"<|endoftext|>": 4}

        def state(self) -> dict[str, Any]:
            return {"name": self.name, "digest": "0" * 64}

    assert tokenizer_files(Named(), 8) == {"oxidizr_tokenizer.json": {"name": "cl100k_base", "digest": "0" * 64}}  # type: ignore[arg-type]


def test_chats_are_known_only_to_tokenizers_that_have_their_tokens() -> None:
    assert "chat_template" in tokenizer_files(ByteTokenizer(), 8)["tokenizer_config.json"]
    config = tokenizer_files(CharTokenizer.from_text("abc<|endoftext|>"), 8)["tokenizer_config.json"]
    assert config["eos_token"] == "<|endoftext|>" and "chat_template" not in config
    assert "eos_token" not in tokenizer_files(CharTokenizer.from_text("abc"), 8)["tokenizer_config.json"]


def test_the_end_of_a_text_is_told_to_whoever_generates(runs: dict[str, tiny.Run], tmp_path: Path) -> None:
    assert json_of(packed(runs["llama"], tmp_path / "a") / "generation_config.json") == {"eos_token_id": 256}
    assert json_of(packed(runs["mamba2"], tmp_path / "b") / "generation_config.json") == {"eos_token_id": None}


# ---------------------------------------------------------------------------------------------------- which checkpoint


def test_a_checkpoint_is_named_in_four_ways(llama: tiny.Run, tmp_path: Path) -> None:
    backup = Path(shutil.copy(llama.path(2), tmp_path / "backup.safetensors"))
    steps = {wish: choose(llama.directory, wish).state.step for wish in ("latest", "final", "2", str(backup))}
    assert steps == {"latest": 4, "final": 4, "2": 2, str(backup): 2}


def test_the_log_is_read_up_to_the_step_that_is_packed(llama: tiny.Run) -> None:
    assert [step for step, _ in choose(llama.directory, "2").losses("loss")] == [1, 2]
    with (llama.directory / "metrics.jsonl").open("a") as file:
        file.writelines(f'{{"step": 0, "loss": {odd}}}\n' for odd in ('"low"', "null", "[1.0]", "NaN", "1e999"))
        file.write('{"step": "4", "loss": 1.0}\n{"step": 5, "loss": 1.0}\n{"step": 4, "lo')
    assert [step for step, _ in choose(llama.directory, "latest").losses("loss")] == [1, 2, 3, 4]


def test_a_backup_takes_no_numbers_from_whatever_lies_beside_it(llama: tiny.Run) -> None:
    backup = shutil.copy(llama.path(2), llama.directory / "backup.safetensors")
    source = choose(llama.directory, str(backup))
    assert source.records == [] and source.config.model.name == "backup"


def test_a_damaged_newest_file_is_passed_over_and_told(llama: tiny.Run) -> None:
    flip(llama.path(4))
    source = choose(llama.directory, "latest")
    assert source.state.step == 2
    (notice,) = source.notices
    assert notice.startswith("passed over: ") and "step_4.safetensors: damaged" in notice


def test_where_no_file_is_whole_that_is_told(llama: tiny.Run) -> None:
    for step in (2, 4):
        flip(llama.path(step))
    with pytest.raises(CheckpointError, match=r"no step file is whole: .*step_4.*step_2.*; restore a backup"):
        choose(llama.directory, "latest")


def test_a_damaged_file_that_was_asked_for_is_refused(llama: tiny.Run) -> None:
    flip(llama.path(4))
    for wish in ("final", "4", str(llama.path(4))):
        with pytest.raises(CheckpointError, match=r"step_4\.safetensors: damaged"):
            choose(llama.directory, wish)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def test_a_step_that_is_not_there_is_told_with_those_that_are(llama: tiny.Run) -> None:
    with pytest.raises(UsageError, match=r"--checkpoint 3: no such step; .* holds step_2, step_4"):
        choose(llama.directory, "3")


def test_an_unfinished_run_has_no_final_checkpoint(llama: tiny.Run) -> None:
    llama.path(4).unlink()
    with pytest.raises(UsageError, match=r"not finished \(2 of 4 steps are done\); go on with train --resume auto"):
        choose(llama.directory, "final")
    (llama.directory / "config.json").unlink()
    with pytest.raises(UsageError, match=r"not finished \(it is at step 2\)"):
        choose(llama.directory, "final")


def test_a_finished_run_is_known_by_its_log_where_its_config_is_gone(llama: tiny.Run) -> None:
    (llama.directory / "config.json").write_text("{")
    assert choose(llama.directory, "final").state.step == 4


def test_runs_below_a_directory_are_listed(runs: dict[str, tiny.Run], tmp_path: Path) -> None:
    for name in ("b", "a"):
        shutil.copytree(runs["llama"].directory, tmp_path / "checkpoints" / name)
    with pytest.raises(
        UsageError, match=r"holds no step files, but runs: \S*checkpoints/a, \S*checkpoints/b; give one with"
    ):
        choose(tmp_path / "checkpoints", "latest")


def test_a_directory_without_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such directory; give that of a run with --checkpoint-dir"):
        choose(tmp_path / "nothing", "latest")
    with pytest.raises(UsageError, match="holds no step files"):
        choose(tmp_path, "latest")


def test_choosing_writes_nothing(llama: tiny.Run) -> None:
    before = tiny.snapshot(llama.root)
    choose(llama.directory, "final")
    assert tiny.snapshot(llama.root) == before


# --------------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def here(llama: tiny.Run, monkeypatch: pytest.MonkeyPatch) -> tiny.Run:
    """The run in the current directory, of somebody without a name on the hub."""
    monkeypatch.chdir(llama.root)
    monkeypatch.delenv("HF_USERNAME", raising=False)
    return llama


def test_the_command_packs_where_push_looks(here: tiny.Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert tiny.cli("pack", "-c", "latest", "-n", "first", "-u", "me", "--license", "MIT", "--language", "en") == 0
    out, err = capsys.readouterr()
    assert out.startswith("hf/me/first: 4 steps, from checkpoints/step_4.safetensors\n") and err == ""
    assert check_package(here.root / "hf" / "me" / "first") == []
    card = (here.root / "hf" / "me" / "first" / "README.md").read_text()
    assert "license: mit" in card and '- "en"' in card and 'from_pretrained("me/first")' in card


def test_the_name_is_the_config_s_and_the_user_the_environment_s_or_the_file_s(
    here: tiny.Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (here.root / ".env").write_text("HF_USERNAME=of-the-file\n")
    assert tiny.cli("pack", "-c", "2") == 0
    monkeypatch.setenv("HF_USERNAME", "of-the-environment")
    assert tiny.cli("pack", "-c", "2") == 0
    assert "the card says that none is stated" in capsys.readouterr().err
    for user in ("of-the-file", "of-the-environment"):
        assert check_package(here.root / "hf" / user / "llama") == []


REFUSALS: list[tuple[list[str], str]] = [
    ([], "which checkpoint? give -c latest, -c final or -c STEP; checkpoints holds step_2, step_4"),
    (["-c", "9"], "--checkpoint 9: no such step"),
    (["-c", "nothing.safetensors"], "nothing.safetensors: no such file or directory"),
    (["-c", "latest"], "whose model is it? give -u NAME, set HF_USERNAME"),
    (["-c", "latest", "-u", "me", "-n", "a/b"], "--name 'a/b': expected letters"),
    (["-c", "latest", "-u", "me", "-n", ".."], "--name '..': expected letters"),
    (["-c", "latest", "-u", "../me"], "--username '../me': expected letters"),
    (["-c", "latest", "-u", "me", "--license", "do what you want"], "--license 'do what you want': expected a short code"),
    (["-c", "latest", "-u", "me", "--language", "English"], "--language 'English': expected a short code"),
    (["-c", "latest", "-u", "me", "--dtype", "f8"], "--dtype f8: model.dtype: expected"),
    (["-c", "latest", "-u", "me", "--max-shard-size", "big"], "--max-shard-size big: expected a size"),
    (
        ["-c", "latest", "-o", "checkpoints", "--overwrite"],
        "checkpoints: holds no training_config.json, so it is not replaced",
    ),
    (["-c", "latest", "-o", "text.txt"], "text.txt: is there already; replace it with --overwrite"),
    (["-c", "latest", "-o", "."], "is there already; replace it with --overwrite"),
    (["-c", "latest", "--checkpoint-dir", "elsewhere"], "elsewhere: no such directory"),
]


@pytest.mark.parametrize(("flags", "said"), REFUSALS)
def test_what_cannot_be_done_is_refused_in_a_line(
    here: tiny.Run, capsys: pytest.CaptureFixture[str], flags: list[str], said: str
) -> None:
    before = tiny.snapshot(here.root)
    assert tiny.cli("pack", *flags) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and said in err
    assert tiny.snapshot(here.root) == before


def test_a_malformed_file_of_settings_is_told_without_its_secrets(
    here: tiny.Run, capsys: pytest.CaptureFixture[str]
) -> None:
    (here.root / ".env").write_text("# mine\nHF_TOKEN hf_secret\n")
    assert tiny.cli("pack", "-c", "latest") == 2
    err = capsys.readouterr().err
    assert ".env:2: expected KEY=VALUE" in err and "hf_secret" not in err


def test_somebody_at_a_terminal_chooses_from_a_list(
    here: tiny.Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers: Iterator[str] = iter(["7", "2"])
    monkeypatch.setattr(cli_pack.sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(cli_pack.sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda *_: next(answers))
    assert tiny.cli("pack", "-u", "me") == 0
    out, err = capsys.readouterr()
    assert "2 steps, from checkpoints/step_2.safetensors" in out
    assert "held out" in err and f"{here.metrics()[1]['loss']:.4g}" in err


# ------------------------------------------------------------------------------------------------------ all or nothing


@pytest.fixture(scope="module")
def source(runs: dict[str, tiny.Run]) -> Source:
    return choose(runs["mamba3"].directory, "latest")


def test_an_existing_package_stays_unless_it_is_to_be_replaced(source: Source, tmp_path: Path) -> None:
    output = tmp_path / "it"
    pack(source, Wishes(output=output))
    (output / "notes.md").write_text("mine")
    with pytest.raises(UsageError, match="is there already; replace it with --overwrite"):
        pack(source, Wishes(output=output))
    assert (output / "notes.md").read_text() == "mine"
    pack(source, Wishes(output=output, overwrite=True))
    assert not (output / "notes.md").exists() and os.listdir(tmp_path) == ["it"]


def test_a_full_disk_at_any_moment_leaves_nothing_and_the_old_package(source: Source, tmp_path: Path) -> None:
    parallel.set_threads(1)  # the same calls in the same order every time
    output = tmp_path / "it"
    pack(source, Wishes(output=output, license="mit"))
    before = tiny.snapshot(tmp_path)
    new, over = Wishes(output=tmp_path / "new"), Wishes(output=output, license="mit", overwrite=True)
    for wishes in (new, over):
        with faults.tapped(faults.look_on) as calls:
            pack(source, wishes)
        shutil.rmtree(tmp_path / "new", ignore_errors=True)
        writing = [call.number for call in calls if call.name in ("pwrite", "fsync", "replace", "mkdir")]
        assert len(writing) > 30
        for number in [*writing[::4], *writing[-5:]]:
            with faults.tapped(faults.fail(number, errno.ENOSPC)), pytest.raises((OSError, CheckpointError)):
                pack(source, wishes)
            if (tmp_path / "new").exists():  # all that failed is to bring its name to the disk
                assert check_package(tmp_path / "new") == []
                shutil.rmtree(tmp_path / "new")
            assert tiny.snapshot(tmp_path) == before, calls[number]


_KILLED_AT_EVERY_STAGE = """
import os, sys
from pathlib import Path
import faults
from oxidizr_ref import parallel
from oxidizr_ref.interop.pack import Wishes, pack
from oxidizr_ref.interop.package_check import check_package
from oxidizr_ref.interop.source import choose

parallel.set_threads(1)
source, output = choose(Path(sys.argv[1]), "latest"), Path(sys.argv[2])
wishes = Wishes(output=output, license="mit", overwrite=True)
pack(source, wishes)
with faults.tapped(faults.look_on) as calls:
    pack(source, wishes)
writing = [call.number for call in calls if call.changes or call.name == "fsync"]
survived = 0
for number in writing[::5] + writing[-6:]:
    child = os.fork()
    if child == 0:
        with faults.tapped(faults.kill(number)):
            pack(source, wishes)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 9, number
    if output.exists():
        survived += 1
        left = [problem for problem in check_package(output) if not problem.startswith(".lock:")]
        assert left == [], (number, left)
    pack(source, wishes)
    assert os.listdir(output.parent) == [output.name] and check_package(output) == [], number
print(survived, len(writing))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes cannot be forked here")
def test_a_kill_at_any_moment_leaves_no_half_package(runs: dict[str, tiny.Run], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _KILLED_AT_EVERY_STAGE, str(runs["mamba3"].directory), str(tmp_path / "into" / "it")],
        env=tiny.environment(PYTHONPATH=os.pathsep.join([str(tiny.REPOSITORY), str(tiny.REPOSITORY / "tests")])),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    survived, writing = map(int, done.stdout.split())
    assert writing > 60 and survived > 15


def test_what_a_killed_process_left_is_cleared_away(source: Source, tmp_path: Path) -> None:
    left = tmp_path / ".it.tmp"
    left.mkdir()
    (left / "model-00001-of-00002.safetensors").write_bytes(b"half")
    pack(source, Wishes(output=tmp_path / "it"))
    assert os.listdir(tmp_path) == ["it"] and check_package(tmp_path / "it") == []


def test_two_processes_do_not_pack_into_one_directory(source: Source, tmp_path: Path) -> None:
    (tmp_path / ".it.tmp").mkdir()
    lock = disk.Lock(tmp_path / ".it.tmp" / ".lock")
    assert lock.acquire()
    with pytest.raises(UsageError, match="another process is packing into it"):
        pack(source, Wishes(output=tmp_path / "it"))
    lock.release()
    assert os.listdir(tmp_path) == [".it.tmp"]
