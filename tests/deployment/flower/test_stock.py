"""Clients on stock SuperNodes: introduced by messages, refused by name, and in the end the same bits."""

import contextlib
import json
import os
import shutil
import signal
import sys
import uuid
from pathlib import Path
from types import SimpleNamespace

import pytest
from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

import fedproxy
from fedproxy.artifacts import read_json
from fedproxy.data import read_rows
from fedproxy.deployment.certificates import load_private, public_openssh
from fedproxy.deployment.flower import SETTINGS, introductions
from fedproxy.deployment.flower.app import client, server
from fedproxy.deployment.flower.command import command
from fedproxy.deployment.flower.exchange import ANSWER, LISTING, PARTS, READY, unpack
from fedproxy.deployment.flower.introductions import Introductions
from fedproxy.deployment.flower.site import Site
from fedproxy.deployment.handout.fetch import find_proxy, take_parts
from fedproxy.deployment.handout.parts import describe, opened
from fedproxy.deployment.keys import add_client, client_key_file, init_keys, read_client_key
from fedproxy.deployment.purse import FOLDER
from fedproxy.errors import ConfigError, UsageError
from fedproxy.federation.offer import Limits
from fedproxy.privacy.budget import Budget
from fedproxy.run_directory import MEMBERS
from tests.deployment.conftest import Process, eventually, executed
from tests.deployment.handout.conftest import proxy  # noqa: F401
from tests.docs.terminal import free_port
from tests.test_pipeline import adapter_bytes, write_experiment

ROOT = Path(__file__).parents[3]
LOW = {"min_rows": 1, "min_steps": 1}


class Grid:
    """Nodes in this process: each is a function that answers a message at once, or later where it gives nothing."""

    def __init__(self, **nodes):
        self._asked, self.sent, self.answers, self.infos = {}, [], {}, {}
        for number, (name, answers) in enumerate(nodes.items(), 1):
            self.answers[number] = answers
            told = {"status": "online", "last_activated_at": "1", "public_key": name.encode()}
            self.infos[number] = SimpleNamespace(node_id=number, **told)

    def get_nodes(self):
        return list(self.infos.values())

    def asked_of(self, number):
        return sum(message.metadata.dst_node_id == number for message in self.sent)

    def push_messages(self, messages):
        identifiers = [uuid.uuid4().hex for _ in messages]
        for identifier, message in zip(identifiers, messages, strict=True):
            self.sent.append(message)
            message.metadata.__dict__["_message_id"] = identifier
            self._asked[identifier] = message
        return identifiers

    def pull_messages(self, identifiers):
        found = []
        for identifier in set(identifiers) & self._asked.keys():
            message = self._asked[identifier]
            if (answer := self.answers[message.metadata.dst_node_id](message)) is not None:
                del self._asked[identifier]
                answer.metadata.__dict__["_src_node_id"] = message.metadata.dst_node_id
                found.append(answer)
        return found


@pytest.fixture(autouse=True)
def identity(monkeypatch):
    for name in ("_task_id", "_run_id", "_node_id"):  # Flower asks who sends
        monkeypatch.setattr(TaskIdentity, name, 1)


def node(**config):
    """A stock SuperNode of this configuration: each message is answered by the ClientApp, errors as Flower does it."""
    context = Context(1, 1, config, RecordDict(), {})

    def answer(message):
        try:
            return client(message, context)
        except Exception as error:
            return Message(Error(2, f"{type(error)!s}:<'{error}'>"), reply_to=message)

    answer.context = context
    return answer


def says(**values):
    """A node that answers every message with these values."""
    return lambda message: Message(RecordDict({READY: ConfigRecord(values)}), reply_to=message)


def events(run, kind):
    return [
        event for event in map(json.loads, (run / "events.jsonl").read_text().splitlines()) if event["event"] == kind
    ]


def serve(grid, experiment, out):
    server(grid, Context(1, 0, {}, RecordDict(), {"experiment": str(experiment), "out": str(out)}))


@pytest.fixture
def federation(tmp_path, tiny_checkpoint, calibration):
    """An experiment whose updates lose something on the wire; the same without the clients' data, and theirs."""
    whole = write_experiment(tmp_path, tiny_checkpoint(), calibration, extra='wire = "int4"\n', rounds=2)
    bare = tmp_path / "bare.toml"
    bare.write_text("".join(line for line in whole.read_text().splitlines(True) if not line.startswith("data")))

    def own(name, **more):
        return {
            "client": name,
            "data": str(tmp_path / f"{name}.jsonl"),
            "cache": str(tmp_path / "cache"),
            **LOW,
            **more,
        }

    return SimpleNamespace(whole=whole, bare=bare, own=own, folder=tmp_path)


