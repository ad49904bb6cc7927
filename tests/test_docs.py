"""The documentation says what the code does, as far as that can be checked in seconds."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PAGES = [*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/**/*.md"), *REPOSITORY.glob("notebooks/*.md")]


def test_the_page_of_config_keys_is_what_its_script_writes():
    script = REPOSITORY / "docs" / "scripts" / "configuration.py"
    subprocess.run([sys.executable, str(script), "--check"], check=True)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(REPOSITORY).as_posix())
def test_every_relative_link_leads_somewhere(page):
    links = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_every_path_of_the_readmes_tree_exists():
    tree = (REPOSITORY / "README.md").read_text(encoding="utf-8").partition("```text\noxidizr_ref/")[2].partition("```")[0]
    names = re.findall(r"^(\s*)((?:[\w*]+(?:/|\.py) ?)+)", tree, flags=re.MULTILINE)
    found = [(REPOSITORY / ("oxidizr_ref" if indent else "."), name) for indent, group in names for name in group.split()]
    assert len(found) > 25
    assert [name for base, name in found if not list(base.glob(name.rstrip("/")))] == []
