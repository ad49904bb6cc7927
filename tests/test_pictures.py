"""What a notebook shows of tensors, models, checkpoints and configs, and the tape drawn as a graph."""

from __future__ import annotations

import base64
import itertools
import re
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import ml_dtypes
import numpy as np
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from oxidizr_ref import LanguageModel, Tensor, checkpoint, draw_graph, load_config, pictured
from oxidizr_ref.checkpoint import format
from oxidizr_ref.config import ModelConfig
from oxidizr_ref.report import pictures
from oxidizr_ref.report.graph import Graph

CONFIG = load_config("nano-start")


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return LanguageModel(CONFIG.model, seed=0)


def html_of(thing: Any) -> str:
    """What Jupyter asks for, which must hold together as XML does."""
    text: str = thing._repr_html_()
    ElementTree.fromstring(f"<r>{text}</r>")
    return text


def pixels_of(text: str) -> np.ndarray[Any, Any]:
    """The picture inside, decoded by the rules of PNG: uint8 ``[rows,columns,3]``."""
    found = re.search('data:image/png;base64,([^"]+)', text)
    assert found is not None
    data, chunks, at = base64.b64decode(found[1]), {}, 8
    while at < len(data):
        (length,), kind = struct.unpack(">I", data[at : at + 4]), data[at + 4 : at + 8]
        body = data[at + 8 : at + 8 + length]
        assert struct.unpack(">I", data[at + 8 + length : at + 12 + length])[0] == zlib.crc32(kind + body)
        chunks[kind], at = body, at + 12 + length
    columns, rows = struct.unpack(">II", chunks[b"IHDR"][:8])
    lines = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), dtype=np.uint8).reshape(rows, 1 + 3 * columns)
    assert not lines[:, 0].any()
    return lines[:, 1:].reshape(rows, columns, 3)


# --------------------------------------------------------------------------------------------------------------- tensors


def test_a_tensor_says_what_it_is_where_it_comes_from_and_how_its_numbers_are_spread() -> None:
    x = Tensor(np.array([[1.0, -2.0], [4.0, 0.0]]), requires_grad=True)
    y = x * 2.0
    text = html_of(y)
    for words in ("<b>Tensor</b> 2×2", "float64", "requires grad", "from Mul", "-4 to 8", "mean 1.5"):
        assert words in text
    y.sum().backward()
    assert "gradient: 2 to 2" in html_of(x) and "gradient" not in html_of(Tensor(np.ones(3)))


def test_the_heat_of_a_matrix_is_grey_at_zero_blue_below_and_orange_above() -> None:
    below, zero, above, bad = pixels_of(html_of(Tensor(np.array([-2.0, 0.0, 2.0, np.nan]))))[0].tolist()
    assert (below, zero, above, bad) == ([24, 66, 140], [190, 196, 204], [217, 72, 15], [0, 0, 0])


@pytest.mark.parametrize("shape", [(), (0,), (1,), (5,), (3, 0), (300, 500), (2, 3, 4)])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.int64, np.bool_])
def test_tensors_of_every_shape_and_dtype_have_a_picture(shape: tuple[int, ...], dtype: Any) -> None:
    text = html_of(Tensor(np.ones(shape, dtype=dtype)))
    assert ("<img" in text) == (shape in ((5,), (300, 500)))
    if "<img" in text:
        assert pixels_of(text).shape[:2] == {(5,): (1, 5), (300, 500): (24, 96)}[shape]


def test_what_is_not_finite_is_counted() -> None:
    assert "1 to 1, mean 1, standard deviation 0, 2 not finite" in html_of(Tensor(np.array([1.0, np.nan, np.inf])))
    assert "3 not finite" in html_of(Tensor(np.full(3, np.nan))) and "nan" in html_of(Tensor(np.array(np.nan)))


def test_a_parameter_that_was_not_filled_says_so() -> None:
    model = LanguageModel(CONFIG.model, seed=None)
    assert html_of(model.norm.weight) == "<div><b>Parameter</b> 128, float32, requires grad, not filled yet</div>"


