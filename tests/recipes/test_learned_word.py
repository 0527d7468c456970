"""A word that a run learns: core's own encoding, a private text encoder, and runs that use one and that do not."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sd
import pytest
import torch
from kinoloom.lora_io.file import save
from kinoloom.nodes.training import registry as jobs
from kinoloom.nodes.training.train import connected, train_node
from kinoloom.trainers import recipes
from kinoloom.trainers.backbones.flow.wan import Wan, WanConfig
from kinoloom.trainers.conditions.columns import LATENTS, PREVIEW_PROMPT, PROMPT
from kinoloom.trainers.conditions.word import LearnedWord, WordConfig
from kinoloom.trainers.core.config import LoraConfig, knob
from kinoloom.trainers.core.data import Batch, TrainingData
from kinoloom.trainers.core.lora import copied, fill
from kinoloom.trainers.core.losses import denoising_loss
from kinoloom.trainers.core.placement import Placement
from kinoloom.trainers.core.plain_lora import PlainLora
from kinoloom.trainers.core.recipe import Export, ModelInput, Phase
from kinoloom.trainers.core.rng import Rng
from kinoloom.trainers.core.start_from import Start
from kinoloom.trainers.host.private import load_private
from kinoloom.trainers.host.source import ModelSource
from kinoloom.trainers.host.text import TextEncoder
from kinoloom.trainers.run.job import Job
from tiny import sd as tiny_sd
from torch import Tensor, nn
from toyworld.install import MODELS
from toyworld.pack import text_encoder as toy

from ..runs import RUNS, Published, assert_same, finish, make_config, make_job, random, state_of

CPU = torch.device("cpu")
LEARN = {"word_to_learn": "fog_new", "initializer_token": "fog bank"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of embeddings."""
    return tmp_path_factory.mktemp("embeddings")


@pytest.fixture(scope="module")
def clip(tiny_models: Path, folder: Path) -> Any:
    """CLIP-L as from Load CLIP."""
    with torch.inference_mode():
        path = tiny_models / "text_encoders" / "tiny_clip.safetensors"
        return comfy.sd.load_clip([str(path)], embedding_directory=str(folder))


@pytest.fixture(scope="module")
def private(clip: Any) -> Any:
    return load_private(clip.patcher, CPU, Placement(stored=torch.bfloat16))


@pytest.fixture(scope="module")
def encoder(private: Any) -> TextEncoder:
    return TextEncoder(private)


def of_core(clip: Any, text: str) -> Tensor:
    with torch.inference_mode():
        return clip.encode_from_tokens(clip.tokenize(text)).float()


def learned(encoder: TextEncoder, prompt: str = "", word: str = "fog_new", start: str = "fog") -> LearnedWord:
    return LearnedWord(encoder, WordConfig(word_to_learn=word, initializer_token=start, word_prompt=prompt))


