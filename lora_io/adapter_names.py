"""Names of a motion adapter's tensors, and how other layouts name them."""

import re
from dataclasses import dataclass

from .keys import diffusers_path, motion_path, split_factor

BLOCK = (
    r"((?:down_blocks\.[012]\.attentions\.[01]|mid_block\.attentions\.0|up_blocks\.[123]\.attentions\.[012])"
    r"\.transformer_blocks\.0)"
)
ATTENTION = (
    r"((?:down_blocks\.[0-3]\.motion_modules\.[01]|mid_block\.motion_modules\.0|up_blocks\.[0-3]\.motion_modules\.[012])"
    r"\.temporal_transformer\.transformer_blocks\.0\.attention_blocks\.[01])"
)
# Part, names of its tensors as place and rest, and what their sizes are: see SIZES.
TENSORS = tuple(
    (part, re.compile(pattern), sizes)
    for part, pattern, sizes in (
        ("image", BLOCK + r"\.i2v_adapter\.(to_[qkv]\.weight|to_out\.0\.weight)", "CC"),
        ("image", BLOCK + r"\.i2v_adapter\.(to_out\.0\.bias)", "C"),
        ("image", BLOCK + r"\.i2v_adapter\.(processor\.to_(?:q|out)_lora\.down\.weight)", "RC"),
        ("image", BLOCK + r"\.i2v_adapter\.(processor\.to_(?:q|out)_lora\.up\.weight)", "CR"),
        ("cross", BLOCK + r"\.attn2\.processor\.(to_[kv]_lora\.down\.weight)", "RT"),
        ("cross", BLOCK + r"\.attn2\.processor\.(to_(?:q|out)_lora\.down\.weight)", "RC"),
        ("cross", BLOCK + r"\.attn2\.processor\.(to_(?:q|k|v|out)_lora\.up\.weight)", "CR"),
        ("temporal", ATTENTION + r"\.processor\.(to_(?:q|k|v|out)_lora\.down\.weight)", "RC"),
        ("temporal", ATTENTION + r"\.processor\.(to_(?:q|k|v|out)_lora\.up\.weight)", "CR"),
        ("temporal", ATTENTION + r"\.processor\.(motion_embed\.weight)", "FC"),
        ("word", "()(word)", "WT"),
    )
)
SIZES = {"C": "channels", "R": "rank", "T": "text width", "F": "frames", "W": "1 word"}
ROOTS = re.compile(r"^((module|unet|_orig_mod|base_model\.model|model\.diffusion_model|diffusion_model)\.)*")
COMFY = re.compile(r"(middle_block|(input|output)_blocks\.\d+)\.1\.transformer_blocks\.0\.")
LAYERS = ("to_q", "to_k", "to_v", "to_out")

# What a whole UNet holds besides an adapter, in diffusers' layout: frozen weights, and constants of positions.
FROZEN = re.compile(
    r"(conv_in|conv_out|conv_norm_out|time_embedding\.linear_[12])\.(weight|bias)"
    r"|((down|up)_blocks\.\d|mid_block)\.((resnets|downsamplers|upsamplers)\..+|(attentions\.\d|motion_modules\.\d"
    r"\.temporal_transformer)\.(norm|proj_in|proj_out)\.(weight|bias)|(attentions\.\d|motion_modules\.\d"
    r"\.temporal_transformer)\.transformer_blocks\.0\.((attn[12]|attention_blocks\.[01])\.to_([qkv]|out\.0)\.(weight|bias)"
    r"|ff\.net\.[02](\.proj)?\.(weight|bias)|(norm[123]|norms\.[01]|ff_norm)\.(weight|bias)))"
)
CONSTANTS = re.compile(r".+\.pos_encoder(_kv)?\..+")
SELF_IN_TIME = re.compile(r".+\.(attn|norm)_temp\.(.+)")

REFUSED = (
    (r"\.to_[kv]_ip\.", "is of an IP-Adapter, expected an adapter without one: apply it by a node of its own"),
    (
        r"\.i2v_adapters\.\d|\.processors\.\d|\.to_(q|k|v|out)_loras\.\d",
        "is of a file with several adapters, expected a file of one",
    ),
    (
        r"\.(sCA(_b)?|CA[1-4]|CA_norm|to_q_mask|to_out_mask|weight_module|attn_tCA|tCA_norm)\.",
        "is of a later form of the method, with simple cross-attention, masks or weighted frames, which is not known",
    ),
)
ALPHA, NOTHING = "alpha", ""  # what `read_name` gives for an alpha, and for a tensor that no adapter needs


@dataclass(frozen=True)
class Kind:
    """What a tensor is: its part, the layer's place, the rest of its name, and a letter of SIZES for each size."""

    part: str
    place: str
    rest: str
    sizes: str

    def scopes(self, size: str) -> list[tuple[str, ...]]:
        """Among which tensors that size is one number: for a rank those of a pair, then those of a part."""
        if size == "R":
            return [(size, self.place, self.part, re.sub("(down|up)", "", self.rest)), (size, self.part)]
        return [(size, self.place)] if size == "C" else [(size,)]


def kind_of(name: str) -> Kind | None:
    """What a tensor with one of our own names is. None for another name."""
    for part, pattern, sizes in TENSORS:
        if match := pattern.fullmatch(name):
            return Kind(part, match[1], match[2], sizes)
    return None


def read_name(key: str) -> str | None:
    """Our own name of a tensor in any known layout, ALPHA, NOTHING, or None for an unknown one.

    ValueError says why a tensor that is known cannot be used.
    """
    name = ROOTS.sub("", key)
    for pattern, reason in REFUSED:
        if re.search(pattern, name):
            raise ValueError(f"{key} {reason}")
    if COMFY.match(name):
        name = diffusers_path(name)
    if FROZEN.fullmatch(name) or CONSTANTS.fullmatch(name):
        return NOTHING
    if name.endswith(".alpha"):
        layer = name.removesuffix(".alpha")
        return _of_factor(f"{layer}.{'' if layer.endswith('_lora') else 'lora_'}down.weight") and ALPHA
    return name if kind_of(name) or SELF_IN_TIME.fullmatch(name) else _of_factor(name)


def _of_factor(name: str) -> str | None:
    """Our own name of a LoRA's factor with another name. None for other tensors."""
    factor = split_factor(name.replace("processor.", ""))
    if factor is None:
        return None
    path, side = factor[0].removesuffix(".0"), factor[1]
    if in_time := "motion_modules" in path:
        path = motion_path(path).removesuffix(".0")
    place, _, layer = path.rpartition(".")
    if place.endswith(".attn2") and layer == "to_out" and not in_time and "to_out_lora." not in name:
        raise ValueError(
            f"{name} is of an ordinary LoRA, added to the layer's weight, expected to_out_lora, which follows the layer"
        )
    made = f"{place}.processor.{layer}_lora.{side}.weight"
    return made if layer in LAYERS and kind_of(made) else None
