"""Write docs/families.md: what each family can do, and the test that shows it.

python -m scripts.families_page
"""

import argparse
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

from ray_jobs.diffusion.families import FAMILIES

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "families.md"
UNIT, SERVING, CUDA = "tests/unit/test_", "tests/serving/test_", "tests/cuda/test_"
TESTS = {
    "captions are encoded as by the pipeline": (
        f"{UNIT}families.py::test_prompts_are_encoded_as_by_the_pipeline_itself"
    ),
    "a picture is the pipeline's": f"{UNIT}families.py::test_a_picture_is_that_of_the_plain_pipeline",
    "pictures of several shapes are": (
        f"{UNIT}sampling.py::test_pictures_of_several_shapes_are_those_of_plain_diffusers"
    ),
    "the loss is that of the pipeline's own pieces": (
        f"{UNIT}families.py::test_the_loss_is_that_of_the_pipelines_own_pieces"
    ),
    "LoRA and full training": (
        f"{UNIT}finetuning.py::test_every_method_lowers_the_loss_and_leaves_what_is_frozen"
    ),
    "trained adapters load again": (
        f"{UNIT}finetuning.py::test_saved_adapters_are_loaded_as_they_were_trained"
    ),
    "a whole model loads again": (
        f"{UNIT}finetuning.py::test_a_whole_pipeline_is_saved_with_the_weights_it_is_given"
    ),
    "recomputed activations": (
        f"{UNIT}families.py::test_recomputed_activations_change_neither_prediction_nor_gradients"
    ),
    "bf16 draws nearly the same": f"{UNIT}precision.py::test_bf16_draws_nearly_the_same_pictures",
    "text encoders in 4 and 8 bits": (
        f"{UNIT}quantized_text.py::test_captions_are_those_of_the_same_encoders_with_restored_weights"
    ),
    "planned memory is what autograd keeps": f"{UNIT}estimate.py::test_activations_are_what_autograd_saves",
    "a training step adds no wait to diffusers' own (pretended GPU)": (
        f"{CUDA}budget_of_training.py::test_a_training_step_never_waits_and_its_rows_come_in_one_copy"
    ),
    "a served step adds none either (pretended GPU)": (
        f"{CUDA}budget_of_serving.py::test_a_denoising_step_never_waits_and_copies_its_coefficients_once"
    ),
    "mixed batches draw the pipeline's pictures": (
        f"{SERVING}engine.py::test_every_row_of_a_changing_batch_is_the_picture_of_plain_diffusers"
    ),
    "image to image": (
        f"{SERVING}image_to_image.py::test_a_row_that_begins_with_a_picture_is_that_of_plain_diffusers_in_any_batch"
    ),
    "adapters mixed in a batch": (
        f"{SERVING}adapters.py::test_every_family_mixes_adapters_of_its_denoiser_and_text_encoders"
    ),
    "served in half precision and int8": (
        f"{SERVING}optimizations.py::test_every_family_can_be_of_half_precision_and_int8"
    ),
    "served with weights on the host": f"{SERVING}optimizations.py::test_every_family_can_be_offloaded",
    "adapters for ComfyUI": f"{UNIT}comfyui.py::test_comfyui_adds_to_each_layer_what_was_trained",
}
INTRODUCTION = f"""\
# What each family can do

{len(FAMILIES)} families of models, by the name of their pipeline in diffusers: {", ".join(FAMILIES)}.

Each line is a test, and names the families that it runs on, with small models of their own classes. Most
tests besides these run on StableDiffusionPipeline, also of what a line leaves out.
`python -m scripts.families_page` writes this page from the tests that pytest collects.

"""


def families_of_tests() -> dict[str, list[str]]:
    """Return the families that each of `TESTS` runs on, by test.

    Raises:
        RuntimeError: pytest does not find a test.
    """
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run([*command, *TESTS.values()], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)
    found: dict[str, set[str]] = defaultdict(set)
    for line in done.stdout.splitlines():
        test, bracket, values = line.partition("[")
        if bracket:
            found[test] |= FAMILIES.keys() & set(re.split(r"[-\[\]]", values))
    return {test: [name for name in FAMILIES if name in found[test]] for test in TESTS.values()}


def page() -> str:
    """Return the page."""
    found = families_of_tests()
    lines = ["| | families | test |", "|---|---|---|"]
    for what, test in TESTS.items():
        file, _, function = test.partition("::")
        lines.append(f"| {what} | {_told(found[test])} | `{function}` in [{file}](../{file}) |")
    return INTRODUCTION + "\n".join([*lines, ""])


def _told(names: list[str]) -> str:
    left_out = [name for name in FAMILIES if name not in names]
    if not left_out:
        return "all"
    return f"all but {', '.join(left_out)}" if len(left_out) < len(names) else ", ".join(names)


if __name__ == "__main__":
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    PAGE.write_text(page(), encoding="utf-8")
