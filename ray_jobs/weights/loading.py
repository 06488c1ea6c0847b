"""Load a text-to-image model in diffusers' format, with or without fine-tuned weights."""

import importlib
from collections.abc import Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import torch

from ray_jobs.diffusion.families import FAMILIES, family_of
from ray_jobs.diffusion.families.text import Text
from ray_jobs.diffusion.families.text_processor import picture_processor, text_processor
from ray_jobs.diffusion.precision import to_precision
from ray_jobs.diffusion.protocols import Component, Pipeline
from ray_jobs.diffusion.quantization import cast_weights, copy_unrounded, is_quantized, quantize
from ray_jobs.weights.adapter_files import place_tensors, read_adapter_file, unscaled
from ray_jobs.weights.controlnets import controlled, controlnet_folder
from ray_jobs.weights.model_files import UNUSED, model_folder, require_own_layers, variants
from ray_jobs.weights.model_index import (
    INDEX,
    MODULAR_INDEX,
    NEVER_LOADED,
    SAFETY_CHECKER,
    index_path,
    is_modular,
    model_index,
)
from ray_jobs.weights.modular import assembled, default_scheduler
from ray_jobs.weights.schedulers import has_scheduler, load_scheduler
from ray_jobs.weights.weight_files import plain_name

LORA_WEIGHTS = "pytorch_lora_weights.safetensors"
PROCESSOR = "processor"  # component of texts and images, in pipelines without a tokenizer


def load_pipeline(
    base: str,
    weights: str | Path | None = None,
    *,
    revision: str | None = None,
    without: Sequence[str] = (),
    dtype: torch.dtype = torch.float32,
    quantization: str | None = None,
    text_quantization: str | None = None,
) -> Pipeline:
    """Load a pipeline on the CPU, frozen and in evaluation mode.

    Args:
        base: folder or hub name of the base model.
        weights: folder with either LoRA weights (`pytorch_lora_weights.safetensors`) or a ControlNet, which
            are added to the base, together with a scheduler in the same folder if there is one; or a whole
            pipeline (with an index, see `model_index`), which replaces the base.
        revision: revision of the base on the hub.
        without: components that are not loaded.
        dtype: see `read_pipeline`.
        quantization: see `read_pipeline`; of the base's denoiser only.
        text_quantization: see `read_pipeline`.

    Raises:
        ValueError: `weights` is neither, or the model belongs to no known family.
    """
    whole = bool(weights and index_path(Path(weights)))
    pipeline = read_pipeline(
        str(weights) if whole else base,
        revision=None if whole else revision,
        without=without,
        dtype=dtype,
        quantization=None if whole else quantization,
        text_quantization=text_quantization,
    )
    pipeline.set_progress_bar_config(disable=True)
    if weights and not whole:
        if network := controlnet_folder(weights):
            pipeline = controlled(pipeline, network, dtype=dtype)
        elif (Path(weights) / LORA_WEIGHTS).exists():
            load_lora(pipeline, Path(weights))
        else:
            raise ValueError(f"{weights}: contains neither {LORA_WEIGHTS} nor {INDEX} nor {MODULAR_INDEX}")
        if has_scheduler(Path(weights)):
            pipeline.scheduler = load_scheduler(Path(weights))
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False).eval()
    return pipeline


