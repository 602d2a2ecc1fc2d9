"""Pages as headless Chromium shows them: one browser for all tests of a process, a page of its own for each question.

The browser is spoken to by its DevTools protocol (https://chromedevtools.github.io/devtools-protocol/), JSON between
zero bytes over a pair of pipes, so that it needs no other package. A page that is opened has no cookie, cache or
storage of another's, and is held to a clean console as it is left: a word of a script, an uncaught error, what its own
policy forbids, and what it could not load all count.

axe-core is the version that comes with the tests, or the `axe.min.js` that AXE_CORE names.
"""

import contextlib
import importlib.resources
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--remote-debugging-pipe"]
AXE = os.environ.get("AXE_CORE") or importlib.resources.files("axe_core_python") / "axe.min.js"
PATIENCE = 300.0
"""Seconds that one answer may take: axe needs its time on a busy machine."""
PIPES = 'exec "$@" 3<&0 4>&1 0</dev/null 1>/dev/null'
"""Chromium reads from descriptor 3 and writes to 4."""
ATTACHED = "Target.attachedToTarget"
SAID = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")

Json = dict[str, Any]


class Browser:
    """A Chromium that runs until it is closed; its profile and what it says of itself lie in `folder`."""

    def __init__(self, folder: Path) -> None:
        command = ["sh", "-c", PIPES, "sh", str(CHROMIUM), *FLAGS, f"--user-data-dir={folder / 'profile'}"]
        self._log = folder / "chromium.log"
        with open(self._log, "wb") as log:
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log)
        self._unread = b""
        self._sent = 0
        self.events: list[Json] = []

    def close(self) -> None:
        """End the browser, by force where it does not go by itself; one that ended before is no error."""
        with contextlib.suppress(BrokenPipeError), self._process:
            try:
                self.call("Browser.close")
                self._process.wait(30)
            finally:
                self._process.kill()

    @contextlib.contextmanager
    def open(self, page: Path | str, *, width: int = 1400, dark: bool = False, policy: bool = True) -> Iterator["Page"]:
        """A page, a file or an address, as it is loaded in a window of this width, in the light or the dark theme.

        Without `policy` its own Content-Security-Policy does not hold, for a page whose script a test changed.

        Raises:
            AssertionError: The page, or a frame or worker of it, has words on its console as it is left.
        """
        context = self.call("Target.createBrowserContext")["browserContextId"]
        try:
            target = self.call("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
            self.events.clear()
            shown = Page(self, self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"])
            size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
            scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
            shown.call("Emulation.setDeviceMetricsOverride", **size)
            shown.call("Emulation.setEmulatedMedia", features=[scheme])
            shown.call("Page.setBypassCSP", enabled=not policy)
            shown.load(page if isinstance(page, str) else page.absolute().as_uri())
            yield shown
            words = shown.console()
            assert not words, "\n".join(words)
        finally:
            self.call("Target.disposeBrowserContext", browserContextId=context)

    def send(self, method: str, session: str = "", /, **parameters: Any) -> int:
        """Call a method of the browser, or of the page or part of one that has this session; the call's number."""
        self._sent += 1
        to = {"sessionId": session} if session else {}
        message = {"id": self._sent, "method": method, "params": parameters, **to}
        self._process.stdin.write(json.dumps(message).encode() + b"\0")
        self._process.stdin.flush()
        return self._sent

    def call(self, method: str, session: str = "", /, **parameters: Any) -> Json:
        """The answer to a call.

        Raises:
            RuntimeError: The browser refuses the call.
        """
        number = self.send(method, session, **parameters)
        answer = self.wait(lambda message: message.get("id") == number)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        return answer["result"]

    def wait(self, wanted: Callable[[Json], bool]) -> Json:
        """The next message that is wanted. All events on the way are kept, and each part of a page is listened to."""
        end = time.monotonic() + PATIENCE
        while True:
            while b"\0" not in self._unread:
                ready, _, _ = select.select([self._process.stdout], [], [], max(0.0, end - time.monotonic()))
                more = os.read(self._process.stdout.fileno(), 1 << 20) if ready else b""
                if not more:
                    raise RuntimeError("Chromium has no answer:\n" + self._log.read_text(errors="replace")[-2000:])
                self._unread += more
            first, self._unread = self._unread.split(b"\0", 1)
            message = json.loads(first)
            if "method" in message:
                self.events.append(message)
            if message.get("method") == ATTACHED and "sessionId" in message:
                listen(self.send, message["params"]["sessionId"])
            if wanted(message):
                return message


def listen(call: Callable[..., Any], session: str) -> None:
    """Have all that this session's page, frame or worker says sent, and let it begin."""
    call("Runtime.enable", session)
    call("Log.enable", session)
    call("Target.setAutoAttach", session, autoAttach=True, waitForDebuggerOnStart=True, flatten=True)
    call("Runtime.runIfWaitingForDebugger", session)


def said(event: Json) -> str:
    """A word on the console, an uncaught error, or an entry of the log, in a line with where it is from."""
    entry = event.get("entry") or event.get("exceptionDetails") or event
    values = [entry.get("exception", {}), *entry.get("args", [])]
    frames = entry.get("stackTrace", {}).get("callFrames") or [{}]
    words = [entry.get("text", ""), *(str(each.get("description", each.get("value", ""))) for each in values)]
    return " ".join(filter(None, [*words, entry.get("url") or frames[0].get("url", "")]))


class Page:
    """A page that is shown, whose own clock is the machine's until `pass_time`."""

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser = browser
        self._session = session
        self.call("Page.enable")
        listen(browser.call, session)

    def call(self, method: str, **parameters: Any) -> Json:
        """The browser's answer to a call that is about this page."""
        return self._browser.call(method, self._session, **parameters)

    def load(self, address: str) -> None:
        """Go to an address, until all is loaded."""
        failed = self.call("Page.navigate", url=address).get("errorText")
        assert failed is None, f"{address}: {failed}"
        self.loaded()

    def loaded(self) -> None:
        """Wait until the page, which goes somewhere by itself, has loaded all there."""
        self._await("Page.loadEventFired")

    def hurry(self) -> None:
        """From now on what waits for the page's clock waits no longer."""
        self.call("Emulation.setVirtualTimePolicy", policy="advance")

    def pass_time(self, seconds: float) -> None:
        """Let so much of the page's time pass, in no time, but what it fetches is waited for; then it stands still."""
        self.call("Emulation.setVirtualTimePolicy", policy="pauseIfNetworkFetchesPending", budget=1000 * seconds)
        self._await("Emulation.virtualTimeBudgetExpired")

    def ask(self, question: str) -> Any:
        """What an expression, or the promise that it is, comes to in the page.

        Raises:
            AssertionError: It ends in an error.
        """
        answer = self.call("Runtime.evaluate", expression=question, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def html(self) -> str:
        """The page's elements as they are now."""
        return self.ask("document.documentElement.outerHTML")

    def overflow(self) -> int:
        """By how many pixels the page is wider than the window."""
        return self.ask("document.documentElement.scrollWidth - document.documentElement.clientWidth")

    def axe(self) -> list[Json]:
        """The rules of axe-core that the page breaks, each with the elements that do."""
        self.call("Runtime.evaluate", expression=Path(str(AXE)).read_text())
        return self.ask(
            """axe.run({ resultTypes: ["violations"] }).then((done) => done.violations.map(({ id, nodes }) =>
            [id, ...nodes.map((node) => node.html)]))"""
        )

    def console(self) -> list[str]:
        """What the page and its parts have said: words of scripts, uncaught errors, what was blocked or not found."""
        for session in [self._session, *(each["params"]["sessionId"] for each in self._events(ATTACHED))]:
            with contextlib.suppress(RuntimeError):  # a worker that has ended
                self._browser.call("Runtime.evaluate", session, expression="0")  # what was said before it is here now
        return [said(each["params"]) for each in self._events(*SAID)]

    def _events(self, *names: str) -> list[Json]:
        return [event for event in self._browser.events if event["method"] in names]

    def _await(self, name: str) -> None:
        """Wait for this page's next event of the name."""
        self._browser.wait(lambda got: got.get("method") == name and got.get("sessionId") == self._session)
