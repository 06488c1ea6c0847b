"""Train a small base model from scratch, with the stages of a fine-tuning.

    python -m ray_jobs.pretrain --config configs/pretrain_emoji.yaml

1. Train an autoencoder. 2. Learn a tokenizer from the captions; the text encoder and the denoiser start with
random weights. 3. Run `prepare` and `train` as for any model, with `method: full` and `train_text_encoder`.
4. Save the averaged weights of the last rung in half precision. Each step stores its result under
`<storage>/<run>/` and is skipped when repeated; a run is refused if its settings have changed since it began.
"""

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.storage import Storage
from ray_jobs.config import Config, ConfigError, Effect, PretrainConfig, SourceConfig, home
from ray_jobs.console import clock, say
from ray_jobs.console.board import watched_board
from ray_jobs.data.sources.captions import CaptionRules
from ray_jobs.data.sources.detection import Sample, open_source
from ray_jobs.data.sources.samples import LEFT_OUT
from ray_jobs.pictures.reading import decode_image
from ray_jobs.run.command_line import run_stage
from ray_jobs.run.folder import RunFolder
from ray_jobs.train import train
from ray_jobs.training.trainer import require_same

if TYPE_CHECKING:
    import torch


def pretrain(config: Config) -> Path:
    """Run the stage; return the folder of the finished model."""
    if config.pretrain is None:
        raise ConfigError("pretrain: the section is missing; see configs/pretrain_emoji.yaml")
    run = RunFolder.of(config)
    if not run.root.is_local:
        raise ConfigError(f"storage: {config.storage}: pretrain needs a local folder")
    require_same(run.root, depends_on(config))
    if not run.autoencoder.exists():
        folder = Path(run.autoencoder.path)
        if config.train.use_gpu:
            _train_on_worker(config, config.pretrain, folder)
        else:
            threads = config.train.cpus_per_worker * config.train.min_workers
            _train_autoencoder(config, config.pretrain, folder, threads, partial(say, "pretrain"))
    if not run.initial.exists():
        _build_initial(config, config.pretrain, run)
    started = config.model.model_copy(update={"base": run.initial.path})
    trained = train(config.model_copy(update={"model": started}))
    output = home() / config.pretrain.output
    _save_half(Path(Storage.open(trained.weights).path), output)
    say("pretrain", f"wrote {output}")
    return output


def depends_on(config: Config) -> dict[str, object]:
    """Return the settings that the autoencoder and the initial model depend on; `train` checks its own."""
    settings = config.affecting(Effect.PRETRAINING)["pretrain"]
    data = config.data.affecting(Effect.ENCODINGS, Effect.DATASET)
    return {
        "seed": config.seed,
        **{f"pretrain.{name}": value for name, value in settings.items()},
        **{f"data.{name}": value for name, value in data.items()},
    }


def _load_pictures(config: Config, source: str) -> "torch.Tensor":
    """Load all pictures of a folder: uint8, N x 3 x resolution x resolution."""
    import numpy as np
    import torch

    different = {sample.name: sample.data for sample in _samples(config, SourceConfig(path=source))}
    pictures = [
        decode_image(data, resolution=config.data.resolution, background=config.data.background)
        for data in different.values()
    ]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


def _samples(config: Config, settings: SourceConfig) -> Iterator[Sample]:
    """Yield all captioned pictures of a source.

    Raises:
        ConfigError: a picture cannot be used; the data of a base model must have been checked beforehand.
    """
    rules = CaptionRules(config.data.caption_lines, config.data.repair_captions is not False)
    source = open_source(settings, config.data.column, rules)
    for piece in source.pieces:
        for sample in source.read(piece):
            if sample.problem and sample.problem.reason not in LEFT_OUT:
                raise ConfigError(
                    f"{settings.path}: {sample.name}: {sample.problem}; repair or remove the file"
                )
            if not sample.problem:
                yield sample


