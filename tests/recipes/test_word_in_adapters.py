"""Train CA-LoRA with a learned word: what trains, the files, core's embeddings, and the adapter's own loader."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.sd
import folder_paths
import pytest
import torch
from kinoloom.lora_io.file import load, save
from kinoloom.nodes.adapters.loading import LoadI2vAdapter
from kinoloom.nodes.folders import I2V_ADAPTERS
from kinoloom.trainers.ca_lora import NEGATIVE, CaLora
from kinoloom.trainers.core.data import TrainingData
from kinoloom.trainers.core.rng import Rng
from kinoloom.trainers.host.private import load_private
from kinoloom.trainers.host.text import TextEncoder
from kinoloom.trainers.run.job import Job
from torch import Tensor

from ..rows import TEXT_WIDTH, random
from ..runs import Published, assert_same, finish, make_backbone, make_batch, make_config, make_job, state_of

pytestmark = pytest.mark.slow

LEARN = {"word_to_learn": "fog_new", "initializer_token": "fog", "word_prompt": "a fog_new over hills"}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def model(inputs: Any) -> Any:
    return inputs(CaLora.name)[0]


@pytest.fixture(scope="module")
def data(inputs: Any) -> TrainingData:
    """Clips to train on alone."""
    found = inputs(CaLora.name)[1]
    return replace(found, rows=tuple(row for row in found.rows if row.unit == "clips" and row.role == "train"))


@pytest.fixture(scope="module")
def clip(tiny_models: Path, folder: Path) -> Any:
    """CLIP-L as from Load CLIP, to which the run's files are embeddings."""
    with torch.inference_mode():
        path = tiny_models / "text_encoders" / "tiny_clip.safetensors"
        return comfy.sd.load_clip([str(path)], embedding_directory=str(folder))


def job_of(folder: Path, *given: Any, clip: Any, published: Published | None = None, **options: Any) -> Job:
    model, data = given
    small = {"steps": 3, "validate_every": 0, "save_precision": "fp32", "trigger_words": "fog, [v]", **LEARN, **options}
    job = make_job(folder, model, data, make_config(CaLora.name, **small), CaLora.name, published, clip=clip)
    job.spec = replace(job.spec, run_name="my run")
    return job


@pytest.fixture(scope="module")
def trained(model: Any, data: TrainingData, clip: Any, folder: Path) -> Job:
    return finish(job_of(folder, model, data, clip=clip), model, clip=clip)


def of_core(clip: Any, text: str) -> Tensor:
    with torch.inference_mode():
        return clip.encode_from_tokens(clip.tokenize(text))


def test_a_run_writes_the_word_as_an_embedding_that_core_finds(trained: Job, clip: Any, folder: Path) -> None:
    assert list(trained.exports) == ["motion", "word", "adapter"]
    names = {label: Path(path).name for label, path in trained.files.items()}
    assert names["word"] == "my_run-word-000003.safetensors" and names["adapter"] == "my run-adapter-000003.safetensors"
    (tensors, metadata), (adapter, described) = (load(Path(trained.files[name])) for name in ("word", "adapter"))
    assert list(tensors) == ["fog_new"] and tensors["fog_new"].shape == (1, 768)
    assert torch.equal(adapter["word"], tensors["fog_new"])
    for found in (metadata, described):
        assert found["kinoloom.word"] == "fog_new" and found["kinoloom.word_prompt"] == "a fog_new over hills"
        assert found["modelspec.trigger_phrase"] == "fog_new, fog, [v]"
        assert found["kinoloom.base_model"] == trained.spec.sources["model"].key
    assert "kinoloom.word" not in load(Path(trained.files["motion"]))[1]
    tokens = clip.tokenize("a embedding:my_run-word-000003, slow")["l"][0]
    assert torch.equal(tokens[2][0], tensors["fog_new"][0])


def test_only_the_row_of_the_text_encoder_learns(trained: Job, clip: Any) -> None:
    table = clip.cond_stage_model.clip_l.transformer.get_input_embeddings().weight
    first = table[clip.tokenize("fog")["l"][0][1][0]].float()
    state = state_of(trained)
    assert 1e-3 < (state.recipe["word"][0] - first).abs().mean() < 0.1
    assert [key for key in state.recipe if "text_model" in key or "clip" in key] == []


def test_a_stopped_run_goes_on_from_its_files_to_the_same_bits(
    trained: Job, model: Any, data: TrainingData, clip: Any, tmp_path: Path
) -> None:
    finish(job_of(tmp_path, model, data, clip=clip, published=Published().at(1, Job.stop)), model, "stopped", clip=clip)
    resumed = make_job(tmp_path, model, data, trained.config, CaLora.name)  # as after a restart
    resumed.start({"model": model, "clip": resumed.spec.sources["clip"]})
    assert resumed.ended.wait(600) and resumed.status == "finished", resumed.error
    assert_same(state_of(resumed).recipe, state_of(trained).recipe)


