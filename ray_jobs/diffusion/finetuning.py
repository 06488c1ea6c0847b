"""What is trained of a text-to-image model: LoRA adapters or everything, and how it is saved."""

import json
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ray_jobs.diffusion.adapter_files import file_name
from ray_jobs.diffusion.families.family import Captions, Family
from ray_jobs.diffusion.loading import LORA_WEIGHTS
from ray_jobs.diffusion.model_files import INDEX, NEVER_LOADED, SAFETY_CHECKER, model_index
from ray_jobs.diffusion.objectives import Draws, LossSettings, Objective, denoising_loss
from ray_jobs.diffusion.saving import copy_part, save_part

OTHER = "other"  # the group of the parameters that are in no named one


class FineTuning(nn.Module):
    """A denoiser, and the text encoders where they are trained too, with a loss; the engine wraps this.

    Args:
        pipeline: from `load_pipeline`.
        family: of the pipeline.
        objective: on the device that the module will be on.
        text_encoders_trained: captions then come as tokens, else as embeddings.
        channels_last: memory layout of what goes through the denoiser's convolutions. Their weights keep the
            plain one: ZeRO flattens and broadcasts them.
    """

    def __init__(
        self,
        pipeline: Any,
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
        self.denoiser = getattr(pipeline, family.denoiser)
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        names = family.text_encoders if text_encoders_trained else ()
        present = {name: getattr(pipeline, name) for name in names if getattr(pipeline, name) is not None}
        self.text_encoders = nn.ModuleDict(present)
        self.all_trained: list[tuple[str, nn.Parameter]] = []
        self.layer_groups: dict[str, dict[str, nn.Parameter]] = {}

    def forward(
        self,
        latents: torch.Tensor,
        captions: Captions,
        draws: Draws,
        sizes: torch.Tensor | None = None,
        dropped: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The losses of N pictures: float32, N.

        Args:
            latents: float32, N x C x H x W, as the denoiser takes them.
            captions: embeddings, or tokens where the text encoders are trained.
            sizes: N x 6, for families that are told of them.
            dropped: bool, N, the pictures that are trained without a caption; theirs is the empty one here.
                None: there are none.
        """
        if self.text_encoders:
            captions = self.family.embed(self.text_encoders, captions)
        if dropped is not None:
            captions = self._without(captions, dropped)
        dtype = self.denoiser.dtype
        captions = {name: tensor.to(dtype) for name, tensor in captions.items()}

        def denoise(noisy: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
            noisy = noisy.to(dtype, memory_format=self.layout)
            return self.family.denoise(self.denoiser, noisy, timesteps, captions, sizes).float()

        return denoising_loss(denoise, self.objective, latents, draws, self.settings)

    def _without(self, captions: Captions, dropped: torch.Tensor) -> Captions:
        """Replace the dropped captions, which are encodings of the empty one, by what stands for none."""
        captions = {name: captions[name] for name in self.family.embeds}
        none = self.family.unconditional(self.pipeline_config, captions)
        if none is captions:
            return captions
        shape = {name: (-1, *[1] * (tensor.dim() - 1)) for name, tensor in captions.items()}
        return {
            name: torch.where(dropped.reshape(shape[name]), none[name], tensor)
            for name, tensor in captions.items()
        }

    def remember_trained(self, groups: Mapping[str, list[str]]) -> None:
        """Fix what is trained, and its groups, from the parameters that need gradients now: a stage of the
        run may freeze some of them for a while."""
        self.all_trained = list(self.trained())
        self.layer_groups = group_members(self, groups, complete=False)

    def trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters that training changes, by name, in a fixed order."""
        return ((name, p) for name, p in self.named_parameters() if p.requires_grad)


def choose_layers(model: FineTuning, groups: Mapping[str, list[str]], chosen: list[str] | None) -> None:
    """Freeze what is in none of the `chosen` groups (None: train all that is trained).

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
        raise ValueError(f"train.trainable: {chosen}: no layer that this method trains is in these groups")


def group_members(
    model: FineTuning, groups: Mapping[str, list[str]], *, complete: bool = True
) -> dict[str, dict[str, nn.Parameter]]:
    """The trained parameters of each group by name: of the first whose patterns match, or of `other`.

    Args:
        complete: whether all that could be trained is, so that each group has members.

    Raises:
        ValueError: a group matches no trained parameter although the training is complete.
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
                f"train.groups.{group}: {patterns} match none of the trained parameters, which have names "
                f"like {example}"
            )
    return members


def add_lora(
    part: Any,
    *,
    rank: int,
    alpha: int,
    dropout: float,
    target_modules: list[str],
    use_dora: bool = False,
    use_rslora: bool = False,
) -> None:
    """Freeze a denoiser or text encoder and add adapters (Hu et al., arXiv 2106.09685) to the named layers.

    The down projections are drawn from the global generator; the up projections start at 0, so the model
    starts as the base.

    Raises:
        ValueError: no layer has such a name.
    """
    from peft import LoraConfig

    part.requires_grad_(False)
    part.add_adapter(
        LoraConfig(
            r=rank,
            lora_alpha=alpha,
            lora_dropout=dropout,
            init_lora_weights="gaussian",
            target_modules=target_modules,
            use_dora=use_dora,
            use_rslora=use_rslora,
        )
    )


def save_lora(pipeline: Any, model: FineTuning, weights: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Write adapters as `pytorch_lora_weights.safetensors`, which diffusers' `load_lora_weights` takes.

    Args:
        weights: the adapters' tensors by their name in `model`.
    """
    from peft.utils import get_peft_model_state_dict

    # In peft's names. diffusers' own converter renames attention layers only, and its loader then drops
    # those of a file with both kinds of names, with a warning.
    arguments: dict[str, Any] = {}
    parts = {model.family.denoiser: ("denoiser", model.denoiser)}
    parts |= {name: (f"text_encoders.{name}", part) for name, part in model.text_encoders.items()}
    for name, (prefix, part) in parts.items():
        mine = {
            key.removeprefix(f"{prefix}."): w for key, w in weights.items() if key.startswith(f"{prefix}.")
        }
        if mine:
            state = get_peft_model_state_dict(part, state_dict=mine)
            arguments[f"{name}_lora_layers"] = {file_name(part, key): value for key, value in state.items()}
            arguments[f"{name}_lora_adapter_metadata"] = _settings(part.peft_config["default"])
    type(pipeline).save_lora_weights(folder, safe_serialization=True, **arguments)
    assert (folder / LORA_WEIGHTS).exists()


def _settings(config: Any) -> dict[str, Any]:
    """Of an adapter's configuration what its file says: what is not peft's default, for an older peft (0.17)
    refuses settings that it does not know, and what diffusers 0.35 asks for."""
    usual = type(config)().to_dict()
    settings = {key: value for key, value in config.to_dict().items() if value != usual[key]}
    # Sets have another order in each process: the same weights shall be the same file.
    settings = {key: sorted(value) if isinstance(value, set) else value for key, value in settings.items()}
    # diffusers loads an adapter in training mode: with its dropout it would draw at random.
    asked = {"r", "lora_alpha", "rank_pattern", "alpha_pattern"}
    return settings | {name: getattr(config, name) for name in sorted(asked)} | {"lora_dropout": 0.0}


@torch.no_grad()
def save_pipeline(
    base: Path,
    components: Mapping[str, Any],
    weights: Mapping[str, torch.Tensor],
    folder: Path,
    scheduler: Any | None = None,
) -> None:
    """Write a whole pipeline with trained weights in diffusers' format, as safetensors.

    Args:
        base: folder of the base model, whose files are taken for all other components.
        components: those with trained weights, by their name in the pipeline; not the ones that are being
            trained, for their weights are overwritten.
        weights: what was trained, by its name in `FineTuning`.
        scheduler: takes the place of the base model's; None: that stays.
    """
    own: dict[str, torch.Tensor] = {}
    for name, part in components.items():
        prefix = f"text_encoders.{name}" if name.startswith("text_encoder") else "denoiser"
        own |= {f"{prefix}.{key}": parameter for key, parameter in part.named_parameters()}
    for key, value in weights.items():
        own[key].copy_(value)
    for name, part in components.items():
        save_part(part, folder / name)
    index = model_index(base)
    for path in base.iterdir():
        if path.is_dir() and path.name not in {*NEVER_LOADED, *components}:
            class_name = (index.get(path.name) or [None, None])[1]
            copy_part(path, folder / path.name, class_name)
    if scheduler is not None:
        scheduler.save_pretrained(folder / "scheduler")
        index["scheduler"] = ["diffusers", type(scheduler).__name__]
    index |= {name: [None, None] for name in NEVER_LOADED if name in index}
    if SAFETY_CHECKER in index:
        index["requires_safety_checker"] = False
    (folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
