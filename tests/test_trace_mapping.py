"""Maps of names: which rule counts, what its steps do to an array, what is refused, and that the shipped ones name ours.

What the shipped maps are worth against the programs that they are for, `oracle/test_trace_maps.py` tests.
"""

from __future__ import annotations

import functools
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from architectures import ARCHITECTURES, NAMES, batch, model_config
from hypothesis import given
from hypothesis import strategies as st

from oxidizr_ref import LanguageModel
from oxidizr_ref.config import Config, ModelConfig, TrainerConfig
from oxidizr_ref.config_yaml import read_text, read_yaml
from oxidizr_ref.errors import ConfigError, TraceError
from oxidizr_ref.trace import Trace, record
from oxidizr_ref.trace.mapping import Mapped, NameMap, load_map, shipped_maps, sizes_of
from oxidizr_ref.trace.names import parse

Rule = dict[str, Any]


def written(folder: Path, *rules: Rule) -> Path:
    """A file of these rules, every text in quotes."""
    lines = ["names:"] if rules else ["names: []"]
    for rule in rules:
        lines += [f"{'- ' if i == 0 else '  '}{key}: {_yaml(value)}" for i, (key, value) in enumerate(rule.items())]
    path = folder / "map.yaml"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _yaml(value: Any) -> str:
    return "[" + ", ".join(map(_yaml, value)) + "]" if isinstance(value, list) else f"'{value}'"


def mapped(folder: Path, rule: Rule, name: str, model: ModelConfig | None = None) -> Mapped:
    """What a map of one rule makes of a name."""
    return load_map(written(folder, rule), model)[name]


# --- which name -------------------------------------------------------------------------------------------------------


def test_without_a_rule_names_are_equal_and_arrays_stay_as_they_are(tmp_path: Path) -> None:
    for names in (load_map(written(tmp_path)), NameMap([], {})):
        found, array = names["layers.3.self_attn.q"], np.arange(6.0)
        assert found == Mapped("layers.3.self_attn.q")
        assert found(array) is array


def test_the_numbers_in_braces_are_taken_over_whatever_their_order_and_length(tmp_path: Path) -> None:
    rule = {"ours": "layers.{i}.moe.experts.{e}.up", "theirs": "expert{e}.of.{i}.w"}
    names = load_map(written(tmp_path, rule))
    assert names["layers.12.moe.experts.345.up"].name == "expert345.of.12.w"
    assert names["layers.0.moe.experts.0.up"].name == "expert0.of.0.w"


@pytest.mark.parametrize(
    "name", ["layers.x.up", "layers..up", "layers.1.2.up", "a.layers.1.up", "layers.1.up.b", "layersX1.up"]
)
def test_a_rule_fits_whole_paths_only_with_digits_for_its_numbers_and_a_dot_for_a_dot(tmp_path: Path, name: str) -> None:
    assert mapped(tmp_path, {"ours": "layers.{i}.up", "theirs": "w.{i}"}, name).name == name


def test_the_first_rule_that_fits_counts(tmp_path: Path) -> None:
    special, general = {"ours": "layers.0.up", "theirs": "first"}, {"ours": "layers.{i}.up", "theirs": "other.{i}"}
    names = load_map(written(tmp_path, special, general))
    assert [names[f"layers.{i}.up"].name for i in (0, 1)] == ["first", "other.1"]
    names = load_map(written(tmp_path, general, special))
    assert [names[f"layers.{i}.up"].name for i in (0, 1)] == ["other.0", "other.1"]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("layers.1.w", "h.1.v"),
        ("layers.1.w.grad", "h.1.v.grad"),
        ("layers.1.w.grad.clipped", "h.1.v.grad.clipped"),
        ("layers.1.w.after", "h.1.v.after"),
        ("optimizer.exp_avg.layers.1.w", "optimizer.exp_avg.h.1.v"),
        ("optimizer.exp_avg_sq.layers.1.w", "optimizer.exp_avg_sq.h.1.v"),
        ("micro.3.layers.1.w.grad", "micro.3.h.1.v.grad"),
        ("step.2.layers.1.w.after", "step.2.h.1.v.after"),
        ("step.12.micro.2.layers.1.w", "step.12.micro.2.h.1.v"),
        ("step.2.optimizer.exp_avg.layers.1.w", "step.2.optimizer.exp_avg.h.1.v"),
        ("step.1.micro.1.layers.1.w", "h.1.v"),  # the first of both need not be said
    ],
)
def test_one_rule_serves_a_value_with_all_its_prefixes_and_ends(tmp_path: Path, ours: str, theirs: str) -> None:
    found = mapped(tmp_path, {"ours": "layers.{i}.w", "theirs": "h.{i}.v", "do": ["[i]"]}, ours)
    assert found.name == theirs
    assert found(np.arange(5)) == 1  # and with its steps


