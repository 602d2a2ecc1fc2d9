"""What every encoding must hold; a new row of `ENCODINGS` needs what it keeps and its step, if either is new."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedproxy.aggregation.merge.top_k import kept_count
from fedproxy.errors import ArtifactError, UsageError
from fedproxy.federation.wire import ENCODINGS, encoding

SHAPES = {"b": (9,), "a": (6, 50), "c": (2, 3, 4), "empty": (0, 3), "scalar": (), "long": (1000,)}
SHARE = 0.3
CASES = [(name, {}) for name in ENCODINGS] + [
    ("int8", {"block": 32}),
    ("int4", {"block": 256}),
    ("top-k", {"share": 1.0}),
    ("top-k", {"values": "fp32"}),
    ("top-k", {"values": "bf16", "share": 0.9}),
    ("top-k", {"values": "int4", "share": 0.05}),
]
STEPS = {"fp32": 0.0, "bf16": 2**-8, "int8": (1 + 2**-7) / 127, "int4": (1 + 2**-7) / 7}
"""The most by which a value may be off, by the largest magnitude of its tensor."""

cases = pytest.mark.parametrize(("name", "given"), CASES, ids=str)


def made(seed=0, shapes=SHAPES):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def shapes_of(tensors):
    return {name: tensor.shape for name, tensor in tensors.items()}


def encoded(name, given, tensors, seed=0):
    row, options = encoding(name, given)
    return row.encode(tensors, options, seed=seed, share=SHARE)


def decoded(name, given, parts, shapes):
    row, options = encoding(name, given)
    return dict(row.decode(parts, shapes, options, "bank", share=SHARE))


def there_and_back(name, given, tensors, seed=0):
    return decoded(name, given, encoded(name, given, tensors, seed), shapes_of(tensors))


def flat(tensors):
    return torch.cat([torch.empty(0), *(tensors[name].reshape(-1).float() for name in sorted(tensors))])


def value_code(name, given):
    """How the values that are sent are written."""
    return encoding(name, given)[1].values if name == "top-k" else name


def step(name, given, tensors):
    """The largest step of each value's tensor, over the whole vector."""
    factor = STEPS[value_code(name, given)]
    return flat(
        {key: torch.full_like(t, factor * float(t.abs().max()) if t.numel() else 0) for key, t in tensors.items()}
    )


def kept(name, given, tensors):
    """The values that are sent, zero for the others."""
    whole = flat(tensors)
    if name != "top-k":
        return whole
    count = kept_count(given.get("share") or SHARE, len(whole))
    largest = whole.abs().sort(descending=True, stable=True).indices[:count]
    return torch.zeros_like(whole).index_copy(0, largest, whole[largest])


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_names_and_shapes_come_back_sorted_in_float32(name, given, dtype):
    tensors = {key: tensor.to(dtype) for key, tensor in made().items()}
    found = there_and_back(name, given, tensors)
    assert list(found) == sorted(tensors)
    for key, tensor in found.items():
        assert (tensor.shape, tensor.dtype) == (tensors[key].shape, torch.float32)


@cases
def test_the_parts_are_those_of_the_layout_and_within_its_bounds(name, given):
    row, options = encoding(name, given)
    for seed, scale in ((0, 1.0), (1, 1e-3), (2, 0.0)):
        tensors = {key: tensor * scale**k for k, (key, tensor) in enumerate(made(seed).items())}
        parts, limits = encoded(name, given, tensors), row.layout(shapes_of(tensors), options, share=SHARE)
        assert list(parts) == list(limits)
        for part, (dtype, most) in limits.items():
            assert (parts[part].dtype, parts[part].dim()) == (dtype, 1)
            assert parts[part].numel() <= most


@cases
def test_what_is_kept_comes_back_within_a_step_and_the_rest_as_zero(name, given):
    for seed in range(5):
        tensors = made(seed)
        found, expected = flat(there_and_back(name, given, tensors, seed)), kept(name, given, tensors)
        assert ((found - expected).abs() <= step(name, given, tensors) * (expected != 0)).all()


@cases
def test_another_seed_changes_nothing_or_only_what_the_mean_over_seeds_restores(name, given):
    tensors, runs = made(3), 400
    found = torch.stack([flat(there_and_back(name, given, tensors, seed)) for seed in range(runs)]).double()
    if (found == found[0]).all():
        return
    off = (found.mean(dim=0) - kept(name, given, tensors).double()).abs()
    assert (off <= 5 * step(name, given, tensors) / 2 / math.sqrt(runs) + 1e-30).all()


def test_encodings_in_steps_draw_and_others_do_not():
    tensors = made(4)
    for name, chosen in CASES:
        same = equal(encoded(name, chosen, tensors, 1), encoded(name, chosen, tensors, 2))
        assert same == (value_code(name, chosen) in ("fp32", "bf16"))


@cases
def test_the_seed_alone_decides(name, given):
    tensors, threads = made(5, {"w": (300, 300), "v": (7,)}), torch.get_num_threads()
    torch.manual_seed(1)
    first = encoded(name, given, tensors, 7)
    state = torch.get_rng_state()
    torch.set_num_threads(1 if threads > 1 else 2)
    try:
        second = encoded(name, given, dict(reversed(tensors.items())), 7)
    finally:
        torch.set_num_threads(threads)
    assert equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)


@cases
def test_the_input_is_left_alone(name, given):
    tensors = made(6)
    encoded(name, given, tensors)
    assert equal(tensors, made(6))


