"""The site that `make docs` built, in headless Chromium: nothing fetched from elsewhere, nothing wider than the window,
no word on the console, and nothing that axe finds."""

import functools
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.browser import Browser, needs_chromium
from tests.docs.terminal import DOCS

SITE = DOCS.parent / "build" / "site"
WITH_AXE = ["index.html", "api.html", "how_to/add_a_choice.html", "decisions/index.html", "method.html"]
"""Between them they have all that a page of the site can have; axe takes its time."""

pytestmark = [
    pytest.mark.long,
    needs_chromium,
    pytest.mark.skipif(not SITE.is_dir(), reason="needs build/site: make docs"),
]
LOADED = """performance.getEntriesByType("resource").map((loaded) => loaded.name).filter((name) =>
    !name.startsWith(location.origin) && !name.startsWith("data:"))"""


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *said: object) -> None:
        pass


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    """Where the site is served."""
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=SITE)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize(("width", "dark"), [(400, False), (1400, True)], ids=["narrow and light", "wide and dark"])
def test_every_page_is_as_a_reader_wants_it(browser: Browser, site: str, width: int, dark: bool) -> None:
    pages = sorted(str(page.relative_to(SITE)) for page in SITE.rglob("*.html"))
    assert len(pages) > 25
    assert set(WITH_AXE) < set(pages)
    found = {}
    with browser.open(f"{site}/{pages[0]}", width=width, dark=dark) as page:
        page.hurry()
        for name in pages:
            page.load(f"{site}/{name}")
            page.ask("new Promise((done) => setTimeout(done, 1000))")
            found[name] = (page.overflow(), page.ask(LOADED), page.axe() if name in WITH_AXE else [])
    assert {name: seen for name, seen in found.items() if seen != (0, [], [])} == {}
