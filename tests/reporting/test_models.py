import pytest
from rich.console import Console

from fedproxy.records import MODELS
from fedproxy.reporting import plots, results_table
from fedproxy.reporting.page import render
from tests.reporting.sample import TASKS, parse, sample, scored

NAME = "LLM with decode-time proxy tuning"


def run_with(*models: str) -> dict[str, object]:
    raw = sample()
    raw["evaluation"]["proxy_tuning"] = scored([0.81, 0.82, 0.83, 0.84], TASKS)
    raw["evaluation"] = {model: raw["evaluation"][model] for model in models}
    return raw


@pytest.mark.parametrize("models", [tuple(MODELS), ("llm", "proxy_tuning"), ("proxy_tuning",)])
def test_decode_time_proxy_tuning_has_its_column_in_table_and_page(models: tuple[str, ...]) -> None:
    raw = run_with(*models)
    console = Console(width=160, record=True, file=None)
    with console.capture() as shown:
        console.print(results_table(raw))
    assert NAME in shown.get()
    assert "82.5" in shown.get()
    page = render(parse(raw), events=[], run="run")
    assert NAME in page
    assert "82.5" in page


def test_the_legend_of_all_models_fits_the_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def measure(drawn, *names):
        drawn.canvas.draw()
        if names[0] != "scores":
            return ""
        box = drawn.legends[0].get_window_extent()
        seen.append((box.x0, drawn.bbox.width - box.x1))
        return ""

    monkeypatch.setattr(plots, "inline", measure)
    render(parse(run_with(*MODELS)), events=[], run="run")
    assert min(seen[0]) >= 0
