"""Tokenizers as users bring them: what is trained and scored is the same text, whatever they add to it."""

import copy
import json
import logging

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fedproxy.data import read_objects, read_rows
from fedproxy.errors import ArtifactError
from fedproxy.evaluation.library import harness_module
from fedproxy.models import encoding
from fedproxy.models.checkpoints import load_tokenizer
from fedproxy.models.encoding import encode
from fedproxy.models.text_batches import batches
from fedproxy.models.tokens import prepare, text_ids
from fedproxy.public_text import read_documents

MERGES = [("e", "d"), ("s", "ed")]
SPECIAL = ["<s>", "</s>", "<turn>"]


def make(single="<s> $A", **settings):
    """A tokenizer of bytes in which "s" + "ed" merge, with a post-processor of one's own."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *alphabet, "ed", "sed"])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=MERGES))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(SPECIAL)
    if single:
        core.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 0), ("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", **settings)


PLAIN, SIZE = make(), len(make())


@pytest.fixture(scope="module")
def scorer():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=SIZE, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(config).eval()
    return lambda tokenizer: harness_module("fedproxy.evaluation.scorer").Scorer(model, tokenizer, 4)


def scores(scorer, pairs):
    return scorer._loglikelihood_tokens([(pair, *scorer._encode_pair(*pair)) for pair in pairs])


@pytest.mark.parametrize("single", ["<s> $A </s>", "$A </s>", "<s> $A </s> </s>"])
def test_an_end_that_the_tokenizer_adds_changes_neither_training_nor_scores(scorer, single):
    ending, plain = prepare(make(single), SIZE), prepare(make(single.replace(" </s>", "")), SIZE)
    rows = [{"prompt": "Is it red?", "completion": " yes"}, {"text": "It is red."}]
    for row in rows:
        (found,), (expected,) = (encode([row], tokenizer, max_length=64) for tokenizer in (ending, plain))
        assert (list(found.ids), found.start) == (list(expected.ids), expected.start)
    pairs = [("Is it red?", " yes"), ("Is it red?", " no")]
    assert scores(scorer(ending), pairs) == scores(scorer(plain), pairs)
    assert ending("Is it red?")["input_ids"] == plain("Is it red?")["input_ids"]  # what generation begins from
    (found,), (expected,) = (batches(one, ["red " * 40], max_length=9, batch_size=1) for one in (ending, plain))
    assert torch.equal(found.input_ids, expected.input_ids)


def test_an_option_that_melts_into_the_prompt_is_encoded_by_itself(scorer):
    tokenizer = prepare(make(), SIZE)
    melting = scorer(tokenizer)
    context, option = melting._encode_pair("it is us", "ed")
    assert (context, option) == (tokenizer("it is us")["input_ids"], [tokenizer.convert_tokens_to_ids("ed")])
    ((value, _),) = scores(melting, [("it is us", "ed")])
    assert -float("inf") < value < 0
    (trained,) = encode([{"prompt": "it is us", "completion": "ed"}], tokenizer, max_length=64)
    assert list(trained.ids) == [*context, *option, tokenizer.eos_token_id]
    assert trained.start == len(context)
    with pytest.raises(ArtifactError, match="it is us"):
        melting._encode_pair("it is us", "")


@pytest.mark.parametrize("text", ["<s>Is it red?", "<s> Is it red?"])
def test_there_is_one_begin_of_text(scorer, text):
    tokenizer = prepare(make(), SIZE)
    begin = tokenizer.bos_token_id
    (trained,) = encode([{"prompt": text, "completion": " yes"}], tokenizer, max_length=64)
    context, _ = scorer(tokenizer)._encode_pair(text, " yes")
    assert list(trained.ids)[: trained.start] == context
    for ids in (context, *text_ids(tokenizer, [text, "Is it red?"])):
        assert ids.count(begin) == 1
        assert ids[0] == begin


def test_tokens_beyond_the_embedding_are_refused_where_they_are_used(tmp_path, scorer):
    added = make()
    added.add_tokens(["<tool>"])
    prepare(added, SIZE)
    assert encode([{"prompt": "a", "completion": " b"}], added, max_length=8)
    for use in (
        lambda: encode([{"prompt": "a", "completion": " <tool>"}], added, max_length=8),
        lambda: batches(added, ["a <tool>"], max_length=8, batch_size=1),
        lambda: scorer(copy.deepcopy(added))._encode_pair("a", " <tool>"),
    ):
        with pytest.raises(ArtifactError, match=rf"'<tool>'.*{SIZE}"):
            use()
    with pytest.raises(ArtifactError, match="'<pad>'"):
        prepare(make(pad_token="<pad>"), SIZE)
    make(pad_token="<pad>").save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": SIZE}))
    with pytest.raises(ArtifactError, match="'<pad>'"):
        load_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": SIZE + 64}))
    assert load_tokenizer(tmp_path).pad_token == "<pad>"


TOOLS = (
    "{% for t in tools or [] %}[{{ t.name }}]{% endfor %}{% for m in messages %}{{ m.role }}:{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}({{ c.function.arguments.city }}){% endfor %}END"
    "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


def call(arguments):
    return {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": arguments}]}


def test_tools_and_calls_are_rendered_as_transformers_renders_them(tmp_path):
    tokenizer = prepare(make(chat_template=TOOLS.replace("END", "</s>")), SIZE)
    tools = [{"name": "weather"}]
    asked = {"role": "user", "content": "Rain in Ulm?"}
    given = {"name": "weather", "arguments": json.dumps({"city": "Ulm"})}
    bare = {"role": "assistant", "tool_calls": [{"type": "function", "function": given}]}
    (tmp_path / "a.jsonl").write_text(
        "\n".join(
            json.dumps(row)
            for row in (
                {"messages": [asked, call(given)], "tools": tools},
                {"messages": [asked, bare], "tools": json.dumps(tools)},
                {"prompt": [asked], "completion": [call(given)], "tools": tools},
            )
        )
    )
    rows = read_rows(tmp_path / "a.jsonl")
    parsed = [asked, call({"name": "weather", "arguments": {"city": "Ulm"}})]
    expected = tokenizer.apply_chat_template(parsed, tools=tools, return_dict=False)
    begun = tokenizer.apply_chat_template(parsed[:1], tools=tools, add_generation_prompt=True, return_dict=False)
    for example in encode(rows, tokenizer, max_length=999):
        assert list(example.ids) == expected
        assert example.start == len(begun)


@pytest.mark.parametrize(
    "message",
    [
        call({"name": "w", "arguments": "{"}),
        {"role": "assistant", "content": None},
        {"role": "assistant", "content": "", "tool_calls": []},
        {"role": "assistant", "content": "x", "tool_calls": "w"},
    ],
)
def test_a_call_that_is_none_is_refused_by_its_line(tmp_path, message):
    fine = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    bad = {"messages": [{"role": "user", "content": "a"}, message]}
    (tmp_path / "a.jsonl").write_text(f"{json.dumps(fine)}\n{json.dumps(bad)}\n")
    with pytest.raises(ArtifactError, match=r"a\.jsonl, line 2"):
        read_rows(tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    ("end", "generation", "told"),
    [("<turn>", None, True), ("</s>", None, False), ("<turn>", {"eos_token_id": [1, 2]}, False), (" .", None, True)],
)
def test_a_turn_that_ends_where_the_model_does_not_stop_is_told(tmp_path, caplog, end, generation, told):
    encoding._warn_of_end.cache_clear()
    make(chat_template=TOOLS.replace("END", end)).save_pretrained(tmp_path)
    if generation:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    caplog.set_level(logging.WARNING)
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 2
    encode(rows, load_tokenizer(tmp_path), max_length=99)
    found = [record.getMessage() for record in caplog.records]
    assert len(found) == told
    if told:
        assert "</s>" in found[0]
        assert end != "<turn>" or "<turn>" in found[0]


@pytest.mark.parametrize("content", [r'{"text": "\ud800"}', "[" * 100_000, '{"text": ' + "[" * 100_000])
def test_what_is_no_text_is_refused_by_its_line(tmp_path, content):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n' + content + "\n")
    for read in (read_documents, read_objects, read_rows):
        with pytest.raises(ArtifactError, match=r"a\.jsonl, line 2"):
            read(path)
