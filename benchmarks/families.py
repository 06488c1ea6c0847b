"""python -m benchmarks.families [--size small|full] [--family NAME ...] [--part NAME ...]

For each family of models, at the size of the tests' small models, on one thread in fp32, each claim against a
rival measured in the same run, in turns:

lora, full: training takes 0.95 or more of the images a second of a plain loop over the same diffusers class
    (forward, loss, backward, clip, AdamW). The plain loop's batch lies in memory as the family's own pipeline
    gives it to the denoiser. Ours decodes no picture either, but makes its inputs from stored rows, draws the
    posterior, and keeps averaged weights.
control: training of a ControlNet beside the frozen base, of families that have them; the plain loop calls
    both as the family's pipeline with a ControlNet does.
edits: LoRA training with a reference picture of the same size a row, of families that take them.
served: eight requests that differ in prompt, seed, steps and guidance, drawn by one engine, take at most 1 /
    1.5 of the time of the family's own pipeline called eight times. The pictures are equal.
served-edits: the same eight requests, each with a reference picture, of families that take them.

What a model of true size gains is another question: small ones show what is not the model. Last comes the
number of lines of the family's file, then all figures as one line of JSON.
"""

import argparse
import inspect
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import mse_loss, pixel_unshuffle

from benchmarks.gpu.train import Loop
from benchmarks.train.measuring import timed_turns
from benchmarks.train.rivals import Optimizing, ddpm_scheduler
from ray_jobs.config import Config, TrainConfig
from ray_jobs.diffusion.families import FAMILIES, Family
from ray_jobs.diffusion.families.control import CONTROLNET
from ray_jobs.diffusion.families.family import reference
from ray_jobs.diffusion.families.noise_schedule import RectifiedFlow
from ray_jobs.diffusion.finetuning import add_lora
from ray_jobs.training.setup import build_model
from ray_jobs.weights.encoders import Encoders
from ray_jobs.weights.loading import load_pipeline
from serving.engine.engine import Engine
from serving.request import Request
from tests import tiny_models
from tests.serving import plain_diffusers

RESULTS = Path(__file__).parent / "results" / "families.json"
METHODS = ("lora", "full")
CONTROL, EDITS, SERVED_EDITS = "control", "edits", "served-edits"
GATES = {"lora": 0.95, "full": 0.95, CONTROL: 0.95, EDITS: 0.95, "served": 1.5, SERVED_EDITS: 1.5}
TURNS, STEPS = {"small": 1, "full": 5}, {"small": 1, "full": 6}
DRAWING_TURNS = {"small": 1, "full": 3}
SIDE = 64  # pixels
# As many words each: FLUX.3's pipeline encodes one prompt a call, in windows of its length.
PROMPTS = ("a small red circle", "a big blue cross", "a small green square", "a big orange triangle")
GUIDANCE_SCALE = 4.0
REQUESTS = [
    Request(PROMPTS[seed % 4], seed, steps, GUIDANCE_SCALE if seed % 2 else 1.0, None, SIDE, SIDE)
    for seed, steps in enumerate((4, 6, 8, 10, 10, 8, 6, 4))
]

Call = tuple[list[Any], dict[str, Any]]


