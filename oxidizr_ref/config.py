"""The configuration of a run: what it is, which part of it determines the bits, and how it is read.

`config_keys.py` has the keys and their constraints, `config_yaml.py` the strict YAML underneath. `load_config` reports
everything that is wrong with a file at once, a line each. `Config.canonical` is the part of a config that determines
the bits of a checkpoint: all defaults filled, nothing operational, no paths.

From top to bottom: the config, its canonical form, loading, bundled models, messages.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import PrivateAttr, ValidationError

from oxidizr_ref.config_keys import (
    BrokenConstraintsError,
    DataConfig,
    ModelConfig,
    Section,
    TrainerConfig,
    Violation,
    violations_among,
)
from oxidizr_ref.config_yaml import Document, Location, Place, found, one_line, read_text, read_yaml, scalar
from oxidizr_ref.errors import ConfigError

__all__ = [
    "OPERATIONAL_KEYS",
    "Config",
    "DataConfig",
    "ModelConfig",
    "TrainerConfig",
    "bundled_config_names",
    "bundled_config_path",
    "canonical_json",
    "config_differences",
    "load_config",
    "with_younger_keys",
]

_SECTIONS: dict[str, type[Section]] = {"model": ModelConfig, "trainer": TrainerConfig, "data": DataConfig}

#: Keys of `trainer` that change no bit of a checkpoint. (`target_device` is replaced by the device it resolved to.)
OPERATIONAL_KEYS = frozenset(
    {
        "async_save",
        "beta_kl",
        "checkpoint_dir",
        "eval_interval",
        "group_size",
        "keep_best",
        "keep_every",
        "log_interval",
        "max_checkpoints",
        "save_interval",
        "target_device",
    }
)


class Config(Section):
    """A validated configuration: what `load_config` returns. Immutable."""

    model: ModelConfig
    trainer: TrainerConfig
    data: DataConfig = DataConfig()

    _source: Path | None = PrivateAttr(default=None)
    _data_root: Path = PrivateAttr(default=Path())
    _tokenizer_root: Path = PrivateAttr(default=Path())

    @property
    def source(self) -> Path | None:
        """The file this was read from; None when it was made in Python or came out of a checkpoint."""
        return self._source

    def data_paths(self) -> list[Path]:
        """The data files, in order; empty for the bundled corpus and for random tokens (``data.is_random``).

        Relative paths start at the config file's directory, those of an override at the current directory.
        """
        return [] if self.data.is_random else [self._data_root / path for path in self.data.path]

    def tokenizer_name(self) -> str:
        """`data.tokenizer`; the path of a ``.json`` as it is from the current directory."""
        name = self.data.tokenizer
        return str(self._tokenizer_root / name) if name.endswith(".json") else name

    def canonical(self, device: str = "cpu") -> dict[str, Any]:
        """What determines the bits of a checkpoint, as JSON-able data: all defaults filled, no paths, no names.

        ``device`` is the one that ``target_device`` resolved to. The length of the run counts only where the learning
        rate depends on it.
        """
        trainer = self.trainer.model_dump(mode="json", exclude=set(OPERATIONAL_KEYS))
        if self.trainer.lr_schedule == "constant":
            del trainer["max_steps"], trainer["num_epochs"]
        elif self.trainer.max_steps:
            del trainer["num_epochs"]  # max_steps wins
        data = self.data.model_dump(mode="json", exclude={"path"})
        if data["tokenizer"].endswith(".json"):
            data["tokenizer"] = "tokenizer.json"  # no paths; which one it is, the tokenizer's digest says
        model = self.model.model_dump(mode="json", exclude={"name"})
        sections = {"data": data, "model": model, "trainer": trainer}
        for name, keys in _younger_keys(model).items():
            sections[name] = {k: v for k, v in sections[name].items() if k not in keys or v != keys[k]}
        return {"device": device, **sections}

    def digest(self, device: str = "cpu") -> str:
        """SHA-256 of the canonical JSON, in hexadecimal."""
        return hashlib.sha256(canonical_json(self.canonical(device)).encode("ascii")).hexdigest()

    @classmethod
    def from_canonical(
        cls, canonical: Mapping[str, Any], overrides: Sequence[str] = (), flags: Mapping[str, str] = MappingProxyType({})
    ) -> Config:
        """The config a checkpoint was made with; keys that were not stored get their defaults.

        ``overrides`` and ``flags`` as for `load_config`. Raises ConfigError when it does not validate, as when a newer
        version wrote it.
        """
        data = json.loads(canonical_json(canonical))  # a copy, in plain types
        device = data.pop("device", None)
        if device in ("cpu", "gpu") and isinstance(data.get("trainer"), dict):
            data["trainer"]["target_device"] = device
        document = Document(data, {(): Place("the checkpoint's config", 0)})
        _apply_overrides(document, overrides, flags)
        return _validated(document)


def with_younger_keys(canonical: Mapping[str, Any]) -> dict[str, Any]:
    """A canonical config with the keys that are left out of it while they say what files without them did."""
    keys = _younger_keys(canonical["model"])
    return {name: {**keys[name], **part} if name in keys else part for name, part in canonical.items()}


def _younger_keys(model: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Keys that are younger than the checkpoint format, with what files without them did.

    A canonical config leaves them out while they say that, so that such files keep the bytes they always had.
    """
    return {
        "data": {"loss_on": "all", "document_boundaries": "ignore"},
        "model": {"mla_q_rope_from": "hidden", "norm_topk_prob": model.get("experts_per_tok", 2) > 1},
        "trainer": {"optimizer_dtype": "f32"},
    }


