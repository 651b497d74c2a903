"""Optimizer steps that look at forget and retain gradients apart (see `cud_trainer.objectives.gradients`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import reduce
from torch import Tensor, nn

from ..objectives import STEPS
from ..objectives.gradients import GradientStep
from .inputs import RunInputs

Gradients = list[Tensor | None]

SIDE = "side"  # of a batch: which of its losses is wanted, where they are taken apart


class SplitGradients:
    """Gathers the gradients of both sides over the micro-batches of a step, and makes one of them at its end.

    Each side has its own forward and backward pass, so that two sides together cost what one batch of both does. Sums
    over micro-batches and means over processes come first, the step's function last: it sees the global batch, however
    that is split. Nothing outlives an optimizer step, so there is no state to resume.

    Args:
        step, options: what is done with the gradients.
        accelerator: whose processes share theirs.
        sides: `"forget"`, and `"retain"` where there is a retain loss.
    """

    def __init__(self, step: GradientStep, options: dict[str, Any], accelerator: Any, sides: tuple[str, ...]) -> None:
        self.step, self.options, self.accelerator, self.sides = step, options, accelerator, sides
        self._sums: dict[str, Gradients] = {}
        self._batches: list[Any] = []

    @classmethod
    def of(cls, inputs: RunInputs, accelerator: Any) -> SplitGradients | None:
        """Of a run; `None` where it looks at the gradient of the whole loss."""
        args = inputs.args
        if args.step == "plain":
            return None
        sides = ("forget", "retain") if inputs.loss.uses_retain else ("forget",)
        return cls(STEPS[args.step], dict(args.step_args), accelerator, sides)  # type: ignore[arg-type]

    def micro_batch(self, model: nn.Module, inputs: Any, backward: Callable[[str, Any], Tensor]) -> Tensor:
        """Take in a micro-batch; at the last one of the step, leave the step's gradient in the parameters.

        Args:
            backward: `(side, inputs) -> loss`, which adds the gradient of that side's loss to the parameters; the side
                `"again"` is the forget side at other parameters.
        """
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        # Processes share what the micro-batches come to, by `_shared`: not every backward pass of a side.
        with self.accelerator.no_sync(model):
            loss = torch.stack([self._add(parameters, side, inputs, backward) for side in self.sides]).sum()
            if self.step.kind == "perturbation":
                self._batches.append(inputs)
            if self.accelerator.sync_gradients:
                self._finish(parameters, backward)
        return loss

    def _add(
        self, parameters: list[nn.Parameter], side: str, inputs: Any, backward: Callable[[str, Any], Tensor]
    ) -> Tensor:
        before = self._sums.get(side, [None] * len(parameters))
        for parameter, gradient in zip(parameters, before, strict=True):
            parameter.grad = gradient
        loss = backward(side, inputs)
        self._sums[side] = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None
        return loss

    def _finish(self, parameters: list[nn.Parameter], backward: Callable[[str, Any], Tensor]) -> None:
        forget = self._shared(parameters, "forget")
        retain = self._shared(parameters, "retain")
        if self.step.kind == "perturbation":
            forget = self._at_a_distance(parameters, self.step.function(forget, **self.options), backward)
        else:
            forget = self.step.function(forget, retain, **self.options)
        for parameter, f, r in zip(parameters, forget, retain, strict=True):
            parameter.grad = f + r

    def _at_a_distance(
        self, parameters: list[nn.Parameter], shift: list[Tensor], backward: Callable[[str, Any], Tensor]
    ) -> list[Tensor]:
        """The forget gradient of the same micro-batches with the parameters moved by `shift`, and put back after."""
        batches, self._batches = self._batches, []
        before = [parameter.detach().clone() for parameter in parameters]
        try:
            with torch.no_grad():
                for parameter, part in zip(parameters, shift, strict=True):
                    parameter.add_(part)
            for inputs in batches:
                self._add(parameters, "again", inputs, backward)
        finally:
            with torch.no_grad():
                for parameter, value in zip(parameters, before, strict=True):
                    parameter.copy_(value)
        return self._shared(parameters, "again")

    def _shared(self, parameters: list[nn.Parameter], side: str) -> list[Tensor]:
        """Mean over the processes of a side's gradients; zeros for a parameter without one."""
        sums = self._sums.pop(side, [None] * len(parameters))
        own = [
            torch.zeros_like(parameter) if gradient is None else gradient
            for parameter, gradient in zip(parameters, sums, strict=True)
        ]
        if self.accelerator.num_processes == 1 or side not in (*self.sides, "again"):
            return own
        return [reduce(gradient, "mean") for gradient in own]
