"""The page of a run: it says what the files say, skips what is broken, changes nothing, and takes no text for markup."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from oxidizr_ref.checkpoint import format
from oxidizr_ref.report import histograms as spreads
from oxidizr_ref.report.curves import chosen
from oxidizr_ref.report.page import report, write_report
from oxidizr_ref.report.run_directory import StepFile, open_run
from oxidizr_ref.report.samples import SAMPLING, samples
from oxidizr_ref.report.text import shown

MOE = {"num_layers": 2, "num_experts": 3, "experts_per_tok": 1, "mamba_layers": [0], **tiny._STATES}
MOE |= {"mamba2_num_heads": 2, "mamba2_n_groups": 1}
TRAINER = {"max_steps": 6, "save_interval": 2, "eval_fraction": 0.2, "eval_interval": 3, "load_balance_alpha": 0.01}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tiny.Run:
    """A run of six steps over a Mamba and a mixture of experts; nobody may change it."""
    run = tiny.make_run(tmp_path_factory.mktemp("finished"), model=MOE, trainer=TRAINER)
    assert run.train() == 0
    return run


@pytest.fixture
def run(finished: tiny.Run, tmp_path: Path) -> tiny.Run:
    """A copy of it."""
    shutil.copytree(finished.root, tmp_path / "copy")
    return tiny.Run(tmp_path / "copy", finished.config, finished.text, tmp_path / "copy" / "checkpoints")


@pytest.fixture(autouse=True)
def _short_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("oxidizr_ref.report.samples.SAMPLING", replace(SAMPLING, max_tokens=8))


class Page(HTMLParser):
    """The tags of a page in order, the text of each kind of tag, and the numbers inside."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self.addresses: list[str] = []
        self.feed(text)
        self.close()
        self.data: dict[str, Any] = json.loads(self.texts["script"][0])

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.texts.setdefault(tag, []).append("")
        self.addresses += [value or "" for name, value in attributes if name in ("src", "href", "srcset", "action")]

    def handle_data(self, data: str) -> None:
        if self.tags:
            self.texts[self.tags[-1]][-1] += data

    def curve(self, key: str, run: int = 0) -> list[tuple[float, float]]:
        """Steps and values as the script unpacks them."""
        curves = self.data["runs"][run]["curves"]
        column = curves["columns"][key]
        steps = np.frombuffer(base64.b64decode(curves["axes"][column["axis"]]), dtype="<f8")
        return list(zip(steps.tolist(), unpacked(column["values"]), strict=True))


def unpacked(text: str) -> list[float]:
    return np.frombuffer(base64.b64decode(text), dtype="<f4").tolist()


def page_of(*directories: Path, texts: int = 0) -> Page:
    return Page(report([open_run(directory) for directory in directories], texts))


# ------------------------------------------------------------------------------------------------------ what it holds


def test_every_curve_holds_what_was_logged_to_the_last_bit_of_a_float32(finished: tiny.Run) -> None:
    page = page_of(finished.directory)
    lines = [json.loads(line) for line in (finished.directory / "metrics.jsonl").read_text().splitlines()]
    for key in ("loss", "eval_loss", "grad_norm", "learning_rate", "it/s", "tokens/s", "memory_mb", "balance_loss"):
        logged = {line["step"]: float(np.float32(line[key])) for line in lines if key in line}
        assert page.curve(key) == sorted(logged.items())
    assert [step for step, held in page.curve("memory_mb") if held > 0] == [1, 2, 3, 4, 5, 6]
    assert page.curve("expert_entropy.0") == [
        (line["step"], float(np.float32(line["expert_entropy"][0]))) for line in lines if "loss" in line
    ]
    titles = [chart["title"] for chart in page.data["charts"]]
    assert titles[0] == "Loss" and titles[-1] == "Entropy of expert load" and "Dropped tokens" not in titles
    assert page.data["charts"][-1]["curves"] == [["expert_entropy.0", "layer 1"]]


def test_the_load_of_the_experts_is_there_for_every_logged_step(finished: tiny.Run) -> None:
    experts = page_of(finished.directory).data["runs"][0]["experts"]
    loads = [line["expert_load"][0] for line in finished.metrics() if "expert_load" in line]
    assert experts["first"] == experts["last"] == [1, 2, 3, 4, 5, 6]
    assert [(layer["name"], layer["experts"]) for layer in experts["layers"]] == [("layer 1", 3)]
    assert unpacked(experts["layers"][0]["load"]) == np.array(loads, dtype=np.float32).reshape(-1).tolist()


