"""Set-and-Sequence against its paper: trained factors of each stage, masks, prompts, prior, files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.latent_formats
import comfy.sd
import pytest
import torch
from kinoloom.lora_io.file import load, save
from kinoloom.trainers.core.data import Batches, TrainingData
from kinoloom.trainers.core.loop import validation_loss
from kinoloom.trainers.core.rng import Rng
from kinoloom.trainers.run.job import Job
from kinoloom.trainers.set_and_sequence import SetAndSequence, choose_prompts
from scipy.stats import norm
from torch import Tensor

from ..runs import (
    NO_DATA,
    TEXT_LENGTH,
    TOKENS,
    finish,
    leaves,
    make_backbone,
    make_batch,
    make_config,
    make_job,
    placements,
    prompt,
    random,
    state_of,
    write_data,
    write_row,
)

NAME = SetAndSequence.name
LINEARS = [
    f"blocks.{i}.{linear}"
    for i in (0, 1)
    for linear in (*(f"{a}.{n}" for a in ("self_attn", "cross_attn") for n in "qkvo"), "ffn.0", "ffn.2")
]
SPLITS = {"set": "frames", "sequence": "clips"}


@pytest.fixture(scope="module")
def run(inputs: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A whole run of both stages, its files in fp16."""
    folder, (model, data) = tmp_path_factory.mktemp("run"), inputs(NAME)
    return finish(make_job(folder, model, data, make_config(NAME), NAME), model)


def started(model: Any, *stages: str, **options: Any) -> SetAndSequence:
    """The method at the start of the last of `stages`. After stage 1 its factors differ from their start values."""
    recipe = SetAndSequence(make_backbone(model), make_config(NAME, **options))
    phases = {phase.name: phase for phase in recipe.phases(recipe.config, NO_DATA)}
    for stage in stages:
        recipe.start(phases[stage])
        if stage == "set":
            fill(recipe, "identity")
    return recipe


@torch.no_grad()
def fill(recipe: SetAndSequence, group: str) -> None:
    for path, up in recipe.lora.factors(group, "up").items():
        up.copy_(random(*up.shape, name=f"{group} {path}") / 10)


def velocity(recipe: SetAndSequence, data: TrainingData) -> Tensor:
    batch = make_batch(recipe.backbone, data)
    with torch.no_grad():
        prompts = {**batch, "prompt_embeds": batch["prompt_embeds"][:, 0]}
        return recipe.backbone.predict(batch["latents"], torch.tensor([0.6]), prompts)


def total_loss(recipe: SetAndSequence, batch: dict, rng: Rng) -> Tensor:
    return sum(loss for _, loss in recipe.losses(batch, rng))


def file_tensors(job: Job, label: str) -> dict[str, Tensor]:
    return load(Path(job.files[label]))[0]


# -- what is trained -------------------------------------------------------------------------------------------------------


def test_the_defaults_are_the_papers() -> None:
    c = SetAndSequence.Config()
    assert (c.set_steps, c.sequence_steps, c.batch_size * c.gradient_accumulation) == (600, 900, 8)
    assert (c.optimizer, c.learning_rate, c.lr_schedule, c.warmup_steps) == ("AdamW", 1e-4, "constant", 0)
    assert (c.beta2, c.weight_decay, c.max_grad_norm) == (0.99, 0.01, 0.05)
    assert (c.set_dropout, c.sequence_dropout, c.token_mask_prob, c.prior_weight) == (0.8, 0.5, 0.1, 1.0)
    assert (c.set_shift, c.sequence_shift, c.self_conditioning_prob, c.alpha) == (1.0, 3.0, 0.0, 0.0)
    assert [(p.name, p.unit) for p in SetAndSequence.phases(c, NO_DATA)] == list(SPLITS.items())


