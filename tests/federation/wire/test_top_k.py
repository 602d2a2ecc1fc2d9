import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedproxy.aggregation.merge.top_k import kept_count, thresholds, trimmed
from fedproxy.errors import ArtifactError
from fedproxy.federation.wire import encoding
from fedproxy.federation.wire.packing import pack

SHAPES = {"a": torch.Size((64,)), "b": torch.Size((2, 2))}


def encoded(tensors, share=1.0, **given):
    row, options = encoding("top-k", given)
    return row.encode(tensors, options, seed=0, share=share)


def decoded(parts, shapes, share=1.0, **given):
    row, options = encoding("top-k", given)
    return dict(row.decode(parts, shapes, options, "bank", share=share))


def sample():
    values = torch.zeros(64)
    values[[2, 3, 40]] = torch.tensor([5.0, -4.0, 3.0])
    return {"b": torch.tensor([[0.0, 2.5], [-1.0, 0.25]]), "a": values}


def test_top_k_by_hand():
    parts = encoded(sample(), share=0.06, values="fp32")  # 0.06 · 68 = 4.08: four values
    assert parts["counts"].tolist() == [3 | (1 << 7) & 255, 0]  # seven bits a count: 3 and 1
    assert parts["positions"].tolist() == [0x32, 0x08, 0b10011, 0b0010]  # a's as of Elias and Fano, b's as a bitmap
    assert parts["values"].tolist() == [5.0, -4.0, 3.0, 2.5]
    found = decoded(parts, SHAPES, share=0.06, values="fp32")
    assert torch.equal(found["a"], sample()["a"])
    assert found["b"].tolist() == [[0.0, 2.5], [0.0, 0.0]]


@given(
    rows=st.lists(st.sampled_from([-2.0, -1.0, -0.0, 0.0, 1e-45, 1.0, 2.0]), max_size=40),
    cut=st.integers(0, 40),
    share=st.floats(0, 1),
)
@settings(max_examples=150, deadline=None)
def test_what_is_kept_is_what_h_ties_keeps(rows, cut, share):
    tensors = {"c": torch.tensor(rows[cut:]), "b": torch.tensor(rows[:cut])}
    found = decoded(
        encoded(tensors, share, values="fp32"), {k: t.shape for k, t in tensors.items()}, share, values="fp32"
    )
    if not rows:
        return
    limits = thresholds([tensors], [kept_count(share, len(rows))])
    expected = torch.cat([values[0].clone() for _, values in trimmed([tensors], limits)])
    assert torch.equal(torch.cat([found["b"], found["c"]]), expected)


def test_the_rounds_share_counts_unless_the_options_have_one():
    tensors = {"w": torch.arange(100.0)}
    assert len(encoded(tensors, share=0.4)["codes"]) == 40
    row, options = encoding("top-k", {"share": 0.1})
    assert len(row.encode(tensors, options, seed=0, share=0.4)["codes"]) == 10


def refused(parts, match, share=0.06):
    with pytest.raises(ArtifactError, match=match):
        decoded(parts, SHAPES, share, values="fp32")


def counts(*numbers):
    return pack(torch.tensor(numbers), 7)


def test_fewer_than_the_share_may_come_and_not_more():
    few = encoded(sample(), share=0.03, values="fp32")
    assert int((decoded(few, SHAPES, share=0.06, values="fp32")["a"] != 0).sum()) == 2
    many = encoded(sample(), share=0.08, values="fp32")
    refused(many, "bank: 5 values are kept, the share allows 4")


def test_wrong_counts_are_refused():
    parts = encoded(sample(), share=0.06, values="fp32")
    refused({**parts, "counts": counts(3, 5)}, "bank: b has 4 values, 5 are said to be kept")
    refused({**parts, "counts": counts(4, 1)}, "bank: 5 values are kept, the share allows 4")
    refused({**parts, "counts": counts(2, 1)}, "bank: the part (positions|values) is")
    refused({**parts, "counts": counts(1, 3)}, "bank: ")
    refused(
        {**parts, "counts": parts["counts"] | torch.tensor([0, 64], dtype=torch.uint8)}, "bank: counts: a bit beyond"
    )
    refused({**parts, "counts": parts["counts"][:1]}, "bank: counts is")


def test_wrong_positions_name_the_tensor():
    parts = encoded(sample(), share=0.06, values="fp32")
    for position, value, match in (
        (0, 0x33, "bank: a: a position comes twice"),
        (2, 0b110011, "bank: a: 4 positions are marked, expected 3"),
        (3, 0b0110, "bank: b: 2 positions are marked, expected 1"),
        (3, 0b10000, "bank: b: a bit beyond the last value is set"),
    ):
        wrong = parts["positions"].clone()
        wrong[position] = value
        refused({**parts, "positions": wrong}, match)
