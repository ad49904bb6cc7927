"""Training on a device, from the command line to the bytes of a checkpoint: on the stand-in, and on CuPy where it runs."""

# ruff: noqa: ARG001 - the fixture gpu says where a test computes, named or not

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import devices
import numpy as np
import pytest
import stand_in
import tiny

from oxidizr_ref import checkpoint, loss_scale, memory
from oxidizr_ref.autograd import no_grad
from oxidizr_ref.backend import module_of, to_host
from oxidizr_ref.config import load_config
from oxidizr_ref.errors import TrainingError
from oxidizr_ref.generation import generate
from oxidizr_ref.memory_now import resident_bytes
from oxidizr_ref.model import LanguageModel
from oxidizr_ref.run import RunOptions
from oxidizr_ref.sampling import Sampling
from oxidizr_ref.trainer import Trainer

#: Models that between them have every kind of layer, the smallest of their kind.
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mla_moe": {"kv_latent_dim": 6, "q_latent_dim": 8, "d_rope": 4, "num_experts": 3, "shared_expert_enabled": True},
    "mamba1": {"mamba_layers": [0], "mamba_d_state": 4},
    "mamba2": {"mamba_layers": [0], "mamba2_num_heads": 4, "mamba2_state_size": 4, "mamba2_chunk_size": 4},
    "mamba3": {
        "mamba_layers": [0],
        "mamba2_num_heads": 4,
        "mamba2_state_size": 8,
        "mamba2_chunk_size": 4,
        "mamba3_enabled": True,
        "mamba3_mimo_rank": 2,
        "mamba3_use_conv": True,
    },
}
SHORT = {"max_steps": 8, "save_interval": 4, "log_interval": 3, "lr_schedule": "cosine", "eval_fraction": 0.2}
pytestmark = pytest.mark.thorough

#: Ways to store weights and moments.
STORED = [("f32", "f32"), ("bf16", "f32"), ("bf16", "bf16"), ("f16", "f32")]