# ------------------------------------------------------------------------------------------- models, files and configs


def test_a_model_is_a_table_of_its_parts_whose_parameters_add_up(model: LanguageModel) -> None:
    text = html_of(model)
    counts = [int(count.replace(",", "")) for count in re.findall(r"<td>([\d,]+)</td></tr>", text)]
    assert len(counts) == 3 + CONFIG.model.num_layers and sum(counts) == model.num_parameters()
    assert f"<b>{model.num_parameters():,}</b>" in text and "LatentAttention, then MixtureOfExperts" in text


def test_a_model_flows_from_tokens_to_logits_and_equal_layers_are_one_node(model: LanguageModel) -> None:
    text = model._repr_mermaid_()
    assert text is not None
    lines = text.splitlines()
    assert lines[0] == "flowchart TD" and '"layers.0 to 2<br>Mamba2<br>3 × ' in text
    nodes, edges = [line for line in lines[1:] if "[" in line], [line.split() for line in lines[1:] if " --> p" in line]
    assert len(nodes) == 7 and [edge[0] for edge in edges] == ["tokens", "p0", "p1", "p2", "p3"]


def test_tied_weights_are_counted_once() -> None:
    tied = LanguageModel(ModelConfig.model_validate({**tiny.MODEL, "tie_word_embeddings": True}), seed=None)
    assert "the embedding's weights" in html_of(tied) and tied.num_parameters() == sum(p[2] for p in pictures._parts(tied))


def test_a_checkpoint_shows_its_tensors_and_its_metadata_as_text(tmp_path: Path) -> None:
    tensors = {"w.weight": np.ones((2, 3), dtype=np.float32), "optimizer.exp_avg.w.weight": np.full(2, np.nan)}
    format.save(tmp_path / "a.safetensors", tensors, {"config": '{"x":"<b>"}', "note": "<script>\x1b"})
    text = html_of(checkpoint.load(tmp_path / "a.safetensors"))
    assert text.index("w.weight") < text.index("optimizer.exp_avg.w.weight")
    for words in (
        "2 tensors, 40 B",
        "<td>2×3</td><td>F32</td><td>24 B</td><td>1 to 1</td>",
        "2 not finite",
        "&lt;script&gt;␛",
    ):
        assert words in text


def test_a_checkpoint_of_very_many_tensors_shows_some(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "_MOST_TENSORS", 2)
    many = checkpoint.Checkpoint({f"w{i}": np.ones(1) for i in range(5)}, {})
    assert "and 3 more" in html_of(many) and "w2" not in html_of(many)


def test_a_config_shows_every_key_and_marks_what_is_not_the_default() -> None:
    text = html_of(CONFIG)
    for section in (CONFIG.model, CONFIG.trainer, CONFIG.data):
        assert all(f"<code>{key}</code>" in text for key in type(section).model_fields)
    assert f"<b>{CONFIG.model.hidden_size}</b>" in text and "<b>10000.0</b>" not in text


def test_an_unknown_thing_is_its_repr() -> None:
    assert pictures.html("<a>") == "<pre>&#x27;&lt;a&gt;&#x27;</pre>"


def test_pictures_are_drawn_by_whoever_the_package_names_and_loaded_for_the_first_one_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    program = (
        "import sys; from oxidizr_ref.autograd import Tensor; import numpy; t = Tensor(numpy.ones(2))\n"
        "before = 'oxidizr_ref.report.pictures' in sys.modules; t._repr_html_()\n"
        "print(before, 'oxidizr_ref.report.pictures' in sys.modules)"
    )
    run = [sys.executable, "-c", program]
    done = subprocess.run(run, capture_output=True, text=True, check=True, env=tiny.environment())
    assert done.stdout.split() == ["False", "True"]
    monkeypatch.setattr(pictured, "artist", None)
    assert Tensor(np.ones(2))._repr_html_() is None and LanguageModel(CONFIG.model, seed=None)._repr_mermaid_() is None


# ---------------------------------------------------------------------------------------------------------------- graphs


