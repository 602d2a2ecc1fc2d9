"""Public text as padded batches of tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence

from fedproxy.errors import ArtifactError, UsageError
from fedproxy.models.checkpoints import Tokenizer, padding
from fedproxy.models.tokens import text_ids


@dataclass(frozen=True)
class Batch:
    """Some documents as tokens, padded on the right.

    Attributes:
        input_ids: Token numbers, [documents, tokens].
        attention_mask: 1 for a token, 0 for padding, [documents, tokens].
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor


def batches(tokenizer: Tokenizer, documents: Sequence[str], *, max_length: int, batch_size: int) -> list[Batch]:
    """Tokenise documents, cut each to `max_length` tokens, and batch those of similar length.

    Raises:
        UsageError: `max_length` or `batch_size` is not positive.
        ArtifactError: the tokenizer makes no token of the documents.
    """
    if max_length < 1 or batch_size < 1:
        raise UsageError(f"max_length and batch_size must be at least 1, got {max_length} and {batch_size}.")
    rows = sorted((row[:max_length] for row in text_ids(tokenizer, documents) if row), key=len)
    if not rows:
        raise ArtifactError("the tokenizer makes no token of the public text. Give text in the model's language.")
    pad = padding(tokenizer)
    result = []
    for start in range(0, len(rows), batch_size):
        group = [torch.tensor(row) for row in rows[start : start + batch_size]]
        mask = pad_sequence([torch.ones_like(row) for row in group], batch_first=True)
        result.append(Batch(pad_sequence(group, batch_first=True, padding_value=pad), mask))
    return result
