"""The promise (design.md 1.1): a step file's bytes depend on config, seed and data, and on nothing else.

The runs in other processes train 14 steps with small tiles, so that every tiled operation has at least three; they cross
epochs, clip, warm up and decay the learning rate, and accumulate three micro-batches. They are made twice: with the BLAS
core of this CPU, and with another one, where mistakes show that this CPU hides. The default suite makes all of them for a
Llama, and a few shorter ones for every other kind of model (`tiny.WIDE`); the rest are among the long tests.
"""

from __future__ import annotations

import itertools
import json
import platform
import random
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import tiny

from oxidizr_ref import parallel
from oxidizr_ref.checkpoint import format
from oxidizr_ref.config import load_config
from oxidizr_ref.model import LanguageModel
from oxidizr_ref.run import RunOptions
from oxidizr_ref.trainer import Trainer

STEPS = 14
TRAINER = {
    "max_steps": STEPS,
    "batch_size": 5,
    "gradient_accumulation": 3,
    "lr_schedule": "cosine",
    "warmup_steps": 4,
    "max_grad_norm": 0.5,
    "eval_fraction": 0.1,
    "save_interval": 2,
}
THREADS = (1, 2, 3, 5, 8)
#: The models whose full set of runs takes too long for every day.
OTHERS = tuple(name for name in tiny.WIDE if name != "llama")


def architectures() -> set[str]:
    return {str(library.get("architecture")).lower() for library in parallel.blas_info()}


#: A BLAS core that every x86-64 CPU of the last ten years has, and that this process does not use.
OTHER_CORE = "HASWELL" if "haswell" not in architectures() else "SANDYBRIDGE"
other_core = pytest.mark.skipif(
    not any(library["internal_api"] == "openblas" for library in parallel.blas_info()) or platform.machine() != "x86_64",
    reason="only OpenBLAS on x86-64 lets the environment choose a core",
)


@dataclass
class Machine:
    """A BLAS core and the run on it that all others are compared with: one go, one thread, nothing read ahead."""

    root: Path
    architecture: str
    env: dict[str, str]
    run: tiny.Run = field(init=False)
    output: str = field(init=False)

    def __post_init__(self) -> None:
        self.run = tiny.make_run(self.root, tiny.WIDE[self.architecture], TRAINER, characters=6000)
        process = tiny.start(self.run.argv("--threads", 1, "--prefetch", 0), self.root, self.env, small_tiles=True)
        self.output = tiny.finish(process)[0]

    @property
    def files(self) -> dict[int, str]:
        return tiny.step_files(self.run.directory)


def environment_of(core: str) -> dict[str, str]:
    return {} if core == "native" else {"OPENBLAS_CORETYPE": core}


MACHINES = [
    pytest.param((name, core), id=f"{name}-{core}", marks=[*([pytest.mark.long] if name in OTHERS else []), *marks])
    for name in tiny.WIDE
    for core, marks in (("native", []), (OTHER_CORE, [other_core, pytest.mark.thorough]))
]


@pytest.fixture(scope="module", params=MACHINES)
def machine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Machine:
    architecture, core = request.param
    return Machine(tmp_path_factory.mktemp(f"{architecture}-{core}"), architecture, environment_of(core))


# ------------------------------------------------------------------------------------------------- in other processes


def test_the_run_spans_what_a_determinism_test_must_span(machine: Machine) -> None:
    records = [json.loads(line) for line in machine.output.splitlines()]
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    assert records[-1]["epoch"] > 2, "crosses epochs"
    assert any(int(a["epoch"]) < int(b["epoch"]) and b["epoch"] % 1 for a, b in itertools.pairwise(records))
    assert max(record["grad_norm"] for record in records) > TRAINER["max_grad_norm"], "clips"
    rates = [record["learning_rate"] for record in records]
    assert rates[0] < rates[2] < max(rates) > rates[8] > rates[-1], "warms up and decays"
    assert machine.run.steps() == list(range(2, STEPS + 1, 2))