def test_a_name_in_a_rule_is_no_pattern_but_for_its_numbers(tmp_path: Path) -> None:
    rule = {"ours": "a.*(b)+[c]|d", "theirs": "found"}
    assert mapped(tmp_path, rule, "a.*(b)+[c]|d").name == "found"
    assert mapped(tmp_path, rule, "axxb").name == "axxb"


# --- what steps do ----------------------------------------------------------------------------------------------------

ARRAY = np.arange(2 * 3 * 4).reshape(2, 3, 4)
#: hidden 32, 4 heads of 8, 2 key/value heads, intermediate 24, latents 12 and 10, rotated 6, 4 experts, vocabulary 61.
MODEL = model_config("hybrid")


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([], ARRAY),
        (["[0]"], ARRAY[0]),
        (["[-1]"], ARRAY[-1]),
        (["[e]"], ARRAY[1]),
        (["[e - 1, :, e + i]"], ARRAY[0, :, 3]),
        (["[:, 1:]"], ARRAY[:, 1:]),
        (["[:, :, ::2]"], ARRAY[:, :, ::2]),
        (["[:, ::-1, :-1]"], ARRAY[:, ::-1, :-1]),
        (["[..., :2]"], ARRAY[..., :2]),
        (["[..., 0]"], ARRAY[..., 0]),
        (["[0, ..., 1:3]"], ARRAY[0, ..., 1:3]),
        (["reshape(6, 4)"], ARRAY.reshape(6, 4)),
        (["reshape(-1)"], ARRAY.reshape(-1)),
        (["reshape(2, -1, 2)"], ARRAY.reshape(2, -1, 2)),
        (["reshape(H, K*3)"], ARRAY.reshape(4, 6)),
        (["reshape(D//P, (r + K - 2)*1)"], ARRAY.reshape(4, 6)),
        (["permute(2, 0, 1)"], ARRAY.transpose(2, 0, 1)),
        (["permute(0, -1, 1)"], ARRAY.transpose(0, 2, 1)),
        (["reshape(2, K + 1, 2, 2)", "permute(0, 3, 1, 2)", "[:, e]", "reshape(2, -1)"], ARRAY[..., 1::2].reshape(2, 6)),
    ],
    ids=str,
)
def test_steps_are_numpys_own_with_numbers_of_the_rule_and_sizes_of_the_model(
    tmp_path: Path, steps: list[str], expected: np.ndarray[Any, Any]
) -> None:
    found = mapped(tmp_path, {"ours": "{i}.{e}", "theirs": "x", "do": steps}, "2.1", MODEL)(ARRAY)
    assert found.shape == expected.shape
    assert np.array_equal(found, expected)


def test_a_number_of_the_rule_counts_before_a_size_of_the_model_of_the_same_letter(tmp_path: Path) -> None:
    assert sizes_of(MODEL)["r"] == 6
    rule = {"ours": "w.{r}", "theirs": "x", "do": ["[r]"]}
    assert mapped(tmp_path, rule, "w.3", MODEL)(np.arange(9)) == 3


def test_the_letters_are_the_models_sizes() -> None:
    sizes = sizes_of(model_config("hybrid", mamba2_n_groups=2))
    attention = {"D": 32, "H": 4, "K": 2, "P": 8, "I": 24, "V": 61, "E": 4, "L": 12, "Q": 10, "r": 6}
    assert sizes == {**attention, "G": 2, "N": 12, "M": 4, "W": 16}


