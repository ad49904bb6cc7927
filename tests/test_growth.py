"""How a training step grows: the page is made of the stored numbers, and what it says of memory and work holds by count.

Nothing is timed here. Peaks are those that NumPy reports to tracemalloc.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import math
import re
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from architectures import model_config

from oxidizr_ref import LanguageModel, Tensor, bench, parallel
from oxidizr_ref.fused import linear_cross_entropy as lce_module
from oxidizr_ref.fused.linear_cross_entropy import linear_cross_entropy

DOCS = Path(__file__).parents[1] / "docs"
SCRIPTS = DOCS / "scripts"
sys.path.append(str(SCRIPTS))

import growth_page  # noqa: E402 - lives beside the documentation
import growth_sweeps  # noqa: E402

pytestmark = pytest.mark.thorough

# --- the page ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def numbers() -> dict[str, Any]:
    stored: dict[str, Any] = json.loads((DOCS / "growth.json").read_text(encoding="utf-8"))
    return stored


def test_the_section_of_the_page_is_made_of_the_stored_numbers(numbers: Mapping[str, Any], tmp_path: Path) -> None:
    page, text = tmp_path / "performance.md", (DOCS / "performance.md").read_text(encoding="utf-8")
    page.write_text(text, encoding="utf-8")
    growth_page.insert(numbers, page)
    assert page.read_text(encoding="utf-8") == text


def test_every_sweep_was_measured_in_full(numbers: Mapping[str, Any]) -> None:
    for name, sweep in growth_sweeps.SWEEPS.items():
        points = [(point["model"], point["size"]) for point in numbers["sweeps"][name]["points"]]
        assert points == [(model, size) for model in sweep.models for size in sweep.sizes], name
    grid = [(point["vocabulary"], point["tokens"]) for point in numbers["sweeps"]["cross-entropy"]["points"]]
    assert grid == growth_sweeps.GRID


def test_the_pictures_are_drawn_from_the_stored_numbers(numbers: Mapping[str, Any], tmp_path: Path) -> None:
    matplotlib = pytest.importorskip("matplotlib", reason="pictures need matplotlib: pip install '.[docs]'")
    stored = {path.name: path.read_text(encoding="utf-8") for path in (DOCS / "images").glob("growth_*.svg")}
    assert set(stored) == {f"growth_{name}.svg" for name in numbers["sweeps"]}
    (version,) = {re.findall(r"<dc:title>Matplotlib v([\d.]+)", text)[0] for text in stored.values()}
    if version != matplotlib.__version__:
        pytest.skip(f"drawn by matplotlib {version}, which {matplotlib.__version__} does not do to the byte")
    drawn = growth_page.draw(numbers, tmp_path)
    assert {path.name for path in drawn} == set(stored)
    assert [path.name for path in drawn if path.read_text(encoding="utf-8") != stored[path.name]] == []


def test_no_picture_is_too_large_to_load() -> None:
    sizes = [path.stat().st_size for path in (DOCS / "images").glob("growth_*.svg")]
    assert sizes and max(sizes) < 300_000


def test_an_exponent_is_that_of_the_upper_half_of_the_range() -> None:
    xs = [2.0**i for i in range(9)]
    assert growth_page.exponent(xs, [3 * x**1.5 for x in xs]) == pytest.approx(1.5)
    bent = [x if x < 16 else x * x / 16 for x in xs]  # linear below the middle of the logarithmic range, then quadratic
    assert growth_page.exponent(xs, bent) == pytest.approx(2.0)
    assert growth_page.exponent([4.0, 1.0], [2.0, 1.0]) == pytest.approx(0.5)
    assert math.isnan(growth_page.exponent([1.0, 2.0], [0.0, 1.0]))


def test_a_page_without_its_markers_is_refused_and_a_missing_one_is_begun(
    numbers: Mapping[str, Any], tmp_path: Path
) -> None:
    page = tmp_path / "performance.md"
    growth_page.insert(numbers, page)
    assert page.read_text(encoding="utf-8").startswith("# Performance\n\n<!-- growth:begin -->\n## ")
    page.write_text("# Performance\n<!-- growth:begin -->\n", encoding="utf-8")
    with pytest.raises(ValueError, match="growth:end"):
        growth_page.insert(numbers, page)
    assert page.read_text(encoding="utf-8") == "# Performance\n<!-- growth:begin -->\n"


@pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="the script draws with matplotlib: pip install '.[docs]'"
)
def test_the_script_measures_draws_and_writes(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPTS / "growth.py"), "--quick", "--date", "2000-01-01", "--directory", str(tmp_path)]
    subprocess.run([*command, "--only", "cross-entropy"], check=True, capture_output=True)
    points = json.loads((tmp_path / "growth.json").read_text(encoding="utf-8"))["sweeps"]["cross-entropy"]["points"]
    assert [(point["vocabulary"], point["tokens"]) for point in points] == growth_sweeps.QUICK_GRID
    assert all(point["step"] > 0 for point in points)
    made = {path: path.read_bytes() for path in (tmp_path / "performance.md", *(tmp_path / "images").iterdir())}
    assert len(made) == 2 and b"2000-01-01" in made[tmp_path / "performance.md"]
    subprocess.run([*command, "--plot-only"], check=True, capture_output=True)
    assert {path: path.read_bytes() for path in made} == made


# --- what it says, by count -------------------------------------------------------------------------------------------


def peak_of(run: Callable[[], object]) -> int:
    """Bytes of the most that ``run()`` has at a time, beyond what was there. One thread: as many temporaries as tiles."""
    parallel.set_threads(1)
    gc.collect()
    tracemalloc.start()
    try:
        run()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


WIDTH, CHUNK = 8, 1 << 18


@pytest.mark.parametrize("vocab", [64, 1024, 4096])
@pytest.mark.parametrize("tokens", [256, 1024, 4096, 8192])
def test_beyond_its_gradients_the_cross_entropy_takes_a_chunk_whatever_tokens_times_vocabulary(
    monkeypatch: pytest.MonkeyPatch, tokens: int, vocab: int
) -> None:
    monkeypatch.setattr(lce_module, "LOGITS", CHUNK)
    rng = np.random.default_rng(0)
    h = Tensor(rng.standard_normal((tokens, WIDTH), dtype=np.float32), requires_grad=True)
    w = Tensor(rng.standard_normal((vocab, WIDTH), dtype=np.float32), requires_grad=True)
    targets = rng.integers(0, vocab, tokens)
    peak = peak_of(lambda: linear_cross_entropy(h, w, targets, float(tokens)).backward())
    beyond = peak - 4 * WIDTH * (tokens + vocab)
    # A chunk of logits (1 MiB), or all of them where they are fewer. Beside it: a loss a token; a tile of dW (512 rows) on
    # its way into dW; of each row of a tile of logits, at most 131,072 / 64 rows, a maximum, a sum and two copies of what
    # was picked (float32), its number and target and their copies (int64); 64 KiB for Python. All logits are up to 128 MiB.
    logits = 4 * min(CHUNK, tokens * vocab)
    rest = 4 * tokens + 4 * 512 * WIDTH + (4 * 4 + 8 * 8) * 2048 + 2**16
    assert 0.9 * logits < beyond < logits + rest, (beyond - logits, rest)


def small_model(architecture: str, length: int) -> LanguageModel:
    """For lengths that are whole chunks."""
    return LanguageModel(model_config(architecture, max_seq_len=length, mamba2_chunk_size=64, dtype="f32"), seed=0)


@pytest.mark.parametrize("architecture", ["llama", "mamba1", "mamba2", "mamba3"])
def test_the_peak_of_a_whole_model_s_loss_and_gradients_is_linear_in_the_length(architecture: str) -> None:
    def peak(length: int) -> int:
        model, tokens = small_model(architecture, length), np.random.default_rng(0).integers(0, 32, (1, length))
        return peak_of(lambda: model.loss(tokens, tokens).backward())

    short, middle, long = (peak(length) for length in (512, 1024, 2048))
    # Of a straight line the second rise is twice the first. It may differ, for at another length another moment may be that
    # of the peak; but by less than an array of length × length would bring, were it of single bytes, of one head and layer.
    bytes_of_a_square = (2048**2 - 1024**2) - 2 * (1024**2 - 512**2)
    assert abs((long - middle) - 2 * (middle - short)) < bytes_of_a_square
    assert short > 512**2, "too small a model for a square to matter"


def test_the_work_of_mamba_s_products_is_linear_in_the_length_and_that_of_attention_quadratic() -> None:
    def operations(architecture: str, length: int) -> int:
        model, tokens = small_model(architecture, length), np.random.default_rng(0).integers(0, 32, (1, length))
        with bench._recorded_products() as products:
            model.loss(tokens, tokens).backward()
        return sum(product.operations for product in products)

    lengths = (256, 512, 1024)  # whole chunks of Mamba2, whole blocks of attention's queries
    for architecture in ("mamba1", "mamba2", "mamba3"):
        once, twice, four_times = (operations(architecture, length) for length in lengths)
        assert four_times - twice == 2 * (twice - once) > 0, architecture  # to the last operation
    # a·T² + b·T: what is left of f(2T) - 2·f(T) is 2a·T², four times as much at twice the length.
    once, twice, four_times = (operations("llama", length) for length in lengths)
    assert four_times - 2 * twice == 4 * (twice - 2 * once) > 0