@pytest.mark.slow
def test_they_end_in_the_bits_of_the_engine_inline_whoever_else_is_there(federation):
    secret = federation.folder / "secret.jsonl"
    grid = Grid(
        liar=says(client="nobody"),
        second=says(client="numbers", rows=10, missing=["0" * 64]),
        lost=node(**federation.own("colours", data=str(secret))),
        strict=node(**federation.own("colours", max_rounds=1)),
        numbers=node(**federation.own("numbers", max_repeats=0)),
        colours=node(**federation.own("colours")),
        mute=lambda message: None,
        bare=node(),
    )
    run, inline = federation.folder / "run", federation.folder / "inline"
    serve(grid, federation.bare, run)
    fedproxy.federate(federation.whole, inline)
    assert adapter_bytes(run) == adapter_bytes(inline)
    refused = {int(event["node"]): event["reason"] for event in events(run, "node_refused")}
    assert refused.keys() == {1, 2, 3, 4, 8} | (refused.keys() & {5, 6})  # these two may have had to wait for a name
    assert "nobody" in refused[1]
    assert "max_rounds" in refused[4]
    assert "secret" not in str(refused)
    assert str(federation.folder) not in str(refused)
    assert read_json(run / MEMBERS) == {"numbers": "numbers", "colours": "colours"}

    orders = [message for message in grid.sent if message.metadata.message_type == "train"]
    again = next(message for message in orders if message.metadata.dst_node_id == 5)
    assert b"max_repeats" in unpack(grid.answers[5](again).content, ANSWER)


def test_a_client_that_comes_later_is_introduced_while_the_rounds_go_on(federation):
    grid = Grid(numbers=node(**federation.own("numbers")), colours=node(**federation.own("colours")))
    late, first, run = grid.infos.pop(2), grid.answers[1], federation.folder / "run"
    text = federation.bare.read_text().replace("rounds = 2", "rounds = 4")
    federation.bare.write_text(text + 'quorum = 1\npatience = "3s"\n')

    def numbers(message):
        if message.metadata.message_type == "train":
            grid.infos[2] = late
        return first(message)

    grid.answers[1] = numbers
    serve(grid, federation.bare, run)
    clients = [list(read_json(run / "rounds" / f"000{number}" / "round.json")["clients"]) for number in (1, 4)]
    assert clients == [["numbers"], ["colours", "numbers"]]


def test_an_experiment_that_names_no_clients_is_refused(federation):
    text = federation.bare.read_text()
    federation.bare.write_text(
        text.replace('[[client]]\nname = "colours"', "").replace('[[client]]\nname = "numbers"', "")
    )
    with pytest.raises(UsageError, match="client"):
        serve(Grid(), federation.bare, federation.folder / "run")
    assert not (federation.folder / "run").exists()


@pytest.mark.parametrize("key", ["max_round", "dat"])
def test_a_node_config_is_strict(key):
    with pytest.raises(ConfigError, match=key):
        Site.of({"client": "bank", key: 1})
    site = Site.of({"client": "bank", "data": "~/rows.jsonl", "max_rounds": 3, "max_time": 60})
    assert site.limits == Limits(max_rounds=3, max_time=60.0)


PART = 1 << 20


@pytest.fixture
def introduced(proxy, tmp_path, monkeypatch):  # noqa: F811
    """A function that introduces nodes, each by so many steps, to a proxy of some parts; the nodes refused, by name."""
    monkeypatch.setattr(introductions, "MESSAGE_BYTES", 2 * PART)
    listing, told = describe(proxy, PART), []
    (tmp_path / MEMBERS).write_text("{}")

    def introduce(grid, steps=12):
        with opened(proxy) as handles:
            nodes = Introductions(
                grid,
                tmp_path,
                listing,
                handles,
                {"bank": "{}", "shop": "{}"},
                lambda kind, **values: told.append((kind, values)),
            )
            for _ in range(steps):
                there = nodes.ready()
        refused = {values["node"]: values["reason"] for kind, values in told if kind == "node_refused"}
        return there, refused

    introduce.listing = listing
    return introduce


def keeper(name, cache, listing, sizes=None):
    """A node that keeps the parts that it is sent."""

    def answer(message):
        if message.metadata.message_type == "query":
            return says(client=name)(message)
        parts = {sha256: bytes(part.data) for sha256, part in message.content[PARTS].items()}
        if sizes is not None:
            sizes.append(sum(map(len, parts.values())))
        return says(rows=8, missing=take_parts(unpack(message.content, LISTING), parts, listing.sha256, cache))(message)

    return answer


