"""Final scores of a published model: base and winner on the test split, near copies, subjects."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from statistics import fmean

from ray_jobs.config import Config, Effect, EvaluateConfig, Settings
from ray_jobs.console import say
from ray_jobs.data.feeding.dataset import Dataset
from ray_jobs.evaluation.cross_validation import splits, standard_error, trained_on
from ray_jobs.evaluation.dealing import Shape
from ray_jobs.evaluation.pool import EvaluatorPool
from ray_jobs.evaluation.scores import Scores, SetScores
from ray_jobs.publishing.balance import measure_balance
from ray_jobs.publishing.remembered import measure_remembered
from ray_jobs.publishing.subjects import MeasuredSubject, measure_subjects
from ray_jobs.report import SHOWN_NEIGHBOURS, Memorisation, SubjectPictures
from ray_jobs.run.folder import RunFolder
from ray_jobs.run.records import BESIDE, FID, MEASURES, FinalMeasures, RungRow, Winner
from ray_jobs.run.split import TEST
from ray_jobs.training.checkpoint import weights_of

# Fields that winner.json copies from the search.
WINNING = ("trial_id", "learning_rate", "settings", "step", "guidance_scale", "folds", "ranked_by")
JUDGED = tuple(f"{name}{suffix}" for name in MEASURES | BESIDE for suffix in ("", "_error"))


@dataclass(frozen=True)
class FinalScores:
    """Final measurements of publish.

    Attributes:
        winner: content of winner.json as far as it is known before registration.
        memorisation: near copies; None if `evaluate.memorisation_pictures` is 0.
        subjects: pictures of each subject; empty if no source is a subject.
    """

    winner: Winner
    memorisation: Memorisation | None
    subjects: list[SubjectPictures]


def settings_of(evaluate: EvaluateConfig) -> Settings:
    """Settings that affect these scores but not the search; stored in winner.json."""
    return evaluate.affecting(Effect.PUBLISHING)


def counted(shapes: Iterable[Shape]) -> dict[str, int]:
    """Count pictures by shape, named width x height, the most frequent first."""
    return dict(Counter(f"{width}x{height}" for height, width in shapes).most_common())


def measure_final(config: Config, dataset: Dataset, pool: EvaluatorPool, best: RungRow) -> FinalScores:
    """Measure base and winner, each sampled once. Only this function reads the test split.

    Args:
        best: the winner of the search; the base is not sampled at its guidance scale but at the configured
            one.
    """
    weights, guidance_scale = weights_of(best.checkpoint), best.guidance_scale
    pool.load(TEST)
    for split in splits(config):
        pool.load(split)
    run = RunFolder.of(config).root
    base, test = pool.measure(None, TEST), pool.measure(weights, TEST, guidance_scale, run)
    over_unedited = pool.over_unedited(TEST, run)
    floor, reachable = pool.floor(TEST), pool.reachable_floor(TEST)
    fid, lowest = test.scores.fid, floor.fid
    if lowest.num_samples < fid.num_samples:
        say("publish", f"the floor comes out high: it has {lowest.num_samples} real training pictures only")
    judged_whole = [pool.score(None, split) for split in splits(config)]
    judged = [each.fid for each in judged_whole]
    values = [each.value for each in judged]
    subjects = measure_subjects(config, dataset, pool, weights)
    balance = measure_balance(config, dataset, pool, weights)
    remembered = measure_remembered(config, pool, weights, guidance_scale)
    winner = Winner.model_validate(
        {name: value for name, value in best.fields().items() if name in WINNING}
        | {f"validation_{name}": value for name in JUDGED if (value := getattr(best, name)) is not None}
        | test.scores.row("test_")
        | base.scores.row("base_test_")
        | reachable.row("reachable_test_")
        | test.scores.origin
        | _of_base(judged_whole)
        | {
            "base_validation_fid": fmean(values),
            "base_validation_fid_error": standard_error(values)
            if config.search.folds
            else judged[0].standard_error,
            "validation_num_samples": judged[0].num_samples,
            "test_floor_fid": lowest.value,
            **(
                {
                    "unedited_test_target": pool.unedited[TEST],
                    "unedited_test_target_error": over_unedited.standard_error,
                }
                if over_unedited
                else {}
            ),
            "measures": FinalMeasures(
                base=base.records(),
                winner=test.records(),
                left_out=test.left_out,
                floor=pool.real_against_real(TEST),
            ),
            "measure_settings": settings_of(config.evaluate),
            "test_shapes": counted(islice(cycle(pool.shapes[TEST]), fid.num_samples)),
            "resizing": pool.resizing(),
            "test_digest": pool.digests[TEST],
            "subjects": [each.scores for each in subjects],
            "remembered": remembered,
            **({"balance": balance} if balance else {}),
        }
    )
    memorisation = _memorisation(config, pool, weights, test, base, guidance_scale)
    return FinalScores(winner, memorisation, [_pictures(each) for each in subjects])


def _of_base(judged: list[Scores]) -> dict[str, float]:
    """Return the base's mean over the validation splits of every score beside FID that all of them have."""
    found = {}
    for name in (each for each in MEASURES | BESIDE if each != FID):
        values = [value for each in judged if (value := each.row().get(name)) is not None]
        if len(values) == len(judged):
            found[f"base_validation_{name}"] = fmean(values)
    return found


def _memorisation(
    config: Config,
    pool: EvaluatorPool,
    weights: str,
    test: SetScores,
    base: SetScores,
    guidance_scale: float | None,
) -> Memorisation | None:
    """Collect the samples nearest to a training picture; only these are sampled again, for the report."""
    if (copies := test.copies) is None:
        return None
    order = sorted(range(len(copies.nearest)), key=lambda i: copies.nearest[i][1])[:SHOWN_NEIGHBOURS]
    trained = trained_on(config, pool.dataset, TEST)
    parts = ("train", "validation") if config.search.folds else ("train",)
    seen = trained.pictures("train", config.evaluate.memorisation_pictures)
    drawn_again = pool.pictures(weights, TEST, order, guidance_scale)
    pairs = [
        (drawn, seen[copies.nearest[i][0]]["image"], copies.nearest[i][1])
        for i, drawn in zip(order, drawn_again, strict=True)
    ]
    recited, by_base = (
        {each.metric: each for each in scores.recited.records()} if scores.recited else {}
        for scores in (test, base)
    )
    return Memorisation(
        pairs=pairs,
        num_samples=len(copies.nearest),
        share=copies.share,
        of_training=sum(trained.manifest.rows(name) for name in parts),
        recited=recited,
        recited_by_base=by_base,
        **asdict(copies.facts),
    )


def _pictures(subject: MeasuredSubject) -> SubjectPictures:
    instance, kind = subject.scores.instance_prompt, subject.scores.class_prompt
    columns = {"photo": subject.photos, "subject, fine-tuned": subject.drawn["winner", instance]}
    if kind:
        columns["class, base"] = subject.drawn["base", kind]
        columns["class, fine-tuned"] = subject.drawn["winner", kind]
    return SubjectPictures(subject.scores, columns)
