"""Updates on an accelerator are merged there."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fedproxy.aggregation.analyse import measure
from fedproxy.aggregation.merge import RULES, kernels, merge_round
from fedproxy.tensors import ACCELERATED, stacked
from tests.aggregation.merge.merge_oracle import cases, random_updates


class Asked(TorchDispatchMode):
    """Counts the values that the host asks of the device, each of which waits for it."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, kinds, arguments=(), keywords=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*arguments, **(keywords or {}))


def test_a_walk_keeps_to_the_device_of_the_updates_in_larger_chunks():
    updates = [{"a": torch.empty(300, device="meta"), "b": torch.empty(7, 100, device="meta")}] * 2
    chunks = [values for _, values in stacked(updates, 4)]
    assert {values.device.type for values in chunks} == {"meta"}
    assert [values.shape[1] for values in chunks] == [2 * ACCELERATED] * 3 + [1000 - 6 * ACCELERATED]


def test_the_analysis_waits_for_the_device_once_and_not_chunk_by_chunk():
    counts = []
    for elements in (2048, 1 << 20):
        with Asked() as asked:
            measure([{"w": torch.ones(20_000)}] * 2, chunk_elements=elements)
        counts.append(asked.count)
    assert counts[0] == counts[1] < 5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("rule", RULES)
def test_on_a_gpu_the_result_is_that_of_the_processor(monkeypatch, rule, dtype):
    monkeypatch.setattr(kernels, "SMALLEST", 1 << 62)
    for updates in (*cases(dtype).values(), random_updates(5, dtype, seed=2)):
        merged, levels, analysis = merge_round(updates, rule)
        moved = [{name: tensor.cuda() for name, tensor in update.items()} for update in updates]
        found, found_levels, other = merge_round(moved, rule)
        assert other.retention == pytest.approx(analysis.retention, abs=1e-9)
        for name, tensor in merged.items():
            assert found[name].device.type == "cuda"
            torch.testing.assert_close(found[name].cpu(), tensor, rtol=1e-6, atol=1e-6)
            assert torch.equal(found_levels[name].cpu(), levels[name])
