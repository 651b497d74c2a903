"""`RunPlan`: what a run will do, decided before the model is wrapped."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from transformers.utils import logging

from ..data import PairedCollator
from ..difficulty import Buckets, DifficultyScores
from ..models.modes import on_device
from ..objectives.alternatives import alternatives_fingerprint
from ..resumable import process_state, remove_work
from ..schedule import Schedule
from ..schedule.plan import schedule_of
from ..scoring import score_difficulty
from ..scoring.calibration import adapter_identity
from .checkpoints import SCORES_FILE, WORK_DIR
from .inputs import RunInputs
from .neighbours import retain_neighbours

logger = logging.get_logger(__name__)

VOID_WEIGHTS = (
    "{what}, clipping and Adam divide by the size of the gradient, and the weights of this schedule, which differ "
    "between optimizer steps more than within them, come to nothing. Use larger batches, or a random order."
)


@dataclass(frozen=True, eq=False)
class RunPlan:
    """What a run will do: equal inputs, equal plan, on every process.

    Attributes:
        model: fingerprint of the model before unlearning.
        scores: difficulty of the forget samples, in their order; `None` without.
        buckets: difficulty buckets of the primary metric; `None` without scores.
        schedule: what is trained, in order.
        rows: columns of the training dataset, see `Schedule.rows`.
        collator: makes batches of rows.
        forget_row: forget sample of each position in the schedule, `[len(schedule)]`.
        steps: optimizer steps of the whole run.
        weight_within_batches: see `Schedule.weight_within_batches`.
        part: which objective each forget sample has, see `UnlearningLoss.part_of`; `None` where all have the same.
    """

    model: str
    scores: DifficultyScores | None
    buckets: Buckets | None
    schedule: Schedule
    rows: dict[str, np.ndarray]
    collator: PairedCollator
    forget_row: np.ndarray
    steps: int
    weight_within_batches: float
    part: np.ndarray | None = None

    @classmethod
    def of(cls, inputs: RunInputs) -> RunPlan:
        """The plan of a run; difficulty scores are computed, or read from an earlier start of the run.

        Raises:
            ValueError: for scores of another model or dataset, or scores that a schedule can make nothing of.
        """
        args, batch = inputs.args, inputs.global_batch
        scores = difficulty_scores(inputs)
        retain = inputs.paired_retain
        retain_ids = None if retain is None else retain.ids
        schedule = schedule_of(
            args.schedule_parts,
            str(args.schedule),
            inputs.forget.ids,
            difficulty=_values(inputs, scores),
            retain_ids=retain_ids,
            passes=args.passes,
            seed=args.seed,
            options=args.schedule_args,  # type: ignore[arg-type]
            neighbours=retain_neighbours(inputs),
        )
        buckets = None
        if scores is not None:
            buckets = scores.bucketed(args.difficulty if args.difficulty in scores.columns else None, args.n_buckets)
        part = None if buckets is None else inputs.loss.part_of(buckets.number, buckets.count)
        tokens = args.loss_normalization == "token"
        rows = schedule.rows(
            inputs.forget.ids,
            retain_ids,
            batch,
            forget_lengths=inputs.forget.answer_lengths if tokens else None,
            retain_lengths=retain.answer_lengths if tokens and retain is not None else None,
        )
        within = schedule.weight_within_batches(batch)
        if batch == 1 and np.isfinite(within) and args.max_grad_norm:
            logger.warning(VOID_WEIGHTS.format(what="With one pair per optimizer step"))
        computed_on = None if scores is None else scores.provenance.get("model")
        return cls(
            str(computed_on or inputs.model_fingerprint),
            scores,
            buckets,
            schedule,
            rows,
            PairedCollator(
                inputs.forget,
                retain,
                args.pad_to_multiple_of,
                inputs.loss.uses_alternative,
                torch.promote_types(next(inputs.model.parameters()).dtype, torch.float32),
            ),
            rows["forget_index"][: len(schedule)],
            len(rows["row"]) // batch,
            within,
            part,
        )


def difficulty_scores(inputs: RunInputs) -> DifficultyScores | None:
    """The scores of a run: those it was given, those of an earlier start of it, or new ones."""
    args = inputs.args
    if args.difficulty is None:
        return None
    if inputs.scores is not None:
        origin = _origin(inputs)
        inputs.scores.check_provenance(**origin)
        objective = inputs.scores.calibrated_for(inputs.needed_metrics)
        if objective not in (None, args.objective):
            logger.warning(
                f"the difficulty scores were calibrated with objective {objective!r}, and this run has "
                f"{args.objective!r}: what is hard for one need not be hard for the other"
            )
        # In this run's words: its folder may have another key than that of the scores.
        same = {name: value for name, value in origin.items() if name in inputs.scores.provenance}
        return replace(inputs.scores, provenance={**inputs.scores.provenance, **same})
    request = _request(inputs)
    path = Path(args.output_dir) / SCORES_FILE
    if path.exists() and not args.overwrite:
        try:
            scores = DifficultyScores.load(path, **_origin(inputs), request=request).aligned(inputs.forget.ids)
        except ValueError as error:
            raise ValueError(f"{path} is from another run ({error}); pass overwrite to replace it") from None
        if args.process_index == 0:
            remove_work(Path(args.output_dir) / WORK_DIR)  # of a start that was killed just after it had written them
        logger.info(f"difficulty scores of an earlier start of this run found in {path}")
        return scores
    work_dir = Path(args.output_dir) / WORK_DIR
    if args.overwrite and args.process_index == 0:
        remove_work(work_dir)
    process_state().wait_for_everyone()
    with on_device(inputs.model, args.device, put_back=inputs.shards_model):
        scores = score_difficulty(
            inputs.model,  # type: ignore[arg-type]
            inputs.forget,
            metrics=inputs.needed_metrics,
            retain_dataset=inputs.retain,
            work_dir=work_dir,
            **args.scoring_options(inputs.peft_config),
        )
    scores.provenance["request"] = request
    if args.world_size > 1:  # rounding may differ between devices, the plan must not
        shared = [scores]
        broadcast_object_list(shared)
        scores = shared[0]
    if args.process_index == 0:
        scores.save(path, overwrite=True)
        remove_work(work_dir)
    return scores


def _origin(inputs: RunInputs) -> dict[str, Any]:
    """What scores must have been made of."""
    origin = {"model": inputs.model_fingerprint, "dataset": inputs.forget.fingerprint}
    return origin if inputs.forget.template is None else {**origin, "template": inputs.forget.template}


def _request(inputs: RunInputs) -> dict[str, Any]:
    """What the scores of a run depend on besides, as plain JSON values."""
    args = inputs.args
    request = {
        "metrics": inputs.needed_metrics,
        "difficulty_args": args.difficulty_args,
        "circuit_args": args.circuit_args,
        "folds": args.folds,
        "seed": args.seed,
        "objective": [args.objective, args.objective_args, args.retain_loss, args.retain_weight],
        "learning_rate": args.learning_rate,
        "passes": args.passes,
        "retain": None if inputs.retain is None else inputs.retain.fingerprint,
        "adapter": adapter_identity(inputs.peft_config),
        "alternatives": alternatives_fingerprint(inputs.forget),
        "trainable_layers": args.trainable_layers,
        "trained_modules": None if inputs.choice is None else inputs.choice.modules,
    }
    return json.loads(json.dumps(request))


def _values(inputs: RunInputs, scores: DifficultyScores | None) -> dict[str, np.ndarray]:
    """What the schedule reads, by metric; the configured one also as `"difficulty"`."""
    if scores is None:
        return {}
    values = {name: scores[name] for name in inputs.args.schedule_metrics}
    if inputs.args.difficulty in values:
        values["difficulty"] = values[inputs.args.difficulty]
    return values
