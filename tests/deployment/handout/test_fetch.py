import contextlib
import json
import os
import pwd
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from safetensors import safe_open

import fedproxy
from fedproxy.artifacts import Manifest
from fedproxy.deployment.handout import fetch
from fedproxy.deployment.handout.fetch import default_cache, fetch_proxy
from fedproxy.deployment.handout.server import _Handler
from fedproxy.deployment.keys import init_keys
from fedproxy.deployment.limits import Allowance
from fedproxy.errors import ArtifactError, FederationError, ResourceError, UsageError
from tests.crashes import failing, moments

PART = 1 << 20


@pytest.fixture
def requests(monkeypatch):
    """Paths asked for, in order."""
    paths = []
    ask = _Handler.do_GET

    def counted(handler):
        paths.append(handler.path)
        ask(handler)

    monkeypatch.setattr(_Handler, "do_GET", counted)
    return paths


def same(fetched, proxy):
    for path in proxy.iterdir():
        if path.name != "fedproxy.json":
            assert (fetched / path.name).read_bytes() == path.read_bytes()
    assert Manifest.read(fetched).layer_map == Manifest.read(proxy).layer_map
    return True


@pytest.mark.parametrize("tls", [True, False])
def test_a_proxy_arrives_once(serve, proxy, ca, tmp_path, requests, tls):
    hub = serve(proxy, tls=tls)
    told = []
    arguments = (hub.url, hub.token, hub.listing.sha256, tmp_path / "cache", ca if tls else None)
    path = fetch_proxy(*arguments, on_bytes=lambda done, total: told.append((done, total)))
    assert path == tmp_path / "cache" / hub.listing.sha256
    assert same(path, proxy)
    assert told[0] == (0, hub.listing.size)
    assert told[-1] == (hub.listing.size, hub.listing.size)
    assert told == sorted(told)
    assert len(requests) == len(set(requests)) == 1 + sum(len(file.parts) for file in hub.listing.files)
    assert hub.server.sent == {"bank": hub.listing.size}
    requests.clear()
    hub.server.close()
    assert fetch_proxy(*arguments) == path
    assert requests == []


def test_modes_follow_the_umask(serve, proxy, ca, tmp_path, umask):
    hub = serve(proxy)
    path = fetch_proxy(hub.url, hub.token, hub.listing.sha256, tmp_path / "cache", ca)
    assert path.stat().st_mode & 0o777 == 0o777 & ~umask
    assert {file.stat().st_mode & 0o777 for file in path.iterdir()} == {0o666 & ~umask}


def test_three_clients_at_once(serve, proxy, ca, tmp_path):
    hub = serve(proxy)
    tokens = [hub.server.issue(name) for name in ("bank", "shop", "clinic")]

    def get(number):
        return fetch_proxy(hub.url, tokens[number], hub.listing.sha256, tmp_path / str(number), ca)

    with ThreadPoolExecutor(3) as pool:
        assert all(same(path, proxy) for path in pool.map(get, range(3)))
    assert hub.server.sent == dict.fromkeys(("bank", "shop", "clinic"), hub.listing.size)


def test_one_cache_for_two_fetches_at_once(serve, proxy, ca, tmp_path, requests):
    hub = serve(proxy)
    with ThreadPoolExecutor(3) as pool:
        jobs = [
            pool.submit(fetch_proxy, hub.url, hub.token, hub.listing.sha256, tmp_path / "cache", ca) for _ in range(3)
        ]
        assert len({job.result() for job in jobs}) == 1
    assert len(requests) == len(set(requests))


def test_a_part_that_broke_off_is_continued(serve, proxy, ca, tmp_path, monkeypatch):
    hub = serve(proxy, part_bytes=4 * PART)
    send, broken = _Handler._send_part, set()

    def break_off(handler, name, handle, offset, length):
        if offset not in broken and length == 4 * PART:
            broken.add(offset)
            handler._head(200, length)
            handler.wfile.write(os.pread(handle, 3 * PART, offset))
            handler.server.owner.count_sent(name, 3 * PART)
            handler.close_connection = True
        else:
            send(handler, name, handle, offset, length)

    monkeypatch.setattr(_Handler, "_send_part", break_off)
    path = fetch_proxy(hub.url, hub.token, hub.listing.sha256, tmp_path / "cache", ca)
    assert broken
    assert same(path, proxy)
    assert hub.server.sent["bank"] == hub.listing.size


