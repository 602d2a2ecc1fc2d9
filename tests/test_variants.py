"""Every choice of wire, space and regulariser in whole rounds: inline, by bytes, and resumed, to the same bits."""

import contextlib
import dataclasses
import functools
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

import fedproxy
from fedproxy.adapter_files import read_adapter
from fedproxy.artifacts import Manifest, read_json
from fedproxy.errors import ConfigError, FederationError, UsageError
from fedproxy.federation import client
from fedproxy.federation.client_state import ClientState
from fedproxy.federation.local_clients import LocalClients
from fedproxy.federation.messages import Order
from fedproxy.federation.offer import make_offer
from fedproxy.federation.protocol import encode_order, take_reply
from fedproxy.federation.session import Session
from fedproxy.federation.store import RoundStore
from fedproxy.federation.tuning import read_run, tune
from fedproxy.layer_map import split_name
from fedproxy.pipeline import prepare, read_experiment
from tests.test_pipeline import adapter_bytes, write_experiment

VARIANTS = {
    "bf16": 'wire = "bf16"\nwire_down = "bf16"\n',
    "int8": 'wire = "int8"\nwire_down = "int8"\n',
    "int4": 'wire = "int4"\nwire_down = "int4"\n',
    "top-k": 'wire = "top-k"\nwire_options = { values = "int8" }\nmerge_options = { r0 = 0.5 }\nwire_down = "int8"\n',
    "top-k 10 %": 'wire = "top-k"\nwire_options = { share = 0.1, values = "int4" }\n',
    "frozen-a": 'space = "frozen-a"\n',
    "frozen-a, int4": 'space = "frozen-a"\nwire = "int4"\nwire_down = "int4"\n',
    "product, momentum": 'space = "product"\nserver_optimizer = "fedavgm"\n',
    "scaffold": 'regulariser = "scaffold"\nmerge = "mean"\n',
    "scaffold, frozen-a, int4": 'regulariser = "scaffold"\nspace = "frozen-a"\nwire = "int4"\n',
    "two of three clients": 'wire = "int4"\nparticipation = 0.5\nquorum = 1\n',
}


class BytesExchange:
    """Clients of this process behind the bytes of the protocol, as over a network."""

    def __init__(self, run, experiment, folder):
        self._clients, self._names, self._folder = LocalClients.of(run), experiment.client_names, folder
        self._wire = experiment.federate.wire, experiment.federate.wire_options
        self.sent = {}

    def available(self):
        return self._names

    def ask(self, orders, deadline):
        for name, order in orders.items():
            answer = self._clients.session(name).answer(name, encode_order(order))[0]
            self.sent[order.round, name] = len(answer)
            yield name, take_reply(answer, self._folder / f"{order.round}-{name}", order, name, *self._wire)


def write(folder, llm, calibration, extra, rounds=3):
    path = write_experiment(folder, llm, calibration, extra=extra, rounds=rounds)
    if "regulariser" in extra:
        path.write_text(path.read_text().replace("regulariser_strength = 1.0\n", ""))
    return path


@pytest.fixture
def make(tmp_path, tiny_checkpoint, calibration):
    return functools.partial(write, tmp_path, tiny_checkpoint(), calibration)


@pytest.fixture(scope="module")
def inline(tmp_path_factory, tiny_checkpoint, calibration):
    """A function that gives a variant's experiment and its run inline, made once: do not write into it."""

    @functools.cache
    def made(variant):
        folder = tmp_path_factory.mktemp("inline")
        experiment = write(folder, tiny_checkpoint(), calibration, VARIANTS[variant])
        return experiment, fedproxy.federate(experiment, folder / "run")

    return made


def by_bytes(experiment, out, folder, kind=BytesExchange):
    """The rounds of `federate`, with every order and reply turned into bytes and back."""
    folder.mkdir()
    with prepare(experiment, out) as directory:
        settings = read_run(out)
        exchange = kind(out, settings, folder)
        tune(settings, directory, lambda store: exchange, settings.client_names)
    return exchange


def same_rounds(first, second):
    for path in sorted((first / "rounds").rglob("*.safetensors")):
        assert path.read_bytes() == (second / path.relative_to(first)).read_bytes(), path
    return adapter_bytes(first) == adapter_bytes(second)


