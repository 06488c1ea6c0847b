"""Where the pictures are and how they are cleaned, augmented, split and encoded."""

from typing import Literal

from PIL import ImageColor
from pydantic import Field, model_validator

from ray_jobs.config.fields import Positive, Prompt, Section, Share, require_unset


class SourceConfig(Section):
    """One place with captioned pictures; what kind of place it is, is seen from what it holds."""

    path: str = Field(description="folder, Parquet, Arrow or tar files; local, s3:// or gs://")
    weight: float | None = Field(None, gt=0, description="share among the sources of an epoch's rows")
    splits: list[str] = Field(
        [], description="of a source with train, validation, test or other splits: those read; empty: all"
    )
    image_column: str | None = Field(
        None,
        min_length=1,
        description="Parquet, Arrow: column of bytes or a struct with bytes; metadata files: of file names; "
        "empty: image, or the only one with bytes; file_name",
    )
    caption_column: str | None = Field(
        None,
        min_length=1,
        description="Parquet, Arrow, metadata files: column; tar: key of the .json; empty: text or caption",
    )
    instance_prompt: Prompt | None = Field(
        None, description="DreamBooth: caption of every picture of a folder that has no captions"
    )
    class_prompt: Prompt | None = Field(
        None, description="DreamBooth: what kind of thing it is, without the subject's own word"
    )


class CleaningConfig(Section):
    """What is set aside although it can be read; a threshold that is empty (null) is off."""

    max_rejected: float = Field(0.2, ge=0, le=1, description="a larger share set aside stops the job")
    max_pixels: Positive = Field(100_000_000, description="a larger picture is a decompression bomb")
    min_side: Positive = Field(32, description="pixels of the shorter side")
    max_aspect_ratio: float = Field(4.0, ge=1, description="longer side / shorter side")
    min_sharpness: float | None = Field(
        None, gt=0, description="variance of the Laplacian, of a picture whose short side has 256 pixels"
    )
    min_contrast: float | None = Field(2.0, gt=0, description="standard deviation of the luma, of 0..255")
    max_dark: float | None = Field(0.99, gt=0, le=1, description="share of pixels with a luma below 8")
    max_bright: float | None = Field(0.99, gt=0, le=1, description="share of pixels with a luma above 247")
    duplicates: Literal["drop", "keep", "ignore"] = Field(
        "drop", description="near duplicates: keep the first; keep all, in one split; or do not look"
    )
    duplicate_distance: int = Field(4, ge=0, le=8, description="bits of the 64 of the perceptual hash")
    duplicate_colour: float = Field(
        0.04, gt=0, le=1, description="mean difference of the colours of 4 x 4 fields, of the full range"
    )

    @model_validator(mode="after")
    def _duplicates(self) -> "CleaningConfig":
        if self.duplicates == "ignore":
            require_unset(self, "with duplicates: ignore", "duplicate_distance", "duplicate_colour")
        return self


class AugmentationConfig(Section):
    """Random changes to training pictures, drawn from a generator seeded by picture and epoch or variant."""

    variants: Positive = Field(1, description="encodings a training picture; each is a row of its own")
    flip: Share = Field(0.0, description="probability of a horizontal flip")
    rotate: Share = Field(0.0, description="probability of a rotation")
    max_degrees: float = Field(10.0, gt=0, le=45, description="of a rotation, to either side")
    crop: Share = Field(0.0, description="probability of a crop at a random place, not the centre")
    scale: Share = Field(0.0, description="probability of a crop that is smaller than what fits")
    min_scale: float = Field(0.8, gt=0, lt=1, description="side of the smallest crop, of what fits")
    colour: Share = Field(0.0, description="probability of a colour jitter")
    max_brightness: float = Field(0.1, ge=0, lt=1, description="relative change of brightness")
    max_contrast: float = Field(0.1, ge=0, lt=1, description="relative change of contrast")
    max_saturation: float = Field(0.1, ge=0, lt=1, description="relative change of saturation")
    max_hue: float = Field(0.02, ge=0, le=0.5, description="change of hue, of the full circle")

    @property
    def is_active(self) -> bool:
        return any((self.flip, self.rotate, self.crop, self.scale, self.colour))

    @model_validator(mode="after")
    def _variants_differ(self) -> "AugmentationConfig":
        if self.variants > 1 and not self.is_active:
            raise ValueError("variants would all be alike: give one of flip, rotate, crop, scale, colour")
        if not self.rotate:
            require_unset(self, "without rotate", "max_degrees")
        if not self.scale:
            require_unset(self, "without scale", "min_scale")
        if not self.colour:
            jitter = ("max_brightness", "max_contrast", "max_saturation", "max_hue")
            require_unset(self, "without colour", *jitter)
        return self


