"""Starts the real ComfyUI in this process, in CPU mode without CUDA; the conftest.py of every tier but pure imports it."""

import atexit
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

from comfy_client import make_base
from comfy_library import COMFYUI, PACK, register_pack, start_comfyui

if not (COMFYUI / "main.py").is_file():
    pytest.exit(f"no ComfyUI in {COMFYUI}: run `bash scripts/setup.sh`, or set COMFYUI_DIR", returncode=4)
BASE = Path(tempfile.mkdtemp(prefix="kinoloom-tests-"))
atexit.register(shutil.rmtree, BASE, ignore_errors=True)
make_base(BASE, PACK)
start_comfyui(BASE)
register_pack()  # before pytest_configure does, where the folder of a conftest.py is named in the command
if nodes := sys.modules.get("kinoloom.nodes"):  # as the pure tier registered it
    nodes.__spec__.loader.exec_module(nodes)
