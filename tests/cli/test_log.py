import json

from fedproxy.deployment.audit import AUDIT, Audit


def test_a_log_is_shown_and_verified(cli, tmp_path):
    with Audit(tmp_path / AUDIT) as log:
        log.note("started", address="127.0.0.1:9443")
        log.note("refused", reason="\x1b[2Jnot registered")
    code, out, _ = cli("log", tmp_path, "--json")
    events = json.loads(out)["events"]
    assert (code, [event["event"] for event in events]) == (0, ["started", "refused"])
    code, out, err = cli("log", tmp_path)
    assert (code, out) == (0, "")
    assert events[-1]["sha256"] in err.replace("\n", "")
    assert "127.0.0.1:9443" in err
    assert "\x1b" not in err

    path = tmp_path / AUDIT
    path.write_text(path.read_text().replace("9443", "9444"))
    code, out, err = cli("log", tmp_path)
    assert (code, out) == (3, "")
    assert "line 2" in err
    assert cli("log", tmp_path, "--json")[:2] == (3, "")
    assert cli("log", tmp_path / "nothing")[0] == 3
