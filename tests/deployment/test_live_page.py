"""The page of a federation that is running, three clients over TLS, as Chromium shows it."""

import re
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.browser import Browser, needs_chromium
from tests.deployment.conftest import Federation, eventually

pytestmark = [needs_chromium, pytest.mark.long]


def test_a_running_federation_is_watched(
    browser: Browser, federation: Callable[..., Federation], tmp_path: Path
) -> None:
    one = federation(rows=8, rounds=40, quorum=3)
    owner = one.serve("run", "--page", "127.0.0.1:0")
    url = re.search(r"The page of the run: (http://127\.0\.0\.1:\d+/)", owner.said)[1]
    clients = one.join_all()

    def page() -> str:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=60) as answer:
            return answer.read().decode()

    assert eventually(lambda: re.search(r"Round \d+ is open since", page()) and "<summary>Round " in page())
    with browser.open(url) as shown:
        shown.pass_time(5)
        found = shown.html()
    assert "<button" in found
    assert all(name in found for name in clients)
    copy = tmp_path / "copy.html"
    copy.write_text(page().replace("setTimeout", "void"))
    for width in (400, 1400):
        with browser.open(copy, width=width, policy=False) as shown:
            assert shown.overflow() == 0
    with browser.open(copy, policy=False) as shown:
        assert shown.axe() == []
    assert owner.code is None
    assert len(one.events("run", "round_closed")) < 40
    assert 'role="status"' in (one.folder / "run" / "report.html").read_text()
