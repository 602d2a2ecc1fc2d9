"""RUN/report.html while its run is under way: rendered after every round, with a line that says what happens now."""

import collections
import logging
import secrets
import threading
import time
import tomllib
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

from fedproxy.artifacts import MANIFEST, Manifest, inside, read_json
from fedproxy.events import EVENTS as LOG
from fedproxy.events import Events
from fedproxy.foreign import plain
from fedproxy.records import Results, read_rounds
from fedproxy.reporting.html import write_page
from fedproxy.reporting.page import EVENTS, render
from fedproxy.typed_json import as_record

_log = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
REST = 5.0
"""A rendering is followed by a pause of so many times the processor's time that it took: a sixth of a core at most."""
_DOING = {
    "compress": "The proxy is being made.",
    "federate": "The rounds begin.",
    "fuse": "What the proxy learned is being put onto the LLM.",
    "validate": "The LLM is being scored on rows that the clients keep back.",
    "centralized": "The LLM is being tuned on everybody's data, as the upper bound.",
    "evaluate": "The models are being scored.",
}


class Now:
    """What a run is doing, by the events that it has noted so far.

    Attributes:
        line: It in a sentence.
        stages: How many stages have begun or ended, and rounds were stored: with it, what the page shows changes.
    """

    def __init__(self) -> None:
        self.line = "The run begins."
        self.stages = 0
        self._what, self._asked, self._answered = "", frozenset[str](), set[str]()
        self._closed, self._last, self._over = "", "", False

    def take(self, event: dict[str, Any]) -> None:
        """Take the next event of events.jsonl."""
        kind, number = event.get("event"), event.get("round")
        if kind == "resumed":
            self.line = "The run goes on."
        elif kind == "stage_started":
            self.stages, self.line = self.stages + 1, _DOING.get(event["stage"], f"{event['stage']} begins.")
            if event["stage"] == "federate" and self._closed:
                self.line = f"The rounds go on after round {self._closed}."
        elif kind == "stage_ended":
            self.stages += 1
            stage, how = event["stage"], event.get("outcome")
            over = self.line if self._over and stage == "federate" else f"{stage} is complete."
            said = {"done": over, "failed": f"{stage} failed: {event.get('error')}"}
            self.line = said.get(str(how), f"{stage} was interrupted; --resume goes on with it.")
        elif kind == "waiting":
            self.line = f"Round {number} waits: {len(event['present'])} of {event['needed']} needed clients are here."
        elif kind == "round_opened":
            self._ask(f"Round {number} is open", event)
        elif kind == "scoring":
            self._ask(f"Clients score round {number}'s adapter", event)
        elif kind in ("answered", "scored"):
            self._answered.add(event["client"])
            self._tell_answers()
        elif kind == "validated":
            best = event["best_round"]
            self._last = f"; it is the last, since no round after round {best} was better" * bool(event["stop"])
            self.line = f"Round {number} is " + ("scored" if event.get("global") else "scored by nobody") + self._last
            self.line += "."
        elif kind == "round_failed":
            self.line = f"Round {number} failed: {event['reason']}"
        elif kind == "round_closed":
            self.stages, self.line = self.stages + 1, f"Round {number} is stored{self._last}."
            self._closed, self._last = str(number), ""
        elif kind == "federated":
            self._over = True
            self.line = f"The rounds are over after {event['rounds']}; the adapter of round {event['kept']} is kept."

    def _ask(self, what: str, event: dict[str, Any]) -> None:
        self._what = f"{what} since {event['time'][11:19]} UTC"
        self._asked, self._answered = frozenset(event["asked"]), set()
        self._tell_answers()

    def _tell_answers(self) -> None:
        count = len(self._asked & self._answered)
        self.line = f"{self._what}: {count} of {len(self._asked)} clients have answered."


