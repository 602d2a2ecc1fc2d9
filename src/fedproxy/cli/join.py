"""fedproxy join."""

import enum
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedproxy.cli.output import TrustRemoteCode, TrustTasks, console, progress
from fedproxy.errors import UsageError

if TYPE_CHECKING:
    from fedproxy.deployment.welcome import Welcome
    from fedproxy.federation.messages import Answer, Score
    from fedproxy.federation.offer import Offer

_GIGABYTE = 10**9
_MODELS = {"own": "your update", "untuned": "the untuned proxy", "alone": "what you trained alone"}


class Kept(enum.StrEnum):
    """What a ledger keeps of what leaves."""

    HASHES = "hashes"
    FULL = "full"


def _limit(help: str, **bounds: Any) -> Any:
    """An option that declines what a server asks for."""
    return typer.Option(help=f"Decline {help}.", rich_help_panel="Limits", **bounds)


EXAMPLE = "fedproxy join fedproxy.example.org:9443 --data tickets.jsonl --key bank.key"


def join(
    address: Annotated[str, typer.Argument(help="HOST:PORT of the server.")],
    data: Annotated[
        Path | None,
        typer.Option(help="Your rows, a file or folder; with --task the folder of its data."),
    ] = None,
    key: Annotated[Path | None, typer.Option(help="Your key file.")] = None,
    ca: Annotated[Path | None, typer.Option(help="The server's CA certificate, if not in the key file.")] = None,
    task: Annotated[str, typer.Option(help="A harness task instead of a file of rows.")] = "",
    include: Annotated[Path | None, typer.Option(help="With --task: folder of your own task YAMLs.")] = None,
    trust_tasks: TrustTasks = False,
    name: Annotated[str, typer.Option(help="Your name, in a federation without keys.")] = "",
    look: Annotated[bool, typer.Option("--look", help="Show what the server offers, and leave.")] = False,
    offer: Annotated[str, typer.Option(metavar="SHA256", help="Take this offer only, as --look showed it.")] = "",
    min_rows: Annotated[int, _limit("to train on fewer rows in a round", min=1)] = 16,
    min_steps: Annotated[int, _limit("fewer optimizer steps a round (warm-up's first left out)", min=0)] = 2,
    max_rounds: Annotated[int, _limit("more rounds", min=1)] = 1000,
    max_repeats: Annotated[int, _limit("to repeat a round more often", min=0)] = 10,
    max_steps: Annotated[int, _limit("more optimizer steps a round", min=1)] = 10_000,
    max_time: Annotated[str, _limit("to train or score longer in a round")] = "12h",
    max_rank: Annotated[int, _limit("a higher rank of the adapter", min=1)] = 256,
    max_length: Annotated[int, _limit("longer rows, in tokens", min=2)] = 8192,
    max_batch_size: Annotated[int, _limit("larger batches, in rows", min=1)] = 256,
    max_adam_epsilon: Annotated[float, _limit("a higher adam_epsilon, with which updates tell more", min=0)] = 1e-5,
    max_download: Annotated[float, _limit("a larger proxy, in GB", min=0)] = 500.0,
    max_epsilon: Annotated[
        float | None,
        typer.Option(
            help="Train with differential privacy alone, and decline what would make your rows cost more, over all "
            "runs and servers.",
            rich_help_panel="Limits",
            min=0,
        ),
    ] = None,
    validation: Annotated[
        Path | None, typer.Option(help="Rows to score adapters on, in place of a part of --data.")
    ] = None,
    scores: Annotated[
        bool, typer.Option("--scores/--no-scores", help="Tell the server how well its adapters do on rows of yours.")
    ] = True,
    cache: Annotated[
        Path | None,
        typer.Option(
            help="Where proxies are kept, and what you remember of a run (default: ~/.cache/fedproxy/proxies)."
        ),
    ] = None,
    patience: Annotated[str, typer.Option(help="How long a server that is away is waited for.")] = "10m",
    wire: Annotated[
        list[str] | None,
        typer.Option(help="Encoding of updates that you agree to beside fp32 (repeatable; default: all)."),
    ] = None,
    supernode: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Answer for a SuperNode that runs already (--isolation process).")
    ] = "",
    supernode_secret: Annotated[
        Path | None, typer.Option(help="With --supernode: its --superexec-auth-secret-file.")
    ] = None,
    supernode_ca: Annotated[Path | None, typer.Option(help="With --supernode: CA of its Runtime API.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Directory for the adapter that the federation ends with, if the offer shares it."),
    ] = None,
    every_round: Annotated[
        bool, typer.Option("--every-round", help="With --out: write it after each round, too, in place of the last.")
    ] = False,
    ledger: Annotated[
        Kept, typer.Option(help="What the ledger of all that leaves keeps of it: its hashes, or all of it.")
    ] = Kept.HASHES,
    peers: Annotated[
        Path | None,
        typer.Option(help="The other clients' public keys, a line NAME KEY each: take part with secure sums alone."),
    ] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Without key and TLS, on loopback only.")] = False,
    force: Annotated[bool, typer.Option("--force", help="With --insecure: beyond loopback, too.")] = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Take part in a federation with your data, which stay here, until its last round."""
    from fedproxy.config import Client, Evaluate
    from fedproxy.deployment.address import Address
    from fedproxy.deployment.joining import Elsewhere, Joining
    from fedproxy.deployment.joining import join as take_part
    from fedproxy.deployment.joining import look as ask
    from fedproxy.federation.offer import Limits
    from fedproxy.federation.wire import ENCODINGS, encoding

    if insecure == (key is not None):
        raise UsageError("Give --key FILE, or --insecure for a federation without keys.")
    if data is None and not task and not look:
        raise UsageError("Give --data FILE, or --task NAME.")
    if (supernode_secret or supernode_ca) and not supernode:
        raise UsageError("--supernode-secret and --supernode-ca are of a SuperNode that --supernode names.")
    if validation is not None and not scores:
        raise UsageError("--validation names rows to score on, and --no-scores gives no scores: leave one of them out.")
    if offer and not re.fullmatch("[0-9a-fA-F]{64}", offer):
        raise UsageError(f"--offer {offer}: must be 64 hex digits, as --look shows them.")
    if every_round and out is None:
        raise UsageError("--every-round says how often --out DIR is written: give both.")
    limits = Limits(
        min_rows=min_rows,
        min_steps=min_steps,
        max_rounds=max_rounds,
        max_repeats=max_repeats,
        max_steps=max_steps,
        max_time=_seconds("--max-time", max_time),
        max_rank=max_rank,
        max_length=max_length,
        max_batch_size=max_batch_size,
        max_adam_epsilon=max_adam_epsilon,
        max_download=round(max_download * _GIGABYTE),
        max_epsilon=max_epsilon,
    )
    joining = Joining(
        Address.parse(address),
        key,
        ca,
        name,
        Client(data="" if task else str(data), task=task),
        Evaluate(data=str(data or "") if task else "", include=str(include or ""), trust_tasks=trust_tasks),
        limits,
        cache,
        force,
        trust_remote_code,
        _seconds("--patience", patience),
        tuple(ENCODINGS) if wire is None else tuple(encoding(name, {})[0].name for name in wire),
        offer.lower(),
        Elsewhere(Address.parse(supernode), supernode_secret, supernode_ca) if supernode else None,
        out,
        every_round,
        ledger is Kept.FULL,
        str(validation or ""),
        scores,
        peers,
    )
    rounds = 1

    def stepped(number: int, step: int, steps: int, loss: float) -> None:
        fraction = (number - 1 + step / steps) / rounds
        show("training", fraction, f"round {number}/{rounds} · step {step}/{steps} · loss {loss:.3f}")

    def welcomed(welcome: "Welcome") -> None:
        nonlocal rounds
        rounds = welcome.offer.federate.rounds
        console().print(f"{address} knows you as {welcome.name} and asks:")
        for line in _asked(welcome.offer):
            console().print(line)

    if look:
        welcomed(ask(joining))
        return
    with progress() as show:
        take_part(
            joining,
            on_welcome=welcomed,
            on_bytes=lambda done, total: show("proxy", done / max(total, 1), f"{done / 1e6:.0f}/{total / 1e6:.0f} MB"),
            on_ready=lambda rows, held, steps: console().print(
                f"Ready: {rows} rows, {steps} steps a round." + f" Adapters are scored on {held} others." * (held > 0)
            ),
            on_step=stepped,
            on_answer=lambda answer, size: console().print(_sent(answer, size)) if _tells(answer) else None,
            on_refusal=lambda reason: console().print(f"Refused the order: {reason}"),
            on_verdict=lambda verdict: console().print(
                f"Round {verdict.round} is over. Your update "
                + (f"does not count: {verdict.reason.rstrip('.')}." if verdict.reason else "counts.")
            ),
        )
    console().print("The federation is complete.")
    if out is not None:
        console().print(f"Its adapter lies in {out}.")


def _seconds(option: str, text: str) -> float:
    from fedproxy.config import seconds

    try:
        return seconds(text)
    except ValueError as error:
        raise UsageError(f"{option}: {error}.") from error


def _tells(answer: "Answer") -> bool:
    """Whether an answer is more than a step of secure sums."""
    from fedproxy.federation.messages import Told

    return not isinstance(answer, Told)


def _sent(answer: "Answer", size: int) -> str:
    """What went out, with the scores in it."""
    from fedproxy.federation.messages import Scored

    if isinstance(answer, Scored):
        return f"Sent a score: the merged adapter of round {answer.round} has {_score(answer.score)}."
    scores = getattr(answer, "validation", {})
    told = "; ".join(f"{_MODELS[name]} {_score(score)}" for name, score in scores.items())
    return f"Sent an update of {size / 1e6:.1f} MB" + (f", and scores: {told}." if told else ".")


def _score(score: "Score") -> str:
    accuracy = "" if score.accuracy is None else f", accuracy {100 * score.accuracy:.1f} %"
    return f"loss {score.loss:.3f}{accuracy}"


def _asked(offer: "Offer") -> Iterator[str]:
    """All that an offer holds, in lines."""
    values = json.loads(offer.encode())
    train = values.pop("train")
    for kind, table in (("", values), ("[train] ", train)):
        yield f"  {kind}{', '.join(f'{key} = {json.dumps(value)}' for key, value in table.items())}"
    federate = offer.federate
    if federate.validation:
        yield (
            f"  validation: {100 * federate.validation:g}% of your rows are kept back and never trained on. How well "
            "adapters do on them goes to the server. Other rows: --validation FILE; no scores: --no-scores."
        )
    if federate.alone:
        yield "  alone: with scores you also train an adapter of your own, which stays here: twice the training."
    if (privacy := offer.train.privacy) is not None:
        yield (
            f"  privacy: of any one of your rows all {federate.rounds} updates tell at most epsilon = "
            f"{privacy.epsilon:g}, and neither losses nor scores leave. A budget of your own: --max-epsilon."
        )
    if federate.secure:
        yield (
            "  secure: your updates leave masked, and the server gets sums over most clients alone, as long as the "
            "keys in --peers FILE are the clients'. Rows, steps, losses and one similarity a round are in the clear."
        )
    yield "  share_result: " + (
        "you can have the adapter at the end: --out DIR." if federate.share_result else "you get no adapter at the end."
    )
    yield f"  SHA-256 of this offer: {offer.sha256}"