def edit(path, offset=PART + 7):
    time.sleep(0.02)  # the clock that files are stamped with ticks every few milliseconds
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def test_a_damaged_copy_is_noticed_and_mended(serve, proxy, ca, tmp_path, requests):
    hub = serve(proxy)
    arguments = (hub.url, hub.token, hub.listing.sha256, tmp_path / "cache", ca)
    path = fetch_proxy(*arguments)
    before = os.stat(path / "model.safetensors")
    edit(path / "model.safetensors")
    os.utime(path / "model.safetensors", ns=(before.st_atime_ns, before.st_mtime_ns))
    (path / "modeling.py").write_text("import os")
    requests.clear()
    assert same(fetch_proxy(*arguments), proxy)
    assert len(requests) == 1
    assert not (path / "modeling.py").exists()
    for harm in (lambda: os.truncate(path / "model.safetensors", 5), lambda: (path / "config.json").unlink()):
        harm()
        assert same(fetch_proxy(*arguments), proxy)


def test_a_copy_that_was_only_touched_is_not_fetched_again(serve, proxy, ca, tmp_path, requests):
    hub = serve(proxy)
    arguments = (hub.url, hub.token, hub.listing.sha256, tmp_path / "cache", ca)
    path = fetch_proxy(*arguments)
    requests.clear()
    (path / "model.safetensors").touch()
    (path / ".complete.json").unlink()
    assert fetch_proxy(*arguments) == path
    assert requests == []


def test_links_in_a_half_fetched_folder_are_not_followed(serve, proxy, ca, tmp_path):
    hub = serve(proxy)
    target = tmp_path / "mine"
    target.write_text("mine")
    work = tmp_path / "cache" / f".{hub.listing.sha256}.partial"
    work.mkdir(parents=True)
    (work / "model.safetensors").symlink_to(target)
    assert same(fetch_proxy(hub.url, hub.token, hub.listing.sha256, tmp_path / "cache", ca), proxy)
    assert target.read_text() == "mine"


def test_a_revoked_client_is_refused_from_the_next_part_on(serve, proxy, ca, tmp_path):
    hub = serve(proxy)

    def revoke(done, total):
        if done >= 2 * PART:
            hub.revoked.add("bank")

    arguments = (hub.url, hub.token, hub.listing.sha256, tmp_path / "cache", ca)
    with pytest.raises(FederationError, match=r"127\.0\.0\.1:\d+.*403"):
        fetch_proxy(*arguments, on_bytes=revoke, connections=1)
    assert hub.server.sent["bank"] < 4 * PART
    assert not (tmp_path / "cache" / hub.listing.sha256).exists()
    hub.revoked.clear()
    assert same(fetch_proxy(*arguments), proxy)


def test_a_wrong_token(serve, proxy, ca, tmp_path):
    hub = serve(proxy)
    with pytest.raises(FederationError, match="401"):
        fetch_proxy(hub.url, "x" * 43, hub.listing.sha256, tmp_path, ca)
    with pytest.raises(UsageError, match="token"):
        fetch_proxy(hub.url, "x\r\nHost: y", hub.listing.sha256, tmp_path, ca)


def test_a_wrong_ca(serve, proxy, tmp_path):
    hub = serve(proxy)
    init_keys(tmp_path / "other")
    other = (tmp_path / "other" / "ca.crt").read_bytes()
    with pytest.raises(FederationError, match="CA certificate"):
        fetch_proxy(hub.url, hub.token, hub.listing.sha256, tmp_path, other)
    with pytest.raises(FederationError, match="CA certificate"):
        fetch_proxy(hub.url, hub.token, hub.listing.sha256, tmp_path, None)
    with pytest.raises(ArtifactError, match="CA certificate"):
        fetch_proxy(hub.url, hub.token, hub.listing.sha256, tmp_path, other[:-80])
    assert hub.server.sent == {}


def test_a_host_the_certificate_is_not_for(keys, serve, proxy, ca, tmp_path):
    hub = serve(proxy)
    with pytest.raises(FederationError, match=r"127\.0\.0\.2"):
        fetch_proxy(f"https://127.0.0.2:{hub.server.port}", hub.token, hub.listing.sha256, tmp_path, ca)


