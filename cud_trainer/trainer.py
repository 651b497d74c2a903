"""`CUDTrainer`: unlearning that knows how hard each sample is to forget."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather
from datasets import Dataset
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging
from trl import SFTTrainer
from trl.trainer import disable_dropout_in_model

from .calibration import adapter_identity
from .config import CUDConfig
from .data import PairedCollator, check_disjoint, check_tokenizer, dataset_fingerprint, prepare_dataset
from .difficulty import DifficultyScores
from .difficulty.scores import merge_metrics
from .files import check_output_dir, write_json
from .fingerprint import model_fingerprint
from .objectives import LossTerms
from .passes import process_state, remove_work
from .schedule import Schedule, make_schedule
from .scoring import check_metrics, score_difficulty

logger = logging.get_logger(__name__)

STATE_FILE = "cud_state.json"
SCORES_FILE = "difficulty.parquet"
SCHEDULE_FILE = "schedule.parquet"
WORK_DIR = "difficulty.work"  # finished parts of scores that are being computed


class DivergenceError(RuntimeError):
    """Training stopped because a loss is not finite; the last checkpoint is from before."""


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
        if args.process_index == 0:
            _check_may_start(args)
        if processing_class is None:
            if not isinstance(model, str):
                raise ValueError("pass the tokenizer as processing_class")
            processing_class = AutoTokenizer.from_pretrained(model, trust_remote_code=args.trust_remote_code)
        check_tokenizer(processing_class)
        if loss.uses_retain and retain_dataset is None:
            raise ValueError(
                f"retain dataset is missing: objective {args.objective!r} with retain_loss {loss.retain_loss!r} "
                "needs one"
            )
        groups = [args.group_column] if args.group_column else []
        self.forget = prepare_dataset(
            forget_dataset,
            processing_class,
            max_length=args.max_length,
            name="forget",
            keep_columns=groups,
            counterfactual_column=args.counterfactual_column,
        )
        self.retain: Dataset | None = None
        if retain_dataset is not None:
            self.retain = prepare_dataset(retain_dataset, processing_class, max_length=args.max_length, name="retain")
            check_disjoint(self.forget, self.retain)
        if args.difficulty is not None and len(self.forget) < args.n_buckets:
            raise ValueError(f"cannot make {args.n_buckets} difficulty buckets of {len(self.forget)} forget samples")
        eval_dataset = self._prepare_eval(eval_dataset, processing_class, args.max_length)
        self.forget_ids: list[str] = list(self.forget["sample_id"])
        retain_ids = list(self.retain["sample_id"]) if loss.uses_retain and self.retain is not None else None
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
        metrics = _needed_metrics(args)
        if difficulty_scores is None:
            check_metrics(metrics or ["loss"], {}, model)
        elif args.difficulty is not None:
            difficulty_scores = difficulty_scores.aligned(self.forget_ids)
            if args.schedule_metric is not None:
                difficulty_scores[args.schedule_metric]  # raises when it is not there
        if (args.fsdp or args.deepspeed) and (loss.spec.needs_reference or loss.retain_loss == "kl"):
            raise ValueError(
                f"objective {args.objective!r} with retain_loss {loss.retain_loss!r} scores the original model before "
                "it is wrapped, which FSDP and DeepSpeed do not allow yet; use DDP"
            )

        self.difficulty_scores = self._difficulty(
            difficulty_scores, model, args, peft_config, processing_class, metrics
        )
        metric = args.schedule_metric
        self.schedule: Schedule = make_schedule(
            args.schedule,
            self.forget_ids,
            difficulty=self.difficulty_scores[metric] if metric and self.difficulty_scores else None,
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
        self._micro_batches = 0
        self._served: list[int] = []
        self._started = False

        rows = self.schedule.rows(self.forget_ids, retain_ids, global_batch)
        # The rows are ready to train on; the base class must not look for text in them.
        args.dataset_kwargs = {**(args.dataset_kwargs or {}), "skip_prepare_dataset": True}
        collator = PairedCollator(
            self.forget,
            self.retain if loss.uses_retain else None,
            int(processing_class.pad_token_id),  # type: ignore[arg-type]
            args.pad_to_multiple_of,
        )
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
        with self.accelerator.autocast():
            self.reference = loss.reference(
                self.model,
                self.forget,
                self.retain,
                pad_token_id=collator.pad_token_id,
                batch_size=args.per_device_train_batch_size,
                device=self.model.get_input_embeddings().weight.device,
            )
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
        here = {"model": model_fingerprint(model), "dataset": dataset_fingerprint(self.forget)}
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
            "retain": None if self.retain is None else dataset_fingerprint(self.retain),
            "adapter": adapter_identity(peft_config),
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
        if not hasattr(model, "hf_device_map") and not (args.fsdp or args.deepspeed):
            model.to(args.device)
        work_dir = Path(args.output_dir) / WORK_DIR
        if args.overwrite and args.process_index == 0:
            remove_work(work_dir)
        process_state().wait_for_everyone()
        scores = score_difficulty(
            model,
            self.forget,
            processing_class,
            metrics=metrics,
            retain_dataset=self.retain,
            work_dir=work_dir,
            **{**args.scoring_options(peft_config), "counterfactual_column": None},  # it is in the prepared samples
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
            resume_from_checkpoint = get_last_checkpoint(str(output)) if output.is_dir() else None
            if resume_from_checkpoint is None:
                raise ValueError(f"there is no checkpoint to resume from in {output}")
        if resume_from_checkpoint:
            self._served = self._resume_state(Path(resume_from_checkpoint))
        else:
            self._served = []
            if self.is_world_process_zero() and not self._started and not self.args.overwrite:
                made = {SCORES_FILE, WORK_DIR}
                others = [p.name for p in output.iterdir() if p.name not in made] if output.is_dir() else []
                if others:
                    check_output_dir(output)
        self._started = True
        self._records.clear()
        if self.is_world_process_zero():
            self.schedule.save(output / SCHEDULE_FILE, overwrite=True)
            if self.difficulty_scores is not None:
                self.difficulty_scores.save(output / SCORES_FILE, overwrite=True)
        return super().train(resume_from_checkpoint=resume_from_checkpoint or None, **kwargs)

    def _resume_state(self, checkpoint: Path) -> list[int]:
        """Rows served before `checkpoint`; `ValueError` unless it continues this very schedule."""
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
        return list(state["served"])

    def _state(self) -> dict[str, Any]:
        return {"schedule": self.schedule.hash, "global_batch": self._global_batch}

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
        loss = (inputs["weight"] * terms.forget).mean()
        if terms.retain is not None:
            loss = loss + self.args.retain_weight * (inputs["retain_scale"] * terms.retain).mean()
        self._record(inputs, terms)
        return (loss, terms) if return_outputs else loss

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Ordinary loss of `eval_dataset`, given in any format the forget dataset may have."""
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = self._prepare_eval(eval_dataset, self.processing_class, self.args.max_length)
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

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
            terms.mean_logps.exp(),
            terms.forget.detach(),
            retain.to(terms.mean_logps),
        ]
        self._records.append(torch.stack([column.double() for column in columns], dim=1))
        self._micro_batches += 1

    def _flush(self) -> None:
        """Gather what was recorded since the last time into metrics and `served_ids`.

        Raises:
            DivergenceError: for a non-finite loss, the same on all processes.
        """
        if not self._records:
            return
        table = gather(torch.cat(self._records)).cpu().numpy()
        self._records.clear()
        table = table[np.lexsort((table[:, 1], table[:, 0]))]  # stable: micro-batch, then process, then position
        table = table[table[:, 2] >= 0]
        rows = table[:, 2].astype(int)
        self._served += rows.tolist()
        probability, forget_loss, retain_loss = table[:, 3], table[:, 4], table[:, 5]
        losses = [forget_loss] if self.unlearning_loss.uses_retain is False else [forget_loss, retain_loss]
        if not all(np.isfinite(values).all() for values in losses):
            bad = next(values for values in losses if not np.isfinite(values).all())
            sample = self.schedule.order[rows[np.flatnonzero(~np.isfinite(bad))[0]]]
            raise DivergenceError(
                f"training diverged: a loss is not finite at step {self.state.global_step} (first at forget sample "
                f"{sample!r}); lower the learning rate or raise the retain weight. The last checkpoint is good."
            )
        metrics = self._metrics["train"]
        metrics["forget_loss"].append(float(forget_loss.mean()))
        metrics["forget_prob"].append(float(probability.mean()))
        if self.unlearning_loss.uses_retain:
            metrics["retain_loss"].append(float(retain_loss.mean()))
        if self.buckets is not None:
            position = {sample_id: index for index, sample_id in enumerate(self.forget_ids)}
            bucket = self.buckets[[position[sample_id] for sample_id in self.schedule.order[rows]]]
            values = defaultdict(list)
            for number, value in zip(bucket, probability, strict=True):
                values[int(number) + 1].append(value)
            for number, found in sorted(values.items()):  # 1 = easiest
                metrics[f"forget_prob/bucket_{number}"].append(float(np.mean(found)))

    def _check_weights(self) -> None:
        """Raise `DivergenceError` when a weight is no longer finite: such a checkpoint must not be written."""
        sums = [parameter.detach().sum() for parameter in self.model.parameters() if parameter.requires_grad]
        if not all(bool(torch.isfinite(total)) for total in sums):
            raise DivergenceError(
                f"training diverged: a weight is not finite after step {self.state.global_step}; lower the learning "
                "rate or raise the retain weight. The last checkpoint is good."
            )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.model.training:
            self._flush()
        super().log(logs, start_time)


