"""Adapters from a run's file or the original's files, at work in ComfyUI's own samplers."""

from pathlib import Path
from typing import Any

import comfy.sample
import comfy.samplers
import folder_paths
import pytest
import torch
from kinoloom.lora_io.file import load, save
from kinoloom.nodes.adapters.apply import ApplyI2vAdapters
from kinoloom.nodes.adapters.loading import LoadI2vAdapter, LoadI2vAdapterFiles
from kinoloom.nodes.adapters.matching import AdainSampler
from kinoloom.nodes.animatediff import modules as motion
from kinoloom.nodes.animatediff.loras import with_motion_lora
from kinoloom.nodes.folders import I2V_ADAPTERS
from kinoloom.trainers.ca_lora import CaLora
from kinoloom.trainers.core.backbone import Grid
from torch import Tensor

from .. import first_frames
from ..encoders import image_vae
from ..rows import TEXT_WIDTH, random
from ..runs import finish, load_animatediff, make_backbone, make_config, make_job

FRAMES, SIZE = 3, (8, 16)
LATENT = (4, *SIZE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("i2v_adapters")
    folder_paths.add_model_folder_path(I2V_ADAPTERS, str(path), is_default=True)
    return path


@pytest.fixture(scope="module")
def applied(tiny_models: Path) -> Any:
    return load_animatediff(tiny_models, beta_schedule=motion.KEEP)


@pytest.fixture(scope="module")
def trained(folder: Path, inputs: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A job of Train CA-LoRA whose steps were large, and its adapter's name in the folder."""
    model, data = inputs(CaLora.name)
    config = make_config(CaLora.name, alpha=4.0, cross_query=True, save_precision="fp32", learning_rate=0.02)
    job = finish(make_job(tmp_path_factory.mktemp("run"), model, data, config, CaLora.name), model)
    tensors, metadata = load(Path(job.files["adapter"]))
    save(folder / "trained.safetensors", tensors, metadata)
    return job


def start() -> dict[str, Tensor]:
    mask = torch.ones(FRAMES, *SIZE)
    mask[0] = 0
    samples = torch.zeros(FRAMES, *LATENT)
    samples[0] = random(*LATENT, name="picture")
    return {"samples": samples, "noise_mask": mask}


def apply(model: Any, adapters: Any, **options: Any) -> Any:
    with torch.inference_mode():
        return ApplyI2vAdapters.execute(model, adapters, **{"mode": "residual", "group_norms": "as trained", **options}).args[0]


def load_adapter(file: str, **options: Any) -> Any:
    return LoadI2vAdapter.execute(file, **{"weight": 1.0, "prompt": "", **options}).args[0]


def sample(model: Any, latent: dict[str, Tensor] | None = None, cfg: float = 1.0, steps: int = 2) -> Tensor:
    """By ComfyUI's own KSampler."""
    latent = latent or start()
    positive, negative = ([[random(1, 7, TEXT_WIDTH, name=name), {}]] for name in ("positive", "negative"))
    noise = random(*latent["samples"].shape, name="noise")
    with torch.inference_mode():
        return comfy.sample.sample(
            model, noise, steps, cfg, "euler", "normal", positive, negative, latent["samples"], seed=1,
            noise_mask=latent.get("noise_mask"), disable_pbar=True,
        )  # fmt: skip


def test_a_sampler_predicts_what_training_does(trained: Any, applied: Any) -> None:
    """At the first step of a sampler, for the model's input that it has there."""
    model, seen = apply(applied, load_adapter("trained.safetensors")), {}

    def watch(denoise: Any, given: dict) -> Tensor:
        seen.update(given, out=denoise(given["input"], given["timestep"], **given["c"]))
        return seen["out"]

    model.set_model_unet_function_wrapper(watch)
    sample(model, steps=1)
    sampling, sigma = model.get_model_object("model_sampling"), seen["timestep"]
    noisy = sampling.calculate_input(sigma, seen["input"])
    backbone = make_backbone(applied, method=CaLora.name)
    recipe = CaLora(backbone, trained.config)
    recipe.load_state_dict(load(Path(trained.files["adapter"]))[0])
    t = sampling.timestep(sigma[:1]).long()
    batch = {"prompt_embeds": random(1, 7, TEXT_WIDTH, name="positive"), "start": random(*LATENT, name="picture")[None]}
    with torch.no_grad():
        noise = recipe.predict(noisy.movedim(0, 1)[None], t, batch)[0].movedim(1, 0)
    ours = (seen["input"] - seen["out"]) / sigma.view(-1, 1, 1, 1)
    torch.testing.assert_close(ours[1:], noise[1:], rtol=1e-3, atol=1e-3)
    bare = sample(apply(applied, load_adapter("trained.safetensors", weight=0.0)), steps=1)
    assert (bare - sample(model, steps=1)).abs().max() > 0.01


@pytest.mark.parametrize("cfg", [1.0, 7.5])
@pytest.mark.parametrize("mode", ["residual", "weights"])
def test_the_first_frame_stays_and_adapters_act(trained: Any, applied: Any, cfg: float, mode: str) -> None:
    latent, one = start(), load_adapter("trained.safetensors", weight=0.5)
    both = apply(applied, load_adapter("trained.safetensors", weight=0.5, adapters=one), mode=mode)
    made, none = sample(both, latent, cfg), sample(apply(applied, load_adapter("trained.safetensors", weight=0.0)), latent, cfg)
    assert torch.equal(made[0], latent["samples"][0]) and made.isfinite().all()
    assert (made[1:] - none[1:]).abs().max() > 1e-3


def test_one_adapter_in_both_modes_and_two_halves_sample_the_same(trained: Any, applied: Any) -> None:
    one, half = (load_adapter("trained.safetensors", weight=weight) for weight in (1.0, 0.5))
    expected = sample(apply(applied, one))
    torch.testing.assert_close(sample(apply(applied, one, mode="weights")), expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(sample(apply(applied, (*half, *half))), expected, rtol=1e-3, atol=1e-3)


def test_windows_without_the_first_frame_see_it(trained: Any, tiny_models: Path) -> None:
    """A change of the picture reaches frames of every window."""
    windowed = load_animatediff(tiny_models, context_length=4, context_overlap=1, beta_schedule=motion.KEEP)
    model, made = apply(windowed, load_adapter("trained.safetensors")), []
    for name in ("picture", "another"):
        latent = {"samples": torch.zeros(10, *LATENT), "noise_mask": torch.ones(10, *SIZE)}
        latent["samples"][0], latent["noise_mask"][0] = random(*LATENT, name=name), 0
        made.append(sample(model, latent))
        assert torch.equal(made[-1][0], latent["samples"][0])
    assert ((made[0] - made[1]).flatten(1).abs().amax(1) > 1e-4).all()


def test_the_schedule_is_the_models_own(trained: Any, applied: Any, tiny_models: Path) -> None:
    linear = load_animatediff(tiny_models)
    node = ApplyI2vAdapters.execute(linear, load_adapter("trained.safetensors"), "residual", "as trained")
    assert "own noise schedule" in node.ui["text"][0]
    torch.testing.assert_close(sample(node.args[0]), sample(apply(applied, load_adapter("trained.safetensors"))))


def test_what_does_not_fit_is_said(trained: Any, applied: Any, folder: Path, tiny_models: Path) -> None:
    one = load_adapter("trained.safetensors")
    node = ApplyI2vAdapters.execute(applied, (*one, *one), "residual", "as trained")
    assert "sum to 2, not 1" in node.ui["text"][0]
    with pytest.raises(ValueError, match=r"model: has no motion module. Put Apply Motion Module before"):
        ApplyI2vAdapters.execute(bare(tiny_models), one)
    plain = {"samples": torch.zeros(FRAMES, *LATENT)}
    with pytest.raises(ValueError, match="first frame is not kept by a noise mask, expected the latent of I2V Start"):
        sample(apply(applied, one), plain)
    with pytest.raises(ValueError, match="prompt='waterfall': expected clip connected"):
        load_adapter("trained.safetensors", prompt="waterfall ")
    with pytest.raises(ValueError, match="file='none': expected an adapter of the list"):
        load_adapter("none")


@pytest.mark.parametrize("options", [{}, {"first_frame_cond": "cinemo", "use_dct_init": True, "dct_cutoff_ratio": 0.4}])
def test_a_video_is_what_the_originals_loop_makes(
    trained: Any, applied: Any, tmp_path: Path, options: dict[str, Any]
) -> None:
    """DDIM on all frames but the first, which the model sees clean, and AdaIN after every step."""
    with torch.inference_mode():
        vae, model = image_vae(tmp_path), apply(applied, load_adapter("trained.safetensors"))
        sigmas = first_frames.levels(model, 4)
        latent, noise = first_frames.start(vae, sigmas=sigmas, **options)
        matching = AdainSampler.execute(comfy.samplers.sampler_object("euler"), 0.5).result[0]
        made = first_frames.sample(model, noise, matching, sigmas, latent)
    recipe = CaLora(make_backbone(applied, method=CaLora.name), trained.config)
    recipe.load_state_dict(load(Path(trained.files["adapter"]))[0])
    clean = latent["samples"][:1].clone() * 0.18215
    batch = {"prompt_embeds": first_frames.POSITIVE[0][0], "start": latent["samples"][:1].clone()}

    def predict(x: Tensor, t: Tensor) -> Tensor:
        return recipe.predict(torch.cat([clean, x]).movedim(0, 1)[None], t, batch)[0].movedim(1, 0)[1:]

    with torch.no_grad():
        matched = first_frames.lamps_matching(clean, 1.5)
        x = first_frames.by_hand(latent, **options).clone()
        expected = first_frames.plain_ddim(predict, x, [751, 501, 251, 1], matched)
    assert torch.equal(made[0], latent["samples"][0])
    torch.testing.assert_close(made[1:].double() * 0.18215, expected, rtol=0, atol=2e-3)


def bare(tiny_models: Path) -> Any:
    from toyworld.pack import unet

    return unet.load(tiny_models / "diffusion_models" / "tiny_sd.safetensors")


def test_split_files_are_the_same_adapter(trained: Any, applied: Any, folder: Path) -> None:
    tensors, _ = load(folder / "trained.safetensors")
    files = {
        "i2v-weights.pt": {k: v for k, v in tensors.items() if "i2v" in k},
        "lora-weights.pt": {k: v for k, v in tensors.items() if "lora" in k and "attn2" not in k},
        "ca-lora-weights.pt": {k: v for k, v in tensors.items() if "lora" in k and "attn2" in k},
    }
    for name, part in files.items():
        torch.save({"state_dict": part, "global_step": 3}, folder / name)
    options = {"weight": 1.0, "prompt": "", "positions": "none", "query_stride": 1}
    expected = sample(apply(applied, load_adapter("trained.safetensors")))
    split = LoadI2vAdapterFiles.execute(*files, alpha=4.0, **options).args[0]
    assert torch.equal(sample(apply(applied, split)), expected)
    weak = LoadI2vAdapterFiles.execute(*files, alpha=1.0, **options).args[0]
    assert not torch.equal(sample(apply(applied, weak)), expected)
    with pytest.raises(ValueError, match="alpha=0: no file says the alpha"):
        LoadI2vAdapterFiles.execute(*files, alpha=0.0, **options)


def test_settings_that_a_file_says_are_not_replaced_by_others(trained: Any, folder: Path) -> None:
    one = "trained.safetensors", "none", "none"
    options = {"weight": 1.0, "prompt": "", "alpha": 0.0}
    assert LoadI2vAdapterFiles.execute(*one, positions="none", query_stride=1, **options).args[0]
    for own in ({"positions": "rope_3d", "query_stride": 1}, {"positions": "none", "query_stride": 2}):
        with pytest.raises(ValueError, match=r"^positions='\w+', query_stride=\d: the files say 'none' and 1, expected these$"):
            LoadI2vAdapterFiles.execute(*one, **own, **options)
    tensors, metadata = load(folder / "trained.safetensors")
    save(folder / "later.safetensors", tensors, {**metadata, "kinoloom.positions": "rope_9d"})
    with pytest.raises(ValueError, match="^kinoloom.positions='rope_9d' in the metadata: expected one of none, naive"):
        load_adapter("later.safetensors")


def test_an_i2v_adapter_alone_needs_no_alpha(trained: Any, applied: Any, folder: Path) -> None:
    """It scales LoRAs, of which there are none. A file with LoRAs must say it."""
    tensors, metadata = load(folder / "trained.safetensors")
    metadata.pop("kinoloom.alpha")
    save(folder / "unsaid.safetensors", tensors, metadata)
    with pytest.raises(ValueError, match="does not say its alpha"):
        load_adapter("unsaid.safetensors")
    save(folder / "alone.safetensors", {key: value for key, value in tensors.items() if ".i2v_adapter." in key})
    made = sample(apply(applied, load_adapter("alone.safetensors")))
    options = {"weight": 1.0, "prompt": "", "alpha": 0.0, "positions": "none", "query_stride": 1}
    again = LoadI2vAdapterFiles.execute("alone.safetensors", "none", "none", **options).args[0]
    assert torch.equal(made, sample(apply(applied, again)))
    assert (made - sample(apply(applied, load_adapter("trained.safetensors", weight=0.0)))).abs().max() > 1e-3


def test_the_motion_lora_alone_is_an_ordinary_one(trained: Any, applied: Any) -> None:
    """Load Motion LoRA with the run's other file is the adapter's motion part."""
    tensors, metadata = load(Path(trained.files["motion"]))
    part = with_motion_lora(applied, tensors, 1.0, "lora").get_additional_models_with_key("kinoloom.motion_module")[0]
    assert len(part.patches) == 160
    assert metadata["kinoloom.export"] == "motion"
    assert "kinoloom.alpha" not in metadata, "its scale is in the up factors"


def test_data_may_be_longer_than_the_motion_module_takes() -> None:
    grid = Grid(4, side=8, longest=32)
    assert CaLora.data_grid(make_config(CaLora.name, frames=16), grid).longest is None
    assert CaLora.data_grid(make_config(CaLora.name, frames=0), grid).longest == 32
