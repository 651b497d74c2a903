"""What is done with the gradients of a step: the registry `STEPS` of pure functions on forget and retain gradients.

A step of a run has the gradients of two losses over the global batch, one tensor per trained parameter each: of the
weighted forget loss, f, and of the retain loss times its weight, r. `plain` follows their sum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..models.layers import widest_float
from ..registry import Registry, check_options
from .registry import positive

KINDS = ("combination", "perturbation")


@dataclass(frozen=True)
class GradientStep:
    """A registered step.

    Attributes:
        name: the name used in configs.
        kind: `"combination"`: `(forget, retain, **options) -> forget`, what takes the place of the forget gradient;
            `"perturbation"`: `(forget, **options) -> shift`, how far the parameters are moved while the forget gradient
            is taken once more, there; they are put back bit for bit. In both, r is added to what comes out.
        function: the pure function, on lists of tensors.
        requires_retain: whether it says nothing without a retain loss.
        check: `(owner, **options)`, called with every option, given or default; raises `ValueError` for a bad value.
    """

    name: str
    kind: str
    function: Callable[..., list[Tensor]]
    requires_retain: bool = False
    check: Callable[..., Any] | None = None

    def check_options(self, options: dict[str, Any]) -> None:
        """Raise `ValueError` naming an option that this step does not have or a value it cannot have."""
        check_options(f"step {self.name!r}", self.function, options, self.check)


STEPS: Registry[GradientStep] = Registry("step")


def register_step(
    name: str, kind: str = "combination", **properties: Any
) -> Callable[[Callable[..., list[Tensor]]], Callable[..., list[Tensor]]]:
    """Register a step under `name`; `properties` are those of `GradientStep`.

    Raises:
        ValueError: when the name is taken, or for an unknown kind.
    """

    def register(function: Callable[..., list[Tensor]]) -> Callable[..., list[Tensor]]:
        if kind not in KINDS:
            raise ValueError(f"kind of step {name!r} must be one of {list(KINDS)}, got {kind!r}")
        STEPS.add(name, GradientStep(name, kind, function, **properties))
        return function

    return register


def product(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """Inner product over all parameters, float64."""
    return torch.stack(
        [(x.to(widest_float(x.device)) * y.to(widest_float(y.device))).sum() for x, y in zip(a, b, strict=True)]
    ).sum()


@register_step("plain")
def plain(forget: list[Tensor], retain: list[Tensor]) -> list[Tensor]:
    """The gradient of the sum of both losses, from one backward pass: f."""
    return forget


@register_step("gru", requires_retain=True)
def rectified(forget: list[Tensor], retain: list[Tensor]) -> list[Tensor]:
    """The forget gradient without what it takes from the retain loss: `f - min(0, f.r) / |r|² r`.

    Gradient rectified unlearning, Wang et al. 2025, arXiv 2503.09117: where the two point against each other, f is
    projected onto what is orthogonal to r, so that to first order forgetting costs no retain loss.
    """
    size = product(retain, retain)
    against = torch.where(size > 0, product(forget, retain).clamp(max=0) / size, torch.zeros_like(size))
    return [f - against.to(f.dtype) * r for f, r in zip(forget, retain, strict=True)]


@register_step("sam", "perturbation", check=positive("rho"))
def sharpness_aware(forget: list[Tensor], *, rho: float = 0.01) -> list[Tensor]:
    """The forget gradient at `θ + ρ f / |f|`, where a small change of the weights would undo most of the forgetting.

    Sharpness-aware minimisation (Foret et al. 2021, arXiv 2010.01412) of the forget loss alone, for any objective: what
    is forgotten is harder to relearn (Fan et al. 2025, arXiv 2502.05374).

    Args:
        rho: length of the perturbation over all trained parameters together.
    """
    norm = product(forget, forget).sqrt()
    scale = torch.where(norm > 0, rho / norm, torch.zeros_like(norm))
    return [scale.to(f.dtype) * f for f in forget]
