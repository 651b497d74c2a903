"""What a study works on, read, prepared and checked once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from datasets import Dataset
from trl import ModelConfig

from cud_trainer.commands.options import load_tokenizer
from cud_trainer.data import Samples, check_disjoint, prepare_samples
from cud_trainer.data.samples import first_shared
from cud_trainer.data.template import TRAIN_ON, TemplateContext

from .options import StudyArguments

# Options of `cud train` that decide which tokens a sample becomes.
OPTIONS_OF_TEXT = (
    "max_length",
    "system_prompt",
    "chat_template_kwargs",
    "train_on",
    "chat_template_path",
    "pad_token",
    "eos_token",
)


def preparation(train: Mapping[str, Any], day: str | None = None) -> dict[str, Any]:
    """How `prepare_samples` makes tokens in all cells, by the options that they share."""
    told = train.get("chat_template_kwargs") or {}
    template = TemplateContext(train.get("system_prompt"), told, train.get("train_on", TRAIN_ON[0]))
    return {"max_length": train.get("max_length", 1024), "template": template.on({"date": day})}


@dataclass(frozen=True)
class StudyData:
    """Attributes:
    raw: the sets as they were read, by name: `forget` and, where there are such, `retain`, `utility`, `held-out` (well
        known, in no loss), `holdout` (never seen).
    samples: the same, prepared.
    group_column: of the forget set; `None` without.
    """

    raw: dict[str, Dataset]
    samples: dict[str, Samples]
    group_column: str | None

    @classmethod
    def read(cls, args: StudyArguments, model_args: ModelConfig) -> StudyData:
        """What the arguments name.

        Raises:
            ValueError: naming a sample, a column or an option.
        """
        train: dict[str, Any] = dict(args.train)  # type: ignore[arg-type]
        tokenizer, how = load_tokenizer(model_args, SimpleNamespace(**train)), preparation(train)
        forget, retain = args.load(tokenizer)
        parts = {
            "forget": forget,
            "retain": retain,
            "utility": args.load_utility(tokenizer),
            "held-out": args.load_heldout(tokenizer),
            "holdout": args.load_holdout(tokenizer),
        }
        raw = {name: part for name, part in parts.items() if part is not None}
        samples = {name: prepare_samples(part, tokenizer, name=name, **how) for name, part in raw.items()}
        if "retain" in samples:
            check_disjoint(samples["forget"], samples["retain"])
        for name in ("forget", "retain", "held-out") if "holdout" in samples else ():
            if name in samples and (shared := first_shared(samples["holdout"], samples[name])[0]) is not None:
                raise ValueError(f"holdout sample {shared!r} is in the {name} dataset: it was seen")
        group = train.get("group_column")
        if isinstance(group, str) and group not in forget.column_names:
            raise ValueError(f"forget dataset has no column {group!r}; it has {sorted(forget.column_names)}")
        if args.relearn_samples >= len(forget):
            raise ValueError(
                f"relearn_samples must leave some of the {len(forget)} forget samples, got {args.relearn_samples}"
            )
        return cls(raw, samples, group if isinstance(group, str) else None)

    @property
    def fingerprints(self) -> list[str | None]:
        """Of forget set, retain set and what measures utility; `None` for one that there is not. And of `holdout`."""
        sets = [self.samples.get(name) for name in ("forget", "retain", "utility")]
        unseen = [self.samples["holdout"].fingerprint] if "holdout" in self.samples else []
        return [None if part is None else part.fingerprint for part in sets] + unseen

    @property
    def unseen_groups(self) -> list[Any] | None:
        """The group of each never-seen sample; `None` without such samples, or without their column."""
        unseen, column = self.raw.get("holdout"), self.group_column
        return None if unseen is None or column not in unseen.column_names else list(unseen[column])

    @property
    def groups(self) -> list[Any] | None:
        """The group of each forget sample."""
        return None if self.group_column is None else list(self.raw["forget"][self.group_column])
