"""Build the model that a worker trains: the base, frozen and prepared as configured."""

import copy
from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cluster.fetched import local_path
from ray_jobs.config import Config, TrainConfig
from ray_jobs.config.space import ends
from ray_jobs.data.encoding.shapes import picture_shapes
from ray_jobs.diffusion.families import Family, family_of, pipelines_with
from ray_jobs.diffusion.families.control import CONTROLNET
from ray_jobs.diffusion.finetuning import ADAPTER, FineTuning, add_lora, choose_layers, set_dropout, train_all
from ray_jobs.diffusion.host_weights import HostWeights
from ray_jobs.diffusion.objectives import LossSettings, Objective
from ray_jobs.diffusion.pack import Pack, Trainable
from ray_jobs.diffusion.precision import PRECISIONS
from ray_jobs.diffusion.preference_tuning import REFERENCE, PreferenceTuning
from ray_jobs.diffusion.preferences import PreferenceSettings
from ray_jobs.diffusion.protocols import Component, Pipeline
from ray_jobs.diffusion.quantization import quantize
from ray_jobs.diffusion.recomputation import EveryNth, stacked_blocks
from ray_jobs.diffusion.schedulers import trained_scheduler
from ray_jobs.training.checkpoint import Export
from ray_jobs.training.engine import Engine
from ray_jobs.training.flat import Flat
from ray_jobs.training.phases import ever_trainable
from ray_jobs.training.zero import ZeRO, deepspeed_config
from ray_jobs.weights.assistant import add_assistant
from ray_jobs.weights.controlnets import given_folder, read_controlnet, save_controlnet
from ray_jobs.weights.model_files import UNUSED, check_weights, model_folder
from ray_jobs.weights.rotations import Rotations
from ray_jobs.weights.saving import save_lora, save_pipeline
from ray_jobs.weights.schedulers import SCHEDULER
from ray_jobs.weights.starting_adapter import add_starting_adapter, brought_layers

CPU = torch.device("cpu")
SPARE_COMPILATIONS = 4  # of a block's code beside one a shape: blocks may differ in what is trained of them


def loss_settings(config: TrainConfig) -> LossSettings:
    """Return the `LossSettings` that `train.loss` configures."""
    return LossSettings(**config.loss.model_dump(exclude={"zero_terminal_snr"}))


def build_model(config: Config, device: str = "cpu") -> tuple[Pipeline, FineTuning]:
    """Return the base pipeline and the module to train, which wraps its denoiser.

    Raises:
        ValueError: a setting does not suit the base model; the message names it.
    """
    pipeline, family = _load_base(config)
    return pipeline, finetuning(config, pipeline, family, device)


def _load_base(config: Config) -> tuple[Pipeline, Family]:
    """Return the base pipeline, without what a training does not need, and its family."""
    from ray_jobs.weights.loading import load_pipeline, read_index

    base, revision = local_path(config.model.base), config.model.revision
    family = family_of(read_index(base, revision)["_class_name"])
    # Captions are already encoded; a T5 would take ten gigabytes on each worker for nothing.
    without = () if config.train.train_text_encoder else family.text.encoders
    without = (*without, *family.helpers)
    # What is trained, or copied to be, begins in fp32, as the engine updates it; a frozen base is read as it
    # is used.
    dtype = PRECISIONS[config.train.precision if config.train.method == "lora" else "fp32"]
    pipeline = load_pipeline(
        base, revision=revision, without=without, dtype=dtype, quantization=config.model.quantize
    )
    return pipeline, family


def finetuning(config: Config, pipeline: Pipeline, family: Family, device: str = "cpu") -> FineTuning:
    """Return the module to train over a pipeline's components, ready for an engine.

    Raises:
        ValueError: a setting does not suit the base model; the message names it.
    """
    model, parts = _choose_trained(config, pipeline, family, device)
    _finish(model, parts, config)
    return model


def _finish(model: FineTuning, parts: Mapping[str, Any], config: Config) -> None:
    """Apply what is left to a model whose trained parameters are chosen."""
    if config.train.offload_base:
        model.host_weights = HostWeights(model.blocks())  # before recomputation: some families wrap blocks
    _prepare({**parts, **model.model}, set(model.model), model.family, config)
    model.train()
    for part in model.text_encoders.values():
        part.train(any(parameter.requires_grad for parameter in part.parameters()))


# Settings whose values decide whether a model can be trained at all.
CHECKED = (
    *("train.method", "train.lora", "train.loss", "train.groups", "train.trainable", "train.stages"),
    *("train.dropout", "train.preference"),
)


