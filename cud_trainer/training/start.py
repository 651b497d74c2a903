"""Where a run begins: anew, or at a checkpoint; and how it comes back to the last one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..files import remove_leftovers
from ..ownership import clear
from .checkpoints import (
    CHECKPOINTS,
    SCHEDULE_FILE,
    SCORES_FILE,
    check_starts_anew,
    key_of_checkpoint,
    last_checkpoint,
    read_state,
    remove_cut_short,
)
from .identity import check_same_run


class RunStart:
    """Puts a run where its next step is the first, or the one behind a checkpoint.

    Args:
        trainer: a `CUDTrainer`, before its first step.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer, self._started = trainer, False
        self._progress = json.loads(json.dumps(trainer.progress.state()))  # as it is before the first step

    def at(self, output: Path, checkpoint: Path | None) -> None:
        """Make folder, recorder and progress those of the run before its next step.

        Args:
            output: the run's folder.
            checkpoint: where it goes on; `None` for the first step.

        Raises:
            ValueError: for a checkpoint of another run, or a folder with earlier results that may not go.
        """
        trainer = self.trainer
        writes = trainer.is_world_process_zero()
        state = {"served": [], "progress": self._progress, "began": False}
        if checkpoint is not None:
            read = read_state(checkpoint)
            check_same_run(checkpoint, read, trainer.run_identity(key_of_checkpoint(checkpoint)), trainer.args)
            state = {"began": True, **read}
        elif writes and not self._started:
            if trainer.args.overwrite:
                clear(output, [CHECKPOINTS])
            else:
                check_starts_anew(output, trainer.schedule)
        if writes:
            remove_leftovers(output)
            remove_cut_short(output)
        self._started = True
        trainer.recorder.restart(state["served"])
        trainer.void.restart(resumed=checkpoint is not None, began=state["began"])
        trainer.progress.restore(state["progress"])
        if checkpoint is not None and "retain_weight" in (trainer.args.override or ()):
            trainer.progress.retain_weight = trainer.args.retain_weight
        if writes:
            trainer.schedule.save(output / SCHEDULE_FILE, overwrite=True)
            if trainer.difficulty_scores is not None:
                trainer.difficulty_scores.save(output / SCORES_FILE, overwrite=True)


def back_to_the_last_checkpoint(trainer: Any) -> str:
    """Load the weights that were saved last, and say so."""
    last = last_checkpoint(Path(trainer.args.output_dir))
    if last is None:
        return "No checkpoint was saved: the weights are those of the diverged run."
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return f"The last checkpoint, {last}, is good."
    trainer.load_weights(last)
    return f"The model is back at the last checkpoint, {last}."
