import pytest
import torch

from fedproxy.privacy.attacks.subject import Subject
from fedproxy.privacy.attacks.update_residuals import Options, row_scores, update_residuals
from fedproxy.privacy.measures.membership import estimates

WORST = "nearly linear, rank 256, 16 rows, 2 steps"


@pytest.mark.slow
def test_a_servers_settings_tell_members_by_an_update_and_more_rows_hide_them(learned_by_heart):
    found = update_residuals(Subject(learned_by_heart), Options(), lambda *_: None)
    areas = {figure.where: figure for figure in found.figures if figure.measure == "AUC"}
    assert areas[WORST].low > 0.85
    assert areas[WORST].of == "2 clients, 32 members, 96 others"
    assert areas["the run's settings, 16 rows, 2 steps"].value < areas[WORST].value - 0.1


@pytest.mark.slow
def test_without_an_update_or_with_a_random_one_nothing_is_told(untouched):
    subject = Subject(untouched)
    pairs, _ = subject.pairs(40)
    generator = torch.Generator().manual_seed(0)
    drawn = {name: torch.randn(tensor.shape, generator=generator) for name, tensor in subject.start.items()}
    model = subject.before_training()
    nothing = {name: torch.zeros_like(tensor) for name, tensor in drawn.items()}
    rows = subject.examples(pairs[0].members)
    assert set(row_scores(model, nothing, rows, pad=subject.pad, batch_size=16)) == {-1.0}
    groups = [
        tuple(
            row_scores(model, drawn, subject.examples(side), pad=subject.pad, batch_size=16)
            for side in (pair.members, pair.others)
        )
        for pair in pairs
    ]
    area = estimates(groups, seed=0)["auc"]
    assert area.low < 0.5 < area.high


@pytest.mark.slow
def test_scores_do_not_depend_on_the_batches(learned_by_heart):
    subject = Subject(learned_by_heart)
    rows = subject.examples(subject.rows["bank"])[:5]
    model = subject.before_training()
    generator = torch.Generator().manual_seed(0)
    drawn = {name: torch.randn(tensor.shape, generator=generator) for name, tensor in subject.start.items()}
    one, all_at_once = (row_scores(model, drawn, rows, pad=subject.pad, batch_size=size) for size in (1, 5))
    assert one == pytest.approx(all_at_once, abs=1e-5)