def read_pipeline(
    base: str,
    *,
    revision: str | None = None,
    without: Sequence[str] = (),
    dtype: torch.dtype = torch.float32,
    quantization: str | None = None,
    text_quantization: str | None = None,
) -> Pipeline:
    """Load a model's pipeline as diffusers builds it; a modular one without the block that rewrites prompts.

    Each component is loaded from its plain weights if present, else from a variant such as fp16.

    Args:
        base: folder or hub name.
        without: components that are not loaded, in addition to those of `NEVER_LOADED` (the safety checker
            and the IP-Adapter's image encoder).
        dtype: of the denoiser, whose files are read straight into it. In bf16 the text encoders have it too,
            and the autoencoder unless its configuration has `force_upcast`; all these are float32 with
            fp16, in which several overflow.
        quantization: one of `quantization.FORMATS`, in which the denoiser is stored; None: plain. It is
            rounded from the files' own dtype, so that it is the same whatever `dtype` is.
        text_quantization: the same for the text encoders.

    Raises:
        ValueError: the model belongs to no known family, or a component's weights are in no supported format.
    """
    without = [*NEVER_LOADED, *without]
    family = family_of(read_index(base, revision)["_class_name"])
    # Absolute: with "." and a subfolder, transformers 5.23 looks for some files beside the subfolder.
    folder = model_folder(base, revision=revision, without=[*UNUSED, *without]).absolute()
    require_own_layers(base, folder)
    index = read_index(str(folder))
    options = left_out(index, without)
    dtypes, chosen = dtypes_of(folder, index, dtype), variants(folder)
    formats = dict.fromkeys(family.networks, quantization)
    formats |= dict.fromkeys(family.text.encoders, text_quantization)
    loaded = (chosen.keys() & index.keys()) - options.keys()
    modular = is_modular(index)
    rounded = {name: each for name, each in formats.items() if each and name in loaded}
    computed_in = {name: dtypes.get(name, dtypes["default"]) for name in loaded}
    for name, variant in chosen.items():
        if name not in loaded or not isinstance(index[name], list):
            continue
        if modular and _reads_texts(name):
            options[name] = _tokenizer(index, str(folder), name)
        elif modular and not issubclass(kind := class_of(index[name]), torch.nn.Module):
            options[name] = kind.from_pretrained(str(folder), subfolder=name)
        elif modular or variant or name in rounded:
            kind = class_of(index[name])
            part = options[name] = kind.from_pretrained(
                str(folder),
                subfolder=name,
                variant=variant,
                dtype=_stored_dtype(folder / name, variant) if name in rounded else computed_in[name],
                use_safetensors=True,
            )
            if name in rounded:
                copy_unrounded(part)
                quantize(part, rounded[name])
    pipeline = assembled(folder, index, options) if modular else _classic(folder, index, options, dtypes)
    family.loaded(pipeline)
    for name in rounded:
        cast = to_precision if name in family.networks else cast_weights
        cast(getattr(pipeline, name), computed_in[name])
    return pipeline


def _classic(
    folder: Path, index: Mapping[str, Any], options: dict[str, Any], dtypes: Mapping[str, torch.dtype]
) -> Any:
    """Load a pipeline that is not modular.

    Args:
        options: components that are loaded already, and those that are not loaded, as None.
        dtypes: from `dtypes_of`.
    """
    from diffusers import DiffusionPipeline

    processors = [name for name, entry in index.items() if "tokenizer" in name and _is_processor(entry)]
    options |= dict.fromkeys(processors)  # diffusers would import them
    if _is_processor(index.get(PROCESSOR)):
        options[PROCESSOR] = _tokenizer(index, str(folder), PROCESSOR)
    if SAFETY_CHECKER in index:
        options["requires_safety_checker"] = False
    pipeline = DiffusionPipeline.from_pretrained(str(folder), dtype=dtypes, use_safetensors=True, **options)
    pipeline.register_modules(**{name: _tokenizer(index, str(folder), name) for name in processors})
    return pipeline


def _stored_dtype(folder: Path, variant: str | None) -> torch.dtype:
    """Return the dtype of a component's files."""
    return dtype_of(
        next(path for path in sorted(folder.glob("*.safetensors")) if plain_name(path.name, variant))
    )


def dtype_of(path: Path) -> torch.dtype:
    """Return the dtype of the first matrix in a safetensors file."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        slices = (file.get_slice(key) for key in file.keys())  # noqa: SIM118
        name = next((each.get_dtype() for each in slices if len(each.get_shape()) > 1), "F32")
    return {"BF16": torch.bfloat16, "F16": torch.float16}.get(name, torch.float32)


def dtypes_of(folder: Path, index: Mapping[str, Any], dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Return the dtypes in which a model's components are loaded by name, and `default` for all others.

    Args:
        folder, index: the model's.
        dtype: as for `read_pipeline`.
    """
    others = dtype if dtype == torch.bfloat16 else torch.float32
    found = {"default": others, "vae": torch.float32 if _upcast(folder, index) else others}
    return found | dict.fromkeys(family_of(index["_class_name"]).networks, dtype)


