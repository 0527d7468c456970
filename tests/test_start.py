"""ComfyUI starts as fast with the pack as without: what only runs need is imported by runs."""

import json
import subprocess
import sys
from pathlib import Path

from comfy_client import make_base
from comfy_library import PACK

START = """
import asyncio, json, sys
from pathlib import Path

sys.path.insert(0, sys.argv[1])
base = Path(sys.argv[2])
from comfy_library import start_comfyui

start_comfyui(base)
import nodes
import server


async def start():
    server.PromptServer(asyncio.get_running_loop())
    await nodes.init_extra_nodes(init_custom_nodes=False, init_api_nodes=False)
    before = set(sys.modules)
    assert await nodes.load_custom_node(str(base / "custom_nodes" / "kinoloom"))
    return set(sys.modules) - before


new = asyncio.run(start())
own = [name for name in nodes.NODE_CLASS_MAPPINGS if name.startswith("Kinoloom")]
print(json.dumps({"nodes": own, "new": sorted(new)}))
"""


def test_the_pack_brings_no_other_package_to_comfyuis_start(tmp_path: Path) -> None:
    base = make_base(tmp_path, PACK)
    command = [sys.executable, "-c", START, str(PACK / "scripts"), str(base)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert "KinoloomTrainWanLora" in found["nodes"]
    others = {name.partition(".")[0] for name in found["new"] if not name.startswith(str(base))}
    assert others <= {"PIL", *sys.stdlib_module_names}  # PEFT and diffusers alone would bring two thousand modules
