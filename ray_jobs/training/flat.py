"""An engine that keeps what is trained in flat tensors, so that a step takes few kernels and few messages.

The trained parameters are views of one tensor in the model's precision. It is cut into chunks, and each
chunk into one slice per rank. When a chunk's gradients are complete, they are packed into one tensor and
summed over the ranks while the backward pass goes on. The optimizer, as a fused AdamW, then updates fp32
weights: many parameters as one tensor, unless it needs each in its shape (`WHOLE_TENSORS`).

With stage 0 every rank updates all weights. With stages 1 and 2 of ZeRO (Rajbhandari et al., arXiv
1910.02054, section 5) it updates its slices, and the ranks then gather each other's new weights; with stage
2 it also keeps only its slices of the gradients.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import distributed

from ray_jobs.config import WHOLE_TENSORS, TrainConfig
from ray_jobs.diffusion.pack import Trainable
from ray_jobs.diffusion.precision import PRECISIONS
from ray_jobs.training.engine import Engine, parameter_groups, pieces_a_step
from ray_jobs.training.fragments import Fragment
from ray_jobs.training.optimizers import FUSED, MOST_MOMENTS, build_optimizer

CHUNK = 1 << 24  # elements, at least: a message that is worth sending during the backward pass
ALIGNED = 16  # elements: tensor cores want parameters to begin at multiples of 16 bytes


@dataclass
class Chunk:
    """Parameters whose gradients are summed over the ranks together.

    Attributes:
        begin, numel: its elements in the flat tensor, padding included.
        parameters: by the element of the chunk at which they begin.
        missing: parameters whose gradients of the current piece are not there yet.
        kept: gradients of all pieces so far: of the whole chunk, or with stage 2 of this rank's slice.
        message: the sum over ranks that is under way: its handle, and the tensor that will hold the result.
    """

    begin: int
    numel: int
    parameters: dict[int, torch.nn.Parameter] = field(default_factory=dict)
    missing: int = 0
    kept: torch.Tensor | None = None
    message: tuple[Any, torch.Tensor] | None = None

    def pairs(self, flat: torch.Tensor) -> list[tuple[torch.Tensor, torch.nn.Parameter]]:
        """Return each parameter, after its elements of a tensor like the chunk, in the parameter's shape."""
        return [(flat[at : at + p.numel()].view(p.shape), p) for at, p in self.parameters.items()]


@dataclass(frozen=True)
class Owner:
    """An fp32 tensor that the optimizer updates: a part of a chunk that one group of parameters fills.

    Attributes:
        begin: its first element in the flat tensor.
        weights: 1-D, or a single parameter in its shape.
        own: the elements that this rank saves and averages; without sharding, its share of them.
    """

    chunk: Chunk
    begin: int
    weights: torch.Tensor
    own: slice

    @property
    def place(self) -> slice:
        """Its elements in the flat tensor."""
        return slice(self.begin, self.begin + self.weights.numel())


def stage_of(config: TrainConfig, world_size: int) -> int:
    """Return the stage that the flat engine uses: a single rank shards nothing."""
    return config.zero_stage if world_size > 1 else 0


def summed_in(config: TrainConfig, world_size: int) -> torch.dtype:
    """Return the dtype in which the flat engine sums gradients.

    Adapters are small, and many pieces would lose their sums to rounding.
    """
    exact = config.method == "lora" or pieces_a_step(config, world_size) > 1
    return torch.float32 if exact else PRECISIONS[config.precision]


