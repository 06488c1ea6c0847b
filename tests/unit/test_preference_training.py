"""Training on votes: what is learned, what stays as it was, and what a step depends on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ray_jobs.config import Config, load_config
from ray_jobs.data.feeding.streaming import SOURCE
from ray_jobs.diffusion.preference_tuning import REFERENCE, PreferenceTuning, reference_active
from ray_jobs.planning.footprint import footprint
from ray_jobs.training.batch import InputMaker, Piece, loss_shares
from ray_jobs.weights.encoders import Encoders
from ray_jobs.weights.starting_adapter import with_form_of_adapter
from tests.unit.test_quantization import CPU, DEMO, TRANSFORMER, UNET, Training
from tests.unit.test_starting_adapter import config as plain
from tests.unit.test_starting_adapter import trained

SETTINGS = ["train.learning_rate=0.003", "train.caption_dropout=0", "train.warmup_steps=0"]


def configured(base: Path, loss: str, *overrides: str, adapter: Path | None = None) -> Config:
    """A configuration that trains on votes, whose folder is not looked at here."""
    votes = f'train.preference={{"votes": ["votes"], "loss": "{loss}", "beta": 500}}'
    begins = [f"model.adapter={adapter}"] if adapter else ["train.lora.rank=3", "train.lora.alpha=6"]
    return (
        with_form_of_adapter(plain(base, votes, *begins, *SETTINGS, *overrides))
        if adapter
        else plain(base, votes, *begins, *SETTINGS, *overrides)
    )


class OnVotes(Training):
    """Steps on four pairs: of each picture and one of other colours. With kto, the first two are liked."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        assert config.train.preference
        loss = config.train.preference.loss
        encoders = Encoders(config.model.base)
        generator = torch.Generator().manual_seed(1)
        pixels = torch.randint(0, 64, (4, 64, 64, 3), dtype=torch.uint8, generator=generator).numpy()
        others, _ = encoders.encode_pictures(pixels)
        self.maker = InputMaker(
            self.pipeline.vae,
            self.model,
            encoders.encode_captions([""]),
            CPU,
            seed=0,
            caption_dropout=0.0,
            num_references=1 if loss == "dpo" else 0,
            preference=loss,
        )
        self.rows |= {"reference_0": others, SOURCE: torch.tensor([0, 2, 1, 3], dtype=torch.int32)}
        self.rows = {name: self.rows[name] for name in self.maker.columns}

    def inputs(self, rows: slice = slice(0, 4), step: int = 1) -> dict[str, Any]:
        """Return the model's inputs for some of the rows of a step."""
        [piece] = Piece.cut(self.rows, loss_shares(self.config.train), 1, 0, 1)
        places = piece.places[rows]
        chosen = {name: tensor[rows] for name, tensor in piece.rows.items()}
        return self.maker.make(Piece(chosen, places, piece.weights[rows]), step)[0]

    @property
    def tuning(self) -> PreferenceTuning:
        assert isinstance(self.model, PreferenceTuning)
        return self.model

    def predicted(self) -> torch.Tensor:
        inputs, model = self.inputs(), self.model
        with torch.no_grad():
            return model.predict(inputs["latents"], torch.full((4,), 500), inputs["conditions"])


@pytest.mark.parametrize("name", [UNET, TRANSFORMER])
@pytest.mark.parametrize("with_adapter", [False, True], ids=["from the base", "from an adapter"])
def test_dpo_begins_at_the_reference_and_leaves_it_for_the_preferred_pictures(
    tiny: Callable[[str], Path], tmp_path: Path, name: str, with_adapter: bool
) -> None:
    base = tiny(name)
    adapter = trained(base, tmp_path / "champion") if with_adapter else None
    training = OnVotes(configured(base, "dpo", adapter=adapter))
    training.start()
    before = training.predicted()
    losses = [training.run(1, 1)[0] for _ in range(12)]  # on the same noise
    assert losses[0] == pytest.approx(torch.log(torch.tensor(2.0)).item())
    assert losses[-1] < 0.9 * losses[0]
    with reference_active(training.model):
        torch.testing.assert_close(training.predicted(), before)
    assert not torch.allclose(training.predicted(), before)


