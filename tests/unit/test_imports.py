"""The two rules of the layout, held by walking every import statement, those inside functions too.

1. Pure core: `diffusion`, `metrics` and `pictures` know neither Ray, nor DeepSpeed, nor storage, nor other
   rooms.
2. Imports follow the data: a stage imports only what comes before it.
"""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OURS = ("ray_jobs", "cluster", "serving")

# Earlier ranks know nothing of later ones. A room (a folder) stands for all its modules.
ORDER = (
    (
        "ray_jobs.config",
        "ray_jobs.report.dataset_page",
        "ray_jobs.evaluation.dealing",
        "ray_jobs.pictures",
        "ray_jobs.registry.promotion",
    ),
    (
        "ray_jobs.diffusion",
        "ray_jobs.metrics",
        "ray_jobs.console",
        "ray_jobs.report",
        "ray_jobs.registry.provenance",
    ),
    ("cluster",),
    ("ray_jobs.registry.store", "ray_jobs.registry.digests"),
    (
        "ray_jobs.run.command_line",
        "ray_jobs.registry.models",
        "ray_jobs.publishing.model_card",
        "ray_jobs.run.names",
        "ray_jobs.weights.feature_networks",
    ),
    ("ray_jobs.data", "ray_jobs.versions", "ray_jobs.publishing.test_split_ledger"),
    ("ray_jobs.registry.registration",),
    ("ray_jobs.prepare",),
    ("ray_jobs.run.samples", "ray_jobs.evaluation.scores", "ray_jobs.evaluation.cross_validation"),
    ("ray_jobs.training",),
    ("ray_jobs.training.tracking",),
    ("ray_jobs.checks",),
    ("ray_jobs.train",),
    ("ray_jobs.evaluation.actor", "ray_jobs.pretrain"),
    ("ray_jobs.evaluate",),
    (
        "ray_jobs.compare",
        "ray_jobs.tuning.computed_steps",
        "ray_jobs.tuning.optuna",
        "ray_jobs.tuning.stopping",
        "ray_jobs.publishing.subjects",
    ),
    ("ray_jobs.tuning.results", "ray_jobs.tuning.trial"),
    (
        "ray_jobs.tuning.guidance",
        "ray_jobs.tuning.successive_halving",
        "ray_jobs.tuning.population_based",
        "ray_jobs.tuning.driver",
        "ray_jobs.publishing.final_scores",
    ),
    ("ray_jobs.search",),
    ("ray_jobs.publish",),
    ("ray_jobs.pipeline",),
    ("cluster.plan",),
)
COMMANDS = ("cluster.plan",)  # run by a person, imported by nobody, and free to ask every stage
RANK = {room: rank for rank, rooms in enumerate(ORDER) for room in rooms}
PURE = ("ray_jobs.diffusion", "ray_jobs.metrics", "ray_jobs.pictures")
NOT_PURE = ("ray", "deepspeed", "mlflow", "pyarrow", "fsspec", "s3fs", "gcsfs", "boto3")
SERVING_KNOWS = (
    "ray_jobs.config",
    "ray_jobs.diffusion",
    "ray_jobs.weights.feature_networks",
    "ray_jobs.metrics",
    "ray_jobs.pictures",
    "ray_jobs.registry.models",
    "ray_jobs.versions",
    "ray_jobs.console",
    "cluster",
    "serving",
)


def is_in(module: str, room: str) -> bool:
    return module == room or module.startswith(room + ".")


def room_of(module: str) -> str:
    """`ray_jobs.data.curation.splits` -> `ray_jobs.data`, `cluster.storage` -> `cluster`, a command -> itself."""
    if module in COMMANDS:
        return module
    top, *rest = module.split(".")
    return f"{top}.{rest[0]}" if top == "ray_jobs" and rest else top