def test_the_proxy_goes_in_messages_of_bounded_size_and_what_is_there_is_not_sent(introduced, tmp_path):
    listing, sizes, again = introduced.listing, [], []
    cache = tmp_path / "cache"
    there, refused = introduced(Grid(bank=keeper("bank", cache, listing, sizes)))
    assert (there, refused) == ({"bank": 1}, {})
    assert sum(sizes) == listing.size
    assert sizes[0] == 0
    assert max(sizes) <= 2 * PART
    place = find_proxy(listing.sha256, cache)
    assert place is not None
    with open(place / "model.safetensors", "r+b") as file:  # noticed, and this part alone is sent again
        file.write(b"x")
    assert introduced(Grid(bank=keeper("bank", cache, listing, again)))[0] == {"bank": 1}
    assert again == [0, PART]


HASH = "a" * 64


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"client": 3},
        {"client": "../up"},
        {"client": ["bank"]},
        {"client": "bank" * 9999},
        {"client": "bank"},
        {"client": "bank", "rows": 0, "missing": []},
        {"client": "bank", "rows": -5, "missing": []},
        {"client": "bank", "rows": (1 << 63) - 1, "missing": []},
        {"client": "bank", "rows": 2.5, "missing": []},
        {"client": "bank", "rows": True, "missing": []},
        {"client": "bank", "rows": 8, "missing": HASH},
        {"client": "bank", "rows": 8, "missing": [HASH]},
        {"client": "bank", "rows": 8, "missing": [1] * 100_000},
    ],
)
def test_a_node_that_answers_nonsense_is_refused_and_the_others_go_on(introduced, tmp_path, values):
    grid = Grid(evil=says(**values), bank=keeper("bank", tmp_path / "cache", introduced.listing))
    there, refused = introduced(grid)
    assert there == {"bank": 2}
    assert "1" in refused
    assert all(len(reason) <= 500 for reason in refused.values())


@pytest.mark.parametrize("broken", ["empty", "forged", "unreadable"])
def test_a_message_that_is_none_of_fedproxys_is_its_nodes_fault(introduced, tmp_path, monkeypatch, broken):
    def answer(message):
        if broken == "unreadable":
            raise RecursionError("too deep")
        return says(client="bank")(message) if broken == "forged" else Message(RecordDict(), reply_to=message)

    def pull(self, identifiers):
        found = pulled(self, identifiers)
        for one in found:  # Flower's Fleet API takes a node's word for who it is
            one.metadata.__dict__["_src_node_id"] = 2
        return found

    pulled = Grid.pull_messages
    if broken == "forged":
        monkeypatch.setattr(Grid, "pull_messages", pull)
    there, refused = introduced(Grid(evil=answer, bank=keeper("bank", tmp_path / "cache", introduced.listing)))
    assert (there, refused.keys()) == ({"bank": 2}, {"1"})


def test_a_node_that_asks_for_what_it_was_sent_is_refused(introduced):
    first = introduced.listing.files[0].parts[0].sha256
    there, refused = introduced(Grid(evil=says(client="bank", rows=8, missing=[first])))
    assert there == {}
    assert first[:12] in refused["1"]


def test_of_two_nodes_with_one_name_the_second_waits_until_the_first_has_left(introduced, tmp_path):
    cache = tmp_path / "cache"
    grid = Grid(**{one: keeper("bank", cache, introduced.listing) for one in ("first", "second")})
    there, refused = introduced(grid)
    assert (there, refused.keys()) == ({"bank": 1}, {"2"})
    assert "bank" in refused["2"]
    real = grid.get_nodes

    def left():
        if grid.asked_of(1) == 2:
            grid.infos.pop(1, None)
        return real()

    grid.sent.clear()
    grid.get_nodes = left
    assert introduced(grid)[0] == {"bank": 2}


def test_a_supernode_that_was_started_anew_is_asked_anew(introduced, tmp_path):
    grid = Grid(bank=says(client="nobody"))
    cache, listing = tmp_path / "cache", introduced.listing
    real = grid.get_nodes

    def restarted():
        if len(grid.sent) == 1:
            grid.infos[1].last_activated_at = "2"
            grid.answers[1] = keeper("bank", cache, listing)
        return real()

    grid.get_nodes = restarted
    assert introduced(grid)[0] == {"bank": 1}


