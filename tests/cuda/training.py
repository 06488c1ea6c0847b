"""Training steps on a pretended GPU: what launches, waits and copies each of its parts makes.

`python -m tests.cuda training FOLDER` prints a line of JSON for each case; FOLDER has the models of
`tests.tiny_models`, which are written there if they are missing.
"""

import hashlib
import json
import logging
import traceback
from pathlib import Path
from typing import Any

import torch

from ray_jobs.config import Config
from ray_jobs.data.encoding.shapes import square_latents
from ray_jobs.diffusion.ema import EMA
from ray_jobs.diffusion.families import FAMILIES
from ray_jobs.diffusion.quantization import FORMATS
from ray_jobs.training.batch import InputMaker, Piece, loss_shares
from ray_jobs.training.engine import pieces_a_step
from ray_jobs.training.flat import Flat
from ray_jobs.training.monitor import LATE, Meter
from ray_jobs.training.packed_steps import PackedInputs, accumulate, rehearse
from ray_jobs.training.phases import stages_of
from ray_jobs.training.rehearsal import blank, rehearsed
from ray_jobs.training.setup import build_engine, build_engines, build_model, build_pack
from ray_jobs.training.startup import StartUp
from ray_jobs.training.state import snapshot, whole
from ray_jobs.weights.encoders import Encoders
from tests.cuda.budgets import ON_HOST, PLAIN
from tests.cuda.pretend import Pretend
from tests.tiny_models import FAMILY_MODELS, half_painted, write

CASES: dict[str, dict[str, Any]] = {
    "dora in pieces, recomputed": {
        "method": "lora",
        "lora": {"use_dora": True, "rank": 4, "alpha": 4},
        "micro_batch_size": 2,
        "gradient_checkpointing": True,
    },
    "full, channels last, offset noise": {
        "method": "full",
        "channels_last": True,
        "loss": {"offset_noise": 0.1, "input_perturbation": 0.1, "huber_delta": 0.1},
    },
}
CASES_OF_CONTROL: dict[str, dict[str, Any]] = {
    "controlnet": {"method": "controlnet"},
    "controlnet in pieces, recomputed": {
        "method": "controlnet",
        "micro_batch_size": 2,
        "gradient_checkpointing": True,
        "channels_last": True,
    },
}
RECOMPUTED = {"gradient_checkpointing": True, "micro_batch_size": 2}
# Each is also run with the base's blocks on the host.
CASES_OF_BASES: dict[str, dict[str, Any]] = {
    "lora, recomputed": RECOMPUTED,
    "dora, recomputed": RECOMPUTED | {"lora": {"use_dora": True}, "channels_last": True},
    "lora on nf4, recomputed": RECOMPUTED | {"quantize": "nf4"},
}
CASES_OF_PLAIN: dict[str, dict[str, Any]] = (
    {"lora": {"method": "lora"}}
    | {f"lora on {format_name}": {"quantize": format_name} for format_name in FORMATS}
    | CASES_OF_BASES
    | {f"{ON_HOST}{case}": each | {"offload_base": True} for case, each in CASES_OF_BASES.items()}
)
STEPS = 2  # the second is counted: Adam has its state then
CAPTIONS = ["a red circle", "a blue cross", "", "a green square"]


def config_of(base: Path, folder: Path, quantize: str | None = None, **train: Any) -> Config:
    settings = {"batch_size": 4, "num_workers": 1, "use_gpu": True, "precision": "bf16", **train}
    control = {"control": {"kind": "edges"}} if train.get("method") == "controlnet" else {}
    return Config.model_validate(
        {
            "name": "pretended",
            "storage": str(folder),
            "data": {"source": "unused", "resolution": 64, **control},
            "model": {"base": str(base), "quantize": quantize},
            "train": settings,
            "search": {"learning_rates": [1e-3], "ladder": [1000]},
        }
    )


