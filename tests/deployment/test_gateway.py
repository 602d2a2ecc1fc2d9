import base64
import contextlib
import datetime
import json
import threading
import time
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.proto.fleet_pb2 import RegisterNodeFleetRequest

from fedproxy.artifacts import Manifest, write_json
from fedproxy.deployment import gateway as gateway_module
from fedproxy.deployment import welcome
from fedproxy.deployment.audit import Audit, check
from fedproxy.deployment.certificates import load_private, make_key
from fedproxy.deployment.flower.announced import Announced
from fedproxy.deployment.flower.fleet import Fleet
from fedproxy.deployment.gateway import Gateway, Upstream
from fedproxy.deployment.handout import https
from fedproxy.deployment.handout.fetch import fetch_proxy
from fedproxy.deployment.handout.parts import describe
from fedproxy.deployment.keys import add_client, client_key_file, init_keys, read_client_key, revoke_client
from fedproxy.deployment.members import Members, read_members
from fedproxy.deployment.welcome import Welcome, introduce, public_pem
from fedproxy.federation.offer import make_offer
from tests.deployment.conftest import eventually
from tests.federation.test_offer import EXPERIMENT


@pytest.fixture(scope="module")
def proxy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("secret") / "proxy"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 4096)
    write_json(folder / "config.json", {"model_type": "llama"})
    Manifest("proxy", "0" * 64, 4, [0, 3]).write(folder)
    return folder


