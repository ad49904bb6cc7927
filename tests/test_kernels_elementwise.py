"""The kernels of normalization, rotation, gates, feed-forward and convolution: each gives what its host version gives.

There is no CUDA here: the kernels run on the host (cuda_on_host.py), on the arrays of a strict stand-in for CuPy. That nvcc
accepts every kernel of the package is tested where there is an nvcc.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cuda_on_host
import ml_dtypes
import numpy as np
import pytest
import stand_in
from fused_examples import LARGE, NO_TOKENS, Example, example_of, in_dtype, outputs_and_gradients
from hypothesis import given, settings
from hypothesis import strategies as st

import oxidizr_ref
from oxidizr_ref.autograd import Tensor
from oxidizr_ref.fused.register import REGISTER
from oxidizr_ref.fused.swiglu import swiglu
from oxidizr_ref.kernels import Kernel

NAMES = ["causal_conv", "rms_norm", "rope", "silu_gate", "swiglu"]
BF16, F16 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)

on_the_host = pytest.mark.skipif(not cuda_on_host.available(), reason="kernels run on the host through g++; there is none")


def on_the_device(name: str, example: Example, dy: Callable[[Any], Any] = lambda dy: dy) -> list[Any]:
    """`outputs_and_gradients` of the op's kernels, brought back. ``dy``: what to make of the gradient of the result."""
    leaves = [Tensor(stand_in.asarray(array), requires_grad=True) for array in example.arrays]
    result = REGISTER[name].fused(*leaves, **example.options)
    assert type(result.node).__name__.endswith("Kernels")
    gradient = np.random.default_rng(9).standard_normal(result.shape).astype(result.dtype)
    result.backward(dy(stand_in.asarray(gradient)))
    for array, leaf in zip(example.arrays, leaves, strict=True):
        np.testing.assert_array_equal(leaf.data.get(), array)  # inputs are never changed
        assert leaf.grad.flags.c_contiguous
    return [result.data.get(), *(leaf.grad.get() for leaf in leaves)]


def largest(x: Any) -> float:
    """The largest magnitude; 0 of nothing."""
    return float(np.max(np.abs(x), initial=0))


def assert_same_bits(ours: list[Any], theirs: list[Any]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert a.tobytes() == b.tobytes()


# --- against the host -------------------------------------------------------------------------------------------------


@on_the_host
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
@settings(max_examples=12)
def test_kernels_equal_the_host_version_and_the_reference_in_output_and_every_gradient(
    name: str, dtype: Any, data: Any
) -> None:
    example = in_dtype(example_of(name, data.draw), dtype)
    ours = on_the_device(name, example)
    for theirs in (REGISTER[name].fused, REGISTER[name].reference):
        for x, y in zip(ours, outputs_and_gradients(theirs, example), strict=True):
            assert x.shape == y.shape
            assert x.dtype == y.dtype == dtype
            # Sums of at most 49 terms (rows; channels are at most 15) of order one, 10 at most, each made by a few
            # operations: 49 (49 + 10) roundings if all went one way, on numbers of which the largest stands for all.
            assert largest(x - y) <= 3000 * np.finfo(dtype).eps / 2 * max(1.0, largest(y))


@on_the_host
@pytest.mark.parametrize("name", NAMES)
def test_large_float32_example_agrees_with_the_float64_reference(name: str) -> None:
    example = LARGE[name]
    plain = outputs_and_gradients(REGISTER[name].reference, in_dtype(example, np.float64))
    for ours, wanted in zip(on_the_device(name, example), plain, strict=True):
        assert ours.dtype == np.float32
        # Sums of n ≤ 4001 products, each rounded at 6e-8: about sqrt(n) · 6e-8 = 4e-6 of the largest.
        assert largest(ours - wanted) <= 1e-5 * largest(wanted)


@on_the_host
@pytest.mark.parametrize("name", NAMES)
def test_two_runs_give_the_same_bits(name: str) -> None:
    assert_same_bits(on_the_device(name, LARGE[name]), on_the_device(name, LARGE[name]))


@on_the_host
@pytest.mark.parametrize("name", NAMES)
def test_no_tokens_give_an_empty_result_and_zero_weight_gradients(name: str) -> None:
    assert_same_bits(on_the_device(name, NO_TOKENS[name]), outputs_and_gradients(REGISTER[name].fused, NO_TOKENS[name]))


@on_the_host
@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
@settings(max_examples=5)
def test_strided_inputs_and_gradients_give_what_contiguous_ones_give(name: str, data: Any) -> None:
    example = example_of(name, data.draw)
    wide = [stand_in.asarray(np.stack([array, array], axis=-1))[..., 0] for array in example.arrays]
    leaves = [Tensor(array, requires_grad=True) for array in wide]
    result = REGISTER[name].fused(*leaves, **example.options)
    dy = np.random.default_rng(9).standard_normal(result.shape)
    result.backward(stand_in.asarray(np.stack([dy, dy], axis=-1))[..., 0])
    ours = [result.data.get(), *(leaf.grad.get() for leaf in leaves)]
    theirs = on_the_device(name, example)
    if name != "swiglu":
        assert_same_bits(ours, theirs)
    for x, y in zip(ours, theirs, strict=True):  # another layout may take another path through BLAS
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-12 * max(1.0, largest(y)))


