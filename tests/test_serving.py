import pytest

from fedproxy.errors import ArtifactError
from fedproxy.serving import IDENTITY, run_identity


def test_a_run_keeps_its_number_where_it_is_moved_and_a_new_one_at_its_place_has_another(tmp_path):
    (tmp_path / "run").mkdir()
    first = run_identity(tmp_path / "run")
    assert (len(first), run_identity(tmp_path / "run")) == (16, first)
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    (tmp_path / "run").mkdir()
    assert run_identity(tmp_path / "elsewhere") == first
    assert run_identity(tmp_path / "run") != first


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"id": 1}'])
def test_a_damaged_number_is_told(tmp_path, content):
    (tmp_path / IDENTITY).write_text(content)
    with pytest.raises(ArtifactError, match=IDENTITY):
        run_identity(tmp_path)
