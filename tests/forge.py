"""A forge of processes: runs of the command line that share nothing but the import of the package, at a tenth of the cost.

One child interpreter (``python tests/forge.py``) imports the package and then waits, with a single thread and no state of
any run. For every order it forks a process, which runs the command line as ``oxidizr-ref ARGUMENTS`` would: with its own
directory, environment, output files, threads and end. What a run needs that is not in its checkpoint, it cannot have.

`run` is what tests call. An order may name moments at which something happens to the run, separated by commas:

=====================================  =================================================================================
``logged:N``  ``accumulating:N``        it is killed when step N was logged; after two micro-batches of it
``renaming:N``                          it is killed before the new file of step N gets its name
``replacing:K``  ``writing:K``          it is killed before the K-th rename; with half of the K-th piece of a file written
``SIGTERM:N``  ``SIGINT:N``             the signal arrives when step N was logged, and was not saved yet
``SIGTERM-within:N`` ``SIGUSR1:N``      the signal arrives in the first micro-batch of step N
``SAVE:N``                              somebody puts a file named SAVE into the directory during step N
``time:N``                              a time limit (there must be one) is over when step N is done
=====================================  =================================================================================
"""

from __future__ import annotations

import atexit
import gc
import itertools
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

import pytest
import tiny
import typer.main

from oxidizr_ref import parallel
from oxidizr_ref.checkpoint import disk
from oxidizr_ref.cli import main as cli_main
from oxidizr_ref.cli import train as cli_train
from oxidizr_ref.cli.report import HeadlessReporter
from oxidizr_ref.fingerprint import fingerprint
from oxidizr_ref.trainer import Trainer

#: For tests that need the forge: where processes cannot fork (Windows) they are skipped, and pytest says so.
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork processes")

_GRACE = 10.0  # seconds the forge itself has to answer


class ForgeError(Exception):
    """The forge did not answer, or a process did not end in time."""


