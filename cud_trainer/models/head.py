"""The head of a causal LM, a few positions at a time.

The logits of all answer positions, and what a backward pass keeps of them, are the largest tensors of a step. Here the
model's own forward function runs once for the states in front of its head, and then over some of these at a time, the
decoder answering with what it has said: whatever the model does behind its decoder (adapter, bias, scale, cap) it does
itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .layers import base_causal_lm
from .modes import answering
from .shards import is_split

T = TypeVar("T")

# Of a step's logits at a time, by default; and what one takes: in float32, with its log-softmax and its gradient.
LOGITS_BYTES = 2**30
BYTES_OF_A_LOGIT = 12

_has_states: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


@dataclass(frozen=True)
class HeadStates:
    """What the head of a model reads at some positions, in place of their logits.

    Attributes:
        hidden: the states, `[B, K, d]`.
        project: from states `[b, k, d]` to their logits `[b, k, V]`.
        device: of the logits.
        at_once: positions whose logits may be there at a time.
    """

    hidden: Tensor
    project: Callable[[Tensor], Tensor]
    device: torch.device
    at_once: int = 1

    def __getitem__(self, rows: slice | Tensor) -> HeadStates:
        return replace(self, hidden=self.hidden[rows])


def positions_at_once(model: nn.Module, positions: int, logits_bytes: int) -> int | None:
    """How many positions' logits fit into `logits_bytes`, at least 1; `None` where all do, or have to be made at once:
    of a compiled model, of weights that are split over processes, of an architecture that does not show its states.

    Args:
        positions: of the whole batch.
        logits_bytes: 0 for no bound.
    """
    base = base_causal_lm(model)
    vocabulary = base.config.get_text_config().vocab_size if hasattr(base, "config") else 0
    if not logits_bytes or positions * vocabulary * BYTES_OF_A_LOGIT <= logits_bytes:
        return None
    # A backward pass that makes logits again needs weights that are whole then, and a function that stays as it is.
    if _is_compiled(model) or is_split(model) or _decoder(base) is base or not _has_states.get(base, True):
        return None
    return max(1, logits_bytes // (vocabulary * BYTES_OF_A_LOGIT))


def _is_compiled(model: Any) -> bool:
    while not hasattr(model, "_orig_mod") and hasattr(model, "module"):
        model = model.module
    return hasattr(model, "_orig_mod")


def _decoder(base: Any) -> Any:
    """What a model calls for the states in front of its head; the model itself where that is not known."""
    found = base.get_decoder() if hasattr(base, "get_decoder") else base
    return getattr(base, "model", base) if found is base else found


def read_head(
    model: nn.Module, positions: Tensor, at_once: int, function: Callable[[Tensor | HeadStates], T], **inputs: Any
) -> T:
    """What `function` makes of a model's states in front of its head.

    It runs within the model's forward pass: there autocast is on, and wrappers (DDP) see what comes out.

    Args:
        model: causal LM (bare, PEFT or wrapped by accelerate).
        positions: those that are read, `[K]`.
        at_once: positions whose logits may be there at a time.
        function: from the states to tensors (a tensor, or a tuple of them); it gets the logits `[B, K, V]` of a model
            whose head does not show its states.
        inputs: of the model.
    """
    base = base_causal_lm(model)
    own = base.forward

    def forward(*args: Any, **kwargs: Any) -> T:
        return function(_read(base, own, positions, at_once, args, kwargs))

    with answering(base, forward):
        return model(**inputs)


def _read(
    base: Any, own: Callable, positions: Tensor, at_once: int, args: tuple, kwargs: dict[str, Any]
) -> Tensor | HeadStates:
    decoder, said = _decoder(base), []
    decode = decoder.forward

    def overheard(*args: Any, **kwargs: Any) -> Any:
        said.append(decode(*args, **kwargs))
        return said[-1]

    with answering(decoder, overheard):
        first = own(*args, logits_to_keep=positions[:1], **kwargs).logits
    if first.shape[1] != 1:  # an architecture that ignores `logits_to_keep`: these are all
        _has_states[base] = False
        return first[:, positions.to(first.device)]
    output = said[0] if len(said) == 1 else None
    hidden: Any = getattr(output, "last_hidden_state", None)

    def project(hidden: Tensor) -> Tensor:
        again = type(output)(**{**output, "last_hidden_state": hidden})  # type: ignore[misc,dict-item]
        with answering(decoder, lambda *args, **kwargs: again):
            return own(*args, logits_to_keep=0, **kwargs).logits

    if base not in _has_states:
        _has_states[base] = hidden is not None and _agrees(project, hidden[:, positions[:1].to(hidden.device)], first)
    if not _has_states[base]:
        return own(*args, logits_to_keep=positions, **kwargs).logits
    return HeadStates(hidden[:, positions.to(hidden.device)], project, first.device, at_once)


@torch.no_grad()
def _agrees(project: Callable[[Tensor], Tensor], hidden: Tensor, logits: Tensor) -> bool:
    """Whether a model says of a position by itself what it said of it among all, to rounding."""
    found = project(hidden)
    return found.shape == logits.shape and torch.allclose(found, logits, rtol=0.01, atol=0.01 * float(logits.std()))


def made_again(function: Callable[..., T], *inputs: Any) -> T:
    """`function(*inputs)`, of which a backward pass keeps the inputs only, and runs it again."""
    if not torch.is_grad_enabled():
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False)
