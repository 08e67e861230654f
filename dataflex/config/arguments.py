"""What every argument of a run does to the values that are computed: one table, which identities are built from.

An argument *enters* in one of several ways, *reaches no value*, or is *refused* where values are computed
(`dataflex.config.combinations`). One that is not in the table, because the installed LLaMA-Factory is newer, enters by
value in every way, unless it has its default: values are then computed twice rather than taken for others.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

from dataflex.fingerprint import file_digest, plain

Way = Literal[
    "rows", "content", "configuration", "model", "drawn", "drawn file", "step", "step file", "schedule", "batch",
    "order", "reference", "identity", "no value", "refused",
]  # fmt: skip

_ENDING = re.compile(r"\.[A-Za-z]\w*$")
"""Of a file's name; that of a version, as in `qwen2.5`, is none."""
_LLAMAFACTORY: dict[Way, str] = {
    # Through the keys of the rows, which are digests of what the model is fed.
    "rows": """
        template dataset eval_dataset dataset_dir cutoff_len train_on_prompt mask_history mix_strategy interleave_probs
        preprocessing_batch_size preprocessing_num_workers max_samples val_size eval_on_each_dataset packing tool_format
        default_system enable_thinking preserve_thinking tokenized_path use_fast_tokenizer split_special_tokens
    """,
    # Names files, which are digested: the base, adapters, what merges them.
    "content": """
        model_name_or_path adapter_name_or_path adapter_folder model_revision create_new_adapter
    """,
    # Through the configuration that the model has once LLaMA-Factory has changed it, in the base's part of a recipe;
    # its attention among the numerics, which recipes, lineages and the run's identity have.
    "configuration": "rope_scaling flash_attn",
    # By value in the base's part of a recipe, and so in a lineage, which begins with the base.
    "model": """
        shift_attn use_v1_kernels enable_liger_kernel use_liger_kernel liger_kernel_config moe_aux_loss_coef
        upcast_layernorm upcast_lmhead_output trust_remote_code quantization_method quantization_bit quantization_type
        double_quantization tf32 fp8 fp8_backend fp8_enable_fsdp_float8_all_gather bf16 fp16 pure_bf16
    """,
    # By value, with the seed, where the frozen weights are drawn and not only read.
    "drawn": """
        train_from_scratch resize_vocab add_tokens add_special_tokens init_special_tokens pissa_init pissa_iter
    """,
    "drawn file": "new_special_tokens_config",
    # As "step", but a file, by its content.
    "step file": "deepspeed",
    # By value in the lineage of a kept state and in the run's identity: they change what a step does to the weights.
    # Features see that through the digests of trained weights and moments.
    "step": """
        seed data_seed optim optim_args optim_target_modules learning_rate adam_beta1 adam_beta2 adam_epsilon
        weight_decay max_grad_norm label_smoothing_factor neftune_noise_alpha average_tokens_across_devices
        torch_compile torch_compile_backend torch_compile_mode full_determinism gradient_checkpointing_kwargs
        accelerator_config parallelism_config dataloader_drop_last use_unsloth_gc use_cpu
        stage finetuning_type use_llama_pro
        freeze_trainable_layers freeze_trainable_modules freeze_extra_modules
        freeze_vision_tower freeze_multi_modal_projector freeze_language_model
        additional_target lora_alpha lora_dropout lora_rank lora_target loraplus_lr_ratio loraplus_lr_embedding
        use_rslora use_dora module_dropout oft_rank oft_block_size oft_target
        use_dft_loss use_asft_loss asft_alpha use_eaft_loss eaft_alpha
        use_galore galore_target galore_rank galore_update_interval galore_scale galore_proj_type galore_layerwise
        use_apollo apollo_target apollo_rank apollo_update_interval apollo_scale apollo_proj apollo_proj_type
        apollo_scale_type apollo_layerwise apollo_scale_front
        use_badam badam_mode badam_start_block badam_switch_mode badam_switch_interval badam_update_ratio
        badam_mask_mode use_adam_mini use_muon
    """,
    # By value in the run's identity, and in a lineage through the learning rates that follow.
    "schedule": """
        lr_scheduler_type lr_scheduler_kwargs warmup_steps warmup_ratio num_train_epochs max_steps
    """,
    # In the run's identity as the global batch, in a lineage with how it is split.
    "batch": "per_device_train_batch_size gradient_accumulation_steps",
    # By value in the run's identity: the order of chosen rows. A lineage has the rows in their order.
    "order": "disable_shuffling train_sampling_strategy",
    # Files of the model that ASFT's loss compares with, digested where that loss is used; its precision by value.
    "reference": "ref_model ref_model_adapters ref_model_quantization_bit",
    "no value": """
        cache_dir low_cpu_mem_usage disable_gradient_checkpointing use_reentrant_gc infer_backend offload_folder
        use_kv_cache infer_dtype hf_hub_token ms_hub_token om_hub_token print_param_status quantization_device_map
        image_max_pixels image_min_pixels image_do_pan_and_scan crop_to_patches video_max_pixels video_min_pixels
        video_fps video_maxlen use_audio_in_video audio_sampling_rate media_dir
        export_dir export_size export_device export_quantization_dataset export_quantization_nsamples
        export_quantization_maxlen export_legacy_format export_hub_model_id
        vllm_maxlen vllm_gpu_util vllm_enforce_eager vllm_max_lora_rank vllm_config
        sglang_maxlen sglang_mem_fraction sglang_tp_size sglang_config sglang_lora_backend
        kt_weight_path kt_expert_checkpoint_path kt_use_lora_experts kt_lora_expert_num
        kt_lora_expert_intermediate_size
        buffer_size overwrite_cache eval_num_beams data_shared_file_system
        output_dir overwrite_output_dir do_eval do_predict per_device_eval_batch_size bf16_full_eval fp16_full_eval
        gradient_checkpointing use_cache torch_empty_cache_steps
        logging_strategy logging_steps logging_first_step log_on_each_node logging_nan_inf_filter
        include_num_input_tokens_seen log_level log_level_replica disable_tqdm report_to run_name project
        trackio_space_id logging_dir
        eval_strategy eval_steps eval_delay prediction_loss_only eval_on_start eval_do_concat_batches
        eval_use_gather_object eval_accumulation_steps include_for_metrics batch_eval_metrics
        save_only_model save_strategy save_steps save_on_each_node save_total_limit
        push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision
        load_best_model_at_end metric_for_best_model greater_is_better ignore_data_skip
        restore_callback_states_from_checkpoint resume_from_checkpoint
        dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor
        remove_unused_columns label_names length_column_name
        ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_backend ddp_timeout debug
        fsdp_config skip_memory_metrics local_rank sortish_sampler predict_with_generate generation_max_length
        generation_num_beams generation_config
        ray_num_workers ray_init_kwargs master_addr master_port
        enable_torch_profiler profiler_output_dir profiler_wait_steps profiler_warmup_steps profiler_active_steps
        profiler_repeat profiler_record_shapes profiler_profile_memory profiler_with_stack profile_modules
        pref_beta pref_ftx pref_bco_weight pref_loss dpo_label_smoothing kto_chosen_weight kto_rejected_weight
        simpo_gamma ppo_buffer_size ppo_epochs ppo_score_norm ppo_target ppo_whiten_rewards reward_model
        reward_model_adapters reward_model_quantization_bit reward_model_type ld_alpha
        badam_verbose pissa_convert hyper_parallel_args
        use_swanlab swanlab_project swanlab_workspace swanlab_run_name swanlab_mode swanlab_api_key swanlab_logdir
        swanlab_lark_webhook_url swanlab_lark_secret
        compute_accuracy early_stopping_steps plot_loss include_effective_tokens_per_second
        do_sample temperature top_p top_k num_beams max_length max_new_tokens repetition_penalty length_penalty
        skip_special_tokens
    """,
    "refused": """
        mixture_of_depths use_unsloth use_kt use_mca use_hyper_parallel export_quantization_bit
        streaming neat_packing ignore_pad_token_for_loss fsdp auto_find_batch_size do_train
        enable_jit_checkpoint
    """,
}
_OURS: dict[Way, str] = {
    # By value in the run's identity; `storage` and each of `features` are in recipes too.
    "identity": """
        train_type component_name warmup_step update_step update_times train_step static_mix mixture_sample_rule
        init_mixture_proportions mixer_eval_dataset freeze_gate refresh mixture weighter storage exclude_targets
        prefilter
    """,
    # `components_cfg_file` and `plugins` say where parameters and code stand, which enter themselves; the target rows
    # that are drawn do so too. What a run is measured on has no part in what it trains.
    "no value": """
        components_cfg_file early_stopping_min_delta store on_missing keep_warmup features plugins token_budget
        fragment_rows nonfinite_limit checkpoint_on_signal leases warmup_split
        target_rows target_seed test_dataset test_reward test_reward_dataset test_tokens arms keep_texts
    """,
}
ARGUMENTS: dict[str, Way] = {name: way for way, names in _LLAMAFACTORY.items() for name in names.split()}
"""How every argument of LLaMA-Factory's argument classes enters."""
_STEPS_ALONE = frozenset(
    """
    seed data_seed optim optim_args optim_target_modules learning_rate adam_beta1 adam_beta2 adam_epsilon
    weight_decay max_grad_norm loraplus_lr_ratio loraplus_lr_embedding
    """.split()
)
"""Of those that enter a step, what acts on nothing before the first one. Optimizers that LLaMA-Factory loads the model
otherwise for are not among them."""
SETTINGS: dict[str, Way] = {name: way for way, names in _OURS.items() for name in names.split()}
"""The same of DataFlex's own keys; the parameters of components all enter the run's identity."""


