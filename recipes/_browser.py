"""Drives Chromium through chromedriver by the WebDriver protocol: what a reader does with a page, done by a script.

Not a recipe. Needs nothing but the two programs; the recipes that use it go on without them and say so.
"""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import tempfile
import urllib.request
from pathlib import Path
from typing import Any

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--force-device-scale-factor=1"),
)
KEYS = {"Enter": "\ue007", "Backspace": "\ue003", "Tab": "\ue004", "ArrowDown": "\ue015", "ArrowUp": "\ue013",
        "ArrowLeft": "\ue012", "ArrowRight": "\ue014"}  # fmt: skip


def find_browser() -> tuple[str, str] | None:
    """Paths of Chromium and of its chromedriver, where both are installed."""
    browser = next(
        (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
    )
    driver = shutil.which("chromedriver")
    return (browser, driver) if browser and driver else None


class Browser:
    """One window with a profile of its own, which is thrown away at the end.

    Args:
        downloads: Folder of the files that pages save.
        width: Of the window in pixels.
        height: Of the window.

    Raises:
        RuntimeError: No browser is installed, or it does not start.
    """

    def __init__(self, downloads: Path, width: int = 1200, height: int = 1000) -> None:
        found = find_browser()
        if found is None:
            raise RuntimeError("Chromium and chromedriver are not installed")
        self._profile = tempfile.TemporaryDirectory(prefix="browser-", ignore_cleanup_errors=True)
        self._driver = subprocess.Popen(  # noqa: S603
            [found[1], "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        try:
            self._base = self._address()
            arguments = [*FLAGS, f"--window-size={width},{height}", f"--user-data-dir={self._profile.name}"]
            options = {"binary": found[0], "args": arguments}
            wanted = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
            session = self._send("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
            self._base += f"/session/{session['sessionId']}"
            downloads.mkdir(parents=True, exist_ok=True)
            self.devtools("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(downloads.resolve()))
        except BaseException:
            self.close()
            raise

    def _address(self) -> str:
        for line in self._driver.stdout or ():
            if port := re.search(r"started successfully on port (\d+)", line):
                return f"http://127.0.0.1:{port[1]}"
        raise RuntimeError("chromedriver did not start")

    def _send(self, verb: str, path: str, content: dict[str, Any] | None = None) -> Any:
        data = None if content is None else json.dumps(content).encode()
        request = urllib.request.Request(self._base + path, data, {"Content-Type": "application/json"}, method=verb)  # noqa: S310
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=60) as response:
                return json.load(response)["value"]
        except urllib.error.HTTPError as error:
            said = json.load(error)["value"]
            raise RuntimeError(f"{said['error']}: {said['message'].splitlines()[0]}") from None

    def open(self, address: str) -> None:
        """Go to an address and wait until the page is loaded."""
        self._send("POST", "/url", {"url": address})

    def run(self, script: str, *arguments: Any) -> Any:
        """Run a script as the body of a function; returns what it returns."""
        return self._send("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def press(self, *keys: str) -> None:
        """Press keys one after the other: characters, or names such as Enter."""
        strokes = [{"type": kind, "value": KEYS.get(key, key)} for key in keys for kind in ("keyDown", "keyUp")]
        self._send("POST", "/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": strokes}]})

    def click(self, selector: str) -> None:
        """Click the first element that a CSS selector finds."""
        found = self._send("POST", "/element", {"using": "css selector", "value": selector})
        self._send("POST", f"/element/{next(iter(found.values()))}/click", {})

    def console(self) -> list[str]:
        """What the page and the browser have logged since the last call."""
        return [entry["message"] for entry in self._send("POST", "/se/log", {"type": "browser"})]

    def devtools(self, command: str, **parameters: Any) -> Any:
        """A command of the DevTools protocol."""
        return self._send("POST", "/goog/cdp/execute", {"cmd": command, "params": parameters})

    def dark(self, on: bool = True) -> None:
        """Ask pages for their dark look."""
        feature = {"name": "prefers-color-scheme", "value": "dark" if on else "light"}
        self.devtools("Emulation.setEmulatedMedia", features=[feature])

    def screenshot(self, path: Path) -> None:
        """The window as PNG."""
        path.write_bytes(base64.b64decode(self._send("GET", "/screenshot")))

    def close(self) -> None:
        """End the session, the driver and the profile."""
        try:
            if "/session/" in getattr(self, "_base", ""):
                self._send("DELETE", "")
        finally:
            self._driver.terminate()
            self._driver.wait(timeout=20)
            if self._driver.stdout:
                self._driver.stdout.close()
            self._profile.cleanup()

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
