import numpy as np
import pytest
import torch

from fedproxy.aggregation.merge import merge
from fedproxy.errors import UsageError
from tests.aggregation.merge.merge_oracle import agree, cases, flat, mean


def test_mean_by_hand():
    updates = [{"w": torch.tensor([1.0, 4.0])}, {"w": torch.tensor([4.0, -2.0])}]
    assert merge(updates, "mean", rows=[2, 1])[0]["w"].tolist() == [2.0, 2.0]
    assert merge(updates, "mean")[0]["w"].tolist() == [2.5, 1.0]
    assert merge(updates, "mean", rows=[2, 1], weights="uniform")[0]["w"].tolist() == [2.5, 1.0]


def test_the_analysis_tells_the_weights_that_were_used():
    updates = [{"w": torch.tensor(values)} for values in ([1.0, 0.0], [0.0, 1.0], [1.0, 1.0])]
    analysis = merge(updates, "mean", rows=[1, 1, 998])[1]
    assert (analysis.weights, analysis.retention) == ([0.001, 0.001, 0.998], [1.0] * 3)
    assert merge(updates, "ties", density=0.5)[1].retention == [0.5] * 3
    assert merge(updates, "median")[1].weights is merge(updates, "trimmed-mean")[1].weights is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", cases(torch.float32))
def test_mean_equals_the_reference(case, dtype):
    updates = cases(dtype)[case]
    stack = np.stack([flat(update) for update in updates])
    rows = [3 * k + 1 for k in range(len(updates))]
    assert agree(merge(updates, "mean", rows=rows)[0], mean(stack, rows), dtype)
    assert agree(merge(updates, "mean")[0], mean(stack, [1] * len(updates)), dtype)


@pytest.mark.parametrize("rows", [[], [1], [1, -1], [0, 0], [1, 2, 3]])
def test_rows_must_fit_the_clients(rows):
    updates = [{"w": torch.ones(2)}, {"w": torch.ones(2)}]
    with pytest.raises(UsageError, match="rows"):
        merge(updates, "mean", rows=rows)
