"""`CUDTrainer`: unlearning that knows how hard each sample is to forget."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl
from transformers.trainer_utils import PredictionOutput

from .config import CUDConfig
from .data.ids import IdKey
from .difficulty import DifficultyScores
from .logprobs import check_padding
from .models.modes import on_device
from .models.shards import as_deepspeed_trains
from .ownership import owned
from .training.anchor import Anchor
from .training.callback import RunCallback
from .training.card import add_section, base_model, unlearning_section
from .training.checkpoints import (
    REFERENCE_FILE,
    checkpoint_to_resume,
    clear_before,
    save_base,
)
from .training.gradients import SIDE, SplitGradients
from .training.hooks import SFTTrainerHooks
from .training.identity import check_goes_on, run_identity
from .training.inputs import RunInputs, prepare_evaluated, record_template
from .training.plan import RunPlan
from .training.progress import DivergenceError, RunProgress
from .training.recorder import StepRecorder
from .training.reference import check_training_mode, run_reference
from .training.residual import ResidualMemorisation, has_ended, last_measured
from .training.stack import check_best_metric
from .training.start import RunStart, back_to_the_last_checkpoint
from .training.void import VoidWatch
from .training.weighted import weighted_loss

__all__ = ["CUDTrainer", "DivergenceError"]


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
        self.inputs, self.plan = inputs, plan
        if args.world_size > 1:  # which waits for a gradient of every weight that is trained
            for parameter in inputs.loss.unreached(self.model):
                parameter.requires_grad_(False)
        # Only a run that looks at itself after every step pays for it.
        limits = (args.retain_limit, args.retain_weight_end, args.target_forget_prob)
        self.stepwise = bool(plan.schedule.dynamic) or any(limit is not None for limit in limits)
        if self.is_deepspeed_enabled:
            as_deepspeed_trains(self.model, self.accelerator.state.deepspeed_plugin.hf_ds_config)
        with on_device(self.model, args.device, put_back=inputs.shards_model):
            check_padding(self.model, "forget", inputs.forget)
            if self.stepwise or inputs.loss.uses_reference:
                check_training_mode(self, inputs)
            self.reference = run_reference(self, inputs, plan)
            self.residual = ResidualMemorisation(self, inputs, plan.buckets, stepwise=self.stepwise)
        self.progress = RunProgress.of(inputs, plan, self.residual.at_start)
        self.split = SplitGradients.of(inputs, self.accelerator)
        self.void = VoidWatch(self, inputs, plan, self.progress)
        self.recorder = StepRecorder(inputs, plan, self.progress, self.train_metrics, self.accelerator, self.void)
        self.forget, self.retain, self.forget_ids = inputs.forget, inputs.retain, inputs.forget.ids
        self.schedule, self.difficulty_scores = plan.schedule, plan.scores
        self.buckets = None if plan.buckets is None else plan.buckets.number
        if args.l2_sp:
            self.add_callback(Anchor(self.accelerator.unwrap_model(self.model), args.l2_sp))
        self.start = RunStart(self)
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
        self.start.at(output, checkpoint)
        try:
            result = self.train_loop(None if checkpoint is None else str(checkpoint), **options)
        except DivergenceError as error:
            raise DivergenceError(f"{error} {back_to_the_last_checkpoint(self)}") from None
        if self.is_world_process_zero() and not self.args.keep_reference:
            (output / REFERENCE_FILE).unlink(missing_ok=True)  # no start of this run has to find it any more
        return result

    def void_reason(self) -> str | None:
        """Why the run came to nothing, in one sentence; `None` if it did not.

        Nothing has moved when no weight is another one than before, and nothing is forgotten when the mean forget
        probability, as it was measured last (`evaluate`), is not below that at the start, which was at least 0.1.
        """
        return self.void.why(self.residual.at_start, self.measured())

    def measured(self) -> dict[str, float] | None:
        """The last evaluation (`evaluate`) of the weights that the model has now; `None` where there was none.

        It is what the card, `cud train` and `predict` agree on. The figures of training steps (`forget_prob` in the
        log) are others: of the samples of those steps, each before its step.
        """
        return last_measured(self)

    def run_identity(self, key: IdKey | None = None) -> dict[str, Any]:
        """What a checkpoint must agree in with the run that goes on from it; with a key as it stands there."""
        return run_identity(self.inputs, self.plan, self.model, self.reference, key)

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
        loss = weighted_loss(terms, inputs, self.progress, side)
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
        if has_ended(self) and self.args.world_size == 1 and self.measured() is None:
            self.log(self.predict(metric_key_prefix="eval").metrics)
        super().create_model_card(*args, **kwargs)
        path = Path(self.args.output_dir) / "README.md"
        if self.is_world_process_zero() and path.is_file():
            add_section(path, unlearning_section(self), base_model(self))
