"""The LLM from the proxy: how much of what the LLM can do a client gets who mends the proxy by itself."""

import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch.nn import functional as F

from fedproxy.attack_records import API_ALONE, AS_IT_IS, FROM_PROXY, OWN_PROXY, WAY
from fedproxy.checkpoint_files import model_identity
from fedproxy.compression.heal import split_documents, texts_of
from fedproxy.compression.heal_student import Student
from fedproxy.compression.heal_training import distil
from fedproxy.compression.prune import prune
from fedproxy.compression.scores.perplexity import mean_loss
from fedproxy.compression.select import lowest, removed_count
from fedproxy.compression.teacher import Teacher, ask_teacher
from fedproxy.config import Heal
from fedproxy.models.checkpoints import fresh_model, load_model, save_checkpoint
from fedproxy.models.families import keep_blocks, readable, vocabulary
from fedproxy.models.placement import open_stream
from fedproxy.models.precision import scored_dtype
from fedproxy.models.source import Source, open_source
from fedproxy.models.text_batches import Batch, batches
from fedproxy.privacy.attacks.accuracy_gap import Examination, examination
from fedproxy.privacy.attacks.contract import Attack, Figure, Found, Tell
from fedproxy.privacy.attacks.subject import Subject
from fedproxy.public_text import read_documents
from fedproxy.registry import require_range
from fedproxy.seeds import derive_seed

SHARES = (0.25, 0.5, 0.75)
BUDGETS = (1, 3, 9)
"""The budgets of healing, in the smallest one."""
TOLD = 20
"""Likeliest next tokens whose log probabilities the LLM's API tells."""


@dataclass(frozen=True)
class Options:
    """Options of the attack.

    Attributes:
        steps: Optimizer steps of the smallest budget of healing; the others are three and nine times that.
        rate: Highest learning rate of healing.
        proxies: The run's "own" proxy, or "all": those without 25, 50 and 75 % of the blocks, by the run's scores, and
            without the first and the last ones.
    """

    steps: float = 20
    rate: float = 1e-3
    proxies: Literal["own", "all"] = "own"

    def __post_init__(self) -> None:
        require_range("llm-from-proxy", "steps", self.steps, 1, 1e6)
        require_range("llm-from-proxy", "rate", self.rate, 1e-8, 1.0)


@dataclass(frozen=True)
class _School:
    """What an attacker learns from and is examined on.

    Attributes:
        settings: Of the largest budget.
        lessons: Public text, as batches.
        teacher: What the LLM's API says of it.
        unseen: Public text that is not learned from.
        ignorance: Loss on that of the counts of tokens in the lessons, in nats a token.
        tasks: The tasks of the run.
        folder: For what is unfinished.
    """

    settings: Heal
    lessons: list[Batch]
    teacher: Teacher
    unseen: list[Batch]
    ignorance: float
    tasks: Examination
    folder: Path


