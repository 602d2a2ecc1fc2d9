"""The experiment: one frozen dataclass a table of its file. Each checks itself when it is constructed."""

import re
from dataclasses import field
from typing import Annotated, Any, Literal

from fedproxy.config.checked import Choice, Keys, Rule, Within, table
from fedproxy.config.privacy import ClientPrivacy, Privacy

DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(s|m|h)")
CLIENT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

_POSITIVE, _NOT_NEGATIVE = Rule("greater than 0", lambda v: v > 0), Rule("0 or more", lambda v: v >= 0)
Count = Annotated[int, _POSITIVE]
Natural = Annotated[int, _NOT_NEGATIVE]
Length = Annotated[int, Rule("2 or more", lambda v: v >= 2)]
Positive = Annotated[float, _POSITIVE]
NotNegative = Annotated[float, _NOT_NEGATIVE]
Share = Annotated[float, Rule("at least 0 and below 1", lambda v: 0 <= v < 1)]
Name = Annotated[
    str,
    Rule(
        "1 to 64 letters, digits, '.', '_' or '-', beginning with a letter or digit",
        lambda v: not v or CLIENT_NAME.fullmatch(v),
    ),
]


def _some_of(names: tuple[str, ...]) -> Rule:
    return Rule(f"some of {', '.join(names)}", lambda v: set(v) <= set(names))


@table
class LLM:
    """[llm]: the model owner's checkpoint, a directory or a Hub id; its own Python code runs only if trusted."""

    path: str = ""
    trust_remote_code: bool = False


@table
class Compress:
    """[compress]: how the LLM becomes the proxy (Eq. 4).

    Attributes:
        remove: Share of the LLM's blocks that is removed, rounded down to whole blocks; above 0 at least one must go.
        score: Name of the score of the blocks.
        keep_first: Blocks at the beginning of the LLM that are kept whatever they score.
        keep_last: Blocks at its end, likewise.
        calibration: Public text to score the blocks on.
        samples: Documents drawn from it.
        max_length: Tokens of a document at most.
        batch_size: Documents in one forward pass.
        placement: Where the LLM is run: "memory", "stream" (one block at a time from its files), or "auto".
    """

    remove: Share = 0.5
    score: Annotated[str, Choice("fedproxy.scores")] = "block-influence"
    keep_first: Natural = 0
    keep_last: Natural = 0
    calibration: str = ""
    samples: Count = 512
    max_length: Length = 512
    batch_size: Count = 8
    placement: Literal["auto", "memory", "stream"] = "auto"


HEALING_RATES = {"lora": 5e-4, "full": 1e-4}
"""Learning rate of each mode of healing where none is given."""


@table
class Heal:
    """[heal]: the LLM teaches the proxy on public text; with 0 for `refit` and `steps` it does not.

    Attributes:
        refit: Documents on which, before any step, the last linear layer before each gap is fitted in closed form to
            what the removed blocks did; some hundred suffice.
        steps: Optimizer steps.
        mode: "lora" trains a low-rank change of the blocks and merges it, "full" all weights of the blocks.
        learning_rate: Highest learning rate; the mode's own if none.
        batch_size: Documents in a step.
        max_length: Tokens of a document at most.
        temperature: Both models' logits are divided by it.
        hidden_weight: Weight of the hidden states' distance beside the divergence of the predictions; with 0 no hidden
            states are kept, which take nearly all of the disk space.
        top_k: How many of the LLM's likeliest next tokens are kept for each token.
        text: Public text; the calibration text if empty.
        held_out: Documents that are not trained on, to measure perplexity on; at most a quarter of all.
        lora_r: Rank in mode "lora".
        save_every: Steps between two savings of the state that a killed run goes on from.
        spare_ends: Whether the blocks that [compress] keep_first and keep_last name stay as they are in the LLM.
        realign_steps: Steps of the same teaching before every round but the first, now of the LLM with what the clients
            learned so far plugged in, for the proxy blocks that [train] blocks leaves out. Engine inline only.
    """

    refit: Natural = 0
    steps: Natural = 0
    mode: Literal["lora", "full"] = "lora"
    learning_rate: Positive | None = None
    batch_size: Count = 8
    max_length: Length = 512
    temperature: Positive = 2.0
    hidden_weight: NotNegative = 1.0
    top_k: Count = 64
    text: str = ""
    held_out: Count = 64
    lora_r: Count = 64
    save_every: Count = 50
    spare_ends: bool = False
    realign_steps: Natural = 0

    @property
    def highest_rate(self) -> float:
        """The learning rate given, or the mode's."""
        return self.learning_rate or HEALING_RATES[self.mode]