@pytest.mark.parametrize(
    ("prompt", "of_file"),
    [
        ("", "embedding:row"),
        ("a fog_new over hills", "a embedding:row over hills"),
        ("fog_new, thick fog, fog_new", "embedding:row, thick fog, embedding:row"),
        ("slow (dark:1.4) [x] fog_new.", r"slow \(dark:1.4\) [x] embedding:row ."),
        ("fog_new " + "word " * 74, "embedding:row " + "word " * 74),
    ],
)
def test_a_prompt_is_encoded_as_core_encodes_an_embedding(
    prompt: str, of_file: str, encoder: TextEncoder, clip: Any, folder: Path
) -> None:
    word = learned(encoder, prompt)
    with torch.no_grad():
        word.row.copy_(random(1, 768, name=f"row {prompt}"))
    save(folder / "row.safetensors", {"fog_new": word.row})
    encoded = word.encode()
    assert encoded.shape == (1, 77, 768) and encoded.dtype == torch.float32
    torch.testing.assert_close(encoded.detach(), of_core(clip, of_file), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(encoded.detach(), of_core(clip, prompt or "fog_new")[:, :77], atol=1e-2)


def test_it_starts_as_the_first_token_of_its_initialiser(encoder: TextEncoder, clip: Any) -> None:
    first, whole = (learned(encoder, "a fog_new rises", start=start) for start in ("waterfall", "waterfalling water"))
    torch.testing.assert_close(first.encode().detach(), of_core(clip, "a waterfall rises"), rtol=1e-4, atol=1e-4)
    assert len(encoder.tokens("waterfalling water")) > 1
    table = clip.cond_stage_model.clip_l.transformer.get_input_embeddings().weight
    assert torch.equal(whole.row[0], table[encoder.tokens("waterfalling water")[0]].float())


def test_only_the_row_gets_a_gradient_and_it_is_the_slope(encoder: TextEncoder, private: Any) -> None:
    word = learned(encoder, "a fog_new over hills, fog_new")
    way, target = random(1, 768, name="way"), random(77, 768, name="target")
    (word.encode()[0] * target).sum().backward()
    assert [name for name, _ in word.named_parameters()] == ["row"]
    assert not any(p.requires_grad or p.grad is not None for p in private.parameters())
    ends = []
    for step in (1e-2, -1e-2):
        word.row.data += step * way
        ends.append(float((word.encode()[0] * target).sum().detach()))
        word.row.data -= step * way
    assert (ends[0] - ends[1]) / 2e-2 == pytest.approx(float((word.row.grad * way).sum()), rel=2e-2)


def test_the_copy_is_the_runs_own(clip: Any, private: Any) -> None:
    assert private not in [loaded.model.model for loaded in comfy.model_management.current_loaded_models if loaded.model]
    shared = clip.cond_stage_model
    assert {p.data_ptr() for p in private.parameters()}.isdisjoint(p.data_ptr() for p in shared.parameters())
    assert not any(module._forward_pre_hooks for module in shared.modules())
    for name, parameter in private.named_parameters():
        assert torch.equal(shared.get_parameter(name), parameter), name


def test_a_lora_of_the_text_encoder_is_merged_and_another_key(clip: Any) -> None:
    key = "clip_l.transformer.text_model.encoder.layers.3.mlp.fc1.weight"
    patched = clip.clone()
    patched.add_patches({key: ("diff", (random(3072, 768, name="lora") / 20,))})
    encoder = TextEncoder(load_private(patched.patcher, CPU))
    with torch.no_grad():
        ours = encoder.encode("a valley", {})
    torch.testing.assert_close(ours, of_core(patched, "a valley"), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(ours, of_core(clip, "a valley"), atol=1e-2)
    sources = [ModelSource.of(each.patcher) for each in (clip, patched)]
    assert sources[0].key != sources[1].key and sources[1].patched
    with pytest.raises(ValueError, match="started on a model with LoRAs applied"):
        sources[1].reload()


def test_the_text_encoder_of_a_checkpoint(clip: Any, tiny_models: Path, tmp_path: Path) -> None:
    path = tmp_path / "sd15.safetensors"
    tiny_sd.write_checkpoint(path, tiny_models / "text_encoders" / "tiny_clip.safetensors")
    with torch.inference_mode():
        source = ModelSource.of(comfy.sd.load_checkpoint_guess_config(str(path), output_vae=False)[1].patcher)
    assert source.path == str(path) and source.is_text_encoder
    with torch.no_grad():
        encoded = TextEncoder(load_private(source, CPU)).encode("a valley", {})
    torch.testing.assert_close(encoded, of_core(clip, "a valley"), rtol=1e-4, atol=1e-4)
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(ValueError, match=r"text encoder .*sd15.safetensors: its content changed"):
        load_private(source, CPU)
    path.unlink()
    with pytest.raises(ValueError, match=r"text encoder .*sd15.safetensors: not found"):
        source.require_reloadable()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"word_to_learn": "clouds", "initializer_token": "fog"}, "word_to_learn='clouds': a word that the text encoder"),
        ({**LEARN, "word_prompt": "fog_new " + "word " * 75}, "word_prompt='fog_new .*2 sections of 77 tokens, expected one"),
    ],
)
def test_words_that_the_text_encoder_does_not_take(options: dict, message: str, encoder: TextEncoder) -> None:
    with pytest.raises(ValueError, match=message):
        WordConfig(**options).check_text_encoder(encoder)
    WordConfig(**LEARN, word_prompt="fog_new " + "word " * 74).check_text_encoder(encoder)


