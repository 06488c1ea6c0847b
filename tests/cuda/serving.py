"""Sampling and the serving engine on a pretended GPU: what launches, waits and copies a step makes.

`python -m tests.cuda serving FOLDER` prints a line of JSON for each case; FOLDER has the models of
`tests.tiny_models`, which are written there if they are missing.
"""

import json
import logging
import traceback
from pathlib import Path
from typing import Any

import torch

from ray_jobs.diffusion.families import FAMILIES, family_of
from ray_jobs.diffusion.families.family import UNET_ATTENTION
from ray_jobs.diffusion.quantization import FORMATS
from ray_jobs.diffusion.sampling import Prompts, sample_pictures
from ray_jobs.weights.loading import load_pipeline
from serving.engine.batched_lora import Adapter, BatchedLoRA, Update
from serving.engine.engine import Engine
from serving.engine.optimizations import prepare
from serving.request import Request
from tests.cuda.pretend import Pretend
from tests.tiny_models import FAMILY_MODELS, write

SWITCHES: dict[str, dict[str, Any]] = {
    "int8 weights": {"int8_weights": True},
    "encoders offloaded": {"offload": "encoders"},
    "model offloaded": {"offload": "model"},
    **{f"on {name}": {"quantization": name} for name in FORMATS},
    "on nf4, offloaded": {"quantization": "nf4", "offload": "model"},
    "text on nf4": {"text_quantization": "nf4"},
    "text on nf4, encoders offloaded": {"text_quantization": "nf4", "offload": "encoders"},
}
OF_UNETS: dict[str, dict[str, Any]] = {"channels last": {"channels_last": True}, "cached features": {}}


# Families on which every switch is tried: a UNet, a transformer, and one with captions of their own lengths.
ALL_SWITCHES = ("StableDiffusionPipeline", "FluxPipeline", "ZImagePipeline")


def requests(max_references: int, *, guided: bool = True) -> list[Request]:
    image = torch.randint(0, 256, (64, 64, 3), dtype=torch.uint8)
    looked_at = (image,) * min(max_references, 1)
    size: dict[str, Any] = {"height": 64, "width": 64}
    two, three = (2.0, 3.0) if guided else (1.0, 1.0)
    return [
        Request("a red circle", 1, 6, two, **size),
        Request("a blue cross", 2, 3, 1.0, **size, references=looked_at),
        Request("", 3, 6, three, image=image, strength=0.7, **size),
        Request("a green square", 4, 6, two, previews=1, **size),
    ]


def draw(base: Path, case: str, settings: dict[str, Any], device: Pretend) -> dict[str, Any]:
    """Draw requests that join at once; return what each engine step counted."""
    switches = dict(settings)
    stored = {name: switches.pop(name, None) for name in ("quantization", "text_quantization")}
    pipeline = load_pipeline(str(base), dtype=torch.bfloat16, **stored)
    prepare(pipeline, "cuda", **switches)
    engine = Engine(pipeline, device="cuda", max_rows=4, cache_features=case == "cached features")
    # An encoder that sees references asks the device where in a text they are, and this one has no values.
    seen = engine.family.text.sees_references
    guided = engine.family.has_guidance(pipeline.config)
    futures = [
        engine.submit(request, (lambda done, picture: None) if request.previews else None)
        for request in requests(0 if seen else engine.family.max_references, guided=guided)
    ]
    steps = []
    while engine.unfinished:
        device.reset()
        engine.step()
        steps.append(
            {
                "launches": device.launches,
                "waits": dict(device.waits),
                "to_device": dict(device.to_device),
                "pageable": sum(device.pageable.values()),
                "decoded": engine.decoder.pictures,
            }
        )
    for future in futures:
        assert future.result(0).pixels.device.type == "cpu"
    engine.close()
    matrices = {
        id(layer)
        for part in engine.model.values()
        for layer in part.modules()
        for weight in layer.parameters(recurse=False)
        if weight.ndim > 1 or not weight.is_floating_point()
    }
    return {"steps": steps, "layers": len(matrices)}


