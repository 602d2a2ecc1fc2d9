import numpy as np
import pytest
import torch

from fedproxy.aggregation.merge import merge
from tests.aggregation.merge.merge_oracle import agree, cases, flat


def columns(*rows):
    return [{"w": torch.tensor(row)} for row in rows]


def test_median_by_hand():
    odd = columns([1.0, -5.0, 0.0], [3.0, 2.0, 0.0], [100.0, 1.0, 7.0])
    assert merge(odd, "median")[0]["w"].tolist() == [3.0, 1.0, 0.0]
    # Of four, the mean of the middle two: (1 + 3)/2, (-2 + 1)/2, (0 + 4)/2.
    even = [*odd, {"w": torch.tensor([-1.0, -2.0, 4.0])}]
    assert merge(even, "median")[0]["w"].tolist() == [2.0, -0.5, 2.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", cases(torch.float32))
def test_median_equals_numpys(case, dtype):
    updates = cases(dtype)[case]
    expected = np.median(np.stack([flat(update) for update in updates]), axis=0)
    assert agree(merge(updates, "median")[0], expected, dtype)


@pytest.mark.parametrize("attack", [1e30, -1e30, 0.0])
def test_less_than_half_of_the_clients_cannot_leave_the_range_of_the_others(attack):
    generator = torch.Generator().manual_seed(0)
    honest = [{"w": torch.randn(50, generator=generator)} for _ in range(3)]
    merged = merge([*honest, *[{"w": torch.full((50,), attack)}] * 2], "median")[0]["w"]
    stack = torch.stack([update["w"] for update in honest])
    assert (merged >= stack.min(dim=0).values).all()
    assert (merged <= stack.max(dim=0).values).all()


def test_rows_do_not_count():
    updates = columns([1.0], [2.0], [9.0])
    assert merge(updates, "median", rows=[1, 1, 1000])[0]["w"].tolist() == [2.0]