def test_threads_prefetch_intervals_directories_output_and_environment_change_no_byte(machine: Machine) -> None:
    elsewhere = machine.root / "elsewhere"
    elsewhere.mkdir()
    loud = [
        argument for argument in machine.run.into("loud").argv("--threads", 2, "--prefetch", 3) if argument != "--headless"
    ]
    relative = ["-f", "../tiny.yaml", "--headless", "--checkpoint-dir", "here/and/there", "--threads", "3"]
    rare = machine.run.into("rare").argv("--threads", 5, "--save-interval", 4, "--prefetch", 1)
    evaluated = ["--set", "trainer.eval_interval=3", "--set", "trainer.log_interval=2"]
    few = machine.run.into("few").argv("--threads", 8, "--max-checkpoints", 2, *evaluated)
    runs = [
        (loud, machine.root, {"PYTHONHASHSEED": "1"}),
        (relative, elsewhere, {"PYTHONHASHSEED": "2", "TZ": "Asia/Tokyo", "HOME": "/nonexistent"}),
        (rare, machine.root, {"OMP_NUM_THREADS": "3", "OPENBLAS_NUM_THREADS": "4"}),
        (few, elsewhere, {"LC_ALL": "C", "PYTHONUNBUFFERED": "1"}),
    ]
    processes = [tiny.start(argv, cwd, {**machine.env, **env}, small_tiles=True) for argv, cwd, env in runs]
    outputs = [tiny.finish(process)[0] for process in processes]

    assert outputs[0] == "", "without --headless nothing is on stdout"
    there = elsewhere / "here" / "and" / "there"
    assert tiny.step_files(machine.root / "loud") == machine.files
    assert tiny.step_files(there) == machine.files
    assert tiny.step_files(machine.root / "rare") == {step: machine.files[step] for step in (4, 8, 12, 14)}
    assert tiny.step_files(machine.root / "few") == {step: machine.files[step] for step in (12, 14)}
    whole = machine.run.metrics()
    assert whole[-1].pop("final") is True
    for directory in (machine.root / "loud", there, machine.root / "rare"):
        assert tiny.metrics_of(directory)[:-1] == whole[:-1]
    logged = [{k: v for k, v in line.items() if k != "eval_loss"} for line in tiny.metrics_of(machine.root / "few")[:-1]]
    assert logged == [line for line in whole[:-1] if line["step"] % 2 == 0 or line["step"] % 3 == 0 or line["step"] == 1]


def test_sigkill_at_three_moments_and_resume_auto_change_no_byte(machine: Machine) -> None:
    run = machine.run.into("killed")
    argv = run.argv("--resume", "auto", "--threads", 2, "--prefetch", 2)
    # (the moment of death, the step it starts from, the last step it logs)
    lives = [("logged:5", 0, 5), ("renaming:8", 4, 8), ("accumulating:12", 6, 11), ("", 10, STEPS)]
    for number, (moment, first, last) in enumerate(lives):
        env = {**machine.env, "PYTHONHASHSEED": str(number), **({"TINY_KILL": moment} if moment else {})}
        process = tiny.start(argv, machine.root, env, small_tiles=True)
        out, err = tiny.finish(process, -signal.SIGKILL if moment else 0)
        assert [json.loads(line)["step"] for line in out.splitlines()] == list(range(first + 1, last + 1))
        resumed = f"resumed {run.path(first)} at step {first}"
        assert (resumed if first else "holds no step files; starting at step 0") in err
        if moment == "renaming:8":
            assert 8 not in run.steps() and list(run.directory.glob(".step_8.safetensors.*.tmp")), "died while saving"
    assert tiny.step_files(run.directory) == machine.files
    assert run.metrics() == machine.run.metrics()
    assert [path.name for path in run.directory.glob(".*")] == [".lock"], "what the dead writer left is gone"
    assert not (run.directory / "superseded").exists()


@other_core
@pytest.mark.parametrize(
    "architecture",
    [pytest.param(name, marks=[] if name == "mamba2_mla_moe" else [pytest.mark.long]) for name in OTHERS],
)
def test_sigkill_resume_and_threads_change_no_byte_of_any_kind_of_model(tmp_path: Path, architecture: str) -> None:
    """On the BLAS core that hides less; the other core, and more than this, are among the long tests."""
    env = environment_of(OTHER_CORE)
    run = tiny.make_run(tmp_path, tiny.WIDE[architecture], {**TRAINER, "max_steps": 4, "warmup_steps": 2}, characters=6000)
    broken = run.into("broken").argv("--resume", "auto", "--threads", 3, "--prefetch", 2)
    whole = tiny.start(run.argv("--threads", 1, "--prefetch", 0), tmp_path, env, small_tiles=True)
    killed = tiny.start(broken, tmp_path, {**env, "TINY_KILL": "logged:3"}, small_tiles=True)
    tiny.finish(whole)
    tiny.finish(killed, -signal.SIGKILL)
    out, err = tiny.finish(tiny.start(broken, tmp_path, env, small_tiles=True))
    assert f"resumed {run.into('broken').path(2)} at step 2" in err
    assert [json.loads(line)["step"] for line in out.splitlines()] == [3, 4]
    files = tiny.step_files(run.directory)
    assert sorted(files) == [2, 4]
    assert tiny.step_files(tmp_path / "broken") == files
    assert tiny.metrics_of(tmp_path / "broken") == run.metrics()


