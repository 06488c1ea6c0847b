"""What a run begins from: registered versions that `model.base`, `adapter` and `controlnet` name.

An alias is looked up once, when a run begins: `<storage>/<run>/begins_from.json` keeps the version. So the
run can be resumed after its own result has become the champion. `--fresh` looks it up again.
"""

import json
from dataclasses import asdict, dataclass

from ray_jobs.config import Config, ConfigError, named_version, resolve_path
from ray_jobs.console import say
from ray_jobs.registry.models import registered, verify_weights
from ray_jobs.run.folder import BEGINS_FROM, RunFolder

# That a version must have been trained by, by field of `model`.
METHODS = {"base": "full", "adapter": "lora", "controlnet": "controlnet"}


@dataclass(frozen=True)
class Beginning:
    """A registered version that a setting names.

    Attributes:
        given: the setting's value.
        base, base_revision: the base that it was trained on.
        data: digest of the prepared data of its training; None if it is not recorded.
    """

    given: str
    name: str
    version: int
    source: str
    base: str
    base_revision: str | None
    data: str | None

    @property
    def label(self) -> str:
        """Name as requests to the endpoint have it."""
        return f"{self.name}@{self.version}"


def with_beginning(config: Config, *, anew: bool = False, kept: bool = True) -> Config:
    """Return a configuration with folders in place of registered versions, and the form of its adapter.

    Args:
        anew: look aliases up again, though the run has begun.
        kept: keep the versions for later starts of the run.

    Raises:
        ConfigError: there is no such version, it was not trained by the method that the setting needs, or
            `train.lora` contradicts the adapter.
    """
    before = {} if anew else read_beginnings(config)
    found = {field: each for field in METHODS if (each := _beginning(config, field, before.get(field)))}
    if kept and found != before and (found or before):
        content = json.dumps({field: asdict(each) for field, each in found.items()}, indent=2)
        RunFolder.of(config).root.write_text(BEGINS_FROM, content)
    model = config.model
    ours = (resolve_path(found["base"].source if "base" in found else model.base), model.revision)
    for field, each in found.items():
        if field != "base" and ours != (resolve_path(each.base), each.base_revision):
            other = f"{each.label} was trained on {each.base}, not on {model.base}"
            say("checks", f"warning: model.{field}: {other}")
    update = {field: each.source for field, each in found.items()}
    config = config.model_copy(update={"model": model.model_copy(update=update)})
    if not config.model.adapter:
        return config
    from ray_jobs.weights.starting_adapter import with_form_of_adapter  # imports PyTorch

    return with_form_of_adapter(config)


def read_beginnings(config: Config) -> dict[str, Beginning]:
    """Return the versions that a run began from, by field of `model`; empty if it has named none."""
    root = RunFolder.of(config).root
    if not root.exists(BEGINS_FROM):
        return {}
    return {field: Beginning(**told) for field, told in json.loads(root.read_text(BEGINS_FROM)).items()}


def beginning_names(config: Config) -> dict[str, str]:
    """Return the version or adapter that a run begins from, by field of `model`; empty for a plain base."""
    found = {field: each.label for field, each in read_beginnings(config).items()}
    for field, given in (("adapter", config.model.adapter), ("controlnet", config.model.controlnet)):
        if given:
            found.setdefault(field, given)
    return found


def _beginning(config: Config, field: str, before: Beginning | None) -> Beginning | None:
    given = getattr(config.model, field)
    named = named_version(given)
    if before and given in (before.given, before.source):
        return before
    if not named:
        return None
    name, which = named
    publish = config.publish.model_copy(update={"model_name": name})
    try:
        version = registered(config.model_copy(update={"publish": publish}), which)
        verify_weights(version, version.source)
    except ConfigError as error:
        reason = str(error).removeprefix("publish.model_name: ")
        raise ConfigError(f"model.{field}: {given}: {reason}") from None
    if version.method != METHODS[field]:
        kind = {
            "full": "a whole model; give it as model.base",
            "lora": f"an adapter; give it as model.adapter, with its base {version.base} as model.base",
            "controlnet": "a ControlNet; give it as model.controlnet, with its base "
            f"{version.base} as model.base",
        }[version.method]
        raise ConfigError(f"model.{field}: {given} is {kind}")
    say("checks", f"model.{field}: {given} is version {version.version}: {version.source}")
    return Beginning(
        given, name, version.version, version.source, version.base, version.base_revision, version.data
    )
