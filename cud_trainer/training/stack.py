"""What TRL, transformers and the machine would refuse in a run, refused before anything is computed."""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
from accelerate.utils import DynamoBackend
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import get_scheduler
from transformers.integrations import get_reporting_integration_callbacks
from transformers.training_args import ParallelMode
from transformers.utils import is_liger_kernel_available, logging
from trl import SFTTrainer

from ..config import CUDConfig
from ..models.layers import base_causal_lm
from ..models.matrices import weight_matrices
from ..models.trainable import movable_share
from .hooks import make_repository

logger = logging.get_logger(__name__)
SAVES = "zero_optimization.stage3_gather_16bit_weights_on_model_save"
MOST = 0.9  # of the weights: fewer that can move are worth a word
# What packages raise that lack another one, or an option.
REFUSALS = (ImportError, RuntimeError, ValueError, TypeError, KeyError, AttributeError, AssertionError)


def check_stack(args: CUDConfig, model: nn.Module, *, own_optimizer: bool) -> None:
    """Raise `ValueError` naming the option that this model or machine cannot have.

    Args:
        own_optimizer: whether the user brings optimizer and scheduler.
    """
    _check_trackers(args)
    _check_backends(args)
    if not own_optimizer:
        _check_optimizer(args, model)
    devices = getattr(model, "hf_device_map", None) or {}
    if args.n_gpu > 1 and len(set(devices.values())) < 2:
        raise ValueError(
            f"{args.n_gpu} GPUs are visible to one process: start with `accelerate launch` or `torchrun`, or make one "
            "visible (CUDA_VISIBLE_DEVICES)"
        )
    checkpointed = args.gradient_checkpointing or getattr(args, "activation_checkpointing", False)
    base = base_causal_lm(model)
    if checkpointed and not getattr(base, "supports_gradient_checkpointing", True):
        raise ValueError(f"{type(base).__name__} has no gradient checkpointing: set gradient_checkpointing to False")
    if checkpointed:
        _check_checkpointing(args)
    if args.log_update_share:
        try:
            weight_matrices(model)
        except ValueError as error:
            raise ValueError(f"log_update_share cannot be: {error}") from None
    if args.push_to_hub and args.process_index == 0:
        try:
            make_repository(args)
        except Exception as error:  # of the network, the hub, or a token
            raise ValueError(f"push_to_hub: cannot make the repository: {str(error)[:300]}") from error


def warn_of_still_weights(args: CUDConfig, model: nn.Module) -> None:
    """Say how many of the weights can move, where they are in bfloat16 and most are too large for such steps."""
    share = movable_share(model, args.learning_rate)
    if share is not None and share < MOST and args.learning_rate:
        logger.warning(
            f"the weights to train are bfloat16, and {share:.0%} of them can move at learning_rate="
            f"{args.learning_rate:g}: in the others a step of that size rounds to nothing. Load them in float32 "
            "(dtype float32; bf16 keeps the speed), train an adapter (LoRA), or raise the rate"
        )


def _check_backends(args: CUDConfig) -> None:
    """What the libraries only refuse when they are set up."""
    if args.fsdp and args.parallel_mode != ParallelMode.DISTRIBUTED:
        raise ValueError("fsdp splits a model over processes: start with `accelerate launch` or `torchrun`")
    _check_deepspeed(args)
    if args.use_liger_kernel and not is_liger_kernel_available():
        raise ValueError("use_liger_kernel needs the package liger-kernel (pip install liger-kernel)")
    if args.torch_compile and args.torch_compile_backend:
        known = [backend.value.lower() for backend in DynamoBackend]
        if args.torch_compile_backend.lower() not in known:
            raise ValueError(f"torch_compile_backend must be one of {known}, got {args.torch_compile_backend!r}")
        if args.torch_compile_mode:
            try:
                torch.compile(
                    torch.nn.Identity(), mode=args.torch_compile_mode, backend=args.torch_compile_backend.lower()
                )
            except REFUSALS as error:
                raise ValueError(f"torch_compile_mode {args.torch_compile_mode!r}: {str(error)[:300]}") from error
    if args.activation_offloading and args.device.type == "cpu":
        raise ValueError("activation_offloading needs an accelerator: on the CPU activations are there already")
    if args.dataloader_persistent_workers and not args.dataloader_num_workers:
        raise ValueError("dataloader_persistent_workers has no effect without dataloader_num_workers")
    takes_modules = any(name in str(getattr(args.optim, "value", args.optim)) for name in ("galore", "apollo"))
    if args.optim_target_modules and not takes_modules:
        raise ValueError("optim_target_modules has no effect without an optim of the kinds galore and apollo")


def _check_checkpointing(args: CUDConfig) -> None:
    given = args.gradient_checkpointing_kwargs or getattr(args, "activation_checkpointing_kwargs", None) or {}
    weight = torch.zeros(1, requires_grad=True)
    try:
        checkpoint(torch.nn.functional.relu, weight, **{"use_reentrant": False, **given})
    except REFUSALS as error:
        raise ValueError(f"gradient_checkpointing_kwargs {given}: {str(error)[:300]}") from error