def _upcast(folder: Path, index: Mapping[str, Any]) -> bool:
    """Return True if the autoencoder's configuration, or its class by default, has `force_upcast`."""
    if index.get("vae", [None])[0] is None:
        return False
    kind = class_of(index["vae"])
    default = signature(kind.__init__).parameters.get("force_upcast")
    settings = kind.load_config(str(folder), subfolder="vae")
    return bool(settings.get("force_upcast", default is not None and default.default))


def class_of(entry: Sequence[str]) -> Any:
    """Return a component's class, given its library and name in the model's index."""
    library, class_name = entry
    return getattr(importlib.import_module(library), class_name)


def empty_model(base: str, parts: Sequence[str], *, revision: str | None = None) -> Any:
    """Return an object with a model's configuration, scheduler and named parts, without allocating weights.

    As from `load_pipeline`, the parts are frozen and in evaluation mode.

    Args:
        parts: names of components with weights. Those that the model leaves out are None in the result.
    """
    from types import SimpleNamespace

    from accelerate import init_empty_weights
    from diffusers import ModelMixin

    index = read_index(base, revision)
    found: Any = SimpleNamespace(config=index)
    folder = str(model_folder(base, revision=revision))
    for name in ("scheduler", *parts):
        entry = index.get(name, (None, None))
        if name == "scheduler" and name not in index and is_modular(index):
            found.scheduler = default_scheduler(index)
            continue
        if entry[0] is None:
            setattr(found, name, None)
            continue
        kind = class_of(entry)
        if name == "scheduler":
            found.scheduler = kind.from_pretrained(folder, subfolder=name)
            continue
        with init_empty_weights():
            if issubclass(kind, ModelMixin):
                part = kind.from_config(kind.load_config(folder, subfolder=name))
            else:
                part = kind(kind.config_class.from_pretrained(folder, subfolder=name))
        if not issubclass(kind, ModelMixin):
            part.tie_weights()  # without memory, shared parameters are created separately
        setattr(found, name, part.requires_grad_(False).eval())
    if index["_class_name"] in FAMILIES:
        FAMILIES[index["_class_name"]].loaded(found)
    return found


def has_processor(base: str, *, revision: str | None = None) -> bool:
    """Return whether plain diffusers loads a processor of images with a model, which needs torchvision."""
    index = read_index(base, revision)
    return any(_is_processor(entry) for name, entry in index.items() if _reads_texts(name))


def _reads_texts(name: str) -> bool:
    return "tokenizer" in name or name == PROCESSOR


def _is_processor(entry: Any) -> bool:
    return isinstance(entry, list) and str(entry[1]).endswith("Processor")


def _tokenizer(index: Mapping[str, Any], base: str, name: str, revision: str | None = None) -> Any:
    """Load a tokenizer; of a processor what reads texts, and pictures only where text encoders see them.

    Its other parts would need torchvision.
    """
    from transformers import AutoImageProcessor, AutoTokenizer

    entry, sees_pictures = index[name], family_of(index["_class_name"]).text.sees_references

    kind = AutoTokenizer if _is_processor(entry) else class_of(entry)
    tokenizer = kind.from_pretrained(base, subfolder=name, revision=revision)
    if name != PROCESSOR:
        return tokenizer
    if not sees_pictures:
        return text_processor(class_of(entry), tokenizer)
    options = {"subfolder": name, "revision": revision, "backend": "pil"}
    pictures = AutoImageProcessor.from_pretrained(base, trust_remote_code=False, **options)
    return picture_processor(class_of(entry), pictures, tokenizer)


def load_tokenizers(base: str, *, revision: str | None = None) -> Any:
    """Return an object with a model's tokenizers as attributes; nothing else is loaded."""
    from types import SimpleNamespace

    index = read_index(base, revision)
    entries = {name: entry for name, entry in index.items() if _reads_texts(name)}
    return SimpleNamespace(
        **{
            name: _tokenizer(index, base, name, revision)
            for name, entry in entries.items()
            if entry != [None, None]
        }
    )


