"""The model registry: the MLflow store of a run, and the champion that `serving` reads from it.

A version points to a folder of weights (diffusers format, safetensors). Its tags hold its base model and the
digest of its weights. Nothing is pickled. `registration.py` creates versions, `aliases.py` promotes them.
"""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cluster.sqlite import from_home, sqlite_file, sqlite_url
from cluster.storage import STORES
from ray_jobs.config import Config, ConfigError
from ray_jobs.registry.digests import are_weights
from ray_jobs.registry.store import check_answers, check_experiment, pages, versions_of, without_password
from ray_jobs.run.folder import SharedFolder

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion

CHAMPION = "champion"  # the version that is served
CANDIDATE = "candidate"  # the newest version that was not promoted
PREVIOUS = "previous"  # the version that the champion replaced
UNEDITED = "unedited_test_target"  # tag: `Measured.unedited`, and with _error its error
CONTROL_TAG = "control"  # tag of adapters that follow control images: true
WEIGHTS = "weights"  # tag: folder of the weights, if MLflow's own field `source` does not name it
# Features for drift detection, stored with a version's weights. The file has safetensors format but not its
# suffix, because the digest of the weights covers all *.safetensors files.
REFERENCE = "reference.features"
# Features of the pictures of its test score, for a paired comparison with a later version.
TEST_FEATURES = "test.features"


@dataclass(frozen=True)
class RegisteredModel:
    """One version in the registry."""

    name: str
    version: int
    source: str  # folder or URI of the weights
    digest: str  # `digests.weights_digest` of the weights
    base: str  # base model of the fine-tuning: folder as configured, or hub name
    base_revision: str | None
    method: str  # lora | full | controlnet
    metrics: dict[str, float]
    params: Mapping[str, str] = field(default_factory=dict)  # training parameters logged by `publish`
    guidance_scale: float | None = None  # guidance scale of its score; None: not recorded
    test_digest: str | None = None  # digest of the pictures and captions that it was scored on
    zero_terminal_snr: bool = False  # trained and sampled with a last timestep of pure noise
    quantization: str | None = None  # `model.quantize` of the base that it was trained and scored on
    text_quantization: str | None = None  # its `model.quantize_text`
    data: str | None = None  # digest of the prepared data of its training
    folds: int | None = None  # `search.folds` of its search; above 0, it was trained on validation pictures
    reference_resolution: int | None = None  # its `data.reference_resolution`
    control: bool = False  # an adapter that follows control images

    @property
    def has_controlnet(self) -> bool:
        """Whether it is a ControlNet, beside its base."""
        return self.method == "controlnet"

    @property
    def follows_control(self) -> bool:
        """Whether it follows control images."""
        return self.has_controlnet or self.control


@dataclass(frozen=True)
class RegistryEntry:
    """A registered model: its versions by number, and the version number of each alias."""

    versions: Mapping[int, RegisteredModel]
    aliases: Mapping[str, int]


def tracking_uri(config: Config) -> str:
    """URI of a run's MLflow store: configured, else MLFLOW_TRACKING_URI, else SQLite in the storage folder.

    Raises:
        ConfigError: no URI is given and the storage is remote, which cannot hold a SQLite file.
    """
    uri = config.publish.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    if uri:
        return from_home(uri)
    if config.storage.startswith(STORES):
        raise ConfigError(
            f"publish.tracking_uri: missing, and a SQLite registry cannot lie in {config.storage}; "
            "give the URI of an MLflow server here or in MLFLOW_TRACKING_URI"
        )
    return sqlite_url(f"{SharedFolder.of(config).root.uri}/mlflow.db")


def shown_uri(config: Config) -> str:
    """Return `tracking_uri` without its password, for display and logs."""
    return without_password(tracking_uri(config))


def check_store(config: Config) -> None:
    """Check that a run's MLflow store is reachable and accepts entries, before hours of training.

    Raises:
        ConfigError: there is no URI, nothing answers at it, or the run's experiment was deleted.
    """
    check_experiment(tracking_uri(config), config.name)


def source_of(version: "ModelVersion") -> str:
    """Folder or URI of a version's weights."""
    return str(version.tags.get(WEIGHTS) or version.source)


def verify_weights(registered: RegisteredModel, folder: str) -> None:
    """Raise ConfigError unless `folder` holds the weights that were registered."""
    if not are_weights(folder, registered.digest):
        raise ConfigError(
            f"{registered.source}: not the weights registered as version {registered.version} of "
            f"{registered.name!r}; run the pipeline again to register these"
        )


def open_client(config: Config) -> "MlflowClient":
    """Open MLflow's client, without its start-up messages (a new SQLite file logs every migration)."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    import mlflow

    for name in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(name).setLevel(logging.WARNING)
    uri = tracking_uri(config)
    if file := sqlite_file(uri):
        file.parent.mkdir(parents=True, exist_ok=True)
    return mlflow.MlflowClient(uri, registry_uri=uri)


@contextmanager
def store_errors(config: Config) -> Iterator[None]:
    """Turn errors of a store that refuses or cannot be reached into a ConfigError that names it."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, SQLAlchemyError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"publish.tracking_uri: {shown_uri(config)}: {reason}") from error


def open_existing(config: Config) -> "MlflowClient":
    """Open MLflow's client of an existing store, so that reading does not create a SQLite file.

    Raises:
        ConfigError: there is no store yet.
    """
    file = sqlite_file(tracking_uri(config))
    if file and not file.exists():
        raise nothing_published(config)
    return open_client(config)


