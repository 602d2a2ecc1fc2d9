"""Cut the demo's four tasks and its calibration text out of openly licensed data sets.

    python scripts/make_demo_data.py --data ../shared/data --out src/fedproxy/demo/tasks \
        --corpus ../shared/corpus/fairytaleqa_stories.txt.gz --calibration src/fedproxy/demo/calibration.txt

Every task is a harness task file NAME.yaml beside NAME/train.jsonl and NAME/test.jsonl; SOURCES.md says where the rows
come from and what was changed. The same input gives the same bytes.
"""

import argparse
import gzip
import json
import random
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

TRAIN_ROWS, TEST_ROWS = 600, 150
CALIBRATION_BYTES = 60_000
SEED = 0


@dataclass(frozen=True)
class Task:
    """One extract.

    Attributes:
        name: Name of the task.
        folder: Folder of the full data set.
        classes: Class in the data set (label text, or number where there is none) → answer word.
        prompt: Template of the question; the answer follows it after a space.
        sources: The section of SOURCES.md, without the part on changes.
        field: Field that holds the text.
        words: Words of the text to keep, or None for all.
    """

    name: str
    folder: str
    classes: dict[str | int, str]
    prompt: str
    sources: str
    field: str = "text"
    words: int | None = None


TASKS = [
    Task(
        "demo_snips",
        "snips",
        {
            "AddToPlaylist": "playlist",
            "BookRestaurant": "restaurant",
            "GetWeather": "weather",
            "PlayMusic": "music",
            "RateBook": "rating",
            "SearchCreativeWork": "title",
            "SearchScreeningEvent": "cinema",
        },
        "Command: {{text}}\\nAction:",
        """- Work: SNIPS Natural Language Understanding benchmark, custom intent engines (2017).
- Authors: Alice Coucke, Alaa Saade, Adrien Ball, Théodore Bluche, Alexandre Caulier, David Leroy, Clément Doumouro,
  Thibault Gisselbrecht, Francesco Caltagirone, Thibaut Lavril, Maël Primet, Joseph Dureau (Snips); "Snips Voice
  Platform: an embedded Spoken Language Understanding system for private-by-design voice interfaces", arXiv:1805.10190.
- Source: <https://github.com/sonos/nlu-benchmark>, by way of <https://github.com/jianguoz/Few-Shot-Intent-Detection>
  (commit fa955331, Datasets/SNIPS: 13,084 training and 700 test rows).
- Licence: [CC0 1.0](https://creativecommons.org/publicdomain/zero/1.0/).""",
    ),
    Task(
        "demo_travel",
        "clinc150",
        {
            "book_flight": "flight",
            "book_hotel": "hotel",
            "car_rental": "rental",
            "lost_luggage": "luggage",
            "international_visa": "visa",
            "plug_type": "plug",
            "translate": "translate",
            "vaccines": "vaccines",
            "timezone": "timezone",
            "exchange_rate": "exchange",
        },
        "Traveller: {{text}}\\nTopic:",
        """- Work: CLINC150, the data of "An Evaluation Dataset for Intent Classification and Out-of-Scope
  Prediction", EMNLP-IJCNLP 2019, <https://aclanthology.org/D19-1131>.
- Authors: Stefan Larson, Anish Mahendran, Joseph J. Peper, Christopher Clarke, Andrew Lee, Parker Hill, Jonathan K.
  Kummerfeld, Kevin Leach, Michael A. Laurenzano, Lingjia Tang, Jason Mars (Clinc, Inc.).
- Source: <https://github.com/clinc/oos-eval>, by way of <https://github.com/jianguoz/Few-Shot-Intent-Detection>
  (commit fa955331, Datasets/CLINC150).
- Licence: [CC BY 3.0](https://creativecommons.org/licenses/by/3.0/).""",
    ),
    Task(
        "demo_banking",
        "banking77",
        {
            "age_limit": "age",
            "change_pin": "pin",
            "country_support": "country",
            "request_refund": "refund",
            "terminate_account": "close",
            "verify_my_identity": "identity",
            "lost_or_stolen_card": "lost",
            "card_arrival": "arrival",
        },
        "Customer: {{text}}\\nIssue:",
        """- Work: BANKING77, the data of "Efficient Intent Detection with Dual Sentence Encoders", NLP for ConvAI
  workshop at ACL 2020, arXiv:2003.04807.
- Authors: Iñigo Casanueva, Tadas Temčinas, Daniela Gerz, Matthew Henderson, Ivan Vulić (PolyAI Limited).
- Source: <https://github.com/PolyAI-LDN/task-specific-datasets>, by way of
  <https://github.com/jianguoz/Few-Shot-Intent-Detection> (commit fa955331, Datasets/BANKING77).
- Licence: [CC BY 4.0](https://creativecommons.org/licenses/by/4.0/).""",
    ),
    Task(
        "demo_dbpedia",
        "dbpedia_14",
        {
            0: "company",
            1: "school",
            3: "athlete",
            6: "building",
            8: "village",
            10: "plant",
            11: "album",
            12: "film",
        },
        "Article: {{text}}\\nKind:",
        """- Work: DBpedia ontology classification dataset, version 2 (2015), made from DBpedia 2014, which is
  made from Wikipedia.
- Authors: the contributors to Wikipedia; the DBpedia project (Jens Lehmann, Robert Isele, Max Jakob, Anja Jentzsch,
  Dimitris Kontokostas, Pablo N. Mendes, Sebastian Hellmann, Mohamed Morsey, Patrick van Kleef, Sören Auer, Christian
  Bizer); the classification dataset by Xiang Zhang, used in Xiang Zhang, Junbo Zhao, Yann LeCun, "Character-level
  Convolutional Networks for Text Classification", NIPS 2015.
- Source: a sample of 7,600 rows in <https://github.com/cmnfriend/O-LoRA> (CL_Benchmark/TC/dbpedia/test.json), split
  into 6,600 training and 1,000 test rows before this extract was made.
- Licence: [CC BY-SA 3.0](https://creativecommons.org/licenses/by-sa/3.0/) (the original also under the GNU FDL). This
  extract is passed on under CC BY-SA 3.0 as well.""",
        field="content",
        words=24,
    ),
]