class PlainLoop(Optimizing):
    """Trains the denoiser of diffusers' own pipeline on one batch, for ever.

    It is there for its speed: time and target have the signs of most families, also for the others.

    Args:
        pipeline: as a user of diffusers loads it.
        with_reference: each row has a reference picture.
    """

    def __init__(
        self, pipeline: Any, family: Family, train: TrainConfig, *, with_reference: bool = False
    ) -> None:
        self.call = denoiser_call(pipeline, family, with_reference=with_reference)
        denoiser = getattr(pipeline, family.denoiser).requires_grad_(False)
        if train.method == "lora":
            targets = list(family.trainable[family.denoiser])
            add_lora(
                denoiser, rank=train.lora.rank, alpha=train.lora.alpha, dropout=0.0, target_modules=targets
            )
        else:
            denoiser.requires_grad_(True)
        self.begin(pipeline, family, denoiser, train)

    def begin(self, pipeline: Any, family: Family, trained: Any, train: TrainConfig) -> None:
        """Set the optimizer and the noise."""
        Optimizing.__init__(self, trained.train(), train)
        flow = isinstance(family.schedule, RectifiedFlow)
        self.scheduler = None if flow else ddpm_scheduler(pipeline)

    def forward(self) -> torch.Tensor:
        """Return the loss of the batch, with new noise at new times."""
        clean, time = _found(self.call, "hidden_states", 0), _found(self.call, "timestep", 1)
        clean = torch.stack(clean) if isinstance(clean, list) else clean
        noise, position = torch.randn_like(clean), torch.rand(len(clean))
        if self.scheduler:
            steps = (1000 * position).long()
            noisy, target, told = self.scheduler.add_noise(clean, noise, steps), noise, steps
        else:
            part = position.reshape(-1, *[1] * (clean.dim() - 1))
            noisy, target = (1 - part) * clean + part * noise, noise - clean
            told = (position * time.max().clamp(max=1000.0)).to(time.dtype)
        output = self.predict(noisy, told)
        output = torch.stack(output) if isinstance(output, list) else output
        if output.dim() == 3:  # tokens: Qwen-Image 2.1 returns the captions' too
            output = output[:, -target.shape[1] :]
            target = target[..., : output.shape[2]]  # FLUX.1 Fill's input has further channels
        elif output.shape[2:] != target.shape[2:]:  # HiDream returns patches of 2 x 2 while it trains
            target = pixel_unshuffle(target, 2).unflatten(1, (-1, 4)).flatten(3).transpose(2, 3)
        return mse_loss(output[:, : target.shape[1]], target)  # PixArt returns variances too

    def predict(self, noisy: torch.Tensor, told: torch.Tensor) -> Any:
        """Return the denoiser's output for noisy latents at times as it is told them."""
        arguments, options = _replaced(self.call, noisy, told)
        return self.unet(*arguments, **options)[0]

    def step(self) -> None:
        self.backward(self.forward())
        self.update()


class PlainControlLoop(PlainLoop):
    """Trains a ControlNet beside its frozen base, both called as diffusers' own pipeline calls them."""

    def __init__(self, pipeline: Any, family: Family, train: TrainConfig) -> None:
        control = family.control
        assert control
        torch.manual_seed(0)
        denoiser = getattr(pipeline, family.denoiser)
        steered: Any = control.pipeline(pipeline, control.network(denoiser))
        self.denoiser = denoiser.requires_grad_(False)
        given: dict[str, Any] = {
            control.image_argument: [Image.fromarray(each) for each in noise_pictures(len(PROMPTS))]
        }
        self.call, self.control_call = (
            denoiser_call(steered, family, component=name, **given) for name in (family.denoiser, CONTROLNET)
        )
        self.added = [
            name
            for name, value in self.call[1].items()
            if ("controlnet" in name or "additional_residual" in name) and not isinstance(value, bool)
        ]
        self.begin(pipeline, family, steered.controlnet.requires_grad_(True), train)

    def predict(self, noisy: torch.Tensor, told: torch.Tensor) -> Any:
        arguments, options = _replaced(self.control_call, noisy, told)
        outputs = self.unet(*arguments, **options)
        arguments, options = _replaced(self.call, noisy, told)
        options |= dict(zip(self.added, outputs, strict=True))
        return self.denoiser(*arguments, **options)[0]