def test_every_linear_of_every_block_is_adapted_and_nothing_else(model: Any) -> None:
    recipe = started(model, "set", "sequence")
    assert sorted(recipe.lora.layers) == sorted(LINEARS)
    for group in ("identity", "motion"):
        for path, down in recipe.lora.factors(group, "down").items():
            base = recipe.lora.layers[path].base_layer.weight
            assert down.shape == (4, base.shape[1])
            assert recipe.lora.factors(group, "up")[path].shape == (base.shape[0], 4)


def test_stage_one_trains_both_factors_and_stage_two_only_the_motion_up(model: Any, data: TrainingData) -> None:
    recipe = started(model, "set")
    identity = [recipe.lora.factors("identity", name) for name in ("down", "up")]
    loss = total_loss(recipe, make_batch(recipe.backbone, data, "frames"), Rng(0, "set", 0))
    assert leaves(loss) == {p for factor in identity for p in factor.values()}
    groups = recipe.param_groups(recipe.phases(recipe.config, NO_DATA)[0])
    assert {p for g in groups for p in g["params"]} == leaves(loss)

    recipe = started(model, "set", "sequence")
    loss = total_loss(recipe, make_batch(recipe.backbone, data), Rng(0, "sequence", 0))
    motion = set(recipe.lora.factors("motion", "up").values())
    assert leaves(loss) == motion
    assert {p for g in recipe.param_groups(recipe.phases(recipe.config, NO_DATA)[1]) for p in g["params"]} == motion


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_stage_two_begins_where_the_identity_file_ends(model: Any, data: TrainingData, precision: str) -> None:
    recipe = started(model, "set", save_precision=precision)
    dtype = {"fp16": torch.float16, "fp32": torch.float32}[precision]
    unrounded = velocity(recipe, data)
    with torch.no_grad():
        for name in ("down", "up"):
            for factor in recipe.lora.factors("identity", name).values():
                factor.copy_(factor.to(dtype))
    file, file_velocity = recipe.export("identity"), velocity(recipe, data)
    assert torch.equal(file_velocity, unrounded) == (precision == "fp32")

    recipe = started(model, "set", "sequence", save_precision=precision)
    assert torch.equal(velocity(recipe, data), file_velocity)
    assert all(torch.equal(tensor, file[key]) for key, tensor in recipe.export("identity").items())
    assert all(torch.count_nonzero(up) == 0 for up in recipe.lora.factors("motion", "up").values())


def test_a_run_keeps_the_identity_of_its_file_to_the_bit_and_learns_a_motion(run: Job) -> None:
    state, identity = state_of(run).recipe, file_tensors(run, "identity")
    for path in LINEARS:
        for factor, letter in (("down", "A"), ("up", "B")):
            frozen = identity[f"diffusion_model.{path}.lora_{letter}.weight"]
            assert torch.equal(state[f"identity/{path}.lora_{factor}.weight"], frozen.float())
        assert torch.count_nonzero(identity[f"diffusion_model.{path}.lora_B.weight"]) > 0
        assert torch.count_nonzero(state[f"motion/{path}.lora_up.weight"]) > 0
        assert f"motion/{path}.lora_down.weight" not in state, "A1 is there once"


def test_an_identity_file_continues_to_the_same_bits_as_one_run(
    run: Job, model: Any, data: TrainingData, tmp_path: Path
) -> None:
    config = make_config(NAME, set_steps=0, identity_file=run.files["identity"])
    second = finish(make_job(tmp_path, model, data, config, NAME), model)
    for label in ("motion", "combined"):
        ours, theirs = file_tensors(second, label), file_tensors(run, label)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    hashes = {
        load(Path(job.files[label]))[1]["sns.identity_sha256"]
        for job, labels in ((run, ("identity", "motion", "combined")), (second, ("motion", "combined")))
        for label in labels
    }
    assert len(hashes) == 1, "files that belong together say so"
    other = finish(make_job(tmp_path / "other", model, data, make_config(NAME, seed=1, sequence_steps=0), NAME), model)
    assert load(Path(other.result_files[-1]))[1]["sns.identity_sha256"] not in hashes


