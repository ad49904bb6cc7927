"""``oxidizr-ref trace``: record golden traces, and find where another program first departs from them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from oxidizr_ref.backend import Array
from oxidizr_ref.cli.completion import configs, dtypes
from oxidizr_ref.cli.help import Command, Group
from oxidizr_ref.cli.words import of, printable, size_of
from oxidizr_ref.config import Config, canonical_json, load_config
from oxidizr_ref.errors import UsageError
from oxidizr_ref.model import LanguageModel
from oxidizr_ref.trace.compare import compare as compare_traces
from oxidizr_ref.trace.file import Trace
from oxidizr_ref.trace.golden_set import CASES, lively_weights, machine_class, make
from oxidizr_ref.trace.record import read_batches, read_weights
from oxidizr_ref.trace.record import record as record_trace
from oxidizr_ref.trace.recorder import WHAT
from oxidizr_ref.trace.report import report

trace = typer.Typer(
    cls=Group,
    help="Golden traces: every number of a training step, to hold another implementation against.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)

_DTYPES = {"fp32": "f32", "float32": "f32", "float64": "f64", "bfloat16": "bf16", "fp16": "f16", "float16": "f16"}


@trace.command(cls=Command)
def record(
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="The trace to write.")],
    config: Annotated[
        str, typer.Option("-f", "--config", metavar="CONFIG", autocompletion=configs, help="A config file or bundled model.")
    ],
    steps: Annotated[int, typer.Option("--steps", metavar="N", min=1, help="Training steps.")] = 1,
    batch: Annotated[
        Path | None,
        typer.Option("--batch", metavar="FILE", help="`tokens` and `targets` in a safetensors file; else the data's first."),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            "--weights",
            metavar="FILE|lively",
            help="Begin with those of a checkpoint, model or trace, or with random ones at which no part of the model is "
            "negligible; else with the config's first weights.",
        ),
    ] = None,
    what: Annotated[str, typer.Option("--what", metavar="LIST", help="Which of forward,backward,optimizer.")] = ",".join(
        WHAT
    ),
    layers: Annotated[
        str | None,
        typer.Option("--layers", metavar="LIST", help="Only these layers, such as 0,3-5, and what is outside them."),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype", metavar="f64|f32|bf16|f16", autocompletion=dtypes, help="Precision; f64 to judge others by."
        ),
    ] = None,
    sample: Annotated[
        int, typer.Option("--sample", metavar="N", min=0, help="Of larger arrays keep N numbers and a digest.")
    ] = 0,
    fused: Annotated[
        bool, typer.Option("--fused", metavar="", help="Of the fast operations instead of the plain ones.")
    ] = False,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the config; repeatable.")
    ] = None,
) -> int:
    """Do training steps on the plain side, and write every named value, gradient and slot to a file."""
    flags = {} if dtype is None else {f"--dtype {dtype}": f"model.dtype={_DTYPES.get(dtype, dtype)}"}
    chosen = [word.strip() for word in what.split(",") if word.strip()]
    strange = [word for word in chosen if word not in WHAT]
    if strange or not chosen:
        raise UsageError(f"--what {what}: expected some of {', '.join(WHAT)}, separated by commas")
    if output.is_dir():
        raise UsageError(f"-o {output}: is a directory; name a file in it")
    if not output.parent.is_dir():
        raise UsageError(f"-o {output}: there is no directory {output.parent}; make it first")
    loaded = load_config(config, overrides or [], flags)
    record_trace(
        loaded,
        output,
        steps,
        None if batch is None else read_batches(batch),
        None if weights is None else _weights(weights, loaded),
        chosen,
        None if layers is None else _numbers(layers),
        sample,
        fused,
    )
    made = Trace(output)
    typer.echo(
        printable(
            f"{output}: {of(len(made.records), 'tensor')} of {of(steps, 'step')} in {made.precision}, "
            f"{size_of(output.stat().st_size)}"
        )
    )
    return 0


def _weights(said: str, config: Config) -> dict[str, Array]:
    if said == "lively" and not Path(said).exists():
        return lively_weights(LanguageModel(config.model, seed=None))
    return read_weights(Path(said))


def _numbers(text: str) -> list[int]:
    """``0,3-5`` as 0, 3, 4, 5."""
    numbers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        last = last if dash else first
        if not first.isdecimal() or not last.isdecimal() or int(last) < int(first):
            raise UsageError(f"--layers {text}: expected numbers and ranges, such as 0,3-5")
        numbers += range(int(first), int(last) + 1)
    return numbers


@trace.command(cls=Command)
def compare(
    reference: Annotated[Path, typer.Argument(metavar="REFERENCE", help="A trace of this package's.")],
    other: Annotated[Path, typer.Argument(metavar="OTHER", help="A trace of another program's, whole or in part.")],
    names: Annotated[
        str | None,
        typer.Option("--map", metavar="FILE|NAME", help="How the other's names correspond: a file, or a shipped map."),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option("--precision", metavar="P", help="What the other computed in: f64, f32, tf32, bf16, f16."),
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option("--tolerance", metavar="X", min=0, help="Grant every tensor this relative error, not a budget."),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", metavar="", help="A row for every tensor.")] = False,
    as_json: Annotated[bool, typer.Option("--json", metavar="", help="One JSON object on stdout instead.")] = False,
) -> int:
    """Say where another program's numbers first leave their error budget, and whether what they came from was right.

    Exit code: 0 agrees, 1 differs, 3 undecided (a tie of a router), 2 could not be compared.
    """
    found = compare_traces(reference, other, names, precision, tolerance)
    typer.echo(canonical_json(found.as_json()) if as_json else report(found, everything))
    return found.exit_code


@trace.command(cls=Command)
def show(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="A trace.")],
    as_json: Annotated[bool, typer.Option("--json", metavar="", help="A JSON object a tensor instead.")] = False,
) -> int:
    """List the tensors of a trace in the order of execution."""
    opened = Trace(path)
    for one in opened.records.values():
        if as_json:
            line = {"name": one.name, "role": one.role, "op": one.op, "layer": one.layer, "shape": list(one.shape)}
            typer.echo(canonical_json({**line, "inputs": list(one.inputs), "sampled": bool(one.sample)}))
        else:
            typer.echo(printable(f"{one.role:15s} {one.name} {list(one.shape)}{f'  {one.op}' if one.op else ''}"))
    return 0


@trace.command(cls=Command)
def golden(
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="Where the files go.")] = Path("golden"),
    only: Annotated[
        list[str] | None, typer.Option("--only", metavar="NAME", help=f"Of {', '.join(CASES)}; repeatable.")
    ] = None,
) -> int:
    """Make the published set: a small trace of every architecture in f64 and f32, and compare their digests."""
    strange = [name for name in only or () if name not in CASES]
    if strange:
        raise UsageError(f"--only {strange[0]}: the set has {', '.join(CASES)}")
    same, known = True, True
    for made in make(output, only or list(CASES)):
        typer.echo(f"{made.digest}  {made.name}.safetensors{'' if made.same else '  NOT as published'}")
        same, known = same and made.same, known and made.known
    if not known:
        which = f"no digests are published for this machine class ({machine_class()})"
        typer.echo(f"{which}: losses and gradient norms were compared instead", err=True)
    return 0 if same else 1
