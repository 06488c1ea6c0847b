"""The parts of a model's trained parameters whose state a rank keeps."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Fragment:
    """The part of a trained parameter whose state this rank keeps.

    Attributes:
        name: name of the parameter.
        start: index of the fragment's first element in the flattened parameter.
        owner: fp32 tensor that the optimizer updates; the fragment is its elements `offset` to
            `offset + numel`.
    """

    name: str
    start: int
    owner: torch.Tensor
    offset: int
    numel: int

    @property
    def key(self) -> str:
        return f"{self.start}/{self.name}"

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a 1-D view of the fragment's elements in a tensor with the owner's layout."""
        return tensor.detach().view(-1).narrow(0, self.offset, self.numel)

    @property
    def weights(self) -> torch.Tensor:
        return self.of(self.owner)

    def share(self, rank: int, world_size: int) -> "Fragment | None":
        """Return a rank's share of this fragment, if all ranks hold it alike; None if it is empty."""
        begin, end = self.numel * rank // world_size, self.numel * (rank + 1) // world_size
        if begin == end:
            return None
        return Fragment(self.name, self.start + begin, self.owner, self.offset + begin, end - begin)
