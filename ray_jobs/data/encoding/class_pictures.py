"""Pictures of a subject's class, drawn by the base model, for DreamBooth's prior preservation.

They lie in `<storage>/class_pictures/<digest>/<number>.png`, where all runs find them; `settings.json` there
holds what the digest is of. Each is drawn by itself, from noise that its number gives, so that it does not
depend on how many were wanted, on how many actors drew them, or on what an interrupted run left.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from cluster.fetched import local_path
from cluster.storage import Storage
from ray_jobs.config import Config, ConfigError
from ray_jobs.console import say
from ray_jobs.data.encoding.encoding import encoder_actors
from ray_jobs.data.sources.captions import caption_rules
from ray_jobs.data.sources.detection import Source, list_files
from ray_jobs.data.sources.dreambooth import Subject, class_pictures
from ray_jobs.pictures.reading import encode_png
from ray_jobs.weights.model_files import model_digest

FOLDER = "class_pictures"
SETTINGS = "settings.json"


def lacking(config: Config, sources: Sequence[Source]) -> dict[str, int]:
    """How many pictures have to be drawn of each class prompt, before any were: as many as the subject lacks
    that lacks most. Subjects of the same class share them.

    Raises:
        ConfigError: prior preservation is on, and a source has no class prompt.
    """
    if not config.train.prior_loss_weight:
        return {}
    found: dict[str, int] = {}
    for source in sources:
        if not isinstance(source, Subject) or source.class_prompt is None:
            raise ConfigError(
                f"train.prior_loss_weight: {source.name} has no class prompt; give it a class_prompt (and an "
                "instance_prompt) in data.sources or in its dataset_info.json, or leave the weight at 0"
            )
        missing = config.data.num_class_images - source.num_class_pictures
        found[source.class_prompt] = max(found.get(source.class_prompt, 0), missing)
    return {prompt: missing for prompt, missing in found.items() if missing > 0}


def announce_class_pictures(config: Config, sources: Sequence[Source]) -> None:
    """Say what `generate_class_pictures` would draw.

    Raises:
        ConfigError: as `lacking`.
    """
    for prompt, count in lacking(config, sources).items():
        say("prepare", f"{prompt!r}: {count:,} class pictures are to be drawn, less those in the storage")


def generate_class_pictures(
    config: Config, sources: Sequence[Source], progress: Callable[[int, int], None]
) -> list[Source]:
    """Draw what is lacking and not there yet; returns a source a class prompt that lacked pictures.

    Args:
        progress: is told pictures drawn and pictures to draw, after each.
    """
    import ray.data

    wanted = lacking(config, sources)
    if not wanted:
        return []
    model = model_digest(local_path(config.model.base), revision=config.model.revision)
    folders = {prompt: _folder(config, model, prompt) for prompt in wanted}
    items = [
        {"prompt": prompt, "number": number}
        for prompt, folder in folders.items()
        for number in _missing(folder, wanted[prompt])
    ]
    if items:
        drawn = ray.data.from_items(items, override_num_blocks=min(len(items), 1024)).map_batches(
            DrawClassPictures, batch_size=1, fn_constructor_args=(config, folders), **encoder_actors(config)
        )
        for done, _ in enumerate(drawn.iter_rows(), 1):
            progress(done, len(items))
    found = sum(wanted.values()) - len(items)
    say("prepare", f"class pictures by the base model: {len(items):,} drawn, {found:,} found")
    rules = caption_rules(config)
    return [
        replace(_source(prompt, folders[prompt], count), captions=rules) for prompt, count in wanted.items()
    ]


def _folder(config: Config, model: str, prompt: str) -> Storage:
    """Where the pictures of a class prompt lie, named by all that they depend on."""
    settings = {
        "model": model,
        "prompt": prompt,
        "resolution": config.data.resolution,
        "inference_steps": config.evaluate.inference_steps,
        "guidance_scale": config.evaluate.guidance_scale,
        "seed": config.seed,
    }
    text = json.dumps(settings, indent=2) + "\n"
    digest = hashlib.sha256(text.encode()).hexdigest()[:32]
    folder = Storage.open(config.storage).child(FOLDER, digest)
    folder.write_text(SETTINGS, text)
    return folder


def _name(number: int) -> str:
    return f"{number:06d}.png"


def _missing(folder: Storage, count: int) -> list[int]:
    present = set(folder.files())
    return [number for number in range(count) if _name(number) not in present]


def _source(prompt: str, folder: Storage, count: int) -> Source:
    """The first `count` pictures of a class prompt, as the scan takes them."""
    listing = replace(list_files(folder.uri), name=f"generated: {prompt}")
    return class_pictures(listing, map(_name, range(count)), prompt)


class DrawClassPictures:
    """An actor that holds the base model, draws pictures of class prompts and writes them down."""

    def __init__(self, config: Config, folders: dict[str, Storage]) -> None:
        import torch

        from ray_jobs.weights.loading import load_pipeline

        torch.set_num_threads(config.train.cpus_per_worker)
        self.config, self.folders = config, folders
        pipeline = load_pipeline(local_path(config.model.base), revision=config.model.revision)
        self.pipeline = pipeline.to("cuda" if config.train.use_gpu else "cpu")

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        for prompt, number in zip(batch["prompt"].tolist(), batch["number"].tolist(), strict=True):
            self.folders[prompt].write_bytes(_name(number), self._draw(prompt, number))
        return batch

    def _draw(self, prompt: str, number: int) -> bytes:
        """A PNG. Not in a batch with others: kernels for other batch sizes round differently."""
        import torch

        from ray_jobs.diffusion.sampling import sample_pictures

        state = np.random.SeedSequence((self.config.seed, number)).generate_state(1, np.uint64)[0]
        seed = int(state >> np.uint64(1))
        torch.manual_seed(seed)  # some schedulers draw noise while they step
        [pictures] = sample_pictures(
            self.pipeline,
            [prompt],
            [seed],
            shapes=[(self.config.data.resolution,) * 2],
            num_steps=self.config.evaluate.inference_steps,
            guidance_scale=self.config.evaluate.guidance_scale,
            batch_size=1,
        )
        return encode_png(pictures[0].permute(1, 2, 0).numpy())
