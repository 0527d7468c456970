"""Training steps of several programs, each in a process of its own, timed in turns: what the benchmarks of speed share.

On a CPU the processes alternate, so that a change of the machine's load meets all of them alike, and count CPU seconds on
one thread. On a GPU they run one after the other. Memory is the peak over what is resident between two steps.
"""

import ctypes
import gc
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent / "scripts")]

from comfy_library import register_pack, start_comfyui  # noqa: E402

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WARM_UP = 1  # steps before the first timed one
# What a trainer runs after every step; raises Done when no more steps are wanted.
Tick = Callable[[], None]
Trainer = Callable[[Tick], None]


class Done(Exception):
    pass


# -- ours ------------------------------------------------------------------------------------------------------------


def enter_comfyui(folder: Path, *, pytorch_attention: bool = False) -> None:
    """Make ComfyUI importable, and this pack as `kinoloom`."""
    start_comfyui(folder)
    import comfy.cli_args

    comfy.cli_args.args.use_pytorch_cross_attention = pytorch_attention
    import comfy.utils

    comfy.utils.PROGRESS_BAR_ENABLED = False
    register_pack()


def make_recipe(name: str, model: Any, parts: dict[str, Any], **options: Any) -> Any:
    """A training node's recipe on a private copy of `model`, as a job makes it."""
    from kinoloom.trainers import recipes
    from kinoloom.trainers.core import memory
    from kinoloom.trainers.core.placement import Placement
    from kinoloom.trainers.host.attention import TRANSFORMER_OPTIONS
    from kinoloom.trainers.host.device import compute_dtype, torch_device
    from kinoloom.trainers.host.private import Private, load_private

    method = recipes()[name]
    config = method.Config(steps=1_000_000, validate_every=0, save_every=100_000, **options)
    device = torch_device()
    dtype = compute_dtype(config.precision, device)
    private = load_private(model, device, Placement(stored=dtype))
    backbone = method.backbone_class({"model": Private(private, parts)}, device, dtype, TRANSFORMER_OPTIONS)
    memory.checkpointed_blocks(backbone)
    backbone.placement = Placement(len(backbone.blocks) if config.checkpointing == "on" else 0, dtype)
    return method(backbone, config)


def phases(recipe: Any) -> list[Any]:
    from kinoloom.trainers.core.data import TrainingData

    return recipe.phases(recipe.config, TrainingData("", ()))


def batches(
    recipe: Any, folder: Path, latents: Tensor, unit: str = "clips", **columns: dict[str, Tensor]
) -> Any:
    """One clip [C, F, h, w] and its other columns on disk, as micro-batches for `recipe`."""
    from kinoloom.trainers.core import data

    columns = {"latents": {"latents": latents}, **columns}
    for column, tensors in columns.items():
        data.write_column(folder, "clip", column, tensors)
    row = data.Row("clip", unit, "train", tuple(latents.shape), dict.fromkeys(columns, "clip"))
    rows, c = data.TrainingData(str(folder), (row,)), recipe.config
    return data.PhaseData(rows, unit, recipe.columns, c.batch_size, c.seed, recipe.backbone.prepare)


def prompt(prompt_embeds: Tensor) -> dict[str, Tensor]:
    """The column `prompt_embeds` of one prompt [n, D]."""
    return {"prompt_embeds": prompt_embeds[None], "prompt_length": torch.tensor(len(prompt_embeds))}


def train(recipe: Any, rows: Any, tick: Tick) -> None:
    """The pack's own loop."""
    from kinoloom.trainers.core import events, loop
    from kinoloom.trainers.core.state import State

    def emit(event: events.Event) -> None:
        if isinstance(event, events.Step):
            tick()

    def nothing(*args: Any) -> None:
        pass

    scaler = torch.amp.GradScaler(recipe.backbone.device.type, enabled=False)
    session = loop.Session(emit, lambda: False, nothing, nothing)
    loop.train(recipe, phases(recipe), lambda phase: rows, recipe.config, State(), session, scaler)


# -- do they compute the same? ---------------------------------------------------------------------------------------


def apart(function: Callable, *args: Any, **options: Any) -> Any:
    """What `function` returns in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args, **options).result()


# -- one trainer's process -------------------------------------------------------------------------------------------


def _clock() -> float:
    return time.perf_counter() if CUDA else time.process_time()


class Meter:
    """Times steps, and peak memory over what is resident after the first one; between rounds it waits for its turn."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.left, self.times, self.resident, self.began = WARM_UP, [], 0, 0.0

    def tick(self) -> None:
        if CUDA:
            torch.cuda.synchronize()
        self.times.append(_clock() - self.began)
        self.left -= 1
        if not self.left:
            self.connection.send({"times": self.times, "resident": self.resident, "peak": _peak()})
            _trim()
            if not (wanted := self.connection.recv()):
                raise Done
            self.left, self.times = wanted, []
            self.resident = _reset_peak()
        self.began = _clock()


