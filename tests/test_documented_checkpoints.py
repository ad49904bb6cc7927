"""Everything that oxidizr's documentation says about checkpoints, as a user would try it: by commands, files and YAML.

The statements, in our words, from top to bottom: where files appear and which stay; how a run goes on and that it goes on
exactly; what a file holds; backups, branches, deletions; what to do when something is wrong. Each command is written as in a
shell and runs in a process of its own, in turns with the word ``train`` and without.
"""

from __future__ import annotations

import errno
import itertools
import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forge
import pytest
import tiny

from oxidizr_ref.checkpoint import disk, format
from oxidizr_ref.cli import report
from oxidizr_ref.config import load_config
from oxidizr_ref.model import LanguageModel
from oxidizr_ref.run import Reporter
from oxidizr_ref.trainer import Trainer

pytestmark = forge.needs_fork

#: A config as the documentation would have it, but small. It says nothing about checkpoints.
YAML = """
model:
  hidden_size: 8
  num_layers: 1
  num_heads: 2
  vocab_size: 260
  max_seq_len: 8
trainer:
  learning_rate: 1e-2
  batch_size: 2
  max_steps: 6
  log_interval: 1
  target_device: cpu
data:
  path: text.txt
"""

Shell = Callable[..., forge.Ended]


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A directory with a config and a text."""
    (tmp_path / "small.yaml").write_text(YAML)
    tiny.write_text(tmp_path / "text.txt", 400)
    return tmp_path


@pytest.fixture
def oxidizr(here: Path) -> Shell:
    """Runs ``oxidizr-ref ARGUMENTS``, every other time as ``oxidizr-ref train ARGUMENTS``, and expects an exit code."""
    words = itertools.cycle(["train", ""])

    def run(arguments: str, code: int = 0, moments: str = "") -> forge.Ended:
        ended = forge.run(shlex.split(f"{next(words)} {arguments}"), here, moments=moments)
        assert ended.code == code, ended.err
        assert "Traceback" not in ended.err
        return ended

    return run


def files(directory: Path) -> dict[int, str]:
    return tiny.step_files(directory)


def with_keys(here: Path, **keys: Any) -> None:
    """Add keys to the config's trainer section."""
    lines = "".join(f"  {key}: {json.dumps(value)}\n" for key, value in keys.items())
    (here / "small.yaml").write_text(YAML.replace("trainer:\n", "trainer:\n" + lines))


def begins_at(ended: forge.Ended) -> int:
    """Where the process says it went on, which must be where its first step follows."""
    step = int(re.findall(r"^resumed .* at step (\d+)$", ended.err, re.MULTILINE)[0])
    assert not ended.records or ended.records[0]["step"] == step + 1
    return step


def the_error(ended: forge.Ended) -> str:
    """The one line that tells what is wrong."""
    (line,) = [line for line in ended.err.splitlines() if line.startswith("error: ")]
    return line


# --- where files appear -----------------------------------------------------------------------------------------------


@pytest.mark.thorough
def test_without_a_word_about_checkpoints_there_is_one_every_500_steps_in_checkpoints(here: Path, oxidizr: Shell) -> None:
    oxidizr("-f small.yaml --headless --seq-len 4 --batch-size 1 --max-steps 1000 --set log_interval=500 --threads 1")
    assert sorted(path.name for path in (here / "checkpoints").glob("*.safetensors")) == [
        "step_1000.safetensors",
        "step_500.safetensors",
    ]
    ended = oxidizr(
        "-f small.yaml --headless --seq-len 4 --batch-size 1 --max-steps 1001 --resume checkpoints/step_1000.safetensors"
    )
    assert begins_at(ended) == 1000


def test_the_documented_block_of_keys_says_what_is_the_default(here: Path) -> None:
    plain = load_config(here / "small.yaml")
    with_keys(here, save_interval=500, checkpoint_dir="./checkpoints", max_checkpoints=10)
    assert load_config(here / "small.yaml") == plain


@pytest.mark.parametrize("place", ["runs/2/a", "a b", "../beside", "日本", "ABSOLUTE"])
def test_the_directory_may_be_any_path_by_key_and_by_flag(here: Path, oxidizr: Shell, place: str) -> None:
    (here / "cwd").mkdir()
    path = str(here / "absolute") if place == "ABSOLUTE" else place
    with_keys(here, checkpoint_dir=path)
    oxidizr("-f small.yaml --max-steps 1")
    assert tiny.steps_in(here / path) == [1]
    oxidizr(f"-f small.yaml --max-steps 2 --checkpoint-dir {shlex.quote(path + '-flag')}")
    assert tiny.steps_in(here / (path + "-flag")) == [2], "the flag wins"


