"""What a method costs whom, in floating-point operations: a count from the shapes and the tokens, not a measurement.

A token's way forward through matrices of N entries takes 2 N operations (a multiplication and an addition each). With
frozen weights the way back needs the gradient of the activations only: 2 N for the matrices that lie behind the first
block that trains, none for those before it. An adapter of P entries, whose own gradients are needed, takes 2 P forward
and 4 P back. So a token that is trained on takes

    2 N + 2 N_behind + 6 P.

Where the weights themselves train (healing in mode "full") the formula counts their way forward twice: 2 P too much.

N counts the matrices of the blocks and the head; not the table of the embeddings, which is only looked up, nor
attention's products of activations with each other, which grow with the length of the text. Of a mixture of experts it
counts all experts.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from fedproxy.models.checkpoints import Model
from fedproxy.models.families import blocks
from fedproxy.models.source import open_source

A_TOKEN = (
    "A trained token: 2 N + 2 N_behind + 6 P; a token that is only read: 2 N. N: entries of the matrices of blocks and "
    "head; N_behind: those from the first trained block on; P: trained entries. "
)
FORMULA = A_TOKEN + "Attention's products of activations, the scoring of blocks and of models are not counted."


@dataclass(frozen=True)
class Matrices:
    """Entries of the matrices that a token passes.

    Attributes:
        blocks: Of every block, in order.
        head: Of the head.
    """

    blocks: list[int]
    head: int

    @property
    def total(self) -> int:
        """N."""
        return sum(self.blocks) + self.head

    def behind(self, first: int) -> int:
        """N_behind: of the blocks from the one numbered `first` on, and of the head."""
        return sum(self.blocks[first:]) + self.head


def matrices(checkpoint: str | Path, *, trust_remote_code: bool = False) -> Matrices:
    """Count the matrices of a checkpoint; no weight is loaded.

    Raises:
        ArtifactError: it cannot be used.
    """
    return matrices_of(open_source(checkpoint, trust_remote_code=trust_remote_code).decoder)


def matrices_of(decoder: Model) -> Matrices:
    """Count the matrices of a decoder, which may be on the meta device."""
    head = decoder.get_output_embeddings()  # type: ignore[no-untyped-call]
    of_blocks = [sum(p.numel() for p in block.parameters() if p.ndim >= 2) for block in blocks(decoder)]
    return Matrices(of_blocks, 0 if head is None else head.weight.numel())


def reading(tokens: float, model: Matrices) -> float:
    """2 N a token."""
    return 2.0 * model.total * tokens


def training(tokens: float, model: Matrices, *, trained: Iterable[int], parameters: int) -> float:
    """2 N + 2 N_behind + 6 P a token.

    Args:
        tokens: Tokens trained on.
        model: The model.
        trained: Blocks that train, at least one.
        parameters: P, the entries that train.

    Example:
        >>> training(10, Matrices([100, 100], head=50), trained=[1], parameters=5)
        8300.0
    """
    return (2.0 * model.total + 2.0 * model.behind(min(trained)) + 6.0 * parameters) * tokens
