"""What users of TRL, tunix and verl call the settings of a config, for hints to unknown keys."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

_STEP = "stages.NAME.questions_per_step"
_UPDATES = "stages.NAME.mini_batches_per_rollout"

# A name there (by who has it) -> the settings here; `stages.NAME` and `data.NAME` are any of them.
_TRL = {
    "num_generations": "stages.NAME.outputs_per_question",
    "num_generations_eval": "stages.NAME.held_out_samples",
    "beta": "stages.NAME.loss.kl_coefficient",
    "epsilon": "stages.NAME.loss.clip_low, stages.NAME.loss.clip_high",
    "epsilon_high": "stages.NAME.loss.clip_high",
    "delta": "stages.NAME.loss.dual_clip",
    "scale_rewards": "stages.NAME.loss.advantage_scale",
    "loss_type": "stages.NAME.objective.kind, stages.NAME.loss.normalisation",
    "importance_sampling_level": "stages.NAME.objective.kind, stages.NAME.objective.form",
    "sapo_temperature_pos": "stages.NAME.objective.temperature_positive",
    "sapo_temperature_neg": "stages.NAME.objective.temperature_negative",
    "use_bias_correction_kl": "stages.NAME.objective.kl_weighted",
    "vllm_importance_sampling_mode": "stages.NAME.objective.importance_level, "
    "stages.NAME.objective.importance_correction",
    "vllm_importance_sampling_cap": "stages.NAME.loss.importance_cap",
    "max_completion_length": "stages.NAME.max_new_tokens",
    "max_prompt_length": "data.NAME.max_prompt_tokens",
    "steps_per_generation": _UPDATES,
    "generation_batch_size": f"{_STEP}, {_UPDATES}",
    "mask_truncated_completions": "stages.NAME.mask_truncated",
    "reward_funcs": "rewards",
    "reward_weights": "rewards.NAME.weight",
    "sync_ref_model": "stages.NAME.reference_refresh_every",
    "ref_model_sync_steps": "stages.NAME.reference_refresh_every",
    "teacher_model_name_or_path": "stages.NAME.distillation.teacher",
    "loss_top_k": "stages.NAME.distillation.top_k",
    "chat_template_kwargs": "data.NAME.chat_template_kwargs",
    "max_length": "stages.NAME.row_tokens",
    "max_seq_length": "stages.NAME.row_tokens",
    "dataset_name": "data.NAME.source",
    "dataset_config": "data.NAME.options",
    "dataset_train_split": "data.NAME.split",
    "dataset_text_field": "data.NAME.fields",
    "model_name_or_path": "model.path",
    "torch_dtype": "model.param_dtype, model.compute_dtype",
    "dtype": "model.param_dtype, model.compute_dtype",
    "bf16": "model.compute_dtype",
    "attn_implementation": "model.attention",
    "gradient_checkpointing": "model.remat",
    "per_device_train_batch_size": f"{_STEP} or stages.NAME.rows_per_step",
    "gradient_accumulation_steps": "stages.NAME.micro_batches",
    "num_train_epochs": "stages.NAME.epochs",
    "max_steps": "stages.NAME.steps",
    "lr_scheduler_type": "stages.NAME.optimizer.schedule",
    "warmup_ratio": "stages.NAME.optimizer.warmup_steps",
    "adam_beta1": "stages.NAME.optimizer.beta1",
    "adam_beta2": "stages.NAME.optimizer.beta2",
    "adam_epsilon": "stages.NAME.optimizer.epsilon",
    "save_steps": "stages.NAME.checkpoint_every",
    "save_total_limit": "stages.NAME.keep_checkpoints",
    "eval_steps": "stages.NAME.held_out_every",
    "eval_strategy": "stages.NAME.held_out",
    "logging_steps": "stages.NAME.log_every",
    "output_dir": "output",
    "run_name": "name",
    "report_to": "trackers",
    "data_seed": "seed",
    "model_init_kwargs": "model",
    "entropy_coef": "stages.NAME.objective.entropy_coefficient",
    "vllm_importance_sampling_correction": "stages.NAME.loss.importance_correction",
    "vllm_importance_sampling_clip_max": "stages.NAME.loss.importance_cap",
    "vllm_importance_sampling_clip_min": "stages.NAME.loss.importance_floor",
    "router_aux_loss_coef": "stages.NAME.balance",
    "chat_template_path": "data.NAME.template",
    "fp16": "model.compute_dtype",
    "tf32": "model.compute_dtype",
    "per_device_eval_batch_size": "stages.NAME.problems_per_batch",
    "lr_scheduler_kwargs": "stages.NAME.optimizer",
    "log_completions": "stages.NAME.samples_every",
    "num_completions_to_print": "stages.NAME.samples_every",
    "deepspeed": "mesh.axes",
    "fsdp_config": "mesh.axes",
    "vllm_tensor_parallel_size": "mesh.rollout.axes",
}
_TUNIX = {
    "max_tokens_to_generate": "stages.NAME.max_new_tokens",
    "total_generation_steps": "stages.NAME.max_new_tokens",
    "loss_algo": "stages.NAME.loss.normalisation",
    "done_right": "stages.NAME.loss.advantage_scale, stages.NAME.loss.normalisation",
    "mini_batch_size": _STEP,
    "train_micro_batch_size": "stages.NAME.micro_batches",
    "rollout_micro_batch_size": "stages.NAME.rollout_batches",
    "compute_logps_micro_batch_size": "stages.NAME.micro_batches",
    "eval_every_n_steps": "stages.NAME.held_out_every",
    "checkpoint_root_directory": "output",
    "metrics_logging_options": "trackers",
    "reward_fns": "rewards",
    "role_to_mesh": "mesh.axes, mesh.rollout.axes, mesh.rollout.devices",
    "role_to_logical_axis_rule": "mesh.rules, mesh.rollout.rules",
    "actor_optimizer": "stages.NAME.optimizer",
    "critic_optimizer": "stages.NAME.critic",
    "algo_variant": "stages.NAME.objective.kind",
    "advantage_estimator": "stages.NAME.objective.kind",
    "policy_loss_fn": "stages.NAME.objective.kind",
    "kl_loss_mode": "stages.NAME.objective.kl_estimator",
    "kl_method": "stages.NAME.objective.kl_estimator",
    "degenerate_group_masking": "stages.NAME.dynamic_sampling",
    "overlong_filter": "stages.NAME.mask_truncated",
    "off_policy_steps": "stages.NAME.phases_of_lag",
    "sampler_is": "stages.NAME.loss.importance_correction",
    "sampler_is_threshold": "stages.NAME.loss.importance_cap",
    "gamma": "stages.NAME.objective.discount",
    "epsilon_low": "stages.NAME.loss.clip_low",
    "epsilon_c": "stages.NAME.loss.dual_clip",
    "clip_range_value": "stages.NAME.objective.value_clip",
    "checkpointing_options": "stages.NAME.checkpoint_every, stages.NAME.keep_checkpoints",
    "tensor_parallel_size": "mesh.rollout.axes",
    "data_parallel_size": "mesh.rollout.axes",
    "expert_parallel_size": "mesh.rollout.axes",
}
_VERL = {
    "n": "stages.NAME.outputs_per_question",
    "rollout_n": "stages.NAME.outputs_per_question",
    "train_batch_size": f"{_STEP}, {_UPDATES}",
    "ppo_mini_batch_size": _STEP,
    "ppo_micro_batch_size": "stages.NAME.micro_batches",
    "ppo_micro_batch_size_per_gpu": "stages.NAME.micro_batches",
    "clip_ratio": "stages.NAME.loss.clip_low, stages.NAME.loss.clip_high",
    "clip_ratio_low": "stages.NAME.loss.clip_low",
    "clip_ratio_high": "stages.NAME.loss.clip_high",
    "clip_ratio_c": "stages.NAME.loss.dual_clip",
    "kl_loss_coef": "stages.NAME.loss.kl_coefficient",
    "kl_coef": "stages.NAME.loss.kl_coefficient",
    "use_kl_loss": "stages.NAME.loss.kl_coefficient",
    "loss_agg_mode": "stages.NAME.loss.normalisation",
    "loss_mode": "stages.NAME.objective.kind",
    "adv_estimator": "stages.NAME.objective.kind",
    "tau_pos": "stages.NAME.objective.temperature_positive",
    "tau_neg": "stages.NAME.objective.temperature_negative",
    "kl_loss_type": "stages.NAME.objective.kl_estimator",
    "kl_penalty": "stages.NAME.objective.kl_estimator",
    "use_kl_in_reward": "stages.NAME.objective.kl_in",
    "entropy_coeff": "stages.NAME.objective.entropy_coefficient",
    "norm_adv_by_std_in_grpo": "stages.NAME.loss.advantage_scale",
    "filter_groups": "stages.NAME.dynamic_sampling",
    "max_num_gen_batches": "stages.NAME.dynamic_sampling.max_questions",
    "gen_batch_size": "stages.NAME.dynamic_sampling.questions_at_once",
    "max_response_length": "stages.NAME.max_new_tokens",
    "response_length": "stages.NAME.max_new_tokens",
    "prompt_length": "data.NAME.max_prompt_tokens",
    "train_files": "data.NAME.source",
    "val_files": "stages.NAME.held_out",
    "prompt_key": "data.NAME.fields",
    "reward_fn_key": "data.NAME.domain",
    "custom_reward_function": "rewards",
    "grad_clip": "stages.NAME.optimizer.max_grad_norm",
    "lr": "stages.NAME.optimizer.learning_rate",
    "lr_warmup_steps": "stages.NAME.optimizer.warmup_steps",
    "lr_warmup_steps_ratio": "stages.NAME.optimizer.warmup_steps",
    "warmup_style": "stages.NAME.optimizer.schedule",
    "min_lr_ratio": "stages.NAME.optimizer.final_fraction",
    "total_epochs": "stages.NAME.epochs",
    "total_training_steps": "stages.NAME.steps",
    "save_freq": "stages.NAME.checkpoint_every",
    "test_freq": "stages.NAME.held_out_every",
    "max_actor_ckpt_to_keep": "stages.NAME.keep_checkpoints",
    "experiment_name": "name",
    "logger": "trackers",
    "default_local_dir": "output",
    "enable_gradient_checkpointing": "model.remat",
    "tensor_model_parallel_size": "mesh.axes",
    "ulysses_sequence_parallel_size": "mesh.axes",
    "fsdp_size": "mesh.axes",
    "actor_rollout_ref": "model, mesh and stages",
    "algorithm": "stages.NAME.objective",
    "trainer": "stages",
}

OTHER_NAMES: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {"TRL": _TRL, "tunix": _TUNIX, "verl": _VERL}
)
"""Library -> its names of settings -> their keys here. tunix has some of TRL's names, too."""