def test_the_same_files_appear_in_every_output_mode_with_the_word_train_and_without(here: Path) -> None:
    for number, command in enumerate(["train -f", "-f", "train --headless -f", "--headless -f"]):
        ended = forge.run(shlex.split(f"{command} small.yaml --save-interval 2 --checkpoint-dir {number}"), here)
        assert ended.code == 0 and bool(ended.out) == ("--headless" in command)
        assert list(files(here / str(number))) == [2, 4, 6]
        assert files(here / str(number)) == files(here / "0")


# --- which stay -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "flag", "kept"),
    [
        (None, "", list(range(3, 13))),
        (3, "", [10, 11, 12]),
        (0, "", list(range(1, 13))),
        (3, "--max-checkpoints 0", list(range(1, 13))),
        (0, "--max-checkpoints 2", [11, 12]),
        (None, "--max-checkpoints 11", list(range(2, 13))),
    ],
)
def test_the_ten_most_recent_stay_or_as_many_as_the_key_or_before_it_the_flag_says_and_0_keeps_all(
    here: Path, oxidizr: Shell, key: int | None, flag: str, kept: list[int]
) -> None:
    with_keys(here, save_interval=1, max_checkpoints=key)
    oxidizr(f"-f small.yaml --max-steps 12 {flag}")
    assert tiny.steps_in(here / "checkpoints") == kept


# --- how a run goes on ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["f32", "bf16"])  # bf16 rounds by random bits: of which nothing is stored
@pytest.mark.parametrize("wish", ["auto", "checkpoints/step_4.safetensors"])
def test_a_run_goes_on_exactly_where_it_left_off_metrics_included(here: Path, oxidizr: Shell, wish: str, dtype: str) -> None:
    base = f"-f small.yaml --headless --save-interval 2 --dtype {dtype} --set lr_schedule=cosine --set eval_fraction=0.2"
    whole = oxidizr(f"{base} --checkpoint-dir whole")
    oxidizr(base, -9, "logged:5")
    assert tiny.steps_in(here / "checkpoints") == [2, 4]
    ended = oxidizr(f"{base} --resume {wish}")
    assert begins_at(ended) == 4
    assert ended.records == whole.records[4:]
    assert files(here / "checkpoints") == files(here / "whole")
    assert tiny.metrics_of(here / "checkpoints") == tiny.metrics_of(here / "whole")


def test_auto_means_the_most_recent_one_in_the_config_s_directory_and_a_fresh_start_where_there_is_none(
    here: Path, oxidizr: Shell
) -> None:
    with_keys(here, checkpoint_dir="runs/mine", save_interval=3)
    assert "runs/mine holds no step files; starting at step 0" in oxidizr("-f small.yaml --resume auto").err
    assert begins_at(oxidizr("-f small.yaml --resume auto --max-steps 12 --headless")) == 6
    assert begins_at(oxidizr("-f small.yaml --resume auto --max-steps 13 --headless")) == 12, "by number, not by name"


SMALL = {
    "hidden_size": 16,
    "num_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 260,
    "max_seq_len": 8,
}
SMALL_MLA = {"kv_latent_dim": 8, "q_latent_dim": 8, "d_rope": 4}
SMALL_MAMBA = {"mamba2_num_heads": 2, "mamba2_head_dim": 16, "mamba2_state_size": 8, "mamba2_chunk_size": 4}
PURE = {**SMALL, "num_layers": 1, "mamba_layers": [0], **SMALL_MAMBA}
HYBRID = {**SMALL, "num_layers": 2, "mamba_layers": [0], **SMALL_MLA, **SMALL_MAMBA}
#: What makes each model of oxidizr's documentation, and our Llama, small. Its kinds of layers stay what they are.
BUNDLED: dict[str, dict[str, Any]] = {
    "nano-start": HYBRID,
    "llama-start": {**SMALL, "num_layers": 1, "kv_heads": 1},
    "baseline": {**SMALL, "num_layers": 1, "kv_heads": 1},
    "nano": HYBRID,
    "nano_mamba2": PURE,
    "nano_mamba3": PURE,
    "nano_mamba3_hybrid": HYBRID,
    "nano_mamba3_mimo": PURE,
}


