"""Previews during training: the sampler against ComfyUI's, cheap decoders, and a run's sample files and failures."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy.latent_formats
import comfy.sample
import comfy.samplers
import comfy.sd
import folder_paths
import latent_preview
import pytest
import torch
from comfy.taesd.taehv import TAEHV
from comfy.taesd.taesd import TAESD
from comfy_extras.nodes_model_advanced import ModelSamplingSD3
from comfy_extras.nodes_video_model import VideoLinearCFGGuidance
from kinoloom.nodes.training import registry as jobs
from kinoloom.nodes.training import train
from kinoloom.nodes.training.train import check_text_width
from kinoloom.trainers import recipes
from kinoloom.trainers.conditions.columns import PREVIEW_FRAME, PREVIEW_PROMPT
from kinoloom.trainers.core.rng import Rng
from kinoloom.trainers.core.sampling import sample
from kinoloom.trainers.core.schedules import Ddpm, Edm, FlowMatch
from kinoloom.trainers.host.preview import decode_preview, levels
from kinoloom.trainers.host.source import carried_modules
from kinoloom.trainers.run.job import Job
from kinoloom.trainers.run.plain import read
from kinoloom.trainers.run.previews import Previews, Sampling, write_webp
from kinoloom.trainers.run.record import Spec
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from ..runs import (
    NO_DATA,
    SHAPES,
    Published,
    events,
    finish,
    image,
    load_tiny,
    make_backbone,
    make_batch,
    make_config,
    make_job,
    prompt,
    random,
    write_samples,
)

WAN_LORA, SNS, DIRECTOR = "KinoloomTrainWanLora", "KinoloomTrainSetAndSequence", "KinoloomTrainMotionDirector"
BACKBONES = {
    "wan": comfy.latent_formats.Wan21,
    "animatediff": comfy.latent_formats.SD15,
    "svd": comfy.latent_formats.SD15,
}


# -- the sampler -----------------------------------------------------------------------------------------------------------


def core_conditions(samples: Previews, index: int, recipe: Any) -> list[list[list]]:
    """Ours, as ComfyUI's nodes give them."""
    positive, negative = samples.conditions(index, recipe.previews)
    batches = positive, recipe.unconditional(negative)
    if "first_frame" in positive:
        return [
            [
                [
                    given["image_embeds"].unsqueeze(1),
                    {
                        "concat_latent_image": given["first_frame"],
                        "fps": float(given["fps"]),
                        "motion_bucket_id": float(given["motion_bucket"]),
                        "augmentation_level": float(given["augmentation"]),
                    },
                ]
            ]
            for given in batches
        ]
    padded = (
        nn.functional.pad(b["prompt_embeds"], (0, 0, 0, int(b["prompt_length"]) - b["prompt_embeds"].shape[1]))
        for b in batches
    )
    return [[[embeds, {}]] for embeds in padded]


SCHEDULES = {"wan": FlowMatch(), "animatediff": Ddpm(), "svd": Edm()}
SCHEDULERS = {"wan": "simple", "animatediff": "simple", "svd": "karras"}


def core_levels(model: Any, backbone: str, steps: int) -> Tensor:
    return comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), SCHEDULERS[backbone], steps)


