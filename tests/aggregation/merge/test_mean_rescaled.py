import numpy as np
import pytest
import torch

from fedproxy.aggregation.merge import merge
from fedproxy.errors import UsageError
from tests.aggregation.merge.merge_oracle import agree, cases, flat


def rescaled(stack):
    mean = sum(stack) / len(stack)
    length = np.linalg.norm(mean)
    return mean * np.mean([np.linalg.norm(row) for row in stack]) / length if length else mean


def test_by_hand():
    """The mean of (3, 0) and (0, 4) is (1.5, 2), of length 2.5; the mean length is 3.5: the factor is 1.4."""
    updates = [{"w": torch.tensor([3.0, 0.0])}, {"w": torch.tensor([0.0, 4.0])}]
    merged, analysis = merge(updates, "mean-rescaled", rows=[1, 99])
    assert merged["w"].tolist() == pytest.approx([2.1, 2.8])
    assert analysis.weights == [0.5, 0.5]


def test_orthogonal_updates_of_one_length_move_by_the_mean_times_the_root_of_their_number():
    updates = [{"w": 5.0 * row} for row in torch.eye(4)]
    assert merge(updates, "mean-rescaled")[0]["w"].tolist() == pytest.approx([2.5] * 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", cases(torch.float32))
def test_it_equals_the_reference(case, dtype):
    updates = cases(dtype)[case]
    stack = np.stack([flat(update) for update in updates])
    assert agree(merge(updates, "mean-rescaled")[0], rescaled(stack), dtype)


def test_what_cancels_but_for_rounding_is_not_blown_up():
    update = torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    updates = [{"w": update}, {"w": -update * (1 + 1e-9)}]
    assert merge(updates, "mean-rescaled")[0]["w"].abs().max() < 1e-8


def test_it_has_no_options():
    with pytest.raises(UsageError, match="factor"):
        merge([{"w": torch.ones(2)}], "mean-rescaled", factor=2.0)
