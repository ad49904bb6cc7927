"""Every call to the file system fails once, with every usual error: it is told in a typed error, and nothing is lost.

The promises are those of `promises`, as after a kill, and more: a failed process lives on, so it must not leave temporary
files, open descriptors or a lock that is held; and what it acknowledged must be on the disk at the very least (see `power`).
"""

from __future__ import annotations

import errno
import functools
import itertools
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
from faults import (
    Call,
    Event,
    Fault,
    Key,
    State,
    cuts,
    fail,
    fail_where,
    fast_place,
    key,
    look_on,
    restore,
    snapshot,
    tapped,
    write_short,
    write_short_then_fail,
)
from power import Machine, Recorder, Said
from promises import (
    Ledger,
    Scenario,
    carry_out,
    check_crash,
    check_end,
    check_found,
    file_bytes,
    found_by,
    recovery,
    scenarios,
    silent,
    tiny_world,
)

from oxidizr_ref.checkpoint.store import CheckpointStore
from oxidizr_ref.errors import CheckpointError, DamagedError, OxidizrError

SCENARIOS = scenarios()
CODES = [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EINTR, errno.EMFILE, errno.EROFS, errno.EACCES]
DESCRIPTORS = Path("/proc/self/fd")


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory in memory, in the tiny world."""
    with tiny_world(), tempfile.TemporaryDirectory(dir=fast_place()) as directory:
        yield Path(directory)


class Matrix:
    """Does the work of a scenario, each time with another fault, and finds what is `wrong` then."""

    def __init__(self, place: Path, scenario: Scenario) -> None:
        self._place, self._directory, self._scenario = place, place / "run", scenario
        self._recovered: set[tuple[Key, Ledger]] = set()
        self.wrong: list[str] = []
        self.said: list[Event] = []  # by the last work
        restore({}, place)
        scenario.place(self._directory)
        with tapped(look_on) as calls:
            scenario.work(self._directory, silent)
        self.calls = calls

    def try_with(self, call: Call, what: str, fault: Fault) -> None:
        """Note what is wrong when the work is done with this fault at this call."""
        try:
            self._work_with(call, fault)
        except Exception as error:
            self.wrong.append(f"call {call.number}, {call.name} of {call.path.name}, {what}: {error!r:.300}")

    def _work_with(self, call: Call, fault: Fault) -> None:
        restore({}, self._place)
        self._scenario.place(self._directory)
        recorder = Recorder(self._place, snapshot(self._place), fault)
        machine = Machine(snapshot(self._place))
        open_before = _open_descriptors()
        try:
            with tapped(recorder):
                self._scenario.work(self._directory, recorder.say)
        except OxidizrError:
            pass
        assert _open_descriptors() <= open_before, "a descriptor is left open"  # fewer: another test's was collected
        state = snapshot(self._directory)
        litter = [name for name in state if name.endswith(".tmp") and name not in self._scenario.prior]
        assert not litter or call.name == "unlink", f"left behind: {litter}"
        for operation in recorder.operations:
            machine.happen(operation)
        self.said = [operation.event for operation in recorder.operations if isinstance(operation, Said)]
        ledger = _without_unreadable(self._scenario.ledger.after(self.said), call, state)
        check_crash(state, ledger)
        check_crash(_below("run/", machine.surely()), ledger)
        self._recover(state, ledger.settled(state))

    def _recover(self, state: State, ledger: Ledger) -> None:
        """With the lock, as it were left, in the same process: the next run works."""
        if (key(state), ledger) in self._recovered:
            return
        self._recovered.add((key(state), ledger))
        until, recover = recovery(state, ledger)
        said: list[Event] = []
        recover(self._directory, lambda *event: said.append(list(event)))
        check_found(state, ledger, found_by(said))
        check_end(snapshot(self._directory), ledger.after(said), until)


def _open_descriptors() -> int:
    return len(os.listdir(DESCRIPTORS)) if DESCRIPTORS.is_dir() else 0


def _below(folder: str, state: State) -> State:
    return {name.removeprefix(folder): data for name, data in state.items() if name.startswith(folder)}


def _without_unreadable(ledger: Ledger, call: Call, state: State) -> Ledger:
    """A file that cannot be read for once counts as damaged: then it is in quarantine, whole as it is."""
    aside = {data for name, data in state.items() if name.startswith("quarantine/")}
    gone = {file for file in ledger.saved if call.path.name == f"step_{file[0]}.safetensors" and file_bytes(*file) in aside}
    damaged = ledger.damaged | {file_bytes(*file) for file in gone}
    return replace(ledger, saved=ledger.saved - gone, damaged=damaged)


# --- whatever a run does ----------------------------------------------------------------------------------------------


@pytest.mark.thorough
@pytest.mark.parametrize("name", sorted(SCENARIOS))
def test_a_call_that_fails_is_told_loses_nothing_and_the_next_run_works(place: Path, name: str) -> None:
    """Each call with one of the errors, in turn."""
    matrix = Matrix(place, SCENARIOS[name])
    for call in matrix.calls:
        code = CODES[call.number % len(CODES)]
        matrix.try_with(call, errno.errorcode[code], fail(call.number, code))
    assert not matrix.wrong, "\n".join(matrix.wrong)


@pytest.mark.long
@pytest.mark.parametrize("name", sorted(SCENARIOS))
def test_a_call_that_fails_with_any_error_is_told_loses_nothing_and_the_next_run_works(place: Path, name: str) -> None:
    matrix = Matrix(place, SCENARIOS[name])
    for call in matrix.calls:
        for code in CODES:
            matrix.try_with(call, errno.errorcode[code], fail(call.number, code))
        for cut in cuts(call):
            matrix.try_with(call, f"{cut} bytes", write_short_then_fail(call.number, cut, errno.ENOSPC))
    assert not matrix.wrong, "\n".join(matrix.wrong)


# --- a run that goes on -----------------------------------------------------------------------------------------------


@pytest.fixture
def going_on(place: Path) -> Matrix:
    """Two saves by a run that goes on when something cannot be written."""
    prior = SCENARIOS["a run that only ends"]
    return Matrix(place, replace(prior, work=functools.partial(carry_out, until=8, stubborn=True)))


def _while_training(matrix: Matrix) -> list[Call]:
    """The calls from the first metric line on."""
    first = next(call.number for call in matrix.calls if call.path.name == "metrics.jsonl" and call.changes)
    return matrix.calls[first:]


def test_a_run_goes_on_after_any_failed_call_and_loses_no_line_and_one_save_at_most(going_on: Matrix) -> None:
    training = _while_training(going_on)
    last_line = max(call.number for call in training if call.path.name == "metrics.jsonl" and call.changes)
    for call in training:
        for code in (errno.EIO, CODES[call.number % len(CODES)]):
            going_on.try_with(call, errno.errorcode[code], fail(call.number, code))
            if call.number <= last_line and ["saved", 8, "a"] not in going_on.said:
                going_on.wrong.append(f"call {call.number}, {call.name}: the save after it failed, too")
    assert not going_on.wrong, "\n".join(going_on.wrong)


def test_a_disk_that_takes_a_part_of_a_write_and_then_nothing_makes_no_half_line_and_no_half_file(going_on: Matrix) -> None:
    for call in _while_training(going_on):
        for cut in cuts(call):
            for code in (errno.ENOSPC, errno.EIO):
                fault = write_short_then_fail(call.number, cut, code)
                going_on.try_with(call, f"{cut} bytes, then {errno.errorcode[code]}", fault)
    assert not going_on.wrong, "\n".join(going_on.wrong)


def test_a_write_that_takes_a_part_only_is_carried_on_with_unnoticed(going_on: Matrix) -> None:
    for call in going_on.calls:
        for cut in cuts(call):
            going_on.try_with(call, f"{cut} bytes", write_short(call.number, cut))
            assert [event for event in going_on.said if event[0] == "saved"] == [["saved", 6, "a"], ["saved", 8, "a"]]
    assert not going_on.wrong, "\n".join(going_on.wrong)


# --- reading ----------------------------------------------------------------------------------------------------------


def _calls_reading(directory: Path, name: str) -> list[Call]:
    with tapped(look_on) as calls:
        CheckpointStore(directory).find("auto")
    return [call for call in calls if call.path.name == name]


def test_auto_goes_on_from_the_older_file_when_the_disk_cannot_read_the_newest(place: Path) -> None:
    directory = SCENARIOS["a run that only ends"].place(place / "run")
    before = snapshot(directory)
    calls = _calls_reading(directory, "step_4.safetensors")
    assert {call.name for call in calls} == {"open", "fstat", "preadv", "close"}
    for call in calls:
        with tapped(fail(call.number, errno.EIO)):
            found = CheckpointStore(directory).find("auto")
        assert found is not None and found.path.name == "step_2.safetensors"
        assert [path.name for path, _ in found.damaged] == ["step_4.safetensors"]
    assert snapshot(directory) == before


@pytest.mark.parametrize("code", [errno.EMFILE, errno.EACCES, errno.EINTR])
def test_auto_goes_nowhere_when_this_process_may_not_read_the_newest_file(place: Path, code: int) -> None:
    """Nothing is wrong with the file then: to go on from an older one would throw work away."""
    directory = SCENARIOS["a run that only ends"].place(place / "run")
    before = snapshot(directory)
    for call in _calls_reading(directory, "step_4.safetensors"):
        with tapped(fail(call.number, code)), pytest.raises(CheckpointError, match=os.strerror(code)) as caught:
            CheckpointStore(directory).find("auto")
        assert not isinstance(caught.value, DamagedError)
    assert snapshot(directory) == before


# --- training ---------------------------------------------------------------------------------------------------------


def _is_a_write_to(*names: str) -> Callable[[Call], bool]:
    """Whether a call writes to (the temporary file of) one of these."""
    pattern = re.compile("|".join(rf"\.?{re.escape(name)}(\.[0-9]+\.tmp)?" for name in names))
    return lambda call: call.name == "pwrite" and bool(pattern.fullmatch(call.path.name))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tiny.Run:
    run = _run(tmp_path_factory.mktemp("undisturbed"))
    assert run.train() == 0
    return run


def _run(root: Path, background: bool = False) -> tiny.Run:
    trainer = {"max_steps": 8, "save_interval": 2, "async_save": background}
    return tiny.make_run(root, trainer=trainer)


def _warnings(capsys: pytest.CaptureFixture[str]) -> list[str]:
    err = capsys.readouterr().err
    assert "Traceback" not in err
    return [text for text in err.splitlines() if "warning" in text]


@pytest.mark.parametrize("background", [False, True])
def test_training_goes_on_past_saves_that_fail_tells_each_in_a_line_and_exits_0_when_the_last_is_saved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], undisturbed: tiny.Run, background: bool
) -> None:
    run = _run(tmp_path, background)
    capsys.readouterr()
    with tapped(fail_where(_is_a_write_to("step_4.safetensors", "step_6.safetensors"), errno.ENOSPC)):
        assert run.train() == 0
    first, second = _warnings(capsys)
    assert "step_4.safetensors" in first and "step_6.safetensors" in second
    assert all("training goes on" in text and os.strerror(errno.ENOSPC) in text for text in (first, second))
    expected = tiny.step_files(undisturbed.directory)
    assert tiny.step_files(run.directory) == {step: expected[step] for step in (2, 8)}
    assert run.metrics() == undisturbed.metrics()
    assert [name for name in snapshot(run.directory) if name.endswith(".tmp")] == []


@pytest.mark.parametrize("background", [False, True])
def test_training_whose_last_save_fails_exits_1_leaves_the_files_before_and_is_resumed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], undisturbed: tiny.Run, background: bool
) -> None:
    run = _run(tmp_path, background)
    with tapped(fail_where(_is_a_write_to("step_8.safetensors"), errno.EIO)):
        assert run.train() == 1
    assert "step_8.safetensors" in capsys.readouterr().err.splitlines()[-1]
    expected = tiny.step_files(undisturbed.directory)
    assert tiny.step_files(run.directory) == {step: expected[step] for step in (2, 4, 6)}
    assert run.train("--resume", "auto") == 0
    assert tiny.step_files(run.directory) == expected
    assert run.metrics() == undisturbed.metrics()


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize(("first", "last"), [(1, 3), (2, 2), (3, 6)])
def test_lines_that_could_not_be_appended_are_written_when_they_can_be(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    undisturbed: tiny.Run,
    background: bool,
    first: int,
    last: int,
) -> None:
    """The disk takes no metrics from the first try to the last; in between, saves fail as well, which need them."""
    run = _run(tmp_path, background)
    is_a_line, tries = _is_a_write_to("metrics.jsonl"), itertools.count(1)
    capsys.readouterr()
    with tapped(fail_where(lambda call: is_a_line(call) and first <= next(tries) <= last, errno.EDQUOT)):
        assert run.train() == 0
    assert run.metrics() == undisturbed.metrics()
    assert len(_warnings(capsys)) >= 1
    assert tiny.step_files(run.directory).items() <= tiny.step_files(undisturbed.directory).items()
    assert 8 in run.steps()


def test_lines_that_could_never_be_appended_end_in_exit_code_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = _run(tmp_path)
    with tapped(fail_where(_is_a_write_to("metrics.jsonl"), errno.ENOSPC)):
        assert run.train() == 1
    assert run.steps() == []  # no file appears before its lines are on the disk
    assert "Traceback" not in capsys.readouterr().err
    assert run.train("--resume", "auto") == 0
    assert [record["step"] for record in run.metrics()][:8] == [1, 2, 3, 4, 5, 6, 7, 8]
