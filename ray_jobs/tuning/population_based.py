"""Population Based Training (Jaderberg et al., arXiv 1711.09846), a generation a rung.

At each rung the worst members of the population give up what they have learnt: each takes over the
checkpoint and the settings of one of the best, and changes the settings a little. Nobody is stopped. All
that is drawn comes from the run's seed, the member and the rung, and what was decided follows from the
measured rungs, so an interrupted search goes on with the same population.
"""

import math
import random
from dataclasses import replace
from typing import Any

from ray_jobs.config import Config, Range, Settings
from ray_jobs.config.space import Dimensions, sample, within
from ray_jobs.tuning.space import points
from ray_jobs.tuning.trial import Trial

REPLACED = 0.25  # share of the members that take over another's state at a rung
FACTORS = (0.8, 1.25)  # a perturbed number is one of so many times what it was
RESAMPLED = 0.25  # probability that a setting is drawn anew from the space instead

# Numbers that may change while a training goes on; others (rank, batch size) are taken over as they are.
PERTURBED = {
    "train.learning_rate",
    "train.weight_decay",
    "train.caption_dropout",
    "train.prior_loss_weight",
    "train.max_grad_norm",
}


def first_generation(config: Config) -> list[Trial]:
    """The members, up to the first rung."""
    return [
        Trial(f"member-{number}", settings, config.search.ladder[:1], f"member-{number}")
        for number, settings in enumerate(points(config))
    ]


def next_generation(config: Config, members: list[Trial], rows: list[dict[str, Any]]) -> list[Trial]:
    """The same members up to the next rung.

    Args:
        members: of the generation that was measured; one that left no row (it failed) is left out.
        rows: of all rungs.
    """
    ladder, reached = config.search.ladder, members[0].ladder
    at = {row["trial_id"]: row for row in rows if row["step"] == reached[-1]}
    ranked = sorted(
        (each for each in members if each.trial_id in at), key=lambda each: at[each.trial_id]["fid"]
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
                start=at[donor.trial_id]["checkpoint"],
                begins_at=reached[-1],
            )
        )
    return found


def perturbed(settings: Settings, dimensions: Dimensions, draw: random.Random) -> Settings:
    """Settings with every number that may change moved a little, or drawn anew from its range or values."""
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
