"""Positions of tokens: where they begin, how far they go, and how they do not depend on the rest of the batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .layers import base_causal_lm
from .modes import answering

# Rotary embeddings that are computed anew for the longest sequence of every batch.
LIVELY = ("dynamic", "longrope")


@dataclass(frozen=True)
class Positions:
    """What a model does with positions.

    Attributes:
        first: position of a sequence's first token; not 0 in the RoBERTa family.
        limit: the longest sequence, in tokens, where positions are learned or listed; `None` where they go on.
        rotary: the rotary embeddings whose frequencies follow the longest sequence of a batch.
    """

    first: int
    limit: int | None
    rotary: tuple[nn.Module, ...]


_known: WeakKeyDictionary[nn.Module, Positions] = WeakKeyDictionary()


def positions_of(model: Any) -> Positions:
    """What this model does with positions, found out once."""
    base = base_causal_lm(model)
    if base not in _known:
        _known[base] = _positions(base)
    return _known[base]


def _positions(base: nn.Module) -> Positions:
    first, limits, rotary = 0, [], []
    for name, module in base.named_modules():
        last = name.rpartition(".")[2]
        if (
            isinstance(module, nn.Embedding)
            and ("position" in last or last in ("wpe", "pos_emb"))
            and "relative" not in last
            and "vision" not in name
        ):
            offset = getattr(module, "offset", 0)
            if module.padding_idx is not None and not offset:
                first = offset = module.padding_idx + 1
            limits.append(module.num_embeddings - offset)
        kinds = getattr(module, "rope_type", None)
        kinds = kinds.values() if isinstance(kinds, dict) else [kinds]
        if any(kind is not None and any(word in str(kind) for word in LIVELY) for kind in kinds):
            rotary.append(module)
    limits += [len(table) for name, table in base.named_buffers() if name.endswith(".embed_positions")]
    return Positions(first, min(limits, default=None), tuple(rotary))


def position_ids(attention_mask: Tensor) -> Tensor:
    """Positions from 0 that follow the mask, so that left padding does not shift rotary or learned positions.

    For a model inside `own_positions`.
    """
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def check_sets(model: Any, **sets: Any) -> None:
    """`check_positions` of prepared `Samples`, by name; `None` for a set that is not there."""
    for name, samples in sets.items():
        if samples is not None:
            check_positions(model, name, samples.ids, samples.lengths)


def check_positions(model: Any, name: str, ids: Sequence[str], lengths: Sequence[int]) -> None:
    """Raise `ValueError` naming the first sample that has more tokens than the model has positions."""
    limit = positions_of(model).limit
    if limit is None:
        return
    for sample, length in zip(ids, lengths, strict=True):
        if length > limit:
            raise ValueError(
                f"{name} sample {sample!r} has {length} tokens, and the model has {limit} positions: set max_length "
                f"to {limit} or less, or cut the sample"
            )


@contextmanager
def own_positions(model: Any) -> Iterator[None]:
    """Inside, the model takes positions from 0, wherever its own begin, and every row has its own.

    So do rotary embeddings that follow the longest sequence of a batch: here they follow each row's length.
    """
    first = positions_of(model).first

    def shift(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        given = kwargs.get("position_ids")
        return args, kwargs if given is None else {**kwargs, "position_ids": given + first}

    with ExitStack() as stack:
        if first:
            handle = base_causal_lm(model).register_forward_pre_hook(shift, with_kwargs=True)
            stack.callback(handle.remove)
        for module in positions_of(model).rotary:
            own = module.__dict__.get("forward") or partial(type(module).forward, module)
            stack.enter_context(answering(module, partial(_by_row, own)))
        yield


def _by_row(own: Callable, x: Tensor, position_ids: Tensor, *args: Any, **options: Any) -> Any:
    """What `own` says of each row of `position_ids` `[B, T]` alone, whatever it was asked before."""
    if position_ids.ndim != 2:
        return own(x, position_ids, *args, **options)
    longest, results, order = position_ids.amax(-1), [], []
    for length in longest.unique():
        rows = (longest == length).nonzero().flatten()
        own(x[:1], position_ids[:1, :1] * 0, *args, **options)  # back to the frequencies of short sequences
        results.append(own(x[:1].expand(len(rows), *x.shape[1:]), position_ids[rows], *args, **options))
        order.append(rows)
    back = torch.cat(order).argsort()
    own(x[:1], position_ids[:1, :1] * 0, *args, **options)
    if isinstance(results[0], Tensor):
        return torch.cat(results)[back]
    return tuple(torch.cat(parts)[back] for parts in zip(*results, strict=True))
