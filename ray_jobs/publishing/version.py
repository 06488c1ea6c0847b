"""Register the winner as a version in the registry."""

from contextlib import suppress

from cluster.storage import Storage, slug
from ray_jobs.config import Config, ConfigError
from ray_jobs.evaluation.pool import SUBJECT_FEATURES, EvaluatorPool
from ray_jobs.publishing.pages import CARD
from ray_jobs.registry.models import TEST_FEATURES, champion
from ray_jobs.registry.promotion import Measured, Paired, Result
from ray_jobs.registry.registration import (
    Registered,
    beginning_tags,
    quantization_tags,
    register,
    training_tags,
)
from ray_jobs.report import headline
from ray_jobs.run.records import FID, MEASURES, SUBJECT, VOTES, RungRow, Winner
from ray_jobs.run.split import TEST


def paired_with_champion(config: Config, pool: EvaluatorPool, test: str, model: Storage) -> Paired | None:
    """Compare weights with the champion in pairs of pictures.

    None if there is no champion, or no comparable pictures of it, or error estimates are disabled.

    Args:
        test: digest of the test split.
        model: folder of the weights, with the features of their pictures.
    """
    if not config.evaluate.bootstrap:  # error estimates are disabled
        return None
    try:
        held = champion(config)
    except ConfigError:  # no champion yet; `register` reports an unreachable registry
        return None
    folder = Storage.open(held.source)
    if held.test_digest != test or not folder.exists(TEST_FEATURES):
        return None
    measures = {FID, pool.ranked_by(TEST)} - {VOTES}  # which are relative to what training began from
    if not folder.exists(SUBJECT_FEATURES):
        measures -= {SUBJECT}
    errors = {}
    for measure in measures:
        # The champion may have another network or number of pictures, or no rewards.
        with suppress(KeyError, ValueError):
            errors[measure] = pool.difference(model, folder, TEST, TEST_FEATURES, measure).standard_error
    return Paired(held.version, errors) if errors else None


def sampled_as(config: Config, best: RungRow | Winner) -> Config:
    """Return the configuration with the guidance scale that the search chose."""
    if best.guidance_scale is None:
        return config
    evaluate = config.evaluate.model_copy(update={"guidance_scale": best.guidance_scale})
    return config.model_copy(update={"evaluate": evaluate})


def register_winner(
    config: Config, winner: Winner, data: str, source: str, paired: Paired | None
) -> Registered:
    """Register the winner as a version; `data` is the digest of the prepared data."""
    tags = training_tags(config.with_settings(winner.settings).train)
    return register(
        config,
        source=source,
        measured=Measured(
            fid=winner.test_fid,
            error=winner.test_fid_error,
            num_samples=winner.num_samples,
            feature_network=winner.feature_network,
            data=data,
            test=winner.test_digest,
            base_fid=winner.base_test_fid,
            ranked_by=winner.ranked_by,
            others=_others(winner),
            preference_model=winner.preference_model,
            unedited=_unedited(winner),
        ),
        paired=paired,
        params={
            "learning_rate": f"{winner.learning_rate:g}",
            "step": str(winner.step),
            **{name: str(value) for name, value in winner.settings.items()},
            "guidance_scale": f"{config.evaluate.guidance_scale:g}",
            **tags,
            "base": config.model.base,
            **({"base_revision": config.model.revision} if config.model.revision else {}),
            **beginning_tags(config),
            **quantization_tags(config.model),
            "dataset": data,
            "folds": str(config.search.folds),
        },
        metrics=_metrics(winner),
        description=f"{headline(winner)} Card: {CARD} beside the weights.",
        tags=tags,
    )


def _unedited(winner: Winner) -> Result | None:
    """Return the distance of the pictures as they were; None if the winner edits none."""
    value, error = winner.unedited_test_target, winner.unedited_test_target_error
    return None if value is None else Result(value, error)


def _others(winner: Winner) -> dict[str, Result]:
    """Return the winner's scores on the test split, beside FID, that can rank."""
    found = {name: winner.value_of(f"test_{name}") for name in MEASURES if name != FID}
    return {
        name: Result(value, error, winner.value_of(f"base_test_{name}")[0])
        for name, (value, error) in found.items()
        if value is not None
    }


def _metrics(winner: Winner) -> dict[str, float]:
    """Metrics of the winner for MLflow: the scores that can rank, and all others on the test split."""
    told = winner.fields().items()
    suffixes = tuple(f"_{name}" for name in MEASURES)
    scores = {name: value for name, value in told if name.endswith(suffixes) and value is not None}
    others = {slug(each.metric): each.value for each in winner.measures.winner} if winner.measures else {}
    return scores | {f"test_{name.replace('-', '_')}": value for name, value in others.items()}
