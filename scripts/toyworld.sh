#!/usr/bin/env bash
# Trains the toy world's models again. Arguments are passed to tests/toyworld/train.py, which explains them.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
bash "$root/scripts/setup.sh"

export COMFYUI_DIR="${COMFYUI_DIR:-$root/.runtime/ComfyUI}"
cd "$root/tests"
export PYTHONPATH="$root/scripts"
"$root/.runtime/venv/bin/python" -m toyworld.train "$@"