def test_an_identity_file_that_does_not_fit_is_refused(run: Job, model: Any, tmp_path: Path) -> None:
    def start(path: Path, **options: Any) -> None:
        started(model, "sequence", set_steps=0, identity_file=str(path), **options)

    with pytest.raises(ValueError, match="has rank 4, but rank=8: set rank to 4"):
        start(Path(run.files["identity"]), rank=8)
    with pytest.raises(ValueError, match="gone.safetensors: not found"):
        start(tmp_path / "gone.safetensors")
    (tmp_path / "damaged.safetensors").write_bytes(b"no safetensors")
    with pytest.raises(ValueError, match="damaged.safetensors: not a readable safetensors file"):
        start(tmp_path / "damaged.safetensors")
    tensors = file_tensors(run, "identity")
    save(tmp_path / "foreign.safetensors", {f"transformer.{key}": value for key, value in tensors.items()})
    with pytest.raises(ValueError, match="transformer.diffusion_model"):
        start(tmp_path / "foreign.safetensors")
    layer = "diffusion_model.blocks.1.ffn.2"
    save(tmp_path / "short.safetensors", {key: value for key, value in tensors.items() if not key.startswith(layer)})
    with pytest.raises(ValueError, match=r"blocks\.1\.ffn\.2"):
        start(tmp_path / "short.safetensors")


def test_an_identity_file_of_another_scale_is_refused(model: Any, data: TrainingData, tmp_path: Path) -> None:
    """Its up factor means scale * B1; taken at another scale it is another identity."""
    config = make_config(NAME, set_steps=1, sequence_steps=0, alpha=2.0)
    first = finish(make_job(tmp_path, model, data, config, NAME), model)
    with pytest.raises(ValueError, match=r"alpha"):
        started(model, "sequence", set_steps=0, identity_file=first.files["identity"])
    recipe = started(model, "sequence", set_steps=0, identity_file=first.files["identity"], alpha=2.0)
    halves = {key: 2.0 for key in recipe.export("identity") if key.endswith(".alpha")}
    assert {key: float(recipe.export("identity")[key]) for key in halves} == halves and len(halves) == len(LINEARS)


# -- loss ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stage", "shift"), [("set", 1.0), ("sequence", 3.0)])
def test_the_loss_is_flow_matching_at_the_stages_shift(
    model: Any, data: TrainingData, stage: str, shift: float
) -> None:
    """x_t = (1 - t) data + t noise, target noise - data, timestep 1000 t, fp32 mean; masks and token masking off."""
    off = {"set_dropout": 0.0, "sequence_dropout": 0.0, "token_mask_prob": 0.0}
    recipe = started(model, *list(SPLITS)[: list(SPLITS).index(stage) + 1], **off)
    row = data.select(SPLITS[stage], "train")[0]
    only = TrainingData(data.folder, (row,))
    batch = make_batch(recipe.backbone, only, SPLITS[stage])
    rng = Rng(7, stage, 5)
    [(name, loss)] = [(name, loss.detach()) for name, loss in recipe.losses(batch, rng)]

    raw = load(Path(data.folder) / f"{row.columns['latents']}.latents.safetensors")[0]["latents"][None]
    clean = comfy.latent_formats.Wan21().process_in(raw)
    noise = torch.randn(raw.shape[1:], generator=rng.generator("noise"))[None]
    z = norm.ppf(rng.uniform(1, True).double())
    t = torch.tensor(shift / (shift + torch.exp(-torch.tensor(z)).item()), dtype=torch.float32)
    embeds = prompt(row.name)["prompt_embeds"][:1]
    context = torch.nn.functional.pad(embeds, (0, 0, 0, TEXT_LENGTH - embeds.shape[1]))
    with torch.no_grad():
        velocity = recipe.backbone.module((1 - t) * clean + t * noise, 1000 * t[None], context=context)
    expected = (velocity - (noise - clean)).square().mean()
    assert name == "concept"
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("stage", list(SPLITS))
def test_prior_adds_exactly_its_weight_times_its_own_gradient(model: Any, data: TrainingData, stage: str) -> None:
    recipe = started(model, *list(SPLITS)[: list(SPLITS).index(stage) + 1], prior_weight=1.0)
    batch = make_batch(recipe.backbone, data, SPLITS[stage])
    rng = Rng(0, stage, 0)
    parameters = [
        p for g in recipe.param_groups(recipe.phases(recipe.config, NO_DATA)[list(SPLITS).index(stage)]) for p in g["params"]
    ]

    def gradients(weight: float) -> dict[str, tuple[Tensor, ...]]:
        recipe.config = make_config(NAME, prior_weight=weight)
        return {name: torch.autograd.grad(loss, parameters) for name, loss in recipe.losses(batch, rng)}

    one, weighted = gradients(1.0), gradients(0.25)
    assert list(one) == list(weighted) == ["concept", "prior"]
    assert list(gradients(0.0)) == ["concept"]
    assert any(g.abs().max() > 0 for g in one["prior"])
    for name, factor in (("concept", 1.0), ("prior", 0.25)):
        for ours, unit in zip(weighted[name], one[name], strict=True):
            torch.testing.assert_close(ours, factor * unit, rtol=1e-5, atol=1e-9)


