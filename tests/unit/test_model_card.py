"""The model card: the Hub reads it, its program runs, and nothing a user wrote becomes markup."""

import contextlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard, ModelCardData
from PIL import Image

from ray_jobs.config import Config
from ray_jobs.diffusion.families import family_of
from ray_jobs.diffusion.finetuning import FineTuning, add_lora
from ray_jobs.diffusion.objectives import LossSettings
from ray_jobs.publishing.model_card import PublishedBase, model_card, portable, usage
from ray_jobs.publishing.pages import guidance_arguments
from ray_jobs.run.manifest import Manifest
from ray_jobs.run.records import Winner
from ray_jobs.weights.loading import load_pipeline
from ray_jobs.weights.model_files import variant_name, without_lora_loader
from ray_jobs.weights.saving import save_lora
from tests.cards import program
from tests.unit.test_report import MANIFEST, REMEMBERED
from tests.unit.test_report import WINNER as REPORTED

WINNER = REPORTED | {"validation_num_samples": 90}


def config_of(base: str = "org/model", **changes: Any) -> Config:
    return Config.model_validate(
        {
            "name": "demo",
            "data": {"source": "/home/someone/pictures", "resolution": 64},
            "model": {"base": base},
            "search": {"learning_rates": [1e-3, 3e-4], "ladder": [100, 400]},
            "evaluate": {"inference_steps": 2},
            "publish": {"tracking_uri": "http://someone:secret@mlflow"},
            **changes,
        }
    )


def card(config: Config | None = None, **changes: Any) -> str:
    values: dict[str, Any] = {
        "config": config or config_of(),
        "base": PublishedBase(),
        "winner": WINNER,
        "manifest": MANIFEST,
        "prompt": "a red apple",
        "guidance": {"guidance_scale": 3.0},
        "pictures": [("a red apple", "images/0-a-red-apple.png")],
    }
    values |= changes
    values["winner"] = Winner.model_validate(values["winner"])
    values["manifest"] = Manifest.model_validate(values["manifest"])
    return model_card(**values)


def test_the_hub_reads_the_front_matter() -> None:
    read = ModelCard(card())
    assert isinstance(read.data, ModelCardData)
    assert read.data.to_dict() == {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "base_model": "org/model",
        "base_model_relation": "adapter",
        "tags": ["text-to-image", "diffusers", "lora", "diffray"],
        "widget": [{"text": "a red apple", "output": {"url": "images/0-a-red-apple.png"}}],
    }
    assert read.data.license is None


def test_a_base_in_a_folder_is_no_base_of_the_hub() -> None:
    read = ModelCard(card(config_of("/home/someone/base"), base=PublishedBase(on_hub=False)))
    assert "base_model" not in read.data.to_dict()
    assert "the text-to-image model base" in read.text


def test_other_kinds_of_adapters_are_named() -> None:
    text = card(config_of(train={"lora": {"kind": "lokr", "rank": 4}}))
    assert "LoRA weights (trained as LoKr of rank 4)" in text and "LoKr, rank 4, alpha 16" in text
    text = card(config_of(train={"lora": {"kind": "oft", "block": 8}}))
    assert "orthogonal matrices (OFT, blocks of 8) merged into its layers" in text
    assert "load_lora_weights" not in text


def test_a_model_that_was_trained_whole_has_no_adapter() -> None:
    read = ModelCard(card(config_of(train={"method": "full"})))
    assert read.data.to_dict()["base_model_relation"] == "finetune"
    assert "lora" not in read.data.to_dict()["tags"] and "load_lora_weights" not in read.text


def test_the_scores_stand_with_their_counts_the_base_the_floor_and_the_network() -> None:
    text = ModelCard(card()).text
    assert "| this model | 110.0 | 99.5 |" in text
    assert "| base model | 210.0 | 214.6 |" in text
    assert "| real training pictures (the floor) | 70.0 | – |" in text
    assert "| pictures | 96 generated, 91 real | 90 generated, 90 real |" in text
    assert WINNER["feature_network"] in text


def test_a_test_split_that_was_read_again_is_told() -> None:
    assert "The test split was used once" in card()
    assert "The test split was used 2 times" in card(winner=WINNER | {"test_reads": 2})


