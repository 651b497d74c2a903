"""The callback that ties a run to the Trainer's loop."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from ..files import DiskFullError, write_json
from ..models.trainable import check_gradients
from .checkpoints import STATE_FILE
from .identity import checkpoint_state
from .progress import DivergenceError

logger = logging.get_logger(__name__)


class RunCallback(TrainerCallback):
    """Follows the run from step to step, checks a checkpoint before it is written, and puts the run's position into it.

    Args:
        trainer: a `CUDTrainer`.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer, self._moved = trainer, False

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trainer, void = self.trainer, self.trainer.void
        looks = not (self._moved or void.sharded) and void.batch_has_weight(state.global_step)
        if looks:
            check_gradients(trainer.model, every_layer=False)
        if void.before_step(state.global_step):
            logger.warning(str(void.reason))
            control.should_training_stop = True
        elif looks and void.began:  # the first gradient that means something: all that is trained must get some of it
            check_gradients(trainer.model, every_layer=not trainer.inputs.loss.uses_hidden)
            self._moved = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.trainer.stepwise:
            self._follow(state, control)
        elif control.should_save or control.should_evaluate:
            self.trainer.recorder.flush(state.global_step)
        if control.should_save:
            self._check_weights(state)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and checkpoint.is_dir():
            try:
                write_json(checkpoint / STATE_FILE, checkpoint_state(self.trainer), private=True)
            except DiskFullError:
                shutil.rmtree(checkpoint, ignore_errors=True)
                raise

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.recorder.flush(state.global_step)
        self.trainer.void.after_training()

    def _follow(self, state: TrainerState, control: TrainerControl) -> None:
        """Take in the step that has just ended: new weights, a new balance, or the end."""
        record, progress = self.trainer.recorder.flush(state.global_step), self.trainer.progress
        if record is None:
            return
        progress.after_step(record, state.global_step)
        if progress.done:
            logger.info(f"the mean forget probability is {progress.forget_prob:.4f} at step {state.global_step}: done")
            control.should_training_stop = True

    def _check_weights(self, state: TrainerState) -> None:
        """Raise `DivergenceError` when a weight is no longer finite: such a checkpoint must not be written."""
        parameters = self.trainer.model.parameters()
        sums = [parameter.detach().sum() for parameter in parameters if parameter.requires_grad]
        if not all(bool(torch.isfinite(total)) for total in sums):
            raise DivergenceError(
                f"training diverged: a weight is not finite after step {state.global_step}; lower the learning "
                "rate or raise the retain weight."
            )
