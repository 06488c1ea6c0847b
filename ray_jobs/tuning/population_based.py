"""Population Based Training (Jaderberg et al., arXiv 1711.09846), one generation per rung.

At each rung, each of the worst members is replaced by a copy of one of the best: it takes over the
checkpoint and settings, and perturbs the settings. No member is stopped. Random draws depend only on the
run's seed, the member and the rung, and decisions only on the measured rungs, so an interrupted search
resumes with the same population.
"""

import math
import random
from dataclasses import replace

from ray_jobs.config import Config, Range, Settings
from ray_jobs.config.space import Dimensions, sample, within
from ray_jobs.run.records import RungRow
from ray_jobs.tuning.space import points
from ray_jobs.tuning.trial import Trial

REPLACED = 0.25  # share of the members that take over another's state at a rung
FACTORS = (0.8, 1.25)  # a perturbed number is multiplied by one of these
RESAMPLED = 0.25  # probability that a setting is redrawn from the space instead

# Numbers that may change during a training; others (rank, batch size) are copied unchanged.
PERTURBED = {
    "train.learning_rate",
    "train.weight_decay",
    "train.caption_dropout",
    "train.prior_loss_weight",
    "train.max_grad_norm",
}


def first_generation(config: Config) -> list[Trial]:
    """Trials of all members, up to the first rung."""
    return [
        Trial(f"member-{number}", settings, config.search.ladder[:1], f"member-{number}")
        for number, settings in enumerate(points(config))
    ]


def next_generation(config: Config, members: list[Trial], rows: list[RungRow]) -> list[Trial]:
    """Trials of the same members, up to the next rung.

    Args:
        members: members of the measured generation; one without a row (it failed) is dropped.
        rows: rows of all rungs.
    """
    ladder, reached = config.search.ladder, members[0].ladder
    at = {row.trial_id: row for row in rows if row.step == reached[-1]}
    ranked = sorted(
        (each for each in members if each.trial_id in at), key=lambda each: at[each.trial_id].score
    )
    quantile = min(math.ceil(len(ranked) * REPLACED), len(ranked) // 2)
    worst = {each.trial_id for each in ranked[len(ranked) - quantile :]}
    upwards = ladder[: len(reached) + 1]
    found = []
    for member in members:
        if member.trial_id not in at:
            continue
        if member.trial_id not in worst:
            found.append(replace(member, ladder=upwards))
            continue
        draw = random.Random(f"{config.seed}:{member.trial_id}:{reached[-1]}")
        donor = draw.choice(ranked[:quantile])
        settings = perturbed(donor.settings, config.search.dimensions, draw)
        found.append(
            Trial(
                member.trial_id,
                settings,
                upwards,
                training=f"{member.trial_id}_from-{reached[-1]}",
                start=at[donor.trial_id].checkpoint,
                begins_at=reached[-1],
            )
        )
    return found


def perturbed(settings: Settings, dimensions: Dimensions, draw: random.Random) -> Settings:
    """Perturb every number that may change, or redraw it from its range or values."""
    found = dict(settings)
    for name in sorted(PERTURBED & dimensions.keys()):
        values = dimensions[name]
        if draw.random() < RESAMPLED:
            found[name] = sample(values, draw)
            continue
        moved = found[name] * draw.choice(FACTORS)
        low, high = (values.low, values.high) if isinstance(values, Range) else (min(values), max(values))
        found[name] = within(low, high, moved)
    return found
