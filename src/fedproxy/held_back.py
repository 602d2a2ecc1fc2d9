"""What the LLM reaches on the rows that clients keep back, before and after tuning, where these rows are at hand."""

import logging
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from fedproxy.artifacts import Manifest, read_json, write_json
from fedproxy.config import Experiment
from fedproxy.federation.client_rows import ClientRows
from fedproxy.federation.messages import Score
from fedproxy.federation.store import RoundStore
from fedproxy.federation.tuning import OnProgress
from fedproxy.federation.validation import together
from fedproxy.models.checkpoints import load_config, load_tokenizer, padding
from fedproxy.models.encoding import prompt_of
from fedproxy.models.families import readable
from fedproxy.models.lora import load_with_adapter, without_adapter
from fedproxy.models.precision import scored_dtype
from fedproxy.models.validating import BrokenModelError, Validation, answer_of, measure
from fedproxy.run_directory import RunDirectory

_log = logging.getLogger(__name__)

HELD_BACK = "validation.json"
"""RUN/validation.json: what the LLM reaches; it is measured once."""
MOST_LETTERS = 500
"""A longer prompt makes no example."""


def score_llm(
    experiment: Experiment, directory: RunDirectory, rows: ClientRows, on_progress: OnProgress
) -> dict[str, Any]:
    """Score the LLM and the fused LLM as the clients scored the round's adapter that is kept, on the same rows.

    One model is loaded, in the data type in which `evaluate` scores it.

    Args:
        experiment: The experiment.
        directory: The run, with RUN/fused.
        rows: The clients' rows, those kept back among them; none where they lie elsewhere.
        on_progress: Told stage, fraction and text.

    Returns:
        Of "llm" and of "fused" what `together` says, and under "clients" each client's scores of both. Empty where no
        client scored the adapter, or the rows lie elsewhere.

    Raises:
        ArtifactError: the LLM or RUN/fused cannot be used, or what was measured before is damaged.
        ResourceError: the LLM does not fit into memory.
    """
    run = directory.path
    if (run / HELD_BACK).is_file():
        found: dict[str, Any] = read_json(run / HELD_BACK)
        return found
    number = Manifest.read(run / "adapter").settings.get("round")
    kept = RoundStore(run / "rounds").record(number)["clients"] if rows.held and number else {}
    names = [name for name in sorted(kept) if "global" in kept[name].get("validation", {}) and rows.held.get(name)]
    if not names:
        return {}
    with directory.stage("validate"):
        scores = _scores(experiment, directory, rows, names, on_progress)
        clients = {name: {model: asdict(one[name]) for model, one in scores.items() if name in one} for name in names}
        found = {model: together(one) for model, one in scores.items() if one} | {"clients": clients}
        write_json(run / HELD_BACK, found)
    on_progress("validate", 1.0, "LLM scored on the clients' rows")
    return found


def example_prompt(experiment: Experiment, rows: ClientRows) -> dict[str, Any] | None:
    """The prompt of a client's first row that has a short one, kept back if any is, to ask the tuned LLM with.

    Args:
        experiment: The experiment.
        rows: The clients' rows; none where they lie elsewhere.

    Returns:
        `text` and `special`, as of `prompt_of`, and the row's `answer`; none if there is no such row.

    Raises:
        ArtifactError: the LLM has no tokenizer.
    """
    firsts = [(rows.held.get(name) or rows[name])[0] for name in rows if rows.held.get(name) or rows[name]]
    if not firsts:
        return None
    tokenizer = load_tokenizer(experiment.llm.path, trust_remote_code=experiment.llm.trust_remote_code)
    for row, (text, special) in ((row, prompt_of(row, tokenizer)) for row in firsts):
        if 0 < len(text) <= MOST_LETTERS:
            return {"text": text, "special": special, "answer": answer_of(row)[:MOST_LETTERS]}
    return None


def _scores(
    experiment: Experiment, directory: RunDirectory, rows: ClientRows, names: list[str], on_progress: OnProgress
) -> Mapping[str, dict[str, Score]]:
    """Of "llm" and "fused" the score on the rows of each client; a model that is broken has none."""
    llm, trust = experiment.llm.path, experiment.llm.trust_remote_code
    tokenizer = load_tokenizer(llm, trust_remote_code=trust)
    config = load_config(llm, trust_remote_code=trust)
    model = load_with_adapter(llm, directory.path / "fused", dtype=scored_dtype(), trust_remote_code=trust)

    def score(what: str, name: str, done: int) -> Score | None:
        train = experiment.train_of(name)
        held: Validation | None = rows.validation(name, tokenizer, readable(config, train.max_length), train)
        assert held is not None  # of these clients something is kept back
        try:
            loss, accuracy = measure(
                model,
                held,
                pad=padding(tokenizer),
                batch_size=train.batch_size,
                on_read=lambda read, texts: on_progress(
                    "validate", (done + read / texts) / (2 * len(names)), f"{what} · {name}"
                ),
            )
        except BrokenModelError as error:
            _log.warning("%s on the rows that %s keeps back: %s", what, name, error)
            return None
        return Score(loss, held.rows, accuracy)

    with without_adapter(model):
        before = {name: score("untuned LLM", name, done) for done, name in enumerate(names)}
    after = {name: score("tuned LLM", name, done) for done, name in enumerate(names, len(names))}
    return {
        what: {name: one for name, one in scores.items() if one is not None}
        for what, scores in (("llm", before), ("fused", after))
    }
