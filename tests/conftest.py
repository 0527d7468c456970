"""Imports the pack as `kinoloom`, and makes fixtures that several tiers share: tiny models, data and a server."""

import gc
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import tiny
from tiny import sd as tiny_sd
from tiny import svd as tiny_svd
from toyworld.install import install

from comfy_client import Client, Server, make_base
from comfy_library import COMFYUI, PACK, register_pack

FRONT_END = os.environ.get("FRONT_END_DIR")  # the folder of another index.html than that of the installed front end
TIERS = ("pure", "nodes", "recipes", "learning", "server", "browser")
WITH_SERVER = TIERS[3:]


def pytest_report_header() -> str:
    return f"ComfyUI in {COMFYUI}, {FRONT_END or front_end()}"


def front_end() -> str:
    """The installed front end and its version, if there is one."""
    package = "comfyui-frontend-package"
    return f"{package} {version(package)}" if find_spec("comfyui_frontend_package") else f"no {package}"


class _RootIsNoPackage:
    """Keeps pytest from importing the root __init__.py, which only ComfyUI can import."""

    def pytest_collect_directory(self, path: Path, parent: pytest.Collector) -> pytest.Collector | None:
        return pytest.Dir.from_parent(parent, path=path) if path == PACK else None


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(_RootIsNoPackage())
    register_pack()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Of several processes one has every tier in which tests need the server, which is started once; the others take files."""
    from xdist.scheduler import LoadScopeScheduling

    class ByServerAndFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "server" if Path(file).parent.name in WITH_SERVER else file

    return ByServerAndFile(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The quickest tiers first; where processes share them the slowest, so that no long file is left for the end."""
    tiers = TIERS[::-1] if hasattr(config, "workerinput") else TIERS
    places = {tier: place for place, tier in enumerate(tiers)}
    items.sort(key=lambda item: places.get(item.path.parent.name, len(places)))


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()  # as the pack does when the server has started: every run walks the rest at its end


@pytest.fixture(scope="session")
def comfyui_dir() -> Path:
    """Where the real ComfyUI is."""
    return COMFYUI


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with diffusion_models/tiny_wan, vae/tiny_wan_vae and text_encoders/tiny_clip (.safetensors)."""
    folder = tmp_path_factory.mktemp("models")
    tiny.write_all(folder)
    return folder


@pytest.fixture(scope="session")
def inputs(tiny_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Any]]:
    """The tiny MODEL that a method trains on, and synthetic data for it, prior rows included."""
    from kinoloom.trainers import recipes  # which import ComfyUI, as the pure tier cannot

    from .runs import load_tiny, write_data

    made: dict[str, tuple[Any, Any]] = {}

    def of(name: str) -> tuple[Any, Any]:
        backbone = recipes()[name].backbone_class.name
        if backbone not in made:
            data = write_data(tmp_path_factory.mktemp("data"), backbone)
            if backbone != "wan":  # whose validations cost most of a run: of one held-out clip, not of every row
                held_out = write_data(Path(data.folder), backbone, roles=["validation"], each=1)
                data = replace(data, rows=(*data.rows, *held_out.rows))
            made[backbone] = load_tiny(tiny_models, backbone), data
        return made[backbone]

    return of


@pytest.fixture
def own(request: pytest.FixtureRequest, inputs: Callable[[str], tuple[Any, Any]]) -> tuple[Any, Any]:
    """The inputs of the method `name` of a parametrised test, else Wan's."""
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    return inputs(parameters.get("name", "KinoloomTrainWanLora"))


@pytest.fixture
def model(own: tuple[Any, Any]) -> Any:
    return own[0]


@pytest.fixture
def data(own: tuple[Any, Any]) -> Any:
    return own[1]


@pytest.fixture(scope="session")
def server(comfyui_dir: Path, tiny_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A running ComfyUI on a base directory of its own (server.base), with the pack, the tiny and the toy models in it."""
    base = make_base(tmp_path_factory.mktemp("base"), PACK)
    install(base)
    for model in tiny_models.glob("*/*.safetensors"):
        os.link(model, base / "models" / model.relative_to(tiny_models))
    clip = tiny_models / "text_encoders" / "tiny_clip.safetensors"
    tiny_sd.write_checkpoint(base / "models" / "checkpoints" / "narrow_sd15.safetensors", clip)
    motion = base / "models" / "animatediff_models" / "narrow_motion.safetensors"
    tiny_sd.write_motion_module(motion, tiny_sd.NARROW)
    settings = base / "user" / "default" / "comfy.settings.json"
    settings.parent.mkdir(parents=True)
    settings.write_text('{"Comfy.TutorialCompleted": true}')  # no first-run dialog over the page fixture's canvas
    with Server(comfyui_dir, base, args=("--front-end-root", FRONT_END) if FRONT_END else ()) as running:
        yield running


@pytest.fixture(scope="session")
def narrow_svd(server: Server) -> str:
    """The name of a narrow SVD among the server's checkpoints. It has a gigabyte, so it is written only if needed."""
    name = "narrow_svd.safetensors"
    tiny_svd.write_checkpoint(server.base / "models" / "checkpoints" / name)
    return name


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    """A front-end session of its own on the running server."""
    with server.client() as connected:
        yield connected


@pytest.fixture(scope="session")
def motions(server: Server) -> list[str]:
    """The names of two adapters for image to video that the server has trained."""
    from .server_prompts import train_motion, write_clips

    write_clips(server.base)
    with server.client() as connected:
        return [train_motion(connected, f"motion {seed}", seed) for seed in (1, 2)]
