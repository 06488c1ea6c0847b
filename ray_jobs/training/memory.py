"""Memory of the training state on each rank, which ZeRO reduces (arXiv 1910.02054, section 5)."""

from collections.abc import Iterable

import torch

from ray_jobs.training.engine import Engine


def state_bytes(engine: Engine) -> dict[str, int]:
    """Return the bytes of state that this rank holds, on any device, by kind.

    parameters: the model's parameters, trained and frozen, without encoders and autoencoder.
    gradients: held between backward and step. They do not exist at the start: this is what ZeRO will keep.
    master_weights: fp32 weights that the optimizer updates; 0 where it updates the parameters themselves.
    moments: what the optimizer keeps, as two moments of AdamW.
    """
    parameters = _storages(getattr(p, "ds_tensor", p) for p in engine.module.parameters())
    owners = {id(piece.owner): piece.owner for piece in engine.held}.values()
    masters = _storages(owners)
    return {
        "parameters": sum(parameters.values()),
        "gradients": engine.gradient_bytes,
        "master_weights": sum(size for place, size in masters.items() if place not in parameters),
        "moments": sum(
            _storages(engine.state_of(o)[m] for o in owners for m in engine.moments_of(o)).values()
        ),
    }


def _storages(tensors: Iterable[torch.Tensor]) -> dict[int, int]:
    """Return the bytes of the tensors' storages by address, each storage once."""
    pieces = (tensor.untyped_storage() for tensor in tensors)
    return {piece.data_ptr(): piece.nbytes() for piece in pieces if piece.nbytes()}
