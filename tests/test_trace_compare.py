"""Comparing traces: the first wrong number is found and nothing else accused, whatever of a trace the other has.

Others are the reference's own arrays with some of them changed, so that what must be found is known. What a whole program
with a planted fault looks like, `oracle/test_trace_faults.py` tests.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import architectures
import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from oxidizr_ref.config import Config, TrainerConfig
from oxidizr_ref.errors import TraceError
from oxidizr_ref.trace import Comparison, Record, Trace, TraceWriter, compare, record, report
from oxidizr_ref.trace.budget import Budget, budgets
from oxidizr_ref.trace.compare import AGREES, BEHIND_TIE, DIFFERS, NO_BUDGET, TIE, Compared
from oxidizr_ref.trace.mapping import NameMap, load_map
from oxidizr_ref.trace.measure import Distance
from oxidizr_ref.trace.names import TOP_K, parse

Arrays = dict[str, np.ndarray[Any, Any]]


@dataclass(frozen=True)
class Recorded:
    """A reference, its arrays, its budgets for float64, and how it is made again."""

    trace: Trace
    arrays: Arrays
    granted: dict[str, Budget]
    again: Callable[..., Trace]  # (path, dtype="f64", **options of record)

    @property
    def names(self) -> list[str]:
        return list(self.trace.records)

    def changed(self, names: Iterable[str]) -> Arrays:
        """All arrays, one number of each of these changed."""
        return {**self.arrays, **{name: wrong(self.arrays[name]) for name in names}}

    def compare(self, other: Any, **options: Any) -> Comparison:
        return compare(self.trace, other, **{"granted": self.granted, **options})

    def behind(self, name: str) -> set[str]:
        """All that was computed from it, by way of others too."""
        found = {name}
        for other in self.trace.records.values():  # in the order of execution
            if found & set(other.inputs):
                found.add(other.name)
        return found - {name}


def wrong(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """A copy, one finite number of it far off; where there are none, there is one."""
    array = array.copy()
    flat = array.reshape(-1)
    finite = np.flatnonzero(np.isfinite(flat))
    if not finite.size:  # an expert that was given no token: now it is given one
        return np.ones((1, *array.shape[1:]), array.dtype)
    at = finite[len(finite) // 2]
    flat[at] = (flat[at] + 1) % 3 if array.dtype.kind in "iu" else flat[at] + 1 + np.abs(flat[finite]).max()
    return array


_SMALL: dict[str, Any] = {"hidden_size": 8, "num_heads": 2, "kv_heads": 1, "intermediate_size": 6}
_HYBRID: dict[str, Any] = {
    **_SMALL,
    "num_layers": 2,
    "mamba_layers": [0],
    "mamba2_num_heads": 2,
    "mamba2_state_size": 4,
    "mamba2_n_groups": 1,
    "kv_latent_dim": 4,
    "q_latent_dim": 4,
    "d_rope": 2,
    "num_experts": 3,
}


def recorded(
    directory: Path, architecture: str, steps: int = 1, weights: Mapping[str, Any] | None = None, **sizes: Any
) -> Recorded:
    """A trace of a small model in float64, on batches of 2 × 5 tokens."""
    model = architectures.lively_model(architecture, **{**_SMALL, "num_layers": 1, **sizes})
    accumulation = 2 if steps > 1 else 1
    trainer = TrainerConfig(
        learning_rate=1e-3, batch_size=2, gradient_accumulation=accumulation, max_steps=3, load_balance_alpha=0.01
    )
    batches = [architectures.batch(seed, (2, 5)) for seed in range(steps * accumulation)]
    kept = {**model.state_dict(), **(weights or {})}

    def again(path: Path, dtype: str = "f64", **options: Any) -> Trace:
        config = Config(model=model.config.model_copy(update={"dtype": dtype}), trainer=trainer)
        record(config, path, steps, batches, kept, **options)
        return Trace(path)

    trace = again(directory / f"{architecture}.safetensors")
    arrays = {name: trace.array(name).copy() for name in trace.records}
    return Recorded(trace, arrays, budgets(trace, "f64"), again)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    """One layer, one step."""
    return recorded(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    """A Mamba3, and latent attention with a router behind it."""
    return recorded(tmp_path_factory.mktemp("hybrid"), "hybrid_mamba3", **_HYBRID)


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    """Two steps of two micro-batches each."""
    return recorded(tmp_path_factory.mktemp("two_steps"), "llama", steps=2)


def written(path: Path, arrays: Mapping[str, Any], precision: str = "f64", sample: int = 0) -> Path:
    """A trace of another program, which knows no records."""
    with TraceWriter(path, precision, sample=sample) as writer:
        for name, array in arrays.items():
            writer.add(name, np.asarray(array))
    return path


# --- what is found ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["llama", "hybrid", "two_steps"])
def test_a_trace_agrees_with_itself_and_with_its_arrays_in_memory(which: str, request: pytest.FixtureRequest) -> None:
    reference: Recorded = request.getfixturevalue(which)
    others: list[Any] = [reference.trace.path, reference.arrays]
    for other in others if which != "llama" else [*others, reference.trace, str(reference.trace.path)]:
        found = reference.compare(other)
        assert found.agrees and found.exit_code == 0 and found.first is None and not found.origins
        assert list(found.tensors) == reference.names and not found.missing and not found.strange
        assert all(tensor.verdict == AGREES and tensor.used == 0 for tensor in found.tensors.values())


def test_one_wrong_number_is_found_in_its_tensor_and_nothing_else_of_the_whole_is_accused(llama: Recorded) -> None:
    for name in llama.names[::7]:
        found = llama.compare(llama.changed([name]))
        assert found.first is not None and found.first.name == name
        assert found.origins == [found.first] and found.exit_code == 1
        assert [one.name for one in found.tensors.values() if one.verdict == DIFFERS] == [name]


def test_one_wrong_number_in_any_tensor_is_found_there_among_what_it_came_from_and_what_reads_it(hybrid: Recorded) -> None:
    readers: dict[str, set[str]] = {}
    for one in hybrid.trace.records.values():
        for name in one.inputs:
            readers.setdefault(name, set()).add(one.name)
    for name, one in hybrid.trace.records.items():
        neighbours = {name, *one.inputs, *sorted(readers.get(name, set()))[:4]}
        changed = {**{other: hybrid.arrays[other] for other in neighbours}, name: wrong(hybrid.arrays[name])}
        found = hybrid.compare(changed)
        assert [origin.name for origin in found.origins] == [name] and found.first is found.origins[0]
        assert set(found.first.inputs) >= set(one.inputs) - {name}


def test_what_follows_from_a_fault_is_not_taken_for_another(llama: Recorded) -> None:
    for name in llama.names[1::7]:
        behind = llama.behind(name)
        found = llama.compare(llama.changed({name, *behind}))
        assert [origin.name for origin in found.origins] == [name]
        assert found.first is not None and found.first.name == name
        assert {one.name for one in found.tensors.values() if one.verdict == DIFFERS} == {name, *behind}


def test_two_faults_are_two_origins_the_earlier_one_first(hybrid: Recorded) -> None:
    early, late = "layers.0.mamba3.mixer.phi", "layers.1.self_attn.scores"
    found = hybrid.compare(hybrid.changed([late, early]))
    assert [origin.name for origin in found.origins] == [early, late] and found.first is found.origins[0]
    text = report(found)
    assert f"DIFFERS first at {early}" in text and "Other faults that do not follow from it:" in text
    assert re.search(rf"^  {re.escape(late)}: max rel ", text, re.MULTILINE)


def nearest(reference: Recorded, present: set[str]) -> dict[str, set[str]]:
    """Of every name that is present, the inputs; each that is not present replaced by its own."""
    stands_for: dict[str, set[str]] = {}
    inputs = {}
    for name, one in reference.trace.records.items():  # in the order of execution
        inputs[name] = set().union(*(stands_for[source] for source in one.inputs))
        stands_for[name] = {name} if name in present else inputs[name]
    return {name: found for name, found in inputs.items() if name in present}


@given(data=st.data())
def test_of_any_part_of_a_trace_the_first_wrong_tensor_is_found_and_missing_ones_are_looked_through(
    hybrid: Recorded, data: st.DataObject
) -> None:
    names = hybrid.names
    share = data.draw(st.sampled_from([0.02, 0.1, 0.5, 0.98]))
    seed = data.draw(st.integers(0, 2**32 - 1))
    present = [
        name for name, kept in zip(names, np.random.default_rng(seed).random(len(names)) < share, strict=True) if kept
    ]
    present = present or [names[seed % len(names)]]
    changed = data.draw(st.sets(st.sampled_from(present), max_size=5))
    other = {name: array for name, array in hybrid.changed(changed).items() if name in present}
    order = data.draw(st.permutations(["given", "backwards"]))[0]
    found = hybrid.compare(other if order == "given" else dict(reversed(other.items())))

    assert list(found.tensors) == present and found.missing == [name for name in names if name not in present]
    inputs = nearest(hybrid, set(present))
    assert {name: set(one.inputs) for name, one in found.tensors.items()} == inputs
    differing = [name for name in present if name in changed]
    assert (found.first.name if found.first else None) == (differing[0] if differing else None)
    assert [origin.name for origin in found.origins] == [name for name in differing if not inputs[name] & changed]
    assert found.exit_code == (1 if changed else 0)
    check_report(found)
    check_json(found)


# --- names ------------------------------------------------------------------------------------------------------------


def written_out(name: str) -> str:
    """The name with the number of its step, and of its micro-batch if it may have one."""
    step, micro, path, end = parse(name)
    if end.startswith("optimizer."):
        return f"step.{step}.{end}.{path}"
    return f"step.{step}.micro.{micro}.{path}{end}"


def test_the_first_step_and_micro_batch_may_be_written_out(two_steps: Recorded) -> None:
    renamed = {written_out(name): name for name in two_steps.names}
    assert "step.1.micro.1.logits" in renamed and "step.2.micro.2.layers.0.output.grad" in renamed
    changed = two_steps.changed(["logits", "step.2.micro.2.logits"])
    found = two_steps.compare({theirs: changed[ours] for theirs, ours in renamed.items()})
    assert not found.missing and not found.strange
    assert [origin.name for origin in found.origins] == ["logits", "step.2.micro.2.logits"]


def test_names_that_mean_nothing_are_told_and_compared_with_nothing(llama: Recorded) -> None:
    found = llama.compare({**llama.arrays, "lm_head.wait": np.zeros(3), "a": np.zeros(1), "sample.7": np.zeros(2)})
    assert found.agrees and found.strange == ["a", "lm_head.wait"]
    assert "2 names of the other mean nothing here (a …)" in report(found)


def test_nothing_in_common_is_refused_with_what_the_other_has(llama: Recorded, tmp_path: Path) -> None:
    arrays = {"model.layers.3.q": np.zeros(2), "model.embed": np.zeros(2), "model.a": np.zeros(1), "z": np.zeros(1)}
    for other in (arrays, written(tmp_path / "theirs.safetensors", arrays)):
        with pytest.raises(TraceError, match=r"no name of it is known to .*model\.a, model\.embed, model\.layers.*--map"):
            llama.compare(other)
    with pytest.raises(TraceError, match=r"the arrays given: no name of it is known to .*\(it has none\)$"):
        llama.compare({})


def test_a_map_translates_names_and_turns_arrays(llama: Recorded, tmp_path: Path) -> None:
    path = tmp_path / "map.yaml"
    path.write_text(
        "names:\n- ours: layers.{i}.self_attn.q\n  theirs: h.{i}.query\n  do: ['permute(0, 2, 1, 3)']\n"
        "- ours: logits\n  theirs: out\n"
    )
    q, logits = llama.arrays["layers.0.self_attn.q"], llama.arrays["logits"]
    theirs = {"h.0.query": q.transpose(0, 2, 1, 3), "h.0.query.grad": q, "out": wrong(logits)}
    del theirs["h.0.query.grad"]
    for names in (path, str(path), load_map(path)):
        found = llama.compare(theirs, names=names)
        assert list(found.tensors) == ["layers.0.self_attn.q", "logits"] and not found.strange
        assert [one.verdict for one in found.tensors.values()] == [AGREES, DIFFERS]
    assert isinstance(load_map(path), NameMap)
    with pytest.raises(TraceError, match=r"h\.0\.query \[3\]: the map's permute\(0, 2, 1, 3\) does not fit"):
        llama.compare({"h.0.query": np.zeros(3)}, names=path)
    with pytest.raises(TraceError, match="no such map"):
        llama.compare(theirs, names="hf-lama")


def test_a_map_knows_the_sizes_of_the_reference(llama: Recorded, tmp_path: Path) -> None:
    path = tmp_path / "map.yaml"
    path.write_text("names:\n- ours: layers.0.mlp.gate_proj.weight\n  theirs: w13\n  do: ['[:I]']\n")
    gate, up = (llama.arrays[f"layers.0.mlp.{name}_proj.weight"] for name in ("gate", "up"))
    assert llama.compare({"w13": np.concatenate([gate, up])}, names=path).agrees
    assert not llama.compare({"w13": np.concatenate([up, gate])}, names=path).agrees


def test_a_sample_cannot_be_turned_by_a_map(llama: Recorded, tmp_path: Path) -> None:
    path = tmp_path / "map.yaml"
    path.write_text("names:\n- ours: logits\n  theirs: out\n  do: ['permute(1, 0, 2)']\n")
    other = written(tmp_path / "theirs.safetensors", {"out": llama.arrays["logits"].transpose(1, 0, 2)}, sample=4)
    with pytest.raises(TraceError, match=r"out is a sample, to which the map's permute\(1, 0, 2\) cannot be done"):
        llama.compare(other, names=path)


# --- shapes -----------------------------------------------------------------------------------------------------------


def test_axes_may_be_merged_or_split(llama: Recorded) -> None:
    name = "layers.0.self_attn.q"
    q = llama.arrays[name]  # [2, 5, 2, 4]
    for shape in ((2, 5, 8), (10, 2, 4), (10, 8), (80,), (2, 5, 2, 2, 2), (1, 2, 5, 2, 4), (2, 5, 2, 4, 1)):
        assert llama.compare({name: q.reshape(shape)}).agrees, shape
        assert llama.compare({name: wrong(q).reshape(shape)}).exit_code == 1, shape
    loss = llama.arrays["loss"]
    assert llama.compare({"loss": loss.reshape(1, 1)}).agrees and llama.compare({"loss": float(loss)}).agrees


def test_axes_may_not_be_exchanged_and_a_map_is_recommended(llama: Recorded) -> None:
    q = llama.arrays["layers.0.self_attn.q"]
    found = llama.compare({"layers.0.self_attn.q": q.transpose(0, 2, 1, 3)})
    assert found.first is not None and found.exit_code == 1
    problem = "shape [2, 2, 5, 4] where [2, 5, 2, 4] is expected (axes exchanged? a map can permute them)"
    assert found.first.problem == problem and problem in " ".join(report(found).split())
    assert found.first.as_json()["problem"] == problem


@pytest.mark.parametrize(
    "shape", [(2, 5, 2, 8), (2, 5, 2), (80, 2), (2,), (), (2, 5, 1, 4), (2, 5, 2, 4, 3), (0, 5), (5, 2, 8), (160,), (40,)]
)
def test_another_number_of_elements_is_never_taken_for_the_same(llama: Recorded, shape: tuple[int, ...]) -> None:
    q = np.resize(llama.arrays["layers.0.self_attn.q"], shape)
    found = llama.compare({"layers.0.self_attn.q": q})
    assert found.exit_code == 1 and found.first is not None
    assert found.first.problem == f"shape {list(shape)} where [2, 5, 2, 4] is expected" or (5, 2, 8) == shape
    check_report(found)
    check_json(found)


def test_a_single_number_is_not_the_first_of_many(llama: Recorded) -> None:
    assert llama.compare({"loss": np.full(7, llama.arrays["loss"])}).exit_code == 1
    assert llama.compare({"loss": np.zeros(0)}).exit_code == 1


# --- precision, tolerance ---------------------------------------------------------------------------------------------


def test_the_precision_is_what_the_file_says_or_the_dtype_of_most_arrays_or_what_is_asked_for(
    llama: Recorded, tmp_path: Path
) -> None:
    for precision in ("f64", "f32", "tf32", "bf16", "f16"):
        path = written(tmp_path / "theirs.safetensors", {"loss": llama.arrays["loss"]}, precision)
        assert llama.compare(path).precision == precision
        assert llama.compare(path, precision="bf16").precision == "bf16"
    kinds = {"f64": np.float64, "f32": np.float32, "bf16": ml_dtypes.bfloat16, "f16": np.float16}
    few = {name: llama.arrays[name] for name in ("logits", "loss", "norm.output", "tokens")}
    for precision, kind in kinds.items():
        arrays = {name: array if name == "tokens" else array.astype(kind) for name, array in few.items()}
        assert llama.compare(arrays).precision == precision
        assert llama.compare({**arrays, "loss": few["loss"].astype(np.float32)}).precision == precision
    assert llama.compare({"tokens": few["tokens"]}).precision == "f32"


def test_an_unknown_precision_is_refused(llama: Recorded, tmp_path: Path) -> None:
    expected = r"precision {}: expected one of f64, f32, tf32, bf16, f16 \(--precision\)"
    with pytest.raises(TraceError, match="the arrays given: " + expected.format("f8")):
        llama.compare(llama.arrays, precision="f8")
    path = written(tmp_path / "theirs.safetensors", {"loss": llama.arrays["loss"]}, "posit")
    with pytest.raises(TraceError, match=r"theirs\.safetensors: " + expected.format("posit")):
        llama.compare(path)
    assert llama.compare(path, precision="f32", granted=None).agrees


def test_what_agrees_in_one_precision_need_not_in_a_better_one(llama: Recorded) -> None:
    rounded = {name: a.astype(np.float32) if a.dtype.kind == "f" else a for name, a in llama.arrays.items()}
    assert compare(llama.trace, rounded).agrees
    assert not compare(llama.trace, rounded, precision="f64").agrees
    halves = {name: a.astype(ml_dtypes.bfloat16) if a.dtype.kind == "f" else a for name, a in llama.arrays.items()}
    assert compare(llama.trace, halves).agrees
    assert not compare(llama.trace, halves, precision="f32").agrees


def test_a_tolerance_is_the_largest_error_over_the_largest_number(llama: Recorded) -> None:
    scale = np.abs(llama.arrays["logits"]).max()
    for error in (1e-3, 1e-6):
        shifted = {**llama.arrays, "logits": llama.arrays["logits"] + error * scale}
        assert llama.compare(shifted, granted=None, tolerance=error * 1.001).agrees
        found = llama.compare(shifted, granted=None, tolerance=error * 0.999)
        assert [origin.name for origin in found.origins] == ["logits"] and found.exit_code == 1
        assert found.origins[0].used == pytest.approx(1 / 0.999)
    assert llama.compare(llama.arrays, granted=None, tolerance=0.0).agrees
    spoilt = {**llama.arrays, "logits": llama.arrays["logits"] * math.nan}
    assert llama.compare(spoilt, tolerance=math.inf).exit_code == 1


def test_a_reference_that_cannot_be_done_again_is_refused_unless_there_is_a_tolerance(
    llama: Recorded, tmp_path: Path
) -> None:
    path = written(tmp_path / "bare.safetensors", llama.arrays)
    with pytest.raises(TraceError, match=r"bare\.safetensors: does not say config, .*record it with this package"):
        compare(path, llama.arrays)
    assert compare(path, llama.arrays, tolerance=1e-6).agrees
    found = compare(path, llama.changed(["logits"]), tolerance=1e-6)
    assert found.first is not None and found.first.name == "logits"


# --- samples ----------------------------------------------------------------------------------------------------------

FEW = 20  # numbers of a sample; the larger arrays have 80 and more


@pytest.fixture(scope="module")
def sampled(llama: Recorded, tmp_path_factory: pytest.TempPathFactory) -> Trace:
    """The same trace, of larger arrays `FEW` numbers only."""
    return llama.again(tmp_path_factory.mktemp("sampled") / "sampled.safetensors", sample=FEW)


@pytest.mark.parametrize("whose", ["the other's", "the reference's", "both"])
def test_of_samples_what_both_have_is_compared_and_places_are_those_in_the_whole(
    llama: Recorded, sampled: Trace, whose: str, tmp_path: Path
) -> None:
    name = "layers.0.self_attn.scores"
    where = sampled.indices(name)
    assert where is not None and len(where) == FEW
    seen, unseen = int(where[7]), next(i for i in range(100) if i not in where)
    reference = llama.trace if whose == "the other's" else sampled
    for at, found_it in ((seen, True), (unseen, False)):
        arrays = {key: array.copy() for key, array in llama.arrays.items()}
        arrays[name].reshape(-1)[at] += 100
        other: Any = arrays if whose == "the reference's" else written(tmp_path / "other.st", arrays, sample=FEW)
        found = compare(reference, other, granted=llama.granted)
        assert not found.missing and not found.strange
        assert found.exit_code == int(found_it)
        if found_it:
            assert found.first is not None and found.first.name == name and found.first.distance.size == FEW
            index = list(np.unravel_index(at, arrays[name].shape))
            assert found.first.as_json()["where"] == found.first.as_json()["first"] == index
            assert f"{1 / FEW:.0%} of the elements are beyond it, the first at {[int(i) for i in index]}" in report(found)
        check_json(found)


def test_a_sampled_reference_can_be_done_again_for_its_budgets(llama: Recorded, sampled: Trace) -> None:
    granted = budgets(sampled, "f64")
    assert granted.keys() == llama.granted.keys()
    assert compare(sampled, llama.arrays).agrees
    assert not compare(sampled, {**llama.arrays, "logits": llama.arrays["logits"] * 1.001}).agrees


def test_of_samples_of_other_sizes_the_common_numbers_are_compared(llama: Recorded, sampled: Trace, tmp_path: Path) -> None:
    other = written(tmp_path / "other.st", llama.changed(["logits"]), sample=3 * FEW)
    found = compare(sampled, other, granted=llama.granted)
    assert 0 < found.tensors["logits"].distance.size <= FEW
    wrong_everywhere = {**llama.arrays, "logits": llama.arrays["logits"] + 1}
    found = compare(sampled, written(tmp_path / "other.st", wrong_everywhere, sample=3 * FEW), granted=llama.granted)
    assert [origin.name for origin in found.origins] == ["logits"]


def test_samples_that_have_no_number_in_common_are_missing_and_not_right(llama: Recorded, tmp_path: Path) -> None:
    one = llama.again(tmp_path / "one.st", sample=1)
    counts = range(2, 9)
    for count in counts:
        other = Trace(written(tmp_path / "other.st", {**llama.arrays, "logits": llama.arrays["logits"] + 1}, sample=count))
        ours, theirs = one.indices("logits"), other.indices("logits")
        assert ours is not None and theirs is not None
        found = compare(one, other, granted=llama.granted)
        if np.intersect1d(ours, theirs).size:
            assert found.first is not None and found.first.name == "logits"
        else:
            assert "logits" in found.missing and "logits" not in found.tensors
            return
    pytest.fail(f"samples of {list(counts)} numbers all have that of one number")


# --- other references -------------------------------------------------------------------------------------------------


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", ["f64", "f32"])
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_the_truth_of_a_float32_or_fused_reference_is_computed_again(
    llama: Recorded, dtype: str, fused: bool, tmp_path: Path
) -> None:
    reference = llama.again(tmp_path / "reference.st", dtype, fused=fused)
    single = {name: a.astype(np.float32) if a.dtype.kind == "f" else a for name, a in llama.arrays.items()}
    for other in (llama.again(tmp_path / "other.st", "f32", fused=not fused), single):
        assert compare(reference, other).agrees
    wrong_one = {**single, "norm.output": single["norm.output"] * np.float32(1.01)}
    found = compare(reference, wrong_one)
    assert [origin.name for origin in found.origins] == ["norm.output"]
    assert found.precision == "f32" and bool(found.strange) == fused  # what is inside fast operations has no names


# --- routers ----------------------------------------------------------------------------------------------------------

GATE, IDS = "layers.0.moe.router.gate.weight", "layers.0.moe.router.ids"


def routed(directory: Path, factor: float) -> Recorded:
    """A router whose second expert has ``factor`` times the logits of its first, for one expert a token."""
    gate = np.random.default_rng(5).standard_normal((3, 8))
    gate[2] = -gate[0]
    gate[1] = factor * gate[0]
    return recorded(directory, "moe", weights={GATE: gate}, num_experts=3, experts_per_tok=1)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    """Logits that are equal within the rounding of float32, but not of float64."""
    return routed(tmp_path_factory.mktemp("tied"), 1 + 1e-9)


def otherwise(reference: Recorded, token: int | None = None) -> Arrays:
    """The arrays with the first and the second expert exchanged in the choice of a token, or the first that chose one of
    these; all behind it wrong."""
    ids = reference.arrays[IDS].copy()
    at = int(np.flatnonzero(ids.reshape(-1) < 2)[0]) if token is None else token
    ids.reshape(-1)[at] = 1 - ids.reshape(-1)[at]
    return {**reference.changed(reference.behind(IDS)), IDS: ids}


def test_the_other_of_two_experts_within_rounding_is_a_tie_and_nothing_behind_it_is_judged(tied: Recorded) -> None:
    found = compare(tied.trace, otherwise(tied), precision="f32")
    verdicts = {name: one.verdict for name, one in found.tensors.items()}
    behind = tied.behind(IDS)
    assert verdicts[IDS] == TIE and {name for name, verdict in verdicts.items() if verdict == BEHIND_TIE} == behind
    assert set(verdicts.values()) == {AGREES, TIE, BEHIND_TIE} and "layers.0.moe.router.probs" not in behind
    assert found.first is None and not found.agrees and found.exit_code == 3 and not found.origins
    text = " ".join(report(found).split())
    assert f"undecided: {IDS} differs where logits are equal within rounding" in text
    assert f"{len(behind)} tensors behind it were not judged" in text and "DIFFERS" not in text
    rows = report(found, everything=True).splitlines()
    assert sum(row.endswith("tie") for row in rows) == 1 and sum(row.endswith(" -") for row in rows) == len(behind)
    check_report(found)
    check_json(found)


def test_even_right_numbers_behind_a_tie_are_not_judged(tied: Recorded) -> None:
    found = compare(tied.trace, {**tied.arrays, IDS: otherwise(tied)[IDS]}, precision="f32")
    assert {name for name, one in found.tensors.items() if one.verdict == BEHIND_TIE} == tied.behind(IDS)


def test_a_fault_that_is_not_behind_the_tie_is_found_besides(tied: Recorded) -> None:
    other = otherwise(tied)
    other["layers.0.self_attn.scores"] = wrong(other["layers.0.self_attn.scores"])
    found = compare(tied.trace, other, precision="f32")
    assert found.exit_code == 1 and [origin.name for origin in found.origins] == ["layers.0.self_attn.scores"]
    assert "DIFFERS first at layers.0.self_attn.scores" in report(found) and "undecided: " in report(found)


def test_beyond_rounding_another_expert_is_a_fault(tied: Recorded) -> None:
    assert_fault_of_router(compare(tied.trace, otherwise(tied), precision="f64"))


def test_of_logits_that_are_exactly_equal_the_lower_index_has_to_be_chosen(tmp_path: Path) -> None:
    exact = routed(tmp_path, 1.0)
    assert set(np.unique(exact.arrays[IDS])) <= {0, 2}
    assert_fault_of_router(compare(exact.trace, otherwise(exact), precision="f32"))


def test_another_expert_whose_logit_is_another_is_a_fault(tied: Recorded) -> None:
    ids = tied.arrays[IDS]
    assert_fault_of_router(compare(tied.trace, {**tied.changed(tied.behind(IDS)), IDS: 2 - ids}, precision="f32"))


def assert_fault_of_router(found: Comparison) -> None:
    assert found.first is not None and found.first.name == IDS and found.first.verdict == DIFFERS
    assert found.exit_code == 1 and [origin.name for origin in found.origins] == [IDS]
    assert TIE not in {one.verdict for one in found.tensors.values()}


@pytest.mark.parametrize("ids", [[-1], [3], [2**31], [math.nan], [0.5], [1e30]])
def test_what_is_no_expert_is_a_fault(tied: Recorded, ids: list[float]) -> None:
    chosen = np.resize(np.array(ids), tied.arrays[IDS].shape)
    assert_fault_of_router(compare(tied.trace, {IDS: chosen}, precision="f32"))


def test_experts_of_another_shape_are_a_fault(tied: Recorded) -> None:
    shape = tied.arrays[IDS].shape
    assert_fault_of_router(compare(tied.trace, {IDS: np.zeros((shape[0], 2), int)}, precision="f32"))
    assert compare(tied.trace, {IDS: tied.arrays[IDS].astype(np.float32)}, precision="f32").agrees


def test_a_tie_is_known_in_a_sample_too(tied: Recorded, tmp_path: Path) -> None:
    probe = Trace(written(tmp_path / "other.st", tied.arrays, "f32", sample=6))
    where = probe.indices(IDS)
    assert where is not None and len(where) == 6
    token = next(int(at) for at in where[1:] if tied.arrays[IDS].reshape(-1)[at] < 2)
    found = compare(tied.trace, written(tmp_path / "other.st", otherwise(tied, token), "f32", sample=6))
    assert found.tensors[IDS].verdict == TIE and found.exit_code == 3


#: Of a token: its logits, and the experts that it goes to here and there, the first one or the first two of each.
_TOKENS = st.tuples(
    st.permutations([0.0, 1e-9, 2e-9]) | st.permutations([0.0, 1.0, 1.0 + 1e-9]) | st.permutations([0.0, 0.0, 1e-9]),
    st.permutations(range(3)),
    st.permutations(range(3)),
)


@given(st.lists(_TOKENS, min_size=1, max_size=3), st.integers(1, 2))
@example([([0.0, 1.0, 2.0], [2, 1, 0], [2, 1, 0]), ([0.0, 2.0, 2.0 + 1e-9], [2, 1, 0], [1, 2, 0])], 1)
@example([([0.0, 2.0, 2.0 + 1e-9], [2, 1, 0], [1, 2, 0]), ([0.0, 1.0, 2.0], [2, 1, 0], [1, 2, 0])], 2)
def test_it_is_a_tie_if_that_is_so_for_every_token_that_went_elsewhere(
    tmp_path_factory: pytest.TempPathFactory, tokens: list[tuple[list[float], list[int], list[int]]], k: int
) -> None:
    logits = [of_token for of_token, _, _ in tokens]
    ours, theirs = (np.array([token[i][:k] for token in tokens]) for i in (1, 2))
    path, gate = tmp_path_factory.mktemp("ids") / "ours.st", "router.gate.output"
    with TraceWriter(path, "f64") as writer:
        writer.add(gate, np.array(logits))
        writer.add(Record("router.ids", "output", (), (gate,), TOP_K), ours)
    granted = {gate: Budget(1e-9, 1e-9), "router.ids": Budget(0.0, 0.0)}
    found = compare(path, {"router.ids": theirs}, granted=granted, precision="f64").tensors["router.ids"]
    apart = [
        abs(logits[token][a] - logits[token][b])
        for token in range(len(logits))
        for a, b in zip(ours[token], theirs[token], strict=True)
        if a != b
    ]
    tie = all(0 < far <= 2e-9 for far in apart)
    assert found.verdict == (AGREES if not apart else TIE if tie else DIFFERS)
    path.unlink()


# --- no budget --------------------------------------------------------------------------------------------------------


def test_without_a_budget_what_is_equal_agrees_and_what_is_not_stays_undecided(llama: Recorded) -> None:
    granted = {name: budget for name, budget in llama.granted.items() if name not in ("logits", "norm.output", "loss")}
    assert llama.compare(llama.arrays, granted=granted).agrees
    found = llama.compare(llama.changed(["logits", "norm.output"]), granted=granted)
    assert [name for name, one in found.tensors.items() if one.verdict == NO_BUDGET] == ["norm.output", "logits"]
    assert found.exit_code == 3 and found.first is None and not found.agrees
    assert "undecided: norm.output and 1 more not equal, and no budget is known" in " ".join(report(found).split())
    check_report(found)
    check_json(found)


def test_without_a_budget_a_nan_is_a_fault_and_so_is_another_token(llama: Recorded) -> None:
    for name, array in (("logits", np.full_like(llama.arrays["logits"], math.nan)), ("tokens", llama.arrays["tokens"] + 1)):
        found = llama.compare({name: array}, granted={})
        assert found.first is not None and found.first.name == name and found.exit_code == 1


def test_what_follows_from_an_undecided_tensor_is_no_fault_of_its_own(llama: Recorded) -> None:
    found = llama.compare(llama.changed(["logits", "token_losses"]), granted={"token_losses": Budget(0.0, 0.0)})
    assert found.first is not None and found.first.name == "token_losses" and "logits" in found.first.inputs
    assert not found.origins
    text = report(found)
    assert re.search(r"^  inputs   logits no budget$", text, re.MULTILINE) and "So the fault is" not in text


# --- JSON -------------------------------------------------------------------------------------------------------------

KEYS = ["reference", "other", "precision", "agrees", "first", "origins", "missing", "strange", "tensors"]
KEYS_OF_TENSOR = {"name", "op", "layer", "role", "shape", "verdict", "inputs", "problem", "where", "beyond", "first", "nans"}
KEYS_OF_TENSOR |= {"max_abs", "max_rel", "max_ulp", "median", "cosine", "factor", "used", "budget", "budget_median"}


def check_json(found: Comparison) -> None:
    """Its JSON is valid, without NaN or infinity, and complete."""
    data = json.loads(json.dumps(found.as_json(), allow_nan=False))
    assert list(data) == KEYS
    assert [one["name"] for one in data["tensors"]] == list(found.tensors)
    assert data["agrees"] == found.agrees and data["first"] == (found.first.name if found.first else None)
    assert data["origins"] == [origin.name for origin in found.origins]
    for one, tensor in zip(data["tensors"], found.tensors.values(), strict=True):
        assert set(one) == KEYS_OF_TENSOR
        assert one["verdict"] == tensor.verdict and one["inputs"] == list(tensor.inputs)
        assert all(type(i) is int for i in one["where"]) and len(one["where"]) in (len(one["shape"]), 0)
        assert one["max_abs"] is None or one["max_abs"] == tensor.distance.max_abs


def test_what_is_not_finite_is_null_in_json(llama: Recorded) -> None:
    spoilt = llama.arrays["logits"].copy()
    spoilt[1, 2, 3] = math.inf
    found = llama.compare({**llama.arrays, "logits": spoilt})
    assert found.first is not None
    one = found.first.as_json()
    assert one["max_abs"] is one["used"] is one["max_rel"] is None and one["nans"] == 1 and one["where"] == [1, 2, 3]
    assert one["first"] == [1, 2, 3] and one["beyond"] == 1
    assert one["budget"] == llama.granted["logits"].largest and one["budget_median"] == llama.granted["logits"].median


def test_in_json_is_all_that_the_report_says(llama: Recorded) -> None:
    found = llama.compare(llama.changed(["layers.0.self_attn.q"]))
    one = next(one for one in found.as_json()["tensors"] if one["verdict"] == DIFFERS)
    assert (one["op"], one["layer"], one["role"], one["shape"]) == ("rope", 0, "output", [2, 5, 2, 4])
    assert one["where"] == one["first"] == [1, 0, 0, 0] and one["used"] > 1e10 and one["inputs"]


# --- the report -------------------------------------------------------------------------------------------------------

WIDE = 80


def check_report(found: Comparison) -> None:
    """It fits into 80 columns but for paths and names that are too long, and commands no terminal."""
    for everything in (False, True):
        for line in report(found, everything).split("\n"):
            assert line.isprintable()
            path = line.startswith(("reference  ", "other      "))
            assert len(line) <= WIDE or path or max(map(len, line.split())) > 40, line


def test_the_report_says_what_where_how_much_and_what_it_came_from(llama: Recorded) -> None:
    q = llama.arrays["layers.0.self_attn.scores"]
    found = llama.compare({**llama.arrays, "layers.0.self_attn.scores": 2 * q})
    lines = report(found).split("\n")
    assert lines[0] == f"reference  {llama.trace.path}" and lines[1] == "other      the arrays given (f64)"
    assert lines[2] == f"compared   {len(llama.names)} of {len(llama.names)} tensors" and lines[3] == ""
    assert lines[4] == "DIFFERS first at layers.0.self_attn.scores   (layer 0)"
    assert lines[5].startswith("  op       attention scores: q·k ")
    assert lines[6].startswith("  error    max abs ") and lines[6].endswith(" times its budget")
    text = report(found)
    assert "the other is 2 times the reference" in text and "100% of the elements are beyond it" in text
    assert re.search(r"^  inputs   layers\.0\.self_attn\.k agrees \(0% of its budget\)$", text, re.MULTILINE)
    assert "  So the fault is in how it is computed from these." in lines


def test_the_report_shows_the_numbers_that_cannot_be_equal(llama: Recorded) -> None:
    spoilt = llama.arrays["logits"].copy()
    spoilt[1, 2, 3] = math.nan
    text = " ".join(report(llama.compare({**llama.arrays, "logits": spoilt})).split())
    assert "1 elements cannot be equal (integers, NaN or infinities); first at [1, 2, 3]" in text
    assert re.search(r"at \[1, 2, 3\] the reference has -?[0-9.]+, the other nan", text)


def test_where_all_agrees_the_report_names_what_used_most_of_its_budget(llama: Recorded) -> None:
    granted = llama.granted["logits"]
    shifted = llama.arrays["logits"] + np.where(np.arange(llama.arrays["logits"].size) == 7, granted.largest / 2, 0).reshape(
        llama.arrays["logits"].shape
    )
    text = " ".join(report(llama.compare({**llama.arrays, "logits": shifted})).split())
    assert "agrees: every tensor is within its error budget; logits uses most of it, 50%" in text


def test_the_table_has_the_wrong_tensors_or_all_of_them(llama: Recorded) -> None:
    found = llama.compare(llama.changed(["logits", "loss"]))
    short, long = (report(found, everything).split("\n") for everything in (False, True))
    assert [line.split()[0] for line in short[-2:]] == ["logits", "loss"] and short[-3].startswith("tensor ")
    shown = {line.split()[0] for line in long if line}
    assert set(llama.names) <= shown


def test_the_numbers_of_a_tensor_are_a_line_of_the_table_whatever_they_are(llama: Recorded) -> None:
    names = [name for name in llama.names if len(name) > 34]
    lines = report(llama.compare({name: llama.arrays[name] * -1.5e250 for name in names}), everything=True).split("\n")
    rows = lines[next(i for i, line in enumerate(lines) if line.startswith("tensor ")) + 1 :]
    assert rows[::2] == names and all(len(row.split()) == 5 and len(row) == WIDE for row in rows[1::2])


def test_of_many_faults_a_dozen_are_shown_and_the_others_counted(hybrid: Recorded) -> None:
    names = [name for name in hybrid.names if hybrid.trace.records[name].role == "parameter"]
    assert len(names) > 20
    text = report(hybrid.compare(hybrid.changed(names)))
    assert f"  and {len(names) - 1 - 12} more" in text and len(text.split("\n")) < 50
    assert "inputs   none: the two do not begin with the same parameters" in text


#: Up to 40 printable characters, or any at all.
_NAMES = st.text(st.characters(codec="ascii", categories=["L", "N", "P"]), min_size=1, max_size=40)
_ANY_NAMES = st.text(min_size=1, max_size=40)
_NUMBERS = st.floats(0, allow_nan=False) | st.sampled_from([0.0, math.inf, 1e-300, 1e300, 5e-324])
_ANY = st.floats()


@st.composite
def comparisons(draw: st.DrawFn, names: st.SearchStrategy[str]) -> Comparison:
    """Whatever a comparison might come to hold."""
    tensors: dict[str, Compared] = {}
    for name in draw(st.lists(names, min_size=1, max_size=6, unique=True)):
        shape = tuple(draw(st.lists(st.integers(0, 5000), max_size=5)))
        size = math.prod(shape)
        places = st.integers(0, max(size - 1, 0))
        distance = Distance(
            *(draw(_NUMBERS) for _ in range(5)),
            max_ulp=draw(st.integers(0, 2**64 - 1)),
            cosine=draw(st.floats(-1, 1) | st.just(math.nan)),
            factor=draw(_ANY),
            nans=draw(st.integers(0, size)),
            where=draw(places),
            values=(draw(_ANY), draw(_ANY)),
            beyond=draw(st.integers(0, size)),
            first=draw(st.none() | places),
            size=size,
        )
        problem = draw(
            st.sampled_from(["", "shape [1, 2] where [2, 1] is expected (axes exchanged? a map can permute them)"])
        )
        inputs = tuple(draw(st.lists(st.sampled_from(list(tensors)), unique=True))) if tensors else ()
        op = draw(st.sampled_from(["", "linear", "backward of linear, rms_norm, attention scores, softmax, router weights"]))
        one = Record(name, draw(st.sampled_from(["output", "input", "parameter", "gradient"])), shape, op=op)
        verdict = draw(st.sampled_from([AGREES, DIFFERS, DIFFERS, TIE, BEHIND_TIE, NO_BUDGET]))
        granted = draw(st.none() | st.builds(Budget, _NUMBERS, _NUMBERS))
        used = draw(st.floats(0, 1) if verdict == AGREES else _NUMBERS)
        tensors[name] = Compared(one, distance, granted, used, verdict, inputs, problem)
    strange = draw(st.lists(names, max_size=3))
    return Comparison("ours.st", "theirs.st", "f32", tensors, draw(st.lists(names, max_size=3)), strange)


@given(comparisons(_NAMES))
def test_any_comparison_is_reported_in_80_columns(found: Comparison) -> None:
    for everything in (False, True):
        assert max(map(len, report(found, everything).split("\n"))) <= WIDE
    check_json(found)


@given(comparisons(_ANY_NAMES))
def test_no_name_commands_a_terminal(found: Comparison) -> None:
    for everything in (False, True):
        assert all(line.isprintable() for line in report(found, everything).split("\n"))
    check_json(found)


@given(data=st.data())
def test_no_damaged_trace_makes_a_comparison_fail_otherwise_than_by_a_word(
    llama: Recorded, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Bytes of the numbers are overwritten, most of them by what makes a number huge or none; or bytes of the header."""
    raw = bytearray(llama.trace.path.read_bytes())
    (length,) = struct.unpack("<Q", raw[:8])
    inside = data.draw(st.sampled_from(["numbers", "numbers", "numbers", "header"]))
    places = st.integers(8 + length, len(raw) - 1) if inside == "numbers" else st.integers(0, 8 + length - 1)
    values = cycle(
        data.draw(st.lists(st.sampled_from([0xFF, 0x7F, 0x7E, 0x80]) | st.integers(0, 255), min_size=1, max_size=5))
    )
    count = data.draw(st.sampled_from([1, 20, 500] if inside == "numbers" else [1, 2]))
    source = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    first = data.draw(places)
    span = len(raw) - first if inside == "numbers" else 8 + length - first
    for at in source.integers(0, span, count):
        raw[first + int(at)] = next(values)
    path = tmp_path_factory.mktemp("damaged") / "theirs.st"
    path.write_bytes(raw)
    try:
        found = llama.compare(path)
    except TraceError as error:
        assert inside == "header" and len(str(error).splitlines()) == 1
        return
    check_report(found)
    check_json(found)
    path.unlink()
