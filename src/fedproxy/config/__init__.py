"""The experiment: frozen dataclasses that check themselves, and the file that they are read from."""

from fedproxy.config.checked import Choice, Rule, TableError, read_table, table
from fedproxy.config.experiment import Experiment, from_folder
from fedproxy.config.files import clashes, load_experiment, parse_experiment, to_toml
from fedproxy.config.privacy import ClientPrivacy, Privacy, unprivate
from fedproxy.config.tables import (
    CLIENT_NAME,
    HEALING_RATES,
    LLM,
    TRACKERS,
    VARIED,
    Client,
    Compare,
    Compress,
    Evaluate,
    Federate,
    Fuse,
    Heal,
    Partition,
    Train,
    Variant,
    seconds,
)
from fedproxy.config.template import experiment_file
from fedproxy.registry import did_you_mean
