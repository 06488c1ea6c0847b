"""Where the pictures are and how they are cleaned, augmented, split and encoded."""

from collections import Counter
from typing import Annotated, ClassVar, Literal

from PIL import ImageColor
from pydantic import Field, model_validator

from ray_jobs.config.effects import Added, Effect, Formerly
from ray_jobs.config.fields import Positive, Prompt, Section, Share, require_unset

FURTHER_COLUMNS = "reference_columns, control_column, mask_column"
"""Fields of a source that name pictures beside a row's own, for errors."""


class SourceConfig(Section):
    """A source of captioned images. Its kind is detected from its files."""

    affects: ClassVar = Effect.DATASET

    path: Annotated[str, Effect.IMAGES] = Field(
        description="folder, Parquet, Arrow or tar files, or an export of Label Studio or Labelbox; local, "
        "s3:// or gs://"
    )
    annotations: Annotated[str | None, Effect.IMAGES, Added()] = Field(
        None,
        min_length=1,
        description="file with the captions of the images in `path`: a JSON export of Label Studio, or an "
        "NDJSON export of Labelbox. Not needed where the export itself is `path`, or the only one in it",
    )
    weight: float | None = Field(None, gt=0, description="share of this source in the rows of an epoch")
    training_only: Annotated[bool, Added(False)] = Field(
        False,
        description="none of its rows is in validation or test, so that these stay as they are without it; a "
        "near duplicate of one that is there is set aside",
    )
    splits: list[str] = Field(
        [],
        description="splits to read, of a source that has train, validation, test or others; empty: all "
        "of them",
    )
    image_column: str | None = Field(
        None,
        min_length=1,
        description="Parquet and Arrow: column of image bytes, or of a struct with bytes; metadata files: "
        "column of file names; Label Studio: field of the task. Empty: `image`, or the only column with "
        "bytes; `file_name`",
    )
    caption_column: str | None = Field(
        None,
        min_length=1,
        description="Parquet, Arrow and metadata files: column of captions; tar: key in the .json; Label "
        "Studio and Labelbox: name of the text field. Empty: `text` or `caption`, or the only text field",
    )
    reference_columns: Annotated[list[Annotated[str, Field(min_length=1)]], Effect.IMAGES, Added([])] = Field(
        [],
        description="reference images of each row, for models that edit them: columns as for `image_column`, "
        "`references[0]` for the first image of a column of lists; tar: `before` for x.before.png beside "
        "x.png; folders with caption files: subfolders with images of the same names",
    )
    control_column: Annotated[str | None, Effect.IMAGES, Added()] = Field(
        None,
        min_length=1,
        description="control image of each row, named as in reference_columns, for ControlNets: edges, "
        "depth, a pose, or anything else that the row's image follows, in the shape of that. Empty: they are "
        "computed, if `data.control.kind` says so",
    )
    mask_column: Annotated[str | None, Added()] = Field(
        None,
        min_length=1,
        description="image of each row, named as in reference_columns, that is white where the row is to be "
        "learned and black elsewhere (`train.loss.outside_mask`)",
    )
    instance_prompt: Prompt | None = Field(
        None, description="DreamBooth: caption of every image in a folder without captions"
    )
    class_prompt: Prompt | None = Field(
        None, description="DreamBooth: the class of the subject, without its identifier"
    )

    @property
    def further_columns(self) -> list[str]:
        """Columns of the pictures that a row has beside its own: references, the control image, the mask."""
        return [*self.reference_columns, *filter(None, (self.control_column, self.mask_column))]

    @model_validator(mode="after")
    def _columns_differ(self) -> "SourceConfig":
        if twice := [name for name, count in Counter(self.further_columns).items() if count > 1]:
            raise ValueError(
                f"{FURTHER_COLUMNS}: {twice[0]} is named twice; every reference, the control image and the "
                "mask have a column of their own"
            )
        return self


MAX_GRADIENT = 2040  # the largest sum of both absolute derivatives of 8-bit pixels, by Sobel's filters


