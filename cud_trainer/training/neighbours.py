"""Retain partners that are nearest to a forget sample in hidden space, found before the run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

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
    before unlearning: one forward pass of both sets, shared among the processes. The same on all of them. Of the retain
    set no more is kept than the nearest so far.
    """
    args = inputs.args
    if args.retain_pairing != "nearest" or inputs.paired_retain is None:
        return None
    forget, retain = inputs.forget.measured, inputs.paired_retain.measured
    count = min(NEIGHBOURS, len(retain))
    with on_device(inputs.model, args.device, put_back=inputs.shards_model):
        ours = [pair for rows, states in _answer_states(inputs, forget) for pair in zip(rows, states, strict=True)]
        if args.world_size > 1:
            ours = gather_object(ours)
        near = Nearest(np.stack([state for _, state in sorted(ours, key=lambda entry: entry[0])]), count)
        for rows, states in _answer_states(inputs, retain):
            near.see(rows, states)
    if args.world_size > 1:
        for rows, cosines in gather_object([near.found()]):
            near.take(rows, cosines)
    found = [near.found()[0]]
    if args.world_size > 1:  # rounding may differ between devices, the plan must not
        broadcast_object_list(found)
    return found[0]


def nearest(forget: np.ndarray, retain: np.ndarray, count: int) -> np.ndarray:
    """The rows of `retain`, `[R, d]`, nearest to each row of `forget`, `[N, d]`, by cosine; int `[N, count]`.

    The nearest first; of equal ones (to 4 decimals) that which comes first in the retain set.
    """
    near = Nearest(forget, count)
    for start in range(0, len(retain), AT_A_TIME):
        part = retain[start : start + AT_A_TIME]
        near.see(np.arange(start, start + len(part)), part)
    return near.found()[0]


class Nearest:
    """The retain samples nearest to each forget sample, of those seen so far, in any order.

    Args:
        forget: states, `[N, d]`.
        count: how many are kept.
    """

    def __init__(self, forget: np.ndarray, count: int) -> None:
        self.forget, self.count = _of_length_1(forget), count
        self._rows = np.empty((len(forget), 0), dtype=np.int64)
        self._cosines = np.empty((len(forget), 0))
        self._waiting: list[tuple[np.ndarray, np.ndarray]] = []

    def see(self, rows: Sequence[int] | np.ndarray, states: np.ndarray) -> None:
        """Take in some retain samples, by their rows, int `[n]`, and states, `[n, d]`."""
        self._waiting.append((np.asarray(rows, dtype=np.int64), states))
        if sum(len(part) for part, _ in self._waiting) >= AT_A_TIME:
            self._look()

    def take(self, rows: np.ndarray, cosines: np.ndarray) -> None:
        """Take in what another has `found`; what is here already does not come again."""
        rows, cosines = np.hstack([self._rows, rows]), np.hstack([self._cosines, cosines])
        order = np.lexsort((rows, -cosines), axis=1)
        rows, cosines = np.take_along_axis(rows, order, 1), np.take_along_axis(cosines, order, 1)
        again = np.zeros(rows.shape, dtype=bool)
        again[:, 1:] = rows[:, 1:] == rows[:, :-1]  # with the same cosine, so that it stands beside itself
        order = np.argsort(again, axis=1, kind="stable")[:, : min(self.count, int((~again).sum(1).min()))]
        self._rows, self._cosines = np.take_along_axis(rows, order, 1), np.take_along_axis(cosines, order, 1)

    def found(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows, int `[N, count]`, the nearest first, and their cosines, to 4 decimals."""
        self._look()
        return self._rows, self._cosines

    def _look(self) -> None:
        if self._waiting:
            rows = np.concatenate([part for part, _ in self._waiting])
            states = _of_length_1(np.concatenate([states for _, states in self._waiting]))
            self._waiting = []
            cosines = np.round(self.forget @ states.T, DECIMALS)
            self.take(np.broadcast_to(rows, cosines.shape), cosines)


def _of_length_1(states: np.ndarray) -> np.ndarray:
    states = np.asarray(states, dtype=np.float64)
    return states / np.maximum(np.linalg.norm(states, axis=1, keepdims=True), np.finfo(np.float64).tiny)


@torch.no_grad()
def _answer_states(inputs: RunInputs, samples: Samples) -> Iterator[tuple[list[int], np.ndarray]]:
    """Rows and middle-layer states, `[n, d]`, of the answers of this process's share of the samples, batch by batch."""
    args, model = inputs.args, inputs.model
    rows = np.arange(args.process_index, len(samples), args.world_size)
    with evaluation_mode(model):
        device = model.get_input_embeddings().weight.device  # type: ignore[operator, union-attr]
        for some, batch in samples.select(rows).batches(args.per_device_train_batch_size, device=device):
            scores = score_answers(model, batch, output_hidden_states=True)
            assert scores.hidden_states is not None
            yield rows[some].tolist(), last_hidden(scores, len(scores.hidden_states) // 2).cpu().numpy()
