"""The run in a few sentences."""

from fedproxy.records import MODELS, Results
from fedproxy.reporting.units import count, decimals, duration, percent, points, size


def sentences(results: Results) -> list[str]:
    """What was done, what came of it and what it cost, one or two sentences each; only what the run recorded."""
    found = [
        _setup(results),
        _rounds(results),
        _validation(results),
        tuned_llm(results),
        _scores(results),
        _comparison(results),
        _left_out(results),
        _loss_of_fusing(results),
        _cost(results),
    ]
    return [sentence for sentence in found if sentence]


def _setup(results: Results) -> str:
    if not results.llm.blocks or not results.proxy.layer_map:
        return ""
    parameters = f" and {results.llm.parameters:,} parameters" if results.llm.parameters else ""
    exposed = f", {percent(results.exposed)} % of all parameters" if results.exposed is not None else ""
    perplexity = ""
    if (measured := results.proxy.perplexity) is not None:
        llm, proxy = (decimals(value, 1) for value in (measured.llm, measured.proxy))
        perplexity = f" On public text the LLM has a perplexity of {llm}, the untuned proxy of {proxy}."
    return (
        f"The LLM has {count(results.llm.blocks, 'block')}{parameters}; its proxy keeps "
        f"{len(results.proxy.layer_map)} of them{exposed}. The LLM stayed with its owner, the data with the clients."
        f"{perplexity}"
    )


def _rounds(results: Results) -> str:
    if not results.rounds:
        return ""
    rows = sum(client.rows or 0 for client in results.rounds[-1].clients.values())
    merge, regulariser = (results.setting("federate", key) for key in ("merge", "regulariser"))
    how = f", merged by {merge}" if isinstance(merge, str) else ""
    if isinstance(regulariser, str) and regulariser != "none":
        how += f", with {regulariser} as the clients' regulariser"
    text = (
        f"{count(len(results.clients), 'client')} with {count(rows, 'row')} in all tuned the proxy in "
        f"{count(len(results.rounds), 'round')}{how}."
    )
    rejected = sum(len(round_.quarantined) for round_ in results.rounds)
    return text + (f" {count(rejected, 'update')} {'was' if rejected == 1 else 'were'} rejected." if rejected else "")


def _validation(results: Results) -> str:
    kept = results.kept
    if kept is None or (merged := kept.validation.merged) is None or (untuned := kept.validation.untuned) is None:
        return ""
    before, after = (each.loss.by_rows for each in (untuned, merged))
    text = (
        f"On {count(merged.rows or 0, 'row')} that {count(merged.clients or 0, 'client')} kept back, the adapter of "
        f"round {kept.number} moves the loss of the proxy from {decimals(before)} to {decimals(after)} nats a token"
    )
    if merged.accuracy.by_rows is not None and untuned.accuracy.by_rows is not None:
        text += f", the accuracy from {percent(untuned.accuracy.by_rows)} % to {percent(merged.accuracy.by_rows)} %"
    if (alone := kept.validation.alone) is not None:
        text += f"; clients that train alone reach {decimals(alone.loss.by_rows)}"
        text += f" and {percent(alone.accuracy.by_rows)} %" * (alone.accuracy.by_rows is not None)
    last = results.rounds[-1].validation
    return text + "." + f" No round after round {last.best_round} was better, so the federation ended." * last.stop


def tuned_llm(results: Results) -> str:
    """What the LLM reaches on the rows that clients keep back, before and after tuning; empty if nobody measured it."""
    before, after = results.validation.llm, results.validation.fused
    if before is None or after is None:
        return ""
    text = (
        f"On {count(after.rows or 0, 'row')} that clients kept back, the tuned LLM has a loss of "
        f"{decimals(after.loss.by_rows)} nats a token, the untuned one of {decimals(before.loss.by_rows)}"
    )
    if after.accuracy.by_rows is not None and before.accuracy.by_rows is not None:
        text += (
            f"; of their answers {percent(after.accuracy.by_rows)} % are right, {percent(before.accuracy.by_rows)} %"
            " before tuning"
        )
    return text + "."


def _scores(results: Results) -> str:
    llm, fused, centralized = (results.average(model) for model in ("llm", "fused", "centralized"))
    if llm is None or fused is None:
        return ""
    text = (
        f"Put back onto the LLM, the tuning moves the mean over {count(len(results.tasks), 'task')} "
        f"from {percent(llm)} % to {percent(fused)} %."
    )
    if centralized is None:
        return text
    text += f" Tuning the LLM itself on all clients' pooled data reaches {percent(centralized)} %"
    if results.gap_closed is None:
        return text + ": there is no gap to close."
    return text + f": {percent(results.gap_closed)} % of that gap is closed."


def _comparison(results: Results) -> str:
    if "llm" not in results.evaluation or "fused" not in results.evaluation:
        return ""
    before, after = results.evaluation["llm"].tasks, results.evaluation["fused"].tasks
    both = [task for task in results.tasks if task in before and task in after]
    worse = [task for task in both if after[task] <= before[task]]
    if not both:
        return ""
    if not worse:
        return "The tuned LLM is better than the untuned one on every task." if len(both) > 1 else ""
    named = ", ".join(f"{task} ({points(after[task] - before[task])})" for task in worse)
    better = len(both) - len(worse)
    return f"The tuned LLM is better than the untuned one on {better} of {len(both)} tasks; not on {named}."


def _left_out(results: Results) -> str:
    said = []
    for task, why in results.left_out.items():
        values = [
            f"{MODELS[model]} {scored.scores[task].value:.4g}"
            for model, scored in results.evaluation.items()
            if task in scored.left_out and task in scored.scores
        ]
        said.append(f"{task} ({why}): {', '.join(values)}")
    return f"In no mean and no figure: {'; '.join(said)}." if said else ""


def _loss_of_fusing(results: Results) -> str:
    tuned, fused = results.average("proxy_tuned"), results.average("fused")
    if tuned is None or fused is None:
        return ""
    return f"Against the tuned proxy, the fused LLM stands at {points(fused - tuned)}."


def _cost(results: Results) -> str:
    cost, parts = results.cost, []
    if cost.seconds:
        parts.append(f"All stages together took {duration(sum(cost.seconds.values()))}.")
    if cost.bytes_up is not None and cost.bytes_down is not None:
        text = f"The clients sent {size(cost.bytes_up)} and received {size(cost.bytes_down)}"
        parts.append(text + (f"; the proxy itself weighs {size(cost.proxy_bytes)}." if cost.proxy_bytes else "."))
    return " ".join(parts)
