"""Imports go one way: nodes -> trainers -> lora_io, and ComfyUI only where the design allows it."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACK = Path(__file__).parents[2]
HOST = (
    "comfy",
    "comfy_api",
    "comfy_extras",
    "comfy_execution",
    "folder_paths",
    "server",
    "nodes",
    "execution",
    "app",
    "comfyui_version",
)
OWN = ("nodes", "trainers", "lora_io")
FILES = sorted(path for folder in OWN for path in (PACK / folder).rglob("*.py")) + [PACK / "__init__.py"]


def relative(path: Path) -> str:
    return path.relative_to(PACK).as_posix()


def imports(path: Path, source: str | None = None) -> Iterator[tuple[str, bool]]:
    """(dotted name, relative?) of everything a file imports; inside the pack from its root: trainers.core.noise."""
    package = list(path.relative_to(PACK).parent.parts)
    for node in ast.walk(ast.parse(source or path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, False) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            inside = [*base, *(node.module.split(".") if node.module else [])]
            if node.module:
                yield ".".join(inside), True
            yield from ((".".join([*inside, alias.name]), True) for alias in node.names if not node.module)
        elif isinstance(node, ast.ImportFrom):
            yield node.module, False


# Folders and files of the pack, by their dotted names, and what they may import besides themselves.
TRAINERS = {
    "core": ("lora_io",),
    "conditions": ("trainers.core", "lora_io"),
    "host": ("trainers.core", "lora_io"),
    "backbones": ("trainers.core", "trainers.conditions", "trainers.host"),
    "run": ("trainers.core", "trainers.host", "lora_io"),
}
# From the ground up: a room of nodes/ imports rooms of lower floors, all of trainers/ and lora_io/.
FLOORS = (
    ("wires", "folders", "lists", "oldest", "packages"),
    ("widgets", "hooked"),
    ("data",),
    ("training",),
    ("animatediff", "svd", "tracklets"),
    ("adapters",),
    ("__init__",),
)
MOST_FLOORS = 6  # of a folder, as its imports say


def allowed(path: Path, target: str) -> bool:
    """Whether a file may import a module of the pack."""
    *folders, name = path.relative_to(PACK).with_suffix("").parts
    if not folders:
        return target.startswith("nodes")
    if folders[0] == "lora_io":
        return target.startswith("lora_io")
    if folders[0] == "nodes":
        floors = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
        own, (top, *inside) = [*folders, name][1], target.split(".")
        other = inside[0] if inside else ""
        return top in OWN and (top != "nodes" or other == own or floors[other] < floors[own])
    if len(folders) > 1:
        return target.startswith((f"trainers.{folders[1]}", *TRAINERS[folders[1]]))
    if name == "__init__":
        return target.startswith("trainers.core")
    return target.startswith(
        ("trainers.core", "trainers.conditions", "trainers.backbones", "trainers.host", "lora_io", f"trainers.{name}")
    )


def violations(path: Path, source: str | None = None) -> list[str]:
    found = []
    for target, is_relative in imports(path, source):
        top = target.split(".")[0]
        if is_relative:
            if not allowed(path, target):
                found.append(f"{relative(path)} imports {target}")
        elif top in ("kinoloom", "trainers", "lora_io") or (top == "nodes" and relative(path) == "__init__.py"):
            found.append(f"{relative(path)} imports {target} absolutely")
        elif top in HOST and relative(path).startswith(("trainers/", "lora_io/")):
            if not relative(path).startswith("trainers/host/"):
                found.append(f"{relative(path)} imports {target}")
        elif relative(path).startswith("lora_io/") and top not in {*sys.stdlib_module_names, "torch", "safetensors"}:
            found.append(f"{relative(path)} imports {target}")
    return found


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_a_file_imports_only_what_its_place_allows(path: Path) -> None:
    assert violations(path) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("trainers/wan_lora.py", "from .set_and_sequence import SET"),
        ("trainers/wan_lora.py", "from . import set_and_sequence"),
        ("trainers/wan_lora.py", "from .run.job import Job"),
        ("trainers/wan_lora.py", "import comfy.sd"),
        ("trainers/wan_lora.py", "from ..nodes import wires"),
        ("trainers/core/loop.py", "from ..wan_lora import WanLora"),
        ("trainers/core/loop.py", "from ..backbones.flow.wan import Wan"),
        ("trainers/core/loop.py", "from ..host.device import release"),
        ("trainers/core/loop.py", "from ..run.job import Job"),
        ("trainers/core/loop.py", "from ..conditions.tracklets import Tracklets"),
        ("trainers/core/loop.py", "def f():\n    import folder_paths"),
        ("trainers/run/job.py", "from ..backbones.flow.wan import Wan"),
        ("trainers/run/job.py", "import comfy.sd"),
        ("trainers/conditions/tracklets.py", "from ..host.device import release"),
        ("trainers/backbones/flow/wan.py", "from ...wan_lora import WanLora"),
        ("trainers/backbones/flow/wan.py", "from ...run.job import Job"),
        ("trainers/backbones/flow/wan.py", "from comfy import ops"),
        ("lora_io/keys.py", "from ..trainers.core import lora"),
        ("lora_io/keys.py", "import peft"),
        ("nodes/widgets.py", "from .data import nodes"),
        ("nodes/data/nodes.py", "from ..training.registry import registry"),
        ("nodes/training/train.py", "from ..svd import convert"),
        ("nodes/svd/convert.py", "from ..tracklets import control"),
        ("nodes/training/train.py", "from trainers.core import lora"),
        ("nodes/training/train.py", "from kinoloom.trainers.core import lora"),
        ("__init__.py", "from .trainers import recipes"),
    ],
)
def test_the_rules_catch(path: str, source: str) -> None:
    assert len(violations(PACK / path, source)) == 1


def rooms(folder: Path) -> dict[str, set[str]]:
    """The files and folders in a folder, and which of them each imports."""
    inside = {path: path.relative_to(folder).with_suffix("").parts[0] for path in FILES if folder in path.parents}
    arrows: dict[str, set[str]] = {room: set() for room in inside.values()}
    start = f"{relative(folder).replace('/', '.')}."
    for path, room in inside.items():
        targets = (target for target, is_relative in imports(path) if is_relative and target.startswith(start))
        arrows[room] |= {target.removeprefix(start).split(".")[0] for target in targets}
    return {room: others & arrows.keys() - {room} for room, others in arrows.items()}


def floors(arrows: dict[str, set[str]]) -> list[set[str]]:
    """Rooms from the ground up, each on the lowest floor that is above all that it imports."""
    found: list[set[str]] = []
    while left := arrows.keys() - set().union(*found):
        found.append({room for room in left if not arrows[room] & left})
        assert found[-1], f"rooms that import each other: {sorted(left)}"
    return found


@pytest.mark.parametrize("folder", sorted({path.parent for path in FILES} - {PACK}), ids=relative)
def test_a_folder_has_six_floors_at_most_and_no_circle(folder: Path) -> None:
    assert len(floors(rooms(folder))) <= MOST_FLOORS


def test_floors_are_counted_and_circles_are_found() -> None:
    found = floors(rooms(PACK / "nodes"))
    assert found[-1] == {"__init__"} and "wires" in found[0] and len(found) >= 4
    assert rooms(PACK / "nodes")["tracklets"] >= {"training", "hooked"}
    assert floors({"a": {"b", "c"}, "b": {"c"}, "c": set(), "d": {"c"}}) == [{"c"}, {"b", "d"}, {"a"}]
    with pytest.raises(AssertionError, match=r"\['a', 'b', 'd'\]"):
        floors({"a": {"b"}, "b": {"a"}, "c": set(), "d": {"a"}})


def test_every_file_directly_in_trainers_ends_with_its_recipe() -> None:
    methods = [path for path in (PACK / "trainers").glob("*.py") if path.name != "__init__.py"]
    assert len(methods) >= 2
    for path in methods:
        last = ast.parse(path.read_text(encoding="utf-8")).body[-1]
        assert isinstance(last, ast.Assign), path
        assert [ast.unparse(target) for target in last.targets] == ["RECIPE"], path


def test_opening_trainers_shows_methods_and_nothing_else() -> None:
    entries = {path.name for path in (PACK / "trainers").iterdir() if path.name != "__pycache__"}
    assert {name for name in entries if not name.endswith(".py")} == {"core", "run", "host", "backbones", "conditions"}


def test_no_file_registers_nodes_the_old_way() -> None:
    for path in FILES:
        assert "NODE_CLASS_MAPPINGS" not in path.read_text(encoding="utf-8"), path


AS_COMFYUI_DOES = """
import importlib.util, sys
sys.path.insert(0, sys.argv[1])
spec = importlib.util.spec_from_file_location("pack", sys.argv[2] + "/__init__.py", submodule_search_locations=[sys.argv[2]])
sys.modules["pack"] = module = importlib.util.module_from_spec(spec)
try:
    spec.loader.exec_module(module)