def test_without_prior_rows_there_is_no_prior_loss(model: Any, tmp_path: Path) -> None:
    recipe = started(model, "set")
    batch = make_batch(recipe.backbone, write_data(tmp_path, "wan", roles=["train"]), "frames")
    assert [name for name, _ in recipe.losses(batch, Rng(0, "set", 0))] == ["concept"]


# -- masks on B ------------------------------------------------------------------------------------------------------------


def drawn_masks(recipe: SetAndSequence, batch: dict, rng: Rng) -> dict[str, dict[str, Tensor]]:
    next(recipe.losses(batch, rng))
    return {path: dict(layer.masks) for path, layer in recipe.lora.layers.items()}


@pytest.mark.parametrize(("stage", "group", "p"), [("set", "identity", 0.8), ("sequence", "motion", 0.5)])
def test_masks_zero_a_share_p_of_the_trained_up_and_rescale_the_rest(
    model: Any, data: TrainingData, stage: str, group: str, p: float
) -> None:
    recipe = started(model, *list(SPLITS)[: list(SPLITS).index(stage) + 1])
    batch = make_batch(recipe.backbone, data, SPLITS[stage])
    masks = drawn_masks(recipe, batch, Rng(0, stage, 0))
    assert all(set(of_layer) == {group} for of_layer in masks.values()), "the frozen B1 is not masked"
    values = torch.cat([of_layer[group].flatten() for of_layer in masks.values()])
    scale = torch.tensor(1.0) / (1 - p)
    assert torch.all((values == 0) | torch.isclose(values, scale))
    sigma = (p * (1 - p) / len(values)) ** 0.5
    assert abs((values == 0).double().mean().item() - p) < 4 * sigma
    assert values.double().mean().item() == pytest.approx(1.0, abs=4 * sigma / (1 - p))
    same_shape = [m[group] for path, m in masks.items() if path.endswith(("attn.q", "attn.k"))]
    assert not any(torch.equal(a, b) for i, a in enumerate(same_shape) for b in same_shape[:i])

    again = drawn_masks(recipe, batch, Rng(0, stage, 0))
    others = [
        drawn_masks(recipe, batch, rng) for rng in (Rng(0, stage, 1), Rng(1, stage, 0), Rng(0, stage, 0).fork("prior"))
    ]
    path = LINEARS[0]
    assert torch.equal(masks[path][group], again[path][group])
    assert not any(torch.equal(masks[path][group], other[path][group]) for other in others)


