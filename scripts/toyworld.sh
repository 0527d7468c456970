#!/usr/bin/env bash
# Trains the toy world's models again; see tests/toyworld/train.py. Arguments go to it.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
bash "$root/scripts/setup.sh"

export COMFYUI_DIR="${COMFYUI_DIR:-$root/.runtime/ComfyUI}"
cd "$root/tests"
export PYTHONPATH="$root/scripts"
"$root/.runtime/venv/bin/python" -m toyworld.train "$@"
