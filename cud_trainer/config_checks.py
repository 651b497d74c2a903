"""What `CUDConfig` refuses of options that contradict each other, before any compute.

Each takes a `CUDConfig`; errors are one line that names the option.
"""

from __future__ import annotations

import os
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers.integrations.deepspeed import is_deepspeed_available
from transformers.trainer_pt_utils import AcceleratorConfig

from .circuits.components import check_trainable
from .models.trainable import layer_range
from .objectives import STEPS, UnlearningLoss
from .stack_options import OVERRIDABLE
from .typed import check_numbers_within

LOG_LEVELS = ("detail", "debug", "info", "warning", "error", "critical", "passive")


def check_step(config: Any, loss: UnlearningLoss) -> None:
    step = STEPS.find(config.step)
    step.check_options(config.step_args)  # type: ignore[arg-type]
    if config.step == "plain":
        return
    if step.requires_retain and not loss.uses_retain:
        raise ValueError(f"step {config.step!r} needs a retain loss, but retain_loss is 'none'")
    if config.mixed_precision == "fp16":
        raise ValueError(f"step {config.step!r} is not supported with fp16, whose scaled gradients overflow: use bf16")
    optimizer = str(getattr(config.optim, "value", config.optim))
    if "lomo" in optimizer:
        raise ValueError(f"step {config.step!r} is not supported with optim {optimizer!r}, which keeps no gradients")
    if config.log_update_share:
        raise ValueError(f"log_update_share is not supported with step {config.step!r}: it looks at plain steps")


def check_mappings(config: Any) -> None:
    """Raise `ValueError` for a mapping that is none, or a file that is not there."""
    for name in config._VALID_DICT_FIELDS:
        value = getattr(config, name)
        if isinstance(value, str) and value and not value.startswith("{"):
            if name not in ("fsdp_config", "deepspeed", "accelerator_config"):
                raise ValueError(f"{name} must be a mapping, got {value!r}")
            if not Path(value).expanduser().is_file():
                raise ValueError(f"{name} {value} is no file")
        check_numbers_within(name, value)
    if isinstance(config.accelerator_config, dict):
        known = [one.name for one in fields(AcceleratorConfig)]
        for name in config.accelerator_config:
            if name not in known:
                raise ValueError(f"accelerator_config has no option {name!r}; it has {known}")
    if config.deepspeed and not is_deepspeed_available():
        raise ValueError("deepspeed needs the package deepspeed (pip install cud-trainer[deepspeed])")
    if config.log_level not in LOG_LEVELS or config.log_level_replica not in LOG_LEVELS:
        raise ValueError(f"log_level and log_level_replica must be one of {LOG_LEVELS}")


def check_objective(config: Any, loss: UnlearningLoss) -> None:
    for name, low, high in (
        ("retain_limit", 0.0, float("inf")),
        ("retain_weight_end", 0.0, float("inf")),
        ("max_retain_loss", 0.0, float("inf")),
        ("target_forget_prob", 0.0, 1.0),
        ("dual_rate", 0.0, float("inf")),
    ):
        value = getattr(config, name)
        if value is not None and (isinstance(value, bool) or not low < value < high):
            raise ValueError(f"{name} must be a number between {low:g} and {high:g}, got {value!r}")
    if config.retain_weight_end is not None and config.retain_limit is not None:
        raise ValueError("retain_weight_end and retain_limit both move the retain weight: give one of them")
    if config.retain_weight_end is not None and not config.retain_weight > 0:
        raise ValueError("retain_weight_end is reached by equal ratios: retain_weight must be above 0")
    for name in ("retain_limit", "max_retain_loss", "retain_weight_end"):
        if getattr(config, name) is not None and not loss.uses_retain:
            raise ValueError(f"{name} needs a retain loss, but retain_loss is 'none'")
    if "difficulty" in loss.by.values() and config.difficulty is None:
        raise ValueError(f"objective {config.objective!r} has an option by difficulty, but difficulty is 'none'")
    if loss.own and config.difficulty is None:
        raise ValueError("objective_by_bucket goes by difficulty, but difficulty is 'none'")
    if max(loss.own, default=0) > config.n_buckets:
        raise ValueError(f"objective_by_bucket: there is no bucket {max(loss.own)}, n_buckets is {config.n_buckets}")
    for part, _ in config.schedule_parts:
        if part.weighs_retain and not loss.uses_retain:
            raise ValueError(f"schedule {part.name!r} weights the retain loss, too, but retain_loss is 'none'")
    if any(part.spec.name == "pdu" for part in loss.parts) and config.retain_limit is None:
        raise ValueError("objective 'pdu' holds the retain loss at a limit: give retain_limit")
    if config.loss_normalization not in ("sample", "token"):
        raise ValueError(f"loss_normalization must be 'sample' or 'token', got {config.loss_normalization!r}")
    if config.loss_normalization == "token" and not loss.token_mean:
        raise ValueError(
            f"loss_normalization 'token' averages over tokens, but the loss of objective {config.objective!r} is one "
            "of whole samples"
        )
    alternative = loss.alternative
    if alternative == "given" and config.alternative_column is None:
        raise ValueError(f"objective {config.objective!r} needs alternative answers: give alternative_column")
    if alternative != "given" and config.alternative_column is not None:
        raise ValueError(
            f"alternative_column belongs to objectives with given alternatives ('dpo'), not to {config.objective!r}"
        )
    if alternative != "refusal" and config.refusals is not None:
        raise ValueError(f"refusals belong to 'idk_dpo' and 'idk_nll', not to {config.objective!r}")
    if config.trainable_layers is not None:
        layer_range(config.trainable_layers)
    check_trainable(config.trainable, config.trainable_layers, config.circuit_args)  # type: ignore[arg-type]
    follows = any(part.kind == "dynamic" for part, _ in config.schedule_parts) or config.target_forget_prob
    if config.neftune_noise_alpha is not None and (loss.uses_reference or follows):
        raise ValueError(
            "neftune_noise_alpha draws noise at every step: the model could not be compared with what it said "
            "before, as this objective, retain loss, schedule or stop does"
        )


def check_checkpoints(config: Any) -> None:
    if config.save_strategy == "best" and config.metric_for_best_model is None:
        raise ValueError("save_strategy 'best' compares checkpoints by metric_for_best_model: give it")
    for name in config.override or ():
        if name not in OVERRIDABLE:
            raise ValueError(f"override cannot change {name!r} of a run that goes on; choose from {list(OVERRIDABLE)}")


def check_launch(config: Any) -> None:
    """Raise `ValueError` where a launcher started several processes, of which each would do all of the work."""
    started = os.environ.get("WORLD_SIZE", "")
    if started.isdecimal() and int(started) > 1 and config.world_size == 1:
        raise ValueError(
            f"a launcher started {started} processes, but transformers takes each for the only one: on a CPU it needs "
            "use_cpu"
        )


def check_accelerator(config: Any) -> None:
    if config.accelerator_config is not None and getattr(config.accelerator_config, "dispatch_batches", None):
        raise ValueError("accelerator_config.dispatch_batches is not supported: batches differ in length")
    if config.accelerator_config is not None and getattr(config.accelerator_config, "split_batches", None):
        raise ValueError("accelerator_config.split_batches is not supported: it changes the global batch")
