"""The residual-stream graph of a decoder: which component can write into which."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Graph:
    """Nodes and edges of a decoder.

    Sources, in depth order: `input` (token embedding), then per layer the attention heads `a{l}.h{i}` (after W_O,
    without its bias) and the MLP `m{l}`. Destinations: per layer the inputs of the query heads `a{l}.h{i}.q`, key heads
    `a{l}.h{i}.k` and value heads `a{l}.h{i}.v`, then `m{l}`; last `logits`. An edge runs from each source to each later
    destination; the heads of a layer reach the MLP of that layer, unless the two run in parallel on the same input.

    Attributes:
        n_layers, n_heads: of the decoder.
        n_kv_heads: number of key (and value) destinations per layer: the model's key/value heads, or `n_heads` when
            grouped heads are scored per query head.
        parallel: attention and MLP of a layer read the same residual stream (GPT-NeoX, Phi).
    """

    n_layers: int
    n_heads: int
    n_kv_heads: int
    parallel: bool = False

    @property
    def sources_per_layer(self) -> int:
        return self.n_heads + 1

    @property
    def destinations_per_layer(self) -> int:
        return self.n_heads + 2 * self.n_kv_heads + 1

    @cached_property
    def sources(self) -> list[str]:
        names = ["input"]
        for layer in range(self.n_layers):
            names += [f"a{layer}.h{head}" for head in range(self.n_heads)] + [f"m{layer}"]
        return names

    @cached_property
    def destinations(self) -> list[str]:
        names = []
        for layer in range(self.n_layers):
            names += [f"a{layer}.h{head}.q" for head in range(self.n_heads)]
            names += [f"a{layer}.h{head}.{part}" for part in "kv" for head in range(self.n_kv_heads)]
            names.append(f"m{layer}")
        return [*names, "logits"]

    def sources_before_attention(self, layer: int) -> int:
        """How many sources (a prefix of `sources`) can reach q, k and v of `layer`; `n_layers` stands for the end."""
        return 1 + layer * self.sources_per_layer

    def sources_before_mlp(self, layer: int) -> int:
        """How many sources (a prefix of `sources`) can reach the MLP of `layer`."""
        return self.sources_before_attention(layer) + (0 if self.parallel else self.n_heads)

    @cached_property
    def mask(self) -> Tensor:
        """True where an edge exists, bool `[n_sources, n_destinations]`."""
        mask = torch.zeros(len(self.sources), len(self.destinations), dtype=torch.bool)
        for layer in range(self.n_layers):
            start = layer * self.destinations_per_layer
            end = start + self.destinations_per_layer
            mask[: self.sources_before_attention(layer), start : end - 1] = True
            mask[: self.sources_before_mlp(layer), end - 1] = True
        mask[:, -1] = True
        return mask

    @cached_property
    def owned(self) -> Tensor:
        """True where a destination belongs to a source's node, bool `[n_sources, n_destinations]`.

        A query head's node has its own q and the k and v of its group; an MLP its input.
        """
        owned = torch.zeros(len(self.sources), len(self.destinations), dtype=torch.bool)
        group = self.n_heads // self.n_kv_heads
        for layer in range(self.n_layers):
            start, source = layer * self.destinations_per_layer, self.sources_before_attention(layer)
            for head in range(self.n_heads):
                owned[source + head, start + head] = True
                owned[source + head, start + self.n_heads + head // group] = True
                owned[source + head, start + self.n_heads + self.n_kv_heads + head // group] = True
            owned[source + self.n_heads, start + self.destinations_per_layer - 1] = True
        return owned

    @cached_property
    def steps(self) -> list[tuple[slice, slice]]:
        """Sources and destinations of each block in depth order: attention, MLP, attention, ..."""
        steps = []
        for layer in range(self.n_layers):
            start, source = layer * self.destinations_per_layer, self.sources_before_attention(layer)
            end, mlp = start + self.destinations_per_layer, source + self.n_heads
            steps += [(slice(source, mlp), slice(start, end - 1)), (slice(mlp, mlp + 1), slice(end - 1, end))]
        return steps

    @cached_property
    def source_layers(self) -> Tensor:
        """Layer of each source, int `[n_sources]`; the embedding is layer -1."""
        return torch.tensor([-1, *(layer for layer in range(self.n_layers) for _ in range(self.sources_per_layer))])

    @cached_property
    def destination_layers(self) -> Tensor:
        """Layer of each destination, int `[n_destinations]`; the logits are layer `n_layers`."""
        layers = [layer for layer in range(self.n_layers) for _ in range(self.destinations_per_layer)]
        return torch.tensor([*layers, self.n_layers])

    @property
    def n_edges(self) -> int:
        return int(self.mask.sum())

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the node names and edges (16 hex digits): circuits are comparable only when it is equal."""
        text = ",".join(self.sources) + "|" + ",".join(self.destinations)
        return hashlib.sha256(text.encode() + self.mask.numpy().tobytes()).hexdigest()[:16]
