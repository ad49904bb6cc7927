"""`oxidizr-ref trace`: what it takes, what it writes and prints, its exit codes; and that a mistake is told in one line."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from oxidizr_ref.config import load_config
from oxidizr_ref.trace import Trace, TraceWriter, golden_set, record
from oxidizr_ref.trace.golden_set import CASES, SAME, machine_class, numbers_of, published
from oxidizr_ref.trace.record import read_batches, read_weights

IDS, GATE = "layers.0.moe.router.ids", "layers.0.moe.router.gate.weight"
_MODEL: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 6, "vocab_size": 260, "max_seq_len": 5, "num_layers": 2}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a config, a reference trace in float64 and a right one in float32. Tests only read it."""
    root = tmp_path_factory.mktemp("made")
    run = tiny.make_run(root, model=_MODEL, trainer={"gradient_accumulation": 1, "max_steps": 3})
    flags = ("-f", run.config, "--dtype")
    assert tiny.cli("trace", "record", *flags, "f64", "--weights", "lively", "-o", root / "ours.st") == 0
    assert (
        tiny.cli("trace", "record", *flags, "fp32", "--fused", "--weights", root / "ours.st", "-o", root / "right.st") == 0
    )
    return root


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory."""
    directory = tmp_path / "here"
    directory.mkdir()
    monkeypatch.chdir(directory)
    return directory


Ran = tuple[int, str, str]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """`trace` with some arguments. Returns exit code, stdout, stderr."""

    def trace(*argv: object) -> Ran:
        capsys.readouterr()
        return tiny.cli("trace", *argv), *capsys.readouterr()

    return trace


def rewritten(source: Path, path: Path, change: Mapping[str, Callable[[Any], Any]], precision: str = "f32") -> Path:
    """The arrays of a trace, some of them changed, as another program's."""
    trace = Trace(source)
    with TraceWriter(path, precision) as writer:
        for name in trace.records:
            writer.add(name, change.get(name, lambda array: array)(trace.array(name)))
    return path


# --- record -----------------------------------------------------------------------------------------------------------


def test_record_writes_a_trace_and_says_what_is_in_it(made: Path, here: Path, run: Callable[..., Ran]) -> None:
    code, out, err = run("record", "-f", made / "tiny.yaml", "-o", "a.st")
    trace = Trace("a.st")
    size = f"{(here / 'a.st').stat().st_size / 1e3:.3g}"
    assert (code, out, err) == (0, f"a.st: {len(trace.records)} tensors of 1 step in f32, {size} kB\n", "")
    assert [path.name for path in here.iterdir()] == ["a.st"]
    assert trace.metadata["side"] == "reference" and "layers.1.self_attn.scores.grad" in trace.records


@pytest.mark.usefixtures("here")
def test_record_is_the_functions_own_in_every_option(made: Path, run: Callable[..., Ran]) -> None:
    """All options at once: the same bytes as by `trace.record`, and each of them leaves its trace."""
    batch = {"tokens": np.arange(8).reshape(2, 4), "targets": np.arange(1, 9).reshape(2, 4)}
    with TraceWriter("batch.st", "f32") as writer:
        for name, array in batch.items():
            writer.add(name, array)
    assert run("record", "-f", made / "tiny.yaml", "-o", "weights.st", "--set", "seed=5")[0] == 0
    flags = ("--batch", "batch.st", "--weights", "weights.st", "--what", "forward, backward", "--layers", "1")
    more = ("--dtype", "float64", "--sample", "30", "--steps", "2", "--fused", "--set", "trainer.learning_rate=3e-4")
    code, out, _ = run("record", "-f", made / "tiny.yaml", "--output", "a.st", *flags, *more)
    assert code == 0 and " tensors of 2 steps in f64, " in out

    sets = ["trainer.learning_rate=3e-4", "model.dtype=f64"]
    record(
        load_config(made / "tiny.yaml", sets),
        "b.st",
        steps=2,
        batches=read_batches(Path("batch.st")),
        weights=read_weights(Path("weights.st")),
        what=("forward", "backward"),
        layers=[1],
        sample=30,
        fused=True,
    )
    assert Path("a.st").read_bytes() == Path("b.st").read_bytes()
    trace = Trace("a.st")
    assert np.array_equal(trace.array("tokens"), batch["tokens"]) and np.array_equal(
        trace.array("targets"), batch["targets"]
    )
    config = json.loads(trace.metadata["config"])
    assert config["trainer"]["learning_rate"] == 3e-4 and config["model"]["max_seq_len"] == 4
    assert trace.metadata["side"] == "fused" and trace.metadata["steps"] == "2" and trace.precision == "f64"
    names = set(trace.records)
    assert "step.2.loss" in names and "layers.1.output.grad" in names and "layers.0.output" not in names
    assert not any(name.startswith(("optimizer.", "step.2.optimizer.")) or name.endswith(".after") for name in names)
    assert trace.records["layers.1.output.grad"].sample and not trace.records["tokens"].sample
    assert np.array_equal(trace.array("norm.weight"), Trace("weights.st").array("norm.weight"))


