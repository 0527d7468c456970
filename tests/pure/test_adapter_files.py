"""Files of image-to-video adapters: every layout, what is made of it, and files that cannot be used."""

import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from kinoloom.lora_io.adapter_files import merge_image_loras, motion_lora, parts_of, read_adapter
from kinoloom.lora_io.file import save
from kinoloom.lora_io.keys import from_motion_lora, to_motion_lora
from safetensors.torch import load_file
from tiny import sd as tiny_sd
from torch import Tensor

WIDTHS, TEXT, FRAMES = (8, 16, 24, 24), 12, 6
Tensors = dict[str, Tensor]

# The places of SD1.5 and of a motion module as tables, apart from the patterns of the code under test.
BLOCKS = {f"down_blocks.{b}.attentions.{a}": WIDTHS[b] for b in range(3) for a in range(2)}
BLOCKS |= {"mid_block.attentions.0": WIDTHS[3]}
BLOCKS |= {f"up_blocks.{b}.attentions.{a}": WIDTHS[3 - b] for b in range(1, 4) for a in range(3)}
MODULES = {f"down_blocks.{b}.motion_modules.{m}": WIDTHS[b] for b in range(4) for m in range(2)}
MODULES |= {f"up_blocks.{b}.motion_modules.{m}": WIDTHS[3 - b] for b in range(4) for m in range(3)}
ATTENTION = "{}.temporal_transformer.transformer_blocks.0.attention_blocks.{}.processor"
QKVO = ("q", "k", "v", "out")
A_BLOCK = "up_blocks.2.attentions.1.transformer_blocks.0"
A_LORA = ATTENTION.format("down_blocks.3.motion_modules.1", 1) + ".to_v_lora"


def lora(name: str, width_in: int, width_out: int, rank: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.down.weight": (rank, width_in), f"{name}.up.weight": (width_out, rank)}


def image(copies: bool = True, loras: bool = False, rank: int = 3) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for block, width in BLOCKS.items():
        name = f"{block}.transformer_blocks.0.i2v_adapter"
        shapes |= {f"{name}.to_out.0.weight": (width, width), f"{name}.to_out.0.bias": (width,)}
        shapes |= {f"{name}.to_{layer}.weight": (width, width) for layer in "qkv" if copies}
        for layer in ("q", "out") if loras else ():
            shapes |= lora(f"{name}.processor.to_{layer}_lora", width, width, rank)
    return shapes


def cross(rank: int = 3, query: bool = False) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for block, width in BLOCKS.items():
        for layer in QKVO[not query :]:
            name = f"{block}.transformer_blocks.0.attn2.processor.to_{layer}_lora"
            shapes |= lora(name, TEXT if layer in "kv" else width, width, rank)
    return shapes


def temporal(rank: int = 3, embed: bool = False) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for module, width in MODULES.items():
        for place in (ATTENTION.format(module, number) for number in range(2)):
            for layer in QKVO:
                shapes |= lora(f"{place}.to_{layer}_lora", width, width, rank)
            shapes |= {f"{place}.motion_embed.weight": (FRAMES, width)} if embed else {}
    return shapes


def drawn(*shapes: dict[str, tuple[int, ...]], seed: int = 0) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(shape, generator=generator) for each in shapes for key, shape in each.items()}


def unet(adapter: Tensors, folder: Path) -> Tensors:
    """The state of a whole UNet with an adapter in it, its constants of positions included."""
    config = {"block_out_channels": WIDTHS, "cross_attention_dim": TEXT, "norm_num_groups": 4, "attention_head_dim": 2}
    base = UNet2DConditionModel(sample_size=8, **config).state_dict()
    tiny_sd.write_motion_module(folder / "motion.safetensors", tuple(4 * width for width in WIDTHS))
    motion = load_file(folder / "motion.safetensors")
    assert "down_blocks.0.motion_modules.0.temporal_transformer.transformer_blocks.0.ff_norm.bias" in motion
    constants = {
        f"{A_BLOCK}.attn2.processor.pos_encoder.encoder.freqs": torch.ones(4),
        f"{A_BLOCK}.attn2.processor.pos_encoder_kv.pe": torch.ones(4),
    }
    return {**base, **motion, **constants, **adapter}