@dataclass(frozen=True)
class Order:
    """A process that is wanted. ``out``, ``err``: files for its output; ``seconds``: after which it is killed."""

    argv: list[str]
    cwd: str
    out: str
    err: str
    moments: str = ""
    small_tiles: bool = True
    env: dict[str, str] = field(default_factory=dict)
    seconds: float = 60.0


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit code (-9: killed), and what it wrote."""

    code: int
    out: str
    err: str

    @property
    def records(self) -> list[dict[str, Any]]:
        """The JSON lines of a headless run, their deterministic fields only."""
        lines = [json.loads(line) for line in self.out.splitlines()]
        return [{key: value for key, value in line.items() if key not in tiny.OF_THE_MACHINE} for line in lines]


# --- in the test ------------------------------------------------------------------------------------------------------


class Forge:
    """The child interpreter, seen from the test."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="forge-")
        self._log = open(Path(self._folder.name, "log"), "w+", encoding="utf-8")  # noqa: SIM115 - closed by close
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            env=tiny.environment(OPENBLAS_NUM_THREADS="1"),  # its helper threads would not survive a fork
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        atexit.register(self.close)

    def run(self, argv: Sequence[object], cwd: Path, **options: Any) -> Ended:
        """A process from its beginning to its end. ``options``: fields of `Order`. Raises ForgeError."""
        out, err = (Path(self._folder.name, name) for name in ("out", "err"))
        order = Order([str(part) for part in argv], str(cwd), str(out), str(err), **options)
        answer = self._ask(json.dumps(asdict(order)), order.seconds + _GRACE)
        ended = Ended(answer["code"], out.read_text(encoding="utf-8"), err.read_text(encoding="utf-8"))
        if answer["late"]:
            what = " ".join(order.argv)
            raise ForgeError(f"oxidizr-ref {what}: killed after {order.seconds} seconds:\n{ended.out}{ended.err}")
        return ended

    def _ask(self, question: str, seconds: float) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        line = ""
        try:
            self.process.stdin.write(question + "\n")
            self.process.stdin.flush()
            if select.select([self.process.stdout], [], [], seconds)[0]:
                line = self.process.stdout.readline()
        except OSError:  # it died before: as below
            pass
        if not line:
            self.process.kill()
            raise ForgeError(f"the forge is dead: {Path(self._folder.name, 'log').read_text(encoding='utf-8')}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End it; the process it may be waiting for ends with it."""
        atexit.unregister(self.close)
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            try:
                pipe.close()
            except BrokenPipeError:
                continue
        try:
            self.process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._log.close()
        self._folder.cleanup()


_forges: list[Forge] = []  # one a test session, started when it is first needed, and anew when it died


def the_forge() -> Forge:
    """The forge of this test session."""
    if _forges and _forges[0].process.poll() is not None:
        _forges.pop().close()
    if not _forges:
        _forges.append(Forge())
    return _forges[0]


def run(argv: Sequence[object], cwd: Path, **options: Any) -> Ended:
    """Run the command line in a process of its own; `Forge.run` says how."""
    return the_forge().run(argv, cwd, **options)


def run_apart(argv: Sequence[object], cwd: Path, moments: str = "") -> Ended:
    """The same with an interpreter of its own and the package's own tiles: `python -m oxidizr_ref`, where nothing is to
    happen to it."""
    program = [__file__, "once", moments] if moments else ["-m", "oxidizr_ref"]
    command = [sys.executable, *program, *map(str, argv)]
    done = subprocess.run(command, cwd=cwd, env=tiny.environment(), capture_output=True, text=True, timeout=300, check=False)
    return Ended(done.returncode, done.stdout, done.stderr)


# --- what happens to a run --------------------------------------------------------------------------------------------


def arrange(moments: str) -> None:
    """Make something happen to this process at each of these moments; the table above says what."""
    for moment in filter(None, moments.split(",")):
        kind, _, number = moment.partition(":")
        if kind in ("logged", "accumulating"):
            tiny.arrange_death(moment)
        else:
            _ARRANGEMENTS[kind](int(number))


def _send(number: signal.Signals) -> None:
    signal.raise_signal(number)  # to this very thread: it has arrived when this returns


def _signal_after(number: signal.Signals) -> Callable[[int], None]:
    def arrange_it(step: int) -> None:
        log = HeadlessReporter.step

        def logged(self: HeadlessReporter, record: dict[str, Any], is_logged: bool) -> None:
            log(self, record, is_logged)
            if record["step"] == step:
                _send(number)

        mock.patch.object(HeadlessReporter, "step", logged).start()

    return arrange_it


def _signal_within(number: signal.Signals) -> Callable[[int], None]:
    def arrange_it(step: int) -> None:
        take, sent = Trainer._take_gradients, list[int]()

        def taking(self: Trainer) -> dict[str, Any]:
            if self.step + 1 == step and not sent:
                sent.append(step)
                _send(number)
            return take(self)

        mock.patch.object(Trainer, "_take_gradients", taking).start()

    return arrange_it


def _ask_for_a_save(step: int) -> None:
    train = Trainer.train_step

    def training(self: Trainer, *arguments: Any) -> dict[str, Any]:
        record = train(self, *arguments)
        if record["step"] == step:
            (self.store.directory / "SAVE").touch()
        return record

    mock.patch.object(Trainer, "train_step", training).start()


def _end_the_time(step: int) -> None:
    def is_up(self: Trainer, _: float) -> bool:
        assert self.options.time_limit is not None
        return self.step >= step

    mock.patch.object(Trainer, "_time_is_up", is_up).start()


def _die_renaming(is_fatal: Callable[[Path, Path], bool]) -> None:
    rename = disk.rename

    def renaming(source: Path, target: Path) -> None:
        if is_fatal(source, target):
            os.kill(os.getpid(), signal.SIGKILL)
        rename(source, target)

    mock.patch.object(disk, "rename", renaming).start()


def _die_naming(step: int) -> None:
    name = f"step_{step}.safetensors"
    _die_renaming(lambda source, target: source.suffix == ".tmp" and target.name == name)


def _die_replacing(count: int) -> None:
    numbers = itertools.count(1)
    _die_renaming(lambda *_: next(numbers) == count)


def _die_writing(count: int) -> None:
    write, done = disk.write_at, [0]

    def writing(descriptor: int, data: disk.Buffer, offset: int) -> None:
        done[0] += 1
        if done[0] == count:
            write(descriptor, memoryview(data)[: len(data) // 2], offset)
            os.kill(os.getpid(), signal.SIGKILL)
        write(descriptor, data, offset)

    mock.patch.object(disk, "write_at", writing).start()


_ARRANGEMENTS: Mapping[str, Callable[[int], None]] = {
    "SIGTERM": _signal_after(signal.SIGTERM),
    "SIGINT": _signal_after(signal.SIGINT),
    "SIGTERM-within": _signal_within(signal.SIGTERM),
    "SIGUSR1": _signal_within(getattr(signal, "SIGUSR1", signal.SIGTERM)),
    "SAVE": _ask_for_a_save,
    "time": _end_the_time,
    "renaming": _die_naming,
    "replacing": _die_replacing,
    "writing": _die_writing,
}


# --- in the child interpreter -----------------------------------------------------------------------------------------


def serve() -> None:
    """Fork a process for every line of stdin, and answer with a line when it ended. Ends with stdin."""
    parallel.set_threads(1)
    fingerprint("cpu")  # of the machine: every process of this one has the same
    command = typer.main.get_command(cli_main.app)  # of the program likewise
    mock.patch.object(typer.main, "get_command", lambda _: command).start()
    threads = parallel._available_cores()
    gc.freeze()  # what a collection does not touch need not be copied by each process
    while question := os.read(0, 1 << 20):
        while not question.endswith(b"\n"):
            question += os.read(0, 1 << 20)
        order = Order(**json.loads(question))
        reading, writing = os.pipe()  # ends when all that hold the writing end have: when the process has ended
        child = os.fork()
        if child == 0:
            os.close(reading)
            parallel.set_threads(threads)
            _become(order)
        os.close(writing)
        ended, _, _ = select.select([reading, 0], [], [], order.seconds)
        if reading not in ended:
            os.kill(child, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os.close(reading)
        os.write(1, (json.dumps({"code": code, "late": reading not in ended}) + "\n").encode())


def _become(order: Order) -> NoReturn:
    """Be the process that was ordered, to its end."""
    code: object = 70
    try:
        os.chdir(order.cwd)
        for number, path in ((1, order.out), (2, order.err)):
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            os.dup2(file, number)
            os.close(file)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.environ.update(order.env)
        if order.small_tiles:
            tiny.shrink_tiles()
        code = _live(order.argv, order.moments)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 70)


def _live(argv: Sequence[str], moments: str) -> object:
    """The command line, from reading its arguments to its exit code, and what an interpreter waits for at its end."""
    cli_train._STARTED, cli_train._SAMPLE_TOKENS = time.monotonic(), 2
    sys.argv = ["oxidizr-ref", *argv]
    arrange(moments)
    code: object = 70
    try:
        cli_main.main()
    except SystemExit as end:
        code = 0 if end.code is None else end.code
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    return code


if __name__ == "__main__":
    if sys.argv[1:2] == ["once"]:
        sys.exit(_live(sys.argv[3:], sys.argv[2]))  # type: ignore[arg-type]
    serve()
