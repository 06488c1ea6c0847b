"""Edits of real pictures: a small model learns to render emoji in 3D, and draws what it never saw."""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cluster.local import LocalCluster
from ray_jobs.config import Config
from ray_jobs.diffusion.families import FAMILIES, tiny
from ray_jobs.diffusion.families.flux_3 import LAYERS
from ray_jobs.pipeline import pipeline

ROOT = Path(__file__).parents[2]
PAIRS, SIDE = ROOT / "examples" / "emoji-pairs", 64


def editor(folder: Path) -> Path:
    """FLUX.3 of random weights, whose autoencoder is that of the demo's model with FLUX.3's batch norm."""
    from diffusers import AutoencoderKL, AutoencoderKLFlux2, Flux3Transformer2DModel

    lines = (PAIRS / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    model: Any = FAMILIES["Flux3ModularPipeline"].tiny([json.loads(line)["text"] for line in lines])
    trained = AutoencoderKL.from_pretrained(str(ROOT / "models" / "emoji-base"), subfolder="vae")
    autoencoder = AutoencoderKLFlux2(
        block_out_channels=trained.config.block_out_channels,
        layers_per_block=trained.config.layers_per_block,
        latent_channels=trained.config.latent_channels,
        norm_num_groups=trained.config.norm_num_groups,
    )
    autoencoder.load_state_dict(trained.state_dict() | autoencoder.bn.state_dict(prefix="bn."))
    files = sorted(PAIRS.glob("*/*.webp"))[::4]
    with torch.no_grad():
        encoded = [trained.encode(_pixels(file)).latent_dist.mean for file in files]
    channels = torch.nn.functional.pixel_unshuffle(torch.cat(encoded), 2).transpose(0, 1).flatten(1)
    autoencoder.bn.running_mean.copy_(channels.mean(dim=1))
    autoencoder.bn.running_var.copy_(channels.var(dim=1))
    torch.manual_seed(0)
    transformer = Flux3Transformer2DModel(
        in_channels=len(channels),
        cond_in_channels=len(channels),
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=len(LAYERS) * tiny.QWEN_WIDTH,
        timestep_channels=64,
        axes_dims_rope=(8, 8, 8, 8),
    )
    model.update_components(vae=autoencoder, transformer=transformer)
    model.save_pretrained(str(folder), overwrite_modular_index=True)
    return folder


def _pixels(file: Path) -> torch.Tensor:
    picture = Image.open(file).convert("RGBA").resize((SIDE, SIDE))
    white = Image.new("RGBA", picture.size, "white")
    white.alpha_composite(picture)
    return torch.from_numpy(np.array(white.convert("RGB"))).permute(2, 0, 1)[None] / 127.5 - 1


@pytest.mark.journeys
@pytest.mark.timeout(1800)
def test_held_out_edits_come_nearer_to_their_targets_than_those_of_the_base(
    ray_cluster: LocalCluster, tmp_path: Path
) -> None:
    given = {
        "name": "edits",
        "storage": str(tmp_path / "runs"),
        "data": {"sources": [{"path": str(PAIRS), "reference_columns": ["before"]}], "resolution": SIDE},
        "model": {"base": str(editor(tmp_path / "base"))},
        "train": {"method": "full", "num_workers": 1, "batch_size": 16},
        "search": {"learning_rates": [2e-3], "ladder": [100, 400]},
        "evaluate": {
            "num_actors": 1,
            "inference_steps": 12,
            "guidance_scale": 1.0,
            "num_samples": 32,
            "feature_network": {"kind": "efficientnet-lite0"},
            "second_network": None,
            "memorisation_pictures": 0,
        },
        "publish": {"model_name": "edits"},
    }
    config = Config.model_validate(given)
    pipeline(config, Namespace(fresh=False))
    run = tmp_path / "runs" / "edits"
    winner = json.loads((run / "winner.json").read_text())
    assert (winner["ranked_by"], winner["step"]) == ("target", 400)
    before, after = ((winner[f"{of}test_target"], winner[f"{of}test_target_error"]) for of in ("base_", ""))
    assert after[0] + 3 * after[1] < before[0] - 3 * before[1]
    assert after[0] < 0.7 * before[0] and 0 < winner["unedited_test_target"] < after[0]
    report = (run / "report.html").read_text(encoding="utf-8")
    assert all(f"<small>{name}</small>" in report for name in ("before", "base", "fine-tuned", "target"))
    assert "their targets on the test split" in report and "Distance of edits to their targets" in report
