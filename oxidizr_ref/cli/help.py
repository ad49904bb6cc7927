"""The help of commands: their options in panels, as typer draws them, and below these the examples."""

from __future__ import annotations

from typing import Any

import typer
from rich.text import Text
from typer.core import TyperCommand, TyperGroup

from oxidizr_ref.cli.examples import shown
from oxidizr_ref.cli.terminal import console, wants_plain_text
from oxidizr_ref.version import __version__

_OVERVIEW = f"""\
oxidizr-ref {__version__}: train a language model on NumPy; stop it anywhere, and it
continues to the same bits.

{shown("")}

All commands: oxidizr-ref --help. All of one: oxidizr-ref train --help.
Does it work on this machine? oxidizr-ref selftest"""


def overview() -> None:
    """What is printed for no command at all: enough to begin with."""
    typer.echo(_OVERVIEW)


def _prepare(context: Any) -> None:
    """Let the help that follows send no escape codes where these are unwanted, and call no switch a ``<bool>``."""
    from typer import rich_utils  # here: only help needs it, and it takes long to import

    if wants_plain_text():
        rich_utils.FORCE_TERMINAL = False
    for option in context.command.get_params(context):
        if getattr(option, "is_flag", False):
            option.metavar = ""


def _show_examples(context: Any) -> None:
    examples = shown(context.command_path.partition(" ")[2])
    if examples:
        # No line of an example is broken: it may be longer than the terminal is wide, and is copied as a whole.
        console().print(Text.assemble((" Examples\n", "bold"), examples, "\n"), soft_wrap=True)


class Command(TyperCommand):
    """A command with its examples."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print it."""
        _prepare(ctx)
        super().format_help(ctx, formatter)
        _show_examples(ctx)


class Group(TyperGroup):
    """A group of commands with its examples."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print it."""
        _prepare(ctx)
        super().format_help(ctx, formatter)
        _show_examples(ctx)


class Program(Group):
    """The whole program. oxidizr's documentation leaves out the word ``train``; so may whoever types it, or presses Tab."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Fill in the word."""
        own = {name for option in self.get_params(ctx) for name in option.opts}
        if args and args[0].startswith("-") and args[0] not in own:
            args = ["train", *args]
        return super().parse_args(ctx, args)
