"""Models wherever they are: what is found, what is told of it, how a run begins with it, and how it is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from pretrained_examples import config_of, edit_config, edit_tensors, weights_of, write_example

from oxidizr_ref.backend import STORAGE_DTYPES
from oxidizr_ref.checkpoint import format
from oxidizr_ref.errors import CheckpointError, DamagedError, DataError, OxidizrError, UsageError
from oxidizr_ref.interop.opened import open_model
from oxidizr_ref.interop.tokenizer_files import tokenizer_files
from oxidizr_ref.model import LanguageModel
from oxidizr_ref.tokenizer_libraries import JsonTokenizer
from oxidizr_ref.tokenizers import ByteTokenizer, CharTokenizer

pytest.importorskip("tokenizers", reason="needs the extra 'tokenizers'")

BYTES, END = ByteTokenizer(), 256
HYBRID = {"num_layers": 2, "mamba_layers": [0]}
IMPORTED = "llama"  # of `pretrained_examples`


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tiny.Run:
    """Two step files of a Llama over bytes."""
    run = tiny.make_run(tmp_path_factory.mktemp("run"), trainer={"max_steps": 2, "save_interval": 1})
    assert run.train() == 0
    return run


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> tiny.Run:
    """A model that is nobody's in Hugging Face's layout, over characters, its weights in 16 bits."""
    once = {"max_steps": 1, "save_interval": 1}
    model = {**HYBRID, "dtype": "bf16", "vocab_size": 20}
    run = tiny.make_run(tmp_path_factory.mktemp("hybrid"), model, once, {"tokenizer": "char"})
    assert run.train() == 0
    return run


def pack(run: tiny.Run, output: Path) -> Path:
    assert tiny.cli("pack", "--checkpoint-dir", run.directory, "-c", "latest", "-n", "packed", "-o", output) == 0
    return output


def add_tokenizer(directory: Path, begin: bool = False) -> Path:
    """A tokenizer.json as others have it, here of bytes, with a template that puts a token before texts, or without."""
    data = tokenizer_files(BYTES, 8)["tokenizer.json"]
    if begin:
        piece = {"SpecialToken": {"id": "<|user|>", "type_id": 0}}
        single = [piece, {"Sequence": {"id": "A", "type_id": 0}}]
        special = {"<|user|>": {"id": "<|user|>", "ids": [257], "tokens": ["<|user|>"]}}
        data["post_processor"] = {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": special}
        data["post_processor"]["pair"] = [*single, {"Sequence": {"id": "B", "type_id": 0}}]
    path = directory / "tokenizer.json"
    path.write_text(json.dumps(data))
    return path


def imported(directory: Path, tokenizer: bool = True, begin: bool = False) -> Path:
    """A model in Hugging Face's layout, with nothing of ours beside it."""
    write_example(directory, IMPORTED)
    if tokenizer:
        add_tokenizer(directory, begin)
    return directory


def converted(source: Path, target: Path) -> Path:
    assert tiny.cli("convert", source, "-o", target) == 0
    return target


def same(found: Any, expected: Any) -> bool:
    """Whether two models have the same weights, bit for bit."""
    return found.keys() == expected.keys() and all(
        np.asarray(found[name]).tobytes() == np.asarray(array).tobytes() for name, array in expected.items()
    )


def weights_in(path: Path) -> dict[str, Any]:
    tensors = format.load(path).tensors
    return {name: array for name, array in tensors.items() if not name.startswith(("optimizer.", "tokenizer."))}


# --- what is found ----------------------------------------------------------------------------------------------------


