"""What a dry run shows to people: of a run its clients, stages and rows; of a comparison its methods."""

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fedproxy.cli.output import numbers, print_json, sheet, stage
from fedproxy.reporting.units import count, duration, size

_STAGES = {
    "compress": "compress",
    "align": "align the proxy between rounds",
    "clients": "train, one client after the other",
    "scoring": "score adapters, and train alone if asked, one client after the other",
    "slowest_clients": "all that clients do, at the same time",
    "centralized": "tune the LLM on the pooled rows",
    "evaluate": "evaluate",
}
_EXAMPLE = 300
"""Characters of an example's prompt that are shown, its end."""


def forecast(experiment: Path, tflops: float | None, *, compare: bool, json: bool) -> None:
    """Forecast a run or a comparison, and print it.

    Args:
        experiment: The experiment file.
        tflops: The speed to reckon with; measured if none.
        compare: Forecast a comparison.
        json: Print JSON.
    """
    from fedproxy.forecast import forecast_comparison, forecast_run, given_speed, measure_speed
    from fedproxy.pipeline import read_experiment

    read = read_experiment(experiment)
    speed = measure_speed(read.train) if tflops is None else given_speed(tflops)
    with stage("dry run") as show:
        found = (forecast_comparison if compare else forecast_run)(read, speed, on_progress=show)
    if json:
        print_json(found)
        return
    page = sheet(stderr=True)
    (show_comparison if compare else show_run)(page, found)
    page.print("Nothing was written, and no weight was read.")


def show_run(target: Console, found: Mapping[str, Any]) -> None:
    """Print the forecast of a run."""
    _show_llm(target, found)
    proxy = found["proxy"]
    target.print(
        f"Proxy: {proxy['blocks']} blocks, {proxy['parameters']:,} parameters ({proxy['exposed']:.1%} of the LLM's), "
        f"{size(proxy['bytes'])}, which each client gets once."
    )
    target.print(_clients(found["clients"]))
    for name, client in found["clients"].items():
        if client["lost"]:
            target.print(f"{name}: max_length leaves {count(client['lost'], 'row')} nothing to learn.", style="yellow")
    for name, plan in found["privacy"].items():
        target.print(
            f"{name}: noise σ = {plan['noise']:.3f} of the clipped norm, some {plan['batch']} rows a step; all rounds "
            f"cost ε = {plan['epsilon']:.3f} at δ = {plan['delta']:.2g}. Its norm in the mean of a step is "
            f"{plan['norms']:.3g} clips, where the gradients have 1 at most."
        )
    if (whole := found["client_privacy"]) is not None:
        target.print(
            f"Whole clients: noise of {whole['noise']:.3f} clips in the sum of a round, and so of {whole['norms']:.3g} "
            f"in the mean of the updates, which have 1 at most; all rounds cost ε = {whole['epsilon']:.3f}."
        )
    for warning in found["warnings"]:
        target.print(warning, style="yellow")
    target.print("The first row of each client, as it is trained on, its prompt and what it learns:")
    for name, client in found["clients"].items():
        prompt, answer = client["example"]["prompt"], client["example"]["answer"]
        shown = ("…" if len(prompt) > _EXAMPLE else "") + prompt[-_EXAMPLE:]
        target.print(f"  {name}  {shown!r} → {answer[:_EXAMPLE]!r}")
    if kept := [f"{name} {client['scored']:,}" for name, client in found["clients"].items() if client["scored"]]:
        target.print(f"\nOf its other rows each client keeps so many back, to score adapters on: {', '.join(kept)}.")
    if found["tasks"]:
        read = ", ".join(f"{name} {one['documents']:,}" for name, one in found["tasks"].items())
        target.print(f"\nScored are {', '.join(found['models'])}, on so many documents: {read}.")
    target.print(_memory(found["memory"]))
    target.print(
        f"In {count(found['rounds'], 'round')} all clients send {size(found['bytes']['up'])} and get "
        f"{size(found['bytes']['down'])}, beside the proxy."
    )
    target.print(_times(found))
    _show_speed(target, found)


