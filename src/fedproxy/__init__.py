"""Federated tuning of a large language model through a proxy: the model and the data stay with their owners.

    proxy = fedproxy.compress(llm, out, remove=0.5, calibration="public.txt")
    run = fedproxy.federate("experiment.toml", "runs/first")
    path = fedproxy.fuse(llm, run.adapter, "tuned")
    merged, analysis = fedproxy.merge(updates, rule="h-ties")
    table = fedproxy.compare("experiment.toml", "runs/comparison")

`compress`, `fuse` and `evaluate` take models in memory, too; `attach_adapter` and `client_update` are a client's part
of a federation with a loop of its own. Importing the package is cheap: torch is loaded with the first use of a name.
"""

import pkgutil
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedproxy.aggregation.merge import RULES, merge
    from fedproxy.aggregation.regularise import REGULARISERS
    from fedproxy.aggregation.space import SPACES
    from fedproxy.comparison import compare
    from fedproxy.compression.compress import Proxy, compress
    from fedproxy.compression.scores import SCORES
    from fedproxy.config import Train
    from fedproxy.evaluation import evaluate
    from fedproxy.federation.client_update import client_update
    from fedproxy.federation.merge_files import merge_files
    from fedproxy.federation.wire import ENCODINGS
    from fedproxy.fusion import fuse
    from fedproxy.models.trainable import attach_adapter
    from fedproxy.pipeline import Run, federate, run
    from fedproxy.reporting import report

    register_rule, register_score, register_regulariser = RULES.register, SCORES.register, REGULARISERS.register
    register_space, register_encoding = SPACES.register, ENCODINGS.register

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
    "Proxy": "compression.compress:Proxy",
    "Train": "config:Train",
    "attach_adapter": "models.trainable:attach_adapter",
    "client_update": "federation.client_update:client_update",
    "compare": "comparison:compare",
    "compress": "compression.compress:compress",
    "evaluate": "evaluation:evaluate",
    "fuse": "fusion:fuse",
    "merge": "aggregation.merge:merge",
    "merge_files": "federation.merge_files:merge_files",
    "register_encoding": "federation.wire:ENCODINGS.register",
    "register_regulariser": "aggregation.regularise:REGULARISERS.register",
    "register_rule": "aggregation.merge:RULES.register",
    "register_score": "compression.scores:SCORES.register",
    "register_space": "aggregation.space:SPACES.register",
    "report": "reporting:report",
}
"""Where names come from that are not from `pipeline`."""
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'fedproxy' has no attribute {name!r}")
    return pkgutil.resolve_name(f"fedproxy.{_HOMES.get(name, f'pipeline:{name}')}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
