"""A client gets the owner's adapter to the bit, or nothing: whatever a server sends in its place is refused by name."""

import dataclasses
import hashlib
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from fedproxy.adapter_files import WEIGHTS_FILE, read_adapter, write_adapter
from fedproxy.artifacts import Manifest, read_json
from fedproxy.deployment.handout.fetch import fetch_proxy
from fedproxy.deployment.handout.parts import describe
from fedproxy.deployment.handout.server import HandoutServer
from fedproxy.deployment.result import CARD, RESULT_CACHE, fetch_result, keeper
from fedproxy.errors import ArtifactError, FederationError, UsageError
from fedproxy.federation.messages import Order
from fedproxy.federation.offer import Limits, make_offer
from fedproxy.federation.session import Session
from fedproxy.federation.start import adapter_manifest
from fedproxy.federation.tuning import START
from fedproxy.pipeline import prepare, read_experiment
from fedproxy.tensor_files import save_tensors
from fedproxy.tensors import digest
from tests.test_pipeline import write_experiment

PRIVATE = "the-owner"


@pytest.fixture(scope="module", params=["factors", "frozen-a"])
def one(request, tmp_path_factory, tiny_checkpoint, calibration):
    """A run that is complete, and a client that has its proxy: `tensors` are what the owner ended with."""
    folder = tmp_path_factory.mktemp(PRIVATE)
    experiment = write_experiment(folder, tiny_checkpoint(), calibration, extra=f'space = "{request.param}"\n')
    with prepare(experiment, folder / "run"):
        pass
    run, settings = folder / "run", read_experiment(experiment)
    config, fresh, _ = read_adapter(run / START)
    draw = torch.Generator().manual_seed(7)
    tensors = {
        name: value if request.param == "frozen-a" and ".lora_A." in name else torch.randn(value.shape, generator=draw)
        for name, value in fresh.items()
    }
    manifest = adapter_manifest(
        Manifest.read(run / "proxy"), "proxy-adapter", Manifest.read(run / "proxy").layer_map, settings
    )
    (run / "adapter").mkdir()
    write_adapter(run / "adapter", config, tensors, manifest)
    listing = describe(run / "proxy")
    offer = make_offer(settings, "numbers", run_id="r", proxy=listing.sha256, start=digest(fresh))
    with HandoutServer(run / "proxy", listing, "127.0.0.1", 0, None, None, lambda name: True) as server:
        url, token = f"http://127.0.0.1:{server.port}", server.issue("numbers")
        proxy = fetch_proxy(url, token, listing.sha256, tmp_path_factory.mktemp("client"), None)
        session = Session.open(proxy, offer, state=folder / "state")
        yield SimpleNamespace(
            run=run, server=server, url=url, token=token, offer=offer, proxy=proxy, session=session, tensors=tensors
        )


def fetch(one, file, state, limits=Limits(), **listed):  # noqa: B008
    """What a client gets where the server hands `file` out as the result."""
    result = listed.get("result", one.server.share(file).sha256)
    owner = SimpleNamespace(url=one.url, ca=None, ledger=SimpleNamespace(leaves=lambda request: None))
    return fetch_result(owner, SimpleNamespace(token=one.token, result=result), one.session, limits, state)


def test_the_result_is_the_owners_to_the_bit_and_fits_the_proxy(one, tmp_path):
    out = tmp_path / "out"
    tensors = fetch(one, one.run / "adapter" / WEIGHTS_FILE, tmp_path)
    keeper(out, one.session, one.offer, one.proxy, overwrite=False)(None, tensors)
    assert (out / WEIGHTS_FILE).read_bytes() == (one.run / "adapter" / WEIGHTS_FILE).read_bytes()
    assert read_json(out / "adapter_config.json") == read_json(one.run / "adapter" / "adapter_config.json")
    read_adapter(out)
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(one.proxy), out)
    card = (out / CARD).read_text()
    assert one.offer.proxy in card
    assert not [path for path in out.iterdir() if PRIVATE in path.read_bytes().decode("latin-1")]


def test_an_order_brings_the_adapter_of_the_round_before(one, tmp_path):
    out, told = tmp_path / "out", []
    keep = keeper(out, one.session, one.offer, one.proxy, overwrite=True)
    one.session.on_global = lambda number, tensors: (told.append(number), keep(number, tensors))
    trained = {name: one.tensors[name] for name in one.session._start}
    one.session.add("numbers", one.session.encode([{"prompt": "a", "completion": " b"}]))
    try:
        for number in (1, 2, 3):
            one.session.train("numbers", Order(number, {name: number * value for name, value in trained.items()}))
            assert out.exists() == (number > 1)
    finally:
        one.session.on_global = None
    assert told == [1, 2]
    held = read_adapter(out)[1]
    assert all(torch.equal(held[name], 3 * value if name in trained else value) for name, value in one.tensors.items())
    assert f"after round 2 of {one.offer.federate.rounds}" in (out / CARD).read_text()


