"""All turns of the assistant count: where a chat template marks them, and where only its rendering tells."""

import json

import pytest
import torch

from fedproxy.config import Train
from fedproxy.errors import ArtifactError, UsageError
from fedproxy.models.encoding import Encoded, encode, training_examples
from fedproxy.models.layouts import IGNORED, collate, pack
from tests.conftest import make_tokenizer

CALLS = "{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}"
HEAD = "{% if tools %}<tools>{{ tools | tojson }}</tools>\n{% endif %}"
ASKED = "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
PLAIN = (
    HEAD + "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content or '' }}" + CALLS + "<|end|>\n{% endfor %}" + ASKED
)
MARKED = (
    HEAD + "{% for m in messages %}<|{{ m.role }}|>\n{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content or '' }}" + CALLS + "<|end|>{% endgeneration %}{% else %}{{ m.content or '' }}<|end|>{% endif %}\n"
    "{% endfor %}" + ASKED
)
TOOLS = [
    {
        "type": "function",
        "function": {"name": "rain", "parameters": {"type": "object", "properties": {"at": {"type": "string"}}}},
    }
]
TALK = [
    {"role": "system", "content": "Be bríef."},
    {"role": "user", "content": "Rain in Ulm?"},
    {
        "role": "assistant",
        "tool_calls": [{"type": "function", "function": {"name": "rain", "arguments": {"at": "Ulm"}}}],
    },
    {"role": "tool", "name": "rain", "content": "wet"},
    {"role": "assistant", "content": "Yes — 雨."},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "Sure."},
]
ROW = {"messages": TALK, "tools": TOOLS}
SAID = ['<call>{"name": "rain", "arguments": {"at": "Ulm"}}</call><|end|>', "Yes — 雨.<|end|>", "Sure.<|end|>"]


def tokenizer_of(template):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def counted(example, tokenizer):
    return [tokenizer.decode(list(ids)) for ids, counts in example.parts() if counts]


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_tokens_are_those_of_transformers_and_what_counts_is_what_the_assistant_said(template):
    tokenizer = tokenizer_of(template)
    expected = tokenizer.apply_chat_template(TALK, tools=TOOLS, return_dict=False)
    [last] = encode([ROW], tokenizer, max_length=9999)
    [every] = encode([ROW], tokenizer, max_length=9999, assistant_only=True)
    assert last.ids.tolist() == every.ids.tolist() == expected
    assert [text.strip() for text in counted(every, tokenizer)] == SAID
    assert [text.strip() for text in counted(last, tokenizer)] == SAID[-1:]
    assert every.counting == sum(len(ids) for ids, counts in every.parts() if counts)
    assert [token for ids, _ in every.parts() for token in ids] == expected


def test_marks_in_the_template_are_taken_as_transformers_takes_them():
    tokenizer = tokenizer_of(MARKED)
    found = tokenizer.apply_chat_template(TALK, tools=TOOLS, return_dict=True, return_assistant_tokens_mask=True)
    [example] = encode([ROW], tokenizer, max_length=9999, assistant_only=True)
    assert [int(counts) for ids, counts in example.parts() for _ in ids] == found["assistant_masks"]


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_of_a_single_answer_the_same_counts_either_way(template):
    tokenizer = tokenizer_of(template)
    row = {"messages": TALK[1:2] + TALK[-1:]}
    [last] = encode([row], tokenizer, max_length=9999)
    [every] = encode([row], tokenizer, max_length=9999, assistant_only=True)
    assert [text.strip() for text in counted(last, tokenizer)] == [text.strip() for text in counted(every, tokenizer)]
    if template is PLAIN:
        assert last == every


def test_a_template_that_ends_the_conversation_once_is_read_all_the_same():
    tokenizer = tokenizer_of(PLAIN.replace(ASKED, ASKED.replace("{% endif %}", "{% else %}</s>{% endif %}")))
    [example] = encode([ROW], tokenizer, max_length=9999, assistant_only=True)
    assert [text.strip() for text in counted(example, tokenizer)] == [*SAID[:2], SAID[2] + "\n</s>"]


def test_a_template_that_renders_earlier_turns_in_another_way_is_refused_by_the_turn():
    """As those of thinking models, which leave out the thoughts of earlier turns."""
    thinking = PLAIN.replace("{{ m.content or '' }}", "{% if loop.last %}<think>{% endif %}{{ m.content or '' }}")
    with pytest.raises(UsageError, match=r"message 3\b.*generation"):
        encode([ROW], tokenizer_of(thinking), max_length=9999, assistant_only=True)


def test_rows_without_messages_are_as_before_and_a_refused_row_is_named():
    tokenizer = tokenizer_of(PLAIN + "{% if messages[0].content == 'no' %}{{ raise_exception('no') }}{% endif %}")
    rows = [{"prompt": "a", "completion": "b"}, {"text": "c"}]
    assert encode(rows, tokenizer, max_length=9, assistant_only=True) == encode(rows, tokenizer, max_length=9)
    bad = {"messages": [{"role": "user", "content": "no"}, TALK[-1]]}
    with pytest.raises(ArtifactError, match=r"Row 3\b"):
        encode([*rows, bad], tokenizer, max_length=9999, assistant_only=True)
    with pytest.raises(UsageError, match="chat template"):
        encode([ROW], make_tokenizer(), max_length=9999, assistant_only=True)


@pytest.mark.parametrize("longest", [2, 40, 90, 110, 150, 180])
def test_long_conversations_lose_their_beginning_before_the_first_answer_and_then_their_end(longest):
    tokenizer = tokenizer_of(PLAIN)
    [whole] = encode([{"messages": TALK}], tokenizer, max_length=9999, assistant_only=True)
    [cut] = encode([{"messages": TALK}], tokenizer, max_length=longest, assistant_only=True)
    gone = min(whole.start, len(whole.ids) - longest)
    mask = [counts for ids, counts in whole.parts() for _ in ids][gone:][:longest]
    assert cut.cut
    assert cut.ids == whole.ids[gone:][:longest]
    assert [counts for ids, counts in cut.parts() for _ in ids] == [False, *mask[1:]]


@pytest.mark.parametrize("layout", [collate, pack])
def test_labels_are_the_tokens_that_count_alone(layout):
    example = Encoded([5, 6, 7, 8, 9, 10], 1, gaps=((2, 4), (5, 6)))
    batch = layout([Encoded([1, 2, 3, 4, 5, 6], 3), example], 0)
    assert sorted(batch["labels"].tolist()) == sorted(
        [[IGNORED] * 3 + [4, 5, 6], [IGNORED, 6, IGNORED, IGNORED, 9, IGNORED]]
    )
    assert example.counting == 2
    assert batch["labels"].dtype == torch.int64


def test_the_table_train_says_which_count():
    tokenizer = tokenizer_of(PLAIN)
    [one] = training_examples([ROW], tokenizer, Train(assistant_only_loss=True), 9999)
    assert [one] == encode([json.loads(json.dumps(ROW))], tokenizer, max_length=9999, assistant_only=True)
    [all_] = training_examples([ROW], tokenizer, Train(completion_only_loss=False), 9999)
    assert (all_.start, all_.gaps) == (1, ())