@pytest.mark.parametrize("variant", VARIANTS)
def test_inline_and_by_bytes_end_in_the_same_bits(inline, tmp_path, variant):
    experiment, run = inline(variant)
    exchange = by_bytes(experiment, tmp_path / "bytes", tmp_path / "spool")
    assert same_rounds(run.path, tmp_path / "bytes")
    for record in run.rounds:
        for name, found in record["clients"].items():
            assert found["bytes_up"] < exchange.sent[record["round"], name] < found["bytes_up"] + 8000
            assert found["peak_memory_bytes"] > 0


class Killed(BaseException):
    pass


def killed_at(call, experiment, out):
    """A run that is killed when a client trains for the `call`-th time."""
    real, calls = client.train, 0

    def train(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == call:
            raise Killed
        return real(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Killed):
        patch.setattr(client, "train", train)
        fedproxy.federate(experiment, out)


@pytest.mark.parametrize(
    ("variant", "call"),
    [(variant, 4) for variant in ("product, momentum", "frozen-a, int4", "two of three clients")]
    + [(variant, call) for variant in ("int4", "top-k", "scaffold") for call in (3, 4, 5)],
)
def test_a_run_that_is_killed_and_resumed_ends_in_the_same_bits(inline, tmp_path, variant, call):
    """With two clients the third and fourth training are those of round 2; before the fifth it is complete."""
    experiment, whole = inline(variant)
    killed_at(call, experiment, tmp_path / "killed")
    fedproxy.federate(experiment, tmp_path / "killed", resume=True)
    assert same_rounds(whole.path, tmp_path / "killed")


@pytest.mark.parametrize("variant", ["int4", "scaffold", "frozen-a, int4"])
def test_a_round_whose_storing_failed_is_done_again_in_the_same_bits(inline, tmp_path, monkeypatch, variant):
    experiment, whole = inline(variant)
    real = RoundStore.save

    def save(store, closed, **how):
        if closed.round == 2:
            raise Killed
        real(store, closed, **how)

    monkeypatch.setattr(RoundStore, "save", save)
    with pytest.raises(Killed):
        fedproxy.federate(experiment, tmp_path / "killed")
    monkeypatch.undo()
    fedproxy.federate(experiment, tmp_path / "killed", resume=True)
    assert same_rounds(whole.path, tmp_path / "killed")


def test_less_precise_wires_send_fewer_bytes(inline, make, tmp_path):
    runs = {name: inline(name)[1] for name in ("bf16", "int8", "int4", "top-k 10 %")}
    up, down = {}, {}
    for variant, run in {"fp32": fedproxy.federate(make(""), tmp_path / "fp32"), **runs}.items():
        last = run.rounds[-1]["clients"]["colours"]
        up[variant], down[variant] = last["bytes_up"], last["bytes_down"]
    assert up["bf16"] == up["fp32"] / 2
    assert up["fp32"] > up["bf16"] > up["int8"] > up["int4"] > up["top-k 10 %"]
    assert down["fp32"] > down["bf16"] > down["int8"] > down["int4"]


def test_a_plain_and_a_lossy_wire_learn_alike(make, tmp_path):
    """With error feedback the adapter after some rounds is near the one of plain updates, nearer than the start."""
    plain, lossy = (tmp_path / "plain", tmp_path / "lossy")
    fedproxy.federate(make("", rounds=6), plain)
    fedproxy.federate(make('wire = "int8"\n', rounds=6), lossy)
    start, one, other = (
        load_file(path / "adapter_model.safetensors")
        for path in (plain / "start", plain / "adapter", lossy / "adapter")
    )
    moved = torch.cat([(one[name] - start[name]).flatten() for name in start]).norm()
    apart = torch.cat([(one[name] - other[name]).flatten() for name in start]).norm()
    assert apart < 0.5 * moved


def test_on_a_frozen_a_only_b_moves_and_travels(inline):
    _, run = inline("frozen-a")
    start, end = (load_file(run.path / name / "adapter_model.safetensors") for name in ("start", "adapter"))
    for name, before in start.items():
        assert torch.equal(before, end[name]) == (".lora_A." in name), name
    conflict = load_file(run.path / "rounds" / "0001" / "conflict.safetensors")
    assert conflict.keys() == {name for name in start if ".lora_B." in name}
    sent = sum(4 * tensor.numel() for name, tensor in start.items() if ".lora_B." in name)
    assert {client["bytes_up"] for client in run.rounds[0]["clients"].values()} == {sent}


def test_clients_of_different_ranks_tune_one_adapter(make, tmp_path):
    experiment = make(VARIANTS["product, momentum"])
    experiment.write_text(experiment.read_text().replace('name = "colours"', 'name = "colours"\nlora_r = 1'))
    run = fedproxy.federate(experiment, tmp_path / "inline")
    by_bytes(experiment, tmp_path / "bytes", tmp_path / "spool")
    assert same_rounds(tmp_path / "inline", tmp_path / "bytes")
    first = run.rounds[0]["clients"]
    assert 2 * first["colours"]["bytes_up"] == first["numbers"]["bytes_up"]
    adapter = load_file(run.adapter / "adapter_model.safetensors")
    assert {t.shape[0] for name, t in adapter.items() if ".lora_A." in name} == {2}
    conflict = load_file(run.path / "rounds" / "0001" / "conflict.safetensors")
    assert {name: t.shape for name, t in conflict.items()} == {name: t.shape for name, t in adapter.items()}


def test_scaffolds_variate_is_the_mean_of_the_clients(inline):
    check_mean(inline("scaffold")[1].path, "0003", "0004")


class Deaf(BytesExchange):
    """The reply of colours in round 2 is lost on its way."""

    def ask(self, orders, deadline):
        return (said for said in super().ask(orders, deadline) if (said[0], said[1].round) != ("colours", 2))


@pytest.mark.parametrize("variant", ["int4", "scaffold"])
def test_a_reply_that_is_lost_moves_nothing_at_the_client(make, tmp_path, variant):
    """SCAFFOLD's c stays the mean of the c_k, and an encoding's residual is that of the last update that counted."""
    begun = []
    real = ClientState.before

    def before(state, since):
        begun.append(since)
        return real(state, since)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ClientState, "before", before)
        by_bytes(make(VARIANTS[variant] + "quorum = 1\n", rounds=4), tmp_path / "run", tmp_path / "spool", Deaf)
    assert begun == [0, 0, 1, 1, 1, 2, 3, 3]  # colours, numbers, colours, …
    if variant == "scaffold":
        check_mean(tmp_path / "run", "0004", "0005")