except Exception as error:
    print(type(error).__name__, error)
"""
REFUSED = "ImportError Kinoloom needs ComfyUI 0.30 or newer, but this is ComfyUI {}: update ComfyUI."
NOT_REFUSED = "ModuleNotFoundError No module named 'comfy_api'"  # which the stand-in has not


@pytest.mark.parametrize(
    ("version", "answer"),
    [
        ("0.29.9", REFUSED.format("0.29.9")),
        ("0.9.2", REFUSED.format("0.9.2")),
        ("0.3.64", REFUSED.format("0.3.64")),
        (None, REFUSED.format("0.3 or older")),
        ("0.30.0", NOT_REFUSED),
        ("0.33.0", NOT_REFUSED),
        ("0.100.0rc1", NOT_REFUSED),
        ("1.0", NOT_REFUSED),
        ("nightly", NOT_REFUSED),
    ],
)
def test_a_comfyui_that_is_too_old_is_refused_first_and_in_one_sentence(
    tmp_path: Path, version: str | None, answer: str
) -> None:
    if version:
        (tmp_path / "comfyui_version.py").write_text(f'__version__ = "{version}"\n')
    command = [sys.executable, "-c", AS_COMFYUI_DOES, str(tmp_path), str(PACK)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == (answer, "")


def test_the_oldest_comfyui_is_the_one_that_the_registry_and_the_readme_name() -> None:
    (registry,) = re.findall(r'requires-comfyui = ">=(\d+\.\d+)', (PACK / "pyproject.toml").read_text())
    (readme,) = re.findall(r"Needs ComfyUI (\d+\.\d+)", (PACK / "README.md").read_text(encoding="utf-8"))
    (refused,) = re.findall(r'^OLDEST = "(.+)"', (PACK / "nodes" / "oldest.py").read_text(), re.MULTILINE)
    assert registry == readme == refused