def denoiser_call(
    pipeline: Any, family: Family, *, with_reference: bool = False, component: str = "", **further: Any
) -> Call:
    """Return the arguments of the denoiser's first call by its own pipeline, for all of `PROMPTS` at once.

    Args:
        component: name of another component, whose call it is.
        further: arguments of the pipeline.
    """
    calls: list[Call] = []
    denoiser = getattr(pipeline, component or family.denoiser)

    def record(_: object, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        kept = {name: value for name, value in options.items() if not name.startswith("kv_cache")}
        calls.append((list(arguments), kept))

    hook = denoiser.register_forward_pre_hook(record, with_kwargs=True)
    steps = 2  # one step would be the first and the last, 0 / 0 in some schedules
    given: dict[str, Any] = {"num_inference_steps": steps, "height": SIDE, "width": SIDE}
    settings = getattr(pipeline, family.denoiser).config
    given |= {"output_type": "latent"} | family.guidance_arguments(settings, 1.0) | further
    given |= {"image": Image.fromarray(noise_pictures(1)[0])} if with_reference else {}
    plain_diffusers.keep_size(pipeline, SIDE, SIDE)
    with torch.no_grad():
        pipeline(prompt=prompts_of(family), **plain_diffusers.known(pipeline, given))
    hook.remove()
    first = calls[:: len(calls) // (len(calls) // steps)] if len(calls) > steps else calls[:1]
    names = list(first[0][1])
    arguments = [_joined([call[0][place] for call in first]) for place in range(len(first[0][0]))]
    return arguments, {name: _joined([call[1][name] for call in first]) for name in names}


def _joined(values: list[Any]) -> Any:
    """Return one value for all rows of several calls of one row each; what is alike for all has no rows."""
    if len(values) > 1 and isinstance(values[0], torch.Tensor) and len(values[0]) == 1:
        return torch.cat(values)
    return values[0]


def _found(call: Call, name: str, place: int) -> Any:
    arguments, options = call
    if place < len(arguments):
        return arguments[place]
    return options[name] if name in options else options[f"{name}s"]


def _replaced(call: Call, latents: torch.Tensor, time: torch.Tensor) -> Call:
    """Return the call with other latents and times."""
    arguments, options = list(call[0]), dict(call[1])
    for name, place, value in (("hidden_states", 0, latents), ("timestep", 1, time)):
        old = _found(call, name, place)
        new = list(value) if isinstance(old, list) else value
        if place < len(arguments):
            arguments[place] = new
        else:
            options[name if name in options else f"{name}s"] = new
    return arguments, options


def noise_pictures(count: int) -> np.ndarray:
    """Return pictures of noise: uint8, N x SIDE x SIDE x 3."""
    return np.random.default_rng(0).integers(0, 256, (count, SIDE, SIDE, 3), np.uint8)


def config_of(folder: Path, method: str) -> Config:
    columns: dict[str, dict[str, Any]] = {
        EDITS: {"reference_columns": ["before"]},
        CONTROL: {"control_column": "edges"},
    }
    source: dict[str, Any] = {"path": "unused"} | columns.get(method, {})
    return Config.model_validate(
        {
            "name": "families",
            "storage": str(folder),
            "data": {"sources": [source], "resolution": SIDE},
            "model": {"base": str(folder)},
            "train": {
                "method": {EDITS: "lora", CONTROL: "controlnet"}.get(method, method),
                "batch_size": len(PROMPTS),
                "num_workers": 1,
                "precision": "fp32",
                "lora": {"rank": 16, "alpha": 16},
            },
            "search": {"learning_rates": [1e-4], "ladder": [1000]},
        }
    )


def prompts_of(family: Family) -> list[str]:
    """Return the prompts of the rows: of one length where the pipeline draws one at a time, without masks."""
    return [PROMPTS[0]] * len(PROMPTS) if family.text.sees_references else list(PROMPTS)


def our_loop(config: Config) -> Loop:
    """Return training's steps on the rows that `prepare` would store of noise and of the prompts."""
    encoders = Encoders(config.model.base)
    prompts = prompts_of(encoders.family)
    pixels = noise_pictures(len(PROMPTS))
    mean, logvar = encoders.encode_pictures(pixels)
    sizes = torch.tensor([[SIDE, SIDE, 0, 0, SIDE, SIDE]] * len(PROMPTS), dtype=torch.int32)
    rows = {"latents_mean": mean, "latents_logvar": logvar, "conditioning": sizes}
    rows |= {reference(number): mean for number in range(config.data.num_references)}
    if encoders.family.text.sees_references and config.data.num_references:
        rows |= encoders.encode_shown(prompts, np.stack([pixels] * config.data.num_references, axis=1))
    else:
        rows |= encoders.encode_captions(prompts)
    if (control := encoders.family.control) is not None:
        rows["control"] = mean if control.form == "latents" else torch.from_numpy(pixels).permute(0, 3, 1, 2)
    rows |= encoders.encode_masked(tiny_models.half_painted(pixels))
    pipeline, model = build_model(config)
    return Loop(config, pipeline, model, encoders.encode_captions([""]), rows, torch.device("cpu"))


def training(folder: Path, family: Family, method: str, size: str) -> dict[str, Any]:
    """Return images a second of both loops, and the ratio of ours to the plain one's."""
    config, edits = config_of(folder, method), method == EDITS
    with our_loop(config) as ours:
        loaded = plain_diffusers.load(folder)
        if method == CONTROL:
            plain: PlainLoop = PlainControlLoop(loaded, family, config.train)
        else:
            plain = PlainLoop(loaded, family, config.train, with_reference=edits)
        loops = {"ours": ours.step, "plain": plain.step}
        seconds = timed_turns(loops, turns=TURNS[size], steps=STEPS[size])
    speeds = {name: len(PROMPTS) / median(turns) for name, turns in seconds.items()}
    return {"images_per_second": speeds, "ratio": _ratio(seconds)}


def edit_requests() -> list[Request]:
    """Return `REQUESTS`, each with a reference of noise."""
    pictures = torch.from_numpy(noise_pictures(len(REQUESTS)))
    return [
        replace(request, references=(picture,)) for request, picture in zip(REQUESTS, pictures, strict=True)
    ]


def serving(folder: Path, requests: Sequence[Request], size: str) -> dict[str, Any]:
    """Return pictures a second of an engine and of the pipeline called by itself, and their ratio."""
    plain = plain_diffusers.load(folder)
    with ExitStack() as stack:
        engine = Engine(load_pipeline(str(folder)), max_rows=len(requests))
        requests = [plain_diffusers.understood(plain, request) for request in requests]
        stack.callback(engine.close)

        def ours() -> list[torch.Tensor]:
            futures = [engine.submit(request) for request in requests]
            engine.drain()
            return [future.result(0).pixels for future in futures]

        def rival() -> list[torch.Tensor]:
            return [plain_diffusers.draw(plain, request) for request in requests]

        levels = max(float((mine - other).abs().max()) for mine, other in zip(ours(), rival(), strict=True))
        loops: Mapping[str, Callable[[], object]] = {"ours": ours, "plain": rival}
        seconds = timed_turns(loops, turns=DRAWING_TURNS[size], steps=1)
    speeds = {name: len(requests) / median(turns) for name, turns in seconds.items()}
    return {"pictures_per_second": speeds, "ratio": _ratio(seconds), "largest_difference": levels}


def _ratio(seconds: Mapping[str, list[float]]) -> float:
    """Return the median over the turns of the plain one's seconds by ours."""
    return median(plain / ours for ours, plain in zip(seconds["ours"], seconds["plain"], strict=True))


def lines_of(family: Family) -> int:
    return len(Path(inspect.getfile(type(family))).read_text(encoding="utf-8").splitlines())


def measure(name: str, size: str, parts: Collection[str] = tuple(GATES)) -> dict[str, Any]:
    """Return a family's figures by part, those that it has, and its lines."""
    torch.set_num_threads(1)
    family, trained, drawn = FAMILIES[name], [*METHODS], {"served": REQUESTS}
    if family.control:
        trained.append(CONTROL)
    if family.max_references:
        trained.append(EDITS)
        drawn[SERVED_EDITS] = edit_requests()
    with TemporaryDirectory() as root:
        folder = tiny_models.write(name, Path(root) / name)
        figures = {part: training(folder, family, part, size) for part in trained if part in parts}
        figures |= {part: serving(folder, drawn[part], size) for part in drawn if part in parts}
    return figures | {"lines": lines_of(family)}


def tell(name: str, figures: Mapping[str, Any]) -> str:
    said = []
    for part, gate in GATES.items():
        if part not in figures:
            continue
        ratio = figures[part]["ratio"]
        said.append(f"{part} {ratio:.2f}" + ("" if ratio >= gate else f" (below {gate})"))
    return f"{name:<26} {', '.join(said)}; {figures['lines']} lines"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.families",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--size", choices=("small", "full"), default="full", help="small: only that it runs")
    parser.add_argument(
        "--family", nargs="+", choices=tuple(FAMILIES), default=tuple(FAMILIES), help="else all"
    )
    parser.add_argument(
        "--part", nargs="+", choices=tuple(GATES), default=tuple(GATES), help="else all; others are kept"
    )
    arguments = parser.parse_args()
    figures: dict[str, Any] = {}
    record = {"benchmark": "families", "size": arguments.size, "threads": 1, "families": figures}
    for name in arguments.family:
        figures[name] = measure(name, arguments.size, arguments.part)
        print(tell(name, figures[name]), flush=True)
        if arguments.size == "full":
            stored = json.loads(RESULTS.read_text())["families"] if RESULTS.exists() else {}
            stored[name] = stored.get(name, {}) | figures[name]
            RESULTS.write_text(json.dumps(record | {"families": stored}, indent=1) + "\n")
    print(f"JSON {json.dumps(record)}", flush=True)


if __name__ == "__main__":
    main()
