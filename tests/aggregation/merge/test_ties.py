import numpy as np
import pytest
import torch

from fedproxy.aggregation.merge import merge
from tests.aggregation.merge.merge_oracle import agree, cases, flat, ties


def test_ties_by_hand():
    # Keep two of four: (5, -3, 0, 0), (0, -1, 0, 4), (-4, 0, 0, 2). Sums 1, -4, 0, 6.
    rows = ([5.0, -3.0, 1.0, 2.0], [0.5, -1.0, 0.0, 4.0], [-4.0, 1.0, -1.0, 2.0])
    merged, _ = merge([{"w": torch.tensor(row)} for row in rows], "ties", density=0.5)
    assert merged["w"].tolist() == [5.0, -2.0, 0.0, 3.0]


def test_a_sum_of_zero_elects_no_sign():
    updates = [{"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([-1.0, 2.0])}]
    merged, analysis = merge(updates, "ties", density=1.0)
    assert merged["w"].tolist() == [0.0, 2.0]
    assert analysis.zero_fraction == 0.5


@pytest.mark.parametrize("density", [0.0, 0.2, 0.55, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", cases(torch.float32))
def test_ties_equals_the_reference(case, dtype, density):
    updates = cases(dtype)[case]
    expected = ties(np.stack([flat(update) for update in updates]), density)
    assert agree(merge(updates, "ties", density=density)[0], expected, dtype)
