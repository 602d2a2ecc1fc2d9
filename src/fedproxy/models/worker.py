"""What a process does that was launched beside the leader: load what it loads, compute its share of every step."""

import contextlib

import torch

from fedproxy.errors import FedproxyError
from fedproxy.models.gradients import in_training
from fedproxy.models.lora import AdaptedModel, adapter_parameters
from fedproxy.models.parallel import Begin, Load, Step, Team, compute_share
from fedproxy.models.trainable import load_share
from fedproxy.seeds import derive_seed


def serve(team: Team) -> None:
    """Carry out the leader's orders; the process ends with the leader's."""
    model: AdaptedModel | None = None
    while True:
        order = team.take()
        if isinstance(order, Load):
            model = None
            with contextlib.suppress(FedproxyError, RuntimeError, MemoryError):  # the leader says so
                model = load_share(team, order.arguments)
        elif isinstance(order, Begin) and model is not None:
            _train(team, model, order)


def _train(team: Team, model: AdaptedModel, order: Begin) -> None:
    model.to(team.device)
    parameters = {}
    for name, parameter in adapter_parameters(model).items():
        parameter.grad = None  # of a training that failed
        parameter.requires_grad_(name in order.trained)
        if name in order.trained:
            parameters[name] = parameter
    with in_training(model, order.settings, order.pad) as alone:
        torch.manual_seed(derive_seed(order.seed, "dropout", team.rank))
        while isinstance(step := team.take(), Step):
            try:
                compute_share(team, model, parameters, step, alone)
            except FedproxyError:
                continue  # the leader says so, and ends the training
