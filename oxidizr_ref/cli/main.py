"""The command ``oxidizr-ref``: its subcommands, and how errors reach the user (one line, and an exit code)."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable

import typer
from typer.exceptions import TyperException

from oxidizr_ref.cli.bench import bench
from oxidizr_ref.cli.convert import convert
from oxidizr_ref.cli.diff import diff
from oxidizr_ref.cli.evaluate import evaluate
from oxidizr_ref.cli.generate import generate
from oxidizr_ref.cli.help import Command, Program, overview
from oxidizr_ref.cli.inspect import inspect
from oxidizr_ref.cli.pack import pack
from oxidizr_ref.cli.prepare import prepare
from oxidizr_ref.cli.push import push
from oxidizr_ref.cli.run_report import report
from oxidizr_ref.cli.selftest import selftest
from oxidizr_ref.cli.trace import trace
from oxidizr_ref.cli.train import train
from oxidizr_ref.cli.verify import verify
from oxidizr_ref.cli.words import printable
from oxidizr_ref.errors import ConfigError, OxidizrError
from oxidizr_ref.version import __version__

#: By what somebody wants to do, in the order in which it is done.
_COMMANDS: dict[str, dict[str, Callable[..., int]]] = {
    "Train": {"train": train, "report": report},
    "Data": {"prepare": prepare},
    "Use": {"generate": generate, "eval": evaluate},
    "Publish": {"pack": pack, "push": push, "convert": convert},
    "Check": {"inspect": inspect, "verify": verify, "diff": diff, "bench": bench, "selftest": selftest},
}

app = typer.Typer(
    name="oxidizr-ref",
    cls=Program,
    help="Train a language model on NumPy; stop it anywhere, and it continues to the same bits.\n\n"
    "`oxidizr-ref -f nano-start` is short for `oxidizr-ref train -f nano-start`.",
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
for _panel, _commands in _COMMANDS.items():
    for _name, _command in _commands.items():
        app.command(name=_name, cls=Command, rich_help_panel=_panel)(_command)
app.add_typer(trace, name="trace", rich_help_panel="Check")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"oxidizr-ref {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _options(
    context: typer.Context,
    _version: bool = typer.Option(
        False, "--version", metavar="", callback=_print_version, is_eager=True, help="Print the version."
    ),
) -> None:
    if context.invoked_subcommand is None:
        overview()


def main() -> None:
    """Run the command line and exit: 0 done, 1 failed, 2 wrong usage or config, 130/143 stopped by a signal."""
    sys.exit(_run(sys.argv[1:]))


def _run(arguments: list[str]) -> int:
    try:
        code = app(args=arguments, prog_name="oxidizr-ref", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except (Exception, KeyboardInterrupt) as error:
        if "--debug" in arguments:
            traceback.print_exc()
        return _explain(error)


def _explain(error: BaseException) -> int:
    """Print what is wrong, in a line (a config may have several), and return the exit code."""
    if isinstance(error, TyperException):  # unknown commands and options, values of the wrong type
        if not error.format_message():  # of a group of commands without one: its help was printed
            return error.exit_code
        return _fail(f"{error.format_message().rstrip('.')}; see oxidizr-ref --help", error.exit_code)
    if isinstance(error, typer.Abort | KeyboardInterrupt):
        return _fail("interrupted; checkpoints written before are whole", 130)
    if isinstance(error, ConfigError):
        return max(_fail(line, error.exit_code) for line in str(error).splitlines())
    if isinstance(error, OxidizrError):
        return _fail(str(error), error.exit_code)
    if isinstance(error, BrokenPipeError):
        sys.stdout = sys.stderr = None  # whoever read our output is gone
        return 1
    if isinstance(error, OSError):
        return _fail(f"{error.filename or 'file system'}: {error.strerror or error}; files saved before are whole", 1)
    if isinstance(error, MemoryError):
        return _fail(f"out of memory ({error}); use a smaller model, --batch-size or --seq-len; checkpoints are whole", 1)
    return _fail(f"{type(error).__name__}: {error} (unexpected; --debug shows where)", 1)


def _fail(message: str, code: int) -> int:
    print(f"error: {printable(' '.join(message.splitlines()))}", file=sys.stderr)
    return code