def test_an_adapter_of_another_rank_is_taken_up_to_the_limit(one, tmp_path):
    rank = one.session.config["r"]
    wide = {
        name: torch.cat([value] * 3, dim=0 if ".lora_A." in name else 1).contiguous()
        for name, value in one.tensors.items()
    }
    save_tensors(tmp_path / WEIGHTS_FILE, wide)
    tensors = fetch(one, tmp_path / WEIGHTS_FILE, tmp_path / "state", Limits(max_rank=3 * rank))
    keeper(tmp_path / "out", one.session, one.offer, one.proxy, overwrite=False)(None, tensors)
    held, own = read_adapter(tmp_path / "out")[0], one.session.config
    assert (held["r"], held["lora_alpha"] / held["r"]) == (3 * rank, own["lora_alpha"] / own["r"])
    huge = {name: torch.zeros(tuple(size * (1 << 10) if size == rank else size for size in value.shape))
            for name, value in one.tensors.items()}  # fmt: skip
    save_tensors(tmp_path / "huge" / WEIGHTS_FILE, huge)
    with pytest.raises(FederationError, match=str((tmp_path / "huge" / WEIGHTS_FILE).stat().st_size)):
        fetch(one, tmp_path / "huge" / WEIGHTS_FILE, tmp_path / "other", Limits(max_rank=rank))


HOSTILE = {
    "one is missing": lambda held, name: held.pop(name),
    "one is too much": lambda held, name: held.update(other=held[name].clone()),
    "NaN": lambda held, name: held[name].fill_(float("nan")),
    "infinity": lambda held, name: held[name].view(-1)[:1].fill_(float("inf")),
    "another dtype": lambda held, name: held.update({name: held[name].double()}),
    "another shape": lambda held, name: held.update({name: held[name].T.contiguous()}),
    "one dimension": lambda held, name: held.update({name: held[name].flatten()}),
    "no rank": lambda held, name: held.update({key: value[:0] for key, value in held.items() if ".lora_A." in key}),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_is_no_adapter_of_the_proxy_is_refused(one, tmp_path, kind):
    name = sorted(one.tensors)[1]
    held = {key: value.clone() for key, value in one.tensors.items()}
    HOSTILE[kind](held, name)
    save_tensors(tmp_path / WEIGHTS_FILE, held)
    with pytest.raises(ArtifactError, match=r"lora|other"):
        fetch(one, tmp_path / WEIGHTS_FILE, tmp_path / "state")


@pytest.mark.parametrize("content", [b"", b"x" * 100, (1 << 62).to_bytes(8, "little") + b"{}"])
def test_what_is_no_tensor_file_is_refused(one, tmp_path, content):
    (tmp_path / WEIGHTS_FILE).write_bytes(content or b"\0")
    with pytest.raises(ArtifactError):
        fetch(one, tmp_path / WEIGHTS_FILE, tmp_path / "state")
    (tmp_path / "other.safetensors").write_bytes(b"x")
    with pytest.raises(ArtifactError, match=WEIGHTS_FILE):
        fetch(one, tmp_path / "other.safetensors", tmp_path / "state")


def test_another_result_than_the_one_that_was_announced_is_refused(one, tmp_path):
    announced = hashlib.sha256(b"another").hexdigest()
    with pytest.raises(ArtifactError, match=announced[:12]):
        fetch(one, one.run / "adapter" / WEIGHTS_FILE, tmp_path, result=announced)
    with pytest.raises(FederationError, match="no result"):
        fetch(one, one.run / "adapter" / WEIGHTS_FILE, tmp_path, result="")


def test_who_was_killed_on_the_way_goes_on_with_what_is_there(one, tmp_path):
    file = one.run / "adapter" / WEIGHTS_FILE
    fetch(one, file, tmp_path)
    sent = one.server.sent["numbers"]
    assert fetch(one, file, tmp_path).keys() == one.tensors.keys()
    assert one.server.sent["numbers"] == sent
    assert [path.name for path in tmp_path.iterdir()] == [RESULT_CACHE]


def test_what_lies_there_is_replaced_only_if_it_was_written_before(one, tmp_path):
    out = tmp_path / "out"
    keeper(out, one.session, one.offer, one.proxy, overwrite=False)(1, one.tensors)
    with pytest.raises(UsageError, match="exists"):
        keeper(out, one.session, one.offer, one.proxy, overwrite=False)(2, one.tensors)
    keeper(out, one.session, one.offer, one.proxy, overwrite=True)(2, one.tensors)
    assert "after round 2" in (out / CARD).read_text()


def test_no_word_of_the_server_is_markup_in_the_card(one, tmp_path):
    named = dataclasses.replace(one.offer, run="`](http://x)")
    keeper(tmp_path / "out", one.session, named, one.proxy, overwrite=False)(1, one.tensors)
    title = (tmp_path / "out" / CARD).read_text().split("# ", 1)[1].splitlines()[0]
    assert title.count("`") == 2