def encoded_rows(config: Config) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return the columns of four rows, as they are stored, and the encoded empty caption."""
    encoders = Encoders(config.model.base, device="cuda")
    pixels = torch.randint(0, 256, (4, 64, 64, 3), dtype=torch.uint8).numpy()
    mean, logvar = encoders.encode_pictures(pixels)
    captions, empty = encoders.encode_captions(CAPTIONS), encoders.encode_captions([""])
    sizes = torch.tensor([[64, 64, 0, 0, 64, 64]] * 4, dtype=torch.int32)
    rows = {"latents_mean": mean, "latents_logvar": logvar, "conditioning": sizes, **captions}
    rows |= encoders.encode_masked(half_painted(pixels))
    if (control := encoders.family.control) is not None:
        rows["control"] = mean if control.form == "latents" else torch.from_numpy(pixels).permute(0, 3, 1, 2)
    stored = {name: each.bfloat16() if each.is_floating_point() else each for name, each in rows.items()}
    return stored, empty


def train(config: Config, device: Pretend) -> dict[str, Any]:
    """Take steps as the loop takes them; return the counts of the last one."""
    torch.manual_seed(0)
    cuda = torch.device("cuda:0")
    rows, empty = encoded_rows(config)
    pipeline, model = build_model(config, "cuda")
    model.move(cuda)  # on a real GPU parameters stay the same objects; here they are new ones
    model.remember_trained({})
    maker = InputMaker(
        pipeline.vae,
        model,
        empty,
        cuda,
        seed=0,
        caption_dropout=config.train.caption_dropout,
        has_control=config.data.has_control,
    )
    batch = {name: rows[name] for name in maker.columns}
    engine = build_engine(model, config.train, 1, cuda)
    assert isinstance(engine, Flat)
    averaged = list(engine.averaged.items())
    average = EMA(averaged, 0.99)
    meter = Meter("trial", [1000], config.train, None, 1, StartUp())  # rank 0 asks Ray
    meter.start(engine)
    [stage] = stages_of(config.train, 1000)
    pieces = Piece.cut(batch, loss_shares(config.train), 1, 0, pieces_a_step(config.train, 1))
    found: dict[str, Any] = {}
    losses: list[torch.Tensor] = []

    def count(part: str) -> None:
        kinds = {"waits": device.waits, "to_device": device.to_device, "pageable": device.pageable}
        found[part] = {"launches": device.launches} | {kind: dict(each) for kind, each in kinds.items()}
        device.reset()

    for step in range(1 - LATE, 1):  # so that a step's numbers are read as in the middle of a training
        meter.add(step, 0.0, torch.tensor([1.0, 0.0, 0.0], device=cuda), torch.ones((), device=cuda))
    for step in range(1, STEPS + 1):
        device.reset()
        sent = [maker.begin(piece, step) for piece in pieces]
        count("send")
        share = torch.zeros((), device=cuda)
        engine.set_hyperparameters(stage, step)
        for number, each in enumerate(sent, start=1):
            inputs, weights = maker.finish(each)
            share += engine.accumulate(inputs, weights, last=number == len(pieces))
        count("passes")
        gradients = [chunk.kept.clone() for chunk in engine.chunks if chunk.kept is not None]
        losses.append(share)
        device.reset()
        sums, norm = engine.update(meter.told(share))
        count("update")
        average.update(averaged, step)
        count("average")
        meter.add(step, stage.rate(step), sums, norm)
        count("meter")
    tensors, _ = snapshot(engine, average.averages)
    assert all(tensor.device.type == "cpu" for tensor in tensors.values())
    whole(engine, average.averages)
    frozen = {id(each): each for block in model.blocks() for each in block.parameters()}
    trained = {id(each): each for _, each in model.all_trained}
    places = {
        name: sorted({each.device.type for each in parameters})
        for name, parameters in (
            ("blocks", [each for key, each in frozen.items() if key not in trained]),
            ("trained", list(trained.values())),
        )
    }
    states = digest([*gradients, engine.weights])
    told = {"pieces": len(pieces), "blocks": len(model.blocks()), "losses": [each.item() for each in losses]}
    return told | {"states": states, "places": places, **found}


HELD = 7  # rows of all trials that the pretended memory holds at once
PACKED: list[dict[str, Any]] = [
    {"learning_rate": 1e-3},
    {"learning_rate": 2e-3, "lora": {"rank": 2}},
    {"loss": {"offset_noise": 0.1}, "caption_dropout": 0.0},
]


def train_pack(configs: list[Config], device: Pretend) -> dict[str, Any]:
    """Rehearse a pack and take its steps; return the rows that fit, and the counts of the last step."""
    torch.manual_seed(0)
    cuda = torch.device("cuda:0")
    pipeline, pack = build_pack(configs, "cuda")
    pack.model.move(cuda)  # as in `train`
    members = list(pack.members.values())
    for member, config in zip(members, configs, strict=True):
        member.remember_trained(config.train.groups)
    rows, empty = encoded_rows(configs[0])
    makers = [
        InputMaker(pipeline.vae, member, empty, cuda, seed=0, caption_dropout=config.train.caption_dropout)
        for member, config in zip(members, configs, strict=True)
    ]
    engines, inputs = build_engines(pack, configs, 1, cuda), PackedInputs(makers)
    batch = {name: rows[name] for name in makers[0].columns}
    pieces = Piece.cut(batch, loss_shares(configs[0].train), 1, 0, 1)
    stages = [stages_of(config.train, 1000)[0] for config in configs]

    def try_rows(rows: int) -> None:
        rehearse(pack, engines, inputs, blank(makers[0], square_latents(configs[0]), rows))
        if len(configs) * rows > HELD:
            raise torch.OutOfMemoryError("CUDA out of memory")

    found: dict[str, Any] = {"held": rehearsed(configs[0].train, try_rows, 1, cuda).micro_batch_size}

    def counted(part: str) -> None:
        kinds = {"waits": device.waits, "to_device": device.to_device, "pageable": device.pageable}
        found[part] = {"launches": device.launches} | {kind: dict(each) for kind, each in kinds.items()}
        device.reset()

    for step in range(1, STEPS + 1):
        for engine, stage in zip(engines, stages, strict=True):
            engine.set_hyperparameters(stage, step)
        device.reset()
        begun = [inputs.begin({0: piece}, step) for piece in pieces]
        counted("send")
        shares = accumulate(pack, engines, inputs, begun, range(len(configs)), step=step, rank=0)
        counted("passes")
        for engine, share in zip(engines, shares, strict=True):
            engine.update(share[None])
        counted("update")
    return found | {"losses": [share.item() for share in shares]}


def digest(tensors: list[torch.Tensor]) -> str:
    """Return a digest of tensors' values, to the bit."""
    return hashlib.sha256(
        b"".join(each.detach().cpu().float().numpy().tobytes() for each in tensors)
    ).hexdigest()


def main(folder: Path) -> None:
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    for name in FAMILY_MODELS:
        base = folder / name
        if not base.exists():
            write(name, base)
        cases = CASES | (CASES_OF_PLAIN if name in PLAIN else {})
        cases |= CASES_OF_CONTROL if FAMILIES[name].control else {}
        for case, settings in cases.items():
            try:
                with Pretend() as device:
                    found = train(config_of(base, folder, **settings), device)
            except Exception:  # told, so that the other cases are seen too
                found = {"error": traceback.format_exc()}
            print(json.dumps({"family": name, "case": case, **found}), flush=True)
    for name in sorted(PLAIN):
        try:
            with Pretend() as device:
                configs = [config_of(folder / name, folder, **settings) for settings in PACKED]
                found = train_pack(configs, device)
        except Exception:  # as above
            found = {"error": traceback.format_exc()}
        print(json.dumps({"family": "pack", "case": name, **found}), flush=True)
