#!/usr/bin/env bash
# Sets up, lints and runs the tests in two processes; arguments go to pytest: bash scripts/test.sh -n 0 -k client
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
bash "$root/scripts/setup.sh" --browser

export COMFYUI_DIR="${COMFYUI_DIR:-$root/.runtime/ComfyUI}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # tiny models are not faster with more threads, and servers run beside the tests
python="$root/.runtime/venv/bin/python"
cd "$root"
"$python" -m ruff check .
"$python" -m pytest -n 2 --dist loadfile "$@"