# --- storage in half precision ----------------------------------------------------------------------------------------


@on_the_host
@pytest.mark.parametrize("storage", [F16, BF16], ids=str)
@pytest.mark.parametrize("name", [name for name in NAMES if name != "swiglu"])
def test_half_precision_storage_gives_the_bits_of_the_same_values_in_float32(name: str, storage: np.dtype[Any]) -> None:
    stored = in_dtype(LARGE[name], storage)
    assert_same_bits(on_the_device(name, stored), on_the_device(name, in_dtype(stored, np.float32)))


def swiglu_of_open_and_shut_gates(x: Any, wg: Any, wu: Any, wd: Any, dy: Any, storage: np.dtype[Any]) -> list[Any]:
    """The result and all gradients where each gate is so far from zero that ``silu`` is the gate itself, or zero.

    Over integers nothing is rounded but what 16 bits round: the operands of each product, and its result, once.
    """

    def product(a: Any, b: Any) -> Any:
        exact = a.astype(storage).astype(np.float64) @ b.astype(storage).astype(np.float64)
        assert largest(exact) < 2**24  # exact in float32, in whatever order it is summed
        return exact.astype(storage).astype(np.float64)

    gate, up = product(x, wg.T), product(x, wu.T)
    assert np.all(np.abs(gate) > 20)  # tanh(10) is 1 in float32
    slope = gate > 0
    activation = gate * slope * up
    y, da = product(activation, wd.T), product(dy, wd)
    dgate, dup = da * up * slope, da * gate * slope
    dx = product(dgate, wg) + product(dup, wu)
    return [y, dx, product(dgate.T, x), product(dup.T, x), product(dy.T, activation)]


@on_the_host
@pytest.mark.parametrize("storage", [F16, BF16], ids=str)
def test_swiglu_with_weights_of_16_bits_rounds_the_operands_of_each_product_and_its_result_once(
    storage: np.dtype[Any],
) -> None:
    rng = np.random.default_rng(0)
    rows, hidden, inner = 5, 4, 6

    def integers(high: int, *shape: int) -> Any:
        return rng.integers(-high, high + 1, shape).astype(np.float64)

    x, wg, wu, wd = (
        integers(3, rows, hidden),
        integers(3, inner, hidden),
        integers(3, inner, hidden),
        integers(1, hidden, inner),
    )
    x[:, 0] = rng.choice([-1, 1], rows) * rng.integers(33, 48, rows)  # by which each gate is far from zero
    wg[:, 0] = rng.choice([-3, 3], inner)
    dy = integers(2, rows, hidden)
    leaves = [Tensor(stand_in.asarray(x.astype(np.float32)), requires_grad=True)]
    leaves += [Tensor(stand_in.asarray(w.astype(storage)), requires_grad=True) for w in (wg, wu, wd)]
    result = swiglu(*leaves)
    result.backward(stand_in.asarray(dy.astype(np.float32)))
    ours = [result.data.get(), *(leaf.grad.get() for leaf in leaves)]
    for array, rounded in zip(ours, swiglu_of_open_and_shut_gates(x, wg, wu, wd, dy, storage), strict=True):
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, rounded)


