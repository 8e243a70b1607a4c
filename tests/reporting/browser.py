"""A headless Chromium for tests, driven over its DevTools protocol.

The protocol is JSON over a WebSocket, of which only what a client of one local server
needs is written here, so that tests need no package for it.
"""

import base64
import contextlib
import json
import os
import shutil
import socket
import struct
import subprocess
import time
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any, Self

NAMES = ("chromium", "chromium-browser", "google-chrome")
WAIT_SECONDS = 60


def find_chromium() -> str | None:
    """The path of a Chromium of the system; None if there is none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One tab of a Chromium: open a page, run JavaScript in it, look at it.

    `console` has every message of the page, `requests` every address that it fetched.
    """

    def __init__(self, folder: Path) -> None:
        path = find_chromium()
        assert path is not None
        self._log = folder / "chromium.log"
        command = [
            path,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--remote-debugging-port=0",
            f"--user-data-dir={folder / 'profile'}",
            "about:blank",
        ]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=log
            )
        self._next_id = 0
        self.console: list[str] = []
        self.requests: list[str] = []
        port = self._port(folder / "profile" / "DevToolsActivePort")
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json") as answer:
            tabs = json.load(answer)
        target = next(t for t in tabs if t["type"] == "page")
        self._socket = _connect(target["webSocketDebuggerUrl"])
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setFocusEmulationEnabled", enabled=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._socket.close()
        self._process.terminate()
        self._process.wait(timeout=WAIT_SECONDS)

    def _port(self, path: Path) -> int:
        end = time.monotonic() + WAIT_SECONDS
        while time.monotonic() < end:
            if path.exists() and (text := path.read_text()):
                return int(text.split()[0])
            time.sleep(0.05)
        raise TimeoutError(self._log.read_text())

    def call(self, method: str, **parameters: Any) -> Any:
        """Call a method of the protocol and return its result."""
        self._next_id += 1
        message = {"id": self._next_id, "method": method, "params": parameters}
        _send(self._socket, json.dumps(message).encode())
        while True:
            answer = json.loads(_receive(self._socket))
            if answer.get("id") == self._next_id:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            self._note(answer)

    def _note(self, event: dict[str, Any]) -> None:
        given = event.get("params", {})
        match event.get("method"):
            case "Runtime.consoleAPICalled":
                texts = [
                    str(a.get("value", a.get("description"))) for a in given["args"]
                ]
                self.console.append(f"{given['type']}: {' '.join(texts)}")
            case "Runtime.exceptionThrown":
                details = given["exceptionDetails"]
                error = details.get("exception", {}).get("description")
                self.console.append(f"exception: {error or details['text']}")
            case "Log.entryAdded":
                self.console.append(f"log: {given['entry']['text']}")
            case "Network.requestWillBeSent":
                self.requests.append(given["request"]["url"])

    def run(self, expression: str) -> Any:
        """Evaluate JavaScript, which may `await`, and return its value."""
        result = self.call(
            "Runtime.evaluate",
            expression=f"(async () => {{ {expression} }})()",
            awaitPromise=True,
            returnByValue=True,
            userGesture=True,
        )
        if "exceptionDetails" in result:
            raise RuntimeError(json.dumps(result["exceptionDetails"])[:2000])
        return result["result"].get("value")

    def open(
        self, address: str, *, width: int = 1280, height: int = 900, dark: bool = False
    ) -> None:
        """Open a page of ours in a window of this size, and wait until it is ready."""
        self.resize(width, height)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url="about:blank")
        self.console.clear()
        self.requests.clear()
        self.call("Page.navigate", url=address)
        self.wait_for("document.documentElement?.classList.contains('complete')")

    def resize(self, width: int, height: int = 900) -> None:
        """Make the window so large."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )

    def wait_for(self, condition: str) -> None:
        """Wait until an expression of JavaScript is true."""
        end = time.monotonic() + WAIT_SECONDS
        while time.monotonic() < end:
            # A page that is about to be replaced cannot answer.
            with contextlib.suppress(RuntimeError):
                if self.run(f"return Boolean({condition})"):
                    return
            time.sleep(0.05)
        raise TimeoutError(f"{condition}; console: {self.console}")

    def press(self, key: str, code: int, modifiers: int = 0) -> None:
        """Press a key, such as `Tab` (9), `Enter` (13) or `Escape` (27).

        A browser prefers keys to timers, so a page would wait for its timers for as
        long as keys come in, which they do not when a person types.
        """
        text = {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                code=key,
                windowsVirtualKeyCode=code,
                modifiers=modifiers,
                **(text if kind == "keyDown" else {}),
            )
        self.run("await new Promise(done => setTimeout(done))")

    def screenshot(self, path: Path, *, whole: bool = True) -> None:
        """Save a picture of the page."""
        result = (
            self.call(
                "Page.captureScreenshot", format="png", captureBeyondViewport=whole
            )
            if not whole
            else self._whole()
        )
        path.write_bytes(base64.b64decode(result["data"]))

    def _whole(self) -> Any:
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"]}
        return self.call(
            "Page.captureScreenshot",
            format="png",
            captureBeyondViewport=True,
            clip={**clip, "scale": 1},
        )


def _connect(address: str) -> socket.socket:
    host, _, path = address.removeprefix("ws://").partition("/")
    name, _, port = host.partition(":")
    link = socket.create_connection((name, int(port)), timeout=WAIT_SECONDS)
    key = base64.b64encode(os.urandom(16)).decode()
    request = (
        f"GET /{path} HTTP/1.1\r\nHost: {host}\r\nUpgrade: websocket\r\n"
        f"Connection: Upgrade\r\nSec-WebSocket-Key: {key}\r\n"
        "Sec-WebSocket-Version: 13\r\n\r\n"
    )
    link.sendall(request.encode())
    answer = b""
    while not answer.endswith(b"\r\n\r\n"):
        answer += link.recv(1)
    assert b" 101 " in answer, answer
    return link


def _send(link: socket.socket, content: bytes) -> None:
    """Send one text frame; a client masks what it sends."""
    size = len(content)
    head = bytes([0x81])
    if size < 126:
        head += bytes([0x80 | size])
    elif size < 2**16:
        head += bytes([0x80 | 126]) + struct.pack(">H", size)
    else:
        head += bytes([0x80 | 127]) + struct.pack(">Q", size)
    mask = os.urandom(4)
    pattern = mask * (size // 4 + 1)
    masked = bytes(a ^ b for a, b in zip(content, pattern, strict=False))
    link.sendall(head + mask + masked)


def _receive(link: socket.socket) -> bytes:
    """Return the content of one message."""
    content = b""
    while True:
        first, second = _exactly(link, 2)
        size = second & 127
        if size == 126:
            (size,) = struct.unpack(">H", _exactly(link, 2))
        elif size == 127:
            (size,) = struct.unpack(">Q", _exactly(link, 8))
        part = _exactly(link, size)
        if first & 15 in (0, 1, 2):
            content += part
            if first & 128:
                return content


def _exactly(link: socket.socket, size: int) -> bytes:
    parts = []
    while size:
        part = link.recv(size)
        if not part:
            raise ConnectionError("the browser closed the connection")
        parts.append(part)
        size -= len(part)
    return b"".join(parts)
