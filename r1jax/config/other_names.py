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
    }
)
"""Settings there that have none here, and why."""


def other_name(key: str, section: str) -> str | None:
    """`TRL's num_generations is ... here`, for a key of a section such as `stages.rl`; or None."""
    if key in NO_COUNTERPARTS:
        return f"there is none here: {NO_COUNTERPARTS[key]}"
    for library, names in OTHER_NAMES.items():
        if key in names:
            kind, _, name = section.partition(".")
            own = f"{kind}.{name.partition('.')[0]}"
            here = names[key].replace(f"{kind}.NAME", own) if name else names[key]
            return f"{library}'s {key} is {here} here"
    return None