@table
class Client:
    """[[client]]: a data owner, with a file of rows (`data`) or a task of the LM evaluation harness (`task`).

    Attributes:
        name: Its name.
        data: Its rows, in JSON Lines, a JSON array, CSV, TSV, Parquet, or a folder that `datasets` saved: the ends
            .json, .csv, .tsv and .parquet say so. Fields are TRL's: {"prompt", "completion"}, strings or lists of
            messages (the completion one message, the answer), {"messages"}, of which the last is the answer, or
            {"text"}; or Alpaca's {"instruction", "input", "output"}, or ShareGPT's {"conversations"}. Beside messages
            may stand "tools". `fedproxy data check FILE` shows what of it is trained on.
        task: Or a task.
        rows: At most so many of them, chosen by the seed; clients of one task draw different ones while they last.
        lora_r: Rank of its adapter, if not that of [train]; in the space "product" clients' ranks may differ. The
            scaling lora_alpha / lora_r stays that of [train].
    """

    name: Name = ""
    data: str = ""
    task: str = ""
    rows: Count | None = None
    lora_r: Count | None = None


@table
class Partition:
    """[partition]: a file of rows (`data`) or a task (`task`) cut into clients, instead of [[client]].

    Attributes:
        data: The rows, as in [[client]].
        task: Or a task.
        rows: At most so many of them, chosen by the seed.
        clients: Number of clients.
        scheme: "iid" deals the rows out evenly, "dirichlet" each label unevenly: the field "label" of the rows, else
            the answer, of which there may be half as many different ones as there are rows.
        alpha: Concentration of the Dirichlet distribution: the smaller, the fewer labels a client sees.
    """

    data: str = ""
    task: str = ""
    rows: Count | None = None
    clients: Count = 8
    scheme: Literal["iid", "dirichlet"] = "dirichlet"
    alpha: Positive = 0.5


TRACKERS = "aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb"
"""Trackers that accelerate knows."""


@table
class Train:
    """[train]: local training. Names that SFTConfig has too mean the same here.

    Attributes:
        max_length: Tokens of a row at most, and no more than the model has positions for.
        lr_scheduler_type: How the learning rate goes on after the warm-up. It begins anew in each round.
        warmup_steps: Steps, of each round, in which the learning rate rises from 0, the first step's; also in
            "constant". A round of one step with a warm-up changes nothing.
        completion_only_loss: Whether of a prompt with a completion the completion alone counts in the loss, and of a
            conversation the last answer alone.
        assistant_only_loss: Whether of a conversation all turns of the assistant count, and nothing else, whatever
            completion_only_loss says; rows without messages are as before.
        blocks: Which blocks of the proxy train: "all", or their numbers, of which negative ones count from the end, as
            in [0, 1, -2, -1] for the first and the last two.
        report_to: Trackers that are told the loss of every step and the numbers of every round, by the server; of
            clients elsewhere it knows the rounds only. Files, such as those of "tensorboard", go to RUN/tracking; to a
            service go the clients' names, too.
        privacy: Differential privacy of the clients' rows, a table of its own; none trains without.
    """

    epochs: Positive = 1.0
    max_steps: Count | None = None
    batch_size: Count = 16
    gradient_accumulation_steps: Count = 1
    gradient_checkpointing: bool = False
    learning_rate: Positive = 5e-5
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: Natural = 0
    weight_decay: NotNegative = 0.0
    adam_beta1: Share = 0.9
    adam_beta2: Share = 0.999
    adam_epsilon: Positive = 1e-8
    max_grad_norm: Positive = 1.0
    max_length: Length = 512
    completion_only_loss: bool = True
    assistant_only_loss: bool = False
    group_by_length: bool = True
    padding_free: bool = True
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    quantization: Literal["none", "4bit"] = "none"
    lora_r: Count = 32
    lora_alpha: Positive = 64.0
    lora_dropout: Share = 0.1
    lora_targets: str | list[str] = "all-linear"
    blocks: Annotated[Literal["all"] | list[int], Rule('"all", or at least one number', len)] = "all"
    report_to: Annotated[list[str], _some_of(TRACKERS)] = field(default_factory=list)
    privacy: Annotated[Privacy | None, Within(Privacy)] = None


