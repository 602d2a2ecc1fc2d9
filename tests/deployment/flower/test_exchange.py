"""Orders and answers over a Grid that hands out what the test puts into it."""

import pytest
from flwr.app import Error, Message
from flwr.supercore.task_identity import TaskIdentity

from fedproxy.deployment.flower import exchange as module
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
    assert said == [("x", Reply, None), ("y", Reply, None)]
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


def test_want_of_memory_is_nobodys_fault(grid, monkeypatch):
    def starved(*_):
        raise MemoryError

    monkeypatch.setattr(module, "take_reply", starved)
    with pytest.raises(ResourceError):
        grid(coordinator(rounds=1, quorum=1), (0, reply("x")))
