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
import sys
from fedproxy.models.checkpoints import load_model, resolve
place = resolve("bank/small-llm", weights=sys.argv[1] == "all")
print("\\n".join(sorted(str(file.relative_to(place)) for file in place.rglob("*") if file.is_file())))
if sys.argv[1] == "all":
    load_model("bank/small-llm")
"""


class Hub(BaseHTTPRequestHandler):
    """Serves one repository from a folder."""

    def __init__(self, folder: Path, *args: object) -> None:
        self.folder = folder
        super().__init__(*args)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        if self.path.startswith("/api/models/"):
            files = sorted(file for file in self.folder.rglob("*") if file.is_file())
            names = {str(file.relative_to(self.folder)): file.stat().st_size for file in files}
            tree = [{"type": "file", "path": name, "size": size, "oid": name} for name, size in names.items()]
            info = {"id": "bank/small-llm", "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}
            self._answer(json.dumps(tree if "/tree/" in self.path else info).encode())
        elif f"/{COMMIT}/" not in self.path:
            self.send_error(404)
        else:
            self._answer((self.folder / self.path.partition(f"/{COMMIT}/")[2]).read_bytes())

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


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A model in shards, with the same weights again as other tools want them."""
    folder = tmp_path / "repository"
    make_model().save_pretrained(folder, max_shard_size="40KB")
    make_tokenizer().save_pretrained(folder)
    twins = (
        "consolidated.safetensors consolidated-00001-of-00002.safetensors original/model.safetensors onnx/model.onnx"
    )
    for name in f"{twins} pytorch_model.bin model.gguf original/params.json original/tokenizer.model".split():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"the same again")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("{{ messages }}")
    return folder


@pytest.fixture
def hub(repository: Path) -> Iterator[str]:
    """Its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Hub, repository))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def fetched(hub: str, home: Path, what: str) -> set[str]:
    environment = {**os.environ, "HF_ENDPOINT": hub, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "NO_PROXY": "*"}
    done = subprocess.run([sys.executable, "-c", FETCH, what], env=environment, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.mark.parametrize("single", [False, True])
def test_the_weights_are_fetched_once(hub: str, repository: Path, tmp_path: Path, single: bool) -> None:
    if single:
        for file in repository.glob("model*.safetensors*"):
            file.unlink()
        make_model().save_pretrained(repository)
    shards = {file.name for file in repository.glob("model*.safetensors")}
    assert len(shards) == 1 if single else len(shards) > 1
    few = fetched(hub, tmp_path / "home", "few")
    assert few >= {"config.json", "tokenizer.json", "additional_chat_templates/rag.jinja"}
    assert not {name for name in few if name.endswith((".safetensors", ".bin", ".gguf", ".onnx", "params.json"))}
    assert fetched(hub, tmp_path / "home", "all") == few | shards
