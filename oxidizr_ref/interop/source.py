"""The checkpoint that is to be packed: which file is meant, and what its run says of it.

Nothing here writes. What a run says beside its step files (its config, its metrics) is read as far as it is sound, and only
of files that bear their step's name: a backup may lie beside another run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from oxidizr_ref.checkpoint import disk, format
from oxidizr_ref.checkpoint.contents import must_exist, step_files
from oxidizr_ref.checkpoint.records import Record, curve, read_records
from oxidizr_ref.checkpoint.state import RunState, from_file
from oxidizr_ref.checkpoint.store import CheckpointStore, check_name
from oxidizr_ref.config import Config
from oxidizr_ref.errors import CheckpointError, ConfigError, DamagedError, UsageError
from oxidizr_ref.interop.weight_files import sha256_of

_PUT_AWAY = ("superseded", "quarantine")
_METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class Source:
    """A checkpoint that proved whole, its optimizer state left out, and what its run says of it.

    sha256: of the whole file, as ``sha256sum`` prints it. numerics: the version of this package's numerics that made it.
    records: those of metrics.jsonl up to its step. notices: what the user should know, a line each.
    """

    path: Path
    state: RunState
    numerics: str
    sha256: str
    config: Config
    records: list[Record]
    notices: list[str] = field(default_factory=list)

    @property
    def config_digest(self) -> str:
        """SHA-256 of the config that determined the bits."""
        return str(self.state.origin()["config"])

    @property
    def machine_digest(self) -> str:
        """SHA-256 of the fingerprint of the machine class."""
        return str(self.state.origin()["fingerprint"])

    def losses(self, key: str) -> list[tuple[int, float]]:
        """Steps and the numbers that ``loss`` or ``eval_loss`` had there, ascending; one a step."""
        return curve(self.records, key)


def choose(directory: Path, wish: str) -> Source:
    """The checkpoint that ``--checkpoint`` means: ``latest``, ``final``, a step, or the path of a file.

    ``latest`` passes over damaged files, with a notice each. Raises UsageError saying what there is, and CheckpointError for
    a file that cannot be used.
    """
    if wish not in ("latest", "final") and not wish.isdecimal():
        return _read(must_exist(Path(wish)))
    files = run_files(directory)
    if wish == "latest":
        return _newest_whole(files)
    if wish == "final":
        return _finished(_read(files[-1]))
    path = CheckpointStore(directory).path(int(wish))
    if path not in files:
        raise UsageError(f"--checkpoint {wish}: no such step; {CheckpointStore(directory).describe()}")
    return _read(path)


def run_files(directory: Path) -> list[Path]:
    """The step files of a run's directory, in step order. Raises UsageError when there is none, naming the runs below it."""
    if not directory.is_dir():
        raise UsageError(f"{directory}: no such directory; give that of a run with --checkpoint-dir")
    below = [path for path in sorted(directory.iterdir()) if path.is_dir() and path.name not in _PUT_AWAY]
    runs = [path for path in below if CheckpointStore(path).steps()]
    if runs and not CheckpointStore(directory).steps():
        there = ", ".join(map(str, runs))
        raise UsageError(f"{directory}: holds no step files, but runs: {there}; give one with --checkpoint-dir")
    return step_files(directory)


def steps_and_losses(directory: Path) -> list[tuple[int, float | None, float | None]]:
    """The steps whose files are in a run's directory, with their training and held-out losses where these were logged."""
    steps = CheckpointStore(directory).steps()
    records, _ = read_records(directory / _METRICS)
    train, held_out = (dict(curve(records, key)) for key in ("loss", "eval_loss"))
    return [(step, train.get(step), held_out.get(step)) for step in steps]


def _newest_whole(files: list[Path]) -> Source:
    notices: list[str] = []
    for path in reversed(files):
        try:
            return replace(_read(path), notices=notices)
        except DamagedError as error:
            notices.append(f"passed over: {error}")
    raise DamagedError(f"no step file is whole: {'; '.join(notices[:3])}; restore a backup, or train anew")


def _finished(newest: Source) -> Source:
    """``newest``, if its run is over. Raises UsageError saying how far it is."""
    step, total = newest.state.step, _total_steps(newest)
    if any(record.get("final") and record["step"] == step for record in newest.records) or (total and step >= total):
        return newest
    of = f"{step:,} of {total:,} steps are done" if total else f"it is at step {step:,}"
    raise UsageError(f"--checkpoint final: the run is not finished ({of}); go on with train --resume auto, or give latest")


def _total_steps(source: Source) -> int | None:
    """The length of the run that made a file; None where nothing says it (the file itself does not)."""
    whole = readable_config(source.path.parent)
    if whole is None:
        return None
    t = whole.trainer
    return t.max_steps or max(1, t.num_epochs * source.state.windows_an_epoch // (t.batch_size * t.gradient_accumulation))


def readable_config(directory: Path) -> Config | None:
    """The config.json of a run's directory; None where there is none that can be read."""
    path = directory / "config.json"
    try:
        return Config.from_canonical(json.loads(disk.read(path)))
    except (OSError, ValueError, TypeError, AttributeError, RecursionError, ConfigError):
        return None


def _read(path: Path) -> Source:
    file = format.load(path)
    check_name(path, file.metadata)
    state = from_file(file, path)
    _must_be_countable(state, path)
    of_a_run = path.name == CheckpointStore(path.parent).path(state.step).name
    whole = readable_config(path.parent) if of_a_run else None
    name = whole.model.name if whole else path.resolve().parent.name if of_a_run else path.stem
    records = read_records(path.parent / _METRICS)[0] if of_a_run else []
    config = Config.from_canonical(state.config)
    return Source(
        path,
        replace(state, optimizer={}),
        file.metadata.get("numerics_version", "unknown"),
        sha256_of(path),
        config.model_copy(update={"model": config.model.model_copy(update={"name": name})}),
        [record for record in records if record["step"] <= state.step],
    )


def _must_be_countable(state: RunState, path: Path) -> None:
    data: Mapping[str, Any] = state.data
    if type(data["tokens"]) is not int or type(data["digest"]) is not str or type(state.tokenizer["name"]) is not str:
        raise CheckpointError(f"{path}: does not say what data it was trained on; use an undamaged copy of the file")
