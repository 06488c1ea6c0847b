"""Route requests to versions, and list the models on offer. Pure: no registry, no replicas."""

import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from ray_jobs.registry.models import CHAMPION, RegisteredModel, RegistryEntry
from serving.messages import BASE, base_of, label


class UnknownModel(ValueError):
    """The requested model is not served here."""


class Offer(NamedTuple):
    """A model name that a request may use."""

    id: str
    version: RegisteredModel | None  # None: the bare base


class Catalogue:
    """The last known state of the registry, and the versions that are warm.

    Args:
        name: the registered model that is served.
        champion: the version that answers; its base is the one loaded in the replicas.
        admitted: other registered models that may be requested; `*` means all.
        candidate_share: fraction of users whom the candidate answers, 0 to 1.

    Attributes:
        champion: version that answers requests without an explicit version.
        candidate: version that answers `candidate_share` of them; None: no candidate.
        entries: content of the registry, by registered model.
    """

    def __init__(
        self, name: str, champion: RegisteredModel, admitted: Sequence[str] = (), candidate_share: float = 0.0
    ) -> None:
        self.name, self.admitted, self.candidate_share = name, tuple(admitted), candidate_share
        self.base = base_of(champion)
        self.champion = champion
        self.candidate: RegisteredModel | None = None
        self.entries: Mapping[str, RegistryEntry] = {}

    @property
    def models(self) -> list[str]:
        """The registered models to read from the registry; `*` means all."""
        return [self.name, *self.admitted]

    def fits(self, version: RegisteredModel) -> bool:
        """Return True if the replicas can serve a version: it has their base, and so its image size."""
        return base_of(version) == self.base

    def alias(self, alias: str) -> RegisteredModel | None:
        """Return the version of the served model that an alias points to in the registry, if any."""
        entry = self.entries.get(self.name)
        return entry.versions.get(entry.aliases.get(alias, 0)) if entry else None

    def answering(self, user: str | None) -> RegisteredModel:
        """Return the version for a request that names none: the candidate for its share of users.

        A user stays with one version while the candidate is the same; the next candidate gets other users.
        Without a user the choice is random.
        """
        if self.candidate is None:
            return self.champion
        share = random.random() if user is None else _hashed(f"{label(self.candidate)} {user}")
        return self.candidate if share < self.candidate_share else self.champion

    def find(self, model: str | None, user: str | None = None) -> RegisteredModel | None:
        """Return the version that a request's `model` names; None is the bare base.

        Raises:
            UnknownModel: there is no such model; names alternatives.
        """
        if model is None or model == self.name:
            return self.answering(user)
        if model == BASE:
            return None
        if model in (label(self.champion), f"{self.name}:{CHAMPION}"):
            return self.champion
        for name, entry in self.entries.items():
            version = _in_entry(model, name, entry)
            if version is not None and self.fits(version):
                return version
        raise UnknownModel(
            f"the model {model!r} does not exist; GET /v1/models lists the available models, for example "
            f"{self.name!r} or {label(self.champion)!r}"
        )

    def offers(self) -> Iterator[Offer]:
        """Yield all models that may be requested, the served model first."""
        yield Offer(self.name, self.champion)
        yield Offer(f"{self.name}:{CHAMPION}", self.champion)
        yielded = {label(self.champion)}
        yield Offer(label(self.champion), self.champion)
        for name, entry in sorted(self.entries.items(), key=lambda item: (item[0] != self.name, item[0])):
            versions = {number: each for number, each in entry.versions.items() if self.fits(each)}
            if name != self.name and entry.aliases.get(CHAMPION) in versions:
                yield Offer(name, versions[entry.aliases[CHAMPION]])
            for alias, number in sorted(entry.aliases.items()):
                if number in versions and (name, alias) != (self.name, CHAMPION):
                    yield Offer(f"{name}:{alias}", versions[number])
            for _, each in sorted(versions.items(), reverse=True):
                if label(each) not in yielded:
                    yield Offer(label(each), each)
        yield Offer(BASE, None)


def _in_entry(model: str, name: str, entry: RegistryEntry) -> RegisteredModel | None:
    """Return the version that `model` names as `name`, `name@version` or `name:alias`; else None."""
    if model == name:
        return entry.versions.get(entry.aliases.get(CHAMPION, 0))
    rest = model.removeprefix(name)
    if rest == model:
        return None
    if rest.startswith("@") and rest[1:].isdecimal():
        return entry.versions.get(int(rest[1:]))
    return entry.versions.get(entry.aliases.get(rest[1:], 0)) if rest.startswith(":") else None


def _hashed(text: str) -> float:
    """Hash a text to a number in 0 to 1, the same in every process."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