@st.composite
def steps_and_numpys(draw: st.DrawFn) -> tuple[list[str], np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Steps, an array, and what NumPy's own methods make of it."""
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)))
    array = np.arange(int(np.prod(shape))).reshape(shape)
    steps, expected = [], array
    for _ in range(draw(st.integers(1, 5))):
        kind = draw(st.sampled_from(["permute", "reshape", "index"]))
        if kind == "permute":
            axes = draw(st.permutations(range(expected.ndim)))
            steps.append(f"permute({', '.join(map(str, axes))})")
            expected = expected.transpose(axes)
        elif kind == "reshape":
            divisors = [n for n in range(1, expected.size + 1) if expected.size % n == 0]
            first = draw(st.sampled_from(divisors))
            steps.append(f"reshape({first}, -1)")
            expected = expected.reshape(first, -1)
        else:
            parts: list[Any] = []
            for length in expected.shape[: draw(st.integers(1, expected.ndim))]:
                ends = st.none() | st.integers(-length, length)
                stride = st.none() | st.sampled_from([-2, -1, 1, 2])
                parts.append(draw(st.integers(-length, length - 1) | st.builds(slice, ends, ends, stride)))
            if draw(st.booleans()):
                parts.append(Ellipsis)
            steps.append("[" + ", ".join(map(_index_text, parts)) + "]")
            expected = expected[tuple(parts)]
        if expected.ndim == 0 or expected.size == 0:
            break
    return steps, array, np.asarray(expected)


def _index_text(part: Any) -> str:
    if part is Ellipsis:
        return "..."
    if not isinstance(part, slice):
        return str(part)
    return ":".join("" if end is None else str(end) for end in (part.start, part.stop, part.step))


@given(example=steps_and_numpys())
def test_any_steps_do_what_numpys_own_do(example: tuple[list[str], np.ndarray[Any, Any], np.ndarray[Any, Any]]) -> None:
    steps, array, expected = example
    with tempfile.TemporaryDirectory() as folder:
        found = mapped(Path(folder), {"ours": "a", "theirs": "b", "do": steps}, "a")(array)
    assert found.shape == expected.shape
    assert np.array_equal(found, expected)


@given(
    n=st.integers(0, 99),
    m=st.integers(0, 99),
    operation=st.sampled_from(["+", "-", "*", "//"]),
    sign=st.sampled_from(["", "-"]),
)
def test_arithmetic_in_steps_is_pythons(n: int, m: int, operation: str, sign: str) -> None:
    expression = f"{sign}(D {operation} (i + {m + 1}))"
    expected = eval(expression, {"D": 1000, "i": n})
    found = Mapped("a", (f"[{expression}:]",), {"D": 1000, "i": n})
    line = np.arange(200_000)
    assert np.array_equal(found(line), line[expected:])


