"""The speed of training and of scoring, for render.py."""

from render_comparison import load

PEFTS = "PEFT's"


def turns(found: dict[str, float], form: str = ".2f", also: str = "") -> str:
    """Median and range over the turns, and what else belongs into the brackets."""
    median, least, most = (f"{found[key]:{form}}" for key in ("median", "min", "max"))
    return f"{median} ({least}–{most}{also})"


def training() -> str:
    """Local training: throughput beside other loops, and loss curves."""
    result = load("training_loop")
    names = {
        "bare": "bare loop on the same packed batches",
        "fedproxy": "fedproxy",
        "trainer": "transformers Trainer, padded to the longest of a batch",
        "trl": "TRL SFTTrainer",
    }
    lines = ["| loop | tokens/s (range) | fedproxy relative to it (range) | limit |", "|---|---|---|---|"]
    for name, speed in result["tokens_per_second"].items():
        ratio, limit = result["fedproxy_relative_to"].get(name), result["limits"].get(name)
        shown = turns(ratio) if ratio else "1"
        missed = " **missed**" if limit and not limit["within_limit"] else ""
        bound = f"≥ {limit['limit']:g}" if limit else ""
        lines.append(f"| {names[name]} | {turns(speed, ',.0f')} | {shown}{missed} | {bound} |")
    lengths, curves = result["lengths"], result["curves"]
    histogram = ", ".join(
        f"{low + 1}–{high}: {count}"
        for low, high, count in zip([0, *lengths["up_to"]], lengths["up_to"], lengths["rows"], strict=False)
    )
    spread, apart = curves["spread_between_seeds"], curves["difference"]
    lines += [
        "",
        f"{result['rows']} rows of {', '.join(result['data'])}: {result['tokens']:,} tokens, {result['counting_tokens']:,} of them count in the loss. "
        f"Rows of so many tokens: {histogram}. Batches of {result['settings']['batch_size']}, {result['threads']} threads, "
        f"{result['repeats']} turns.",
        "",
        f"Loss over {curves['steps']} steps, {len(curves['seeds'])} orders of the rows: packed and padded differ by at most "
        f"{curves['packed_against_padded']:.4f} nats in a step. Against Trainer, mean curves (smoothed over {curves['smoothed_over']} steps) differ "
        f"by {apart['curves']:.3f} on average, between seeds by {spread['fedproxy']['curves']:.3f} (fedproxy) and "
        f"{spread['trainer']['curves']:.3f} (Trainer); on {curves['held_out_rows']} rows not trained on by {apart['held_out']:+.3f}, between seeds by "
        f"{spread['fedproxy']['held_out']:.3f} and {spread['trainer']['held_out']:.3f}.",
    ]
    return "\n".join(lines)


def lora_layers() -> str:
    """Training with our LoRA layers beside PEFT's own."""
    result = load("lora_layers")
    lines = ["| dropout | layers | tokens/s (range) |", "|---|---|---|"]
    for row in result["speeds"]:
        lines.append(f"| {row['dropout']:g} | {row['layers']} | {turns(row, ',.0f')} |")

    def ratio(found: dict[str, float], aim: float = 0.0) -> str:
        wanted = f"; aim: ≥ {aim:g}" + " **missed**" * (found["median"] < aim) if aim else ""
        return turns(found, also=wanted)

    plain, dropped = (
        ratio(result["ours_relative_to_pefts"][str(dropout)], result["aims"][str(dropout)])
        for dropout in (0.0, result["dropout"])
    )
    cost, apart = result["with_dropout_relative_to_without"], result["loss_ours_less_pefts"]
    lines += [
        "",
        f"SmolLM2 without half of its blocks, {result['rows']} rows of {result['tokens']:,} tokens, batches of {result['settings']['batch_size']}, {result['threads']} threads, {result['repeats']} turns. "
        f"Ours relative to PEFT's: {plain} without dropout, {dropped} with. "
        f"With dropout relative to without: ours {ratio(cost['ours'])}, PEFT's {ratio(cost[PEFTS])}.",
        "",
        f"Mean losses of a step over {len(result['seeds'])} orders of the rows, ours less PEFT's: {apart['0.0']['mean']:+.3f} on average without dropout, "
        f"{apart[str(result['dropout'])]['mean']:+.3f} with; orders differ by {apart['0.0']['seeds']:.2f} at least.",
    ]
    return "\n".join(lines)


def busy_machine() -> str:
    """A training alone and beside another process, as its idle threads wait."""
    result = load("busy_machine")
    lines = ["| where | GNU OpenMP's wait, s | ours, s | GNU OpenMP's relative to ours |", "|---|---|---|---|"]
    for row in result["rows"]:
        seconds = [row["seconds"][name] for name in result["turns"]] + [row["gnu_relative_to_ours"]]
        cells = [f"{one['median']:.2f} ({one['least']:.2f}–{one['most']:.2f})" for one in seconds]
        lines.append(f"| {row['where']} | {' | '.join(cells)} |")
    waits = [f"{turns:,}" for turns in result["turns"].values()]
    lines += [
        "",
        f"{result['steps']} step(s) of the demo's LLM with {result['threads']} threads on {result['cpus']} processors, {result['repeats']} turns; the other process trains with one thread. "
        f"A thread that waits for another turns {waits[0]} times before it sleeps, with ours {waits[1]} times. Whoever has a machine to himself sets `OMP_WAIT_POLICY=active`, and gets GNU OpenMP's.",
    ]
    return "\n".join(lines)


def scoring() -> str:
    """Scoring options, beside the harness's own model and beside float32."""
    result = load("scoring")
    lines = [
        "| | documents/s (range) | the time of ours (range) | accuracy | documents answered otherwise than by ours in float32 |"
    ]
    lines.append("|---|---|---|---|---|")
    for row in result["ways"]:
        speed, times = row["documents_per_second"], row["others_seconds_relative_to_ours"]
        lines.append(
            f"| {row['name']} | {turns(speed, '.1f')} | "
            f"{turns(times)} | {row['accuracy']:.1%} | "
            f"{row['answered_otherwise_than_ours_in_float32']} |"
        )
    half = next(row for row in result["ways"] if row["name"] == "ours, float32")["others_seconds_relative_to_ours"][
        "median"
    ]
    lines += [
        "",
        f"The untuned SmolLM2 on {result['documents']} documents of {', '.join(result['tasks'])}; batches of {result['batch_size']}, {result['threads']} thread(s), {result['repeats']} turns. "
        "Ours reads a document once for all its options, and where the processor multiplies bfloat16 in hardware, as here, it does so with a checkpoint that is stored in bfloat16. "
        f"Aim: half the time of ours in float32{': **missed**' if half < 2 else ''}.",
    ]
    return "\n".join(lines)
