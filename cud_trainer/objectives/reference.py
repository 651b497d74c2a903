"""What the model before unlearning said: computed once, kept without the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..files import atomic_write
from ..logprobs import AnswerScores, wide


class BySample(Sequence[Tensor]):
    """Values of the answer tokens of each sample, `[n_tokens, ...]`; none of a sample of which nothing is known.

    All of them are one tensor, made when the first come: a tensor a sample would take more than what is in it.

    Attributes:
        sizes: tokens of each sample, int64 `[N]`; 0 where nothing will be known.
        values: of all samples in their order, `[sum of sizes, ...]`; `None` before there are any.
    """

    def __init__(self, sizes: Sequence[int] | np.ndarray | Tensor = (), values: Tensor | None = None) -> None:
        self.sizes, self.values = torch.as_tensor(sizes, dtype=torch.long), values
        self._ends = self.sizes.cumsum(0)

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, row: Any) -> Any:  # an integer; no slices
        size, end = int(self.sizes[row]), int(self._ends[row])
        return torch.empty(0) if self.values is None or not size else self.values[end - size : end]

    def keep(self, rows: Sequence[int], values: Tensor) -> None:
        """Take the values of these samples, one after the other."""
        if self.values is None:
            self.values = values.new_empty((int(self.sizes.sum()), *values.shape[1:]))
        for row, own in zip(rows, values.split(self.sizes[list(rows)].tolist()), strict=True):
            self[row].copy_(own)


@dataclass
class TopTokens:
    """The likeliest tokens at every answer position, by sample.

    Attributes:
        logps, ids: their log-probabilities, float32 or wider, and ids, int32, `[n_tokens, k]`.
        rest: log of the probability of all other tokens, `[n_tokens]`; -inf where there is none.
    """

    logps: BySample = field(default_factory=BySample)
    ids: BySample = field(default_factory=BySample)
    rest: BySample = field(default_factory=BySample)

    @classmethod
    def empty(cls, sizes: Sequence[int] | np.ndarray) -> TopTokens:
        """Room for samples with so many answer tokens."""
        return cls(*(BySample(sizes) for _ in range(3)))

    def keep(self, rows: list[int], mask: Tensor, top: tuple[Tensor, ...]) -> None:
        """Take what `top_tokens` says of the answers of these samples."""
        # Kept off the accelerator: it grows with the dataset, a batch of it does not.
        logps, ids, rest = top
        for values, of_batch in ((self.logps, logps), (self.ids, ids.int()), (self.rest, rest)):
            values.keep(rows, of_batch[mask].cpu())

    def batch(self, rows: list[int], mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`logps [B, K, k]`, `ids [B, K, k]`, `rest [B, K]` on the True positions of `mask [B, K]`, 0 elsewhere."""
        logps, ids, rest = (spread([values[row] for row in rows], mask) for values in (self.logps, self.ids, self.rest))
        return logps, ids.long(), rest


def top_tokens(scores: AnswerScores, k: int, *, with_target: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The `k` likeliest tokens at every position: `logps`, `ids` `[B, K, k]` and `rest` `[B, K]` of `TopTokens`.

    Args:
        with_target: the target comes first.
    """

    def of_rows(some: AnswerScores, rows: slice) -> tuple[Tensor, ...]:
        logps = wide(some.logits).log_softmax(-1)
        ranked = logps.scatter(-1, some.targets.unsqueeze(-1), torch.inf) if with_target else logps
        ids = ranked.topk(min(k, logps.shape[-1]), dim=-1).indices
        return logps.gather(-1, ids), ids, logps.scatter(-1, ids, -torch.inf).logsumexp(-1)

    logps, ids, rest = scores.map_rows(of_rows)
    return logps, ids, rest


def spread(values: list[Tensor], mask: Tensor) -> Tensor:
    """Values of the answer tokens of each row, `[n_tokens, ...]`, put on the True positions of `mask`; 0 elsewhere."""
    result = torch.zeros(*mask.shape, *values[0].shape[1:], dtype=values[0].dtype, device=mask.device)
    for row, of_row in enumerate(values):
        result[row, mask[row]] = of_row.to(mask.device)
    return result


@dataclass
class Reference:
    """Reference quantities by sample; what is not needed stays empty.

    Attributes:
        forget_logps, alternative_logps: log-probability of each forget sample's answer, and of its alternative, `[N]`.
        forget_top, retain_top: likeliest tokens; nothing of a retain sample that is never served.
        retain_hidden: output of a decoder layer at the answer positions of each retain sample that is served,
            `[n_tokens, d]`.
        direction: random vector of length 1, `[d]`.
        option_scale: what the objective's option that goes by sample is multiplied by, `[N]`. It is not saved: it is
            made of lengths or difficulty, without the model.
        part: which objective each forget sample has, `[N]`, see `UnlearningLoss.part_of`; not saved, either.
    """

    forget_logps: Tensor | None = None
    alternative_logps: Tensor | None = None
    forget_top: TopTokens = field(default_factory=TopTokens)
    retain_top: TopTokens = field(default_factory=TopTokens)
    retain_hidden: BySample = field(default_factory=BySample)
    direction: Tensor | None = None
    option_scale: Tensor | None = None
    part: Tensor | None = None

    def save(self, path: Path, fingerprint: str) -> None:
        """Write a safetensors file, atomically, for its owner alone.

        `forget_top` are tokens of the forget set: whoever has the file and the tokenizer reads its answers in them.
        """
        tensors = {}
        for name in ("forget_logps", "alternative_logps", "direction"):
            if getattr(self, name) is not None:
                tensors[name] = getattr(self, name).cpu()
        lists = {"retain_hidden": self.retain_hidden}
        for side, top in (("forget_top", self.forget_top), ("retain_top", self.retain_top)):
            lists |= {f"{side}.logps": top.logps, f"{side}.ids": top.ids, f"{side}.rest": top.rest}
        for name, values in lists.items():
            if values.values is not None:
                tensors[name], tensors[f"{name}.sizes"] = values.values, values.sizes.clone()  # no two may be one
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        atomic_write(path, lambda temporary: save_file(tensors, temporary, {"fingerprint": fingerprint}), private=True)

    @classmethod
    def load(cls, path: Path, fingerprint: str, device: torch.device | str) -> Reference | None:
        """What `save` wrote for the same model and data, or `None`."""
        try:
            with safe_open(path, "pt") as file:
                if (file.metadata() or {}).get("fingerprint") != fingerprint:
                    return None
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no dictionary)
        except (OSError, SafetensorError):
            return None

        def parts(name: str) -> BySample:
            return BySample(tensors[f"{name}.sizes"], tensors[name]) if name in tensors else BySample()

        def single(name: str) -> Tensor | None:
            return tensors[name].to(device) if name in tensors else None

        def top(name: str) -> TopTokens:
            return TopTokens(*(parts(f"{name}.{kind}") for kind in ("logps", "ids", "rest")))

        return cls(
            single("forget_logps"),
            single("alternative_logps"),
            top("forget_top"),
            top("retain_top"),
            parts("retain_hidden"),
            single("direction"),
        )
