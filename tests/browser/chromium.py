"""A headless Chromium, driven by its DevTools protocol over two pipes: nothing but the browser itself is needed.

https://chromedevtools.github.io/devtools-protocol/; messages are JSON, each ended by a zero byte.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
_SECONDS = 30.0  # to wait for an answer


def browser() -> str | None:
    """The browser to use: what the environment variable CHROMIUM names, else the first that is installed."""
    named = os.environ.get("CHROMIUM")
    return named or next((found for name in NAMES if (found := shutil.which(name))), None)


class Chromium:
    """One browser process with one page. Requests, console messages and errors of the page are kept in order."""

    def __init__(self) -> None:
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self._seen: list[dict[str, Any]] = []
        self._number, self._session = 0, ""
        self._rest = b""

    def __enter__(self) -> Chromium:
        program = browser()
        assert program is not None
        self._home = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        ours, self._read = os.pipe(), os.pipe()
        self._write = ours
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"]
        flags += ["--remote-debugging-pipe", f"--user-data-dir={self._home.name}", "--disable-background-networking"]
        # The browser reads at descriptor 3 and writes at 4; a shell puts ours there.
        place = f'exec "$0" "$@" 3<&{ours[0]} 4>&{self._read[1]}'
        self._process = subprocess.Popen(
            ["/bin/bash", "-c", place, program, *flags, "about:blank"],
            pass_fds=(ours[0], self._read[1]),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(ours[0])
        os.close(self._read[1])
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._write[1])
        os.close(self._read[0])
        self._home.cleanup()

    # --- the protocol -------------------------------------------------------------------------------------------------

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol. Returns its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._write[1], json.dumps(message).encode() + b"\0")
        answer = self._until(lambda found: found.get("id") == self._number)
        assert "error" not in answer, f"{method}: {answer['error']}"
        result: dict[str, Any] = answer["result"]
        return result

    def _until(self, wanted: Any) -> dict[str, Any]:
        end = time.monotonic() + _SECONDS
        while True:
            while b"\0" in self._rest:
                text, _, self._rest = self._rest.partition(b"\0")
                message = json.loads(text)
                self._note(message)
                if wanted(message):
                    return dict(message)
            ready, _, _ = select.select([self._read[0]], [], [], max(0.0, end - time.monotonic()))
            assert ready, "the browser does not answer"
            data = os.read(self._read[0], 1 << 20)
            assert data, "the browser is gone"
            self._rest += data

    def _note(self, message: dict[str, Any]) -> None:
        method, parameters = message.get("method"), message.get("params", {})
        if method == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            details = parameters["exceptionDetails"]
            self.complaints.append(details.get("exception", {}).get("description", details["text"]))
        elif method == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "warning", "assert"):
            self.complaints.append(str(parameters["args"]))
        elif method == "Log.entryAdded" and parameters["entry"]["level"] in ("error", "warning"):
            self.complaints.append(parameters["entry"]["text"])

    # --- a person's doings --------------------------------------------------------------------------------------------

    def size(self, width: int, height: int, phone: bool = False) -> None:
        """The window, in CSS pixels."""
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=2 if phone else 1,
            mobile=phone,
        )
        self.send("Emulation.setTouchEmulationEnabled", enabled=phone)

    def dark(self, wanted: bool) -> None:
        """What the page is told the reader prefers."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if wanted else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])

    def open(self, path: Path) -> float:
        """Open a file. Returns the seconds until it was drawn."""
        began = time.perf_counter()
        self.send("Page.navigate", url=path.absolute().as_uri())
        self._until(lambda found: found.get("method") == "Page.loadEventFired")
        self.ask("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
        return time.perf_counter() - began

    def arrives(self, url: str) -> None:
        """Wait until the page has gone on to an address by itself. To ask it anything while it is on its way may fail."""
        self._until(lambda found: found.get("method") == "Page.frameNavigated" and found["params"]["frame"]["url"] == url)

    def ask(self, expression: str) -> Any:
        """The value of an expression of JavaScript on the page, promises awaited."""
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def mouse(self, kind: str, x: float, y: float, **more: Any) -> None:
        """``move``, ``press``, ``release`` or ``wheel`` at a place of the window."""
        names = {"move": "mouseMoved", "press": "mousePressed", "release": "mouseReleased", "wheel": "mouseWheel"}
        held = {"button": "left", "clickCount": 1} if kind in ("press", "release") else {}
        self.send("Input.dispatchMouseEvent", type=names[kind], x=x, y=y, **{**held, **more})

    def key(self, key: str) -> None:
        """Press and release a key."""
        text = {"text": key} if len(key) == 1 else {}
        self.send("Input.dispatchKeyEvent", type="keyDown", key=key, **text)
        self.send("Input.dispatchKeyEvent", type="keyUp", key=key)

    def print(self, path: Path) -> Path:
        """The page as it is printed, as PDF."""
        path.write_bytes(base64.b64decode(self.send("Page.printToPDF", printBackground=False)["data"]))
        return path
