"""Feature networks: each from its specification, by its digest, on the input that it was trained on."""

import hashlib
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from ray_jobs.metrics.efficientnet import PREPROCESSING, EfficientNet, convolution
from ray_jobs.metrics.feature_network import Preprocessing
from ray_jobs.metrics.inception_score import inception_score
from ray_jobs.metrics.networks import NetworkSpec, load_network
from ray_jobs.metrics.similarity import clip_score
from ray_jobs.metrics.vision_model import Clip, load_clip, load_vision_model

ROOT = Path(__file__).parents[2]
LITE0 = ROOT / ".cache/efficientnet-lite0.safetensors"
SIDE = 28
# In ImageNet's list of classes.
ABACUS, ACCORDION = 398, 401


def emoji(*names: str) -> torch.Tensor:
    """uint8, N x 3 x 256 x 256."""
    rows = []
    for name in names:
        with Image.open(ROOT / f"examples/fluent-emoji/images/{name}.webp") as picture:
            pixels = picture.convert("RGB").resize((256, 256)).tobytes()
        rows.append(torch.frombuffer(bytearray(pixels), dtype=torch.uint8).reshape(256, 256, 3))
    return torch.stack(rows).permute(0, 3, 1, 2)


def noise(count: int, height: int = 40, width: int = 40) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, height, width), generator=generator, dtype=torch.uint8)


@pytest.fixture(scope="module")
def efficientnet() -> EfficientNet:
    network = load_network(NetworkSpec("efficientnet-lite0", str(LITE0)))
    assert isinstance(network, EfficientNet)
    return network


def test_features_are_calculated_without_tf32_whatever_else_is_allowed(
    efficientnet: EfficientNet, request: pytest.FixtureRequest
) -> None:
    """On a GPU since Ampere, convolutions would round to 10 bits, and a score would depend on the card."""
    backends: tuple[Any, ...] = (torch.backends.cudnn, torch.backends.cuda.matmul)
    for backend in backends:  # monkeypatch would delete one: torch answers for it without an attribute
        request.addfinalizer(partial(setattr, backend, "allow_tf32", backend.allow_tf32))
        backend.allow_tf32 = True
    seen: list[bool] = []
    look = efficientnet.module.register_forward_hook(
        lambda *_: seen.extend(backend.allow_tf32 for backend in backends)
    )
    efficientnet.features(noise(1))
    look.remove()
    assert seen == [False, False]
    assert all(backend.allow_tf32 for backend in backends) and torch.backends.cudnn.enabled


PLAIN = Preprocessing(8, "bilinear", mean=(100, 50, 0), std=(10, 20, 50))


def test_efficientnet_recognises_what_imagenet_has_a_class_for(efficientnet: EfficientNet) -> None:
    probabilities = efficientnet.probabilities(emoji("abacus", "accordion"))
    assert probabilities.shape == (2, 1000)
    assert probabilities.argmax(dim=1).tolist() == [ABACUS, ACCORDION]
    torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(2))


def test_efficientnet_gives_the_features_that_its_classes_are_made_of(efficientnet: EfficientNet) -> None:
    pictures = emoji("abacus", "accordion")
    features = efficientnet.features(pictures)
    assert features.shape == (2, efficientnet.num_features) == (2, 1280)
    assert features.dtype == torch.float32
    assert efficientnet.identity == "efficientnet-lite0@sha256:162cab1588fe"
    classes = efficientnet.module.classifier(features).softmax(dim=1)
    torch.testing.assert_close(classes, efficientnet.probabilities(pictures), rtol=1e-4, atol=1e-6)


