"""What is left of the forget set, and of the retain set, in the model as it is now."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather

from ..data import Samples
from ..difficulty import Buckets
from ..logprobs import answer_probability, answer_recall
from ..models.generation import stop_tokens
from ..models.layers import widest_float
from .inputs import RunInputs

COSTLY = 0.05  # share of the probability that a set had which may go without a warning


def share_lost(before: float, after: float) -> float | None:
    """Which share of a set's answer probability unlearning cost, negative for a gain; `None` if that is undefined."""
    lost = (before - after) / before if before > 0 else np.nan
    return float(lost) if np.isfinite(lost) else None


def last_measured(trainer: Any) -> dict[str, float] | None:
    """The last evaluation of the weights that a `CUDTrainer` has now, as it stands in its log; `None` without one."""
    state = trainer.state
    best = state.best_global_step if trainer.args.load_best_model_at_end else None
    step = best if has_ended(trainer) and best is not None else state.global_step
    entries = [entry for entry in state.log_history if "eval_forget_prob" in entry and entry["step"] == step]
    return entries[-1] if entries else None


def has_ended(trainer: Any) -> bool:
    """Whether training has come to its end: the base class writes its last line then."""
    return any("train_runtime" in entry for entry in trainer.state.log_history)


class ResidualMemorisation:
    """Measures answer probabilities of a trainer's model.

    Args:
        trainer: a `CUDTrainer`, wrapped for its device.
        inputs: of the run.
        buckets: difficulty buckets of the forget samples, or `None`.
        stepwise: whether the run looks at every sample after every step, and so from the start.

    Attributes:
        at_start: answer probability of each forget sample before training, `[N]`; `None` where nobody asks for it.
        retain_at_start: mean answer probability of the retain samples then; `None` likewise.
    """

    def __init__(self, trainer: Any, inputs: RunInputs, buckets: Buckets | None, *, stepwise: bool) -> None:
        self.trainer, self.inputs, self.buckets = trainer, inputs, buckets
        self.forget, self.retain, self.heldout = inputs.forget, inputs.evaluated_retain, inputs.evaluated_heldout
        self.stop = stop_tokens(inputs.tokenizer, trainer.model)
        evaluates = inputs.args.eval_strategy != "no"
        self.at_start = self.probabilities(self.forget) if stepwise or evaluates else None
        self.retain_at_start = self._mean(self.retain) if evaluates and self.retain is not None else None

    def measure(self) -> tuple[np.ndarray, dict[str, float]]:
        """Answer probability of each forget sample, `[N]`, and the metrics that `CUDTrainer.predict` describes."""
        probability, strength = self._of_each(self.forget, answer_recall, stop=self.stop)
        metrics = {"forget_prob": float(probability.mean())}
        if np.isfinite(strength).any():
            metrics["forget_extraction"] = float(np.nanmean(strength))
        if self.buckets is not None:
            metrics |= {f"forget_prob/bucket_{n}": mean for n, mean in self.buckets.means(probability).items()}
        if self.retain is not None:
            metrics["retain_prob"] = self._mean(self.retain)
        if self.heldout is not None:
            metrics["heldout_prob"] = self._mean(self.heldout)
        start = None if self.at_start is None else float(self.at_start.mean())
        if start:
            forgotten = float(np.clip(1 - metrics["forget_prob"] / start, 0, 1))
            before = self.retain_at_start
            retained = min(metrics["retain_prob"] / before, 1.0) if before else 1.0
            total = forgotten + retained
            metrics["balance"] = 2 * forgotten * retained / total if before and total > 0 else forgotten
        return probability, metrics

    def _mean(self, samples: Samples) -> float:
        return float(self.probabilities(samples).mean())

    def probabilities(self, samples: Samples) -> np.ndarray:
        """Answer probability of each sample, `[N]`, shared among the processes."""
        return self._of_each(samples, answer_probability)[0]

    def _of_each(self, samples: Samples, measure: Callable[..., Any], **options: Any) -> np.ndarray:
        """What `measure` says of each sample, `[figures, N]`, shared among the processes."""
        trainer, args = self.trainer, self.inputs.args
        world, count = args.world_size, len(samples)
        # Every process does as many forward passes: sharded models need all of them for each.
        rows = np.arange(args.process_index, world * -(-count // world), world) % count
        sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
        with trainer.accelerator.autocast():
            part = measure(
                trainer.model_wrapped if sharded else trainer.model,
                samples.select(rows),
                batch_size=args.per_device_eval_batch_size,
                device=args.device if sharded else None,
                **options,
            )
        table = torch.from_numpy(np.column_stack([rows, *np.atleast_2d(part)]))
        if world > 1:
            table = gather(table.to(widest_float(args.device)).to(args.device)).cpu()
        values = np.empty((table.shape[1] - 1, count))
        values[:, table[:, 0].long().numpy()] = table[:, 1:].T.numpy()
        return values
