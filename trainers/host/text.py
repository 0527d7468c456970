"""The text encoder of Stable Diffusion 1.5, CLIP-L: loaded for a run alone, and with vectors in its prompts."""

from collections.abc import Callable
from copy import copy
from typing import Any

import comfy.sd
import torch
from comfy.sd1_clip import SD1ClipModel, SD1Tokenizer
from torch import Tensor, nn

WIDTH = 768
CPU = torch.device("cpu")
# ComfyUI takes a text encoder that is loaded on its own device into its list of loaded models. These two differ.
UNMANAGED = {"load_device": torch.device("meta"), "offload_device": CPU, "initial_device": CPU}
# The functions, by name, by which ComfyUI loads the text encoder of a CLIP again: a model patcher from a path.
LOADERS: dict[str, Callable[[str], Any]] = {
    "load_clip_model_patcher": lambda path: comfy.sd.load_clip_model_patcher(
        [path], model_options=UNMANAGED, disable_dynamic=True
    ),
    "load_checkpoint_clip_patcher": lambda path: comfy.sd.load_checkpoint_clip_patcher(
        path, te_model_options=UNMANAGED, disable_dynamic=True
    ),
}


def require_clip_l(clip: Any, name: str = "clip") -> None:
    """ValueError unless a CLIP is Stable Diffusion 1.5's."""
    model = clip.cond_stage_model
    if not (isinstance(model, SD1ClipModel) and model.clip == "clip_l"):
        raise ValueError(f"{name}: {type(model).__name__}, expected the text encoder of Stable Diffusion 1.5 (CLIP-L)")


def require_last_layer(clip: Any, name: str = "clip") -> None:
    """ValueError unless a CLIP encodes with all its layers, as a TextEncoder does."""
    if clip.layer_idx not in (None, -1):
        raise ValueError(
            f"{name}: CLIP Set Last Layer stops at layer {clip.layer_idx}, expected the last one (-1): connect the "
            "text encoder as it is before that node"
        )


class TextEncoder:
    """Encodes literal prompts, without weights, with the text encoder `model`, an SD1ClipModel."""

    def __init__(self, model: SD1ClipModel) -> None:
        self.model: Any = model.clip_l
        positions = len(self.model.transformer.text_model.embeddings.position_embedding.weight)
        self.tokenizer = SD1Tokenizer(tokenizer_data={"clip_l_max_length": positions})

    def tokens(self, text: str) -> list[int]:
        """The tokens of a text, without start, end and padding."""
        return self.tokenizer.clip_l.tokenizer(text)["input_ids"][1:-1]

    def sections(self, text: str, vectors: dict[str, Tensor]) -> list[list[Any]]:
        """Sections of 77 tokens: numbers, and the vectors [768] of `embedding:<name>`."""
        tokens = with_vectors(self.tokenizer, vectors).tokenize_with_weights(text, disable_weights=True)["l"]
        return [[token for token, *_ in section] for section in tokens]

    @torch.no_grad()
    def row(self, text: str) -> Tensor:
        """The embedding [1, 768] of the first token of a text, in fp32. A copy."""
        table = self.model.transformer.get_input_embeddings()
        return table(torch.tensor(self.tokens(text)[:1], device=table.weight.device), out_dtype=torch.float32).clone()

    def encode(self, text: str, vectors: dict[str, Tensor]) -> Tensor:
        """The encoding [1, 77, 768] of a prompt, as CLIP Text Encode makes it; 77 more for each further section.

        vectors: those [n, 768] of `embedding:<name>` in the text, by name. They get a gradient.
        """
        encoded = self.model.encode(self.sections(text, vectors))[0]
        return encoded.flatten(0, 1).unsqueeze(0)


def with_vectors(tokenizer: Any, vectors: dict[str, Tensor]) -> Any:
    """A copy of a CLIP's tokenizer for which `embedding:<name>` are these vectors [n, 768], and then those of files."""
    own, inner = copy(tokenizer), copy(getattr(tokenizer, tokenizer.clip))
    read = inner._try_get_embedding

    def find(name: str) -> tuple[Tensor | None, str, str]:
        first, *rest = name.split()
        return (vectors[first], first, " ".join(rest)) if first in vectors else read(name)

    inner._try_get_embedding = find
    inner.embedding_directory = inner.embedding_directory or []  # None would turn embeddings off
    setattr(own, tokenizer.clip, inner)
    return own


def make_trainable(model: Any) -> None:
    """Let a backward through a text encoder work, whose layers change the input of their norms in place.

    The projection of the pooled output is dropped: checkpoints lack it, and ComfyUI then leaves it as memory was.
    """
    model.clip_l.transformer.text_projection = nn.Identity()
    for name, module in model.named_modules():
        if name.endswith((".layer_norm1", ".layer_norm2")):
            module.register_forward_pre_hook(lambda _, inputs: (inputs[0].clone(),))
