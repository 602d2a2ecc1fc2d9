"""What the owner is told when Flower does not take a run, and what it is kept from in a network with a proxy."""

import os
import sys
from pathlib import Path

import pytest

from fedproxy.deployment.flower import spare_loopback
from fedproxy.deployment.flower import superlink as module
from fedproxy.deployment.flower.process import start
from fedproxy.deployment.flower.superlink import SuperLink
from fedproxy.errors import FederationError


@pytest.mark.parametrize(
    ("said", "code"),
    [('{"success": false, "error-message": "no room"}', 0), ("no room", 0), ('{"success": true} no room', 1)],
)
def test_a_run_that_flower_does_not_take_is_an_error_with_its_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, code: int
) -> None:
    program = [sys.executable, "-c", f"print({said!r}); raise SystemExit({code})"]
    monkeypatch.setattr(module, "start", lambda command, *rest: start(program, *rest))
    link = SuperLink(tmp_path, certificates=None, environment={})
    with pytest.raises(FederationError, match="no room"):
        link.run()


def test_a_run_that_flower_takes_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = [sys.executable, "-c", 'print(\'{\\n  "success": true,\\n  "run-id": "1"\\n}\')']
    monkeypatch.setattr(module, "start", lambda command, *rest: start(program, *rest))
    SuperLink(tmp_path, certificates=None, environment={}).run()


@pytest.mark.parametrize(
    ("lower", "upper", "spared"),
    [
        ("", "", "127.0.0.1,localhost"),
        ("a.example", "", "a.example,127.0.0.1,localhost"),
        ("a.example", "b.example,127.0.0.1", "a.example,b.example,127.0.0.1,localhost"),
    ],
)
def test_loopback_is_spared_by_a_proxy_beside_what_was(
    monkeypatch: pytest.MonkeyPatch, lower: str, upper: str, spared: str
) -> None:
    monkeypatch.setenv("no_proxy", lower)
    monkeypatch.setenv("NO_PROXY", upper)
    spare_loopback()
    assert os.environ["no_proxy"] == os.environ["NO_PROXY"] == spared