# -- runs --------------------------------------------------------------------------------------------------------------


class WanWithText(Wan):
    def __init__(self, models: dict[str, Any], *rest: Any) -> None:
        super().__init__(models, *rest)
        self.text_encoder = models["clip"].model if "clip" in models else None


class Worded(PlainLora):
    name, title, description = "KinoloomTrainWorded", "Train Worded", "A LoRA and a word."
    backbone_class = WanWithText
    columns, previews = (LATENTS, PROMPT), (PREVIEW_PROMPT,)
    template = "wan_lora_generate"
    models = (ModelInput(), ModelInput("clip", "Its text encoder.", text_encoder=True, option="word_to_learn"))

    @dataclass(frozen=True, kw_only=True)
    class Config(WordConfig, WanConfig, LoraConfig):
        steps: int = knob(4, "Optimizer steps.", min=1, max=1000)
        target_layers: str = knob("all", "Layers.", choices=tuple(Wan.lora_targets))

        def starts(self) -> dict[str, Start]:
            return {}

    def __init__(self, backbone: Any, config: Any) -> None:
        super().__init__(backbone, config)
        self.word = LearnedWord(TextEncoder(backbone.text_encoder), config) if config.word_to_learn else None

    @staticmethod
    def exports(config: Any, data: TrainingData) -> dict[str, Export]:
        return PlainLora.exports(config, data)

    def param_groups(self, phase: Phase) -> list[dict[str, Any]]:
        own = [{"params": [self.word.row], "lr": self.config.learning_rate}] if self.word else []
        return [*super().param_groups(phase), *own]

    def losses(self, batch: Batch, rng: Rng) -> Iterator[tuple[str, Tensor]]:
        batch = {**batch, "prompt_embeds": batch["prompt_embeds"][:, 0]}
        if self.word:
            batch = self.word.instead_of_captions(batch)
        yield "loss", denoising_loss(self.backbone, batch, rng, rng.uniform(len(batch["latents"])))

    def state_dict(self) -> dict[str, Tensor]:
        return super().state_dict() | copied(self._word())

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        own = self._word()
        super().load_state_dict({key: value for key, value in state.items() if key not in own})
        fill(own, {key: state[key] for key in own}, "word")

    def _word(self) -> dict[str, nn.Parameter]:
        return {"word": self.word.row} if self.word else {}


@pytest.fixture
def worded(data: TrainingData, monkeypatch: pytest.MonkeyPatch) -> TrainingData:
    monkeypatch.setitem(recipes(), Worded.name, Worded)
    monkeypatch.setitem(RUNS, Worded.name, {"steps": 4})
    return replace(data, rows=tuple(row for row in data.rows if row.unit == "clips" and row.role == "train"))


def test_a_run_learns_the_word_and_resumes_from_the_files_to_the_same_bits(
    worded: TrainingData, model: Any, clip: Any, encoder: TextEncoder, tmp_path: Path
) -> None:
    config = make_config(Worded.name, **LEARN, steps=3, validate_every=0)
    whole = finish(make_job(tmp_path / "whole", model, worded, config, Worded.name, clip=clip), model, clip=clip)
    learned_row = state_of(whole).recipe["word"]
    assert (learned_row - encoder.row("fog")).abs().mean() > 1e-3
    at_one, two = Published().at(1, Job.stop), tmp_path / "two"
    finish(make_job(two, model, worded, config, Worded.name, at_one, clip=clip), model, "stopped", clip=clip)
    resumed = make_job(two, model, worded, config, Worded.name)  # as after a restart
    assert list(resumed.spec.sources) == ["model", "clip"] and resumed.spec.sources["clip"].is_text_encoder
    resumed.start(None)
    assert resumed.ended.wait(600) and resumed.status == "finished", resumed.error
    assert_same(state_of(resumed).recipe, state_of(whole).recipe)


