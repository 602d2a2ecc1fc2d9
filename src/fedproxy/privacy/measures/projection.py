"""How much of a vector lies outside the row space of a matrix."""

import torch

from fedproxy.errors import UsageError

TOLERANCE = 1e-5
"""Singular values below this share of the largest are rounding of a difference of float32 tensors."""


def row_space(matrix: torch.Tensor, tolerance: float = TOLERANCE) -> torch.Tensor:
    """An orthonormal basis of what the rows of a matrix span.

    Args:
        matrix: [rows, inputs].
        tolerance: Singular values below this share of the largest count as zero.

    Returns:
        The basis, float64 [rank, inputs]; of a zero matrix without rows.

    Raises:
        UsageError: it is no matrix, or holds NaN or infinity.
    """
    if matrix.dim() != 2 or not bool(torch.isfinite(matrix).all()):
        raise UsageError(f"A row space is that of a finite matrix, not of a tensor of shape {tuple(matrix.shape)}.")
    _, values, basis = torch.linalg.svd(matrix.double(), full_matrices=False)
    kept: torch.Tensor = basis[values > tolerance * values.max()] if bool(values.any()) else basis[:0]
    return kept


def residuals(vectors: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """Length of what is left of each vector outside a subspace, as a share of its own: |x - V'Vx| / |x|.

    Args:
        vectors: [n, inputs].
        basis: Orthonormal rows V that span the subspace, [rank, inputs].

    Returns:
        Float64 [n], each from 0 (it lies within) to 1 (it is orthogonal to it); 1 of a zero vector.
    """
    vectors, basis = vectors.double(), basis.double()
    left = (vectors - (vectors @ basis.T) @ basis).norm(dim=1)
    lengths = vectors.norm(dim=1)
    return torch.where(lengths > 0, left / lengths.clamp_min(torch.finfo(lengths.dtype).tiny), 1.0)
