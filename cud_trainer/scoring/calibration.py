"""The calibration run: a short unlearning of the forget set that shows which samples go first, then is undone.

CUD's anchors are samples known to be easy and hard. The paper takes them from finished unlearning runs; this takes them
from a brief one on the user's own model, objective and parameterisation, and puts every weight back bit for bit.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.utils import logging

from ..data import PairedCollator, Samples
from ..logprobs import answer_probability
from ..models.modes import restored_afterwards
from ..models.trainable import check_trained
from ..objectives import Reference, UnlearningLoss
from ..typed import check_options

logger = logging.get_logger(__name__)

# Residual memorisation separates samples best while the forget set is partly gone (share of its starting probability).
WINDOW = (0.15, 0.75)
STILL_UNTOUCHED = 0.9
# Adam's first steps have full length in whatever direction the first half of the samples has. In a short run that alone
# would decide what goes first: without a slow first pass the seed changed the ranking from 0.95 to 0.6-0.9 (Spearman
# with NPO runs of other seeds).
FIRST_PASS = 0.1


def adapter_identity(peft_config: Any) -> str | None:
    """All settings of an adapter as text, the same in every process: sets have an order of their own in each."""
    if peft_config is None:
        return None
    return json.dumps(
        peft_config.to_dict(), sort_keys=True, default=lambda x: sorted(x) if isinstance(x, set) else str(x)
    )


class CalibrationDiverged(ValueError):
    """A calibration run came to numbers that are not finite: there are no anchors."""

    exit_code = 4  # of `cud score` and `cud train`

    def __init__(self, what: str) -> None:
        super().__init__(f"the calibration run diverged (non-finite {what}); lower the learning rate")


@dataclass
class CalibrationSettings:
    """How to calibrate.

    Attributes:
        loss: objective and retain loss.
        retain_weight: weight of the retain loss.
        learning_rate: of AdamW; a tenth of it in the first pass. In the second half of the passes it doubles after
            every one that has left the forget probability above 90% of its start, so that a run that hardly moves the
            model does not waste them all.
        max_passes: passes over the forget set at most; the run stops when the forget probability is below 15% of its
            start.
        batch_size: pairs per forward pass. An optimizer step always sees half of the forget set: with small batches
            the batch order, not the sample, decides what is forgotten last.
        seed: of the order and the retain partners.
        peft_config: train this adapter instead of the weights.
        autocast: dtype for `torch.autocast`, or `None`.
    """

    loss: UnlearningLoss = field(default_factory=UnlearningLoss)
    retain_weight: float = 1.0
    learning_rate: float = 1e-5
    max_passes: int = 10
    batch_size: int = 8
    seed: int = 0
    peft_config: Any = None
    autocast: torch.dtype | None = None

    def __post_init__(self) -> None:
        check_options(self, strict=False)

    def for_data(self, retain: Samples | None) -> CalibrationSettings:
        """These settings, without the retain term when there is no retain set."""
        if retain is None and self.loss.uses_retain:
            return replace(self, loss=self.loss.without_retain())
        return self

    def identity(self) -> dict[str, Any]:
        """What the run's outcome depends on, as plain JSON values."""
        return {
            "objective": self.loss.objective,
            "objective_args": self.loss.objective_args,
            "retain_loss": self.loss.retain_loss,
            "retain_weight": self.retain_weight,
            "learning_rate": self.learning_rate,
            "max_passes": self.max_passes,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "adapter": adapter_identity(self.peft_config),
            "autocast": str(self.autocast),
        }


@dataclass
class Calibration:
    """What the run showed.

    Attributes:
        residual: answer probability of each forget sample, mean over the snapshots inside the window, float64 `[N]`
            in [0, 1]; higher = harder.
        snapshots: mean forget probability after each step.
        used: which snapshots `residual` averages.
        pairs: forget-retain pairs trained on (the cost, in units of one pair's forward and backward pass).
    """

    residual: np.ndarray
    snapshots: list[float]
    used: list[int]
    pairs: int

    def tensors(self) -> dict[str, torch.Tensor]:
        """For a file; `from_tensors` reads them back."""
        return {
            "residual": torch.from_numpy(self.residual),
            "snapshots": torch.tensor(self.snapshots, dtype=torch.float64),
            "used": torch.tensor(self.used),
            "pairs": torch.tensor(self.pairs),
        }

    @classmethod
    def from_tensors(cls, tensors: dict[str, torch.Tensor]) -> Calibration:
        return cls(
            tensors["residual"].numpy(), tensors["snapshots"].tolist(), tensors["used"].tolist(), int(tensors["pairs"])
        )


