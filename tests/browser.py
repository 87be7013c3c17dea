"""A headless Chromium that shows the page of a mail as a phone does, steered through the DevTools protocol on a pipe.

https://chromedevtools.github.io/devtools-protocol/: each message is one JSON object, ended by a NUL.
"""

from __future__ import annotations

import base64
import email.message
import fcntl
import json
import os
import re
import shutil
import subprocess
import tempfile
from types import TracebackType
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--hide-scrollbars", "--force-color-profile=srgb",
]  # fmt: skip


def page_with_pictures(message: email.message.EmailMessage) -> str:
    """The HTML of a mail with its pictures inside it, as a mail program would show it."""
    body = message.get_body(("html",))
    assert body is not None
    named = {part["Content-ID"][1:-1]: part for part in message.walk() if part["Content-ID"]}

    def inside(match: re.Match[str]) -> str:
        part = named[match[1]]
        return f'src="data:{part.get_content_type()};base64,{base64.b64encode(part.get_content()).decode()}"'

    return re.sub(r'src="cid:([^"]+)"', inside, str(body.get_content()))


def high(descriptor: int) -> int:
    """The same pipe end under a number of at least 10, so that it is neither 3 nor 4; the old number is closed."""
    copy = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 10)
    os.close(descriptor)
    return copy


class Browser:
    """One Chromium with one page. Use it as a context manager."""

    def __enter__(self) -> Browser:
        assert CHROMIUM
        self._folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        (its_input, our_output), (our_input, its_output) = (map(high, os.pipe()) for _ in range(2))
        # Chromium reads commands from descriptor 3 and writes answers to 4.
        command = f'exec "$0" "$@" 3<&{its_input} 4>&{its_output}'
        flags = [*FLAGS, "--remote-debugging-pipe", f"--user-data-dir={self._folder.name}"]
        self._process = subprocess.Popen(
            ["bash", "-c", command, CHROMIUM, *flags], pass_fds=(its_input, its_output), stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(its_input)
        os.close(its_output)
        self._answers, self._commands = os.fdopen(our_input, "rb"), our_output
        self._number, self._session, self._unread = 0, "", b""
        target = self._ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        self._answers.close()
        os.close(self._commands)
        self._folder.cleanup()

    def _ask(self, method: str, **parameters: Any) -> Any:
        """Send one command and return its result; events that come meanwhile are skipped."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        waiting = memoryview(json.dumps(message).encode() + b"\0")
        while waiting:
            waiting = waiting[os.write(self._commands, waiting) :]
        while True:
            answer = json.loads(self._read())
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]

    def _read(self) -> bytes:
        """The next message."""
        while b"\0" not in self._unread:
            chunk = self._answers.read1()  # type: ignore[attr-defined]
            assert chunk, "the browser has ended"
            self._unread += chunk
        message, _, self._unread = self._unread.partition(b"\0")
        return message

    def show(self, page: str, width: int, *, height: int = 800, dark: bool = False, scale: float = 1) -> None:
        """Lay the page out in a window of `width` pixels."""
        self._ask(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=scale,
            mobile=width < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._ask("Emulation.setEmulatedMedia", features=[scheme])
        frame = self._ask("Page.getFrameTree")["frameTree"]["frame"]["id"]
        self._ask("Page.setDocumentContent", frameId=frame, html=page)
        self.evaluate("Promise.all([...document.images].map(image => image.decode()))")

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page; a promise is waited for."""
        answer = self._ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def picture(self, height: int = 0, kind: str = "png") -> bytes:
        """A picture of the page down to `height` pixels, 0: all of it; `kind` is png or jpeg."""
        width, whole = self.evaluate("[innerWidth, document.documentElement.scrollHeight]")
        clip = {"x": 0, "y": 0, "width": width, "height": min(whole, height or whole), "scale": 1}
        answer = self._ask("Page.captureScreenshot", format=kind, clip=clip, captureBeyondViewport=True)
        return base64.b64decode(answer["data"])