def test_of_a_run_s_directory_the_newest_file_is_opened(run: tiny.Run) -> None:
    opened, first = open_model(run.directory), open_model(run.path(1))
    assert (opened.what, first.what) == (f"{run.path(2)} (step 2)", f"{run.path(1)} (step 1)")
    assert same(opened.weights, weights_in(run.path(2))) and same(first.weights, weights_in(run.path(1)))
    assert isinstance(opened.tokenizer, ByteTokenizer) and (opened.begin, opened.ends) == (END, {END})
    assert opened.config.name == "tiny" and not opened.apart and opened.notices == ()
    assert [line.keys() for line in opened.lineage] == [{"init_from"}]


def test_weights_of_16_bits_are_computed_with_as_float32_to_the_same_bits(hybrid: tiny.Run) -> None:
    opened = open_model(hybrid.directory)
    stored = weights_in(hybrid.path(1))
    assert same(opened.weights, stored) and {array.dtype for array in stored.values()} == {STORAGE_DTYPES["bf16"]}
    assert isinstance(opened.tokenizer, CharTokenizer) and opened.begin is None and opened.ends == set()
    model = opened.model()
    assert same(model.state_dict(), {name: array.astype(np.float32) for name, array in stored.items()})
    narrow = LanguageModel(opened.config)
    narrow.load_state_dict(stored)
    tokens = np.arange(16).reshape(2, 8)
    assert model(tokens).data.tobytes() == narrow(tokens).data.tobytes()


def test_damaged_files_are_passed_over_with_a_notice_each(run: tiny.Run, tmp_path: Path) -> None:
    shutil.copytree(run.directory, tmp_path / "copy")
    damaged = tmp_path / "copy" / "step_2.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    opened = open_model(tmp_path / "copy")
    assert opened.what.endswith("step_1.safetensors (step 1)")
    (notice,) = opened.notices
    assert notice.startswith(f"passed over: {damaged}")
    (tmp_path / "copy" / "step_1.safetensors").write_bytes(b"")
    with pytest.raises(DamagedError, match="no step file is whole"):
        open_model(tmp_path / "copy")
    with pytest.raises(DamagedError, match="step_2"):
        open_model(damaged)


@pytest.mark.parametrize("name", ["latest", "final", "2", "any name"])
def test_a_file_may_have_any_name(run: tiny.Run, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copyfile(run.path(1), tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert open_model(Path(name)).what == f"{name} (step 1)"


def test_a_package_is_the_checkpoint_it_was_made_of_in_both_layouts(run: tiny.Run, hybrid: tiny.Run, tmp_path: Path) -> None:
    for source, kind in ((run, "llama"), (hybrid, "oxidizr_ref")):
        path, file = pack(source, tmp_path / kind), open_model(source.directory)
        assert json.loads((path / "config.json").read_text())["model_type"] == kind
        opened = open_model(path)
        assert opened.config == file.config.model_copy(update={"name": "packed" if kind == "oxidizr_ref" else kind})
        assert same(opened.weights, file.weights)
        assert opened.its_tokenizer().state() == file.its_tokenizer().state()
        assert (opened.begin, opened.ends, opened.what) == (file.begin, file.ends, str(path))


def test_a_model_of_others_comes_with_their_tokenizer(tmp_path: Path) -> None:
    opened = open_model(imported(tmp_path / "there"))
    assert opened.config == config_of(IMPORTED).model_copy(update={"name": "there"}) and same(
        opened.weights, weights_of(config_of(IMPORTED))
    )
    assert isinstance(opened.tokenizer, JsonTokenizer)
    assert opened.tokenizer.encode("aé<|user|>").tolist() == BYTES.encode("aé<|user|>").tolist()
    assert opened.begin is None, "nobody says that its documents begin with the token they end with"


def test_texts_begin_as_the_template_of_others_says(tmp_path: Path) -> None:
    there = imported(tmp_path / "there", begin=True)
    file = converted(there, tmp_path / "step_0.safetensors")
    assert open_model(there).begin == open_model(file).begin == 257
    again = pack(tiny.Run(tmp_path, tmp_path, tmp_path, tmp_path), tmp_path / "package")
    assert open_model(again).begin is None, "packages have no template"


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [(None, None, {END}), (7, None, {END, 7}), ([5, 9], 3, {END, 5, 9}), (None, 3, {END, 3}), (None, [3, "x"], {END, 3})],
)
def test_texts_end_where_the_files_of_others_say(tmp_path: Path, generation: Any, config: Any, expected: set[int]) -> None:
    there = imported(tmp_path / "there")
    edit_config(there, {"eos_token_id": config})
    (there / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    assert open_model(there).ends == expected


def test_a_model_without_a_tokenizer_is_opened_and_takes_the_file_that_is_put_beside_it(tmp_path: Path) -> None:
    there = imported(tmp_path / "there", tokenizer=False)
    file = converted(there, tmp_path / "made" / "model.safetensors")
    for path, directory in ((there, there), (file, file.parent)):
        opened = open_model(path)
        assert opened.tokenizer is None and opened.model() is not None
        with pytest.raises(DataError, match=r"nothing says what its tokenizer is; put its tokenizer\.json beside it"):
            opened.its_tokenizer()
        add_tokenizer(directory)
        assert isinstance(open_model(path).its_tokenizer(), JsonTokenizer)


# --- what is missing or damaged ---------------------------------------------------------------------------------------


def spoil_weights(there: Path) -> None:
    edit_tensors(there, lambda tensors: tensors.pop("model.norm.weight"))


def cut_weights(there: Path) -> None:
    file = there / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])


