"""Is it gone or only hidden? Relearning, quantisation and the straight line back. The model is always restored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cud_trainer.data import Samples
from cud_trainer.logprobs import score_answers
from cud_trainer.models.modes import all_trained, restored_afterwards

from .passes import Passes


@dataclass(frozen=True)
class Relearned:
    """Answer probability of every sample by steps of relearning, `[N]` each; 0 is the model as it was.

    Attributes:
        forget: of the forget set, what was taught again included.
        control: of samples that the model has never seen, `[M]` each; `None` without such.
    """

    forget: dict[int, np.ndarray]
    control: dict[int, np.ndarray] | None = None


def relearn(
    model: PreTrainedModel,
    forget: Samples,
    rows: Sequence[int],
    *,
    steps: Sequence[int] = (1, 2, 5, 10),
    learning_rate: float = 1e-5,
    batch_size: int = 16,
    seed: int = 0,
    control: Samples | None = None,
    passes: Passes | None = None,
) -> Relearned:
    """Answer probability of every forget sample after training on a few of them again, by step.

    Full fine-tuning by AdamW on the answers of `rows`, at most `batch_size` of them a step, in random order; weights
    are put back bit for bit. Step 0 is the model as it is. A few steps on such text make all text like it more likely:
    what comes back of the *other* samples is only what they gain beyond samples that were never seen.

    Args:
        control: samples that the model has never seen, measured at the same steps.
        passes: how the model goes over the samples; by default in one go. Processes that share it all train, alike.

    Raises:
        ValueError: for no rows or a step that is not positive.
    """
    if not len(rows) or not steps or min(steps) < 1:
        raise ValueError(f"relearning needs samples and steps of at least 1, got {len(rows)} and {list(steps)}")
    found, passes = Relearned({}, None if control is None else {}), passes or Passes()

    def look(step: int) -> None:
        name = f"relearned-{step}"
        found.forget[step] = passes.probability(f"{name}-forget", model, forget, batch_size)
        if control is not None and found.control is not None:
            found.control[step] = passes.probability(f"{name}-control", model, control, batch_size)

    look(0)
    generator = np.random.default_rng(seed)
    device = model.get_input_embeddings().weight.device
    with all_trained(model), restored_afterwards(model, None):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
        order: list[int] = []
        for step in range(1, max(steps) + 1):
            if len(order) < min(batch_size, len(rows)):
                order += generator.permutation(np.asarray(rows)).tolist()
            chosen, order = order[: min(batch_size, len(rows))], order[min(batch_size, len(rows)) :]
            batch = {key: value.to(device) for key, value in forget.pad(chosen).items()}
            optimizer.zero_grad()
            (-score_answers(model, batch).mean_logps).mean().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if step in steps:
                look(step)
    return found


def round_trip(weight: Tensor, bits: int, group: int | None = None) -> Tensor:
    """`weight [out, in]` through `bits`-bit integers and back: symmetric, a scale per row or per `group` of inputs.

    The largest magnitude becomes `2^(bits - 1) - 1`.
    """
    shape = weight.shape
    blocks = (
        weight.float().reshape(shape[0], -1, group) if group and shape[1] % group == 0 else weight.float().unsqueeze(1)
    )
    top = 2 ** (bits - 1) - 1
    scale = blocks.abs().amax(-1, keepdim=True).clamp(min=1e-12) / top
    return ((blocks / scale).round().clamp(-top, top) * scale).reshape(shape).to(weight.dtype)


@contextmanager
def quantised(model: nn.Module, bits: int) -> Iterator[nn.Module]:
    """The model with the weights of its linear maps rounded to `bits` bits (8: by row; 4: by groups of 128).

    Embedding and output layer stay as they are. Unlearning that only moved weights a little is undone by rounding
    (Zhang et al. 2024, arXiv 2410.16454). Weights are put back bit for bit.

    Raises:
        ValueError: for other than 4 or 8 bits.
    """
    if bits not in (4, 8):
        raise ValueError(f"weights are rounded to 8 or 4 bits, not {bits!r}")
    whole: Any = model
    outer = (whole.get_input_embeddings(), whole.get_output_embeddings())
    embeddings = {id(part.weight) for part in outer if part is not None}
    before: list[tuple[Tensor, Tensor]] = []
    try:
        with torch.no_grad():
            for module in model.modules():
                if (
                    isinstance(module, nn.Linear)
                    and module.weight.is_floating_point()
                    and id(module.weight) not in embeddings
                ):
                    before.append((module.weight, module.weight.detach().cpu().clone()))
                    module.weight.copy_(round_trip(module.weight, bits, 128 if bits == 4 else None))
        yield model
    finally:
        with torch.no_grad():
            for weight, values in before:
                weight.copy_(values)


def check_same_weights(model: nn.Module, other: Mapping[str, Tensor]) -> None:
    """Raise `ValueError` naming the first parameter that a model and the weights `other` do not share."""
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    for name in [*shapes, *other]:
        if name not in shapes or name not in other or other[name].shape != shapes[name]:
            raise ValueError(f"the models differ in {name}: there is no straight line between them")


@contextmanager
def between(model: nn.Module, other: dict[str, Tensor], share: float) -> Iterator[nn.Module]:
    """The model at `(1 - share) * other + share * model`, weight by weight; put back bit for bit.

    Args:
        other: a state dict of the same parameters (the original model's).

    Raises:
        ValueError: naming the first parameter that the two do not share.
    """
    check_same_weights(model, other)
    parameters = dict(model.named_parameters())
    before = {name: parameter.detach().cpu().clone() for name, parameter in parameters.items()}
    try:
        with torch.no_grad():
            for name, parameter in parameters.items():
                start = other[name].to(parameter.device, parameter.dtype)
                parameter.copy_(start + share * (parameter - start) if share < 1 else parameter)
        yield model
    finally:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(before[name])


def straight_line(
    model: PreTrainedModel,
    original: dict[str, Tensor],
    sets: dict[str, Samples],
    *,
    shares: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    batch_size: int = 16,
    passes: Passes | None = None,
) -> list[dict[str, Any]]:
    """Answer probability of every sample along the line from the original (0) to the unlearned weights (1).

    Returns:
        one entry per share: `{"share": s, name of the set: [N], ...}`.
    """
    path = []
    for share in shares:
        with between(model, original, share):
            entry: dict[str, Any] = {"share": float(share)}
            for name, prepared in sets.items():
                told = f"line-{share:g}-{name}"
                entry[name] = (passes or Passes()).probability(told, model, prepared, batch_size)
            path.append(entry)
    return path
