"""Render docs/benchmarks.md, and the demo's outcome in README.md, from benchmarks/results/*.json: `make docs`."""

from typing import Any

from evidence_figures import first
from render_comparison import ROOT, comparison, comparison_by_task, difference, load
from render_demo import outcome, percent, quality
from render_evidence import evidence
from render_privacy import privacy_pages
from render_shares import shares
from render_speed import busy_machine, lora_layers, scoring, training
from sections import filled


def memory() -> str:
    """Merge memory."""
    result = load("merge_memory")
    lines = ["| rule | inputs, MB | peak above baseline, MB | ratio | limit |", "|---|---|---|---|---|"]
    for rule, row in result["rules"].items():
        above = (row["peak"] - row["baseline"]) / 1e6
        lines.append(
            f"| {rule} | {row['inputs_bytes'] / 1e6:.0f} | {above:.0f} | {row['ratio']:.2f} | {result['limit']} |"
        )
    return "\n".join(lines)


def wire() -> str:
    """Encodings of updates: size, error, speed."""
    result = load("wire_speed")
    lines = ["| encoding | bits a value | relative error | encode, MB/s | decode, MB/s |", "|---" * 5 + "|"]
    for name, row in result["rows"].items():
        speeds = [
            f"{row[way]['median']:,.0f} ({row[way]['least']:,.0f}–{row[way]['most']:,.0f})"
            for way in ("encode_mb_per_s", "decode_mb_per_s")
        ]
        lines.append(f"| {name} | {row['bits']:.2f} | {row['error']:.4f} | {' | '.join(speeds)} |")
    copies = [row["copy_mb_per_s"]["median"] for row in result["rows"].values()]
    missed = "" if result["within_limit"] else " **missed**"
    lines += [
        "",
        f"{result['parameters']:,} Gaussian float32 values; MB/s of those values, medians and ranges of {result['repeats']} turns on {result['hardware']['threads']} thread(s); a plain "
        f"copy reaches {min(copies):,.0f}–{max(copies):,.0f} MB/s. Limit for int8 and int4, both ways: ≥ {result['limit_mb_per_s']:g} MB/s{missed}.",
    ]
    return "\n".join(lines)


def wire_quality() -> str:
    """Bytes and final quality of the demo for each encoding, beside plain float32 of the same seeds."""
    result = load("wire")
    lines = [
        "| encoding (updates; adapter down) | up, kB | of fp32 up | of fp32, up + down | tuned proxy, % | fused LLM, % | fused against fp32, by seed |",
        "|---" * 7 + "|",
    ]
    for name, row in result["summary"].items():
        settings = row["settings"]
        title = f"{name}; {settings.get('wire_down', 'fp32')}"
        paired = row["fused"]["difference_by_seed"]
        cells = [
            f"{row['bytes_up'] / 1e3:,.0f}",
            f"1/{1 / row['share_of_fp32_up']:.1f}",
            f"1/{1 / row['share_of_fp32']:.1f}",
            percent(row["proxy_tuned"]) + ("" if row["proxy_tuned"]["mean_not_below_spread_of_fp32"] else " below"),
            percent(row["fused"]) + ("" if row["fused"]["mean_not_below_spread_of_fp32"] else " below"),
            f"{100 * paired['mean']:+.1f} ({100 * paired['min']:+.1f}–{100 * paired['max']:+.1f})",
        ]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    seeds = max(row["seeds"] for row in result["summary"].values())

    def small(share: str) -> str:
        found = [
            name
            for name, row in result["summary"].items()
            if row[share] <= result["limit"]
            and all(row[model]["mean_not_below_spread_of_fp32"] for model in ("proxy_tuned", "fused"))
        ]
        return ", ".join(found) or "none"

    lines += [
        "",
        f'The demo experiment, {seeds} seeds, means and ranges; kB a client and round; the conflict goes down bit-packed in all rows. "below": the mean lies '
        "below the range of fp32's seeds. At most 1/8 of fp32's bytes up and not below in either model: "
        f"{small('share_of_fp32_up')}; at most 1/8 up and down together: {small('share_of_fp32')}.",
    ]
    return "\n".join(lines)


