"""A method with a condition of its own is one file: it trains, samples and resumes with no change elsewhere."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from kinoloom.lora_io.file import load
from kinoloom.nodes.training.train import train_node
from kinoloom.trainers import recipes
from kinoloom.trainers.backbones.flow.wan import Wan, WanConfig
from kinoloom.trainers.conditions.columns import LATENTS, PREVIEW_PROMPT, PROMPT
from kinoloom.trainers.core.config import LoraConfig, knob
from kinoloom.trainers.core.data import Batch, Column, TrainingData, write_column
from kinoloom.trainers.core.losses import denoising_loss
from kinoloom.trainers.core.plain_lora import PlainLora
from kinoloom.trainers.core.recipe import ModelInput
from kinoloom.trainers.core.rng import Rng
from kinoloom.trainers.core.start_from import Start
from kinoloom.trainers.core.transfer import to_device
from kinoloom.trainers.host.private import Private
from kinoloom.trainers.host.source import ModelSource, base_key
from kinoloom.trainers.run.job import Job
from kinoloom.trainers.run.record import read_record
from torch import Tensor

from ..rows import random
from ..runs import RUNS, Published, assert_same, events, finish, load_model, make_config, make_job, write_samples

DEPTH = Column("depth", made_by="Add Depth")


class Deep(PlainLora):
    """Latents are trained with a map of depth added to them, which only this method knows."""

    name, title, description = "KinoloomTrainDeep", "Train Deep", "Learns from clips and their depth."
    backbone_class = Wan
    columns, previews = (LATENTS, PROMPT, DEPTH), (PREVIEW_PROMPT, DEPTH)
    template = "wan_lora_generate"

    @dataclass(frozen=True, kw_only=True)
    class Config(WanConfig, LoraConfig):
        steps: int = knob(4, "Optimizer steps.", min=1, max=100)
        target_layers: str = knob("attention", "Layers.", choices=tuple(Wan.lora_targets))

        def starts(self) -> dict[str, Start]:
            return {}

    def losses(self, batch: Batch, rng: Rng) -> Iterator[tuple[str, Tensor]]:
        given = {**batch, "prompt_embeds": batch["prompt_embeds"][:, 0], "latents": batch["latents"] + self._depth(batch)}
        yield "deep", denoising_loss(self.backbone, given, rng, rng.uniform(len(batch["latents"])))

    def predict(self, noisy_latents: Tensor, t: Tensor, batch: Batch) -> Tensor:
        return super().predict(noisy_latents + self._depth(batch), t, batch)

    def _depth(self, batch: Batch) -> Tensor:
        return to_device(batch["depth"], self.backbone.device)

    def unconditional(self, batch: Batch) -> Batch:
        return {**super().unconditional(batch), "depth": torch.zeros_like(batch["depth"])}


@pytest.fixture
def deep(data: TrainingData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrainingData:
    """The method among the others, and the data with its column."""
    monkeypatch.setitem(recipes(), Deep.name, Deep)
    monkeypatch.setitem(RUNS, Deep.name, {"steps": 4})
    for row in data.rows:
        write_column(data.folder, row.name, "depth", {"depth": random(*row.shape, name=f"{row.name} depth")})
    return replace(data, rows=tuple(replace(row, columns={**row.columns, "depth": row.name}) for row in data.rows))


class TwoWans(Wan):
    """A second MODEL beside the one that is trained."""

    def __init__(self, models: dict[str, Private], *rest: Any) -> None:
        super().__init__(models, *rest)
        self.teacher = models["teacher"].model.diffusion_model


class Taught(Deep):
    name, title = "KinoloomTrainTaught", "Train Taught"
    backbone_class = TwoWans
    models = (ModelInput(), ModelInput("teacher", "A second model."))

    def losses(self, batch: Batch, rng: Rng) -> Iterator[tuple[str, Tensor]]:
        assert self.backbone.teacher is not self.backbone.module
        yield from super().losses(batch, rng)


def with_depth(folder: Path) -> Any:
    """Previews that have depth beside their prompts."""
    previews = write_samples(folder, "wan")
    for row in previews.rows:
        write_column(folder, row.name, "depth", {"depth": random(*row.shape, name=f"{row.name} depth")})
    return replace(
        previews, rows=tuple(replace(row, columns={**row.columns, "depth": row.name}) for row in previews.rows)
    )


def test_it_trains_samples_and_resumes(deep: TrainingData, model: Any, tmp_path: Path) -> None:
    config, previews = make_config(Deep.name), with_depth(tmp_path)
    whole = finish(make_job(tmp_path / "whole", model, deep, config, Deep.name, samples=previews), model)
    assert [e["done"] for e in events(whole, "sample")] == [0, 2, 4] and whole.files["lora"]
    stopped = Published().at(2, Job.stop)
    finish(make_job(tmp_path / "two", model, deep, config, Deep.name, stopped, previews), model, "stopped")
    resumed = finish(make_job(tmp_path / "two", model, deep, config, Deep.name), model)
    assert_same(load(Path(resumed.files["lora"]))[0], load(Path(whole.files["lora"]))[0])


def test_depth_counts(deep: TrainingData, model: Any, tmp_path: Path) -> None:
    config = make_config(Deep.name)
    first = finish(make_job(tmp_path / "a", model, deep, config, Deep.name), model)
    for row in deep.rows:
        write_column(deep.folder, row.name, "depth", {"depth": torch.zeros(row.shape)})
    second = finish(make_job(tmp_path / "b", model, deep, config, Deep.name), model)
    assert first.losses() != second.losses()


def test_a_row_without_it_is_named_with_the_node_that_makes_it(deep: TrainingData, model: Any, tmp_path: Path) -> None:
    first, *others = deep.select("clips", "train")
    bare = replace(first, columns={"latents": first.name, "prompt_embeds": first.name})
    lacking = replace(deep, rows=(bare, *others))
    job = finish(make_job(tmp_path, model, lacking, make_config(Deep.name), Deep.name), model, "failed")
    assert f"{first.name!r} was not encoded for this trainer (column 'depth' is missing): use Add Depth" in job.error


def test_a_method_may_take_two_models(
    deep: TrainingData, model: Any, tiny_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(recipes(), Taught.name, Taught)
    monkeypatch.setitem(RUNS, Taught.name, {"steps": 2})
    node = train_node(Taught)
    assert [i.id for i in node.define_schema().inputs][:4] == ["model", "teacher", "data", "run_name"]
    other = load_model(tiny_models / "diffusion_models" / "tiny_wan.safetensors", dtype=torch.float8_e4m3fn)
    one = make_job(tmp_path, model, deep, make_config(Taught.name), Taught.name)
    sources = {"model": ModelSource.of(model), "teacher": ModelSource.of(other)}
    keys = {base_key(sources), base_key({**sources, "teacher": sources["model"]}), one.spec.run_key.base_model}
    assert len(keys) == 3, "each MODEL counts"
    one.spec = replace(one.spec, sources=sources)
    one.start({"model": model, "teacher": other})
    assert one.ended.wait(600) and one.status == "finished", one.error
    assert read_record(one.folder).spec.sources == sources