def modules() -> dict[str, Path]:
    """Dotted name -> file of every module of ours; a package has the name of its folder."""
    found = {}
    for top in OURS:
        for path in sorted((ROOT / top).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imported_by(source: str, module: str, is_package: bool, known: set[str]) -> set[str]:
    """Every module that `source` imports. Of `from a import b`, `a.b` if that is one of `known`, else `a`."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".") if is_package else module.split(".")[:-1]
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                below = f"{origin}.{alias.name}"
                found.add(below if below in known else origin)
    return found


IMPORTS = {
    module: imported_by(path.read_text(encoding="utf-8"), module, path.name == "__init__.py", set(MODULES))
    for module, path in MODULES.items()
}
REPORT = [module for module in MODULES if is_in(module, "ray_jobs.report")]


def ours(module: str) -> set[str]:
    """What `module` imports of this project."""
    return {name for name in IMPORTS[module] if name.split(".")[0] in OURS}


def test_every_kind_of_import_statement_is_seen() -> None:
    source = """
import ray.data as data
from ray_jobs import config
from ray_jobs.data.curation.splits import split_of
from . import images
from ..train import train
def later():
    import deepspeed
"""
    known = {"ray_jobs.config", "ray_jobs.data.images"}
    assert imported_by(source, "ray_jobs.data.sources.detection", False, known) == {
        "ray.data",
        "ray_jobs.config",
        "ray_jobs.data.curation.splits",
        "ray_jobs.data.images",
        "ray_jobs.train",
        "deepspeed",
    }


def test_every_module_has_its_place_in_the_order() -> None:
    rooms = {room_of(module) for module in MODULES if module != "ray_jobs"} - {"serving"}
    assert not rooms - set(RANK), "new rooms: give them a rank in ORDER"


@pytest.mark.parametrize("room", PURE)
def test_the_core_is_pure(room: str) -> None:
    members = [module for module in MODULES if is_in(module, room)]
    assert len(members) > 1
    for module in members:
        impure = {name for name in IMPORTS[module] if name.split(".")[0] in NOT_PURE}
        others = {name for name in ours(module) if not any(is_in(name, pure) for pure in PURE)}
        assert not impure | others, f"{module} imports {sorted(impure | others)}"


def test_the_configuration_and_the_reports_import_nothing_else_of_ours() -> None:
    sections = [module for module in MODULES if is_in(module, "ray_jobs.config")]
    assert not {name for module in sections for name in ours(module) if not is_in(name, "ray_jobs.config")}
    assert not ours("ray_jobs.report.dataset_page")
    others = {name for module in REPORT for name in ours(module) if not is_in(name, "ray_jobs.report")}
    assert others == {"ray_jobs.report.dataset_page"}


@pytest.mark.parametrize("report", [*REPORT, "ray_jobs.report.dataset_page"])
def test_the_reports_know_no_ray(report: str) -> None:
    assert not [name for name in IMPORTS[report] if name.split(".")[0] in NOT_PURE]


def test_imports_follow_the_data() -> None:
    wrong = [
        f"{module} imports {name}"
        for module in MODULES
        if not is_in(module, "serving")
        for name in ours(module)
        if room_of(name) != room_of(module) and RANK.get(room_of(name), 99) >= RANK[room_of(module)]
    ]
    assert not wrong


def test_serving_knows_the_core_and_the_registry_only() -> None:
    wrong = [
        f"{module} imports {name}"
        for module in MODULES
        if is_in(module, "serving")
        for name in ours(module)
        if not any(is_in(name, room) for room in SERVING_KNOWS)
    ]
    assert not wrong


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = {module: ours(module) & set(MODULES) for module in MODULES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(error.args[1]))


SERVING_ROOMS = ("engine", "replica", "feedback", "service", "http")  # each knows only the ones before it
WEB_FRAMEWORKS = ("fastapi", "starlette")


def serving_room(module: str) -> str | None:
    """`serving.engine.rows` -> `engine`; None for a module directly in `serving`."""
    folder, *below = MODULES[module].relative_to(ROOT / "serving").parts
    return folder if below else None


def test_rooms_of_serving_import_only_the_rooms_before_them() -> None:
    modules = {module for module in MODULES if is_in(module, "serving")}
    assert {room for module in modules if (room := serving_room(module))} == set(SERVING_ROOMS)
    for place, room in enumerate(SERVING_ROOMS):
        ahead = [module for module in modules if serving_room(module) == room]
        reached: set[str] = set()  # also by way of modules that lie directly in `serving`
        while ahead:
            module = ahead.pop()
            if module not in reached:
                reached.add(module)
                ahead += ours(module) & modules
        later = {name for name in reached if serving_room(name) in SERVING_ROOMS[place + 1 :]}
        assert not later, f"{room} imports {sorted(later)}"


def test_the_engine_knows_no_ray_and_only_http_a_web_framework() -> None:
    for module in [module for module in MODULES if is_in(module, "serving") and serving_room(module)]:
        packages = {name.split(".")[0] for name in IMPORTS[module]}
        assert serving_room(module) != "engine" or "ray" not in packages, module
        assert serving_room(module) == "http" or not packages & set(WEB_FRAMEWORKS), module