def test_plaintext_and_tls_do_not_mix(serve, proxy, ca, tmp_path):
    safe, plain = serve(proxy), serve(proxy, tls=False)
    identity = safe.listing.sha256
    with pytest.raises(FederationError, match="does not speak TLS"):
        fetch_proxy(plain.url.replace("http:", "https:"), plain.token, identity, tmp_path, ca)
    with pytest.raises(FederationError, match="plaintext"):
        fetch_proxy(plain.url, plain.token, identity, tmp_path, ca)
    with pytest.raises(FederationError, match=r"speaks TLS|attempts failed"):
        fetch_proxy(safe.url.replace("https:", "http:"), safe.token, identity, tmp_path, None)


def test_nobody_there(tmp_path):
    with pytest.raises(FederationError, match=r"127\.0\.0\.1:9\b"):
        fetch_proxy("http://127.0.0.1:9", "token", "0" * 64, tmp_path, None)


@pytest.mark.parametrize("url", ["", "ftp://a:1", "https://a", "https://a:1/x", "https://a:x", "https://u@:1", "a:1"])
def test_impossible_addresses(url, tmp_path):
    with pytest.raises(UsageError, match="no address"):
        fetch_proxy(url, "token", "0" * 64, tmp_path, None)


@pytest.mark.parametrize("identity", ["", "../../x", "0" * 63, "0" * 65, "A" * 64])
def test_impossible_identities(identity, tmp_path):
    with pytest.raises(ArtifactError, match="SHA-256"):
        fetch_proxy("https://a:1", "token", identity, tmp_path / "cache", None)
    assert not (tmp_path / "cache").exists()


def test_another_proxy_than_expected(serve, proxy, ca, tmp_path):
    hub = serve(proxy)
    with pytest.raises(ArtifactError, match="another proxy"):
        fetch_proxy(hub.url, hub.token, "0" * 64, tmp_path, ca)


def test_a_disk_too_small_is_noticed_before_a_part_is_fetched(serve, proxy, ca, tmp_path, monkeypatch):
    hub = serve(proxy)
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda path: fetch.shutil._ntuple_diskusage(9, 9, PART))
    with pytest.raises(ResourceError, match="GB"):
        fetch_proxy(hub.url, hub.token, hub.listing.sha256, tmp_path, ca)
    assert hub.server.sent == {}


def test_a_cache_that_cannot_be_written(serve, proxy, ca, tmp_path):
    (tmp_path / "file").write_text("")
    hub = serve(proxy)
    with pytest.raises(UsageError, match="cannot write"):
        fetch_proxy(hub.url, hub.token, hub.listing.sha256, tmp_path / "file" / "cache", ca)


