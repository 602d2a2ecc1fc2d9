"""What `fedproxy compress` shows to people: the exposure sheet, and the plan of a dry run."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console

from fedproxy.cli.output import console, numbers

if TYPE_CHECKING:
    from fedproxy.compression.plan import Plan

_BAR = 40
_KEPT, _REMOVED = "█", "░"


def print_sheet(sheet: dict[str, Any]) -> None:
    """Print an exposure sheet on stderr."""
    show_sheet(console(), sheet)


def show_sheet(target: Console, sheet: dict[str, Any]) -> None:
    """Print an exposure sheet."""
    from fedproxy.attack_records import FROM_PROXY

    table = numbers("leaves the house", "tensors", "parameters", "bytes", title="Exposure sheet")
    for row in _joined(sheet["leaves"]):
        table.add_row(*_cells(row))
    table.add_section()
    table.add_row(*_cells({**sheet, "group": f"all ({sheet['share']:.1%} of the LLM's parameters)"}))
    table.add_section()
    for row in _joined(sheet["stays"]):
        table.add_row(*_cells({**row, "group": f"stays: {row['group']}"}), style="dim")
    target.print(table)
    healed = "healed on public text before they leave" if sheet["healed"] else "as in the LLM, not healed"
    target.print(f"The weights that leave are {healed}. Tokenizer and configuration go along.")
    found = sheet["perplexity"]
    if found is None:
        target.print("Perplexity on public text: not measured (no public text was given).")
    else:
        when = " before it is healed" if sheet["healed"] else ""
        target.print(
            f"Perplexity on public text ({found['tokens']:,} tokens): LLM {found['llm']:.4g}, "
            f"proxy {found['proxy']:.4g}{when}."
        )
    target.print(f"How far an attacker comes with it, once a run is finished: fedproxy audit RUN --attack {FROM_PROXY}")


def _cells(row: dict[str, Any]) -> tuple[str, str, str, str]:
    from fedproxy.reporting.units import size

    return row["group"], f"{row['tensors']:,}", f"{row['parameters']:,}", size(row["bytes"])


def _joined(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same rows with all blocks in one."""
    blocks = [row for row in rows if row["group"].startswith("block ")]
    others = [row for row in rows if row not in blocks]
    if not blocks:
        return others
    places = ", ".join(row["group"].removeprefix("block ") for row in blocks)
    joined: dict[str, Any] = {key: sum(row[key] for row in blocks) for key in ("tensors", "parameters", "bytes")}
    joined["group"] = f"{len(blocks)} block{'s' * (len(blocks) > 1)}: {places}"
    place = rows.index(blocks[0])
    return [*others[:place], joined, *others[place:]]


def show_plan(target: Console, plan: "Plan") -> None:
    """Print a plan: a bar for every block, and a row for every share removed."""
    from fedproxy.reporting.units import size

    chosen = plan.chosen
    target.print(f"Scores ({plan.score}); remove = {plan.remove:g} keeps {_KEPT} and removes {_REMOVED}:\n")
    low, high = min(0.0, *plan.scores), max(plan.scores)
    digits = len(str(len(plan.scores) - 1))
    for block, score in enumerate(plan.scores):
        length = round(_BAR * (score - low) / (high - low)) if high > low else 0
        glyph, word = (_KEPT, "kept") if block in chosen.keep else (_REMOVED, "removed")
        bar = (glyph * max(1, length)).ljust(_BAR)
        style = "green" if word == "kept" else "dim"
        target.print(f"block {block:>{digits}}  {bar}  {score:>10.4g}  {word}", style=style)
    table = numbers("remove", "keeps", "parameters", "on disk", "client, CPU float32", "client, GPU bfloat16")
    table.columns[1].justify = "left"
    for option in plan.options:
        asked = option is chosen
        table.add_row(
            f"{option.remove:g}{' ◀' if asked else ''}",
            f"{len(option.keep)}: {_ranges(option.keep)}",
            f"{option.parameters:,}",
            size(option.bytes),
            size(option.cpu_memory),
            size(option.gpu_memory),
            style="bold" if asked else "",
        )
    target.print(table)
    train = plan.train
    target.print(
        f"A client's memory is estimated for LoRA of rank {train.lora_r} on batches of {train.batch_size} rows of "
        f"{train.max_length} tokens."
    )
    target.print(f"The LLM has {plan.parameters:,} parameters, {size(plan.bytes)} on disk. Nothing was written.")


def _ranges(numbers: Sequence[int]) -> str:
    """Rising numbers with stretches joined, as in 0-3, 7."""
    stretches: list[list[int]] = []
    for number in numbers:
        if stretches and number == stretches[-1][-1] + 1:
            stretches[-1].append(number)
        else:
            stretches.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in stretches)
