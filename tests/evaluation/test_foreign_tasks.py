"""Task files are programs: what those of strangers may run, and what not."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from jinja2 import UndefinedError
from jinja2.exceptions import SecurityError
from lm_eval import utils
from lm_eval.api.task import ConfigurableTask

import fedproxy.demo
from fedproxy.cli import main
from fedproxy.config import LLM, Client, Compress, Evaluate, Experiment
from fedproxy.errors import ArtifactError, UsageError
from fedproxy.evaluation import evaluate, load_for_evaluation, training_rows
from fedproxy.evaluation.experiment import check_tasks, score
from fedproxy.evaluation.library import contained
from fedproxy.evaluation.loading import load_for_training
from fedproxy.evaluation.tasks import find_task
from fedproxy.federation.client_rows import rows_of
from fedproxy.forecast.run import tasks_of
from tests.conftest import make_tokenizer
from tests.evaluation.conftest import write_rows

ESCAPE = "{{ ().__class__.__mro__[1].__subclasses__() }}"
UNSAFE = [
    ESCAPE,
    "{{ cycler.__init__.__globals__.os.system('touch MARKER') }}",
    "{{ lipsum['__globals__']['os'].system('touch MARKER') }}",
    "{{ text | attr('__class__') }}",
    "{{ '{0.__class__}'.format(text) }}",
    "{{ text | regex_replace('.', '{0.__class__}'.format) }}",
]
PLAIN = (
    "task: own\ndataset_path: json\ndataset_kwargs: {data_files: {train: rows.jsonl}}\n"
    "training_split: train\ntest_split: train\noutput_type: multiple_choice\ndoc_to_text: '{{text}} is'\n"
    "doc_to_choice: [red, blue]\ndoc_to_target: colour\n"
    "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
)
FUNCTION = PLAIN.replace("'{{text}} is'", "!function tools.prompt")

Reader = Callable[[Path, bool], object]


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "marker"


@pytest.fixture
def folder(tmp_path: Path, marker: Path) -> Path:
    """Rows, and a module that leaves the marker when it is imported."""
    folder = tmp_path / "own"
    write_rows(folder / "rows.jsonl", [{"text": f"a {word} tree", "colour": word} for word in ("red", "blue")])
    (folder / "tools.py").write_text(
        f"open({str(marker)!r}, 'w').close()\n\ndef prompt(doc):\n    return doc['text'] + ' is'\n"
        "\ndef rows(**settings):\n    raise AssertionError(settings)\n"
    )
    return folder


def experiment(folder: Path, trust: bool) -> Experiment:
    return Experiment(LLM("llm"), Compress(), evaluate=Evaluate(tasks=["own"], include=str(folder), trust_tasks=trust))


@pytest.fixture(params=["evaluate", "training rows", "a client's rows", "dry run"])
def reader(request: pytest.FixtureRequest, model: Any) -> Reader:
    """Each way to a task, given the folder and whether it is trusted."""
    tokenizer = make_tokenizer()
    tasks: Any = {"tasks": ["own"], "tokenizer": tokenizer}
    known: Any = SimpleNamespace(tokenizer=tokenizer)
    ways: dict[str, Reader] = {
        "evaluate": lambda folder, trust: evaluate(model, include=folder, trust_tasks=trust, **tasks)["tasks"],
        "training rows": lambda folder, trust: training_rows("own", include=folder, trust_tasks=trust),
        "a client's rows": lambda folder, trust: rows_of(
            Client("a", task="own"), Evaluate(include=str(folder), trust_tasks=trust), 0
        ),
        "dry run": lambda folder, trust: tasks_of(experiment(folder, trust), known),
    }
    return ways[request.param]


def test_a_function_runs_only_if_trusted(folder: Path, marker: Path, reader: Reader) -> None:
    (folder / "own.yaml").write_text(PLAIN)
    plain = reader(folder, False)
    (folder / "own.yaml").write_text(FUNCTION)
    with pytest.raises(UsageError) as caught:
        reader(folder, False)
    assert f"!function tools.prompt in {folder}/own.yaml" in str(caught.value)
    assert not marker.exists()
    assert reader(folder, True) == plain
    assert marker.exists()


def test_an_experiment_passes_trust_on(folder: Path, marker: Path, tmp_path: Path) -> None:
    def scored(trust: bool) -> None:
        score(experiment(folder, trust), ["own"], tmp_path / "none", None, proxy=None, on_progress=lambda *_: None)

    (folder / "own.yaml").write_text(FUNCTION)
    for attempt in (scored, lambda trust: check_tasks(experiment(folder, trust))):
        with pytest.raises(UsageError, match=f"{folder}/own.yaml"):
            attempt(False)
    assert not marker.exists()
    check_tasks(experiment(folder, True))
    with pytest.raises(ArtifactError, match="none"):  # no such model
        scored(True)


def test_the_commands_pass_trust_on(
    folder: Path, marker: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def end(*arguments: object) -> object:
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        return ended.value.code

    (folder / "own.yaml").write_text(FUNCTION)
    scoring = "evaluate", folder / "none", "--tasks", "own", "--include", folder
    assert end(*scoring) == 2
    assert str(folder / "own.yaml") in "".join(capsys.readouterr().err.split())
    assert not marker.exists()
    assert end(*scoring, "--trust-tasks") == 3  # no such model
    assert marker.exists()
    seen = []
    monkeypatch.setattr("fedproxy.deployment.joining.join", lambda joining, **_: seen.append(joining.evaluate))
    joining = "join", "127.0.0.1:1", "--insecure", "--task", "own", "--include", folder
    assert (end(*joining), end(*joining, "--trust-tasks")) == (0, 0)
    assert [one.trust_tasks for one in seen] == [False, True]


@pytest.mark.parametrize(
    ("yaml", "named"),
    [
        (f"{PLAIN}process_docs: !function tools.prompt\n", "!function tools.prompt"),
        (f"{PLAIN}custom_dataset: !function tools.rows\n", "!function tools.rows"),
        (f"{PLAIN}fewshot_config: {{samples: !function tools.rows}}\n", "!function tools.rows"),
        (f"{PLAIN}filter_list: [{{name: a, filter: [{{function: !function tools.rows}}]}}]\n", "!function tools.rows"),
        (f"%TAG !f! !func\n---\n{PLAIN}process_docs: !f!tion tools.prompt\n", "!function tools.prompt"),
        (f"{PLAIN}process_docs: !<!function> tools.prompt\n", "!function tools.prompt"),
        (f"{PLAIN}? !function tools.prompt\n: 1\n", "!function tools.prompt"),
        (f"{PLAIN}class: !function tools.rows\n", "own.yaml"),
        (PLAIN.replace("metric: acc", "metric: ./script"), "metric: ./script"),
        (PLAIN.replace("metric: acc", "metric: acc, hf_evaluate: true"), "metric: acc"),
        (f"{PLAIN}generation_kwargs: {{custom_generate: ./code, trust_remote_code: true}}\n", "custom_generate"),
        (PLAIN.replace("data_files", "trust_remote_code: true, data_files"), "trust_remote_code"),
        (PLAIN.replace("dataset_path: json", "dataset_path: ./rows.py"), "dataset_path: ./rows.py"),
        (PLAIN.replace("dataset_path: json", "dataset_path: pandas"), "dataset_path: pandas"),
        (PLAIN.replace("rows.jsonl", "'reference://a::b.json'"), "address"),
        (PLAIN.replace("data_files", "storage_options: {fo: b.json}, data_files"), "storage_options"),
    ],
)
def test_whatever_is_or_names_code_is_found(folder: Path, marker: Path, yaml: str, named: str) -> None:
    (folder / "own.yaml").write_text(yaml)
    with pytest.raises(UsageError) as caught:
        training_rows("own", include=folder)
    assert named in str(caught.value)
    assert str(folder / "own.yaml") in str(caught.value)
    assert not marker.exists()


@pytest.mark.parametrize("yaml", [f"{PLAIN}process_docs: !!python/name:os.system\n", f"{PLAIN}a: !!python/object:a\n"])
def test_python_objects_are_never_made(folder: Path, yaml: str) -> None:
    (folder / "own.yaml").write_text(yaml)
    with pytest.raises(ArtifactError, match=r"own\.yaml"):
        training_rows("own", include=folder, trust_tasks=True)


def test_code_elsewhere_is_named_by_its_own_file(folder: Path, tmp_path: Path, marker: Path) -> None:
    """Neither a chain of includes that leaves the folder nor a link hides it."""
    inner = tmp_path / "mine"
    inner.mkdir()
    (folder / "base.yaml").write_text(FUNCTION)
    (tmp_path / "middle.yaml").write_text(f"include: [{folder}/base.yaml]\n")
    (inner / "own.yaml").write_text("include: ../middle.yaml\ntask: own\ndoc_to_text: '{{text}} is'\n")
    with pytest.raises(UsageError, match=f"{folder}/base.yaml"):
        training_rows("own", include=inner)
    (inner / "own.yaml").unlink()
    (inner / "own.yaml").symlink_to(folder / "base.yaml")
    with pytest.raises(UsageError, match=f"{folder}/base.yaml"):
        training_rows("own", include=inner)
    assert not marker.exists()
    assert len(training_rows("own", include=inner, trust_tasks=True)) == 2


def test_code_of_other_tasks_in_the_folder_is_none_of_this_tasks(folder: Path, marker: Path) -> None:
    (folder / "other.yaml").write_text(FUNCTION.replace("task: own", "task: other"))
    (folder / "own.yaml").write_text(PLAIN)
    assert len(training_rows("own", include=folder)) == 2
    assert not marker.exists()


def test_the_harness_never_opens_a_file_that_is_not_trusted(
    folder: Path, marker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither another YAML reader's view of it nor a change after the check counts, nor a task whose name is a path."""
    (folder / "evil.yaml").write_text(FUNCTION.replace("task: own", "task: evil"))
    (folder / "own.yaml").write_text(PLAIN.replace("task: own", f"task: {folder}/evil.yaml\ngroup: a"))
    find = find_task

    def changed(*arguments: Any, **options: Any) -> Any:
        task = find(*arguments, **options)
        task.path.write_text(FUNCTION)
        return task

    monkeypatch.setattr("fedproxy.evaluation.loading.find_task", changed)
    with pytest.raises(ArtifactError):
        training_rows(f"{folder}/evil.yaml", include=folder)
    (folder / "own.yaml").write_text(PLAIN)
    assert len(training_rows("own", include=folder)) == 2
    assert not marker.exists()


