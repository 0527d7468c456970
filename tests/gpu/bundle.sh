#!/usr/bin/env bash
# Gathers what tests/gpu/check.py needs on a machine with CUDA, Python 3.12 and torch 2.11, but without a network:
#   tests/gpu/bundle.sh FOLDER [--cuda-kernels]       here, in a checkout with its .runtime
#   bash FOLDER/install.sh && source FOLDER/env.sh && python tests/gpu/check.py       there, in the same checkout
# FOLDER holds ComfyUI's Python files and the wheels that such a machine lacks; nothing is installed outside of it.
# --cuda-kernels adds comfy-kitchen's CUDA kernels, which users have: 43 MiB.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
folder="${1:?where to: tests/gpu/bundle.sh FOLDER}"
kernels=any
if [[ "${2:-}" == --cuda-kernels ]]; then kernels=manylinux; fi
comfyui="${COMFYUI_DIR:-$root/.runtime/ComfyUI}"
python="${PYTHON:-$root/.runtime/venv/bin/python}"
parts=(comfy comfy_execution comfy_api comfy_config utils comfyui_version.py folder_paths.py node_helpers.py latent_preview.py)
large_tokenizers=(llama qwen25 qwen35 t5 t5_pile ace_lyrics hydit_clip byt5) # of text encoders, which no check loads
packages=(torchsde trampoline diffusers pytorch_optimizer)

version() { # of an installed package
    "$python" -c "import importlib.metadata as m, sys; print(m.version(sys.argv[1]))" "$1"
}

wheel() { # NAME PLATFORM
    local target=(--implementation py --abi none --platform any)
    if [[ "$2" == manylinux ]]; then
        target=(--implementation cp)
        for tag in manylinux_2_28 manylinux_2_27 manylinux_2_24 manylinux_2_17 manylinux2014; do
            target+=(--platform "${tag}_x86_64")
        done
    fi
    "$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 "${target[@]}" \
        --dest "$folder/wheels" "$1==$(version "$1")"
}

mkdir -p "$folder/wheels"
for name in "${packages[@]}"; do wheel "$name" any; done
wheel comfy-aimdo manylinux
wheel comfy-kitchen "$kernels"

present=()
for part in "${parts[@]}"; do
    if [[ -e "$comfyui/$part" ]]; then present+=("$part"); fi
done
tar -C "$comfyui" --exclude=__pycache__ $(printf -- "--exclude=comfy/text_encoders/%s_tokenizer " "${large_tokenizers[@]}") \
    -cJf "$folder/comfyui.tar.xz" "${present[@]}"

cat >"$folder/install.sh" <<'EOF'
#!/usr/bin/env bash
# Unpacks what lies beside this file into its folder.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
mkdir -p "$here"/{site,ComfyUI}
python3 -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$here/site" "$here"/wheels/*.whl
tar -xJf "$here/comfyui.tar.xz" -C "$here/ComfyUI"
echo "export PYTHONPATH='$here/site' COMFYUI_DIR='$here/ComfyUI' HF_HUB_OFFLINE=1" >"$here/env.sh"
EOF
du -sh "$folder"
