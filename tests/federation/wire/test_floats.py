import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedproxy.federation.wire.floats import floats


def test_bf16_rounds_to_the_nearest_ties_to_even():
    values = torch.tensor([1.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -(1 + 2**-8)])
    parts = floats(torch.bfloat16).encode(values, 0)
    assert parts["values"].tolist() == [1.0, 1.0, 1 + 2**-6, 1 + 2**-7, -1.0]


def test_bf16_stays_finite_at_the_end_of_float32():
    largest = torch.finfo(torch.float32).max
    parts = floats(torch.bfloat16).encode(torch.tensor([largest, -largest]), 0)
    assert parts["values"].tolist() == [torch.finfo(torch.bfloat16).max, torch.finfo(torch.bfloat16).min]


@given(values=st.lists(st.floats(allow_nan=False, allow_infinity=False, width=32), max_size=20))
@settings(deadline=None)
def test_bf16_values_come_back_exactly(values):
    code = floats(torch.bfloat16)
    once = code.decode(code.encode(torch.tensor(values, dtype=torch.float32), 0), len(values), "x")
    assert torch.equal(code.decode(code.encode(once, 1), len(values), "x"), once)
