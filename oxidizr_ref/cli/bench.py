"""``oxidizr-ref bench``: what a training step of a config costs on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from oxidizr_ref import parallel
from oxidizr_ref.bench import Measured, Spread, measure
from oxidizr_ref.cli.completion import configs
from oxidizr_ref.cli.words import of, short, size_of
from oxidizr_ref.config import canonical_json, load_config
from oxidizr_ref.errors import UsageError

_ROWS = 14  # of the table of ops


def bench(
    config: Annotated[
        str,
        typer.Option(
            "-f", "--config", metavar="CONFIG", autocompletion=configs, help="A config file or the name of a bundled model."
        ),
    ] = "nano-start",
    rounds: Annotated[int, typer.Option("--rounds", metavar="N", min=1, help="Steps to measure.")] = 10,
    threads: Annotated[
        int | None, typer.Option("--threads", metavar="N", min=1, help="Threads; default: all cores.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the config; repeatable.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", metavar="", help="One JSON object on stdout instead.")] = False,
    profile: Annotated[
        Path | None,
        typer.Option("--profile", metavar="FILE", help="Also write phase;module;op and microseconds, for flame graphs."),
    ] = None,
) -> int:
    """Measure a training step on random tokens: time, memory, where the time goes, and the floor of its matrix products."""
    if profile is not None and (profile.is_dir() or not profile.parent.is_dir()):
        raise UsageError(f"--profile {profile}: no file can be written there; name one in a directory that exists")
    if threads is not None:
        parallel.set_threads(threads)
    found = measure(load_config(config, overrides or []), rounds)
    if profile is not None:
        profile.write_text(found.folded(), encoding="utf-8")
    typer.echo(canonical_json(found.as_json()) if as_json else "\n".join(_lines(found, config)))
    return 0


def _lines(found: Measured, config: str) -> Iterator[str]:
    step = found.step.median
    yield f"{config}: {of(found.parameters, 'parameter')}, {of(found.tokens, 'token')} a step, {of(found.threads, 'thread')}"
    rate = found.operations / found.floor.median / 1e9
    yield f"  step        {_spread(found.step)}"
    yield f"              {short(found.tokens / step)} tokens/s, {found.over_floor:.2f} times as long as its floor"
    yield f"  floor       {_spread(found.floor)}"
    yield f"              {of(found.products, 'matrix product')}, {short(rate)} GFLOP/s"
    yield f"  memory      {size_of(found.memory)} beyond what was there before the first step"
    yield ""
    watched = sum(found.stacks.values())
    yield f"where a step goes ({_milliseconds(watched)} with somebody watching)"
    for name, seconds in found.by(lambda stack: stack[0]).items():
        yield f"  {name:34s}{_milliseconds(seconds):>12s}{seconds / watched:8.1%}"
    yield ""
    ops = found.by(lambda stack: f"{stack[0]} {stack[-1]}")
    for name, seconds in list(ops.items())[:_ROWS]:
        yield f"  {name:34s}{_milliseconds(seconds):>12s}{seconds / watched:8.1%}"
    if len(ops) > _ROWS:
        rest = sum(list(ops.values())[_ROWS:])
        yield f"  {f'{len(ops) - _ROWS} others':34s}{_milliseconds(rest):>12s}{rest / watched:8.1%}"


def _spread(spread: Spread) -> str:
    return f"{_milliseconds(spread.median)} ({_milliseconds(min(spread.seconds))} to {_milliseconds(max(spread.seconds))})"


def _milliseconds(seconds: float) -> str:
    return f"{short(seconds * 1e3)} ms"
