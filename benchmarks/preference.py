"""Speed of a step that trains on preferences, beside a plain loop that keeps a second copy as the reference.

    python -m benchmarks.preference
    python -m benchmarks.preference --base models/emoji-base --steps 12

The plain loop is what a script does: it copies the denoiser without its adapter, and computes the loss of the
paper from both. All take turns step by step, on the same rows, and the median of the steps' ratios counts.
Also printed: parameters that each holds beside the adapter, for which the copy is a second base.
"""

import argparse
import copy
import time
from collections.abc import Callable
from statistics import median

import torch
from torch.nn.functional import logsigmoid

from ray_jobs.config import Config, load_config
from ray_jobs.console import show
from ray_jobs.console.commands import command_parser
from ray_jobs.data.feeding.streaming import SOURCE
from ray_jobs.diffusion.finetuning import FineTuning
from ray_jobs.diffusion.objectives import Draws, add_noise
from ray_jobs.training.batch import InputMaker, Piece
from ray_jobs.training.engine import Engine
from ray_jobs.training.phases import Stage, stages_of
from ray_jobs.training.setup import build_engine, build_model
from ray_jobs.weights.encoders import Encoders

PAIRS = 8
CPU = torch.device("cpu")


class Ours:
    """The project's step: pieces through the engine, the reference by a switch of adapters."""

    def __init__(self, config: Config, rows: dict[str, torch.Tensor], empty: dict[str, torch.Tensor]) -> None:
        assert config.train.preference
        loss = config.train.preference.loss
        pipeline, self.model = build_model(config)
        self.engine: Engine = build_engine(self.model, config.train, 1)
        self.maker = InputMaker(
            pipeline.vae,
            self.model,
            empty,
            CPU,
            seed=0,
            caption_dropout=0.0,
            num_references=1 if loss == "dpo" else 0,
            preference=loss,
        )
        self.rows = {name: rows[name] for name in self.maker.columns}
        self.stage: Stage = stages_of(config.train, 1000)[0]

    def inputs(self, step: int) -> tuple[dict[str, object], torch.Tensor]:
        count = len(self.rows["latents_mean"])
        return self.maker.make(Piece(self.rows, list(range(count)), [1 / count] * count), step)

    def step(self, step: int) -> float:
        self.engine.set_hyperparameters(self.stage, step)
        loss = self.engine.accumulate(*self.inputs(step), last=True)
        self.engine.update(torch.zeros(1))
        return loss.item()

    @property
    def parameters(self) -> int:
        return sum(each.numel() for each in self.model.parameters() if not each.requires_grad)


class Plain:
    """A script's step: a copied denoiser as the reference, and torch's AdamW.

    Args:
        like: gives the same inputs.
    """

    def __init__(self, config: Config, like: Ours) -> None:
        assert config.train.preference
        plain = config.model_copy(update={"train": config.train.model_copy(update={"preference": None})})
        self.like, self.loss, self.beta = like, config.train.preference.loss, config.train.preference.beta
        pipeline, self.model = build_model(plain)
        self.reference = copy.deepcopy(self.model).requires_grad_(False)  # adapters begin at 0
        trained = [each for each in self.model.parameters() if each.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)

    def errors(self, model: FineTuning, latents: torch.Tensor, inputs: dict[str, object]) -> torch.Tensor:
        draws, conditions = inputs["draws"], inputs["conditions"]
        assert isinstance(draws, Draws) and isinstance(conditions, dict)
        posed = add_noise(model.objective, latents, draws, model.settings)
        return posed.losses(model.predict(posed.noisy, posed.timesteps, conditions))

    def step(self, step: int) -> float:
        inputs, _ = self.like.inputs(step)
        latents, rejected = inputs["latents"], inputs.get("rejected")
        assert isinstance(latents, torch.Tensor)
        if isinstance(rejected, torch.Tensor):
            latents = torch.cat([latents, rejected])
            draws, conditions = inputs["draws"], inputs["conditions"]
            assert isinstance(draws, Draws) and isinstance(conditions, dict)
            inputs |= {
                "draws": Draws(torch.cat([draws.position] * 2), torch.cat([draws.noise] * 2)),
                "conditions": {name: torch.cat([each] * 2) for name, each in conditions.items()},
            }
        with torch.no_grad():
            reference = self.errors(self.reference, latents, inputs)
        rewards = self.beta / 2 * (reference - self.errors(self.model, latents, inputs))
        if self.loss == "dpo":
            chosen, other = rewards.chunk(2)
            loss = -logsigmoid(chosen - other).mean()
        else:
            liked = inputs["liked"]
            assert isinstance(liked, torch.Tensor)
            sign = torch.where(liked, 1.0, -1.0)
            loss = torch.sigmoid(-sign * (rewards - rewards.mean().clamp_min(0).detach())).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.optimizer.param_groups[0]["params"], 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    @property
    def parameters(self) -> int:
        frozen = sum(each.numel() for each in self.model.parameters() if not each.requires_grad)
        return frozen + sum(each.numel() for each in self.reference.parameters())


def rows_of(base: str, side: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return encoded rows of random images, two of each pair, and the empty caption."""
    encoders, generator = Encoders(base), torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (2, PAIRS, side, side, 3), dtype=torch.uint8, generator=generator).numpy()
    (mean, logvar), (other, _) = (encoders.encode_pictures(each) for each in pixels)
    captions = encoders.encode_captions([f"picture {number}" for number in range(PAIRS)])
    rows = {"latents_mean": mean, "latents_logvar": logvar, "reference_0": other, **captions}
    rows[SOURCE] = torch.arange(PAIRS, dtype=torch.int32)
    return rows, encoders.encode_captions([""])


def timed(step: Callable[[int], float], number: int) -> float:
    began = time.perf_counter()
    step(number)
    return time.perf_counter() - began


def main(arguments: list[str] | None = None) -> None:
    parser = command_parser(__doc__)
    parser.add_argument("--config", default="configs/demo.yaml")
    parser.add_argument("--base", default="models/emoji-base")
    parser.add_argument("--steps", type=int, default=12)
    given: argparse.Namespace = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for loss in ("dpo", "kto"):
        settings = [f"model.base={given.base}", f"train.batch_size={PAIRS}", "train.num_workers=1"]
        settings += [f'train.preference={{"votes": ["none"], "loss": "{loss}"}}', "train.caption_dropout=0"]
        config = load_config(given.config, settings)
        ours = Ours(config, *rows_of(given.base, config.data.resolution))
        plain = Plain(config, ours)
        ratios, seconds = [], []
        for number in range(1, given.steps + 1):
            order = (ours, plain) if number % 2 else (plain, ours)
            found = {type(each): timed(each.step, number) for each in order}
            if number > 2:  # the first ones warm up
                ratios.append(found[Plain] / found[Ours])
                seconds.append(found[Ours])
        show(
            f"{loss}: {median(seconds):.2f} s a step, {median(ratios):.3f} of a plain loop's speed "
            f"({min(ratios):.2f} to {max(ratios):.2f} in {len(ratios)} turns); frozen parameters "
            f"{ours.parameters:,}, with a copy {plain.parameters:,}"
        )


if __name__ == "__main__":
    main()
