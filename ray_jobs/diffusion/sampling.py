"""Turn noise and prompt embeddings into images. Pure PyTorch; all state is in the arguments.

The arithmetic is that of diffusers' pipelines, so the same noise gives the same image here and in plain
diffusers.
"""

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from inspect import signature
from operator import itemgetter

import torch

from ray_jobs.diffusion.families import Captions, Components, Conditions, Family, family_of
from ray_jobs.diffusion.families.control import CONTROL
from ray_jobs.diffusion.families.family import MASK_PIXELS, MASKED, NEXT_TIMESTEP, reference
from ray_jobs.diffusion.families.text import LENGTHS, MASK, Pictures
from ray_jobs.diffusion.memory import Chunks, pictures_at_once
from ray_jobs.diffusion.objectives import per_row
from ray_jobs.diffusion.precision import cast, dtype_of
from ray_jobs.diffusion.protocols import Pipeline, Scheduler

PROMPT_BYTES = 1 << 30  # of embeddings that wait to be sampled
UNGUIDED = "this model is distilled and samples without guidance"


def seeded(seeds: Sequence[int]) -> list[torch.Generator]:
    """Return one generator per image, on the CPU, which gives the same numbers everywhere."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def initial_noise(generators: Sequence[torch.Generator], shape: tuple[int, ...]) -> torch.Tensor:
    """Return standard normal noise from one generator per image: an image depends on its own seed only.

    Args:
        generators: N, from `seeded`.
        shape: shape of an image's latents, C x ...

    Returns:
        float32, N x C x ..., on the CPU.
    """
    return torch.cat([torch.randn((1, *shape), generator=generator) for generator in generators])


def first_noise(
    family: Family,
    generators: Sequence[torch.Generator],
    shape: tuple[int, ...],
    *,
    is_controlled: bool = False,
) -> torch.Tensor:
    """Return the noise of pictures that begin with nothing else; arguments and result as of `initial_noise`.

    Some pipelines draw noise for the posterior of another picture before it, which is not used here: those of
    families that paint masks for the whole picture, and others for the control image.
    """
    if family.paints_masks or (is_controlled and family.draws_control_first):
        initial_noise(generators, family.codec.unpacked_shape(shape))
    return torch.cat([family.codec.noise(generator, shape) for generator in generators])


@torch.no_grad()
def null_captions(
    pipeline: Pipeline, device: str | torch.device | None = None, pictures: Pictures = ()
) -> Captions:
    """Return the denoiser's unconditional input, 1 x ..., as `Text.unconditional` defines it.

    Args:
        device: see `encode_texts`.
        pictures: reference pictures of N captions, for text encoders that see them; the result is N x ...
    """
    count = len(pictures[0]) if pictures else 1
    empty = encode_prompts(pipeline, [""] * count, negative=True, device=device, pictures=pictures)
    return family_of(pipeline).text.unconditional(pipeline.config, empty)


def whole_pictures(
    family: Family, count: int, height: int, width: int, device: str | torch.device = "cpu"
) -> Conditions:
    """Return the `picture_conditions` of N images that are neither scaled nor cropped."""
    if "sizes" not in family.picture_conditions:
        return {}
    sizes = torch.tensor([[height, width, 0, 0, height, width]], device=device)
    return {"sizes": sizes.expand(count, -1)}


@torch.no_grad()
def sample_latents(
    family: Family,
    model: Components,
    scheduler: Scheduler,
    noise: torch.Tensor,
    conditions: Conditions,
    null_captions: Captions | None,
    *,
    num_steps: int,
    guidance_scale: float | torch.Tensor,
    generators: Sequence[torch.Generator] = (),
) -> torch.Tensor:
    """Denoise with classifier-free guidance or, if the denoiser takes the scale as input, distilled guidance.

    Classifier-free guidance (Ho & Salimans, arXiv 2207.12598, eq. 6) runs both halves in one batch.

    Args:
        model: the denoising components, from `Family.model`.
        scheduler: any diffusers scheduler; it is copied, not changed.
        noise: float, N x C x ..., standard normal.
        conditions: the denoiser's conditions for N images, without guidance.
        null_captions: from `null_captions`, one, or N of images with references that text encoders see; not
            used with distilled guidance, or if every guidance scale is 1, which means no guidance.
        num_steps: number of denoising steps.
        guidance_scale: one scale, or a float tensor of N scales, one per image.
        generators: N, from which a scheduler that adds noise in each step draws it; empty: from torch's own.

    Returns:
        Denoised latents, N x C x ..., still in the denoiser's scale.
    """
    scheduler = deepcopy(scheduler)
    family.schedule.set_timesteps(scheduler, num_steps, noise.shape, noise.device)
    latents = noise * getattr(scheduler, "init_noise_sigma", 1.0)  # flow matching has no such scale
    scale = torch.as_tensor(guidance_scale, dtype=latents.dtype, device=latents.device).expand(len(noise))
    embedded = family.guidance_embedded(model[family.denoiser])
    guided = not embedded and bool((scale != 1).any())
    if embedded:
        conditions = conditions | {"guidance": scale}
    if guided:
        assert null_captions is not None
        null = {name: null_captions[name].expand_as(conditions[name]) for name in family.text.embeds}
        conditions = {name: torch.cat([null.get(name, each), each]) for name, each in conditions.items()}
    if MASK in conditions:
        conditions = conditions | {LENGTHS: conditions[MASK].sum(dim=1).cpu()}  # once, not in each step
    dtype = dtype_of(model[family.denoiser])
    conditions = {name: cast(each, dtype) for name, each in conditions.items()}
    draws = bool(generators) and "generator" in signature(scheduler.step).parameters
    options = {"generator": list(generators)} if draws else {}
    ends = [*scheduler.timesteps[1:], torch.zeros_like(scheduler.timesteps[0])]
    told_ends = family.takes_next_timestep(model[family.denoiser])
    for timestep, end in zip(scheduler.timesteps, ends, strict=True):
        inputs = torch.cat([latents, latents]) if guided else latents
        if hasattr(scheduler, "scale_model_input"):
            inputs = scheduler.scale_model_input(inputs, timestep)
        if told_ends:
            conditions = conditions | {NEXT_TIMESTEP: end.expand(len(inputs))}
        predicted = family.denoise(model, inputs.to(dtype), timestep.expand(len(inputs)), conditions)
        predicted = predicted.to(latents.dtype)
        if guided:
            unconditional, conditional = predicted.chunk(2)
            predicted = family.guide(unconditional, conditional, per_row(scale, latents))
        latents = scheduler.step(predicted, timestep, latents, return_dict=False, **options)[0]
    return latents


@torch.no_grad()
def decode_latents(pipeline: Pipeline, latents: torch.Tensor) -> torch.Tensor:
    """Decode the denoiser's latents to images: uint8, N x 3 x height x width, on the CPU.

    Large images are decoded in tiles, see `Codec.in_tiles`.
    """
    return family_of(pipeline).codec.pixels(pipeline.vae, latents)


@torch.no_grad()
def encode_pictures(pipeline: Pipeline, pixels: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Encode images to the denoiser's latents, drawn from the autoencoder's posterior.

    Large images are encoded in tiles, see `Codec.in_tiles`.

    Args:
        pixels: uint8, N x 3 x height x width.
        noise: float32, N x C x ..., standard normal, of the posterior's shape, on its device.
    """
    codec = family_of(pipeline).codec
    autoencoder = codec.in_tiles(pipeline.vae, *pixels.shape[-2:])
    pictures = pixels.to(noise.device, torch.float32) / 127.5 - 1
    return codec.sample(*codec.posterior(autoencoder, pictures), codec.scale(autoencoder), noise)


