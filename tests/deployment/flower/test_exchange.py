"""Orders and answers over a Grid that hands out what the test puts into it."""

import httpx
import pytest
from flwr.app import Error, Message
from flwr.supercore.task_identity import TaskIdentity

from fedproxy.deployment.flower import exchange as module
from fedproxy.deployment.flower.announced import Announced
from fedproxy.deployment.flower.exchange import ANSWER, GridExchange, pack
from fedproxy.errors import ResourceError
from fedproxy.federation.messages import Refusal, Reply
from fedproxy.federation.protocol import encode_reply
from tests.federation.replies import coordinator, reply


class Grid:
    """Holds the messages it was given in `sent`, and gives those in `answers` to whoever asks for them."""

    def __init__(self):
        self.sent, self.answers = [], []

    def push_messages(self, messages):
        first = len(self.sent)
        self.sent += messages
        for number, message in enumerate(messages, first):
            message.metadata.__dict__["_message_id"] = str(number)
        return [message.metadata.message_id for message in messages]

    def pull_messages(self, identifiers):
        found = [answer for answer in self.answers if answer.metadata.reply_to_message_id in identifiers]
        self.answers = [answer for answer in self.answers if answer not in found]
        return found

    def answer(self, number, said):
        """Let the message of that number be answered, by an error if `said` is a text."""
        content = Error(0, said) if isinstance(said, str) else pack(ANSWER, encode_reply(said))
        self.answers.append(Message(content, reply_to=self.sent[number]))


