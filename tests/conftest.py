"""What all tests share: how Hypothesis searches, and that no test leaves another number of threads behind."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import settings

# Derandomized: a suite that guards bit-exact training may not itself depend on chance. ``--hypothesis-profile=long``
# searches a hundred times wider, with fresh examples in every run.
settings.register_profile("short", deadline=None, derandomize=True, print_blob=True, max_examples=20)
settings.register_profile("long", deadline=None, print_blob=True, max_examples=3000)
settings.load_profile("short")


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


@pytest.fixture
def plain_terminal_of_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """What tables are made for."""
    monkeypatch.setenv("COLUMNS", "80")
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
