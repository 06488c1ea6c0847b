"""Captioning models of the real classes: what they are given, what they write, and which are refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from cluster.shape import Machine
from ray_jobs.config import CaptioningConfig
from ray_jobs.planning.plan import captioning_lines
from ray_jobs.weights.captioner import (
    Captioner,
    captioner_bytes,
    captioner_digest,
    check_captioner,
)
from tests.conftest import captions, draw
from tests.tiny_captioners import CAPTIONERS, blip, words
from tests.unit.test_plan import a_config

MAX_TOKENS = 12
every_kind = pytest.mark.parametrize("kind", CAPTIONERS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: write(tmp_path_factory.mktemp("captioners") / kind) for kind, write in CAPTIONERS.items()}


def settings(folder: Path, **options: Any) -> CaptioningConfig:
    return CaptioningConfig(model=str(folder), **{"max_tokens": MAX_TOKENS, **options})


def pictures() -> list[Image.Image]:
    """Pictures of several sizes and shapes."""
    sizes = [(80, 72), (40, 96), (112, 30), (64, 64), (28, 28), (100, 100)]
    return [
        draw(caption, number).resize(size)
        for number, (caption, size) in enumerate(zip(captions()[::7], sizes, strict=True))
    ]


@every_kind
def test_a_batch_gets_the_captions_that_its_pictures_get_alone(kind: str, folders: dict[str, Path]) -> None:
    captioner = Captioner(settings(folders[kind]))
    together = captioner.write(pictures())
    assert together == [captioner.write([picture])[0] for picture in pictures()]
    assert len({written.text for written in together}) > 1  # else it would not matter which picture it is
    assert all(written.text == " ".join(written.text.split()) != "" for written in together)


@every_kind
def test_a_caption_is_what_the_model_alone_writes_without_its_prompt(
    kind: str, folders: dict[str, Path]
) -> None:
    """The reference is transformers' own way for each kind, one picture at a time."""
    from transformers import AutoModelForImageTextToText

    captioner = Captioner(settings(folders[kind]))
    model = AutoModelForImageTextToText.from_pretrained(folders[kind])
    for picture in pictures()[:3]:
        inputs = captioner.inputs([picture])
        start = {"blip": 1, "blip-2": inputs["input_ids"].shape[1], "florence": 1}.get(
            kind, inputs["input_ids"].shape[1]
        )
        output = model.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=MAX_TOKENS)
        text = captioner.inputs.processor.tokenizer.decode(output[0, start:], skip_special_tokens=True)
        [written] = captioner.write([picture])
        assert written.text == " ".join(text.split())


def test_words_that_blip_continues_are_no_part_of_the_caption(folders: dict[str, Path]) -> None:
    plain, told = (
        Captioner(settings(folders["blip"], prompt=prompt)) for prompt in (None, "a photo of a red")
    )
    before, after = plain.write(pictures()), told.write(pictures())
    assert before != after  # the prompt is read
    assert not any(written.text.startswith("a photo of") for written in after)
    assert set(" ".join(written.text for written in after).split()) <= {*words(), "photo", "of", "[UNK]"}


def test_tasks_and_instructions_change_what_is_written(folders: dict[str, Path]) -> None:
    for kind, prompt in (("florence", "<CAPTION>"), ("qwen", "a big red square"), ("llava", "small cross")):
        usual, other = (Captioner(settings(folders[kind], prompt=given)) for given in (None, prompt))
        assert usual.write(pictures()) != other.write(pictures())


def test_captions_as_long_as_they_may_be_are_told(folders: dict[str, Path]) -> None:
    captioner = Captioner(settings(folders["blip"], max_tokens=8))
    for written in captioner.write(pictures()):
        ended = len(written.text.split()) < 7
        assert written.is_cut != ended
    assert any(written.is_cut for written in captioner.write(pictures()))


@every_kind
def test_bf16_is_the_dtype_of_weights_and_pixels(kind: str, folders: dict[str, Path]) -> None:
    captioner = Captioner(settings(folders[kind]), dtype=torch.bfloat16)
    assert captioner.model.dtype == torch.bfloat16
    assert len(captioner.write(pictures()[:2])) == 2


