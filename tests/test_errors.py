import pytest

from fedproxy import errors


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.UsageError("x"), 2),
        (errors.ConfigError("a.toml", ["x"]), 2),
        (errors.MissingExtraError("The report", "report"), 2),
        (errors.ArtifactError("x"), 3),
        (errors.FederationError("x"), 4),
        (errors.ResourceError("x"), 5),
    ],
)
def test_every_error_has_its_exit_code(error, code):
    assert isinstance(error, errors.FedproxyError)
    assert error.exit_code == code


def test_config_error_lists_every_problem():
    text = str(errors.ConfigError("a.toml", ["first.", "second."]))
    assert "a.toml: 2 problems" in text
    assert "first." in text
    assert "second." in text


def test_missing_extra_names_the_extra():
    assert "pip install 'fedproxy[report]'" in str(errors.MissingExtraError("The report", "report"))