@pytest.mark.slow
@pytest.mark.parametrize(("steps", "shift"), [(4, 5.0), (6, 3.0), (7, 8.0), (13, 1.0)])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_sample_is_what_core_s_sampler_makes(
    backbone: str, steps: int, shift: float, tiny_models: Path, tmp_path: Path
) -> None:
    """The same model, noise and conditions through comfy.sample's Euler and scheduler, with guidance."""
    model, samples = load_tiny(tiny_models, backbone), write_samples(tmp_path, backbone, steps=steps, shift=shift)
    ours = make_backbone(model)
    columns = (PREVIEW_FRAME,) if backbone == "svd" else (PREVIEW_PROMPT,)
    recipe = SimpleNamespace(predict=ours.predict, unconditional=ours.unconditional, previews=columns)
    sampling = Sampling(samples, recipe, ours, None, tmp_path, lambda event: None, lambda: False)
    made = sampling._sample(1)
    noise = torch.randn(1, *samples.rows[1].shape, generator=torch.Generator().manual_seed(samples.seed + 1))

    if backbone == "wan":
        (model,) = ModelSamplingSD3().patch(model, shift)
    levels = core_levels(model, backbone, steps)
    if backbone == "svd":
        (model,) = VideoLinearCFGGuidance().patch(model, 1.0)
    folded = noise if backbone == "wan" else noise[0].movedim(1, 0)
    with torch.inference_mode():
        sampler, conditions = comfy.samplers.sampler_object("euler"), core_conditions(samples, 1, recipe)
        theirs = comfy.sample.sample_custom(
            model, folded, samples.cfg, sampler, levels, *conditions, torch.zeros_like(folded), disable_pbar=True
        ).clone()
    theirs = BACKBONES[backbone]().process_in(theirs if backbone == "wan" else theirs.movedim(1, 0)[None])
    size = theirs.abs().max()
    assert theirs.isfinite().all() and (theirs - noise).abs().max() > 0.1
    torch.testing.assert_close(made / size, theirs / size, rtol=0, atol=1e-4)


@pytest.mark.parametrize("steps", [1, 6, 7, 9, 13, 20, 30, 37])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_levels_are_those_of_core_s_scheduler(backbone: str, steps: int, tiny_models: Path) -> None:
    model = load_tiny(tiny_models, backbone)
    for shift in (1.0, 2.7, 8.0) if backbone == "wan" else (1.0,):
        if backbone == "wan":
            (model,) = ModelSamplingSD3().patch(model, shift)
        theirs = core_levels(model, backbone, steps)
        torch.testing.assert_close(levels(SCHEDULES[backbone], steps, shift), theirs, rtol=2e-6, atol=0)


def test_the_negative_row_replaces_its_own_columns_and_leaves_the_others(tmp_path: Path) -> None:
    svd, samples = write_samples(tmp_path, "svd"), write_samples(tmp_path, "wan")
    rows = tuple(replace(row, columns=row.columns | own.columns) for row, own in zip(samples.rows, svd.rows, strict=True))
    given = replace(samples, rows=rows)
    for negative, name in ((samples.negative, "away"), (None, "second")):
        wanted, unwanted = replace(given, negative=negative).conditions(1, (PREVIEW_PROMPT, PREVIEW_FRAME))
        assert wanted.keys() == unwanted.keys()
        for batch, text in ((wanted, "second"), (unwanted, name)):
            assert torch.equal(batch["prompt_embeds"], prompt(text, variants=0)["prompt_embeds"])
            assert torch.equal(batch["first_frame"], image("second", height=8, width=8)["first_frames"][:1])


def test_without_guidance_nothing_is_predicted_for_the_negative(tmp_path: Path) -> None:
    seen: list[Any] = []

    def predict(x: Tensor, t: Tensor, batch: Any) -> Tensor:
        seen.append(batch)
        return torch.zeros_like(x)

    schedule = FlowMatch()
    noise, sigmas = torch.ones(1, 1, 1, 2, 2), levels(schedule, 3, 1.0)
    assert torch.equal(sample(predict, schedule, noise, sigmas, ("yes", "no"), torch.ones(1)), noise)
    assert seen == ["yes"] * 3
    assert sample(predict, schedule, noise, sigmas, ("yes", "no"), torch.ones(1), lambda: len(seen) == 5) is None
    assert len(seen) == 5, "a stop is noticed between two steps"


# -- decoding --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", BACKBONES)
def test_factors_decode_as_core_s_preview_does(backbone: str) -> None:
    form, latents = BACKBONES[backbone](), random(*SHAPES[backbone]["clips"], name="decode")
    frames = decode_preview(form, latents)
    count, height, width = latents.shape[1:]
    assert frames.shape == (count, 8 * height, 8 * width, 3) and 0 <= frames.min() < frames.max() <= 1
    previewer = latent_preview.Latent2RGBPreviewer(form.latent_rgb_factors, form.latent_rgb_factors_bias)
    small = nn.functional.interpolate(frames.movedim(-1, 1), scale_factor=1 / 8, mode="area").movedim(1, -1)
    for number in range(count):
        theirs = previewer.decode_latent_to_preview(latents[None, :, number : number + 1])
        theirs = torch.frombuffer(bytearray(theirs.tobytes()), dtype=torch.uint8).view(height, width, 3) / 255
        assert torch.corrcoef(torch.stack([small[number].flatten(), theirs.flatten()]))[0, 1] > 0.9


