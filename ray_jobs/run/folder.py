"""Folders of a run, and those that all runs of a storage share.

Every path below `storage` is built here. What a folder contains is documented by the module that writes it.
"""

from dataclasses import dataclass

from cluster.storage import Storage
from ray_jobs.config import Config

CONFIG = "config.yaml"  # the resolved configuration, in the run's folder and in every checkpoint
BEGINS_FROM = "begins_from.json"  # registered versions that the run begins from
MODEL = "model"
IMPORTED = "imported"  # weights from elsewhere while they are measured
REPORT = "report.html"
TRAININGS, SEARCH = "train", "search"
DATASETS = DATASET, VOTES, EARLIER_VOTES = "dataset", "votes", "earlier_votes"  # folders that prepare fills
ENCODED, REGISTRY = "encoded", "registry"  # folders that runs share
CAPTIONS = "captions.json"  # in the samples: the captions of the pictures


@dataclass(frozen=True)
class RunFolder:
    """Folder of one run, `<storage>/<run>`.

    Attributes:
        root: the folder itself: configuration, winner, report, ledger of the test split.
    """

    root: Storage

    @classmethod
    def of(cls, config: Config) -> "RunFolder":
        return cls(Storage.open(config.storage).child(config.name))

    @property
    def dataset(self) -> Storage:
        """Manifest, list of parts, and findings of prepare."""
        return self.root.child(DATASET)

    @property
    def votes(self) -> Storage:
        """As `dataset`, of the votes of `train.preference`."""
        return self.root.child(VOTES)

    @property
    def earlier_votes(self) -> Storage:
        """As `votes`, of those that are not trained on."""
        return self.root.child(EARLIER_VOTES)

    @property
    def trainings(self) -> Storage:
        """One folder per training; the storage path of Ray Train."""
        return self.root.child(TRAININGS)

    def training(self, name: str) -> Storage:
        """Checkpoints of one training."""
        return self.trainings.child(name)

    @property
    def search(self) -> Storage:
        """Measured rungs and the result of the search."""
        return self.root.child(SEARCH)

    @property
    def model(self) -> Storage:
        """Published weights and their card."""
        return self.root.child(MODEL)

    @property
    def comfyui(self) -> Storage:
        """The published adapter as a LoRA file for ComfyUI."""
        return self.root.child("comfyui")

    @property
    def samples(self) -> Storage:
        """Pictures of the published model as files."""
        return self.root.child("samples")

    def comparison(self, one: str, other: str) -> Storage:
        """Scores and pictures of two versions side by side."""
        return self.root.child("comparisons", f"{one}-{other}")

    def remembered(self, run: str) -> Storage:
        """Pictures of an earlier run's captions, before and after this run's training."""
        return self.root.child("remembered", run)

    def study(self, name: str) -> Storage:
        """Pictures of two versions that raters compare, and what they prefer."""
        return self.root.child("studies", name)

    def feedback(self, update: int) -> Storage:
        """What people said before an update, as it was exported."""
        return self.root.child("updates", str(update))

    @property
    def shadow(self) -> Storage:
        """Pairs of pictures by champion and candidate, from shadow mode."""
        return self.root.child("shadow")

    @property
    def pictures(self) -> Storage:
        """Served pictures that clients fetch by an address, until it expires."""
        return self.root.child("pictures")

    @property
    def jobs(self) -> Storage:
        """Pictures and results of requests that are answered later."""
        return self.root.child("jobs")

    @property
    def autoencoder(self) -> Storage:
        """Trained autoencoder of a new base model."""
        return self.root.child("autoencoder")

    @property
    def initial(self) -> Storage:
        """A new base model before its training."""
        return self.root.child("initial")


@dataclass(frozen=True)
class SharedFolder:
    """Folders beside the runs, which no run may be named after (`NO_RUNS`).

    Attributes:
        root: the storage itself, with the SQLite databases of MLflow and feedback.
    """

    root: Storage

    @classmethod
    def of(cls, config: Config) -> "SharedFolder":
        return cls(Storage.open(config.storage))

    def encoded(self, encoders: str) -> Storage:
        """Cache of latents and embeddings, by digest of the encoders."""
        return self.root.child(ENCODED, encoders[:16])

    @property
    def real_features(self) -> Storage:
        """Features of real pictures, in files named after a digest."""
        return self.root.child("features")

    def class_pictures(self, digest: str) -> Storage:
        """Pictures of a class prompt drawn by the base model, by digest of their settings."""
        return self.root.child("class_pictures", digest)

    def written_captions(self, digest: str) -> Storage:
        """Captions that a model wrote, by digest of the model and its settings."""
        return self.root.child("written_captions", digest)

    def registered(self, model: str) -> Storage:
        """Weights of every version of a registered model."""
        return self.root.child(REGISTRY, model)

    def artifacts(self, run: str) -> Storage:
        """Images of a run's MLflow experiment, if MLflow's store is a SQLite file."""
        return self.root.child("mlartifacts", run)
