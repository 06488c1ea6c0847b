"""python -m benchmarks.subject [--adapter FOLDER] [--seeds 3] [--storage runs/subject-benchmark]

Does the subject score choose a better step than the last one, and than the one that FID would choose?

The example's cat is learned from the demo's base, and from the demo's published adapter (`--adapter`, such as
`runs/demo/model`), with several seeds, each time over four folds and too far on purpose. Each step is then
judged by two measures that rank nothing, in features of Inception, which the subject score does not use here:

likeness: mean cosine of pictures of the subject's prompt to the fold's photos, which were not trained on.
fit: how much of what a prompt changes remains. Prompts with the subject's word (`a crying nch cat`) are drawn
    after training, the same ones with the class's (`a crying cat`) by the base. Each side's features lose
    their mean over the prompts. Then it is the mean cosine of pictures of the same prompt, less that of
    different ones: as CLIP's agreement, of a model that was never told what words mean.

Drawing takes a second a picture on one core of 2026; two bases with three seeds take up to an hour.

Measured at steps 20, 40 and 120, the chosen one with a star:

    run              subject score        likeness              fit
    base, seed 0     0.76, 0.50*, 0.54    0.759, 0.780, 0.794   0.135, 0.131, 0.069
    base, seed 1     0.90, 0.58, 0.47*    0.752, 0.781, 0.789   0.144, 0.128, 0.073
    base, seed 2     0.83, 0.62, 0.45*    0.766, 0.784, 0.798   0.146, 0.126, 0.055
    adapted, seed 0  1.42*, 1.40, 1.49    0.789, 0.797, 0.794   0.225, 0.175, 0.156
    adapted, seed 1  1.42*, 1.63, 1.52    0.777, 0.797, 0.795   0.181, 0.167, 0.064
    adapted, seed 2  1.35*, 1.59, 1.46    0.786, 0.798, 0.799   0.192, 0.194, 0.203
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
from safetensors.torch import load
from torch.nn.functional import normalize

from cluster.storage import Storage
from ray_jobs.config import Config, load_config
from ray_jobs.data.feeding.dataset import Dataset
from ray_jobs.evaluation.actor import FEATURES, Evaluator
from ray_jobs.evaluation.cross_validation import splits, standard_error
from ray_jobs.planning.settled import settled
from ray_jobs.run.folder import RunFolder
from ray_jobs.training.checkpoint import find_rungs
from ray_jobs.tuning.results import read_result
from ray_jobs.weights.feature_networks import NetworkSet

CONFIG = "configs/dreambooth.yaml"
LADDER = (20, 40, 120)
WORD, CLASS = "nch cat", "cat"
PROMPTS = (
    *(f"a {{}} {how}" for how in ("crying", "with heart eyes", "with sunglasses")),
    *(f"a {how} {{}}" for how in ("kissing", "pouting", "smiling", "red", "sleeping")),
)
DRAWN = 2  # pictures of each prompt, by the training of each fold


@dataclass(frozen=True)
class Step:
    """What a step of one run is worth, as means over the folds; the first two are what could choose it."""

    step: int
    subject: float
    fid: float
    likeness: float
    fit: float


def run(config_file: Path, storage: Path) -> None:
    """Run the search of a configuration; a finished one is skipped."""
    stage = [sys.executable, "-m", "ray_jobs.search", "--config", str(config_file)]
    command = [sys.executable, "-m", "cluster.submit", "--config", str(config_file), "--", *stage]
    with (storage / f"{config_file.stem}.log").open("a") as log:
        subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT)


def configured(name: str, storage: Path, seed: int, adapter: Path | None) -> Path:
    """Write the configuration of a run; return its file."""
    settings = {
        "extends": str(Path(CONFIG).resolve()),
        "name": name,
        "storage": str(storage),
        "seed": seed,
        "search": {"ladder": list(LADDER), "folds": 4},
        "data": {"folds": 4},
        "evaluate": {"seed": seed, "prompts": [], "batch_size": 8},
    }
    if adapter:
        settings["model"] = {"adapter": str(adapter.resolve())}
    file = storage / f"{name}.yaml"
    file.write_text(json.dumps(settings))  # JSON is YAML
    return file


def judged(config: Config) -> tuple[list[Step], int]:
    """Return the steps of a finished search, and the chosen one."""
    folder, dataset = RunFolder.of(config), Dataset.of_run(config)
    assert dataset, f"{folder.dataset.uri}: not prepared"
    found = read_result(config, dataset)
    assert found, f"{folder.search.uri}: not finished"
    evaluator = Evaluator(config, dataset, os.cpu_count() or 1)
    network = evaluator.networks.first.identity
    base = prompted(evaluator, None, CLASS)
    values: dict[int, list[tuple[float, float]]] = {}
    rungs = find_rungs(folder.trainings)
    for split in splits(config):
        photos = [row["image"] for row in dataset.judged_by(split).pictures(split.name, 100)]
        real = torch.from_numpy(evaluator.picture_features(photos, by=NetworkSet.FIRST)[network])
        [training] = [name for name in rungs if name.endswith(f"fold-{split.fold}")]
        for rung in rungs[training]:
            drawn = load(Storage.open(rung.uri).read_bytes(FEATURES))[network]
            likeness = float((normalize(drawn, dim=1) @ normalize(real, dim=1).T).mean())
            pair = likeness, fit(prompted(evaluator, rung.weights, WORD), base)
            values.setdefault(rung.step, []).append(pair)
    rows = {row.step: row for row in found.rows}
    steps = []
    for step, pairs in sorted(values.items()):
        row = rows[step]
        assert row.subject is not None
        likeness, fits = (fmean(each) for each in zip(*pairs, strict=True))
        steps.append(Step(step, row.subject, row.fid, likeness, fits))
    return steps, found.winner.step


def prompted(evaluator: Evaluator, weights: str | None, subject: str) -> torch.Tensor:
    """Features of pictures of each prompt about a subject: float32, prompts x pictures x D."""
    captions = [prompt.format(subject) for prompt in PROMPTS for _ in range(DRAWN)]
    seeds = list(range(DRAWN)) * len(PROMPTS)
    drawn = evaluator.sample_features(weights, captions, seeds, by=NetworkSet.FIRST)
    return torch.from_numpy(drawn[evaluator.networks.first.identity]).unflatten(0, (len(PROMPTS), DRAWN))


def fit(after: torch.Tensor, base: torch.Tensor) -> float:
    """Agreement of what prompts change; see the module.

    Args:
        after, base: prompts x pictures x D.
    """
    one, other = (normalize((each - each.mean(dim=0)).mean(dim=1), dim=1) for each in (after, base))
    cosines = one @ other.T
    own = cosines.diagonal()
    return float(own.mean() - (cosines.sum() - own.sum()) / (cosines.numel() - len(own)))


def report(runs: Mapping[str, tuple[list[Step], int]]) -> None:
    """Print the table, and the differences with their standard errors over runs."""
    chosen: dict[str, list[Step]] = {"subject score": [], "last step": [], "FID": []}
    for name, (steps, winner) in runs.items():
        print(f"\n{name}\n{'step':>6}{'subject':>9}{'FID':>8}{'likeness':>10}{'fit':>8}")
        for each in steps:
            mark = "  chosen" if each.step == winner else ""
            values = f"{each.subject:9.2f}{each.fid:8.1f}{each.likeness:10.3f}{each.fit:8.3f}"
            print(f"{each.step:6}{values}{mark}")
        chosen["subject score"].append(next(each for each in steps if each.step == winner))
        chosen["last step"].append(steps[-1])
        chosen["FID"].append(min(steps, key=lambda each: each.fid))
    ours, differences = chosen.pop("subject score"), {}
    print(f"\nchosen by the subject score, over {len(runs)} runs, less what is chosen by")
    for rival, steps in chosen.items():
        for measure in ("likeness", "fit"):
            apart = [getattr(o, measure) - getattr(r, measure) for o, r in zip(ours, steps, strict=True)]
            error = standard_error(apart) if len(apart) > 1 else float("nan")
            differences[f"{measure} against {rival}"] = [fmean(apart), error]
            print(f"{rival:>10}: {measure} {fmean(apart):+.3f} ± {error:.3f}")
    record = {name: [vars(each) for each in steps] for name, (steps, _) in runs.items()}
    print(f"JSON {json.dumps({'runs': record, 'differences': differences})}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--adapter", type=Path, help="folder of the second base's adapter; default: one base")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--storage", type=Path, default=Path("runs/subject-benchmark"))
    given = parser.parse_args(arguments)
    storage = given.storage.resolve()
    storage.mkdir(parents=True, exist_ok=True)
    bases = {"base": None, **({"adapted": given.adapter} if given.adapter else {})}
    runs = {}
    for seed in range(given.seeds):
        for base, adapter in bases.items():
            file = configured(f"{base}-{seed}", storage, seed, adapter)
            run(file, storage)
            runs[file.stem] = judged(settled(load_config(str(file))))
            print(f"{file.stem}: chosen step {runs[file.stem][1]}", flush=True)
    report(runs)


if __name__ == "__main__":
    main()
