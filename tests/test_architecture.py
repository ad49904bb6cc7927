"""The house (design.md 2): who may import whom, what it may cost to import, and how large it may grow."""

from __future__ import annotations

import ast
import importlib.metadata
import io
import re
import subprocess
import sys
import time
import tokenize
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import tiny

import oxidizr_ref
from oxidizr_ref.config import bundled_config_names, load_config

PACKAGE = tiny.PACKAGE
BESIDE = "beside"

#: Every module (or package) and its floor. A new file must be given its place here.
FLOORS: dict[str, int | str] = {
    "version": 0,
    "errors": 0,
    "backend": 0,
    "kernels": 0,
    "loss_scale": 0,
    "optim_kernels": 0,
    "sums": 0,
    "transfers": 0,
    "parallel": 0,
    "pictured": 0,
    "rng": 0,
    "config": 0,
    "config_keys": 0,
    "config_yaml": 0,
    "data_facts": 0,
    "data_marks": 0,
    "tokenizers": 0,
    "tokenizer_libraries": 0,
    "token_files": 0,
    "watch": 0,
    "fingerprint": 0,
    "chat": 0,
    "autograd": 1,
    "ops": 2,
    "fused": 3,
    "nn": 4,
    "layers": 5,
    "model": 6,
    "beginning": 7,
    "bench": 7,
    "evaluation": 7,
    "generation": 7,
    "interop": 7,
    "prepare": 7,
    "report": 7,
    "memory": 7,
    "memory_now": 7,
    "run": 7,
    "sampling": 7,
    "signals": 7,
    "step_metrics": 7,
    "text_stream": 7,
    "trace": 7,
    "trainer": 7,
    "cli": 8,
    "__main__": 8,
    "pytest_plugin": 8,
    "batch_loader": BESIDE,
    "data": BESIDE,
    "optim": BESIDE,
    "checkpoint": BESIDE,
}
#: On the floors whose files stand side by side, those that the others may lean on.
SHARED_ON_FLOOR = {"fused": {"fused.register", "fused.chunked_scan", "fused.rows"}, "layers": {"layers.state_space"}}

#: Outside packages, by where they may be imported.
EVERYWHERE = {"numpy", "ml_dtypes", "safetensors"}
ONLY_IN = {
    "yaml": {"config_yaml", "config"},
    "pydantic": {"config", "config_keys"},
    "threadpoolctl": {"parallel"},
    "typer": {"cli"},
    "rich": {"cli"},
    "click": {"cli"},
    "pytest": {"pytest_plugin"},
    "tokenizers": {"tokenizer_libraries", "prepare"},
    "splintr": {"tokenizer_libraries"},
    "zstandard": {"prepare"},
    "huggingface_hub": {"interop", "prepare"},
}

MOST_LINES = 400
LONGER_FILES = {"ops.py": (470, "the primitives are read as one table, forward above backward")}

#: Where code computes with arrays that may live on a device.
COMPUTING = {
    *("backend", "kernels", "sums", "transfers", "parallel", "autograd", "ops", "fused", "nn", "layers", "model"),
    *("optim", "optim_kernels", "loss_scale", "step_metrics", "trainer", "evaluation", "generation"),
}