def values(ways: Collection[str], *holders: Any) -> dict[str, Any]:
    """Return by name, as plain data, the arguments that enter in one of these ways; those that are off are left out.

    Args:
        ways: which, as `ARGUMENTS` names them.
        holders: instances of argument classes.
    """
    found = {}
    for holder in holders:
        for field in (each for each in dataclasses.fields(holder) if each.init):  # the others follow from these
            value, way = getattr(holder, field.name, None), ARGUMENTS.get(field.name)
            is_new = way is None and value != _default(field)
            if (way in ways or is_new) and value is not None and value is not False:
                is_file = way is not None and way.endswith("file") and isinstance(value, str) and Path(value).is_file()
                found[field.name] = {"sha256": file_digest(value)} if is_file else plain(value)
    return found


def of_evaluation(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of a run file's arguments that what its model is worth before any training may depend on.

    The seed is one of them where weights are drawn by it. What is not in the table is kept.
    """
    is_drawn = any(given.get(name) for name, way in ARGUMENTS.items() if way in ("drawn", "drawn file"))
    without = {name for name, way in ARGUMENTS.items() if way in ("schedule", "batch", "order", "no value")}
    without |= _STEPS_ALONE - ({"seed"} if is_drawn else set()) | {"eval_dataset"}
    return {name: value for name, value in given.items() if name not in without}


def is_path(value: str, argument: str | None = None) -> bool:
    """Say whether a text, of an argument or of none, can be nothing else than the path of a file or folder."""
    way = ARGUMENTS.get(argument or "")
    is_named = way in ("drawn file", "step file", "content", "reference") and argument != "model_revision"
    return is_named or "/" in value or _ENDING.search(value) is not None


def settings_in_identity(*holders: Any) -> dict[str, Any]:
    """Return by name, as plain data, those of DataFlex's own keys that enter the run's identity."""
    names = {name for name, way in SETTINGS.items() if way == "identity"}
    found = {name: value for holder in holders for name, value in holder.model_dump(mode="json", include=names).items()}
    # A run without one is what it was called before there were any.
    return {name: value for name, value in found.items() if name != "prefilter" or value is not None}


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
