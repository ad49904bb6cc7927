"""bench.py and its command: the floor has exactly the products of a step, and every moment is charged to something."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from architectures import ARCHITECTURES, model_config

from oxidizr_ref import bench
from oxidizr_ref.bench import Measured, Product, Spread, measure
from oxidizr_ref.cli.main import main
from oxidizr_ref.config import Config, TrainerConfig


def config_of(architecture: str, batch_size: int = 2, accumulation: int = 1, **changes: Any) -> Config:
    trainer = TrainerConfig(learning_rate=1e-3, batch_size=batch_size, gradient_accumulation=accumulation)
    return Config(model=model_config(architecture, **changes), trainer=trainer)


@pytest.fixture(scope="module")
def llama() -> Measured:
    return measure(config_of("llama", dtype="f32"), rounds=3)


def test_the_floor_has_the_products_that_a_llama_needs_and_no_others(llama: Measured) -> None:
    """A linear layer is three products a step; attention two forward and, its scores computed again, five backward.

    Beside these are products with a vector: sums along rows or columns, and in two of attention's products one more channel.
    """
    m = model_config("llama")
    n, D, I, T = 2 * m.max_seq_len, m.hidden_size, m.intermediate_size, m.max_seq_len  # noqa: E741
    weights = m.num_layers * (2 * D * D + 2 * D * m.kv_heads * m.head_dim + 3 * D * I) + m.vocab_size * D
    attention = m.num_layers * 7 * 2 * m.num_heads * T * T * m.head_dim
    in_attention = m.num_layers * 2 * m.num_heads * (3 * T * T + T * m.head_dim)  # its softmax's sums, both channels, y dy
    elsewhere = (2 * m.num_layers + 1) * n * D + n * m.vocab_size  # the norms' weights; the sums of exponentials
    assert llama.operations == 3 * 2 * n * weights + 2 * attention + 2 * (in_attention + elsewhere)


def test_with_accumulation_a_step_has_so_many_times_the_products() -> None:
    once, twice = (measure(config_of("llama", accumulation=number), rounds=1) for number in (1, 2))
    assert (twice.products, twice.operations, twice.tokens) == (2 * once.products, 2 * once.operations, 2 * once.tokens)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_is_measured_and_all_of_its_step_is_charged(architecture: str) -> None:
    found = measure(config_of(architecture), rounds=2)
    assert len(found.step.seconds) == len(found.floor.seconds) == 2 and found.over_floor > 0
    phases = found.by(lambda stack: stack[0])
    assert set(phases) >= {"forward", "backward", "gradients", "optimizer"} and min(phases.values()) >= 0
    assert sum(phases.values()) == pytest.approx(sum(found.stacks.values()))
    ops = {stack[-1] for stack in found.stacks if stack[0] == "backward"}
    assert {"LinearCrossEntropy", "Lookup", "RMSNorm"} <= ops
    assert any(stack[1].startswith("layers.0.") for stack in found.stacks if len(stack) == 3)


def test_numpy_s_product_is_itself_again_afterwards_even_after_an_error() -> None:
    matmul = np.matmul
    with pytest.raises(ZeroDivisionError), bench._recorded_products() as products:
        np.matmul(np.ones((2, 3), np.float32), np.ones((3, 4), np.float32))
        raise ZeroDivisionError
    assert np.matmul is matmul
    assert products == [Product((2, 3), (3, 4), False, False, "float32")]


def test_a_product_knows_how_its_operands_lie_and_what_it_costs() -> None:
    a, b = np.ones((5, 3, 2)).swapaxes(1, 2), np.ones((4, 3)).T
    with bench._recorded_products() as products:
        np.matmul(a, b)
    (product,) = products
    assert product == Product((5, 2, 3), (3, 4), True, True, "float64")
    assert (product.shape, product.operations) == ((5, 2, 4), 2 * 5 * 2 * 4 * 3)
    floor = bench._Floor(products)
    for operand, shape in zip(floor._operands[product], (a.shape, b.shape), strict=True):
        assert operand.shape == shape and bench._lies_transposed(operand)
    floor.run()


def test_numbers_are_medians_and_ratios_round_by_round() -> None:
    found = Measured(2, 100, 7, Spread((1.0, 4.0, 3.0)), Spread((1.0, 2.0, 1.0)), {("forward", "A"): 0.5}, 3, 10, 11)
    assert found.over_floor == 2.0 and found.as_json()["tokens/s"] == pytest.approx(100 / 3)
    assert found.as_json()["step"] == {"median": 3.0, "min": 1.0, "max": 4.0}
    assert found.folded() == "forward;A 500000\n"


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["oxidizr-ref", "bench", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    code: int = ended.value.code  # type: ignore[assignment]
    return code


def test_the_command_prints_json_and_writes_a_profile_for_flame_graphs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    profile = tmp_path / "step.folded"
    assert run(monkeypatch, "-f", "tiny-llama", "--rounds", "2", "--threads", "1", "--json", "--profile", str(profile)) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["threads"] == 1 and found["rounds"] == 2 and found["step"]["min"] <= found["step"]["median"]
    lines = profile.read_text(encoding="utf-8").splitlines()
    assert lines and all(re.fullmatch(r"[^ ;]+(;[^;]+){1,2} \d+", line) for line in lines)


def test_the_command_s_table_fits_80_columns(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "-f", "tiny-hybrid", "--rounds", "1") == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert "times as long" in out and "backward SSD" in out and "GFLOP/s" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-f", "no-such-model"), "no such file"),
        (("-f", "tiny-llama", "--profile", "."), "--profile .: no file can be written there"),
        (("-f", "tiny-llama", "--profile", "nowhere/x"), "--profile nowhere/x: no file can be written there"),
        (("-f", "tiny-llama", "--rounds", "0"), "--rounds"),
        (("-f", "tiny-llama", "--set", "hidden=3"), "unknown key"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    assert run(monkeypatch, *arguments) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
