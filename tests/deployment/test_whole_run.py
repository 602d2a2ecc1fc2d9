"""Real processes of one owner and three data owners end in the bits of the engine inline; only the proxy leaves."""

import base64
import contextlib
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fedproxy.artifacts import Manifest, read_json
from fedproxy.deployment.flower.command import command
from fedproxy.deployment.handout.link import whole_request
from fedproxy.deployment.keys import add_client, client_key_file, init_keys, read_client_key
from fedproxy.deployment.ledger import check
from tests.deployment.conftest import FEDPROXY, WORDS, Federation
from tests.deployment.network import Tap, proxy, tap
from tests.docs.terminal import free_port

KINDS = "introduction", "hand-out", "connection", "heartbeat", "order", "answer", "farewell"


@pytest.fixture(scope="module")
def one(tmp_path_factory, tiny_checkpoint, calibration):
    """A federation of three rounds, run by the engine inline."""
    made = Federation(tmp_path_factory.mktemp("federation"), tiny_checkpoint(), calibration, rows=8, rounds=3, quorum=3)
    try:
        made.federate("inline").ends()
        yield made
    finally:
        made.clear()


@pytest.fixture(autouse=True)
def own_address(one: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    """An address of its own, in a network whose proxy leads nowhere and is said to be for all addresses."""
    one.address = ""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)


def check_run(one: Federation, out: str) -> None:
    """A complete run of the same bits as that of the engine inline."""
    assert one.adapter(out) == one.adapter("inline")
    expected, found = one.rounds("inline"), one.rounds(out)
    assert expected.keys() == found.keys()
    assert all(found[name] == content for name, content in expected.items() if name.endswith(".safetensors"))
    for number in (1, 2, 3):
        record = one.record(out, number)
        assert set(record["clients"]) == set(WORDS)
        assert not record["refused"] + record["quarantined"] + record["dropouts"]
    folder = one.folder / out
    proxy = AutoModelForCausalLM.from_pretrained(folder / "proxy")
    PeftModel.from_pretrained(proxy, folder / "adapter")
    assert Manifest.read(folder / "adapter").layer_map == Manifest.read(folder / "proxy").layer_map
    assert not list(folder.rglob("*.tmp-*"))
    assert not (folder / "rounds" / ".open").exists()


@pytest.mark.slow
def test_the_whole_run_over_tls(one: Federation, tiny_checkpoint) -> None:
    owner = one.serve("tls", command=FEDPROXY)
    out = {name: one.folder / f"out-{name}" for name in WORDS}
    declined = one.join("animals", "--max-steps", 1, cache="cache-animals", log="declined").ends(4)
    assert {"max_steps", "2", "1"} <= set(re.findall(r"\w+", declined.partition("Error:")[2]))
    assert not proxies(one.folder / "cache-animals")
    looked = one.join("animals", "--look", cache="cache-animals", log="looked").ends()
    assert not proxies(one.folder / "cache-animals")
    (offer,) = re.findall("SHA-256 of this offer: ([0-9a-f]{64})", looked)
    first = one.join("animals", "--offer", offer, cache="cache-animals", log="first")
    first.says("Ready: ")
    first.kill()
    first.clear()
    fetched = proxies(one.folder / "cache-animals")
    assert any(path.suffix == ".safetensors" for path in fetched)
    with tap(one.keys, one.address) as tapped:
        server, one.address = one.address, tapped.address
        clients = [one.join("animals", "--ledger", "full", "--out", out["animals"], cache="cache-animals")]
        one.address = server
        more = {"colours": ["--every-round"], "numbers": stock_supernode(one, "numbers")}
        clients += [
            one.join(name, *how, "--out", out[name], cache=f"cache-{name}", command=FEDPROXY)
            for name, how in more.items()
        ]
        clients[0].says("Sent an update")
        assert set(clients[0].family()) >= connected(tapped.address) == {clients[0].pid}
        assert not connected(server) & set(clients[0].family())
        owner.ends()
        for client in clients:
            assert "The federation is complete" in client.ends()
    check_run(one, "tls")
    assert proxies(one.folder / "cache-animals") == fetched  # neither a second join nor a round fetches anything
    caches = [one.folder / f"cache-{name}" for name in WORDS]
    check_ledger(caches[0], tapped)
    check_hidden(one, Path(tiny_checkpoint()), caches)
    check_results(one, [(caches[i], out[name]) for i, name in enumerate(WORDS)])