#: Those of every day; the others are among the long tests.
QUICK = ("nano-start", "nano", "llama-start", "nano_mamba3_mimo")


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.long]) for name in BUNDLED])
def test_a_bundled_model_goes_on_from_a_file_and_from_auto(here: Path, oxidizr: Shell, name: str) -> None:
    keys = [f"--set model.{key}={json.dumps(value)}" for key, value in BUNDLED[name].items()]
    steps = "--max-steps 6 --save-interval 2 --batch-size 1 --grad-accum 2 --set trainer.eval_fraction=0"
    base = f"-f {name} --headless {shlex.join(shlex.split(' '.join(keys)))} {steps} --set trainer.log_interval=1"
    oxidizr(f"{base} --checkpoint-dir whole")
    directory = here / load_config(name).trainer.checkpoint_dir
    oxidizr(base, -9, "renaming:6")
    assert begins_at(oxidizr(f"{base} --resume {directory}/step_2.safetensors", -9, "logged:5")) == 2
    assert begins_at(oxidizr(f"{base} --resume auto")) == 4
    assert files(directory) == files(here / "whole") and len(files(directory)) == 3


# --- what a file holds ------------------------------------------------------------------------------------------------


def test_a_file_holds_weights_optimizer_state_and_the_step_and_needs_no_random_number_state(
    here: Path, oxidizr: Shell
) -> None:
    oxidizr("-f small.yaml --max-steps 4")
    header = format.read_header(here / "checkpoints" / "step_4.safetensors")
    weights = {name for name, _ in LanguageModel(load_config(here / "small.yaml").model, seed=None).named_parameters()}
    slots = {f"optimizer.{slot}.{name}" for slot in ("exp_avg", "exp_avg_sq") for name in weights}
    assert {entry.name for entry in header.entries} == weights | slots, "nothing else: no rng.* among them"
    assert json.loads(header.metadata["progress"])["step"] == 4
    assert json.loads(header.metadata["config"])["trainer"]["seed"] == 0, "what all random numbers are functions of"


# --- backups, branches, deletions -------------------------------------------------------------------------------------


def test_a_renamed_copy_is_a_backup_that_needs_nothing_beside_it(here: Path, oxidizr: Shell) -> None:
    base = "-f small.yaml --headless --save-interval 2"
    oxidizr(base)
    before = files(here / "checkpoints")
    (here / "backup").mkdir()
    shutil.copy(here / "checkpoints" / "step_4.safetensors", here / "backup" / "model_v1.safetensors")
    shutil.rmtree(here / "checkpoints")
    ended = oxidizr(f"{base} --resume backup/model_v1.safetensors")
    assert begins_at(ended) == 4 and [record["step"] for record in ended.records] == [5, 6]
    assert files(here / "checkpoints") == {step: before[step] for step in (4, 6)}
    assert [path.name for path in (here / "backup").iterdir()] == ["model_v1.safetensors"], "left as it was"


def test_a_file_is_saved_before_the_learning_rate_changes_and_both_ways_on_stay_open(here: Path, oxidizr: Shell) -> None:
    """Save now (a file named SAVE), keep a copy, go on with another rate; the copy still goes on with the old one."""
    base = "-f small.yaml --headless --save-interval 6"
    oxidizr(f"{base} --checkpoint-dir whole")
    oxidizr(base, 130, "SAVE:3,SIGINT:4")
    assert tiny.steps_in(here / "checkpoints") == [3, 4]
    shutil.copy(here / "checkpoints" / "step_3.safetensors", here / "before_the_change.safetensors")
    ended = oxidizr(f"{base} --resume checkpoints/step_3.safetensors --set trainer.learning_rate=5e-3")
    assert begins_at(ended) == 3
    assert "config changed at step 3: trainer.learning_rate 0.01 → 0.005" in ended.err
    assert files(here / "checkpoints")[6] != files(here / "whole")[6]
    oxidizr(f"{base} --resume before_the_change.safetensors --checkpoint-dir again")
    assert files(here / "again")[6] == files(here / "whole")[6]


def test_an_older_step_is_resumed_while_newer_ones_exist_and_none_is_lost(here: Path, oxidizr: Shell) -> None:
    base = "-f small.yaml --headless --save-interval 2"
    oxidizr(base)
    before = files(here / "checkpoints")
    ended = oxidizr(f"{base} --resume checkpoints/step_2.safetensors --set trainer.weight_decay=0.5", 143, "SIGTERM:5")
    assert begins_at(ended) == 2 and "moved step_4, step_6 and their metrics to checkpoints/superseded" in ended.err
    assert files(here / "checkpoints" / "superseded" / "1") == {step: before[step] for step in (4, 6)}
    assert begins_at(oxidizr(f"{base} --resume auto --set trainer.weight_decay=0.5")) == 5, "never back on the old branch"


