"""The rounds of a run with pandas: what each client did, how much its update counted, and how far the updates agree.

python examples/round_analysis.py RUN
"""

import json
import sys
from pathlib import Path

import pandas as pd

run = Path(sys.argv[1])
records = [json.loads(path.read_text()) for path in sorted(run.glob("rounds/*/round.json"))]

# A line for each client and round: what the client says of its training.
trained = pd.DataFrame(
    {"round": record["round"], "client": name, **numbers}
    for record in records
    for name, numbers in record["clients"].items()
).set_index(["round", "client"])

# And what the server found in its update: heterogeneity, weight (Eq. 6) and retention (Eq. 10). A rule that does not
# weigh its clients leaves a column out.
columns = ("heterogeneity", "weights", "retention")
found = pd.concat(
    pd.DataFrame({key: value for key in columns if (value := record["analysis"][key])}).assign(
        round=record["round"], client=record["analysis"]["names"]
    )
    for record in records
).set_index(["round", "client"])
table = trained.join(found)
print(table[["rows", "loss", *found.columns, "bytes_up"]].round(3).to_string(), "\n")

# The cosine of each two updates in the last round (Eq. 5).
last = records[-1]["analysis"]
similarity = pd.DataFrame(last["similarity"], index=last["names"], columns=last["names"])
print(f"similarity in round {records[-1]['round']}\n{similarity.round(3).to_string()}\n")

# By round: the mean loss, the megabytes that the clients sent, and the share of coordinates that they dispute (Eq. 7).
by_round = table.groupby("round").agg(loss=("loss", "mean"), megabytes=("bytes_up", lambda sent: sent.sum() / 1e6))
by_round["conflict"] = [record["analysis"]["conflict_mean"] for record in records]
print(by_round.round(3).to_string())