@pytest.mark.usefixtures("here")
def test_layers_are_numbers_and_ranges(made: Path, run: Callable[..., Ran]) -> None:
    for said, layers in (("0", {0}), ("1", {1}), ("0-1", {0, 1}), (" 1 , 0-0", {0, 1})):
        assert run("record", "-f", made / "tiny.yaml", "-o", "a.st", "--layers", said, "--what", "forward")[0] == 0
        outputs = {one.layer for one in Trace("a.st").records.values() if one.role == "output"}
        assert outputs == {None, *layers}


def test_lively_weights_are_others_than_the_first_ones_unless_there_is_a_file_of_that_name(
    made: Path, here: Path, run: Callable[..., Ran]
) -> None:
    record_ = functools.partial(run, "record", "-f", made / "tiny.yaml", "--what", "forward")
    assert record_("-o", "first.st")[0] == record_("-o", "lively.st", "--weights", "lively")[0] == 0
    first, lively = (Trace(name).array("layers.0.mlp.up_proj.weight") for name in ("first.st", "lively.st"))
    assert np.abs(lively).mean() > 3 * np.abs(first).mean()
    (here / "lively").write_bytes((here / "first.st").read_bytes())
    assert record_("-o", "again.st", "--weights", "lively")[0] == 0
    assert (here / "again.st").read_bytes() == (here / "first.st").read_bytes()


def test_a_trace_may_be_recorded_over_the_one_whose_weights_it_begins_with(
    made: Path, here: Path, run: Callable[..., Ran]
) -> None:
    (here / "a.st").write_bytes((made / "ours.st").read_bytes())
    flags = ("-f", made / "tiny.yaml", "--dtype", "f64")
    assert run("record", *flags, "--weights", "a.st", "--batch", "a.st", "-o", "a.st")[0] == 0
    assert (here / "a.st").read_bytes() == (made / "ours.st").read_bytes()


# --- compare ----------------------------------------------------------------------------------------------------------


def test_compare_prints_the_report_and_exits_0_where_all_agrees(made: Path, run: Callable[..., Ran]) -> None:
    code, out, err = run("compare", made / "ours.st", made / "right.st")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == f"reference  {made / 'ours.st'}" and lines[1] == f"other      {made / 'right.st'} (f32)"
    assert lines[4].startswith("agrees: every tensor is within its error budget")


def test_compare_names_the_first_wrong_tensor_and_exits_1(made: Path, here: Path, run: Callable[..., Ran]) -> None:
    other = rewritten(made / "ours.st", here / "wrong.st", {"layers.1.self_attn.probs": lambda probs: probs * 1.01})
    code, out, err = run("compare", made / "ours.st", other)
    assert (code, err) == (1, "") and "DIFFERS first at layers.1.self_attn.probs   (layer 1)" in out
    assert "the other is 1.01 times the reference" in out
    everything = run("compare", made / "ours.st", other, "--all")[1]
    assert len(everything.splitlines()) > len(Trace(made / "ours.st").records) > len(out.splitlines())
    assert everything.startswith(out[: out.index("tensor  ")])


def test_compare_prints_one_json_object_with_everything(made: Path, here: Path, run: Callable[..., Ran]) -> None:
    other = rewritten(made / "ours.st", here / "wrong.st", {"norm.output": lambda x: x * np.nan})
    for path, expected in ((other, 1), (made / "right.st", 0)):
        code, out, err = run("compare", made / "ours.st", path, "--json")
        assert (code, err, out.count("\n")) == (expected, "", 1) and "NaN" not in out and "Infinity" not in out
        found = json.loads(out)
        assert found["agrees"] == (expected == 0) and found["first"] == ("norm.output" if expected else None)
        assert found["reference"] == str(made / "ours.st") and found["precision"] == "f32"
        assert {one["name"] for one in found["tensors"]} <= set(Trace(made / "ours.st").records)


