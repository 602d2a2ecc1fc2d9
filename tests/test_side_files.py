import copy
import json

import pytest
from transformers import CONFIG_MAPPING

from fedproxy.side_files import cleaned, is_settings
from tests.conftest import FAMILIES, MULTIMODAL, make_model, make_tokenizer

STRANGERS = (
    *("training_args.bin", "optimizer.pt", "notes.txt", ".env", "trainer_state.json", "id_rsa", "rows.jsonl"),
    *("tokenizer_notes.txt", "my_vocab_notes.txt", "my_vocab.json", "own.model", "tokenizer.json.bak", "README.md"),
    *("data_config.json", "preprocessor_config.json", "model-00009-of-00009.safetensors", "adapter_model.safetensors"),
)
"""Files that may lie beside a checkpoint and stay there."""
PLACES = (
    *(
        "/home/ann/llm",
        "/",
        "../ann",
        "data/ann.jsonl",
        "~/ann",
        "./ann",
        "C:\\\\ann\\\\llm",
        "file:///home/ann",
        "//nas/ann",
    ),
    *("org/llm", "made of /home/ann", '["/home/ann"]', "s3://ann/llm"),
)
SETTINGS = ["config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json"]


def places(value):
    """Every object and list within a value."""
    if isinstance(value, dict | list):
        yield value
        for entry in value.values() if isinstance(value, dict) else value:
            yield from places(entry)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", SETTINGS)
def test_no_path_leaves_under_any_key(name, place):
    record = {"a": 1, "list": [1, [2]], "table": {"deep": [{"b": None}]}, "word": "sdpa"}
    count = len(list(places(record)))
    for number in range(count):
        planted = copy.deepcopy(record)
        spot = list(places(planted))[number]
        for value in (place, [place], {"x": place}, {place: 1}, [[1, place]]):
            spot.append(value) if isinstance(spot, list) else spot.update({"some_key": value, place: 2})
        found = cleaned(name, planted)
        assert json.dumps(place)[1:-1] not in json.dumps(found)
        assert found["a"] == 1
        assert found["word"] == "sdpa"


@pytest.mark.parametrize("key", ["_name_or_path", "vocab_file", "cache_dir", "token", "use_auth_token"])
@pytest.mark.parametrize("name", SETTINGS)
def test_what_names_a_place_or_gives_access_stays_though_it_is_one_word(name, key):
    assert cleaned(name, {key: "ann", "text_config": {key: "ann"}}) == {"text_config": {}}


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_kernels_of_the_hub_stay_and_those_of_transformers_leave(key):
    assert cleaned("config.json", {key: "kernels-community/flash-attn"}) == {}
    assert cleaned("config.json", {key: "flash_attention_2"}) == {key: "flash_attention_2"}


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_code_beside_the_checkpoint_is_named_and_code_of_the_hub_is_not(name):
    own = {"AutoConfig": "own.OwnConfig", "AutoTokenizer": ["own.Slow", None]}
    hub = {"AutoModel": "org/llm--own.OwnModel", "AutoProcessor": "gpt2--own.Own", "AutoImage": ["org/llm--a.B", None]}
    assert cleaned(name, {"auto_map": own | hub}) == {"auto_map": own}


@pytest.mark.parametrize("record", [None, [], ["/home/ann"], "/home/ann", 5])
@pytest.mark.parametrize("name", SETTINGS)
def test_what_is_no_object_leaves_as_an_empty_one(name, record):
    assert cleaned(name, record) == {}


@pytest.mark.parametrize("family", FAMILIES | MULTIMODAL)
def test_every_setting_of_a_family_leaves(family, tmp_path):
    make_model(family).save_pretrained(tmp_path)
    for name in ("config.json", "generation_config.json"):
        record = json.loads((tmp_path / name).read_text())
        assert cleaned(name, record) == record


def test_texts_of_tokens_and_templates_leave_as_they_are(tmp_path):
    tokenizer = make_tokenizer()
    tokens = ["</s>", "/think", "//", "C:\\", "~/x"]
    tokenizer.add_tokens(tokens)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<a/b>", "[/INST]"], "sep_token": "a/b/c"})
    tokenizer.chat_template = {"default": "{{ '/a/b' }}", "tool": "</tool>"}
    tokenizer.save_pretrained(tmp_path, save_jinja_files=False)
    record = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert "/a/b" in json.dumps(record)
    assert cleaned("tokenizer_config.json", record | {"vocab_file": "/a/b"}) == record
    assert cleaned("generation_config.json", {"stop_strings": ["</s>"]}) == {"stop_strings": ["</s>"]}


def test_which_files_hold_settings():
    assert all(map(is_settings, SETTINGS))
    assert not any(map(is_settings, ("tokenizer.json", "vocab.json", "added_tokens.json", "merges.txt", *STRANGERS)))


@pytest.mark.slow
def test_every_setting_that_transformers_knows_leaves():
    """But rag's separators and paths, no default of any configuration is a text that is no word."""
    checked = 0
    for kind, config in CONFIG_MAPPING.items():
        try:
            text = config().to_json_string(use_diff=False)
        except Exception:  # one that has no defaults
            continue
        record = json.loads(text, object_hook=lambda found: {k: v for k, v in found.items() if k != "_name_or_path"})
        assert kind == "rag" or cleaned("config.json", record) == record, kind
        checked += 1
    assert checked > 300