def check_mean(run, number, following):
    server = load_file(run / "rounds" / number / "regulariser.safetensors")
    own = [load_file(run / "clients" / name / f"{following}.safetensors") for name in ("colours", "numbers")]
    assert all(any(tensor.any() for tensor in held.values()) for held in (server, *own))
    for name, tensor in server.items():
        mean = sum(state[f"regulariser/{name}"] for state in own) / 2
        assert torch.allclose(tensor, mean, rtol=1e-4, atol=1e-5 * float(mean.abs().max()))


@pytest.mark.parametrize("variant", ["int4", "scaffold"])
def test_what_a_client_no_longer_has_is_told_and_begins_at_zero(make, tmp_path, caplog, variant):
    experiment = make(VARIANTS[variant])
    killed_at(3, experiment, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "clients" / "colours")
    fedproxy.federate(experiment, tmp_path / "run", resume=True)
    told = [record.getMessage() for record in caplog.records if "no longer has" in record.getMessage()]
    what = "what the wire lost so far" if variant == "int4" else "its control variate"
    assert told == [f"colours no longer has {what}, as it was after round 1: zero again."]


def test_scaffold_changes_what_is_learned_from_the_second_round_on(inline, make, tmp_path):
    run = fedproxy.federate(make('regulariser = "none"\nmerge = "mean"\n'), tmp_path / "none")
    files = [
        [path / "rounds" / n / "adapter.safetensors" for path in (run.path, inline("scaffold")[1].path)]
        for n in ("0001", "0002")
    ]
    assert files[0][0].read_bytes() == files[0][1].read_bytes()
    assert files[1][0].read_bytes() != files[1][1].read_bytes()


