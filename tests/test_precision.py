"""Numbers of 16 bits: AdamW's moments in bf16, what rounding to nearest would do to them, and the same on a device."""

# ruff: noqa: ARG001 - the fixture gpu says where a test computes, named or not

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import devices
import numpy as np
import pytest
import tiny
from devices import host, place
from hypothesis import given
from hypothesis import strategies as st

from oxidizr_ref import checkpoint, optim, rng
from oxidizr_ref.backend import STORAGE_DTYPES, module_of
from oxidizr_ref.kernels import Kernel
from oxidizr_ref.optim import AdamW, clip_factor, global_norm
from oxidizr_ref.optim_kernels import _SIXTEEN_BITS

F16, BF16 = STORAGE_DTYPES["f16"], STORAGE_DTYPES["bf16"]
SHAPES = {"layers.0.up.weight": (37, 41), "norm.weight": (5,), "layers.0.mixer.A_log": (2, 3)}
#: (parameters, slots)
STORED = list(itertools.product(STORAGE_DTYPES, [None, BF16]))


def random_arrays(seed: int, dtype: Any, scale: float = 1.0) -> dict[str, Any]:
    source = np.random.default_rng(seed)
    return {name: (scale * source.standard_normal(shape)).astype(dtype) for name, shape in SHAPES.items()}


def compute(dtype: Any) -> Any:
    return np.float64 if dtype == np.float64 else np.float32


@pytest.fixture(params=["stand-in", pytest.param("cupy", marks=pytest.mark.gpu)])
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with devices.computing_on(request.param, monkeypatch):
        yield request.param


# --- moments in bf16 --------------------------------------------------------------------------------------------------


def test_moments_in_bf16_are_stored_so_and_updates_stay_those_of_float32_moments_to_three_digits() -> None:
    """A moment of bf16 is at most 2⁻⁷ of itself off, the root of the second one half of that; such errors do not add up."""
    found = {}
    for slot_dtype in (None, BF16):
        arrays = random_arrays(0, np.float32)
        optimizer = AdamW(arrays, lr=0.01, slot_dtype=slot_dtype)
        for n in range(30):
            optimizer.step(random_arrays(n + 1, np.float32))
        found[slot_dtype] = arrays
        assert {v.dtype for v in optimizer.state_dict().values()} == {slot_dtype or np.dtype(np.float32)}
    start = random_arrays(0, np.float32)
    name = "layers.0.up.weight"
    moved = [found[slot_dtype][name] - start[name] for slot_dtype in (None, BF16)]
    assert np.abs(moved[1] - moved[0]).max() <= 30 * 0.01 * 2.0**-7
    assert np.abs(moved[1] - moved[0]).mean() <= 0.02 * np.abs(moved[0]).mean()