def test_the_tape_of_a_small_sum_is_drawn_node_by_node() -> None:
    w, x = Tensor(np.ones((3, 2)), requires_grad=True), Tensor(np.ones((4, 3)))
    graph = draw_graph(((x @ w) * 2.0 + w.sum()).sum(), {"w": w})
    labels = [label for label, _ in graph.nodes]
    assert labels[0] == "Sum" and sorted(labels) == ["Add", "MatMul", "Mul", "Sum", "Sum", "w\n3×2"]
    assert [leaf for _, leaf in graph.nodes] == [label.startswith("w") for label in labels]
    named = {(labels[source], labels[target], shape) for source, target, shape in graph.edges}
    assert named >= {("MatMul", "Mul", "4×2"), ("Mul", "Add", "4×2"), ("w\n3×2", "MatMul", "3×2"), ("Sum", "Add", "scalar")}
    assert len(graph.edges) == 6  # both of w's uses, and nothing to x, which wants no gradient


def test_every_parameter_of_a_model_stands_in_its_tape_under_its_name(model: LanguageModel) -> None:
    tokens = np.arange(64).reshape(2, 32)
    loss = model.loss(tokens, tokens)
    graph = draw_graph(loss, model)
    leaves = {label.partition("\n")[0] for label, leaf in graph.nodes if leaf}
    router = {name for name, _ in model.named_parameters() if "router" in name}
    assert leaves | router == {name for name, _ in model.named_parameters()}
    assert all(source > target for source, target, _ in graph.edges if not graph.nodes[source][1])
    loss.backward()
    with pytest.raises(RuntimeError, match="already walked backward"):
        draw_graph(loss)


def test_a_value_computed_from_nothing_is_a_graph_of_one() -> None:
    assert draw_graph(Tensor(np.ones(3))) == Graph((("3", True),), ())


def test_one_graph_is_the_same_in_all_its_languages(model: LanguageModel) -> None:
    tokens = np.arange(8).reshape(1, 8)
    graph = draw_graph(model.loss(tokens, tokens), model)
    drawing = ElementTree.fromstring(html_of(graph))
    space = "{http://www.w3.org/2000/svg}"
    nodes, edges = len(graph.nodes), len(graph.edges)
    assert [len(list(drawing.iter(space + tag))) for tag in ("rect", "path")] == [nodes, edges]
    assert len(re.findall(r"^  n\d+ \[label=", graph.dot, flags=re.M)) == nodes and graph.dot.count(" -> ") == edges
    assert len(re.findall(r'^  n\d+(?:\["|\(\[")', graph.mermaid, flags=re.M)) == nodes
    assert graph.mermaid.count(" --> ") == edges and graph._repr_mermaid_() == graph.mermaid


@given(st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), max_size=12))
def test_names_of_any_text_break_no_language(name: str) -> None:
    graph = draw_graph(w := Tensor(np.ones(2), requires_grad=True), {name: w})
    html_of(graph)
    (line,) = [line for line in graph.dot.splitlines() if "[label=" in line]
    assert re.fullmatch(r'  n0 \[label="(?:[^"\\]|\\.)*", style=rounded\];', line)
    inside = re.fullmatch(r'flowchart BT\n  n0\(\["(.*)"\]\)\n', graph.mermaid)
    assert inside is not None and not set(inside[1].replace("<br>", "")) & set('"<>&')


def test_boxes_of_a_row_do_not_overlap(model: LanguageModel) -> None:
    tokens = np.arange(8).reshape(1, 8)
    text = draw_graph(model.loss(tokens, tokens), model)._repr_html_()
    rows: dict[str, list[tuple[float, float]]] = {}
    for width, x, y in re.findall(r'<rect width="([\d.]+)" height="26" rx="\d+" x="([\d.]+)" y="([\d.]+)"', text):
        rows.setdefault(y, []).append((float(x), float(x) + float(width)))
    assert len(rows) > 20
    for boxes in rows.values():
        ordered = sorted(boxes)
        assert all(a[1] < b[0] for a, b in itertools.pairwise(ordered))
