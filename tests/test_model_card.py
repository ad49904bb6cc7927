"""What a package says of itself: the card's header and numbers, its picture, and code that runs as it stands."""

from __future__ import annotations

import json
import math
import re
import shlex
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import architectures
import pytest
import tiny
import yaml
from hypothesis import given
from hypothesis import strategies as st

from oxidizr_ref.config import ModelConfig
from oxidizr_ref.interop import source as sources
from oxidizr_ref.interop.loss_picture import loss_picture
from oxidizr_ref.interop.model_card import HUB_LICENSES, Packaged, layers_in_words, model_card
from oxidizr_ref.interop.pack import Wishes, pack
from oxidizr_ref.interop.source import Source
from oxidizr_ref.tokenizers import tokenizer_from_state

_STATES: dict[str, Any] = {"mamba2_num_heads": 4, "mamba2_state_size": 8, "mamba2_chunk_size": 8}
_LATENTS: dict[str, Any] = {"kv_latent_dim": 8, "q_latent_dim": 6, "d_rope": 4}
_EXPERTS: dict[str, Any] = {"num_experts": 4, "shared_expert_enabled": True}
HYBRID: dict[str, Any] = {"num_layers": 4, "mamba_layers": [0, 1, 3], **_STATES, **_LATENTS, **_EXPERTS}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tiny.Run:
    """A finished run of a hybrid on bytes, with losses of text held out. Tests only read it."""
    trainer = {"max_steps": 6, "save_interval": 3, "eval_fraction": 0.25, "eval_interval": 3}
    made = tiny.make_run(tmp_path_factory.mktemp("run"), HYBRID, trainer, characters=400)
    assert made.train() == 0
    return made


@pytest.fixture(scope="module")
def source(run: tiny.Run) -> Source:
    return sources.choose(run.directory, "latest")


def card_of(source: Source, **changes: Any) -> str:
    package = Packaged(
        source,
        tokenizer_from_state(source.state.tokenizer),
        name="tiny",
        repository="me/tiny",
        family=None,
        dtype="f32",
        files=("loss_curve.svg", "model.safetensors", "tokenizer.json"),
        license="mit",
        languages=(),
    )
    return model_card(replace(package, **changes))


def header_of(card: str) -> dict[str, Any]:
    front = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    assert front is not None
    header: dict[str, Any] = yaml.safe_load(front[1])
    return header


def rows_of(card: str) -> dict[str, str]:
    """The cells of all tables of two columns, by their first."""
    return {match[1]: match[2] for match in re.finditer(r"^\| ([^|]+) \| ([^|]+) \|$", card, re.MULTILINE)}


def with_state(source: Source, **changes: Any) -> Source:
    return replace(source, state=replace(source.state, **changes))


# -------------------------------------------------------------------------------------------------------------- header


def test_the_header_is_what_the_hub_reads(source: Source) -> None:
    assert header_of(card_of(source)) == {
        "license": "mit",
        "library_name": "oxidizr_ref",
        "pipeline_tag": "text-generation",
        "tags": ["oxidizr_ref", "mamba2"],
    }
    theirs = header_of(card_of(source, family="llama", languages=("en", "no")))
    assert theirs["library_name"] == "transformers"
    assert theirs["tags"] == ["oxidizr_ref", "llama"]
    assert theirs["language"] == ["en", "no"]


def test_a_licence_that_was_not_given_is_not_invented(source: Source) -> None:
    card = card_of(source, license=None)
    assert header_of(card)["license"] == "unknown"
    assert "Not stated." in card.partition("## Licence")[2]


def test_a_licence_that_the_hub_does_not_know_is_told_in_its_way(source: Source) -> None:
    header = header_of(card_of(source, license="house-1.0"))
    assert (header["license"], header["license_name"]) == ("other", "house-1.0")
    assert header_of(card_of(source, license="1.0"))["license_name"] == "1.0"
    assert len(HUB_LICENSES.split()) == len(set(HUB_LICENSES.split()))


# ------------------------------------------------------------------------------------------------------------- numbers


