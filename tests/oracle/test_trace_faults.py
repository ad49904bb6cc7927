"""Golden traces as a judge: every planted fault is found where it is, and a correct program is never accused.

The other program is `traced_twins.Twin`, plain PyTorch; `planted_faults` has the faults. "Found" means: first in the order
of execution among all that the two traces have in common, with everything it was computed from within budget.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra 'oracle'")

import random_models  # noqa: E402
from oracle.planted_faults import FAULTS, STEPS, Fault  # noqa: E402
from oracle.traced_twins import Twin, write_trace  # noqa: E402

from oxidizr_ref.trace.budget import Budget, budgets  # noqa: E402
from oxidizr_ref.trace.compare import Comparison, compare  # noqa: E402
from oxidizr_ref.trace.file import Trace  # noqa: E402
from oxidizr_ref.trace.record import record  # noqa: E402
from oxidizr_ref.trace.report import report  # noqa: E402

pytestmark = pytest.mark.oracle
torch.set_num_threads(1)  # of such small tensors, handing parts to threads costs more than it gains

DTYPES = {"f64": torch.float64, "f32": torch.float32}
#: Epsilon is 1e-5 of a mean square around 1: outside the root it is 1.3 times a float32 budget here, elsewhere perhaps 0.9.
TOO_CLOSE_IN_F32 = {"epsilon outside the root"}
CONFIGS, OF_ONE_TEST = 200, 10


def found_in(fault: Fault, precision: str, directory: Path, twin: type[Twin] | None = None) -> Comparison:
    setting = fault.setting()
    reference, other = directory / "reference.safetensors", directory / "other.safetensors"
    record(setting.config, reference, STEPS, setting.batches, setting.weights)
    made = (twin or fault.twin)(setting.config.model, setting.weights, DTYPES[precision])
    write_trace(made, setting.config.trainer, setting.batches, other, precision)
    return compare(reference, other)


def test_there_are_faults_of_every_family_and_all_that_were_asked_for() -> None:
    assert len(FAULTS) >= 15
    assert {fault.architecture.partition("_")[0] for fault in FAULTS.values()} >= {"llama", "mla", "moe", "mamba1", "mamba2"}
    assert any("mamba3" in fault.architecture for fault in FAULTS.values())


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found_at_its_op_and_layer(name: str, tmp_path: Path) -> None:
    fault = FAULTS[name]
    found = found_in(fault, "f64", tmp_path)
    assert found.exit_code == 1 and found.first is not None
    assert found.first.name in fault.expected, report(found)
    assert found.first in found.origins
    if fault.layer is not None:
        assert found.first.record.layer == fault.layer
    text = report(found)
    assert f"DIFFERS first at {found.first.name}" in text and found.first.record.op in text


@pytest.mark.parametrize("name", [name for name in FAULTS if name not in TOO_CLOSE_IN_F32])
def test_in_float32_too_it_is_found_there(name: str, tmp_path: Path) -> None:
    found = found_in(FAULTS[name], "f32", tmp_path)
    assert found.first is not None and found.first.name in FAULTS[name].expected, report(found)


@pytest.mark.parametrize("name", FAULTS)
def test_the_same_program_without_the_fault_is_not_accused(name: str, tmp_path: Path) -> None:
    found = found_in(FAULTS[name], "f32", tmp_path, Twin)
    assert found.first is None, report(found)


@pytest.mark.parametrize("first", range(0, CONFIGS, OF_ONE_TEST))
def test_no_false_alarm_over_random_configs_in_f32_and_f64(first: int, tmp_path: Path) -> None:
    """200 configs in all; a correct twin is inside the budget of every tensor it has, and it has all of them."""
    for seed in range(first, first + OF_ONE_TEST):
        for precision, found in of_a_correct_twin(seed, tmp_path).items():
            assert found.agrees and not found.missing, f"model {seed}, {precision}:\n{report(found)}"


@pytest.mark.parametrize("seed", [0, 1, 2, 3, 4, 5, 8])
def test_a_program_in_bf16_is_judged_by_the_budgets_of_bf16_and_far_outside_those_of_float32(
    seed: int, tmp_path: Path
) -> None:
    """Every array of it is bfloat16, weights, gradients and moments too. (Mamba3's twin needs complex numbers.)"""
    drawn = random_models.draw(seed)
    weights = {name: array.astype(ml_dtypes.bfloat16).astype(np.float64) for name, array in drawn.weights.items()}
    reference, other = tmp_path / "reference.safetensors", tmp_path / "other.safetensors"
    record(drawn.config, reference, 1, drawn.batches, weights)
    twin = Twin(drawn.config.model, weights, torch.bfloat16)
    write_trace(twin, drawn.config.trainer, drawn.batches[:1], other, "bf16")
    found = compare(reference, other)
    assert found.agrees, report(found)
    assert not compare(reference, other, precision="f32").agrees


def of_a_correct_twin(seed: int, directory: Path) -> dict[str, Comparison]:
    drawn = random_models.draw(seed)
    reference, other = directory / "reference.safetensors", directory / "other.safetensors"
    record(drawn.config, reference, random_models.STEPS, drawn.batches, drawn.weights)
    found = {}
    for precision, dtype in DTYPES.items():
        write_trace(Twin(drawn.config.model, drawn.weights, dtype), drawn.config.trainer, drawn.batches, other, precision)
        found[precision] = compare(reference, other)
    return found


def test_a_budget_is_not_so_wide_that_it_grants_anything(tmp_path: Path) -> None:
    """Of a float32 program no tensor is granted a hundredth of its own size, save what Adam makes of vanishing gradients."""
    drawn = random_models.draw(0)
    record(drawn.config, tmp_path / "reference.safetensors", 1, drawn.batches, drawn.weights)
    trace = Trace(tmp_path / "reference.safetensors")
    granted: dict[str, Budget] = budgets(trace, "f32")
    for name, budget in granted.items():
        array: Any = trace.array(name)
        finite = np.abs(array[np.isfinite(array)])
        if finite.size and finite.max() > 0 and not name.endswith(".after"):
            assert budget.largest < 0.01 * finite.max(), name