@pytest.mark.parametrize("template", UNSAFE)
def test_unsafe_templates_are_refused_even_if_trusted(folder: Path, marker: Path, template: str) -> None:
    text = template.replace("MARKER", str(marker)).replace("'", "''")
    (folder / "own.yaml").write_text(PLAIN.replace("{{text}} is", text))
    with pytest.raises(ArtifactError, match="'own'"):
        training_rows("own", include=folder, trust_tasks=True)
    assert not marker.exists()


@pytest.mark.parametrize("key", ["doc_to_text", "doc_to_target", "description", "gen_prefix"])
def test_an_unsafe_template_of_a_later_row_names_the_task(folder: Path, reader: Reader, key: str) -> None:
    kept = PLAIN.replace(f"{key}:", "metadata: 0 #")
    (folder / "own.yaml").write_text(f"{kept}{key}: \"{{% if text == 'a blue tree' %}}{ESCAPE}{{% endif %}}red\"\n")
    with pytest.raises(ArtifactError, match="'own'") as caught:
        reader(folder, False)
    assert isinstance(caught.value.__cause__, SecurityError)


def test_a_template_that_does_not_fit_a_later_row_names_the_task(folder: Path, reader: Reader) -> None:
    (folder / "own.yaml").write_text(PLAIN.replace("{{text}} is", "{{text if ''red'' in text else missing}}"))
    with pytest.raises(ArtifactError, match=r"'own'.*'missing'") as caught:
        reader(folder, False)
    assert isinstance(caught.value.__cause__, UndefinedError)


