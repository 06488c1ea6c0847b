"""What is trained of a text-to-image model: LoRA adapters or everything."""

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from ray_jobs.diffusion.families.family import Captions, Family
from ray_jobs.diffusion.objectives import Draws, LossSettings, Objective, denoising_loss

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
