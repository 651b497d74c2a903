"""`CUDTrainer`: unlearning that knows how hard each sample is to forget."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers.trainer
from accelerate.utils import broadcast_object_list, gather, parse_flag_from_env
from datasets import Dataset
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import PredictionOutput
from transformers.utils import logging
from trl import SFTTrainer
from trl.trainer import disable_dropout_in_model

from .config import CUDConfig
from .data import (
    PairedCollator,
    Samples,
    check_disjoint,
    check_tokenizer,
    evenly_spaced,
    prepare_dataset,
    prepare_samples,
)
from .difficulty import DifficultyScores
from .difficulty.gradients import GradientRecorder
from .difficulty.scores import GIVEN, merge_metrics
from .files import (
    DiskFullError,
    atomic_write,
    check_output_dir,
    full_disk_named,
    holds_something,
    write_json,
)
from .logprobs import answer_probability
from .models.fingerprint import model_fingerprint
from .models.loading import load_causal_lm
from .models.matrices import weight_matrices
from .models.trainable import train_only
from .objectives import LossTerms, Reference
from .objectives.alternatives import alternatives_fingerprint, with_alternatives
from .resumable import process_state, remove_work
from .schedule import DynamicWeights, Schedule, make_schedule
from .scoring import check_metrics, score_difficulty
from .scoring.calibration import adapter_identity
from .training.card import HEADING, unlearning_section
from .training.progress import RunProgress, StepRecord

logger = logging.get_logger(__name__)

STATE_FILE = "cud_state.json"
SCORES_FILE = "difficulty.parquet"
SCHEDULE_FILE = "schedule.parquet"
REFERENCE_FILE = "reference.safetensors"
WORK_DIR = "difficulty.work"  # finished parts of scores that are being computed
# What does not go to the hub with a model: `reference.safetensors` has the likely tokens of memorised answers.
NEVER_UPLOADED = (REFERENCE_FILE, f"{WORK_DIR}/*", ".*.tmp")
UPLOADED_IF_ASKED = (SCORES_FILE, SCHEDULE_FILE)
VOID_WEIGHTS = (
    "{what}, clipping and Adam divide by the size of the gradient, and the weights of this schedule, which differ "
    "between optimizer steps more than within them, come to nothing. Use larger batches, or a random order."
)


class DivergenceError(RuntimeError):
    """Training stopped because a loss is not finite or too high; the model is back at the last checkpoint, if any."""


class CUDTrainer(SFTTrainer):
    """Unlearn a forget set, with weights and an order given by each sample's predicted difficulty.

    A step trains on pairs of one forget and one retain sample. The forget and retain losses are means over the pairs of
    the global batch, the forget loss weighted by the schedule (mean weight 1 over a pass).

    Args:
        model: causal LM, or the path or id of one. It is the reference of NPO and KL as it is handed in; no second
            model is kept.
        args: options; the schedule, its seed (`args.seed`) and the objective are all in there.
        forget_dataset: samples to forget, in any format of `cud_trainer.data.prepare_dataset`.
        retain_dataset: samples to keep; needed unless the retain loss is `"none"`.
        eval_dataset: further samples (or a dict of them) for the Trainer's own evaluation loss.
        processing_class: tokenizer with pad and eos tokens; by default the one beside `model`.
        peft_config: train this adapter instead of the weights.
        difficulty_scores: scores made before; by default computed from `args.difficulty` before anything is wrapped.

    Attributes:
        difficulty_scores: the scores in use, in the order of `forget_ids`, or `None`.
        schedule: what is planned, a `Schedule`.
        served_ids: the forget samples served so far, in order, over all processes.

    Raises:
        ValueError: for bad input, naming the sample, column or option, before anything is computed.
    """

    # The loss is the mean of a micro-batch: dividing by the accumulation steps is left to the Trainer.
    loss_is_scaled_for_ga = False
    _tag_names = ["cud-trainer", "unlearning"]
    _name = "CUD"
    _paper = {
        "title": "Circuit-guided Unlearning Difficulty",
        "id": "2601.09624",
        "citation": "@article{cheng2026cud,\n  title={Circuit-guided Unlearning Difficulty},\n"
        "  author={Cheng, Jiali and others},\n  journal={arXiv preprint arXiv:2601.09624},\n  year={2026}\n}",
    }

    def __init__(
        self,
        model: nn.Module | str,
        args: CUDConfig | None = None,
        *,
        forget_dataset: Dataset,
        retain_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: Any = None,
        difficulty_scores: DifficultyScores | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        compute_metrics: Callable | None = None,
    ) -> None:
        if args is None:
            args = CUDConfig("cud-output")
        loss = args.unlearning_loss
        if args.difficulty == GIVEN and difficulty_scores is None:
            raise ValueError(f"difficulty {GIVEN!r} is the first metric of difficulty_scores: give them")
        if args.process_index == 0:
            _check_may_start(args)
        if processing_class is None:
            if not isinstance(model, str):
                raise ValueError("pass the tokenizer as processing_class")
            processing_class = AutoTokenizer.from_pretrained(model, trust_remote_code=args.trust_remote_code)
        check_tokenizer(processing_class)
        if peft_config is not None and args.trainable_layers is not None:
            raise ValueError(
                "trainable_layers is for training without an adapter; use layers_to_transform of the adapter"
            )
        if loss.uses_retain and retain_dataset is None:
            raise ValueError(
                f"retain dataset is missing: objective {args.objective!r} with retain_loss {loss.retain_loss!r} "
                "needs one"
            )
        groups = [args.group_column] if args.group_column else []
        self.forget = prepare_samples(
            forget_dataset,
            processing_class,
            max_length=args.max_length,
            name="forget",
            keep_columns=groups,
            counterfactual_column=args.counterfactual_column,
        )
        self.retain: Samples | None = None
        if retain_dataset is not None:
            self.retain = prepare_samples(retain_dataset, processing_class, max_length=args.max_length, name="retain")
            check_disjoint(self.forget, self.retain)
        if args.difficulty is not None and len(self.forget) < args.n_buckets:
            raise ValueError(f"cannot make {args.n_buckets} difficulty buckets of {len(self.forget)} forget samples")
        eval_dataset = self._prepare_eval(eval_dataset, processing_class, args.max_length)
        self.forget_ids: list[str] = list(self.forget.ids)
        retain_ids = list(self.retain.ids) if loss.uses_retain and self.retain is not None else None
        global_batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        steps = -(-len(self.forget) * args.passes // global_batch)
        if args.max_steps > steps:
            raise ValueError(
                f"max_steps={args.max_steps} goes beyond the schedule ({steps} steps for {args.passes} passes): "
                "raise passes"
            )
        if isinstance(model, str):
            model = _load_model(model, args)
            args.model_init_kwargs = None  # used up; TRL would warn that it ignores them
        loss.check_model(model.config)
        _check_quantised(model, peft_config)
        if args.trainable_layers is not None:
            train_only(model, args.trainable_layers)
        metrics = _needed_metrics(args)
        if difficulty_scores is None:
            check_metrics(metrics or ["loss"], {}, model)
        elif args.difficulty is not None:
            difficulty_scores = difficulty_scores.aligned(self.forget_ids)
            if args.difficulty == GIVEN:
                difficulty_scores = difficulty_scores.with_given()
            for metric in args.schedule_metrics:
                difficulty_scores[metric]  # raises when it is not there
        if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
            raise ValueError(
                "the model's weights are already partitioned by DeepSpeed: difficulty and reference quantities are "
                "computed before that. Load it without zero.Init (`zero3_init_flag: false`)"
            )
        self.forget = self._alternatives(model, args, forget_dataset, processing_class)

        self.difficulty_scores = self._difficulty(
            difficulty_scores, model, args, peft_config, processing_class, metrics
        )
        values = {name: self.difficulty_scores[name] for name in args.schedule_metrics if self.difficulty_scores}
        if args.difficulty in values:
            values["difficulty"] = values[args.difficulty]
        self.schedule: Schedule = make_schedule(
            args.schedule,  # type: ignore[arg-type]
            self.forget_ids,
            difficulty=values,
            retain_ids=retain_ids,
            passes=args.passes,
            seed=args.seed,
            **args.schedule_args,  # type: ignore[arg-type]
        )
        self.buckets: np.ndarray | None = None
        if self.difficulty_scores is not None:
            primary = args.difficulty if args.difficulty in self.difficulty_scores.columns else None
            self.buckets = self.difficulty_scores.buckets(primary, args.n_buckets)
        self.unlearning_loss = loss
        self._global_batch, self._world_size = global_batch, args.world_size
        self._records: list[Tensor] = []
        self._update_norms: list[Tensor] = []
        self._recorder: GradientRecorder | None = None
        self._micro_batches = 0
        self._served: list[int] = []
        self._started = False
        self._clipped = 0

        tokens = args.loss_normalization == "token"
        rows = self.schedule.rows(
            self.forget_ids,
            retain_ids,
            global_batch,
            forget_lengths=self.forget.answer_lengths if tokens else None,
            retain_lengths=self.retain.answer_lengths if tokens and retain_ids and self.retain is not None else None,
        )
        steps = len(rows["row"]) // global_batch
        self._within = self.schedule.weight_within_batches(global_batch)
        if global_batch == 1 and np.isfinite(self._within) and args.max_grad_norm:
            logger.warning(VOID_WEIGHTS.format(what="With one pair per optimizer step"))
        # The rows are ready to train on; the base class must not look for text in them.
        args.dataset_kwargs = {**(args.dataset_kwargs or {}), "skip_prepare_dataset": True}
        collator = PairedCollator(
            self.forget,
            self.retain if loss.uses_retain else None,
            args.pad_to_multiple_of,
            loss.uses_alternative,
        )
        self._own_evaluation = eval_dataset is None and args.eval_strategy != "no"
        if self._own_evaluation:  # the base class asks for a dataset; `evaluate` looks at forget and retain set
            eval_dataset = self.forget.dataset
        super().__init__(
            model=model,
            args=args,
            data_collator=collator,
            train_dataset=Dataset.from_dict(rows),
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            peft_config=peft_config,
            callbacks=callbacks,
            optimizers=optimizers,
            compute_metrics=compute_metrics,
        )
        # NPO's log-ratio must be 0 at the first step; only after wrapping are an adapter's dropouts there to be found.
        disable_dropout_in_model(self.model)
        index = {sample_id: row for row, sample_id in enumerate(self.forget_ids)}
        self._forget_row = np.array([index[sample_id] for sample_id in self.schedule.order.tolist()])
        with _on_device(self.model, args):
            self.reference = self._reference()
            # Only a run that looks at itself after every step pays for it.
            self._stepwise = bool(self.schedule.dynamic) or any(
                limit is not None for limit in (args.retain_limit, args.target_forget_prob)
            )
            start = self._probabilities(self.forget) if self._stepwise or args.eval_strategy != "no" else None
            self._eval_retain = self._evaluated_retain()
            kept = self._probabilities(self._eval_retain) if args.eval_strategy != "no" and self._eval_retain else None
        self._start_level = (
            None if start is None else float(start.mean()),
            None if kept is None else float(kept.mean()),
        )
        logps = np.zeros(len(self.forget)) if start is None else np.log(np.maximum(start, 1e-300))
        self.progress = RunProgress(
            self._forget_row,
            DynamicWeights(self.schedule.dynamic, logps, steps),
            retain_weight=args.retain_weight,
            retain_limit=args.retain_limit,
            dual_rate=args.dual_rate,
            target_forget_prob=args.target_forget_prob,
            max_retain_loss=args.max_retain_loss,
            steps_per_pass=-(-len(self.forget) // global_batch),
        )
        self._factor: Tensor | None = None
        self._start_state = json.loads(json.dumps(self.progress.state()))
        self.add_callback(_RunState(self))

    # -- what is planned and what was served ----------------------------------------------------------------------

    @property
    def served_ids(self) -> list[str]:
        """Forget sample ids served so far, in order, over all processes.

        With several processes, those up to the last log, checkpoint or end of training.
        """
        if self._world_size == 1:
            self._flush()
        order = self.schedule.order
        return [str(order[row]) for row in self._served]

    def _difficulty(
        self,
        given: DifficultyScores | None,
        model: nn.Module,
        args: CUDConfig,
        peft_config: Any,
        processing_class: PreTrainedTokenizerBase,
        metrics: list[str],
    ) -> DifficultyScores | None:
        if args.difficulty is None:
            return None
        here = {"model": model_fingerprint(model), "dataset": self.forget.fingerprint}
        if given is not None:
            given.check_provenance(**here)
            return given
        request = {
            "metrics": metrics,
            "difficulty_args": args.difficulty_args,
            "circuit_args": args.circuit_args,
            "folds": args.folds,
            "seed": args.seed,
            "objective": [args.objective, args.objective_args, args.retain_loss, args.retain_weight],
            "learning_rate": args.learning_rate,
            "passes": args.passes,
            "retain": None if self.retain is None else self.retain.fingerprint,
            "adapter": adapter_identity(peft_config),
            "alternatives": alternatives_fingerprint(self.forget),
            "trainable_layers": args.trainable_layers,
        }
        request = json.loads(json.dumps(request))
        path = Path(args.output_dir) / SCORES_FILE
        if path.exists() and not args.overwrite:
            try:
                scores = DifficultyScores.load(path, **here, request=request).aligned(self.forget_ids)
                logger.info(f"difficulty scores of an earlier start of this run found in {path}")
                return scores
            except ValueError as error:
                raise ValueError(f"{path} is from another run ({error}); pass overwrite to replace it") from None
        work_dir = Path(args.output_dir) / WORK_DIR
        if args.overwrite and args.process_index == 0:
            remove_work(work_dir)
        process_state().wait_for_everyone()
        with _on_device(model, args):
            scores = score_difficulty(
                model,
                self.forget,
                processing_class,
                metrics=metrics,
                retain_dataset=self.retain,
                work_dir=work_dir,
                **args.scoring_options(peft_config),
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

    def _alternatives(self, model: nn.Module, args: CUDConfig, dataset: Dataset, tokenizer: Any) -> Samples:
        """The forget set with the alternative answers that the objective asks for, the same on all processes."""
        source = args.unlearning_loss.spec.alternative
        if source is None:
            return self.forget
        options = args.alternative_options()
        if source != "model":
            return with_alternatives(self.forget, dataset, tokenizer, source, **options)
        shared: list[Any] = [None]
        if args.process_index == 0:
            with _on_device(model, args):
                samples = with_alternatives(self.forget, dataset, tokenizer, source, model=model, **options)
                shared = [samples.dataset.to_dict()]
        if args.world_size > 1:
            broadcast_object_list(shared)
        return replace(self.forget, dataset=Dataset.from_dict(shared[0]))

    def _reference(self) -> Reference:
        """Reference quantities, from `output_dir` where an earlier start of this run left them."""
        loss, args = self.unlearning_loss, self.args
        if not loss.uses_reference and not loss.uses_hidden:
            return Reference()
        device = self.model.get_input_embeddings().weight.device
        parts = [
            model_fingerprint(self.accelerator.unwrap_model(self.model)),
            self.forget.fingerprint,
            "" if self.retain is None else self.retain.fingerprint,
            str(alternatives_fingerprint(self.forget)),
            json.dumps([loss.objective, loss.objective_args, loss.retain_loss, loss.reference_top_k, args.seed]),
            f"{args.bf16}{args.fp16}{args.per_device_train_batch_size}",
        ]
        fingerprint = hashlib.sha256("|".join(parts).encode()).hexdigest()[:16]
        path = Path(args.output_dir) / REFERENCE_FILE
        known = Reference.load(path, fingerprint, device)
        if known is not None:
            return known
        with self.accelerator.autocast():
            reference = loss.reference(
                self.model,
                self.forget,
                self.retain,
                batch_size=args.per_device_train_batch_size,
                device=device,
                seed=args.seed,
            )
        self.accelerator.wait_for_everyone()  # nobody may find it who has not looked yet
        if self.is_world_process_zero():
            reference.save(path, fingerprint)
        return reference

    # -- training --------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any):
        """Run the schedule, or continue it.

        Args:
            resume_from_checkpoint: a checkpoint folder, or `True` for the last one in `output_dir`.

        Raises:
            ValueError: when `output_dir` holds earlier results and neither `overwrite` nor a checkpoint is given, or
                when the checkpoint belongs to another schedule or global batch.
            DivergenceError: when a loss is no longer finite.
        """
        output = Path(self.args.output_dir)
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(output)
            if resume_from_checkpoint is None:
                raise ValueError(f"there is no complete checkpoint to resume from in {output}")
        if resume_from_checkpoint:
            state = self._resume_state(Path(resume_from_checkpoint))
            self._served = list(state["served"])
            self.progress.restore(state["progress"])
        else:
            self._served = []
            self.progress.restore(self._start_state)
            if self.is_world_process_zero() and not self._started and not self.args.overwrite:
                made = {SCORES_FILE, WORK_DIR, REFERENCE_FILE}
                if self._same_schedule(output / SCHEDULE_FILE):  # a run that was killed before its first checkpoint
                    made = begun(output)
                if holds_something(output, made):
                    check_output_dir(output)
        self._started = True
        self._records.clear()
        if self.is_world_process_zero():
            self.schedule.save(output / SCHEDULE_FILE, overwrite=True)
            if self.difficulty_scores is not None:
                self.difficulty_scores.save(output / SCORES_FILE, overwrite=True)
        self._factor = None
        try:
            return super().train(resume_from_checkpoint=resume_from_checkpoint or None, **kwargs)
        except DivergenceError as error:
            raise DivergenceError(f"{error} {self._back_to_the_last_checkpoint()}") from None

    def _same_schedule(self, path: Path) -> bool:
        try:
            return Schedule.load(path).hash == self.schedule.hash
        except ValueError:
            return False

    def _back_to_the_last_checkpoint(self) -> str:
        """Load the weights that were saved last, and say so."""
        output = Path(self.args.output_dir)
        last = last_checkpoint(output)
        if last is None:
            return "No checkpoint was saved: the weights are those of the diverged run."
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return f"The last checkpoint, {last}, is good."
        self._load_from_checkpoint(last)
        return f"The model is back at the last checkpoint, {last}."

    def _resume_state(self, checkpoint: Path) -> dict[str, Any]:
        """State at `checkpoint`; `ValueError` unless it continues this very schedule."""
        path = checkpoint / STATE_FILE
        if not path.is_file():
            raise ValueError(f"{checkpoint} is no complete checkpoint of CUDTrainer: {STATE_FILE} is missing")
        state = json.loads(path.read_text())
        for key, value in self._state().items():
            if state[key] != value:
                raise ValueError(
                    f"cannot resume from {checkpoint}: its {key.replace('_', ' ')} is {state[key]}, here it is "
                    f"{value}; model, data, schedule, seed and global batch must be those of the interrupted run"
                )
        return state

    def _state(self) -> dict[str, Any]:
        return {
            "schedule": self.schedule.hash,
            "global_batch": self._global_batch,
            "objective": f"{self.args.objective} {json.dumps(self.args.objective_args, sort_keys=True)}",
            "alternative_answers": alternatives_fingerprint(self.forget),
        }

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """As in the base class; on request with the size of every sample's part in the update."""
        step = self.state.global_step + 1
        due = step == 1 or step % max(1, int(self.state.logging_steps or 1)) == 0
        if not self.args.log_update_share or not due or "forget_index" not in inputs:
            return super().training_step(model, inputs, num_items_in_batch)
        matrices = [m for m in weight_matrices(self.accelerator.unwrap_model(model)) if m.weight.requires_grad]
        recorder = GradientRecorder(matrices)
        row = inputs["row"].cpu()
        self._recorder = recorder
        try:
            with recorder.attached():
                loss = super().training_step(model, inputs, num_items_in_batch)
        finally:
            self._recorder = None
        norms = recorder.results(len(inputs["input_ids"]))["squares"].double().sum(1).sqrt()
        pairs = len(row)
        forget = norms[:pairs] + (norms[-pairs:] if self.unlearning_loss.uses_alternative else 0.0)
        retain = norms[pairs : 2 * pairs] if self.unlearning_loss.uses_retain else torch.zeros(pairs)
        self._update_norms.append(torch.stack([row.double(), forget, retain.double()], dim=1).to(loss.device))
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ):
        """Weighted forget loss plus retain loss of a paired batch; the ordinary loss of any other batch."""
        if "forget_index" not in inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        terms = self.unlearning_loss(model, inputs, self.reference)
        weight = inputs["weight"]
        if self.schedule.dynamic:
            if self._factor is None:
                self._factor = torch.from_numpy(self.progress.weights.factor)
            index = inputs["forget_index"]
            weight = weight.double() * self._factor.to(index.device)[index]
        loss = (weight.to(terms.forget.dtype) * terms.forget).mean()
        if terms.retain is not None:
            scale = inputs["retain_scale"].to(terms.retain.dtype)
            loss = loss + self.progress.retain_weight * (scale * terms.retain).mean()
        self._record(inputs, terms)
        if self._recorder is not None:
            loss.register_hook(self._recorder.begin_backward)
        return (loss, terms) if return_outputs else loss

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Ordinary loss of `eval_dataset`, given in any format the forget dataset may have.

        Without one, what `predict` says: residual memorisation by difficulty bucket and what is left of the retain set;
        beside the loss of the trainer's own `eval_dataset`, if it was given one.
        """
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = self._prepare_eval(eval_dataset, self.processing_class, self.args.max_length)
        if eval_dataset is not None:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        metrics: dict[str, float] = {}
        if self.eval_dataset is not None and not self._own_evaluation:
            metrics |= super().evaluate(None, ignore_keys, metric_key_prefix)
        found = self.predict(metric_key_prefix=metric_key_prefix).metrics
        metrics |= found
        self.log(found)
        self.control: TrainerControl = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def predict(self, test_dataset=None, ignore_keys=None, metric_key_prefix: str = "test") -> PredictionOutput:
        """Residual memorisation of the forget set as it is now.

        Returns:
            `predictions`: answer probability of each forget sample, in the order of `forget_ids`, `[N]` in [0, 1];
            `metrics`: its mean, over all samples (`forget_prob`) and by difficulty bucket (`forget_prob/bucket_1` is
            the easiest), the mean over `eval_retain_samples` of the retain set (`retain_prob`), and `balance`, the
            harmonic mean of the share forgotten and the share retained of what was there at the start, each in [0, 1].
            With a `test_dataset`: what the base class says about that.
        """
        if test_dataset is not None:
            prepared = self._prepare_eval(test_dataset, self.processing_class, self.args.max_length)
            return super().predict(prepared, ignore_keys, metric_key_prefix)
        probability = self._probabilities(self.forget)
        found = {"forget_prob": float(probability.mean())}
        if self.buckets is not None:
            for number in np.unique(self.buckets):
                found[f"forget_prob/bucket_{number + 1}"] = float(probability[self.buckets == number].mean())
        if self._eval_retain is not None:
            found["retain_prob"] = float(self._probabilities(self._eval_retain).mean())
        start, kept = self._start_level
        if start:
            forgotten = float(np.clip(1 - found["forget_prob"] / start, 0, 1))
            retained = min(found["retain_prob"] / kept, 1.0) if kept else 1.0
            total = forgotten + retained
            found["balance"] = 2 * forgotten * retained / total if kept and total > 0 else forgotten
        return PredictionOutput(probability, None, {f"{metric_key_prefix}_{k}": v for k, v in found.items()})

    def _evaluated_retain(self) -> Samples | None:
        if self.retain is None:
            return None
        return evenly_spaced(self.retain, self.args.eval_retain_samples)

    def _probabilities(self, samples: Samples) -> np.ndarray:
        """Answer probability of each sample, `[N]`, shared among the processes."""
        world, count = self.args.world_size, len(samples)
        # Every process does as many forward passes: sharded models need all of them for each.
        rows = np.arange(self.args.process_index, world * -(-count // world), world) % count
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        with self.accelerator.autocast():
            part = answer_probability(
                self.model_wrapped if sharded else self.model,
                samples.select(rows),
                batch_size=self.args.per_device_eval_batch_size,
                device=self.args.device if sharded else None,
            )
        table = torch.stack([torch.from_numpy(rows).double(), torch.from_numpy(part)], dim=1)
        if world > 1:
            table = gather(table.to(self.args.device)).cpu()
        values = np.empty(count)
        values[table[:, 0].long().numpy()] = table[:, 1].numpy()
        return values

    @staticmethod
    def _prepare_eval(dataset: Any, tokenizer: Any, max_length: int | None) -> Any:
        if dataset is None:
            return None
        if isinstance(dataset, dict):
            return {
                name: prepare_dataset(part, tokenizer, max_length=max_length, name=f"eval ({name})")
                for name, part in dataset.items()
            }
        return prepare_dataset(dataset, tokenizer, max_length=max_length, name="eval")

    # -- what is logged --------------------------------------------------------------------------------------------

    def _record(self, inputs: dict[str, Tensor], terms: LossTerms) -> None:
        """Keep a micro-batch's numbers on the device; they are gathered once per log."""
        row = inputs["row"]
        retain = torch.full_like(terms.mean_logps, torch.nan) if terms.retain is None else terms.retain.detach()
        columns = [
            torch.full_like(terms.mean_logps, self._micro_batches),
            torch.full_like(terms.mean_logps, self.accelerator.process_index),
            row.to(terms.mean_logps),
            terms.mean_logps,
            terms.forget.detach(),
            retain.to(terms.mean_logps),
        ]
        self._records.append(torch.stack([column.double() for column in columns], dim=1))
        self._micro_batches += 1

    def _flush(self) -> StepRecord | None:
        """Gather what was recorded since the last time into metrics and `served_ids`, and return it.

        Raises:
            DivergenceError: for a non-finite loss, the same on all processes.
        """
        if not self._records:
            return None
        table = gather(torch.cat(self._records)).cpu().numpy()
        self._records.clear()
        table = table[np.lexsort((table[:, 1], table[:, 0]))]  # stable: micro-batch, then process, then position
        table = table[table[:, 2] >= 0]
        rows = table[:, 2].astype(int)
        self._served += rows.tolist()
        record = StepRecord(rows, table[:, 3], table[:, 4], table[:, 5])
        probability, forget_loss, retain_loss = np.exp(record.mean_logps), record.forget, record.retain
        losses = [forget_loss] if self.unlearning_loss.uses_retain is False else [forget_loss, retain_loss]
        if not all(np.isfinite(values).all() for values in losses):
            bad = next(values for values in losses if not np.isfinite(values).all())
            sample = self.schedule.order[rows[np.flatnonzero(~np.isfinite(bad))[0]]]
            raise DivergenceError(
                f"training diverged: a loss is not finite at step {self.state.global_step} (first at forget sample "
                f"{sample!r}); lower the learning rate or raise the retain weight."
            )
        highest = self.args.max_retain_loss
        if highest is not None and retain_loss.mean() > highest:
            raise DivergenceError(
                f"training diverged: the retain loss is {retain_loss.mean():.4g} at step {self.state.global_step}, "
                f"above max_retain_loss={highest:g}; lower the learning rate or raise the retain weight."
            )
        metrics = self._metrics["train"]
        metrics["forget_loss"].append(float(forget_loss.mean()))
        metrics["forget_prob"].append(float(probability.mean()))
        if self.unlearning_loss.uses_retain:
            metrics["retain_loss"].append(float(retain_loss.mean()))
            if self.args.retain_limit is not None:
                metrics["retain_weight"].append(self.progress.retain_weight)
        if self.schedule.dynamic:
            factor = self.progress.weights.factor
            metrics["forget_active"].append(float((factor > 0).mean()))
        if self.buckets is not None:
            bucket = self.buckets[self._forget_row[rows]]
            values = defaultdict(list)
            for number, value in zip(bucket, probability, strict=True):
                values[int(number) + 1].append(value)
            for number, found in sorted(values.items()):  # 1 = easiest
                metrics[f"forget_prob/bucket_{number}"].append(float(np.mean(found)))
        self._flush_update_norms()
        return record

    def _flush_update_norms(self) -> None:
        """Share of the summed gradient norms that every difficulty bucket, and the retain set, has in the update."""
        if not self._update_norms:
            return
        table = gather(torch.cat(self._update_norms)).cpu().numpy()
        self._update_norms.clear()
        table = table[table[:, 0] >= 0]
        forget, retain = table[:, 1], table[:, 2]
        metrics = self._metrics["train"]
        if self.unlearning_loss.uses_retain:
            metrics["update_share/retain"].append(float(retain.sum() / max(forget.sum() + retain.sum(), 1e-300)))
        if self.buckets is not None:
            bucket = self.buckets[self._forget_row[table[:, 0].astype(int)]]
            for number in np.unique(self.buckets):
                share = forget[bucket == number].sum() / max(forget.sum(), 1e-300)
                metrics[f"update_share/bucket_{number + 1}"].append(float(share))

    def _follow(self, control: TrainerControl) -> None:
        """Take in the step that has just ended: new weights, a new balance, or the end."""
        record = self._flush()
        if record is None:
            return
        self.progress.after_step(record, self.state.global_step)
        self._factor = None
        if self.progress.done:
            logger.info(
                f"the mean forget probability is {self.progress.forget_prob:.4f} at step {self.state.global_step}: done"
            )
            control.should_training_stop = True

    def _checkpoint_state(self) -> dict[str, Any]:
        return {**self._state(), "served": self._served, "progress": self.progress.state()}

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """TRL's model card, with a section on the unlearning."""
        super().create_model_card(*args, **kwargs)
        path = Path(self.args.output_dir) / "README.md"
        if self.is_world_process_zero() and path.is_file():
            text = path.read_text(encoding="utf-8").split(HEADING)[0].rstrip()
            section = unlearning_section(self)
            atomic_write(path, lambda temporary: temporary.write_text(f"{text}\n\n{section}", encoding="utf-8"))

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """As in the base class, without the files that tell about single samples.

        `reference.safetensors` and unfinished scores are never uploaded, `difficulty.parquet` and `schedule.parquet`
        with `args.hub_difficulty`. The same holds for uploads of checkpoints during training.
        """
        with self._private_files_stay():
            return super().push_to_hub(*args, **kwargs)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        with self._private_files_stay():
            super()._push_from_checkpoint(checkpoint_folder)

    @contextmanager
    def _private_files_stay(self) -> Iterator[None]:
        """Uploads of the base class leave files out. It gives no way to say which: all go through its `hf_api`."""
        original = transformers.trainer.hf_api
        ignored = NEVER_UPLOADED if self.args.hub_difficulty else NEVER_UPLOADED + UPLOADED_IF_ASKED
        transformers.trainer.hf_api = lambda: _Uploads(original(), ignored)
        try:
            yield
        finally:
            transformers.trainer.hf_api = original

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """As in the base class, but complete or not at all: into a folder beside it, then file by file to its place."""
        target = Path(output_dir if output_dir is not None else self.args.output_dir)
        staging = target / f".model.{os.getpid()}.tmp"
        try:
            with full_disk_named(target):
                if self.args.should_save and (target / "README.md").is_file():  # PEFT adds to it
                    staging.mkdir(parents=True)
                    shutil.copy(target / "README.md", staging)
                super()._save(str(staging), state_dict)
                made = {path.relative_to(staging) for path in staging.rglob("*") if path.is_file()}
                stale = target.glob("model*.safetensors*") if made else ()
                for path in [path for path in stale if path.relative_to(target) not in made]:
                    path.unlink()  # weights that were saved in another number of files
                for name in sorted(made):
                    (target / name).parent.mkdir(parents=True, exist_ok=True)
                    os.replace(staging / name, target / name)
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As in the base class; one that cannot be written whole is removed."""
        checkpoint = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if self.is_world_process_zero():
            (checkpoint / STATE_FILE).unlink(missing_ok=True)  # until it is whole again
        try:
            with full_disk_named(checkpoint):
                super()._save_checkpoint(model, trial)
        except DiskFullError:
            if self.is_world_process_zero():
                shutil.rmtree(checkpoint, ignore_errors=True)
            raise

    def _check_weights(self) -> None:
        """Raise `DivergenceError` when a weight is no longer finite: such a checkpoint must not be written."""
        sums = [parameter.detach().sum() for parameter in self.model.parameters() if parameter.requires_grad]
        if not all(bool(torch.isfinite(total)) for total in sums):
            raise DivergenceError(
                f"training diverged: a weight is not finite after step {self.state.global_step}; lower the learning "
                "rate or raise the retain weight."
            )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.model.training:
            self._flush()
        limit, norm = self.args.max_grad_norm, logs.get("grad_norm")
        if limit and norm is not None and self._within < 0.1:
            self._clipped = self._clipped + 1 if norm > limit else 0
            if self._clipped == 5:
                logger.warning(VOID_WEIGHTS.format(what=f"With gradients above max_grad_norm={limit:g} at every step"))
        super().log(logs, start_time)


class _Uploads:
    """The hub's API, with files that folders are uploaded without."""

    def __init__(self, api: Any, ignored: tuple[str, ...]) -> None:
        self._api, self._ignored = api, ignored

    def __getattr__(self, name: str) -> Any:
        return getattr(self._api, name)

    def upload_folder(self, *, ignore_patterns: list[str] | str | None = None, **options: Any) -> Any:
        given = [ignore_patterns] if isinstance(ignore_patterns, str) else list(ignore_patterns or ())
        return self._api.upload_folder(ignore_patterns=[*given, *self._ignored], **options)


