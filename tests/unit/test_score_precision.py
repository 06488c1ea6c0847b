"""The benchmark of precisions: it runs, and its emulation rounds as bf16 does."""

import hashlib
import math
from pathlib import Path

import torch

from benchmarks.score_precision import DRAWINGS, FEATURES, PLAIN, in_bf16, measure
from ray_jobs.metrics.feature_network import Preprocessing
from ray_jobs.metrics.networks import NetworkSpec, load_network

PREPARED = Preprocessing(16, "bilinear", mean=(128, 128, 128), std=(128, 128, 128))


def a_network() -> torch.jit.ScriptModule:
    """Return 8 features of pictures of 16 x 16 pixels."""
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8, eps=1e-3), torch.nn.ReLU()]
    pool = [torch.nn.AvgPool2d(14), torch.nn.Flatten()]
    scripted: torch.jit.ScriptModule = torch.jit.script(torch.nn.Sequential(*layers, *pool).eval())
    return scripted


def test_each_precision_moves_each_measure_by_some_share_of_its_error(
    tiny_model: Path, tmp_path: Path
) -> None:
    path = tmp_path / "network.pt"
    a_network().save(str(path))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    spec = NetworkSpec("torchscript", str(path), digest, "small", PREPARED)
    generator = torch.Generator().manual_seed(0)
    real = torch.randint(0, 256, (24, 3, 64, 64), dtype=torch.uint8, generator=generator)
    captions = [f"shape {number}" for number in range(8)]
    found = list(measure(str(tiny_model), load_network(spec), real, captions, num_steps=2))
    assert {each.drawing for each in found} == {*DRAWINGS, FEATURES} - {PLAIN} and len(found) == 20
    assert {each.measure for each in found} == {"FID", "corrected FID", "KID", "MIND"}
    assert all(math.isfinite(each.value) and each.error > 0 and str(each) for each in found)
    assert all((each.paired is None) == (each.drawing == FEATURES) for each in found)
    assert all(each.value for each in found if each.drawing == "nf4")


def test_the_emulation_is_that_of_bf16() -> None:
    pixels = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        plain, real = a_network()(pixels), a_network().to(torch.bfloat16)(pixels.bfloat16()).float()
        emulated = in_bf16(a_network())(pixels)
    assert (emulated == real).float().mean() > 0.9
    assert not (plain == real).any()