#: Calls of NumPy itself in code whose arrays may live on a device: none of them touches such an array.
HOST_CALLS = {
    "backend.py": {"asarray": "what lives on the host already", "dtype": "a type"},
    "kernels.py": {"int64": "a Python number on its way to a kernel", "dtype": "a type"},
    "transfers.py": {"asarray": "what lives on the host already", "frombuffer": "page-locked memory of the host"},
    "sums.py": {
        **dict.fromkeys(("argsort", "append", "flatnonzero", "ones", "concatenate"), "ids and their order, on the host"),
        "add.reduceat": "the host's sum, where a device has a kernel",
    },
    "ops.py": {"argsort": "an order of axes", "arange": "ids, on the host"},
    "optim.py": {
        **dict.fromkeys(("dot", "divide", "isfinite", "sqrt", "uint32", "where"), "the host's update, norm and rounding"),
        "dtype": "a type",
    },
    "trainer.py": {
        "errstate": "how the host's ufuncs tell of what overflows",
        "count_nonzero": "targets, on the host",
    },
    "evaluation.py": {
        **dict.fromkeys(("array", "full", "empty", "concatenate"), "tokens and scores, on the host"),
        **dict.fromkeys(("flatnonzero", "divmod", "isin", "count_nonzero", "quantile"), "places and counts, on the host"),
        **dict.fromkeys(("arange", "exp", "log", "take_along_axis", "where"), "of logits that were sent to the host"),
    },
    "generation.py": dict.fromkeys(("array", "empty", "flatnonzero", "stack", "zeros"), "tokens, on the host"),
    "model.py": {"flatnonzero": "the targets that are learned, on the host"},
    "autograd.py": {"asarray": "a Python number or list becomes a host tensor"},
    "nn.py": {
        "empty": "the place of a parameter before it is filled",
        "full": "first values are made on the host",
        "prod": "a product of lengths of axes",
        "asarray": "tokens given as a list",
    },
    "layers/feed_forward.py": {
        "argsort": "who goes where is decided on the host, from the logits sent there",
        "bincount": "how many tokens each expert gets decides on the host what runs",
        "sum": "counts of tokens, on the host for the log",
    },
    "layers/documents.py": dict.fromkeys(
        ("arange", "ceil", "diff", "empty", "flatnonzero", "left_shift", "log2", "minimum", "unique"),
        "where documents begin and how long they are, on the host",
    ),
    "layers/mamba1.py": dict.fromkeys(("arange", "broadcast_to", "log"), "first values are made on the host"),
    "layers/mamba2.py": {"log": "first values are made on the host"},
    "layers/state_space.py": {
        **dict.fromkeys(("exp", "expm1", "log", "maximum"), "first values are made on the host"),
        "prod": "a product of lengths of axes",
    },
    "fused/chunked_scan.py": dict.fromkeys(("ones", "tril"), "the causal mask is made on the host, once"),
    "fused/attention.py": {
        "tril": "the causal mask is made on the host, once",
        "ones": "the causal mask is made on the host, once",
        "where": "the causal mask is made on the host, once",
    },
    "fused/rope.py": {
        "arange": "the tables of angles are made on the host, once",
        "outer": "the tables of angles are made on the host, once",
        "concatenate": "the tables of angles are made on the host, once",
        "cos": "the tables of angles are made on the host, once",
        "sin": "the tables of angles are made on the host, once",
        "stack": "the tables of angles are made on the host, once",
    },
}


