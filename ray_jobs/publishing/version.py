"""The winner as a version of the registry."""

from typing import Any

from cluster.storage import Storage, slug
from ray_jobs.config import Config, ConfigError
from ray_jobs.evaluation.pool import EvaluatorPool
from ray_jobs.publishing.pages import CARD
from ray_jobs.registry.models import TEST_FEATURES, champion
from ray_jobs.registry.promotion import Measured, Paired
from ray_jobs.registry.registration import Registered, register
from ray_jobs.report import headline


def paired_with_champion(
    config: Config, pool: EvaluatorPool, winner: dict[str, Any], model: Storage
) -> Paired | None:
    """The winner's difference to the champion, picture by picture; None where the champion drew others, or
    there is none."""
    if not config.evaluate.bootstrap:  # no errors are asked for
        return None
    try:
        held = champion(config)
    except ConfigError:  # no champion yet; of a registry that does not answer `register` tells
        return None
    folder = Storage.open(held.source)
    if held.test_digest != winner["test_digest"] or not folder.exists(TEST_FEATURES):
        return None
    try:
        found = pool.difference(model, folder, "test", TEST_FEATURES)
    except (KeyError, ValueError):  # by another network, or of another number of pictures
        return None
    return Paired(held.version, found.standard_error)


def register_winner(
    config: Config, winner: dict[str, Any], data: str, source: str, paired: Paired | None
) -> Registered:
    """The winner as a version; `data`: digest of the prepared data."""
    return register(
        config,
        source=source,
        measured=Measured(
            fid=winner["test_fid"],
            error=winner.get("test_fid_error"),
            num_samples=winner["num_samples"],
            feature_network=winner["feature_network"],
            data=data,
            test=winner["test_digest"],
            base_fid=winner["base_test_fid"],
        ),
        paired=paired,
        params={
            "learning_rate": f"{winner['learning_rate']:g}",
            "step": str(winner["step"]),
            **{name: str(value) for name, value in winner.get("settings", {}).items()},
            "guidance_scale": f"{config.evaluate.guidance_scale:g}",
            "method": config.train.method,
            "base": config.model.base,
            "dataset": data,
            "folds": str(config.search.folds),
        },
        metrics=_metrics(winner),
        description=f"{headline(winner)} Card: {CARD} beside the weights.",
    )


def _metrics(winner: dict[str, Any]) -> dict[str, float]:
    """What MLflow shows of a winner: its FIDs, and every other measure on the test split."""
    fids = {name: value for name, value in winner.items() if name.endswith("_fid")}
    others = {slug(each["metric"]): each["value"] for each in winner["measures"]["winner"]}
    return fids | {f"test_{name.replace('-', '_')}": value for name, value in others.items()}
