"""The tests that need a browser: skipped, with the reason, where there is none."""

from __future__ import annotations

from pathlib import Path

import chromium
import pytest

_HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of this directory's tests only."""
    if chromium.browser() is not None:
        return
    why = f"no browser: none of {', '.join(chromium.NAMES)} is installed, and CHROMIUM names none"
    for item in items:
        if item.path.is_relative_to(_HERE):
            item.add_marker(pytest.mark.skip(reason=why))
