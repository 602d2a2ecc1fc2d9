"""Secure sums between organisations, over TLS: what the server's memory holds, and what joining needs."""

import base64
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from fedproxy.deployment.certificates import load_private, make_key, private_openssh, public_openssh
from fedproxy.deployment.chain import read
from fedproxy.deployment.keys import add_client, client_key_file, read_client_key
from fedproxy.deployment.peers import identity, read_peers
from fedproxy.errors import ArtifactError
from fedproxy.tensor_files import load_tensors
from tests.deployment.conftest import WORDS, Federation, Process, eventually

PIECE = 1 << 24


NAMES = (*sorted(WORDS), "fruits")


@pytest.fixture
def four(federation):
    """A function that makes a federation of four clients, and the file of their public keys."""

    def make(**settings: object) -> tuple[Federation, Path]:
        one: Federation = federation(**settings)
        rows = (one.folder / "animals.jsonl").read_text().replace("cat", "plum").replace("dog", "pear")
        (one.folder / "fruits.jsonl").write_text(rows)
        table = '[[client]]\nname = "fruits"\ndata = "fruits.jsonl"\n'
        one.experiment.write_text(one.experiment.read_text().replace("[train]\n", f"{table}[train]\n"))
        add_client(one.keys, "fruits")
        return one, peers_of(one)

    return make


def peers_of(one: Federation) -> Path:
    """The file that clients make of the keys that they sent each other."""
    path = one.folder / "peers.txt"
    path.write_text("# who takes part\n\n" + "".join(f"{name} {public(one, name)} {name}@home\n" for name in NAMES))
    return path


def public(one: Federation, name: str) -> str:
    key = read_client_key(client_key_file(one.keys, name))
    return public_openssh(load_private(key.private_openssh).public_key())


def update_of(cache: Path) -> dict[str, torch.Tensor]:
    """The first update in a client's full ledger."""
    (ledger,) = cache.rglob("ledger.jsonl")
    lines = [line for line, _ in read(ledger) if (line["event"], line["to"]) == ("update", "SuperNode")]
    content, path = b"".join(base64.b64decode(line["payload"]) for line in lines), cache / "update.safetensors"
    path.write_bytes(content)
    return load_tensors(path)


def held(pids: Iterable[int], needles: list[bytes]) -> set[int]:
    """Which of some byte strings lie in the memory that these processes can write, or in messages that they map."""
    found: set[int] = set()
    for pid in pids:
        try:
            regions = Path(f"/proc/{pid}/maps").read_text().splitlines()
            with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
                for region in regions:
                    span, rights, *_ = region.split()
                    if rights[:2] == "rw" or region.endswith(".safetensors"):
                        begin, end = (int(part, 16) for part in span.split("-"))
                        found |= _searched(memory, begin, end, needles)
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended
    return found


def _searched(memory, begin: int, end: int, needles: list[bytes]) -> set[int]:
    found, overlap, tail = set(), max(map(len, needles)), b""
    for place in range(begin, end, PIECE):
        try:
            memory.seek(place)
            piece = memory.read(min(PIECE, end - place))
        except (OSError, ValueError, OverflowError):
            break
        found |= {number for number, needle in enumerate(needles) if needle in tail + piece}
        tail = piece[-overlap:]
    return found


def answered(one: Federation, out: str, *names: str) -> None:
    """Wait until the updates of these clients came in round 1."""
    assert eventually(lambda: {str(event["client"]) for event in one.events(out, "answered")} >= set(names))


@pytest.mark.slow
def test_the_server_ends_with_the_same_mean_and_never_holds_an_update(four) -> None:
    """A client's update, as a run without secure sums makes it, is in the memory of that run's server alone."""
    settings = {"rounds": 1, "quorum": 4, "merge": "mean", "regulariser": "none", "max_norm_ratio": 1000.0}
    one, peers = four(**settings)
    one.write_rows("numbers", 80)  # the others wait for it
    owner = one.serve("plain")
    said = one.join("animals", "--peers", peers, cache="other", log="with-peers").ends(4)
    assert "offers no secure sums, and with --peers this client takes nothing else" in said, said
    clients = [one.join(name, *["--ledger", "full"] * (name == "animals"), cache=name) for name in NAMES]
    answered(one, "plain", "animals", "colours", "fruits")
    update = update_of(one.folder / "animals")
    needles = [tensor.contiguous().numpy().tobytes() for tensor in update.values() if float(tensor.abs().sum())]
    assert needles
    assert held(owner.family(), needles) == set(range(len(needles)))
    owner.ends()
    for client in clients:
        client.ends()

    text = one.experiment.read_text()
    one.experiment.write_text(text.replace("[federate]\n", "[federate]\nsecure = true\n"))
    owner = one.serve("secure")
    clients = [one.join(name, "--peers", peers, cache=f"{name}-secure", log=f"secure-{name}") for name in NAMES]
    answered(one, "secure", "animals", "colours", "fruits")
    assert held(owner.family(), needles) == set()
    assert eventually(lambda: one.events("secure", "round_stored") or (one.folder / "secure/rounds/0001").is_dir())
    assert held(owner.family(), needles) == set()
    owner.ends()
    for client in clients:
        assert "the server gets sums over most clients alone" in client.ends()
    plain, secure = (
        load_tensors(one.folder / out / "adapter/adapter_model.safetensors") for out in ("plain", "secure")
    )
    assert all(torch.allclose(plain[name], secure[name], rtol=0, atol=1e-5) for name in plain)
    assert any(not torch.equal(plain[name], secure[name]) for name in plain)
    record = one.record("secure", 1)
    assert (list(record["clients"]), record["norms"]) == (sorted(NAMES), {})


