"""Forget losses. Each is a pure function of log-probabilities that returns one loss per sample.

Notation: `l` is the log-probability of the whole answer (sum over its tokens), `n` its number of tokens, `l̄ = l / n`;
subscript r marks the frozen model before unlearning. Minimising any of them lowers the answer's probability.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn.functional import logsigmoid

from ..options import check_known, check_numbers


@dataclass(frozen=True)
class Objective:
    """A registered forget loss.

    Attributes:
        name: the name used in configs.
        loss: `(logps [B], lengths [B], reference_logps [B] | None, **options) -> loss [B]`.
        needs_reference: whether it uses the log-probabilities under the model before unlearning.
        retain_loss: the retain loss used when the config names none; `"none"` means the method has no retain term.
        requires_retain: whether the method is undefined without a retain term.
    """

    name: str
    loss: Callable[..., Tensor]
    needs_reference: bool = False
    retain_loss: str = "nll"
    requires_retain: bool = False

    def check_options(self, given: dict[str, Any]) -> None:
        """Raise `ValueError` naming an option that this objective does not have or a value it cannot have."""
        owner = f"objective {self.name!r}"
        check_known(owner, self.loss, given)
        check_numbers(owner, given)
        if "beta" in given and not given["beta"] > 0:
            raise ValueError(f"option 'beta' of {owner} must be positive, got {given['beta']!r}")


OBJECTIVES: dict[str, Objective] = {}


def register_objective(name: str, **properties: Any) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Register a forget loss under `name`; `properties` are those of `Objective`. `ValueError` if taken."""

    def register(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
        if name in OBJECTIVES:
            raise ValueError(f"objective {name!r} is already registered")
        OBJECTIVES[name] = Objective(name, loss, **properties)
        return loss

    return register


@register_objective("ga", retain_loss="none")
def gradient_ascent(logps: Tensor, lengths: Tensor, reference_logps: Tensor | None) -> Tensor:
    """Gradient ascent on the negative log-likelihood: `l̄` (Jang et al. 2023, arXiv 2210.01504)."""
    return logps / lengths


@register_objective("graddiff", requires_retain=True)
def gradient_difference(logps: Tensor, lengths: Tensor, reference_logps: Tensor | None) -> Tensor:
    """Gradient ascent beside a retain term: `l̄` (Liu et al. 2022, arXiv 2203.12817; Maini et al. 2024, TOFU)."""
    return logps / lengths


@register_objective("npo", needs_reference=True)
def negative_preference(logps: Tensor, lengths: Tensor, reference_logps: Tensor | None, *, beta: float = 0.1) -> Tensor:
    """Negative preference optimisation: `-(2/β) log σ(-β (l - l_r))` (Zhang et al. 2024, arXiv 2404.05868, eq. 3).

    As β -> 0 its gradient becomes that of gradient ascent on `l`.
    """
    assert reference_logps is not None
    return -(2.0 / beta) * logsigmoid(-beta * (logps - reference_logps))


@register_objective("simnpo")
def simple_negative_preference(
    logps: Tensor, lengths: Tensor, reference_logps: Tensor | None, *, beta: float = 4.5, gamma: float = 0.0
) -> Tensor:
    """SimNPO: `-(2/β) log σ(-β l̄ - γ)`, length-normalised and free of a reference (Fan et al. 2024, 2410.07163)."""
    return -(2.0 / beta) * logsigmoid(-beta * logps / lengths - gamma)