def splits(state: Tensors, folder: Path) -> list[Path]:
    """The original's three files, by the words in their keys."""
    chosen: dict[str, Callable[[str], bool]] = {
        "animatediff-i2v-nv1-motionlora-i2v-weights.pt": lambda key: "i2v" in key,
        "animatediff-i2v-nv1-motionlora-lora-weights.pt": lambda key: "lora" in key and "attn2" not in key,
        "animatediff-i2v-nv1-ca-lora-weights.pt": lambda key: "lora" in key and "attn2" in key,
    }
    for name, of in chosen.items():
        torch.save({key: value for key, value in state.items() if of(key)}, folder / name)
    return [folder / name for name in chosen]


def same(found: Tensors, expected: Tensors) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)


def test_our_own_file(tmp_path: Path) -> None:
    tensors = drawn(image(), cross(query=True), temporal(embed=True), {"word": (1, TEXT)})
    save(tmp_path / "a.safetensors", tensors, {"kinoloom.alpha": "8.0", "kinoloom.export": "adapter"})
    found = read_adapter(tmp_path / "a.safetensors")
    assert same(found.tensors, tensors) and found.alpha == 8.0
    assert found.metadata["kinoloom.export"] == "adapter"


@pytest.mark.parametrize("given", [(0, 1, 2), (2, 0), (1,), (0,), (2,)])
def test_the_original_s_split_files_of_which_any_may_be_absent(given: tuple[int, ...], tmp_path: Path) -> None:
    parts = drawn(image(loras=True)), drawn(temporal()), drawn(cross(rank=5))
    files = splits(unet({**parts[0], **parts[1], **parts[2]}, tmp_path), tmp_path)
    expected = {key: value for place in given for key, value in parts[place].items()}
    if 1 in given:  # the motion LoRA's file has the LoRAs of the I2V adapter too
        expected |= {key: value for key, value in parts[0].items() if "_lora" in key}
    if given == (1,):
        with pytest.raises(ValueError, match=r"file .*-lora-weights.pt: .* lacks to_out.0.bias"):
            read_adapter(files[1])
        return
    found = read_adapter(*(files[place] for place in given))
    assert same(found.tensors, expected)
    assert found.alpha is None and found.metadata == {}


