"""fedproxy as a library: models, state dicts, texts and rows in memory, and federations with a loop of their own."""

import contextlib
import json
import resource
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
)

import fedproxy
from fedproxy.aggregation.analyse import conflict_of
from fedproxy.aggregation.merge import merge_round
from fedproxy.artifacts import Manifest
from fedproxy.config import Heal
from fedproxy.data import read_rows
from fedproxy.errors import ArtifactError, FedproxyError, UsageError
from fedproxy.public_text import read_documents
from tests.conftest import FAMILIES, make_model, make_tokenizer
from tests.fusion.test_fuse import make_adapter
from tests.fusion.test_trained_weights import SORTS, trained
from tests.in_memory import skipping
from tests.test_pipeline import write_experiment

IDS = torch.arange(30).reshape(2, 15)
TRAIN = fedproxy.Train(batch_size=4, learning_rate=1e-2, lora_r=2, lora_alpha=4, max_length=32)
TEXTS = [f"Document {i} says that {'very ' * i}little happens." for i in range(8)]
ROWS = [{"prompt": f"say {word}:", "completion": f" {word}"} for word in ("one", "two", "three")]


def logits(model):
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def same(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


@contextlib.contextmanager
def nothing_written(folder: Path):
    """The kernel refuses every byte written to a file."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            (folder / "proof").write_bytes(b"0")
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("regulariser", ["pcr", "none"])
def test_a_loop_of_ones_own_in_memory_ends_in_the_bits_of_the_engine(
    regulariser, tiny_checkpoint, calibration, tmp_path
):
    experiment = write_experiment(tmp_path, tiny_checkpoint(), calibration, extra=f'regulariser = "{regulariser}"\n')
    run = fedproxy.federate(experiment, tmp_path / "run")
    fused = fedproxy.fuse(tiny_checkpoint(), run.adapter, tmp_path / "fused", form="checkpoint")
    data = {name: read_rows(tmp_path / f"{name}.jsonl") for name in ("numbers", "colours")}
    documents, _ = read_documents(calibration)

    llm, tokenizer = make_model(), make_tokenizer()
    before = {name: tensor.clone() for name, tensor in llm.state_dict().items()}
    with nothing_written(tmp_path):
        proxy = fedproxy.compress(llm, tokenizer=tokenizer, calibration=documents, max_length=32)
        model = fedproxy.attach_adapter(proxy.model, TRAIN)
        adapter, conflict = get_peft_model_state_dict(model), None
        for number in (1, 2, 3):
            replies = [
                fedproxy.client_update(
                    model,
                    data[name],
                    adapter,
                    tokenizer=tokenizer,
                    train=TRAIN,
                    client=name,
                    round=number,
                    regulariser=regulariser,
                    strength=1.0,
                    conflict=conflict if regulariser == "pcr" else None,
                )
                for name in sorted(data)
            ]
            merged, levels, _ = merge_round([reply.update for reply in replies], names=sorted(data))
            conflict = conflict_of(levels, len(replies))
            adapter = {name: tensor + merged[name] for name, tensor in adapter.items()}
        same(dict(llm.state_dict()), before)
        whole = fedproxy.fuse(
            llm, adapter, form="checkpoint", layer_map=proxy.layer_map, config=model.peft_config["default"]
        )
    assert [reply.rows for reply in replies] == [len(data[name]) for name in sorted(data)]
    assert replies[0].loss == run.rounds[-1]["clients"]["colours"]["loss"]
    same(adapter, load_file(run.adapter / "adapter_model.safetensors"))
    same(dict(whole.state_dict()), dict(AutoModelForCausalLM.from_pretrained(fused).state_dict()))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_proxy_in_memory_is_the_one_on_disk(family, tiny_checkpoint, calibration, tmp_path):
    written = fedproxy.compress(tiny_checkpoint(family), tmp_path / "proxy", calibration=calibration, max_length=24)
    sheets = []
    llm = make_model(family).train()
    proxy = fedproxy.compress(llm, tokenizer=make_tokenizer(), calibration=TEXTS, max_length=24, on_sheet=sheets.append)
    assert (proxy.layer_map, proxy.scores, proxy.path) == (written.layer_map, written.scores, None)
    with skipping(llm, sorted(set(range(6)) - set(proxy.layer_map))):
        assert torch.equal(logits(proxy.model), logits(llm))
    assert torch.equal(logits(proxy.model), logits(AutoModelForCausalLM.from_pretrained(written.path)))
    exposed = Manifest.read(written.path).settings["exposure"]
    assert {key: sheets[0][key] for key in ("parameters", "share", "perplexity")} == {
        key: exposed[key] for key in ("parameters", "share", "perplexity")
    }
    pointers = {parameter.data_ptr() for parameter in llm.parameters()}
    assert not pointers & {parameter.data_ptr() for parameter in proxy.model.parameters()}


def test_a_path_is_loaded_where_nothing_is_to_be_written(tiny_checkpoint, calibration):
    llm = tiny_checkpoint()
    proxy = fedproxy.compress(llm, calibration=calibration, max_length=24)
    same(
        dict(proxy.model.state_dict()),
        dict(fedproxy.compress(llm, calibration=TEXTS, max_length=24).model.state_dict()),
    )
    model = fedproxy.attach_adapter(proxy.model, TRAIN)
    assert isinstance(fedproxy.fuse(llm, model, layer_map=proxy.layer_map), PeftModel)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "mixtral"])
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_an_adapter_fuses_in_memory_as_on_disk(family, scale, tiny_checkpoint, tmp_path):
    llm = tiny_checkpoint(family, dtype=torch.bfloat16)
    tuned, adapter = make_adapter(llm, tmp_path / "adapter")
    on_disk = fedproxy.fuse(llm, adapter, tmp_path / "a", scale=scale)
    checkpoint = fedproxy.fuse(llm, adapter, tmp_path / "c", scale=scale, form="checkpoint")
    expected = dict(AutoModelForCausalLM.from_pretrained(checkpoint).state_dict())
    state, config = get_peft_model_state_dict(tuned), tuned.peft_config["default"]
    layers = {"layer_map": [1, 2, 5]}
    for given in ((adapter, {}), (tuned, layers), (state, {**layers, "config": config})):
        whole = make_model(family, dtype=torch.bfloat16)
        merged = fedproxy.fuse(whole, given[0], scale=scale, form="checkpoint", **given[1])
        same(dict(merged.state_dict()), expected)
        same(dict(whole.state_dict()), dict(make_model(family, dtype=torch.bfloat16).state_dict()))
        wrapped = fedproxy.fuse(whole, given[0], scale=scale, **given[1])
        same(
            {name: tensor.float() for name, tensor in get_peft_model_state_dict(wrapped).items()},
            load_file(on_disk / "adapter_model.safetensors"),
        )
        assert wrapped.get_base_model() is whole
    again = fedproxy.fuse(llm, tuned, tmp_path / "memory", scale=scale, **layers)
    same(*(load_file(path / "adapter_model.safetensors") for path in (again, on_disk)))
    assert Manifest.read(again).llm_sha256 == Manifest.read(on_disk).llm_sha256


@pytest.mark.parametrize(("family", "options"), SORTS)
def test_trained_weights_fuse_in_memory_as_on_disk(family, options, tiny_checkpoint, tmp_path):
    proxy = fedproxy.compress(make_model(family), score="uniform")
    tuned = trained(proxy.model, **options)
    how = {"form": "checkpoint", "scale": 0.5, "layer_map": proxy.layer_map}
    on_disk = fedproxy.fuse(tiny_checkpoint(family), tuned, tmp_path / "fused", **how)
    merged = fedproxy.fuse(make_model(family), tuned, **how)
    expected = logits(AutoModelForCausalLM.from_pretrained(on_disk))
    assert torch.equal(logits(merged), expected)
    assert not torch.equal(expected, logits(make_model(family)))
    merged.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")), expected)


def test_the_scale_is_chosen_by_text_in_memory(tiny_checkpoint, tmp_path):
    llm, how = tiny_checkpoint(), {"scale": "auto", "public": TEXTS, "samples": 4}
    _, adapter = make_adapter(llm, tmp_path / "adapter")
    manifest = Manifest.read(fedproxy.fuse(llm, adapter, tmp_path / "fused", **how))
    wrapped = fedproxy.fuse(make_model(), adapter, tokenizer=make_tokenizer(), **how)
    expected = load_file(tmp_path / "fused" / "adapter_model.safetensors")
    assert manifest.settings["scale"] != 1.0
    same(dict(get_peft_model_state_dict(wrapped)), expected)


def test_a_model_serves_all_clients_and_holds_the_global_adapter_afterwards():
    model = fedproxy.attach_adapter(make_model(), TRAIN, seed=3)
    held = get_peft_model_state_dict(model)  # PEFT's: the very memory that a training changes
    before = {name: tensor.clone() for name, tensor in held.items()}
    how = {"tokenizer": make_tokenizer(), "train": TRAIN, "round": 1}
    first, other, again = (fedproxy.client_update(model, ROWS, held, client=name, **how) for name in ("a", "b", "a"))
    same(dict(held), before)
    same(first.update, again.update)
    assert any(bool(tensor.any()) for tensor in first.update.values())
    assert not all(torch.equal(tensor, other.update[name]) for name, tensor in first.update.items())


def test_rows_of_a_client_may_lie_in_a_file(tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    model = fedproxy.attach_adapter(make_model(), TRAIN)
    how = {"tokenizer": make_tokenizer(), "train": TRAIN, "client": "a", "round": 1}
    start = get_peft_model_state_dict(model)
    same(*(fedproxy.client_update(model, rows, start, **how).update for rows in (ROWS, tmp_path / "rows.jsonl")))


def adapted():
    return fedproxy.attach_adapter(make_model(), TRAIN)


def start():
    return get_peft_model_state_dict(adapted())


def update(model=adapted, rows=ROWS, adapter=start, **settings):
    how = {"tokenizer": make_tokenizer(), "train": TRAIN, "client": "a", "round": 1, **settings}
    return fedproxy.client_update(model(), rows, adapter(), **how)


def seq2seq():
    sizes = {"vocab_size": 40, "d_model": 16, "d_ff": 16, "num_layers": 2, "num_heads": 2, "d_kv": 8}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))


def blockless():
    return ResNetForImageClassification(ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1]))


def uniform(model, **settings):
    return fedproxy.compress(model, score="uniform", **settings)


LAYERS = {"layer_map": [1, 2, 5]}
WRONG = {
    "a family that cannot be compressed": (lambda: uniform(seq2seq()), ArtifactError, "encoder-decoder"),
    "a model without blocks": (lambda: uniform(blockless()), ArtifactError, "ResNetForImageClassification"),
    "a multimodal model": (lambda: uniform(make_model("gemma3")), ArtifactError, "multimodal"),
    "weights that are elsewhere": (lambda: uniform(make_model().to("meta")), ArtifactError, "memory"),
    "a model with an adapter": (lambda: uniform(adapted()), UsageError, "adapter"),
    "a model whose modules hold one": (lambda: uniform(adapted().get_base_model()), UsageError, "adapter"),
    "no model at all": (lambda: uniform(3), UsageError, "int"),
    "no tokenizer": (lambda: fedproxy.compress(make_model(), calibration=TEXTS), UsageError, "tokenizer"),
    "text that is none": (
        lambda: fedproxy.compress(make_model(), tokenizer=make_tokenizer(), calibration=[3]),
        ArtifactError,
        "list of strings",
    ),
    "healing in memory": (
        lambda: uniform(make_model(), calibration=TEXTS, heal=Heal(steps=1)),
        UsageError,
        "out",
    ),
    "a directory for what is in memory": (lambda: uniform(make_model(), out="proxy"), UsageError, "directory"),
    "an adapter twice": (lambda: fedproxy.attach_adapter(adapted(), TRAIN), UsageError, "adapter"),
    "no adapter to train": (lambda: update(model=make_model), UsageError, "LlamaForCausalLM"),
    "an adapter for another model": (lambda: update(adapter=lambda: {"w": torch.zeros(2)}), ArtifactError, "'w'"),
    "rows of no format": (lambda: update(rows=[{"question": "?"}]), ArtifactError, "row 1"),
    "a row that is none": (lambda: update(rows=["text"]), ArtifactError, "row 1"),
    "an unknown regulariser": (lambda: update(regulariser="pcrr"), UsageError, "pcrr"),
    "a regulariser with a state": (lambda: update(regulariser="scaffold"), UsageError, "scaffold"),
    "a state dict alone": (lambda: fedproxy.fuse(make_model(), start(), **LAYERS), UsageError, "config"),
    "an adapter without its map": (lambda: fedproxy.fuse(make_model(), adapted()), UsageError, "layer_map"),
    "blocks that the LLM lacks": (
        lambda: fedproxy.fuse(make_model(), adapted(), layer_map=[0, 1, 2, 3, 4, 6]),
        UsageError,
        "6]",
    ),
    "more blocks than the map has": (
        lambda: fedproxy.fuse(make_model(), adapted(), **LAYERS),
        ArtifactError,
        "block 3",
    ),
    "an adapter of another width": (
        lambda: fedproxy.fuse(make_model(hidden_size=16), adapted(), layer_map=list(range(6))),
        ArtifactError,
        "16",
    ),
    "a scale by text without a tokenizer": (
        lambda: fedproxy.fuse(make_model(), adapted(), layer_map=list(range(6)), scale="auto", public=TEXTS),
        UsageError,
        "tokenizer",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_meant_is_refused_in_one_paragraph(case):
    call, kind, named = WRONG[case]
    with pytest.raises(FedproxyError) as caught:
        call()
    assert type(caught.value) is kind, caught.value
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_adapter_on_disk_says_its_map_itself(tiny_checkpoint, tmp_path):
    _, adapter = make_adapter(tiny_checkpoint(), tmp_path / "adapter")
    with pytest.raises(UsageError, match="layer_map"):
        fedproxy.fuse(make_model(), adapter, **LAYERS)
    with pytest.raises(ArtifactError, match="4 blocks"):
        fedproxy.fuse(make_model(num_hidden_layers=4), adapter)
    with pytest.raises(ArtifactError, match="another LLM"):
        fedproxy.fuse(tiny_checkpoint(seed=1), adapter)


def test_a_value_that_overflows_is_refused():
    tuned = trained(fedproxy.compress(make_model(dtype=torch.float16), score="uniform").model.float())
    state = {name: 300 * torch.ones_like(tensor) for name, tensor in get_peft_model_state_dict(tuned).items()}
    set_peft_model_state_dict(tuned, state)
    with pytest.raises(ArtifactError, match="infinity"):
        fedproxy.fuse(make_model(dtype=torch.float16), tuned, form="checkpoint", layer_map=[0, 2, 4])
