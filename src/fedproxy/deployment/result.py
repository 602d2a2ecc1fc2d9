"""What a client gets of a federation: the global adapter of the proxy that it has, as PEFT reads it.

Tensors alone come from the server. Which, and of what shapes, the client knows: they are those that it trains. All else
of the directory it writes itself. The tensor file has the bytes of the owner's RUN/adapter.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from fedproxy.adapter_checks import check_finite
from fedproxy.adapter_files import WEIGHTS_FILE, write_adapter
from fedproxy.artifacts import Manifest, new_directory, new_file
from fedproxy.deployment.handout.fetch import fetch_proxy
from fedproxy.deployment.handout.server import RESULT
from fedproxy.errors import ArtifactError, FederationError
from fedproxy.federation.offer import Limits, Offer
from fedproxy.federation.session import Session
from fedproxy.foreign import plain
from fedproxy.tensor_files import load_tensors
from fedproxy.tensors import Tensors

if TYPE_CHECKING:
    from fedproxy.deployment.joining import Owner
    from fedproxy.deployment.welcome import Welcome

Keep = Callable[[int | None, Tensors], None]
"""Keeps a global adapter, given the round that it is of; none for the one that the federation ended with."""
RESULT_CACHE = "result"
"""Below what one client remembers of a run: where the result lies until it is written."""
CARD = "README.md"
_HEAD_BYTES, _TENSOR_BYTES = 1 << 20, 512
_TEXT = """---
library_name: peft
tags:
- fedproxy
- federated-learning
- lora
---

# An adapter from the federation `{run}`

The global adapter {when}: what the clients' updates were merged into, yours among them.
It belongs onto the proxy of that federation, an LLM without some of its blocks, and onto no other model. It is not the
tuned LLM, which its owner alone can make of it.

## Load

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

proxy = "PROXY"  # the directory of the proxy; `fedproxy join` keeps it in its cache
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(proxy), "THIS_DIRECTORY")
tokenizer = AutoTokenizer.from_pretrained(proxy)
```

The proxy is the one whose listing has the SHA-256 `{proxy}`. The LLM that it was cut from has fedproxy's identity
`{llm}`; the proxy's blocks are the LLM's blocks {blocks} (counted from 0, of {count}).

## What it may reveal

The weights come from texts of all clients. Whether a known text was among them can be guessed, and parts may be
completed from a beginning. Whether you may pass it on is a matter of your agreement with the model's owner.
"""


def keeper(out: Path, session: Session, offer: Offer, proxy: Path, *, overwrite: bool) -> Keep:
    """A function that writes a global adapter to `out`, whole or not at all.

    Args:
        out: The directory to write.
        session: What knows the adapter.
        offer: What the server offered.
        proxy: The proxy, as it was handed out.
        overwrite: Replace one that was written before.

    Raises:
        ArtifactError: the proxy's manifest cannot be used. The function raises it for tensors that are not finite or
            not those of the adapter, `UsageError` or `ResourceError` where it cannot write.
    """
    source, own = Manifest.read(proxy), session.config
    manifest = Manifest(
        kind="proxy-adapter",
        llm_sha256=source.llm_sha256,
        llm_blocks=source.llm_blocks,
        layer_map=source.layer_map,
        settings={"offer": json.loads(offer.encode())},
        seed=offer.seed,
    )

    def keep(number: int | None, tensors: Tensors) -> None:
        whole = {**session.fresh, **tensors}  # an order leaves out what is not trained
        rank = check_adapter(whole, session)
        config = {**own, "r": rank, "lora_alpha": own["lora_alpha"] * rank / own["r"]} if rank != own["r"] else own
        rounds = offer.federate.rounds
        ended = f"that all of it ended with, after {rounds} rounds at most"
        card = _TEXT.format(
            run=plain(offer.run).replace("`", "'"),
            when=ended if number is None else f"after round {number} of {rounds}",
            proxy=offer.proxy,
            llm=source.llm_sha256,
            blocks=", ".join(map(str, source.layer_map)),
            count=source.llm_blocks,
        )
        with new_directory(out, overwrite=overwrite) as folder:
            write_adapter(folder, config, whole, manifest)
            with new_file(folder / CARD) as file:
                file.write(card.encode())

    return keep


def check_adapter(tensors: Tensors, session: Session) -> int:
    """Check that these are all tensors of the session's adapter, of one rank that may be another, and finite.

    Returns:
        The rank.

    Raises:
        ArtifactError: they are not; a tensor is named.
    """
    fresh = session.fresh
    if different := sorted(tensors.keys() ^ fresh.keys()):
        raise ArtifactError(
            f"The result is no adapter of this proxy: {different[0]!r:.200} is missing, or is too much."
        )
    rank = next((tensor.shape[0] for name, tensor in tensors.items() if ".lora_A." in name and tensor.ndim), 0)
    for name, tensor in tensors.items():
        own = fresh[name]
        shape = (rank, *own.shape[1:]) if ".lora_A." in name else (own.shape[0], rank)
        if tensor.dtype != own.dtype or tuple(tensor.shape) != shape or rank < 1:
            raise ArtifactError(
                f"The result is no adapter of this proxy: {name!r:.200} is {tensor.dtype} of shape "
                f"{tuple(tensor.shape)}, where {own.dtype} of {shape} is expected."
            )
    check_finite(tensors, "The result")
    return rank


def most_bytes(session: Session, rank: int) -> int:
    """Bytes that the tensor file of the session's adapter takes at most, if it has this rank or a lower one."""
    own: int = session.config["r"]
    values = sum(tensor.numel() * tensor.element_size() for tensor in session.fresh.values())
    return _HEAD_BYTES + _TENSOR_BYTES * len(session.fresh) + values * rank // own


def fetch_result(owner: "Owner", welcome: "Welcome", session: Session, limits: Limits, state: Path) -> Tensors:
    """The tensors of the adapter that the federation ended with, from the server; what was there of them stays.

    Args:
        owner: The server.
        welcome: Its last word.
        session: What knows the adapter.
        limits: Of a higher rank than these allow it is not fetched.
        state: What this client alone remembers of the run. The result lies there until it is written, and a client
            that is killed goes on from there.

    Raises:
        FederationError: the server has none, or cannot be reached.
        ArtifactError: it is none.
        ResourceError, UsageError: it cannot be written.
    """
    if not welcome.result:
        raise FederationError("The federation is complete, but its server handed no result out. Ask its owner for it.")
    cache = state / RESULT_CACHE
    try:
        folder = fetch_proxy(
            owner.url,
            welcome.token,
            welcome.result,
            cache,
            owner.ca,
            connections=1,
            most=most_bytes(session, limits.max_rank),
            on_request=owner.ledger.leaves,
            listing_path=RESULT,
        )
    except FederationError as error:
        raise FederationError(f"The federation is complete, but its result did not come: {error}") from error
    tensors = load_tensors(folder / WEIGHTS_FILE)
    check_adapter(tensors, session)
    return tensors
