"""One unlearning step on a paired batch: per-sample forget and retain losses, and the reference quantities they need.

`CUDTrainer` and the calibration run both train through `UnlearningLoss`, so that what is calibrated is what is run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..data import Samples
from ..logprobs import AnswerScores, read_answers
from ..models.head import LOGITS_BYTES
from ..models.layers import base_causal_lm, decoder_layers, embedding_device
from ..models.modes import evaluation_mode
from .by_bucket import Part, parts_by_bucket
from .reference import BySample, Reference, TopTokens, spread, top_tokens
from .registry import OBJECTIVES, Objective
from .retain import RETAIN_LOSSES, retain_activations, retain_kl, retain_nll

T = TypeVar("T")


@dataclass
class LossTerms:
    """Per-sample losses of a batch of `B` pairs.

    Attributes:
        forget: forget loss, `[B]`.
        retain: retain loss, `[B]`, or `None`.
        mean_logps: mean log-probability of the forget samples' tokens that count, `[B]`, detached.
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
        retain_loss: `"none"`, `"nll"`, `"kl"`, `"activations"` (for objectives on hidden states), or `None` for the
            objective's own.
        reference_top_k: tokens of a reference distribution kept per position (retain loss `"kl"`, `undial`).
        by_bucket: the objectives of some buckets of difficulty in place of that one, see `parts_by_bucket` (after RUM,
            Zhao et al. 2024, arXiv 2406.01257, which unlearns one part after the other). Every sample has the loss of
            its own objective; where there are no buckets (a calibration run), all have `objective`.
        logits_bytes: memory that logits and what belongs to them may take at a time; 0 for no bound (`read_answers`).

    Raises:
        ValueError: for an unknown objective, option or retain loss, or a combination that is undefined.
    """

    objective: str = "npo"
    objective_args: dict[str, Any] = field(default_factory=dict)
    retain_loss: str | None = None
    reference_top_k: int = 128
    by_bucket: dict[Any, Any] = field(default_factory=dict)
    logits_bytes: int = LOGITS_BYTES

    def __post_init__(self) -> None:
        OBJECTIVES.find(self.objective)
        self.spec.check_options(self.objective_args)
        base = Part(self.spec, self.objective_args)
        self.own = parts_by_bucket(self.by_bucket, base)
        self.parts = [base, *self.own.values()]
        if self.retain_loss is None:
            self.retain_loss = self.spec.retain_loss
        if self.retain_loss not in RETAIN_LOSSES:
            raise ValueError(f"unknown retain_loss {self.retain_loss!r}; choose one of {list(RETAIN_LOSSES)}")
        for part in self.parts:
            if part.spec.requires_retain and self.retain_loss == "none":
                raise ValueError(f"objective {part.spec.name!r} needs a retain loss; use 'ga' to go without")
        if self.retain_loss == "activations" and not self.uses_hidden:
            raise ValueError(
                f"retain_loss 'activations' compares hidden states: it goes with 'rmu', not with {self.objective!r}"
            )

    @property
    def spec(self) -> Objective:
        return OBJECTIVES[self.objective]

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of the quantities that the objectives read, without repeats."""
        return tuple(dict.fromkeys(name for part in self.parts for name in part.spec.needs))

    @property
    def alternative(self) -> str | None:
        """Where the alternative answers come from; `None` when no objective reads one."""
        return next((part.spec.alternative for part in self.parts if part.spec.alternative is not None), None)

    @property
    def token_mean(self) -> bool:
        """Whether the loss of every sample is a mean over its tokens."""
        return all(part.spec.token_mean for part in self.parts)

    def part_of(self, buckets: np.ndarray, count: int) -> np.ndarray | None:
        """Which of `parts` each sample has, int `[N]`; `None` where all have the same.

        Args:
            buckets: bucket of each sample, 0 the easiest, `[N]`.
            count: how many there are.

        Raises:
            ValueError: for a bucket with an objective of its own that is not there.
        """
        if not self.own:
            return None
        missing = [bucket for bucket in self.own if bucket > count]
        if missing:
            raise ValueError(f"objective_by_bucket: there is no bucket {missing[0]}, only {count}")
        own = {bucket - 1: number for number, bucket in enumerate(self.own, start=1)}
        return np.array([own.get(int(bucket), 0) for bucket in buckets])

    @property
    def uses_retain(self) -> bool:
        """Whether a retain dataset is needed."""
        return self.retain_loss != "none"

    @property
    def uses_alternative(self) -> bool:
        """Whether the forget samples need an alternative answer."""
        return self.alternative is not None

    @property
    def uses_hidden(self) -> bool:
        """Whether hidden states are read."""
        return "hidden" in self.spec.needs

    @property
    def uses_reference(self) -> bool:
        """Whether the model before unlearning is scored."""
        return any(part.spec.needs_reference for part in self.parts) or self.retain_loss in ("kl", "activations")

    def without_retain(self) -> UnlearningLoss:
        """The same objective alone; gradient ascent for one that is undefined alone."""
        name, options = ("ga", {}) if self.spec.requires_retain else (self.objective, self.objective_args)
        return UnlearningLoss(name, options, "none", self.reference_top_k, logits_bytes=self.logits_bytes)

    @contextmanager
    def all_logits(self) -> Iterator[None]:
        """Every logit at once, inside: for who looks at the output layer, which is then used once in a pass."""
        bound, self.logits_bytes = self.logits_bytes, 0
        try:
            yield
        finally:
            self.logits_bytes = bound

    def option_scale(self, lengths: np.ndarray, rank: np.ndarray | None = None) -> np.ndarray | None:
        """What the option that goes by sample is multiplied by, `[N]`; `None` where none does.

        `"length"`: `mean(n) / n_i`, n the answer tokens (so that a loss on sums over tokens saturates by the token);
        `"difficulty"`: `2^(1 - 2 rank)`, from 2 for the easiest to 1/2 for the hardest sample. The smaller beta, the
        later a loss saturates: what is hard is pushed for longer (after AdaPop, arXiv 2608.14229, which has an exponent
        by popularity).

        Args:
            lengths: answer tokens of each forget sample, `[N]`.
            rank: of its difficulty, in [0, 1]; without one, before there are scores, all are alike.
        """
        if "length" in self.by.values():
            return lengths.mean() / lengths
        return np.exp2(1 - 2 * rank) if "difficulty" in self.by.values() and rank is not None else None

    @property
    def by(self) -> dict[str, str]:
        """The options that go by sample, and by what."""
        return self.spec.split(self.objective_args)[1]

    def _options(self, part: Part, index: Tensor, like: Tensor, reference: Reference) -> dict[str, Any]:
        """Options of an objective for the forget samples `index`."""
        options, by = part.spec.split(part.options)
        if by and reference.option_scale is not None:
            scale = reference.option_scale[index.to(reference.option_scale.device)].to(like)
            options |= {name: part.spec.options(options)[name] * scale for name in by}
        return options

    def check_model(self, config: Any) -> None:
        """Raise `ValueError` when the model of this configuration lacks the layer that is read."""
        if self.uses_hidden:
            self._layer(config.get_text_config().num_hidden_layers)

    def _layer(self, depth: int) -> int:
        layer = self.spec.options(self.objective_args)["layer"]
        if layer is None:
            layer = depth * 7 // 32
        if not 0 <= layer < depth:
            raise ValueError(
                f"option 'layer' of objective {self.objective!r} must be from 0 to {depth - 1} for this model of "
                f"{depth} layers, got {layer}"
            )
        return layer

    def check_alternatives(self, forget: Samples) -> None:
        """Raise `ValueError` when the objective needs alternative answers and the samples have none."""
        if self.uses_alternative and forget.alternatives is None:
            raise ValueError(
                f"objective {self.objective!r} needs an alternative answer for every forget sample "
                f"(see `cud_trainer.objectives.alternatives.with_alternatives`)"
            )

    @torch.no_grad()
    def reference(
        self,
        model: torch.nn.Module,
        forget: Samples,
        retain: Samples | None,
        *,
        batch_size: int,
        device: torch.device | str,
        seed: int = 0,
        retain_rows: Sequence[int] | None = None,
    ) -> Reference:
        """Score the datasets once with `model` as it is now (in eval mode, restored afterwards).

        Args:
            retain_rows: the retain samples that will be served, in any order; by default all of them. Of the others
                nothing is known afterwards.
            seed: of the random direction of objectives on hidden states.
        """
        self.check_alternatives(forget)
        result, needs = Reference(), self.needs
        top = "reference_top_logps" in needs
        scale = self.option_scale(np.asarray(forget.answer_lengths, dtype=np.float64))
        result.option_scale = None if scale is None else torch.from_numpy(scale)
        if "direction" in needs:
            config: Any = model.config
            size = config.get_text_config().hidden_size
            direction = torch.rand(size, generator=torch.Generator().manual_seed(seed))
            result.direction = (direction / direction.norm()).to(device)

        def read(samples: Samples, function: Callable[[AnswerScores], T]) -> Iterator[tuple[list[int], T]]:
            for rows, batch in samples.batches(batch_size, device=device):
                yield rows, read_answers(model, batch, function, logits_bytes=self.logits_bytes)

        def told(scores: AnswerScores) -> tuple[Tensor, Tensor, Any]:
            kept = top_tokens(scores, self.reference_top_k, with_target=True) if top else None
            return scores.logps, scores.mask, kept

        served = np.array(sorted({*retain_rows})) if retain_rows is not None else np.arange(len(retain or ()))
        sizes = np.zeros(len(retain or ()), dtype=np.int64)
        if retain is not None and self.retain_loss in ("kl", "activations"):
            sizes[served] = retain.answer_lengths[served]

        with evaluation_mode(model):
            if "reference_logps" in needs or top:
                result.forget_top = TopTokens.empty(forget.answer_lengths if top else ())
                for rows, (logps, mask, kept) in read(forget, told):
                    if "reference_logps" in needs:
                        if result.forget_logps is None:
                            result.forget_logps = logps.new_zeros(len(forget))
                        result.forget_logps[rows] = logps
                    if top:
                        result.forget_top.keep(rows, mask, kept)
            if "alternative_reference_logps" in needs:
                assert forget.alternatives is not None
                for rows, logps in read(forget.alternatives, lambda scores: scores.logps):
                    if result.alternative_logps is None:
                        result.alternative_logps = logps.new_zeros(len(forget))
                    result.alternative_logps[rows] = logps
            if self.retain_loss == "kl":
                assert retain is not None
                result.retain_top = TopTokens.empty(sizes)
                likeliest = partial(top_tokens, k=self.reference_top_k, with_target=False)
                for rows, (mask, kept) in read(retain.select(served), lambda scores: (scores.mask, likeliest(scores))):
                    result.retain_top.keep(served[rows].tolist(), mask, kept)
            if self.retain_loss == "activations":
                assert retain is not None
                result.retain_hidden = BySample(sizes)
                for rows, batch in retain.select(served).batches(batch_size, device=device):
                    mask, hidden = self._read(model, batch, lambda scores, hidden: (scores.mask, hidden))
                    assert hidden is not None
                    result.retain_hidden.keep(served[rows].tolist(), hidden[mask].cpu())
        return result

    def _read(
        self, model: torch.nn.Module, batch: dict[str, Tensor], function: Callable[[AnswerScores, Tensor | None], T]
    ) -> T:
        """What `function` makes of the scores of a batch, and of the output of the layer at the answer positions,
        `[B, K, d]`, if it is read."""
        if not self.uses_hidden:
            return read_answers(model, batch, lambda scores: function(scores, None), logits_bytes=self.logits_bytes)
        outputs: list[Tensor] = []
        layers = decoder_layers(model)[1]
        # Only one layer is kept; and only in this pass, not in what checkpointing repeats of it.
        handle = layers[self._layer(len(layers))].register_forward_hook(
            lambda module, inputs, output: outputs.append(output[0] if isinstance(output, tuple) else output)
        )
        try:
            return read_answers(
                model,
                batch,
                lambda scores: function(scores, outputs[0][:, scores.positions.to(outputs[0].device)]),
                logits_bytes=self.logits_bytes,
            )
        finally:
            handle.remove()

    def unreached(self, model: torch.nn.Module) -> list[torch.nn.Parameter]:
        """The trained weights that can have no gradient, whatever the batch: those behind the only layer that is read.

        One forward pass of two tokens, for objectives on hidden states alone.
        """
        if not self.uses_hidden or self.retain_loss not in ("none", "activations"):
            return []
        name, layers = decoder_layers(model)
        behind = tuple(f"{name}.{index}." for index in range(self._layer(len(layers)) + 1, len(layers)))
        trained = {key: value for key, value in model.named_parameters() if value.requires_grad}
        outside = {key: value for key, value in trained.items() if not key.startswith(f"{name}.")}
        tokens = torch.zeros(1, 2, dtype=torch.long, device=embedding_device(base_causal_lm(model)))
        batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}
        gradients: Sequence[Tensor | None] = [None] * len(outside)
        with evaluation_mode(model), torch.enable_grad():
            hidden = self._read(model, batch, lambda scores, hidden: hidden)
            assert hidden is not None
            if hidden.requires_grad and outside:
                gradients = torch.autograd.grad(hidden.sum(), list(outside.values()), allow_unused=True)
        without = {key for key, gradient in zip(outside, gradients, strict=True) if gradient is None}
        return [value for key, value in trained.items() if key in without or key.startswith(behind)]

    def __call__(self, model: torch.nn.Module, batch: dict[str, Tensor], reference: Reference) -> LossTerms:
        """Per-sample losses of a paired batch, in one forward pass."""
        pairs = len(batch["forget_index"])

        def terms(scores: AnswerScores, hidden: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor]:
            forget, mean_logps = self._forget(scores, hidden, batch["forget_index"], reference)
            if not self.uses_retain:
                return forget, None, mean_logps
            retained = slice(pairs, 2 * pairs)
            kept = None if hidden is None else hidden[retained]
            return forget, self._retain(scores[retained], kept, batch, reference), mean_logps

        return LossTerms(*self._read(model, batch, terms))

    def side(self, name: str, model: torch.nn.Module, batch: dict[str, Tensor], reference: Reference) -> LossTerms:
        """The losses of one side of a paired batch, in a forward pass without the other: for gradients taken apart.

        Args:
            name: `"forget"`: the terms without `retain`; `"retain"`: `retain` alone, the others are empty.
        """
        pairs = len(batch["forget_index"])
        size = len(batch["input_ids"])
        retained = list(range(pairs, 2 * pairs)) if self.uses_retain else []
        rows = retained if name == "retain" else [row for row in range(size) if row not in set(retained)]
        # Whatever is there by token, a row for each sequence; the rest is a value for each pair.
        tokens = {key: value[rows] for key, value in batch.items() if isinstance(value, Tensor) and value.ndim == 2}
        if name == "forget":
            forget, mean_logps = self._read(
                model, tokens, lambda scores, hidden: self._forget(scores, hidden, batch["forget_index"], reference)
            )
            return LossTerms(forget, None, mean_logps)
        retain = self._read(model, tokens, lambda scores, hidden: self._retain(scores, hidden, batch, reference))
        return LossTerms(retain.new_zeros(0), retain, retain.new_zeros(0))

    def _forget(
        self, scores: AnswerScores, hidden: Tensor | None, index: Tensor, reference: Reference
    ) -> tuple[Tensor, Tensor]:
        """Losses, and mean log-probabilities, of scores whose first rows are the forget samples `index`, and whose last
        their alternatives, if any."""
        pairs = len(index)
        forget = scores[:pairs]
        alternative = scores[-pairs:] if self.uses_alternative else None
        hidden = None if hidden is None else hidden[:pairs]
        if reference.part is None:
            loss = self._loss(self.parts[0], forget, alternative, hidden, index, reference)
        else:
            part_of = reference.part[index.to(reference.part.device)].to(forget.logps.device)
            losses, places = [], []
            for number in part_of.unique().tolist():
                rows = (part_of == number).nonzero().squeeze(-1)
                own = None if alternative is None else alternative[rows]
                where = index[rows.to(index.device)]
                losses.append(self._loss(self.parts[number], forget[rows], own, None, where, reference))
                places.append(rows)
            loss = torch.cat(losses)[torch.cat(places).argsort()]
        return loss, forget.counted_mean_logps.detach()

    def _loss(
        self,
        part: Part,
        forget: AnswerScores,
        alternative: AnswerScores | None,
        hidden: Tensor | None,
        index: Tensor,
        reference: Reference,
    ) -> Tensor:
        """One objective's loss of the forget samples `index`, `[B]`; logits are read by some rows at a time."""
        if "logits" not in part.spec.needs:
            return self._loss_of(part, forget, alternative, hidden, index, reference)

        def of_rows(some: AnswerScores, rows: slice) -> tuple[Tensor]:
            other = None if alternative is None else alternative[rows]
            states = None if hidden is None else hidden[rows]
            return (self._loss_of(part, some, other, states, index[rows], reference),)

        return forget.map_rows(of_rows)[0]

    def _loss_of(
        self,
        part: Part,
        forget: AnswerScores,
        alternative: AnswerScores | None,
        hidden: Tensor | None,
        index: Tensor,
        reference: Reference,
    ) -> Tensor:
        likeliest: dict[str, Tensor] = {}
        if "reference_top_logps" in part.spec.needs:
            names = ("reference_top_logps", "reference_top_ids", "reference_rest_logps")
            likeliest = dict(zip(names, reference.forget_top.batch(index.tolist(), forget.mask), strict=True))

        def quantity(name: str) -> Tensor:
            if name in likeliest:
                return likeliest[name]
            if name in ("hidden", "direction"):
                value = hidden if name == "hidden" else reference.direction
                assert value is not None
                return value
            if name in ("alternative_logps", "alternative_mean_logps"):
                return getattr(alternative, name.removeprefix("alternative_"))
            if name in ("reference_logps", "alternative_reference_logps"):
                before = reference.forget_logps if name == "reference_logps" else reference.alternative_logps
                assert before is not None
                return before[index.to(before.device)].to(forget.logps.device)
            return getattr(forget, name)

        options = self._options(part, index, forget.logps, reference)
        return part.spec.loss(*map(quantity, part.spec.needs), **options)

    def _retain(
        self, scores: AnswerScores, hidden: Tensor | None, batch: dict[str, Tensor], reference: Reference
    ) -> Tensor:
        if self.retain_loss == "nll":
            return retain_nll(scores.logps, scores.lengths)
        rows = batch["retain_index"].tolist()
        if self.retain_loss == "activations":
            assert hidden is not None
            return retain_activations(
                hidden, scores.mask, spread([reference.retain_hidden[r] for r in rows], scores.mask)
            )
        logps, ids, _ = reference.retain_top.batch(rows, scores.mask)
        return scores.map_rows(lambda some, own: (retain_kl(some.logits, some.mask, logps[own], ids[own]),))[0]