@pytest.mark.parametrize(
    ("deleted", "begin"),
    [
        (["step_2.safetensors"], 4),
        (["step_4.safetensors"], 2),
        (["metrics.jsonl", "config.json", "run.json"], 4),
        (["step_2.safetensors", "step_4.safetensors"], 0),
    ],
)
def test_files_deleted_by_hand_between_two_runs_are_no_problem(
    here: Path, oxidizr: Shell, deleted: list[str], begin: int
) -> None:
    base = "-f small.yaml --headless --save-interval 2"
    oxidizr(f"{base} --checkpoint-dir whole")
    oxidizr(base, -9, "logged:5")
    for name in deleted:
        (here / "checkpoints" / name).unlink(missing_ok=True)
    ended = oxidizr(f"{base} --resume auto")
    assert [record["step"] for record in ended.records] == list(range(begin + 1, 7))
    assert begin == 0 or begins_at(ended) == begin
    whole = files(here / "whole")
    assert files(here / "checkpoints") == {
        s: whole[s] for s in (2, 4, 6) if s > begin or f"step_{s}.safetensors" not in deleted
    }


# --- when something is wrong ------------------------------------------------------------------------------------------


def test_a_checkpoint_that_is_not_found_is_told_with_those_that_are_there(here: Path, oxidizr: Shell) -> None:
    oxidizr("-f small.yaml --save-interval 2")
    before = tiny.snapshot(here)
    for wrong, there in {
        "checkpoints/step_5.safetensors": "checkpoints holds step_2, step_4, step_6",
        "checkpoint/step_4.safetensors": "checkpoints holds step_2, step_4, step_6",
        "step_4.safetensors": "holds no step files",
    }.items():
        message = the_error(oxidizr(f"-f small.yaml --resume {wrong}", 2))
        assert f"--resume {wrong}: no such file" in message and there in message
    assert tiny.snapshot(here) == before


@pytest.mark.parametrize(
    ("change", "code", "named"),
    [
        ("--set trainer.learning_rate=2e-2", 0, "trainer.learning_rate 0.01 → 0.02"),
        ("--batch-size 3", 0, "trainer.batch_size 2 → 3"),
        ("--set model.rope_theta=5000", 2, "model.rope_theta 10000.0 → 5000.0"),
        ("--seq-len 4", 2, "model.max_seq_len 8 → 4"),
        ("--seed 7", 2, "trainer.seed 0 → 7"),
        ("-d other.txt", 2, "other data: 400 tokens of SHA-256"),
        ("--dtype bf16", 2, "model.dtype f32 → bf16"),
    ],
)
def test_a_resume_that_would_give_different_results_is_refused_or_told_naming_what_differs(
    here: Path, oxidizr: Shell, change: str, code: int, named: str
) -> None:
    tiny.write_text(here / "other.txt", 400, seed=1)
    oxidizr("-f small.yaml --max-steps 4")
    ended = oxidizr(f"-f small.yaml --resume auto {change}", code)
    told = [line for line in ended.err.splitlines() if "→" in line]
    assert len(told) == 1 and named in told[0]
    assert told[0].startswith("error: ") == bool(code)
    if code == 0:
        assert "--strict" in the_error(
            oxidizr(f"-f small.yaml --resume checkpoints/step_4.safetensors --strict {change}", 2)
        )