def _check_deepspeed(args: CUDConfig) -> None:
    """What a configuration of DeepSpeed leaves out, and would leave undone in silence."""
    if args.deepspeed_plugin is None:
        return
    settings = args.deepspeed_plugin.hf_ds_config
    if settings.is_zero3() and not settings.is_true(SAVES):
        raise ValueError(
            f"deepspeed: with stage 3 no model would be saved: set {SAVES} to true (zero3_save_16bit_model in a "
            "configuration of accelerate)"
        )
    if args.max_grad_norm and settings.get_value("gradient_clipping") is None:
        raise ValueError(
            f"deepspeed: without gradient_clipping no gradient is clipped, and max_grad_norm={args.max_grad_norm:g} "
            'has no effect: set gradient_clipping to "auto", or max_grad_norm to 0'
        )


def _check_trackers(args: CUDConfig) -> None:
    for name in args.report_to or ():
        try:
            for tracker in get_reporting_integration_callbacks([name]):
                tracker()
        except REFUSALS as error:
            raise ValueError(f"report_to {name!r}: {str(error)[:300]}") from error


def _check_optimizer(args: CUDConfig, model: nn.Module) -> None:
    weight = nn.Parameter(torch.zeros(1))
    try:
        kind, options = SFTTrainer.get_optimizer_cls_and_kwargs(args, base_causal_lm(model))
        if kind.__module__.startswith("torch.optim"):
            kind([weight], **options)
        unread = _unread(args, model, options)
    except REFUSALS as error:
        raise ValueError(f"optim {getattr(args.optim, 'value', args.optim)!r}: {str(error)[:300]}") from error
    if unread:
        raise ValueError(f"optim_args: optim {getattr(args.optim, 'value', args.optim)!r} has no option {unread[0]!r}")
    name = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
    if name == "constant" and args.lr_scheduler_kwargs:
        raise ValueError(f"lr_scheduler_type 'constant' has no options, got {args.lr_scheduler_kwargs}")
    steps = 10  # of a run that is not made
    try:
        get_scheduler(
            args.lr_scheduler_type,
            torch.optim.SGD([weight], lr=args.learning_rate),
            num_warmup_steps=args.get_warmup_steps(steps),
            num_training_steps=steps,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs,  # type: ignore[arg-type]
        )
    except REFUSALS as error:
        raise ValueError(f"lr_scheduler_type {name!r}: {str(error)[:300]}") from error


def _unread(args: CUDConfig, model: nn.Module, options: dict[str, Any]) -> list[str]:
    """Names in `optim_args` that transformers does not read for this optimizer: any other text there is as good.

    Args:
        options: what it makes of all of them.
    """
    given = dict(pair.split("=") for pair in (args.optim_args or "").replace(" ", "").split(",") if pair)
    unread, other = [], copy.copy(args)
    for name in given:
        try:
            for text in ("x", "true"):
                other.optim_args = ",".join(f"{key}={text if key == name else given[key]}" for key in given)
                if repr(SFTTrainer.get_optimizer_cls_and_kwargs(other, base_causal_lm(model))[1]) != repr(options):
                    break
            else:
                unread.append(name)
        except REFUSALS:  # which is read
            continue
    return unread


def check_best_metric(args: CUDConfig, evaluated: Any, *, kept: list[str], own_metrics: bool) -> None:
    """Raise `ValueError` when checkpoints are to be compared by a metric that no evaluation of this run has.

    Args:
        evaluated: the user's datasets for an evaluation loss, if any.
        kept: the metrics of what is to be kept, of the sets that there are.
        own_metrics: whether the user computes metrics, whose names are not known.
    """
    compares = args.load_best_model_at_end or str(getattr(args.save_strategy, "value", args.save_strategy)) == "best"
    plateau = "plateau" in str(args.lr_scheduler_type)
    if args.metric_for_best_model is None or not (compares or plateau) or own_metrics:
        return
    name = args.metric_for_best_model.removeprefix("eval_")
    known = ["balance", "forget_prob", "forget_extraction", *kept]
    if args.difficulty is not None:
        known += [f"forget_prob/bucket_{number}" for number in range(1, args.n_buckets + 1)]
    if isinstance(evaluated, dict):
        known += [f"{part}_loss" for part in evaluated]
    elif evaluated is not None:
        known.append("loss")
    prefixes = [f"{part}_" for part in evaluated] if isinstance(evaluated, dict) else [""]
    of_trl = evaluated is not None and any(
        name.startswith(prefix) and re.fullmatch("entropy|mean_token_accuracy|aux_loss", name.removeprefix(prefix))
        for prefix in prefixes
    )
    if name not in known and not of_trl:
        raise ValueError(
            f"metric_for_best_model {args.metric_for_best_model!r} is measured by no evaluation of this run; choose "
            f"one of {known}"
        )
