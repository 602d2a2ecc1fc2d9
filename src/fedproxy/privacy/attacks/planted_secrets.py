"""Memorised secrets: strings that are planted in clients' rows, and how much likelier the tuned models find them."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fedproxy.federation.aligning import write_aligned
from fedproxy.federation.client_rows import ClientRows
from fedproxy.federation.inline import tune_inline
from fedproxy.fusion.run import fuse_run
from fedproxy.models.lora import AdaptedModel
from fedproxy.models.row_losses import row_losses
from fedproxy.privacy.attacks.contract import Attack, Figure, Found, Tell
from fedproxy.privacy.attacks.orders import counted
from fedproxy.privacy.attacks.subject import Row, Subject
from fedproxy.privacy.measures.exposure import CHANCE, exposure, mean
from fedproxy.registry import require_range
from fedproxy.run_directory import RunDirectory
from fedproxy.seeds import derive_seed

TIMES = (0, 1, 4, 16)
"""How often a secret stands in a client's rows; those of 0 times are drawn alike and never seen."""
_DIGITS = 6
_BATCH = 64
_TUNED, _FUSED = 0.6, 0.8
"""Progress when the run was made anew, and when the proxy was asked."""


@dataclass(frozen=True)
class Options:
    """Options of the attack.

    Attributes:
        secrets: Secrets for each number of times.
        candidates: Strings that each secret is ranked among.
    """

    secrets: float = 8
    candidates: float = 255

    def __post_init__(self) -> None:
        require_range("planted-secrets", "secrets", self.secrets, 1, 1000)
        require_range("planted-secrets", "candidates", self.candidates, 1, 1e5)


@dataclass(frozen=True)
class Secret:
    """A secret.

    Attributes:
        times: How often it stands in a client's rows.
        rows: Rows of the same form, with as many different answers; the first is the secret's.
    """

    times: int
    rows: list[Row]


def planted_secrets(subject: Subject, options: Options, tell: Tell) -> Found:
    """Make the run anew with secrets among the clients' rows, and rank each among strings of its form by their loss.

    The clients take turns: each secret stands in the rows of one. The run's own files are left as they are.
    """
    if why := subject.absent_rows:
        return Found(missing=[why])
    secrets = draw(subject.seed, int(options.secrets), int(options.candidates))
    found = Found()
    with tempfile.TemporaryDirectory(prefix="fedproxy-") as folder:
        run = Path(folder)
        _make(subject, run, secrets, lambda done, text: tell(_TUNED * done, text))
        again = Subject(run)
        for model, load, begin in (
            ("tuned proxy", again.tuned_proxy, _TUNED),
            ("fused LLM", again.fused, _FUSED),
        ):
            tell(begin, f"asking the {model}")
            exposed = exposures(again, load(), secrets)
            for times in TIMES:
                some = [bits for bits, secret in zip(exposed, secrets, strict=True) if secret.times == times]
                one = mean(some, seed=derive_seed(subject.seed, "audit", model, times))
                planted = f"planted {counted(times, 'time')}" if times else "never planted"
                of = f"{len(some)} secrets, each among {len(secrets[0].rows) - 1} others"
                found.figures.append(
                    Figure(f"{model}, {planted}", "exposure, bits", one.value, one.low, one.high, CHANCE, of)
                )
    highest = np.log2(len(secrets[0].rows))
    found.notes.append(
        f"{highest:.3g} bits are the most that there are: the secret is the likeliest of all. It is {_DIGITS} digits "
        "behind a prompt that the attacker knows."
    )
    return found


def draw(seed: int, count: int, candidates: int) -> list[Secret]:
    """Draw secrets, so many of each number of times.

    Args:
        seed: The experiment's seed.
        count: Secrets for each number of times.
        candidates: Other strings for each.
    """
    generator = np.random.default_rng(derive_seed(seed, "audit", "secrets"))
    secrets: list[Secret] = []
    for times in TIMES:
        for _ in range(count):
            prompt = f"The access code of store {10 * len(secrets) + 100} is"
            answers: dict[str, None] = {}
            while len(answers) < candidates + 1:
                answers[" " + " ".join(map(str, generator.integers(10, size=_DIGITS)))] = None
            secrets.append(Secret(times, [{"prompt": prompt, "completion": answer} for answer in answers]))
    return secrets


def _make(subject: Subject, run: Path, secrets: Sequence[Secret], tell: Callable[[float, str], None]) -> None:
    """Make a run like the subject's, on the same proxy, with the secrets among its clients' rows."""
    names = sorted(subject.rows)
    planted = {name: list(subject.rows[name]) for name in names}
    for number, secret in enumerate(secrets):
        planted[names[number % len(names)]] += [secret.rows[0]] * secret.times
    experiment = replace(subject.experiment, train=replace(subject.experiment.train, report_to=[]))
    (run / "proxy").symlink_to(subject.proxy.resolve(), target_is_directory=True)
    (run / "experiment.toml").write_bytes((subject.path / "experiment.toml").read_bytes())
    directory = RunDirectory(run)
    rows = ClientRows(planted, subject.rows.held)
    tune_inline(experiment, directory, rows, lambda stage, fraction, text: tell(fraction, text))
    write_aligned(directory)
    fuse_run(experiment, run, lambda *_: None)


def exposures(subject: Subject, model: AdaptedModel, secrets: Sequence[Secret]) -> list[float]:
    """The exposure of each secret in a model, in bits."""
    found = []
    for secret in secrets:
        losses = row_losses(model, subject.examples(secret.rows), pad=subject.pad, batch_size=_BATCH)
        found.append(exposure(losses[0], losses[1:]))
    return found


PLANTED_SECRETS = Attack(
    name="planted-secrets",
    title="Which secrets were learned by heart?",
    paper="The Secret Sharer, arXiv 1802.08232",
    sees="a client, who has the proxy and the adapter, and knows a secret's form; of the fused LLM, who gets log "
    "probabilities from its API",
    options=Options,
    run=planted_secrets,
)
