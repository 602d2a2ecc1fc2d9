import errno
import fcntl
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from fedproxy.artifacts import (
    MANIFEST,
    Manifest,
    check_output,
    check_spared,
    destined,
    locked,
    new_directory,
    new_file,
    os_error,
    read_json,
    write_json,
)
from fedproxy.errors import ArtifactError, ResourceError, UsageError


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    (tmp_path / "f").write_text("old")
    with pytest.raises(KeyboardInterrupt), new_file(tmp_path / "f") as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert [p.name for p in tmp_path.iterdir()] == ["f"]
    assert (tmp_path / "f").read_text() == "old"


def test_a_failed_directory_leaves_the_old_one_and_nothing_else(tmp_path):
    with new_directory(tmp_path / "d") as folder:
        (folder / MANIFEST).write_text("old")
    with pytest.raises(ZeroDivisionError), new_directory(tmp_path / "d", overwrite=True) as folder:
        (folder / MANIFEST).write_text("new")
        raise ZeroDivisionError
    assert [p.name for p in tmp_path.iterdir()] == ["d"]
    assert (tmp_path / "d" / MANIFEST).read_text() == "old"
    with new_directory(tmp_path / "d", overwrite=True) as folder:
        (folder / "y").write_text("new")
    assert [p.name for p in tmp_path.rglob("*")] == ["d", "y"]


def test_what_is_being_written_is_told_by_the_name_it_will_have(tmp_path):
    with new_directory(tmp_path / "my.proxy") as folder:
        assert folder != tmp_path / "my.proxy"
        assert destined(folder) == tmp_path / "my.proxy"
    assert destined(tmp_path / ".hidden") == tmp_path / ".hidden"


def modes(folder):
    return {path.name: stat.S_IMODE(path.stat().st_mode) for path in [folder, *folder.rglob("*")]}


def test_modes_follow_the_umask_at_every_moment(tmp_path, umask):
    with new_directory(tmp_path / "d") as folder:
        assert modes(folder) == {folder.name: 0o777 & ~umask}
        write_json(folder / MANIFEST, 1)
        with new_file(folder / "secret", mode=0o600) as secret:
            assert stat.S_IMODE(os.fstat(secret.fileno()).st_mode) == 0o600
    with new_directory(tmp_path / "d", overwrite=True) as folder:
        write_json(folder / MANIFEST, 2)
        with new_file(folder / "secret", mode=0o600):
            pass
    assert modes(tmp_path / "d") == {"d": 0o777 & ~umask, MANIFEST: 0o666 & ~umask, "secret": 0o600}


def test_existing_output_needs_overwrite(tmp_path):
    write_json(tmp_path / "f", 1)
    with pytest.raises(UsageError, match="--overwrite"), new_file(tmp_path / "f", overwrite=False):
        pass
    with pytest.raises(UsageError, match="--overwrite"), new_directory(tmp_path):
        pass


def test_what_fedproxy_did_not_make_is_never_replaced(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis").write_text("dear")
    (tmp_path / "file").write_text("dear")
    os.mkfifo(tmp_path / "pipe")
    for name in ("mine", "file", "pipe"):
        with pytest.raises(UsageError, match="not made by fedproxy"), new_directory(tmp_path / name, overwrite=True):
            pass
    for name in ("mine", "pipe"):
        with pytest.raises(UsageError, match="is no file that can be replaced"), new_file(tmp_path / name):
            pass
    assert (tmp_path / "mine" / "thesis").read_text() == (tmp_path / "file").read_text() == "dear"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "mine", "pipe"]


