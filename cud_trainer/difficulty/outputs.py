"""What one forward pass tells about each sample: how sure the model is, and where the sample lies in hidden space."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..logprobs import AnswerScores, score_answers
from ..models.modes import evaluation_mode
from ..models.precision import exact


@torch.no_grad()
def output_features(model: PreTrainedModel, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Figures of every sample's answer, and its hidden states.

    Args:
        batch: `input_ids`, `attention_mask`, `labels`, each `[B, T]`; any padding side.

    Returns:
        `mean_logps`, `lengths` `[B]`; `margin`, mean over answer tokens of p(token) minus the largest p of another
        token, in [-1, 1]; `entropy`, mean entropy of the predictions in nats; `hidden`, the middle layer's hidden
        state, mean over all tokens, and `output`, the last layer's, mean over the positions that predict the answer,
        `[B, d]` each.
    """
    with evaluation_mode(model), exact(model):
        scores = score_answers(model, batch, output_hidden_states=True)
    return {
        "mean_logps": scores.mean_logps.float(),
        "lengths": scores.lengths,
        **_confidence(scores),
        "hidden": _middle(scores, batch["attention_mask"]),
        "output": last_hidden(scores),
    }


def last_hidden(scores: AnswerScores, layer: int = -1) -> Tensor:
    """Last hidden state (or another layer's), mean over the positions that predict the answer, float32 `[B, d]`."""
    assert scores.hidden_states is not None
    hidden = scores.hidden_states[layer]
    mask = scores.mask.to(hidden.device).unsqueeze(-1)
    return (hidden[:, scores.positions.to(hidden.device)].float() * mask).sum(1) / mask.sum(1).clamp(min=1)


def _middle(scores: AnswerScores, attention_mask: Tensor) -> Tensor:
    assert scores.hidden_states is not None
    hidden = scores.hidden_states[len(scores.hidden_states) // 2].float()
    mask = attention_mask.to(hidden.device).unsqueeze(-1)
    return (hidden * mask).sum(1) / mask.sum(1)


def _confidence(scores: AnswerScores) -> dict[str, Tensor]:
    logps = scores.logits.float().log_softmax(-1)
    entropy = -(logps.exp() * logps).sum(-1)
    rival = logps.scatter(-1, scores.targets.unsqueeze(-1), -torch.inf).amax(-1)
    margin = scores.token_logps.exp() - rival.exp()
    return {
        "margin": (margin * scores.mask).sum(-1).float() / scores.lengths,
        "entropy": (entropy * scores.mask).sum(-1).float() / scores.lengths,
    }