def test_near_copies_are_given_with_the_share_expected_without_memorisation() -> None:
    copies = {"metric": "near copies", "value": 0.031, "num_samples": 96, "feature_network": "inception"}
    copies |= {"num_training": 1000, "expected_share": 0.01, "sensitivity": 0.97}
    for_training = copies | {"metric": "near copies, training captions", "value": 0.25}
    measured = {"base": [copies, for_training], "winner": [copies, for_training]}
    text = card(winner=WINNER | {"measures": measured})
    expected = (
        "one of 1,000 training images than 99% of images that were not trained on are: {}. Without"
        " memorisation about 1% are expected."
    )
    assert expected.format("3.1%") + " Of training images that went through the autoencoder twice" in text
    assert f"samples for captions of training images that are closer to {expected.format('25.0%')}" in text


def test_near_copies_of_an_earlier_release_are_given_too() -> None:
    copies = {"metric": "near copies", "value": 0.031, "num_samples": 96, "feature_network": "inception"}
    copies |= {"num_training": 1000, "num_held_out": 120, "threshold": 4.75, "expected_share": 0.01}
    text = card(winner=WINNER | {"measures": {"base": [copies], "winner": [copies]}})
    assert "are: 3.1%. Without memorisation about 1% are expected. The model has" in text


def test_no_more_real_pictures_are_told_than_were_compared_with() -> None:
    text = card(config_of(evaluate={"num_samples": 50}))
    assert "| pictures | 96 generated, 50 real | 90 generated, 50 real |" in text
    none_held_out = MANIFEST | {"held_out": False, "train": 20, "validation": 0, "test": 0}
    text = card(manifest=none_held_out)
    assert "| pictures | 96 generated, 20 real | 90 generated, 20 real |" in text
    assert "Samples for captions of training images:" in text and "too small to hold out images" in text


def test_data_and_settings_are_told() -> None:
    text = ModelCard(card()).text
    for part in ("1,420 train, 90 validation, 91 test", MANIFEST["digest"], "| pictures | 1,601 | 100% |"):
        assert part in text
    for part in (
        "0.0003",
        "400 of 16 pictures",
        "ZeRO stage 2, 2 workers",
        "| precision | fp32 |",
        "| seed | 0 |",
        "| optimizer | adamw |",
    ):
        assert part in text


def test_what_an_editing_model_looked_at_is_told() -> None:
    pairs = {"path": "pairs", "reference_columns": ["before"], "mask_column": "mask"}
    data = {"sources": [pairs], "resolution": 64, "reference_resolution": 32}
    stages = [{"steps": 50}, {"steps": 50, "optimizer": "lion"}]
    config = config_of(data=data, train={"method": "full", "stages": stages})
    text = card(config, base=PublishedBase(references=("before",)))
    for part in (
        "An image-editing model: org/model, all of its denoiser",
        "64 pixels, each with a reference of 32; what is outside of its mask counted 0 of what is inside.",
        "| optimizer | adamw, then lion |",
    ):
        assert part in text
    painting = card(base=PublishedBase(paints_masks=True))
    assert "for the image-editing model org/model" in painting and "\n    mask_image=mask,\n" in painting
    assert ModelCard(painting).data.to_dict()["pipeline_tag"] == "image-to-image"


def test_an_adapter_that_is_drawn_with_a_scheduler_of_its_own_says_so() -> None:
    text = card(scheduler="DDIMScheduler")
    assert "from diffusers import DDIMScheduler, DiffusionPipeline\n" in text
    assert 'pipeline.scheduler = DDIMScheduler.from_pretrained(".", subfolder="scheduler")\n' in text
    assert "DDIMScheduler" not in card()


def test_what_training_began_from_and_what_it_forgot_is_told_without_paths() -> None:
    begun = {"base": "whole@2", "adapter": "/home/someone/first.safetensors"}
    config = config_of("/runs/registry/whole/0a1b")
    text = card(config, base=PublishedBase(on_hub=False), winner=WINNER | {"begins_from": begun})
    assert "for the text-to-image model whole@2, in" in text and "0a1b" not in text.partition("## Use")[0]
    assert "Training went on from the adapter first.safetensors: the base model" in text
    assert "/home" not in text and "Earlier subjects" not in text
    text = card(winner=WINNER | {"remembered": [REMEMBERED]})
    assert "## Earlier subjects\n\nThe pictures of first: FID 12.0" in text
    assert "something was forgotten. (90 generated pictures, by inception" in text


