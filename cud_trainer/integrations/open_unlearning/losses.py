"""Forget losses of open-unlearning's trainers by sample.

Each function takes one of their trainers, the (wrapped) model and the forget part of a batch, and returns `[B]` values
whose *mean* is the forget loss that the trainer itself computes on that batch: with weights of 1 nothing changes. Where
theirs is a mean over the tokens of the batch, a sample counts by its share of them; where theirs couples the samples of
a batch in other ways (RMU, UNDIAL), so does this.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Trainer

from ...data import IGNORE_INDEX
from ...logprobs import wide
from ...models.modes import evaluation_mode

# How far our loss with weights of 1 may be from the trainer's own, relative and absolute; bfloat16 has 3 digits.
TOLERANCE = (0.02, 1e-3)
INPUTS = ("input_ids", "attention_mask", "labels")


def model_inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """What a model takes of a batch: no sample index."""
    return {name: batch[name] for name in INPUTS}


def _logits(model: Any, batch: Mapping[str, Any]) -> Tensor:
    """`[B, T, vocabulary]`, in float32 at least."""
    return wide(model(**model_inputs(batch)).logits)


def _answer_logps(model: Any, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the tokens with a label, 0 elsewhere, and where these are, each `[B, T - 1]`."""
    logits = _logits(model, batch)[:, :-1]
    labels = batch["labels"][:, 1:].to(logits.device)
    logps = -F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORE_INDEX, reduction="none")
    return logps, labels != IGNORE_INDEX


def _token_mean(values: Tensor, mask: Tensor) -> Tensor:
    """`[B]`, with the mean of `values` `[B, T]` over all tokens in `mask` for its mean."""
    return (values * mask).sum(1) * len(mask) / mask.sum()


def gradient_ascent(trainer: Any, model: Any, forget: Mapping[str, Any]) -> Tensor:
    """GradAscent, GradDiff: the log-probability, mean over tokens."""
    return _token_mean(*_answer_logps(model, forget))


def wga(trainer: Any, model: Any, forget: Mapping[str, Any]) -> Tensor:
    """`p^beta log p`, mean over tokens; the power is not differentiated."""
    logps, mask = _answer_logps(model, forget)
    return _token_mean(logps.exp().detach() ** trainer.beta * logps, mask)


def satimp(trainer: Any, model: Any, forget: Mapping[str, Any]) -> Tensor:
    """`p^beta1 (1 - p)^beta2 log p`, mean over tokens; the powers are not differentiated."""
    logps, mask = _answer_logps(model, forget)
    p = logps.exp().detach()
    return _token_mean(p**trainer.beta1 * (1 - p) ** trainer.beta2 * logps, mask)


def ceu(trainer: Any, model: Any, forget: Mapping[str, Any]) -> Tensor:
    """Cross entropy with the model's own distribution less the true token, mean over tokens; the first are left out."""
    logits = _logits(model, forget)
    labels = forget["labels"].to(logits.device)
    answer = labels != IGNORE_INDEX
    counted = (answer & (answer.cumsum(-1) > trainer.ignore_first_n_answer_tokens))[:, 1:]
    chosen = logits[:, :-1][counted]
    target = chosen.detach().scatter(-1, labels[:, 1:][counted].unsqueeze(-1), float("-inf")).softmax(-1)
    values = torch.zeros(counted.shape, dtype=logits.dtype, device=logits.device)
    values[counted] = -(target * chosen.log_softmax(-1)).sum(-1)
    return _token_mean(values, counted)