def change(base: Path, device: Pretend) -> dict[str, Any]:
    """Change a batch of rows with four adapters, of two ranks, and one row without."""
    pipeline = load_pipeline(str(base), dtype=torch.bfloat16)
    prepare(pipeline, "cuda")
    family = family_of(pipeline)
    part = getattr(pipeline, family.denoiser)
    low_rank, adapters = BatchedLoRA({family.denoiser: part}), []
    for number, rank in enumerate((4, 4, 8, 8)):
        updates = {
            (family.denoiser, name): Update(
                torch.randn(rank, layer.in_features, device="cuda", dtype=layer.weight.dtype),
                torch.randn(layer.out_features, rank, device="cuda", dtype=layer.weight.dtype),
                None,
            )
            for name, layer in part.named_modules()
            if isinstance(layer, torch.nn.Linear) and name.endswith(UNET_ATTENTION)
        }
        adapters.append(Adapter(str(number), updates))
    first, second, third, fourth = adapters
    low_rank.stack([*adapters, None], family.denoiser)
    device.reset()
    stacks = low_rank.stack([second, None, first, fourth, third], family.denoiser)
    assert len(stacks) == len(first.updates)
    return {"launches": device.launches, "waits": dict(device.waits), "to_device": dict(device.to_device)}


def sample(base: Path, device: Pretend) -> dict[str, Any]:
    """Draw as the evaluator does."""
    pipeline = load_pipeline(str(base)).to("cuda")
    device.reset()
    drawn = sample_pictures(
        pipeline,
        ["a", "b", "c"],
        [1, 2, 3],
        shapes=[(64, 64)] * 3,
        num_steps=4,
        guidance_scale=2.0 if family_of(pipeline).has_guidance(pipeline.config) else 1.0,
        batch_size=2,
    )
    assert sum(len(pictures) for pictures in drawn) == 3
    return {"waits": dict(device.waits), "to_device": dict(device.to_device)}


def take_turns(base: Path) -> dict[str, Any]:
    """Draw as the evaluator does; return where denoisers and text encoders are while each of them runs."""
    pipeline, family = load_pipeline(str(base), dtype=torch.bfloat16), FAMILIES[base.name]
    pipeline.vae.to("cuda")
    denoisers, encoders = family.model(pipeline), family.text.present(pipeline)
    seen: dict[str, set[str]] = {"denoising": set(), "encoding": set()}

    def devices(parts: dict[str, Any]) -> str:
        return ",".join(sorted({each.device.type for part in parts.values() for each in part.parameters()}))

    def saw(work: str) -> Any:
        return lambda *_: seen[work].add(f"{devices(denoisers)} {devices(encoders)}")

    for part in denoisers.values():
        part.register_forward_pre_hook(saw("denoising"))
    for part in encoders.values():
        for module in part.modules():
            if isinstance(module, torch.nn.Embedding):  # some families call parts of an encoder only
                module.register_forward_pre_hook(saw("encoding"))
    drawn = sample_pictures(
        pipeline,
        ["a", "b", "c"],
        [1, 2, 3],
        shapes=[(64, 64)] * 3,
        num_steps=2,
        guidance_scale=2.0 if family.has_guidance(pipeline.config) else 1.0,
        batch_size=2,
        encoded=Prompts(pipeline, "cuda"),
    )
    assert sum(len(pictures) for pictures in drawn) == 3
    return {work: sorted(found) for work, found in seen.items()}


def tell(**found: Any) -> None:
    print(json.dumps(found), flush=True)


def main(folder: Path) -> None:
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    torch.inference_mode = torch.no_grad  # type: ignore[assignment, misc]  # its tensors know no wrappers
    for name in FAMILY_MODELS:
        base = folder / name
        if not base.exists():
            write(name, base)
        cases: dict[str, dict[str, Any]] = {"bf16": {}, "model offloaded": SWITCHES["model offloaded"]}
        if name in ALL_SWITCHES:
            cases |= SWITCHES | (OF_UNETS if FAMILIES[name].is_unet else {})
        for case, settings in cases.items():
            try:
                with Pretend() as device:
                    tell(family=name, case=case, **draw(base, case, settings, device))
            except Exception:  # told, so that the other cases are seen too
                tell(family=name, case=case, error=traceback.format_exc())
        if name in ALL_SWITCHES:
            with Pretend() as device:
                tell(family=name, case="adapters", **change(base, device))
        try:
            with Pretend() as device:
                tell(family=name, case="sampling", **sample(base, device))
        except Exception:
            tell(family=name, case="sampling", error=traceback.format_exc())
        try:
            with Pretend():
                tell(family=name, case="turns", **take_turns(base))
        except Exception:
            tell(family=name, case="turns", error=traceback.format_exc())