def _train_on_worker(config: Config, sizes: PretrainConfig, folder: Path) -> None:
    """Train the autoencoder where a GPU is reserved for it; this process may be on a node without one.

    Raises:
        ConfigError: a picture cannot be used.
    """
    import ray

    reserved = {"num_cpus": config.train.cpus_per_worker, "num_gpus": 1}
    with watched_board() as board:

        def tell(line: str) -> None:
            board.post.remote("autoencoder", line)

        task = ray.remote(**reserved, max_retries=0)(_train_autoencoder)
        try:
            ray.get(task.remote(config, sizes, folder, config.train.cpus_per_worker, tell))
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, ConfigError):
                raise ConfigError(str(error.cause)) from None
            raise


def _train_autoencoder(
    config: Config, sizes: PretrainConfig, folder: Path, num_threads: int, tell: Callable[[str], None]
) -> None:
    import torch

    from ray_jobs.diffusion.autoencoder import standardise_latents, train_autoencoder
    from ray_jobs.diffusion.families.architecture import build_autoencoder

    torch.manual_seed(config.seed)
    torch.set_num_threads(num_threads)
    pictures = _load_pictures(config, sizes.pictures)
    autoencoder = build_autoencoder(
        sizes.autoencoder_channels, sizes.latent_channels, config.data.resolution
    ).to("cuda" if config.train.use_gpu else "cpu")
    quality, started = 0.0, time.monotonic()
    for step, loss, decibels in train_autoencoder(
        autoencoder,
        pictures,
        steps=sizes.autoencoder_steps,
        batch_size=sizes.autoencoder_batch_size,
        learning_rate=sizes.autoencoder_learning_rate,
        kl_weight=sizes.kl_weight,
        seed=config.seed,
    ):
        quality = decibels if step == 1 else 0.98 * quality + 0.02 * decibels
        if step % 200 == 0:
            left = (time.monotonic() - started) / step * (sizes.autoencoder_steps - step)
            tell(f"autoencoder step {step}: loss {loss:.4f}, {quality:.1f} dB, {clock(left)} left")
    standardise_latents(autoencoder, pictures)
    autoencoder.save_pretrained(folder)


def _build_initial(config: Config, sizes: PretrainConfig, run: RunFolder) -> None:
    """Save a complete pipeline: the trained autoencoder, and the other parts with random weights."""
    import torch
    from diffusers import AutoencoderKL

    from ray_jobs.diffusion.families import architecture
    from ray_jobs.weights.saving import save_whole

    torch.manual_seed(config.seed)
    autoencoder = AutoencoderKL.from_pretrained(run.autoencoder.path)
    captions = [s.text for each in config.data.all_sources for s in _samples(config, each)]
    tokenizer = architecture.build_tokenizer(captions, sizes.vocabulary, sizes.max_tokens)
    pipeline = architecture.build_pipeline(
        autoencoder,
        tokenizer,
        text_width=sizes.text_width,
        text_layers=sizes.text_layers,
        heads=sizes.attention_heads,
        denoiser_channels=sizes.denoiser_channels,
        denoiser_layers=sizes.denoiser_layers,
        latent_size=config.data.resolution // 2 ** (len(sizes.autoencoder_channels) - 1),
    )
    save_whole(pipeline, Path(run.initial.path))


def _save_half(weights: Path, output: Path) -> None:
    """Save a pipeline in float16, which halves the files without a visible change in its pictures."""
    import torch

    from ray_jobs.diffusion.families import family_of
    from ray_jobs.weights.loading import load_pipeline
    from ray_jobs.weights.saving import save_whole

    pipeline = load_pipeline(str(weights))
    pipeline.to(dtype=torch.float16)
    # Otherwise each part's configuration would keep the path it was loaded from.
    for part in (pipeline, *family_of(pipeline).model(pipeline).values(), pipeline.vae):
        part.register_to_config(_name_or_path=output.name)
    save_whole(pipeline, output)


def main(given: list[str] | None = None) -> None:
    run_stage(__doc__, pretrain, name="pretrain", given=given)


if __name__ == "__main__":
    main()
