import os
import socket
import subprocess
import sys

import pytest

from fedproxy.deployment.flower import clientapps

FLOWERS = ("flwr-agentapp", "flwr-connector", "flwr-model", "flwr-serverapp", "flwr-simulation", "flwr")


@pytest.fixture
def commands(tmp_path):
    clientapps.write_launchers(tmp_path, tmp_path / "socket")
    return tmp_path


@pytest.mark.parametrize("name", FLOWERS)
def test_a_client_starts_no_other_command_of_flower(commands, name):
    path = os.pathsep.join([str(commands), os.path.dirname(sys.executable), os.environ["PATH"]])
    done = subprocess.run([name, "--version"], env={"PATH": path}, capture_output=True, text=True, timeout=20)
    assert (done.returncode, done.stdout) == (1, "")
    assert f"runs no {name}" in done.stderr


def test_the_launcher_hands_over_its_arguments(commands):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(commands / "socket"))
        listener.listen()
        with subprocess.Popen([commands / "flwr-clientapp", "--token", "a b"]) as process:
            connection, _ = listener.accept()
            with connection:
                assert connection.recv(1000).decode().split("\0") == ["--token", "a b"]
            assert process.wait(20) == 0


def test_a_release_of_flower_that_loads_apps_in_another_way_is_refused():
    with pytest.raises(RuntimeError, match="another way"):
        clientapps._replace("flwr.supernode.runtime.run_clientapp", "load_the_app", None)