def test_a_stride_of_two_pads_after_an_even_picture_and_not_before() -> None:
    layers = convolution(1, 1, kernel=3, stride=2, activation=False).eval()
    layers.load_state_dict({**layers.state_dict(), "1.weight": torch.ones(1, 1, 3, 3)})
    picture = torch.arange(16.0).reshape(1, 1, 4, 4)
    # Sums of rows 0 to 2 and 2 to 3, of columns 0 to 2 and 2 to 3; normalised by the root of 1 + 0.001.
    expected = torch.tensor([[45.0, 39.0], [66.0, 50.0]]) / 1.001**0.5
    with torch.inference_mode():
        torch.testing.assert_close(layers(picture)[0, 0], expected)


def test_the_inception_score_names_the_stand_in_that_gave_the_classes(efficientnet: EfficientNet) -> None:
    names = ("abacus", "accordion", "ambulance", "anchor")
    score = inception_score(efficientnet.probabilities(emoji(*names)), efficientnet.identity, splits=1)
    assert score.feature_network.startswith("efficientnet-lite0@")
    assert 1 < score.value <= 4


def test_preprocessing_leaves_a_picture_of_the_right_size_but_for_its_scale() -> None:
    pictures = noise(2, 8, 8)
    values = pictures.float()
    expected = torch.stack([(values[:, 0] - 100) / 10, (values[:, 1] - 50) / 20, values[:, 2] / 50], dim=1)
    torch.testing.assert_close(PLAIN(pictures), expected)


def test_preprocessing_never_leaves_the_range_of_a_picture() -> None:
    board = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    board[..., ::32, :] = board[..., 1::32, :] = 255
    pixels = PREPROCESSING(board)
    assert pixels.shape == (1, 3, 224, 224)
    assert pixels.min() == -127 / 128 and pixels.max() <= 1


def test_a_weights_file_with_one_byte_changed_is_refused(tmp_path: Path) -> None:
    changed = bytearray(LITE0.read_bytes())
    changed[-1] ^= 1
    path = tmp_path / "changed.safetensors"
    path.write_bytes(changed)
    with pytest.raises(ValueError, match=r"not a known feature network .*`make setup`"):
        load_network(NetworkSpec("efficientnet-lite0", str(path)))


def test_a_digest_that_the_user_gave_must_be_the_networks(dino_folder: Path) -> None:
    digest = load_network(NetworkSpec("transformers", str(dino_folder))).digest
    assert load_network(NetworkSpec("transformers", str(dino_folder), sha256=digest)).digest == digest
    with pytest.raises(ValueError, match=r"evaluate\.second_network\.sha256: .* has [0-9a-f]{64}, not 00"):
        load_network(NetworkSpec("transformers", str(dino_folder), sha256="00"))


def test_torchscript_that_the_user_vouches_for_measures_what_it_says(script: tuple[Path, str]) -> None:
    path, digest = script
    network = load_network(NetworkSpec("torchscript", str(path), digest, "means", PLAIN))
    flat = torch.full((2, 3, 8, 8), 150, dtype=torch.uint8)
    assert network.num_features == 3
    torch.testing.assert_close(network.features(flat), torch.tensor([[5.0, 5.0, 3.0]] * 2))
    other = replace(PLAIN, interpolation="bicubic")
    assert (
        load_network(NetworkSpec("torchscript", str(path), digest, "means", other)).identity
        != network.identity
    ), "prepared otherwise, it is another network"


def test_torchscript_is_not_loaded_if_its_bytes_are_others(tmp_path: Path) -> None:
    path = tmp_path / "code.pt"
    path.write_bytes(b"no TorchScript, so that loading it would be another error")
    with pytest.raises(
        ValueError, match=r"second_network\.path: .* not a known feature network .*second_network\.sha256"
    ):
        load_network(NetworkSpec("torchscript", str(path), "00", "code", PLAIN))


def test_torchscript_that_gives_no_features_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "picture.pt"
    torch.jit.script(torch.nn.Identity()).save(str(path))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(ValueError, match=r"must give N x D features, not \(1, 3, 8, 8\)"):
        load_network(NetworkSpec("torchscript", str(path), digest, "picture", PLAIN))