def load_text(base: str, *, revision: str | None = None) -> tuple[Text, Any]:
    """Return how a model's family reads texts, and the model's tokenizers (`load_tokenizers`)."""
    family = family_of(read_index(base, revision)["_class_name"])
    return family.text, load_tokenizers(base, revision=revision)


def read_index(base: str, revision: str | None = None) -> dict[str, Any]:
    """Read the index of a folder or hub name: the pipeline's class and its components (`model_index`)."""
    return model_index(model_folder(base, revision=revision))


def left_out(index: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Map the named components, and those that the model leaves out, to None for `from_pretrained`."""
    return {name: None for name, entry in index.items() if name in names or entry == [None, None]}


def load_lora(pipeline: Pipeline, folder: Path) -> None:
    """Add the adapters in a folder to a pipeline that has none, with dropout inactive.

    Raises:
        ValueError: the file is not an adapter of a base, or its layers do not all fit the pipeline; diffusers
            would skip those that do not.
    """
    path = folder / LORA_WEIGHTS
    tensors, settings = read_adapter_file(path)
    parts = family_of(pipeline).adaptable(pipeline)
    add_control_channels(pipeline, tensors)
    if _has_lora_loader(pipeline):
        pipeline.load_lora_weights(str(folder), weight_name=LORA_WEIGHTS)
    else:
        _inject(parts, tensors, settings)
    for part in parts.values():
        part.eval()  # peft creates adapters in training mode
    # An alpha is a scale, not a layer; diffusers' files keep it in their metadata.
    stored = sum(not name.endswith("alpha") for name in tensors)
    placed, parameters = place_tensors(parts, tensors)
    if not placed == stored == parameters:
        unload_lora(pipeline)
        raise ValueError(
            f"{path}: {placed} of {stored} tensors fit the base model, which has {parameters} places; it "
            "was trained on another base, or diffusers does not read its names of layers"
        )


def unload_lora(pipeline: Pipeline) -> None:
    """Remove the adapters that `load_lora` added, and the input channels that they brought."""
    from diffusers.utils import recurse_remove_peft_layers

    family = family_of(pipeline)
    if _has_lora_loader(pipeline):
        pipeline.unload_lora_weights()
    else:
        for part in family.adaptable(pipeline).values():
            if hasattr(part, "peft_config"):
                recurse_remove_peft_layers(part)
                del part.peft_config
    if family.control_channels:
        family.control_channels.take_from(getattr(pipeline, family.denoiser))


def add_control_channels(pipeline: Pipeline, tensors: Mapping[str, torch.Tensor]) -> None:
    """Give a pipeline's denoiser the input channels for control images that an adapter's tensors need."""
    family = family_of(pipeline)
    if family.control_channels is None:
        return
    denoiser, prefix = getattr(pipeline, family.denoiser), f"{family.denoiser}."
    shapes = {name.removeprefix(prefix): each.shape for name, each in tensors.items()}
    if family.control_channels.fit(denoiser, shapes):
        family.control_channels.add_to(denoiser)


def _has_lora_loader(pipeline: Pipeline) -> bool:
    """Return whether diffusers loads adapters onto this pipeline: FLUX's loader reads the base's weights."""
    family = family_of(pipeline)
    return family.has_lora_loader and not is_quantized(getattr(pipeline, family.denoiser))


def _inject(
    parts: Mapping[str, Component], tensors: Mapping[str, torch.Tensor], settings: Mapping[str, Any]
) -> None:
    """Add adapters as diffusers' loader does: with a file's settings, or else at the scale 1.

    Args:
        parts: components by name.
        tensors, settings: the file's, by `<component>.<layer>` and `<component>.<setting>`.
    """
    from peft import LoraConfig, inject_adapter_in_model

    for name, part in parts.items():
        prefix = f"{name}."
        stored = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
        own = {key.removeprefix(prefix): value for key, value in settings.items() if key.startswith(prefix)}
        ends = "lora_B.weight"
        ranks = {key.partition(".lora_")[0]: t.shape[1] for key, t in stored.items() if key.endswith(ends)}
        if ranks:
            own = own or unscaled(ranks)
            layers = sorted({key.partition(".lora_")[0] for key in stored})
            inject_adapter_in_model(LoraConfig(**own | {"target_modules": layers}), part)
