"""One unlearning step on a paired batch: per-sample forget and retain losses, and the reference quantities they need.

`CUDTrainer` and the calibration run both train through `UnlearningLoss`, so that what is calibrated is what is run.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from ..data import length_sorted_batches
from ..logprobs import AnswerScores, evaluation_mode, score_answers
from .losses import OBJECTIVES, Objective
from .retain import RETAIN_LOSSES, retain_kl, retain_nll


@dataclass
class Reference:
    """What the model before unlearning said, computed once: no second model is kept.

    Attributes:
        forget_logps: answer log-probability of each forget sample, `[N]`, or `None`.
        retain_top_logps, retain_top_ids: per retain sample the top-k of each answer token, `[n_tokens, k]`.
    """

    forget_logps: Tensor | None = None
    retain_top_logps: list[Tensor] = field(default_factory=list)
    retain_top_ids: list[Tensor] = field(default_factory=list)


@dataclass
class LossTerms:
    """Per-sample losses of a batch of `B` pairs.

    Attributes:
        forget: forget loss, `[B]`.
        retain: retain loss, `[B]`, or `None`.
        mean_logps: mean answer log-probability of the forget samples, `[B]`, detached.
    """

    forget: Tensor
    retain: Tensor | None
    mean_logps: Tensor


@dataclass
class UnlearningLoss:
    """Forget loss plus retain loss of a paired batch (see `cud_trainer.data.PairedCollator`).

    Args:
        objective: name in `OBJECTIVES`.
        objective_args: its options.
        retain_loss: `"none"`, `"nll"`, `"kl"`, or `None` for the objective's own.
        kl_top_k: how many tokens of the reference distribution the KL retain loss keeps per position.

    Raises:
        ValueError: for an unknown objective, option or retain loss, or a combination that is undefined.
    """

    objective: str = "npo"
    objective_args: dict[str, Any] = field(default_factory=dict)
    retain_loss: str | None = None
    kl_top_k: int = 128

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise ValueError(f"unknown objective {self.objective!r}; choose one of {sorted(OBJECTIVES)}")
        self.spec.check_options(self.objective_args)
        if self.retain_loss is None:
            self.retain_loss = self.spec.retain_loss
        if self.retain_loss not in RETAIN_LOSSES:
            raise ValueError(f"unknown retain_loss {self.retain_loss!r}; choose one of {list(RETAIN_LOSSES)}")
        if self.spec.requires_retain and self.retain_loss == "none":
            raise ValueError(f"objective {self.objective!r} needs a retain loss; use 'ga' to go without")

    @property
    def spec(self) -> Objective:
        return OBJECTIVES[self.objective]

    @property
    def uses_retain(self) -> bool:
        """Whether a retain dataset is needed."""
        return self.retain_loss != "none"

    def without_retain(self) -> UnlearningLoss:
        """The same objective alone; gradient ascent for one that is undefined alone."""
        name, options = ("ga", {}) if self.spec.requires_retain else (self.objective, self.objective_args)
        return UnlearningLoss(name, options, "none", self.kl_top_k)

    @torch.no_grad()
    def reference(
        self,
        model: torch.nn.Module,
        forget: Dataset,
        retain: Dataset | None,
        *,
        pad_token_id: int,
        batch_size: int,
        device: torch.device | str,
    ) -> Reference:
        """Score the datasets once with `model` as it is now (in eval mode, restored afterwards)."""
        result = Reference()
        with evaluation_mode(model):
            if self.spec.needs_reference:
                for rows, batch in length_sorted_batches(forget, batch_size, pad_token_id, device=device):
                    logps = score_answers(model, batch).logps
                    if result.forget_logps is None:
                        result.forget_logps = logps.new_zeros(len(forget))
                    result.forget_logps[rows] = logps
            if self.retain_loss == "kl":
                assert retain is not None
                result.retain_top_logps = [torch.empty(0)] * len(retain)
                result.retain_top_ids = [torch.empty(0)] * len(retain)
                for rows, batch in length_sorted_batches(retain, batch_size, pad_token_id, device=device):
                    scores = score_answers(model, batch)
                    logps = scores.logits.float().log_softmax(-1)
                    top, ids = logps.topk(min(self.kl_top_k, logps.shape[-1]), dim=-1)
                    for position, row in enumerate(rows):
                        answer = scores.mask[position]
                        # Kept off the accelerator: it grows with the retain set, a batch of it does not.
                        result.retain_top_logps[row] = top[position, answer].cpu()
                        result.retain_top_ids[row] = ids[position, answer].cpu()
        return result

    def __call__(self, model: torch.nn.Module, batch: dict[str, Tensor], reference: Reference) -> LossTerms:
        """Per-sample losses of a paired batch, in one forward pass."""
        pairs = len(batch["forget_index"])
        scores = score_answers(model, batch)
        forget = scores[:pairs]
        reference_logps = None
        if reference.forget_logps is not None:
            index = batch["forget_index"].to(reference.forget_logps.device)
            reference_logps = reference.forget_logps[index].to(forget.logps.device)
        forget_loss = self.spec.loss(forget.logps, forget.lengths, reference_logps, **self.objective_args)
        retain_loss = None
        if self.uses_retain:
            retain_loss = self._retain(scores[pairs:], batch["retain_index"], reference)
        return LossTerms(forget_loss, retain_loss, forget.mean_logps.detach())

    def _retain(self, scores: AnswerScores, index: Tensor, reference: Reference) -> Tensor:
        if self.retain_loss == "nll":
            return retain_nll(scores.logps, scores.lengths)
        rows = index.tolist()
        k = reference.retain_top_logps[rows[0]].shape[-1]
        logps = torch.zeros(*scores.mask.shape, k, device=scores.mask.device)
        ids = torch.zeros(*scores.mask.shape, k, dtype=torch.long, device=scores.mask.device)
        for position, row in enumerate(rows):
            answer = scores.mask[position]
            logps[position, answer] = reference.retain_top_logps[row].to(logps.device)
            ids[position, answer] = reference.retain_top_ids[row].to(ids.device)
        return retain_kl(scores.logits, scores.mask, logps, ids)
