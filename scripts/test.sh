#!/usr/bin/env bash
# Sets up, lints, checks types and runs the tests in two processes:
#   bash scripts/test.sh                 all of them
#   bash scripts/test.sh --fast          the tiers pure, recipes and nodes without what is marked slow: five minutes
#   bash scripts/test.sh -n 0 -k client  arguments go to pytest
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
bash "$root/scripts/setup.sh" --browser

export COMFYUI_DIR="${COMFYUI_DIR:-$root/.runtime/ComfyUI}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # tiny models are not faster with more threads, and servers run beside the tests
python="$root/.runtime/venv/bin/python"
cd "$root"
"$python" -m ruff check .
"$python" -m mypy

run() { "$python" -m pytest -n 2 --no-loadscope-reorder "$@"; }
case "${1:-}" in
    "") COMFYUI_DIR=none run tests/pure && run tests/{browser,learning,nodes,recipes,server} ;; # pure needs no ComfyUI
    --fast) COMFYUI_DIR=none run tests/pure && run -m "not slow" tests/{nodes,recipes} "${@:2}" ;;
    *) run "$@" ;;
esac
