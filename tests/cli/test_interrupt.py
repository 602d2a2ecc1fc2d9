"""Ctrl-C ends a command with a line that says how it goes on; the tutorial's test presses it for real."""

import pytest

from fedproxy.cli import interruption, main


@pytest.mark.parametrize("command", ["run", "demo", "federate", "serve", "compare", "compress", "fuse", "evaluate"])
def test_resuming_is_offered_where_it_can_be_done(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        main([command, "--help"])
    resumes = "--resume" in capsys.readouterr().out
    assert ("--resume" in interruption([command])) == resumes


@pytest.mark.parametrize("arguments", [[], ["--help"], ["keys", "add"]])
def test_a_command_line_without_such_a_command_is_no_obstacle(arguments):
    assert interruption(arguments) == "interrupted. What was complete is kept."
