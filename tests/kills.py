"""SIGKILL at every moment, and what is found afterwards: `test_kill_matrix` runs this in a process of its own.

A process that forks should have one thread and little memory, and pytest's has neither. ``python kills.py`` examines all
scenarios of `promises` and prints what it did as JSON; it fails at the first promise that is not kept.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from faults import (
    Call,
    Event,
    Fault,
    Key,
    Say,
    State,
    cuts,
    fast_place,
    in_a_fork,
    key,
    kill,
    look_on,
    restore,
    snapshot,
    tapped,
)
from promises import (
    Ledger,
    Scenario,
    carry_out,
    check_crash,
    check_end,
    check_found,
    found_by,
    recovery,
    scenarios,
    tiny_world,
)

if TYPE_CHECKING:
    import tiny

Moment = tuple[int, int | None]  # the number of a call, and where to cut it (None: before it)
Work = Callable[[Path, Say], None]


@dataclass(frozen=True)
class Outlook:
    """A moment to die at, and what that would leave (None: half a write): the directory and the settled account of it."""

    moment: Moment
    left: tuple[State, Ledger] | None


class Matrix:
    """Kills, examines and recovers, and remembers what it has done already.

    The work of a scenario is killed at every moment, and so is the recovery from what that leaves; then it is recovered from
    for good. A recovery is killed at those moments only that leave something new, which no recovery has begun with: a state
    of the directory (but for what is inside temporary files, which are removed unread) and an account of it. ``thorough``:
    at every moment, whatever it leaves, and at several places within every write.
    """

    def __init__(self, directory: Path, thorough: bool = False) -> None:
        self._directory, self._thorough = directory, thorough
        #: What died, when, and what was there when it began.
        self.kills: set[tuple[str, Moment, Key]] = set()
        #: What was recovered from: what was there, what had been acknowledged.
        self.recovered: set[tuple[Key, Ledger]] = set()
        self._interrupted: set[tuple[Key, Ledger]] = set()  # those of them whose recovery was killed, too

    def examine(self, scenario: Scenario) -> None:
        """Kill the scenario's work at every moment, and the recovery from what each kill leaves."""
        scenario.place(self._directory)
        outlooks, _ = self._rehearse(scenario.work, scenario.ledger, torn=True)
        for outlook in outlooks:
            scenario.place(self._directory)
            left = self._kill(f"{scenario.name}, work", scenario.work, scenario.prior, scenario.ledger, outlook)
            self._recover(*left)

    def _recover(self, state: State, ledger: Ledger, be_killed: bool = True) -> None:
        """Recover, and look at what that makes. Then, each time from the same state, be killed while recovering; and recover
        from that for good."""
        known = (_without_litter(state), ledger)
        if known in self._interrupted or (known in self.recovered and not be_killed):
            return
        self.recovered.add(known)
        until, work = recovery(state, ledger)
        restore(state, self._directory)
        outlooks, said = self._rehearse(work, ledger, torn=self._thorough)
        with _telling(f"recovery of {ledger.tag} to {until} from {sorted(state)}"):
            check_found(state, ledger, found_by(said))
            check_end(snapshot(self._directory), ledger.after(said), until)
        if not be_killed:
            return
        self._interrupted.add(known)
        for outlook in outlooks:
            if self._thorough or outlook.left is None or not self._is_known(*outlook.left):
                restore(state, self._directory)
                left = self._kill(f"recovery of {ledger.tag} to {until}", work, state, ledger, outlook)
                self._recover(*left, be_killed=False)

    def _is_known(self, state: State, ledger: Ledger) -> bool:
        return (_without_litter(state), ledger) in self.recovered

    def _rehearse(self, work: Work, ledger: Ledger, torn: bool) -> tuple[list[Outlook], list[Event]]:
        """Do the work undisturbed. Returns when it can be killed, and what it said.

        That is before every call that changes something, within every write, and before the last call of all.
        """
        said: list[Event] = []
        outlooks: list[Outlook] = []

        def left() -> tuple[State, Ledger]:
            state = snapshot(self._directory)
            return state, ledger.after(said).settled(state)

        def look(call: Call) -> Any:
            if call.changes:
                outlooks.append(Outlook((call.number, None), left()))
            if torn:
                outlooks.extend(Outlook((call.number, cut), None) for cut in self._cuts(call))
            return call.carry_out()

        with tapped(look) as calls:
            work(self._directory, lambda *event: said.append(list(event)))
        if not calls[-1].changes:
            outlooks.append(Outlook((len(calls) - 1, None), left()))
        return outlooks, said

    def _cuts(self, call: Call) -> list[int]:
        """In a temporary file, which is removed unread, one cut is like another."""
        return cuts(call) if self._thorough or call.path.suffix != ".tmp" else cuts(call)[1:2]

    def _kill(self, what: str, work: Work, prior: State, ledger: Ledger, outlook: Outlook) -> tuple[State, Ledger]:
        """Do the work in a process that dies at this moment. Returns what it leaves, and the settled account of that."""

        def doomed(say: Say) -> None:
            with tapped(kill(*outlook.moment)):
                work(self._directory, say)

        status, said = in_a_fork(doomed)
        self.kills.add((what, outlook.moment, key(prior)))
        state, account = snapshot(self._directory), ledger.after(said)
        with _telling(f"{what}, killed at {outlook.moment}"):
            assert status == -signal.SIGKILL, f"it ended with {status}"
            check_crash(state, account)
        return state, account.settled(state)