@pytest.mark.slow
def test_a_client_that_is_killed_while_it_trains_costs_itself_alone(four) -> None:
    one, peers = four(rounds=2, quorum=3, deadline="120s", secure=True)
    one.write_rows("numbers", 2000)
    wrong = one.folder / "wrong.txt"
    lines = [
        f"{name} {public(one, 'animals' if name == 'colours' else 'colours')}\n" for name in ("animals", "colours")
    ]
    wrong.write_text("".join(lines))
    owner = one.serve("run")
    said = one.join("animals", cache="none", log="without-peers").ends(4)
    assert "join with --key FILE and --peers FILE" in said, said
    said = one.join("animals", "--peers", wrong, cache="none", log="own-key").ends(3)
    assert "the key of animals is another than this client's own" in said, said
    clients = {name: one.join(name, "--peers", peers, "--patience", "5s") for name in NAMES}
    answered(one, "run", "animals", "colours", "fruits")
    killed: Process = clients.pop("numbers")
    killed.kill()
    killed.clear()
    owner.ends()
    for client in clients.values():
        assert "The federation is complete" in client.ends()
    for number in (1, 2):
        record = one.record("run", number)
        assert list(record["clients"]) == ["animals", "colours", "fruits"]
        assert record["quarantined"] == []
    first = one.record("run", 1)
    assert [fault["client"] for fault in first["refused"]] == ["numbers"] or first["dropouts"] == ["numbers"]
    assert one.record("run", 2)["asked"] == ["animals", "colours", "fruits"]


@pytest.mark.slow
def test_who_has_a_false_key_of_another_takes_part_in_nothing(four) -> None:
    """It says so by name, and the others make the sum without it."""
    one, peers = four(rounds=1, quorum=3, merge="mean", regulariser="none", secure=True)
    false = one.folder / "false.txt"
    false.write_text(peers.read_text().replace(public(one, "fruits"), public(one, "numbers"), 1).replace(
        f"numbers {public(one, 'numbers')}", f"numbers {public(one, 'fruits')}"
    ))  # fmt: skip
    owner = one.serve("run")
    clients = {name: one.join(name, "--peers", false if name == "animals" else peers) for name in NAMES}
    clients["animals"].says("its registered key did not sign this")
    owner.ends()
    for client in clients.values():
        client.ends()
    record = one.record("run", 1)
    assert list(record["clients"]) == ["colours", "fruits", "numbers"]
    assert [fault["client"] for fault in record["refused"]] == ["animals"]


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """Two clients' keys: private in OpenSSH's format, and the line of a file of peers."""
    made = {name: make_key() for name in ("bank", "shop")}
    return {name: (private_openssh(key), f"{name} {public_openssh(key.public_key())}") for name, key in made.items()}


def test_a_file_of_peers_by_hand(tmp_path, keys):
    path = tmp_path / "peers.txt"
    path.write_text(f"# comment\n\n  {keys['bank'][1]} bank@example.org\n{keys['shop'][1]}\n")
    assert read_peers(path) == {name: line.partition(" ")[2] for name, (_, line) in keys.items()}
    for name, (private, _) in keys.items():
        one = identity(name, private, path)
        for other in keys:
            signed = identity(other, keys[other][0], path).sign(b"message")
            one.verify(other, b"message", signed)
    path.write_text(keys["shop"][1])
    assert identity("bank", keys["bank"][0], path).name == "bank"  # its own key it need not name


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ("{bank}\n../x {key}", "line 2: '../x' is no client's name"),
        ("bank", "line 1"),
        ("bank ssh-rsa AAAA", "line 1"),
        ("{bank}\n{bank}", "line 2: the name bank, or its key, stands there twice"),
        ("{bank}\nshop {key}", "line 2: the name shop, or its key, stands there twice"),
        ("bank {other}", "the key of bank is another than this client's own"),
    ],
)
def test_a_bad_file_of_peers_is_told_by_line(tmp_path, keys, lines, says):
    path = tmp_path / "peers.txt"
    bank, other = keys["bank"][1], keys["shop"][1].partition(" ")[2]
    path.write_text(lines.format(bank=bank, key=bank.partition(" ")[2], other=other))
    with pytest.raises(ArtifactError, match="peers") as refused:
        identity("bank", keys["bank"][0], path)
    assert says in str(refused.value)
    with pytest.raises(ArtifactError, match=r"missing\.txt"):
        read_peers(tmp_path / "missing.txt")
