"""Find the weight files in a component's folder: plain, a variant (fp16), or in an unsupported format.

Names are those of diffusers and transformers, for example `diffusion_pytorch_model.fp16.safetensors` or
`model.fp16-00001-of-00002.safetensors`. This module looks at names only and imports neither library.
"""

import re
from collections.abc import Iterable

WEIGHTS = re.compile(
    r"^(?P<stem>(?:diffusion_pytorch_)?model)(?:\.(?P<variant>[A-Za-z0-9_]+))?(?P<shard>-\d{5}-of-\d{5})?"
    r"\.safetensors$"
)
SHARDS = re.compile(
    r"^(?P<stem>(?:diffusion_pytorch_)?model)\.safetensors\.index(?:\.(?P<variant>[A-Za-z0-9_]+))?\.json$"
)
OTHER_FORMATS = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack", ".h5", ".onnx", ".onnx_data")
LATE = ("non_ema", "no_ema")  # the variant that is not used for sampling, so the last choice


def variant_of(names: Iterable[str]) -> str | None:
    """Return the variant of a component to load; None for the plain files, which take precedence.

    Args:
        names: names of the files in the component's folder.
    """
    found = {match["variant"] for name in names if (match := WEIGHTS.match(name))}
    if not found or None in found:
        return None
    return min(found, key=lambda name: (name in LATE, name != "fp16", name))


def is_weights(name: str) -> bool:
    """Return whether a file, of any format, holds weights or is an index of weight files."""
    return bool(WEIGHTS.match(name) or SHARDS.match(name)) or name.endswith(OTHER_FORMATS)


def plain_name(name: str, variant: str | None) -> str | None:
    """Return a file's name without the chosen variant; None for weights of other variants or formats."""
    match = WEIGHTS.match(name)
    if match:
        return f"{match['stem']}{match['shard'] or ''}.safetensors" if match["variant"] == variant else None
    match = SHARDS.match(name)
    if match:
        return f"{match['stem']}.safetensors.index.json" if match["variant"] == variant else None
    return None if is_weights(name) else name


def require_safetensors(component: str, names: Iterable[str]) -> None:
    """Raise ValueError if a component has no weights in safetensors format.

    Args:
        component: name of the component for the error message.
        names: names of the files in its folder.
    """
    names = sorted(names)
    if any(WEIGHTS.match(name) for name in names):
        return
    other = next((name for name in names if name.endswith(OTHER_FORMATS)), None)
    if other:
        raise ValueError(
            f"{component} has weights only as {other}, but only safetensors are read; save the "
            "model with diffusers' save_pretrained(..., safe_serialization=True) and use that folder"
        )
    raise ValueError(f"{component} has no weights (*.safetensors); download the model again")
