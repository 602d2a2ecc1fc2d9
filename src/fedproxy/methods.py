"""The methods of the offsite-tuning family and their baselines: rows of data, each a choice on every axis.

A variant of [compare] is one more row: a method's, with some settings of its own.

What a row does not choose is the experiment's: prompts, steps, batches and LoRA are the same for all; encodings and
limits of norm for all that federate; what is merged for all but FedProxy as published. Pooled rows, or a client alone,
are trained on without any of these.
One departure is common to all rows: what trains is LoRA, also where a paper trains the weights themselves.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from fedproxy.config import VARIED, Compare, Experiment, Federate, Variant
from fedproxy.registry import Axis

Settings = Mapping[str, Mapping[str, Any]]
"""Table of the experiment file → key → value."""

_PLAIN: Settings = {
    "train": {"blocks": "all"},
    "heal": {"realign_steps": 0},
    "federate": {"merge": "mean", "server_optimizer": "none", "regulariser": "none"},
}
"""FedAvg on a proxy of which all blocks train: what a row's own settings start from."""
_WHOLE: Settings = {
    "compress": {"remove": 0.0, "score": "uniform", "keep_first": 0, "keep_last": 0},
    "heal": {"refit": 0, "steps": 0},
}
"""No proxy: the LLM itself with all its blocks."""
_OFFSITE: Settings = {
    "compress": {"score": "uniform", "keep_first": 2, "keep_last": 2},
    "heal": {"spare_ends": True},
    "train": {"blocks": [0, 1, -2, -1]},
}
"""Offsite tuning with l = r = 2: the ends train, and the blocks between are dropped evenly."""
_PUBLISHED: Settings = {
    "compress": {"score": "block-influence", "keep_first": 0, "keep_last": 0},
    "heal": {"refit": 0, "steps": 0},
    "federate": {
        "merge": "h-ties",
        "merge_options": {},
        "regulariser": "pcr",
        "regulariser_strength": None,
        "space": "factors",
    },
    "fuse": {"scale": 1.0, "public": ""},
}
"""FedProxy with every choice that the paper makes, whatever the experiment chooses."""
_OPTIONS = {"merge": "merge_options", "server_optimizer": "server_options", "regulariser": "regulariser_strength"}
"""Choices in [federate], and the key of their options."""


@dataclass(frozen=True)
class Method:
    """One method.

    Attributes:
        name: Its name in `[compare] methods`.
        paper: Where it comes from; empty for what needs no paper.
        data: Who trains: "none"; "each" client alone, with the steps that it has in a federation (one round of them at
            least); one party with the "pooled" rows and all clients' steps; or the "clients" in a federation.
        result: The model that it is judged by: the untuned "llm" or "proxy", the LLM with the trained blocks plugged in
            ("fused"), or the LLM steered by the tuned proxy at decode time ("proxy_tuning").
        settings: What it sets in the experiment.
        unless_set: What it sets where the experiment leaves the default.
    """

    name: str
    paper: str
    data: Literal["none", "each", "pooled", "clients"]
    result: Literal["llm", "proxy", "fused", "proxy_tuning"] = "fused"
    settings: Settings = field(default_factory=dict)
    unless_set: Settings = field(default_factory=dict)

    @property
    def whole(self) -> bool:
        """Whether the LLM itself is tuned, not a proxy."""
        return self.settings.get("compress", {}).get("remove") == 0.0

    @property
    def rows_travel(self) -> bool:
        """Whether the clients' rows go to the owner of the LLM, in place of a proxy to them."""
        return self.whole and self.data == "pooled"

    @property
    def axes(self) -> dict[str, str]:
        """Its choice on each axis; "experiment" where it has none of its own."""
        chosen = {table: {**_PLAIN.get(table, {}), **self.settings.get(table, {})} for table in VARIED}
        trains, federated = self.data != "none", self.data == "clients"
        proxy = not self.whole and self.result != "llm"
        blocks = chosen["train"]["blocks"]
        heal = [name for name in ("spare_ends", "realign_steps") if chosen["heal"].get(name)]
        return {
            "data": self.data,
            "score": str(chosen["compress"].get("score", "experiment")) if proxy else "none",
            "heal": ", ".join(["experiment", *heal]) if proxy and chosen["heal"].get("steps") != 0 else "none",
            "blocks": str(blocks) if trains else "none",
            "regulariser": chosen["federate"]["regulariser"] if federated else "none",
            "merge": chosen["federate"]["merge"] if federated else "none",
            "space": chosen["federate"].get("space", "experiment") if federated else "none",
            "server_optimizer": chosen["federate"]["server_optimizer"] if federated else "none",
            "fuse": {"fused": "plug-in", "proxy_tuning": "proxy-tuning"}.get(self.result, "none"),
        }


def _federated(name: str, paper: str, **federate: str) -> Method:
    return Method(name, paper, "clients", settings={"federate": federate} if federate else {})


