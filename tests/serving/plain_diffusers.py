"""What a request is measured against: the model's own pipeline in diffusers, drawing it alone."""

from copy import deepcopy
from dataclasses import replace
from functools import partialmethod
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from PIL import Image

from ray_jobs.diffusion.families import family_of
from ray_jobs.diffusion.families.text_processor import picture_processor, text_processor
from ray_jobs.diffusion.sampling import encode_prompts, seeded
from serving.request import Request
from tests.tiny_models import guidance


def load(folder: Path, variant: str | None = None) -> Any:
    """The pipeline as a user of diffusers loads it, in float32 and without a safety checker.

    Args:
        variant: of the weights' files, fp16 for example.
    """
    if (folder / "modular_model_index.json").exists():
        return _modular(folder, variant)
    index = diffusers.DiffusionPipeline.load_config(folder)
    absent: dict[str, Any] = {name: None for name, entry in index.items() if entry == [None, None]}
    if "safety_checker" in index:
        absent |= {"safety_checker": None, "requires_safety_checker": False}
    if "processor" in index:  # it would need torchvision
        import transformers

        kind = getattr(transformers, index["processor"][1])
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, subfolder="processor")
        absent["processor"] = text_processor(kind, tokenizer)
        if index["_class_name"] == SEEING:
            options = {"subfolder": "processor", "backend": "pil"}
            pictures = transformers.AutoImageProcessor.from_pretrained(folder, **options)
            absent["processor"] = picture_processor(kind, pictures, tokenizer)
    pipeline = getattr(diffusers, index["_class_name"]).from_pretrained(
        folder, variant=variant, dtype=torch.float32, **absent
    )
    pipeline.set_progress_bar_config(disable=True)
    if isinstance(pipeline, diffusers.FluxFillPipeline):
        pipeline.__class__ = type("FluxFillPipeline", (_AllPainted, diffusers.FluxFillPipeline), {})
    if isinstance(pipeline, diffusers.QwenImageEditPlusPipeline):
        exec("\n".join(family_of(SEEING).before_drawing((64, 64))), {"pipeline": pipeline})
        pipeline.__class__ = type(SEEING, (_Edits, diffusers.QwenImageEditPlusPipeline), {})
    return pipeline


SEEING = "QwenImageEditPlusPipeline"


class _Edits:
    """Call of Qwen-Image-Edit's pipeline that leaves the references at their sizes, and needs none.

    Without them, its embeddings are drawn by Qwen-Image's pipeline, which has the same parts.
    """

    def __call__(self, *, image: Any = None, negative_prompt: Any = None, **options: Any) -> Any:
        options["negative_prompt"] = negative_prompt
        if image is None:
            return self._plain(**options)
        if isinstance(prompts := options["prompt"], list):  # it takes one
            found = [self(image=image, **options | {"prompt": prompt}).images for prompt in prompts]
            return SimpleNamespace(images=torch.cat(found))
        from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as module

        scaled = module.calculate_dimensions
        pictures = image if isinstance(image, list) else [image]
        sizes = {each.width / each.height: each.size for each in pictures}

        def own(area: int, ratio: float) -> tuple[int, int]:
            size: tuple[int, int] = sizes[ratio] if area == module.VAE_IMAGE_SIZE else scaled(area, ratio)
            return size

        module.calculate_dimensions = own
        try:
            return diffusers.QwenImageEditPlusPipeline.__call__(self, image=image, **options)
        finally:
            module.calculate_dimensions = scaled

    @torch.no_grad()
    def _plain(self, *, prompt: Any, negative_prompt: Any = None, **options: Any) -> Any:
        pipeline: Any = self
        plain = diffusers.QwenImagePipeline(
            **{name: part for name, part in pipeline.components.items() if name != "processor"}
        )
        plain.set_progress_bar_config(disable=True)
        for name, texts in (("prompt", prompt), ("negative_prompt", negative_prompt)):
            if texts is not None:
                embeds, mask = pipeline.encode_prompt(texts)
                options |= {f"{name}_embeds": embeds, f"{name}_embeds_mask": mask}
        return plain(**options)


class _AllPainted:
    """Call of a pipeline that paints into masks: without one, all of a picture is painted."""

    def __call__(self, *, prompt: str | list[str], **options: Any) -> Any:
        count, size = 1 if isinstance(prompt, str) else len(prompt), (options["width"], options["height"])
        # One for each row: else all of them would share the first one's sample of the posterior.
        whole = {"image": [Image.new("RGB", size)] * count, "mask_image": [Image.new("L", size, 255)] * count}
        options = whole | {"generator": seeded(range(count))} | options
        call: Any = diffusers.FluxFillPipeline.__call__
        return call(self, prompt=prompt, **options)