def test_files_with_a_step_beside_the_tensors_and_roots_before_their_names(tmp_path: Path) -> None:
    tensors = drawn(temporal(), cross())
    for root in ("module.", "unet.", "module.unet.", "_orig_mod.", "base_model.model.", "diffusion_model."):
        named = {root + key: value for key, value in tensors.items()}
        torch.save({"state_dict": named, "global_step": 7000, "epoch": 3}, tmp_path / "a.pt")
        assert same(read_adapter(tmp_path / "a.pt").tensors, tensors), root
    torch.save(tensors, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert same(read_adapter(tmp_path / "old.pt").tensors, tensors)


def test_an_adapter_file_and_a_whole_unet_hold_the_same_adapter(tmp_path: Path) -> None:
    tensors = drawn(image(), cross(), temporal(embed=True))
    state = unet(tensors, tmp_path)
    save(tmp_path / "model.safetensors", state)
    torch.save({"state_dict": state}, tmp_path / "model.pt")
    trained = ("i2v_adapter.to_out", "to_q_lora", "to_k_lora", "to_v_lora", "to_out_lora", "motion_embed")
    torch.save({key: state[key] for key in state if any(name in key for name in trained)}, tmp_path / "adapter.pt")
    for name in ("model.safetensors", "model.pt"):
        assert same(read_adapter(tmp_path / name).tensors, tensors)
    copied = [key for key in tensors if "i2v_adapter" in key and "to_out" not in key]
    assert same(read_adapter(tmp_path / "adapter.pt").tensors, {k: tensors[k] for k in tensors if k not in copied})


def test_a_whole_unet_s_random_constants_are_refused_and_absent_ones_are_not(tmp_path: Path) -> None:
    """The original's unet_use_temporal_attention adds a layer whose bias is random and never trained."""
    tensors, width = drawn(cross()), BLOCKS["up_blocks.2.attentions.1"]
    names = {f"to_{layer}.weight": torch.ones(width, width) for layer in "qkv"}
    names |= {"to_out.0.weight": torch.zeros(width, width), "to_out.0.bias": torch.zeros(width)}
    layer = {f"{A_BLOCK}.attn_temp.{name}": value for name, value in names.items()}
    layer[f"{A_BLOCK}.norm_temp.weight"] = torch.ones(width)
    save(tmp_path / "still.safetensors", {**tensors, **layer})
    assert same(read_adapter(tmp_path / "still.safetensors").tensors, tensors)
    layer[f"{A_BLOCK}.attn_temp.to_out.0.bias"] = torch.full((width,), 0.01)
    save(tmp_path / "model.safetensors", {**tensors, **layer})
    with pytest.raises(ValueError, match=r"attn_temp.to_out.0.bias is of a layer that adds a random, untrained const"):
        read_adapter(tmp_path / "model.safetensors")


def test_factors_with_the_names_of_other_tools(tmp_path: Path) -> None:
    """CA-LoRA on keys and values, and the motion LoRA, as diffusers, PEFT and ComfyUI name them; output by no other."""
    own = {key: value for key, value in drawn(cross(), temporal()).items() if "attn2.processor.to_out" not in key}
    lora_ab = {".down.": ".lora_A.", ".up.": ".lora_B."}
    plain = {key.replace(".processor", ""): value for key, value in own.items()}
    peft = {}
    for key, value in plain.items():
        for old, new in lora_ab.items():
            key = key.replace(f"_lora{old}", new)
        key = key.replace("temporal_transformer.", "").replace("attention_blocks.0", "attn1")
        peft["unet." + key.replace("attention_blocks.1", "attn2")] = value
    alphas = {key.replace("lora_A.weight", "alpha"): torch.tensor(8.0) for key in peft if "lora_A" in key}
    save(tmp_path / "plain.safetensors", plain)
    save(tmp_path / "peft.safetensors", {**peft, **alphas})
    for name, alpha in (("plain", None), ("peft", 8.0)):
        found = read_adapter(tmp_path / f"{name}.safetensors")
        assert same(found.tensors, own) and found.alpha == alpha, name
    comfy = {"input_blocks.1.1": "down_blocks.0.attentions.0", "middle_block.1": "mid_block.attentions.0",
             "output_blocks.11.1": "up_blocks.3.attentions.2", "output_blocks.3.1": "up_blocks.1.attentions.0",
             "input_blocks.8.1": "down_blocks.2.attentions.1"}  # fmt: skip
    renamed = {key: value for key, value in own.items() if "attn2" in key}
    for ours, theirs in ((new, old) for old, new in comfy.items()):
        renamed = {key.replace(f"{ours}.", f"diffusion_model.{theirs}."): value for key, value in renamed.items()}
    assert sum(key.startswith("diffusion_model.") for key in renamed) == 5 * 4
    save(tmp_path / "comfy.safetensors", renamed)
    expected = {key: value for key, value in own.items() if "attn2" in key}
    assert same(read_adapter(tmp_path / "comfy.safetensors").tensors, expected)
    save(tmp_path / "out.safetensors", {f"{A_BLOCK}.attn2.to_out.0.lora_A.weight": torch.ones(3, 16)})
    with pytest.raises(ValueError, match="of an ordinary LoRA, added to the layer's weight, expected to_out_lora"):
        read_adapter(tmp_path / "out.safetensors")


def changed(change: Callable[[Tensors], object]) -> Callable[[Path], list[Path]]:
    """Files of an adapter with a change in it."""

    def make(folder: Path) -> list[Path]:
        tensors = drawn(image(copies=False), cross(), temporal(embed=True), {"word": (1, TEXT)})
        change(tensors)
        torch.save(tensors, folder / "a.pt")
        return [folder / "a.pt"]

    return make


def two(first: Tensors, second: Tensors) -> Callable[[Path], list[Path]]:
    def make(folder: Path) -> list[Path]:
        torch.save(first, folder / "a.pt")
        save(folder / "b.safetensors", second, {"kinoloom.alpha": "4"})
        return [folder / "a.pt", folder / "b.safetensors"]

    return make


def stored_alpha(text: str) -> Callable[[Path], list[Path]]:
    def make(folder: Path) -> list[Path]:
        save(folder / "a.safetensors", drawn(cross()), {"kinoloom.alpha": text})
        return [folder / "a.safetensors"]

    return make


def written(name: str, data: bytes) -> Callable[[Path], list[Path]]:
    def make(folder: Path) -> list[Path]:
        (folder / name).write_bytes(data)
        return [folder / name]

    return make


A_CROSS = f"{A_BLOCK}.attn2.processor.to_k_lora"
TWO_RANKS = {"down.weight": torch.ones(5, 24), "up.weight": torch.ones(24, 5)}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (changed(lambda t: t.pop(f"{A_LORA}.up.weight")), "attention_blocks.1 lacks to_v_lora.up.weight"),
        (changed(lambda t: t.pop(f"{A_BLOCK}.i2v_adapter.to_out.0.bias")), f"{A_BLOCK} lacks to_out.0.bias"),
        (changed(lambda t: [t.pop(key) for key in list(t) if A_BLOCK in key]), "image part has 15 layers, expected 16"),
        (changed(lambda t: [t.pop(key) for key in list(t) if "down_blocks.3.motion" in key]), "has 36 layers, exp"),
        (changed(lambda t: t.update({f"{A_LORA}.up.weight": torch.ones(24, 2)})),
         r"v_lora.up.weight is of shape \(24, 2\): rank 2, but 3 in .*v_lora.down.weight"),
        (changed(lambda t: t.update({f"{A_LORA}.{name}": value for name, value in TWO_RANKS.items()})),
         r"v_lora.down.weight is of shape \(5, 24\): rank 5, but 3 in"),
        (changed(lambda t: t.update({f"{A_CROSS}.down.weight": torch.ones(3, 13)})), "text width 13, but 12 in"),
        (changed(lambda t: t.update({f"{A_CROSS}.up.weight": torch.ones(8, 3)})), "channels 16, but 8 in .*to_k_lora.up"),
        (changed(lambda t: t.update({"word": torch.ones(1, 9)})), r"word is of shape \(1, 9\): text width 9, but 12"),
        (changed(lambda t: t.update({f"{A_CROSS}.up.weight": torch.ones(3)})), "expected floats of shape .channels, r"),
        (changed(lambda t: t.update({f"{A_CROSS}.up.weight": torch.ones(16, 3).long()})), "is torch.int64 of shape"),
        (changed(lambda t: t[f"{A_CROSS}.up.weight"].fill_(float("nan"))), "k_lora.up.weight holds NaN or infinite"),
        (changed(lambda t: t.update(strange=torch.ones(1), other=torch.ones(1))), "are not known: strange, other"),
        (changed(lambda t: t.update({"mid_block.attentions.1.transformer_blocks.0.i2v_adapter.to_q.weight":
                                     torch.ones(24, 24)})), "not known: mid_block.attentions.1"),
        (changed(lambda t: t.update({f"{A_BLOCK}.attn1.processor.to_k_lora.down.weight": torch.ones(3, 16)})),
         "not known: .*attn1.processor.to_k_lora.down.weight"),
        (changed(lambda t: t.update({f"{A_BLOCK}.attn2.processor.to_k_ip.weight": torch.ones(16, 12)})), "IP-Adapter"),
        (changed(lambda t: t.update({f"{A_BLOCK}.attn2.processor.sCA.CA2.weight": torch.ones(64, 16)})), "later form"),
        (changed(lambda t: t.update({f"{A_BLOCK}.attn_tCA.to_q.weight": torch.ones(16, 16)})), "later form of the method"),
        (changed(lambda t: t.update({f"{A_BLOCK}.i2v_adapters.0.to_q.weight": torch.ones(16, 16)})), "several adapters"),
        (changed(lambda t: t.clear()), "file a.pt: holds nothing of an adapter, expected an I2V adapter, CA-LoRA"),
        (two(drawn(cross()), drawn({"lora_unet_x": (1,)})), "file b.safetensors: holds nothing .*but lora_unet_x"),
        (two(drawn(cross()), drawn(cross(), seed=1)), "file b.safetensors: .* has other values in two of these files"),
        (two({**drawn(cross()), f"{A_CROSS}.alpha": torch.tensor(2.0)}, drawn(temporal())),
         "file a.pt, b.safetensors: found the alphas 2.0, 4.0, expected the same"),
        (two(drawn(cross()), {"a": torch.ones(1)}), "but a$"),
        (stored_alpha("inf"), "kinoloom.alpha='inf' in its metadata, expected a number"),
        (stored_alpha("one"), "a.safetensors: kinoloom.alpha='one' in its metadata, expected a number"),
        (written("a.pt", b"not a file of torch"), "a.pt: not a readable torch file. It is damaged, or holds more than"),
        (written("a.safetensors", b"\x00" * 64), "a.safetensors: not a readable safetensors file"),
        (written("a.pt", pickle.dumps(3)), "a.pt: not a readable torch file"),
        (lambda folder: [folder / "gone.pt"], "gone.pt: not found"),
        (lambda folder: [folder / "gone.safetensors"], "gone.safetensors: not found"),
        (lambda folder: [], "no file is given, expected at least one of an adapter"),
    ],
)  # fmt: skip
def test_files_that_cannot_be_used(make: Callable[[Path], list[Path]], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read_adapter(*make(tmp_path))


class Harmful:
    def __reduce__(self) -> tuple:
        return Path.touch, (Path("ran"),)


def test_code_in_a_file_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for zipped in (True, False):
        given = {**drawn(cross()), "more": Harmful()}
        torch.save(given, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
        assert zipfile.is_zipfile(tmp_path / "a.pt") == zipped
        with pytest.raises(ValueError, match="holds more than tensors, which is never opened"):
            read_adapter(tmp_path / "a.pt")
    assert not Path("ran").exists()


def test_a_motion_lora_of_an_adapter_is_one_for_animatediff(tmp_path: Path) -> None:
    tensors = drawn(image(), cross(), temporal(rank=4, embed=True))
    made = motion_lora(tensors, alpha=2.0)
    assert made.keys() == temporal(rank=4).keys()
    back = from_motion_lora(made)
    assert same(back, from_motion_lora(to_motion_lora(back)))
    for key, shape in temporal(rank=4).items():
        module = key.replace(".processor", "").replace("to_out_lora", "to_out.0_lora")
        side = "lora_up" if ".up." in key else "lora_down"
        found = back[module.partition("_lora.")[0] + f".{side}.weight"]
        assert found.shape == shape and torch.equal(found, tensors[key] * (0.5 if ".up." in key else 1.0))
    for described, alpha in ({"kinoloom.export": "motion", "kinoloom.alpha": "2.0"}, 4.0), ({}, None):
        save(tmp_path / "motion.safetensors", made, described)
        found = read_adapter(tmp_path / "motion.safetensors")
        assert same(found.tensors, made) and found.alpha == alpha, "its scale is in the up factors"


def test_loras_of_the_i2v_adapter_are_merged_as_the_original_applies_them() -> None:
    tensors, alpha, rank = drawn(image(loras=True), cross()), 2.0, 3
    merged = merge_image_loras(tensors, alpha)
    assert merged.keys() == drawn(image(), cross()).keys()
    for block, own in parts_of(tensors)["image"].items():
        x = torch.randn(5, own["to_q.weight"].shape[0])

        def lora(name: str, x: Tensor, own: Tensors = own) -> Tensor:
            down, up = (own[f"processor.to_{name}_lora.{side}.weight"] for side in ("down", "up"))
            return x @ down.T @ up.T * (alpha / rank)

        query = x @ own["to_q.weight"].T + lora("q", x)
        output = x @ own["to_out.0.weight"].T + own["to_out.0.bias"]
        output = output + lora("out", output)
        name = f"{block}.i2v_adapter"
        torch.testing.assert_close(x @ merged[f"{name}.to_q.weight"].T, query, atol=1e-4, rtol=1e-4)
        found = x @ merged[f"{name}.to_out.0.weight"].T + merged[f"{name}.to_out.0.bias"]
        torch.testing.assert_close(found, output, atol=1e-4, rtol=1e-4)
    without = {key: value for key, value in tensors.items() if not key.endswith("i2v_adapter.to_q.weight")}
    with pytest.raises(ValueError, match=r"i2v_adapter.to_q.weight is missing, expected it beside its LoRA"):
        merge_image_loras(without, alpha)
    plain = drawn(image(copies=False), temporal())
    assert same(merge_image_loras(plain, alpha), plain)
