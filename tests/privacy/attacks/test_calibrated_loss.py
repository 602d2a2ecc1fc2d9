import pytest

from fedproxy.privacy.attacks.audit import audit
from fedproxy.privacy.attacks.calibrated_loss import CALIBRATED_LOSS, Options, calibrated_loss
from fedproxy.privacy.attacks.subject import Subject

from .conftest import TRAINED, make_run


def by_place(found):
    return {(figure.where, figure.measure): figure for figure in found.figures}


@pytest.mark.slow
def test_rows_learned_by_heart_are_told_from_others_on_proxy_and_fused_llm(learned_by_heart):
    found = by_place(calibrated_loss(Subject(learned_by_heart), Options(), lambda *_: None))
    for model in ("tuned proxy", "fused LLM"):
        area = found[f"{model}, calibrated, mean over clients", "AUC"]
        assert area.low > 0.8
        assert area.of == f"{2 * TRAINED} members, {2 * 48} others"
    assert found["tuned proxy, calibrated, mean over clients", "AUC"].value > 0.9


@pytest.mark.slow
def test_of_a_model_that_was_not_trained_nothing_is_told(untouched):
    found = by_place(calibrated_loss(Subject(untouched), Options(), lambda *_: None))
    area = found["tuned proxy, plain loss, mean over clients", "AUC"]
    assert area.low < 0.5 < area.high


@pytest.mark.slow
def test_without_rows_that_were_not_trained_on_the_attack_says_so(tmp_path):
    run = make_run(tmp_path, epochs=1, rows=None, max_steps=1)
    record = audit(run, [CALIBRATED_LOSS.name])["attacks"][CALIBRATED_LOSS.name]
    assert record["figures"] == []
    assert [why.partition(":")[0] for why in record["missing"]] == ["bank", "travel"]