@pytest.fixture(params=["stand-in", pytest.param("cupy", marks=pytest.mark.gpu)])
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A CUDA device, or the stand-in for one."""
    with devices.computing_on(request.param, monkeypatch):
        yield request.param


def make_run(root: Path, model: str = "llama", dtype: str = "f32", moments: str = "f32", **trainer: Any) -> tiny.Run:
    return tiny.make_run(
        root, {**MODELS[model], "dtype": dtype}, {**SHORT, "optimizer_dtype": moments, **trainer}, characters=900
    )


def trainer_on(device: str, root: Path, model: str = "llama", dtype: str = "f32", **trainer: Any) -> Trainer:
    config = load_config(make_run(root, model, dtype, **trainer).config)
    return Trainer(config, LanguageModel(config.model, config.trainer.seed, device))


def weights_of(trainer: Trainer) -> dict[str, np.ndarray[Any, Any]]:
    return {name: to_host(p.data).copy() for name, p in trainer.model.named_parameters()}


# --- determinism ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "moments"), STORED)
def test_a_run_on_the_device_is_bit_identical_to_itself_also_when_it_was_interrupted(
    gpu: str, tmp_path: Path, dtype: str, moments: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path, "mla_moe", dtype, moments)
    assert run.train("--target-device", "gpu") == 0
    whole = tiny.step_files(run.directory)
    assert sorted(whole) == [4, 8]
    assert run.into("again").train("--target-device", "gpu", "--prefetch", 2, "--threads", 1) == 0
    assert tiny.step_files(run.root / "again") == whole
    parted = run.into("parted")
    with tiny.killed_after_step(6):
        parted.train("--target-device", "gpu")
    capsys.readouterr()
    assert parted.train("--target-device", "gpu", "--resume", "auto") == 0
    assert "at step 4" in capsys.readouterr().err
    assert tiny.step_files(parted.directory) == whole
    assert tiny.metrics_of(parted.directory) == tiny.metrics_of(run.directory)


@pytest.mark.parametrize("model", ["mamba1", "mamba2", "mamba3"])
def test_every_mamba_trains_to_the_same_bits_twice(gpu: str, tmp_path: Path, model: str) -> None:
    run = make_run(tmp_path, model)
    for name in ("first", "second"):
        assert run.into(name).train("--target-device", "gpu") == 0
    assert tiny.step_files(run.root / "first") == tiny.step_files(run.root / "second") != {}


def test_a_background_save_writes_the_bytes_of_a_save_that_is_waited_for(gpu: str, tmp_path: Path) -> None:
    for name, background in (("at_once", False), ("beside", True)):
        assert (
            make_run(tmp_path / name, dtype="bf16", async_save=background, save_interval=1).train("--target-device", "gpu")
            == 0
        )
    at_once, beside = (tiny.step_files(tmp_path / name / "checkpoints") for name in ("at_once", "beside"))
    assert at_once == beside and len(at_once) == 8


# --- the two devices --------------------------------------------------------------------------------------------------


def apart(a: dict[str, np.ndarray[Any, Any]], b: dict[str, np.ndarray[Any, Any]]) -> float:
    """max |a - b| / max |b|, of the worst array."""
    return max(float(np.abs(a[name] - b[name]).max() / np.abs(b[name]).max()) for name in b)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("dtype", "tolerance"), [("f64", 1e-12), ("f32", 2e-5)])
def test_loss_and_every_gradient_are_those_of_the_cpu(
    gpu: str, model: str, dtype: str, tolerance: float, tmp_path: Path
) -> None:
    """Sums of a few hundred products, in another order, through two layers: 1e3 roundings of 1e-16 or 6e-8 at most."""
    found: dict[str, tuple[float, dict[str, np.ndarray[Any, Any]]]] = {}
    for device in ("cpu", "gpu"):
        config = load_config(make_run(tmp_path / device, model, dtype).config)
        language_model = LanguageModel(config.model, 0, device)
        tokens, targets = np.random.default_rng(3).integers(0, 260, (2, 2, 8))
        loss = language_model.loss(tokens, targets, load_balance_alpha=0.1)
        loss.backward()
        gradients = {name: to_host(p.grad) for name, p in language_model.named_parameters() if p.grad is not None}
        found[device] = float(to_host(loss.data)), gradients
    assert found["gpu"][0] == pytest.approx(found["cpu"][0], rel=tolerance)
    assert found["gpu"][1].keys() == found["cpu"][1].keys()
    assert apart(found["gpu"][1], found["cpu"][1]) <= tolerance


@pytest.mark.parametrize("begun_on", ["cpu", "gpu"])
@pytest.mark.parametrize("dtype", ["f64", "bf16"])
def test_a_run_goes_on_on_the_other_device_which_is_said_and_kept_and_changes_rounding_alone(
    gpu: str, tmp_path: Path, begun_on: str, dtype: str, capsys: pytest.CaptureFixture[str]
) -> None:
    other = {"cpu": "gpu", "gpu": "cpu"}[begun_on]
    run = make_run(tmp_path, "mla_moe", dtype, log_interval=1)
    assert run.train("--target-device", begun_on, "--max-steps", 8) == 0
    moved = run.into("moved")
    with tiny.killed_after_step(5):
        moved.train("--target-device", begun_on)
    capsys.readouterr()
    assert moved.train("--target-device", other, "--resume", "auto") == 0
    told = capsys.readouterr().err
    assert f"device {begun_on} → {other}" in told and "another machine class than the checkpoint's, so other bits" in told
    (entry,) = tiny.lineage(moved.path(8))
    assert entry["step"] == 4
    stayed, went = (checkpoint.load(r.path(8)) for r in (run, moved))
    # In float64 the two devices differ by 1e-12 a step (above), which AdamW divides by gradients of 1e-4 and more; a bf16
    # weight that was rounded the other way is one unit, 2⁻⁷ of itself, off.
    tolerance = {"f64": 1e-8, "bf16": 2.0**-6}[dtype]
    for name, array in stayed.tensors.items():
        if not name.startswith("optimizer."):
            a, b = (x.astype(np.float64) for x in (went.tensors[name], array))
            assert np.abs(a - b).max() <= tolerance * np.abs(b).max(), name
    losses = [[line["loss"] for line in tiny.metrics_of(r.directory) if "loss" in line] for r in (run, moved)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-8 if dtype == "f64" else 1e-2)


def test_strict_refuses_the_other_device(gpu: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path)
    assert run.train("--target-device", "cpu") == 0
    assert run.train("--target-device", "gpu", "--resume", "auto", "--max-steps", 9, "--strict") == 2
    assert "--strict" in capsys.readouterr().err


def test_text_is_sampled_from_a_model_on_the_device_as_from_one_on_the_cpu(gpu: str, tmp_path: Path) -> None:
    config = load_config(make_run(tmp_path, "mla_moe", "f64").config)
    prompts = [np.array([3, 1, 4]), np.array([5])]
    cpu, there = (generate(LanguageModel(config.model, 5, device), prompts, Sampling(12)) for device in ("cpu", "gpu"))
    assert [sequence.tokens for sequence in cpu] == [sequence.tokens for sequence in there]


# --- waiting ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
def test_a_step_waits_for_the_device_only_where_it_is_logged_and_once_a_mixture_of_experts(
    model: str, tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch, devices.computing_on("stand-in", patch):
        trainer = trainer_on("gpu", tmp_path, model, log_interval=4, load_balance_alpha=0.1)
        of_experts = trainer.config.trainer.gradient_accumulation * sum(
            kind == "attention" for kind in trainer.config.model.layer_kinds if trainer.config.model.uses_moe
        )
        batches = trainer.batches()
        trainer.train_step(batches)
        for n in range(2, 9):
            with stand_in.counted() as counts:
                record = trainer.train_step(batches)
            assert counts().syncs == of_experts, n
            late = n - 1 not in (1, 4, 8)  # the step before was not logged: its numbers are looked at now
            assert counts().waits == late + (n % 4 == 0)
            assert record["step"] == (n if n % 4 == 0 else n - 1)


def test_a_step_that_goes_wrong_changes_nothing_and_is_named_a_step_late(gpu: str, tmp_path: Path) -> None:
    trainer = trainer_on("gpu", tmp_path, log_interval=100)
    batches = trainer.batches()
    for _ in range(3):
        trainer.train_step(batches)
    name, poisoned = next(iter(trainer.model.named_parameters()))
    poisoned.data[...] = np.nan
    before = weights_of(trainer)
    assert trainer.train_step(batches)["step"] == 3
    with pytest.raises(TrainingError, match="step 4: the loss is nan"):
        trainer.train_step(batches)
    after = weights_of(trainer)
    assert all(np.array_equal(after[n], before[n], equal_nan=n == name) for n in before)


# --- f16 --------------------------------------------------------------------------------------------------------------


def test_gradients_that_overflow_f16_are_skipped_the_scale_halved_and_the_run_goes_on(
    gpu: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_scale, "INITIAL_SCALE", 2.0**40)
    run = make_run(tmp_path, dtype="f16", log_interval=1, max_steps=60, save_interval=30)
    assert run.train("--target-device", "gpu") == 0
    lines = [line for line in run.metrics() if "loss" in line]
    scales = [line["loss_scale"] for line in lines]
    skipped = [line["grad_norm"] is None for line in lines]
    assert skipped[0] and not skipped[-1]
    for before, after, lost in zip(scales[:-1], scales[1:], skipped[:-1], strict=True):
        assert after == (before / 2 if lost else before)
    stored = json.loads(checkpoint.load(run.path(60)).metadata["progress"])["loss_scale"]
    assert stored["skipped"] == sum(skipped) and stored["scale"] == scales[-1] and stored["good_steps"] > 0
    parted = run.into("parted")
    assert parted.train("--target-device", "gpu", "--max-steps", 30) == 0
    assert parted.train("--target-device", "gpu", "--max-steps", 60, "--resume", "auto") == 0
    assert parted.metrics()[-2]["loss_scale"] == scales[-1]


def test_the_scale_is_doubled_after_many_good_steps(gpu: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_scale, "GROWTH_INTERVAL", 3)
    monkeypatch.setattr(loss_scale, "INITIAL_SCALE", 8.0)
    run = make_run(tmp_path, dtype="f16", log_interval=1)
    assert run.train("--target-device", "gpu") == 0
    assert [line["loss_scale"] for line in run.metrics() if "loss" in line] == [8.0] * 3 + [16.0] * 3 + [32.0] * 2


def test_a_skipped_update_leaves_every_bit_and_does_not_count_for_the_bias_correction(
    gpu: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_scale, "INITIAL_SCALE", 2.0**60)
    trainer = trainer_on("gpu", tmp_path, dtype="f16", log_interval=1)
    before, batches = weights_of(trainer), trainer.batches()
    assert trainer.train_step(batches)["grad_norm"] is None
    after = weights_of(trainer)
    assert all(np.array_equal(after[name], before[name]) for name in before)
    assert all(not to_host(v).any() for v in trainer.optimizer.state_dict().values())
    assert trainer.loss_scale is not None
    trainer.loss_scale.load({"scale": 1024.0, "good_steps": 0, "skipped": 1})
    trainer.train_step(batches)
    moved = max(float(np.abs(after[n].astype("f4") - w.astype("f4")).max()) for n, w in weights_of(trainer).items())
    # A first update of AdamW moves by the learning rate, if it counts as the first; as the second, by 0.74 of it.
    assert moved == pytest.approx(trainer.learning_rate(2), rel=0.05)


# --- memory -----------------------------------------------------------------------------------------------------------


def test_running_out_of_memory_ends_with_sizes_and_advice_and_leaves_the_last_checkpoint_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.MonkeyPatch.context() as patch, devices.computing_on("stand-in", patch):
        run = make_run(tmp_path, max_steps=4)
        assert run.train("--target-device", "gpu") == 0
        before = tiny.step_files(run.directory)
        pool = stand_in.get_default_memory_pool()
        gc.collect()  # or what earlier tests left in cycles would be counted, then freed, and make room
        pool.free_all_blocks()
        pool.set_limit(size=pool.used_bytes() + 900_000)
        capsys.readouterr()
        try:
            code = run.train("--target-device", "gpu", "--resume", "auto", "--max-steps", 9, "--batch-size", 64)
        finally:
            pool.set_limit(size=0)
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
        assert code == 1
        assert "out of memory on the gpu" in line and "allocating" in line and "this run needs about" in line
        assert "activations" in line and str(run.path(4)) in line and "--batch-size" in line
        assert tiny.step_files(run.directory) == before
        assert tiny.cli("verify", run.directory) == 0


@pytest.mark.parametrize("setting", ["seed=0", "model.max_seq_len=64", "model.dtype=bf16", "gradient_accumulation=4"])
@pytest.mark.parametrize(
    "model", ["tiny-llama", "tiny-mla-moe", "tiny-mamba1", "tiny-mamba2", "tiny-mamba3", "tiny-mamba3-mimo"]
)
def test_the_estimate_is_within_15_percent_of_what_the_pool_then_holds_at_most(model: str, setting: str) -> None:
    with pytest.MonkeyPatch.context() as patch, devices.computing_on("stand-in", patch):
        config = load_config(model, ["data.path=random", "batch_size=4", "gradient_accumulation=1", setting])
        pool = stand_in.get_default_memory_pool()
        gc.collect()  # what earlier tests left would be given back on the way
        before = pool.used_bytes()
        trainer = Trainer(config, LanguageModel(config.model, 0, "gpu"))
        batches = trainer.batches()
        trainer.train_step(batches)
        stand_in.peak_bytes = pool.used_bytes()
        trainer.train_step(batches)
        used = stand_in.peak_bytes - before
        assert memory.estimate_memory(config, "gpu").total == pytest.approx(used, rel=0.15)


def test_the_pool_is_what_a_run_shows_as_its_memory(gpu: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path)
    assert tiny.cli("train", "-f", run.config, "--checkpoint-dir", run.directory, "--target-device", "gpu") == 0
    assert "MB of the gpu" in capsys.readouterr().err
    assert resident_bytes("gpu") == module_of("gpu").get_default_memory_pool().total_bytes()


def test_arrays_of_a_run_live_on_the_device_and_a_file_s_on_the_host(gpu: str, tmp_path: Path) -> None:
    trainer = trainer_on("gpu", tmp_path)
    there = type(module_of("gpu").zeros(1))
    arrays = [*trainer.model.state_dict().values(), *trainer.optimizer.state_dict().values()]
    assert all(isinstance(array, there) for array in arrays)
    with no_grad():
        assert isinstance(trainer.model(np.zeros((1, 4), dtype=np.int64)).data, there)
    Trainer(trainer.config, trainer.model, options=RunOptions()).fit()
    files = checkpoint.load(Path(trainer.config.trainer.checkpoint_dir) / "step_8.safetensors")
    assert all(isinstance(array, np.ndarray) for array in files.tensors.values())
