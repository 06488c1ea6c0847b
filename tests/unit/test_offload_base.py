"""Training adapters with the frozen base in host memory: the same as without."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ray_jobs.planning.footprint import footprint
from ray_jobs.training.setup import build_model
from ray_jobs.training.state import snapshot
from tests.tiny_models import FAMILY_MODELS
from tests.unit.test_quantization import CPU, TRANSFORMER, UNET, Training, config

pytestmark = pytest.mark.slow

# On a CPU the copies are in the same memory; tests/cuda has them on a pretended GPU.
HELD = ["train.use_gpu=true", "train.precision=fp32", "train.gradient_checkpointing=true"]


@pytest.mark.parametrize("name", [UNET, TRANSFORMER])
def test_a_training_equals_one_without_and_resumes_to_the_bit(
    tiny: Callable[[str], Path], name: str, tmp_path: Path
) -> None:
    base, settings = tiny(name), [*HELD, "train.lora.rank=4"]
    plain = Training(config(base, *settings))
    plain.start()
    expected = plain.run(1, 4)
    training = Training(config(base, *settings, "train.offload_base=true"))
    training.start()
    assert training.run(1, 2) == expected[:2]
    resumed = Training(config(base, *settings, "train.offload_base=true"))
    resumed.start(training.write(tmp_path / "state"))
    assert resumed.run(3, 4) == training.run(3, 4) == expected[2:]
    ours, theirs = (snapshot(each.engine, each.ema.averages)[0] for each in (resumed, plain))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert all(".lora_" in key for key in ours)
    exported = [each.weights(tmp_path / folder) for each, folder in ((plain, "plain"), (resumed, "held"))]
    one, other = (load_file(each / "pytorch_lora_weights.safetensors") for each in exported)
    assert one.keys() == other.keys() and all(one[key].equal(other[key]) for key in one)


@pytest.mark.parametrize("name", FAMILY_MODELS)
def test_every_family_is_trained_alike_with_its_base_on_the_host(
    tiny: Callable[[str], Path], name: str
) -> None:
    losses = []
    for more in ([], ["train.offload_base=true"]):
        training = Training(config(tiny(name), *HELD, "train.lora.rank=4", *more))
        training.start()
        losses.append(training.run(1, 2))
    assert training.model.host_weights is not None
    assert losses[0] == losses[1]


@pytest.mark.parametrize("name", [UNET, TRANSFORMER])
def test_the_plan_counts_the_blocks(tiny: Callable[[str], Path], name: str) -> None:
    settings = config(tiny(name), *HELD, "train.offload_base=true")
    _, model = build_model(settings)
    held, found = model.host_weights, footprint(settings)
    assert held is not None
    held.hold([each for _, each in model.all_trained], CPU)
    sizes = sorted(sum(each.host.nbytes for each in block.weights) for block in held.blocks.values())
    assert (found.blocks, found.two_blocks) == (sum(sizes), sum(sizes[-2:]))
