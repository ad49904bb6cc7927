"""What all tests share: how Hypothesis searches, where a test computes, and that none leaves other threads behind."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

# Derandomized: a suite that guards bit-exact training may not itself depend on chance. ``--hypothesis-profile=long``
# searches a hundred times wider, with fresh examples in every run.
# A fixture that says where a test computes says the same for all of its examples.
_same = [HealthCheck.function_scoped_fixture]
settings.register_profile(
    "short", deadline=None, derandomize=True, print_blob=True, max_examples=20, suppress_health_check=_same
)
settings.register_profile("long", deadline=None, print_blob=True, max_examples=3000, suppress_health_check=_same)
settings.load_profile("short")


def pytest_report_header(config: pytest.Config) -> str | None:
    """What is left out is said, also where tests run on several cores: there pytest does not count it."""
    chosen = config.getoption("markexpr")
    return f"tests chosen with -m: {chosen}" if chosen else None


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What runs on the stand-in for CUDA is `thorough`; what needs a CUDA device is skipped without one."""
    for item in items:
        parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
        if any(isinstance(value, str) and value == "stand-in" for value in parameters):
            item.add_marker(pytest.mark.thorough)
    of_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not of_gpu:
        return
    from oxidizr_ref import backend  # here, so that runs without such tests do not pay for the import at collection

    why = backend._why_no_gpu()
    if why is not None:
        for item in of_gpu:
            item.add_marker(pytest.mark.skip(reason=f"no CUDA device to run on: {why}"))


@pytest.fixture(autouse=True, scope="session")
def _caches_of_their_own(tmp_path_factory: pytest.TempPathFactory) -> None:
    """No test writes to, or believes, the caches of whoever runs it."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("caches"))


@pytest.fixture(autouse=True)
def _same_threads_afterwards() -> Iterator[None]:
    from oxidizr_ref import parallel  # here, so that tests that need no arrays do not pay for the import at collection

    before = parallel.get_threads()
    yield
    parallel.set_threads(before)


@pytest.fixture(params=["numpy", "stand-in", pytest.param("cupy", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Runs the test on NumPy, on the stand-in for CUDA, and on CuPy: ``"cpu"`` or ``"gpu"``. See `devices`."""
    import devices

    with devices.computing_on(request.param, monkeypatch) as where:
        yield where


@pytest.fixture
def plain_terminal_of_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """What tables are made for."""
    monkeypatch.setenv("COLUMNS", "80")
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