@cache
def sources() -> dict[str, Path]:
    """All modules of the package by their name inside it (``fused.rope``; a package by its own name)."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name:
            found[name] = path
    return found


@cache
def imports_of(path: Path) -> frozenset[str]:
    """Every module a file imports, at its top or inside a function; those for the type checker alone are left out."""

    def walk(node: ast.AST) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                for branch in child.orelse:
                    yield from walk(branch)
            elif isinstance(child, ast.Import):
                yield from (alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path}: relative import"
                yield from _modules_meant(child)
            else:
                yield from walk(child)

    return frozenset(walk(ast.parse(path.read_text(encoding="utf-8"))))


def _modules_meant(node: ast.ImportFrom) -> Iterator[str]:
    """``from oxidizr_ref import rng`` means oxidizr_ref.rng; ``from oxidizr_ref.rng import words`` too."""
    assert node.module is not None
    for alias in node.names:
        inner = f"{node.module}.{alias.name}".removeprefix("oxidizr_ref.")
        yield f"oxidizr_ref.{inner}" if inner in sources() else node.module


def inside(path: Path) -> set[str]:
    return {name.removeprefix("oxidizr_ref.") for name in imports_of(path) if name.startswith("oxidizr_ref.")}


def floor(name: str) -> int | str:
    return FLOORS[name.partition(".")[0]]


def home(name: str) -> str:
    return name.partition(".")[0]


# -------------------------------------------------------------------------------------------------------------- floors


def test_every_file_has_its_floor_and_every_floor_its_file() -> None:
    assert {home(name) for name in sources()} == set(FLOORS)


@pytest.mark.parametrize("name", sorted(sources()))
def test_imports_go_downward_only(name: str) -> None:
    own = floor(name)
    for other in inside(sources()[name]):
        theirs = floor(other)
        if home(other) == home(name):
            allowed = home(name) not in SHARED_ON_FLOOR or other in SHARED_ON_FLOOR[home(name)]
        elif own == BESIDE:
            allowed = theirs == 0
        elif theirs == BESIDE:
            allowed = isinstance(own, int) and own >= 7
        else:
            assert isinstance(own, int) and isinstance(theirs, int)
            allowed = theirs < own or (theirs == own and own in (0, 7, 8))
        assert allowed, f"{name} (floor {own}) imports {other} (floor {theirs})"


def test_no_import_goes_in_a_circle() -> None:
    graph = {name: inside(path) - {name} for name, path in sources().items()}
    TopologicalSorter(graph).prepare()


def test_nothing_below_the_command_line_imports_the_package_as_a_whole() -> None:
    for name, path in sources().items():
        if home(name) != "cli":
            assert "oxidizr_ref" not in imports_of(path), name


@pytest.mark.parametrize("name", sorted(sources()))
def test_outside_packages_stay_where_they_belong(name: str) -> None:
    outside = {found.partition(".")[0] for found in imports_of(sources()[name])} - {"oxidizr_ref", *sys.stdlib_module_names}
    for package in outside - EVERYWHERE:
        assert home(name) in ONLY_IN.get(package, ()), f"{name} imports {package}"


def test_cupy_is_imported_lazily_and_by_the_backend_alone() -> None:
    for name, path in sources().items():
        assert not any(found.partition(".")[0] in ("cupy", "cupyx") for found in imports_of(path)), name
        assert ('"cupy"' in path.read_text(encoding="utf-8")) <= (name == "backend"), name


def test_no_numpy_function_is_called_on_arrays_that_may_live_on_a_device() -> None:
    found: dict[str, set[str]] = {}
    for name, path in sources().items():
        if home(name) in COMPUTING:
            calls = (
                node.func for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)
            )
            numpy = {match[1] for call in calls if (match := re.fullmatch(r"(?:np|numpy)\.([\w.]+)", ast.unparse(call)))}
            if numpy:
                found[path.relative_to(PACKAGE).as_posix()] = numpy
    assert found == {file: set(reasons) for file, reasons in HOST_CALLS.items()}


# ---------------------------------------------------------------------------------------------------------------- size


def lines_of(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


@pytest.mark.parametrize("name", sorted(sources()))
def test_no_file_is_longer_than_can_be_read(name: str) -> None:
    path = sources()[name]
    most, _ = LONGER_FILES.get(path.name, (MOST_LINES, ""))
    assert lines_of(path) <= most


def lines_of_code(path: Path) -> int:
    """Lines that do something: docstrings, comments and blank lines cost the reader no time, they save it."""
    source = path.read_text(encoding="utf-8")
    silent = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    tokens = [token for token in tokenize.generate_tokens(io.StringIO(source).readline) if token.type not in silent]
    lines = {line for token in tokens for line in range(token.start[0], token.end[0] + 1)}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            lines -= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    return len(lines)


def lines_for_cuda(path: Path) -> int:
    """Lines that only a device needs: kernel sources, and the classes that call them. The host's code says the same."""
    tree, lines = ast.parse(path.read_text(encoding="utf-8")), set[int]()
    for node in tree.body:
        kernel = isinstance(node, ast.Assign) and ("Kernel(" in ast.unparse(node.value) or "__device__" in ast.unparse(node))
        source = isinstance(node, ast.Assign) and "__global__" in ast.unparse(node)
        calls = isinstance(node, ast.ClassDef) and any(".on_device" in ast.unparse(d) for d in node.decorator_list)
        if kernel or source or calls:
            lines |= set(range(node.lineno, (node.end_lineno or 0) + 1))
    text = path.read_text(encoding="utf-8").splitlines()
    return sum(1 for number in lines if text[number - 1].strip())


#: Files that nobody passes who trains on a CPU.
CUDA_FILES = {"kernels", "optim_kernels", "loss_scale"}


