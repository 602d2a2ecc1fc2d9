import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedproxy.aggregation.server_optimizer import SERVER_OPTIMIZERS, server_optimizer
from fedproxy.errors import ArtifactError, UsageError
from fedproxy.tensor_files import load_tensors, save_tensors

every = pytest.mark.parametrize("name", SERVER_OPTIMIZERS)
SHAPES = {"b": (7,), "a": (3, 4), "empty": (0, 2), "scalar": ()}


def deltas(rounds=3, seed=0, scale=1e-3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [
        {name: (torch.randn(shape, generator=generator) * scale).to(dtype) for name, shape in SHAPES.items()}
        for _ in range(rounds)
    ]


def walked(name, gradients, state=None, **options):
    """The steps of several rounds, and the last state."""
    row, chosen = server_optimizer(name, options)
    steps = []
    for delta in gradients:
        step, state = row.step(delta, state, chosen)
        steps.append(step)
    return steps, state


def scalars(*values):
    return [{"w": torch.tensor([value])} for value in values]


def moved(name, gradients, **options):
    return [step["w"].item() for step in walked(name, gradients, **options)[0]]


def test_none_adds_the_merged_update_as_it_is():
    gradients = deltas()
    steps, state = walked("none", gradients)
    assert state == {}
    assert all(torch.equal(step[n], delta[n]) for step, delta in zip(steps, gradients, strict=True) for n in SHAPES)


def test_fedavgm_by_hand():
    # m: 1, then 0.5 - 2 = -1.5, then -0.75 + 4 = 3.25; times η = 2.
    assert moved("fedavgm", scalars(1.0, -2.0, 4.0), learning_rate=2.0, momentum=0.5) == [2.0, -3.0, 6.5]


def test_fedadam_by_hand():
    # τ = 1: v_0 = 1. Δ = 2, 0, -4 and both β = 1/2.
    # m: 1, 0.5, -1.75. v: 0.5 + 2 = 2.5, 1.25, 0.625 + 8 = 8.625.
    found = moved("fedadam", scalars(2.0, 0.0, -4.0), learning_rate=3.0, beta1=0.5, beta2=0.5, tau=1.0)
    expected = [3 * m / (math.sqrt(v) + 1) for m, v in ((1.0, 2.5), (0.5, 1.25), (-1.75, 8.625))]
    assert found == pytest.approx(expected)


def test_fedyogi_by_hand():
    # As above, but v: 1 + 4/2 = 3 (it was below Δ²), 3 - 0 = 3, then 3 + 16/2 = 11, then 11 - 1/2 = 10.5 (above 1).
    found = moved("fedyogi", scalars(2.0, 0.0, -4.0, 1.0), learning_rate=3.0, beta1=0.5, beta2=0.5, tau=1.0)
    pairs = ((1.0, 3.0), (0.5, 3.0), (-1.75, 11.0), (-0.375, 10.5))
    assert found == pytest.approx([3 * m / (math.sqrt(v) + 1) for m, v in pairs])


def test_fedyogi_leaves_the_second_moment_that_equals_the_square():
    _, state = walked("fedyogi", scalars(0.5), tau=0.5)
    assert state["second_moment.w"].item() == 0.25


def descended(make, gradients):
    """The steps that a torch optimizer takes when the updates are its negative gradients."""
    weight = torch.nn.Parameter(torch.zeros_like(gradients[0]))
    optimizer, steps = make(weight), []
    for delta in gradients:
        before = weight.detach().clone()
        weight.grad = -delta
        optimizer.step()
        steps.append(weight.detach() - before)
    return steps


def test_fedavgm_equals_torch_sgd_with_momentum():
    gradients = [delta["a"].double() for delta in deltas(rounds=6)]
    expected = descended(lambda weight: torch.optim.SGD([weight], lr=0.7, momentum=0.9), gradients)
    found, _ = walked("fedavgm", [{"a": delta.float()} for delta in gradients], learning_rate=0.7)
    for step, wanted in zip(found, expected, strict=True):
        assert torch.allclose(step["a"].double(), wanted, rtol=1e-5, atol=1e-10)


def test_fedadam_equals_torch_adam_long_after_its_first_steps():
    # After 1e9 steps Adam's bias correction is one; its state starts from ours.
    def make(weight):
        optimizer = torch.optim.Adam([weight], lr=0.02, betas=(0.9, 0.99), eps=1e-3)
        second = torch.full_like(weight, 1e-6)
        optimizer.state[weight] = {
            "step": torch.tensor(1e9, dtype=torch.float64),
            "exp_avg": torch.zeros_like(weight),
            "exp_avg_sq": second,
        }
        return optimizer

    gradients = [delta["a"].double() for delta in deltas(rounds=6)]
    expected = descended(make, gradients)
    found, _ = walked("fedadam", [{"a": delta.float()} for delta in gradients], learning_rate=0.02)
    for step, wanted in zip(found, expected, strict=True):
        assert torch.allclose(step["a"].double(), wanted, rtol=1e-5, atol=1e-10)


def test_the_defaults_are_the_papers():
    options = server_optimizer("fedadam", {})[1]
    assert (options.beta1, options.beta2, options.tau) == (0.9, 0.99, 1e-3)
    assert server_optimizer("fedyogi", {})[1] == options
    assert server_optimizer("fedavgm", {})[1].momentum == 0.9


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_steps_have_the_updates_layout_and_the_state_is_float32(name, dtype):
    gradients = deltas(dtype=dtype)
    steps, state = walked(name, gradients)
    for step in steps:
        assert {n: (tuple(t.shape), t.dtype) for n, t in step.items()} == {n: (SHAPES[n], dtype) for n in SHAPES}
    assert all(tensor.dtype == torch.float32 for tensor in state.values())
    assert {n.split(".", 1)[1] for n in state} in (set(), set(SHAPES))


@every
def test_a_stored_state_goes_on_with_the_same_bits(name, tmp_path):
    gradients = deltas(rounds=5)
    whole, end = walked(name, gradients)
    first, state = walked(name, gradients[:2])
    save_tensors(tmp_path / "state.safetensors", state)
    rest, again = walked(name, gradients[2:], load_tensors(tmp_path / "state.safetensors"))
    for step, wanted in zip(first + rest, whole, strict=True):
        assert all(torch.equal(step[n], wanted[n]) for n in SHAPES)
    assert again.keys() == end.keys()
    assert all(torch.equal(again[n], end[n]) for n in end)


@every
def test_what_is_given_stays_as_it_is(name):
    row, options = server_optimizer(name, {})
    first, second = deltas(rounds=2)
    _, state = row.step(first, None, options)
    copies = [{n: t.clone() for n, t in tensors.items()} for tensors in (second, state)]
    row.step(second, state, options)
    for tensors, copy in zip((second, state), copies, strict=True):
        assert all(torch.equal(tensors[n], copy[n]) for n in copy)


@every
def test_updates_of_zero_do_not_move(name):
    steps, _ = walked(name, [{n: torch.zeros(shape) for n, shape in SHAPES.items()}] * 3)
    assert not any(step[n].any() for step in steps for n in SHAPES)


@every
def test_turning_all_updates_turns_the_steps(name):
    gradients = deltas()
    steps, _ = walked(name, gradients)
    turned, _ = walked(name, [{n: -t for n, t in delta.items()} for delta in gradients])
    assert all(torch.equal(a[n], -b[n]) for a, b in zip(steps, turned, strict=True) for n in SHAPES)


@pytest.mark.parametrize("name", ["fedadam", "fedyogi"])
@given(values=st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=8))
def test_no_coordinate_moves_by_more_than_the_learning_rate_over_tau_times_its_momentum(name, values):
    row, options = server_optimizer(name, {})
    state = None
    for delta in scalars(*values):
        step, state = row.step(delta, state, options)
        bound = options.learning_rate / options.tau * state["momentum.w"].abs()
        assert (step["w"].abs() <= bound * 1.0001).all()
        assert (state["second_moment.w"] >= 0).all()