def test_a_second_moment_in_bf16_decays_where_rounding_to_nearest_freezes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients that vanish: v shrinks by β₂ = 0.999 a step, to 0.999⁶⁹³ = 1/2 of what it was; to nearest, by nothing."""

    def after(updates: int) -> np.ndarray[Any, Any]:
        arrays = {"w.weight": np.ones(4096, dtype=BF16)}
        optimizer = AdamW(arrays, lr=0.0, slot_dtype=BF16)
        optimizer.slots["exp_avg_sq"]["w.weight"][...] = np.linspace(1, 1.99, 4096)
        for _ in range(updates):
            optimizer.step({"w.weight": np.zeros(4096, dtype=np.float32)})
        return optimizer.slots["exp_avg_sq"]["w.weight"].astype(np.float64)

    start = after(0)
    # Each step rounds by less than a unit, 2⁻⁷ of v, with errors of either sign: of 4,096 elements the mean is off by
    # sqrt(693) · 2⁻⁷ / sqrt(12 · 4096) < 1e-3 of itself.
    assert after(693).mean() / start.mean() == pytest.approx(0.5, rel=5e-3)
    nearest = {dtype: lambda p, _, dtype=dtype: p.astype(dtype) for dtype in (F16, BF16)}
    monkeypatch.setattr(optim, "_ROUND", nearest)
    frozen = after(693)
    assert np.array_equal(frozen, start), "0.999 of a number of 8 bits is nearer to the number than to the one below"


def test_weights_in_bf16_follow_updates_where_rounding_to_nearest_freezes_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def after(updates: int) -> np.ndarray[Any, Any]:
        arrays = {"w.weight": np.ones(4096, dtype=BF16)}
        optimizer = AdamW(arrays, lr=1e-3, weight_decay=0.0)
        for _ in range(updates):
            optimizer.step({"w.weight": np.ones(4096, dtype=np.float32)})
        return arrays["w.weight"].astype(np.float64)

    # Adam moves by the learning rate: 100 steps by 0.1, here a quarter of a unit (2⁻⁸ below 1) each.
    assert after(100).mean() == pytest.approx(0.9, abs=1e-3)
    monkeypatch.setattr(optim, "_ROUND", {BF16: lambda p, _: p.astype(BF16)})
    assert np.array_equal(after(100), np.ones(4096))


@pytest.mark.parametrize("storage", STORAGE_DTYPES)
def test_an_optimizer_with_moments_in_bf16_resumes_to_the_same_bits(storage: str) -> None:
    dtype = STORAGE_DTYPES[storage]
    gradients = [random_arrays(n + 1, compute(dtype)) for n in range(6)]
    straight, parted = random_arrays(0, dtype), random_arrays(0, dtype)
    one = AdamW(straight, lr=0.01, seed=5, slot_dtype=BF16)
    before = AdamW(parted, lr=0.01, seed=5, slot_dtype=BF16)
    for g in gradients[:3]:
        one.step(g)
        before.step(g)
    after = AdamW(parted, lr=0.01, seed=5, slot_dtype=BF16)
    after.load_state_dict({name: array.copy() for name, array in before.state_dict().items()}, before.updates)
    for g in gradients[3:]:
        one.step(g)
        after.step(g)
    for name, array in {**straight, **one.state_dict()}.items():
        assert array.tobytes() == {**parted, **after.state_dict()}[name].tobytes(), name


def test_parameter_and_both_moments_are_rounded_by_random_bits_of_their_own() -> None:
    drawn: list[tuple[str, str]] = []
    with pytest.MonkeyPatch.context() as patch:
        words = rng.words

        def noted(seed: int, stream: str, name: str, *rest: int) -> Any:
            drawn.append((stream, name))
            return words(seed, stream, name, *rest)

        patch.setattr(rng, "words", noted)
        AdamW(random_arrays(0, BF16), lr=0.1, slot_dtype=BF16).step(random_arrays(1, np.float32))
    streams = ("rounding", "rounding.exp_avg", "rounding.exp_avg_sq")
    assert sorted(drawn) == sorted(itertools.product(streams, SHAPES))


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_file_of_bf16_weights_is_0_85_and_with_bf16_moments_0_55_of_float32_s(tmp_path: Path) -> None:
    """10 and 6 bytes a parameter against 12, and a header."""
    sizes = {}
    for dtype, moments in [("f32", "f32"), ("bf16", "f32"), ("bf16", "bf16")]:
        name = f"{dtype}_{moments}"
        model = {"hidden_size": 64, "intermediate_size": 128, "dtype": dtype}
        run = tiny.make_run(tmp_path / name, model, {"optimizer_dtype": moments, "max_steps": 1})
        assert run.train() == 0
        sizes[dtype, moments] = run.path(1).stat().st_size
    assert sizes["bf16", "f32"] <= 0.85 * sizes["f32", "f32"]
    assert sizes["bf16", "bf16"] <= 0.55 * sizes["f32", "f32"]


def test_other_moments_are_another_dtype_which_is_refused_unless_allowed_and_then_converted_and_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tiny.make_run(tmp_path, {"dtype": "bf16"}, {"max_steps": 4, "save_interval": 4})
    assert run.train() == 0
    more = ("--resume", "auto", "--max-steps", 5, "--set", "trainer.optimizer_dtype=bf16")
    assert run.train(*more) == 2
    assert "trainer.optimizer_dtype f32 → bf16; accept it with --allow-mismatch dtype" in capsys.readouterr().err
    assert run.train(*more, "--allow-mismatch", "dtype") == 0
    told = capsys.readouterr().err
    assert "other dtype: trainer.optimizer_dtype f32 → bf16; every number is converted, rounded to nearest" in told
    moments = [a.dtype for name, a in checkpoint.load(run.path(5)).tensors.items() if name.startswith("optimizer.")]
    assert set(moments) == {BF16}
    assert [entry["step"] for entry in tiny.lineage(run.path(5))] == [4]


# --- on a device ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("storage", "slot_dtype"), STORED, ids=lambda v: str(v))
def test_the_kernel_updates_and_rounds_to_the_bits_of_the_host(gpu: str, storage: str, slot_dtype: Any) -> None:
    """On a real device products and sums are fused (fma), which rounds less often: there a few units apart instead."""
    dtype = STORAGE_DTYPES[storage]
    here = random_arrays(0, dtype)
    here["layers.0.up.weight"][0, :8] = [0, 1e-9, -1e-9, 2e-8, -7e-6, 5e-5, 3e-39, 6e-8]  # subnormal in f16
    there = {name: module_of("gpu").asarray(array) for name, array in here.items()}
    ours = AdamW(here, lr=0.01, seed=3, slot_dtype=slot_dtype)
    theirs = AdamW(there, lr=0.01, seed=3, slot_dtype=slot_dtype)
    for n in range(3):
        gradients = random_arrays(n + 1, compute(dtype), scale=10.0**-n)
        ours.step(gradients, gradient_scale=0.5)
        theirs.step({name: place(g) for name, g in gradients.items()}, gradient_scale=0.5)
    for name, array in {**here, **ours.state_dict()}.items():
        other = host({**there, **theirs.state_dict()}[name])
        assert other.dtype == array.dtype
        if gpu == "stand-in":
            np.testing.assert_array_equal(other.astype(np.float64), array.astype(np.float64), err_msg=name)
        else:
            unit = {2: 2.0**-7, 4: 1e-6, 8: 1e-14}[array.dtype.itemsize]
            np.testing.assert_allclose(other.astype(np.float64), array.astype(np.float64), rtol=unit, atol=1e-7)


_WORDS = Kernel(
    """
