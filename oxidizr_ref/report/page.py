"""A run, or two, as one page of HTML that needs nothing else: no library, no network, no date. Equal files, equal bytes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from oxidizr_ref.checkpoint import disk
from oxidizr_ref.report import sections
from oxidizr_ref.report.curves import chosen, page_data
from oxidizr_ref.report.histograms import histograms
from oxidizr_ref.report.run_directory import RunDirectory, open_run
from oxidizr_ref.report.samples import SAMPLING, samples
from oxidizr_ref.report.text import shown

_HERE = Path(__file__).parent
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def write_report(directories: Sequence[Path], output: Path, texts: int = 1) -> int:
    """Write the page of one run, or of several to be compared. texts: how many every checkpoint is to write.

    Returns its size in bytes. Raises UsageError for a directory without a run before anything is written, and OSError where
    the disk refuses; then what stood at ``output`` stands there still.
    """
    runs = [open_run(directory) for directory in directories]
    if len({run.name for run in runs}) < len(runs):
        runs = [replace(run, name=str(run.directory)) for run in runs]
    page = report(runs, texts).encode("utf-8")
    disk.replace(output, page)
    return len(page)


def report(runs: Sequence[RunDirectory], texts: int = 1) -> str:
    """The page, with its style, script and numbers inside."""
    spreads = [histograms(chosen(run)) for run in runs]
    data = page_data(runs, spreads)
    style, charts, panels = (_source(name) for name in ("page.css", "charts.js", "panels.js"))
    title = " and ".join(shown(run.name) for run in runs)
    parts = _parts(runs, data, texts)
    body = "\n".join(
        f'<section id="{name}"><h2>{heading}</h2>\n{content}\n</section>' for name, heading, content in parts if content
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<header><h1>{title}</h1></header>
<main>
{body}
</main>
<script type="application/json" id="data">{_embedded(data)}</script>
<script>
{charts}
{panels}</script>
</body>
</html>
"""


def _source(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")


def _embedded(data: Any) -> str:
    """JSON that no parser of HTML finds an end tag or a comment in."""
    return json.dumps(data, allow_nan=False, separators=(",", ":"), sort_keys=True).replace("<", "\\u003c")


def _parts(runs: Sequence[RunDirectory], data: dict[str, Any], texts: int) -> Iterator[tuple[str, str, str]]:
    """Id, heading and content of every section; those without content are left out."""
    found = data["runs"]
    yield "run", "The run" if len(runs) == 1 else "The runs", _each(runs, lambda index: sections.facts(runs[index]))
    curves = [_CONTROLS, *_legend(found), '<div id="charts"></div>']
    yield "curves", "Curves", "\n".join(curves) if data["charts"] else _NOTHING_LOGGED
    heat = _each(runs, lambda index: f'<div class="heat" data-run="{index}"></div>' if found[index]["experts"] else "")
    yield "experts", "Load of the experts", f"{_HEAT_NOTE}\n{heat}" if any(run["experts"] for run in found) else ""
    yield "checkpoints", "Checkpoints", _each(runs, lambda index: sections.checkpoints(runs[index]))
    spread = _each(runs, lambda index: f'<div class="spread" data-run="{index}"></div>' if runs[index].whole else "")
    yield "weights", "Weights and moments", f"{_SPREAD_NOTE}\n{spread}" if any(run.whole for run in runs) else ""
    written = [samples(chosen(run), texts) for run in runs]
    text = _each(runs, lambda index: sections.samples(written[index]) if written[index] else "")
    yield "samples", "Samples", f"{_SAMPLES_NOTE}\n{text}" if any(written) else ""
    yield "config", "Config", sections.settings(runs)
    yield "environment", "Environment", _each(runs, lambda index: sections.environment(runs[index]))


def _legend(found: Sequence[dict[str, Any]]) -> Iterator[str]:
    """What some pages have besides curves."""
    if any(run["branches"] for run in found):
        yield '<p class="note">Dashed curves are branches that were left: the run went back to an earlier step.</p>'
    if any(run["changes"] for run in found):
        yield '<p class="note">At a dotted upright line the config, the data or the machine class changed.</p>'


def _each(runs: Sequence[RunDirectory], content: Callable[[int], str]) -> str:
    """The content for every run, under its name where there are several."""
    if len(runs) == 1:
        return content(0)
    texts = [content(index) for index in range(len(runs))]
    return "\n".join(
        f'<div style="--own:var(--run{index % 4})"><h3 class="own">{shown(run.name)}</h3>\n{text}</div>'
        for index, (run, text) in enumerate(zip(runs, texts, strict=True))
        if text
    )


_CONTROLS = """<form id="controls">
<label>smoothing <input type="range" id="smoothing" min="0" max="0.99" step="0.01" value="0"> <output>0</output></label>
<span role="group" aria-label="zoom"><button type="button" id="closer">closer</button>
<button type="button" id="wider">wider</button> <button type="button" id="all">all steps</button></span>
<output id="where"></output>
</form>
<p class="note how">Drag to zoom, double-click for all steps; in a chart that was clicked (or with Ctrl) the wheel zooms.
Keys: &larr; &rarr; move by a logged step (Shift: ten), Home, End, + and &minus; zoom, 0 shows all, L switches to
logarithms.</p>
<p id="spoken" class="unseen" aria-live="polite"></p>
<noscript><p class="bad">The curves are drawn by the script in this page, which this browser does not run.</p></noscript>"""
_NOTHING_LOGGED = '<p class="note">Nothing was logged: there is no metrics.jsonl with a number in it.</p>'
_HEAT_NOTE = """<p class="note">Each row is an expert; its share of the tokens: none
<span class="scale"></span> twice an even one, or more.</p>"""
_SPREAD_NOTE = """<p class="note">Each curve is a checkpoint, the newest in front. A checkpoint holds no gradients; its first
moments (exp_avg) are a running mean of them, and stand in for them here. Of a larger tensor at most
65,536 numbers are looked at, evenly spaced; the outermost bins also hold what lies beyond them.</p>"""
_SAMPLES_NOTE = f"""<p class="note">Up to {SAMPLING.max_tokens} tokens from nothing but the token that begins documents, at
temperature {SAMPLING.temperature} among the {SAMPLING.top_k} likeliest, each checkpoint with the same random numbers.</p>"""