@cases
@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {"empty": torch.empty(0)},
        {"empty": torch.empty(0, 4), "w": torch.ones(3)},
        {"scalar": torch.tensor(-2.5)},
        {"zero": torch.zeros(130), "w": torch.randn(131)},
        {"zero": torch.zeros(5, 5)},
        {"minus": -torch.zeros(3)},
        {"tiny": torch.tensor([1e-45, -1e-38, 1e-40] * 50)},
        {"huge": torch.tensor([3.4028234e38, -3.4e38, 1e30, 0.0] * 50)},
        {"both": torch.tensor([1e30, -1e-38, 1e-3])},
    ],
    ids=lambda tensors: "-".join(tensors) or "none",
)
def test_edges_come_back_within_a_step(name, given, tensors):
    found, expected = there_and_back(name, given, tensors), kept(name, given, tensors)
    assert shapes_of(found) == shapes_of(tensors)
    smallest_step = 2.0**-133
    limit = (step(name, given, tensors) * (1 + 1e-6)).clamp(min=smallest_step) * (expected != 0)
    assert ((flat(found).double() - expected.double()).abs() <= limit).all()


@pytest.mark.parametrize(("name", "given"), [("fp32", {}), ("top-k", {"share": 1.0, "values": "fp32"})])
@given(data=st.data())
@settings(max_examples=50, deadline=None)
def test_lossless_ones_are_exact(name, given, data):
    numbers = st.floats(allow_nan=False, allow_infinity=False, width=32)
    tensors = {key: torch.tensor(data.draw(st.lists(numbers, max_size=9))) for key in ("a", "b")}
    assert equal(there_and_back(name, given, tensors), tensors)


@pytest.mark.parametrize(("name", "bits"), [("fp32", 32), ("bf16", 16), ("int8", 8.125), ("int4", 4.125)])
def test_the_bits_of_a_value(name, bits):
    parts = encoded(name, {}, {"w": torch.ones(256, 128)})
    assert sum(part.numel() * part.itemsize for part in parts.values()) * 8 == bits * 256 * 128


@cases
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_not_sent(name, given, bad):
    tensors = made()
    tensors["b"][4] = bad
    with pytest.raises(ArtifactError, match=r"b holds a NaN or Inf \(flat index 4\)"):
        encoded(name, given, tensors)
    with pytest.raises(ArtifactError, match="b holds a NaN or Inf"):
        encoded(name, given, {"b": torch.tensor([1e300], dtype=torch.float64)})


@cases
def test_wrong_parts_are_refused_at_the_call(name, given):
    row, options = encoding(name, given)
    tensors = made()
    parts, shapes = encoded(name, given, tensors), shapes_of(tensors)

    def refused(wrong, match):
        with pytest.raises(ArtifactError, match=match):
            row.decode(wrong, shapes, options, "bank", share=SHARE)

    refused({}, "bank: the part '.*' is missing")
    refused({**parts, "more": torch.zeros(1)}, "bank: the part 'more' is unknown; expected")
    for part, values in parts.items():
        refused({key: value for key, value in parts.items() if key != part}, f"bank: the part '{part}' is missing")
        other = torch.float64 if values.is_floating_point() else torch.int32
        longer = torch.cat([values, values.new_zeros(1)])
        for wrong in (values.to(other), values[None], longer[0], longer, *([values[:-1]] if len(values) else [])):
            refused({**parts, part: wrong}, f"bank: (the part )?{part} is ")
        endless = torch.zeros((), dtype=values.dtype).expand(1 << 50)
        refused({**parts, part: endless}, f"bank: the part {part} is .* expected")


@cases
def test_wrong_numbers_are_refused_and_the_tensor_named(name, given):
    tensors = made()
    parts = encoded(name, given, tensors)
    for part, values in parts.items():
        for bad in (math.nan, math.inf, -math.inf) if values.is_floating_point() else ():
            wrong = values.clone()
            wrong[0] = bad
            with pytest.raises(ArtifactError, match="bank: a "):
                decoded(name, given, {**parts, part: wrong}, shapes_of(tensors))


@cases
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_bytes_give_finite_tensors_or_are_refused(name, given, data):
    tensors = made(7, {"a": (5,), "b": (37,)})
    parts = encoded(name, given, tensors)
    part = data.draw(st.sampled_from([part for part in sorted(parts) if len(parts[part])]))
    raw = parts[part].view(torch.uint8).clone()
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = decoded(name, given, {**parts, part: raw.view(parts[part].dtype)}, shapes_of(tensors))
    except ArtifactError:
        return
    assert shapes_of(found) == shapes_of(tensors)
    assert flat(found).isfinite().all()


def test_a_row_and_its_name_agree():
    for name, row in ENCODINGS.items():
        assert (row.name, encoding(name, {})) == (name, (row, row.options()))


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("int9", {}, r"Unknown encoding 'int9'\. Did you mean 'int8'\?"),
        ("int8", {"blocks": 64}, r"Unknown option of the encoding int8 'blocks'\. Did you mean 'block'\?"),
        ("int8", {"block": 48}, "int8: block is 48; it must be one of 32, 64, 128, 256"),
        ("top-k", {"share": 1.5}, "top-k: share is 1.5"),
        ("top-k", {"share": math.nan}, "top-k: share is nan"),
        ("top-k", {"values": "int2"}, "top-k: values is 'int2'"),
    ],
)
def test_wrong_options_are_explained(name, given, message):
    with pytest.raises(UsageError, match=message):
        encoding(name, given)
