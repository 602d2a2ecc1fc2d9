"""A safetensors file that lies about itself is refused before a tensor is touched: exit code 3, nothing written."""

from collections.abc import Callable
from pathlib import Path

import pytest

from fedproxy.errors import ArtifactError
from fedproxy.tensor_files import load_tensors, read_header
from tests.hostile.checkpoints import single
from tests.hostile.tensor_files import TENSOR_FILES, safetensors

COMMANDS = {
    "compress": ["compress", "llm", "out", "--calibration", "calibration.txt"],
    "fuse": ["fuse", "llm", "adapter", "out", "--as", "checkpoint"],
    "fuse the adapter": ["fuse", "llm", "adapter", "out"],
    "merge": ["merge", "update.safetensors", "update.safetensors", "--out", "out"],
}


@pytest.mark.parametrize("attack", TENSOR_FILES)
def test_refused_by_name_before_a_tensor_is_touched(attack: str, tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    TENSOR_FILES[attack](file)
    for read in (read_header, load_tensors):
        with pytest.raises(ArtifactError, match=r"weights\.safetensors") as error:
            read(file)
        assert len(str(error.value)) < 10_000


def attacked(command: str, place: Path) -> Path:
    """The file that an attack on `command` replaces."""
    if command == "merge":
        return place / "update.safetensors"
    return place / "adapter" / "adapter_model.safetensors" if "adapter" in command else single(place / "llm")


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("attack", TENSOR_FILES)
def test_every_command_ends_with_code_3(
    command: str, attack: str, place: Path, fedproxy: Callable[..., tuple[int, str]]
) -> None:
    file = attacked(command, place)
    TENSOR_FILES[attack](file)
    before = sorted(place.rglob("*"))
    code, said = fedproxy(*COMMANDS[command])
    assert code == 3, said
    assert file.stem in said
    assert sorted(place.rglob("*")) == before


def test_what_is_unusual_but_true_is_read(tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    for header, body, names in [
        (b"{}", b"", set()),
        (b'{"__metadata__":{"format":"pt","json":"{\\"a\\": [1]}"}}  ', b"", set()),
        (b'{ "w" : {"shape":[2],"data_offsets":[0, 8],"dtype":"F32"}\n}   ', bytes(8), {"w"}),
        (b'{"b{\\"}":{"dtype":"U8","shape":[],"data_offsets":[0,1]}}', bytes(1), {'b{"}'}),
        (b'{"w":{"dtype":"F32","shape":[0,9],"data_offsets":[0,0]}}', b"", {"w"}),
    ]:
        file.write_bytes(safetensors(header, body))
        assert read_header(file).entries.keys() == names
        assert load_tensors(file).keys() == names


def test_a_healthy_header_of_many_tensors_is_read(tmp_path: Path) -> None:
    entries = {f"layers.{i}": {"dtype": "U8", "shape": [1], "data_offsets": [i, i + 1]} for i in range(3000)}
    (tmp_path / "w").write_bytes(safetensors(entries, bytes(3000)))
    assert len(read_header(tmp_path / "w").entries) == 3000