def large_model() -> str:
    """Compress and fuse of a large checkpoint: throughput against cp, and memory."""
    result = load("large_model")

    def ratio(part: str) -> str:
        found = result[part]["throughput_relative_to_cp"]
        return f"{found['median']:.2f} ({found['min']:.2f}–{found['max']:.2f})"

    def memory_of(part: str) -> str:
        return f"{result[part]['peak_rss'] / 1e6:,.0f} MB"

    limits = {name: f"{row['sign']} {row['limit']:g}" for name, row in result["limits"].items()}
    mark = {name: "" if row["within_limit"] else " **missed**" for name, row in result["limits"].items()}
    rows = [
        ("prune 50 %", "throughput relative to `cp`", ratio("prune"), "prune.throughput_relative_to_cp"),
        ("prune 50 %", "peak memory", memory_of("prune"), "prune.peak_rss"),
        (
            "compress, no score that reads text: prune, and the proof block by block",
            "peak memory",
            memory_of("compress"),
            "compress.peak_rss",
        ),
        (
            f"score {result['score']['documents']} × {result['score']['tokens_each']} tokens out of core",
            "peak memory",
            memory_of("score"),
            "score.peak_rss",
        ),
        ("fuse to a checkpoint", "throughput relative to `cp`", ratio("fuse"), "fuse.throughput_relative_to_cp"),
        ("fuse to a checkpoint", "peak memory", memory_of("fuse"), "fuse.peak_rss"),
        ("re-key the adapter", "seconds", f"{result['rekey']['seconds']:.2f}", "rekey.seconds"),
    ]
    lines = ["| | | measured | limit |", "|---|---|---|---|"]
    for what, figure, value, limit in rows:
        bound = limits[limit]
        if "rss" in limit:
            sign, number = bound.split()
            bound = f"{sign} {float(number) / 1e9:g} GB"
        lines.append(f"| {what} | {figure} | {value}{mark[limit]} | {bound} |")
    compress, score, command = result["compress"], result["score"], result["rekey"]["command_seconds"]
    lines += [
        "",
        f"Shape of {result['like']}, {result['bytes'] / 1e9:.1f} GB of bfloat16; medians (and ranges) of {result['repeats']} turns in which ours and `cp` "
        f"alternate, both until their files are synced; page cache: {result['page_cache']}. Scoring took {score['seconds']:.0f} s; the whole of "
        f"`compress` without a text {compress['seconds']:.0f} s; the whole re-keying command took "
        f"{min(command):.1f}–{max(command):.1f} s, imports included.",
    ]
    return "\n".join(lines)


def federation() -> str:
    """What a federation costs beyond training: time a round, hand-out of the proxy, memory of a simulation."""
    result, handed = load("federation"), load("handout")
    ratio, memory = handed["ratio"], handed["server_memory"]
    lines = [
        "| | measured | limit |",
        "|---|---|---|",
        *(
            f"| time a round beyond training, {found['clients']} clients over TLS, Flower {flower} | {found['median']:.2f} s "
            f"({found['min']:.2f}–{found['max']:.2f}){'' if found['median'] <= found['limit'] else ' **missed**'} | ≤ {found['limit']:g} s |"
            for flower, found in sorted(result["deployment"].items())
        ),
        f"| hand-out of {handed['bytes'] / 1e9:g} GB, relative to a plain copy through a TLS socket | {ratio['median']:.2f} "
        f"({ratio['least']:.2f}–{ratio['most']:.2f}) | ≤ {handed['limit']:g} |",
        f"| memory of the server while it hands out, one client and three | {memory['peak_above_1_client'] / 1e6:.0f} MB, "
        f"{memory['peak_above_3_clients'] / 1e6:.0f} MB | flat |",
        "",
        "Rounds from the second on (the first waits for the clients to come); a round's time less its slowest client's "
        "training of one step; server and clients share the two processors, one thread each.",
        "",
        "| simulation | replies a round | whole run | "
        + " | ".join(f"{name}: peak, own" for name in result["simulation"][0]["peak_bytes"])
        + " |",
        "|---" * (3 + len(result["simulation"][0]["peak_bytes"])) + "|",
    ]
    for row in result["simulation"]:
        sizes = [
            f"{row['peak_bytes'][name] / 1e6:.0f}, {row['peak_own_bytes'][name] / 1e6:.0f} MB"
            for name in row["peak_bytes"]
        ]
        lines.append(
            f"| {row['clients']} clients | {', '.join(map(str, row['replies']))} | {row['seconds']:.0f} s | "
            + " | ".join(sizes)
            + " |"
        )
    lines += [
        "",
        f"Peak resident memory of the server's processes, and the part of it that is their own (not pages of mapped files). An update has "
        f"{result['simulation'][0]['update_bytes'] / 1e6:.1f} MB.",
    ]
    return "\n".join(lines)


