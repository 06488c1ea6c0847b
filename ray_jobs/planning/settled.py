"""The configuration of a run as the registry and its sources decide it."""

from ray_jobs.config import Config
from ray_jobs.data.control import suited_to_control
from ray_jobs.data.references import suited_to_references
from ray_jobs.data.subjects import suited_to_subjects
from ray_jobs.data.votes import suited_to_votes
from ray_jobs.registry.beginning import with_beginning


def settled(config: Config, *, anew: bool = False) -> Config:
    """Return the configuration with folders in place of registered versions, and as it suits subjects,
    control images, references and votes.

    Every stage begins with it, so that all of them read the same settings.

    Args:
        anew: look aliases of versions up again, though the run has begun.

    Raises:
        ConfigError: as for `with_beginning`, `suited_to_subjects`, `suited_to_control` and
            `suited_to_references`.
    """
    suited = suited_to_control(suited_to_subjects(with_beginning(config, anew=anew)))
    return suited_to_votes(suited_to_references(suited))