def calibrate(
    model: PreTrainedModel,
    forget: Samples,
    retain: Samples | None,
    settings: CalibrationSettings,
    *,
    progress: bool = True,
) -> Calibration:
    """Unlearn `forget` briefly, record what is left of each sample, and restore the model.

    Args:
        model: the original model; its weights, modes and flags are the same afterwards, also after an error.
        forget: the samples to unlearn.
        retain: those to keep; without them the objective runs without its retain term.

    Raises:
        ValueError: when it could train nothing.
        CalibrationDiverged: when the run diverges.
    """
    settings = settings.for_data(retain)
    check_trained(model, settings.peft_config)
    with restored_afterwards(model, settings.peft_config) as trained:
        return _run(trained, forget, retain, settings, progress)


def _run(
    model: PreTrainedModel,
    forget: Samples,
    retain: Samples | None,
    settings: CalibrationSettings,
    progress: bool,
) -> Calibration:
    device = model.get_input_embeddings().weight.device
    loss, size = settings.loss, len(forget)
    generator = np.random.default_rng(settings.seed)
    # Drawn before anything is computed, so that only what is served needs a reference.
    passes = [(generator.permutation(size), _partners(generator, retain, size)) for _ in range(settings.max_passes)]
    with _autocast(device, settings.autocast):
        reference = loss.reference(
            model,
            forget,
            retain,
            batch_size=settings.batch_size,
            device=device,
            seed=settings.seed,
            retain_rows=None if retain is None else np.concatenate([partners for _, partners in passes]).tolist(),
        )
    collate = PairedCollator(forget, retain if loss.uses_retain else None, alternative=loss.uses_alternative)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=settings.learning_rate, weight_decay=0.0)
    rate = settings.learning_rate

    def probabilities() -> np.ndarray:
        with _autocast(device, settings.autocast):
            return answer_probability(model, forget, batch_size=settings.batch_size)

    start = probabilities()
    history: list[np.ndarray] = []
    pairs = 0
    with tqdm(total=settings.max_passes, desc="calibration", disable=not progress, unit="pass", leave=False) as bar:
        for number, (order, partners) in enumerate(passes):
            for group in optimizer.param_groups:
                group["lr"] = rate * (FIRST_PASS if number == 0 else 1.0)
            for half in np.array_split(np.arange(size), 2 if size > 1 else 1):
                _step(model, optimizer, collate, order[half], partners[half], settings, reference, device)
                pairs += len(half)
                history.append(probabilities())
                if not np.isfinite(history[-1]).all():
                    raise CalibrationDiverged("probability")
                if history[-1].mean() < WINDOW[0] * start.mean():
                    break
            left = history[-1].mean() / start.mean()
            bar.set_postfix_str(f"forget probability {history[-1].mean():.3f}")
            bar.update()
            if left < WINDOW[0]:
                break
            if left > STILL_UNTOUCHED and 2 * (number + 1) >= settings.max_passes:
                rate *= 2
    shares = [snapshot.mean() / start.mean() for snapshot in history]
    used = [i for i, share in enumerate(shares) if WINDOW[0] <= share <= WINDOW[1]]
    if not used:  # the run passed over the window, or never reached it
        used = [min(range(len(shares)), key=lambda i: abs(shares[i] - sum(WINDOW) / 2))]
    if shares[used[0]] > STILL_UNTOUCHED:
        logger.warning(
            f"the calibration run left the forget probability at {shares[used[0]]:.0%} of its start: the anchors rank "
            "noise. Raise the learning rate or the passes."
        )
    residual = np.mean([history[i] for i in used], axis=0)
    return Calibration(residual, [float(snapshot.mean()) for snapshot in history], used, pairs)


def _partners(generator: np.random.Generator, retain: Samples | None, size: int) -> np.ndarray:
    """A retain sample for each of `size` forget samples."""
    if not retain:
        return np.zeros(size, dtype=int)
    return generator.permutation(len(retain))[np.arange(size) % len(retain)]


def _step(
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    collate: PairedCollator,
    rows: np.ndarray,
    partners: np.ndarray,
    settings: CalibrationSettings,
    reference: Reference,
    device: torch.device,
) -> None:
    """One optimizer step on all of `rows`, in micro-batches."""
    optimizer.zero_grad()
    for chunk in np.array_split(np.arange(len(rows)), math.ceil(len(rows) / settings.batch_size)):
        batch = collate(
            [
                {
                    "row": 0,
                    "forget_index": rows[i],
                    "retain_index": partners[i],
                    "weight": 1.0,
                    "retain_scale": 1.0,
                }
                for i in chunk
            ]
        )
        batch = {key: value.to(device) for key, value in batch.items()}
        with _autocast(device, settings.autocast):
            terms = settings.loss(model, batch, reference)
        total = terms.forget.sum()
        if terms.retain is not None:
            total = total + settings.retain_weight * terms.retain.sum()
        if not torch.isfinite(total):
            raise CalibrationDiverged("loss")
        (total / len(rows)).backward()
    torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    optimizer.step()


def _autocast(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)