class CleaningConfig(Section):
    """Readable images that are set aside. An empty (null) threshold is off."""

    affects: ClassVar = Effect.DATASET

    max_rejected: Annotated[float, Effect.NOTHING, Formerly(Effect.DATASET)] = Field(
        0.2, ge=0, le=1, description="stop the job if a larger share is set aside"
    )
    max_pixels: Positive = Field(100_000_000, description="set larger images aside as decompression bombs")
    min_side: Positive = Field(32, description="minimum length of the shorter side, in pixels")
    max_aspect_ratio: float = Field(
        4.0, ge=1, description="maximum ratio of the longer side to the shorter side"
    )
    min_sharpness: float | None = Field(
        None,
        gt=0,
        description="minimum variance of the Laplacian, measured with the shorter side scaled to 256 pixels",
    )
    min_contrast: float | None = Field(
        2.0, gt=0, description="minimum standard deviation of the luma, which ranges from 0 to 255"
    )
    max_dark: float | None = Field(
        0.99, gt=0, le=1, description="maximum share of pixels with a luma below 8"
    )
    max_bright: float | None = Field(
        0.99, gt=0, le=1, description="maximum share of pixels with a luma above 247"
    )
    duplicates: Literal["drop", "keep", "ignore"] = Field(
        "drop",
        description="near duplicates: drop all but the first; keep all of them in one split; or ignore them",
    )
    duplicate_distance: int = Field(
        4, ge=0, le=8, description="maximum distance of two perceptual hashes, in bits of 64"
    )
    duplicate_colour: float = Field(
        0.04,
        gt=0,
        le=1,
        description="maximum mean difference of the colours of a 4 x 4 grid, as a share of the full range",
    )

    @model_validator(mode="after")
    def _duplicates(self) -> "CleaningConfig":
        if self.duplicates == "ignore":
            require_unset(self, "with duplicates: ignore", "duplicate_distance", "duplicate_colour")
        return self


class CaptioningConfig(Section):
    """A model that writes captions for pictures. Without `model` every picture needs its own caption."""

    affects: ClassVar = Effect.IMAGES

    model: Annotated[str | None, Added()] = Field(
        None,
        min_length=1,
        description="folder or hub name of a captioning model in transformers' format: BLIP, BLIP-2, "
        "Florence-2, or a vision-language model with a chat template. Empty: pictures without a caption are "
        "rejected",
    )
    revision: Annotated[str | None, Added()] = Field(
        None, description="revision of the captioning model on the hub"
    )
    pictures: Annotated[Literal["missing", "all"], Added("missing")] = Field(
        "missing",
        description="missing: write captions for pictures that have none; all: also instead of the source's "
        "own captions",
    )
    prompt: Annotated[Prompt | None, Added()] = Field(
        None,
        description="BLIP and BLIP-2: words that the model continues, which are no part of the caption; "
        "Florence-2: `<CAPTION>`, `<DETAILED_CAPTION>` or `<MORE_DETAILED_CAPTION>`; others: what the model "
        "is told. Empty: none; `<DETAILED_CAPTION>`; to describe the picture in one sentence",
    )
    trigger: Annotated[Prompt | None, Added()] = Field(
        None, description="word that stands before each written caption, with a comma: the name of a subject"
    )
    prefix: Annotated[Prompt | None, Added()] = Field(
        None,
        description="words before each written caption, after the trigger, as `a photo of`; not repeated "
        "where the model begins with them",
    )
    max_tokens: Annotated[int, Added(128)] = Field(
        128, ge=8, description="maximum length of a written caption, in tokens of the captioning model"
    )
    max_side: Annotated[Positive, Added(1024)] = Field(
        1024,
        description="longer side of the pictures that the captioning model gets, in pixels; larger ones are "
        "reduced",
    )

    @model_validator(mode="after")
    def _is_used(self) -> "CaptioningConfig":
        if self.model is None:
            others = [name for name in type(self).model_fields if name != "model"]
            require_unset(self, "without captioning.model", *others)
        return self


class ControlConfig(Section):
    """How control images are computed from pictures.

    Sources with a `control_column` bring their own; they are then computed only from drawn images, to compare
    them with these (docs/control.md).
    """

    affects: ClassVar = Effect.ENCODINGS

    kind: Annotated[Literal["edges", "depth", "pose"] | None, Added()] = Field(
        None,
        description="edges: Canny's, by OpenCV; depth: a depth model's, near is white; pose: skeletons of "
        "people, as OpenPose draws them. Without control_column, each image's own control image is made so. "
        "Empty: there are none, or no score says whether images follow those of control_column",
    )
    low_threshold: Annotated[int, Added(100)] = Field(
        100,
        ge=0,
        le=MAX_GRADIENT,
        description="edges: gradient from which an edge continues; Canny's first threshold in OpenCV",
    )
    high_threshold: Annotated[int, Added(200)] = Field(
        200,
        ge=1,
        le=MAX_GRADIENT,
        description="edges: gradient from which an edge begins; Canny's second threshold in OpenCV",
    )
    model: Annotated[str | None, Added()] = Field(
        None,
        min_length=1,
        description="folder or hub name of a model in transformers' format; depth: Depth Anything, DPT, "
        "ZoeDepth or GLPN; pose: ViTPose of 17 key points",
    )
    revision: Annotated[str | None, Added()] = Field(None, description="revision of `model` on the hub")
    detector: Annotated[str | None, Added()] = Field(
        None,
        min_length=1,
        description="pose: folder or hub name of a model in transformers' format that finds people, such as "
        "RT-DETR. Empty: each image shows one, who fills it",
    )
    detector_revision: Annotated[str | None, Added()] = Field(
        None, description="revision of `detector` on the hub"
    )

    @property
    def needs_model(self) -> bool:
        """Whether a model computes them."""
        return self.kind in ("depth", "pose")

    @model_validator(mode="after")
    def _fits_its_kind(self) -> "ControlConfig":
        if self.kind != "edges":
            require_unset(self, "without kind: edges", "low_threshold", "high_threshold")
        if not self.needs_model:
            require_unset(self, "without kind: depth or pose", "model", "revision")
        elif not self.model:
            raise ValueError(f"model: kind: {self.kind} needs one; name it, or choose kind: edges")
        if self.kind != "pose":
            require_unset(self, "without kind: pose", "detector")
        if not self.detector:
            require_unset(self, "without detector", "detector_revision")
        if self.low_threshold > self.high_threshold:
            raise ValueError(
                f"low_threshold: {self.low_threshold} is above high_threshold, {self.high_threshold}; "
                "lower it"
            )
        return self