def unfinished(run: Path) -> Results:
    """What there is of a run that is under way, as results.json will hold it; what it cost in all is not known yet.

    Args:
        run: The run directory.

    Raises:
        ArtifactError: a part of it is damaged.
    """
    found: dict[str, Any] = {"cost": {}}
    if (path := inside(run, "experiment.toml")).is_file():
        found["experiment"] = tomllib.loads(path.read_text(encoding="utf-8"))
        found |= {key: found["experiment"][key] for key in ("name", "seed") if key in found["experiment"]}
    for key in ("environment", "evaluation"):
        if (path := inside(run, f"{key}.json")).is_file():
            found[key] = read_json(path)
    if inside(run, f"proxy/{MANIFEST}").is_file():
        proxy = Manifest.read(run / "proxy")
        sheet = proxy.settings.get("exposure", {})
        found["proxy"] = {"layer_map": proxy.layer_map, "scores": proxy.scores, "parameters": sheet.get("parameters")}
        found["llm"] = {"sha256": proxy.llm_sha256, "blocks": proxy.llm_blocks}
        found["cost"]["proxy_bytes"] = sheet.get("bytes")
        if sheet.get("share"):
            found["llm"]["parameters"] = round(sheet["parameters"] / sheet["share"])
    rounds = read_rounds(run)
    for way in ("bytes_up", "bytes_down"):
        found["cost"][way] = sum(getattr(client, way) or 0 for one in rounds for client in one.clients.values())
    return as_record(found, Results, str(run)).model_copy(update={"rounds": rounds})


class LivePage:
    """The page of a run that is under way, kept up to date by a thread of its own, whose errors are only logged.

    What must be read from the rounds' tensors is left to the page of the complete run.

    Args:
        run: The run directory; nothing is read or written before `begin`.

    Raises:
        MissingExtraError: the extra `report` is not installed.
    """

    def __init__(self, run: Path) -> None:
        self._run, self._now, self._log = run, Now(), Events(run)
        self._events: collections.deque[dict[str, Any]] = collections.deque(maxlen=EVENTS)
        self._mark = secrets.token_hex(16)  # stands for the line of status in what was rendered
        self._html, self._shown, self._line = self._render(Results(), live=True), 0, ""
        self._rested, self._fault = 0.0, ""
        self._begun, self._over = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._keep, name="live page", daemon=True)

    @property
    def content(self) -> bytes:
        """The page."""
        return self._html.replace(self._mark, escape(plain(self._now.line, 500)), 1).encode()

    def begin(self) -> None:
        """Begin to keep it; the run directory must be this process' own. To be called as often as one likes."""
        if not self._begun.is_set():
            self._begun.set()
            self._thread.start()

    def close(self, *, last: bool) -> None:
        """Stop; the `last` page of a run that leaves no complete one says how it ended, and looks for no newer one."""
        self._over.set()
        if not self._begun.is_set():
            return
        self._thread.join()
        if last:
            self._try(lambda: self._look(live=False))

    def _keep(self) -> None:
        while not self._over.is_set():
            self._try(lambda: self._look(live=True))
            self._over.wait(LOOK_SECONDS)

    def _try(self, look: Callable[[], None]) -> None:
        """Look; whatever goes wrong with the page is no matter of the run's."""
        try:
            look()
        except Exception as error:
            fault = f"{type(error).__name__}: {plain(str(error), 300)}"
            if fault != self._fault:
                _log.warning("The page of the run could not be rendered: %s", fault)
            self._fault = fault

    def _look(self, *, live: bool) -> None:
        self._read()
        if not live or (self._now.stages != self._shown and time.monotonic() >= self._rested):
            began, self._shown = time.thread_time(), self._now.stages
            self._html = self._render(unfinished(self._run), live=live)
            self._line = ""
            self._rested = time.monotonic() + REST * (time.thread_time() - began)
        if self._line != self._now.line:
            write_page(self._run / "report.html", self.content.decode())
            self._line = self._now.line

    def _read(self) -> None:
        inside(self._run, LOG)
        for event in filter(None, self._log.read()):
            self._events.append(event)
            self._now.take(event)

    def _render(self, results: Results, *, live: bool) -> str:
        name = self._run.name or "RUN"
        return render(results, events=list(self._events), run=name, status=self._mark, live=live)