@on_the_host
@pytest.mark.parametrize("storage", [F16, BF16], ids=str)
@given(data=st.data())
@settings(max_examples=10)
def test_swiglu_with_weights_of_16_bits_is_the_host_version_but_for_roundings_to_16_bits(
    storage: np.dtype[Any], data: Any
) -> None:
    x, *weights = example_of("swiglu", data.draw).arrays
    example = Example([x.astype(np.float32), *(w.astype(storage) for w in weights)], {})
    ours, wanted = on_the_device("swiglu", example), outputs_and_gradients(swiglu, example)
    # The same sums over magnitudes: each rounding to 16 bits changes a term of them by u of it, or where the gate is rounded
    # by u |gate| of it. There are fewer than 8 on the way from an input to a result.
    leaves = [Tensor(np.abs(array.astype(np.float64)), requires_grad=True) for array in example.arrays]
    y = swiglu(*leaves)
    y.backward(np.abs(np.random.default_rng(9).standard_normal(y.shape)))
    magnitudes = [y.data, *(leaf.grad for leaf in leaves)]
    steepest = max(1.0, largest(np.abs(x.reshape(-1, x.shape[-1])) @ np.abs(weights[0].T)))
    u = float(ml_dtypes.finfo(storage).eps) / 2
    for array, other, magnitude in zip(ours, wanted, magnitudes, strict=True):
        assert array.dtype == other.dtype == np.float32
        assert largest(array - other) <= 8 * u * steepest * largest(magnitude)


# --- under the compiler of CUDA ---------------------------------------------------------------------------------------


def every_kernel() -> dict[str, Kernel]:
    """All of the package, by the module and the name that hold it."""
    names = [module.name for module in pkgutil.walk_packages(oxidizr_ref.__path__, "oxidizr_ref.")]
    modules = [importlib.import_module(name) for name in names if not name.endswith("__main__")]
    return {
        f"{module.__name__}.{name}": value
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, Kernel)
    }


def test_every_elementwise_op_has_kernels_of_its_own() -> None:
    files = {name.rpartition(".")[0] for name in every_kernel()}
    assert {f"oxidizr_ref.fused.{name}" for name in NAMES} < files


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc")
@pytest.mark.parametrize("type_", ["float", "double"])
def test_every_kernel_of_the_package_compiles_for_a_gpu_and_has_no_atomics(type_: str, tmp_path: Path) -> None:
    # All in one file, which takes a second: each in a namespace of its own, and not extern "C", where names would clash.
    pieces = []
    for name, kernel in every_kernel().items():
        code = kernel.code(type_).replace('extern "C" ', "")
        pieces.append(f'namespace {name.replace(".", "_")} {{\n#line 1 "{name}"\n{code}}}')
    (tmp_path / "all.cu").write_text("\n#undef BLOCK\n#undef THREAD\n".join(pieces), encoding="utf-8")
    command = ["nvcc", "-ptx", "-arch=compute_80", "-std=c++17", "-Werror=all-warnings", "-o", "all.ptx", "all.cu"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assembly = (tmp_path / "all.ptx").read_text()
    assert assembly.count(".entry") == len(pieces)
    assert not re.search(r"\b(atom|red)\.", assembly)
