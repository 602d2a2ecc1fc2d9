"""Each client is held to its own node, its own order, and to as many bytes as an answer takes."""

import contextlib
import itertools
import threading
import time

import pytest
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    ActivateNodeResponse,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PullMessagesResponse,
    PushMessagesRequest,
    PushMessagesResponse,
    RegisterNodeFleetRequest,
)
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    Message,
    Metadata,
    ObjectTree,
    PullObjectRequest,
    PullObjectResponse,
    PushObjectRequest,
    PushObjectResponse,
)
from flwr.proto.node_pb2 import Node
from hypothesis import given
from hypothesis import strategies as st

from fedproxy.deployment.flower import fleet as module
from fedproxy.deployment.flower.announced import Announced
from fedproxy.deployment.flower.fleet import DELIVERIES, Fleet
from fedproxy.deployment.flower.requests import RefusedError, Said

RUN, MOST = 77, 1000
NUMBERS = {"bank": 11, "shop": 12}


class SuperLink:
    """Takes what the gateway passes on (`seen`), and has orders for nodes in `orders`: number → identifiers."""

    def __init__(self):
        self.seen, self.orders, self.absent, self.stored = [], {11: ["order-b"], 12: ["order-s"]}, 0, []

    def __call__(self, name, body):
        self.seen.append(name)
        return Said(200, getattr(self, name.replace("-", "_"))(body).SerializeToString())

    def activate_node(self, body):
        return ActivateNodeResponse(node_id=NUMBERS[ActivateNodeRequest.FromString(body).public_key.decode()])

    def pull_messages(self, body):
        waiting = self.orders[PullMessagesRequest.FromString(body).node.node_id]
        if not waiting:
            return PullMessagesResponse()
        head = Metadata(message_id=waiting[0], run_id=RUN, src_node_id=1)
        return PullMessagesResponse(
            messages_list=[Message(metadata=head)],
            message_object_trees=[tree(waiting.pop(0), "part")],
        )

    def pull_object(self, body):
        self.absent -= 1
        return PullObjectResponse(object_found=True, object_available=self.absent < 0, object_content=b"part")

    def push_messages(self, body):
        (parts,) = PushMessagesRequest.FromString(body).message_object_trees
        return PushMessagesResponse(objects_to_push=module._identifiers(parts), session_id="s")

    def push_object(self, body):
        self.stored.append(PushObjectRequest.FromString(body).object_id)
        return PushObjectResponse(stored=True)

    def confirm_message_received(self, body):
        return PushObjectResponse()

    send_node_heartbeat = get_run = deactivate_node = register_node = confirm_message_received


def tree(*names):
    return ObjectTree(object_id=names[0], children=[ObjectTree(object_id=name) for name in names[1:]])


@pytest.fixture
def hub(tmp_path, monkeypatch):
    return Hub(tmp_path, monkeypatch)


class Hub:
    def __init__(self, folder, monkeypatch):
        monkeypatch.setattr(module, "HOLD_SECONDS", 0.05)
        self.announced = Announced(folder)
        self.superlink, self.fleet = SuperLink(), Fleet(self.announced, MOST, 0.01)

    def say(self, who, name, request, alive=lambda: True):
        body = request if isinstance(request, bytes) else request.SerializeToString()
        return self.fleet.handle(who, name, body, self.superlink, alive)

    def enter(self, who):
        return self.say(who, "activate-node", ActivateNodeRequest(public_key=who.encode()))

    def pull(self, who, **how):
        said = self.say(who, "pull-messages", PullMessagesRequest(node=Node(node_id=NUMBERS[who])), **how)
        return [message.metadata.message_id for message in PullMessagesResponse.FromString(said.content).messages_list]

    def confirm(self, who, identifier):
        node = Node(node_id=NUMBERS[who])
        return self.say(
            who, "confirm-message-received", ConfirmMessageReceivedRequest(node=node, message_object_id=identifier)
        )

    def fetch(self, who, identifier):
        request = PullObjectRequest(node=Node(node_id=NUMBERS[who]), run_id=RUN, object_id=identifier)
        return PullObjectResponse.FromString(self.say(who, "pull-object", request).content)

    def push(self, who, answers, *parts, identifier="reply", **changed):
        number = NUMBERS[who]
        head = {"src_node_id": number, "dst_node_id": 1, "run_id": RUN, "reply_to_message_id": answers, **changed}
        request = PushMessagesRequest(
            node=Node(node_id=number),
            messages_list=[Message(metadata=Metadata(message_id=identifier, **head))],
            message_object_trees=[tree(identifier, *parts)],
        )
        return PushMessagesResponse.FromString(self.say(who, "push-messages", request).content)

    def send(self, who, identifier, content=b"x"):
        request = PushObjectRequest(
            node=Node(node_id=NUMBERS[who]), run_id=RUN, object_id=identifier, object_content=content
        )
        return PushObjectResponse.FromString(self.say(who, "push-object", request).content).stored


