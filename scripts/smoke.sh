#!/usr/bin/env bash
# Trains and generates with tiny models and opens the panel, on any ComfyUI: bash scripts/smoke.sh [path/to/ComfyUI]
#   PYTHON=path   a Python with the packages of that ComfyUI, the pack and the tests. Without it a given ComfyUI gets a
#                 new environment in .runtime/smoke/, with the packages of its requirements.txt
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