def _modular(folder: Path, variant: str | None) -> Any:
    """A modular pipeline, called as others are."""
    import transformers

    index = diffusers.ModularPipeline.load_config(folder)
    blocks = getattr(diffusers, index["_blocks_class_name"])()
    blocks.sub_blocks.pop("prompt_upsampler", None)  # a language model that would rewrite every prompt
    pipeline = blocks.init_pipeline(str(folder))
    names = [name for name in pipeline.pretrained_component_names if name != "tokenizer"]
    pipeline.load_components(names, variant=variant, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, subfolder="tokenizer")
    kind = getattr(transformers, index["tokenizer"][1])
    pipeline.update_components(tokenizer=text_processor(kind, tokenizer))  # else it would need torchvision
    assert all(part is not None for part in pipeline.components.values())
    pipeline.set_progress_bar_config(disable=True)
    kind = type(pipeline)
    pipeline.__class__ = type(kind.__name__, (_OfLists, kind), {})
    return pipeline


class _OfLists:
    """Call of a modular pipeline with lists of prompts; it takes one, and the scale from its guider."""

    def __call__(
        self,
        prompt: str | list[str],
        negative_prompt: str | list[str] = "",
        latents: torch.Tensor | None = None,
        guidance_scale: float = 1.0,
        output_type: str = "pt",
        **options: Any,
    ) -> Any:
        pipeline: Any = self
        guided = "guider" in pipeline.components
        if guided:
            guider = diffusers.ClassifierFreeGuidance(guidance_scale=guidance_scale)
            pipeline.update_components(guider=guider)
        prompts = [prompt] if isinstance(prompt, str) else prompt
        negatives = [negative_prompt] * len(prompts) if isinstance(negative_prompt, str) else negative_prompt
        wanted = "latents" if output_type == "latent" else "images"
        found = []
        for row, texts in enumerate(zip(prompts, negatives, strict=True)):
            own = {} if latents is None else {"latents": latents[row, None]}
            inputs = dict(zip(("prompt", "negative_prompt"), texts, strict=True)) | own | options
            if not guided:
                del inputs["negative_prompt"]
            call = diffusers.ModularPipeline.__call__
            found.append(call(pipeline, output=wanted, output_type="pt", **inputs))
        return SimpleNamespace(images=torch.cat(found))


def understood(pipeline: Any, request: Request) -> Request:
    """The request without guidance, or without its negative prompt, where the model takes none."""
    family = family_of(pipeline)
    scale = guidance(pipeline, request.guidance_scale)
    embedded = family.guidance_embedded(getattr(pipeline, family.denoiser))
    if scale == 1 or embedded or family.helpers:
        return replace(request, guidance_scale=scale, negative_prompt=None)
    return request


def attentive(pipeline: Any) -> Any:
    """A pipeline with larger weights: random ones are so small that no picture looked at would be seen."""
    with torch.no_grad():
        pipeline.vae.encoder.conv_out.weight *= 10
        for weight in pipeline.transformer.parameters():
            weight *= 2 if weight.ndim == 2 else 1
    return pipeline


def keep_size(pipeline: Any, height: int, width: int) -> None:
    """Let the pipelines of HiDream and Kontext draw at this size, which they would scale to an area."""
    if isinstance(pipeline, diffusers.FluxKontextPipeline):
        sizes = family_of("FluxKontextPipeline").size_arguments(height, width)
        kept = partialmethod(diffusers.FluxKontextPipeline.__call__, **sizes)
        pipeline.__class__ = type("FluxKontextPipeline", (diffusers.FluxKontextPipeline,), {"__call__": kept})
    if type(pipeline).__name__ == "HiDreamImagePipeline":
        # A little more, as it rounds the sides down.
        pipeline.default_sample_size = (height * width) ** 0.5 / pipeline.vae_scale_factor * (1 + 1e-9)


def recorded_steps(pipeline: Any) -> list[tuple[Any, ...]]:
    """Return a list that fills with what the scheduler's steps receive: output, timestep and sample."""
    steps, step = list[tuple[Any, ...]](), pipeline.scheduler.step

    def recorded(output: Any, timestep: Any, sample: Any, **options: Any) -> Any:
        steps.append((output, timestep, sample))
        return step(output, timestep, sample, **options)

    pipeline.scheduler.step = recorded
    return steps


def draw(pipeline: Any, request: Request) -> torch.Tensor:
    """The request's picture: float32, height x width x 3, from 0 to 255."""
    family = family_of(pipeline)
    denoiser = getattr(pipeline, family.denoiser)
    options: dict[str, Any] = family.guidance_arguments(denoiser.config, request.guidance_scale)
    if request.negative_prompt is not None:
        options["negative_prompt"] = request.negative_prompt
    if request.references:
        options["image"] = [Image.fromarray(pixels.numpy()) for pixels in request.references]
    if request.masked is not None:
        colours, alpha = request.masked.split([3, 1], dim=2)
        options["image"] = Image.fromarray(colours.numpy())
        options["mask_image"] = Image.fromarray(((alpha[..., 0] == 0) * 255).to(torch.uint8).numpy())
    if request.image is None:
        options |= {"height": request.height, "width": request.width}
        if request.height and request.width:
            keep_size(pipeline, request.height, request.width)
    else:
        options |= image_options(pipeline, request.image, request.strength)
        if family.paints_masks:
            options["image"] = Image.fromarray(request.image.numpy())
            return drawn(pipeline, request, options)
        # AutoPipelineForImage2Image of diffusers 0.42.1 does not know all of them, for example Chroma's.
        name = type(pipeline).__name__.replace("Pipeline", "Img2ImgPipeline").replace("Kontext", "")
        if not hasattr(diffusers, name):
            return begin_with_image(pipeline, request)
        pipeline = getattr(diffusers, name).from_pipe(pipeline)
        pipeline.set_progress_bar_config(disable=True)
    return drawn(pipeline, request, options)