def canonical_json(value: Any) -> str:
    """The one JSON text of a value: keys sorted, no spaces, ASCII. Raises ValueError for NaN and infinities."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=True)


def config_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Where two canonical configs differ: (dotted key, old value, new value) by key; None where one has no value."""
    flat_old, flat_new = dict(_flat(old)), dict(_flat(new))
    keys = sorted(flat_old.keys() | flat_new.keys())
    pairs = ((key, flat_old.get(key), flat_new.get(key)) for key in keys)
    return [(key, a, b) for key, a, b in pairs if canonical_json(a) != canonical_json(b)]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


# ---- loading -----------------------------------------------------------------------------------------------------


def load_config(
    source: str | Path, overrides: Sequence[str] = (), flags: Mapping[str, str] = MappingProxyType({})
) -> Config:
    """Read, override and validate a config.

    ``source`` is a path or the name of a bundled model (``nano-start``, ``models/nano-start.yaml``); a file that exists
    wins. ``overrides`` are ``KEY=VALUE``, the value in YAML, the key dotted (``trainer.learning_rate=1e-3``) or bare;
    an empty value means the default. ``flags`` are overrides by the command-line flag that messages should name
    (``{"--batch-size 0": "trainer.batch_size=0"}``); overrides come after them. Raises ConfigError, whose message has one
    line for everything that is wrong.
    """
    path = _located(source)
    document = read_yaml(read_text(path), str(path))
    if document.data is None:
        raise ConfigError(f"{path}: empty; a config has the sections `model:` and `trainer:`")
    if not isinstance(document.data, dict):
        place = document.place(())
        raise ConfigError(f"{place}: expected the sections `model:` and `trainer:`, found {found(document.data)}")
    if isinstance(document.data.get("model"), dict) and document.data["model"].get("name") is None:
        document.data["model"]["name"] = path.stem
    overridden = _apply_overrides(document, overrides, flags)
    config = _validated(document)
    config._source = path
    config._data_root = Path() if "data.path" in overridden else path.parent
    config._tokenizer_root = Path() if "data.tokenizer" in overridden else path.parent
    return config


def _apply_overrides(document: Document, overrides: Sequence[str], flags: Mapping[str, str]) -> set[str]:
    """Put flags, then overrides, into the document. Returns the dotted keys they set."""
    changed = {_apply_override(document, override, Place(one_line(flag), 0)) for flag, override in flags.items()}
    return changed | {_apply_override(document, text, Place(f"--set {one_line(text)}", 0)) for text in overrides}


def _apply_override(document: Document, override: str, place: Place) -> str:
    """Put one ``KEY=VALUE`` into the document; returns the dotted key."""
    name, equals, text = override.partition("=")
    if not equals:
        raise ConfigError(f"{place}: expected KEY=VALUE, such as trainer.learning_rate=1e-3")
    section, dot, key = name.strip().rpartition(".")
    if not dot:
        homes = [home for home, cls in _SECTIONS.items() if key in cls.model_fields]
        if len(homes) != 1:
            hint = _did_you_mean(key) if not homes else f"; which one: {', '.join(f'{h}.{key}' for h in homes)}?"
            raise ConfigError(f"{place}: {one_line(key)}: unknown key{hint}")
        section = homes[0]
    if section not in _SECTIONS:
        raise ConfigError(f"{place}: {one_line(section)}: unknown section; there are {', '.join(_SECTIONS)}")
    document.override(section, key, read_yaml(text, place.origin, numbered=False).data, place)
    return f"{section}.{key}"


def _validated(document: Document) -> Config:
    """The config in a document. Raises ConfigError with all problems of the document, in the order of its lines."""
    problems = list(document.problems)
    data = _without_unknown_keys(document.data, problems)
    try:
        config = Config.model_validate(data)
    except ValidationError as error:
        problems += _problems_of(error, data)
    if not problems:
        return config
    placed = [(document.place(location), location, message) for location, message in problems]
    placed.sort(key=lambda problem: (problem[0].line == 0, problem[0].line))  # overrides, which have no line, last
    raise ConfigError("\n".join(f"{place}: {_dotted(location)}: {message}" for place, location, message in placed))


def _without_unknown_keys(data: Mapping[str, Any], problems: list[tuple[Location, str]]) -> dict[str, Any]:
    """The data that has a meaning; what has none becomes problems, so that the rest can be checked all the same."""
    known: dict[str, Any] = {}
    for name, section in data.items():
        if name not in _SECTIONS:
            problems.append(((name,), f"unknown key{_did_you_mean(name)}"))
        elif isinstance(section, dict):
            fields = _SECTIONS[name].model_fields
            strange = [key for key in section if key not in fields]
            problems += [((name, key), f"unknown key{_did_you_mean(key, name)}") for key in strange]
            known[name] = {key: value for key, value in section.items() if key in fields}
        else:
            known[name] = section
    return known