def test_the_mask_acts_in_the_loss_and_its_mean_output_is_the_unmasked_one(model: Any, data: TrainingData) -> None:
    recipe = started(model, "set")
    layer = recipe.lora.layers["blocks.0.ffn.0"]
    x = random(1, 3, 128, name="x")
    with torch.no_grad():
        base, unmasked = layer.base_layer(x), layer(x)
    batch = make_batch(recipe.backbone, data, "frames")
    total = torch.zeros_like(base)
    count = 400
    for sample in range(count):
        recipe._draw_masks(Rng(0, "set", sample))
        with torch.no_grad():
            total += layer(x) - base
    update = unmasked - base
    # the update's entries are sums of 4 terms masked independently: the mean of n draws has sd <= |terms| sqrt(p/(1-p)/n)
    h = x @ recipe.lora.factors("identity", "down")["blocks.0.ffn.0"].T
    terms = h.unsqueeze(-2) * recipe.lora.factors("identity", "up")["blocks.0.ffn.0"]
    sd = (terms.square().sum(-1) * 4 / count).sqrt().detach()
    deviation = (total / count - update) / sd
    assert deviation.abs().max() < 5
    assert deviation.square().mean().item() == pytest.approx(1.0, rel=0.2)

    with_masks = total_loss(recipe, batch, Rng(0, "set", 0)).item()
    recipe.dropout = 0.0
    assert with_masks != total_loss(recipe, batch, Rng(0, "set", 0)).item()


@pytest.mark.parametrize("stage", list(SPLITS))
def test_gradients_with_masks_are_the_same_when_activations_are_recomputed(
    model: Any, data: TrainingData, stage: str
) -> None:
    recipe = started(model, *list(SPLITS)[: list(SPLITS).index(stage) + 1])
    batch = make_batch(recipe.backbone, data, SPLITS[stage])
    parameters = [p for p in recipe.backbone.module.parameters() if p.requires_grad]
    found = []
    for _ in placements(recipe.backbone):
        sums = [torch.zeros_like(p) for p in parameters]
        for _, loss in recipe.losses(batch, Rng(0, stage, 0)):
            for total, grad in zip(sums, torch.autograd.grad(loss, parameters), strict=True):
                total += grad
        found.append(sums)
    assert all(torch.equal(a, b) for a, *others in zip(*found, strict=True) for b in others)


def test_evaluation_and_export_see_no_mask_and_no_hidden_token(model: Any, data: TrainingData) -> None:
    recipe = started(model, "set", token_mask_prob=0.5)
    phase = recipe.phases(recipe.config, NO_DATA)[0]
    batch = make_batch(recipe.backbone, data, "frames")
    exported = recipe.export("identity")
    drawn_masks(recipe, batch, Rng(0, "set", 0))
    assert all(torch.equal(tensor, exported[key]) for key, tensor in recipe.export("identity").items())
    with_regularisers = validation_loss(recipe, iter([batch]), phase, seed=3)
    recipe.config = make_config(NAME, token_mask_prob=0.0)
    recipe.dropout = 0.0
    assert validation_loss(recipe, iter([batch]), phase, seed=3) == with_regularisers


# -- prompts ---------------------------------------------------------------------------------------------------------------


def prompts(variants: int, tokens: int, count: int = 1) -> dict[str, Tensor]:
    columns = [prompt(str(i), variants=variants, tokens=tokens, width=8) for i in range(count)]
    return {name: torch.stack([column[name] for column in columns]) for name in columns[0]}


def test_variants_are_drawn_evenly_per_sample_and_the_clean_prompt_never() -> None:
    batch = prompts(variants=4, tokens=5)
    counts = torch.zeros(5)
    for sample in range(800):
        chosen = choose_prompts(batch, Rng(0, "set", sample), 0.1)
        counts[[torch.equal(chosen[0], variant) for variant in batch["prompt_embeds"][0]].index(True)] += 1
    assert counts[0] == 0
    assert torch.all((counts[1:] - 200).abs() < 4 * (800 * 0.25 * 0.75) ** 0.5)