@pytest.mark.parametrize(
    ("extra", "error", "says"),
    [
        ('space = "product"\nregulariser = "scaffold"\n', UsageError, "scaffold"),
        ('space = "products"\n', ConfigError, 'Did you mean "product"'),
        ('wire_down = "top-k"\n', ConfigError, "wire_down"),
        ('wire = "int4"\nwire_options = { block = 3 }\n', UsageError, "block"),
    ],
)
def test_what_cannot_be_is_found_before_anything_is_written(make, tmp_path, extra, error, says):
    with pytest.raises(error, match=says):
        fedproxy.federate(make(extra), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("space", "rank", "says"), [("factors", 1, "product"), ("product", 3, "at most that of")])
def test_impossible_ranks_are_found(make, tmp_path, space, rank, says):
    experiment = make(f'space = "{space}"\nregulariser = "none"\n')
    experiment.write_text(experiment.read_text().replace('name = "colours"', f'name = "colours"\nlora_r = {rank}'))
    with pytest.raises(ConfigError, match=says):
        fedproxy.federate(experiment, tmp_path / "run")


def test_first_values_that_differ_from_the_servers_are_noticed_where_they_matter(make, tmp_path):
    with prepare(make(VARIANTS["int4"]), tmp_path / "run"):
        pass
    settings = read_experiment(tmp_path / "experiment.toml")

    def session(**changes):
        federate = dataclasses.replace(settings.federate, **changes)
        experiment = dataclasses.replace(settings, federate=federate)
        offer = make_offer(experiment, "colours", run_id="r", proxy="0" * 64, start="0" * 64)
        return Session.open(tmp_path / "run" / "proxy", offer, state=tmp_path / "state")

    session(wire_down="fp32")
    for changes in ({}, {"wire_down": "fp32", "space": "frozen-a"}):
        with pytest.raises(FederationError, match="first values are others"):
            session(**changes)


def test_a_client_elsewhere_cuts_its_rows_to_the_positions_that_the_proxy_has(tmp_path, tiny_checkpoint, calibration):
    path = write_experiment(tmp_path, tiny_checkpoint("gpt2"), calibration)
    row = json.dumps({"prompt": "say " * 50, "completion": " yes"})
    (tmp_path / "colours.jsonl").write_text("\n".join([row] * 4))
    path.write_text(path.read_text().replace("max_length = 32\n[federate]", "max_length = 300\n[federate]"))
    with prepare(path, tmp_path / "run") as run:
        order = Order(1, read_adapter(run.path / "start")[1])
        answer = LocalClients.of(run.path).session("colours").answer("colours", encode_order(order))[0]
    reply = take_reply(answer, tmp_path / "reply", order, "colours")
    assert reply.tokens == 4 * 128


def test_only_the_blocks_that_train_are_sent_returned_and_plugged_in(make, tmp_path):
    experiment = make('regulariser = "none"\nmerge = "mean"\n')
    experiment.write_text(experiment.read_text().replace("[train]\n", "[train]\nblocks = [0, -1]\n"))
    fedproxy.federate(experiment, tmp_path / "run")
    path = tmp_path / "run"
    layers = Manifest.read(path / "proxy").layer_map
    fedproxy.fuse(read_experiment(experiment).llm.path, path / "adapter", tmp_path / "fused")
    for file, wanted in (
        (path / "rounds" / "0003" / "adapter.safetensors", {0, len(layers) - 1}),
        (path / "adapter" / "adapter_model.safetensors", {0, len(layers) - 1}),
        (tmp_path / "fused" / "adapter_model.safetensors", {layers[0], layers[-1]}),
    ):
        assert {split_name(name)[1] for name in load_file(file)} == wanted
    config = read_json(tmp_path / "fused" / "adapter_config.json")
    assert config["layers_to_transform"] == [layers[0], layers[-1]]
    experiment.write_text(experiment.read_text().replace("[0, -1]", "[3]"))
    with pytest.raises(UsageError, match="3 blocks"):
        fedproxy.federate(experiment, tmp_path / "no")
