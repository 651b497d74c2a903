"""`CUDTrainer`: unlearning that knows how hard each sample is to forget."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl
from transformers.trainer_utils import PredictionOutput

from .config import CUDConfig
from .data.ids import IdKey, key_for
from .difficulty import DifficultyScores
from .files import remove_leftovers
from .logprobs import check_padding
from .models.layers import widest_float
from .models.modes import on_device
from .models.shards import as_deepspeed_trains
from .objectives import STEPS
from .ownership import clear, owned
from .schedule import DynamicWeights
from .training.anchor import Anchor
from .training.callback import RunCallback
from .training.card import add_section, base_model, unlearning_section
from .training.checkpoints import (
    CHECKPOINTS,
    REFERENCE_FILE,
    SCHEDULE_FILE,
    SCORES_FILE,
    check_starts_anew,
    checkpoint_to_resume,
    clear_before,
    key_of_checkpoint,
    last_checkpoint,
    read_state,
    remove_cut_short,
    save_base,
)
from .training.gradients import SplitGradients
from .training.hooks import SFTTrainerHooks
from .training.identity import check_goes_on, check_same_run, run_identity
from .training.inputs import RunInputs, prepare_evaluated, record_template
from .training.plan import RunPlan
from .training.progress import DivergenceError, RunProgress
from .training.recorder import StepRecorder
from .training.reference import check_training_mode, run_reference
from .training.residual import ResidualMemorisation
from .training.stack import check_best_metric
from .training.void import VoidWatch

__all__ = ["CUDTrainer", "DivergenceError"]

SIDE = "side"  # of a batch: which of its losses is wanted, where they are taken apart


class CUDTrainer(SFTTrainerHooks):
    """Unlearn a forget set, with weights and an order given by each sample's predicted difficulty.

    A step trains on pairs of one forget and one retain sample. The forget and retain losses are means over the pairs of
    the global batch, the forget loss weighted by the schedule (mean weight 1 over a pass).

    Args:
        model: causal LM, or the path or id of one. It is the reference of NPO and KL as it is handed in; no second
            model is kept.
        args: options; the schedule, its seed (`args.seed`) and the objective are all in there.
        forget_dataset: samples to forget, in any format of `cud_trainer.data.prepare_dataset`.
        retain_dataset: samples to keep; needed unless the retain loss is `"none"`.
        heldout_dataset: samples of groups that neither loss sees: evaluations say what of them is kept.
        eval_dataset: further samples (or a dict of them) for the Trainer's own evaluation loss.
        processing_class: tokenizer with pad and eos tokens; by default the one beside `model`.
        peft_config: train this adapter instead of the weights.
        difficulty_scores: scores made before, or their file; by default computed from `args.difficulty` before anything
            is wrapped.

    Attributes:
        difficulty_scores: the scores in use, in the order of `forget_ids`, or `None`.
        schedule: what is planned, a `Schedule`.
        served_ids: the forget samples served so far, in order, over all processes.

    Raises:
        ValueError: for bad input, naming the sample, column or option, before anything is computed.
    """

    def __init__(
        self,
        model: nn.Module | str | Path,
        args: CUDConfig | None = None,
        *,
        forget_dataset: Dataset,
        retain_dataset: Dataset | None = None,
        heldout_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: Any = None,
        difficulty_scores: DifficultyScores | str | Path | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        compute_metrics: Callable | None = None,
    ) -> None:
        args = CUDConfig("cud-output") if args is None else args
        kept = {"retain_prob": retain_dataset, "heldout_prob": heldout_dataset}
        own = compute_metrics is not None
        check_best_metric(args, eval_dataset, kept=[k for k, v in kept.items() if v is not None], own_metrics=own)
        inputs = RunInputs.checked(
            args,
            model,
            processing_class,
            forget=forget_dataset,
            retain=retain_dataset,
            heldout=heldout_dataset,
            evaluated=eval_dataset,
            peft_config=peft_config,
            scores=difficulty_scores,
            own_optimizer=optimizers[0] is not None,
        )
        check_goes_on(inputs)
        clear_before(inputs.args)
        record_template(inputs)
        plan = RunPlan.of(inputs)
        if inputs.merged:
            save_base(inputs.model, inputs.args)
        # The rows are ready to train on; the base class must not look for text in them.
        inputs.args.dataset_kwargs = {**(inputs.args.dataset_kwargs or {}), "skip_prepare_dataset": True}
        super().__init__(
            model=inputs.model,
            args=inputs.args,
            data_collator=plan.collator,
            train_dataset=Dataset.from_dict(plan.rows),
            # The base class asks for a dataset to evaluate; `evaluate` looks at forget and retain set.
            eval_dataset=inputs.forget.dataset if inputs.evaluates_itself else inputs.evaluated,
            processing_class=inputs.tokenizer,
            peft_config=inputs.peft_config,
            callbacks=callbacks,
            optimizers=optimizers,
            compute_metrics=compute_metrics,
        )
        self._attach(inputs, plan)

    def _attach(self, inputs: RunInputs, plan: RunPlan) -> None:
        """Hang the run on the wrapped model: what it said before, and what follows it from step to step."""
        args = inputs.args
        self.inputs, self.plan, self._started = inputs, plan, False
        if args.world_size > 1:  # which waits for a gradient of every weight that is trained
            for parameter in inputs.loss.unreached(self.model):
                parameter.requires_grad_(False)
        # Only a run that looks at itself after every step pays for it.
        limits = (args.retain_limit, args.target_forget_prob)
        self.stepwise = bool(plan.schedule.dynamic) or any(limit is not None for limit in limits)
        if self.is_deepspeed_enabled:
            as_deepspeed_trains(self.model, self.accelerator.state.deepspeed_plugin.hf_ds_config)
        with on_device(self.model, args.device, put_back=inputs.shards_model):
            check_padding(self.model, "forget", inputs.forget)
            if self.stepwise or inputs.loss.uses_reference:
                check_training_mode(self, inputs)
            self.reference = run_reference(self, inputs, plan)
            self.residual = ResidualMemorisation(self, inputs, plan.buckets, stepwise=self.stepwise)
        start = self.residual.at_start
        logps = np.zeros(len(inputs.forget)) if start is None else np.log(np.maximum(start, 1e-300))
        self.progress = RunProgress(
            plan.forget_row,
            DynamicWeights(plan.schedule.dynamic, logps, plan.steps, plan.schedule.values, np.unique(plan.forget_row)),
            retain_weight=args.retain_weight,
            retain_limit=args.retain_limit,
            dual_rate=args.dual_rate,
            target_forget_prob=args.target_forget_prob,
            max_retain_loss=args.max_retain_loss,
            steps_per_pass=-(-len(inputs.forget) // inputs.global_batch),
        )
        self.split = None
        if args.step != "plain":
            sides = ("forget", "retain") if inputs.loss.uses_retain else ("forget",)
            self.split = SplitGradients(STEPS[args.step], dict(args.step_args), self.accelerator, sides)  # type: ignore[arg-type]
        self._start_state = json.loads(json.dumps(self.progress.state()))
        self.void = VoidWatch(self, inputs, plan, self.progress)
        self.recorder = StepRecorder(inputs, plan, self.progress, self.train_metrics, self.accelerator, self.void)
        self.forget, self.retain, self.forget_ids = inputs.forget, inputs.retain, inputs.forget.ids
        self.schedule, self.difficulty_scores = plan.schedule, plan.scores
        self.buckets = None if plan.buckets is None else plan.buckets.number
        if args.l2_sp:
            self.add_callback(Anchor(self.accelerator.unwrap_model(self.model), args.l2_sp))
        self.add_callback(RunCallback(self))

    @property
    def served_ids(self) -> list[str]:
        """Forget sample ids served so far, in order, over all processes.

        With several processes, those up to the last log, checkpoint or end of training.
        """
        if self.args.world_size == 1:
            self.recorder.flush(self.state.global_step)
        order = self.schedule.order
        return [str(order[row]) for row in self.recorder.served]

    # -- training --------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any):
        """Run the schedule, or continue it.

        Args:
            resume_from_checkpoint: a checkpoint folder, or `True` for the last one in `output_dir`.

        Raises:
            ValueError: when `output_dir` holds earlier results and neither `overwrite` nor a checkpoint is given, or
                when the checkpoint belongs to another run: model, data, schedule, objective, adapter, optimizer,
                rates and weights must be the same, but for what `args.override` names.
            DivergenceError: when a loss is no longer finite.
        """
        output = Path(self.args.output_dir)
        with owned(output) if self.is_world_process_zero() else nullcontext():
            return self._train(output, checkpoint_to_resume(output, resume_from_checkpoint), kwargs)

    def _train(self, output: Path, checkpoint: Path | None, options: dict[str, Any]) -> Any:
        state = {"served": [], "progress": self._start_state, "began": False}
        if checkpoint is not None:
            read = read_state(checkpoint)
            check_same_run(checkpoint, read, self.run_identity(key_of_checkpoint(checkpoint)), self.args)
            state = {"began": True, **read}
        elif self.is_world_process_zero() and not self._started:
            if self.args.overwrite:
                clear(output, [CHECKPOINTS])
            else:
                check_starts_anew(output, self.schedule)
        if self.is_world_process_zero():
            remove_leftovers(output)
            remove_cut_short(output)
        self._started = True
        self.recorder.restart(state["served"])
        self.void.restart(resumed=checkpoint is not None, began=state["began"])
        self.progress.restore(state["progress"])
        if checkpoint is not None and "retain_weight" in (self.args.override or ()):
            self.progress.retain_weight = self.args.retain_weight
        if self.is_world_process_zero():
            self.schedule.save(output / SCHEDULE_FILE, overwrite=True)
            if self.difficulty_scores is not None:
                self.difficulty_scores.save(output / SCORES_FILE, overwrite=True)
        try:
            result = self.train_loop(None if checkpoint is None else str(checkpoint), **options)
        except DivergenceError as error:
            raise DivergenceError(f"{error} {self._back_to_the_last_checkpoint()}") from None
        if self.is_world_process_zero() and not self.args.keep_reference:
            (output / REFERENCE_FILE).unlink(missing_ok=True)  # no start of this run has to find it any more
        return result

    def void_reason(self) -> str | None:
        """Why the run came to nothing, in one sentence; `None` if it did not.

        Nothing has moved when no weight is another one than before, and nothing is forgotten when the mean forget
        probability, as it was measured last (`evaluate`), is not below that at the start, which was at least 0.1.
        """
        start, measured = self.residual.at_start, self.measured()
        return self.void.unmoved() or self.void.unforgotten(
            None if start is None else float(start.mean()), None if measured is None else measured["eval_forget_prob"]
        )

    def measured(self) -> dict[str, float] | None:
        """The last evaluation (`evaluate`) of the weights that the model has now; `None` where there was none.

        It is what the card, `cud train` and `predict` agree on. The figures of training steps (`forget_prob` in the
        log) are others: of the samples of those steps, each before its step.
        """
        best = self.state.best_global_step if self.args.load_best_model_at_end else None
        ended = any("train_runtime" in entry for entry in self.state.log_history)
        step = best if ended and best is not None else self.state.global_step
        entries = [entry for entry in self.state.log_history if "eval_forget_prob" in entry and entry["step"] == step]
        return entries[-1] if entries else None

    def _back_to_the_last_checkpoint(self) -> str:
        """Load the weights that were saved last, and say so."""
        last = last_checkpoint(Path(self.args.output_dir))
        if last is None:
            return "No checkpoint was saved: the weights are those of the diverged run."
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return f"The last checkpoint, {last}, is good."
        self.load_weights(last)
        return f"The model is back at the last checkpoint, {last}."

    def run_identity(self, key: IdKey | None = None) -> dict[str, Any]:
        """What a checkpoint must agree in with the run that goes on from it; with a key as it stands there."""
        return run_identity(self.inputs, self.plan, self.model, self.reference, key)

    def checkpoint_state(self) -> dict[str, Any]:
        """What goes into a checkpoint beside weights and optimizer, as plain JSON values."""
        return {
            **self.run_identity(key_for(self.args.output_dir)),
            "optimizer_state": not self.args.save_only_model,
            "served": self.recorder.served,
            "progress": self.progress.state(),
            "began": self.void.began,
        }

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """As in the base class; on request with the size of every sample's part in the update, or side by side."""
        if self.split is not None and "forget_index" in inputs:

            def backward(side: str, inputs: dict[str, Any]) -> Tensor:
                return super(CUDTrainer, self).training_step(model, {**inputs, SIDE: side}, num_items_in_batch)

            return self.split.micro_batch(model, inputs, backward)
        wanted = self.recorder.wants_update_norms(self.state.global_step + 1, self.state.logging_steps)
        if not wanted or "forget_index" not in inputs:
            return super().training_step(model, inputs, num_items_in_batch)
        with self.recorder.update_norms(self.accelerator.unwrap_model(model), inputs):
            return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ):
        """Weighted forget loss plus retain loss of a paired batch; the ordinary loss of any other batch."""
        if "forget_index" not in inputs:
            return self.ordinary_loss(model, inputs, return_outputs, num_items_in_batch)
        self.draw_nothing(model)
        side = inputs.get(SIDE)
        if side is None:
            terms = self.inputs.loss(model, inputs, self.reference)
        else:
            terms = self.inputs.loss.side("retain" if side == "retain" else "forget", model, inputs, self.reference)
        parts = []
        if side != "retain":
            weight = inputs["weight"]
            if self.schedule.dynamic:
                index, dtype = inputs["forget_index"], widest_float(weight.device)
                factor = torch.from_numpy(self.progress.factor).to(dtype)
                weight = weight.to(dtype) * factor.to(index.device)[index]
            parts.append((weight.to(terms.forget.dtype) * terms.forget).mean())
        if terms.retain is not None:
            scale = inputs["retain_scale"].to(terms.retain.dtype)
            parts.append(self.progress.retain_weight * (scale * terms.retain).mean())
        loss = sum(parts[1:], start=parts[0])
        self.recorder.record(inputs, terms, side)
        if self.recorder.gradients is not None:
            loss.register_hook(self.recorder.gradients.begin_backward)
        return (loss, terms) if return_outputs else loss

    # -- what is measured and told ---------------------------------------------------------------------------------

    def _prepared(self, dataset: Any) -> Any:
        return prepare_evaluated(dataset, self.inputs.tokenizer, self.args.max_length, self.inputs.template)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Ordinary loss of `eval_dataset`, given in any format the forget dataset may have.

        Without one, what `predict` says: residual memorisation by difficulty bucket and what is left of the retain set;
        beside the loss of the trainer's own `eval_dataset`, if it was given one.
        """
        if eval_dataset is not None:
            if not isinstance(eval_dataset, str):
                eval_dataset = self._prepared(eval_dataset)
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        metrics: dict[str, float] = {}
        if self.eval_dataset is not None and not self.inputs.evaluates_itself:
            metrics |= super().evaluate(None, ignore_keys, metric_key_prefix)
        residual = self.predict(metric_key_prefix=metric_key_prefix).metrics
        metrics |= residual
        self.log(residual)
        self.control: TrainerControl = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def predict(self, test_dataset=None, ignore_keys=None, metric_key_prefix: str = "test") -> PredictionOutput:
        """Residual memorisation of the forget set as it is now.

        Returns:
            `predictions`: answer probability of each forget sample, in the order of `forget_ids`, `[N]` in [0, 1];
            `metrics`: its mean, over all samples (`forget_prob`) and by difficulty bucket (`forget_prob/bucket_1` is
            the easiest), the mean over `eval_retain_samples` of the retain set (`retain_prob`) and of the held-out set
            (`heldout_prob`), and `balance`, the harmonic mean of the share forgotten and the share retained of what was
            there at the start, each in [0, 1].
            With a `test_dataset`: what the base class says about that.
        """
        if test_dataset is not None:
            prepared = self._prepared(test_dataset)
            return super().predict(prepared, ignore_keys, metric_key_prefix)
        probability, metrics = self.residual.measure()
        return PredictionOutput(probability, None, {f"{metric_key_prefix}_{k}": v for k, v in metrics.items()})

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.model.training:
            self.recorder.flush(self.state.global_step)
        self.recorder.watch_clipping(logs.get("grad_norm"))
        super().log(logs, start_time)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """TRL's model card, with a section on the unlearning.

        Once training has ended, what is left is measured for it if nobody has (not on several processes, of which one
        alone may be writing the card).
        """
        ended = any("train_runtime" in entry for entry in self.state.log_history)
        if ended and self.args.world_size == 1 and self.measured() is None:
            self.log(self.predict(metric_key_prefix="eval").metrics)
        super().create_model_card(*args, **kwargs)
        path = Path(self.args.output_dir) / "README.md"
        if self.is_world_process_zero() and path.is_file():
            add_section(path, unlearning_section(self), base_model(self))
