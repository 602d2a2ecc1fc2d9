"""What the owner is told when Flower does not take a run, and what it is kept from in a network with a proxy."""

import contextlib
import os
import socket
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedproxy.deployment.flower import SETTINGS, prepare
from fedproxy.deployment.flower import superlink as module
from fedproxy.deployment.flower.process import start
from fedproxy.deployment.flower.runtime import Runtime
from fedproxy.deployment.flower.superlink import _APP, SuperLink
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
    with (
        contextlib.closing(SuperLink(tmp_path, certificates=None, environment={})) as link,
        pytest.raises(FederationError, match="no room"),
    ):
        link.run()


class Stranger(socketserver.ThreadingTCPServer):
    """Listens at a port and answers all that comes with the same bytes."""

    allow_reuse_address = daemon_threads = True

    def __init__(self, port: int, answer: bytes) -> None:
        super().__init__(("127.0.0.1", port), None)  # type: ignore[arg-type]
        self._answer = answer
        self.asked = 0

    def finish_request(self, request: socket.socket, client_address: object) -> None:  # type: ignore[override]
        self.asked += 1
        request.recv(1 << 16)
        request.sendall(self._answer)


@contextlib.contextmanager
def stranger(port: int, answer: bytes) -> Iterator[Stranger]:
    with Stranger(port, answer) as one:
        threading.Thread(target=one.serve_forever, args=(0.05,), daemon=True).start()
        yield one
        one.shutdown()


ENDS = "import time; time.sleep(1); raise SystemExit('the port is taken')"


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(b"", id="hangs up"),
        pytest.param(b"220 ready\r\n", id="not HTTP"),
        pytest.param(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n<html>", id="a page"),
        pytest.param(b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n", id="the SuperLink of another"),
    ],
)
def test_whoever_else_listens_at_its_port_is_not_taken_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: bytes
) -> None:
    monkeypatch.setattr(module, "start", lambda command, *rest: start([sys.executable, "-c", ENDS], *rest))
    with (
        contextlib.closing(SuperLink(tmp_path, certificates=None, environment={})) as link,
        stranger(link.port, answer) as other,
    ):
        with pytest.raises(FederationError, match=r"did not start(?s:.*)taken"):
            link.start()
        assert other.asked


@pytest.mark.slow
def test_a_superlink_whose_port_is_taken_ends_and_says_so(tmp_path: Path) -> None:
    with (
        contextlib.closing(SuperLink(tmp_path, certificates=None, environment={})) as link,
        stranger(link.port, b""),
        pytest.raises(FederationError, match=r"did not start(?s:.*)in use"),
    ):
        link.start()


@pytest.fixture
def link(tmp_path: Path) -> Iterator[SuperLink]:
    """A SuperLink that was started, with the variable that names a file."""
    one = SuperLink(tmp_path / "flower", certificates=None, environment={"MARK": str(tmp_path / "mark")})
    try:
        yield one.start()
    finally:
        one.close()


@pytest.mark.slow
def test_of_all_runs_at_a_superlink_its_own_alone_is_executed(link: SuperLink, tmp_path: Path) -> None:
    """Whoever reaches the Control API on loopback can submit an app; it stays where it is."""
    app = tmp_path / "evil"
    app.mkdir()
    (app / "pyproject.toml").write_text(_APP.replace("fedproxy.deployment.flower.app", "evil"))
    (app / "evil.py").write_text(
        'import os, pathlib\npathlib.Path(os.environ["MARK"]).touch()\nserver = 1\nclient = 1\n'
    )
    home = tmp_path / "home"
    home.mkdir()
    where = f'[superlink]\ndefault = "own"\n[superlink.own]\naddress = "127.0.0.1:{link.port}"\ninsecure = true\n'
    (home / "config.toml").write_text(where)
    command = [str(Path(sys.executable).parent / "flwr"), "run", str(app), "own", "--format", "json"]
    environment = {**os.environ, **SETTINGS, "FLWR_HOME": str(home)}
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120).stdout
    assert '"success": true' in said
    for secret in (None, b"guess" * 8):
        runtime = Runtime(f"127.0.0.1:{link.port}", secret)
        with contextlib.closing(runtime), pytest.raises(FederationError, match="refuses the secret"):
            runtime.acquire(["flwr-serverapp"])
    link.run()
    with pytest.raises(FederationError, match="ServerApp ended"):  # it was told no run directory
        for _ in range(600):
            link.check()
            time.sleep(0.1)
    assert not (tmp_path / "mark").exists()


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
    prepare()
    assert os.environ["no_proxy"] == os.environ["NO_PROXY"] == spared
