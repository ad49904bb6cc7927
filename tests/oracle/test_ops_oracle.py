"""Every primitive and AdamW against PyTorch, forward and gradients, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_ops import ALL_OPS, CASES, name_of

from oxidizr_ref import ops
from oxidizr_ref.autograd import Function, Tensor
from oxidizr_ref.optim import AdamW, clip_factor, global_norm

torch = pytest.importorskip("torch")
F = torch.nn.functional
pytestmark = pytest.mark.oracle

rng = np.random.default_rng(0)


def normal(*shape: int) -> Any:
    return rng.standard_normal(shape)


def positive(*shape: int) -> Any:
    return rng.uniform(0.5, 2, shape)


def compare(ours: Callable[..., Any], theirs: Callable[..., Any], arrays: list[Any]) -> None:
    """Relative error max|a-b| / max|b| below 1e-10 in the result and in every gradient; exact where PyTorch's is zero."""
    leaves = [Tensor(array.copy(), requires_grad=True) for array in arrays]
    judges = [torch.tensor(array, requires_grad=True) for array in arrays]
    result, wanted = ours(*leaves), theirs(*judges)
    dy = np.random.default_rng(1).standard_normal(result.shape)
    result.backward(dy)
    wanted.backward(torch.tensor(dy))
    pairs = [(result.data, wanted.detach().numpy())]
    pairs += [(leaf.grad, judge.grad.numpy()) for leaf, judge in zip(leaves, judges, strict=True)]
    for found, judge in pairs:
        assert found.shape == judge.shape
        assert np.max(np.abs(found - judge), initial=0) <= 1e-10 * np.max(np.abs(judge), initial=0)


# --- primitives -------------------------------------------------------------------------------------------------------