def merge_engine() -> str:
    """The merge's speed beside a read and a plain implementation, and how it grows with the clients."""
    result = load("merge_engine")
    limits, speed, scale = result["limits"], result["speed"], result["scale"]
    job, used, checked = speed["job"], speed["memory_beyond_inputs"], speed["compared"]
    seconds = {name: spanned(found, " s") for name, found in speed["seconds"].items()}

    def mark(part: dict[str, Any], limit: str) -> str:
        return "" if part["within_limits"][limit] else " **missed**"

    lines = [
        "| | measured | peer in the same run | limit |",
        "|---|---|---|---|",
        f"| H-TIES with analysis, {seconds['merge']}, in reads of the inputs | {spanned(speed['times_of_one_read'])}"
        f"{mark(speed, 'times_of_one_read')} | one read on {job['threads']} threads: {seconds['read']} | "
        f"≤ {limits['times_of_one_read']:g} |",
        f"| the same with the conflict of every coordinate, {seconds['merge_with_conflict']} | "
        f"{spanned(speed['with_conflict_times_of_one_read'])} | the same read | – |",
        f"| times faster than plain torch | {spanned(speed['speedup_over_reference'])}"
        f"{mark(speed, 'speedup_over_reference')} | plain torch: {seconds['reference']} | "
        f"≥ {limits['speedup_over_reference']:g} |",
        f"| memory beyond the inputs, without and with the conflict | {used['merge']:.1%}, "
        f"{used['merge_with_conflict']:.1%}{mark(speed, 'memory_beyond_inputs')} | "
        f"inputs: {used['inputs_bytes'] / 1e6:.0f} MB | ≤ {limits['memory_beyond_inputs']:.0%} |",
        f"| largest difference from float64, relative to the largest value; entries kept differently | "
        f"{checked['value_error']:.1g}; {checked['entries_kept_differently']}{mark(speed, 'value_error')} | "
        f"{checked['parameters']:,} parameters | ≤ {limits['value_error']:g}; 0 |",
        "",
        f"{job['clients']} clients, {job['parameters']:,} float32 parameters in memory. Median and extremes of "
        f"{job['repeats']} turns in one process, of plain torch {job['reference_repeats']}.",
        "",
        "| bfloat16 files to a file, clients | time | processor time | one plain read of the files | in reads | peak memory |",
        "|---" * 6 + "|",
    ]
    for row in scale["runs"]:
        lines.append(
            f"| {row['clients']} | {spanned(row['seconds'], ' s')} | {spanned(row['cpu_seconds'], ' s')} | "
            f"{spanned(row['read_seconds'], ' s')} | {spanned(row['times_of_one_read'])} | "
            f"{row['peak_bytes'] / 1e6:.0f} MB |"
        )
    most = scale["runs"][-1]
    square = scale["fit"]["parabola"]["seconds_by_power_of_clients"][2] * most["clients"] ** 2
    lines += [
        "",
        f"{scale['job']['parameters']:,} parameters; median and extremes of {scale['job']['repeats']} runs, each in a "
        f"process of its own. Limit of the memory: {limits['scale_peak_bytes'] / 1e6:.0f} MB"
        f"{mark(scale, 'scale_peak_bytes')}.",
        "",
        "| time over the number of clients K | seconds | R² | largest deviation |",
        "|---|---|---|---|",
    ]
    for name, fit in scale["fit"].items():
        terms = zip(fit["seconds_by_power_of_clients"], ("", " · K", " · K²"), strict=False)
        marks = [mark(scale, f"line_{key}") if name == "line" else "" for key in ("r_squared", "largest_deviation")]
        lines.append(
            f"| {name} | {' + '.join(f'{value:.3g}{power}' for value, power in terms).replace('+ -', '− ')} | "
            f"{fit['r_squared']:.4f}{marks[0]} | {fit['largest_deviation']:.1%}{marks[1]} |"
        )
    lines += [
        f"| limit of the line | | ≥ {limits['line_r_squared']:g} | ≤ {limits['line_largest_deviation']:.0%} |",
        "",
        f"The analysis takes K(K+1)/2 dot products in float64: {square / most['seconds']['median']:.0%} of the time at "
        f"{most['clients']} clients, by the parabola.",
        "",
        "| our walks in torch, where there are no kernels | turns | torch | kernels | times faster | limit |",
        "|---" * 6 + "|",
    ]
    for part, what in (("torch", "float32 in memory"), ("torch_files", "bfloat16 files to a file")):
        turns = result[part]
        lines.append(
            f"| {turns['job']['clients']} clients, {turns['job']['parameters']:,} parameters, {what} | {turns['job']['repeats']} | "
            f"{spanned(turns['torch'], ' s')} | {spanned(turns['kernels'], ' s')} | "
            f"{spanned(turns['kernels_over_torch'])}{mark(turns, 'kernels_over_torch')} | "
            f"≥ {limits['kernels_over_torch']:g} |"
        )
    lines += [
        "",
        "Both one after the other in one process whose C library keeps what is freed. The bits are the same.",
    ]
    return "\n".join(lines)