class Flat(Engine):
    """The flat engine.

    Args:
        overlaps: send gradients during the backward pass, which must reach them in the same order on all
            ranks.

    Attributes:
        stage: ZeRO stage, 0 to 2; 0 for a single rank.
    """

    def __init__(
        self,
        model: Trainable,
        config: TrainConfig,
        world_size: int,
        device: torch.device,
        *,
        overlaps: bool = True,
    ) -> None:
        self.module, self.device, self.world_size = model, device, world_size
        self.rank = distributed.get_rank() if world_size > 1 else 0
        self.stage, self.summed_in = stage_of(config, world_size), summed_in(config, world_size)
        self.max_norm, dtype = config.max_grad_norm, PRECISIONS[config.precision]

        groups = parameter_groups(model)
        self.chunks, bounds = _layout(groups, world_size)
        model.move(device)
        masters = torch.zeros(sum(chunk.numel for chunk in self.chunks), device=device)
        for chunk in self.chunks:
            for view, parameter in chunk.pairs(self._of(chunk, masters)):
                view.copy_(parameter.detach())
        if world_size > 1:
            distributed.broadcast(masters, src=0)
        model.cast(dtype)
        self.weights = masters if dtype == torch.float32 else masters.to(dtype)
        for chunk in self.chunks:
            for view, parameter in chunk.pairs(self._of(chunk, self.weights)):
                parameter.data = view

        self.owners: list[Owner] = []
        updated = []
        for group, bound in zip(groups, bounds, strict=True):
            if WHOLE_TENSORS.isdisjoint(config.optimizers):
                owners = [owner for chunk in self.chunks if (owner := self._owner(chunk, bound, masters))]
            else:
                assert not self.stage, "the configuration allows whole tensors only where nothing is divided"
                owners = list(self._whole_owners(group["params"], masters))
            updated.append(group | {"params": [owner.weights for owner in owners]})
            self.owners += owners
        self._build = partial(build_optimizer, groups=updated, config=config, fused=True)
        self.optimizer_name = config.optimizers[0]
        self.optimizer = self._build(self.optimizer_name)
        self.most_moments = max(MOST_MOMENTS[name] for name in config.optimizers)
        self._held, self._owned = self._fragments()
        self.first, self.last, self.next, self.sends = True, True, 0, world_size > 1
        if overlaps and (self.stage == 2 or len(self.chunks) > 1):
            for chunk in self.chunks:
                for parameter in chunk.parameters.values():
                    parameter.register_post_accumulate_grad_hook(partial(self._arrived, chunk))

    def _owner(self, chunk: Chunk, bound: slice, masters: torch.Tensor) -> Owner | None:
        """Return what this rank updates of a chunk and a group of parameters; None if that is nothing."""
        part = self._part(chunk)
        begin, end = max(bound.start, part.start), min(bound.stop, part.stop)
        if begin >= end:
            return None
        own = slice(0, end - begin) if self.stage else self._share(end - begin)
        return Owner(chunk, begin, self._updated(masters[begin:end]), own)

    def _whole_owners(self, parameters: list[torch.nn.Parameter], masters: torch.Tensor) -> Iterator[Owner]:
        """Yield what this rank updates of a group of parameters: each parameter in its shape."""
        wanted = {id(parameter) for parameter in parameters}
        for chunk in self.chunks:
            for at, parameter in chunk.parameters.items():
                if id(parameter) in wanted:
                    begin, numel = chunk.begin + at, parameter.numel()
                    master = masters[begin : begin + numel].view(parameter.shape)
                    yield Owner(chunk, begin, self._updated(master), self._share(numel))

    def _updated(self, master: torch.Tensor) -> torch.Tensor:
        """Return the model's own weights in fp32, else a copy: the rest of the tensor is then freed."""
        return master if self.weights.dtype == torch.float32 else master.clone()

    def _share(self, numel: int) -> slice:
        """Return this rank's share of elements that every rank updates."""
        return slice(*(numel * rank // self.world_size for rank in (self.rank, self.rank + 1)))

    def _of(self, chunk: Chunk, flat: torch.Tensor) -> torch.Tensor:
        return flat[chunk.begin : chunk.begin + chunk.numel]

    def _slice(self, chunk: Chunk) -> slice:
        """Return this rank's elements of a chunk; all of them without sharding."""
        if not self.stage:
            return slice(0, chunk.numel)
        size = chunk.numel // self.world_size
        return slice(self.rank * size, (self.rank + 1) * size)

    def _part(self, chunk: Chunk) -> slice:
        """Return the elements of the flat tensor that `_slice` stands for."""
        mine = self._slice(chunk)
        return slice(chunk.begin + mine.start, chunk.begin + mine.stop)

    def accumulate(self, inputs: dict[str, Any], weights: torch.Tensor, *, last: bool) -> torch.Tensor:
        self.begin_piece(last=last)
        loss = (self.module(**inputs) * weights).sum()
        loss.backward()
        self.end_piece()
        return loss.detach()

    def begin_piece(self, *, last: bool) -> None:
        """Expect the gradients of a piece, before its backward pass.

        Args:
            last: whether this is the step's last piece.
        """
        self.last, self.next = last, 0
        for chunk in self.chunks:
            chunk.missing = sum(parameter.requires_grad for parameter in chunk.parameters.values())

    def end_piece(self) -> None:
        """Take the gradients that a backward pass has left."""
        while self.next < len(self.chunks):  # without hooks, or with parameters that the loss does not reach
            self._complete()
        self.first = self.last  # of the next step

    def rehearse(self, inputs: dict[str, Any], weights: torch.Tensor) -> None:
        """Take the memory of a piece, of its gradients and of the optimizers' state, as a step's pieces will.

        Raises:
            torch.OutOfMemoryError: there is too little.
        """
        with self.rehearsing():
            self.accumulate(inputs, weights, last=False)

    @contextmanager
    def rehearsing(self) -> Iterator[None]:
        """Take the memory of optimizers' state; gradients of the block are sent to no rank, and dropped."""
        for owner in self.owners:
            self.state_of(owner.weights)
        more = self.most_moments - MOST_MOMENTS[self.optimizer_name]  # of a later stage's
        spare = [torch.empty_like(owner.weights) for owner in self.owners for _ in range(more)]
        self.sends = False
        try:
            yield
        finally:
            del spare
            self.first, self.sends = True, self.world_size > 1
            for chunk in self.chunks:
                chunk.kept = None
                for parameter in chunk.parameters.values():
                    parameter.grad = None

    def _arrived(self, chunk: Chunk, parameter: torch.Tensor) -> None:
        chunk.missing -= 1
        # All ranks must send in the same order.
        while self.next < len(self.chunks) and not self.chunks[self.next].missing:
            self._complete()

    @torch.no_grad()
    def _complete(self) -> None:
        """Take a chunk's gradients from its parameters, and send them if they are needed."""
        chunk = self.chunks[self.next]
        self.next += 1
        scattered = self.stage == 2
        fresh = scattered or not self.first or chunk.kept is None
        packed = self._zeros(chunk.numel) if fresh else chunk.kept
        assert packed is not None
        pairs = chunk.pairs(packed)
        there = [(view, parameter.grad) for view, parameter in pairs if parameter.grad is not None]
        if there:
            torch._foreach_copy_([view for view, _ in there], [gradient for _, gradient in there])
        if not fresh and len(there) < len(pairs):
            torch._foreach_zero_([view for view, parameter in pairs if parameter.grad is None])
        for parameter in chunk.parameters.values():
            parameter.grad = None
        if scattered:
            self._settle(chunk)
            self._send(chunk, packed)
            return
        if self.first:
            chunk.kept = packed
        else:
            assert chunk.kept is not None
            chunk.kept += packed
        if self.last:
            self._send(chunk, chunk.kept)

    def _zeros(self, numel: int) -> torch.Tensor:
        return torch.zeros(numel, dtype=self.summed_in, device=self.device)

    def _send(self, chunk: Chunk, gradients: torch.Tensor) -> None:
        """Begin to sum a chunk's gradients over the ranks."""
        if not self.sends:
            return
        if not self.stage:
            chunk.message = distributed.all_reduce(gradients, async_op=True), gradients
            return
        mine = gradients.new_empty(chunk.numel // self.world_size)
        chunk.message = distributed.reduce_scatter_single(mine, gradients, async_op=True), mine

    def _settle(self, chunk: Chunk) -> None:
        """Wait for a chunk's message; with stage 2, add it to those of earlier pieces."""
        if chunk.message is None:
            return
        work, mine = chunk.message
        work.wait()
        chunk.message = None
        if self.stage == 2:
            chunk.kept = mine if chunk.kept is None else chunk.kept.add_(mine)

    @torch.no_grad()
    def update(self, told: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gradients = [self._sum(chunk) for chunk in self.chunks]
        squared = torch.stack(torch._foreach_norm(gradients)).square().sum()
        if self.world_size > 1:
            sums = torch.cat([told, squared[None]]) if self.stage else told
            distributed.all_reduce(sums)
            if self.stage:
                told, squared = sums[:-1], sums[-1]
        norm = squared.sqrt()
        torch._foreach_mul_(gradients, (self.max_norm / (norm + 1e-6)).clamp(max=1))
        by_chunk = {chunk.begin: gradient for chunk, gradient in zip(self.chunks, gradients, strict=True)}
        for owner in self.owners:
            start = owner.begin - self._part(owner.chunk).start
            gradient = by_chunk[owner.chunk.begin]
            owner.weights.grad = gradient[start : start + owner.weights.numel()].view_as(owner.weights)
        self.optimizer.step()
        for owner in self.owners:
            owner.weights.grad = None
        self._publish()
        return told, norm

    def _sum(self, chunk: Chunk) -> torch.Tensor:
        """Return this rank's part of a chunk's gradient, summed over ranks and pieces: fp32."""
        if chunk.message is not None and self.stage == 1:
            work, mine = chunk.message
            work.wait()
            chunk.message = None
            return mine.float()
        self._settle(chunk)
        kept, chunk.kept = chunk.kept, None if self.stage == 2 else chunk.kept
        assert kept is not None
        return kept.float()

    def _publish(self) -> None:
        """Give the model, on all ranks, the weights that were updated."""
        if self.weights.dtype != torch.float32:
            torch._foreach_copy_(
                [self.weights[owner.place] for owner in self.owners],
                [owner.weights.view(-1) for owner in self.owners],
            )
        if self.stage:
            for chunk in self.chunks:
                whole = self._of(chunk, self.weights)
                distributed.all_gather_single(whole, whole[self._slice(chunk)].clone())

    @property
    def held(self) -> list[Fragment]:
        return self._held

    @property
    def owned(self) -> list[Fragment]:
        return self._owned

    @property
    def averaged(self) -> dict[str, torch.Tensor]:
        return {str(owner.begin): owner.weights.view(-1)[owner.own] for owner in self.owners}

    def average(self, averages: Mapping[str, torch.Tensor], piece: Fragment) -> torch.Tensor:
        [owner] = [owner for owner in self.owners if owner.weights is piece.owner]
        start = piece.offset - owner.own.start
        return averages[str(owner.begin)][start : start + piece.numel]

    def use_optimizer(self, name: str) -> None:
        if name != self.optimizer_name:
            self.optimizer_name, self.optimizer = name, self._build(name)

    @property
    def gradient_bytes(self) -> int:
        elements = sum(self._slice(chunk).stop - self._slice(chunk).start for chunk in self.chunks)
        if self.stage < 2:
            elements = sum(chunk.numel for chunk in self.chunks)
        return elements * self.summed_in.itemsize

    def _step_device(self, owner: torch.Tensor) -> torch.device:
        # The fused form counts there.
        return owner.device if self.optimizer_name in FUSED else super()._step_device(owner)

    def _fragments(self) -> tuple[list[Fragment], list[Fragment]]:
        """Return `held` and `owned`."""
        names = {id(parameter): name for name, parameter in self.module.all_trained}
        held: list[Fragment] = []
        owned: list[Fragment] = []
        for owner in self.owners:
            for at, parameter in owner.chunk.parameters.items():
                first = owner.chunk.begin + at - owner.begin  # element of the owner
                name, last = names[id(parameter)], first + parameter.numel()
                for low, high, found in (
                    (0, owner.weights.numel(), held),
                    (owner.own.start, owner.own.stop, owned),
                ):
                    begin, end = max(first, low), min(last, high)
                    if begin < end:
                        found.append(Fragment(name, begin - first, owner.weights, begin, end - begin))
        return held, owned


def _layout(groups: list[dict[str, Any]], world_size: int) -> tuple[list[Chunk], list[slice]]:
    """Divide the groups' parameters into chunks.

    Within a group the last parameters come first, as their gradients do.

    Returns:
        The chunks, and each group's elements of the flat tensor.
    """
    chunks, bounds, end = [Chunk(0, 0)], [], 0
    multiple = ALIGNED * world_size
    for group in groups:
        begin = end
        for parameter in reversed(group["params"]):
            chunk = chunks[-1]
            if chunk.numel >= CHUNK:
                chunk.numel = -(-chunk.numel // multiple) * multiple
                end = chunk.begin + chunk.numel
                chunk = Chunk(end, 0)
                chunks.append(chunk)
            chunk.parameters[chunk.numel] = parameter
            chunk.numel += -(-parameter.numel() // ALIGNED) * ALIGNED
            end = chunk.begin + chunk.numel
        bounds.append(slice(begin, end))
    chunks[-1].numel = -(-chunks[-1].numel // multiple) * multiple
    return chunks, bounds
