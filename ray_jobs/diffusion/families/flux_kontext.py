"""FLUX.1 Kontext of Black Forest Labs: FLUX.1 that edits a reference picture (arXiv 2506.15742)."""

from typing import Any

from ray_jobs.diffusion.families.flux import Flux
from ray_jobs.diffusion.protocols import Pipeline


class FluxKontext(Flux):
    """FLUX.1 Kontext: the reference's patches follow the image's, as those of picture 1."""

    pipeline_class = "FluxKontextPipeline"
    max_references = 1
    native = (1024, 1024)
    variants = ("",)
    control = None
    control_channels = None

    def is_distilled(self, pipeline: Pipeline) -> bool:
        return False

    def size_arguments(self, height: int, width: int) -> dict[str, Any]:
        # Else it draws images of 1024 x 1024 pixels at the ratio, and scales references to these sizes.
        return {"max_area": height * width, "_auto_resize": False}