@pytest.mark.parametrize("name", ["fedavgm", "fedadam", "fedyogi"])
def test_a_state_of_another_adapter_or_optimizer_is_refused(name):
    row, options = server_optimizer(name, {})
    (delta,) = deltas(rounds=1)
    _, state = row.step(delta, None, options)
    with pytest.raises(ArtifactError, match=r"momentum\.b is missing"):
        row.step(delta, {n: t for n, t in state.items() if n != "momentum.b"}, options)
    with pytest.raises(ArtifactError, match=r"momentum\.b is torch.float32 \[2\]"):
        row.step(delta, {**state, "momentum.b": torch.zeros(2)}, options)


def test_the_state_of_fedavgm_is_not_that_of_fedadam():
    _, state = walked("fedavgm", deltas())
    with pytest.raises(ArtifactError, match=r"second_moment\.b is missing"):
        walked("fedadam", deltas(), state)


@pytest.mark.parametrize("name", ["fedadam", "fedyogi"])
def test_an_overflow_is_refused_and_not_kept(name):
    with pytest.raises(ArtifactError, match="overflows"):
        walked(name, scalars(1e30))


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("fedadm", {}, "Unknown server optimizer 'fedadm'. Did you mean 'fedadam'"),
        ("fedadam", {"beta": 0.9}, "Unknown option of the server optimizer fedadam 'beta'"),
        ("fedyogi", {"tau": 0.0}, "tau is 0; it must lie between"),
        ("fedavgm", {"momentum": 1.0}, "momentum is 1; it must lie between 0 and 0.9999"),
        ("none", {"learning_rate": 1.0}, "Unknown option of the server optimizer none"),
    ],
)
def test_a_wrong_name_or_option_is_explained(name, options, said):
    with pytest.raises(UsageError) as caught:
        server_optimizer(name, options)
    assert said in str(caught.value)