@every_kind
def test_a_model_is_checked_and_weighed_without_its_weights(
    kind: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    check_captioner(settings(folders[kind]))
    stored = sum(each.stat().st_size for each in folders[kind].glob("*.safetensors"))
    assert captioner_bytes(settings(folders[kind]), torch.float32) == pytest.approx(stored, rel=0.2)
    assert captioner_bytes(settings(folders[kind]), torch.bfloat16) < stored
    copy = shutil.copytree(folders[kind], tmp_path / "copy")
    assert captioner_digest(settings(copy)) == captioner_digest(settings(folders[kind]))
    (copy / "generation_config.json").write_text('{"num_beams": 3}')
    assert captioner_digest(settings(copy)) != captioner_digest(settings(folders[kind]))


def test_the_plan_tells_the_models_weights_and_where_they_do_not_fit(folders: dict[str, Path]) -> None:
    config = a_config(
        data={"source": "pictures", "captioning": {"model": str(folders["blip"])}}, train={"use_gpu": True}
    )
    [line], problems = captioning_lines(config, [Machine("large", 4, 1, 24.0)])
    assert line.startswith("memory of the captioning model (bf16): weights") and not problems
    assert "up to 32 pictures at once" in line
    _, [problem] = captioning_lines(config, [Machine("small", 4, 1, 1e-6)])
    assert problem.startswith("data.captioning.model needs more than")
    assert captioning_lines(a_config(), [Machine("large", 4, 1, 24.0)]) == ([], [])


def changed(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (
            "blip",
            {"architectures": ["BlipForQuestionAnswering"]},
            "BlipForQuestionAnswering is no captioning",
        ),
        ("blip", {"model_type": "bert", "architectures": ["BertModel"]}, "supported are BLIP, BLIP-2, Flor"),
        (
            "florence",
            {"auto_map": {"AutoConfig": "x.Y"}},
            "Python code in its repository, which is never run",
        ),
        ("qwen", {"quantization_config": {"quant_method": "awq"}}, r"in few bits \(awq\)"),
        ("blip-2", {"image_token_index": None}, "a BLIP-2 without image_token_index"),
    ],
)
def test_models_that_cannot_be_used_are_refused_with_the_reason(
    kind: str, fields: dict[str, Any], message: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    copy = shutil.copytree(folders[kind], tmp_path / "copy")
    changed(copy, **fields)
    with pytest.raises(ValueError, match=f"^data.captioning.model: .*{message}"):
        check_captioner(settings(copy))


def test_missing_files_are_named(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="^data.captioning.model: .*neither a folder nor a name of the hub"):
        check_captioner(settings(tmp_path / "nowhere"))
    pickled = blip(tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(ValueError, match="^data.captioning.model: .*no safetensors file; no other format"):
        check_captioner(settings(pickled))
    silent = shutil.copytree(folders["qwen"], tmp_path / "silent")
    (silent / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="has no chat template; supported are"):
        check_captioner(settings(silent))
    bare = shutil.copytree(folders["blip"], tmp_path / "bare")
    for name in ("tokenizer.json", "tokenizer_config.json", "processor_config.json"):
        (bare / name).unlink(missing_ok=True)
    with pytest.raises(ValueError, match="its processor cannot prepare a picture"):
        check_captioner(settings(bare))
    (bare / "config.json").unlink()
    with pytest.raises(ValueError, match="has no config.json that names its model_type"):
        check_captioner(settings(bare))


def test_a_prompt_that_is_no_caption_task_is_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="^data.captioning.prompt: '<OD>' is no task of Florence-2"):
        check_captioner(settings(folders["florence"], prompt="<OD>"))


def test_more_tokens_than_the_model_has_places_are_refused(folders: dict[str, Path]) -> None:
    check_captioner(settings(folders["blip"], max_tokens=60))
    for kind, most in (("blip", 64), ("florence", 129)):
        with pytest.raises(ValueError, match=f"^data.captioning.max_tokens: {most}: .* places for tokens"):
            check_captioner(settings(folders[kind], max_tokens=most))