@pytest.mark.thorough
@other_core
def test_another_blas_core_is_another_machine_class(tmp_path: Path) -> None:
    run = tiny.make_run(tmp_path, trainer={"max_steps": 1, "eval_fraction": 0})
    processes = [
        tiny.start(run.into(name).argv(), tmp_path, env)
        for name, env in (("native", {}), ("again", {}), ("other", {"OPENBLAS_CORETYPE": OTHER_CORE}))
    ]
    for process in processes:
        tiny.finish(process)
    prints = [
        json.loads(format.read_header(run.into(name).path(1)).metadata["fingerprint"])
        for name in ("native", "again", "other")
    ]
    assert prints[0] == prints[1] != prints[2]
    assert {key for key in prints[0] if prints[0][key] != prints[2][key]} <= {"blas", "probe"}
    assert OTHER_CORE.lower() in str(prints[2]["blas"]).lower()


# ---------------------------------------------------------------------------------------------------- in this process


def trainer_of(run: tiny.Run, **options: Any) -> Trainer:
    config = load_config(run.config, [f"trainer.checkpoint_dir={run.directory}"])
    return Trainer(config, LanguageModel(config.model, config.trainer.seed), options=RunOptions(**options))


def small_tiles_of(root: Path, architecture: str) -> dict[str, int]:
    """The most tiles each function cuts its work into in a step of the runs above."""
    run = tiny.make_run(root, tiny.WIDE[architecture], {**TRAINER, "max_steps": 1}, characters=6000)
    with pytest.MonkeyPatch.context() as patch:
        tiny.shrink_tiles(patch.setattr)
        with tiny.counting_tiles() as counts:
            trainer_of(run).fit()
    return counts


def test_every_tiled_operation_has_three_tiles_in_the_runs_above(tmp_path: Path) -> None:
    counts = {name: small_tiles_of(tmp_path / name, name) for name in tiny.WIDE}
    expected = tiny.tiled_functions()
    assert expected, "the source was searched"
    assert set[str]().union(*counts.values()) == expected
    assert {(name, f): n for name, found in counts.items() for f, n in found.items() if n < 3} == {}


@pytest.mark.thorough
@pytest.mark.parametrize("architecture", OTHERS)
def test_threads_change_no_byte_of_any_kind_of_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str
) -> None:
    tiny.shrink_tiles(monkeypatch.setattr)
    run = tiny.make_run(tmp_path, tiny.WIDE[architecture], {**TRAINER, "max_steps": 1}, characters=6000)
    states = []
    for count in THREADS:
        with tiny.threads(count):
            trainer_of(run.into(f"threads_{count}")).fit()
        states.append(tiny.step_files(tmp_path / f"threads_{count}"))
    assert sorted(states[0]) == [1]
    assert all(state == states[0] for state in states[1:])


@pytest.mark.thorough
@pytest.mark.parametrize(
    "architecture", [pytest.param(name, marks=[pytest.mark.long] if name in OTHERS else []) for name in tiny.WIDE]
)
def test_threads_change_no_byte_with_the_package_s_own_tile_sizes(tmp_path: Path, architecture: str) -> None:
    wide = {**tiny.WIDE[architecture], "vocab_size": 24576, "max_seq_len": 264, "mamba2_chunk_size": 64}
    if "d_rope" in wide:  # MLA rotates few numbers a head: with these its rotation has three tiles as well
        wide["d_rope"] = 32
    trainer = {"max_steps": 1, "batch_size": 16, "gradient_accumulation": 2}
    run = tiny.make_run(tmp_path, wide, trainer, {"path": "random"})
    states = []
    with tiny.counting_tiles() as counts:
        for count in THREADS:
            with tiny.threads(count):
                trainer_of(run.into(f"threads_{count}")).fit()
            states.append(tiny.step_files(tmp_path / f"threads_{count}"))
    assert len(states[0]) == 1
    assert all(state == states[0] for state in states[1:])
    assert counts.keys() == small_tiles_of(tmp_path / "small", architecture).keys()
    assert {name: count for name, count in counts.items() if count < 3} == {}


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16", "f64"])
def test_resuming_from_any_step_gives_the_bytes_of_one_go(tmp_path: Path, dtype: str) -> None:
    trainer = {"max_steps": 6, "lr_schedule": "linear", "warmup_steps": 2, "save_interval": 1}
    run = tiny.make_run(tmp_path, {"dtype": dtype}, trainer, characters=150)
    trainer_of(run).fit()
    whole = tiny.step_files(run.directory)
    assert sorted(whole) == [1, 2, 3, 4, 5, 6]
    for step in range(1, 6):
        again = run.into(f"from_{step}")
        resumed = trainer_of(again, resume=str(run.path(step)))
        resumed.fit()
        assert tiny.step_files(again.directory) == {later: whole[later] for later in range(step, 7)}


