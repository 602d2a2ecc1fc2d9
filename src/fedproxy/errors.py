"""The exception tree: one class per exit code, so that every error a user can cause has one clear answer.

FedproxyError                  1   a bug of ours, if raised bare
├── UsageError                 2   wrong flags, wrong paths
│   ├── ConfigError            2   an experiment file with problems, all of them listed
│   └── MissingExtraError      2   an optional dependency that is not installed
├── ArtifactError              3   a checkpoint, adapter, update or data file that cannot be used
├── FederationError            4   quorum or deadline missed
└── ResourceError              5   disk or memory
"""

from collections.abc import Sequence


class FedproxyError(Exception):
    """Base of all errors raised on purpose; `exit_code` is what the command line ends with."""

    exit_code = 1


class UsageError(FedproxyError):
    """Wrong usage: a flag, a value or a path that cannot be meant."""

    exit_code = 2


class ConfigError(UsageError):
    """An experiment file with problems; `problems` holds one sentence each."""

    def __init__(self, source: str, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        lines = "\n".join(f"  - {problem}" for problem in self.problems)
        count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        super().__init__(f"{source}: {count}\n{lines}")


class MissingExtraError(UsageError):
    """An optional dependency is missing; the message names the extra that brings it."""

    def __init__(self, feature: str, extra: str) -> None:
        super().__init__(f"{feature} needs an optional dependency: pip install 'fedproxy[{extra}]'")


class ArtifactError(FedproxyError):
    """A file or directory given as input is missing, damaged, hostile, or of another model."""

    exit_code = 3


class FederationError(FedproxyError):
    """The federation could not go on: too few valid replies."""

    exit_code = 4


class ResourceError(FedproxyError):
    """The machine ran out of disk or memory."""

    exit_code = 5
