"""The rules of the layout, held by walking every import statement, those inside functions too.

1. Folder order is layer order: a room imports only rooms before it in `ROOMS`, a stage imports any room and
   the stages before it. Within `data` the same holds of its own rooms.
2. Pure core: `diffusion`, `metrics` and `pictures` know neither Ray, nor DeepSpeed, nor storage, nor other
   rooms.
"""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OURS = ("ray_jobs", "cluster", "serving", "diffray")

# Earlier rooms know nothing of later ones; `cluster` stands beside `ray_jobs`.
ROOMS = (
    *("config", "console", "cluster", "run", "pictures", "diffusion", "metrics", "report", "weights"),
    *("registry", "data", "review", "training", "evaluation", "tuning", "publishing", "planning"),
    *("retention",),
)
DATA_ROOMS = ("sources", "curation", "encoding", "feeding")  # modules of `data` itself come after them
# All that lies directly in `ray_jobs`: what a person runs.
STAGES = (
    *("versions", "export_weights", "import_weights", "checks", "prepare", "captions", "train", "pretrain"),
    *("evaluate", "search", "publish", "compare", "pipeline"),
)
COMMANDS = ("cluster.plan",)  # run by a person, imported by nobody, and free to ask every room
PURE = ("ray_jobs.diffusion", "ray_jobs.metrics", "ray_jobs.pictures")
NOT_PURE = ("ray", "deepspeed", "mlflow", "pyarrow", "fsspec", "s3fs", "gcsfs", "boto3")
SERVING_KNOWS = (
    "ray_jobs.config",
    "ray_jobs.console",
    "ray_jobs.diffusion",
    "ray_jobs.metrics",
    "ray_jobs.pictures",
    "ray_jobs.registry",
    "ray_jobs.run.folder",
    "ray_jobs.weights",
    "cluster",
    "serving",
)


def is_in(module: str, room: str) -> bool:
    return module == room or module.startswith(room + ".")


def layer(module: str) -> tuple[int, int]:
    """Where a module's folder stands, by its room and by its room within `data`; later is higher."""
    parts = module.split(".")
    if module in COMMANDS:
        return len(ROOMS) + len(STAGES), 0
    if parts[0] == "cluster":
        return ROOMS.index("cluster"), 0
    if parts[1] in STAGES:
        return len(ROOMS) + STAGES.index(parts[1]), 0
    inner = parts[2] if parts[1] == "data" and len(parts) > 2 else ""
    return ROOMS.index(parts[1]), DATA_ROOMS.index(inner) if inner in DATA_ROOMS else len(DATA_ROOMS)


def folders(path: Path) -> set[str]:
    return {each.parent.name for each in path.glob("*/__init__.py")}


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


def ours(module: str) -> set[str]:
    """What `module` imports of this project."""
    return {name for name in IMPORTS[module] if name.split(".")[0] in OURS}


def test_every_kind_of_import_statement_is_seen() -> None:
    source = """
import ray.data as data
from ray_jobs import config
from ray_jobs.data.splits import split_of
from . import images
from ..train import train
def later():
    import deepspeed
"""
    known = {"ray_jobs.config", "ray_jobs.data.images"}
    assert imported_by(source, "ray_jobs.data.reading", False, known) == {
        "ray.data",
        "ray_jobs.config",
        "ray_jobs.data.splits",
        "ray_jobs.data.images",
        "ray_jobs.train",
        "deepspeed",
    }


def test_every_folder_has_its_place_in_the_order() -> None:
    assert folders(ROOT / "ray_jobs") == set(ROOMS) - {"cluster"}
    assert folders(ROOT / "ray_jobs" / "data") == set(DATA_ROOMS)


def test_only_what_a_person_runs_lies_outside_a_room() -> None:
    flat = {path.stem: path for path in (ROOT / "ray_jobs").glob("*.py") if path.stem != "__init__"}
    assert set(flat) == set(STAGES)
    for path in flat.values():
        assert 'if __name__ == "__main__":' in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("room", PURE)
def test_the_core_is_pure(room: str) -> None:
    members = [module for module in MODULES if is_in(module, room)]
    assert len(members) > 1
    for module in members:
        impure = {name for name in IMPORTS[module] if name.split(".")[0] in NOT_PURE}
        others = {name for name in ours(module) if not any(is_in(name, pure) for pure in PURE)}
        assert not impure | others, f"{module} imports {sorted(impure | others)}"


RECORDS = {"ray_jobs.run.records", "ray_jobs.run.manifest"}


@pytest.mark.parametrize(("room", "also"), [("config", set()), ("console", set()), ("report", RECORDS)])
def test_rooms_that_import_nothing_else_of_ours(room: str, also: set[str]) -> None:
    members = [module for module in MODULES if is_in(module, f"ray_jobs.{room}")]
    assert len(members) > 1
    others = {name for module in members for name in ours(module) if not is_in(name, f"ray_jobs.{room}")}
    assert others == also


@pytest.mark.parametrize("room", ["report", "weights"])
def test_rooms_that_know_no_ray(room: str) -> None:
    members = [module for module in MODULES if is_in(module, f"ray_jobs.{room}")]
    assert not [n for module in members for n in IMPORTS[module] if n.split(".")[0] in NOT_PURE]


def test_imports_follow_the_data() -> None:
    wrong = [
        f"{module} imports {name}"
        for module in MODULES
        if module != "ray_jobs" and not is_in(module, "serving") and not is_in(module, "diffray")
        for name in ours(module)
        if is_in(name, "serving") or is_in(name, "diffray") or layer(name) > layer(module)
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