_DURATION_SAYS = 'a duration such as "30m"'
_QUORUM = Rule(
    "a share above 0.0 and up to 1.0 of the clients asked, or a whole number of replies from 1 on",
    lambda v: v >= 1 if isinstance(v, int) else 0 < v <= 1,
)


@table
class Federate:
    """[federate]: rounds, merge rule (Eq. 5-7, 10-14), client regulariser (Eq. 8-9), and what a round may lack.

    Attributes:
        rounds: Number of rounds.
        merge: Name of the merge rule.
        merge_options: Its options, and `clip_norm`, which any rule takes.
        space: What is merged: the "factors" A and B as published, their "product" B·A, or B alone on a "frozen-a".
        server_optimizer: What makes of the merged update the step of the global adapter.
        server_options: Its options.
        regulariser: Name of the clients' regulariser.
        regulariser_strength: Its strength; the regulariser's own if none.
        wire: Encoding of the clients' updates; what it loses a client adds to its next update (error feedback).
        wire_options: Its options.
        wire_down: Encoding of the global adapter on its way to the clients.
        secure: Whether the server gets sums of the updates alone, and never a single one (docs/secure_sums.md).
        participation: Share of the clients that a round asks, chosen by the seed; at least a quorum.
        quorum: Valid replies that a round needs: as 0.75 or 1.0 a share of the clients that a full round asks, as 3 or
            1 a number of replies.
        deadline: Time that the clients of a round have; "" for as long as it takes.
        retries: How often a round without a quorum is repeated before the run ends.
        patience: How long the first round waits for all its clients, and any round for a quorum of them.
        max_norm: Largest Euclidean norm of an update; none if any is taken. With secure sums nobody can refuse a longer
            one: each client shortens its own to it, or to 64.
        max_norm_ratio: Largest norm of an update, in medians of the round's norms (from three replies on).
        strikes: Invalid replies over the run after which a client is not asked again.
        keep_rounds: Rounds kept on disk; 0 keeps all. With keep = "best" the adapter of the best one stays.
        share_result: Whether clients that join over the network get the adapter that the run ends with. They get that
            of every round but the last in any case, or they could not train.
        validation: Share of its rows, at most a half, that each client keeps back, never trains on, and scores every
            round's adapter on; 0 for none.
        alone: Whether each client also trains an adapter of its own, as many steps, to say what federating gains.
        keep: The round whose adapter is the result: the "last", or the "best" by the clients' validation loss.
        patience_rounds: Rounds without a better one, by that loss, after which the federation ends; 0 for never.
        privacy: Differential privacy of whole clients, a table of its own; none merges without.
    """

    rounds: Count = 10
    merge: Annotated[str, Choice("fedproxy.rules")] = "h-ties"
    merge_options: dict[str, Any] = field(default_factory=dict)
    space: Annotated[str, Choice("fedproxy.spaces")] = "factors"
    server_optimizer: Annotated[str, Choice("fedproxy.server_optimizers")] = "none"
    server_options: dict[str, Any] = field(default_factory=dict)
    regulariser: Annotated[str, Choice("fedproxy.regularisers")] = "pcr"
    regulariser_strength: NotNegative | None = None
    wire: Annotated[str, Choice("fedproxy.encodings")] = "fp32"
    wire_options: dict[str, Any] = field(default_factory=dict)
    wire_down: Annotated[str, Choice("fedproxy.encodings", lambda row: not row.by_share)] = "fp32"
    secure: bool = False
    participation: Annotated[float, Rule("above 0 and at most 1", lambda v: 0 < v <= 1)] = 1.0
    quorum: Annotated[int | float, _QUORUM] = 0.75
    deadline: Annotated[str, Rule(f'{_DURATION_SAYS}, or "" for none', lambda v: not v or DURATION.fullmatch(v))] = ""
    retries: Natural = 2
    patience: Annotated[str, Rule(_DURATION_SAYS, DURATION.fullmatch)] = "10m"
    max_norm: Positive | None = None
    max_norm_ratio: Annotated[float, Rule("greater than 1", lambda v: v > 1)] = 10.0
    strikes: Count = 3
    keep_rounds: Natural = 0
    share_result: bool = True
    validation: Annotated[float, Rule("at least 0 and at most 0.5", lambda v: 0 <= v <= 0.5)] = 0.0
    alone: bool = False
    keep: Literal["last", "best"] = "last"
    patience_rounds: Natural = 0
    privacy: Annotated[ClientPrivacy | None, Within(ClientPrivacy)] = None