class AugmentationConfig(Section):
    """Random changes to training images, from a generator seeded by image and epoch or variant."""

    affects: ClassVar = Effect.ENCODINGS

    variants: Annotated[Positive, Effect.DATASET] = Field(
        1, description="encodings per training image, each a row of its own"
    )
    flip: Share = Field(0.0, description="probability of a horizontal flip")
    rotate: Share = Field(0.0, description="probability of a rotation")
    max_degrees: float = Field(
        10.0, gt=0, le=45, description="maximum rotation in either direction, in degrees"
    )
    crop: Share = Field(0.0, description="probability of a crop at a random position instead of the centre")
    scale: Share = Field(0.0, description="probability of a crop smaller than the largest that fits")
    min_scale: float = Field(
        0.8, gt=0, lt=1, description="side of the smallest crop, relative to the largest that fits"
    )
    colour: Share = Field(0.0, description="probability of a colour jitter")
    max_brightness: float = Field(0.1, ge=0, lt=1, description="maximum relative change of brightness")
    max_contrast: float = Field(0.1, ge=0, lt=1, description="maximum relative change of contrast")
    max_saturation: float = Field(0.1, ge=0, lt=1, description="maximum relative change of saturation")
    max_hue: float = Field(
        0.02, ge=0, le=0.5, description="maximum change of hue, as a share of the full circle"
    )

    @property
    def is_active(self) -> bool:
        return any((self.flip, self.rotate, self.crop, self.scale, self.colour))

    @model_validator(mode="after")
    def _variants_differ(self) -> "AugmentationConfig":
        if self.variants > 1 and not self.is_active:
            raise ValueError("variants would all be the same: set flip, rotate, crop, scale or colour")
        if not self.rotate:
            require_unset(self, "without rotate", "max_degrees")
        if not self.scale:
            require_unset(self, "without scale", "min_scale")
        if not self.colour:
            jitter = ("max_brightness", "max_contrast", "max_saturation", "max_hue")
            require_unset(self, "without colour", *jitter)
        return self