def test_an_order_and_its_answer(hub):
    hub.enter("bank")
    assert hub.pull("bank") == ["order-b"]
    hub.superlink.absent = 3
    assert hub.fetch("bank", "part").object_content == b"part"  # held until it is there
    hub.confirm("bank", "order-b")
    assert set(hub.push("bank", "order-b", "a", "b").objects_to_push) == {"reply", "a", "b"}
    for name in ("reply", "a", "b"):
        assert hub.announced.done("order-b") is None
        assert hub.send("bank", name)
    assert hub.announced.done("order-b") == ""
    assert hub.pull("bank") == []


@pytest.mark.parametrize(
    ("name", "request_"),
    [
        ("pull-messages", PullMessagesRequest(node=Node(node_id=12))),
        ("pull-messages", PullMessagesRequest()),
        ("pull-object", PullObjectRequest(node=Node(node_id=12), object_id="part")),
        ("push-object", PushObjectRequest(node=Node(node_id=12), object_id="part")),
        ("push-messages", PushMessagesRequest(node=Node(node_id=12))),
        ("deactivate-node", DeactivateNodeRequest(node_id=12)),
        ("activate-node", ActivateNodeRequest(public_key=b"shop")),
        ("register-node", RegisterNodeFleetRequest(public_key=b"shop")),
        ("pull-messages", b"\xff"),
        ("push-messages", b"\x0a" * 300),
        ("start-run", b""),
        ("", b""),
        ("../control/start-run", b""),
    ],
)
def test_a_client_speaks_for_itself_alone(hub, name, request_):
    hub.enter("bank")
    hub.enter("shop")
    seen = len(hub.superlink.seen)
    with pytest.raises(RefusedError):
        hub.say("bank", name, request_)
    assert len(hub.superlink.seen) == seen


def test_before_it_entered_a_client_asks_for_nothing(hub):
    with pytest.raises(RefusedError):
        hub.pull("bank")


def test_a_client_answers_its_own_order_alone(hub):
    for name in NUMBERS:
        hub.enter(name)
        hub.pull(name)
    for answers, changed in (
        ("order-s", {}),  # another client's order
        ("unknown", {}),
        ("", {}),  # an order of its own, to somebody
        ("order-b", {"src_node_id": 12}),
        ("order-b", {"dst_node_id": 11}),
        ("order-b", {"run_id": 78}),
    ):
        with pytest.raises(RefusedError):
            hub.push("bank", answers, "a", **changed)
    with pytest.raises(RefusedError):
        hub.fetch("bank", "another")
    with pytest.raises(RefusedError):
        hub.confirm("bank", "order-s")
    assert "push-messages" not in hub.superlink.seen
    assert hub.push("bank", "order-b", "a").session_id == "s"


def test_more_than_one_message_is_no_answer(hub):
    hub.enter("bank")
    hub.pull("bank")
    request = PushMessagesRequest(
        node=Node(node_id=11), messages_list=[Message()] * 2, message_object_trees=[tree("a")]
    )
    with pytest.raises(RefusedError):
        hub.say("bank", "push-messages", request)


def test_nobody_stores_what_was_not_asked_for(hub):
    hub.enter("bank")
    with pytest.raises(RefusedError):
        hub.send("bank", "a")
    hub.pull("bank")
    with pytest.raises(RefusedError):
        hub.send("bank", "a")
    hub.push("bank", "order-b", "a", "b")
    with pytest.raises(RefusedError):
        hub.send("bank", "c")
    most = MOST + module.HEAD_BYTES
    assert hub.send("bank", "a", b"x" * (most - 10))
    with pytest.raises(RefusedError):
        hub.send("bank", "b", b"x" * 11)
    assert "bytes" in hub.announced.done("order-b")
    assert hub.superlink.stored == ["a"]
    with pytest.raises(RefusedError):
        hub.send("bank", "b")


def test_an_answer_of_too_many_parts_is_refused(hub):
    hub.enter("bank")
    hub.pull("bank")
    with pytest.raises(RefusedError):
        hub.push("bank", "order-b", *map(str, range(1000)))
    assert hub.push("bank", "order-b", *map(str, range(50))).session_id == "s"


def test_what_is_asked_again_because_the_answer_was_lost_is_answered_again(hub):
    hub.enter("bank")
    assert [hub.pull("bank") for _ in range(DELIVERIES)] == [["order-b"]] * DELIVERIES
    first = hub.push("bank", "order-b", "a")
    assert hub.push("bank", "order-b", "a") == first
    assert [hub.send("bank", "a"), hub.send("bank", "a")] == [True, True]
    assert hub.superlink.stored == ["a"]
    assert hub.superlink.seen.count("push-messages") == hub.superlink.seen.count("pull-messages") == 1


@pytest.mark.parametrize("how", ["asks for more", "enters again", "asks in vain"])
def test_an_order_that_is_given_up_is_announced(hub, how):
    hub.enter("bank")
    hub.pull("bank")
    if how == "asks in vain":
        for _ in range(DELIVERIES):
            hub.pull("bank")
    else:
        hub.confirm("bank", "order-b")
        if how == "enters again":
            hub.enter("bank")
        else:
            assert hub.pull("bank") == []
    assert "SuperNode" in hub.announced.done("order-b")