def proxies(cache: Path) -> dict[Path, int]:
    """The files of proxies in a cache, and when each was changed last."""
    kept = (path for path in cache.rglob("*") if path.is_file() and "clients" not in path.relative_to(cache).parts)
    return {path: path.stat().st_ctime_ns for path in kept}


def connected(address: str) -> set[int]:
    """The processes that hold a connection to an address of loopback."""
    port, found = f"0100007F:{int(address.rpartition(':')[2]):04X}", set()
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    sockets = {f"socket:[{row[9]}]" for row in rows if row[2] == port and row[3] == "01"}
    for handle in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if os.readlink(handle) in sockets:
                found.add(int(handle.parts[2]))
    return found


def check_ledger(cache: Path, tapped: Tap) -> None:
    """What came out of the client's connections, within TLS, is to the byte what its ledger says."""
    came = []
    for stream in tapped.streams:
        while stream:
            length = whole_request(stream)
            assert length
            came.append(bytes(stream[:length]))
            del stream[:length]
    (file,) = cache.rglob("ledger.jsonl")
    lines = [line for line, _ in check(file)]
    noted = [base64.b64decode(line["payload"]) for line in lines if line["to"] == tapped.address]
    assert sorted(noted) == sorted(came)
    assert sum(map(len, came)) > 10_000
    kinds = {line["event"] for line in lines if line["to"] == tapped.address}
    assert kinds | {"heartbeat"} == {*KINDS}
    updates = [base64.b64decode(line["payload"]) for line in lines if line["event"] == "update"]
    assert len(updates) == 3
    sent = b"".join(content.partition(b"\r\n\r\n")[2] for content in noted if b"push-object" in content[:60])
    assert all(update[-64:] in sent for update in updates)
    assert {line["event"] for line in lines if line["to"] not in (tapped.address, "SuperNode")} >= {"introduction"}


def check_results(one: Federation, clients: list[tuple[Path, Path]]) -> None:
    """Each client has the owner's adapter to the bit, and it fits the proxy that it has."""
    owner = one.folder / "tls"
    for cache, out in clients:
        assert (out / "adapter_model.safetensors").read_bytes() == one.adapter("tls")
        assert read_json(out / "adapter_config.json") == read_json(owner / "adapter" / "adapter_config.json")
        assert Manifest.read(out).layer_map == Manifest.read(owner / "adapter").layer_map
        card = (out / "README.md").read_text()
        assert "after 3 rounds at most" in card
        assert str(one.folder) not in card
        assert {path.name for path in out.iterdir()} == {path.name for path in (owner / "adapter").iterdir()} | {
            "README.md"
        }
        (proxy,) = {path.parent for path in proxies(cache) if path.suffix == ".safetensors"}
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(proxy), out)
        assert not list(cache.rglob("adapter_model*"))


def stock_supernode(one: Federation, name: str) -> list[object]:
    """Start a SuperNode as Flower's documentation says, of a client's key; how to join beside it."""
    folder = one.folder / "supernode"
    folder.mkdir()
    (folder / "secret").write_bytes(b"not to be guessed")
    (folder / "key").write_bytes(read_client_key(client_key_file(one.keys, name)).private_openssh)
    port = free_port()
    secure = ["--root-certificates", one.keys / "ca.crt", "--auth-supernode-private-key", folder / "key"]
    alone = ["--isolation", "process", "--superexec-auth-secret-file", folder / "secret"]
    where = ["--superlink", one.address, "--host", "127.0.0.1", "--port", port]
    own = ["env", "NO_PROXY=127.0.0.1", *command("flower-supernode")]  # its operator knows the network
    one.start("supernode", *where, *alone, *secure, command=own)
    return ["--supernode", f"127.0.0.1:{port}", "--supernode-secret", folder / "secret"]


def check_hidden(one: Federation, llm: Path, caches: list[Path]) -> None:
    """No tensor of a removed block, and no path of the owner, is among what a client has."""
    kept = read_json(one.folder / "tls" / "proxy" / "fedproxy.json")["layer_map"]
    weights = {name: tensor for file in llm.glob("*.safetensors") for name, tensor in load_file(file).items()}
    removed = {name for name in weights if ".layers." in name and int(name.split(".")[2]) not in kept}
    secret = [weights[name].numpy().tobytes() for name in removed if weights[name].unique().numel() > 1]
    assert len(secret) >= 3
    paths = [str(path).encode() for path in (llm, llm.parent, one.folder / "tls", one.keys, one.experiment)]
    for cache in caches:
        files = [path for path in cache.rglob("*") if path.is_file()]
        for content in [path.read_bytes() for path in files]:
            assert not [path for path in paths if path in content]
            assert not any(part in content for part in secret)
        (model,) = (path for path in files if path.suffix == ".safetensors")
        blocks = {int(name.split(".")[2]) for name in load_file(model) if ".layers." in name}
        assert blocks == set(range(len(kept)))


