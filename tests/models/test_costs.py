from collections.abc import Callable
from pathlib import Path

import pytest

from fedproxy.models.costs import Matrices, matrices, reading, training


def test_by_hand() -> None:
    model = Matrices([100, 200, 300], head=50)
    assert reading(10, model) == 2 * 650 * 10
    # Blocks 1 and 2 train: N = 650, behind block 1 lie 200 + 300 + 50.
    assert training(10, model, trained=[2, 1], parameters=7) == (2 * 650 + 2 * 550 + 6 * 7) * 10


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_counts_and_the_table_of_the_embeddings_does_not(
    tiny_checkpoint: Callable[..., Path], tied: bool
) -> None:
    found = matrices(tiny_checkpoint(tie_word_embeddings=tied))
    attention, mlp = 32 * 32 * 2 + 32 * 16 * 2, 3 * 32 * 48  # two of four heads are of keys and values
    assert found == Matrices([attention + mlp] * 6, head=260 * 32)
