import socket
import ssl
import time
from http.client import HTTPConnection

import pytest

from fedproxy.deployment.handout import https as module
from fedproxy.deployment.handout import server as sending
from fedproxy.deployment.handout.fetch import fetch_proxy
from fedproxy.deployment.handout.server import HandoutServer
from fedproxy.deployment.limits import Allowance
from fedproxy.errors import ArtifactError, FederationError, UsageError


def ask(hub, path, **headers):
    connection = HTTPConnection("127.0.0.1", hub.server.port, timeout=5)
    connection.request("GET", path, headers={"Authorization": f"Bearer {hub.token}", **headers})
    answer = connection.getresponse()
    found = answer.status, answer.read()
    connection.close()
    return found


@pytest.fixture
def hub(serve, proxy):
    return serve(proxy, tls=False)


def test_parts_and_ranges(hub, proxy):
    part = hub.listing.files[3].parts[5]
    path, content = f"/parts/{part.sha256}", (proxy / "model.safetensors").read_bytes()[part.offset :]
    assert ask(hub, "/listing") == (200, hub.listing.content)
    assert ask(hub, path) == (200, content)
    assert ask(hub, path, Range="bytes=100-") == (206, content[100:])
    assert ask(hub, path, Range="bytes=0-") == (200, content)
    assert ask(hub, path, Range="bytes=12345-")[0] == 416
    assert ask(hub, path, Range="lines=5-") == (200, content)


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/parts/",
        "/parts/model.safetensors",
        "/parts/../proxy/config.json",
        "/config.json",
        "/parts/" + "0" * 64,
        "/listing/",
        "/listing?x",
        "/parts/%2e%2e/listing",
    ],
)
def test_nothing_goes_by_its_path(hub, path):
    assert ask(hub, path)[0] == 404


def test_no_request_without_a_token(hub):
    path = f"/parts/{hub.listing.files[3].parts[0].sha256}"
    for value in (
        "",
        "Bearer",
        "Bearer ",
        "Bearer x",
        f"Basic {hub.token}",
        hub.token,
        f"Bearer {hub.token}x",
        "Bearer ä",
    ):
        assert ask(hub, path, Authorization=value.encode())[0] == 401
        assert ask(hub, "/listing", Authorization=value.encode())[0] == 401


def test_a_revoked_client_is_refused_at_once_and_others_are_not(hub):
    other = hub.server.issue("shop")
    assert ask(hub, "/listing")[0] == 200
    hub.revoked.add("bank")
    assert ask(hub, "/listing")[0] == 403
    assert ask(hub, "/listing", Authorization=f"Bearer {other}")[0] == 200


def test_tokens_are_long_and_a_clients_own(hub):
    tokens = {hub.server.issue(name) for name in ("bank", "shop", "clinic")}
    assert len(tokens) == 3
    assert min(map(len, tokens)) >= 43
    assert hub.server.issue("bank") == hub.token


def test_a_register_that_cannot_be_read_lets_nobody_in(hub, monkeypatch):
    def damaged(name):
        raise ArtifactError("clients.json is damaged")

    hub.server.allowed = damaged
    assert ask(hub, "/listing")[0] == 503


def test_bodies_and_other_methods_are_refused(hub):
    assert ask(hub, "/listing", **{"Content-Length": "5"})[0] == 400
    assert ask(hub, "/listing", **{"Transfer-Encoding": "chunked"})[0] == 400
    connection = HTTPConnection("127.0.0.1", hub.server.port, timeout=5)
    for method, status in (("POST", 401), ("PUT", 501), ("HEAD", 501)):
        connection.request(method, "/listing", body=b"x")
        answer = connection.getresponse()
        assert (answer.status, hub.listing.content in answer.read()) == (status, False)
    connection.close()


def ends(connection, within):
    """Whether the other side closes the connection in time."""
    connection.settimeout(within)
    try:
        while connection.recv(1 << 16):
            pass
    except ConnectionError:
        return True
    except TimeoutError:
        return False
    return True


def test_a_client_that_does_nothing_is_shut_out(serve, proxy, monkeypatch):
    for limit in ("HANDSHAKE_SECONDS", "REQUEST_SECONDS"):
        monkeypatch.setattr(module, limit, 0.2)
    for tls in (True, False):
        with socket.create_connection(("127.0.0.1", serve(proxy, tls=tls).server.port)) as connection:
            assert ends(connection, 5)


