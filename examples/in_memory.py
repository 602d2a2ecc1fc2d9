"""From a transformers model to a tuned one, all in memory: the loop of rounds is yours. No file is written.

python examples/in_memory.py
"""

import json

import torch
from peft import get_peft_model_state_dict
from transformers import AutoModelForCausalLM, AutoTokenizer

import fedproxy
from fedproxy.demo import EXPERIMENT

DEMO = EXPERIMENT.parent
ROUNDS = 2


def rows(task: str, prompt: str) -> list[dict[str, str]]:
    """A client's rows, as TRL takes them."""
    lines = (DEMO / "tasks" / task / "train.jsonl").read_text().splitlines()[:96]
    found = [json.loads(line) for line in lines]
    return [{"prompt": prompt.format(row["text"]), "completion": f" {row['label_text']}"} for row in found]


llm = AutoModelForCausalLM.from_pretrained(DEMO / "llm", dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(DEMO / "llm")
public = (DEMO / "calibration.txt").read_text().split("\n\n")[:32]
clients = {
    "bank": rows("demo_banking", "Customer: {}\nIssue:"),
    "travel": rows("demo_travel", "Traveller: {}\nTopic:"),
}

# The owner: half of the LLM's blocks make the proxy, which gets a fresh adapter.
proxy = fedproxy.compress(llm, remove=0.5, calibration=public, tokenizer=tokenizer)
train = fedproxy.Train(batch_size=16, learning_rate=3e-3, max_length=96, lora_r=16, lora_alpha=32, lora_dropout=0.0)
model = fedproxy.attach_adapter(proxy.model, train)
adapter = {name: tensor.clone() for name, tensor in get_peft_model_state_dict(model).items()}

for number in range(1, ROUNDS + 1):
    # Each client trains from the same adapter; what it returns is the difference, not the adapter.
    replies = {
        name: fedproxy.client_update(model, own, adapter, tokenizer=tokenizer, train=train, client=name, round=number)
        for name, own in clients.items()
    }
    merged, analysis = fedproxy.merge([reply.update for reply in replies.values()], "h-ties", names=list(clients))
    adapter = {name: tensor + merged[name] for name, tensor in adapter.items()}
    losses = ", ".join(f"{name} {reply.loss:.2f}" for name, reply in replies.items())
    print(f"round {number}: loss {losses}; cosine of the two updates {analysis.similarity[0][1]:.2f}")

# The owner again: what the proxy's blocks learned goes onto the LLM's.
tuned = fedproxy.fuse(llm, adapter, layer_map=proxy.layer_map, config=model.peft_config["default"], form="checkpoint")
question = tokenizer("Traveller: do i need a plug converter in doha\nTopic:", return_tensors="pt")
for name, one in (("before", llm), ("after", tuned)):
    answer = one.generate(**question, max_new_tokens=3, do_sample=False)[0, question.input_ids.shape[1] :]
    print(f"{name}: {tokenizer.decode(answer)!r}")
