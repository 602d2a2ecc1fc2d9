import pytest
import torch

from fedproxy.errors import ArtifactError
from fedproxy.federation.wire import ENCODINGS, encoding
from fedproxy.federation.wire.feedback import feedback

SHAPES = {"b": (7,), "a": (5, 30), "empty": (0,)}


def made(seed):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def flat(tensors):
    return torch.cat([tensors[name].reshape(-1).double() for name in sorted(tensors)])


@pytest.mark.parametrize("name", ENCODINGS)
def test_what_was_sent_and_what_is_left_add_up_to_the_updates(name):
    row, options = encoding(name, {})
    residual, updates, sent = None, 0, 0
    for seed in range(20):
        _, decoded, residual = feedback(made(seed), residual, row, options, seed=seed, share=0.2)
        updates, sent = updates + flat(made(seed)), sent + flat(decoded)
    assert torch.allclose(sent + flat(residual), updates, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ENCODINGS)
def test_what_is_decoded_is_what_the_server_reads_to_the_bit(name):
    row, options = encoding(name, {})
    update = made(1)
    parts, decoded, residual = feedback(update, made(2), row, options, seed=3, share=0.2)
    shapes = {key: tensor.shape for key, tensor in update.items()}
    server = dict(row.decode(parts, shapes, options, "bank", share=0.2))
    for key, tensor in update.items():
        assert torch.equal(server[key], decoded[key])
        assert torch.equal(residual[key], tensor + made(2)[key] - decoded[key])


def test_without_a_residual_the_update_is_encoded_as_it_is():
    row, options = encoding("int4", {})
    parts, _, _ = feedback(made(4), None, row, options, seed=5, share=1.0)
    plain = row.encode(made(4), options, seed=5, share=1.0)
    assert all(torch.equal(parts[part], plain[part]) for part in plain)


def test_every_coordinate_is_sent_in_the_end():
    row, options = encoding("top-k", {"share": 0.05})
    update = {"w": torch.linspace(0.1, 1.0, 100)}
    residual, seen = None, torch.zeros(100, dtype=torch.bool)
    for seed in range(200):
        _, decoded, residual = feedback(update, residual, row, options, seed=seed, share=1.0)
        seen |= decoded["w"] != 0
    assert seen.all()
    assert residual["w"].abs().max() < 0.1 * 200


def test_a_residual_of_another_adapter_is_refused():
    row, options = encoding("bf16", {})
    with pytest.raises(ArtifactError, match=r"the residual: b has shape \[8\], expected \[7\]"):
        feedback(made(0), {**made(1), "b": torch.zeros(8)}, row, options, seed=0, share=1.0)


def test_sums_that_overflow_are_refused():
    row, options = encoding("bf16", {})
    large = {"w": torch.tensor([3e38])}
    with pytest.raises(ArtifactError, match="w holds a NaN or Inf"):
        feedback(large, large, row, options, seed=0, share=1.0)
