#!/usr/bin/env bash
# Tries the newest releases of what this pack builds on: the smoke tests, then the recipes tier. Not part of CI.
#   COMFYUI_DIR=path   that ComfyUI instead of the newest release on github.com, or setup.sh's if there is no way there
#   arguments go to pytest for the recipes tier: bash scripts/canary.sh -k lora
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
export RUNTIME="$root/.runtime/canary"
export PYTHON="$RUNTIME/venv/bin/python"
newest=(comfyui-frontend-package diffusers peft pytorch_optimizer transformers)

get_newest_comfyui() {
    local url=https://github.com/Comfy-Org/ComfyUI fresh="$RUNTIME/ComfyUI.newest" tag
    tag="$(GIT_TERMINAL_PROMPT=0 timeout 60 git ls-remote --refs --tags --sort=-v:refname "$url" 'v*' | sed -n '1s#.*/##p')"
    rm -rf "$fresh"
    [[ -n "$tag" ]] && timeout 180 git clone --quiet --depth 1 --branch "$tag" "$url" "$fresh" || return 1
    rm -rf "$RUNTIME/ComfyUI"
    mv "$fresh" "$RUNTIME/ComfyUI"
}

mkdir -p "$RUNTIME"
[[ -n "${COMFYUI_DIR:-}" ]] || get_newest_comfyui || echo "canary: no ComfyUI from github.com" >&2
env -u PYTHON bash "$root/scripts/setup.sh" --browser
export COMFYUI_DIR="${COMFYUI_DIR:-$RUNTIME/ComfyUI}"
"$PYTHON" -m pip install --quiet --upgrade "${newest[@]}"

echo "ComfyUI $(sed -n 's/^__version__ = "\(.*\)"/\1/p' "$COMFYUI_DIR/comfyui_version.py")"
"$PYTHON" -c 'import importlib.metadata as m, sys; [print(name, m.version(name)) for name in sys.argv[1:]]' "${newest[@]}"
bash "$root/scripts/smoke.sh"
cd "$root"
OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" "$PYTHON" -m pytest -n 2 --no-loadscope-reorder tests/recipes "$@"