def test_dinov2_gives_the_class_token_of_pictures_prepared_by_its_own_processor(dino_folder: Path) -> None:
    from transformers import Dinov2Model

    network, pictures = load_network(NetworkSpec("transformers", str(dino_folder))), noise(3, 64, 48)
    features = network.features(pictures)
    assert features.shape == (3, network.num_features) == (3, 32)
    resized = torch.stack([by_hand(picture) for picture in pictures])
    with torch.inference_mode():
        expected = Dinov2Model.from_pretrained(dino_folder)(resized).last_hidden_state[:, 0]
    torch.testing.assert_close(features, expected, rtol=1e-3, atol=1e-3)


def by_hand(picture: torch.Tensor) -> torch.Tensor:
    """Shorter side to 32 (bicubic), the middle 28 x 28, CLIP's mean and deviation: float32, 3 x 28 x 28."""
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    _, height, width = picture.shape
    scale = 32 / min(height, width)
    size = (int(width * scale), int(height * scale))
    small = Image.fromarray(picture.permute(1, 2, 0).numpy()).resize(size, Image.Resampling.BICUBIC)
    left, top = (size[0] - SIDE) // 2, (size[1] - SIDE) // 2
    pixels = bytearray(small.crop((left, top, left + SIDE, top + SIDE)).tobytes())
    values = torch.frombuffer(pixels, dtype=torch.uint8).reshape(SIDE, SIDE, 3).permute(2, 0, 1) / 255
    return (values - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def test_clip_scores_are_those_of_the_model_itself(clip_folder: Path) -> None:
    from transformers import CLIPModel, CLIPProcessor

    captions, pictures = ["a big red circle", "a small green square"], noise(2, SIDE, SIDE)
    clip = load_clip(str(clip_folder))
    texts, images = clip.text_features(captions), clip.features(pictures)
    assert texts.shape == images.shape == (2, clip.num_features) == (2, 16)
    processor = CLIPProcessor.from_pretrained(clip_folder, backend="pil")
    inputs = processor(text=captions, images=list(pictures), return_tensors="pt", padding=True)
    model = CLIPModel.from_pretrained(clip_folder)
    with torch.inference_mode():
        cosines = (model(**inputs).logits_per_image / model.logit_scale.exp()).diagonal()
    score = clip_score(images, texts, clip.identity)
    assert score.value == pytest.approx(2.5 * float(cosines.clamp(min=0).mean()), abs=1e-5)
    assert score.feature_network == clip.identity


def test_a_caption_longer_than_clip_reads_is_cut(clip_folder: Path) -> None:
    clip = load_clip(str(clip_folder))
    words = "big red circle " * 20
    torch.testing.assert_close(clip.text_features([words]), clip.text_features([words + "square"]))


def test_clip_needs_a_model_that_reads_captions(dino_folder: Path, clip_folder: Path) -> None:
    assert isinstance(load_vision_model(str(clip_folder)), Clip)
    with pytest.raises(ValueError, match=r"evaluate\.clip: .* is not a CLIPModel"):
        load_clip(str(dino_folder))


def test_the_identity_covers_how_a_model_prepares_its_pictures(dino_folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / dino_folder.name
    copy.mkdir()
    for path in dino_folder.iterdir():
        text = path.name == "preprocessor_config.json"
        content = path.read_bytes().replace(b'"resample": 3', b'"resample": 2') if text else path.read_bytes()
        (copy / path.name).write_bytes(content)
    assert load_vision_model(str(copy)).identity != load_vision_model(str(dino_folder)).identity


def test_a_model_without_safetensors_or_with_weights_missing_is_refused(
    dino_folder: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    for path in dino_folder.glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"never read")
    with pytest.raises(ValueError, match="no safetensors file; no other format is read"):
        load_vision_model(str(tmp_path))
    weights = load_file(dino_folder / "model.safetensors")
    del weights["layernorm.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"its weights lack layernorm\.weight"):
        load_vision_model(str(tmp_path))