def _without_litter(state: State) -> Key:
    return key({name: b"" if name.endswith(".tmp") else data for name, data in state.items()})


@contextmanager
def _telling(where: str) -> Iterator[None]:
    try:
        yield
    except AssertionError as error:
        raise AssertionError(f"{where}: {error}") from None


# --- runs of the real trainer -----------------------------------------------------------------------------------------


class Training:
    """The same with `Trainer` itself, on a model of some thousand parameters: less often, and judged by the bytes alone."""

    def __init__(self, place: Path) -> None:
        import tiny  # here, because it imports all of the package: a forked process copies what its parent has in memory

        self._run = tiny.make_run(place, trainer={"max_steps": 4, "save_interval": 2, "max_checkpoints": 1})
        self._results = tiny.step_files, tiny.metrics_of
        self._changes = [call.number for call in _train(self._run) if call.changes]
        self._undisturbed = [result(self._run.directory) for result in self._results]
        self.kills = 0

    def examine(self, count: int) -> None:
        """Kill a run before so many of its calls, spread evenly, and what continues it before another one; let it end."""
        for index in range(count):
            fatal = (self._changes[index * len(self._changes) // count], 1 + (7 * index) % 23)
            run = self._run.into(f"killed-{index}")
            for number in fatal:
                status, _ = in_a_fork(partial(_train, run, kill(number)))
                assert status == -signal.SIGKILL, f"it ended with {status} at call {number}"
                self.kills += 1
            status, _ = in_a_fork(partial(_train, run, look_on))
            assert status == 0, f"after kills at calls {fatal} the run ended with {status}"
            left = [result(run.directory) for result in self._results]
            assert left == self._undisturbed, f"after kills at calls {fatal} other bytes were made"
            litter = [name for name in snapshot(run.directory) if name.endswith(".tmp")]
            assert not litter, f"after kills at calls {fatal} there is {litter}"


def _train(run: tiny.Run, fault: Fault = look_on, _say: Say | None = None) -> list[Call]:
    """Train to the end, in silence. Returns the calls."""
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere), tapped(fault) as calls:
        code = run.train("--resume", "auto", "--threads", 1)
    assert code == 0, f"exit code {code}"
    return calls


def main() -> None:
    """Examine, and print the counts."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--thorough", action="store_true")
    options.add_argument("--training", type=int, metavar="KILLS", help="kill the real trainer instead, so many times")
    options.add_argument("--run", nargs=2, metavar=("DIRECTORY", "JSON"), help="kill nothing: carry out a run, and no more")
    chosen = options.parse_args()
    if chosen.run:
        directory, keywords = Path(chosen.run[0]), json.loads(chosen.run[1])
        with tiny_world():
            carry_out(directory, lambda *event: print(json.dumps(event), flush=True), **keywords)
        return
    with tempfile.TemporaryDirectory(dir=fast_place()) as place, tiny_world():
        if chosen.training:
            training = Training(Path(place))
            training.examine(chosen.training)
            print(json.dumps({"kills": training.kills}))
        else:
            matrix = Matrix(Path(place) / "run", chosen.thorough)
            gc.freeze()  # what is there already is not looked through, and so not copied, in every fork
            for scenario in scenarios().values():
                matrix.examine(scenario)
            print(json.dumps({"kills": len(matrix.kills), "states": len(matrix.recovered)}))


if __name__ == "__main__":
    main()
