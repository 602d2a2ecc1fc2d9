import base64
import json

from fedproxy.deployment.ledger import Ledger


def test_a_ledger_is_shown_and_verified(cli, tmp_path):
    one = Ledger(tmp_path / "ledger", "h:1", full=True)
    for _ in range(2):
        one.leaves(b"POST /fedproxy/welcome HTTP/1.1\r\n\r\n")
    one.close()
    code, out, _ = cli("ledger", tmp_path / "ledger", "--json")
    lines = json.loads(out)["lines"]
    assert (code, [line["event"] for line in lines]) == (0, ["introduction"] * 2)
    assert all(base64.b64decode(line["payload"]).startswith(b"POST") for line in lines)
    code, out, err = cli("ledger", tmp_path / "ledger")
    assert (code, out) == (0, "")
    said = "".join(err.split())
    assert lines[-1]["line_sha256"] in said
    assert lines[0]["sha256"] in said
    assert f"introductionh:12{2 * lines[0]['bytes']}" in said
    path = tmp_path / "ledger"
    path.write_text(path.read_text().replace("h:1", "h:2", 1))
    code, _, err = cli("ledger", path)
    assert (code, "line 2" in err) == (3, True)
