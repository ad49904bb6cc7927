"""`oxidizr-ref convert`, and the files of others: hostile ones are refused, and nothing is written by halves or lost."""

from __future__ import annotations

import errno
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from faults import fail, tapped
from pretrained_examples import EXAMPLES, Arrays, config_of, edit_tensors, weights_of, write_example
from safetensors.numpy import load_file, save_file

from oxidizr_ref.checkpoint import format
from oxidizr_ref.config import load_config
from oxidizr_ref.errors import CheckpointError, DataError, OxidizrError
from oxidizr_ref.interop.conversion import export_checkpoint, import_pretrained
from oxidizr_ref.interop.hugging_face import load_weights_file, read_pretrained, write_pretrained
from oxidizr_ref.interop.weight_files import INDEX, SINGLE

pytestmark = pytest.mark.usefixtures("plain_terminal_of_80_columns")

# --- files that are not what they should be ---------------------------------------------------------------------------


def refused(directory: Path) -> str:
    with pytest.raises(OxidizrError) as caught:
        read_pretrained(directory)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_pickles_are_refused_and_the_way_on_is_named(tmp_path: Path) -> None:
    write_example(tmp_path, "llama")
    (tmp_path / SINGLE).unlink()
    assert f"holds neither {SINGLE} nor {INDEX}" in refused(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n")
    assert "pickles (pytorch_model.bin)" in refused(tmp_path) and "safetensors" in refused(tmp_path)


@pytest.mark.parametrize("text", [b"", b"[]", b"{", b"\xff\xfe{}", b"[" * 100_000, b'{"a": ' * 100_000])
def test_a_config_that_is_no_json_object_is_refused(text: bytes, tmp_path: Path) -> None:
    write_example(tmp_path, "llama")
    (tmp_path / "config.json").write_bytes(text)
    assert refused(tmp_path).startswith(f"{tmp_path / 'config.json'}: ")
    (tmp_path / "config.json").unlink()
    assert "config.json: cannot be read" in refused(tmp_path)


def header_of(entries: dict[str, Any], payload: int) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + bytes(payload)


_ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 8,
        struct.pack("<Q", 2**62) + b"{}",
        header_of({"a": {**_ENTRY, "shape": [2**40]}}, 8),
        header_of({"a": _ENTRY}, 4),
        header_of({"a": _ENTRY}, 12),
        header_of({"a": _ENTRY, "b": {**_ENTRY, "data_offsets": [4, 12]}}, 12),
        header_of({"a": {**_ENTRY, "data_offsets": [8, 0]}}, 8),
        header_of({"a": {**_ENTRY, "dtype": "F99"}}, 8),
        header_of({"a": 3}, 8),
    ],
)
def test_a_weight_file_that_is_not_sound_is_refused(content: bytes, tmp_path: Path) -> None:
    write_example(tmp_path, "llama")
    (tmp_path / SINGLE).write_bytes(content)
    assert f"{tmp_path / SINGLE}: is no sound safetensors file" in refused(tmp_path)


def test_quantized_weights_are_refused_by_name(tmp_path: Path) -> None:
    write_example(tmp_path, "llama")
    edit_tensors(tmp_path, lambda t: t.update({"model.norm.weight": np.ones(16, np.int8)}))
    assert "model.norm.weight (I8)" in refused(tmp_path)