def test_local_paths_addresses_and_secrets_stay_at_home() -> None:
    config = config_of("/home/someone/base", train={"deepspeed": {"nvme_path": "/home/someone/disk"}})
    manifest = MANIFEST | {
        "source": [{"name": "s3://key:secret@private/set?region=x", "rows": 1, "share": 1.0}]
    }
    text = card(config, base=PublishedBase(on_hub=False), manifest=manifest)
    for part in ("/home", "someone", "secret", "private", "mlflow"):
        assert part not in text
    assert portable("s3://bucket/a/set/?x=1/2") == "set"
    assert portable("examples/set") == "examples/set" and portable("org/model") == "org/model"
    assert portable("../up/set") == portable("~/set") == portable("C:\\set") == "set"


def test_the_configuration_in_the_card_is_one_that_trains_the_winner() -> None:
    text = card()
    block = text.partition("```yaml\n")[2].partition("\n```")[0]
    told = Config.model_validate(yaml.safe_load(block))
    assert told.train.learning_rate == WINNER["learning_rate"]
    assert told.search == config_of().search and told.data.source == "pictures"


@pytest.mark.parametrize(
    "evil",
    [
        "---\nlicense: mit\n---\n# heading",
        "| a | `b` ``` c ```` <script>x</script> [d](javascript:e) ![f](g) $x$ **h** &amp;",
        "quote ' \" \\ colon: {brace} # comment \u2028 \x07 é 猫",
        "```\n```python\nprint()",
    ],
)
def test_what_a_user_wrote_breaks_neither_the_front_matter_nor_the_markdown(evil: str) -> None:
    manifest = MANIFEST | {"source": [{"name": evil, "rows": 1, "share": 1.0}]}
    text = card(config_of(evil), manifest=manifest, prompt=evil, pictures=[(evil, "images/0-a.png")])
    plain = card()
    read = ModelCard(text)
    assert set(read.data.to_dict()) == set(ModelCard(plain).data.to_dict())
    assert read.data.to_dict()["widget"][0]["text"] == " ".join(evil.split())
    compile(program(read.text), "card", "exec")
    outside = without_code(read.text)
    assert [line for line in outside if line.startswith("#")] == [
        line for line in without_code(ModelCard(plain).text) if line.startswith("#")
    ]
    bare = [re.sub(r"\\.", "", line) for line in outside]  # what is escaped shows as it is
    assert not [line for line in bare if "<script" in line or "](javascript" in line or "**" in line]
    table = [line.count("|") for line in bare if line.startswith("|")]
    assert table == [line.count("|") for line in without_code(ModelCard(plain).text) if line.startswith("|")]


def without_code(markdown: str) -> list[str]:
    """The lines outside of fenced blocks, as CommonMark reads them."""
    lines, fence = [], ""
    for line in markdown.splitlines():
        ticks = line[: len(line) - len(line.lstrip("`"))]
        if not fence and len(ticks) >= 3:
            fence = ticks
        elif fence and line.strip() == ticks and len(ticks) >= len(fence):
            fence = ""
        elif not fence:
            lines.append(line)
    assert not fence
    return lines


