"""What is fetched of a repository, from a small server that speaks as much of the Hub's protocol as that needs."""

import functools
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.conftest import make_model, make_tokenizer

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FETCH = """
import json, sys
from fedproxy.models.checkpoints import load_model, resolve

def fetched(name, weights):
    place = resolve(name, weights=weights)
    return sorted(str(file.relative_to(place)) for file in place.rglob("*") if file.is_file())

found = {}
for name in sys.argv[1:]:
    found[name] = fetched(name, False), fetched(name, True)
    load_model(name)
print(json.dumps(found))
"""


class Hub(BaseHTTPRequestHandler):
    """Serves the repositories of "bank" from a folder, as bank/NAME."""

    def __init__(self, folder: Path, *args: object) -> None:
        self.folder = folder
        super().__init__(*args)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        name = self.path.removeprefix("/api/models").split("/")[2]
        folder = self.folder / name
        if self.path.startswith("/api/models/"):
            files = sorted(file for file in folder.rglob("*") if file.is_file())
            names = {str(file.relative_to(folder)): file.stat().st_size for file in files}
            tree = [{"type": "file", "path": name, "size": size, "oid": name} for name, size in names.items()]
            info = {"id": f"bank/{name}", "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}
            self._answer(json.dumps(tree if "/tree/" in self.path else info).encode())
        elif f"/{COMMIT}/" not in self.path:
            self.send_error(404)
        else:
            self._answer((folder / self.path.partition(f"/{COMMIT}/")[2]).read_bytes())

    do_HEAD = do_GET  # noqa: N815

    def _answer(self, content: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        pass


def make_repository(folder: Path, shard: str) -> None:
    """A model in shards of at most so much, with the same weights again as other tools want them."""
    make_model().save_pretrained(folder, max_shard_size=shard)
    make_tokenizer().save_pretrained(folder)
    twins = (
        "consolidated.safetensors consolidated-00001-of-00002.safetensors original/model.safetensors onnx/model.onnx"
    )
    for name in f"{twins} pytorch_model.bin model.gguf original/params.json original/tokenizer.model".split():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"the same again")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("{{ messages }}")


@pytest.fixture
def bank(tmp_path: Path) -> Path:
    """A repository whose model is one file, and one whose model is several."""
    make_repository(tmp_path / "bank" / "single", "1GB")
    make_repository(tmp_path / "bank" / "shards", "40KB")
    return tmp_path / "bank"


@pytest.fixture
def hub(bank: Path) -> Iterator[str]:
    """Its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Hub, bank))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_the_weights_are_fetched_once(hub: str, bank: Path, tmp_path: Path) -> None:
    fresh = {"HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0", "NO_PROXY": "*"}
    command = [sys.executable, "-c", FETCH, "bank/single", "bank/shards"]
    done = subprocess.run(command, env={**os.environ, **fresh}, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for name in ("single", "shards"):
        few, everything = map(set, found[f"bank/{name}"])
        weights = {file.name for file in (bank / name).glob("model*.safetensors")}
        assert len(weights) == 1 if name == "single" else len(weights) > 1
        assert few >= {"config.json", "tokenizer.json", "additional_chat_templates/rag.jinja"}
        assert not {name for name in few if name.endswith((".safetensors", ".bin", ".gguf", ".onnx", "params.json"))}
        assert everything == few | weights
