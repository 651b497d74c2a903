"""Retain losses: what keeps the model useful while it forgets. Pure, one loss per sample, answer tokens only."""

from __future__ import annotations

import torch
from torch import Tensor

from ..logprobs import answer_mean, wide

RETAIN_LOSSES = ("none", "nll", "kl", "activations")


def retain_nll(logps: Tensor, lengths: Tensor) -> Tensor:
    """Mean negative log-likelihood of the answer tokens, `[B]`."""
    return -logps / lengths


def retain_kl(logits: Tensor, mask: Tensor, reference_logps: Tensor, reference_ids: Tensor) -> Tensor:
    """KL(p_r ‖ p) to the model before unlearning, mean over answer tokens, `[B]`.

    The reference distribution is given by its `k` largest log-probabilities; all other tokens form one further
    outcome. With `k` = vocabulary size this is the exact divergence; below, merging outcomes can only lower it (data
    processing inequality).

    Args:
        logits: `[B, K, V]` of the current model.
        mask: True on answer tokens, `[B, K]`.
        reference_logps: top-k log-probabilities of the reference, `[B, K, k]`.
        reference_ids: the tokens that they belong to, `[B, K, k]`.
    """
    current = wide(logits).log_softmax(-1)
    top = current.gather(-1, reference_ids)
    reference = reference_logps.to(top.dtype)
    divergence = (reference.exp() * (reference - top)).sum(-1)
    if reference_ids.shape[-1] < logits.shape[-1]:
        reference_rest = (1 - reference.exp().sum(-1)).clamp(min=torch.finfo(top.dtype).tiny)
        # Summed over the tail itself: 1 - sum(top) rounds to 0 where the model has collapsed onto the top tokens, just
        # where the tail must pull it back.
        log_rest = current.scatter(-1, reference_ids, -torch.inf).logsumexp(-1)
        # Where float rounding leaves no reference mass in the tail there is nothing to keep.
        tail = reference_rest * (reference_rest.log() - log_rest)
        divergence = divergence + torch.where(reference_rest > 1e-6, tail, torch.zeros_like(tail))
    return answer_mean(divergence, mask)


def retain_activations(hidden: Tensor, mask: Tensor, reference_hidden: Tensor) -> Tensor:
    """`‖h_l(x) - h_l,r(x)‖²` to the model before unlearning, mean over answer positions and hidden dimensions, `[B]`.

    Li et al. 2024, arXiv 2403.03218, eq. 2.

    Args:
        hidden: output of decoder layer l, `[B, K, d]`.
        reference_hidden: the same before unlearning.
        mask: True on answer tokens, `[B, K]`.
    """
    squared = (hidden - reference_hidden.to(hidden)).square().mean(-1)
    return answer_mean(squared, mask)