def show_comparison(target: Console, found: Mapping[str, Any]) -> None:
    """Print the forecast of a comparison: for each method and share removed, means over the seeds."""
    _show_llm(target, found)
    table = numbers(
        "method", "removed", "exposed", "up", "down", "training, CPU", "GPU", "TFLOPs: clients", "one", "server", "all",
        "alone",
    )  # fmt: skip
    for method, remove in dict.fromkeys((cell["method"], cell["remove"]) for cell in found["cells"]):
        cells = [cell for cell in found["cells"] if (cell["method"], cell["remove"]) == (method, remove)]

        def mean(read: Any, cells: Sequence[Mapping[str, Any]] = cells) -> float:
            return statistics.fmean(read(cell) for cell in cells)

        flops = [
            mean(lambda cell, what=what: cell["flops"][what]) for what in ("clients", "client_most", "server", "all")
        ]
        table.add_row(
            method,
            f"{remove:.0%}",
            f"{mean(lambda cell: cell['exposed']):.1%}",
            size(mean(lambda cell: cell["bytes_up"])),
            size(mean(lambda cell: cell["bytes_down"] + cell["proxy_bytes"])),
            *(size(max(needed)) if (needed := _needed(cells, device)) else "–" for device in ("cpu", "gpu")),
            *(_tera(value) for value in flops),
            duration(mean(lambda cell: cell["seconds"])),
        )
    target.print(table)
    every = found["all"]
    target.print(
        "Of one seed, a mean over the seeds; down with one proxy; memory at most, in float32 and in bfloat16; "
        '"all" counts scoring, too; "alone" is the time if there were no other cell.'
    )
    target.print(
        f"All {count(every['cells'], 'cell')}, in {count(every['jobs'], 'piece')} of shared work: "
        f"{_tera(every['flops'])} TFLOPs, {duration(every['seconds'])}."
    )
    _show_speed(target, found)


def _needed(cells: Sequence[Mapping[str, Any]], device: str) -> list[int]:
    return [cell["training_memory"][device] for cell in cells if cell["training_memory"]]


def _clients(clients: Mapping[str, Any]) -> Table:
    table = numbers(
        "client", "rows", "prompt, mean (max)", "answer, mean (max)", "cut", "steps a round", "tokens a round",
        "TFLOPs a round", "up", "down", "CPU float32", "GPU bfloat16", title="Clients",
    )  # fmt: skip
    for name, client in clients.items():
        last = defaultdict(int, client["rounds"][-1] if client["rounds"] else {})
        table.add_row(
            name,
            f"{client['rows']:,}",
            *(f"{client[part]['mean']:.1f} ({client[part]['max']})" for part in ("prompt", "answer")),
            f"{client['cut']:,}",
            f"{last['steps']:,}",
            f"{last['tokens']:,}",
            _tera(last["flops"] + last["scoring_flops"]),
            size(last["bytes_up"]),
            size(last["bytes_down"]),
            *(size(client["memory"][device]) for device in ("cpu", "gpu")),
        )
    return table


def _memory(memory: Mapping[str, Any]) -> Table:
    table = numbers("memory, at most", "CPU float32", "GPU bfloat16")
    for party, found in [*memory["server"].items(), ("train, the client with the most", memory["client"])]:
        table.add_row(party, size(found["cpu"]), size(found["gpu"]))
    table.caption = "Beside the program and its libraries, some 0.5 GB."
    table.caption_justify = "left"
    return table


def _times(found: Mapping[str, Any]) -> Table:
    measured = found["speed"]["source"] != "as given"
    table = numbers("stage", "TFLOPs", "time, at least" if measured else "time")
    for name, label in _STAGES.items():
        if found["flops"][name]:
            table.add_row(label, _tera(found["flops"][name]), duration(found["seconds"][name]))
    if measured:
        table.caption = (
            "Training the demo on two cores took 6 to 8 times as long, scoring 16 times (docs/benchmarks.md)."
        )
        table.caption_justify = "left"
    return table


def _show_llm(target: Console, found: Mapping[str, Any]) -> None:
    llm = found["llm"]
    target.print(
        f"{found['name']}: {llm['path']} has {llm['blocks']} blocks, "
        f"{llm['parameters']:,} parameters, {size(llm['bytes'])}."
    )


def _show_speed(target: Console, found: Mapping[str, Any]) -> None:
    from fedproxy.models.costs import A_TOKEN

    speed = found["speed"]
    target.print(
        f"Times are operations divided by {speed['flops'] / 1e12:.3g} TFLOP/s ({speed['source']}). {A_TOKEN}"
        "Not counted: attention's products of activations, merging, reading and writing files."
    )


def _tera(flops: float) -> str:
    return f"{flops / 1e12:,.0f}" if flops >= 1e15 else f"{flops / 1e12:.4g}"
