"""The configured feature networks: checked before a run starts, loaded where they are used."""

from dataclasses import dataclass
from enum import StrEnum

from cluster.fetched import local_path
from ray_jobs.config import ConfigError, EvaluateConfig, NetworkConfig, PreferenceConfig
from ray_jobs.metrics.feature_network import FeatureNetwork, Preprocessing
from ray_jobs.metrics.inception import CLASSIFIER, InceptionClasses, load_classes, read_classes
from ray_jobs.metrics.networks import NetworkSpec, check_network, load_network
from ray_jobs.metrics.preference import FIELD as PREFERENCE
from ray_jobs.metrics.preference import PreferenceModel, check_clip_preference, load_clip_preference
from ray_jobs.metrics.vision_model import Clip, VisionModel, check_clip, check_vision_model, load_clip
from ray_jobs.weights.image_classifier import FIELD as CLASSIFIER_OF_BALANCE
from ray_jobs.weights.image_classifier import ImageClassifier
from ray_jobs.weights.question_model import QuestionModel, check_question_model

FIRST = "evaluate.feature_network"


class NetworkSet(StrEnum):
    """Which of a run's feature networks see a picture."""

    FIRST = "first"  # the deciding one
    RANKING = "ranking"  # those that score every rung
    SUBJECTS = "subjects"  # the one that compares subjects
    ALL = "all"


@dataclass(frozen=True)
class Networks:
    """The feature networks of a run: the deciding one and, if configured, a second one and CLIP.

    Attributes:
        preference: reward model that judges pictures for their captions; None without one.
        classes: classes of the deciding network's features, for the Inception Score of the literature.
    """

    first: FeatureNetwork
    second: FeatureNetwork | None = None
    clip: Clip | None = None
    classes: InceptionClasses | None = None
    preference: PreferenceModel | None = None

    @property
    def ranking(self) -> list[FeatureNetwork]:
        """The networks that score every rung."""
        return [network for network in (self.first, self.second) if network]

    @property
    def of_subjects(self) -> FeatureNetwork:
        """The network that compares subjects: DINO or its like if it is the second one, else CLIP, if any."""
        if isinstance(self.second, VisionModel):
            return self.second
        return self.clip or self.second or self.first

    @property
    def all(self) -> list[FeatureNetwork]:
        """The networks that measure features of pictures alone."""
        return [*self.ranking, *([self.clip] if self.clip else [])]

    def of(self, which: NetworkSet) -> list[FeatureNetwork]:
        """Return the networks of a set."""
        if which is NetworkSet.RANKING:
            return self.ranking
        if which is NetworkSet.ALL:
            return self.all
        return [self.of_subjects if which is NetworkSet.SUBJECTS else self.first]


def check_networks(evaluate: EvaluateConfig) -> None:
    """Check the files of all networks, so that a wrong one fails in seconds and not after `prepare`.

    Raises:
        ConfigError: a file is missing or not the expected one; the message names the field.
    """
    try:
        for spec in (_first(evaluate), _second(evaluate)):
            if spec:
                check_network(spec)
        if evaluate.inception_classes:
            read_classes(local_path(evaluate.inception_classes, CLASSIFIER))
        if evaluate.clip:
            check_clip(local_path(evaluate.clip, "evaluate.clip"), revision=evaluate.clip_revision)
        if evaluate.preference.model:
            _check_preference(evaluate.preference)
        if evaluate.balance.classifier:
            path = local_path(evaluate.balance.classifier, CLASSIFIER_OF_BALANCE)
            ImageClassifier(path, revision=evaluate.balance.revision)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def load_first(evaluate: EvaluateConfig, device: str = "cpu") -> FeatureNetwork:
    """Load the deciding network; raises the same errors as `load_networks`."""
    return load_network(_first(evaluate), device)


def load_networks(evaluate: EvaluateConfig, device: str) -> Networks:
    """Load all configured networks.

    Raises:
        ValueError: a file is missing or not the expected one.
    """
    second, clip = _second(evaluate), None
    if evaluate.clip:
        clip = load_clip(local_path(evaluate.clip, "evaluate.clip"), device, revision=evaluate.clip_revision)
    classes = None
    if evaluate.inception_classes:
        classes = load_classes(local_path(evaluate.inception_classes, CLASSIFIER))
    of_second = load_network(second, device) if second else None
    preference = None
    if evaluate.preference.model:
        preference = _load_preference(evaluate.preference, device)
    return Networks(load_first(evaluate, device), of_second, clip, classes, preference)


def _first(evaluate: EvaluateConfig) -> NetworkSpec:
    if isinstance(network := evaluate.feature_network, str):
        return NetworkSpec("inception", local_path(network, FIRST), field=FIRST)
    return _spec(FIRST, network)


def _second(evaluate: EvaluateConfig) -> NetworkSpec | None:
    return _spec("evaluate.second_network", evaluate.second_network) if evaluate.second_network else None


def _check_preference(chosen: PreferenceConfig) -> None:
    path, processor = _judge(chosen)
    if _is_clip(path, chosen):
        check_clip_preference(path, revision=chosen.revision, processor=processor)
    else:
        check_question_model(path, revision=chosen.revision)


def _load_preference(chosen: PreferenceConfig, device: str) -> PreferenceModel:
    path, processor = _judge(chosen)
    if _is_clip(path, chosen):
        return load_clip_preference(path, device, revision=chosen.revision, processor=processor)
    return QuestionModel(path, device, revision=chosen.revision)


def _judge(chosen: PreferenceConfig) -> tuple[str, str | None]:
    """Return the folder or hub name of a reward model, and of its processor, if it is apart."""
    assert chosen.model
    processor = chosen.processor and local_path(chosen.processor, "evaluate.preference.processor")
    return local_path(chosen.model, PREFERENCE), processor


def _is_clip(path: str, chosen: PreferenceConfig) -> bool:
    """Return whether a reward model is a CLIPModel; any other is a chat model.

    Raises:
        ValueError: as for `check_vision_model`, or a chat model is given another processor than its own.
    """
    if check_vision_model(path, revision=chosen.revision, field=PREFERENCE) == "clip":
        return True
    if chosen.processor:
        raise ValueError(
            f"evaluate.preference.processor: {chosen.processor} goes with a CLIPModel, which "
            f"{chosen.model} is not; remove it"
        )
    return False


def _spec(field: str, network: NetworkConfig) -> NetworkSpec:
    prepared = None
    if network.size and network.mean and network.std:
        prepared = Preprocessing(network.size, network.interpolation, network.mean, network.std)
    return NetworkSpec(
        network.kind,
        local_path(network.path, f"{field}.path"),
        network.sha256,
        network.name,
        prepared,
        network.revision,
        field=f"{field}.path",
    )