def spoil_digest(there: Path) -> None:
    (there / "oxidizr_tokenizer.json").write_text('{"name": "byte", "digest": "0"}')


def spoil_text(there: Path) -> None:
    (there / "oxidizr_tokenizer.json").write_text('{"name": "tokenizer.json", "digest": "0"}')
    (there / "tokenizer.json").write_bytes(b"\xff")


def remove_text(there: Path) -> None:
    spoil_text(there)
    (there / "tokenizer.json").unlink()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda there: (there / "config.json").unlink(), "holds no step files"),
        (lambda there: (there / "config.json").write_text("{"), "config.json: is not JSON"),
        (lambda there: (there / "config.json").write_text("[]"), "config.json: expected a JSON object"),
        (lambda there: edit_config(there, {"model_type": "gemma2"}), 'model_type "gemma2" is not imported'),
        (lambda there: (there / "model.safetensors").unlink(), "holds neither model.safetensors nor"),
        (spoil_weights, "1 missing: model.norm.weight"),
        (cut_weights, "model.safetensors: is no sound safetensors file"),
        (lambda there: (there / "tokenizer.json").write_text("{}"), "tokenizer.json: is no tokenizer.json"),
        (spoil_text, "oxidizr_tokenizer.json: tokenizer.json is not UTF-8 (byte 0); get it anew"),
        (remove_text, "oxidizr_tokenizer.json: there is no tokenizer.json beside it; get it from"),
        (spoil_digest, "the stored byte tokenizer does not match its digest"),
        (lambda there: (there / "generation_config.json").write_text("no"), "generation_config.json: is not JSON"),
        (lambda there: (there / "training_config.json").write_text("no"), None),
    ],
)
def test_what_is_wrong_with_a_model_s_directory_is_told_in_a_line(
    tmp_path: Path, damage: Callable[[Path], Any], words: str | None
) -> None:
    there = imported(tmp_path / "there")
    damage(there)
    if words is None:  # theirs say nothing that is read
        assert open_model(there)
        return
    with pytest.raises(OxidizrError) as refused:
        open_model(there)
    assert words in str(refused.value) and str(there) in str(refused.value) and "\n" not in str(refused.value)


def test_a_run_s_directory_without_step_files_is_no_package(run: tiny.Run, tmp_path: Path) -> None:
    shutil.copyfile(run.directory / "config.json", tmp_path / "config.json")
    with pytest.raises(UsageError, match="holds no step files"):
        open_model(tmp_path)
    with pytest.raises(UsageError, match="no such file or directory"):
        open_model(tmp_path / "absent")
    shutil.copytree(run.directory, tmp_path / "below")
    with pytest.raises(UsageError, match="below"):
        open_model(tmp_path)