def check_settings(config: Config) -> tuple[Family, Any]:
    """Check that `build_model` would accept the settings, without allocating memory for weights.

    A search is checked for every value of those settings that a base model may reject.

    Returns:
        The base's family, and an object with its scheduler, denoiser and text encoders as attributes.

    Raises:
        ValueError: a setting does not suit the base model; the message names it.
    """
    check_weights(local_path(config.model.base), revision=config.model.revision)
    checked = _check_settings(config)
    for name, values in config.search.space.items():
        for value in ends(values) if name.startswith((*CHECKED, "train.train_text_encoder")) else []:
            try:
                _check_settings(config.with_settings({name: value}))
            except ValueError as error:
                raise ValueError(f"search.space.{name}: {value!r}: {error}") from None
    return checked


def _check_settings(config: Config) -> tuple[Family, Any]:
    family, pipeline, _ = _empty(config)
    deepspeed_config(config.train, config.train.min_workers)
    return family, pipeline


def empty_finetuning(config: Config) -> FineTuning:
    """Return the module that `build_model` returns, on the meta device: without memory for weights.

    Raises:
        ValueError: a setting does not suit the base model; the message names it.
    """
    return _empty(config)[2]


def _empty(config: Config) -> tuple[Family, Any, FineTuning]:
    from accelerate import init_empty_weights

    from ray_jobs.weights.loading import empty_model, read_index

    base, revision = local_path(config.model.base), config.model.revision
    family = family_of(read_index(base, revision)["_class_name"])
    pipeline = empty_model(base, (*family.denoisers, *family.text.encoders), revision=revision)
    if config.model.quantize:
        for name in family.denoisers:
            quantize(getattr(pipeline, name), config.model.quantize)
    with init_empty_weights():
        model, _ = _choose_trained(config, pipeline, family, "cpu")
    return family, pipeline, model


def _choose_trained(
    config: Config, pipeline: Pipeline, family: Family, device: str
) -> tuple[FineTuning, dict[str, Any]]:
    """Return the module to train and the pipeline's components that it trains, by name."""
    train = config.train
    objective, settings = _objective(config, pipeline, family)
    if train.method == "controlnet":
        pipeline.controlnet = begun_controlnet(config, pipeline, family)
    add_channels(config, pipeline, family)
    parts = {name: getattr(pipeline, name) for name in trained_names(family, train)}
    if train.method == "lora":
        if train.preference and config.model.adapter:  # first: it freezes what is there
            add_starting_adapter(parts, family, config, REFERENCE, dropout=0.0)
        _add_adapters(config, parts, family, ADAPTER)
    else:
        for name, part in parts.items():
            train_all(part, _unused_layers(name, part, family, config))
            if train.dropout and name in family.denoisers:
                if not family.has_dropout:
                    kind = type(part).__name__
                    raise ValueError(
                        f"train.dropout: {kind} has no dropout layers that it uses; leave it out"
                    )
                set_dropout(part, train.dropout)
    if config.model.assistant:  # last: it draws from the generator
        add_assistant({name: parts[name] for name in family.denoisers}, family, config.model)
    build = PreferenceTuning if train.preference else FineTuning
    model = build(
        pipeline,
        family,
        objective.to(device),
        settings,
        text_encoders_trained=train.train_text_encoder,
        channels_last=train.channels_last,
    )
    if isinstance(model, PreferenceTuning) and train.preference:
        model.preference = PreferenceSettings(train.preference.loss, train.preference.beta)
    _remember_trained(model, config)
    return model, parts


def _unused_layers(name: str, part: Component, family: Family, config: Config) -> tuple[str, ...]:
    """Return the names of a component's layers that do not reach the prediction."""
    if name in family.denoisers:
        return family.unused_layers(part, config.data.num_references)
    return family.control.unused_layers(part) if family.control and name == CONTROLNET else ()


def begun_controlnet(config: Config, pipeline: Pipeline, family: Family) -> Component:
    """Return the ControlNet to train: that of `model.controlnet`, or a copy of the base's first blocks.

    Raises:
        ValueError: there are none of the base's family, or it does not suit the base.
    """
    control, model, layers = family.control, config.model, config.train.controlnet_layers
    if control is None:
        raise ValueError(
            f"train.method: controlnet: {family.pipeline_class} has no ControlNets here, only "
            f"{pipelines_with('control')}; choose one of these"
        )
    denoiser = getattr(pipeline, family.denoiser)
    if not model.controlnet:
        torch.manual_seed(config.seed)  # for what is new in it
        try:
            return control.network(denoiser, layers)
        except ValueError as error:
            raise ValueError(f"train.controlnet_layers: {error}") from None
    if layers:
        raise ValueError(f"train.controlnet_layers: {layers}: model.controlnet decides it; leave it out")
    is_empty = next(denoiser.parameters()).device.type == "meta"
    return read_controlnet(given_folder(model), control, denoiser, empty=is_empty)


