"""The distilled checkpoints of FLUX.3 Image Klein: flow maps, which are told where each step ends.

They sample in 16 steps without guidance. Training lowers the error of the velocity, which is that of steps
without length (Boffi et al., arXiv 2406.07507); whether long steps stay right, only pictures tell. Train the
base ones.
"""

from typing import Any

from ray_jobs.diffusion.families.flux_3 import Flux3Klein
from ray_jobs.diffusion.protocols import Denoiser, Pipeline, Settings


class Flux3KleinDistilled(Flux3Klein):
    """FLUX.3 Image Klein, distilled."""

    pipeline_class = "Flux3DistilledModularPipeline"
    blocks = "Flux3DistilledAutoBlocks"
    flow_map = True

    def takes_next_timestep(self, denoiser: Denoiser) -> bool:
        return True

    def is_distilled(self, pipeline: Pipeline) -> bool:
        return True

    def has_guidance(self, settings: Settings) -> bool:
        return False

    def guidance_arguments(self, denoiser: Settings, scale: float) -> dict[str, Any]:
        return {}