@pytest.mark.usefixtures("here")
def test_compare_takes_a_map_a_precision_and_a_tolerance(made: Path, run: Callable[..., Ran]) -> None:
    arrays = Trace(made / "ours.st").array("logits")
    with TraceWriter("theirs.st", "f64") as writer:
        writer.add("head", arrays.transpose(2, 0, 1) * (1 + 1e-9))
    Path("map.yaml").write_text("names:\n- ours: logits\n  theirs: head\n  do: ['permute(1, 2, 0)']\n")
    flags = ("compare", made / "ours.st", "theirs.st")
    assert run(*flags)[0] == 2
    code, out, _ = run(*flags, "--map", "map.yaml")
    assert code == 1 and "compared   1 of " in out and "DIFFERS first at logits" in out
    code, out, _ = run(*flags, "--map", "map.yaml", "--precision", "f32")
    assert code == 0 and "theirs.st (f32)" in out
    assert run(*flags, "--map", "map.yaml", "--tolerance", "1e-8")[0] == 0
    assert run(*flags, "--map", "map.yaml", "--tolerance", "1e-10")[0] == 1


@pytest.mark.usefixtures("here")
def test_compare_takes_a_shipped_map_by_its_name(made: Path, run: Callable[..., Ran]) -> None:
    with TraceWriter("theirs.st", "f64") as writer:
        writer.add("model.norm.weight", Trace(made / "ours.st").array("norm.weight"))
    code, out, _ = run("compare", made / "ours.st", "theirs.st", "--map", "hf-llama")
    assert code == 0 and "compared   1 of " in out


def test_compare_exits_3_where_a_router_was_undecided(here: Path, tmp_path: Path, run: Callable[..., Ran]) -> None:
    """Two experts whose logits are equal within the rounding of float32: the other chose the other one."""
    root = tmp_path / "moe"
    trainer = {"gradient_accumulation": 1, "max_steps": 3}
    made = tiny.make_run(root, {**_MODEL, "num_layers": 1, "num_experts": 3, "experts_per_tok": 1}, trainer)
    assert run("record", "-f", made.config, "-o", "first.st", "--dtype", "f64", "--weights", "lively")[0] == 0

    def tied(gate: Any) -> Any:
        return np.stack([gate[0], gate[0] * (1 + 1e-9), -gate[0]])

    weights = rewritten(here / "first.st", here / "weights.st", {GATE: tied}, "f64")
    assert run("record", "-f", made.config, "-o", "ours.st", "--dtype", "f64", "--weights", weights)[0] == 0
    rewritten(here / "ours.st", here / "theirs.st", {IDS: lambda ids: np.where(ids < 2, 1 - ids.astype(int), ids)})
    code, out, err = run("compare", "ours.st", "theirs.st")
    assert (code, err) == (3, "") and f"undecided: {IDS}" in out and "DIFFERS" not in out
    code, out, _ = run("compare", "ours.st", "theirs.st", "--json")
    assert code == 3 and json.loads(out)["first"] is None and not json.loads(out)["agrees"]
    assert run("compare", "ours.st", "theirs.st", "--precision", "f64")[0] == 1


@pytest.mark.usefixtures("here")
def test_names_of_another_program_cannot_command_the_terminal(made: Path, run: Callable[..., Ran]) -> None:
    strange = "\x1b[2J\x07\revil"
    with TraceWriter("theirs.st", "f32") as writer:
        writer.add("loss", Trace(made / "ours.st").array("loss"))
        writer.add(strange, np.zeros(1))
    for argv in (("compare", made / "ours.st", "theirs.st"), ("show", "theirs.st"), ("show", "theirs.st", "--json")):
        _, out, err = run(*argv)
        assert err == "" and "evil" in out and all(line.isprintable() for line in out.split("\n"))


# --- show -------------------------------------------------------------------------------------------------------------


def test_show_lists_tensors_in_the_order_of_execution(made: Path, run: Callable[..., Ran]) -> None:
    records = Trace(made / "ours.st").records
    code, out, err = run("show", made / "ours.st")
    assert (code, err) == (0, "")
    assert [line.split()[1] for line in out.splitlines()] == list(records)
    assert "output          layers.0.self_attn.q [2, 5, 2, 4]  rope\n" in out
    assert "parameter       norm.weight [8]  parameter\n" in out