@pytest.fixture
def superlink():
    """Stands in for the SuperLink: `seen` holds path, headers and body of what it got."""
    seen = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            headers = {name.lower(): value for name, value in self.headers.items()}
            seen.append((self.path, headers, self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(418 if self.path.endswith("get-fab") else 200)
            for name, value in {
                "Content-Type": "application/protobuf",
                "flwr-said": "yes",
                "Server-Path": "/x",
            }.items():
                self.send_header(name, value)
            self.send_header("Content-Length", "6")
            self.end_headers()
            self.wfile.write(b"answer")

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield SimpleNamespace(seen=seen, port=server.server_address[1])
    server.shutdown()
    server.server_close()


@pytest.fixture
def start(tmp_path, proxy, superlink):
    """A function that starts a gateway, with a register of the clients bank and shop unless told otherwise."""
    with contextlib.ExitStack() as stack:

        def begin(*, registered=True, upstream=None, port=0, verdicts=None):
            keys = tmp_path / "keys" if registered else None
            if registered:
                init_keys(keys)
                for name in ("bank", "shop"):
                    add_client(keys, name)
            (tmp_path / "run").mkdir(exist_ok=True)
            listing = describe(proxy)
            gateway = Gateway(
                proxy,
                listing,
                "127.0.0.1",
                port,
                None,
                None,
                members=Members(keys, tmp_path / "run", ["bank", "shop"]),
                offer=lambda name, spoken: make_offer(
                    EXPERIMENT, name, run_id="r1", proxy=listing.sha256, start="1" * 64, spoken=spoken
                ),
                upstream=Upstream(upstream or superlink.port, None),
                fleet=Fleet(Announced(tmp_path), 1000, 0.2),
                audit=stack.enter_context(Audit(tmp_path / "audit.jsonl")),
                verdict=({} if verdicts is None else verdicts).get,
            )
            stack.enter_context(gateway)
            return SimpleNamespace(gateway=gateway, keys=keys)

        yield begin


def key_of(hub, name):
    return load_private(read_client_key(client_key_file(hub.keys, name)).private_openssh)


def ask(hub, path, body=b"", method="POST", **headers):
    connection = HTTPConnection("127.0.0.1", hub.gateway.port, timeout=10)
    try:
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        return answer.status, answer.read(), dict(answer.getheaders())
    finally:
        connection.close()


def enter(hub, key, name="", process="0" * 16):
    status, said, _ = ask(hub, welcome.PATH, introduce(key, name, process=process).encode())
    return status, Welcome.decode(said) if status == 200 else json.loads(said)["reason"]


def signed(key, *, age=0.0, by=None):
    """Headers of a SuperNode's request: the key, and the time that it signed; `by` another key."""
    moment = (datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=age)).isoformat()
    signature = (by or key).sign(moment.encode(), ec.ECDSA(hashes.SHA256()))
    return {
        "flwr_public_key": base64.b64encode(public_pem(key.public_key()).encode()).decode(),
        "flwr_signature": base64.b64encode(signature).decode(),
        "flwr_timestamp": moment,
    }


def test_a_member_is_welcomed_by_the_name_of_its_key(start):
    hub = start()
    status, said = enter(hub, key_of(hub, "bank"), "shop")
    assert (status, said.name, said.offer.max_rows) == (200, "bank", 100)
    assert enter(hub, key_of(hub, "bank"))[1] == said
    assert enter(hub, key_of(hub, "shop"))[1].token != said.token


def test_the_welcome_holds_no_path_of_the_owner(start, proxy, tmp_path):
    hub = start()
    _, said, _ = ask(hub, welcome.PATH, introduce(key_of(hub, "bank")).encode())
    assert not any(secret in said for secret in (b"secret", str(proxy).encode(), str(tmp_path).encode()))


def test_strangers_are_told_why(start):
    hub = start()
    assert enter(hub, make_key(), "bank") == (
        403,
        "This key is not registered. Send its public key to the owner of the model.",
    )
    status, said, _ = ask(hub, welcome.PATH, b"{}")
    assert status == 403
    assert b"introduction" in said


def test_the_owner_finds_in_its_log_who_came_and_who_was_refused(start, tmp_path):
    hub = start()
    bank, stranger = key_of(hub, "bank"), make_key()
    for process in ("0" * 16, "0" * 16, ""):
        _, said = enter(hub, bank, process=process)
    enter(hub, stranger)
    ask(hub, welcome.PATH, b"{}")
    ask(hub, "/v1/fleet/get-run", b"", **signed(stranger))
    ask(hub, "/v1/fleet/start-run", b"", **signed(bank))
    fetch_proxy(f"http://127.0.0.1:{hub.gateway.port}", said.token, said.offer.proxy, tmp_path / "cache", None)
    events = [(event["event"], event.get("client")) for event in check(tmp_path / "audit.jsonl")]
    assert events == [
        ("joined", "bank"),
        ("refused", None),
        ("refused", None),
        ("unauthenticated", None),
        ("refused", "bank"),
        ("handed out", "bank"),
    ]


def test_an_address_that_is_refused_again_and_again_waits(start, monkeypatch):
    hub, slept = start(), []
    monkeypatch.setattr(https.time, "sleep", slept.append)
    statuses = {ask(hub, "/v1/fleet/get-run", b"")[0] for _ in range(https.STRANGERS_AT_ONCE + 2)}
    assert statuses == {401}
    assert [bool(delay) for delay in slept] == [False] * https.STRANGERS_AT_ONCE + [True] * 2
    slept.clear()
    assert enter(hub, key_of(hub, "bank"))[0] == 200  # who is let in does not wait
    assert slept == []


def test_the_proxy_is_sent_once(start, tmp_path):
    hub = start()
    _, said = enter(hub, key_of(hub, "bank"))
    for _ in range(2):
        fetch_proxy(f"http://127.0.0.1:{hub.gateway.port}", said.token, said.offer.proxy, tmp_path / "cache", None)
        assert list(hub.gateway.sent.values()) == [hub.gateway.listing.size]


def farewell(hub, key, process="0" * 16):
    return ask(hub, welcome.FAREWELL, introduce(key, process=process).encode())[0]


def test_who_was_there_at_the_end_is_waited_for_until_it_has_the_result(start, tmp_path):
    hub, file = start(), tmp_path / "adapter_model.safetensors"
    file.write_bytes(b"result" * 1000)
    bank, shop = key_of(hub, "bank"), key_of(hub, "shop")
    for key in (bank, shop):
        assert enter(hub, key)[1].result == ""
    assert farewell(hub, bank) == 200  # too early: nothing is over
    assert hub.gateway.untold(60.0) == {"bank", "shop"}
    assert hub.gateway.end("complete", file) == 6000
    for process in ("0" * 16, "1" * 16):  # one that was killed, and comes back
        status, said = enter(hub, bank, process=process)
        assert (status, said.offer.run) == (200, EXPERIMENT.name)
        where = f"http://127.0.0.1:{hub.gateway.port}", said.token, said.result, tmp_path / process, None
        assert (fetch_proxy(*where, listing_path="/result") / file.name).read_bytes() == file.read_bytes()
        assert hub.gateway.untold(60.0) == {"bank", "shop"}
    for _ in range(2):
        assert farewell(hub, bank, "1" * 16) == 410
        assert eventually(lambda: hub.gateway.untold(60.0) == {"shop"}, 10.0)
    assert farewell(hub, make_key()) == 403
    assert farewell(hub, bank) == 403  # of an older process
    hub.gateway._asked["shop"] -= 100.0
    assert not hub.gateway.untold(60.0)


@pytest.mark.parametrize("how", ["complete", "failed"])
def test_without_a_result_who_asks_is_told_that_it_is_over(start, how):
    hub = start()
    bank = key_of(hub, "bank")
    _, said = enter(hub, bank)
    assert hub.gateway.end(how) == 0
    assert enter(hub, bank) == (410, how)
    assert eventually(lambda: not hub.gateway.untold(60.0), 10.0)
    assert ask(hub, "/result", None, "GET", Authorization=f"Bearer {said.token}")[0] == 404


def test_a_members_request_goes_to_the_superlink_and_no_more_of_it_than_needed(start, superlink):
    hub = start()
    key = signed(key_of(hub, "bank"))
    headers = {**key, "Content_Type": "application/protobuf", "Cookie": "c", "Authorization": "a"}
    status, said, back = ask(hub, "/v1/fleet/get-run", b"body", **headers)
    assert (status, said, back["Content-Type"], back["flwr-said"]) == (200, b"answer", "application/protobuf", "yes")
    assert "Server-Path" not in back
    [(path, seen, body)] = superlink.seen
    assert (path, body, seen["flwr-public-key"]) == ("/v1/fleet/get-run", b"body", key["flwr_public_key"])
    assert (seen["flwr-signature"], seen["content-type"]) == (key["flwr_signature"], "application/protobuf")
    assert not {"cookie", "authorization"} & seen.keys()
    assert ask(hub, "/v1/fleet/get-fab", b"", **key)[0] == 418


@pytest.mark.parametrize(
    "path",
    [
        "/v1/control/start-run",
        "/v1/control/register-node",
        "/v1/runtime/acquire-task",
        "/v1/fleet/register-node",
        "/v1/fleet/unregister-node",
        "/v1/fleet/../control/start-run",
        "/v1/fleet/%2e%2e/control/start-run",
        "/v1/fleet//get-run",
        "/v1/fleet/get-run?x",
        "/v1/fleet/",
        "//v1/control/start-run",
        "http://127.0.0.1/v1/control/start-run",
        "/docs",
        "/",
    ],
)
def test_nothing_else_reaches_the_superlink_even_from_a_member(start, superlink, path):
    hub = start()
    for headers in (signed(key_of(hub, "bank")), {}):
        assert ask(hub, path, b"body", **headers)[0] in (401, 403)
        assert ask(hub, path, method="GET", **headers)[0] in (401, 404)
    assert not superlink.seen


HEADERS = ("flwr_public_key", "flwr_signature", "flwr_timestamp")


@pytest.mark.parametrize("value", [None, "", "é", "!", base64.b64encode(b"\xff").decode(), "TWFkZSB1cA=="])
@pytest.mark.parametrize("name", HEADERS)
def test_a_request_without_a_members_signature_stays_outside(start, superlink, name, value):
    hub = start()
    headers = signed(key_of(hub, "bank"))
    headers[name] = value.encode() if value is not None else None
    headers = {name: value for name, value in headers.items() if value is not None}
    assert ask(hub, "/v1/fleet/get-run", b"body", **headers)[0] == 401
    assert not superlink.seen


def test_a_public_key_alone_opens_nothing(start, superlink):
    hub = start()
    bank = key_of(hub, "bank")
    for headers in (
        signed(make_key()),
        signed(bank, by=make_key()),
        signed(bank, by=key_of(hub, "shop")),
        signed(bank, age=400.0),
        signed(bank, age=-60.0),
        {**signed(bank), "flwr_timestamp": "2026-01-01T00:00:00"},
    ):
        status, _, said = ask(hub, "/v1/fleet/push-object", b"", Content_Length="1000000", **headers)
        assert (status, said.get("Connection")) == (401, "close")  # answered although no byte of the body came
    assert not superlink.seen


def test_a_revoked_key_is_refused_from_the_next_request_on(start, superlink):
    hub = start()
    key = key_of(hub, "bank")
    _, said = enter(hub, key)
    bearer = {"Authorization": f"Bearer {said.token}"}
    connection = HTTPConnection("127.0.0.1", hub.gateway.port, timeout=10)
    headers = {name.replace("_", "-"): value for name, value in signed(key).items()}

    def status(method, path, **more):
        connection.request(method, path, b"" if method == "POST" else None, {**headers, **more})
        answer = connection.getresponse()
        answer.read()
        return answer.status

    assert (status("POST", "/v1/fleet/get-run"), status("GET", "/listing", **bearer)) == (200, 200)
    revoke_client(hub.keys, "bank")
    assert (status("POST", "/v1/fleet/get-run"), status("GET", "/listing", **bearer)) == (401, 403)
    connection.close()
    assert enter(hub, key) == (403, "This key was revoked. Ask the owner of the model for a new one.")
    assert len(superlink.seen) == 1
    assert enter(hub, key_of(hub, "shop"))[0] == 200


def test_a_damaged_register_is_a_matter_of_trying_again(start, superlink):
    hub = start()
    key = key_of(hub, "bank")
    path = hub.keys / "clients.json"
    whole = path.read_bytes()
    _, said = enter(hub, key)
    path.write_bytes(b"{")
    for status, content, _ in (
        ask(hub, welcome.PATH, introduce(key).encode()),
        ask(hub, "/v1/fleet/get-run", b"", **signed(key)),
        ask(hub, "/listing", None, "GET", Authorization=f"Bearer {said.token}"),
    ):
        assert status == 503
        assert str(hub.keys).encode() not in content
    assert not superlink.seen
    path.write_bytes(whole)
    assert enter(hub, key)[0] == 200
    assert ask(hub, "/v1/fleet/get-run", b"", **signed(key))[0] == 200


@pytest.mark.parametrize(
    ("path", "most"), [(welcome.PATH, welcome.MOST_BYTES), ("/v1/fleet/push-object", gateway_module.MOST_BYTES)]
)
def test_a_body_that_is_too_large_is_not_read(start, superlink, path, most):
    hub = start()
    headers = signed(key_of(hub, "bank"))
    assert ask(hub, path, b"", Content_Length=str(most + 1), **headers)[0] == 413
    assert ask(hub, path, b"", Content_Length="9" * 30, **headers)[0] == 413
    assert ask(hub, path, b"", Content_Length="-1", **headers)[0] == 413
    assert ask(hub, path, b"", Transfer_Encoding="chunked", **headers)[0] == 413
    assert not superlink.seen


def test_a_superlink_that_is_away_is_a_matter_of_trying_again(start):
    hub = start(upstream=1)
    assert ask(hub, "/v1/fleet/get-run", b"", **signed(key_of(hub, "bank")))[0] == 502


def test_without_a_register_a_node_registers_itself_under_the_name_that_its_token_tells(start, superlink, tmp_path):
    hub = start(registered=False)
    key, node = make_key(), make_key()
    pem = public_pem(node.public_key())
    body = RegisterNodeFleetRequest(public_key=pem.encode()).SerializeToString()
    assert ask(hub, "/v1/fleet/register-node", body, **signed(node))[0] == 401
    token = enter(hub, key, "bank")[1].token
    assert "Another client is here as bank" in enter(hub, make_key(), "bank")[1]
    assert "takes no part" in enter(hub, make_key(), "pub")[1]

    def basic(text):
        return {"Authorization": f"Basic {base64.b64encode(text.encode()).decode()}"}

    for wrong in (basic("bank:guess"), basic("bank"), {"Authorization": "Basic é".encode()}, basic(f"bank:{token}x")):
        assert ask(hub, "/v1/fleet/register-node", body, **signed(node), **wrong)[0] == 401
    assert ask(hub, "/v1/fleet/register-node", body, **signed(node), **basic(f"bank:{token}"))[0] == 200
    assert read_members(tmp_path / "run") == {"bank": pem}
    assert ask(hub, "/v1/fleet/register-node", body, **signed(key), **basic(f"bank:{token}"))[0] == 403  # not its key
    assert ask(hub, "/v1/control/start-run", b"", **signed(node), **basic(f"bank:{token}"))[0] == 401


def test_of_two_processes_with_one_key_the_newer_stays(start):
    hub = start()
    first, second, third = (f"{number:016x}" for number in (1, 2, 3))
    key, says = key_of(hub, "bank"), (403, 'another process joined as "bank" after this one.')
    assert [enter(hub, key, process=process)[0] for process in (first, first, second)] == [200, 200, 200]
    assert [enter(hub, key, process=first) for _ in range(2)] == [says, says]
    assert [enter(hub, key, process=process)[0] for process in (second, third, third)] == [200, 200, 200]
    assert [enter(hub, key, process=process) for process in (first, second)] == [says, says]
    assert enter(hub, key_of(hub, "shop"), process=first)[0] == 200  # another client's is another matter


@pytest.mark.parametrize("registered", [True, False])
def test_who_only_looks_takes_nobodys_place(start, registered):
    hub = start(registered=registered)
    key = key_of(hub, "bank") if registered else make_key()
    for process in ("", "1" * 16, "", "1" * 16):
        assert enter(hub, key, "bank", process)[1].name == "bank"
    if not registered:
        for process in ("", "2" * 16):
            assert enter(hub, make_key(), "shop", process)[1].name == "shop"
    hub.gateway.end("complete")
    assert "bank" in hub.gateway.untold(60.0)


def test_the_end_is_told_to_those_who_ask(start):
    hub = start()
    enter(hub, key_of(hub, "bank"))
    enter(hub, key_of(hub, "shop"))
    hub.gateway.end("complete")
    assert hub.gateway.untold(60.0) == {"bank", "shop"}
    assert enter(hub, key_of(hub, "bank")) == (410, "complete")
    until = time.monotonic() + 5  # told is who was answered, which the server notes after the answer
    while hub.gateway.untold(60.0) != {"shop"} and time.monotonic() < until:
        time.sleep(0.01)
    assert hub.gateway.untold(60.0) == {"shop"}
    assert hub.gateway.untold(0.0) == frozenset()
    assert enter(hub, make_key())[0] == 403


@pytest.mark.parametrize("length", ["0" * 20 + "157286400", "٣", "+5", "5.0", "-1", " ", "1" * 16])
def test_no_way_to_write_a_length_lets_more_in(start, length):
    status, _, headers = ask(start(), welcome.PATH, b"", **{"Content-Length": length.encode("utf-8").decode("latin-1")})
    assert (status, headers.get("Connection")) == (413, "close")
