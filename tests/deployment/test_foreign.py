"""Flower's processes find what another package adds, and end in the bits of the engine inline."""

import os

import pytest

from tests.contracts.foreign import FEDERATE, install_others
from tests.deployment.conftest import FEDPROXY, WORDS


@pytest.mark.long
def test_flowers_processes_find_choices_of_another_package(federation, tmp_path, monkeypatch):
    found = os.pathsep.join([str(install_others(tmp_path / "site")), os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", found)
    one = federation(rounds=2, quorum=3, **FEDERATE)
    for out, engine in (("inline", "inline"), ("simulated", "simulation")):
        arguments = ["federate", one.experiment, "--out", one.folder / out, "--engine", engine]
        one.start(out, *arguments, command=FEDPROXY).ends()
    owner = one.serve("served", command=FEDPROXY)
    clients = [one.join(name, command=FEDPROXY) for name in WORDS]
    owner.ends()
    for client in clients:
        client.ends()
    assert one.adapter("inline") == one.adapter("simulated") == one.adapter("served")
