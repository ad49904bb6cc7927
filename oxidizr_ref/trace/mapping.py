"""Other programs' names for our values: rules in a YAML file, ours on the left, what to do with theirs on the right.

A file has a list ``names`` of rules such as::

    - ours: layers.{i}.moe.experts.{e}.gate_proj.weight
      theirs: model.layers.{i}.block_sparse_moe.input_linear.weight
      do: ["[e, :I]"]

``{…}`` stands for a number. The first rule whose ``ours`` fits a path counts (names without prefix and end, see `names`;
theirs get the same ones); without a rule the names are equal. ``do`` turns their array into ours: an index as in NumPy,
``reshape(…)`` or ``permute(…)``, one after the other. In it stand the rule's numbers, and the sizes of the model by the
letters of `sizes_of`.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from oxidizr_ref.config import ModelConfig
from oxidizr_ref.config_yaml import read_text, read_yaml
from oxidizr_ref.errors import TraceError
from oxidizr_ref.trace.names import parse

HostArray = np.ndarray[Any, Any]

_OPERATIONS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
}


@dataclass(frozen=True)
class Rule:
    """One rule: a pattern of our paths, a template of theirs, and the steps from their array to ours."""

    ours: re.Pattern[str]
    theirs: str
    steps: tuple[str, ...] = ()


@dataclass(frozen=True)
class Mapped:
    """Where another program has one of our values: under which name, and how its array becomes ours."""

    name: str
    steps: tuple[str, ...] = ()
    values: Mapping[str, int] = field(default_factory=dict)

    def __call__(self, array: HostArray) -> HostArray:
        """Their array as ours, mostly a view. Raises TraceError where the steps do not fit its shape."""
        for step in self.steps:
            try:
                array = _apply(step, array, self.values)
            except (ValueError, IndexError, TypeError, ArithmeticError) as error:
                raise TraceError(f"{self.name} {list(array.shape)}: the map's {step} does not fit it ({error})") from error
        return array


class NameMap:
    """The rules of one file, for a model of some sizes."""

    def __init__(self, rules: list[Rule], sizes: Mapping[str, int]) -> None:
        self._rules, self._sizes = rules, sizes

    def __getitem__(self, ours: str) -> Mapped:
        """Where the other program has our value of this name."""
        name = parse(ours)
        for rule in self._rules:
            match = rule.ours.fullmatch(name.path)
            if match:
                numbers = {key: int(text) for key, text in match.groupdict().items()}
                theirs = name._replace(path=rule.theirs.format(**numbers))
                return Mapped(str(theirs), rule.steps, {**self._sizes, **numbers})
        return Mapped(str(name))


def shipped_maps() -> dict[str, Path]:
    """The maps that come with the package, by name."""
    return {path.stem: path for path in sorted(Path(__file__).with_name("maps").glob("*.yaml"))}


def load_map(path: str | Path, model: ModelConfig | None = None) -> NameMap:
    """The map in a file, or a shipped one by its name. Raises TraceError or ConfigError
    saying what is wrong where."""
    file = Path(path)
    if not file.exists():
        shipped = shipped_maps()
        if str(path) not in shipped:
            raise TraceError(f"{path}: no such map; shipped are {', '.join(shipped)}")
        file = shipped[str(path)]
    document = read_yaml(read_text(file), str(file))
    for location, problem in document.problems:
        raise TraceError(f"{document.place(location)}: {location[-1]}: {problem}")
    data = document.data
    if not isinstance(data, dict) or not isinstance(data.get("names"), list):
        raise TraceError(f"{file}: a map of names has a list `names` of rules with `ours` and `theirs`")
    rules = [_rule(item, f"{file}: rule {number}") for number, item in enumerate(data["names"], 1)]
    return NameMap(rules, sizes_of(model) if model is not None else {})


def _rule(item: Any, where: str) -> Rule:
    if not isinstance(item, dict) or not {"ours", "theirs"} <= item.keys() <= {"ours", "theirs", "do"}:
        raise TraceError(f"{where}: expected `ours` and `theirs`, and perhaps `do`, found {item}")
    if not isinstance(item.get("do", []), list):
        raise TraceError(f"{where} ({item['ours']}): `do` is a list of steps, found {item['do']}")
    pattern = re.sub(r"\\\{([a-z])\\\}", r"(?P<\1>[0-9]+)", re.escape(str(item["ours"])))
    if "{" in pattern or "}" in pattern:
        raise TraceError(f"{where} ({item['ours']}): a number is one small letter in braces, such as {{i}}")
    try:
        ours, steps = re.compile(pattern), tuple(str(step) for step in item.get("do", []))
        str(item["theirs"]).format(**dict.fromkeys(ours.groupindex, 0))
        for step in steps:
            _parsed(step)
    except (re.error, KeyError, IndexError, ValueError, SyntaxError) as error:
        raise TraceError(f"{where} ({item['ours']}): {error}") from error
    return Rule(ours, str(item["theirs"]), steps)


def sizes_of(m: ModelConfig) -> dict[str, int]:
    """The sizes of a model by the letters that stand for them in maps."""
    # D hidden, H heads, K key/value heads, I intermediate, V vocabulary; P width of a head, E experts, L and Q latents, r
    # rotated width of a head; of Mamba2 and 3: G groups, N states, M heads, W width of a head.
    letters = {"D": m.hidden_size, "H": m.num_heads, "K": m.kv_heads, "I": m.intermediate_size, "V": m.vocab_size}
    letters |= {"P": m.head_dim, "E": m.num_experts, "L": m.kv_latent_dim, "Q": m.q_latent_dim, "r": m.d_rope}
    return letters | {"G": m.mamba2_n_groups, "N": m.mamba2_state_size, "M": m.mamba2_num_heads, "W": m.mamba2_head_dim}


@cache
def _parsed(step: str) -> ast.expr:
    """``[…]``, ``reshape(…)`` or ``permute(…)``, taken apart. Raises SyntaxError or ValueError for anything else."""
    tree = ast.parse(f"x{step}" if step.startswith("[") else step, mode="eval").body
    is_index = isinstance(tree, ast.Subscript) and isinstance(tree.value, ast.Name) and step.startswith("[")
    is_call = isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name) and tree.func.id in ("reshape", "permute")
    if not (is_index or (is_call and not getattr(tree, "keywords", None))):
        raise ValueError(f"{step} is neither an index [...] nor reshape(...) nor permute(...)")
    return tree


def _apply(step: str, array: HostArray, values: Mapping[str, int]) -> HostArray:
    tree = _parsed(step)
    if isinstance(tree, ast.Subscript):
        parts = tree.slice.elts if isinstance(tree.slice, ast.Tuple) else [tree.slice]
        part: HostArray = array[tuple(_index(node, values) for node in parts)]
        return part
    assert isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name)
    numbers = [_number(node, values) for node in tree.args]
    return array.reshape(numbers) if tree.func.id == "reshape" else array.transpose(numbers)


def _index(node: ast.expr, values: Mapping[str, int]) -> Any:
    if isinstance(node, ast.Constant) and node.value is Ellipsis:
        return Ellipsis
    if isinstance(node, ast.Slice):
        return slice(*(None if end is None else _number(end, values) for end in (node.lower, node.upper, node.step)))
    return _number(node, values)


def _number(node: ast.expr, values: Mapping[str, int]) -> int:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.Name):
        if node.id not in values:
            raise ValueError(f"{node.id} is neither a number of the rule nor a size of the model")
        return values[node.id]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_number(node.operand, values)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        return _OPERATIONS[type(node.op)](_number(node.left, values), _number(node.right, values))
    raise ValueError(f"{ast.unparse(node)} is not a whole number")
