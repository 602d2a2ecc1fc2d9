"""The reference of the experiment file is what the code says now."""

import dataclasses
import importlib.util
import re
from pathlib import Path

from fedproxy.aggregation.merge import RULES
from fedproxy.aggregation.regularise import REGULARISERS
from fedproxy.aggregation.server_optimizer import SERVER_OPTIMIZERS
from fedproxy.aggregation.space import SPACES
from fedproxy.compression.scores import SCORES
from fedproxy.federation.wire import ENCODINGS
from fedproxy.methods import METHODS

ROOT = Path(__file__).parents[2]


def rendered():
    spec = importlib.util.spec_from_file_location("render", ROOT / "scripts" / "render_configuration.py")
    render = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(render)
    return render


def test_the_page_is_rendered_from_the_code():
    render = rendered()
    assert render.PAGE.read_text() == render.page(), "run: make docs"
    for table in ("[llm]", "[[client]]", "[federate]", "[evaluate]"):
        assert f"## `{table}`" in render.page()


def test_every_name_that_a_key_may_have_is_on_the_page():
    page = rendered().PAGE.read_text()
    choices = {"score": SCORES, "merge": RULES, "server_optimizer": SERVER_OPTIMIZERS, "regulariser": REGULARISERS}
    choices |= {"space": SPACES, "wire": ENCODINGS, "wire_down": set(ENCODINGS) - {"top-k"}, "methods": METHODS}
    for key, names in choices.items():
        [row] = re.findall(rf"^\| `{key}` .*", page, re.MULTILINE)
        assert re.search(r"(?:One|Some) of ([^.]*)\.", row)[1].split(", ") == [f"`{name}`" for name in sorted(names)]
    [row] = re.findall(r"^\| `regulariser_strength` .*", page, re.MULTILINE)
    strengths = {name: choice.strength for name, choice in REGULARISERS.items() if choice.strength is not None}
    assert strengths
    assert all(f"`{strength}` with `{name}`" in row for name, strength in strengths.items())


def test_every_option_of_what_can_be_named_is_on_the_page():
    page = rendered().PAGE.read_text()
    for registry in (RULES, SERVER_OPTIMIZERS, ENCODINGS):
        for name, row in registry.items():
            for field in dataclasses.fields(row.options):
                assert f"| `{field.name}` |" in page.partition(f"\n### `{name}`\n")[2].partition("\n#")[0]
