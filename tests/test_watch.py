"""watch.py: whoever watches is told of everything and decides what goes on; whoever only looks changes no bit."""

from __future__ import annotations

import contextvars
import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import pytest
from architectures import FEW, NAMES, batch, enliven, everywhere, lively_model, small_model
from devices import host, place
from hypothesis import given
from hypothesis import strategies as st

from oxidizr_ref import LanguageModel, Tensor, ops, optim
from oxidizr_ref.backend import Array, compute_dtype
from oxidizr_ref.errors import DataError
from oxidizr_ref.fused.register import reference
from oxidizr_ref.layers.feed_forward import Routing
from oxidizr_ref.nn import Module
from oxidizr_ref.optim import AdamW
from oxidizr_ref.trace import Record
from oxidizr_ref.trace.recorder import Recorder
from oxidizr_ref.watch import Part, Watcher, named, watched, watching

on_both = pytest.mark.usefixtures("device")

# --- a watcher that lets all pass changes nothing ---------------------------------------------------------------------


class Names:
    """A sink that keeps the names of what comes, each once."""

    def __init__(self) -> None:
        self.seen: dict[str, None] = {}

    def add(self, record: Record, array: Array, times: float = 1.0) -> None:  # noqa: ARG002
        self.seen[record.name] = None

    def add_part(self, record: Record, array: Array, at: int, length: int) -> None:  # noqa: ARG002
        self.seen[record.name] = None


def step_of(architecture: str, dtype: str, watcher: Callable[[LanguageModel], Watcher] | None) -> dict[str, bytes]:
    """Bytes of the loss, of every gradient, weight and moment of a training step of a lively model."""
    model = small_model(architecture, seed=1, dtype=dtype)
    enliven(model, seed=1)
    with watched(watcher(model)) if watcher is not None else nullcontext():
        loss = model.loss(*batch(seed=2), load_balance_alpha=0.1)
        loss.backward()
    gradients = {
        name: p.grad if p.grad is not None else place(np.zeros(p.shape, compute_dtype(p.dtype)))
        for name, p in model.named_parameters()
    }
    optimizer = AdamW(model.state_dict(), lr=1e-2)
    optimizer.step(gradients, gradient_scale=optim.clip_factor(optim.global_norm(gradients), 0.5))
    found = {"loss": loss.data, **{f"{name}.grad": gradient for name, gradient in gradients.items()}}
    return {name: host(array).tobytes() for name, array in {**found, **model.state_dict(), **optimizer.state_dict()}.items()}


SIDES = ("fused", "reference")


@everywhere("architecture,side", list(itertools.product(NAMES, SIDES)), list(itertools.product(FEW, SIDES)))
def test_a_step_has_equal_bits_watched_and_unwatched(architecture: str, side: str) -> None:
    names = Names()
    with reference() if side == "reference" else nullcontext():
        alone = step_of(architecture, "f32", None)
        assert step_of(architecture, "f32", lambda _: Watcher()) == alone
        assert step_of(architecture, "f32", lambda model: Recorder(model, names)) == alone
    assert len(names.seen) > 50, "the recorder did see it"
    assert len(set(alone.values())) > 20, "something was computed"


@on_both
@pytest.mark.parametrize("dtype", ["f64", "bf16", "f16"])
def test_so_it_has_whatever_the_parameters_are_stored_in(dtype: str) -> None:
    alone = step_of("hybrid", dtype, None)
    assert step_of("hybrid", dtype, lambda _: Watcher()) == alone
    assert step_of("hybrid", dtype, lambda model: Recorder(model, Names())) == alone


def test_unwatched_and_with_a_watcher_that_lets_all_pass_named_gives_back_the_very_object() -> None:
    things: list[Any] = [Tensor(np.zeros(2)), np.arange(3), object()]
    for context in (nullcontext(), watched(Watcher())):
        with context:
            for thing in things:
                assert named("x", thing) is thing
                assert named("x", thing, Part(1, 2), also=("y",)) is thing


def test_the_base_watcher_gives_back_the_very_arrays() -> None:
    array, watcher = np.zeros(3), Watcher()
    arrays = [array]
    assert watcher.operands(None, arrays) is arrays
    assert watcher.result(None, array) is array
    assert watcher.gradient(None, array) is array