def test_a_full_disk_while_fetching(serve, proxy, ca, tmp_path, monkeypatch):
    hub = serve(proxy)
    monkeypatch.setattr(fetch.os, "pwrite", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(ResourceError, match="No space left"):
        fetch_proxy(hub.url, hub.token, hub.listing.sha256, tmp_path, ca)


def test_where_proxies_are_kept(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/c")
    assert default_cache() == Path("/c/fedproxy/proxies")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/h")
    assert default_cache() == Path("/h/.cache/fedproxy/proxies")


def test_without_a_home_a_cache_is_asked_for(monkeypatch):
    def nobody(*_):
        raise KeyError("uid not found")

    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    with pytest.raises(UsageError, match="--cache"):
        default_cache()


def test_a_proxy_that_is_larger_than_allowed_is_not_fetched(serve, proxy, ca, tmp_path):
    hub = serve(proxy)
    size = hub.listing.size
    arguments = (hub.url, hub.token, hub.listing.sha256, tmp_path, ca)
    with pytest.raises(FederationError) as refused:
        fetch_proxy(*arguments, most=size - 1)
    assert {"max_download", str(size), str(size - 1)} <= set(re.findall(r"\w+", str(refused.value)))
    assert hub.server.sent == {}
    assert same(fetch_proxy(*arguments, most=size), proxy)


def test_what_arrives_is_the_proxy_and_nothing_of_the_rest(tiny_checkpoint, calibration, serve, ca, tmp_path):
    llm = tiny_checkpoint()
    proxy = fedproxy.compress(llm, tmp_path / "proxy", calibration=calibration)
    hub = serve(proxy.path)
    path = fetch_proxy(hub.url, hub.token, hub.listing.sha256, tmp_path / "cache", ca)
    content = b"".join(file.read_bytes() for file in path.iterdir())
    removed = sorted(set(range(6)) - set(proxy.layer_map))
    with safe_open(llm / "model.safetensors", "numpy") as tensors:
        for name in tensors.keys():  # noqa: SIM118
            if name.startswith("model.layers."):
                block, values = int(name.split(".")[2]), tensors.get_tensor(name)
                if len(set(values.ravel().tolist())) > 1:  # norms are all ones in every block
                    assert (values.tobytes() in content) == (block not in removed)
    assert str(llm).encode() not in content
    assert json.loads((path / "fedproxy.json").read_text()).keys() == {"format", "kind", "versions", "llm", "layer_map"}
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert AutoModelForCausalLM.from_pretrained(path).config.num_hidden_layers == 3
    assert AutoTokenizer.from_pretrained(path)("a")["input_ids"]


CHILD = """
import sys, time
from pathlib import Path
from fedproxy.deployment.handout.fetch import fetch_proxy
url, token, identity, cache, ca = sys.argv[1:]
print("begun", flush=True)
fetch_proxy(url, token, identity, Path(cache), Path(ca).read_bytes(), on_bytes=lambda done, total: time.sleep(0.003))
assert "torch" not in sys.modules
"""


@pytest.mark.slow
def test_a_killed_process_goes_on_where_it_was(serve, proxy, keys, tmp_path, requests):
    """One real kill; the test below has every moment."""
    (proxy / "model.safetensors").write_bytes(random.Random(1).randbytes(40 * PART))
    hub = serve(proxy, part_bytes=4 * PART)
    arguments = [hub.url, hub.token, hub.listing.sha256, str(tmp_path / "cache"), str(keys / "ca.crt")]
    child = subprocess.Popen([sys.executable, "-c", CHILD, *arguments], stdout=subprocess.PIPE)
    child.stdout.readline()
    until = time.monotonic() + 60
    while len(requests) < 6 and time.monotonic() < until:
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert child.returncode == -signal.SIGKILL
    path = fetch_proxy(*arguments[:3], tmp_path / "cache", (keys / "ca.crt").read_bytes())
    assert same(path, proxy)
    assert len([path for path in requests if path != "/listing"]) <= sum(len(f.parts) for f in hub.listing.files) + 2


def test_at_no_moment_of_a_fetch_half_a_proxy_passes_for_whole(serve, proxy, ca, tmp_path, requests):
    hub, place = serve(proxy), tmp_path / "place"
    hub.server.bytes = Allowance(1e12, 1.0)
    place.mkdir()
    arguments = (hub.url, hub.token, hub.listing.sha256)
    parts = sum(len(file.parts) for file in hub.listing.files)
    states = moments(lambda: fetch_proxy(*arguments, place, ca, connections=1), place, tmp_path / "kept")
    assert len(states) > parts
    fetched = []
    for state in states:
        complete = state / hub.listing.sha256
        assert not complete.exists() or same(complete, proxy)
        requests.clear()
        assert same(fetch_proxy(*arguments, state, ca), proxy)
        fetched.append(len([path for path in requests if path != "/listing"]))
        assert {path.name for path in state.iterdir()} == {complete.name, f".{complete.name}.lock"}
    assert (max(fetched), fetched[-1]) == (parts, 0)
    assert set(fetched) == set(range(parts + 1))  # part by part, what was complete is not fetched again


def test_a_disk_that_is_full_at_any_moment_of_a_fetch(serve, proxy, ca, tmp_path):
    hub = serve(proxy)
    arguments = (hub.url, hub.token, hub.listing.sha256, tmp_path / "cache", ca)
    for number in range(1, 200):
        with failing(tmp_path / "cache", number) as calls, contextlib.suppress(ResourceError):
            assert same(fetch_proxy(*arguments, connections=1), proxy)
        if len(calls) < number:
            break
        complete = tmp_path / "cache" / hub.listing.sha256
        assert not complete.exists() or same(complete, proxy)
        shutil.rmtree(complete, ignore_errors=True)
    assert number > 5
