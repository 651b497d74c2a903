"""How an evaluation goes over its sets: in one go, or shared among processes and kept as it is done."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from cud_trainer.data import Samples
from cud_trainer.logprobs import answer_probability
from cud_trainer.resumable import WorkDir, of_main_process, process_state, run_parts

# Figures of some samples, arrays whose first axis is theirs, from these samples and the rows that they have in the set.
Measure = Callable[[Samples, list[int]], Mapping[str, np.ndarray]]
# A set is cut into so many parts at most, each of whole batches: what is shared, and kept, costs little beside it.
PARTS = 128
# Where a part is not cut into batches again, and costs something by itself.
FEW_PARTS = 8


class Passes:
    """Every set in one go, by this process alone; nothing is kept."""

    @property
    def writing(self) -> str | None:
        """Label of a bar within that of a pass, for what is written of a part; `None` for none."""
        return None

    def of(self, what: str, fingerprint: str) -> Passes:
        """The passes of a model, or of what two of them make."""
        return self

    def over(
        self, name: str, samples: Samples, measure: Measure, batches: list[list[int]] | None = None
    ) -> dict[str, np.ndarray]:
        """Figures of all samples, rows in their order.

        Args:
            name: of what is measured, and of the set.
            measure: must say the same of a sample whatever others there are, but for those that share its batch.
            batches: rows that go together; by default those of similar length (`Samples.plan`).
        """
        return dict(measure(samples, list(range(len(samples)))))

    def probability(self, name: str, model: PreTrainedModel, samples: Samples, batch_size: int) -> np.ndarray:
        """`answer_probability` of all samples, `[N]`."""

        def measure(part: Samples, rows: list[int]) -> dict[str, np.ndarray]:
            return {"probability": answer_probability(model, part, batch_size=batch_size)}

        return self.over(name, samples, measure)["probability"]

    def once(self, name: str, compute: Callable[[], Any]) -> Any:
        """Figures that are not of single samples: plain JSON values."""
        return compute()


@dataclass(frozen=True)
class SharedPasses(Passes):
    """Every set by all processes together, each a share of its batches: the same figures whatever their number.

    All of them have to call the same methods in the same order, and get the same results.

    Args:
        work: keeps each finished part of a set, numbers only, and needs it no second time. Whatever figures depend on
            besides `whose` passes they are, their names and the rows is its identity.
        batch_size: of those that measure.
        written: parts of a set at most whose `batches` are given: what is written.
        whose: what tells them from those of other models, each with a fingerprint (see `of`).
    """

    work: WorkDir | None
    batch_size: int
    written: int = PARTS
    whose: tuple[tuple[str, str], ...] = ()

    @property
    def writing(self) -> str | None:
        return "writing" if process_state().is_main_process else None

    def of(self, what: str, fingerprint: str) -> SharedPasses:
        return replace(self, whose=(*self.whose, (what, fingerprint)))

    def over(
        self, name: str, samples: Samples, measure: Measure, batches: list[list[int]] | None = None
    ) -> dict[str, np.ndarray]:
        given = batches is not None
        plan = joined(batches or samples.plan(batch_size=self.batch_size), self.written if given else PARTS)

        def part(rows: list[int]) -> dict[str, torch.Tensor]:
            found = measure(samples.select(rows), rows)
            return {key: torch.from_numpy(np.ascontiguousarray(values)) for key, values in found.items()}

        label = f"{' '.join(what for what, _ in self.whose)}: {name}"
        found = run_parts(self._named(name), part, plan, label=label, work=self.work)
        return {key: values.numpy() for key, values in found.items()}

    def once(self, name: str, compute: Callable[[], Any]) -> Any:
        """All processes compute it, as none may wait for long, and take what the main one has."""
        name = self._named(hashlib.sha256(name.encode()).hexdigest()[:8])
        saved = of_main_process(None if self.work is None else self.work.load(name))
        if saved is None:
            text = of_main_process(json.dumps(compute()))
            saved = {"json": torch.tensor(list(text.encode()), dtype=torch.uint8)}
            if self.work is not None and process_state().is_main_process:
                self.work.save(name, saved)
        return json.loads(bytes(saved["json"].tolist()))

    def _named(self, name: str) -> str:
        return "-".join([part for pair in self.whose for part in pair] + [name])


def joined(batches: list[list[int]], parts: int = PARTS) -> list[list[int]]:
    """At most so many parts, each the rows of as many batches that follow each other.

    Whoever plans batches of such a part by length comes to the same batches: all are full but the last of all.
    """
    size = -(-len(batches) // parts)
    return [[row for rows in batches[at : at + size] for row in rows] for at in range(0, len(batches), size)]
