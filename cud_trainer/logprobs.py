"""Log-probabilities of answer tokens: the one place that scores text with a model.

Training, reference quantities, difficulty and evaluation all go through `score_answers`, so that a probability in a
report is the same number the loss was made of.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from .data import COUNTED, IGNORE_INDEX, Samples
from .models.head import HeadStates, made_again, positions_at_once, read_head
from .models.layers import base_causal_lm, embedding_device
from .models.memory import each_batch
from .models.modes import evaluation_mode
from .models.positions import own_positions, position_ids, positions_of
from .models.precision import exact

T = TypeVar("T")


def wide(x: Tensor) -> Tensor:
    """In float32, or float64 where it is."""
    return x if x.dtype == torch.float64 else x.float()


def answer_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the True positions of each row, `[B]` from `[B, K]`; 0 for a row without any."""
    return (values * mask).sum(-1) / mask.sum(-1).clamp(min=1)


@dataclass
class AnswerScores:
    """Scores of the answer tokens of a batch, on the `K` positions at which any row predicts an answer token.

    Attributes:
        token_logps: log p(token | prefix), `[B, K]`, 0 outside the answer; float32 or wider, differentiable.
        mask: True on answer tokens, `[B, K]`.
        targets: the token ids, `[B, K]`, 0 outside the answer.
        head: logits, or the states that they are made of where not all are there at once.
        positions: the positions, `[K]`; each predicts the token behind it.
        hidden_states: of every layer at all positions, `[B, T, hidden]` each, the embedding first; only if asked for.
        counted: True on the answer tokens that figures are made of, `[B, K]`; `None` for all of them.
    """

    token_logps: Tensor
    mask: Tensor
    targets: Tensor
    head: Tensor | HeadStates
    positions: Tensor
    hidden_states: tuple[Tensor, ...] | None = None
    counted: Tensor | None = None

    @property
    def logits(self) -> Tensor:
        """`[B, K, vocabulary]`, in the model's dtype; made anew at every call from states."""
        return self.head if isinstance(self.head, Tensor) else self.head.project(self.head.hidden)

    @property
    def logps(self) -> Tensor:
        """Log-probability of the whole answer, `[B]`."""
        return self.token_logps.sum(-1)

    @property
    def lengths(self) -> Tensor:
        """Number of answer tokens, `[B]`, at least 1."""
        return self.mask.sum(-1).clamp(min=1)

    @property
    def mean_logps(self) -> Tensor:
        """Mean log-probability of the answer tokens, `[B]`."""
        return self.logps / self.lengths

    @property
    def counted_mean_logps(self) -> Tensor:
        """Mean log-probability of the tokens that figures are made of (`Samples.measured`), `[B]`."""
        return self.mean_logps if self.counted is None else answer_mean(self.token_logps, self.counted)

    def before(self, stop: Tensor) -> Tensor:
        """True on the answer tokens before the first of the tokens `stop`, `[B, K]`: what the answer says."""
        ended = torch.isin(self.targets, stop) & self.mask
        return self.mask & (ended.long().cumsum(-1) == 0)

    def __getitem__(self, rows: slice | Tensor) -> AnswerScores:
        return AnswerScores(
            self.token_logps[rows],
            self.mask[rows],
            self.targets[rows],
            self.head[rows],
            self.positions,
            counted=None if self.counted is None else self.counted[rows],
        )

    def map_rows(self, function: Callable[[AnswerScores, slice], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """What `function` says of all rows, joined; it reads the logits of as many at a time as may be there.

        Args:
            function: from the scores of some rows, and which these are, to tensors of as many rows each.
        """
        if isinstance(self.head, Tensor):
            return function(self, slice(None))
        head, size = self.head, max(1, self.head.at_once // len(self.positions))

        def some(hidden: Tensor, rows: slice) -> tuple[Tensor, ...]:
            return function(replace(self[rows], head=head.project(hidden)), rows)

        slices = [slice(start, start + size) for start in range(0, len(self.mask), size)]
        parts = [made_again(some, head.hidden[rows], rows) for rows in slices]
        return tuple(map(torch.cat, zip(*parts, strict=True)))


def answer_positions(labels: Tensor) -> Tensor:
    """Indices `[K]` of the positions whose *next* token is an answer token in any row of `labels` `[B, T]`."""
    return (labels[:, 1:] != IGNORE_INDEX).any(0).nonzero().squeeze(-1)


def score_answers(model: torch.nn.Module, batch: dict[str, Tensor], **model_inputs: Any) -> AnswerScores:
    """Teacher-forced scores of the answers in `batch`.

    Only the positions that predict answer tokens go through the vocabulary projection.

    Args:
        model: causal LM (bare, PEFT or wrapped by accelerate).
        batch: `input_ids`, `attention_mask`, `labels` (-100 outside the answer), each `[B, T]`, any padding side; with
            `counted`, which of the labels figures are made of.
        model_inputs: passed to the model (for example `inputs_embeds`, which replaces `input_ids`, or
            `output_hidden_states`).

    Raises:
        ValueError: for an adapter that puts virtual tokens before the input.
    """
    labels, inputs = _asked(model, batch, model_inputs)
    positions = answer_positions(labels)
    with own_positions(model):
        outputs = model(logits_to_keep=positions, **inputs)
    logits = outputs.logits
    if logits.shape[1] != len(positions):  # an architecture that ignores `logits_to_keep`
        logits = logits[:, positions.to(logits.device)]
    return _scores(batch, labels, positions, logits, getattr(outputs, "hidden_states", None))


def read_answers(
    model: torch.nn.Module,
    batch: dict[str, Tensor],
    function: Callable[[AnswerScores], T],
    *,
    logits_bytes: int = 0,
) -> T:
    """What `function` makes of `score_answers`, without more logits at a time than fit into `logits_bytes`.

    Where they do not fit, `function` runs within the model's forward pass, and a backward pass makes every logit again.
    All values are those of `score_answers`, to rounding.

    Args:
        function: from scores to tensors (a tensor, or a tuple of them). It reads logits by `AnswerScores.map_rows`.
        logits_bytes: estimated memory of logits and what belongs to them; 0 for no bound. One position, and in
            `map_rows` one row, may exceed it.
    """
    labels, inputs = _asked(model, batch, {})
    positions = answer_positions(labels)
    at_once = positions_at_once(model, len(labels) * len(positions), logits_bytes)
    if at_once is None:
        return function(score_answers(model, batch))
    with own_positions(model):
        return read_head(
            model, positions, at_once, lambda head: function(_scores(batch, labels, positions, head)), **inputs
        )


def _asked(model: torch.nn.Module, batch: dict[str, Tensor], inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """Labels that can be predicted, and the inputs of the model."""
    _check_adapter(model)
    mask = batch["attention_mask"]
    if "inputs_embeds" not in inputs:
        inputs["input_ids"] = batch["input_ids"]
    limit = positions_of(model).limit
    if limit is not None and mask.shape[1] > limit:
        longest = int(mask.sum(-1).max())
        if longest > limit:
            raise ValueError(f"a sample has {longest} tokens, and the model has {limit} positions")
    inputs |= {"attention_mask": mask, "position_ids": position_ids(mask), "use_cache": False}
    return predictable(batch["labels"], mask), inputs


def _scores(
    batch: dict[str, Tensor],
    labels: Tensor,
    positions: Tensor,
    head: Tensor | HeadStates,
    hidden: tuple[Tensor, ...] | None = None,
) -> AnswerScores:
    """Of logits, or of the states that they are made of, at these positions."""
    next_ones = positions.to(head.device) + 1
    labels = labels.to(head.device)[:, next_ones]
    mask = labels != IGNORE_INDEX
    targets = labels.masked_fill(~mask, 0)
    if isinstance(head, Tensor):
        token_logps = _token_logps(head, targets).masked_fill(~mask, 0.0)
    else:
        project, parts = head.project, []
        for some in mask.nonzero().split(head.at_once):
            rows, columns = some.unbind(-1)
            chosen = head.hidden[rows.to(head.hidden.device), columns.to(head.hidden.device)]
            parts.append(
                made_again(lambda h, t: _token_logps(project(h), t), chosen[None], targets[rows, columns][None])
            )
        of_answers = torch.cat(parts, dim=1)[0]
        token_logps = torch.zeros_like(targets, dtype=of_answers.dtype).masked_scatter(mask, of_answers)
    counted = None
    if COUNTED in batch:
        counted = mask & (batch[COUNTED].to(head.device)[:, next_ones] != IGNORE_INDEX)
    return AnswerScores(token_logps, mask, targets, head, positions, hidden, counted)


def _token_logps(logits: Tensor, targets: Tensor) -> Tensor:
    """log p of the tokens `targets` `[B, K]` by `logits` `[B, K, V]`."""
    negative = torch.nn.functional.cross_entropy(wide(logits).flatten(0, 1), targets.flatten(), reduction="none")
    return (-negative).view_as(targets)


@torch.no_grad()
def answer_probability(
    model: PreTrainedModel,
    samples: Samples,
    *,
    batch_size: int = 64,
    device: torch.device | str | None = None,
) -> np.ndarray:
    """`exp(mean answer log-probability)` of each sample, float64 `[N]` in [0, 1]; of `samples.measured`.

    Args:
        device: of the batches; by default that of the embedding.
    """
    if device is None:
        device = model.get_input_embeddings().weight.device
    values = torch.zeros(len(samples), dtype=torch.float64)

    def probability(batch: dict[str, Tensor]) -> Tensor:
        return score_answers(model, batch).mean_logps.exp().cpu().double()

    with evaluation_mode(model), exact(model):
        for rows, found in each_batch(samples.measured, probability, batch_size, device=device):
            values[rows] = found
    return values.numpy()


def extraction_strength(correct: Sequence[bool], *, corrected: bool = False) -> float:
    """`1 - k/n`, k the length of the shortest answer prefix after which the arg max continues correctly to the end.

    As in open-unlearning (after Carlini et al. 2021) at least the last token counts as extracted, so that the smallest
    value is 1/n and short answers look memorised; `corrected` lets k be n, with smallest value 0.
    """
    n = len(correct)
    if n == 0:
        return float("nan")
    k = n
    while k > 0 and correct[k - 1]:
        k -= 1
    return 1 - (k if corrected else min(k, n - 1)) / n


@torch.no_grad()
def answer_recall(
    model: PreTrainedModel,
    samples: Samples,
    stop: Sequence[int],
    *,
    batch_size: int = 64,
    device: torch.device | str | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """`answer_probability`, and `extraction_strength` of what stands before an end token, `[N]` each, in one pass.

    Args:
        stop: tokens that end an answer (`stop_tokens`); a sample that says nothing before them has NaN.
        device: of the batches; by default that of the embedding.
    """
    if device is None:
        device = model.get_input_embeddings().weight.device
    probability, strength = np.zeros(len(samples)), np.zeros(len(samples))

    def recall(batch: dict[str, Tensor]) -> tuple[np.ndarray, list[float]]:
        scores = score_answers(model, batch)
        hits = (scores.logits.argmax(-1) == scores.targets).cpu()
        said = scores.before(torch.tensor(list(stop), device=scores.targets.device, dtype=torch.long)).cpu()
        strengths = [extraction_strength(row[own].tolist()) for row, own in zip(hits, said, strict=True)]
        return scores.mean_logps.exp().cpu().double().numpy(), strengths

    with evaluation_mode(model), exact(model):
        for rows, found in each_batch(samples.measured, recall, batch_size, device=device):
            probability[rows], strength[rows] = found
    return probability, strength


# Nats of a mean answer log-probability that may lie between a sample alone and beside a longer one: rounding.
SAME_PADDED = 0.01


@torch.no_grad()
def check_padding(model: torch.nn.Module, name: str, samples: Samples) -> None:
    """Raise `ValueError` when the shortest sample scores something else beside the longest than alone.

    Such a model reads the padding, or shares something among the samples of a batch: no figure would be of one sample.
    """
    shortest, longest = (pick(range(len(samples)), key=samples.lengths.__getitem__) for pick in (min, max))
    if samples.lengths[shortest] == samples.lengths[longest]:
        return
    device = embedding_device(model)

    def said(rows: list[int]) -> float:
        batch = {key: value.to(device) for key, value in samples.pad(rows).items()}
        return float(score_answers(model, batch).mean_logps[0])

    with evaluation_mode(model), exact(model):
        alone, beside = said([shortest]), said([shortest, longest])
    if abs(alone - beside) > SAME_PADDED:
        raise ValueError(
            f"{name} sample {samples.ids[shortest]!r} has {alone:.3g} nats a token alone and {beside:.3g} in a batch "
            f"with a longer one: {type(base_causal_lm(model)).__name__} reads the padding, or shares something in a "
            "batch, so that figures would depend on the batch size"
        )


def predictable(labels: Tensor, attention_mask: Tensor) -> Tensor:
    """`labels` without the first token of a sequence: left of it there is nothing, or padding, to predict it from."""
    behind_padding = attention_mask[:, :-1].to(labels.device) == 0
    return torch.cat([labels[:, :1], labels[:, 1:].masked_fill(behind_padding, IGNORE_INDEX)], dim=1)


def _check_adapter(model: torch.nn.Module) -> None:
    inner: Any = model
    while hasattr(inner, "module"):
        inner = inner.module
    config = getattr(inner, "active_peft_config", None)
    if config is not None and config.is_prompt_learning and config.peft_type != "PREFIX_TUNING":
        raise ValueError(
            f"adapters of type {config.peft_type} are not supported: their virtual tokens shift the answer; "
            "use LoRA or another adapter that leaves the input as it is"
        )
