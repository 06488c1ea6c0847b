"""A group of rows that steps together, and what it brings to one denoiser call."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from ray_jobs.diffusion.families import Captions, Family
from ray_jobs.diffusion.sampling import whole_pictures
from serving.engine.batched_lora import BatchedLoRA, Stacks
from serving.engine.rows import Row


@dataclass(frozen=True)
class Batch:
    """What stays the same while the same rows step together: N rows, G of them with classifier-free guidance.

    Attributes:
        captions: N + G x ..., the unconditional halves last.
        sizes: N + G x 6, or None.
        guided: int64, G, which rows have an unconditional half.
        guidance_scales: float32, G x 1 x 1 x 1.
        told: float32, N: guidance for denoisers that are told it, or None.
        stacks: of the adapters, N + G rows.
    """

    rows: list[Row]
    captions: Captions
    sizes: torch.Tensor | None
    guided: torch.Tensor
    guidance_scales: torch.Tensor
    told: torch.Tensor | None
    stacks: Stacks
    shares: dict[tuple[int, int], "Share"] = field(default_factory=dict)

    @staticmethod
    def of(rows: list[Row], family: Family, denoiser: Any, low_rank: BatchedLoRA, device: str) -> "Batch":
        guided = [i for i, row in enumerate(rows) if row.null_captions is not None]
        captions = [row.captions for row in rows]
        captions += [row.null_captions for row in rows if row.null_captions is not None]
        sizes = whole_pictures(family, len(captions), *rows[0].size)
        scales = torch.tensor([row.request.guidance_scale for row in rows], device=device)
        adapters = [row.adapter for row in rows] + [rows[i].adapter for i in guided]
        index = torch.tensor(guided, dtype=torch.int64, device=device)
        return Batch(
            rows,
            {
                name: torch.stack([each[name] for each in captions]).to(denoiser.dtype)
                for name in family.embeds
            },
            None if sizes is None else sizes.to(device),
            index,
            scales[index].reshape(-1, 1, 1, 1),
            scales if family.distilled_guidance(denoiser) else None,
            low_rank.stack(adapters, family.denoiser),
        )

    def share(self, part: slice) -> "Share":
        """What a part of the N + G rows brings; made once, for many steps."""
        key = part.start, part.stop
        if key not in self.shares:
            self.shares[key] = Share(
                {name: captions[part] for name, captions in self.captions.items()},
                None if self.sizes is None else self.sizes[part],
                None if self.told is None else self.told[part],
                {place: update.of(part) for place, update in self.stacks.items()},
            )
        return self.shares[key]

    def twice(self, tensor: torch.Tensor) -> torch.Tensor:
        """N x ... to N + G x ...: the rows with guidance once more."""
        return torch.cat([tensor, tensor[self.guided]]) if len(self.guided) else tensor

    def split(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """N + G x ... to what each row has of it: 1 x ..., with guidance 2 x ..., as copies."""
        second = {row: len(self.rows) + place for place, row in enumerate(self.guided.tolist())}
        return [tensor[[i, second[i]] if i in second else [i]] for i in range(len(self.rows))]

    @staticmethod
    def join(parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """The same back."""
        return torch.cat([*(part[:1] for part in parts), *(part[1:] for part in parts)])

    def guide(self, output: torch.Tensor) -> torch.Tensor:
        """N + G x ... to N x ...: classifier-free guidance (arXiv 2207.12598, eq. 6) of rows that have it."""
        if not len(self.guided):
            return output
        conditional, unconditional = output.split([len(self.rows), len(self.guided)])
        step = conditional[self.guided] - unconditional
        return conditional.index_copy(0, self.guided, unconditional + self.guidance_scales * step)


class Share(NamedTuple):
    """Some of a batch's rows."""

    captions: Captions
    sizes: torch.Tensor | None
    told: torch.Tensor | None
    stacks: Stacks
