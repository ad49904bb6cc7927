"""The kernels of normalization, rotation, gates, feed-forward and convolution: each gives what its host version gives.

On the stand-in for CUDA, and on CuPy where there is a GPU (``-m gpu``). Where there is an nvcc it must accept every kernel
of the package.
"""

from __future__ import annotations

import importlib
import itertools
import pkgutil
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import devices
import ml_dtypes
import numpy as np
import pytest
from devices import host, place
from fused_examples import LARGE, NO_TOKENS, Example, example_of, in_dtype, one_token
from hypothesis import given, settings
from hypothesis import strategies as st

import oxidizr_ref
from oxidizr_ref.autograd import Tensor
from oxidizr_ref.backend import STORAGE_DTYPES
from oxidizr_ref.fused.register import REGISTER
from oxidizr_ref.fused.swiglu import swiglu
from oxidizr_ref.kernels import Kernel
from oxidizr_ref.optim_kernels import adamw_kernel

Array = Any

NAMES = ["causal_conv", "rms_norm", "rope", "silu_gate", "swiglu"]
BF16, F16 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)


@pytest.fixture(params=["stand-in", pytest.param("cupy", marks=pytest.mark.gpu)])
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A CUDA device, or the stand-in for one."""
    with devices.computing_on(request.param, monkeypatch):
        yield request.param


on_a_gpu = pytest.mark.usefixtures("gpu")


def results(op: Callable[..., Any], example: Example, where: Callable[[Array], Array]) -> list[Array]:
    """The result, and the gradient of every array for one fixed random gradient of the result, brought back.

    ``where``: puts an array where the op shall find it.
    """
    leaves = [Tensor(where(array), requires_grad=True) for array in example.arrays]
    result = op(*leaves, **example.options)
    dy = np.random.default_rng(9).standard_normal(result.shape).astype(result.dtype)
    result.backward(where(dy))
    for array, leaf in zip(example.arrays, leaves, strict=True):
        np.testing.assert_array_equal(host(leaf.data), array)  # inputs are never changed
        assert leaf.grad is not None and leaf.grad.flags.c_contiguous
    return [host(result.data), *(host(leaf.grad) for leaf in leaves)]


def on_the_host(op: Callable[..., Any], example: Example) -> list[Array]:
    return results(op, example, lambda array: array)


def on_the_device(name: str, example: Example) -> list[Array]:
    return results(REGISTER[name].fused, example, place)


def strided_on_the_device(name: str, example: Example) -> list[Array]:
    """Nothing that the op is given lies contiguously."""
    return results(REGISTER[name].fused, example, lambda array: place(np.stack([array, array], axis=-1))[..., 0])


def largest(x: Array) -> float:
    """The largest magnitude; 0 of nothing."""
    return float(np.max(np.abs(x), initial=0))


def assert_same_bits(ours: list[Array], theirs: list[Array]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert a.tobytes() == b.tobytes()


# --- against the host -------------------------------------------------------------------------------------------------


@on_a_gpu
@pytest.mark.parametrize("name", NAMES)
def test_on_a_device_the_op_is_one_node_and_made_of_kernels(name: str) -> None:
    arrays, options = one_token(name)
    result = REGISTER[name].fused(*(Tensor(place(array), requires_grad=True) for array in arrays), **options)
    assert type(result.node).__name__.endswith("Kernels")
    assert all(isinstance(parent, Tensor) for parent in result.node.parents)


@on_a_gpu
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
        for x, y in zip(ours, on_the_host(theirs, example), strict=True):
            assert x.shape == y.shape
            assert x.dtype == y.dtype == dtype
            # Sums of at most 49 terms (rows) or 15 (channels), each made by about 10 operations: 60 roundings, if all went
            # one way, on terms up to ten times the largest sum, or 1, where they cancel.
            assert largest(x - y) <= 600 * np.finfo(dtype).eps / 2 * max(1.0, largest(y))


@on_a_gpu
@pytest.mark.parametrize("name", NAMES)
def test_large_float32_example_agrees_with_the_float64_reference_and_to_the_bit_with_another_run(name: str) -> None:
    example = LARGE[name]
    first = on_the_device(name, example)
    plain = on_the_host(REGISTER[name].reference, in_dtype(example, np.float64))
    for ours, wanted in zip(first, plain, strict=True):
        assert ours.dtype == np.float32
        # Sums of n ≤ 4001 products, each rounded at 6e-8: about sqrt(n) · 6e-8 = 4e-6 of the largest.
        assert largest(ours - wanted) <= 1e-5 * largest(wanted)
    assert_same_bits(first, on_the_device(name, example))


@on_a_gpu
@pytest.mark.parametrize("name", NAMES)
def test_no_tokens_give_an_empty_result_and_zero_weight_gradients(name: str) -> None:
    assert_same_bits(on_the_device(name, NO_TOKENS[name]), on_the_host(REGISTER[name].fused, NO_TOKENS[name]))


@on_a_gpu
@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
@settings(max_examples=5)
def test_strided_inputs_and_gradients_give_what_contiguous_ones_give(name: str, data: Any) -> None:
    example = example_of(name, data.draw)
    ours, theirs = strided_on_the_device(name, example), on_the_device(name, example)
    if name != "swiglu":
        assert_same_bits(ours, theirs)
    for x, y in zip(ours, theirs, strict=True):  # another layout may take another path through BLAS
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-12 * max(1.0, largest(y)))


# --- storage in half precision ----------------------------------------------------------------------------------------


@on_a_gpu
@pytest.mark.parametrize("storage", [F16, BF16], ids=str)
@pytest.mark.parametrize("name", [name for name in NAMES if name != "swiglu"])
@given(data=st.data())
@settings(max_examples=5)
def test_half_precision_storage_gives_the_bits_of_the_same_values_in_float32(
    name: str, storage: np.dtype[Any], data: Any
) -> None:
    stored = in_dtype(example_of(name, data.draw), storage)
    assert_same_bits(on_the_device(name, stored), on_the_device(name, in_dtype(stored, np.float32)))


def swiglu_of_open_and_shut_gates(x: Array, wg: Array, wu: Array, wd: Array, dy: Array, storage: Any) -> list[Array]:
    """The result and all gradients where each gate is so far from zero that ``silu`` is the gate itself, or zero.

    Over integers nothing is rounded but what 16 bits round: the operands of each product, and its result, once.
    """

    def product(a: Array, b: Array) -> Array:
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


@on_a_gpu
@pytest.mark.parametrize("storage", [F16, BF16], ids=str)
def test_swiglu_with_weights_of_16_bits_rounds_the_operands_of_each_product_and_its_result_once(
    storage: np.dtype[Any],
) -> None:
    rng = np.random.default_rng(0)
    rows, hidden, inner = 6, 4, 6

    def integers(high: int, *shape: int) -> Array:
        return rng.integers(-high, high + 1, shape).astype(np.float64)

    x, wg, wu = integers(1, rows, hidden), integers(1, inner, hidden), integers(6, inner, hidden)
    wd, dy = integers(3, hidden, inner), integers(20, rows, hidden)
    # By the first channel each gate is far from zero.
    x[:, 0] = rng.choice([-1, 1], rows) * rng.integers(3, 6, rows)
    wg[:, 0] = rng.choice([-1, 1], inner) * rng.integers(11, 16, inner)
    leaves = [Tensor(place(x.astype(np.float32)), requires_grad=True)]
    leaves += [Tensor(place(w.astype(storage)), requires_grad=True) for w in (wg, wu, wd)]
    result = swiglu(*leaves)
    result.backward(place(dy.astype(np.float32)))
    ours = [host(result.data), *(host(leaf.grad) for leaf in leaves)]
    rounded, exact = (swiglu_of_open_and_shut_gates(x, wg, wu, wd, dy, dtype) for dtype in (storage, np.float64))
    for array, wanted, other in zip(ours, rounded, exact, strict=True):
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, wanted)
        assert np.any(wanted != other)  # or the example would prove nothing


@on_a_gpu
@pytest.mark.parametrize("storage", [F16, BF16], ids=str)
@given(data=st.data())
@settings(max_examples=10)
def test_swiglu_with_weights_of_16_bits_is_the_host_version_but_for_roundings_to_16_bits(
    storage: np.dtype[Any], data: Any
) -> None:
    x, *weights = example_of("swiglu", data.draw).arrays
    example = Example([x.astype(np.float32), *(w.astype(storage) for w in weights)], {})
    ours, wanted = on_the_device("swiglu", example), on_the_host(swiglu, example)
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


#: What AdamW's kernel, which is made when its dtypes are known, may be made for.
ADAMW = {
    "float": list(itertools.product(["f32", "bf16", "f16"], ["f32", "bf16"])),
    "double": list(itertools.product(["f64"], ["f64", "bf16"])),
}


def every_kernel(type_: str) -> dict[str, Kernel]:
    """All of the package that are made for ``T`` = float or double, by the module and the name that hold them."""
    names = [module.name for module in pkgutil.walk_packages(oxidizr_ref.__path__, "oxidizr_ref.")]
    modules = [importlib.import_module(name) for name in names if not name.endswith("__main__")]
    kernels = {
        f"{module.__name__}.{name}": value
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, Kernel)
    }
    for stored, slots in ADAMW[type_]:
        kernels[f"adamw.{stored}.{slots}"] = adamw_kernel(STORAGE_DTYPES[stored], STORAGE_DTYPES[slots])
    return kernels


@pytest.mark.thorough
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc")
@pytest.mark.parametrize("type_", ["float", "double"])
def test_every_kernel_of_the_package_compiles_for_a_gpu_and_has_no_atomics(type_: str, tmp_path: Path) -> None:
    # All in one file, which takes a second: each in a namespace of its own, and not extern "C", where names would clash.
    pieces = []
    for name, kernel in every_kernel(type_).items():
        code = kernel.code(type_).replace('extern "C" ', "")
        macros = "\n".join(f"#undef {macro}" for macro in re.findall(r"#define (\w+)", code))
        pieces.append(f'namespace {name.replace(".", "_")} {{\n#line 1 "{name}"\n{code}}}\n{macros}\n')
    (tmp_path / "all.cu").write_text("".join(pieces), encoding="utf-8")
    command = ["nvcc", "-ptx", "-arch=compute_80", "-std=c++17", "-Werror=all-warnings", "-o", "all.ptx", "all.cu"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assembly = (tmp_path / "all.ptx").read_text()
    assert assembly.count(".entry") == len(pieces)
    assert not re.search(r"\b(atom|red)\.", assembly)