# ---- bundled models ----------------------------------------------------------------------------------------------


def bundled_config_names() -> list[str]:
    """The names ``load_config`` knows without a file: those of the configs that come with the package, sorted."""
    return sorted(path.stem for path in _bundled_directory().glob("*.yaml"))


def bundled_config_path(name: str) -> Path | None:
    """The file of a bundled model, by any of ``NAME``, ``NAME.yaml`` and ``models/NAME.yaml``; None if there is none."""
    asked = Path(name)
    stem = asked.stem if asked.suffix in (".yaml", ".yml") else asked.name
    if asked.parent not in (Path(), Path("models")) or stem not in bundled_config_names():
        return None
    return _bundled_directory() / f"{stem}.yaml"


def _bundled_directory() -> Path:
    package = Path(__file__).resolve().parent
    installed = package / "models"
    return installed if installed.is_dir() else package.parent / "models"  # beside the package in a checkout


def _located(source: str | Path) -> Path:
    """The file that ``source`` means. Raises ConfigError, naming the bundled models, when there is none."""
    path, bundled, shown = Path(source), bundled_config_path(str(source)), one_line(str(source))
    try:
        exists = path.exists()
    except OSError as error:
        raise ConfigError(f"{shown}: cannot be read ({error.strerror})") from error
    # A directory does not hide a bundled model: runs like to leave one named after theirs.
    if bundled is not None and (not exists or path.is_dir()):
        return bundled
    if not exists:
        names = bundled_config_names()
        near = difflib.get_close_matches(path.stem, names, 1)
        hint = f"did you mean `{near[0]}`? " if near else ""
        raise ConfigError(f"{shown}: no such file; {hint}bundled models: {', '.join(names)}")
    return path


# ---- messages ----------------------------------------------------------------------------------------------------

_EXPECTED = {
    "int_type": "an integer",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "string_too_short": "text that is not empty",
    "tuple_type": "a list",
    "model_type": "a mapping of keys",
    "greater_than": "a value > {gt}",
    "greater_than_equal": "a value >= {ge}",
    "less_than": "a value < {lt}",
    "less_than_equal": "a value <= {le}",
    "literal_error": "{expected}",
}


def _problems_of(error: ValidationError, data: Mapping[str, Any]) -> list[tuple[Location, str]]:
    """Pydantic's errors in our words, and the constraints it did not come to because single keys were wrong."""
    problems: list[tuple[Location, str]] = []
    violations: dict[str, list[Violation]] = {}  # by section
    bad: set[str] = set()  # keys of the model that are wrong by themselves
    for detail in error.errors():
        location, cause = detail["loc"], detail.get("ctx", {}).get("error")
        if isinstance(cause, BrokenConstraintsError):
            violations[str(location[0])] = cause.violations
            continue
        problems.append((location, str(cause) if cause is not None else _message(dict(detail))))
        if location[0] == "model" and len(location) > 1:
            bad.add(str(location[1]))
    if bad:
        violations["model"] = violations_among(data["model"], bad)
    broken = [(name, violation) for name, several in violations.items() for violation in several]
    return problems + [((name, violation.keys[0]), violation.message) for name, violation in broken]


def _message(detail: Mapping[str, Any]) -> str:
    """What was expected and what was found, of one pydantic error; how to write it, where that is plain to see."""
    kind, value = detail["type"], detail["input"]
    if kind == "missing":
        return "missing section" if len(detail["loc"]) == 1 else "missing; it is required"
    expected = _EXPECTED.get(kind)
    if expected is None:
        return one_line(str(detail["msg"]))
    hint = ""
    if kind == "int_type" and isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        hint = f"; write {int(value)}"
    elif kind in ("int_type", "float_type") and isinstance(value, str) and type(scalar(value)) in (int, float):
        hint = "; write it without quotes"
    return f"expected {expected.format(**detail.get('ctx', {}))}, found {found(value)}{hint}"


def _dotted(location: Location) -> str:
    """``model.mamba_layers[3]`` for ("model", "mamba_layers", 3)."""
    dotted = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    return one_line(dotted.removeprefix("."))


def _did_you_mean(key: str, section: str | None = None) -> str:
    """The end of a message about an unknown key: where it belongs, or which key is spelt most like it."""
    word = key.rpartition(".")[2]
    own = list(_SECTIONS[section].model_fields) if section else list(_SECTIONS)
    elsewhere = {other: home for home, cls in _SECTIONS.items() if home != section for other in cls.model_fields}
    if word in elsewhere:
        return f"; `{word}` belongs under `{elsewhere[word]}:`"
    if near := difflib.get_close_matches(word, own, 1):
        return f"; did you mean `{near[0]}`?"
    if far := difflib.get_close_matches(word, list(elsewhere), 1):
        return f"; did you mean `{elsewhere[far[0]]}.{far[0]}`?"
    return "" if section else f"; the sections are {', '.join(_SECTIONS)}"