def test_show_prints_a_json_object_a_tensor(made: Path, run: Callable[..., Ran]) -> None:
    records = Trace(made / "ours.st").records
    code, out, _ = run("show", made / "ours.st", "--json")
    shown = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [one["name"] for one in shown] == list(records)
    for one, expected in zip(shown, records.values(), strict=True):
        assert one == {
            "name": expected.name,
            "role": expected.role,
            "op": expected.op,
            "layer": expected.layer,
            "shape": list(expected.shape),
            "inputs": list(expected.inputs),
            "sampled": False,
        }


@pytest.mark.usefixtures("here")
def test_show_takes_any_file_of_tensors(run: Callable[..., Ran]) -> None:
    with TraceWriter("theirs.st", "f32") as writer:
        writer.add("h.0.attn", np.zeros((2, 3)))
        writer.add("layers.1.output.grad", np.zeros(()))
    assert run("show", "theirs.st")[1].splitlines() == [
        "output          h.0.attn [2, 3]",
        "gradient        layers.1.output.grad []  backward",
    ]


# --- help -------------------------------------------------------------------------------------------------------------

OPTIONS = {
    "record": "--output --config --steps --batch --weights --what --layers --dtype --sample --fused --set",
    "compare": "REFERENCE OTHER --map --precision --tolerance --all --json",
    "show": "FILE --json",
    "golden": "--output --only",
}


@pytest.mark.usefixtures("plain_terminal_of_80_columns")
@pytest.mark.parametrize("flag", ["-h", "--help"])
@pytest.mark.parametrize("command", OPTIONS)
def test_every_command_has_a_help_with_its_options(run: Callable[..., Ran], command: str, flag: str) -> None:
    code, out, err = run(command, flag)
    assert (code, err) == (0, "") and f" trace {command} " in out
    assert all(word in out for word in OPTIONS[command].split())
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.usefixtures("plain_terminal_of_80_columns")
def test_without_a_command_the_help_is_printed(run: Callable[..., Ran]) -> None:
    code, out, err = run()
    assert code == 2 and "Usage" in out and all(command in out for command in OPTIONS) and err == ""
    assert run("--help")[0] == 0


# --- mistakes ---------------------------------------------------------------------------------------------------------

