#!/usr/bin/env bash
# Trains, generates and opens the panel, all of it tiny, on a ComfyUI of any version: bash scripts/smoke.sh [path/to/ComfyUI]
#   PYTHON=path   a Python with the packages of that ComfyUI, of the pack and of the tests; without it a named ComfyUI
#                 gets an environment of its own, with the packages that its requirements.txt pins, in .runtime/smoke/
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
runtime="$root/.runtime"
if [[ -n "${1:-}" ]]; then
    COMFYUI_DIR="$(cd "$1" && pwd)"
    version="$(sed -n 's/^__version__ = "\(.*\)"/\1/p' "$COMFYUI_DIR/comfyui_version.py")"
    runtime="$runtime/smoke/$version"
fi
export COMFYUI_DIR="${COMFYUI_DIR:-$root/.runtime/ComfyUI}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
[[ -n "${PYTHON:-}" ]] || RUNTIME="$runtime" bash "$root/scripts/setup.sh" --browser
cd "$root"
"${PYTHON:-$runtime/venv/bin/python}" -m pytest -n 0 -m smoke $(grep -l "mark.smoke" tests/*/test_*.py)