def cut_out(masked: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Split masked pictures into pictures that are grey where they are to be painted, and the mask.

    Args:
        masked: uint8, N x 4 x height x width: colours, and an alpha channel that is 0 where they are to be
            painted.

    Returns:
        float32, N x 3 x height x width, in [-1, 1], and bool, N x 1 x height x width.
    """
    colours, alpha = masked.split([3, 1], dim=1)
    mask = alpha == 0
    pictures = (colours.float() / 127.5 - 1).masked_fill(mask, 0.0)
    # As pipelines have them: on CPUs GroupNorm's results of what is constant depend on it.
    return pictures.contiguous(memory_format=torch.channels_last), mask


@torch.no_grad()
def encode_masked(pipeline: Pipeline, masked: torch.Tensor, noise: torch.Tensor) -> Conditions:
    """Return the conditions of a family that paints masks.

    As in diffusers' pipelines, the pictures' latents are drawn from the autoencoder's posterior.

    Args:
        masked: as for `cut_out`.
        noise: float32, N x C x ..., standard normal, of the posterior's shape, on the device to encode on.
    """
    codec = family_of(pipeline).codec
    pictures, mask = cut_out(masked.to(noise.device))
    autoencoder = codec.in_tiles(pipeline.vae, *masked.shape[-2:])
    latents = codec.sample(*codec.posterior(autoencoder, pictures), codec.scale(autoencoder), noise)
    return {MASKED: latents, MASK_PIXELS: mask}


@torch.no_grad()
def encode_references(
    pipeline: Pipeline, pixels: torch.Tensor, device: str | torch.device | None = None
) -> torch.Tensor:
    """Encode reference pictures as the denoiser receives them, without noise: float32, N x C x ...

    They are the mean of the autoencoder's posterior.

    Args:
        pixels: uint8, N x 3 x height x width, of any sizes that the model draws.
        device: device on which the autoencoder computes; None for that of its weights.
    """
    codec = family_of(pipeline).codec
    autoencoder = codec.in_tiles(pipeline.vae, *pixels.shape[-2:])
    pictures = pixels.to(device or autoencoder.device, torch.float32) / 127.5 - 1
    mean, _ = codec.posterior(autoencoder, pictures)
    return codec.normalised(mean, codec.scale(autoencoder))


def control_conditions(
    pipeline: Pipeline, pixels: torch.Tensor, device: str | torch.device | None = None
) -> Conditions:
    """Return the condition of what follows control images.

    Latents are the mean of the autoencoder's posterior, from which diffusers' pipelines draw.

    Args:
        pixels: uint8, N x 3 x height x width: control images, of the pictures' size.
        device: device on which the autoencoder computes; None for that of its weights.
    """
    if family_of(pipeline).control_form == "latents":
        pixels = pixels.contiguous(memory_format=torch.channels_last)  # as in `cut_out`
        return {CONTROL: encode_references(pipeline, pixels, device)}
    return {CONTROL: pixels.to(device or pipeline.vae.device, torch.float32) / 255}


@torch.no_grad()
def reconstructed(pipeline: Pipeline, pixels: torch.Tensor) -> torch.Tensor:
    """Pass images through the autoencoder, by the mean of its posterior: the best that the model can draw.

    They are encoded whole, as training pictures are, and decoded as drawn ones are.

    Args:
        pixels: uint8, N x 3 x height x width; so is the result, on the CPU.
    """
    codec, autoencoder = family_of(pipeline).codec, pipeline.vae
    mean, logvar = codec.posterior(autoencoder, pixels.to(autoencoder.device, torch.float32) / 127.5 - 1)
    latents = codec.sample(mean, logvar, codec.scale(autoencoder), torch.zeros_like(mean))
    return codec.pixels(autoencoder, latents)


def sample_pictures(
    pipeline: Pipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    shapes: Sequence[tuple[int, int]],
    num_steps: int,
    guidance_scale: float,
    batch_size: int,
    encoded: "Prompts | None" = None,
    references: Callable[[int], Sequence[torch.Tensor]] | None = None,
) -> Iterator[torch.Tensor]:
    """Yield the images of N prompts in batches: uint8, n x 3 x height x width, on the CPU.

    A batch has up to `batch_size` consecutive images of one shape, fewer where memory is too small for them
    or they are more than are decoded at once.

    Args:
        pipeline: pipeline from `load_pipeline`, with its autoencoder on the device to sample on.
        prompts, seeds, shapes: N of each, one per image; a shape is (height, width) in pixels.
        encoded: the pipeline's prompts; None: encode them where its text encoders are.
        references: function that returns the reference pictures of an image by its number, each uint8,
            3 x height x width; images of one shape have as many, of the same shapes. Of families that paint
            masks it is one, the masked picture, of 4 channels, as for `cut_out`; where control images
            are followed, the last one is that. None: there are none, all of the image is painted, and nothing
            is controlled.

    Raises:
        ValueError: guidance is on, and has no meaning for this model.
    """
    family = family_of(pipeline)
    if guidance_scale > 1 and not family.has_guidance(pipeline.config):
        raise ValueError(f"evaluate.guidance_scale: {guidance_scale:g}; {UNGUIDED}; set it to 1")
    encoded = encoded or Prompts(pipeline)
    device, sampled, decoded = pipeline.vae.device, Chunks(), Chunks()
    is_controlled = bool(references) and family.is_controlled(family.model(pipeline))

    def shown(numbers: range) -> list[torch.Tensor]:
        each = (references(number) for number in numbers) if references else ()
        return [torch.stack(pictures) for pictures in zip(*each, strict=True)]

    def sample(first: int, captions: Captions, null: Captions, numbers: range) -> torch.Tensor:
        batch, rows = slice(numbers.start, numbers.stop), slice(numbers.start - first, numbers.stop - first)
        height, width = shapes[batch.start]
        generators = seeded(seeds[batch])
        shape = family.codec.shape(pipeline.vae.config, height, width)
        noise = first_noise(family, generators, shape, is_controlled=is_controlled)
        given = whole_pictures(family, len(noise), height, width, device)
        pictures = shown(numbers)
        if family.paints_masks:
            further = initial_noise(generators, family.codec.unpacked_shape(shape))
            whole = torch.zeros((len(noise), 4, height, width), dtype=torch.uint8)
            masked = pictures.pop() if pictures else whole
            given |= encode_masked(pipeline, masked, further.to(device))
        if is_controlled:
            given |= control_conditions(pipeline, pictures.pop(), device)
        given |= {reference(n): encode_references(pipeline, each) for n, each in enumerate(pictures)}
        return sample_latents(
            family,
            family.model(pipeline),
            pipeline.scheduler,
            noise.to(device),
            {name: each[rows].to(device) for name, each in captions.items()} | given,
            {name: each[rows if len(each) > 1 else slice(1)].to(device) for name, each in null.items()},
            num_steps=num_steps,
            guidance_scale=guidance_scale,
            generators=generators,
        )

    batches = batches_of(shapes, batch_size)
    seen = references if family.text.sees_references else None
    texts = []
    for batch in batches:
        numbers = range(batch.start, batch.stop)
        digests = tuple(digest(seen(number)) for number in numbers) if seen else ()
        texts.append(PromptBatch(tuple(prompts[batch]), digests, partial(shown, numbers)))
    for number, batch in enumerate(batches):
        of_batch = partial(sample, batch.start, *encoded.of(texts[number:]))
        for latents in sampled.run(range(batch.start, batch.stop), of_batch):
            limit = pictures_at_once(*shapes[batch.start])
            yield from decoded.run(latents, partial(decode_latents, pipeline), limit)


@dataclass(frozen=True)
class PromptBatch:
    """Prompts that are encoded together.

    Attributes:
        digests: of each prompt's reference pictures, where text encoders see them; else none.
        pictures: function that returns these pictures.
    """

    prompts: tuple[str, ...]
    digests: tuple[bytes, ...] = ()
    pictures: Callable[[], Pictures] = field(default=tuple, compare=False)


class Prompts:
    """Embeddings of a pipeline's prompts, in the batches in which they are sampled.

    Args:
        device: device on which text encoders and denoisers take turns, so that it never holds both: many
            batches are encoded at a time, and wait on the host. None: nothing is moved.
        most: bytes of embeddings that wait.
    """

    def __init__(
        self, pipeline: Pipeline, device: str | torch.device | None = None, most: int = PROMPT_BYTES
    ) -> None:
        self.pipeline, self.device = pipeline, device
        self._most = most if device is not None else 0
        self._chunks, self._null = Chunks(), Captions()
        self._kept: dict[PromptBatch, Captions] = {}
        self._kept_nulls: dict[PromptBatch, Captions] = {}  # of batches with pictures

    def of(self, batches: Sequence[PromptBatch]) -> tuple[Captions, Captions]:
        """Return the embeddings of the first batch, N x ..., and the unconditional input, as of
        `null_captions`.

        Args:
            batches: prompts of this batch and of those after it. If it has to be encoded, so are as many of
                these as there is room for.
        """
        first = batches[0]
        if not self._null or first not in self._kept:
            if self.device is not None:
                place(self.pipeline, self.device, text_encoders=True)
            self._null = self._null or self._moved(null_captions(self.pipeline, self.device))
            if self._num_bytes >= self._most:
                self._kept, self._kept_nulls = {}, {}
            for batch in dict.fromkeys(batches):
                if batch not in self._kept and (batch == first or self._num_bytes < self._most):
                    self._encode(batch)
        if self.device is not None:
            place(self.pipeline, self.device, denoisers=True)
        return self._kept[first], self._kept_nulls.get(first, self._null)

    @property
    def _num_bytes(self) -> int:
        kept = (*self._kept.values(), *self._kept_nulls.values())
        return sum(tensor.nbytes for captions in kept for tensor in captions.values())

    def _encode(self, batch: PromptBatch) -> None:
        pictures = batch.pictures() if batch.digests else ()

        def shown(rows: range) -> Pictures:
            return [each[rows.start : rows.stop] for each in pictures]

        def encode(rows: range) -> Captions:
            prompts = list(batch.prompts[rows.start : rows.stop])
            return encode_prompts(self.pipeline, prompts, device=self.device, pictures=shown(rows))

        def encode_null(rows: range) -> Captions:
            return null_captions(self.pipeline, self.device, shown(rows))

        numbers = range(len(batch.prompts))
        self._kept[batch] = self._joined(self._chunks.run(numbers, encode))
        if batch.digests:
            self._kept_nulls[batch] = self._joined(self._chunks.run(numbers, encode_null))

    def _joined(self, parts: Sequence[Captions]) -> Captions:
        return self._moved({name: torch.cat([part[name] for part in parts]) for name in parts[0]})

    def _moved(self, captions: Captions) -> Captions:
        return captions if self.device is None else {name: each.cpu() for name, each in captions.items()}


def digest(pictures: Sequence[torch.Tensor]) -> bytes:
    """Return 16 bytes that tell the pictures of a prompt, each uint8, from others."""
    found = blake2b(digest_size=16)
    for picture in pictures:
        found.update(repr(tuple(picture.shape)).encode())
        found.update(picture.contiguous().cpu().numpy().tobytes())
    return found.digest()


def place(
    pipeline: Pipeline, device: str | torch.device, *, text_encoders: bool = False, denoisers: bool = False
) -> None:
    """Move a pipeline's text encoders and denoisers to a device, or away from it to the host.

    What leaves goes first, so that the device never holds more than it is asked to.
    """
    family, device, moved = family_of(pipeline), torch.device(device), False
    parts = [(text_encoders, part) for part in family.text.present(pipeline).values()]
    parts += [(denoisers, part) for part in family.model(pipeline).values()]
    for here, part in sorted(parts, key=itemgetter(0)):
        target = device if here else torch.device("cpu")
        if part.device.type != target.type:
            part.to(target)
            moved = True
    if moved and device.type == "cuda":
        torch.cuda.empty_cache()  # pieces of another size come next


def batches_of(shapes: Sequence[tuple[int, int]], batch_size: int) -> list[slice]:
    """Split a sequence of images into batches of up to `batch_size` consecutive images of one shape."""
    found, start = [], 0
    for end in range(1, len(shapes) + 1):
        if end == len(shapes) or shapes[end] != shapes[start] or end - start == batch_size:
            found.append(slice(start, end))
            start = end
    return found


def encode_prompts(
    pipeline: Pipeline,
    prompts: list[str],
    *,
    negative: bool = False,
    device: str | torch.device | None = None,
    pictures: Pictures = (),
) -> Captions:
    """Encode N prompts, or negative prompts, to the denoiser's inputs: N x ..., by name.

    Args:
        device, pictures: see `encode_texts`.
    """
    text = family_of(pipeline).text
    written = text.as_negative if negative else text.as_prompt
    return encode_texts(pipeline, [written(prompt) for prompt in prompts], device, pictures)


@torch.no_grad()
def encode_texts(
    pipeline: Pipeline,
    texts: list[str],
    device: str | torch.device | None = None,
    pictures: Pictures = (),
) -> Captions:
    """Encode N texts, from `Text.as_prompt` or `Text.as_negative`: N x ..., by name.

    Args:
        device: device of the text encoders; None for the pipeline's.
        pictures: reference pictures of the texts, for text encoders that see them.
    """
    text = family_of(pipeline).text
    tokens = text.tokenize_shown(pipeline, texts, pictures)
    placed = {name: ids.to(device or pipeline.device) for name, ids in tokens.items()}
    return text.embed(text.present(pipeline), placed)
