"""Headless Chromium, driven over its DevTools protocol: one page, what it says on its
console, pictures of it.
"""

import base64
import itertools
import json
import shutil
import subprocess
import time
from contextlib import contextmanager

from websockets.sync.client import connect

START_S = 60


class Page:
    """One tab. ``complaints`` are errors and warnings of the console, exceptions, and
    requests over a network.
    """

    def __init__(self, socket):
        self._socket = socket
        self._numbers = itertools.count()
        self.complaints = []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

        self.send("Emulation.setFocusEmulationEnabled", enabled=True)  # as of a window in front

    def send(self, method, **parameters):
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while (answer := self._receive()).get("id") != number:
            pass

        assert "error" not in answer, answer
        return answer["result"]

    def _receive(self):
        message = json.loads(self._socket.recv(timeout=START_S))
        self._note(message.get("method"), message.get("params", {}))
        return message

    def _note(self, method, details):
        url = details.get("request", {}).get("url", "file:")
        wrong = {
            "Runtime.exceptionThrown": True,
            "Runtime.consoleAPICalled": details.get("type") in ("error", "warning", "assert"),
            "Log.entryAdded": details.get("entry", {}).get("level") in ("error", "warning"),
            "Network.requestWillBeSent": not url.startswith(("file:", "data:")),
        }
        if wrong.get(method):
            self.complaints.append(details)

    def open(self, path, *, width=1280, height=900, scheme="light"):
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        self.send(
            "Emulation.setEmulatedMedia",
            features=[{"name": "prefers-color-scheme", "value": scheme}],
        )
        self.send("Page.navigate", url=path.resolve().as_uri())
        while self._receive().get("method") != "Page.loadEventFired":
            pass

    def value(self, expression):
        """What a JavaScript expression gives."""
        found = self.send(
            "Runtime.evaluate",
            expression=expression,
            returnByValue=True,
            awaitPromise=True,
        )
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def point_at(self, selector, share=0.5):
        """Move the mouse over the first element of a selector, at a share of its width."""
        element = f"document.querySelector({json.dumps(selector)})"
        self.value(f"{element}.scrollIntoView({{block: 'center'}})")
        self.value("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
        x, y = self.value(
            f"(b => [b.x + b.width * {share}, b.y + b.height / 2])({element}.getClientRects()[0])"
        )
        self.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def press(self, key):
        for kind in ("keyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=key)

    def picture(self, path, *, whole=True):
        data = self.send("Page.captureScreenshot", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(data))


@contextmanager
def chromium(directory):
    """A page of a browser of its own, with its profile in ``directory``."""
    program = shutil.which("chromium")
    assert program, "this test needs Debian's chromium: apt-get install chromium"
    options = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--hide-scrollbars",
    ]
    process = subprocess.Popen(
        [
            program,
            *options,
            "--remote-debugging-port=0",
            f"--user-data-dir={directory}",
            "about:blank",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    try:
        port_file = directory / "DevToolsActivePort"
        deadline = time.monotonic() + START_S
        while not (port_file.exists() and port_file.read_text().count("\n")):
            assert process.poll() is None and time.monotonic() < deadline, "chromium did not start"
            time.sleep(0.1)

        port, path = port_file.read_text().split()
        with connect(
            f"ws://127.0.0.1:{port}{path}",
            max_size=None,
            proxy=None,
        ) as browser:
            browser.send(json.dumps({"id": 0, "method": "Target.getTargets"}))
            targets = json.loads(browser.recv(timeout=START_S))["result"]["targetInfos"]

        target = next(one["targetId"] for one in targets if one["type"] == "page")

        with connect(
            f"ws://127.0.0.1:{port}/devtools/page/{target}",
            max_size=None,
            proxy=None,
        ) as socket:
            yield Page(socket)
    finally:
        process.terminate()
        process.wait(timeout=START_S)
