"""Write docs/families.md: what each family can do, and the test that shows it.

python -m scripts.families_page
"""

import argparse
import json
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.families import CONTROL, EDITS, GATES, RESULTS, SERVED_EDITS
from ray_jobs.diffusion.families import FAMILIES, Family
from ray_jobs.diffusion.families.noise_schedule import RectifiedFlow
from ray_jobs.weights.loading import read_index
from tests.full_models import PUBLISHED
from tests.journeys.bases import BASES
from tests.journeys.test_journeys import JOURNEYS

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "families.md"
UNIT, SERVING, CUDA = "tests/unit/test_", "tests/serving/test_", "tests/cuda/test_"
WALKS = "tests/journeys/test_"
TESTS = {
    "captions are encoded as by the pipeline": (
        f"{UNIT}families.py::test_prompts_are_encoded_as_by_the_pipeline_itself"
    ),
    "a picture is the pipeline's": f"{UNIT}families.py::test_a_picture_is_that_of_the_plain_pipeline",
    "pictures of several shapes are": (
        f"{UNIT}sampling.py::test_pictures_of_several_shapes_are_those_of_plain_diffusers"
    ),
    "reference pictures": f"{UNIT}reference_pictures.py::test_an_edit_is_that_of_the_plain_pipeline",
    "painting into masks": (
        f"{UNIT}reference_pictures.py::test_what_is_painted_into_a_mask_is_that_of_the_plain_pipeline"
    ),
    "each row has its own guidance": f"{UNIT}families.py::test_every_row_has_its_own_guidance",
    "distilled models are recognised": (
        f"{UNIT}family_guards.py::test_who_trains_a_distilled_model_is_told_what_happens_before_it_starts"
    ),
    "too long captions are counted": (
        f"{UNIT}family_guards.py::test_a_caption_is_cut_where_its_end_no_longer_changes_what_is_read"
    ),
    "prepare, and training on its rows": (
        f"{UNIT}validation_loss.py::test_weights_trained_on_the_rows_have_a_lower_loss"
    ),
    "the loss is that of the pipeline's own pieces": (
        f"{UNIT}families.py::test_the_loss_is_that_of_the_pipelines_own_pieces"
    ),
    "LoRA and full training": (
        f"{UNIT}finetuning.py::test_every_method_lowers_the_loss_and_leaves_what_is_frozen"
    ),
    "DoRA": f"{UNIT}finetuning.py::test_dora_is_saved_and_loaded_with_its_magnitudes",
    "adapters of text encoders": f"{UNIT}weights_on_disk.py::test_every_tensor_of_an_adapter_arrives",
    "trained adapters load again": (
        f"{UNIT}finetuning.py::test_saved_adapters_are_loaded_as_they_were_trained"
    ),
    "a whole model loads again": (
        f"{UNIT}finetuning.py::test_a_whole_pipeline_is_saved_with_the_weights_it_is_given"
    ),
    "an assistant for distilled models": (
        f"{UNIT}assistant.py::test_it_computes_as_the_base_that_diffusers_fuses_it_into"
    ),
    "`model.quantize`": (
        f"{UNIT}quantization.py::test_every_family_is_trained_on_a_rounded_base_as_on_its_restored_weights"
    ),
    "`model.quantize_text`": (
        f"{UNIT}quantized_text.py::test_captions_are_those_of_the_same_encoders_with_restored_weights"
    ),
    "`train.offload_base`": (
        f"{UNIT}offload_base.py::test_every_family_is_trained_alike_with_its_base_on_the_host"
    ),
    "trials that train together": f"{UNIT}pack.py::test_members_of_a_pack_end_as_they_do_alone",
    "recomputed activations": (
        f"{UNIT}families.py::test_recomputed_activations_change_neither_prediction_nor_gradients"
    ),
    "bf16 draws nearly the same": f"{UNIT}precision.py::test_bf16_draws_nearly_the_same_pictures",
    "large pictures in tiles": f"{UNIT}tiles.py::test_every_familys_large_pictures_take_the_memory_of_a_tile",
    "planned memory is what autograd keeps": f"{UNIT}estimate.py::test_activations_are_what_autograd_saves",
    "plans of models of published size": (
        f"{UNIT}published_sizes.py::test_a_published_model_is_planned_with_the_lora_layers_of_its_family"
    ),
    "the micro batch that fits is found": f"{UNIT}rehearsal.py::test_blank_rows_are_like_those_of_a_data_set",
    "a training step adds no wait to diffusers' own (pretended GPU)": (
        f"{CUDA}budget_of_training.py::test_a_training_step_never_waits_and_its_rows_come_in_one_copy"
    ),
    "a served step adds none either (pretended GPU)": (
        f"{CUDA}budget_of_serving.py::test_a_denoising_step_never_waits_and_copies_its_coefficients_once"
    ),
    "mixed batches draw the pipeline's pictures, also with negative prompts": (
        f"{SERVING}engine.py::test_every_row_of_a_changing_batch_is_the_picture_of_plain_diffusers"
    ),
    "image to image": (
        f"{SERVING}image_to_image.py::test_a_row_that_begins_with_a_picture_is_that_of_plain_diffusers_in_any_batch"
    ),
    "edits are the pipeline's, in mixed batches": (
        f"{SERVING}served_edits.py::test_every_edit_in_a_changing_batch_is_that_of_the_plain_pipeline"
    ),
    "paintings are the pipeline's, in mixed batches": (
        f"{SERVING}served_masks.py::test_every_painting_in_a_changing_batch_is_that_of_the_plain_pipeline"
    ),
    "ControlNets are trained, for diffusers": (
        f"{UNIT}control_training.py::test_a_training_writes_a_control_net_that_plain_diffusers_reads"
    ),
    "what a ControlNet steers is the pipeline's, in mixed batches": (
        f"{SERVING}served_control.py::test_every_steered_row_of_a_changing_batch_is_that_of_the_plain_pipeline"
    ),
    "adapters follow control images, for diffusers": (
        f"{UNIT}control_lora.py::test_plain_diffusers_reads_it_and_draws_the_same_picture"
    ),
    "what follows control images by such an adapter is the pipeline's, in mixed batches": (
        f"{SERVING}served_control_lora.py::test_every_row_of_a_changing_batch_is_that_of_the_plain_pipeline"
    ),
    "adapters mixed in a batch": (
        f"{SERVING}adapters.py::test_every_family_mixes_adapters_of_its_denoiser_and_text_encoders"
    ),
    "served in half precision and int8": (
        f"{SERVING}optimizations.py::test_every_family_can_be_of_half_precision_and_int8"
    ),
    "served with weights on the host": f"{SERVING}optimizations.py::test_every_family_can_be_offloaded",
    "`serve.cache_features`": f"{SERVING}deepcache.py::test_a_picture_is_the_same_alone_and_in_a_batch",
    "folders as they are published": f"{WALKS}bases.py::test_the_engine_draws_what_plain_diffusers_draws",
    "adapters for ComfyUI": f"{UNIT}comfyui.py::test_comfyui_adds_to_each_layer_what_was_trained",
    "the whole way on Ray, from pictures over a search to HTTP": (
        f"{WALKS}journeys.py::test_the_served_picture_is_that_of_plain_diffusers"
    ),
}
FACETS: Mapping[str, Callable[[Family], bool]] = {
    "the loss is that of the pipeline's own pieces": lambda family: isinstance(
        family.schedule, RectifiedFlow
    ),
    "adapters of text encoders": lambda family: bool(family.trainable_encoders),
    "reference pictures": lambda family: bool(family.max_references),
    "edits are the pipeline's, in mixed batches": lambda family: bool(family.max_references),
    "painting into masks": lambda family: family.paints_masks,
    "paintings are the pipeline's, in mixed batches": lambda family: family.paints_masks,
    "ControlNets are trained, for diffusers": lambda family: bool(family.control),
    "what a ControlNet steers is the pipeline's, in mixed batches": lambda family: bool(family.control),
    "adapters follow control images, for diffusers": lambda family: bool(family.control_channels),
    "what follows control images by such an adapter is the pipeline's, in mixed batches": (
        lambda family: bool(family.control_channels)
    ),
    "`serve.cache_features`": lambda family: family.is_unet,
    "adapters for ComfyUI": lambda family: family.comfyui_layer(family.denoiser, "layer") is not None,
}
"""What a family itself says about a capability; all others should have them."""
HEADINGS = {
    "lora": "LoRA",
    "full": "full training",
    CONTROL: "a ControlNet",
    EDITS: "with a reference",
    "served": "served",
    SERVED_EDITS: "edits",
}
"""Of the columns of ratios, by part of the benchmark."""
INTRODUCTION = f"""\
# What each family can do

{len(FAMILIES)} families of models, by the name of their pipeline in diffusers.

Each column is a test below, which runs on small models of the family's own classes: **x** where it runs on
the family, **-** where the family says that it does not have this, and nothing where no test has shown it.
Most tests besides these run on StableDiffusionPipeline, also of what a column leaves out.
`python -m scripts.families_page` writes this page from the tests that pytest collects.

"""
FASTER = """\
## Beside plain diffusers

`python -m benchmarks.families`: small models on one thread, in fp32, in turns with the rival in the same run,
beside other work on the machine, so that a ratio of training is uncertain by a tenth. Small models show what
is not the model. Training is compared with a plain loop over the same diffusers class, whose batch lies in
memory: images a second, aim {lora}. Serving is compared with the family's own pipeline called eight times,
for requests that differ in prompt, seed, steps and guidance, and for edits of which each has a reference: aim
{served}. Ratios below the aim are **bold**.

What a step costs beside the model is the same for all: inputs take 1.4 ms in a thread of their own, and small
models' steps 20 to 150. For each caption Krea 2's pipeline gives its denoiser 517 tokens, and Ideogram 4's
2,048; ours cuts them to the longest.

"""


