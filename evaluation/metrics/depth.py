"""How deep forgetting goes: what hidden states of a model still carry, layer by layer.

A state is what a decoder layer hands on. Only the positions that predict the answer's tokens are looked at and put into
another model: what the prompt is read with stays the original's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from cud_trainer.data import Samples
from cud_trainer.data.batches import BATCH_BYTES
from cud_trainer.logprobs import answer_positions, predictable, score_answers
from cud_trainer.models.layers import base_causal_lm, decoder_layers, embedding_device
from cud_trainer.models.memory import each_batch
from cud_trainer.models.modes import answering, evaluation_mode

# Nats that a layer must take off the answer's mean log-probability to count as one that holds it.
THRESHOLD = 0.05
# Memory by the token that a stacked pass takes beside the logits, in units of the hidden size.
HIDDEN_COPIES = 64
# What a layer hands on is its hidden states, or these and more.
SEVERAL = (tuple, list)


@dataclass(frozen=True)
class Depth:
    """What `layer_drops` says of the forget samples.

    Attributes:
        unlearned: D2, with the states of the unlearned model, `[N, L]`.
        reference: D1, with those of a model that never saw the samples; `None` without one.
    """

    unlearned: np.ndarray
    reference: np.ndarray | None = None

    @property
    def measure(self) -> str:
        """What `values` are: only against a model that never saw the samples they are UDS."""
        return "depth_of_change" if self.reference is None else "uds"

    @property
    def values(self) -> np.ndarray:
        """Depth of every sample, `[N]` in [0, 1]; see `unlearning_depth` and `depth_of_change`."""
        if self.reference is None:
            return depth_of_change(self.unlearned)
        return unlearning_depth(self.reference, self.unlearned)

    @property
    def said(self) -> np.ndarray:
        """Whether there is something to say of a sample, bool `[N]`."""
        return np.ones(len(self.unlearned), dtype=bool) if self.reference is None else holds_answer(self.reference)

    def columns(self) -> dict[str, Any]:
        """Columns of a table of samples: the depth, and the drops by layer as lists."""
        drops = {"depth_drops": self.unlearned, "reference_depth_drops": self.reference}
        lists = {name: list(values) for name, values in drops.items() if values is not None}
        return {self.measure: self.values, **lists}


def unlearning_depth(reference: np.ndarray, unlearned: np.ndarray, threshold: float = THRESHOLD) -> np.ndarray:
    """UDS, the unlearning depth score of every sample, in [0, 1]; higher = gone more deeply, `[N]` (arXiv 2605.24614).

    `sum_l D1 clip(D2 / D1, 0, 1) / sum_l D1` over the layers with `D1 > threshold`: those at which the states of a
    model that never saw the sample take the answer away. 0: the unlearned model's states carry it as the original's do;
    1: they carry no more than those of a model that never saw it.

    Args:
        reference: D1, `layer_drops` of a model that never saw the samples, `[N, L]`.
        unlearned: D2, those of the unlearned model, `[N, L]`.

    Returns:
        NaN where no layer holds the answer (`holds_answer`), or a drop that is needed is no number.
    """
    holding = reference > threshold
    weights = np.where(holding, reference, 0.0)
    weights[np.isnan(reference)] = np.nan
    with np.errstate(invalid="ignore", divide="ignore"):
        shares = np.where(holding, np.clip(unlearned / np.where(holding, reference, 1.0), 0.0, 1.0), 0.0)
        return (weights * shares).sum(1) / weights.sum(1)


def holds_answer(reference: np.ndarray, threshold: float = THRESHOLD) -> np.ndarray:
    """Whether UDS says something of a sample: bool `[N]`, False where D1 is below the threshold at every layer."""
    return (reference > threshold).any(1) | np.isnan(reference).any(1)


def depth_of_change(unlearned: np.ndarray) -> np.ndarray:
    """How much of the answer the unlearned model's states take away from the original, in [0, 1], `[N]`.

    `mean_l (1 - exp(-max(D2, 0)))`: the relative loss of answer probability when the states of one layer are put in,
    mean over layers. For where there is no model that never saw the samples: it says how deep the *change* is, not
    whether it is enough.

    Args:
        unlearned: D2, `layer_drops` of the unlearned model, `[N, L]`.
    """
    return -np.expm1(-np.maximum(unlearned, 0.0)).mean(1)


@torch.no_grad()
def layer_drops(
    original: PreTrainedModel,
    source: PreTrainedModel,
    samples: Samples,
    *,
    batch_size: int = 16,
    desc: str | None = None,
) -> np.ndarray:
    """What putting the states of `source` into `original` takes off the answer, at one layer at a time.

    All layers of a batch are a batch of their own: as many are stacked as fit `BATCH_BYTES`.

    Returns:
        the mean log-probability of the answer (`samples.measured`) under `original` less that with the states of layer
        l from `source` at the positions that predict the answer: nats, float64 `[N, L]`; NaN where it is no number.

    Raises:
        ValueError: for models of different architecture, or one whose layers hand on no `[B, T, hidden]`.
    """
    check_same_architecture(original, source)
    samples = samples.measured
    drops = np.zeros((len(samples), len(decoder_layers(original)[1])))

    def dropped(batch: dict[str, Tensor]) -> np.ndarray:
        whole = score_answers(original, batch).mean_logps
        patched = patched_logps(original, batch, layer_states(source, batch))
        return (whole.cpu().double() - patched).T.numpy()

    with evaluation_mode(original), evaluation_mode(source):
        for rows, found in each_batch(samples, dropped, batch_size, device=embedding_device(original), desc=desc):
            drops[rows] = found
    return drops


@torch.no_grad()
def logit_lens(
    model: PreTrainedModel, samples: Samples, *, batch_size: int = 16, desc: str | None = None
) -> np.ndarray:
    """Answer probability read off every layer: its states go through the model's own final norm and head.

    Whatever the model does behind its last layer (norm, scale, cap, projection) is done by the model itself, with its
    layers passing on what they are given.

    Returns:
        `exp` of the mean log-probability of the answer (`samples.measured`), float64 `[N, L]` in [0, 1]; the last
        column is the model's answer probability.
    """
    samples = samples.measured
    values = np.zeros((len(samples), len(decoder_layers(model)[1])))

    def read_off(batch: dict[str, Tensor]) -> np.ndarray:
        states = layer_states(model, batch)
        logps = patched_logps(model, batch, states, at=[len(states) - 1] * len(states), through=False)
        return logps.exp().T.cpu().numpy()

    with evaluation_mode(model):
        for rows, found in each_batch(samples, read_off, batch_size, device=embedding_device(model), desc=desc):
            values[rows] = found
    return values


def check_same_architecture(original: Any, other: Any, name: str = "the other model") -> None:
    """Raise `ValueError` when states of one of two models, given by itself or its configuration, mean nothing in the
    other."""
    ours, theirs = (_config(one) for one in (original, other))
    for what in ("model_type", "num_hidden_layers", "hidden_size"):
        mine, its = (getattr(config, what, None) for config in (ours, theirs))
        if mine != its:
            raise ValueError(
                f"{name} has another architecture than the original model ({what} {its} and {mine}): its hidden states "
                "mean nothing there"
            )


def check_layers(model: PreTrainedModel, name: str, samples: Samples) -> None:
    """Raise `ValueError` when nothing can be said layer by layer of the model `name`; looks at one sample."""
    try:
        with torch.no_grad(), evaluation_mode(model):
            batch = samples.measured.pad([0])
            layer_states(model, {key: value.to(embedding_device(model)) for key, value in batch.items()})
    except ValueError as error:
        raise ValueError(f"{name!r}: {error}") from None


def _config(model: Any) -> PretrainedConfig:
    config = model if isinstance(model, PretrainedConfig) else base_causal_lm(model).config
    return config.get_text_config()


def layer_states(model: nn.Module, batch: dict[str, Tensor]) -> list[Tensor]:
    """What every decoder layer hands on at the positions that predict answer tokens, `[B, K, hidden]` each.

    Raises:
        ValueError: where a layer hands on something else than `[B, T, hidden]`.
    """
    found: list[Tensor] = []
    positions = answer_positions(predictable(batch["labels"], batch["attention_mask"]))
    shape = batch["input_ids"].shape

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        hidden = _hidden(output)
        if hidden.ndim != 3 or hidden.shape[:2] != shape:
            raise ValueError(
                f"layers of {_config(model).model_type} models hand on states of shape {tuple(hidden.shape)} for a "
                f"batch of {tuple(shape)} tokens: depth by layer is not defined there"
            )
        found.append(hidden.index_select(1, positions.to(hidden.device)))

    with ExitStack() as stack:
        for layer in decoder_layers(model)[1]:
            stack.callback(layer.register_forward_hook(keep).remove)
        score_answers(model, batch)
    return found


def patched_logps(
    model: nn.Module,
    batch: dict[str, Tensor],
    states: Sequence[Tensor],
    *,
    at: Sequence[int] | None = None,
    through: bool = True,
) -> Tensor:
    """Mean log-probability of the answers with each of `states` put in the output of one layer, `[len(states), B]`.

    Only at a sample's own positions that predict its answer.

    Args:
        states: `[B, K, hidden]` each, of `layer_states`.
        at: the layer of each; by default they are those of all layers, in their order.
        through: whether the layers do anything; without, each passes on what it is given.
    """
    at = range(len(states)) if at is None else at
    layers = decoder_layers(model)[1]
    size = len(batch["input_ids"])
    labels = predictable(batch["labels"], batch["attention_mask"])
    positions = answer_positions(labels)
    own = (labels[:, positions + 1] != -100).unsqueeze(-1)
    found = []
    for start in range(0, len(states), step := _at_once(model, size, batch["input_ids"].shape[1], len(positions))):
        numbers = range(start, min(start + step, len(states)))
        stacked = {name: value.repeat(len(numbers), *[1] * (value.ndim - 1)) for name, value in batch.items()}
        with ExitStack() as stack:
            if not through:
                stack.enter_context(_passing_on(model, batch))
            for place, number in enumerate(numbers):
                put = partial(_put, slice(place * size, (place + 1) * size), positions, own, states[number])
                stack.callback(layers[at[number]].register_forward_hook(put).remove)
            found.append(score_answers(model, stacked).mean_logps.view(len(numbers), size))
    return torch.cat(found).cpu().double()


def _put(
    rows: slice, positions: Tensor, own: Tensor, states: Tensor, module: nn.Module, inputs: Any, output: Any
) -> Any:
    """A forward hook: `states` take the place of what a layer hands on, in these rows, where `own` says so."""
    hidden = _hidden(output).clone()
    positions, own = positions.to(hidden.device), own.to(hidden.device)
    part = hidden[rows]
    part[:, positions] = torch.where(own, states.to(hidden.device, hidden.dtype), part[:, positions])
    return type(output)((hidden, *output[1:])) if isinstance(output, SEVERAL) else hidden


def _hidden(output: Any) -> Tensor:
    return output[0] if isinstance(output, SEVERAL) else output


@contextmanager
def _passing_on(model: nn.Module, batch: dict[str, Tensor]) -> Iterator[None]:
    """Inside, the decoder layers hand on what they are given, in the form in which they always do."""
    forms: list[int] = []

    def form(module: nn.Module, inputs: Any, output: Any) -> None:
        forms.append(len(output) if isinstance(output, SEVERAL) else 0)

    layers = decoder_layers(model)[1]
    one = {name: value[:1] for name, value in batch.items()}
    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.register_forward_hook(form).remove)
        score_answers(model, one)
    with ExitStack() as stack:
        for layer, length in zip(layers, forms, strict=True):
            stack.enter_context(answering(layer, _identity(length)))
        yield


def _identity(length: int) -> Callable:
    """What hands on the hidden states that it is given; as a tuple of so many entries if there are any."""

    def forward(*args: Any, **options: Any) -> Any:
        hidden = args[0] if args else options["hidden_states"]
        return (hidden, *[None] * (length - 1)) if length else hidden

    return forward


def _at_once(model: nn.Module, rows: int, tokens: int, predicted: int) -> int:
    """How many layers of a batch go through one pass."""
    config = _config(model)
    a_row = predicted * config.vocab_size * 12 + tokens * config.hidden_size * HIDDEN_COPIES
    return max(1, BATCH_BYTES // max(1, rows * a_row))