def llm_from_proxy(subject: Subject, options: Options, tell: Tell) -> Found:
    """Measure what share of the way to the LLM several attackers come, by the loss on public text they did not see.

    The way goes from the loss of who knows nothing but how often each token comes, to the LLM's: 0 is the former, 1 the
    latter. On the tasks that the run scores its models on, it goes from the accuracy of a model of the proxy's shape
    that nobody trained, to the LLM's. One attacker takes the proxy as it is; one fills each gap by copies of the
    nearest block; one trains all of the proxy on what the LLM's API says of public text; and one, whom no proxy is
    needed for, trains a model of the proxy's shape from nothing on the same.
    """
    experiment = subject.experiment
    text = experiment.heal.text or experiment.compress.calibration
    if not text:
        return Found(missing=["The run names no public text to heal on: [compress] calibration, or [heal] text."])
    found = Found()
    with tempfile.TemporaryDirectory(prefix="fedproxy-") as place:
        folder = Path(place)
        llm = open_source(experiment.llm.path, trust_remote_code=experiment.llm.trust_remote_code)
        tell(0.0, "asking the LLM")
        blank = folder / "blank"
        drawn = fresh_model(subject.proxy, seed=subject.seed, trust_remote_code=experiment.llm.trust_remote_code)
        save_checkpoint(blank, drawn, subject.proxy)
        school = _school(subject, options, llm, text, examination(subject, blank), folder)
        proxies = list(_proxies(subject, options, llm, folder))
        for number, (name, keep, proxy) in enumerate(proxies):
            tell(0.1 + 0.7 * number / len(proxies), name)
            found.figures += _attacked(subject, school, name, keep, proxy, llm.count)
        tell(0.8, "only the API")
        found.figures += _taught(subject, school, API_ALONE, blank)
    lost = math.log(school.teacher.perplexity)
    learned, held = (sum(len(batch.input_ids) for batch in part) for part in (school.lessons, school.unseen))
    found.notes += [
        f"The loss of the LLM is {lost:.3f} nats a token, that of who counts tokens {school.ignorance:.3f}. The API "
        f"tells the {TOLD} likeliest tokens' log probabilities.",
        f"The text is {learned} documents to learn from and {held} others. More text and more steps bring an attacker "
        "further.",
        *school.tasks.notes,
    ]
    found.missing += school.tasks.missing
    return found


def _school(subject: Subject, options: Options, llm: Source, text: str, tasks: Examination, folder: Path) -> _School:
    experiment, steps = subject.experiment, int(options.steps) * BUDGETS[-1]
    settings = Heal(
        steps=steps,
        mode="full",
        learning_rate=options.rate,
        max_length=readable(llm.decoder.config, experiment.compress.max_length),
        temperature=1.0,
        hidden_weight=0.0,
        top_k=TOLD,
        save_every=steps,
    )
    wanted = settings.steps * settings.batch_size
    parts = split_documents(read_documents(text)[0], settings, subject.seed, wanted=wanted)
    lessons, unseen = (
        batches(subject.tokenizer, part, max_length=settings.max_length, batch_size=settings.batch_size)
        for part in parts
    )
    work = folder / "teacher"
    work.mkdir()
    placement = experiment.compress.placement
    teacher = ask_teacher(
        work, llm, range(llm.count), lessons, unseen, settings, placement=placement, progress=lambda *_: None
    )
    ignorance = counted_loss(lessons, unseen, vocabulary(llm.decoder))
    return _School(settings, lessons, teacher, unseen, ignorance, tasks, folder)


def _proxies(subject: Subject, options: Options, llm: Source, folder: Path) -> Iterator[tuple[str, list[int], Path]]:
    """The proxies that are attacked: what each is called, the LLM's blocks that it keeps, and where it lies."""
    if options.proxies == "own":
        yield OWN_PROXY, subject.manifest.layer_map, subject.proxy
        return
    scores = subject.manifest.scores
    for share in SHARES:
        gone = removed_count(llm.count, share)
        choices: dict[str, Sequence[int]] = {
            "first hidden": range(gone),
            "last hidden": range(llm.count - gone, llm.count),
        }
        if scores:
            choices = {"by the run's scores": lowest(scores, gone, range(llm.count))[gone], **choices}
        named: dict[frozenset[int], list[str]] = {}
        for how, removed in choices.items():
            named.setdefault(frozenset(removed), []).append(how)
        for number, (hidden, hows) in enumerate(named.items()):
            keep = [block for block in range(llm.count) if block not in hidden]
            place = folder / f"{share}-{number}"
            place.mkdir()
            prune(llm, keep, place)
            yield f"{share:.0%} removed, {' = '.join(hows)}", keep, place


