"""Chromium without a window, driven through its debugging pipe (no package needed)."""

import base64
import json
import os
import shutil
import subprocess
import time


def find_chromium():
    """Returns the path of a Chromium, None without one."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    return next(filter(None, map(shutil.which, names)), None)


class Browser:
    """One page of a browser; a context manager."""

    def __init__(self, profile):
        self._profile = profile
        self._count, self._buffer = 0, b""

    def __enter__(self):
        # The browser reads commands from descriptor 3 and writes to 4, each ended by a zero byte.
        their_input, self._input = os.pipe()
        self._output, their_output = os.pipe()
        command = [find_chromium(), "--headless", "--no-sandbox", "--disable-gpu"]
        command += ["--remote-debugging-pipe", "--window-size=900,1000", "--disable-dev-shm-usage"]
        command += [f"--user-data-dir={self._profile}", "about:blank"]
        shell = f'exec "$@" 3<&{their_input} 4>&{their_output}'
        self._process = subprocess.Popen(
            ["bash", "-c", shell, "bash", *command],
            pass_fds=(their_input, their_output),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(their_input)
        os.close(their_output)
        self._session = None
        (page, *_) = [
            target
            for target in self.call("Target.getTargets")["targetInfos"]
            if target["type"] == "page"
        ]
        attached = self.call("Target.attachToTarget", targetId=page["targetId"], flatten=True)
        self._session = attached["sessionId"]
        return self

    def __exit__(self, *_):
        self._process.terminate()
        self._process.wait(30)
        os.close(self._input)
        os.close(self._output)

    def call(self, method, **params):
        """Calls a method of the DevTools protocol and waits for its result."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._input, data) :]
        while True:
            *complete, self._buffer = self._buffer.split(b"\0")
            for text in complete:
                answer = json.loads(text)
                if answer.get("id") == self._count:
                    assert "error" not in answer, answer
                    return answer["result"]
            part = os.read(self._output, 2**20)
            assert part, "the browser has ended"
            self._buffer += part

    def open(self, url):
        """Opens a page."""
        self.call("Page.navigate", url=url)
        self.wait_for("document.readyState === 'complete' && location.href !== 'about:blank'")

    def run(self, script):
        """Returns the value of an expression, of a promise its result."""
        result = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait_for(self, condition, seconds=60):
        """Waits until an expression is true."""
        deadline = time.monotonic() + seconds
        while not self.run(condition):
            assert time.monotonic() < deadline, condition
            time.sleep(0.05)

    def screenshot(self, path):
        """Writes what the page shows as PNG."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))
