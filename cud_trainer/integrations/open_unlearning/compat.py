"""All that lets open-unlearning, written for transformers 4.45, run on transformers 5 as it is.

Nothing of it changes what is computed. Their branches for newer versions need less of it, and nothing here hurts them.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import inspect
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from transformers import PreTrainedTokenizerBase, Trainer

logger = logging.getLogger(__name__)

# What their modules import but need only with ZeRO, and for lm-evaluation-harness.
OPTIONAL = ("deepspeed", "lm_eval")
# Training arguments of transformers 4 that are no more, and the environment variable that took their place, if any.
LAPSED = {"logging_dir": "TENSORBOARD_LOGGING_DIR"}


class _Absent(ModuleType):
    """A module that is not installed: its names can be imported, not used."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def refuse(*args: Any, **options: Any) -> None:
            raise ImportError(f"{self.__name__}.{name} is needed here, but {self.__name__.split('.')[0]} is missing")

        return type(name, (), {"__init__": refuse})


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, names: list[str]) -> None:
        self.names = names

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if fullname.split(".")[0] not in self.names:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _Absent(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


@contextmanager
def stand_ins(*names: str) -> Iterator[None]:
    """Let what is imported inside import these packages also where they are not installed."""
    finder = _Finder([name for name in names if importlib.util.find_spec(name) is None])
    sys.meta_path.append(finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.split(".")[0] in finder.names]:
            del sys.modules[name]


def plain_chat_tokens() -> None:
    """Let `apply_chat_template` return a list of tokens, as in transformers 4, unless asked for something else."""
    current = PreTrainedTokenizerBase.apply_chat_template

    def apply_chat_template(self: Any, *args: Any, **options: Any) -> Any:
        return current(self, *args, **{"return_dict": False, **options})

    PreTrainedTokenizerBase.apply_chat_template = apply_chat_template  # type: ignore[method-assign]


def without_lapsed_arguments(load_trainer_args: Any) -> Any:
    """Their `load_trainer_args`, which gets no training argument that transformers 5 has dropped."""

    def load(trainer_args: Mapping[str, Any], dataset: Any) -> Any:
        arguments = dict(trainer_args)
        for name, variable in LAPSED.items():
            if name in arguments:
                os.environ.setdefault(variable, str(arguments.pop(name)))
        return load_trainer_args(arguments, dataset)

    return load


def adapted(trainer_class: type[Trainer]) -> type[Trainer]:
    """A subclass of one of their trainers that transformers 5 can make and call.

    It takes `tokenizer` or `processing_class`, may have no `eval_dataset` with any `eval_strategy`, and its
    `compute_loss` accepts `num_items_in_batch` and batches with the sample index in them (their collator
    `DataCollatorForSupervisedDatasetwithIndex`).
    """
    accepted = inspect.signature(trainer_class.compute_loss).parameters

    class Adapted(trainer_class):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, tokenizer: Any = None, **options: Any) -> None:
            if tokenizer is not None:
                options.setdefault("processing_class", tokenizer)
            if options.get("eval_dataset") is None:
                options["eval_dataset"] = {}  # their evaluators bring their own data
            super().__init__(*args, **options)

        @property
        def tokenizer(self) -> Any:
            return self.processing_class

        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None, **_: Any
        ) -> Any:
            more = {"num_items_in_batch": num_items_in_batch} if "num_items_in_batch" in accepted else {}
            return super().compute_loss(model, without_index(inputs), return_outputs=return_outputs, **more)

    Adapted.__name__ = Adapted.__qualname__ = trainer_class.__name__
    return Adapted


def without_index(batch: Any) -> Any:
    """A nested batch without the entries `index`."""
    if not isinstance(batch, Mapping):
        return batch
    return {key: without_index(value) for key, value in batch.items() if key != "index"}
