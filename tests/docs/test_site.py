"""The site that `make docs` built, in headless Chromium: nothing fetched from elsewhere, nothing wider than the window,
no word on the console, and nothing that axe finds."""

import functools
import html
import json
import re
import shutil
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.docs.terminal import DOCS
from tests.reporting.test_browser import AXE, CHROMIUM, browse

SITE = DOCS.parent / "build" / "site"
WITH_AXE = ["index.html", "api.html", "how_to/add_a_choice.html", "decisions/index.html", "method.html"]
"""Between them they have all that a page of the site can have; axe takes its time."""

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium"),
    pytest.mark.skipif(not SITE.is_dir(), reason="needs build/site: make docs"),
]
LOOK = """<iframe id="f" style="border: 0" width="WIDTH" height="900"></iframe><output></output><script>
const shown = (page) => new Promise((done) => { f.onload = () => setTimeout(done, 300); f.src = page; });
const found = {};
(async () => {
    for (const page of PAGES) {
        await shown(page);
        const doc = f.contentDocument, seen = [];
        if (doc.documentElement.scrollWidth > WIDTH) seen.push("is " + doc.documentElement.scrollWidth + " wide");
        for (const loaded of f.contentWindow.performance.getEntriesByType("resource"))
            if (!loaded.name.startsWith(location.origin) && !loaded.name.startsWith("data:")) seen.push(loaded.name);
        if (WITH_AXE.includes(page)) {
            const script = doc.createElement("script");
            script.textContent = AXE;
            doc.head.append(script);
            for (const broken of (await f.contentWindow.axe.run(doc)).violations)
                seen.push(broken.id + ": " + broken.nodes.slice(0, 3).map((node) => node.html).join(" | "));
        }
        if (seen.length) found[page] = seen;
    }
    document.querySelector("output").textContent = JSON.stringify(found);
})();
</script>"""


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *said: object) -> None:
        pass


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """A copy of the site, and where it is served."""
    folder = tmp_path_factory.mktemp("served") / "site"
    shutil.copytree(SITE, folder)
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize(("width", "scheme"), [(400, 1), (1400, 0)], ids=["narrow and light", "wide and dark"])
def test_every_page_is_as_a_reader_wants_it(site, tmp_path, width, scheme):
    folder, address = site
    pages = sorted(str(page.relative_to(folder)) for page in folder.rglob("*.html") if page.name != "look.html")
    assert len(pages) > 25
    assert set(WITH_AXE) < set(pages)
    axe = json.dumps(Path(str(AXE)).read_text()).replace("</", "<\\/")
    values = {"WITH_AXE": json.dumps(WITH_AXE), "WIDTH": str(width), "PAGES": json.dumps(pages), "AXE": axe}
    (folder / "look.html").write_text(re.sub("|".join(values), lambda name: values[name[0]], LOOK))
    flags = [f"--blink-settings=preferredColorScheme={scheme}", "--virtual-time-budget=600000"]
    seen, console = browse(f"{address}/look.html", tmp_path / "profile", "--window-size=1600,1000", *flags)
    said = re.search("<output>(.*?)</output>", seen, re.DOTALL)
    assert (console, json.loads(html.unescape(said[1]))) == ([], {})
