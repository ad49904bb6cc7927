"""Traces of PyTorch models: what hooks and notes write under which names, and that the model does not notice."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra 'oracle'")

from torch import nn  # noqa: E402

from oxidizr_ref.errors import TraceError  # noqa: E402
from oxidizr_ref.trace import TorchRecorder, Trace, compare  # noqa: E402

pytestmark = pytest.mark.oracle
torch.set_num_threads(1)

TOKENS = np.array([[1, 2, 0], [3, 1, 1]])
TARGETS = np.array([[2, 0, 3], [1, 1, 2]])


class Block(nn.Module):
    """A layer with an activation that is called twice and a parameter that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.act = nn.Linear(4, 6), nn.Linear(6, 4), nn.Tanh()
        self.unused = nn.Parameter(torch.ones(2, 3))

    def forward(self, x: Any) -> tuple[Any, Any]:
        h = self.act(self.up(x))
        return x + self.down(self.act(h)), h


class Model(nn.Module):
    """Tokens to logits."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(5, 4)
        self.layers = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(4, 5, bias=False)

    def forward(self, tokens: Any) -> Any:
        x = self.embed(tokens)
        for layer in self.layers:
            x, _ = layer(x)
        return self.head(x)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "theirs.safetensors"


@pytest.fixture(params=[torch.float64, torch.float32, torch.bfloat16], ids=["f64", "f32", "bf16"])
def model(request: pytest.FixtureRequest) -> Model:
    return Model().to(request.param)


def precision_of(model: nn.Module) -> str:
    dtype = next(model.parameters()).dtype
    return {torch.float64: "f64", torch.float32: "f32", torch.bfloat16: "bf16"}[dtype]


def loss_of(model: nn.Module, tokens: np.ndarray[Any, Any] = TOKENS) -> Any:
    logits = model(torch.tensor(tokens))
    return nn.functional.cross_entropy(logits.flatten(0, 1), torch.tensor(TARGETS).flatten())


def exactly(found: np.ndarray[Any, Any], tensor: Any) -> bool:
    """Whether the trace has the tensor's numbers, all bits of them."""
    expected = tensor.detach()
    expected = (expected.float() if expected.dtype == torch.bfloat16 else expected).numpy()
    return found.dtype == expected.dtype and np.array_equal(found, expected)


