"""A folder that passes for a proxy, keys, and a server that hands it out on 127.0.0.1."""

import contextlib
import random
from types import SimpleNamespace

import pytest

from fedproxy.artifacts import Manifest, write_json
from fedproxy.deployment.handout import download
from fedproxy.deployment.handout.parts import describe
from fedproxy.deployment.handout.server import HandoutServer
from fedproxy.deployment.keys import init_keys

PART = 1 << 20


@pytest.fixture(scope="session")
def keys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("keys") / "keys"
    init_keys(folder)
    return folder


@pytest.fixture(scope="session")
def ca(keys):
    return (keys / "ca.crt").read_bytes()


@pytest.fixture
def proxy(tmp_path):
    folder = tmp_path / "proxy"
    folder.mkdir()
    content = random.Random(0).randbytes(5 * PART + 12345)
    (folder / "model.safetensors").write_bytes(content)
    (folder / "merges.txt").write_bytes(b"")
    write_json(folder / "config.json", {"model_type": "llama"})
    Manifest("proxy", "0" * 64, 4, [0, 3]).write(folder)
    return folder


@pytest.fixture
def serve(keys):
    """A function that hands out a folder: `serve(proxy).url`, `.token`, `.listing`, `.revoked`, `.server`."""
    with contextlib.ExitStack() as stack:

        def start(folder, *, tls=True, part_bytes=PART):
            revoked = set()
            listing = describe(folder, part_bytes)
            pair = (keys / "server.crt", keys / "server.key") if tls else (None, None)
            server = HandoutServer(folder, listing, "127.0.0.1", 0, *pair, lambda name: name not in revoked)
            stack.enter_context(server)
            url = f"{'https' if tls else 'http'}://127.0.0.1:{server.port}"
            return SimpleNamespace(server=server, listing=listing, url=url, token=server.issue("bank"), revoked=revoked)

        yield start


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(download, "PAUSE_SECONDS", 0.001)