# --- scopes -----------------------------------------------------------------------------------------------------------


class Scopes(Watcher):
    """Keeps full names in order, and what is entered and not yet left."""

    def __init__(self, model: Module) -> None:
        self.modules = {id(module): name for name, module in model.named_modules()}
        self.stack: list[str] = []
        self.names: list[str] = []

    def enter(self, module: Any) -> None:
        self.stack.append(self.modules[id(module)])

    def leave(self, module: Any) -> None:
        assert self.stack.pop() == self.modules[id(module)], "scopes are left in the order they were entered, the last first"

    def named(self, name: str, x: Any, part: Part | None, also: tuple[str, ...]) -> Any:  # noqa: ARG002
        self.names.append(f"{self.stack[-1]}:{name}" if self.stack else name)
        return x


class Oops(Exception):  # noqa: N818
    """What a module of these tests raises."""


class Visit(NamedTuple):
    """What a `Box` does when it is called: visit some of its boxes, one after the other; at the end maybe raise."""

    children: list[tuple[int, Visit]]
    raises: bool


class Box(Module):
    """A module of modules, ``depth`` levels below it."""

    def __init__(self, depth: int) -> None:
        self.boxes = [Box(depth - 1), Box(depth - 1)] if depth else []

    def __call__(self, visit: Visit) -> None:
        named("begin", 0)
        for index, inner in visit.children:
            try:
                self.boxes[index](inner)
            except Oops:
                named("caught", 0)
        self.helper()
        if visit.raises:
            raise Oops

    def helper(self) -> None:
        """Not ``__call__``: what is named here belongs to whoever is being called."""
        named("end", 0)


def visits(depth: int) -> st.SearchStrategy[Visit]:
    """Ways through a box with ``depth`` levels below it."""
    inner = st.lists(st.tuples(st.integers(0, 1), visits(depth - 1)), max_size=3) if depth else st.just([])
    return st.builds(Visit, inner, st.booleans())


def names_of(visit: Visit, path: str) -> Iterator[str]:
    """The names that a visit of the box at ``path`` must give."""
    yield f"{path}:begin"
    for index, inner in visit.children:
        yield from names_of(inner, f"{path}.boxes.{index}".removeprefix("."))
        if inner.raises:
            yield f"{path}:caught"
    yield f"{path}:end"


@given(visits(3))
def test_a_name_has_the_module_that_is_called_before_it_however_calls_nest_and_end(visit: Visit) -> None:
    box = Box(3)
    scopes = Scopes(box)
    with watched(scopes):
        named("before", 0)
        try:
            box(visit)
        except Oops:
            assert visit.raises
        named("after", 0)
    assert scopes.names == ["before", *names_of(visit, ""), "after"]
    assert scopes.stack == []


class Plain(Module):
    def __call__(self) -> None:
        named("plain", 0)


class Inheriting(Plain):
    """Its ``__call__`` is that of its class's base."""


class Extending(Plain):
    def __call__(self) -> None:
        super().__call__()
        named("extended", 0)


@pytest.mark.parametrize("kind, expected", [(Inheriting, ["a:plain"]), (Extending, ["a:plain", "a:extended"])])
def test_a_module_is_one_scope_whether_its_call_is_inherited_or_extended(kind: type[Plain], expected: list[str]) -> None:
    root = Box(0)
    root.a = kind()  # type: ignore[attr-defined]
    scopes = Scopes(root)
    with watched(scopes):
        root.a()  # type: ignore[attr-defined]
    assert (scopes.names, scopes.stack) == (expected, [])


@on_both
def test_calls_keep_their_names_docstrings_and_results() -> None:
    model = lively_model("llama")
    assert str(type(model).__call__.__doc__).startswith("The logits of the next token")
    with watched(Watcher()):
        watched_logits = host(model(tokens=batch()[0]).data)
    assert np.array_equal(watched_logits, host(model(batch()[0]).data))


