"""The images are built from the same steps as `make setup`, and what `ray up` reads is what Ray knows."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import ray
import yaml
from jsonschema import Draft7Validator

from tests.k8s.manifests import ROOT

DOCKERFILE = ROOT / "cluster" / "Dockerfile"
INSTALLS = re.compile(r"-m venv|-m pip install|uv pip install|-m ray_jobs\.weights\.fetch")


def instructions(stage: str | None = None) -> list[tuple[str, str]]:
    """(keyword, arguments) of the Dockerfile, lines joined; of one stage, if named."""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    lines = [line for line in text.replace("\\\n", " ").splitlines() if line.strip()]
    found = [(line.split()[0], " ".join(line.split()[1:])) for line in lines]
    if stage is None:
        return found
    begin = next(i for i, (word, rest) in enumerate(found) if word == "FROM" and rest.endswith(f"AS {stage}"))
    end = next((i for i in range(begin + 1, len(found)) if found[i][0] == "FROM"), len(found))
    return found[begin:end]


def plain(command: str) -> str:
    return " ".join(command.replace('"', "").split())


def dockerfile_steps() -> list[str]:
    runs = [command for word, rest in instructions() if word == "RUN" for command in rest.split("&&")]
    return [plain(command) for command in runs if INSTALLS.search(command)]


def makefile_steps() -> list[str]:
    """What `make setup` would run on a new machine."""
    make = ["make", "--dry-run", "--always-make", "setup", "PYTHON=python3.11"]
    printed = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [plain(line) for line in printed.splitlines() if INSTALLS.search(line)]


def test_hadolint_finds_nothing() -> None:
    hadolint = [str(Path(sys.executable).with_name("hadolint")), str(DOCKERFILE)]
    done = subprocess.run(hadolint, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_rules_are_ignored_for_a_reason_only() -> None:
    lines = DOCKERFILE.read_text(encoding="utf-8").splitlines()
    ignored = [number for number, line in enumerate(lines) if "hadolint ignore" in line]
    assert ignored
    for number in ignored:
        assert re.match(r"# hadolint ignore=DL\d{4}$", lines[number])
        assert re.match(r"# \w.{20,}", lines[number - 1]), "say why in the line before"


def test_the_image_is_installed_by_the_commands_of_make_setup() -> None:
    steps = dockerfile_steps()
    assert len(steps) == 5
    assert steps == makefile_steps()


def test_the_networks_that_measure_fid_are_in_the_image() -> None:
    assert ".venv/bin/python -m ray_jobs.weights.fetch inception" in dockerfile_steps()
    assert ".venv/bin/python -m ray_jobs.weights.fetch efficientnet" in dockerfile_steps()


def test_what_fetches_the_networks_finds_all_that_it_imports(tmp_path: Path) -> None:
    """Of the code, the image holds at that step only what was copied before."""
    for word, rest in instructions("base"):
        *sources, target = rest.split()[1:] or [""]
        for name in sources if word == "COPY" else []:
            place = tmp_path / target / (Path(name).name if target.endswith("/") else "")
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(ROOT / name)
    (tmp_path / ".cache").symlink_to(ROOT / ".cache")  # nothing is left to fetch
    [python, *command] = next(step for step in dockerfile_steps() if "weights.fetch" in step).split()
    assert python == ".venv/bin/python"
    done = subprocess.run([sys.executable, *command], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_the_base_is_pinned_by_a_digest_that_has_no_default() -> None:
    assert ("ARG", "DIGEST") in instructions()
    bases = [rest.split()[0] for word, rest in instructions() if word == "FROM"]
    assert bases == ["python:3.11-slim-bookworm@${DIGEST}", "base", "base"]


@pytest.mark.parametrize("stage", ["train", "serve"])
def test_an_image_does_not_run_as_root(stage: str) -> None:
    users = [rest for word, rest in [*instructions("base"), *instructions(stage)] if word == "USER"]
    assert users[-1] == "1000:1000"


@pytest.mark.parametrize("stage", ["train", "serve"])
def test_code_is_copied_last_so_that_packages_stay_cached(stage: str) -> None:
    base = [name for word, rest in instructions("base") if word == "COPY" for name in rest.split()[1:-1]]
    fetching = [f"ray_jobs/{name}" for name in ("__init__.py", "console", "metrics")]
    fetching += [f"ray_jobs/weights/{name}" for name in ("__init__.py", "fetch.py")]
    assert base == ["requirements.lock", *fetching]
    words = [word for word, _ in instructions(stage)]
    assert "RUN" not in words[words.index("COPY") :]
    copied = {rest.split()[-2] for word, rest in instructions(stage) if word == "COPY"}
    assert {"cluster", "ray_jobs", "serving", "configs"} <= copied


def test_what_is_copied_exists_and_nothing_else_is_sent() -> None:
    copied = {rest.split()[-2] for word, rest in instructions() if word == "COPY"}
    assert all((ROOT / name).exists() for name in copied)
    allowed = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert "*" in allowed
    assert {line[1:] for line in allowed if line.startswith("!")} == {name.split("/")[0] for name in copied}


@pytest.mark.parametrize("stage", ["train", "serve"])
def test_an_image_has_the_compiler_that_triton_asks_for(stage: str) -> None:
    runs = [rest for word, rest in instructions(stage) if word == "RUN"]
    installed = {name for rest in runs for name in rest.split("&&")[1].split() if name in ("g++", "gcc")}
    assert len(installed) == 1
    assert any("cc --version" in rest for rest in runs), "the build tries it"


def test_the_images_ask_nvidia_s_runtime_for_gpus() -> None:
    given = " ".join(rest for word, rest in instructions("base") if word == "ENV").split()
    assert {"NVIDIA_VISIBLE_DEVICES=all", "NVIDIA_DRIVER_CAPABILITIES=compute,utility"} <= set(given)


AWS = yaml.safe_load((ROOT / "cluster" / "aws.yaml").read_text(encoding="utf-8"))


def schema_errors(cluster: object) -> list[str]:
    schema = Path(ray.__file__).parent / "autoscaler" / "ray-schema.json"
    validator = Draft7Validator(json.loads(schema.read_text(encoding="utf-8")))
    return [error.message for error in validator.iter_errors(cluster)]


def test_ray_s_schema_knows_every_key_of_the_cluster_on_aws() -> None:
    assert schema_errors(AWS) == []
    assert schema_errors({**AWS, "idle_timeout": 5})


def test_gpus_on_aws_are_spot_machines_from_zero() -> None:
    gpu = AWS["available_node_types"]["gpu"]
    assert gpu["min_workers"] == 0 < gpu["max_workers"]
    assert gpu["resources"]["GPU"] == 1
    assert gpu["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert AWS["available_node_types"][AWS["head_node_type"]]["resources"] == {"CPU": 0}


def test_gpu_nodes_on_aws_have_a_driver_and_containers_get_the_gpus() -> None:
    """Without an ImageId, Ray takes a machine image of 2023, whose driver is too old for CUDA 13."""
    assert all(
        re.fullmatch(r"ami-[0-9a-f]{17}", each["node_config"]["ImageId"])
        for each in AWS["available_node_types"].values()
    )
    options = AWS["available_node_types"]["gpu"]["docker"]["worker_run_options"]
    assert {"--gpus all", "--ipc=host", "--ulimit memlock=-1"} == set(options)
    others = [each for name, each in AWS["available_node_types"].items() if name != "gpu"]
    assert not any("docker" in each for each in others)


def test_every_node_on_aws_asks_for_the_token_and_the_image_is_named_by_digest() -> None:
    for kind in ("head", "worker"):
        start = [line for line in AWS[f"{kind}_start_ray_commands"] if "ray start" in line]
        assert len(start) == 1
        exported = shlex.split(start[0].partition(";")[0])[1:]
        assert "RAY_AUTH_MODE=token" in exported
        (path,) = [each.partition("=")[2] for each in exported if each.startswith("RAY_AUTH_TOKEN_PATH=")]
        assert path in AWS["file_mounts"]
        assert "dashboard-host" not in start[0]  # it listens on the head's loopback only
    assert re.search(r"@sha256:[0-9a-f]{64}$", AWS["docker"]["image"])