def _trim() -> None:
    """Give what is not in use to the processes whose turn it is."""
    gc.collect()
    if not CUDA:
        ctypes.CDLL(None).malloc_trim(0)


def _reset_peak() -> int:
    """Forget the peak so far; bytes in use now."""
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return _proc_status("VmRSS")


def _peak() -> int:
    return torch.cuda.max_memory_allocated() if CUDA else _proc_status("VmHWM")


def _proc_status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def _worker(connection: Connection, trainer: Trainer, log: Path) -> None:
    sys.stderr = log.open("w")
    if not CUDA:
        torch.set_num_threads(1)
    try:
        trainer(Meter(connection).tick)
    except Done:
        pass
    except torch.OutOfMemoryError:
        connection.send({"failed": "out of memory"})


# -- the rounds ------------------------------------------------------------------------------------------------------


class Runner:
    """A trainer, which must be picklable, in its process."""

    def __init__(self, variant: str, trainer: Trainer, folder: Path) -> None:
        self.variant, self.trainer, self.log = variant, trainer, folder / f"{variant}.log"
        self.times: list[float] = []
        self.resident = self.peak = 0
        self.failed = ""
        self.start()

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=_worker, args=(other, self.trainer, self.log), daemon=True)
        self.process.start()
        other.close()

    def warm_up(self) -> None:
        self._receive()
        self.times.clear()

    def run(self, steps: int) -> None:
        if not self.failed:
            self._receive(steps)

    def _receive(self, wanted: int = 0) -> None:
        """What the process reports of the steps under way, or of `wanted` more."""
        try:
            if wanted:
                self.connection.send(wanted)
            report = self.connection.recv()
        except (EOFError, BrokenPipeError):
            self.process.join()
            report = {"failed": f"crashed, exit code {self.process.exitcode}"}
            print(self.log.read_text()[-3000:], file=sys.stderr)
        self.failed = report.get("failed", "")
        if not self.failed:
            self.times += report["times"]
            self.peak, self.resident = report["peak"], report["resident"]

    def close(self) -> None:
        if not self.failed and self.process.is_alive():
            self.connection.send(0)
        self.process.join()

    def measure_memory(self) -> None:
        """One step in a process whose allocator returns what is freed: slow, but resident memory is what is in use."""
        if self.failed:
            return
        times = self.times.copy()
        os.environ["MALLOC_MMAP_THRESHOLD_"] = str(1 << 16)
        try:
            self.start()
        finally:
            del os.environ["MALLOC_MMAP_THRESHOLD_"]
        self.warm_up()
        self.run(1)
        self.close()
        self.times = times

    def result(self) -> dict[str, Any]:
        if self.failed:
            return {"variant": self.variant, "failed": self.failed}
        return {
            "variant": self.variant,
            "seconds": statistics.median(self.times),
            "times": self.times,
            "resident_bytes": self.resident,
            "peak_bytes": self.peak,
        }


def measure(trainers: dict[str, Trainer], folder: Path, rounds: int, steps: int) -> list[dict[str, Any]]:
    """`rounds` times `steps` steps of every trainer, side by side on a CPU and one trainer after the other on a GPU."""
    results, take_turns = [], not CUDA
    for group in [list(trainers)] if take_turns else [[variant] for variant in trainers]:
        runners = [Runner(variant, trainers[variant], folder) for variant in group]
        for runner in runners:
            runner.warm_up()
        for _ in range(rounds):
            for runner in runners:
                runner.run(steps)
        for runner in runners:
            runner.close()
            if take_turns:
                runner.measure_memory()
        results += [runner.result() for runner in runners]
    return results


def growth(row: dict[str, Any]) -> float:
    """Bytes at the peak over what is resident."""
    return row["peak_bytes"] - row["resident_bytes"]


def table(results: list[dict[str, Any]], pairs: dict[str, str]) -> str:
    """`pairs`: a rival's row to the row of ours that it is compared with."""
    by_name = {row["variant"]: row for row in results if "failed" not in row}
    lines = [
        f"| variant | {'' if CUDA else 'CPU '}s/step | ours / this (least-most) | resident MiB | peak MiB over it | ours / this |",
        "|---|---|---|---|---|---|",
    ]
    for row in results:
        name = row["variant"]
        if "failed" in row:
            lines.append(f"| {name} | {row['failed']} | | | | |")
            continue
        cells = [
            name,
            f"{row['seconds']:.3f}",
            "",
            f"{row['resident_bytes'] / 2**20:.0f}",
            f"{growth(row) / 2**20:.0f}",
            "",
        ]
        if mine := by_name.get(pairs.get(name, "")):
            ratios = [a / b for a, b in zip(mine["times"], row["times"], strict=True)]
            cells[2] = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
            cells[5] = f"{growth(mine) / growth(row):.2f}"
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
