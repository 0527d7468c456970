"""A node pack of its own for the toy world's models; Kinoloom does not register it."""

import comfy.sd
import comfy.utils
import folder_paths
from comfy_api.latest import ComfyExtension, io

from . import text_encoder, unet, video_unet, vision


class ToyWorldTextEncoder(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ToyWorldTextEncoder",
            display_name="Load Toy World Text Encoder",
            category="toy world",
            inputs=[io.Combo.Input("clip_name", options=folder_paths.get_filename_list("text_encoders"))],
            outputs=[io.Clip.Output()],
        )

    @classmethod
    def execute(cls, clip_name: str) -> io.NodeOutput:
        return io.NodeOutput(text_encoder.load(folder_paths.get_full_path_or_raise("text_encoders", clip_name)))


class ToyWorldImageModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ToyWorldImageModel",
            display_name="Load Toy World Image Model",
            category="toy world",
            inputs=[io.Combo.Input("unet_name", options=folder_paths.get_filename_list("diffusion_models"))],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, unet_name: str) -> io.NodeOutput:
        return io.NodeOutput(unet.load(folder_paths.get_full_path_or_raise("diffusion_models", unet_name)))


class ToyWorldImageToVideoModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ToyWorldImageToVideoModel",
            display_name="Load Toy World Image-to-Video Model",
            category="toy world",
            inputs=[io.Combo.Input("unet_name", options=folder_paths.get_filename_list("diffusion_models"))],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, unet_name: str) -> io.NodeOutput:
        return io.NodeOutput(video_unet.load_unet(folder_paths.get_full_path_or_raise("diffusion_models", unet_name)))


class ToyWorldImageToVideo(io.ComfyNode):
    """In the place of ComfyUI's Image Only Checkpoint Loader, which only knows the full width."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        names = {
            "ckpt_name": "diffusion_models",
            "vision_name": "clip_vision",
            "vae_name": "vae",
        }
        return io.Schema(
            node_id="ToyWorldImageToVideo",
            display_name="Load Toy World Image-to-Video Checkpoint",
            category="toy world",
            inputs=[
                io.Combo.Input(name, options=folder_paths.get_filename_list(folder)) for name, folder in names.items()
            ],
            outputs=[io.Model.Output(), io.ClipVision.Output(), io.Vae.Output()],
        )

    @classmethod
    def execute(cls, ckpt_name: str, vision_name: str, vae_name: str) -> io.NodeOutput:
        model = video_unet.load_unet(folder_paths.get_full_path_or_raise("diffusion_models", ckpt_name))
        encoder = vision.load(folder_paths.get_full_path_or_raise("clip_vision", vision_name))
        weights = comfy.utils.load_torch_file(folder_paths.get_full_path_or_raise("vae", vae_name))
        return io.NodeOutput(model, encoder, comfy.sd.VAE(sd=weights))


class _Extension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [ToyWorldTextEncoder, ToyWorldImageModel, ToyWorldImageToVideoModel, ToyWorldImageToVideo]


async def comfy_entrypoint() -> ComfyExtension:
    return _Extension()
