"""A hostile server before a real SuperNode: what it sends is answered or refused, and never run."""

import contextlib
import hashlib
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.cli.build import build_fab_from_disk
from flwr.common.serde import message_to_proto, run_from_proto
from flwr.proto.control_pb2 import StartRunRequest
from flwr.proto.fab_pb2 import Fab
from flwr.proto.message_pb2 import PullObjectResponse
from flwr.proto.runtime_pb2 import (
    PullAppMessagesResponse,
    PullTaskInputRequest,
    PullTaskInputResponse,
    PushAppMessagesRequest,
    PushAppMessagesResponse,
)
from flwr.supercore.inflatable.inflatable_object import get_object_tree
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import HttpGrid

from fedproxy.deployment import joining
from fedproxy.deployment.flower.exchange import ANSWER, ORDER, pack, unpack
from fedproxy.deployment.flower.runtime import AGENT_APP, CLIENT_APP, SERVER_APP, Runtime, Task
from fedproxy.deployment.flower.superlink import _APP, SuperLink
from fedproxy.deployment.flower.supernode import SuperNode
from fedproxy.deployment.ledger import Ledger
from fedproxy.errors import FederationError
from fedproxy.federation.messages import Score, Scored

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")]
SECONDS = 60.0
EVIL = "import pathlib\npathlib.Path({mark!r}).touch()\nserver = 1\nclient = 1\nagent = 1\n"
CLIENT = 'serverapp = "evil:server"\nclientapp = "fedproxy.deployment.flower.app:client"'
AGENT = 'agentapp = "evil:agent"'


class Session:
    """Answers every order of ten bytes at most with the same bytes."""

    order_limit = 10

    def __init__(self) -> None:
        self.orders: list[bytes] = []

    def answer(self, client: str, order: bytes, on_step: object) -> tuple[bytes, Scored, None]:
        self.orders.append(order)
        return b"answer", Scored("x", 1, Score(1.0, 1)), None