def fusing() -> str:
    """Other ways to plug in, each held against scale 1."""
    lines = ["| task vector | accuracy, % | against scale 1 |", "|---|---|---|"]
    for row in load("fusing")["summary"]:
        told = difference(row["difference"]) if "difference" in row else ""
        lines.append(f"| {row['variant']} | {percent(row)} | {told} |")
    return "\n".join(lines)


def dry_run() -> str:
    """The forecast of the demo against what the run took."""
    result = load("dry_run")
    memory = result["memory_foretold_over_measured"]
    turns, speeds = result["turns"], [speed / 1e9 for turn in result["turns"] for speed in turn["speeds"]]
    exact = "agree to the last one" if all(result["exact"].values()) else "differ **missed**"
    within = "" if result["memory_within_limits"] else " **missed**"
    low, high = result["memory_limits"]
    lines = [
        "| | measured | limit |",
        "|---|---|---|",
        f"| steps, tokens and bytes of every client and round | {exact} | exact |",
        f"| proxy's files, beyond what was foretold | {result['proxy_header_bytes']:,} bytes | headers |",
        "| memory of training, of the client that needs most, foretold relative to measured | "
        f"{memory:.2f}{within} | {low}–{high} |",
    ]
    for name, found in result["time_measured_over_full_speed"].items():
        lines.append(f"| time of {name}, relative to operations at full speed | {spanned(found)} | – |")
    lines += [
        "",
        f"The demo, {len(turns)} turn(s), each in a process of its own. Full speed is that of a bare matrix product in the "
        f"same process: {figure(min(speeds))}–{figure(max(speeds))} GFLOP/s on {result['environment']['threads']} thread(s).",
    ]
    return "\n".join(lines)


