"""Nodes that load image-to-video adapters, each with its weight and its prompt."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import io
from torch import Tensor

from ...lora_io.adapter_files import AdapterFiles, merge_image_loras, read_adapter
from ...trainers.conditions.adapter import Adapter, Query
from ...trainers.conditions.adapter_positions import MODES, NONE
from ...trainers.conditions.word import KEY, WORD
from ..folders import I2V_ADAPTERS
from ..hooked import as_loaded, patcher_of
from ..training.registry import trained_file
from ..widgets import NO_FILE, files_state, listed_file, model_file, path_input
from ..wires import I2vAdaptersType
from .words import encode, word_places

UNSAID = 0.0  # alpha that no file says
PARTS = ("i2v_file", "motion_file", "cross_file")


@dataclass(frozen=True)
class Loaded:
    """An adapter on an I2V_ADAPTERS wire. prompt: [1, n, D], or None for the sampler's. metadata: of its files.

    places: the word at each of the n places of the prompt, "" where there is none.
    """

    name: str
    patcher: Any
    weight: float
    prompt: Tensor | None
    places: tuple[str, ...] = ()
    metadata: dict[str, str] = field(default_factory=dict)


def load(files: AdapterFiles, alpha: float, query: Query) -> Any:
    """A patcher of the adapter in some files."""
    tensors = {key: value for key, value in merge_image_loras(files.tensors, alpha).items() if key != KEY}
    shapes = {key: tuple(value.shape) for key, value in tensors.items()}
    return patcher_of(Adapter(shapes, alpha, query, **as_loaded(tensors)).load(tensors))


def with_prompt(
    files: AdapterFiles, patcher: Any, name: str, weight: float, clip: Any, prompt: str
) -> Loaded:
    """The adapter with its prompt, encoded. ValueError if there is a prompt but no text encoder."""
    text = prompt.strip()
    if not text:
        return Loaded(name, patcher, weight, None, (), files.metadata)
    if clip is None:
        raise ValueError(f"prompt={text!r}: expected clip connected, which encodes it")
    words = learned_words(files)
    places = word_places(clip, text, words)
    return Loaded(name, patcher, weight, encode(clip, text, words), places, files.metadata)


def learned_words(files: AdapterFiles) -> dict[str, Tensor]:
    """The word that an adapter has learned, with its vector [1, 768]; empty if it has none."""
    word = files.metadata.get(WORD)
    return {word: files.tensors[KEY]} if word and KEY in files.tensors else {}


def stored_query(metadata: dict[str, str]) -> Query | None:
    """The settings of cross-attention that a file was trained with, None if it does not say them.

    ValueError for positions that are not known, as a later version may write them.
    """
    if (positions := metadata.get("kinoloom.positions")) is None:
        return None
    if positions not in MODES:
        raise ValueError(f"kinoloom.positions={positions!r} in the metadata: expected one of {', '.join(MODES)}")
    return Query(positions, int(metadata.get("kinoloom.query_stride", 1)))


def chosen(option: str, name: str) -> Path | None:
    return None if name in ("", NO_FILE) else model_file(option, I2V_ADAPTERS, name)


def adapter_inputs() -> list[io.Input]:
    """The inputs that both loaders have."""
    return [
        io.Float.Input(
            "weight", default=1.0, min=-2.0, max=2.0, step=0.05,
            tooltip="How much of this adapter. The weights of adapters that work together should sum to 1.",
        ),
        io.String.Input(
            "prompt", default="", multiline=True,
            tooltip="What this adapter moves, such as: waterfall. Empty uses the positive prompt of the sampler.",
        ),
    ]  # fmt: skip


def shared_inputs() -> list[io.Input]:
    return [
        io.Clip.Input("clip", optional=True, tooltip="Encodes the prompt. Not needed if the prompt is empty."),
        I2vAdaptersType.Input("adapters", optional=True, tooltip="Other adapters, to which this one is added."),
    ]


def files_input(option: str, tooltip: str) -> io.Input:
    files = [NO_FILE, *folder_paths.get_filename_list(I2V_ADAPTERS)]
    return io.Combo.Input(option, options=files, default=NO_FILE, tooltip=tooltip)


OUTPUTS = [I2vAdaptersType.Output("adapters", tooltip="For Apply I2V Adapters, or for the next loader.")]


class LoadI2vAdapter(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="KinoloomLoadI2vAdapter",
            display_name="Load I2V Adapter",
            category="Kinoloom/adapters",
            description="Loads a motion adapter from Train CA-LoRA, with its weight and its own prompt. Chain several.",
            search_aliases=["ca-lora", "i2v-adapter", "motion adapter", "image to video"],
            inputs=[
                files_input("file", "A file in models/i2v_adapters, such as kinoloom/<run name>/...-adapter-...."),
                *adapter_inputs(),
                *shared_inputs(),
                path_input(),
            ],
            outputs=OUTPUTS,
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, file: str | None = None, path: str | None = "") -> bool:
        """ValueError for a missing file. Connected inputs are None."""
        if file is not None and path == "":
            require_file(file)
        return True

    @classmethod
    def fingerprint_inputs(cls, file: str | None = None, **_: Any) -> str:
        return files_state(I2V_ADAPTERS, file)

    @classmethod
    def execute(
        cls, file: str, weight: float, prompt: str, clip: Any = None, adapters: tuple[Loaded, ...] = (), path: str = ""
    ) -> io.NodeOutput:
        found = Path(trained_file(path)) if path else require_file(file)
        files = read_adapter(found)
        if files.alpha is None and files.has_loras:
            raise ValueError(
                f"file={found.name!r}: it does not say its alpha, as files of other programs do not. Use Load I2V "
                "Adapter Files, which asks for it"
            )
        patcher = load(files, files.alpha or UNSAID, stored_query(files.metadata) or Query())
        return io.NodeOutput((*adapters, with_prompt(files, patcher, found.name, weight, clip, prompt)))


def require_file(name: str) -> Path:
    return listed_file(I2V_ADAPTERS, name, "an adapter")


class LoadI2vAdapterFiles(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="KinoloomLoadI2vAdapterFiles",
            display_name="Load I2V Adapter Files",
            category="Kinoloom/adapters",
            description="Loads a motion adapter that another program saved: in up to three files, or whole in one.",
            search_aliases=["MIVA", "ca-lora", "i2v-weights.pt"],
            inputs=[
                files_input("i2v_file", "The I2V-Adapter (...-i2v-weights.pt), or a file with all parts, adapter.pt."),
                files_input("motion_file", "The motion LoRA of the temporal layers (...-lora-weights.pt)."),
                files_input("cross_file", "The CA-LoRA (...-ca-lora-weights.pt)."),
                *adapter_inputs(),
                io.Float.Input(
                    "alpha", default=1.0, min=0.0, max=1024.0, step=0.5,
                    tooltip="The network alpha that it was trained with, which its files do not say: 1 in the "
                    "original. 0 takes it from the files.",
                ),
                io.Combo.Input(
                    "positions", options=list(MODES), default=NONE, tooltip="ca_pe_mode that it was trained with."
                ),
                io.Int.Input(
                    "query_stride", default=1, min=1, max=8, tooltip="q_downsample_ratio that it was trained with."
                ),
                *shared_inputs(),
            ],
            outputs=OUTPUTS,
        )  # fmt: skip

    @classmethod
    def validate_inputs(
        cls, i2v_file: str | None = None, motion_file: str | None = None, cross_file: str | None = None
    ) -> bool:
        given = dict(zip(PARTS, (i2v_file, motion_file, cross_file), strict=True))
        if None not in given.values():
            require_files(given)
        return True

    @classmethod
    def fingerprint_inputs(
        cls, i2v_file: str | None = None, motion_file: str | None = None, cross_file: str | None = None, **_: Any
    ) -> str:
        return files_state(I2V_ADAPTERS, i2v_file, motion_file, cross_file)

    @classmethod
    def execute(
        cls, i2v_file: str, motion_file: str, cross_file: str, weight: float, prompt: str, alpha: float,
        positions: str, query_stride: int, clip: Any = None, adapters: tuple[Loaded, ...] = (),
    ) -> io.NodeOutput:  # fmt: skip
        paths = require_files(dict(zip(PARTS, (i2v_file, motion_file, cross_file), strict=True)))
        files = read_adapter(*paths)
        if alpha == UNSAID and files.alpha is None and files.has_loras:
            raise ValueError("alpha=0: no file says the alpha, expected the one that it was trained with, often 1")
        if alpha != UNSAID and files.alpha not in (None, alpha):
            raise ValueError(f"alpha={alpha:g}: the files say {files.alpha:g}, expected that or 0")
        query = Query(positions, query_stride)
        if query != (stored := stored_query(files.metadata) or query):
            raise ValueError(
                f"positions={positions!r}, query_stride={query_stride}: the files say {stored.positions!r} and "
                f"{stored.stride}, expected these"
            )
        patcher = load(files, alpha or files.alpha or UNSAID, query)
        return io.NodeOutput((*adapters, with_prompt(files, patcher, paths[0].name, weight, clip, prompt)))


def require_files(given: dict[str, str]) -> list[Path]:
    """The chosen files. ValueError if none is chosen."""
    if paths := [path for option, name in given.items() if (path := chosen(option, name))]:
        return paths
    raise ValueError(f"{', '.join(given)} are all {NO_FILE!r}: expected a file in at least one of them")


NODES: list[type[io.ComfyNode]] = [LoadI2vAdapter, LoadI2vAdapterFiles]