ZERO_SHOT, CENTRALIZED, FEDPROXY = "zero-shot", "centralized", "fedproxy"
_HOUSE = (
    Method(ZERO_SHOT, "", "none", "llm"),
    Method("zero-shot-proxy", "", "none", "proxy"),
    Method("local", "", "each"),
    Method(CENTRALIZED, "Hu et al. 2021, arXiv 2106.09685", "pooled", settings=_WHOLE),
    Method("centralized-proxy", "", "pooled"),
    Method("fedavg-llm", "McMahan et al. 2017, arXiv 1602.05629", "clients", settings=_WHOLE),
    _federated("fedavg", "McMahan et al. 2017, arXiv 1602.05629"),
    _federated("fedprox", "Li et al. 2020, arXiv 1812.06127", regulariser="fedprox"),
    _federated("fedavgm", "Hsu et al. 2019, arXiv 1909.06335", server_optimizer="fedavgm"),
    _federated("fedadam", "Reddi et al. 2021, arXiv 2003.00295", server_optimizer="fedadam"),
    _federated("scaffold", "Karimireddy et al. 2020, arXiv 1910.06378", regulariser="scaffold"),
    _federated("ties", "Yadav et al. 2023, arXiv 2306.01708", merge="ties"),
    Method("offsite-tuning", "Xiao et al. 2023, arXiv 2302.04870", "pooled", settings=_OFFSITE),
    Method("fedot", "Kuang et al. 2023, arXiv 2309.00363", "clients", settings=_OFFSITE),
    Method(
        "fedbiot",
        "Wu et al. 2024, arXiv 2406.17706",
        "clients",
        settings={
            "compress": {"score": "uniform", "keep_first": 0, "keep_last": 2},
            "heal": {"spare_ends": True, "realign_steps": 10},
            "train": {"blocks": [-2, -1]},
            "federate": {"regulariser": "fedprox"},
        },
        unless_set={"heal": {"steps": 500}},
    ),
    Method("proxy-tuning", "Liu et al. 2024, arXiv 2401.08565", "clients", "proxy_tuning"),
    _federated("h-ties", "Fan et al. 2026, arXiv 2604.19015", merge="h-ties"),
    _federated("pcr", "Fan et al. 2026, arXiv 2604.19015", regulariser="pcr"),
    _federated(FEDPROXY, "Fan et al. 2026, arXiv 2604.19015", merge="h-ties", regulariser="pcr"),
    Method("fedproxy-paper", "Fan et al. 2026, arXiv 2604.19015", "clients", settings=_PUBLISHED),
)
METHODS: Axis[Method] = Axis("method", "fedproxy.methods", Method, {method.name: method for method in _HOUSE})


def methods_of(compare: Compare) -> dict[str, Method]:
    """The rows of a comparison by name: the methods that it asks for, then its variants."""
    asked = {name: row for name, row in METHODS.items() if not compare.methods or name in compare.methods}
    return asked | {variant.name: _row(variant) for variant in compare.variant}


def _row(variant: Variant) -> Method:
    base = METHODS.choose(variant.method)
    settings = {table: {**base.settings.get(table, {}), **variant.settings.get(table, {})} for table in VARIED}
    return dataclasses.replace(base, name=variant.name, settings={table: s for table, s in settings.items() if s})


def configured(method: Method, experiment: Experiment, *, seed: int, remove: float) -> Experiment:
    """The experiment as a method has it.

    Options of a merge rule, a server optimizer or a regulariser stay where the experiment names the same one, unless
    the method sets them.

    Args:
        method: The method.
        experiment: The experiment that all methods share.
        seed: Its seed.
        remove: Share of the LLM's blocks that is removed, unless the method takes the LLM itself.

    Example:
        >>> from fedproxy.config import LLM, Compress
        >>> shared = Experiment(llm=LLM("llm"), compress=Compress(calibration="public.txt"))
        >>> configured(METHODS["fedavg-llm"], shared, seed=1, remove=0.5).compress.remove
        0.0
    """
    settings: dict[str, dict[str, Any]] = {table: dict(_PLAIN.get(table, {})) for table in VARIED}
    settings["compress"]["remove"] = remove
    for table, values in method.unless_set.items():
        given = getattr(experiment, table)
        defaults = {item.name: item.default for item in dataclasses.fields(given)}
        settings[table] |= {key: value for key, value in values.items() if getattr(given, key) == defaults[key]}
    for table, values in method.settings.items():
        settings[table] |= values
    fresh = Federate()
    for choice, options in _OPTIONS.items():
        if settings["federate"][choice] != getattr(experiment.federate, choice):
            settings["federate"].setdefault(options, getattr(fresh, options))
    tables = {table: dataclasses.replace(getattr(experiment, table), **values) for table, values in settings.items()}
    return dataclasses.replace(experiment, seed=seed, **tables)