def test_who_lost_its_key_will_not_answer(hub):
    hub.enter("bank")
    hub.pull("bank")
    hub.fleet.leave("bank")
    hub.fleet.leave("unknown")
    assert "key" in hub.announced.done("order-b")
    with pytest.raises(RefusedError):
        hub.pull("bank")  # before it entered again


def test_an_order_whose_arrival_was_not_confirmed_is_delivered_to_a_node_that_enters_again(hub):
    hub.enter("bank")
    hub.pull("bank")
    hub.enter("bank")
    assert hub.pull("bank") == ["order-b"]
    assert hub.announced.done("order-b") is None


def test_a_node_that_was_killed_may_enter_again_at_once(hub):
    """The SuperLink holds it for online until its heartbeats have been missed, and takes no other in its place."""
    hub.enter("bank")
    real, answers = hub.superlink.activate_node, [409]

    def refusing(name, body):
        hub.superlink.seen.append(name)
        if name == "activate-node" and answers:
            return Said(answers.pop(), b"")
        return Said(200, real(body).SerializeToString() if name == "activate-node" else b"")

    request = ActivateNodeRequest(public_key=b"bank").SerializeToString()
    assert hub.fleet.handle("bank", "activate-node", request, refusing, lambda: True).status == 200
    assert hub.superlink.seen[-3:] == ["activate-node", "deactivate-node", "activate-node"]


def test_no_order_is_taken_for_a_client_that_hung_up(hub):
    hub.enter("bank")
    assert hub.pull("bank", alive=lambda: False) == []
    answers = itertools.chain([True, False], itertools.repeat(False))
    hub.superlink.orders[11], later = [], hub.superlink.orders[11]
    assert hub.pull("bank", alive=lambda: next(answers)) == []
    hub.superlink.orders[11] = later
    assert hub.pull("bank") == ["order-b"]


def test_a_question_is_held_until_there_is_an_order(hub, monkeypatch):
    monkeypatch.setattr(module, "HOLD_SECONDS", 20.0)
    hub.enter("bank")
    hub.superlink.orders[11], later = [], hub.superlink.orders[11]
    threading.Timer(0.2, lambda: hub.superlink.orders.update({11: later})).start()
    begin = time.monotonic()
    assert hub.pull("bank") == ["order-b"]
    assert 0.1 < time.monotonic() - begin < 10.0


def test_an_order_that_an_abandoned_question_took_is_given_to_the_next(hub):
    hub.enter("bank")
    begun, go_on = threading.Event(), threading.Event()

    def slowly(name, body):
        begun.set()
        go_on.wait(10)
        return hub.superlink(name, body)

    request = PullMessagesRequest(node=Node(node_id=11)).SerializeToString()
    lost = threading.Thread(target=lambda: hub.fleet.handle("bank", "pull-messages", request, slowly, lambda: True))
    lost.start()
    begun.wait(10)
    found = []
    asking = threading.Thread(target=lambda: found.extend(hub.pull("bank")))
    asking.start()
    go_on.set()
    lost.join()
    asking.join()
    assert found == ["order-b"]


REQUESTS = {
    "activate-node": ActivateNodeRequest(public_key=b"bank", heartbeat_interval=30.0),
    "pull-messages": PullMessagesRequest(node=Node(node_id=11)),
    "pull-object": PullObjectRequest(node=Node(node_id=11), run_id=RUN, object_id="part"),
    "confirm-message-received": ConfirmMessageReceivedRequest(node=Node(node_id=11), message_object_id="order-b"),
    "push-messages": PushMessagesRequest(
        node=Node(node_id=11),
        messages_list=[
            Message(
                metadata=Metadata(
                    message_id="reply", src_node_id=11, dst_node_id=1, run_id=RUN, reply_to_message_id="order-b"
                )
            )
        ],
        message_object_trees=[tree("reply", "a")],
    ),
    "push-object": PushObjectRequest(node=Node(node_id=11), run_id=RUN, object_id="a", object_content=b"x"),
}


@given(data=st.data())
@pytest.mark.parametrize("name", sorted(REQUESTS))
def test_a_mutated_request_is_refused_or_harms_nobody(name, data, tmp_path_factory):
    """100 mutations of each message: the other client's order is delivered and its answer announced as ever."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        hub = Hub(tmp_path_factory.mktemp("announced"), monkeypatch)
        hub.superlink.absent = -1
        for who in NUMBERS:
            hub.enter(who)
            hub.pull(who)
        hub.push("bank", "order-b", "a")
        body = bytearray(REQUESTS[name].SerializeToString())
        for _ in range(data.draw(st.integers(1, 4))):
            place = data.draw(st.integers(0, len(body) - 1))
            body[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=4))
            if not body:
                break
        with contextlib.suppress(RefusedError):
            hub.say("bank", name, bytes(body))
        assert hub.announced.done("order-s") is None
        hub.push("shop", "order-s", identifier="answer")
        assert hub.send("shop", "answer")
        assert hub.announced.done("order-s") == ""
