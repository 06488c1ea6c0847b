"""The whole way, from what a user brings to a picture over HTTP: prepare, search, publish, serve.

| journey    | base                                | pictures                     | method                 |
|------------|-------------------------------------|------------------------------|------------------------|
| folds      | Stable Diffusion 1.5, PNDM          | folder of shapes, buckets    | lora, folds            |
| full       | Stable Diffusion 2.1, not square    | Parquet                      | full, by a reward model |
| dora       | Stable Diffusion XL, only fp16      | tar files, dots in names     | DoRA, text encoders    |
| stream     | Stable Diffusion 3                  | folder, `encode: stream`     | lora                   |
| buckets    | FLUX.1-dev                          | folder of shapes, buckets    | lora                   |
| dreambooth | a UNet that is told its guidance    | eight photos                 | prior preservation     |
| masks      | Chroma                              | folder of shapes, buckets    | lora                   |
| masks-full | Chroma                              | folder, `encode: stream`     | full, two workers      |
| z-image    | Z-Image                             | folder of shapes, buckets    | lora                   |
| krea-2     | Krea 2, whose captions are ragged   | folder of shapes             | lora                   |
| hidream    | HiDream, with four text encoders    | folder of shapes, buckets    | lora                   |
| edits      | FLUX.2 klein                        | pairs, two references, masks | lora                   |
| edits-stream | Qwen-Image-Edit                   | pairs, two references        | lora, `encode: stream` |
| fill       | FLUX.1 Fill                         | pictures with masks          | lora                   |
| control    | Stable Diffusion 1.5                | folder of shapes, buckets    | controlnet, edges      |
| control-stream | FLUX.1-dev                      | pairs, `encode: stream`      | controlnet, two workers |
| control-zero-3 | Stable Diffusion 3              | pairs                        | controlnet, ZeRO 3, bf16 |
| quantized  | FLUX.1-dev                          | folder of shapes             | lora on an int8 base   |
| kontext    | FLUX.1 Kontext                      | pairs, one reference         | lora                   |
| assistant  | FLUX.1-schnell                      | folder of shapes             | lora with an assistant |

`FAMILIES_ALONE` are further families, whose captions, latents and adapters are what differs.

Two trials train at once, with DoRA in one worker group; but with folds each fold has one, and with a stream
its encoders take the place of the second.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from cluster.local import LocalCluster
from tests.journeys import pictures
from tests.journeys.walk import Journey, configuration, walk

JOURNEYS = [
    Journey(
        "folds",
        "Stable Diffusion 1.5",
        pictures.folder_of_shapes,
        {
            "data": {"buckets": True, "folds": 2},
            "search": {"folds": 2, "learning_rates": [0.05]},
            "train": {"batch_size": 2},
        },
        trainings=3,
    ),
    Journey(
        "full",
        "a UNet that is not square",
        pictures.parquet,
        {"train": {"method": "full"}, "search": {"learning_rates": [3e-3, 1e-3]}},
        judged=True,
    ),
    Journey(
        "dora",
        "Stable Diffusion XL, only fp16 files",
        pictures.webdataset,
        {
            "train": {"train_text_encoder": True, "caption_dropout": 0.5, "lora": {"use_dora": True}},
            "search": {"max_concurrent_trials": 1, "pack": "auto"},
        },
    ),
    Journey(
        "stream",
        "Stable Diffusion 3",
        pictures.folder_of_shapes,
        {"data": {"encode": "stream"}, "search": {"max_concurrent_trials": 1}},
    ),
    Journey(
        "buckets",
        "FLUX.1-dev",
        pictures.folder_of_shapes,
        {"data": {"buckets": True}, "train": {"batch_size": 2}},
    ),
    Journey(
        "dreambooth",
        "a UNet that is told its guidance",
        pictures.dreambooth,
        {
            "data": {"num_class_images": 2},
            "train": {"prior_loss_weight": 1.0},
            "search": {"learning_rates": [0.05], "pack": "auto"},
            "evaluate": {"subject_samples": 2},
        },
        pictures=8,
        trainings=5,  # four folds, and one on all of them
    ),
    Journey(
        "masks",
        "Chroma",
        pictures.folder_of_shapes,
        {"data": {"buckets": True}, "train": {"batch_size": 2, "gradient_checkpointing": True}},
    ),
    Journey(
        "masks-full",
        "Chroma",
        pictures.folder_of_shapes,
        {
            "data": {"encode": "stream"},
            "train": {"method": "full", "num_workers": 2, "zero_stage": 2, "caption_dropout": 0.5},
            "search": {"max_concurrent_trials": 1, "learning_rates": [3e-3, 1e-3]},
        },
    ),
    Journey(
        "z-image",
        "Z-Image",
        pictures.folder_of_shapes,
        {"data": {"buckets": True}, "train": {"batch_size": 2, "gradient_checkpointing": True}},
    ),
    Journey("krea-2", "Krea 2", pictures.folder_of_shapes, {"train": {"batch_size": 2}}),
    Journey(
        "hidream",
        "HiDream-I1",
        pictures.folder_of_shapes,
        {"data": {"buckets": True}, "train": {"batch_size": 2}},
    ),
    Journey(
        "edits",
        "FLUX.2 klein",
        pictures.pairs,
        {
            "data": {"reference_resolution": 32},
            "train": {"loss": {"outside_mask": 0.1}},
            "search": {"learning_rates": [0.02]},
        },
        trainings=1,
    ),
    Journey(
        "edits-stream",
        "Qwen-Image-Edit",
        pictures.pairs,
        {
            "data": {"encode": "stream"},
            "train": {"caption_dropout": 0.5},
            "search": {"learning_rates": [0.02]},
            "evaluate": {"prompts": ["make it red"]},
        },
        trainings=1,
    ),
    Journey(
        "fill",
        "FLUX.1 Fill",
        pictures.masked,
        {
            "train": {"loss": {"outside_mask": 1.0}},
            "search": {"learning_rates": [0.02]},
            "evaluate": {"prompts": ["a red star"]},
        },
        trainings=1,
    ),
    Journey(
        "control",
        "Stable Diffusion 1.5",
        pictures.folder_of_shapes,
        {
            "data": {"control": {"kind": "edges"}, "buckets": True},
            "train": {"method": "controlnet", "batch_size": 2, "gradient_checkpointing": True},
            "search": {"learning_rates": [0.02]},
            "evaluate": {"bootstrap": 8},
        },
        trainings=1,
    ),
    Journey(
        "control-stream",
        "FLUX.1-dev",
        pictures.grey,
        {
            "data": {"encode": "stream"},
            "train": {"method": "controlnet", "num_workers": 2, "caption_dropout": 0.5},
            "search": {"learning_rates": [0.02, 0.01], "max_concurrent_trials": 1},
        },
    ),
    Journey(
        "control-zero-3",
        "Stable Diffusion 3",
        pictures.grey,
        {
            "train": {"method": "controlnet", "num_workers": 2, "zero_stage": 3, "precision": "bf16"},
            "search": {"learning_rates": [0.02]},
        },
        trainings=1,
        tolerance=24,
    ),
    Journey(
        "quantized",
        "FLUX.1-dev",
        pictures.folder_of_shapes,
        {"model": {"quantize": "int8"}, "train": {"num_workers": 2, "precision": "bf16"}},
        tolerance=24,
    ),
    Journey(
        "kontext",
        "FLUX.1 Kontext",
        pictures.one_reference,
        {"search": {"learning_rates": [0.02]}},
        trainings=1,
    ),
    Journey(
        "assistant", "FLUX.1-schnell", pictures.folder_of_shapes, {"train": {"batch_size": 2}}, assistant=True
    ),
]
GUIDED = {"evaluate": {"guidance_scale": 3.0}}
FAST = {"search": {"learning_rates": [0.4, 0.2]}}  # else two steps would not change a picture
FAMILIES_ALONE: Mapping[str, Mapping[str, Any]] = {
    "FLUX.2 dev": {"data": {"buckets": True}, "train": {"batch_size": 2}},
    "FLUX.3 klein": {"data": {"buckets": True}, "train": {"batch_size": 2, "caption_dropout": 0.5}} | FAST,
    "FLUX.3 klein, distilled": {"train": {"batch_size": 2}, "evaluate": {"guidance_scale": 1.0}} | FAST,
    "Qwen-Image": {"data": {"buckets": True}, "train": {"batch_size": 2}} | FAST,
    "Qwen-Image 2.1": {"train": {"batch_size": 2, "gradient_checkpointing": True}} | FAST,
    "Ideogram 4": {"data": {"buckets": True}, "train": {"batch_size": 2}} | GUIDED | FAST,
    "Sana": {"train": {"method": "full"}, "search": {"learning_rates": [3e-3, 1e-3]}},
    "Lumina 2": {"data": {"buckets": True}, "train": {"batch_size": 2}},
    "AuraFlow": {"data": {"encode": "stream"}, "search": {"max_concurrent_trials": 1}},
    "PixArt-Sigma": {"train": {"batch_size": 2, "lora": {"use_dora": True}}},
}
"""Settings of a journey for each base whose family has no other."""
JOURNEYS += [
    Journey(base.lower().replace(",", "").replace(" ", "-"), base, pictures.folder_of_shapes, settings)
    for base, settings in FAMILIES_ALONE.items()
]

# By tests/ray: test_streaming, test_search, test_dreambooth, which has folds too; Z-Image by the tests of
# families and of the engine.
WALKED_IN_PARTS = (
    "dreambooth",
    "dora",
    "masks",
    "stream",
    "buckets",
    "folds",
    "masks-full",
    "z-image",
    "krea-2",
    "hidream",
    "fill",
    "quantized",
    "kontext",
    "assistant",
    "control-stream",
    "control-zero-3",
    *(journey.name for journey in JOURNEYS if journey.base in FAMILIES_ALONE),
)


@pytest.fixture(scope="module")
def port(ray_cluster: LocalCluster) -> Iterator[int]:
    """Where a Serve listens that all journeys share."""
    from ray import serve
    from ray.serve.config import ProxyLocation

    from serving.command import PATIENCE, free_port

    port = free_port("127.0.0.1", 0)
    serve.start(
        proxy_location=ProxyLocation.HeadOnly,
        http_options={"host": "127.0.0.1", "port": port},
        controller_options={"runtime_env": {"env_vars": PATIENCE}},
    )
    yield port
    serve.shutdown()


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all journeys, and so one registry; its name has what means something in a URL, SQL and YAML."""
    folder = tmp_path_factory.mktemp("storage") / "it's #1, 50%20 of what?"
    folder.mkdir()
    return folder


def marked(journey: Journey) -> Any:
    """The parameter of a journey; `make test` leaves out what other tests on Ray walk in parts."""
    marks = [pytest.mark.journeys] if journey.name in WALKED_IN_PARTS else []
    return pytest.param(journey, id=journey.name, marks=marks)


@pytest.mark.parametrize("journey", map(marked, JOURNEYS))
def test_the_served_picture_is_that_of_plain_diffusers(
    journey: Journey, ray_cluster: LocalCluster, port: int, storage: Path, tmp_path: Path
) -> None:
    walk(journey, configuration(journey, tmp_path, storage), port)