NO_COUNTERPARTS: Mapping[str, str] = MappingProxyType(
    {
        "num_iterations": "a sample is trained on once; mini_batches_per_rollout makes several "
        "updates of one rollout phase",
        "ppo_epochs": "a sample is trained on once; mini_batches_per_rollout makes several updates "
        "of one rollout phase",
        "use_vllm": "the model samples itself, on the same devices",
        "vllm_mode": "the model samples itself, on the same devices",
        "packing": "rows are always packed",
        "assistant_only_loss": "sft trains the assistant's part alone",
        "completion_only_loss": "sft trains the assistant's part alone",
        "resume_from_checkpoint": "the same command goes on from the last checkpoint",
        "kv_cache_size": "it follows from max_prompt_tokens and max_new_tokens",
        "rollout_engine": "the model samples itself, on the same devices",
        "offload_to_cpu": "weights stay on the devices; mesh.axes splits them",
        "disable_dropout": "there is no dropout",
        "use_liger_kernel": "the vocabulary is never whole: log-probs are computed in chunks",
        "trust_remote_code": "no code of a model directory is run",
        "eos_token": "it is the tokenizer's and that of generation_config.json",
        "pad_token": "it is the tokenizer's",
        "padding_free": "rows are always packed",
        "packing_strategy": "rows are packed, best fit first",
        "truncation_mode": "longer rows are left out and counted",
        "shuffle_dataset": "the order of each epoch follows from seed",
        "remove_unused_columns": "only the columns that data.NAME.fields and the rewards name are "
        "read",
        "load_best_model_at_end": "any kept checkpoint can be sampled, evaluated and exported: "
        "RUN_DIR@STEP",
        "ref_model_mixup_alpha": "the reference becomes the policy as a whole, every "
        "reference_refresh_every steps",
        "top_entropy_quantile": "all tokens of a completion are trained",
        "repetition_penalty": "the sampler draws from the policy itself, or log-probs would not be "
        "its own",
        "push_to_hub": "r1jax export writes a Hugging Face directory, which you upload",
        "use_peft": "all weights are trained; there are no adapters",
        "peft_config": "all weights are trained; there are no adapters",
        "load_in_4bit": "weights are trained as model.param_dtype says; there is no quantization",
        "load_in_8bit": "weights are trained as model.param_dtype says; there is no quantization",
        "max_tool_calling_iterations": "there are no tools",
    }
)
"""Settings there that have none here, and why."""