class _RunState(TrainerCallback):
    """Checks the losses before a checkpoint is written, and puts the run's position into it."""

    def __init__(self, trainer: CUDTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.trainer._stepwise:
            self.trainer._follow(control)
        elif control.should_save or control.should_evaluate:
            self.trainer._flush()
        if control.should_save:
            self.trainer._check_weights()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and checkpoint.is_dir():
            try:
                write_json(checkpoint / STATE_FILE, self.trainer._checkpoint_state())
            except DiskFullError:
                shutil.rmtree(checkpoint, ignore_errors=True)
                raise

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer._flush()


def last_checkpoint(output: Path) -> str | None:
    """The last complete checkpoint in `output`: one whose writing was cut short has no state of ours yet."""
    found = [path.parent for path in output.glob(f"checkpoint-*/{STATE_FILE}") if path.parent.name[11:].isdecimal()]
    return str(max(found, key=lambda path: int(path.name[11:]))) if found else None


def begun(output: str | Path) -> set[str]:
    """Names in `output` of what a run leaves that ended before its first checkpoint was whole; the trainer checks
    that it was the same run."""
    output = Path(output)
    names = {SCORES_FILE, WORK_DIR, REFERENCE_FILE, SCHEDULE_FILE}
    if (output / SCHEDULE_FILE).exists():
        cut_short = {path.name for path in output.glob("checkpoint-*") if not (path / STATE_FILE).exists()}
        names |= {"README.md", *cut_short}
    return names


def _check_may_start(args: CUDConfig) -> None:
    """An output directory with something foreign in it is refused at once; whether a run in it is resumed or started
    anew is only known in `train`."""
    output = Path(args.output_dir)
    known = output.is_dir() and ((output / SCORES_FILE).exists() or any(output.glob("checkpoint-*")))
    resume = bool(args.resume_from_checkpoint) or known
    check_output_dir(output, overwrite=args.overwrite, resume=resume, known=begun(output))


def _needed_metrics(args: CUDConfig) -> list[str]:
    if args.difficulty is None:
        return []
    return merge_metrics(args.difficulty, [*args.schedule_metrics, "loss", "length"])


def _check_quantised(model: nn.Module, peft_config: Any) -> None:
    """Raise `ValueError` for quantised weights that would be trained themselves."""
    if getattr(model, "is_quantized", False) and peft_config is None and not hasattr(model, "peft_config"):
        raise ValueError("the model's weights are quantised and cannot be trained: give a peft_config (QLoRA)")


@contextmanager
def _on_device(model: nn.Module, args: CUDConfig) -> Iterator[None]:
    """The model on the device it is scored on. A run that shards it later gets it back on the CPU."""
    if hasattr(model, "hf_device_map"):
        yield
        return
    device = next(model.parameters()).device
    model.to(args.device)
    try:
        yield
    finally:
        launched = any(parse_flag_from_env(f"ACCELERATE_USE_{name}") for name in ("FSDP", "DEEPSPEED"))
        if (args.fsdp or args.deepspeed or launched) and device != args.device:
            model.to(device)


def _load_model(name: str, args: CUDConfig) -> nn.Module:
    options = dict(args.model_init_kwargs or {})  # type: ignore[arg-type]
    # As in TRL: full precision weights unless asked otherwise, mixed precision comes from `bf16`.
    options.setdefault("dtype", "float32")
    options.setdefault("trust_remote_code", args.trust_remote_code)
    return load_causal_lm(name, **options)
