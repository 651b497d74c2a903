"""Retain partners that are nearest to a forget sample in hidden space, found before the run."""

from __future__ import annotations

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object

from ..data import Samples
from ..difficulty.outputs import last_hidden
from ..logprobs import score_answers
from ..models.modes import evaluation_mode, on_device
from .inputs import RunInputs

# How many retain samples a forget sample has in turn.
NEIGHBOURS = 8
# Cosines that agree to this many decimals are equal, so that rounding does not choose.
DECIMALS = 4
AT_A_TIME = 256


def retain_neighbours(inputs: RunInputs) -> np.ndarray | None:
    """The retain samples nearest to each forget sample, see `nearest`; `None` where partners are drawn at random.

    By the cosine of middle-layer states, mean over the positions that predict the answer's own tokens, in the model
    before unlearning: one forward pass of both sets, shared among the processes. The same on all of them.
    """
    args = inputs.args
    if args.retain_pairing != "nearest" or inputs.paired_retain is None:
        return None
    with on_device(inputs.model, args.device, put_back=inputs.shards_model):
        ours, others = (_answer_states(inputs, part.measured) for part in (inputs.forget, inputs.paired_retain))
    found = [nearest(ours, others, min(NEIGHBOURS, len(others)))]
    if args.world_size > 1:  # rounding may differ between devices, the plan must not
        broadcast_object_list(found)
    return found[0]


def nearest(forget: np.ndarray, retain: np.ndarray, count: int) -> np.ndarray:
    """The rows of `retain`, `[R, d]`, nearest to each row of `forget`, `[N, d]`, by cosine; int `[N, count]`.

    The nearest first; of equal ones (to 4 decimals) that which comes first in the retain set.
    """
    ours, others = (
        states / np.maximum(np.linalg.norm(states, axis=1, keepdims=True), np.finfo(np.float64).tiny)
        for states in (np.asarray(forget, dtype=np.float64), np.asarray(retain, dtype=np.float64))
    )
    found = []
    for start in range(0, len(ours), AT_A_TIME):
        cosine = np.round(ours[start : start + AT_A_TIME] @ others.T, DECIMALS)
        found.append(np.argsort(-cosine, axis=1, kind="stable")[:, :count])
    return np.concatenate(found)


@torch.no_grad()
def _answer_states(inputs: RunInputs, samples: Samples) -> np.ndarray:
    """Middle-layer state of each sample's answer, `[N, d]`, shared among the processes."""
    args, model = inputs.args, inputs.model
    rows = np.arange(args.process_index, len(samples), args.world_size)
    found: list[tuple[int, np.ndarray]] = []
    with evaluation_mode(model):
        device = model.get_input_embeddings().weight.device  # type: ignore[operator, union-attr]
        for some, batch in samples.select(rows).batches(args.per_device_train_batch_size, device=device):
            scores = score_answers(model, batch, output_hidden_states=True)
            assert scores.hidden_states is not None
            states = last_hidden(scores, len(scores.hidden_states) // 2).cpu().numpy()
            found += zip(rows[some].tolist(), states, strict=True)
    if args.world_size > 1:
        found = gather_object(found)
    return np.stack([state for _, state in sorted(found, key=lambda entry: entry[0])])
