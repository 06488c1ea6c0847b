"""The Python API: start a run from a few values, follow it, serve what it made.

Each function is a few lines over a stage. `fit` starts `ray_jobs.pipeline`, and `Run.deploy` starts
`serving.command`, with the arguments that a command line would have, so both give the same run.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffray.endpoints import Endpoint as Endpoint
from diffray.jobs import JobFailed as JobFailed
from diffray.jobs import names
from diffray.runs import Run
from diffray.settings import config_of, overrides, stage_arguments
from ray_jobs.config import Config, ConfigError, load_config
from ray_jobs.config.fields import nearest
from serving.client import EndpointError as EndpointError

if TYPE_CHECKING:
    from ray_jobs.registry.models import RegistryEntry


def defaults(recipe: str, **fields: Any) -> Config:
    """Return the configuration of a recipe, or of a file, with every default.

    Args:
        fields: as for `fit`.

    Raises:
        ConfigError: naming the recipe or field, and the nearest right name.
    """
    return load_config(recipe, overrides(fields))


def fit(
    data: str | Path | Sequence[Mapping[str, Any]],
    /,
    *,
    base: str | None = None,
    method: str | None = None,
    epochs: float | None = None,
    recipe: str | None = None,
    name: str | None = None,
    address: str | None = None,
    **fields: Any,
) -> "Run":
    """Start a run in the background, as `diffray submit -- diffray pipeline` does, and return it.

    The run goes on when this process ends; `diffray.run(name)` finds it again. The same call again returns
    the run if it is running, and resumes it if it was interrupted.

    Args:
        data: folder or address of pictures (`data.source`), or a list of sources (`data.sources`).
        base: the model to fine-tune (`model.base`); default: the recipe's.
        method: lora or full (`train.method`); default: the recipe's.
        epochs: length of a training (`train.epochs`), in place of the recipe's `search.ladder`.
        recipe: a recipe or a configuration file to start from; default: the one made for `method` and `base`,
            or for another base of its family.
        name: name of the run; default: the recipe's.
        address: Jobs API of a cluster, http://host:8265; default: an embedded Ray on this machine.
        fields: any further setting, as `train={"lora": {"rank": 8}}` or `**{"train.lora.rank": 8}`.

    Raises:
        ConfigError: a setting is wrong, another run of this name was started here, or the cluster is not
            reached. Nothing is started then.
    """
    arguments = stage_arguments(
        data, base=base, method=method, epochs=epochs, recipe=recipe, name=name, fields=fields
    )
    run = begin(arguments, address)
    if recipe is None:
        print(f"{run.name}: with the recipe {arguments[1]}")
    return run


def startable(arguments: list[str], address: str | None) -> "Run":
    """Return the run that `begin` would start or resume.

    Raises:
        ConfigError: a setting is wrong, or another run of this name was started here.
    """
    run = Run(config_of(arguments).name)
    if (former := run.job.record) and (former.arguments, former.address) != (arguments, address):
        raise ConfigError(
            f"name: {run.name}: a run of this name was started here with other settings; give another "
            f'name, or delete that one: diffray.run("{run.name}").delete()'
        )
    return run


def begin(arguments: list[str], address: str | None) -> "Run":
    """Start or resume a run by the arguments of its stage, as `fit` does by values."""
    run = startable(arguments, address)
    if run.job.record is None or run.status != "running":
        run.job.start("ray_jobs.pipeline", arguments, address, submit=True)
    return run


def run(name: str) -> "Run":
    """Return a run that was started from this folder.

    Raises:
        ConfigError: there is none of that name; names the nearest.
    """
    if name not in names():
        fix = nearest(name, names(), f"there are {', '.join(names()) or 'none'}")
        raise ConfigError(f"{name}: no run of this name was started here; {fix}")
    return Run(name)


def versions(recipe: str = "demo", **fields: Any) -> "dict[str, RegistryEntry]":
    """Return all registered models by name: their versions and aliases.

    Args:
        recipe, fields: as for `fit`; they say which registry, by `storage` and `publish.tracking_uri`.

    Raises:
        ConfigError: there is no registry, or it cannot be reached.
    """
    from ray_jobs.registry.models import entries

    return entries(load_config(recipe, overrides(fields)), ["*"])
