"""A headless Chromium that tests drive by its DevTools protocol; every wait has a limit."""

import asyncio
import base64
import json
import shutil
import subprocess
import time
import urllib.request
from contextlib import contextmanager
from itertools import count

from tornado.websocket import websocket_connect

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
LIMIT_S = 60
"""Maximum time of each wait."""

_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--remote-debugging-port=0"),
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)


@contextmanager
def open_page(url, folder, size=(1300, 1000)):
    """Open a page in a new browser, which keeps its files, and downloads, in a folder."""
    flags = (f"--user-data-dir={folder / 'profile'}", "--window-size={},{}".format(*size))
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([CHROMIUM, *_FLAGS, *flags, "about:blank"], **quiet)
    loop = asyncio.new_event_loop()
    try:
        page = Page(loop, _tab_of(folder / "profile" / "DevToolsActivePort"), folder)
        page.open(url)
        yield page
        page.close()
    finally:
        process.kill()
        process.wait(LIMIT_S)
        loop.close()


def wait_for(question):
    """Ask until the answer is true, and return it."""
    end = time.monotonic() + LIMIT_S
    while not (answer := question()):
        assert time.monotonic() < end, f"still {answer!r} after {LIMIT_S} s"
        time.sleep(0.05)
    return answer


def _tab_of(port_file):
    """Return the address of a new browser's only tab."""

    def tabs():
        if not port_file.exists() or not (lines := port_file.read_text().split()):
            return None
        url = f"http://127.0.0.1:{lines[0]}/json"
        with urllib.request.urlopen(url, timeout=LIMIT_S) as answer:
            return [tab for tab in json.load(answer) if tab["type"] == "page"]

    return wait_for(tabs)[0]["webSocketDebuggerUrl"]


class Page:
    """A page: ``evaluate`` scripts in it, use its mouse, and read its ``messages``."""

    def __init__(self, loop, address, downloads):
        self._loop, self._numbers, self.messages = loop, count(1), []
        self._socket = self._run(websocket_connect, address, max_message_size=10**9)
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        self.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(downloads))

    def _run(self, function, *arguments, **options):
        async def answer():
            return await asyncio.wait_for(function(*arguments, **options), LIMIT_S)

        return self._loop.run_until_complete(answer())

    def call(self, method, **parameters):
        """Call a method of the protocol, and return its result."""
        number = next(self._numbers)
        command = {"id": number, "method": method, "params": parameters}
        self._run(self._socket.write_message, json.dumps(command))
        while (answer := json.loads(self._run(self._socket.read_message))).get("id") != number:
            if answer["method"] in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled"):
                self.messages.append(json.dumps(answer["params"]))
            if answer["method"] == "Log.entryAdded":
                self.messages.append(answer["params"]["entry"]["text"])
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, url):
        self.call("Page.navigate", url=url)
        wait_for(lambda: self.evaluate("document.readyState") == "complete")

    def evaluate(self, script):
        """Return the value of a script; wait for it if it is a promise."""
        how = {"returnByValue": True, "awaitPromise": True}
        answer = self.call("Runtime.evaluate", expression=script, **how)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def mouse(self, kind, x, y):
        """Send an event of the mouse: ``mousePressed``, ``mouseMoved`` or ``mouseReleased``."""
        button = {"button": "left", "buttons": 1, "clickCount": 1}
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **button)

    def click(self, x, y):
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            self.mouse(kind, x, y)

    def look_as(self, width, height, *, dark=False, is_mobile=False):
        """Set the size and the colour scheme."""
        screen = {"deviceScaleFactor": 1, "mobile": is_mobile}
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, **screen)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def picture(self):
        """Return what is seen as PNG."""
        return base64.b64decode(self.call("Page.captureScreenshot")["data"])

    def printed(self):
        """Return the printed page as PDF."""
        how = {"preferCSSPageSize": True, "printBackground": True}
        return base64.b64decode(self.call("Page.printToPDF", **how)["data"])

    def close(self):
        async def start():  # outside of a loop, it would make one, and leave it open
            self._socket.close()

        self._loop.run_until_complete(start())
        while self._run(self._socket.read_message) is not None:
            pass
