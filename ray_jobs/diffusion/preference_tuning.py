"""Training on preferences: one adapter is trained, and what it began from is the reference.

The base is there once. For a pass without gradients the trained adapter is switched off, and the frozen one
that the training began from, if there is one, is switched on.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn

from ray_jobs.diffusion.families import Conditions
from ray_jobs.diffusion.finetuning import ADAPTER, FineTuning
from ray_jobs.diffusion.objectives import Draws, add_noise
from ray_jobs.diffusion.preferences import (
    PreferenceSettings,
    dpo_losses,
    implicit_rewards,
    kto_losses,
    kto_reference_point,
)

REFERENCE = "reference"  # name of the frozen adapter in peft
Summed = Callable[[torch.Tensor], torch.Tensor]


def of_this_worker(values: torch.Tensor) -> torch.Tensor:
    """Return the sum over workers of what a single worker has: the same."""
    return values


class PreferenceTuning(FineTuning):
    """A `FineTuning` whose losses are those of preferences; see `FineTuning` for the other arguments.

    Attributes:
        preference: what is learned; to be set before the first pass.
        summed: sums a tensor over all workers, for the reference point of KTO.
    """

    preference: PreferenceSettings
    summed: Summed = staticmethod(of_this_worker)

    def forward(
        self,
        latents: torch.Tensor,
        conditions: Conditions,
        draws: Draws,
        dropped: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        rejected: torch.Tensor | None = None,
        liked: torch.Tensor | None = None,
        counted: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the losses of N pairs, or of N images: float32, N.

        Both images of a pair get the same noise at the same timestep, as both models do.

        Args:
            latents: of the preferred images of the pairs, or of the images, as `FineTuning.forward`.
            rejected: latents of the other image of each pair, with loss `dpo`.
            liked: bool, N, with loss `kto`.
            counted: bool, N, with loss `kto`: the rows that are not there to fill up a pass.
        """
        assert mask is None
        if rejected is not None:
            latents = torch.cat([latents, rejected])
            conditions = {name: torch.cat([each, each]) for name, each in conditions.items()}
            draws = replace(
                draws, **{name: torch.cat([t, t]) for name, t in vars(draws).items() if t is not None}
            )
            dropped = None if dropped is None else torch.cat([dropped, dropped])
        posed = add_noise(self.objective, latents, draws, self.settings)

        def losses() -> torch.Tensor:
            return posed.losses(self.predict(posed.noisy, posed.timesteps, conditions, dropped))

        with torch.no_grad(), reference_active(self):
            reference = losses()
        rewards = implicit_rewards(losses(), reference, self.preference.beta)
        if self.preference.loss == "dpo":
            return dpo_losses(*rewards.chunk(2))
        assert liked is not None and counted is not None
        sums = torch.stack([rewards.detach()[counted].sum(), counted.sum().to(rewards)])
        return kto_losses(rewards, liked, kto_reference_point(*self.summed(sums)))


@contextmanager
def reference_active(model: nn.Module) -> Iterator[None]:
    """Let a model in training predict as its reference does, for the block.

    peft's own switches would also change which parameters require gradients.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
    before = [layer.active_adapters for layer in layers]
    try:
        for layer, names in zip(layers, before, strict=True):  # one that it does not have is passed over
            layer._active_adapter = [REFERENCE if name == ADAPTER else name for name in names]
        yield
    finally:
        for layer, names in zip(layers, before, strict=True):
            layer._active_adapter = names
