"""The validation loss: fixed rows, timesteps and noise, whatever pipeline is measured."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from cluster.storage import Storage
from ray_jobs.config import Config, load_config
from ray_jobs.data.curation.splits import content_digest
from ray_jobs.data.encoding.encoding import EncodePart
from ray_jobs.data.encoding.geometry import fit
from ray_jobs.data.encoding.plan import PlannedPart
from ray_jobs.data.encoding.tensors import as_numpy, as_torch, read_tensors
from ray_jobs.data.feeding.dataset import PARTS, Dataset
from ray_jobs.diffusion.randomness import draw
from ray_jobs.run.manifest import Manifest
from ray_jobs.training.batch import InputMaker
from ray_jobs.training.setup import build_model
from ray_jobs.training.validation import PLAIN, ValidationLoss
from ray_jobs.weights.loading import load_lora, load_pipeline
from ray_jobs.weights.model_files import family_in
from ray_jobs.weights.saving import save_lora
from tests.conftest import captions
from tests.conftest import draw as draw_picture
from tests.tiny_models import FAMILY_MODELS

DEMO = Path(__file__).parents[2] / "configs" / "demo.yaml"
CPU = torch.device("cpu")
BUCKETS = ((64, 64), (32, 64), (64, 64))  # width and height of three parts
ROWS_A_PART = 3
CHANGED_LOSS = [
    "train.loss.offset_noise=0.2",
    "train.loss.input_perturbation=0.2",
    "train.loss.huber_delta=0.01",
    "train.caption_dropout=0.99",
]


def configured(base: Path, *overrides: str) -> Config:
    lora = ["train.lora.target_modules=null", "train.lora.rank=4"]
    return load_config(DEMO, [f"model.base={base}", *lora, *overrides])


def prepared(config: Config, folder: Path, split: str = "validation") -> Dataset:
    """A prepared set of one split: nine drawn pictures in parts of two sizes."""
    storage = Storage.open(str(folder))
    encode, records, texts = EncodePart(storage, config, {}), [], captions()
    for number, bucket in enumerate(BUCKETS):
        chosen = range(number * ROWS_A_PART, (number + 1) * ROWS_A_PART)
        fitted = [fit(draw_picture(texts[n], n), bucket) for n in chosen]
        places, none = np.arange(ROWS_A_PART), np.zeros(ROWS_A_PART, bool)
        digests = [content_digest(texts[n].encode()) for n in chosen]
        keys = [bytes.fromhex(digest)[:16] for digest in digests]
        masked = family_in(config.model.base).paints_masks
        part = PlannedPart(
            *(split, 0, 0, 0, bucket, places, places, places, none, digests, keys, f"{number}.parquet"),
            has_masks=masked,
        )
        masks = np.tile(np.arange(bucket[0], dtype=np.uint8) * 2, (ROWS_A_PART, bucket[1], 1))
        encode(
            {
                "part": part,
                "text": [texts[n] for n in chosen],
                "pixels": np.stack([each.pixels for each in fitted]).tobytes(),
                "image": [b""] * ROWS_A_PART,
                "conditioning": [each.sizes for each in fitted],
                "references": b"",
                "masks": masks.tobytes() if masked else b"",
                "controls": b"",
            }
        )
        records.append(part.record())
    storage.write_bytes(PARTS, json.dumps(records).encode())
    return Dataset(storage, storage, Manifest())


@pytest.fixture(scope="module")
def small(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return prepared(configured(tiny_model), tmp_path_factory.mktemp("prepared"))


@pytest.fixture(scope="module", params=FAMILY_MODELS)
def family(
    request: pytest.FixtureRequest,
    tiny: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, Dataset]:
    """A base model of each family and the pictures as it encodes them."""
    base = tiny(request.param)
    return base, prepared(configured(base), tmp_path_factory.mktemp(request.param))


def by_hand(config: Config, dataset: Dataset, pipeline: Any, place: int) -> float:
    """The squared error of a velocity at the schedule's middle, for one row in the order of digests."""
    names = ["latents_mean", "latents_logvar", "prompt_embeds"]
    found = {}
    for part in dataset.parts("validation"):
        with dataset.cache.open_input(part["file"]) as file:
            table = pq.read_table(file)
        columns = read_tensors(table, names)
        for row, digest in enumerate(table["digest"].to_pylist()):
            found[digest] = [as_torch(columns[name][row : row + 1].copy()).float() for name in names]
    mean, logvar, embeds = found[sorted(found)[place]]
    drawn = draw((config.evaluate.seed,), 1, [place], tuple(mean.shape[1:]), PLAIN)
    latents = (mean + (logvar / 2).exp() * drawn.posterior) * pipeline.vae.config.scaling_factor
    signal = pipeline.scheduler.alphas_cumprod[500]
    noisy = signal.sqrt() * latents + (1 - signal).sqrt() * drawn.loss.noise
    velocity = signal.sqrt() * drawn.loss.noise - (1 - signal).sqrt() * latents
    with torch.no_grad():
        predicted = pipeline.unet(noisy, 500, embeds).sample
    return float((predicted - velocity).square().mean())


def trained(config: Config, dataset: Dataset, steps: int) -> tuple[Any, Any]:
    """A pipeline and its fine-tuning, after plain steps on the rows of the validation loss."""
    pipeline, model = build_model(config)
    inputs = InputMaker(
        pipeline.vae,
        model,
        dataset.empty_caption(),
        CPU,
        seed=config.seed,
        caption_dropout=config.train.caption_dropout,
    )
    optimizer = torch.optim.AdamW([p for _, p in model.trained()], lr=3e-3)
    pieces = ValidationLoss(config, dataset, CPU).pieces
    for step in range(1, steps + 1):
        for piece in pieces:
            made, shares = inputs.make(piece, step)
            (model(**made) * shares).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return pipeline, model


