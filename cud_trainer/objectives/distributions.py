"""Forget losses on the whole next-token distribution of answer tokens. Pure, one loss per sample, `[B]`."""

from __future__ import annotations

import torch
from torch import Tensor

from ..logprobs import answer_mean, wide
from .registry import not_negative, positive, register_objective


@register_objective("undial", retain_loss="none", token_mean=True, check=positive("beta"))
def self_distillation(
    logits: Tensor,
    mask: Tensor,
    targets: Tensor,
    reference_top_logps: Tensor,
    reference_top_ids: Tensor,
    reference_rest_logps: Tensor,
    *,
    beta: float = 10.0,
) -> Tensor:
    """Cross-entropy to the original distribution with the true token pushed down: `softmax(logits_r - β onehot(y_t))`.

    UNDIAL, Dong et al. 2024, arXiv 2402.10052, mean over answer tokens. The original distribution is kept as its top
    tokens, the true one among them, and one outcome for all others: exact for k = vocabulary, a lower bound below.
    """
    adjusted = reference_top_logps - beta * (reference_top_ids == targets.unsqueeze(-1))
    total = torch.logaddexp(adjusted.logsumexp(-1), reference_rest_logps)
    current = wide(logits).log_softmax(-1)
    entropy = -((adjusted - total.unsqueeze(-1)).exp() * current.gather(-1, reference_top_ids)).sum(-1)
    if reference_top_ids.shape[-1] < logits.shape[-1]:
        rest = current.scatter(-1, reference_top_ids, -torch.inf).logsumexp(-1)
        entropy = entropy - (reference_rest_logps - total).exp() * rest
    return answer_mean(entropy, mask)


@register_objective("ceu", retain_loss="none", token_mean=True, check=not_negative("skip"))
def cross_entropy_unlearning(logits: Tensor, mask: Tensor, targets: Tensor, *, skip: int = 1) -> Tensor:
    """Cross-entropy to the current distribution without the true token: `CE(sg(softmax(logits, y_t left out)), p)`.

    CE-U, Yang 2025, arXiv 2503.01224, mean over answer tokens but the first `skip`, from which an answer can start in
    any direction; 0 for an answer that has no more. sg = no gradient.
    """
    logits = wide(logits)
    target = logits.detach().scatter(-1, targets.unsqueeze(-1), -torch.inf).softmax(-1)
    entropy = -(target * logits.log_softmax(-1)).sum(-1)
    later = mask & (mask.long().cumsum(-1) > skip)
    return answer_mean(entropy, later)


@register_objective("pdu", requires_retain=True, token_mean=True)
def logit_flattening(logits: Tensor, mask: Tensor) -> Tensor:
    """Squared margin of the largest logit over their mean: `mean_t (max logit - mean logit)²`.

    PDU, Entesari et al. 2025, arXiv 2506.05314. The method holds the retain loss at a limit by primal-dual steps of its
    weight: give `retain_limit`.
    """
    logits = wide(logits)
    return answer_mean((logits.amax(-1) - logits.mean(-1)).square(), mask)