class _RunState(TrainerCallback):
    """Checks the losses before a checkpoint is written, and puts the run's position into it."""

    def __init__(self, trainer: CUDTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if control.should_save or control.should_evaluate:
            self.trainer._flush()
        if control.should_save:
            self.trainer._check_weights()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and checkpoint.is_dir():
            write_json(checkpoint / STATE_FILE, {**self.trainer._state(), "served": self.trainer._served})

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer._flush()


def _check_may_start(args: CUDConfig) -> None:
    """An output directory with something foreign in it is refused at once; whether a run in it is resumed or started
    anew is only known in `train`."""
    output = Path(args.output_dir)
    known = output.is_dir() and ((output / SCORES_FILE).exists() or any(output.glob("checkpoint-*")))
    resume = bool(args.resume_from_checkpoint) or known
    check_output_dir(output, overwrite=args.overwrite, resume=resume, known=(WORK_DIR,))


def _needed_metrics(args: CUDConfig) -> list[str]:
    if args.difficulty is None:
        return []
    schedule = [args.schedule_metric] if args.schedule_metric else []
    return merge_metrics(args.difficulty, [*schedule, "loss", "length"])


def _load_model(name: str, args: CUDConfig) -> nn.Module:
    options = dict(args.model_init_kwargs or {})  # type: ignore[arg-type]
    # As in TRL: full precision weights unless asked otherwise, mixed precision comes from `bf16`.
    options.setdefault("dtype", "float32")
    options.setdefault("trust_remote_code", args.trust_remote_code)
    return AutoModelForCausalLM.from_pretrained(name, **options)
