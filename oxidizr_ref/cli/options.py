"""Options that several commands share, and what follows from them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any

import typer

from oxidizr_ref.backend import resolve_device

MACHINE = "This machine"


class Device(StrEnum):
    """Where to compute."""

    cpu = "cpu"
    gpu = "gpu"


TargetDevice = Annotated[
    Device | None, typer.Option(help="Demand a device. Default: a GPU if there is one.", rich_help_panel=MACHINE)
]
Threads = Annotated[
    int | None, typer.Option(metavar="N", min=1, help="Threads (default: all cores).", rich_help_panel=MACHINE)
]
Debug = Annotated[bool, typer.Option("--debug", metavar="", help="Show tracebacks of errors.", rich_help_panel=MACHINE)]


def device_for(wish: Device | None) -> str:
    """Where a command computes that is given ``--target-device`` or not. Raises DeviceError for one that is not there."""
    return resolve_device(wish or Device.gpu, demanded_by="--target-device gpu" if wish is Device.gpu else None)


def as_overrides(flags: Mapping[str, tuple[str, Any]]) -> dict[str, str]:
    """``{"--batch-size 4": "trainer.batch_size=4"}`` of the flags that were given. JSON is YAML, and quotes for us."""
    return {
        f"{flag} {' '.join(value) if isinstance(value, list) else value}": f"{key}={json.dumps(value)}"
        for flag, (key, value) in flags.items()
        if value is not None
    }
