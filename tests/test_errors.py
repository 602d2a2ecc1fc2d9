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


def test_what_names_no_path_is_told_whole():
    assert errors.told(errors.FederationError("round 9 was ordered of 3.")).endswith(" round 9 was ordered of 3.")


def test_config_error_lists_every_problem():
    text = str(errors.ConfigError("a.toml", ["first.", "second."]))
    assert "a.toml: 2 problems" in text
    assert "first." in text
    assert "second." in text


PATHS = [
    "/home/ann/rows.jsonl",
    "/home/ann/my data, new/rows.jsonl",
    "ann/rows.jsonl",
    "~/ann/rows.jsonl",
    "C:\\ann\\my data\\rows.jsonl",
    "file:///ann/ann/rows.jsonl",
]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "text",
    [
        "{path}",
        "{path} is damaged.",
        "[Errno 28] No space left: '{path}'. 3",
        "2 {path}\n({path}:{path})\n3",
        "2({path})",
    ],
)
@pytest.mark.parametrize("kind", [errors.ArtifactError, errors.FederationError, errors.ResourceError])
def test_the_other_side_is_told_kinds_and_names_and_no_folders(kind, text, path):
    error = kind(text.format(path=path))
    said = errors.told(error)
    assert kind.__name__ in said
    assert "rows.jsonl" in said
    assert "3" not in text or "3" in said
    assert not [part for part in ("ann", "my data", "/", "\\") if part in said]
    assert path in str(error)


def test_missing_extra_names_the_extra():
    assert "pip install 'fedproxy[report]'" in str(errors.MissingExtraError("The report", "report"))
