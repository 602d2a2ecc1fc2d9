"""Flower's Runtime API: tasks that this process takes on itself.

With `--isolation process` a SuperLink and a SuperNode start no program of Flower's. They put up a task for each run or
message, and whoever knows their secret acquires it. A client answers its tasks from its warm session, and never opens
the app (FAB) that the server sent along; the server's owner starts the ServerApp of its own run and of no other.
"""

import contextlib
import functools
import logging
import secrets
import threading
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedproxy.artifacts import write_secret
from fedproxy.deployment.flower import require_flower
from fedproxy.errors import FederationError

if TYPE_CHECKING:
    from flwr.app import Message, RecordDict

log = logging.getLogger(__name__)

CLIENT_APP, AGENT_APP, SERVER_APP, SIMULATION = "flwr-clientapp", "flwr-agentapp", "flwr-serverapp", "flwr-simulation"
"""Kinds of tasks. A server can ask a SuperNode for an AgentApp as well, and a task that nobody answers blocks it."""

SECRET_BYTES = 32
BEAT_SECONDS = 10.0
"""How often a task is said to go on; Flower gives it up after a minute of silence."""
MESSAGE_SECONDS = 10.0
"""How long a task's message may take to be there: Flower puts up the task a moment before it."""
_PAUSE = 0.05
_FAILED = 2
"""Flower's code for a ClientApp that raised."""
_COMPLETED, _ENDED = "completed", "failed"
_ACQUIRE = "/flwr.proto.Runtime/AcquireTask"


class Task:
    """A task that was acquired.

    Attributes:
        kind: One of the kinds above.
        run: Flower's number of its run.
        token: What its holder shows.
    """

    def __init__(self, address: str, ca: bytes | None, kind: str, run: int, token: str) -> None:
        self.kind, self.run, self.token = kind, run, token
        self._address, self._ca = address, ca
        self._message: Message | None = None

    @functools.cached_property
    def _client(self) -> Any:
        """Its connection, for who works on it."""
        from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor

        return _connect(self._address, self._ca, RuntimeTokenHttpInterceptor(self.token))

    @contextlib.contextmanager
    def beating(self) -> Iterator[None]:
        """Say that the task goes on, for as long as the block lasts."""
        from flwr.proto.runtime_pb2 import SendTaskHeartbeatRequest

        over = threading.Event()

        def beat() -> None:
            while not over.wait(BEAT_SECONDS):
                with contextlib.suppress(Exception):  # a SuperNode that is away is noticed when the answer goes out
                    self._client.SendTaskHeartbeat(SendTaskHeartbeatRequest())

        thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def content(self) -> "RecordDict":
        """The content of the task's message.

        Raises:
            FederationError: it did not come, or is no message that Flower can read.
        """
        from flwr.app import Message
        from flwr.common.serde import message_from_proto
        from flwr.proto.node_pb2 import Node
        from flwr.proto.runtime_pb2 import PullAppMessagesRequest, PullTaskInputRequest
        from flwr.supercore.inflatable.inflatable_protobuf_utils import (
            make_confirm_message_received_fn_protobuf,
            make_pull_object_fn_protobuf,
        )
        from flwr.supercore.inflatable.inflatable_utils import pull_and_inflate_object_from_tree

        client, until = self._client, time.monotonic() + MESSAGE_SECONDS
        try:
            node = Node(node_id=client.PullTaskInput(PullTaskInputRequest()).context.node_id)
            while not (found := client.PullMessages(PullAppMessagesRequest())).messages_list:
                if time.monotonic() > until:
                    raise FederationError("a task of the SuperNode came without its message")
                time.sleep(_PAUSE)
            tree = found.message_object_trees[0]
            self._message = message_from_proto(found.messages_list[0])  # what cannot be read is answered, too
            message = pull_and_inflate_object_from_tree(
                tree,
                make_pull_object_fn_protobuf(client.PullObject, node, self.run),
                make_confirm_message_received_fn_protobuf(client.ConfirmMessageReceived, node, self.run),
                return_type=Message,
                initial_backoff=_PAUSE,
                backoff_cap=1.0,
            )
            if not message.has_content():
                raise FederationError("the message of a task holds nothing")
            return message.content
        except FederationError:
            raise
        except Exception as error:  # whatever it is, the server sent it, or the SuperNode ended
            raise FederationError(f"a message cannot be read: {type(error).__name__}: {error!s:.200}") from error

    def answer(self, content: "RecordDict") -> None:
        """Send the answer, and end the task.

        Raises:
            FederationError: the SuperNode does not take it.
        """
        from flwr.app import Message

        assert self._message is not None
        self._send(Message(content, reply_to=self._message), _COMPLETED)

    def refuse(self, reason: str) -> None:
        """Answer with an error of Flower's, and end the task.

        Raises:
            FederationError: the SuperNode does not take it.
        """
        from flwr.app import Error, Message

        if self._message is None:
            self.end(reason)
            return
        self._send(Message(Error(_FAILED, reason), reply_to=self._message), _ENDED)

    def _send(self, message: "Message", status: str) -> None:
        from flwr.app.message import remove_content_from_message
        from flwr.common.serde import message_to_proto
        from flwr.proto.node_pb2 import Node
        from flwr.proto.runtime_pb2 import PushAppMessagesRequest
        from flwr.supercore.inflatable.inflatable_object import (
            get_all_nested_objects,
            get_object_tree,
            no_object_id_recompute,
        )
        from flwr.supercore.inflatable.inflatable_protobuf_utils import make_push_object_fn_protobuf
        from flwr.supercore.inflatable.inflatable_utils import push_objects

        try:
            with no_object_id_recompute():
                message.metadata.__dict__["_message_id"] = message.object_id
                request = PushAppMessagesRequest(
                    messages_list=[message_to_proto(remove_content_from_message(message))],
                    message_object_trees=[get_object_tree(message)],
                )
                taken = self._client.PushMessages(request)
                node = Node(node_id=message.metadata.src_node_id)
                push_objects(
                    get_all_nested_objects(message),
                    make_push_object_fn_protobuf(self._client.PushObject, node, self.run, taken.session_id),
                    object_ids_to_push=set(taken.objects_to_push),
                )
        except Exception as error:
            raise FederationError(f"the SuperNode does not take the answer: {error!s:.200}") from error
        self.end("", status)

    def end(self, reason: str, status: str = _ENDED) -> None:
        """End the task without a message."""
        from flwr.proto.runtime_pb2 import PushTaskOutputRequest

        with contextlib.suppress(Exception):
            self._client.PushTaskOutput(PushTaskOutputRequest(sub_status=status, details=reason))
        self._client.close()