def test_many_steps_share_the_columns_of_the_heat_map_and_their_loads_are_averaged(tmp_path: Path) -> None:
    loads = [[[step / 1000, 1 - step / 1000]] for step in range(1000)]
    lines = [json.dumps({"step": step, "expert_load": load}) for step, load in enumerate(loads)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines), encoding="utf-8")
    experts = page_of(tmp_path).data["runs"][0]["experts"]
    assert experts["first"] == [*range(0, 1000, 5)] and experts["last"] == [*range(4, 1000, 5)]
    load = unpacked(experts["layers"][0]["load"])
    assert load[::2] == pytest.approx([(step + 2) / 1000 for step in range(0, 1000, 5)])


def test_a_number_nobody_foresaw_gets_a_chart_of_its_own(run: tiny.Run) -> None:
    lines = [{"step": step, "peak_memory": 100 + step} for step in (1, 2)]
    (run.directory / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    page = page_of(run.directory)
    assert [chart["title"] for chart in page.data["charts"]] == ["Peak memory"]
    assert page.curve("peak_memory") == [(1, 101), (2, 102)]


def test_the_words_say_how_far_the_run_came_and_what_it_is(finished: tiny.Run) -> None:
    text = report([open_run(finished.directory)], 0)
    metrics = finished.metrics()
    assert "from 5." in text and f"{metrics[-1]['eval_loss']:.4g} at step 6" in text
    assert "layer 0 is Mamba-2" in text.replace("Layer 0", "layer 0") and "tokens seen" in text
    for needed in ("step_2.safetensors", "fingerprint numpy", "trainer.learning_rate", "whole"):
        assert needed in text


def test_equal_files_give_equal_bytes_and_nothing_else_is_touched(run: tiny.Run) -> None:
    before = tiny.snapshot(run.root)
    write_report([run.directory], run.root / "one.html")
    write_report([run.directory], run.root / "two.html")
    after = tiny.snapshot(run.root)
    assert after.pop("one.html") == after.pop("two.html") and after == before


def test_it_refers_to_nothing_outside_itself(finished: tiny.Run) -> None:
    page = page_of(finished.directory)
    assert page.addresses == [] and page.tags.count("script") == 2 and "link" not in page.tags
    assert "default-src 'none'" in report([open_run(finished.directory)], 0)


# -------------------------------------------------------------------------------------------------------- what is broken


def test_lines_that_are_no_records_are_passed_over_and_counted(run: tiny.Run) -> None:
    file = run.directory / "metrics.jsonl"
    good = page_of(run.directory).curve("loss")
    broken = ["{", "[]", "null", '{"loss": 3}', '{"step": "7"}', '{"step": true}', '{"step": -1}', '{"step": 1e99}', "\xff"]
    file.write_bytes(b"\n".join([*(line.encode("latin-1") for line in broken), b"", file.read_bytes(), b'{"step": 9, "lo']))
    assert open_run(run.directory).broken == len(broken) + 1
    assert page_of(run.directory).curve("loss") == good
    assert "10 lines of metrics.jsonl that are no records" in report([open_run(run.directory)], 0)


def test_values_that_are_no_numbers_leave_gaps(tmp_path: Path) -> None:
    values = ["1.5", "NaN", "Infinity", "null", '"3"', "true", "[1]", "1" + "0" * 400, "2"]
    lines = [f'{{"step": {step}, "loss": {value}, "expert_load": {value}}}' for step, value in enumerate(values)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines), encoding="utf-8")
    assert page_of(tmp_path).curve("loss") == [(0, 1.5), (8, 2.0)]
    assert page_of(tmp_path).data["runs"][0]["experts"] is None


@given(st.lists(st.binary(max_size=40), max_size=6))
def test_whatever_is_in_the_metrics_a_page_comes_of_it(tmp_path: Path, lines: list[bytes]) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join([b'{"step": 1, "loss": 2}', *lines]))
    assert page_of(tmp_path).curve("loss")[0] == (1, 2)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
keys = st.sampled_from(["loss", "eval_loss", "expert_load", "expert_entropy", "grad_norm", "final", "new"])