def test_where_no_numbers_have_to_move_none_is_copied(tmp_path: Path) -> None:
    array = np.zeros((4, 6, 8))
    found = mapped(tmp_path, {"ours": "a", "theirs": "b", "do": ["[1:, :3]", "permute(2, 0, 1)", "[0]"]}, "a")(array)
    assert np.shares_memory(found, array)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "problem"),
    [
        ({"ours": "a.{i}"}, "expected `ours` and `theirs`, and perhaps `do`, found {'ours': 'a.{i}'}"),
        ({"theirs": "b"}, "expected `ours` and `theirs`, and perhaps `do`, found {'theirs': 'b'}"),
        ({"ours": "a", "theirs": "b", "then": "c"}, "expected `ours` and `theirs`, and perhaps `do`, found {'ours': 'a', "),
        ({"ours": "a.{i}.{i}", "theirs": "b"}, "(a.{i}.{i}): redefinition of group name 'i'"),
        ({"ours": "a.{I}", "theirs": "b"}, "(a.{I}): a number is one small letter in braces, such as {i}"),
        ({"ours": "a.{ij}", "theirs": "b"}, "(a.{ij}): a number is one small letter in braces, such as {i}"),
        ({"ours": "a.{i", "theirs": "b"}, "(a.{i): a number is one small letter in braces, such as {i}"),
        ({"ours": "a.{i}", "theirs": "b.{j}"}, "(a.{i}): 'j'"),
        ({"ours": "a.{i}", "theirs": "b.{}"}, "(a.{i}): Replacement index 0 out of range"),
        ({"ours": "a.{i}", "theirs": "b.{i"}, "(a.{i}): expected '}' before end of string"),
        ({"ours": "a", "theirs": "b", "do": "[0]"}, "(a): `do` is a list of steps, found [0]"),
        *(
            (
                {"ours": "a", "theirs": "b", "do": [step]},
                f"(a): {step} is neither an index [...] nor reshape(...) nor permute(",
            )
            for step in ("flip(0)", "x[0]", "[0][1]", "[0].T", "reshape(2)[0]", "1", "a.reshape(2)", "reshape(2, order=1)")
        ),
        ({"ours": "a", "theirs": "b", "do": ["[0]", "reshape(2"]}, "(a): '(' was never closed"),
        ({"ours": "a", "theirs": "b", "do": ["[0"]}, "(a): '[' was never closed"),
        ({"ours": "a", "theirs": "b", "do": ["[0]; x"]}, "(a): invalid syntax"),
        ({"ours": "a", "theirs": "b", "do": [""]}, "(a): invalid syntax"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_rule_that_cannot_be_understood_is_refused_with_its_file_and_number(
    tmp_path: Path, rule: Rule, problem: str
) -> None:
    path = written(tmp_path, {"ours": "fine", "theirs": "fine"}, rule)
    with pytest.raises(TraceError) as caught:
        load_map(path)
    assert str(caught.value).startswith(f"{path}: rule 2")
    assert problem in str(caught.value)


@pytest.mark.parametrize("text", ["", "- a", "rules: []", "names:", "names: text", "names: {a: b}"])
def test_a_file_without_a_list_of_rules_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "map.yaml"
    path.write_text(text, encoding="utf-8")
    wanted = f"{path}: a map of names has a list `names` of rules with `ours` and `theirs`"
    with pytest.raises(TraceError, match=f"^{re.escape(wanted)}$"):
        load_map(path)


def test_a_rule_that_is_no_mapping_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "map.yaml"
    path.write_text("names: [text]", encoding="utf-8")
    with pytest.raises(TraceError, match=re.escape(f"{path}: rule 1: expected `ours` and `theirs`") + ".*found text$"):
        load_map(path)


def test_a_key_given_twice_is_refused_with_its_lines(tmp_path: Path) -> None:
    path = tmp_path / "map.yaml"
    path.write_text("names:\n- ours: a\n  theirs: b\n  ours: c\n", encoding="utf-8")
    with pytest.raises(TraceError, match=re.escape(f"{path}:2: ours: given twice, on lines 2 and 4; keep one")):
        load_map(path)


def test_what_is_no_yaml_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "map.yaml"
    path.write_text("names:\n- ours: [\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=re.escape(f"{path}:3: not valid YAML")):
        load_map(path)


def test_an_unknown_map_is_refused_with_the_names_of_those_there_are() -> None:
    with pytest.raises(TraceError, match=r"^hf-lama: no such map; shipped are hf-.*hf-llama.*"):
        load_map("hf-lama")


@pytest.mark.parametrize(
    ("step", "problem"),
    [
        ("[5]", "index 5 is out of bounds for axis 0 with size 4"),
        ("[0, 0, 0]", "too many indices for array"),
        ("[1.5]", "1.5 is not a whole number"),
        ("[True]", "True is not a whole number"),
        ("[[0, 1]]", "[0, 1] is not a whole number"),
        ("[None]", "None is not a whole number"),
        ("[2**2]", "2 ** 2 is not a whole number"),
        ("[+1]", "+1 is not a whole number"),
        ("[H/2]", "H / 2 is not a whole number"),
        ("[H // (K - K)]", "integer division or modulo by zero"),
        ("[abs(1)]", "abs(1) is not a whole number"),
        ("[Z]", "Z is neither a number of the rule nor a size of the model"),
        ("[::0]", "slice step cannot be zero"),
        ("reshape(5, 2)", "cannot reshape array of size 12 into shape (5,2)"),
        ("reshape(*H)", "*H is not a whole number"),
        ("permute(0)", "axes don't match array"),
        ("permute(0, 0)", "repeated axis in transpose"),
    ],
)
def test_a_step_that_does_not_fit_says_whose_array_has_which_shape_and_why(tmp_path: Path, step: str, problem: str) -> None:
    found = mapped(tmp_path, {"ours": "a.{i}", "theirs": "b.{i}", "do": ["[0]", step]}, "a.7.grad", MODEL)
    with pytest.raises(TraceError) as caught:
        found(np.zeros((2, 4, 3)))
    assert str(caught.value).startswith(f"b.7.grad [4, 3]: the map's {step} does not fit it (")
    assert problem in str(caught.value)


def test_sizes_of_the_model_are_not_known_without_a_model(tmp_path: Path) -> None:
    found = mapped(tmp_path, {"ours": "a", "theirs": "b", "do": ["reshape(H, -1)"]}, "a")
    with pytest.raises(TraceError, match="H is neither a number of the rule nor a size of the model"):
        found(np.zeros((2, 4)))


# --- the shipped maps -------------------------------------------------------------------------------------------------

SHIPPED = sorted(shipped_maps())


@functools.cache
def our_paths() -> frozenset[str]:
    """The paths of all names in traces of all architectures."""
    paths: set[str] = set()
    with tempfile.TemporaryDirectory() as folder:
        for architecture in NAMES:
            trainer = TrainerConfig(learning_rate=1e-3, batch_size=2, load_balance_alpha=0.1, target_device="cpu")
            config = Config(model=model_config(architecture), trainer=trainer)
            path = Path(folder, f"{architecture}.safetensors")
            record(config, path, batches=[batch(0, (2, 6))])
            paths |= {parse(name).path for name in Trace(path).records}
    return frozenset(paths)


def test_the_shipped_maps_are_these_and_load_by_name_with_any_model() -> None:
    assert SHIPPED == ["hf-deepseek-mla", "hf-llama", "hf-mamba", "hf-mamba2", "hf-mixtral", "hf-moe-shared"]
    for name in SHIPPED:
        for architecture in ARCHITECTURES:
            assert isinstance(load_map(name, model_config(architecture)), NameMap)
        assert isinstance(load_map(name), NameMap)


def test_a_shipped_map_is_also_a_file_that_can_be_copied(tmp_path: Path) -> None:
    copy = tmp_path / "mine.yaml"
    copy.write_text(shipped_maps()["hf-llama"].read_text(encoding="utf-8"), encoding="utf-8")
    assert load_map(copy)["logits"] == load_map("hf-llama")["logits"] == Mapped("lm_head.output")


@pytest.mark.parametrize("name", SHIPPED)
def test_every_rule_of_a_shipped_map_is_the_first_that_fits_some_real_name_of_ours(name: str, tmp_path: Path) -> None:
    rules = read_yaml(read_text(shipped_maps()[name]), name).data["names"]
    numbered = [{"ours": rule["ours"], "theirs": f"rule {number}"} for number, rule in enumerate(rules)]
    names = load_map(written(tmp_path, *numbered))
    used = {names[path].name for path in our_paths()}
    assert [rule["ours"] for rule in numbered if rule["theirs"] not in used] == []


@pytest.mark.parametrize("name", SHIPPED)
def test_no_two_of_our_names_are_the_same_numbers_of_theirs(name: str) -> None:
    names = load_map(name, MODEL)
    seen: dict[tuple[Any, ...], str] = {}
    for path in sorted(our_paths()):
        found = names[path]
        if found.name != path:
            key = found.name, found.steps, *(found.values.get(letter) for letter in "ie")
            assert key not in seen, (path, seen.get(key))
            seen[key] = path


#: The architecture that each map is for.
MEANT_FOR = {
    "hf-deepseek-mla": "mla_norm",
    "hf-llama": "llama",
    "hf-mamba": "mamba1",
    "hf-mamba2": "mamba2_groups",
    "hf-mixtral": "moe",
    "hf-moe-shared": "moe",
}


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_map_has_a_rule_for_every_parameter_of_the_models_it_is_for(name: str) -> None:
    changes = {"shared_expert_enabled": True} if name == "hf-moe-shared" else {}
    config = model_config(MEANT_FOR[name], **changes)
    names = load_map(name, config)
    parameters = [parameter for parameter, _ in LanguageModel(config, seed=None).named_parameters()]
    unchanged = [parameter for parameter in parameters if names[parameter].name == parameter]
    assert unchanged == ["lm_head.weight"]  # which all of them call so


def test_the_map_of_latent_attention_takes_the_parts_of_every_head_apart() -> None:
    """In numbers small enough to be written down: 2 heads of [nope | rope] rows, pairs that turn side by side in theirs."""
    sizes = {"hidden_size": 4, "num_heads": 2, "kv_latent_dim": 1, "q_latent_dim": 1, "d_rope": 4, "num_layers": 1}
    names = load_map("hf-deepseek-mla", model_config("mla", **sizes))
    rows = np.arange(2 * (2 + 4))[:, None] * 10 + np.arange(1 + 4)  # row 10 n, column + m; P = 2, r = 4, Q = 1, D = 4
    w_uq = names["layers.0.self_attn.w_uq.weight"](rows)
    assert w_uq[:, 0].tolist() == [0, 10, 60, 70]
    w_qr = names["layers.0.self_attn.w_qr.weight"](rows)
    assert w_qr[:, 0].tolist() == [21, 41, 31, 51, 81, 101, 91, 111]
    assert w_qr[0].tolist() == [21, 22, 23, 24]
    results = np.arange(2 * 3 * 12).reshape(2, 3, 12)
    w_qr_output = names["layers.0.self_attn.w_qr.output"](results)
    assert w_qr_output.shape == (6, 8)
    assert w_qr_output[0].tolist() == [2, 4, 3, 5, 8, 10, 9, 11]
