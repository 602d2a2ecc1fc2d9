import math

import numpy as np
import pytest
import torch

from fedproxy.aggregation.merge import merge
from fedproxy.errors import UsageError
from tests.aggregation.merge.merge_oracle import agree, cases, flat

FIVE = [{"w": torch.tensor([value, -value])} for value in (1.0, 2.0, 6.0, 4.0, 100.0)]


@pytest.mark.parametrize(
    ("trim", "expected"),
    [
        (0.0, 113 / 5),
        (0.19, 113 / 5),  # floor(0.95) = 0
        (0.2, 12 / 3),  # one at each end: 2, 4, 6
        (0.39, 12 / 3),
        (0.4, 4.0),
        (0.5, 4.0),  # floor(2.5) = 2
    ],
)
def test_trimmed_mean_by_hand(trim, expected):
    assert merge(FIVE, "trimmed-mean", trim=trim)[0]["w"].tolist() == pytest.approx([expected, -expected])


def test_the_share_is_decimal():
    # 0.29 · 100 is 28.999999999999996 in floats; 29 of 100 at each end leave 29 ... 70 of 0 ... 99.
    updates = [{"w": torch.tensor([float(k**2)])} for k in range(100)]
    expected = sum(k**2 for k in range(29, 71)) / 42
    assert merge(updates, "trimmed-mean", trim=0.29)[0]["w"].item() == pytest.approx(expected)


@pytest.mark.parametrize("trim", [0.0, 0.2, 0.25, 0.49])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", cases(torch.float32))
def test_trimmed_mean_equals_the_reference(case, dtype, trim):
    updates = cases(dtype)[case]
    stack = np.sort(np.stack([flat(update) for update in updates]), axis=0)
    cut = math.floor(trim * len(stack))
    assert agree(merge(updates, "trimmed-mean", trim=trim)[0], stack[cut : len(stack) - cut].mean(axis=0), dtype)


def test_as_many_attackers_as_are_trimmed_cannot_leave_the_range_of_the_others():
    generator = torch.Generator().manual_seed(0)
    honest = [{"w": torch.randn(50, generator=generator)} for _ in range(4)]
    merged = merge([*honest, {"w": torch.full((50,), 1e30)}], "trimmed-mean")[0]["w"]
    stack = torch.stack([update["w"] for update in honest])
    assert (merged >= stack.min(dim=0).values).all()
    assert (merged <= stack.max(dim=0).values).all()


@pytest.mark.parametrize("clients", [2, 4])
def test_trimming_everybody_is_refused(clients):
    with pytest.raises(UsageError, match=f"leaves {clients // 2} of {clients} clients out at each end and none"):
        merge(FIVE[:clients], "trimmed-mean", trim=0.5)


@pytest.mark.parametrize("trim", [-0.1, 0.6, float("nan")])
def test_the_share_has_limits(trim):
    with pytest.raises(UsageError, match=r"it must lie between 0 and 0\.5"):
        merge(FIVE, "trimmed-mean", trim=trim)