@pytest.fixture
def tiny_decoders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """models/vae_approx of the test's own."""
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "vae_approx", ([str(tmp_path)], {".safetensors"}))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return tmp_path


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {
        name: random(*tensor.shape, name=name) * (0.5 / max(tensor[0].numel(), 1) ** 0.5) if tensor.ndim else tensor
        for name, tensor in module.state_dict().items()
    }


def test_a_tiny_decoder_decodes_as_core_s_loader_of_it_does(tiny_decoders: Path) -> None:
    for form, tiny, name in (
        (comfy.latent_formats.SD15(), TAESD(), "taesd_decoder.safetensors"),
        (comfy.latent_formats.Wan21(), TAEHV(16), "lighttaew2_1.safetensors"),
    ):
        made = weights(tiny)
        if name.startswith("taesd"):
            own = {key.removeprefix("taesd_decoder."): v for key, v in made.items() if key.startswith("taesd_decoder")}
            made |= {"vae_scale": torch.tensor(0.18215), "vae_shift": torch.tensor(0.0)}
        save_file(made if name.startswith("light") else own, tiny_decoders / name)
        latents = random(form.latent_channels, 3, 4, 4, name="decode")
        frames = decode_preview(form, latents)
        with torch.inference_mode():
            raw = form.process_out(latents[None])
            theirs = comfy.sd.VAE(sd=made).decode(raw if name.startswith("light") else raw[0].movedim(1, 0))
        theirs = theirs.reshape(-1, *theirs.shape[-3:]).clone()
        assert len(frames) == (9 if name.startswith("light") else 3) and frames.std() > 0.01
        torch.testing.assert_close(frames, theirs.clamp(0, 1), rtol=0, atol=2e-3)


def test_a_video_plays_at_its_own_length(tmp_path: Path) -> None:
    frames = torch.stack([torch.full((16, 24, 3), shade) for shade in (0.0, 0.5, 1.0)])
    write_webp(tmp_path / "a.webp", frames, 0.75)
    with Image.open(tmp_path / "a.webp") as opened:
        assert (opened.format, opened.n_frames, opened.size, opened.info["loop"]) == ("WEBP", 3, (24, 16), 0)
        shades = []
        for number in range(3):
            opened.seek(number)
            shades.append(opened.convert("RGB").getpixel((4, 4))[0])
            assert opened.info["duration"] == 250
    assert all(abs(shade - expected) < 8 for shade, expected in zip(shades, (0, 128, 255), strict=True))


# -- a run -----------------------------------------------------------------------------------------------------------------


def files(job: Job) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((job.folder / "samples").glob("*"))}