@pytest.mark.long
def test_a_stock_superlink_and_stock_supernodes(tmp_path, tiny_checkpoint, calibration, monkeypatch):
    """The app of flower-hub, as Flower runs it: each message by a process of its own; and gone on with after a kill.

    Then the same sites with budgets of their own: whose does not suffice takes no part.
    """
    whole = write_experiment(tmp_path, tiny_checkpoint(), calibration, rounds=3)
    app, port, home, keys = tmp_path / "app", free_port(), tmp_path / "home", tmp_path / "keys"
    shutil.copytree(ROOT / "flower-hub", app)
    bare = "".join(line for line in whole.read_text().splitlines(True) if not line.startswith("data"))
    (app / "experiment.toml").write_text(bare)
    init_keys(keys)
    home.mkdir()
    (home / "config.toml").write_text(
        f'[superlink.stock]\naddress = "127.0.0.1:{port}"\nroot-certificates = "{keys / "ca.crt"}"\n'
    )
    for key, value in {**SETTINGS, "FLWR_HOME": str(home)}.items():
        monkeypatch.setenv(key, value)
    scripts, run = Path(sys.executable).parent, tmp_path / "run"
    with contextlib.ExitStack() as stack:

        def start(name, *words):
            process = Process(tmp_path / f"{name}.log", executed(list(map(str, words))))
            stack.callback(process.clear)
            return process

        def site(name, limits, log):
            config = f'client="{name}" data="{tmp_path / name}.jsonl" cache="{tmp_path / log}" {limits}'
            own = ["--superlink", f"127.0.0.1:{port}", "--host", "127.0.0.1", "--port", free_port()]
            own += ["--root-certificates", keys / "ca.crt", "--auth-supernode-private-key", tmp_path / f"{name}.key"]
            return start(log, scripts / "flower-supernode", *own, "--node-config", config)

        secure = [("--ssl-ca-certfile", "ca.crt"), ("--ssl-certfile", "server.crt"), ("--ssl-keyfile", "server.key")]
        files = [word for option, name in secure for word in (option, keys / name)]
        at = ["--host", "127.0.0.1", "--port", port]
        link = start("superlink", scripts / "flower-superlink", *at, *files, "--enable-supernode-auth")
        link.says("running on")
        enough, sites = "min_rows=1 min_steps=1", {}
        for name in ("colours", "numbers"):
            private, public = tmp_path / f"{name}.key", tmp_path / f"{name}.pub"
            add_client(keys, name)
            private.write_bytes(read_client_key(client_key_file(keys, name)).private_openssh)
            public.write_text(public_openssh(load_private(private.read_bytes()).public_key()))
            start(f"register-{name}", *command("flwr", "supernode", "register", str(public), "stock")).ends()
            sites[name] = site(name, enough, name)
        submit = command("flwr", "run", str(app), "stock", "--run-config", f'out="{run}"')
        start("run", *submit).ends()
        assert eventually((run / "rounds" / "0001").is_dir, 400.0), link.said
        (serverapp,) = link.family("flwr-serverapp")
        os.kill(serverapp, signal.SIGKILL)
        assert eventually(lambda: not link.family("flwr-serverapp"))
        assert not (run / "adapter").exists()
        start("again", *submit).ends()
        assert eventually((run / "adapter").is_dir, 400.0), link.said

        for one in sites.values():
            os.kill(one.pid, signal.SIGTERM)
            # A ClientApp of the killed run may wait on for what its message lacks: Flower lets it do so for two hours.
            assert eventually(lambda one=one: set(one.family()) <= set(one.family("flwr-clientapp")), 30.0), one.said
            one.clear()
        text = bare.replace("max_length = 32\n[fed", "max_length = 32\npadding_free = false\n[fed")
        text = text.replace("rounds = 3", "rounds = 1\nparticipation = 0.5\nquorum = 1")
        (tmp_path / "private.toml").write_text(f"{text}[train.privacy]\nepsilon = 8.0\n")
        site("numbers", f"{enough} max_epsilon=2.0", "poor")
        private = tmp_path / "private"
        config = f'out="{private}" experiment="{tmp_path / "private.toml"}"'
        start("run-private", *command("flwr", "run", str(app), "stock", "--run-config", config)).ends()
        assert eventually(lambda: (private / "events.jsonl").is_file() and events(private, "node_refused"), 400.0)
        site("colours", f"{enough} max_epsilon=9.0", "rich")
        assert eventually((private / "adapter").is_dir, 400.0), link.said
    fedproxy.federate(whole, tmp_path / "inline")
    assert adapter_bytes(run) == adapter_bytes(tmp_path / "inline")
    [refused] = events(private, "node_refused")
    assert refused["client"] == "numbers"
    assert "this client allows 2 over all runs (max_epsilon)" in refused["reason"]
    assert not list((tmp_path / "poor").rglob("*.safetensors"))
    clients = read_json(private / "rounds" / "0001" / "round.json")["clients"]
    assert clients.keys() == {"colours"}
    rows = read_rows(tmp_path / "colours.jsonl")
    assert Budget(tmp_path / "rich" / FOLDER, rows, 9.0).spent == clients["colours"]["epsilon"] <= 8.0