def drawn(pipeline: Any, request: Request, options: dict[str, Any]) -> torch.Tensor:
    picture = pipeline(
        prompt=request.prompt,  # by name: FLUX.2's pipelines take an image first
        generator=torch.Generator().manual_seed(request.seed),
        num_inference_steps=request.steps,
        output_type="pt",
        **known(pipeline, options),
    ).images[0]
    return 255 * on_white(picture).permute(1, 2, 0).float()


def on_white(pictures: torch.Tensor) -> torch.Tensor:
    """Pictures from 0 to 1, ... x channels x height x width, without their alpha channel if they have one."""
    if pictures.shape[-3] == 3:
        return pictures
    colours, alpha = pictures.split([3, 1], dim=-3)
    return alpha * colours + 1 - alpha


@torch.no_grad()
def begin_with_image(pipeline: Any, request: Request) -> torch.Tensor:
    """The same for a family whose image to image pipeline diffusers does not have, from the parts it has."""
    assert request.image is not None
    family, scheduler = family_of(pipeline), deepcopy(pipeline.scheduler)
    generator = torch.Generator().manual_seed(request.seed)
    config, image = pipeline.vae.config, request.image.permute(2, 0, 1)[None] / 127.5 - 1
    if config.get("in_channels") == 4:  # with an alpha channel
        image = torch.cat([image, torch.ones_like(image[:, :1])], dim=1)
    video = hasattr(config, "z_dim")  # an autoencoder for videos, to which an image is one frame
    encoded = pipeline.vae.encode(image.unsqueeze(2) if video else image)
    clean = encoded.latent if hasattr(encoded, "latent") else encoded.latent_dist.mean
    posterior, noise = (torch.randn(clean.shape, generator=generator) for _ in range(2))
    noise = noise.squeeze(2) if video else noise
    if hasattr(encoded, "latent_dist"):
        clean = clean + encoded.latent_dist.std * posterior
    if video:
        clean = clean.squeeze(2)
        shift, scale = torch.tensor([config.latents_mean, config.latents_std])[..., None, None]
    else:
        shift, scale = config.get("shift_factor") or 0, 1 / config.scaling_factor
    clean = (clean - shift) / scale
    family.schedule.set_timesteps(scheduler, request.steps, clean.shape, "cpu")
    first = family.schedule.first_step(request.steps, request.strength)
    scheduler.set_begin_index(first)
    start = scheduler.timesteps[first, None]
    if hasattr(scheduler, "scale_noise"):
        latents = scheduler.scale_noise(clean, start, noise)
    else:
        latents = scheduler.add_noise(clean, noise, start)
    captions = encode_prompts(pipeline, [request.prompt])
    null = encode_prompts(pipeline, [request.negative_prompt or ""], negative=True)
    for timestep in scheduler.timesteps[first:]:
        output, unguided = (
            family.denoise(family.model(pipeline), latents, timestep[None], each) for each in (captions, null)
        )
        if request.guidance_scale > 1:
            output = family.guide(unguided, output, torch.tensor(request.guidance_scale))
        latents = scheduler.step(output, timestep, latents, return_dict=False)[0]
    latents = latents * scale + shift
    picture = pipeline.vae.decode(latents.unsqueeze(2) if video else latents, return_dict=False)[0][0]
    picture = picture.squeeze(1) if video else picture
    return 255 * on_white((picture / 2 + 0.5).clamp(0, 1)).permute(1, 2, 0)


def known(pipeline: Any, options: dict[str, Any]) -> dict[str, Any]:
    """The options with a negative prompt in the form that the pipeline takes: some take its embeddings."""
    if "negative_prompt" in options and "negative_prompt" not in signature(pipeline.__call__).parameters:
        with torch.no_grad():
            embeds, _ = pipeline.encode_prompt(options["negative_prompt"])
        options = {**options, "negative_prompt_embeds": embeds}
        del options["negative_prompt"]
    return options


def image_options(pipeline: Any, image: torch.Tensor, strength: float) -> dict[str, Any]:
    """What its image to image pipeline takes of an image; those of transformers ask for its size."""
    options: dict[str, Any] = {"image": image.permute(2, 0, 1)[None] / 255, "strength": strength}
    if hasattr(pipeline, "transformer"):
        options |= {"height": image.shape[0], "width": image.shape[1]}
    return options