RECORD = "record -f {made}/tiny.yaml -o a.st "
COMPARE = "compare {made}/ours.st "
BOTH = COMPARE + "{made}/right.st "
MISTAKES = {
    RECORD + "--what forwards": "--what forwards: expected some of forward, backward, optimizer",
    RECORD + "--what ,": "--what ,: expected some of",
    RECORD + "--layers x": "--layers x: expected numbers and ranges, such as 0,3-5",
    RECORD + "--layers 0-": "--layers 0-: expected numbers and ranges",
    RECORD + "--layers 1-0": "--layers 1-0: expected numbers and ranges",
    RECORD + "--layers=-1": "--layers -1: expected numbers and ranges",
    RECORD + "--layers 0-2": "layer 2: the model has layers 0 to 1",
    RECORD + "--dtype f8": '--dtype f8: model.dtype: expected .* found text "f8"',
    RECORD + "--steps 0": "--steps",
    RECORD + "--sample=-1": "--sample",
    RECORD + "--smaple 1": "No such option: --smaple",
    RECORD + "--set trainer.lerning_rate=1": "did you mean `learning_rate`",
    "record -f tiny-lama -o a.st": "tiny-lama: no such file; did you mean `tiny-llama`?",
    "record -f {made}/tiny.yaml": "Missing option '-o'",
    "record -o a.st": "Missing option '-f'",
    "record -f {made}/tiny.yaml -o missing/a.st": "-o missing/a.st: there is no directory missing",
    "record -f {made}/tiny.yaml -o text/a.st": "-o text/a.st: there is no directory text",
    "record -f {made}/tiny.yaml -o .": r"-o \.: is a directory; name a file in it",
    "record -f {made}/tiny.yaml -o {made}": r"made\d+?: is a directory; name a file in it",
    RECORD + "--batch none.st": "none.st: no such file",
    RECORD + "--batch text": "text: is not a trace",
    RECORD + "--batch notokens.st": "notokens.st: holds no tensor `tokens`; a batch file has",
    RECORD + "--batch floats.st": "floats.st: tokens holds float32, not integers",
    RECORD + "--batch flat.st": r"flat.st: tokens \[.*\] are not \[batch, time\]",
    RECORD + "--batch unequal.st": r"unequal.st: tokens \[2, 4\] and its targets \[2, 3\] are not \[batch, time\]",
    RECORD + "--batch large.st": "token id 260 is outside the vocabulary of 260",
    RECORD + "--weights none.st": "none.st: no such file",
    RECORD + "--weights text": "text: is not a trace",
    RECORD + "--weights notokens.st": "embed_tokens.weight is missing from the arrays",
    RECORD + "--weights {made}/ours.st --set hidden_size=16": r"embed_tokens.weight has shape \[260, 8\], .* \[260, 16\]",
    RECORD + "--weights {made}/ours.st --set num_layers=3": r"layers\.2\.\S+ is missing from the arrays",
    COMPARE: "Missing argument 'OTHER'",
    COMPARE + "none.st": "none.st: no such file",
    "compare none.st {made}/ours.st": "none.st: no such file",
    COMPARE + "text": "text: is not a trace",
    COMPARE + ".": r"\.: is not a trace",
    COMPARE + "notokens.st": "no name of it is known to .*ours.st .it has weights.; --map says how names correspond",
    BOTH + "--map none": "none: no such map; shipped are hf-",
    BOTH + "--map text": "text: a map of names has a list `names` of rules",
    BOTH + "--precision f8": r"right.st: precision f8: expected one of f64, f32, .*--precision",
    BOTH + "--tolerance=-1": "--tolerance",
    BOTH + "--tolerance x": "--tolerance",
    "compare bare.st {made}/right.st": "bare.st: does not say config, so its steps cannot be done again",
    "show": "Missing argument 'FILE'",
    "show none.st": "none.st: no such file",
    "show text": "text: is not a trace",
    "golden --only tiny-lama-f64": "--only tiny-lama-f64: the set has tiny-hybrid-f64, ",
    "golden --only tiny-llama-f64 -o text": "text: cannot be made a directory .File exists.; choose another place",
    "golden --only tiny-llama-f64 -o text/x": "text/x: cannot be made a directory",
    "recrod": "No such command 'recrod'",
}


@pytest.fixture
def bad_files(here: Path, made: Path) -> None:
    """Files that are not what they are taken for."""
    (here / "text").write_text("hello\n")
    ids = np.zeros((2, 4), np.int64)
    contents: dict[str, dict[str, Any]] = {
        "notokens.st": {"weights": np.zeros(3)},
        "floats.st": {"tokens": ids.astype(np.float32)},
        "flat.st": {"tokens": np.arange(5)},
        "unequal.st": {"tokens": ids, "targets": ids[:, 1:]},
        "large.st": {"tokens": ids + 260, "targets": ids},
        "bare.st": {"loss": Trace(made / "ours.st").array("loss")},
    }
    for name, arrays in contents.items():
        with TraceWriter(here / name, "f32") as writer:
            for key, array in arrays.items():
                writer.add(key, array)


@pytest.mark.thorough
@pytest.mark.usefixtures("bad_files")
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_in_one_line_and_leaves_nothing_behind(
    made: Path, here: Path, run: Callable[..., Ran], mistake: str
) -> None:
    before = tiny.snapshot(here), tiny.snapshot(made)
    code, out, err = run(*mistake.format(made=made).split())
    assert (code, out) == (2, ""), err
    assert err.startswith("error: ") and err.endswith("\n") and len(err.splitlines()) == 1, err
    assert re.search(MISTAKES[mistake], err) and "(unexpected;" not in err, err
    assert (tiny.snapshot(here), tiny.snapshot(made)) == before


def test_a_step_that_fails_leaves_nothing_behind_and_what_was_there_stays(
    made: Path, here: Path, run: Callable[..., Ran]
) -> None:
    spoilt = rewritten(made / "ours.st", here / "spoilt.st", {"norm.weight": lambda weight: weight * np.nan})
    (here / "a.st").write_text("what was there")
    before = tiny.snapshot(here)
    code, out, err = run("record", "-f", made / "tiny.yaml", "--weights", spoilt, "-o", "a.st")
    assert (code, out) == (1, "") and len(err.splitlines()) == 1 and "loss" in err and "(unexpected;" not in err
    assert tiny.snapshot(here) == before


