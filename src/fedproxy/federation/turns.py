"""Who is asked in which round, and how many optimizer steps that makes."""

from collections.abc import Collection, Mapping

from fedproxy.config import Experiment
from fedproxy.federation.coordinator import Coordinator
from fedproxy.models.training import optimizer_steps


def turns(experiment: Experiment, names: Collection[str]) -> dict[str, list[int]]:
    """The rounds that each client is asked in, if all are there and answer; by name, sorted.

    Args:
        experiment: The experiment.
        names: The clients' names.
    """
    coordinator = Coordinator(names, {}, experiment.federate, seed=experiment.seed)
    found: dict[str, list[int]] = {name: [] for name in sorted(names)}
    for number in range(1, experiment.federate.rounds + 1):
        for name in coordinator.chosen(names, number):
            found[name].append(number)
    return found


def steps_of_all(experiment: Experiment, counts: Mapping[str, int]) -> int:
    """Optimizer steps that all clients take in all rounds: what training on the pooled rows takes.

    Args:
        experiment: The experiment.
        counts: How many rows each client trains on, by name.
    """
    asked = turns(experiment, counts)
    return sum(len(asked[name]) * optimizer_steps(count, experiment.train) for name, count in counts.items())