class Clock:
    """Time that passes only where it is slept."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


@pytest.fixture
def grid(tmp_path, monkeypatch):
    """A Grid, and a function that does a round over it: what the answers are worth, in the order they came."""
    monkeypatch.setattr(module, "time", Clock())
    for name in ("_task_id", "_run_id", "_node_id"):  # Flower asks who sends
        monkeypatch.setattr(TaskIdentity, name, 1)
    grid = Grid()
    exchange = GridExchange(grid, lambda: {"x": 1, "y": 2}, lambda: tmp_path)

    def asked(server, *answers, seconds=0.3):
        server.begin("xy")
        grid.answers, later = [], list(answers)
        before, found = len(grid.sent), []
        orders = {name: server.order(name) for name in server.asked}
        real = grid.push_messages

        def push(messages):
            identifiers = real(messages)
            while later:
                grid.answer(*later.pop(0))
            return identifiers

        grid.push_messages = push
        for sender, answer in exchange.ask(orders, seconds):
            found.append((sender, type(answer), server.receive(sender, answer)))
        grid.push_messages = real
        assert len(grid.sent) == before + 2
        return found

    asked.exchange = exchange
    return asked


def test_an_error_of_an_earlier_round_says_nothing_of_this_one(grid):
    server = coordinator(rounds=2, quorum=1)
    assert grid(server, (0, reply("x"))) == [("x", Reply, None)]
    server.close()
    said = grid(server, (1, "expired"), (2, reply("x", round=2)), (3, reply("y", round=2)))
    assert said == [("x", Reply, None), ("y", Reply, None)]
    record = server.close().record
    assert (record["refused"], record["quarantined"], list(record["clients"])) == ([], [], ["x", "y"])


@pytest.mark.parametrize("late", [reply("y"), Refusal("y", 1, "memory"), reply("y", 1, 2, 3, update={})])
def test_an_answer_to_an_earlier_round_is_late_whatever_it_is(grid, late):
    server = coordinator(rounds=2, quorum=1)
    grid(server, (0, reply("x")))
    server.close()
    said = grid(server, (1, late), (2, reply("x", round=2)), (3, reply("y", round=2)))
    assert sorted(fault is None for _, _, fault in said) == [False, True, True]
    record = server.close().record
    assert [(fault["client"], fault["kind"]) for fault in record["quarantined"]] == [("y", "late")]
    assert (record["refused"], list(record["clients"]), server.strikes["y"]) == ([], ["x", "y"], 0)


def test_in_a_round_that_is_begun_again_an_answer_to_the_first_order_counts_and_an_error_does_not(grid):
    server = coordinator(rounds=1, quorum=2)
    assert grid(server) == []
    with pytest.raises(Exception, match="no reply in time"):
        server.close()
    said = grid(server, (0, reply("x")), (1, "expired"), (3, reply("y")))
    assert sorted(said, key=str) == [("x", Reply, None), ("y", Reply, None)]
    assert list(server.close().record["clients"]) == ["x", "y"]


def test_an_error_of_this_round_is_a_refusal(grid):
    server = coordinator(rounds=1, quorum=1)
    assert grid(server, (0, "it crashed"), (1, reply("y"))) == [("x", Refusal, "it crashed"), ("y", Reply, None)]


def test_an_answer_to_nothing_that_was_asked_is_passed_over(grid, monkeypatch):
    server = coordinator(rounds=1, quorum=2)
    pulled = Grid.pull_messages

    def with_a_stranger(self, identifiers):
        stray = Message(pack(ANSWER, b"x"), reply_to=self.sent[0])
        stray.metadata.__dict__["_reply_to_message_id"] = "unknown"
        return [stray, *pulled(self, identifiers)]

    monkeypatch.setattr(Grid, "pull_messages", with_a_stranger)
    assert grid(server, (0, reply("x")), (1, reply("y"))) == [("x", Reply, None), ("y", Reply, None)]
    assert list(server.close().record["clients"]) == ["x", "y"]


def test_whatever_goes_wrong_with_an_answer_is_its_senders_fault(grid, monkeypatch):
    def broken(data, *rest):
        if b'"client": "x"' in data or b'\\"x\\"' in data:
            raise ZeroDivisionError("oops")
        return take(data, *rest)

    take = module.take_reply
    monkeypatch.setattr(module, "take_reply", broken)
    server = coordinator(rounds=1, quorum=1)
    first, second = grid(server, (0, reply("x")), (1, reply("y")))
    assert (first[:2], second) == (("x", Refusal), ("y", Reply, None))
    (fault,) = server.close().record["quarantined"]
    assert (fault["client"], fault["kind"]) == ("x", "invalid")
    assert "oops" in fault["reason"]


def test_an_answer_in_anothers_name_is_invalid(grid, monkeypatch):
    """Flower's Fleet API takes a node's word for who it is."""
    real = Grid.answer

    def forged(self, number, said):
        real(self, number, said)
        if number == 0:
            self.answers[-1].metadata.__dict__["_src_node_id"] = 2

    monkeypatch.setattr(Grid, "answer", forged)
    server = coordinator(rounds=1, quorum=1)
    assert [found[:2] for found in grid(server, (0, reply("x")), (1, reply("y")))] == [("x", Refusal), ("y", Reply)]
    (fault,) = server.close().record["quarantined"]
    assert (fault["client"], fault["kind"]) == ("x", "invalid")


def test_a_message_that_flower_cannot_read_is_its_senders_fault(grid, monkeypatch):
    def broken(self, identifiers):
        found = pulled(self, identifiers)
        if found and identifiers == ["0"]:
            raise RecursionError("too deep")
        return found

    pulled = Grid.pull_messages
    monkeypatch.setattr(Grid, "pull_messages", broken)
    server = coordinator(rounds=1, quorum=1)
    first, second = grid(server, (0, reply("x")), (1, reply("y")))
    assert (first[:2], second) == (("x", Refusal), ("y", Reply, None))
    (fault,) = server.close().record["quarantined"]
    assert (fault["client"], fault["kind"]) == ("x", "invalid")


def test_a_superlink_that_is_away_is_nobodys_fault(grid, monkeypatch):
    def away(self, identifiers):
        raise httpx.ConnectError("away")

    monkeypatch.setattr(Grid, "pull_messages", away)
    with pytest.raises(httpx.ConnectError):
        grid(coordinator(rounds=1, quorum=1), (0, reply("x")))


def test_with_a_gateway_what_is_announced_alone_is_asked_for(grid, monkeypatch, tmp_path):
    announced, asked = Announced(tmp_path), []

    def pull(self, identifiers):
        asked.extend(identifiers)
        return pulled(self, identifiers)

    pulled = Grid.pull_messages
    monkeypatch.setattr(Grid, "pull_messages", pull)
    monkeypatch.setattr(grid.exchange, "_announced", announced)
    announced.announce("0")
    announced.announce("1", "its SuperNode ended")
    announced.announce("3")
    server = coordinator(rounds=2, quorum=1)
    assert grid(server, (0, reply("x"))) == [("x", Reply, None), ("y", Refusal, "its SuperNode ended")]
    assert asked == ["0"]
    server.close()
    second = grid(server, (2, reply("x", round=2)))
    assert [(who, kind) for who, kind, _ in second] == [
        ("y", Refusal)
    ]  # Flower took no answer of y; x's is not announced
    assert asked == ["0", "3"]


def test_want_of_memory_is_nobodys_fault(grid, monkeypatch):
    def starved(*_):
        raise MemoryError

    monkeypatch.setattr(module, "take_reply", starved)
    with pytest.raises(ResourceError):
        grid(coordinator(rounds=1, quorum=1), (0, reply("x")))
