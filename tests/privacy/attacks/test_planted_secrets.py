import pytest

from fedproxy.privacy.attacks.planted_secrets import TIMES, Options, draw, planted_secrets
from fedproxy.privacy.attacks.subject import Subject
from fedproxy.privacy.measures.exposure import CHANCE

FEW = Options(secrets=4, candidates=63)


def by_model(run):
    found = planted_secrets(Subject(run), FEW, lambda *_: None).figures
    return {figure.where: figure for figure in found}


@pytest.mark.slow
def test_what_stands_sixteen_times_is_learned_by_heart_and_what_never_stood_is_not(learned_by_heart):
    found = by_model(learned_by_heart)
    for model in ("tuned proxy", "fused LLM"):
        often, never = found[f"{model}, planted 16 times"], found[f"{model}, never planted"]
        assert often.value > 4
        assert often.low > CHANCE
        assert never.value < 3
    assert not any(learned_by_heart.glob("*secret*"))


@pytest.mark.slow
def test_of_a_model_that_was_not_trained_no_secret_is_known(untouched):
    found = by_model(untouched)
    assert all(figure.value < 3 for figure in found.values())
    often = found["tuned proxy, planted 16 times"]
    assert often.low < CHANCE + 0.5


def test_secrets_differ_from_their_candidates_and_the_seed_draws_them():
    secrets = draw(0, 2, 9)
    assert [secret.times for secret in secrets] == [times for times in TIMES for _ in range(2)]
    for secret in secrets:
        assert len({row["completion"] for row in secret.rows}) == 10
        assert len({row["prompt"] for row in secret.rows}) == 1
    assert len({secret.rows[0]["prompt"] for secret in secrets}) == len(secrets)
    assert draw(0, 2, 9) == secrets != draw(1, 2, 9)
