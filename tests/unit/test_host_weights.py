"""Frozen weights in host memory: blocks compute the same, and no more than two are copied at a time."""

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from ray_jobs.diffusion import host_weights
from ray_jobs.diffusion.host_weights import Block, Fetched, HostWeights

CPU = torch.device("cpu")
NUM_BLOCKS = 4


class Layers(nn.Module):
    """A block with a trained layer; its last operation keeps nothing, so that recomputing it stops before."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 3, padding=1)
        self.linear, self.rough = nn.Linear(8, 8), nn.Linear(8, 8).bfloat16()
        self.same = self.linear
        self.trained = nn.Linear(8, 8)
        self.fails = False

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        if self.fails:
            raise KeyError("failed")
        inner = self.linear(self.conv(self.norm(values)).flatten(2).transpose(1, 2))
        inner = self.rough(inner.bfloat16()).float() + self.same(inner) + self.trained(inner)
        return values + torch.relu(inner).transpose(1, 2).unflatten(2, values.shape[2:])


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Layers() for _ in range(NUM_BLOCKS))
        self.requires_grad_(False)
        for block in self.layers:
            block.trained.requires_grad_(True)
            block.conv.weight.data = block.conv.weight.data.to(memory_format=torch.channels_last)
        self.trained = [each for each in self.parameters() if each.requires_grad]

    @property
    def layers(self) -> list[Layers]:
        return [block for block in self.blocks if isinstance(block, Layers)]

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            values = checkpoint(block, values, use_reentrant=False)
        return values

    def step(self) -> list[torch.Tensor]:
        """Return the output and the gradients of a step."""
        torch.manual_seed(1)
        values = torch.randn(2, 8, 4, 4, requires_grad=True)
        output = self(values)
        output.square().sum().backward()
        found = [output.detach(), values.grad, *(each.grad for each in self.trained)]
        for each in self.trained:
            each.grad = None
        return [each for each in found if each is not None]


class Counted(HostWeights):
    """Counts copies, and how many of blocks were there at a time."""

    def __init__(self, stack: Stack) -> None:
        super().__init__(stack.blocks)
        self.count, self.most = 0, 0
        self.alive: list[list[StorageWeakRef]] = []
        self.hold(stack.trained, CPU)

    def _fetch(self, block: Block) -> Fetched:
        fetched = super()._fetch(block)
        self.count += 1
        self.alive.append([StorageWeakRef(each.untyped_storage()) for each in fetched.segments])
        self.most = max(self.most, self.now)
        return fetched

    @property
    def now(self) -> int:
        return sum(any(not each.expired() for each in block) for block in self.alive)


@pytest.mark.parametrize("arena", [1 << 30, 2048])
def test_a_step_is_the_same_to_the_bit_and_two_blocks_are_copied_at_a_time(
    monkeypatch: pytest.MonkeyPatch, arena: int
) -> None:
    monkeypatch.setattr(host_weights, "ARENA", arena)
    stack = Stack()
    expected, before = stack.step(), dict(stack.named_parameters())
    held = Counted(stack)
    assert all(len(block.segments) > 1 for block in held.blocks.values()) == (arena == 2048)
    for _ in range(3):
        found = stack.step()
        assert len(found) == len(expected) > 2 * NUM_BLOCKS
        assert all(ours.equal(plain) for ours, plain in zip(found, expected, strict=True))
        after = dict(stack.named_parameters())
        assert after.keys() == before.keys() and all(after[name] is before[name] for name in after)
        assert held.most <= 2 and held.now <= 1


def test_copies_are_made_ahead_and_none_in_vain() -> None:
    stack = Stack()
    held, counts = Counted(stack), []
    for _ in range(4):
        held.count = 0
        stack.step()
        counts.append(held.count)
    # The last block is kept for its recomputation, and the first one for the next step.
    assert counts == [2 * NUM_BLOCKS, 2 * NUM_BLOCKS - 1, *[2 * NUM_BLOCKS - 2] * 2]


def test_other_orders_of_blocks_and_passes_without_gradients_are_the_same() -> None:
    stack = Stack()
    values = torch.ones(1, 8, 4, 4)
    with torch.no_grad():
        expected, alone = stack(values), stack.layers[2](values)
    held = Counted(stack)
    for _ in range(2):
        stack.step()
        with torch.no_grad():
            assert stack(values).equal(expected)
            assert stack.layers[2](values).equal(alone)
    assert held.most <= 2


def test_an_error_in_a_block_leaves_its_weights_on_the_host() -> None:
    stack = Stack()
    expected, before = stack.step(), list(stack.parameters())
    held = Counted(stack)
    stack.step()
    stack.layers[1].fails = True
    with pytest.raises(KeyError, match="failed"):
        stack.step()
    stack.layers[1].fails = False
    assert all(ours is plain for ours, plain in zip(stack.parameters(), before, strict=True))
    assert all(ours.equal(plain) for ours, plain in zip(stack.step(), expected, strict=True))
    assert held.now <= 1


def test_weights_keep_their_memory_layout() -> None:
    stack = Stack()
    Counted(stack)
    assert stack.layers[0].conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert stack.layers[0].same.weight is stack.layers[0].linear.weight


def test_layers_share_the_room_of_the_largest_and_tied_ones_their_host_memory() -> None:
    sizes = [(8, 8), (8, 16), (16, 64), (64, 8), (8, 8)]
    stack = nn.Sequential(*(nn.Linear(*size, bias=False) for size in sizes)).requires_grad_(False)
    stack[4].weight = stack[0].weight
    expected = stack(values := torch.ones(2, 8))
    held = HostWeights(stack, layers=True)
    held.hold([], CPU)
    assert held.blocks[stack[0]] is held.blocks[stack[4]] and held.room == 4 * 16 * 64
    assert stack[4].weight is stack[0].weight
    ahead = []
    numbers = {layer: number for number, layer in enumerate(stack)}
    for layer in stack:
        layer.register_forward_hook(lambda *_: ahead.append([numbers[each] for each in held._ahead]))
    for _ in range(3):
        assert stack(values).equal(expected)
    assert ahead[2 * len(stack) :] == [[1], [], [], [4], [0]]  # beside the largest one there is no room