class Runtime:
    """The Runtime API of a SuperLink or SuperNode.

    Args:
        address: HOST:PORT.
        secret: What its `--superexec-auth-secret-file` holds; none if it was started without.
        ca: Certificate of the CA that vouches for it, PEM; none for plaintext.
    """

    def __init__(self, address: str, secret: bytes | None, ca: bytes | None = None) -> None:
        require_flower()
        from flwr.supercore.interceptors import SuperExecAuthHttpInterceptor

        self._address, self._ca = address, ca
        signed = [SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods={_ACQUIRE})] if secret else []
        self._client = _connect(address, ca, *signed)

    def acquire(self, kinds: Collection[str]) -> Task | None:
        """The oldest task of these kinds that waits, if one does.

        Raises:
            FederationError: the secret is refused.
            ConnectionError: nobody answers, or not now.
        """
        import httpx
        from flwr.proto.runtime_pb2 import AcquireTaskRequest

        try:
            found = self._client.AcquireTask(AcquireTaskRequest(supported_task_types=list(kinds)))
        except httpx.HTTPStatusError as error:
            if error.response.status_code in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
                raise FederationError(f"{self._address} refuses the secret of its Runtime API.") from error
            raise ConnectionError(str(error)) from error
        except (httpx.HTTPError, ValueError) as error:
            raise ConnectionError(str(error)) from error
        if not found.HasField("task") or not found.token:
            return None
        return Task(self._address, self._ca, found.task.type, found.task.run_id, found.token)

    def close(self) -> None:
        """Close the connection."""
        self._client.close()


def _connect(address: str, ca: bytes | None, *interceptors: Any) -> Any:
    """A client of the Runtime API, without Flower's retries: these interrupt their own process where it is refused."""
    from flwr.supercore.runtime import RuntimeHttpClient

    return RuntimeHttpClient.from_server_address(address, ca is None, ca, list(interceptors))


def isolated(folder: Path) -> tuple[bytes, list[str]]:
    """A secret for a Runtime API, written into `folder`, and the options by which a Flower process starts nothing."""
    secret, file = secrets.token_bytes(SECRET_BYTES), folder / "secret"
    write_secret(file, secret)
    return secret, ["--isolation", "process", "--superexec-auth-secret-file", str(file)]
