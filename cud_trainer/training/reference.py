"""What the model before unlearning said of each sample: computed when a run starts, found again when it starts anew."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..logprobs import score_answers
from ..models.fingerprint import model_fingerprint
from ..models.modes import drawing_nothing, evaluation_mode, left_as_found
from ..objectives import Reference
from ..objectives.alternatives import alternatives_fingerprint
from ..schedule.orders import rank
from .checkpoints import REFERENCE_FILE
from .inputs import RunInputs
from .plan import RunPlan


def run_reference(trainer: Any, inputs: RunInputs, plan: RunPlan) -> Reference:
    """Reference quantities, from `output_dir` where an earlier start of this run left them.

    Args:
        trainer: whose model is as it will be trained, with its adapter if it has one.
    """
    reference = _reference(trainer, inputs, plan)
    difficulty = None
    if plan.scores is not None and inputs.args.difficulty in plan.scores.columns:
        difficulty = plan.scores[inputs.args.difficulty]
    lengths = np.asarray(inputs.forget.answer_lengths, dtype=np.float64)
    scale = inputs.loss.option_scale(lengths, None if difficulty is None else rank(difficulty))
    reference.option_scale = None if scale is None else torch.from_numpy(scale)
    reference.part = None if plan.part is None else torch.from_numpy(plan.part)
    return reference


def _reference(trainer: Any, inputs: RunInputs, plan: RunPlan) -> Reference:
    loss, args = inputs.loss, inputs.args
    if not loss.uses_reference and not loss.uses_hidden:
        return Reference()
    device = trainer.model.get_input_embeddings().weight.device
    served = np.unique(plan.rows["retain_index"]).tolist()
    fingerprint = _fingerprint(trainer, inputs, served)
    path = Path(args.output_dir) / REFERENCE_FILE
    earlier = Reference.load(path, fingerprint, device)
    if earlier is not None:
        return earlier
    with trainer.accelerator.autocast():
        reference = loss.reference(
            trainer.model,
            inputs.forget,
            inputs.retain,
            batch_size=args.per_device_train_batch_size,
            device=device,
            seed=args.seed,
            retain_rows=served,
        )
    trainer.accelerator.wait_for_everyone()  # nobody may find it who has not looked yet
    if trainer.is_world_process_zero():
        reference.save(path, fingerprint)
    return reference


# Nats of a mean answer log-probability that may lie between two forward passes of the same model: rounding.
SAME = {torch.float64: 1e-6, torch.float32: 0.01}
SAME_IN_HALF_PRECISION = 0.1


@torch.no_grad()
def check_training_mode(trainer: Any, inputs: RunInputs) -> None:
    """Raise `ValueError` when the model says something else in training mode than in evaluation mode.

    The log-ratio to the reference would not be 0 at the first step, and what a run follows would be noise. Dropout and
    its like are off, see `drawing_nothing`; a model's own code may draw in a way of its own.
    """
    model, row = trainer.model, min(range(len(inputs.forget)), key=inputs.forget.lengths.__getitem__)
    device = model.get_input_embeddings().weight.device
    batch = {key: value.to(device) for key, value in inputs.forget.pad([row]).items()}
    devices = [device] if device.type == "cuda" else []

    def said() -> float:
        return float(score_answers(model, dict(batch)).mean_logps)

    with trainer.accelerator.autocast(), torch.random.fork_rng(devices=devices), left_as_found(model):
        with evaluation_mode(model):
            before = said()
        model.train()
        with drawing_nothing(model):
            apart = max(abs(said() - before) for _ in range(2))
    half = inputs.args.bf16 or inputs.args.fp16
    dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    if apart > (SAME_IN_HALF_PRECISION if half else SAME.get(dtype, SAME_IN_HALF_PRECISION)):
        raise ValueError(
            f"the model says something else in training mode than in evaluation mode (by {apart:.3g} nats a token, "
            "with dropout off): it cannot be compared with what it said before. Use an objective without a reference, "
            "a retain_loss other than 'kl', and a schedule that does not follow the run"
        )


def _fingerprint(trainer: Any, inputs: RunInputs, served: list[int]) -> str:
    """Of all that the quantities depend on, 16 hex digits."""
    loss, args = inputs.loss, inputs.args
    parts = [
        model_fingerprint(trainer.accelerator.unwrap_model(trainer.model)),
        inputs.forget.fingerprint,
        "" if inputs.retain is None else f"{inputs.retain.fingerprint} {served}",
        str(alternatives_fingerprint(inputs.forget)),
        json.dumps([loss.objective, loss.objective_args, loss.retain_loss, loss.reference_top_k, args.seed]),
        *([json.dumps(loss.by_bucket)] if loss.by_bucket else []),
        f"{args.bf16}{args.fp16}{args.per_device_train_batch_size}",
    ]
    return hashlib.sha256("|".join(parts).encode()).hexdigest()[:16]