class DataConfig(Section):
    """The images and how they are prepared."""

    affects: ClassVar = Effect.DATASET

    source: Annotated[str | None, Effect.IMAGES] = Field(
        None, description="folder, Parquet, Arrow or tar files; use `sources` for several"
    )
    sources: list[SourceConfig] = Field([], description="several sources, mixed; instead of `source`")
    resolution: Positive = Field(
        64, description="side of the square images, in pixels; with buckets, the square root of their area"
    )
    reference_resolution: Annotated[Positive | None, Effect.ENCODINGS, Added()] = Field(
        None,
        description="as `resolution`, of the reference images: they have the shape of their row's image, at "
        "this size. Empty: `resolution`",
    )
    buckets: bool = Field(
        False, description="keep aspect ratios: crop each image to the nearest of several shapes"
    )
    bucket_max_aspect_ratio: float = Field(2.0, gt=1, description="aspect ratio of the longest bucket")
    background: Annotated[str, Effect.ENCODINGS] = Field(
        "white", description="colour behind transparent pixels"
    )
    captioning: CaptioningConfig = CaptioningConfig()
    control: ControlConfig = ControlConfig()
    cleaning: CleaningConfig = CleaningConfig()
    augmentation: AugmentationConfig = AugmentationConfig()
    validation: Share = Field(0.15, description="share of the images on which the search is judged")
    test: Share = Field(0.15, description="share of the images that is used once, when publishing")
    split_by: Annotated[Literal["image", "caption"], Added("image")] = Field(
        "image",
        description="image: each image is assigned to a split by its content; caption: by its caption, so "
        "that no caption is in two splits",
    )
    split_seed: int = Field(0, description="seed of the split; changing it moves images between splits")
    caption_lines: Literal["whole", "first", "each"] = Field(
        "whole",
        description="captions of several lines: use the whole text, only the first line, or each line as "
        "a row of its own",
    )
    repair_captions: bool | None = Field(
        None,
        description="normalise captions as CLIP's training did: typographic quotes, full-width letters, "
        "HTML entities and wrongly decoded text become plain. Empty: if the base has a CLIP "
        "text encoder",
    )
    stratify: str | None = Field(None, description="column whose values are spread evenly over the splits")
    balance: Annotated[str | None, Added()] = Field(
        None,
        min_length=1,
        description="column whose values come equally often in training: rows of rare ones repeat. "
        "Validation and test stay as they are",
    )
    folds: int = Field(
        0,
        ge=0,
        description="number of cross-validation folds of the training and validation images, for "
        "`search.folds`; 0: none; unless given, as many as search.folds has for a subject",
    )
    num_class_images: Annotated[Positive, Effect.EXTENT] = Field(
        100,
        description="class images per subject for prior preservation; the base model generates missing ones",
    )
    encode: Literal["cache", "stream"] = Field(
        "cache", description="cache: encode once, to Parquet; stream: encode while training and write nothing"
    )
    encode_batch_size: Annotated[Positive, Effect.NOTHING] = Field(
        32, description="maximum number of images encoded or captioned at once; of large images fewer"
    )
    encode_workers: Annotated[Positive, Effect.NOTHING] = Field(
        1,
        description="actors that hold the encoders, the captioning model, or the model that generates class "
        "images",
    )
    encode_dtype: Annotated[Literal["bf16", "fp32"], Effect.ENCODINGS] = Field(
        "bf16", description="dtype of stored latents and embeddings"
    )
    encode_precision: Annotated[Literal["fp32", "bf16"], Effect.ENCODINGS, Added("fp32")] = Field(
        "fp32",
        description="of the text encoders and of autoencoders that allow it, and of the models that draw "
        "class images or write captions; bf16 unless given with `train.use_gpu`, whose devices encode",
    )
    shuffle_mb: Positive = Field(256, description="size of the shuffle window, in MiB of rows")

    @property
    def all_sources(self) -> list[SourceConfig]:
        return self.sources or [SourceConfig(path=self.source or "")]

    @property
    def num_references(self) -> int:
        """The number of reference images of each row."""
        return len(self.all_sources[0].reference_columns)

    @property
    def brings_control(self) -> bool:
        """Whether each row brings its control image."""
        return self.all_sources[0].control_column is not None

    @property
    def has_control(self) -> bool:
        """Whether each row has a control image: its own, or one that is computed."""
        return self.brings_control or bool(self.control.kind)

    @property
    def computes_control_by_model(self) -> bool:
        """Whether a model makes each row's control image from its image."""
        return self.control.needs_model and not self.brings_control

    @property
    def has_masks(self) -> bool:
        """Whether each row has a mask."""
        return self.all_sources[0].mask_column is not None

    @property
    def column(self) -> str | None:
        """The column that is read from every source, for `stratify` or `balance`."""
        return self.stratify or self.balance

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
            raise ValueError(
                f"background: {self.background!r} is not a colour; give a name or code, for example white"
            ) from None
        weights = [each.weight for each in self.sources]
        if any(weights) and not all(weights):
            raise ValueError("sources: give every source a weight, or none")
        if len({len(each.reference_columns) for each in self.sources}) > 1:
            raise ValueError("sources: name as many reference_columns in each; every row has as many")
        for field, thing in (("control_column", "control image"), ("mask_column", "mask")):
            if len({getattr(each, field) is None for each in self.sources}) > 1:
                raise ValueError(
                    f"sources: name a {field} in each, or in none; every row has a {thing} or none"
                )
        if not self.num_references:
            require_unset(self, "without reference_columns", "reference_resolution")
        if self.balance and any(weights):
            raise ValueError("balance: sources have weights, which set other shares; remove one of them")
        if self.balance and self.stratify and self.balance != self.stratify:
            raise ValueError(
                f"balance: {self.balance} is another column than stratify, {self.stratify}; give the same one"
            )
        if self.stratify and self.split_by == "caption":
            raise ValueError(
                "stratify: split_by: caption keeps the rows of a caption together, which need not have one "
                "value; remove one of them"
            )
        if self.validation + self.test >= 1:
            raise ValueError(
                "validation + test must be less than 1, to leave images for training; lower one of them"
            )
        if not self.buckets:
            require_unset(self, "without buckets", "bucket_max_aspect_ratio")
        if self.folds == 1:
            raise ValueError("folds: one fold leaves nothing to train on; give 0 or at least 2")
        if self.encode == "stream" and self.augmentation.variants > 1:
            raise ValueError("augmentation.variants: encode: stream augments anew in every epoch; remove it")
        return self
