"""FedBiOT's alignment in whole runs: it changes the emulator, and nothing else."""

import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import fedproxy
from fedproxy.artifacts import Manifest
from fedproxy.compression import heal_loss, realign
from fedproxy.compression.heal_student import leaving
from fedproxy.compression.realign import Realigner, emulator_blocks
from fedproxy.config import Heal
from fedproxy.errors import UsageError
from fedproxy.layer_map import split_name
from fedproxy.models.families import blocks, keep_blocks
from fedproxy.models.lora import adapter_state, attach, train_only
from fedproxy.pipeline import prepare, read_experiment
from tests.conftest import BLOCKS, make_model, make_tokenizer
from tests.test_pipeline import adapter_bytes, write_experiment


@pytest.fixture
def make(tmp_path, tiny_checkpoint, calibration):
    def write(realign=2, blocks="[-1]"):
        extra = 'merge = "mean"\nregulariser = "none"\n[heal]\nbatch_size = 2\nmax_length = 16\n'
        extra += f"realign_steps = {realign}\n"
        path = write_experiment(tmp_path, tiny_checkpoint(), calibration, extra=extra)
        path.write_text(path.read_text().replace("[train]\n", f"[train]\nblocks = {blocks}\n"))
        return path

    return write


def blocks_of(file):
    return {split_name(name)[1] for name in load_file(file)}


def test_the_alignment_changes_only_the_emulator(make, tmp_path):
    fedproxy.federate(make(), tmp_path / "run")
    run = tmp_path / "run"
    assert sorted(path.name for path in (run / "alignment").iterdir()) == ["0002.safetensors", "0003.safetensors"]
    assert blocks_of(run / "alignment" / "0003.safetensors") == {0, 1}
    assert blocks_of(run / "rounds" / "0003" / "adapter.safetensors") == {2}
    assert blocks_of(run / "adapter" / "adapter_model.safetensors") == {2}
    whole = load_file(run / "aligned" / "adapter_model.safetensors")
    parts = load_file(run / "adapter" / "adapter_model.safetensors") | load_file(run / "alignment" / "0003.safetensors")
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert any(tensor.any() for name, tensor in whole.items() if ".lora_B." in name and split_name(name)[1] != 2)
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(run / "proxy"), run / "aligned")
    fedproxy.fuse(read_experiment(make()).llm.path, run / "adapter", tmp_path / "fused")
    assert blocks_of(tmp_path / "fused" / "adapter_model.safetensors") == {Manifest.read(run / "proxy").layer_map[2]}


def test_the_first_round_is_that_without_alignment_and_the_next_is_not(make, tmp_path):
    fedproxy.federate(make(), tmp_path / "with")
    fedproxy.federate(make(realign=0), tmp_path / "without")
    files = [
        [tmp_path / run / "rounds" / number / "adapter.safetensors" for run in ("with", "without")]
        for number in ("0001", "0002")
    ]
    assert not (tmp_path / "without" / "aligned").exists()
    assert files[0][0].read_bytes() == files[0][1].read_bytes()
    assert files[1][0].read_bytes() != files[1][1].read_bytes()


def test_aligning_brings_the_proxy_nearer_to_the_llm(make, tmp_path):
    experiment = make(realign=60)
    experiment.write_text(experiment.read_text().replace("rounds = 3", "rounds = 2"))
    fedproxy.federate(experiment, tmp_path / "run")
    run = tmp_path / "run"
    llm = AutoModelForCausalLM.from_pretrained(read_experiment(experiment).llm.path)
    ids = torch.tensor([list(b"Document 3 says ")])

    def divergence(adapter):
        proxy = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(run / "proxy"), adapter)
        with torch.no_grad():
            said, own = (model(ids).logits.log_softmax(-1) for model in (llm, proxy))
        return float((said.exp() * (said - own)).sum(-1).mean())

    assert divergence(run / "aligned") < divergence(run / "adapter")


def test_a_block_is_aligned_to_what_enters_the_llm_block_that_the_next_one_is(tmp_path, monkeypatch):
    """As FedBiOT aligns what leaves the emulator to what enters the adapter; the last block to what leaves the LLM."""
    layer_map, owned, text = [0, 3, 4], [1], "Little happens."
    llm = attach(make_model(), r=2, alpha=4, dropout=0.0, layers=[3], seed=0)
    proxy = attach(keep_blocks(make_model(), layer_map), r=2, alpha=4, dropout=0.0, seed=0)
    fresh = {name: tensor for name, tensor in adapter_state(proxy).items() if split_name(name)[1] in owned}
    train_only(proxy, lambda name: name in fresh)
    aligner = Realigner(
        llm,
        proxy,
        layer_map=layer_map,
        owned=owned,
        settings=Heal(realign_steps=1, max_length=32),
        documents=[text],
        tokenizer=make_tokenizer(),
        seed=0,
        folder=tmp_path,
    )
    base = llm.get_base_model()
    with torch.no_grad(), leaving(blocks(base), range(BLOCKS)) as states:
        base(torch.tensor([make_tokenizer()(text)["input_ids"]]), use_cache=False)
    seen = []
    monkeypatch.setattr(
        realign, "hidden_distance", lambda said, own: seen.append(said) or heal_loss.hidden_distance(said, own)
    )
    aligner.before(2, fresh)
    nearest = [min(range(BLOCKS), key=lambda block: float((states[block][0] - said).norm())) for said in seen]
    assert nearest == [layer_map[1] - 1, BLOCKS - 1]


@pytest.mark.parametrize(
    "left", [("rounds/0002",), ("rounds/0003",), ("rounds/0003", "alignment/0003.safetensors"), ()]
)
def test_resumed_after_any_step_it_ends_in_the_same_bits(make, tmp_path, left):
    experiment = make()
    whole, run = tmp_path / "whole", tmp_path / "run"
    fedproxy.federate(experiment, whole)
    shutil.copytree(whole, run)
    shutil.rmtree(run / "aligned")
    for name in left and ("adapter", *left, "rounds/0003"):
        path = run / name
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() or not path.exists() else path.unlink()
    if left == ("rounds/0002",):
        (run / "alignment" / "0003.safetensors").unlink()
    fedproxy.federate(experiment, run, resume=True)
    assert adapter_bytes(run) == adapter_bytes(whole)
    assert (run / "aligned" / "adapter_model.safetensors").read_bytes() == (
        whole / "aligned" / "adapter_model.safetensors"
    ).read_bytes()


def test_an_alignment_that_diverges_blames_the_learning_rate(make, tmp_path):
    path = make()
    path.write_text(path.read_text().replace("[heal]\n", "[heal]\nlearning_rate = 1e30\n"))
    with pytest.raises(UsageError, match=r"round 2.*nan.*learning_rate"):
        fedproxy.federate(path, tmp_path / "run")


def test_what_cannot_be_aligned_is_refused(make, tmp_path):
    with pytest.raises(UsageError, match="they train all"):
        fedproxy.federate(make(blocks='"all"'), tmp_path / "run")
    with pytest.raises(UsageError, match="inline"), prepare(make(), tmp_path / "other"):
        pass
    assert not (tmp_path / "other").exists()
    assert emulator_blocks(4, [3, 0]) == [1, 2]