#: Where text becomes windows of tokens: `data` stands beside the floors, and these are its files.
DATA_FILES = {"tokenizers", "tokenizer_libraries", "token_files", "data_marks", "data_facts"}


def on_the_way_to_a_checkpoint() -> set[str]:
    """All that training imports: what a reader passes on the way from a command to the bytes of a checkpoint."""
    found: set[str] = set()
    coming = ["trainer"]
    while coming:
        name = coming.pop()
        if name in sources() and name not in found:
            found.add(name)
            coming += [*inside(sources()[name]), home(name)]
    return found


def test_the_floors_fit_within_4500_lines_of_code() -> None:
    """On the way from a command to the bytes of a checkpoint on a CPU; what only a device needs is counted by itself."""
    way = {name for name in on_the_way_to_a_checkpoint() if floor(name) != BESIDE} - CUDA_FILES - DATA_FILES
    assert sum(lines_of_code(sources()[name]) - lines_for_cuda(sources()[name]) for name in way) <= 4500


@pytest.mark.parametrize(("package", "most"), [("trace", 1800), ("interop", 2200), ("prepare", 1000), ("report", 900)])
def test_what_stands_off_that_way_stays_small(package: str, most: int) -> None:
    names = {name for name in sources() if home(name) == package}
    assert not names & on_the_way_to_a_checkpoint()
    assert sum(lines_of_code(sources()[name]) for name in names) <= most


def test_what_only_a_device_needs_fits_within_1200_lines() -> None:
    whole = sum(lines_of_code(sources()[name]) for name in CUDA_FILES)
    assert whole + sum(lines_for_cuda(path) for name, path in sources().items() if name not in CUDA_FILES) <= 1200


def test_there_is_no_drawer_for_odds_and_ends() -> None:
    vague = re.compile(r"utils?|helpers?|common|misc|tools?")
    assert [path for path in PACKAGE.rglob("*") if vague.fullmatch(path.stem)] == []


def test_every_file_says_what_it_is() -> None:
    for name, path in sources().items():
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), name


# -------------------------------------------------------------------------------------------------------------- import


def modules_after(statement: str) -> set[str]:
    program = f"import sys; {statement}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=tiny.environment()
    )
    return {name.partition(".")[0] for name in done.stdout.split()}


def test_the_bare_import_takes_less_than_300_ms_and_loads_no_library() -> None:
    assert modules_after("import oxidizr_ref").isdisjoint({"numpy", "typer", "rich", "click", "pydantic", "yaml", "cupy"})
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import oxidizr_ref"], check=True, env=tiny.environment())
        seconds.append(time.perf_counter() - began)
    assert min(seconds) < 0.3


def test_no_public_name_loads_the_command_line_s_libraries() -> None:
    statement = f"from oxidizr_ref import {', '.join(name for name in oxidizr_ref.__all__ if name != '__version__')}"
    assert modules_after(statement).isdisjoint({"typer", "rich", "click", "cupy", "torch", "transformers"})


def test_the_public_names_are_those_of_the_contract() -> None:
    contract = {"load_config", "LanguageModel", "Tensor", "no_grad", "reference", "AdamW", "Trainer", "checkpoint"}
    assert contract <= set(oxidizr_ref.__all__)
    for name in oxidizr_ref.__all__:
        assert getattr(oxidizr_ref, name) is not None
    assert {"save", "load", "verify"} <= set(dir(oxidizr_ref.checkpoint))
    with pytest.raises(AttributeError, match="nothing_like_it"):
        _ = oxidizr_ref.nothing_like_it


# ------------------------------------------------------------------------------------------------------------- package


def test_the_version_is_told_once() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", oxidizr_ref.__version__)
    assert importlib.metadata.version("oxidizr-ref") == oxidizr_ref.__version__


def test_types_ship_with_the_package() -> None:
    assert (PACKAGE / "py.typed").is_file()


@pytest.mark.parametrize("name", bundled_config_names())
def test_every_bundled_model_loads(name: str) -> None:
    assert load_config(name).model.name == name
    assert {path.stem for path in (tiny.REPOSITORY / "models").glob("*.yaml")} == set(bundled_config_names())
