"""``oxidizr-ref selftest``: does the promise hold on this machine?"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

from oxidizr_ref.backend import resolve_device
from oxidizr_ref.checkpoint import format
from oxidizr_ref.checkpoint.store import CheckpointStore
from oxidizr_ref.cli.options import Device
from oxidizr_ref.errors import OxidizrError
from oxidizr_ref.fingerprint import fingerprint

_STEPS, _EVERY = 24, 6
_SMALL = (
    "model.hidden_size=64",
    "model.intermediate_size=96",
    "model.num_layers=2",
    "model.mamba_layers=[0]",
    "model.mamba2_num_heads=8",
    "trainer.num_epochs=1",
)


def selftest(
    target_device: Annotated[Device, typer.Option(help="Where to compute.")] = Device.cpu,
) -> int:
    """Train, kill, resume and verify on this machine (under a minute), and print its fingerprint."""
    began = time.monotonic()
    device = resolve_device(target_device.value, demanded_by=f"--target-device {target_device.value}")
    typer.echo(json.dumps(fingerprint(device), indent=2))
    with tempfile.TemporaryDirectory(prefix="oxidizr-ref-selftest-") as name:
        whole, broken = Path(name, "whole"), Path(name, "broken")
        typer.echo(f"training {_STEPS} steps in one go, with 1 thread")
        _train(whole, device, "--threads", "1")
        typer.echo("training the same with 3 threads, killed after each step file and resumed")
        kills = _train_with_kills(broken, device)
        typer.echo(f"killed {kills} times")
        _compare(whole, broken)
    typer.echo(f"selftest passed in {time.monotonic() - began:.0f} s: equal bytes, whatever happened on the way")
    return 0


def _command(directory: Path, device: str, *extra: str) -> list[str]:
    settings = [part for setting in _SMALL for part in ("--set", setting)]
    run = ["--max-steps", str(_STEPS), "--save-interval", str(_EVERY), "--max-checkpoints", "0", "--resume", "auto"]
    start = [sys.executable, "-m", "oxidizr_ref", "train", "-f", "nano-start", "--target-device", device, "--headless"]
    return [*start, *run, "--checkpoint-dir", str(directory), *settings, *extra]


def _train(directory: Path, device: str, *extra: str, resumed_at: int = 0) -> None:
    """Train to the end, and make sure that it began where it should: starting at 0 would give the right bytes, too."""
    done = subprocess.run(_command(directory, device, *extra), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise OxidizrError(f"selftest: training ended with exit code {done.returncode}: {done.stderr.strip()}")
    if f"at step {resumed_at}\n" not in done.stderr:
        raise OxidizrError(f"selftest: the last run did not continue at step {resumed_at}: {done.stderr.strip()}")


def _train_with_kills(directory: Path, device: str) -> int:
    """SIGKILL the run as soon as each step file but the last appears; then let it finish. Returns the number of kills."""
    last = 0
    for step in range(_EVERY, _STEPS, _EVERY):
        process = subprocess.Popen(
            _command(directory, device, "--threads", "3"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while process.poll() is None and not (directory / f"step_{step}.safetensors").exists():
            time.sleep(0.002)
        if process.poll() is not None:
            raise OxidizrError(
                f"selftest: the run to be killed at step {step} ended before (exit code {process.returncode})"
            )
        process.kill()
        process.wait()
        last = max(CheckpointStore(directory).steps())
    _train(directory, device, "--threads", "3", resumed_at=last)
    return _STEPS // _EVERY - 1


def _compare(whole: Path, broken: Path) -> None:
    for step in range(_EVERY, _STEPS + 1, _EVERY):
        digests = []
        for directory in (whole, broken):
            path = directory / f"step_{step}.safetensors"
            format.verify(path)
            digests.append(hashlib.sha256(path.read_bytes()).hexdigest())
        if digests[0] != digests[1]:
            raise OxidizrError(f"selftest: step_{step} differs: {digests[0]} in one go, {digests[1]} after kills")
        typer.echo(f"step_{step:<3} sha256 {digests[0]}")