__global__ void words_of(unsigned long long* out, long long count, unsigned long long step,
                         unsigned long long k0, unsigned long long k1) {
    if (THREAD < count) out[THREAD] = philox(THREAD, step, k0, k1);
}
""",
    before=_SIXTEEN_BITS,
)


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**31), st.integers(1, 70))
def test_the_kernel_s_random_words_are_those_of_the_host(gpu: str, seed: int, step: int, count: int) -> None:
    out = module_of("gpu").empty(count, dtype=np.uint64)
    _WORDS.threads(count, out, count, np.uint64(step), *rng.key(seed, "rounding", "w"))
    np.testing.assert_array_equal(host(out), rng.words(seed, "rounding", "w", step, count))


def test_the_norm_and_the_clip_factor_are_the_host_s_and_stay_there(gpu: str) -> None:
    gradients = {"a": np.random.default_rng(0).standard_normal((700, 401)), "b": np.ones(3), "c": np.zeros((0, 4))}
    there = {name: place(g) for name, g in gradients.items()}
    norm = global_norm(there)
    assert isinstance(norm, module_of("gpu").ndarray)
    # Sums of 3e5 squares of doubles in another order: sqrt(3e5) · 1.1e-16.
    assert float(host(norm)) == pytest.approx(float(global_norm(gradients)), rel=1e-13)
    assert float(host(clip_factor(norm, 1.0))) == pytest.approx(
        float(clip_factor(float(global_norm(gradients)), 1.0)), rel=1e-13
    )
    assert float(host(clip_factor(norm, 0.0))) == 1.0
    assert np.isnan(host(clip_factor(global_norm({"a": place(np.array([1.0, np.inf]))}), 1.0)))


def test_a_step_whose_factor_is_nan_changes_nothing_on_the_device(gpu: str) -> None:
    arrays = {name: place(array) for name, array in random_arrays(0, BF16).items()}
    optimizer = AdamW(arrays, lr=0.1)
    optimizer.step({name: place(g) for name, g in random_arrays(1, np.float32).items()})
    before = {name: host(array).copy() for name, array in {**arrays, **optimizer.state_dict()}.items()}
    optimizer.step({name: place(g) for name, g in random_arrays(2, np.float32).items()}, gradient_scale=place(np.nan))
    for name, array in {**arrays, **optimizer.state_dict()}.items():
        assert host(array).tobytes() == before[name].tobytes()