def test_without_variants_tokens_are_zeroed_at_the_rate_and_the_end_token_never() -> None:
    batch = prompts(variants=0, tokens=20)
    rows = torch.stack([choose_prompts(batch, Rng(0, "set", sample), 0.1)[0] for sample in range(400)])
    clean = batch["prompt_embeds"][0, 0]
    hidden = (rows == 0).all(-1)
    assert torch.equal(rows[~hidden], clean.expand_as(rows)[~hidden]), "what is not hidden is unchanged"
    assert not hidden[:, 19].any()
    share, sigma = hidden[:, :19].double().mean().item(), (0.1 * 0.9 / (400 * 19)) ** 0.5
    assert abs(share - 0.1) < 4 * sigma
    assert (hidden[:, :19].sum(0) > 0).all(), "any token but the end may be hidden"


def test_variants_of_another_probability_are_not_used() -> None:
    batch = prompts(variants=4, tokens=20)
    rows = torch.stack([choose_prompts(batch, Rng(0, "set", sample), 0.5)[0] for sample in range(200)])
    hidden = (rows == 0).all(-1)[:, :19]
    assert abs(hidden.double().mean().item() - 0.5) < 4 * (0.25 / hidden.numel()) ** 0.5
    assert torch.equal(choose_prompts(batch, Rng(0, "set", 0), 0.0), batch["prompt_embeds"][:, 0])


@pytest.mark.parametrize("stage", list(SPLITS))
def test_tokens_are_hidden_in_both_stages_for_concept_and_prior(model: Any, data: TrainingData, stage: str) -> None:
    """The context that reaches the model is one of the row's variants, its own for each of the two losses."""
    recipe = started(model, *list(SPLITS)[: list(SPLITS).index(stage) + 1])
    batch = make_batch(recipe.backbone, data, SPLITS[stage])
    seen: list[Tensor] = []
    recipe.backbone.module.text_embedding.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    list(recipe.losses(batch, Rng(0, stage, 0)))
    assert len(seen) == 2
    for context, of in zip(seen, (batch, batch["prior"]), strict=True):
        assert any(torch.equal(context[0, :TOKENS], variant) for variant in of["prompt_embeds"][0, 1:])
        assert context.shape[1] == TEXT_LENGTH and torch.count_nonzero(context[0, TOKENS:]) == 0


def test_samples_with_different_numbers_of_variants_share_a_batch(tmp_path: Path) -> None:
    """As from two encode nodes: the sample without variants has tokens zeroed, the other gets only variants."""
    shape = (16, 3, 4, 4)
    rows = tuple(
        write_row(tmp_path, f"clip{k}", "clips", shape, prompt_embeds=prompt(f"clip{k}", variants=k)) for k in (0, 2, 5)
    )
    batch = Batches(TrainingData(str(tmp_path), rows), "clips", "train", SetAndSequence.columns, batch_size=3)[0]
    assert batch["prompt_embeds"].shape == (3, 6, TOKENS, 768) and batch["prompt_tokens"].shape == (3, 6)
    clean = batch["prompt_embeds"][:, 0]
    for sample in range(50):
        chosen = choose_prompts(batch, Rng(0, "sequence", 3 * sample), 0.1)
        for i, own in enumerate(batch["token_mask_prob"]):
            if own:
                assert not torch.equal(chosen[i], clean[i])
            else:
                shown = (chosen[i] != 0).any(-1)
                assert shown[4] and torch.equal(chosen[i][shown], clean[i][shown])


# -- data ------------------------------------------------------------------------------------------------------------------


def test_stage_one_sees_single_frames_in_changing_order_and_stage_two_the_clip_as_it_is(
    model: Any, tmp_path: Path
) -> None:
    data = write_data(tmp_path, "wan", roles=["train"], each=4)
    recipe = started(model, "set")
    frames = Batches(data, "frames", "train", recipe.columns, prepare=recipe.backbone.prepare)
    epochs = [[frames[index] for index in range(epoch * 4, epoch * 4 + 4)] for epoch in range(6)]
    assert all(batch["latents"].shape == (1, 16, 1, 4, 4) for epoch in epochs for batch in epoch)
    orders = [tuple(batch["latents"].sum().item() for batch in epoch) for epoch in epochs]
    assert all(sorted(order) == sorted(orders[0]) for order in orders), "every frame once per epoch"
    assert len(set(orders)) > 1

    clips = Batches(data, "clips", "train", recipe.columns, prepare=recipe.backbone.prepare)
    rows = {row.name: load(Path(data.folder) / f"{row.name}.latents.safetensors")[0]["latents"] for row in data.rows}
    normalised = [comfy.latent_formats.Wan21().process_in(t[None]) for n, t in rows.items() if "clips" in n]
    for index in range(4):
        assert sum(torch.equal(clips[index]["latents"], clip) for clip in normalised) == 1


