"""The registry of forget losses: pure functions that say by the names of their parameters what they need."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

from ..registry import Registry, check_options, keyword_options

# What a forget loss can ask for. B samples, K positions that predict an answer token of any of them, V tokens of
# vocabulary; everything belongs to the forget sample unless its name says otherwise. "reference" is the model before
# unlearning, "alternative" the answer that takes the sample's place.
QUANTITIES = {
    "logps": "log-probability of the answer, sum over its tokens, [B]",
    "mean_logps": "the same, mean over its tokens, [B]",
    "lengths": "answer tokens, [B]",
    "token_logps": "log-probability of each answer token, [B, K], 0 elsewhere",
    "mask": "True on answer tokens, [B, K]",
    "targets": "token ids of the answer, [B, K]",
    "logits": "next-token logits, [B, K, V]",
    "hidden": "output of decoder layer `layer` (an option the loss must have), [B, K, d]",
    "direction": "a random vector of length 1 with entries >= 0, [d]",
    "reference_logps": "`logps` of the reference, [B]",
    "reference_top_logps": "log-probabilities of the reference's likeliest tokens and the target, [B, K, k]",
    "reference_top_ids": "their token ids, the target first, [B, K, k]",
    "reference_rest_logps": "log of the probability of all other tokens, [B, K]",
    "alternative_logps": "`logps` of the alternative answer, [B]",
    "alternative_mean_logps": "`mean_logps` of it, [B]",
    "alternative_reference_logps": "`logps` of it under the reference, [B]",
}
ALTERNATIVES = ("given", "refusal", "model")
# What an option can go by, sample by sample.
BY = ("length", "difficulty")


@dataclass(frozen=True)
class Objective:
    """A registered forget loss.

    Attributes:
        name: the name used in configs.
        loss: from quantities (positional parameters, named as in `QUANTITIES`) and options (keyword-only parameters)
            to one loss per forget sample, `[B]`. Minimising it unlearns.
        retain_loss: the retain loss used when the config names none; `"none"` means the method has no retain term.
        requires_retain: whether the method is undefined without a retain term.
        alternative: where the alternative answer comes from: `"given"` with the data, a `"refusal"`, or written by the
            `"model"` itself; `None` when there is none.
        token_mean: whether the loss of a sample is a mean over its answer tokens, so that a batch can be averaged over
            tokens instead of samples.
        by_sample: an option that may differ from sample to sample, and what it can go by (out of `BY`), for example
            `{"beta": ("length",)}`: it has an option `beta_by` then, and the loss gets `beta` as a float or `[B]`.
        check: `(owner, **options)`, called with every option, given or default; raises `ValueError` for a bad value.
    """

    name: str
    loss: Callable[..., Tensor]
    retain_loss: str = "nll"
    requires_retain: bool = False
    alternative: str | None = None
    token_mean: bool = False
    by_sample: dict[str, tuple[str, ...]] = field(default_factory=dict)
    check: Callable[..., Any] | None = None

    @cached_property
    def needs(self) -> tuple[str, ...]:
        """Names of the quantities that the loss reads, in its order."""
        parameters = inspect.signature(self.loss).parameters.values()
        return tuple(p.name for p in parameters if p.kind is not inspect.Parameter.KEYWORD_ONLY)

    @property
    def needs_reference(self) -> bool:
        """Whether it reads what the model before unlearning says."""
        return any("reference" in name for name in self.needs)

    def options(self, options: dict[str, Any]) -> dict[str, Any]:
        """All options, given or default."""
        return {**keyword_options(self.loss), **options}

    def check_options(self, options: dict[str, Any]) -> None:
        """Raise `ValueError` naming an option that this objective does not have or a value it cannot have."""
        owner = f"objective {self.name!r}"
        others = {f"{name}_by": choices for name, choices in self.by_sample.items()}
        check_options(owner, self.loss, options, self.check, others=list(others))
        for option, choices in others.items():
            if options.get(option) not in (None, *choices):
                raise ValueError(
                    f"option {option!r} of {owner} must be one of {list(choices)}, got {options[option]!r}"
                )

    def split(self, options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
        """The options of the loss, and what those that go by sample go by: `{"beta": "length"}`."""
        others = {f"{name}_by": name for name in self.by_sample}
        by = {others[option]: value for option, value in options.items() if option in others and value is not None}
        return {option: value for option, value in options.items() if option not in others}, by


OBJECTIVES: Registry[Objective] = Registry("objective")


def register_objective(name: str, **properties: Any) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Register a forget loss under `name`; `properties` are those of `Objective`.

    Raises:
        ValueError: when the name is taken, or a positional parameter is not in `QUANTITIES`.
    """

    def register(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
        objective = Objective(name, loss, **properties)
        unknown = [quantity for quantity in objective.needs if quantity not in QUANTITIES]
        if unknown:
            raise ValueError(
                f"objective {name!r} asks for {unknown[0]!r}; it can ask for {list(QUANTITIES)}, options are "
                "keyword-only"
            )
        if objective.alternative not in (None, *ALTERNATIVES):
            raise ValueError(f"alternative of objective {name!r} must be one of {list(ALTERNATIVES)}")
        if any("alternative" in quantity for quantity in objective.needs) != (objective.alternative is not None):
            raise ValueError(f"objective {name!r} must both read an alternative answer and say where it comes from")
        if "hidden" in objective.needs and "layer" not in keyword_options(loss):
            raise ValueError(f"objective {name!r} reads hidden states: it needs an option 'layer'")
        OBJECTIVES.add(name, objective)
        return loss

    return register


def positive(*names: str) -> Callable[..., None]:
    """A check that the options of these names are above 0."""

    def check(owner: str, **options: Any) -> None:
        for name in names:
            if not options[name] > 0:
                raise ValueError(f"option {name!r} of {owner} must be positive, got {options[name]!r}")

    return check


def not_negative(*names: str) -> Callable[..., None]:
    """A check that the options of these names are at least 0."""

    def check(owner: str, **options: Any) -> None:
        for name in names:
            if not options[name] >= 0:
                raise ValueError(f"option {name!r} of {owner} must not be negative, got {options[name]!r}")

    return check