@pytest.mark.long
def test_without_keys_on_loopback(one: Federation) -> None:
    owner = one.serve("plain", secure=False)
    clients = [one.join(name, "--insecure", "--name", name) for name in WORDS]
    clients[0].says("Ready")
    assert "Another client is here as animals" in one.join(
        "animals", "--insecure", "--name", "animals", log="twin"
    ).ends(4)
    owner.ends()
    for client in clients:
        client.ends()
    check_run(one, "plain")


@pytest.mark.long
def test_on_machines_as_they_are(one: Federation) -> None:
    """No PATH and no HOME; a long TMPDIR; one that holds a space and, where it can be had, lets nothing be executed."""
    long, bare = one.folder / ("x" * 150), one.folder / "no exec"
    for folder in (long, bare):
        folder.mkdir()
    mounted = ["unshare", "-m", "sh", "-c", f'mount -t tmpfs -o noexec tmpfs "{bare}" && exec "$@"', "sh"]
    allowed = subprocess.run([*mounted, "true"], capture_output=True).returncode == 0
    commands = {
        "animals": ["env", "-u", "PATH", "-u", "HOME", *FEDPROXY],
        "colours": ["env", f"TMPDIR={long}", *FEDPROXY],
        "numbers": [*(mounted if allowed else ()), "env", f"TMPDIR={bare}", *FEDPROXY],
    }
    owner = one.serve("machines", command=["env", "-u", "PATH", f"TMPDIR={long}", *FEDPROXY])
    clients = [one.join(name, cache=f"cache-{name}", command=command) for name, command in commands.items()]
    owner.ends()
    for client in clients:
        assert "The federation is complete" in client.ends()
    check_run(one, "machines")


@pytest.mark.long
def test_through_a_proxy_as_the_only_way_out_and_over_a_slow_line(federation: Callable[..., Federation]) -> None:
    """Hand-out and rounds alike, by a name that only the proxy knows; one client has 12 kB a second."""
    two = federation(rows=8, rounds=2, quorum=3)
    two.federate("inline").ends()
    shutil.rmtree(two.keys)
    init_keys(two.keys, ["owner.test"])
    for name in WORDS:
        add_client(two.keys, name)
    owner = two.serve("proxied")
    two.address = two.address.replace("127.0.0.1", "owner.test")
    with proxy() as fast, proxy(12_000.0) as slow:
        ways = {"animals": fast, "colours": fast, "numbers": slow}
        clients = [
            two.join(name, cache=f"cache-{name}", command=["env", f"HTTPS_PROXY={way.url}", *FEDPROXY])
            for name, way in ways.items()
        ]
        owner.ends()
        for client in clients:
            assert "The federation is complete" in client.ends()
        assert set(fast.seen) == set(slow.seen) == {two.address}
    assert two.adapter("proxied") == two.adapter("inline")


@pytest.mark.slow
def test_without_keys_beyond_loopback_only_by_force(one: Federation) -> None:
    one.address = "0.0.0.0:0"
    assert "add --force" in one.serve("open", secure=False, ready=False).ends(2)
    one.address = "192.0.2.1:9443"
    assert "add --force" in one.join("animals", "--insecure", "--name", "animals").ends(2)
    assert not (one.folder / "open").exists()


@pytest.mark.long
def test_a_client_that_agrees_to_no_encoding_sends_another(federation: Callable[..., Federation]) -> None:
    options = {"wire_options.share": 0.5, "wire_options.values": "int4"}
    two = federation(rows=8, rounds=2, quorum=3, wire="top-k", wire_down="int8", share_result=False, **options)
    owner = two.serve("mixed")
    refused = two.join("animals", "--out", two.folder / "out", log="refused").ends(4)
    assert "share_result" in refused.partition("Error:")[2]
    clients = [two.join(name, *(("--wire", "bf16") if name == "animals" else ())) for name in WORDS]
    owner.ends()
    for client in clients:
        client.ends()
    assert not (two.folder / "out").exists()
    assert not list(two.folder.glob("cache*/**/adapter_model*"))
    for number in (1, 2):
        sent = two.record("mixed", number)["clients"]
        assert {name: reply["wire"] for name, reply in sent.items()} == dict.fromkeys(WORDS, "top-k") | {
            "animals": "fp32"
        }
        assert sent["numbers"]["bytes_up"] < sent["animals"]["bytes_up"] / 6
