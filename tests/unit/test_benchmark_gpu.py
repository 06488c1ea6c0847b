"""`make bench-gpu` on a CPU: every phase runs on small models, and its figures are those that it tells."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu.__main__ import SECONDS
from benchmarks.gpu.chips import peak_tflops
from benchmarks.gpu.gates import gates_of
from benchmarks.gpu.measuring import flops_of, union
from benchmarks.gpu.shapes import SHAPES

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 NVL", 835.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H200", 989.0),
        ("NVIDIA GH200 480GB", 989.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA GeForce RTX 4090", 165.0),
        ("Tesla T4", None),
    ],
)
def test_a_device_has_the_peak_of_its_longest_known_name(name: str, peak: float | None) -> None:
    assert peak_tflops(name) == peak


@pytest.mark.parametrize(
    ("model", "parameters"), [("SD1.5", 859_520_964), ("SDXL", 2_567_463_684), ("FLUX", 11_901_408_320)]
)
def test_models_have_the_published_numbers_of_parameters(model: str, parameters: int) -> None:
    shape = SHAPES["full"][model]
    denoiser = shape.part(shape.family.denoiser, "meta")
    assert sum(each.numel() for each in denoiser.parameters()) == parameters


def test_the_gradient_of_frozen_weights_is_no_work() -> None:
    rows, width, out = 3, 5, 7
    layer = torch.nn.Linear(width, out, bias=False).requires_grad_(False)
    inputs = torch.randn(rows, width, requires_grad=True)
    assert flops_of(lambda: layer(inputs).sum().backward()) == 2 * (2 * rows * width * out)


def test_what_attention_computes_again_is_no_work() -> None:
    """Backward it has four products: gradients of values, scores, queries and keys."""
    batch, heads, tokens, width = 2, 3, 16, 8
    query = torch.empty(batch, heads, tokens, width, device="meta", dtype=torch.bfloat16)
    sums, number = torch.empty(batch, heads, tokens, device="meta"), torch.empty((), device="meta")

    def backward() -> None:
        torch.ops.aten._scaled_dot_product_flash_attention_backward(
            *(query, query, query, query, query, sums, None, None, tokens, tokens, 0.0, False),
            *(number, number),
        )

    assert flops_of(backward) == 4 * 2 * batch * heads * tokens**2 * width


def test_kernels_that_overlap_are_busy_once() -> None:
    assert union([(0.0, 2.0), (1.0, 3.0), (1.5, 2.0), (5.0, 6.0)]) == 4.0
    assert union([]) == 0.0


def test_a_gate_is_missed_by_a_figure_below_it_and_by_one_that_is_missing() -> None:
    plain, good = {"images_per_second": 10.0}, {"waits": 0, "planned_gib": 9.0, "peak_gib": 10.0}
    training = {
        "SD1.5 lora, diffusers": plain,
        "SD1.5 lora, diffray": good | {"images_per_second": 11.0, "mfu": 0.2},
        "SD1.5 lora, diffray compiled": {"images_per_second": 14.0, "mfu": 0.4},
        "SD1.5 full, diffusers": plain,
        "SD1.5 full, diffray": good | {"images_per_second": 9.0, "waits": 1, "planned_gib": 8.0},
        "SDXL lora, diffusers": plain,
        "FLUX lora": {"does_not_fit": "30 of 20 GiB"},
        "cut": "stopped",
    }
    pictures = {"SD1.5, bf16": {"fid": 10.5}, "SD1.5, fp32": {"fid": 10.0, "fid_error": 1.0}}
    serving = {"SD1.5, 16 rows": {"share_of_bare": 0.9}, "SDXL, 16 rows": {"share_of_bare": 0.7}}
    together = {"SD1.5, 4 trials of 2": {"times_one_trial": 1.6}}
    record = {"train": training, "evaluate": pictures, "serve": serving, "packed": together}
    gates = gates_of(record, list(record))
    passed = {gate.name: gate.passed for gate in gates}
    of_case = {case: [ok for name, ok in passed.items() if name.startswith(case)] for case in training}
    assert [len(oks) for oks in of_case.values()][-2:] == [0, 0]  # FLUX does not fit
    assert all(ok for name, ok in passed.items() if name.startswith("SD1.5 lora"))
    assert not any(ok for name, ok in passed.items() if name.startswith(("SD1.5 full", "SDXL lora")))
    assert passed["SD1.5: FID in bf16 and in fp32 differ by, in errors"]
    assert [ok for name, ok in passed.items() if "rows" in name] == [True, False]
    assert [ok for name, ok in passed.items() if "trials" in name] == [True]
    told = next(gate.line() for gate in gates if gate.name.startswith("SDXL lora: MFU"))
    assert told == "MISSED SDXL lora: MFU: not measured (at least 0.42)"


def test_it_ends_after_eight_minutes() -> None:
    assert sum(SECONDS.values()) == 8 * 60


@pytest.mark.slow
@pytest.mark.parametrize(
    "phase",
    # Training compiles each model; the phase "together" trains too.
    [pytest.param("train", marks=pytest.mark.journeys), "evaluate", "serve", "packed"],
)
def test_a_phase_runs_on_small_models(phase: str) -> None:
    found = dict(importlib.import_module(f"benchmarks.gpu.{phase}").run("small"))
    speeds = [
        value
        for figures in found.values()
        for name, value in figures.items()
        if name.endswith(("per_second", "share_of_bare"))
    ]
    assert len(speeds) >= 2 and all(value > 0 for value in speeds)
    if phase == "train":
        assert len(found) == 4 * 3
        flops = {case: figures["tflops"] * figures["ms_a_step"] for case, figures in found.items()}
        assert flops["SD1.5 lora, diffray"] == pytest.approx(flops["SD1.5 lora, diffusers"])


@pytest.mark.slow
def test_the_command_needs_neither_ray_nor_deepspeed_and_keeps_its_figures(tmp_path: Path) -> None:
    """The last phase has all others' code in its processes."""
    lines = ["import sys", "sys.modules |= {'ray': None, 'deepspeed': None}"]
    (tmp_path / "sitecustomize.py").write_text("\n".join(lines))
    results = tmp_path / "results" / "gpu.json"
    told = command("--phases", "probe", "together", "--results", str(results), path=tmp_path)
    record = json.loads(results.read_text())
    assert [each["phase"] for each in told] == ["probe", "together"]
    assert record["probe"]["device"] == {"name": "CPU", "peak_tflops": None, "torch": torch.__version__}
    assert record["together"]["train"]["share_of_alone"] > 0
    assert record["together"]["serve"]["p95_s"] > 0
    assert record["together"]["evaluate"]["pictures_per_second"] > 0


@pytest.mark.slow
def test_a_phase_that_overruns_is_cut_and_says_so() -> None:
    [told] = command("--phases", "train", "--seconds", "0.5")
    assert told["cut"] == "stopped after 0.5 seconds; what is missing was not measured"


def command(*arguments: str, path: Path | None = None) -> list[dict[str, object]]:
    """Run the benchmark on small models; return its lines of JSON."""
    arguments = ("--size", "small", *(() if "--seconds" in arguments else ("--seconds", "300")), *arguments)
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(path or ""), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
