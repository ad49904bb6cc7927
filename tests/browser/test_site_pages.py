"""The documentation site in a real browser, on a desk and on a phone. `docs/scripts/build_site.py` builds it first."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import chromium
import pytest

pytestmark = pytest.mark.browser

REPOSITORY = Path(__file__).parents[2]
HTML = REPOSITORY / "docs" / "_build" / "html"
SIZES = {"desk": (1280, 900, False), "phone": (390, 844, True)}
_DRAWN = "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"
#: What sticks out of the window to the right, and is in nothing of the article that scrolls by itself.
_WIDE = """
[...document.querySelectorAll('article *')].filter(e => {
  if (e.getBoundingClientRect().right <= window.innerWidth + 1) return false;
  for (let p = e; p.tagName !== 'ARTICLE'; p = p.parentElement)
    if (getComputedStyle(p).overflowX !== 'visible' && p.getBoundingClientRect().right <= window.innerWidth + 1)
      return false;
  return true;
}).map(e => e.outerHTML.slice(0, 80))
"""


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Of the built site, served on this machine."""
    if not (HTML / "index.html").exists():
        pytest.skip("the site is not built: python docs/scripts/build_site.py")
    sys.path.insert(0, str(REPOSITORY / "docs" / "scripts"))
    try:
        import build_site
    finally:
        sys.path.pop(0)
    with build_site.server() as serving:
        thread = threading.Thread(target=serving.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{serving.server_port}/"
        serving.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def page() -> Iterator[chromium.Chromium]:
    with chromium.Chromium() as browser:
        yield browser


def go(page: chromium.Chromium, url: str) -> None:
    page.send("Page.navigate", url=url)
    until(page, f"document.readyState === 'complete' && location.href.startsWith({url!r})")
    page.ask(_DRAWN)


def until(page: chromium.Chromium, condition: str, seconds: float = 20.0) -> Any:
    """Wait for a condition of the page."""
    end = time.monotonic() + seconds
    while not (found := page.ask(condition)):
        assert time.monotonic() < end, condition
        time.sleep(0.05)
    return found


@pytest.mark.parametrize("size", SIZES)
def test_no_page_complains_scrolls_sideways_or_asks_for_anything_elsewhere(page, address, size):
    page.size(*SIZES[size])
    empty, wide = [], {}
    for path in sorted(HTML.rglob("*.html")):
        name = path.relative_to(HTML).as_posix()
        if not name.startswith(("_", "files/")) and name != "index.html":
            go(page, address + name)
            if not page.ask("document.querySelector('article h1')?.textContent"):
                empty.append(name)
            if page.ask("document.documentElement.scrollWidth > window.innerWidth") or page.ask(_WIDE):
                wide[name] = page.ask(_WIDE)[:3]
    assert (empty, wide) == (["search.html"], {})  # whose words come with a search: the next test
    assert page.complaints == []
    assert [request for request in page.requests if not request.startswith((address, "data:"))] == []


@pytest.mark.parametrize("size", SIZES)
def test_the_search_finds_a_page_by_its_words(page, address, size):
    page.size(*SIZES[size])
    go(page, address + "search.html?q=quarantine")
    found = until(page, "[...document.querySelectorAll('#search-results li a')].map(a => a.getAttribute('href'))")
    assert any("checkpoints.html" in link for link in found)
    assert page.complaints == []


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_equations_are_drawn_and_follow_the_reader_s_colours(page, address, dark):
    page.size(*SIZES["desk"])
    page.dark(dark)
    go(page, address + "docs/layers/mamba3.html")
    heights = page.ask("[...document.querySelectorAll('.equation math')].map(m => m.getBoundingClientRect().height)")
    color = page.ask("getComputedStyle(document.querySelector('.equation math')).color")
    assert max(heights) > 2 * min(heights) > 30  # of an equation of several lines, and of one line
    assert (sum(int(part) for part in color[4:-1].split(",")) > 384) == dark
    page.dark(False)


def test_the_address_of_the_site_leads_to_its_first_page(page, address):
    page.send("Page.navigate", url=address)
    page.arrives(f"{address}docs/index.html")
    until(page, "document.readyState === 'complete' && document.querySelector('article h1') !== null")