IDS = rng.integers(0, 5, (3, 4))  # 12 ids of 5 rows: some row is read more than twice
ALONG = np.array([[0, 0, 3], [2, 2, 2]])
CONDITION = rng.random((3, 4)) < 0.5
#: op class -> (name, ours, PyTorch's, arrays), as many as it takes.
EXAMPLES: dict[type[Function], list[tuple[str, Callable[..., Any], Callable[..., Any], list[Any]]]] = {
    ops.Add: [("broadcast", lambda a, b: a + b, lambda a, b: a + b, [normal(3, 1, 4), normal(2, 1)])],
    ops.Sub: [("broadcast", lambda a, b: a - b, lambda a, b: a - b, [normal(4), normal(2, 3, 1)])],
    ops.Mul: [("broadcast", lambda a, b: a * b, lambda a, b: a * b, [normal(3, 1), normal(1, 4)])],
    ops.Div: [("broadcast", lambda a, b: a / b, lambda a, b: a / b, [normal(3, 4), positive(3, 1)])],
    ops.MatMul: [
        ("matrices", ops.matmul, torch.matmul, [normal(3, 4), normal(4, 5)]),
        ("batches", ops.matmul, torch.matmul, [normal(2, 1, 3, 4), normal(6, 4, 5)]),
        ("nothing to sum", ops.matmul, torch.matmul, [normal(3, 0), normal(0, 5)]),
    ],
    ops.Where: [
        (
            "broadcast",
            lambda a, b: ops.where(a, b, condition=CONDITION),
            lambda a, b: torch.where(torch.tensor(CONDITION), a, b),
            [normal(4), normal(3, 1)],
        )
    ],
    ops.Power: [(str(e), lambda x, e=e: x**e, lambda x, e=e: x**e, [positive(3, 4)]) for e in (2, 3, 0.5, -1, -2.5, 0, 1)],
    ops.Exp: [("", ops.exp, torch.exp, [normal(3, 4)])],
    ops.Log: [("", ops.log, torch.log, [positive(3, 4)])],
    ops.Sqrt: [("", ops.sqrt, torch.sqrt, [positive(3, 4)])],
    ops.Sin: [("", ops.sin, torch.sin, [normal(3, 4)])],
    ops.Cos: [("", ops.cos, torch.cos, [normal(3, 4)])],
    ops.Tanh: [("", ops.tanh, torch.tanh, [normal(3, 4)])],
    ops.Sigmoid: [("", ops.sigmoid, torch.sigmoid, [normal(3, 4) * 10])],
    ops.Softplus: [
        ("", ops.softplus, F.softplus, [normal(3, 4)]),
        ("far out", ops.softplus, lambda x: F.softplus(x, threshold=1e9), [np.array([-700.0, -40.0, 0.0, 40.0, 700.0])]),
    ],
    ops.Sum: [
        ("all", lambda x: x.sum(), lambda x: x.sum(), [normal(2, 3, 4)]),
        ("axes", lambda x: x.sum(axis=(0, -1)), lambda x: x.sum((0, -1)), [normal(2, 3, 4)]),
        ("keep", lambda x: x.sum(axis=1, keepdims=True), lambda x: x.sum(1, keepdim=True), [normal(2, 3, 4)]),
        ("empty", lambda x: x.sum(axis=0), lambda x: x.sum(0), [normal(0, 4)]),
    ],
    ops.Max: [
        ("axis", lambda x: ops.amax(x, axis=1), lambda x: torch.amax(x, 1), [normal(3, 4, 2)]),
        (
            "ties",
            lambda x: ops.amax(x, axis=-1, keepdims=True),
            lambda x: torch.amax(x, -1, keepdim=True),
            [rng.integers(0, 3, (6, 5)).astype(float)],
        ),
    ],
    ops.Softmax: [
        ("last", lambda x: ops.softmax(x, axis=-1), lambda x: torch.softmax(x, -1), [normal(3, 4) * 5]),
        ("first", lambda x: ops.softmax(x, axis=0), lambda x: torch.softmax(x, 0), [normal(3, 4) * 5]),
    ],
    ops.LogSoftmax: [
        ("last", lambda x: ops.log_softmax(x, axis=-1), lambda x: torch.log_softmax(x, -1), [normal(3, 4) * 5]),
        ("first", lambda x: ops.log_softmax(x, axis=0), lambda x: torch.log_softmax(x, 0), [normal(3, 4) * 5]),
    ],
    ops.CumSum: [
        (str(a), lambda x, a=a: ops.cumsum(x, axis=a), lambda x, a=a: x.cumsum(a), [normal(3, 4)]) for a in (0, -1)
    ],
    ops.Reshape: [("", lambda x: x.reshape(4, -1), lambda x: x.reshape(4, -1), [normal(2, 3, 4)])],
    ops.Transpose: [
        ("", lambda x: ops.transpose(x, order=(1, 2, 0)), lambda x: x.permute(1, 2, 0), [normal(2, 3, 4)]),
    ],
    ops.BroadcastTo: [
        ("", lambda x: ops.broadcast_to(x, shape=(5, 2, 4)), lambda x: x.expand(5, 2, 4), [normal(2, 1)]),
    ],
    ops.GetItem: [
        ("", lambda x: x[1, ..., None, 1:3], lambda x: x[1, ..., None, 1:3], [normal(2, 3, 4)]),
        ("reversed", lambda x: x[:, ::-2], lambda x: x.flip(1)[:, ::2], [normal(2, 5)]),
    ],
    ops.Pad: [
        ("", lambda x: ops.pad(x, widths=((1, 0), (2, 3))), lambda x: F.pad(x, (2, 3, 1, 0)), [normal(2, 3)]),
    ],
    ops.Concatenate: [
        (
            "",
            lambda *parts: ops.concatenate(*parts, axis=-1),
            lambda *parts: torch.cat(parts, -1),
            [normal(2, 3), normal(2, 0), normal(2, 1)],
        ),
    ],
    ops.Whole: [("", ops.Whole.apply, lambda x: x * 1.0, [normal(3, 4)])],
    ops.Part: [("neighbours", lambda x: ops.split(x, (1, 3))[1], lambda x: torch.split(x, (1, 3), -1)[1], [normal(3, 4)])],
    ops.Lookup: [
        (
            "duplicates",
            lambda table: ops.lookup(table, ids=IDS),
            lambda table: F.embedding(torch.tensor(IDS), table),
            [normal(5, 6)],
        ),
    ],
    ops.TakeAlong: [
        (
            "duplicates",
            lambda x: ops.take_along(x, ids=ALONG),
            lambda x: torch.gather(x, -1, torch.tensor(ALONG)),
            [normal(2, 4)],
        ),
    ],
}


