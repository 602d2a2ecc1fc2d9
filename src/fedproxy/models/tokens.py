"""Text as token ids: one way for training, public text and scoring, so that what is trained is what is scored."""

from collections.abc import Sequence

from tokenizers import processors
from transformers import PreTrainedTokenizerBase

from fedproxy.errors import ArtifactError

_ALL_EMBEDDED: tuple[dict[int, str], int] = ({}, 0)
_PROBES = ("a", "the", "0", "!")


def prepare(tokenizer: PreTrainedTokenizerBase, vocabulary: int | None) -> PreTrainedTokenizerBase:
    """Make a tokenizer fit for text that goes on: it ends no text by itself, and pads with something.

    A prompt that ended in an end-of-text token would be a finished text, and its answer begin one token late.

    Args:
        tokenizer: The tokenizer; it is changed, and returned.
        vocabulary: Rows of the model's embedding; none if they are not known.

    Raises:
        ArtifactError: it goes on ending texts, or a token that stands in every text has no row in the embedding.
    """
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    begin, end = _added(tokenizer)
    if end:
        _only_begin(tokenizer, begin)
    if end and _added(tokenizer)[1]:
        raise ArtifactError(
            f"The tokenizer ends every text, prompts too, with {' '.join(tokenizer.convert_ids_to_tokens(end))} and "
            "cannot be told not to. Save it with a post-processor that adds nothing at the end."
        )
    if vocabulary is not None:
        beyond = {number: token for token, number in tokenizer.get_vocab().items() if number >= vocabulary}
        tokenizer.beyond_embedding = beyond, vocabulary
    used = [*begin, tokenizer.pad_token_id, tokenizer.eos_token_id]
    check_embedded(tokenizer, [number for number in used if number is not None])
    return tokenizer


def text_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, special: bool = True) -> list[list[int]]:
    """The ids of texts, with what the tokenizer puts before each.

    A text that begins with the begin-of-text token already, as rendered chats do, gets no second one; the LM evaluation
    harness does the same.

    Args:
        tokenizer: A tokenizer that `prepare` went over.
        texts: The texts.
        special: Whether the tokenizer may put its special tokens before them.

    Raises:
        ArtifactError: a text holds a token that has no row in the embedding.
    """
    begin = tokenizer.bos_token
    found: list[list[int]] = [[] for _ in texts]
    for bare in (False, True):
        chosen = [
            index
            for index, text in enumerate(texts)
            if (not special or (begin is not None and text.startswith(begin))) is bare
        ]
        if chosen:
            given = [texts[index] for index in chosen]
            ids = tokenizer(given, add_special_tokens=not bare, return_attention_mask=False, verbose=False)["input_ids"]
            for index, one in zip(chosen, ids, strict=True):
                check_embedded(tokenizer, one)
                found[index] = one
    return found


def answer_ids(
    tokenizer: PreTrainedTokenizerBase, whole: Sequence[int], prompt: Sequence[int], answer: str
) -> list[int]:
    """The ids of an answer after its prompt: those of both together, less the prompt's.

    An answer that melts into the prompt's last token would have none, so that it would always be right and never be
    learned; it is encoded by itself.
    """
    return list(whole[len(prompt) :]) or text_ids(tokenizer, [answer], special=False)[0]


def check_embedded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> None:
    """Check that the model's embedding has a row for each token.

    Raises:
        ArtifactError: it has not; the token and the vocabulary's size are named.
    """
    beyond, vocabulary = getattr(tokenizer, "beyond_embedding", _ALL_EMBEDDED)
    if beyond and (missing := next((number for number in ids if number in beyond), None)) is not None:
        raise ArtifactError(
            f"The tokenizer's token {beyond[missing]!r} has the number {missing}, and the model's embedding has "
            f"{vocabulary} rows: tokens were added and the embedding was not resized. Call resize_token_embeddings and "
            "save anew, or remove the token."
        )


def _added(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and after every text."""
    for probe in (*_PROBES, *tokenizer.get_vocab()):
        bare = tokenizer(probe, add_special_tokens=False)["input_ids"]
        whole = tokenizer(probe)["input_ids"]
        for start in range(len(whole) - len(bare) + 1) if bare else ():
            if whole[start : start + len(bare)] == bare:
                return whole[:start], whole[start + len(bare) :]
    return [], []


def _only_begin(tokenizer: PreTrainedTokenizerBase, begin: list[int]) -> None:
    """Let the tokenizer put `begin` before a text, and nothing after it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        tokenizer.add_eos_token = False
        return
    tokens = tokenizer.convert_ids_to_tokens(begin)
    backend.post_processor = processors.TemplateProcessing(
        single=[*tokens, "$A"], pair=[*tokens, "$A", "$B"], special_tokens=list(zip(tokens, begin, strict=True))
    )