def undial(trainer: Any, model: Any, forget: Mapping[str, Any]) -> Tensor:
    """Cross entropy with the start model's distribution, the logit of the label lowered by beta; over *all* positions.

    As theirs does, this counts prompt and padding, where the label -100 stands for the hundredth token from the end
    of the vocabulary.
    """
    logits = _logits(model, forget)[:, :-1]
    with torch.no_grad():
        target = _logits(trainer.ref_model, forget)[:, :-1].to(logits.device)
    labels = (forget["labels"][:, 1:].to(logits.device) % logits.shape[-1]).unsqueeze(-1)
    lowered = target.scatter_add(-1, labels, torch.full_like(labels, -trainer.beta, dtype=target.dtype))
    return -(lowered.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean(1)


def _log_ratio(trainer: Any, model: Any, batch: Mapping[str, Any]) -> Tensor:
    """Log-probability of the answers less that under the start model, `[B]`."""
    now = _answer_logps(model, batch)[0].sum(1)
    with torch.no_grad():
        start = _answer_logps(trainer.ref_model, batch)[0].sum(1)
    return now - start.to(now.device)


def npo(trainer: Any, model: Any, forget: Mapping[str, Any]) -> Tensor:
    """`-2/beta log sigmoid(-beta log-ratio)`."""
    return -2 / trainer.beta * F.logsigmoid(-trainer.beta * _log_ratio(trainer, model, forget))


def dpo(trainer: Any, model: Any, forget: Mapping[str, Any]) -> Tensor:
    """`-2/beta log sigmoid(beta (log-ratio of the alternate answer - that of the original))`."""
    wanted, unwanted = (_log_ratio(trainer, model, forget[name]) for name in ("alternate", "original"))
    return -2 / trainer.beta * F.logsigmoid(trainer.beta * (wanted - unwanted))


def simnpo(trainer: Any, model: Any, forget: Mapping[str, Any]) -> Tensor:
    """`-2/beta log sigmoid(beta (mean loss of the answer's tokens - delta))`."""
    logps, _ = _answer_logps(model, forget)
    lengths = (forget["labels"] != IGNORE_INDEX).sum(-1).to(logps.device)
    return -2 / trainer.beta * F.logsigmoid(trainer.beta * (-logps.sum(1) / lengths - trainer.delta))


def rmu(trainer: Any, model: Any, forget: Mapping[str, Any]) -> Tensor:
    """Squared distance of the activations to the control vector, summed over the answer.

    As theirs does, this divides by the answer lengths of the whole batch (the mean of their inverses), not by each
    sample's own.
    """
    hidden = trainer.forward_with_cache(model, model_inputs(forget), trainer.model_module, no_grad=False)[0]
    control = trainer.get_control_vector(hidden.shape[-1]).to(hidden)
    mask = (forget["labels"] != IGNORE_INDEX).to(hidden.device)
    distance = ((hidden - control).square().mean(-1) * mask).sum(1)
    return distance * (1 / mask.sum(1)).mean()


def pdu(trainer: Any, model: Any, forget: Mapping[str, Any]) -> Tensor:
    """`(largest logit - mean logit)^2`, mean over the tokens with a label (not those that predict them, as theirs)."""
    logits = _logits(model, forget)
    values = (logits.amax(-1) - logits.mean(-1)).square()
    return _token_mean(values, (forget["labels"] != IGNORE_INDEX).to(logits.device))


# By the name of their class.
FORGET_LOSSES: dict[str, Callable[[Any, Any, Mapping[str, Any]], Tensor]] = {
    "GradAscent": gradient_ascent,
    "GradDiff": gradient_ascent,
    "NPO": npo,
    "DPO": dpo,
    "SimNPO": simnpo,
    "RMU": rmu,
    "UNDIAL": undial,
    "CEU": ceu,
    "WGA": wga,
    "SatImp": satimp,
    "PDU": pdu,
}


def complete(trainer: Any, model: Any, inputs: Mapping[str, Any], forget_loss: Tensor) -> Tensor:
    """The loss of a step: the forget loss, and the retain term of the trainers that have one, by their own code."""
    if not hasattr(trainer, "compute_retain_loss"):
        return forget_loss
    retain_loss = trainer.compute_retain_loss(model=model, retain_inputs=model_inputs(inputs["retain"]))
    if hasattr(trainer, "final_loss_value"):  # PDU: the dual weight of the retain term follows the run
        return trainer.final_loss_value([forget_loss, retain_loss])
    return trainer.gamma * forget_loss + trainer.alpha * retain_loss


def compare(trainer: Any, model: Any, inputs: Mapping[str, Any], trainer_class: type[Trainer]) -> None:
    """Raise `ValueError` unless our forget losses give the loss of the trainer's own `compute_loss` on this batch.

    PDU's own has side effects (its dual weight, its log) and is not called.
    """
    if hasattr(trainer, "final_loss_value"):
        return
    name = trainer_class.__name__
    with torch.no_grad(), evaluation_mode(model):
        theirs = float(trainer_class.compute_loss(trainer, model, inputs))
        ours = float(complete(trainer, model, inputs, FORGET_LOSSES[name](trainer, model, inputs["forget"]).mean()))
    if not abs(ours - theirs) <= TOLERANCE[0] * abs(theirs) + TOLERANCE[1]:
        raise ValueError(
            f"{name} of this version of open-unlearning is not the one whose losses are known by sample: its loss is "
            f"{theirs:.6g}, that made of them {ours:.6g}; use weights: sampling"
        )