def test_templates_that_a_data_set_refers_to_are_sandboxed(folder: Path, marker: Path, tmp_path: Path) -> None:
    """A data set's README may name files of fsspec's, whose addresses are templates."""
    call = f"{{{{ cycler.__init__.__globals__.os.system('touch {marker}') }}}}"
    reference = {"version": 1, "gen": [{"key": "a.jsonl", "url": call, "dimensions": {"i": {"stop": 1}}}], "refs": {}}
    (folder / "reference.json").write_text(json.dumps(reference))
    (folder / "README.md").write_text(
        f'---\nconfigs:\n- config_name: default\n  data_files: "reference://a.jsonl::{folder}/reference.json"\n---\n'
    )
    kwargs = f"dataset_path: {folder}\ndataset_kwargs: {{cache_dir: {tmp_path}/cache}}\n"
    (folder / "own.yaml").write_text(f"{kwargs}{PLAIN.split('.jsonl}}')[1].strip()}\ntask: own\n")
    with pytest.raises(ArtifactError, match="SecurityError"):
        training_rows("own", include=folder)
    assert not marker.exists()


def texts(task: ConfigurableTask) -> list[object]:
    """All that a task renders of its rows, and what it asks of a model."""
    task.set_fewshot_seed(seed=0)
    task.build_all_requests()
    rendered = [(task.doc_to_text(row), task.doc_to_target(row), task.doc_to_prefix(row)) for row in task.task_docs]
    return [*rendered, *[(instance.args, instance.doc) for instance in task.instances]]


STOCK = ["sst2", "mnli", "arc_easy", "openbookqa"]


@pytest.mark.parametrize("name", [*STOCK, "demo_banking", "demo_dbpedia", "demo_snips", "demo_travel", "spelling"])
def test_tasks_render_as_without_the_sandbox(name: str, data: Path, include: Path) -> None:
    own = Path(fedproxy.demo.__file__).parent / "tasks" if name.startswith("demo") else include
    tasks = (
        load_for_evaluation([name], data=data, include=own)[name],
        load_for_training(name, split=None, data=data, include=own),
    )
    before = utils.env
    for task in tasks:
        outside = texts(task)
        with contained():
            assert utils.env is not before
            assert texts(task) == outside
        assert utils.env is before


@pytest.mark.parametrize(
    "template",
    ["{{ text }}\n", "{{ text | regex_replace('e+', 'E') }}", "{% for c in text %}{{ c | upper }}{% endfor %}"],
)
def test_the_harness_filters_and_line_ends_stay(template: str) -> None:
    outside = utils.apply_template(template, {"text": "a tree"})
    with contained():
        assert utils.apply_template(template, {"text": "a tree"}) == outside


def test_a_copy_of_a_stock_task_asks_the_same(data: Path, tmp_path: Path) -> None:
    """What is given whole to the harness is what it would have read."""
    for name in STOCK:
        task = find_task(name)
        shutil.copytree(task.path.parent, tmp_path / name)
    for name in STOCK:
        stock = load_for_evaluation([name], data=data, include=None)[name]
        own = load_for_evaluation([name], data=data, include=tmp_path / name, trust_tasks=True)[name]
        assert texts(own) == texts(stock)
