"""A cell of the comparison: one method, with one seed, at one share of removed blocks."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fedproxy.artifacts import Manifest
from fedproxy.checkpoint_files import weight_files
from fedproxy.comparison.costs import Matrices, matrices, reading, training
from fedproxy.comparison.work import Scored, Work, cost_of_fusing, digest, mean_scored, tuned_adapter
from fedproxy.compression.realign import aligned_tokens, last_aligned
from fedproxy.config import Experiment, Federate
from fedproxy.federation.messages import size_in_bytes
from fedproxy.federation.store import RoundStore
from fedproxy.layer_map import split_name
from fedproxy.methods import Method, configured
from fedproxy.models.checkpoints import load_tokenizer, resolve
from fedproxy.models.encoding import Encoded
from fedproxy.models.lora import WEIGHTS_FILE
from fedproxy.models.training import optimizer_steps
from fedproxy.pipeline import scored_tasks
from fedproxy.run_directory import RunDirectory
from fedproxy.tensor_files import read_header
from fedproxy.tuning import ALIGNMENT, Rows, encode_clients

POOLED = "pooled"


@dataclass(frozen=True)
class Cell:
    """What a cell found.

    Attributes:
        record: What cell.json holds.
        scored: The scores of the method's model.
    """

    record: dict[str, Any]
    scored: Scored


class Bench:
    """What all cells of a comparison have in common.

    Args:
        experiment: The experiment.
        rows: Each client's rows; `local` needs them apart, `centralized` together.
        work: The shared work.
    """

    def __init__(self, experiment: Experiment, rows: Mapping[str, Rows], work: Work) -> None:
        self.experiment, self.rows, self._work = experiment, dict(rows), work
        self.tasks = scored_tasks(experiment)
        self._encoded: dict[str, list[Encoded]] = {}
        self._sizes: dict[Path, Matrices] = {}

    def cell(self, method: Method, seed: int, remove: float) -> Cell:
        """Run one cell.

        Raises:
            As `pipeline.run`.
        """
        experiment = configured(method, self.experiment, seed=seed, remove=remove)
        if method.data == "none":
            scored, tuned, costs = self._untuned(method, experiment)
        elif method.data == "each":
            scored, tuned, costs = self._alone(method, experiment)
        else:
            scored, tuned, costs = self._together(method, experiment)
        record = {
            "method": method.name,
            "seed": seed,
            "remove": remove,
            "experiment_sha256": digest(dataclasses.replace(experiment, compare=None).as_dict()),
            "accuracy": scored.as_dict(),
            "proxy_tuned": tuned and tuned.as_dict(),
            "worst": self._worst(scored),
            **costs,
        }
        return Cell(record, scored)

    def _worst(self, scored: Scored) -> dict[str, Any]:
        """The client's task with the lowest score; of all tasks, where clients have none of their own."""
        own = [client.task for client in self.experiment.client if client.task in scored.tasks]
        task = min(own or scored.tasks, key=lambda name: (scored.tasks[name], name))
        return {"task": task, "accuracy": scored.tasks[task]}

    def _untuned(self, method: Method, experiment: Experiment) -> tuple[Scored, None, dict[str, Any]]:
        if method.result == "llm":
            scored = self._work.score(experiment, "llm", self.tasks, experiment.llm.path)
            return scored, None, _costs(seconds={"evaluate": scored.seconds})
        proxy = self._work.proxy(experiment)
        scored = self._work.score(experiment, f"{proxy.name}-proxy", self.tasks, proxy)
        made = self._work.cost_of_proxy(proxy)
        return (
            scored,
            None,
            _costs(
                exposed=_share(proxy),
                proxy_bytes=_bytes(proxy),
                flops={"server": self._healing(experiment, proxy), "clients": 0.0, "client_most": 0.0},
                peak={"server": made.get("peak_memory_bytes"), "clients": None},
                seconds={"compress": made.get("seconds"), "evaluate": scored.seconds},
            ),
        )

    def _together(self, method: Method, experiment: Experiment) -> tuple[Scored, Scored | None, dict[str, Any]]:
        """One training on all rows: a federation, or of one party with the pooled rows."""
        rows, label = self.rows, "clients"
        if method.data == "pooled":
            experiment, rows, label = self._pooled(experiment)
        run = self._work.training(experiment, rows, label)
        scored, tuned = self._scores(method, experiment, run, self.tasks)
        costs = self._spent(experiment, [run], [scored] if tuned is None else [scored, tuned])
        if method.whole and method.data == "pooled":  # the rows travel, not the model
            flops = {"server": costs["flops"]["clients"], "clients": 0.0, "client_most": 0.0}
            peak = {"server": costs["peak_memory_bytes"]["clients"], "clients": None}
            nothing = {"exposed": 0.0, "proxy_bytes": 0, "bytes_up": 0, "bytes_down": 0}
            costs = {**costs, **nothing, "flops": flops, "peak_memory_bytes": peak}
        return scored, tuned, costs

    def _alone(self, method: Method, experiment: Experiment) -> tuple[Scored, Scored | None, dict[str, Any]]:
        """A training of each client alone; a client is scored on its own task, or on all where it has none."""
        alone = dataclasses.replace(experiment, federate=_of_one(experiment))
        own = {client.name: client.task for client in experiment.client if client.task in self.tasks}
        runs, scored, tuned = [], [], []
        for name, rows in self.rows.items():
            run = self._work.training(alone, {name: rows}, f"alone: {name}")
            fused, proxy = self._scores(method, alone, run, [own[name]] if name in own else self.tasks)
            runs.append(run)
            scored.append(fused)
            tuned.append(proxy)
        proxies = [one for one in tuned if one is not None]
        costs = self._spent(alone, runs, [*scored, *proxies])
        last = [RoundStore(run.path / "rounds").records()[-1] for run in runs]
        costs["bytes_up"] = sum(client["bytes_up"] for record in last for client in record["clients"].values())
        costs["bytes_down"] = 0  # nothing but the proxy comes, nothing but the last adapter goes
        return mean_scored(scored), mean_scored(proxies) if proxies else None, costs

    def _pooled(self, experiment: Experiment) -> tuple[Experiment, dict[str, Rows], str]:
        """One client with all rows, that takes in one round as many steps as all clients took in all."""
        if not self._encoded:
            llm = resolve(experiment.llm.path)
            tokenizer = load_tokenizer(llm, trust_remote_code=experiment.llm.trust_remote_code)
            self._encoded = encode_clients(self.rows, tokenizer, experiment)
        train = experiment.train
        counts = [len(examples) for examples in self._encoded.values()]
        steps = experiment.federate.rounds * sum(optimizer_steps(count, train) for count in counts)
        a_epoch = optimizer_steps(sum(counts), dataclasses.replace(train, epochs=1.0, max_steps=None))
        pooled = dataclasses.replace(
            experiment,
            client=tuple(dataclasses.replace(client, lora_r=None) for client in experiment.client),
            train=dataclasses.replace(train, epochs=steps / a_epoch + 1.0, max_steps=steps),
            federate=dataclasses.replace(_of_one(experiment), rounds=1, deadline=""),
        )
        name = next(iter(self.rows)) if len(self.rows) == 1 else POOLED
        return pooled, {name: [row for part in sorted(self.rows) for row in self.rows[part]]}, POOLED

    def _scores(
        self, method: Method, experiment: Experiment, run: RunDirectory, tasks: list[str]
    ) -> tuple[Scored, Scored | None]:
        """Of the method's model, and of the tuned proxy, unless that is the LLM itself."""
        path, llm, name = run.path, experiment.llm.path, run.path.name
        if method.result == "proxy_tuning":
            scored = self._work.score(
                experiment, f"{name}-proxy-tuning", tasks, llm, tuned_adapter(path), path / "proxy"
            )
        else:
            scored = self._work.score(experiment, f"{name}-fused", tasks, llm, path / "fused")
        if method.whole:
            return scored, None
        proxy = path / "proxy"
        return scored, self._work.score(experiment, f"{name}-proxy-tuned", tasks, proxy, tuned_adapter(path))

    def _spent(self, experiment: Experiment, runs: list[RunDirectory], scored: list[Scored]) -> dict[str, Any]:
        """What trainings on one proxy cost, all together."""
        proxy = (runs[0].path / "proxy").resolve()
        made, spent = self._work.cost_of_proxy(proxy), [run.seconds() for run in runs]
        trained = [self._trained(experiment, run, self._matrices(proxy)) for run in runs]
        clients = [client for one in trained for client in one.clients]
        flops = [client.flops for client in clients]
        served = [cost["peak_memory_bytes"] for cost in (made, *map(cost_of_fusing, runs)) if cost]
        return {"trainings": [run.path.name for run in runs]} | _costs(
            exposed=_share(proxy),
            proxy_bytes=_bytes(proxy),
            bytes_up=sum(client.up for client in clients),
            bytes_down=sum(client.down for client in clients),
            flops={
                "server": self._healing(experiment, proxy) + sum(one.aligning for one in trained),
                "clients": sum(flops),
                "client_most": max(flops),
            },
            peak={"server": max(served, default=None), "clients": max(client.memory for client in clients)},
            seconds={
                "compress": made.get("seconds"),
                **{stage: sum(one.get(stage, 0.0) for one in spent) for stage in ("federate", "fuse")},
                "evaluate": sum(one.seconds for one in scored),
            },
        )

    def _trained(self, experiment: Experiment, run: RunDirectory, proxy: Matrices) -> "_Trained":
        shapes = {name: entry[1] for name, entry in read_header(run.path / "adapter" / WEIGHTS_FILE).entries.items()}
        entries, blocks = sum(map(math.prod, shapes.values())), {split_name(name)[1] for name in shapes}
        extra, tokens = last_aligned(run.path / ALIGNMENT), aligned_tokens(run.path / ALIGNMENT)
        found: dict[str, list[dict[str, Any]]] = {}
        for record in RoundStore(run.path / "rounds").records():
            aligned = size_in_bytes(extra) if record["round"] > 1 else 0
            for name, client in record["clients"].items():
                found.setdefault(name, []).append({**client, "bytes_down": client["bytes_down"] + aligned})
        clients = [
            _Client(
                flops=sum(training(r["tokens"], proxy, trained=blocks, parameters=entries) for r in rounds),
                up=sum(r["bytes_up"] for r in rounds),
                down=sum(r["bytes_down"] for r in rounds),
                memory=max(r["peak_memory_bytes"] for r in rounds),
            )
            for rounds in found.values()
        ]
        if not tokens:
            return _Trained(clients, 0.0)
        llm, others = self._matrices(resolve(experiment.llm.path)), set(range(len(proxy.blocks))) - blocks
        learning = training(tokens, proxy, trained=others, parameters=sum(map(torch.numel, extra.values())))
        return _Trained(clients, reading(tokens, llm) + learning)

    def _healing(self, experiment: Experiment, proxy: Path) -> float:
        """Operations of healing: the LLM reads every document once, the proxy learns in every step."""
        record = Manifest.read(proxy).settings.get("heal")
        if record is None:
            return 0.0
        settings, model = record["settings"], self._matrices(proxy)
        passes = settings["steps"] / math.ceil(record["documents"] / settings["batch_size"])
        learned = training(passes * record["tokens"], model, trained=record["trained"], parameters=record["parameters"])
        return reading(record["tokens"], self._matrices(resolve(experiment.llm.path))) + learned

    def _matrices(self, checkpoint: Path) -> Matrices:
        if checkpoint not in self._sizes:
            trust = self.experiment.llm.trust_remote_code
            self._sizes[checkpoint] = matrices(checkpoint, trust_remote_code=trust)
        return self._sizes[checkpoint]


@dataclass(frozen=True)
class _Client:
    flops: float
    up: int
    down: int
    memory: int


@dataclass(frozen=True)
class _Trained:
    clients: list[_Client]
    aligning: float


def _of_one(experiment: Experiment) -> Federate:
    """The rounds of a single client."""
    return dataclasses.replace(experiment.federate, quorum=1.0, participation=1.0)


def _costs(
    *,
    seconds: dict[str, Any],
    exposed: float = 0.0,
    proxy_bytes: int = 0,
    bytes_up: int = 0,
    bytes_down: int = 0,
    flops: dict[str, float] | None = None,
    peak: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The part of a cell's record that says what it cost; what is not given was not spent."""
    return {
        "exposed": exposed,
        "proxy_bytes": proxy_bytes,
        "bytes_up": bytes_up,
        "bytes_down": bytes_down,
        "flops": flops or {"server": 0.0, "clients": 0.0, "client_most": 0.0},
        "peak_memory_bytes": peak or {"server": None, "clients": None},
        "seconds": seconds,
    }


def _share(proxy: Path) -> float:
    return float(Manifest.read(proxy).settings["exposure"]["share"])


def _bytes(proxy: Path) -> int:
    return sum(file.stat().st_size for file in weight_files(proxy))
