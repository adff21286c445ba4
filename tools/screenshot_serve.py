"""Draws through the page of `xprompt serve` in headless Chromium, as a person would, and takes a picture of it.

    python tools/screenshot_serve.py --model mini --out docs/images/serve.png

The pair and the inputs are rendered scenes that training has not seen. Chromium is driven over its debugging pipe, without a library.
"""

import argparse
import base64
import contextlib
import fcntl
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import PIL.Image

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)

# Chromium reads commands from descriptor 3 and writes answers to 4; this puts the pipes there and becomes Chromium.
_LAUNCH = "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execv(sys.argv[3], sys.argv[3:])"


class Browser:
    """One tab of a headless Chromium."""

    def __init__(self, width: int = 1180, height: int = 900, *, dark: bool = False):
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        high = lambda fd: fcntl.fcntl(fd, fcntl.F_DUPFD, 10)  # away from 3 and 4
        pipes = [os.pipe(), os.pipe()]
        (read, self._to), (self._from, write) = [tuple(map(high, pipe)) for pipe in pipes]
        for fd in (fd for pipe in pipes for fd in pipe):
            os.close(fd)
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe", "--hide-scrollbars"]
        flags += [f"--user-data-dir={self._profile.name}", f"--window-size={width},{height}", *(["--force-dark-mode"] if dark else [])]
        self._process = subprocess.Popen(
            [sys.executable, "-c", _LAUNCH, str(read), str(write), str(CHROMIUM), *flags], pass_fds=(read, write),
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(read)
        os.close(write)
        self._rest, self._number, self._session = b"", 0, None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = "dark" if dark else "light"
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._to)
        os.close(self._from)
        self._profile.cleanup()

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the DevTools protocol and its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._rest:
                data = os.read(self._from, 1 << 20)
                if not data:
                    raise RuntimeError(f"Chromium ended at {method}")
                self._rest += data
            line, self._rest = self._rest.split(b"\0", 1)
            answer = json.loads(line)
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]

    def evaluate(self, script: str) -> Any:
        """The value of a script in the page."""
        told = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in told:
            raise RuntimeError(told["exceptionDetails"]["exception"]["description"])
        return told["result"].get("value")

    def wait(self, script: str, seconds: float = 60) -> Any:
        """Waits until a script's value is true."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if value := self.evaluate(script):
                return value
            time.sleep(0.05)
        raise TimeoutError(f"{script}; the page says {self.evaluate('document.body.innerText')!r}")

    def open(self, url: str) -> None:
        """Loads a page."""
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def choose(self, selector: str, *paths: Path) -> None:
        """Gives files to a file field."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(path.resolve()) for path in paths])

    def picture(self) -> PIL.Image.Image:
        """What is seen."""
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=False)["data"]
        return PIL.Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")


@contextlib.contextmanager
def serving(*flags: object) -> Iterator[str]:
    """A server process on a free port; its address."""
    command = [sys.executable, "-m", "xprompt_jax", "serve", "--port", "0", *map(str, flags)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line.startswith("open "):
            raise RuntimeError(f"the server ended with {process.wait()}")
        yield line.split()[1]
    finally:
        process.terminate()
        process.wait()


def main() -> None:
    """Serves, draws, and writes the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--task", default="depth", help="of data/tasks.py")
    parser.add_argument("--seed", type=int, default=5, help="of the scenes")
    args = parser.parse_args()

    from xprompt_jax.data.images import save_png
    from xprompt_jax.data.sources import world_pairs

    with tempfile.TemporaryDirectory() as folder, serving("--model", args.model) as url, Browser(dark=args.dark) as browser:
        # As the mini's scenes were rendered, at the same size.
        pairs = list(world_pairs(groups=1, pairs_per_group=4, size=64, seed=args.seed, tasks=[args.task], zoom=1.4, plain=True))
        for i, pair in enumerate(pairs):
            save_png(pair.input, Path(folder) / f"{i}.png")
            save_png(pair.output, Path(folder) / f"{i}-after.png")
        browser.open(url)
        browser.choose("#before input", Path(folder) / "0.png")
        browser.choose("#after input", Path(folder) / "0-after.png")
        browser.choose("#inputs input", *(Path(folder) / f"{i}.png" for i in range(1, len(pairs))))
        values = {"instruction": pairs[0].instruction, "num_images": "2", "temperature": "0.5", "guidance": "2"}
        for name, value in values.items():
            browser.evaluate(f"document.getElementById('form').elements[{json.dumps(name)}].value = {json.dumps(value)}")
        browser.evaluate("document.getElementById('draw').click()")
        browser.wait("/images in|^$/.test(document.getElementById('status').textContent)", 300)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        browser.picture().save(args.out, optimize=True)
    print(f"{args.out}: {args.out.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
