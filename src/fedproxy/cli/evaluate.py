"""fedproxy evaluate."""

from pathlib import Path
from typing import Annotated

import typer

from fedproxy.cli.output import Json, TrustRemoteCode, TrustTasks, console, print_json, stage

EXAMPLE = "fedproxy evaluate ./llm --adapter runs/first/fused --tasks sst2,rte --data ./data"


def evaluate(
    model: Annotated[str, typer.Argument(help="A checkpoint directory or Hub id.")],
    tasks: Annotated[str, typer.Option(help="Tasks of the LM evaluation harness, separated by commas.")],
    data: Annotated[Path | None, typer.Option(help="Folder with the stock tasks' rows, DATA/TASK/SPLIT.jsonl.")] = None,
    include: Annotated[Path | None, typer.Option(help="Folder with your own task YAMLs.")] = None,
    trust_tasks: TrustTasks = False,
    adapter: Annotated[
        Path | None, typer.Option(help="An adapter to put on the model; with --proxy, the one tuned on the proxy.")
    ] = None,
    proxy: Annotated[
        Path | None,
        typer.Option(help="The model's proxy: add to the model's logits what the adapter changes in the proxy's."),
    ] = None,
    alpha: Annotated[float | None, typer.Option(help="With --proxy: how much of that to add; 1 if left out.")] = None,
    limit: Annotated[int | None, typer.Option(help="Rows of each task at most.", min=1)] = None,
    batch_size: Annotated[int, typer.Option(help="Rows in one forward pass.", min=1)] = 64,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
) -> None:
    """Score a model, a model with an adapter, or a model tuned by its proxy, with the LM evaluation harness."""
    from rich.table import Table

    from fedproxy.evaluation import evaluate as evaluate_model

    with stage("evaluate") as show:
        scores = evaluate_model(
            model,
            tasks=[name.strip() for name in tasks.split(",") if name.strip()],
            data=data,
            include=include,
            trust_tasks=trust_tasks,
            adapter=adapter,
            proxy=proxy,
            alpha=alpha,
            limit=limit,
            batch_size=batch_size,
            trust_remote_code=trust_remote_code,
            on_progress=show,
        )
    if json:
        print_json(scores)
        return
    table = Table("task", "rows", "metrics")
    for name, metrics in scores["tasks"].items():
        shown = ", ".join(f"{key} {value:.4f}" for key, value in metrics.items() if key != "n")
        table.add_row(name, str(metrics["n"]), shown)
    average = scores["average"]
    table.add_row("average", "", "–" if average is None else f"{average:.4f}", style="bold")
    console().print(table)
    for name, why in scores.get("left_out", {}).items():
        console().print(f"{name} is not in the average: {why}.")
