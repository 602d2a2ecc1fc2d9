"""The upper bound of a federation: the LLM itself, tuned in one place on what the clients would not share."""

from dataclasses import replace

from fedproxy.adapter_files import write_adapter
from fedproxy.artifacts import Manifest, new_directory
from fedproxy.config import Experiment
from fedproxy.errors import UsageError
from fedproxy.federation.client_rows import ClientRows, encode_for
from fedproxy.federation.start import adapter_manifest, load_proxy
from fedproxy.federation.store import RoundStore
from fedproxy.federation.tuning import OnProgress
from fedproxy.federation.turns import steps_of_all
from fedproxy.models.checkpoints import padding, resolve
from fedproxy.models.lora import adapter_config, adapter_state
from fedproxy.models.training import DivergedError, train
from fedproxy.run_directory import RunDirectory
from fedproxy.seeds import derive_seed


def tune_centralized(
    experiment: Experiment, directory: RunDirectory, rows: ClientRows, on_progress: OnProgress
) -> None:
    """Write RUN/centralized: the LLM itself, tuned on the pooled rows with as many optimizer steps as all clients took.

    Raises:
        UsageError: the training diverged.
    """
    llm = resolve(experiment.llm.path)
    tokenizer, examples = encode_for(llm, rows, experiment)
    settings = replace(experiment.train, blocks="all", privacy=None)  # it is never given away
    complete = RoundStore(directory.path / "rounds").count()  # fewer than planned, if the federation ended early
    done = replace(experiment, federate=replace(experiment.federate, rounds=complete))
    model = load_proxy(replace(experiment, train=settings), llm)
    try:
        train(
            model,
            [example for name in sorted(examples) for example in examples[name]],
            settings,
            pad=padding(tokenizer),
            seed=derive_seed(experiment.seed, "centralized"),
            steps=steps_of_all(done, {name: len(part) for name, part in examples.items()}),
            on_step=lambda step, total, loss: on_progress(
                "centralized", step / total, f"step {step}/{total} · loss {loss:.3f}"
            ),
        )
    except DivergedError as error:
        raise UsageError(f"[evaluate] centralized: {error}") from error
    source = Manifest.read(directory.path / "proxy")
    with new_directory(directory.path / "centralized") as folder:
        manifest = adapter_manifest(source, "llm-adapter", list(range(source.llm_blocks)), experiment)
        write_adapter(folder, adapter_config(model), adapter_state(model), manifest)