@given(st.lists(st.dictionaries(keys, json_values), min_size=1, max_size=4), json_values)
def test_whatever_json_was_logged_or_configured_a_page_comes_of_it(
    tmp_path: Path, records: list[dict[str, Any]], config: Any
) -> None:
    lines = [json.dumps({**record, "step": step}) for step, record in enumerate(records)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    page_of(tmp_path)


def test_a_damaged_file_is_named_and_the_others_are_used(run: tiny.Run) -> None:
    data = bytearray(run.path(4).read_bytes())
    data[-5] ^= 1
    run.path(4).write_bytes(data)
    (run.directory / "quarantine").mkdir()
    (run.directory / "quarantine" / "step_3.1.safetensors").write_bytes(b"x")
    opened = open_run(run.directory)
    assert [file.step for file in opened.whole] == [2, 6]
    text = report([opened], 1)
    assert "is not what was written" in text and "step_3.1.safetensors" in text and text.count("<h3>step ") == 2


def test_what_no_longer_is_a_run_s_config_is_shown_as_it_stands(run: tiny.Run) -> None:
    (run.directory / "config.json").write_text('{"model": {"hidden_size": "wide"}, "strange": [1, 2]}', encoding="utf-8")
    page = page_of(run.directory)
    assert {"model.hidden_size", "strange"} <= set(page.texts["code"]) and "mixture 0" in str(page.data["charts"])


def test_a_config_too_deep_to_be_one_is_passed_over(run: tiny.Run) -> None:
    (run.directory / "config.json").write_text('{"a":' * 500 + "1" + "}" * 500, encoding="utf-8")
    assert "model.hidden_size" in page_of(run.directory).texts["code"]  # of the newest file


def test_files_alone_or_metrics_alone_are_enough(run: tiny.Run) -> None:
    (run.directory / "metrics.jsonl").rename(run.root / "metrics.jsonl")
    (run.directory / "config.json").unlink()
    without_metrics = page_of(run.directory)
    assert without_metrics.data["charts"] == [] and "model.hidden_size" in without_metrics.texts["code"]
    without_files = page_of(run.root)
    assert len(without_files.curve("loss")) == 6 and without_files.data["runs"][0]["histograms"]["steps"] == []


def test_a_file_that_a_run_at_work_lets_go_of_is_left_out(run: tiny.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    verify = format.verify

    def gone(path: Path) -> Any:
        run.path(2).unlink(missing_ok=True)
        return verify(path)

    monkeypatch.setattr(format, "verify", gone)
    assert [file.step for file in open_run(run.directory).files] == [4, 6]


# -------------------------------------------------------------------------------------------------------------- branches


def test_a_branch_that_was_left_keeps_its_curve_and_its_files(run: tiny.Run) -> None:
    assert run.train("--resume", run.path(2), "--set", "trainer.learning_rate=1e-3") == 0
    opened = open_run(run.directory)
    assert [(b.name, [f.step for f in b.files], [r["step"] for r in b.records]) for b in opened.branches] == [
        ("1", [4, 6], [3, 4, 5, 6])
    ]
    page = page_of(run.directory)
    assert [{*branch["columns"]} for branch in page.data["runs"][0]["branches"]] == [{"loss", "eval_loss"}]
    assert page.data["runs"][0]["changes"] == [{"step": 2}]
    assert any("in superseded/1" in cell for cell in page.texts["td"]) and any("dotted" in note for note in page.texts["p"])


def test_two_runs_stand_in_the_same_charts_and_what_differs_in_their_configs_comes_first(
    run: tiny.Run, finished: tiny.Run
) -> None:
    other = run.into("other")
    assert other.train("--max-steps", 2, "--set", "trainer.learning_rate=1e-3") == 0
    page = page_of(finished.directory, other.directory)
    assert [drawn["name"] for drawn in page.data["runs"]] == ["checkpoints", "other"]
    assert len(page.curve("loss", 0)) == 6 and len(page.curve("loss", 1)) == 2
    text = report([open_run(finished.directory), open_run(other.directory)], 0)
    differing = text.partition("What differs")[2].partition("<details")[0]
    assert "trainer.learning_rate" in differing and "model.hidden_size" not in differing


def test_runs_of_one_name_are_called_by_their_paths(finished: tiny.Run, run: tiny.Run) -> None:
    write_report([finished.directory, run.directory], run.root / "page.html", 0)
    drawn = Page((run.root / "page.html").read_text(encoding="utf-8")).data["runs"]
    assert [one["name"] for one in drawn] == [str(finished.directory), str(run.directory)]


# ------------------------------------------------------------------------------------------------------------ histograms


def step_file(path: Path, step: int, **tensors: Any) -> StepFile:
    arrays = {name.replace("__", "."): np.ascontiguousarray(array) for name, array in tensors.items()}
    format.save(path, arrays, {})
    return StepFile(path, step, path.stat().st_size, None)


finite = hnp.arrays(np.float32, st.integers(1, 40), elements=st.floats(-(2.0**99), 2.0**99, width=32))


@given(finite, finite)
def test_histograms_count_every_number_and_their_spread_is_numpy_s(tmp_path: Path, a: Any, b: Any) -> None:
    files = [step_file(tmp_path / f"{step}.safetensors", step, w=array) for step, array in enumerate((a, b))]
    found = spreads.histograms(files)
    assert list(found) == ["all", "w"] and found["all"] == found["w"]
    histogram = found["w"]["weights"]
    assert histogram.low < histogram.high
    for array, spread, shares in zip((a, b), histogram.spreads, histogram.shares, strict=True):
        values = array.astype(np.float64)
        assert abs(sum(shares) - 10_000) <= spreads.BINS / 2
        assert (spread.smallest, spread.largest, spread.not_finite) == (values.min(), values.max(), 0)
        assert spread.mean == pytest.approx(values.mean(), abs=1e-12 * np.abs(values).max())
        assert spread.deviation == pytest.approx(values.std(), abs=1e-6 * np.abs(values).max())  # √ε: squares cancel


def test_what_is_not_finite_is_counted_and_left_out(tmp_path: Path) -> None:
    array = np.array([np.nan, np.inf, -np.inf, 1e200, 1.0, 3.0])
    found = spreads.histograms([step_file(tmp_path / "a.safetensors", 1, w=array)])["w"]["weights"]
    assert found.spreads == [spreads.Spread(2.0, 1.0, 1.0, 3.0, 4)] and sum(found.shares[0]) == 10_000
    nothing = spreads.histograms([step_file(tmp_path / "b.safetensors", 1, w=np.full(3, np.nan))])["w"]["weights"]
    assert nothing.spreads == [spreads.Spread(0.0, 0.0, 0.0, 0.0, 3)] and nothing.low < nothing.high


def test_groups_come_in_the_order_of_the_model_and_moments_stand_beside_their_weights(finished: tiny.Run) -> None:
    found = spreads.histograms(open_run(finished.directory).files)
    assert list(found) == [
        *("all", "embed_tokens", "layers.0.mamba2", "layers.1.input_layernorm", "layers.1.moe"),
        *("layers.1.post_attention_layernorm", "layers.1.self_attn", "lm_head", "norm"),
    ]
    checkpoint = format.load(finished.path(6)).tensors
    for kind, prefix in spreads.KINDS.items():
        array = checkpoint[f"{prefix}lm_head.weight"]
        spread = found["lm_head"][kind].spreads[-1]
        assert (spread.smallest, spread.largest) == (float(array.min()), float(array.max()))
    assert [len(found["all"][kind].spreads) for kind in spreads.KINDS] == [3, 3]
    assert all(name.startswith("layers.10") for name in sorted(["layers.9.x", "layers.10.x"], key=spreads._order)[1:])


def test_of_large_tensors_evenly_spaced_numbers_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spreads, "MOST_NUMBERS", 10)
    found = spreads.histograms([step_file(tmp_path / "a.safetensors", 1, w=np.arange(95.0))])["w"]["weights"]
    assert (found.spreads[0].smallest, found.spreads[0].largest) == (0.0, 90.0)  # 0, 10, 20 …
    assert found.spreads[0].mean == 45.0


def test_of_many_checkpoints_the_first_the_last_and_even_ones_between_are_drawn(finished: tiny.Run) -> None:
    run = open_run(finished.directory)
    assert chosen(run) == run.files
    assert [file.step for file in chosen(run, most=2)] == [2, 6]
    many = replace(run, files=[StepFile(Path(), step, 1, None) for step in range(34)])
    assert [file.step for file in chosen(many)] == [*range(0, 34, 3)]


# --------------------------------------------------------------------------------------------------------------- samples


def test_each_checkpoint_writes_with_the_same_random_numbers(finished: tiny.Run) -> None:
    files = open_run(finished.directory).files
    first, second = samples(files, 2), samples(files, 2)
    assert first == second and [len(one.texts) for one in first] == [2, 2, 2]
    assert len({text for one in first for text in one.texts}) > 1
    assert [one.texts[:1] for one in samples(files, 1)] == [one.texts[:1] for one in first]
    assert samples(files, 0) == []
    assert "<h2>Samples</h2>" not in report([open_run(finished.directory)], 0)


def test_a_checkpoint_that_cannot_write_says_why(run: tiny.Run) -> None:
    tiny.rewrite(run.path(6), lambda tensors, _: tensors["lm_head.weight"].fill(np.nan))
    last = samples(open_run(run.directory).whole, 1)[-1]
    assert last.texts == [] and last.problem is not None and "not finite" in last.problem


# ------------------------------------------------------------------------------------------------------------ hostile text

EVIL = '</script><script>alert(1)</script><!--<img src=x onerror="alert(1)">&amp;\x1b[31m\x00\u202e\ud800\u2028\x85'


def test_no_text_becomes_markup_or_vanishes(tmp_path: Path) -> None:
    records = [{"step": step, EVIL: 1.5, "loss": 2.0} for step in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    settings = {"model": {EVIL: EVIL, "name": EVIL}}
    (tmp_path / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    text = report([open_run(tmp_path)], 1)
    page = Page(text)
    assert page.tags.count("script") == 2 and "img" not in page.tags and page.addresses == []
    assert not {c for c in text if not c.isprintable()} - {"\n"}
    cell = next(cell for cell in page.texts["td"] if "alert" in cell)
    assert cell.rstrip() == EVIL.partition("\x1b")[0] + "␛[31m␀\\u202e\\ud800\\u2028\\x85"
    assert any("alert" in chart["title"] for chart in page.data["charts"])


@given(st.text(st.characters(), max_size=20))
def test_shown_text_reads_as_it_was_and_holds_nothing_that_cannot_be_seen(text: str) -> None:
    found = shown(text, lines=True)
    assert not set(found) & set("<>\"'") and all(c.isprintable() or c in "\n\t\u200c\u200d" or c.isspace() for c in found)
    visible = "".join(c for c in text if c.isprintable() and c not in "<>&\"'")
    assert visible == "" or set(visible) <= set(found)


# ---------------------------------------------------------------------------------------------------------- the command


def test_the_command_writes_a_page_into_the_run_or_where_it_is_told(
    run: tiny.Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    monkeypatch.setattr("webbrowser.open", lambda address: seen.append(address))
    assert tiny.cli("report", run.directory, "--samples", 0) == 0
    file = run.directory / "report.html"
    assert capsys.readouterr().out.startswith(f"written: {file} (") and seen == []
    assert tiny.cli("report", run.directory, "-o", run.root / "page.html", "--samples", 0, "--open") == 0
    assert (run.root / "page.html").read_bytes() == file.read_bytes() and seen == [(run.root / "page.html").as_uri()]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["absent"], "absent: no such directory; give the directory of a run"),
        (["tiny.yaml"], "tiny.yaml: is a file; give the directory of a run"),
        (["empty"], "empty: holds no run (neither metrics.jsonl nor a step file); give the directory of a run"),
        (["."], "but runs are below it: checkpoints"),
        (["checkpoints", "--with", "empty"], "empty: holds no run"),
        (["checkpoints", "-o", "absent/page.html"], "-o absent/page.html: no file can be written there"),
        (["checkpoints", "-o", "empty"], "-o empty: no file can be written there"),
        (["checkpoints", "--samples", "-1"], "--samples"),
    ],
)
def test_what_is_no_run_is_said_in_one_line_and_nothing_is_written(
    run: tiny.Run,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    words: str,
) -> None:
    monkeypatch.chdir(run.root)
    Path("empty").mkdir()
    before = tiny.snapshot(run.root)
    assert tiny.cli("report", *arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and words in err and len(err.splitlines()) == 1
    assert tiny.snapshot(run.root) == before


def test_a_full_disk_leaves_the_page_that_was_there(
    run: tiny.Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    page = run.root / "page.html"
    page.write_text("the old one", encoding="utf-8")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("oxidizr_ref.checkpoint.disk.write_at", full)
    assert tiny.cli("report", run.directory, "-o", page, "--samples", 0) == 1
    assert "No space left" in capsys.readouterr().err
    assert page.read_text(encoding="utf-8") == "the old one" and {path.name for path in run.root.iterdir()} >= {"page.html"}
    assert not [path for path in run.root.iterdir() if path.name.endswith(".tmp")]


def test_the_page_is_made_without_the_command_line_s_libraries() -> None:
    program = "import sys, oxidizr_ref.report.page, oxidizr_ref.report.pictures; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=tiny.environment()
    )
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert not loaded & {"typer", "rich", "IPython", "matplotlib", "tokenizers"}