# --- the golden set ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole_set(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ran]:
    """All of it, made once; and what the command said."""
    directory = tmp_path_factory.mktemp("set") / "golden"
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = tiny.cli("trace", "golden", "-o", directory)
    return directory, (code, out.getvalue(), err.getvalue())


@pytest.mark.parametrize("name", CASES)
def test_the_numbers_of_the_golden_set_are_those_published(name: str, whole_set: tuple[Path, Ran]) -> None:
    numbers, wanted = numbers_of(Trace(whole_set[0] / f"{name}.safetensors")), published()["numbers"][name]
    assert numbers.keys() == wanted.keys() and {"loss", "step.2.grad_norm"} <= numbers.keys()
    for key, number in numbers.items():
        assert number == pytest.approx(wanted[key], rel=SAME[CASES[name][1]]), key


def test_the_digests_of_the_golden_set_are_those_published_for_this_machine_class(whole_set: tuple[Path, Ran]) -> None:
    directory, (code, out, err) = whole_set
    digests = {name.removesuffix(".safetensors"): digest for digest, name in (line.split()[:2] for line in out.splitlines())}
    assert digests == {name: tiny.sha256(directory / f"{name}.safetensors") for name in CASES}
    if machine_class() not in published()["digests"]:
        assert (code, "NOT" in out) == (0, False) and machine_class() in err
        pytest.skip(f"no digests are published for this machine class ({machine_class()})")
    assert digests == published()["digests"][machine_class()]
    assert (code, err) == (0, "") and "NOT" not in out


@pytest.fixture
def other_set(monkeypatch: pytest.MonkeyPatch, here: Path, run: Callable[..., Ran]) -> dict[str, Any]:
    """In place of what is published: tiny-llama-f64 as it comes out here, to be changed by the test."""
    run("golden", "--only", "tiny-llama-f64", "-o", "before")
    path = here / "before" / "tiny-llama-f64.safetensors"
    data = {
        "digests": {machine_class(): {"tiny-llama-f64": tiny.sha256(path)}},
        "numbers": {"tiny-llama-f64": numbers_of(Trace(path))},
    }
    monkeypatch.setattr(golden_set, "published", lambda: data)
    return data


def golden(run: Callable[..., Ran]) -> Ran:
    return run("golden", "--only", "tiny-llama-f64", "-o", "deep/er")


def test_golden_prints_digests_as_sha256sum_does(other_set: dict[str, Any], here: Path, run: Callable[..., Ran]) -> None:
    code, out, err = golden(run)
    (digest,) = other_set["digests"][machine_class()].values()
    assert (code, out, err) == (0, f"{digest}  tiny-llama-f64.safetensors\n", "")
    assert [path.name for path in (here / "deep" / "er").iterdir()] == ["tiny-llama-f64.safetensors"]


def test_another_digest_or_another_number_is_not_as_published(other_set: dict[str, Any], run: Callable[..., Ran]) -> None:
    other_set["numbers"]["tiny-llama-f64"]["loss"] *= 1 + 1e-8
    code, out, err = golden(run)
    assert (code, err) == (1, "") and out.endswith("  tiny-llama-f64.safetensors  NOT as published\n")
    other_set["numbers"]["tiny-llama-f64"]["loss"] /= 1 + 1e-8
    other_set["digests"][machine_class()]["tiny-llama-f64"] = "0" * 64
    assert golden(run)[0] == 1


def test_of_an_unknown_machine_class_the_numbers_decide_and_that_is_said(
    other_set: dict[str, Any], run: Callable[..., Ran]
) -> None:
    other_set["digests"] = {"another": {"tiny-llama-f64": "0" * 64}}
    other_set["numbers"]["tiny-llama-f64"]["loss"] *= 1 + 1e-13  # by other rounding
    code, out, err = golden(run)
    assert code == 0 and "NOT" not in out
    said = f"no digests are published for this machine class ({machine_class()}): "
    assert err == f"{said}losses and gradient norms were compared instead\n"
    other_set["numbers"]["tiny-llama-f64"]["loss"] *= 1 + 1e-8
    assert golden(run)[0] == 1
    del other_set["numbers"]["tiny-llama-f64"]
    assert golden(run)[0] == 1
