"""Several adapters of one frozen base, trained in one forward and backward pass.

Rows come in groups of equal size, one per adapter; the base sees them as one batch, and each group goes
through its own adapter (for language models: PLoRA, arXiv 2508.02932). A member's losses, gradients and names
are those of a `FineTuning` that has its adapter alone.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.nn import functional as F

from ray_jobs.diffusion.families import Family
from ray_jobs.diffusion.finetuning import ADAPTER, FineTuning, group_members
from ray_jobs.diffusion.objectives import Draws, LossSettings, NoisyLatents, Objective, add_noise
from ray_jobs.diffusion.protocols import Component


class Member:
    """One adapter of a pack; what is trained has the names that it would have alone.

    Called like a `FineTuning`, it returns the losses of its own rows.

    Args:
        pack: the pack, whose model has the adapter.
        adapter: the adapter's name in peft.

    Attributes:
        all_trained, layer_groups: as those of `FineTuning`.
    """

    def __init__(self, pack: "Pack", adapter: str, objective: Objective, settings: LossSettings) -> None:
        self.pack, self.model, self.adapter = pack, pack.model, adapter
        self.objective, self.settings = objective, settings
        self.all_trained: list[tuple[str, nn.Parameter]] = []
        self.layer_groups: dict[str, dict[str, nn.Parameter]] = {}

    @property
    def family(self) -> Family:
        return self.model.family

    @property
    def text_encoders(self) -> Any:
        return self.model.text_encoders

    @property
    def components(self) -> dict[str, tuple[str, Component]]:
        return self.model.components

    def __call__(self, **inputs: Any) -> torch.Tensor:
        return self.pack({self.adapter: inputs})[self.adapter]

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Return the adapter's parameters with their names, in a fixed order."""
        mark, alone = f".{self.adapter}.", f".{ADAPTER}."
        named = self.model.named_parameters()
        return ((name.replace(mark, alone), each) for name, each in named if mark in name)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Return the adapter's parameters."""
        return (each for _, each in self.named_parameters())

    def trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Return the adapter's parameters that require gradients, with their names, in a fixed order."""
        return ((name, each) for name, each in self.named_parameters() if each.requires_grad)

    def remember_trained(self, groups: Mapping[str, list[str]]) -> None:
        """Record the parameters that require gradients now as the trained ones, and their groups."""
        self.all_trained = list(self.trained())
        self.layer_groups = group_members(self, groups, complete=False)

    def noisy(
        self, latents: torch.Tensor, draws: Draws, mask: torch.Tensor | None = None, **others: Any
    ) -> NoisyLatents:
        """Return noisy latents as the member's loss has them."""
        return add_noise(self.objective, latents, draws, self.settings, mask)

    def move(self, device: torch.device) -> None:
        """Move the adapter to a device in place."""
        for parameter in self.parameters():
            parameter.data = parameter.data.to(device)

    def cast(self, dtype: torch.dtype) -> None:
        """Cast the adapter in place."""
        for parameter in self.parameters():
            parameter.data = parameter.data.to(dtype)


Trainable: TypeAlias = FineTuning | Member
"""What an engine trains."""