def _attacked(
    subject: Subject, school: _School, name: str, keep: Sequence[int], proxy: Path, count: int
) -> Iterator[Figure]:
    trust = subject.experiment.llm.trust_remote_code
    source = open_source(proxy, trust_remote_code=trust)
    stream = open_stream(source, subject.experiment.compress.placement)
    passages = [stream.enter(batch.input_ids, batch.attention_mask) for batch in school.unseen]
    for attacker, order in ((AS_IT_IS, range(len(keep))), ("gaps filled by copies", filled(keep, count))):
        states = stream.carried(passage.hidden for passage in passages)
        for number, _ in stream.walk(order):
            for passage, state in zip(passages, states, strict=True):
                state.copy_(stream.run(number, passage, state))
        where = f"{name}, {attacker}"
        yield _figure(school, where, mean_loss(stream, passages, states, "the proxy"))
        if school.tasks.llm:
            model = keep_blocks(load_model(proxy, dtype=scored_dtype(), trust_remote_code=trust), order)
            yield from school.tasks.figures(where, model)
    yield from _taught(subject, school, f"{name}, healed", proxy)


def _taught(subject: Subject, school: _School, name: str, model: Path) -> Iterator[Figure]:
    """A model trained on what the API says, with each budget."""
    source = open_source(model, trust_remote_code=subject.experiment.llm.trust_remote_code)
    seed = derive_seed(subject.seed, "audit", "heal")
    for budget in BUDGETS:
        settings = replace(school.settings, steps=school.settings.steps * budget // BUDGETS[-1])
        student = Student(
            source, settings, range(source.count), seed=seed, longest=settings.max_length, everything=True
        )
        with tempfile.TemporaryDirectory(dir=school.folder) as work:
            distil(
                student,
                school.teacher,
                texts_of(school.lessons),
                settings,
                proxy=model_identity(model),
                pad=subject.pad,
                seed=seed,
                work=Path(work),
                on_step=lambda *_: None,
            )
        where = f"{name}, {settings.steps} steps"
        yield _figure(school, where, student_loss(student, school.unseen))
        yield from school.tasks.figures(where, student.model)


def filled(keep: Sequence[int], count: int) -> list[int]:
    """For each of the LLM's blocks the place of the nearest one that is kept; of two the lower.

    Example:
        >>> filled([0, 3], 5)
        [0, 0, 1, 1, 1]
    """
    return [min(range(len(keep)), key=lambda place: abs(keep[place] - block)) for block in range(count)]


def counted_loss(lessons: Sequence[Batch], unseen: Sequence[Batch], tokens: int) -> float:
    """Loss of predicting each token by how often it comes in the lessons, and once more, in nats a token.

    Args:
        lessons: What is counted.
        unseen: What is predicted; the first token of a text is not.
        tokens: Tokens of the vocabulary.
    """
    seen = torch.cat([batch.input_ids[batch.attention_mask.bool()] for batch in lessons])
    counts = torch.bincount(seen, minlength=tokens).double() + 1
    met = torch.cat([batch.input_ids[:, 1:][batch.attention_mask[:, 1:].bool()] for batch in unseen])
    return float(-(counts / counts.sum()).log()[met].mean())


@torch.no_grad()
def student_loss(student: Student, texts: Sequence[Batch]) -> float:
    """Mean of -log p(token | tokens before it), in nats; the first token of a text is not counted."""
    total, count = 0.0, 0
    for batch in texts:
        real = batch.attention_mask.bool()
        logits, _ = student(batch.input_ids, batch.attention_mask)
        ahead = F.pad(batch.input_ids[:, 1:], (0, 1))[real]
        counts = F.pad(real[:, 1:], (0, 1))[real]
        losses = F.cross_entropy(logits.float().cpu()[counts], ahead[counts], reduction="sum")
        total, count = total + float(losses), count + int(counts.sum())
    return total / count


def _figure(school: _School, where: str, loss: float) -> Figure:
    share = (school.ignorance - loss) / (school.ignorance - math.log(school.teacher.perplexity))
    return Figure(where, WAY, share, chance=0.0, of=f"loss {loss:.3f} nats a token")


LLM_FROM_PROXY = Attack(
    name=FROM_PROXY,
    title="How much of the LLM is in the proxy?",
    paper="distillation, arXiv 1503.02531",
    sees="a client, who keeps the proxy and has the LLM's API; the last rows, anybody who has the API",
    options=Options,
    run=llm_from_proxy,
)
