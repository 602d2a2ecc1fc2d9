"""The page of a run that is under way in headless Chromium: what is new is shown by itself, what is open stays open."""

import re
import threading
from pathlib import Path

import pytest

from fedproxy.deployment.address import Address
from fedproxy.deployment.page import PageServer
from fedproxy.reporting.live import LivePage

from . import test_browser
from .test_browser import AXE, ask, browse
from .test_live import note, run, store_round

pytestmark = test_browser.pytestmark
__all__ = ["run"]

READER = """<script>
document.querySelectorAll("details").forEach((one) => {
    if (/^(Round 1|Environment)/.test(one.textContent.trim())) one.querySelector("summary").click();
});
</script></body>"""
"""What a reader does: shuts the round, which was open, and opens what was shut."""


@pytest.fixture
def pages(run: Path) -> list[str]:
    """The page with a round open after one round, with another one after two, and as the run ends."""
    (run / "environment.json").write_text('{"python": "3.11"}')
    made, found = LivePage(run), []
    for number in (1, 2):
        store_round(run, number)
        note(run, {"event": "round_opened", "round": number + 1, "asked": ["bank"]})
        made._shown, made._rested = -1, 0.0
        made._look(live=True)
        found.append(made.content.decode())
    note(run, {"event": "stage_ended", "stage": "federate", "outcome": "done", "seconds": 2.0})
    made._look(live=False)
    return [*found, made.content.decode()]


def watch(pages: list[str], profile: Path) -> tuple[str, list[str], int]:
    """Watch a server that gives a newer page at each request: what is shown at last, the console, the requests."""
    asked = 0

    def content() -> bytes:
        nonlocal asked
        asked += 1
        return pages[min(asked, len(pages)) - 1].encode()

    server = PageServer(Address("127.0.0.1", 0), content)
    try:
        return *browse(f"http://{server.address}/", profile, "--virtual-time-budget=20000"), asked
    finally:
        server.asked = 0.0
        server.close()


def open_details(html: str) -> dict[str, bool]:
    found = re.findall(r"<details([^>]*)>\s*<summary>([A-Z]\w+(?: \d+)?)", html)
    return {name: " open" in attributes for attributes, name in found}


def test_a_newer_page_takes_the_place_of_the_one_shown(pages: list[str], tmp_path: Path) -> None:
    found, console, asked = watch(pages, tmp_path)
    assert console == []
    assert asked == 3  # the last one looks for no newer one
    assert "federate is complete" in found
    assert "Round 2 \u00b7" in found
    assert '<th scope="col">Client' not in found


def test_what_a_reader_opened_or_shut_stays_so(pages: list[str], tmp_path: Path) -> None:
    by_hand = re.sub("script-src '[^']*'", "script-src 'unsafe-inline'", pages[0]).replace("</body>", READER)
    assert open_details(pages[1])["Environment"] is False
    found, console, _ = watch([by_hand, *pages[1:]], tmp_path)
    assert console == []
    assert (
        open_details(found).items()
        >= {"Round 1": False, "Round 2": True, "Environment": True, "Experiment": True}.items()
    )


def test_opened_from_disk_it_is_loaded_again_until_the_run_ends(pages: list[str], tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.write_text(pages[0])
    ending = threading.Timer(5.0, page.write_text, [pages[2]])
    ending.start()
    found, console = browse(page, tmp_path / "profile", "--virtual-time-budget=20000")
    ending.join()
    assert console == []
    assert "federate is complete" in found


@pytest.mark.parametrize("width", [400, 1400])
def test_nothing_is_wider_than_the_window(pages: list[str], tmp_path: Path, width: int) -> None:
    page = tmp_path / "report.html"
    page.write_text(re.sub("setTimeout", "void", pages[1]))
    assert ask(page, tmp_path, width, "doc.documentElement.scrollWidth", scripts=" ") <= width


def test_axe_finds_nothing(pages: list[str], tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.write_text(re.sub("setTimeout", "void", pages[1]))
    question = (
        "f.contentWindow.axe.run(doc).then((done) => done.violations.map((v) => [v.id, v.nodes.map((n) => n.html)]))"
    )
    assert ask(page, tmp_path, 1400, question, "--virtual-time-budget=60000", scripts=Path(str(AXE)).read_text()) == []
