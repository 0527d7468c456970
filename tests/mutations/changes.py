"""One-line changes that make the code wrong, and for each the tests that must fail.

A change that the code makes impossible is deleted from the list; one whose line was rewritten is brought up to date.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Change:
    """In `file`, `old` becomes `new`. tests: node ids below tests/, separated by spaces."""

    id: str
    file: str
    old: str
    new: str
    tests: str

    @property
    def selection(self) -> list[str]:
        return [f"tests/{test}" for test in self.tests.split()]


def misplaced(changes: Iterable[Change], root: Path) -> list[str]:
    """A line for each change whose old text is not in its file exactly once, or whose tests do not exist."""
    wrong = []
    for change in changes:
        if (count := (root / change.file).read_text(encoding="utf-8").count(change.old)) != 1:
            wrong.append(f"{change.id}: {change.old!r} is in {change.file} {count} times, expected once")
        for test in change.selection:
            file, _, name = test.partition("::")
            if not re.search(rf"^def {name.partition('[')[0]}\(", (root / file).read_text(encoding="utf-8"), re.MULTILINE):
                wrong.append(f"{change.id}: {test} does not exist")
    return wrong


# File -> (id, tests, old, new) for each change.
FILES: dict[str, list[tuple[str, str, str, str]]] = {
    "trainers/core/losses.py": [
        ("prior-same-noise", "pure/test_train_loop.py::test_the_prior_has_noise_of_its_own",
         'loss(batch["prior"], rng.fork("prior"))', 'loss(batch["prior"], rng)'),
        ("prior-unweighted", "recipes/test_set_and_sequence.py::test_prior_adds_exactly_its_weight_times_its_own_gradient",
         "prior_weight * loss(batch", "loss(batch"),
        ("loss-unmasked", "pure/test_noise.py::test_the_loss_is_an_fp32_mean_that_a_mask_weighs_before_the_mean",
         "error * mask).mean()", "error).mean()"),
        ("denoising-unmasked", "recipes/test_wan_backbone.py::test_a_mask_weighs_the_squared_error",
         't), batch.get("mask"))', "t), None)"),
    ],
    "trainers/core/loop.py": [
        ("loss-sign", "pure/test_train_loop.py::test_the_first_step_of_a_warm_up_is_made_at_rate_zero",
         "scale(loss / count)", "scale(-loss / count)"),
        ("loss-not-averaged", "pure/test_train_loop.py::test_a_step_has_the_mean_of_its_batches",
         "scale(loss / count)", "scale(loss)"),
        ("validation-not-averaged", "pure/test_train_loop.py::test_validation_and_files_are_of_the_average_and_the_next_phase_keeps_it",
         "with self.averaged():\n            loss =", "if True:\n            loss ="),
        ("ema-finish", "pure/test_train_loop.py::test_validation_and_files_are_of_the_average_and_the_next_phase_keeps_it",
         "if self.average:\n            self.average.copy_to", "if False:\n            self.average.copy_to"),
        ("best-kept-across-phases", "pure/test_train_loop.py::test_each_phase_has_a_best_of_its_own",
         "index + 1, scaler=state.scaler)", "index + 1, scaler=state.scaler, best=state.best)"),
        ("rng-batch-size", "pure/test_train_loop.py::test_no_two_samples_of_a_phase_share_their_draws",
         "micro * self.config.batch_size)", "micro)"),
        ("validation-batches", "pure/test_train_loop.py::test_validation_looks_at_nine_levels_of_four_rows_with_noise_of_their_own",
         "VALIDATION_BATCHES = 4", "VALIDATION_BATCHES = 1"),
        ("one-quantile", "pure/test_train_loop.py::test_validation_looks_at_nine_levels_of_four_rows_with_noise_of_their_own",
         "QUANTILES = tuple(q / 10 for q in range(1, 10))", "QUANTILES = (0.5,)"),
        ("schedule-first", "pure/test_train_loop.py::test_the_first_step_of_a_warm_up_is_made_at_rate_zero",
         "self.scaler.step(self.optimizer)\n", "self.schedule.step()\n        self.scaler.step(self.optimizer)\n"),
        ("no-last-validation", "pure/test_train_loop.py::test_a_phase_is_validated_at_its_last_step_too",
         "config.validate_every and (last or", "config.validate_every and (False or"),
    ],
    "trainers/core/data.py": [
        ("order-without-epoch", "pure/test_batches.py::test_another_seed_joins_and_orders_rows_otherwise",
         '"order", *self.key, shape, epoch)', '"order", *self.key, shape)'),
        ("order-without-seed", "pure/test_batches.py::test_another_seed_joins_and_orders_rows_otherwise",
         'derived_generator(self.seed, "order"', 'derived_generator(0, "order"'),
        ("chunks-unshuffled", "pure/test_batches.py::test_batches_of_different_shapes_take_turns",
         "return [chunks[i] for i in order]", "return chunks"),
        ("smallest-planned", "pure/test_batches.py::test_the_largest_batch_is_of_the_largest_shape",
         "shape = max(self.buckets", "shape = min(self.buckets"),
        ("digest-without-role", "pure/test_batches.py::test_the_digest_changes_with_what_a_row_is_and_is_for",
         "row.unit, row.role, sorted", "row.unit, sorted"),
        ("digest-without-group", "pure/test_batches.py::test_the_digest_changes_with_what_a_row_is_and_is_for",
         "*([row.group] if row.group else [])]", "]"),
        ("digest-without-files", "pure/test_batches.py::test_the_digest_changes_with_what_a_row_is_and_is_for",
         "sorted(row.columns.items())", "sorted(row.columns)"),
        ("first-prior-only", "pure/test_batches.py::test_each_batch_has_a_prior_of_its_own",
         '"prior": self.prior[index]}', '"prior": self.prior[0]}'),
        ("strangers-in-group-0", "pure/test_batches.py::test_rows_of_one_group_have_one_number_in_training_and_validation",
         "numbers.get(group, -1)", "numbers.get(group, 0)"),
        ("every-row-a-group", "pure/test_batches.py::test_rows_of_one_group_have_one_number_in_training_and_validation",
         "return [row.group or (f", "return [(f"),
        ("columns-of-all-rows-only", "pure/test_batches.py::test_an_unmasked_sample_among_masked_ones_counts_in_full",
         "if any(values):", "if all(values):"),
        ("columns-not-required", "pure/test_batches.py::test_a_row_without_a_column_is_named_and_the_node_that_makes_it",
         "if not column.optional and", "if False and"),
        ("maker-not-named", "pure/test_batches.py::test_a_row_without_a_column_is_named_and_the_node_that_makes_it",
         'f"{column.made_by}"', 'f"{column.name}"'),
        ("nan-in-columns", "recipes/test_loop.py::test_bad_numbers_in_data_are_named_before_the_first_step",
         "if tensor.is_floating_point() and", "if False and"),
        ("validation-on-training-rows", "recipes/test_jobs_core.py::test_held_out_rows_are_validated_on_and_never_trained_on",
         "self._validation if self.held_out else self.train", "self.train"),
    ],
    "trainers/core/lora.py": [
        ("dropout-same-in-every-layer", "recipes/test_lora.py::test_dropout_is_another_in_each_layer_and_leaves_the_mean_as_it_was",
         "(probability, seed + place)", "(probability, seed)"),
        ("frozen-weights-trained", "recipes/test_lora.py::test_frozen_weights_are_no_part_of_the_backward_graph",
         "self.module.requires_grad_(False)", "self.module.requires_grad_(True)"),
        ("shared-down-trained", "recipes/test_lora.py::test_a_shared_down_is_one_frozen_parameter_and_the_ups_add",
         '("up",) if share_down else ("down", "up")', '("down", "up")'),
        ("frozen-groups-trained", "recipes/test_lora.py::test_without_and_frozen_and_their_end",
         "parameter.requires_grad_(False)", "parameter.requires_grad_(True)"),
        ("alpha-not-exported", "recipes/test_lora.py::test_export_writes_alpha_only_when_the_scale_is_not_one",
         "return {**self.tensors(group), **alphas}", "return self.tensors(group)"),
        ("lora-plus-ignored", "recipes/test_lora.py::test_up_factors_learn_lora_plus_times_faster",
         '"up": learning_rate * up_ratio', '"up": learning_rate'),
    ],
    "trainers/core/group_linear.py": [
        ("dropout-not-rescaled", "recipes/test_lora.py::test_dropout_is_another_in_each_layer_and_leaves_the_mean_as_it_was",
         "(up / (1 - probability))", "up"),
        ("masks-ignored", "recipes/test_lora.py::test_masks_reach_each_layer_of_their_group_in_order_and_stay_for_the_recompute",
         "up = up * self.masks[group]", "pass"),
        ("alpha-ignored", "recipes/test_lora.py::test_forward_and_gradient_equal_the_merged_weight",
         "up = up * self.scaling[group]", "pass"),
    ],
    "trainers/core/schedules.py": [
        ("flow-target-sign", "pure/test_noise.py::test_flow_matching_is_diffusers",
         "return noise - latents", "return latents - noise"),
        ("timestep-1000", "pure/test_noise.py::test_steps_of_ddpm_are_the_thousandths_that_quantiles_fall_in",
         "(u * self.steps).long()", "(u * self.steps).round().long()"),
    ],
    "trainers/core/config.py": [
        ("resumed-with-another-batch-size", "recipes/test_config.py::test_what_changes_the_result_is_noticed_when_a_run_is_resumed",
         '*("save_every", "save_minutes"', '*("batch_size", "lr_schedule", "save_every", "save_minutes"'),
        ("resumed-with-another-rank", "pure/test_run_key.py::test_options_that_the_weights_are_made_of_stay",
         '"save_precision", "rank", "alpha"', '"save_precision", "alpha"'),
    ],
    "trainers/core/memory.py": [
        ("one-block-more-recomputed", "recipes/test_placement.py::test_blocks_from_the_first_are_computed_twice_and_nothing_else_changes",
         "if index < backbone.placement.recomputed", "if index <= backbone.placement.recomputed"),
        ("plan-without-placement", "recipes/test_jobs_core.py::test_the_plan_knows_the_memory_within_a_factor_of_two_and_decides_by_it",
         "recomputed=len(backbone.blocks) if recompute else 0)", "recomputed=0)"),
    ],
    "trainers/core/backbone.py": [
        ("side-unchecked", "recipes/test_sampling.py::test_samples_that_do_not_suit_the_model_are_refused",
         "if value % self.side:", "if value % self.pixels:"),
        ("frames-unchecked", "recipes/test_sampling.py::test_samples_that_do_not_suit_the_model_are_refused",
         "if (frames - 1) % step:", "if False:"),
        ("previews-too-long", "recipes/test_sampling.py::test_samples_that_do_not_suit_the_model_are_refused",
         "if self.longest and latent_frames > self.longest:", "if False:"),
        ("preview-sides-exchanged", "recipes/test_sampling.py::test_samples_that_do_not_suit_the_model_are_refused",
         "height // self.pixels, width // self.pixels)", "width // self.pixels, height // self.pixels)"),
        ("channels-unchecked", "recipes/test_svd.py::test_other_models_and_other_latents_are_refused",
         "if channels != self.channels:", "if False:"),
        ("rows-too-long", "recipes/test_animatediff.py::test_data_that_does_not_fit_is_refused_before_a_run",
         "if self.longest and frames > self.longest:", "if False:"),
        ("latents-unscaled", "recipes/test_wiring.py::test_latents_are_brought_to_the_models_own_space",
         'process_latent_in(batch["latents"].float())', 'batch["latents"].float()'),
    ],
    "trainers/core/recipe.py": [
        ("recipe-not-unconditional", "recipes/test_wiring.py::test_guidance_leads_away_from_what_is_asked_for",
         "return self.backbone.unconditional(batch)", "return batch"),
    ],
    "trainers/conditions/columns.py": [
        ("missing-mask-zeros", "pure/test_batches.py::test_an_unmasked_sample_among_masked_ones_counts_in_full",
         "torch.ones(1, *shape[1:])", "torch.zeros(1, *shape[1:])"),
        ("prompts-padded-in-front", "pure/test_batches.py::test_prompts_are_padded_at_their_end",
         "(0, 0, 0, longest - p.shape[1])", "(0, 0, longest - p.shape[1], 0)"),
        ("padding-left-out", "recipes/test_sampling.py::test_a_sample_is_what_core_s_sampler_makes[wan-6-3.0]",
         "device, dtype), (0, 0, 0, padding))", "device, dtype), (0, 0, 0, 0))"),
        ("a-variant-sampled", "pure/test_batches.py::test_previews_have_the_clean_prompt",
         'batch["prompt_embeds"][:, 0]}', 'batch["prompt_embeds"][:, -1]}'),
        ("variants-not-repeated", "pure/test_batches.py::test_variants_are_repeated_in_turn_and_the_clean_prompt_is_not",
         "torch.arange(count - 1) % max(len(prompt) - 1, 1)", "torch.zeros(count - 1).long()"),
    ],
    "trainers/host/layers.py": [
        ("rope-backward", "recipes/test_wan_backbone.py::test_rotary_embedding_is_the_samplers_own_and_has_the_gradient_of_the_formula",
         "ctx.freqs.transpose(-1, -2).contiguous()", "ctx.freqs"),
        ("interrupt-polled", "recipes/test_wan_backbone.py::test_the_interrupt_flag_is_neither_consumed_nor_obeyed",
         ', "throw_exception_if_processing_interrupted": lambda: None}', "}"),
    ],
    "trainers/host/private.py": [
        ("storage-type-lost", "recipes/test_wan_backbone.py::test_storage_type_chosen_in_the_loader_holds_under_dynamic_vram",
         "parameter.data = parameter.data.to(dtype)", "pass"),
        ("patches-not-merged", "recipes/test_wan_backbone.py::test_upstream_lora_patches_are_merged_and_the_shared_model_is_not_touched",
         'if not any("." in own for own in names):', "if False:"),
        ("wide-weights-kept", "recipes/test_placement.py::test_a_model_goes_to_the_device_layer_by_layer_in_the_type_it_is_stored_in[KinoloomTrainWanLora-False]",
         "        if placement.stored:\n            _narrow", "        if False:\n            _narrow"),
    ],
    "trainers/host/source.py": [
        ("storage-type-not-in-key", "recipes/test_wan_backbone.py::test_identity_changes_with_content_storage_and_patches",
         'f"{file}{weight_dtype}"', 'f"{file}"'),
        ("fast-fp8-lost", "recipes/test_wiring.py::test_fast_fp8_is_kept_when_a_model_is_read_again",
         ' | ({"fp8_optimizations": True} if fast else {})', ""),
        ("carried-not-in-key", "recipes/test_animatediff.py::test_identity_changes_with_the_motion_module_and_the_loras_on_it",
         "_key(fingerprint(path), weight_dtype, model.patches, carried)",
         "_key(fingerprint(path), weight_dtype, model.patches, {})"),
        ("models-exchanged", "recipes/test_wiring.py::test_two_models_of_a_run_are_told_apart_by_their_inputs",
         "sorted(keys.items())", "sorted(keys.values())"),
    ],
    "trainers/run/versions.py": [
        ("old-run-key", "recipes/test_versions.py::test_a_run_of_an_earlier_version_goes_on_to_the_same_weights",
         '_rename(content, identity="run_key")', "pass"),
        ("old-units", "pure/test_versions.py::test_a_record_of_version_1_has_its_new_words",
         '_rename(row, split="unit")', "pass"),
        ("old-carried", "pure/test_versions.py::test_a_record_of_version_1_has_its_new_words",
         'identity="key", parts="carried")', 'identity="key")'),
        ("old-negative", "pure/test_versions.py::test_a_record_of_version_1_has_its_new_words",
         'row("negative", negative) if negative else None', "None"),
        ("old-preview-shape", "pure/test_versions.py::test_a_record_of_version_1_has_its_new_words",
         '"shape": shape or []', '"shape": []'),
        ("later-version-read", "pure/test_versions.py::test_a_version_that_is_not_known_is_refused",
         "1 <= version <= VERSION", "1 <= version"),
    ],
    "trainers/run/previews.py": [
        ("preview-seed", "recipes/test_sampling.py::test_a_sample_is_what_core_s_sampler_makes[wan-6-3.0]",
         "previews.seed + index", "previews.seed"),
        ("preview-shift", "recipes/test_sampling.py::test_a_sample_is_what_core_s_sampler_makes[wan-6-3.0]",
         "previews.steps, previews.shift)", "previews.steps, 1.0)"),
        ("preview-guidance", "recipes/test_sampling.py::test_a_sample_is_what_core_s_sampler_makes[wan-6-3.0]",
         "previews.guidance(shape[1])", "previews.guidance(shape[1]) * 0 + 1"),
        ("preview-guidance-flat", "recipes/test_sampling.py::test_a_sample_is_what_core_s_sampler_makes[svd-6-3.0]",
         "torch.linspace(self.first_cfg, self.cfg", "torch.linspace(self.cfg, self.cfg"),
        ("preview-negative", "recipes/test_sampling.py::test_the_negative_row_replaces_its_own_columns_and_leaves_the_others",
         "batches[0] | batches[-1]", "batches[0]"),
        ("preview-conditional", "recipes/test_sampling.py::test_a_sample_is_what_core_s_sampler_makes[svd-6-3.0]",
         "recipe.unconditional(negative)", "negative"),
        ("preview-columns-not-required", "recipes/test_sampling.py::test_samples_that_do_not_suit_the_model_are_refused",
         'require_columns(row, columns, "samples:")', "pass"),
        ("preview-without-shape", "recipes/test_sampling.py::test_samples_that_do_not_suit_the_model_are_refused",
         "tuple(replace(row, shape=shape) for row in self.rows)", "self.rows"),
    ],
    "trainers/run/job.py": [
        ("no-room-made", "recipes/test_loop.py::test_after_a_pause_the_run_makes_room_again",
         "self.make_room()\n        device", "device"),
    ],
    "trainers/run/line.py": [
        ("two-runs-at-once", "recipes/test_sharing.py::test_runs_of_one_registry_train_one_after_the_other",
         "if self._taken or first is not run", "if first is not run"),
    ],
    "trainers/run/training.py": [
        ("plan-without-states", "recipes/test_checkpoint.py::test_the_plan_counts_what_the_optimizer_keeps",
         "states = trainable *", "states = 0 * trainable *"),
        ("checkpoint-on-divergence", "recipes/test_checkpoint.py::test_a_run_that_diverges_keeps_its_checkpoint_and_what_it_learned",
         'if why not in ("best", "diverged"):', 'if why not in ("best",):'),
        ("whole-model-narrowed", "recipes/test_placement.py::test_weights_that_a_run_saves_are_loaded_as_they_are_in_their_file",
         "stored=None if whole else", "stored="),
    ],
    "trainers/run/export.py": [
        ("alpha-cast", "recipes/test_checkpoint.py::test_a_scale_is_exact_in_a_file_of_half_precision",
         "return tensor.to(dtype) if tensor.ndim else tensor", "return tensor.to(dtype)"),
        ("best-files-kept", "recipes/test_checkpoint.py::test_of_the_files_called_best_the_last_is_kept",
         "if best and earlier:", "if False:"),
    ],
    "trainers/backbones/animatediff/model.py": [
        ("animatediff-latents-unscaled", "recipes/test_wiring.py::test_latents_are_brought_to_the_models_own_space",
         "self.device, self.model.process_latent_in)", "self.device, lambda x: x)"),
    ],
    "trainers/backbones/svd/model.py": [
        ("svd-latents-unscaled", "recipes/test_wiring.py::test_latents_are_brought_to_the_models_own_space",
         "self.device, self.process_latent_in)", "self.device, lambda x: x)"),
        ("svd-first-frame-unconditional", "recipes/test_wiring.py::test_guidance_leads_away_from_what_is_asked_for",
         'for name in ("image_embeds", "first_frame")}}', 'for name in ("image_embeds",)}}'),
    ],
    "trainers/motion_director.py": [
        ("look-unmasked", "recipes/test_wiring.py::test_the_mask_weighs_the_look_and_the_motion",
         "take(target, frame), _mask_at(batch, frame))", "take(target, frame), None)"),
        ("motion-unmasked", "recipes/test_wiring.py::test_the_mask_weighs_the_look_and_the_motion",
         'c.debias_weight, batch.get("mask"))', "c.debias_weight, None)"),
        ("one-look-not-sampled", "recipes/test_wiring.py::test_samples_have_the_look_unless_there_are_several",
         "self.lora.without(*(looks if len(looks) > 1 else []))", "self.lora.without(*looks)"),
        ("motion-trains-the-look", "recipes/test_motion_director.py::test_each_loss_trains_its_own_lora_and_never_the_other",
         ", self.lora.frozen(*looks):", ":"),
        ("director-prior-same-noise", "recipes/test_motion_director.py::test_prior_clips_give_the_same_two_losses_at_their_weight",
         'batch["prior"], rng.fork("prior"))', 'batch["prior"], rng)'),
        ("motion-lora-format", "recipes/test_motion_director.py::test_a_motion_lora_is_named_and_read_as_others_do",
         '"lora", "motion_lora", MOTION_FOLDER)', '"lora", "comfy", MOTION_FOLDER)'),
        ("look-format", "recipes/test_motion_director.py::test_a_spatial_lora_is_kohyas_and_core_finds_a_place_for_all_of_it",
         'PHASE, format="kohya")', "PHASE)"),
    ],
    "trainers/set_and_sequence.py": [
        ("mask-left-on-identity", "recipes/test_wiring.py::test_the_last_mask_of_stage_one_does_not_stay_on_the_frozen_look",
         "        self.lora.set_masks(IDENTITY, None)\n", ""),
        ("masks-not-rescaled", "recipes/test_set_and_sequence.py::test_masks_zero_a_share_p_of_the_trained_up_and_rescale_the_rest",
         ".div_(keep)", ""),
        ("identity-not-rounded", "recipes/test_set_and_sequence.py::test_stage_two_begins_where_the_identity_file_ends",
         "factor.data = factor.data.half().float()", "pass"),
    ],
    "trainers/svd_finetune.py": [
        ("whole-model-as-lora", "recipes/test_generation.py::test_each_export_is_of_its_kind",
         '"clips", "model", "whole"', '"clips", "lora", "whole"'),
    ],
    "trainers/svd_tracklets.py": [
        ("soft-boxes-in-evaluation", "recipes/test_wiring.py::test_an_evaluation_sees_the_hard_boxes",
         "if not rng.evaluating:\n            boxes", "if True:\n            boxes"),
        ("same-soft-boxes-every-step", "recipes/test_wiring.py::test_soft_boxes_of_every_step_are_drawn_anew",
         'rng.generator("soft boxes")', 'rng.generator("soft boxes", 0)'),
        ("empty-slots-weigh", "recipes/test_wiring.py::test_empty_slots_weigh_nothing",
         "(inside & mask.bool()[..., None, None]).any(2)", "inside.any(2)"),
        ("users-mask-lost", "recipes/test_wiring.py::test_the_users_mask_and_the_boxes_weigh_together",
         'batch.get("mask", 1) * to_device', "to_device"),
        ("boxes-in-the-negative", "recipes/test_wiring.py::test_guidance_leads_away_from_what_is_asked_for",
         'torch.zeros_like(batch["box_mask"])', 'batch["box_mask"]'),
        ("control-as-lora", "recipes/test_generation.py::test_each_export_is_of_its_kind",
         '"module", "whole", "tracklet_control"', '"lora", "whole", "tracklet_control"'),
    ],
    "nodes/data/encoding/columns.py": [
        ("vae-not-in-key", "nodes/test_cache_keys.py::test_clips", "(vae_id, source.digest), (width", "(source.digest,), (width"),
        ("frames-not-in-key", "nodes/test_cache_keys.py::test_clips", "windows, (vae_id, source.digest)", "windows, (vae_id,)"),
        ("size-not-in-key", "nodes/test_cache_keys.py::test_clips", "source.digest), (width, height), make)", "source.digest), (), make)"),
        ("text-encoder-not-in-key", "nodes/test_cache_keys.py::test_clips",
         "key = (text_encoder_id, text,", "key = (text,"),
        ("version-not-in-key", "nodes/test_columns.py::test_a_cache_key_holds_the_column_and_its_version",
         "(column.name, column.version, *key)", "(column.name, *key)"),
        ("mask-size-not-in-key", "nodes/test_cache_keys.py::test_windows_and_mask_sizes",
         "rest = (width, height, step, latent_size)", "rest = (width, height, step)"),
    ],
    "nodes/data/encoding/svd_rows.py": [
        ("fps-not-in-key", "nodes/test_cache_keys.py::test_svd_clips",
         "(*size, fps, self.motion_bucket)", "(*size, self.motion_bucket)"),
        ("vision-not-in-key", "nodes/test_cache_keys.py::test_svd_clips",
         "self.vision_id, source.digest), (", "source.digest), ("),
        ("tracklets-not-in-key", "nodes/test_cache_keys.py::test_svd_clips",
         "source.digest, tracklets.to_json())", "source.digest)"),
    ],
    "nodes/data/encoding/priors.py": [
        ("model-not-in-prior-key", "nodes/test_cache_keys.py::test_prior_clips",
         '("prior", model_id, text_encoder_id', '("prior", text_encoder_id'),
        ("sampler-not-in-prior-key", "nodes/test_cache_keys.py::test_prior_clips",
         "sampler.cfg, sampler.name, sampler.scheduler)", "sampler.cfg, sampler.scheduler)"),
    ],
    "nodes/data/encoding/model_keys.py": [
        ("patches-not-in-key", "nodes/test_cache_keys.py::test_patches_are_part_of_a_model_s_identity",
         "*weights, *patches)", "*weights)"),
    ],
    "nodes/data/encoding/text_rows.py": [
        ("captions-exchanged", "nodes/test_data_nodes.py::test_motion_caption_is_for_the_clip_and_static_for_its_frames",
         'captions.motion if unit == "clips"', 'captions.motion if unit == "frames"'),
    ],
    "nodes/data/reading/captions.py": [
        ("caption-files-exchanged", "nodes/test_cache_keys.py::test_caption_files_for_frames_and_for_the_clip",
         '"static": (".static.txt",), "motion": (".motion.txt",)', '"static": (".motion.txt",), "motion": (".static.txt",)'),
    ],
    "nodes/data/encoding/preview_rows.py": [
        ("conditions-not-in-preview-key", "nodes/test_cache_keys.py::test_first_frames_of_samples",
         "height, numbers, frame.digest)", "height, frame.digest)"),
        ("boxes-not-in-preview-key", "nodes/test_cache_keys.py::test_first_frames_of_samples",
         "options.frames, tracklets and tracklets.to_json())", "options.frames)"),
    ],
    "nodes/training/train.py": [
        ("file-by-path", "nodes/test_queueing.py::test_a_chosen_file_counts_by_its_content",
         "sha256(Path(values[option]))", "values[option]"),
        ("text-width-unchecked", "recipes/test_sampling.py::test_samples_that_do_not_suit_the_model_are_refused",
         "if width != grid.text_width:", "if False:"),
    ],
    "nodes/training/registry.py": [
        ("models-not-unloaded", "recipes/test_sharing.py::test_make_room_has_the_queue_unload_its_models",
         'set_flag("unload_models", True)', 'set_flag("unload_models", False)'),
        ("shutdown-stops-nothing", "recipes/test_sharing.py::test_shutting_down_stops_and_saves_what_goes_on",
         "for job in running:\n            job.stop()", "for job in running:\n            job.pause"),
        ("runs-share-a-folder", "recipes/test_sharing.py::test_a_folder_that_another_wrote_is_not_a_runs",
         "output_folder(export.folder) / run_name)", "output_folder(export.folder))"),
        ("folder-of-others-taken", "recipes/test_sharing.py::test_a_folder_that_another_wrote_is_not_a_runs",
         "if not any((output_folder", "if not all((output_folder"),
    ],
    "lora_io/file.py": [
        ("fingerprint-of-the-start", "recipes/test_wiring.py::test_a_fingerprint_changes_with_any_part_of_a_file",
         "opened.seek(max(size - (1 << 20), 0) * i // 63)", "opened.seek(0)"),
    ],
    "web/tracklets/data.mjs": [
        ("hard-beside-soft", "browser/test_tracklet_rule.py::test_a_frame_between_key_frames_is_hard_only_if_both_are_and_it_is_wanted",
         "before.hard && next.hard", "(before.hard || next.hard)"),
    ],
}
CHANGES = [Change(id, file, old, new, tests) for file, own in FILES.items() for id, tests, old, new in own]
