"""The parts of the page that are words and tables: readable without its script."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from oxidizr_ref.checkpoint.records import curve
from oxidizr_ref.interop.model_card import layers_in_words
from oxidizr_ref.memory import model_parts
from oxidizr_ref.report.run_directory import Branch, RunDirectory, StepFile
from oxidizr_ref.report.samples import Written
from oxidizr_ref.report.text import short, shown, size_of, table, value


def facts(run: RunDirectory) -> str:
    """What the run is and how far it came."""
    return table([], [[f"<b>{label}</b>", text] for label, text in _facts(run)], "facts")


def _facts(run: RunDirectory) -> Iterator[tuple[str, str]]:
    yield "directory", shown(str(run.directory))
    if run.config is not None:
        parts = model_parts(run.config)
        total, active = sum(part.parameters for part in parts), sum(part.active for part in parts)
        m = run.config.model
        yield "model", f"{shown(m.name)}: {total:,} parameters" + (f", {active:,} for a token" if active < total else "")
        yield "layers", shown(layers_in_words(m))
    loss, held_out = curve(run.records, "loss"), curve(run.records, "eval_loss")
    if loss:
        yield "loss", f"{short(loss[-1][1])} at step {loss[-1][0]:,}, from {short(loss[0][1])} at step {loss[0][0]:,}"
    if held_out:
        step, best = min(held_out, key=lambda point: (point[1], point[0]))
        yield "held-out loss", f"{short(held_out[-1][1])} at step {held_out[-1][0]:,}; best {short(best)} at step {step:,}"
    progress = run.metadata.get("progress")
    if isinstance(progress, dict) and type(progress.get("tokens_seen")) is int:
        yield "tokens seen", f"{progress['tokens_seen']:,} at the newest whole checkpoint"
    if run.broken:
        yield "passed over", f"{run.broken:,} lines of metrics.jsonl that are no records"
    if run.moving:
        yield "going back", "this run was going back to an earlier step when it was cut off; its next start finishes that"


# --- checkpoints ------------------------------------------------------------------------------------------------------


def checkpoints(run: RunDirectory) -> str:
    """When checkpoints were kept, on a line from the first step to the last, and each file in a table."""
    lanes = [_lane("kept", run.files, run), *(_lane(f"left: superseded/{b.name}", b.files, run, b) for b in run.branches)]
    held_out = dict(curve(run.records, "eval_loss"))
    rows = [_row(file, held_out) for file in run.files]
    for branch in run.branches:
        held_out_there = dict(curve(branch.records, "eval_loss"))
        rows += [_row(file, held_out_there, f"superseded/{branch.name}") for file in branch.files]
    rows += [["", f"<code>quarantine/{shown(name)}</code>", "", "", "damaged, put aside"] for name in run.damaged]
    if not rows:
        return '<p class="note">No step file is in this directory.</p>'
    return "\n".join([*lanes, table(["step", "file", "size", "held-out loss", "state"], rows, "files")])


def _last_step(run: RunDirectory) -> int:
    branches = [branch.records[-1]["step"] for branch in run.branches if branch.records]
    files = [file.step for file in (*run.files, *(file for branch in run.branches for file in branch.files))]
    last: int = max([1, *branches, *files, *(record["step"] for record in run.records[-1:])])
    return last


def _lane(name: str, files: Sequence[StepFile], run: RunDirectory, branch: Branch | None = None) -> str:
    """Steps of a branch as a line, and its files as marks on it."""
    end, records = _last_step(run), run.records if branch is None else branch.records
    steps = [record["step"] for record in records] + [file.step for file in files]
    first, last = (0 if branch is None else min(steps, default=0)), max(steps, default=0)
    line = f'<i style="left:{100 * first / end:.2f}%;width:{100 * (last - first) / end:.2f}%"></i>'
    marks = "".join(
        f'<b class="{"whole" if file.problem is None else "damaged"}" style="left:{100 * file.step / end:.2f}%" '
        f'title="step {file.step:,}, {size_of(file.size)}"></b>'
        for file in files
    )
    kind = "" if branch is None else " left"
    return f'<div class="lane{kind}"><span>{shown(name)}, to step {last:,}</span><div>{line}{marks}</div></div>'


def _row(file: StepFile, held_out: dict[int, float], where: str = "") -> list[str]:
    loss = held_out.get(file.step)
    state = "whole" if file.problem is None else f'<span class="bad">{shown(file.problem)}</span>'
    state += f", in {shown(where)}" if where else ""
    name = f"<code>{shown(file.path.name)}</code>"
    return [f"{file.step:,}", name, size_of(file.size), "" if loss is None else short(loss), state]


# --- samples ----------------------------------------------------------------------------------------------------------


def samples(written: Sequence[Written]) -> str:
    """What each checkpoint wrote, the newest first."""
    blocks = []
    for one in reversed(written):
        texts = "".join(f"<pre>{shown(text, lines=True)}</pre>" for text in one.texts)
        said = texts if one.problem is None else f'<p class="bad">{shown(one.problem)}</p>'
        blocks.append(f"<h3>step {one.step:,}</h3>\n{said}")
    return "\n".join(blocks)


# --- config and environment -------------------------------------------------------------------------------------------

_ABSENT = object()


def settings(runs: Sequence[RunDirectory]) -> str:
    """Every key of the configs; of two, those that differ come first."""
    keys = sorted({key for run in runs for key in run.settings})
    rows = {key: [run.settings.get(key, _ABSENT) for run in runs] for key in keys}
    different = {key: values for key, values in rows.items() if any(other != values[0] for other in values[1:])}
    head = ["key", *(shown(run.name) for run in runs)]
    parts = []
    if len(runs) > 1:
        found = table(head, _settings(different), "settings") if different else '<p class="note">No key differs.</p>'
        parts.append(f"<h3>What differs</h3>\n{found}")
    whole = table(head, _settings(rows), "settings") if rows else '<p class="note">No config is in this directory.</p>'
    parts.append(f"<details{' open' if len(runs) == 1 else ''}><summary>All {len(rows)} keys</summary>\n{whole}</details>")
    return "\n".join(parts)


def _settings(rows: dict[str, list[Any]]) -> list[list[str]]:
    return [
        [f"<code>{shown(key)}</code>", *('<span class="note">none</span>' if v is _ABSENT else value(v) for v in values)]
        for key, values in rows.items()
    ]


def environment(run: RunDirectory) -> str:
    """What the newest whole file says of data, tokenizer, machine class and origin."""
    if not run.metadata:
        return '<p class="note">No step file is whole, so nothing says where the run was made.</p>'
    rows = []
    for key in ("numerics_version", "format_version", "data", "tokenizer", "fingerprint"):
        found = run.metadata.get(key)
        parts = found if isinstance(found, dict) else {"": found}
        rows += [[f"<code>{shown(f'{key} {name}'.strip())}</code>", value(part)] for name, part in sorted(parts.items())]
    lineage = run.metadata.get("lineage")
    origin = [value(entry) for entry in lineage] if isinstance(lineage, list) else []
    rows += [["<code>lineage</code>", entry] for entry in origin or ["no change of config, data or machine class"]]
    return table([], rows, "settings")
