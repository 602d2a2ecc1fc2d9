"""What the rounds of a cell's training were like, cut down to what the page of a comparison shows."""

from collections.abc import Mapping
from typing import Any

from fedproxy.artifacts import Manifest
from fedproxy.federation.store import RoundStore
from fedproxy.reporting.conflict import load_conflict
from fedproxy.run_directory import RunDirectory

_DIGITS = 4


def history(run: RunDirectory) -> dict[str, Any]:
    """The proxy of a training and its rounds, in the form of a results.json; numbers to four decimals.

    `rounds[i].conflict` is the mean conflict (FedProxy, Eq. 7) of each LLM block, of rounds that keep it.

    Args:
        run: The training.

    Raises:
        ArtifactError: the proxy's manifest, a round or its conflict is damaged.
    """
    proxy = Manifest.read(run.path / "proxy")
    conflict = {each.round: each.blocks for each in load_conflict(run.path, proxy.layer_map)}
    return {
        "proxy": {"layer_map": proxy.layer_map, "scores": proxy.scores or []},
        "rounds": [
            _round(record, conflict.get(record["round"], {})) for record in RoundStore(run.path / "rounds").records()
        ],
    }


def _round(record: Mapping[str, Any], conflict: Mapping[int, float]) -> dict[str, Any]:
    analysis = record["analysis"]
    return {
        "round": record["round"],
        "clients": {
            name: {"rows": client["rows"], "loss": _rounded(client["loss"])}
            for name, client in record["clients"].items()
        },
        "quarantined": record["quarantined"],
        "analysis": {
            "names": analysis["names"],
            **{
                key: _rounded(analysis[key])
                for key in ("similarity", "heterogeneity", "weights", "retention", "conflict_mean")
            },
        },
        "conflict": {str(block): _rounded(mean) for block, mean in conflict.items()},
    }


def _rounded(value: Any) -> Any:
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    return None if value is None else round(value, _DIGITS)