class DataConfig(Section):
    """Where the pictures are and how they are prepared."""

    source: str | None = Field(None, description="folder, Parquet, Arrow or tar files; or see `sources`")
    sources: list[SourceConfig] = Field([], description="instead of `source`: several, as a mixture")
    resolution: Positive = Field(64, description="pixels a side; with buckets, the root of their area")
    buckets: bool = Field(False, description="keep aspect ratios: crop to the nearest of several shapes")
    bucket_max_aspect_ratio: float = Field(2.0, gt=1, description="of the longest bucket")
    background: str = Field("white", description="colour that shows through transparent pixels")
    cleaning: CleaningConfig = CleaningConfig()
    augmentation: AugmentationConfig = AugmentationConfig()
    validation: Share = Field(0.15, description="share of the pictures that the search is judged on")
    test: Share = Field(0.15, description="share that is looked at once, when publishing")
    split_seed: int = Field(0, description="seed of the split; changing it moves pictures")
    caption_lines: Literal["whole", "first", "each"] = Field(
        "whole",
        description="of a caption of several lines: all as one, the first, or each as a row of its own",
    )
    repair_captions: bool | None = Field(
        None,
        description="as CLIP was trained: typographic quotes, full-width letters, entities of HTML and text "
        "that was decoded wrongly become plain; empty: if the base has a text encoder of CLIP's",
    )
    stratify: str | None = Field(None, description="column whose values are split alike")
    folds: int = Field(0, ge=0, description="of training and validation pictures; 0: none")
    num_class_images: Positive = Field(
        100, description="class pictures a subject, for prior preservation; the base model draws missing ones"
    )
    encode: Literal["cache", "stream"] = Field(
        "cache", description="cache: encode once, to Parquet; stream: while training, nothing is written"
    )
    encode_batch_size: Positive = Field(32, description="pictures encoded at once")
    encode_workers: Positive = Field(
        1, description="actors that hold the encoders, or the model that generates class pictures"
    )
    encode_dtype: Literal["bf16", "fp32"] = Field("bf16", description="of stored latents and embeddings")
    shuffle_mb: Positive = Field(256, description="window of the shuffle: rows mixed at once, in MiB")

    @property
    def all_sources(self) -> list[SourceConfig]:
        return self.sources or [SourceConfig(path=self.source or "")]

    @property
    def weights(self) -> dict[int, float]:
        """Of the sources by their number; empty where they have none."""
        return {number: each.weight for number, each in enumerate(self.sources) if each.weight}

    @model_validator(mode="after")
    def _combinations(self) -> "DataConfig":
        if bool(self.source) == bool(self.sources):
            raise ValueError("give either source or sources")
        try:
            ImageColor.getrgb(self.background)
        except ValueError:
            raise ValueError(f"background: {self.background!r} is no colour; for example white") from None
        weights = [each.weight for each in self.sources]
        if any(weights) and not all(weights):
            raise ValueError("sources: give every source a weight, or none")
        if self.validation + self.test >= 1:
            raise ValueError("validation + test must leave a share for training: lower one of them")
        if not self.buckets:
            require_unset(self, "without buckets", "bucket_max_aspect_ratio")
        if self.folds == 1:
            raise ValueError("folds: one fold leaves nothing to train on; give 0 or at least 2")
        if self.encode == "stream" and self.augmentation.variants > 1:
            raise ValueError("augmentation.variants: with encode: stream every epoch is augmented anew")
        return self
