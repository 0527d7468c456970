#!/usr/bin/env bash
# Trains a LoRA on a small clip in a real ComfyUI server and writes pictures to demo_output/.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
bash "$root/scripts/setup.sh"

export COMFYUI_DIR="${COMFYUI_DIR:-$root/.runtime/ComfyUI}"
cd "$root"
"$root/.runtime/venv/bin/python" scripts/demo.py "$@"