CALIBRATION_SOURCE = """## calibration.txt

- Work: the opening stories of the FairytaleQA collection: old fairy tales whose texts are from Project Gutenberg.
- Collection: Ying Xu, Dakuo Wang, Mo Yu and others, "Fantastic Questions and Where to Find Them:
  FairytaleQA", ACL 2022.
- Source: <https://github.com/uci-soe/FairytaleQAData> (commit a24ddc17, data-by-train-split/section-stories/all).
- Licence: the stories are in the public domain; the collection is under Apache-2.0.
- Changed: the first {stories} stories ({size:,} bytes), line breaks within a passage removed, a blank line
  between passages.
"""


def _key(text: str) -> str:
    """What two texts share that differ only in case, spacing and punctuation."""
    return " ".join(re.findall(r"\w+", text.casefold()))


def _read(path: Path, task: Task) -> dict[str, list[str]]:
    """Answer word → distinct texts of its class, in file order."""
    texts: dict[str, list[str]] = {word: [] for word in task.classes.values()}
    seen = set()
    with open(path, encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            word = task.classes.get(row.get("label_text", row["label"]))
            text = " ".join(row[task.field].split()[: task.words])
            if word is not None and _key(text) not in seen:
                seen.add(_key(text))
                texts[word].append(text)
    return texts


def _balanced(texts: dict[str, list[str]], rows: int, rng: random.Random) -> list[tuple[str, str]]:
    """Equally many (text, answer word) of every class, at most `rows` together, shuffled."""
    each = min(rows // len(texts), *(len(group) for group in texts.values()))
    chosen = [(text, word) for word, group in texts.items() for text in rng.sample(group, each)]
    rng.shuffle(chosen)
    return chosen


def _write_rows(path: Path, rows: Iterable[tuple[str, str]], choices: list[str]) -> None:
    records = ({"text": text, "label": choices.index(word), "label_text": word} for text, word in rows)
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")


def _yaml(task: Task, choices: list[str]) -> str:
    return f"""task: {task.name}
dataset_path: json
dataset_kwargs:
  data_files:
    train: {task.name}/train.jsonl
    test: {task.name}/test.jsonl
training_split: train
test_split: test
output_type: multiple_choice
doc_to_text: "{task.prompt}"
doc_to_choice: [{", ".join(f'"{word}"' for word in choices)}]
doc_to_target: label
target_delimiter: " "
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""


def make_task(task: Task, data: Path, out: Path) -> str:
    """Write one task's files; return its section of SOURCES.md."""
    rng = random.Random(f"{SEED} {task.name}")
    choices = list(task.classes.values())
    folder = data / task.folder
    test_texts = _read(folder / "test.jsonl", task)
    held_out = {_key(text) for group in test_texts.values() for text in group}
    train_texts = defaultdict(list)
    for word, group in _read(folder / "train.jsonl", task).items():
        train_texts[word] = [text for text in group if _key(text) not in held_out]
    train, test = _balanced(train_texts, TRAIN_ROWS, rng), _balanced(test_texts, TEST_ROWS, rng)
    (out / task.name).mkdir(parents=True, exist_ok=True)
    _write_rows(out / task.name / "train.jsonl", train, choices)
    _write_rows(out / task.name / "test.jsonl", test, choices)
    (out / f"{task.name}.yaml").write_text(_yaml(task, choices), encoding="utf-8")
    print(f"{task.name}: {len(train)} train, {len(test)} test")
    words = ", ".join(f"{source} → {word}" for source, word in task.classes.items())
    numbered = " (class numbers count from 0)" if task.folder == "dbpedia_14" else ""
    cut = f"only the first {task.words} words of the field `{task.field}` kept; " if task.words else ""
    changed = (
        f"- Changed: {len(choices)} classes kept and renamed: {words}{numbered}; {cut}{len(train)} of the training and "
        f"{len(test)} of the test rows drawn at random, equally many of each class; repeated texts, and training texts "
        "that occur among the test rows, left out; fields renamed."
    )
    return f"## {task.name}\n\n{task.sources}\n{changed}\n"


def make_calibration(corpus: Path, out: Path) -> str:
    """Write about `CALIBRATION_BYTES` of whole stories, blank lines between passages; return their SOURCES.md part."""
    with gzip.open(corpus, "rt", encoding="utf-8") as file:
        stories = file.read().split("<|endoftext|>")
    passages: list[str] = []
    size = used = 0
    for story in stories:
        if size >= CALIBRATION_BYTES:
            break
        found = [" ".join(part.split()) for part in story.split("\n\n") if part.strip()]
        passages += found
        size += sum(len(passage.encode()) + 2 for passage in found)
        used += 1
    text = "\n\n".join(passages) + "\n"
    out.write_text(text, encoding="utf-8")
    print(f"{out.name}: {used} stories, {len(passages)} passages, {len(text.encode())} bytes")
    return CALIBRATION_SOURCE.format(stories=used, size=len(text.encode()))


def main() -> None:
    """Parse the command line and write everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="holds snips/, clinc150/, banking77/, dbpedia_14/")
    parser.add_argument("--corpus", type=Path, required=True, help="fairytaleqa_stories.txt.gz")
    parser.add_argument("--out", type=Path, required=True, help="folder for the tasks and SOURCES.md")
    parser.add_argument("--calibration", type=Path, required=True, help="file for the calibration text")
    arguments = parser.parse_args()
    sections = [make_task(task, arguments.data, arguments.out) for task in TASKS]
    sections.append(make_calibration(arguments.corpus, arguments.calibration))
    head = "# Sources of the demo's data\n\nWritten by scripts/make_demo_data.py. No author endorses this project.\n"
    (arguments.out / "SOURCES.md").write_text("\n".join([head, *sections]), encoding="utf-8")


if __name__ == "__main__":
    main()
