"""docs/gpu.md: its tables are made of the numbers that were measured on a device, or it says that none were.

What docs/scripts/gpu.py computes of measurements is checked with numbers made by hand; what it measures, on the stand-in.
"""

# ruff: noqa: ARG001 - the fixture gpu says where a test computes, named or not

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import devices
import numpy as np
import pytest

from oxidizr_ref.config import Config, ModelConfig, TrainerConfig, load_config
from oxidizr_ref.model import LanguageModel
from oxidizr_ref.transfers import Reading

REPOSITORY = Path(__file__).parents[1]
sys.path.append(str(REPOSITORY / "docs" / "scripts"))

import gpu as script  # noqa: E402 - lives beside the documentation
from bench import cuda_peers  # noqa: E402 - found by the line above, as by the script
from bench.peers import PeerError  # noqa: E402


@pytest.fixture(params=["stand-in", pytest.param("cupy", marks=pytest.mark.gpu)])
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A CUDA device, or the stand-in for one."""
    with devices.computing_on(request.param, monkeypatch):
        yield request.param


# --- the page ---------------------------------------------------------------------------------------------------------


def test_the_tables_of_the_page_are_made_of_the_stored_numbers_or_it_says_that_nothing_was_run(tmp_path: Path) -> None:
    page, text = tmp_path / "gpu.md", script.PAGE.read_text(encoding="utf-8")
    page.write_text(text, encoding="utf-8")
    numbers = json.loads(script.NUMBERS.read_text(encoding="utf-8")) if script.NUMBERS.exists() else None
    script.insert(numbers, page)
    assert page.read_text(encoding="utf-8") == text
    assert ("Not run yet" in text) == (numbers is None)


def test_a_page_without_its_markers_is_refused(tmp_path: Path) -> None:
    page = tmp_path / "gpu.md"
    page.write_text(f"# Training on a GPU\n{script.BEGIN}\n", encoding="utf-8")
    with pytest.raises(ValueError, match="gpu:end"):
        script.insert(None, page)


FACTS = {
    "gpu": "A Card",
    "compute_capability": "9.0",
    "driver": "580.1 (CUDA 13.0)",
    "cuda": "13.0",
    "cupy": "14.2.0",
    "numpy": "2.4.6",
    "torch": "2.13.0",
}
FASTER = {"parameters": 350274560, "operations": 2_000_000_000, "tokens": 4000, "seconds": 0.5, "memory": 3}
SPEEDS = [
    {"case": ["nano", "f32"], **FASTER},
    {"case": ["nano", "bf16"], **FASTER, "ratio": 0.8, "quartiles": [0.75, 0.9], "their_seconds": 0.625, "their_memory": 4},
    {"case": ["llama350m", "bf16"], "failed": "OutOfMemoryError: no more"},
]
PEAKS = {"f32": 32.0}


def test_a_row_tells_time_speed_share_of_the_peak_and_the_ratio_where_there_is_one() -> None:
    alone, beside, failed = (script.cells_of(script.PARTS["speed"], row, PEAKS) for row in SPEEDS)
    # 2e9 · 4000 operations in half a second are 16e12 a second: half of 32.
    assert alone == ["`nano`", "f32", "350 M", "500.0", "8,000", "50.0%", "", "", ""]
    assert beside == ["`nano`", "bf16", "350 M", "500.0", "8,000", "not told", "625.0", "0.80 (0.75–0.90) ≤ 1.5", "0.75"]
    assert failed == ["`llama350m`", "bf16", "*failed: OutOfMemoryError: no more*", *[""] * 6]


def test_a_number_that_misses_its_goal_is_in_italics() -> None:
    def cells(part: str, *case: str, **row: Any) -> list[str]:
        return script.cells_of(script.PARTS[part], {"case": list(case), **row}, {})[len(case) :]

    half = 2.0**-53
    assert cells("gradients", "m", "f64", error=1000 * half, parameter="w") == ["1.1e-13", "1,000.0", "`w`"]
    assert cells("gradients", "m", "f64", error=1001 * half, parameter="w")[0] == "*1.1e-13*"
    assert cells("gradients", "m", "f32", error=float("nan"), parameter="w")[0] == "*nan*"
    assert cells("determinism", "m", "f16", repeats=True, resumes=False, sha256="ab" * 32)[:2] == ["yes", "*no*"]
    assert cells("waits", "m", fetched=2.0, events=1.0) == ["2", "1"]
    assert cells("memory", "m", "f32", estimate=2e9, used=2.3e9, pool=3e9) == ["2,000", "1.15", "1.50"]
    assert cells("memory", "m", "f32", estimate=2e9, used=1.69e9, pool=2e9) == ["2,000", "*0.84*", "1.00"]
    slow = {**FASTER, "ratio": 1.6, "quartiles": [1.5, 1.7], "their_seconds": 1.0, "their_memory": 1}
    assert cells("speed", "m", "f32", **slow)[-2] == "*1.60* (1.50–1.70) ≤ 1.5"


def test_the_section_names_the_device_and_says_which_parts_were_not_run_and_what_was_missing() -> None:
    found = {
        "date": "2000-01-01",
        "pairs": 10,
        "without": "Not beside PyTorch: PyTorch is not installed",
        "rows": SPEEDS[:1],
    }
    section = script.section({"facts": FACTS, "peaks": PEAKS, "parts": {"speed": found}})
    assert "2000-01-01: A Card, compute capability 9.0,\ndriver 580.1 (CUDA 13.0); CUDA 13.0, CuPy 14.2.0" in section
    assert "Not run: `python docs/scripts/gpu.py memory`." in section
    assert "Not run: `python docs/scripts/gpu.py speed`." not in section
    assert "median of 10\npairs" in section and "\nNot beside PyTorch: PyTorch is not installed.\n" in section
    lengths = [line.count("|") for line in section.splitlines() if line.startswith("|")]
    assert lengths == [10] * 3


# --- measuring --------------------------------------------------------------------------------------------------------


def options(*parts: str) -> argparse.Namespace:
    return argparse.Namespace(parts=list(parts), date="2000-01-01", pairs="3", peak_tflops=None)


def test_a_part_that_is_measured_anew_keeps_the_others_unless_they_are_of_another_machine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    facts, asked = {**FACTS}, list[tuple[str, ...]]()
    del facts["torch"]

    def in_a_process(*arguments: str) -> dict[str, Any]:
        asked.append(arguments)
        if arguments[0] in ("device", "torch"):
            return dict(facts) if arguments[0] == "device" else {"torch": "2.13.0", "why": "no CUDA"}
        if arguments[1] == "tiny-llama":
            raise script.CaseError("a | b")
        return {"fetched": 1.0, "events": 1.0}

    monkeypatch.setattr(script, "in_a_process", in_a_process)
    monkeypatch.setattr(script, "NUMBERS", tmp_path / "gpu.json")
    old = {"facts": FACTS, "peaks": {}, "parts": {"memory": {"date": "1999-12-31", "rows": []}}}
    numbers = script.measure_all(options("waits", "speed"), old)
    assert list(numbers["parts"]) == ["memory", "waits", "speed"]
    assert json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8")) == numbers
    first, second, *_ = numbers["parts"]["waits"]["rows"]
    assert first == {"case": ["tiny-llama"], "failed": "a / b"}
    assert second == {"case": ["tiny-hybrid"], "fetched": 1.0, "events": 1.0}
    assert numbers["parts"]["waits"]["without"] == ""
    assert numbers["parts"]["speed"]["without"] == "Not beside PyTorch: no CUDA"
    assert ("speed", "nano", "f32", "3", "no CUDA") in asked
    facts["driver"] = "another"
    assert list(script.measure_all(options("waits"), old)["parts"]) == ["waits"]


def test_without_a_device_nothing_is_written_and_the_reason_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def no_device(*_: str) -> dict[str, Any]:
        raise script.CaseError("DeviceError: CUDA finds no device")

    monkeypatch.setattr(script, "in_a_process", no_device)
    monkeypatch.setattr(script, "NUMBERS", tmp_path / "gpu.json")
    with pytest.raises(SystemExit, match="nothing can be measured here: DeviceError: CUDA finds no device"):
        script.measure_all(options(), None)
    assert not (tmp_path / "gpu.json").exists()


def test_a_process_that_fails_is_told_by_the_last_line_it_said() -> None:
    assert script.run_python(["-c", "import sys; print('found'); print('said', file=sys.stderr)"]) == ("found\n", "said\n")
    with pytest.raises(script.CaseError, match=r"^MemoryError: no room$"):
        script.run_python(["-c", "raise MemoryError('no room')"])
    with pytest.raises(script.CaseError, match=r"^CaseError: x$"):  # without the name of its module
        script.run_python(["-c", "import sys; sys.exit('some.where.CaseError: x')"])
    with pytest.raises(script.CaseError, match=r"^exit code 3$"):
        script.run_python(["-c", "raise SystemExit(3)"])


@pytest.mark.parametrize("part", script.PARTS)
def test_every_case_is_of_a_model_that_can_be_built(part: str) -> None:
    for name, *precision in script.PARTS[part].cases:
        dtype = precision[0].partition(",")[0] if precision else "f32"
        source, overrides = cuda_peers.benchmark(name, dtype)
        config = load_config(source, overrides)
        assert config.model.dtype == dtype and config.data.is_random
        if part == "speed":  # the twin has no schedule
            assert config.trainer.lr_schedule == "constant" and config.trainer.warmup_steps == 0


def test_nano_is_measured_at_4_sequences_of_512_tokens() -> None:
    config = load_config(*cuda_peers.benchmark("nano", "bf16"))
    assert (config.trainer.batch_size, config.model.max_seq_len) == (4, 512)


def test_peaks_are_those_given_else_those_known_of_the_device_else_none() -> None:
    assert script.peak_tflops("NVIDIA H100 80GB HBM3", None) == {"f32": 67.0, "bf16": 989.0}
    assert script.peak_tflops("NVIDIA A100-SXM4-80GB", None) == {"f32": 19.5, "bf16": 312.0}
    assert script.peak_tflops("NVIDIA GeForce RTX 4090", None) == {"f32": 82.6, "bf16": 165.0}
    for other in ("NVIDIA H100 PCIe", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA A10"):
        assert script.peak_tflops(other, None) == {}
    assert script.peak_tflops("NVIDIA A10", [31.2, 125.0]) == {"f32": 31.2, "bf16": 125.0}
    assert script.cuda_version(13010) == "13.1"


# --- operations -------------------------------------------------------------------------------------------------------


def operations(**model: Any) -> int:
    sizes: dict[str, Any] = {"hidden_size": 8, "num_layers": 2, "num_heads": 2, "vocab_size": 10, "max_seq_len": 6}
    return cuda_peers.operations_a_token(
        Config(model=ModelConfig(**sizes | model), trainer=TrainerConfig(learning_rate=1e-3, batch_size=3))
    )


def test_operations_of_a_llama_are_six_a_weight_and_attention_over_half_of_the_tokens() -> None:
    # A layer: q, k, v, o of 8 × 8; gate, up, down of 8 × 12; two norms. Then the last norm, and the output of 8 × 10.
    weights = 2 * (4 * 64 + 3 * 96 + 16) + 8 + 80
    # Scores and values: 2 heads of width 4 with 3 tokens each on average, twice 2 operations, once forward, twice backward.
    attention = 2 * (3 * 2 * (2 * 4 * 2 * 3))
    assert operations(intermediate_size=12) == 6 * weights + attention
    assert operations(intermediate_size=12, tie_word_embeddings=True) == 6 * weights + attention


def test_operations_of_a_mixture_are_those_of_the_experts_that_a_token_meets() -> None:
    dense, sparse = operations(intermediate_size=12), operations(intermediate_size=12, num_experts=4, experts_per_tok=2)
    assert sparse - dense == 6 * 2 * (3 * 96 + 8 * 4)  # in each layer a second expert, and the router


def test_operations_of_latent_attention_have_wider_keys_than_values_and_a_mamba_has_none_of_attention() -> None:
    latents = {"kv_latent_dim": 4, "q_latent_dim": 4, "d_rope": 2}
    # w_dkv, w_dq, w_qr: 8 × 4; w_uq, w_uk, w_uv: 4 × 8; w_kr: 8 × 2; o: 8 × 8; feed-forward, norms; then the rest.
    weights = 2 * (6 * 32 + 16 + 64 + 3 * 96 + 16) + 8 + 80
    assert operations(intermediate_size=12, **latents) == 6 * weights + 2 * (3 * 2 * ((4 + 2) + 4) * 2 * 3)
    # in: 32 × 8; convolution: 16 of 4 and a bias; x: 9 × 16; dt: 16 × 1 and a bias; A: 16 × 4; D; out: 8 × 16; two norms.
    weights = 256 + 80 + 144 + 32 + 64 + 16 + 128 + 8 + 8 + 80
    assert operations(num_layers=1, mamba_layers=[0], mamba_d_state=4) == 6 * weights


def test_the_llama_of_350_million_parameters_has_as_many_as_its_file_says() -> None:
    path = cuda_peers.CONFIGS / "gpu" / "llama350m.yaml"
    count = LanguageModel(load_config(path).model, seed=None).num_parameters()
    assert count == 350_274_560 and f"{count:,} parameters" in path.read_text(encoding="utf-8")
    assert load_config(path).trainer.batch_size == 4 and load_config(path).model.max_seq_len == 1024


# --- pairs ------------------------------------------------------------------------------------------------------------


def test_the_ratio_is_the_median_of_the_pairs_ratios_with_quartiles() -> None:
    ours, theirs = [1.0, 2.0, 3.0, 8.0, 5.0], [2.0, 2.0, 2.0, 2.0, 2.0]
    assert cuda_peers.told(ours, 7, []) == {"seconds": 3.0, "memory": 7}
    assert cuda_peers.told(ours, 7, [(theirs, 9)]) == {
        "seconds": 3.0,
        "memory": 7,
        "ratio": 1.5,
        "quartiles": [1.0, 2.5],
        "their_seconds": 2.0,
        "their_memory": 9,
    }


def test_other_losses_are_another_model() -> None:
    cuda_peers.must_be_the_same([5.0, 4.0], [5.0, 4.0003], 1e-4)
    for theirs in ([5.0, 4.001], [5.0, float("nan")]):
        with pytest.raises(PeerError, match="another model"):
            cuda_peers.must_be_the_same([5.0, 4.0], theirs, 1e-4)


def test_a_turn_has_three_steps_to_two_hundred() -> None:
    assert [cuda_peers.steps_of_a_turn(seconds) for seconds in (1.0, 0.1, 0.04, 1e-4)] == [3, 5, 13, 200]


# --- on a device ------------------------------------------------------------------------------------------------------


def test_gradients_on_the_device_are_within_the_goal(gpu: str) -> None:
    found = script.gradients("tiny-llama", "f64")
    assert 0 < script.roundings(found["error"], "f64") <= script.ROUNDINGS
    assert found["parameter"] in dict(LanguageModel(load_config("tiny-llama").model, seed=None).named_parameters())


def test_a_step_with_one_mixture_fetches_once_and_waits_for_one_event(gpu: str) -> None:
    assert cuda_peers.waits("tiny-hybrid") == {"fetched": 1.0, "events": 1.0}


def test_arrays_fetched_are_counted_once_each_and_copies_that_nobody_waits_for_are_not(gpu: str) -> None:
    x = devices.place(3.0)
    with cuda_peers.counted_waits() as count:
        assert float(x) == x.item() == x.get() == 3.0
    assert count == {"fetched": 3, "events": 0}
    with cuda_peers.counted_waits() as count:
        reading = Reading([x])
        assert count == {"fetched": 0, "events": 0}
        assert reading.numbers() == [3.0]
    assert count == {"fetched": 0, "events": 1}


# --- PyTorch ----------------------------------------------------------------------------------------------------------


@pytest.mark.oracle
@pytest.mark.parametrize("name", ["nano", "llama350m"])
def test_every_layer_of_a_twin_keeps_to_the_device_it_is_on(name: str) -> None:
    """Shown on the device ``meta``, which has shapes alone and refuses tensors from elsewhere; but for experts, which need
    numbers."""
    torch = pytest.importorskip("torch", reason="needs the extra 'oracle'")
    from bench import state_space_twins, twins

    config = load_config(*cuda_peers.benchmark(name, "f32")).model
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(state_space_twins, "decay_within", cuda_peers.decay_within)
        with torch.device("meta"):
            model = twins.LanguageModel(config)
        h = torch.zeros(2, 64, config.hidden_size, device="meta")
        for layer in (model.layers[0], *(layer.self_attn for layer in model.layers if hasattr(layer, "self_attn"))):
            arguments = (h, []) if layer is model.layers[0] else (h,)
            assert layer(*arguments).device.type == "meta"


@pytest.mark.oracle
@pytest.mark.parametrize(("dtype", "bound"), [("f32", 1e-5), ("bf16", 2e-2)])
def test_the_twin_trains_as_on_the_cpu_and_a_turn_is_timed(
    dtype: str, bound: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch", reason="needs the extra 'oracle'")
    from bench import state_space_twins
    from bench.contestants import Eager

    monkeypatch.setattr(state_space_twins, "decay_within", state_space_twins.decay_within)  # put back afterwards
    monkeypatch.setattr(cuda_peers.EagerOnDevice, "device", "cpu")
    config = load_config("tiny-hybrid", [f"model.dtype={dtype}"])
    in_float32 = load_config("tiny-hybrid")
    weights = LanguageModel(in_float32.model, 0).state_dict()
    twin, plain = cuda_peers.EagerOnDevice(config, weights), Eager(in_float32, weights)
    ids = np.random.default_rng(0).integers(0, 260, (2, 8, 33))
    batches = [(one[:, :-1].copy(), one[:, 1:].copy()) for one in ids]
    twin.begin()
    plain.begin()
    for batch in batches:
        twin.step(*batch)
        assert twin.last_loss() == pytest.approx(plain.step(*batch), rel=bound)
    assert cuda_peers.turn(twin, iter(batches * 2), 3) > 0 and twin.memory() == 0
