"""Server optimizers: the merged update of a round is a pseudo-gradient, and the rounds before steer the step.

The state is a flat mapping of float32 tensors, `momentum.NAME` and `second_moment.NAME` for each tensor NAME of the
update, so that it is stored and read back like an adapter, and a resumed run goes on with the same bits.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

from fedproxy.errors import ArtifactError
from fedproxy.registry import Axis, build, require_range
from fedproxy.tensors import Tensors

Options = TypeVar("Options")
State = dict[str, torch.Tensor]
Step = Callable[[Tensors, Tensors | None, Options], tuple[dict[str, torch.Tensor], State]]

MOMENTUM, SECOND_MOMENT = "momentum", "second_moment"


@dataclass(frozen=True)
class ServerOptimizer(Generic[Options]):
    """A server optimizer.

    Attributes:
        name: Its name in configurations.
        options: Frozen dataclass of its options with defaults; it checks their values.
        step: The merged update, the state after the round before (none before the first) and the options → what is
            added to the global adapter, in the update's dtypes, and the new state. Nothing given is changed.
    """

    name: str
    options: type[Options]
    step: Step[Options]


@dataclass(frozen=True)
class NoneOptions:
    """`none` has no options."""


@dataclass(frozen=True)
class FedAvgMOptions:
    """Options of `fedavgm`.

    Attributes:
        learning_rate: η.
        momentum: β; 0.9 in the paper's experiments.
    """

    learning_rate: float = 1.0
    momentum: float = 0.9

    def __post_init__(self) -> None:
        require_range("fedavgm", "learning_rate", self.learning_rate, 0.0, 1e6)
        require_range("fedavgm", "momentum", self.momentum, 0.0, 0.9999)


@dataclass(frozen=True)
class AdaptiveOptions:
    """Options of `fedadam` and `fedyogi`.

    β1, β2 and τ are those of the paper's experiments; η it tunes for each task. A coordinate moves by at most η/τ
    times its momentum, where updates are far below τ, and by about η where they are far above.

    Attributes:
        learning_rate: η.
        beta1: Decay of the momentum.
        beta2: Decay of the second moment.
        tau: Adaptivity τ, in units of the update.
    """

    learning_rate: float = 1e-2
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3

    def __post_init__(self) -> None:
        require_range("server optimizer", "learning_rate", self.learning_rate, 0.0, 1e6)
        require_range("server optimizer", "beta1", self.beta1, 0.0, 0.9999)
        require_range("server optimizer", "beta2", self.beta2, 0.0, 0.9999)
        require_range("server optimizer", "tau", self.tau, 1e-12, 1e6)


def none(delta: Tensors, state: Tensors | None, options: NoneOptions) -> tuple[dict[str, torch.Tensor], State]:
    """The merged update as it is: φ_{t+1} = φ_t + Δ_t."""
    return dict(delta), {}


def fedavgm(delta: Tensors, state: Tensors | None, options: FedAvgMOptions) -> tuple[dict[str, torch.Tensor], State]:
    """Momentum: m_t = β m_{t-1} + Δ_t from m_0 = 0, and φ_{t+1} = φ_t + η m_t.

    Args:
        delta: Δ_t, the merged update.
        state: m_{t-1}; none before the first round.
        options: η and β.

    Returns:
        η m_t, and m_t.

    Raises:
        ArtifactError: the state is not of this update, or overflows.

    Reference: Hsu, Qi, Brown, "Measuring the Effects of Non-Identical Data Distribution for Federated Visual
    Classification", 2019. Reddi et al. call it FedAvgM too.
    """
    update, after = {}, {}
    for name, gradient in delta.items():
        m = options.momentum * _slot(state, MOMENTUM, name, gradient, 0.0) + gradient.float()
        after[f"{MOMENTUM}.{name}"] = m
        update[name] = (options.learning_rate * m).to(gradient.dtype)
    _check_finite(after)
    return update, after


def fedadam(delta: Tensors, state: Tensors | None, options: AdaptiveOptions) -> tuple[dict[str, torch.Tensor], State]:
    """Adam on the server; the second moment is v_t = β2 v_{t-1} + (1 - β2) Δ_t² (see `_adaptive`)."""
    return _adaptive(delta, state, options, lambda v, square: options.beta2 * v + (1.0 - options.beta2) * square)


def fedyogi(delta: Tensors, state: Tensors | None, options: AdaptiveOptions) -> tuple[dict[str, torch.Tensor], State]:
    """Yogi on the server; the second moment is v_t = v_{t-1} - (1 - β2) Δ_t² sign(v_{t-1} - Δ_t²) (see `_adaptive`).

    Unlike Adam's it comes down slowly after a large update, by at most (1 - β2) Δ_t² a round.
    """
    return _adaptive(delta, state, options, lambda v, square: v - (1.0 - options.beta2) * square * (v - square).sign())


def _adaptive(
    delta: Tensors,
    state: Tensors | None,
    options: AdaptiveOptions,
    second_moment: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> tuple[dict[str, torch.Tensor], State]:
    """m_t = β1 m_{t-1} + (1 - β1) Δ_t and φ_{t+1} = φ_t + η m_t / (√v_t + τ), from m_0 = 0 and v_0 = τ².

    There is no correction of the first rounds' bias, as in the paper.

    Args:
        delta: Δ_t, the merged update.
        state: m_{t-1} and v_{t-1}; none before the first round.
        options: η, β1, β2 and τ.
        second_moment: v_{t-1} and Δ_t² → v_t.

    Returns:
        η m_t / (√v_t + τ), and m_t and v_t.

    Raises:
        ArtifactError: the state is not of this update, or overflows.

    Reference: Reddi et al., "Adaptive Federated Optimization", 2021, Alg. 2.
    """
    update, after = {}, {}
    for name, gradient in delta.items():
        wide = gradient.float()
        m = options.beta1 * _slot(state, MOMENTUM, name, gradient, 0.0) + (1.0 - options.beta1) * wide
        v = second_moment(_slot(state, SECOND_MOMENT, name, gradient, options.tau**2), wide.square())
        after[f"{MOMENTUM}.{name}"], after[f"{SECOND_MOMENT}.{name}"] = m, v
        update[name] = (options.learning_rate * m / (v.sqrt() + options.tau)).to(gradient.dtype)
    _check_finite(after)
    return update, after


def _slot(state: Tensors | None, slot: str, name: str, like: torch.Tensor, initial: float) -> torch.Tensor:
    """One tensor of the state, or its first value."""
    if state is None:
        return torch.full_like(like, initial, dtype=torch.float32)
    value = state.get(f"{slot}.{name}")
    if value is None or value.shape != like.shape or value.dtype != torch.float32:
        found = "missing" if value is None else f"{value.dtype} {list(value.shape)}"
        raise ArtifactError(
            f"The server optimizer's state does not fit: {slot}.{name} is {found}, expected torch.float32 "
            f"{list(like.shape)}. Resume with the server optimizer and the adapter that the run began with."
        )
    return value.to(like.device)


def _check_finite(state: State) -> None:
    for name, value in state.items():
        if not value.isfinite().all():
            raise ArtifactError(
                f"The server optimizer's {name} overflows float32: the merged update is far too large. Limit the "
                "updates' norms with clip_norm."
            )


SERVER_OPTIMIZERS: Axis[ServerOptimizer[Any]] = Axis(
    "server optimizer",
    "fedproxy.server_optimizers",
    ServerOptimizer,
    {
        row.name: row
        for row in (
            ServerOptimizer("none", NoneOptions, none),
            ServerOptimizer("fedavgm", FedAvgMOptions, fedavgm),
            ServerOptimizer("fedadam", AdaptiveOptions, fedadam),
            ServerOptimizer("fedyogi", AdaptiveOptions, fedyogi),
        )
    },
)


def server_optimizer(name: str, given: Mapping[str, object]) -> tuple[ServerOptimizer[Any], Any]:
    """The server optimizer called `name` and its options, as an experiment gives them.

    Raises:
        UsageError: there is none of that name, an option is unknown, or its value of the wrong type or out of range.
    """
    row = SERVER_OPTIMIZERS.choose(name)
    return row, build("server optimizer", name, row.options, given)
