"""A group of rows that step together, with the inputs they share in each denoiser call."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from ray_jobs.diffusion.families import Components, Conditions, Family
from ray_jobs.diffusion.families.control import CONTROL, CONTROL_ROWS, CONTROL_SCALE
from ray_jobs.diffusion.families.family import reference
from ray_jobs.diffusion.families.text import LENGTHS, MASK
from ray_jobs.diffusion.objectives import per_row
from ray_jobs.diffusion.precision import cast, dtype_of
from ray_jobs.diffusion.protocols import Denoiser
from ray_jobs.diffusion.sampling import whole_pictures
from serving.engine.batched_lora import BatchedLoRA, Stacks
from serving.engine.rows import Row


@dataclass(frozen=True)
class Batch:
    """Inputs that stay constant while the same N rows step together, G of them with classifier-free guidance.

    Attributes:
        family: the family of the model.
        conditions: the denoiser's conditions, N + G x ..., those without a caption last.
        guided, guided_rows: int64, G: indices of the rows with guidance; the same as a list.
        guidance_scales: float32, G.
        stacks: adapter updates for the N + G rows, or for the N rows if the family has `helpers`.
        controls: what a ControlNet looks at in each of these rows, and how much that counts; None: nothing.
        shares: slices of this batch made so far, by start and stop.
    """

    rows: list[Row]
    family: Family
    conditions: Conditions
    guided: torch.Tensor
    guided_rows: list[int]
    guidance_scales: torch.Tensor
    stacks: Stacks
    controls: list[tuple[torch.Tensor, float] | None]
    shares: dict[tuple[int, int], "Share"] = field(default_factory=dict)

    @staticmethod
    def of(rows: list[Row], family: Family, model: Components, low_rank: BatchedLoRA, device: str) -> "Batch":
        denoiser: Denoiser = model[family.denoiser]
        guided = [i for i, row in enumerate(rows) if row.guides]
        captions = [row.captions for row in rows]
        captions += [row.null_captions for row in rows if row.guides and row.null_captions is not None]
        conditions = {name: torch.stack([each[name] for each in captions]) for name in family.text.embeds}
        for number in rows[0].references:
            latents = [row.references[number] for row in (*rows, *(rows[i] for i in guided))]
            conditions[reference(number)] = torch.stack(latents)
        for name in rows[0].painting:
            of_each = [row.painting[name] for row in (*rows, *(rows[i] for i in guided))]
            conditions[name] = torch.stack(of_each)
        conditions = {name: cast(each, dtype_of(denoiser)) for name, each in conditions.items()}
        conditions |= whole_pictures(family, len(captions), *rows[0].size, device)
        if MASK in conditions:
            conditions[LENGTHS] = conditions[MASK].sum(dim=1).cpu()
        scales = torch.tensor([row.request.guidance_scale for row in rows], device=device)
        adapters = [row.adapter for row in rows]
        if not family.helpers:  # which predict without a caption, and have no adapters
            adapters += [rows[i].adapter for i in guided]
        index = torch.tensor(guided, dtype=torch.int64, device=device)
        if family.guidance_embedded(denoiser):
            conditions["guidance"] = scales
        stacks: Stacks = {}
        for name in model:
            stacks = {**stacks, **low_rank.stack(adapters, name)}
        controls = [
            None
            if row.control is None
            else (cast(row.control, dtype_of(denoiser)), row.request.control_scale)
            for row in (*rows, *(rows[i] for i in guided))
        ]
        return Batch(rows, family, conditions, index, guided, scales[index], stacks, controls)

    def suits(self, rows: list[Row]) -> bool:
        """Return whether the batch has these rows, and their next step guides the same of them."""
        guided = [i for i, row in enumerate(rows) if row.guides]
        return self.rows == rows and self.guided_rows == guided

    def share(self, part: slice) -> "Share":
        """Return the inputs of a slice of the N + G rows; cached, since many steps use it."""
        key = part.start, part.stop
        if key not in self.shares:
            adapted = slice(part.start, min(part.stop, len(self.rows))) if self.family.helpers else part
            self.shares[key] = Share(
                {name: each[part] for name, each in self.conditions.items()} | self._control(part),
                {place: update.of(adapted) for place, update in self.stacks.items()},
            )
        return self.shares[key]

    def _control(self, part: slice) -> Conditions:
        """Return the conditions of a ControlNet in a slice of the rows: of those that it steers."""
        here = self.controls[part]
        given = [(place, *each) for place, each in enumerate(here) if each is not None]
        if not given:
            return {}
        places, pictures, scales = zip(*given, strict=True)
        device = pictures[0].device
        found = {CONTROL: torch.stack(pictures), CONTROL_SCALE: torch.tensor(scales, device=device)}
        if len(given) < len(here):
            found[CONTROL_ROWS] = torch.tensor(places, device=device)
        return found

    def twice(self, tensor: torch.Tensor) -> torch.Tensor:
        """Repeat the rows with guidance at the end: N x ... to N + G x ...."""
        return torch.cat([tensor, tensor[self.guided]]) if len(self.guided) else tensor

    def split(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Split N + G x ... into copies per row: 1 x ... each, or 2 x ... with guidance."""
        second = {row: len(self.rows) + place for place, row in enumerate(self.guided.tolist())}
        return [tensor[[i, second[i]] if i in second else [i]] for i in range(len(self.rows))]

    @staticmethod
    def join(parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Inverse of `split`."""
        return torch.cat([*(part[:1] for part in parts), *(part[1:] for part in parts)])

    def guide(self, output: torch.Tensor) -> torch.Tensor:
        """Apply classifier-free guidance (arXiv 2207.12598, eq. 6) where it is on: N + G x ... to N x ...."""
        if not len(self.guided):
            return output
        conditional, unconditional = output.split([len(self.rows), len(self.guided)])
        scales = per_row(self.guidance_scales, output)
        guided = self.family.guide(unconditional, conditional[self.guided], scales)
        return conditional.index_copy(0, self.guided, guided)


class Share(NamedTuple):
    """The inputs of a slice of a batch's rows, see `Batch`."""

    conditions: Conditions
    stacks: Stacks