def test_what_appears_while_a_directory_is_made_stays(tmp_path):
    with pytest.raises(UsageError, match="exists"), new_directory(tmp_path / "d") as folder:
        (folder / MANIFEST).touch()
        (tmp_path / "d").mkdir()
        (tmp_path / "d" / "thesis").write_text("dear")
    assert [p.name for p in tmp_path.rglob("*")] == ["d", "thesis"]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    ("out", "says"),
    [
        ("llm", "is or contains"),
        ("llm/../llm", "is or contains"),
        ("link", "is or contains"),
        ("parent", "is or contains"),
        ("shards", "is or contains"),
        ("llm/new", "lies in"),
        ("link/new", "lies in"),
    ],
)
def test_an_output_is_apart_from_every_input(tmp_path, out, says, overwrite):
    """Not even with the sign of fedproxy in it."""
    for name in ("parent/llm", "shards"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("parent", "parent/llm", "shards"):
        (tmp_path / name / MANIFEST).touch()
    (tmp_path / "llm").symlink_to(tmp_path / "parent" / "llm")
    (tmp_path / "link").symlink_to("llm")
    (tmp_path / "llm" / "model.safetensors").symlink_to(tmp_path / "shards" / MANIFEST)
    with pytest.raises(UsageError, match=f"{says} .*parent.llm, which is read"):
        check_output(tmp_path / out, ["org/model", tmp_path / "parent" / "llm"], overwrite=overwrite)


def test_a_neighbour_of_the_inputs_can_be_written_and_replaced(tmp_path):
    (tmp_path / "llm").mkdir()
    (tmp_path / "llm-proxy").mkdir()
    (tmp_path / "text").touch()
    inputs = [tmp_path / "llm", tmp_path / "text", "org/model"]
    check_output(tmp_path / "new" / "proxy", inputs, overwrite=False)
    check_output(tmp_path / "llm-proxy", inputs, overwrite=True)
    check_spared(tmp_path / "llm" / "missing", inputs)


def test_unwritable_and_full_disks_are_told_apart(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot write"), new_directory(tmp_path / "file" / "sub"):
        pass
    with pytest.raises(ResourceError, match="Free some space"), new_file(tmp_path / "full"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert os_error(OSError(errno.EROFS, "read-only"), tmp_path).exit_code == 2


def test_json_errors_name_the_file(tmp_path):
    (tmp_path / "bad.json").write_text("{")
    for name in ("bad.json", "missing.json"):
        with pytest.raises(ArtifactError, match=name):
            read_json(tmp_path / name)


def manifest(**changes):
    values = {"kind": "proxy", "llm_sha256": "0" * 64, "llm_blocks": 4, "layer_map": [0, 3], "scores": [1.0, 0, 0, 1]}
    return Manifest(**{**values, **changes})


def test_manifest_round_trip(tmp_path):
    manifest(settings={"remove": 0.5}, seed=3).write(tmp_path)
    assert Manifest.read(tmp_path) == manifest(settings={"remove": 0.5}, seed=3)
    assert read_json(tmp_path / "fedproxy.json")["llm"] == {"sha256": "0" * 64, "blocks": 4}


@pytest.mark.parametrize("layer_map", [[], [3, 0], [0, 0], [0, 4], [-1, 2], ["0"], None, [True]])
def test_impossible_layer_maps_are_refused(tmp_path, layer_map):
    manifest(layer_map=layer_map).write(tmp_path)
    with pytest.raises(ArtifactError, match="layer_map"):
        Manifest.read(tmp_path)


def hold(path):
    """A process that is writing `path` and can be killed."""
    code = "import sys, time; from pathlib import Path; from fedproxy.artifacts import new_directory as new\n"
    code += (
        "with new(Path(sys.argv[1])) as folder: (folder / 'half').touch(); print('ready', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, path], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


def test_what_a_killed_writer_left_is_removed_and_that_of_a_living_one_is_not(tmp_path):
    killed, living = hold(tmp_path / "d"), hold(tmp_path / "e")
    killed.kill()
    killed.communicate()
    assert len(list(tmp_path.iterdir())) == 2
    for name in ("d", "e"):
        with new_directory(tmp_path / name):
            pass
    assert len(list(tmp_path.glob(".d.tmp-*"))) == 0
    assert len(list(tmp_path.glob(".e.tmp-*"))) == 1
    living.kill()
    living.communicate()


def test_what_was_being_replaced_comes_back_after_a_kill(tmp_path):
    (tmp_path / ".d.old-x" / "d").mkdir(parents=True)
    (tmp_path / ".d.old-x" / "d" / "precious").touch()
    with pytest.raises(UsageError, match="overwrite"), new_directory(tmp_path / "d"):
        pass
    assert [path.name for path in tmp_path.rglob("*")] == ["d", "precious"]


@pytest.mark.parametrize("make", [Path.touch, Path.mkdir, lambda path: None])
def test_a_lock_is_refused_after_a_while_or_waited_for(tmp_path, make):
    path, mine = tmp_path / "locks" / "lock", threading.Event()
    path.parent.mkdir()
    make(path)

    def wait() -> None:
        with locked(path):
            mine.set()

    waiting = threading.Thread(target=wait, daemon=True)
    with locked(path):
        with pytest.raises(UsageError, match="at work"), locked(path, 0.0, "another is at work"):
            pass
        waiting.start()
        assert not mine.wait(0.3)
    assert mine.wait(10)


def test_where_the_file_system_knows_no_locks_nobody_waits_and_nothing_counts_as_left_behind(tmp_path, monkeypatch):
    leftover = tmp_path / ".model.tmp-1"
    leftover.mkdir()

    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with locked(tmp_path / "lock", 0.0), locked(tmp_path / "lock", 0.0), new_directory(tmp_path / "model"):
        pass
    assert leftover.is_dir()
