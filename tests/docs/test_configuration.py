"""The reference of the experiment file is what the code says now."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_page_is_rendered_from_the_code():
    spec = importlib.util.spec_from_file_location("render", ROOT / "scripts" / "render_configuration.py")
    render = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(render)
    assert render.PAGE.read_text() == render.page(), "run: make docs"
    for table in ("[llm]", "[[client]]", "[federate]", "[evaluate]"):
        assert f"## `{table}`" in render.page()