def edit_index(directory: Path, change: Any) -> None:
    index = json.loads((directory / INDEX).read_text())
    change(index["weight_map"])
    (directory / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize("name", ["../outside.safetensors", "/outside.safetensors", "a/../../outside.safetensors", ""])
def test_an_index_cannot_lead_out_of_its_directory(name: str, tmp_path: Path) -> None:
    inside = write_example(tmp_path / "inside", "llama", most=10_000)
    save_file({"model.norm.weight": np.ones(16, np.float32)}, tmp_path / "outside.safetensors")
    edit_index(inside, lambda places: places.update({"model.norm.weight": name}))
    with pytest.raises(CheckpointError):
        read_pretrained(inside)


def test_a_shard_that_is_a_link_out_of_the_directory_is_refused(tmp_path: Path) -> None:
    inside = write_example(tmp_path / "inside", "llama", most=10_000)
    shard = sorted(inside.glob("*.safetensors"))[0]
    shard.rename(tmp_path / "outside.safetensors")
    shard.symlink_to(tmp_path / "outside.safetensors")
    assert "leads out" in refused(inside)


def test_an_index_that_does_not_tell_what_is_in_its_shards_is_refused(tmp_path: Path) -> None:
    write_example(tmp_path, "llama", most=10_000)
    whole = (tmp_path / INDEX).read_text()
    first, last = (sorted(tmp_path.glob("*.safetensors"))[i] for i in (0, -1))
    edit_index(tmp_path, lambda places: places.update({"model.norm.weight": first.name}))
    assert f"{first.name} holds other tensors than it says: model.norm.weight" in refused(tmp_path)
    (tmp_path / INDEX).write_text(whole)
    edit_index(tmp_path, lambda places: places.pop("model.norm.weight"))
    assert "model.norm.weight" in refused(tmp_path)
    (tmp_path / INDEX).write_text(whole)
    last.unlink()
    assert f"{last.name}: cannot be read" in refused(tmp_path)
    for wrong in ("{}", '{"weight_map": {}}', '{"weight_map": {"a": 3}}', '{"weight_map": []}'):
        (tmp_path / INDEX).write_text(wrong)
        assert "expected a weight_map" in refused(tmp_path)


def test_where_both_are_there_the_single_file_counts_as_it_does_in_transformers(tmp_path: Path) -> None:
    write_example(tmp_path, "llama", most=10_000)
    whole = read_pretrained(tmp_path).weights
    save_file(
        {name: array + 1 for shard in tmp_path.glob("*.safetensors") for name, array in load_file(shard).items()},
        tmp_path / SINGLE,
    )
    assert np.array_equal(read_pretrained(tmp_path).weights["norm.weight"], whole["norm.weight"] + 1)


# --- oxidizr's weights ------------------------------------------------------------------------------------------------


def test_oxidizr_s_weights_are_read_if_they_are_those_of_the_config(tmp_path: Path) -> None:
    config = config_of("llama")
    weights, path = weights_of(config), tmp_path / "w.safetensors"
    save_file(weights, path)
    read = load_weights_file(path, config)
    assert read.keys() == weights.keys() and all(np.array_equal(read[name], weights[name]) for name in weights)

    odd = {**weights, "a.bias": np.ones(1, np.float32), "norm.weight": np.ones(3, np.float32)}
    del odd["lm_head.weight"]
    save_file(odd, path)
    with pytest.raises(DataError) as caught:
        load_weights_file(path, config)
    for words in (str(path), "1 missing: lm_head.weight", "1 left over: a.bias", "norm.weight [3], not [16]"):
        assert words in str(caught.value)
    with pytest.raises(DataError, match=r"w2\.safetensors: cannot be read"):
        load_weights_file(tmp_path / "w2.safetensors", config)


# --- files that are written -------------------------------------------------------------------------------------------


def test_shards_are_as_large_as_allowed_and_their_index_tells_where_each_tensor_is(tmp_path: Path) -> None:
    write_example(tmp_path, "llama", most=10_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shards = {path.name: load_file(path) for path in tmp_path.glob("*.safetensors")}
    sizes = [sum(array.nbytes for array in shard.values()) for shard in shards.values()]
    largest = 260 * 16 * 4
    assert len(shards) > 3 and all(size <= 10_000 or size == largest for size in sizes)
    assert index["metadata"]["total_size"] == sum(sizes)
    assert index["weight_map"] == {name: file for file, shard in shards.items() for name in shard}
    assert sorted(shards)[0] == f"model-00001-of-{len(shards):05}.safetensors"


def test_what_was_there_before_is_replaced_whole(tmp_path: Path) -> None:
    write_example(tmp_path, "llama", most=10_000)
    (tmp_path / "notes.txt").write_text("mine")
    write_example(tmp_path, "mamba")
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors", "notes.txt"}
    assert read_pretrained(tmp_path).family == "mamba"


# --- to a checkpoint, and back ----------------------------------------------------------------------------------------


def same(a: Arrays, b: Arrays) -> bool:
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and a[name].tobytes() == b[name].tobytes() for name in a
    )


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_command_imports_a_model_and_exports_the_same_files(name: str, tmp_path: Path) -> None:
    there, file, back = write_example(tmp_path / "there", name), tmp_path / "made" / "model.safetensors", tmp_path / "back"
    assert tiny.cli("convert", there, "-o", file) == 0
    assert same(format.load(file).tensors, weights_of(config_of(name)))
    assert tiny.cli("convert", file, "-o", back) == 0
    assert (back / SINGLE).read_bytes() == (there / SINGLE).read_bytes()
    assert (back / "config.json").read_bytes() == (there / "config.json").read_bytes()
    assert {path.name for path in back.iterdir()} == {SINGLE, "config.json"}  # there was no tokenizer


def test_inspect_and_training_take_what_was_imported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    there = write_example(tmp_path / "there", "llama")
    file = tmp_path / "step_0.safetensors"
    assert tiny.cli("convert", there, "-o", file) == 0
    out = capsys.readouterr().out
    assert "llama," in out and "max_seq_len" in out and "byte" in out
    assert tiny.cli("inspect", file) == 0
    out = capsys.readouterr().out
    assert "imported" in out and "step 0" in out
    assert tiny.cli("verify", file) == 0
    model = {key: value for key, value in config_of("llama").model_dump(mode="json").items() if key in EXAMPLES["llama"][1]}
    run = tiny.make_run(tmp_path, model=model, trainer={"learning_rate": 1e-30, "max_steps": 1, "weight_decay": 0.0})
    assert run.train("--init-from", file) == 0
    assert same(
        {n: a for n, a in format.load(run.path(1)).tensors.items() if not n.startswith("optimizer.")},
        format.load(file).tensors,
    )
    assert tiny.lineage(run.path(1))[0] == tiny.lineage(file)[0] and tiny.lineage(file)[0].keys() == {"imported_from"}


def test_a_run_is_exported_from_its_newest_step_and_from_a_file(tmp_path: Path) -> None:
    run = tiny.make_run(tmp_path, trainer={"max_steps": 2, "save_interval": 1})
    assert run.train() == 0
    assert tiny.cli("convert", run.directory, "-o", tmp_path / "newest") == 0
    assert tiny.cli("convert", run.path(1), "-o", tmp_path / "first", "--dtype", "bf16", "--max-shard-size", "20kB") == 0
    about = [json.loads((tmp_path / "newest" / name).read_text()) for name in ("config.json", "generation_config.json")]
    assert [part["eos_token_id"] for part in about] == [256, 256]  # of the tokenizer of bytes
    again = import_pretrained(tmp_path / "newest", tmp_path / "again.safetensors")
    assert again.tokenizer == "byte" and again.notes == []  # its file went along
    newest, first = (read_pretrained(tmp_path / name) for name in ("newest", "first"))
    files = [format.load(run.path(step)).tensors for step in (1, 2)]
    assert same(newest.weights, {name: files[1][name] for name in newest.weights})
    assert first.config.dtype == "bf16" and (tmp_path / "first" / INDEX).is_file()
    assert all(np.array_equal(first.weights[n], files[0][n].astype(first.weights[n].dtype)) for n in first.weights)


def test_oxidizr_s_weights_become_a_checkpoint(tmp_path: Path) -> None:
    model = {**tiny.MODEL, "kv_latent_dim": 10, "q_latent_dim": 6, "d_rope": 4}
    config = tiny.write_config(tmp_path / "c.yaml", {"model": model, "trainer": tiny.TRAINER})
    weights = weights_of(load_config(config).model)
    save_file(weights, tmp_path / "theirs.safetensors")
    file = tmp_path / "ours.safetensors"
    assert tiny.cli("convert", tmp_path / "theirs.safetensors", "-f", config, "-o", file) == 0
    assert same(format.load(file).tensors, weights)
    assert json.loads(format.read_header(file).metadata["config"])["trainer"]["gradient_accumulation"] == 2
    assert tiny.lineage(file)[0]["imported_from"]["family"] == "oxidizr"


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.fixture
def places(tmp_path: Path) -> Path:
    """``mine/``, with a text; ``hf/`` and ``ours.safetensors``, the same model; ``run/``, a run; ``c.yaml``."""
    write_example(tmp_path / "hf", "llama", most=10_000)
    import_pretrained(tmp_path / "hf", tmp_path / "ours.safetensors")
    (tmp_path / "run").mkdir()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("mine")
    import_pretrained(tmp_path / "hf", tmp_path / "run" / "step_0.safetensors")
    tiny.write_config(tmp_path / "c.yaml", {"model": tiny.MODEL, "trainer": tiny.TRAINER})
    return tmp_path


@pytest.mark.parametrize(
    ("source", "flags", "named"),
    [
        ("hf", ["-o", "ours.safetensors"], "is there; give another name, or replace it with --overwrite"),
        ("hf", ["-o", "run/step_5.safetensors"], "call it step_0.safetensors"),
        ("hf", ["-o", "new.safetensors", "--max-shard-size", "2GB"], "--max-shard-size cuts what is exported"),
        ("hf", ["-o", "new.safetensors", "-f", "c.yaml"], "hf: cannot be read"),
        ("hf", ["-o", "new"], "holds no step files"),
        ("ours.safetensors", ["-o", "new.safetensors"], "give its config with -f CONFIG"),
        ("ours.safetensors", ["-o", "hf"], "is there; give another name, or replace the model in it with --overwrite"),
        ("ours.safetensors", ["-o", "run", "--overwrite"], "holds the step files of a run"),
        ("ours.safetensors", ["-o", "mine", "--overwrite"], "holds more than a model (README.md), so it is not replaced"),
        ("ours.safetensors", ["-o", "c.yaml"], "is a file; give a directory"),
        ("ours.safetensors", ["-o", "new", "-f", "c.yaml"], "-f is the config of weights without one"),
        ("ours.safetensors", ["-o", "new", "--max-shard-size", "big"], "--max-shard-size big"),
        ("ours.safetensors", ["-o", "new", "--dtype", "int8"], "int8"),
        ("absent", ["-o", "new"], "absent: no such file"),
    ],
)
def test_what_cannot_be_done_is_told_in_a_line_and_nothing_is_written(
    source: str,
    flags: list[str],
    named: str,
    places: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(places)
    before = tiny.snapshot(places)
    assert tiny.cli("convert", source, *flags) == 2
    err = capsys.readouterr().err
    assert named in err and err.count("\n") == 1
    assert tiny.snapshot(places) == before


def test_a_hybrid_is_not_exported_and_the_reason_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tiny.make_run(tmp_path, model={"num_layers": 2, "mamba_layers": [1]}, trainer={"max_steps": 1})
    assert run.train() == 0
    capsys.readouterr()
    assert tiny.cli("convert", run.directory, "-o", tmp_path / "out") == 2
    assert "layers of different kinds (attention, mamba1) have no layout" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_damaged_checkpoint_is_not_exported(places: Path) -> None:
    path = places / "ours.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        export_checkpoint(path, places / "new")
    assert not (places / "new").exists()


def test_numbers_too_large_for_the_dtype_are_refused_by_the_name_of_their_tensor(tmp_path: Path) -> None:
    write_example(tmp_path / "hf", "llama")
    edit_tensors(tmp_path / "hf", lambda t: t.update({"model.norm.weight": t["model.norm.weight"] * 1e6}))
    for dtype, works in (("bf16", True), ("f16", False)):
        target = tmp_path / f"{dtype}.safetensors"
        if works:
            import_pretrained(tmp_path / "hf", target, dtype)
        else:
            with pytest.raises(DataError, match=r"norm\.weight holds numbers that are too large for f16"):
                import_pretrained(tmp_path / "hf", target, dtype)
        assert target.exists() is works


def test_overwrite_replaces_what_is_there(places: Path) -> None:
    import_pretrained(places / "hf", places / "ours.safetensors", "bf16", overwrite=True)
    assert {a.dtype.name for a in format.load(places / "ours.safetensors").tensors.values()} == {"bfloat16"}
    export_checkpoint(places / "ours.safetensors", places / "hf", overwrite=True)
    assert not list((places / "hf").glob("model-*")) and not (places / "hf" / INDEX).exists()
    assert read_pretrained(places / "hf").config.dtype == "bf16"


# --- when the disk fails ----------------------------------------------------------------------------------------------


def test_whenever_the_disk_fails_a_directory_is_the_old_model_the_new_one_or_none(tmp_path: Path) -> None:
    old, new = config_of("llama"), config_of("mamba")
    target = tmp_path / "hf"
    outcomes = set()
    for call in range(0, 10_000, 3):
        write_pretrained(target, old, weights_of(old), max_shard_bytes=20_000)
        try:
            with tapped(fail(call, errno.EIO)) as calls:
                write_pretrained(target, new, weights_of(new), max_shard_bytes=20_000)
        except OSError:
            pass
        try:
            outcomes.add(read_pretrained(target).family)
        except DataError as error:
            assert "config.json: cannot be read" in str(error)
            outcomes.add("none")
        if len(calls) <= call:
            break
    assert outcomes == {"llama", "mamba", "none"}


# --- tokenizers -------------------------------------------------------------------------------------------------------


def test_a_tokenizer_json_goes_along_both_ways(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers", reason="needs the extra 'tokenizers'")
    there = write_example(tmp_path / "there", "llama")
    vocabulary = {"<|endoftext|>": 0, "a": 1, "b": 2}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="a"))
    made.add_special_tokens(["<|endoftext|>"])
    made.save(str(there / "tokenizer.json"))
    done = import_pretrained(there, tmp_path / "ours.safetensors")
    assert done.tokenizer == "tokenizer.json" and done.notes == []
    exported = export_checkpoint(tmp_path / "ours.safetensors", tmp_path / "back")
    assert tmp_path / "back" / "tokenizer.json" in exported.files
    assert json.loads((tmp_path / "back" / "config.json").read_text())["eos_token_id"] == 0
    again = import_pretrained(tmp_path / "back", tmp_path / "again.safetensors")
    assert again.tokenizer == "tokenizer.json"


def test_without_a_tokenizer_the_one_of_bytes_is_named_and_noted(tmp_path: Path) -> None:
    done = import_pretrained(write_example(tmp_path / "hf", "llama"), tmp_path / "ours.safetensors")
    assert done.tokenizer == "byte" and any("no tokenizer.json" in note for note in done.notes)
