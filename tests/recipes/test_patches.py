"""ComfyUI's own nodes before a train node: those that change a model's computation are refused, others pass."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from comfy.patcher_extension import CallbacksMP, WrappersMP
from comfy_extras import (
    nodes_attention_multiply,
    nodes_cfg,
    nodes_context_windows,
    nodes_differential_diffusion,
    nodes_easycache,
    nodes_eps,
    nodes_freelunch,
    nodes_fresca,
    nodes_hypertile,
    nodes_mahiro,
    nodes_model_advanced,
    nodes_model_downscale,
    nodes_nag,
    nodes_pag,
    nodes_rope,
    nodes_sag,
    nodes_slg,
    nodes_tcfg,
    nodes_tomesd,
    nodes_torch_compile,
    nodes_video_model,
)
from kinoloom.nodes.training.train import train_node
from kinoloom.trainers import recipes
from kinoloom.trainers.core.data import TrainingData
from kinoloom.trainers.host.source import ModelSource

from ..runs import load_animatediff, load_model, load_svd, make_config


@pytest.fixture(scope="module")
def models(tiny_models: Path) -> dict[str, Any]:
    return {
        "wan": load_model(tiny_models / "diffusion_models" / "tiny_wan.safetensors"),
        "animatediff": load_animatediff(tiny_models),
        "svd": load_svd(tiny_models, "shallow_svd"),
    }


def run(node: type, **inputs: Any) -> Callable[[Any], Any]:
    """A core node as ComfyUI runs it, its other inputs at their defaults."""

    def patched(model: Any) -> Any:
        defaults = {i.id: i.default for i in node.define_schema().inputs if getattr(i, "default", None) is not None}
        result = node.execute(**{**defaults, "model": model, **inputs})
        return result.args[0] if hasattr(result, "args") else result[0]

    return patched


def legacy(node: type, function: str, **inputs: Any) -> Callable[[Any], Any]:
    return lambda model: getattr(node(), function)(model, **inputs)[0]


def own(**added: Any) -> Callable[[Any], Any]:
    """A MODEL as a third-party node patches it: `added` is the call on its clone."""

    def patched(model: Any) -> Any:
        changed = model.clone()
        for name, arguments in added.items():
            getattr(changed, name)(*arguments)
        return changed

    return patched


def nothing(*args: Any, **kwargs: Any) -> None:
    """A patch of a name of no meaning."""


REFUSED: dict[str, tuple[str, Callable[[Any], Any], str]] = {
    "FreeU": ("animatediff", run(nodes_freelunch.FreeU), "the patch 'output_block_patch'"),
    "FreeU_V2": ("animatediff", run(nodes_freelunch.FreeU_V2), "the patch 'output_block_patch'"),
    "HyperTile": ("animatediff", run(nodes_hypertile.HyperTile), "the patch 'attn1_patch'.*'attn1_output_patch'"),
    "TomePatchModel": ("animatediff", run(nodes_tomesd.TomePatchModel), "the patch 'attn1_patch'"),
    "SelfAttentionGuidance": ("animatediff", run(nodes_sag.SelfAttentionGuidance), "the replacement 'attn1'"),
    "PatchModelAddDownscale": ("animatediff", run(nodes_model_downscale.PatchModelAddDownscale, downscale_method="bicubic", upscale_method="bicubic"), "'input_block_patch_after_skip'"),
    "NAGuidance": ("wan", run(nodes_nag.NAGuidance), "the patch 'attn1_output_patch'"),
    "ScaleROPE": ("wan", run(nodes_rope.ScaleROPE, scale_t=0.5), "'rope_options'"),
    "v prediction": ("animatediff", legacy(nodes_model_advanced.ModelSamplingDiscrete, "patch", sampling="v_prediction", zsnr=False), "predicts V_PREDICTION"),
    "x0": ("animatediff", legacy(nodes_model_advanced.ModelSamplingDiscrete, "patch", sampling="x0", zsnr=False), "predicts X0"),
    "edm": ("svd", legacy(nodes_model_advanced.ModelSamplingContinuousEDM, "patch", sampling="edm", sigma_max=120.0, sigma_min=0.002), "predicts EDM"),
    "playground's latents": ("svd", legacy(nodes_model_advanced.ModelSamplingContinuousEDM, "patch", sampling="edm_playground_v2.5", sigma_max=120.0, sigma_min=0.002), "the patched part 'latent_format'"),
    "attn2 replaced (IPAdapter)": ("animatediff", own(set_model_attn2_replace=(nothing, "input", 1, 0)), "the replacement 'attn2'"),
    "attn2 patch": ("wan", own(set_model_attn2_patch=(nothing,)), "the patch 'attn2_patch'"),
    "a block replaced": ("wan", own(set_model_patch_replace=(nothing, "dit", "double_block", 0)), "the replacement 'dit'"),
    "forward wrapper": ("wan", own(add_wrapper_with_key=(WrappersMP.DIFFUSION_MODEL, "regional", nothing)), "the diffusion_model wrapper 'regional'"),
    "nameless wrapper": ("wan", own(add_wrapper=(WrappersMP.APPLY_MODEL, nothing)), "the apply_model wrapper 'nothing'"),
    "function wrapper": ("svd", own(set_model_unet_function_wrapper=(nothing,)), "the model function wrapper 'nothing'"),
    "callback": ("svd", own(add_callback_with_key=(CallbacksMP.ON_PRE_RUN, "identity net", nothing)), "the on_pre_run callback 'identity net'"),
    "a model of others": ("svd", lambda model: own(set_additional_models=("adapter", [model.clone()]))(model), "the model 'adapter'"),
    "an injection": ("animatediff", own(set_injections=("ADE", [nothing])), "the injection 'ADE'"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_changes_the_forward_is_refused_by_name(name: str, models: dict[str, Any]) -> None:
    backbone, patched, message = REFUSED[name]
    with pytest.raises(ValueError, match=rf"^model: carries .*{message}.*, which training cannot keep"):
        ModelSource.of(patched(models[backbone]))


PASS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "EasyCache": ("wan", run(nodes_easycache.EasyCacheNode)),
    "LazyCache": ("wan", run(nodes_easycache.LazyCacheNode)),
    "TorchCompileModel": ("wan", run(nodes_torch_compile.TorchCompileModel, backend="inductor")),
    "ModelSamplingSD3": ("wan", legacy(nodes_model_advanced.ModelSamplingSD3, "patch", shift=5.0)),
    "ModelSamplingContinuousEDM": ("svd", legacy(nodes_model_advanced.ModelSamplingContinuousEDM, "patch", sampling="v_prediction", sigma_max=700.0, sigma_min=0.002)),
    "LCM": ("animatediff", legacy(nodes_model_advanced.ModelSamplingDiscrete, "patch", sampling="lcm", zsnr=False)),
    "ModelComputeDtype": ("wan", legacy(nodes_model_advanced.ModelComputeDtype, "patch", dtype="fp32")),
    "RescaleCFG": ("animatediff", legacy(nodes_model_advanced.RescaleCFG, "patch", multiplier=0.7)),
    "CFGZeroStar": ("wan", run(nodes_cfg.CFGZeroStar)),
    "CFGNorm": ("wan", run(nodes_cfg.CFGNorm)),
    "Mahiro": ("wan", run(nodes_mahiro.Mahiro)),
    "TCFG": ("wan", run(nodes_tcfg.TCFG)),
    "FreSca": ("animatediff", run(nodes_fresca.FreSca)),
    "EpsilonScaling": ("animatediff", run(nodes_eps.EpsilonScaling)),
    "PerturbedAttentionGuidance": ("animatediff", run(nodes_pag.PerturbedAttentionGuidance)),
    "SkipLayerGuidanceDiT": ("wan", run(nodes_slg.SkipLayerGuidanceDiT)),
    "VideoLinearCFGGuidance": ("svd", legacy(nodes_video_model.VideoLinearCFGGuidance, "patch", min_cfg=1.0)),
    "DifferentialDiffusion": ("wan", run(nodes_differential_diffusion.DifferentialDiffusion)),
    "WanContextWindows": ("wan", run(nodes_context_windows.WanContextWindowsManualNode, context_schedule="standard_static", fuse_method="pyramid")),
    "TeaCache of others": ("wan", own(add_wrapper_with_key=(WrappersMP.DIFFUSION_MODEL, "TeaCache", nothing))),
    "clean-up": ("wan", own(add_callback_with_key=(CallbacksMP.ON_CLEANUP, "mine", nothing))),
    "nothing": ("animatediff", lambda model: model),
}  # fmt: skip


@pytest.mark.parametrize("name", PASS)
def test_what_only_samplers_use_passes_and_is_the_same_model(name: str, models: dict[str, Any]) -> None:
    backbone, patched = PASS[name]
    assert ModelSource.of(patched(models[backbone])).key == ModelSource.of(models[backbone]).key


def test_weights_that_a_node_changes_are_kept(models: dict[str, Any]) -> None:
    """UNetSelfAttentionMultiply patches weights, as LoRA loaders do: merged into the copy, and part of the identity."""
    patched = run(nodes_attention_multiply.UNetSelfAttentionMultiply, q=1.2)(models["animatediff"])
    assert ModelSource.of(patched).key != ModelSource.of(models["animatediff"]).key


def test_the_train_node_refuses_before_anything_else(models: dict[str, Any]) -> None:
    node = train_node(recipes()["KinoloomTrainWanLora"])
    with pytest.raises(ValueError, match="carries the patch 'attn1_output_patch'"):
        config = vars(make_config("KinoloomTrainWanLora"))
        patched = run(nodes_nag.NAGuidance)(models["wan"])
        node.execute(model=patched, data=TrainingData("nowhere", ()), run_name="unused", **config)
