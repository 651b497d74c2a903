"""Weights that go back by a share of their way, step by step: what no step asks for again is undone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

DRAWN = ("lora_A", "lora_embedding_A")  # of a new adapter: without effect while the other factor is 0


class Anchor(TrainerCallback):
    """After every optimizer step, `θ -= share * (θ - θ_0)`, θ_0 the weights before the run.

    The starting point as what weights decay towards (L2-SP, Li et al. 2018, arXiv 1802.01483), decoupled from gradient
    and learning rate as AdamW's decay is from the gradient: the change of the weights is a sum over the last
    `1 / share` steps or so. Forgetting that is done needs no further step and fades, and with it what it cost; what
    comes back is pushed again.

    The share follows the learning rate's schedule (`share * lr / initial_lr`), as AdamW's decay does: where steps
    become smaller, so does the way back, or it would undo at the end of a run what was forgotten.

    With LoRA the second factor (B, 0 at the start of a new adapter) goes back, and with it the whole change.

    Args:
        model: as it is trained, before its first step. One copy of what is trained is kept beside it.
        share: of the way, in (0, 1).

    Raises:
        ValueError: for weights in half precision, in which so small a step is rounded away.
    """

    def __init__(self, model: nn.Module, share: float) -> None:
        self.share = share
        check_whole_floats(model)
        trained = dict(_trained(model))
        self._starts = {
            name: weight.detach().clone() for name, weight in trained.items() if not _is_free(name, trained)
        }
        self._model = model

    @torch.no_grad()
    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        share = self.share * _share_of_rate(kwargs["optimizer"], args)
        for name, weight in self._model.named_parameters():
            if name in self._starts:
                weight.lerp_(self._starts[name].to(weight.device), share)


def _share_of_rate(optimizer: Any, args: TrainingArguments) -> float:
    """The learning rate of the step that was just made, as a share of what its schedule multiplies."""
    group = optimizer.param_groups[0]
    whole = group.get("initial_lr", args.learning_rate)
    return float(group["lr"] / whole) if whole else 1.0


def check_whole_floats(model: nn.Module, *, adapter: bool = False) -> None:
    """Raise `ValueError` naming a trained weight in half precision, in which steps as small as that are rounded away.

    Args:
        adapter: whether a new one is trained instead: its weights are made in float32.
    """
    for name, weight in () if adapter else _trained(model):
        if torch.finfo(weight.dtype).bits < 32:
            dtype = str(weight.dtype).removeprefix("torch.")
            raise ValueError(
                f"l2_sp needs trained weights in float32, but {name} is {dtype}, in which steps as small as that are "
                "rounded away: load the model in float32, or train an adapter"
            )


def _trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, weight) for name, weight in model.named_parameters() if weight.requires_grad)


def _is_free(name: str, trained: dict[str, nn.Parameter]) -> bool:
    """Whether a weight is the factor of a new adapter that is drawn at random."""
    for drawn in DRAWN:
        other = trained.get(name.replace(drawn, drawn[:-1] + "B"))
        if f".{drawn}." in name and other is not None and not other.any():
            return True
    return False
