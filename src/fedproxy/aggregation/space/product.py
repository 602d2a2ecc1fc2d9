"""The product of each layer: what a client changed of B·A is merged, and what comes out is factored again.

The mean of A and of B apart is not the mean of B·A, and means nothing across ranks. The product is what the layer
computes with, and adapters of any rank have it, as long as all are scaled by the same alpha / r.

Reference: Bai et al., "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client Resources",
2024 (FlexLoRA, arXiv 2402.11505). It averages the B_k·A_k themselves. We merge changes, by any rule: with the mean and
clients of one rank the result is the same, and with lower ranks what a client was not given does not count as its wish
to have it gone.
"""

import torch

from fedproxy.aggregation.space.contract import Space
from fedproxy.aggregation.space.low_rank import balanced, leading, of_product
from fedproxy.aggregation.space.pairs import A_SUFFIX, B_SUFFIX, layers, pair
from fedproxy.errors import ArtifactError, UsageError
from fedproxy.tensors import ComputedTensors, Tensors, check_layout, outline


def change(given: Tensors, update: Tensors) -> ComputedTensors:
    """D = (B + b)(A + a) - B·A of each layer, for the update a, b of a client that was given A, B.

    It is computed as (B + b)·a + b·A, one product of inner dimension 2r: nothing large is subtracted, so a small
    update keeps its digits.

    Args:
        given: The adapter that the client was given.
        update: Its update τ_k; the same names and shapes. Both must stay as they are while the result is in use.

    Returns:
        LAYER → D [m, n], float32, computed when touched: one layer of it is in memory at a time.

    Raises:
        ArtifactError: the update has not the adapter's layout, or a tensor is no half of a pair.
    """
    check_layout(given, update, "an update")

    def compute(layer: str) -> torch.Tensor:
        (given_a, given_b), (a, b) = ((half.float() for half in pair(some, layer)) for some in (given, update))
        return torch.cat([given_b + b, b], 1) @ torch.cat([a, given_a])

    def shape(layer: str) -> torch.Tensor:
        a, b = pair(given, layer)
        return outline((b.shape[0], a.shape[1]), torch.float32, a.device)

    return ComputedTensors({layer: shape(layer) for layer in layers(given)}, compute)


def factored(adapter: Tensors, merged: Tensors) -> dict[str, torch.Tensor]:
    """B·A + D of each layer, cut to the adapter's rank r and factored: B' = U_r S_r^½, A' = S_r^½ V_rᵀ.

    Where the sum has a rank below r, the rest of B' is zero and the rest of A' is that of A (see `low_rank.balanced`).

    Args:
        adapter: φ_t.
        merged: LAYER → D [m, n]; each is read once.

    Returns:
        φ_{t+1}, in the adapter's dtypes.

    Raises:
        ArtifactError: a layer is missing, unknown or of another shape, or D holds NaN or infinity.
    """
    expected = layers(adapter)
    if merged.keys() != set(expected):
        wrong = sorted(merged.keys() ^ set(expected))
        raise ArtifactError(f"The merged product and the adapter do not hold the same layers: {', '.join(wrong[:3])}.")
    result: dict[str, torch.Tensor] = {}
    for layer in expected:
        a, b = pair(adapter, layer)
        change_of_layer = merged[layer]
        shape = (b.shape[0], a.shape[1])
        if change_of_layer.shape != shape:
            raise ArtifactError(
                f"The merged product: {layer} has shape {list(change_of_layer.shape)}, expected {list(shape)}."
            )
        total = torch.addmm(change_of_layer.float(), b.float(), a.float())
        if not total.isfinite().all():
            raise ArtifactError(
                f"The merged product: {layer} overflows float32. Limit the updates' norms with clip_norm."
            )
        _put(result, layer, balanced(leading(total, min(a.shape[0], *shape)), a), adapter)
    return result


def truncated(adapter: Tensors, rank: int) -> dict[str, torch.Tensor]:
    """The adapter with each layer's product cut to a lower rank, as a client of that rank gets it.

    Args:
        adapter: φ_t, of rank r.
        rank: From 1 to r; at r the adapter comes back as it is.

    Returns:
        An adapter of rank `rank`, in the dtypes of `adapter`.

    Raises:
        ArtifactError: a tensor is no half of a pair.
        UsageError: the rank is below 1 or above that of a layer.
    """
    result: dict[str, torch.Tensor] = {}
    for layer in layers(adapter):
        a, b = pair(adapter, layer)
        if not 1 <= rank <= a.shape[0]:
            raise UsageError(f"A client's rank is {rank}; it must lie between 1 and the adapter's, {a.shape[0]}.")
        if rank == a.shape[0]:
            result[layer + A_SUFFIX], result[layer + B_SUFFIX] = a, b
        else:
            _put(result, layer, balanced(of_product(b, a, min(rank, *b.shape, a.shape[1])), a[:rank]), adapter)
    return result


def disputed(adapter: Tensors, levels: Tensors) -> dict[str, torch.Tensor]:
    """How far the clients disagree at each coordinate of A and B: the mean over what it moves in the product.

    A step in B_il moves row i of the product by row l of A, so that its level is the mean of that row's levels with the
    weights A_lj². A step in A_lj moves column j by column l of B, whose weights are B_il².

    Args:
        adapter: φ_{t+1}, whose coordinates are meant: `factored` turns the basis in every round.
        levels: LAYER → K - |Σ sign| at each coordinate of the product, [m, n], whole numbers.

    Returns:
        Names and shapes of the adapter, rounded to whole numbers, in the dtype of `levels`; 0 for a coordinate that
        moves nothing.
    """
    result: dict[str, torch.Tensor] = {}
    for layer in layers(adapter):
        a, b = (half.double().square() for half in pair(adapter, layer))
        found = levels[layer].float()
        of_a = _shares(b, 0).T.float() @ found
        of_b = found @ _shares(a, 1).T.float()
        for suffix, mean in ((A_SUFFIX, of_a), (B_SUFFIX, of_b)):
            result[layer + suffix] = mean.round().to(levels[layer].dtype)
    return result


def _shares(squares: torch.Tensor, dim: int) -> torch.Tensor:
    """Each value's share of the sum along `dim`; 0 where that is 0."""
    return (squares / squares.sum(dim, keepdim=True)).nan_to_num(0.0)


def _put(
    result: dict[str, torch.Tensor], layer: str, factors: tuple[torch.Tensor, torch.Tensor], like: Tensors
) -> None:
    for suffix, factor in zip((B_SUFFIX, A_SUFFIX), factors, strict=True):
        result[layer + suffix] = factor.to(like[layer + suffix].dtype)


PRODUCT = Space(
    name="product",
    trains=lambda name: True,
    vector=change,
    apply=factored,
    for_rank=truncated,
    lasting=False,
    disputed=disputed,
)
