"""What people prefer: pictures judged for their captions by a reward model, beside the real pictures.

A reward alone has no zero and a scale of its own. So a picture is compared with the real picture of its
caption: the gap is 0 where both are liked as much, and lower is better, as of every other score that ranks.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import normalize

from ray_jobs.metrics.feature_network import FeatureNetwork
from ray_jobs.metrics.resampling import PairedDifference, difference_of, require_pairs
from ray_jobs.metrics.score import Score
from ray_jobs.metrics.vision_model import Clip, check_clip, clip_processor, load_clip

FIELD = "evaluate.preference.model"
GAP = "preference gap"


class PreferenceModel(ABC):
    """A model that judges pictures for their captions."""

    @property
    @abstractmethod
    def identity(self) -> str:
        """As `FeatureNetwork.identity`."""

    @property
    @abstractmethod
    def resizing(self) -> str:
        """As `FeatureNetwork.resizing`."""

    @property
    @abstractmethod
    def network(self) -> FeatureNetwork | None:
        """The feature network that judges; None if it is none."""

    @property
    @abstractmethod
    def modules(self) -> list[torch.nn.Module]:
        """The modules with its weights."""

    sees_edits: ClassVar[bool] = False
    """Whether it looks at the pictures before edits too."""

    @abstractmethod
    def rewards(
        self, images: torch.Tensor, captions: list[str], before: Sequence[torch.Tensor] = ()
    ) -> torch.Tensor:
        """Judge each picture for its caption; more is better.

        Args:
            images: uint8, N x 3 x H x W.
            before: of edits, whose captions are instructions, the N pictures that they begin with, each
                uint8, 3 x h x w; a model that does not look at them judges by the instruction alone.

        Returns:
            float32, N x 1, on the CPU.
        """


@dataclass(frozen=True, eq=False)
class ClipPreference(PreferenceModel):
    """A reward model with the architecture of CLIP, as PickScore (Kirstain et al., arXiv 2305.01569).

    A picture's reward is the cosine to its caption, times the model's learned scale.
    """

    clip: Clip

    @property
    def identity(self) -> str:
        # Not that of its features, by which the same model may measure too.
        return f"{self.clip.identity} (reward)"

    @property
    def resizing(self) -> str:
        return self.clip.resizing

    @property
    def network(self) -> FeatureNetwork | None:
        return self.clip

    @property
    def modules(self) -> list[torch.nn.Module]:
        return self.clip.modules

    def rewards(
        self, images: torch.Tensor, captions: list[str], before: Sequence[torch.Tensor] = ()
    ) -> torch.Tensor:
        given = self.clip.features(images), self.clip.text_features(captions)
        pictures, texts = (normalize(each.double(), dim=1) for each in given)
        scale = float(self.clip.module.logit_scale.exp())
        return (scale * (pictures * texts).sum(dim=1, keepdim=True)).float()


def check_clip_preference(path: str, *, revision: str | None = None, processor: str | None = None) -> None:
    """Check the files of a reward model of CLIP's architecture without its weights.

    Raises:
        ValueError: as for `load_clip_preference`.
    """
    check_clip(path, revision=revision, field=FIELD)
    clip_processor(processor or path, revision=None if processor else revision, field=FIELD)


def load_clip_preference(
    path: str,
    device: str | torch.device = "cpu",
    *,
    revision: str | None = None,
    processor: str | None = None,
) -> ClipPreference:
    """Load a reward model of CLIP's architecture.

    Args:
        processor: folder or hub name of its tokenizer and image processor; None: its own.

    Raises:
        ValueError: as for `load_clip`; the message names `FIELD`.
    """
    return ClipPreference(load_clip(path, device, revision=revision, field=FIELD, processor=processor))


def preference_gap(drawn: torch.Tensor, real: torch.Tensor, model: str) -> Score:
    """Mean of how much less drawn pictures are liked than the real ones of the same captions.

    Args:
        drawn: rewards: float, N.
        real: rewards of the real pictures: float, M; drawn picture i has the caption of real one i modulo M.
        model: identity of the reward model.

    Raises:
        ValueError: a reward is not a number.
    """
    if not (drawn.isfinite().all() and real.isfinite().all()):
        raise ValueError(
            f"{FIELD}: {model}: some rewards are not numbers, as of a model whose files are in fp16; give "
            "one in bf16 or fp32"
        )
    gaps = real.double()[torch.arange(len(drawn)) % len(real)] - drawn.double()
    return Score(float(gaps.mean()), len(gaps), model, _error(gaps), GAP)


def preference_difference(one: torch.Tensor, other: torch.Tensor, model: str) -> PairedDifference:
    """Gap of one candidate minus that of another, from the same captions and noise.

    Args:
        one, other: rewards: float, N each.
    """
    require_pairs(one, other)
    first, second = -one.double(), -other.double()
    count = len(one)
    return difference_of(
        float((first - second).mean()), first, second, lambda deviation: deviation / count**0.5, count, model
    )


def mean_reward(rewards: torch.Tensor, model: str) -> Score:
    """Mean reward of drawn pictures (float, N), in the model's own unit, as the literature gives it."""
    values = rewards.double()
    return Score(float(values.mean()), len(values), model, _error(values), "mean reward")


def _error(values: torch.Tensor) -> float | None:
    return float(values.std() / len(values) ** 0.5) if len(values) > 1 else None