def test_without_a_word_no_text_encoder_is_loaded(
    worded: TrainingData, model: Any, clip: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though one is connected: the run and its run key are those of a run without it."""
    monkeypatch.setattr(jobs, "output_folder", lambda folder: tmp_path / "out")
    monkeypatch.setattr(jobs, "publish", Published())
    monkeypatch.setattr(jobs.Registry, "busy", lambda self, job: False)
    monkeypatch.setattr(jobs.Registry, "make_room", lambda self: None)
    own = jobs.Registry(tmp_path / "jobs")
    monkeypatch.setattr(jobs, "_registry", own)
    node = train_node(Worded)
    options = vars(make_config(Worded.name, steps=1, validate_every=0)) | {"start_from": "none"}
    with pytest.raises(ValueError, match="word_to_learn='clouds': a word that the text encoder knows"):
        node.execute(model=model, data=worded, run_name="known", clip=clip, **options | LEARN | {"word_to_learn": "clouds"})
    keys = {}
    for name, given in {"plain": {}, "connected": {"clip": clip}, "word": {"clip": clip, **LEARN}}.items():
        node.execute(model=model, data=worded, run_name=name, **{**options, **given})
        job = own.called(name)
        assert job.ended.wait(600) and job.status == "finished", job.error
        keys[name] = job.spec.run_key
        assert list(job.spec.sources) == ["model"] + ["clip"] * (name == "word")
        assert ("word" in state_of(job).recipe) == (name == "word")
    assert keys["plain"] == keys["connected"] and not keys["plain"].files
    assert keys["word"].base_model == keys["plain"].base_model and list(keys["word"].files) == ["clip"]
    other = replace(keys["word"], files={"clip": "another"})
    assert other.changes(keys["word"]) == ["content of clip"]
    again = jobs.Registry(tmp_path / "jobs")
    assert {job.spec.run_name for job in again.jobs.values()} == {"plain", "connected", "word"}


def test_the_input_is_optional_and_named_if_it_is_needed(clip: Any) -> None:
    node = train_node(Worded)
    (found,) = (each for each in node.define_schema().inputs if each.id == "clip")
    assert found.optional and found.io_type == "CLIP"
    given, config = Worded.models[1], make_config("KinoloomTrainWanLora")
    assert Worded.used(Worded.Config()) == Worded.models[:1]
    config = Worded.Config(**LEARN)
    with pytest.raises(ValueError, match="clip: not connected, expected a CLIP, which word_to_learn='fog_new' needs"):
        connected(given, None, config)
    assert connected(given, clip, config) is clip.patcher
    with pytest.raises(ValueError, match=r"^clip: _Model, expected the text encoder of Stable Diffusion 1.5 \(CLIP-L\)"):
        connected(given, toy.load(MODELS / "toy_text_encoder.safetensors"), config)
    for refused, message in REFUSED.items():
        with pytest.raises(ValueError, match=f"^clip: {message}"):
            connected(given, changed(clip, refused), config)


REFUSED = {
    "skip": r"CLIP Set Last Layer stops at layer -2, expected the last one \(-1\)",
    "hooks": "carries hooks, which training cannot keep",
    "injection": "carries a bypass LoRA",
    "loader": "a text encoder from a loader that keeps no file, which cannot be loaded a second time",
    "other loader": "a text encoder from load_unet, which cannot be loaded a second time. Use Load CLIP",
}


def changed(clip: Any, how: str) -> Any:
    other = clip.clone()
    if how == "skip":
        other.clip_layer(-2)
    elif how == "hooks":
        other.patcher.hook_patches = {"x": [1]}
    elif how == "injection":
        other.patcher.set_injections("bypass_lora", [None])
    else:
        other.patcher.cached_patcher_init = None if how == "loader" else (comfy.sd.load_unet, ("x",))
    return other