def test_the_recorder_s_scope_is_restored_after_an_exception_deep_inside() -> None:
    def names(broken: bool) -> list[str]:
        model, sink = lively_model("llama"), Names()
        recorder = Recorder(model, sink)
        tokens = batch()[0]
        with watched(recorder):
            recorder.batch(1, 1, tokens, tokens)
            if broken:
                with pytest.raises(DataError, match="outside the vocabulary"):
                    model(tokens + 10_000)
            model(tokens)
        return list(sink.seen)

    assert names(broken=True) == names(broken=False)
    assert "layers.1.self_attn.q_proj.output" in names(broken=True)


def test_to_the_recorder_a_module_that_is_not_the_model_s_is_no_scope() -> None:
    sink = Names()
    stranger = Plain()
    with watched(Recorder(lively_model("llama"), sink)):
        before = list(sink.seen)
        stranger()
    assert list(sink.seen)[len(before) :] == ["plain"]


# --- what a watcher answers goes on -----------------------------------------------------------------------------------


class Answering(Watcher):
    """Answers by the functions it is given; lets the rest pass."""

    def __init__(self, **answers: Callable[..., Any]) -> None:
        for name, answer in answers.items():
            setattr(self, name, answer)


def gradients_of(*leaves: Tensor) -> list[float]:
    return [float(leaf.grad) for leaf in leaves if leaf.grad is not None]


def leaf(value: float) -> Tensor:
    return Tensor(place(value), requires_grad=True)


@on_both
def test_an_op_and_its_backward_read_the_operands_that_the_watcher_answers() -> None:
    x, y = leaf(3.0), leaf(5.0)
    with watched(Answering(operands=lambda _node, arrays: [a * 2 for a in arrays])):
        product = x * y
        product.backward()
    assert (product.item(), gradients_of(x, y)) == (60.0, [10.0, 6.0])


@on_both
def test_a_watcher_is_told_of_each_op_its_operands_and_its_result_in_order() -> None:
    told: list[tuple[str, str, list[float]]] = []

    def operands(node: Any, arrays: list[Array]) -> list[Array]:
        told.append(("operands", type(node).__name__, [float(a) for a in arrays]))
        return arrays

    def result(node: Any, y: Array) -> Array:
        told.append(("result", type(node).__name__, [float(y)]))
        return y

    def gradient(node: Any, dy: Array) -> Array:
        told.append(("gradient", type(node).__name__, [float(dy)]))
        return dy

    with watched(Answering(operands=operands, result=result, gradient=gradient)):
        y = ops.exp(leaf(0.0) * Tensor(place(7.0))) + Tensor(place(1.0))
        y.backward()
    assert told == [
        ("operands", "Mul", [0.0, 7.0]),
        ("result", "Mul", [0.0]),
        ("operands", "Exp", [0.0]),
        ("result", "Exp", [1.0]),
        ("operands", "Add", [1.0, 1.0]),
        ("result", "Add", [2.0]),
        ("gradient", "Add", [1.0]),
        ("gradient", "Exp", [1.0]),
        ("gradient", "Mul", [1.0]),
    ]


@on_both
def test_others_read_the_result_that_the_watcher_answers() -> None:
    x = leaf(3.0)
    with watched(Answering(result=lambda _node, y: y + 100.0)):
        y = x * x
        z = y * y
    assert (y.item(), z.item()) == (109.0, 109.0**2 + 100.0)


@on_both
def test_gradients_go_on_as_the_watcher_answers_and_come_to_it_whole() -> None:
    seen: list[float] = []

    def ten_times(_node: Any, dy: Array) -> Array:
        seen.append(float(dy))
        return dy * 10.0

    x = leaf(2.0)
    y = x * x  # read twice below: its gradient is the sum of both, shown once
    z = y + y
    with watched(Answering(gradient=ten_times)):
        z.backward()
    assert seen == [1.0, 20.0]
    assert gradients_of(x) == [10.0 * 20.0 * 4.0]


@on_both
def test_the_forward_pass_may_be_unwatched_and_the_backward_pass_watched_and_the_reverse() -> None:
    x = leaf(2.0)
    with watched(Answering(gradient=lambda _node, dy: dy * 10.0)):
        y = x * x
    y.backward()
    assert gradients_of(x) == [4.0]


