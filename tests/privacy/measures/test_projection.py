import pytest
import torch

from fedproxy.errors import UsageError
from fedproxy.privacy.measures.projection import residuals, row_space


def drawn(rows, columns, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_what_the_rows_span_has_no_residual_and_what_is_orthogonal_has_all():
    matrix = drawn(3, 8)
    basis = row_space(matrix)
    assert torch.allclose(basis @ basis.T, torch.eye(3, dtype=torch.float64))
    inside = drawn(5, 3, seed=1) @ matrix
    assert residuals(inside, basis).max() < 1e-12
    outside = torch.linalg.svd(matrix).Vh[3:]
    assert torch.allclose(residuals(outside, basis), torch.ones(5, dtype=torch.float64))
    half = outside[:1] + inside[:1] / inside[:1].norm()
    assert residuals(half, basis).item() == pytest.approx(0.5**0.5)


def test_a_length_does_not_count_and_a_zero_vector_is_far_from_all():
    basis, vectors = row_space(drawn(3, 8)), drawn(4, 8, seed=2)
    assert torch.allclose(residuals(vectors, basis), residuals(-7 * vectors, basis))
    assert residuals(torch.zeros(1, 8), basis).item() == 1.0


def test_rows_that_repeat_and_rounding_add_nothing_to_the_span():
    matrix = drawn(2, 6).float()
    repeated = torch.cat([matrix, 3 * matrix, matrix + 1e-8])
    assert len(row_space(repeated)) == 2
    assert len(row_space(torch.zeros(3, 6))) == 0
    assert residuals(drawn(2, 6), row_space(torch.zeros(3, 6))).tolist() == [1.0, 1.0]


def test_what_is_no_finite_matrix_is_refused():
    for wrong in (torch.zeros(3), torch.tensor([[float("nan"), 1.0]])):
        with pytest.raises(UsageError, match="row space"):
            row_space(wrong)
