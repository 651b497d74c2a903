"""open-unlearning's trainers, aware of difficulty."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import Trainer, TrainerCallback

from ...difficulty import DifficultyScores
from ..trainers import with_difficulty
from .compat import adapted, without_index
from .ids import forget_ids
from .losses import FORGET_LOSSES, compare, complete

PREFIX = "CUD"


def difficulty_aware(trainer_class: type[Trainer]) -> type[Trainer]:
    """`CUD<Name>`: one of their trainers that serves its forget set by difficulty.

    Its `method_args` are those of `trainer_class` and

    - `difficulty`: path of the scores (`.parquet`, `.csv`, `.jsonl`), `None` for schedules that read none;
    - `schedule`, `schedule_args`, `metric`, `weights`: as in `with_difficulty`. `weights: loss` weights forget losses
      (the retain term keeps its own weight) of the trainers in `FORGET_LOSSES`; the others have `weights: sampling`;
    - `ids_from`: `[path, configuration, split]` of the data that was scored; see `forget_ids`.

    The first weighted batch is also put through the trainer's own `compute_loss`: with weights of 1 both must agree.

    Raises:
        ValueError: (constructor) for a dataset that is not anchored at its forget set, scores of other samples, a loss
            that cannot be weighted, or what `with_difficulty` refuses.
    """
    name = trainer_class.__name__
    runnable = base = adapted(trainer_class)
    if name in FORGET_LOSSES:

        class Weighable(runnable):  # type: ignore[misc, valid-type]
            _compared = False

            def per_sample_loss(self, model: Any, inputs: Any) -> torch.Tensor:
                inputs = without_index(inputs)
                if not self._compared:
                    compare(self, model, inputs, runnable)
                    self._compared = True
                return FORGET_LOSSES[name](self, model, inputs["forget"])

            def complete_loss(self, model: Any, inputs: Any, loss: torch.Tensor) -> torch.Tensor:
                return complete(self, model, inputs, loss)

        Weighable.__name__ = name
        base = Weighable

    class DifficultyAware(with_difficulty(base)):  # type: ignore[misc]
        def __init__(
            self,
            *args: Any,
            difficulty: str | DifficultyScores | None = None,
            schedule: str = "uniform",
            schedule_args: Mapping[str, Any] | None = None,
            metric: str | None = None,
            weights: str = "loss",
            ids_from: str | Sequence[str] | None = None,
            **options: Any,
        ) -> None:
            scores = DifficultyScores.load(difficulty) if isinstance(difficulty, str) else difficulty
            tokenizer = options.get("processing_class") or options.get("tokenizer")
            ids = forget_ids(options.get("train_dataset"), scores, tokenizer, plain(ids_from))
            warmup = _pdu_warmup(options) if name == "PDU" else 0
            super().__init__(
                *args,
                difficulty=scores,
                schedule=schedule,
                schedule_args=plain(schedule_args or {}),
                metric=metric,
                ids=ids,
                weights=weights,
                **options,
            )
            if warmup:
                samples = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
                self.add_callback(_DualWarmup(self, warmup * len(ids) / samples))

    DifficultyAware.__name__ = DifficultyAware.__qualname__ = PREFIX + name
    return DifficultyAware


def plain(value: Any) -> Any:
    """Hydra's containers as dictionaries and lists."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(item) for item in value]
    return value


def _pdu_warmup(options: dict[str, Any]) -> int:
    """Take PDU's warm-up, in passes, out of `options`: the whole run is one epoch, whose end would come too late."""
    if not options.get("primal_dual"):
        return 0
    if options.get("dual_update_upon", "step") != "step":
        raise ValueError("PDU updates its dual weight by steps only, since the whole run is one epoch")
    return int(options.get("dual_warmup_epochs") or 0)


class _DualWarmup(TrainerCallback):
    """Lets PDU update its dual weight after so many optimizer steps."""

    def __init__(self, trainer: Any, steps: float) -> None:
        self.trainer, self.steps = trainer, steps

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step >= self.steps:
            self.trainer.enable_updates()
