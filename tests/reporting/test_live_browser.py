"""The page of a run that is under way in headless Chromium: what is new is shown by itself, what is open stays open."""

import re
from pathlib import Path

import pytest

from fedproxy.deployment.address import Address
from fedproxy.deployment.page import PageServer
from fedproxy.reporting.live import LivePage
from tests.browser import Browser, needs_chromium

from .test_live import begin, note, store_round

pytestmark = [needs_chromium, pytest.mark.long]

READER = """document.querySelectorAll("details").forEach((one) => {
    if (/^(Round 1|Environment)/.test(one.textContent.trim())) one.querySelector("summary").click();
})"""
"""What a reader does: shuts the round, which was open, and opens what was shut."""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The page with a round open after one round, with another one after two, and as the run ends."""
    run = begin(tmp_path_factory.mktemp("runs") / "first")
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


def watch(browser: Browser, pages: list[str], done: str = "0") -> tuple[str, int]:
    """Watch a server that gives a newer page at each request, of which a reader does something with the first: what
    is shown at last, and how many requests there were."""
    asked = 0

    def content() -> bytes:
        nonlocal asked
        asked += 1
        return pages[min(asked, len(pages)) - 1].encode()

    server = PageServer(Address("127.0.0.1", 0), content)
    try:
        with browser.open(f"http://{server.address}/") as page:
            page.ask(done)
            page.pass_time(20)
            return page.html(), asked
    finally:
        server.asked = 0.0
        server.close()


def open_details(html: str) -> dict[str, bool]:
    found = re.findall(r"<details([^>]*)>\s*<summary>([A-Z]\w+(?: \d+)?)", html)
    return {name: " open" in attributes for attributes, name in found}


def test_a_newer_page_takes_the_place_of_the_one_shown(browser: Browser, pages: list[str]) -> None:
    found, asked = watch(browser, pages)
    assert asked == 3  # the last one looks for no newer one
    assert "federate is complete" in found
    assert "Round 2 \u00b7" in found
    assert '<th scope="col">Client' not in found


def test_what_a_reader_opened_or_shut_stays_so(browser: Browser, pages: list[str]) -> None:
    assert open_details(pages[1])["Environment"] is False
    found, _ = watch(browser, pages, READER)
    assert (
        open_details(found).items()
        >= {"Round 1": False, "Round 2": True, "Environment": True, "Experiment": True}.items()
    )


def test_opened_from_disk_it_is_loaded_again_until_the_run_ends(
    browser: Browser, pages: list[str], tmp_path: Path
) -> None:
    file = tmp_path / "report.html"
    file.write_text(pages[0])
    with browser.open(file) as page:
        page.loaded()
        assert "federate is complete" not in page.html()
        file.write_text(pages[2])
        page.loaded()
        assert "federate is complete" in page.html()


@pytest.fixture
def still(pages: list[str], tmp_path: Path) -> Path:
    """The page as it is while a round is open, which looks for no newer one."""
    page = tmp_path / "report.html"
    page.write_text(re.sub("setTimeout", "void", pages[1]))
    return page


@pytest.mark.parametrize("width", [400, 1400])
def test_nothing_is_wider_than_the_window(browser: Browser, still: Path, width: int) -> None:
    with browser.open(still, width=width, policy=False) as page:
        assert page.overflow() == 0


@pytest.mark.parametrize("dark", [True, False], ids=["dark", "light"])
def test_axe_finds_nothing(browser: Browser, still: Path, dark: bool) -> None:
    with browser.open(still, dark=dark, policy=False) as page:
        assert page.axe() == []