def test_files_that_are_no_checkpoint_are_refused(run: tiny.Run, tmp_path: Path) -> None:
    for name, content in (("a.txt", b"hello"), ("empty", b""), ("config.json", b"{}")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=name):
            open_model(tmp_path / name)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        open_model(pack(run, tmp_path / "package") / "model.safetensors")
    file = tiny.rewrite(run.path(1), lambda tensors, _: tensors.pop("norm.weight"), tmp_path / "less.safetensors")
    with pytest.raises(DataError, match=r"less\.safetensors.*1 missing: norm\.weight"):
        open_model(file).model()


# --- a run that begins with it ----------------------------------------------------------------------------------------

#: Updates too small to change a weight: what a run began with is in its file.
STILL = ("--set", "learning_rate=1e-30", "--set", "weight_decay=0.0")
SHORT = ("--batch-size", 2, "--grad-accum", 1, "--save-interval", 1, "--target-device", "cpu", "--headless")


def begin_with(model: Path, text: Path, directory: Path, *flags: Any) -> Path:
    """Train from a model without a config. Returns the directory of the run."""
    assert tiny.cli("train", "--init-from", model, "-d", text, "--checkpoint-dir", directory, *SHORT, *flags) == 0
    return directory


@pytest.mark.parametrize("kind", ["file", "run", "package", "own package", "theirs", "converted"])
def test_training_begins_with_the_weights_of_any_model_with_its_own_config_or_a_file(
    run: tiny.Run, hybrid: tiny.Run, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tiny.write_text(tmp_path / "text.txt", 900)
    if kind in ("theirs", "converted"):
        source = imported(tmp_path / "there")
        source = converted(source, tmp_path / "model.safetensors") if kind == "converted" else source
    else:
        whole = hybrid if kind == "own package" else run
        source = {"file": whole.path(1), "run": whole.directory}.get(kind) or pack(whole, tmp_path / "package")
    opened = open_model(source)
    length = ("--seq-len", 4)  # may be another
    own = begin_with(source, text, tmp_path / "own", "--max-steps", 1, *STILL, *length)
    _, err = capsys.readouterr()
    assert f"starting with the weights of {opened.what}, a fresh optimizer and step 0" in err and "warning" not in err
    assert same(weights_in(own / "step_1.safetensors"), opened.weights)
    assert tiny.lineage(own / "step_1.safetensors") == opened.lineage
    assert open_model(own).its_tokenizer().state() == opened.its_tokenizer().state()

    model = {key: value for key, value in opened.config.model_dump(mode="json").items() if value is not None}
    name = opened.its_tokenizer().name
    tokenizer = str(tmp_path / "there" / name) if name.endswith(".json") else name
    config = tiny.make_run(tmp_path / "given", {**model, "name": "mine"}, {"max_steps": 1}, {"tokenizer": tokenizer})
    assert config.train("--init-from", source, *STILL, "--set", "save_interval=1") == 0
    assert "warning" not in capsys.readouterr().err
    assert same(weights_in(config.path(1)), opened.weights)
    assert open_model(config.directory).its_tokenizer().state() == opened.its_tokenizer().state()


def test_without_a_config_the_run_is_called_after_the_model(
    run: tiny.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert tiny.cli("train", "--init-from", run.directory, "-d", run.text, "--max-steps", 1, *SHORT) == 0
    assert (tmp_path / "checkpoints" / "tiny" / "step_1.safetensors").is_file()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": 32}, "model.hidden_size is 16 there, 32 here"),
        (
            {"rope_theta": 5.0, "num_layers": 2},
            "model.num_layers is 1 there, 2 here, model.rope_theta is 10000.0 there, 5.0 here",
        ),
        ({"dtype": "bf16", "max_seq_len": 4, "name": "other"}, None),
    ],
)
def test_a_config_of_another_model_is_refused_naming_the_keys(
    run: tiny.Run, tmp_path: Path, changes: dict[str, Any], words: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tiny.make_run(tmp_path, changes, {"max_steps": 1})
    code = other.train("--init-from", run.path(1))
    err = capsys.readouterr().err
    if words is None:
        assert code == 0
        return
    assert code == 2 and err.splitlines() == [
        f"error: --init-from {run.path(1)} (step 1): another model: {words}; leave out -f to take its own config"
    ]
    assert not other.directory.exists()


def test_text_is_read_with_the_vocabulary_of_the_model(hybrid: tiny.Run, tmp_path: Path) -> None:
    """Of characters it is never that of the new text: its ids would be those of other characters."""
    text = tmp_path / "text.txt"
    text.write_text("cat " * 200)
    directory = begin_with(hybrid.path(1), text, tmp_path / "run", "--max-steps", 1)
    assert open_model(directory).its_tokenizer().state() == open_model(hybrid.path(1)).its_tokenizer().state()


def test_another_tokenizer_than_the_model_s_is_told(
    run: tiny.Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = tiny.make_run(tmp_path / "a", trainer={"max_steps": 1}, data={"tokenizer": "char"})
    assert given.train("--init-from", run.path(1)) == 0
    assert "has the tokenizer byte; text is read with char" in capsys.readouterr().err
    begin_with(imported(tmp_path / "there", tokenizer=False), run.text, tmp_path / "b", "--max-steps", 1)
    assert "has no tokenizer beside it; text is read with byte" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["theirs", "char", "byte"])
@pytest.mark.parametrize("way", ["path", "auto with a config"])
def test_a_run_that_began_with_a_model_goes_on_to_the_bytes_of_one_that_was_not_interrupted(
    run: tiny.Run, hybrid: tiny.Run, tmp_path: Path, kind: str, way: str, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = imported(tmp_path / "there") if kind == "theirs" else None
    source = theirs or {"char": hybrid, "byte": run}[kind].path(1)
    text = tmp_path / "text.txt"
    text.write_text("the cat and a dog " * 60)  # fewer characters than the model knows
    model = {key: value for key, value in open_model(source).config.model_dump(mode="json").items() if value is not None}
    tokenizer = "there/tokenizer.json" if theirs else kind
    trainer = {"max_steps": 4, "save_interval": 2}
    config = tiny.write_config(
        tmp_path / "mine.yaml",
        {"model": model, "trainer": {**tiny.TRAINER, **trainer}, "data": {"path": "text.txt", "tokenizer": tokenizer}},
    )
    given = (
        ["-f", config]
        if way != "path"
        else ["-d", text, *SHORT, "--max-steps", 4, "--set", "save_interval=2", "--set", "log_interval=1"]
    )
    flags = ["--init-from", source, *given, "--headless"]
    assert tiny.cli("train", *flags, "--checkpoint-dir", tmp_path / "whole") == 0
    with tiny.killed_after_step(3):
        tiny.cli("train", *flags, "--checkpoint-dir", tmp_path / "parted")
    assert tiny.steps_in(tmp_path / "parted") == [2]
    capsys.readouterr()
    resume = {"path": tmp_path / "parted" / "step_2.safetensors"}.get(way, "auto")
    more = [] if way == "path" else ["-f", config, "--checkpoint-dir", tmp_path / "parted"]
    assert tiny.cli("train", "--resume", resume, *more, "--headless") == 0
    out, err = capsys.readouterr()
    assert "resumed" in err and [json.loads(line)["step"] for line in out.splitlines()] == [3, 4]
    assert tiny.step_files(tmp_path / "parted") == tiny.step_files(tmp_path / "whole")
