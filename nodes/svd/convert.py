"""Converts models and LoRAs of Stable Video Diffusion between ComfyUI's and diffusers' key names."""

from pathlib import Path, PurePath

import folder_paths
from comfy_api.latest import io

from ...lora_io.file import copy_renamed, free_path, load, load_names, save
from ...lora_io.keys import PREFIX, UNET
from ...lora_io.peft import METADATA, alpha_of, config_of
from ...lora_io.svd_layouts import layout_of, lora_to_comfy, lora_to_diffusers, unet_names
from ..folders import DIFFUSERS, DIFFUSION_MODELS, LORAS, output_folder

FILES = (".safetensors", ".sft")
NAMELESS = ("diffusion_pytorch_model", "pytorch_lora_weights", "adapter_model")  # default file names
OTHER = {"comfyui": "diffusers", "diffusers": "comfyui"}


def choices() -> list[str]:
    """The files that may be converted, each as <model folder>/<path>."""
    files = [(folder, name) for folder in (DIFFUSION_MODELS, LORAS) for name in folder_paths.get_filename_list(folder)]
    for root in folder_paths.get_folder_paths(DIFFUSERS):
        found = sorted(folder_paths.recursive_search(root, excluded_dir_names=[".git"])[0])
        files += [(DIFFUSERS, name) for name in found if _is_unet(PurePath(name))]
    return [f"{folder}/{name}" for folder, name in files if name.endswith(FILES)]


def _is_unet(name: PurePath) -> bool:
    """Whether a file is in a folder unet/ of a pipeline or unet_ema/ of a trainer."""
    return name.parent.name.startswith("unet") and name.name.startswith("diffusion_pytorch_model")


def convert_unet_file(source: Path, title: str, folder: Path) -> Path:
    """Copy a model into `folder` in the other layout. ValueError if it is not a complete UNet of SVD."""
    keys, metadata = load_names(source)
    layout = layout_of(keys)
    names = unet_names(keys, OTHER[layout])
    path = free_path(folder, _converted(title, layout))
    copy_renamed(source, path, names, _described(metadata, source, layout))
    return path


def convert_lora_file(source: Path, title: str, folder: Path) -> Path:
    """Write a LoRA into `folder` in the other layout. ValueError if it is not a LoRA for SVD."""
    tensors, metadata = load(source)
    if any(key.startswith(PREFIX) for key in tensors):
        layout, converted = "comfyui", lora_to_diffusers(tensors)
    else:
        layout, converted = "diffusers", lora_to_comfy(tensors, alpha_of(config_of(source, metadata, UNET)))
    path = free_path(folder, _converted(title, layout))
    save(path, converted, _described(metadata, source, layout))
    return path


def _described(metadata: dict[str, str], source: Path, layout: str) -> dict[str, str]:
    """The source's metadata without the LoRA scale, which is now in the tensors, plus the source's name."""
    kept = {name: value for name, value in metadata.items() if name != METADATA}
    return {"format": "pt", **kept, "kinoloom.converted": f"{source.name} to the layout of {OTHER[layout]}"}


def _converted(title: str, layout: str) -> str:
    return f"{title.removesuffix(f'-{layout}')}-{OTHER[layout]}"


def _title(name: PurePath) -> str:
    """A file's name, or the nearest folder's name if the file has a default name."""
    if not name.stem.startswith(NAMELESS):
        return name.stem
    return next((part for part in reversed(name.parent.parts) if not part.startswith("unet")), name.stem)


class ConvertSvd(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="KinoloomConvertSvd",
            display_name="Convert SVD Model",
            category="Kinoloom/svd",
            is_output_node=True,
            description="Copies a Stable Video Diffusion model or LoRA from diffusers' layout, in which SVD_Xtend "
            "saves, to ComfyUI's, or back. The copy computes the same results.",
            search_aliases=["convert svd lora", "svd_xtend", "diffusers to comfyui"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=choices(),
                    tooltip="A UNet in models/diffusion_models, a diffusers folder in models/diffusers, or a LoRA in "
                    "models/loras. diffusers' layout is converted to ComfyUI's, and the reverse.",
                )
            ],
            outputs=[io.String.Output("path", tooltip="The new file, in kinoloom/ of diffusion_models or loras.")],
        )

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        folder, _, name = file.partition("/")
        if folder not in (DIFFUSION_MODELS, DIFFUSERS, LORAS):  # may be a connected input
            raise ValueError(f"file={file!r}: expected a file in {DIFFUSION_MODELS}/, {DIFFUSERS}/ or {LORAS}/")
        source = Path(folder_paths.get_full_path_or_raise(folder, name))
        convert, kind = (convert_lora_file, LORAS) if folder == LORAS else (convert_unet_file, DIFFUSION_MODELS)
        try:
            path = convert(source, _title(PurePath(name)), output_folder(kind))
        except ValueError as error:
            raise ValueError(f"file={file!r}: {error}") from error
        return io.NodeOutput(str(path), ui={"text": (str(path),)})


NODES: list[type[io.ComfyNode]] = [ConvertSvd]