@table
class Fuse:
    """[fuse]: plug what was learned back into the LLM (Eq. 15); scale "auto" is chosen by loss on the text `public`.

    Attributes:
        scale: Factor of the task vector; "auto" is for public text like the tasks': other text favours small ones.
        public: The text that "auto" looks at.
    """

    scale: float | Literal["auto"] = 1.0
    public: str = ""


MODELS = ("llm", "proxy", "proxy_tuned", "fused", "proxy_tuning")
"""Models of a run that can be scored."""


@table
class Evaluate:
    """[evaluate]: tasks of the LM evaluation harness; left out, those of the clients.

    Attributes:
        include: Folder of your own task YAMLs.
        trust_tasks: Whether code that these bring may run.
    """

    tasks: list[str] = field(default_factory=list)
    data: str = ""
    include: str = ""
    trust_tasks: bool = False
    limit: Count | None = None
    batch_size: Count = 64
    centralized: bool = False
    models: Annotated[list[str], _some_of(MODELS)] = field(
        default_factory=lambda: ["llm", "proxy", "proxy_tuned", "fused"]
    )


@table
class Variant:
    """[[compare.variant]]: a method with settings of its own, compared as one more method.

    Attributes:
        name: What it is called: 1 to 64 letters, digits, ".", "_" or "-"; not the name of a method.
        method: The method that it varies.
        compress: Keys of [compress] that it sets, but for `remove`, which `ratios` varies.
        heal: Keys of [heal].
        train: Keys of [train].
        federate: Keys of [federate]; of a method without a federation only those that say how much is trained.
        fuse: Keys of [fuse].
    """

    name: Name = ""
    method: Annotated[str, Choice("fedproxy.methods", unset=True)] = ""
    compress: Annotated[dict[str, Any], Keys(Compress)] = field(default_factory=dict)
    heal: Annotated[dict[str, Any], Keys(Heal)] = field(default_factory=dict)
    train: Annotated[dict[str, Any], Keys(Train)] = field(default_factory=dict)
    federate: Annotated[dict[str, Any], Keys(Federate)] = field(default_factory=dict)
    fuse: Annotated[dict[str, Any], Keys(Fuse)] = field(default_factory=dict)

    @property
    def settings(self) -> dict[str, dict[str, Any]]:
        """What it sets: table → key → value."""
        return {name: values for name in VARIED if (values := getattr(self, name))}


VARIED = "compress", "heal", "train", "federate", "fuse"
"""The tables that a variant sets keys of."""


_SEEDS = Rule(
    "at least one number, each 0 or more and given once", lambda v: v and min(v) >= 0 and len(set(v)) == len(v)
)
_RATIOS = Rule(
    "shares of at least 0 and below 1, each given once",
    lambda v: all(0 <= ratio < 1 for ratio in v) and len(set(v)) == len(v),
)


@table
class Compare:
    """[compare]: which methods `fedproxy compare` sets side by side on the same work.

    Attributes:
        methods: Their names; all if empty. The variants come beside them.
        seeds: Every method runs with each of these seeds, in place of the experiment's own.
        ratios: And removes each of these shares of the LLM's blocks, in place of [compress] remove; if empty, that one.
    """

    methods: list[Annotated[str, Choice("fedproxy.methods")]] = field(default_factory=list)
    seeds: Annotated[list[int], _SEEDS] = field(default_factory=lambda: [0, 1, 2])
    ratios: Annotated[list[float], _RATIOS] = field(default_factory=list)
    variant: tuple[Variant, ...] = ()


def seconds(text: str) -> float:
    """Read a duration such as "30m", "90 s" or "1.5h" as seconds.

    Raises:
        ValueError: `text` is no duration.
    """
    match = DURATION.fullmatch(text.strip())
    if match is None:
        raise ValueError(f'{text!r} is no duration; write for example "90s", "30m" or "2h"')
    return float(match[1]) * {"s": 1.0, "m": 60.0, "h": 3600.0}[match[2]]