_NO_COUNTERPARTS_FROM: Mapping[str, str] = MappingProxyType(
    {
        "vllm_": NO_COUNTERPARTS["use_vllm"],
        "rollout_vllm_": NO_COUNTERPARTS["use_vllm"],
        "rollout_sglang_": NO_COUNTERPARTS["use_vllm"],
        "lora_": NO_COUNTERPARTS["use_peft"],
        "bnb_": NO_COUNTERPARTS["load_in_4bit"],
    }
)
"""The same, by how a name begins."""


def other_name(key: str, section: str) -> str | None:
    """`TRL's num_generations is ... here`, for a key of a section such as `stages.rl`; or None."""
    for library, names in OTHER_NAMES.items():
        if key in names:
            kind, _, name = section.partition(".")
            own = f"{kind}.{name.partition('.')[0]}"
            here = names[key].replace(f"{kind}.NAME", own) if name else names[key]
            return f"{library}'s {key} is {here} here"
    why = no_counterpart(key)
    return None if why is None else f"there is none here: {why}"


def no_counterpart(key: str) -> str | None:
    """Why a setting there has none here; None: it has one, or is not known."""
    if key in NO_COUNTERPARTS or any(key in names for names in OTHER_NAMES.values()):
        return NO_COUNTERPARTS.get(key)
    beginnings = (why for start, why in _NO_COUNTERPARTS_FROM.items() if key.startswith(start))
    return next(beginnings, None)