@cache
def families_of_tests() -> dict[str, list[str]]:
    """Return the families that each of `TESTS` runs on, by test; none where it is marked to be skipped.

    Raises:
        RuntimeError: pytest does not find a test.
    """
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    runs = ["-m", "not skip and not xfail"]
    done = subprocess.run(
        [*command, *runs, *TESTS.values()], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)
    found: dict[str, set[str]] = defaultdict(set)
    named = families_of_names()
    for line in done.stdout.splitlines():
        test, bracket, values = line.partition("[")
        if bracket:
            found[test] |= FAMILIES.keys() & {*re.split(r"[-\[\]]", values), named.get(values[:-1], "")}
    return {test: [name for name in FAMILIES if name in found[test]] for test in TESTS.values()}


def families_of_names() -> dict[str, str]:
    """Return the family of each published model and of each journey, by its name in the tests."""
    found = {name: model.pipeline for name, model in PUBLISHED.items()}
    with TemporaryDirectory() as root:
        for number, (name, write) in enumerate(BASES.items()):
            found[name] = read_index(str(write(Path(root) / str(number))))["_class_name"]
    return found | {journey.name: found[journey.base] for journey in JOURNEYS}


def page() -> str:
    """Return the page."""
    walked = families_of_tests()
    numbers = range(1, len(TESTS) + 1)
    lines = ["| | " + " | ".join(map(str, numbers)) + " |", "|---|" + ":-:|" * len(TESTS)]
    for name in FAMILIES:
        lines.append(f"| {name} | " + " | ".join(cell(name, what, walked) for what in TESTS) + " |")
    lines += ["", "| | what | test |", "|---|---|---|"]
    for number, (what, test) in enumerate(TESTS.items(), start=1):
        file, _, function = test.partition("::")
        lines.append(f"| {number} | {what} | `{function}` in [{file}](../{file}) |")
    return INTRODUCTION + "\n".join([*lines, "", ""]) + FASTER.format_map(GATES) + ratios()


def cell(name: str, what: str, walked: Mapping[str, list[str]]) -> str:
    """Return a cell of the table of capabilities."""
    if name in walked[TESTS[what]]:
        return "x"
    return "" if has(name, what) else "-"


def has(name: str, what: str) -> bool:
    """Return whether a family has a capability, as far as its facets tell."""
    return what not in FACETS or FACETS[what](FAMILIES[name])


def ratios() -> str:
    """Return the table of the benchmark's ratios."""
    measured: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8"))["families"]
    headings = [*(HEADINGS[part] for part in GATES), "lines of its file"]
    lines = [f"| | {' | '.join(headings)} |", "|---|" + "--:|" * len(headings)]
    for name in FAMILIES:
        figures = measured[name]
        told = [
            _ratio(figures[part]["ratio"], aim) if part in figures else "-" for part, aim in GATES.items()
        ]
        lines.append(f"| {name} | {' | '.join(told)} | {figures['lines']} |")
    return "\n".join([*lines, ""])


def _ratio(ratio: float, aim: float) -> str:
    return f"{ratio:.2f}" if ratio >= aim else f"**{ratio:.2f}**"


if __name__ == "__main__":
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    PAGE.write_text(page(), encoding="utf-8")
