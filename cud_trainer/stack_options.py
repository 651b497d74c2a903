"""What the options of TRL and transformers come to in an unlearning run: they act, are refused, or have no effect.

One table over every field of `SFTConfig` (and so of `TrainingArguments`). An option is never dropped in silence.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from accelerate.utils import parse_flag_from_env

ORDER = "is not supported: samples must stay whole and in the order of the schedule"
PREPARED = "is not supported: rows are prepared from what their columns are called, rename the column"

# Another value than the default is an error, for this reason.
REFUSED = {
    "num_train_epochs": "must be 1: set `passes` instead",
    "train_sampling_strategy": "would undo the schedule: it must stay 'sequential'",
    "remove_unused_columns": "must stay False: the schedule's columns are part of a batch",
    "packing": ORDER,
    "padding_free": ORDER,
    "eval_packing": ORDER,
    "shuffle_dataset": ORDER,
    "auto_find_batch_size": ORDER,
    "ignore_data_skip": ORDER,
    "dataloader_in_order": ORDER,
    "assistant_only_loss": "is not supported: the answer of a sample is what its last message says",
    "completion_only_loss": "cannot be False: only answers are unlearned",
    "truncation_mode": "is not supported: a sample that is too long is refused, never cut",
    "dataset_text_field": PREPARED,
    "dataset_kwargs": "is not supported: what a run trains on is prepared by it",
    "label_names": "is not supported: what a run trains on is prepared by it",
    "loss_type": "is not supported: the loss is that of `objective`",
    "label_smoothing_factor": "is not supported: the loss is that of `objective`",
    "router_aux_loss_coef": "is not supported: the loss is that of `objective`, without a load balancing term",
    "bf16_full_eval": "is not supported: it would leave the model in bfloat16; use bf16",
    "fp16_full_eval": "is not supported: it would leave the model in float16; use fp16",
    "parallelism_config": "is not supported: a sample is not split over devices",
    "enable_jit_checkpoint": "is not supported: such a checkpoint has no position in the schedule; use save_steps",
}
# Values beside the default that say no more than what is done anyway.
HARMLESS: dict[str, tuple[Any, ...]] = {
    "completion_only_loss": (True,),
    "eval_packing": (False,),
    "loss_type": ("chunked_nll",),
    "router_aux_loss_coef": (0.0,),
    "dataset_kwargs": ({"skip_prepare_dataset": True}, {}),
    "label_names": ([], ["labels"]),
}
# Another value than the default changes nothing, for this reason.
IDLE = {
    "average_tokens_across_devices": "losses are means over pairs",
    "data_seed": "the order comes from `seed`",
    "dataloader_drop_last": "the plan has whole batches only",
    "dataset_num_proc": "samples are prepared in one process",
    "do_eval": "it is read by scripts only; set `eval_strategy`",
    "do_predict": "it is read by scripts only",
    "do_train": "it is read by scripts only",
    "length_column_name": "nothing is grouped by length",
    "packing_strategy": "nothing is packed",
    "use_cache": "training has no use for a cache",
}
# These do what they say; what the packages around the trainer refuse in them is refused before any compute.
ACTS = frozenset(
    """
    output_dir per_device_train_batch_size max_steps learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps
    optim optim_args optim_target_modules weight_decay adam_beta1 adam_beta2 adam_epsilon gradient_accumulation_steps
    max_grad_norm bf16 fp16 tf32 activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing
    gradient_checkpointing_kwargs activation_offloading torch_compile torch_compile_backend torch_compile_mode
    use_liger_kernel liger_kernel_config neftune_noise_alpha torch_empty_cache_steps
    logging_strategy logging_steps logging_first_step log_on_each_node logging_nan_inf_filter
    include_num_input_tokens_seen log_level log_level_replica disable_tqdm report_to run_name project trackio_space_id
    trackio_bucket_id trackio_static_space_id
    eval_strategy eval_steps eval_delay per_device_eval_batch_size prediction_loss_only eval_on_start
    eval_do_concat_batches eval_use_gather_object eval_accumulation_steps include_for_metrics batch_eval_metrics
    save_only_model save_strategy save_steps save_on_each_node save_total_limit push_to_hub hub_token hub_private_repo
    hub_model_id hub_strategy hub_always_push hub_revision load_best_model_at_end metric_for_best_model
    greater_is_better restore_callback_states_from_checkpoint resume_from_checkpoint
    full_determinism seed use_cpu accelerator_config dataloader_num_workers dataloader_pin_memory
    dataloader_persistent_workers dataloader_prefetch_factor dataloader_multiprocessing_context
    ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout fsdp
    fsdp_config deepspeed debug skip_memory_metrics local_rank
    model_init_kwargs trust_remote_code chat_template_path eos_token pad_token max_length pad_to_multiple_of
    """.split()
)

# Of `ACTS`, those that do nothing without another one.
NEEDS = {"hub_strategy": "push_to_hub", "hub_always_push": "push_to_hub"}

# Old names that warn whoever reads this project's options, where transformers has the new ones.
RENAMED = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}

# Of these a command that uploads nothing makes no use; in Python `push_to_hub()` may be called later.
OF_AN_UPLOAD = (
    "hub_token",
    "hub_private_repo",
    "hub_model_id",
    "hub_revision",
    "hub_strategy",
    "hub_always_push",
    "hub_difficulty",
)

# What may differ between a checkpoint and the run that goes on from it, if it is asked for.
OVERRIDABLE = (
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "retain_weight",
    "retain_weight_end",
    "retain_limit",
    "dual_rate",
)


def check_stack_options(config: Any, stack: Iterable[dataclasses.Field]) -> list[str]:
    """Raise `ValueError` for an option of the stack that cannot be; what has no effect is returned, a line each.

    Args:
        config: options as they were given, before anything is derived from them.
        stack: fields of the configuration of TRL that is installed.
    """
    defaults = {field.name: _default(field) for field in dataclasses.fields(config)}
    lines = []
    for name in (field.name for field in stack):
        value = getattr(config, name)
        if name in NEEDS and value != defaults[name] and not getattr(config, NEEDS[name]):
            lines.append(f"{name}={value!r} has no effect without {NEEDS[name]}")
        if value == defaults[name] or value in HARMLESS.get(name, ()) or name in ACTS:
            continue
        if name in REFUSED:
            raise ValueError(f"{name} {REFUSED[name]} (got {value!r})")
        why = IDLE.get(name, "this version does not know it")
        lines.append(f"{name}={value!r} has no effect: {why}")
    return lines


def under_new_names(config: Any) -> None:
    """Hand on what stands under an old name (`RENAMED`) under the new one, where the installed transformers has it.

    Args:
        config: options as they were given, before the base class takes them in.
    """
    known = {field.name for field in dataclasses.fields(config)}
    for old, new in RENAMED.items():
        if new in known and getattr(config, new) is None:
            setattr(config, new, getattr(config, old))


def _default(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def higher_is_better(metric: str) -> bool:
    """Direction of a metric that checkpoints are compared by: what is left of the forget set, and losses, are better
    lower."""
    name = metric.removeprefix("eval_")
    return not (name.endswith("loss") or name.split("/")[0] in ("forget_prob", "forget_extraction"))


def sharded_by(args: Any) -> str | None:
    """What splits the model over processes, by its name."""
    for name, given in (("FSDP", args.fsdp), ("DeepSpeed", args.deepspeed)):
        if given or parse_flag_from_env(f"ACCELERATE_USE_{name.upper()}"):
            return name
    return None