def test_a_full_disk_is_told_with_what_helps_and_costs_nothing_that_was_saved(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """There is room for two files. The advice: a larger save_interval, fewer checkpoints, bf16. Then it goes on."""
    monkeypatch.chdir(here)
    base = ["train", "-f", "small.yaml", "--headless", "--save-interval", "2"]
    assert tiny.cli(*base, "--checkpoint-dir", "whole") == 0
    room = [5 * (here / "whole" / "step_2.safetensors").stat().st_size // 2]
    write = disk.write_at

    def write_while_there_is_room(descriptor: int, data: disk.Buffer, offset: int) -> None:
        room[0] -= len(data)
        if room[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(descriptor, data, offset)

    capsys.readouterr()
    with monkeypatch.context() as full:
        full.setattr(disk, "write_at", write_while_there_is_room)
        assert tiny.cli(*base) == 1
    err = capsys.readouterr().err
    (last,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "No space left on device" in last and "earlier files are whole" in last
    assert all(advice in last for advice in ("larger save_interval", "fewer --max-checkpoints", "--dtype bf16"))
    assert err.count("training goes on") >= 1, "a save that fails does not end the run"
    whole = files(here / "whole")
    assert files(here / "checkpoints") == {2: whole[2], 4: whole[4]}
    assert not list((here / "checkpoints").glob("*.tmp")) + list((here / "checkpoints").glob(".*.tmp"))
    assert tiny.cli(*base, "--resume", "auto") == 0
    assert files(here / "checkpoints") == whole


def test_bf16_halves_the_weights_in_a_file_and_leaves_the_moments_their_precision(here: Path, oxidizr: Shell) -> None:
    sizes: dict[str, dict[str, int]] = {}
    for dtype in ("f32", "bf16"):
        oxidizr(f"-f small.yaml --max-steps 1 --dtype {dtype} --checkpoint-dir {dtype}")
        path = here / dtype / "step_1.safetensors"
        sizes[dtype] = {"file": path.stat().st_size, "weights": 0, "moments": 0}
        for entry in format.read_header(path).entries:
            kind = "moments" if entry.name.startswith("optimizer.") else "weights"
            sizes[dtype][kind] += entry.end - entry.begin
            assert entry.dtype == ("float32" if kind == "moments" else {"f32": "float32", "bf16": "bfloat16"}[dtype])
    f32, bf16 = sizes["f32"], sizes["bf16"]
    assert bf16["weights"] * 2 == f32["weights"]
    assert bf16["moments"] == f32["moments"] == 2 * f32["weights"]
    assert abs((f32["file"] - bf16["file"]) - f32["weights"] // 2) <= 64, "but for the padding, all that is gained"
    assert 0.82 < bf16["file"] / f32["file"] < 0.9, "a sixth less, and the header"


class _Listener(Reporter):
    """Notes what the run predicts at its start."""

    predicted = 0

    def begin(self, trainer: Trainer) -> None:
        self.predicted = trainer.file_size


SIZES = {"0.1 MB": "16", "1.5 MB": "128", "6 MB": "512"}


@pytest.mark.parametrize("hidden", SIZES.values(), ids=SIZES.keys())
def test_the_size_of_a_file_is_told_at_the_start_beside_the_free_disk_to_within_a_percent(
    here: Path, oxidizr: Shell, hidden: str
) -> None:
    err = oxidizr(f"-f small.yaml --max-steps 1 --set model.hidden_size={hidden} --set model.intermediate_size=16").err
    (line,) = [line for line in err.splitlines() if line.startswith("checkpoints: ")]
    told, _, free = (_bytes(*size) for size in re.findall(r"([0-9.]+) ([kMGTP]?B)\b", line))
    size = (here / "checkpoints" / "step_1.safetensors").stat().st_size
    assert err.index(line) < err.index("saved "), "before anything is trained"
    assert abs(told - size) < 0.01 * size
    assert line.endswith(" free") and free / 2 < disk.free_bytes(here) < free * 2


def _bytes(number: str, unit: str) -> float:
    return float(number) * 1000.0 ** ["B", "kB", "MB", "GB", "TB", "PB"].index(unit)


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16", "f64"])
def test_the_predicted_size_is_the_size_to_within_a_percent_for_every_dtype(here: Path, dtype: str) -> None:
    config = load_config(here / "small.yaml", [f"model.dtype={dtype}", f"trainer.checkpoint_dir={here}/c", "max_steps=1"])
    listener = _Listener()
    Trainer(config, LanguageModel(config.model, 0), reporter=listener).fit()
    size = (here / "c" / "step_1.safetensors").stat().st_size
    assert abs(listener.predicted - size) < 0.01 * size


@pytest.mark.parametrize("missing", [0, 1])
def test_files_that_will_not_fit_the_disk_are_warned_of_before_the_run(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], missing: int
) -> None:
    """Two files are kept, and a third is written before the first one goes: room for three is enough, a byte less is not."""
    monkeypatch.chdir(here)
    argv = ["train", "-f", "small.yaml", "--headless", "--save-interval", "1", "--max-checkpoints", "2"]
    assert tiny.cli(*argv, "--checkpoint-dir", "first") == 0
    size = (here / "first" / "step_6.safetensors").stat().st_size
    capsys.readouterr()
    monkeypatch.setattr(report, "free_bytes", lambda _: 3 * size - missing)
    assert tiny.cli(*argv) == 0, "a warning is no refusal"
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == missing
    assert all(
        advice in line for line in warnings for advice in ("larger save_interval", "--max-checkpoints", "--dtype bf16")
    )