def steps(model: nn.Module, recorder: TorchRecorder | None = None, count: int = 2) -> list[Any]:
    """Some training steps, recorded or not. Returns every tensor that they leave."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    left: list[Any] = []
    for step in range(count):
        optimizer.zero_grad()
        if recorder is not None:
            if step:
                recorder.next_step()
            recorder.inputs(TOKENS, TARGETS)
            if not step:
                recorder.watch(model)
                recorder.parameters(model.named_parameters())
        loss = loss_of(model)
        loss.backward()
        left += [loss.detach().clone()]
        if recorder is not None:
            recorder.gradients(model.named_parameters())
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        if recorder is not None:
            recorder.clipped(model.named_parameters(), norm, factor=0.5, learning_rate=0.01)
        left += [p.grad.clone() for p in model.parameters() if p.grad is not None] + [norm]
        optimizer.step()
        if recorder is not None:
            recorder.updated(model.named_parameters(), optimizer)
        left += [p.detach().clone() for p in model.parameters()]
    return left


# --- what is written --------------------------------------------------------------------------------------------------


def test_results_of_modules_and_their_gradients_have_the_names_of_the_modules(model: Model, path: Path) -> None:
    seen: dict[str, Any] = {}

    def keep(name: str) -> Any:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            seen[name] = output
            output.retain_grad()

        return hook

    for name in ("embed", "layers.0.up", "layers.1.down", "head"):
        model.get_submodule(name).register_forward_hook(keep(name))
    with TorchRecorder(path, precision_of(model)) as recorder:
        recorder.watch(model)
        loss_of(model).backward()
    trace = Trace(path)
    assert trace.precision == precision_of(model) and trace.metadata["made_by"] == "PyTorch"
    for name, output in seen.items():
        assert exactly(trace.array(f"{name}.output"), output), name
        assert exactly(trace.array(f"{name}.output.grad"), output.grad), name
    assert list(trace.records)[:3] == ["embed.output", "layers.0.up.output", "layers.0.act.output"]
    assert trace.records["layers.0.up.output.grad"].role == "gradient" and trace.records["layers.0.up.output"].layer == 0


def test_of_several_results_each_has_its_number(path: Path) -> None:
    model = Model()
    with TorchRecorder(path) as recorder:
        recorder.watch(model)
        loss_of(model).backward()
    names = Trace(path).records
    assert {"layers.0.output.0", "layers.0.output.1", "layers.1.output.0", "layers.1.output.1"} <= set(names)
    assert "layers.0.output" not in names and "layers.output" not in names and "output" not in names


def test_of_a_module_that_is_called_twice_the_first_call_counts(path: Path) -> None:
    model = Model()
    with TorchRecorder(path) as recorder:
        recorder.watch(model)
        loss_of(model)
    trace = Trace(path)
    first = np.tanh(trace.array("layers.0.up.output"))
    assert np.allclose(trace.array("layers.0.act.output"), first, rtol=1e-6)  # NumPy's tanh is another one
    assert not np.allclose(np.tanh(first), first, rtol=1e-3)
    assert np.array_equal(trace.array("layers.0.act.output"), trace.array("layers.0.output.1"))


def test_gradient_checkpointing_computes_again_and_changes_nothing(path: Path) -> None:
    """The second forward of a layer comes within the backward pass; its values are there already."""
    from torch.utils.checkpoint import checkpoint

    model = Model()
    loss_of(model).backward()
    plain = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    forward = model.layers[0].forward
    model.layers[0].forward = lambda x: checkpoint(forward, x, use_reentrant=False)
    with TorchRecorder(path) as recorder:
        recorder.watch(model)
        loss_of(model).backward()
    again = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert "layers.0.up.output.grad" in Trace(path).records


def test_notes_write_values_inside_modules_and_give_them_back(model: Model, path: Path) -> None:
    with TorchRecorder(path, precision_of(model)) as recorder:
        x = model.embed(torch.tensor(TOKENS))
        x.retain_grad()
        assert recorder.note("layers.0.self_attn.q", x) is x
        ids = torch.tensor([[2, 0], [1, 3]])
        recorder.note("layers.0.moe.router.ids", ids)
        recorder.note("scale", 0.5)
        (x.float() ** 2).sum().backward()
    trace = Trace(path)
    assert exactly(trace.array("layers.0.self_attn.q"), x) and exactly(trace.array("layers.0.self_attn.q.grad"), x.grad)
    assert np.array_equal(trace.array("layers.0.moe.router.ids"), ids) and trace.array("scale") == 0.5
    assert trace.records["layers.0.self_attn.q"].op == "rope" and trace.records["layers.0.moe.router.ids"].role == "output"


def test_a_note_whose_gradient_never_comes_has_one_of_zeros(path: Path) -> None:
    model = Model()
    with TorchRecorder(path) as recorder:
        x = recorder.note("used", model.embed(torch.tensor(TOKENS)))
        recorder.note("unused", 2 * x)
        recorder.note("complex", torch.complex(x, x))
        recorder.note("constant", torch.ones(3))
        for t in range(3):
            recorder.note("state", x[:, t], part=(t, 3))
        (x.sum() + x[:, 1].sum()).backward()
        recorder.gradients(model.named_parameters())
    trace = Trace(path)
    assert trace.array("used.grad").any()
    for name in ("unused", "complex", "state"):
        assert trace.array(f"{name}.grad").shape == trace.array(name).shape and not trace.array(f"{name}.grad").any()
    assert trace.array("complex").shape == (2, 3, 4, 2) and "constant.grad" not in trace.records


def test_a_parameter_without_a_gradient_has_one_of_zeros(path: Path) -> None:
    model = Model()
    with TorchRecorder(path) as recorder:
        steps(model, recorder, 1)
    trace = Trace(path)
    zeros = trace.array("layers.0.unused.grad")
    assert zeros.shape == (2, 3) and not zeros.any() and trace.array("layers.0.up.weight.grad").any()
    assert trace.array("layers.0.unused.after").all()


def test_parts_make_up_a_whole_with_its_gradients(path: Path) -> None:
    """Time first; the gradients come from the last to the first."""
    h = torch.ones(2, 3, requires_grad=True)
    states = []
    with TorchRecorder(path) as recorder:
        state = h
        for t in range(4):
            state = state * (t + 2)
            state.retain_grad()
            states.append(recorder.note("layers.0.mamba.state", state, part=(t, 4)))
        sum(s.sum() for s in states).backward()
    trace = Trace(path)
    assert np.array_equal(trace.array("layers.0.mamba.state"), torch.stack(states).detach())
    assert np.array_equal(trace.array("layers.0.mamba.state.grad"), torch.stack([s.grad for s in states]))


def test_what_a_step_does_with_gradients_and_parameters_is_written_too(model: Model, path: Path) -> None:
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    with TorchRecorder(path, precision_of(model)) as recorder:
        recorder.inputs(torch.tensor(TOKENS), TARGETS)
        recorder.parameters(model.named_parameters())
        loss_of(model).backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        recorder.gradients(model.named_parameters())
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        recorder.clipped(model.named_parameters(), norm, 0.25, 0.01)
        optimizer.step()
        recorder.updated(model.named_parameters(), optimizer)
    trace = Trace(path)
    assert np.array_equal(trace.array("tokens"), TOKENS) and np.array_equal(trace.array("targets"), TARGETS)
    assert exactly(trace.array("grad_norm"), norm)
    assert (trace.array("clip_factor"), trace.array("learning_rate")) == (
        0.25,
        trace.array("learning_rate").dtype.type(0.01),
    )
    for name, p in model.named_parameters():
        assert exactly(trace.array(name), before[name]) and exactly(trace.array(f"{name}.after"), p)
        if name in gradients:
            assert exactly(trace.array(f"{name}.grad"), gradients[name])
            assert exactly(trace.array(f"{name}.grad.clipped"), p.grad)
            for slot in ("exp_avg", "exp_avg_sq"):
                assert exactly(trace.array(f"optimizer.{slot}.{name}"), optimizer.state[p][slot])
    assert not [name for name in trace.records if name.startswith("optimizer.step")]
    roles = {record.role for record in trace.records.values()}
    assert roles == {"input", "output", "gradient", "optimizer", "parameter_after"}


# --- names ------------------------------------------------------------------------------------------------------------


def test_micro_batches_and_steps_have_their_numbers(path: Path) -> None:
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with TorchRecorder(path) as recorder:
        recorder.watch(model)
        for step in range(2):
            if step:
                recorder.next_step()
            optimizer.zero_grad()
            for micro in range(2):
                if micro:
                    recorder.next_batch()
                recorder.inputs(TOKENS + micro, TARGETS)
                recorder.note("loss", loss_of(model, TOKENS + micro)).backward()
            recorder.gradients(model.named_parameters())
            recorder.clipped(model.named_parameters(), 1.0)
            optimizer.step()
            recorder.updated(model.named_parameters(), optimizer)
    trace = Trace(path)
    prefixes = ("", "micro.2.", "step.2.", "step.2.micro.2.")
    for name in ("tokens", "targets", "embed.output", "layers.1.down.output", "layers.1.down.output.grad", "loss"):
        assert [f"{prefix}{name}" in trace.records for prefix in prefixes] == [True] * 4, name
    assert np.array_equal(trace.array("step.2.micro.2.tokens"), TOKENS + 1)
    for name in ("head.weight.grad", "head.weight.grad.clipped", "head.weight.after", "grad_norm"):
        assert [f"{prefix}{name}" in trace.records for prefix in prefixes] == [True, False, True, False], name
    assert not np.array_equal(trace.array("head.output"), trace.array("step.2.head.output"))
    assert not any(name.startswith("optimizer.") for name in trace.records)  # plain SGD keeps nothing


def test_a_step_begins_with_its_first_micro_batch_whatever_was_recorded_of_the_one_before(path: Path) -> None:
    with TorchRecorder(path) as recorder:
        recorder.next_batch()
        recorder.note("loss", torch.ones(()))
        recorder.next_step()
        recorder.note("loss", torch.ones(()))
    assert list(Trace(path).records) == ["micro.2.loss", "step.2.loss"]


def test_of_a_parameter_that_is_a_single_number_only_the_moments_are_slots(path: Path) -> None:
    """The optimizer's count of steps has its shape, too."""
    scale = nn.Parameter(torch.tensor(2.0))
    optimizer = torch.optim.AdamW([scale], lr=0.1)
    (scale**2).backward()
    optimizer.step()
    with TorchRecorder(path) as recorder:
        recorder.updated([("scale", scale)], optimizer)
    assert list(Trace(path).records) == ["scale.after", "optimizer.exp_avg.scale", "optimizer.exp_avg_sq.scale"]


