"""Modular pipelines of diffusers: their blocks, and the components that these expect."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray_jobs.diffusion.protocols import Scheduler
from ray_jobs.weights.model_index import BLOCKS, UPSAMPLER


def blocks_of(index: Mapping[str, Any]) -> Any:
    """Return new blocks of a modular pipeline, without the one that rewrites prompts with a language model.

    Args:
        index: a modular index, from `model_index`.

    Raises:
        ValueError: this diffusers does not have them.
    """
    import diffusers

    name = blocks_name(index)
    if not hasattr(diffusers, name):
        raise ValueError(
            f"model.base: its blocks {name} are not in diffusers {diffusers.__version__}; update diffusers"
        )
    blocks = getattr(diffusers, name)()
    blocks.sub_blocks.pop(UPSAMPLER, None)
    return blocks


def blocks_name(index: Mapping[str, Any]) -> str:
    """Return the class of a modular pipeline's blocks: the index's or, for unnamed ones, the pipeline's."""
    import diffusers

    kind = getattr(diffusers, index[BLOCKS] or "", None)
    if kind is None or not kind.block_classes:
        kind = getattr(diffusers, index["_class_name"])
        return str(kind.default_blocks_name)
    return str(index[BLOCKS])


def default_scheduler(index: Mapping[str, Any]) -> Scheduler:
    """Return the scheduler that a modular pipeline has where its index names none."""
    specs = {spec.name: spec for spec in blocks_of(index).expected_components}
    scheduler: Scheduler = specs["scheduler"].create()
    return scheduler


def assembled(folder: Path, index: Mapping[str, Any], parts: Mapping[str, Any]) -> Any:
    """Return a modular pipeline of loaded components; guider and scheduler are its blocks' unless given.

    `load_components` of diffusers 0.42.1 only logs that a component cannot be loaded, and leaves it out.

    Args:
        folder, index: the model's.
        parts: components by name; None for those to leave out.

    Raises:
        ValueError: the blocks are of another pipeline than the index says.
    """
    pipeline = blocks_of(index).init_pipeline(str(folder))
    if (name := type(pipeline).__name__) != index["_class_name"]:
        raise ValueError(f"model.base: its index names {index['_class_name']}, but its blocks are of {name}")
    pipeline.update_components(**{name: part for name, part in parts.items() if part is not None})
    return pipeline