@pytest.mark.parametrize("op", ALL_OPS, ids=name_of)
def test_primitive_equals_pytorch_in_result_and_gradients(op: type[Function]) -> None:
    assert op in EXAMPLES, f"{op.__name__} is compared with nothing: write an example"
    for _, ours, theirs, arrays in EXAMPLES[op]:
        compare(ours, theirs, arrays)


COMPOSED: dict[str, tuple[Callable[..., Any], Callable[..., Any], list[Any]]] = {
    "silu": (ops.silu, F.silu, [normal(3, 4)]),
    "mean": (lambda x: x.mean(), lambda x: x.mean(), [normal(3, 4)]),
    "mean over axes": (lambda x: x.mean(axis=(0, 2)), lambda x: x.mean((0, 2)), [normal(2, 3, 4)]),
    "swapaxes": (lambda x: x.swapaxes(0, -1), lambda x: x.swapaxes(0, -1), [normal(2, 3, 4)]),
    "split": (
        lambda x: ops.concatenate(*(part * part.sum() for part in ops.split(x, (2, 0, 3), axis=1)), axis=1),
        lambda x: torch.cat([part * part.sum() for part in torch.split(x, (2, 0, 3), 1)], 1),
        [normal(2, 5, 3)],
    ),
    "negative": (lambda x: -x, lambda x: -x, [normal(3)]),
    "with numbers": (lambda x: 2 / (1 - x * 3) - x / 4, lambda x: 2 / (1 - x * 3) - x / 4, [positive(3)]),
    "matrix product by operator": (lambda a, b: a @ b, lambda a, b: a @ b, [normal(3, 4), normal(4, 2)]),
}


@pytest.mark.parametrize("name", COMPOSED)
def test_composed_function_equals_pytorch_in_result_and_gradients(name: str) -> None:
    compare(*COMPOSED[name])


# --- primitives, on the generated shapes, broadcasts and layouts of test_ops.py ----------------------------------------


def torch_getitem(x: Any, index: Any) -> Any:
    """NumPy's indexing by way of the positions of the elements: PyTorch's knows no negative steps."""
    positions = np.arange(x.numel()).reshape(tuple(x.shape))[index]
    return x.reshape(-1)[torch.tensor(positions.copy())]


def torch_sum(x: Any, axis: Any = None, keepdims: bool = False) -> Any:
    if axis == ():  # PyTorch takes that for all axes, NumPy for none
        return x.clone()
    return x.sum(tuple(range(x.ndim)) if axis is None else axis, keepdim=keepdims)


def torch_pad(x: Any, widths: Any) -> Any:
    return F.pad(x, [width for pair in reversed(widths) for width in pair])


#: op class -> PyTorch's function of the same tensors and of the same options.
TORCH: dict[type[Function], Callable[..., Any]] = {
    ops.Add: torch.add,
    ops.Sub: torch.sub,
    ops.Mul: torch.mul,
    ops.Div: torch.div,
    ops.MatMul: torch.matmul,
    ops.Where: lambda a, b, condition: torch.where(torch.tensor(condition), a, b),
    ops.Power: lambda x, exponent: torch.pow(x, exponent),
    ops.Exp: torch.exp,
    ops.Log: torch.log,
    ops.Sqrt: torch.sqrt,
    ops.Sin: torch.sin,
    ops.Cos: torch.cos,
    ops.Tanh: torch.tanh,
    ops.Sigmoid: torch.sigmoid,
    ops.Softplus: F.softplus,
    ops.Sum: torch_sum,
    ops.Max: lambda x, axis=-1, keepdims=False: torch.amax(x, axis, keepdim=keepdims),
    ops.Softmax: lambda x, axis=-1: torch.softmax(x, axis),
    ops.LogSoftmax: lambda x, axis=-1: torch.log_softmax(x, axis),
    ops.CumSum: lambda x, axis: torch.cumsum(x, axis),
    ops.Reshape: lambda x, shape: torch.reshape(x, shape),
    ops.Transpose: lambda x, order: torch.permute(x, order),
    ops.BroadcastTo: lambda x, shape: torch.broadcast_to(x, shape),
    ops.GetItem: torch_getitem,
    ops.Pad: torch_pad,
    ops.Concatenate: lambda *parts, axis: torch.cat(parts, axis),
    ops.Whole: lambda x: x * 1.0,
    ops.Part: lambda x, index, whole: x[index],
    ops.Lookup: lambda table, ids: table[torch.tensor(ids)],
    ops.TakeAlong: lambda x, ids: torch.gather(x, -1, torch.tensor(ids)),
}