def test_the_numbers_of_the_card_are_those_of_the_files(source: Source, run: tiny.Run) -> None:
    card, last, final = card_of(source), run.metrics()[-2], run.metrics()[-1]
    rows = rows_of(card)
    count = sum(array.size for array in source.state.weights.values())
    assert rows["parameters"].startswith(f"{count:,} (")
    assert rows["steps"] == "6"
    assert rows["tokens seen"] == f"{6 * 2 * 2 * 8:,}"
    assert rows["batch"] == "4 windows of 8 tokens (2 batches of 2)"
    assert rows["tokens"] == "400, the last 25% held out"
    assert rows["SHA-256 of the tokens"] == f"`{source.state.data['digest']}`"
    assert rows["SHA-256 of that file"] == f"`{tiny.sha256(run.path(6))}`"
    assert f"| training, one batch | 6 | {last['loss']:.4f} | {math.exp(last['loss']):.3f} |" in card
    loss = final["eval_loss"]
    assert f"| held out | 6 | {loss:.4f} | {math.exp(loss):.3f} | {loss / math.log(2):.4f} |" in card
    assert rows["changes on the way"] == "none"


def test_active_parameters_leave_out_the_experts_that_a_token_does_not_meet(source: Source) -> None:
    expert = 3 * 16 * 24
    count = sum(array.size for array in source.state.weights.values())
    assert rows_of(card_of(source))["parameters"] == f"{count:,} ({count - 2 * expert:,} active)"


def test_data_seen_several_times_are_told(source: Source) -> None:
    assert "times over" not in card_of(source)
    again = with_state(source, cursor=source.state.cursor * 4)
    assert "about 2.56 times over" in card_of(again)  # 96 windows of 8 tokens, of 300 that were learned from


def test_a_checkpoint_without_its_log_makes_no_claims_about_losses(source: Source) -> None:
    card = card_of(replace(source, records=[]), files=("model.safetensors",))
    assert "nothing is said here about its losses" in card
    assert "loss_curve" not in card and "perplexity" not in card


def test_without_held_out_text_the_card_says_so(source: Source) -> None:
    records = [{key: value for key, value in record.items() if key != "eval_loss"} for record in source.records]
    assert "Nothing was held out" in card_of(replace(source, records=records))


@pytest.mark.parametrize(
    ("lineage", "step", "said"),
    [
        ([], 6, "trained from scratch"),
        ([{"imported_from": {"family": "llama", "digest": "0"}}], 0, "imported with"),
        ([{"imported_from": {"family": "llama", "digest": "0"}}, {"step": 2}], 6, "trained from imported weights"),
        ([{"init_from": {"step": 4}}], 6, "trained from the weights of an earlier run"),
        ([], 0, "initialized with"),
    ],
)
def test_where_the_weights_come_from_is_told(source: Source, lineage: list[Any], step: int, said: str) -> None:
    card = card_of(with_state(source, lineage=lineage, step=step))
    assert said in card
    assert ("No step of training" in card) == (step == 0)
    assert rows_of(card)["changes on the way"] == (
        "none" if not lineage else f"{len(lineage)}, listed in `training_config.json`"
    )


def test_texts_from_a_file_cannot_become_markdown(source: Source) -> None:
    strange = with_state(source, data={"digest": "<img src=x>`|\n## ", "tokens": 7})
    assert rows_of(card_of(strange))["SHA-256 of the tokens"] == "`img srcx `"


# ---------------------------------------------------------------------------------------------------------- the layers


@pytest.mark.parametrize("keys", architectures.ARCHITECTURES.values(), ids=list(architectures.ARCHITECTURES))
def test_every_architecture_is_put_into_words(keys: Mapping[str, Any]) -> None:
    model = ModelConfig(**{**architectures.BASE, **keys})
    sentence = layers_in_words(model)
    assert sentence[0] in "EL" and sentence.endswith(".") and "\n" not in sentence
    assert ("xperts" in sentence) == (model.uses_moe and "attention" in model.layer_kinds)
    assert ("latent" in sentence) == (model.uses_mla and "attention" in model.layer_kinds)


