"""Packages of others, as an installer leaves them: modules, and a folder that names their entry points."""

from collections.abc import Mapping
from pathlib import Path

MODULE = '''
"""A choice on every axis, none of them the house's."""
from dataclasses import dataclass, replace

import torch

from fedproxy.aggregation.merge import RULES
from fedproxy.aggregation.regularise import Carried, Regulariser
from fedproxy.aggregation.space import SPACES
from fedproxy.compression.scores import Importance, Registered
from fedproxy.compression.select import lowest
from fedproxy.federation.wire.dense import dense
from fedproxy.federation.wire.floats import FloatOptions, floats

RULE = replace(
    RULES["mean"], name="half-mean", combine=lambda values, weights, options: (weights[:, None] * values).sum(0) / 2
)


def last_first(stream, passages, *, most, among, seed, progress):
    scores = [float(-block) for block in range(len(stream))]
    return Importance(scores, lowest(scores, most, among))


SCORE = Registered("last-first", last_first, reads_text=False)


def mean(server, done, clients):
    if not all(one.numbers["loss"] > 0 for one in done):
        raise AssertionError("a training without a loss")
    return {name: sum(one.update[name].float() for one in done) / clients for name in done[0].update}


REGULARISER = Regulariser(
    "inertia",
    carried=Carried(
        name="last update",
        numbers=("loss",),
        drift=lambda server, own: {name: -0.1 * value for name, value in (server or {}).items()},
        client=lambda own, server, done: {name: value.float() for name, value in done.update.items()},
        server=mean,
        check=lambda done: None,
        odd=lambda done, ratio: {},
    ),
)
SPACE = replace(SPACES["frozen-a"], name="only-b")
ENCODING = dense("fp16", FloatOptions, lambda options: floats(torch.float16))
'''
POINTS = {
    "fedproxy.rules": {"half-mean": "others:RULE"},
    "fedproxy.scores": {"last-first": "others:SCORE"},
    "fedproxy.regularisers": {"inertia": "others:REGULARISER"},
    "fedproxy.spaces": {"only-b": "others:SPACE"},
    "fedproxy.encodings": {"fp16": "others:ENCODING"},
}
FEDERATE = {"merge": "half-mean", "regulariser": "inertia", "space": "only-b", "wire": "fp16", "wire_down": "fp16"}
"""Settings that name all of them that [federate] has."""


def install(folder: Path, package: str, points: Mapping[str, Mapping[str, str]], **modules: str) -> Path:
    """Put a package into a folder, which is to be on the path."""
    about = folder / f"{package}-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    lines = [
        line for group, rows in points.items() for line in (f"[{group}]", *(f"{k} = {v}" for k, v in rows.items()))
    ]
    (about / "entry_points.txt").write_text("\n".join(lines) + "\n")
    for name, text in modules.items():
        (folder / f"{name}.py").write_text(text)
    return folder


def install_others(folder: Path) -> Path:
    """The package with a choice on every axis."""
    return install(folder, "others", POINTS, others=MODULE)