def test_without_a_word_there_is_no_text_encoder_and_no_file(
    trained: Job, model: Any, data: TrainingData, clip: Any, tmp_path: Path
) -> None:
    none = {name: "" for name in LEARN}
    job = finish(job_of(tmp_path, model, data, clip=None, steps=1, **none), model)
    assert list(job.exports) == ["motion", "adapter"] and "word" not in state_of(job).recipe
    assert "word" not in load(Path(job.files["adapter"]))[0]
    assert make_backbone(model, method=CaLora.name).text_encoder is None
    assert trained.spec.run_key.files.keys() == {"clip"} and not job.spec.run_key.files


@pytest.fixture(scope="module")
def recipe(model: Any, trained: Job, clip: Any) -> CaLora:
    """Of the trained run, with the word as it learned it."""
    backbone = make_backbone(model, method=CaLora.name)
    backbone.text_encoder = TextEncoder(load_private(clip.patcher, CPU))
    made = CaLora(backbone, trained.config)
    made.load_state_dict(state_of(trained).recipe)
    made.start(trained.phases[0])
    return made


def test_clips_and_samples_have_the_word_and_negative_prompts_and_priors_have_not(
    recipe: CaLora, inputs: Any, clip: Any
) -> None:
    seen, predict = [], recipe.backbone.predict

    def watched(noisy: Tensor, t: Tensor, batch: dict[str, Any]) -> Tensor:
        seen.append(batch["prompt_embeds"].detach())
        return predict(noisy, t, batch)

    recipe.backbone.predict = watched
    batch = make_batch(recipe.backbone, inputs(CaLora.name)[1], size=2)
    with torch.no_grad():
        list(recipe.losses(batch, Rng(0, "word", 0)))
    word = of_core(clip, "a embedding:my_run-word-000003 over hills").float()
    assert len(seen) == 2 and seen[0].shape == (2, 77, 768)
    torch.testing.assert_close(seen[0], word.expand(2, -1, -1), rtol=1e-4, atol=1e-4)
    assert torch.equal(seen[1], batch["prior"]["prompt_embeds"][:, 0])
    shown = {"prompt_embeds": random(1, 5, TEXT_WIDTH, name="own"), "prompt_length": torch.tensor([12]), "start": random(1, 4, 8, 16, name="start")}
    noisy, t = random(1, 4, 3, 8, 16, name="noisy"), torch.tensor([500])
    with torch.no_grad():
        recipe.predict(noisy, t, shown)
        recipe.predict(noisy, t, recipe.unconditional(shown))
    recipe.backbone.predict = predict
    torch.testing.assert_close(seen[2], word, rtol=1e-4, atol=1e-4)
    assert torch.equal(seen[3], shown["prompt_embeds"]) and NEGATIVE in recipe.unconditional(shown)


def test_the_word_has_a_gradient_beside_the_adapter(recipe: CaLora, data: TrainingData) -> None:
    (_, loss), *_ = recipe.losses(make_batch(recipe.backbone, data), Rng(0, "word", 0))
    loss.backward()
    assert recipe.word.row.grad.abs().max() > 0
    groups = recipe.param_groups(CaLora.phases(recipe.config, data)[0])
    assert any(parameter is recipe.word.row for group in groups for parameter in group["params"])
    assert all(p.grad is None for p in recipe.backbone.text_encoder.model.parameters())


def test_a_run_may_start_from_an_adapter_with_a_word(recipe: CaLora, trained: Job, model: Any) -> None:
    backbone = make_backbone(model, method=CaLora.name)
    backbone.text_encoder = recipe.backbone.text_encoder
    file = trained.files["adapter"]
    again = CaLora(backbone, replace(trained.config, start_from=file))
    assert_same(again.state_dict(), state_of(trained).recipe)
    without = replace(trained.config, start_from=file, **{name: "" for name in LEARN})
    with pytest.raises(ValueError, match=r"start_from='my run-adapter-000003.safetensors': its parts are not .*'word'"):
        CaLora(make_backbone(model, method=CaLora.name), without)
    with pytest.raises(ValueError, match=r"^start_from='my run-adapter-000003.safetensors': its alpha is 4, expected 2 as in this run$"):
        CaLora(backbone, replace(trained.config, start_from=file, alpha=2.0))


def test_the_loader_of_an_adapter_finds_its_word(trained: Job, clip: Any, folder: Path) -> None:
    own = folder / "adapters"
    folder_paths.add_model_folder_path(I2V_ADAPTERS, str(own))
    save(own / "fog.safetensors", *load(Path(trained.files["adapter"])))
    with torch.inference_mode():
        (loaded,) = LoadI2vAdapter.execute("fog.safetensors", 1.0, "the (fog_new:1.3) rises", clip).args[0]
    assert torch.equal(loaded.prompt, of_core(clip, "the (embedding:my_run-word-000003:1.3) rises"))
    assert loaded.places[1:4] == ("the", "fog_new", "rises"), "maps find the word too"