def spanned(found: dict[str, Any], unit: str = "") -> str:
    """Median and extremes, of three figures."""
    return f"{figure(found['median'])}{unit} ({figure(found['least'])}–{figure(found['most'])})"


def figure(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def hardware(name: str) -> str:
    found = load(name)["environment"]
    versions = ", ".join(f"{k} {v}" for k, v in found["versions"].items())
    return f"{found['device']}, {found['cpus']} CPUs; Python {found['python']}; {versions}."


def pages() -> dict[str, str]:
    """Path → content of all that is rendered."""
    page = f"""# Benchmarks

Rendered by `make docs` from `benchmarks/results/*.json`, which `make bench` writes. Machine: {hardware("demo_quality")}

## Demo experiment (`benchmarks/demo_quality.py`)

{quality()}

## Every method on the same work (`fedproxy compare experiments/lab/heterogeneous.toml`)

Eight clients with a task each, half of the LLM's blocks removed; means, and the accuracy's and the gap's range over three seeds. "Against FedProxy": the
paired difference in points with the bootstrap's 95 % interval over the documents; a method is called better or worse only where it excludes 0.
`local` is not one LLM but eight, each scored on the task of its own client alone. What the experiment is, and what it is not:
[experiments/lab](../experiments/lab/README.md). The page with every figure: `experiments/lab/results/heterogeneous.html`.

{comparison("heterogeneous")}

{comparison_by_task("heterogeneous")}

## Every method on one task cut into clients (`fedproxy compare experiments/lab/homogeneous.toml`)

Four clients with a quarter each of 1,280 rows of TREC, scored on 150 questions; columns as above.

{comparison("homogeneous")}

## How much of the LLM leaves the house (`fedproxy compare experiments/lab/shares.toml`)

The eight clients again, with a quarter, a half and three quarters of the blocks removed.

{comparison("shares")}

## Parts of the method, varied (`fedproxy compare experiments/lab/variants.toml`)

The eight clients again. Thirteen rows are held against one: at 95 % one of twenty such intervals excludes 0 by chance, and those that just do say little.

{comparison("variants")}

## Other ways to plug in (`benchmarks/fusing.py`)

The adapters of the row `fedproxy` above, plugged in otherwise: with another scale of the task vector, the one that `fuse --scale auto` finds on the public
calibration text, or with a part of it on the blocks that were removed, each from the nearest kept block.

{fusing()}

## Memory of `fedproxy merge` (`benchmarks/merge_memory.py`)

Two updates of ten million float32 parameters, file to file.

{memory()}

## Speed and scale of the merge (`benchmarks/merge_engine.py`)

{merge_engine()}

## Encodings of updates (`benchmarks/wire_speed.py`)

{wire()}

## Bytes and quality of the wire (`benchmarks/wire.py`)

{wire_quality()}

## Compress and fuse at 7B (`benchmarks/large_model.py`)

{large_model()}

## Federation (`benchmarks/federation.py`, `benchmarks/handout.py`)

{federation()}

## Local training (`benchmarks/training_loop.py`)

{training()}

## LoRA layers (`benchmarks/lora_layers.py`)

{lora_layers()}

## Beside another process (`benchmarks/busy_machine.py`)

{busy_machine()}

## Scoring (`benchmarks/scoring.py`)

{scoring()}

## Dry run (`benchmarks/dry_run.py`)

{dry_run()}
"""
    drawing, text = outcome()
    readme = filled(filled((ROOT / "README.md").read_text(), "outcome", text), "first", first())
    return {
        "docs/benchmarks.md": page,
        "docs/evidence.md": evidence(),
        "docs/images/demo.svg": drawing,
        "docs/images/shares.svg": shares(),
        "README.md": readme,
        **privacy_pages(),
    }


if __name__ == "__main__":
    for path, content in pages().items():
        (ROOT / path).write_text(content)
