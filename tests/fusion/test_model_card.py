import re

import pytest
from huggingface_hub import ModelCard

from fedproxy.artifacts import Manifest
from fedproxy.errors import ArtifactError
from fedproxy.fusion import fuse
from fedproxy.fusion.model_card import CARD, add_scores, write_card
from tests.fusion.test_fuse import make_adapter

MANIFEST = Manifest(
    "llm-adapter",
    "ab" * 32,
    12,
    [0, 1, 2, 11],
    settings={
        "train": {"epochs": 1.0, "lora_r": 16, "lora_targets": ["q_proj", "v_proj"], "secret": "/home/owner"},
        "federate": {"rounds": 3, "merge": "h-ties", "regulariser": "pcr"},
        "scale": 0.5,
    },
    seed=7,
)
EVALUATION = {
    "llm": {"tasks": {"intents": {"acc": 0.25, "n": 150}}, "average": 0.25},
    "fused": {"tasks": {"intents": {"acc": 0.75, "n": 150}, "new": {"exact_match": 0.5, "n": 8}}, "average": 0.625},
}


def card_of(folder, **changes):
    write_card(folder, MANIFEST, **{"base_model": None, "auto_class": "AutoModelForCausalLM", **changes})
    return ModelCard.load(folder / CARD)


def test_a_card_says_what_it_is_made_of(tmp_path):
    card = card_of(tmp_path, base_model="org/llm")
    assert card.data.to_dict() == {
        "base_model": "org/llm",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "license": "other",
        "license_name": "to-be-set-by-the-owner",
        "pipeline_tag": "text-generation",
        "tags": ["fedproxy", "federated-learning", "lora"],
    }
    for text in ("| [federate] merge | h-ties |", "| [train] lora_r | 16 |", "| seed | 7 |", "0, 1, 2, 11", "of 12"):
        assert text in card.text
    assert "License: to be set by the owner" in card.text
    assert "threat_model.md" in card.text
    assert "/home/owner" not in card.content


def test_scores_are_added_once_and_the_owners_words_stay(tmp_path):
    path = tmp_path / CARD
    card_of(tmp_path)
    path.write_text(path.read_text().replace("license: other", "license: apache-2.0").replace("# Tuned", "# My tuned"))
    add_scores(tmp_path, EVALUATION)
    first = path.read_text()
    add_scores(tmp_path, EVALUATION)
    assert path.read_text() == first
    card = ModelCard.load(path)
    assert card.data.license == "apache-2.0"
    assert "# My tuned LLM" in card.text
    assert "| intents | acc | 150 | 0.2500 | 0.7500 |" in card.text
    assert "| new | exact\\_match | 8 | – | 0.5000 |" in card.text
    assert "Not evaluated" not in card.text
    found = [(result.dataset_name, result.metric_type, result.metric_value) for result in card.data.eval_results]
    assert found == [("intents", "accuracy", 0.75), ("new", "exact_match", 0.5)]


def test_hostile_names_stay_in_their_cell(tmp_path):
    card_of(tmp_path)
    task = "a | b\n---\n<script>`x`: {1}"
    add_scores(tmp_path, {"fused": {"tasks": {task: {"acc": 1.0, "n": 1}}, "average": 1.0}})
    card = ModelCard.load(tmp_path / CARD)
    assert card.data.eval_results[0].dataset_name == task
    assert r"| a \| b --- \<script\>\`x\`: {1} | acc | 1 | – | 1.0000 |" in card.text


def test_no_card_no_scores_and_a_broken_card(tmp_path):
    add_scores(tmp_path, EVALUATION)
    assert not (tmp_path / CARD).exists()
    card_of(tmp_path)
    before = (tmp_path / CARD).read_text()
    add_scores(tmp_path, {"llm": EVALUATION["llm"]})
    assert (tmp_path / CARD).read_text() == before
    (tmp_path / CARD).write_text("---\n- a list\n---\n")
    with pytest.raises(ArtifactError, match="is no model card"):
        add_scores(tmp_path, EVALUATION)


@pytest.mark.parametrize("form", ["adapter", "checkpoint"])
def test_what_is_fused_has_a_card_whose_code_loads_it(tmp_path, tiny_checkpoint, form):
    llm = tiny_checkpoint("llama")
    _, adapter = make_adapter(llm, tmp_path / "adapter")
    out = fuse(llm, adapter, tmp_path / "out", form=form)
    content = (out / CARD).read_text()
    assert str(tmp_path) not in content
    assert str(llm) not in content
    assert Manifest.read(out).llm_sha256 in content
    code = re.search("```python\n(.*?)```", content, re.DOTALL)[1]
    names = {"LLM": str(llm)}
    if form == "checkpoint":
        code = code.replace('tokenizer = AutoTokenizer.from_pretrained("THIS_DIRECTORY")', "")
    exec(code.replace("THIS_DIRECTORY", str(out)), names)
    assert names["model"].config.num_hidden_layers == 6