class NothingPublished(ConfigError):
    """A model name has no champion."""


def nothing_published(config: Config) -> NothingPublished:
    """Return the error for a model name without a champion."""
    return NothingPublished(
        f"publish.model_name: {shown_uri(config)} holds no champion of {config.publish.model_name!r}; run "
        "the pipeline first: python -m ray_jobs.pipeline --config ..., or promote a version that stayed "
        "candidate: python -m ray_jobs.versions promote --config ... --version ..."
    )


def not_ours(config: Config, version: int) -> ConfigError:
    """ConfigError for a version without the tags that this program sets."""
    return ConfigError(
        f"publish.model_name: version {version} of {config.publish.model_name!r} in {shown_uri(config)} "
        f"was not registered by this program; point its alias {CHAMPION!r} to one that was"
    )


def champion(config: Config) -> RegisteredModel:
    """Return the champion of `config.publish.model_name`; errors as for `registered`."""
    return registered(config, CHAMPION)


def registered(config: Config, which: str) -> RegisteredModel:
    """Return a version of `config.publish.model_name`, by its number or an alias.

    Raises:
        ConfigError: the registry, the model or the version does not exist, the version was registered by
            another program, or the registry cannot be reached.
    """
    from mlflow.exceptions import MlflowException

    name = config.publish.model_name
    with store_errors(config):
        client = open_existing(config)
        try:
            found = (
                client.get_model_version(name, which)
                if which.isdecimal()
                else client.get_model_version_by_alias(name, which)
            )
        except MlflowException as error:
            # MLflow answers an unknown alias with INVALID_PARAMETER_VALUE.
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            if which == CHAMPION:
                raise nothing_published(config) from None
            raise ConfigError(
                f"{which}: no version or alias of {name!r}; see python -m ray_jobs.versions status"
            ) from None
        if "digest" not in found.tags:
            raise not_ours(config, int(found.version))
        run = run_of(client, found)
    return _of(found, dict(run.data.metrics), dict(run.data.params)) if run else _of(found, {}, {})


def run_of(client: "MlflowClient", version: "ModelVersion") -> "Run | None":
    """Return a version's MLflow run, or None if it has none or it was deleted permanently (`mlflow gc`).

    The version remains valid without its run.
    """
    from mlflow.exceptions import MlflowException

    if not version.run_id:
        return None
    try:
        return client.get_run(version.run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None


def sources(config: Config) -> dict[tuple[str, int], list[str]]:
    """Return what all versions are loaded from, by model and number; empty if there is no registry.

    That is the folder of the weights and, where it is known, the base: a folder or hub name.

    Versions of other programs are among them.

    Raises:
        ConfigError: the registry cannot be reached.
    """
    check_answers(tracking_uri(config))
    file = sqlite_file(tracking_uri(config))
    if file and not file.exists():
        return {}
    with store_errors(config):
        found = pages(open_client(config).search_model_versions)
        return {
            (each.name, int(each.version)): [source_of(each), *filter(None, [each.tags.get("base")])]
            for each in found
        }


def entries(config: Config, names: Sequence[str]) -> dict[str, RegistryEntry]:
    """Return the registry entries of the named models; `*` stands for all.

    Versions of other programs are omitted. So are metrics and parameters, which need one request per version.

    Raises:
        ConfigError: there is no registry, or it cannot be reached.
    """
    with store_errors(config):
        client = open_existing(config)
        models = list(pages(client.search_registered_models))
        found: dict[str, dict[int, RegisteredModel]] = {
            each.name: {} for each in models if each.name in names or "*" in names
        }
        # A single model is queried by name; for several, one request for all is cheaper than one each.
        one = next(iter(found), "")
        versions = versions_of(client, one) if len(found) == 1 else pages(client.search_model_versions)
        for each in versions if found else []:
            if each.name in found and "digest" in each.tags:
                found[each.name][int(each.version)] = _of(each, {}, {})
    aliases = {each.name: each.aliases for each in models}
    return {
        name: RegistryEntry(versions, {alias: int(to) for alias, to in aliases[name].items()})
        for name, versions in found.items()
    }


def _of(found: "ModelVersion", metrics: dict[str, float], params: Mapping[str, str]) -> RegisteredModel:
    """Convert MLflow's version to a RegisteredModel.

    Older releases recorded some settings only in the run's parameters, which may have been deleted.
    """
    folds = found.tags.get("folds") or params.get("folds")
    return RegisteredModel(
        name=found.name,
        version=int(found.version),
        source=source_of(found),
        digest=found.tags["digest"],
        base=found.tags["base"],
        base_revision=found.tags["base_revision"] or None,
        method=found.tags["method"],
        metrics=metrics,
        params=params,
        guidance_scale=float(found.tags["guidance_scale"]) if found.tags.get("guidance_scale") else None,
        test_digest=found.tags.get("test_digest"),
        zero_terminal_snr=found.tags.get("zero_terminal_snr") == "true",
        quantization=found.tags.get("base_quantization"),
        text_quantization=found.tags.get("base_text_quantization"),
        data=found.tags.get("data_digest") or params.get("dataset"),
        folds=int(folds) if folds else None,
        reference_resolution=int(side) if (side := found.tags.get("reference_resolution")) else None,
        control=found.tags.get(CONTROL_TAG) == "true",
    )
