"""Edge scores of a whole dataset, kept on disk: what reports and later forget requests read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..data import rows_by_id
from ..data.ids import IdKey, as_written, keyed_for, keys_beside
from ..files import atomic_write, check_new_file
from .graph import Graph


@dataclass
class CircuitTable:
    """Edge scores by sample. Holds ids, no text.

    Attributes:
        ids: sample ids, `N`.
        edges: scores of the existing edges, float32 `[N, n_edges]`, in row-major order of `graph.mask`.
        graph: of the model.
        settings: how the edges were scored (method, steps, baseline, metric).
        keys: that the ids may be made with, where they come from a file (`cud_trainer.data.ids`).
    """

    ids: list[str]
    edges: Tensor
    graph: Graph
    settings: dict[str, Any] = field(default_factory=dict)
    keys: tuple[IdKey, ...] = field(default=(), repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.edges.shape != (len(self.ids), self.graph.n_edges):
            raise ValueError(
                f"edge scores of shape {list(self.edges.shape)} do not fit {len(self.ids)} samples and "
                f"{self.graph.n_edges} edges"
            )

    def aligned(self, ids: Sequence[str]) -> CircuitTable:
        """The rows for `ids`, in that order; `ValueError` naming an id that has no circuit."""
        rows = rows_by_id(self.ids, ids, "circuits", keys=self.keys)
        return CircuitTable(list(ids), self.edges[rows], self.graph, self.settings, self.keys)

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write a safetensors file, atomically; `ValueError` if it exists."""
        check_new_file(path, overwrite)
        ids = keyed_for(path, self.ids, self.keys)
        header = {"ids": ids, "graph": asdict(self.graph), "settings": self.settings}
        # One entry: of several the library writes them in an order of its own, different every time.
        metadata = {"circuits": json.dumps(header, sort_keys=True)}
        tensors = {"edges": self.edges.float().contiguous()}
        return atomic_write(path, lambda temporary: save_file(tensors, temporary, metadata=metadata), private=True)

    def saved_at(self, path: str | Path) -> bool:
        """Whether the file at `path` holds this very table."""
        if not Path(path).exists():
            return False
        other = CircuitTable.load(path)
        ids = as_written(other.ids, self.ids, other.keys)
        same = (ids, self.graph, self.settings) == (other.ids, other.graph, other.settings)
        return same and torch.equal(self.edges.float(), other.edges)

    @classmethod
    def load(cls, path: str | Path) -> CircuitTable:
        """Read what `save` wrote; `ValueError` for a missing or foreign file."""
        try:
            with safe_open(str(path), framework="pt") as file:
                header = json.loads((file.metadata() or {})["circuits"])
                edges = file.get_tensor("edges")
            graph = Graph(**header["graph"])
            if not isinstance(header["ids"], list) or not isinstance(header["settings"], dict):
                raise ValueError("its header is not that of circuits")
            if not all(isinstance(value, int) and 0 <= value < 10_000 for value in asdict(graph).values()):
                raise ValueError(f"its graph is {graph}")
            if not bool(torch.isfinite(edges).all()):
                raise ValueError("an edge score is not finite")
            return cls(header["ids"], edges, graph, header["settings"], keys_beside(path))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"cannot read circuits from {path}: {str(error)[:300]}") from None