def test_every_op_has_generated_cases_and_a_torch_function() -> None:
    assert len(ALL_OPS) >= 30 and set(ALL_OPS) == TORCH.keys() == CASES.keys()


@pytest.mark.parametrize("op", ALL_OPS, ids=name_of)
@given(data=st.data())
def test_primitive_equals_pytorch_for_generated_shapes_broadcasts_and_layouts(op: type[Function], data: Any) -> None:
    function, arrays = CASES[op](data.draw)
    calls: list[dict[str, Any]] = []
    forward = op.forward

    def recorded(self: Function, *inputs: Any, **options: Any) -> Any:
        calls.append(options)
        return forward(self, *inputs, **options)

    leaves = [Tensor(array, requires_grad=True) for array in arrays]
    with mock.patch.object(op, "forward", recorded):
        result = function(*leaves)
    assert len(calls) == 1 and type(result.node) is op  # so that PyTorch is told the same options
    judges = [torch.tensor(array.copy(), requires_grad=True) for array in arrays]
    wanted = TORCH[op](*judges, **calls[0])
    dy = np.random.default_rng(1).standard_normal(result.shape)
    result.backward(dy)
    assert result.shape == tuple(wanted.shape)
    wanted.backward(torch.tensor(dy))
    pairs = [(result.data, wanted.detach().numpy())]
    pairs += [(leaf.grad, judge.grad.numpy()) for leaf, judge in zip(leaves, judges, strict=True)]
    for found, judge in pairs:
        assert found.shape == judge.shape and found.dtype == judge.dtype == np.float64
        # All numbers are of order 1. The floor is for gradients that are nothing but rounding, as of a sum that cancels.
        assert np.max(np.abs(found - judge), initial=0) <= 1e-10 * max(np.max(np.abs(judge), initial=0), 1e-3)


# --- AdamW ------------------------------------------------------------------------------------------------------------


def test_ten_steps_of_adamw_equal_pytorchs() -> None:
    start = {"a.weight": normal(5, 7), "b.norm.weight": normal(7)}
    gradients = [{name: normal(*array.shape) for name, array in start.items()} for _ in range(10)]
    arrays = {name: array.copy() for name, array in start.items()}
    ours = AdamW(arrays, lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    judges = {name: torch.tensor(array, requires_grad=True) for name, array in start.items()}
    theirs = torch.optim.AdamW(
        [{"params": [judges["a.weight"]], "weight_decay": 0.1}, {"params": [judges["b.norm.weight"]], "weight_decay": 0.0}],
        lr=0.01,
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    for n, g in enumerate(gradients):
        rate = 0.01 * (1 - 0.05 * n)
        for group in theirs.param_groups:
            group["lr"] = rate
        for name, judge in judges.items():
            judge.grad = torch.tensor(g[name])
        theirs.step()
        ours.step(g, lr=rate)
    for name, judge in judges.items():
        wanted = judge.detach().numpy()
        assert np.max(np.abs(arrays[name] - wanted)) <= 1e-12 * np.max(np.abs(wanted))
        for slot in ("exp_avg", "exp_avg_sq"):
            wanted = theirs.state[judge][slot].numpy()
            assert np.max(np.abs(ours.slots[slot][name] - wanted)) <= 1e-12 * np.max(np.abs(wanted))


def test_clipping_equals_pytorchs() -> None:
    gradients = {"a": normal(5, 7), "b": normal(7)}
    judges = [torch.zeros(g.shape, dtype=torch.float64, requires_grad=True) for g in gradients.values()]
    for judge, g in zip(judges, gradients.values(), strict=True):
        judge.grad = torch.tensor(g)
    norm = torch.nn.utils.clip_grad_norm_(judges, 1.0)
    assert global_norm(gradients) == pytest.approx(float(norm), rel=1e-13)
    factor = clip_factor(global_norm(gradients), 1.0)
    for judge, g in zip(judges, gradients.values(), strict=True):
        np.testing.assert_allclose(g * factor, judge.grad.numpy(), rtol=1e-13)
