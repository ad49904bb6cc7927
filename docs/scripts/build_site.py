"""Builds the site into docs/_build/html, with warnings as errors: ``python docs/scripts/build_site.py``.

Needs ``pip install -e ".[test,docs]"``. With ``--serve`` it is shown at an address of this machine: in some browsers a page
from the disk may not read what its search needs.
"""

from __future__ import annotations

import argparse
import functools
import http.server
import shutil
import subprocess
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
BUILD = REPOSITORY / "docs" / "_build"
HTML = BUILD / "html"


def build() -> int:
    """Build everything anew. Returns the exit code of Sphinx, which prints what is wrong."""
    shutil.rmtree(BUILD, ignore_errors=True)
    where = ["-c", str(REPOSITORY / "docs"), "-d", str(BUILD / "doctrees"), str(REPOSITORY), str(HTML)]
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "sphinx", "-b", "html", "-q", "-W", "--keep-going", *where], check=False)
    print(f"built in {time.monotonic() - began:.0f} s: {HTML.relative_to(REPOSITORY)}/index.html")
    return done.returncode


def server(port: int = 0) -> http.server.ThreadingHTTPServer:
    """A server of the built site on this machine; port 0 takes any that is free."""
    handler = functools.partial(_Quiet, directory=str(HTML))
    return http.server.ThreadingHTTPServer(("127.0.0.1", port), handler)


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Say nothing of every request."""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--serve", action="store_true", help="show it at an address of this machine afterwards")
    wishes = parser.parse_args()
    failed = build()
    if wishes.serve and not failed:
        with server(8000) as serving:
            print("http://127.0.0.1:8000 (Ctrl-C ends)")
            serving.serve_forever()
    sys.exit(failed)