def test_evaluating_and_logging_leave_no_trace(tmp_path: Path) -> None:
    base = {"max_steps": 4, "eval_fraction": 0.2, "save_interval": 4}
    quiet = tiny.make_run(tmp_path / "quiet", trainer={**base, "log_interval": 100})
    busy = tiny.make_run(tmp_path / "busy", trainer={**base, "eval_interval": 1})
    for run in (quiet, busy):
        trainer_of(run).fit()
    assert tiny.step_files(quiet.directory) == tiny.step_files(busy.directory) != {}


@pytest.mark.parametrize("key", ["trainer.seed=1", "trainer.learning_rate=2e-2", "trainer.shuffle=false", "data"])
def test_another_config_seed_or_data_gives_other_bytes(tmp_path: Path, key: str) -> None:
    run = tiny.make_run(tmp_path, trainer={"max_steps": 1})
    assert run.train() == 0
    if key == "data":
        tiny.write_text(run.text, 3000, seed=1)
    assert run.into("other").train(*(() if key == "data" else ("--set", key))) == 0
    assert tiny.step_files(run.directory) != tiny.step_files(tmp_path / "other") != {}


# ------------------------------------------------------------------------------------------------------------- longer


@pytest.mark.long
@pytest.mark.parametrize("core", ["native", pytest.param(OTHER_CORE, marks=[other_core, pytest.mark.thorough])])
def test_nano_start_survives_random_kills_byte_for_byte(tmp_path: Path, core: str) -> None:
    """`--max-steps 60` in one go, and with SIGKILL at three random moments and `--resume auto` after each."""
    env = {} if core == "native" else {"OPENBLAS_CORETYPE": core}
    seed = random.SystemRandom().randrange(2**32)
    print(f"the kills are those of random.Random({seed})")
    source = random.Random(seed)

    def argv(name: str, *flags: object) -> list[str]:
        base = ["-f", "nano-start", "--max-steps", 60, "--target-device", "cpu", "--checkpoint-dir", tmp_path / name]
        keep = ["--max-checkpoints", 0, "--set", "trainer.log_interval=1"]
        return [str(part) for part in (*base, *keep, *flags)]

    began = time.monotonic()
    tiny.finish(tiny.start(argv("whole", "--save-interval", 10, "--headless", "--threads", 1), tmp_path, env))
    seconds = time.monotonic() - began
    whole = tiny.step_files(tmp_path / "whole")
    assert sorted(whole) == [10, 20, 30, 40, 50, 60]

    broken = argv("broken", "--save-interval", 10, "--headless", "--resume", "auto")
    for _ in range(3):
        process = tiny.start(broken, tmp_path, env)
        before = max(tiny.steps_in(tmp_path / "broken"), default=0) if (tmp_path / "broken").is_dir() else 0
        time.sleep(source.uniform(0.1, 0.28) * seconds)
        process.kill()
        out, err = process.communicate()
        assert process.returncode == -signal.SIGKILL, "the kill came too late"
        steps = [json.loads(line)["step"] for line in out.splitlines() if line.endswith("}")]
        assert steps == list(range(before + 1, before + 1 + len(steps)))
        assert not before or not steps or f"at step {before}" in err
    tiny.finish(tiny.start(broken, tmp_path, env))
    assert tiny.step_files(tmp_path / "broken") == whole
    assert tiny.metrics_of(tmp_path / "broken") == tiny.metrics_of(tmp_path / "whole")

    for name, flags in {
        "two": ("--threads", 2, "--prefetch", 3, "--save-interval", 20),
        "three": ("--threads", 3, "--prefetch", 0, "--save-interval", 10, "--headless"),
        "five": ("--threads", 5, "--save-interval", 30, "--headless"),
        "eight": ("--threads", 8, "--prefetch", 3, "--save-interval", 10),
    }.items():
        tiny.finish(tiny.start(argv(name, *flags), tmp_path, env))
        files = tiny.step_files(tmp_path / name)
        assert files and files == {step: whole[step] for step in files}
        assert tiny.metrics_of(tmp_path / name) == tiny.metrics_of(tmp_path / "whole")
