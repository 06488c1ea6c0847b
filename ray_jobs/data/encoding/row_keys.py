"""Keys of rows: hashes of everything that an encoding depends on."""

import hashlib
import json
from functools import cached_property

from cluster.fetched import local_path
from ray_jobs.config import Config, Effect
from ray_jobs.data.encoding.geometry import Size
from ray_jobs.data.encoding.shapes import painter
from ray_jobs.weights.model_files import family_in

VERSION = 3  # version of an encoding's dependencies; a change encodes anew


class RowKeys:
    """Keys of rows: 16-byte hashes of everything that an encoding depends on, except the encoders.

    The encoders' digest names the cache's folder.
    """

    def __init__(self, config: Config) -> None:
        settings = config.data.affecting(Effect.ENCODINGS)
        self.augmentation, self.seed = settings.pop("augmentation"), config.seed
        self.is_augmented = config.data.augmentation.is_active
        self.settings = list(settings.values())
        self.config = config
        self._ends: dict[tuple[Size, int | None, bool], str] = {}

    def settled(self) -> "RowKeys":
        """Return the keys with all that they depend on, so that a task needs no files of the model."""
        has_further = self.config.data.all_sources[0].further_columns
        for name in ("_computed", "_stored") if has_further else ("_computed",):
            getattr(self, name)
        return self

    @cached_property
    def _stored(self) -> list[object]:
        """What is stored of further pictures: models with the same encoders share the cache."""
        data, model = self.config.data, self.config.model
        stored: list[object] = [data.num_references, data.has_masks, painter(self.config) is not None]
        stored += ["control", self._control_form] if data.brings_control else []
        family = family_in(local_path(model.base), revision=model.revision)
        return [*stored, family.pipeline_class] if family.text.sees_references else stored

    @cached_property
    def _computed(self) -> list[object]:
        """What control images that are computed depend on beside the settings."""
        data = self.config.data
        if data.brings_control or not data.has_control:
            return []
        from ray_jobs.weights.conditioner import VERSION, conditioner_digest  # imports PyTorch

        return ["computed control", self._control_form, VERSION, conditioner_digest(data.control)]

    @property
    def _control_form(self) -> str | None:
        """What is looked at of a control image."""
        model = self.config.model
        return family_in(local_path(model.base), revision=model.revision).control_form

    def key(
        self,
        digest: str,
        text: str,
        bucket: Size,
        variant: int,
        split: str,
        shown: bool,
        further: tuple[str, ...] = (),
    ) -> bytes:
        """Return the key of a row of a split."""
        varies = split == "train" and self.is_augmented
        place = (bucket, variant if varies else None, shown)
        if further or place not in self._ends:
            depends: list[object] = [bucket, *self.settings, shown, *further]
            depends += self._stored if further else []
            depends += self._computed
            depends += [self.seed, variant, self.augmentation] if varies else []
            end = json.dumps(depends)[1:]
            if not further:
                self._ends[place] = end
        else:
            end = self._ends[place]
        # The JSON of one list, of which most is equal for many rows.
        content = f'[{VERSION}, "{digest}", {json.dumps(text)}, {end}'
        return hashlib.sha256(content.encode()).digest()[:16]
