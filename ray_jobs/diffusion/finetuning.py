"""The trained part of a text-to-image model: LoRA adapters or all weights."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from ray_jobs.diffusion.families import Components, Conditions, Family
from ray_jobs.diffusion.host_weights import HostWeights
from ray_jobs.diffusion.objectives import Draws, LossSettings, Objective, denoising_loss, per_row
from ray_jobs.diffusion.precision import cast, dtype_of, to_precision
from ray_jobs.diffusion.protocols import Component, Denoiser, Pipeline

if TYPE_CHECKING:
    from peft import PeftConfig

OTHER = "other"  # the group of all parameters that no named group matches
ADAPTER = "default"  # the name of a single adapter in peft, and of any adapter in the names of checkpoints


class Adapted(Protocol):
    """A model in training, or one adapter of a pack of them (pack.py)."""

    def trained(self) -> Iterator[tuple[str, nn.Parameter]]: ...


class FineTuning(nn.Module):
    """The denoising components with their loss, plus the text encoders if they are trained too.

    The engine wraps this module.

    Args:
        pipeline: pipeline from `load_pipeline`.
        family: the pipeline's family.
        objective: training objective, on the same device as the module will be.
        text_encoders_trained: take captions as tokens instead of embeddings.
        channels_last: use this memory layout for the denoiser's inputs. Trained weights keep the default
            layout, because engines flatten them.

    Attributes:
        adapter: name of its adapter in peft, with method lora.
        host_weights: keeper of the frozen weights of the denoiser's blocks; None if they are on the device.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        family: Family,
        objective: Objective,
        settings: LossSettings,
        *,
        text_encoders_trained: bool = False,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        self.family, self.objective, self.settings = family, objective, settings
        self.pipeline_config = dict(pipeline.config)
        first, *others = (each for each in family.model(pipeline).items() if each[0] not in family.helpers)
        self.denoiser: Denoiser = first[1]
        self.further_denoisers: Any = nn.ModuleDict(dict(others))
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        self.text_encoders: Any = nn.ModuleDict(
            family.text.present(pipeline) if text_encoders_trained else {}
        )
        self.adapter = ADAPTER
        self.host_weights: HostWeights | None = None
        self.all_trained: list[tuple[str, nn.Parameter]] = []
        self.layer_groups: dict[str, dict[str, nn.Parameter]] = {}

    def forward(
        self,
        latents: torch.Tensor,
        conditions: Conditions,
        draws: Draws,
        dropped: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the losses of N images: float32, N.

        Args:
            latents: float32, N x C x ..., as the denoiser receives them.
            conditions: the denoiser's conditions; tokens in place of embeddings where the text encoders are
                trained.
            dropped: bool, N: the images to train without a caption; their captions must be the empty one.
                None if there are none.
            mask: as for `objectives.add_noise`.
        """

        def denoise(noisy: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
            return self.predict(noisy, timesteps, conditions, dropped)

        return denoising_loss(denoise, self.objective, latents, draws, self.settings, mask)

    def predict(
        self,
        noisy: torch.Tensor,
        timesteps: torch.Tensor,
        conditions: Conditions,
        dropped: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the denoiser's prediction: float32, of the latents' shape.

        Args:
            noisy: float32, N x C x ....
            conditions, dropped: as `forward` takes them.
        """
        if self.text_encoders:
            conditions = conditions | self.family.text.embed(self.text_encoders, conditions)
        if dropped is not None:
            conditions = self._without(conditions, dropped)
        dtype = dtype_of(self.denoiser)
        conditions = {name: cast(each, dtype) for name, each in conditions.items()}
        noisy = noisy.to(dtype, memory_format=self.layout)
        return self.family.denoise(self.model, noisy, timesteps, conditions).float()

    @property
    def model(self) -> Components:
        """The denoising components, by name."""
        return {self.family.denoiser: self.denoiser, **self.further_denoisers}

    @property
    def components(self) -> dict[str, tuple[str, Component]]:
        """Prefix of the parameters' names here, and module, of each component that may be trained."""
        found = {self.family.denoiser: ("denoiser", self.denoiser)}
        found |= {name: (f"further_denoisers.{name}", part) for name, part in self.further_denoisers.items()}
        return found | {name: (f"text_encoders.{name}", part) for name, part in self.text_encoders.items()}

    def blocks(self) -> list[nn.Module]:
        """Return the blocks of all denoising components that gradient checkpointing recomputes."""
        return [block for part in self.model.values() for block in self.family.recomputed_blocks(part)]

    def move(self, device: torch.device) -> None:
        """Move to a device in place, without what is kept in host memory."""
        if self.host_weights is None:
            self.to(device)
            return
        with self.host_weights.left_out(parameter for _, parameter in self.all_trained):
            self.to(device)

    def cast(self, dtype: torch.dtype) -> None:
        """Cast to a precision in place, see `to_precision`."""
        to_precision(self, dtype)

    def train(self, mode: bool = True) -> "FineTuning":
        """Set the mode of all modules but the layers of LoHa and LoKr, which do the same in both.

        In training peft 0.21.2 draws a number for each of them in each pass, to leave some out.
        """
        super().train(mode)
        for layer in self.modules():
            if hasattr(layer, "module_dropout"):
                layer.training = False
        return self

    def _without(self, conditions: Conditions, dropped: torch.Tensor) -> Conditions:
        """Replace dropped captions, given as the encoded empty caption, by the unconditional embedding."""
        captions = {name: conditions[name] for name in self.family.text.embeds}
        none = self.family.text.unconditional(self.pipeline_config, captions)
        if none is captions or self.family.helpers:  # which are not trained: the empty caption stays
            return conditions
        return conditions | {
            name: torch.where(per_row(dropped, tensor), none[name], tensor)
            for name, tensor in captions.items()
        }

    def remember_trained(self, groups: Mapping[str, list[str]]) -> None:
        """Record the parameters that require gradients now as the trained ones, and their groups.

        Later, a stage of the run may freeze some of them temporarily.
        """
        self.all_trained = list(self.trained())
        self.layer_groups = group_members(self, groups, complete=False)

    def trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Return the parameters that require gradients, with their names, in a fixed order."""
        return ((name, p) for name, p in self.named_parameters() if p.requires_grad)


def choose_layers(model: Adapted, groups: Mapping[str, list[str]], chosen: list[str] | None) -> None:
    """Freeze the trained parameters that are in none of the `chosen` groups; None freezes nothing.

    Raises:
        ValueError: a group matches no trained parameter, or nothing would be trained.
    """
    members = group_members(model, groups)
    if chosen is None:
        return
    for group in set(members) - set(chosen):
        for parameter in members[group].values():
            parameter.requires_grad_(False)
    if not any(True for _ in model.trained()):
        raise ValueError(
            f"train.trainable: {chosen}: these groups contain no layer that this method trains; choose others"
        )


def group_members(
    model: Adapted, groups: Mapping[str, list[str]], *, complete: bool = True
) -> dict[str, dict[str, nn.Parameter]]:
    """Return the trained parameters of each group by name.

    A parameter belongs to the first group with a matching pattern, or else to `other`.

    Args:
        complete: require every group to have members, as nothing that can be trained is frozen.

    Raises:
        ValueError: `complete` is set and a group matches no trained parameter.
    """
    members: dict[str, dict[str, nn.Parameter]] = {name: {} for name in (*groups, OTHER)}
    for name, parameter in model.trained():
        matching = (
            group for group, patterns in groups.items() if any(fnmatchcase(name, p) for p in patterns)
        )
        members[next(matching, OTHER)][name] = parameter
    for group, patterns in groups.items():
        if complete and not members[group]:
            example = next(name for name, _ in model.trained())
            raise ValueError(
                f"train.groups.{group}: {patterns} match no trained parameter; their names look "
                f"like {example}"
            )
    return members


def add_lora(
    part: Component,
    *,
    rank: int,
    alpha: int,
    dropout: float,
    target_modules: list[str],
    unused: Sequence[str] = (),
    use_dora: bool = False,
    use_rslora: bool = False,
    kind: str = "lora",
    factor: int = 8,
    block: int = 32,
    adapter: str = ADAPTER,
) -> None:
    """Freeze a denoiser or text encoder and add adapters to named layers.

    Some of their values are drawn from the global generator, and others begin at 0, so that the initial model
    equals the base.

    Args:
        unused: names of layers that get none, see `Family.unused_layers`.
        kind: lora (Hu et al., arXiv 2106.09685), loha (Hyeon-Woo et al., arXiv 2108.06098), lokr (Yeh et al.,
            arXiv 2309.14859) or oft (Qiu et al., arXiv 2306.07280).
        factor, block: of lokr and oft, see `LoraConfig`.
        adapter: the adapter's name in peft.

    Raises:
        ValueError: no layer matches `target_modules`, or a layer's size does not suit the kind's settings.
    """
    from peft import LoHaConfig, LoKrConfig, LoraConfig, OFTConfig

    endings = tuple(f".{target}" for target in target_modules)
    left_out = [layer for layer in unused if f".{layer}".endswith(endings)]
    part.requires_grad_(False)
    settings: PeftConfig
    if kind == "oft":
        settings = OFTConfig(oft_block_size=block)
    elif kind == "loha":
        settings = LoHaConfig(r=rank, alpha=alpha)
    elif kind == "lokr":
        settings = LoKrConfig(r=rank, alpha=alpha, decompose_factor=factor)
    else:
        settings = LoraConfig(
            r=rank,
            lora_alpha=alpha,
            lora_dropout=dropout,
            init_lora_weights="gaussian",
            use_dora=use_dora,
            use_rslora=use_rslora,
        )
    settings.target_modules, settings.exclude_modules = set(target_modules), left_out or None
    inject_adapter(part, settings, adapter)
    _require_sizes(part, settings, adapter)


def _require_sizes(part: nn.Module, settings: "PeftConfig", adapter: str) -> None:
    """Raise ValueError if peft had to take other sizes in a layer than the settings say."""
    for name, layer in part.named_modules():
        if adapter in getattr(layer, "lokr_w2", ()):
            raise ValueError(
                f"{name}: rank: {settings.r} is not less than half of the larger side of LoKr's second "
                f"factor, {tuple(layer.lokr_w2[adapter].shape)}, which would be whole; lower rank or factor"
            )
        if adapter not in getattr(layer, "oft_R", ()):
            continue
        if not isinstance(layer.base_layer, nn.Linear):
            raise ValueError(f"{name}: OFT is for linear layers here; leave it out of target_modules")
        if layer.in_features % settings.oft_block_size:
            raise ValueError(
                f"{name}: block: {settings.oft_block_size} does not divide its {layer.in_features} inputs; "
                "give a divisor"
            )


def inject_adapter(part: Component, settings: "PeftConfig", adapter: str) -> None:
    """Add an adapter of peft to a component."""
    from peft import inject_adapter_in_model

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # of another adapter
        if hasattr(part, "add_adapter"):
            part.add_adapter(settings, adapter)
        else:  # see `Family.has_lora_loader`
            inject_adapter_in_model(settings, part, adapter)


def set_dropout(denoiser: nn.Module, probability: float) -> None:
    """Set the probability of a denoiser's own dropout layers, which act in training mode only.

    Files keep no probability: a saved denoiser has that of its configuration again, 0 for published models.
    """
    for layer in denoiser.modules():
        if isinstance(layer, _DropoutNd):
            layer.p = probability


def train_all(part: Component, unused: Sequence[str] = ()) -> None:
    """Let all parameters of a component be trained but those of `unused` layers (`Family.unused_layers`)."""
    part.requires_grad_(True)
    for layer in unused:
        part.get_submodule(layer).requires_grad_(False)