def test_dripping_a_request_does_not_help(hub, monkeypatch):
    monkeypatch.setattr(module, "REQUEST_SECONDS", 0.5)
    with socket.create_connection(("127.0.0.1", hub.server.port)) as connection:
        began = time.monotonic()
        with pytest.raises(ConnectionError):
            while time.monotonic() - began < 10:
                connection.send(b"G")
                time.sleep(0.05)


def test_a_client_that_takes_nothing_is_shut_out(serve, proxy, monkeypatch):
    (proxy / "model.safetensors").write_bytes(bytes(1 << 25))
    hub = serve(proxy, tls=False, part_bytes=1 << 25)
    monkeypatch.setattr(sending, "PIECE_SECONDS", 0.3)
    with socket.create_connection(("127.0.0.1", hub.server.port)) as connection:
        path = f"/parts/{hub.listing.files[3].parts[0].sha256}"
        connection.sendall(f"GET {path} HTTP/1.1\r\nAuthorization: Bearer {hub.token}\r\n\r\n".encode())
        time.sleep(1.5)
        assert ends(connection, 5)
    assert hub.server.sent["bank"] < 1 << 25


def test_connections_are_bounded_and_free_again(serve, proxy, monkeypatch):
    monkeypatch.setattr(module, "CONNECTIONS", 2)
    hub = serve(proxy, tls=False)
    held = [socket.create_connection(("127.0.0.1", hub.server.port)) for _ in range(2)]
    time.sleep(0.2)
    with socket.create_connection(("127.0.0.1", hub.server.port)) as third:
        assert ends(third, 5)
    for connection in held:
        connection.close()
    time.sleep(0.2)
    assert ask(hub, "/listing")[0] == 200


def test_old_tls_is_refused(serve, proxy):
    hub = serve(proxy)
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with socket.create_connection(("127.0.0.1", hub.server.port)) as raw, context.wrap_socket(raw) as connection:
        assert connection.version() == "TLSv1.2"
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    context.set_ciphers("ALL:@SECLEVEL=0")
    with socket.create_connection(("127.0.0.1", hub.server.port)) as raw, pytest.raises((ssl.SSLError, OSError)):
        context.wrap_socket(raw)


def test_files_put_in_place_later_do_not_leave(hub, proxy):
    part = hub.listing.files[3].parts[5]
    content = (proxy / "model.safetensors").read_bytes()[part.offset :]
    (proxy / "model.safetensors").rename(proxy / "old")
    (proxy / "model.safetensors").write_bytes(bytes(6 << 20))
    assert ask(hub, f"/parts/{part.sha256}") == (200, content)


def test_a_proxy_that_changed_since_it_was_listed(hub, proxy, keys):
    (proxy / "model.safetensors").write_bytes(b"other")
    with pytest.raises(ArtifactError, match="changed"):
        HandoutServer(proxy, hub.listing, "127.0.0.1", 0, None, None, lambda name: True)


def test_impossible_settings(hub, proxy, keys, tmp_path):
    def make(host="127.0.0.1", port=0, certificate=None, key=None):
        HandoutServer(proxy, hub.listing, host, port, certificate, key, lambda name: True)

    with pytest.raises(UsageError, match="cannot listen"):
        make(port=hub.server.port)
    with pytest.raises(UsageError, match="cannot listen"):
        make(host="192.0.2.1")
    with pytest.raises(ArtifactError, match=r"ca\.key"):
        make(certificate=keys / "server.crt", key=keys / "ca.key")
    with pytest.raises(ArtifactError, match=r"none\.crt"):
        make(certificate=tmp_path / "none.crt", key=keys / "server.key")


def test_closing_breaks_off_what_is_open(hub):
    with socket.create_connection(("127.0.0.1", hub.server.port)) as connection:
        time.sleep(0.1)
        began = time.monotonic()
        hub.server.close()
        assert time.monotonic() - began < 3
        assert ends(connection, 5)
    hub.server.close()


def test_nobody_fetches_the_proxy_without_end(serve, proxy, ca, tmp_path):
    hub = serve(proxy)
    hub.server.bytes = Allowance(2 * hub.listing.size, 1e-9)
    for number in range(2):
        fetch_proxy(hub.url, hub.token, hub.listing.sha256, tmp_path / str(number), ca)
    with pytest.raises(FederationError, match="429"):
        fetch_proxy(hub.url, hub.token, hub.listing.sha256, tmp_path / "third", ca)
    fetch_proxy(hub.url, hub.server.issue("shop"), hub.listing.sha256, tmp_path / "another", ca)
