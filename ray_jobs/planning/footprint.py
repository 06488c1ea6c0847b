"""Size of a training: the module itself, built without memory, says what it holds and what autograd keeps.

The forward pass runs on PyTorch's fake tensors, which have shapes but no data, as on a CPU, where attention
keeps what fused kernels keep. With gradient checkpointing each block keeps its inputs, and one block at a
time everything.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily

from ray_jobs.config import WHOLE_TENSORS, Config
from ray_jobs.data.encoding.shapes import shown_tokens, square_latents, square_references
from ray_jobs.diffusion.families import Conditions, Family
from ray_jobs.diffusion.families.control import CONTROL
from ray_jobs.diffusion.families.family import MASK_PIXELS, MASKED, reference
from ray_jobs.diffusion.finetuning import ADAPTER, FineTuning
from ray_jobs.diffusion.pack import Pack
from ray_jobs.diffusion.precision import PRECISIONS, cast, to_precision
from ray_jobs.diffusion.protocols import Denoiser, TextEncoder
from ray_jobs.diffusion.quantization import QuantizedLinear
from ray_jobs.diffusion.recomputation import EveryNth
from ray_jobs.diffusion.sampling import whole_pictures
from ray_jobs.training.optimizers import moments_of
from ray_jobs.training.setup import empty_finetuning

ROWS = 13  # of a pass that looks for layers with other rows: few numbers of tokens are multiples


@dataclass(frozen=True)
class Footprint:
    """What a training's module holds.

    Attributes:
        base: weights of the base model in it, without adapters.
        quantized: those of them in quantized layers; `quantized_bytes`: what these take.
        trained: parameters that the optimizer updates, adapters included.
        activations: bytes that autograd keeps for one row between the forward and the backward pass.
        fixed: bytes that it keeps whatever the number of rows: the matrices that LoHa, LoKr and OFT make.
        moments: numbers that an optimizer keeps for each trained one, by its name; of those to which shapes
            matter.
        blocks: bytes of the frozen weights of the denoiser's blocks; `two_blocks`: of the two largest.
    """

    base: int
    trained: int
    activations: int
    quantized: int = 0
    quantized_bytes: int = 0
    blocks: int = 0
    two_blocks: int = 0
    fixed: int = 0
    moments: Mapping[str, float] = field(default_factory=dict)

    def whole(self, method: str) -> int:
        """Return the number of parameters in the module, adapters included."""
        return self.base + (self.trained if method == "lora" else 0)


def footprint(config: Config) -> Footprint:
    """Measure the training that a configuration describes; only the model's configuration files are read.

    Raises:
        ValueError: a setting does not suit the base model; the message names it.
    """
    model = empty_finetuning(config)
    trained = sum(parameter.numel() for _, parameter in model.all_trained)
    layers = [layer for layer in model.modules() if isinstance(layer, QuantizedLinear)]
    stored = [parameter for layer in layers for parameter in (layer.stored, layer.scales)]
    quantized = sum(layer.out_features * layer.in_features for layer in layers)
    whole = sum(parameter.numel() for parameter in model.parameters())
    whole += quantized - sum(parameter.numel() for parameter in stored)
    base = whole - (trained if config.train.method == "lora" else 0)
    num_bytes = sum(parameter.nbytes for parameter in stored)
    if config.train.method == "lora" and config.train.lora.kind != "lora":
        # One row is no measure of the next: of a single one some copies are not made.
        two_rows = _activations(config, empty_finetuning(config), rows=2)
        activations = _activations(config, model, rows=3) - two_rows  # casts the model
        fixed = two_rows - 2 * activations
    else:
        activations, fixed = _activations(config, model), 0  # casts the model
    blocks = [
        sum(each.nbytes for each in block.parameters() if not each.requires_grad) for block in model.blocks()
    ]
    two = sum(sorted(blocks)[-2:])
    moments: dict[str, float] = {
        name: sum(size.numel() for _, p in model.all_trained for size in moments_of(name, p.shape).values())
        / trained
        for name in WHOLE_TENSORS
    }
    return Footprint(base, trained, activations, quantized, num_bytes, sum(blocks), two, fixed, moments)


def _activations(config: Config, model: FineTuning, rows: int = 1) -> int:
    saved = SavedTensors(model)
    if config.train.preference and config.train.preference.loss == "dpo":
        rows *= 2  # a row is a pair
    if config.train.gradient_checkpointing:
        for part in model.model.values():
            every = EveryNth(config.train.checkpoint_every, saved.recomputed)
            model.family.enable_gradient_checkpointing(part, every)
    _pass(config, model, saved.counting, rows)
    return saved.num_bytes + saved.largest_block


def _pass(
    config: Config, model: FineTuning, watched: Callable[[], AbstractContextManager[None]], rows: int = 1
) -> None:
    """Run a forward pass of a model on the meta device without data; it is cast to its precision.

    Args:
        watched: context of the pass.
    """
    dtype = PRECISIONS[config.train.precision]
    to_precision(model.train(), dtype)
    with FakeTensorMode(allow_non_fake_inputs=True), _constants_of(rows):
        model.to_empty(device="cpu")
        conditions = blank_conditions(config, model.family, model.denoiser, model.text_encoders, rows)
        with watched():
            if model.text_encoders:
                conditions |= model.family.text.embed(model.text_encoders, conditions)
            conditions = {name: cast(each, dtype) for name, each in conditions.items()}
            latents = torch.empty((rows, *square_latents(config)), dtype=dtype)
            model.family.denoise(model.model, latents, torch.full((rows,), 500.0), conditions)


@contextmanager
def _constants_of(rows: int) -> Iterator[None]:
    """Let fake tensors of so many elements have known values: Lumina 2 counts the tokens of each row."""
    before = fake_tensor.CONSTANT_NUMEL_LIMIT
    fake_tensor.CONSTANT_NUMEL_LIMIT = max(before, rows)
    try:
        yield
    finally:
        fake_tensor.CONSTANT_NUMEL_LIMIT = before


def check_rows(config: Config) -> None:
    """Check that all layers with adapters see the rows of the batch one after the other, as a pack needs.

    Raises:
        ValueError: one does not, or a setting does not suit the base model; the message names it.
    """
    model = empty_finetuning(config)
    Pack(model).divide([ADAPTER], ROWS)
    _pass(config, model, nullcontext, ROWS)


def blank_conditions(
    config: Config,
    family: Family,
    denoiser: Denoiser,
    text_encoders: Mapping[str, TextEncoder] | None = None,
    rows: int = 1,
) -> Conditions:
    """Return conditions without data, and tokens where `text_encoders` are trained."""
    found = {
        name: torch.empty((rows, *shape), dtype=dtype)
        for name, (shape, dtype) in family.text.shapes(denoiser.config).items()
    }
    side = config.data.resolution
    if shown := shown_tokens(config, family.text):
        for name in family.text.embeds:
            _, tokens, *width = found[name].shape
            found[name] = torch.empty((rows, tokens + shown, *width), dtype=found[name].dtype)
    for mask in found.values():
        if mask.dtype == torch.bool and isinstance(mask, FakeTensor):
            # Captions have their greatest length: some denoisers count the tokens of each.
            with unset_fake_temporarily():
                mask.constant = torch.ones(mask.shape, dtype=torch.bool)
    for name, encoder in zip(family.text.tokens, family.text.encoders, strict=False):
        if text_encoders and encoder in text_encoders:
            count = family.text.num_tokens(name, text_encoders[encoder])
            found[name] = torch.ones((rows, count), dtype=torch.int64)
    if family.paints_masks:
        found[MASKED] = torch.empty((rows, *square_latents(config)))
        found[MASK_PIXELS] = torch.empty((rows, 1, side, side), dtype=torch.bool)
    if config.data.has_control:
        shape = (3, side, side) if family.control_form == "pixels" else square_latents(config)
        found[CONTROL] = torch.empty((rows, *shape))
    for number, latents in enumerate(square_references(config)):
        found[reference(number)] = torch.empty((rows, *latents))
    return found | whole_pictures(family, rows, side, side)


class SavedTensors:
    """Bytes of the tensors that autograd saves, other than the module's weights, each storage once."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.module, self.largest_block = module, 0
        self._weights: set[int] = set()
        self._storages: dict[int, torch.UntypedStorage] = {}

    @property
    def num_bytes(self) -> int:
        return sum(storage.nbytes() for storage in self._storages.values())

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count what is saved within the block."""
        self._weights = {parameter.untyped_storage()._cdata for parameter in self.module.parameters()}
        with self._keeping():
            yield

    def _keeping(self) -> AbstractContextManager[Any]:
        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in self._weights:
                self._storages[storage._cdata] = storage
            return tensor

        return torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)

    def recomputed(self, block: Callable[..., Any], *args: Any, **named: Any) -> Any:
        """Run a block that is recomputed in the backward pass: it keeps its inputs only."""
        inside = SavedTensors(self.module)
        inside._weights = self._weights
        with inside._keeping():
            output = block(*args, **named)
        self.largest_block = max(self.largest_block, inside.num_bytes)
        for each in (*args, *named.values()):
            if isinstance(each, torch.Tensor):
                storage = each.untyped_storage()
                self._storages[storage._cdata] = storage
        return output