def add_channels(config: Config, pipeline: Pipeline, family: Family) -> None:
    """Give the denoiser input channels for control images, if an adapter is to follow them.

    Raises:
        ValueError: adapters of the base's family cannot.
    """
    if config.train.method != "lora" or not config.data.has_control:
        return
    if family.control_channels is None:
        raise ValueError(
            f"train.method: lora: adapters of {family.pipeline_class} follow no control images, only those "
            f"of {pipelines_with('control_channels')}; choose one of these, or train.method: controlnet"
        )
    family.control_channels.add_to(getattr(pipeline, family.denoiser))


def _objective(config: Config, pipeline: Pipeline, family: Family) -> tuple[Objective, LossSettings]:
    """Return the training objective and its settings.

    Raises:
        ValueError: a setting does not suit the base model; the message names it.
    """
    settings = loss_settings(config.train)
    objective = family.schedule.objective(
        pipeline.scheduler.config, zero_terminal_snr=config.train.loss.zero_terminal_snr
    )
    objective.check(settings)
    return objective, settings


def _add_adapters(config: Config, parts: Mapping[str, Any], family: Family, adapter: str) -> None:
    """Add an adapter to each trained component, and freeze all else."""
    if config.model.adapter:
        add_starting_adapter(parts, family, config, adapter)
        return
    settings = config.train.lora.model_dump(exclude={"target_modules"})
    torch.manual_seed(config.seed)  # for the adapters' initial values
    for name, part in parts.items():
        denoises = name in family.denoisers
        chosen = config.train.lora.target_modules if denoises else None
        unused = _unused_layers(name, part, family, config)
        layers = list(chosen or family.trainable[name])
        layers += brought_layers(config, family) if denoises else []
        try:
            add_lora(part, target_modules=layers, unused=unused, adapter=adapter, **settings)
        except ValueError as error:
            raise ValueError(f"train.lora: {name}: {error}") from None


def _remember_trained(model: Trainable, config: Config) -> None:
    """Freeze what no stage of the run trains, and record the rest."""
    chosen = ever_trainable(config.train)
    choose_layers(model, config.train.groups, chosen)
    model.remember_trained(config.train.groups)


def build_pack(configs: Sequence[Config], device: str = "cpu") -> tuple[Pipeline, Pack]:
    """Return the base pipeline and a pack with one member for each configuration, in that order.

    Args:
        configs: differ in nothing but what `PACKABLE` names.

    Raises:
        ValueError: a setting does not suit the base model; the message names it.
    """
    pipeline, family = _load_base(configs[0])
    return pipeline, packed_finetuning(configs, pipeline, family, device)


def packed_finetuning(
    configs: Sequence[Config], pipeline: Pipeline, family: Family, device: str = "cpu"
) -> Pack:
    """Return a pack over a pipeline's components, ready for engines, see `build_pack`.

    Raises:
        ValueError: a setting does not suit the base model; the message names it.
    """
    first = configs[0]
    add_channels(first, pipeline, family)
    parts = {name: getattr(pipeline, name) for name in trained_names(family, first.train)}
    names = [f"member_{number}" for number in range(len(configs))]
    for name, config in zip(names, configs, strict=True):
        _add_adapters(config, parts, family, name)
    model = FineTuning(
        pipeline,
        family,
        *_objective(first, pipeline, family),
        text_encoders_trained=first.train.train_text_encoder,
        channels_last=first.train.channels_last,
    )
    pack = Pack(model)
    for name, config in zip(names, configs, strict=True):
        objective, settings = _objective(config, pipeline, family)
        member = pack.add(name, objective.to(device), settings)
        for parameter in member.parameters():  # peft lets only the last adapter require gradients
            parameter.requires_grad_(True)
        _remember_trained(member, config)
    _finish(model, parts, first)
    return pack


def trained_names(family: Family, train: TrainConfig) -> tuple[str, ...]:
    """Return the components that are trained.

    Raises:
        ValueError: the family has no text encoder that can be trained, and `train` asks for it.
    """
    if train.method == "controlnet":
        return (CONTROLNET,)
    if not train.train_text_encoder:
        return family.denoisers
    if not family.trainable_encoders:
        raise ValueError(
            f"train.train_text_encoder: {family.pipeline_class} has no text encoder that can be trained; "
            "turn it off"
        )
    return tuple(family.trainable)