def test_their_names_are_renamed_wherever_they_stand(path: Path) -> None:
    model = Model()

    def rename(name: str) -> str:
        return name.replace("embed.", "embed_tokens.").replace("head.output", "logits").replace("head.", "lm_head.")

    with TorchRecorder(path, rename=rename) as recorder:
        steps(model, recorder, 2)
        recorder.note("head.extra", torch.ones(1))
    names = set(Trace(path).records)
    assert {"logits", "logits.grad", "step.2.logits", "embed_tokens.output", "tokens", "step.2.targets"} <= names
    of_head = ("lm_head.weight", "lm_head.weight.grad", "lm_head.weight.grad.clipped", "lm_head.weight.after")
    assert {*of_head, "optimizer.exp_avg.lm_head.weight", "step.2.lm_head.weight.grad", "step.2.lm_head.extra"} <= names
    assert not [name for name in names if name.split(".")[0] in ("embed", "head") or ".head." in name]


def test_a_name_twice_in_one_step_is_refused(path: Path) -> None:
    match = r"q is recorded twice; of steps after the first write step\.N\."
    with pytest.raises(TraceError, match=match), TorchRecorder(path) as recorder:
        recorder.note("q", torch.ones(1))
        recorder.note("q", torch.ones(1))
    assert not path.exists()


