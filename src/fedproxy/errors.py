"""The exception tree: one class per exit code, so that every error a user can cause has one clear answer.

FedproxyError                  1   a bug of ours, if raised bare
├── UsageError                 2   wrong flags, wrong paths
│   ├── ConfigError            2   an experiment file with problems, all of them listed
│   └── MissingExtraError      2   an optional dependency that is not installed
├── ArtifactError              3   a checkpoint, adapter, update or data file that cannot be used
├── FederationError            4   quorum or deadline missed
│   └── SumsError              4   a secure sum: too few members for it, or somebody departs from the protocol
└── ResourceError              5   disk or memory
"""

import errno
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


class SumsError(FederationError):
    """A secure sum cannot go on: too few members, or the server or a member departs from the protocol."""


class ResourceError(FedproxyError):
    """The machine ran out of disk or memory."""

    exit_code = 5


def error_of(code: int, text: str) -> FedproxyError:
    """The error that another process ended with, from its exit code and message."""
    kinds: dict[int, type[FedproxyError]] = {
        kind.exit_code: kind for kind in (UsageError, ArtifactError, FederationError, ResourceError)
    }
    return kinds.get(code, FedproxyError)(text)


def told(error: FedproxyError) -> str:
    """What the other side of a federation is told of an error: its kind, and its text without this machine's paths.

    All from the first path's beginning to the last one's name goes, since the names of folders may hold anything.

    Example:
        >>> told(ArtifactError("/home/my name/cache/0002.safetensors is truncated."))
        'ArtifactError: …0002.safetensors is truncated.'
    """
    text = str(error)
    if places := [place for place, letter in enumerate(text) if letter in "/\\"]:
        text = f"{text[: text.rfind(' ', 0, places[0]) + 1]}…{text[places[-1] + 1 :]}"
    return f"{type(error).__name__}: {text}"


def explained(error: Exception) -> FedproxyError:
    """What an error that nobody expected means: want of disk or memory, or our bug."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceError(f"{error}. Free some space.")
    words = str(error).lower()
    if isinstance(error, MemoryError) or "out of memory" in words or "can't allocate" in words:
        remedy = "Lower batch_size or max_length, or use a machine with more memory"
        return ResourceError(f"{error or type(error).__name__}. {remedy}.")
    return FedproxyError(
        f"this is a bug in fedproxy: {type(error).__name__}: {error}. Run again with --debug and report it."
    )
