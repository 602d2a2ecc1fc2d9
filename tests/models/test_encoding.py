import json
from array import array
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fedproxy
from fedproxy.errors import ArtifactError, UsageError
from fedproxy.models import encoding
from fedproxy.models.checkpoints import load_tokenizer
from fedproxy.models.encoding import Encoded, encode, prompt_of
from tests.conftest import make_tokenizer

TOKENIZER = make_tokenizer()
EOS = TOKENIZER.eos_token_id
DEMO = Path(fedproxy.__file__).parent / "demo"


def ids(text):
    return TOKENIZER(text)["input_ids"]


def example(ids, start, cut=False):
    return Encoded(array("i", ids), start, cut)


def test_loss_counts_from_the_completion_and_the_text_ends():
    [found] = encode([{"prompt": "ab", "completion": " c"}], TOKENIZER, max_length=16)
    assert found == example([*ids("ab c"), EOS], 2)


def test_trailing_spaces_of_the_prompt_belong_to_the_completion():
    assert encode([{"prompt": "ab ", "completion": "c"}], TOKENIZER, max_length=16) == encode(
        [{"prompt": "ab", "completion": " c"}], TOKENIZER, max_length=16
    )


def test_text_rows_and_whole_rows_learn_every_token_but_the_first():
    assert encode([{"text": "abc"}], TOKENIZER, max_length=16) == [example([*ids("abc"), EOS], 1)]
    row = {"prompt": "a", "completion": "bc"}
    assert encode([row], TOKENIZER, max_length=16, completion_only=False) == [example([*ids("abc"), EOS], 1)]


def test_long_prompts_lose_their_beginning_and_long_completions_their_end():
    [found] = encode([{"prompt": "abcdef", "completion": "gh"}], TOKENIZER, max_length=5)
    assert found == example([*ids("efgh"), EOS], 2, cut=True)
    [found] = encode([{"prompt": "ab", "completion": "cdefgh"}], TOKENIZER, max_length=4)
    assert found == example(ids("cdef"), 1, cut=True)


def test_messages_go_through_the_chat_template():
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    with pytest.raises(UsageError, match="chat template"):
        encode([row], TOKENIZER, max_length=64)
    chat = make_tokenizer()
    chat.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }};{% endfor %}"
    chat.chat_template += "{% if add_generation_prompt %}[assistant]{% endif %}"
    [found] = encode([row], chat, max_length=64)
    assert found == example(ids("[user]a;[assistant]b;"), len("[user]a;[assistant]"))


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "say red: ", "completion": "red"},
        {"messages": [{"role": "user", "content": "say red"}, {"role": "assistant", "content": "red"}]},
    ],
)
def test_a_prompt_as_text_is_what_training_begins_with(row):
    chat = make_tokenizer()
    chat.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }};{% endfor %}"
    chat.chat_template += "{% if add_generation_prompt %}[assistant]{% endif %}"
    text, special = prompt_of(row, chat)
    [found] = encode([row], chat, max_length=64)
    assert chat(text, add_special_tokens=special)["input_ids"] == list(found.ids[: found.start])
    assert special is ("prompt" in row)


def test_of_a_text_the_first_words_are_a_prompt():
    text, _ = prompt_of({"text": "one\ntwo " + "more " * 99}, make_tokenizer())
    assert text == "one two" + " more" * 6


def test_a_row_that_the_chat_template_refuses_is_named():
    chat = make_tokenizer()
    chat.chat_template = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}"
    chat.chat_template += "{% endif %}{{ m.content }}{% endfor %}"
    taken = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    refused = {"messages": [{"role": "system", "content": "be kind"}, *taken["messages"]]}
    with pytest.raises(ArtifactError, match=r"Row 3\b.*no system role"):
        encode([taken, taken, refused], chat, max_length=64)


def test_nothing_to_learn_is_an_error():
    with pytest.raises(ArtifactError, match="token"):
        encode([], TOKENIZER, max_length=8)


ROW = st.one_of(
    st.fixed_dictionaries({"text": st.text(min_size=1, max_size=20)}),
    st.fixed_dictionaries({"prompt": st.text(max_size=20), "completion": st.text(min_size=1, max_size=9)}),
    st.fixed_dictionaries(
        {"messages": st.just([{"role": "user", "content": "a "}, {"role": "assistant", "content": " b"}])}
    ),
)


@settings(deadline=None)
@given(st.lists(ROW, min_size=1, max_size=9), st.booleans(), st.integers(2, 12), st.integers(1, 4))
def test_rows_are_encoded_together_as_one_by_one(rows, completion_only, longest, together):
    tokenizer = load_tokenizer(DEMO / "llm")
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }};{% endfor %}"
    tokenizer.chat_template += "{% if add_generation_prompt %}[assistant]{% endif %}"

    def encoded(chosen):
        return encode(chosen, tokenizer, max_length=longest, completion_only=completion_only)

    alone = []
    for row in rows:
        try:
            alone += encoded([row])
        except ArtifactError:
            continue
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "_AT_ONCE", together)
        if alone:
            assert encoded(rows) == alone
        else:
            with pytest.raises(ArtifactError):
                encoded(rows)


def test_real_rows_get_the_tokens_that_the_tokenizer_makes_of_each_alone():
    tokenizer = load_tokenizer(DEMO / "llm")
    lines = (DEMO / "tasks" / "demo_banking" / "train.jsonl").read_text().splitlines()[:60]
    rows = [{"prompt": f"Text: {row['text']} ", "completion": row["label_text"]} for row in map(json.loads, lines)]
    for row, found in zip(rows, encode(rows, tokenizer, max_length=512), strict=True):
        assert found.ids.tolist() == [
            *tokenizer(row["prompt"] + row["completion"])["input_ids"],
            tokenizer.eos_token_id,
        ]
        assert found.start == len(tokenizer(row["prompt"].rstrip())["input_ids"])