def test_one_row_at_one_timestep_is_the_squared_error_worked_out_by_hand(
    tiny_model: Path, small: Dataset
) -> None:
    config, pipeline = configured(tiny_model, "evaluate.seed=5"), load_pipeline(str(tiny_model))
    measured = ValidationLoss(config, small, CPU, rows=1, timesteps=1)(pipeline)
    assert measured == pytest.approx(by_hand(config, small, pipeline, 0), rel=1e-5)


def test_every_row_counts_the_same_whatever_its_size(tiny_model: Path, small: Dataset) -> None:
    config, pipeline = configured(tiny_model), load_pipeline(str(tiny_model))
    rows = [by_hand(config, small, pipeline, place) for place in range(9)]
    measure = ValidationLoss(config, small, CPU, timesteps=1)
    assert measure(pipeline) == pytest.approx(sum(rows) / 9, rel=1e-5)
    assert measure.of_rows(pipeline).tolist() == pytest.approx(rows, rel=1e-4)


def test_the_same_weights_have_the_same_loss_again_and_in_batches_of_any_size(
    family: tuple[Path, Dataset],
) -> None:
    base, dataset = family
    config, pipeline = configured(base), load_pipeline(str(base))
    measure = ValidationLoss(config, dataset, CPU)
    first = measure(pipeline)
    torch.manual_seed(1)
    assert measure(pipeline) == first > 0
    pairs = ValidationLoss(configured(base, "evaluate.batch_size=2"), dataset, CPU)
    assert pairs(pipeline) == pytest.approx(first, rel=1e-5)


def test_it_is_the_plain_error_whatever_the_training_adds_to_its_loss(
    tiny_model: Path, small: Dataset
) -> None:
    pipeline = load_pipeline(str(tiny_model))
    plain = ValidationLoss(configured(tiny_model), small, CPU)(pipeline)
    for setting in [*CHANGED_LOSS, "train.loss.min_snr_gamma=1"]:
        assert ValidationLoss(configured(tiny_model, setting), small, CPU)(pipeline) == plain
    assert ValidationLoss(configured(tiny_model, "evaluate.seed=-1"), small, CPU)(pipeline) != plain


def test_weights_trained_on_the_rows_have_a_lower_loss(family: tuple[Path, Dataset]) -> None:
    base, dataset = family
    config = configured(base, "train.method=full")
    pipeline, _ = trained(config, dataset, steps=4)
    measure = ValidationLoss(config, dataset, CPU)
    assert measure(pipeline) < measure(load_pipeline(str(base)))


def test_adapters_that_were_loaded_have_the_loss_of_the_model_they_were_trained_in(
    tiny_model: Path, small: Dataset, tmp_path: Path
) -> None:
    """With adapters of the text encoder too, so that captions are encoded anew; none drops anything out."""
    config = configured(tiny_model, "train.train_text_encoder=true", "train.lora.dropout=0.5")
    measure, pipeline = ValidationLoss(config, small, CPU), load_pipeline(str(tiny_model))
    before = measure(pipeline)
    own, model = trained(config, small, steps=3)
    save_lora(own, model, dict(model.trained()), tmp_path)
    load_lora(pipeline, tmp_path)
    assert not any(module.training for module in pipeline.unet.modules())
    assert measure(pipeline) == pytest.approx(measure(own), rel=1e-5)
    assert measure(pipeline) != pytest.approx(before, rel=1e-4)
    pipeline.unload_lora_weights()
    assert measure(pipeline) == before


def test_the_pipeline_stays_as_it_is(tiny_model: Path, small: Dataset) -> None:
    config = configured(tiny_model, "train.lora.dropout=0.5", "train.train_text_encoder=true")
    pipeline, model = build_model(config)
    pipeline.unet.conv_in.eval()

    def state() -> dict[str, Any]:
        parts = {name: getattr(pipeline, name) for name in ("unet", "text_encoder", "vae")}
        modules = {f"{p}.{n}": m.training for p, part in parts.items() for n, m in part.named_modules()}
        needed = {
            f"{p}.{n}": w.requires_grad for p, part in parts.items() for n, w in part.named_parameters()
        }
        return {"modes": modules, "gradients": needed, "adapters": list(pipeline.unet.peft_config)}

    def weights() -> dict[str, torch.Tensor]:
        return {name: value.clone() for name, value in model.state_dict().items()}

    before, values = state(), weights()
    assert set(before["modes"].values()) == set(before["gradients"].values()) == {True, False}
    ValidationLoss(config, small, CPU)(pipeline)
    assert state() == before
    after = weights()
    assert after.keys() == values.keys()
    assert all(torch.equal(after[name], value) for name, value in values.items())


def test_a_limit_takes_the_first_rows_in_the_order_of_their_digests(tiny_model: Path, small: Dataset) -> None:
    pieces = ValidationLoss(configured(tiny_model), small, CPU, rows=4).pieces
    assert sorted(place for piece in pieces for place in piece.places) == [0, 1, 2, 3]
    assert {weight for piece in pieces for weight in piece.weights} == {1 / 4}
    expected = {row["prompt_embeds"] for row in small.read("validation", ["prompt_embeds"], limit=4)}
    found = {as_numpy(embeds).tobytes() for piece in pieces for embeds in piece.rows["prompt_embeds"]}
    assert found == expected


def test_a_set_without_validation_rows_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    config = configured(tiny_model)
    dataset = prepared(config, tmp_path, split="train")
    with pytest.raises(ValueError, match=r"data\.validation: the validation split has no pictures"):
        ValidationLoss(config, dataset, CPU)
