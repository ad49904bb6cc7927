"""The fixture `golden` in the tests of another project: what passes, what fails with which words, what it costs others."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import architectures
import numpy as np
import pytest
import tiny

from oxidizr_ref.config import Config, TrainerConfig
from oxidizr_ref.errors import TraceError
from oxidizr_ref.pytest_plugin import Golden
from oxidizr_ref.trace import Trace, TraceWriter, budget, record

pytest_plugins = ["pytester"]

pytestmark = pytest.mark.thorough

#: Installed, the plugin is there by itself; from a source tree alone it has to be named.
_KNOWN = any(entry.name == "oxidizr_ref" for entry in importlib.metadata.entry_points(group="pytest11"))
PLUGIN = "oxidizr_ref" if _KNOWN else "oxidizr_ref.pytest_plugin"

#: Somebody's kernel, and his test of it.
OUTSIDE = """
    import numpy as np

    def scores(q, k, scale):
        k = np.repeat(k, q.shape[2] // k.shape[2], axis=2)
        return np.einsum("bthp,bshp->bhts", q, k) * scale

    def test_scores(golden):
        q, k = golden.array("layers.0.self_attn.q"), golden.array("layers.0.self_attn.k")
        single = scores(q.astype(np.float32), k.astype(np.float32), SCALE / np.sqrt(q.shape[-1]))
        golden.check({"layers.0.self_attn.scores": single})
"""


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float64 trace of a step of a small Llama."""
    path = tmp_path_factory.mktemp("golden") / "reference.safetensors"
    model = architectures.lively_model("llama")
    trainer = TrainerConfig(learning_rate=1e-3, batch_size=2, max_steps=2)
    record(Config(model=model.config, trainer=trainer), path, 1, [architectures.batch(shape=(2, 6))], model.state_dict())
    return path


def outcome(pytester: pytest.Pytester, text: str, *options: object) -> tuple[dict[str, int], str]:
    """Runs tests of another project. Returns how many passed, failed, …, and the output."""
    pytester.makepyfile(textwrap.dedent(text))
    named = [] if _KNOWN else ["-p", PLUGIN]
    result = pytester.runpytest_inprocess(*named, "-p", "no:cacheprovider", "-p", "no:xdist", "-rs", *map(str, options))
    return result.parseoutcomes(), result.stdout.str() + result.stderr.str()


# --- in another project -----------------------------------------------------------------------------------------------


def test_a_right_kernel_passes(pytester: pytest.Pytester, trace: Path) -> None:
    assert outcome(pytester, OUTSIDE.replace("SCALE", "1"), "--oxidizr-trace", trace)[0] == {"passed": 1}


def test_a_wrong_kernel_fails_with_the_report_and_nothing_else(pytester: pytest.Pytester, trace: Path) -> None:
    counts, out = outcome(pytester, OUTSIDE.replace("SCALE", "1.5"), "--oxidizr-trace", trace)
    assert counts == {"failed": 1}
    assert "DIFFERS first at layers.0.self_attn.scores   (layer 0)" in out and "the other is 1.5 times the reference" in out
    assert "Traceback" not in out and "pytest_plugin.py" not in out and "golden.check(" not in out


def test_without_a_trace_the_test_is_skipped_and_says_what_it_needs(pytester: pytest.Pytester) -> None:
    counts, out = outcome(pytester, OUTSIDE.replace("SCALE", "1"))
    assert counts == {"skipped": 1} and "needs --oxidizr-trace FILE: a trace of `oxidizr-ref trace record`" in out


def test_tests_that_do_not_want_the_fixture_run_with_or_without_a_trace(pytester: pytest.Pytester, trace: Path) -> None:
    text = "def test_of_their_own():\n    pass\n"
    assert outcome(pytester, text)[0] == outcome(pytester, text, "--oxidizr-trace", trace)[0] == {"passed": 1}
    assert outcome(pytester, text, "--oxidizr-trace", "no-such-file")[0] == {"passed": 1}


def test_a_file_that_is_no_trace_is_an_error_that_names_it(pytester: pytest.Pytester) -> None:
    counts, out = outcome(pytester, OUTSIDE.replace("SCALE", "1"), "--oxidizr-trace", "no-such-file")
    assert counts == {"failed": 1} and "no-such-file: no such file" in out


def test_a_map_translates_the_names_that_are_handed_in(pytester: pytest.Pytester, trace: Path, tmp_path: Path) -> None:
    text = """
        def test_logits(golden):
            golden.check({"out": golden.array("logits").transpose(1, 0, 2)}, precision="f64")
    """
    path = tmp_path / "map.yaml"
    path.write_text("names:\n- ours: logits\n  theirs: out\n  do: ['permute(1, 0, 2)']\n")
    options = ("--oxidizr-trace", trace, "--oxidizr-map")
    assert outcome(pytester, text, *options, path)[0] == {"passed": 1}
    counts, out = outcome(pytester, text, *options[:2])
    assert counts == {"failed": 1} and "no name of it is known" in out
    assert "no such map; shipped are" in outcome(pytester, text, *options, "hf-lama")[1]
    shipped = 'def test_norm(golden):\n    golden.check({"model.norm.weight": golden.array("norm.weight")})\n'
    assert outcome(pytester, shipped, *options, "hf-llama")[0] == {"passed": 1}


def test_all_tests_of_a_run_share_one_trace(pytester: pytest.Pytester, trace: Path) -> None:
    text = """
        seen = []

        def test_one(golden):
            seen.append(golden)
            assert golden.compare({"loss": golden.array("loss") * 1.1}).first.name == "loss"

        def test_two(golden):
            assert seen == [golden] and golden.trace.precision == "f64"
            assert golden.compare(golden.path).agrees
    """
    assert outcome(pytester, text, "--oxidizr-trace", trace)[0] == {"passed": 2}


def test_the_options_stand_in_the_help_under_a_heading_of_their_own(pytester: pytest.Pytester) -> None:
    named = [] if _KNOWN else ["-p", PLUGIN]
    out = pytester.runpytest_inprocess(*named, "--help").stdout.str()
    heading = out[out.index("\noxidizr_ref:\n") :]
    assert "--oxidizr-trace" in heading and "--oxidizr-map" in heading and "fixture `golden`" in " ".join(heading.split())


# --- what it costs others ---------------------------------------------------------------------------------------------

_LOADED = """
import json, sys
import pytest
code = pytest.main(["-q", "-p", sys.argv[1], "-p", "no:cacheprovider", "test_empty.py"])
loaded = [name for name in sys.modules if name.partition(".")[0] in ("numpy", "oxidizr_ref", "torch", "yaml", "pydantic")]
print(json.dumps([int(code), sorted(loaded)]))
"""


def test_a_project_that_does_not_use_it_pays_for_no_import(tmp_path: Path) -> None:
    (tmp_path / "test_empty.py").write_text("def test_nothing():\n    pass\n")
    environment = {**tiny.environment(), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": ""}
    command = [sys.executable, "-W", "error", "-c", _LOADED, PLUGIN]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    code, loaded = json.loads(done.stdout.splitlines()[-1])
    assert code == 0 and loaded == [
        "oxidizr_ref",
        "oxidizr_ref.pictured",
        "oxidizr_ref.pytest_plugin",
        "oxidizr_ref.version",
    ]


# --- the fixture itself -----------------------------------------------------------------------------------------------


def test_an_array_is_a_copy_that_may_be_written_to(trace: Path) -> None:
    golden = Golden(str(trace))
    logits = golden.array("logits")
    logits[...] = 0
    assert np.array_equal(golden.array("logits"), Trace(trace).array("logits")) and golden.array("logits").any()
    assert golden.array("loss").shape == ()


def test_budgets_are_computed_once_for_each_precision(trace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    budgets = budget.budgets

    def counted(reference: Trace, precision: str) -> dict[str, budget.Budget]:
        asked.append(precision)
        return budgets(reference, precision)

    monkeypatch.setattr(budget, "budgets", counted)
    golden = Golden(str(trace))
    for precision in ("f32", "f64", "f32", "f64"):
        golden.check({"logits": golden.array("logits")}, precision)
    golden.check({"loss": golden.array("loss")})
    assert asked == ["f32", "f64"]


def test_the_precision_decides_what_passes(trace: Path) -> None:
    golden = Golden(str(trace))
    rounded = {"logits": golden.array("logits").astype(np.float32)}
    golden.check(rounded)
    with pytest.raises(pytest.fail.Exception, match="DIFFERS first at logits"):
        golden.check(rounded, "f64")
    with pytest.raises(TraceError, match="precision f8: expected one of f64, f32, "):
        golden.check(rounded, "f8")


def test_a_whole_trace_may_be_checked_by_its_path(trace: Path, tmp_path: Path) -> None:
    golden = Golden(str(trace))
    golden.check(trace, "f64")
    with TraceWriter(tmp_path / "theirs.st", "f64") as writer:
        writer.add("logits", 2 * golden.array("logits"))
    with pytest.raises(pytest.fail.Exception, match="the other is 2 times the reference"):
        golden.check(str(tmp_path / "theirs.st"), "f64")


def test_what_cannot_be_decided_does_not_pass(trace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "budgets", lambda _reference, _precision: {})
    golden = Golden(str(trace))
    golden.check({"logits": golden.array("logits")})
    with pytest.raises(pytest.fail.Exception, match="undecided: logits not equal, and no budget is known"):
        golden.check({"logits": golden.array("logits") + 1e-9})


@pytest.mark.skipif(not _KNOWN, reason="the package is not installed, so it has no entry points")
def test_installed_the_plugin_needs_no_option_and_no_import(tmp_path: Path, trace: Path) -> None:
    (tmp_path / "test_outside.py").write_text(textwrap.dedent(OUTSIDE.replace("SCALE", "1")))
    environment = {**tiny.environment(), "PYTEST_ADDOPTS": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--oxidizr-trace={trace}"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout + done.stderr
    assert os.listdir(tmp_path).count("test_outside.py") == 1