def test_the_reference_is_the_base_with_the_adapter_that_training_begins_from(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    base = tiny(UNET)
    adapter = trained(base, tmp_path / "champion", "train.learning_rate=0.05")
    training = OnVotes(configured(base, "dpo", adapter=adapter))
    names = [name for name, _ in training.model.trained()]
    assert names and not any(f".{REFERENCE}." in name for name in names)
    of_reference = {n: p for n, p in training.model.named_parameters() if f".{REFERENCE}." in n}
    assert len(of_reference) == len(names) and not any(p.requires_grad for p in of_reference.values())
    # The base is there once: beside it are two adapters.
    bare = OnVotes(configured(base, "dpo"))
    two, one = (sum(p.numel() for p in each.model.parameters()) for each in (training, bare))
    assert two - one == sum(p.numel() for p in of_reference.values())
    with reference_active(bare.model):
        of_base = bare.predicted()
    with reference_active(training.model):
        assert not torch.allclose(training.predicted(), of_base)


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_a_training_on_votes_goes_on_bit_by_bit(
    tiny: Callable[[str], Path], tmp_path: Path, loss: str
) -> None:
    base = tiny(UNET)
    settings = configured(base, loss, adapter=trained(base, tmp_path / "champion"))
    whole = OnVotes(settings)
    whole.start()
    whole.run(1, 2)
    state, rest = whole.write(tmp_path / "state"), whole.run(3, 4)
    resumed = OnVotes(settings)
    resumed.start(state)
    assert resumed.run(3, 4) == rest


def test_kto_makes_liked_pictures_likelier_and_others_less_likely(tiny: Callable[[str], Path]) -> None:
    training = OnVotes(configured(tiny(UNET), "kto"))
    training.start()
    losses = [training.run(1, 1)[0] for _ in range(12)]  # on the same noise
    assert losses[0] == pytest.approx(0.5) and losses[-1] < 0.45


def test_the_reference_point_of_kto_is_of_the_rows_of_all_workers(tiny: Callable[[str], Path]) -> None:
    training = OnVotes(configured(tiny(UNET), "kto"))
    training.start()
    training.run(1, 5)
    sums: list[torch.Tensor] = []

    def summed(values: torch.Tensor) -> torch.Tensor:
        sums.append(values)
        return torch.stack(sums[-2:]).sum(dim=0) if len(sums) > 2 else values

    with torch.no_grad():
        together = training.model(**training.inputs(step=9))
        training.tuning.summed = summed
        halves = slice(0, 2), slice(2, 4)
        for half in halves:
            training.model(**training.inputs(half, 9))
        first, second = sums
        training.tuning.summed = lambda values: first + second
        apart = torch.cat([training.model(**training.inputs(half, 9)) for half in halves])
    torch.testing.assert_close(apart, together)


def test_a_row_that_fills_up_a_pass_does_not_count_for_the_reference_point(
    tiny: Callable[[str], Path],
) -> None:
    training = OnVotes(configured(tiny(UNET), "kto"))
    training.start()
    training.run(1, 5)
    inputs = training.inputs(step=9)
    sums: list[torch.Tensor] = []

    def seen(values: torch.Tensor) -> torch.Tensor:
        sums.append(values)
        return values

    training.tuning.summed = seen
    inputs["counted"] = torch.tensor([True, True, True, False])
    with torch.no_grad():
        training.model(**inputs)
    assert sums[0][1] == 3


def test_a_pair_takes_the_memory_of_two_pictures(tiny: Callable[[str], Path]) -> None:
    base = tiny(UNET)
    pair, picture = footprint(configured(base, "dpo")), footprint(configured(base, "kto"))
    assert pair.activations == pytest.approx(2 * picture.activations, rel=0.05)


@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        (["train.method=full"], "method: lora"),
        (["train.zero_stage=3"], "zero_stage: 3"),
        (["train.loss.huber_delta=0.1"], "loss.huber_delta"),
        (["train.prior_loss_weight=1"], "prior_loss_weight"),
        (["train.preference.loss=kto", "train.micro_batch_size=2"], "micro_batch_size"),
        (["train.preference.liked_share=0.8"], "liked_share"),
        (["search.folds=2", "data.folds=2"], "search.folds"),
    ],
)
def test_what_does_not_go_with_votes_is_refused(overrides: list[str], field: str) -> None:
    with pytest.raises(ValueError, match=field):
        load_config(DEMO, ["train.preference.votes=votes", *overrides])


def test_beta_is_searched_in_trainings_of_their_own(tiny: Callable[[str], Path]) -> None:
    space = ['search.space={"train.preference.beta": [500, 2000]}', "search.pack=auto"]
    found = load_config(DEMO, ["train.preference.votes=votes", *space])
    assert "train.preference" in found.not_together
    trial = found.with_settings({"train.preference.beta": 2000})
    assert trial.train.preference and trial.train.preference.beta == 2000