class Pack(nn.Module):
    """A model with an adapter per member.

    Args:
        model: model whose components have the members' adapters.

    Raises:
        ValueError: a layer with adapters does not see the rows of the batch one after the other; a pass
            raises it too, for layers of which only a pass shows it.
    """

    def __init__(self, model: FineTuning) -> None:
        super().__init__()
        self.model, self.groups = model, _Groups()
        self.members: dict[str, Member] = {}
        for _, part in model.components.values():
            for name, layer in _adapted_layers(part):
                if model.family.routed_layers and model.family.routed_layers in name:
                    raise ValueError(_other_rows(name, "what a gate gives it"))
                if layer.lora_embedding_A:
                    raise ValueError(_other_rows(name, "an embedding's indices"))
                layer.forward = partial(_forward, layer, name, self.groups)

    def add(self, adapter: str, objective: Objective, settings: LossSettings) -> Member:
        """Add an adapter of the model as a member."""
        self.members[adapter] = Member(self, adapter, objective, settings)
        return self.members[adapter]

    def divide(self, adapters: list[str], rows: int) -> None:
        """Let the next pass divide so many rows among adapters."""
        self.groups.adapters, self.groups.rows = adapters, rows

    def forward(self, inputs: Mapping[str, Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Return the losses of each member's N images, by adapter: float32, N.

        Args:
            inputs: arguments of `FineTuning`, by adapter; all have as many rows.
        """
        posed = {name: self.members[name].noisy(**given) for name, given in inputs.items()}
        all_inputs = list(inputs.values())
        conditions = {
            name: torch.cat([given["conditions"][name] for given in all_inputs])
            for name in all_inputs[0]["conditions"]
        }
        noisy = torch.cat([each.noisy for each in posed.values()])
        timesteps = torch.cat([each.timesteps for each in posed.values()])
        self.divide(list(inputs), len(noisy))
        prediction = self.model.predict(noisy, timesteps, conditions, _dropped(all_inputs))
        groups = prediction.chunk(len(posed))
        return {name: each.losses(group) for (name, each), group in zip(posed.items(), groups, strict=True)}


def _dropped(inputs: Sequence[Mapping[str, Any]]) -> torch.Tensor | None:
    """Return which rows of all groups have no caption; None if there are none."""
    given = [each.get("dropped") for each in inputs]
    like = next((each for each in given if each is not None), None)
    if like is None:
        return None
    return torch.cat([torch.zeros_like(like) if each is None else each for each in given])


class _Groups:
    """What a pass applies: the adapters of its groups in the order of rows, and the number of all rows."""

    def __init__(self) -> None:
        self.adapters: list[str] = []
        self.rows = 0


def _adapted_layers(part: nn.Module) -> list[tuple[str, Any]]:
    """Return a component's layers that have adapters, with their names."""
    from peft.tuners.lora.layer import LoraLayer

    return [(name, layer) for name, layer in part.named_modules() if isinstance(layer, LoraLayer)]


def _other_rows(layer: str, sees: str) -> str:
    """Say that adapters of a layer cannot be members of a pack."""
    return (
        f"train.lora.target_modules: {layer} does not see the rows of the batch one after the other, but "
        f"{sees}, so its adapters cannot be trained together; set search.pack: off, or choose others"
    )


def _forward(layer: Any, name: str, groups: _Groups, x: torch.Tensor, *args: Any, **named: Any) -> Any:
    result = layer.base_layer(x, *args, **named)
    adapters = groups.adapters
    present = [adapter for adapter in adapters if adapter in layer.lora_A]
    if not present:
        return result
    if len(x) % groups.rows:  # a family may see the tokens of a row as rows
        raise ValueError(_other_rows(name, f"{len(x)} rows of a batch of {groups.rows}"))
    plain = len(present) == len(adapters) and isinstance(layer.get_base_layer(), nn.Linear)
    if plain and not any(_is_special(layer, adapter) for adapter in adapters):
        return result + _products(layer, adapters, x).to(result.dtype)
    parts, size, random = [], len(x) // len(adapters), _Random(x.device)
    for adapter, rows, own in zip(adapters, x.split(size), result.split(size), strict=True):
        parts.append(_one(layer, adapter, rows, own, random) if adapter in present else own)
    return torch.cat(parts)


def _is_special(layer: Any, adapter: str) -> bool:
    return adapter in layer.lora_variant or not isinstance(layer.lora_dropout[adapter], nn.Identity)


def _products(layer: Any, adapters: Sequence[str], x: torch.Tensor) -> torch.Tensor:
    """Return what each group's adapter adds to a linear layer's output; ranks are padded with zeros."""
    downs = [layer.lora_A[adapter].weight for adapter in adapters]
    ups = [layer.lora_B[adapter].weight * layer.scaling[adapter] for adapter in adapters]
    rank = max(len(down) for down in downs)
    down = torch.stack([F.pad(each, (0, 0, 0, rank - len(each))) for each in downs])
    up = torch.stack([F.pad(each, (0, rank - each.shape[1])) for each in ups])
    rows = x.to(down.dtype).reshape(len(adapters), -1, x.shape[-1])
    return torch.bmm(torch.bmm(rows, down.mT), up.mT).reshape(*x.shape[:-1], -1)


class _Random:
    """The random generator's state before a layer's dropout, which each group draws from as if alone."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.state: torch.Tensor | None = None

    def start(self) -> None:
        on_gpu = self.device.type == "cuda"
        if self.state is None:
            self.state = torch.cuda.get_rng_state(self.device) if on_gpu else torch.get_rng_state()
        elif on_gpu:
            torch.cuda.set_rng_state(self.state, self.device)
        else:
            torch.set_rng_state(self.state)


def _one(layer: Any, adapter: str, x: torch.Tensor, result: torch.Tensor, random: _Random) -> torch.Tensor:
    """Return a group's output with its adapter, as peft computes it alone."""
    dropout = layer.lora_dropout[adapter]
    if not isinstance(dropout, nn.Identity):
        random.start()
    down, up = layer.lora_A[adapter], layer.lora_B[adapter]
    x = x.to(down.weight.dtype)
    if adapter in layer.lora_variant:
        changed = layer.lora_variant[adapter].forward(layer, active_adapter=adapter, x=x, result=result)
    else:
        changed = result + up(down(dropout(x))) * layer.scaling[adapter]
    return changed.to(result.dtype)