def test_the_program_for_lora_weights_draws_with_plain_diffusers(tiny_model: Path, tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    # As many bases are: in half precision, here only so. The adapter brings its dropout along.
    base = tmp_path / "base"
    DiffusionPipeline.from_pretrained(tiny_model, dtype=torch.float16).save_pretrained(base, variant="fp16")
    pipeline = DiffusionPipeline.from_pretrained(base, variant="fp16", dtype=torch.float32)
    unadapted = draw_here(pipeline)
    settings = LoraConfig(
        r=4, lora_alpha=4, lora_dropout=0.5, target_modules=["to_q", "to_v"], init_lora_weights=False
    )
    pipeline.unet.add_adapter(settings)
    pipeline.unet.eval()
    layers = get_peft_model_state_dict(pipeline.unet)
    told = settings.to_dict() | {"target_modules": sorted(settings.target_modules)}
    type(pipeline).save_lora_weights(tmp_path, unet_lora_layers=layers, unet_lora_adapter_metadata=told)
    text = card(config_of("base"), base=PublishedBase(on_hub=False, variant=variant_name(str(base))))
    picture = draw(text, tmp_path)
    assert picture.size == (64, 64)
    assert picture.tobytes() == draw_here(pipeline).tobytes() != unadapted.tobytes()


@pytest.mark.parametrize(
    "lora",
    [
        {"rank": 4, "alpha": 6, "use_rslora": True},
        {"rank": 4, "alpha": 6, "use_rslora": True, "use_dora": True},
        {"rank": 1, "alpha": 6, "kind": "lokr", "factor": 4},
    ],
    ids=["lora", "dora", "lokr"],
)
def test_the_program_for_lora_weights_needs_no_loader_of_diffusers(
    tiny: Callable[[str], Path], tmp_path: Path, lora: dict[str, Any]
) -> None:
    pipeline, base = load_pipeline(str(tiny("PixArtSigmaPipeline"))), tmp_path / "base"
    options = dict(pipeline.transformer.config) | {"sample_size": 32}  # for which its pipeline has sizes
    pipeline.transformer = type(pipeline.transformer).from_config(options)
    pipeline.save_pretrained(base)
    unadapted = draw_here(load_pipeline(str(base)))
    config = config_of("base", train={"lora": lora})
    add_lora(pipeline.transformer, target_modules=["to_q", "to_v"], dropout=0.5, **lora)
    for name, parameter in pipeline.transformer.named_parameters():
        if "lora_B" in name or "lokr_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    family = family_of(pipeline)
    objective = family.schedule.objective(pipeline.scheduler.config)
    model = FineTuning(pipeline, family, objective, LossSettings())
    save_lora(pipeline, model, dict(model.trained()), tmp_path)
    assert without_lora_loader(str(base)) == "transformer"
    picture = draw(card(config, base=PublishedBase(on_hub=False, injected="transformer")), tmp_path)
    expected = draw_here(load_pipeline(str(base), tmp_path))
    assert picture.tobytes() == expected.tobytes() != unadapted.tobytes()


def test_the_program_for_a_whole_model_draws_with_plain_diffusers(tiny_model: Path, tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline

    DiffusionPipeline.from_pretrained(tiny_model, dtype=torch.float16).save_pretrained(tmp_path)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path, dtype=torch.float32)
    picture = draw(card(config_of(train={"method": "full"})), tmp_path)
    assert picture.tobytes() == draw_here(pipeline).tobytes()


def draw(card: str, folder: Path) -> Image.Image:
    """Run the card's program, unchanged, in `folder`; returns the picture that it saves.

    In this process; `tests/ray/test_pipeline.py` starts one of its own.
    """
    with contextlib.chdir(folder):
        exec(program(card), {})
    return Image.open(folder / "picture.png")


def draw_here(pipeline: Any, **guidance: Any) -> Any:
    """The picture of the card's program, in this process."""
    options = {"height": 64, "width": 64, "num_inference_steps": 2, "guidance_scale": 3.0, **guidance}
    return pipeline("a red apple", **options, generator=torch.Generator().manual_seed(0)).images[0]


def test_the_program_guides_a_model_as_its_pipeline_does(tiny: Callable[[str], Path]) -> None:
    from diffusers import DiffusionPipeline

    folder = tiny("FluxPipeline-schnell")
    config = config_of(str(folder), train={"method": "full"})
    picture = draw(card(config, guidance=guidance_arguments(config)), folder)
    pipeline = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    guided = draw_here(pipeline, true_cfg_scale=3.0, negative_prompt="")
    assert picture.tobytes() == guided.tobytes() != draw_here(pipeline).tobytes()


def test_the_revision_of_the_base_is_in_the_program() -> None:
    config = config_of(model={"base": "org/model", "revision": "v1"})
    assert "from_pretrained('org/model', revision='v1', torch_dtype=torch.float32)" in usage(
        config, PublishedBase(), "a red apple", {}
    )
