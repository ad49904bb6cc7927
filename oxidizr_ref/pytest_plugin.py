"""For the tests of other projects: a fixture that holds their numbers against a golden trace.

Installed with the package, so ``pytest --oxidizr-trace reference.safetensors`` is enough for a test such as::

    def test_attention(golden):
        scores = my_attention(golden.array("layers.0.self_attn.q"), golden.array("layers.0.self_attn.k"))
        golden.check({"layers.0.self_attn.scores": scores}, precision="f32")

Without the option such tests are skipped, and say so.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    import numpy as np

    from oxidizr_ref.trace.budget import Budget
    from oxidizr_ref.trace.compare import Comparison
    from oxidizr_ref.trace.file import Trace


class Golden:
    """A reference trace in a test run. Budgets are computed once for each precision.

    path: the trace. names: a map of names, for all comparisons: see `trace.compare`.
    """

    def __init__(self, path: str, names: str | None = None) -> None:
        self.path, self.names = path, names
        self._budgets: dict[str, dict[str, Budget]] = {}

    @cached_property
    def trace(self) -> Trace:
        """The trace itself."""
        from oxidizr_ref.trace.file import Trace

        return Trace(self.path)

    def array(self, name: str) -> np.ndarray[Any, Any]:
        """A copy of the numbers of a name, to feed a test with."""
        return self.trace.array(name).copy()

    def compare(self, other: Any, precision: str = "f32") -> Comparison:
        """Hold a trace (a path) or arrays by name against the reference."""
        from oxidizr_ref.trace.budget import budgets
        from oxidizr_ref.trace.compare import compare

        if precision not in self._budgets:
            self._budgets[precision] = budgets(self.trace, precision)
        return compare(self.trace, other, self.names, precision, granted=self._budgets[precision])

    def check(self, other: Any | Mapping[str, Any], precision: str = "f32") -> None:
        """Fail the test, with the report of the comparison, unless all numbers of ``other`` are within their budgets."""
        __tracebackhide__ = True
        found = self.compare(other, precision)
        if not found.agrees:
            from oxidizr_ref.trace.report import report

            pytest.fail(report(found), pytrace=False)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Two options, under a heading of their own."""
    group = parser.getgroup("oxidizr_ref")
    group.addoption("--oxidizr-trace", metavar="FILE", help="the reference trace of the fixture `golden`")
    group.addoption("--oxidizr-map", metavar="FILE|NAME", help="how the tested program's names correspond to the trace's")


@pytest.fixture(scope="session")
def golden(request: pytest.FixtureRequest) -> Golden:
    """The reference trace of ``--oxidizr-trace``; a test that wants it is skipped without one."""
    path = request.config.getoption("--oxidizr-trace")
    if path is None:
        pytest.skip("needs --oxidizr-trace FILE: a trace of `oxidizr-ref trace record`")
    return Golden(path, request.config.getoption("--oxidizr-map"))
