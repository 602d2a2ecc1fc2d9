#!/bin/sh
# A federation of three processes on this machine, over TLS: an owner and two data owners, who share nothing but a port.
#
#     sh examples/loopback.sh DIR
#
# DIR/run then holds the rounds, their page (report.html) and the tuned adapter of the proxy.
set -eu
mkdir -p "$1" && cd "$1"
PORT=${PORT:-9443}
DEMO=$(python -c 'import fedproxy.demo as demo; print(demo.EXPERIMENT.parent)')

# The data owners' rows: JSON Lines, as TRL reads them.
python - "$DEMO/tasks" <<'END'
import json, pathlib, sys

def write(name, task, prompt):
    lines = (pathlib.Path(sys.argv[1]) / task / "train.jsonl").read_text().splitlines()[:48]
    rows = [{"prompt": prompt.format(**row), "completion": " " + row["label_text"]} for row in map(json.loads, lines)]
    pathlib.Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
write("bank", "demo_banking", "Customer: {text}\nIssue:")
write("travel", "demo_travel", "Traveller: {text}\nTopic:")
END

# The owner: the experiment, and a key for each data owner.
cat > experiment.toml <<END
[llm]
path = "$DEMO/llm"
[compress]
calibration = "$DEMO/calibration.txt"
samples = 32
[[client]]
name = "bank"
[[client]]
name = "travel"
[train]
batch_size = 16
learning_rate = 3e-3
max_length = 96
[federate]
rounds = 2
END
fedproxy keys init keys
fedproxy keys add keys bank
fedproxy keys add keys travel

trap 'kill $(jobs -p) 2>/dev/null || true' EXIT
fedproxy serve experiment.toml --out run --keys keys --listen "127.0.0.1:$PORT" 2> serve.log &
owner=$!
until grep -q "Clients can join" serve.log; do
    kill -0 $owner || { cat serve.log; exit 1; }
    sleep 0.2
done
# Two more processes, each with its own rows and its own key.
fedproxy join "127.0.0.1:$PORT" --data bank.jsonl --key keys/clients/bank.key --cache bank &
bank=$!
fedproxy join "127.0.0.1:$PORT" --data travel.jsonl --key keys/clients/travel.key --cache travel &
travel=$!
for process in $bank $travel $owner; do wait $process; done
echo "The tuned adapter of the proxy is made. Next: fedproxy fuse $DEMO/llm $1/run/adapter $1/tuned"