class Server:
    """A SuperLink with a SuperNode that is a client's, in a folder whose path holds a space."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.mark, self.session = folder, folder / "mark", Session()
        self.told: list[str] = []
        self.ledger = Ledger(folder / "ledger", "server")
        self.tasks: dict[HttpGrid, int] = {}
        self.link = SuperLink(folder / "link", certificates=None, environment={})
        self.link.start()
        (folder / "node").mkdir()
        self.node = SuperNode(folder / "node", f"127.0.0.1:{self.link.port}", None, b"")
        self.node.start()

    def close(self) -> None:
        for grid in self.tasks:
            grid.close()
        self.node.close()
        self.link.close()
        self.ledger.close()

    def submit(self, components: str, kind: str) -> HttpGrid:
        """Submit an app of that kind, which ships a package named fedproxy, and be its ServerApp."""
        app = self.folder / kind
        package = app / "fedproxy" / "deployment" / "flower"
        package.mkdir(parents=True)
        for place in (app / "fedproxy", package.parent, package):
            (place / "__init__.py").write_text(EVIL.format(mark=str(self.mark)))
        for file in (package / "app.py", app / "evil.py"):
            file.write_text(EVIL.format(mark=str(self.mark)))
        (app / "pyproject.toml").write_text(_APP[: _APP.index("serverapp")] + f"{components}\n[tool.flwr.app.config]\n")
        content = build_fab_from_disk(app)
        fab = Fab(hash_str=hashlib.sha256(content).hexdigest(), content=content)
        with contextlib.closing(self.link._control()) as control:
            assert control.StartRun(StartRunRequest(fab=fab, user_prompt="hello")).run_id
        runtime = Runtime(f"127.0.0.1:{self.link.port}", self.link._secret)
        task = runtime.acquire([kind])
        runtime.close()
        assert task is not None
        grid = HttpGrid(f"127.0.0.1:{self.link.port}", insecure=True, token=task.token)
        given = grid._runtime_client.PullTaskInput(PullTaskInputRequest())
        grid.set_run(run_from_proto(given.run))
        self.tasks[grid] = given.task_id
        return grid

    def ask(self, grid: HttpGrid, content: RecordDict) -> Message:
        """Send the node a message and let the client work until it is answered."""
        until = time.monotonic() + SECONDS
        while not (nodes := [node.node_id for node in grid.get_nodes() if node.status == "online"]):
            assert time.monotonic() < until
            time.sleep(0.1)
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = self.tasks[grid], grid.run.run_id, 1
        (identifier,) = grid.push_messages([Message(content, nodes[0], "train")])
        while not (
            found := [m for m in grid.pull_messages([identifier]) if m.metadata.reply_to_message_id == identifier]
        ):
            assert time.monotonic() < until, self.node.log.read_text()
            if task := self.node.runtime.acquire((CLIENT_APP, AGENT_APP)):
                nothing = (lambda *_: None,) * 2
                joining._work(task, "x", self.session, self.ledger, *nothing, self.told.append)
            time.sleep(0.05)
        return found[0]


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, None)
    folder = tmp_path / "with space"
    folder.mkdir()
    one = Server(folder)
    try:
        yield one
    finally:
        one.close()


def test_a_message_that_cannot_be_read_is_answered_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A SuperNode waits for an answer to every message, for ever."""
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 7)
    order = Message(pack(ORDER, b"x"), 7, "train")
    order.metadata.__dict__["_message_id"] = order.object_id
    pushed = []

    class Client:
        def PullTaskInput(self, request: object) -> PullTaskInputResponse:  # noqa: N802
            return PullTaskInputResponse()

        def PullMessages(self, request: object) -> PullAppMessagesResponse:  # noqa: N802
            head = message_to_proto(remove_content_from_message(order))
            return PullAppMessagesResponse(messages_list=[head], message_object_trees=[get_object_tree(order)])

        def PullObject(self, request: object) -> PullObjectResponse:  # noqa: N802
            return PullObjectResponse(object_found=True, object_available=True, object_content=b"nonsense")

        def PushMessages(self, request: PushAppMessagesRequest) -> PushAppMessagesResponse:  # noqa: N802
            pushed.extend(request.messages_list)
            return PushAppMessagesResponse()

        def PushTaskOutput(self, request: object) -> None:  # noqa: N802
            pass

        PushObject = PushTaskOutput

        def close(self) -> None:
            pass

    task = Task("127.0.0.1:1", None, CLIENT_APP, 7, "token")
    monkeypatch.setitem(task.__dict__, "_client", Client())
    with pytest.raises(FederationError):
        task.content()
    task.refuse("why")
    (answer,) = pushed
    assert (answer.metadata.reply_to_message_id, answer.error.reason) == (order.object_id, "why")


def test_what_a_hostile_server_sends_is_never_run_and_the_next_order_is_answered(server: Server) -> None:
    agent = server.submit(AGENT, AGENT_APP)
    orders = server.submit(CLIENT, SERVER_APP)

    said = server.ask(agent, RecordDict({"agent": ConfigRecord({"text": "hello"})}))
    assert said.has_error(), (said.metadata, server.told, server.node.log.read_text()[-3000:])
    assert unpack(server.ask(orders, pack(ORDER, b"first")).content, ANSWER) == b"answer"
    for content in (
        RecordDict(),
        RecordDict({"other": ConfigRecord({"x": 1})}),
        RecordDict({ORDER: ConfigRecord({"x": 1})}),
        pack(ORDER, b"eleven bytes"),
    ):
        assert server.ask(orders, content).has_error()
    said = server.ask(agent, pack(ORDER, b"agent"))
    assert said.has_error()
    assert unpack(server.ask(orders, pack(ORDER, b"second")).content, ANSWER) == b"answer"
    assert server.session.orders == [b"first", b"second"]
    assert len(server.told) == 6
    assert server.node.alive
    assert not server.mark.exists()
    assert not (server.folder / "node" / "apps").exists()