@pytest.fixture(scope="module")
def sampled(inputs: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A whole run of two phases with samples."""
    folder, (model, data) = tmp_path_factory.mktemp("sampled"), inputs(SNS)
    return finish(make_job(folder, model, data, make_config(SNS), SNS, samples=write_samples(folder, "wan")), model)


def test_a_run_shows_its_samples(sampled: Job) -> None:
    shown = events(sampled, "sample")
    assert [e["done"] for e in shown] == [0, 2, 3, 5, 7]
    assert shown[1]["files"] == ["000002-0.webp", "000002-1.webp"] and shown[1]["prompts"] == ["first", "second"]
    made = files(sampled)
    assert sorted(made) == sorted(name for e in shown for name in e["files"])
    assert len({made[f"{e['done']:06d}-0.webp"] for e in shown}) == 5, "each shows another state of the model"
    with Image.open(sampled.folder / "samples" / "000007-0.webp") as opened:
        assert (opened.size, opened.n_frames) == ((32, 32), 3)
        opened.load()
        assert opened.info["duration"] in range(370, 380), "nine frames at 8 per second, in three pictures"


@pytest.mark.parametrize("name", [SNS, DIRECTOR])
def test_regularisers_are_off_in_a_sample(name: str, inputs: Callable[[str], Any]) -> None:
    model, data = inputs(name)
    backbone = make_backbone(model)
    config = make_config(name, **({"dropout": 0.5} if name == DIRECTOR else {}))
    recipe, batch = recipes()[name](backbone, config), make_batch(backbone, data)
    clean = {**batch, "prompt_embeds": batch["prompt_embeds"][:, 0]}
    for phase in recipe.phases(config, NO_DATA):
        recipe.start(phase)
        for group in recipe.param_groups(phase):
            for number, parameter in enumerate(group["params"]):
                parameter.data = 0.1 * random(*parameter.shape, name=f"{phase.name} {number}")
        t = torch.tensor([600]) if name == DIRECTOR else torch.tensor([0.6])
        with torch.no_grad():
            before = recipe.predict(batch["latents"], t, clean)
            assert all(loss.isfinite() for _, loss in recipe.losses(batch, Rng(0, phase.name, 0)))
            noisy = backbone.predict(batch["latents"], t, clean)
            assert torch.equal(recipe.predict(batch["latents"], t, clean), before)
        assert not torch.equal(noisy, before), "the losses leave their masks behind"


def test_the_average_is_what_is_sampled(inputs: Callable[[str], Any], tmp_path: Path) -> None:
    model, data = inputs(WAN_LORA)
    made = {}
    for decay in (0.0, 0.9999):
        config, folder = make_config(WAN_LORA, ema_decay=decay), tmp_path / str(decay)
        made[decay] = files(
            finish(make_job(folder, model, data, config, WAN_LORA, samples=write_samples(folder, "wan")), model)
        )
    assert made[0.0]["000000-0.webp"] == made[0.9999]["000000-0.webp"]
    assert made[0.0]["000006-0.webp"] != made[0.9999]["000006-0.webp"]


@pytest.mark.parametrize("crash", [False, True])
def test_a_resumed_run_has_the_samples_of_an_uninterrupted_one(
    crash: bool, sampled: Job, inputs: Callable[[str], Any], tmp_path: Path
) -> None:
    """Stopped at a step, or started again from a checkpoint that the history is ahead of."""
    model, data = inputs(SNS)
    samples = write_samples(tmp_path, "wan")
    checkpoint: list[bytes] = []

    def keep(job: Job) -> None:
        checkpoint.append((job.folder / "state.pt").read_bytes())

    published = Published().at(4, keep).at(6, Job.stop)
    job = finish(make_job(tmp_path, model, data, make_config(SNS), SNS, published, samples), model, "stopped")
    if crash:
        (job.folder / "state.pt").write_bytes(checkpoint[0])
    resumed = finish(make_job(tmp_path, model, data, make_config(SNS), SNS), model)
    assert resumed.spec.previews == samples
    assert events(resumed, "sample") == events(sampled, "sample")
    assert files(resumed) == files(sampled)


def test_a_stop_is_noticed_while_sampling(inputs: Callable[[str], Any], tmp_path: Path) -> None:
    model, data = inputs(WAN_LORA)

    class Stopping(Published):
        def __call__(self, job: Job, event: dict) -> None:
            super().__call__(job, event)
            if event["event"] == "plan":
                job.stop()

    samples = write_samples(tmp_path, "wan", steps=1000)
    job = finish(
        make_job(tmp_path, model, data, make_config(WAN_LORA), WAN_LORA, Stopping(), samples), model, "stopped"
    )
    assert job.done == 0 and not events(job, "sample", "samplefailed") and not files(job)


def test_samples_that_fail_are_reported_once_and_the_run_goes_on(
    inputs: Callable[[str], Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, data = inputs(WAN_LORA)
    samples = write_samples(tmp_path, "wan")
    (tmp_path / "second.prompt_embeds.safetensors").rename(tmp_path / "gone")
    job = finish(make_job(tmp_path, model, data, make_config(WAN_LORA), WAN_LORA, samples=samples), model)
    (failed,) = events(job, "samplefailed", "sample")
    assert (failed["event"], failed["done"]) == ("samplefailed", 0) and "second.prompt_embeds" in failed["error"]
    assert len([r for r in caplog.records if "a sample failed" in r.message]) == 1 and job.done == job.total


# -- what a run is made of ---------------------------------------------------------------------------------------------------


def test_a_record_without_samples_is_read(sampled: Job) -> None:
    value = json.loads((sampled.folder / "job.json").read_text())["spec"]
    assert read(Spec, value, "spec") == sampled.spec
    del value["previews"]
    assert read(Spec, value, "spec") == replace(sampled.spec, previews=None)


def test_other_samples_are_the_same_run(
    inputs: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = inputs(WAN_LORA)
    monkeypatch.setattr(jobs, "output_folder", lambda folder: tmp_path / "out")
    monkeypatch.setattr(jobs, "publish", Published().at(2, Job.stop))
    monkeypatch.setattr(jobs.Registry, "busy", lambda self, job: False)
    monkeypatch.setattr(jobs.Registry, "make_room", lambda self: None)
    registry = jobs.Registry(tmp_path / "jobs")
    monkeypatch.setattr(jobs, "_registry", registry)
    (node,) = (node for node in train.NODES if node.__name__ == WAN_LORA)
    samples, options = write_samples(tmp_path, "wan"), vars(make_config(WAN_LORA))

    def run(samples: Previews | None) -> Job:
        job = registry.get(node.execute(model=model, data=data, run_name="run", samples=samples, **options).result[0])
        assert job.ended.wait(600)
        return job

    job = run(None)
    assert job.status == "stopped" and not events(job, "sample")
    assert run(replace(samples, cfg=1.0, rows=samples.rows[:1], sample_every=1)) is job
    assert job.status == "finished" and [e["done"] for e in events(job, "sample")] == [3, 4, 5, 6]
    assert run(samples) is job and json.loads((job.folder / "job.json").read_text())["spec"]["previews"]["cfg"] == 1.0


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (WAN_LORA, {"width": 40}, "samples: width=40: expected a multiple of 16"),
        (WAN_LORA, {"height": 1000}, "samples: height=1000: expected a multiple of 16"),
        (WAN_LORA, {"frames": 16}, "samples: frames=16: expected 4n.1 for this model; the nearest are 13 and 17"),
        (DIRECTOR, {"height": 100}, "samples: height=100: expected a multiple of 8"),
        (DIRECTOR, {"frames": 33}, "samples: frames=33: expected at most 32 for this motion module"),
        ("KinoloomTrainSvdLora", {"width": 96}, "samples: width=96: expected a multiple of 64"),
        (
            "KinoloomTrainSvdLora",
            {"column": "prompt_embeds"},
            "samples: 'first' was not encoded .*column 'sample' is missing.*use Sample First Frames",
        ),
        (WAN_LORA, {"column": "sample"}, "samples: 'first' was not encoded for this trainer .*use Sample Prompts"),
        (WAN_LORA, {"column": "prompt_embeds", "stem": "wide"}, "samples: prompts are 64 wide, expected 768"),
    ],
)
def test_samples_that_do_not_suit_the_model_are_refused(
    name: str, options: dict, message: str, inputs: Callable[[str], Any], tmp_path: Path
) -> None:
    model, data = inputs(name)
    samples = write_samples(tmp_path, recipes()[name].backbone_class.name)
    save_file({"prompt_embeds": torch.zeros(1, 2, 64)}, tmp_path / "wide.prompt_embeds.safetensors")
    recipe = recipes()[name]
    grid = recipe.backbone_class.grid(model.model, carried_modules(model))
    unknown = replace(samples, rows=tuple(replace(row, shape=()) for row in samples.rows))
    assert unknown.fitted(recipe.previews, grid) == samples
    check_text_width("samples", samples, grid)
    if "column" in options:
        columns = {options.pop("column"): options.pop("stem", "first")}
        options["rows"] = tuple(replace(row, columns=columns) for row in samples.rows)
    with pytest.raises(ValueError, match=message):
        check_text_width("samples", replace(samples, **options).fitted(recipe.previews, grid), grid)