# -- files -----------------------------------------------------------------------------------------------------------------


def test_every_file_holds_both_factors_of_every_layer_under_cores_names_and_no_alpha(run: Job) -> None:
    names = {f"diffusion_model.{path}.lora_{letter}.weight" for path in LINEARS for letter in "AB"}
    for label in ("identity", "motion", "combined"):
        tensors, metadata = load(Path(run.files[label]))
        assert tensors.keys() == names
        assert {t.shape[0] for k, t in tensors.items() if "lora_A" in k} == {4}, "rank r, not 2r"
        assert {t.dtype for t in tensors.values()} == {torch.float16}
        assert (metadata["format"], metadata["sns.stage"], metadata["sns.basis_side"]) == ("pt", label, "down")
        assert (metadata["ss_network_dim"], float(metadata["ss_network_alpha"])) == ("4", 4.0)


def test_combined_adds_in_fp32_and_rounds_once(run: Job) -> None:
    state = state_of(run).recipe
    for path in LINEARS:
        both = state[f"identity/{path}.lora_up.weight"] + state[f"motion/{path}.lora_up.weight"]
        combined = file_tensors(run, "combined")
        assert torch.equal(combined[f"diffusion_model.{path}.lora_B.weight"], both.half())
        down = state[f"identity/{path}.lora_down.weight"]
        for label in ("identity", "motion", "combined"):
            assert torch.equal(file_tensors(run, label)[f"diffusion_model.{path}.lora_A.weight"].float(), down)
        motion = file_tensors(run, "motion")[f"diffusion_model.{path}.lora_B.weight"]
        assert torch.equal(motion, state[f"motion/{path}.lora_up.weight"].half())


def test_combined_chained_and_concatenated_files_are_the_same_model_to_core(
    model: Any, data: TrainingData, tmp_path: Path
) -> None:
    config = make_config(NAME, save_precision="fp32", alpha=2.0)
    run = finish(make_job(tmp_path, model, data, config, NAME), model)
    identity, motion, combined = (file_tensors(run, label) for label in ("identity", "motion", "combined"))
    downs = {key: torch.cat([down, down]) for key, down in identity.items() if "lora_A" in key}
    ups = {key: torch.cat([up, motion[key]], dim=1) for key, up in identity.items() if "lora_B" in key}
    alphas = {key: 2 * alpha for key, alpha in identity.items() if "alpha" in key}
    weights = []
    for files in ([combined], [identity, motion], [{**downs, **ups, **alphas}]):
        patched = model
        for file in files:
            patched, _ = comfy.sd.load_lora_for_models(patched, None, dict(file), 1.0, 0)
        patched.patch_model()
        weights.append({p: patched.model.diffusion_model.get_submodule(p).weight.detach().clone() for p in LINEARS})
        patched.unpatch_model()
    plain = {path: model.model.diffusion_model.get_submodule(path).weight for path in LINEARS}
    for path in LINEARS:
        update = weights[0][path] - plain[path]
        assert update.abs().max() > 1e-4
        for other in weights[1:]:
            torch.testing.assert_close(other[path] - plain[path], update, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "made"),
    [({"sequence_steps": 0}, ["identity"]), ({}, ["identity", "motion", "combined"])],
)
def test_the_files_are_those_of_the_stages_that_run(options: dict, made: list[str]) -> None:
    assert list(SetAndSequence.exports(make_config(NAME, **options), NO_DATA)) == made
