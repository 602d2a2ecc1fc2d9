"""A disk that is really full: a small tmpfs, where the machine allows mounting one."""

import subprocess

import pytest

from fedproxy.cli import main


@pytest.fixture
def small_disk(tmp_path):
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not allowed here")
    yield place
    subprocess.run(["umount", place], check=True)


def test_compress_ends_with_code_5_and_leaves_nothing(small_disk, tiny_checkpoint, calibration, capsys):
    with pytest.raises(SystemExit) as end:
        main(["compress", str(tiny_checkpoint()), str(small_disk / "proxy"), "--calibration", str(calibration)])
    assert end.value.code == 5
    assert "space" in capsys.readouterr().err
    assert not list(small_disk.iterdir())