@on_both
def test_code_goes_on_with_the_tensor_that_the_watcher_answers_to_a_name() -> None:
    model, (tokens, _) = lively_model("llama"), batch()
    seen: dict[str, Array] = {}

    def zeroed(name: str, x: Any, _part: Part | None, _also: tuple[str, ...]) -> Any:
        return x * 0.0 if name == "context" else x

    def unchanged(name: str, x: Any, _part: Part | None, _also: tuple[str, ...]) -> Any:
        seen[name] = x.data
        return x

    with watched(Answering(named=zeroed)):
        without = host(model(tokens).data)
    for name, weight in model.state_dict().items():
        if name.endswith("o_proj.weight"):
            weight[...] = 0.0
    with watched(Answering(named=unchanged)):
        assert np.array_equal(host(model(tokens).data), without)
    assert "context" in seen and seen["context"].any()


@on_both
def test_tokens_go_to_the_experts_that_the_watcher_answers() -> None:
    model, (tokens, _) = lively_model("moe"), batch()
    routings: list[Routing] = []

    def last_two(name: str, x: Any, _part: Part | None, _also: tuple[str, ...]) -> Any:
        return np.broadcast_to(np.array([3, 2]), x.shape) if name == "ids" else x

    with reference(), watched(Answering(named=last_two)):
        model.hidden(tokens, routings)
    assert [routing.assigned.tolist() for routing in routings] == [[0, 0, tokens.size, tokens.size]] * 2


@on_both
def test_parts_tell_their_place_and_how_many_there_are() -> None:
    model, (tokens, _) = lively_model("mamba2"), batch()
    parts: list[Part] = []

    def collected(name: str, x: Any, part: Part | None, _also: tuple[str, ...]) -> Any:
        assert (part is not None) == (name == "state")
        parts.extend([part] if part is not None else [])
        return x

    with reference(), watched(Answering(named=collected)):
        model(tokens)
    assert parts == [Part(at, tokens.shape[1]) for at in range(tokens.shape[1])] * 2


# --- who watches where ------------------------------------------------------------------------------------------------


@contextmanager
def expected(watcher: Watcher | None) -> Iterator[None]:
    """Before and after the body this watcher is the one."""
    assert watching() is watcher
    yield
    assert watching() is watcher


def test_the_inner_watcher_is_the_only_one_until_its_context_ends_also_by_an_exception() -> None:
    outer, inner = Watcher(), Watcher()
    with expected(None), watched(outer):
        with expected(outer), watched(inner), expected(inner):
            pass
        with expected(outer), pytest.raises(Oops), watched(inner):
            raise Oops
        with expected(outer), watched(outer), expected(outer):  # the same one again
            pass


def test_only_the_inner_watcher_s_answer_counts() -> None:
    x = leaf(1.0)
    with watched(Answering(result=lambda _node, y: y * 2.0)):
        with watched(Answering(result=lambda _node, y: y * 3.0)):
            assert (x * x).item() == 3.0
        assert (x * x).item() == 2.0
    assert (x * x).item() == 1.0


def test_another_thread_is_unwatched_and_may_have_a_watcher_of_its_own() -> None:
    here, there = Watcher(), Watcher()
    found: list[Watcher | None] = []
    entered, leave = threading.Event(), threading.Event()

    def work() -> None:
        found.append(watching())
        with watched(there):
            entered.set()
            leave.wait()
            found.append(watching())
        found.append(watching())

    thread = contextvars.Context().run(threading.Thread, target=work)
    with watched(here):
        # Python may be told to let threads inherit the context of whoever starts them: this one starts in an empty one.
        contextvars.Context().run(thread.start)
        assert entered.wait(60)
        assert watching() is here
        leave.set()
        thread.join()
        assert watching() is here
    assert found == [None, there, None]


def test_a_context_that_was_copied_is_watched_and_what_is_watched_in_it_stays_in_it() -> None:
    here, there = Watcher(), Watcher()
    with watched(here):
        copied = contextvars.copy_context()
        assert copied.run(watching) is here
        manager = watched(there)
        copied.run(manager.__enter__)
        assert (copied.run(watching), watching()) == (there, here)
        copied.run(manager.__exit__, None, None, None)
        assert (copied.run(watching), watching()) == (here, here)
    assert (copied.run(watching), watching()) == (here, None)