def test_layers_are_counted_in_ranges() -> None:
    model = ModelConfig(**{**tiny.MODEL, **HYBRID, "num_layers": 6, "mamba_layers": [0, 1, 2, 4]})
    sentence = layers_in_words(model)
    assert sentence.startswith("Layers 0–2 and 4 are Mamba-2 (4 heads of 8, state 8); layers 3 and 5 are multi-head latent")


# --------------------------------------------------------------------------------------------------- code that is shown


@pytest.mark.parametrize(("title", "program"), [("With oxidizr_ref", "sh"), ("With safetensors and NumPy", sys.executable)])
def test_the_code_on_the_card_runs_as_it_stands(source: Source, tmp_path: Path, title: str, program: str) -> None:
    packed = pack(source, Wishes(name="tiny", output=tmp_path / "tiny"))
    card = (packed.directory / "README.md").read_text(encoding="utf-8")
    found = re.search(rf"{title}[^`]*```[a-z]+\n(.*?)```", card, re.DOTALL)
    assert found is not None
    code = found[1].replace("oxidizr-ref ", f"{shlex.quote(sys.executable)} -m oxidizr_ref ")
    done = subprocess.run(
        [program, "-c", code], cwd=packed.directory, env=tiny.environment(), capture_output=True, text=True, errors="replace"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


# --------------------------------------------------------------------------------------------------------- the picture

SVG = "{http://www.w3.org/2000/svg}"


def drawn(text: str) -> dict[str, list[tuple[float, float]]]:
    """The points of the curves by their class, and all other places that are named."""
    root = ElementTree.fromstring(text)
    return {
        line.attrib["class"]: [tuple(map(float, place.split(","))) for place in line.attrib["points"].split()]  # type: ignore[misc]
        for line in root.iter(f"{SVG}polyline")
    }


def test_a_curve_goes_where_its_numbers_are() -> None:
    picture = loss_picture([(1, 5.0), (50, 3.0), (100, 1.0)], [(50, 3.5), (100, 1.5)])
    assert picture is not None
    curves = drawn(picture)
    (_, y1), (x2, y2), (x3, y3) = curves["line train"]
    assert y1 < y2 < y3 and y2 - y1 == pytest.approx(y3 - y2, abs=0.11)  # downwards is less
    assert x3 == 696 and (x2 - 64) / (x3 - 64) == pytest.approx(0.5, abs=0.001)
    held = curves["line held"]
    assert held[0][0] == x2 and held[0][1] < y2 and held[1][1] < y3
    assert "training 1.0000 at step 100, held out 1.5000 at step 100" in picture
    assert picture.count("prefers-color-scheme: dark") == 1


@pytest.mark.parametrize("points", [[], [(1, 2.0)]])
def test_one_number_is_no_curve(points: list[tuple[int, float]]) -> None:
    assert loss_picture(points, points) is None


def test_a_long_run_is_drawn_with_means_of_neighbours() -> None:
    picture = loss_picture([(step, step % 2) for step in range(1, 120_001)], [])
    assert picture is not None and len(picture) < 20_000
    (heights,) = [{y for _, y in curve} for curve in drawn(picture).values()]
    assert len(heights) == 1  # the mean of 200 neighbours is 1/2 everywhere


@given(
    st.lists(st.floats(0, 1e6), min_size=2, max_size=30),
    st.lists(st.floats(0, 1e6), max_size=5),
    st.integers(1, 10**9),
)
def test_any_run_is_drawn_inside_the_frame(train: list[float], held_out: list[float], apart: int) -> None:
    points = [[((i + 1) * apart, loss) for i, loss in enumerate(losses)] for losses in (train, held_out)]
    picture = loss_picture(points[0], points[1])
    assert picture is not None and picture == loss_picture(points[0], points[1])
    for curve in drawn(picture).values():
        assert all(64 <= x <= 696 and 48 <= y <= 306 for x, y in curve)
    words = [element.text or "" for element in ElementTree.fromstring(picture).iter(f"{SVG}text")]
    ticks = [word for word in words if re.fullmatch(r"-?[0-9.,]+", word)]
    assert 4 <= len(ticks) <= 30 and len(json.dumps(ticks)) < 500
