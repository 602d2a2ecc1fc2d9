"""A disk that is really full: a small tmpfs, where the machine allows mounting one."""

import shutil
import subprocess

import pytest

from fedproxy import checkpoint_files
from fedproxy.cli import main
from tests.fusion.test_fuse import make_adapter

SMALL = ["--batch-size", "2", "--max-length", "24"]
HEAL = {"heal": ["--heal-steps", "2", *SMALL], "refit": ["--heal-refit", "2", *SMALL]}


@pytest.fixture
def small_disk(tmp_path):
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not allowed here")
    yield place
    subprocess.run(["umount", place], check=True)


@pytest.mark.parametrize("announced", [True, False], ids=["told before", "found out while writing"])
@pytest.mark.parametrize("job", ["compress", "heal", "refit", "fuse checkpoint", "fuse adapter"])
def test_a_full_disk_ends_with_code_5_and_leaves_nothing(
    job, announced, small_disk, tiny_checkpoint, calibration, tmp_path, monkeypatch, capsys
):
    llm = tiny_checkpoint()
    if not announced:
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(checkpoint_files.shutil, "disk_usage", lambda path: usage)
    out = str(small_disk / "out")
    if job.startswith("fuse"):
        make_adapter(llm, tmp_path / "adapter", layers=None)
        (small_disk / "ballast").write_bytes(b"x" * 50_000)
        command = ["fuse", str(llm), str(tmp_path / "adapter"), out, "--as", job.split()[1]]
    else:
        command = ["compress", str(llm), out, "--calibration", str(calibration), *HEAL.get(job, [])]
    with pytest.raises(SystemExit) as end:
        main(command)
    said = capsys.readouterr().err
    assert end.value.code == 5, said
    assert "space" in said
    assert {path.name for path in small_disk.iterdir()} <= {"ballast"}
