"""The page's server: one page to read, and nothing that any request could do beyond that."""

import contextlib
import socket
import threading
import time
from http.client import HTTPConnection

import pytest

from fedproxy.deployment.address import Address
from fedproxy.deployment.page import HEADERS, PageServer
from fedproxy.errors import UsageError

POLICY = "default-src 'none'; script-src 'sha256-x'"
PAGE = f'<!DOCTYPE html><meta http-equiv="Content-Security-Policy" content="{POLICY}"><title>Ü</title>'.encode()


@pytest.fixture(scope="module")
def server():
    one = PageServer(Address("127.0.0.1", 0), lambda: PAGE)
    yield one
    one.asked = 0.0
    one.close()


def ask(server, method="GET", path="/", body=None, **headers):
    connection = HTTPConnection("127.0.0.1", server.address.port, timeout=10)
    connection.request(method, path, body=body, headers=headers)
    answer = connection.getresponse()
    found = answer.status, answer.read(), dict(answer.getheaders())
    connection.close()
    return found


def raw(server, content: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", server.address.port), timeout=10) as connection:
        said = b""
        with contextlib.suppress(OSError):  # it may end before all has been sent
            connection.sendall(content)
            connection.shutdown(socket.SHUT_WR)
            while piece := connection.recv(65536):
                said += piece
        return said


def test_the_page_is_there_with_strict_headers(server):
    status, content, headers = ask(server)
    assert (status, content) == (200, PAGE)
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    assert HEADERS.items() <= headers.items()
    assert headers["Content-Security-Policy"] == f"{POLICY}; frame-ancestors 'none'"
    assert "Python" not in headers["Server"]
    status, content, headers = ask(server, "HEAD")
    assert (status, content, headers["Content-Length"]) == (200, b"", str(len(PAGE)))


@pytest.mark.parametrize("path", ["/report.html", "/?x", "/../keys/ca.key", "/%2e%2e/", "http://127.0.0.1/", "*"])
def test_there_is_one_page(server, path):
    status, _, headers = ask(server, path=path)
    assert status == 404
    assert HEADERS.items() <= headers.items()


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "BREW", "get"])
def test_it_is_for_reading(server, method):
    status, _, headers = ask(server, method, body=b"x" * 100)
    assert status in (405, 501)
    assert HEADERS.items() <= headers.items()


def test_a_request_has_no_body(server):
    assert ask(server, body=b"x")[0] == 400
    assert ask(server, **{"Transfer-Encoding": "chunked"})[0] == 400


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "", "127.0.0.1.evil.example", "[::1", "a" * 5000])
def test_no_name_from_elsewhere_leads_here(server, host):
    assert ask(server, Host=host)[0] == 421


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1", "[::1]:8080", "192.0.2.7:8080"])
def test_addresses_do(server, host):
    assert ask(server, Host=host)[0] == 200


def test_two_hosts_are_none(server):
    assert b" 421 " in raw(server, b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n")
    assert b" 421 " in raw(server, b"GET / HTTP/1.0\r\n\r\n")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 1000,
        b"\x16\x03\x01\x02\x00\x01\x00\x01",
        b"GET " + b"/" * 100_000 + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 1000 + b"\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 999999999999\r\n\r\nx",
        "GET /ü\x1b[2J HTTP/1.1\r\nHost: localhost\r\n\r\n".encode(),
    ],
    ids=range(9),
)
def test_a_hostile_request_ends_nothing(server, content):
    assert b" 200 " not in raw(server, content)
    assert ask(server)[0] == 200


def test_silent_connections_are_bounded_and_do_not_keep_others_out(server):
    before = threading.active_count()
    held = [socket.create_connection(("127.0.0.1", server.address.port)) for _ in range(50)]
    try:
        assert ask(server)[0] == 200
        assert threading.active_count() <= before + 51
    finally:
        for connection in held:
            connection.close()


def test_a_taken_port_is_wrong_usage(server):
    with pytest.raises(UsageError, match=str(server.address.port)):
        PageServer(server.address, lambda: PAGE)


def test_whoever_watches_can_look_once_more():
    pages = [b"1", b"2"]
    server = PageServer(Address("127.0.0.1", 0), lambda: pages[0])
    assert ask(server)[1] == b"1"
    pages.reverse()
    seen = []

    def watch():
        time.sleep(0.5)
        seen.append(ask(server)[1])

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.monotonic()
    server.close()
    watcher.join()
    assert seen == [b"2"]
    assert time.monotonic() - began < 4
