"""Callbacks for a run that is going on."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback, WandbCallback

# What is to be kept: its metric, its name, and the style of its line.
KEPT = {"retain_prob": ("retain", "--"), "heldout_prob": ("held-out", ":")}


class BucketPlot(TrainerCallback):
    """Draws residual memorisation by difficulty bucket over the run for trackers that take images.

    After every evaluation (`eval_strategy` of `CUDConfig`) one picture goes to TensorBoard and Weights & Biases, as far
    as `report_to` names them: a line per bucket, from the easiest to the hardest, the retain set and the held-out set.

    Args:
        trainer: whose trackers are asked; add the callback after the trainer is made.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.history: list[tuple[int, dict[str, float]]] = []

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any = None, **kwargs: Any
    ) -> None:
        named = {key.removeprefix("eval_"): value for key, value in (metrics or {}).items()}
        drawn = {key: value for key, value in named.items() if key.startswith("forget_prob/") or key in KEPT}
        if not drawn or not state.is_world_process_zero:
            return
        if self.history and state.global_step <= self.history[-1][0]:
            self.history = [entry for entry in self.history if entry[0] < state.global_step]
        self.history.append((state.global_step, drawn))
        figure = self.figure()
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                callback.tb_writer.add_figure("unlearning/buckets", figure, state.global_step)
            elif isinstance(callback, WandbCallback) and getattr(callback, "_wandb", None) is not None:
                wandb = callback._wandb
                wandb.log({"unlearning/buckets": wandb.Image(figure), "train/global_step": state.global_step})

    def figure(self) -> Any:
        """A matplotlib figure of all evaluations so far."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 3.6), layout="constrained")
        axes = figure.subplots()
        steps = [step for step, _ in self.history]
        names = list(self.history[-1][1])
        buckets = [name for name in names if name.startswith("forget_prob/")]
        for number, name in enumerate(buckets):
            shade = 0.25 + 0.75 * number / max(1, len(buckets) - 1)
            label = f"bucket {number + 1}" + {0: " (easiest)", len(buckets) - 1: " (hardest)"}.get(number, "")
            values = [entry.get(name, float("nan")) for _, entry in self.history]
            axes.plot(steps, values, marker="o", markersize=3, color=(0.1, 0.3, 0.6, shade), label=label)
        for name, (label, style) in KEPT.items():
            if name in names:
                values = [entry.get(name, float("nan")) for _, entry in self.history]
                axes.plot(steps, values, color="0.4", linestyle=style, label=label)
        axes.set(xlabel="step", ylabel="answer probability", ylim=(0, 1))
        axes.legend(fontsize=8)
        return figure