# --- the model does not notice ----------------------------------------------------------------------------------------


def test_results_gradients_and_parameters_are_those_of_the_model_alone(model: Model, path: Path) -> None:
    """All bits of them, over two steps."""
    alone = steps(Model().to(next(model.parameters()).dtype))
    with TorchRecorder(path, precision_of(model)) as recorder:
        recorded = steps(model, recorder)
    assert len(alone) == len(recorded) > 20
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(alone, recorded, strict=True))
    assert len(Trace(path).records) > 100


def hooks_of(model: nn.Module) -> Iterator[Any]:
    for module in model.modules():
        yield from (*module._forward_hooks.values(), *module._backward_hooks.values(), *module._forward_pre_hooks.values())


def test_hooks_are_gone_afterwards_and_late_gradients_are_nobodys(path: Path) -> None:
    model = Model()
    with TorchRecorder(path) as recorder:
        recorder.watch(model)
        loss = loss_of(model)
        assert len(list(hooks_of(model))) == len(list(model.modules())) - 1
    assert not list(hooks_of(model))
    before = path.read_bytes()
    loss.backward()  # its tensors were noted
    loss_of(model).backward()
    assert path.read_bytes() == before and not any(name.endswith(".grad") for name in Trace(path).records)


def test_hooks_are_gone_after_an_error_too_and_no_file_appears(path: Path) -> None:
    model = Model()
    with pytest.raises(ValueError, match="on the way"), TorchRecorder(path) as recorder:
        recorder.watch(model)
        loss = loss_of(model)
        raise ValueError("on the way")
    loss.backward()
    assert not list(hooks_of(model)) and not list(path.parent.iterdir())


def test_without_gradients_only_values_are_written(path: Path) -> None:
    model = Model()
    with torch.no_grad(), TorchRecorder(path) as recorder:
        recorder.watch(model)
        recorder.note("loss", loss_of(model))
    names = Trace(path).records
    assert "head.output" in names and "loss" in names and not any(name.endswith(".grad") for name in names)


# --- tensors as they are ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool])
def test_tensors_of_every_dtype_and_layout_keep_their_numbers(dtype: Any, path: Path) -> None:
    x = (torch.arange(24) % 7 - 3).reshape(2, 3, 4).to(dtype)
    views = {"plain": x, "turned": x.permute(2, 0, 1), "strided": x[:, ::2], "single": x[1, 2, 3], "empty": x[:0]}
    views["spread"] = x[0, 0].expand(5, 4)
    with TorchRecorder(path, "f64") as recorder:
        for name, view in views.items():
            recorder.note(name, view)
    trace = Trace(path)
    for name, view in views.items():
        assert trace.array(name).shape == view.shape and np.array_equal(trace.array(name), view.to(torch.float64)), name


def test_conjugates_and_negatives_that_are_only_marked_as_such_are_written_as_they_are(path: Path) -> None:
    z = torch.complex(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]))
    with TorchRecorder(path) as recorder:
        recorder.note("z", z.conj())
        recorder.note("imaginary", z.conj().imag)
    assert Trace(path).array("z").tolist() == [[1.0, -3.0], [2.0, -4.0]]
    assert Trace(path).array("imaginary").tolist() == [-3.0, -4.0]


def test_tensors_may_be_compared_without_a_file(path: Path) -> None:
    """Also with gradients, on their way through a graph, and in bfloat16."""
    model = Model()
    with TorchRecorder(path) as recorder:
        recorder.watch(model)
        loss_of(model)
    logits = model(torch.tensor(TOKENS))
    assert logits.requires_grad
    assert compare(path, {"head.output": logits, "embed.output": model.embed.weight[TOKENS]}, tolerance=0.0).agrees
    found = compare(path, {"head.output": logits.bfloat16()}, tolerance=1e-2)
    assert found.agrees and found.tensors["head.output"].used > 0
    assert compare(path, {"head.output": 2 * logits}, tolerance=1e-2).exit_code == 1
