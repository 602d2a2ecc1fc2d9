"""A client's own budget: what all private trainings on its rows cost together, over all runs and servers.

A row is known by a keyed hash, so that neither a row more or less nor another order makes a new data set of an old one:
trainings on rows of which even one is among these are all counted, as if they had been on these. What is spent is on
the disk before the outcome of a training leaves, under a lock, so that neither a kill nor a second process spends it
twice. Whoever may write the file may also change it: it guards against servers, not against its owner.
"""

import hashlib
import json
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fedproxy.artifacts import locked, os_error, read_json, write_json, write_secret
from fedproxy.errors import ArtifactError
from fedproxy.privacy.accounting import Steps, default_delta, epsilon_of
from fedproxy.privacy.releases import OverspentError

_DIGEST_BYTES = 16
_SPENT, _KEY, _LOCK = "spent.json", "key", "lock"
_PATIENCE = 600.0


class Budget:
    """The budget of one data set.

    Args:
        folder: Where it is noted what was spent, on any rows; made if missing.
        rows: The rows that are trained on.
        most: The ε that they may cost, at δ = n^-1.1 of these n rows.

    Raises:
        ArtifactError: what is noted is damaged.
        UsageError, ResourceError: the folder cannot be written.
    """

    def __init__(self, folder: Path, rows: Iterable[Mapping[str, Any]], most: float) -> None:
        self._folder, self._most = folder, most
        with self._locked():
            if not (folder / _KEY).exists():
                write_secret(folder / _KEY, secrets.token_hex(32).encode())
        key = (folder / _KEY).read_bytes()
        self._rows = {_digest(row, key) for row in rows}
        self._name = hashlib.sha256(b"".join(sorted(self._rows))).hexdigest()
        self._delta = default_delta(len(self._rows))
        self.spent  # noqa: B018 (damage is told at once)

    def _locked(self) -> Any:
        return locked(self._folder / _LOCK, _PATIENCE, f"{self._folder}: another process holds this budget.")

    @property
    def spent(self) -> float:
        """The ε that the rows have cost so far.

        Raises:
            ArtifactError: what is noted is damaged.
        """
        return epsilon_of(self._steps(), self._delta)

    def _noted(self) -> dict[str, list[dict[str, Any]]]:
        path = self._folder / _SPENT
        found = read_json(path) if path.exists() else {}
        if not isinstance(found, dict):
            raise ArtifactError(f"{path} is damaged: it is no table.")
        return found

    def _steps(self) -> list[Steps]:
        """What all trainings cost that any of the rows took part in."""
        try:
            return [
                Steps(float(one["sampling"]), float(one["noise"]), int(one["count"]))
                for name, costs in self._noted().items()
                if name == self._name or self._meets(name)
                for one in costs
            ]
        except (KeyError, TypeError, ValueError, AttributeError, OSError) as error:
            raise ArtifactError(f"{self._folder / _SPENT} is damaged: {error!r:.100}.") from error

    def _meets(self, name: str) -> bool:
        """Whether rows of another data set are among these."""
        held = (self._folder / f"{name}.rows").read_bytes()
        return any(held[at : at + _DIGEST_BYTES] in self._rows for at in range(0, len(held), _DIGEST_BYTES))

    def check(self, cost: Steps) -> None:
        """Check that a cost can be met.

        Raises:
            OverspentError: it cannot.
        """
        spent = self._steps()
        if (after := epsilon_of([*spent, cost], self._delta)) > self._most:
            raise OverspentError(
                f"these rows have cost ε = {epsilon_of(spent, self._delta):.3f} so far, and {cost.count} steps more "
                f"would make it {after:.3f} (δ = {self._delta:.2g}): this client allows {self._most:g} over all runs "
                "(max_epsilon)."
            )

    def spend(self, cost: Steps) -> None:
        """Note a cost for good.

        Raises:
            OverspentError: it cannot be met any more.
            UsageError, ResourceError: it cannot be written.
        """
        with self._locked():
            self.check(cost)
            rows, noted = self._folder / f"{self._name}.rows", self._noted()
            try:
                if not rows.exists():
                    write_secret(rows, b"".join(sorted(self._rows)))
            except OSError as error:
                raise os_error(error, rows) from error
            own = noted.setdefault(self._name, [])
            for one in own:
                if (one["sampling"], one["noise"]) == (cost.sampling, cost.noise):
                    one["count"] += cost.count
                    break
            else:
                own.append({"sampling": cost.sampling, "noise": cost.noise, "count": cost.count})
            write_json(self._folder / _SPENT, noted)


def _digest(row: Mapping[str, Any], key: bytes) -> bytes:
    text = json.dumps(row, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.blake2b(text.encode(), key=key[:64], digest_size=_DIGEST_BYTES).digest()
