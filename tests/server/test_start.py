"""ComfyUI starts as fast with the pack as without: packages that only runs need are imported by runs."""

import json
import subprocess
import sys
from typing import Any

import pytest
from kinoloom.nodes import packages

from comfy_client import make_base
from comfy_library import PACK

START = """
import asyncio, gc, json, sys
from pathlib import Path

sys.path.insert(0, sys.argv[1])
base = Path(sys.argv[2])
from comfy_library import start_comfyui

start_comfyui(base)
import nodes
import server
from aiohttp import web


async def start():
    server.PromptServer(asyncio.get_running_loop())
    await nodes.init_extra_nodes(init_custom_nodes=False, init_api_nodes=False)
    before = set(sys.modules)
    assert await nodes.load_custom_node(str(base / "custom_nodes" / "kinoloom"))
    new, loaded = set(sys.modules) - before, len(gc.get_objects())
    await web.AppRunner(server.PromptServer.instance.app).setup()
    return sorted(new), loaded, len(gc.get_objects())


new, loaded, walked = asyncio.run(start())
own = [name for name in nodes.NODE_CLASS_MAPPINGS if name.startswith("Kinoloom")]
print(json.dumps({"nodes": own, "new": new, "loaded": loaded, "walked": walked}))
"""


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a ComfyUI says of itself that loaded the pack and then started its server."""
    base = make_base(tmp_path_factory.mktemp("base"), PACK)
    command = [sys.executable, "-c", START, str(PACK / "scripts"), str(base)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_the_pack_brings_no_other_package_to_comfyuis_start(started: dict[str, Any]) -> None:
    assert "KinoloomTrainWanLora" in started["nodes"]
    others = {name.partition(".")[0] for name in started["new"] if "/custom_nodes/kinoloom" not in name}
    assert others <= {"PIL", *sys.stdlib_module_names}  # PEFT and diffusers alone would bring two thousand modules


def test_the_garbage_collector_does_not_walk_what_the_start_made(started: dict[str, Any]) -> None:
    assert started["loaded"] > 100_000
    assert started["walked"] < started["loaded"] / 20


def test_a_package_that_is_missing_is_named_at_the_start_and_not_by_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    packages.require_packages()
    monkeypatch.setitem(sys.modules, "peft", None)  # as Python has what cannot be imported
    with pytest.raises(ImportError, match="Kinoloom needs peft, not found in this Python: run pip install -r"):
        packages.require_packages()