def _prepare(parts: Mapping[str, Any], denoising: Set[str], family: Family, config: Config) -> None:
    """Turn on the configured options that affect only speed and memory.

    Args:
        denoising: names of the parts that are called in each denoising step.
    """
    train = config.train
    for name, part in parts.items():
        denoises = name in denoising
        if train.gradient_checkpointing and denoises:
            family.enable_gradient_checkpointing(part, EveryNth(train.checkpoint_every))
        elif train.gradient_checkpointing:
            part.gradient_checkpointing_enable()
        if train.compile and denoises:
            _compile(part, family, len(picture_shapes(config)) if config.data.buckets else 1)


def _compile(denoiser: nn.Module, family: Family, num_shapes: int) -> None:
    """Compile a denoiser for each shape of pictures; but a whole UNet, which takes minutes, once for many."""
    dynamo = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, num_shapes + SPARE_COMPILATIONS)
    if family.is_unet:
        denoiser.compile(dynamic=None if num_shapes > 1 else False)
        return
    for block in stacked_blocks(denoiser):
        block.compile(dynamic=False)


def build_engine(
    model: FineTuning, config: TrainConfig, world_size: int, device: torch.device = CPU
) -> Engine:
    """Return an engine over the model's trained parameters; it uses Ray Train's process group."""
    build: Callable[..., Engine] = Flat if config.flat else ZeRO
    engine = build(model, config, world_size, device)
    if isinstance(model, PreferenceTuning) and world_size > 1:
        model.summed = summed_over_workers
    _lay_out(model, config)
    if model.host_weights is not None:
        model.host_weights.hold((parameter for _, parameter in model.all_trained), device)
    return engine


def summed_over_workers(values: torch.Tensor) -> torch.Tensor:
    """Return the sum of a tensor over all workers, on each of them."""
    torch.distributed.all_reduce(values)
    return values


def _lay_out(model: FineTuning, config: TrainConfig) -> None:
    """Give frozen convolutions the configured layout; only after an engine, which flattens and broadcasts."""
    if config.channels_last:
        for parameter in model.parameters():
            if not parameter.requires_grad and parameter.dim() == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)


def build_engines(
    pack: Pack, configs: Sequence[Config], world_size: int, device: torch.device = CPU
) -> list[Flat]:
    """Return an engine over the trained parameters of each member of a pack, in the order of `configs`."""
    members, model, train = list(pack.members.values()), pack.model, configs[0].train
    engines = [
        # The backward pass reaches the members in no certain order.
        Flat(member, config.train, world_size, device, overlaps=False)
        for member, config in zip(members, configs, strict=True)
    ]
    # Only now: the engines' fp32 weights must not have been rounded.
    model.all_trained = [pair for member in members for pair in member.all_trained]
    model.move(device)
    model.cast(PRECISIONS[train.precision])
    _lay_out(model, train)
    if model.host_weights is not None:
        model.host_weights.hold((parameter for _, parameter in model.all_trained), device)
    return engines


def exporter(config: Config, pipeline: Pipeline, model: Trainable, rank: int) -> Export:
    """Return a function that writes trained weights in diffusers' format on rank 0 while training continues.

    Call this before the engine is built, which may shard the pipeline's weights.
    """
    scheduler = trained_scheduler(pipeline.scheduler) if config.train.loss.zero_terminal_snr else None
    if config.train.makes_adapter:

        def export(weights: Mapping[str, torch.Tensor], folder: Path) -> None:
            save_lora(pipeline, model, weights, folder)
            if scheduler is not None:
                scheduler.save_pretrained(folder / SCHEDULER)

        return export
    if config.train.method == "lora":
        rotations, model_config = Rotations(model), config.model
        place, revision = local_path(model_config.base), model_config.revision
        return lambda weights, folder: rotations.save(weights, place, folder, revision, scheduler)
    # Separate fp32 copies: the components in training change meanwhile.
    if config.train.method == "controlnet":
        prefix, network = model.components[CONTROLNET]
        kept = copy.deepcopy(network) if rank == 0 else network
        return lambda weights, folder: save_controlnet(kept, prefix, weights, folder, scheduler)
    own = copy.deepcopy(model.components) if rank == 0 else {}
    base = model_folder(local_path(config.model.base), revision=config.model.revision, without=UNUSED)
    return lambda weights, folder: save_pipeline(base, own, weights, folder, scheduler)
