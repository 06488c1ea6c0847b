"""Where a run keeps its files: one module builds the paths."""

import re
from pathlib import Path

from ray_jobs.config import Config
from ray_jobs.run.folder import RunFolder, SharedFolder

ROOT = Path(__file__).parents[2]
# `cluster` knows nothing of runs; its probe writes one marker per node into the run's folder.
BUILDS_PATHS = {"ray_jobs/run/folder.py", "cluster/nodes.py"}
JOINS = re.compile(r"Storage\.open\(\s*[\w.]*\bconfig\.storage\b|\.child\(\s*[\w.]*\bconfig\.name\b")


def test_every_folder_lies_where_users_find_it(tmp_path: Path) -> None:
    config = Config.model_validate(
        {
            "name": "demo",
            "storage": str(tmp_path),
            "data": {"source": "pictures"},
            "model": {"base": "model"},
            "search": {"learning_rates": [1e-3], "ladder": [2]},
        }
    )
    run, shared = RunFolder.of(config), SharedFolder.of(config)
    folders = [
        (run.root, "demo"),
        (run.dataset, "demo/dataset"),
        (run.votes, "demo/votes"),
        (run.earlier_votes, "demo/earlier_votes"),
        (run.trainings, "demo/train"),
        (run.training("lr-0.001"), "demo/train/lr-0.001"),
        (run.search, "demo/search"),
        (run.model, "demo/model"),
        (run.samples, "demo/samples"),
        (run.comparison("3", "base"), "demo/comparisons/3-base"),
        (run.study("spring"), "demo/studies/spring"),
        (run.feedback(2), "demo/updates/2"),
        (run.shadow, "demo/shadow"),
        (run.autoencoder, "demo/autoencoder"),
        (run.initial, "demo/initial"),
        (shared.encoded("0123456789abcdef" * 4), "encoded/0123456789abcdef"),
        (shared.real_features, "features"),
        (shared.class_pictures("digest"), "class_pictures/digest"),
        (shared.registered("model"), "registry/model"),
        (shared.artifacts("demo"), "mlartifacts/demo"),
    ]
    for folder, path in folders:
        assert folder.uri == f"{tmp_path}/{path}"


def test_no_other_module_joins_a_storage_with_the_name_of_a_run() -> None:
    files = [path for top in ("ray_jobs", "serving", "cluster") for path in (ROOT / top).rglob("*.py")]
    found = {
        path.relative_to(ROOT).as_posix() for path in files if JOINS.search(path.read_text(encoding="utf-8"))
    }
    assert found == BUILDS_PATHS
