"""Federated tuning of a large language model through a proxy: the model and the data stay with their owners.

    proxy = fedproxy.compress(llm, out, remove=0.5, calibration="public.txt")
    run = fedproxy.federate("experiment.toml", "runs/first")
    path = fedproxy.fuse(llm, run.adapter, "tuned")
    merged, analysis = fedproxy.merge(updates, rule="h-ties")
    table = fedproxy.compare("experiment.toml", "runs/comparison")

`compress`, `fuse` and `evaluate` take models in memory, too; `attach_adapter` and `client_update` are a client's part
of a federation with a loop of its own. Importing the package is cheap: torch is loaded with the first use of a name.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedproxy.comparison import compare
    from fedproxy.config import Train
    from fedproxy.federation.client_update import client_update
    from fedproxy.models.trainable import attach_adapter
    from fedproxy.pipeline import (
        Proxy,
        Run,
        compress,
        evaluate,
        federate,
        fuse,
        merge,
        merge_files,
        register_encoding,
        register_regulariser,
        register_rule,
        register_score,
        register_space,
        report,
        run,
    )

__all__ = [
    "Proxy",
    "Run",
    "Train",
    "attach_adapter",
    "client_update",
    "compare",
    "compress",
    "evaluate",
    "federate",
    "fuse",
    "merge",
    "merge_files",
    "register_encoding",
    "register_regulariser",
    "register_rule",
    "register_score",
    "register_space",
    "report",
    "run",
]
_HOMES = {
    "Train": "config",
    "attach_adapter": "models.trainable",
    "client_update": "federation.client_update",
    "compare": "comparison",
}
"""Where names come from that are not from `pipeline`."""
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'fedproxy' has no attribute {name!r}")
    return getattr(importlib.import_module(f"fedproxy.{_HOMES.get(name, 'pipeline')}"), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
