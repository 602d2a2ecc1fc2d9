"""How right an attacker's model answers, on the tasks and documents that the run scores its models on."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from fedproxy.attack_records import ACCURACY_GAP
from fedproxy.errors import ArtifactError, UsageError
from fedproxy.evaluation.experiment import check_tasks, score, scored_tasks
from fedproxy.privacy.attacks.contract import Figure
from fedproxy.privacy.attacks.subject import Subject
from fedproxy.privacy.measures.gap import share_of_gap

Documents = dict[str, list[float]]
"""Task → the main metric of every document."""


@dataclass(frozen=True)
class Examination:
    """The tasks of a run, and what the models at both ends of the gap reach on them.

    Attributes:
        subject: The run.
        llm: What the LLM reaches: share 1. Empty if there is no gap.
        blank: What a model reaches that nobody trained: share 0. It has the same tasks.
        missing: Why there is no gap; a sentence, if there is none.
        notes: What has to be known of the figures; a sentence, if there are any.
    """

    subject: Subject
    llm: Documents = field(default_factory=dict)
    blank: Documents = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def figures(self, where: str, model: Any) -> Iterator[Figure]:
        """The share of the gap that a loaded model closes; nothing if there is no gap."""
        if not self.llm:
            return
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        reached = _documents(self.subject, model)
        share = share_of_gap({task: reached[task] for task in self.llm}, self.blank, self.llm, seed=self.subject.seed)
        if share is not None:
            of = f"accuracy {_mean(reached):.3f}"
            yield Figure(where, ACCURACY_GAP, share.value, share.low, share.high, chance=0.0, of=of)


def examination(subject: Subject, blank: Path) -> Examination:
    """Score both ends of the gap: the LLM, and a checkpoint that nobody trained.

    Only tasks count whose main metric is a mean over the documents and is in the run's averages.

    Raises:
        ArtifactError: a model cannot be used.
    """
    if not scored_tasks(subject.experiment):
        return Examination(subject, missing=["The run scores its models on no task, so there is no gap in accuracy."])
    try:
        check_tasks(subject.experiment)
    except (ArtifactError, UsageError) as error:
        return Examination(subject, missing=[f"The tasks cannot be scored, so there is no gap in accuracy. {error}"])
    llm, untrained = (_documents(subject, model) for model in (subject.experiment.llm.path, blank))
    tasks = sorted(llm.keys() & untrained.keys())
    llm, untrained = ({task: found[task] for task in tasks} for found in (llm, untrained))
    if not tasks:
        return Examination(subject, missing=["No task of the run has an accuracy for each document to compare."])
    ends = f"The accuracy of the LLM is {_mean(llm):.3f}, that of a model that nobody trained {_mean(untrained):.3f}"
    over = f", over {sum(map(len, llm.values()))} documents of {', '.join(tasks)}."
    if share_of_gap(llm, untrained, llm, seed=subject.seed) is None:
        return Examination(subject, missing=[f"{ends}{over} That is no gap to tell."])
    return Examination(subject, llm, untrained, notes=[ends + over])


def _documents(subject: Subject, model: Any) -> Documents:
    """What a checkpoint, or a loaded model, reaches as the run scores its models."""
    found: Documents = {}
    score(
        subject.experiment,
        scored_tasks(subject.experiment),
        model,
        tokenizer=None if isinstance(model, (str, Path)) else subject.tokenizer,
        on_progress=lambda *_: None,
        on_documents=found.__setitem__,
    )
    return found


def _mean(found: Documents) -> float:
    return fmean(map(fmean, found.values()))
